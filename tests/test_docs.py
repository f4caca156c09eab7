"""What the documents say is true: links lead somewhere, commands parse, keys exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from steepest.config.load import load_config, load_sft_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", index))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    assert there - linked == set()


def commands(page: Path) -> list[list[str]]:
    """The commands in the page's bash blocks, without comments, variables filled in, cut at pipes."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [
        shlex.split(line.replace("$HOME", "/home/user").replace("~/", "/home/user/"), comments=True) for line in lines
    ]
    return [line[: line.index("2>&1")] if "2>&1" in line else line for line in found if line]


JOBS = [
    (name(page), tail, load)
    for page in PAGES
    for line in commands(page)
    for start, load in (
        (["python", "-m", "steepest.trainer.main_ppo"], load_config),
        (["python3", "-m", "steepest.trainer.main_ppo"], load_config),
        (["python", "-m", "steepest.trainer.main_sft"], load_sft_config),
        (["steepest", "ppo"], load_config),
        (["steepest", "preflight"], load_config),
        (["steepest", "sft"], load_sft_config),
    )
    if line[: len(start)] == start
    for tail in [line[len(start) :]]
]


def test_the_readme_has_its_jobs() -> None:
    """PPO, GRPO, a preflight, supervised training."""
    found = [job[2].__name__ for job in JOBS if job[0] == "README.md"]
    assert found == ["load_config", "load_config", "load_config", "load_sft_config"]


@pytest.mark.parametrize(("page", "arguments", "load"), JOBS, ids=[f"{job[0]}-{i}" for i, job in enumerate(JOBS)])
def test_the_commands_of_the_documents_are_accepted(page: str, arguments: list[str], load) -> None:  # type: ignore[no-untyped-def]
    if any(argument.startswith(("key=", "...")) or argument in ("--help", "--cfg") for argument in arguments):
        pytest.skip("a form, not a command")
    config = load(arguments)
    given = {argument.split("=", 1)[0] for argument in arguments if "=" in argument}
    used = {key for key, source in config.provenance.sources.items() if source == "command line"}
    # what the command writes is in force, and nothing of it is said to have no effect
    assert given & used and config.provenance.warnings == (), page


def test_make_targets_of_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line[1] for page in PAGES for line in commands(page) if line[0] == "make"}
    assert {"quickstart", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.M)] == []


def test_both_languages_of_the_readme_have_the_same_blocks() -> None:
    english, chinese = (
        re.findall(r"```.*?```", (ROOT / file).read_text("utf-8"), re.S) for file in ("README.md", "README.zh.md")
    )
    assert len(english) == 10 and chinese == english


def test_the_dockerfile_copies_what_the_build_reads() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied == ["pyproject.toml", "README.md", "LICENSE", "steepest"]
    assert all((ROOT / file).exists() for file in copied)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0,
    reason="needs a running Docker daemon",
)
def test_the_image_builds_and_runs() -> None:
    subprocess.run(["docker", "build", "--tag", "steepest-test", str(ROOT)], check=True, timeout=3000)
    done = subprocess.run(["docker", "run", "--rm", "steepest-test", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("steepest "), done.stderr
