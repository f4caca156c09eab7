"""Words and forms of sentence that plain technical English does without: file, line, word, and what to write instead.

    python scripts/words.py                the files of FILES; exit code 1 if anything is found
    python scripts/words.py FILE ...       these files only

The check reads prose, not code: docstrings, comments and texts of Python files, shell files and the Makefile, and
Markdown. Names in code are not read (a variable may be called `told`), nor is text in `backticks` or in a fenced block.
One line of the output:

    steepest/hub/find.py:129: 'goes on from'; write: resumes from, continues from
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "steepest/**/*.py",
    "bench/**/*.py",
    "scripts/**/*",
    "examples/**/*",
    "docs/**/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
)
SKIPPED = ("docs/zh/", "scripts/words.py")
"""Not read: the Chinese pages, and this file, which lists the words."""

WORDS = {
    r"mend(?:s|ed|ing)?": "fix",
    r"told|tells|said": "printed, reported, passed, states",
    r"(?:go|goes|gone|going|went) on from": "resumes from, continues from",
    r"anew": "again",
    r"beside": "next to, in addition to",
    r"in any case": "always",
    r"dear(?:er|est)?": "expensive",
    r"whom": "the noun: which function, model or person",
    r"(?:for|by|from|to|with) who": "the noun: 'for callers that ...'",
    r"at bay": "limited, restrained",
    r"lea(?:ves?|ving) over": "leaves",
}
"""A word or phrase, in capitals or not -> what to write instead."""

SENTENCES = {
    r"Of (?!course\b)": "a subject and a verb, or the noun: 'Size of one model', not 'Of one model'",
    r"By \w+: ": "the noun: 'Mapping from name to ...'",
    r"As `[^`]*`, (?:but|with|without)\b": "a verb: 'Does the same as ..., but ...'",
    r"The same (?:for|of|with|as)\b[^,:;.]*\.(?:\s|$)": "a verb: 'Does the same for ...'",
}
"""The start of a sentence in a docstring, a comment or Markdown -> what to write instead."""

WHOLE = {r"(?:For|To|With|Without) [^,:;.]*\.?": "a subject and a verb"}
"""A docstring that is this phrase and nothing else -> what to write instead."""


class Prose(NamedTuple):
    """A piece of prose: the number of its first line, its text with its line breaks, and where it stands."""

    line: int
    text: str
    kind: str
    """docstring, comment, text (a string in code) or markdown."""


def python_prose(source: str) -> Iterator[Prose]:
    """Docstrings (of fields too), other texts, and comments; comments that follow one another are one piece."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Prose(node.lineno, node.value, "docstring" if id(node) in docstrings else "text")
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != first + len(block):
                yield Prose(first, "\n".join(block), "comment")
                block = []
            first = first if block else token.start[0]
            block.append(token.string.lstrip("#"))
    if block:
        yield Prose(first, "\n".join(block), "comment")


def markdown_prose(source: str) -> Iterator[Prose]:
    """Paragraphs outside fenced blocks."""
    fenced = False
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        fence = line.lstrip().startswith(("```", "~~~"))
        fenced = fenced != fence
        if fenced or fence or not line.strip():
            if block:
                yield Prose(number - len(block), "\n".join(block), "markdown")
            block = []
        else:
            block.append(line)


def offences(prose: Prose) -> Iterator[tuple[int, str, str]]:
    """(line, word, what to write instead) for everything listed that a piece of prose holds."""
    text = re.sub(r"`+[^`]*`+", lambda code: "`" + re.sub(r"[^\n]", "x", code.group()[1:-1]) + "`", prose.text)
    flat = re.sub(r"\s", " ", text)

    def found(expression: str, flags: int = 0) -> Iterator[tuple[int, str]]:
        for match in re.finditer(expression, flat, flags):
            word = " ".join(match.group().split())
            start = match.start() + len(match.group()) - len(match.group().lstrip())
            yield prose.line + text.count("\n", 0, start), word

    for expression, instead in WORDS.items():
        for line, word in found(rf"\b(?:{expression.replace(' ', ' +')})\b", re.IGNORECASE):
            yield line, word, instead
    if prose.kind != "text":
        for expression, instead in SENTENCES.items():
            for line, word in found(rf"(?:^|(?<=[.!?] )) *(?:{expression})"):
                yield line, word, instead
    if prose.kind == "docstring":
        for expression, instead in WHOLE.items():
            for line, word in found(rf"^ *(?:{expression}) *$"):
                yield line, word, instead


def problems(file: Path, name: str) -> list[str]:
    """`name:line: 'word'; write: ...` for everything that is found in a file, in the order of the lines."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        pieces = markdown_prose(source)
    elif file.suffix == ".py" or source.startswith("#!/usr/bin/env python"):
        pieces = python_prose(source)
    else:
        pieces = iter([Prose(number, line, "text") for number, line in enumerate(source.splitlines(), start=1)])
    found = sorted({offence for prose in pieces for offence in offences(prose)})
    return [f"{name}:{line}: {word!r}; write: {instead}" for line, word, instead in found]


def all_problems(root: Path) -> list[str]:
    """The problems of all files of a tree that FILES names."""
    files = sorted({file for pattern in FILES for file in root.glob(pattern) if file.is_file()})
    named = [(file, file.relative_to(root).as_posix()) for file in files if "__pycache__" not in file.parts]
    return [text for file, name in named if not name.startswith(SKIPPED) for text in problems(file, name)]


def main(arguments: list[str]) -> int:
    found = [text for name in arguments for text in problems(Path(name), name)] if arguments else all_problems(ROOT)
    print("\n".join(found) or "plain words everywhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
