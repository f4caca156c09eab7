"""Tables of names, and functions that lie outside the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steepest.errors import ConfigError
from steepest.registry import Entry, Registry, load_file

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
