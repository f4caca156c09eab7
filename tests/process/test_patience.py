"""What a command says while it waits."""

from __future__ import annotations

import threading

import pytest

from steepest.console import say
from steepest.errors import key_names, setting
from steepest.process.patience import waiting_for


def test_it_speaks_again_and_again_and_ends_with_the_block() -> None:
    said: list[str] = []
    enough = threading.Event()

    def tell(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            enough.set()

    times = iter([100.0, 103.2, 133.0, *[163.0] * 1000])
    with waiting_for("the weights", first=0.001, then=0.001, tell=tell, clock=lambda: next(times)):
        assert enough.wait(60)
    count = len(said)
    assert said[:3] == [f"waiting for the weights ({seconds} s) ..." for seconds in (3, 33, 63)]
    assert not any(thread.name == "patience" for thread in threading.enumerate()) and len(said) == count


def test_what_is_quick_is_not_mentioned() -> None:
    said: list[str] = []
    with waiting_for("nothing", first=1000, tell=said.append):
        pass
    assert said == []


def test_an_error_passes_and_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), waiting_for("nothing", first=1000):
        raise ZeroDivisionError
    assert not any(thread.name == "patience" for thread in threading.enumerate())


def test_settings_have_the_keys_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    spoken = threading.Event()

    def tell(text: str) -> None:
        say(text)
        spoken.set()

    with key_names({"path": "model.path"}), waiting_for(setting("path"), first=0.001, then=1000, tell=tell):
        assert spoken.wait(60)
    assert "waiting for model.path (" in capsys.readouterr().out
