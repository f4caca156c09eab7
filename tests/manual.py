"""The commands of the manual's pages, and a shell to run them in as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = ("en", "zh")
OF_HUBS = r"HF_|HUGGING_FACE|MODELSCOPE_|\w+_USE_MODELSCOPE"
"""Variables of the machine that choose hubs, caches and tokens."""


def page(language: str, name: str) -> str:
    return (ROOT / "docs" / language / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    found: list[str] = re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.M | re.S)
    return found


def commands(text: str) -> list[str]:
    """The commands of the bash blocks, one line each, without comments."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    bare = [re.sub(r"(^|\s+)#\s.*$", "", line) for line in lines]
    return [re.sub(r"\s{2,}", " ", line).strip() for line in bare if line.strip()]


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table of the section whose heading starts so, without head and rule."""
    section = re.split(rf"^## {re.escape(heading)}", text, maxsplit=1, flags=re.M)[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", section, flags=re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


class Shell:
    """A home folder, a working folder with the repository's examples, and this interpreter as `python3`."""

    def __init__(self, folder: Path) -> None:
        self.home, self.here = folder / "home", folder / "clone"
        programs = folder / "bin"
        for path in (self.home, self.here, programs):
            path.mkdir(parents=True)
        (self.here / "examples").symlink_to(ROOT / "examples")
        python = f'#!/bin/sh\nexec "{sys.executable}"'
        for name, call in (("python3", ""), ("steepest", " -m steepest")):
            (programs / name).write_text(f'{python}{call} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not re.match(OF_HUBS, name)},
            "HOME": str(self.home),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        line = ["bash", "-euo", "pipefail", "-c", command]
        environment = {**self.environment, **variables}
        return subprocess.run(line, cwd=self.here, env=environment, capture_output=True, text=True, check=False)

    def ok(self, command: str, **variables: str) -> str:
        """What the command prints; an AssertionError with all of it when it fails or warns."""
        done = self.run(command, **variables)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


def with_words(command: str, *words: str) -> str:
    """The command with more words, before its redirection where it has one."""
    head, redirection, tail = command.partition(" 2>&1")
    return f"{head} {' '.join(words)}{redirection}{tail}"
