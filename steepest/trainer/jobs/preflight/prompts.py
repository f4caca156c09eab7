"""Rows and prompts: what the chat template and the tokenizer make of them."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.checks import Check, ok, warning
from steepest.data.chat import render
from steepest.errors import DataError
from steepest.models.load import end_token_ids
from steepest.trainer.jobs.ppo import Job

TEMPLATE = "actor_rollout_ref.model.custom_chat_template"
MODEL = "actor_rollout_ref.model.path"
_ANSWER = "Z9q"


def prompt_checks(job: Job) -> list[Check]:
    """Rows, template, BOS, EOS and pad."""
    return [*rows(job), overlap(job), template(job), bos(job), eos(job), pad(job)]


def shown_prompts(job: Job) -> list[tuple[str, str]]:
    """Three prompts as the model sees them: id of the row, and the text of its tokens."""
    decode = job.tokenizer.decode
    return [(p.uid, decode(p.token_ids, clean_up_tokenization_spaces=False)) for p in job.data.train[:3]]


def rows(job: Job) -> Iterator[Check]:
    """How many rows there are, and how many were dropped or cut as too long."""
    for name, report in zip(("train rows", "validation rows"), job.data.reports, strict=True):
        text = report.describe()
        if report.num_truncated:
            yield warning(name, text, "raise data.max_prompt_length, so that the model sees whole prompts")
        elif report.num_filtered > report.num_kept:
            yield warning(name, text, "raise data.max_prompt_length: most rows were dropped")
        else:
            yield ok(name, text)


def overlap(job: Job) -> Check:
    """Whether prompts of the validation are trained on."""
    trained = {prompt.token_ids for prompt in job.data.train}
    both = sum(prompt.token_ids in trained for prompt in job.data.val)
    if both == 0:
        return ok("overlap", "no prompt of the validation is trained on")
    text = f"{both} of {len(job.data.val)} prompts of the validation are trained on too"
    return warning("overlap", text, "give other rows as data.val_files: else the validation shows what was memorised")


def template(job: Job) -> Check:
    """Whether the chat template asks for an answer."""
    if all(report.has_generation_prompt for report in job.data.reports):
        return ok("template", "the chat template ends prompts with the start of the assistant's turn")
    text = "the chat template writes nothing that starts the assistant's turn"
    return warning("template", text, f"normal for [INST] templates; else give another with {TEMPLATE}")


def bos(job: Job) -> Check:
    """One BOS where the model has one. The template alone writes it."""
    token, id = job.tokenizer.bos_token, job.tokenizer.bos_token_id
    doubled = sum(report.num_bos_removed for report in job.data.reports)
    if doubled:
        return warning(
            "bos",
            f"the chat template writes {token} twice in {doubled} prompts; one was kept for the training, and other "
            "programs will show the trained model two",
            f"give a template that writes it once with {TEMPLATE}",
        )
    if id is None:
        return ok("bos", "the tokenizer has no BOS token")
    if job.data.train[0].token_ids[0] == id:
        return ok("bos", f"prompts begin with one {token}")
    if job.tokenizer("a")["input_ids"][:1] == [id]:
        return warning(
            "bos",
            f"prompts begin without {token}, which the tokenizer writes before other texts",
            f"give a template that writes it with {TEMPLATE}",
        )
    return ok("bos", f"prompts begin without {token}, as the tokenizer's own texts do")


def eos(job: Job) -> Check:
    """Whether the end of an answer, as the template writes it, is a token that ends a response."""
    ends = end_token_ids(job.folders["actor"], job.tokenizer)
    names = ", ".join(job.tokenizer.convert_ids_to_tokens(list(ends)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(turns, job.tokenizer, where="0", add_generation_prompt=False)
    except DataError:
        return ok("eos", f"{names} ends a response; the template takes no finished conversation to compare with")
    after = text.rpartition(_ANSWER)[2]
    ids = job.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    if set(ids) & set(ends):
        return ok("eos", f"{names} ends a response, and the template ends an answer with it")
    return warning(
        "eos",
        f"{names} ends a response, and the template ends an answer with {after!r}: the model may never end its own",
        f"set eos_token_id in the generation_config.json of {MODEL} to the token that the template writes",
    )


def pad(job: Job) -> Check:
    """Which token fills rows up."""
    token, id = job.tokenizer.pad_token, job.tokenizer.pad_token_id
    if id in end_token_ids(job.folders["actor"], job.tokenizer):
        return ok("pad", f"{token}, which ends responses too; no harm, since lengths come from the engine")
    return ok("pad", str(token))
