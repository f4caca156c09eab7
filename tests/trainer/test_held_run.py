"""Runs whose model is a file of bf16 numbers: what is frozen is held in bf16, and no number of the run changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from steepest.assembly.description import Description, sizes
from steepest.assembly.engine import build_engine
from steepest.assembly.roles import Roles, build_models
from steepest.cluster.local import LocalCluster
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.data.sampler import PromptSampler
from steepest.devices.backends.cpu import CPUDevice
from steepest.learner.checkpoint import FROM_NOTHING
from steepest.models.load import load_tokenizer
from steepest.process.stopping import Stop
from steepest.rollout.weights import ModelDescription
from steepest.trainer import build_step
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.response_text import ResponseText
from steepest.trainer.experience.scoring import Scorer
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.jobs.ppo import encode_rows, load_rows, run_ppo
from steepest.trainer.run.inputs import Inputs
from tests.support.fake_parts import FakePool
from tests.support.toy_run import make_toy, toy_overrides
from tests.trainer.test_golden import digit

RUN = (
    "trainer.total_training_steps=3",
    "trainer.save_freq=3",
    "data.train_batch_size=32",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_ctrl.kl_coef=0.1",
)
LORA = "actor_rollout_ref.model.lora_rank=4"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    file = toy["model"] / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return toy


def widen(hf: nn.Module) -> None:
    """Hold every matrix in float32 again, as a program would that holds none in bf16."""
    for module in hf.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16:
            module.weight.data = module.weight.data.float()
            vars(module).pop("forward", None)


def train(toy, *words: str, held: bool) -> tuple[list[dict[str, float]], dict[str, bytes], Description]:
    """(metrics of three steps, weights that they trained, description of the roles)."""
    config, device = load_config(toy_overrides(toy, toy["model"].parent / "run", *RUN, *words)), CPUDevice()
    tokenizer, folders = load_tokenizer(toy["model"]), {"actor": toy["model"], "critic": toy["model"]}
    data = encode_rows(config, load_rows(config), tokenizer, Inputs()).train
    plan, position = make_plan(config, len(data)), PromptPosition()
    torch.manual_seed(0)
    models = build_models(config, plan, FROM_NOTHING, folders, device)
    for model in (models.actor, models.critic, models.reference):
        if not held:
            widen(model.model.hf)
    engine = build_engine(config, ModelDescription.of(models.actor.model), tokenizer, toy["model"], device)
    roles = Roles(models.actor, models.critic, models.reference, engine)
    engine.load_weights(roles.weights, 0)
    cluster = LocalCluster(roles, device, frees_engine=False)
    sampler = PromptSampler(len(data), config.data.train_batch_size, seed=1)
    sampling, scorer = build_step.train_sampling(config), Scorer(FakePool(digit), ResponseText(tokenizer))
    rollouts = StepRollouts(cluster, data, sampler, sampling, tokenizer.pad_token_id)
    collect = build_step.build_collector(config, plan, cluster, rollouts, scorer, position, device=device)
    controller = build_step.build_controller(config)
    learn = build_step.build_learn(config, plan, cluster, controller, device=device, limit=1.0)
    step = build_step.build_step(collect, learn, position, (), Stop())
    numbers = [{k: v for k, v in step(n).items() if not k.startswith("perf/")} for n in (1, 2, 3)]
    trained = {"actor": roles.actor, "critic": roles.critic}
    tensors = {
        f"{role}/{name}": tensor.detach().numpy().tobytes()
        for role, part in trained.items()
        for name, tensor in part.model.saved_parameters()
    }
    return numbers, tensors, cluster.describe()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=full"),
        (LORA, "critic.share_base=adapter"),
        (LORA, "critic.share_base=head"),
        (LORA, "critic.model.lora_rank=2"),
    ],
    ids=["whole", "exact KL", "adapter", "head", "own adapter"],
)
def test_a_run_is_the_same_to_the_last_bit(toy, words):
    *found, description = train(toy, *words, held=True)
    assert any(size.halved for size in description.sizes.values())
    *want, description = train(toy, *words, held=False)
    assert not any(size.halved for size in description.sizes.values())
    assert found == want
    assert len(want[1]) > 20 and any(row.get("actor/reward_kl_penalty", 0) for row in want[0])
    assert want[0][0]["actor/grad_norm"] > 0 and want[0][2]["critic/grad_norm"] > 0


def test_the_job_says_what_it_holds_in_bf16(toy, tmp_path, capsys):
    run_ppo(load_config(toy_overrides(toy, tmp_path / "run", *RUN, "trainer.total_training_steps=1")))
    assert "float32 over float32 weights, frozen ones in bfloat16" in capsys.readouterr().out
    rows = make_toy(tmp_path / "toy")  # whose numbers are float32
    run_ppo(load_config(toy_overrides(rows, tmp_path / "other", *RUN, "trainer.total_training_steps=1")))
    assert "frozen ones in bfloat16" not in capsys.readouterr().out


def test_it_takes_less_memory(toy, tmp_path):
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    for words in ((), (LORA, "critic.share_base=head")):
        config = load_config(toy_overrides(toy, tmp_path, *RUN, *words))
        plan = make_plan(config, 256)
        models = build_models(config, plan, FROM_NOTHING, {"actor": toy["model"], "critic": toy["model"]}, CPUDevice())
        found = sizes(models)["actor" if words else "reference"]
        weights = (found.parameters - found.trained) * 4 + found.trained * 16
        assert found.halved and found.bytes == weights - 2 * matrices
        assert torch.bfloat16 in {p.dtype for p in models.actor.model.parameters()} or not words
