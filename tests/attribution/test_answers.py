"""answer_diff(): two continuations of one prompt, explained by the difference of two runs.

The truths are two separate runs of objectives written out here, the operation oracle's gradients
(which share no code with the package), and ``logit_diff`` where one token of each answer is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.zoo_expected import COVERED
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens
from truth.float64 import true_float64
from truth.op_oracle import OpOracle
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import FileFormatError, ModelStateError, PromptError, TokenError

RULES = tuple(clrp.RULE_SETS)
TARGET, CONTRAST = [7, 12, 30], [9, 5]
ENCODERS = ("bert", "bert-decoder", "roberta")  # as TransformerLens has it, all three
CAUSAL = tuple(name for name in COVERED if name not in ENCODERS)
SUMS = ("tokens", "resid", "heads")


def summed(ids: list[int], start: int, logprob: bool = False) -> Callable[[Tensor], Tensor]:
    """The sum over an answer's tokens, written out."""

    def objective(logits: Tensor) -> Tensor:
        rows = logits.log_softmax(-1) if logprob else logits
        return torch.stack([rows[0, start + j, i] for j, i in enumerate(ids)]).sum()

    return objective


def followed(prompt: Tensor, ids: list[int]) -> Tensor:
    return torch.cat([prompt, torch.tensor([ids], dtype=prompt.dtype)], dim=1)


def two_runs(
    model: Any, prompt: Tensor, target: list[int], contrast: list[int], *,
    logprob: bool = False, **how: Any,
) -> tuple[clrp.Attribution, clrp.Attribution]:  # fmt: skip
    start = prompt.shape[1] - 1
    return tuple(
        clrp.attribute(model, followed(prompt, ids[:-1]), summed(ids, start, logprob), **how)
        for ids in (target, contrast)
    )  # type: ignore[return-value]


def whole(result: clrp.Attribution, name: str) -> tuple[Tensor, Tensor]:
    """A sum at prompt and target, and at prompt and contrast, as two runs have them."""
    answer = result.answer
    assert answer is not None
    return getattr(answer.target, name), getattr(answer.contrast, name)


def assert_linear(
    found: clrp.Attribution, one: clrp.Attribution, other: clrp.Attribution, bound: float
) -> None:
    n = len(found.str_tokens)
    scale = max(float(run.resid.abs().max()) for run in (one, other))
    for name in (*SUMS, "neurons"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (getattr(found, name) is None)
        if first is None:
            continue
        if name == "neurons":
            wanted = first[:, :n] - second[:, :n]
            assert float((found.neurons - wanted).abs().max()) <= bound * scale
            continue
        wanted = first[..., :n] - second[..., :n]
        assert getattr(found, name).shape == wanted.shape
        assert float((getattr(found, name) - wanted).abs().max()) <= bound * scale, name
        target, contrast = whole(found, name)
        for got, own in ((target, first[..., n:]), (contrast, -second[..., n:])):
            assert got.shape[-1] == own.shape[-1] + 1
            assert not got[..., -1].any()  # never read
            if own.numel():
                assert float((got[..., :-1] - own).abs().max()) <= bound * scale, name
    assert abs(found.delta - (one.delta - other.delta)) <= bound * max(abs(one.delta), scale, 1.0)
    answer = found.answer
    assert answer is not None
    assert abs(answer.target.delta - one.delta) <= bound * max(abs(one.delta), 1.0)
    assert abs(answer.contrast.delta + other.delta) <= bound * max(abs(other.delta), 1.0)


def assert_balanced(result: clrp.Attribution, bound: float) -> None:
    """The ledger's totals are those of all tokens, the answers' own included."""
    answer = result.answer
    assert answer is not None
    parts = (result, answer.target, answer.contrast)
    at_tokens = sum(float(part.tokens.double().sum()) for part in parts)
    at_sites = torch.stack([part.resid.double().sum(-1) for part in parts]).sum(0)
    scale = max(*(float(part.resid.abs().sum(-1).max()) for part in parts), 1.0)
    rows = result.ledger.rows
    for row, total in zip(rows, (at_tokens, *at_sites.tolist()), strict=True):
        assert abs(row.total - total) <= bound * scale, row.site
    above = [*(row.total for row in rows[1:]), result.delta]
    for row, total in zip(rows, above, strict=True):
        assert abs(row.total + row.biases + row.positions + row.other - total) <= bound * scale
    assert abs(result.ledger.delta - result.delta) <= bound * scale


# ---------------------------------------------------------------- truths


@pytest.mark.parametrize(("name", "rules"), diagonal(CAUSAL, RULES))
def test_every_family_is_linear(name: str, rules: str) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    found = clrp.attribute(model, ids, answers, rules=rules)
    one, other = two_runs(model, ids, TARGET, CONTRAST, rules=rules)
    assert_linear(found, one, other, PROMISED[torch.float32])
    assert_balanced(found, PROMISED[torch.float32])


@pytest.mark.parametrize(("name", "rules"), diagonal(COVERED, RULES))
def test_one_token_each_is_logit_diff(name: str, rules: str) -> None:
    """Number for number, also with log-probabilities, whose normaliser cancels."""
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens()
    for logprob in (False, True):
        answers = clrp.answer_diff(model, ids, target=[7], contrast=[12], logprob=logprob)
        found = clrp.attribute(model, ids, answers, rules=rules)
        wanted = clrp.attribute(model, ids, clrp.logit_diff(model, 7, 12), rules=rules)
        assert all(torch.equal(getattr(found, n), getattr(wanted, n)) for n in SUMS)
        for field in dataclasses.fields(wanted):
            value = getattr(wanted, field.name)
            if field.name != "answer" and not isinstance(value, Tensor):
                assert getattr(found, field.name) == value, field.name
        assert found.answer is not None
        assert found.answer.target.delta + found.answer.contrast.delta == pytest.approx(found.delta)
        assert not any(x.tokens.any() for x in (found.answer.target, found.answer.contrast))


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULES))
@pytest.mark.parametrize("logprob", [False, True])
def test_float64(name: str, rules: str, logprob: bool) -> None:
    model, ids = boot(name), random_tokens()
    with true_float64(model):
        answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST, logprob=logprob)
        found = clrp.attribute(model, ids, answers, rules=rules, neurons=True)
        one, other = two_runs(
            model, ids, TARGET, CONTRAST, logprob=logprob, rules=rules, neurons=True
        )
    assert_linear(found, one, other, PROMISED[torch.float64])


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, ("attnlrp", "cplrp", "gim")))
def test_against_the_operation_oracle(name: str, rules: str) -> None:
    """Independent code: gradients of each answer's sum, from its tokens' logits down."""
    model, ids = zoo.boot(name), zoo.random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    found, n = clrp.attribute(model, ids, answers, rules=rules), ids.shape[1]
    truths = []
    for tail in (TARGET, CONTRAST):
        read = followed(ids, tail[:-1])
        seed = torch.zeros(*read.shape, zoo.VOCAB, dtype=torch.float64)
        for j, i in enumerate(tail):
            seed[0, n - 1 + j, i] = 1.0
        truths.append(OpOracle(zoo.hf_model(name), read, seed, rules).relevance)
    target, contrast = whole(found, "resid")
    for row, site in enumerate(found.sites):
        one, other = (truth[site][0].sum(-1) for truth in truths)
        bound = PROMISED[torch.float32] * max(float(one.abs().max()), float(other.abs().max()))
        assert (found.resid[row] - (one[:n] - other[:n])).abs().max() <= bound
        assert (target[row, :-1] - one[n:]).abs().max() <= bound
        assert (contrast[row, :-1] + other[n:]).abs().max() <= bound


# ---------------------------------------------------------------- shared beginnings


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shared_beginning_belongs_to_the_prompt(name: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=[20, 21, *TARGET], contrast=[20, 21, *CONTRAST])
    assert (answers.shared, answers.target) == ((20, 21), tuple(TARGET))
    longer = followed(ids, [20, 21])
    found = clrp.attribute(model, ids, answers)
    wanted = clrp.attribute(
        model, longer, clrp.answer_diff(model, longer, target=TARGET, contrast=CONTRAST)
    )
    assert found.answer is not None
    assert found.answer.shared == 2
    assert found.token_ids.tolist() == longer[0].tolist()
    assert all(torch.equal(getattr(found, n), getattr(wanted, n)) for n in SUMS)
    # the predictions of what both begin with cancel
    one, other = two_runs(model, ids, [20, 21, *TARGET], [20, 21, *CONTRAST])
    scale = max(float(run.resid.abs().max()) for run in (one, other))
    bound = PROMISED[torch.float32] * scale
    assert (found.resid - (one.resid[:, :11] - other.resid[:, :11])).abs().max() <= bound
    assert abs(found.delta - (one.delta - other.delta)) <= PROMISED[torch.float32] * abs(one.delta)


@pytest.mark.parametrize("swapped", [False, True])
def test_where_one_answer_begins_the_other_the_rest_is_explained(swapped: bool) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    sides = ([8, 9, 10, 11], [8, 9])
    target, contrast = sides[::-1] if swapped else sides
    answers = clrp.answer_diff(model, ids, target=target, contrast=contrast)
    found = clrp.attribute(model, ids, answers)
    longer, sign = followed(ids, [8, 9]), -1 if swapped else 1
    rest = clrp.attribute(model, followed(longer, [10]), summed([10, 11], 10))
    bound = PROMISED[torch.float32] * float(rest.resid.abs().max())
    assert (found.resid - sign * rest.resid[:, :11]).abs().max() <= bound
    assert found.delta == pytest.approx(sign * rest.delta, rel=1e-5)
    assert found.answer is not None
    full, empty = found.answer.target, found.answer.contrast
    if swapped:
        full, empty = empty, full
    assert (empty.delta, len(empty.tokens), full.delta) == (0.0, 0, found.delta)
    assert found.contrast_logit == (None if not swapped else pytest.approx(rest.delta, rel=1e-5))
    assert_balanced(found, PROMISED[torch.float32])


# ---------------------------------------------------------------- ways to run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [
    {"memory": "tiled", "tile": 4, "progress": False},
    {"memory": "plain", "attention": "fused"},
    {"memory": "tiled", "tile": 5, "progress": False, "attention": "fused"},
])  # fmt: skip
def test_tiled_and_fused_are_plain_and_eager(name: str, how: dict[str, Any]) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    plain = clrp.attribute(model, ids, answers, memory="plain", attention="eager")
    other = clrp.attribute(model, ids, answers, **how)
    assert_other_way(other, plain)


def assert_other_way(found: clrp.Attribution, plain: clrp.Attribution) -> None:
    assert plain.answer is not None
    sides = (plain.answer.target, plain.answer.contrast)
    scale = max(*(float(x.resid.abs().max()) for x in (plain, *sides)))
    for name in SUMS:
        pairs = [(getattr(found, name), getattr(plain, name))]
        pairs += zip(whole(found, name), whole(plain, name), strict=True)
        for got, wanted in pairs:
            assert (got - wanted).abs().max() <= 2 * PROMISED[torch.float32] * scale, name
    assert found.delta == pytest.approx(plain.delta, rel=1e-4, abs=1e-4)


def test_an_interrupted_run_keeps_a_folder_for_each_answer(tmp_path: Path) -> None:
    model, ids = boot("llama", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    folder = tmp_path / "blocks"
    how: dict[str, Any] = {"memory": "tiled", "tile": 4, "progress": False}
    first = clrp.attribute(model, ids, answers, checkpoint_dir=folder, **how)
    assert sorted(p.name for p in folder.iterdir()) == ["contrast", "target"]
    again = clrp.attribute(model, ids, answers, checkpoint_dir=folder, **how)
    assert torch.equal(first.resid, again.resid)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileFormatError, match=r"notes\.txt"):
        clrp.attribute(model, ids, answers, checkpoint_dir=folder, **how)


# ---------------------------------------------------------------- input and output


def test_texts_are_ids() -> None:
    model = boot("llama", torch.float32)
    by_text = clrp.answer_diff(model, "a b c", target=" d e", contrast=" d f g")
    ids = {
        side: model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for side, text in (("target", " d e"), ("contrast", " d f g"))
    }
    by_ids = clrp.answer_diff(model, "a b c", **ids)
    tensors = {side: torch.tensor(some) for side, some in ids.items()}
    assert by_text == by_ids == clrp.answer_diff(model, "a b c", **tensors)
    assert clrp.answer_diff(model, "a b c", target=[" d", " e"], contrast=ids["contrast"]) == by_ids
    assert by_text.shared == (ids["target"][0],)
    assert by_text.texts == (" e", " f g")
    result = clrp.attribute(model, "a b c", by_text)
    assert "".join(result.str_tokens) == "<bos>a b c d"
    assert (result.target, result.contrast) == (" e", " f g")
    assert result.answer is not None
    assert result.answer.contrast.str_tokens == (" f", " g")
    assert repr(result).startswith("Attribution(")
    assert "' e'" in str(by_text)
    assert "' f g'" in result.objective


def test_greedy_answers_are_known_as_such() -> None:
    model, ids = boot("qwen2", torch.float32), random_tokens()
    written: list[int] = []
    with torch.no_grad():
        for _ in range(3):
            written.append(int(model(followed(ids, written))[0, -1].argmax()))
    other = [(written[0] + 1) % 48, 5]
    for target, contrast, top in ((written, other, True), (other, written, False)):
        answers = clrp.answer_diff(model, ids, target=target, contrast=contrast)
        assert clrp.attribute(model, ids, answers).target_is_top == top


def test_files_and_pictures(tmp_path: Path) -> None:
    model = clrp.load_demo_model()
    case = clrp.load_demo_cases("code")[0]
    answers = clrp.answer_diff(
        model, case.prompt, target=f"{case.target} = first", contrast=f"{case.contrast} first"
    )
    result = clrp.attribute(model, case.prompt, answers)
    again = clrp.Attribution.load(result.save(tmp_path / "result.safetensors"))
    assert result.answer is not None
    assert again.answer is not None
    for side in ("target", "contrast"):
        for field in dataclasses.fields(clrp.AnswerSide):
            one, other = (getattr(getattr(x.answer, side), field.name) for x in (result, again))
            same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
            assert same, (side, field.name)
    assert (again.answer.shared, again.answer.logprob) == (0, False)
    page = result.save_html(tmp_path / "report.html").read_text("utf-8")
    assert "marked [target] and [contrast]" in page
    for picture in (str(result.show()), str(result.show_layers())):
        assert f"[target]{case.target}" in picture
        assert f"[contrast]{case.contrast}" in picture


def test_one_token_each_in_a_report(tmp_path: Path) -> None:
    model = clrp.load_demo_model()
    case = clrp.load_demo_cases("code")[0]
    answers = clrp.answer_diff(model, case.prompt, target=case.target, contrast=case.contrast)
    result = clrp.attribute(model, case.prompt, answers)
    page = result.save_html(tmp_path / "report.html").read_text("utf-8")
    assert "one token of each was explained" in page
    assert clrp.Attribution.load(result.save(tmp_path / "a.safetensors")).answer is not None


def test_a_result_without_answers_has_none_in_its_file(tmp_path: Path) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    result = clrp.attribute(model, ids, target=7, contrast=12)
    again = clrp.Attribution.load(result.save(tmp_path / "result.safetensors"))
    assert result.answer is again.answer is None
    assert b'"answer"' not in (tmp_path / "result.safetensors").read_bytes()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("given", "error", "message"), [
    ({"target": [5, 6], "contrast": [5, 6]}, TokenError, "the same answer"),
    ({"target": [], "contrast": [5]}, TokenError, "target has no tokens"),
    ({"target": [5], "contrast": ""}, TokenError, "contrast has no tokens"),
    ({"target": [5], "contrast": [480]}, TokenError, "outside the vocabulary"),
    ({"target": {5, 6}, "contrast": [7]}, TokenError, "no order"),
    ({"target": torch.ones(2), "contrast": [7]}, TokenError, "integers"),
    ({"target": torch.ones(2, 2).long(), "contrast": [7]}, TokenError, "of one answer"),
    ({"target": None, "contrast": [7]}, TokenError, "The target is None; give a text, a list"),
    ({"target": [7], "contrast": None}, TokenError, "The contrast is None"),
    ({"target": [[7, 8]], "contrast": [9]}, TokenError, "Token 0 of the target is a list"),
    ({"target": [5], "contrast": list(range(4, 48)) * 2}, PromptError, "context of 64"),
    ({"target": [5], "contrast": [6], "logprob": 1}, TypeError, "logprob=1"),
])  # fmt: skip
def test_answers_are_refused(given: dict[str, Any], error: type, message: str) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    with pytest.raises(error, match=message):
        clrp.answer_diff(model, ids, **given)


def test_one_parser_for_the_answers_of_both_functions() -> None:
    """Whatever form an answer has, ``answer_table`` and ``answer_diff`` read the same tokens."""
    model, ids = boot("llama", torch.float32), random_tokens()
    texts = [model.tokenizer.convert_ids_to_tokens(i) for i in TARGET]
    forms = [TARGET, tuple(TARGET), torch.tensor(TARGET), torch.tensor([TARGET]), texts,
             [TARGET[0], texts[1], f"id:{TARGET[2]}"]]  # fmt: skip
    for form in forms:
        assert clrp.answer_table(model, ids, form)["id"].tolist() == TARGET
        assert clrp.answer_diff(model, ids, target=form, contrast=[5]).target == tuple(TARGET)
    for one in (7, "id:7", torch.tensor(7), [7]):
        assert clrp.answer_table(model, ids, one)["id"].tolist() == [7]
        assert clrp.answer_diff(model, ids, target=one, contrast=[5]).target == (7,)


def test_made_by_hand_they_are_checked() -> None:
    with pytest.raises(TokenError, match="the same"):
        clrp.AnswerDiff((), ())
    with pytest.raises(TokenError, match="shared="):
        clrp.AnswerDiff((5, 6), (5,))


def test_they_are_no_function_of_logits() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    for call in (
        lambda: answers(model(ids)),
        lambda: clrp.run_with_relevance(model, ids, answers),
    ):
        with pytest.raises(TypeError, match=r"Use it in clrp\.attribute\("):
            call()
    assert clrp.attribute(model, ids, target=7, contrast=12).delta  # the model is as it was


def test_a_longer_prompt_than_they_were_made_for_is_checked_again() -> None:
    model = boot("qwen3", torch.float32)
    answers = clrp.answer_diff(model, random_tokens(1, 9), target=TARGET, contrast=CONTRAST)
    with pytest.raises(PromptError, match="65 tokens, more than the model's context"):
        clrp.attribute(model, random_tokens(1, 63), answers)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_one_token_only(name: str) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    with pytest.raises(ModelStateError, match="not causal"):
        clrp.attribute(model, ids, answers)


def test_a_forward_of_the_prompt_alone_is_refused() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    with pytest.raises(ValueError, match="Leave it out"):
        clrp.attribute(model, ids, answers, prefilled=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [[], [20]])
@pytest.mark.parametrize(("target", "contrast"), [(TARGET, CONTRAST), ([7], [9]), ([7, 12], [])])
def test_the_prompt_may_be_a_chat(
    shared: list[int], target: list[int], contrast: list[int], tmp_path: Path
) -> None:
    """Its messages stay what they are, and the answers are what the assistant writes next."""
    model, ids = boot("llama"), random_tokens(1, 9)
    answers = clrp.AnswerDiff(tuple(target), tuple(contrast), tuple(shared))
    wanted = clrp.attribute(model, ids, answers)
    texts = wanted.str_tokens[:9]
    message = clrp.Segment("user 1", "user", "user", 0, 9, "".join(texts))
    chat = clrp.ChatPrompt("".join(texts), ids[0], (message,), texts)
    result = clrp.attribute(model, chat, answers)
    assert torch.equal(result.tokens, wanted.tokens)
    more = ["answer"] * bool(shared)
    assert [s.name for s in result.segments] == ["user 1", *more]
    table = result.by("message")
    assert table["n_tokens"].tolist() == [9, *map(len, [shared] * bool(shared))]
    assert abs(table["relevance"].sum() - float(wanted.tokens.sum())) < 1e-6
    loaded = clrp.Attribution.load(result.save(tmp_path / "result.safetensors"))
    assert loaded.segments == result.segments
    page = result.save_html(tmp_path / "page.html").read_text()
    assert "user 1" in page

    graph = clrp.attribution_graph(model, chat, answers)
    own = [f"{side} answer" for side, tail in (("target", target), ("contrast", contrast))
           if len(tail) > 1]  # fmt: skip
    assert [s.name for s in graph.segments] == ["user 1", *more, *own]
    between = graph.by("message")
    assert between.str_tokens == ("user 1", *more, *own)
    whole = float(graph.weight.double().sum())
    assert abs(float(between.weight.double().sum()) - whole) < 1e-5 * max(1.0, abs(whole))


def test_one_token_each_is_in_logits_whatever_was_asked_for() -> None:
    """The difference of two log-probabilities is that of the logits, and each side says which."""
    model, ids = boot("llama"), random_tokens(1, 9)
    answers = clrp.answer_diff(model, ids, target=[7], contrast=[9], logprob=True)
    result = clrp.attribute(model, ids, answers)
    logits = model(ids)[0, -1].detach()
    assert result.answer is not None
    assert not result.answer.logprob
    assert abs(result.answer.target.delta - float(logits[7])) < 1e-5
    assert abs(result.delta - float(logits.log_softmax(-1)[7] - logits.log_softmax(-1)[9])) < 1e-5
