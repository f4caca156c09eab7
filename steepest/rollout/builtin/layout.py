"""Reads the parts of a transformers model that our own decoder needs, for model families with Llama's layout.

The layout is read from the modules, not from the model's name: RMS norms before attention and before the MLP; query,
key, value and output projections with or without biases; optional norms of queries and keys; a rotation of whole heads
by halves; a gated MLP. Any other layout raises `UnknownLayout` with the reason. A model may have these parts but
compute differently with them (a multiplier, a cap); `choose_network.check` finds that, because it compares numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.models.attention import RecordingContext, Terms
from steepest.models.causal_lm import CausalLM, logit_transform
from steepest.models.fused.layers import inverse_rms

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_PROBES = 6


class UnknownLayout(Exception):
    """The model does not have Llama's layout; the text names the difference."""


@dataclass(frozen=True)
class Norm:
    """Computes x / rms(x) * (offset + weight), with the module's live weight."""

    module: nn.Module
    offset: float
    width: Tensor
    """(1,), the size of a row. Like `eps` it is a tensor: an operation with a Python number takes twice as long."""
    eps: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return (x * inverse_rms(x, self.width, self.eps)).mul_(weight + self.offset if self.offset else weight)


@dataclass(frozen=True)
class Matrix:
    """One linear layer of the model, plain or with an adapter around it, and the names of its weights."""

    module: nn.Module
    name: str
    weight_name: str
    """Its name in `CausalLM.named_weights`, which is another one if it is tied to the embedding."""

    @property
    def base(self) -> nn.Linear:
        linear: nn.Linear = getattr(self.module, "base_layer", self.module)  # type: ignore[arg-type]
        return linear


@dataclass(frozen=True)
class Layer:
    """One block of the decoder."""

    input_norm: Norm
    qkv: tuple[Matrix, Matrix, Matrix]
    head_norms: tuple[Norm, Norm] | None
    output: Matrix
    post_norm: Norm
    gate_up: tuple[Matrix, Matrix]
    activation: Callable[[Tensor], Tensor]
    down: Matrix
    scale: float
    """The factor of attention scores."""
    terms: Terms


@dataclass(frozen=True)
class Layout:
    """The whole model. H query heads, KV key heads, D numbers per head."""

    embedding: nn.Embedding
    embedding_scale: float
    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix
    logit_scale: float
    softcap: float | None
    shapes: dict[int, tuple[int, int, int]]
    """See RecordingContext.shapes."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos: Tensor
    """(positions, D), from the model's own rotary module."""
    sin: Tensor
    """(positions, D), with the first half of each row negated, so that a rotation is x * cos + roll(x, D / 2) * sin."""

    def matrices(self) -> Iterator[Matrix]:
        """Every linear layer, the head included."""
        for layer in self.layers:
            yield from (*layer.qkv, layer.output, *layer.gate_up, layer.down)
        yield self.head


def read_layout(model: CausalLM, max_length: int) -> Layout:
    """Read the layout, with rotary tables for `max_length` positions. Raises UnknownLayout."""
    try:
        return _read_layout(model, max_length)
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
        # Parts have the names that they have in Llama, but are of another kind.
        raise UnknownLayout(f"a part of it is of an unknown kind ({type(error).__name__}: {error})") from error


@torch.no_grad()
def _read_layout(model: CausalLM, max_length: int) -> Layout:
    backbone: Any = model.hf.base_model
    _only(backbone, _BACKBONE, "the model")
    names = {module: name for name, module in model.hf.named_modules()}
    if backbone.embed_tokens.__class__.__module__.startswith("peft"):
        raise UnknownLayout("its embedding has an adapter")
    scale, context = _probe(model)
    shapes = context.shapes
    head_dim = shapes[0][1]
    layers = tuple(_layer(module, names, context, index) for index, module in enumerate(backbone.layers))
    if any(shape != (shapes[0][0], head_dim, head_dim) for shape in shapes.values()):
        raise UnknownLayout("its heads differ in size")
    cos, sin = _rotary_tables(backbone, max_length, head_dim)
    head = _matrix(model.hf.get_output_embeddings(), names)
    if head.base.weight is backbone.embed_tokens.weight:
        head = Matrix(head.module, head.name, f"{names[backbone.embed_tokens]}.weight")
    logit_scale, softcap = logit_transform(model.config)
    return Layout(
        embedding=backbone.embed_tokens,
        embedding_scale=scale,
        layers=layers,
        norm=_norm(backbone.norm, "its last norm"),
        head=head,
        logit_scale=logit_scale,
        softcap=softcap,
        shapes=shapes,
        num_heads=layers[0].qkv[0].base.out_features // head_dim,
        num_kv_heads=shapes[0][0],
        head_dim=head_dim,
        cos=cos,
        sin=sin,
    )


def _layer(module: Any, names: dict[nn.Module, str], context: RecordingContext, index: int) -> Layer:
    _only(module, _LAYER, "a layer")
    attention, mlp, head_dim = module.self_attn, module.mlp, context.shapes[0][1]
    _only(attention, _ATTENTION, "attention", _HEAD_NORMS | {"rotary_emb"})
    _only(mlp, _MLP, "the MLP")
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = _norm(attention.q_norm, "its query norm"), _norm(attention.k_norm, "its key norm")
        if any(norm.module.weight.shape != (head_dim,) for norm in head_norms):
            raise UnknownLayout("its query and key norms span several heads")
    q, k, v, o = (_matrix(getattr(attention, f"{x}_proj"), names) for x in "qkvo")
    gate, up, down = (_matrix(getattr(mlp, f"{x}_proj"), names) for x in ("gate", "up", "down"))
    return Layer(
        input_norm=_norm(module.input_layernorm, "its norm before attention"),
        qkv=(q, k, v),
        head_norms=head_norms,
        output=o,
        post_norm=_norm(module.post_attention_layernorm, "its norm before the MLP"),
        gate_up=(gate, up),
        activation=mlp.act_fn,
        down=down,
        scale=context.scales[index],
        terms=context.terms[index],
    )


def _only(module: nn.Module, needed: set[str], what: str, allowed: set[str] | None = None) -> None:
    found = {name for name, _ in module.named_children()}
    if missing := sorted(needed - found):
        raise UnknownLayout(f"{what} has no {missing[0]}")
    if strange := sorted(found - needed - (allowed or set())):
        raise UnknownLayout(f"{what} has a {strange[0]}")
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        raise UnknownLayout(f"{what} has a weight {own[0]} of its own")


def _matrix(module: Any, names: dict[nn.Module, str]) -> Matrix:
    if type(getattr(module, "base_layer", module)) is not nn.Linear:
        raise UnknownLayout(f"{names[module]} is a {type(module).__name__}")
    return Matrix(module, names[module], f"{names[module]}.weight")


def _norm(module: Any, what: str) -> Norm:
    """Find out by a trial whether the norm multiplies by its weight or by 1 + weight."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or getattr(module, "bias", None) is not None or not isinstance(eps, float):
        raise UnknownLayout(f"{what} is a {type(module).__name__}")
    x = torch.linspace(-1.0, 2.0, len(weight), device=weight.device)
    want = module(x[None])[0].float()
    for offset in (0.0, 1.0):
        norm = Norm(module, offset, *torch.tensor([[len(weight)], [eps]], dtype=torch.float32, device=weight.device))
        if torch.allclose(norm(x), want, atol=1e-2 if weight.dtype != torch.float32 else 1e-5, equal_nan=True):
            return norm
    raise UnknownLayout(f"{what} is a {type(module).__name__}, which is not an RMS norm")


def _rotary_tables(backbone: Any, max_length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines from the model's own rotary module, so that they contain its scaling."""
    device = backbone.embed_tokens.weight.device
    positions = torch.arange(max_length, device=device)[None]
    try:
        cos, sin = backbone.rotary_emb(torch.zeros(1, device=device), positions)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UnknownLayout(f"its rotary module is of another kind ({error})") from error
    half = head_dim // 2
    if cos.shape != (1, max_length, head_dim) or not torch.equal(cos[..., :half], cos[..., half:]):
        raise UnknownLayout(f"its rotary table is {tuple(cos.shape)} for heads of {head_dim}")
    return cos[0].float(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1).float()


def _probe(model: CausalLM) -> tuple[float, RecordingContext]:
    """Run a few tokens through the model: (factor of the embeddings, what each layer gives to attention)."""
    backbone: Any = model.hf.base_model
    weight = backbone.embed_tokens.weight
    ids = torch.arange(_PROBES, device=weight.device) * (len(weight) // _PROBES)
    context = RecordingContext([_PROBES], weight.device)
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0])

    handle = backbone.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.hidden_states(ids, torch.arange(_PROBES, device=weight.device), context)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UnknownLayout("its first layer is not called once")
    rows, got = weight[ids].float(), seen[0].float()
    scale = float((rows * got).sum() / (rows * rows).sum())
    if not torch.allclose(got, rows * scale, rtol=1e-2 if weight.dtype != torch.float32 else 1e-5, equal_nan=True):
        raise UnknownLayout("more than a factor lies between its embedding and its first layer")
    return 1.0 if abs(scale - 1.0) < 1e-6 else scale, context
