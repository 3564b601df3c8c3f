"""Compiled functions are kept for later processes, as long as what they are made from stays the same."""

import importlib
import logging
import pathlib
import sys

import numpy as np
import pytest

from kcomplex.machine import compiled

CALLED = """
from kcomplex.machine.compiled import inlined
@inlined
def called_part(value):
    return value + {}
"""
CALLER = """
from kcomplex.machine.compiled import compiled_in_place
from called_file import called_part
@compiled_in_place
def whole(record, values):
    for place in range(values.size):
        record.total += called_part(values[place])
"""


@pytest.fixture
def total(tmp_path, monkeypatch):
    """Return what a function counts whose part is in another file; both are imported as a new process would."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "caller_file.py").write_text(CALLER)

    def counted(added: int) -> tuple[int, bool]:
        (tmp_path / "called_file.py").write_text(CALLED.format(added))
        for name in ("caller_file", "called_file"):
            sys.modules.pop(name, None)
        compiled._digest.cache_clear()
        importlib.invalidate_caches()
        whole = importlib.import_module("caller_file").whole
        record = compiled.record(total=0, unused=np.zeros(3))
        whole(record, np.arange(4))
        return int(record.total), bool(whole.stats.cache_hits)

    yield counted
    for name in ("caller_file", "called_file"):
        sys.modules.pop(name, None)


def test_what_was_compiled_is_kept_until_a_file_that_it_is_made_from_changes(total):
    assert total(10) == (46, False)
    assert total(10) == (46, True)
    assert total(20) == (86, False)


def test_signatures_compiled_at_the_same_time_are_not_mixed_up(total, tmp_path):
    """Each process has looked what there is before the other has kept anything."""
    total(10)
    cache = importlib.import_module("caller_file").whole._cache._cache_file
    others = [type(cache)(cache._cache_path, "both", ["stamp"]) for _ in range(2)]
    for key, other in zip(("int32", "float64"), others, strict=True):
        assert other.load(key) is None
    for key, other in zip(("int32", "float64"), others, strict=True):
        other.save(key, f"for {key}")
    assert [others[0].load(key) for key in ("int32", "float64")] == ["for int32", "for float64"]
    type(cache)(cache._cache_path, "both", ["newer"]).save("int32", "anew")
    assert others[0].load("int32") is None


def test_compiling_is_told_once(total, caplog):
    caplog.set_level(logging.INFO, logger="kcomplex")
    compiled._tell_once.cache_clear()
    total(10)
    total(20)
    assert [record.getMessage() for record in caplog.records] == [
        "compiling numerical kernels (once; kept for later runs)"
    ]


def test_a_record_holds_numbers_and_arrays():
    record = compiled.record(count=3, table=np.arange(6).reshape(2, 3), share=0.5)
    assert (record.count, record.share) == (3, 0.5)
    assert np.array_equal(record.table, [[0, 1, 2], [3, 4, 5]])
    record.table[1, 2] = 9
    assert record.table[1].tolist() == [3, 4, 9]


def test_what_is_kept_in_half_is_compiled_anew(total):
    total(10)
    cache = importlib.import_module("caller_file").whole._cache._cache_file
    for file in pathlib.Path(cache._cache_path).glob(f"{cache._prefix}*"):
        file.write_bytes(b"")
    assert total(10) == (46, False)
