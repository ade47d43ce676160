"""Rules on a model: where each goes, how it is attached, and an audit that none is missing.

``lrp`` is the context manager, ``lrp_hooks`` gives the same rules as a list of hooks. A new model
family needs only data in ``families``; an operation without a rule is refused.
"""

from __future__ import annotations

from .audit.audit import Audit, audit
from .context import coverage, lrp, lrp_hooks
from .coverage import Coverage

__all__ = ["Audit", "Coverage", "audit", "coverage", "lrp", "lrp_hooks"]
