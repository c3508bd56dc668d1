"""Channels of a user's own: functions of the coordinates, and maps that are given."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

AXES = "xyz"  # the last axis first
TOKENS = frozenset(AXES + "r")

Array: TypeAlias = npt.NDArray[Any]


def grid_axes(tokens: str, rank: int) -> tuple[int, ...]:
    """The axes of a grid that some of the tokens x, y, z name, in the order of the grid."""
    return tuple(axis for axis in range(rank) if AXES[rank - 1 - axis] in tokens)


@dataclass(frozen=True)
class Function:
    """A channel that is a function of the coordinates, computed by NumPy.

    Two are the same channel if name, axes and ``fn`` are the same. A file of weights keeps name and
    axes alone: coordinates that are read from one have no ``fn``, and match a layer's by these.

    Args:
        name: what files and error messages call it.
        axes: the tokens of the axes whose coordinates it takes, in the order of its arguments.
        fn: takes an array for each axis, float64 and all of one shape, and returns one of this
            shape. It is called once for each size, with a window at every call: so it follows no
            size that a compiled or exported program leaves open.

    Raises:
        TypeError: a name that is no string; ``fn`` that cannot be called.
        ValueError: no name, or the name of a token; axes that are not different ones of x, y and z.

    Example:
        >>> from coordconv import Coordinates, coordinate_grid
        >>> squared = Function("y squared", "y", np.square)
        >>> coordinate_grid((3, 2), Coordinates(["x", squared]))[1]
        array([[1., 1.],
               [0., 0.],
               [1., 1.]], dtype=float32)
    """

    name: str
    axes: str
    fn: Callable[..., Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_axes(self.axes)
        if self.fn is not None and not callable(self.fn):
            raise TypeError(f"fn of {self.name!r} must be a function, got {self.fn!r}")

    def __call__(self, coordinates: Sequence[Array]) -> Array:
        """The channel, of the coordinates of its axes in its own order, which broadcast."""
        if self.fn is None:
            raise ValueError(
                f"the function {self.name!r} is known by its name alone, as it comes from a file: "
                f"make the coordinates with Function({self.name!r}, {self.axes!r}, fn)"
            )
        given = [each.astype(np.float64) for each in np.broadcast_arrays(*coordinates)]
        found = _numbers(f"the function {self.name!r} must return", self.fn(*given))
        if found.shape != given[0].shape:
            raise ValueError(
                f"the function {self.name!r} must return an array of its arguments' shape "
                f"{given[0].shape}, got {found.shape}"
            )
        return found


@dataclass(frozen=True)
class Wave:
    """The sine or cosine of a coordinate: a function that can be compared and pickled."""

    of: str
    frequency: float

    def __call__(self, coordinate: Array) -> Array:
        found: Array = {"sin": np.sin, "cos": np.cos}[self.of](self.frequency * coordinate)
        return found


def fourier(
    axes: str = "xy", bands: int = 6, *, frequencies: Sequence[float] | None = None
) -> tuple[Function, ...]:
    """Sines and cosines of each axis, as NeRF and vision transformers encode positions.

    Args:
        axes: the tokens of the axes.
        bands: how many frequencies: pi, 2 pi, 4 pi, ... radians for each unit of a coordinate.
        frequencies: these radians instead.

    Returns:
        For each axis and frequency the sine and the cosine.

    Raises:
        TypeError, ValueError: axes as of :class:`Function`; fewer bands than one; frequencies that
            are no finite numbers.

    Source:
        Mildenhall et al., "NeRF", ECCV 2020, equation 4.

    Example:
        >>> from coordconv import Coordinates
        >>> len(Coordinates(["x", "y", *fourier("xy", bands=6)]))
        26
        >>> [function.name for function in fourier("x", frequencies=[1])]
        ['sin(1.0 x)', 'cos(1.0 x)']
    """
    _check_axes(axes)
    if frequencies is None:
        if not isinstance(bands, int) or bands < 1:
            raise ValueError(f"bands must be an int of at least 1, got {bands!r}")
        frequencies = [math.pi * 2.0**band for band in range(bands)]
    numbers = [float(each) for each in frequencies]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"frequencies must be finite numbers, got {frequencies!r}")
    return tuple(
        Function(f"{of}({frequency!r} {axis})", axis, Wave(of, frequency))
        for axis in axes
        for frequency in numbers
        for of in ("sin", "cos")
    )


@dataclass(frozen=True, eq=False)
class Given:
    """A channel that is a map of a fixed size: latitudes of a grid, a land mask.

    Args:
        name: what files and error messages call it.
        array: its values at the samples, of shape ``(n,)`` for one axis, ``(h, w)`` for two. They
            are copied.
        axes: the tokens of its axes, in any order: the array has them in that of the grid, ``z``
            first and ``x`` last. None for all of the grid.

    A file of weights keeps the name and the axes alone.

    Raises:
        TypeError: a name that is no string; an array that is not of numbers.
        ValueError: a name or axes as of :class:`Function`; values that are not finite; another
            number of axes than the array has. Where it is used: a grid of another size.

    Example:
        >>> from coordconv import Coordinates, coordinate_grid
        >>> latitude = Given("latitude", [60.0, 0.0, -60.0], "y")
        >>> coordinate_grid((3, 2), Coordinates(["x", latitude]))[1]
        array([[ 60.,  60.],
               [  0.,   0.],
               [-60., -60.]], dtype=float32)
    """

    name: str
    array: Any = field(default=None, repr=False)
    axes: str | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.axes is not None:
            _check_axes(self.axes)
        if self.array is None:  # as a file has it
            object.__setattr__(self, "_key", (self.name, self.axes, None))
            return
        array = _numbers(f"the map {self.name!r} must have", self.array).astype(np.float64)
        if array.ndim not in ((1, 2, 3) if self.axes is None else (len(self.axes),)):
            raise ValueError(
                f"the map {self.name!r} must have one axis for each of "
                f"{self.axes or 'the axes of the grid'}, got shape {array.shape}"
            )
        array.flags.writeable = False
        object.__setattr__(self, "array", array)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        object.__setattr__(self, "_key", (self.name, self.axes, array.shape, digest))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and vars(self)["_key"] == vars(other)["_key"]

    def __hash__(self) -> int:
        return hash(vars(self)["_key"])

    def __deepcopy__(self, memo: Any) -> Given:
        return self  # nothing can change it

    def axes_of(self, rank: int) -> tuple[int, ...]:
        """The axes of a grid that the map has."""
        return grid_axes(AXES if self.axes is None else self.axes, rank)

    def at(self, positions: Sequence[Array], shape: Sequence[int]) -> Array:
        """The values at some samples of each axis of a grid, as an array that broadcasts to it."""
        if self.array is None:
            raise ValueError(
                f"the map {self.name!r} is known by its name alone, as it comes from a file: "
                f"make the coordinates with Given({self.name!r}, array)"
            )
        axes = self.axes_of(len(shape))
        wanted = tuple(shape[axis] for axis in axes)
        if self.array.shape != wanted:
            raise ValueError(
                f"the map {self.name!r} has shape {self.array.shape}, and the grid there "
                f"{wanted}: a given map has one size"
            )
        found: Array = self.array[np.ix_(*(np.asarray(positions[axis]) for axis in axes))]
        lengths = (len(positions[a]) if a in axes else 1 for a in range(len(shape)))
        return found.reshape(tuple(lengths))


Channel: TypeAlias = "str | Function | Given"


def name_of(channel: Channel) -> str:
    """A token, or the name of what is none."""
    return channel if isinstance(channel, str) else channel.name


def described(channel: Channel) -> Any:
    """A token, or what a file keeps of what is none."""
    if isinstance(channel, str):
        return channel
    kind = "function" if isinstance(channel, Function) else "given"
    return {kind: channel.name, "axes": channel.axes}


def from_description(description: Any) -> Channel:
    """Read what :func:`described` made: the functions of :func:`fourier` whole, others by name."""
    if isinstance(description, str):
        return description
    if not isinstance(description, dict) or not {"function", "given"} & {*description}:
        raise ValueError(f"a channel must be a token, a function or a map, got {description!r}")
    if "given" in description:
        return Given(description["given"], None, description.get("axes"))
    name, axes = description["function"], description.get("axes", "")
    made = Function(name, axes)
    number, _, axis = name[4:-1].partition(" ")  # of sin(1.0 x)
    try:
        wave = fourier(axis, frequencies=[float(number)])
    except ValueError:
        return made
    return next((each for each in wave if each.name == name and each.axes == axes), made)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if not name or name in TOKENS:
        raise ValueError(f"name must be one, and none of x, y, z and r, got {name!r}")


def _check_axes(axes: object) -> None:
    if not isinstance(axes, str):
        raise TypeError(f"axes must be a string of tokens, got {axes!r}")
    if not axes or not {*axes} <= {*AXES} or len({*axes}) < len(axes):
        raise ValueError(f"axes must be different ones of x, y and z, got {axes!r}")


def _numbers(whose: str, values: Any) -> Array:
    """The values as an array, if all of them are real numbers that float32 has, too."""
    if np.ma.is_masked(values):
        raise ValueError(
            f"{whose} finite numbers, got a masked array with gaps: fill them, as filled(0) does"
        )
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{whose} an array of numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32))
    if not finite.all():
        raise ValueError(f"{whose} finite numbers, got {array[~finite][0]}: float32 goes to 3.4e38")
    return array
