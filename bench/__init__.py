"""Benchmarks: `make bench`. Each also runs by itself: `python -m bench.NAME --help`. Figures: docs/performance.md."""

import os

STARTED_WITH = dict(os.environ)
"""The environment before this: that of our own runs, which see for themselves what waiting threads do."""
SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
"""What waiting threads do in peers, and where this process computes: spin for a moment, then sleep. On two cores the
fastest of all: TRL's step took 63.2 s, with the OpenMP library's own choice 68.3, with PASSIVE alone 71.7."""

if not any(name in STARTED_WITH for name in SPINNING):
    os.environ.update(SPINNING)  # before torch is imported
