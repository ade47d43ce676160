"""One forward and its backwards under the rules, read from inside.

``run`` decides between the plain engine, which keeps every block's attention for one backward, and
the tiled one, which replays block by block over a key-value cache; both give the same kind of
result.
"""

from __future__ import annotations

from .reading import Reading
from .relevance_sums import RelevanceSums
from .run import RunResult, run

__all__ = ["Reading", "RelevanceSums", "RunResult", "run"]
