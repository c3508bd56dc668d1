"""Coordinates for variables of a Linen network that exists, and back.

A Linen module is code: write it with CoordConv in place of ``nn.Conv``, or pass the class in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from coordconv.backends.jax import changing
from coordconv.backends.linen.fusing import MAPS
from coordconv.changing import Choice, Unfit, plan
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init


def add_coords(
    variables: Mapping[str, Any],
    layers: Choice,
    coords: CoordinatesLike = "xy",
    *,
    init: str = "zeros",
    rng: jax.Array | None = None,
    transpose_kernel: bool = False,
) -> Any:
    """Variables of a network for the same network with CoordConvs in place of convolutions.

    With ``init="zeros"`` that network computes what the one before computed, within rounding; to
    the bit with a subclass of CoordConv that has ``map_only = True``. Names stay: layers that have
    none are named by Linen for their class, so let that subclass be a ``class Conv(CoordConv)``.

    Args:
        variables: those of the network before, with the collection ``"params"``. They are not
            changed. Trees of the parameters' structure, such as momenta, are fitted in the same
            way: ``add_coords({"params": momenta}, ...)["params"]``.
        layers: which convolutions, as their modules are CoordConvs now: names, with dots or slashes
            as in ``"encoder/conv_0"``, whole or the end of them, of layers or of modules, which are
            all convolutions in them; a compiled regular expression that matches the whole name,
            with dots; a function of name and parameters; several of these. None is every kernel of
            three to five axes.
        coords: the coordinates of all layers; None for all axes of each kernel. The number of
            axes is the kernel's, less two: name the coordinates of what a scan or a vmap stacked.
        init: ``"zeros"``, or ``"fan_in"``: the coordinates' part as Linen draws a kernel over
            features and coordinates by default; the features' part stays.
        rng: what ``init="fan_in"`` draws with.
        transpose_kernel: whether the layers are transposed ones with this option, whose kernels
            have their input channels last.

    Returns:
        The variables, of the same kinds of dicts, with the boxes of their metadata.

    Raises:
        TypeError: ``variables`` are no mapping; ``layers`` of another type.
        ValueError: there are no params; nothing matches; a kernel that is no convolution's; the
            variables are fused. A kernel does not tell whether it has coordinates already: a second
            call adds others, and the network refuses the shape.

    Example:
        >>> from functools import partial
        >>> from flax import linen as nn
        >>> from coordconv.backends.linen import CoordConv
        >>> class Net(nn.Module):
        ...     conv: type = nn.Conv
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return self.conv(8, (3, 3), name="stem")(x)
        >>> x = jax.numpy.ones((2, 16, 20, 3))
        >>> before, after = Net(), Net(conv=partial(CoordConv, coords="xy"))
        >>> variables = before.init(jax.random.key(0), x)
        >>> new = add_coords(variables, "stem")
        >>> bool(jax.numpy.allclose(after.apply(new, x), before.apply(variables, x), atol=1e-5))
        True
    """
    check_coord_init(init, "init")
    Coordinates.resolve(coords, 3)
    if init == "fan_in" and rng is None:
        raise ValueError('rng must be given with init="fan_in"')

    def change(name: str, kernel: Any, axis: int, n: int) -> Any:
        if rng is None or init == "zeros":
            return changing.resized(kernel, axis, n)
        key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
        return changing.drawn(kernel, axis, n, key)

    return _changed(variables, layers, coords, transpose_kernel, change)


def remove_coords(
    variables: Mapping[str, Any],
    layers: Choice,
    coords: CoordinatesLike = "xy",
    *,
    transpose_kernel: bool = False,
) -> Any:
    """The inverse of :func:`add_coords`: the coordinates' part is lost.

    Arguments, result and errors are those of that function; a kernel that has no more input
    channels than coordinates is refused as well.

    Example:
        >>> from coordconv.backends.linen import CoordConv
        >>> from flax import linen as nn
        >>> net, x = nn.Sequential([CoordConv(8, (3, 3))]), jax.numpy.ones((1, 5, 5, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> remove_coords(variables, "layers_0")["params"]["layers_0"]["kernel"].shape
        (3, 3, 3, 8)
    """

    def change(_: str, kernel: Any, axis: int, n: int) -> Any:
        if kernel.shape[axis] <= n:
            raise ValueError(
                f"its kernel must have more input channels than the {n} coordinates, got shape "
                f"{kernel.shape}"
            )
        return changing.resized(kernel, axis, -n)

    return _changed(variables, layers, coords, transpose_kernel, change)


def _changed(
    variables: Any,
    layers: Choice,
    coords: CoordinatesLike,
    transposed: bool,
    change: Callable[[str, Any, int, int], Any],
) -> Any:
    """The variables with ``change(name, kernel, axis, n)`` for the kernels of some modules."""
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a mapping, got {type(variables).__name__}")
    params = variables.get("params")
    if not isinstance(params, Mapping):
        raise ValueError(f"variables must have a collection 'params', got {[*variables]}")
    if MAPS in variables:
        raise ValueError(f"variables are fused: they have a collection {MAPS!r}")
    new = dict[str, Any]()

    def examine(name: str, module: Any) -> Unfit | None:
        kernel = meta.unbox(module["kernel"])
        if not 3 <= getattr(kernel, "ndim", 0) <= 5:
            return Unfit(f"its kernel must have 3 to 5 axes, got shape {np.shape(kernel)}")
        try:
            n = len(Coordinates.resolve(coords, kernel.ndim - 2))
            new[name] = change(name, kernel, -1 if transposed else -2, n)
        except ValueError as error:
            return Unfit(str(error))
        return None

    def has_kernel(module: Any) -> bool:
        return not isinstance(module.get("kernel", {}), Mapping)

    def replaced(path: Any, leaf: Any) -> Any:
        full = jax.tree_util.keystr(path, simple=True, separator=".")
        name, _, own = full.rpartition(".")
        return meta.replace_boxed(leaf, new[name]) if own == "kernel" and name in new else leaf

    def is_box(node: Any) -> bool:
        return isinstance(node, meta.AxisMetadata)

    plan(dict(_modules(params, "")), has_kernel, examine, _dotted(layers))
    params = jax.tree_util.tree_map_with_path(replaced, params, is_leaf=is_box)
    kind: Any = type(variables)
    return kind({**variables, "params": params})


def _modules(params: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """The parameters of all modules, by dotted names."""
    yield name, params
    for key, each in params.items():
        if isinstance(each, Mapping):
            yield from _modules(each, f"{name}.{key}" if name else key)


def _dotted(choice: Choice) -> Choice:
    if isinstance(choice, str):
        return choice.replace("/", ".")
    if isinstance(choice, Iterable) and not isinstance(choice, bytes):
        return [_dotted(each) for each in choice]
    return choice
