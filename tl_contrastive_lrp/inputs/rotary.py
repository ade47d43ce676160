"""Rotary positions that depend on how long a prompt is.

Models whose context was stretched ("dynamic", "longrope") turn the queries and keys of *all*
positions by other angles once a prompt is longer than the context they were trained with. The keys
of a prompt's beginning, computed alone, are then not those that they are in the whole prompt, so
such a prompt can be run in one piece only.
"""

from __future__ import annotations

from typing import Any

_BY_LENGTH = ("dynamic", "longrope")


def depends_on_length(model: Any, length: int) -> bool:
    """Whether a prompt this long rotates its first positions otherwise than a shorter one would.

    Args:
        model: A ``TransformerBridge``.
        length: The number of tokens.
    """
    configs = [model.original_model.config]
    configs.append(getattr(configs[0], "text_config", None) or configs[0])
    for config in configs:
        given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        nested = [x for x in (given or {}).values() if isinstance(x, dict)]
        for rope in nested or [given or {}]:
            if (rope.get("rope_type") or rope.get("type")) in _BY_LENGTH:
                limits = [
                    rope.get("original_max_position_embeddings"),
                    getattr(config, "original_max_position_embeddings", None),
                    getattr(config, "max_position_embeddings", None),
                ]
                known = [int(limit) for limit in limits if limit]
                if not known or length > min(known):
                    return True
    return False
