"""The published study of the demo family: run it, and write its page from its numbers.

    python studies/demo_family/run.py

Runs ``study.yaml`` beside this file into ``OUT`` (a temporary folder by default; with ``--out`` an
interrupted run goes on), in two processes by default, and writes ``docs/study_demo.md``,
``docs/study_demo.json`` (every number of the report) and the figures. ``--page`` only makes the
page anew from that file. Collecting and analysing dominate: a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS = ROOT / "docs"
FIGURES = ("scatter-1", "scatter-2", "trajectories", "flips")
sys.path.insert(0, str(ROOT))


def run(out: Path, processes: int) -> float:
    """Run the study, or what is left of it; returns the seconds of all its runs."""
    file = out / "study.yaml"
    file.write_text(HERE.joinpath("study.yaml").read_text("utf-8"), "utf-8")
    start = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tl_contrastive_lrp", "study", "run", str(file),
             "--shard", f"{i}/{processes}"],
            cwd=out, env=environment,
        )
        for i in range(processes)
    ]  # fmt: skip
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("A process of the study failed; see above.")
    spent = out / "seconds.txt"
    before = float(spent.read_text("utf-8")) if spent.exists() else 0.0
    spent.write_text(str(before + time.monotonic() - start), "utf-8")
    return float(spent.read_text("utf-8"))


def report(out: Path, seconds: float, processes: int) -> None:
    """Write the numbers and figures into docs."""
    import tl_contrastive_lrp as clrp

    study = clrp.study.Study.load(out / "study.yaml")
    numbers = study.report(out / "report.html")
    numbers = {name: part for name, part in numbers.items() if name not in ("cases", "figures")}
    numbers["facts"] = {**numbers["facts"], "command": "python studies/demo_family/run.py"}
    numbers["run"] = {"seconds": round(seconds), "processes": processes}
    DOCS.joinpath("study_demo.json").write_text(
        json.dumps(numbers, indent=1, allow_nan=False) + "\n", "utf-8"
    )
    for name in FIGURES:
        svg = out / "report_files" / f"{name}.svg"
        target = DOCS / f"study_demo_{name}.svg"
        target.write_text(svg.read_text("utf-8"), "utf-8")


def page() -> str:
    """The text of the page, from the numbers."""
    from studies.markdown import filled

    numbers = json.loads(DOCS.joinpath("study_demo.json").read_text("utf-8"))
    facts, took = numbers["facts"], numbers["run"]
    own = {
        "date": facts["date"],
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "command": facts["command"],
        "minutes": f"{took['seconds'] / 60:.1f}",
        "processes": str(took["processes"]),
    }
    return filled(HERE.joinpath("page.md").read_text("utf-8"), numbers, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="work folder, to go on with an interrupted run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="only write the page from the numbers")
    args = parser.parse_args()
    if not args.page:
        with tempfile.TemporaryDirectory() as folder:
            out = args.out or Path(folder)
            out.mkdir(parents=True, exist_ok=True)
            report(out, run(out, args.processes), args.processes)
    DOCS.joinpath("study_demo.md").write_text(page(), "utf-8")
    print(f"Wrote {DOCS / 'study_demo.md'}")


if __name__ == "__main__":
    main()
