"""Options of Flax convolutions as :class:`~coordconv.geometry.ConvGeometry`, and back.

NNX and Linen spell the options alike. Several kinds of padding depend on the input's size, so that
a geometry is that of a layer and an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from coordconv.geometry import ConvGeometry, Pairs

_MODES = ("CIRCULAR", "REFLECT")  # paddings that are modes, too
_geometry = lru_cache(maxsize=256)(ConvGeometry)


def is_transposed(conv: Any) -> bool:
    """Whether a Flax layer is a transposed convolution."""
    return hasattr(conv, "transpose_kernel")


def is_reversed(conv: Any) -> bool:
    """Whether a Flax layer keeps its taps in the reverse of the canonical order."""
    return is_transposed(conv) and not conv.transpose_kernel


def input_axis(conv: Any) -> int:
    """The axis of a Flax layer's kernel that holds the input channels."""
    return -1 if is_transposed(conv) and conv.transpose_kernel else -2


def groups(conv: Any) -> int:
    """The number of groups; Flax's transposed convolutions have none."""
    return getattr(conv, "feature_group_count", 1)


def kernel_size(conv: Any) -> tuple[int, ...]:
    """The kernel's length on each axis; Flax takes an int for one axis."""
    return per_axis(conv.kernel_size, 1)


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """One int for each axis, of what Flax takes for it; None is 1."""
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)


def geometry(conv: Any, shape: Sequence[Any]) -> ConvGeometry:
    """The geometry of a Flax convolution, as its attributes are now, for an input of that shape."""
    kernel = kernel_size(conv)
    strides, dilation, holes = (
        per_axis(getattr(conv, name, 1), len(kernel))
        for name in ("strides", "kernel_dilation", "input_dilation")
    )
    pads = _transposed_pads if is_transposed(conv) else _pads
    return _geometry(
        kernel,
        strides,
        pads(conv, shape, kernel, strides, dilation),
        dilation,
        groups(conv),
        transposed=is_transposed(conv),
        input_dilation=holes,
        padding_mode=conv.padding.lower() if conv.padding in _MODES else "zeros",
    )


def _pads(conv: Any, shape: Sequence[Any], *options: tuple[int, ...]) -> Any:
    """The padding of a convolution as ConvGeometry takes it; options as in ``geometry``."""
    padding, (kernel, strides, dilation) = conv.padding, options
    if isinstance(padding, int):
        return padding
    if not isinstance(padding, str):
        return tuple(p if isinstance(p, int) else tuple(p) for p in padding)
    if padding in _MODES:
        return _half(kernel, dilation)
    if padding == "CAUSAL":
        return ((dilation[0] * (kernel[0] - 1), 0), *((0, 0),) * (len(kernel) - 1))
    if padding.upper() == "SAME_LOWER":  # lax takes lower case, too
        pads = _geometry(kernel, strides, "same", dilation).pads(shape)
        return tuple((before, after) for after, before in pads)
    return 0 if padding.upper() == "VALID" else "same"


def _transposed_pads(conv: Any, shape: Sequence[Any], *options: tuple[int, ...]) -> Pairs:
    """What is cut off the full output: Flax says how far the spread input is padded instead."""
    pads = []
    for axis, (n, k, s, d) in enumerate(zip(shape, *options, strict=True)):
        reach = d * (k - 1)
        if conv.padding == "SAME":
            before = reach if s > reach else -(-(reach + s - 1) // 2)
            pads.append((reach - before, before - s + 1))
        elif conv.padding == "VALID":
            pads.append((0, min(reach + 1 - s, 0)))
        elif conv.padding == "CIRCULAR":  # VALID, padded to whole periods that are then summed
            missing = (n * s - ((n - 1) * s + max(reach + 1, s))) % (2 * n * s)
            pads.append((-((missing + (not conv.transpose_kernel)) // 2), 0))
        else:
            given = conv.padding if isinstance(conv.padding, int) else conv.padding[axis]
            before, after = (given, given) if isinstance(given, int) else given
            pads.append((reach - before, reach - after))
    return tuple(pads)


def _half(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Pairs:
    """The padding of Flax's ``CIRCULAR`` and ``REFLECT``: half the kernel, whatever the stride."""
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((r // 2, r - r // 2) for r in reach)


def arguments(geometry: ConvGeometry) -> dict[str, Any]:
    """The arguments of a Flax convolution with this geometry.

    NotImplementedError says that Flax's convolutions lack an option, or XLA gets it wrong.
    """
    kernel, strides, dilation, extra, holes = geometry.per_axis
    found: dict[str, Any] = {"kernel_size": kernel, "strides": strides, "kernel_dilation": dilation}
    padding: Any = geometry.padding
    mode = geometry.padding_mode
    if geometry.transposed:
        if geometry.groups > 1:
            raise NotImplementedError("Flax transposed convolutions have no groups")
        if mode != "zeros":
            raise NotImplementedError("Flax's circular transposed convolutions have other offsets")
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = [(r - p, r - q + e) for r, (p, q), e in zip(reach, padding, extra, strict=True)]
    else:
        found |= {"input_dilation": holes, "feature_group_count": geometry.groups}
        half = _half(kernel, dilation)
        if padding == "same":  # at stride 1 it is the same for every input
            padding = "SAME" if max(strides) > 1 else half
        if mode != "zeros" and padding != ((0, 0),) * geometry.rank:
            if mode.upper() not in _MODES or padding != half:
                raise NotImplementedError(
                    f"Flax convolutions have no padding_mode={mode!r}, or not by this much"
                )
            padding = mode.upper()
    spread = strides if geometry.transposed else holes
    if isinstance(padding, str):
        if max(holes) > 1:
            raise NotImplementedError(
                f"Flax convolutions have no padding={padding!r} with input_dilation"
            )
    elif max(spread) == 1 and any(before < 0 < after for before, after in padding):
        # On a CPU XLA reads beyond the input (jax 0.10.2), but not where the input is spread.
        raise NotImplementedError(
            "XLA's convolutions are wrong where an axis is cut at its start and padded at its end, "
            "without coordinates too"
        )
    return found | {"padding": padding}
