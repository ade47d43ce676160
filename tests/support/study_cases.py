"""Made-up cases for the study's tests."""

from __future__ import annotations

from typing import Any

from tl_contrastive_lrp.study.cases import Case, Provenance, Verdict


def made_case(**changes: Any) -> Case:
    """A case with something in every field; ``changes`` replace fields."""
    values: dict[str, Any] = {
        "id": "made/1",
        "benchmark": "made",
        "prompt": "<s>user\nUse no é.\u2028Thanks\n",
        "prompt_ids": (1, 5, 9, 2, 7),
        "completion": "caf\u00e9\n",
        "completion_ids": (11, 12, 13),
        "target_position": 1,
        "target_id": 12,
        "target": "\u00e9",
        "contrast_id": 14,
        "contrast": "e",
        "delta": 0.1 + 0.2,
        "verdict": Verdict(False, "not followed: no é"),
        "provenance": Provenance(
            "demo/small@1000",
            revision="main",
            fingerprint="ab12",
            decoding={"max_new_tokens": 64, "thinking": False, "stop": ["\n\n"], "t": None},
            package="0.1.0",
            source="made.jsonl, line 1",
        ),
        "messages": (
            {"role": "user", "content": "Use no é.\u2028Thanks"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": None, "name": "f"},
        ),
        "tools": ({"type": "function", "function": {"name": "f", "parameters": {}}},),
        "reference": "cafe",
        "segments": {"instruction": ((1, 3), (4, 6)), "query": ((3, 4),), "none": ()},
        "decisive_positions": (2, 5),
        "locator": "constraint",
        "contrast_source": "sibling large",
    }
    return Case(**{**values, **changes})
