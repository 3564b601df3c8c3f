"""What a terminal may be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text without control characters: names in files come from anybody, and terminals obey them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
