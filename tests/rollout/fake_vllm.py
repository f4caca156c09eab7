"""A stand-in for vllm.LLM that computes with the transformers model and minds the order of calls.

It keeps weights of its own, fused and repacked as vLLM does, so that nothing of the policy's modules is shared. It
raises when weights are written while they sleep, when it generates while anything sleeps, and counts what was asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from steepest.models.causal_lm import CausalLM
from steepest.models.packing import pack_sequences


class OutOfOrder(Exception):
    """A call that a real card answers with a hardware exception or with wrong numbers."""


class Method:
    """As vLLM's methods of unquantised layers on the CPU: the matrix is packed away and the parameter left empty."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = layer.weight.detach().t().clone()
        if not self.keeps:
            layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return x @ layer.packed


class Linear(nn.Module):
    def __init__(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        super().__init__()
        weight = torch.cat(weights)
        self.input_size_per_partition = weight.shape[1]
        self.quant_method = Method(keeps=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if biases:
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.quant_method.process_weights_after_loading(self)


class Vocabulary(nn.Module):
    def __init__(self, weight: Tensor, padding: int = 3) -> None:
        super().__init__()
        self.org_vocab_size, self.embedding_dim = weight.shape
        self.num_embeddings_per_partition = self.org_vocab_size + padding
        self.input_size_per_partition = self.embedding_dim
        self.quant_method = Method(keeps=True)
        self.weight = nn.Parameter(torch.cat([weight, weight.new_zeros(padding, weight.shape[1])]), requires_grad=False)
        self.quant_method.process_weights_after_loading(self)


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def engine_model(weights: dict[str, Tensor], config: Any) -> nn.Module:
    """A vLLM-like module tree of these weights."""
    root = nn.Module()
    root.config = config

    def put(name: str, module: nn.Module) -> None:
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, module)

    modules = sorted({name.rpartition(".")[0] for name in weights})
    for name in modules:
        parent, _, last = name.rpartition(".")
        part_of = next((f for f, parts in FUSED.items() if last in parts), None)
        weight = weights[f"{name}.weight"]
        if last in ("embed_tokens", "lm_head"):
            put(name, Vocabulary(weight))
        elif weight.dim() == 1:
            norm = nn.Module()
            norm.weight = nn.Parameter(weight.clone(), requires_grad=False)
            put(name, norm)
        elif part_of is None:
            put(name, Linear([weight], [b for b in [weights.get(f"{name}.bias")] if b is not None]))
        elif last == FUSED[part_of][0]:
            parts = [f"{parent}.{p}" for p in FUSED[part_of]]
            biases = [weights[f"{p}.bias"] for p in parts if f"{p}.bias" in weights]
            put(f"{parent}.{part_of}", Linear([weights[f"{p}.weight"] for p in parts], biases))
    if "lm_head.weight" not in weights:
        put("lm_head", Vocabulary(weights["model.embed_tokens.weight"]))
    return root


class FakeLLM:
    """`vllm.LLM` as engines/vllm.py uses it. `keeps_old_head` behaves as vLLM 0.32 does with tied embeddings; without
    `takes_repairs` what is done to the head from outside is lost."""

    def __init__(
        self, policy: CausalLM, dtype: torch.dtype, *, keeps_old_head: bool = False, has_reload: bool = True,
        takes_repairs: bool = True,
    ) -> None:  # fmt: skip
        self.dtype, self.keeps_old_head, self.takes_repairs = dtype, keeps_old_head, takes_repairs
        self.worker = SimpleNamespace(reload_weights=None) if has_reload else SimpleNamespace()
        self.policy = CausalLM(copy.deepcopy(policy.hf)).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.zero_()
        self.calls: list[str] = []
        self.asleep: set[str] = set()
        self.cached_prefixes = False
        self.drop: str | None = None
        """A part of a name: tensors with it are lost on their way."""
        self.refuses_reset = False
        self.requests: list[Any] = []
        self._build(dict(self.policy.hf.state_dict()))

    def _build(self, weights: dict[str, Tensor]) -> None:
        tied = self.policy.config.tie_word_embeddings
        weights = {n: w.to(self.dtype) for n, w in weights.items() if not (tied and n == "lm_head.weight")}
        old = getattr(self, "model", None)
        self.model = engine_model(weights, self.policy.config)
        self.model.load_weights = self._load
        if old is not None and self.keeps_old_head and tied:
            self.model.lm_head = old.lm_head

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        self.asleep -= set(tags)

    def collective_rpc(self, method: str | Callable[..., Any], kwargs: dict[str, Any] | None = None) -> list[Any]:
        if callable(method):
            return [method(self.worker)]
        assert method == "reload_weights" and hasattr(self.worker, "reload_weights") and kwargs is not None
        self._load(kwargs["weights_iterator"])
        return [None]

    def _load(self, received: Iterable[tuple[str, Tensor]]) -> None:
        self.calls.append("load")
        if "weights" in self.asleep:
            raise OutOfOrder("weights were written while they slept")
        if "kv_cache" not in self.asleep and any(call.startswith("sleep") for call in self.calls):
            raise OutOfOrder("the KV cache woke before the weights were replaced")
        held = dict(self.policy.hf.state_dict())
        for name, tensor in received:
            assert tensor.dtype == self.dtype and not tensor.requires_grad
            if self.drop is None or self.drop not in name:
                held[name] = tensor.float().clone()
        self.policy.hf.load_state_dict(held)
        self.policy.hf.tie_weights()
        self._build(dict(self.policy.hf.state_dict()))

    def apply_model(self, function: Callable[[nn.Module], Any]) -> list[Any]:
        if self.takes_repairs:
            return [function(self.model)]
        head = copy.deepcopy(self.model.lm_head)
        found = [function(self.model)]
        self.model.lm_head = head
        return found

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        self.cached_prefixes = False
        return not self.refuses_reset

    def generate(self, requests: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        """Tokens are drawn uniformly; their log-probs come from the fake's own weights, head included."""
        self.calls.append("generate")
        if self.asleep:
            raise OutOfOrder(f"generated while {', '.join(sorted(self.asleep))} slept")
        self.requests = list(params)
        self.cached_prefixes = True
        return [self._answer(r["prompt_token_ids"], p) for r, p in zip(requests, params, strict=True)]

    def _answer(self, prompt: list[int], params: Any) -> Any:
        generator = torch.Generator().manual_seed(params.seed % 2**31)
        ids = torch.randint(self.policy.vocab_size, (params.max_tokens,), generator=generator).tolist()
        stop = next((i for i, token in enumerate(ids) if token in params.stop_token_ids), None)
        ids = ids if stop is None else ids[: stop + 1]
        head = self.model.lm_head.packed[:, : self.policy.vocab_size].t()
        twin = CausalLM(copy.deepcopy(self.policy.hf))
        twin.hf.config.tie_word_embeddings = False
        twin.hf.set_output_embeddings(nn.Linear(head.shape[1], head.shape[0], bias=False))
        twin.hf.get_output_embeddings().weight = nn.Parameter(head.float())
        packed = pack_sequences([[*prompt, *ids]], [[False] * len(prompt) + [True] * len(ids)])
        with torch.no_grad():
            values, _ = twin.log_probs(packed, temperature=params.temperature or 1.0)
        entries = [{i: SimpleNamespace(logprob=float(v))} for i, v in zip(ids, values, strict=True)]
        answer = SimpleNamespace(
            token_ids=ids, logprobs=entries, finish_reason="length" if stop is None else "stop"
        )  # fmt: skip
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])


class FakeParams(SimpleNamespace):
    """vllm.SamplingParams: whatever it was given."""
