"""The text of tokens: a name that can be typed back, and what a token adds to its prompt.

These are two different texts.

*Name*: the text to type for a token. ``token_name`` gives each id a unique name, and ``readings``
gives the ids that a typed text can mean; a name means its token and no other, which is checked
whenever a name is made. A name is the first of these that means this token alone:

1. the token's own text, as its vocabulary entry spells it: a leading space counts, bytes that
   make no character are written ``<0xE2>`` (``"Ġthe"`` is named ``" the"``, ``"▁Paris"`` is
   ``" Paris"``; WordPiece's ``"##ing"`` keeps its mark);
2. the vocabulary entry itself (``"Ġthe"``);
3. ``id:123``, followed by a space and the text, if there is one (``"id:288 ing"``).

*Meaning of a typed text.* ``id:123`` is that id, always; text after it must be that token's.
Anything else means the tokens whose own text it is, or, where no token has that text, the
vocabulary entry that is spelled so; and it means the token that the tokenizer makes of it, if that
is one token. Where these differ, it is ambiguous and refused. That happens with tokenizers that put
a space before their input (the Llama-2 form): "Paris" is the text of the entry ``"Paris"``,
which continues a word, and the tokenizer reads it as ``"▁Paris"``. Both are likely to be meant:
the first by someone who saw it in a table, the second by someone who is used to
``model.to_single_token``. Either choice would show one of them the other token's number under the
label that they typed. " Paris" is unambiguous, and the first is named ``"id:123 Paris"``.
In vocabularies that write spaces as ``"▁"`` a text with that sign is always a vocabulary entry.

*Text in context*: what a token contributes to its prompt. ``texts_in_context`` cuts the decoded
prompt into its tokens' shares: joined, they are the text that the tokenizer decodes. A character
of several tokens goes whole to the token that has its first byte, and the others are empty; bytes
that make no character, as at the end of a prompt cut in the middle of one, are shown as
``<0xE2>``, and ids that the tokenizer does not know as ``id:123``.

No function here loops over the vocabulary: a vocabulary entry is computed from a text and looked
up, so the first name costs as little as the last.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

_ID = re.compile(r"id:(\d+)(?: (.*))?", re.DOTALL)
_STRAY = re.compile("[\udc80-\udcff]")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SIGNS = {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", " ": "\u00b7"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}


def _byte_alphabet() -> dict[str, int]:
    """The byte for each character with which byte-level vocabularies write bytes.

    Visible characters of Latin-1 mean themselves. The characters from U+0100 on mean the other
    bytes, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()
# For str.translate: maps a byte's character to the character of its number, and any other character
# to one that Latin-1 cannot encode.
_TO_LATIN = dict.fromkeys(range(256), "\uffff") | {ord(c): chr(b) for c, b in _BYTES.items()}
_TO_BYTES = {byte: letter for letter, byte in _BYTES.items()}


def _readable(data: bytes) -> str:
    """The bytes as text; those that make no character as ``<0xE2>``."""
    return _with_strays(data.decode(errors="surrogateescape"))


def _with_strays(text: str) -> str:
    return _STRAY.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


@dataclass(frozen=True)
class _Form:
    """How a tokenizer writes text.

    Attributes:
        size: Number of its tokens when this was read; it is read again if that number changes.
        byte_level: Entries are bytes, each written as a character.
        byte_fallback: Entries such as ``<0xE2>`` are bytes.
        space: How entries write a space; "" if they have no sign for it.
        added: Texts of tokens that were added to the vocabulary, by id.
        contents: Their ids, by text.
        names: Names given so far, by id.
    """

    size: int
    byte_level: bool
    byte_fallback: bool
    space: str
    added: dict[int, str]
    contents: dict[str, int]
    names: dict[int, str] = field(default_factory=dict)


_forms: WeakKeyDictionary[Any, _Form] = WeakKeyDictionary()


def _form_of(tokenizer: Any) -> _Form:
    """The tokenizer's form, read once."""
    form = _forms.get(tokenizer)
    size = len(tokenizer)
    if form is None or form.size != size:
        form = _read_form(tokenizer, size)
        _forms[tokenizer] = form
    return form


def _read_form(tokenizer: Any, size: int) -> _Form:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    settings = {} if decoder is None else json.loads(decoder.__getstate__())
    steps = settings.get("decoders", [settings])
    kinds = {step.get("type") for step in steps}
    space = ""
    for step in steps:
        if step.get("type") == "Metaspace":
            space = step["replacement"]
        elif step.get("type") == "Replace" and step.get("content") == " ":
            space = step["pattern"].get("String", "")
    added = {
        int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
    }
    return _Form(
        size,
        byte_level="ByteLevel" in kinds,
        byte_fallback="ByteFallback" in kinds,
        space=space,
        added=added,
        contents={text: i for i, text in added.items()},
    )


def _entry(tokenizer: Any, token_id: int) -> str | None:
    """The vocabulary entry of an id, or None where the tokenizer has none."""
    if getattr(tokenizer, "backend_tokenizer", None) is None and token_id >= len(tokenizer):
        return None  # tokenizers written in Python return their unknown token
    try:
        entry = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, OverflowError):
        return None
    return entry if isinstance(entry, str) and entry else None


def _with_entry(tokenizer: Any, entry: str) -> set[int]:
    """The id of a vocabulary entry, or nothing."""
    token_id = tokenizer.convert_tokens_to_ids(entry)
    exists = token_id is not None and _entry(tokenizer, token_id) == entry
    return {int(token_id)} if exists else set()


def _data(form: _Form, token_id: int, entry: str) -> bytes:
    """The bytes of a token's own text."""
    if token_id in form.added:
        return form.added[token_id].encode()
    if form.byte_level:
        try:
            return entry.translate(_TO_LATIN).encode("latin-1")
        except UnicodeEncodeError:
            return entry.encode()  # as the tokenizer's decoder does
    byte = _BYTE.fullmatch(entry) if form.byte_fallback else None
    if byte is not None:
        return bytes.fromhex(byte[1])
    return (entry.replace(form.space, " ") if form.space else entry).encode()


def _own_text(form: _Form, token_id: int, entry: str) -> str:
    """A token's own text; bytes that make no character, and byte entries, as ``<0xE2>``."""
    if form.byte_fallback and token_id not in form.added and _BYTE.fullmatch(entry):
        return entry
    return _readable(_data(form, token_id, entry))


def _of_text(tokenizer: Any, form: _Form, text: str) -> set[int]:
    """The ids whose own text this is; where entries are bytes, ``<0xE2>`` reads as a byte too."""
    try:
        datas = {text.encode()}
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return set()
    entries = {text, text.replace(" ", form.space or " ")}
    if form.byte_level or form.byte_fallback:
        parts = _BYTE.split(text)
        hexed = (p.encode() if k % 2 == 0 else bytes.fromhex(p) for k, p in enumerate(parts))
        datas.add(b"".join(hexed))
    if form.byte_level:
        entries |= {data.decode("latin-1").translate(_TO_BYTES) for data in datas}
    elif form.byte_fallback and (byte := _BYTE.fullmatch(text)):
        entries.add(f"<0x{byte[1].upper()}>")
    ids = {i for entry in entries for i in _with_entry(tokenizer, entry)}
    if text in form.contents:
        ids.add(form.contents[text])
    return {i for i in ids if _data(form, i, _entry(tokenizer, i) or "") in datas}


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """The ids that the tokenizer makes of a text, without tokens that it adds at either end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.padding is None and backend.truncation is None:
        return list(backend.encode(text, add_special_tokens=False).ids)  # a tenth of the time
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def readings(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids that a typed text can mean, smallest first; with several it is ambiguous.

    ``id:123`` is not read here. The result is empty if the text is not a single token, or only the
    tokenizer's unknown token.
    """
    if not text:
        return ()
    form = _form_of(tokenizer)
    exact = _of_text(tokenizer, form, text) or _with_entry(tokenizer, text)
    if exact and form.space and form.space in text:
        return tuple(sorted(exact))
    ids = _encoded(tokenizer, text)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) == 1 and (ids[0] != unknown or text == tokenizer.unk_token):
        exact |= set(ids)
    if not exact and form.byte_fallback and len(text.encode()) == 1:
        exact = _with_entry(tokenizer, f"<0x{ord(text):02X}>")
    return tuple(sorted(exact))


def own_text(tokenizer: Any, token_id: int) -> str | None:
    """A token's own text, which another token may have too; None for an id without a name."""
    entry = _entry(tokenizer, token_id)
    return None if entry is None else _own_text(_form_of(tokenizer), token_id, entry)


def token_name(tokenizer: Any, token_id: int) -> str:
    """The text that means this token and no other: its own text, its entry, or ``id:123``."""
    form = _form_of(tokenizer)
    name = form.names.get(token_id)
    if name is None:
        name = form.names[token_id] = _new_name(tokenizer, form, token_id)
    return name


def _new_name(tokenizer: Any, form: _Form, token_id: int) -> str:
    entry = _entry(tokenizer, token_id)
    if entry is None:
        return f"id:{token_id}"
    text = _own_text(form, token_id, entry)
    for name in (text, entry):
        if not _ID.fullmatch(name) and readings(tokenizer, name) == (token_id,):
            return name
    return f"id:{token_id} {text}"


def written_id(text: str) -> tuple[int, str | None] | None:
    """The number in ``id:123``, and the text after it, if any; None for all other texts."""
    match = _ID.fullmatch(text)
    return None if match is None else (int(match[1]), match[2])


def is_text_of(tokenizer: Any, token_id: int, text: str) -> bool:
    """Whether ``text`` after ``id:123`` is that token's: its own text, its entry, or as printed."""
    entry = _entry(tokenizer, token_id)
    if entry is None:
        return False
    own = _own_text(_form_of(tokenizer), token_id, entry)
    return text in (own, entry) or _on_one_line(text) == _on_one_line(own)


def printed(name: str, token_id: int) -> str:
    """A name for tables and sentences on a screen, where it can be read and typed back.

    A name whose characters are all visible stays as it is. Otherwise, trailing or repeated spaces,
    line breaks, tabs and invisible characters are written as signs or escapes after the id: typed
    back, a sign alone would mean another token (``"id:198 ↵"``, ``"id:256 ··"``).
    """
    text = name.removeprefix(f"id:{token_id} ")
    if text == name.strip(" ") == f"id:{token_id}":
        return name
    if (
        "  " not in name
        and text == text.rstrip(" ")
        and _on_one_line(text) == text.replace(" ", _SIGNS[" "])
    ):
        return name
    return f"id:{token_id} {_on_one_line(text)}"


def _on_one_line(text: str) -> str:
    """``text`` with a sign for each space and line break, and escapes for invisible characters."""
    return "".join(
        _SIGNS[c]
        if c in _SIGNS
        else c.encode("unicode_escape").decode("ascii")
        if unicodedata.category(c) in _HIDDEN
        else c
        for c in text
    )


# ---------------------------------------------------------------- text in context


def texts_in_context(tokenizer: Any, token_ids: Iterable[int]) -> tuple[str, ...]:
    """What each token contributes to the prompt: joined, the text that the tokenizer decodes.

    Args:
        tokenizer: The model's.
        token_ids: The whole prompt, ``[pos]``; what a token shows depends on those before it.

    Returns:
        One text per token, ``[pos]``. Empty where a token holds only the rest of a character that
        began before it, or a space that the tokenizer drops at the start.
    """
    ids = [int(i) for i in token_ids]
    form = _form_of(tokenizer)
    entries = {i: _entry(tokenizer, i) for i in set(ids)}
    known = [i for i in ids if entries[i] is not None]
    if len(known) < len(ids):
        texts = iter(texts_in_context(tokenizer, known))
        return tuple(f"id:{i}" if entries[i] is None else next(texts) for i in ids)
    if not ids:
        return ()
    datas = {i: _data(form, i, entry) for i, entry in entries.items() if entry is not None}
    if form.byte_level:
        return tuple(_cut([datas[i] for i in ids])[0])
    want = _decoded(tokenizer, ids)
    if form.space or form.byte_fallback:
        texts_, whole = _cut([datas[i] for i in ids])
        texts_ = _without_start(texts_, want)
        if not whole or "".join(texts_) == want:
            return tuple(texts_)
    for width in (1, 8, len(ids) if len(ids) <= 512 else 32):
        added = _by_windows(tokenizer, ids, width)
        if "".join(added) == want:
            return tuple(added)
    return tuple(_decoded(tokenizer, [i]) for i in ids)


def _cut(datas: Sequence[bytes]) -> tuple[list[str], bool]:
    """Assign each character to the token of its first byte; stray bytes become ``<0xE2>``.

    Returns:
        The texts, and whether there were no stray bytes.
    """
    import numpy as np  # here, because the command line's help does not need it

    text = b"".join(datas).decode(errors="surrogateescape")  # a stray byte becomes one character
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    stray = (code >= 0xD800) & (code < 0xE000)
    length = 1 + (code >= 0x80) + ((code >= 0x800) & ~stray) + (code >= 0x10000) - stray
    ends = np.cumsum([len(data) for data in datas])
    owner = np.searchsorted(ends, np.cumsum(length) - length, side="right")
    cuts = np.bincount(owner, minlength=len(datas)).cumsum().tolist()
    texts = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    if not stray.any():
        return texts, True
    return [_with_strays(one) for one in texts], False


def _without_start(texts: list[str], want: str) -> list[str]:
    """The texts without the spaces that decoding drops at the start of a text."""
    text = "".join(texts)
    dropped = (len(text) - len(text.lstrip(" "))) - (len(want) - len(want.lstrip(" ")))
    remaining = []
    for one in texts:
        remaining.append(one[max(dropped, 0) :])
        dropped -= len(one)
    return remaining


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _by_windows(tokenizer: Any, ids: Sequence[int], width: int) -> list[str]:
    """What each token adds to the decoded text of the ``width`` tokens before it."""
    starts = [max(0, k - width) for k in range(len(ids))]
    before = [list(ids[a:k]) for k, a in enumerate(starts)]
    after = [list(ids[a : k + 1]) for k, a in enumerate(starts)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pairs = (backend.decode_batch(part, skip_special_tokens=False) for part in (before, after))
    else:
        pairs = ([_decoded(tokenizer, one) for one in part] for part in (before, after))
    return [b[len(a) :] if b.startswith(a) else "" for a, b in zip(*pairs, strict=True)]
