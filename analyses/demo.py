"""``kcomplex demo``: one network trained in every mode, measured and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import run_with_progress

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from .experiments.experiment import Experiment

# The last one also sees palettes and zeros, so that it is fair to every mode: the figures show it.
ESTIMATORS = ("raw", "zstd", "lzma", "palette|entropy", "mosaic|entropy")
FIGURES = {
    "accuracy": "complexity_vs_accuracy.png",
    "trajectory": "complexity_over_training.png",
    "layers": "layers.png",
}
# Two thirds of the epochs train, one third fine-tunes, in every mode: only the mode differs between the runs.
_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"network": "mlp:hidden=256+128", "epochs": 60, "every": 2, "batch_size": 32, "lr": 5e-3},
    "mnist": {"network": "lenet300", "epochs": 15, "batch_size": 128, "lr": 2e-3},
    "fashion-mnist": {"network": "lenet300", "epochs": 15, "batch_size": 128, "lr": 2e-3},
}
_LARGE_MODES = {
    "baseline": "baseline",
    "uniform_qat": "uniform_qat:bits=3",
    "codeq": "codeq:bits=3",
    "momos": "momos:block_size=4,capacity=0.01",
    "pmmp": "pmmp",
}
_MODES = {
    "digits": {
        "baseline": "baseline",
        "uniform_qat": "uniform_qat:bits=3",
        "codeq": "codeq:bits=3",
        "momos": "momos:block_size=4,capacity=0.03",
        "pmmp": "pmmp:bits_per_parameter=4",
    },
    "mnist": _LARGE_MODES,
    "fashion-mnist": _LARGE_MODES,
}


def demo(
    data: Annotated[str, typer.Option(help="digits, mnist or fashion-mnist")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="where the data's files are")] = None,
    out: Annotated[Path, typer.Option(help="folder for the runs and figures")] = Path("out"),
    epochs: Annotated[int | None, typer.Option(help="epochs in each mode [default: as the data set needs]")] = None,
    seed: Annotated[int, typer.Option(help="of initialisation, shuffling and the modes")] = 0,
) -> None:
    """Train one network in five modes, each tracked, and show what its weights cost in bits: a table, three figures.

    What is finished isn't trained again, and an interrupted demo continues.
    """
    from rich.console import Console

    chosen = demo_experiments(data, epochs, seed)
    paths = run_with_progress(chosen, out / "runs", data_dir)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(_shown(demo_table(paths), chosen[0]))
    console.print("Figures:", *_draw(out), sep="\n  ")
    console.print(_next_steps(out))


def demo_experiments(data: str = "digits", epochs: int | None = None, seed: int = 0) -> list[Experiment]:
    """Return the demo's experiments on a data set; they differ in nothing but the mode.

    Parameters
    ----------
    data
        ``digits``, ``mnist`` or ``fashion-mnist``.
    epochs
        In each mode, fine-tuning included; None for what the data set needs.
    seed
        Of all of them.

    Raises
    ------
    SpecError
        The demo has no settings for this data set, or an argument is out of range.
    """
    from kcomplex.errors import SpecError

    from .experiments.experiment import Experiment

    if data not in _SETTINGS:
        raise SpecError(f"the demo has no settings for {data!r}, only for {', '.join(_SETTINGS)}: use kcomplex sweep")
    settings = dict(_SETTINGS[data])
    usual = settings.pop("epochs")
    total = usual if epochs is None else epochs
    fine_tuning = total // 3
    return [
        Experiment(
            name=name,
            data=data,
            mode=mode,
            epochs=total - fine_tuning,
            fine_tune_epochs=fine_tuning,
            seed=seed,
            estimators=ESTIMATORS,
            **settings,
        )
        for name, mode in _MODES[data].items()
    ]


def demo_table(paths: list[Path]) -> pd.DataFrame:
    """Return one row a run: mode, accuracy, weights, non_zeros, bits per weight by each estimator, bytes, by.

    ``bytes`` are those of the estimator that needs the fewest, which ``by`` names. Lengths and accuracy are those of
    the run's last snapshot; non-zeros are counted in its final weights.
    """
    import pandas as pd

    from .experiments.run import FINAL
    from .studies.selection import last_measured

    rows = []
    for path in paths:
        frame = last_measured(path).set_index("estimator")
        smallest = frame["bytes"].idxmin()
        rows.append(
            {
                "mode": path.name,
                "accuracy": frame["accuracy"].iloc[0],
                "weights": frame["weights"].iloc[0],
                "non_zeros": _non_zeros(path / FINAL),
                **frame["bits_per_weight"],
                "bytes": frame.at[smallest, "bytes"],
                "by": smallest,
            }
        )
    return pd.DataFrame(rows)


def _non_zeros(path: Path) -> int:
    from kcomplex.sources.open import open_weights

    with open_weights(path) as weights:
        return sum(int((handle.values() != 0).sum()) for handle in weights.values())


def _shown(frame: pd.DataFrame, experiment: Experiment) -> Table:
    """Return the table as a terminal of 80 columns takes it."""
    from rich import box
    from rich.table import Table

    from kcomplex.estimators.pipeline import build_estimator

    shown = Table(
        title=f"{experiment.network} ({frame['weights'].iloc[0]:,} weights) on {experiment.data}, "
        f"{experiment.epochs + experiment.fine_tune_epochs} epochs.\n"
        "Bits per weight by estimator (its kind); * the smallest, in bytes at the right.",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    shown.add_column("mode")
    headings = [f"{spec.replace('|', chr(10) + '|')}\n({build_estimator(spec).kind})" for spec in ESTIMATORS]
    for heading in ("test\naccuracy", "non-zero", *headings, "bytes"):
        shown.add_column(heading, justify="right")
    for row in frame.to_dict("records"):
        lengths = [f"{'*' if spec == row['by'] else ''}{row[spec]:.2f}" for spec in ESTIMATORS]
        shown.add_row(row["mode"], f"{row['accuracy']:.1%}", f"{row['non_zeros']:,}", *lengths, f"{row['bytes']:,.0f}")
    return shown


def _draw(out: Path) -> list[Path]:
    """Write the three figures of the runs and return their paths."""
    from kcomplex.machine.files import replacing
    from kcomplex.registry import registry

    analyses = registry("kcomplex.analyses")
    paths = []
    for name, file in FIGURES.items():
        module = analyses.load(name)
        axes = module.plot(module.compute_from_runs(out / "runs", estimator=ESTIMATORS[-1]))
        with replacing(out / file) as temporary:
            axes.figure.savefig(temporary, dpi=150, format="png")
        paths.append(out / file)
    return paths


def _next_steps(out: Path) -> str:
    from .experiments.run import CONFIGURATION, FINAL

    runs = out / "runs"
    config = runs / "momos" / CONFIGURATION
    return f"""What next:
  kcomplex describe {runs}/momos/{FINAL} -e 'palette|entropy' -e 'mosaic|entropy' --per-tensor
  kcomplex plot trajectory {runs} -e lzma -o {out}/lzma_over_training.png
  kcomplex train --config {config} --mode momos:block_size=4,capacity=0.1 --run {runs}/momos_10
  kcomplex plot accuracy {runs} -e 'mosaic|entropy' -o {out}/with_momos_10.png
Your own training loop needs one line: kcomplex.attach(model, optimizer, run="runs/mine", every="100 steps")"""
