"""The comparison: the largest difference of each function, printed at the end of the run, one line a function."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-6
KEY = pytest.StashKey["Parity"]()


@dataclass
class Parity:
    """What has been compared so far: name -> largest difference, name -> documented difference."""

    largest: dict[str, float] = field(default_factory=dict)
    documented: dict[str, list[str]] = field(default_factory=dict)

    def same(self, name: str, ours: Tensor | float, theirs: Tensor | float, mask: Tensor | None = None) -> None:
        """Demand the same numbers, at true positions of `mask` where one is given."""
        a = torch.as_tensor(ours, dtype=torch.float64).detach()
        b = torch.as_tensor(theirs, dtype=torch.float64).detach()
        assert a.shape == b.shape, f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
        if mask is not None:
            a, b = a[mask], b[mask]
        assert bool(torch.isfinite(a).all()), f"{name}: a number of ours is not finite"
        difference = float((a - b).abs().max()) if a.numel() else 0.0
        self.largest[name] = max(difference, self.largest.get(name, 0.0))
        assert difference <= TOLERANCE, f"{name}: differs by {difference:.3g}"

    def differs(self, name: str, why: str) -> None:
        """Note a difference that the calling test has just asserted, on both sides."""
        self.documented.setdefault(name, [])
        if why not in self.documented[name]:
            self.documented[name].append(why)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Parity()


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    found: Parity = request.config.stash[KEY]
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(KEY, Parity())
    if not found.largest:
        return
    terminalreporter.section("largest difference a function")
    for name, difference in sorted(found.largest.items()):
        terminalreporter.write_line(f"{name:52} {difference:.1e}")
    terminalreporter.section("documented differences")
    for name, reasons in sorted(found.documented.items()):
        for why in reasons:
            terminalreporter.write_line(f"{name}: {why}")
    terminalreporter.write_line(f"functions within {TOLERANCE:.0e}: {len(found.largest)}")
