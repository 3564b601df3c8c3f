"""Descriptions: several of the same weights, as one table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kcomplex.estimators.description import Description
from kcomplex.estimators.pipeline import build_estimator

if TYPE_CHECKING:
    import pandas as pd


class Descriptions(tuple[Description, ...]):
    """Several descriptions of the same weights, in the order of the estimators that were asked for."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        """Return the description at a position, the ones of a slice, or the one of an estimator's specification."""
        if isinstance(key, str):
            canonical = build_estimator(key).spec
            for description in self:
                if description.estimator == canonical:
                    return description
            raise KeyError(f"{key!r} isn't among {', '.join(item.estimator for item in self)}")
        found = super().__getitem__(key)
        return Descriptions(found) if isinstance(key, slice) else found

    def to_frame(self, *, per_tensor: bool = False) -> pd.DataFrame:
        """Return one row an estimator, or one row an estimator and tensor."""
        import pandas as pd

        if per_tensor:
            frames = [item.to_frame() for item in self]
            return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        return pd.DataFrame([item.to_dict() for item in self])

    def to_json(self) -> str:
        """Return the headlines, parts, tensors and skipped tensors as JSON."""
        return json.dumps([_plain(item) for item in self], indent=2, allow_nan=False)


def _plain(description: Description) -> dict[str, Any]:
    return {
        **{key: _json_number(value) for key, value in description.to_dict().items()},
        "parts": dict(description.parts),
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "weights": tensor.weights,
                "raw_bits": tensor.raw_bits,
                "value": _json_number(tensor.value),
                "parts": dict(tensor.parts),
                "mse": None if description.lossless is None else _json_number(tensor.distortion),
                "exact": None if description.lossless is None else tensor.exact,
                "same_as": tensor.same_as or None,
            }
            for tensor in description.tensors
        ],
        "left_out": dict(description.coverage.left_out),
        "care": list(description.care),
        "skipped": [
            {"name": tensor.name, "role": tensor.role, "reason": tensor.reason} for tensor in description.skipped
        ],
        "given": None if description.given is None else asdict(description.given),
    }


def _json_number(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON hasn't got, and everything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
