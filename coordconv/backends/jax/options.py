"""Options of Flax convolutions as :class:`~coordconv.geometry.ConvGeometry`, and back.

NNX and Linen spell the options alike. Several kinds of padding depend on the input's size, so that
a geometry is that of a layer and an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from coordconv.geometry import ConvGeometry

_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}
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
    return _per_axis(conv.kernel_size, 1)


def geometry(conv: Any, shape: Sequence[Any]) -> ConvGeometry:
    """The geometry of a Flax convolution, as its attributes are now, for an input of that shape."""
    kernel = kernel_size(conv)
    strides = _per_axis(conv.strides, len(kernel))
    dilation = _per_axis(conv.kernel_dilation, len(kernel))
    if is_transposed(conv):
        return _geometry(
            kernel,
            stride=strides,
            padding=_transposed_pads(conv, shape, kernel, strides, dilation),
            dilation=dilation,
            transposed=True,
            padding_mode="circular" if conv.padding == "CIRCULAR" else "zeros",
        )
    padding: Any = conv.padding
    mode = "zeros"
    if not isinstance(padding, str | int):
        padding = tuple(p if isinstance(p, int) else tuple(p) for p in padding)
    elif padding in _MODES:
        padding, mode = _half(kernel, dilation), _MODES[padding]  # type: ignore[index]
    elif padding == "CAUSAL":
        reach = dilation[0] * (kernel[0] - 1)
        padding = ((reach, 0), *((0, 0),) * (len(kernel) - 1))  # Flax refuses other axes itself
    elif isinstance(padding, str):  # lax takes lower case, too
        padding = {"VALID": 0, "SAME_LOWER": "lower"}.get(padding.upper(), "same")
    if padding == "lower":
        pads = _geometry(kernel, strides, "same", dilation).pads(shape)
        padding = tuple((before, after) for after, before in pads)
    return _geometry(
        kernel,
        stride=strides,
        padding=padding,
        dilation=dilation,
        groups=groups(conv),
        input_dilation=_per_axis(conv.input_dilation, len(kernel)),
        padding_mode=mode,
    )


def _transposed_pads(
    conv: Any,
    shape: Sequence[Any],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """What is cut off the full output: Flax says how far the spread input is padded instead."""
    pads = []
    for axis, (n, k, s, d) in enumerate(zip(shape, kernel, strides, dilation, strict=True)):
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


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _half(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The padding of Flax's ``CIRCULAR`` and ``REFLECT``: half the kernel, whatever the stride."""
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((r // 2, r - r // 2) for r in reach)


def arguments(geometry: ConvGeometry) -> dict[str, Any]:
    """The arguments of a Flax convolution with this geometry.

    Raises:
        NotImplementedError: Flax's convolutions lack an option, or XLA gets it wrong.
    """
    kernel, strides, dilation, extra, holes = geometry.per_axis
    found = {"kernel_size": kernel, "strides": strides, "kernel_dilation": dilation}
    padding: Any = geometry.padding
    if geometry.transposed:
        if geometry.groups > 1:
            raise NotImplementedError("Flax transposed convolutions have no groups")
        if geometry.padding_mode != "zeros":
            raise NotImplementedError("Flax's circular transposed convolutions have other offsets")
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = [(r - p, r - q + e) for r, (p, q), e in zip(reach, padding, extra, strict=True)]
        _check_cut(strides, padding)
        return {**found, "padding": padding}
    half = _half(kernel, dilation)
    if padding == "same":  # at stride 1 it is the same for every input
        padding = "SAME" if max(strides) > 1 else half
    if geometry.padding_mode != "zeros" and padding != ((0, 0),) * geometry.rank:
        if geometry.padding_mode not in _MODES.values() or padding != half:
            raise NotImplementedError(
                f"Flax convolutions have no padding_mode={geometry.padding_mode!r}, or not by this "
                "much"
            )
        padding = geometry.padding_mode.upper()
    if isinstance(padding, str) and max(holes) > 1:
        raise NotImplementedError(
            f"Flax convolutions have no padding={padding!r} with input_dilation"
        )
    if not isinstance(padding, str):
        _check_cut(holes, padding)
    return {
        **found,
        "padding": padding,
        "input_dilation": holes,
        "feature_group_count": geometry.groups,
    }


def _check_cut(spread: tuple[int, ...], padding: Sequence[tuple[int, int]]) -> None:
    """Refuse what XLA computes wrongly: on a CPU it reads beyond the input (jax 0.10.2).

    Its own convolutions are as wrong, whatever their strides, but not where the input is spread.
    """
    if max(spread) == 1 and any(before < 0 < after for before, after in padding):
        raise NotImplementedError(
            "XLA's convolutions are wrong where an axis is cut at its start and padded at its end, "
            "without coordinates too"
        )
