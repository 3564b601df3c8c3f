"""The compiled loop of PMMP's penalty for the CPU: one pass over the weights and their three companions."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kcomplex.machine.compiled import compiled

Floats: TypeAlias = NDArray[np.floating[Any]]


@compiled
def slopes(
    price: float,
    quadruple: tuple[Floats, Floats, Floats, Floats],
    into: tuple[Floats, Floats, Floats, Floats],
) -> None:
    """Write the gradients of ``sum(price gamma + u bracket)`` in theta, w, gamma and u; the last one is the bracket.

    Parameters
    ----------
    price
        In nats a sample.
    quadruple, into
        theta, w, gamma and u of shape (n,), of one dtype; what to write their gradients to.

    Notes
    -----
    2u (theta - w gamma), 2u gamma (w - theta), price + u w (w - 2 theta), and theta^2 + w gamma (w - 2 theta).
    """
    theta, w, gamma, u = quadruple
    to_theta, to_w, to_gamma, bracket = into
    kind = theta.dtype.type
    cost, two = kind(price), kind(2)
    for i in range(len(theta)):
        pull = two * u[i]
        inner = w[i] * (w[i] - two * theta[i])
        to_theta[i] = pull * (theta[i] - w[i] * gamma[i])
        to_w[i] = pull * gamma[i] * (w[i] - theta[i])
        to_gamma[i] = cost + u[i] * inner
        bracket[i] = theta[i] * theta[i] + gamma[i] * inner
