"""Chat templates (trap 30), lengths, and what is said about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.data.chat import EncodeReport, cut, encode_prompts, render
from steepest.data.prompts import Prompt, load_prompts
from steepest.errors import ConfigError, DataError, ModelError
from tests.data.conftest import CHATML, byte_tokenizer
from tests.support.chat_templates import FAMILIES, Family

TALK = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4 more?"},
    {"role": "assistant", "content": "9"},
]


def prompt(text: str = "What is 2 + 3?", uid: str = "t:0") -> Prompt:
    return Prompt(uid, [{"role": "user", "content": text}], "d", "5")


def encode(
    prompts: list[Prompt], tokenizer: Any, limit: int = 10_000, **options: Any
) -> tuple[list[Prompt], EncodeReport]:
    return encode_prompts(prompts, tokenizer, max_prompt_length=limit, **options)


families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def test_there_are_ten_families() -> None:
    assert len(FAMILIES) == 10 and len({family.template for family in FAMILIES.values()}) == 10


@families
def test_bos_once_and_a_prompt_that_asks_for_the_answer(family: Family) -> None:
    tokenizer = byte_tokenizer(family.template)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # the trap is set: plain encoding adds one
    (first,), report = encode([prompt()], tokenizer)
    text = tokenizer.decode(first.token_ids)
    assert text.startswith(family.opening) and text.endswith(family.ask)
    assert first.token_ids.count(tokenizer.bos_token_id) == int(family.opening.startswith("<bos>"))
    assert first.token_ids == tuple(tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True)["input_ids"])
    assert report.num_bos_removed == 0
    assert report.has_generation_prompt == (family.ask != "[/INST]")


@families
def test_earlier_turns_are_a_prefix_of_later_ones(family: Family) -> None:
    tokenizer = byte_tokenizer(family.template)
    asks = [
        encode([dataclasses.replace(prompt(), messages=TALK[:count])], tokenizer)[0][0].token_ids for count in (1, 3)
    ]
    whole = tokenizer(render(TALK, tokenizer, where="t:0", add_generation_prompt=False), add_special_tokens=False)
    assert asks[1][: len(asks[0])] == asks[0]
    assert tuple(whole["input_ids"][: len(asks[1])]) == asks[1]


@families
def test_a_system_message_is_rendered_or_refused_by_row(family: Family) -> None:
    messages = [{"role": "system", "content": "Be brief."}, TALK[0]]
    asked = dataclasses.replace(prompt(), messages=messages, uid="train:7")
    tokenizer = byte_tokenizer(family.template)
    if family.takes_system:
        (first,), _ = encode([asked], tokenizer)
        text = tokenizer.decode(first.token_ids)
        assert text.count("Be brief.") == 1 and "helpful" not in text
    else:
        with pytest.raises(DataError, match=r"row train:7: .*TemplateError.*Roles here: system, user\. Change the row"):
            encode([prompt(), asked], tokenizer)


@pytest.mark.parametrize("times", [2, 3])
def test_a_doubled_bos_is_made_single_and_reported(times: int) -> None:
    once, _ = encode([prompt()], byte_tokenizer("{{ bos_token }}" + CHATML))
    again, report = encode([prompt(), prompt()], byte_tokenizer("{{ bos_token }}" * times + CHATML))
    assert again[0].token_ids == once[0].token_ids
    assert report.num_bos_removed == 2
    assert "doubled the BOS token in 2: one was kept" in report.describe()


def test_a_tokenizer_without_bos() -> None:
    (first,), _ = encode([prompt()], byte_tokenizer(bos=None))
    assert (
        byte_tokenizer().decode(first.token_ids)
        == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_chat_template() -> None:
    with pytest.raises(ModelError, match="has no chat template.*custom_chat_template"):
        encode([prompt()], byte_tokenizer(None))


def test_template_options(tokenizer: Any) -> None:
    template = "{% if thinking %}<think>{% endif %}" + CHATML
    (first,), _ = encode([prompt()], byte_tokenizer(template), template_kwargs={"thinking": True})
    assert byte_tokenizer().decode(first.token_ids).startswith("<think>")
    with pytest.raises(ConfigError, match=r"^apply_chat_template_kwargs.tokenize: set by Steepest itself"):
        encode([prompt()], tokenizer, template_kwargs={"tokenize": True})


def test_a_template_that_writes_nothing() -> None:
    with pytest.raises(DataError, match="row t:0: the model's chat template makes an empty text"):
        encode([prompt()], byte_tokenizer("{% if false %}{% endif %}"))


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_prompts_round_trip(text: str, tokenizer: Any) -> None:
    (first,), _ = encode([prompt(text)], tokenizer)
    assert tokenizer.decode(first.token_ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("truncation", "want"), [("left", [6, 7, 8, 9, 10]), ("right", [1, 2, 3, 4, 5]), ("middle", [1, 2, 8, 9, 10])]
)
def test_cut_by_hand(truncation: str, want: list[int]) -> None:
    assert cut(list(range(1, 11)), 5, truncation) == want
    assert cut([1, 2, 3], 3, truncation) == cut((1, 2, 3), 4, truncation) == [1, 2, 3]


@pytest.mark.parametrize(("truncation", "want"), [("left", [3]), ("right", [1]), ("middle", [3])])
def test_cut_to_one(truncation: str, want: list[int]) -> None:
    assert cut([1, 2, 3], 1, truncation) == want


def test_overlong_prompts_stop_the_run_by_default(tokenizer: Any) -> None:
    prompts = [prompt("hi", "a:0"), prompt("x " * 50, "a:1"), prompt("y " * 60, "b:0")]
    lengths = [len(p.token_ids) for p in encode(prompts, tokenizer)[0]]
    with pytest.raises(DataError) as caught:
        encode(prompts, tokenizer, 30)
    assert str(caught.value) == (
        f"row a:1: the prompt has {lengths[1]} tokens, max_prompt_length is 30; 2 of 3 prompts are too long, the "
        f"longest has {lengths[2]} tokens. Raise max_prompt_length, or drop them with "
        f"filter_overlong_prompts=True, or cut "
        "them with truncation=left, right or middle."
    )


@pytest.mark.parametrize("truncation", ["left", "right", "middle"])
def test_overlong_prompts_are_cut(tokenizer: Any, truncation: str) -> None:
    prompts = [prompt("hi"), prompt("x " * 50)]
    whole, _ = encode(prompts, tokenizer)
    short, report = encode(prompts, tokenizer, 30, truncation=truncation)
    assert short[0] == whole[0]
    assert short[1].token_ids == tuple(cut(whole[1].token_ids, 30, truncation)) and len(short[1].token_ids) == 30
    assert (report.num_kept, report.num_filtered, report.num_truncated) == (2, 0, 1)
    longest = len(whole[1].token_ids)
    assert report.describe() == (
        f"2 prompts, the longest {longest} tokens of 30 allowed; 0 dropped as too long, 1 cut ({truncation})."
    )


@pytest.mark.parametrize("truncation", ["error", "left"])
def test_overlong_prompts_are_dropped(tokenizer: Any, truncation: str) -> None:
    prompts = [prompt("x " * 50, "t:0"), prompt("hi", "t:1"), prompt("y " * 50, "t:2")]
    kept, report = encode(prompts, tokenizer, 30, truncation=truncation, filter_overlong=True)
    assert [p.uid for p in kept] == ["t:1"]
    assert (report.num_kept, report.num_filtered, report.num_truncated) == (1, 2, 0)
    assert report.describe().endswith("2 dropped as too long, 0 cut.")
    with pytest.raises(DataError, match=r"leaves no prompt: all 3 are longer than max_prompt_length=5 "):
        encode(prompts, tokenizer, 5, filter_overlong=True)


def test_a_prompt_of_just_the_limit_stays_whole(tokenizer: Any) -> None:
    (first,), report = encode([prompt()], tokenizer)
    (same,), _ = encode([prompt()], tokenizer, report.longest)
    assert same == first and report.longest == len(first.token_ids)
    with pytest.raises(DataError):
        encode([prompt()], tokenizer, report.longest - 1)


def test_wrong_options(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="^max_prompt_length=0: expected a number of tokens above 0"):
        encode([prompt()], tokenizer, 0)
    with pytest.raises(ConfigError, match="^truncation='midle': expected one of error, left, right, middle"):
        encode([prompt()], tokenizer, truncation="midle")


def test_no_prompts(tokenizer: Any) -> None:
    assert encode([], tokenizer)[0] == []


class CountingTokenizer:
    """A tokenizer that notes how many texts each of its calls got."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.calls = tokenizer, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(len(texts))
        return self._tokenizer(texts, **options)


def test_many_prompts_are_the_same_as_one_by_one(tokenizer: Any) -> None:
    prompts = [prompt(f"What is {number} + 3?", f"t:{number}") for number in range(2500)]
    counting = CountingTokenizer(tokenizer)
    together, _ = encode(prompts, counting)
    assert counting.calls == [1024, 1024, 452]
    assert together[::400] == [encode([p], tokenizer)[0][0] for p in prompts[::400]]
    assert [p.uid for p in together] == [p.uid for p in prompts]


@pytest.mark.real
def test_gsm8k_is_encoded_in_a_few_calls(shared: Path, tokenizer: Any) -> None:
    prompts = load_prompts(str(shared / "gsm8k" / "train.jsonl"), note=lambda _: None)
    counting = CountingTokenizer(tokenizer)
    encoded, report = encode(prompts, counting, 2048)
    assert report.num_kept == len(encoded) == 7473 == sum(counting.calls) and len(counting.calls) == 8


PLAIN_TEMPLATE = "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_fields_that_the_template_does_not_read_are_told() -> None:
    talk = [{"role": "user", "content": "Hi", "name": "Ann"}]
    reads = byte_tokenizer(CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}"))
    for tokenizer, unread in ((byte_tokenizer(CHATML), ("name",)), (reads, ())):
        _, report = encode([Prompt("t:0", talk, "d", "5")], tokenizer)
        assert report.unread == unread
        told = "The chat template does not read these fields of messages: name."
        assert (told in report.describe()) == bool(unread)


def test_calls_and_roles_that_the_template_leaves_out_stop_the_run() -> None:
    ask = {"role": "user", "content": "Hi"}
    calls = [ask, {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "user", "content": "So?"}]
    with pytest.raises(DataError, match="row t:0: a message has tool_calls, and the model's chat template does not"):
        encode([Prompt("t:0", calls, "d", "5")], byte_tokenizer(CHATML))
    writes = byte_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}"))
    assert encode([Prompt("t:0", calls, "d", "5")], writes)[1].unread == ()
    result = [ask, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "7"}]
    assert encode([Prompt("t:0", result, "d", "5")], byte_tokenizer(CHATML))[1].unread == ()
    with pytest.raises(
        DataError, match="row t:0: the model's chat template writes nothing of a message of the role 'to"
    ):
        encode([Prompt("t:0", result, "d", "5")], byte_tokenizer(PLAIN_TEMPLATE))
