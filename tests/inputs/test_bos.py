"""The BOS token, chat templates and special tokens: what is explained is what was asked for.

The truth is Hugging Face's own tokenizer and model, loaded without TransformerLens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from truth import chat_tokenizers as forms
from truth.chat_tokenizers import own_ids, true_logits

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError, SpecialTokenWarning

TEXT = "The capital of France is"
OTHER = "The capital of Italy is"
MESSAGES = [{"role": "user", "content": "The capital of Italy"}]
TARGET, CONTRAST = 200, 210
TEMPLATED = [form for form in forms.FORMS if form not in ("gpt2", "ends", "eos-only")]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    """Bridges by form, for tests that say what they want and are told nothing."""
    made: dict[str, Any] = {}

    class Made(dict[str, Any]):
        def __missing__(self, form: str) -> Any:
            self[form] = forms.booted(form)
            return self[form]

    made = Made()
    yield made
    made.clear()


def true_delta(form: str, ids: list[int]) -> float:
    logits = true_logits(form, ids)
    return float(logits[TARGET] - logits[CONTRAST])


def silently(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpecialTokenWarning)
        return call()


def said(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    return value, [str(w.message) for w in caught if w.category is SpecialTokenWarning]


def chat_text(form: str) -> tuple[str, list[int]]:
    tokenizer, _ = forms.alone(form)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)
    return text, list(encoded["input_ids"])


# ---- prepend_bos -------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("form", ["smollm", "gpt2", "llama2", "llama3", "gemma", "qwen-bos"])
def test_prepend_bos_is_what_is_explained(models: dict[str, Any], form: str, bos: bool) -> None:
    model, ids = models[form], own_ids(form, TEXT, bos)
    assert model.to_tokens(TEXT, prepend_bos=bos)[0].tolist() == ids
    delta, sides = true_delta(form, ids), {"target": TARGET, "contrast": CONTRAST}
    result = silently(lambda: clrp.attribute(model, TEXT, **sides, prepend_bos=bos))
    assert result.token_ids.tolist() == ids
    assert result.delta == pytest.approx(delta, abs=1e-9)
    assert result.prepended_bos is bos
    graph = silently(lambda: clrp.attribution_graph(model, TEXT, **sides, prepend_bos=bos))
    assert graph.token_ids.tolist() == ids
    assert graph.delta == pytest.approx(delta, abs=1e-9)
    assert graph.prepended_bos is bos
    table = silently(lambda: clrp.next_token_table(model, TEXT, k=3, prepend_bos=bos))
    top = true_logits(form, ids).topk(3)
    assert table["id"].tolist() == top.indices.tolist()
    assert table["logit"].tolist() == pytest.approx(top.values.tolist(), abs=1e-9)


@pytest.mark.parametrize("bos", [True, False])
def test_every_call_that_takes_a_text_takes_prepend_bos(models: dict[str, Any], bos: bool) -> None:
    model, ids = models["smollm"], own_ids("smollm", TEXT, bos)
    objective = clrp.logit_diff(model, target=TARGET, contrast=CONTRAST)
    delta = true_delta("smollm", ids)
    batch = [TEXT, OTHER]
    logits, relevance = silently(
        lambda: clrp.run_with_relevance(model, batch, objective, prepend_bos=bos)
    )
    assert logits.shape[:2] == (2, len(ids)) == relevance["hook_embed"].shape[:2]
    for row, text in zip(logits, batch, strict=True):
        wanted = true_logits("smollm", own_ids("smollm", text, bos))
        torch.testing.assert_close(row[-1], wanted, rtol=0, atol=1e-9)
    verified = silently(lambda: clrp.verify(model, TEXT, prepend_bos=bos))
    assert verified.n_tokens == len(ids)
    curves = silently(
        lambda: clrp.faithfulness_curves(
            model, TEXT, torch.arange(len(ids)).float(), objective, prepend_bos=bos, progress=False
        )
    )
    assert curves.delta == pytest.approx(delta, abs=1e-6)
    scores = silently(
        lambda: clrp.baseline_scores(
            model, TEXT, objective, which=["recency"], prepend_bos=bos, progress=False
        )
    )
    assert len(scores["recency"]) == len(ids)


def test_every_public_call_with_a_text_has_the_argument() -> None:
    """A new call that takes a prompt is found here."""
    texts = {"prompt", "corrupted"}
    for name in clrp.__all__:
        call = getattr(clrp, name)
        if inspect.isfunction(call) and texts & set(inspect.signature(call).parameters):
            assert "prepend_bos" in inspect.signature(call).parameters, name
    assert "prepend_bos" in inspect.signature(clrp.run_with_relevance).parameters


@pytest.mark.parametrize("form", list(forms.FORMS))
def test_the_default_is_the_models_and_says_where_the_tokenizer_differs(form: str) -> None:
    model = forms.booted(form)
    ask = lambda: clrp.attribute(model, TEXT, target=TARGET, contrast=CONTRAST)  # noqa: E731
    result, messages = said(ask)
    ids, own = result.token_ids.tolist(), own_ids(form, TEXT)
    assert ids == model.to_tokens(TEXT)[0].tolist()
    assert result.delta == pytest.approx(true_delta(form, ids), abs=1e-9)
    assert bool(messages) == (ids != own)
    if form in ("smollm", "gpt2"):
        (message,) = messages
        assert repr(forms.alone(form)[0].bos_token) in message
        assert "cfg.default_prepend_bos is True" in message
        assert "prepend_bos=False" in message
    if form == "qwen-bos":
        assert "left out the BOS token '<|begin_of_text|>'" in messages[0]
    if form in ("ends", "eos-only"):
        assert any("EOS token '</s>'" in message for message in messages)
    again, repeated = said(ask)
    assert repeated == []
    assert again.delta == result.delta
    assert said(lambda: clrp.next_token_table(model, OTHER))[1] == []


def test_it_is_said_at_the_callers_line_and_a_filter_that_raises_is_no_hearing() -> None:
    model = forms.booted("gpt2")
    for _ in range(2):
        with pytest.raises(SpecialTokenWarning):
            silently(lambda: clrp.next_token_table(model, TEXT))
    with pytest.warns(SpecialTokenWarning) as caught:
        clrp.attribute(model, TEXT, target=TARGET, contrast=CONTRAST)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    other = forms.booted("gpt2")
    with pytest.warns(SpecialTokenWarning):
        clrp.run_with_relevance(other, TEXT, lambda logits: logits[0, -1, 3])
    assert issubclass(SpecialTokenWarning, UserWarning)


def test_ids_are_taken_as_they_are(models: dict[str, Any]) -> None:
    model = models["smollm"]
    for bos in (True, False):
        ids = torch.tensor([own_ids("smollm", TEXT, bos)])
        result = silently(
            lambda ids=ids: clrp.attribute(model, ids, target=TARGET, contrast=CONTRAST)
        )
        assert result.token_ids.tolist() == ids[0].tolist()
        assert result.prepended_bos is None
    with pytest.raises(PromptError, match="taken as they are"):
        clrp.next_token_table(model, ids, prepend_bos=True)
    assert len(clrp.next_token_table(model, ids, prepend_bos=False)) == 10
    with pytest.raises(TypeError, match="prepend_bos='no': use True, False, or None"):
        clrp.next_token_table(model, TEXT, prepend_bos="no")  # type: ignore[arg-type]


# ---- texts that begin with BOS -----------------------------------------------------------------


@pytest.mark.parametrize("form", TEMPLATED)
def test_a_chat_templates_output_gets_no_second_bos(form: str) -> None:
    model = forms.booted(form)
    text, ids = chat_text(form)
    assert model.to_tokens(text)[0].tolist()[-len(ids) :] == ids
    result, messages = said(lambda: clrp.attribute(model, text, target=TARGET, contrast=CONTRAST))
    assert result.token_ids.tolist() == ids
    assert result.prepended_bos is False
    assert result.delta == pytest.approx(true_delta(form, ids), abs=1e-9)
    doubled = ids != model.to_tokens(text)[0].tolist() or ids != own_ids(form, text)
    assert len(messages) == doubled
    if doubled:
        assert "no second one was put before it" in messages[0]
    quiet = silently(lambda: clrp.next_token_table(model, text, prepend_bos=False))
    assert quiet["logit"][0] == pytest.approx(float(true_logits(form, ids).max()), abs=1e-9)


@pytest.mark.parametrize("form", ["smollm", "llama2", "llama3", "gemma"])
def test_a_second_bos_that_is_asked_for_is_said(form: str) -> None:
    model = forms.booted(form)
    text, ids = chat_text(form)
    with pytest.warns(SpecialTokenWarning, match="twice"):
        result = clrp.attribute(model, text, target=TARGET, contrast=CONTRAST, prepend_bos=True)
    assert result.token_ids.tolist() == [ids[0], *ids]
    assert result.prepended_bos is True


def test_eos_tokens_that_were_written_stay() -> None:
    """TransformerLens takes every EOS at the end for one that the tokenizer has appended."""
    model = forms.booted("eos-only")
    model.tokenizer.add_eos_token = model.cfg.tokenizer_appends_eos = True
    ids = own_ids("eos-only", TEXT + "</s></s>", False)
    assert model.to_tokens(TEXT + "</s></s>", prepend_bos=False)[0].tolist() == ids[:-2]
    with pytest.warns(SpecialTokenWarning, match="EOS token"):
        result = clrp.attribute(
            model, TEXT + "</s></s>", target=TARGET, contrast=CONTRAST, prepend_bos=False
        )
    assert result.token_ids.tolist() == ids
    assert result.delta == pytest.approx(true_delta("eos-only", ids), abs=1e-9)


# ---- what would be lost or doubled -------------------------------------------------------------


def test_a_tokenizer_changed_afterwards_loses_and_doubles_nothing() -> None:
    model = forms.booted("gpt2")
    model.tokenizer.add_bos_token = False
    assert model.to_tokens(TEXT, prepend_bos=False)[0].tolist() == own_ids("gpt2", TEXT)[1:]
    with pytest.raises(PromptError, match=r"lose its first token.* = False"):
        clrp.next_token_table(model, TEXT, prepend_bos=False)
    with pytest.raises(PromptError, match="prepend_bos=True cannot be done"):
        clrp.next_token_table(model, TEXT, prepend_bos=True)
    model.cfg.tokenizer_prepends_bos = False
    result = silently(
        lambda: clrp.attribute(model, TEXT, target=TARGET, contrast=CONTRAST, prepend_bos=False)
    )
    assert result.token_ids.tolist() == own_ids("gpt2", TEXT)
    model.tokenizer.add_bos_token = True
    for bos in (True, False):
        with pytest.raises(PromptError, match=r"begin with .* BOS token.* = True"):
            clrp.next_token_table(model, TEXT, prepend_bos=bos)


def test_files_that_cannot_be_read_again_are_said(tmp_path: Path) -> None:
    model = forms.booted("smollm")
    model.tokenizer.name_or_path = str(tmp_path / "gone")
    with pytest.warns(SpecialTokenWarning, match="its files cannot be read again"):
        clrp.next_token_table(model, TEXT)


# ---- run_with_relevance's keywords -------------------------------------------------------------


@pytest.mark.parametrize("form", ["smollm", "qwen", "gpt2", "gemma"])
def test_no_keyword_is_swallowed(
    models: dict[str, Any], form: str, snapshot: Callable[[Any], dict[str, Any]]
) -> None:
    model = models[form]
    ids = torch.tensor([own_ids(form, TEXT, False)])
    objective = clrp.logit_diff(model, target=TARGET, contrast=CONTRAST)
    before = snapshot(model)
    for name, meant in [
        ("prepend_boss", "prepend_bos"), ("attention_maks", "attention_mask"),
        ("name_filter", "names_filter"), ("rule", "rules"), ("position_idx", "position_ids"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=rf"'{name}'\. Did you mean {meant}=\?"):
            clrp.run_with_relevance(model, ids, objective, **{name: None})
    for name in ("pos_slice", "incl_bwd", "return_cache_object", "stop_at_layer", "device"):
        assert name in inspect.signature(model.run_with_cache).parameters or name == "device"
        with pytest.raises(TypeError, match=f"cannot honour {name}="):
            clrp.run_with_relevance(model, ids, objective, **{name: 1})
    with pytest.raises(TypeError, match="cannot honour return_type="):
        clrp.run_with_relevance(model, ids, objective, return_type="loss")
    with pytest.raises(TypeError, match=r"names a keyword 'zzz'\.$"):
        clrp.run_with_relevance(model, ids, objective, zzz=1)
    assert snapshot(model) == before
    mask = torch.ones_like(ids)
    places = torch.arange(ids.shape[1])[None] + 3
    for given in (
        {"attention_mask": mask}, {"position_ids": places}, {"return_type": "logits"},
        {"use_cache": False}, {"output_attentions": True},
    ):  # fmt: skip
        logits, _ = silently(
            lambda given=given: clrp.run_with_relevance(model, ids, objective, **given)
        )
        told = {k: v for k, v in given.items() if k != "return_type"}
        with torch.no_grad():
            wanted = forms.alone(form)[1](ids, **told).logits
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)


def test_explain_edge_names_its_keywords(models: dict[str, Any]) -> None:
    graph = clrp.attribution_graph(
        models["qwen"], TEXT, target=TARGET, contrast=CONTRAST, heads=True
    )
    with pytest.raises(TypeError, match="modell"):
        graph.explain_edge((0, 0), (1, 0), modell=None)  # type: ignore[call-arg]
    assert {"model", "objective", "rules"} <= set(inspect.signature(graph.explain_edge).parameters)


# ---- circuits, files ---------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_a_circuits_reference_begins_as_the_graphs_prompt(bos: bool) -> None:
    model = forms.booted("smollm")
    sides: dict[str, Any] = {"target": TARGET, "contrast": CONTRAST}
    graph = clrp.attribution_graph(model, TEXT, **sides, prepend_bos=bos)
    circuit = graph.prune(mass=0.6)
    by_text = silently(lambda: clrp.circuit_faithfulness(model, circuit, **sides, corrupted=OTHER))
    ids = torch.tensor(own_ids("smollm", OTHER, bos))
    by_ids = clrp.circuit_faithfulness(model, circuit, **sides, corrupted=ids)
    assert by_text.delta == by_ids.delta
    with pytest.raises(PromptError, match="same number of tokens"):
        clrp.circuit_faithfulness(model, circuit, **sides, corrupted=OTHER, prepend_bos=not bos)
    curve = silently(
        lambda: clrp.circuit_curve(
            model, graph, **sides, corrupted=OTHER, fractions=[0.5], progress=False
        )
    )
    assert len(curve.points) == 3


def test_files_keep_what_was_prepended_and_first_files_still_load(
    models: dict[str, Any], tmp_path: Path
) -> None:
    model = models["smollm"]
    sides: dict[str, Any] = {"target": TARGET, "contrast": CONTRAST}
    for make, kind in (
        (clrp.attribute, clrp.Attribution), (clrp.attribution_graph, clrp.AttributionGraph)
    ):  # fmt: skip
        made = make(model, TEXT, **sides, prepend_bos=True)
        assert kind.load(made.save(tmp_path / "text.safetensors")).prepended_bos is True
        ids = torch.tensor(own_ids("smollm", TEXT))
        path = make(model, ids, **sides).save(tmp_path / "ids.safetensors")
        with safe_open(path, framework="pt") as file:
            assert "prepended_bos" not in file.metadata()["data"]  # as version 0.1 wrote it
        assert kind.load(path).prepended_bos is None


# ---- special tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["smollm", "qwen", "llama3", "gemma"])
def test_tokens_that_only_the_files_mark_as_special_are_special(
    models: dict[str, Any], form: str
) -> None:
    model, (tokenizer, _) = models[form], forms.alone(form)
    _, ids = chat_text(form)
    extra = " <file_sep>" if form == "smollm" else ""
    ids = [*ids, *tokenizer(extra, add_special_tokens=False)["input_ids"]]
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    wanted = [i in marked for i in ids]
    assert any(i not in tokenizer.all_special_ids for i in marked)
    sides: dict[str, Any] = {"target": TARGET, "contrast": CONTRAST}
    result = clrp.attribute(model, torch.tensor(ids), **sides)
    assert result.special.tolist() == wanted
    assert result.greyed.tolist()[1:] == wanted[1:]
    assert clrp.attribution_graph(model, torch.tensor(ids), **sides).special.tolist() == wanted
    curves = clrp.faithfulness_curves(
        model, torch.tensor(ids), result, **sides, replace="random", draws=40, progress=False
    )
    assert curves.removable == sum(not special for special in wanted[1:])


def test_random_replacements_are_no_special_tokens(models: dict[str, Any]) -> None:
    from tl_contrastive_lrp.evaluation.faithfulness.removal import prepare_removal

    model, (tokenizer, _) = models["llama3"], forms.alone("llama3")
    ids = torch.tensor(own_ids("llama3", TEXT))
    objective = clrp.logit_diff(model, target=TARGET, contrast=CONTRAST)
    drawn = prepare_removal(model, ids, objective, replace="random", draws=2000).stand_ins
    assert drawn is not None
    marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert set(range(len(tokenizer))) - set(drawn.flatten().tolist()) == set(marked)
