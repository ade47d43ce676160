"""Everything on a pretended device without float64, in a process of its own; JSON lines."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from truth import zoo

import tl_contrastive_lrp as clrp
from support import pretend_device
from support.device_child import OTHER, TILES, _off, boot, say

IDS = zoo.random_tokens(24)
SMALL: dict[str, Any] = {**TILES, "tile": 9}


def numbers(found: Any) -> list[Tensor]:
    """All numbers of a result, as tensors."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, float):
        return [torch.tensor(found)]
    if isinstance(found, tuple | list):
        return [x for part in found for x in numbers(part)]
    if isinstance(found, dict):
        return numbers([found[key] for key in sorted(found, key=str)])
    if hasattr(found, "cache_dict"):
        return numbers(found.cache_dict)
    if hasattr(found, "select_dtypes"):
        return [torch.tensor(found.select_dtypes("number").to_numpy().copy()).nan_to_num()]
    if dataclasses.is_dataclass(found):
        values = [getattr(found, f.name) for f in dataclasses.fields(found)]
        return [v for v in values if isinstance(v, Tensor)] + [
            torch.tensor(float(v)) for v in values if isinstance(v, float)
        ]
    raise AssertionError(type(found))


def diff(model: Any) -> Any:
    return clrp.logit_diff(model, 7, 12)


def custom(logits: Tensor) -> Tensor:
    return logits[0, -1, 7] - logits[0, 5, 3] + logits[0, 20].square().mean()


def checks(model: Any, ids: Tensor) -> list[Tensor]:
    """Of ``verify``: each verdict as a number, and what conservation has accounted for."""
    found = clrp.verify(model, ids, objective=diff(model))
    order = ("ok", "warning", "failed", "skipped")
    from tl_contrastive_lrp.evaluation.verification.conservation import conservation_account

    verdicts = torch.tensor([float(order.index(c.verdict)) for c in found.checks])
    account = conservation_account(model, ids, diff(model))
    return [verdicts, *numbers(account)]


def patched(model: Any, ids: Tensor) -> list[Any]:
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig

    clean = ids.flip(1)
    _, cache = model.run_with_cache(clean)
    objective = diff(model)
    sweep = clrp.patching.get_relevance_patch_resid_pre(model, ids, cache, objective)
    every = clrp.patching.get_relevance_patch_block_every(
        model, ids, cache, {"a": objective, "b": objective}, baseline=True
    )
    nodes = clrp.patching.relevance_patch(model, clean, ids, objective)
    agreed = clrp.compare(sweep, sweep * 1.01, baseline=objective(model(ids)))
    found = [sweep, every.values, list(nodes.node_scores.values()), agreed.measured]
    if model.tag == "qwen3":
        config = EdgeAttributionConfig(granularity="edge")
        edges = clrp.patching.relevance_patch(model, clean, ids, objective, config)
        found.append(list(edges.edge_scores.values()))
    return [torch.tensor(x) if isinstance(x, list) else x for x in found]


def circuits(model: Any, ids: Tensor) -> list[Any]:
    graph = clrp.attribution_graph(model, ids, diff(model), progress=False)
    given: dict[str, Any] = {"corrupted": ids.flip(1)}
    one = clrp.circuit_faithfulness(model, graph.prune(mass=0.9), diff(model), **given)
    curve = clrp.circuit_curve(
        model, graph, diff(model), fractions=[0.1, 0.5], progress=False, **given
    )
    return [one.delta, [point.delta for point in curve.points]]


def ranked(model: Any, ids: Tensor) -> list[Any]:
    how: dict[str, Any] = {"progress": False}
    scores = clrp.baseline_scores(model, ids, diff(model), ig_steps=3, **how)
    scores |= {"relevance": clrp.attribute(model, ids, diff(model))}  # type: ignore[dict-item]
    zero = clrp.faithfulness_curves(model, ids, scores, diff(model), steps=3, **how)
    drawn = clrp.faithfulness_curves(
        model, ids, torch.arange(24), diff(model), steps=3, replace="random", draws=2, **how
    )
    return [zero.morf, zero.lerf, drawn.morf, list(zero.area.values())]


def looked_into(model: Any, ids: Tensor) -> list[Any]:
    graph = clrp.attribution_graph(model, ids, diff(model), heads=True, details=True)
    s, t, i, j = (int(getattr(graph, n)[-1]) for n in (
        "source_site", "target_site", "source_pos", "target_pos"
    ))  # fmt: skip
    edge = graph.explain_edge((s, i), (t, j), model=model, objective=diff(model))
    node = graph.explain_node(t, j) if graph.neurons is not None else edge
    return [float(edge["relevance"].sum()), float(node["relevance"].sum())]


def resumed(model: Any, ids: Tensor) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {**SMALL, "top_k": 40, "checkpoint_dir": Path(folder) / "run"}
        return [clrp.attribution_graph(model, ids, diff(model), **how) for _ in range(2)]


def graph(**how: Any) -> Callable[[Any, Tensor], Any]:
    def made(model: Any, ids: Tensor) -> Any:
        found = clrp.attribution_graph(model, ids, diff(model), **{"progress": False, **how})
        # what is as large as the threshold may be kept or not
        return [found.relevance, found.weight.abs().sort().values.flip(0)[:60]]

    return made


def in_lrp(model: Any, ids: Tensor) -> Tensor:
    kept: dict[str, Tensor] = {}

    def leaf(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept["x"] = x.detach().requires_grad_(True)
        return kept["x"]

    with model.hooks(fwd_hooks=[("hook_embed", leaf)]), clrp.lrp(model):
        value = custom(model(ids))
    (g,) = torch.autograd.grad(value, kept["x"])
    return (kept["x"].detach() * g).sum(-1)


RUNS: dict[str, Callable[[Any, Tensor], Any]] = {
    "audit": lambda m, x: float(len(clrp.audit(m).findings)),  # noqa: ARG005
    "attribute": lambda m, x: clrp.attribute(m, x, custom, neurons=m.tag == "qwen3"),
    "attribute in tiles": lambda m, x: clrp.attribute(m, x, custom, **SMALL),
    "run_with_relevance": lambda m, x: clrp.run_with_relevance(m, x, diff(m)),
    "lrp": in_lrp,
    "next tokens": lambda m, x: clrp.next_token_table(m, x),
    "next tokens in tiles": lambda m, x: clrp.next_token_table(m, x, **SMALL),
    "graph": graph(granularity="sublayer"),
    "graph by heads": graph(heads=True, details=True),
    "graph by mass": graph(mass=0.9),
    "graph over blocks": graph(layers=[0]),
    "tiled graph": graph(**SMALL),
    "tiled graph by mass": graph(mass=0.9, **SMALL),
    "tiled graph by threshold": graph(threshold=1e-3, **SMALL),
    "tiled graph by top_k": graph(top_k=50, **SMALL),
    "tiled graph by heads": graph(heads=True, details=True, mass=0.9, **SMALL),
    "resumed": resumed,
    "verify": checks,
    "patching": patched,
    "circuits": circuits,
    "faithfulness": ranked,
    "looked into": looked_into,
}

# What asks for float64 somewhere, on every further model.
AGAIN = ("next tokens", "tiled graph by mass", "verify", "patching", "faithfulness")


def forbidden(call: Callable[[], object]) -> str:
    try:
        call()
    except TypeError as error:
        return str(error)
    return "nothing"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pretend_device.set_up(float64=False)
    x = torch.ones(3).to(OTHER)
    say(
        forbidden=[
            forbidden(x.double),
            forbidden(lambda: x.to("cpu", torch.float64)),
            forbidden(lambda: x.sum(dtype=torch.float64)),
            forbidden(lambda: torch.zeros(2, dtype=torch.float64, device=OTHER)),
            forbidden(lambda: torch.ones(2, dtype=torch.float64).to(OTHER)),
            forbidden(lambda: x.to(torch.complex128)),
        ]
    )
    for name in names:
        here, there = boot(name), boot(name).to(OTHER)
        here.tag = there.tag = name
        for what in RUNS if name == names[0] else AGAIN:
            call = RUNS[what]
            wanted = numbers(call(here, IDS))
            try:
                found = [x.cpu().double() for x in numbers(call(there, IDS.to(OTHER)))]
            except Exception as error:
                say(name=name, what=what, error=f"{type(error).__name__}: {error}")
                continue
            off = max(_off(*pair) for pair in zip(found, wanted, strict=True))
            say(name=name, what=what, off=off, n=sum(x.numel() for x in wanted))


if __name__ == "__main__":
    main(sys.argv[1].split(","))
