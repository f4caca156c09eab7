"""Lines about the devices: which one a run would take and why, and the facts of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from steepest.checks import Check, ok, problem, warning
from steepest.doctor.machine import gib
from steepest.doctor.probe_client import Answers
from steepest.versions import installed

Facts = Mapping[str, Any]
LITTLE_FREE = 0.5
"""If less than this share of an accelerator's memory is free, another program probably uses it."""


def devices(answers: Answers) -> list[Check]:
    """The chosen device, then each device."""
    if "error" in answers.torch:
        return [problem("choice", "no device can be asked, since torch cannot be imported", "see 'torch' below")]
    lines = [_choice(answers)]
    for name, facts in answers.devices.items():
        lines += _device(name, facts)
    if answers.died_at is not None and answers.died_at not in answers.stages:
        lines.append(problem(answers.died_at, f"asking it failed: {answers.died}", "see that its driver works"))
    return lines


def _choice(answers: Answers) -> Check:
    choice = answers.choice
    if "device" not in choice:
        text = f"not known: {choice.get('error') or answers.died}"
        return problem("choice", text, "name a device that works: trainer.device=cpu")
    return ok("choice", f"{choice['device']} ({choice['why']})")


def _device(name: str, facts: Facts) -> list[Check]:
    if "error" in facts:
        return [problem(name, f"asking it failed: {facts['error']}", "see that its driver and packages fit torch")]
    if not facts["available"]:
        return [_absent(name, facts)]
    count = f"{facts['count']} x " if facts["count"] > 1 else ""
    lines = [ok(name, f"{count}{facts['hardware']}"), _memory(name, facts)]
    lines.append(ok(f"{name} dtype", f"{facts['dtype']} by default: {facts['bf16_reason']}"))
    lines.append(ok(f"{name} attention", f"{facts['attention']}: {facts['attention_reason']}"))
    lines.append(_processes(name, facts))
    lines += _variables(f"{name} environment", facts["environment"], warning)
    lines += _rollout(name, facts)
    return lines


def _absent(name: str, facts: Facts) -> Check:
    why, _, remedy = facts["reason"].rpartition("; ")
    remedy = remedy.rstrip(".")
    variable = facts["visible_devices_variable"]
    if facts["expected"] and variable and os.environ.get(variable, "0").strip() in ("", "-1"):
        return warning(name, f"not here: {why}", remedy)
    if facts["expected"]:
        return problem(name, f"cannot be used, though {facts['expected']}: {why}", remedy)
    return ok(name, f"not here: {why}")


def _memory(name: str, facts: Facts) -> Check:
    free, total = facts["memory_available"], facts["memory_total"]
    text = f"{gib(free)} free of {gib(total)}"
    if name != "cpu" and free < LITTLE_FREE * total:
        variable = facts["visible_devices_variable"]
        remedy = "end the process that holds it" + (f", or choose another card by {variable}" if variable else "")
        return warning(f"{name} memory", f"{text}: something else uses this card", remedy)
    return ok(f"{name} memory", text)


def _processes(name: str, facts: Facts) -> Check:
    """Settings that matter when several processes share the devices."""
    parts = [f"distributed backend {facts['distributed_backend']}", f"Ray resource {facts['ray_resource']}"]
    variable = facts["visible_devices_variable"]
    if variable is not None:
        value = os.environ.get(variable)
        parts.append(f"{variable} is unset: all cards" if value is None else f"{variable}={value}")
    return ok(f"{name} processes", ", ".join(parts))


def _variables(name: str, wanted: Mapping[str, str], otherwise: Callable[[str, str, str], Check]) -> list[Check]:
    """Variables with the values that Steepest needs, and a check for each that the environment sets otherwise."""
    if not wanted:
        return []
    other = {key: os.environ[key] for key, value in wanted.items() if os.environ.get(key, value) != value}
    text = ", ".join(f"{key}={value}" for key, value in wanted.items())
    if not other:
        return [ok(name, text)]
    found = ", ".join(f"{key}={value}" for key, value in other.items())
    return [otherwise(name, f"the environment has {found}; wanted is {text}", f"unset {' '.join(other)}")]


def _rollout(name: str, facts: Facts) -> list[Check]:
    """The needs of vLLM on this device: its sleep mode, and an allocator that works with it."""
    level, variable = facts["sleep_level"], facts["allocator_variable"]
    lines = _variables(f"{name} rollout", facts["rollout_environment"], problem)
    if level is None:
        return lines
    lines.append(ok(f"{name} sleep mode", f"vLLM's sleep level {level}"))
    if variable is None:
        return lines
    value = os.environ.get(variable, "")
    if "expandable_segments:true" not in value.replace(" ", "").lower():
        return [*lines, ok(f"{name} allocator", f"{variable}={value}" if value else f"{variable} is unset")]
    text, remedy = (
        f"{variable}={value} does not go with vLLM's sleep mode",
        f"take expandable_segments out of {variable}",
    )
    has_vllm = installed("vllm") is not None
    return [*lines, (problem if has_vllm else warning)(f"{name} allocator", text, remedy)]


def setup(answers: Answers) -> list[Check]:
    """Problems that the devices find in the environment."""
    return [Check(**check) for check in answers.checks("setup")]
