"""What becomes of Δℓ when tokens are removed in the order of their scores.

MoRF removes the most relevant tokens first (highest score: support of the target), LeRF the least
relevant first (Samek et al. 2017, arXiv:1509.06321; as a pair Blücher et al. 2024,
arXiv:2401.06654). Faithful scores make Δℓ fall early under MoRF and late under LeRF. With m tokens
that may be removed and Δℓ(x) after the share x of them,

    area               ∫₀¹ Δℓ_LeRF(x) − Δℓ_MoRF(x) dx / scale          higher is better, 0 is chance
    comprehensiveness  mean over x of (Δℓ − Δℓ_MoRF(x)) / scale         higher is better
    sufficiency        mean over x of (Δℓ − Δℓ_LeRF(1 − x)) / scale     lower is better

the last two (DeYoung et al. 2020, arXiv:1911.03429) at x = 1, 5, 10, 20 and 50 %: without the top
tokens, and with nothing but them. The scale makes models and prompts comparable: the larger of |Δℓ|
and |Δℓ − Δℓ(all removed)|, so what an explanation could at most have to explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...attribution.result import Attribution
from ...inputs.objective import question
from ...rules.threads import one_at_a_time
from .removal import Removal, Replace, removal

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
Scores = Attribution | Tensor


@dataclass(frozen=True, eq=False)
class FaithfulnessCurves:
    """Δℓ while tokens are removed, for one prompt and one or more rankings.

    Attributes:
        names: The rankings.
        removed: How many tokens were removed at each step.
        removable: How many there were to remove.
        morf, lerf: Δℓ at each step, logits, averaged over draws.
        delta: Δℓ of the prompt as it is.
        how: What removed tokens became.
    """

    names: tuple[str, ...]
    removed: Int[Tensor, " step"]
    removable: int
    morf: Float[Tensor, "name step"]
    lerf: Float[Tensor, "name step"]
    delta: float
    how: str

    @property
    def share(self) -> Float[Tensor, " step"]:
        """Share of the removable tokens that is gone at each step."""
        return self.removed.double() / self.removable

    @property
    def scale(self) -> float:
        """What measures are divided by, logits: the larger of |Δℓ| and |Δℓ − Δℓ(all removed)|."""
        return max(abs(self.delta), abs(self.delta - float(self.morf[0, -1])))

    @property
    def area(self) -> dict[str, float]:
        """Area between LeRF and MoRF over ``scale``, by ranking; higher is better."""
        between = torch.trapezoid(self.lerf - self.morf, self.share) / self.scale
        return dict(zip(self.names, between.tolist(), strict=True))

    @property
    def comprehensiveness(self) -> dict[str, float]:
        """Mean fall of Δℓ without the top tokens over ``scale``; higher is better."""
        at = torch.isin(self.removed, torch.tensor(_counts(self.removable)))
        return self._mean_fall(self.morf[:, at])

    @property
    def sufficiency(self) -> dict[str, float]:
        """Mean fall of Δℓ with the top tokens alone over ``scale``; lower is better."""
        at = torch.isin(self.removable - self.removed, torch.tensor(_counts(self.removable)))
        return self._mean_fall(self.lerf[:, at])

    def _mean_fall(self, values: Tensor) -> dict[str, float]:
        fall = ((self.delta - values) / self.scale).mean(1)
        return dict(zip(self.names, fall.tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """A row a step: name, order ("MoRF", "LeRF"), removed, share, delta (logits)."""
        import pandas as pd

        parts = [
            pd.DataFrame(
                {
                    "name": name,
                    "order": order,
                    "removed": self.removed.numpy(),
                    "share": self.share.numpy(),
                    "delta": values[row].numpy(),
                }
            )
            for row, name in enumerate(self.names)
            for order, values in (("MoRF", self.morf), ("LeRF", self.lerf))
        ]
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """A row a ranking: name, area, comprehensiveness, sufficiency; largest area first."""
        import pandas as pd

        columns = {
            "area": self.area,
            "comprehensiveness": self.comprehensiveness,
            "sufficiency": self.sufficiency,
        }
        frame = pd.DataFrame({"name": list(self.names)})
        for column, values in columns.items():
            frame[column] = frame["name"].map(values)
        return frame.sort_values("area", ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> Any:
        """A plotly figure: Δℓ over the share removed, solid MoRF and dashed LeRF.

        Raises:
            ImportError: plotly is not installed.
        """
        from ...render.plotly_figures import line_figure

        share = self.share.tolist()
        lines = [
            (f"{name} {order}", share, values[row].tolist())
            for row, name in enumerate(self.names)
            for order, values in (("MoRF", self.morf), ("LeRF", self.lerf))
        ]
        return line_figure(
            lines, x=f"share of tokens removed ({self.how})", y="Δℓ (logits)", pairs=True
        )

    def __str__(self) -> str:
        table = self.summary().to_string(index=False, float_format=lambda value: f"{value:.3f}")
        return (
            f"Δℓ={self.delta:+.3f}, {self.removable} tokens removed for {self.how}, "
            f"in {len(self.removed) - 1} steps\n{table}"
        )


def _counts(removable: int) -> list[int]:
    """The top 1, 5, 10, 20 and 50 % of tokens, at least one."""
    return sorted({max(1, math.ceil(share * removable)) for share in SHARES})


@one_at_a_time
def faithfulness_curves(
    model: Any,
    prompt: str | Tensor,
    scores: Scores | Mapping[str, Scores],
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    replace: Replace | Tensor = "zero",
    draws: int = 4,
    pool: Tensor | None = None,
    seed: int = 0,
    exclude: Iterable[int] = (),
    include_special: bool = False,
    steps: int = 20,
    batch_size: int = 16,
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> FaithfulnessCurves:
    """Remove the prompt's tokens by their scores, most relevant first and least relevant first.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        scores: Relevance [pos], an ``Attribution``, or several of these by name. Signed as the
            objective: the highest supports the target most. Equal scores: the earlier first.
        objective, target, contrast, pos: As for ``attribute``.
        replace: What removed tokens become: "zero" embeddings; "random" other tokens; or token ids
            [pos] or [draw, pos], one for each position.
        draws: How many random replacements results are averaged over.
        pool: Token ids that "random" draws from; the tokenizer's, without special ones, if None.
        seed: Of "random".
        exclude: Positions never removed.
        include_special: Also remove special tokens and the first token.
        steps: How many steps a curve has, at most one a token.
        batch_size: Prompts a forward pass.
        progress: Show a bar.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Raises:
        ValueError: scores of another length or not finite; an argument out of range; nothing to
            remove; Δℓ is 0 with and without all tokens.
        TypeError, TokenError, PromptError: as ``attribute``.
    """
    objective = question(model, objective, target, contrast, pos)
    setting = removal(
        model, prompt, objective, replace=replace, draws=draws, pool=pool, seed=seed,
        exclude=exclude, include_special=include_special, batch_size=batch_size, progress=progress,
        prepend_bos=prepend_bos,
    )  # fmt: skip
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more.")
    named = dict(scores) if isinstance(scores, Mapping) else {_name_of(scores): scores}
    if not named:
        raise ValueError("scores= is empty; give at least one ranking.")
    removable = len(setting.positions)
    grid = torch.linspace(0, removable, min(steps, removable) + 1).round().long().tolist()
    tops = _counts(removable)
    removed = torch.tensor(sorted({*grid, *tops, *(removable - top for top in tops)}))
    masks = [
        _removed_by(order, removed, setting)
        for name, given in named.items()
        for order in _orders(_checked(name, given, setting), setting)
    ]
    values = setting.values(torch.cat(masks)).view(len(named), 2, len(removed))
    curves = FaithfulnessCurves(
        names=tuple(named),
        removed=removed,
        removable=removable,
        morf=values[:, 0],
        lerf=values[:, 1],
        delta=float(values[0, 0, 0]),
        how=setting.how,
    )
    if not curves.scale > 1e-6:
        raise ValueError(
            "Δℓ is 0 for the prompt and with all its tokens removed: there is nothing to explain."
        )
    return curves


def _name_of(scores: Scores) -> str:
    return scores.rules if isinstance(scores, Attribution) else "scores"


def _checked(name: str, given: Scores, setting: Removal) -> Tensor:
    scores = given.tokens if isinstance(given, Attribution) else given
    n = setting.tokens.shape[1]
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (n,):
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"Scores {name!r} are {found}; the prompt needs a tensor [{n}].")
    scores = scores.detach().cpu().double()
    if not bool(torch.isfinite(scores[setting.removable]).all()):
        raise ValueError(f"Scores {name!r} hold NaN or infinity.")
    return scores


def _orders(scores: Tensor, setting: Removal) -> tuple[Tensor, Tensor]:
    """Removable positions, most relevant first, and the other way round."""
    at = setting.positions
    most = at[scores[at].argsort(descending=True, stable=True)]
    return most, most.flip(0)


def _removed_by(order: Tensor, removed: Tensor, setting: Removal) -> Tensor:
    """[step, pos]: the first ``removed`` positions of the order."""
    rank = torch.full((setting.tokens.shape[1],), setting.tokens.shape[1])
    rank[order] = torch.arange(len(order))
    return rank[None] < removed[:, None]
