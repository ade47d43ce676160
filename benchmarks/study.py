"""A study's run beside its bare forwards and backwards, and two processes beside one.

    python benchmarks/study.py
    python benchmarks/study.py --file study.yaml --processes 1 2 4

The study of the file (by default the demo's, with its first items) runs in an empty store.

"bare" is what cannot be saved: while cases are collected, the time inside the model's own forwards,
which write completions and rollouts; while they are analysed, one plain forward and backward of the
bridge for each case, model and rule set, without any rule, and the forwards without tokens that
were run to flip the prediction. Both are processor time of one thread, so that other processes on
the machine do not count. Cases per minute are of the whole run, loading included.

With several processes the time is that of the clock, from an empty store to the last process's end,
so they need as many free cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tl_contrastive_lrp.evaluation.faithfulness.removal import Removal
from tl_contrastive_lrp.study import run as study_run
from tl_contrastive_lrp.study.settings import read_settings, template
from tl_contrastive_lrp.study.study import Study


class Spent:
    """Processor time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Any) -> Any:
        """The function, whose calls are counted; not those inside another call of its own."""
        depth = [0]

        def call(*arguments: Any, **named: Any) -> Any:
            start, depth[0] = time.process_time(), depth[0] + 1
            try:
                return function(*arguments, **named)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent = time.process_time() - start
                    self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return call


@contextmanager
def instrumented(spent: Spent, model_class: type) -> Iterator[list[list[int]]]:
    """Count the time of collecting, of its forwards, and of analysing; and the flips' batches."""
    batches: list[list[int]] = []
    real_logits, real_collect = Removal.logits, study_run.collect

    def logits(self: Removal, removed: torch.Tensor, draws: list[int]) -> torch.Tensor:
        batches.append(list(removed.shape))
        return real_logits(self, removed, draws)

    def collecting(*arguments: Any, **named: Any) -> Any:
        forward = spent.timed("forwards of collecting", model_class.forward)
        with mock.patch.object(model_class, "forward", forward):
            return real_collect(*arguments, **named)

    with (
        mock.patch.object(Removal, "logits", logits),
        mock.patch.object(study_run, "collect", spent.timed("collecting", collecting)),
        mock.patch.object(study_run, "analyse", spent.timed("analysing", study_run.analyse)),
    ):
        yield batches


def bare(study: Study, batches: list[list[int]]) -> float:
    """Processor seconds of a plain forward and backward of each analysis, and of the flips."""
    results, total = study.results(), 0.0
    run = study._run()
    for one in run.settings.models:
        with run.opened(one) as (model, _), study_run.threads(1):
            for case in results.cases:
                ids = torch.tensor(case.ids)[None]
                once(model, ids, case)  # not counted
                for _ in run.rules_of(one):
                    start = time.process_time()
                    once(model, ids, case)
                    total += time.process_time() - start
            if one.name == run.settings.base.name:
                total += sum(rows(model, *batch) for batch in batches)
    return total


def once(model: Any, ids: torch.Tensor, case: Any) -> None:
    """One forward and the backward of Δℓ to the embeddings."""
    embedded = []

    def leaf(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        embedded.append(tensor.detach().requires_grad_())
        return embedded[0]

    with model.hooks(fwd_hooks=[("embed.hook_out", leaf)]):
        logits = model(ids)[0, -1]
    torch.autograd.grad(logits[case.target_id] - logits[case.contrast_id], embedded)


def rows(model: Any, n_rows: int, n: int) -> float:
    """Processor seconds of one forward of so many prompts."""
    start = time.process_time()
    with torch.no_grad():
        model(torch.zeros(n_rows, n, dtype=torch.long))
    return time.process_time() - start


def with_store(study: Study, folder: Path) -> Study:
    settings = dataclasses.replace(study.settings, store=str(folder))
    return Study(settings, study.folder)


def processes(study: Study, n: int, folder: Path) -> float:
    """Seconds by the clock until n processes have run the whole study."""
    import yaml

    data = study.settings.relative_to(study.folder).as_data()
    data["store"] = str(folder / "store")
    plain = yaml.safe_load(yaml.safe_dump(_lists(data)))
    (folder / "study.yaml").write_text(yaml.safe_dump(_given(plain)))
    command = [sys.executable, "-m", "tl_contrastive_lrp", "study", "run", "--quiet"]
    start = time.perf_counter()
    children = [
        subprocess.Popen(
            [*command, str(folder / "study.yaml"), "--shard", f"{i}/{n}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        )
        for i in range(n)
    ]  # fmt: skip
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit("a process failed")
    return time.perf_counter() - start


def _lists(value: Any) -> Any:
    """The same data without tuples, which YAML's safe form does not have."""
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _given(value: Any) -> Any:
    """The same data without keys that are null, for which the file has defaults."""
    if isinstance(value, dict):
        return {n: _given(v) for n, v in value.items() if v is not None or n == "thinking"}
    return [_given(part) for part in value] if isinstance(value, list) else value


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measure, print, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="a study's file; the demo's by default")
    parser.add_argument("--limit", type=int, default=64, help="items of the demo's study")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args(arguments)
    if options.file:
        study = Study.load(options.file)
    else:
        text = template("study.yaml", family=None).replace("limit: 200", f"limit: {options.limit}")
        study = Study(read_settings(text), Path())
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        here, spent = Path(folder), Spent()
        measured = with_store(study, here / "measured")
        with measured._run().opened(measured.settings.base) as (model, _):
            model_class = type(model.original_model)
        wall, start = time.perf_counter(), time.process_time()
        with instrumented(spent, model_class) as batches:
            summary = measured.run(progress=False)
        whole, wall = time.process_time() - start, time.perf_counter() - wall
        least = bare(measured, batches)
        forwards = spent.seconds["forwards of collecting"]
        figures = {
            "cases": summary.cases,
            "cases per minute": 60 * summary.cases / wall,
            "collecting / its forwards": spent.seconds["collecting"] / forwards,
            "analysing / bare": spent.seconds.get("analysing", 0.0) / least,
            "run / bare": whole / (forwards + least),
        }
        print(f"{summary.cases} cases, {summary.dropped} dropped, {summary.computed} units")
        for name, figure in figures.items():
            print(f"{name}: {figure:.2f}")
        times = {}
        for n in options.processes:
            place = here / f"processes{n}"
            place.mkdir()
            times[n] = processes(study, n, place)
            figures[f"{n} processes"] = times[min(times)] / times[n]
            print(f"{n} processes: {times[n]:.1f} s, {figures[f'{n} processes']:.2f} times faster")
    return figures


if __name__ == "__main__":
    main()
