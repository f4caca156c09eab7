from __future__ import annotations

import pytest
import torch

from steepest.data.sft import SFTExample
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.optim import OptimSettings
from steepest.learner.supervised import Supervised, plan_examples
from tests.support.learner_parts import CPU, policy, record_gradients


def make(lr=1e-3, micro=None):
    return Supervised(policy(), compute=CPU, optim=OptimSettings(lr=lr), micro=micro)


def example(token_ids, loss_mask):
    return SFTExample("rows:0", tuple(token_ids), tuple(loss_mask))


EXAMPLES = [
    example([1, 2, 3, 4, 5], [False, False, True, True, True]),
    example([7, 8], [True, True]),  # the first flag has no effect
    example([9, 3, 3], [True, False, False]),  # nothing to learn
    example([4, 4, 5, 6, 7, 8, 9], [False, False, True, False, False, True, True]),
]


def by_hand():
    hf = policy().hf
    hf.set_attn_implementation("eager")
    total, count = torch.zeros(()), 0
    for row in EXAMPLES:
        logp = hf(input_ids=torch.tensor([list(row.token_ids)])).logits[0].log_softmax(-1)
        for t in range(1, len(row.token_ids)):
            if row.loss_mask[t]:
                total = total - logp[t - 1, row.token_ids[t]]
                count += 1
    (total / count).backward()
    return (total / count).item(), count, {f"hf.{name}": p.grad for name, p in hf.named_parameters()}


@pytest.mark.parametrize("micro", [MicroBatches(rows=1), MicroBatches(rows=2), MicroBatches(tokens=9), None])
def test_loss_and_gradient_are_the_formula_whatever_the_micro_batches(micro):
    loss, count, want = by_hand()
    supervised = make(micro=micro)
    gradients = record_gradients(supervised)
    metrics = supervised.update(EXAMPLES)
    assert metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["train/num_target_tokens"] == count == 7
    assert max((g - want[name]).abs().max().item() for name, g in gradients[0].items()) < 1e-6
    assert metrics["train/lr"] == 1e-3 and metrics["train/skipped_steps"] == 0.0


def test_evaluation_is_the_loss_before_the_step_and_leaves_no_gradient():
    supervised = make()
    found = supervised.evaluate(EXAMPLES)
    assert found == {"val/loss": pytest.approx(by_hand()[0], abs=1e-5)}
    assert all(p.grad is None for p in supervised.model.parameters())


def test_it_learns():
    supervised = make(lr=1e-2)
    first = supervised.evaluate(EXAMPLES)["val/loss"]
    for _ in range(30):
        supervised.update(EXAMPLES)
    assert supervised.evaluate(EXAMPLES)["val/loss"] < 0.2 * first


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ValueError, match="none of the 1 sequences marks a token"):
        make().update([EXAMPLES[2]])


def test_an_example_without_a_marked_token_is_in_no_pass():
    """A mark on the first token marks nothing: no token comes before it."""
    examples = [SFTExample(f"rows:{i}", [1, 2], mask) for i, mask in enumerate(([False, True], [True, False]))]
    assert plan_examples(examples, MicroBatches(rows=1)) == (((0,),),)
    assert plan_examples(examples, MicroBatches(rows=1), ranks=2) == (((0,),), ((),))
