"""Write docs/families.md: which model families are covered, and why the others are refused.

    python tools/families_page.py

Nothing in the page is written by hand: every family TransformerLens boots offline is built tiny and
random (``tests/truth/zoo``), and asked the same questions as a user's own model: ``audit``,
``coverage`` and whether a graph can be had. Booting and auditing every family dominates.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HEAD = """# Model families

Written by `python tools/families_page.py`: every text family that TransformerLens {version} boots
offline, as a tiny random model with biases on, is asked what a model of yours is asked at the first
`lrp()`: does each operation between the logits and the embeddings have its rule? `*` marks a
variant of a family. On every covered family relevance and graph edges agree with an independent
operation-level oracle to 1e-5, the logits are unchanged to the bit
(`pytest tests/house/test_zoo.py`). Coverage is decided by operation, not by name: a family that is
not listed is covered if its operations are, and refused with their names if not. Ask with
`tl-contrastive-lrp check MODEL`.

*By operation* means that no list of hooks can carry the rules (`lrp_hooks` says so); `lrp`,
`run_with_relevance`, `attribute` and `attribution_graph` work.
"""


def main() -> None:
    """Ask every family and write the page."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformer_lens
    import transformers
    from truth import zoo

    transformers.utils.logging.disable_progress_bar()
    covered, refused = [], []
    for row in zoo.ROWS.values():
        if row.unbootable:
            refused.append((row.name, f"TransformerLens does not boot it: {row.unbootable}"))
            continue
        with contextlib.redirect_stderr(io.StringIO()):
            model = zoo.boot(row.name)
        line, why = ask(model)
        note = f"explains the bridge's own logits: {row.differs}" if row.differs else ""
        if why:
            refused.append((row.name, why))
        else:
            covered.append((row.name, *line, note))
    version = getattr(transformer_lens, "__version__", "4.3")
    text = [HEAD.format(version=version), f"## Covered ({len(covered)})\n"]
    text += table(("family", "attention", "MLP", "graph", "rules as hooks", "remark"), covered)
    text += [f"\n## Refused ({len(refused)})\n", *table(("family", "reason"), refused)]
    (ROOT / "docs" / "families.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def ask(model: Any) -> tuple[tuple[str, ...], str]:
    """The columns of a covered family, or why it is refused."""
    from truth import zoo

    import tl_contrastive_lrp as clrp
    from tl_contrastive_lrp.errors import ModelStateError, UncoveredComponentError

    try:
        rows = clrp.coverage(model).rows
    except UncoveredComponentError as error:
        return (), short(str(error))
    operations = {
        part: {row.operation for row in rows if f".{part}" in row.component}
        for part in ("attn", "mlp")
    }
    try:
        clrp.attribution_graph(model, zoo.random_tokens(), target=7, contrast=12, progress=False)
        graph = "yes"
    except UncoveredComponentError as error:
        graph = short(str(error))
    try:
        clrp.lrp_hooks(model)
        hooks = "yes"
    except ModelStateError:
        hooks = "by operation"
    attention = "by operation" if "attention" in operations["attn"] else "HookPoints"
    mlp = "by operation" if "experts" in operations["mlp"] else "HookPoints"
    return (attention, mlp, graph, hooks), ""


def short(message: str) -> str:
    """An error's reason in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    listed = [line for line in lines[1:] if ":" in line and not line.startswith("Use ")]
    reason = (listed[0] if listed else lines[0]).removeprefix("No rule covers ")
    for advice in (" Relevance through it", " Use a", " Use the", " `tl-contrastive-lrp"):
        reason = reason.partition(advice)[0]
    return reason.replace("|", "\\|")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown lines."""
    named = [(f"{row[0]} *" if "-" in row[0] else row[0], *row[1:]) for row in rows]
    lines = [head, tuple("---" for _ in head), *named]
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    main()
