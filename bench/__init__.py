"""Benchmarks: `make bench`. Each also runs by itself: `python -m bench.NAME --help`. Figures: docs/performance.md."""

import os
import sys
from pathlib import Path

STARTED_WITH = dict(os.environ)
"""The environment before this package changes it. Our own runs get this one, because they set waiting threads up
themselves."""
SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
"""Variables for peers, and for computations in this process: waiting threads spin for a moment, then sleep. On two
cores this is the fastest setting: TRL's step took 63.2 s, with the OpenMP library's default 68.3, with PASSIVE alone
71.7."""

_FOLDER = Path(__file__).resolve().parent
_FILE = Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).resolve()

if _FILE.is_relative_to(_FOLDER):  # it was run as a file, which may have imported torch first
    _name = ".".join(_FILE.relative_to(_FOLDER.parent).with_suffix("").parts)
    raise SystemExit(f"bench: not a file to run: say `python -m {_name}`, which sets what waiting threads do")
if not any(name in STARTED_WITH for name in SPINNING):
    os.environ.update(SPINNING)  # before torch is imported
