"""Layers below the jobs write no configuration key into a text; each setting they name has a key in the jobs.

Docstrings are left out: they explain what a key does.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from steepest.config import tree
from steepest.config.key_names import PPO_KEYS, SFT_KEYS
from steepest.config.schema import Config, SFTConfig
from tests.test_architecture import LAYERS, PACKAGE

LOWER = [name for name, layer in LAYERS.items() if layer < LAYERS["assembly"] and name not in ("config", "__init__")]

ONLY_PPO = {
    "core": "all", "rewards": "all", "rollout": "all",
    "data/prompts.py": {"reward_fn_key", "answer_key", "reward_functions"},
    "data/sampler.py": {"val_batch_size", "filter_overlong_prompts"},
    "data/chat.py": {"max_prompt_length", "filter_overlong_prompts"},
    "models/lora_models.py": {"share_base"}, "learner/checkpoint.py": {"adv_estimator"},
    "assembly/lora.py": {"share_base"},
}  # fmt: skip
"""Folder or file -> the settings in it that SFT has not: an SFT run prints none of them, or (`adv_estimator` and the
`share_base` of assembly/lora.py) as what a job of the other kind had."""
ONLY_SFT = {"data/sft.py": "all"}


def files_of(name: str) -> list[Path]:
    folder = PACKAGE / name
    return (
        sorted(folder.rglob("*.py"))
        if folder.is_dir()
        else [found for found in [PACKAGE / f"{name}.py"] if found.is_file()]
    )


@functools.cache
def keys() -> re.Pattern[str]:
    """Keys of two parts or more of either job, and the sections that hold them; not as part of a longer word."""
    found = {key for schema in (Config, SFTConfig) for key in (*tree.leaves(schema), *tree.sections(schema))}
    long = {key for key in found if "." in key} | {"actor_rollout_ref", "custom_reward_function"}
    words = "|".join(re.escape(key) for key in sorted(long, key=len, reverse=True))
    return re.compile(rf"(?<![\w./])(?:{words})(?![\w(])")


def texts(source: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is no docstring."""
    bodies = [body for node in ast.walk(source) if isinstance(body := getattr(node, "body", None), list)]
    docstrings = {id(item.value) for body in bodies for item in body if isinstance(item, ast.Expr)}
    for node in ast.walk(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def literals(source: str) -> list[tuple[int, str]]:
    """(line, key) of every key that stands in a text of the source."""
    return [(line, key) for line, text in texts(ast.parse(source)) for key in keys().findall(text)]


def settings(source: str) -> list[tuple[int, str, str | None]]:
    """(line, setting, owner) of every `setting("name")` and `setting("name", "owner")`; None for a computed owner."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setting":
            name, *rest = node.args
            owner = "" if not rest else rest[0].value if isinstance(rest[0], ast.Constant) else None
            for choice in (name.body, name.orelse) if isinstance(name, ast.IfExp) else (name,):
                assert isinstance(choice, ast.Constant), f"line {node.lineno}: the name of a setting is a literal"
                found.append((node.lineno, str(choice.value).partition("=")[0], owner))
    return found


@pytest.mark.parametrize("name", LOWER)
def test_no_text_of_a_lower_layer_holds_a_configuration_key(name):
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{line}: {key}: name a setting instead, see steepest/errors.py"
        for file in files_of(name)
        for line, key in literals(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ('E(f"Lower actor_rollout_ref.rollout.max_num_seqs (now {n})")', ["actor_rollout_ref.rollout.max_num_seqs"]),
        ('KEY = "trainer.device"', ["trainer.device"]),
        ('a = "data.train_files=" "x, or model.path"', ["data.train_files", "model.path"]),
        ('ROLLOUT = "actor_rollout_ref.rollout"', ["actor_rollout_ref.rollout"]),
        ('a = f"{x}: {y or \'reward.mode\'}"', ["reward.mode"]),
        ('"""trainer.device"""\ndef f():\n    """data.seed"""\n    x = 1\n    """optim.lr"""', []),
        ('a = "see data.py, metadata.path, ./data.seed"; b = x.model.path; c = "model.paths"  # trainer.device', []),
    ],
)  # fmt: skip
def test_the_search_sees_keys_in_texts_and_in_nothing_else(source, want):
    assert [key for _, key in literals(source)] == want


def knows(names, name: str, owner: str | None) -> bool:
    """Whether a job has a key for a setting; of a computed owner, for that setting of some owner."""
    if name in names or f"{owner}.{name}" in names:
        return True
    return owner is None and any(known.endswith(f".{name}") for known in names)


def problems(file: Path) -> Iterator[str]:
    where = str(file.relative_to(PACKAGE))
    for line, name, owner in settings(file.read_text()):
        for job, names, elsewhere in (("PPO", PPO_KEYS, ONLY_SFT), ("SFT", SFT_KEYS, ONLY_PPO)):
            left_out = elsewhere.get(where, elsewhere.get(where.partition("/")[0], ()))
            if left_out != "all" and name not in left_out and not knows(names, name, owner):
                yield f"steepest/{where}:{line}: {name!r} has no key in the {job} job: add it to config/key_names.py"


@pytest.mark.parametrize("name", [*LOWER, "assembly"])
def test_each_setting_has_a_key_in_the_jobs_that_print_it(name):
    assert [problem for file in files_of(name) for problem in problems(file)] == []


def test_the_lists_of_settings_that_one_job_prints_are_not_too_long():
    for where, names in ONLY_PPO.items():
        if names != "all":
            found = {name for _, name, _ in settings((PACKAGE / where).read_text())}
            assert names <= found - SFT_KEYS.keys(), where


@pytest.mark.parametrize(("names", "schema"), [(PPO_KEYS, Config), (SFT_KEYS, SFTConfig)])
def test_each_key_that_a_setting_is_named_by_is_one_of_the_job(names, schema):
    unknown = {key for text in names.values() for key in text.split(" or ") if key not in tree.leaves(schema)}
    assert unknown == set()


def test_each_name_of_a_job_is_a_setting_that_some_lower_layer_names_or_one_of_a_model():
    named = {
        (name, owner)
        for layer in [*LOWER, "assembly"]
        for file in files_of(layer)
        for _, name, owner in settings(file.read_text())
    }
    bare, computed = {name for name, _ in named}, {name for name, owner in named if owner is None}
    files = {"val_files", "train_max_samples", "val_max_samples"}  # made of the key of the file
    of_a_model = {key.rpartition(".")[2] for key in tree.leaves(Config) if key.startswith("actor_rollout_ref.model.")}
    for known in {*PPO_KEYS, *SFT_KEYS} - files - of_a_model:
        owner, _, name = known.rpartition(".")
        assert (name, owner) in named or name in computed or known in bare, known


def replaced_messages(source: str) -> list[int]:
    """Lines that rewrite the text of an error: `str(error).replace(...)`, `error.args[0].replace(...)`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
            text = ast.unparse(node.func.value)
            if text.startswith("str(err") or text.startswith("str(e)") or ".args[0]" in text:
                found.append(node.lineno)
    return found


def test_no_finished_message_is_rewritten():
    files = sorted((Path(__file__).parents[1] / "steepest").rglob("*.py"))
    assert [f"{f}:{n}" for f in files for n in replaced_messages(f.read_text(encoding="utf-8"))] == []


def test_a_rewritten_message_is_found():
    source = "try:\n    f()\nexcept ValueError as error:\n    raise X(str(error).replace('a', 'b')) from error\n"
    assert replaced_messages(source) == [4] and replaced_messages("name.replace('a', 'b')") == []
