"""NumPy files: order, byte order, laziness, and what is skipped."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.errors import FormatError
from kcomplex.sources.open import open_weights

DTYPES = st.sampled_from(["?", *(f"{order}{kind}" for order in "<>" for kind in ("i2", "u4", "f2", "f4", "f8", "c8"))])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=5))),
    fortran=st.booleans(),
    suffix=st.sampled_from(["npy", "npz", "small.npz"]),
)
def test_any_array(tmp_path: Path, array: Any, fortran: bool, suffix: str) -> None:
    stored = np.asfortranarray(array) if fortran and array.ndim else array
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, stored)
    else:
        (np.savez if suffix == "npz" else np.savez_compressed)(path, tensor=stored)
    with open_weights(path) as weights:
        assert list(weights) == ["tensor"]
        assert weights["tensor"].shape == array.shape
        native = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="))
        read = weights["tensor"].read().numpy()
        assert read.dtype == native.dtype
        assert np.ascontiguousarray(read).tobytes() == native.tobytes()


UNSUPPORTED = {
    "objects": np.array([{}], object),
    "text": np.array(["a"]),
    "raw": np.array([b"a"]),
    "time": np.array(["2020-01-01"], "datetime64[D]"),
    "span": np.array([3], "timedelta64[s]"),
    "long": np.ones(2, np.longdouble),
    "fields": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "fields_with_odd_names": np.zeros(2, [("α", "f4")]),
    "void": np.zeros(2, "V1"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_what_torch_has_no_dtype_for_is_skipped_with_a_reason(tmp_path: Path, name: str) -> None:
    array = UNSUPPORTED[name]
    if name == "long" and array.dtype == np.float64:
        pytest.skip("long doubles are doubles here")
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", odd=array, w=np.ones(3))
    with open_weights(tmp_path / "x.npy") as weights:
        assert len(weights) == 0
        (skipped,) = weights.skipped
    assert skipped.reason.endswith(("isn't supported", "never loaded"))
    assert skipped.shape == array.shape
    with open_weights(tmp_path / "x.npz") as weights:
        assert list(weights) == ["w"]
        assert [(item.name, item.reason) for item in weights.skipped] == [("odd", skipped.reason)]


def test_members_that_are_no_arrays_are_skipped(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.ones(3))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("notes.txt", "none")
    with open_weights(tmp_path / "x.npz") as weights:
        assert list(weights) == ["w"]
        assert [item.name for item in weights.skipped] == ["notes.txt"]


def test_an_empty_npz_has_no_tensors(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    with open_weights(tmp_path / "x.npz") as weights:
        assert len(weights) == 0
        assert weights.skipped == ()


def test_a_bad_checksum_is_reported_when_the_member_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", v=np.zeros(50_000), w=np.ones(50_000))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    place = data.rindex(np.ones(1000).tobytes())
    data[place] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with open_weights(tmp_path / "x.npz") as weights:
        assert weights["v"].values().sum() == 0
        with pytest.raises(FormatError, match=r"x\.npz: tensor 'w': can't be read: Bad CRC-32"):
            weights["w"].read()


def test_a_sparse_array_opens_without_reading(tmp_path: Path, hostile_module: ModuleType) -> None:
    path = tmp_path / "x.npy"
    size = 2**29
    with path.open("wb") as file:
        header = repr(hostile_module.array_header((size,)))
        file.write(hostile_module.npy(header + " " * (117 - len(header))))
        start = file.tell()
        assert start == 128
        file.seek(start + 4 * size - 4)
        file.write(struct.pack("<f", 7))
    with open_weights(path) as weights:
        assert weights.nbytes == 2**31
        # Reading maps the file; only the page that is looked at comes from the disk.
        assert weights["tensor"].read()[-1] == 7


def test_arrays_at_odd_addresses(tmp_path: Path, hostile_module: ModuleType) -> None:
    values = np.arange(20_000, dtype=np.float64)
    header = repr(hostile_module.array_header(values.shape, "<f8"))
    for padding in range(8):
        data = hostile_module.npy(header + " " * padding, values.tobytes())
        (tmp_path / "x.npy").write_bytes(data)
        with open_weights(tmp_path / "x.npy") as weights:
            tensor = weights["tensor"].read()
            assert tensor.data_ptr() % 8 == 0
            assert torch.equal(tensor, torch.from_numpy(values))


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_two_nameless_bytes_are_bfloat16(tmp_path: Path, fortran: bool, suffix: str) -> None:
    values = torch.arange(24).reshape(2, 3, 4).bfloat16()
    array = np.asarray(values.view(torch.uint16).numpy(), order="F" if fortran else "C").view("V2")
    if suffix == "npy":
        np.save(tmp_path / "x.npy", array)
    else:
        np.savez(tmp_path / "x.npz", tensor=array)
    with open_weights(tmp_path / f"x.{suffix}") as weights:
        assert torch.equal(weights["tensor"].read(), values)


def test_several_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    for save in (np.savez, np.save):
        with (tmp_path / "x.npz").open("wb") as file:
            save(file, np.ones(3))
            save(file, np.ones(4))
        with pytest.raises(FormatError, match=r"save each to a file of its own|bytes follow the array"):
            open_weights(tmp_path / "x.npz")
