"""Several runs on one page: what their configurations differ in, curves over each other, answers side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import steepest
from steepest.errors import SteepestError
from steepest.report import read
from steepest.report.page import metrics_file, page, write_page

MOST = 6
"""Runs of a page: the curves have so many colors that every reader can tell apart."""


def write_comparison(folders: Sequence[Path], to: Path) -> Path:
    """Write the page that compares run folders, and return where it is.

    Raises SteepestError for fewer than two runs or more than MOST, for a folder that is no run's and for a page that
    cannot be written.
    """
    if not 2 <= len(folders) <= MOST:
        raise SteepestError(f"{len(folders)} run(s) to compare. Give 2 to {MOST} run folders.")
    names = names_of(folders)
    runs = [run_data(folder, name, len(folders)) for folder, name in zip(folders, names, strict=True)]
    budget = 2 * read.VALIDATION_BYTES // len(folders)
    samples = {
        f"validation-{place}": read.sample_lines(folder / "samples.jsonl", budget)
        for place, folder in enumerate(folders)
    }
    data = {"runs": runs, "version": steepest.__version__, "written": round(time.time())}
    return write_page(to, page("compare", data, samples, title=" and ".join(names)))


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths))):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise SteepestError("a run folder is given twice. Give each run once.")


def run_data(folder: Path, name: str, num_runs: int) -> dict[str, Any]:
    steps = read.read_steps(metrics_file(folder))
    settings = {key: value for key, value, _ in read.read_settings(folder / "config.yaml")}
    return {"name": name, "settings": settings, **vars(read.curves(steps, read.POINTS // num_runs))}
