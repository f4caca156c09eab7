"""The fastest of several ways: timed in turn by a clock that the test moves, and kept."""

from __future__ import annotations

from steepest.models.faster import faster_of


class Ways:
    """Each way moves the clock by its next duration."""

    def __init__(self, **seconds: list[float]) -> None:
        self.now, self.order = 0.0, []
        self.candidates = {name: self._way(name, iter(durations)) for name, durations in seconds.items()}

    def _way(self, name, durations):
        def run() -> None:
            self.order.append(name)
            self.now += next(durations)

        return run

    def choose(self, choices: dict[str, str]) -> str:
        return faster_of("layer", self.candidates, choices, rounds=2, clock=lambda: self.now)


def test_the_smallest_time_wins_and_the_first_round_does_not_count():
    ways, choices = Ways(one=[0.1, 5.0, 3.0], other=[9.0, 2.0, 8.0]), {"head": "one"}
    assert ways.choose(choices) == "other"
    assert choices == {"head": "one", "layer": "other"}
    assert ways.order == ["one", "other"] * 3


def test_a_choice_is_kept_without_a_measurement_unless_it_is_no_candidate():
    ways = Ways(one=[1.0] * 3, other=[1.0] * 3)
    assert ways.choose({"layer": "other"}) == "other" and ways.order == []
    assert ways.choose(choices := {"layer": "third"}) == "one", "the first wins a tie"
    assert choices == {"layer": "one"}
