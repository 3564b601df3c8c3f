"""``kcomplex estimators``: what can stand in a specification."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from kcomplex.cli.output import output_format, write_frame


def estimators(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="as CSV (the default when piped)")] = False,
) -> None:
    """List the estimators and stages with their kinds and options, and why a plug-in can't be loaded."""
    import pandas as pd

    output = output_format(as_json, as_csv)
    from kcomplex.errors import PluginError, SpecError
    from kcomplex.registry import registry

    known = registry("kcomplex.estimators")
    rows = []
    for name in known.names():
        try:
            cls = known.load(name)
        except PluginError as error:
            rows.append({"name": name, "kind": "broken", "options": "", "what": str(error)})
            continue
        try:
            kind = stage_kind(cls)
        except SpecError as error:
            rows.append({"name": name, "kind": "broken", "options": "", "what": str(error)})
            continue
        what = (inspect.getdoc(cls) or "").partition("\n")[0]
        rows.append({"name": name, "kind": kind, "options": _options(cls), "what": what})
    write_frame(pd.DataFrame(rows), output)


def stage_kind(cls: Any) -> str:
    """Return ``code``, ``ideal`` or ``proxy`` of coders and estimators, ``transform`` or ``quantiser`` of other stages.

    Raises
    ------
    SpecError
        The class is none of these, or can't be built without options.
    """
    from kcomplex.errors import SpecError
    from kcomplex.estimators.coder import Coder, Quantiser, Transform
    from kcomplex.estimators.estimator import Estimator

    if not (isinstance(cls, type) and issubclass(cls, Coder | Estimator | Transform | Quantiser)):
        raise SpecError(f"{cls!r} is no coder, estimator, transform or quantiser")
    if issubclass(cls, Transform):
        return "transform"
    if issubclass(cls, Quantiser):
        return "quantiser"
    try:
        built = cls()
        return "code" if isinstance(built, Coder) else str(built.kind)
    except TypeError as error:
        raise SpecError(f"{cls.__name__} can't be built without options: {error}") from error


def _options(cls: Any) -> str:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return ", ".join(f"{field.name}={field.default}" for field in fields if field.init)
