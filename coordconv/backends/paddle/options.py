"""Options of Paddle convolutions as :class:`~coordconv.geometry.ConvGeometry`, and back.

Paddle's peculiarities: ``"SAME"`` undoes the dilation; a transposed convolution with ``"SAME"``
cuts off what a plain one would add to its input; where padding copies samples, ``pad`` has done it
before the convolution; the size that a call wants of the output replaces ``output_padding``.

Paddle keeps what a layer was constructed with in attributes that begin with an underscore, and
nowhere else; ``tests/backends/test_private_names.py`` has them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import paddle
from paddle import Tensor

from coordconv.geometry import ConvGeometry, check_input

DATA_FORMATS = ("NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC")
_geometry = lru_cache(maxsize=256)(ConvGeometry)
# ValueError where the output would be empty: Paddle returns a negative length, or crashes.
output_shape = lru_cache(maxsize=256)(ConvGeometry.output_shape)


def check_arguments(arguments: Mapping[str, Any], rank: int) -> None:
    """Say what is wrong with a layer's arguments where Paddle does not, or not in full."""
    groups = arguments["groups"]
    if groups < 1:
        raise ValueError(f"groups must be positive, got {groups}")
    for name in ("in_channels", "out_channels"):
        if arguments[name] % groups:
            raise ValueError(
                f"{name} must be divisible by groups, got {arguments[name]} and {groups}"
            )
    check_data_format(arguments["data_format"], rank)


def check_data_format(data_format: str, rank: int) -> None:
    """Refuse the data format of another rank, which Paddle may take and misread."""
    formats = [each for each in DATA_FORMATS if len(each) == rank + 2]
    if data_format not in formats:
        raise ValueError(f"data_format must be one of {formats}, got {data_format!r}")


def check(
    x: Tensor, rank: int, channels_last: bool, channels: int | None = None, coords: int = 0
) -> None:
    """Say what is wrong with an input; an unknown length of a traced program is -1."""
    if not paddle.is_floating_point(x):
        raise TypeError(f"input must be floating-point, got {x.dtype}")
    axis = -1 if channels_last else -1 - rank
    check_input(x.shape, rank=rank, channels=channels, coords=coords, channel_axis=axis, batched=1)


def steps(layer: Any, output_size: Any = None) -> dict[str, Any]:
    """The arguments of the functional that computes a layer, beside tensors and groups."""
    steps = {
        "stride": layer._stride,
        "padding": _padding(layer),
        "dilation": layer._dilation,
        "data_format": layer._data_format,
    }
    if layer.transposed:
        steps["output_padding"] = layer.output_padding if output_size is None else 0
        steps["output_size"] = output_size
    return steps


def geometry(
    layer: Any, shape: Sequence[Any] | None = None, output_size: Any = None
) -> ConvGeometry:
    """The geometry of a Paddle convolution, as its attributes are now.

    Padding of ``"SAME"`` depends on the spatial ``shape`` of the input: None stands for any
    multiple of the stride, and ValueError says that a traced program has to know it. The
    ``output_size`` is what the call wants of a transposed layer, or None.
    """
    kernel, stride = tuple(layer._kernel_size), tuple(layer._stride)
    same, pads = _pads(layer)
    if same and max(stride) > 1 and not all(isinstance(n, int) for n in shape or ()):
        raise ValueError(
            "input_spec must fix the spatial shape of a layer with stride, padding='SAME' and "
            "coordinates that extend outside"
        )
    options: dict[str, Any] = {"padding_mode": layer._padding_mode}
    if layer._padding_mode != "zeros":
        ends = layer._reversed_padding_repeated_twice  # the last axis first
        pads = tuple(zip(ends[::2], ends[1::2], strict=True))[::-1]
    elif layer.transposed:
        if same:
            pads = _geometry(kernel, stride=stride, padding="same").pads(shape or stride)
        extra = 0 if output_size is not None else layer.output_padding
        if isinstance(extra, int):
            extra = [extra] * layer.rank  # since for a cache 1.0, which is refused, is 1
        extra = tuple(extra) if isinstance(extra, list) else extra
        options = {"transposed": True, "output_padding": extra}
    return _geometry(
        kernel,
        stride=stride,
        padding=pads,
        dilation=1 if same else tuple(layer._dilation),
        groups=layer._groups,
        **options,
    )


def arguments(geometry: ConvGeometry) -> dict[str, Any]:
    """The arguments of a Paddle convolution with this geometry, or NotImplementedError."""
    kernel, stride, dilation, output_padding, holes = geometry.per_axis
    pads: Any = geometry.padding
    same, mode = pads == "same", geometry.padding_mode
    ends: tuple[int, ...] = () if same else tuple(end for pair in pads for end in pair)
    copying, unequal = mode != "zeros", len(set(ends)) > 1
    lacking = {
        "input_dilation": max(holes) > 1,
        "dilation with padding='SAME'": same and max(dilation) > 1,
        "padding_mode with padding='SAME'": same and copying,
        "padding_mode with unequal padding": copying and unequal,
        "padding_mode in a transposed convolution": copying and geometry.transposed,
        "negative padding": min(ends, default=0) < 0,
        "output_padding of the stride or more": any(
            extra >= s for extra, s in zip(output_padding, stride, strict=True)
        ),
    }
    for option, wanted in lacking.items():
        if wanted:
            raise NotImplementedError(f"paddle convolutions have no {option}")
    extra = {"output_padding": list(output_padding)}
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": "SAME" if same else ends[0] if copying else ends,
        "dilation": dilation,
        "groups": geometry.groups,
        **(extra if geometry.transposed else {"padding_mode": mode}),
    }


def _padding(layer: Any) -> Any:
    """A layer's padding; of two or three axes its constructor has split in two attributes."""
    if layer._padding_mode != "zeros":
        return 0  # pad has done it
    if layer.rank == 1 or layer.transposed:
        return layer._padding
    return "SAME" if layer._padding_algorithm == "SAME" else layer._updated_padding


def _pads(layer: Any) -> tuple[bool, Any]:
    """Whether a layer's padding is "SAME", and what ConvGeometry takes for it."""
    padding = _padding(layer)
    if isinstance(padding, str):
        same = padding.upper() == "SAME"
        return same, "same" if same else 0
    if isinstance(padding, int):
        return False, padding
    if not isinstance(padding[0], int):  # a pair for every axis of the input
        return False, tuple(map(tuple, padding[1:-1] if layer.channels_last else padding[2:]))
    if len(padding) == 2 * layer.rank:
        return False, tuple(zip(padding[::2], padding[1::2], strict=True))
    return False, tuple(padding)
