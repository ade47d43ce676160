"""Labels: criteria by hand, the planted truth by slow counting, and files that refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.studies import demo_study, made_up_analysis, made_up_case

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.criteria import (
    Criteria,
    automatic_label,
    heatmap_clue,
    notebook_reading,
    ordinary,
    strongest,
)
from tl_contrastive_lrp.study.labels import Label, read_labels, write_labels
from tl_contrastive_lrp.study.planted import manifest_by_chance, planted_truth, without_truth
from tl_contrastive_lrp.study.tables import _overlap


def row(n: int = 30, **at: float) -> list[float]:
    """Small relevance everywhere, and these values at these positions (p4=2.0)."""
    values = [0.01] * n
    for name, value in at.items():
        values[int(name[1:])] = value
    return values


def graph_of(*edges: tuple[int, int, int, float]) -> Any:
    """Edges (source site, source position, target position, weight), as criteria read them."""
    site, source, target, weight = zip(*edges, strict=True)
    return SimpleNamespace(
        source_site=torch.tensor(site),
        source_pos=torch.tensor(source),
        target_pos=torch.tensor(target),
        weight=torch.tensor(weight),
    )


def test_manifest_in_the_heatmap_needs_sign_concentration_and_a_relevant_token() -> None:
    case = made_up_case()  # instruction: positions 3 to 7
    flat = graph_of(*[(1, i, 29, 0.1) for i in range(1, 29)])

    def outcome(values: list[float], case: Any = case, graph: Any = flat) -> str:
        label = automatic_label(case, made_up_analysis(case, values, graph=graph))
        assert label is not None
        return label.outcome

    assert outcome(row(p4=-1.0, p12=3.0)) == "M-IA"
    assert outcome(row(p4=-3.0, p12=1.0)) == "NC-IA+AG"  # the sum supports the contrast
    spread = [0.5] * 30
    assert outcome(spread) == "NC-IA+AG"  # half of it needs 15 of 29 tokens
    elsewhere = row(p11=1.0, p12=1.0, p13=1.0, p14=1.0, p15=1.0)
    assert outcome(elsewhere) == "NC-IA+AG"  # nothing of the instruction among five
    assert outcome(elsewhere, replace(case, segments={})) == "M-IA"  # nothing known to miss
    # Decisive positions replace the instruction, and special tokens and the first never count.
    assert outcome(elsewhere, replace(case, decisive_positions=(13,))) == "M-IA"
    assert outcome(row(p0=90.0, p4=-1.0, p12=3.0)) == "M-IA"
    assert outcome(row(p0=90.0, p4=-3.0, p12=1.0)) == "NC-IA+AG"


def test_manifest_in_the_graph_counts_what_is_read_from_hidden_states() -> None:
    case = made_up_case()
    hidden = row(p11=1.0, p12=1.0, p13=1.0, p14=1.0, p15=1.0)

    def outcome(*edges: tuple[int, int, int, float]) -> str | None:
        label = automatic_label(case, made_up_analysis(case, hidden, graph=graph_of(*edges)))
        return label and label.outcome

    rest = [(1, i, 29, 0.01) for i in range(9, 29)]
    assert outcome((1, 4, 29, -2.0), *rest) == "NC-IA+M-AG"  # the sign of an edge is no matter
    assert outcome((0, 4, 29, 2.0), *rest) == "NC-IA+AG"  # edges from the input are the heatmap's
    assert outcome((1, 4, 4, 2.0), *rest) == "NC-IA+AG"  # so is what stays at its position
    label = automatic_label(case, made_up_analysis(case, hidden))
    assert label is None  # nobody has looked at a graph


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        (row(p4=-0.01, p12=3.0), "both"),  # no pull, all push
        (row(p4=-1.0, p12=3.0), "OIT"),
        (row(p4=2.0, p12=1.0), "URT"),  # the relevant token itself pushes
        (row(p4=-1.0, p5=1.0, p12=0.9), None),
    ],
)
def test_patterns_by_hand(values: list[float], pattern: str | None) -> None:
    case = made_up_case()
    label = automatic_label(case, made_up_analysis(case, values))
    assert label is not None
    assert label.pattern == pattern


def test_the_first_token_never_counts_even_if_it_is_not_special() -> None:
    case = made_up_case()
    nothing = torch.zeros(30, dtype=torch.bool)
    analysis = made_up_analysis(case, row(p0=-90.0, p4=-1.0, p12=3.0), special=nothing)
    assert not ordinary(analysis)[0]
    assert heatmap_clue(case, analysis).sign
    assert not bool(nothing.any())  # the analysis itself is as it was


def test_the_strongest_tokens_by_hand() -> None:
    case = made_up_case()
    analysis = made_up_analysis(case, row(p0=9.0, p4=-3.0, p12=2.0, p7=3.0))
    counted = ordinary(analysis)
    assert strongest(analysis.tokens, counted, 4).tolist() == [4, 7, 12, 1]  # equal ones in order
    assert strongest(analysis.tokens, counted, 99).tolist()[:3] == [4, 7, 12]
    assert len(strongest(analysis.tokens, counted, 99)) == 29


def test_rule_sets_share_no_token_that_does_not_count() -> None:
    """With fewer ordinary tokens than k, the others are not filled up with special ones."""
    case = made_up_case()
    special = torch.ones(30, dtype=torch.bool)
    special[[4, 7]] = False
    one = made_up_analysis(case, row(p4=2.0), special=special)
    special = special.clone()
    special[[4, 12]] = ~special[[4, 12]]
    other = made_up_analysis(case, row(p12=2.0), special=special)
    assert _overlap(one, other, k=5) == 0.5  # 7 of 4 and 7
    assert _overlap(one, other, k=1) == 0.0


def test_thresholds_are_data() -> None:
    case = replace(made_up_case(n=60), segments={})
    values = [0.0] * 60
    values[10:24] = [1.0] * 14  # half of it on 7 of 59
    analysis = made_up_analysis(case, values)
    assert heatmap_clue(case, analysis).half == 7
    assert not heatmap_clue(case, analysis).found
    assert heatmap_clue(case, analysis, Criteria(half_within=0.12)).found
    with pytest.raises(ValueError, match="half_within is 0"):
        Criteria(half_within=0)


def test_a_label_refuses_another_case() -> None:
    case = made_up_case()
    with pytest.raises(ValueError, match="ifeval/1"):
        automatic_label(case, made_up_analysis(made_up_case("ifeval/1"), row()))


@pytest.mark.parametrize(
    ("values", "groups", "reading", "needed"),
    [
        (row(p4=-1.0, p12=3.0), {}, "underweighted", False),
        (row(p4=-3.0, p12=1.0), {}, "looks right", True),
        (row(p4=1.0), {"with target": 1.0, "without target": -0.5}, "under- and overweighted",
         False),
        (row(p4=1.0), {"with target": 1.0}, "under- and overweighted", False),
        (row(p4=1.0), {"with target": 1.0, "without target": 0.5}, "underweighted", False),
        (row(p4=1.0), {"with target": -1.0, "without target": 2.0}, "underweighted", False),
        (row(p4=1.0), {"without target": -0.5}, "underweighted", False),
        ([0.0] * 30, {}, "neutral", False),
    ],
)  # fmt: skip
def test_the_notebooks_criteria(
    values: list[float], groups: dict[str, float], reading: str, needed: bool
) -> None:
    found = notebook_reading(made_up_analysis(made_up_case(), values, groups=groups))
    assert (found.reading, found.graph_needed) == (reading, needed)


def test_chance_is_what_random_tokens_reach() -> None:
    """The stated chance of a hit is the frequency over random orders of the same tokens."""
    case = replace(made_up_case(), decisive_positions=(0, 4, 9))  # the first token never counts
    g = np.random.default_rng(0)
    pairs = [(case, made_up_analysis(case, g.permutation(30) + 1.0)) for _ in range(3000)]
    found = planted_truth(pairs, k=5)
    for what in ("hit", "precision", "recall"):
        expected = getattr(found, f"{what}_by_chance")
        assert np.ptp(expected) == 0
        assert getattr(found, what).mean() == pytest.approx(expected[0], abs=0.03)
    assert found.precision_by_chance[0] == pytest.approx(2 / 29)


def test_the_chance_of_a_label_is_its_frequency_over_shuffled_relevance() -> None:
    g = np.random.default_rng(0)
    values = np.array(row(p4=-1.0, p12=3.0, p20=0.5)) + 1e-4 * np.arange(30)  # no ties
    case = made_up_case()  # five of 29 tokens are relevant
    expected = manifest_by_chance(case, made_up_analysis(case, values))
    found = []
    for _ in range(1500):
        shuffled = values.copy()
        shuffled[1:] = g.permutation(values[1:])
        label = automatic_label(case, made_up_analysis(case, shuffled))
        found.append(label is not None)
    assert np.mean(found) == pytest.approx(expected, abs=0.04)
    assert 0.5 < expected < 0.8
    assert manifest_by_chance(case, made_up_analysis(case, -values)) == 0
    assert manifest_by_chance(without_truth(case), made_up_analysis(case, values)) == 1


def test_planted_truth_of_the_demo_by_slow_counting() -> None:
    results = demo_study(20, False)
    pairs = [(case, results.analysis(case.id, "demo", "attnlrp")) for case in results.cases]
    found = planted_truth(pairs, k=3)  # type: ignore[arg-type]
    for i, (case, analysis) in enumerate(pairs):
        assert analysis is not None
        assert case.decisive_positions is not None
        order = sorted(
            (p for p in range(1, len(case.ids)) if not analysis.special[p]),
            key=lambda p: -abs(float(analysis.tokens[p])),
        )
        top = [p in case.decisive_positions for p in order[:3]]
        assert found.hit[i] == any(top)
        assert found.precision[i] == pytest.approx(sum(top) / 3)
        assert found.manifest[i] == heatmap_clue(without_truth(case), analysis).found
    assert found.label_precision == (int((found.hit & found.manifest).sum()), found.manifest.sum())


def test_relevance_on_the_demo_finds_decisive_tokens_far_above_chance() -> None:
    results = demo_study(20, False)
    pairs = [(case, results.analysis(case.id, "demo", "attnlrp")) for case in results.cases]
    found = planted_truth(pairs, k=5)  # type: ignore[arg-type]
    assert found.hit.mean() > found.hit_by_chance.mean() + 0.4


def test_labels_survive_a_file(tmp_path: Path) -> None:
    labels = (
        Label("a/1", "Ada", "M-IA", "URT", "«↵\u2028😀»", "2026-01-02T03:04:05Z"),
        Label("a/2", "Ada", "NC-IA+AG"),
    )
    path = write_labels(tmp_path / "labels.jsonl", labels)
    assert read_labels(path) == labels
    with path.open("a") as file:
        file.write(json.dumps({"version": 1, "case_id": "a/1", "labeller": "Ada",
                               "outcome": "NC-IA+M-AG"}) + "\n")  # fmt: skip
    corrected = read_labels(path)
    assert [label.outcome for label in corrected] == ["NC-IA+AG", "NC-IA+M-AG"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ("[1]", "JSON object"),
        ('{"version":2}', "version is 2"),
        ('{"version":1,"case_id":"a","labeller":"b"}', "missing field: outcome"),
        ('{"version":1,"case_id":"a","labeller":"b","outcome":"M-IA","why":1}', "unknown field"),
        ('{"version":1,"case_id":"a","labeller":"b","outcome":"MIA"}', "outcome is 'MIA'"),
        ('{"version":1,"case_id":"a","labeller":" ","outcome":"M-IA"}', "labeller is empty"),
        ('{"version":1,"case_id":"a","labeller":"b","outcome":"M-IA","pattern":"x"}', "pattern"),
        ('{"version":1,"case_id":"a","labeller":"b","outcome":"M-IA","date":"soon"}', "date is"),
        ('{"version":1,"case_id":3,"labeller":"b","outcome":"M-IA"}', "case_id is 3"),
    ],
)
def test_lines_that_are_no_labels_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = write_labels(tmp_path / "labels.jsonl", [Label("a/1", "Ada", "M-IA")])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FileFormatError, match=r"line 2") as caught:
        read_labels(path)
    assert words in str(caught.value)
