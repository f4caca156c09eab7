"""Versions against ranges, with the packaging library as the judge; what packages ask of each other."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from steepest.versions import UNKNOWN, build, installed, pip_install, public, release, requirement, satisfies
from tests.support.installs import package

VERSIONS = ["1.9", "2.0", "2.10", "2.10.0", "2.10.1", "2.13.0+cpu", "2.14.0", "3", "10.2.1"]
RANGES = [
    ">=2.10,<2.14",
    "==2.10",
    "==2.10.*",
    "!=2.10.*",
    "!=2.10.1",
    "~=2.10",
    "~=2.10.0",
    ">2.10",
    "<=2.13",
    ">=2 , <3",
]


@pytest.mark.parametrize(("version", "wanted"), list(itertools.product(VERSIONS, RANGES)))
def test_ranges_mean_what_pip_means_by_them(version: str, wanted: str) -> None:
    assert satisfies(version, wanted) is (Version(version) in SpecifierSet(wanted))


def test_a_post_release_counts_as_its_release_and_no_number_as_right() -> None:
    assert satisfies("2.10.0.post4", "==2.10.0") and satisfies("2.10.0.post4", ">=2.10,<2.14")
    assert satisfies(UNKNOWN, "==1.0") and not satisfies("1.0", "==2.0")


def test_parts_of_a_version() -> None:
    assert release("2.10.0.post4+cpu") == (2, 10, 0) and release("dev") == () and release("v0.23.0") == (0, 23, 0)
    assert (public("2.13.0+cpu"), public("2.13.0")) == ("2.13.0", "2.13.0")
    tags = {"2.13.0+cpu": "cpu", "2.13.0+cu130": "cu130", "2.13.0+rocm6.4": "rocm6.4", "2.13.0": None}
    tags |= {"2.14.0a0+git8fb877": None, "2.10.0+empty": None}
    assert {version: build(version) for version in tags} == tags


def test_what_is_installed_and_what_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("torch (==2.13.0)", "Other_Name>=1, <2 ; python_version >= '3'", 'torchx>=1 ; extra == "all"', "bare")
    package(tmp_path, "steep-a", "1.2.post3", requires=lines)
    package(tmp_path, "steep-b", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed("steep-none", "steep-a") == "1.2.post3" and installed("steep-none") is None
    assert installed("steep-b") == UNKNOWN
    asked = {name: requirement("steep-a", name) for name in ("torch", "other.name", "torchx", "bare", "absent")}
    assert asked == {"torch": "==2.13.0", "other.name": ">=1,<2", "torchx": None, "bare": None, "absent": None}
    assert requirement("steep-none", "torch") is None


def test_the_command_for_an_extra_names_its_packages_since_ours_is_on_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("torch>=2", 'b>=1.5 ; extra == "some"', 'a[x]>=1,<2 ; extra == "some"', 'c ; extra == "more"')
    package(tmp_path, "steepest", "9.9", requires=lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert pip_install("some") == "pip install 'b>=1.5' 'a[x]<2,>=1'" and pip_install("more") == "pip install 'c'"
    assert pip_install("other") == "pip install -e '.[other]' in a clone of Steepest"
