"""What the command line is given: prompts, hostile text, bad input, broken models."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import (
    FILE,
    MODEL,
    PROMPT,
    TEMPLATE,
    TEXT,
    USAGE,
    Ran,
    Run,
    ids_of,
    typed_next,
    words,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast
from truth import families

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import terminal as cli_terminal
from tl_contrastive_lrp.cli.prompt import read_prompt, token_ids, token_word

# The module: its room's door has a function of the same name.
ATTRIBUTE = importlib.import_module("tl_contrastive_lrp.attribution.attribute")

# ---- prompts -----------------------------------------------------------------------------------


def test_chat_explains_the_templates_ids(run: Run, folder: Path, bridge: Any) -> None:
    common = ("explain", "--model", folder, "--prompt", "b c", "--contrast", "z", "--json")
    messages = [{"role": "system", "content": "d"}, {"role": "user", "content": "b c"}]
    tokenizer = families.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids_of(run(*common, "--chat")) == expected
    assert expected.count(families.bos_id) == 1
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text + " f", add_special_tokens=False)["input_ids"]
    assert ids_of(run(*common, "--chat", "--system", "d", "--answer", " f")) == expected
    assert ids_of(run(*common)) == bridge.to_tokens("b c")[0].tolist() != expected


def test_prompt_files_are_taken_character_by_character(run: Run, folder: Path, bridge: Any) -> None:
    common = ("explain", "--model", folder, "--contrast", "z", "--json", "--prompt-file")
    Path("p.txt").write_bytes(b" a b\r\nc\n\n")
    done = run(*common, "p.txt")
    assert ids_of(done) == bridge.to_tokens(" a b\r\nc\n\n")[0].tolist()
    assert "--strip-newline" in done.err
    assert done.json["notes"]
    done = run(*common, "p.txt", "--strip-newline")
    assert ids_of(done) == bridge.to_tokens(" a b\r\nc\n")[0].tolist()
    Path("p.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read_prompt(None, "p.txt", strip_newline=True) == "a"
    assert done.err == ""
    Path("p.txt").write_bytes(b"a\n")
    assert run(*common, "p.txt", "--quiet").err == ""
    assert ids_of(run(*common, "-", stdin=b"c a")) == bridge.to_tokens("c a")[0].tolist()


def test_notes_say_what_may_have_been_meant(run: Run, folder: Path, bridge: Any) -> None:
    table = clrp.next_token_table(bridge, PROMPT)
    spaced = [t for t in table["token"] if t[:1] == " " and t.strip() not in set(table["token"])]
    likely = next(t for t in spaced if t.strip())
    done = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--target", likely.strip(),
        "--contrast", "id:4",
    )  # fmt: skip
    assert done.code == 0
    assert "with a leading space" in done.err
    done = run("explain", "--model", folder, "--prompt", "<bos><bos>a", "--contrast", "z")
    assert "two BOS tokens" in done.err


# ---- hostile text ------------------------------------------------------------------------------

HOSTILE = [
    "[red]", "[/]", "\x1b[31m", "</script><script>alert(1)</script>", "\u202eabc", "\n", "\t",
    "a'b", "$(x)", "-", "--", "", "\x9b2J", "{{7*7}}", "id:5", "&lt;", "\x00", "\u2028",
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are markup, control characters and shell syntax."""
    path = families.save_family("llama", tmp_path_factory.mktemp("cli") / "hostile")
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", *HOSTILE]
    pieces += [f"t{i}" for i in range(families.VOCAB - len(pieces))]
    core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", model_max_length=64, clean_up_tokenization_spaces=False,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_token_text_is_never_obeyed(run: Run, hostile: Path) -> None:
    prompt = "|".join(t for t in HOSTILE if t and t != "\x00")
    Path("p.txt").write_text(prompt, encoding="utf-8", newline="")
    common = ("explain", "--model", hostile, "--prompt-file", "p.txt", "--top", 40)
    reply = run(*common, "--target", "[red]", "--contrast", "[/]", "--json").json
    told_texts = {row["token"] for row in reply["tokens"]}
    assert {"[red]", "\x1b[31m", "\u202eabc", "\n"} <= told_texts
    done = run(*common, "--target", "[red]", "--contrast", "[/]", "--out", "r.html")
    assert done.code == 0
    listed = run(*common)
    sides = run(*common, "--target", "\u202eabc", "--contrast", "\x9b2J")
    assert sides.code == 0
    for text in (done.out, listed.out, sides.out):
        assert not {"\x1b", "\x9b", "\x00", "\u202e", "\u2028", "\t"} & set(text)
    assert "Why «[red]» and not «[/]»" in done.out
    assert "</script><script>alert(1)" in done.out
    assert "\\u202eabc" in done.out
    html = Path("r.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    # Whatever the likeliest alternative is, the command that names it explains it.
    again_done = run(*shlex.split(typed_next(listed))[1:], "--json")
    assert again_done.json["contrast"]["ids"] == [again_done.json["candidates"][1]["id"]]


def test_every_token_can_be_named(hostile: Path) -> None:
    model = TransformerBridge.boot_transformers(str(hostile), device="cpu")
    for i in range(families.VOCAB):
        word = token_word(model, i)
        assert token_ids(model, [word], "target") == (i,)
        assert cli_terminal.plain(word) == word
    assert token_word(model, 4) == "[red]"
    assert token_word(model, 4 + HOSTILE.index("id:5")).startswith("id:")


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--prompt": None}, USAGE, "--prompt or --prompt-file"),
        ({"--prompt-file": "p.txt"}, USAGE, "--prompt or --prompt-file"),
        ({"--system": "x"}, USAGE, "go with --chat"),
        ({"--rules": "lrp"}, USAGE, "attnlrp"),
        ({"--top": "0"}, USAGE, "--top"),
        ({"--out": "x", "--save": "x"}, USAGE, "the same file"),
        ({"--model": "/nowhere/model"}, MODEL, "There is no folder /nowhere/model"),
        ({"--model": "."}, MODEL, "no config.json"),
        ({"--model": "no-such/model"}, MODEL, "hub does not answer"),
        ({"--model": "not a name"}, MODEL, "not a name cannot be loaded"),
        ({"--target": "ab"}, TEXT, "'ab' is 2 tokens ('a', 'b')"),
        ({"--target": "ab"}, TEXT, "written id:123"),
        ({"--contrast": ""}, TEXT, "The contrast is an empty text"),
        ({"--contrast": "id:48"}, TEXT, "outside the vocabulary 0..47"),
        ({"--target": "z"}, TEXT, "share the token 'z'"),
        ({"--prompt": ""}, TEXT, "The prompt is empty"),
        ({"--prompt": "a" * 70}, TEXT, "context is 64"),
        ({"--pos": "40"}, TEXT, "Position 40 does not exist"),
        ({"--pos": "[-1]"}, USAGE, "as an integer"),
        ({"--prompt": "a\udcffb"}, TEXT, "no UTF-8"),
        ({"--target": "\udcff"}, TEXT, "no UTF-8"),
        ({"--out": "no/r.html"}, FILE, "mkdir -p no"),
        ({"--save": "."}, FILE, "is a folder"),
        ({"--prompt": None, "--prompt-file": "none.txt"}, FILE, "no prompt file none.txt"),
        ({"--prompt": None, "--prompt-file": "."}, FILE, "cannot be read"),
        ({"--prompt": None, "--prompt-file": "latin.txt"}, FILE, "byte 0xe9 at offset 3"),
    ],
)  # fmt: skip
def test_errors_have_a_code_and_a_message(
    run: Run, folder: Path, change: dict[str, str | None], code: int, message: str
) -> None:
    Path("p.txt").write_text("a")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    options = {"--model": str(folder), "--prompt": PROMPT, "--contrast": "z", **change}
    before = sorted(os.listdir())
    done = run(
        "explain", *[part for k, v in options.items() if v is not None for part in (k, v)], "--json"
    )
    assert done.code == code, done
    assert message in words(done.err.replace("│", " "))
    assert done.out == ""
    assert "Traceback" not in done.err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("option", "what"), [("--answer", "answer"), ("--system", "system message")]
)
def test_what_goes_with_a_chat_is_text_too(run: Run, folder: Path, option: str, what: str) -> None:
    done = run("explain", "--model", folder, "--prompt", PROMPT, "--chat", option, "a\udcff")
    assert (done.code, done.out) == (TEXT, "")
    assert f"Error: The {what} holds bytes that are no UTF-8 text." in done.err


def test_broken_models_are_no_tracebacks(run: Run, folder: Path, tmp_path: Path) -> None:
    def ask(path: Path, *more: str) -> Ran:
        return run("explain", "--model", path, "--prompt", "a", "--contrast", "z", *more)

    def copy(name: str) -> Path:
        new = tmp_path / name
        new.mkdir()
        for file in folder.iterdir():
            (new / file.name).write_bytes(file.read_bytes())
        return new

    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    alien = copy("alien")
    (alien / "config.json").write_text('{"model_type": "nothing_known"}')
    for path in (cut, alien):
        done = ask(path)
        assert done.code == MODEL, done
        assert f"{path} cannot be loaded" in done.err
        assert done.err.count("\n") == 1
    plain = copy("plain")
    (plain / "chat_template.jinja").unlink()
    done = ask(plain, "--chat")
    assert (done.code, done.out) == (TEXT, "")
    assert "has no chat template. Leave out --chat" in done.err
    refusing = copy("refusing")
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    done = ask(refusing, "--chat", "--system", "x")
    assert done.code == TEXT
    assert "no system role" in done.err
    assert "without --system" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_said(run: Run, folder: Path) -> None:
    done = run("explain", "--model", folder, "--prompt", "a", "--device", "cuda")
    assert done.code == MODEL
    assert "Use --device cpu." in done.err


@pytest.mark.parametrize("command", [("explain", "--prompt", "a"), ("check",)])
@pytest.mark.parametrize(
    ("there", "version", "dtype", "code", "says"),
    [
        (False, "2.9.0", "float32", MODEL, "torch finds no Apple GPU (MPS) here: "),
        (True, "2.8.0", "float32", MODEL, 'pip install --upgrade "torch>=2.9"'),
        (True, "2.9.0", "float64", USAGE, "MPS has no float64. Use --dtype float32, or --device"),
    ],
)
def test_where_mps_does_not_work_is_said(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...],
    there: bool, version: str, dtype: str, code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    monkeypatch.setattr(torch, "__version__", version)
    model = ("--model", folder) if command[0] == "explain" else (folder,)
    done = run(*command, *model, "--device", "mps", "--dtype", dtype)
    assert (done.code, done.out) == (code, "")
    assert says in re.sub(r"\s+", " ", done.err)
    assert "--device cpu" in done.err


def test_mps_is_handed_on(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, bridge: Any
) -> None:
    """Where it is there, the model is booted on it."""
    seen: list[Any] = []

    def boot(path: str, **how: Any) -> Any:  # noqa: ARG001
        seen.append(how["device"])
        return bridge

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot))
    done = run("explain", "--model", folder, "--prompt", PROMPT, "--contrast", "z",
               "--device", "mps")  # fmt: skip
    assert (done.code, seen) == (0, ["mps"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (clrp.errors.UncoveredComponentError("blocks.0.x has no rule"), MODEL, "blocks.0.x"),
        (clrp.errors.ModelStateError("quantised"), MODEL, "quantised"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory. Explain a shorter"),
        (ZeroDivisionError("boom"), 1, "Unexpected error: ZeroDivisionError: boom"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_errors_on_the_way(
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(ATTRIBUTE, "attribute", fail)
    arguments = ("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--out", "r")
    done = run(*arguments)
    assert done.code == code
    assert message in done.err
    assert "Traceback" not in done.err
    assert not os.path.exists("r")
    if code not in (MODEL, 130):
        assert "--debug" in done.err
        assert "Traceback" in run(*arguments, "--debug").err


def test_a_full_disk_names_the_file(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", ".hidden.tmp")

    monkeypatch.setattr("tl_contrastive_lrp.files.save_html", full)
    done = run("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--out", "r.html")
    assert (done.code, done.out) == (FILE, "")
    assert done.err == "Error: r.html cannot be written: No space left on device.\n"


def test_overflow_is_not_reported_as_relevance(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    real = clrp.attribute  # before the patch: the package keeps what it first finds

    def overflowed(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        return replace(result, tokens=result.tokens * float("inf"))

    monkeypatch.setattr(ATTRIBUTE, "attribute", overflowed)
    done = run("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--out", "r")
    assert (done.code, done.out) == (1, "")
    assert "Use --dtype float32" in done.err
    assert not os.path.exists("r")
