"""Shared by all tests: threads, no network, and a way to see what a model was left with.

Torch computes on TEST_THREADS threads, 1 if that is not set. Tests whose outcome could hang on how
a processor rounds are marked ``numerical``; ``.ci/run`` runs those again with other kernels, with
fewer of the many families (TEST_EVERY).
"""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from support.model_state import snapshot_of
from support.shapes import check_package
from truth.families import ALL
from truth.zoo import ROWS

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Started in the background, a shell's children ignore Ctrl-C, and so would those that tests stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports the package. CHECK_SHAPES=0 leaves it out, as for other kernels.
if os.environ.get("CHECK_SHAPES", "1") != "0":
    check_package("tl_contrastive_lrp")

# The same examples on every machine and in every run, and no clock in any verdict.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

# Text, pictures, files and the command line; a new file is numerical unless it is named here.
NOT_NUMERICAL = (
    "test_attribution_files", "test_audit", "test_cli", "test_demo", "test_families_page",
    "test_docs", "test_docstrings", "test_graph_files", "test_grids", "test_mutations",
    "test_label_page", "test_refusals", "test_render", "test_report", "test_results", "test_shapes",
    "test_shown", "test_tiled_killed", "test_versions",
)  # fmt: skip


HOUSE = Path(__file__).parent / "house"

# Nearly a hundred families each, minutes long. TEST_EVERY=n takes every n-th test, and of these
# files every 4n-th.
MANY_FAMILIES = ("test_fuzz", "test_op_oracle", "test_tiled_families", "test_zoo")


def _model_of(item: pytest.Item) -> str:
    """The name of the tiny model that the test is about, or "" for any other test.

    Also "" for tests that share a fixture in their file: apart, each worker would make its own.
    """
    fixtures = getattr(item, "_fixtureinfo", None)
    if fixtures and any(f[-1].scope == "module" for f in fixtures.name2fixturedefs.values()):
        return ""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    name = parameters.get("name") or getattr(parameters.get("row"), "name", "")
    return name if isinstance(name, str) and (name in ALL or name in ROWS) else ""


# Besides tests/house: real browsers, processes of their own, and many tokenizers or trained models.
SLOW_FILES = (
    "test_cli_bos", "test_demo", "test_demo_training", "test_devices", "test_edges_deep",
    "test_model_inputs", "test_mps", "test_one_prefill", "test_planted", "test_render_browser",
    "test_label_page_browser", "test_render_graph_long", "test_render_graph_pages",
    "test_render_long_browser", "test_report_browser", "test_tiled_details", "test_tiled_killed",
    "test_tiled_ties", "test_token_text",
)  # fmt: skip

# How many models one test function meets when slow tests are left out; functions take turns.
SOME_MODELS = 1


def _beyond_some_models(items: list[pytest.Item]) -> set[int]:
    """Ids of the tests of further models, where one test function goes through many.

    Which models are left differs from function to function, so that all of them are met.
    """
    by_function: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        if model := _model_of(item):
            by_function.setdefault(item.nodeid.partition("[")[0], {}).setdefault(model, []).append(
                item
            )
    beyond = set()
    for number, models in enumerate(by_function.values()):
        step = -(-len(models) // SOME_MODELS)
        for i, tests in enumerate(models.values()):
            if (i + number) % step:
                beyond |= {id(test) for test in tests}
    return beyond


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Each worker begins with a stretch of the list and boots the models of its tests, so tests of
    # one model stand together.
    items.sort(key=_model_of)
    many_models = _beyond_some_models(items)
    for item in items:
        if not item.path.name.startswith(NOT_NUMERICAL):
            item.add_marker(pytest.mark.numerical)
        in_slow_file = item.path.is_relative_to(HOUSE) or item.path.stem in SLOW_FILES
        if in_slow_file or id(item) in many_models:
            item.add_marker(pytest.mark.slow)
    every = int(os.environ.get("TEST_EVERY", "1"))
    many = [item for item in items if item.path.name.startswith(MANY_FAMILIES)]
    others = [item for item in items if not item.path.name.startswith(MANY_FAMILIES)]
    left_out = set(items) - set(others[::every]) - set(many[:: every if every == 1 else 4 * every])
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


pytest_plugins = ("support.cli_fixtures",)


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Any], dict[str, Any]]:
    """``snapshot(model)``: see ``snapshot_of``."""
    return snapshot_of
