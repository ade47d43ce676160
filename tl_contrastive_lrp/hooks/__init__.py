"""Rules on a model: where each goes, how it is put on and taken off, an audit that none is missing.

``lrp`` is the context manager, ``lrp_hooks`` the same as a hook list. All that a model family
touches is data in ``families``; what has no rule is refused.
"""

from __future__ import annotations

from .audit.audit import Audit, audit
from .context import coverage, lrp, lrp_hooks
from .coverage import Coverage

__all__ = ["Audit", "Coverage", "audit", "coverage", "lrp", "lrp_hooks"]
