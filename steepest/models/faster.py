"""Which of several ways to compute the same is the fastest on this machine, at a run's own sizes.

Timing decides, so two processes may decide differently, and the ways differ in their rounding: a run keeps its choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping

Candidates = Mapping[str, Callable[[], object]]
"""Name of a way -> runs it once."""


def faster_of(
    name: str,
    candidates: Candidates,
    choices: MutableMapping[str, str],
    *,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """The candidate with the smallest time of `rounds`, taken in turn after one round that does not count.

    `choices` holds what was chosen before, by name: a choice that is there and still a candidate is kept without a
    measurement, and a new one is added. The caller stores it with the run. The first of the candidates wins a tie.
    """
    if choices.get(name) in candidates:
        return choices[name]
    best = dict.fromkeys(candidates, float("inf"))
    for number in range(rounds + 1):
        for way, run in candidates.items():
            start = clock()
            run()
            if number:
                best[way] = min(best[way], clock() - start)
    choices[name] = min(best, key=lambda way: best[way])
    return choices[name]
