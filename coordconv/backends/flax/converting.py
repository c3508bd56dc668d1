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
from coordconv.changing import Unfit
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
    if not isinstance(kernel, nnx.Variable) or _is_computed(kernel):
        return Unfit("its kernel is computed when it is read", fatal=True)
    value = raw(kernel)
    if not isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return Unfit(f"its kernel holds a {type(value).__name__}", fatal=True)
    return changing.unfit_shape(value.shape, tuple(conv.kernel_shape))


def _is_computed(variable: Any) -> bool:
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
        return changing.extended(kernel, axis, n)
    if rngs is None:
        raise ValueError('rngs must be given with init="fan_in"')
    if kernel.ndim != len(conv.kernel_shape) or isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError('init must be "zeros" for what a vmap or a scan made, or is abstract')
    return changing.drawn(kernel, axis, n, rngs.params())


def without_coordinates(layer: Any) -> Any:
    """The features' part of a kernel."""
    return changing.shortened(raw(layer.kernel), options.input_axis(layer), len(layer.coords))


def become(conv: Any, cls: Any, coords: Coordinates, init: str) -> Any:
    """A layer of a class of ours with all that a convolution has; its kernel is changed apart."""
    layer = _of_class(cls, conv)
    layer.coords = coords
    layer.coord_init = init
    layer.map_only = init == "zeros"
    _widen(layer, len(coords))
    return layer


def become_plain(layer: Any, cls: Any) -> Any:
    """The inverse of :func:`become`."""
    conv, n = _of_class(cls, layer), len(layer.coords)
    for name in ("coords", "coord_init", "map_only"):
        if name in vars(conv):
            delattr(conv, name)
    _widen(conv, -n)
    return conv


def _of_class(cls: Any, module: Any) -> Any:
    """A module of another class with the same attributes, as unpickling makes one."""
    made = cls.__new__(cls)
    vars(made).update(vars(module))
    return made


def _widen(conv: Any, n: int) -> None:
    """Let a module expect a kernel of ``n`` input channels more, of which a mask keeps all."""
    axis, shape = options.input_axis(conv), [*conv.kernel_shape]
    shape[axis] += n
    conv.kernel_shape = tuple(shape)
    if conv.mask is not None:
        mask = conv.mask
        more = changing.extended(mask, axis, n, 1) if n > 0 else changing.shortened(mask, axis, -n)
        conv.mask = more


def from_conv(
    cls: Any, conv: Any, coords: CoordinatesLike, init: str, rngs: nnx.Rngs | None = None
) -> Any:
    """A copy of a convolution as a layer of a class of ours."""
    plain = next(base for base in cls.__mro__ if base.__module__.startswith("flax.nnx"))
    if type(conv) is not plain:
        raise TypeError(f"conv must be a flax.nnx.{plain.__name__}, got a {type(conv).__name__}")
    check_coord_init(init, "init")
    found = unfit(conv)
    if found:
        raise ValueError(f"conv cannot be given coordinates: {found.reason}")
    conv = nnx.clone(conv)
    coords = Coordinates.resolve(coords, len(options.kernel_size(conv)))
    set_raw(conv.kernel, with_coordinates(conv, coords, init, rngs))
    return become(conv, cls, coords, init)
