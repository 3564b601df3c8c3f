"""What the pickle of a torch checkpoint says: storages, tensors that view them, and where its state dict is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from mmap import mmap
from typing import IO, Any

import torch

from kcomplex.sources.formats.guard import Refused, check_shape
from kcomplex.sources.formats.plain_pickle import Call, ForbiddenName, Key, Name, read_plain_pickle
from kcomplex.weights import SkippedTensor

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
# Calls that build tensors which can't be measured, and what to say about them.
_OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_qtensor": "quantised tensor of torch.ao",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensor: it has no data",
    "torch._utils._rebuild_wrapper_subclass": "tensor of another class",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensor of a device without storages",
}
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
}
# What torch.load(weights_only=True) allows by default, as far as torch.save writes it.
_ALLOWED = {
    *_STORAGES,
    *_DTYPES,
    *_OTHER_TENSORS,
    *_TENSORS,
    *_WRAPPERS,
    "torch._tensor._rebuild_from_type_v2",
    "torch.Tensor",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
}
_TENSOR_CALLS = {*_TENSORS, *_OTHER_TENSORS, *_WRAPPERS, "torch._tensor._rebuild_from_type_v2"}
_STATE_DICTS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Storage:
    """A storage that the pickle refers to: its key, and the size that it claims."""

    key: str
    dtype: torch.dtype
    elements: int

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


def read_pickle(stream: IO[bytes] | mmap) -> tuple[Any, dict[str, Storage]]:
    """Return what the next pickle of a checkpoint describes, and the storages that it refers to by their keys.

    Raises
    ------
    Refused
        It would import something that plain weights don't need, or contradicts itself.
    """
    storages: dict[str, Storage] = {}

    def resolve(identity: Any) -> Storage:
        storage = _storage(identity)
        if storages.setdefault(storage.key, storage) != storage:
            raise Refused(f"the pickle claims two sizes of the storage {storage.key!r:.100}")
        return storage

    try:
        return read_plain_pickle(stream, _ALLOWED, resolve), storages
    except ForbiddenName as error:
        raise Refused(
            f"refused, because it isn't plain weights (as torch.load demands with weights_only=True): its pickle asks "
            f"for {error.path!r:.200}, which could run code. Nothing of it was run. If you trust where it comes from, "
            "save its state dict as safetensors there and measure that"
        ) from None
    except (LookupError, TypeError, ValueError) as error:
        raise Refused(f"its pickle is truncated or corrupted: {type(error).__name__}: {error}") from error


def stored_tensor(value: Any) -> StoredTensor | str:
    """Return the tensor that a value of the pickle stands for, or why there is none that can be measured.

    Raises
    ------
    Refused
        The tensor's description makes no sense.
    """
    match value:
        case Call(function, (data, *_)) if function in _WRAPPERS:
            return stored_tensor(data)
        case Call("torch._tensor._rebuild_from_type_v2", (Name(function), Name(), tuple(arguments), *_)):
            return stored_tensor(Call(function, arguments))
        case Call(function, arguments) if function in _TENSORS:
            return _strided(function, arguments)
        case Call(function, _):
            return _OTHER_TENSORS.get(function, f"not a tensor but {function}")
        case Name(path):
            return f"not a tensor but {path}"
    return f"not a tensor but {type(value).__name__}"


def find_state_dict(value: Any) -> tuple[dict[str, Any], list[SkippedTensor]]:
    """Return the state dict of a checkpoint, and what is beside it.

    Parameters
    ----------
    value
        What the pickle describes: a state dict, a dictionary that holds one under a usual name (``state_dict``,
        ``model_state_dict``, ``model``), a tensor (then called ``tensor``) or a list of tensors (``0``, ``1`` ...).

    Raises
    ------
    Refused
        There is none, or a name isn't valid Unicode.
    """
    if isinstance(value, (list, tuple)):
        value = {str(position): item for position, item in enumerate(value)}
    elif not isinstance(value, dict):
        value = {"tensor": value}
    entries = {_text(key): item for key, item in value.items()}
    if len(entries) < len(value):
        raise Refused("two entries have one name")
    for name in _STATE_DICTS:
        inner = entries.get(name)
        if isinstance(inner, dict) and (not inner or any(_is_tensor(item) for item in inner.values())):
            beside = [
                SkippedTensor(other, f"beside the state dict {name!r}: {_kind(item)}")
                for other, item in entries.items()
                if other != name
            ]
            found = {_text(key): item for key, item in inner.items()}
            if len(found) < len(inner):
                raise Refused(f"two entries of {name!r} have one name")
            return found, beside
    if entries and not any(_is_tensor(item) for item in entries.values()):
        listed = ", ".join(f"{name!r:.50} ({_kind(item)})" for name, item in list(entries.items())[:8])
        raise Refused(
            f"no state dict was found. It is expected at the top or under {', '.join(_STATE_DICTS)}; there are {listed}"
        )
    return entries, []


def _storage(identity: Any) -> Storage:
    match identity:
        case ("storage", Name(path), str(key), str() | bytes(), int(elements), *view) if (
            path in _STORAGES and elements >= 0 and view in ([], [None])
        ):
            return Storage(key, _STORAGES[path], elements)
        case ("storage", _, _, _, _, tuple()):
            raise Refused("views of storages, as torch before 0.4 saved them, aren't supported")
    raise Refused("the pickle is corrupted: a reference doesn't name a storage")


def _strided(function: str, arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest) if (
            len(arguments) >= _TENSORS[function]
            and len(shape) == len(strides)
            and all(type(number) is int for number in (*shape, *strides))
        ):
            pass
        case _:
            raise Refused("the pickle is corrupted: a tensor's description makes no sense")
    check_shape(shape)
    if offset < 0 or any(stride < 0 for stride in strides):
        raise Refused(f"offset {offset} and strides {strides} reach outside of the storage")
    dtype: torch.dtype | None = storage.dtype
    # After the strides: requires_grad, hooks, in version 3 the dtype, and views (conjugate, negative).
    if function.endswith("_v3"):
        stated = rest.pop(2)
        dtype = _DTYPES.get(stated.path) if isinstance(stated, Name) else None
    if dtype is None:
        raise Refused("the pickle is corrupted: a tensor's dtype makes no sense")
    views = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    return StoredTensor(storage, dtype, offset, shape, strides, bool(views.get("conj")), bool(views.get("neg")))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Call) and value.function in _TENSOR_CALLS


def _kind(value: Any) -> str:
    match value:
        case Call(function, _):
            return function
        case Name(path):
            return path
    return type(value).__name__


def _text(key: Any) -> str:
    if isinstance(key, Key):
        return f"<{key.kind}>"
    name = str(key)
    # Pickles write surrogates as they are, and a name with one can be neither printed nor stored.
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise Refused(f"the name {name!r:.100} isn't valid Unicode: rename it")
    return name
