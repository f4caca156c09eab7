"""The critic: the backbone of a language model with a head that computes one number from each hidden state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from steepest.errors import ModelError, SteepestError
from steepest.models.causal_lm import check_length, hidden_width, prepare, run_backbone, save_folder
from steepest.models.file_weights import read_tensors
from steepest.models.flops import backbone_flops, head_flops
from steepest.models.packing import Packed
from steepest.models.passes import HeadValues, Values, ValuesFound
from steepest.models.varlen import Attention, attention_of

HEAD_FILE = "value_head.safetensors"
"""The file of the head, next to the backbone's files, if the family has no token-classification class."""
_HEAD_NAMES = ("score", "classifier")


class ValueModel(nn.Module):
    """Computes V(s) from the hidden state of the last token. The head starts at zero, so the first values are 0.

    `hf` is the family's ForTokenClassification model with one label, or its bare backbone where there is no such
    class; then the head is a module of our own. A folder written by `save` restores the head.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.attention = Attention()
        """The attention of `values`; the trainer sets the one of the device."""
        prepare(hf)
        self.own_head = None if find_head(hf) else nn.Linear(hidden_width(hf), 1)
        if self.own_head is not None:
            self.reset_head()

    @property
    def config(self) -> PretrainedConfig:
        return self.hf.config

    @property
    def score(self) -> nn.Linear:
        """The head, Linear(hidden, 1)."""
        head = self.own_head if self.own_head is not None else find_head(self.hf)
        assert head is not None
        return head

    def reset_head(self) -> None:
        """Set weight and bias of the head to zero."""
        nn.init.zeros_(self.score.weight)
        if self.score.bias is not None:
            nn.init.zeros_(self.score.bias)

    def forward(self, request: Values | HeadValues) -> ValuesFound:
        """The one entry of passes: values of packed sequences, or of states (see models/passes.py)."""
        if isinstance(request, HeadValues):
            return ValuesFound(self._head_values(request.hidden), None, self._head_flops(request.hidden))
        packed = request.packed
        context = attention_of(self.hf, self.attention).context(packed)
        hidden = run_backbone(self.hf.base_model, packed.input_ids, packed.position_ids, context)
        flops = backbone_flops(self.hf.base_model, len(packed.input_ids), context, backward=hidden.requires_grad)
        with_final, num_targets = request.with_final, len(packed.targets)
        index = torch.cat([packed.predict_index, packed.final_index]) if with_final else packed.predict_index
        states = hidden.index_select(0, index)
        values, flops = self._head_values(states), flops + self._head_flops(states)
        if not with_final:
            return ValuesFound(values, None, flops)
        return ValuesFound(values[:num_targets], values[num_targets:], flops)

    def values(self, packed: Packed, *, with_final: bool = False) -> tuple[Tensor, Tensor | None]:
        """(values (M,), final values (b,) or None): a pass by `Values`, without its other numbers."""
        found = self(Values(packed, with_final))
        return found.values, found.final

    def _head_values(self, hidden: Tensor) -> Tensor:
        """(n, hidden) last states -> (n,) f32 values."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.score.bias is None else self.score.bias.float()
            return F.linear(hidden.float(), self.score.weight.float(), bias)[:, 0]

    def _head_flops(self, hidden: Tensor) -> float:
        return head_flops(self.score.weight, hidden)

    def check_length(self, length: int) -> None:
        """Raises ModelError when the model cannot take sequences of `length` tokens as one causal context."""
        check_length(self.config, length)

    def save(self, folder: Path | str, tokenizer: Any) -> None:
        """Write a folder that AutoModelForTokenClassification loads with equal values, where the family has that."""
        save_folder(self.hf, folder, tokenizer)
        if self.own_head is not None:
            state = {name: tensor.detach().contiguous() for name, tensor in self.own_head.state_dict().items()}
            save_file(state, Path(folder) / HEAD_FILE)

    def saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What `save` writes, and what an optimizer may train, by name."""
        return self.named_parameters()

    def load_own_head(self, folder: Path) -> None:
        """Read HEAD_FILE of a folder that `save` wrote, if it is there."""
        if self.own_head is not None and (folder / HEAD_FILE).is_file():
            load_head(self.own_head, folder / HEAD_FILE, wrong=ModelError)


def load_head(head: nn.Module, file: Path, *, wrong: type[SteepestError]) -> None:
    """Read the weights of a value head. Raises `wrong` for a file that cannot be read, or that another head wrote."""
    tensors = read_tensors(file, wrong=wrong)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise wrong(f"{file} holds another kind of value head: {' '.join(str(error).split())}") from error


def find_head(hf: PreTrainedModel) -> nn.Linear | None:
    """The one-label head of a transformers classification model, if it is one."""
    for name in _HEAD_NAMES:
        head = getattr(hf, name, None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return head
    return None
