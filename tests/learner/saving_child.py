"""Run by test_checkpoint.py: saves checkpoints for ever until it is killed. Tells each finished step on stdout."""

from __future__ import annotations

import sys
from pathlib import Path

from steepest.learner.checkpoint import CheckpointStore


def main(folder: str) -> None:
    store = CheckpointStore(folder, keep=2)
    store.remove_leftovers()
    start = store.latest()
    step = 0 if start is None else store.state(start)["step"]
    # "ready" carries the step found, so that the test can compare it with what was promised before the kill
    print(f"ready {step}", flush=True)
    while True:
        # every third save repeats its step, to be killed inside a replacement too
        step += 0 if step and step % 3 == 0 and not store.state(store.folder / f"global_step_{step}")["again"] else 1
        again = store.has(step)

        def write(path: Path, step: int = step) -> None:
            for i in range(4):
                (path / f"{i}.bin").write_bytes(bytes([step % 251]) * 4096)

        store.save(step, {"actor": write, "critic": write}, {"step": step, "again": again})
        store.mark_best(step, 1.0 / step)
        print(f"saved {step}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
