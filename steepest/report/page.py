"""report.html: one file that holds the data of a run, what draws them, and nothing that is fetched."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import steepest
from steepest.errors import SteepestError
from steepest.process.files import replace_text
from steepest.report import read

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uPlot.min.css", "report.css")
SCRIPTS = ("uPlot.iife.min.js", "text.js", "charts.js", "samples.js")
FILE = "report.html"


def write_report(folder: Path, to: Path | None = None) -> Path:
    """Write the page of a run folder to `to`, by default `report.html` in the folder, and return where it is.

    A reader sees the old page or the new one, never a part. Raises SteepestError for a folder without metrics.jsonl,
    for a damaged record and where the page cannot be written.
    """
    samples = {
        "training": read.sample_lines(folder / "token_samples.jsonl", read.TRAINING_BYTES),
        "validation": read.sample_lines(folder / "samples.jsonl", read.VALIDATION_BYTES),
    }
    text = page("report", run_data(folder), samples, title=f"{folder.resolve().name}: report of a run")
    return write_page(folder / FILE if to is None else to, text)


def write_page(target: Path, text: str) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
    except OSError as error:
        raise SteepestError(f"{target}: the report cannot be written ({error.strerror or error}).") from error
    return target


def metrics_file(folder: Path) -> Path:
    """Raises SteepestError for a folder that is no run's."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise SteepestError(f"{folder} is no run folder: it has no metrics.jsonl. Give the folder of a run.")
    return file


def run_data(folder: Path) -> dict[str, Any]:
    """All that the page of a run shows but its samples, as JSON can express it."""
    steps = read.read_steps(metrics_file(folder))
    return {
        "name": folder.resolve().name,
        "version": steepest.__version__,
        "written": round(time.time()),
        "events": read.events(steps),
        "settings": read.read_settings(folder / "config.yaml"),
        **vars(read.curves(steps)),
    }


def page(name: str, data: Mapping[str, Any], samples: Mapping[str, read.Lines], *, title: str) -> str:
    """The template `name`.html of assets/ with styles, scripts (the common ones, then `name`.js) and data in it.

    Only the scripts of assets/ run: the page names their hash in its policy, and texts of a model are data, never
    markup. `samples` are rows by the id of the element that holds them.
    """
    script = _joined((*SCRIPTS, f"{name}.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    left_out = {key: lines.steps_left_out for key, lines in samples.items()}
    text = json.dumps({**data, "left_out": left_out}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    rows = {key: embedded("\n".join(lines.lines)) for key, lines in samples.items()}
    parts = {
        "title": html.escape(title),
        "script_hash": f"'sha256-{digest}'",
        "style": _joined(STYLES),
        "script": script,
        "data": embedded(text),
        "samples": "\n".join(
            f'<script id="{key}" type="application/x-ndjson">{text}</script>' for key, text in rows.items()
        ),
    }
    template = _asset(f"{name}.html").replace("{{head}}", _asset("head.html"))
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def embedded(text: str) -> str:
    """JSON that can stand in a script element: no text in it ends the element or opens a comment, and half characters
    (lone surrogates) are escapes."""
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode("utf-8")


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(_asset(name) for name in names)


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
