"""The command `steepest doctor`: examine the machine, print the report, return the exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial, update_wrapper

from steepest import __version__
from steepest.checks import Check
from steepest.doctor import device, engines, environment, hubs, machine, packages
from steepest.doctor.probe_client import Answers, Probe
from steepest.doctor.report import Report, group
from steepest.doctor.text import show


def main(*, as_json: bool = False) -> int:
    """Print the report of this machine. 0 without a problem, 1 with one; warnings do not count."""
    report = examine()
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(report)
    return report.exit_code


def examine() -> Report:
    """Examine this machine. Never raises for something broken: it becomes a line of the report."""
    begun = time.monotonic()
    probe = Probe()  # runs while the rest is examined
    apart = [
        group("extras", packages.extras),
        group("hubs", hubs.hub, hubs.huggingface, hubs.modelscope),
        group("environment", environment.variables),
    ]
    answers = probe.answers()

    def of(part: Callable[[Answers], list[Check]]) -> Callable[[], list[Check]]:
        return update_wrapper(partial(part, answers), part)

    groups = [
        group("machine", machine.system, of(machine.processors), of(machine.memory), machine.disk),
        group("device", of(device.devices), of(device.setup)),
        group("versions", of(packages.packages)),
        group("engines", of(engines.engines)),
        *apart,
    ]
    return Report(
        version=__version__,
        device=answers.choice.get("device"),
        devices={name: dict(facts) for name, facts in answers.devices.items()},
        groups=groups,
        seconds=time.monotonic() - begun,
    )
