"""Reading weights that accelerate keeps on disk or on another device between a module's calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def loaded(module: Any) -> Iterator[None]:
    """The module's own weights as numbers, for the block; they may be elsewhere before and after.

    With ``device_map`` offloading, a parameter is on the "meta" device but while its module runs.
    """
    wrapped = getattr(module, "original_component", module)
    if not isinstance(wrapped, nn.Module) or not any(
        p.is_meta for p in wrapped.parameters(recurse=False)
    ):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(wrapped):
        yield
