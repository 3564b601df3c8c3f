"""Lengths that are formulas: description lengths of model and data, and what sparse formats are said to need."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import gammaln

from kcomplex.errors import SpecError


def description_bits(model_bits: float, loss: float, samples: float) -> float:
    """Return the bits of a model and of data given the model.

    Parameters
    ----------
    model_bits
        Of a code for the model.
    loss
        Mean loss in nats a sample.
    samples
        Number of samples (of bytes or tokens, in a language model).
    """
    return model_bits + loss * samples / math.log(2)


def loss_at(bits: float, model_bits: float, samples: float) -> float:
    """Return the mean loss in nats at which a model of so many bits gives a description of so many bits: an isoline."""
    return (bits - model_bits) * math.log(2) / samples


def prequential_bits(losses: Sequence[float], samples: float) -> float:
    """Return the bits of data coded by a model while it learns: no model has to be stored.

    Parameters
    ----------
    losses
        Mean loss in nats of each batch of one pass, before it is learnt from; batches of one size.
    samples
        In the whole pass.
    """
    if not losses:
        raise SpecError("a prequential length needs the losses of one pass")
    return sum(losses) * samples / len(losses) / math.log(2)


def gaussian_bits(mean_square: float, deviation: float) -> float:
    """Return the bits a value of errors with a mean square under a normal density, less the constant of pi.

    ``mean_square / (2 deviation^2 ln2) + log2(deviation)``: the smallest where the deviation is the errors' own.
    """
    return mean_square / (2 * deviation**2 * math.log(2)) + math.log2(deviation)


def compression_rate(parameters: int, non_zeros: int) -> float:
    """Return the parameters of a network over those that aren't zero, biases and norms among both; inf for none."""
    return parameters / non_zeros if non_zeros else math.inf


def values_bytes(non_zeros: int, value_bytes: int = 4) -> int:
    """Return the bytes of the values that aren't zero alone, as if their places cost nothing: no format's size."""
    return non_zeros * value_bytes


def coordinate_bytes(non_zeros: int, value_bytes: int = 4) -> float:
    """Return the bytes of a sparse matrix with a row and a column of 32 bits for each value (COO)."""
    return float(non_zeros * (8 + value_bytes))


def compressed_column_bytes(non_zeros: int, columns: int, value_bytes: int = 4) -> float:
    """Return the bytes of a sparse matrix with a row of 32 bits for each value and a start for each column (CSC)."""
    return float(non_zeros * (4 + value_bytes) + 4 * (columns + 1))


def bitmap_bytes(non_zeros: int, entries: int, value_bytes: int = 4) -> float:
    """Return the bytes of a sparse tensor with one bit an entry and the values that aren't zero."""
    return float(math.ceil(entries / 8) + non_zeros * value_bytes)


def mask_bits(non_zeros: int, entries: int) -> float:
    """Return ``log2`` of the number of masks with so many ones: what a mask costs where all are alike."""
    chosen = gammaln(entries + 1) - gammaln(non_zeros + 1) - gammaln(entries - non_zeros + 1)
    return float(chosen / math.log(2))
