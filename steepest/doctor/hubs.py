"""Lines about the hubs and caches of models and data. Tokens are never printed, only whether there is one."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from steepest.checks import Check, ok, problem, warning
from steepest.doctor.machine import folder_line
from steepest.versions import installed, pip_install

_YES = ("1", "true", "yes", "on")


def hub() -> list[Check]:
    """The hub that is used for an id if no setting names one."""
    from steepest.config.environment import hub_from_environment, switch_problems

    wrong = switch_problems()
    if wrong:
        return [problem("hub", text.rstrip("."), "set it to True or False, or unset it") for text in wrong]
    name, why = hub_from_environment()
    if name == "modelscope" and installed("modelscope-hub", "modelscope") is None:
        text = f"{name} ({why}), whose package is not installed"
        return [problem("hub", text, pip_install("modelscope"))]
    return [ok("hub", f"{name} ({why or 'the default'})")]


def huggingface() -> list[Check]:
    """Hugging Face: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN."""
    home = huggingface_home()
    cache = _path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    file = _path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    lines = [
        _endpoint("HF_ENDPOINT", "https://huggingface.co"),
        folder_line("HF cache", cache, needed=False),
        _token("HF token", ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), file, "hf auth login"),
    ]
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_yes(os.environ.get(name))]
    if offline:
        text = f"{offline[0]}={os.environ[offline[0]]}: only what the cache holds can be used"
        return [*lines, warning("HF offline", text, f"unset {offline[0]} to download")]
    return [*lines, ok("HF offline", "no")]


def huggingface_home() -> Path:
    """HF_HOME, or huggingface_hub's default."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _path(os.environ.get("HF_HOME") or f"{base}/huggingface")


def modelscope() -> list[Check]:
    """ModelScope: MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN; no line if ModelScope is not used."""
    used = [name for name in os.environ if name.startswith("MODELSCOPE_")]
    if not used and installed("modelscope-hub", "modelscope") is None:
        return []
    home = _path(os.environ.get("MODELSCOPE_HOME") or "~/.modelscope")
    cache = _path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope")
    return [
        _endpoint("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
        folder_line("ModelScope cache", cache, needed=False),
        _token("ModelScope token", ("MODELSCOPE_API_TOKEN",), home / "credentials" / "cookies", "ms login"),
    ]


def _endpoint(variable: str, default: str) -> Check:
    value = os.environ.get(variable)
    if not value:
        return ok(variable, f"unset: {default}")
    shown = without_secrets(value)
    if not value.startswith(("https://", "http://")):
        return problem(variable, f"{shown} is no address", f"write it with https://, such as {variable}={default}")
    return ok(variable, shown)


def without_secrets(address: str) -> str:
    """An address without user, password and query."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "(not readable)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme and host else address.rpartition("@")[2]


def _token(name: str, variables: tuple[str, ...], file: Path, login: str) -> Check:
    for variable in variables:
        if os.environ.get(variable, "").strip():
            return ok(name, f"present, from {variable}")
    try:
        found = file.is_file() and file.stat().st_size > 0
    except OSError:
        found = False
    if found:
        return ok(name, f"present, from {file}")
    return ok(name, "none: public models and data only", f"{login}, or set {variables[0]}")


def _path(text: Path | str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _is_yes(value: str | None) -> bool:
    return value is not None and value.strip().lower() in _YES
