"""Pickles as plain data: what a pickle says is read, and nothing that it says is done.

A pickle is a program for a stack machine. `read_plain_pickle` runs the part of it that builds containers; where the
program would import or call something, it notes what (`Name`, `Call`) and goes on. No module is imported, no function
is called, and nothing is allocated but what the pickle's own bytes describe.

Python's arithmetic and comparisons on what a pickle nests can take exponential time, for the same part may be nested
many times: nothing here hashes, compares or prints anything but plain text and numbers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from kcomplex.sources.formats.guard import Refused


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A module's attribute that the pickle refers to, as ``module.attribute``."""

    path: str


@dataclass(eq=False, repr=False, slots=True)
class Call:
    """A call that the pickle would make: what is called, and its arguments.

    Attributes
    ----------
    function, arguments
        What is called (``module.attribute``), and with what.
    state
        What the pickle would set on the result: the attributes of most objects, as a dictionary.
    items
        What the pickle would put into the result: a dictionary or a list, of whichever class.
    """

    function: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] | list[Any] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A dictionary's key that isn't a plain value; hashing what a pickle nests can take for ever."""

    kind: str

    def __str__(self) -> str:
        return f"<{self.kind}>"


class ForbiddenName(Refused):
    """The pickle asks for something that only an attack needs."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


# What reaches the system, and no object beside weights needs. Nothing is called either way, but whoever loads such a
# file with another program should know.
_RUNS_CODE = {
    *("os", "posix", "nt", "subprocess", "sys", "pty", "runpy", "importlib", "ctypes", "socket", "shutil", "io"),
    *("_io", "code", "timeit", "webbrowser", "commands", "pip", "multiprocessing"),
}
_RUNNING_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "breakpoint", "input"}
# Buffers of bytes, which some modules put into their state.
_PLAIN_NAMES = {"io.BytesIO", "_io.BytesIO", "io.StringIO", "_io.StringIO"}
# An instruction takes a microsecond or two and up to a hundred bytes of memory.
_MAX_INSTRUCTIONS = 5_000_000
# Whole numbers of more bits can be chosen so that all of them hash alike.
_KEY_BITS = 60
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}


def read_plain_pickle(stream: IO[bytes], resolve: Callable[[Any], Any]) -> Any:
    """Return what the next pickle of a stream describes.

    Parameters
    ----------
    stream
        Stands behind the pickle afterwards.
    resolve
        Returns what a persistent id, a reference to something outside of the pickle, stands for.

    Returns
    -------
    object
        Numbers, strings, None, lists, dictionaries, tuples and sets (as lists) as they are; an OrderedDict as a
        dictionary; everything else as `Name` or `Call`. What is nested may be nested several times, or in itself.

    Raises
    ------
    ForbiddenName
        The pickle asks for a name that reaches the system.
    Refused
        It uses an instruction that plain data doesn't need, or too many of them, or sets a key twice.
    Exception
        It is truncated or corrupted (ValueError, IndexError, TypeError and others; see `guarded`).
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _MAX_INSTRUCTIONS:
            raise Refused(f"its pickle has more than {_MAX_INSTRUCTIONS:,} instructions, which no weights need")
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
                _list_of(stack[-1]).append(item)
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, marks.pop()
                _list_of(stack[-1]).extend(items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _set_items(stack[-1], items)
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(_name(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_name(_expect(module, str), _expect(attribute, str)))
            case "INST":
                module, _, attribute = argument.partition(" ")
                items, stack = stack, marks.pop()
                stack.append(Call(_name(module, attribute).path, tuple(items)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, _expect(arguments, tuple)))
            case "NEWOBJ_EX":
                keywords, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(_call(function, (arguments, keywords)))
            case "BUILD":
                state = stack.pop()
                # Attributes of a dictionary are such as the _metadata of a state dict.
                if isinstance(_expect(stack[-1], dict, Call, Name), Call):
                    stack[-1].state = state
            case "POP":
                stack.pop()
            case "POP_MARK":
                stack = marks.pop()
            case "BINPERSID":
                stack.append(resolve(stack.pop()))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "STOP":
                return stack.pop()
            case name:
                raise Refused(f"the pickle uses the instruction {name}, which plain weights don't need")
    raise Refused("the pickle is truncated")


def _name(module: str, attribute: str) -> Name:
    # Pickles of protocol 2 call the builtins by their name in Python 2.
    module = "builtins" if module == "__builtin__" else module
    path = f"{module}.{attribute}"
    if path not in _PLAIN_NAMES and (
        module.partition(".")[0] in _RUNS_CODE or (module == "builtins" and attribute in _RUNNING_BUILTINS)
    ):
        raise ForbiddenName(path)
    return Name(path)


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    path = function.path if isinstance(function, Name) else type(_expect(function, Call)).__name__
    if path in ("builtins.set", "builtins.frozenset") and len(arguments) == 1 and isinstance(arguments[0], list):
        return arguments[0]
    if path != "collections.OrderedDict":
        return Call(path, arguments)
    mapping: dict[Any, Any] = {}
    # Python 2 gives the items here, as a list of pairs. They are moved: a small pickle could have them copied for ever.
    for pairs in arguments:
        _set_items(mapping, [item for pair in _expect(pairs, list) for item in _expect(pair, list, tuple)])
        pairs.clear()
    return mapping


def _list_of(value: Any) -> list[Any]:
    """Return the list that an instruction adds to: a list itself, or the items of an object."""
    if isinstance(value, Call) and value.items is None:
        value.items = []
    found: list[Any] = _expect(value.items if isinstance(value, Call) else value, list)
    return found


def _set_items(mapping: Any, items: list[Any]) -> None:
    """Set items, given as keys and values in turn."""
    if isinstance(mapping, Call) and mapping.items is None:
        mapping.items = {}
    target = _expect(mapping.items if isinstance(mapping, Call) else mapping, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        plain = key if _is_plain(key) else Key(type(key).__name__)
        if plain in target:
            raise Refused(f"the pickle sets the key {plain!r:.100} twice")
        target[plain] = value


def _is_plain(key: Any) -> bool:
    if isinstance(key, int):
        return key.bit_length() <= _KEY_BITS
    return isinstance(key, (str, bytes, float)) or key is None


def _expect(value: Any, *types: type) -> Any:
    if not isinstance(value, types):
        raise Refused(f"the pickle is corrupted: {type(value).__name__} stands where it doesn't belong")
    return value
