"""What replacing a map's strongest tokens says of it, for one case: ``result.check`` in a study.

The map is computed again, as ``attribute`` gives it, so that a check depends on its own causes
alone: whether an analysis of the case is there, or was made with a graph, does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..attribution.attribute import attribute
from ..attribution.check import MapCheck
from ..engine.fused import AttentionKind
from ..engine.memory import Memory
from ..errors import SettingsError, UncoveredComponentError
from ..inputs.objective import logit_diff
from ..inputs.tokens import model_device

if TYPE_CHECKING:
    from .cases import Case


@dataclass(frozen=True)
class CheckSettings:
    """How maps are checked; every field is a cause of the result.

    Attributes:
        k: How many of the strongest tokens are replaced.
        n_random: How many random others.
        seed: Of what is drawn, the same for each case.
        replace: What replaces tokens, as for ``Attribution.check``.
        window: As for ``Attribution.check``.
        batch_size: Runs in a batch.
        memory: As for ``attribute``, which makes the map.
        attention: As for ``attribute``.
    """

    k: int = 16
    n_random: int = 16
    seed: int = 0
    replace: str = "zero"
    window: int | None = 2
    batch_size: int = 16
    memory: Memory = "auto"
    attention: AttentionKind = "auto"


def check_case(model: Any, case: Case, rules: str, settings: CheckSettings) -> MapCheck:
    """Check the map of one case under one rule set.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        case: The case.
        rules: Name of a rule set.
        settings: How it is checked.

    Returns:
        The check, on the CPU.

    Raises:
        SettingsError: Effects cannot be predicted in this model, so that no map can be checked.
        NonFiniteError: Relevance or an effect is NaN or infinite.
        PromptError, TokenError, ModelStateError, UncoveredComponentError: As for ``attribute`` and
            ``Attribution.check``.
    """
    ids = torch.tensor(case.ids, device=model_device(model))
    objective = logit_diff(model, case.target_id, case.contrast_id)
    result = attribute(
        model, ids, objective, rules=rules, memory=settings.memory, attention=settings.attention,
        progress=False,
    )  # fmt: skip
    how: dict[str, Any] = {"replace": settings.replace, "batch_size": settings.batch_size}
    try:
        return result.check(
            model, settings.k, settings.n_random, objective=objective, seed=settings.seed,
            window=settings.window, progress=False, **how,
        )  # fmt: skip
    except UncoveredComponentError as error:
        raise SettingsError(
            "analyse.check", f"effects cannot be predicted in this model ({error}); give false"
        ) from error
