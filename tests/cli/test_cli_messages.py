"""``--messages`` and ``--tools``: a chat from a file, and its relevance by message."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import FILE, TEXT, USAGE, Run, ids_of, typed_next, words
from truth import chat_tokenizers as forms
from truth.chat_templates import TEMPLATES

import tl_contrastive_lrp as clrp

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "The capital of Italy?"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
SIDES = ("--target", "id:200", "--contrast", "id:210")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("chat") / "qwen3"
    shutil.copytree(forms.folder("qwen"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen3"][0], encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat.json").write_text(json.dumps(CHAT), encoding="utf-8")
    Path("tools.json").write_text(json.dumps(TOOLS), encoding="utf-8")


def bridge_of(folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def test_a_chat_from_a_file(run: Run, model_folder: Path) -> None:
    common = ("explain", "--model", model_folder, "--messages", "chat.json", *SIDES)
    model = bridge_of(model_folder)
    for options, given in [
        ((), {}),
        (("--answer", "It is"), {"answer": "It is"}),
        (("--tools", "tools.json"), {"tools": TOOLS}),
    ]:
        done = run(*common, *options, "--json")
        prompt = clrp.chat(model, CHAT, **given)
        assert ids_of(done) == prompt.tokens.tolist()
        rows = done.json["messages"]
        named = [(row["segment"], row["start"], row["stop"]) for row in rows]
        assert named == [(s.name, s.start, s.stop) for s in prompt.segments]
        total = sum(row["relevance"] for row in done.json["tokens"])
        assert sum(row["relevance"] for row in rows) == pytest.approx(total, abs=1e-9)
    done = run(*common, "--save", "result", "--out", "report.html")
    assert done.code == 0
    assert "system 1" in done.out
    assert "user 1" in done.out
    assert clrp.Attribution.load("result").segments == clrp.chat(model, CHAT).segments


def test_the_graph_knows_the_messages(run: Run, model_folder: Path) -> None:
    done = run("graph", "--model", model_folder, "--messages", "chat.json", *SIDES, "--save", "g")
    assert done.code == 0
    graph = clrp.AttributionGraph.load("g")
    names = [s.name for s in clrp.chat(bridge_of(model_folder), CHAT).segments]
    assert list(graph.by("message").str_tokens) == names


def test_a_message_of_chat_is_known_too(run: Run, model_folder: Path) -> None:
    text, system = CHAT[1]["content"], CHAT[0]["content"]
    common = ("explain", "--model", model_folder, *SIDES, "--json")
    done = run(*common, "--prompt", text, "--chat", "--system", system)
    of_file = run(*common, "--messages", "chat.json")
    assert done.json["messages"] == of_file.json["messages"]
    assert run(*common, "--prompt", text).json["messages"] == []


def test_the_command_to_type_next(run: Run, model_folder: Path) -> None:
    done = run("explain", "--model", model_folder, "--messages", "chat.json", "--answer", "It")
    line = shlex.split(typed_next(done))
    assert line[line.index("--messages") + 1] == "chat.json"
    assert run(*line[1:], "--json").json["status"] == "explained"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompt", "x"), USAGE, "--prompt or --prompt-file"),
        (("--chat",), USAGE, "leave out --chat"),
        (("--system", "x"), USAGE, "go with --chat"),
        (("--no-bos",), USAGE, "the chat template decides"),
        (("--messages", "none.json"), FILE, "There is no file none.json"),
        (("--messages", "broken.json"), TEXT, "broken.json is not JSON"),
        (("--messages", "object.json"), TEXT, "must hold a list of messages"),
        (("--messages", "strings.json"), TEXT, "Message 1 is 'x'"),
        (("--tools", "object.json"), TEXT, "must hold a list of tools"),
        (("--messages", "continued.json", "--answer", "x"), TEXT, "--answer"),
    ],
)
def test_wrong_files_and_options_are_named(
    run: Run, model_folder: Path, arguments: Any, code: int, message: str
) -> None:
    Path("broken.json").write_text("[", encoding="utf-8")
    Path("object.json").write_text('{"messages": []}', encoding="utf-8")
    Path("strings.json").write_text('["x"]', encoding="utf-8")
    continued = [*CHAT, {"role": "assistant", "content": "Rome"}]
    Path("continued.json").write_text(json.dumps(continued), encoding="utf-8")
    given = () if "--messages" in arguments else ("--messages", "chat.json")
    done = run("explain", "--model", model_folder, *given, *arguments)
    assert done.code == code, done.err
    assert message in words(done.err.replace("│", " "))


def test_tools_need_messages(run: Run, model_folder: Path) -> None:
    done = run("explain", "--model", model_folder, "--prompt", "x", "--tools", "tools.json")
    assert done.code == USAGE
    assert "--tools goes with --messages" in words(done.err.replace("│", " "))


def test_the_report_has_the_messages(run: Run, model_folder: Path) -> None:
    common = ("explain", "--model", model_folder, *SIDES, "--no-graph", "--out", "r.html")
    assert run(*common, "--messages", "chat.json").code == 0
    html = Path("r.html").read_text(encoding="utf-8")
    assert "Message by message" in html
    assert html.count("<td>user 1</td>") == 1
    assert "<td>The capital of Italy?</td>" in html
    assert run(*common, "--prompt", "The capital").code == 0
    assert "Message by message" not in Path("r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("tools", [False, True])
def test_the_tokens_of_an_answer(run: Run, model_folder: Path, tools: bool, tmp_path: Path) -> None:
    """``tokens`` reads the chat as ``explain`` does, and its command explains the same ids."""
    model, path = bridge_of(model_folder), tmp_path / "page.html"
    more = ("--tools", "tools.json") if tools else ()
    done = run(
        "tokens", "--model", model_folder, "--messages", "chat.json", *more, "--answer", "It is",
        "--out", path, "--explain", 1, "--json",
    )  # fmt: skip
    prompt = clrp.chat(model, CHAT, tools=TOOLS if tools else None, answer="It is")
    reply = done.json
    n = len(reply["answer"])
    assert [row["id"] for row in reply["answer"]] == prompt.tokens.tolist()[-n:]
    assert reply["answer"][-1]["pos"] == len(prompt.tokens) - 1
    typed = shlex.split(reply["command"])
    assert "--messages" in typed
    explained = run(*typed[1:], "--json")
    assert ids_of(explained) == prompt.tokens.tolist()
    assert "user 1" in path.read_text(encoding="utf-8")
    assert len(reply["explained"]) == 1
    done = run("tokens", "--model", model_folder, "--tools", "tools.json", "--prompt", "a",
               "--answer", "b")  # fmt: skip
    assert done.code == USAGE
