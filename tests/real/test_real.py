"""SmolLM2-135M-Instruct, real weights: what holds of tiny models holds of one that speaks.

    python tools/real_model.py --out FOLDER
    REAL_MODEL=FOLDER python -m pytest -n 0 -m real

Without ``REAL_MODEL`` these tests are skipped. Prompts are made up here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM
from truth import replaced_tokens
from truth.float64 import true_float64
from truth.op_oracle import OpOracle
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study.settings import read_settings
from tl_contrastive_lrp.study.study import Study

pytestmark = pytest.mark.real

TEXT = "Mary and John went to the store. John gave a bottle of milk to"
QUESTIONS = {
    "Tom has 4 pens. He buys 3 more. How many pens does he have?": 7,
    "A box holds 9 eggs. Two eggs break. How many eggs are whole?": 7,
    "Ann is 5 years old. How old will she be in 3 years?": 8,
    "There are 8 birds on a tree, and 6 fly away. How many birds stay?": 2,
    "Sam reads 2 pages a day. How many pages does he read in 4 days?": 8,
    "Three friends share 9 apples. How many apples does each get?": 3,
    "Eve had 7 coins and lost 4 of them. How many coins are left?": 3,
    "A bus has 6 seats. Five are taken. How many seats are free?": 1,
}


@pytest.fixture(scope="module")
def folder() -> Path:
    named = os.environ.get("REAL_MODEL")
    if not named:
        pytest.skip("REAL_MODEL names no folder that tools/real_model.py has made")
    return Path(named)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return TransformerBridge.boot_transformers(str(folder)).eval()


@pytest.fixture(scope="module")
def asked(model: Any) -> tuple[torch.Tensor, Any]:
    """A prompt's ids, and the difference of the two names' logits."""
    tokens = model.to_tokens(TEXT, prepend_bos=False)
    return tokens, clrp.logit_diff(model, " Mary", " John")


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """The model's weights, which bfloat16 holds exactly, computed with in float64."""
    model.double()
    try:
        with true_float64(model):
            yield
    finally:
        model.float()


@pytest.fixture(scope="module")
def oracle_model(folder: Path) -> Iterator[Any]:
    """Hugging Face's own model, in float64 throughout."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    hf.set_attn_implementation("eager")
    with true_float64(hf.eval()):
        yield hf


def seed(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The gradient of that difference at the logits."""
    gradient = torch.zeros(1, tokens.shape[1], model.cfg.d_vocab, dtype=torch.float64)
    gradient[0, -1, model.to_single_token(" Mary")] = 1.0
    gradient[0, -1, model.to_single_token(" John")] = -1.0
    return gradient


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp", "relp", "gim", "gradient"])
def test_relevance_of_every_hidden_state_is_the_oracles(
    model: Any, oracle_model: Any, asked: tuple[torch.Tensor, Any], rules: str
) -> None:
    """The oracle sees Hugging Face's operations alone."""
    tokens, objective = asked
    with in_float64(model):
        _, relevance = clrp.run_with_relevance(model, tokens, objective, rules=rules)
    truth = OpOracle(oracle_model, tokens, seed(model, tokens), rules)
    assert len(truth.relevance) == model.cfg.n_layers + 2
    for site, wanted in truth.relevance.items():
        found = relevance["embed.hook_out" if site == "hook_embed" else site]
        off = float((found - wanted).abs().max() / wanted.abs().max())
        assert off <= PROMISED[torch.float64], (site, off)


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_the_logits_do_not_move(model: Any, asked: tuple[torch.Tensor, Any], rules: str) -> None:
    tokens, objective = asked
    with torch.no_grad():
        plain = model(tokens)
    logits, _ = clrp.run_with_relevance(model, tokens, objective, rules=rules)
    assert torch.equal(logits, plain)


def test_edges_are_the_oracles(
    model: Any, oracle_model: Any, asked: tuple[torch.Tensor, Any]
) -> None:
    tokens, objective = asked
    with in_float64(model):
        graph = clrp.attribution_graph(model, tokens, objective, rules="attnlrp")
    truth = OpOracle(oracle_model, tokens, seed(model, tokens), "attnlrp")
    pairs = list(zip(truth.sites, truth.sites[1:], strict=False))
    for source, target in (pairs[0], pairs[-1]):
        wanted = truth.edges(source, target)
        off = float((graph.matrix(source, target) - wanted).abs().max())
        assert off <= PROMISED[torch.float64] * float(wanted.abs().max()), (source, off)


def test_patching_is_ablation_by_hand(model: Any, asked: tuple[torch.Tensor, Any]) -> None:
    """TransformerLens' sweep is heads replaced by hand, and the estimate goes with it."""
    tokens, objective = asked
    other = tokens.clone()
    other[0, 0], other[0, 2] = tokens[0, 2], tokens[0, 0]
    _, clean = model.run_with_cache(tokens)
    with torch.no_grad():
        start = float(objective(model(other)))
    name = "blocks.{}.attn.hook_z"
    by_hand = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in (0, 14, 29):
        for head in range(model.cfg.n_heads):

            def put(z: torch.Tensor, hook: Any, at: int = head) -> torch.Tensor:  # noqa: ARG001
                z = z.clone()
                z[:, :, at] = clean[name.format(layer)][:, :, at]  # noqa: B023
                return z

            with torch.no_grad():
                logits = model.run_with_hooks(other, fwd_hooks=[(name.format(layer), put)])
            by_hand[layer, head] = float(objective(logits)) - start
    swept = patching.get_act_patch_attn_head_out_all_pos(model, other, clean, objective)
    layers = [0, 14, 29]
    # both are differences of two logit differences of size 20
    assert (swept[layers] - start - by_hand[layers]).abs().max() < 20 * PROMISED[torch.float32]
    estimate = clrp.patching.get_relevance_patch_attn_head_out_all_pos(
        model, other, clean, objective
    )
    found = torch.stack([(estimate - start)[layers].flatten(), by_hand[layers].flatten()])
    assert float(torch.corrcoef(found)[0, 1]) > 0.5


def test_effects_are_what_replacing_tokens_does(
    model: Any, asked: tuple[torch.Tensor, Any], oracle_model: Any
) -> None:
    """Near the end exactly; elsewhere the predictions go with the truth."""
    tokens, objective = asked
    truth = replaced_tokens.effects(oracle_model, tokens, None, objective)
    with in_float64(model):
        found = clrp.token_effects(model, tokens, objective, progress=False)
    off = (found.effect - truth).abs()
    assert found.exact.sum() == 3
    assert off[found.exact].max() < 1e-9 * truth.abs().max()
    assert float(torch.corrcoef(torch.stack([found.effect, truth]))[0, 1]) > 0.5


SETTINGS = r"""
version: 1
name: real
store: store
base: {name: SmolLM2, model: %s}
benchmarks:
  - name: gsm8k
    path: rows.jsonl
    options: {request: '', begin: '####', longest_answer: 1}
    collect: {max_new_tokens: 5, locators: [constraint]}
collect: {batch_size: 4, contrast: [own]}
analyse: {rules: [attnlrp, gradient], graph: first, flip_limit: 4}
"""


def test_a_study_of_made_up_questions(
    folder: Path, model: Any, oracle_model: Any, tmp_path: Path
) -> None:
    """Its cases are failures, and their Δℓ is Hugging Face's; what it says adds up."""
    rows = [{"question": q, "answer": f"#### {a}"} for q, a in QUESTIONS.items()]
    tmp_path.joinpath("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    study = Study(read_settings(SETTINGS % json.dumps(str(folder))), tmp_path)
    study.run(progress=False)
    results = study.results()
    assert len(results.cases) + len(results.dropped) == len(rows)
    assert results.cases, "none of the failures is clean"
    for case in results.cases:
        ids = torch.tensor([[*case.prompt_ids, *case.completion_ids[: case.target_position]]])
        with torch.no_grad():
            last = oracle_model(ids).logits[0, -1]
        assert int(last.argmax()) == case.target_id
        wanted = float(last[case.target_id] - last[case.contrast_id])
        assert abs(case.delta - wanted) < 20 * PROMISED[torch.float32]
        assert case.delta > 1
        assert case.contrast.strip() == str(
            QUESTIONS[list(QUESTIONS)[int(case.id.split("/")[1]) - 1]]
        )
    for analysis in results.analyses:
        case = results.by_id[analysis.case_id]
        found = clrp.attribute(
            model,
            torch.tensor([[*case.prompt_ids, *case.completion_ids[: case.target_position]]]),
            clrp.logit_diff(model, case.target_id, case.contrast_id),
            rules=analysis.rules,
        )
        largest = float(found.tokens.abs().max())
        assert (analysis.tokens - found.tokens).abs().max() <= PROMISED[torch.float32] * largest
