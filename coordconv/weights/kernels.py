"""The one kernel of a CoordConv: where its features and its coordinates lie.

A CoordConv has the kernel of a convolution over ``C + groups * n`` channels, in canonical layout
``(out, C / groups + n, *kernel)``, of a transposed layer ``(C + groups * n, out / groups,
*kernel)``. In each group the coordinates come after the features.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.functions import Channel, Function, Given, name_of
from coordconv.geometry import is_int
from coordconv.grid import Array

POSITIONS = ("last", "first")
Position: TypeAlias = Literal["last", "first"]
# A framework's: of arrays along an axis; of a shape, with the type and device of an array.
Concatenate: TypeAlias = Callable[[list[Any], int], Any]
Zeros: TypeAlias = Callable[[tuple[int, ...], Any], Any]


@dataclass(frozen=True)
class KernelLayout:
    """Where features and coordinates lie in a CoordConv's canonical kernel, of any framework."""

    coords: Coordinates
    channels: int  # C, the features of all groups
    groups: int = 1
    transposed: bool = False

    @property
    def axis(self) -> int:
        """The axis of the kernel that holds the input channels."""
        return 0 if self.transposed else 1

    @property
    def features(self) -> int:
        """The number of features of a group."""
        return self.channels // self.groups

    @property
    def plain_width(self) -> int:
        """The length of :attr:`axis` in a plain convolution's kernel."""
        return self.channels if self.transposed else self.features

    @property
    def width(self) -> int:
        """The length of :attr:`axis`: features and coordinates, of all groups if transposed."""
        return self.plain_width + len(self.coords) * (self.groups if self.transposed else 1)

    def split(self, kernel: Any) -> tuple[Any, Any]:
        """The features' part, as a plain convolution's kernel, and ``(out, n, *kernel size)``.

        These are views where there can be.
        """
        n = self.features
        if not self.transposed:
            return kernel[:, :n], kernel[:, n:]
        if self.groups == 1:
            return kernel[:n], kernel[n:].swapaxes(0, 1)
        grouped = self._grouped(kernel)
        features, coordinates = grouped[:, :n], grouped[:, n:].swapaxes(1, 2)
        return self._ungrouped(features), self._ungrouped(coordinates)

    def join(self, features: Any, coordinates: Any, concatenate: Concatenate) -> Any:
        """The inverse of :meth:`split`."""
        if not self.transposed:
            return concatenate([features, coordinates], 1)
        parts = [self._grouped(features), self._grouped(coordinates).swapaxes(1, 2)]
        return self._ungrouped(concatenate(parts, 1))

    def _grouped(self, array: Any) -> Any:
        return array.reshape((self.groups, -1, *tuple(array.shape[1:])))

    def _ungrouped(self, array: Any) -> Any:
        return array.reshape((-1, *tuple(array.shape[2:])))

    def reordered(self, kernel: Any, found: Coordinates) -> Any:
        """A kernel made for the same coordinates in another order, in this order."""
        if found.names == self.coords.names:
            return kernel
        order = [self.features + found.names.index(name) for name in self.coords.names]
        return self._picked(kernel, np.array([*range(self.features), *order]))

    def moved(self, kernel: Any, position: Position) -> Any:
        """The coordinates of each group moved to this end of it from the other."""
        steps = len(self.coords) if position == "first" else -len(self.coords)
        return self._picked(kernel, np.roll(np.arange(self.features + len(self.coords)), steps))

    def _picked(self, kernel: Any, order: Array) -> Any:
        """The input channels of each group in another order."""
        if self.transposed:
            starts = np.arange(self.groups) * len(order)
            return kernel[(starts[:, None] + order).ravel()]
        return kernel[:, order]

    def fitted(
        self, kernel: Any, concatenate: Concatenate, zeros: Zeros, position: Position = "last"
    ) -> Any:
        """A kernel in this layout from one with its coordinates at ``position``.

        A plain convolution's gets zeros for the coordinates' part. ValueError if the number of
        input channels fits neither.
        """
        shape = tuple(int(length) for length in kernel.shape)
        if shape[self.axis] == self.width:
            return kernel if position == "last" else self.moved(kernel, "last")
        if shape[self.axis] != self.plain_width:
            raise ValueError(
                f"a kernel must have {self.width} input channels (features and coordinates) or "
                f"{self.plain_width} (features alone) on axis {self.axis}, got {shape[self.axis]} "
                f"in shape {shape}"
            )
        out = shape[1] * self.groups if self.transposed else shape[0]
        coordinates = zeros((out, len(self.coords), *shape[2:]), kernel)
        return self.join(kernel, coordinates, concatenate)


def same_channels(one: Coordinates, other: Coordinates) -> bool:
    """Whether two Coordinates differ at most in the order of their channels.

    Functions and maps are the same if their names and axes are, as a file keeps no more. A map that
    names no axes has all of the grid, whose number is not known here.
    """
    if {*one.names} != {*other.names} or replace(one, channels=other.channels) != other:
        return False
    by_name = {name_of(channel): channel for channel in other.channels}
    return all(_are_alike(channel, by_name[name_of(channel)]) for channel in one.channels)


def _are_alike(one: Channel, other: Channel) -> bool:
    """Whether two channels of one name are of one kind, and have the same axes."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    unsaid = isinstance(one, Given) and None in (one.axes, other.axes)
    return type(one) is type(other) and (unsaid or one.axes == other.axes)


def check_position(position: str) -> None:
    """Raise ValueError if a ``position`` is neither of the two words."""
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {POSITIONS}, got {position!r}")


def fit_state(
    state: MutableMapping[str, Any],
    prefix: str,
    layout: KernelLayout,
    concatenate: Concatenate,
    zeros: Zeros,
    *,
    nested: bool = True,
    position: Position = "last",
) -> None:
    """Give a state, in place, the names (with ``nested``) and the kernel of one layer of ours.

    The ``prefix`` is the layer's name with its dot, or nothing.
    """
    check_position(position)
    if nested:
        take_nested(state, prefix)
    name = f"{prefix}weight"
    if _is_kernel(state.get(name)):  # else it is refused with whatever else does not fit
        try:
            state[name] = layout.fitted(state[name], concatenate, zeros, position)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def take_nested(state: MutableMapping[str, Any], prefix: str) -> None:
    """Let ``conv.weight`` and ``conv.bias`` under a layer's prefix stand for the layer's own.

    They replace those without ``conv``: walsvid's layers are themselves convolutions, beside the
    one inside, and save that kernel, too, which they never use.
    """
    for name in ("weight", "bias"):
        inner = f"{prefix}conv.{name}"
        if inner in state:
            state[f"{prefix}{name}"] = state.pop(inner)


def split_kernel(
    weight: Array,
    coords: CoordinatesLike,
    groups: int = 1,
    transposed: bool = False,
    *,
    position: Position = "last",
) -> tuple[Array, Array]:
    """Split a kernel over features and coordinates into its two parts.

    Args:
        weight: ``(out, C / groups + n, *kernel)``, transposed ``(C + groups * n, out / groups,
            *kernel)``, of one to three spatial axes.
        coords: the coordinate channels, or None for all axes.
        groups: of the convolution; each has all coordinates.
        transposed: whether it is a transposed convolution.
        position: ``"last"`` if the coordinates come after the features of each group, ``"first"``
            if before, as SparseInst, CondInst and CAM-Convs save them.

    Returns:
        New arrays, a plain convolution's kernel and the coordinates' part ``(out, n, *kernel)``.

    Raises:
        TypeError, ValueError: ``groups`` that are no int, or a shape that does not fit.

    Example:
        >>> features, coordinates = split_kernel(np.zeros((32, 16 + 2, 3, 3)), "yx")
        >>> features.shape, coordinates.shape
        ((32, 16, 3, 3), (32, 2, 3, 3))
    """
    check_position(position)
    weight = _checked("weight", weight, groups, transposed)
    coordinates = Coordinates.resolve(coords, weight.ndim - 2)
    features = (weight.shape[0] // groups if transposed else weight.shape[1]) - len(coordinates)
    if features < 1:
        raise ValueError(
            f"weight must have more than the {len(coordinates)} coordinates among the input "
            f"channels of a group, got {features + len(coordinates)} in shape {weight.shape}"
        )
    layout = KernelLayout(coordinates, features * groups, groups, transposed)
    parts = layout.split(weight if position == "last" else layout.moved(weight, "last"))
    return parts[0].copy(), parts[1].copy()


def join_kernel(
    features: Array,
    coordinates: Array,
    groups: int = 1,
    transposed: bool = False,
    *,
    position: Position = "last",
) -> Array:
    """The kernel over features and coordinates, a new array: the inverse of :func:`split_kernel`.

    The ``features`` are a plain convolution's kernel, ``(out, C / groups, *kernel)``, transposed
    ``(C, out / groups, *kernel)``; the ``coordinates`` ``(out, n, *kernel)``. The other arguments
    and the errors are those of :func:`split_kernel`.

    Example:
        >>> join_kernel(np.zeros((32, 16, 3, 3)), np.zeros((32, 2, 3, 3))).shape
        (32, 18, 3, 3)
    """
    check_position(position)
    features = _checked("features", features, groups, transposed)
    coordinates = np.asarray(coordinates)
    first, second, *size = features.shape
    channels, out = (first, second * groups) if transposed else (second * groups, first)
    n = coordinates.shape[1] if coordinates.ndim > 1 else 0
    if not n or coordinates.shape != (out, n, *size):
        wanted = ", ".join(map(str, (out, "n", *size)))
        raise ValueError(f"coordinates must have shape ({wanted}), got {coordinates.shape}")
    # Which coordinates they are does not matter here, but how many.
    coords = Coordinates([Function(f"channel {i}", "x") for i in range(n)])
    layout = KernelLayout(coords, channels, groups, transposed)
    joined: Array = layout.join(features, coordinates, np.concatenate)
    return joined if position == "last" else layout.moved(joined, "first")


def _checked(name: str, kernel: Array, groups: int, transposed: bool) -> Array:
    """A kernel as an array, if it has a kernel's axes and that many groups."""
    kernel = np.asarray(kernel)
    if not _is_kernel(kernel):
        raise ValueError(f"{name} must have 1 to 3 spatial axes and 2 more, got {kernel.shape}")
    if not is_int(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or len(kernel) % groups:
        channels = f"{len(kernel)} {'input' if transposed else 'output'} channels"
        raise ValueError(f"groups must divide the kernel's {channels}, got {groups}")
    return kernel


def _is_kernel(array: Any) -> bool:
    return 3 <= len(getattr(array, "shape", ())) <= 5
