"""Files of weights: from one framework's to another's, and what is in one.

The formats are ``"safetensors"``, the canonical weights, and one of each backend's name, the files
that the framework's users save. Between any two the way is through canonical weights. Nothing that
is read can run code: a file that could is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import numpy as np

from coordconv import backends, networks
from coordconv.coordinates import Coordinates
from coordconv.grid import Array
from coordconv.weights.canonical import Weights
from coordconv.weights.files import Path, permissions, read_weights, save_weights, warned
from coordconv.weights.foreign import fitted
from coordconv.weights.kernels import Position, check_position

Named: TypeAlias = str | networks.Network | None
CANONICAL = "safetensors"
FORMATS = (CANONICAL, *backends.BACKENDS)
_DTYPES = ("float16", "float32", "float64")


def format_of(path: Path, format: str | None = None) -> str:
    """The format of a file: what is said, or what the suffix says, or a folder's; else ValueError.

    Example:
        >>> format_of("weights.safetensors"), format_of("weights.PT")
        ('safetensors', 'torch')
    """
    if format is not None:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        return format
    suffixes = {f".{CANONICAL}": CANONICAL}
    suffixes |= {s: b.name for b in backends.BACKENDS.values() for s in b.suffixes}
    path = os.fsdecode(path)
    suffix = os.path.splitext(path.rstrip("/" + os.sep))[1].lower()
    if suffix not in suffixes and (os.path.isdir(path) or path.endswith(("/", os.sep))):
        suffix = "/"  # a folder
    if suffix not in suffixes:
        known = ", ".join(name for name in suffixes if name != "/")
        raise ValueError(
            f"the suffix of {path} does not say its format, as {known} would: "
            f"name it (--from, --to or --format), one of {', '.join(FORMATS)}"
        )
    return suffixes[suffix]


def load(
    path: Path, network: Named = None, *, format: str | None = None, position: Position = "last"
) -> Weights:
    """Read a network's canonical weights from a file, or a folder, of any format.

    A CoordConv's kernel may be another implementation's, over features and coordinates in the
    network's order (the coordinates at ``position``), or a plain convolution's: then the
    coordinates' part is zero. The network is by default the one that the metadata name, or the only
    one of ``networks.NETWORKS`` that names and shapes fit as they are; the format is what the
    suffix says.

    UserWarning tells of NaN and infinity; ValueError of what is unknown, damaged or does not fit,
    and of a file that could run code; ImportError of a framework that is not installed.
    """
    return warned(path, _load(path, network, format, position), stacklevel=3)


def _load(path: Path, network: Named, format: str | None, position: Position) -> Weights:
    check_position(position)
    format = format_of(path, format)
    arrays = _read(path, format)
    if network is None:
        network = arrays.metadata.get("network") or _guess(path, arrays, format)
    try:
        network = networks.get(network)
        weights = fitted(_renamed(arrays, network, format), network, position=position)
    except ValueError as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}") from error
    weights.metadata = {**arrays.metadata, **weights.metadata}
    return weights


def save(
    path: Path, weights: Mapping[str, Array], network: Named = None, *, format: str | None = None
) -> None:
    """Write a network's canonical weights in any format, whole or not at all.

    A file is replaced, a folder must not exist. The network is by default the one that the metadata
    name; metadata and Coordinates are in the canonical format alone. ValueError tells of weights
    that are not the network's, or of another type than float16, float32 and float64.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> save(path, networks.initial_weights("coord_cnn"), "coord_cnn")
        >>> load(path).metadata
        {'network': 'coord_cnn'}
    """
    format = format_of(path, format)
    metadata = getattr(weights, "metadata", {})
    if network is None:
        network = metadata.get("network")
    if network is None:
        known = ", ".join(networks.NETWORKS)
        raise ValueError(f"weights do not say whose they are: name the network, one of {known}")
    network = networks.get(network)
    weights = fitted(weights, network)
    for name, array in weights.items():
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"weights must be {', '.join(_DTYPES)}, got {name!r}: {array.dtype}")
        # Frameworks take neither another machine's order of bytes nor every view.
        weights[name] = np.array(array, array.dtype.newbyteorder("="), order="C")
    if format == CANONICAL:
        save_weights(path, weights, {**metadata, **weights.metadata})
    else:
        backends.load(format).write_state(os.fsdecode(path), network, weights)


def convert(
    source: Path,
    target: Path,
    network: Named = None,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    position: Position = "last",
) -> Weights:
    """:func:`load` a network's weights from ``source``, and :func:`save` them as ``target``.

    Arguments, errors and what is returned are those of the two, and ValueError where ``source`` and
    ``target`` are the same file. In ``target`` the coordinates are last.
    """
    target_format = format_of(target, target_format)
    source, target = os.fsdecode(source), os.fsdecode(target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise ValueError(f"source and target are the same file, {source}")
    if target_format != CANONICAL:
        backends.load(target_format)  # it is there: say so before anything is read
    weights = warned(source, _load(source, network, source_format, position), stacklevel=3)
    save(target, weights, network, format=target_format)
    return weights


@dataclass(frozen=True)
class ArrayRow:
    """A line of a description; smallest and largest of the finite values, None if there is none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    smallest: float | None
    largest: float | None
    nan: int
    infinite: int


@dataclass(frozen=True)
class Description:
    """What is in a file of weights: a row per array, and what travels along."""

    format: str
    arrays: tuple[ArrayRow, ...]
    parameters: int
    coordinates: dict[str, Coordinates]
    metadata: dict[str, str]


def describe(path: Path, *, format: str | None = None) -> Description:
    """What is in a file of weights, of whatever network, under its own names and in its own layout.

    Arguments and errors are those of :func:`load`, but for what concerns a network.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> save_weights(path, {"weight": np.array([[1, 2, np.nan]], np.float32)})
        >>> describe(path).arrays[0].shape, describe(path).arrays[0].largest
        ((1, 3), 2.0)
    """
    format = format_of(path, format)
    weights = _read(path, format)
    rows = tuple(_row(name, array) for name, array in weights.items())
    parameters = sum(row.parameters for row in rows)
    return Description(format, rows, parameters, weights.coordinates, weights.metadata)


def _row(name: str, array: Array) -> ArrayRow:
    numbers = array.ravel() if array.dtype.kind in "biuf" else np.zeros(0)  # else text or the like
    finite, nan = numbers[np.isfinite(numbers)], int(np.isnan(numbers).sum())
    first, last = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
    infinite = numbers.size - finite.size - nan
    return ArrayRow(name, array.shape, str(array.dtype), array.size, first, last, nan, infinite)


def _read(path: Path, format: str) -> Weights:
    """What is in a file, under its own names and in its own layout."""
    path = os.fsdecode(path)
    if format == CANONICAL:
        return read_weights(path)
    backend = backends.load(format)
    if not os.path.isdir(path):
        permissions(path)
    found = backend.read_state(path)
    return Weights(found, getattr(found, "coordinates", None))


def _renamed(arrays: Weights, network: networks.Network, format: str) -> Mapping[str, Array]:
    """The same under canonical names and in canonical layout; what is not the network's, as is."""
    if format == CANONICAL:
        return arrays
    found: Mapping[str, Array] = backends.load(format).from_state(network, arrays)
    return Weights(found, arrays.coordinates)


def _guess(path: Path, arrays: Weights, format: str) -> networks.Network:
    """The network that the arrays' names and shapes fit, none of them filled up with zeros.

    A plain convolution's kernel would fit a CoordConv, too, but does not speak for one.
    """
    fitting = []
    for network in networks.NETWORKS.values():
        given = _renamed(arrays, network, format)
        with suppress(ValueError):
            weights = fitted(given, network)
            if sum(a.size for a in weights.values()) <= sum(a.size for a in given.values()):
                fitting.append(network)
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(network.name for network in fitting) or "none"
    raise ValueError(
        f"{os.fsdecode(path)} does not say whose weights it holds, and of "
        f"{', '.join(networks.NETWORKS)} they fit {found}: name the network (--network)"
        + ("" if fitting else f"\n{_found(arrays)}")
    )


def _found(arrays: Weights) -> str:
    """What is in a file whose weights are no known network's."""
    shown = [f"{name} {array.shape}" for name, array in arrays.items()]
    told = f"it holds {len(shown)} arrays: {', '.join(shown[:4])}{', ...' * (len(shown) > 4)}"
    parts = zip(*(name.split(".")[:-1] for name in arrays), strict=False)
    prefix = ".".join(part[0] for part in takewhile(lambda part: len({*part}) == 1, parts))
    if prefix and prefix != "params":  # which is read with Linen's and without
        told += f"; all begin with {prefix + '.'!r}: if a wrapper added that, save what it wraps"
    return told
