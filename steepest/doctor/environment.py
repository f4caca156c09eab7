"""Environment variables that change a run silently."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from steepest.checks import Check, ok, warning

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
WAITING = {"OMP_WAIT_POLICY": ("active",), "GOMP_SPINCOUNT": ("infinite", "infinity")}
"""Variable -> values with which threads never sleep."""
ACTIVATED = "VIRTUAL_ENV"


def variables() -> list[Check]:
    """One line for each variable that is set so, or one line that none is."""
    lines = []
    autoload, activated = (os.environ.get(name, "") for name in (AUTOLOAD, ACTIVATED))
    if autoload not in ("", "0"):
        text = f"{AUTOLOAD}={autoload}: torch loads every device plug-in, and a broken one ends each run"
        lines.append(warning(AUTOLOAD, text, f"unset {AUTOLOAD}; Steepest sets it to 0"))
    for name, awake in WAITING.items():
        if (value := os.environ.get(name, "")).lower() in awake:
            text = f"{name}={value}: threads that wait keep their cores busy, which is slow next to other programs"
            lines.append(warning(name, text, f"unset {name}; Steepest lets them sleep next to other programs"))
    if activated and Path(activated).resolve() != Path(sys.prefix).resolve():
        text = f"{ACTIVATED}={activated} is activated, but this Python is that of {sys.prefix}"
        lines.append(warning(ACTIVATED, text, "run `python -m steepest doctor`, or activate the other environment"))
    return lines or [ok("variables", "none is set that would change a run unasked")]
