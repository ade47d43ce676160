"""The published study's numbers, as data: arXiv 2604.17761."""

from __future__ import annotations

from typing import Any

# Its Table 1; "tokens" are from the preview. Shares are (count, of).
TABLE_1: tuple[dict[str, Any], ...] = (
    {
        "benchmark": "IFEval",
        "names": ("ifeval",),
        "failures": 265,
        "kept": (55, 265),
        "tokens": 54,
        "model": "Qwen3-0.6B",
        "outcomes": {"M-IA": (46, 55), "NC-IA+M-AG": (4, 55), "NC-IA+AG": (5, 55)},
        "patterns": {"URT": (27, 44), "OIT": (2, 44), "both": (15, 44)},
    },
    {
        "benchmark": "GAIA2",
        "names": ("gaia2",),
        "failures": 300,
        "kept": (51, 300),
        "tokens": 12_374,
        "model": "Qwen3-4B",
        "outcomes": {"M-IA": (44, 51), "NC-IA+M-AG": (7, 51), "NC-IA+AG": (0, 51)},
        "patterns": {"URT": (28, 50), "OIT": (7, 50), "both": (15, 50)},
    },
    {
        "benchmark": "EvalPlus",
        "names": ("evalplus", "humaneval", "humanevalplus"),
        "failures": 270,
        "kept": (53, 270),
        "tokens": 169,
        "model": "Qwen3-0.6B",
        "outcomes": {"M-IA": (42, 53), "NC-IA+M-AG": (7, 53), "NC-IA+AG": (4, 53)},
        "patterns": {"URT": (23, 43), "OIT": (5, 43), "both": (15, 43)},
    },
    {
        "benchmark": "MATH",
        "names": ("math", "math500", "math-500"),
        "failures": 91,
        "kept": (37, 91),
        "tokens": 116,
        "model": "Qwen3-0.6B",
        "outcomes": {"M-IA": (15, 37), "NC-IA+M-AG": (13, 37), "NC-IA+AG": (9, 37)},
        "patterns": {"URT": (20, 25), "OIT": (3, 25), "both": (2, 25)},
    },
)

# Mean normalised segment sums on IFEval.
SEGMENT_SUMS: dict[str, dict[str, float]] = {
    "Qwen3-0.6B": {"all": 1.36, "instruction": 0.25, "query": 0.79, "answer": 0.32},
    "Qwen3-1.7B": {"all": -1.11, "instruction": -1.01, "query": -0.01, "answer": -0.09},
    "Qwen3-4B": {"all": -1.89, "instruction": -0.87, "query": -0.33, "answer": -0.69},
}

# Mean tokens to flip, of 60 cases, as a reader's note of the appendices has them.
TOKENS_TO_FLIP: dict[str, float] = {"attnlrp": 1.7, "cplrp": 2.0, "gradient": 3.7}

# Share of cases with the same label of two people, after calibration.
AGREEMENT: dict[str, float] = {"outcome": 0.88, "pattern": 0.83}
