"""What is printed for a token can be typed back, and prompts read as they were written.

The truth is the tokenizers' own: ids, vocabulary entries, and the text that they decode.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.browser import browser, probe, visit
from support.cli_runs import Run, typed_next
from truth.tokenizer_forms import FORMS, TEXTS, boot, saved

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.result import report_of
from tl_contrastive_lrp.cli.prompt import token_ids, token_word
from tl_contrastive_lrp.errors import TokenError
from tl_contrastive_lrp.graph.picture import view_of
from tl_contrastive_lrp.inputs.token_text import printed
from tl_contrastive_lrp.inputs.tokens import str_tokens, to_token_ids, token_names
from tl_contrastive_lrp.render import colored_tokens, page
from tl_contrastive_lrp.render.graph.picture import graph_html
from tl_contrastive_lrp.render.text import part_marks, script_json, visible_tokens, with_parts

WITH_BYTES = ("llama2", "gemma", "unigram-bytes")


def vocabulary(model: Any) -> dict[int, str]:
    return {i: entry for entry, i in model.tokenizer.get_vocab().items()}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_printed_means_its_own_token_when_typed_back(form: str) -> None:
    """Every id: special, added, whitespace, duplicate and nameless ones too."""
    model = boot(form)
    every = range(model.cfg.d_vocab)
    names = token_names(model, every)
    assert len(set(names)) == len(names)
    for i, name in enumerate(names):
        for typed in (name, printed(name, i), f"id:{i}", token_word(model, i)):
            assert to_token_ids(model, typed, "target") == (i,), (i, name, typed)
            assert token_ids(model, [typed], "contrast") == (i,)


@pytest.mark.parametrize("form", FORMS)
def test_the_candidate_table_prints_what_can_be_typed(form: str) -> None:
    model = boot(form)
    tokens = torch.tensor([[1, 9, 12]])
    frame = clrp.next_token_table(model, tokens, k=model.cfg.d_vocab)
    assert len(frame) == model.cfg.d_vocab
    for name, i in zip(frame["token"], frame["id"], strict=True):
        assert to_token_ids(model, name, "target") == (i,)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_that_is_typed_means_one_of_what_it_could_or_is_refused(form: str) -> None:
    """No third token: its own text, its vocabulary entry, or what the tokenizer makes of it."""
    model = boot(form)
    tokenizer, entries = model.tokenizer, vocabulary(model)
    words = {word for text in TEXTS for word in re.findall(r"\s*\S+|\s+", text)}
    words |= {entry.strip("▁Ġ#") for entry in entries.values()} | set(entries.values())
    for word in sorted(words):
        if re.match(r"id:\d", word):
            continue
        encoded = tokenizer(word, add_special_tokens=False)["input_ids"]
        fits = {i for i in entries if word in (entries[i], token_names(model, [i])[0])}
        fits |= set(encoded if len(encoded) == 1 else ())
        try:
            (found,) = to_token_ids(model, word, "target")
        except TokenError as refusal:
            said = str(refusal)
        else:
            alone = tokenizer.decode([found], clean_up_tokenization_spaces=False)
            assert found in fits or word.strip() == alone.strip(), (word, found)
            continue
        if "ambiguous" in said:
            assert len(re.findall(r"\(id (\d+)\)", said)) > 1
            assert len(encoded) != 1 or f"(id {encoded[0]})" in said


@pytest.mark.parametrize("form", FORMS)
def test_a_prompts_texts_joined_are_what_its_tokenizer_decodes(form: str) -> None:
    model = boot(form)
    tokenizer = model.tokenizer
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            texts = str_tokens(model, ids)
            assert len(texts) == len(ids)
            want = tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
            if "<0xE2>" in text and form in WITH_BYTES:
                # Read as the byte, which makes no character: shown as it was written.
                want = want.replace("\ufffd", "<0xE2>")
            assert "".join(texts) == want


@pytest.mark.parametrize("form", ["gpt2", "qwen", "llama3", "gemma", "llama2"])
def test_prompts_read_as_they_were_written(form: str) -> None:
    """Forms whose tokenizer keeps all of a text: spaces, line breaks, scripts, emoji."""
    model = boot(form)
    for text in TEXTS:
        if not text or any(word in text for word in ("<left>", "<0xE2>", "e\u0301", "▁")):
            continue  # tokenizers drop spaces there, or compose, or take a sign for another
        if form == "llama2" and any(t in text for t in model.tokenizer.get_added_vocab()):
            continue  # this form writes a space after an added token, and decodes it
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(str_tokens(model, ids)) == text
        result = clrp.attribute(model, torch.tensor(ids or [1]), clrp.top_logit(), progress=False)
        assert "".join(result.str_tokens) == text


def test_spaces_of_a_prompt_are_shown_with_the_llama2_form() -> None:
    """Version 0.1 showed ``Thecapitalof``."""
    model = boot("llama2")
    ids = model.tokenizer("The going is singing")["input_ids"]
    assert "".join(str_tokens(model, ids)) == "<s> The going is singing"
    bare = model.tokenizer("The going", add_special_tokens=False)["input_ids"]
    assert "".join(str_tokens(model, bare)) == "The going"


def test_a_continuation_is_not_taken_for_the_word_that_begins() -> None:
    """Version 0.1 took the printed ``ing`` for ``▁ing``."""
    model = boot("llama2")
    vocab = model.tokenizer.get_vocab()
    word, rest = vocab["▁ing"], vocab["ing"]
    assert model.tokenizer("ing", add_special_tokens=False)["input_ids"] == [word]
    with pytest.raises(TokenError, match="ambiguous") as caught:
        to_token_ids(model, "ing", "target")
    said = str(caught.value)
    assert f"'id:{rest}' for 'ing'" in said
    assert "' ing' for '▁ing'" in said
    assert to_token_ids(model, " ing", "target") == (word,)
    assert to_token_ids(model, "▁ing", "target") == (word,)
    assert to_token_ids(model, f"id:{rest}", "target") == (rest,)
    objective = clrp.logit_diff(model, f"id:{rest}", " ing")
    assert objective.target == (rest,)
    assert objective.contrast == (word,)
    assert str(objective).startswith(f"logit('id:{rest} ing') − logit(' ing')")


def test_bytes_are_shown_and_typed_as_such() -> None:
    """Version 0.1 printed all of them as U+FFFD, and took that for U+FFFD's own token."""
    model = boot("gpt2")
    vocab = model.tokenizer.get_vocab()
    lone = vocab["\u00e2"]  # byte 0xE2 in the alphabet of byte-level vocabularies
    assert token_names(model, [lone]) == ("<0xE2>",)
    assert to_token_ids(model, "<0xE2>", "target") == (lone,)
    own = [i for i in range(len(model.tokenizer)) if "\ufffd" in token_names(model, [i])[0]]
    for i in own:
        assert "ï¿½" in model.tokenizer.convert_ids_to_tokens(i)
    model = boot("llama2")
    lone = model.tokenizer.get_vocab()["<0x0A>"]
    assert token_names(model, [lone]) == ("<0x0A>",)
    assert to_token_ids(model, "<0x0A>", "target") == to_token_ids(model, "<0x0a>", "target")
    assert to_token_ids(model, "<0x0A>", "target") == (lone,)


def test_entries_of_the_vocabulary_are_understood() -> None:
    for form, entry in (("gpt2", "Ġthe"), ("t5", "▁Paris"), ("bert", "##ing"), ("clip", "the</w>")):
        model = boot(form)
        wanted = model.tokenizer.get_vocab().get(entry)
        if wanted is not None:
            assert to_token_ids(model, entry, "target") == (wanted,), (form, entry)


def test_a_duplicate_text_is_refused_with_both_ids() -> None:
    """ " the" is an entry of the vocabulary, and was added once more."""
    model = boot("gpt2")
    entry = model.tokenizer.get_vocab()["Ġthe"]
    added = model.tokenizer.get_vocab()[" the"]
    with pytest.raises(TokenError, match="ambiguous") as caught:
        to_token_ids(model, " the", "contrast")
    assert f"'Ġthe' for 'Ġthe' of the vocabulary (id {entry})" in str(caught.value)
    assert f"'id:{added}' for ' the' of the vocabulary (id {added})" in str(caught.value)


def test_ids_without_a_name_are_written_as_ids() -> None:
    model = boot("gpt2")
    known = len(model.tokenizer)
    assert token_names(model, [known, known + 4]) == (f"id:{known}", f"id:{known + 4}")
    assert str_tokens(model, [known, 5]) == (f"id:{known}", *str_tokens(model, [5]))
    assert f"id:{known}" in str(clrp.target_logit(model, known))
    with pytest.raises(TokenError, match=f"outside the vocabulary 0..{model.cfg.d_vocab - 1}"):
        to_token_ids(model, f"id:{model.cfg.d_vocab}", "target")


def test_an_id_beside_another_tokens_text_is_refused() -> None:
    model = boot("llama2")
    rest = model.tokenizer.get_vocab()["ing"]
    assert to_token_ids(model, f"id:{rest} ing", "target") == (rest,)
    with pytest.raises(TokenError, match=f"id {rest} is 'ing', not 'king'"):
        to_token_ids(model, f"id:{rest} king", "target")
    with pytest.raises(TokenError, match="without a name"):
        to_token_ids(model, f"id:{len(model.tokenizer)} ing", "target")


def test_what_a_terminal_hides_is_printed_beside_its_id() -> None:
    assert printed("a", 7) == "a"
    assert printed(" a", 7) == " a"
    assert printed("a b", 7) == "a b"
    assert printed("\n", 7) == "id:7 ↵"
    assert printed(" ", 7) == "id:7 ·"
    assert printed("a ", 7) == "id:7 a·"
    assert printed("a  b", 7) == "id:7 a··b"
    assert printed("\u200b", 7) == "id:7 \\u200b"
    assert printed("\u00a0", 7) == "id:7 \\xa0"
    assert printed("id:7", 7) == "id:7"
    assert printed("id:7 ing", 7) == "id:7 ing"
    assert printed("id:7  a", 7) == "id:7 ·a"


@pytest.mark.parametrize("form", ["gpt2", "llama2"])
def test_a_character_of_several_tokens_is_whole_at_the_first(form: str) -> None:
    model = boot(form)
    ids = model.tokenizer("a𒐫b", add_special_tokens=False)["input_ids"]
    texts = str_tokens(model, ids)
    at = texts.index("𒐫")
    assert texts[at + 1 : at + 4] == ("", "", "")
    assert texts[at + 4 :] == ("b",)
    cut = str_tokens(model, ids[: at + 2])  # in the middle of the character
    assert cut[at:] == ("<0xF0>", "<0x92>")


@pytest.mark.parametrize("form", ["llama2", "gpt2"])
def test_the_command_line_prints_what_it_understands(form: str, run: Run) -> None:
    prompt = "the going is"
    common = ("explain", "--model", saved(form), "--prompt", prompt)
    done = run(*common)
    rows = run(*common, "--json").json["candidates"]
    names = [printed(row["token"], row["id"]) for row in rows]
    for row, name in zip(rows, names, strict=True):
        assert re.search(rf"{re.escape(name)} +{row['id']} ", done.out), name
    told = run(*common, "--target", names[3], "--contrast", names[7], "--json").json
    assert told["target"]["ids"] == [rows[3]["id"]]
    assert told["contrast"]["ids"] == [rows[7]["id"]]
    assert "".join(row["token"] for row in told["tokens"]).removeprefix("<s>").strip() == prompt
    again = shlex.split(typed_next(done))[1:]
    told = run(*again, "--json").json
    assert told["target"]["ids"] == [rows[0]["id"]]
    assert told["contrast"]["ids"] == [rows[1]["id"]]


def test_parts_of_a_character_are_marked_in_pictures() -> None:
    """Version 0.1 showed U+FFFD for each; now the character, once, and which part each token is."""
    model = boot("gpt2")
    ids = torch.tensor(model.tokenizer("a𒐫, ж")["input_ids"])
    texts = str_tokens(model, ids.tolist())
    at = texts.index("𒐫")
    marks = ["¹⁄₄", "²⁄₄", "³⁄₄", "⁴⁄₄"]
    assert part_marks(texts)[at : at + 5] == [*marks, ""]
    assert visible_tokens(texts)[at : at + 4] == ["𒐫¹⁄₄", *marks[1:]]
    assert with_parts(texts)[at : at + 4] == [f"𒐫{mark}" for mark in marks]
    result = clrp.attribute(model, ids, clrp.top_logit(), progress=False)
    report = report_of(result)
    shown = re.findall(r'data-i="(\d+)"[^>]*title="«([^»]*)»[^>]*>([^<]*)</span>', report)
    for part, mark in enumerate(marks):
        assert (str(at + part), f"𒐫{mark}", ("" if part else "𒐫") + mark) in shown
    assert "of the tokens that make one character" in report
    assert "\ufffd" not in report
    picture = result.show().local_src
    assert all(f'"{script_json(mark)[1:-1]}"' in picture for mark in marks[1:])
    assert "of the tokens that make one character" in picture
    view = graph_html(view_of(clrp.attribution_graph(model, ids, clrp.top_logit())))
    assert all(f"𒐫{mark}" in view for mark in marks)


@browser
def test_text_is_found_across_the_parts_of_a_character(tmp_path: Path) -> None:
    """The marks are no text: a search for what was written finds it, and its tokens."""
    tokens = [" w"] * 1200
    tokens[600:606] = [" 龍", "", "", "を", "見", "る"]
    values = np.full(1200, 0.001)
    values[602] = 1.0
    html = page([colored_tokens(tokens, values)], "parts")
    body = """
      const said = await find('龍を見');
      await enter();
      return [said, now(), all('.lrp-now').map(span => span.textContent)];
    """
    said, hit, shown = visit(tmp_path, html, probe(body)).probe
    assert said.startswith("1 found")
    assert hit == [600, 601, 602, 603, 604]
    assert shown == [" 龍¹⁄₃", "²⁄₃", "³⁄₃", "を", "見"]


def test_only_empty_texts_after_a_long_character_are_parts_of_it() -> None:
    assert part_marks(["", "a", "", "é", "", "", "<s>", ""]) == [
        "", "", "", "¹⁄₂", "²⁄₂", "", "", "",
    ]  # fmt: skip
    assert part_marks([]) == []
    assert with_parts(["a", "", " é", ""]) == ["a", "", " é¹⁄₂", "é²⁄₂"]
    assert visible_tokens(["a", "", "é", ""]) == ["a", "∅", "é¹⁄₂", "²⁄₂"]


def test_tokens_added_later_are_seen() -> None:
    import copy

    from tl_contrastive_lrp.inputs.token_text import readings, token_name

    tokenizer = copy.deepcopy(boot("gpt2").tokenizer)
    new = len(tokenizer)
    assert readings(tokenizer, "<new one>") == ()
    assert token_name(tokenizer, new) == f"id:{new}"
    tokenizer.add_tokens(["<new one>"])
    assert readings(tokenizer, "<new one>") == (new,)
    assert token_name(tokenizer, new) == "<new one>"
