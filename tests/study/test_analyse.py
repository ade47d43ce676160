"""An analysis of a case, against the package's public calls and slow loops over tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.study_failures import case_of, demo_model, made_up, same_analysis, some_cases
from truth.families import boot

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import NonFiniteError
from tl_contrastive_lrp.evaluation.faithfulness import tokens_to_flip
from tl_contrastive_lrp.study import analyse as module
from tl_contrastive_lrp.study.analyse import AnalysisSettings, analyse, prepare
from tl_contrastive_lrp.study.records import (
    analysis_data,
    analysis_from,
    collected_data,
    collected_from,
)
from tl_contrastive_lrp.study.segments import instruction_groups, segment_masks, segment_sums
from tl_contrastive_lrp.study.store import Store

NAMED = {"name": "m", "fingerprint": "f"}
IDS = [1, 5, 9, 33, 17, 4, 8]


def run(model: Any, case: Any, rules: str = "attnlrp", **settings: Any) -> Any:
    return analyse(model, case, rules, AnalysisSettings(**settings), **NAMED)


@pytest.mark.parametrize("graph", [True, False, "not clear"])
@pytest.mark.parametrize("rules", ["attnlrp", "gim", "gradient"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_it_is_what_the_public_calls_say(name: str, rules: str, graph: Any) -> None:
    model, ids = boot(name), torch.tensor([IDS])
    logits = model(ids)[0, -1].detach().double()
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    target, contrast = order[0], order[3]
    case = made_up(IDS, target, contrast)
    found = run(model, case, rules, graph=graph, mass=0.7, flip_limit=4)
    asked = {"target": target, "contrast": contrast, "rules": rules}
    result = clrp.attribute(model, ids, **asked)
    scale = float(result.tokens.abs().max())
    assert float((found.tokens - result.tokens).abs().max()) <= 1e-6 * scale
    assert found.delta == pytest.approx(float(logits[target] - logits[contrast]), abs=1e-5)
    assert (found.target_rank, found.contrast_rank) == (1, 4)
    flips = tokens_to_flip(model, ids, result, target=target, limit=4)
    assert (found.tokens_to_flip, found.flip_limit) == (flips["scores"], 4)
    unclear = float(result.tokens[~result.special].sum()) < 0 and result.delta > 1
    if graph is False or (graph == "not clear" and not unclear):
        assert found.graph is None
        assert found.metrics == {}
        return
    whole = clrp.attribution_graph(model, ids, **asked, node_threshold=0.01)
    expected = whole.prune(mass=0.7).connected()
    assert torch.equal(found.graph.weight, expected.weight)
    assert torch.equal(found.graph.source_node, expected.source_node)
    summary = expected.summary().iloc[0]
    assert found.metrics["edges"] == len(expected.weight)
    assert found.metrics["degree_hubs"] == summary["degree_hubs"]
    assert set(found.seconds) == {"attribute", "graph", "flip"}


def test_a_graph_only_where_the_input_is_no_clue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the criterion, on cases of the demo."""
    model, seen = demo_model(), set()
    for case in some_cases(10):
        found = run(model, case, "gradient", graph="not clear", flip_limit=0)
        unclear = float(found.tokens[~found.special].sum()) < 0
        assert (found.graph is not None) == unclear
        seen.add(unclear)
        assert found.tokens_to_flip is None
    assert seen == {True, False}
    monkeypatch.setattr(module, "_graph_reads_tokens", lambda model: True)  # noqa: ARG005
    assert run(model, some_cases(1)[0], graph=False).graph is None


def test_one_forward_and_one_backward_with_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, case, calls = demo_model(), some_cases(1)[0], list[str]()
    run(model, case, flip_limit=0)  # the first run audits the model

    def counting(name: str, real: Any) -> Any:
        return lambda *arguments, **named: (calls.append(name), real(*arguments, **named))[1]

    embedding = counting("forward", torch.nn.functional.embedding)
    monkeypatch.setattr(torch.nn.functional, "embedding", embedding)
    monkeypatch.setattr(torch.autograd, "grad", counting("backward", torch.autograd.grad))
    run(model, case, flip_limit=0)
    assert calls == ["forward", "backward"]


def test_ranks_count_equal_logits_by_id() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert [module._rank(logits, i) for i in range(4)] == [4, 1, 2, 3]


def test_segments_are_a_partition_and_their_sums_are_loops() -> None:
    model = demo_model()
    for case in some_cases(6):
        n = len(case.ids)
        spans = {"instruction": ((3, 6), (9, 10)), "odd": ((5, 8),)}
        case = dataclasses.replace(case, segments=spans)
        prepared = prepare(model, case)
        special = prepared.facts.special.clone()
        special[4] = True
        masks = segment_masks(case, prepared.facts.str_tokens, special)
        names = {name: mask.nonzero()[:, 0].tolist() for name, mask in masks.items()}
        assert names["instruction"] == [3, 5, 9]
        assert names["odd"] == [6, 7]
        answer = range(len(case.prompt_ids), n)
        assert names.get("answer", []) == [i for i in answer if not special[i]]
        user = case.messages[0]["content"]
        texts = prepared.facts.str_tokens
        start = case.prompt.index(user)
        at, inside = 0, []
        for i, text in enumerate(texts[: len(case.prompt_ids)]):
            if at + len(text) > start and at < start + len(user.rstrip()):
                inside.append(i)
            at += len(text)
        taken = {3, 4, 5, 6, 7, 9} | {i for i in range(n) if special[i]}
        assert names["query"] == [i for i in inside if i not in taken]
        assert sorted(i for inside in names.values() for i in inside) == [
            i for i in range(n) if not special[i]
        ]
        relevance = torch.randn(n)
        relevance[4] = 100.0
        largest = max(abs(float(relevance[i])) for i in range(n) if not special[i])
        for part in segment_sums(masks, relevance, special):
            total = sum(float(relevance[i]) for i in names[part.name])
            assert part.n_tokens == len(names[part.name])
            assert part.relevance == pytest.approx(total, abs=1e-5)
            assert part.normalised == pytest.approx(total / largest, abs=1e-5)


def test_a_plain_prompt_is_query_all_over_and_a_changed_message_is_template() -> None:
    case = made_up(IDS, 3, 4)
    special = torch.zeros(7, dtype=torch.bool)
    texts = ("S", " a", " b", " c", " d", " e", " f")
    masks = segment_masks(case, texts, special)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"answer": 2, "query": 5}
    for content, query in (("b c", [2, 3]), (" a\n", [1]), ("other", []), (None, [])):
        chat = dataclasses.replace(case, messages=({"role": "user", "content": content},))
        masks = segment_masks(chat, texts, special)
        assert masks.get("query", torch.zeros(7)).nonzero().flatten().tolist() == query
        assert int(masks["template"].sum()) == 5 - len(query)
    twice = ({"role": "user", "content": "a"}, {"role": "user", "content": "a"})
    chat = dataclasses.replace(case, messages=twice)
    assert segment_masks(chat, ("a", "b", "a", "b", "c", "d", "e"), special)["query"].tolist() == [
        True,
        False,
        True,
        False,
        False,
        False,
        False,
    ]


def test_groups_by_hand() -> None:
    texts = ("Use", " Red", " ink", ",", " no", " blue", "!")
    relevance = torch.tensor([1.0, 2.0, -1.0, 9.0, 3.0, -4.0, 0.5])
    special = torch.tensor([False, False, False, True, False, False, False])
    case = made_up(IDS, 3, 4, text=" red", segments={"instruction": ((0, 3), (3, 6))})
    assert instruction_groups(case, texts, relevance, special) == {
        "with target": 2.0 / 4, "without target": -1.0 / 4,
    }  # fmt: skip
    other = dataclasses.replace(case, target=" green")
    assert instruction_groups(other, texts, relevance, special) == {"without target": 1.0 / 4}
    spaces = dataclasses.replace(case, target="  ")
    assert set(instruction_groups(spaces, texts, relevance, special)) == {"without target"}
    assert instruction_groups(made_up(IDS, 3, 4), texts, relevance, special) == {}


def test_several_rule_sets_share_what_they_can_and_nothing_more() -> None:
    model, (case, other) = demo_model(), some_cases(2)
    prepared = prepare(model, case)
    settings = AnalysisSettings()
    for rules in ("attnlrp", "gim"):
        apart = analyse(model, case, rules, settings, **NAMED)
        shared = analyse(model, case, rules, settings, **NAMED, prepared=prepared)
        assert same_analysis(apart, shared)
    with pytest.raises(ValueError, match=other.id):
        analyse(model, other, "gim", settings, **NAMED, prepared=prepared)


def test_relevance_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, case = demo_model(), some_cases(1)[0]
    real = module._explained

    def broken(*arguments: Any) -> Any:
        found = real(*arguments)
        found.tokens[2] = float("inf")
        return found

    monkeypatch.setattr(module, "_explained", broken)
    with pytest.raises(NonFiniteError, match=case.id):
        run(model, case)


def test_the_store_gives_back_every_bit(tmp_path: Any) -> None:
    store, model = Store(tmp_path), demo_model()
    case = case_of(
        clrp.load_demo_cases()[0],
        segments={"instruction": ((1, 3),)}, tools=({"name": "t"},),
    )  # fmt: skip
    for graph in (True, False):
        found = run(model, case, graph=graph)
        key = store.key("case", graph=graph)
        store.put(key, *analysis_data(found), dict(found.seconds))
        entry = store.get(key)
        again = analysis_from(entry.record, entry.tensors, entry.notes)
        assert same_analysis(found, again)
        assert again.seconds == found.seconds
        if graph:
            assert torch.equal(again.graph.weight, found.graph.weight)
            assert again.graph.history == found.graph.history
    key = store.key("chunk")
    store.put(key, {"cases": [collected_data(case)]})
    assert collected_from(store.get(key).record["cases"][0]) == case
    wrong = collected_data(case)
    del wrong["locator"]
    with pytest.raises(ValueError, match="locator"):
        collected_from(wrong)
