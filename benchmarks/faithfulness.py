"""How faithful is each rule set? Writes docs/faithfulness.md: figures, seeds, intervals.

Measures every rule set and simple baselines on truths that were planted, on two trained models of
two and eight blocks, and on the demo model: AUROC and average precision of what is known, curves of
removed tokens, circuits; and what else a default must do. What was measured on real weights is in
``real_faithfulness.json``, or is measured anew with --real (``real_faithfulness.py``), on failures
that are collected first (``real_failures.py``). Says which rule set the default has to be, by the
rule in ``_faithfulness_rule.py``.

    python benchmarks/faithfulness.py
    python benchmarks/faithfulness.py --real FOLDER --data DATA --out-real OUT
    python benchmarks/faithfulness.py --quick --out /tmp/faithfulness.md

Prints the page, and bars while it measures. Removing tokens and edges dominates: a forward for each
step of each curve; --quick takes two prompts of everything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _faithfulness_messages as messages
import _faithfulness_runs as runs
import pandas as pd
import torch
from _faithfulness_page import Found, written
from _real_page import SECOND, STORED, load
from truth import planted_deep, planted_induction

import tl_contrastive_lrp as clrp

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DOCS = Path(__file__).parent.parent / "docs" / "faithfulness.md"


def of_length(cases: Any, most: int) -> list[clrp.DemoCase]:
    return [case for case in cases if case.n_tokens <= most]


def measure(prompts: int, most: int, demo: int | None, quiet: bool) -> Found:
    """Everything the page shows."""
    model = clrp.load_demo_model()
    failures, solved = clrp.load_demo_cases(), clrp.load_demo_cases(failed=False)
    if demo is not None:
        failures, solved = failures[:: 60 // demo], solved[:: 60 // demo]
    trained = runs.known(planted_induction, range(3 * prompts))
    deep = runs.known(planted_deep, range(3 * prompts))
    shallow_model, deep_model = planted_induction.bridge(), planted_deep.bridge()
    short = of_length(failures, most)
    removal = {
        (what, replace): runs.on_removal(who, cases, replace, quiet)
        for what, who, cases in (
            ("demo", model, short),
            ("trained", shallow_model, trained),
            ("deep", deep_model, deep),
        )
        for replace in ("zero", "random")
    }
    planted = [
        (name, plan, [runs.planted.case(plan, seed) for seed in range(prompts)])
        for name, plan in runs.planted.PLANS.items()
    ]
    circuits = {
        "planted": pd.concat(
            runs.on_circuits(
                runs.planted.bridge(name), [(c, c.tokens, c.corrupted) for c in cases], quiet
            ).assign(prompt=lambda frame, name=name: name + frame["prompt"].astype(str))
            for name, plan, cases in planted
        ),
        "trained": runs.on_circuits(
            shallow_model, [(c, c.tokens, c.corrupted) for c in trained], quiet
        ),
        "deep": runs.on_circuits(deep_model, [(c, c.tokens, c.corrupted) for c in deep], quiet),
        "demo": runs.on_circuits(model, (pairs := runs.corrupted_demo(model, short)), quiet),
    }
    return Found(
        planted=runs.on_planted(range(prompts), quiet),
        trained=runs.on_trained(shallow_model, trained, quiet),
        deep=runs.on_trained(deep_model, deep, quiet),
        failures=runs.on_decisive(model, failures, quiet),
        solved=runs.on_decisive(model, solved, quiet),
        removal={key: frame for key, (frame, _) in removal.items()},
        curves={key: curves for key, (_, curves) in removal.items()},
        circuits=circuits,
        sums={
            "trained": runs.on_sums(shallow_model, trained, quiet),
            "deep": runs.on_sums(deep_model, deep, quiet),
            "demo": runs.on_sums(model, short, quiet),
        },
        low={
            "deep": runs.on_low_precision(
                {said: planted_deep.bridge(dtype) for said, dtype in LOW.items()}, deep, quiet
            ),
            "demo": runs.on_low_precision(
                {said: clrp.load_demo_model(dtype=dtype) for said, dtype in LOW.items()},
                short[::2],
                quiet,
            ),
        },
        messages=messages.measured(model, 60 if demo is None else demo, runs.METHODS),
        counts={"prompts": prompts, "most": most, "short": len(short), "gap": len(pairs)},
    )


def measure_real(model: Path, data: Path | None, cases: Path | None, out: Path, n: int) -> None:
    """Collect failures, unless they are given, measure real weights, and store the summary."""
    here = Path(__file__).parent
    if cases is None:
        cases = out / "cases.jsonl"
        collect = ["--model", model, "--data", data, "--work", out / "collected", "--out", cases]
        ours = [sys.executable, here / "real_failures.py", *collect, "--processes", str(n)]
        out.mkdir(parents=True, exist_ok=True)
        subprocess.run(ours, check=True)
    script = [sys.executable, here / "real_faithfulness.py", "--out", out / "measured"]
    named = ["--model", model, "--name", "SmolLM2-135M-Instruct"]
    asked = [*script, *named, "--cases", cases, "--shard"]
    runs_of = [subprocess.Popen([*asked, f"{number}/{n}"]) for number in range(1, n + 1)]
    codes = [run.wait() for run in runs_of]
    if any(codes):
        raise SystemExit(f"real_faithfulness.py failed with {codes}; what it wrote is in {out}.")
    subprocess.run([*script, "--summary", STORED], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="the page; its figure goes beside")
    parser.add_argument("--prompts", type=int, default=10, help="for each planted model")
    parser.add_argument("--max-tokens", type=int, default=160, help="demo prompts for removal")
    parser.add_argument("--quick", action="store_true", help="two prompts of everything")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--real", type=Path, help="folder with real weights, to measure them anew")
    parser.add_argument("--data", type=Path, help="benchmarks for --real, to collect failures")
    parser.add_argument("--cases", type=Path, help="or failures, as clrp.study saves them")
    parser.add_argument("--out-real", type=Path, help="folder of measurements, to stop and go on")
    parser.add_argument("--processes", type=int, default=2, help="for --real, a thread each")
    options = parser.parse_args()
    given = [one for one in (options.data, options.cases) if one is not None]
    if len(given) != (options.real is not None):
        parser.error("--real needs either --data or --cases, and these need --real")
    torch.set_num_threads(1)
    if options.real is not None:
        with tempfile.TemporaryDirectory() as folder:
            out = options.out_real or Path(folder)
            measure_real(options.real, options.data, options.cases, out, options.processes)
    real, second = load(), load(SECOND)
    prompts, demo = (2, 4) if options.quick else (options.prompts, None)
    found = measure(prompts, options.max_tokens, demo, options.quiet)
    page, picture = written(found, real, second, options.out.stem)
    options.out.write_text(page, encoding="utf-8")
    options.out.with_name(f"{options.out.stem}_curves.svg").write_text(picture, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
