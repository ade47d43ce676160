"""Is one commit slower than another? Time of the main calls of two checkouts, new over old.

    python benchmarks/compare_commits.py main HEAD
    python benchmarks/compare_commits.py ../old-checkout . --repeats 30 --only graph

OLD and NEW are commits of this repository or folders with a checkout. Each runs in a process of its
own on the same random model; the calls alternate between the two, so that a busy machine slows both
alike. Prints a line for each call: the best time and the median of OLD in seconds, the ratios
NEW / OLD of both, and how many Python functions each calls (which no other process can disturb),
with the ratio of instructions where ``perf`` is installed. About two minutes by default; loading
torch twice and the longer prompt dominate. For prompts of thousands of tokens, and their peak
memory, take ``long_context.py --against OLD``.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TILED = {"memory": "tiled", "tile": 32, "progress": False}


# ---- in the process of one checkout


def calls(short: int, long: int) -> dict[str, Callable[[], object]]:
    """The calls by name, as version 0.1 spells them (``objectives=``) and as later ones do."""
    import torch
    from _models import random_bridge

    import tl_contrastive_lrp as clrp

    torch.set_num_threads(1)
    model = random_bridge(layers=4, d_model=64, heads=4, positions=long)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.cfg.d_vocab, (1, long), generator=generator)
    few = ids[:, :short]
    one, other = clrp.logit_diff(model, 7, 12), clrp.logit_diff(model, 9, 15)

    def attribute_two() -> object:
        if hasattr(clrp, "attribute_each"):
            return clrp.attribute_each(model, ids, [one, other])
        return clrp.attribute(model, ids, objectives=[one, other])

    def graph_two() -> object:
        if hasattr(clrp, "attribution_graphs"):
            return clrp.attribution_graphs(model, ids, [one, other])
        return clrp.attribution_graph(model, ids, objectives=[one, other])

    return {
        f"attribute {short}": lambda: clrp.attribute(model, few, one),
        f"attribute {long}": lambda: clrp.attribute(model, ids, one),
        "attribute two objectives": attribute_two,
        "attribute tiled": lambda: clrp.attribute(model, ids, one, **TILED),
        "run_with_relevance": lambda: clrp.run_with_relevance(model, ids, one),
        f"graph {short}": lambda: clrp.attribution_graph(model, few, one),
        f"graph {long}": lambda: clrp.attribution_graph(model, ids, one),
        "graph two objectives": graph_two,
        "graph by head, pruned": lambda: clrp.attribution_graph(
            model, ids, one, heads=True, mass=0.9
        ),
        "graph tiled": lambda: clrp.attribution_graph(model, ids, one, mass=0.9, **TILED),
    }


def function_calls(run: Callable[[], object]) -> int:
    """How many calls of functions, Python's and built-in ones, one run makes."""
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


def instructions(run: Callable[[], object]) -> int | None:
    """The processor's instructions in one run; None without ``perf``, or if it may not count."""
    if shutil.which("perf") is None:
        return None
    command = ["perf", "stat", "-x,", "-e", "instructions:u", "-p", str(os.getpid())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as perf:
        time.sleep(0.3)
        run()
        perf.send_signal(signal.SIGINT)
        report = perf.communicate()[1]
    count = report.partition(",")[0].strip()
    return int(count) if count.isdigit() else None


def require_from(checkout: str | Path) -> None:
    """Exit unless the package is the one of this checkout: no other is measured by mistake."""
    import tl_contrastive_lrp

    where = Path(tl_contrastive_lrp.__file__).resolve()
    if not where.is_relative_to(Path(checkout).resolve()):
        sys.exit(f"{where} was imported, not the package in {checkout}.")


def serve(checkout: str, short: int, long: int) -> None:
    """Answers each line of standard input, a question and a call, with a line of JSON."""
    require_from(checkout)
    runs = calls(short, long)
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        question, name = json.loads(line)
        if question == "seconds":
            start = time.perf_counter()
            runs[name]()
            answer: Any = time.perf_counter() - start
        else:
            answer = {"calls": function_calls, "instructions": instructions}[question](runs[name])
        print(json.dumps(answer), flush=True)


# ---- in the process that compares


class Side:
    """One checkout, at work in its own process."""

    def __init__(self, checkout: Path, short: int, long: int) -> None:
        command = [sys.executable, __file__, str(checkout), "", "--serve"]
        command += ["--short", str(short), "--long", str(long)]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def names(self) -> list[str]:
        return self._answer()

    def ask(self, question: str, name: str) -> Any:
        assert self._process.stdin is not None
        print(json.dumps([question, name]), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("A checkout's process ended early; its error stands above.")
        return json.loads(line)


@contextlib.contextmanager
def checkout_of(commit: str) -> Iterator[Path]:
    """A folder with this commit: the folder itself if it is one, else a worktree for a while."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def compare(old: Side, new: Side, name: str, repeats: int) -> str:
    """A line of the table."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        order = ((0, old), (1, new)) if turn % 2 else ((1, new), (0, old))
        for i, side in order:
            taken = side.ask("seconds", name)
            if turn:  # the first one warms up
                seconds[i].append(taken)
    best, median = [min(s) for s in seconds], [statistics.median(s) for s in seconds]
    made = [side.ask("calls", name) for side in (old, new)]
    counted = [side.ask("instructions", name) for side in (old, new)]
    line = (
        f"{name:<26} {best[0]:>8.4f} {best[1] / best[0]:>6.3f} "
        f"{median[0]:>8.4f} {median[1] / median[0]:>6.3f} {made[0]:>9} {made[1]:>9}"
    )
    return f"{line} {counted[1] / counted[0]:>8.3f}" if all(counted) else line


def main() -> None:
    """Compares, or with ``--serve`` runs the calls of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a commit, or the folder of a checkout")
    parser.add_argument("new")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--short", type=int, default=24, help="tokens of the short prompt")
    parser.add_argument("--long", type=int, default=192, help="tokens of the other prompt")
    parser.add_argument("--only", default="", help="a part of the names of the calls to run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.old, options.short, options.long)
        return
    with checkout_of(options.old) as old_path, checkout_of(options.new) as new_path:
        old, new = (Side(path, options.short, options.long) for path in (old_path, new_path))
        try:
            names = [name for name in old.names() if options.only in name]
            new.names()
            print(f"{'':<26} {'best':>8} {'ratio':>6} {'median':>8} {'ratio':>6} "
                  f"{'calls old':>9} {'new':>9} {'(instructions)'}")  # fmt: skip
            for name in names:
                print(compare(old, new, name, options.repeats), flush=True)
        finally:
            old.close()
            new.close()


if __name__ == "__main__":
    main()
