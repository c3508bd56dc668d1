"""``fuse`` of each backend without a framework: what it replaces, and what it reports."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from coordconv.geometry import is_int
from coordconv.grid import Array
from coordconv.layers import CoordLayer
from coordconv.tape import refuse_computed, to_numpy

MOST_MAPS = 8  # of the last sizes
Named = Sequence[tuple[str, Any]]  # all modules of a network; one in two places has both names


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


def folded_parameters(
    layer: Any,
    norm: Any,
    mean: Any,
    variance: Any,
    epsilon: float,
    tensor: Callable[[Array, Any], Any],
) -> tuple[Any, Any]:
    """:func:`folded` for a layer and a norm of PyTorch or Paddle: the layer's weight and bias.

    ``tensor(array, like)`` is a tensor of the type of ``like``, and where that is.
    """
    mean, layout = to_numpy(mean), layer.layout
    scale = np.ones_like(mean) if norm.weight is None else to_numpy(norm.weight)
    shift = np.zeros_like(mean) if norm.bias is None else to_numpy(norm.bias)
    found = folded(
        layer.export_weights(),
        (mean, to_numpy(variance), scale, shift),
        epsilon,
        groups=layout.groups,
        transposed=layout.transposed,
    )
    return tensor(found["weight"], layer.weight), tensor(found["bias"], layer.weight)


def latest(maps: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """The map for a key: one of the last few, or made now, in place of the oldest."""
    found = maps.get(key)
    if found is None:  # threads may both make one, and find another evicted
        for oldest in [*maps][: 1 - MOST_MAPS]:
            maps.pop(oldest, None)
        found = maps[key] = make()
    return found


def example(size: Any, array: Any, make: Callable[[], Any]) -> tuple[Any, ...]:
    """A network's arguments for ``size`` as ``fuse`` takes it: ``make()`` for a spatial shape."""
    if isinstance(size, array):
        return (size,)
    if not isinstance(size, Sequence) or isinstance(size, str) or not size:
        raise TypeError(f"size must be a spatial shape or an example of the input, got {size!r}")
    if not all(is_int(each) and not isinstance(each, array) for each in size):
        return tuple(size)
    return (make(),)


def check_layer(layer: Any, steps: Sequence[str] = ("forward",)) -> None:
    """ValueError for a layer in training, or one of which something would be lost or be old.

    ``steps`` are the methods that compute, which a subclass or the layer itself may have anew.
    """
    if layer.training:
        raise ValueError("a layer must be in evaluation mode to be fused: call eval() first")
    for name in steps:
        step = vars(layer).get(name) or getattr(type(layer), name)
        if not step.__module__.startswith("coordconv.backends."):
            raise ValueError(
                f"{type(layer).__name__} has a {name} of its own, which would be lost: use the "
                "CoordConv inside a module instead"
            )
    refuse_computed(layer)
    if has_hooks(layer):
        raise ValueError(
            "a layer must have no forward hooks to be fused, which might change its output: remove "
            "them by their handles, and register them anew on the fused layer"
        )


def checked_size(size: Any, rank: int) -> tuple[int, ...]:
    """A spatial shape as a tuple of ints."""
    if not isinstance(size, Iterable):
        raise TypeError(f"size must be a spatial shape, got {size!r}")
    given = tuple(size)
    if len(given) != rank or not all(map(is_int, given)):
        raise ValueError(f"size must have {rank} lengths, got {given}")
    return tuple(map(int, given))


def layers_to_fuse(named: Named, batch_norms: tuple[type, ...]) -> dict[str, Any]:
    """The CoordConvs of a network by their first names; ValueError if it is not ready for it."""
    found: dict[int, tuple[str, Any]] = {}
    for name, each in named:
        if isinstance(each, CoordLayer):
            found.setdefault(id(each), (name, each))
    if not found:
        raise ValueError("model has no CoordConv to fuse")
    for name, each in named:
        if each.training and isinstance(each, (CoordLayer, *batch_norms)):
            raise ValueError(
                f"model must be in evaluation mode, {name!r} is not: call model.eval()"
            )
    return dict(found.values())


def neighbours(named: Named, sequence: type, anywhere: bool = False) -> dict[str, str]:
    """What is right behind each module, in a ``sequence`` of modules that run one by one.

    What stands twice, such as one ReLU, still stands between others. The network has to be such a
    sequence, and all around those inside, as another module may run the parts of one by itself, to
    take what comes in between; sequences ``anywhere`` are to be checked with
    :func:`followed_alone`.
    """
    pairs: dict[str, str] = {}
    modules = dict(named)
    for prefix, each in named:
        parts = prefix.split(".") if prefix else []
        around = [] if anywhere else [modules[".".join(parts[:i])] for i in range(len(parts))]
        if all(type(one) is sequence for one in (*around, each)):
            start = f"{prefix}." if prefix else ""
            inside = [n for n, _ in named if n.startswith(start) and "." not in n[len(start) :]]
            pairs |= pairwise(n for n in inside if n)
    return pairs


def has_hooks(module: Any) -> bool:
    """Whether forward hooks may change what a module of PyTorch or Paddle computes."""
    names = "_forward_hooks", "_forward_pre_hooks", "_forward_post_hooks"
    return any(vars(module).get(name) for name in names)


def followed_once(
    named: Named, pairs: Mapping[str, str], batch_norms: tuple[type, ...]
) -> dict[str, str]:
    """Of modules and what follows, CoordConvs and batch normalizations that are in one place alone.

    The very classes of ``batch_norms``, as a subclass may compute anything; without hooks, and
    without a ``forward`` of the instance's own.
    """
    modules, times = dict(named), Counter(id(each) for _, each in named)
    return {
        name: after
        for name, after in pairs.items()
        if isinstance(modules[name], CoordLayer)
        and type(modules[after]) in batch_norms
        and not has_hooks(modules[after])
        and "forward" not in vars(modules[after])
        and times[id(modules[name])] == times[id(modules[after])] == 1
    }


def fused_copy(
    model: Any,
    named: Named,
    layers: Mapping[str, Any],
    pairs: Mapping[str, str],
    notes: tuple[str, ...],
    sizes: Mapping[str, tuple[int, ...]],
    fold: Callable[[Any, Any], tuple[Any, Any]],
) -> Any:
    """A copy of a network with each of ``layers`` fused, for its size if ``sizes`` has one.

    A layer with a norm in ``pairs`` gets the weight and bias that ``fold(layer, norm)`` returns,
    and an identity stands in place of the norm. The copy is made with them in its memo, so that
    they are wherever the network refers to what they replace, also in lists of its own.
    """
    modules, rows, memo = dict(named), [], {}
    for name, layer in layers.items():
        weight, bias = layer.weight, layer.bias
        if name in pairs:
            norm = modules[pairs[name]]
            weight, bias = fold(layer, norm)
            memo[id(norm)] = layer.CONVERSION.framework.nn.Identity()
        memo[id(layer)] = made = layer.FUSED(layer, sizes.get(name), weight, bias)
        rows.append(FusedLayer(name, type(layer).__name__, made.size, pairs.get(name)))
    copied = copy.deepcopy(model, memo)
    copied.fuse_report = FuseReport(tuple(rows), notes)
    return copied


Poison: TypeAlias = Callable[[Sequence[int]], Array]  # of a shape


def followed_alone(
    pairs: Mapping[str, str], outputs: Callable[[Mapping[str, str], Poison], Sequence[Array]]
) -> dict[str, str]:
    """Of layers and what takes their output, those whose output nothing else takes.

    For frameworks without a graph that names a network's layers. ``outputs(poisoned, poison)`` runs
    the network, with ``poison(shape)`` as the output of each layer in ``poisoned`` for everything
    but its partner there, which is given what the layer computed. If a poison changes what the
    network returns, something else saw it. Nothing is shown by a network that returns nothing, or
    NaN anyway.
    """
    wanted = outputs({}, _POISONS[0])
    if not any(each.size for each in wanted) or any(np.isnan(each).any() for each in wanted):
        return {}

    def unchanged(poisoned: Mapping[str, str]) -> bool:
        for poison in _POISONS:
            found = outputs(poisoned, poison)
            if len(found) != len(wanted) or not all(
                np.array_equal(one, other, equal_nan=True)
                for one, other in zip(found, wanted, strict=True)
            ):
                return False
        return True

    if unchanged(pairs):
        return dict(pairs)
    return {layer: after for layer, after in pairs.items() if unchanged({layer: after})}


def _poison(factor: float, shape: Sequence[int]) -> Array:
    found: Array = np.random.default_rng(0).uniform(-1, 1, shape) * factor
    return found


# Each shows uses that the others do not. NaN spreads to all numbers that are computed from it, but
# is above no bound and is no maximum. Large numbers are both, at different places with either sign;
# 16 bits hold numbers of this size.
_POISONS = tuple(partial(_poison, factor) for factor in (np.nan, 2.0**14, -(2.0**14)))
