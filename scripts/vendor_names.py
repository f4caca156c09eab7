"""Names of device vendors in the code outside their homes in steepest/devices/: file, line and name. Exit code 1 if
there are any.

    python scripts/vendor_names.py

Code outside that folder is the same for every device: it asks the Device, or uses `tensor.device`. The check reads
names that are imported, attributes and calls (`torch.cuda`, `x.npu()`, `t.is_cuda`), names, keyword arguments, and
texts that name a device or a backend ("cuda:0", "hccl"). It does not read docstrings and comments.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOMES = ("devices/backends/", "devices/ascend.py", "devices/hide_torch_npu.py")
"""Files, and folders with a slash. The rest of devices/ is the same for every device, as the rest of the code is."""

WORD = r"(cuda|npu|nccl|hccl|cann|ascend|torch_npu|vllm_ascend|acl|rocm|hip)"
NAME = re.compile(rf"(^|_){WORD}(_|\d|$)", re.IGNORECASE)
"""Matches identifiers such as is_cuda, torch_npu, npu_fusion_attention, ASCEND_HOME; not `cascade` or `oracle`."""
TEXT = re.compile(rf"^{WORD}(:.*)?$|^(torch|vllm)[_.-]{WORD}|^{WORD}_[A-Z_]+$|,{WORD}:", re.IGNORECASE)
"""Matches texts such as "npu", "cuda:0", "torch.cuda", "cpu:gloo,npu:hccl", "ASCEND_RT_VISIBLE_DEVICES"."""


def vendor_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each vendor's name in Python code."""
    tree = ast.parse(source)
    docstrings = {id(node) for node in _docstrings(tree)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and TEXT.search(node.value):
                yield line, node.value
        else:
            yield from ((line, name) for name in _identifiers(node) if NAME.search(name))


def _identifiers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.arg, ast.keyword)):
        return [node.arg or ""]
    if isinstance(node, ast.Import):
        return [part for item in node.names for part in item.name.split(".")]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(item.name for item in node.names)]
    return []


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """The texts that stand alone as a statement: docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def problems(package: Path) -> list[str]:
    """`file:line: name` for every vendor's name where it is not allowed."""
    found = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package).as_posix()
        if not relative.startswith(HOMES):
            found += [
                f"{package.name}/{relative}:{line}: {name!r} is a vendor's name; move the code to {HOMES[0]}"
                for line, name in vendor_names(file.read_text(encoding="utf-8"))
            ]
    return found


def main() -> int:
    found = problems(ROOT / "steepest")
    print("\n".join(found) or f"no vendor's name outside {', '.join(HOMES)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
