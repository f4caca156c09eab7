"""The configuration in words: YAML of the resolved values, --help, and the table of docs/configuration.md.

`python -m steepest.config.describe docs/configuration.md` writes the tables again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from steepest.config import tree
from steepest.config.schema import Config, SFTConfig

BEGIN, END = "<!-- begin {} keys: generated -->", "<!-- end {} keys -->"


def to_yaml(config: Config | SFTConfig, *, with_sources: bool = False) -> str:
    """The effective values as YAML, one key a line; with where each came from as a comment unless it is a default.

    `--config FILE` loads the text again.
    """
    sources = config.provenance.sources if with_sources else {}
    return "".join(f"{line}\n" for line in _yaml_lines(tree.thaw(config), sources, ""))


def _yaml_lines(values: dict[str, Any], sources: typing.Mapping[str, str], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and not _is_mapping_leaf(key):
            yield f"{indent}{name}:"
            yield from _yaml_lines(value, sources, f"{key}.")
        else:
            source = sources.get(key, "default")
            text = "???" if value in ("", []) and _is_required(key) else _yaml_value(value)
            yield f"{indent}{name}: {text}" + ("" if source == "default" else f"  # {source}")


def _is_mapping_leaf(key: str) -> bool:
    return any(leaves[key].base is dict for leaves in (tree.leaves(Config), tree.leaves(SFTConfig)) if key in leaves)


def _is_required(key: str) -> bool:
    return any(leaves[key].required for leaves in (tree.leaves(Config), tree.leaves(SFTConfig)) if key in leaves)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that PyYAML, or OmegaConf's loader, would read as something else: "1e5"."""


_Dumper.yaml_implicit_resolvers = {
    first: _Dumper.yaml_implicit_resolvers.get(first, []) + rules
    for first, rules in get_yaml_loader().yaml_implicit_resolvers.items()
}


def _yaml_value(value: Any) -> str:
    style = '"' if isinstance(value, str) and "\n" in value else None
    options: dict[str, Any] = {"default_flow_style": True, "default_style": style, "width": float("inf")}
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)
    return str(text).removesuffix("\n").removesuffix("\n...")


@functools.cache
def field_docs(schema: type) -> dict[str, str]:
    """Dotted key -> the text beneath the field, on one line."""
    docs: dict[str, str] = {}
    hints = typing.get_type_hints(schema)
    own = _own_docs(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            inner = field_docs(typing.cast(type, hints[item.name]))
            docs.update({f"{item.name}.{key}": text for key, text in inner.items()})
        else:
            docs[item.name] = own.get(item.name, "")
    return docs


def _own_docs(schema: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]).body
    docs = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[ast.unparse(node.target)] = " ".join(str(after.value.value).split())
    return docs


def _default_text(leaf: tree.Leaf) -> str:
    if leaf.required:
        return "required"
    value = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
    if isinstance(value, list) and leaf.length is None and len(value) == 1:
        value = value[0]
    return _yaml_value(value)


def _kind_text(leaf: tree.Leaf) -> str:
    if leaf.choices:
        return " / ".join(leaf.choices)
    kind = {int: "int", float: "float", bool: "bool", str: "text", dict: "mapping"}[leaf.base]
    return f"list of {leaf.length} {kind}s" if leaf.length else f"{kind} or list" if leaf.is_list else kind


def _by_section(schema: type) -> dict[str, dict[str, tree.Leaf]]:
    """Section -> name -> leaf; each section once, where its first key stands."""
    out: dict[str, dict[str, tree.Leaf]] = {}
    for key, leaf in tree.leaves(schema).items():
        section, _, name = key.rpartition(".")
        out.setdefault(section, {})[name] = leaf
    return out


def keys_table(schema: type) -> str:
    """One Markdown table a section: key, type or choices, default, what it does."""
    docs, out = field_docs(schema), list[str]()
    for section, inner in _by_section(schema).items():
        out += ["", f"### `{section}`", "", "| key | type | default | what it does |", "|---|---|---|---|"]
        for name, leaf in inner.items():
            text = docs[leaf.key].replace("|", "\\|")
            out.append(f"| `{name}` | {_kind_text(leaf)} | {_default_text(leaf)} | {text} |")
    return "\n".join(out).strip() + "\n"


def fill_tables(page: str) -> str:
    """The page with both tables between their marks replaced by new ones."""
    for name, schema in (("PPO", Config), ("SFT", SFTConfig)):
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no lines {begin!r} and {end!r}")
        page = f"{before}{begin}\n\n{keys_table(schema)}\n{end}{after}"
    return page


IMPORTANT = """
    data.train_files data.val_files data.prompt_key data.response_key data.messages_key data.train_batch_size
    data.max_prompt_length data.max_response_length data.max_length data.filter_overlong_prompts data.truncation
    data.micro_batch_size_per_gpu
    actor_rollout_ref.model.path actor_rollout_ref.model.lora_rank
    actor_rollout_ref.model.enable_gradient_checkpointing
    model.path model.lora_rank model.enable_gradient_checkpointing
    actor_rollout_ref.actor.optim.lr actor_rollout_ref.actor.ppo_mini_batch_size actor_rollout_ref.actor.ppo_epochs
    actor_rollout_ref.actor.clip_ratio actor_rollout_ref.actor.entropy_coeff actor_rollout_ref.actor.use_kl_loss
    actor_rollout_ref.actor.kl_loss_coef actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    actor_rollout_ref.rollout.name actor_rollout_ref.rollout.n actor_rollout_ref.rollout.temperature
    actor_rollout_ref.rollout.gpu_memory_utilization
    critic.model.path critic.optim.lr
    algorithm.adv_estimator algorithm.gamma algorithm.lam algorithm.use_kl_in_reward algorithm.kl_ctrl.kl_coef
    reward.functions custom_reward_function.path custom_reward_function.name
    optim.lr optim.lr_scheduler_type optim.lr_warmup_steps engine.dtype
    trainer.total_epochs trainer.total_training_steps trainer.save_freq trainer.test_freq trainer.log_freq
    trainer.logger trainer.device trainer.default_local_dir
"""
"""Keys of either job that `--help` explains; `--help-all` lists every key."""


def help_text(schema: type, module: str, *, every_key: bool = False) -> str:
    """What `--help` prints: usage, a command that works, options, the important keys with defaults and what they do;
    with `every_key` (`--help-all`) every key with its default."""
    lines = [*_usage(schema, module)]
    docs, important = field_docs(schema), IMPORTANT.split()
    for section, inner in _by_section(schema).items():
        shown = {name: leaf for name, leaf in inner.items() if every_key or leaf.key in important}
        if shown:
            lines += ["", f"{section}:"]
        for name, leaf in shown.items():
            choices = f"  ({' | '.join(leaf.choices)})" if leaf.choices else ""
            begin = f"  {name}: {_default_text(leaf)}{choices}"
            lines += [begin] if every_key else _with_doc(begin, docs[leaf.key])
    if not every_key:
        lines += ["", f"These are the most important of {len(tree.leaves(schema))} keys; --help-all lists all."]
    return "\n".join(lines)


def _with_doc(begin: str, doc: str) -> Iterator[str]:
    """A key, and next to it or beneath it the first sentence of what it does."""
    sentence = re.split(r"(?<!e\.g)\. ", doc)[0].removesuffix(".")
    if len(begin) < _COLUMN:
        begin = f"{begin:<{_COLUMN}}"
    else:
        yield begin
        begin = " " * _COLUMN
    first, *rest = textwrap.wrap(sentence, 118 - _COLUMN)
    yield begin + first
    yield from (" " * _COLUMN + line for line in rest)


_COLUMN = 46
"""Where the explanations of `--help` begin."""


def _usage(schema: type, module: str) -> Iterator[str]:
    required = [leaf.key for leaf in tree.leaves(schema).values() if leaf.required]
    example = " \\\n".join(f"    {key}={'MODEL' if key.endswith('path') else 'FILE.parquet'}" for key in required)
    command = "steepest sft" if schema is SFTConfig else "steepest ppo"
    yield from (
        f"usage: {command} [options] key=value ...    (or python -m {module})",
        "",
        "Example: only these keys are required.",
        "",
        f"  {command} \\",
        example,
        "",
        "options:",
        "  --config FILE         start from the settings of this YAML file",
        "  --config-name NAME    start from a preset: grpo, rloo, dapo, ...; or from NAME.yaml of --config-path",
        "  --config-path FOLDER  folder of that file",
        "  --cfg job             print the effective configuration as YAML and exit",
        "  --help                this text",
        "  --help-all            every key with its default",
        "",
        "settings: key=value (also +key=value, ++key=value); ~key goes back to the default;",
        "  null means derived or off; lists are '[a,b]'. What each key does: docs/configuration.md",
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(fill_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
