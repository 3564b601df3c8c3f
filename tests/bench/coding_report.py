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
# The figure ends here.
LARGEST_RATIO = 1.5


def with_ratios(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results in order, with each size divided by the reference peer's and by the smallest peer's.

    References are NNC* for integers and pcodec-12 for floats; a ratio that lacks its peer is empty.
    """
    if not len(results):
        return results
    results = results.astype({"weights": int, "bytes": int})
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


def _by_tool(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column with a row for each set and a column for each tool, ours before the peers."""
    table = results.pivot_table(index="set", columns="tool", values=column, sort=False)
    ours = sorted(tool for tool in table if tool not in PEERS)
    return table[[*ours, *(peer for peer in PEERS if peer in table)]]


def print_table(results: pd.DataFrame) -> None:
    """Print bits a weight of every set and tool, and the geometric means."""
    for sets in REFERENCES:
        chosen = results[results["set"].isin(sets)]
        if not len(chosen):
            continue
        bits = _by_tool(chosen, "bits_per_weight")
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
    """Return a figure of every tool's size against the reference peer's, one row a set, integers beside floats.

    Sizes above one and a half times the reference are left out.
    """
    ours = sorted(set(results["tool"]) - set(PEERS))
    colours = {tool: mpl.colormaps["tab10"](place) for place, tool in enumerate(ours)}
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, (sets, reference) in zip(figure.subplots(1, 2), REFERENCES.items(), strict=True):
        chosen = results[results["set"].isin(sets)]
        if len(chosen):
            _draw_panel(axes, _by_tool(chosen, "to_reference").iloc[::-1], reference, colours)
    return figure


def _draw_panel(axes: Axes, ratios: pd.DataFrame, reference: str, colours: dict[str, tuple[float, ...]]) -> None:
    rows = range(len(ratios))
    for tool in (tool for tool in colours if tool in ratios):
        axes.plot(ratios[tool], rows, "o", color=colours[tool], label=tool, zorder=3)
    markers = dict(zip(PEERS, "|sDv^<>Xp", strict=True))
    for tool in (tool for tool in PEERS if tool in ratios and tool != reference):
        axes.plot(ratios[tool], rows, markers[tool], color="0.5", markersize=4, label=tool)
    axes.axvline(1, color="0.3", linewidth=1, label=reference)
    axes.set_yticks(rows, ratios.index)
    axes.set_xlabel(f"size against {reference}")
    axes.set_xlim(right=min(LARGEST_RATIO, axes.get_xlim()[1]))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=4)
