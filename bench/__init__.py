"""Benchmarks: `make bench`. Each also runs by itself: `python -m bench.NAME --help`. Figures: docs/performance.md."""

import os
import sys
from pathlib import Path

STARTED_WITH = dict(os.environ)
"""The environment before this: that of our own runs, which see for themselves what waiting threads do."""
SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
"""What waiting threads do in peers, and where this process computes: spin for a moment, then sleep. On two cores the
fastest of all: TRL's step took 63.2 s, with the OpenMP library's own choice 68.3, with PASSIVE alone 71.7."""

_FOLDER = Path(__file__).resolve().parent
_FILE = Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).resolve()

if _FILE.is_relative_to(_FOLDER):  # run as a file, which may have imported torch before this
    _name = ".".join(_FILE.relative_to(_FOLDER.parent).with_suffix("").parts)
    raise SystemExit(f"bench: not a file to run: say `python -m {_name}`, which sets what waiting threads do")
if not any(name in STARTED_WITH for name in SPINNING):
    os.environ.update(SPINNING)  # before torch is imported
