"""The study of SmolLM2-135M-Instruct on IFEval, MATH-500, GSM8K and HumanEval, by one command.

    python studies/smollm2/run.py --data FOLDER --out OUT --processes 2

``FOLDER`` holds the benchmarks as published: ifeval.jsonl, math500.jsonl, gsm8k_test.jsonl and
humaneval.jsonl. The model is fetched and converted by ``tools/real_model.py``, unless ``--model``
names a folder that this tool has made. HumanEval's code is run by ``tools/sandbox.py``. What is
studied, and how items are chosen, is in ``study.yaml`` beside this file. The results go into
``OUT/store``; stop the command whenever you like, and the same command continues.

With ``--page`` the report is written (``OUT/report``, without the benchmarks' texts), and from it
the numbers, the figures and the page in ``docs``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

FILES = ("ifeval.jsonl", "math500.jsonl", "gsm8k_test.jsonl", "humaneval.jsonl")


def link(name: Path, to: Path) -> None:
    """Let a name in the work folder stand for a folder elsewhere."""
    if not to.is_dir():
        raise SystemExit(f"There is no folder {to}.")
    if name.is_symlink():
        name.unlink()
    name.symlink_to(to.resolve(), target_is_directory=True)


def prepare(out: Path, data: Path | None, model: Path | None) -> None:
    """Put model and data where ``study.yaml`` looks for them."""
    out.mkdir(parents=True, exist_ok=True)
    if data is not None:
        missing = [name for name in FILES if not (data / name).is_file()]
        if missing:
            raise SystemExit(f"{data} has no {', '.join(missing)}.")
        link(out / "data", data)
    if model is not None:
        link(out / "model", model)
    if not (out / "model" / "config.json").is_file():
        tool = str(ROOT / "tools" / "real_model.py")
        subprocess.run([sys.executable, tool, "--out", str(out / "model")], check=True)


def worker(share: str) -> None:
    """One process's share of the study, in the work folder."""
    from tl_contrastive_lrp.study import Study
    from tl_contrastive_lrp.study.settings import load_settings
    from tools.sandbox import sandbox

    # Relative paths, so that nothing that is stored depends on where the work folder is.
    study = Study(load_settings(HERE / "study.yaml"), Path(), sandbox=sandbox)
    summary = study.run(share)
    print(summary)
    if summary.failed:
        raise SystemExit(1)


def main() -> None:
    """Run the study, or write its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' files")
    parser.add_argument("--out", type=Path, required=True, help="folder for store and report")
    parser.add_argument("--model", type=Path, help="a folder that tools/real_model.py has made")
    parser.add_argument("--processes", type=int, default=2, help="each computes on one thread")
    parser.add_argument("--page", action="store_true", help="write report and page, run nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        os.chdir(args.out)
        worker(args.worker)
        return
    prepare(args.out, args.data, args.model)
    if args.page:
        import page

        page.write(args.out)
        return
    one = [sys.executable, str(HERE / "run.py"), "--out", str(args.out), "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shares = [f"{i}/{args.processes}" for i in range(args.processes)]
    started = [subprocess.Popen([*one, share], env=environment) for share in shares]
    try:
        codes = [process.wait() for process in started]
    except KeyboardInterrupt:
        for process in started:
            process.wait()
        raise SystemExit("Interrupted; the same command continues.") from None
    raise SystemExit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
