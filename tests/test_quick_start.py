"""Every command of the quick start and the Ascend page, in both languages: run, dry-run, or named with the reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from steepest.config.load import load_config
from steepest.data.files import read_tables
from steepest.data.prepare.gsm8k import GSM8K_ON, SPLITS
from steepest.devices import DEVICES
from steepest.devices.ascend import CANN, MATRIX
from steepest.loggers.rows import read_rows
from steepest.models.tiny import build_tiny_model
from steepest.rewards.graders.gsm8k import gsm8k
from steepest.rollout.vllm_versions import TESTED, refusal, warning
from tests.fakes import fake_npu_build
from tests.manual import LANGUAGES, ROOT, Shell, blocks, commands, page, table, with_words
from tests.support.commands import REFERENCE
from tests.support.fake_hub import FakeHub, folder_files

NAMES = ("quick_start", "ascend_install")
QUICK_START, ASCEND = (commands(page("en", name)) for name in NAMES)
ALL = list(dict.fromkeys([*QUICK_START, *ASCEND]))

RUN = (
    r"python3 examples/data_preprocess/gsm8k\.py .*",
    r"(MODEL=\S+ )?bash examples/(ppo|grpo)_gsm8k_cpu\.sh.*",
    r"steepest doctor( --json)?",
)
"""Run as they stand, in the session below. The hubs are one of this machine, whose Qwen2.5-0.5B and SmolLM2 are a tiny
model; words are added that make the training small."""
DRY = (
    r"python3 -m steepest\.trainer\.main_ppo .*",
    r"bash examples/(ppo|grpo)_gsm8k_(npu|cuda)\.sh.*",
)
"""Run with `--cfg job`: they need a card."""
NOT_RUN = {
    r"(VLLM_TARGET_DEVICE=empty )?pip install .*": "the network; what it names is checked below",
    r"git clone .*": "the network",
    r"docker run .*": "the network, docker and a card",
    r"python3 -m venv \.venv": "`make test` has made this environment in this way",
    r"source \S+": "a file that an installer puts there",
    r"npu-smi info.*": "a card",
    r"export \w+=\S+": "has an effect on later commands only",
    r"steepest doctor --json > doctor\.json": "run without the file",
    r"python3 -m tests\.npu .*": "a part of `make test`",
}
FIRST_RUN = "bash examples/ppo_gsm8k_cpu.sh"
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
SIZES = (
    "data.train_batch_size=4 data.max_prompt_length=192 data.max_response_length=8 data.val_max_samples=3 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=2 trainer.save_freq=1 trainer.test_freq=1 "
    # something to learn, so that returns differ: the rewards of a random model are all 0
    "actor_rollout_ref.actor.entropy_coeff=0.1"
)
FIRST = {  # the original's first problem, and some in its form
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether "
    "in April and May.\n#### 72",
}
ROWS = [FIRST] + [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(9)]


def how(command: str) -> list[str]:
    """Every rule that speaks of the command."""
    rules = [("run", RUN), ("dry", DRY), ("not run", NOT_RUN)]
    return [f"{name}: {rule}" for name, table in rules for rule in table if re.fullmatch(rule, command)]


def chosen(kind: str, lines: list[str]) -> list[str]:
    return [line for line in lines if how(line)[0].startswith(f"{kind}:")]


def test_each_command_is_run_or_dry_run_or_named_with_its_reason() -> None:
    assert {line: how(line) for line in ALL if len(how(line)) != 1} == {}
    used = {how(line)[0].partition(": ")[2] for line in ALL}
    assert {*RUN, *DRY, *NOT_RUN} - used == set(), "a rule for a command that no page has"


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_have_the_same_commands_and_the_same_output(name: str) -> None:
    english, chinese = (page(language, name) for language in LANGUAGES)
    assert commands(english) == commands(chinese)
    for kind in ("text", "python"):
        assert blocks(english, kind) == blocks(chinese, kind)
    assert [len(level) for level in re.findall(r"^(#+) ", english, flags=re.M)] == [
        len(level) for level in re.findall(r"^(#+) ", chinese, flags=re.M)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_name_the_same_things(name: str) -> None:
    """Keys, files, metrics and values: what stands between backticks, in the same tables of the same size."""
    spans = [re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page(language, name), flags=re.M | re.S))
             for language in LANGUAGES]  # fmt: skip
    known = [{span for span in found if re.fullmatch(r"[\x20-\x7e]+", span) and "<" not in span} for found in spans]
    assert known[0] ^ known[1] == set()
    rows = [len(re.findall(r"^\|", page(language, name), flags=re.M)) for language in LANGUAGES]
    assert rows[0] == rows[1] > 10


@pytest.mark.parametrize("command", ALL)
def test_bash_reads_the_command(command: str) -> None:
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_reference_command_stands_there_word_for_word() -> None:
    (command,) = (line for line in QUICK_START if "steepest.trainer.main_ppo" in line)
    words = command.replace("$HOME/data", "/data").removesuffix(" 2>&1 | tee verl_demo.log").split()
    assert words[:3] == ["python3", "-m", "steepest.trainer.main_ppo"]
    assert sorted(words[3:]) == sorted(REFERENCE)
    assert load_config(words[3:]).provenance.warnings == ()


@pytest.mark.parametrize("command", chosen("dry", ALL))
def test_dry_run(command: str, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    done = shell.run(with_words(command, "--cfg", "job"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    device = re.search(r"trainer\.device=(\w+)|_(npu|cuda)\.sh", command)
    assert device is not None and found["trainer"]["device"] in device.groups()
    assert found["actor_rollout_ref"]["model"]["path"] == "Qwen/Qwen2.5-0.5B-Instruct"


def test_the_modelscope_switch_chooses_the_hub(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    (switch,) = {line for line in ALL if "MODELSCOPE" in line}
    printed = shell.ok(f"{switch}; bash examples/ppo_gsm8k_npu.sh --cfg job")
    by_key = shell.ok("bash examples/ppo_gsm8k_npu.sh actor_rollout_ref.model.hub=modelscope --cfg job")
    for text in (printed, by_key):
        found = yaml.safe_load(text)
        assert found["actor_rollout_ref"]["model"]["hub"] == found["critic"]["model"]["hub"] == "modelscope"


class Session:
    """A home, and what the quick start's commands for a CPU printed in it, one after the other."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.shell, self.hub = Shell(folder), hub
        data = {f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode() for split in SPLITS}
        source = self.shell.home / "grade_school_math" / "data"
        source.mkdir(parents=True)
        for name, content in data.items():
            (source / name).write_bytes(content)
        for name in GSM8K_ON.values():
            hub.commit("datasets", name, data)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2}
        model = build_tiny_model(folder / "model", [text for row in ROWS for text in row.values()], **sizes)
        for name in MODELS:
            hub.commit("models", name, folder_files(model))
        self.shell.environment |= {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        self.printed: dict[str, str] = {}
        self.steps = 2

    def run(self, command: str) -> None:
        words = []
        if "bash examples/" in command:
            self.steps += "total_training_steps" in command
            words = [SIZES, f"trainer.total_training_steps={self.steps}"]
        self.printed[command] = self.shell.ok(with_words(command, *words))

    def output(self, words: str) -> str:
        """Of the first command with these words."""
        return next(text for command, text in self.printed.items() if words in command)

    def rows(self, job: str) -> list[dict[str, Any]]:
        return list(read_rows(self.shell.here / "checkpoints" / "steepest" / job / "metrics.jsonl"))


CPU_COMMANDS = chosen("run", QUICK_START)
LATER = [line for line in CPU_COMMANDS if "bash examples/" in line and line != FIRST_RUN]
"""Each starts Python and loads its libraries anew, which is most of its time: left to the slow tests."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    pytest.importorskip("modelscope_hub")
    with FakeHub() as hub:
        found = Session(tmp_path_factory.mktemp("session"), hub)
        for command in CPU_COMMANDS:
            if command not in LATER:
                found.run(command)
        yield found


def test_the_hubs_were_downloaded_from(session: Session) -> None:
    assert session.hub.asked("/datasets/openai/gsm8k/resolve/") and session.hub.asked("/AI-ModelScope/gsm8k/repo")
    assert session.hub.asked("/Qwen/Qwen2.5-0.5B-Instruct/resolve/.*safetensors")
    (switch,) = {line for line in ALL if "MODELSCOPE" in line}
    download = next(line for line in CPU_COMMANDS if line.endswith("--local_save_dir ~/data/gsm8k"))
    printed = session.shell.ok(f"{switch}; {download}")  # as on the Ascend page
    assert [name for name in GSM8K_ON.values() if name in printed] == [GSM8K_ON["modelscope"]]


def test_the_data_is_what_the_page_shows(session: Session) -> None:
    (train,) = read_tables(str(session.shell.home / "data/gsm8k/train.parquet"), key="k")
    told, row, *_ = blocks(page("en", "quick_start"), "text")
    assert row == (
        f"prompt        {train.rows[0]['prompt'][0]['content']}\n"
        f"ground truth  {train.rows[0]['reward_model']['ground_truth']}\n"
    )
    # the page's home and row counts are another one's
    told = told.replace("/home/you", str(session.shell.home)).replace("7,473", "10").replace("1,319", "10")
    assert session.output("--local_dataset_path") == told


def test_the_metrics_of_the_page_exist(session: Session) -> None:
    real = {name for row in session.rows("ppo_gsm8k_cpu") for name in row}
    for language in LANGUAGES:
        text = page(language, "quick_start")
        named = {name for row in table(text, "7.") for name in re.findall(r"`([^`]+)`", row[0])}
        assert len(named) > 12 and named - real == set()
        steps = [line for block in blocks(text, "text") for line in block.splitlines() if line.startswith("step:")]
        shown = {name for line in steps for name in re.findall(r" - ([\w/@-]+):", line)}
        assert len(steps) > 10 and len(shown) > 10 and shown - real == {"eta_s"}  # of the console alone


def test_the_page_shows_the_lines_that_a_run_prints(session: Session) -> None:
    """The labels of the start and of the end, in their order."""
    shown = "\n".join(blocks(page("en", "quick_start"), "text")[2:5])
    labels = [re.findall(r"^  (\w[\w ]*?)  ", text, flags=re.M) for text in (session.output(FIRST_RUN), shown)]
    assert list(dict.fromkeys(labels[0])) == list(dict.fromkeys(labels[1])) and len(labels[1]) > 10


def test_the_python_of_the_page_loads_the_checkpoint(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(page("en", "quick_start"), "python")
    monkeypatch.chdir(session.shell.here)
    scope: dict[str, Any] = {}
    exec(code.replace("global_step_50", "global_step_2"), scope)
    assert scope["model"].config.hidden_size == 32 and scope["tokenizer"].chat_template


@pytest.mark.slow
def test_the_same_command_goes_on_val_only_scores_and_grpo_has_no_critic(session: Session) -> None:
    for command in LATER:
        session.run(command)
    for words, step in (("MODEL=", 3), ("total_training_steps=60", 4)):
        printed = session.output(words)
        assert f"resuming from step {step - 1}" in printed
        assert re.findall(r"^step:(\d+) - training", printed, flags=re.M) == [str(step)]
    scored = session.output("val_only")
    assert "resuming from step 4" in scored and "val-core/openai/gsm8k/acc/mean@1" in scored
    samples = (session.shell.here / "checkpoints/steepest/ppo_gsm8k_cpu/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in samples]
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4, 4) for _ in range(3)] and rows[0]["prompt"]
    row = session.rows("grpo_gsm8k_cpu")[0]
    assert "actor/kl_loss" in row and "critic/vf_loss" not in row


@pytest.mark.real
@pytest.mark.slow
def test_the_command_of_the_page_runs_on_its_real_model(tmp_path: Path, shared: Path, smollm2: Path) -> None:
    """With fewer and shorter responses than the page's."""
    shell = Shell(tmp_path)
    (command,) = (line for line in QUICK_START if line.startswith("MODEL="))
    shell.ok(
        f"python3 {ROOT}/examples/data_preprocess/gsm8k.py --local_save_dir ~/data/gsm8k "
        f"--local_dataset_path {shared}/gsm8k"
    )
    words = "data.train_batch_size=2 actor_rollout_ref.actor.ppo_mini_batch_size=2 data.max_response_length=32"
    printed = shell.ok(
        f"export MODEL={smollm2}; {command.partition(' ')[2]} {words} data.val_max_samples=2 "
        "trainer.total_training_steps=1 trainer.save_freq=0"
    )
    assert "actor 135M; critic 135M; reference 135M" in printed and "train: 7,473 prompts" in printed
    assert re.findall(r"^step:(\d+) - training", printed, flags=re.M) == ["1"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_links_into_pages_find_their_heading(language: str, name: str) -> None:
    here = f"{name}.md"
    links = re.findall(r"\]\(([\w.]*)#([^)\s]+)\)", page(language, name))
    assert links
    for target, anchor in links:
        text = page(language, (target or here).removesuffix(".md"))
        headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_reward_table_is_what_the_reward_gives(language: str) -> None:
    rows = table(page(language, "quick_start"), "4.")
    given = {ending: gsm8k("openai/gsm8k", ending.strip("`"), "72")["score"] for ending, _ in rows}
    assert given == {ending: float(score) for ending, score in rows} and set(given.values()) == {0.0, 1.0}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_version_matrix_is_that_of_doctor(language: str) -> None:
    columns = ("vllm-ascend", "vllm", "torch", "torch-npu", CANN, "triton-ascend")
    wanted = [[*(row.versions.get(name, "") for name in columns), row.transformers, row.python] for row in MATRIX]
    rows = table(page(language, "ascend_install"), "2.")
    assert [row[:8] for row in rows] == wanted
    floor = re.search(r'"torch>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert floor is not None
    too_old = [release(row[2]) < release(floor[1]) for row in rows]
    assert too_old == [f"torch {floor[1]}" in row[8] for row in rows] == [False, True, True, False]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_vllm_of_the_page_is_not_refused_and_the_tested_one_is_named(language: str) -> None:
    text = page(language, "ascend_install")
    of_set = table(text, "2.")[0][1]
    assert refusal(of_set) is None, "the Ascend page has to say that vLLM cannot be used on an NPU"
    (line,) = re.findall(r"^- .*\.\./vllm\.md.*(?:\n  .*)?", text, flags=re.M)
    assert re.findall(r"\d+\.\d+\.\d+", line) == [TESTED[0], TESTED[-1], of_set]
    assert (warning(of_set) is None) is (of_set in TESTED)


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_npu_sets_and_says_is_on_the_page(language: str) -> None:
    text, device = page(language, "ascend_install"), DEVICES.get("npu").value()
    settings = {row[0]: row for row in table(text, "7.")}
    for name, value in {**device.environment(), **device.rollout_environment()}.items():
        (row,) = (cells for cell, cells in settings.items() if f"`{name}`" in cell)
        assert row[1].startswith(f"`{value}`")
    assert f"`{device.visible_devices_variable}=0,1`" in settings and f"`{device.allocator_variable}`" in settings
    source = (ROOT / "steepest" / "devices" / "backends" / "npu.py").read_text(encoding="utf-8")
    ours = [row[0].strip("`") for row in table(text, "8.") if "card" in row[0]]
    assert len(ours) == 2 and [message for message in ours if message not in source] == []


def test_what_the_pages_install_is_what_the_package_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.findall(r'^  "([^"]+)",', project.partition("\ndependencies = [")[2].partition("\n]")[0], flags=re.M)
    extras = {name for line in ALL for name in re.findall(r'"\.\[(\w+)\]"', line)}
    assert extras == {"vllm", "modelscope", "npu"}
    assert [name for name in extras if not re.search(rf"^{name} = \[", project, flags=re.M)] == []
    added = next(line for line in ASCEND if "hydra-core" in line)
    names = re.findall(r'"([^"]+)"', added)
    assert [name for name in names if name not in asked] == []
    # vLLM needs these itself, so its image has them
    of_vllm = {"torch", "transformers", "packaging", "pyyaml", "safetensors", "tokenizers", "huggingface_hub", "numpy"}
    assert {re.split(r"[<>=\[]", line)[0] for line in asked} == of_vllm | {re.split(r"[<>=\[]", n)[0] for n in names}


def test_doctor_says_on_the_stand_in_what_the_page_shows() -> None:
    if not fake_npu_build.library().is_file():
        pytest.skip(f"the stand-in NPU is not compiled; {fake_npu_build.COMMAND}")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "fakes")))
    environment = {**os.environ, "PYTHONPATH": path, "FAKE_NPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "steepest", "doctor"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    real = lines_of_report(done.stdout)
    shown = lines_of_report("".join(blocks(page("en", "ascend_install"), "text")))
    assert len(shown) > 12 and [line for line in shown if line not in real] == []
    for language in LANGUAGES:  # the rest of the texts holds sizes and versions
        engines = "".join(blocks(page(language, "ascend_install"), "text")).partition("\nengines\n")[2].split("\n\n")[0]
        assert "vllm-ascend" in engines and " ".join(engines.split()) in " ".join(done.stdout.split())


def lines_of_report(text: str) -> list[tuple[str, str]]:
    """(status, name) of each line."""
    return re.findall(r"^  (ok|warning|problem) +(\w[\w ]*?)  ", text, flags=re.M)
