"""A model, a tokenizer and data made on the fly: the training benchmark runs in CI without files or a network."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, *, layers: int = 2) -> Path:
    """A small random Llama over bytes, saved in bf16 with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_data(path: Path) -> Path:
    """Sums in words, as questions and answers of varying length."""
    sums = [(a, b) for a in range(7, 96, 8) for b in range(3, 990, 61)]
    rows = [
        {"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}" + "!" * (a % 5)}
        for a, b in sorted(sums, key=lambda pair: pair[0] * pair[1] % 101)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
