"""The frozen result of explaining one prediction, and its file format.

The file is safetensors: tensors plus one JSON text, no pickle, nothing executable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .coverage_table import Coverage
from .ledger import Ledger, LedgerRow
from .results_io import FileKind, coverage_from, damage_named, read_result, write_result

if TYPE_CHECKING:
    import pandas as pd
    from circuitsvis.utils.render import RenderedHTML

_FILE = FileKind("tl_contrastive_lrp.attribution", 1, "the attribution")
_TENSORS = ("tokens", "resid", "heads", "neurons", "token_ids", "special")


@dataclass(frozen=True, eq=False)
class Attribution:
    """Relevance of one prediction's input tokens, hidden states, heads and neurons.

    All relevance is in logits, with the sign of the objective: positive supports the target
    (usually the wrong token), negative the contrast. Tensors are on the CPU.

    Attributes:
        tokens: Relevance of each input token: of its embedding, without position embeddings.
        resid: Relevance of each hidden state: rows as ``sites``, the last one before the final
            norm.
        heads: Relevance of each attention head's output z at the position where it writes.
        neurons: Relevance of each MLP neuron (``hook_post``), if asked for.
        token_ids: The prompt.
        special: Tokenizer's special tokens.
        str_tokens: What each token contributes to the prompt's text: joined, they are that text.
            A character of several tokens is at the first; the others are empty.
        sites: HookPoint name of each row of ``resid``.
        delta: Δℓ, the objective's value.
        target_logit: The objective's target term (mean logit of the targets).
        contrast_logit: Its contrast term, if it has one.
        objective: The objective in words, with its sign.
        target: Name of the target token(s): typed as a target, it means that token.
        contrast: Name of what it is contrasted with, "" for nothing.
        rules: Name of the rule set.
        coverage: Which component got which rule.
        ledger: Where Δℓ went.
        model_name: As TransformerLens calls the model.
        pos: Position whose next token is explained, from 0; of several the last, so that by
            causality nothing behind it has relevance.
        target_is_top: Whether the target is what the model writes there greedily; False of an
            objective that has no target tokens.
        memory: "plain", or "tiled (tile N)" where the backward was done N positions at a time.
        prepended_bos: Whether a BOS token that the text does not hold was put before it; None where
            ids were given (or by a version that did not say).
        earlier_pos: The other positions explained, rising, where the objective is a function of
            several; ``positions`` is all of them.
    """

    tokens: Float[Tensor, " pos"]
    resid: Float[Tensor, "site pos"]
    heads: Float[Tensor, "layer head pos"]
    neurons: Float[Tensor, "layer pos d_mlp"] | None
    token_ids: Int[Tensor, " pos"]
    special: Bool[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    sites: tuple[str, ...]
    delta: float
    target_logit: float
    contrast_logit: float | None
    objective: str
    target: str
    contrast: str
    rules: str
    coverage: Coverage
    ledger: Ledger
    model_name: str
    pos: int
    target_is_top: bool
    memory: str = "plain"
    prepended_bos: bool | None = None
    earlier_pos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        pos = len(self.str_tokens)
        check_earlier("pos", self.pos, "earlier_pos", self.earlier_pos)
        wanted = {
            "tokens": (pos,),
            "resid": (len(self.sites), pos),
            "heads": (*self.heads.shape[:2], pos),
            "token_ids": (pos,),
            "special": (pos,),
        }
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"Attribution.{name} has shape {found}, not {shape}.")
        if self.neurons is not None and tuple(self.neurons.shape[:2]) != (self.heads.shape[0], pos):
            raise ValueError(f"Attribution.neurons has shape {tuple(self.neurons.shape)}.")

    @property
    def positions(self) -> tuple[int, ...]:
        """Every position explained, rising: one, but for objectives that are functions of more."""
        return (*self.earlier_pos, self.pos)

    @property
    def greyed(self) -> Bool[Tensor, " pos"]:
        """Special tokens and the first token: shown grey and left out of colour scales."""
        greyed = self.special.clone()
        greyed[0] = True
        return greyed

    def to_frame(self) -> pd.DataFrame:
        """The input tokens, in prompt order: pos, token, id, relevance, share (of Δℓ), special."""
        import pandas as pd

        return pd.DataFrame(
            {
                "pos": range(len(self.str_tokens)),
                "token": self.str_tokens,
                "id": self.token_ids.numpy(),
                "relevance": self.tokens.numpy(),
                "share": self.tokens.numpy() / (self.delta or float("nan")),
                "special": self.special.numpy(),
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` input tokens of largest |relevance|, as in ``to_frame``."""
        frame = self.to_frame()
        order = frame["relevance"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def __repr__(self) -> str:
        return (
            f"Attribution({self.model_name}, {len(self.str_tokens)} tokens, "
            f"{self.target!r} vs {self.contrast!r}, Δℓ={self.delta:+.4f}, rules={self.rules!r}, "
            f"{self.ledger.share_to_tokens:.0%} of Δℓ at the input tokens)"
        )

    # ------------------------------------------------------------ pictures

    def show(self, *, include_special: bool = False) -> RenderedHTML:
        """The prompt's tokens coloured by relevance, as circuitsvis shows them, without network.

        Of more than 1,000 tokens, runs of faint ones are folded into pieces that open with a click.

        Args:
            include_special: Colour special tokens and the first token too, and let them count in
                the colour scale.
        """
        from .render import colored_tokens

        return colored_tokens(self.str_tokens, self.tokens, **self._look(include_special))

    def show_layers(self, *, include_special: bool = False) -> RenderedHTML:
        """The same for every row of ``resid``: choose a site to see its tokens' relevance."""
        from .render import colored_tokens_by_site

        look = self._look(include_special)
        return colored_tokens_by_site(self.str_tokens, self.resid, self.sites, **look)

    def _look(self, include_special: bool) -> dict[str, Any]:
        return {
            "greyed": None if include_special else self.greyed,
            "target": self.target or "the target",
            "contrast": self.contrast or "its alternatives",
        }

    def save_html(self, path: str | Path, *, candidates: pd.DataFrame | None = None) -> Path:
        """A report in one file that opens from disk without network.

        Args:
            path: Where to write; the folder must exist.
            candidates: Rows of ``next_token_table`` to include.
        """
        from .render import save_html
        from .report import report_of

        return save_html(path, report_of(self, candidates=candidates))

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> Path:
        """Write the result to a safetensors file; ``load`` reads it back exactly."""
        tensors: dict[str, Tensor | None] = {name: getattr(self, name) for name in _TENSORS}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        if self.prepended_bos is None:
            del rest["prepended_bos"]  # a field that the first files do not have
        rest |= {"coverage": asdict(self.coverage), "ledger": asdict(self.ledger)}
        if not self.earlier_pos:  # as version 0.1 writes and reads it
            del rest["earlier_pos"]
        return write_result(path, _FILE, tensors, rest)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read a file written by ``save``.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is damaged, foreign, or of another version.
        """
        tensors, data = read_result(path, _FILE)
        with damage_named(path):
            rows = tuple(LedgerRow(**row) for row in data["ledger"]["rows"])
            data["ledger"] = Ledger(rows, data["ledger"]["delta"])
            data["coverage"] = coverage_from(data["coverage"])
            data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**data, **{name: tensors.get(name) for name in _TENSORS})  # type: ignore[arg-type]


def check_earlier(name: str, pos: int, others: str, earlier: tuple[int, ...]) -> None:
    """Look at further positions explained.

    Raises:
        ValueError: they are not whole numbers from 0 that rise and lie before ``pos``.
    """
    whole = all(isinstance(p, int) and not isinstance(p, bool) for p in earlier)
    if earlier and not (whole and all(a < b for a, b in pairwise((-1, *earlier, pos)))):
        raise ValueError(
            f"{others}={earlier!r} must be positions from 0 that rise and lie before {name}={pos}."
        )


def special_mask(token_ids: Tensor, special_ids: list[int]) -> Bool[Tensor, " pos"]:
    """Which tokens are special ones of the tokenizer."""
    return torch.isin(token_ids, torch.tensor(special_ids, dtype=token_ids.dtype))
