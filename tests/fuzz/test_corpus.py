"""Inputs on which a fuzzing script once failed are read, or refused in one error."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from tests.fuzz.frame import CORPUS, read_or_refuse


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: "/".join(path.parts[-2:]))
def test_what_failed_once_fails_no_more(path: Path) -> None:
    read_or_refuse(import_module(f"tests.fuzz.{path.parent.name}").read, path)
