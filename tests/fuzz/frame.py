"""What every fuzzing script shares: cases drawn by seed, each read within limits of time and memory.

A case may be refused with a `KComplexError`, or read. Any other exception, more processor time or more memory, and a
process that dies are failures: told with their seed, and the input is kept to be replayed.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from kcomplex.errors import KComplexError

# Seconds of processor time for a case; a case that waits takes none, and is ended after so many seconds by the clock.
SECONDS, PATIENCE = 5, 120
# Bytes above those of the idle process: a piece of 4 Mi weights of eight bytes, and 200 MB.
MEMORY = (8 << 22) + 200_000_000
# No case may take the machine's memory before it is measured.
_MOST_MEMORY = 4 << 30
# Cases a process: what one leaves behind doesn't add up.
_BATCH = 500
_FAILED = "failed"
# Of the timers that end a case.
_SIGNALS = (signal.SIGPROF, signal.SIGALRM)
CORPUS = Path(__file__).parents[1] / "fixtures" / "fuzz"


class Input(NamedTuple):
    """A file to be read: its suffix, and its bytes."""

    suffix: str
    data: bytes


Make = Callable[[Random], Input]
Read = Callable[[Path], object]


def read_or_refuse(read: Read, path: Path) -> bool:
    """Return whether an input is read; False where it is refused as a file may be."""
    try:
        read(path)
    except KComplexError:
        return False
    return True


def main(name: str, make: Make, read: Read) -> None:
    """Run the cases that the command line asks for; exit code 1 if one failed.

    Parameters
    ----------
    name
        Of the script: its folder in the corpus.
    make
        Returns an input, of which nothing but the generator decides.
    read
        Reads one. What it compiles or imports must be so already: forked processes read the cases.
    """
    options = _options()
    if options.replay:
        for path in options.replay:
            print(path, "read" if read_or_refuse(read, path) else "refused")
        return
    kept = options.keep / name
    told: Counter[str] = Counter()
    seed, end, peak = options.seed, options.seed + options.cases, 0
    try:
        while seed < end:
            seed, peak = _batch(make, read, range(seed, min(seed + _BATCH, end)), kept, told, peak)
    finally:
        print(
            f"{name}: seeds {options.seed} to {seed - 1}: {told['read']} read, {told['refused']} refused, "
            f"{told[_FAILED]} failed; at most {peak / 1e6:.0f} MB above the idle process",
            flush=True,
        )
    sys.exit(1 if told[_FAILED] else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next number")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="folder for inputs that fail")
    parser.add_argument("--replay", type=Path, nargs="+", help="read these files and nothing else")
    return parser.parse_args()


def _batch(make: Make, read: Read, seeds: Sequence[int], kept: Path, told: Counter[str], peak: int) -> tuple[int, int]:
    """Run cases in one process until the first failure; return the seed that follows, and the peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        receive, send = os.pipe()
        process = os.fork()
        if not process:
            os.close(receive)
            try:
                _run(make, read, seeds, Path(folder), send)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as pipe:
            lines = [line.split(maxsplit=2) for line in pipe]
        status = os.waitpid(process, 0)[1]
    peak = max([peak, *(int(line[1]) for line in lines)])
    told.update(line[0] for line in lines)
    done, problem = len(lines), lines[-1][2].strip() if lines and lines[-1][0] == _FAILED else ""
    if not problem and done < len(seeds):
        told[_FAILED] += 1
        done, problem = done + 1, f"the process was ended (status {status}): see above"
    if problem:
        case = make(Random(seeds[done - 1]))
        kept.mkdir(parents=True, exist_ok=True)
        path = kept / f"{seeds[done - 1]}{case.suffix}"
        path.write_bytes(case.data)
        print(f"seed {seeds[done - 1]} failed ({path}): {problem}", flush=True)
    return seeds[0] + done, peak


def _run(make: Make, read: Read, seeds: Sequence[int], folder: Path, send: int) -> None:
    """Read cases and tell of each a word, the peak of memory above the idle process, and what was wrong."""
    idle = _peak()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in _SIGNALS:
        faulthandler.register(number, chain=True)
    for seed in seeds:
        case = make(Random(seed))
        # A name of its own: what the case before left mapped may not change.
        path = folder / f"{seed}{case.suffix}"
        path.write_bytes(case.data)
        _limit_time(SECONDS, PATIENCE)
        word, problem = _FAILED, ""
        try:
            word = "read" if read_or_refuse(read, path) else "refused"
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        _limit_time(0, 0)
        path.unlink()
        peak = _peak() - idle
        if peak > MEMORY:
            word, problem = _FAILED, problem or "it takes too much memory"
        os.write(send, f"{word} {peak} {' '.join(problem.split())[:500]}\n".encode(errors="replace"))
        if word == _FAILED:
            break


def _limit_time(processor: float, clock: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, clock)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
