"""``kcomplex train`` and ``kcomplex sweep``: experiments from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from kcomplex.cli.output import output_format, progress, tell, write_frame
from kcomplex.machine.closing import Closing

if TYPE_CHECKING:
    import pandas as pd

    from .experiments.experiment import Experiment


def train(
    run: Annotated[
        Path | None, typer.Option(help="folder of the run [default: runs/NAME of the config]", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="experiment as TOML or JSON; options below override it")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, mnist, fashion-mnist, cifar10-jpeg, tinyshakespeare:window=64 or hf:NAME"),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="mlp:hidden=128+64, lenet300, lenet5, convnet:channels=16+32, vgg16, resnet20, vit, gpt:width=64",
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="SPEC", help="baseline, momos:block_size=4,capacity=0.01 ...")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training data")] = None,
    fine_tune_epochs: Annotated[int | None, typer.Option(help="further passes after the mode has pruned")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images or windows a step")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate at the start")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="weight decay")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or constant learning rate")] = None,
    seed: Annotated[int | None, typer.Option(help="of initialisation, shuffling and the mode")] = None,
    estimator: Annotated[
        list[str] | None, typer.Option("--estimator", "-e", metavar="SPEC", help="measures the snapshots; repeat it")
    ] = None,
    every: Annotated[int | None, typer.Option(help="epochs from one snapshot to the next")] = None,
    threads: Annotated[int | None, typer.Option(help="threads that PyTorch computes with")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="where the data's files are")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="result as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="result as CSV (the default when piped)")] = False,
) -> None:
    """Train one network in a training mode, tracked; continue it if it was interrupted, skip it if it is done.

    For example: kcomplex train --data digits --mode momos:block_size=4,capacity=0.01 --run runs/momos
    """
    options = {
        "data": data,
        "network": network,
        "mode": mode,
        "epochs": epochs,
        "fine_tune_epochs": fine_tune_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "schedule": schedule,
        "seed": seed,
        "estimators": estimator,
        "every": every,
        "threads": threads,
        "device": device,
    }
    output = output_format(as_json, as_csv)
    experiment, folder = _experiment(config, run, {key: value for key, value in options.items() if value is not None})
    run_with_progress([experiment], folder, data_dir)
    write_frame(last_descriptions([folder / experiment.name]), output)


def sweep(
    file: Annotated[Path, typer.Argument(help="TOML with [experiment], [sweep] and [[runs]]")],
    runs: Annotated[Path, typer.Option(help="folder that the runs go to")] = Path("runs"),
    data_dir: Annotated[Path | None, typer.Option(help="where the data's files are")] = None,
    dry_run: Annotated[bool, typer.Option(help="list the runs without training")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="result as JSON")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="result as CSV (the default when piped)")] = False,
) -> None:
    """Train every combination that a sweep file asks for, one after the other; what is done is skipped."""
    import pandas as pd

    from .experiments.sweep import read_sweep

    output = output_format(as_json, as_csv)
    experiments = read_sweep(file)
    if dry_run:
        write_frame(pd.DataFrame([experiment.to_dict() for experiment in experiments]), output, title=str(file))
        return
    paths = run_with_progress(experiments, runs, data_dir)
    write_frame(last_descriptions(paths), output, title=str(file))


def run_with_progress(experiments: list[Experiment], folder: Path, data_dir: Path | None) -> list[Path]:
    """Return the runs of experiments, showing a bar a run on a terminal and telling which were done before."""
    from .experiments.run import is_done
    from .experiments.sweep import run_sweep

    for experiment in experiments:
        if is_done(experiment, folder):
            tell(f"{folder / experiment.name}: already done")
    with _Bars() as bars:
        return run_sweep(experiments, folder, data_dir, bars.show)


def last_descriptions(paths: list[Path]) -> pd.DataFrame:
    """Return one row a run and estimator at the last snapshots, with accuracy, kind, weights and lengths."""
    import pandas as pd

    from .studies.selection import last_measured

    frame = pd.concat([last_measured(path) for path in paths], ignore_index=True)
    columns = ["run", "accuracy", "estimator", "kind", "unit", "value", "weights", "bits_per_weight", "bytes", "ratio"]
    return frame[columns]


def _experiment(config: Path | None, run: Path | None, options: dict[str, Any]) -> tuple[Experiment, Path]:
    """Return the experiment and the folder that its run's folder is in."""
    from kcomplex.errors import SpecError

    from .experiments.experiment import experiment_from, read_table

    values = {} if config is None else read_table(config)
    if run is not None:
        values["name"] = run.resolve().name
    elif "name" not in values:
        raise SpecError("say where the run goes: --run runs/NAME, or a name in the --config file")
    where = "the command line" if config is None else str(config)
    folder = Path("runs") if run is None else run.parent
    return experiment_from({**values, **options}, where), folder


class _Bars(Closing):
    """A bar for the epochs of each run. It ends with the last epoch: then the tracker shows one for its measuring."""

    def __init__(self) -> None:
        self._name = ""
        self._task = TaskID(0)
        self._bar: Progress | None = None

    def show(self, experiment: Experiment, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show how far an experiment is."""
        total = experiment.epochs + experiment.fine_tune_epochs
        if self._name != experiment.name:
            self._begin(experiment.name, total)
        if self._bar is not None:
            accuracy = f"test accuracy {metrics['accuracy']:.1%}"
            self._bar.update(self._task, completed=epoch, accuracy=accuracy)
        if epoch == total:
            self.close()

    def _begin(self, name: str, total: int) -> None:
        self.close()
        self._name = name
        self._bar = progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TextColumn("{task.fields[accuracy]}"),
            transient=False,
        )
        self._task = self._bar.add_task(f"{name:<16}", total=total, accuracy="")
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
