"""Whether the weights in a model's files are those of the model: none missing, left over, of another shape or NaN."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from steepest.errors import CheckpointError, ModelError, SteepestError, setting

LANGUAGE_HEAD = ("lm_head.", "embed_out.", "output_projection.")
"""Prefixes of the head of a language model, which a model with another head leaves in the file."""
VALUE_HEAD = ("score.", "classifier.", "v_head.", "value_head.")
"""Prefixes of heads that compute values, scores or classes, of this project and others."""
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|position_ids"
    r"|(attn|attention)(\.attention)?\.(bias|masked_bias))$"
)
"""Tables that old versions of transformers wrote into the files: of rotary positions, and causal masks of GPT-2,
GPT-Neo, GPT-J and GPT-NeoX. The model computes them itself."""
_EXTRA_PREDICTOR = re.compile(r"((?:^|\.)layers\.\d+\.)eh_proj\.")
"""The projection that only the layers have that predict a further token (DeepSeek, GLM). They stand behind the
model's last layer, and transformers does not run them."""
_SHOWN = 5


def check_names(
    path: Path | str,
    hf: PreTrainedModel,
    info: Mapping[str, Any],
    *,
    other_heads: tuple[str, ...] = (),
    fresh_head: tuple[str, ...] = (),
    other_parts: Collection[str] = (),
) -> None:
    """Compare the names and shapes of the files with the model's. Raises ModelError that names what does not fit.

    `info`: what `from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True)` says; it leaves out what
    transformers declares as ignorable. `other_heads`: prefixes that the files may hold in addition. `fresh_head`:
    prefixes that the files need not hold, or may hold in another shape. `other_parts`: modules of a larger model around
    this one, which the files may hold.
    """
    by = f"{type(hf).__name__} by its config.json"
    fix = f"Correct config.json, an entry by {setting('override_config')}, or get the files that belong together."
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(fresh_head or ("\0",))):
        raise ModelError(f"{path}: {len(missing)} weights of {by} are not in the checkpoint: {_some(missing)}. {fix}")
    other = [entry for entry in info["mismatched_keys"] if not entry[0].startswith(fresh_head or ("\0",))]
    if other:
        shapes = sorted(f"{name} is {list(found)} there and {list(wanted)} here" for name, found, wanted in other)
        raise ModelError(f"{path}: {len(other)} weights have another shape than {by}: {_some(shapes)}. {fix}")
    if strange := sorted(_without_known(info["unexpected_keys"], other_heads, other_parts)):
        raise ModelError(
            f"{path}: {len(strange)} weights of the checkpoint have no place in {by}: {_some(strange)}. Without them "
            f"it is another model. {fix}"
        )


def _without_known(names: Iterable[str], other_heads: tuple[str, ...], other_parts: Collection[str]) -> list[str]:
    """The names without those that are known to be harmless."""
    names = list(names)
    extra = {match[1] for name in names if (match := _EXTRA_PREDICTOR.search(name))}
    return [
        name
        for name in names
        if not (
            _BUFFERS.search(name)
            or (other_heads and name.startswith(other_heads))
            or any(layer in name for layer in extra)
            or name.removeprefix("model.").partition(".")[0] in other_parts
        )
    ]


def check_tied(path: Path | str, hf: PreTrainedModel) -> None:
    """Raises ModelError when config.json ties the head to the embedding and the files hold two different ones. Some
    versions of transformers keep both, some drop the head."""
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if head is None or not getattr(hf.config.get_text_config(), "tie_word_embeddings", False):
        return
    if head.weight is not embedding.weight and head.weight.shape == embedding.weight.shape:
        raise ModelError(
            f"{path}: config.json ties the output head to the embedding (tie_word_embeddings), but the checkpoint "
            f"holds a head of its own with other numbers. Set tie_word_embeddings to false there or with "
            f"{setting('override_config')} to use it, or remove it from the file."
        )


def check_gguf(path: Path, hf: PreTrainedModel, but: Collection[str] = ()) -> None:
    """Raises ModelError when a GGUF file holds more numbers than the model: transformers passes over what it does not
    know. Tables of rotary positions do not count, nor layers that predict a further token. `but`: weights of the model
    that are not from the file, which is the head of a value model; then the file's own head does not count."""
    from gguf import GGUFReader

    sizes = {str(tensor.name): int(tensor.n_elements) for tensor in GGUFReader(str(path)).tensors}
    blocks = {name.split(".nextn.")[0] for name in sizes if ".nextn." in name}
    counted = {
        name: size
        for name, size in sizes.items()
        if not name.startswith(("rope_", "output.") if but else "rope_")
        and not any(name.startswith(f"{block}.") for block in blocks)
    }
    own = {tensor.data_ptr(): tensor.numel() for name, tensor in hf.state_dict().items() if name not in but}
    surplus = sum(counted.values()) - sum(own.values())
    if surplus <= 0:
        return
    layers = hf.config.get_text_config().num_hidden_layers
    beyond = sorted(name for name in counted if (n := re.match(r"blk\.(\d+)\.", name)) and int(n[1]) >= layers)
    names = f", among them {_some(beyond)}" if beyond else ""
    raise ModelError(
        f"{path}: its tensors hold {surplus:,} numbers that have no place in {type(hf).__name__} by the file's own "
        f"settings ({layers} layers){names}. Without them it is another model. Get or convert the file again."
    )


def check_finite(
    path: Path | str, weights: Iterable[tuple[str, Tensor]], *, wrong: type[SteepestError] = ModelError
) -> None:
    """Raise `wrong`, with the first weight that holds NaN or infinite numbers and the file where it lies."""
    seen: set[int] = set()
    bad: list[tuple[str, Tensor]] = []
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.data_ptr() not in seen and not _is_finite(tensor.detach()):
            bad.append((name, tensor.detach()))
        seen.add(tensor.data_ptr())
    if not bad:
        return
    name, tensor = bad[0]
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    more = f" So do {len(bad) - 1} more, the next is {bad[1][0]}." if len(bad) > 1 else ""
    raise wrong(
        f"{path}: {name}{_in_file(Path(path), name)} has {nan:,} NaN and {infinite:,} infinite of {tensor.numel():,} "
        f"numbers.{more} The file is damaged, or the training that wrote it had diverged. Get it again, or use an "
        "earlier checkpoint."
    )


def _is_finite(tensor: Tensor) -> bool:
    """One pass that makes no second tensor: NaN and infinity stay in a sum. A sum may also overflow without them, so
    the numbers themselves are asked then."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def read_tensors(file: Path, *, wrong: type[SteepestError] = CheckpointError) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises `wrong` when it cannot be read or holds NaN or infinite numbers."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise wrong(f"{file} cannot be read, it is damaged or cut off ({error}). Copy it again.") from error
    check_finite(file, tensors.items(), wrong=wrong)
    return tensors


def _in_file(folder: Path, name: str) -> str:
    """` in <file>`: the .safetensors file of a folder that holds the weight, empty where none is found. A file may have
    the name without the prefix of the model, or with another one."""
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(file, "pt") as opened:
            if any(key == name or name.endswith(f".{key}") or key.endswith(f".{name}") for key in list(opened.keys())):
                return f" in {file.name}"
    return ""


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
