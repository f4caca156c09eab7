"""Times the quickstart's PPO step with several thread settings, alone and next to busy processes.

    python -m bench.threads                        prepares the quickstart's model once, then measures
    python -m bench.threads --folder DIR --busy 0 1 2

Each row is one run, whose environment sets OMP_NUM_THREADS and, except for our default, OMP_WAIT_POLICY. Next to it run
processes that compute without end. The numbers are milliseconds of wall time per step.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench import SPINNING, STARTED_WITH
from steepest.process.cores import usable_cores

WAYS = {"our default": None, "OMP_WAIT_POLICY=PASSIVE": "PASSIVE", "OMP_WAIT_POLICY=ACTIVE": "ACTIVE"}
"""Ways to wait: spin for a moment, but sleep next to busy processes; always sleep; never sleep."""
_STEP = re.compile(r"step_ms=([\d.]+)")


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Run `number` processes that each keep a core busy, for the `with` block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environment(threads: int, policy: str | None, started: Mapping[str, str] = STARTED_WITH) -> dict[str, str]:
    """The environment of a run, made from the one at start; without a policy the run chooses one itself."""
    kept = {name: value for name, value in started.items() if name not in SPINNING}
    return {**kept, "OMP_NUM_THREADS": str(threads)} | ({"OMP_WAIT_POLICY": policy} if policy else {})


def step_ms(folder: Path, steps: int, threads: int, policy: str | None) -> float:
    """Milliseconds per step of one run."""
    words = [sys.executable, "-m", "bench.overhead", "--folder", str(folder), "--steps", str(steps)]
    done = subprocess.run(words, env=environment(threads, policy), capture_output=True, text=True, check=False)
    found = _STEP.search(done.stdout)
    if found is None:
        raise SystemExit(f"the run ended with code {done.returncode}:\n{done.stderr}")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench_overhead"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    print("| threads | waiting | " + " | ".join(f"ms next to {n} busy" for n in given.busy) + " |")
    print("|---|---|" + "---|" * len(given.busy))
    for threads in dict.fromkeys((1, usable_cores())):
        for way, policy in WAYS.items():
            row = []
            for number in given.busy:
                with busy(number):
                    row.append(f"{step_ms(given.folder, given.steps, threads, policy):.0f}")
            print(f"| {threads} | {way} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
