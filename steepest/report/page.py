"""report.html: one file that holds the data of a run, what draws them, and nothing that is fetched."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
import time
from pathlib import Path
from typing import Any

import steepest
from steepest.errors import SteepestError
from steepest.process.files import replace_text
from steepest.report import read

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uPlot.min.css", "report.css")
SCRIPTS = ("uPlot.iife.min.js", "text.js", "charts.js", "samples.js", "report.js")
FILE = "report.html"


def write_report(folder: Path, to: Path | None = None) -> Path:
    """Write the page of a run folder to `to`, by default `report.html` in the folder, and return where it is.

    A reader sees the old page or the new one, never a part. Raises SteepestError for a folder without metrics.jsonl,
    for a damaged record and where the page cannot be written.
    """
    target = folder / FILE if to is None else to
    text = page("report.html", run_data(folder), title=f"{folder.resolve().name}: report of a run")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
    except OSError as error:
        raise SteepestError(f"{target}: the report cannot be written ({error.strerror or error}).") from error
    return target


def run_data(folder: Path) -> dict[str, Any]:
    """All that the page of a run shows, as JSON can express it."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise SteepestError(f"{folder} is no run folder: it has no metrics.jsonl. Give the folder of a run.")
    steps = read.read_steps(metrics)
    curves = read.curves(steps)
    training = read.read_training_samples(folder / "token_samples.jsonl")
    validation = read.read_validation_samples(folder / "samples.jsonl")
    return {
        "folder": str(folder),
        "name": folder.resolve().name,
        "version": steepest.__version__,
        "written": round(time.time()),
        "steps": curves.steps,
        "seconds": curves.seconds,
        "every": curves.every,
        "metrics": curves.metrics,
        "events": read.events(steps),
        "settings": read.read_settings(folder / "config.yaml"),
        "training": training.rows,
        "training_left_out": training.steps_left_out,
        "validation": validation.rows,
        "validation_left_out": validation.steps_left_out,
    }


def page(template: str, data: Any, *, title: str) -> str:
    """A template of assets/ with styles, scripts and data in it. Only the scripts of assets/ run: the page names
    their hash in its policy, and texts of a model are data, never markup."""
    script = _joined(SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(title),
        "script_hash": f"'sha256-{digest}'",
        "style": _joined(STYLES),
        "script": script,
        "data": embedded(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _asset(template))


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no text in it ends the element or opens a comment, and half characters
    (lone surrogates) are escapes."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode("utf-8")


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(_asset(name) for name in names)


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
