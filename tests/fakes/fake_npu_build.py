"""Compiles the stand-in NPU, once for each torch, Python and state of its source.

    python tests/fakes/fake_npu_build.py       # prints where the library is; about a minute of compiling the first time

`import torch_npu` never compiles: it finds the library or says how to build it. The library lies in
~/.cache/steepest/fake-npu-<hash>; FAKE_NPU_BUILD_DIR names another folder to hold `fake-npu-<hash>`. It is compiled
in a folder of its own and then renamed into place, so that a build that was killed, or two at once, leave nothing half
made.

A C++ compiler (CXX, else g++, else clang++) and the headers of Python are needed; ninja is not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = tuple(sorted((Path(__file__).parent / "torch_npu").glob("*.cpp")))
MODULE = "fake_npu_c"
EXIT_CANNOT = 3
"""The exit code where a compiler or headers are missing, and the tests are skipped; a failed compilation exits 1."""
COMMAND = "python tests/fakes/fake_npu_build.py"


class CannotBuildError(RuntimeError):
    """Something that is needed for compiling is not there; the message says what, and the remedy."""


class BuildFailedError(RuntimeError):
    """Everything is there and the source does not compile; the message has the compiler's words."""


def library(sources: Sequence[Path] = SOURCES) -> Path:
    """Where the module compiled from `sources` belongs, built or not."""
    digest = hashlib.sha256(f"{importlib.metadata.version('torch')} {sys.version} {sys.platform}".encode())
    for source in (*sources, Path(__file__)):
        digest.update(source.read_bytes())
    named = os.environ.get("FAKE_NPU_BUILD_DIR")
    root = Path(named) if named else Path.home() / ".cache" / "steepest"
    return root / f"fake-npu-{digest.hexdigest()[:12]}" / f"{MODULE}.so"


def compiler() -> str:
    """The C++ compiler. Raises CannotBuildError where there is none, or no Python headers, or no Linux."""
    if sys.platform != "linux":
        raise CannotBuildError(f"the stand-in NPU is built on Linux only, and this is {sys.platform}")
    wanted = os.environ.get("CXX")
    found = next((path for name in ([wanted] if wanted else ["g++", "clang++"]) if (path := shutil.which(name))), None)
    if found is None:
        raise CannotBuildError(
            f"no C++ compiler ({wanted or 'g++ or clang++'}) is on the PATH; install one "
            "(Debian, Ubuntu: apt install g++) to run the tests on the stand-in NPU"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise CannotBuildError(
            f"the headers of Python {sys.version.split()[0]} are not installed "
            "(Debian, Ubuntu: apt install python3-dev); the stand-in NPU is compiled against them"
        )
    return found


def build(*, say: bool = False) -> Path:
    """The library, compiled if it is not there yet; `say` tells so on standard error.

    Raises CannotBuildError or BuildFailedError.
    """
    target = library()
    if target.is_file():
        return target
    cxx = compiler()
    if say:
        print("compiling the stand-in NPU (about a minute, once) ...", file=sys.stderr, flush=True)
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fake-npu-building-", dir=target.parent.parent) as folder:
        made = Path(folder) / target.parent.name
        made.mkdir()
        _compile(cxx, made / target.name)
        try:
            made.rename(target.parent)
        except OSError:
            if not target.is_file():  # else another build was faster, and its library is as good
                raise
    return target


def _compile(cxx: str, out: Path) -> None:
    """All sources side by side, then one link."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    flags = ["-std=c++20", "-O0", "-g0", "-fPIC", "-w", f"-DTORCH_EXTENSION_NAME={MODULE}"]
    objects = [out.with_name(f"{source.stem}.o") for source in SOURCES]
    lines = [[cxx, *flags, *includes, "-c", str(a), "-o", str(b)] for a, b in zip(SOURCES, objects, strict=True)]
    running = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for line in lines]
    said = [process.communicate()[1] for process in running]
    for source, process, words in zip(SOURCES, running, said, strict=True):
        if process.returncode:
            _fail(source.name, words)
    paths = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    line = [cxx, "-shared", *map(str, objects), *paths, *libraries, "-o", str(out)]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        _fail("linking", done.stderr)
    for made in objects:
        made.unlink()


def _fail(what: str, words: str) -> None:
    lines = [line for line in words.splitlines() if "error" in line][:5] or words.splitlines()[-5:]
    version = importlib.metadata.version("torch")
    raise BuildFailedError(
        f"the stand-in NPU does not compile ({what}) against torch {version}; it is written for torch 2.13:\n"
        + "\n".join(lines)
    )


def main() -> int:
    """Build and say where; the exit code tells what is missing from what is broken."""
    try:
        print(build(say=True))
    except CannotBuildError as error:
        print(f"the stand-in NPU cannot be built here: {error}.", file=sys.stderr)
        return EXIT_CANNOT
    except BuildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
