"""Specification strings: ``name:key=value,key=value``, stages joined by ``|``.

One grammar serves estimators and modes, in Python, on the command line, in configurations and in the run store.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from kcomplex.errors import SpecError
from kcomplex.registry import registry

_MOST_STAGES = 16


def build(group: str, spec: str) -> Any:
    """Return the configured object that a one-stage specification names.

    Parameters
    ----------
    group
        Entry-point group that the name is looked up in.
    spec
        ``name`` or ``name:key=value,...``; the keys are the fields of the named dataclass.

    Raises
    ------
    SpecError
        An unknown key, a value of the wrong type, or a value that the class refuses.
    UnknownNameError, PluginError
        The name isn't known, or its plug-in can't be loaded.
    """
    return configure(registry(group).load, spec)


def configure(load: Callable[[str], Any], spec: str) -> Any:
    """Return the configured object of a one-stage specification whose class ``load`` finds by name; see `build`."""
    name, colon, options = spec.strip().partition(":")
    if colon and not options.strip():
        raise SpecError(f"{spec!r} ends after the colon: write {name!r}, or {name}:key=value")
    cls = load(name.strip())
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise SpecError(f"{name!r} names {cls!r}, which isn't a dataclass and so can't be configured")
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    for option in options.split(",") if options else ():
        key, equals, text = (part.strip() for part in option.partition("="))
        if not equals:
            raise SpecError(f"{option!r} in {spec!r} isn't of the form key=value")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = f"It knows: {', '.join(fields)}" if fields else "It has no options"
            raise SpecError(f"{name!r} has no option {key!r} (in {spec!r}).{hint} {known}")
        if key in values:
            raise SpecError(f"{key!r} is given twice in {spec!r}")
        values[key] = _value(text, fields[key], where=f"{key}={text} in {spec!r}")
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{error} (in {spec!r})") from None
    except TypeError as error:
        raise SpecError(f"{spec!r} can't be built: {error}") from error


def spec_of(stage: Any) -> str:
    """Return the specification string of a configured stage: its name and the fields that differ from their default.

    ``build(group, spec_of(stage)) == stage`` for every stage.
    """
    options = []
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init and value != default:
            options.append(f"{field.name}={_text(value)}")
    return f"{stage.name}:{','.join(options)}" if options else str(stage.name)


def full_spec_of(stage: Any) -> str:
    """Return the specification string of a configured stage with every field, whatever the defaults of its version."""
    options = [f"{field.name}={_text(getattr(stage, field.name))}" for field in dataclasses.fields(stage) if field.init]
    return f"{stage.name}:{','.join(options)}" if options else str(stage.name)


def split_stages(spec: str) -> list[str]:
    """Return the stages of a specification in order.

    Raises
    ------
    SpecError
        A stage is empty, or there are too many.
    """
    stages = [stage.strip() for stage in spec.split("|")]
    if len(stages) > _MOST_STAGES:
        raise SpecError(f"a specification of {len(stages)} stages: {_MOST_STAGES} are the most that make sense")
    if not all(stages):
        raise SpecError(f"{spec!r} has an empty stage: write for example 'zstd' or 'palette|entropy'")
    return stages


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(text: str, hint: Any, where: str) -> Any:
    """Return ``text`` as the type that a field asks for."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    if text == "None" and type(None) in options:
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is str:
            return text
        if typing.get_origin(option) is typing.Literal:
            for choice in typing.get_args(option):
                if text == str(choice):
                    return choice
            raise SpecError(f"{where} must be one of {', '.join(map(str, typing.get_args(option)))}")
        if typing.get_origin(option) is tuple:
            return tuple(_value(item, typing.get_args(option)[0], where) for item in text.split("+") if item)
    names = ["None" if option is type(None) else getattr(option, "__name__", str(option)) for option in options]
    raise SpecError(f"{where} must be of type {' or '.join(names)}")


def refuse_outside(configured: object, **ranges: str) -> None:
    """Raise SpecError where an attribute isn't in its range, such as ``(0, 1]``; None is in every range."""
    for attribute, interval in ranges.items():
        value = getattr(configured, attribute)
        if value is None:
            continue
        least, most = map(float, interval[1:-1].split(","))
        excluded = (value == least and interval[0] == "(") or (value == most and interval[-1] == ")")
        if excluded or not least <= value <= most:
            raise SpecError(f"{_called(configured)}: {attribute} must be in {interval}, not {value}")


def refuse_others(configured: object, **choices: Iterable[str]) -> None:
    """Raise SpecError where an attribute is none of its choices."""
    for attribute, known in choices.items():
        value = getattr(configured, attribute)
        if value not in known:
            raise SpecError(f"{_called(configured)}: {attribute} must be one of {', '.join(known)}, not {value!r}")


def _called(configured: object) -> str:
    name: str = getattr(configured, "name", type(configured).__name__)
    return name
