"""Locators, each against what is planted or found by trying everything."""

# ruff: noqa: ARG001, ARG002, ARG005 (made-up checkers, writers and judges)

from __future__ import annotations

import pytest
import torch

from tl_contrastive_lrp.study.benchmarks.item import Item
from tl_contrastive_lrp.study.cases import Verdict
from tl_contrastive_lrp.study.collect import LOCATORS, CollectSettings, register_locator
from tl_contrastive_lrp.study.collect.generate import Reading
from tl_contrastive_lrp.study.collect.locate import leaves
from tl_contrastive_lrp.study.collect.place import Completion, Failure

SETTINGS = CollectSettings()


class Letters:
    """A writer whose token i is the letter i, and which always goes on with "z" up to the limit."""

    end_ids = (26,)

    def __init__(self, logits=None):
        self.logits, self.rolled = logits, []

    def text(self, ids):
        return "".join(chr(97 + i) for i in ids if i != 26)

    def read(self, prompt_ids, ids):
        return Reading((*prompt_ids, *ids), len(prompt_ids), self.logits, None)

    def roll(self, reading, branches, limit):
        done = reading.ids[reading.n_prompt :]
        self.rolled += branches
        return [(*done[:p], t, *[25] * ((limit - p - 1) * (t != 26))) for p, t in branches]


class Rule:
    """A benchmark that passes texts of which a function is true."""

    name = "rule"

    def __init__(self, passes, can_pass=lambda text: None):
        self.passes, self.may = passes, can_pass

    def check(self, item, text):
        return Verdict(self.passes(text), "" if self.passes(text) else "no")

    def can_pass(self, item, text):
        return self.may(text)


def failure(text, benchmark=None, ended=True, writer=None, row=None, **more):
    ids = tuple(ord(c) - 97 for c in text) + ((26,) if ended else ())
    pieces = (*text, *(["<end>"] if ended else []))
    done = Completion(Item("1", row=row or {}), "?", (0,), ids, text, pieces, ended)
    rule = benchmark or Rule(lambda text: False)
    return Failure(done, rule, writer or Letters(), len(ids), **more)


@pytest.mark.parametrize(
    ("text", "ended", "index"),
    [("abx", True, 2), ("xbc", True, 0), ("ab", True, 2), ("ab", False, None), ("abc", True, None),
     ("abcd", True, 3), ("abc", False, None), ("", True, 0)],
)  # fmt: skip
def test_divergence_is_the_first_token_that_leaves_the_reference(text, ended, index):
    assert LOCATORS["divergence"](failure(text, ended=ended, reference="abc"), SETTINGS) == index


def test_without_a_reference_nothing_diverges():
    assert LOCATORS["divergence"](failure("abc"), SETTINGS) is None


def test_pieces_of_several_letters_leave_as_a_whole():
    assert leaves(["ab", "cd"], "abce", ended=False) == 1
    assert leaves(["ab", "", "ce"], "abce", ended=False) is None


def test_a_given_index_is_taken_if_the_completion_has_it():
    assert LOCATORS["given"](failure("abc", row={"target_position": 1}), SETTINGS) == 1
    assert LOCATORS["given"](failure("abc", row={"target_position": 9}), SETTINGS) is None
    assert LOCATORS["given"](failure("abc"), SETTINGS) is None


def test_a_constraint_is_broken_where_the_checker_can_no_longer_pass():
    rule = Rule(lambda text: "c" not in text, lambda text: False if "c" in text else None)
    assert LOCATORS["constraint"](failure("abcdc", rule), SETTINGS) == 2
    assert LOCATORS["constraint"](failure("abd", rule), SETTINGS) is None


def test_half_a_character_breaks_no_constraint():
    class Bytes(Letters):
        def text(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    rule = Rule(lambda text: False, lambda text: None if "née"[: len(text)] == text else False)
    for text, index in (("née", None), ("nèe", 2), ("nex", 1)):
        ids = tuple(text.encode())
        done = Completion(Item("1"), "?", (0,), ids, text, tuple(text), False)
        assert LOCATORS["constraint"](Failure(done, rule, Bytes(), len(ids)), SETTINGS) == index


def test_more_than_half_of_the_judges_must_agree():
    def votes(*indices):
        return [lambda item, pieces, i=i: i for i in indices]

    locate = LOCATORS["judge"]
    assert locate(failure("abcd", judges=votes(2, 2, 1)), SETTINGS) == 2
    assert locate(failure("abcd", judges=votes(2, 1)), SETTINGS) is None
    assert locate(failure("abcd", judges=votes(2, 2, None, None)), SETTINGS) is None
    assert locate(failure("abcd"), SETTINGS) is None
    seen = []
    locate(failure("ab", judges=[lambda item, pieces: seen.append(pieces)]), SETTINGS)
    assert seen == [("a", "b", "<end>")]
    for wrong in (7, -1, "2", True):
        with pytest.raises(ValueError, match=r"A judge answered .* an index in 0..4"):
            locate(failure("abcd", judges=votes(wrong)), SETTINGS)


def planted_logits(text, runner_up):
    """The written token first, then letters by distance; the runner-up so far behind."""
    ids = [ord(c) - 97 for c in text] + [26]
    logits = torch.full((len(ids) + 1, 27), -100.0)
    for row, token in enumerate(ids):
        others = [t for t in range(26) if t != token]
        logits[row, others] = -torch.arange(float(len(others))) - runner_up[row] + 10
        logits[row, token] = 10.0
    return logits


def test_recovery_is_the_first_tried_position_from_which_the_text_passes():
    """b at 1 or c at 3 repair the text; where all tokens tried at 1 are close, 3 is the answer."""
    text, passing = "xxxx", {"xbzzz", "xxxcz"}
    settings = CollectSettings(recovery_top_k=4, max_rollouts=100)
    writer = Letters(planted_logits(text, [3.0, 0.5, 2.0, 4.0, 9.0]))
    writer.logits[1, :4] = torch.tensor([9.9, 9.8, 9.7, 9.6])
    found = failure(text, Rule(lambda t: t in passing), writer=writer)
    assert LOCATORS["recovery"](found, settings) == 3
    assert {p for p, _ in writer.rolled} == {0, 2, 3, 4}
    writer = Letters(planted_logits(text, [3.0, 1.5, 2.0, 4.0, 9.0]))
    found = failure(text, Rule(lambda t: t in passing), writer=writer)
    assert LOCATORS["recovery"](found, settings) == 1


def test_recovery_tries_positions_whose_runner_up_is_close_and_another_token_is_not():
    writer = Letters(planted_logits("xxxx", [3.0, 0.5, 2.0, 4.0, 9.0]))
    found = failure("xxxx", Rule(lambda t: t == "xbzzz"), writer=writer)
    settings = CollectSettings(recovery_top_k=4, max_rollouts=4)  # one position: b is 1.5 behind
    assert LOCATORS["recovery"](found, settings) == 1
    assert writer.rolled == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_a_rollout_that_is_cut_off_passes_while_it_can_only_where_the_written_token_is_ruled_out():
    """No answer passes before its sixth letter, b breaks it for good, and the limit is 4."""
    rule = Rule(lambda t: len(t) >= 6 and "b" not in t, lambda t: False if "b" in t else None)
    logits = planted_logits("xbxx", [1.0] * 5)
    found = failure("xbxx", rule, False, Letters(logits), open_rollouts=True)
    assert found.passes([(1, 0), (0, 0), (2, 1)]) == [True, False, False]
    assert failure("xbxx", rule, False, Letters(logits)).passes([(1, 0)]) == [False]
    # the end token closes an answer: too short, and no more can come
    assert found.passes([(1, 26)]) == [False]
    # what was not checked is no repair, and half a character says nothing
    unknown = Rule(lambda t: False, lambda t: False if "b" in t else None)
    unknown.check = lambda item, text: Verdict.unchecked("no data")
    found = failure("xbxx", unknown, False, Letters(logits), open_rollouts=True)
    assert found.passes([(1, 0)]) == [False]
    half = Rule(lambda t: False, lambda t: False if "\ufffd" in t or "b" in t else None)
    writer = Letters(logits)
    writer.text = lambda ids: Letters.text(writer, ids).replace("z", "\ufffd")
    found = failure("xbxx", half, False, writer, open_rollouts=True)
    assert found.passes([(1, 0)]) == [True]


def test_recovery_tries_the_closest_runner_ups_within_its_rollouts():
    writer = Letters(planted_logits("xxxx", [3.0, 5.5, 2.0, 4.0, 9.0]))
    settings = CollectSettings(recovery_top_k=3, max_rollouts=8)
    found = failure("xxxx", writer=writer)
    assert LOCATORS["recovery"](found, settings) is None
    assert writer.rolled == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    assert found.n_rollouts == 6
    found.passes([(0, 0), (2, 1)])
    assert found.n_rollouts == 6  # known already


def test_nothing_is_rolled_out_after_a_token_that_rules_the_answer_out():
    """Where "b" must come second, and the rule can tell so, one of four tokens is worth it."""

    def passes(text):
        return text[1:2] == "b"

    def can_pass(text):
        return None if len(text) < 2 else passes(text)

    branches, results = [(1, 0), (1, 1), (1, 3), (2, 1)], [False, True, False, False]
    for rule, rolled in ((Rule(passes, can_pass), [(1, 1)]), (Rule(passes), branches)):
        found = failure("xcx", rule, ended=False, writer=Letters(torch.zeros(4, 27)))
        assert found.passes(branches) == results
        assert found.writer.rolled == rolled
        assert found.n_rollouts == len(rolled)
        assert found.passes(branches) == results
        assert found.n_rollouts == len(rolled)


def test_locators_can_be_added_by_name():
    def last(failure, settings):
        return len(failure.completion.ids) - 1

    try:
        register_locator("last", last)
        assert CollectSettings(locators=("last",)).locators == ("last",)
        with pytest.raises(ValueError, match="There is a locator 'last' already"):
            register_locator("last", lambda failure, settings: 0)
    finally:
        del LOCATORS["last"]
    with pytest.raises(ValueError, match=r"unknown locator: 'last'. Use one of 'given'"):
        CollectSettings(locators=("last",))
    with pytest.raises(TypeError, match="not a callable"):
        register_locator("number", 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"min_delta": float("nan")}, "min_delta is nan"),
     ({"top_k": 1}, "top_k is 1"), ({"locators": ()}, "locators is empty"),
     ({"contrast": ("mine",)}, "unknown contrast: 'mine'"),
     ({"max_rollouts": 2}, "fewer than recovery_top_k=3")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CollectSettings(**wrong)


def test_a_benchmark_with_planted_truth_gives_the_index():
    rule = Rule(lambda text: False)
    rule.first_wrong = lambda item, pieces, ended: len(pieces) - 1 if ended else 0
    assert LOCATORS["given"](failure("abc", rule), SETTINGS) == 3
