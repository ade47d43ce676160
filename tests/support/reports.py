"""Reports made up for the tests: one of hostile texts, one of planted numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from support.browser import HOSTILE
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


@dataclass(frozen=True)
class Long:
    """A long agent's log: faint noise, some tokens that matter, a text to find, hostile ones.

    Attributes:
        tokens: the prompt, ``[pos]``.
        values: relevance in logits, ``[site, pos]``; the first row is of the tokens.
        greyed: special tokens and the first one.
        needle: first and last position of the only "Needle 4711".
        hostile: first position of a run of all hostile texts, of low relevance.
        top, bottom: position of the largest and of the most negative relevance, hostile too.
    """

    tokens: list[str]
    values: NDArray[np.float64]
    greyed: NDArray[np.bool_]
    needle: tuple[int, int]
    hostile: int
    top: int
    bottom: int

    def report(self) -> Report:
        n = len(self.tokens)
        return Report(
            title="long",
            model_name="m",
            rules="attnlrp",
            objective="o",
            str_tokens=self.tokens,
            token_ids=range(7, 7 + n),
            tokens=self.values[0],
            delta=2.0,
            greyed=self.greyed,
            resid=self.values,
            site_labels=[f"blocks.{site}.hook_resid_pre" for site in range(len(self.values))],
        )


@lru_cache(maxsize=4)
def long_prompt(n: int = 12_374, sites: int = 9) -> Long:
    """A log of ``n`` tokens, at least 4,000; most relevance sits on a dozen of them."""
    rng = np.random.default_rng(5)
    line = ["  ", '"id', '":', " ", "3", ",\n"]
    turn = ["<|im_start|>", "tool", "\n", *line * 9, "}", "<|im_end|>", "\n"]
    tokens = (turn * (n // len(turn) + 1))[:n]
    values = rng.standard_t(3, (sites, n)) * 1e-4
    for site in range(sites):
        values[site, rng.integers(0, n, 12)] += rng.standard_normal(12)
    values *= 0.6 ** np.arange(sites)[:, None]
    hostile, needle, top, bottom = n // 2, n // 3, n // 5, n - 900
    for at, pieces in ((hostile, HOSTILE), (needle, [" Nee", "dle", " \n", "47", "11"])):
        tokens[at : at + len(pieces)] = pieces
        values[:, at - 40 : at + 60] = 1e-5
    tokens[top - 1 : top + 2], tokens[bottom] = ["<i>", HOSTILE[1], "<i>"], HOSTILE[2]
    values[0, [top, bottom]] = 4.0, -3.0
    values[:, 0] = 50.0 * 0.8 ** np.arange(sites)
    greyed = np.array([token.startswith("<|") for token in tokens])
    greyed[0] = True
    return Long(tokens, values, greyed, (needle, needle + 4), hostile, top, bottom)
