"""Policy and critic with an adapter: the frozen base, their own or a shared one, and the parts that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from steepest.errors import CheckpointError, setting
from steepest.models import lora
from steepest.models.causal_lm import CausalLM, hidden_width
from steepest.models.lora import LoraSettings
from steepest.models.value_head import HEAD_FILE, ValueModel, load_head

ACTOR, CRITIC = "actor", "critic"
"""Names of the two adapters that one base can have."""


class LoraCausalLM(CausalLM):
    """A policy whose base is frozen and whose adapter is trained. With a new adapter its output is the base's, bit for
    bit.

    `save` writes a folder with the adapter alone. `adapter`: such a folder from which it is loaded.
    """

    has_adapter = True

    def __init__(self, hf: PreTrainedModel, settings: LoraSettings, *, adapter: Path | None = None) -> None:
        super().__init__(hf)
        self.settings = settings
        lora.add_adapter(hf, ACTOR, settings)
        if adapter is not None:
            lora.load_adapter(hf, ACTOR, settings, adapter)

    def saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the adapter."""
        return lora.adapter_parameters(self.hf, ACTOR)

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The plain model's weights with the adapter merged, one at a time; see `CausalLM.named_weights`."""
        return lora.merged_weights(self.hf, ACTOR, dtype)

    def computes_as(self, other: CausalLM, *, in_bf16: bool = False) -> bool:
        """True while the adapter adds nothing. `other` is this model itself: with its adapter off it is the
        reference."""
        assert other is self
        return not any(bool(p.any()) for name, p in lora.adapter_parameters(self.hf, ACTOR) if ".lora_B." in name)

    def copy_as(self, dtype: torch.dtype) -> CausalLM:
        """A frozen, merged copy without adapters."""
        return CausalLM(lora.plain_copy(self.hf, ACTOR, dtype))

    def save(self, folder: Path | str, tokenizer: Any) -> None:
        """Write the adapter as peft does, and the tokenizer."""
        lora.save_adapter(self.hf, ACTOR, self.settings, Path(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def base_alone(self) -> AbstractContextManager[None]:
        """Switch the adapter off in the `with` block: the model then is the policy that training began with."""
        return lora.adapter(self.hf, None, afterwards=ACTOR)


class DeepHead(nn.Module):
    """Maps hidden -> hidden -> one number, which is zero at the start. It is used where the hidden states are not
    trained for the values. On the quickstart's states a linear head explained less than the mean does (see
    docs/lora.md)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, 1)."""
        found: Tensor = self.out(F.silu(self.inner(hidden)))
        return found


class FrozenValueModel(ValueModel):
    """A critic on a frozen base, with its own adapter (`settings`) and a linear value head, or with a deep head alone.

    The base is the actor's (pass its `hf`) or the critic's own. Only adapter and head are trained and saved.
    """

    def __init__(self, hf: PreTrainedModel, settings: LoraSettings | None) -> None:
        super().__init__(hf)
        self.settings = settings
        self.shares_base = lora.has_adapter(hf, ACTOR)
        """True if the base is the actor's. Then the actor's adapter is on, except within `switched`."""
        self.deep_head: DeepHead | None = None
        if settings is not None:
            lora.add_adapter(hf, CRITIC, settings)
        else:
            self.own_head, self.deep_head = None, DeepHead(hidden_width(hf))
        if self.shares_base:
            lora.switch_adapter(hf, ACTOR)
        self.head.requires_grad_(True)

    @property
    def head(self) -> nn.Module:
        """The module that computes values from hidden states."""
        return self.score if self.deep_head is None else self.deep_head

    def _head_values(self, hidden: Tensor) -> Tensor:
        """See ValueModel."""
        if self.deep_head is None:
            return super()._head_values(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            found: Tensor = self.deep_head(hidden.float())[:, 0]
            return found

    def _head_flops(self, hidden: Tensor) -> float:
        """See ValueModel. A deep head is not counted: nothing next to the base that its states come from."""
        return super()._head_flops(hidden) if self.deep_head is None else 0.0

    def switched(self) -> AbstractContextManager[None]:
        """Switch to this critic's adapter in the `with` block, or to the base alone if it has none."""
        if not self.shares_base:
            return nullcontext()
        return lora.adapter(self.hf, None if self.settings is None else CRITIC, afterwards=ACTOR)

    def saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the adapter, if there is one, and of the head."""
        if self.settings is not None:
            yield from lora.adapter_parameters(self.hf, CRITIC)
        for name, parameter in self.head.named_parameters():
            yield f"value_head.{name}", parameter

    def save(self, folder: Path | str, tokenizer: Any) -> None:
        """Write the adapter as peft does, and the head into the same folder."""
        if self.settings is not None:
            lora.save_adapter(self.hf, CRITIC, self.settings, Path(folder))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(state, Path(folder) / HEAD_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises CheckpointError for a folder of another kind of critic."""
        if self.settings is not None:
            lora.load_adapter(self.hf, CRITIC, self.settings, folder)
        elif (folder / lora.CONFIG_FILE).is_file() or not (folder / HEAD_FILE).is_file():
            raise CheckpointError(
                f"{folder} holds no value head on a frozen base: it was written with another {setting('share_base')} "
                f"or {setting('lora_rank')}. Go on with those, or begin a new run "
                f"(another {setting('experiment_name')})."
            )
        load_head(self.head, folder / HEAD_FILE, wrong=CheckpointError)
