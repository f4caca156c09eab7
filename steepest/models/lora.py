"""LoRA adapters inside a transformers model: peft's layers, put in place, switched, merged, saved and read.

The model keeps its class; peft's layer is put around each linear layer that has an adapter. One frozen base can have
several adapters, each with its own name. At most one of them is switched on.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steepest.errors import CheckpointError, ModelError, setting
from steepest.models.causal_lm import hidden_width
from steepest.models.file_weights import read_tensors
from steepest.models.flops import forget
from steepest.models.fused.lora import fuse
from steepest.models.working_weights import in_dtype
from steepest.registry import nearest

ALL_LINEAR = "all-linear"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""peft's file names: `PeftModel.from_pretrained(base, folder)` reads both files."""
BASE_FILE = "base_model.json"
"""Our own file in the same folder: a `BaseModel`."""
_PREFIX = "base_model.model."
"""The prefix of a weight's name in peft's file."""
_PARTS = ("lora_A", "lora_B")
_MAMBA_FAMILIES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_IN_MAMBA = {"out_proj", "conv1d"}
"""peft raises ValueError for these layers of these families, because their fast kernels read the weights."""
_FUSED_EXPERTS = ("gate_up_proj", "down_proj")
_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class BaseModel:
    """The model under an adapter, as the run's configuration names it."""

    path: str
    hub: str = "huggingface"
    revision: str | None = None
    override_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraSettings:
    """An adapter: W + alpha / rank * B @ A for the chosen matrices, with B zero at the start."""

    rank: int
    alpha: int = 16
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linear layers (`q_proj`, or `self_attn.q_proj`), or `all-linear`: all linear layers of the backbone."""
    exclude_modules: tuple[str, ...] = ()
    """Names of linear layers among them that get no adapter."""
    base: BaseModel = field(default_factory=lambda: BaseModel(""))
    """The base model, written next to the adapter, which is useless without it."""


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds an adapter and no model."""
    folder = Path(folder)
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def add_adapter(hf: PreTrainedModel, name: str, settings: LoraSettings) -> None:
    """Put a fresh adapter into the model and switch it on. The base is frozen, the adapter fp32 and trainable.

    Until it is trained, the model's output is the base's, bit for bit. Raises ModelError for names that no layer has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=_targets(hf, settings),
        exclude_modules=list(settings.exclude_modules) or None,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in _linear_layers(hf)),
    )
    hf.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
        inject_adapter_in_model(config, hf, name)
    forget(hf.base_model)
    for _, layer in _adapted(hf, name):
        for part in _PARTS:
            weight = getattr(layer, part)[name].weight
            weight.data = weight.data.to(torch.float32)
        fuse(layer)
    switch_adapter(hf, name)


def has_adapter(hf: nn.Module, name: str) -> bool:
    """Whether an adapter of this name has been added."""
    return next(_adapted(hf, name), None) is not None


def switch_adapter(hf: nn.Module, name: str | None) -> None:
    """Switch to this adapter, or to none. It does not change which parameters are trained."""
    for _, layer in _adapted(hf):
        if name is not None:
            layer.set_adapter(name)
        layer.enable_adapters(name is not None)
        for part in _PARTS:
            getattr(layer, part).requires_grad_(True)  # peft switches it off for adapters that are off


@contextmanager
def adapter(hf: nn.Module, name: str | None, *, afterwards: str) -> Iterator[None]:
    """Use this adapter (None: the base alone) in the `with` block; afterwards `afterwards` is on."""
    switch_adapter(hf, name)
    try:
        yield
    finally:
        switch_adapter(hf, afterwards)


def adapter_parameters(hf: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(`model.layers.0.self_attn.q_proj.lora_A.weight`, parameter) of one adapter."""
    for module, layer in _adapted(hf, name):
        for part in _PARTS:
            yield f"{module}.{part}.weight", getattr(layer, part)[name].weight


@torch.no_grad()
def merged_weights(hf: nn.Module, name: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under its name in the plain model, with the adapter merged. Layers with an adapter yield
    copies, one at a time. A matrix that is stored in bf16 is merged in fp32. `dtype` is that of
    `CausalLM.named_weights`."""
    layers = {module: layer for module, layer in _adapted(hf)}
    seen: set[int] = set()
    for key, tensor in hf.state_dict(keep_vars=True).items():
        module, _, rest = key.partition(".base_layer.")
        if tensor.data_ptr() in seen or any(f".{part}." in key for part in _PARTS):
            continue
        seen.add(tensor.data_ptr())
        if not rest:
            yield key, in_dtype(tensor, dtype)
        elif rest == "weight" and name in layers[module].lora_A:
            yield f"{module}.weight", tensor.float() + layers[module].get_delta_weight(name)
        else:
            yield f"{module}.{rest}", in_dtype(tensor, dtype)


@torch.no_grad()
def plain_copy(hf: PreTrainedModel, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy of the model without peft's layers, with this adapter merged, in its own memory."""
    # deepcopy takes what it finds in this memo. The weights are written below, so their old numbers are not copied.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False) for p in hf.parameters()
    }
    plain = copy.deepcopy(hf, memo)
    for module, layer in list(_adapted(plain)):
        parent, _, last = module.rpartition(".")
        setattr(plain.get_submodule(parent), last, layer.base_layer)
    plain.__dict__.pop("peft_config", None)
    own = plain.state_dict()
    for key, tensor in merged_weights(hf, name):
        own[key].copy_(tensor)
    return plain


# -- files --------------------------------------------------------------------------------------------------


def save_adapter(hf: Any, name: str, settings: LoraSettings, folder: Path) -> None:
    """Write the files that `PeftModel.from_pretrained` reads: settings with the base's path, and the adapter's
    weights."""
    config = copy.deepcopy(hf.peft_config[name])
    config.base_model_name_or_path, config.revision = settings.base.path, settings.base.revision
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {f"{_PREFIX}{key}": p.detach().cpu().contiguous() for key, p in adapter_parameters(hf, name)}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / BASE_FILE).write_text(json.dumps(asdict(settings.base), indent=1) + "\n", encoding="utf-8")


def base_of(folder: Path) -> BaseModel:
    """The base of an adapter, written by us or by another program. Raises ModelError if the files do not name it."""
    try:
        if (folder / BASE_FILE).is_file():
            return BaseModel(**json.loads((folder / BASE_FILE).read_text(encoding="utf-8")))
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return BaseModel(config["base_model_name_or_path"], revision=config.get("revision"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{folder}: {CONFIG_FILE} does not say which model the adapter belongs to ({error!r})."
        ) from error


@torch.no_grad()
def load_adapter(hf: nn.Module, name: str, settings: LoraSettings, folder: Path) -> None:
    """Read the weights that `save_adapter` wrote into an adapter of the same settings.

    Raises CheckpointError if there is no adapter, or one with another rank, alpha or other layers.
    """
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no LoRA adapter: it was written with {setting('lora_rank')}=0. Go on with that, or "
            f"begin a new run (another {setting('experiment_name')})."
        )
    saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for key, now, then in (
        (setting("lora_rank"), settings.rank, saved["r"]),
        (setting("lora_alpha"), settings.alpha, saved["lora_alpha"]),
    ):
        if now != then:
            raise CheckpointError(
                f"{key}={now}: the adapter in {folder} has {then}. Go on with that, or begin a new "
                f"run (another {setting('experiment_name')})."
            )
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in read_tensors(folder / WEIGHTS_FILE).items()}
    own = dict(adapter_parameters(hf, name))
    if strange := sorted(set(own) ^ set(tensors)):
        raise CheckpointError(
            f"{setting('target_modules')} and exclude_modules choose other layers than the adapter in {folder} "
            f"has, for example {strange[0].rpartition('.lora_')[0]}. Give those that it was made with."
        )
    for key, parameter in own.items():
        if tensors[key].shape != parameter.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {key} is {list(tensors[key].shape)}, and {list(parameter.shape)} on this "
                f"base model: the adapter was made for another one. Set {setting('path')} to that."
            )
        parameter.copy_(tensors[key])


# -- inside -------------------------------------------------------------------------------------------------


def _adapted(hf: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """(module name, peft layer) for every layer with an adapter, or for the layers of this adapter."""
    for key, module in hf.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer") and (name is None or name in module.lora_A):
            yield key, module


def _linear_layers(hf: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The backbone's linear layers, without the head; a layer with an adapter has its plain name."""
    for key, module in hf.base_model.named_modules():
        if ".lora_" not in f".{key}" and isinstance(module, (nn.Linear, Conv1D)):
            yield key.removesuffix(".base_layer"), module


def _targets(hf: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Names of layers for peft. Raises ModelError for a name that no layer has, for one of a layer that cannot have an
    adapter, and if no layer is left."""
    layers = [key for key, _ in _linear_layers(hf)]
    barred = _without_adapter(hf)
    short = sorted({key.rpartition(".")[2] for key in layers})
    usable = [name for name in short if name not in barred]
    names = _unmistakable(hf, usable) if settings.target_modules == (ALL_LINEAR,) else list(settings.target_modules)
    for option, asked in (
        (setting("target_modules"), names),
        (setting("exclude_modules"), settings.exclude_modules),
    ):
        for name in asked:
            if not any(_is_named(key, name) for key in layers):
                guess = nearest(name, usable)
                hint = f" Did you mean {guess}?" if guess else ""
                raise ModelError(
                    f"{option}={name}: {type(hf).__name__} has no linear layer of that name in its "
                    f"backbone.{hint} There are: {', '.join(usable)}."
                )
    for name in names:
        if (why := barred.get(name.rpartition(".")[2])) is not None:
            raise ModelError(
                f"{setting('target_modules')}={name}: in {type(hf).__name__} this layer cannot have an adapter: {why}. "
                f"There are: {', '.join(usable)}."
            )
    if not [key for key in layers if _in(key, names) and not _in(key, settings.exclude_modules)]:
        raise ModelError(
            f"{setting('exclude_modules')}={','.join(settings.exclude_modules)} leaves no layer of "
            f"target_modules={','.join(settings.target_modules)}: nothing would be trained."
        )
    return sorted(names)


def _unmistakable(hf: PreTrainedModel, short: Sequence[str]) -> list[str]:
    """Last names of layers for peft, or whole names where another kind of module has that last name too: in CTRL, `0`
    is both a linear layer and the first block."""
    linear = {key for key, _ in _linear_layers(hf)}
    names: list[str] = []
    for name in short:
        others = [key for key, _ in hf.base_model.named_modules() if _is_named(key, name) and key not in linear]
        names += [key for key in sorted(linear) if _is_named(key, name)] if others else [name]
    return names


def _without_adapter(hf: PreTrainedModel) -> dict[str, str]:
    """Last names of linear layers that cannot have an adapter -> the reason."""
    layers = {key: module for key, module in _linear_layers(hf)}
    ran: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.add(name)

    handles = [module.register_forward_hook(note(key.rpartition(".")[2])) for key, module in layers.items()]
    try:
        hidden_width(hf)
    finally:
        for handle in handles:
            handle.remove()
    names = {key.rpartition(".")[2] for key in layers}
    barred = {name: "the model's code reads its weight and does not call it" for name in names - ran}
    for key, module in layers.items():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            barred[key.rpartition(".")[2]] = f"{type(module).__name__} computes something else than a product"
    if hf.config.model_type in _MAMBA_FAMILIES:
        barred.update({name: "peft refuses it in Mamba models" for name in names & _NOT_IN_MAMBA})
    if any(p.dim() == 3 and key.endswith(_FUSED_EXPERTS) for key, p in hf.named_parameters()):
        # peft takes these names for parts of the fused experts and puts adapters on all of those.
        barred.update({name: "peft takes the name for the experts, which are one tensor" for name in names & _EXPERTS})
    return barred


def _is_named(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _in(key: str, names: Sequence[str]) -> bool:
    return any(_is_named(key, name) for name in names)
