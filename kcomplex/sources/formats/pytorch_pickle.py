"""What the pickle of a torch checkpoint says: storages, tensors that view them, and the containers that they are in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from kcomplex.sources.formats.guard import Refused, brief, check_shape
from kcomplex.sources.formats.plain_pickle import Call, ForbiddenName, Name, read_plain_pickle
from kcomplex.sources.networks import Tree
from kcomplex.weights import dtype_name

# A storage's class fixes the width of its elements. Newer dtypes live in untyped storages: bytes.
_STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}
_STORAGES = {
    f"{module}.{kind}Storage": dtype
    for module in ("torch", "torch.cuda", "torch.storage")
    for kind, dtype in _STORAGE_DTYPES.items()
}
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# Calls that build arrays of NumPy; what they set on one begins with a version and the shape.
_ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
# Calls that build tensors which can't be measured, and what to say about them.
_OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_qtensor": "quantised tensor of torch.ao whose integers are packed",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensor: it has no data",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensor of a device without storages",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensor of a device without storages",
    "torch._utils._rebuild_wrapper_subclass": "tensor of a class that packs its weights: not measured",
    "torch.ScriptObject": "its weights are packed, and not measured",
    **dict.fromkeys(_ARRAYS, "array of NumPy in a pickle: save it as a tensor, or with numpy.savez"),
}
_PACKED = {"torch._utils._rebuild_qtensor", "torch._utils._rebuild_wrapper_subclass", "torch.ScriptObject"}
_TENSORS = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
# Calls whose first argument is the tensor.
_WRAPPERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_QUANTISED = "torch._utils._rebuild_qtensor"
# Quantised storages with one integer an element.
_QUANTISED_STORAGES = {"torch.QInt8Storage", "torch.QUInt8Storage", "torch.QInt32Storage"}
# Where a call that builds a tensor says its shape.
_SHAPES = {
    **dict.fromkeys(_TENSORS, 2),
    _QUANTISED: 2,
    "torch._utils._rebuild_wrapper_subclass": 2,
    "torch._utils._rebuild_meta_tensor_no_storage": 1,
}
_WRAPPED_AT_MOST = 4
_ARGUMENTS_AT_MOST = 16
_DIMENSIONS_AT_MOST = 64
# Integers beyond are nobody's sizes, and may have millions of digits.
_LARGEST = 2**63
_LONGEST_KIND = 60
# What the classes of TorchScript's modules are called, and what every other module has.
_SCRIPTED = "__torch__."
_MODULE = {"_parameters", "_buffers", "_modules"}


@dataclass(frozen=True)
class Storage:
    """A storage that the pickle refers to: its key, its class, and the number of elements that it claims."""

    key: str
    kind: str
    elements: int

    @property
    def dtype(self) -> torch.dtype:
        """Of one element."""
        return _STORAGES[self.kind]

    @property
    def nbytes(self) -> int:
        """Claimed size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A strided view into a storage; offset and strides count elements of the dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool
    negated: bool

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Number of elements of the storage from the first that the view touches to its last, both included."""
        if not self.elements:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the storage as in the tensor, one behind the other."""
        if self.conjugated or self.negated:
            return False
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def read_pickle(stream: IO[bytes], folder: str = "") -> tuple[Any, dict[str, Storage]]:
    """Return what the next pickle of a checkpoint describes, and the storages that it refers to by their keys.

    The keys begin with the folder in which the storages are.

    Raises
    ------
    Refused
        It would reach the system, or contradicts itself.
    """
    storages: dict[str, Storage] = {}

    def resolve(identity: Any) -> Storage | Name:
        storage = _storage(identity, folder)
        if isinstance(storage, Name):
            return storage
        if storages.setdefault(storage.key, storage) != storage:
            raise Refused(f"the pickle claims two sizes of the storage {storage.key!r:.100}")
        return storage

    try:
        return read_plain_pickle(stream, resolve), storages
    except ForbiddenName as error:
        raise Refused(
            f"refused, because loading it would run code: its pickle asks for {error.path!r:.100}, which no weights "
            "need. Nothing of it was run. If you trust where it comes from, save its state dict as safetensors there "
            "and measure that"
        ) from None
    except (LookupError, TypeError, ValueError) as error:
        raise Refused(f"its pickle is truncated or corrupted: {type(error).__name__}: {error}") from error


class PickledTree(Tree):
    """The nested parts of a checkpoint, as its pickle describes them.

    A pickled module is looked at as its state dict would be; of any other object, what holds tensors is a part of it. A
    quantised tensor of torch.ao is looked at as its integers, scales and zero points.
    """

    def parts(self, value: Any) -> Mapping[Any, Any] | None:
        """Return what a container holds, by its keys; None for anything else."""
        if isinstance(value, dict):
            return value
        if isinstance(value, (list, tuple)):
            return dict(enumerate(value))
        if not isinstance(value, Call):
            return None
        if _is_tensor(value):
            return _integers(_unwrapped(value))
        if value.items is not None:
            return self.parts(value.items)
        if isinstance(value.state, dict) and value.state.keys() >= _MODULE:
            return _registered(value.state)
        attributes = self.parts(value.state) if isinstance(value.state, (dict, tuple)) else None
        inside = {**(attributes or {}), **dict(enumerate(value.arguments[:_ARGUMENTS_AT_MOST]))}
        return {key: part for key, part in inside.items() if self.size(part).tensors} or None

    def shape(self, value: Any) -> tuple[int, ...] | None:
        """Return the shape of a tensor, () where it isn't known; None for anything else."""
        if not _is_tensor(value):
            return None
        call = _unwrapped(value)
        if _integers(call) is not None:
            return None
        if call.function in _ARRAYS:
            shape = call.state[1] if isinstance(call.state, tuple) and len(call.state) > 1 else ()
            return shape if _are_sizes(shape) else ()
        place = _SHAPES.get(call.function, len(call.arguments))
        shape = call.arguments[place] if place < len(call.arguments) else ()
        return shape if _are_sizes(shape) else ()

    def is_tensor(self, value: Any) -> bool:
        """Return whether a value is one tensor, even one that is looked at as its parts."""
        return _is_tensor(value)

    def is_module(self, value: Any) -> bool:
        """Return whether a value is a pickled module, or one of TorchScript."""
        if not isinstance(value, Call) or not isinstance(value.state, dict):
            return False
        return value.function.startswith(_SCRIPTED) or value.state.keys() >= _MODULE

    def kind(self, value: Any) -> str:
        """Return the dtype of a tensor, or what else a value is."""
        match value:
            case Call() if _is_tensor(value):
                match _unwrapped(value):
                    case Call(function, (Storage() as storage, *_)) if not function.endswith("_v3"):
                        return dtype_name(storage.dtype)
                return ""
            case Call(path) | Name(path):
                # Whatever the file says may be sent to a terminal.
                return path[:_LONGEST_KIND] if path.isprintable() else repr(path[:_LONGEST_KIND])
        return type(value).__name__


def script_module(program: Any, constants: Any) -> Any:
    """Return a TorchScript module that has the tensors among its constants too: freezing a module moves them there."""
    if not isinstance(program, Call) or not isinstance(program.state, dict):
        raise Refused("a TorchScript archive that holds no module")
    return Call(program.function, (), {**program.state, "CONSTANTS": constants})


def stored_tensor(value: Any) -> StoredTensor | str:
    """Return the tensor that a value of the pickle stands for, or why there is none that can be measured.

    Raises
    ------
    Refused
        The tensor's description makes no sense.
    """
    call = _unwrapped(value)
    if call.function in _TENSORS:
        return _strided(call.function, call.arguments)
    if call.function not in _OTHER_TENSORS:
        raise Refused("the pickle is corrupted: a tensor's description makes no sense")
    return _OTHER_TENSORS[call.function]


def is_packed(value: Any) -> bool:
    """Return whether a tensor's weights are packed in a way that isn't read."""
    return _unwrapped(value).function in _PACKED


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Call) and (
        value.function in _TENSORS
        or value.function in _OTHER_TENSORS
        or value.function in _WRAPPERS
        or value.function == _OF_TYPE
    )


def _unwrapped(value: Call) -> Call:
    """Return the call that builds a tensor, from inside of those that make a parameter or another class of it."""
    for _ in range(_WRAPPED_AT_MOST):
        match value:
            case Call(function, (Call() as data, *_)) if function in _WRAPPERS:
                value = data
            case Call(function, (Name(inner), Name(), tuple(arguments), *_)) if function == _OF_TYPE:
                value = Call(inner, arguments)
            case _:
                break
    return value


def _integers(call: Call) -> dict[str, Any] | None:
    """Return integers, scales and zero points of a quantised tensor that keeps one integer an element; else None."""
    match call:
        case Call(function, (Storage() as storage, offset, shape, strides, tuple(scheme), *_)) if (
            function == _QUANTISED and storage.kind in _QUANTISED_STORAGES and len(scheme) in (3, 4)
        ):
            integers = Call("torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, False, {}))
            return {"int_repr": integers, "scale": scheme[1], "zero_point": scheme[2]}
    return None


def _registered(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries that a module's state dict would have, from the module's attributes."""
    temporary = state.get("_non_persistent_buffers_set")
    left_out = set(filter(_is_text, temporary)) if isinstance(temporary, list) else set()
    found: dict[Any, Any] = {}
    for place in ("_parameters", "_buffers", "_modules"):
        if isinstance(state[place], dict):
            found |= {key: part for key, part in state[place].items() if part is not None and key not in left_out}
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_sizes(shape: Any) -> bool:
    return (
        isinstance(shape, tuple)
        and len(shape) <= _DIMENSIONS_AT_MOST
        and all(type(size) is int and 0 <= size < _LARGEST for size in shape)
    )


def _storage(identity: Any, folder: str) -> Storage | Name:
    if not isinstance(identity, tuple) or len(identity) > _ARGUMENTS_AT_MOST:
        raise Refused("the pickle is corrupted: a reference doesn't name a storage")
    match identity:
        case ("storage", Name(path), str(key), str() | bytes(), int(elements), *view) if (
            path in _STORAGES and 0 <= elements < _LARGEST and view in ([], [None])
        ):
            return Storage(folder + key, path, elements)
        case ("storage", _, _, _, _, tuple()):
            raise Refused("views of storages, as torch before 0.4 saved them, aren't supported")
        # The legacy format adds a module's source text to its class.
        case ("module", Name() as name, *_):
            return name
    raise Refused("the pickle is corrupted: a reference doesn't name a storage")


def _strided(function: str, arguments: tuple[Any, ...]) -> StoredTensor:
    if not _TENSORS[function] <= len(arguments) <= _ARGUMENTS_AT_MOST:
        raise Refused("the pickle is corrupted: a tensor's description makes no sense")
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest) if len(shape) == len(strides):
            pass
        case _:
            raise Refused("the pickle is corrupted: a tensor's description makes no sense")
    if len(shape) <= _DIMENSIONS_AT_MOST and not all(
        type(number) is int and abs(number) < _LARGEST for number in (offset, *shape, *strides)
    ):
        raise Refused("the pickle is corrupted: a tensor's shape, strides or offset make no sense")
    check_shape(shape)
    if offset < 0 or any(stride < 0 for stride in strides):
        raise Refused(f"offset {offset} and strides {brief(str(strides))} reach outside of the storage")
    dtype: torch.dtype | None = storage.dtype
    # After the strides: requires_grad, hooks, in version 3 the dtype, and views (conjugate, negative).
    if function.endswith("_v3"):
        stated = rest.pop(2)
        dtype = _DTYPES.get(stated.path) if isinstance(stated, Name) else None
    if dtype is None:
        raise Refused("the pickle is corrupted: a tensor's dtype makes no sense")
    views = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    return StoredTensor(storage, dtype, offset, shape, strides, bool(views.get("conj")), bool(views.get("neg")))
