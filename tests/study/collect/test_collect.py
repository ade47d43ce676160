"""From items to cases, on the demo benchmark, where the truth is planted."""

# ruff: noqa: ARG002, ARG005 (made-up checkers, writers and judges)

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import TokenizerMismatchError
from tl_contrastive_lrp.study.benchmarks import open_benchmark
from tl_contrastive_lrp.study.benchmarks.item import Item
from tl_contrastive_lrp.study.cases import REASONS, Case, Dropped, Verdict
from tl_contrastive_lrp.study.collect import CollectSettings, collect, collect_logged, complete
from tl_contrastive_lrp.study.collect.generate import Greedy
from tl_contrastive_lrp.study.models import ModelSpec

SPEC = ModelSpec("middle", "demo")
SETTINGS = CollectSettings(max_new_tokens=48, batch_size=16, locators=("given",))


@pytest.fixture(scope="module")
def model():
    return clrp.load_demo_model(device="cpu")


@pytest.fixture(scope="module")
def benchmark():
    return open_benchmark("demo")


@pytest.fixture(scope="module")
def items(benchmark):
    """Tasks of the demo's failed cases: the model fails all of them."""
    failed = {c.user for kind in ("format", "arithmetic", "code") for c in _cases(kind)}
    return [item for item in benchmark.items() if item.row["user"] in failed]


def _cases(kind):
    return clrp.load_demo_cases(kind)[:5]


@pytest.fixture(scope="module")
def found(model, benchmark, items):
    return collect(model, benchmark, items, SETTINGS, spec=SPEC, model_fingerprint="f" * 64)


def test_cases_are_those_that_the_generators_own_script_recorded(found):
    """Target, contrast and decisive positions, by another way: export.py's teacher-forced one."""
    recorded = {(c.user, c.n_tokens): c for kind in ("format", "arithmetic", "code")
                for c in _cases(kind)}  # fmt: skip
    cases = {(c.messages[0]["content"], len(c.ids)): c for c in found if isinstance(c, Case)}
    assert recorded.keys() == cases.keys()
    for key, case in cases.items():
        want = recorded[key]
        assert (case.target_id, case.contrast_id) == (want.target_id, want.contrast_id)
        assert case.decisive_positions == want.decisive_positions
        assert case.delta == pytest.approx(want.delta, abs=0.01)
        assert case.completion == want.model_answer


def test_a_case_holds_what_one_plain_forward_says(model, found, benchmark, items):
    by_id = {f"demo/{item.id}": item for item in items}
    for case in found:
        logits = model(torch.tensor([case.ids]))[0, -1].detach()
        assert int(logits.argmax()) == case.target_id == case.completion_ids[case.target_position]
        assert case.delta == pytest.approx(
            float(logits[case.target_id] - logits[case.contrast_id]), abs=1e-4
        )  # logits near 20, in float32
        assert case.delta > 1
        assert not benchmark.check(by_id[case.id], case.completion).passed
        assert case.provenance.model == "demo"
        assert case.provenance.fingerprint == "f" * 64
        if case.contrast_source.startswith("own"):
            rank = int((logits > logits[case.contrast_id]).sum()) + 1
            assert 2 <= rank <= 10
        spelled = "".join(model.tokenizer.decode([i]) for i in case.prompt_ids)
        assert spelled == case.prompt


def test_a_prompt_is_read_once_where_all_rollouts_start_at_one_place(
    model, benchmark, items, found, monkeypatch
):
    """The forward that gives Δℓ leaves the keys and values that its rollouts go on from."""
    read, reads = Greedy.read, []

    def counted(self, prompt_ids, completion_ids):
        reads.append(len(completion_ids))
        return read(self, prompt_ids, completion_ids)

    monkeypatch.setattr(Greedy, "read", counted)
    cases = collect(model, benchmark, items[:6], SETTINGS, spec=SPEC, model_fingerprint="f" * 64)
    assert cases == found[:6]
    assert reads == [case.target_position for case in cases]


def test_segments_are_the_instructions_and_the_rest_of_the_message(model, found):
    case = next(c for c in found if "format" in c.id)
    text = {
        name: ["".join(model.tokenizer.decode([i]) for i in case.prompt_ids[a:b]) for a, b in some]
        for name, some in case.segments.items()
    }
    row = next(i for i in open_benchmark("demo").items() if f"demo/{i.id}" == case.id)
    told = " ".join(row.instructions)
    assert "".join(text["instruction"]).split() == told.split()
    assert sorted(" ".join(text["instruction"] + text["query"]).split()) == sorted(
        case.messages[0]["content"].split()
    )


def test_a_chunk_does_not_depend_on_what_ran_before(model, benchmark, items, found):
    halves = [collect(model, benchmark, part, SETTINGS, spec=SPEC, model_fingerprint="f" * 64)
              for part in (items[6:], items[:6])]  # fmt: skip
    assert [c.target_id for c in halves[1] + halves[0]] == [c.target_id for c in found]
    again = collect(model, benchmark, items[6:], SETTINGS, spec=SPEC, model_fingerprint="f" * 64)
    assert again == halves[0]


def test_logged_completions_give_the_same_cases(model, benchmark, items, found):
    logged = [SimpleNamespace(prompt_ids=list(c.prompt_ids), completion_ids=list(c.completion_ids),
                              verdict=Verdict(False, "as logged")) for c in found]  # fmt: skip
    cases = collect_logged(model, benchmark, items, logged, SETTINGS, spec=SPEC)
    for case, want in zip(cases, found, strict=True):
        assert case.verdict.reason == "as logged"
        assert case.provenance.decoding == {"method": "logged"}
        assert dataclasses.replace(case, verdict=want.verdict, provenance=want.provenance) == want
    with pytest.raises(ValueError, match="items, but 1 logged"):
        collect_logged(model, benchmark, items, logged[:1], SETTINGS, spec=SPEC)


def test_another_writer_changes_nothing_of_what_a_case_says(model, benchmark, items):
    writer = clrp.load_demo_model(device="cpu", dtype=torch.bfloat16)
    cases = collect(model, benchmark, items, SETTINGS, spec=SPEC, writer=writer)
    kept = [c for c in cases if isinstance(c, Case)]
    assert len(kept) > len(items) // 2
    for case in kept:
        logits = model(torch.tensor([case.ids]))[0, -1].detach()
        assert int(logits.argmax()) == case.target_id
        assert case.delta == pytest.approx(
            float(logits[case.target_id] - logits[case.contrast_id]), abs=1e-4
        )  # logits near 20, in float32
        assert case.provenance.decoding["dtype"] == "bfloat16"


class Checker:
    """A benchmark of one question whose checker says what it is told to."""

    name = "one"

    def __init__(self, verdict, sandbox=None):
        self.verdict, self.sandbox = verdict, sandbox

    def check(self, item, completion):
        return self.verdict if self.sandbox is None else Verdict(self.sandbox(completion))

    def can_pass(self, item, beginning):
        return None

    def decisive(self, item, completion, position):
        return None


ONE = Item("1", messages=({"role": "user", "content": "Say yes."},), row={})


def reason(model, benchmark, item=ONE, **settings):
    sandbox = settings.pop("sandbox", None)
    chosen = CollectSettings(**{"max_new_tokens": 8, "locators": ("given",), **settings})
    (one,) = collect(model, benchmark, [item], chosen, spec=SPEC, sandbox=sandbox)
    assert isinstance(one, Dropped)
    assert one.id == "one/1"
    assert one.reason in REASONS
    return one.reason


def test_every_other_completion_says_why_it_is_no_case(model):
    wrong = Checker(Verdict(False, "no"))

    def at(**row):
        return dataclasses.replace(ONE, row=row)

    assert reason(model, Checker(Verdict(True))) == "passes"
    assert reason(model, Checker(Verdict.unchecked("no library"))) == "unchecked"
    assert reason(model, wrong) == "not located"
    assert reason(model, wrong, at(target_position=0)) == "no contrast"
    assert reason(model, wrong, max_prompt_tokens=3) == "too long"
    assert reason(model, wrong, max_new_tokens=1275) == "too long"
    (done,) = complete(model, [ONE], CollectSettings(max_new_tokens=8))
    order = model(torch.tensor([done.prompt_ids]))[0, -1].argsort(descending=True).tolist()
    assert order[0] == done.ids[0]
    close, far = order[1], order[-1]
    for no_token in (-1, len(order), 10**9):
        assert reason(model, wrong, at(target_position=0, contrast_id=no_token)) == "no contrast"
    near = at(target_position=0, contrast_id=close)
    assert reason(model, wrong, near, min_delta=1000.0) == "small delta"
    kept = collect(model, wrong, [at(target_position=0, contrast_id=far)],
                   CollectSettings(max_new_tokens=8, locators=("given",)), spec=SPEC)  # fmt: skip
    assert (kept[0].contrast_id, kept[0].contrast_source) == (far, "given")


def test_a_target_that_is_not_the_first_choice_is_dropped(model):
    (done,) = complete(model, [ONE], CollectSettings(max_new_tokens=8))
    other = SimpleNamespace(prompt_ids=done.prompt_ids, completion_ids=(9, 10), verdict=None)
    item = dataclasses.replace(ONE, row={"target_position": 0, "contrast_id": 5})
    settings = CollectSettings(max_new_tokens=8, locators=("given",))
    wrong = Checker(Verdict(False))
    (one,) = collect_logged(model, wrong, [item], [other], settings, spec=SPEC)
    assert one.reason == "not the top token"


def test_a_sandbox_goes_to_the_benchmark_that_has_none(model):
    unchecked = Checker(Verdict.unchecked("no sandbox"))
    assert reason(model, unchecked, sandbox=lambda text: True) == "passes"
    assert unchecked.sandbox is None


def test_a_siblings_candidates_are_tried_after_the_models_own(model):
    """A token outside the model's own top 2 but within the sibling's: the sibling is itself."""
    (done,) = complete(model, [ONE], CollectSettings(max_new_tokens=8))

    class Passing(Checker):
        def check(self, item, completion):
            right = completion.startswith(wanted)
            return Verdict(right, "" if right else "no")

    first = done.ids[0]
    other = clrp.load_demo_model(device="cpu")
    with torch.no_grad():  # the sibling prefers token 700 everywhere
        other.original_model.get_output_embeddings().weight[700] *= 30
    theirs = other(torch.tensor([done.prompt_ids]))[0, -1].topk(2).indices.tolist()
    new = next(t for t in theirs if t != first)
    wanted = model.tokenizer.decode([new])
    item = dataclasses.replace(ONE, row={"target_position": 0})
    settings = CollectSettings(max_new_tokens=8, locators=("given",), top_k=2, min_delta=0)
    (case,) = collect(model, Passing(None), [item], settings, spec=SPEC, siblings={"big": other})
    assert (case.contrast_id, case.contrast_source) == (new, "sibling big")


def test_a_sibling_of_another_tokenizer_is_refused(model, benchmark, items):
    import copy

    other = clrp.load_demo_model(device="cpu")
    other.tokenizer = copy.deepcopy(other.tokenizer)
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(TokenizerMismatchError, match="id 1194 is missing in the first and '<new>'"):
        collect(model, benchmark, items[:1], SETTINGS, spec=SPEC, siblings={"other": other})


def test_thinking_is_asked_for_only_where_the_template_has_it(model):
    settings = CollectSettings(max_new_tokens=4, thinking=False)
    assert complete(model, [ONE], settings)[0].prompt.endswith("assistant\n")
    with pytest.raises(clrp.errors.PromptError, match="enable_thinking"):
        complete(model, [ONE], dataclasses.replace(settings, thinking=True))
