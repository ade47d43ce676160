"""BOS, chat templates and answers on the command line, on tokenizers of the real forms."""

from __future__ import annotations

import logging
import shlex
from typing import Any

import pytest
from support.cli_runs import TEXT, USAGE, Run, ids_of, typed_next, words
from transformers.utils import logging as chatter
from truth import chat_tokenizers as forms
from truth.chat_tokenizers import own_ids, true_logits

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.inputs.tokens import continuation_ids

OTHER = "The capital of Italy is"
SIDES = ("--target", "id:200", "--contrast", "id:210")
ANSWERS = ["    return a", "return a", "\n\n    return a\n", " Paris ", "\t", "é 12|", "ing the"]
CHATS = ["smollm", "qwen", "llama2", "llama2-first", "llama3", "gemma"]


@pytest.mark.parametrize("form", CHATS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_follows_the_templates_ids(form: str, answer: str) -> None:
    """Its ids are the vocabulary's for that very text, behind whatever stands before."""
    tokenizer, _ = forms.alone(form)
    ids = continuation_ids(tokenizer, answer)
    before = list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "b"}], tokenize=True, add_generation_prompt=True
        )["input_ids"]
    )
    reply = tokenizer.decode([*before, *ids])
    assert reply == tokenizer.decode(before) + answer
    # The tokenizer's own words for a text that stands behind a line's end.
    line = tokenizer("x\n" + answer, add_special_tokens=False)["input_ids"]
    if not answer.startswith((" ", "\n", "\t")):
        assert list(line[-len(ids) :]) == ids


@pytest.mark.parametrize("form", CHATS)
def test_chat_and_answer_keep_the_templates_ids(run: Run, form: str) -> None:
    tokenizer, _ = forms.alone(form)
    messages = [{"role": "user", "content": OTHER}]
    before = list(
        tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)[
            "input_ids"
        ]
    )
    common = ("explain", "--model", forms.folder(form), "--prompt", OTHER, "--chat", *SIDES)
    assert ids_of(run(*common, "--json")) == before
    done = run(*common, "--answer", "    return a", "--json", "--dtype", "float64")
    ids = ids_of(done)
    assert ids[: len(before)] == before
    assert tokenizer.decode(ids) == tokenizer.decode(before) + "    return a"
    logits = true_logits(form, ids)
    assert done.json["delta"] == pytest.approx(float(logits[200] - logits[210]), abs=1e-9)


@pytest.mark.parametrize("command", ["explain", "graph"])
@pytest.mark.parametrize("form", ["smollm", "gpt2", "llama3", "qwen-bos"])
def test_prepend_bos_is_an_option(run: Run, command: str, form: str) -> None:
    common = (command, "--model", forms.folder(form), "--prompt", OTHER, *SIDES, "--json")
    deltas: dict[str, Any] = {}
    for option, bos in (("--bos", True), ("--no-bos", False)):
        done = run(*common, option, "--dtype", "float64")
        assert (done.code, done.err) == (0, "")
        logits = true_logits(form, own_ids(form, OTHER, bos))
        deltas[option] = float(logits[200] - logits[210])
        assert done.json["delta"] == pytest.approx(deltas[option], abs=1e-9)
    done = run(*common, "--dtype", "float64")
    default = "--no-bos" if form == "qwen-bos" else "--bos"
    assert done.json["delta"] == pytest.approx(deltas[default], abs=1e-9)
    assert bool(done.json["notes"]) == (form != "llama3")
    if form != "llama3":
        assert done.err.count("Note: ") == 1
        assert "prepend_bos=" not in done.err
        for option in ("--bos", "--no-bos"):
            assert option in done.err
        assert run(*common, "--quiet").err == ""


def test_the_command_to_type_next_keeps_the_option(run: Run) -> None:
    for option in ("--bos", "--no-bos"):
        listed = run("explain", "--model", forms.folder("smollm"), "--prompt", OTHER, option)
        assert listed.code == TEXT
        line = shlex.split(typed_next(listed))
        assert option in line
        done = run(*line[1:], "--json")
        assert ids_of(done) == own_ids("smollm", OTHER, option == "--bos")


def test_the_command_to_type_next_keeps_an_empty_system_message(run: Run) -> None:
    """It is not the same as none: templates put one of their own where there is none."""
    common = ("explain", "--model", forms.folder("smollm"), "--prompt", OTHER, "--chat")
    listed = run(*common, "--system", "")
    done = run(*shlex.split(typed_next(listed))[1:], "--json")
    assert ids_of(done) == ids_of(run(*common, "--system", "", *SIDES, "--json"))
    assert ids_of(done) != ids_of(run(*common, *SIDES, "--json"))


def test_a_prompt_that_is_too_long_is_said_once(run: Run) -> None:
    """By us: the tokenizer's own words about its maximum would come before."""
    log_lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log_lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    before = chatter.get_verbosity()
    chatter.set_verbosity_warning()
    try:
        done = run("explain", "--model", forms.folder("smollm"), "--prompt", "a " * 3000)
    finally:
        chatter.set_verbosity(before)
        logging.getLogger("transformers").removeHandler(handler)
    assert (done.code, done.out, log_lines) == (TEXT, "", [])
    assert done.err.count("\n") == 1
    assert "context is 512" in done.err


def test_what_is_saved_says_whether_bos_was_put_first(run: Run) -> None:
    common = ("--model", forms.folder("smollm"), "--prompt", OTHER, *SIDES, "--save", "r")
    for options, bos in (((), True), (("--bos",), True), (("--no-bos",), False)):
        assert run("explain", *common, *options).code == 0
        assert clrp.Attribution.load("r").prepended_bos is bos
        assert run("graph", *common, *options).code == 0
        assert clrp.AttributionGraph.load("r").prepended_bos is bos
    assert run("explain", *common, "--chat").code == 0  # the template's ids are taken as they are
    assert clrp.Attribution.load("r").prepended_bos is None


def test_a_prompt_that_begins_with_bos_gets_no_second_one(run: Run) -> None:
    text = "<|im_start|>user"
    common = ("explain", "--model", forms.folder("smollm"), "--prompt", text, *SIDES, "--json")
    done = run(*common)
    assert ids_of(done) == own_ids("smollm", text)
    assert "no second one was put before it" in done.err
    done = run(*common, "--bos")
    assert ids_of(done) == own_ids("smollm", text, True)
    assert done.err.count("twice") == done.err.count("Note: ") == 1


def test_check_verifies_on_the_prompt_that_is_meant(run: Run) -> None:
    common = ("check", forms.folder("smollm"), "--verify", "--prompt", OTHER, "--json")
    for options, bos in (((), True), (("--bos",), True), (("--no-bos",), False)):
        done = run(*common, *options)
        assert done.code == 0, done
        reply = done.json
        assert reply["verification"]["n_tokens"] == len(own_ids("smollm", OTHER, bos))
        assert bool(reply["notes"]) == (options == ())


def test_options_that_make_no_sense(run: Run) -> None:
    folder = forms.folder("smollm")
    done = run("explain", "--model", folder, "--prompt", "a", "--chat", "--no-bos")
    assert done.code == USAGE
    assert "without --chat" in words(done.err.replace("│", " "))
    done = run("check", folder, "--verify", "--bos")
    assert done.code == USAGE
    assert "go with --prompt" in words(done.err.replace("│", " "))
