"""What the results of the coding benchmark say: ratios, a table of them, a figure."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import PEERS
from rich.console import Console
from rich.table import Table
from tensors import FLOAT_SETS, INTEGER_SETS, SETS, UNTUNED

# The peer that each of our codes is set against, by the kind of tensors.
REFERENCES = {INTEGER_SETS: "NNC*", FLOAT_SETS: "pcodec-12"}


def with_ratios(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results in order, with each size divided by the reference peer's and by the smallest peer's.

    References are NNC* for integers and pcodec-12 for floats; a ratio that lacks its peer is empty.
    """
    if not len(results):
        return results
    results = results.copy()
    sizes = results.pivot_table(index="set", columns="tool", values="bytes")
    best = sizes[[peer for peer in PEERS if peer in sizes]].min(axis=1)
    references = pd.Series(
        {name: sizes[peer].get(name) for sets, peer in REFERENCES.items() if peer in sizes for name in sets},
        dtype=float,
    )
    results["to_reference"] = (results["bytes"] / results["set"].map(references)).round(4)
    results["to_best_peer"] = (results["bytes"] / results["set"].map(best)).round(4)
    peers = list(PEERS)
    results["order"] = [
        (SETS.index(name), tool in PEERS, peers.index(tool) if tool in PEERS else 0, tool)
        for name, tool in zip(results["set"], results["tool"], strict=True)
    ]
    return results.sort_values("order").drop(columns="order").reset_index(drop=True)


def geometric_means(results: pd.DataFrame) -> pd.DataFrame:
    """Return, for tools with a row for each set of a group, the geometric mean of their ratios to the reference.

    Groups are the integer sets, those of them that nothing was tuned on, and the float sets; tools are the index.
    """
    ratios = results.pivot_table(index="tool", columns="set", values="to_reference")
    groups = {
        f"{len(INTEGER_SETS)} integer sets": list(INTEGER_SETS),
        "language model's integers": [name for name in INTEGER_SETS if name.startswith(UNTUNED)],
        f"{len(FLOAT_SETS)} float sets": list(FLOAT_SETS),
    }
    columns = {}
    for title, sets in groups.items():
        complete = ratios.reindex(columns=sets).dropna()
        columns[title] = np.exp(np.log(complete).mean(axis=1))
    return pd.DataFrame(columns).dropna(how="all")


def print_table(results: pd.DataFrame) -> None:
    """Print bits a weight of every set and tool, and the geometric means."""
    for sets in REFERENCES:
        chosen = results[results["set"].isin(sets)]
        if not len(chosen):
            continue
        bits = chosen.pivot_table(index="set", columns="tool", values="bits_per_weight", sort=False)
        table = Table("set", *bits.columns, title="bits a weight, everything paid for")
        for name in [name for name in sets if name in bits.index]:
            least = bits.loc[name].min()
            cells = ["" if np.isnan(value) else f"{value:.4f}" for value in bits.loc[name]]
            marked = [
                f"[bold]{cell}[/bold]" if value == least else cell
                for cell, value in zip(cells, bits.loc[name], strict=True)
            ]
            table.add_row(name, *marked)
        Console(width=200).print(table)
    means = geometric_means(results)
    if len(means):
        print("geometric means of sizes against NNC* (integers) and pcodec-12 (floats):")
        print(means.round(4).to_string(na_rep=""))


def draw(results: pd.DataFrame) -> Figure:
    """Return a figure of every tool's size against the reference peer's, one row a set, integers beside floats."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, (sets, reference) in zip(figure.subplots(1, 2), REFERENCES.items(), strict=True):
        _draw_panel(axes, results[results["set"].isin(sets)], reference)
    return figure


def _draw_panel(axes: Axes, results: pd.DataFrame, reference: str) -> None:
    ratios = results.pivot_table(index="set", columns="tool", values="to_reference", sort=False).iloc[::-1]
    colours = mpl.colormaps["tab10"]
    ours = [tool for tool in ratios if tool not in PEERS]
    for place, tool in enumerate(ours):
        axes.plot(ratios[tool], range(len(ratios)), "o", color=colours(place), label=tool, zorder=3)
    for place, tool in enumerate(tool for tool in PEERS if tool in ratios and tool != reference):
        axes.plot(ratios[tool], range(len(ratios)), "sDv^<>Xp"[place], color="0.55", markersize=4, label=tool)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(ratios)), ratios.index)
    axes.set_xlabel(f"size against {reference}")
    axes.set_xlim(right=min(1.5, axes.get_xlim()[1]))
    axes.grid(axis="x", alpha=0.3)
    if len(ratios):
        axes.legend(fontsize="small", frameon=False)
