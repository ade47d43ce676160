"""``result.by``: sums over segments, against slow sums over the characters' own tokens.

Relevance is random, tokens are random pieces of a text (with characters of several tokens), and
the truth goes through the text one character at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from truth import chat_tokenizers as forms
from truth.chat_templates import TEMPLATES

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError
from tl_contrastive_lrp.inputs.segments import check_segments, divide, token_anchors

MESSAGES = [
    {"role": "system", "content": "Be brief. Be kind."},
    {"role": "user", "content": "The capital of Italy?\nAnd of Zürich 🎉?"},
]


@functools.cache
def chat_result() -> tuple[Any, clrp.Attribution]:
    template, form = TEMPLATES["qwen3"]
    model = forms.booted(form)
    model.tokenizer.chat_template = template
    prompt = clrp.chat(model, MESSAGES, answer="Rome")
    return prompt, clrp.attribute(model, prompt, target=200, contrast=210)


def with_tokens(
    str_tokens: tuple[str, ...], relevance: torch.Tensor, special: torch.Tensor, **fields: Any
) -> clrp.Attribution:
    _, result = chat_result()
    n = len(str_tokens)
    return dataclasses.replace(
        result, tokens=relevance, str_tokens=str_tokens, special=special, segments=(),
        token_ids=torch.zeros(n, dtype=torch.long), resid=torch.zeros(len(result.sites), n),
        heads=torch.zeros(*result.heads.shape[:2], n), pos=n - 1, **fields,
    )  # fmt: skip


PIECES = st.lists(
    st.sampled_from(
        ["a", " b", "", "cd", ". ", ".", "\n", " ", "e'f", "!", "7", "天", "é", "\n\n", "? X"]
    ),
    min_size=1,
    max_size=30,
)


def slow_owner(str_tokens: tuple[str, ...]) -> list[int]:
    """Character at which each token counts as beginning."""
    at, begins = 0, []
    for token in str_tokens:
        solid = token.strip()
        begin = at + (token.index(solid[0]) if solid else 0)
        begins.append(begins[-1] if not token and begins else begin)
        at += len(token)
    return begins


@given(pieces=PIECES, how=st.sampled_from(["word", "line", "sentence"]), seed=st.integers(0, 99))
def test_random_texts(pieces: list[str], how: str, seed: int) -> None:
    str_tokens = tuple(pieces)
    drawn = torch.Generator().manual_seed(seed)
    relevance = torch.randn(len(pieces), generator=drawn)
    special = torch.rand(len(pieces), generator=drawn) < 0.2
    result = with_tokens(str_tokens, relevance, special)
    assert token_anchors(str_tokens).tolist() == slow_owner(str_tokens)
    frame = result.by(how)
    segments = divide(how, str_tokens)
    check_segments(segments, len(pieces))
    assert "".join(segment.text for segment in segments) == "".join(pieces)
    assert (frame["n_tokens"] >= 1).all()
    assert frame["n_tokens"].sum() == len(pieces)
    for row in frame.itertuples():
        own = [float(r) for r in relevance[row.start : row.stop]]
        assert row.relevance == pytest.approx(math.fsum(own), abs=1e-14)
        assert row.positive == pytest.approx(math.fsum(r for r in own if r > 0), abs=1e-14)
        assert row.negative == pytest.approx(math.fsum(r for r in own if r < 0), abs=1e-14)
        assert row.share == pytest.approx(row.relevance / result.delta)
        assert (
            row.largest_token
            == str_tokens[row.start + max(range(len(own)), key=lambda k: abs(own[k]))]
        )
    total = math.fsum(relevance.tolist())
    assert frame["relevance"].sum() == pytest.approx(total, abs=1e-12)
    largest = max(
        (abs(float(r)) for r, s in zip(relevance, special, strict=True) if not s), default=0
    )
    if largest:
        scaled = result.by(how, normalize="largest")
        assert (scaled["relevance"] * largest - frame["relevance"]).abs().max() < 1e-12
        assert (scaled["share"] - frame["share"]).abs().max() < 1e-12
    else:
        with pytest.raises(ValueError, match="not special"):
            result.by(how, normalize="largest")


@given(pieces=PIECES)
def test_a_word_is_never_in_two_rows(pieces: list[str]) -> None:
    text, begins = "".join(pieces), slow_owner(tuple(pieces))
    segments = divide("word", tuple(pieces))
    for match in re.finditer(r"\w+", text):
        inside = [pos for pos, begin in enumerate(begins) if match.start() <= begin < match.end()]
        owners = {k for k, s in enumerate(segments) for pos in inside if s.start <= pos < s.stop}
        assert len(owners) <= 1


def test_words_merge_partial_tokens_and_characters() -> None:
    pieces = (
        "The",
        " cap",
        "ital",
        " of",
        " Z",
        "ü",
        "",
        "rich",
        ",",
        " don",
        "'t",
        " 🎉",
        "",
        "",
        "!",
    )
    segments = divide("word", pieces)
    names = ["The", "capital", "of", "Zürich", ",", "don't", "🎉", "!"]
    assert [s.name for s in segments][:6] == names[:6]
    assert "".join(s.name for s in segments[6:]) == "🎉!"


def test_sentences_and_lines() -> None:
    text = (
        "I ",
        "see. ",
        "No! ",
        "(Yes.) ",
        "Pi ",
        "is ",
        "3.14 ",
        "e.g. ",
        "this",
        ".\n",
        "\n",
        "天。",
        "地。",
    )
    names = [s.name for s in divide("sentence", text)]
    assert names == ["I see.", "No!", "(Yes.)", "Pi is 3.14 e.g. this.", "天。", "地。"]
    lines = divide("line", ("a", "\n", "  b", "\n", "\n", "c"))
    assert [(s.start, s.stop) for s in lines] == [(0, 2), (2, 5), (5, 6)]


def test_by_message_is_the_chat() -> None:
    prompt, result = chat_result()
    frame = result.by("message")
    assert frame["segment"].tolist() == [s.name for s in prompt.segments]
    assert frame["role"].tolist() == [s.role for s in prompt.segments]
    for row, segment in zip(frame.itertuples(), prompt.segments, strict=True):
        own = result.tokens[segment.start : segment.stop].double().sum()
        assert row.relevance == pytest.approx(float(own), abs=1e-12)
    assert frame["relevance"].sum() == pytest.approx(float(result.tokens.double().sum()), abs=1e-12)
    # Lines and words end where a message ends.
    cuts = {s.start for s in prompt.segments}
    for how in ("line", "word", "sentence"):
        by = result.by(how)
        assert cuts <= {*by["start"], len(prompt.tokens)}
        assert set(by["role"]) == {"", "system", "user", "assistant"}
    with pytest.raises(PromptError, match="no tool calls"):
        result.by("tool")


def test_ranges_and_texts() -> None:
    prompt, result = chat_result()
    frame = result.by({"b": (4, 6), "a": (1, 3)})
    assert list(zip(frame["segment"], frame["start"], frame["stop"], strict=True)) == [
        ("template", 0, 1),
        ("a", 1, 3),
        ("template", 3, 4),
        ("b", 4, 6),
        ("rest", 6, len(prompt.tokens)),
    ]
    texts = result.by(["Be kind", "Italy"])
    assert texts["segment"].tolist() == ["rest", "Be kind", "rest", "Italy", "rest"]
    row = texts.iloc[3]
    assert "".join(result.str_tokens[row["start"] : row["stop"]]).strip() == "Italy"
    assert row["role"] == "user"
    for how, message in [
        ({"a": (1, 3), "b": (2, 4)}, "'a' .tokens 1 to 3. and 'b' .2 to 4. overlap"),
        (["capital of", "of Italy"], "overlap"),
        (["Be"], "more than once"),
        (["Paris"], "does not contain 'Paris'"),
        ([""], "does not contain"),
        ([], "No segment"),
        ({}, "No segment"),
        ({"a": (3, 3)}, "0 <= start < end"),
        ({"a": (0, 999)}, "0 <= start < end"),
        ({"a": 3}, "give .start, end."),
        ("paragraph", "use one of"),
        (3, "use one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            result.by(how)
    with pytest.raises(ValueError, match="normalize"):
        result.by("word", normalize="max")


def test_a_prompt_without_messages() -> None:
    _, result = chat_result()
    plain = dataclasses.replace(result, segments=())
    with pytest.raises(PromptError, match="has no messages"):
        plain.by("message")
    assert plain.by("line")["relevance"].sum() == pytest.approx(float(plain.tokens.double().sum()))
    with pytest.raises(ValueError, match="in order"):
        dataclasses.replace(result, segments=result.segments[1:])
    with pytest.raises(ValueError, match="segments"):
        dataclasses.replace(result, segments=result.segments[:-1])


def test_segments_are_in_files_where_there_are_any(tmp_path: Path) -> None:
    prompt, result = chat_result()
    loaded = clrp.Attribution.load(result.save(tmp_path / "chat"))
    assert loaded.segments == prompt.segments
    assert loaded.by("message").equals(result.by("message"))
    plain = dataclasses.replace(result, segments=())
    with safe_open(plain.save(tmp_path / "plain"), framework="pt") as file:
        assert "segments" not in file.metadata()["data"]
    assert clrp.Attribution.load(tmp_path / "plain").segments == ()


def test_tools_and_their_names() -> None:
    template, form = TEMPLATES["qwen3"]
    model = forms.booted(form)
    model.tokenizer.chat_template = template
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    chat = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "Nothing."},
    ]
    result = clrp.attribute(model, clrp.chat(model, chat), target=200, contrast=210)
    frame = result.by("tool")
    assert frame["segment"].tolist() == [
        "rest", "tool call 1: look", "template", "tool result 1: look", "template",
    ]  # fmt: skip
    assert frame["relevance"].sum() == pytest.approx(float(result.tokens.double().sum()), abs=1e-12)


@pytest.mark.parametrize("include_special", [False, True])
def test_a_picture_of_the_segments(include_special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts and colours are those of the table; the template's own text is grey."""
    drawn: list[Any] = []

    def draw(texts: Any, values: Any, **look: Any) -> str:
        drawn.append((texts, values, look["greyed"]))
        return "picture"

    monkeypatch.setattr("tl_contrastive_lrp.render.colored_tokens", draw)
    _, result = chat_result()
    frame = result.by("message")
    assert result.show_by("message", include_special=include_special) == "picture"
    ((texts, values, greyed),) = drawn
    assert "".join(texts) == "".join(result.str_tokens)
    assert values.tolist() == frame["relevance"].tolist()
    if include_special:
        assert greyed is None
    else:
        assert greyed.tolist() == [kind == "template" for kind in frame["kind"]]


def test_the_picture_is_one() -> None:
    _, result = chat_result()
    assert "Be brief" in str(result.show_by("message"))
