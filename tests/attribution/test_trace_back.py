"""trace_back: against one backward for each token, linear algebra, and numbers worked by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.grids import diagonal
from support.model_state import snapshot_of
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, hf_model, random_tokens, true_float64
from truth.linear_model import frozen, linear_model
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import plain
from tl_contrastive_lrp.engine.tiled import run as tiled
from tl_contrastive_lrp.errors import FileFormatError, ModelStateError, TokenError
from tl_contrastive_lrp.files import read_result, write_result

module = importlib.import_module("tl_contrastive_lrp.attribution.trace_back")

RULES = tuple(clrp.RULE_SETS)
LENGTH, START, STOP = 14, 5, 11  # prompt 0-4, reasoning 5-10, answer 11-13
THROUGH, SPAN = (START, STOP), (STOP, LENGTH)


@dataclass(frozen=True)
class Chat:
    """A prompt of random tokens with what the model writes after it."""

    model: Any
    ids: Tensor
    logits: Tensor

    @property
    def predicted(self) -> Tensor:
        """f_t from Hugging Face's logits; 0 for the first token."""
        rows = self.logits[:-1]
        own = rows[torch.arange(len(rows)), self.ids[0, 1:]]
        return torch.cat([torch.zeros(1, dtype=rows.dtype), own - rows.mean(-1)])

    @property
    def deviations(self) -> Tensor:
        spread = self.logits[:-1].std(-1)
        return self.predicted / torch.cat([torch.ones(1, dtype=spread.dtype), spread])


def written(name: str, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> Chat:
    """Greedy decoding by Hugging Face's own model, with two tokens that it did not choose."""
    hf, ids = hf_model(name, dtype), random_tokens(1, START)
    with torch.no_grad(), true_float64(hf) if dtype == torch.float64 else nullcontext():
        while ids.shape[1] < length:
            rows = hf(ids).logits[0, -1]
            between = (rows - rows.mean() - 0.5 * rows.std()).abs().argmin()
            others = {START + 2: between, START + 4: rows.argmin()}
            chosen = others.get(ids.shape[1], rows.argmax())
            ids = torch.cat([ids, chosen.reshape(1, 1)], dim=1)
        return Chat(boot(name, dtype), ids, hf(ids).logits[0])


def one_token(ids: Tensor, t: int) -> Any:
    """f_t, as an objective."""
    return lambda logits: logits[0, t - 1, ids[0, t]] - logits[0, t - 1].mean()


def of_span(ids: Tensor, start: int, stop: int) -> Any:
    return lambda logits: sum(one_token(ids, t)(logits) for t in range(start, stop))


def by_token(chat: Chat, first: Tensor, handing: list[int], hops: int, **how: Any) -> list[Tensor]:
    """Every hop, with a backward for each token that hands on its relevance."""
    each = {
        t: clrp.attribute(chat.model, chat.ids, one_token(chat.ids, t), **how).tokens
        for t in handing
    }
    landed = [first]
    for _ in range(hops):
        here = torch.zeros_like(first)
        for t in handing:
            here = here + landed[-1][t] * each[t] / chat.predicted[t]
        landed.append(here)
    return landed


def together(landed: list[Tensor], handing: list[int]) -> Tensor:
    """What all hops brought, but on handing tokens what is left."""
    out = torch.stack(landed).sum(0)
    out[handing] = landed[-1][handing]
    return out


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize(("name", "rules", "hops"), diagonal(FAMILIES, RULES, (1, 2, 3)))
def test_it_is_what_one_backward_for_each_token_gives(name: str, rules: str, hops: int) -> None:
    chat = written(name)
    with true_float64(chat.model):
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops, rules=rules)
        first = clrp.attribute(chat.model, chat.ids, of_span(chat.ids, *SPAN), rules=rules).tokens
        handing = [t for t in range(*THROUGH) if chat.deviations[t] >= 1.0]
        landed = by_token(chat, first, handing, hops, rules=rules)
    assert handing == [5, 6, 8, 10]  # 7 is above the mean, but not far enough; 9 is below
    assert torch.nonzero(trace.handing)[:, 0].tolist() == handing
    for got, wanted in zip(trace.by_hop, landed, strict=True):
        assert off(got, wanted) <= 1e-9
    assert off(trace.tokens, together(landed, handing)) <= 1e-9
    assert off(trace.tokens, landed[0]) > 1e-3  # a hop changes something


def test_a_linear_model_solved_as_a_triangular_system() -> None:
    """All hops at once are (I − M)⁻¹, with a Jacobian by autograd in place of the package."""
    model, ids = linear_model(), random_tokens(1, LENGTH)
    with frozen(model, causal=True):
        with torch.no_grad():
            embedded = model.embed(ids)

        def predicted(x: Tensor) -> Tensor:
            def put(_tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                return x

            logits = model.run_with_hooks(ids, fwd_hooks=[("hook_embed", put)])[0, :-1]
            own = logits[torch.arange(LENGTH - 1), ids[0, 1:]]
            return own - logits.mean(-1)

        jacobian = torch.autograd.functional.jacobian(predicted, embedded)
        f = predicted(embedded).detach()
        shares = torch.einsum("tbid,bid->ti", jacobian, embedded)  # row t is token t + 1
        trace = clrp.trace_back(model, ids, SPAN, THROUGH, hops=None, least=0.0, rules="gradient")
        most = clrp.trace_back(model, ids, SPAN, THROUGH, hops=50, least=0.0, rules="gradient")
    handing = torch.zeros(LENGTH, dtype=torch.bool)
    handing[START:STOP] = f[START - 1 : STOP - 1] > 0
    step = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    step[1:] = shares / f[:, None]
    step[~handing] = 0.0
    first = shares[SPAN[0] - 1 : SPAN[1] - 1].sum(0)
    ever = torch.linalg.solve((torch.eye(LENGTH) - step).T, first)  # what ever was on a token
    assert 2 <= int(handing.sum()) < STOP - START
    assert torch.equal(most.handing, handing)
    assert off(most.tokens[~handing], ever[~handing]) <= 1e-9
    assert float(most.tokens[handing].abs().max()) <= 1e-9
    assert float(trace.by_hop[-1][handing].abs().sum()) <= 0.01 * float(first.abs().sum())
    assert len(trace.hops) <= len(most.hops) <= int(handing.sum()) + 1


def test_numbers_by_hand() -> None:
    """The example of the module: P, then a and b, then c, with f = 5, 4, 6."""
    made_of = {1: [5.0, 0, 0, 0], 2: [3.0, 1, 0, 0], 3: [1.0, 2, 3, 0]}
    ids = torch.tensor([[4, 5, 6, 7]])
    logits = torch.zeros(1, 4, 48, dtype=torch.float64)
    for t, f in {1: 5.0, 2: 4.0, 3: 6.0}.items():
        logits[0, t - 1, ids[0, t]] = f * 48 / 47  # minus the mean of 48, this is f
    model = boot("qwen3", torch.float64)
    real = clrp.attribute(model, ids, of_span(ids, 3, 4))

    def attribute(_model: Any, _ids: Tensor, objective: Any, **_: Any) -> Any:
        leaf = logits.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(leaf), [leaf])
        weights = gradient[0, torch.arange(3), ids[0, 1:]] * 48 / 47
        rows = torch.tensor([made_of[t] for t in (1, 2, 3)], dtype=torch.float64)
        return module.replace(real, tokens=weights @ rows, delta=float(objective(logits)))

    given = SimpleNamespace(logits_around=lambda _: (logits, (0, 1, 2, 3)))
    with (
        mock.patch.object(module, "attribute", attribute),
        mock.patch.object(module, "prefill_prompt", return_value=given),
    ):
        trace = clrp.trace_back(model, ids, (3, 4), (1, 3), hops=2)
    wanted = torch.tensor([[1, 2, 3, 0], [4.25, 0.75, 0, 0], [0.75, 0, 0, 0]]).double()
    assert torch.allclose(trace.by_hop, wanted, atol=1e-12)
    assert torch.allclose(trace.tokens, torch.tensor([6.0, 0, 0, 0]).double(), atol=1e-12)
    account = trace.account
    assert account["received"].round(9).tolist() == [6.0, 5.0, 0.75]
    assert account["prompt"].round(9).tolist() == [1.0, 4.25, 0.75]
    assert account["through"].round(9).tolist() == [5.0, 0.75, 0.0]
    assert account["lost"].abs().max() < 1e-9


# ---------------------------------------------------------------- what follows from it


@pytest.mark.parametrize("name", FAMILIES)
def test_without_hops_it_is_attribute(name: str) -> None:
    chat = written(name)
    ids, rows = chat.ids, range(*SPAN)
    others = [(int(ids[0, t]) + 7) % 48 for t in rows]
    plain_logits = lambda logits: sum(logits[0, t - 1, ids[0, t]] for t in rows)  # noqa: E731
    forms = {
        "mean": of_span(ids, *SPAN),
        "none": plain_logits,
        "ids": lambda logits: (
            plain_logits(logits)
            - sum(logits[0, t - 1, o] for t, o in zip(rows, others, strict=True))
        ),
    }
    with true_float64(chat.model):
        for against, objective in forms.items():
            given = others if against == "ids" else against
            trace = clrp.trace_back(chat.model, ids, SPAN, THROUGH, hops=0, against=given)
            once = clrp.attribute(chat.model, ids, objective, rules="cplrp")
            (hop,) = trace.hops
            assert off(trace.tokens, once.tokens) <= PROMISED[torch.float64]
            assert off(hop.resid, once.resid) <= PROMISED[torch.float64]
            assert hop.positions == once.positions == tuple(range(STOP - 1, LENGTH - 1))
            assert trace.delta == pytest.approx(once.delta, abs=1e-6)
            assert "tokens 11-13" in hop.objective


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_linear_in_the_objective(name: str) -> None:
    chat = written(name)

    def trace(span: Any) -> Tensor:
        return clrp.trace_back(chat.model, chat.ids, span, THROUGH).tokens

    with true_float64(chat.model):
        whole, first, rest = (trace(s) for s in [(11, 14), (11, 12), (12, 14)])
        one, other = (clrp.logit_diff(chat.model, *pair) for pair in [(7, 9), (9, 7)])
        assert off(first + rest, whole) <= 1e-9
        assert off(trace(one), -trace(other)) <= 1e-9
        assert off(trace(lambda logits: 3 * one(logits)), 3 * trace(one)) <= 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_only_moves_to_earlier_tokens_and_ends(name: str) -> None:
    chat = written(name)
    with true_float64(chat.model):
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, (1, LENGTH), hops=50, least=0.0)
    reached = LENGTH - 1
    for landed in trace.by_hop:
        assert not landed[reached:].any()
        on = torch.nonzero((landed != 0) & trace.handing)[:, 0]
        reached = int(on.max()) if len(on) else 0
    assert not trace.by_hop[-1][trace.handing].any()
    assert 2 < len(trace.hops) <= int(trace.handing.sum()) + 1
    assert trace.left == 0.0
    assert not trace.tokens[trace.handing].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_account(name: str) -> None:
    chat = written(name)
    with true_float64(chat.model):
        trace = clrp.trace_back(chat.model, chat.ids, (10, 13), THROUGH, hops=3)
    account, total = trace.account, trace.by_hop.sum(-1)
    held = torch.zeros(LENGTH, dtype=torch.bool)
    held[START:STOP] = ~trace.handing[START:STOP]
    for number, row in account.iterrows():
        places = row["prompt"] + row["through"] + row["held"] + row["rest"]
        scale = 1e-9 * max(1.0, float(trace.by_hop.abs().max()))
        assert abs(places - float(total[number])) <= scale
        assert abs(row["received"] - places - row["lost"]) <= scale
        assert abs(row["lost"] - row["biases"] - row["positions"] - row["other"]) <= scale
        landed = trace.by_hop[number]
        assert abs(row["prompt"] - float(landed[:START].sum())) <= scale
        assert abs(row["held"] - float(landed[held].sum())) <= scale
        assert abs(row["rest"] - float(landed[STOP:].sum())) <= scale
        assert abs(row["abs_total"] - float(landed.abs().sum())) <= scale
    given = [abs(trace.delta), *account["abs_through"].tolist()[:-1]]
    assert account["growth"].tolist() == pytest.approx(list(account["abs_total"] / given))
    handed, received = account["through"].to_numpy()[:-1], account["received"].to_numpy()[1:]
    # objectives' values are kept in float32 or better
    assert abs(handed - received).max() <= 1e-6 * max(1.0, abs(handed).max())
    assert account["held"].abs().max() > 0
    assert trace.left == pytest.approx(account["through"].iloc[-1])
    assert float(trace.tokens.sum()) == pytest.approx(
        sum(account["prompt"] + account["held"] + account["rest"]) + trace.left
    )


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "gemma3"])
def test_nothing_is_lost_under_the_default_rules_without_biases(name: str) -> None:
    """Every hop then hands on all that it received; under RelP it would be many times that."""
    chat = written(name)
    with true_float64(chat.model):
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=None)
        other = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=None, rules="relp")
    assert trace.hops[0].rules == "cplrp"
    scale = max(1.0, float(trace.by_hop.abs().max()))
    assert trace.account["lost"].abs().max() <= 1e-6 * scale  # as values are kept in float32
    assert float(trace.tokens.sum()) == pytest.approx(trace.delta, abs=1e-6 * scale)
    assert other.account["lost"].abs().max() > 0.1
    if other.account["growth"][1:].max() > 1.5:
        assert "times a hop" in repr(other)


def test_tokens_that_the_model_did_not_choose_keep_theirs() -> None:
    chat = written("llama")
    forced = START + 2
    with true_float64(chat.model):
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=4)
        none = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=4, least=100.0)
    assert not trace.handing[forced]
    assert float(trace.tokens[forced]) == pytest.approx(float(trace.by_hop[:, forced].sum()))
    assert len(none.hops) == 1  # nothing to hand on
    assert not none.handing.any()
    assert none.account["held"][0] != 0


def test_a_token_exactly_at_the_mean_keeps_its_relevance() -> None:
    chat = written("llama", torch.float32)

    def level(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        at = torch.arange(logits.shape[1])[:, None] == START - 1
        return torch.where(at, 0.0, logits)

    with chat.model.hooks([("unembed.hook_out", level)]):
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=2, least=0.0)
    assert not trace.handing[START]
    assert bool(trace.by_hop[0][START])
    assert bool(trace.by_hop.isfinite().all())


# ---------------------------------------------------------------- how it runs


@pytest.mark.parametrize("tile", [3, 7, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_tiles_it_is_the_same(name: str, tile: int) -> None:
    chat = written(name, torch.float32, 24)
    how: dict[str, Any] = {"hops": 3, "progress": False}
    spans = ((20, 24), clrp.logit_diff(chat.model, 7, 9), one_token(chat.ids, 22))
    for span in spans:
        once = clrp.trace_back(chat.model, chat.ids, span, (5, 20), memory="plain", **how)
        tiled = clrp.trace_back(
            chat.model, chat.ids, span, (5, 20), memory="tiled", tile=tile, **how
        )
        assert tiled.hops[-1].memory == f"tiled (tile {tile})"
        assert torch.equal(once.handing, tiled.handing)
        largest = float(once.by_hop.abs().max())
        for field in ("tokens", "by_hop"):
            error = (getattr(once, field) - getattr(tiled, field)).abs().max()
            assert float(error) <= 4 * PROMISED[torch.float32] * largest


@pytest.mark.parametrize("memory", ["plain", "tiled"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_it_is_the_same(name: str, memory: Any) -> None:
    chat = written(name, torch.float32, 24)
    eager, fused = (
        clrp.trace_back(
            chat.model, chat.ids, (20, 24), (5, 20), memory=memory, attention=kind, progress=False
        )
        for kind in ("eager", "fused")
    )
    assert fused.hops[0].attention != "eager"
    largest = float(eager.by_hop.abs().max())
    error = (eager.by_hop - fused.by_hop).abs().max()
    assert float(error) <= 4 * PROMISED[torch.float32] * largest


@pytest.fixture
def counted() -> Iterator[dict[str, int]]:
    counts = {"forward": 0, "backward": 0}
    forward, backward = plain._forward, plain.Forward.backward

    def counting(what: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return original(*args, **kwargs)

        return call

    with (
        mock.patch.object(plain, "_forward", counting("forward", forward)),
        mock.patch.object(plain.Forward, "backward", counting("backward", backward)),
    ):
        yield counts


def test_one_forward_and_one_backward_a_hop(counted: dict[str, int]) -> None:
    chat = written("qwen2", torch.float32, 40)
    clrp.attribute(chat.model, chat.ids, clrp.top_logit())  # the first call audits the model
    for hops in (0, 1, 3):
        counted.update(forward=0, backward=0)
        trace = clrp.trace_back(chat.model, chat.ids, (36, 40), (5, 36), hops)
        assert len(trace.hops) == hops + 1
        assert counted == {"forward": 1, "backward": hops + 1}


def test_in_tiles_one_prefill_serves_all_hops() -> None:
    chat = written("qwen2", torch.float32, 40)
    with mock.patch.object(tiled, "_prefill", side_effect=tiled._prefill) as prefills:
        trace = clrp.trace_back(
            chat.model, chat.ids, (36, 40), (5, 36), 3, memory="tiled", tile=9, progress=False
        )
    assert len(trace.hops) == 4
    assert prefills.call_count == 1


def test_texts_and_tables() -> None:
    model = boot("gemma2", torch.float32)
    text = "a b c d e f g h i j"
    trace = clrp.trace_back(model, text, (9, 11), (4, 9), hops=1, least=0.0)
    assert "".join(trace.str_tokens) == "<bos>" + text
    assert trace.hops[0].prepended_bos is True
    assert trace.hops[1].prepended_bos is True
    frame = trace.to_frame()
    assert frame["relevance"].tolist() == pytest.approx(trace.tokens.tolist())
    assert frame["hop_1"].tolist() == pytest.approx(trace.by_hop[1].tolist())
    assert frame["handing"].tolist() == trace.handing.tolist()
    top = trace.top(3)["relevance"].abs().tolist()
    assert top == sorted(frame["relevance"].abs(), reverse=True)[:3]
    assert repr(trace).startswith("Trace(")
    assert "1 hop, " in repr(trace)
    assert "mean of all logits" in str(trace.show())


def test_files(tmp_path: Path) -> None:
    chat = written("gpt2", torch.float32)
    for span in (SPAN, clrp.top_logit()):
        trace = clrp.trace_back(chat.model, chat.ids, span, THROUGH, hops=2)
        read = clrp.Trace.load(trace.save(tmp_path / "trace.safetensors"))
        assert torch.equal(read.tokens, trace.tokens)
        assert torch.equal(read.handing, trace.handing)
        assert all(
            torch.equal(a.resid, b.resid) for a, b in zip(read.hops, trace.hops, strict=True)
        )
        assert read.account.equals(trace.account)
        assert (read.span, read.through, read.least) == (trace.span, trace.through, trace.least)
        assert repr(read) == repr(trace)


@pytest.mark.parametrize("break_", ["kind", "hop", "count", "short"])
def test_damaged_files(tmp_path: Path, break_: str) -> None:
    chat = written("gpt2", torch.float32)
    trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=1)
    path = trace.save(tmp_path / "trace.safetensors")
    if break_ == "kind":
        trace.hops[0].save(path)
    elif break_ == "short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        kind = importlib.import_module("tl_contrastive_lrp.attribution.trace")._FILE
        tensors, data = read_result(path, kind)
        data |= {"hops": 3} if break_ == "count" else {}
        tensors |= {"hop_1": tensors["hop_1"][:-9]} if break_ == "hop" else {}
        write_result(path, kind, tensors, data)
    with pytest.raises(FileFormatError, match=r"trace\.safetensors"):
        clrp.Trace.load(path)


def test_with_hooks_of_the_user() -> None:
    """Hooks are part of the model: f_t and relevance are those of the edited model."""
    chat = written("qwen3")

    def halved(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return 0.5 * tensor

    with true_float64(chat.model), chat.model.hooks([("blocks.0.hook_mlp_out", halved)]):
        with torch.no_grad():
            edited = Chat(chat.model, chat.ids, chat.model(chat.ids)[0])
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=1)
        objective = of_span(chat.ids, *SPAN)
        first = clrp.attribute(chat.model, chat.ids, objective, rules="cplrp").tokens
        handing = [t for t in range(*THROUGH) if edited.deviations[t] >= 1.0]
        landed = by_token(edited, first, handing, 1, rules="cplrp")
    assert torch.nonzero(trace.handing)[:, 0].tolist() == handing
    assert handing
    assert off(trace.by_hop[1], landed[1]) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_in_low_precision_it_is_the_same_in_float32(name: str, dtype: torch.dtype) -> None:
    """Backwards over a forward in low precision are float32, so hops are sums of theirs."""
    low, ids = boot(name, dtype), written(name, torch.float32).ids
    with torch.no_grad():
        chat = Chat(low, ids, low(ids)[0].float())
    trace = clrp.trace_back(low, ids, SPAN, THROUGH, hops=1)
    handing = torch.nonzero(trace.handing)[:, 0].tolist()
    landed = by_token(chat, trace.by_hop[0], handing, 1, rules="cplrp")
    assert trace.tokens.dtype == torch.float32
    assert off(trace.by_hop[1], landed[1]) <= 10 * PROMISED[torch.float32]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"span": (11, 15)}, TokenError, "outside these 14 tokens"),
        ({"span": (-2, 14)}, TokenError, r"the last token alone is \(13, 14\)"),
        ({"span": (12, 12)}, TokenError, "empty"),
        ({"span": (0, 3)}, TokenError, "nothing predicts"),
        ({"span": 12}, TokenError, "two whole numbers"),
        ({"span": (11.0, 14)}, TokenError, "two whole numbers"),
        ({"through": (0, 5)}, TokenError, "start at 1"),
        ({"through": (5, 5)}, TokenError, "empty"),
        ({"through": (5, 99)}, TokenError, "outside these 14 tokens"),
        ({"through": None}, TokenError, "through=None"),
        ({"span": (3, 5)}, TokenError, "begin it before position 4"),
        ({"span": (3, 9)}, TokenError, "End it at 9 or before"),
        ({"span": clrp.top_logit(pos=3)}, TokenError, "begin it before position 4"),
        ({"span": clrp.top_logit(pos=8)}, TokenError, "End it at 10 or before"),
        ({"span": clrp.top_logit(), "against": "mean"}, TypeError, "against= belongs to a span"),
        ({"span": clrp.top_logit(pos=[3, 4])}, TokenError, "one prompt"),
        ({"against": "top"}, TokenError, "use 'mean', 'none', or a list of 3"),
        ({"against": [5, 6]}, TokenError, "a list of 3"),
        ({"against": [5, 6, 48]}, TokenError, "0 to 47"),
        ({"hops": -1}, ValueError, "hops=-1"),
        ({"hops": 1.5}, ValueError, "hops=1.5"),
        ({"hops": True}, ValueError, "hops=True"),
        ({"least": -1.0}, ValueError, "least=-1.0"),
        ({"least": float("nan")}, ValueError, "least=nan"),
        ({"memory": "little"}, ValueError, "memory='little'"),
        ({"attention": "some"}, ValueError, "attention='some'"),
    ],
)
def test_refusals(given: dict[str, Any], error: type[Exception], says: str) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, LENGTH)
    before = snapshot_of(model)
    with pytest.raises(error, match=says):
        clrp.trace_back(model, ids, **{"span": SPAN, "through": THROUGH, **given})
    assert snapshot_of(model) == before


def test_a_span_is_not_held_against_itself() -> None:
    chat = written("qwen3", torch.float32)
    same = chat.ids[0, slice(*SPAN)].tolist()
    with pytest.raises(TokenError, match="every token of the span against itself"):
        clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, against=same)
    changed = [same[0], same[1], (same[2] + 1) % 48]
    trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=0, against=changed)
    one = clrp.logit_diff(chat.model, same[2], changed[2], pos=LENGTH - 2)
    alone = clrp.attribute(chat.model, chat.ids, one, rules="cplrp")
    assert off(trace.tokens, alone.tokens) <= PROMISED[torch.float32]


@pytest.mark.parametrize(
    "how",
    [{"memory": "tiled", "tile": 3, "progress": False}, {"memory": "plain", "attention": "fused"}],
)
def test_only_logits_of_the_span_and_the_reasoning_are_kept(how: dict[str, Any]) -> None:
    chat = written("qwen3", torch.float32)
    rows: list[int] = []
    real = module.prefill_prompt

    def watched(*given: Any, **more: Any) -> Any:
        prefilled = real(*given, **more)
        forward = prefilled.plain or prefilled.tiled.prefill
        logits = forward.logits if prefilled.plain is not None else forward.logits()
        rows.append(logits.shape[1])
        return prefilled

    with mock.patch.object(module, "prefill_prompt", watched):
        trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=2, **how)
    read = {*range(SPAN[0] - 1, SPAN[1] - 1), *range(THROUGH[0] - 1, THROUGH[1] - 1)}
    assert rows == [len(read)]
    assert len(read) < LENGTH
    whole = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=2, memory="plain")
    assert off(trace.tokens, whole.tokens) <= 1e-5


def test_no_bridge() -> None:
    with pytest.raises(TypeError):
        clrp.trace_back(object(), random_tokens(), (4, 6), (1, 4))


def test_a_trace_that_does_not_fit_together() -> None:
    chat = written("qwen3", torch.float32)
    trace = clrp.trace_back(chat.model, chat.ids, SPAN, THROUGH, hops=1)
    with pytest.raises(ValueError, match="at least one hop"):
        module.replace(trace, hops=())
    with pytest.raises(ValueError, match="no mask"):
        module.replace(trace, through=(1, 3))


def test_an_encoder_is_refused() -> None:
    model = zoo.boot("bert", torch.float32)
    clrp.attribute(model, random_tokens(), clrp.top_logit())  # the first forward leaves hooks
    before = snapshot_of(model)
    with pytest.raises(ModelStateError, match="not causal"):
        clrp.trace_back(model, random_tokens(1, LENGTH), (8, 10), (3, 8), least=0.0)
    assert snapshot_of(model) == before


def test_the_prompt_may_be_a_chat() -> None:
    model, ids = boot("llama"), random_tokens(1, 12)
    texts = clrp.attribute(model, ids, clrp.top_logit()).str_tokens
    message = clrp.Segment("user 1", "user", "user", 0, 12, "".join(texts))
    chat = clrp.ChatPrompt("".join(texts), ids[0], (message,), texts)
    trace = clrp.trace_back(model, chat, (10, 12), through=(5, 10))
    assert [hop.segments for hop in trace.hops] == [(message,)] * len(trace.hops)


def test_the_difference_of_two_answers_is_refused() -> None:
    """Not with words about an argument that the caller did not give."""
    model, ids = boot("llama"), random_tokens(1, 12)
    answers = clrp.answer_diff(model, ids, target=[5, 6], contrast=[7])
    with pytest.raises(TypeError, match="trace_back explains one answer"):
        clrp.trace_back(model, ids, answers, through=(5, 10))
