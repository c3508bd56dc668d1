"""The file of canonical weights, in the safetensors format."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from coordconv.coordinates import Coordinates
from coordconv.grid import Array
from coordconv.weights.canonical import Weights

Path: TypeAlias = str | os.PathLike[str]
FORMAT_VERSION = 2
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_OWN_METADATA = ("format_version", "coordinates")


def save_weights(
    path: Path, weights: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights to a safetensors file, whole or not at all.

    Args:
        path: the file to write. If it exists, it keeps its permissions, and a link stays a link.
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

    entries = {**getattr(weights, "metadata", {}), **(metadata or {})}
    for name, text in entries.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map text to text, got {name!r}: {text!r}")
        if name in _OWN_METADATA:
            raise ValueError(f"metadata may not hold {name!r}, which the format itself writes")
    arrays = {}
    for name, array in weights.items():
        array = np.asarray(array)
        dtype = array.dtype
        if not isinstance(name, str) or dtype.str[1:] not in _DTYPES:
            raise TypeError(f"weights must map names to numeric arrays, got {name!r}: {dtype}")
        if name == "__metadata__":
            raise ValueError(f"weights may not be named {name!r}, which the format keeps to itself")
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
    coordinates = getattr(weights, "coordinates", {})
    entries["format_version"] = str(FORMAT_VERSION)
    entries["coordinates"] = json.dumps({k: c.to_dict() for k, c in coordinates.items()})
    replace_file(os.fsdecode(path), safetensors.numpy.save(arrays, metadata=entries))


def replace_file(path: str, content: bytes) -> None:
    """Write a file of weights under a temporary name beside ``path``, and rename it."""
    target = os.path.realpath(path)  # so that a link stays, and leads to what is new
    temporary = os.path.join(os.path.dirname(target), f".{os.urandom(8).hex()}.tmp")
    try:
        mode = permissions(target) if os.path.lexists(target) else None
        with open(temporary, "xb") as file:
            if mode is not None:
                os.chmod(temporary, mode)  # before there is anything to be read in it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write weights: {error.strerror}", path) from error
    finally:
        with suppress(OSError):  # renamed, or never made
            os.unlink(temporary)


def permissions(path: str) -> int:
    """The permission bits of a regular file: OSError for a pipe, where a reader would wait."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "it is not a regular file", path)
    return stat.S_IMODE(mode)


def load_weights(path: Path) -> Weights:
    """Read a safetensors file of weights.

    Args:
        path: a file that ``save_weights`` wrote, or any other safetensors file.

    Returns:
        The arrays by name, bfloat16 as float32, with ``.coordinates`` and ``.metadata``.
        UserWarning tells of NaN and infinity.

    Raises:
        ValueError: no safetensors file, a damaged one, or one in another version of the format.
        OSError: the file cannot be read.
    """
    return warned(path, read_weights(path), stacklevel=3)


def warned(path: Path, weights: Weights, *, stacklevel: int) -> Weights:
    """The weights from a file, with a warning of those that hold NaN or infinity."""
    strange = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if strange:
        message = f"{os.fsdecode(path)} holds NaN or infinity in {', '.join(strange)}"
        warnings.warn(message, stacklevel=stacklevel)
    return weights


def read_weights(path: Path) -> Weights:
    """As :func:`load_weights`, but without its warning."""
    import json

    path = os.fsdecode(path)
    permissions(path)
    with open(path, "rb") as raw:  # the system's own error, in its own words, if it cannot be read
        size = raw.read(8)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
                names: list[str] = file.keys()
                text = raw.read(int.from_bytes(size, "little"))
                # safetensors lets a repetition pass
                header = json.loads(text, object_pairs_hook=_without_repetition)
                start = raw.tell()
                arrays = {
                    name: _widened(raw, start, header[name])
                    if header[name]["dtype"] == "BF16"
                    else file.get_tensor(name)
                    for name in names
                }
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
        except (AttributeError, TypeError, ValueError) as error:  # NumPy lacks such a dtype or rank
            raise ValueError(f"{path} holds what NumPy arrays by name cannot: {error}") from error
    version = metadata.pop("format_version", str(FORMAT_VERSION))
    # Python reads no number of thousands of digits, and nobody a message with one.
    if not version.isdecimal() or len(version) > 9 or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version:.20}; this coordconv reads version "
            f"{FORMAT_VERSION}: install a newer one"
        )
    if int(version) < FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, in which a CoordConv has two kernels, weight "
            f"and coord_weight; this coordconv reads version {FORMAT_VERSION}, in which it has "
            "one: read the file by safetensors.numpy.load_file, join each such pair by "
            "coordconv.weights.join_kernel, and save the weights anew"
        )
    try:
        described = json.loads(metadata.pop("coordinates", "{}"))
        coordinates = {name: Coordinates.from_dict(d) for name, d in described.items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged coordinates metadata: {error}") from error
    return Weights(arrays, coordinates, metadata)


def _widened(raw: BinaryIO, start: int, entry: dict[str, Any]) -> Array:
    """An array of bfloat16, the first half of a float32, as float32."""
    first, end = entry["data_offsets"]
    raw.seek(start + first)
    bits = np.frombuffer(raw.read(end - first), "<u2").astype(np.uint32)
    return (bits << 16).view(np.float32).reshape(entry["shape"])


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} twice")
        found[name] = value
    return found
