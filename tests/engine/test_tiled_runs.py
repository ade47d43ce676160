"""Runs in tiles that stop, that do not fit, or that cannot be: nothing breaks, nothing is lost."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiling import FIELDS, PLAIN, TILED, assert_same
from torch import Tensor
from truth import zoo
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.engine.tiled import backward as tiled_backward
from tl_contrastive_lrp.engine.tiled import run as tiled_run
from tl_contrastive_lrp.engine.tiled.checkpoint import Checkpoint
from tl_contrastive_lrp.errors import FileFormatError, ModelStateError

# ---------------------------------------------------------------- stopping and going on


class Stopped(Exception):
    pass


def state_of(model: Any) -> list[Any]:
    hooks = [(n, len(p.fwd_hooks), len(p.bwd_hooks)) for n, p in model.hook_dict.items()]
    modules = [
        (n, len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.original_model.named_modules()
    ]
    return hooks + modules + [p.requires_grad for p in model.original_model.parameters()]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """stop_after(k, error): the run stops in the k-th block from the top, in its second tile."""

    def arrange(blocks: int, error: type[BaseException]) -> None:
        done = {"blocks": 0, "tiles": 0}
        layer, replayed = tiled_backward.Backward.layer, tiled_backward.Backward._replayed

        def counted_layer(self: Any, *args: Any) -> Any:
            done["blocks"], done["tiles"] = done["blocks"] + 1, 0
            return layer(self, *args)

        def counted_tile(self: Any, *args: Any) -> Any:
            done["tiles"] += 1
            if done["blocks"] > blocks and done["tiles"] == 2:
                raise error
            return replayed(self, *args)

        monkeypatch.setattr(tiled_backward.Backward, "layer", counted_layer)
        monkeypatch.setattr(tiled_backward.Backward, "_replayed", counted_tile)

    return arrange


def test_interrupting_leaves_the_model_as_it_was(stop_after: Any) -> None:
    model = boot("gemma3", torch.float32)
    objective, before = clrp.logit_diff(model, 7, 11), state_of(model)
    stop_after(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        clrp.attribute(model, random_tokens(1, 30), objective, **TILED)
    assert state_of(model) == before


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("kind", ["nodes", "edges"])
def test_a_stopped_run_goes_on_with_the_same_bits(
    kind: str, blocks: int, stop_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = boot("gemma3", torch.float32)
    ids, objective = random_tokens(1, 30), clrp.logit_diff(model, 7, 11)

    def run(**more: Any) -> dict[str, Tensor]:
        if kind == "nodes":
            found: Any = clrp.attribute(model, ids, objective, **TILED, **more)
            return {name: getattr(found, name) for name in FIELDS[:3]}
        found = clrp.attribution_graph(model, ids, objective, mass=0.9, **TILED, **more)
        names = ("relevance", "weight", "source_pos", "target_pos", "source_site")
        return {name: getattr(found, name) for name in names} | {
            "kept": torch.tensor([found.history[0].mass_kept, found.history[0].mass_before])
        }

    wanted = run()
    with monkeypatch.context():
        stop_after(blocks, Stopped)
        with pytest.raises(Stopped):
            run(checkpoint_dir=tmp_path / "run")
    monkeypatch.undo()
    files = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert files == [f"block_{i}.safetensors" for i in range(3 - blocks, 3)]
    runs = []
    layer = tiled_backward.Backward.layer
    monkeypatch.setattr(
        tiled_backward.Backward, "layer", lambda *args: (runs.append(args[1]), layer(*args))[1]
    )
    found = run(checkpoint_dir=tmp_path / "run")
    assert runs == list(range(2 - blocks, -1, -1))  # finished blocks are not run again
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_run_goes_on_in_the_tiles_it_was_begun_in(
    stop_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if more memory is free by now, and another tile would be chosen."""
    model, ids = boot("gemma3", torch.float32), random_tokens(1, 30)
    objective, folder = clrp.logit_diff(model, 7, 11), tmp_path / "run"
    asked: dict[str, Any] = {"memory": "tiled", "progress": False}
    wanted = clrp.attribute(model, ids, objective, tile=5, **asked)
    stop_after(1, Stopped)
    with pytest.raises(Stopped):
        clrp.attribute(model, ids, objective, tile=5, checkpoint_dir=folder, **asked)
    monkeypatch.undo()
    assert Checkpoint(folder).tile() == 5
    found = clrp.attribute(model, ids, objective, checkpoint_dir=folder, **asked)
    assert found.memory == "tiled (tile 5)"
    assert torch.equal(found.resid, wanted.resid)
    assert torch.equal(found.tokens, wanted.tokens)


def test_a_tile_given_anew_finishes_what_was_begun(
    stop_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = boot("gemma3", torch.float32), random_tokens(1, 30)
    objective, folder = clrp.logit_diff(model, 7, 11), tmp_path / "run"
    stop_after(2, Stopped)
    with pytest.raises(Stopped):
        clrp.attribute(model, ids, objective, **TILED, checkpoint_dir=folder)
    monkeypatch.undo()
    done = (folder / "block_2.safetensors").read_bytes()
    found = clrp.attribute(model, ids, objective, **{**TILED, "tile": 11}, checkpoint_dir=folder)
    assert found.memory == "tiled (tile 11)"
    assert (folder / "block_2.safetensors").read_bytes() == done
    assert_same(clrp.attribute(model, ids, objective, **PLAIN), found)


def test_a_folder_belongs_to_one_question(tmp_path: Path) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 12)
    clrp.attribute(model, ids, clrp.logit_diff(model, 7, 11), **TILED, checkpoint_dir=tmp_path)
    with pytest.raises(FileFormatError, match="another run"):
        clrp.attribute(model, ids, clrp.logit_diff(model, 7, 12), **TILED, checkpoint_dir=tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileFormatError, match=r"mine\.txt"):
        clrp.attribute(model, ids, clrp.logit_diff(model, 7, 11), **TILED, checkpoint_dir=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("where", ["prefill", "in a block", "embeddings"])
def test_out_of_memory_halves_the_tile_and_goes_on_from_the_block_reached(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several objectives, biases (whose sums must not count twice) and edges."""
    model, ids = boot("gpt2", torch.float32), random_tokens(1, 40)
    objectives = [clrp.logit_diff(model, 7, 11), clrp.logit_diff(model, 3, 5, pos=21)]
    plain = clrp.attribute_each(model, ids, objectives, **PLAIN)
    graphs = clrp.attribution_graphs(model, ids, objectives, top_k=50, **PLAIN)
    place = {
        "prefill": (tiled_run, "prefill"),
        "in a block": (tiled_backward.Backward, "_tile"),
        "embeddings": (tiled_backward.Backward, "embeddings"),
    }[where]
    real, ran = getattr(*place), []
    layer, top = tiled_backward.Backward.layer, int(model.cfg.n_layers) - 1

    def full(*args: Any) -> Any:
        bounds = args[3] if where == "prefill" else args[0].forward.bounds
        late = where != "in a block" or (args[1] == 1 and args[2] == 0)  # the tile done last
        if late and max(stop - start for start, stop in bounds) > 18:
            raise torch.OutOfMemoryError("full")
        return real(*args)

    def counted(self: Any, at: int) -> None:
        ran.append(at)
        layer(self, at)

    monkeypatch.setattr(*place, full)
    monkeypatch.setattr(tiled_backward.Backward, "layer", counted)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tiled = clrp.attribute_each(model, ids, objectives, **{**TILED, "tile": 64})
    assert [str(w.message)[:25] for w in said] == ["The GPU ran out of memory"]
    # 64, 32, 16: what was finished stays so
    again = [1] if where == "in a block" else []
    assert ran == [top, *(x for x in (1,) if x < top), *again, *again, 0]
    for wanted, got in zip(plain, tiled, strict=True):
        assert got.memory == "tiled (tile 16)"
        assert_same(wanted, got)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = clrp.attribution_graphs(model, ids, objectives, top_k=50, **{**TILED, "tile": 64})
    for one, other in zip(graphs, again, strict=True):
        assert torch.equal(one.source_pos, other.source_pos)
        assert torch.equal(one.target_pos, other.target_pos)
        assert torch.allclose(one.weight, other.weight, atol=1e-5, rtol=1e-4)


def test_out_of_memory_in_small_tiles_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = boot("qwen3", torch.float32)
    before = state_of(model)

    def full(self: Any, at: int) -> None:  # noqa: ARG001
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tiled_backward.Backward, "layer", full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            clrp.attribute(model, random_tokens(), clrp.logit_diff(model, 7, 11), **TILED)
    assert state_of(model) == before


def test_auto_takes_tiles_where_the_plain_way_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 40)
    objective = clrp.logit_diff(model, 7, 11)
    assert clrp.attribute(model, ids, objective).memory == "plain"
    need = memory.plain_bytes(model, 40)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need // 2)  # noqa: ARG005
    found = clrp.attribute(model, ids, objective, progress=False)
    assert found.memory == "tiled (tile 16)"
    assert_same(clrp.attribute(model, ids, objective, **PLAIN), found)


# Its own way to choose keys, from a state beside them; no cache; the first GPT's lists.
@pytest.mark.parametrize("name", ["glm_moe_dsa", "bert", "openai_gpt"])
def test_what_cannot_run_in_tiles_runs_without_or_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = zoo.boot(name, torch.float32), random_tokens(1, 12)
    objective = clrp.logit_diff(model, 7, 11)
    with pytest.raises(ModelStateError, match="This model cannot run in tiles: "):
        clrp.attribute(model, ids, objective, **TILED)
    with pytest.raises(ModelStateError, match="This model cannot run in tiles: "):
        clrp.attribution_graph(model, ids, objective, **TILED)
    # Where tiles are planned, and the plain engine turns out to fit.
    room = import_module("tl_contrastive_lrp.engine.run")
    monkeypatch.setattr(room, "plan_memory", lambda *_, **__: memory.MemoryPlan(7, 1, 1000))
    assert clrp.attribute(model, ids, objective, progress=False).memory == "plain"


def test_what_has_no_cache_is_refused_with_the_memory_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.boot("bert", torch.float32)
    ids, objective = random_tokens(1, 12), clrp.logit_diff(model, 7, 11)
    with pytest.raises(ModelStateError, match=r"cannot run in tiles: .* memory='plain', which"):
        clrp.attribute(model, ids, objective, **TILED)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1024)  # noqa: ARG005
    need = memory.gib(memory.plain_bytes(model, 12))
    with pytest.raises(ModelStateError, match=f"needs about {need} without tiles, and 0 MiB"):
        clrp.attribute(model, ids, objective)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": "little"}, "'auto', 'plain' or 'tiled'"),
        ({"memory": "tiled", "tile": 0}, "1 or more"),
        ({"memory": "tiled", "tile": True}, "1 or more"),
        ({"memory": "plain", "tile": 4}, "leave it out"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(ValueError, match=words):
        clrp.attribute(model, random_tokens(), clrp.logit_diff(model, 7, 11), **settings)
