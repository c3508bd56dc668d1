"""What ``fuse`` of each backend reports: which layers of a network it replaced, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coordconv.grid import Array


@dataclass(frozen=True)
class FusedLayer:
    """One layer that was replaced.

    Args:
        name: the layer's name in the network; ``""`` if it is the network itself.
        kind: the class that was there.
        size: the spatial shape that the layer's one map is for; None if maps are made as inputs
            come.
        batch_norm: the name of the batch normalization that was folded into the layer, if any.
    """

    name: str
    kind: str
    size: tuple[int, ...] | None = None
    batch_norm: str | None = None


@dataclass(frozen=True)
class FuseReport:
    """What was replaced, a line a layer, and what could not be done and why.

    Example:
        >>> print(FuseReport((FusedLayer("stem", "CoordConv2d", (64, 48), "bn1"),)))
        stem  CoordConv2d  one map for 64x48  folded bn1
    """

    layers: tuple[FusedLayer, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(itself)",
                layer.kind,
                f"one map for {'x'.join(map(str, layer.size))}"
                if layer.size
                else "maps as they come",
                f"folded {layer.batch_norm}" if layer.batch_norm else "",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])


def folded(
    weights: Mapping[str, Array],
    statistics: Sequence[Array],
    epsilon: float,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> dict[str, Array]:
    """A layer's canonical weights, with the batch normalization after the layer folded in.

    ``statistics`` are the mean, the variance, the scale and the shift of the outputs, each
    ``(out,)``. Computed in float64, and rounded once.
    """
    mean, variance, scale, shift = (np.asarray(each, np.float64) for each in statistics)
    factor = scale / np.sqrt(variance + epsilon)
    weight = weights["weight"]
    if transposed:  # (inputs, out / groups, *kernel), group by group
        parts = zip(np.split(weight, groups), np.split(factor, groups), strict=True)
        each = [part * f.reshape(1, -1, *(1,) * (weight.ndim - 2)) for part, f in parts]
        product = np.concatenate(each)
    else:
        product = weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))
    bias = (weights.get("bias", 0.0) - mean) * factor + shift
    return {"weight": product.astype(weight.dtype), "bias": bias.astype(weight.dtype)}


def followed_alone(
    pairs: Mapping[str, str], outputs: Callable[[Mapping[str, str]], Sequence[Array]]
) -> dict[str, str]:
    """Of layers and what takes their output, those whose output nothing else takes.

    For frameworks without a graph that names a network's layers. ``outputs(poisoned)`` runs the
    network, with NaN as the output of each layer in ``poisoned`` for everything but its partner
    there, which is given what the layer computed. If NaN changes what the network returns,
    something else saw it.
    """
    wanted = outputs({})

    def unchanged(poisoned: Mapping[str, str]) -> bool:
        found = outputs(poisoned)
        return len(found) == len(wanted) and all(
            np.array_equal(one, other, equal_nan=True)
            for one, other in zip(found, wanted, strict=True)
        )

    if unchanged(pairs):
        return dict(pairs)
    return {layer: after for layer, after in pairs.items() if unchanged({layer: after})}
