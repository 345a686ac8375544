"""Tiny random models of every family, built from configs, and a byte-level tokenizer with a ChatML template: no downloads."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 272  # the tokenizer's 259 and some padding, as real embeddings have

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")
ENCODERS = ("bert", "roberta", "distilbert")
FAMILIES = (*DECODERS, "gpt2", "bert")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
# eager: the sdpa of transformers 5.17 leaves the softcap of the scores out
_GEMMA2 = {**_GEMMA, "final_logit_softcapping": 5.0, "attn_implementation": "eager"}
_MOE = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

# family -> config class, model class, what its config differs in
_FAMILY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": None}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA2),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"head_dim": None}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"moe_intermediate_size": 24, "num_experts": 6, **_MOE}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, **_MOE}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 7, **_MOE}),
}

_BOTH: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    **_BOTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 512, "dropout": 0.0, "forced_eos_token_id": None,
    "bos_token_id": 1, "init_std": 0.1,
}  # fmt: skip
ENCODER_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", _BART),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_BOTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    ),
}


def tiny_model(family: str, *, seed: int = 0, cls: str | None = None, **config_overrides: Any):
    """A random 2-layer model of a family in float32, in eval mode; norm weights and biases are random too.

    `cls` names another transformers class for the same config, such as "LlamaForSequenceClassification".
    """
    import transformers

    if family in _FAMILY:
        config_name, model_name, differs = _FAMILY[family]
        settings = {**_DECODER, **differs}
    elif family == "gpt2":
        config_name, model_name = "GPT2Config", "GPT2LMHeadModel"
        settings = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        settings |= {"initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 2}
        settings |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    elif family == "distilbert":
        config_name, model_name = "DistilBertConfig", "DistilBertForSequenceClassification"
        settings = {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
        settings |= {"max_position_embeddings": 512, "initializer_range": 0.1, "num_labels": 3}
        settings |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    elif family in ("bert", "roberta"):
        name = {"bert": "Bert", "roberta": "Roberta"}[family]
        config_name, model_name = f"{name}Config", f"{name}ForSequenceClassification"
        settings = {key: _DECODER[key] for key in _DECODER if key not in ("num_key_value_heads", "head_dim")}
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    elif family in ENCODER_DECODERS:
        config_name, model_name, settings = ENCODER_DECODERS[family]
    else:
        raise ValueError(f"unknown family {family!r}, known: {', '.join({*FAMILIES, *ENCODERS})}")
    settings = {key: value for key, value in (settings | config_overrides).items() if value is not None}
    config = getattr(transformers, config_name)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, cls or model_name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer():
    """A PreTrainedTokenizerFast of 256 bytes and three specials: <|endoftext|> 0 (pad), <|im_start|> 1, <|im_end|> 2 (eos)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=512
    )
    fast.chat_template = CHATML
    return fast


def main(folder: str, family: str = "llama") -> None:
    """Write a tiny model and its tokenizer as a Hugging Face folder: python -m tests.tiny FOLDER [FAMILY]."""
    tiny_model(family, max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
