"""Prepares a list of requests for an engine: checks it, and groups requests of equal sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from steepest.errors import RolloutError, setting
from steepest.rollout.api import Completion, GenerationRequest, SamplingParams


def check_requests(requests: Sequence[GenerationRequest], max_model_len: int, *, engine: str) -> None:
    """Raise RolloutError for a request that an engine of token ids cannot answer: one with the id of another request,
    an empty prompt, a prompt that leaves no room for a response token, or media. `engine` is its name in the error."""
    seen: set[str] = set()
    for request in requests:
        name = f"request {request.request_id}"
        if request.request_id in seen:
            raise RolloutError(f"{name} was given twice: a request_id has to be unique within a call of generate.")
        seen.add(request.request_id)
        if request.media:
            raise RolloutError(
                f"{name} has media ({', '.join(map(str, request.media))}), and the {engine} engine reads token ids "
                "only. Leave the media out, or use an engine that reads it."
            )
        if not len(request.token_ids):
            raise RolloutError(f"{name} has an empty prompt: a response needs at least one token before it.")
        if len(request.token_ids) >= max_model_len:
            raise RolloutError(
                f"{name} has a prompt of {len(request.token_ids)} tokens and max_model_len is {max_model_len}: no room "
                f"for a response. Raise {setting('max_model_len')} or lower {setting('max_prompt_length')}."
            )


@dataclass(frozen=True)
class SamplingGroup:
    """The requests of one call that have the same sampling.

    Samples are numbered over the whole call: request 0 has the samples 0 to n-1, request 1 those from n on, whatever
    their sampling. A sample's random numbers depend on (seed, sample number), so two requests of equal seeds in two
    groups draw different numbers, and a call with a single group numbers its samples from 0.
    """

    sampling: SamplingParams
    requests: list[GenerationRequest] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Index in the call of each request."""
    samples: list[int] = field(default_factory=list)
    """Numbers in the call of all samples, `sampling.n` for each request, rising."""


def group_by_sampling(requests: Sequence[GenerationRequest]) -> list[SamplingGroup]:
    """Groups in the order of their first requests; within a group requests keep their order."""
    groups: dict[SamplingParams, SamplingGroup] = {}
    number = 0
    for place, request in enumerate(requests):
        group = groups.setdefault(request.sampling, SamplingGroup(request.sampling))
        group.requests.append(request)
        group.places.append(place)
        group.samples.extend(range(number, number + request.sampling.n))
        number += request.sampling.n
    return list(groups.values())


def generate_in_groups(
    requests: Sequence[GenerationRequest], generate: Callable[[SamplingGroup], list[list[Completion]]]
) -> list[list[Completion]]:
    """Call `generate` for each group of equal sampling, and return the results in the order of `requests`."""
    answers: list[list[Completion]] = [[] for _ in requests]
    for group in group_by_sampling(requests):
        for place, completions in zip(group.places, generate(group), strict=True):
            answers[place] = completions
    return answers
