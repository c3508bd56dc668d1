"""Canonical weights: NumPy arrays under dotted names, in PyTorch's layout.

``weight`` of a CoordConv is its one kernel over features and coordinates, see
:mod:`coordconv.weights.kernels`; of a linear layer it is ``(out, in)``; ``bias`` is ``(out,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coordconv.grid import Array
from coordconv.networks import Conv, Network
from coordconv.networks import Weights as Weights
from coordconv.weights.kernels import KernelLayout, same_channels


def layouts(network: Network) -> dict[str, KernelLayout]:
    """The layout of each CoordConv's kernel, by the layer's name."""
    return {
        layer.name: KernelLayout(
            layer.coords, layer.in_channels, layer.geometry.groups, layer.geometry.transposed
        )
        for layer in network.layers
        if isinstance(layer, Conv) and layer.coords
    }


def checked(
    mapping: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, KernelLayout],
    sources: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """The arrays of ``mapping`` as a module wants them, or one ValueError with all problems.

    ``shapes`` are the canonical ones that it wants, by name, ``layouts`` those of its CoordConvs'
    kernels, by layer, and ``sources`` what an error calls an array's origin. The Coordinates of
    :class:`Weights` must be the module's: the same set in another order is put in its order.

    Example:
        >>> checked({"weights": np.ones((2, 2))}, {"weight": (2, 2)}, {})
        Traceback (most recent call last):
        ...
        ValueError: cannot import weights:
          missing: weight, shape (2, 2)
          unexpected: weights, shape (2, 2)
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"weights must be a mapping of names to arrays, got {type(mapping)}")
    arrays = {name: np.asarray(array) for name, array in mapping.items()}
    kernels = {f"{layer}.weight".lstrip("."): layer for layer in layouts}
    problems = [
        f"missing: {name}, shape {shape}" for name, shape in shapes.items() if name not in arrays
    ]
    for name, array in arrays.items():
        shown = f"{name} (from {sources[name]})" if sources and name in sources else name
        if name not in shapes:
            problems.append(f"unexpected: {shown}, shape {array.shape}")
        elif array.shape != shapes[name]:
            problem = f"wrong shape: {shown} is {array.shape}, want {shapes[name]}"
            layout = layouts[kernels[name]] if name in kernels else None
            if (
                layout
                and layout.channels
                and array.ndim > 1
                and array.shape[layout.axis] != layout.width
            ):
                problem += (
                    f": {array.shape[layout.axis]} input channels, where features and coordinates "
                    f"have {layout.width}, and features alone {layout.plain_width}"
                )
            problems.append(problem)
        elif array.dtype.kind != "f":
            problems.append(f"not floating-point: {shown} is {array.dtype}")
    for name, layer in kernels.items():
        wanted = layouts[layer].coords
        given = getattr(mapping, "coordinates", {}).get(layer, wanted)
        if not same_channels(given, wanted):
            problems.append(f"other coordinates: {name} was made for {given}, want {wanted}")
        elif not problems:
            arrays[name] = layouts[layer].reordered(arrays[name], given)
    if problems:
        raise ValueError("\n  ".join(["cannot import weights:", *problems]))
    return {name: arrays[name] for name in shapes}
