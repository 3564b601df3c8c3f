"""The values of a tensor piece by piece, so that proxies need memory for one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcomplex.estimators.pieces import handles_of
from kcomplex.weights import TensorHandle, values_of

SEGMENT = 1 << 20


def value_segments(handle: TensorHandle) -> Iterator[NDArray[np.floating[Any]]]:
    """Yield a tensor's values in C order, `SEGMENT` elements at a time, as `kcomplex.weights.values_of` gives them.

    A segment has shape (elements,), or (elements, 2) for real and imaginary parts of a complex tensor.
    """
    for piece in handles_of(handle, SEGMENT) if handle.elements else ():
        yield values_of(piece.read().detach().reshape(-1))
