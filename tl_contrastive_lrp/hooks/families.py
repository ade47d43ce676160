"""Data for model families: what their components compute, and which components are refused.

``COMPONENTS`` lists the operations of each kind of component that need a rule. ``UNCOVERED`` lists
the kinds that no rule covers. The audit (``audit/audit.py``) would refuse those too, operation by
operation; a row here says in one sentence what the component is, and what to do instead.
"""

from __future__ import annotations

from typing import Literal

_SCAN = (
    "it is a state-space or recurrent mixer: tokens mix in a scan with computed gates and step "
    "sizes, not in attention, and that scan has no rule yet."
)

_DELTA = (
    "it is a linear-attention mixer: tokens mix in a recurrence with computed keys, gates and "
    "decays, not in attention, and that recurrence has no rule yet."
)

_CONVOLUTION = (
    "it is a gated short convolution: tokens mix outside attention, and its gates have no rule yet."
)

_STREAMS = (
    "it mixes several residual streams with computed weights, so a hidden state is not one site, "
    "and that mixing has no rule yet."
)

_PREDICTION = (
    "each layer gets an embedding of the prompt's tokens of its own, so relevance would have to "
    "end in two places for every token; only one is covered yet."
)

# Class name of a component, or the end of the class name of what it wraps -> why it is refused.
UNCOVERED: dict[str, str] = {
    "SSMMixerBridge": _SCAN,
    "SSM2MixerBridge": _SCAN,
    "MambaMixer": _SCAN,
    "RwkvSelfAttention": _SCAN,
    "RecurrentGemmaDecoderLayer": _SCAN,
    "GatedDeltaNetBridge": _DELTA,
    "GatedDeltaNet": _DELTA,
    "ShortConv": _CONVOLUTION,
    "HyperConnection": _STREAMS,
}

# Modules of the wrapped model, by name, that are refused wherever they are.
UNCOVERED_PARTS: dict[str, str] = {"embed_tokens_per_layer": _PREDICTION}

Operation = Literal[
    "norm", "activation", "gate", "qk", "softmax", "pattern_v", "softcap", "attention", "experts",
    "wrapped",
]  # fmt: skip

_ATTENTION: tuple[Operation, ...] = ("qk", "softmax", "pattern_v")

# TransformerLens component class -> its operations that are not linear. "attention" and "experts"
# mean everything that such a component computes, where HookPoints do not reach all of it.
COMPONENTS: dict[str, tuple[Operation, ...]] = {
    "NormalizationBridge": ("norm",),
    "AttentionBridge": ("attention",),
    "PositionEmbeddingsAttentionBridge": _ATTENTION,
    "JointQKVAttentionBridge": _ATTENTION,
    "MLAAttentionBridge": ("attention",),
    "GatedMLPBridge": ("activation", "gate"),
    "MLPBridge": ("activation",),
    "MoEBridge": ("experts",),
    "MoERouterBridge": ("experts",),
}

# Wrapped classes that look like an MLP or a linear map but compute more; their rules are applied by
# operation, too. The head is outside of any component.
WRITTEN_OUT = frozenset({"ModernBertDecoderMLP", "RobertaLMHead", "NativeMLP", "NativeGatedMLP"})

# Attention that adds a bias of its own to query·key, so that the scores are not linear in the keys.
_BIASED_SCORES = ("ALiBiJointQKVAttentionBridge", "BloomAttentionBridge")

# Attention whose code does something to its scores or pattern that deferred attention has no record
# of (biases by distance, casts), so that it is computed as written; memory is planned accordingly.
COMPUTED_SCORES = frozenset(
    {"ALiBiJointQKVAttentionBridge", "BloomAttentionBridge", "CodeGenAttentionBridge"}
)
