"""The description of the policy that an engine is built from, and the source of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from steepest.errors import RolloutError
from steepest.models.causal_lm import CausalLM, check_length
from steepest.models.hf_logging import quiet_transformers
from steepest.models.packing import pack_sequences
from steepest.models.rows import rows_reason, use_rows
from steepest.rollout.api import WeightSource

Fingerprint = list[tuple[int, int]]
"""It changes when torch writes into a weight or replaces its storage; empty if the weights cannot be watched."""


@dataclass(frozen=True)
class ModelDescription:
    """All facts about the policy, except its weights, that an engine is built from. It can be pickled."""

    config: PretrainedConfig
    architecture: type[PreTrainedModel]
    """The transformers class of the model."""
    dtype: torch.dtype
    """The dtype of the trained weights."""
    device: torch.device
    """The device on which the engine computes."""
    vocab_size: int
    """Number of rows of the output projection."""
    num_weights: int
    """Number of elements of all parameters."""
    embedding: str
    """Name of the embedding matrix in `WeightSource.named_weights`."""
    head: str | None
    """Name of the output projection in `named_weights`; None if it is tied to the embedding."""
    buffers: frozenset[str]
    """Names in `named_weights` that belong to buffers, not to parameters."""
    rows: str | None = None
    """Why the model runs in rows; None if it runs on packed sequences."""

    @classmethod
    def of(cls, model: CausalLM) -> ModelDescription:
        """The description of a model in this process, on the model's device."""
        first = next(model.parameters())
        names = {module: name.removesuffix(".base_layer") for name, module in model.hf.named_modules()}
        embedding, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
        tied = head.weight.data_ptr() == embedding.weight.data_ptr()
        return cls(
            config=model.config,
            architecture=type(model.hf),
            dtype=first.dtype,
            device=first.device,
            vocab_size=model.vocab_size,
            num_weights=sum(p.numel() for p in model.parameters()),
            embedding=f"{names[embedding]}.weight",
            head=None if tied else f"{names[head]}.weight",
            buffers=frozenset(name for name, _ in model.hf.named_buffers()),
            rows=rows_reason(model.hf),
        )

    def check_length(self, length: int) -> None:
        """Raises ModelError when the model cannot take sequences of `length` tokens as one causal context."""
        check_length(self.config, length)

    def build(self, source: WeightSource) -> CausalLM:
        """Build a model of this description with the weights of `source`, in `dtype` on `device`. It draws no random
        number. Raises RolloutError in the cases of `copy_weights`."""
        with torch.random.fork_rng([]), quiet_transformers():
            hf = self.architecture._from_config(copy.deepcopy(self.config), dtype=self.dtype)
        hf = hf.to(self.device).eval()
        copy_weights(source, hf)
        if self.rows is not None:
            use_rows(hf, self.rows)
        # The weights are not frozen: on a CPU a product with frozen weights may differ from the trainer's in the last
        # bits, even if no gradient is recorded. CausalLM is made last, because it compares its fused layers on these
        # weights.
        return CausalLM(hf)


class LocalWeights:
    """The weights of the policy in this process. Engines that compute with torch share its modules and copy nothing."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See WeightSource. These are the live tensors, or merged ones if the model has an adapter."""
        return self.model.named_weights()

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of all parameters as they are now. Writes through `.data` do not change it."""
        return [(p._version, p.data_ptr()) for p in self.model.hf.parameters()]

    @property
    def computes_float32(self) -> bool:
        """True if `log_probs` can compute in float32; a fused attention kernel supports half precision only."""
        return self.model.attention.kernel is None

    @torch.no_grad()
    def log_probs(self, prompt: Sequence[int], response: Sequence[int], *, half: bool) -> Tensor:
        """(T,) f32 log-probs of the T tokens of `response` at temperature 1, on the CPU; `half`: computed in bf16."""
        device = next(self.model.parameters()).device
        mask = [[False] * len(prompt) + [True] * len(response)]
        packed = pack_sequences([[*prompt, *response]], mask).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found, _ = self.model.log_probs(packed)
        return found.cpu()


def fingerprint(source: WeightSource) -> Fingerprint:
    """The fingerprint of the policy in this process; empty for any other source, whose updates cannot be watched."""
    return source.fingerprint() if isinstance(source, LocalWeights) else []


@torch.no_grad()
def copy_weights(source: WeightSource, hf: PreTrainedModel) -> None:
    """Write a stream of weights into a model, in place, in the model's dtype.

    Raises RolloutError for a name that the model does not have, for a wrong shape, and if weights are missing.
    """
    own = hf.state_dict()
    needed = {parameter.data_ptr(): name for name, parameter in hf.named_parameters()}
    for name, tensor in source.named_weights():
        if name not in own or own[name].shape != tensor.shape:
            here = f"has the shape {tuple(own[name].shape)}" if name in own else "does not exist"
            raise RolloutError(
                f"the weight source sent {name} of shape {tuple(tensor.shape)}, which {here} in "
                f"{type(hf).__name__}: source and engine describe different models."
            )
        own[name].copy_(tensor)
        needed.pop(own[name].data_ptr(), None)
    if needed:
        names = ", ".join(sorted(needed.values())[:5])
        raise RolloutError(f"the weight source ended without {len(needed)} of the model's weights: {names}.")


class EngineModel:
    """The model that an engine computes with.

    With `LocalWeights` it is the trainer's own model, and nothing is copied. With any other source it is built from the
    description at the first load, and each load copies the stream into it. It stays in memory while the engine sleeps.
    """

    def __init__(self, description: ModelDescription) -> None:
        self._description = description
        self._model: CausalLM | None = None
        self._source: WeightSource | None = None
        self._shared = False

    @property
    def shared(self) -> bool:
        """True if it is the trainer's own model."""
        return self._shared

    @property
    def own_bytes(self) -> int:
        """Size in bytes of a model that is not shared, else 0."""
        if self._model is None or self._shared:
            return 0
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def load(self, source: WeightSource) -> CausalLM:
        """Load the weights of `source` into the model. Raises RolloutError for a stream that does not fit the model,
        or any other source for an engine that shares the trainer's modules, since loading would overwrite the trainer's
        weights."""
        local = source.model if isinstance(source, LocalWeights) else None
        if self._model is None:
            self._model = self._description.build(source) if local is None else local
            self._shared = local is not None
        elif not self._shared:
            copy_weights(source, self._model.hf)
        elif local is not self._model:
            raise RolloutError(
                "the rollout engine computes with the modules of the model that it was first loaded from, so it takes "
                "weights from LocalWeights of that model only. Make a new engine for another source."
            )
        self._source = source
        return self._model

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the last source; see `fingerprint`."""
        return [] if self._source is None else fingerprint(self._source)
