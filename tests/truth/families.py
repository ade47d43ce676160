"""Tiny random models of every supported family, made, saved and booted offline.

Every model here is made so that no rule can hide: matrices are large enough that softmax,
activations and soft-caps are far from linear, norm weights and biases are random, grouped
query attention, head widths that differ from d_model / heads, non-default norm epsilons and
sliding windows shorter than any test prompt are used wherever the family has them.

- ``FAMILIES``: the seven base names; ``VARIANTS``: further settings of them; ``ALL`` is both.
- ``make_hf(name, dtype)``: a fresh Hugging Face model (free to change).
- ``hf_model(name, dtype)`` and ``boot(name, dtype)``: cached for the test session and holding
  the same weights; tests leave them as they found them.
- ``random_tokens()`` and ``left_padded()``: prompts longer than the sliding windows.
- ``true_float64(model)``: see float64.py.

Weights are drawn as float32 numbers, so the float64 model holds exactly the float32 model's
weights. The Hugging Face hub is never contacted.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from truth.float64 import true_float64

__all__ = [
    "ALL", "FAMILIES", "VARIANTS", "boot", "bos_id", "hf_model", "left_padded", "make_hf",
    "make_tokenizer", "pad_id", "random_tokens", "save_family", "saved", "true_float64",
]  # fmt: skip

VOCAB = 48
PAD, BOS, EOS, UNK = range(4)
SPACE = "\u0120"  # how byte-level BPE writes a space
pad_id, bos_id = PAD, BOS

SPECIAL = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
# heads * head_dim (32) differs from hidden_size (24), and 24 is no square: a swapped width or a
# wrong Gemma embedding scale cannot pass unseen.
WIDTHS = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
    **SPECIAL,
)
HEAD = {"head_dim": 8}


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _qwen3(**changes: Any) -> Any:
    settings = {**WIDTHS, **HEAD, "rope_parameters": _rope(90.0), "tie_word_embeddings": True}
    return transformers.Qwen3Config(**{**settings, **changes})


def _qwen2(**changes: Any) -> Any:
    settings = {**WIDTHS, "rope_parameters": _rope(70.0), "tie_word_embeddings": False}
    return transformers.Qwen2Config(**{**settings, **changes})


def _llama(**changes: Any) -> Any:
    settings = {**WIDTHS, **HEAD, "rope_parameters": _rope(80.0), "tie_word_embeddings": False}
    return transformers.LlamaConfig(**{**settings, **changes})


def _mistral(**changes: Any) -> Any:
    settings = {**WIDTHS, **HEAD, "rope_parameters": _rope(60.0), "sliding_window": 4}
    return transformers.MistralConfig(**{**settings, **changes})


def _gpt2(**changes: Any) -> Any:
    settings = dict(n_embd=24, n_layer=2, n_head=3, n_inner=40, n_positions=64,
                    activation_function="gelu_new", layer_norm_epsilon=1e-3,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL)  # fmt: skip
    return transformers.GPT2Config(**{**settings, **changes})


def _gemma2(**changes: Any) -> Any:
    settings = {
        **WIDTHS, **HEAD, "rope_parameters": _rope(50.0), "query_pre_attn_scalar": 10,
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 2.5, "final_logit_softcapping": 3.0,
    }  # fmt: skip
    return transformers.Gemma2Config(**{**settings, **changes})


def _gemma3(**changes: Any) -> Any:
    settings = {
        **WIDTHS, **HEAD, "num_hidden_layers": 3, "query_pre_attn_scalar": 10, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": _rope(20.0), "full_attention": _rope(400.0)},
    }  # fmt: skip
    return transformers.Gemma3TextConfig(**{**settings, **changes})


_BASE: dict[str, Callable[..., Any]] = {
    "qwen3": _qwen3,
    "qwen2": _qwen2,
    "llama": _llama,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
_VARIANT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "mistral-global": ("mistral", {"sliding_window": None}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gemma2-gelu": ("gemma2", {"hidden_activation": "gelu", "tie_word_embeddings": False}),
    "gemma2-uncapped": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}
FAMILIES: tuple[str, ...] = tuple(_BASE)
VARIANTS: tuple[str, ...] = tuple(_VARIANT)
ALL: tuple[str, ...] = FAMILIES + VARIANTS


def make_config(name: str) -> Any:
    """The Hugging Face configuration of a family or variant; KeyError for an unknown name."""
    if name in _VARIANT:
        family, changes = _VARIANT[name]
        return _BASE[family](**changes)
    return _BASE[name]()


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Random float32 values for every parameter: norms about neutral, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    one_plus_weight = model.config.model_type.startswith("gemma")
    for key, parameter in model.named_parameters():  # yields tied weights once
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in key or ".ln_" in key
        if is_norm and key.endswith("weight"):
            value = 0.3 * noise + (0.0 if one_plus_weight else 1.0)
        elif key.endswith(("embed_tokens.weight", "wte.weight")):
            value = 0.6 * noise
        else:
            value = 0.3 * noise
        with torch.no_grad():
            parameter.copy_(value)


def make_hf(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A fresh random Hugging Face causal LM in evaluation mode, eager attention, on the CPU.

    Same name and seed give the same float32 weights in every dtype (rounded for half types).
    """
    # In its final dtype from the start: Module.to() would keep buffers rounded to float32.
    model = transformers.AutoModelForCausalLM.from_config(
        make_config(name), attn_implementation="eager", dtype=dtype
    )
    _randomise(model, seed)
    return model.eval()


def make_tokenizer(bos_first: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 48 tokens: four special ones, a space, a to z, and " a" to " q".

    So " a" is one token and " z" or "ab" are two. Byte-level because Hugging Face loads any
    Qwen2 directory with its own byte-level class, whatever the directory asks for.

    Args:
        bos_first: Have it put BOS before a text, as Llama's and Gemma's tokenizers do.
    """
    letters = [chr(ord("a") + i) for i in range(26)]
    merges = [(SPACE, letter) for letter in letters[: VOCAB - 31]]
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", SPACE, *letters, *map("".join, merges)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos_first:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", model_max_length=64, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_family(name: str, directory: str | Path, seed: int = 0) -> Path:
    """Write model (float32) and tokenizer as a local Hugging Face directory; return its path.

    The tokenizer puts BOS first where TransformerLens has it so for the family (all but Qwen).
    """
    directory = Path(directory)
    make_hf(name, torch.float32, seed).save_pretrained(directory)
    make_tokenizer(bos_first=not name.startswith("qwen")).save_pretrained(directory)
    return directory


@functools.cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="tiny_families_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def saved(name: str, seed: int = 0) -> Path:
    """The session's directory of a family, written on first use."""
    return save_family(name, _scratch() / f"{name}-{seed}", seed)


def boot(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The family as a TransformerBridge on the CPU, booted from disk; one per session."""
    return _boot(name, dtype, seed)


@functools.cache
def _boot(name: str, dtype: torch.dtype, seed: int) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    path = str(saved(name, seed))
    model = TransformerBridge.boot_transformers(path, device="cpu", dtype=dtype)
    with torch.no_grad():
        model(random_tokens())  # transformers puts hooks of its own on at the first forward
    return model


def fresh(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The family as a TransformerBridge of one's own, free to be changed."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=dtype)


def hf_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The family as a Hugging Face model with the weights that ``boot`` has; one per session."""
    return _hf_model(name, dtype, seed)


_hf_model = functools.cache(make_hf)


def random_tokens(batch: int = 1, length: int = 9, seed: int = 1) -> torch.Tensor:
    """[batch, length] token ids: bos, then any but special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (batch, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def left_padded(
    lengths: tuple[int, ...] = (9, 6, 8), seed: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both [batch, max length], rows padded on the left to one length."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = random_tokens(1, length, seed + row)[0]
        mask[row, width - length :] = 1
    return ids, mask
