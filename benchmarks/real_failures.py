"""Collect the failures that ``real_faithfulness.py`` measures, on benchmarks as published.

    python tools/real_model.py --out FOLDER
    python benchmarks/real_failures.py --model FOLDER --data DATA --work WORK --out CASES.jsonl

Two studies collect and explain nothing: that of ``studies/smollm2`` on GSM8K and the first items
of MATH-500, whose prompts have some 50 to 150 tokens; and ``real_failures.yaml`` beside this file,
on the same benchmarks after answered questions, with 300 to 1,000. DATA holds gsm8k_test.jsonl and
math500.jsonl. WORK keeps what is collected, so a stopped run continues. IFEval and HumanEval are
left out: of 240 and 40 items they gave 14 cases and none (``docs/study_smollm2.md``).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from tl_contrastive_lrp.study import Study, save_cases
from tl_contrastive_lrp.study.settings import load_settings

HERE = Path(__file__).resolve().parent
STUDIES = {
    "short": HERE.parent / "studies" / "smollm2" / "study.yaml",
    "long": HERE / "real_failures.yaml",
}
BENCHMARKS = ("gsm8k", "math")
FEWER = {"math": 288}  # items with short prompts


def study_of(which: str) -> Study:
    """The study, in the working folder."""
    settings = load_settings(STUDIES[which])
    limits = FEWER if which == "short" else {}
    kept = tuple(
        dataclasses.replace(one, limit=limits.get(one.name, one.limit))
        for one in settings.benchmarks
        if one.name in BENCHMARKS
    )
    return Study(dataclasses.replace(settings, benchmarks=kept, store=which), Path())


def prepare(work: Path, data: Path, model: Path) -> None:
    """Data and model under the names by which the settings call them."""
    work.mkdir(parents=True, exist_ok=True)
    for name, folder in (("data", data), ("model", model)):
        if not folder.is_dir():
            raise SystemExit(f"There is no folder {folder}.")
        link = work / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(folder.resolve(), target_is_directory=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder with real weights")
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is collected")
    parser.add_argument("--out", type=Path, help="write the cases into this file")
    parser.add_argument("--processes", type=int, default=2, help="each computes on one thread")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shard is not None:
        os.chdir(options.work)
        for which in STUDIES:
            study_of(which).run(options.shard, analyse=False)
        return
    if None in (options.model, options.data, options.out):
        parser.error("give --model, --data and --out")
    prepare(options.work, options.data, options.model)
    out = options.out.resolve()
    own = [sys.executable, __file__, "--work", str(options.work), "--shard"]
    shards = [f"{number}/{options.processes}" for number in range(options.processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*own, shard], env=environment) for shard in shards]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"Collecting failed with {codes}; what it wrote is in {options.work}.")
    os.chdir(options.work)
    # The same question may fail with and without answered ones before it.
    cases = [
        dataclasses.replace(case, id=f"{which}/{case.id}")
        for which in STUDIES
        for case in study_of(which).results().cases
    ]
    save_cases(cases, out)
    print(f"{out}: {len(cases)} cases")


if __name__ == "__main__":
    main()
