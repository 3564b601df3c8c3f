"""The ``kcomplex`` command: how it begins, and how it ends. Nothing heavy is imported before signals are heeded."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What shells add to the number of the signal that ended a command.
_ENDED_BY = 128
_PIPE_CLOSED = _ENDED_BY + 13


def main() -> None:
    """Run the command line.

    Exit code 0 is fine, 1 a check that failed, 2 bad input or a file that can't be written, 3 a fault of kcomplex; 130,
    141 or 143 as of other commands that are interrupted, write to a closed pipe, or are told to end.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that aren't valid Unicode, or that the terminal's encoding lacks, are shown all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    with _heeding(lambda number, _: os._exit(_ENDED_BY + number)):
        # It takes a second, and nothing is there yet that would have to go.
        from kcomplex.cli.app import build_app
        from kcomplex.cli.output import tell, tell_error
    warnings.showwarning = lambda message, *_: tell(f"warning: {message}")
    if sys.stderr.isatty():
        _show_messages()
    with _interruptible() as signals:
        code = _run(lambda: build_app()(), tell_error)
    if signals:
        # Threads may have a piece in work that nobody waits for.
        os._exit(_ENDED_BY + signals[0])
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try once more.
        os._exit(code)
    sys.exit(code)


def _run(command: Callable[[], None], tell_error: Callable[[Exception], int]) -> int:
    """Return the exit code of the command, its errors told in one line each."""
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        # Typer and Rich end so where nobody reads what is written.
        if end.code == 1 and isinstance(end.__context__, OSError):
            return _PIPE_CLOSED
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 2
        return end.code or 0
    except BrokenPipeError:
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _ENDED_BY + signal.SIGINT
    except Exception as error:
        return tell_error(error)
    return 0


def _open_closed_streams() -> None:
    """Have something stand in for standard streams that are closed, or files would take their numbers.

    What is written to the standard output fails then, as it does for other commands; what would be told is lost.
    """
    for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))):
        if getattr(sys, name) is None and os.open(os.devnull, flags) == number:
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yield the signals that came: each interrupts what runs, so that temporary files go."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    with _heeding(interrupt):
        yield came


@contextmanager
def _heeding(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have the signals that end commands handled."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    # What whoever started us had ignored (nohup, the background of a script) stays so.
    heeded = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _show_messages() -> None:
    """Let the library say what takes long: on the console of the progress bars, so that it stands above them."""
    from rich.logging import RichHandler

    from kcomplex.cli.output import errors

    handler = RichHandler(console=errors, show_time=False, show_level=False, show_path=False)
    logger = logging.getLogger("kcomplex")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
