"""Help texts, choices and progress of the command line, and how quiet it is."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from support.cli_runs import ROOT, Run, asked, words
from truth import families

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import errors as cli_errors
from tl_contrastive_lrp.cli import make_graph, retype
from tl_contrastive_lrp.cli import options as cli_options
from tl_contrastive_lrp.cli import terminal as cli_terminal
from tl_contrastive_lrp.demo import KINDS, load_demo_model
from tl_contrastive_lrp.engine.memory import Memory


def test_help_and_version(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    for code in cli_errors.Code:
        assert re.search(rf"\b{code.value} \w", done.out), code
    text = words(run("explain", "--help").out)
    for key in ("share_to_tokens", "needs_contrast", "minus_top", "is_top", "--strip-newline"):
        assert key in text
    assert run("--version").out == f"{retype.PROGRAM} {clrp.__version__}\n"
    assert run("demo", "--help").code == 0
    assert run().out.strip()


def test_help_documents_every_key(run: Run, folder: Path) -> None:
    reply = run("explain", "--model", folder, "--prompt", "a", "--contrast", "z", "--json").json
    asked = run("explain", "--model", folder, "--prompt", "a", "--json").json
    text = run("explain", "--help").out
    keys = {*reply, *asked, *reply["target"], *reply["tokens"][0], *reply["ledger"][0]}
    keys |= {*reply["memory"]}
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


def test_choices_are_those_of_the_package() -> None:
    assert [rule.value for rule in cli_options.Rules] == list(clrp.RULE_SETS)
    assert [memory.value for memory in cli_options.Memory] == list(get_args(Memory))
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

    for stream, expected, words_there in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli_terminal.progress("Loading [red]", expected):
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


def test_help_of_graph_documents_every_key_and_the_limit(run: Run, folder: Path) -> None:
    reply = run(*asked(folder, "--json")).json
    text = words(run("graph", "--help").out)
    shared = set(run("explain", *asked(folder, "--json")[1:]).json)
    inside = {*reply["full"], *reply["kept"], *reply["pruning"][0], *reply["paths"][0]}
    inside |= {*reply["kept"]["strongest_left_out"], *reply["memory"]}
    expected = {*reply, *inside, *reply["node_threshold"]}
    assert shared & set(reply) >= {"delta", "candidates", "notes"}
    assert [key for key in expected if not re.search(rf"\b{key}\b", text)] == []
    limit = f"{make_graph.LONG:,} tokens"
    assert f"above {limit} what pruning left" in words(text.replace("│", " "))
    page = words(run("explain", "--help").out.replace("│", " "))
    assert f"Above {limit} it has at most {make_graph.REPORT_EDGES:,} edges" in page


def test_graph_takes_all_that_explain_takes() -> None:
    from tl_contrastive_lrp.cli.graph import graph_command
    from tl_contrastive_lrp.cli.main import explain_command

    graph, explain = (
        get_type_hints(command, include_extras=True) for command in (graph_command, explain_command)
    )
    assert set(explain) - set(graph) == {"check", "no_graph"}
    own_words = {"top", "save"}  # paths, not tokens; a graph, not a result
    for name in set(explain) - {"check", "no_graph"} - own_words:
        assert graph[name] is explain[name] or graph[name] == explain[name], name


def test_granularities_are_those_of_the_package() -> None:
    for choice in cli_options.Granularity:
        model = families.boot("llama", torch.float32)
        tokens = torch.tensor([[1, 5, 6]])
        graph = clrp.attribution_graph(
            model, tokens, target=5, contrast=6, granularity=choice.value
        )
        assert graph.granularity == choice.value
