"""Every fault of a hub has its own words: what is wrong, the setting, the remedy, the other hub where it may help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steepest.config.types import Hub
from steepest.errors import ModelError
from steepest.hub import find
from steepest.hub.faults import NAMES, HubFault, fault_of
from tests.support.fake_hub import FakeHub
from tests.support.hub_faults import CASES, message_of
from tests.support.hub_world import MODEL, source, turn_to, without_waiting

ROOT = Path(__file__).parents[2]
WORDS = {
    "no such model": "has no such model, or it is private, and there is no such folder here (HTTP 404). Check the name",
    "no such revision": "has this model, but no revision v9 (",
    "401, wrong token": "does not know you (HTTP 401). The token is wrong or has run out, or there is none: run",
    "403, terms not accepted": "(HTTP 403). ",
    "403, no access": "refuses access to this model (HTTP 403). Ask its owner for access, then run `{login}`",
    "429, too many requests": "too many requests (HTTP 429). Wait some minutes",
    "503, server trouble": "has trouble at its end (HTTP 503). Start again later",
    "no network": "cannot be reached, or the connection broke off (",
    "connection breaks off again and again": "or a mirror",
    "HF_HUB_OFFLINE, nothing in the cache": "not in the cache, and HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE once",
    "too little room": "no room on the disk of the cache (262.2 kB are needed in FOLDER/cache/",
    "disk full while writing": "no room on the disk of the cache ([Errno 28] No space left on device). Free some",
    "cache not writable": "the cache cannot be written ([Errno 13] Permission denied",
    "damaged on the way": "a file arrived damaged and was thrown away (model.safetensors: ",
    "not an id": "neither a folder here nor a hub id (owner/name) of {title}. A revision has its own key: revision=...",
    "client not installed": "fetching from ModelScope needs its package. Install it: pip install ",
    "no files of a model": "without the files of a model (it holds q4.gguf, q8.gguf)",
}
WORDS["connection breaks off again and again"] = WORDS["no network"]
ELSEWHERE = (
    "no such model", "no such revision", "403, terms not accepted", "403, no access", "429, too many requests",
    "503, server trouble", "no network", "connection breaks off again and again", "client not installed",
)  # fmt: skip
PAIRS = [(case, client) for case, (_, hubs) in CASES.items() for client in hubs]


@pytest.mark.parametrize(("case", "client"), PAIRS)
def test_the_message_of_a_fault(case: str, client: Hub, tmp_path: Path) -> None:
    names, message = NAMES[client], message_of(case, client, tmp_path)
    assert message.startswith("path=owner/")
    assert WORDS[case].format(title=names.title, login=names.login) in message
    other = f"{NAMES[names.other].title} may have it: hub={names.other}."
    assert message.endswith(other) == (case in ELSEWHERE), message
    assert "\n" not in message and message.isascii() and message.endswith(".")


def test_gated_is_told_where_the_hub_tells_it(tmp_path: Path) -> None:
    message = message_of("403, terms not accepted", "huggingface", tmp_path)
    assert "access to this model is restricted (HTTP 403). Open its page on Hugging Face, accept the terms" in message


def test_the_page_names_every_fault() -> None:
    page = (ROOT / "docs" / "hubs.md").read_text(encoding="utf-8")
    assert [case for case in CASES if f"| {case} |" not in page] == []


def test_the_table_can_be_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hub_faults"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = done.stdout.splitlines()
    assert len(rows) == len(PAIRS) + 2 and all(row.startswith("| ") or row.startswith("|---") for row in rows)


def test_the_strongest_sign_of_a_chain_counts() -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as inner:
            raise ConnectionError("stream broken") from inner
    except ConnectionError as error:
        assert fault_of(error).what == "space"
    assert fault_of(ValueError("odd")).what == "other" and fault_of(ValueError("odd.")).detail == "odd"
    assert fault_of(HubFault("files", "none")).what == "files"
    assert fault_of(TimeoutError()).what == "network"
    assert len(fault_of(ValueError("x" * 500)).detail) == 160


@pytest.mark.parametrize("client", NAMES)
def test_a_cache_below_a_file_cannot_be_written(client: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch, FakeHub() as hub:
        hub.commit("models", "owner/tiny", MODEL)
        without_waiting(patch)
        turn_to(hub.url, tmp_path / "file", patch)
        with pytest.raises(ModelError, match=f"the cache cannot be written .*Not a dir.*{NAMES[client].cache}=FOLDER"):
            find(source(client), note=lambda text: None)


REAL_DISK = """
import os, sys
from pathlib import Path
import pytest
from tests.support.fake_hub import FakeHub
from tests.support.hub_world import MODEL, source, turn_to, without_waiting
from steepest.errors import ModelError
from steepest.hub import find
import steepest.hub.find
steepest.hub.find.require_room = lambda folder, needed: None  # the check before would see it
with pytest.MonkeyPatch.context() as patch, FakeHub() as hub:
    hub.commit("models", "owner/tiny", {**MODEL, "model.safetensors": bytes(2 << 20)})
    without_waiting(patch)
    turn_to(hub.url, Path(sys.argv[2]), patch)
    try:
        find(source(sys.argv[1]), note=lambda text: None)
    except ModelError as error:
        print(error)
"""


@pytest.mark.parametrize("client", NAMES)
def test_a_disk_that_really_is_full(client: Hub, tmp_path: Path) -> None:
    """A cache on a file system of 1 MiB, mounted in a namespace of its own."""
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        probe = subprocess.run([*unshare, "true"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if probe.returncode != 0:
        pytest.skip("this machine lets no user mount a file system")
    line = [*unshare, sys.executable, "-c", REAL_DISK, client, str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "there is no room on the disk of the cache" in done.stdout, done.stdout + done.stderr
