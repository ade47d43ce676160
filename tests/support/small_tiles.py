"""Query tiles of a few positions, so that short prompts have several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tl_contrastive_lrp.rules import query_tiles, visible


@contextmanager
def small_query_tiles() -> Iterator[None]:
    with (
        patch.object(query_tiles, "_TILES", (5, 5)),
        patch.object(query_tiles, "_FORWARD_TILE", 6),
        patch.object(visible, "_ROWS", 7),
    ):
        yield
