"""The first step's gradient, exactly: every answer enumerated, against autograd of the expected reward.

The toy has one response token, so the expectation over answers is a sum over the vocabulary. The actor's loss of a
batch that holds every token once, each weighted by its probability, must have the gradient of minus the objective

    J = mean over prompts of sum_v p(v | prompt) * (reward(v) - beta * (log p(v) - log q(v)))

through scoring, KL penalty, critic, GAE or GRPO, whitening and the clipped loss, none of which may bias it. The numbers
of J and of its gradient are stored, so that model, tokenizer, template or objective cannot move unnoticed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from steepest.core.advantages import gae, grpo
from steepest.core.batch import Batch
from steepest.core.kl import FixedKLController
from steepest.data.chat import encode_prompts
from steepest.data.prompts import load_prompts
from steepest.learner.actor import Actor
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import Reference
from steepest.models.load import end_token_ids, load_causal_lm, load_tokenizer, load_value_model
from steepest.models.tiny import init_weights
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.kl_rewards import KLShapedRewards, plain_rewards
from steepest.trainer.algorithm.old_log_probs import FromPass
from steepest.trainer.experience.response_text import ResponseText
from steepest.trainer.experience.scoring import Scorer, place_scores
from steepest.trainer.experience.single_turn import generate_batch
from tests.support.fake_parts import FakePool
from tests.support.learner_parts import CPU, VANILLA, record_gradients
from tests.support.rollout_requests import loaded
from tests.support.toy_run import make_toy

BETA = 0.1
PPO = Advantages(partial(gae, gamma=1.0, lam=1.0), whitened=True)
GRPO = Advantages(partial(grpo, norm_by_std=True), whitened=False)
DR_GRPO = Advantages(partial(grpo, norm_by_std=False), whitened=False)

# temperature -> expected reward, norm of its gradient, KL(policy, reference), norm of the gradient of J with beta 0.1
GOLDEN = {1.0: (0.0905259, 1.194877, 2.002065, 3.903453), 0.7: (0.0987775, 1.131602, 4.046474, 6.089020)}


def digit(request: RewardRequest) -> RewardResult:
    """The toy's reward."""
    return RewardResult(float(request.solution.strip() == request.ground_truth))


class Toy:
    """The toy's prompts, models and reward, and its exact objective by transformers alone."""

    def __init__(self, folder) -> None:
        self.paths = make_toy(folder, num_rows=10)
        self.tokenizer = load_tokenizer(self.paths["model"])
        rows = load_prompts(str(self.paths["data"]))
        self.prompts, _ = encode_prompts(
            rows, self.tokenizer, max_prompt_length=16, truncation="error", filter_overlong=False
        )
        self.scorer = Scorer(FakePool(digit), ResponseText(self.tokenizer))
        self.vocabulary = len(self.tokenizer)
        words = [self.tokenizer.decode([v]).strip() for v in range(self.vocabulary)]
        self.rewards = torch.tensor([[float(w == p.ground_truth) for w in words] for p in self.prompts])

    def reference(self, temperature: float) -> Reference:
        model = load_causal_lm(self.paths["model"])
        init_weights(model.hf, seed=1)
        return Reference(model, compute=CPU, temperature=temperature)

    def actor(self, temperature: float, rows: int) -> Actor:
        return Actor(
            load_causal_lm(self.paths["model"]),
            VANILLA,
            compute=CPU,
            optim=OptimSettings(lr=1e-3, clip_grad=None),
            update=UpdateSettings(mini_batch_rows=rows, micro=MicroBatches(rows=500)),
            temperature=temperature,
        )

    def critic(self) -> Critic:
        """Its head is not zero, so its values differ from prompt to prompt."""
        model = load_value_model(self.paths["model"])
        with torch.no_grad():
            model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel())[None])
        return Critic(model, compute=CPU, optim=OptimSettings(lr=1e-3), update=UpdateSettings(mini_batch_rows=1))

    def log_p(self, hf, temperature: float) -> Tensor:
        """(prompts, V) log-probabilities of the answer."""
        logits = [hf(input_ids=torch.tensor([list(p.token_ids)])).logits[0, -1] for p in self.prompts]
        return torch.log_softmax(torch.stack(logits) / temperature, -1)

    def objective(self, temperature: float, beta: float) -> tuple[float, float, dict[str, Tensor]]:
        """(expected reward, KL, gradient of J)."""
        policy, other = (AutoModelForCausalLM.from_pretrained(self.paths["model"]) for _ in range(2))
        init_weights(other, seed=1)
        log_p = self.log_p(policy, temperature)
        log_q = self.log_p(other, temperature).detach()
        reward = (log_p.exp() * self.rewards).sum(1).mean()
        kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        (reward - beta * kl).backward()
        return reward.item(), kl.item(), {f"hf.{name}": p.grad for name, p in policy.named_parameters()}

    def every_answer(self) -> Batch:
        """Each prompt with each token of the vocabulary: a group a prompt."""
        pairs = [(i, v) for i in range(len(self.prompts)) for v in range(self.vocabulary)]
        return Batch.from_sequences(
            [self.prompts[i].token_ids for i, _ in pairs],
            [[v] for _, v in pairs],
            group_ids=[i for i, _ in pairs],
            truncated=[False] * len(pairs),
            samples=[self.prompts[i] for i, _ in pairs],
        )


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


def norm(gradient: dict[str, Tensor]) -> float:
    return torch.stack([g.norm() for g in gradient.values()]).norm().item()


def distance(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """|found - want| / |want|."""
    assert found.keys() == want.keys()
    return norm({name: found[name] - want[name] for name in want}) / norm(want)


def prepare(toy: Toy, batch: Batch, actor: Actor, advantages: Advantages, beta: float) -> None:
    """The step's own way from responses to advantages."""
    place_scores(batch, toy.scorer.results(batch, toy.scorer.texts(batch)))
    FromPass(actor)(batch).write(batch)
    batch.ref_log_probs = toy.reference(actor.temperature).log_probs(batch)
    batch.values, batch.final_values = toy.critic().values(batch)
    (KLShapedRewards(FixedKLController(beta), "k1") if beta else plain_rewards)(batch)
    advantages(batch)


def update_gradient(actor: Actor, batch: Batch) -> dict[str, Tensor]:
    """The gradient of the objective that the update descends, with its sign turned."""
    gradients = record_gradients(actor)
    metrics = actor.update(batch, step=1)
    assert metrics["actor/ratio_max_dev_first"] < 1e-5
    return {name: -g for name, g in gradients[0].items()}


@pytest.mark.parametrize("temperature", GOLDEN)
def test_the_objective_and_its_gradient_are_the_stored_ones(toy, temperature):
    reward, kl, gradient = toy.objective(temperature, 0.0)
    _, _, with_kl = toy.objective(temperature, BETA)
    assert toy.rewards.sum(1).tolist() == [1.0] * 10  # each digit is one token
    assert (reward, norm(gradient), kl, norm(with_kl)) == pytest.approx(GOLDEN[temperature], rel=1e-4)


@pytest.mark.parametrize("temperature", GOLDEN)
@pytest.mark.parametrize(
    ("advantages", "beta"), [(PPO, 0.0), (PPO, BETA), (GRPO, 0.0), (DR_GRPO, 0.0), (DR_GRPO, BETA)],
    ids=["ppo", "ppo-kl", "grpo", "dr-grpo", "dr-grpo-kl"],
)  # fmt: skip
def test_the_first_updates_expected_gradient_is_that_of_the_objective(toy, temperature, advantages, beta):
    batch = toy.every_answer()
    actor = toy.actor(temperature, len(batch))
    prepare(toy, batch, actor, advantages, beta)
    # What the estimator divides by. A baseline needs no such correction: it must drop out by itself.
    scale = 1.0
    if advantages is PPO:
        scale = float((batch.returns - batch.values)[batch.response_mask].std())
    elif advantages is GRPO:
        scale = float(toy.rewards[0].std()) + 1e-6
    weight = batch.old_log_probs.exp() * toy.vocabulary  # token-mean divides by prompts * vocabulary
    batch.advantages = batch.advantages * weight * scale
    _, _, want = toy.objective(temperature, beta)
    assert distance(update_gradient(actor, batch), want) < 1e-4


def test_a_value_that_knows_the_answer_biases_the_gradient(toy):
    """The control, and trap 25: V read after the token instead of before it is no baseline any more."""
    batch = toy.every_answer()
    actor = toy.actor(1.0, len(batch))
    prepare(toy, batch, actor, PPO, 0.0)
    batch.values = batch.final_values[:, None]
    PPO(batch)
    scale = float((batch.returns - batch.values)[batch.response_mask].std())
    batch.advantages = batch.advantages * batch.old_log_probs.exp() * toy.vocabulary * scale
    assert distance(update_gradient(actor, batch), toy.objective(1.0, 0.0)[2]) > 0.5


@pytest.mark.parametrize(("advantages", "beta"), [(PPO, BETA), (DR_GRPO, 0.0)], ids=["ppo-kl", "dr-grpo"])
def test_sampled_answers_have_that_gradient_too(toy, advantages, beta):
    """Answers drawn by the engine, in proportion to their probability: no weights, all the rest as in a run."""
    temperature, n = 0.7, 500
    actor = toy.actor(temperature, 10 * n)
    ends = end_token_ids(toy.paths["model"], toy.tokenizer)
    engine = loaded(BuiltinEngine, actor.model, end_token_ids=ends, pad_token_id=0, max_model_len=32)
    sampling = SamplingParams(max_tokens=1, temperature=temperature, n=n, seed=3)
    batch = generate_batch(engine, toy.prompts, sampling, pad_id=0)
    prepare(toy, batch, actor, advantages, beta)
    scale = 1.0 if advantages is DR_GRPO else float((batch.returns - batch.values)[batch.response_mask].std())
    batch.advantages = batch.advantages * scale
    want = toy.objective(temperature, beta)[2]
    wrong = replace(batch, advantages=batch.advantages.roll(n, 0))  # the control: rewards of another prompt
    assert distance(update_gradient(actor, batch), want) < 0.25
    assert distance(update_gradient(toy.actor(temperature, 10 * n), wrong), want) > 0.8
