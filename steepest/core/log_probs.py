"""Log-probs and entropies of tokens, computed from hidden states in chunks: the (M, V) logits are never held at once.

M tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steepest.core.products import is_half, product, product_in_float32, returns_sums
from steepest.errors import ConfigError, setting

CHUNK_LOGITS = 2**24
"""Number of logits held at a time by default: 16M, 64 MiB in fp32. In half precision twice as many."""
_EXACT_IN_A_ROW = 8192
"""Up to this vocabulary size torch's own kernel on a CPU has no bias above 2e-7."""
_BLOCK = 2**20
"""Number of logits that `_log_softmax_in_blocks` takes at a time."""


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    half: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The log-prob of each target, and the entropy of the distribution that it was sampled from.

        z = logit_scale * (hidden @ weight.T + bias)
        z = softcap * tanh(z / softcap)                     when softcap is set
        s = z / temperature
        log_prob = s[target] - logsumexp(s)                 entropy = logsumexp(s) - sum(softmax(s) * s)

    hidden (M, H), weight (V, H), bias (V,) or None, targets (M,) int64. Returns (log_probs, entropies), both (M,) f32;
    entropies is None without `with_entropy`. Both are differentiable once with respect to hidden, weight and bias.

    Tokens are taken `chunk_tokens` at a time, by default as many as make 64 MiB of logits; the backward computes each
    chunk's logits again, except those of the last one, which is still there (in fp32 without a soft cap). The matrix
    products run in hidden's dtype, under autocast in autocast's; logits are fp32, or in half precision where a device
    returns the products so; all sums and the weight gradient are fp32, and gradients arrive in the dtype of their
    parameter. `half` casts the weight for a product in bf16: a caller may have it in bf16 already.

    Raises ConfigError for a temperature that is not positive, ValueError for shapes that do not fit.
    """
    if temperature <= 0:
        raise ConfigError(
            f"{setting('temperature')}={temperature}: log-probs need a temperature above 0. "
            "Greedy decoding has those of temperature 1."
        )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_log_probs: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit (M, H), (V, H) and (M,)"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rounds = is_half(dtype) and not returns_sums(hidden.device, dtype)
    head = _Head(
        matmul_dtype=dtype,
        scale=float(logit_scale),
        softcap=softcap,
        inverse_temperature=1.0 / temperature,
        chunk_tokens=chunk_tokens or max(1, CHUNK_LOGITS * (2 if rounds else 1) // weight.shape[0]),
        with_entropy=with_entropy,
        half=half,
    )
    function = _HalfTokenLogProbs if rounds else _TokenLogProbs
    log_probs, entropies = function.apply(hidden, weight, bias, targets, head)
    return log_probs, entropies


@dataclass(frozen=True)
class _Head:
    """Computes log-probs from hidden states, in the same way for every chunk, forward and backward."""

    matmul_dtype: torch.dtype
    scale: float
    softcap: float | None
    inverse_temperature: float
    chunk_tokens: int
    with_entropy: bool
    half: Callable[[Tensor], Tensor] | None = None
    """Casts a weight to bf16; None: as torch does."""

    def low(self, weight: Tensor) -> Tensor:
        """The weight in the dtype of the products."""
        if self.half is None or self.matmul_dtype != torch.bfloat16:
            return weight.to(self.matmul_dtype)
        return self.half(weight)

    def slices(self, num_tokens: int) -> list[slice]:
        """Slices of nearly equal size; a short last slice would need one more matrix product."""
        num_chunks = -(-num_tokens // self.chunk_tokens)
        bounds = [i * num_tokens // num_chunks for i in range(num_chunks + 1)] if num_chunks else []
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def buffer(self, slices: list[slice], weight: Tensor) -> Tensor | None:
        """Memory that all chunks use for their logits: on a CPU new memory costs as much time as the computation. None
        where the matrix product returns its fp32 sums in a new tensor."""
        if weight.dtype != torch.float32:
            return None
        rows = max((part.stop - part.start for part in slices), default=0)
        return torch.empty(rows, weight.shape[0], dtype=torch.float32, device=weight.device)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
        """(m, V) f32, temperature applied, in `buffer` if there is one. hidden and weight come in the dtype of the
        product."""
        if buffer is None:
            return self.scaled(product_in_float32(hidden, weight.T), bias)
        return self.scaled(torch.mm(hidden, weight.T, out=buffer[: len(hidden)]), bias)

    def scaled(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of products z (m, V) f32, in place."""
        if bias is not None:
            z += bias
        if self.softcap is None:
            factor = self.scale * self.inverse_temperature
            return z if factor == 1.0 else z.mul_(factor)
        return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap * self.inverse_temperature)

    def log_softmax(self, scaled: Tensor, entropies: Tensor | None = None) -> Tensor:
        """(m, V) f32. `entropies` (m,) gets the entropy of each row.

        On a CPU `scaled` is overwritten if `through_logits` does not need it. On other devices it is kept: new memory
        costs nothing there, and the kernel may not support writing over its input.
        """
        on_cpu = scaled.device.type == "cpu"
        own = scaled if self.softcap is None or not on_cpu else scaled.clone()
        if on_cpu:
            return _log_softmax_in_blocks(own, entropies)
        log_p = torch.log_softmax(own, dim=1)
        if entropies is not None:
            entropies.copy_(log_p.exp().mul_(log_p).sum(1).neg_())
        return log_p

    def through_logits(self, grad: Tensor, scaled: Tensor) -> Tensor:
        """Chain rule from the scaled logits back to the product; `grad` and `scaled` are overwritten."""
        if self.softcap is not None:
            # scaled = cap / T * tanh(u), and tanh' = 1 - tanh^2
            tanh = scaled.div_(self.softcap * self.inverse_temperature)
            grad.mul_(tanh.square_().neg_().add_(1.0))
        factor = self.scale * self.inverse_temperature
        return grad if factor == 1.0 else grad.mul_(factor)


def log_softmax(logits: Tensor) -> Tensor:
    """(m, V) f32 -> its log-softmax over V, without the bias of torch's kernel for the CPU (see below)."""
    if logits.device.type != "cpu" or logits.shape[1] <= _EXACT_IN_A_ROW:
        return torch.log_softmax(logits, dim=1)
    return _log_softmax_in_blocks(logits.clone(), None)


def _log_softmax_in_blocks(logits: Tensor, entropies: Tensor | None) -> Tensor:
    """(m, V) f32 on a CPU -> its log-softmax over V, in place, and the entropy of each row.

    torch's kernel for the CPU adds the V exponentials up one after the other and so loses small ones: each log-prob is
    too high by 2e-6 at 50,000 tokens and by 3e-5 at 262,144. A matrix product does the same to an entropy. `sum` adds
    in pairs, within 1e-7. The rows are taken in blocks that stay in the cache. The largest logit is subtracted first:
    s - logsumexp(s) would round at the size of the logits, which made gradients of the entropy twenty times less exact.
    """
    if logits.shape[1] <= _EXACT_IN_A_ROW and entropies is None:
        in_place: Tensor = torch.ops.aten._log_softmax.out(logits, 1, False, out=logits)
        return in_place
    rows = max(1, _BLOCK // logits.shape[1])
    spare = torch.empty(min(rows, len(logits)), logits.shape[1])
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        mass, total = spare[: len(block)], None
        if logits.shape[1] <= _EXACT_IN_A_ROW:
            torch.ops.aten._log_softmax.out(block, 1, False, out=block)
        else:
            total = torch.exp(block.sub_(block.amax(1, keepdim=True)), out=mass).sum(1, keepdim=True)
            block.sub_(total.log())
        if entropies is not None:
            mass = torch.exp(block, out=mass) if total is None else mass.div_(total)
            torch.sum(mass.mul_(block), 1, out=entropies[start : start + rows])
    if entropies is not None:
        entropies.neg_()
    return logits


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        log_probs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(log_probs) if head.with_entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            low_hidden, low_weight = hidden.to(head.matmul_dtype), head.low(weight)
            bias32 = None if bias is None else bias.float()
            slices = head.slices(hidden.shape[0])
            buffer = head.buffer(slices, low_weight)
            for rows in slices:
                scaled = head.logits(low_hidden[rows], low_weight, bias32, buffer)
                log_p = head.log_softmax(scaled, None if entropies is None else entropies[rows])
                log_probs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        ctx.head = head
        # The backward pass needs memory for one chunk, so the last chunk is kept and not computed again.
        keeps = slices and head.softcap is None and any(ctx.needs_input_grad)
        ctx.kept = (buffer, log_p) if keeps else None
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        head: _Head = ctx.head
        if grad_log_probs is None:
            grad_log_probs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_weight, grad_bias = _room(ctx.needs_input_grad, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            low_hidden, low_weight = hidden.to(head.matmul_dtype), head.low(weight)
            bias32 = None if bias is None else bias.float()
            slices = head.slices(hidden.shape[0])[::-1]
            kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass computes it again
            buffer, log_p = kept or (head.buffer(slices, low_weight), None)
            for rows in slices:
                scaled = log_p if log_p is not None else head.logits(low_hidden[rows], low_weight, bias32, buffer)
                if log_p is None:
                    log_p = head.log_softmax(scaled)
                grad = _grad_of_scaled(
                    log_p,
                    targets[rows],
                    grad_log_probs[rows],
                    None if grad_entropies is None else grad_entropies[rows],
                    None if entropies is None else entropies[rows],
                )
                grad = head.through_logits(grad, scaled)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(head.matmul_dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = product_in_float32(grad, low_weight)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, low_hidden[rows], first=rows is slices[0])
                log_p = None
            if grad_weight is not None and not slices:
                grad_weight.zero_()
        return grad_hidden, _in_dtype_of(weight, grad_weight), _in_dtype_of(bias, grad_bias), None, None


class _HalfTokenLogProbs(torch.autograd.Function):
    """The same where a product in half precision rounds its sums, as on a CPU. Logits and their gradients are held in
    that dtype; what is computed from them is fp32, a block at a time that stays in the cache. Saved: the arguments, the
    logsumexp of each token, and the logits of the last chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, sums = torch.empty(2, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(log_probs) if head.with_entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            work = _HalfLogits(hidden, weight, bias, head)
            slices = head.slices(hidden.shape[0])
            for rows in slices:
                for place, scaled in work.blocks(work.products(rows), rows):
                    part = None if entropies is None else entropies[place]
                    log_probs[place], sums[place] = _logsumexp(scaled, targets[place], part, work.spare)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, sums)
        ctx.head, ctx.kept = head, work if slices and any(ctx.needs_input_grad) else None
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, entropies, sums = ctx.saved_tensors
        head: _Head = ctx.head
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(sums)
        grad_hidden, grad_weight, grad_bias = _room(ctx.needs_input_grad, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            work, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass computes it again
            z = None if work is None else work.z
            work = work or _HalfLogits(hidden, weight, bias, head)
            slices = head.slices(hidden.shape[0])[::-1]
            for rows in slices:
                z = work.products(rows) if z is None else z
                for place, scaled in work.blocks(z, rows):
                    own = scaled if head.softcap is None else scaled.clone()
                    of_entropy = (
                        (None, None)
                        if grad_entropies is None or entropies is None
                        else (grad_entropies[place], entropies[place])
                    )
                    grad = _grad_of_scaled(
                        own.sub_(sums[place, None]), targets[place], grad_log_probs[place], *of_entropy
                    )
                    grad = head.through_logits(grad, scaled)
                    if grad_bias is not None:
                        grad_bias += grad.sum(0)
                    z[place.start - rows.start : place.stop - rows.start] = grad
                if grad_hidden is not None:
                    grad_hidden[rows] = z @ work.weight
                if grad_weight is not None:
                    _add_product(grad_weight, z.T, work.hidden[rows], first=rows is slices[0])
                z = None
            if grad_weight is not None and not slices:
                grad_weight.zero_()
        return grad_hidden, _in_dtype_of(weight, grad_weight), _in_dtype_of(bias, grad_bias), None, None


class _HalfLogits:
    """Products in half precision, and the logits of a block of them in fp32, in memory that chunks and blocks share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head) -> None:
        self.head = head
        self.hidden, self.weight = hidden.to(head.matmul_dtype), head.low(weight)
        self.bias = None if bias is None else bias.float()
        vocabulary = weight.shape[0]
        rows = max((part.stop - part.start for part in head.slices(len(hidden))), default=0)
        self.step = max(1, min(rows, _BLOCK // vocabulary))
        self._buffer = self.weight.new_empty(rows, vocabulary)
        self._scaled = torch.empty(self.step, vocabulary, dtype=torch.float32, device=weight.device)
        self.spare = torch.empty_like(self._scaled)
        self.z: Tensor | None = None
        """The products of the last rows."""

    def products(self, rows: slice) -> Tensor:
        """(m, V), without the bias."""
        self.z = torch.mm(self.hidden[rows], self.weight.T, out=self._buffer[: rows.stop - rows.start])
        return self.z

    def blocks(self, z: Tensor, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """(the tokens of a block, their scaled logits in fp32)."""
        for start in range(0, len(z), self.step):
            part = z[start : start + self.step]
            scaled = self.head.scaled(self._scaled[: len(part)].copy_(part), self.bias)
            yield slice(rows.start + start, rows.start + start + len(part)), scaled


def _logsumexp(scaled: Tensor, targets: Tensor, entropies: Tensor | None, spare: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob of the target, logsumexp), both (m,), of the logits (m, V) f32, which are overwritten. `entropies` (m,)
    gets the entropy of each row, computed in `spare`."""
    top = scaled.amax(1, keepdim=True)
    of_target = scaled.sub_(top).gather(1, targets[:, None])[:, 0]
    mass = scaled.exp_() if entropies is None else torch.exp(scaled, out=spare[: len(scaled)])
    total = mass.sum(1)
    log_total = total.log()
    if entropies is not None:
        entropies.copy_(log_total - mass.mul_(scaled).sum(1).div_(total))
    return of_target - log_total, log_total + top[:, 0]


def _room(
    wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory for the gradients that are wanted: those of weight (not filled) and bias (zeros) are summed in fp32."""
    return (
        torch.empty_like(hidden) if wanted[0] else None,
        torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None,
        torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if wanted[2] and bias is not None else None,
    )


def _in_dtype_of(parameter: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


def _grad_of_scaled(
    log_p: Tensor,
    targets: Tensor,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    entropies: Tensor | None,
) -> Tensor:
    """(m, V) gradient with respect to the scaled logits s, with p = softmax(s) and H the entropy.

    d log_prob / ds_j = [j is the target] - p_j          d H / ds_j = -p_j * (log p_j + H)

    log_p is overwritten.
    """
    if grad_entropies is None or entropies is None:
        grad = log_p.exp_().mul_(-grad_log_probs[:, None])
    else:
        weight = (log_p + entropies[:, None]).mul_(grad_entropies[:, None]).add_(grad_log_probs[:, None])
        grad = log_p.exp_().mul_(weight).neg_()
    return grad.scatter_add_(1, targets[:, None], grad_log_probs[:, None])


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, in fp32; `first` overwrites what is there."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(product(a, b))
    else:
        total += product(a, b)
