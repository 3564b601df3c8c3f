"""Writing files: what is in place of what, when, and what is never written over."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kcomplex as kc
from kcomplex.errors import KComplexError, RefusedStreamError
from kcomplex.machine.files import beside, open_regular, replacing


def write(path: Path, text: str, *sources: object) -> None:
    with replacing(path, *sources) as temporary:
        temporary.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_is_on_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    target = tmp_path / "new" / "target"

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(first: Any, *rest: Any) -> Any:
            what = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else Path(first)
            kind = {target.parent: "folder", tmp_path: "parent"}.get(what, "file")
            if kind == "file":
                assert what.read_text() == "complete"
            order.append(f"{name} {kind}")
            return function(first, *rest)

        return wrapper

    monkeypatch.setattr(os, "fsync", recorded("sync", os.fsync))
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, recorded("rename", getattr(os, name)))
    write(target, "complete")
    assert order[:2] == ["sync file", "rename file"]
    # The folder is new: its own name has to last, too.
    assert sorted(order[2:]) == ["sync folder", "sync parent"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target, deep = tmp_path / "target", tmp_path / "a" / "b" / "target"
    target.write_text("old")
    for path in (target, deep):
        with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012
            temporary.write_text("half")
            raise RuntimeError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_a_folder_that_somebody_else_has_filled_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "a" / "target"):  # noqa: PT012
        (tmp_path / "a" / "other").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path, umask: int) -> None:
    private, shared = tmp_path / "private", tmp_path / "shared"
    for path, mode in ((private, 0o600), (shared, 0o464)):
        path.touch()
        path.chmod(mode)
    before = os.umask(umask)
    try:
        with replacing(private) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) & 0o077 == 0
            temporary.write_text("secret")
        for path in (shared, tmp_path / "new"):
            write(path, "text")
        kc.encode({"w": torch.zeros(9)}, tmp_path / "new.kcz", "raw")
    finally:
        os.umask(before)
    files = ("private", "shared", "new", "new.kcz")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files]
    assert modes == [0o600, 0o464, 0o666 & ~umask, 0o666 & ~umask]


def test_two_that_write_at_the_same_time_have_a_file_each(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replacing(target) as first, replacing(target) as second, beside(first) as third:
        assert len({first, second, third}) == 3
        for path in (first, second, third):
            assert path.name.startswith(".")
            path.write_text(path.name)
    assert target.read_text() == first.name
    assert names(tmp_path) == ["target"]


def test_a_name_that_is_taken_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    planted = tmp_path / ".kcomplex-guessed.partial"
    planted.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KComplexError, match="exists"):
        write(tmp_path / "target", "text")
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "target").exists()


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {"pipe": "pipe", "folder": "folder", "link": "link", "dangling": "link", "loop": "link"}
    kinds = {name: (tmp_path / name).lstat().st_mode for name in cases}
    for name, told in cases.items():
        with pytest.raises(KComplexError, match=f"{name}: a .*{told}.* isn't written over"):
            write(tmp_path / name, "text")
    assert {name: (tmp_path / name).lstat().st_mode for name in cases} == kinds
    assert kept.read_text() == "kept"
    assert not (tmp_path / "nothing").exists()


def test_what_appears_while_it_is_written_is_looked_at_too(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(KComplexError, match="isn't written over"), replacing(target):
        os.mkfifo(target)
    assert stat.S_ISFIFO(target.stat().st_mode)


@pytest.mark.parametrize("path", ["", ".", "..", "/", "a\0b", None, 3, b"bytes", "file/target", "x" * 300])
def test_no_file_can_have_such_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(KComplexError), replacing(path):
        raise AssertionError
    assert names(tmp_path) == ["file"]


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    write(tmp_path / ("x" * 255), "text")
    assert names(tmp_path) == ["x" * 255]


def test_sources_stay_whatever_they_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    shard, deep, other = folder / "shard.safetensors", folder / "deep" / "x.bin", folder / "made.kcz"
    for path in (shard, deep, other):
        path.write_text("weights")
    hard = tmp_path / "hard"
    hard.hardlink_to(shard)
    (tmp_path / "link").symlink_to(folder)
    for target, source in ((shard, folder), (hard, folder), (deep, folder), (shard, shard), (hard, shard)):
        for name in (source, str(source), tmp_path / "link" if source is folder else source):
            with pytest.raises(KComplexError, match="destroy"):
                write(target, "new", "seed:factory=a:b", None, name)
    # Behind a link, as in the cache of a hub.
    (folder / "linked.safetensors").symlink_to(hard)
    with pytest.raises(KComplexError, match="destroy"):
        write(hard, "new", folder)
    for fine in (other, folder / "new"):
        write(fine, "new", folder)
        assert fine.read_text() == "new"
    assert shard.read_text() == deep.read_text() == "weights"


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(KComplexError, match="target: can't be written: No space left"), replacing(tmp_path / "target"):
        Path("/dev/full").write_text("more than there is room for")
    with (
        pytest.raises(KComplexError, match="can't be written: the library's words"),
        replacing(tmp_path / "target", failures=(RuntimeError,)),
    ):
        raise RuntimeError("the library's words")
    assert not names(tmp_path)


def test_threads_that_encode_to_one_path_leave_one_of_their_files(tmp_path: Path) -> None:
    path = tmp_path / "x.kcz"
    sources = [{f"t{i}": torch.full((50, 40 + number), float(i)) for i in range(20)} for number in range(4)]
    threads = [threading.Thread(target=kc.encode, args=(source, path, "zstd")) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kc.verify(path)
    assert names(tmp_path) == ["x.kcz"]


def test_what_is_given_or_read_lazily_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(9)}, path)
    before = path.read_bytes()
    with kc.open_weights(path) as weights:
        for source, given in ((weights, None), ({"w": torch.ones(9)}, weights), ({"w": torch.ones(9)}, path)):
            with pytest.raises(KComplexError, match="destroy"):
                kc.encode(source, path, "raw", given=given)
        with pytest.raises(KComplexError, match="destroy"):
            kc.quantise(weights, path, bits=2)
        spec = f"given:{path}|raw"
        with pytest.raises(KComplexError, match="destroy"):
            kc.encode({"w": torch.ones(9)}, path, spec)
        packed = tmp_path / "packed.pt"
        kc.encode({"w": torch.ones(9)}, packed, "raw", given=weights)
        for output in (path, packed):
            with pytest.raises(KComplexError, match="destroy"):
                kc.decode(packed, output, given=weights)
    assert path.read_bytes() == before


def test_a_pipe_is_refused_where_a_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), Path("a\0b")):
        with pytest.raises(RefusedStreamError):
            open_regular(path)
    with pytest.raises(RefusedStreamError, match="pipe"):
        kc.verify(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_a_killed_process_leaves_is_no_part_of_a_folder(tmp_path: Path, name: str) -> None:
    torch.save({"w": torch.zeros(9)}, tmp_path / "pytorch_model.bin")
    if name.endswith(".safetensors"):
        (tmp_path / "pytorch_model.bin").unlink()
        kc.encode({"w": torch.zeros(9)}, tmp_path / "x.kcz", "raw")
        kc.decode(tmp_path / "x.kcz", tmp_path / name)
    before = kc.describe(tmp_path, "raw")[0].bits
    with beside(tmp_path / name) as partial:
        partial.write_bytes(b"half")
        assert kc.describe(tmp_path, "raw")[0].bits == before


@pytest.mark.parametrize("path", [3, None, b"bytes", [], "a\0b"])
def test_what_is_no_path_is_told_wherever_one_is_taken(path: Any) -> None:
    for call in (kc.verify, kc.load_runs, lambda given: kc.encode({"w": torch.zeros(9)}, given, "raw")):
        with pytest.raises(KComplexError, match="is no path"):
            call(path)
