"""Functions of core are registered against their statements, and those of the user's own make one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from steepest.config.algorithms import ESTIMATORS, LOSSES, EstimatorSpec, LossSpec, Specs, same
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.policy_losses import POLICY_LOSSES
from steepest.core.registration import Algorithms
from steepest.errors import ConfigError

STATED = EstimatorSpec("stated", options={"gamma": "decay", **same("lam")}, constants=("eps",), needs=("values",))


@pytest.fixture
def table() -> Algorithms[EstimatorSpec]:
    return Algorithms("estimator", "some.key", Specs(EstimatorSpec, STATED))


@pytest.fixture
def losses() -> Iterator[Algorithms[LossSpec]]:
    with POLICY_LOSSES.temporarily():
        yield POLICY_LOSSES


def test_every_statement_has_its_function_and_every_function_its_statement() -> None:
    assert sorted(ESTIMATORS.names()) == ADVANTAGE_ESTIMATORS.names()
    assert sorted(LOSSES.names()) == POLICY_LOSSES.names()
    for name in ESTIMATORS.names():
        assert ADVANTAGE_ESTIMATORS.get(name).spec is ESTIMATORS.find(name)
    for name in LOSSES.names():
        assert POLICY_LOSSES.get(name).spec is LOSSES.find(name)


def test_a_function_that_fits_its_statement_is_registered_with_it(table: Algorithms[EstimatorSpec]) -> None:
    @table.register("stated")
    def function(x: int, *, decay: float, lam: float, eps: float = 1.0) -> None: ...

    entry = table.get("stated")
    assert entry.value is function and entry.spec is STATED and entry.facts == {}


def test_a_function_whose_keywords_differ_is_refused_with_both_lists(table: Algorithms[EstimatorSpec]) -> None:
    def more(x: int, *, decay: float, lam: float, eps: float, other: int) -> None: ...
    def fewer(x: int, lam: float, *, decay: float, eps: float) -> None: ...

    for function, found in ((more, "decay, eps, lam, other"), (fewer, "decay, eps")):
        with pytest.raises(ValueError) as caught:
            table.register("stated")(function)
        assert str(caught.value) == (
            f"estimator 'stated': {__name__}.{function.__qualname__} takes the keywords {found}, and its statement in "
            "steepest/config/algorithms.py names decay, eps, lam"
        )
    assert table.names() == []


def test_facts_of_a_built_in_are_stated_in_one_place(table: Algorithms[EstimatorSpec]) -> None:
    def function(x: int, *, decay: float, lam: float, eps: float) -> None: ...

    with pytest.raises(ValueError, match="state needs, whitened in steepest/config/algorithms.py, not here"):
        table.register("stated", needs=(), whitened=True)(function)


def test_a_function_of_the_package_without_a_statement_is_refused(table: Algorithms[EstimatorSpec]) -> None:
    def function(x: int) -> None: ...

    function.__module__ = "steepest.core.advantages.new"
    with pytest.raises(ValueError) as caught:
        table.register("statet")(function)
    assert str(caught.value) == (
        f"estimator 'statet': steepest.core.advantages.new.{function.__qualname__} has no statement in "
        "steepest/config/algorithms.py. Did you mean 'stated'?"
    )
    with pytest.raises(ValueError, match=r"has no statement in steepest/config/algorithms.py\.$"):
        table.register("wholly_different")(function)


def test_a_function_of_ones_own_makes_its_statement_in_the_decorator(table: Algorithms[EstimatorSpec]) -> None:
    @table.register("mine", needs=("values",), whitened=False)
    def mine(x: int, *, lam: float, own: int = 3) -> None: ...

    @table.register("renamed", options={"gamma": "own"})
    def renamed(x: int, *, lam: float = 1.0, own: float) -> None: ...

    assert table.get("mine").spec == EstimatorSpec("mine", options=same("lam"), needs=("values",), whitened=False)
    assert table.get("renamed").spec == EstimatorSpec("renamed", options={"gamma": "own"})
    with pytest.raises(ValueError, match=r"'other': .*other has no keyword decay$"):

        @table.register("other", options={"gamma": "decay"})
        def other(x: int, *, lam: float) -> None: ...

    with pytest.raises(ValueError, match="'typo': nothing can be stated under 'need'. Did you mean 'needs'?"):
        table.register("typo", need=("values",))(mine)
    with pytest.raises(ConfigError, match="no such estimator"):
        table.get("typo")


def plain(x: int, *, decay: float, eps: float = 0.5) -> None: ...


def test_a_plain_function_gets_the_options_it_has_keywords_for(table: Algorithms[EstimatorSpec]) -> None:
    name = f"{__name__}:plain"
    assert table.get(name).spec == EstimatorSpec(name, options={"gamma": "decay"})
    assert table.get(name).value is plain


def test_a_loss_is_stated_with_the_keywords_of_both_its_functions(losses: Algorithms[LossSpec]) -> None:
    def choose(x: int, *, tau_neg: float) -> None: ...

    def loss(x: int, *, tau_pos: float) -> None: ...

    with LOSSES.temporarily(LossSpec("two", options=same("tau_pos", "tau_neg"))):
        with pytest.raises(
            ValueError, match=r"takes the keywords tau_pos, and its statement .* names tau_neg, tau_pos$"
        ):
            losses.register("two")(loss)
        losses.register("two", choose=choose)(loss)
        assert losses.get("two").facts == {"choose": choose}
    losses.register("mine", choose=choose)(loss)
    assert losses.get("mine").spec == LossSpec("mine", options=same("tau_pos", "tau_neg"))


def test_whitening_that_is_not_stated_follows_from_values() -> None:
    assert EstimatorSpec("a", needs=("values",)).whitened is True
    assert EstimatorSpec("a", needs=("group_ids",)).whitened is False
    assert EstimatorSpec("a", needs=("values",), whitened=False).whitened is False
