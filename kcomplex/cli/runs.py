"""``kcomplex runs``: what is in a run store."""

from __future__ import annotations

from typing import Annotated

import typer

from kcomplex.cli.output import OutputFormat, errors, output_format, write_frame


def runs(
    path: Annotated[str, typer.Argument(help="a run, or a folder of runs")] = "runs",
    all_snapshots: Annotated[bool, typer.Option("--all", help="every snapshot, not only each run's last")] = False,
    events: Annotated[bool, typer.Option("--events", help="what went wrong or was left out while tracking")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="first measure snapshots that an interruption left behind")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="as CSV (the default when piped)")] = False,
) -> None:
    """List runs: one row a run and estimator, with the newest metrics."""
    from kcomplex.tracking import frames

    output = output_format(as_json, as_csv)
    if measure:
        from kcomplex.tracking.worker import measure_pending

        for name, folder in frames.find_runs(path).items():
            errors.print(f"{name}: measured {measure_pending(folder)} snapshots", markup=False)
    if events:
        write_frame(frames.load_events(path), output)
        return
    frame = frames.load_runs(path)
    if not all_snapshots:
        frame = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
    hidden = ["value", "unit", "bits", "raw_bits", "wall_time", "seconds", "version", "lossless", "distortion"]
    write_frame(frame.drop(columns=hidden) if output is OutputFormat.TABLE else frame, output, title=path)
