"""Random models of real architectures, made offline, for benchmarks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge


def word_tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of so many tokens: four special ones, then a word for each id."""
    words = {token: i for i, token in enumerate(["<unk>", "<pad>", "<bos>", "<eos>"])}
    words |= {f"w{i}": i for i in range(4, vocab)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip


def sharpen(model: Any, factor: float) -> None:
    """Multiply the weights of q_norm and k_norm, which are 1 at birth.

    At birth attention is almost uniform, and every edge matters; that of trained models is not.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(factor)


def save_random(config: Any, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a random model with its tokenizer as a folder that transformers loads."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)


def bridge_in_memory(hf: Any) -> TransformerBridge:
    """A bridge around a Hugging Face model that is in memory, where it is and with its weights.

    It changes the model: its attention is eager from now on, and its modules are the bridge's.
    """
    with tempfile.TemporaryDirectory() as folder:  # TransformerLens wants a tokenizer with a place
        word_tokenizer(hf.config.vocab_size).save_pretrained(folder)
        dtype, device = next((p.dtype, p.device) for p in hf.parameters())
        bridge: Any = TransformerBridge.boot_transformers(
            folder, hf_model=hf, dtype=dtype, device=str(device)
        )
    return bridge.eval()


def random_bridge(
    layers: int, d_model: int, heads: int, positions: int, vocab: int = 512, family: str = "Qwen3"
) -> TransformerBridge:
    """A random bias-free model with grouped-query attention, in evaluation mode, float32."""
    config = getattr(transformers, f"{family}Config")(
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
    with tempfile.TemporaryDirectory() as directory:
        save_random(config, directory)
        model: Any = TransformerBridge.boot_transformers(directory, device="cpu")
    return model.eval()
