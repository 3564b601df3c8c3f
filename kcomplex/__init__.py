"""Measures the algorithmic complexity of neural-network weights and trains networks to be simpler."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcomplex.version import VERSION as __version__

if TYPE_CHECKING:
    from kcomplex import modes as modes
    from kcomplex.errors import KComplexError as KComplexError
    from kcomplex.estimators.description import Description as Description
    from kcomplex.estimators.pipeline import build_estimator as build_estimator
    from kcomplex.kcz.container import decode as decode
    from kcomplex.kcz.container import encode as encode
    from kcomplex.kcz.container import verify as verify
    from kcomplex.measuring.descriptions import Descriptions as Descriptions
    from kcomplex.measuring.explanation import explain as explain
    from kcomplex.measuring.measure import describe as describe
    from kcomplex.measuring.stream import decode_checkpoint as decode_checkpoint
    from kcomplex.measuring.stream import encode_checkpoint as encode_checkpoint
    from kcomplex.quantising.quantisation import quantise as quantise
    from kcomplex.sources.open import open_weights as open_weights
    from kcomplex.tracking.frames import load_runs as load_runs
    from kcomplex.tracking.tracker import Tracker as Tracker
    from kcomplex.tracking.tracker import attach as attach
    from kcomplex.weights import Weights as Weights

_PUBLIC = {
    "Description": "kcomplex.estimators.description",
    "Descriptions": "kcomplex.measuring.descriptions",
    "KComplexError": "kcomplex.errors",
    "Tracker": "kcomplex.tracking.tracker",
    "Weights": "kcomplex.weights",
    "attach": "kcomplex.tracking.tracker",
    "build_estimator": "kcomplex.estimators.pipeline",
    "decode": "kcomplex.kcz.container",
    "decode_checkpoint": "kcomplex.measuring.stream",
    "describe": "kcomplex.measuring.measure",
    "encode": "kcomplex.kcz.container",
    "encode_checkpoint": "kcomplex.measuring.stream",
    "explain": "kcomplex.measuring.explanation",
    "load_runs": "kcomplex.tracking.frames",
    "open_weights": "kcomplex.sources.open",
    "quantise": "kcomplex.quantising.quantisation",
    "verify": "kcomplex.kcz.container",
}
__all__ = [*_PUBLIC, "__version__", "modes"]

# In a checkout the subpackages compressors and analyses stand beside this folder, not inside it.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "compressors" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that importing kcomplex stays fast."""
    if name == "modes":
        return importlib.import_module("kcomplex.modes")
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kcomplex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
