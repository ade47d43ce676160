"""What a row of the zoo says, and settings that many rows share.

Widths are such that swapped ones show: d_model 24 is not heads * head_dim (32) where a family
allows it, key and value heads are fewer than query heads, epsilons are not the default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 48
PAD, BOS, EOS = 0, 1, 2
SPECIAL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


@dataclass(frozen=True)
class Row:
    """A tiny model of one family.

    Attributes:
        name: unique; the model type, with "-variant" after it.
        model: the Hugging Face model class.
        kwargs: what its configuration class is called with.
        remark: why these settings, where they are not obvious.
        kind: "decoder", "encoder", "encoder-decoder", or "recurrent" (a mixer that is no
            attention in at least one layer).
        architecture: the name that real checkpoints give, where it is not ``model``.
        unbootable: what TransformerLens 4.3 says instead of booting it; "" where it boots.
        seed: of the weights; another one where the first makes float32 too coarse to compare.
        differs: why TransformerLens 4.3 computes other logits than Hugging Face; "" where not.
    """

    name: str
    model: str
    kwargs: dict[str, Any] = field(hash=False)
    remark: str = ""
    kind: str = "decoder"
    architecture: str = ""
    unbootable: str = ""
    differs: str = ""
    seed: int = 0


def rope(theta: float = 80.0, partial: float | None = None, **more: Any) -> dict[str, Any]:
    """Rotary settings; a small base, so that few positions already turn far."""
    settings = {"rope_type": "default", "rope_theta": theta, **more}
    return settings if partial is None else {**settings, "partial_rotary_factor": partial}


def windows(*kinds: str) -> list[str]:
    """Layer types by letter: "s" sliding, "f" full, "l" linear, "c" chunked."""
    names = {"s": "sliding", "f": "full", "l": "linear", "c": "chunked"}
    return [f"{names[kind]}_attention" for kind in kinds]


def llama_like(**changes: Any) -> dict[str, Any]:
    """Settings that most decoders since Llama share."""
    return {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "rope_parameters": rope(),
        "tie_word_embeddings": False,
        **SPECIAL,
        **changes,
    }


def without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The settings but for some."""
    return {key: value for key, value in settings.items() if key not in keys}
