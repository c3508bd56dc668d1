"""Weights of other implementations, as canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, TypeAlias, get_args

import numpy as np

from coordconv import networks
from coordconv.grid import Array
from coordconv.weights.canonical import Weights, checked, layouts
from coordconv.weights.kernels import Position, check_position, fit_state, take_nested

Layout: TypeAlias = Literal["oihw", "hwio"]


def adopt(
    arrays: Mapping[str, Array],
    network: str | networks.Network,
    *,
    layout: Layout,
    names: Mapping[str, str] | None = None,
    position: Position = "last",
) -> Weights:
    """The canonical weights in the arrays of another implementation of a network.

    Args:
        arrays: by name. The kernel of a CoordConv is over features and coordinates, or a plain
            convolution's, over the features alone: the coordinates' part is then zero.
        network: whose CoordConvs have that implementation's coordinates; see
            :meth:`coordconv.networks.Network.with_coordinates`.
        layout: of the kernels: ``"oihw"`` for ``(out, in, *S)``, as in PyTorch and Paddle, or
            ``"hwio"`` for ``(*S, in, out)``, as in Keras; ``hw`` stands for the spatial axes,
            whatever their number. A transposed convolution's are laid out as those of the
            convolution whose gradient it is. With ``"hwio"`` a linear layer's kernel is
            ``(in, out)``, and the first after a ``Flatten`` reads features whose channels came
            last; with ``"oihw"`` it is ``(out, in)``, as in PyTorch.
        names: theirs to ours, such as ``{"conv2d_1/kernel:0": "conv1.weight"}``; what is not in it
            is called the same. None is for arrays that are all called as ours, or else stand in
            the order of the layers, kernels and biases each. Beware that HDF5 lists ``conv2d_10``
            before ``conv2d_2``.
        position: ``"last"`` if the coordinates come after the features of each group, ``"first"``
            if before, as in SparseInst, CondInst and CAM-Convs.

    Returns:
        New arrays by dotted name, with the network's Coordinates.

    Raises:
        TypeError: ``arrays`` is not a mapping.
        ValueError: an unknown ``network``, ``layout`` or ``position``; ``names`` with a name that
            ``arrays`` lack, or with two for one; every array that is missing, unexpected, of the
            wrong shape or not floating-point.

    Example:
        >>> keras = networks.get("coord_classifier").with_coordinates("yx")
        >>> widths = [4, 32, 32, 64, 64, 1]
        >>> shapes = [(1, 1, *pair) for pair in zip(widths, widths[1:])]
        >>> arrays = {f"conv2d_{i}/kernel:0": np.zeros(s) for i, s in enumerate(shapes)}
        >>> arrays |= {f"conv2d_{i}/bias:0": np.zeros(s[-1]) for i, s in enumerate(shapes)}
        >>> adopt(arrays, keras, layout="hwio")["conv1.weight"].shape
        (32, 4, 1, 1)
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays must be a mapping of names to arrays, got {type(arrays)}")
    network = networks.get(network)
    if names is None:
        shapes = network.weight_shapes()
        called_as_ours = _without_nesting(arrays, network).keys() <= shapes.keys()
        names = {} if called_as_ours else _by_order(arrays, shapes)
    sources = {ours: repr(theirs) for theirs, ours in names.items()}
    renamed = _without_nesting(_renamed(arrays, names), network)
    made_for = getattr(arrays, "coordinates", {})  # by layer, which may have another name here
    layers = {theirs.rpartition(".")[0]: ours.rpartition(".")[0] for theirs, ours in names.items()}
    coordinates = {layers.get(layer, layer): coords for layer, coords in made_for.items()}
    if layout == "hwio":
        for name, kernel in _from_hwio(renamed, network).items():
            origin = sources.get(name, repr(name))
            sources[name] = f"{origin} of shape {np.shape(renamed[name])}"
            renamed[name] = kernel
    given = Weights(renamed, coordinates)
    return fitted(given, network, position=position, sources=sources)


def fitted(
    arrays: Mapping[str, Array],
    network: networks.Network,
    *,
    position: Position = "last",
    sources: Mapping[str, str] | None = None,
) -> Weights:
    """New arrays, as :func:`checked` wants them, from arrays under canonical names.

    A kernel may be a plain convolution's, or under ``conv.weight``. The Coordinates of
    :class:`Weights` are checked, too: such are canonical, with the coordinates last.
    """
    check_position(position)
    coordinates, kernels = getattr(arrays, "coordinates", {}), layouts(network)
    if position == "first" and coordinates.keys() & kernels.keys():
        raise ValueError(
            "position must be 'last' for weights that carry their Coordinates: these are "
            "canonical, with the coordinates after the features"
        )
    found = Weights(_without_nesting(arrays, network), coordinates)
    for layer, layout in kernels.items():
        with suppress(ValueError):  # what does not fit is told of with all other problems
            fit_state(
                found, f"{layer}.", layout, np.concatenate, _zeros, nested=False, position=position
            )
    ready = checked(found, network.weight_shapes(), kernels, sources)
    return Weights.of(network, {name: array.copy() for name, array in ready.items()})


def _without_nesting(arrays: Mapping[str, Array], network: networks.Network) -> dict[str, Array]:
    """The same, but ``conv.weight`` of a CoordConv is called ``weight``."""
    found, names = dict(arrays), {layer.name for layer in network.layers}
    for layer in layouts(network):
        if f"{layer}.conv" not in names:
            take_nested(found, f"{layer}.")
    return found


def _from_hwio(arrays: Mapping[str, Array], network: networks.Network) -> dict[str, Array]:
    """The kernels of all layers in canonical layout, from ``hwio``."""
    found = {}
    flattened: tuple[int, ...] | None = None
    for layer, before, _ in network.shapes():
        if isinstance(layer, networks.Flatten):
            flattened = before
        name = f"{layer.name}.weight"
        if np.ndim(arrays.get(name, 0)) < 2:
            continue
        kernel = np.moveaxis(np.asarray(arrays[name]), (-1, -2), (0, 1))
        if isinstance(layer, networks.Linear) and flattened:
            if kernel.shape == layer.weight_shapes()["weight"]:
                # Its inputs were flattened with the channels last.
                kernel = kernel.reshape(-1, *flattened[1:], flattened[0])
                kernel = np.moveaxis(kernel, -1, 1).reshape(len(kernel), -1)
            flattened = None
        found[name] = kernel
    return found


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return np.zeros(shape, np.asarray(like).dtype)


def _by_order(arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Names for ``adopt``: kernels have two axes and more, and the others are biases."""
    names: dict[str, str] = {}
    for kernels in (True, False):
        theirs = (name for name, array in arrays.items() if (np.ndim(array) > 1) == kernels)
        ours = (name for name, shape in shapes.items() if (len(shape) > 1) == kernels)
        names |= zip(theirs, ours, strict=False)  # what is left over, checked tells
    return names


def _renamed(arrays: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    renamed: dict[str, Array] = {}
    problems = [f"not among the arrays: {theirs!r}" for theirs in names if theirs not in arrays]
    for theirs, array in arrays.items():
        ours = names.get(theirs, theirs)
        if ours in renamed:
            problems.append(f"two arrays for {ours!r}: {theirs!r} and another")
        renamed[ours] = array
    if problems:
        raise ValueError("\n  ".join(["names do not fit the arrays:", *problems]))
    return renamed
