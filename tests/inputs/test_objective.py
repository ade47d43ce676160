"""Objectives: which logits count, with which sign, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from truth.families import VOCAB, boot, make_tokenizer

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import TokenError

# ids in the test tokenizer: four special tokens, a space, "a" to "z", then " a" to " q"
A, B, SPACE_A, SPACE_B = 5, 6, 31, 32


@pytest.fixture(scope="module")
def model() -> Any:
    return boot("qwen3", torch.float32)


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0))


def test_the_tokenizer_is_what_these_tests_think() -> None:
    tokenizer = make_tokenizer()
    assert [tokenizer.decode([i]) for i in (A, B, SPACE_A, SPACE_B)] == ["a", "b", " a", " b"]
    assert len(tokenizer(" z", add_special_tokens=False)["input_ids"]) == 2


# ---------------------------------------------------------------- values


def test_ids_and_strings_mean_the_same(model: Any, logits: Tensor) -> None:
    wanted = sum(logits[row, -1, A] - logits[row, -1, SPACE_B] for row in range(2))
    for target, contrast in [
        (A, SPACE_B),
        ("a", " b"),
        ("a", SPACE_B),
        (torch.tensor(A), np.int64(SPACE_B)),
        (["a"], {" b"}),
        (torch.tensor([A]), (SPACE_B,)),
        ({A, "a"}, frozenset([" b", SPACE_B])),
    ]:
        got = clrp.logit_diff(model, target, contrast)(logits)
        assert got.shape == ()
        torch.testing.assert_close(got, wanted)


def test_a_set_counts_as_its_mean_logit(model: Any, logits: Tensor) -> None:
    got = clrp.logit_diff(model, {"a", "b", 9}, [SPACE_A, " b"])(logits)
    rows = logits[:, -1].double()
    wanted = (rows[:, A] + rows[:, B] + rows[:, 9]) / 3 - (rows[:, SPACE_A] + rows[:, SPACE_B]) / 2
    torch.testing.assert_close(got.double(), wanted.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pos", [0, 2, -1, -5, 4])
def test_position(model: Any, logits: Tensor, pos: int) -> None:
    got = clrp.logit_diff(model, A, B, pos=pos)(logits)
    torch.testing.assert_close(got, (logits[:, pos, A] - logits[:, pos, B]).sum())


@pytest.mark.parametrize(
    "pos", [(1, 3), [1, 3], torch.tensor([1, 3]), np.array([1, -2]), (np.int32(1), 3)], ids=str
)
def test_a_position_for_each_row(model: Any, logits: Tensor, pos: Any) -> None:
    got = clrp.logit_diff(model, A, B, pos=pos)(logits)
    wanted = logits[0, 1, A] - logits[0, 1, B] + logits[1, 3, A] - logits[1, 3, B]
    torch.testing.assert_close(got, wanted)


def test_top_logit(logits: Tensor) -> None:
    torch.testing.assert_close(clrp.top_logit()(logits), logits[:, -1].amax(-1).sum())
    torch.testing.assert_close(clrp.top_logit(pos=1)(logits), logits[:, 1].amax(-1).sum())


def test_target_logit(model: Any, logits: Tensor) -> None:
    torch.testing.assert_close(clrp.target_logit(model, "a")(logits), logits[:, -1, A].sum())


@pytest.mark.parametrize("k", [1, 3, VOCAB - 1])
def test_minus_the_top_k_others(model: Any, logits: Tensor, k: int) -> None:
    wanted = 0.0
    for row in range(2):
        best = int(logits[row, -1].argmax())
        others = sorted((float(v) for i, v in enumerate(logits[row, -1]) if i != best))[::-1]
        got = clrp.logit_minus_top_k(model, best, k)(logits[row : row + 1])
        wanted = float(logits[row, -1, best]) - sum(others[:k]) / k
        assert abs(float(got) - wanted) < 1e-5


def test_top_k_gradient_is_the_means(model: Any, logits: Tensor) -> None:
    leaf = logits[:1].clone().requires_grad_(True)
    clrp.logit_minus_top_k(model, A, 2)(leaf).backward()
    row = leaf.grad[0, -1]
    others = [i for i in logits[0, -1].argsort(descending=True).tolist() if i != A][:2]
    assert row[A] == 1.0
    assert [row[i].item() for i in others] == [-0.5, -0.5]
    assert row.count_nonzero() == 3
    assert leaf.grad[0, :-1].count_nonzero() == 0


def test_minus_the_mean_of_all(model: Any, logits: Tensor) -> None:
    got = clrp.logit_minus_mean(model, A)(logits)
    torch.testing.assert_close(got, (logits[:, -1, A] - logits[:, -1].mean(-1)).sum())


def test_two_dimensional_logits_are_one_row(model: Any, logits: Tensor) -> None:
    objective = clrp.logit_diff(model, A, B)
    assert objective(logits[0]) == objective(logits[:1])


def test_half_precision_logits_are_summed_in_float32(model: Any) -> None:
    logits = torch.full((1, 1, VOCAB), 2048.0, dtype=torch.float16)
    logits[0, 0, :3] = torch.tensor([2050.0, 2052.0, 2054.0])
    got = clrp.logit_diff(model, {0, 1, 2}, {4, 5, 6, 7})(logits)
    assert got.dtype == torch.float32
    assert float(got) == 4.0


def test_objectives_are_plain_values(model: Any) -> None:
    import copy
    import pickle

    objective = clrp.logit_diff(model, "a", " b", pos=[1, 2])
    assert objective == clrp.logit_diff(model, A, SPACE_B, pos=(1, 2))
    assert hash(objective) == hash(copy.deepcopy(objective))
    assert pickle.loads(pickle.dumps(objective)) == objective
    with pytest.raises(AttributeError):
        objective.k = 3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", ["logit_diff", "target_logit", "top_k", "mean"])
@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("ab", ["2 tokens", "'a'", "'b'", "'ab'"]),
        (" z", ["2 tokens", "' '", "'z'"]),
        ("", ["is an empty text"]),
        (VOCAB, ["47", str(VOCAB)]),
        (-1, ["-1", "0..47"]),
        (True, ["True", "bool"]),
        (1.5, ["1.5", "float"]),
        (None, ["None"]),
        ({"a": 1}, ["dict"]),
        (torch.tensor(2.0), ["tensor"]),
        ([], ["empty"]),
        (set(), ["empty"]),
        (torch.tensor([], dtype=torch.long), ["empty"]),
        ([A, "ab"], ["2 tokens"]),
        ([A, True], ["bool"]),
    ],
    ids=str,
)
def test_what_is_no_token_is_refused(model: Any, make: str, token: object, said: list[str]) -> None:
    calls = {
        "logit_diff": lambda: clrp.logit_diff(model, token, B),
        "target_logit": lambda: clrp.target_logit(model, token),
        "top_k": lambda: clrp.logit_minus_top_k(model, token, 2),
        "mean": lambda: clrp.logit_minus_mean(model, token),
    }
    with pytest.raises(TokenError) as info:
        calls[make]()
    message = str(info.value)
    assert "target" in message
    for part in said:
        assert part in message


def test_the_contrast_is_called_contrast(model: Any) -> None:
    with pytest.raises(TokenError, match="contrast 'xyz' is 3 tokens"):
        clrp.logit_diff(model, A, "xyz")


def test_a_token_outside_the_vocabulary_is_refused(model: Any) -> None:
    """A character the tokenizer cannot write becomes <unk>: not what was asked for."""
    with pytest.raises(TokenError, match=r"vocabulary|tokens"):
        clrp.logit_diff(model, "é", B)


def test_the_unknown_token_itself_may_be_named(model: Any) -> None:
    assert clrp.target_logit(model, "<unk>").target == (3,)


@pytest.mark.parametrize(("target", "contrast"), [(A, A), ("a", A), ({A, B}, {B, 9})])
def test_shared_tokens_are_refused(model: Any, target: object, contrast: object) -> None:
    with pytest.raises(TokenError, match="share the token"):
        clrp.logit_diff(model, target, contrast)


@pytest.mark.parametrize("pos", [5, -6, 100])
def test_positions_out_of_range_are_refused(model: Any, logits: Tensor, pos: int) -> None:
    with pytest.raises(TokenError, match=rf"Position {pos} .* 5 tokens"):
        clrp.logit_diff(model, A, B, pos=pos)(logits)
    with pytest.raises(TokenError, match=f"Position {pos}"):
        clrp.logit_diff(model, A, B, pos=(0, pos))(logits)


def test_positions_for_another_batch_are_refused(model: Any, logits: Tensor) -> None:
    with pytest.raises(TokenError, match=r"3 positions .* 2 rows"):
        clrp.logit_diff(model, A, B, pos=(0, 1, 2))(logits)


@pytest.mark.parametrize("pos", [np.int64(2), torch.tensor(2)], ids=["numpy", "tensor"])
def test_a_whole_number_of_another_library_is_a_position(
    model: Any, logits: Tensor, pos: Any
) -> None:
    wanted = clrp.logit_diff(model, A, B, pos=2)
    assert clrp.logit_diff(model, A, B, pos=pos) == wanted
    assert clrp.logit_diff(model, A, B, pos=pos)(logits) == wanted(logits)


@pytest.mark.parametrize("pos", [1.5, "last", None, True, (0, 1.5), torch.tensor(1.5)], ids=repr)
def test_what_is_no_position_is_refused(model: Any, pos: Any) -> None:
    with pytest.raises((TokenError, TypeError), match="pos"):
        clrp.logit_diff(model, A, B, pos=pos)


@pytest.mark.parametrize("k", [0, -1, VOCAB, VOCAB + 1])
def test_k_out_of_range_is_refused(model: Any, k: int) -> None:
    with pytest.raises(TokenError, match=f"k={k} .*47 other"):
        clrp.logit_minus_top_k(model, A, k)


def test_logits_of_a_smaller_vocabulary_are_refused(model: Any) -> None:
    with pytest.raises(TokenError, match="47"):
        clrp.logit_diff(model, 47, 3)(torch.zeros(1, 2, 40))


def test_strings_need_a_tokenizer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "tokenizer", None)
    with pytest.raises(TokenError, match="no tokenizer"):
        clrp.logit_diff(model, "a", B)
    assert "id:5" in str(clrp.logit_diff(model, A, B))


# ---------------------------------------------------------------- words


def test_words_and_sign(model: Any) -> None:
    text = str(clrp.logit_diff(model, "a", " b"))
    assert "logit('a') − logit(' b')" in text
    assert "last position" in text
    assert "positive relevance supports logit('a')" in text
    assert "negative supports logit(' b')" in text
    assert "position 3" in str(clrp.logit_diff(model, A, B, pos=3))
    assert "mean logit of {'a', 'b'}" in str(clrp.logit_diff(model, {A, B}, 9))
    assert "3 highest other" in str(clrp.logit_minus_top_k(model, A, 3))
    assert "mean of all" in str(clrp.logit_minus_mean(model, A))
    assert "top logit" in str(clrp.top_logit())
    assert "−" not in str(clrp.target_logit(model, A)).partition("(positive")[0]


def test_texts_are_labels(model: Any) -> None:
    assert clrp.logit_diff(model, "a", " b").texts() == ("a", " b")
    assert clrp.target_logit(model, "a").texts() == ("a", "")
