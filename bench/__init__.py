"""Benchmarks: `make bench`. Each also runs by itself: `python -m bench.NAME --help`. Figures: docs/performance.md."""
