"""Which versions of the Ascend software fit together, and which are installed. This file does not import torch."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from steepest.checks import Check
from steepest.devices import hide_torch_npu
from steepest.versions import UNKNOWN, build, installed, pip_install, public, release, satisfies

PACKAGES = ("torch", "torch-npu", "vllm", "vllm-ascend", "triton-ascend", "transformers")
ASCEND_ONLY = ("torch-npu", "vllm-ascend", "triton-ascend", "CANN")
CANN = "CANN"
HOME_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""Variables that CANN's set_env.sh sets."""
SCRIPTS = ("/usr/local/Ascend/cann/set_env.sh", "/usr/local/Ascend/ascend-toolkit/set_env.sh")
"""Paths of set_env.sh: since CANN 8.5, and before (also in the images)."""
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Row:
    """One set of versions that were published for each other. Versions of different sets must not be mixed."""

    name: str
    versions: Mapping[str, str]
    python: str
    transformers: str = ""
    """A range of versions, if the set allows one; else empty."""


MATRIX = (
    Row(
        "vllm-ascend 0.23.0",
        {
            "vllm-ascend": "0.23.0",
            "vllm": "0.23.0",
            "torch": "2.10.0",
            "torch-npu": "2.10.0.post4",
            CANN: "9.1.0",
            "triton-ascend": "3.2.2",
        },
        python=">=3.10,<3.13",
        transformers="==5.5.4",
    ),
    Row(
        "vllm-ascend 0.18.0",
        {
            "vllm-ascend": "0.18.0",
            "vllm": "0.18.0",
            "torch": "2.9.0",
            "torch-npu": "2.9.0.post1",
            CANN: "8.5.1",
            "triton-ascend": "3.2.0",
        },
        python=">=3.10,<3.12",
    ),
    Row(
        "vllm-ascend 0.13.0",
        {
            "vllm-ascend": "0.13.0",
            "vllm": "0.13.0",
            "torch": "2.8.0",
            "torch-npu": "2.8.0.post2",
            CANN: "8.5.0",
            "triton-ascend": "3.2.0",
        },
        python=">=3.10,<3.12",
    ),
    Row("without vLLM", {"torch": "2.13.0", "torch-npu": "2.13.0"}, python=">=3.10,<3.15", transformers=">=5"),
)
"""The sets, newest first. The last one serves the trainer with the built-in engine; its release note names the CANN."""

CANN_OF = {
    "2.12.0": "9.1.0",
    "2.11.0": "9.1.0",
    "2.10.0.post4": "9.1.0",
    "2.9.0.post6": "9.1.0",
    "2.7.1.post8": "9.1.0",
    "2.9.0.post2": "9.0.0",
    "2.8.0.post4": "9.0.0",
    "2.7.1.post4": "9.0.0",
    "2.9.0": "8.5.0",
    "2.8.0.post2": "8.5.0",
    "2.9.0.post1": "8.5.1",
}
"""Version of torch-npu -> the CANN that it was published for."""


def has_torch_npu() -> bool:
    """True if the package is installed, working or not."""
    return hide_torch_npu.present()


def source_command(scripts: Sequence[str] = SCRIPTS) -> str:
    """The command that loads CANN's environment on this machine: the first of `scripts` that exists, else the first."""
    return f"source {next((script for script in scripts if Path(script).is_file()), scripts[0])}"


def cann_version() -> str | None:
    """The version of the CANN whose set_env.sh was sourced; None without one, UNKNOWN if no version is found."""
    home = next((os.environ[name] for name in HOME_VARIABLES if os.environ.get(name)), None)
    if home is None:
        return None
    files = (f"{platform.machine()}-linux/ascend_toolkit_install.info", "version.info", "compiler/version.info")
    for file in files:
        try:
            text = (Path(home) / file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = re.search(r"^version\s*=\s*\[?\"?([\w.]+)", text, flags=re.I | re.M)
        if found:
            return found[1]
    return UNKNOWN


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages among those of the table, and of Python. Nothing is imported."""
    found = {name: version for name in PACKAGES if (version := installed(name))}
    if "torch-npu" not in found and has_torch_npu():
        found["torch-npu"] = getattr(sys.modules.get("torch_npu"), "__version__", UNKNOWN)
    cann = cann_version()
    if cann is not None:
        found[CANN] = cann
    found["Python"] = platform.python_version()
    return found


def version_checks(found: Mapping[str, str]) -> list[Check]:
    """Checks whether these versions fit together; empty if no Ascend software is installed."""
    if not any(name in found for name in ASCEND_ONLY):
        return []
    pinned = "torch-npu" in found or "vllm-ascend" in found
    return [*_pair(found), *_cann(found), *(_set(found) if pinned else [])]


def _pair(found: Mapping[str, str]) -> list[Check]:
    """torch-npu X.Y.Z is made for torch X.Y.Z built without another accelerator."""
    torch, npu = found.get("torch"), found.get("torch-npu")
    if npu is None:
        text = f"not installed, but {', '.join(name for name in ASCEND_ONLY if name in found)} is"
        return [Check("torch-npu", "warning", text, f"{pip_install('npu')}, for your torch and CANN versions")]
    if torch is None:
        return []  # the list of packages reports it
    checks = []
    kind = build(torch)
    if kind not in (None, "cpu"):
        text = f"torch {torch} is built for another accelerator ({kind}), which torch-npu refuses"
        checks.append(Check("torch build", "problem", text, f"pip install torch=={public(torch)} {CPU_INDEX}"))
    if release(npu) and release(npu)[:3] != release(torch)[:3]:
        need = ".".join(map(str, release(npu)[:3]))
        text = f"torch-npu {npu} needs torch {need}; torch {torch} is installed"
        remedy = f"pip install torch=={need} {CPU_INDEX}, or pip install torch-npu=={public(torch)}"
        return [*checks, Check("torch-npu", "problem", text, remedy)]
    return [*checks, Check("torch-npu", "ok", f"{npu} with torch {torch}")]


def _cann(found: Mapping[str, str]) -> list[Check]:
    have, npu = found.get(CANN), found.get("torch-npu", "")
    want = CANN_OF.get(public(npu))
    published = f"; torch-npu {npu} was published for CANN {want}" if want else ""
    if have is None:
        text = f"not found: neither {' nor '.join(HOME_VARIABLES)} is set{published}"
        return [Check(CANN, "warning", text, f"run `{source_command()}` in this shell")]
    if have == UNKNOWN:
        return [Check(CANN, "warning", f"its folder names no version{published}", "see its install log")]
    if want and release(have) != release(want):
        return [Check(CANN, "warning", f"{have}{published}", f"install CANN {want}, or the torch-npu of CANN {have}")]
    checks = [Check(CANN, "ok", have)]
    if "vllm-ascend" in found and not os.environ.get("ATB_HOME_PATH"):
        text = "NNAL is not in the environment (ATB_HOME_PATH is unset), and vllm-ascend needs its libatb.so"
        checks.append(Check("NNAL", "problem", text, "install NNAL, then source /usr/local/Ascend/nnal/atb/set_env.sh"))
    return checks


def _set(found: Mapping[str, str]) -> list[Check]:
    """Check that all versions come from one row; else name the row with most of them, and the versions that differ."""
    row = best_row(found)
    differing = _differing(row, found)
    if not differing:
        there = ", ".join(f"{name} {found[name]}" for name in row.versions if name in found)
        return [Check("Ascend set", "ok", f"the set '{row.name}': {there}")]
    wrong = "; ".join(f"{name} is {found.get(name, 'missing')}, not {want}" for name, want in differing.items())
    mixed = "vllm-ascend" in found or release(found.get("torch-npu", "")) != release(found.get("torch", ""))
    text = f"a mix of sets; most is of '{row.name}', but {wrong}" if mixed else f"none of the tested sets: {wrong}"
    return [Check("Ascend set", "problem" if mixed else "warning", text, _install(differing))]


def best_row(found: Mapping[str, str]) -> Row:
    """The row with most of the installed versions; on a tie the row with fewer other versions, then the newer row."""
    rows = [row for row in MATRIX if "vllm-ascend" in row.versions] if "vllm-ascend" in found else MATRIX

    def fit(row: Row) -> tuple[int, int]:
        differing = len(_differing(row, found))
        return sum(_same(found.get(name), want) for name, want in row.versions.items()), -differing

    return max(rows, key=fit)


def _differing(row: Row, found: Mapping[str, str]) -> dict[str, str]:
    """Package with another version than in the row -> the row's version. Without vllm-ascend: only the trainer's
    packages."""
    whole = "vllm-ascend" in found
    names = list(row.versions) if whole else ["torch", "torch-npu", *([CANN] if CANN in found else [])]
    wrong = {name: row.versions[name] for name in names if name in row.versions}
    wrong = {name: want for name, want in wrong.items() if not _same(found.get(name), want)}
    ranges = {"transformers": row.transformers if whole else "", "Python": row.python}
    return wrong | {
        name: wanted for name, wanted in ranges.items() if wanted and not satisfies(found.get(name, UNKNOWN), wanted)
    }


def _same(have: str | None, want: str) -> bool:
    """True if the versions are equal without the builder's suffix, or if the installed version is unknown."""
    if have is None:
        return False
    if have == UNKNOWN:
        return True
    # vllm-ascend 0.23.0.post1 belongs to the set 0.23.0; for torch-npu the set names the post-release itself
    return public(have) == want or ("post" not in want and release(have) == release(want))


def _install(differing: Mapping[str, str]) -> str:
    pip = [
        f"{name}=={want}" for name, want in differing.items() if name in PACKAGES and not want.startswith(("=", ">"))
    ]
    pip += [f"'{name}{want}'" for name, want in differing.items() if name in PACKAGES and want.startswith(("=", ">"))]
    steps = [f"pip install {' '.join(pip)}"] if pip else []
    if CANN in differing:
        steps.append(f"install CANN {differing[CANN]} with its NNAL")
    if "Python" in differing:
        steps.append(f"use Python {differing['Python']}")
    return ", ".join(steps)


def setup_checks() -> list[Check]:
    """Checks of the environment: the order of the visible cards, and a torch_npu that breaks other programs."""
    checks = []
    variable = "ASCEND_RT_VISIBLE_DEVICES"
    cards = [card.strip() for card in os.environ.get(variable, "").split(",") if card.strip()]
    numbers = [int(card) for card in cards if card.isdigit()]
    if numbers != sorted(set(numbers)):
        right = ",".join(map(str, sorted(set(numbers))))
        text = f"{variable}={','.join(cards)}: the cards have to be named in ascending order, each once"
        checks.append(Check(variable, "problem", text, f"export {variable}={right}"))
    plug_ins = [point.value for point in entry_points(group="torch.backends")]
    if any(value.startswith("torch_npu") for value in plug_ins) and sys.modules.get("torch_npu") is None:
        text = "torch loads torch-npu by itself, so `import torch` fails in programs other than Steepest"
        checks.append(Check("autoload", "warning", text, "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, or fix torch-npu"))
    return checks
