"""Compares installed packages with the required and the tested versions. Nothing is imported."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from steepest.checks import Check, ok, problem, warning
from steepest.doctor.probe_client import Answers
from steepest.rollout.vllm_versions import DISTRIBUTIONS
from steepest.versions import UNKNOWN, build, installed, pip_install, public, release, requirement, satisfies


@dataclass(frozen=True)
class Package:
    """A package that Steepest requires."""

    name: str
    wanted: str
    """The required range, as in pyproject.toml."""
    tested: str
    """The newest version that the tests ran with."""
    places: int = 1
    """How many leading numbers of a version are compared: 1 for packages that break at major versions only."""


PACKAGES = (
    Package("torch", ">=2.10,<2.14", "2.13.0", places=2),
    Package("transformers", ">=4.57", "5.24.0", places=2),
    Package("peft", ">=0.21", "0.21.0", places=2),
    Package("tokenizers", ">=0.21", "0.23.3", places=2),
    Package("safetensors", ">=0.4.5", "0.8.0", places=2),
    Package("huggingface_hub", ">=0.34", "2.4.0"),
    Package("pyarrow", ">=16", "26.0.1"),
    Package("hydra-core", ">=1.3.2", "1.3.8", places=2),
    Package("omegaconf", ">=2.3", "2.3.1", places=2),
    Package("numpy", ">=1.26", "2.4.6"),
    Package("packaging", ">=23", "26.4"),
    Package("pyyaml", ">=6", "6.0.3"),
    Package("math-verify", ">=0.9,<0.10", "0.9.0"),
    Package("typer", ">=0.15", "0.29.2"),
    Package("rich", ">=13", "15.0.0"),
)
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages compiled for one build of torch. With another build their import fails, and so does that of their users."""


@dataclass(frozen=True)
class Extra:
    """An optional extra of the package."""

    name: str
    packages: dict[str, str]
    """Package -> required range, as in pyproject.toml."""
    use: str
    others: tuple[str, ...] = ()
    """Packages that can be used instead."""


EXTRAS = (
    Extra("tensorboard", {"tensorboard": ">=2.16"}, "trainer.logger=[tensorboard]"),
    Extra("wandb", {"wandb": ">=0.19"}, "trainer.logger=[wandb]"),
    Extra("mlflow", {"mlflow-skinny": ">=3.0", "sqlalchemy": ">=2.0", "alembic": ">=1.13"}, "trainer.logger=[mlflow]"),
    Extra("swanlab", {"swanlab": ">=0.10"}, "trainer.logger=[swanlab]"),
    Extra("gguf", {"gguf": ">=0.10", "accelerate": ">=1.1"}, "models in GGUF files"),
    Extra("modelscope", {"modelscope-hub": ">=0.5"}, "models and data from ModelScope", others=("modelscope",)),
    Extra("ray", {"ray": ">=2.40"}, "several processes, which are not part of this version"),
)


def packages(answers: Answers) -> list[Check]:
    """Lines about torch, the other packages of the table, and the software of each device."""
    lines = []
    for package in PACKAGES:
        line = _package(package)
        if package.name == "torch" and line.status != "problem":
            line = _torch(answers) or line
        lines.append(line)
    return [*lines, *_pins(), *_companions(), *(Check(**check) for check in answers.checks("versions"))]


def _package(package: Package) -> Check:
    name, version = package.name, installed(package.name)
    pip = f"pip install '{name}{package.wanted}'"
    if version is None:
        return problem(name, "not installed", pip)
    if name == "torch":
        version = build_of("torch") or version
    if not satisfies(version, package.wanted):
        return problem(name, f"{version} is not in {package.wanted}", pip)
    shadow = _shadow(name)
    if shadow is not None:
        text = f"{version} is installed, but Python would import {shadow}"
        # a folder may be the package's own source; a single file hides it, since each package of the table is a folder
        line = warning if Path(shadow).name == "__init__.py" else problem
        return line(name, text, "rename that file, or take its folder out of PYTHONPATH")
    if release(version)[: package.places] > release(package.tested)[: package.places]:
        text = f"{version} is newer than the tested {package.tested}"
        return warning(name, text, f"if something fails: pip install {name}=={package.tested}")
    return ok(name, version if public(version) == package.tested else f"{version} (tested: {package.tested})")


def _torch(answers: Answers) -> Check | None:
    """None when torch imports."""
    error = answers.torch.get("error")
    if error is None:
        return None
    version = build_of("torch") or installed("torch") or UNKNOWN
    if "Failed to load the backend extension" in error:
        remedy = "unset TORCH_DEVICE_BACKEND_AUTOLOAD (Steepest then sets it to 0)"
    else:
        remedy = f"pip install --force-reinstall torch=={public(version)}"
    first = next(iter(error.splitlines()), error)
    return problem("torch", f"{version} is installed but cannot be imported: {first}", remedy)


def _shadow(name: str) -> str | None:
    """The file that Python would import instead of the installed package; None when it is the package's own."""
    module = {"hydra-core": "hydra", "pyyaml": "yaml"}.get(name, name)
    try:
        spec = importlib.util.find_spec(module)
        distribution = metadata.distribution(name)
    except (ImportError, ValueError, metadata.PackageNotFoundError):
        return None
    if spec is None or spec.origin is None or distribution.read_text("direct_url.json"):
        return None  # from a folder of its own, as an editable install is
    origin, home = Path(spec.origin).resolve(), Path(str(distribution.locate_file(""))).resolve()
    return None if origin.is_relative_to(home) else str(origin)


def _pins() -> list[Check]:
    """Requirements between the packages of the table that are not met."""
    lines = []
    names = [package.name for package in PACKAGES]
    for name in (*names, *DISTRIBUTIONS):
        for other in names:
            wanted, found = requirement(name, other), installed(other)
            if wanted is None or found is None or satisfies(found, wanted):
                continue
            text = f"{name} {installed(name)} needs {other}{wanted}, and {found} is installed"
            lines.append(problem(f"{name} needs {other}", text, f"pip install '{other}{wanted}'"))
    return lines


def build_of(package: str) -> str | None:
    """The version from the package's own files, with its build suffix, which the metadata often lacks."""
    try:
        spec = importlib.util.find_spec(package)
        folder = next(iter(spec.submodule_search_locations or ())) if spec else ""
        text = (Path(folder) / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError, StopIteration):
        return None
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, flags=re.M)
    return found[1] if found else None


def _companions() -> list[Check]:
    """Check packages that must fit torch's build; vLLM and transformers import them if they are installed."""
    torch = build_of("torch") or installed("torch")
    if torch is None:
        return []
    lines = []
    for name in COMPANIONS:
        version = installed(name)
        if version is None:
            continue
        version, wanted = build_of(name) or version, requirement(name, "torch") or ""
        remedy = f"pip uninstall {name} (text models do without), or install the one for torch {torch}"
        why = "; importing it fails, and with it that of transformers' models and of vLLM"
        if not satisfies(torch, wanted):
            lines.append(problem(name, f"{version} is for torch{wanted}, and torch is {torch}{why}", remedy))
        elif None not in (build(version), build(torch)) and build(version) != build(torch):
            lines.append(problem(name, f"{version} is another build than torch {torch}{why}", remedy))
        else:
            lines.append(ok(name, f"{version} with torch {torch}"))
    return lines


def extras() -> list[Check]:
    """Lines about optional packages: their purpose, and the command that installs them."""
    return [_extra(extra) for extra in EXTRAS]


def _extra(extra: Extra) -> Check:
    pip = pip_install(extra.name)
    found = {name: installed(name) for name in extra.packages}
    other = next((f"{name} {version}" for name in extra.others if (version := installed(name))), None)
    if not any(found.values()):
        text = other if other is not None else "not installed"
        return ok(extra.name, f"{text}: {extra.use}", None if other else pip)
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return warning(extra.name, f"{', '.join(missing)} is missing for {extra.use}", pip)
    wrong = [
        f"{name} {found[name]}" for name, wanted in extra.packages.items() if not satisfies(str(found[name]), wanted)
    ]
    if wrong:
        return warning(extra.name, f"{', '.join(wrong)} is older than tested, for {extra.use}", pip)
    return ok(extra.name, f"{', '.join(f'{name} {version}' for name, version in found.items())}: {extra.use}")
