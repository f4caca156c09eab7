"""dtype=auto in a job, on a processor that claims to have bf16 instructions: a layer of the model is really timed."""

from __future__ import annotations

import re

import pytest

from steepest.config.load import load_config, load_sft_config
from steepest.data.prompts import Prompt
from steepest.data.sft import SFTExample
from steepest.devices.backends.cpu import CPUDevice
from steepest.trainer.jobs import ppo, sft
from tests.support.toy_run import make_toy, toy_overrides

LINE = r"(float32|bfloat16): a layer's micro-batch of {} tokens \S+ ms \((float32|bfloat16) \S+ ms\){}: a step takes "


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), num_rows=8)


@pytest.fixture
def device(tmp_path) -> CPUDevice:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("flags\t\t: avx2 amx_bf16\n")
    return CPUDevice(tmp_path)


def test_every_role_of_ppo_gets_the_dtype_that_the_line_names(toy, device, tmp_path):
    words = ("actor_rollout_ref.actor.fsdp_config.dtype=auto", "data.max_response_length=3", "data.train_batch_size=8",
             "actor_rollout_ref.actor.ppo_mini_batch_size=8")  # fmt: skip
    config = load_config(toy_overrides(toy, tmp_path / "run", *words))
    prompts = [Prompt(str(i), [], "toy", "1", token_ids=(1,) * 7) for i in range(8)]
    config, said = ppo.settle_compute(config, ppo.Data(prompts, prompts), device, toy["model"])
    # 8 rows of 7 + 3 tokens
    found = re.match(LINE.format(80, r", its token step of 8 row\(s\) \S+ ms \(\S+ \S+ ms\)"), said or "")
    assert found is not None and found[1] != found[2], said
    roles = config.actor_rollout_ref
    assert {roles.actor.fsdp_config.dtype, roles.rollout.dtype, config.critic.fsdp.dtype} == {found[1]}


def test_so_does_supervised_training(toy, device, tmp_path):
    words = [f"data.train_files={toy['data']}", f"model.path={toy['model']}", "data.train_batch_size=4"]
    config = load_sft_config([*words, f"trainer.default_local_dir={tmp_path / 'run'}"])
    examples = [SFTExample("x", (1,) * 12, (False,) * 6 + (True,) * 6)] * 8
    config, said = sft.settle_compute(config, device, toy["model"], examples)
    found = re.match(LINE.format(48, ""), said or "")
    assert found is not None and config.engine.dtype == found[1], said
