"""Ten chat templates, one for each family of models in use: how they open, close and ask for an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A template with what it must give: BOS or none, the text that asks for an answer, the token that ends one."""

    template: str
    opening: str
    ask: str
    end: str
    takes_system: bool = True


def _turns(turn: str, ask: str, before: str = "") -> str:
    return (
        before + "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}" + ask + "{% endif %}"
    )


_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_INST = (
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant roles') }}{% endif %}"
)
_LLAMA3 = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
_GEMMA = (
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_NAMED = (
    "{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|assistant|>{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}"
)
_VICUNA = (
    "{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
)
_THINKING = (
    "<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n"
)
_ASK_CHATML = "<|im_start|>assistant\n"
_ASK_LLAMA3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"

FAMILIES = {
    "chatml": Family(_turns(_CHATML, _ASK_CHATML), "<|im_start|>user", _ASK_CHATML, "<|im_end|>"),
    "chatml with a default system message": Family(
        _turns(_CHATML, _ASK_CHATML, _DEFAULT_SYSTEM), "<|im_start|>system\nYou", _ASK_CHATML, "<|im_end|>"
    ),
    "chatml that drops earlier thoughts": Family(
        _turns(_THINKING, _ASK_CHATML), "<|im_start|>user", _ASK_CHATML, "<|im_end|>"
    ),
    "llama 2": Family(_turns(_INST, "", "{{ bos_token }}"), "<bos>[INST]", "[/INST]", "<eos>", False),
    "llama 3": Family(
        _turns(_LLAMA3, _ASK_LLAMA3, "{{ bos_token }}"), "<bos><|start_header_id|>user", _ASK_LLAMA3, "<|eot_id|>"
    ),
    "gemma": Family(
        _turns(_GEMMA, "<start_of_turn>model\n", "{{ bos_token }}"),
        "<bos><start_of_turn>user",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        False,
    ),
    "phi": Family(
        _turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"),
        "<|user|>\n",
        "<|assistant|>\n",
        "<|end|>",
    ),
    "zephyr": Family(
        _turns("<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n", "<|assistant|>\n"),
        "<|user|>\n",
        "<|assistant|>\n",
        "<eos>",
    ),
    "deepseek": Family(_turns(_NAMED, "<|assistant|>", "{{ bos_token }}"), "<bos><|user|>", "<|assistant|>", "<eos>"),
    "vicuna": Family(_turns(_VICUNA, "ASSISTANT:", "{{ bos_token }}"), "<bos>USER: ", "ASSISTANT:", "<eos>"),
}
