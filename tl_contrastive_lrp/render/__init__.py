"""Pictures of one attribution: circuitsvis views and a self-contained HTML report.

Plain data in (strings, arrays, tensors), HTML out. Nothing uses the network, neither when the HTML
is made nor when it is displayed.
"""

from __future__ import annotations

from ..files import save_html
from .offline import OfflineHTML, component, page
from .report import Report, report_html
from .tokens import colored_tokens, colored_tokens_by_site

__all__ = [
    "OfflineHTML",
    "Report",
    "colored_tokens",
    "colored_tokens_by_site",
    "component",
    "page",
    "report_html",
    "save_html",
]
