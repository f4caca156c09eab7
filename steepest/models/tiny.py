"""Makes a small random Llama or Qwen model whose tokens are words and whole numbers.

The quickstart, tests and benchmarks use it. It knows no language until it is trained on the texts it was made from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from steepest.models.hf_logging import quiet_transformers

PIECES = r" ?[0-9]+| ?[A-Za-z]+| ?#+|\n| ?[^\sA-Za-z0-9#]"
"""Matches one token: a number, a word or a run of '#' with the blank before it, a line break, or another character."""
END, START, PAD, UNKNOWN = "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|unknown|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over PIECES of `texts`, most frequent first; decoding is plain concatenation.

    Text made of known pieces survives encoding and decoding unchanged. Anything else becomes <|unknown|>.
    """
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    counts: Counter[str] = Counter()
    for text in [*texts, "user\nassistant\nsystem\n"]:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    special = [PAD, START, END, UNKNOWN]
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = splitter
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        # Without an auto_map, transformers' AutoTokenizer reads every qwen2 folder with Qwen2's own tokenizer; with one
        # it takes `tokenizer_class`. Nothing is ever loaded from the name in the map.
        auto_map={"AutoTokenizer": [None, "steepest--none"]},
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_model(
    folder: Path | str,
    texts: Iterable[str],
    *,
    model_type: str = "qwen2",
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_length: int = 512,
    seed: int = 0,
) -> Path:
    """Write a Hugging Face folder of a random model with the tokenizer of `texts`; returns the folder.

    With the defaults and 1,000 words: 0.21M parameters, embeddings tied. End tokens are <|im_end|> and <|endoftext|>.
    `model_type` may be any family of this shape.
    """
    folder = Path(folder)
    tokenizer = build_tokenizer(texts)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    init_weights(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def init_weights(model: PreTrainedModel, seed: int) -> None:
    """Set random weights with which such a small model learns fast.

    Linear: normal of std 1/sqrt(inputs), divided by sqrt(2 * layers) where a block writes to the residual stream.
    Embedding: std 1/sqrt(hidden); tied to the head, it gives first logits of std about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            std = module.in_features**-0.5
            std /= depth if name.endswith(("o_proj", "down_proj")) else 1.0
            module.weight.normal_(0.0, std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
