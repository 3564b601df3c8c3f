"""Plug-ins by name: read once from the installed entry points, loaded on first use."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kcomplex.errors import PluginError, UnknownNameError

GROUPS = {
    "kcomplex.estimators": "estimator",
    "kcomplex.modes": "mode",
    "kcomplex.formats": "format",
    "kcomplex.analyses": "analysis",
    "kcomplex.commands": "command",
}


class Registry:
    """The plug-ins of one entry-point group.

    Parameters
    ----------
    group
        Name of the entry-point group, one of ``GROUPS``.

    Notes
    -----
    Built-ins and third-party plug-ins come the same way. Two packages that claim the same name make that name
    unusable (`PluginError`), because the answer would depend on the order of installation.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self.noun = GROUPS[group]
        self._claims: dict[str, list[EntryPoint]] = {}
        for claim in entry_points(group=group):
            rivals = self._claims.setdefault(claim.name, [])
            if all((claim.value, _distribution(claim)) != (rival.value, _distribution(rival)) for rival in rivals):
                rivals.append(claim)

    def names(self) -> tuple[str, ...]:
        """Return every known name, sorted, whether or not its plug-in can be loaded."""
        return tuple(sorted(self._claims))

    def load(self, name: str) -> Any:
        """Return the object behind a name.

        Raises
        ------
        UnknownNameError
            No plug-in has this name; the message lists the known ones.
        PluginError
            Two packages claim the name, or importing the plug-in fails; the import's own error is the cause.
        """
        claims = self._claims.get(name)
        if claims is None:
            raise UnknownNameError(self._unknown(name))
        if len(claims) > 1:
            packages = " and ".join(sorted(f"{_distribution(claim)} ({claim.value})" for claim in claims))
            raise PluginError(f"the {self.noun} {name!r} is claimed by {packages}: uninstall one of them")
        claim = claims[0]
        try:
            return claim.load()
        except Exception as error:
            raise PluginError(
                f"the {self.noun} {name!r} of {_distribution(claim)} ({claim.value}) can't be loaded: "
                f"{type(error).__name__}: {error}.{_remedy(claim, error)}"
            ) from error

    def _unknown(self, name: str) -> str:
        if not self._claims:
            return f"no {self.noun} is known, because kcomplex isn't installed here: run pip install -e . in its folder"
        close = difflib.get_close_matches(name, self._claims, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"no {self.noun} is called {name!r}.{hint} Known: {', '.join(self.names())}"


@cache
def registry(group: str) -> Registry:
    """Return the registry of an entry-point group; the entry points are read once a process."""
    return Registry(group)


def _distribution(claim: EntryPoint) -> str:
    return claim.dist.name if claim.dist is not None else "an unknown package"


def _remedy(claim: EntryPoint, error: Exception) -> str:
    if claim.extras:
        return f" Install what it needs: pip install '{_distribution(claim)}[{','.join(claim.extras)}]'"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f" Install what it needs: pip install {error.name.partition('.')[0]}"
    return ""
