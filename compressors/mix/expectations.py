"""What Laplace and normal distributions of mean magnitude one expect of a decision about a number.

Each function sets both probabilities that a bit is one, `Engine.parametric`. Bounds are distances from what is
expected of the number, in units of the expected magnitude.
"""

from __future__ import annotations

from kcomplex.machine.compiled import inlined

from ..tables.logistic import mass, survival
from .logistic_mixing import Engine


@inlined
def expect_outside(engine: Engine, low: float, high: float) -> None:
    """Expect a number outside two bounds."""
    engine.parametric[0] = 1.0 - mass(low, high, engine.tables.laplace)
    engine.parametric[1] = 1.0 - mass(low, high, engine.tables.normal)


@inlined
def expect_over(engine: Engine, bound: float) -> None:
    """Expect a number over a bound."""
    engine.parametric[0] = survival(bound, engine.tables.laplace)
    engine.parametric[1] = survival(bound, engine.tables.normal)


@inlined
def expect_side(engine: Engine, toward: float, away: float) -> None:
    """Expect a number on the one of two sides, knowing that it is farther away than the bound of its side."""
    one, other = survival(toward, engine.tables.laplace), survival(away, engine.tables.laplace)
    engine.parametric[0] = _share(one, one + other)
    one, other = survival(toward, engine.tables.normal), survival(away, engine.tables.normal)
    engine.parametric[1] = _share(one, one + other)


@inlined
def expect_farther(engine: Engine, low: float, middle: float) -> None:
    """Expect a number over one bound, knowing that it is over a lower one."""
    for_laplace = survival(low, engine.tables.laplace)
    engine.parametric[0] = _share(survival(middle, engine.tables.laplace), for_laplace)
    for_normal = survival(low, engine.tables.normal)
    engine.parametric[1] = _share(survival(middle, engine.tables.normal), for_normal)


@inlined
def expect_upper(engine: Engine, low: float, middle: float, high: float) -> None:
    """Expect a number over the middle, knowing that it is between two bounds."""
    for_laplace = mass(low, high, engine.tables.laplace)
    engine.parametric[0] = _share(mass(middle, high, engine.tables.laplace), for_laplace)
    for_normal = mass(low, high, engine.tables.normal)
    engine.parametric[1] = _share(mass(middle, high, engine.tables.normal), for_normal)


@inlined
def _share(part: float, whole: float) -> float:
    """Return a share of a probability; one half where there is next to nothing to share."""
    return part / whole if whole > 1e-25 else 0.5
