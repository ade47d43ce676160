"""Removing tokens: curves and baselines against plain loops over the wrapped model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge
from truth.families import boot, hf_model, make_tokenizer, random_tokens, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError
from tl_contrastive_lrp.evaluation.faithfulness import BASELINES, FaithfulnessCurves
from tl_contrastive_lrp.hooks.user_hooks import as_own

TOKENS = random_tokens()  # BOS and 8 more
TOKENS[0, 4] = 2  # an EOS in the middle: special, never removed
N = TOKENS.shape[1]
REMOVABLE = [1, 2, 3, 5, 6, 7, 8]
ASKED = {"target": 7, "contrast": 12}
SCORES = torch.tensor([9.0, 0.5, -1.0, 3.0, 8.0, -2.0, 0.25, 2.0, 0.0])
MOST_FIRST = [3, 7, 1, 6, 8, 2, 5]
QUIET = {"progress": False}


def delta_of(logits: Tensor) -> Tensor:
    return logits[0, -1, 7] - logits[0, -1, 12]


def silenced(name: str) -> Callable[[list[int]], float]:
    """Δℓ of the Hugging Face model with some embeddings at zero."""
    model = hf_model(name)

    def run(gone: list[int]) -> float:
        with torch.no_grad(), true_float64(model):
            embedded = model.get_input_embeddings()(TOKENS).clone()
            embedded[:, gone] = 0.0
            return float(delta_of(model(inputs_embeds=embedded).logits))

    return run


def exchanged(name: str, stand_ins: Tensor) -> Callable[[list[int]], float]:
    """Δℓ of the Hugging Face model with some tokens exchanged."""
    model = hf_model(name)

    def run(gone: list[int]) -> float:
        tokens = TOKENS.clone()
        tokens[0, gone] = stand_ins[gone]
        with torch.no_grad(), true_float64(model):
            return float(delta_of(model(input_ids=tokens).logits))

    return run


def curves_of(name: str, scores: Any = SCORES, **how: Any) -> FaithfulnessCurves:
    model = boot(name)
    with true_float64(model):
        return clrp.faithfulness_curves(model, TOKENS, scores, **{**ASKED, **QUIET, **how})


# curves


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_every_point_is_a_run_with_those_tokens_silenced(name: str, batch_size: int) -> None:
    """Most relevant first and least relevant first; BOS and EOS stay though they score highest."""
    curves, run = curves_of(name, batch_size=batch_size), silenced(name)
    assert curves.removed.tolist() == list(range(8))
    assert curves.how == "zero embeddings"
    for step in range(8):
        assert float(curves.morf[0, step]) == pytest.approx(run(MOST_FIRST[:step]), abs=1e-9)
        last = MOST_FIRST[::-1][:step]
        assert float(curves.lerf[0, step]) == pytest.approx(run(last), abs=1e-9)
    assert curves.delta == pytest.approx(run([]), abs=1e-9)


def test_given_and_random_tokens_in_their_place() -> None:
    stand_ins = torch.tensor([40, 41, 42, 43, 44, 45, 46, 47, 10])
    run = exchanged("qwen3", stand_ins)
    given = curves_of("qwen3", replace=stand_ins)
    for step in range(8):
        assert float(given.morf[0, step]) == pytest.approx(run(MOST_FIRST[:step]), abs=1e-9)
    # A pool of one id leaves no choice: known whatever the draws.
    only = curves_of("qwen3", replace="random", pool=torch.tensor([33]), draws=2)
    run = exchanged("qwen3", torch.full((N,), 33))
    for step in range(8):
        assert float(only.morf[0, step]) == pytest.approx(run(MOST_FIRST[:step]), abs=1e-9)
    both = torch.stack([stand_ins, torch.full((N,), 33)])
    mean = curves_of("qwen3", replace=both)
    assert torch.allclose(mean.morf, (given.morf + only.morf) / 2)
    drawn = [curves_of("qwen3", replace="random", seed=seed).morf for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


def test_random_tokens_are_never_special() -> None:
    from tl_contrastive_lrp.evaluation.faithfulness.removal import prepare_removal

    model = boot("qwen3")
    setting = prepare_removal(model, TOKENS, delta_of, replace="random", draws=200)
    assert setting.stand_ins is not None
    found = set(setting.stand_ins.flatten().tolist())
    assert found == set(range(4, 48))


def test_what_is_excluded() -> None:
    run = silenced("qwen3")
    assert curves_of("qwen3", exclude=[3, -1]).removable == 5
    whole = curves_of("qwen3", include_special=True)
    assert whole.removable == 9
    assert float(whole.morf[0, 1]) == pytest.approx(run([0]), abs=1e-9)


def test_several_rankings_share_their_runs() -> None:
    named = {"mine": SCORES, "same": SCORES * 2, "other": -SCORES}
    curves = curves_of("qwen3", named)
    assert curves.names == ("mine", "same", "other")
    assert torch.equal(curves.morf[0], curves.morf[1])
    assert torch.allclose(curves.morf[0], curves.lerf[2], atol=1e-12)
    assert curves.area["mine"] == pytest.approx(-curves.area["other"])
    result = clrp.attribute(boot("qwen3"), TOKENS, **ASKED, rules="gim")
    assert curves_of("qwen3", result).names == ("gim",)


def test_steps_are_few_and_tables_complete() -> None:
    """Two steps of 39 tokens, and what the top 1, 5, 10, 20 and 50 % need from either end."""
    model, prompt = boot("qwen3"), random_tokens(1, 40)
    ranked = {"a": torch.arange(40.0), "b": -torch.arange(40.0)}
    curves = clrp.faithfulness_curves(model, prompt, ranked, **ASKED, **QUIET, steps=2)
    assert curves.removed.tolist() == [0, 1, 2, 4, 8, 19, 20, 31, 35, 37, 38, 39]
    frame = curves.to_frame()
    assert list(frame.columns) == ["name", "order", "removed", "share", "delta"]
    assert len(frame) == 2 * 2 * len(curves.removed)
    at = frame[(frame.name == "b") & (frame.order == "LeRF")]
    assert at["delta"].tolist() == curves.lerf[1].tolist()
    summary = curves.summary()
    assert set(summary["name"]) == {"a", "b"}
    assert summary["area"].is_monotonic_decreasing
    assert "zero embeddings" in str(curves)


# baselines


def scores_of(name: str, which: str, **how: Any) -> Tensor:
    model = boot(name)
    with true_float64(model):
        found = clrp.baseline_scores(model, TOKENS, **ASKED, **QUIET, which=which, **how)
    return found[which]


def embedding_gradient(model: Any, embedded: Tensor) -> Tensor:
    x = embedded.clone().requires_grad_(True)
    return torch.autograd.grad(delta_of(model(inputs_embeds=x).logits), x)[0]


def test_gradient_x_input_is_the_wrapped_models() -> None:
    for name in ("qwen3", "gpt2", "gemma2"):
        model = hf_model(name)
        with true_float64(model):
            x = model.get_input_embeddings()(TOKENS).detach()
            wanted = (x * embedding_gradient(model, x)).sum(-1)[0]
        assert torch.allclose(scores_of(name, "gradient_x_input").double(), wanted, atol=1e-6)


def test_integrated_gradients() -> None:
    """Against the definition on the wrapped model; and they add up to what removal changes."""
    model = hf_model("gpt2")
    with true_float64(model):
        x = model.get_input_embeddings()(TOKENS).detach()
        base = x.clone()
        base[:, REMOVABLE] = 0.0
        at = [(i + 0.5) / 24 for i in range(24)]
        mean = sum(embedding_gradient(model, base + a * (x - base)) for a in at) / 24
        wanted = ((x - base) * mean).sum(-1)[0]
    found = scores_of("gpt2", "integrated_gradients", ig_steps=24, batch_size=5)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    run = silenced("gpt2")
    fine = scores_of("gpt2", "integrated_gradients", ig_steps=400)
    assert float(fine.sum()) == pytest.approx(run([]) - run(REMOVABLE), abs=2e-3)
    assert fine[0] == fine[4] == 0.0


def test_occlusion_is_a_loop_over_tokens() -> None:
    run = silenced("qwen3")
    wanted = [run([]) - run([p]) if p in REMOVABLE else 0.0 for p in range(N)]
    assert scores_of("qwen3", "occlusion").tolist() == pytest.approx(wanted, abs=1e-6)


def test_random_and_recency() -> None:
    assert scores_of("qwen3", "recency").tolist() == list(range(N))
    one, same, other = (scores_of("qwen3", "random", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert tuple(clrp.baseline_scores(boot("qwen3"), TOKENS, **ASKED, **QUIET)) == BASELINES


# manners


def test_the_model_is_left_as_found(snapshot: Any, capfd: Any) -> None:
    model = boot("gemma2")
    model(TOKENS)  # TransformerLens wires some of its own at the first run
    before = snapshot(model)
    capfd.readouterr()
    curves_of("gemma2", replace="random")
    scores_of("gemma2", "integrated_gradients")
    assert capfd.readouterr().err == "", "progress=False is silent"

    def fails(logits: Tensor) -> Tensor:  # noqa: ARG001
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        clrp.baseline_scores(model, TOKENS, fails, **QUIET)
    with pytest.raises(RuntimeError, match="mine"):
        clrp.faithfulness_curves(model, TOKENS, SCORES, fails, **QUIET)
    assert snapshot(model) == before
    curves_of("gemma2", progress=True)
    assert "removing tokens" in capfd.readouterr().err


def test_what_cannot_be_right_is_refused() -> None:
    def refused(what: str, error: type = ValueError, **how: Any) -> None:
        with pytest.raises(error, match=what):
            curves_of("qwen3", **how)

    refused(r"needs a tensor \[9\]", scores=SCORES[:-1])
    refused("NaN", scores=SCORES * math.nan)
    refused("at least one ranking", scores={})
    refused("steps=0", steps=0)
    refused("batch_size=0", batch_size=0)
    refused("draws=0", draws=0)
    refused("'mask' is unknown", replace="mask")
    refused("one token id for each position", PromptError, replace=TOKENS[0, :3])
    refused("position 9", exclude=[9])
    refused("Nothing is left", exclude=range(N))
    refused("both", TypeError, contrast=None)
    with pytest.raises(ValueError, match="no baseline"):
        scores_of("qwen3", "shap")
    with pytest.raises(ValueError, match="ig_steps"):
        scores_of("qwen3", "integrated_gradients", ig_steps=0)
    with pytest.raises(ValueError, match="nothing to explain"):
        clrp.faithfulness_curves(boot("qwen3"), TOKENS, SCORES, lambda z: 0.0 * z.sum(), **QUIET)
    with pytest.raises(TypeError, match="TransformerBridge"):
        clrp.faithfulness_curves(hf_model("qwen3"), TOKENS, SCORES, delta_of)


def test_only_the_logits_that_are_read_are_computed() -> None:
    """Of a located objective; a plain function, and a hook at the unembedding, see all of them."""
    model = boot("llama")
    rows: list[tuple[int, int]] = []
    spied = model.unembed.register_forward_hook(
        as_own(lambda *given: rows.append(tuple(given[2].shape[:2])))
    )
    try:
        located = clrp.faithfulness_curves(model, TOKENS, SCORES, **ASKED, **QUIET)
        assert {pos for _, pos in rows} == {1}
        rows.clear()
        opaque = clrp.faithfulness_curves(model, TOKENS, SCORES, delta_of, **QUIET)
        assert {pos for _, pos in rows} == {N}
        seen: list[tuple[int, ...]] = []
        rows.clear()
        with model.hooks([("unembed.hook_in", lambda x, **_: seen.append(tuple(x.shape)))]):
            hooked = clrp.faithfulness_curves(model, TOKENS, SCORES, **ASKED, **QUIET)
        assert {shape[1] for shape in seen} == {N}
    finally:
        spied.remove()
    for other in (opaque, hooked):  # logits of a batch of rows round as those of one do, nearly
        assert torch.allclose(located.morf, other.morf, atol=1e-4)
        assert torch.allclose(located.lerf, other.lerf, atol=1e-4)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func is not torch.ops.aten.t.default:
            self.numel = max(self.numel, out.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits_of_one_forward(tmp_path: Path) -> None:
    """600 tokens and a vocabulary of 256,000, in batches of 16 rows: one row of logits each."""
    length, vocab, rows = 600, 256_000, 16
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=length,
    )  # fmt: skip
    make_tokenizer().save_pretrained(tmp_path)
    model: Any = TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=transformers.LlamaForCausalLM(config), device="cpu"
    ).eval()
    tokens = random_tokens(length=length)
    with Largest() as seen:
        clrp.faithfulness_curves(
            model, tokens, torch.arange(length), **ASKED, **QUIET, steps=3, batch_size=rows
        )
    scores = rows * length * length  # one head's, eager
    assert seen.numel <= max(rows * vocab, scores, vocab * 8) < length * vocab


def test_a_span_is_read_at_its_positions() -> None:
    model = boot("llama")
    span = clrp.span_logit(model, TOKENS, span=(5, 8), against="mean")
    with true_float64(model):
        curves = clrp.faithfulness_curves(model, TOKENS, SCORES, span, **QUIET)
        plain = clrp.faithfulness_curves(model, TOKENS, SCORES, lambda x: span(x), **QUIET)
    assert torch.allclose(curves.morf, plain.morf, atol=1e-9)
