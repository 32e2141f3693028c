"""Drawings: the network, and error against parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import networkx
import numpy as np

from tnss.structure import Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tnss.result import Result


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(5, 4), layout="constrained")


def draw_network(structure: Structure, path: str | os.PathLike[str]) -> None:
    """Draw a structure: a vertex for each core with its mode, edges as wide as the log of their rank."""
    figure = _figure()
    axes = figure.add_subplot()
    graph = structure.to_networkx()
    place = networkx.kamada_kawai_layout(graph) if networkx.is_connected(graph) else networkx.circular_layout(graph)
    ranks = {(u, v): rank for u, v, rank in structure.edges}
    networkx.draw_networkx_edges(
        graph, place, ax=axes, edgelist=list(ranks), width=[rank**0.6 for rank in ranks.values()]
    )
    colours = ["tab:blue" if vertex < structure.order else "tab:grey" for vertex in graph]
    networkx.draw_networkx_nodes(graph, place, ax=axes, node_color=colours, node_size=500)
    labels = {v: f"{v}:{structure.sizes[v]}" if v < structure.order else "" for v in graph}
    networkx.draw_networkx_labels(graph, place, labels, ax=axes, font_size=8, font_color="white")
    networkx.draw_networkx_edge_labels(graph, place, {edge: str(rank) for edge, rank in ranks.items()}, ax=axes)
    axes.set_title(f"mode:size, ranks on edges; {structure.parameters} parameters of {structure.entries}")
    axes.axis("off")
    _save(figure, path)


def plot_pareto(result: Result, path: str | os.PathLike[str]) -> None:
    """Plot every fit, the front, and the best."""
    figure = _figure()
    axes = figure.add_subplot()
    floor = 1e-16
    axes.scatter(
        [network.parameters for network in result.networks],
        [max(network.rse, floor) for network in result.networks],
        s=12,
        color="tab:grey",
        label="fitted",
    )
    front = result.pareto()
    axes.step(
        [network.parameters for network in front],
        [max(network.rse, floor) for network in front],
        where="post",
        color="tab:blue",
        label="best error at this size",
    )
    axes.scatter([result.best.parameters], [max(result.best.rse, floor)], color="tab:red", zorder=3, label="best")
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="squared relative error (RSE)")
    axes.legend()
    _save(figure, path)


def plot_comparison(results: Mapping[str, Result], path: str | os.PathLike[str]) -> None:
    """Plot the best objective against the evaluations made, a line a method."""
    figure = _figure()
    axes = figure.add_subplot()
    for name, result in results.items():
        best = np.minimum.accumulate([record.objective for record in result.history])
        axes.step(np.arange(1, len(best) + 1), best, where="post", label=name)
    axes.set(xscale="log", xlabel="evaluations", ylabel="best objective")
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    temporary = path.with_name("partial." + path.name)
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
