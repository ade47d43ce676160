"""One forward under the rules and the backwards from it, inside which relevance is read.

``run`` uses the engine that was planned: the plain one, which keeps the attention of every block
for one backward, or the tiled one, which runs the blocks again, one by one, over a key-value cache.
Both return the same type of result.
"""

from __future__ import annotations

from .plain import RunResult
from .reading import Reading, RelevanceSums
from .run import RunOptions, run

__all__ = ["Reading", "RelevanceSums", "RunOptions", "RunResult", "run"]
