"""The canonical weights, and their safetensors file.

Canonical weights are NumPy arrays under dotted names, in PyTorch's layout: ``weight`` of shape
``(out, C / groups, *kernel)``, of a transposed convolution ``(C, out / groups, *kernel)``, of a
linear layer ``(out, in)``; ``coord_weight (out, n, *kernel)``; ``bias (out,)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from coordconv.coordinates import Coordinates
from coordconv.grid import Array

FORMAT_VERSION = 1
_HEADER = "__metadata__"
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_OWN_METADATA = ("format_version", "coordinates")


class Weights(dict[str, Array]):
    """Canonical weights by name, with the Coordinates that they were made for.

    A plain ``dict`` does everywhere, too; what travels with this one is checked on import.

    Args:
        arrays: the arrays by dotted name.
        coordinates: the Coordinates of each CoordConv, by the layer's dotted name; ``""`` is the
            name of a layer on its own.
        metadata: further text entries for the file.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array] | Iterable[tuple[str, Array]] = (),
        coordinates: Mapping[str, Coordinates] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(arrays)
        self.coordinates = dict(coordinates or {})
        self.metadata = dict(metadata or {})


def save_weights(
    path: str | os.PathLike[str],
    weights: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights to a safetensors file, whole or not at all.

    The file is written under a temporary name beside ``path`` and renamed, so that a reader never
    meets half a file and a failure leaves the old one as it was.

    Args:
        path: the file to write.
        weights: arrays by name, as ``export_weights()`` returns them; their Coordinates go along.
        metadata: further text entries, which ``load_weights`` returns as ``.metadata``.

    Raises:
        TypeError: a name or a metadata entry that is not text, or an array that is not numeric.
        ValueError: metadata or an array under a name that the format uses itself.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "layer.safetensors")
        >>> save_weights(path, {"weight": np.ones((1, 1))}, {"trained_on": "squares"})
        >>> load_weights(path)
        {'weight': array([[1.]])}
    """
    import json  # here and in load_weights, for the sake of the package's import time

    path = os.fspath(path)
    entries = {**getattr(weights, "metadata", {}), **(metadata or {})}
    for name, text in entries.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map text to text, got {name!r}: {text!r}")
        if name in _OWN_METADATA:
            raise ValueError(f"metadata may not hold {name!r}, which the format itself writes")
    arrays = {}
    for name, array in weights.items():
        array = np.asarray(array)
        if not isinstance(name, str) or array.dtype.str[1:] not in _DTYPES:
            raise TypeError(
                f"weights must map names to numeric arrays, got {name!r}: {array.dtype}"
            )
        if name == _HEADER:
            raise ValueError(f"weights may not be named {name!r}, which the format keeps to itself")
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
    coordinates = getattr(weights, "coordinates", {})
    entries["format_version"] = str(FORMAT_VERSION)
    entries["coordinates"] = json.dumps({k: c.to_dict() for k, c in coordinates.items()})
    _replace_file(path, safetensors.numpy.save(arrays, metadata=entries))


def _replace_file(path: str, content: bytes) -> None:
    temporary = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write weights: {error.strerror}", path) from error
    finally:
        with suppress(OSError):  # renamed, or never made
            os.unlink(temporary)


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a safetensors file of weights.

    Args:
        path: a file that ``save_weights`` wrote, or any other safetensors file.

    Returns:
        The arrays by name, with ``.coordinates`` and ``.metadata``.

    Raises:
        ValueError: the file is no safetensors file, is damaged or cut short, or was written in a
            newer format than this version of coordconv reads.
        OSError: the file cannot be read.
    """
    import json

    path = os.fspath(path)
    with open(path, "rb"):
        pass  # the operating system's own error, with its own words, if it cannot be read
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names: list[str] = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    except (AttributeError, TypeError) as error:  # how safetensors says that NumPy lacks a dtype
        raise ValueError(f"{path} holds arrays of a dtype that NumPy lacks: {error}") from error
    version = metadata.pop("format_version", str(FORMAT_VERSION))
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this coordconv reads up to {FORMAT_VERSION}: "
            "install a newer one"
        )
    try:
        described = json.loads(metadata.pop("coordinates", "{}"))
        coordinates = {name: Coordinates.from_dict(d) for name, d in described.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged coordinates metadata: {error}") from error
    return Weights(arrays, coordinates, metadata)


def checked(
    mapping: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    coordinates: Mapping[str, Coordinates] | None = None,
) -> dict[str, Array]:
    """The arrays of ``mapping``, ready to be copied into a module, or one error with all problems.

    Args:
        mapping: arrays by name. If it is :class:`Weights`, its Coordinates must be the module's:
            the same set in another order is put in the module's order, anything else is an error.
        shapes: the name and canonical shape of every array that the module wants.
        coordinates: the Coordinates of each CoordConv in the module, by the layer's name.

    Raises:
        TypeError: ``mapping`` is not a mapping.
        ValueError: every array that is missing, unexpected, of the wrong shape or not
            floating-point, and every layer whose Coordinates differ.

    Example:
        >>> checked({"weights": np.ones((2, 2))}, {"weight": (2, 2)})
        Traceback (most recent call last):
        ...
        ValueError: cannot import weights:
          missing: weight, shape (2, 2)
          unexpected: weights, shape (2, 2)
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"weights must be a mapping of names to arrays, got {type(mapping)}")
    arrays = {name: np.asarray(array) for name, array in mapping.items()}
    problems = [
        f"missing: {name}, shape {shape}" for name, shape in shapes.items() if name not in arrays
    ]
    for name, array in arrays.items():
        if name not in shapes:
            problems.append(f"unexpected: {name}, shape {array.shape}")
        elif array.shape != shapes[name]:
            problems.append(f"wrong shape: {name} is {array.shape}, want {shapes[name]}")
        elif array.dtype.kind != "f":
            problems.append(f"not floating-point: {name} is {array.dtype}")
    foreign = getattr(mapping, "coordinates", {})
    reordered = {}
    for layer, wanted in (coordinates or {}).items():
        found = foreign.get(layer, wanted)
        name = f"{layer}.coord_weight" if layer else "coord_weight"
        if {**found.to_dict(), "channels": sorted(found.channels)} != {
            **wanted.to_dict(),
            "channels": sorted(wanted.channels),
        }:
            problems.append(f"other coordinates: {name} was made for {found}, want {wanted}")
        elif found != wanted:
            reordered[name] = [found.channels.index(token) for token in wanted.channels]
    if problems:
        raise ValueError("\n  ".join(["cannot import weights:", *problems]))
    return {
        name: arrays[name][:, reordered[name]] if name in reordered else arrays[name]
        for name in shapes
    }
