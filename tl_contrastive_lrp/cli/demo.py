"""The command ``demo``: a failure of the shipped model explained, and compared with its cause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CliError, Code
from .explain import explain, prepare
from .memory import MemoryOptions
from .model import quiet_libraries
from .output import Output
from .print_attribution import as_json, print_explained, print_json
from .question import question_of
from .terminal import print_err, print_out, progress, shown, table

if TYPE_CHECKING:
    from ..demo import DemoCase

DECISIVE_TOP = 5
_MOST_CHARACTERS = 300  # of a prompt, in the terminal


def _cases(kind: str | None) -> tuple[DemoCase, ...]:
    from ..demo import load_demo_cases

    try:
        return load_demo_cases(kind)
    except FileNotFoundError as error:
        raise CliError(
            Code.FILE, f"The demo cases are missing from this installation: {error}."
        ) from error


def list_failures(kind: str | None, json: bool) -> None:
    """Print the failures, numbered as ``--case`` takes them."""
    cases = _cases(kind)
    if json:
        rows = [
            {
                "number": i,
                "id": c.id,
                "kind": c.kind,
                "tokens": c.n_tokens,
                "target": c.target,
                "contrast": c.contrast,
                "delta": c.delta,
            }
            for i, c in enumerate(cases, 1)
        ]
        print_json({"cases": rows})
        return
    table(
        [
            ("number", True), ("id", False), ("wrote", False), ("right", False),
            ("Δℓ", True), ("tokens", True),
        ],
        [
            (str(i), c.id, shown(c.target), shown(c.contrast), f"{c.delta:+.2f}", str(c.n_tokens))
            for i, c in enumerate(cases, 1)
        ],
    )  # fmt: skip
    number = " --kind " + kind if kind else ""
    print_out(f"Explain one: tl-contrastive-lrp demo{number} --case NUMBER (or ID)")


def choose(case: str | None, kind: str | None) -> DemoCase:
    """Find a case.

    Args:
        case: Its id, or its number in ``--list``; None for a short one with a clear preference.
        kind: Search only cases of this kind.

    Raises:
        CliError: There is no such case.
    """
    cases = _cases(kind)
    if case is None:
        # Few tokens fit a screen, and a clear preference makes a clear picture.
        kinds = [kind] if kind else ["format"]
        short = [c for c in cases if c.kind in kinds and c.n_tokens <= 80] or list(cases)
        if not short:
            raise CliError(Code.FILE, "This installation has no demo cases of that kind.")
        return max(short, key=lambda c: c.delta)
    if case.isdecimal():
        if 1 <= int(case) <= len(cases):
            return cases[int(case) - 1]
    else:
        from ..demo import load_demo_cases

        cases_by_id = {c.id: c for c in load_demo_cases(kind, failed=None)}
        if case in cases_by_id:
            return cases_by_id[case]
    among = f" among the {len(cases)} of kind {kind}" if kind else f" among the {len(cases)}"
    raise CliError(
        Code.PROMPT, f"There is no case {case}{among}. tl-contrastive-lrp demo --list shows them."
    )


def _short(text: str) -> str:
    """A text on one line, without its middle if it is long."""
    words = shown(text).strip()
    if len(words) <= _MOST_CHARACTERS:
        return words
    half = _MOST_CHARACTERS // 2
    return f"{words[:half]} […] {words[-half:]}"


def explain_case(
    name: str | None, kind: str | None, *, rules: str, output: Output, with_graph: bool
) -> None:
    """Explain one case and print it.

    Args:
        name: Id or number of the case; None for a short one with a clear preference.
        kind: Choose among cases of this kind.
        rules: Name of a rule set.
        output: Where results go.
        with_graph: Whether the report, if there is one, shows the attribution graph.

    Raises:
        CliError: There is no such case, or the installation is incomplete.
    """
    case = choose(name, kind)
    import torch

    from ..demo import load_demo_model
    from ..inputs.bos import tokenised
    from ..inputs.tokens import model_device

    with progress("Loading the demo model", output.shows_progress), quiet_libraries():
        try:
            model: Any = load_demo_model(device="cpu")
        except FileNotFoundError as error:
            raise CliError(Code.MODEL, f"{str(error)[:1].upper()}{str(error)[1:]}") from error
    prompt = tokenised(model, case.prompt)
    tokens = torch.tensor([prompt.ids], device=model_device(model))
    if tokens.shape[1] != case.n_tokens:
        raise CliError(
            Code.UNEXPECTED,
            f"Demo case {case.id} is {tokens.shape[1]} tokens, but was recorded with "
            f"{case.n_tokens}: model and cases of this installation do not belong together.",
        )
    prepared = prepare(
        model,
        tokens,
        -1,
        rules=rules,
        output=output,
        memory=MemoryOptions(),
        with_graph=with_graph,
    )
    question = question_of(
        model,
        tokens,
        prepared.prefilled.logits,
        (case.target_id,),
        (case.contrast_id,),
        pos=-1,
        model_name="demo model",
        prepended_bos=prompt.prepended_bos,
    )
    explained = explain(model, question, prepared, rules=rules, output=output)
    ranking = [int(pos) for pos in explained.result.top(case.n_tokens)["pos"]]
    decisive = [
        {
            "pos": pos,
            "token": token,
            "rank": ranking.index(pos) + 1,
            "in_top_5": pos in ranking[:DECISIVE_TOP],
        }
        for pos, token in zip(case.decisive_positions, case.decisive_text, strict=True)
    ]
    if output.as_json:
        names = ("id", "kind", "family", "user", "answer", "model_answer")
        facts = {name: getattr(case, name) for name in names}
        print_json(as_json(explained, output) | {"case": facts | {"decisive": decisive}})
        return
    print_out(f"Case {case.id}")
    print_out(f"Prompt:       {_short(case.user)}")
    print_out(f"Right answer: {_short(case.answer)}")
    print_out(f"Model wrote:  {_short(case.model_answer)}")
    print_out()
    print_explained(explained, output, case.decisive_positions)
    _print_decisive(decisive)
    if not output.quiet:
        print_err("Your own model: tl-contrastive-lrp explain --model NAME_OR_FOLDER --prompt TEXT")


def _print_decisive(decisive: list[dict[str, Any]]) -> None:
    """Print which positions decide the answer, and their ranks by |relevance|."""
    by_rank = sorted(decisive, key=lambda row: int(row["rank"]))
    words = ", ".join(
        f"{row['pos']} «{shown(row['token'])}» (rank {row['rank']})" for row in by_rank[:8]
    )
    more = f" and {len(by_rank) - 8} more" if len(by_rank) > 8 else ""
    hits = sum(bool(row["in_top_5"]) for row in by_rank)
    print_out(f"Decisive in this case, as it was generated: position {words}{more}.")
    if len(by_rank) == 1:
        print_out(f"It is {'' if hits else 'not '}among the {DECISIVE_TOP} strongest tokens.")
    else:
        print_out(f"{hits} of these {len(by_rank)} among the {DECISIVE_TOP} strongest tokens.")
