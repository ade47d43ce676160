"""Reports made up for the tests: one of hostile texts, one of planted numbers."""

from __future__ import annotations

import numpy as np
import torch
from browser import HOSTILE

from tl_contrastive_lrp.render import Report

VALUES = np.linspace(-1.0, 1.0, len(HOSTILE))


def contrast_ratio(a: str, b: str) -> float:
    """WCAG 2 contrast ratio, from its definition."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def hostile_report() -> Report:
    n = len(HOSTILE)
    return Report(
        title=HOSTILE[1],
        model_name=HOSTILE[2],
        rules=HOSTILE[3],
        objective=HOSTILE[5],
        str_tokens=HOSTILE,
        token_ids=range(n),
        tokens=VALUES,
        delta=2.0,
        target=[HOSTILE[1]],
        contrast=[HOSTILE[2], HOSTILE[5]],
        target_logit=4.0,
        contrast_logit=2.0,
        greyed=[i == 0 for i in range(n)],
        resid=torch.tensor(np.stack([VALUES, -VALUES])),
        site_labels=[HOSTILE[1], HOSTILE[5]],
        heads=np.ones((2, 3, n)),
        candidates=[{"rank": 1, "token": HOSTILE[1], "id": 5, "logit": 4.0, "probability": 0.5}],
        ledger=[{"site": HOSTILE[2], "total": 2.0, "share": 1.0, "other": None}],
        coverage=[{"component": HOSTILE[3], "rule": HOSTILE[5]}],
        notes=[HOSTILE[1], HOSTILE[6]],
    )


def planted_report() -> Report:
    """A first token 1,000 times larger than the rest."""
    return Report(
        title="planted",
        model_name="m",
        rules="attnlrp",
        objective="o",
        str_tokens=["<s>", " up", " down", "\n"],
        token_ids=[0, 1, 2, 3],
        tokens=[500.0, 0.5, -0.25, 0.0],
        greyed=[True, False, False, False],
        delta=1.0,
        resid=[[500.0, 0.5, -0.25, 0.0], [-500.0, 0.0, 0.0, 1.0]],
        site_labels=["a", "b"],
    )
