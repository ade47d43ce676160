"""Checks once, before TransformerLens is used, that its version works with this package."""

from __future__ import annotations

import functools
import re

from ..errors import VersionError

# The first version with whose TransformerBridge the tests pass, as in pyproject.toml.
# 3.6 gives left-padded batches other positions, 3.3 boots models in training mode, 2 has no bridge.
MINIMUM = (3, 9)


def installed_version() -> str:
    """The version that TransformerLens' metadata gives.

    Raises:
        importlib.metadata.PackageNotFoundError: It is not installed as a package.
    """
    # Imported here, because importing importlib.metadata takes longer than this whole package.
    from importlib.metadata import version

    return version("transformer_lens")


@functools.cache
def require_transformer_lens() -> None:
    """Refuse a TransformerLens that is missing or too old; cheap after the first call.

    A source tree has version 0.0.0 or no metadata at all. Its version cannot be known, so it
    passes; components without a rule are refused by name as everywhere.

    Raises:
        VersionError: An ImportError that states the version present, the one needed, and what to
            type.
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.util import find_spec

    needed = ".".join(map(str, MINIMUM))
    try:
        installed = installed_version()
    except PackageNotFoundError:
        if find_spec("transformer_lens") is not None:
            return
        raise _refusal(f"needs TransformerLens {needed} or newer, which is not installed") from None
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is None or installed == "0.0.0":
        return
    if (int(numbers[1]), int(numbers[2])) < MINIMUM:
        raise _refusal(
            f"needs TransformerLens {needed} or newer (models as TransformerBridge), "
            f"but found {installed}"
        )


def _refusal(what: str) -> VersionError:
    needed = ".".join(map(str, MINIMUM))
    return VersionError(
        f'tl_contrastive_lrp {what}. Type: pip install --upgrade "transformer_lens>={needed},<5"',
        name="transformer_lens",
    )
