"""An advantage estimator by name, with its options: what a worker needs to compute returns, without a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.batch import Batch
from steepest.registry import with_options


@dataclass(frozen=True)
class EstimatorCall:
    """A registered estimator and the options it is called with. It can be pickled; the function is looked up by
    `bind` in the process that calls it. Example:

        EstimatorCall("gae", {"gamma": 1.0, "lam": 0.95}).returns_of(rows)
    """

    name: str
    """As in `algorithm.adv_estimator`: a registered name, or `file.py:function`."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def bind(self) -> Callable[[AdvantageInputs], tuple[Tensor, Tensor]]:
        """The estimator with the options that it takes. Raises ConfigError for a name that is not known here."""
        return with_options(ADVANTAGE_ESTIMATORS.get(self.name).value, self.options)

    @torch.no_grad()
    def returns_of(self, batch: Batch) -> Tensor:
        """(b, T) returns of some rows, without gradient, by an estimator that needs nothing but the row."""
        return self.bind()(AdvantageInputs.of(batch))[1]
