"""What Laplace and normal distributions of mean magnitude one expect of a decision about a number.

Each function sets both probabilities that a bit is one, ``Mixer.parametric``, from what the distributions hold beyond
bounds.
"""

from __future__ import annotations

from typing import NamedTuple

from kcomplex.machine.compiled import inlined

from .logistic_mixing import Engine


class Bound(NamedTuple):
    """A bound between two numbers.

    Attributes
    ----------
    distance
        How far it is over what is expected of the number, in units of the expected magnitude.
    laplace, normal
        Share of each distribution that is farther away, on the same side.
    """

    distance: float
    laplace: float
    normal: float


@inlined
def bound(engine: Engine, distance: float) -> Bound:
    """Return the bound at a distance."""
    laplace, normal, place = engine.tables.laplace, engine.tables.normal, abs(distance) * 64.0
    if place >= 4096.0:
        return Bound(distance, 0.0, 0.0)
    index = int(place)
    part = place - index
    return Bound(
        distance,
        laplace[index] + (laplace[index + 1] - laplace[index]) * part,
        normal[index] + (normal[index + 1] - normal[index]) * part,
    )


@inlined
def expect_outside(engine: Engine, low: Bound, high: Bound) -> None:
    """Expect a number outside two bounds."""
    engine.mixer.parametric[0] = 1.0 - _mass(low.distance, low.laplace, high.distance, high.laplace)
    engine.mixer.parametric[1] = 1.0 - _mass(low.distance, low.normal, high.distance, high.normal)


@inlined
def expect_over(engine: Engine, bound: Bound) -> None:
    """Expect a number over a bound."""
    engine.mixer.parametric[0] = _over(bound.distance, bound.laplace)
    engine.mixer.parametric[1] = _over(bound.distance, bound.normal)


@inlined
def expect_side(engine: Engine, toward: Bound, away: Bound) -> None:
    """Expect a number on the one of two sides, knowing that it is farther away than the bound of its side."""
    one, other = _over(toward.distance, toward.laplace), _over(away.distance, away.laplace)
    engine.mixer.parametric[0] = _share(one, one + other)
    one, other = _over(toward.distance, toward.normal), _over(away.distance, away.normal)
    engine.mixer.parametric[1] = _share(one, one + other)


@inlined
def expect_farther(engine: Engine, low: Bound, middle: Bound) -> None:
    """Expect a number over one bound, knowing that it is over a lower one."""
    over = _over(middle.distance, middle.laplace)
    engine.mixer.parametric[0] = _share(over, _over(low.distance, low.laplace))
    over = _over(middle.distance, middle.normal)
    engine.mixer.parametric[1] = _share(over, _over(low.distance, low.normal))


@inlined
def expect_upper(engine: Engine, low: Bound, middle: Bound, high: Bound) -> None:
    """Expect a number over the middle, knowing that it is between two bounds."""
    upper = _mass(middle.distance, middle.laplace, high.distance, high.laplace)
    engine.mixer.parametric[0] = _share(upper, _mass(low.distance, low.laplace, high.distance, high.laplace))
    upper = _mass(middle.distance, middle.normal, high.distance, high.normal)
    engine.mixer.parametric[1] = _share(upper, _mass(low.distance, low.normal, high.distance, high.normal))


@inlined
def _over(distance: float, beyond: float) -> float:
    return beyond if distance >= 0.0 else 1.0 - beyond


@inlined
def _mass(low: float, beyond_low: float, high: float, beyond_high: float) -> float:
    """Return the share between two bounds, from the tail where it keeps its digits."""
    if low < 0.0 and high <= 0.0:
        return beyond_high - beyond_low
    return _over(low, beyond_low) - _over(high, beyond_high)


@inlined
def _share(part: float, whole: float) -> float:
    """Return a share of a probability; one half where there is next to nothing to share."""
    return part / whole if whole > 1e-25 else 0.5
