"""The commands ``study init``, ``plan``, ``run``, ``label`` and ``report``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .errors import Code, exit_codes
from .print_attribution import print_json
from .retype import PROGRAM
from .terminal import print_err, print_out, shell_word, table

if TYPE_CHECKING:
    from ..study.run import RunSummary
    from ..study.study import Study

study_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Many failures: collect them, explain them, label them, and report.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="The study's file, such as study.yaml.")
]


def _loaded(file: Path) -> Study:
    from ..study.study import Study

    return Study.load(file)


@dataclass(frozen=True, eq=False, repr=False)
class InitOptions:
    """The options of ``study init``."""

    file: FileArgument
    debug: o.DebugOption = False


@study_app.command("init", epilog=o.EXIT_CODES)
@o.takes_options
def init_command(options: InitOptions) -> None:
    """Write a commented study file that runs the demo as it stands, offline.

    With the demo family at hand (a checkout of the repository), it has other sizes and checkpoints.
    """
    with exit_codes(options.debug):
        from ..study.models import family_steps
        from ..study.settings import write_template

        write_template(options.file, family=family_steps())
        file = shell_word(str(options.file))
        print_out(f"Wrote {options.file}. Next: {PROGRAM} study plan {file}")


@dataclass(frozen=True, eq=False, repr=False)
class PlanOptions:
    """The options of ``study plan``."""

    file: FileArgument
    items: Annotated[
        int, typer.Option(min=1, help="Items that are completed for the timed sample.")
    ] = 8
    json: o.JsonOption = False
    quiet: o.QuietOption = False
    debug: o.DebugOption = False


@study_app.command("plan", epilog=o.EXIT_CODES)
@o.takes_options
def plan_command(options: PlanOptions) -> None:
    """Cases, tokens, memory and hours, from a timed sample, before anything is run.

    **--json** prints one object: *items, collected, cases* (expected), *most_cases, rate_from*
    (the store or the sample), *tokens* (median, largest), *seconds_per_item, hours* (of one
    worker) and *models* (*name, n_parameters, weight_bytes, plain_bytes, free_bytes, seconds* of
    one case by rule set, *analyses* still to be made, *check_seconds* of one map's check by rule
    set, *checks* still to be made).
    """
    with exit_codes(options.debug):
        study = _loaded(options.file)
        with _quiet():
            plan = study.plan(items=options.items, progress=not (options.quiet or options.json))
        if options.json:
            data = {**vars(plan), "hours": plan.hours, "models": [vars(m) for m in plan.models]}
            print_json(data)
        else:
            print_out(str(plan))


@dataclass(frozen=True, eq=False, repr=False)
class RunOptions:
    """The options of ``study run``."""

    file: FileArgument
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do the I-th of N parts first, I from 0, for job arrays. What other parts leave "
            "undone is done after that. Default: as accelerate launch or torchrun say, else all.",
        ),
    ] = None
    collect_only: Annotated[
        bool,
        typer.Option("--collect-only", help="Collect the cases, and explain none."),
    ] = False
    json: o.JsonOption = False
    quiet: o.QuietOption = False
    debug: o.DebugOption = False


@study_app.command("run", epilog=o.EXIT_CODES)
@o.takes_options
def run_command(options: RunOptions) -> None:
    """Collect and explain what is not in the store yet.

    Interrupted, killed or run again, it continues. Several processes with one store share the
    work: **accelerate launch -m tl_contrastive_lrp study run FILE** on GPUs, **torchrun** on CPUs,
    or **--shard** in each job of an array. Results do not depend on how many there are.

    **--json** prints one object: *cases, dropped, computed* (units of this process), *found* (in
    the store, or by other processes), *failed* (*case_id, model, rules, why* and *kind*, analysis
    or check), *damaged* (files that were computed again), *seconds*.
    """
    with exit_codes(options.debug):
        study = _loaded(options.file)
        with _continuable(options), _quiet():
            summary = study.run(
                _checked_shard(options.shard),
                analyse=not options.collect_only,
                progress=not (options.quiet or options.json),
            )
        if options.json:
            print_json({**vars(summary), "failed": [vars(one) for one in summary.failed]})
        else:
            _print_summary(options, summary)
        if summary.failed:
            raise typer.Exit(Code.UNEXPECTED)


def _checked_shard(shard: str | None) -> str | None:
    """A shard that exists.

    Raises:
        typer.BadParameter: It does not.
    """
    from ..study.workers import Share

    if shard is not None:
        try:
            Share.of_text(shard)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return shard


@contextmanager
def _continuable(options: RunOptions) -> Iterator[None]:
    """Say after Ctrl-C, or when a job's time is over (SIGTERM), how to continue."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        given = f" --shard {options.shard}" if options.shard else ""
        given += " --collect-only" if options.collect_only else ""
        print_err(
            "What is finished is in the store. To continue: "
            f"{PROGRAM} study run {shell_word(str(options.file))}{given}"
        )
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of libraries that load models."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _print_summary(options: RunOptions, summary: RunSummary) -> None:
    print_out(
        f"{_counted(summary.cases, 'case')}, {_counted(summary.dropped, 'completion')} dropped; "
        f"{_counted(summary.computed, 'unit')} computed, {summary.found:,} found, in "
        f"{summary.seconds:,.0f} s."
    )
    for message in () if options.quiet else summary.damaged:
        print_err(f"Note: {message} It was computed again.")
    if summary.failed:
        print_out(f"{len(summary.failed):,} could not be explained or checked:")
        headings = ("case_id", "model", "rules", "kind", "why")
        rows = [[getattr(one, name) for name in headings] for one in summary.failed]
        table([("case", False), *((name, False) for name in headings[1:])], rows)
    file = shell_word(str(options.file))
    if options.collect_only:
        print_out(f"Next: {PROGRAM} study run {file}")
    else:
        print_out(f"Next: {PROGRAM} study report {file}, or {PROGRAM} study label {file}")


@dataclass(frozen=True, eq=False, repr=False)
class LabelOptions:
    """The options of ``study label``."""

    file: FileArgument
    out: Annotated[Path, typer.Option(help="Where to write the labelling page (HTML).")] = Path(
        "labels.html"
    )
    add: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="LABELS.JSONL",
            help="Add labels that the page gave to the study, in place of writing a page. Repeat "
            "for several labellers.",
        ),
    ] = None
    show_automatic: Annotated[
        bool, typer.Option("--show-automatic", help="Show the automatic label from the start.")
    ] = False
    debug: o.DebugOption = False


@study_app.command("label", epilog=o.EXIT_CODES)
@o.takes_options
def label_command(options: LabelOptions) -> None:
    """Write the page on which a person labels the cases, offline; or add such labels.

    The page gives a file of labels, which **--add** checks and adds; the report then shows them
    beside the automatic ones, and how far labellers agree.
    """
    with exit_codes(options.debug):
        study = _loaded(options.file)
        for path in options.add or ():
            labels = study.add_labels(path)
            print_out(f"Added {len(labels):,} labels of {path}.")
        if not options.add:
            path = study.label(options.out, blind=not options.show_automatic)
            print_out(f"Wrote {path}.")


@dataclass(frozen=True, eq=False, repr=False)
class ReportOptions:
    """The options of ``study report``."""

    file: FileArgument
    out: Annotated[Path, typer.Option(help="Where to write the page (HTML).")] = Path("study.html")
    json: o.JsonOption = False
    debug: o.DebugOption = False


@study_app.command("report", epilog=o.EXIT_CODES)
@o.takes_options
def report_command(options: ReportOptions) -> None:
    """Write one page with the study's tables, figures and cases, and its data beside it.

    Beside STUDY.html lie STUDY.json, with every number of the page, and the folder STUDY_files.
    **--json** also prints those numbers.
    """
    with exit_codes(options.debug):
        from ..study.report import data_path

        study = _loaded(options.file)
        numbers = study.report(options.out)
        if options.json:
            print_json(numbers)
        else:
            print_out(f"Wrote {options.out}, and {data_path(options.out).name} beside it.")
