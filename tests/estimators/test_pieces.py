"""Long tensors in pieces: described as they are encoded, with no more in memory than the pieces in flight."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch

import kcomplex as kc
from kcomplex.errors import WeightsError
from kcomplex.estimators.pieces import handles_of
from kcomplex.measuring.stream import prove
from kcomplex.weights import TensorHandle, Weights

LOSSY = (
    "uniform:bits=4|entropy",
    "uniform:bits=4,per_row=True|zstd",
    "deadzone|entropy",
    "deadzone:zeros=None|zstd",
    "sign|raw",
    "lloyd|entropy",
    "lloyd:shared=True|entropy",
    "grid:step=0.1|context",
    "mosaic:k=5|entropy",
)
LOSSLESS = ("raw", "planes|zstd", "palette|entropy", "mosaic|entropy", "mosaic:s=3|zstd", "best", "lin")
# One scale, threshold or codebook for a whole tensor, however many pieces it is in.
ONE_SIDE = LOSSY[:1] + LOSSY[2:7] + LOSSY[8:]


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "double": torch.randn(700, generator=random, dtype=torch.float64),
        "half": torch.randn(30, 40, generator=random).half(),
        "integers": torch.randint(0, 9, (40, 40), generator=random),
        "rows": torch.randn(50, 12, generator=random),
        "turned": torch.randn(40, 20, generator=random).t(),
        "waves": torch.randn(30, 9, generator=random, dtype=torch.complex64),
        "wide": torch.randn(3, 300, generator=random),
    }


@pytest.mark.parametrize("spec", [*LOSSLESS, *LOSSY])
def test_a_description_in_pieces_is_that_of_its_stream_and_of_its_file(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kc.describe(tensors(), spec)[0]
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 200)
    seen: list[str] = []
    description = kc.describe(tensors(), spec, jobs=2, progress=lambda _, piece: seen.append(piece.name))[0]
    prove(tensors(), description)
    kc.encode(tensors(), tmp_path / "w.kcz", spec)
    assert kc.verify(tmp_path / "w.kcz", tensors()) == pytest.approx(description.distortion)
    if spec != "mosaic:s=3|zstd":
        assert seen.count("integers") == 8
    if spec in ONE_SIDE:
        assert description.distortion == pytest.approx(whole.distortion)


class Endless:
    """A tensor that is made as it is read, and can't be read whole."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def weights(self) -> Weights:
        handle = TensorHandle("w", (self.rows, 1 << 10), torch.float32, self.whole, load_range=self.range)
        return Weights([handle], source="endless")

    def whole(self) -> torch.Tensor:
        raise AssertionError("the tensor is read whole")

    def range(self, start: int, stop: int) -> torch.Tensor:
        return torch.randn(stop - start, generator=torch.Generator().manual_seed(start))


@pytest.mark.parametrize("spec", [*LOSSLESS[:4], "best", *LOSSY[:6], "grid:step=0.1|entropy"])
def test_describing_needs_memory_for_pieces_whatever_the_size_of_a_tensor(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 1 << 14)
    monkeypatch.setattr("kcomplex.measuring.measure._SEGMENT", 1 << 14)
    monkeypatch.setattr("kcomplex.compressors.quantisers.lloyd._FITTED", 1 << 14)
    monkeypatch.setattr("kcomplex.compressors.mosaic.repeated_blocks._SAMPLED_WORDS", 1 << 14)
    peaks = []
    # The first one imports what it needs.
    for rows in (64, 128, 512):
        tracemalloc.start()
        try:
            kc.describe(Endless(rows).weights(), spec)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # Two bits for each of the further weights would be more.
    assert peaks[2] < peaks[1] + 100_000


def test_quantising_needs_memory_for_pieces_whatever_the_size_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 1 << 14)
    peaks = []
    for rows in (32, 128, 384):
        tracemalloc.start()
        try:
            kc.quantise(Endless(rows).weights(), tmp_path / "w.kcz", "grid:price=0|entropy", mse=0.01)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[2] < peaks[1] + 100_000


def test_a_tensor_without_ranges_is_read_once_for_all_its_pieces() -> None:
    reads = []

    def read(tensor: torch.Tensor) -> torch.Tensor:
        reads.append(tensor)
        return tensor

    for tensor in (torch.arange(60).reshape(6, 10).t(), torch.arange(60).reshape(2, 30), torch.arange(60)):
        reads.clear()
        handle = TensorHandle("w", tuple(tensor.shape), tensor.dtype, partial(read, tensor))
        parts = [piece.read().reshape(-1) for piece in handles_of(handle, 17)]
        assert len(parts) > 3
        assert torch.equal(torch.cat(parts), tensor.reshape(-1))
        assert len(reads) == 1


@pytest.mark.parametrize("spec", ["uniform|entropy", "grid|context"])
def test_nan_in_a_late_piece_is_refused_with_the_name_of_the_tensor(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcomplex.estimators.pieces.PIECE_WEIGHTS", 100)
    values = torch.ones(1000)
    values[950] = torch.nan
    with pytest.raises(WeightsError, match=r"'w' .*NaN"):
        kc.describe({"w": values}, spec)
