"""The long tail of generation: the time that stopping early and resuming could save, and that drafts save.

    python -m bench.long_tail --model DIR --data DIR                 about 20 minutes on a core with SmolLM2-135M
    python -m bench.long_tail --model DIR --data DIR --parts drafts --draft-rows 32
    python -m bench.long_tail --tiny                                 shows that it runs

tail: responses to their natural end. Each decoding step is timed, and the cost of a step is fitted as a + b rows + c
rows * position. `a` is the cost of a step without any row. A batch that is always full, which partial responses make
possible, pays it less often, and no scheme saves more. Over-sampling is then simulated with this cost and the lengths
seen: f times the rows start, a step ends when as many as the batch needs have ended, and the others resume in the next
step, after a pass over their tokens. It is compared with a batch that starts as many rows and waits for all.

drafts: generate; change the policy by some updates (policy gradient on those responses with random advantages, AdamW at
--lr); generate again, plainly, with racing noise, and with the first responses as drafts, in alternation. The prototype
is in bench/drafts.py.

All times are processor seconds of one thread: they hardly change when the machine has other work.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import limits
from bench.compare import markdown, write_results
from bench.drafts import DraftEngine, Drafts, parting
from bench.inputs import Inputs, guarded_main, inputs_of, parser
from bench.measure import BenchError
from bench.workload import prompt_ids
from steepest.models.attention import PackedContext
from steepest.models.causal_lm import CausalLM
from steepest.models.load import end_token_ids, load_causal_lm, load_tokenizer
from steepest.rollout.api import Completion, GenerationRequest, SamplingParams
from steepest.rollout.builtin.generation import Generation
from steepest.rollout.weights import LocalWeights, ModelDescription

Answers = list[list[Completion]]


@dataclass
class Steps:
    """Records decoding steps: active rows, their mean position, processor seconds."""

    seen: list[tuple[int, float, float]] = field(default_factory=list)

    def watch(self) -> None:
        """Time every decoding step of the builtin engine from now on."""
        decode = Generation._decode

        def timed(run: Generation) -> None:
            rows, position = run._n, float(run._position[: run._n].float().mean())
            start = time.process_time()
            decode(run)
            self.seen.append((rows, position, time.process_time() - start))

        Generation._decode = timed  # type: ignore[method-assign]

    def fit(self) -> tuple[float, float, float]:
        """Seconds a step, a row, and a row and position."""
        rows, position, seconds = torch.tensor(self.seen, dtype=torch.float64).T
        terms = torch.stack([torch.ones_like(rows), rows, rows * position], 1)
        return tuple(torch.linalg.lstsq(terms, seconds[:, None]).solution[:, 0].tolist())


@dataclass(frozen=True)
class Cost:
    """The fitted cost of a decoding step, and the seconds per prefilled token."""

    step: float
    row: float
    place: float
    prefill: float


class Bench:
    """A model, its prompts, an engine."""

    def __init__(self, inputs: Inputs, most_rows: int, max_tokens: int) -> None:
        self.model: CausalLM = load_causal_lm(inputs.model).eval()
        tokenizer = load_tokenizer(inputs.model)
        self.prompts = [prompt_ids(tokenizer, row["question"]) for row in inputs.questions(most_rows)]
        self.engine = DraftEngine(
            ModelDescription.of(self.model),
            end_token_ids=end_token_ids(inputs.model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            dtype=getattr(torch, inputs.dtype),
            max_num_seqs=most_rows,
            max_model_len=max(map(len, self.prompts)) + max_tokens,
        )
        self.engine.load_weights(LocalWeights(self.model), 0)
        self.sampling = SamplingParams(max_tokens)
        self.requests = [GenerationRequest(ids, self.sampling, str(place)) for place, ids in enumerate(self.prompts)]

    def generate(self, rows: int, drafts: Drafts | None = None) -> tuple[Answers, float]:
        """Answers to the first prompts, and processor seconds."""
        start = time.process_time()
        if drafts is None:
            answers = self.engine.generate(self.requests[:rows])
        else:
            answers = self.engine.generate_from(self.requests[:rows], list(range(rows)), drafts)
        return answers, time.process_time() - start


def tail(bench: Bench, rows: int, steps: Steps) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The most that a full batch could save, and the simulated savings for some factors of over-sampling."""
    steps.seen.clear()
    answers, seconds = bench.generate(rows)
    lengths = [len(group[0].token_ids) for group in answers]
    decoding = sum(s for _, _, s in steps.seen)
    stats = bench.engine.stats
    cost = Cost(*steps.fit(), (seconds - decoding) / stats.prefill_tokens)
    spared = cost.step * (len(steps.seen) - sum(n for n, _, _ in steps.seen) / rows)
    first = {
        "rows": rows,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "median": statistics.median(lengths),
        "at the limit": lengths.count(bench.sampling.max_tokens) / rows,
        "rows active, mean share": sum(n for n, _, _ in steps.seen) / rows / len(steps.seen),
        "time below half of them": sum(s for n, _, s in steps.seen if n < rows / 2) / seconds,
        "ms a step": 1e3 * cost.step,
        "ms a row": 1e3 * cost.row,
        "us a row and 100 places": 1e8 * cost.place,
        "ms a prefilled token": 1e3 * cost.prefill,
        "most that can be saved": spared / seconds,
    }
    mean_prompt = round(statistics.mean(len(p) for p in bench.prompts[:rows]))
    played = []
    for factor in (1.125, 1.25, 1.5, 2.0):
        a_token, off_policy = play(cost, lengths, mean_prompt, rows, factor)
        plain, _ = play(cost, lengths, mean_prompt, round(rows * factor), 1.0)
        played.append(
            {
                "rows": rows,
                "over-sampling": factor,
                "time of a token, share of a plain batch as large": a_token / plain,
                "tokens of an older policy": off_policy,
            }
        )
    return first, played


def play(cost: Cost, lengths: Sequence[int], prompt: int, rows: int, factor: float) -> tuple[float, float]:
    """Seconds a token of finished responses and the share of their tokens that an older policy made, over 60 steps."""
    rng = random.Random(0)
    carried: list[tuple[int, int]] = []
    seconds = tokens = old = 0.0
    for _ in range(60):
        new = round(rows * factor) - len(carried)
        active = [(length, done) for length, done in carried] + [(rng.choice(lengths), 0) for _ in range(new)]
        seconds += cost.prefill * sum(prompt + done for _, done in active)
        carried_in = dict(enumerate(done for _, done in active))
        live, finished = dict(enumerate(active)), 0
        while live and finished < rows:
            seconds += cost.step + sum(cost.row + cost.place * (prompt + done) for _, done in live.values())
            live = {i: (length, done + 1) for i, (length, done) in live.items()}
            for i in [i for i, (length, done) in live.items() if done >= length]:
                tokens, old, finished = tokens + live[i][0], old + carried_in[i], finished + 1
                del live[i]
        carried = list(live.values())
    return seconds / tokens, old / tokens


def update(model: CausalLM, optimizer: torch.optim.Optimizer, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    """One step of policy gradient, with random advantages, on (prompt, response) pairs."""
    advantages = torch.randn(len(rows), generator=torch.Generator().manual_seed(len(rows[0][1])))
    advantages -= advantages.mean()
    total = sum(len(response) for _, response in rows)
    optimizer.zero_grad()
    for advantage, (prompt, response) in zip(advantages.tolist(), rows, strict=True):
        ids = torch.tensor(prompt + response[:-1])
        hidden = model.hidden_states(ids, torch.arange(len(ids)), PackedContext([len(ids)], ids.device))
        logits = model.logits(hidden[len(prompt) - 1 :])
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        (-advantage * chosen.sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def distributions(bench: Bench, pairs: Sequence[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """The policy's distributions at each token of some responses."""
    model, found = bench.model, []
    for prompt, response in pairs:
        ids = torch.tensor(prompt + response[:-1])
        hidden = model.hidden_states(ids, torch.arange(len(ids)), PackedContext([len(ids)], ids.device))
        found.append(model.logits(hidden[len(prompt) - 1 :]).double().softmax(-1).float())
    return found


def parting_row(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """How often the tokens differ, and the share of a response before the first difference."""
    made: dict[str, float] = {}
    apart = [parting(p.double(), q.double()) for p, q in zip(before, after, strict=True)]
    tokens = sum(len(p) for p in before)
    for name in apart[0]:
        made[f"{name}, of 1000 tokens"] = 1e3 * sum(float(row[name].sum()) for row in apart) / tokens
        made[f"{name}, share before"] = sum(float((1 - row[name]).cumprod(0).sum()) for row in apart) / tokens
    return made


def drafts_rows(
    bench: Bench, rows: int, updates: Sequence[int], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """After some updates: how often the tokens differ, and the times of the three ways to generate, in alternation."""
    engine, rng, none = bench.engine, random.Random(0), [[[]]] * rows
    first, _ = bench.generate(rows, none)
    drafts = [[answer.token_ids for answer in group] for group in first]
    pairs = [(p, d[0]) for p, d in zip(bench.prompts, drafts, strict=False)]
    short = [(prompt, response[: args.update_tokens]) for prompt, response in pairs]
    before = distributions(bench, pairs[:4])
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=args.lr, weight_decay=0.01)
    partings, speeds, done = [], [], 0
    for number in updates:
        while done < number:
            update(bench.model, optimizer, rng.sample(short, min(args.update_rows, rows)))
            done += 1
        optimizer.zero_grad()
        engine.load_weights(LocalWeights(bench.model), done)
        partings.append({"updates": number, **parting_row(before, distributions(bench, pairs[:4]))})
        speeds.append({"rows": rows, "updates": number, **speed_row(bench, rows, drafts, args.rounds)})
        print(markdown(partings[-1:]), markdown(speeds[-1:]), sep="\n", flush=True)
    return partings, speeds


def speed_row(bench: Bench, rows: int, drafts: Drafts, rounds: int) -> dict[str, Any]:
    """Times of the three ways to generate, in alternation. Raises BenchError if drafts changed a response."""
    engine = bench.engine
    times: dict[str, list[float]] = {"plain": [], "racing": [], "drafts": []}
    for _ in range(rounds):
        times["plain"].append(bench.generate(rows)[1] / engine.stats.generated_tokens)
        racing, seconds = bench.generate(rows, [[[]]] * rows)
        times["racing"].append(seconds / engine.stats.generated_tokens)
        steps = engine.stats.decode_steps
        found, seconds = bench.generate(rows, drafts)
        times["drafts"].append(seconds / engine.stats.generated_tokens)
    if [a[0].token_ids for a in racing] != [a[0].token_ids for a in found]:
        raise BenchError("drafts changed a response: rounding turned a tie, or the prototype is wrong.")
    plain, race, reused = (statistics.median(times[name]) for name in times)
    stats, run = engine.stats, engine.run
    return {
        "tokens reused": run.reused / stats.generated_tokens,
        "computed for nothing": 1 - run.reused / max(1, run.computed),
        "decoding steps": f"{steps} -> {stats.decode_steps}",
        "ms a token, plain": 1e3 * plain,
        "racing noise": 1e3 * race,
        "with drafts": 1e3 * reused,
        "times faster than plain": plain / reused,
    }


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--rows", type=int, nargs="+", default=[32, 64], help="batches: one response a prompt")
    options.add_argument("--draft-rows", type=int, default=64)
    options.add_argument("--max-tokens", type=int, default=256)
    options.add_argument("--parts", nargs="+", choices=["tail", "drafts"], default=["tail", "drafts"])
    options.add_argument("--updates", type=int, nargs="+", default=[1, 4, 16], help="of the policy, before drafts")
    options.add_argument("--lr", type=float, default=1e-6)
    options.add_argument("--update-rows", type=int, default=8)
    options.add_argument("--update-tokens", type=int, default=64, help="of a response that an update reads")
    args = options.parse_args()
    if args.tiny:
        args.rows, args.draft_rows, args.max_tokens, args.updates = [8], 8, 16, [1]
    args.threads = 1
    inputs = inputs_of(args)
    torch.set_num_threads(1)
    bench, steps = Bench(inputs, max(*args.rows, args.draft_rows), args.max_tokens), Steps()
    steps.watch()
    tables: dict[str, list[dict[str, Any]]] = {}
    if "tail" in args.parts:
        tables["long_tail"], tables["over_sampling"] = [], []
        for rows in args.rows:
            first, played = tail(bench, rows, steps)
            tables["long_tail"].append(first)
            tables["over_sampling"] += played
            print(markdown([first]), markdown(played), sep="\n", flush=True)
    if "drafts" in args.parts:
        tables["parting"], tables["drafts"] = drafts_rows(bench, args.draft_rows, args.updates, args)
    print("\n\n".join(markdown(table) for table in tables.values()))
    about = {"max tokens": args.max_tokens, "lr": args.lr, "clock": "processor seconds of one thread"}
    write_results(
        args.out,
        "long_tail",
        machine={**limits.machine(1), "model": inputs.model.name, "dtype": inputs.dtype},
        about=about,
        tables=tables,
    )


if __name__ == "__main__":
    guarded_main(main)
