"""Cores for a structure from those of a neighbouring one."""

from __future__ import annotations

import torch

from tnss.network import Network
from tnss.structure import Structure

NOISE = 0.05  # of a fresh slice, relative to the root mean square of its core


def warm_cores(parent: Network, structure: Structure, generator: torch.Generator) -> tuple[torch.Tensor, ...] | None:
    """Start cores for ``structure`` that begin where ``parent`` ended.

    Bonds that both have are kept, truncated (singular value decomposition of the two cores joined) or padded
    with a little noise; bonds that only ``structure`` has are opened with noise.

    Returns:
        Cores with ``structure.core_shapes``, or None where so many bonds differ that nothing of the parent
        would survive.
    """
    if parent.structure.vertices != structure.vertices or parent.structure.sizes != structure.sizes:
        return None
    old = {edge[:2]: edge[2] for edge in parent.structure.edges}
    new = {edge[:2]: edge[2] for edge in structure.edges}
    if len(old.keys() - new.keys()) > 1:
        return None
    cores = [core.to("cpu", torch.float64) for core in parent.cores]
    names = [[parent.structure.edges[e][:2] for e in incident] for incident in parent.structure.incident]
    for edge, rank in old.items():
        wanted = new.get(edge, 1)
        if wanted < rank:
            _truncate(cores, names, edge, wanted)
    result = []
    for vertex, core in enumerate(cores):
        wanted_names = [structure.edges[e][:2] for e in structure.incident[vertex]]
        for name in wanted_names:
            if name not in names[vertex]:
                core = core[None]
                names[vertex].insert(0, name)
        keep = [names[vertex].index(name) for name in wanted_names]
        gone = [axis for axis in range(len(names[vertex])) if axis not in keep]
        rest = range(len(names[vertex]), core.ndim)
        core = core.permute(*gone, *keep, *rest).flatten(0, len(gone)) if gone else core.permute(*keep, *rest)
        shape = structure.core_shapes[vertex]
        scale = NOISE * core.norm() / core.numel() ** 0.5
        fresh = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        fresh[tuple(slice(size) for size in core.shape)] = core
        result.append(fresh)
    return tuple(result)


def _truncate(cores: list[torch.Tensor], names: list[list[tuple[int, int]]], edge: tuple[int, int], rank: int) -> None:
    """Reduce one bond to ``rank`` with the least change of its two cores joined; in place in the list."""
    ends = []
    for vertex in edge:
        axis = names[vertex].index(edge)
        moved = cores[vertex].movedim(axis, -1)
        ends.append((vertex, axis, moved.shape[:-1], moved.reshape(-1, moved.shape[-1])))
    (_, _, _, left), (_, _, _, right) = ends
    left_q, left_r = torch.linalg.qr(left)
    right_q, right_r = torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    rank_kept = min(rank, len(s))
    root = s[:rank_kept].sqrt()
    halves = (left_q @ u[:, :rank_kept] * root, right_q @ vh[:rank_kept].T * root)
    for (vertex, axis, shape, _), half in zip(ends, halves, strict=True):
        cores[vertex] = half.reshape(*shape, rank_kept).movedim(-1, axis)
