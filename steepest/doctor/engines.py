"""Lines about the rollout engines: which can run here, and why others cannot. No engine is imported."""

from __future__ import annotations

import importlib.util
import os

from steepest.checks import Check, ok, problem, warning
from steepest.doctor.probe_client import Answers
from steepest.rollout import ROLLOUT_ENGINES
from steepest.versions import installed

HF, VLLM = "hf", "vllm"
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
_INSTALL_VLLM = "see docs/vllm.md"


def engines(answers: Answers) -> list[Check]:
    """One line for each engine that `actor_rollout_ref.rollout.name` accepts."""
    return [_SPECIAL[name](answers) if name in _SPECIAL else _plain(name, answers) for name in ROLLOUT_ENGINES.names()]


def _plain(name: str, answers: Answers) -> Check:
    """An engine that needs torch and nothing else."""
    if "error" in answers.torch:
        return problem(name, "torch cannot be imported", "see 'torch'")
    return ok(name, f"can run on {_places(answers)}")


def _hf(answers: Answers) -> Check:
    if "error" in answers.torch:
        return problem(HF, "torch cannot be imported", "see 'torch'")
    if installed("transformers") is None:
        return problem(HF, "transformers is not installed", "see 'transformers'")
    return ok(HF, f"can run on {_places(answers)}, slowly: for comparing with")


def _vllm(answers: Answers) -> Check:
    from steepest.rollout import vllm_versions

    found, device = vllm_versions.installed(), str(answers.choice.get("device"))
    facts = answers.devices.get(device, {})
    if found is None:
        if importlib.util.find_spec("vllm") is None:
            return ok(VLLM, "not installed", facts.get("vllm_install", _INSTALL_VLLM))
        return warning(VLLM, "there is a module vllm of no installed package", "install vLLM by pip")
    name, version = found
    told = f"{name} {version}"
    refused = vllm_versions.refusal(version)
    if refused is not None:
        why, _, remedy = refused.partition("; ")
        return problem(VLLM, f"{told} is installed, but cannot be used: {why}", remedy)
    unfit = facts.get("vllm_problem")
    if unfit is not None:
        why, _, remedy = unfit.partition("; ")
        return problem(VLLM, f"{told} is installed, but cannot run on {device}: {why}", remedy)
    if os.environ.get(IN_PROCESS, "0") != "0":
        return problem(
            VLLM,
            f"{IN_PROCESS}={os.environ[IN_PROCESS]}: the engine has to be in the trainer's process",
            f"unset {IN_PROCESS}",
        )
    if "error" in answers.torch:
        return problem(VLLM, f"{told} is installed, but torch cannot be imported", "see 'torch'")
    untested = vllm_versions.warning(version)
    if untested is not None:
        return warning(
            VLLM, f"{name}: {untested}", f"if something fails: pip install {name}=={vllm_versions.TESTED[-1]}"
        )
    return ok(VLLM, f"{told} can run on {device}")


_SPECIAL = {HF: _hf, VLLM: _vllm}
"""Engines that need more than torch."""


def _places(answers: Answers) -> str:
    return ", ".join(name for name, facts in answers.devices.items() if facts.get("available")) or "no device"
