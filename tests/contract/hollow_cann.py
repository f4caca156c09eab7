"""Lets the real torch_npu be imported on a machine without CANN, so that its API can be read.

The wheel's libraries need CANN's (libhccl.so, libascendcl.so, ...). Here empty ones are made that define just the
symbols which are missing: enough to import and to look at names, signatures and operators. A call that reaches a device
fails.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

LIBRARIES = (
    "libascendcl",
    "libhccl",
    "libacl_op_compiler",
    "libge_runner",
    "libgraph",
    "libacl_tdt_channel",
    "libatb",
)
_OBJECTS = ("_ZTV", "_ZTI", "_ZTS")
"""Prefixes of C++ tables, which are data and not code."""


def _symbols(library: Path, *, undefined: bool) -> set[str]:
    """What a library lacks (but for what it can do without), or what it has."""
    flag = "--undefined-only" if undefined else "--defined-only"
    out = subprocess.run(["nm", "-D", flag, str(library)], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in out.splitlines()]
    return {line[-1].split("@")[0] for line in lines if not (undefined and line[-2] == "w")}


def _loaded_with(library: Path) -> set[Path]:
    """The files that the loader brings along."""
    out = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    return {Path(word) for word in out.split() if word.startswith("/")}


def missing_symbols(site: Path, torch_folder: Path) -> list[str]:
    """What torch_npu in the folder `site` needs and neither it nor torch nor the system has: CANN's symbols."""
    ours = [*(site / "torch_npu" / "lib").glob("*.so"), *(site / "torch_npu").glob("_C*.so")]
    torchs = [*(torch_folder / "lib").glob("*.so*"), *torch_folder.glob("_C*.so")]
    there = {*ours, *torchs, *(path for library in torchs[-1:] for path in _loaded_with(library))}
    have: set[str] = set().union(*(_symbols(library, undefined=False) for library in there))
    need: set[str] = set().union(*(_symbols(library, undefined=True) for library in ours))
    return sorted(name for name in need - have if not name.startswith(("Py", "_Py")))


def _assembly(names: Iterable[str]) -> str:
    lines = []
    for name in names:
        if name.startswith(_OBJECTS):
            lines += [f".data\n.globl {name}\n.type {name},@object\n{name}: .zero 256\n.size {name},256"]
        else:
            lines += [f".text\n.globl {name}\n.type {name},@function\n{name}: xor %eax,%eax\n ret"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def make(site: Path, torch_folder: Path, out: Path) -> int:
    """Write the libraries into `out` (for LD_LIBRARY_PATH); how many symbols they define. Needs gcc on x86-64."""
    names = missing_symbols(site, torch_folder)
    out.mkdir(parents=True, exist_ok=True)
    source = out / "symbols.S"
    source.write_text(_assembly(names))
    for library in LIBRARIES:
        content = [str(source)] if library == LIBRARIES[0] else ["-xc", "/dev/null"]
        target = str(out / f"{library}.so")
        line = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}.so", "-o", target, *content]
        subprocess.run(line, check=True)
    return len(names)
