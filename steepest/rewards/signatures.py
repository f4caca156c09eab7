"""How a reward function is called: by this project's keywords (which are verl's), or by TRL's.

The names of its parameters decide. A function with a parameter `completions` is TRL's: it gets lists, here of one
response, and returns a list with one number. Every other function gets the keywords of `OURS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.rewards.api import RewardRequest

OURS = ("data_source", "solution_str", "ground_truth", "extra_info")
TRL = ("prompts", "completions", "data_source", "ground_truth", "extra_info")
"""Keywords of TRL's form that every row has; the columns of the row are further ones."""
_LATER = ("completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL's trainer also passes and this one has not."""
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Signature:
    """What a function of the user's own takes."""

    is_trl: bool = False
    takes: frozenset[str] | None = None
    """Names of its parameters; None: any keyword."""
    columns: tuple[str, ...] = ()
    """Parameters that only a column of the data can fill."""

    def keywords(self, request: RewardRequest, options: Mapping[str, Any]) -> dict[str, Any]:
        """All keywords of a call."""
        return self._taken(_trl_keywords([request]) if self.is_trl else _our_keywords(request)) | dict(options)

    def batch_keywords(self, requests: Sequence[RewardRequest], options: Mapping[str, Any]) -> dict[str, Any]:
        """All keywords of one call of a function in TRL's form for several responses."""
        return self._taken(_trl_keywords(requests)) | dict(options)

    def _taken(self, keywords: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in keywords.items() if self.takes is None or name in self.takes}

    def outcome(self, value: Any) -> Any:
        """What the function returned for the response."""
        if not self.is_trl:
            return value
        return value if _is_scalar(value) else self.batch_outcomes(value, 1)[0]

    def batch_outcomes(self, value: Any, number: int) -> list[Any]:
        """What a function in TRL's form returned for each of `number` responses. Raises TypeError if it is no list,
        ValueError if it has another length."""
        if getattr(value, "ndim", None) == 1:  # an array or a tensor
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise TypeError(f"the reward function returned {type(value).__name__}, which is no list")
        if len(value) != number:
            completions = "completion" if number == 1 else "completions"
            raise ValueError(f"the reward function returned {len(value)} numbers for {number} {completions}")
        return list(value)

    def describe(self, label: str, *, together: bool = False) -> str:
        """How the function is called, for the start of a run. `together`: with all responses of a step at once."""
        if self.is_trl:
            taken = "any" if self.takes is None else ", ".join(sorted(self.takes))
            return (
                f"reward {label}: has a parameter `completions`, so it is called as TRL calls it, with lists of "
                + (
                    "all responses and the columns of their rows"
                    if together
                    else "one response and the columns of its row"
                )
                + f" as keywords (takes: {taken})."
            )
        taken = ", ".join(name for name in OURS if self.takes is None or name in self.takes)
        return f"reward {label}: called with {taken}."


def _our_keywords(request: RewardRequest) -> dict[str, Any]:
    return {
        "data_source": request.data_source,
        "solution_str": request.solution,
        "ground_truth": request.ground_truth,
        "extra_info": request.extra_info,
    }


def _is_scalar(value: Any) -> bool:
    return getattr(value, "ndim", None) != 1 and not isinstance(value, list | tuple)


def _trl_keywords(requests: Sequence[RewardRequest]) -> dict[str, list[Any]]:
    """Lists with an entry a response; None for a column that a row does not have."""
    rows = [_trl_row(request) for request in requests]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _trl_row(request: RewardRequest) -> dict[str, Any]:
    """Texts where the row's prompt is a text, messages where it is messages, as TRL does."""
    prompt: Any = [dict(message) for message in request.messages]
    completion: Any = [{"role": "assistant", "content": request.solution}]
    if request.is_text:
        prompt, completion = prompt[0]["content"] if prompt else "", request.solution
    own = {"prompts": prompt, "completions": completion}
    row = {"data_source": request.data_source, "ground_truth": request.ground_truth, "extra_info": request.extra_info}
    return {**row, **request.extra_info, **own}


def read_signature(function: Callable[..., Any], options: Collection[str] = ()) -> Signature:
    """How to call a function of the user's own. `options`: keywords that are given by the configuration.

    Raises TypeError, with the definition that would do, for a function that cannot be called in either way.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return Signature()  # written in C, without a signature: the first call shows it
    named = {p.name: p for p in parameters if p.kind in _NAMED}
    is_trl = "completions" in named
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if unknown := [name for name in options if name not in named and not takes_any]:
        raise TypeError(f"no keyword {unknown[0]}; it takes {', '.join(named) or 'none'}")
    usual = TRL if is_trl else OURS
    missing = [name for name, p in named.items() if p.default is p.empty and name not in (*usual, *options)]
    unfilled = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    unfilled += [name for name in missing if not is_trl or name in _LATER]
    if unfilled:
        raise TypeError(f"nothing fills its parameter {', '.join(unfilled)}")
    if not is_trl and not takes_any and "solution_str" not in named:
        raise TypeError("it has neither the parameter solution_str nor completions, so it would not see the response")
    return Signature(
        is_trl,
        None if takes_any else frozenset(named) - frozenset(options),
        tuple(name for name in missing if is_trl),
    )


def definitions(name: str) -> str:
    """How a function may be defined."""
    return (
        f"Define it as def {name}(data_source, solution_str, ground_truth, extra_info=None), or, as for TRL, "
        f"def {name}(completions, ground_truth, **kwargs)"
    )


def missing_columns(label: str, missing: Sequence[str], columns: Collection[str]) -> str:
    """What is wrong with a reward whose parameters no column fills."""
    return (
        f"reward {label}: nothing fills its parameter {', '.join(missing)}. It gets prompts, completions, "
        f"ground_truth, data_source, extra_info and the columns that every row has: "
        f"{', '.join(sorted(columns)) or 'none'}. Rename the parameter or the column, or give it a default."
    )
