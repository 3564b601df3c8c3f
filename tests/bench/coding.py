"""Our lossless codes beside other people's on real weights: bits a weight, MB/s both ways, memory.

Every tool encodes every set in one fresh process and decodes it in another, with one thread; what comes back must be
the set, bit for bit. What is measured once stays in the results and isn't measured again, unless `--again` is given.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from coding_report import draw, print_table, with_ratios
from environment import peer_python
from peers import FLOATS_ONLY, INTEGERS_ONLY, PEERS
from tensors import FLOAT_SETS, FOLDER, INTEGER_SETS, SETS, tensor_set

from kcomplex.errors import SpecError, UnknownNameError
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.machine.files import replacing

OURS = ("entropy", "context", "mix", "lin")
RESULTS = FOLDER / "coding.csv"
PROCESS = Path(__file__).with_name("coding_process.py")
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")}


class ToolFailedError(Exception):
    """A tool gave up, or gave back other numbers than it was given."""


def run_process(tool: str, action: str, dtype: str, source: Path, target: Path) -> tuple[float, float]:
    """Return the median of the processor seconds of one half of a measurement, and its peak of memory in bytes."""
    python = peer_python() if tool in PEERS else sys.executable
    command = [python, PROCESS, action, tool, dtype, source, target]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    if done.returncode:
        raise ToolFailedError(f"{action}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(figures["seconds"]), figures["peak"]


def measure(tool: str, name: str) -> dict[str, object]:
    """Return one row of the results.

    Raises
    ------
    ToolFailedError
        A process ended in an error, or the tensors changed.
    """
    path = tensor_set(name)
    with np.load(path) as file:
        arrays = dict(file)
    dtype = next(iter(arrays.values())).dtype.name
    with tempfile.TemporaryDirectory() as folder:
        stream, decoded = Path(folder, "stream"), Path(folder, "decoded.npz")
        encode_seconds, encode_peak = run_process(tool, "encode", dtype, path, stream)
        decode_seconds, decode_peak = run_process(tool, "decode", dtype, stream, decoded)
        size = stream.stat().st_size
        with np.load(decoded) as file:
            if not _identical(arrays, dict(file)):
                raise ToolFailedError("decoding changes the tensors")
    weights = sum(array.size for array in arrays.values())
    megabytes = sum(array.nbytes for array in arrays.values()) / 1e6
    return {
        "set": name,
        "tool": tool,
        "weights": weights,
        "bytes": size,
        "bits_per_weight": round(8 * size / weights, 5),
        "encode_mb_s": float(f"{megabytes / max(encode_seconds, 1e-6):.4g}"),
        "decode_mb_s": float(f"{megabytes / max(decode_seconds, 1e-6):.4g}"),
        "encode_memory_mb": round(encode_peak / 1e6, 1),
        "decode_memory_mb": round(decode_peak / 1e6, 1),
    }


def _identical(arrays: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    return arrays.keys() == others.keys() and all(
        (array.dtype, array.shape, array.tobytes()) == (others[name].dtype, others[name].shape, others[name].tobytes())
        for name, array in arrays.items()
    )


def applies(tool: str, name: str) -> bool:
    """Return whether a tool takes tensors of such a precision."""
    return not (tool in INTEGERS_ONLY and name in FLOAT_SETS) and not (tool in FLOATS_ONLY and name in INTEGER_SETS)


def default_tools() -> list[str]:
    """Return our codes and the peers, without those that aren't installed by pip and aren't there."""
    if shutil.which("zpaq"):
        return [*OURS, *PEERS]
    print("zpaq isn't installed (a package of Debian): left out")
    return [*OURS, *(peer for peer in PEERS if peer != "zpaq-5")]


def load_results() -> pd.DataFrame:
    """Return what was measured so far."""
    return pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=["set", "tool"])


def save_results(results: pd.DataFrame) -> None:
    """Write the results with ratios to the other tools, sets and tools in a fixed order."""
    with replacing(RESULTS) as temporary:
        with_ratios(results).to_csv(temporary, index=False)


def run(tools: list[str], sets: list[str], again: bool = False) -> bool:
    """Measure what isn't in the results, print and draw; return whether every tool passed."""
    results, passed = load_results(), True
    for name in sets:
        for tool in tools:
            known = (results["set"] == name) & (results["tool"] == tool)
            if not applies(tool, name) or (known.any() and not again):
                continue
            try:
                row = measure(tool, name)
            except ToolFailedError as error:
                print(f"{name} {tool}: {error}", file=sys.stderr)
                passed = False
                continue
            results = pd.DataFrame([*results[~known].to_dict("records"), row])
            save_results(results)
            print(f"{name} {tool}: {row['bits_per_weight']:.4f} bits a weight", flush=True)
    results = with_ratios(results)
    print_table(results)
    if len(results):
        with replacing(FOLDER / "coding.png") as temporary:
            draw(results).savefig(temporary, dpi=150, bbox_inches="tight", format="png")
    return passed


def main(arguments: Sequence[str] = ()) -> None:
    """Run what the arguments select: without any, all tools on the small networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", metavar="TOOL", help=f"specifications of kcomplex, or {', '.join(PEERS)}")
    parser.add_argument(
        "--sets", nargs="+", metavar="SET", help=f"names or patterns such as '*_q8', of {', '.join(SETS)}"
    )
    parser.add_argument("--again", action="store_true", help="measure even what stands in the results")
    chosen = parser.parse_args(arguments)
    tools = chosen.tools or default_tools()
    for tool in set(tools) - set(PEERS):
        try:
            build_estimator(tool)
        except (SpecError, UnknownNameError) as error:
            parser.error(f"{tool} is neither a peer nor a code of kcomplex: {error}")
    patterns = chosen.sets or [f"{source}_*" for source in ("conv", "mlp", "mlpl1")]
    sets = [name for name in SETS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not sets:
        parser.error(f"no set is called {' or '.join(patterns)}; there are {', '.join(SETS)}")
    if not run(tools, sets, chosen.again):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
