"""Tables of names, and functions that lie outside the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from steepest.errors import ConfigError
from steepest.registry import Entry, ModuleRegistry, Registry, load_file, module_names

MINE = """
from {module} import TABLE

@TABLE.register("mine", needs=("values",))
def mine(): return 1

def plain(): return 2
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    """A table that a file of the user's own can import."""
    table = Registry("thing", "section.key")
    module = type(sys)("registry_under_test")
    module.TABLE = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "mine.py").write_text(MINE.format(module=module.__name__))
    return table


def test_a_name_is_stored_once_and_a_wrong_one_is_answered_with_the_nearest(table: Registry) -> None:
    table.register("vanilla", "plain", colour="white")(len)
    assert table.names() == ["plain", "vanilla"]
    assert (table.get("plain").value, table.get("plain").facts) == (len, {"colour": "white"})
    with pytest.raises(ValueError, match="thing 'plain' is registered already"):
        table.register("plain")(max)
    with pytest.raises(ConfigError, match=r"^section.key='vanila': no such thing. Did you mean 'vanilla'\? Known: "):
        table.get("vanila")


def test_what_is_registered_temporarily_is_gone_afterwards(table: Registry) -> None:
    table.register("plain")(len)
    with pytest.raises(RuntimeError), table.temporarily(Entry("given", max, {"colour": "red"})):
        table.register("made")(min)
        assert table.names() == ["given", "made", "plain"] and table.get("given").facts == {"colour": "red"}
        with pytest.raises(ValueError, match="registered already"), table.temporarily(Entry("plain", max)):
            pass
        raise RuntimeError
    assert table.names() == ["plain"] and table.get("plain").value is len


def test_a_decorated_function_of_ones_own_keeps_what_it_declares_however_often_it_is_asked_for(
    table: Registry, tmp_path: Path
) -> None:
    names = [f"{tmp_path}/mine.py:mine", f"{tmp_path}/../{tmp_path.name}/mine.py:mine"]
    entries = [table.get(name) for name in (*names, *names)]
    assert {entry.value for entry in entries} == {table.get("mine").value} and entries[0].value() == 1
    assert [entry.facts for entry in entries] == [{"needs": ("values",)}] * 4
    plain = table.get(f"{tmp_path}/mine.py:plain")
    assert (plain.value(), plain.facts) == (2, {})


def test_what_cannot_be_imported_is_an_error_of_the_configuration(
    table: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_module_of_mine.py").write_text("1 / 0")
    cases = {
        "broken_module_of_mine:f": r"^section.key: importing 'broken_module_of_mine' raised ZeroDivisionError: ",
        "no_such_module_of_mine:f": r"^section.key: importing 'no_such_module_of_mine' raised ModuleNotFoundError: ",
        f"{tmp_path}/broken_module_of_mine.py:f": r"^section.key='.*': importing it raised ZeroDivisionError: ",
        f"{tmp_path}/absent.py:f": r"^section.key='.*absent.py': there is no such file \(looked for /",
        f"{tmp_path}/mine.py:main": r"mine.py defines no 'main'. Did you mean 'mine'\?$",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            table.get(name)
    # a file that failed is tried again
    (tmp_path / "broken_module_of_mine.py").write_text("f = 3  # mended")
    assert load_file(f"{tmp_path}/broken_module_of_mine.py", "k").f == 3


def test_the_modules_of_a_folder_are_listed_without_those_that_begin_with_an_underscore() -> None:
    assert module_names("steepest.devices.backends") == ("cpu", "cuda", "npu")
    assert module_names("steepest.doctor")[:2] == ("command", "device") and "report" in module_names("steepest.doctor")


FOLDERS = """
import sys
from steepest.errors import ConfigError
from steepest.registry import Entry
from steepest.rewards.api import REWARDS
from steepest.rollout.api import ROLLOUT_ENGINES

def loaded(package): return {name.rpartition(".")[2] for name in sys.modules if name.startswith(package + ".")}

assert ROLLOUT_ENGINES.names() == ["builtin", "hf", "vllm"] and not loaded("steepest.rollout.engines")
try:
    ROLLOUT_ENGINES.get("hff")
    raise AssertionError
except ConfigError as error:
    assert "Did you mean 'hf'?" in str(error) and not loaded("steepest.rollout.engines")
entry = ROLLOUT_ENGINES.get("vllm")
assert loaded("steepest.rollout.engines") == {"vllm"} and "vllm" not in sys.modules
assert entry.facts["settings"] is True and entry.facts["check"].__name__ == "check_install"

for table, name in ((REWARDS, "gsm8k"), (ROLLOUT_ENGINES, "hf")):  # neither module has been imported by now
    try:
        table.register(name)(print)
        raise AssertionError("a built-in name was given away")
    except ValueError as error:
        assert str(error).endswith(f"{name!r} is registered already")
"""

TEMPORARY = """
from steepest.rewards.api import REWARDS
from steepest.rollout.api import ROLLOUT_ENGINES
from steepest.registry import Entry

for table in (REWARDS, ROLLOUT_ENGINES):
    with table.temporarily(Entry("mine", print)):
        names = table.names()
        assert all(table.get(name) for name in names)
    assert sorted([*table.names(), "mine"]) == names and all(table.get(name) for name in table.names())
"""


@pytest.mark.parametrize("code", [FOLDERS, pytest.param(TEMPORARY, marks=pytest.mark.slow)])
def test_entries_that_are_files_of_a_folder(code: str) -> None:
    """In a process that has imported none of them."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_that_does_not_register_its_name_is_named() -> None:
    table = ModuleRegistry("thing", "section.key", "steepest.process")
    with pytest.raises(ValueError, match=r"^steepest\.process\.cores registers no thing 'cores'$"):
        table.get("cores")
