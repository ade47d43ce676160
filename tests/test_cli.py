"""The command line: what it prints, writes and returns, on tiny local models."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import command as cli_command
from tl_contrastive_lrp.cli import demo as cli_demo
from tl_contrastive_lrp.cli import exit as cli_exit
from tl_contrastive_lrp.cli import main as cli_main
from tl_contrastive_lrp.cli import options as cli_options
from tl_contrastive_lrp.cli import terminal as cli_terminal
from tl_contrastive_lrp.cli.command import again
from tl_contrastive_lrp.cli.prompt import read_prompt, token_ids, token_word
from tl_contrastive_lrp.demo import KINDS, load_demo_cases, load_demo_model

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "ab a c b d"
# Begins with BOS itself: a second one in front would change the prediction.
TEMPLATE = (
    "<bos>{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %} a{% endif %}"
)


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, "one line, one object"
        value: dict[str, Any] = json.loads(self.out)
        return value


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command in this process, in an empty folder, as it would run in a pipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "argv", [cli_command.PROGRAM, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli_main()
        captured = capsys.readouterr()
        code = left.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), *captured)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that puts BOS first, with a chat template."""
    path = families.save_family("llama", tmp_path_factory.mktemp("cli") / "llama")
    tokenizer = families.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bridge(folder: Path) -> Any:
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


def words(token: str) -> str:
    """``token`` with any run of white space standing for any other."""
    return re.sub(r"\s+", " ", token)


# ---- explaining ------------------------------------------------------------------------------


def test_explain_prints_a_table_and_writes_a_report(run: Run, folder: Path, bridge: Any) -> None:
    done = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--target", " a", "--contrast", " b",
        "--top", 9, "--out", "r.html",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    result = clrp.attribute(bridge, PROMPT, target=" a", contrast=" b")
    lines = [line.split() for line in done.out.splitlines()]
    table = [line for line in lines if line and line[0].isdigit() and len(line) > 3]
    assert [int(line[0]) for line in table] == result.top(9)["pos"].tolist()
    assert {np.sign(value) for value in result.tokens.tolist()} >= {-1, 1}
    for line in table:
        assert float(line[-3]) == pytest.approx(float(result.tokens[int(line[0])]), abs=5.1e-5)
    assert f"= {result.delta:+.4f}" in done.out
    assert "Positive relevance pushes towards « a», negative towards « b»." in done.out
    assert "Report: r.html" in done.out
    html = Path("r.html").read_text(encoding="utf-8")
    for i, text in enumerate(result.str_tokens):
        assert f'data-i="{i}"' in html
        assert text.strip().replace("<", "&lt;").replace(">", "&gt;") in html
    assert str(folder) in html
    assert "after the last token" in html


def test_json_is_one_object_and_agrees_with_attribute(run: Run, folder: Path, bridge: Any) -> None:
    done = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--target", " a", "--target", "id:9",
        "--contrast", " b", "--rules", "cplrp", "--pos", -3, "--json", "--save", "r.safetensors",
        "--out", "r.html", "--device", "cpu",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    told = done.json
    result = clrp.attribute(bridge, PROMPT, target={" a", 9}, contrast=" b", rules="cplrp", pos=-3)
    assert [row["relevance"] for row in told["tokens"]] == result.tokens.tolist()
    assert [row["id"] for row in told["tokens"]] == result.token_ids.tolist()
    assert [row["token"] for row in told["tokens"]] == list(result.str_tokens)
    assert [row["greyed"] for row in told["tokens"]] == result.greyed.tolist()
    assert (
        told["delta"]
        == result.delta
        == pytest.approx(told["target"]["logit"] - told["contrast"]["logit"], rel=1e-5)
    )
    assert told["share_to_tokens"] * told["delta"] == pytest.approx(
        sum(row["relevance"] for row in told["tokens"]), rel=1e-5
    )
    n = len(result.str_tokens)
    assert (told["status"], told["rules"], told["pos"]) == ("explained", "cplrp", n - 3)
    assert told["target"]["tokens"] == ["e", " a"]
    assert told["target"]["is_top"] is False
    logits = bridge(bridge.to_tokens(PROMPT))[0, -3]
    assert [row["id"] for row in told["candidates"]] == logits.topk(10).indices.tolist()
    assert [row["site"] for row in told["ledger"]][1:] == list(result.sites)
    # The saved file is the result; the page says which position it explains.
    loaded = clrp.Attribution.load("r.safetensors")
    assert torch.equal(loaded.resid, result.resid)
    assert torch.equal(loaded.heads, result.heads)
    assert (told["saved"], told["report"]) == ("r.safetensors", "r.html")
    html = Path("r.html").read_text(encoding="utf-8")
    assert f"prediction at position {n - 3}" in words(html)


def test_without_target_the_top_token_is_explained(run: Run, folder: Path, bridge: Any) -> None:
    top = int(bridge(bridge.to_tokens(PROMPT))[0, -1].argmax())
    other = "id:5" if top != 5 else "id:6"
    told = run(
        "explain", "--model", folder, "--prompt", PROMPT, "--contrast", other, "--json",
        "--out", "r.html",
    ).json  # fmt: skip
    assert told["target"]["ids"] == [top]
    assert told["target"]["is_top"] is True
    assert "The model wrote" in Path("r.html").read_text(encoding="utf-8")


def test_signs_are_said_when_the_model_prefers_the_contrast(run: Run, folder: Path) -> None:
    common = ("explain", "--model", folder, "--prompt", PROMPT)
    first = run(*common, "--json").json["candidates"]
    low, high = (f"id:{first[rank]['id']}" for rank in (3, 0))
    done = run(*common, "--target", low, "--target", "id:4", "--contrast", high)
    assert "Δℓ is negative: the model prefers" in done.out
    assert "mean logit of {" in done.out
    assert "negative" not in run(*common, "--contrast", low).out.split("Positive")[0]


def test_save_html_of_a_result_says_only_what_is_so(bridge: Any, tmp_path: Path) -> None:
    table = clrp.next_token_table(bridge, PROMPT, pos=2)
    first, second = (int(i) for i in table["id"][:2])
    result = clrp.attribute(bridge, PROMPT, target=first, contrast=second, pos=2)
    page = result.save_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The model wrote" in page  # the result knows that its target is the model's top token
    assert "prediction at position 2" in words(page)
    page = result.save_html(tmp_path / "r.html", candidates=table).read_text(encoding="utf-8")
    assert "The model wrote" in page
    assert "could have written" in page
    other = clrp.attribute(bridge, PROMPT, target=second, contrast=first, pos=2)
    page = other.save_html(tmp_path / "r.html", candidates=table).read_text(encoding="utf-8")
    assert "The model wrote" not in page
    top = clrp.attribute(bridge, PROMPT, clrp.top_logit())
    assert "top logit" in top.save_html(tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_first_token_that_is_not_special_is_greyed_too(run: Run) -> None:
    common = ("explain", "--model", families.saved("qwen3"), "--prompt", "b c", "--contrast", "z")
    rows = run(*common, "--json").json["tokens"]
    assert [(row["token"], row["greyed"]) for row in rows] == [("b", True), (" c", False)]
    assert re.search(r"^ +0 +b \* ", run(*common).out, re.MULTILINE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_reaches_the_model(run: Run, folder: Path, dtype: str) -> None:
    told = run(
        "explain", "--model", folder, "--prompt", "a b", "--contrast", "z", "--dtype", dtype,
        "--json",
    ).json  # fmt: skip
    assert told["dtype"] == dtype


# ---- no contrast -----------------------------------------------------------------------------


def typed_next(done: Ran) -> str:
    """The command that the candidate table ends with."""
    assert done.code == cli_exit.Code.PROMPT
    return done.out.split("type:\n\n", 1)[1].rstrip("\n")


def test_without_contrast_candidates_and_a_command_that_runs(
    run: Run, folder: Path, bridge: Any
) -> None:
    quoted = 'it\'s "a" $HOME `b`\n c'
    done = run(
        "explain", "--model", folder, "--prompt", quoted, "--top", 3, "--rules", "gim",
        "--out", "my page.html",
    )  # fmt: skip
    logits = bridge(bridge.to_tokens(quoted))[0, -1].double()
    top = logits.topk(10)
    rows = [line.split() for line in done.out.splitlines() if re.match(r"\s*\d+ ", line)]
    assert [int(row[0]) for row in rows] == list(range(10))
    assert [int(row[-5]) for row in rows] == top.indices.tolist()
    assert [float(row[-4]) for row in rows] == pytest.approx(top.values.tolist(), abs=6e-4)
    percent = (100 * logits.softmax(-1)[top.indices]).tolist()
    assert [float(row[-3]) for row in rows] == pytest.approx(percent, abs=6e-3)
    assert not os.path.exists("my page.html")

    command = shlex.split(typed_next(done))
    assert command[0] == cli_command.PROGRAM
    again_done = run(*command[1:], "--json")
    assert again_done.code == 0
    told = again_done.json
    assert told["target"]["ids"] == [int(top.indices[0])]
    assert told["contrast"]["ids"] == [int(top.indices[1])]
    assert told["rules"] == "gim"
    assert len(told["top"]) == 3
    assert [row["id"] for row in told["tokens"]] == bridge.to_tokens(quoted)[0].tolist()
    assert os.path.exists("my page.html")


def test_needs_contrast_as_json(run: Run, folder: Path) -> None:
    done = run("explain", "--model", folder, "--prompt", PROMPT, "--target", "z", "--json")
    assert done.code == cli_exit.Code.PROMPT
    assert done.json["status"] == "needs_contrast"
    assert len(done.json["candidates"]) == 10
    told = run(*shlex.split(done.json["command"])[1:]).json
    assert told["target"]["tokens"] == ["z"]
    assert told["contrast"]["ids"] == [done.json["candidates"][0]["id"]]


def test_the_command_runs_in_a_real_shell(run: Run, folder: Path, tmp_path: Path) -> None:
    """As a newcomer does it: run, copy what it says to type, run that."""
    program = tmp_path / "bin" / cli_command.PROGRAM
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tl_contrastive_lrp "$@"\n'
    )
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "ascii",  # a terminal without Δ
    }
    first = run("explain", "--model", folder, "--prompt-file", "-", stdin=b"a 'b'\n")
    done = subprocess.run(
        ["sh", "-c", typed_next(first)], stdin=subprocess.DEVNULL, env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == cli_exit.Code.DONE, done.stderr
    assert "Positive relevance pushes towards" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "text", ["-x", " -x", "--", "it's", "a\nb", "a\tb\x1b[0m\\'", "«é»", "$(x)"]
)
def test_commands_keep_any_text(text: str) -> None:
    typed = {"model": "m", "prompt": text, "prompt_file": None, "answer": "", "pos": -1}
    command = again(typed, text, target=[text], contrast=["b"])
    printed = cli_terminal.plain(command)
    assert printed == command, "what is printed is what runs"
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    arguments = [a.decode() for a in done.stdout.split(b"\0")[:-1]]
    joined = "\0".join(arguments).replace("--prompt=", "--prompt\0").replace("=-", "\0-")
    assert joined.split("\0")[:7] == [
        cli_command.PROGRAM, "explain", "--model", "m", "--prompt", text, "--target",
    ]  # fmt: skip


# ---- prompts ---------------------------------------------------------------------------------


def ids_of(done: Ran) -> list[int]:
    return [row["id"] for row in done.json["tokens"]]


def test_chat_explains_the_templates_ids(run: Run, folder: Path, bridge: Any) -> None:
    common = ("explain", "--model", folder, "--prompt", "b c", "--contrast", "z", "--json")
    messages = [{"role": "system", "content": "d"}, {"role": "user", "content": "b c"}]
    tokenizer = families.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids_of(run(*common, "--chat")) == wanted
    assert wanted.count(families.bos_id) == 1
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer(text + " f", add_special_tokens=False)["input_ids"]
    assert ids_of(run(*common, "--chat", "--system", "d", "--answer", " f")) == wanted
    assert ids_of(run(*common)) == bridge.to_tokens("b c")[0].tolist() != wanted


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


# ---- hostile text ----------------------------------------------------------------------------

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
    told = run(*common, "--target", "[red]", "--contrast", "[/]", "--json").json
    told_texts = {row["token"] for row in told["tokens"]}
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


# ---- errors ----------------------------------------------------------------------------------

USAGE, MODEL, TEXT, FILE = 2, 3, 4, 5


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
        ({"--contrast": ""}, TEXT, "0 tokens"),
        ({"--contrast": "id:48"}, TEXT, "outside the vocabulary 0..47"),
        ({"--target": "z"}, TEXT, "share the token 'z'"),
        ({"--prompt": ""}, TEXT, "The prompt is empty"),
        ({"--prompt": "a" * 70}, TEXT, "context is 64"),
        ({"--pos": "40"}, TEXT, "Position 40 does not exist"),
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

    monkeypatch.setattr("tl_contrastive_lrp.explain.attribute", fail)
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

    monkeypatch.setattr("tl_contrastive_lrp.render.files.save_html", full)
    done = run("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--out", "r.html")
    assert (done.code, done.out) == (FILE, "")
    assert done.err == "Error: r.html cannot be written: No space left on device.\n"


def test_overflow_is_not_reported_as_relevance(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    def overflowed(*arguments: Any, **options: Any) -> Any:
        result = clrp.attribute(*arguments, **options)
        return replace(result, tokens=result.tokens * float("inf"))

    monkeypatch.setattr("tl_contrastive_lrp.explain.attribute", overflowed)
    done = run("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--out", "r")
    assert (done.code, done.out) == (1, "")
    assert "Use --dtype float32" in done.err
    assert not os.path.exists("r")


# ---- demo ------------------------------------------------------------------------------------


def test_demo_explains_a_recorded_failure(run: Run) -> None:
    done = run("demo", "--out", "r.html")
    assert (done.code, done.err.count("\n")) == (0, 1)
    told = run("demo", "--json").json
    case = next(c for c in load_demo_cases() if c.id == told["case"]["id"])
    assert case.id in done.out
    assert told["delta"] == pytest.approx(case.delta, abs=1e-3)
    assert told["target"]["is_top"] is True
    relevance = [abs(row["relevance"]) for row in told["tokens"]]
    assert [row["pos"] for row in told["case"]["decisive"]] == list(case.decisive_positions)
    for row in told["case"]["decisive"]:
        stronger = sum(value > relevance[row["pos"]] for value in relevance)
        assert row["rank"] == stronger + 1
        assert row["in_top_5"] == (stronger < 5)
        assert f"(rank {row['rank']})" in done.out
    hits = sum(row["in_top_5"] for row in told["case"]["decisive"])
    assert hits, "the default case is meant to show well"
    html = Path("r.html").read_text(encoding="utf-8")
    assert "demo model" in html
    assert "The model wrote" in html


def test_demo_lists_and_chooses(run: Run) -> None:
    failures = load_demo_cases("code")
    done = run("demo", "--list", "--kind", "code")
    assert done.code == 0
    assert re.findall(r"code-\S+", done.out) == [c.id for c in failures]
    rows = run("demo", "--list", "--json").json["cases"]
    assert [row["id"] for row in rows] == [c.id for c in load_demo_cases()]
    told = run("demo", "--kind", "code", "--case", 2, "--rules", "gradient", "--json").json
    assert told["case"]["id"] == failures[1].id
    assert told["rules"] == "gradient"
    solved = load_demo_cases(failed=False)[0]
    assert run("demo", "--case", solved.id, "--json").json["case"]["id"] == solved.id
    for wrong in ("0", "999", "no-such"):
        done = run("demo", "--case", wrong)
        assert done.code == TEXT
        assert "--list" in done.err
    for kind in KINDS:
        assert cli_demo.choose(None, kind).kind == kind


def test_demo_refuses_cases_of_another_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    case = load_demo_cases()[0]
    monkeypatch.setattr(cli_demo, "choose", lambda *_: replace(case, n_tokens=case.n_tokens + 1))
    done = run("demo")
    assert done.code == 1
    assert "do not belong together" in done.err


# ---- help, progress --------------------------------------------------------------------------


def test_help_and_version(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    for code in cli_exit.Code:
        assert re.search(rf"\b{code.value} \w", done.out), code
    text = words(run("explain", "--help").out)
    for key in ("share_to_tokens", "needs_contrast", "minus_top", "is_top", "--strip-newline"):
        assert key in text
    assert run("--version").out == f"{cli_command.PROGRAM} {clrp.__version__}\n"
    assert run("demo", "--help").code == 0
    assert run().out.strip()


def test_help_documents_every_key(run: Run, folder: Path) -> None:
    told = run("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--json").json
    asked = run("explain", "--model", folder, "--prompt", "a", "--json").json
    text = run("explain", "--help").out
    keys = {*told, *asked, *told["target"], *told["tokens"][0], *told["ledger"][0]}
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


def test_choices_are_those_of_the_package() -> None:
    assert [rule.value for rule in cli_options.Rules] == list(clrp.RULE_SETS)
    assert [kind.value for kind in cli_options.Kind] == list(KINDS)


def test_help_imports_nothing_heavy() -> None:
    """The rooms of the command line by themselves, without the package's own imports."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('tl_contrastive_lrp')\n"
        f"package.__path__ = [{str(ROOT / 'tl_contrastive_lrp')!r}]\n"
        "sys.modules['tl_contrastive_lrp'] = package\n"
        "sys.argv = ['x', 'explain', '--help']\n"
        "from tl_contrastive_lrp.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'numpy', 'circuitsvis'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert "--contrast" in done.stdout
    assert done.stderr == "[]\n"


def test_progress_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, wanted, words_there in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli_terminal.progress("Loading [red]", wanted):
            pass
        assert ("Loading [red]" in stream.getvalue()) == words_there


def test_libraries_are_quiet_while_loading_and_heard_afterwards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import logging

    from tl_contrastive_lrp.cli.model import quiet_libraries

    disabled = logging.root.manager.disable
    with quiet_libraries():
        load_demo_model(device="cpu")
        print("chatter")
        print("chatter", file=sys.stderr)
        logging.warning("chatter")
    assert capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == disabled
