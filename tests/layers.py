"""Any layer of any backend by the same few arguments, for what all of them must do alike."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from coordconv import Coordinates, backends

FLAX = ("flax", "linen")


def make(
    backend: str,
    rank: int,
    transposed: bool,
    *,
    channels: int = 3,
    out: int = 4,
    kernel: int = 3,
    coords: Any = None,
    weights: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Callable[..., Any]]:
    """A layer, and its call with arrays that have the channels first, without padding.

    ``options`` are the framework's own. The weights are canonical; None leaves them to the layer,
    in Flax at zero: JAX would compile the drawing of random numbers for every shape.
    """
    kind = "Transpose" if transposed else ""
    module = backends.load(backend)
    if backend in FLAX:
        from flax import nnx

        options = {"padding": "VALID", "kernel_init": nnx.initializers.zeros, **options}
        sizes: tuple[Any, ...] = (out, (kernel,) * rank)
        if backend == "flax":
            sizes, options["rngs"] = (channels, *sizes), nnx.Rngs(0)
        layer = bound = getattr(module, f"CoordConv{kind}")(*sizes, coords=coords, **options)
        if backend == "linen":
            given = weights or zeros(layer.coords, rank, transposed, channels, out, kernel)
            bound = partial(layer.apply, layer.import_weights(given))
        elif weights:
            layer.import_weights(weights)
        return layer, lambda x: np.moveaxis(np.asarray(bound(channels_last(x))), -1, 1)
    if backend == "torch":
        from torch import tensor

        name = f"CoordConv{kind}{rank}d"
    else:
        from paddle import to_tensor as tensor

        name = f"CoordConv{rank}D{kind}"
    layer = getattr(module, name)(channels, out, kernel, coords=coords, **options)
    if weights:
        layer.import_weights(weights)
    return layer, lambda x, **at_call: layer(tensor(x), **at_call).detach().numpy()


def channels_last(x: Any) -> Any:
    return np.moveaxis(x, 1, -1) if x.ndim > 1 else x


def zeros(
    coords: Coordinates, rank: int, transposed: bool, channels: int, out: int, kernel: int
) -> dict[str, Any]:
    """Canonical weights of the right shapes."""
    sides = (channels, out) if transposed else (out, channels)
    shapes = {
        "weight": (*sides, *(kernel,) * rank),
        "coord_weight": (out, len(coords), *(kernel,) * rank),
        "bias": (out,),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def as_given(backend: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array as the layer sees it: in Flax with the channels last."""
    if backend in FLAX and len(shape) > 1:
        return (shape[0], *shape[2:], shape[1])
    return shape
