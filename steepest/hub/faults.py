"""The faults of a hub, one word for each, and their messages to the user.

The clients raise the exceptions of their HTTP libraries, wrapped differently from release to release. `fault_of` reads
status codes, error numbers and the names of classes along the chain of an exception, so it needs none of these
packages.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from steepest.config.types import Hub
from steepest.errors import setting
from steepest.versions import pip_install

What = Literal[
    "missing", "revision", "login", "gated", "forbidden", "limit", "server", "network", "offline", "space", "cache",
    "corrupt", "name", "package", "files", "other",
]  # fmt: skip
UNREACHABLE: tuple[What, ...] = ("network", "offline", "server", "limit")
"""Faults that say nothing about the repository: a complete copy in the cache may be used instead."""


class HubFault(Exception):
    """A fault of a hub, its network or its cache. `detail` is in the client's words."""

    def __init__(self, what: What, detail: str = "") -> None:
        super().__init__(what, detail)
        self.what, self.detail = what, detail


@dataclass(frozen=True)
class HubNames:
    """The names of a hub, its variables, commands and extra, for messages."""

    title: str
    other: Hub
    login: str
    token: str
    endpoint: str
    cache: str
    extra: str = ""


NAMES: dict[Hub, HubNames] = {
    "huggingface": HubNames("Hugging Face", "modelscope", "hf auth login", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME"),
    "modelscope": HubNames(
        "ModelScope", "huggingface", "ms login", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT", "MODELSCOPE_CACHE",
        pip_install("modelscope"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What the user wrote, and the names of the related settings, for messages."""

    name: str
    """A path or a hub id."""
    hub: Hub
    key: str = setting("path")
    hub_option: str = f"{setting('hub')}="
    revision: str | None = None
    revision_option: str = f"{setting('revision')}="
    local_option: str = ""
    """The option that takes a folder of this machine instead; empty: `key` takes it."""
    noun: str = "model"

    @property
    def label(self) -> str:
        return f"{self.key}={self.name}"

    @property
    def local(self) -> str:
        return self.local_option or f"{self.key}=FOLDER"


def sentence(fault: HubFault, source: Source) -> str:
    """The whole message: the setting, what is wrong, the remedy, and the other hub where it may help."""
    names, what = NAMES[source.hub], fault.what
    problem, remedy = _words(fault, source, names)
    detail = f" ({fault.detail})" if fault.detail and what != "offline" else ""
    elsewhere = f" {NAMES[names.other].title} may have it: {source.hub_option}{names.other}."
    helps = what in ("missing", "revision", "gated", "forbidden", "limit", "server", "network", "package")
    return f"{source.label}: {problem}{detail}. {remedy}{elsewhere if helps else ''}"


_WORDS: dict[What, tuple[str, str]] = {
    "missing": (
        "{hub} has no such {noun}, or it is private, and there is no such folder here",
        "Check the name (owner/name). For a private one {log_in}.",
    ),
    "revision": (
        "{hub} has this {noun}, but no revision {revision}",
        "{revision_option} takes a branch, a tag or a commit; without it the newest is taken.",
    ),
    "login": ("{hub} does not know you", "The token is wrong or has run out, or there is none: {log_in}."),
    "gated": (
        "access to this {noun} is restricted",
        "Open its page on {hub}, accept the terms, then {log_in} with the same account.",
    ),
    "forbidden": (
        "{hub} refuses access to this {noun}",
        "Ask its owner for access, then {log_in} with an account that has it.",
    ),
    "limit": (
        "{hub} answers that there were too many requests",
        "Wait some minutes and start again: whole files are kept. Who is logged in may ask more often: {log_in}.",
    ),
    "server": ("{hub} has trouble at its end", "Start again later: whole files are kept."),
    "network": (
        "{hub} cannot be reached, or the connection broke off",
        "Start again: whole files are kept. Or use a mirror ({endpoint}=URL). {by_hand}.",
    ),
    "offline": (
        "not in the cache, and HF_HUB_OFFLINE is set",
        "Unset HF_HUB_OFFLINE once, or point {cache} at the cache that has it. {by_hand}.",
    ),
    "space": (
        "there is no room on the disk of the cache",
        "Free some, or put the cache on another disk: {cache}=FOLDER.",
    ),
    "cache": (
        "the cache cannot be written",
        "Give yourself the right to write there, or choose another: {cache}=FOLDER.",
    ),
    "corrupt": (
        "a file arrived damaged and was thrown away",
        "Start again. If it happens again the file is damaged on the hub, or by a proxy or mirror on the way "
        "({endpoint}).",
    ),
    "name": (
        "neither a folder here nor a hub id (owner/name) of {hub}",
        "Check the name.",
    ),
    "package": ("fetching from {hub} needs its package", "Install it: {extra}."),
    "files": (
        "{hub} has it, but without the files of a {noun}",
        "Name another one, or a folder: {local}.",
    ),
    "other": ("{hub}'s client failed", "{by_hand}."),
}
"""Fault -> (what is wrong, what to do)."""


def _words(fault: HubFault, source: Source, names: HubNames) -> tuple[str, str]:
    problem, remedy = _WORDS[fault.what]
    if fault.what == "name" and "@" in source.name:
        remedy = "A revision has its own key: {revision_option}..."
    told = {
        **vars(names),
        **vars(source),
        "hub": names.title,
        "revision": source.revision or "of that name",
        "log_in": f"run `{names.login}` or set {names.token}",
        "local": source.local,
        "by_hand": f"Fetch it where there is a network and give its folder: {source.local}",
    }
    return problem.format(**told), remedy.format(**told)


_BY_CLASS: tuple[tuple[What, tuple[str, ...]], ...] = (
    ("corrupt", ("FileIntegrityError", "FileSizeMismatchError")),
    ("offline", ("OfflineModeIsEnabled",)),
    ("name", ("HFValidationError",)),
    ("gated", ("GatedRepoError",)),
    ("revision", ("RevisionNotFoundError",)),
    ("missing", ("RepositoryNotFoundError",)),
)
_BY_STATUS: dict[int, What] = {401: "login", 403: "forbidden", 404: "missing", 429: "limit"}
_LONGEST = 160
_NETWORK = (
    "ConnectionError", "NetworkError", "TransportError", "Timeout", "TimeoutError", "TimeoutException",
    "RequestTimeoutError", "ProtocolError", "ChunkedEncodingError",
)  # fmt: skip
"""Names of exception classes of the clients and of HTTP libraries; the standard library uses the same names."""


def fault_of(error: BaseException) -> HubFault:
    """The fault that an exception of a client means. The most specific exception in its chain decides, not the
    outermost."""
    chain = list(_chain(error))
    detail = _first_line(error)
    status = next((found for link in chain if (found := _status(link)) is not None and found >= 400), None)
    for link in chain:
        if isinstance(link, HubFault):
            return link
    for link in chain:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return HubFault("space", detail)
        if isinstance(link, PermissionError) and link.errno in (errno.EACCES, errno.EPERM):
            return HubFault("cache", detail)
        if isinstance(link, OSError) and link.errno in (errno.EROFS, errno.ENOTDIR):
            return HubFault("cache", detail)
    for what, names in _BY_CLASS:
        if any(_is_one_of(link, names) for link in chain):
            return HubFault(what, detail if status is None else f"HTTP {status}")
    if any("Consistency check failed" in str(link) for link in chain):  # huggingface_hub's word for a wrong size
        return HubFault("corrupt", detail)
    if status is not None:
        what = _BY_STATUS.get(status, "server" if status >= 500 else "other")
        return HubFault(what, detail if what == "other" else f"HTTP {status}")
    if any(_is_one_of(link, _NETWORK) for link in chain):
        return HubFault("network", detail)
    return HubFault("other", detail)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, its causes, and the exceptions it collected from parallel downloads; each once."""
    seen: set[int] = set()
    left = [error]
    while left:
        link = left.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        gathered = getattr(link, "failed_files", None)
        if isinstance(gathered, dict):
            left.extend(value for value in gathered.values() if isinstance(value, BaseException))
        left.extend(cause for cause in (link.__cause__, link.__context__) if cause is not None)


def _is_one_of(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    for holder in (error, response):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _first_line(error: BaseException) -> str:
    """The first line of the client's message, shortened; the name of the class where the message is not in English."""
    gathered = getattr(error, "failed_files", None)
    if isinstance(gathered, dict) and gathered:
        path, first = next(iter(gathered.items()))
        return f"{path}: {_first_line(first)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines and lines[0].isascii() else type(error).__name__
    return text.rstrip(".") if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
