"""What a reward gets is what the policy wrote: special tokens, spaces and bytes, and what the prompt has opened."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steepest.config.sections.reward import WeightedFunction
from steepest.core.batch import Batch
from steepest.data.chat import encode_prompts
from steepest.data.prompts import Prompt
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.rewards.judge import PROMPT, fill_prompt
from steepest.rewards.weighted import bind, score_one
from steepest.trainer.experience.response_text import ResponseText
from steepest.trainer.experience.scoring import Scorer
from tests.support.fake_parts import FakePool

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENED{% endif %}"
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def byte_tokenizer(*special: str, opened: str = "") -> PreTrainedTokenizerFast:
    """Every byte is a token, as in the tokenizers of GPT-2, Llama 3 and Qwen."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", *special], clean_up_tokenization_spaces=True,
    )  # fmt: skip
    tokenizer.chat_template = CHATML.replace("OPENED", opened)
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with the sign of a space, and one token for each other byte, as in the tokenizers of Llama 2 and Gemma."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581yes",
        "a",
        "\u2581a",
        "4",
        ".",
    ]
    core = Tokenizer(
        models.BPE({piece: id for id, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def texts(tokenizer: PreTrainedTokenizerFast, *rows: list[int], cut: bool = False, **options: object) -> list[str]:
    batch = Batch.from_sequences([[1]] * len(rows), list(rows), group_ids=[0] * len(rows), truncated=[cut] * len(rows))
    return ResponseText(tokenizer, **options).texts(batch)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


RESPONSE = "<think> yes</think><answer> 4</answer>"


@pytest.mark.parametrize(
    ("skip", "expected"),
    [("template", RESPONSE), ("all", " yes 4"), ("none", f"<|im_start|>{RESPONSE}<|im_end|>")],
)
def test_only_the_special_tokens_of_the_template_are_left_out(skip, expected):
    tokenizer = byte_tokenizer(*TAGS)
    assert texts(tokenizer, ids(tokenizer, f"<|im_start|>{RESPONSE}<|im_end|>"), skip=skip) == [expected]


def test_an_end_token_of_the_model_alone_is_left_out():
    tokenizer = byte_tokenizer("<|eom|>")
    row = ids(tokenizer, "4<|eom|>")
    assert texts(tokenizer, row) == ["4<|eom|>"] and texts(tokenizer, row, end_ids=(row[-1],)) == ["4"]


def test_spaces_stay_as_they_were_written():
    tokenizer = byte_tokenizer()
    written = " It 's 4 .\n\n do n't  \t"
    assert texts(tokenizer, ids(tokenizer, written)) == [written]
    llama = llama_tokenizer()
    row = llama.convert_tokens_to_ids(["\u2581yes", "\u2581", "4", "."])
    assert llama.decode(row) == "yes 4." and texts(llama, row) == [" yes 4."]


def test_bytes_of_a_character_that_the_limit_has_cut_are_left_out():
    tokenizer, llama = byte_tokenizer(), llama_tokenizer()
    row = ids(tokenizer, "4 \u20ac")  # 4, space, 3 bytes of the euro sign
    assert texts(tokenizer, row, row[:-1], row[:-2], cut=True) == ["4 \u20ac", "4 ", "4 "]
    assert texts(tokenizer, row[:-1]) == ["4 \ufffd"]  # ended by the policy: it is its own fault
    assert texts(llama, llama.convert_tokens_to_ids(["4", "<0xE2>", "<0x82>"]), cut=True) == ["4"]


@pytest.mark.parametrize(
    ("opened", "opening"),
    [("", ""), ("<think>\n", "<think>\n"), ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"), ("The", "")],
)
@pytest.mark.parametrize("special", [(), TAGS])
def test_what_the_template_has_opened_belongs_to_the_response(opened, opening, special):
    tokenizer = byte_tokenizer(*special, opened=opened)
    row = Prompt("rows:0", [{"role": "user", "content": "2 + 2?"}], "toy", "4", {}, ())
    (prompt,), _ = encode_prompts([row], tokenizer, max_prompt_length=200)
    seen: list[RewardRequest] = []

    def keep(request: RewardRequest) -> RewardResult:
        seen.append(request)
        return RewardResult(1.0)

    batch = Batch.from_sequences(
        [list(prompt.token_ids)], [ids(tokenizer, " yes</think><answer> 4</answer><|im_end|>")], group_ids=[0],
        truncated=[False], samples=[prompt],
    )  # fmt: skip
    scorer = Scorer(FakePool(keep), ResponseText(tokenizer))
    scorer.results(batch, scorer.texts(batch))
    assert seen[0].solution == " yes</think><answer> 4</answer>" and seen[0].opening == opening


def test_built_in_rewards_read_the_opening_and_own_functions_the_response_alone(tmp_path):
    request = RewardRequest("0", "exact", " yes</think><answer> 4</answer>", "4", opening="<think>\n")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def whole(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str)\n"
    )
    wanted = [("format", {"form": "tags"}), ("exact", {}), (f"{mine}:whole", {})]
    functions = bind([WeightedFunction(name, 1.0, options) for name, options in wanted])
    scores = score_one(functions, request, mode="strict", call=lambda function, keywords: function(**keywords)).scores
    assert scores == {"format": 1.0, "exact": 1.0, "whole": 31.0}
    assert "\n<think>\n yes</think><answer> 4</answer>\n" in fill_prompt(PROMPT, request)
    # thinking that does not end states no answer
    cut = dataclasses.replace(request, solution=" The answer is 4")
    assert (
        score_one(functions[1:2], cut, mode="strict", call=lambda function, keywords: function(**keywords)).score == 0.0
    )


def test_special_tokens_that_prompts_speak_of_are_named_at_the_start():
    tokenizer = byte_tokenizer("<think>", "<|tool|>", "<|never|>")
    prompts = [Prompt("rows:0", [{"role": "user", "content": "Use <|tool|>."}], "toy", "4", {}, ())]
    assert ResponseText(tokenizer).notes(prompts) == [
        "rewards see <think> <|tool|>, special tokens of this tokenizer (reward.skip_special_tokens=template)."
    ]
    (warning,) = ResponseText(tokenizer, "all").notes(prompts)
    assert warning.startswith("warning: <think> <|tool|>: special tokens of this tokenizer, so rewards do not see them")
    assert ResponseText(tokenizer, "none").notes(prompts) == ResponseText(byte_tokenizer()).notes(prompts) == []
