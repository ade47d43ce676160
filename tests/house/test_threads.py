"""Threads that use one model at the same time: none sees the rules of another, calls take turns.

What belongs to two threads at a time is brought about by a user's hook that holds one thread in
the middle of its run while the other one works; nothing here depends on which is faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.model_state import snapshot_of
from torch import Tensor
from truth import zoo
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError
from tl_contrastive_lrp.hooks.user_hooks import as_own
from tl_contrastive_lrp.rules import threads

IDS, OTHERS = random_tokens(1, 12), random_tokens(1, 12).flip(1)
RULES = "attnlrp"  # has a rule for every operation
TILED: dict[str, Any] = {"memory": "tiled", "tile": 5, "progress": False}
PATIENCE = 60  # seconds until a test gives up

# Rules at every kind of place: norms and activations, soft-caps, biases and a table of positions,
# and operation by operation inside the wrapped module.
MODELS = ["qwen3", "gemma2", "gpt2", "gpt_oss"]


def model_of(name: str) -> Any:
    return zoo.boot(name) if name == "gpt_oss" else boot(name, torch.float32)


def tensors(found: Any) -> list[Tensor]:
    """All tensors of a result."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, tuple | list):
        return [x for part in found for x in tensors(part)]
    if hasattr(found, "cache_dict"):
        return list(found.cache_dict.values())
    if hasattr(found, "resid"):
        return [found.tokens, found.resid, found.heads, torch.tensor(found.delta)]
    if hasattr(found, "target_site"):
        return [found.weight, found.source_pos, found.target_pos, found.relevance]
    if hasattr(found, "morf"):
        return [found.morf, found.lerf]
    if hasattr(found, "checks"):
        return [torch.tensor([c.figure for c in found.checks]).nan_to_num()]
    return [torch.tensor(found["logit"].tolist())]


def same(found: Any, wanted: Any) -> bool:
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def objective(logits: Tensor) -> Tensor:
    return logits[:, -1, 7].sum() - logits[:, -1, 11].sum()


def in_lrp(model: Any, ids: Tensor) -> Tensor:
    with clrp.lrp(model, RULES):
        return gradient(model, ids)


def gradient(model: Any, ids: Tensor) -> Tensor:
    """At the embeddings, as anyone would compute it with torch alone."""
    hf = model.original_model
    x = hf.get_input_embeddings()(ids).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(objective(hf(inputs_embeds=x).logits), x)
    return g


def patched(model: Any, ids: Tensor) -> Tensor:
    result = clrp.patching.relevance_patch(model, ids.flip(1), ids, objective)
    return torch.tensor(list(result.node_scores.values()))


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "attribute": lambda m, x: clrp.attribute(m, x, objective, rules=RULES),
    "attribute in tiles": lambda m, x: clrp.attribute(m, x, objective, rules=RULES, **TILED),
    "graph": lambda m, x: clrp.attribution_graph(m, x, objective, rules=RULES, heads=True),
    "graph in tiles": lambda m, x: clrp.attribution_graph(
        m, x, objective, rules=RULES, mass=0.9, **TILED
    ),
    "graph over blocks": lambda m, x: clrp.attribution_graph(
        m, x, objective, rules=RULES, layers=[0], progress=False
    ),
    "run_with_relevance": lambda m, x: clrp.run_with_relevance(m, x, objective, rules=RULES),
    "lrp": in_lrp,
    "next tokens in tiles": lambda m, x: clrp.next_token_table(m, x, **TILED),
    "verify": lambda m, x: clrp.verify(m, x, objective=objective),
    "faithfulness": lambda m, x: clrp.faithfulness_curves(
        m, x, torch.arange(x.shape[1]), objective, steps=3, progress=False
    ),
    "baselines": lambda m, x: list(
        clrp.baseline_scores(m, x, objective, ig_steps=2, progress=False).values()
    ),
    "patching": patched,
}


class Held:
    """A hook of the user's that stops one thread each time it passes and lets ``then`` run."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then, self.inside, self.times = then, threading.local(), 0

    def __call__(self, tensor: Tensor, hook: Any) -> None:  # noqa: ARG002
        if not getattr(self.inside, "here", False):
            return
        self.times += 1
        self.then()

    @contextmanager
    def here(self) -> Iterator[None]:
        self.inside.here = True
        try:
            yield
        finally:
            self.inside.here = False


@contextmanager
def other_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


# Every call on one model; on the others one for each way that rules come on.
FEW = ("attribute", "graph in tiles", "run_with_relevance", "lrp")
PAIRS = [(name, call) for name in MODELS for call in CALLS if name == "qwen3" or call in FEW]


@pytest.mark.parametrize(("name", "call"), PAIRS)
def test_a_forward_elsewhere_meanwhile(name: str, call: str) -> None:
    """It is bit for bit what it is alone, with its gradient; and the run it fell into, too."""
    model = model_of(name)
    with weights_fixed(model):
        forward_elsewhere(model, call)


@contextmanager
def weights_fixed(model: Any) -> Iterator[None]:
    """No weight requires a gradient; the model is shared, so afterwards all are as they were."""
    flags = [(p, p.requires_grad) for p in model.original_model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def forward_elsewhere(model: Any, call: str) -> None:
    wanted = CALLS[call](model, IDS)
    logits, g = model(OTHERS), gradient(model, OTHERS)
    before = snapshot_of(model)

    def check() -> None:
        assert torch.equal(model(OTHERS), logits)
        with torch.no_grad():
            assert torch.equal(model(OTHERS), logits)
        assert torch.equal(gradient(model, OTHERS), g)

    with other_thread() as pool:
        held = Held(lambda: pool.submit(check).result(PATIENCE))
        if "tiles" in call:
            as_own(held)  # a user's hook that looks is set aside while the tiles run
        points = [
            p for n, p in model.hook_dict.items()
            if n in ("hook_embed", "embed.hook_out", "blocks.1.hook_in", "unembed.hook_in")
        ]  # fmt: skip
        handles = [point.add_hook(held) for point in {id(p): p for p in points}.values()]
        try:
            with held.here():
                found = CALLS[call](model, IDS)
        finally:
            for point in points:
                point.remove_hooks()
    assert handles
    assert held.times > 0
    assert same(found, wanted)
    assert snapshot_of(model) == before


@pytest.mark.parametrize("second", ["attribute", "lrp", "next tokens in tiles", "graph"])
def test_calls_wait_for_each_other(second: str) -> None:
    """Instead of being refused, or of running on each other's hooks."""
    model = model_of("qwen3")
    wanted = CALLS["attribute"](model, IDS), CALLS[second](model, OTHERS)
    done: list[Any] = []

    def start() -> None:
        if not done:
            done.append(pool.submit(CALLS[second], model, OTHERS))
        with pytest.raises(TimeoutError):
            done[0].result(0.2)

    with other_thread() as pool:
        held = Held(start)
        with model.hooks(fwd_hooks=[("blocks.1.hook_in", held)]), held.here():
            found = CALLS["attribute"](model, IDS)
        assert same(found, wanted[0])
        assert same(done[0].result(PATIENCE), wanted[1])


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_many_threads_at_once(name: str) -> None:
    """Mixed calls, plain forwards and guarded run_with_cache: each as when it runs alone."""
    model = model_of(name)
    kinds = ["attribute", "graph", "attribute in tiles", "lrp", "run_with_relevance"]

    def cached(m: Any, x: Tensor) -> Any:
        with clrp.model_lock(m):
            return m.run_with_cache(x)

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m(x)

    calls = {k: CALLS[k] for k in kinds} | {"cache": cached, "forward": forward}
    jobs = [(k, ids) for _ in range(2) for k in [*calls, "forward", "forward"]
            for ids in (IDS, OTHERS)]  # fmt: skip
    wanted = {(k, id(ids)): calls[k](model, ids) for k in calls for ids in (IDS, OTHERS)}
    before = snapshot_of(model)
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(calls[k], model, ids) for k, ids in jobs]
        for (k, ids), one in zip(jobs, made, strict=True):
            assert same(one.result(PATIENCE), wanted[k, id(ids)]), k
    assert snapshot_of(model) == before


# ---------------------------------------------------------------- blocks, and leaving them


def test_an_open_block_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3")
    wanted = CALLS["attribute"](model, IDS)
    blocks: list[Callable[[Any], Any]] = [clrp.lrp, clrp.in_float32, clrp.model_lock]
    with other_thread() as pool:
        for block in blocks:
            with block(model):
                waiting = pool.submit(CALLS["attribute"], model, IDS)
                with pytest.raises(TimeoutError):
                    waiting.result(0.2)
            assert same(waiting.result(PATIENCE), wanted)
        monkeypatch.setattr(threads, "PATIENCE", 0.1)
        for block in blocks:
            with block(model):
                with pytest.raises(ModelStateError, match=rf"with clrp\.{block.__name__}\(model"):
                    pool.submit(CALLS["attribute"], model, IDS).result(PATIENCE)
                with pytest.raises(ModelStateError, match="take turns"):
                    pool.submit(lambda: clrp.lrp(model).__enter__()).result(PATIENCE)
        assert same(pool.submit(CALLS["attribute"], model, IDS).result(PATIENCE), wanted)


def test_one_thread_may_enter_again() -> None:
    model = model_of("qwen3")
    wanted = CALLS["attribute"](model, IDS)
    with clrp.model_lock(model), clrp.in_float32(model), clrp.model_lock(model):
        assert same(CALLS["attribute"](model, IDS), wanted)
        with clrp.lrp(model), pytest.raises(ModelStateError, match="already on this model"):
            CALLS["attribute"](model, IDS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, AssertionError])
def test_what_ends_a_call_frees_the_model(error: type[BaseException]) -> None:
    model = model_of("qwen3")
    wanted, before = CALLS["attribute"](model, IDS), snapshot_of(model)

    def stop(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        raise error

    for call in ("attribute", "graph", "attribute in tiles", "lrp"):
        with pytest.raises(error), model.hooks(fwd_hooks=[("blocks.1.hook_out", stop)]):
            CALLS[call](model, IDS)
        assert snapshot_of(model) == before
        with other_thread() as pool:
            assert same(pool.submit(CALLS["attribute"], model, IDS).result(PATIENCE), wanted)


def test_a_thread_that_ended_holds_nothing() -> None:
    model = model_of("qwen3")
    kept = []

    def enter() -> None:
        kept.append(clrp.model_lock(model))
        kept[0].__enter__()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    clrp.attribute(model, IDS, objective)
    kept[0].__exit__(None, None, None)
    clrp.attribute(model, IDS, objective)


def test_two_bridges_of_one_model_share_its_lock() -> None:
    module = torch.nn.Linear(1, 1)
    one, other = SimpleNamespace(original_model=module), SimpleNamespace(original_model=module)
    with clrp.model_lock(one), other_thread() as pool:
        waiting = pool.submit(lambda: clrp.model_lock(other).__enter__())
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        threads._turns_of(one).tickets.clear()  # type: ignore[union-attr]
        waiting.result(PATIENCE)


def test_the_lock_of_no_model() -> None:
    with pytest.raises(TypeError, match="must be a TransformerBridge"), clrp.model_lock("gpt2"):
        pass
    with pytest.raises(TypeError, match="must be a TransformerBridge"):
        clrp.attribute("gpt2", IDS, objective)


# ---------------------------------------------------------------- what all threads see


def loss_of(model: Any) -> Tensor:
    return model(OTHERS)[0].log_softmax(-1)[:, 5].sum()


def weight_gradients(model: Any) -> list[Tensor]:
    weights = list(model.original_model.parameters())
    try:
        loss_of(model).backward()
        return [p.grad for p in weights if p.grad is not None]
    finally:
        for p in weights:
            p.grad = None


@pytest.fixture
def trainable() -> Iterator[Any]:
    model = model_of("qwen3")
    flags = {p: p.requires_grad for p in model.original_model.parameters()}
    for p in flags:
        p.requires_grad_(True)
    yield model
    for p, flag in flags.items():
        p.requires_grad_(flag)


@pytest.mark.parametrize("call", ["attribute", "graph", "attribute in tiles", "baselines"])
def test_gradients_of_weights_meanwhile_are_refused(call: str, trainable: Any) -> None:
    """While they are held fixed for all threads; forwards there still give their values."""
    model = trainable
    wanted, loss, gradients = CALLS[call](model, IDS), loss_of(model), weight_gradients(model)
    refused: list[str] = []

    def check() -> None:
        assert torch.equal(loss_of(model), loss)
        try:
            found = weight_gradients(model)
        except ModelStateError as error:
            refused.append(str(error))
        else:  # a part of the call that holds no weights fixed
            assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))

    with other_thread() as pool:
        held = Held(lambda: pool.submit(check).result(PATIENCE))
        # as this package's own, so that it is called in the tiles too
        with model.hooks(fwd_hooks=[("blocks.1.hook_in", as_own(held))]):
            CALLS[call](model, IDS)  # the audit's forward is part of what is tried
            with held.here():
                found = CALLS[call](model, IDS)
        assert held.times > 0
        assert refused
        assert all("clrp.model_lock(model)" in message for message in refused)
        assert same(found, wanted)
        again = pool.submit(weight_gradients, model).result(PATIENCE)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


def test_a_forward_that_began_before_has_no_half_gradient(trainable: Any) -> None:
    """The weights of its first block take part, those of its second were fixed meanwhile."""
    model = trainable
    began, go_on, inside, left = (threading.Event() for _ in range(4))

    def wait_in_first(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        if threading.current_thread().name.startswith("forward"):
            began.set()
            assert go_on.wait(PATIENCE)

    def wait_in_run(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        if threading.current_thread().name.startswith("run"):
            inside.set()
            assert left.wait(PATIENCE)

    wanted, loss = CALLS["attribute"](model, IDS), loss_of(model)
    hooks = [("blocks.0.mlp.hook_out", wait_in_first), ("blocks.0.hook_in", wait_in_run)]
    with (
        model.hooks(fwd_hooks=hooks),
        ThreadPoolExecutor(1, "forward") as forwards,
        ThreadPoolExecutor(1, "run") as runs,
    ):
        forward = forwards.submit(loss_of, model)
        assert began.wait(PATIENCE)
        run = runs.submit(CALLS["attribute"], model, IDS)
        assert inside.wait(PATIENCE)
        go_on.set()
        found = forward.result(PATIENCE)
        left.set()
        assert same(run.result(PATIENCE), wanted)
    assert torch.equal(found, loss)
    with pytest.raises(ModelStateError, match="incomplete"):
        found.backward()


@pytest.mark.parametrize("how", ["in_float32", "verify"])
def test_no_forward_elsewhere_while_weights_are_widened(how: str) -> None:
    model = boot("qwen3", torch.bfloat16)
    logits = model(OTHERS).detach()
    seen: list[str] = []

    def forward() -> None:
        try:
            assert torch.equal(model(OTHERS), logits)
            seen.append("same")
        except ModelStateError as error:
            seen.append(str(error))

    def guarded() -> Tensor:
        with clrp.model_lock(model):
            return model(OTHERS).detach()

    with other_thread() as pool:
        held = Held(lambda: pool.submit(forward).result(PATIENCE))
        with model.hooks(fwd_hooks=[("blocks.1.hook_in", held)]), held.here():
            if how == "verify":
                clrp.verify(model, IDS, objective=objective)
            else:
                with clrp.in_float32(model):
                    held(logits, None)
                    waiting = pool.submit(guarded)
                assert torch.equal(waiting.result(PATIENCE), logits)
        pool.submit(forward).result(PATIENCE)
    assert seen.pop() == "same"
    refused = [s for s in seen if s != "same"]
    assert refused
    assert all("clrp.model_lock(model)" in s for s in refused)
    assert {p.dtype for p in model.original_model.parameters()} == {torch.bfloat16}


def test_a_list_of_hooks_keeps_threads_apart() -> None:
    """Both run the same prompt at the same time: no value of the one enters the other's rules."""
    model = model_of("qwen3")
    with clrp.lrp(model, RULES):
        wanted = gradient(model, IDS)
    hooks = clrp.lrp_hooks(model, RULES)
    held = Held(lambda: assert_gradient(pool.submit(gradient, model, IDS).result(PATIENCE)))

    def assert_gradient(found: Tensor) -> None:
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())

    name = "blocks.1.mlp.in.hook_out"  # between what a rule reads and where it acts
    with other_thread() as pool, model.hooks(fwd_hooks=[*hooks, (name, held)]), held.here():
        assert_gradient(gradient(model, IDS))
    assert held.times == 1
