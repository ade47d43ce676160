"""The frozen result of ``trace_back``: relevance handed back hop by hop, and its account.

The file is safetensors, and holds the file of each hop's ``Attribution`` as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..files import FileKind, read_result, rebuilding_from, write_result
from .result import Attribution

if TYPE_CHECKING:
    import pandas as pd
    from circuitsvis.utils.render import RenderedHTML

    from ..inputs.segments import How

_FILE = FileKind("tl_contrastive_lrp.trace", 1, "the trace")
_GREW = 1.5  # a factor a hop that ``repr`` mentions


@dataclass(frozen=True, eq=False)
class Trace:
    """Relevance of every token for an answer, after it was handed back through the reasoning.

    All relevance is in logits, with the sign of the objective. ``trace_back`` says how it is
    defined.

    Attributes:
        hops: What each hop distributed, and where it landed: the first is ``attribute``'s own
            answer, each further one explains the reasoning tokens, weighted by what the hop before
            left on them.
        through: The reasoning, as positions (start, stop).
        handing: Which tokens hand on their relevance: those of the reasoning that the model
            predicted.
        span: The tokens explained, as positions (start, stop); None for any other objective.
        least: By how many standard deviations of the logits a token had to lie above their mean to
            hand on its relevance.

    Raises:
        ValueError: no hops, or ``handing`` of another length or outside of ``through``.

    Example:
        >>> n = len(result.str_tokens)
        >>> trace = clrp.trace_back(model, case.prompt, objective, through=(n - 20, n))
        >>> trace.tokens.shape == result.tokens.shape
        True
    """

    hops: tuple[Attribution, ...]
    through: tuple[int, int]
    handing: Bool[Tensor, " pos"]
    span: tuple[int, int] | None
    least: float

    def __post_init__(self) -> None:
        if not self.hops:
            raise ValueError("A Trace needs at least one hop.")
        inside = torch.zeros(len(self.str_tokens), dtype=torch.bool)
        inside[slice(*self.through)] = True
        if self.handing.shape != inside.shape or bool((self.handing & ~inside).any()):
            raise ValueError(f"Trace.handing is no mask of tokens inside through={self.through}.")

    @property
    def delta(self) -> float:
        """Δℓ, the objective's value in logits.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=0)
            >>> round(trace.delta, 4) == round(result.delta, 4)
            True
        """
        return self.hops[0].delta

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """What each token contributes to the text.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=0)
            >>> trace.str_tokens == result.str_tokens
            True
        """
        return self.hops[0].str_tokens

    @cached_property
    def by_hop(self) -> Float[Tensor, "hop pos"]:
        """Where each hop's relevance landed, before the next one handed it on.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> len(trace.by_hop)
            2
        """
        return torch.stack([hop.tokens for hop in self.hops])

    @cached_property
    def tokens(self) -> Float[Tensor, " pos"]:
        """Relevance of each token after all hops.

        On tokens that hand relevance on, it is what the last hop left there; elsewhere, what all
        hops brought.

        Example:
            >>> how = {"hops": 0, "rules": result.rules}
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), **how)
            >>> bool(torch.allclose(trace.tokens, result.tokens, atol=1e-4))
            True
        """
        return torch.where(self.handing, self.by_hop[-1], self.by_hop.sum(0))

    @property
    def left(self) -> float:
        """Relevance that another hop would hand on, in logits.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=None)
            >>> abs(trace.left) <= 0.01 * float(trace.hops[0].tokens.abs().sum())
            True
        """
        return float(self.by_hop[-1][self.handing].double().sum())

    @cached_property
    def account(self) -> pd.DataFrame:
        """What each hop received, where it went, and what was lost, in logits.

        received = prompt + through + held + rest + lost in each row, and the next row receives what
        this one has in ``through``. A hop that loses much, or multiplies absolute relevance
        (``growth``), says little about the tokens before it.

        Returns:
            Columns hop; received; prompt (tokens before the reasoning); through (on reasoning
            tokens that hand it on: received by the next hop, or left by the last); held (on other
            reasoning tokens); rest (behind the reasoning); lost (biases + positions + other, as in
            the ledger); the absolute relevance abs_prompt, abs_through and abs_total; and growth
            (abs_total over what was handed on, in absolute relevance; for hop 0 over |Δℓ|).

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> row = trace.account.iloc[0]
            >>> landed = row["prompt"] + row["through"] + row["held"] + row["rest"]
            >>> bool(abs(row["received"] - landed - row["lost"]) < 1e-6)
            True
        """
        import pandas as pd

        at = torch.arange(len(self.str_tokens))
        before, behind = at < self.through[0], at >= self.through[1]
        held = ~(before | behind | self.handing)
        rows: list[dict[str, float]] = []
        given = abs(self.delta)
        for number, hop in enumerate(self.hops):
            values, ledger = hop.tokens.double(), hop.ledger.rows
            landed = {
                name: float(values[mask].sum())
                for name, mask in [
                    ("prompt", before), ("through", self.handing), ("held", held), ("rest", behind)
                ]
            }  # fmt: skip
            lost = {
                name: sum(getattr(row, name) for row in ledger) for name in ("biases", "positions")
            }
            total = hop.delta - sum(landed.values())
            absolute = {
                "abs_prompt": float(values[before].abs().sum()),
                "abs_through": float(values[self.handing].abs().sum()),
                "abs_total": float(values.abs().sum()),
            }
            rows.append(
                {"hop": number, "received": hop.delta, **landed, "lost": total, **lost}
                | {"other": total - sum(lost.values())}
                | absolute
                | {"growth": absolute["abs_total"] / (given or float("nan"))}
            )
            given = absolute["abs_through"]
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """The tokens as a table, in the order of the text.

        Returns:
            Columns pos, token, id, relevance (after all hops), share (of Δℓ), handing, special, and
            hop_0, hop_1, ... (where each hop landed).

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> trace.to_frame().columns.tolist()[-2:]
            ['hop_0', 'hop_1']
        """
        frame = self.hops[0].to_frame()
        frame["relevance"] = self.tokens.numpy()
        frame["share"] = frame["relevance"] / (self.delta or float("nan"))
        frame.insert(5, "handing", self.handing.numpy())
        for number, landed in enumerate(self.by_hop):
            frame[f"hop_{number}"] = landed.numpy()
        return frame

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` tokens of largest |relevance| after all hops, with the columns of ``to_frame``.

        Args:
            k: Number of tokens.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> len(trace.top(3))
            3
        """
        frame = self.to_frame()
        order = frame["relevance"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def by(self, how: How, *, normalize: Literal["logits", "largest"] = "logits") -> pd.DataFrame:
        """Sum the trace over segments of the prompt, such as its messages.

        Args:
            how: As for ``Attribution.by``.
            normalize: As for ``Attribution.by``.

        Returns:
            As ``Attribution.by``.

        Raises:
            ValueError, PromptError: As ``Attribution.by``.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> lines = trace.by("line")["relevance"]
            >>> bool(abs(lines.sum() - float(trace.tokens.double().sum())) < 1e-9)
            True
        """
        return replace(self.hops[0], tokens=self.tokens).by(how, normalize=normalize)

    def show(self, *, include_special: bool = False) -> RenderedHTML:
        """Show the tokens coloured by relevance after all hops, with circuitsvis, without network.

        Args:
            include_special: Colour special tokens and the first token too, and let them count in
                the colour scale.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> trace.str_tokens[5].strip() in str(trace.show())
            True
        """
        from ..render import colored_tokens

        first = self.hops[0]
        return colored_tokens(
            self.str_tokens,
            self.tokens,
            greyed=None if include_special else first.greyed,
            target=first.target or "what was written",
            contrast=first.contrast or "its alternatives",
        )

    def save(self, path: str | Path) -> Path:
        """Write the trace, with all hops, to a safetensors file, which ``load`` reads back exactly.

        Args:
            path: Where to write; the folder must exist.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> path = trace.save("trace.safetensors")
            >>> clrp.Trace.load(path).delta == trace.delta
            True
        """
        tensors: dict[str, Tensor | None] = {"handing": self.handing}
        with TemporaryDirectory() as folder:
            for number, hop in enumerate(self.hops):
                saved = hop.save(Path(folder) / "hop.safetensors").read_bytes()
                tensors[f"hop_{number}"] = torch.frombuffer(bytearray(saved), dtype=torch.uint8)
        rest = {"through": self.through, "span": self.span, "least": self.least}
        return write_result(path, _FILE, tensors, rest | {"hops": len(self.hops)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a file that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is damaged, of another kind, or of another version.

        Example:
            >>> trace = clrp.trace_back(model, case.prompt, objective, through=(5, 20), hops=1)
            >>> path = trace.save("trace.safetensors")
            >>> bool((clrp.Trace.load(path).tokens == trace.tokens).all())
            True
        """
        tensors, data = read_result(path, _FILE)
        hops = []
        with rebuilding_from(path), TemporaryDirectory() as folder:
            for number in range(data["hops"]):
                part = Path(folder) / f"{Path(path).name}, hop {number}"
                part.write_bytes(tensors[f"hop_{number}"].numpy().tobytes())
                hops.append(Attribution.load(part))
            start, stop = data["through"]
            span = data["span"] and (data["span"][0], data["span"][1])
            return cls(tuple(hops), (start, stop), tensors["handing"], span, data["least"])

    def __repr__(self) -> str:
        start, stop = self.through
        count = len(self.hops) - 1
        prompt = float(self.tokens[:start].double().sum())
        share = prompt / self.delta if self.delta else float("nan")
        growth = float(self.account["growth"][1:].max()) if count else 0.0
        warning = f", absolute relevance up to {growth:.1f} times a hop" if growth > _GREW else ""
        return (
            f"Trace({self.hops[0].model_name}, {len(self.str_tokens)} tokens through {start} to "
            f"{stop}, {count} hop{'' if count == 1 else 's'}, Δℓ={self.delta:+.4f}, "
            f"{share:.0%} of it before the reasoning, {self.left:+.4f} left on it{warning})"
        )
