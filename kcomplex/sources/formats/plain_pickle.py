"""Pickles as plain data: what a pickle says is read, and nothing that it says is done.

A pickle is a program for a stack machine. `read_plain_pickle` runs the part of it that builds containers; where the
program would import or call something, it notes what (`Name`, `Call`) and goes on. No module is imported, no function
is called, and nothing is allocated but what the pickle's own bytes describe.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container
from dataclasses import dataclass
from mmap import mmap
from typing import IO, Any

from kcomplex.sources.formats.guard import Refused


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A module's attribute that the pickle refers to, as ``module.attribute``."""

    path: str


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """A call that the pickle would make: what is called, and its arguments."""

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A dictionary's key that isn't a plain value; hashing what a pickle nests can exhaust the stack."""

    kind: str


class ForbiddenName(Refused):
    """The pickle refers to something that isn't allowed."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}


def read_plain_pickle(stream: IO[bytes] | mmap, allowed: Container[str], resolve: Callable[[Any], Any]) -> Any:
    """Return what the next pickle of a stream describes.

    Parameters
    ----------
    stream
        Stands behind the pickle afterwards.
    allowed
        Names (``module.attribute``) that the pickle may refer to.
    resolve
        Returns what a persistent id, a reference to something outside of the pickle, stands for.

    Returns
    -------
    object
        Numbers, strings, None, lists, dictionaries, tuples and sets (as lists) as they are; an OrderedDict as a
        dictionary; everything else as `Name` or `Call`.

    Raises
    ------
    ForbiddenName
        The pickle refers to a name that isn't allowed.
    Refused
        It uses an instruction that plain data doesn't need, or sets a key twice.
    Exception
        It is truncated or corrupted (ValueError, IndexError, TypeError and others; see `guarded`).
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    argument: Any
    # A memory map has all of a file that genops needs: read, readline and tell.
    for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
        match opcode.name:
            case name if name in _LITERALS:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _TUPLES:
                size = _TUPLES[name]
                if len(stack) < size:
                    raise Refused("the pickle is corrupted: its stack runs empty")
                stack[-size:] = [tuple(stack[-size:])]
            case name if name in _IGNORED:
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE" | "FROZENSET":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, marks.pop()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _set_items(stack[-1], items)
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(_name(module, attribute, allowed))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_name(_expect(module, str), _expect(attribute, str), allowed))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(_expect(function, Name).path, _expect(arguments, tuple)))
            case "BUILD":
                # Attributes that are set on an object, such as the _metadata of a state dict.
                stack.pop()
                _expect(stack[-1], dict, Call)
            case "BINPERSID":
                stack.append(resolve(stack.pop()))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "STOP":
                return stack.pop()
            case name:
                raise Refused(f"the pickle uses the instruction {name}, which plain weights don't need")
    raise Refused("the pickle is truncated")


def _name(module: str, attribute: str, allowed: Container[str]) -> Name:
    # Pickles of protocol 2 call the builtins by their name in Python 2.
    path = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
    if path not in allowed:
        raise ForbiddenName(path)
    return Name(path)


def _call(function: str, arguments: tuple[Any, ...]) -> Any:
    if function != "collections.OrderedDict":
        return Call(function, arguments)
    mapping: dict[Any, Any] = {}
    # Python 2 gives the items here, as a list of pairs. They are moved: a small pickle could have them copied for ever.
    for pairs in arguments:
        _set_items(mapping, [item for pair in _expect(pairs, list) for item in _expect(pair, list, tuple)])
        pairs.clear()
    return mapping


def _set_items(mapping: Any, items: list[Any]) -> None:
    """Set items, given as keys and values in turn."""
    target = _expect(mapping, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        plain = key if isinstance(key, (str, bytes, int, float)) or key is None else Key(type(key).__name__)
        if plain in target:
            raise Refused(f"the pickle sets the key {plain!r} twice")
        target[plain] = value


def _expect(value: Any, *types: type) -> Any:
    if not isinstance(value, types):
        raise Refused(f"the pickle is corrupted: {type(value).__name__} stands where it doesn't belong")
    return value
