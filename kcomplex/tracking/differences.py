"""Differences of two configurations, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return which keys of two configurations differ, and how, in alphabetical order; nothing where none does."""

    def told(configuration: Mapping[str, Any], key: str) -> str:
        return repr(configuration[key]) if key in configuration else "not set"

    pairs = ((key, told(there, key), told(here, key)) for key in sorted({*there, *here}))
    return "; ".join(f"{key} is {one} there and {other} here" for key, one, other in pairs if one != other)
