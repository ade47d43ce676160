"""Devices without float64, such as Apple's MPS: everything works there, with the CPU's numbers.

Pretended (``pretend_device.py``): making or asking for a float64 tensor there raises as on MPS.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch
from support.children import command, environment

from tl_contrastive_lrp.inputs.devices import has_float64, precise

MODELS = ("gpt2", "qwen3")  # biases, positions; gates, grouped queries, norms of queries
RUNS = (
    "audit", "attribute", "attribute in tiles", "run_with_relevance", "lrp", "next tokens",
    "next tokens in tiles", "graph", "graph by heads", "graph by mass", "graph over blocks",
    "tiled graph", "tiled graph by mass", "tiled graph by threshold", "tiled graph by top_k",
    "tiled graph by heads", "resumed", "verify", "patching", "circuits", "faithfulness",
    "looked into",
)  # fmt: skip
AGAIN = ("next tokens", "tiled graph by mass", "verify", "patching", "faithfulness")

# Both compute in float32, on memory that lies otherwise, so products are added up in another order:
# a few rounding errors of eps for each of some ten operations in a row.
LIMIT = 100 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def pretended() -> list[dict[str, Any]]:
    arguments = command("mps_child", ",".join(MODELS))
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=900, env=environment())
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_device_refuses_as_mps_does(pretended: list[dict[str, Any]]) -> None:
    (said,) = [x["forbidden"] for x in pretended if "forbidden" in x]
    assert len(said) == 6
    assert all(x.startswith("Cannot convert a MPS Tensor to float64 dtype") for x in said)


ASKED = [("gpt2", what) for what in RUNS] + [("qwen3", what) for what in AGAIN]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), ASKED)
def test_without_float64_it_is_what_the_cpu_gives(
    name: str, what: str, pretended: list[dict[str, Any]]
) -> None:
    (found,) = [x for x in pretended if (x.get("name"), x.get("what")) == (name, what)]
    assert "error" not in found, found
    assert found["n"] > 0
    assert found["off"] <= LIMIT


@pytest.mark.slow
def test_nothing_else_was_run(pretended: list[dict[str, Any]]) -> None:
    assert [(x["name"], x["what"]) for x in pretended if "what" in x] == ASKED


def test_on_the_cpu_float64_stays_there() -> None:
    x = torch.randn(3)
    assert has_float64(x.device)
    assert precise(x).dtype == torch.float64
    assert torch.equal(precise(x), x.double())
    assert precise(precise(x)).dtype == torch.float64
