"""One convolution of NNX made a CoordConv, and back.

Python lets no ``nnx.Conv`` change its class, as its instances have another layout than those of a
class with a mixin. So another module takes its place, with all its attributes. The Variables stay
the same objects, and the kernel's changes its value: what shares them does so still.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from coordconv.backends.jax import adding, changing, options
from coordconv.changing import Unfit, check_class
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init

_HAS_GET_RAW = hasattr(nnx.Variable, "get_raw_value")
# Before that, the leaves of a state were no Variables.
BOXES = nnx.Variable if _HAS_GET_RAW else (nnx.Variable, nnx.VariableState)


def unfit(conv: Any) -> Unfit | None:
    """Why a convolution cannot become a CoordConv, or lose its coordinates, if so."""
    if adding.has_own_step(conv):
        return Unfit(
            "it has a conv_general_dilated of its own, which may compute anything", fatal=True
        )
    kernel: Any = conv.kernel
    if not isinstance(kernel, nnx.Variable) or is_computed(kernel):
        return Unfit("its kernel is computed when it is read", fatal=True)
    value = raw(kernel)
    if not isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return Unfit(f"its kernel holds a {type(value).__name__}", fatal=True)
    wanted = tuple(conv.kernel_shape)
    if value.shape[max(value.ndim - len(wanted), 0) :] == wanted:
        return None
    return Unfit(f"its kernel has shape {value.shape}, and should have {wanted}", fatal=True)


def is_computed(variable: Any) -> bool:
    """Whether a Variable's value is computed when it is read or written."""
    kind, methods = type(variable), ("get_value", "set_value")
    return not {"on_get_value", "on_set_value"}.isdisjoint(variable.get_metadata()) or any(
        getattr(kind, name, None) is not getattr(nnx.Variable, name, None) for name in methods
    )


def raw(variable: Any) -> Any:
    """The value that a Variable, or a leaf of a state, holds, which may be abstract."""
    if _HAS_GET_RAW:
        return variable.get_raw_value()
    return variable.raw_value if isinstance(variable, nnx.Variable) else variable.value


def set_raw(variable: Any, value: Any) -> None:
    """Give a Variable a value, of another shape perhaps; its metadata stay."""
    variable.copy_from(variable.replace(value))


def with_coordinates(conv: Any, coords: Coordinates, init: str, rngs: nnx.Rngs | None) -> Any:
    """A plain convolution's kernel over its features and, as ``init`` says, coordinates."""
    kernel, axis, n = raw(conv.kernel), options.input_axis(conv), len(coords)
    if init == "zeros":
        return changing.resized(kernel, axis, n)
    if rngs is None:
        raise ValueError('rngs must be given with init="fan_in"')
    if kernel.ndim != len(conv.kernel_shape) or isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError('init must be "zeros" for what a vmap or a scan made, or is abstract')
    return changing.drawn(kernel, axis, n, rngs.params())


def without_coordinates(layer: Any) -> Any:
    """The features' part of a kernel."""
    return changing.resized(raw(layer.kernel), options.input_axis(layer), -len(layer.coords))


def become(conv: Any, cls: Any, coords: Coordinates, init: str) -> Any:
    """A layer of a class of ours with all that a convolution has; its kernel is changed apart."""
    layer = _of_class(cls, conv, len(coords))
    layer.coords = coords
    layer.coord_init = init
    layer.map_only = init == "zeros"
    return layer


def become_plain(layer: Any, cls: Any) -> Any:
    """The inverse of :func:`become`."""
    conv = _of_class(cls, layer, -len(layer.coords))
    for name in ("coords", "coord_init", "map_only"):
        if name in vars(conv):
            delattr(conv, name)  # which NNX takes note of
    return conv


def _of_class(cls: Any, module: Any, n: int) -> Any:
    """A module of another class with the same attributes, as unpickling makes one.

    It expects a kernel of ``n`` input channels more, of which a mask keeps all.
    """
    made, axis, shape = cls.__new__(cls), options.input_axis(module), [*module.kernel_shape]
    vars(made).update(vars(module))
    shape[axis] += n
    made.kernel_shape = tuple(shape)
    if made.mask is not None:
        made.mask = changing.resized(made.mask, axis, n, 1)
    return made


def from_conv(
    cls: Any, conv: Any, coords: CoordinatesLike, init: str, rngs: nnx.Rngs | None = None
) -> Any:
    """A copy of a convolution as a layer of a class of ours."""
    check_class(cls, conv, "flax.nnx")
    check_coord_init(init, "init")
    found = unfit(conv)
    if found:
        raise ValueError(f"conv cannot be given coordinates: {found.reason}")
    conv = nnx.clone(conv)
    coords = Coordinates.resolve(coords, len(options.kernel_size(conv)))
    set_raw(conv.kernel, with_coordinates(conv, coords, init, rngs))
    return become(conv, cls, coords, init)
