"""Random models of a real architecture, booted offline, for benchmarks."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge


def random_bridge(
    layers: int, d_model: int, heads: int, positions: int, vocab: int = 512
) -> TransformerBridge:
    """A random bias-free Qwen3 with grouped-query attention, in evaluation mode, float32."""
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=d_model // heads,
        max_position_embeddings=max(positions, 64),
    )
    return bridge_of(config)


def bridge_of(config: Any) -> TransformerBridge:
    """A random model of this configuration, in evaluation mode, float32."""
    torch.manual_seed(0)
    vocab = config.vocab_size
    words = {token: i for i, token in enumerate(["<unk>", "<pad>", "<bos>", "<eos>"])}
    words |= {f"w{i}": i for i in range(4, vocab)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        model: Any = TransformerBridge.boot_transformers(directory, device="cpu")
    return model.eval()
