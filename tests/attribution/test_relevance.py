"""run_with_relevance: shapes, filters, precision, and what it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.grids import diagonal, grid
from support.hooking import Snapshot, fresh, objective_of
from torch import Tensor
from transformer_lens import ActivationCache
from truth.families import FAMILIES, boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError

RULES = tuple(clrp.RULE_SETS)
# What holds no relevance: ids, positions, rotary tables, and the statistics of norms.
NOTHING = ("embed.hook_in", "hook_cos", "hook_sin", "hook_scale", "rotary_emb.hook_in",
           "rotary_emb.hook_out", "hook_hidden_states")  # fmt: skip


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULES))
def test_the_cache_mirrors_run_with_cache(name: str, rules: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens(3, 7)
    logits, relevance = clrp.run_with_relevance(model, ids, objective_of(model), rules=rules)
    with torch.no_grad():
        plain, cache = model.run_with_cache(ids)
    assert isinstance(relevance, ActivationCache)
    assert torch.equal(logits, plain)
    assert not logits.requires_grad
    for key in relevance.keys():  # noqa: SIM118
        value = relevance[key]
        assert value.dtype == torch.float32
        assert value.isfinite().all(), key
        assert not value.requires_grad
        if key in cache.keys():  # noqa: SIM118
            assert value.shape == cache[key].shape, key
    missing = {k for k in cache.keys() if k not in relevance.keys()}  # noqa: SIM118
    unexplained = {
        k for k in missing
        if not k.endswith(NOTHING) and not (rules == "gradient" and k.endswith("hook_normalized"))
    }  # fmt: skip
    assert unexplained == set()
    for i in range(model.cfg.n_layers):
        block = f"blocks.{i}."
        for leaf in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out",
                     "hook_mlp_out", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z",
                     "attn.hook_pattern", "attn.hook_attn_scores", "mlp.hook_pre", "mlp.hook_post",
                     "ln1.hook_normalized"):  # fmt: skip
            if leaf != "ln1.hook_normalized" or rules != "gradient":
                assert block + leaf in relevance.keys(), leaf  # noqa: SIM118


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_activation_times_gradient(name: str) -> None:
    """Plain gradients, taken by autograd alone without any of the package."""
    model, ids = boot(name, torch.float64), random_tokens(2)
    names = ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.mlp.hook_out", "ln_final.hook_out"]
    _, relevance = clrp.run_with_relevance(model, ids, objective_of(model), names, rules="gradient")
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        tensor.retain_grad()
        kept[hook.name] = tensor

    points = {n: model.hook_dict[n].name for n in names}
    with model.hooks(fwd_hooks=[(p, keep) for p in points.values()]):
        logits = model(ids)
    value = (logits[:, -1, 7] - logits[:, -1, 11]).sum()
    for key, point in points.items():
        (gradient,) = torch.autograd.grad(value, kept[point], retain_graph=True)
        torch.testing.assert_close(relevance[key], (kept[point] * gradient).detach())


def test_resid_mid_holds_the_whole_stream() -> None:
    """Relevance is conserved from resid_post to resid_mid to resid_pre under CP-LRP, bias-free."""
    model, ids = boot("llama", torch.float64), random_tokens(2)
    _, r = clrp.run_with_relevance(model, ids, objective_of(model), rules="cplrp")
    total = r["blocks.1.hook_resid_post"].sum((1, 2))
    for site in ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_mid"):
        torch.testing.assert_close(r[site].sum((1, 2)), total, rtol=1e-5, atol=1e-6)
    branch = r["blocks.1.ln2.hook_in"].sum((1, 2))
    assert (branch - total).abs().max() > 1e-3


def test_aliases_hold_the_same_tensor_values() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    _, r = clrp.run_with_relevance(model, ids, objective_of(model))
    for alias, name in [("hook_embed", "embed.hook_out"),
                        ("blocks.0.hook_resid_pre", "blocks.0.hook_in"),
                        ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"),
                        ("blocks.1.mlp.hook_post", "blocks.1.mlp.out.hook_in")]:  # fmt: skip
        assert torch.equal(r[alias], r[name])
    assert torch.equal(r["resid_post", 1], r["blocks.1.hook_resid_post"])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_relevance_at_queries_and_keys_under_cplrp(name: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    _, r = clrp.run_with_relevance(model, ids, objective_of(model), rules="cplrp")
    _, other = clrp.run_with_relevance(model, ids, objective_of(model))
    for i in range(model.cfg.n_layers):
        for leaf in ("hook_q", "hook_k", "hook_attn_scores"):
            key = f"blocks.{i}.attn.{leaf}"
            assert r[key].count_nonzero() == 0
            assert r[key].shape == other[key].shape
            assert other[key].count_nonzero() > 0
        assert r[f"blocks.{i}.attn.hook_v"].count_nonzero() > 0


def test_remove_batch_dim() -> None:
    model, ids = boot("gpt2", torch.float32), random_tokens(1, 6)
    _, r = clrp.run_with_relevance(
        model, ids, objective_of(model), "hook_embed", remove_batch_dim=True
    )
    assert r["hook_embed"].shape == (6, 24)
    with pytest.raises((ValueError, AssertionError), match="batch"):
        clrp.run_with_relevance(
            model, random_tokens(2), objective_of(model), "hook_embed", remove_batch_dim=True
        )


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_flagged_hook_points_once_they_fire(name: str) -> None:
    model, ids = fresh(name), random_tokens()
    with pytest.raises(ValueError, match="use_attn_result"):
        clrp.run_with_relevance(model, ids, objective_of(model), "blocks.0.attn.hook_result")
    model.set_use_attn_result(True)
    names = ["blocks.0.attn.hook_result", "blocks.0.attn.hook_z"]
    _, r = clrp.run_with_relevance(model, ids, objective_of(model), names)
    # the output projection is linear: each head's relevance is the same before and after
    torch.testing.assert_close(r[names[0]].sum(-1), r[names[1]].sum(-1), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- names_filter


def test_names_filter_forms() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    objective = objective_of(model)
    _, everything = clrp.run_with_relevance(model, ids, objective)
    name = "blocks.1.hook_resid_pre"
    pair = [name, "blocks.0.attn.hook_z"]
    for given, wanted in [
        (name, {name}),
        (pair, set(pair)),
        (tuple(pair), set(pair)),
        (set(pair), set(pair)),
        (lambda n: n.endswith("hook_resid_pre"), {name, "blocks.0.hook_resid_pre"}),
    ]:
        _, r = clrp.run_with_relevance(model, ids, objective, given)
        assert set(r.keys()) == wanted
        for key in wanted:
            torch.testing.assert_close(r[key], everything[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("blocks.9.hook_resid_pre", "blocks.9.hook_resid_pre"),
        (["hook_embed", "hook_embd"], "'hook_embd'"),
        (lambda n: False, "matches no"),  # noqa: ARG005
        (lambda n: n.endswith("hook_scale"), "matches only .*statistics"),
        ([], "empty"),
        ("blocks.0.ln1.hook_scale", "statistics"),
        (["blocks.0.attn.hook_q_input"], "use_split_qkv_input"),
        ("blocks.0.hook_mlp_in", "set_use_hook_mlp_in"),
        ("embed.hook_in", "no relevance"),
        ("rotary_emb.hook_cos", "no relevance"),
        ("blocks.0.attn.hook_hidden_states", "no relevance"),
    ],
    ids=lambda x: "chosen by a function" if callable(x) else str(x),  # no address in a test's name
)
def test_names_without_relevance_are_refused(wanted: Any, said: str, snapshot: Snapshot) -> None:
    model = boot("qwen3", torch.float32)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        clrp.run_with_relevance(model, random_tokens(), objective_of(model), wanted)
    assert snapshot(model) == before


def test_hook_normalized_under_plain_gradients_is_refused_where_it_is_not_used() -> None:
    model, name = boot("qwen3", torch.float32), "blocks.0.ln1.hook_normalized"
    with pytest.raises(ValueError, match="ordinary gradient"):
        clrp.run_with_relevance(model, random_tokens(), objective_of(model), name, rules="gradient")
    _, r = clrp.run_with_relevance(model, random_tokens(), objective_of(model), name)
    assert r[name].count_nonzero() > 0


# ---------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize("state", ["trainable", "frozen", "half frozen", "with gradients"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_parameters_are_untouched(name: str, state: str, snapshot: Snapshot) -> None:
    model = fresh(name)
    parameters = list(model.original_model.parameters())
    _, wanted = clrp.run_with_relevance(model, random_tokens(), objective_of(model), "hook_embed")
    for i, p in enumerate(parameters):
        if state == "with gradients":
            p.grad = torch.full_like(p, 0.5 + i)
        p.requires_grad_(state != "frozen" and (state != "half frozen" or i % 2 == 0))
    before = snapshot(model)
    for call in (
        lambda: clrp.run_with_relevance(model, random_tokens(), objective_of(model)),
        lambda: clrp.attribute(model, random_tokens(), objective_of(model)),
        lambda: clrp.next_token_table(model, random_tokens()),
    ):
        call()
        assert snapshot(model) == before
    _, got = clrp.run_with_relevance(model, random_tokens(), objective_of(model), "hook_embed")
    assert torch.equal(got["hook_embed"], wanted["hook_embed"])


@pytest.mark.parametrize(
    ("name", "dtype", "rules"),
    grid(FAMILIES, [torch.bfloat16, torch.float16], turns=["attnlrp", "gim"]),
)
def test_half_precision_gives_float32_relevance_near_the_truth(
    name: str, dtype: torch.dtype, rules: str
) -> None:
    model, ids = boot(name, dtype), random_tokens()
    names = ["hook_embed", "blocks.0.hook_resid_mid", "blocks.0.attn.hook_pattern"]
    _, got = clrp.run_with_relevance(model, ids, objective_of(model), names, rules=rules)
    exact = boot(name, torch.float32)
    _, wanted = clrp.run_with_relevance(exact, ids, objective_of(exact), names, rules=rules)
    for key in names:
        assert got[key].dtype == torch.float32
        assert got[key].isfinite().all()
        a, b = got[key].flatten().double(), wanted[key].flatten().double()
        # tiny random models are rough: the direction must hold, digits cannot
        assert float(torch.cosine_similarity(a, b, 0)) > (0.97 if dtype == torch.bfloat16 else 0.99)


# ---------------------------------------------------------------- objectives that are none


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda logits: logits, "shape"),
        (lambda logits: logits[:, -1, 3], r"\[2\]"),
        (lambda logits: logits.detach()[0, 0, 0], "without a gradient"),
        (lambda logits: float(logits[0, 0, 0].detach()), "float"),
        (lambda logits: None, "returned None"),  # noqa: ARG005
        (lambda logits: logits.argmax().float(), "without a gradient"),
        (lambda logits: torch.ones((), requires_grad=True), "logits"),  # noqa: ARG005
    ],
    ids=["all logits", "a row each", "detached", "a float", "nothing", "argmax", "unrelated"],
)
def test_what_is_no_objective_is_refused(objective: Any, said: str, snapshot: Snapshot) -> None:
    model = boot("qwen3", torch.float32)
    before = snapshot(model)
    with pytest.raises(ModelStateError, match=said):
        clrp.run_with_relevance(model, random_tokens(2), objective)
    if said != r"\[2\]":  # one row's logit is a number
        with pytest.raises(ModelStateError, match=said):
            clrp.attribute(model, random_tokens(), objective)
    assert snapshot(model) == before


def test_an_objective_with_one_entry_is_a_number() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    _, one = clrp.run_with_relevance(model, ids, lambda x: x[:, -1, 3], "hook_embed")
    _, two = clrp.run_with_relevance(model, ids, lambda x: x[0, -1, 3], "hook_embed")
    assert torch.equal(one["hook_embed"], two["hook_embed"])


# ---------------------------------------------------------------- a user's own hooks around it


def test_a_users_edit_around_a_run_is_explained() -> None:
    """Inside model.hooks(...) the edited model is explained: a patched position gets nothing."""
    model, ids = boot("gpt2", torch.float64), random_tokens()

    def patch(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        out = tensor.clone()
        out[:, 2] = 0.1
        return out

    name = "blocks.0.hook_resid_post"
    objective = objective_of(model)
    with model.hooks(fwd_hooks=[(name, patch)]):
        edited = model(ids)
        logits, r = clrp.run_with_relevance(model, ids, objective)
    assert torch.equal(logits, edited)
    assert r["blocks.0.mlp.hook_out"][0, 2].count_nonzero() == 0
    assert r["blocks.1.hook_resid_pre"][0, 2].count_nonzero() > 0
