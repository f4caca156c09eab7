"""Generation by vLLM, in the trainer's process: one card, one CPU machine, or an NPU through the vllm-ascend plug-in.

vLLM starts with dummy weights and gets the policy's from a WeightSource, tensor by tensor. So all weights arrive in the
same way, without a file in between. After each update vLLM's weights are compared with the weights that were sent, bit
for bit, and, if the policy is in this process, by log-probs.
Only this file imports vLLM, and only inside functions; `_Weights` contains everything that differs between versions.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from transformers import PretrainedConfig

from steepest.devices.api import Device, device_of
from steepest.devices.memory import RESUMES, memory_guard
from steepest.errors import RolloutError, setting
from steepest.models.flops import key_value_numbers
from steepest.rollout import vllm_versions, weight_check
from steepest.rollout.api import ROLLOUT_ENGINES, Completion, GenerationRequest, SamplingParams, WeightSource
from steepest.rollout.requests import check_requests
from steepest.rollout.weights import Fingerprint, LocalWeights, ModelDescription, fingerprint

_ENGINE = setting("rollout_engine")
_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
_ENVIRONMENT = {
    _IN_PROCESS: "0",  # the engine runs in this process: weights reach it without a copy
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are this process's too
}
_LOWER = (
    f"Lower {setting('gpu_memory_utilization')}, {setting('max_num_seqs')} or {setting('max_response_length')}. "
    f"{RESUMES}"
)
_PROBE_PROMPT, _PROBE_TOKENS = 8, 8
"""Numbers of prompt and response tokens of the sequence that is scored after each update."""
_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.5}
"""Largest accepted mean difference of log-probs in that sequence, in nats. A wrong matrix gives 1 or more."""

_BLOCK = 128
"""Tokens of a KV block on the CPU; the last block of a sequence may be nearly empty."""


@dataclass(frozen=True)
class VLLMSettings:
    """Settings of the configuration for vLLM, in addition to those for all engines."""

    gpu_memory_utilization: float = 0.5
    """Share of a card's memory for weights and KV cache. On the CPU the KV cache gets kv_memory_bytes instead."""
    tensor_parallel_size: int = 1
    enforce_eager: bool = True
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    max_num_batched_tokens: int = 8192
    usual_rows: int | None = None
    """Responses of a training step: on the CPU the KV cache is made for so many, and more of them have to wait."""
    sleep_level: int | None = None
    """Level of vLLM's sleep mode between rollouts; None: no sleep."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that vLLM needs on this device; values that the user has set are kept."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """`engine_kwargs.vllm`: further arguments of `vllm.LLM`, passed on unchanged."""


class VLLMEngine:
    """Generates with vLLM from a copy of the policy's weights in `dtype`.

    `load_weights` must be called after every update, and before the first `generate`; otherwise `generate` raises
    RolloutError. `llm` is a `vllm.LLM`; `start_engine` makes both.
    """

    def __init__(
        self, llm: Any, description: ModelDescription, *, end_token_ids: Sequence[int], dtype: torch.dtype,
        max_model_len: int, sleep_level: int | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._llm, self._description, self._dtype = llm, description, dtype
        self._device = device_of(description.device)
        self._ends = sorted(set(end_token_ids))
        self._max_model_len = max_model_len
        self._sleep_level, self._asleep = sleep_level, False
        self._source: WeightSource | None = None
        """The source of the last load; None before the first load, after a failed one, and while the engine sleeps."""
        self._loaded: Fingerprint = []
        self._weights = _Weights(llm)
        self.version = 0
        self.copied_bytes = description.num_weights * dtype.itemsize
        self.notes = tuple(notes)
        """Sentences for the user, printed once at start."""

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Wake the weights, replace them by the source's, wake the KV cache, clear cached prefixes, and check the
        weights.

        Raises RolloutError if vLLM then holds other weights than the source sent.
        """
        self._source = None
        digest = weight_check.PolicyDigest(self._description, self._dtype, version)
        with self._told("taking over the policy's weights"):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._weights.replace(digest.passing(source.named_weights()), self._dtype)
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
        if self._llm.reset_prefix_cache() is False:
            raise RolloutError("vLLM kept cached prefixes of the old weights: reset_prefix_cache() was refused.")
        self.version, self._source, self._loaded = version, source, fingerprint(source)
        try:
            self._compare_bits(digest.found)
            if isinstance(source, LocalWeights):
                self._compare_log_probs(source)
        except RolloutError:
            self._source = None
            raise

    def sleep(self) -> None:
        """Free weights and KV cache until the next load_weights. Without a sleep level it does nothing."""
        if self._sleep_level is not None and not self._asleep:
            self._llm.sleep(level=self._sleep_level)
            self._asleep, self._source = True, None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """See RolloutEngine. A response's tokens depend on its seed, its number in the call, and the rounding of its
        batch."""
        check_requests(requests, self._max_model_len, engine="vllm")
        if self._source is None or self._loaded != fingerprint(self._source):
            raise RolloutError(
                f"vLLM holds version {self.version} of the policy's weights, which are others now (or it is asleep), "
                "so it would sample from old weights. Call load_weights() after every update and every sleep()."
            )
        if not requests:
            return []
        rows = [request for request in requests for _ in range(request.sampling.n)]
        outputs = self._ask(rows)
        if len(outputs) != len(rows):
            raise RolloutError(f"vLLM answered {len(outputs)} requests of {len(rows)}.")
        made = (_completion(output, row, self.version) for output, row in zip(outputs, rows, strict=True))
        return [list(islice(made, request.sampling.n)) for request in requests]

    def _ask(self, rows: list[GenerationRequest]) -> list[Any]:
        """vLLM's answers, one per row: a request of n samples becomes n requests to vLLM."""
        prompts = [{"prompt_token_ids": list(row.token_ids)} for row in rows]
        params = [self._params(row, number) for number, row in enumerate(rows)]
        with self._told(f"generating for {len(rows)} requests"):
            return self._llm.generate(prompts, params, use_tqdm=False)

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turn the errors that vLLM raises in the `with` block into RolloutErrors with our own text."""
        with memory_guard(self._device, lambda: (f"rollout by vLLM: {doing}", _LOWER)):
            try:
                yield
            except RolloutError:  # an error of the weight source
                raise
            except Exception as error:  # an error of any of vLLM's layers
                if self._device.is_out_of_memory(error):
                    raise
                raise RolloutError(
                    f"vLLM failed while {doing}: {_words(error)} If it cannot run this model, use {_ENGINE}=builtin."
                ) from error

    def _params(self, request: GenerationRequest, number: int) -> Any:
        """vLLM's parameters of one sample; `number` counts the samples of the call."""
        import vllm

        sampling = request.sampling
        return vllm.SamplingParams(
            max_tokens=min(sampling.max_tokens, self._max_model_len - len(request.token_ids)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=row_seed(sampling.seed, number),
            stop_token_ids=[] if sampling.ignore_eos else self._ends,
            ignore_eos=True,  # only the end tokens above end a response
            logprobs=0,  # only that of the sampled token
            detokenize=False,
        )

    def _compare_bits(self, policy: weight_check.Digest) -> None:
        version = self.version
        found = self._llm.apply_model(lambda model: weight_check.engine_digest(model, version))[0]
        wrong = weight_check.differences(policy, found)
        if wrong:
            raise RolloutError(
                f"after the update to version {version}, vLLM's weights differ from the policy's in: "
                f"{', '.join(wrong)}. It would sample from another model. This version of vLLM, or its class for "
                f"{self._description.architecture.__name__}, does not take weights as expected; tested are "
                f"{', '.join(vllm_versions.TESTED)}. Or use {_ENGINE}=builtin."
            )

    def _compare_log_probs(self, policy: LocalWeights) -> None:
        """Sample some tokens and score them with the policy. This finds differences in the computation with equal
        weights. It needs a policy in this process; after a load from a stream only the bits of the weights are
        compared."""
        generator = torch.Generator().manual_seed(self.version)
        length = max(1, min(_PROBE_PROMPT, self._max_model_len - 1))
        prompt = torch.randint(self._description.vocab_size, (length,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=_PROBE_TOKENS, seed=self.version, ignore_eos=True)
        [[answer]] = self.generate([GenerationRequest(prompt, sampling, "check of the weights")])
        half = self._dtype == torch.bfloat16 or not policy.computes_float32
        limit = _TOLERANCE[torch.bfloat16 if half else torch.float32]
        mine = policy.log_probs(prompt, answer.token_ids, half=half)
        difference = float((mine - torch.tensor(answer.log_probs)).abs().mean())
        if not difference <= limit:  # also refuses NaN
            raise RolloutError(
                f"after the update to version {self.version}, vLLM's log-probs differ from the policy's by "
                f"{difference:.3g} nats a token on average (at most {limit:g}), with equal "
                f"weights: it computes another model. Use {_ENGINE}=builtin, and please report it."
            )


class _Weights:
    """Replaces vLLM's weights by the policy's. Only this class knows how versions of vLLM differ."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def replace(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Send every tensor in `dtype`. A tied head is sent once, as the embedding, and is tied again afterwards.

        vLLM's own workers unpack, replace and pack weights again. The worker of a plug-in may not have that call; then
        the model's loader writes directly into its parameters, which works if no weight is packed.
        """
        if all(self._llm.collective_rpc(_has_reload)):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _cast(weights, dtype)})
        else:
            self._llm.apply_model(lambda held: held.load_weights(_cast(weights, dtype)))
        self._llm.apply_model(_finish_head)


def _has_reload(worker: Any) -> bool:
    return hasattr(worker, "reload_weights")


def _cast(weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor.detach().to(dtype)


@torch.no_grad()
def _finish_head(model: torch.nn.Module) -> None:
    """Copy the new embedding into a tied head. On the CPU vLLM keeps a packed copy of the head, which its own reload
    does not update, without an error (seen in 0.32.0 with Llama and Qwen2)."""
    embedding, head = weight_check.find_ends(model)
    config = getattr(model, "config", None)
    if head is not embedding and getattr(config, "tie_word_embeddings", False):
        head.weight = embedding.weight
    if getattr(config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def row_seed(seed: int, row: int) -> int:
    """Another seed for each row, because equal prompts with equal seeds would give equal answers."""
    return (seed * 6364136223846793005 + row * 1442695040888963407 + 1) % (2**63 - 1)


def _completion(output: Any, request: GenerationRequest, policy_version: int) -> Completion:
    """One answer of vLLM. Raises RolloutError if it belongs to another request or is incomplete."""
    name = request.request_id
    if output.prompt_token_ids is not None and list(output.prompt_token_ids) != list(request.token_ids):
        raise RolloutError(f"vLLM's answers are out of order: request {name} came back with another prompt.")
    answer = output.outputs[0]
    ids = list(answer.token_ids)
    log_probs = [entry[token].logprob for token, entry in zip(ids, answer.logprobs or [], strict=True)]
    if answer.finish_reason not in ("stop", "length", "abort"):
        raise RolloutError(f"vLLM ended the response to request {name} with {answer.finish_reason!r}.")
    if not all(math.isfinite(value) for value in log_probs):
        raise RolloutError(
            f"the policy gave NaN or infinite logits for request {name} in vLLM: its weights are damaged. Look at "
            f"actor/grad_norm before it, lower {setting('lr', 'actor')}, and resume from a checkpoint."
        )
    return Completion(ids, log_probs, answer.finish_reason, policy_version, name)


def start_engine(
    description: ModelDescription, *, end_token_ids: Sequence[int], pad_token_id: int,
    dtype: torch.dtype = torch.float32, max_num_seqs: int = 256, max_model_len: int, kv_memory_bytes: int | None = None,
    settings: VLLMSettings = VLLMSettings(),
) -> VLLMEngine:  # fmt: skip
    """Start vLLM for a model, without its weights.

    Raises RolloutError if vLLM is not installed or too old, and with vLLM's own message if it cannot start.

    `pad_token_id` is not used. `kv_memory_bytes` bounds the KV cache on the CPU, where vLLM has no card to measure.
    """
    description.check_length(max_model_len)
    device = description.device
    notes = [check_install(device_of(device))]
    options: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        "enable_chunked_prefill": settings.enable_chunked_prefill,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_sleep_mode": settings.sleep_level is not None,
    }
    if device.type == "cpu":
        rows = min(max_num_seqs, settings.usual_rows or max_num_seqs)
        options["kv_cache_memory_bytes"] = _cpu_kv_bytes(
            description.config, dtype, rows, max_model_len, kv_memory_bytes
        )
        notes.append("vLLM has no sleep mode on the CPU: its weights and KV cache stay in memory while models train.")
    llm = _start(description, {**options, **settings.extra}, settings.environment)
    _check_class(llm, description)
    return VLLMEngine(
        llm, description, end_token_ids=end_token_ids, dtype=dtype, max_model_len=max_model_len,
        sleep_level=settings.sleep_level, notes=notes,
    )  # fmt: skip


def check_install(device: Device) -> str:
    """A sentence about the installed version. It imports nothing, so that a run can call it before it loads a model.

    Raises RolloutError without vLLM, with one that is too old, with one that was built for another device (it would
    run, and generate there), and when the environment puts it into a process of its own.
    """
    found = vllm_versions.installed()
    if found is None:
        raise RolloutError(f"{_ENGINE}=vllm: vLLM is not installed; {device.vllm_install}, or use {_ENGINE}=builtin.")
    refusal = vllm_versions.refusal(found[1])
    if refusal is not None:
        raise RolloutError(f"{_ENGINE}=vllm: {refusal}, or use {_ENGINE}=builtin.")
    unfit = device.vllm_problem(*found)
    if unfit is not None:
        raise RolloutError(
            f"{_ENGINE}=vllm: {found[0]} {found[1]} cannot run on {device.name}: {unfit}, or use {_ENGINE}=builtin."
        )
    if os.environ.get(_IN_PROCESS, "0") != "0":
        raise RolloutError(
            f"{_IN_PROCESS}={os.environ[_IN_PROCESS]} in the environment: the engine runs in the trainer's process "
            "here. Unset it."
        )
    warning = vllm_versions.warning(found[1])
    return f"warning: {warning}." if warning else f"vLLM {found[1]} ({found[0]}), a tested version."


def _start(description: ModelDescription, options: dict[str, Any], environment: Mapping[str, str]) -> Any:
    """Make a `vllm.LLM` with dummy weights, and restore the settings of this process that vLLM changes."""
    for name, value in {**environment, **_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="steepest-vllm-") as folder, _restored_process(), catch_warnings():
        simplefilter("ignore", FutureWarning)  # vLLM's warnings about torch, which a user cannot fix
        config = copy.deepcopy(description.config)
        config.__dict__.pop("quantization_config", None)  # it describes the file; the weights here are plain
        config.architectures = [description.architecture.__name__]
        config.save_pretrained(folder)
        try:
            import vllm

            return vllm.LLM(
                model=folder, load_format="dummy", skip_tokenizer_init=True, seed=0,
                logprobs_mode="processed_logprobs", disable_log_stats=True, **options,
            )  # fmt: skip
        except Exception as error:  # every layer of vLLM raises its own types, and so do the packages it imports
            raise RolloutError(
                f"{_ENGINE}=vllm: vLLM could not start: {_words(error)} Look at `steepest doctor`, or use "
                f"{_ENGINE}=builtin."
            ) from error


def _check_class(llm: Any, description: ModelDescription) -> None:
    """Raise RolloutError if vLLM has no class for the model: it then uses transformers' class and changes that in
    place, so that the trainer's own model of that class can no longer run (seen in 0.32.0 with OLMo 2)."""
    if any(name.startswith("Transformers") for name in llm.apply_model(lambda held: type(held).__name__)):
        raise RolloutError(
            f"{_ENGINE}=vllm: this vLLM has no class of its own for {description.architecture.__name__}. "
            f"Use {_ENGINE}=builtin."
        )


def _cpu_kv_bytes(
    config: PretrainedConfig, dtype: torch.dtype, rows: int, max_model_len: int, limit: int | None
) -> int:  # fmt: skip
    """Bytes for `rows` sequences of max_model_len tokens, at most `limit`."""
    blocks = -(-max_model_len // _BLOCK) + 1
    wanted = key_value_numbers(config) * dtype.itemsize * rows * blocks * _BLOCK
    return wanted if limit is None else min(wanted, limit)


def _words(error: Exception) -> str:
    """The last informative line of an error (pydantic adds a line with its manual after it)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "For further information" not in line]
    text = lines[-1] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


@contextmanager
def _restored_process() -> Iterator[None]:
    """Restore torch.set_num_threads, which vLLM replaces on the CPU, and the number of threads, which it may set to
    1."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


ROLLOUT_ENGINES.register("vllm", settings=True, check=check_install)(start_engine)
