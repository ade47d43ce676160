"""Whether a prompt begins with the BOS token, with a warning where tokenizers disagree.

Three settings matter: the model's own tokenizer (as Hugging Face loads it by itself), the model
(``cfg.default_prepend_bos``, which TransformerLens sets for each family), and the text, which may
begin with the BOS token already, as a chat template's output does. TransformerLens loads the
tokenizer again with ``add_bos_token=True``, so ``model.tokenizer(text)`` no longer shows what the
model's own tokenizer does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import Argument, Message, PromptError, SpecialTokenWarning, Wording

_WITH, _WITHOUT = Argument("prepend_bos", True), Argument("prepend_bos", False)
_DEFAULT = Wording(
    "model.cfg.default_prepend_bos", elsewhere="its default_prepend_bos for this model"
)


@dataclass(frozen=True)
class Own:
    """Whether a tokenizer, as Hugging Face loads it by itself, adds BOS and EOS to a text."""

    bos: bool
    eos: bool


_warned: MutableMapping[Any, set[str]] = WeakKeyDictionary()
_alone: MutableMapping[Any, Own | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class Note:
    """One difference between a prompt's ids and those that a user may expect.

    Attributes:
        kind: The kind of difference; a warning of each kind is given once per model.
        text: The warning, with what to type.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Tokenised:
    """A text as token ids.

    Attributes:
        ids: The ids that the model gets.
        prepended_bos: Whether they begin with a BOS token that the text itself does not hold.
        notes: How they differ from what the model's own tokenizer gives.
    """

    ids: list[int]
    prepended_bos: bool
    notes: tuple[Note, ...]


def tokenised(model: Any, text: str, prepend_bos: bool | None = None) -> Tokenised:
    """The ids of ``model.to_tokens(text, prepend_bos=..., truncate=False)``, with notes on them.

    There are two exceptions. With ``prepend_bos=None``, a text that begins with the BOS token
    already gets no second one. And EOS tokens at the end of the text stay, which TransformerLens
    would remove as if the tokenizer had appended them.

    Args:
        model: The bridge.
        text: Not empty.
        prepend_bos: Whether to put the BOS token before the text, as in ``model.to_tokens``, even
            before a text that begins with it. None is the model's default,
            ``cfg.default_prepend_bos``.

    Raises:
        TypeError: ``prepend_bos`` is neither None nor a bool.
        PromptError: ``prepend_bos`` is True and there is no such token; or the config no longer
            describes the tokenizer, and a token would be lost or doubled.
    """
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise TypeError(f"prepend_bos={prepend_bos!r}: use True, False, or None for the default.")
    tokenizer, default = model.tokenizer, bool(getattr(model.cfg, "default_prepend_bos", True))
    within = _ids(tokenizer, text, add_special_tokens=False)
    begins = bool(within) and within[0] in _firsts(tokenizer)
    prepends = (default and not begins) if prepend_bos is None else prepend_bos
    _check_config(model, prepends)
    ids = model.to_tokens(text, prepend_bos=prepends, truncate=False)[0].tolist()
    ids += [tokenizer.eos_token_id] * (_ends(model, within) - _ends(model, ids))
    before = _leading(tokenizer, ids) - _leading(tokenizer, within)
    if before < 1 and prepend_bos:
        raise PromptError(
            Message(
                _WITH,
                " cannot be done: TransformerLens puts no BOS token before this text (the "
                f"tokenizer's is {tokenizer.bos_token!r}). Use ",
                _WITHOUT,
                ".",
            )
        )
    notes = _notes(model, prepend_bos, begins, before)
    if ids[max(before, 0) :][: len(within)] != within:
        notes.append(
            Note(
                "otherwise",
                Message(
                    f"The text alone is {len(within)} tokens, and others after the BOS token "
                    f"{tokenizer.bos_token!r} that TransformerLens writes before it: the ids of "
                    "model.to_tokens(text) are explained. ",
                    _WITHOUT,
                    " leaves it out.",
                ),
            )
        )
    return Tokenised(ids, before > 0, tuple(notes))


def warn_once(model: Any, notes: tuple[Note, ...]) -> None:
    """Issue each kind of note once per model, as a warning at the caller's line of code."""
    warned = _warned.setdefault(model, set())
    for note in notes:
        if note.kind not in warned:
            warnings.warn(note.text, SpecialTokenWarning, stacklevel=_outside())
            warned.add(note.kind)  # not reached where a filter turns the warning into an error


def _notes(model: Any, prepend_bos: bool | None, begins: bool, before: int) -> list[Note]:
    tokenizer, notes = model.tokenizer, []
    bos, own = repr(tokenizer.bos_token), own_tokens(model)
    default = bool(getattr(model.cfg, "default_prepend_bos", True))
    if begins and before > 0:
        notes.append(
            Note(
                "doubled",
                Message(
                    f"The prompt begins with the BOS token {bos} twice: the text holds it, and ",
                    _WITH,
                    " puts another one before it. ",
                    _WITHOUT,
                    " leaves that out.",
                ),
            )
        )
    elif begins and prepend_bos is None and (default or (own is None or own.bos)):
        who = (
            Wording("model.to_tokens(text)", elsewhere="TransformerLens")
            if default
            else "the model's own tokenizer"
        )
        notes.append(
            Note(
                "not doubled",
                Message(
                    f"The text begins with the BOS token {bos}, as a chat template writes it, so "
                    "no second one was put before it (",
                    who,
                    " would). ",
                    _WITH,
                    " puts it there; ",
                    _WITHOUT,
                    " leaves the text as it is, without this message.",
                ),
            )
        )
    elif prepend_bos is None and not begins:
        if before > 0 and (own is None or not own.bos):
            whose = (
                "The model's own tokenizer would not"
                if own is not None
                else "It is not known whether the model's own tokenizer would, because its files "
                "cannot be read again"
            )
            notes.append(
                Note(
                    "prepended",
                    Message(
                        f"TransformerLens put the BOS token {bos} before the prompt, because ",
                        _DEFAULT,
                        f" is True. {whose}, and a model that was trained without it may answer "
                        "differently. ",
                        _WITHOUT,
                        " leaves it out; ",
                        _WITH,
                        " keeps it, without this message.",
                    ),
                )
            )
        elif before < 1 and own is not None and own.bos:
            notes.append(
                Note(
                    "left out",
                    Message(
                        f"TransformerLens left out the BOS token {bos} that the model's own "
                        "tokenizer puts before a text, because ",
                        _DEFAULT,
                        " is False. ",
                        _WITH,
                        " puts it there; ",
                        _WITHOUT,
                        " leaves it out, without this message.",
                    ),
                )
            )
    if own is not None and own.eos:
        notes.append(
            Note(
                "eos",
                "The model's own tokenizer puts the EOS token "
                f"{tokenizer.eos_token!r} after a text; TransformerLens leaves it out, so that the "
                "model goes on with the text. If it is meant, write it at the end of the text.",
            )
        )
    return notes


def own_tokens(model: Any) -> Own | None:
    """What the model's tokenizer, as Hugging Face loads it by itself, adds to a text.

    None if TransformerLens has loaded it again and its files can no longer be read.
    """
    tokenizer = model.tokenizer
    if tokenizer.init_kwargs.get("add_bos_token") is not True or not tokenizer.name_or_path:
        return _around(tokenizer)  # loading it again would have left this mark
    if tokenizer not in _alone:
        _alone[tokenizer] = _loaded_alone(tokenizer)
    return _alone[tokenizer]


def _loaded_alone(tokenizer: Any) -> Own | None:
    from transformers import AutoTokenizer

    settings = {k: v for k in ("revision", "subfolder") if (v := tokenizer.init_kwargs.get(k))}
    try:
        return _around(
            AutoTokenizer.from_pretrained(
                tokenizer.name_or_path, local_files_only=True, trust_remote_code=False, **settings
            )
        )
    except Exception:  # no files, or code of its own that it would have to run
        return None


def _around(tokenizer: Any) -> Own:
    ids = _ids(tokenizer, "a")
    several = len(ids) > 1
    return Own(
        several and ids[0] in _firsts(tokenizer), several and ids[-1] == tokenizer.eos_token_id
    )


def _ids(tokenizer: Any, text: str, **settings: Any) -> list[int]:
    return list(tokenizer(text, **settings)["input_ids"])


def _firsts(tokenizer: Any) -> set[int]:
    """The ids that TransformerLens counts as a BOS token, which includes BERT's CLS."""
    ids = (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None))
    return {i for i in ids if i is not None}


def _leading(tokenizer: Any, ids: list[int]) -> int:
    firsts = _firsts(tokenizer)
    return next((at for at, i in enumerate(ids) if i not in firsts), len(ids))


def _ends(model: Any, ids: list[int]) -> int:
    """How many EOS tokens end the ids, if TransformerLens would remove them."""
    eos = model.tokenizer.eos_token_id
    if eos is None or not getattr(model.cfg, "tokenizer_appends_eos", False):
        return 0
    return next((at for at, i in enumerate(reversed(ids)) if i != eos), len(ids))


def _check_config(model: Any, prepends: bool) -> None:
    """Refuse a tokenizer that was replaced or changed after the model was loaded, if it matters."""
    expected = bool(getattr(model.cfg, "tokenizer_prepends_bos", True))
    does = _around(model.tokenizer).bos
    if expected == does or (expected and prepends):
        return
    wrong = (
        "lose its first token"
        if expected
        else f"begin with {'two BOS tokens' if prepends else 'a BOS token that was not asked for'}"
    )
    raise PromptError(
        f"model.cfg.tokenizer_prepends_bos is {expected}, but model.tokenizer, changed since the "
        f"model was loaded, puts {'a' if does else 'no'} BOS token first: the prompt would "
        f"{wrong}. Set model.cfg.tokenizer_prepends_bos = {does}."
    )


def _outside() -> int:
    """The ``stacklevel`` of the caller's own line: the innermost frame outside this package.

    Frames of libraries that check arguments at every call are between the two, and are skipped.
    """
    passed_over = (__name__.partition(".")[0], "jaxtyping", "beartype")
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in passed_over:
            break
        level, frame = level + 1, frame.f_back
    return level
