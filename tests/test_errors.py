"""How messages name settings: bare without a job, by the keys of the job that runs, the innermost block first."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
from contextlib import nullcontext

import pytest

from steepest.config.key_names import PPO_KEYS, SFT_KEYS, model_keys
from steepest.console import say
from steepest.core.exact_kl import exact_kl
from steepest.core.kl import AdaptiveKLController
from steepest.data.sampler import PromptSampler
from steepest.devices import select_device
from steepest.errors import (
    ConfigError,
    DataError,
    DeviceMemoryError,
    ModelError,
    RolloutError,
    SteepestError,
    key_names,
    render,
    setting,
)
from steepest.learner.checkpoint import CheckpointStore
from steepest.learner.micro_batches import MicroBatches
from steepest.process.entry import describe
from steepest.registry import Registry
from steepest.rollout.builtin.scheduler import num_slots_for

NAMES = {"size": "part.size", "critic.rate": "critic.part.rate", "flag=true": "--flag"}


def message_of(call, names=None):
    """The message of a call that fails, in the job that has these names."""
    with pytest.raises(SteepestError) as caught, nullcontext() if names is None else key_names(names):
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "bare", "named"),
    [
        (f"Lower {setting('size')} (now 3).", "Lower size (now 3).", "Lower part.size (now 3)."),
        (f"{setting('size')}=3 or {setting('rate')}", "size=3 or rate", "part.size=3 or rate"),
        (setting("rate", "critic"), "rate", "critic.part.rate"),
        (setting("rate", "actor"), "rate", "rate"),
        (setting("size", "critic"), "size", "part.size"),
        (setting("size=3"), "size=3", "part.size=3"),
        (setting("flag=true"), "flag=true", "--flag"),
        (setting("flag=false"), "flag=false", "flag=false"),
        ("a size | part of nothing", "a size | part of nothing", "a size | part of nothing"),
    ],
)
def test_a_setting_is_printed_by_its_key_else_bare(text, bare, named):
    assert (render(text), render(text, NAMES)) == (bare, named)
    error = RolloutError(text)
    assert (str(error), f"{error}", repr(error)) == (bare, bare, f"RolloutError({bare!r})")
    error.bind(NAMES)
    assert str(error) == named


def test_the_innermost_block_names_a_setting_and_the_error_stays_the_same_object():
    error = ModelError(f"{setting('path')} and {setting('hub')} and {setting('revision')}")
    outer, inner = {"path": "outer.path", "hub": "outer.hub"}, {"path": "inner.path"}
    with pytest.raises(ModelError) as caught, key_names(outer), key_names(inner):
        raise error
    assert caught.value is error
    assert str(error) == "inner.path and outer.hub and revision"


def test_several_problems_are_named_each():
    error = ConfigError([f"{setting('size')}=0", "other"])
    assert (error.problems, str(error)) == (["size=0", "other"], "size=0\nother")
    error.bind(NAMES)
    assert (error.problems, str(error)) == (["part.size=0", "other"], "part.size=0\nother")
    assert describe(error) == "error: 2 problems:\n  1. part.size=0\n  2. other"


@pytest.mark.parametrize("error", [DataError(f"{setting('size')}=0"), ConfigError([f"{setting('size')}=0"])])
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_an_error_can_be_named_after_it_came_from_another_process(error, again):
    found = again(error)
    found.bind(NAMES)
    assert (type(found), str(found), str(error)) == (type(error), "part.size=0", "size=0")


def test_a_message_that_quotes_an_error_keeps_its_settings():
    with pytest.raises(ModelError) as caught, key_names(NAMES):
        try:
            raise ModelError(f"{setting('size')}=0")
        except ModelError as error:
            raise ModelError(f"here: {error.marked}") from error
    assert str(caught.value) == "here: part.size=0"
    assert isinstance(caught.value.__cause__, ModelError)


def test_other_exceptions_pass_through_and_the_names_end_with_the_block(capsys):
    with pytest.raises(KeyError), key_names(NAMES):
        raise KeyError("x")
    assert render(setting("size")) == "size"
    with key_names({**NAMES, "rate": "outer.rate"}), key_names({"rate": "inner.rate"}):
        say(f"{setting('size')} {setting('rate')} {setting('left')}")
    say(setting("size"))
    assert capsys.readouterr().out == "part.size inner.rate left\nsize\n"


def test_an_error_of_another_thread_is_named_where_it_is_raised_again():
    failed: list[SteepestError] = []

    def work():
        try:
            raise RolloutError(setting("size"))
        except RolloutError as error:
            failed.append(error)

    with pytest.raises(RolloutError, match="^part.size$"), key_names(NAMES):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        raise failed[0]


def test_it_is_a_decorator():
    @key_names(NAMES)
    def job():
        raise DeviceMemoryError(setting("size"))

    for _ in range(2):
        with pytest.raises(DeviceMemoryError, match="^part.size$"):
            job()


TABLE = Registry("rollout engine", setting("rollout_engine"))
CALLS = [
    (
        lambda: num_slots_for(8, 1, 1, 2**20, 1),
        "Raise gpu_memory_utilization, or lower max_response_length, max_prompt_length or max_model_len.",
        "Raise actor_rollout_ref.rollout.gpu_memory_utilization, or lower data.max_response_length, "
        "data.max_prompt_length or actor_rollout_ref.rollout.max_model_len.",
        None,
    ),
    (
        lambda: PromptSampler(3, 8),
        "train_batch_size=8 is more than the 3 training prompts: not one batch can be filled. Use train_batch_size=3 ",
        "data.train_batch_size=8 is more than the 3 training prompts: not one batch can be filled. Use "
        "data.train_batch_size=3 ",
        "data.train_batch_size=8 is more than the 3 training prompts: not one batch can be filled. Use "
        "data.train_batch_size=3 ",
    ),
    (
        lambda: AdaptiveKLController(0.1, 0.0, 10.0),
        "target_kl=0.0: must be greater than 0 with kl_ctrl.type=adaptive.",
        "algorithm.kl_ctrl.target_kl=0.0: must be greater than 0 with algorithm.kl_ctrl.type=adaptive.",
        None,
    ),
    (
        lambda: exact_kl((None, None, None), (None, None, None), temperature=0.0),
        "temperature=0.0: a KL",
        "actor_rollout_ref.rollout.temperature=0.0: a KL",
        None,
    ),
    (
        lambda: TABLE.get("vlm"),
        "rollout_engine='vlm': no such rollout engine.",
        "actor_rollout_ref.rollout.name='vlm': no such rollout engine.",
        None,
    ),
    (
        lambda: select_device("tpu"),
        "device='tpu': no such device.",
        "trainer.device='tpu': no such device.",
        "trainer.device='tpu': no such device.",
    ),
    (
        lambda: CheckpointStore.open("nowhere"),
        "or use resume_mode=auto for the newest",
        "or use trainer.resume_mode=auto for the newest",
        "or use trainer.resume_mode=auto for the newest",
    ),
    (
        lambda: CheckpointStore(tempfile.mkdtemp()).save(1, {}, {}, expected_bytes=2**60),
        "point default_local_dir at another disk, or keep fewer with max_ckpt_to_keep.",
        "point trainer.default_local_dir at another disk, or keep fewer with trainer.max_actor_ckpt_to_keep.",
        "point trainer.default_local_dir at another disk, or keep fewer with trainer.max_ckpt_to_keep.",
    ),
]


@pytest.mark.parametrize(("call", "bare", "ppo", "sft"), CALLS)
def test_a_lower_layer_speaks_of_settings_and_each_job_of_its_keys(call, bare, ppo, sft):
    for names, text in ((None, bare), (PPO_KEYS, ppo), (SFT_KEYS, sft)):
        if text is not None:
            assert text in message_of(call, names)


@pytest.mark.parametrize(
    ("micro", "bare", "ppo"),
    [
        (MicroBatches(rows=1), "micro_batch_rows", "micro_batch_rows"),
        (
            MicroBatches(tokens=1, purpose="critic.forward"),
            "micro_batch_tokens",
            "critic.forward_max_token_len_per_gpu",
        ),
        (
            MicroBatches(rows=1, tokens=None, purpose="actor.log_probs"),
            "micro_batch_rows",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
        ),
    ],
)
def test_micro_batches_are_named_by_their_purpose(micro, bare, ppo):
    assert (render(micro.setting), render(micro.setting, PPO_KEYS)) == (bare, ppo)


def test_a_model_of_another_section_is_named_as_that():
    text = f"{setting('lora_rank')} {setting('trust_remote_code=true')}"
    assert render(text, PPO_KEYS) == "actor_rollout_ref.model.lora_rank actor_rollout_ref.model.trust_remote_code=true"
    assert render(text, model_keys("critic.model")) == "critic.model.lora_rank critic.model.trust_remote_code=true"
    assert render(text, SFT_KEYS) == "model.lora_rank model.trust_remote_code=true"
    with pytest.raises(KeyError, match="no job has a section nothing.model"):
        model_keys("nothing.model")
