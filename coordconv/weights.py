"""The canonical weights, and their safetensors file.

Canonical weights are NumPy arrays under dotted names, in PyTorch's layout: ``weight`` of shape
``(out, C / groups, *kernel)``, of a transposed convolution ``(C, out / groups, *kernel)``, of a
linear layer ``(out, in)``; ``coord_weight (out, n, *kernel)``; ``bias (out,)``.

Other implementations have one kernel over features and coordinates, "fused" here: ``split_fused``
splits one, and ``adopt`` takes all the arrays of such a network.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.grid import Array

if TYPE_CHECKING:
    from coordconv.networks import Conv, Network

FORMAT_VERSION = 1
LAYOUTS = ("oihw", "hwio")
_HEADER = "__metadata__"
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_OWN_METADATA = ("format_version", "coordinates")

Layout: TypeAlias = Literal["oihw", "hwio"]
_Tensor = TypeVar("_Tensor", bound=Any)  # an array of NumPy or of any framework


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

    path = os.fsdecode(path)
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
    replace_file(path, safetensors.numpy.save(arrays, metadata=entries))


def replace_file(path: str, content: bytes) -> None:
    """Write a file of weights, whole or not at all.

    Raises:
        OSError: it cannot be written, or there is something else than a file.
    """
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
    """The permission bits of a regular file.

    Raises:
        OSError: there is none; or a pipe, which would have a reader wait, or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "it is not a regular file", path)
    return stat.S_IMODE(mode)


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a safetensors file of weights.

    Args:
        path: a file that ``save_weights`` wrote, or any other safetensors file.

    Returns:
        The arrays by name, with ``.coordinates`` and ``.metadata``. What is bfloat16, which NumPy
        lacks, becomes float32, which holds every value of it.

    Warns:
        UserWarning: an array holds NaN or infinity.

    Raises:
        ValueError: the file is no safetensors file, is damaged or cut short, has one name twice,
            or was written in a newer format than this version of coordconv reads.
        OSError: the file cannot be read.
    """
    weights = read_weights(path)
    warn_of_strange(path, weights)
    return weights


def warn_of_strange(path: str | os.PathLike[str], weights: Mapping[str, Array]) -> None:
    """Warn the caller's caller of arrays from a file that hold NaN or infinity."""
    strange = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if strange:
        message = f"{os.fsdecode(path)} holds NaN or infinity in {', '.join(strange)}"
        warnings.warn(message, stacklevel=3)


def read_weights(path: str | os.PathLike[str]) -> Weights:
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
            f"{path} has format version {version:.20}; this coordconv reads up to "
            f"{FORMAT_VERSION}: install a newer one"
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


def checked(
    mapping: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    coordinates: Mapping[str, Coordinates] | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """The arrays of ``mapping``, ready to be copied into a module, or one error with all problems.

    Args:
        mapping: arrays by name. If it is :class:`Weights`, its Coordinates must be the module's:
            the same set in another order is put in the module's order, anything else is an error.
        shapes: the name and canonical shape of every array that the module wants.
        coordinates: the Coordinates of each CoordConv in the module, by the layer's name.
        sources: what an array was called before it had its name in ``mapping``, for the error.

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
        shown = f"{name} (from {sources[name]!r})" if sources and name in sources else name
        if name not in shapes:
            problems.append(f"unexpected: {shown}, shape {array.shape}")
        elif array.shape != shapes[name]:
            problems.append(f"wrong shape: {shown} is {array.shape}, want {shapes[name]}")
        elif array.dtype.kind != "f":
            problems.append(f"not floating-point: {shown} is {array.dtype}")
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


def split_fused(
    kernel: Array,
    coords: CoordinatesLike,
    groups: int = 1,
    layout: Layout = "oihw",
    *,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Split a kernel over features and coordinates into the canonical two, exactly.

    Args:
        kernel: the fused kernel of one to three spatial axes, over inputs whose last channels are
            the coordinates; with ``groups`` the last of each group, which all see all of them. (A
            grouped convolution of one concatenation, whose last group alone sees them, is another
            function, and no split of it would be this one.)
        coords: the coordinate channels that it was trained with, or None for all axes.
        groups: the number of groups of the convolution.
        layout: ``"oihw"`` for ``(out, C / groups + n, *S)``, as in PyTorch and Paddle, or
            ``"hwio"`` for ``(*S, C / groups + n, out)``, as in Keras; ``hw`` stands for the
            spatial axes, whatever their number.
        transposed: whether it is a transposed convolution's. Those of PyTorch, Paddle and Keras
            are laid out as that of the convolution whose gradient they are:
            ``(C + groups * n, out / groups, *S)`` and ``(*S, out / groups, C + groups * n)``.

    Returns:
        ``weight`` and ``coord_weight``, new arrays of the kernel's dtype.

    Raises:
        TypeError: ``groups`` is not an int.
        ValueError: an unknown ``layout``, or a kernel whose shape does not fit the other arguments.

    Example:
        >>> kernel = np.zeros((3, 3, 16 + 2, 32), np.float16)
        >>> weight, coord_weight = split_fused(kernel, "yx", layout="hwio")
        >>> weight.shape, coord_weight.shape
        ((32, 16, 3, 3), (32, 2, 3, 3))
    """
    _check_layout(layout)
    kernel = np.asarray(kernel)
    if not 3 <= kernel.ndim <= 5:
        raise ValueError(f"kernel must have 1 to 3 spatial axes and 2 more, got {kernel.shape}")
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"groups must be an int, got {groups!r}")
    n = len(Coordinates.resolve(coords, kernel.ndim - 2))
    oihw = _as_oihw(kernel, layout)
    if groups < 1 or len(oihw) % groups:
        channels = f"{len(oihw)} {'input' if transposed else 'output'} channels"
        raise ValueError(f"groups must divide the kernel's {channels}, got {groups}")
    features = (len(oihw) // groups if transposed else oihw.shape[1]) - n
    if features < 1:
        raise ValueError(
            f"kernel must have more than the {n} coordinates among the input channels of a group, "
            f"got {features + n} in shape {kernel.shape}"
        )
    weight, coord_weight = split_channels(oihw, features, groups, transposed)
    return weight.copy(), coord_weight.copy()


def split_channels(
    fused: _Tensor, features: int, groups: int, transposed: bool
) -> tuple[_Tensor, _Tensor]:
    """The two canonical kernels in a fused one in ``"oihw"``, as views where they can be.

    Args:
        fused: an array or a tensor of any framework.
        features: the number of feature channels of a group.
        groups: the number of groups of the convolution.
        transposed: whether it is a transposed one.
    """
    if not transposed:
        return fused[:, :features], fused[:, features:]
    grouped = fused.reshape((groups, -1, *fused.shape[1:]))
    coordinates = grouped[:, features:].swapaxes(1, 2)
    return (
        grouped[:, :features].reshape((-1, *fused.shape[1:])),
        coordinates.reshape((-1, *coordinates.shape[2:])),
    )


def split_state(
    state: MutableMapping[str, Any],
    prefix: str,
    weight: Sequence[int],
    coords: int,
    groups: int,
    transposed: bool,
    *,
    nested: bool = True,
    copy: Callable[[Any], Any] = lambda tensor: tensor,
) -> None:
    """Give a framework's state, in place, the names and kernels of one layer of ours.

    What is not a fused kernel of the layer's stays as it is, for the framework to refuse or load.

    Args:
        state: tensors by name.
        prefix: the layer's name with its dot, or nothing.
        weight: the shape of the layer's ``weight``.
        coords: the number of its coordinate channels.
        groups: the number of groups of the convolution.
        transposed: whether it is a transposed one.
        nested: whether ``conv.weight`` and ``conv.bias`` under the prefix may stand for the layer's
            own: not if it has a ``conv`` inside.
        copy: makes a tensor of its own of a view, if the framework will keep it.
    """
    ours, coordinates = f"{prefix}weight", f"{prefix}coord_weight"
    if coordinates in state:
        return
    for name in ("weight", "bias") if nested else ():
        inner = f"{prefix}conv.{name}"
        # It goes before one without "conv": walsvid's layers are convolutions themselves besides,
        # and save that kernel, too, which they never use.
        if inner in state:
            state[f"{prefix}{name}"] = state.pop(inner)
    fused = state.get(ours)
    if tuple(getattr(fused, "shape", ())) == _fused_shape(weight, coords, groups, transposed):
        features = weight[0] // groups if transposed else weight[1]
        parts = split_channels(fused, features, groups, transposed)
        state[ours], state[coordinates] = map(copy, parts)


def adopt(
    arrays: Mapping[str, Array],
    network: str | Network,
    *,
    layout: Layout,
    names: Mapping[str, str] | None = None,
) -> Weights:
    """The canonical weights in the arrays of another implementation of a network.

    Args:
        arrays: by name, as the datasets of a Keras HDF5 file are; the kernels of CoordConvs are
            fused ones.
        network: whose CoordConvs have that implementation's coordinates; see
            :meth:`coordconv.networks.Network.with_coordinates`.
        layout: of the kernels, as in :func:`split_fused`. With ``"hwio"`` a linear layer's kernel
            is ``(in, out)``, and the first after a ``Flatten`` reads features whose channels came
            last; with ``"oihw"`` it is ``(out, in)``, as in PyTorch.
        names: theirs to ours, such as ``{"conv2d_1/kernel:0": "conv1.weight"}``; what is not in it
            is called the same. None is for arrays that are all called as ours, or else stand in
            the order of the layers: the kernels, that is, and the biases, whichever come first.
            Beware that HDF5 lists ``conv2d_10`` before ``conv2d_2``.

    Returns:
        New arrays by dotted name, with the network's Coordinates.

    Raises:
        TypeError: ``arrays`` is not a mapping.
        ValueError: an unknown ``network`` or ``layout``; ``names`` with a name that ``arrays``
            lack, or with two for one; every array that is missing, unexpected, of the wrong shape
            or not floating-point.

    Example:
        >>> from coordconv import networks
        >>> keras = networks.get("coord_classifier").with_coordinates("yx")
        >>> widths = [4, 32, 32, 64, 64, 1]
        >>> shapes = [(1, 1, *pair) for pair in zip(widths, widths[1:])]
        >>> arrays = {f"conv2d_{i}/kernel:0": np.zeros(s) for i, s in enumerate(shapes)}
        >>> arrays |= {f"conv2d_{i}/bias:0": np.zeros(s[-1]) for i, s in enumerate(shapes)}
        >>> adopt(arrays, keras, layout="hwio")["conv1.coord_weight"].shape
        (32, 2, 1, 1)
    """
    from coordconv import networks  # which imports this module

    _check_layout(layout)
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays must be a mapping of names to arrays, got {type(arrays)}")
    network = networks.get(network)
    shapes = network.weight_shapes()
    for layer in network.layers:
        if isinstance(layer, networks.Conv) and layer.coords:
            del shapes[f"{layer.name}.coord_weight"]
            shapes[f"{layer.name}.weight"] = _fused_shape(*_split_options(layer))
    if layout == "hwio":
        shapes = {n: (*s[2:], s[1], s[0]) if len(s) > 1 else s for n, s in shapes.items()}
    if names is None:
        names = {} if arrays.keys() <= shapes.keys() else _by_order(arrays, shapes)
    found = checked(
        _renamed(arrays, names), shapes, sources={ours: theirs for theirs, ours in names.items()}
    )
    found = {name: _as_oihw(a, layout) if a.ndim > 1 else a for name, a in found.items()}
    flattened: tuple[int, ...] | None = None
    for layer, before, _ in network.shapes():
        if isinstance(layer, networks.Flatten):
            flattened = before
        elif isinstance(layer, networks.Conv) and layer.coords:
            split_state(found, f"{layer.name}.", *_split_options(layer))
        elif isinstance(layer, networks.Linear) and flattened and layout == "hwio":
            kernel = found[f"{layer.name}.weight"].reshape(-1, *flattened[1:], flattened[0])
            found[f"{layer.name}.weight"] = np.moveaxis(kernel, -1, 1).reshape(len(kernel), -1)
            flattened = None
    return network.weights({name: found[name].copy() for name in network.weight_shapes()})


def fitted(arrays: Mapping[str, Array], network: Network) -> Weights:
    """A network's weights from arrays under canonical names, and nothing else.

    Args:
        arrays: in canonical layout; of :class:`Weights` the Coordinates are checked, too. A
            CoordConv's kernel may be a fused one, under its ``weight`` or ``conv.weight``.
        network: what they are to be the weights of.

    Returns:
        The arrays in the order of the network, with its Coordinates and its name.

    Raises:
        ValueError: as :func:`checked`.

    Example:
        >>> from coordconv import networks
        >>> network = networks.get("coord_cnn")
        >>> arrays = {n: np.zeros(s) for n, s in network.weight_shapes().items()}
        >>> del arrays["conv4.coord_weight"]
        >>> arrays["conv4.weight"] = np.zeros((64, 64 + 2, 3, 3))
        >>> fitted(arrays, network)["conv4.coord_weight"].shape
        (64, 2, 3, 3)
    """
    from coordconv import networks  # which imports this module

    found = Weights(arrays, getattr(arrays, "coordinates", {}))
    for layer in network.layers:
        if isinstance(layer, networks.Conv) and layer.coords:
            split_state(found, f"{layer.name}.", *_split_options(layer))
    return network.weights(checked(found, network.weight_shapes(), network.coordinates()))


def _split_options(layer: Conv) -> tuple[tuple[int, ...], int, int, bool]:
    """What ``split_state`` asks about a CoordConv."""
    assert layer.coords is not None
    geometry, weight = layer.geometry, layer.weight_shapes()["weight"]
    return weight, len(layer.coords), geometry.groups, geometry.transposed


def _fused_shape(
    weight: Sequence[int], coords: int, groups: int, transposed: bool
) -> tuple[int, ...]:
    first, second, *kernel = weight
    if transposed:
        return first + groups * coords, second, *kernel
    return first, second + coords, *kernel


def _as_oihw(kernel: Array, layout: Layout) -> Array:
    rank = kernel.ndim - 2
    return kernel if layout == "oihw" else kernel.transpose(rank + 1, rank, *range(rank))


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


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
