"""Runs as pandas frames."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kcomplex.errors import RunError
from kcomplex.estimators.description import shape_text
from kcomplex.machine.files import path_of
from kcomplex.tracking.columns import DESCRIPTION_COLUMNS, SNAPSHOT_COLUMNS, STATE_COLUMNS, storable
from kcomplex.tracking.database import reading
from kcomplex.tracking.folder import DATABASE, is_followed
from kcomplex.tracking.store import RunStore

if TYPE_CHECKING:
    import pandas as pd

_SNAPSHOTS = "SELECT id, step, epoch, wall_time, state, skipped FROM snapshots WHERE NOT superseded ORDER BY id"
_METRICS = (
    "SELECT snapshot, name, value FROM metrics JOIN snapshots ON snapshots.id = metrics.snapshot WHERE NOT superseded"
)
_DESCRIPTIONS = "SELECT * FROM descriptions ORDER BY snapshot, id"
_TENSORS = (
    "SELECT description, tensor, tensors.shape, tensors.dtype, tensors.weights, tensors.raw_bits, tensors.value, "
    "tensors.parts FROM tensors JOIN descriptions ON descriptions.id = description "
    "JOIN snapshots ON snapshots.id = descriptions.snapshot WHERE NOT superseded"
)
_HEADLINES = "SELECT id AS description, snapshot, estimator, kind, unit FROM descriptions"
_HEADLINE_COLUMNS = ("step", "epoch", "estimator", "kind", "unit")
_EVENTS = (
    "SELECT events.time, events.kind, events.message, snapshots.step FROM events "
    "LEFT JOIN snapshots ON snapshots.id = events.snapshot ORDER BY events.id"
)
_CONFIGURATION = "SELECT status, created, seed, version, estimators, settings, config FROM run"
# Cells of a table that has a column a name: names that stand in one row each would make far more of them than a store
# has bytes.
_MOST_CELLS, _MOST_CELLS_A_VALUE = 1 << 22, 16

OnDamage: TypeAlias = "Callable[[RunError], object]"


class DamagedRunWarning(UserWarning):
    """A run of several can't be read; the others can."""


def _warn(error: RunError) -> None:
    warnings.warn(str(error), DamagedRunWarning, stacklevel=5)


def find_runs(path: str | PathLike[str]) -> dict[str, Path]:
    """Return the folders of the runs at or below a path by name: the path below it, or its own name.

    Raises
    ------
    RunError
        There is none.
    KComplexError
        It is no path.
    """
    root = path_of(path)
    found = sorted(file.parent for file in root.rglob(DATABASE))
    if not found:
        where = "no run here or below" if root.exists() else "there is no such folder"
        example = str(root / "x")
        raise RunError(f"{root}: {where}; train with kcomplex.attach(model, optimizer, run={example!r})")
    names = (root.resolve().name if run == root else run.relative_to(root).as_posix() for run in found)
    return dict(zip(map(storable, names), found, strict=True))


def load_runs(path: str | PathLike[str], on_damage: OnDamage = _warn) -> pd.DataFrame:
    """Return one row a measured snapshot and estimator, and a column each metric.

    Parameters
    ----------
    path
        Folder of a run, or a folder that has runs at any depth. They may be being written.
    on_damage
        Called with the error of a run in the folder that can't be read; by default it becomes a warning.

    Returns
    -------
    DataFrame
        Columns ``run, step, epoch, wall_time`` (seconds since 1970), those of `Description.to_dict`, and the metrics.

    Raises
    ------
    RunError
        There is no run, or none that is readable.
    """
    return _concatenated(path, _run_frame, on_damage)


def load_snapshots(path: str | PathLike[str], on_damage: OnDamage = _warn) -> pd.DataFrame:
    """Return one row a snapshot, measured or not: run, step, epoch, wall time, state and metrics; see `load_runs`."""
    return _concatenated(path, lambda store: _snapshot_frame(store).drop(columns=["id", "skipped"]), on_damage)


def load_tensors(path: str | PathLike[str], on_damage: OnDamage = _warn) -> pd.DataFrame:
    """Return one row a measured snapshot, estimator and tensor, with the parts (``part_...``); see `load_runs`.

    Tensors that were left out have a row too, with the reason in ``skipped`` and no value.
    """
    return _concatenated(path, _tensor_frame, on_damage)


def load_events(path: str | PathLike[str], on_damage: OnDamage = _warn) -> pd.DataFrame:
    """Return one row an event: run, time, kind, message, and the step of its snapshot; see `load_runs`."""
    return _concatenated(path, lambda store: _query(store, _EVENTS), on_damage)


def load_configurations(path: str | PathLike[str], on_damage: OnDamage = _warn) -> pd.DataFrame:
    """Return one row a run: status, time of creation, torch seed, version, estimators, settings, configuration.

    The status is ``running`` only while the process lives that follows the run, else ``interrupted`` or ``finished``.
    See `load_runs`.
    """
    return _concatenated(path, _configuration_frame, on_damage)


def _concatenated(
    path: str | PathLike[str], frame_of: Callable[[RunStore], pd.DataFrame], on_damage: OnDamage
) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for name, run in find_runs(path).items():
        try:
            frame = _frame(run, frame_of)
        except RunError as error:
            if run == Path(path):
                raise
            on_damage(error)
        else:
            frame.insert(0, "run", name)
            frames.append(frame)
    if not frames:
        raise RunError(f"{path}: none of the runs below can be read")
    # A run without rows has no dtypes to contribute, only columns.
    filled = [frame for frame in frames if not frame.empty]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]


def _frame(run: Path, frame_of: Callable[[RunStore], pd.DataFrame]) -> pd.DataFrame:
    with RunStore(run, read_only=True) as store, reading(store.path):
        # One transaction: all queries see the same moment of a run that is being written.
        store.connection.execute("BEGIN")
        store.check()
        return frame_of(store)


def _query(store: RunStore, query: str) -> pd.DataFrame:
    import pandas as pd

    cursor = store.connection.execute(query)
    columns = [column for column, *_ in cursor.description]
    return pd.DataFrame.from_records(cursor.fetchall(), columns=columns, coerce_float=True)


def _check_cells(store: RunStore, rows: int, names: Iterable[str], values: int) -> None:
    columns = len(set(names))
    if rows * columns > max(_MOST_CELLS, _MOST_CELLS_A_VALUE * values):
        raise RunError(f"{store.path}: {columns} names of {values} values in {rows} rows make too large a table")


def _snapshot_frame(store: RunStore) -> pd.DataFrame:
    snapshots = _query(store, _SNAPSHOTS).astype({"epoch": float})
    metrics = _query(store, _METRICS).astype({"value": float})
    _check_cells(store, len(snapshots), metrics["name"], len(metrics))
    wide = metrics.pivot(index="snapshot", columns="name", values="value")
    return snapshots.join(wide, on="id")


def _description_frame(store: RunStore) -> pd.DataFrame:
    numbers = dict.fromkeys(("value", "coverage", "distortion"), float)
    frame = _query(store, _DESCRIPTIONS).rename(columns={"id": "description"}).drop(columns="parts")
    frame = frame.astype({**numbers, "lossless": "boolean"})
    frame["bits"] = frame["value"].where(frame["unit"] == "bits")
    frame["bytes"] = frame["bits"] / 8
    frame["bits_per_weight"] = frame["bits"] / frame["weights"].where(frame["weights"] > 0)
    frame["ratio"] = frame["raw_bits"] / frame["bits"].where(frame["bits"] > 0)
    return frame


def _run_frame(store: RunStore) -> pd.DataFrame:
    snapshots = _snapshot_frame(store)
    metrics = [name for name in snapshots.columns if name not in (*SNAPSHOT_COLUMNS, *STATE_COLUMNS)]
    frame = snapshots.merge(_description_frame(store), left_on="id", right_on="snapshot")
    return frame[[*SNAPSHOT_COLUMNS[1:], *DESCRIPTION_COLUMNS, *metrics]]


def _tensor_frame(store: RunStore) -> pd.DataFrame:
    import pandas as pd

    snapshots = _query(store, _SNAPSHOTS).astype({"epoch": float}).drop(columns=["wall_time", "state"])
    headlines = _query(store, _HEADLINES).merge(snapshots, left_on="snapshot", right_on="id").set_index("description")
    rows = []
    tensors = store.connection.execute(_TENSORS).fetchall()
    all_parts = [store.parsed(row[-1], "parts", _is_parts) for row in tensors]
    _check_cells(store, len(tensors), chain.from_iterable(all_parts), sum(map(len, all_parts)))
    for (description, tensor, shape, dtype, weights, raw_bits, value, _), parts in zip(tensors, all_parts, strict=True):
        in_bits = weights > 0 and headlines.at[description, "unit"] == "bits"
        rows.append(
            {
                "description": description,
                "tensor": tensor,
                "shape": _shape(store.parsed(shape, "a shape", _is_shape)),
                "dtype": dtype,
                "weights": weights,
                "raw_bits": raw_bits,
                "value": math.nan if value is None else value,
                "bits_per_weight": value / weights if in_bits and value is not None else math.nan,
                "skipped": "",
                **{f"part_{part}": bits for part, bits in parts.items()},
            }
        )
    for description, skipped in headlines["skipped"].items():
        for name, reason, shape, dtype, *_ in store.parsed(skipped, "skipped tensors", _are_skipped):
            left_out = {"description": description, "tensor": name, "shape": _shape(shape), "dtype": dtype}
            rows.append({**left_out, "skipped": reason})
    columns = ["description", "tensor", "shape", "dtype", "weights", "raw_bits", "value", "bits_per_weight", "skipped"]
    frame = pd.DataFrame(rows, columns=None if rows else columns).sort_values(["description", "tensor"])
    # Nullable integers, because a tensor that was left out has no numbers.
    frame = frame.astype({"weights": "Int64", "raw_bits": "Int64"})
    return frame.join(headlines[list(_HEADLINE_COLUMNS)], on="description")[
        [*_HEADLINE_COLUMNS, *frame.columns.drop("description")]
    ]


def _shape(sides: list[int] | None) -> str:
    return "" if sides is None else shape_text(sides)


def _is_shape(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(side) is int and side >= 0 for side in value))


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(bits) is float or (type(bits) is int and abs(bits) < 1 << 63) for bits in value.values()
    )


def _are_skipped(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_skipped, value))


def _is_skipped(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 6:
        return False
    shape = row.pop(2)
    texts = all(isinstance(text, str) for text in row)
    row.insert(2, shape)
    return texts and _is_shape(shape)


def _configuration_frame(store: RunStore) -> pd.DataFrame:
    frame = _query(store, _CONFIGURATION)
    info = store.info()
    frame["seed"] = frame["seed"].map(int)
    told: dict[str, Any] = {"estimators": list(info.estimators), "settings": info.settings, "config": info.config}
    for column, value in told.items():
        frame[column] = [value]
    if info.status == "running" and not is_followed(store.run):
        frame["status"] = "interrupted"
    return frame
