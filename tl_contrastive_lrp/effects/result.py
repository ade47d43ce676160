"""The frozen result of ``token_effects``, and its file format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..files import FileKind, read_result, rebuilding_from, write_result
from ..inputs.objective import check_earlier
from ..inputs.segment_sums import segment_frame
from ..inputs.segments import How, Segment, check_segments

if TYPE_CHECKING:
    import pandas as pd
    from circuitsvis.utils.render import RenderedHTML

_FILE = FileKind("tl_contrastive_lrp.token_effects", 1, "the effects of tokens")
_TENSORS = ("effect", "exact", "token_ids", "special", "replaced_by")


@dataclass(frozen=True, eq=False)
class TokenEffects:
    """What replacing each token of a prompt would do to Δℓ.

    Effects are in logits, Δℓ with the token replaced minus Δℓ: negative where the token speaks for
    the target, positive where it speaks for the contrast. This is the opposite sign of relevance.
    They are no relevance: nothing is shared out, and they do not add up to Δℓ.

    Attributes:
        effect: The effect of replacing each token.
        exact: Which effects are measured, or computed exactly since the token is near the end.
        token_ids: The prompt.
        special: Which tokens are special tokens of the tokenizer.
        str_tokens: What each token contributes to the prompt's text.
        replaced_by: The token id that replaced each token; None for zero embeddings.
        replaced_with: What replaced the tokens, in words.
        window: How many positions after the replaced token were computed exactly; None where
            effects were measured.
        delta: Δℓ of the prompt as it is.
        objective: The objective in words, with its sign.
        target: Name of the target token(s).
        contrast: Name of what it is contrasted with, "" for none.
        model_name: As TransformerLens calls the model.
        pos: Position whose next token is explained, from 0; the last of them if there are several.
        earlier_pos: The other positions explained, in rising order.
        forwards: What it cost, in forwards of the prompt, without the backward.
        prepended_bos: Whether a BOS token that the text does not contain was put before it; None
            where ids were given.
        segments: The messages of a prompt that ``chat`` made; () for any other.

    Raises:
        ValueError: tensors whose lengths do not match, positions out of order, or segments that do
            not cover the prompt.

    Example:
        >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
        >>> effects.top(3).columns.tolist()
        ['pos', 'token', 'id', 'effect', 'exact', 'special']
    """

    effect: Float[Tensor, " pos"]
    exact: Bool[Tensor, " pos"]
    token_ids: Int[Tensor, " pos"]
    special: Bool[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    replaced_by: Int[Tensor, " pos"] | None
    replaced_with: str
    window: int | None
    delta: float
    objective: str
    target: str
    contrast: str
    model_name: str
    pos: int
    earlier_pos: tuple[int, ...] = ()
    forwards: float = 0.0
    prepended_bos: bool | None = None
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        pos = len(self.str_tokens)
        check_segments(self.segments, pos)
        check_earlier("pos", self.pos, "earlier_pos", self.earlier_pos)
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != (pos,):
                raise ValueError(f"{name} has shape {list(tensor.shape)} for {pos} tokens.")

    @property
    def tokens(self) -> Float[Tensor, " pos"]:
        """``effect``, by the name that other results have for a number of each token.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> effects.tokens is effects.effect
            True
        """
        return self.effect

    def to_frame(self) -> pd.DataFrame:
        """The tokens as a table, in the order of the prompt.

        Returns:
            Columns pos, token, id, effect (in logits), exact and special.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> len(effects.to_frame()) == len(effects.str_tokens)
            True
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "pos": range(len(self.str_tokens)),
                "token": self.str_tokens,
                "id": self.token_ids.numpy(),
                "effect": self.effect.numpy(),
                "exact": self.exact.numpy(),
                "special": self.special.numpy(),
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` tokens of largest |effect|, with the columns of ``to_frame``.

        Args:
            k: Number of tokens.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> len(effects.top(5))
            5
        """
        frame = self.to_frame()
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def by(self, how: How) -> pd.DataFrame:
        """Sum the tokens' effects over segments of the prompt.

        A sum is of tokens replaced one at a time. It is not what replacing the whole segment would
        do: tokens that say the same thing have small effects each.

        Args:
            how: "message", "tool", "sentence", "line", "word", a dict {name: (start, end)} or a
                list of texts, as for ``Attribution.by``.

        Returns:
            A row for each segment, in the order of the prompt. Columns segment, role, kind, start,
            stop, n_tokens, effect (the sum), positive and negative (the sums of positive and of
            negative effects), and largest_token (the text of its token of largest |effect|).

        Raises:
            ValueError, PromptError: as ``Attribution.by``.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> lines = effects.by("line")
            >>> bool(abs(lines["effect"].sum() - float(effects.effect.sum())) < 1e-9)
            True
        """
        frame = segment_frame(self, how, "logits")
        return frame.rename(columns={"relevance": "effect"}).drop(columns="share")

    def __repr__(self) -> str:
        how = "measured" if self.window is None else f"window={self.window}"
        return (
            f"TokenEffects({self.model_name}, {len(self.str_tokens)} tokens, {self.target!r} vs "
            f"{self.contrast!r}, Δℓ={self.delta:+.4f}, {self.replaced_with}, {how})"
        )

    def show(self, *, include_special: bool = False) -> RenderedHTML:
        """Show the tokens coloured by what they add to Δℓ, −effect, without network.

        So colours mean what they mean in pictures of relevance: red is a token without which Δℓ
        would be smaller, which speaks for the target.

        Args:
            include_special: Colour special tokens and the first token too, and let them count in
                the colour scale.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> effects.str_tokens[5].strip() in str(effects.show())
            True
        """
        from ..render import colored_tokens

        greyed = self.special.clone()
        greyed[0] = True
        return colored_tokens(
            self.str_tokens,
            -self.effect,
            greyed=None if include_special else greyed,
            target=self.target or "the target",
            contrast=self.contrast or "its alternatives",
        )

    def save(self, path: str | Path) -> Path:
        """Write the result to a safetensors file, which ``load`` reads back exactly.

        Args:
            path: Where to write; the folder must exist.

        Returns:
            The path.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> path = effects.save("effects.safetensors")
            >>> clrp.TokenEffects.load(path).delta == effects.delta
            True
        """
        tensors: dict[str, Tensor | None] = {name: getattr(self, name) for name in _TENSORS}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        rest["segments"] = [asdict(segment) for segment in self.segments]
        return write_result(path, _FILE, tensors, rest)

    @classmethod
    def load(cls, path: str | Path) -> TokenEffects:
        """Read a file that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is damaged, of another kind, or of another version.

        Example:
            >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
            >>> path = effects.save("effects.safetensors")
            >>> torch.equal(clrp.TokenEffects.load(path).effect, effects.effect)
            True
        """
        tensors, data = read_result(path, _FILE)
        with rebuilding_from(path):
            data["segments"] = [Segment(**one) for one in data["segments"]]
            data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**data, **{name: tensors.get(name) for name in _TENSORS})  # type: ignore[arg-type]
