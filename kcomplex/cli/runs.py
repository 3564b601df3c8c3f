"""``kcomplex runs``: what is in a run store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kcomplex.cli.output import GIVEN, OutputFormat, output_format, tell, tell_error, write_frame
from kcomplex.errors import RunError

# No terminal is wider, and a table of thousands takes minutes.
_MOST_COLUMNS = 60


def runs(
    path: Annotated[str, typer.Argument(help="a run, or a folder of runs")] = "runs",
    all_snapshots: Annotated[bool, typer.Option("--all", help="every snapshot, not only each run's last")] = False,
    events: Annotated[bool, typer.Option("--events", help="what went wrong or was left out while tracking")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="first measure snapshots that an interruption left behind")
    ] = False,
    given: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH|RECIPE", help=f"{GIVEN}; without it none that a run names is opened or called"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="as CSV (the default when piped)")] = False,
) -> None:
    """List runs: one row a run and estimator, with the newest metrics; those that can't be read are named."""
    from kcomplex.tracking import frames

    output = output_format(as_json, as_csv)
    told: dict[str, int] = {}

    def tell_once(error: RunError) -> None:
        if str(error) not in told:
            told[str(error)] = tell_error(error)

    if measure:
        from kcomplex.tracking.worker import measure_pending

        for name, folder in frames.find_runs(path).items():
            try:
                count = measure_pending(folder, given=given or ())
            except RunError as error:
                if folder == Path(path):
                    raise
                tell_once(error)
            else:
                tell(f"{name}: measured {count} snapshots")
    if events:
        write_frame(frames.load_events(path, tell_once), output)
    else:
        frame = frames.load_runs(path, tell_once)
        if not all_snapshots:
            frame = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
        hidden = ["value", "unit", "bits", "raw_bits", "wall_time", "seconds", "version", "lossless", "distortion"]
        hidden += ["counted_tensors", "all_tensors", "selection", "given_tensors", "given_of"]
        if output is OutputFormat.TABLE:
            frame = frame.drop(columns=hidden)
            more = len(frame.columns) - _MOST_COLUMNS
            if more > 0:
                tell(f"{more:,} metrics more are left out of the table: --csv and --json hold them")
                frame = frame.iloc[:, :_MOST_COLUMNS]
        write_frame(frame, output, title=path)
    if told:
        raise typer.Exit(max(told.values()))
