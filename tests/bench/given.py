"""What the small networks of the coding benchmark cost given their initialisation, with and without low-rank parts.

Each row is the stream of `lin` or `mix`, decoded and compared: bits a weight, names and shapes included, of which the
factors of the low-rank parts.
"""

from __future__ import annotations

import argparse
from unittest import mock

import numpy as np
import torch
from tensors import initial, tensor_set

import kcomplex as kc


def measure(name: str, spec: str) -> tuple[float, float]:
    """Return bits a weight of a set given its network's initial matrices, and those of low-rank parts.

    Raises
    ------
    RuntimeError
        The stream decodes to other weights.
    """
    with np.load(tensor_set(name)) as arrays:
        tensors = {key: torch.from_numpy(matrix) for key, matrix in arrays.items()}
    given = initial(name.split("_")[0])
    stream = kc.encode_checkpoint(tensors, spec, given=given)
    decoded = kc.decode_checkpoint(stream, given=given)
    if not all(torch.equal(decoded[key], tensor) for key, tensor in tensors.items()):
        raise RuntimeError(f"{spec} decodes {name} to other weights")
    (description,) = kc.describe(tensors, spec, given=given)
    weights = sum(tensor.numel() for tensor in tensors.values())
    factors = sum(tensor.parts.get("low rank", 0.0) for tensor in description.tensors)
    return 8 * len(stream) / weights, factors / weights


def main() -> None:
    """Print a table of the sets that are named, or of the networks in 8 bits and in float32."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["mlp_q8", "conv_q8", "mlp_f32", "conv_f32"])
    parser.add_argument("--codes", nargs="+", default=["mix", "lin"])
    chosen = parser.parse_args()
    print("| set | code | rank 0 | low rank | of which factors |\n|---|---|--:|--:|--:|")
    for name in chosen.sets:
        for spec in chosen.codes:
            with mock.patch("kcomplex.compressors.mix.differences.directions", return_value=None):
                plain, _ = measure(name, spec)
            found, factors = measure(name, spec)
            print(f"| {name} | {spec} | {plain:.3f} | {found:.3f} | {factors:.3f} |", flush=True)


if __name__ == "__main__":
    main()
