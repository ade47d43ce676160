"""One forward and its backwards under the rules, with relevance read on the way.

``run`` uses the engine that was planned: the plain one, which keeps the attention of every block
for one backward, or the tiled one, which runs block after block again over a key-value cache. Both
give the same kind of result.
"""

from __future__ import annotations

from .plain import RunResult
from .reading import Reading, RelevanceSums
from .run import RunOptions, run

__all__ = ["Reading", "RelevanceSums", "RunOptions", "RunResult", "run"]
