"""The bridge as a whole: what is computed once per call, and what a bias is."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from truth import zoo

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.inputs.bridge import bias_of, components, hook_points, module_names
from tl_contrastive_lrp.rules.threads import (
    acting_for,
    caller,
    modules_of,
    paths_under,
    shared_views,
    wrapped_modules,
)


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return clrp.load_demo_model()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that TransformerLens builds its table of HookPoints."""
    built: list[int] = []
    build = TransformerBridge.hook_dict.fget

    def counted(self: TransformerBridge) -> object:
        built.append(1)
        return build(self)

    monkeypatch.setattr(TransformerBridge, "hook_dict", property(counted))
    return built


@pytest.mark.parametrize("settings", [{}, {"memory": "tiled", "tile": 16, "progress": False}])
def test_a_call_builds_the_table_of_hook_points_once(
    model: TransformerBridge, builds: list[int], settings: dict[str, object]
) -> None:
    case = clrp.load_demo_cases("code")[0]
    objective = clrp.logit_diff(model, case.target, case.contrast)
    clrp.attribute(model, case.prompt, objective, **settings)  # also audits the model
    builds.clear()
    clrp.attribute(model, case.prompt, objective, **settings)
    assert len(builds) == 1


def test_paths_are_those_of_torch(model: TransformerBridge) -> None:
    shared, tree = nn.Linear(2, 2), nn.Sequential()
    tree.first = nn.Sequential(nn.ReLU(), shared)
    tree.second = nn.ModuleDict({"again": shared, "other": nn.Sequential(nn.Tanh())})
    tree.register_module("none", None)
    tree.second["up"] = tree.first  # reached by two paths
    for root in (tree, model, model.original_model, nn.ReLU()):
        assert [(path, m) for m, path in paths_under(root).items()] == list(root.named_modules())
    assert wrapped_modules(model) == paths_under(model.original_model)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral"])
def test_components_are_what_their_paths_name(name: str) -> None:
    bridge = zoo.boot(name)
    found = components(bridge)
    assert len(found) > 5 * int(bridge.cfg.n_layers)
    for path, component in found.items():
        assert bridge.get_submodule(path) is component, path


@pytest.mark.parametrize("view", [hook_points, components, module_names, modules_of])
def test_a_view_is_shared_within_a_call_and_computed_again_at_the_next(
    model: TransformerBridge, view: object
) -> None:
    assert view(model) is not view(model)
    with shared_views(model):
        first = view(model)
        with shared_views(model):  # a public function called by another
            assert view(model) is first
        assert view(model) is first
    with shared_views(model):
        assert view(model) is not first
        assert list(view(model)) == list(first)


def test_the_next_call_sees_a_module_that_was_added(model: TransformerBridge) -> None:
    with shared_views(model):
        before = modules_of(model)
    added = nn.Linear(2, 2)
    model.blocks[0].original_component.add_module("added", added)
    try:
        with shared_views(model):
            assert added in modules_of(model)
            assert len(modules_of(model)) == len(before) + 1
    finally:
        del model.blocks[0].original_component._modules["added"]


def test_a_view_belongs_to_a_thread_and_to_those_that_act_for_it(
    model: TransformerBridge,
) -> None:
    seen: list[object] = []
    with shared_views(model):
        own, me = hook_points(model), caller()

        def elsewhere() -> None:
            seen.append(hook_points(model))
            seen.append(acting_for(me, hook_points, model))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen[0] is not own
    assert seen[1] is own


def test_a_call_that_fails_leaves_no_view(model: TransformerBridge) -> None:
    with pytest.raises(clrp.errors.PromptError):
        clrp.attribute(model, "", clrp.top_logit())
    assert not caller().views


def test_a_bias_is_a_vector_of_the_modules_own() -> None:
    linear, mask = nn.Linear(2, 3), nn.Module()
    mask.register_buffer("bias", torch.ones(1, 1, 4, 4))
    flag = nn.Module()
    flag.bias = True
    assert bias_of(linear) is linear.bias
    assert bias_of(nn.Linear(2, 3, bias=False)) is None
    assert bias_of(mask) is None
    assert bias_of(flag) is None
    assert bias_of(nn.Sequential(linear)) is None
    assert bias_of(None) is None
