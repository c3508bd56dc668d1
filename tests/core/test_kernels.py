"""The one kernel of a CoordConv: its two parts, their order, and what is no such kernel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv.backends import BACKENDS
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import coordinate_grid
from coordconv.reference import Reference
from coordconv.weights import join_kernel, split_kernel
from coordconv.weights.kernels import KernelLayout, fit_state, same_channels
from definition import coordinates_of_rank

POSITIONS = ("last", "first")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[KernelLayout, tuple[int, ...]]:
    """Any layout, with the canonical shape of its kernel."""
    rank = draw(st.integers(1, 3))
    coords = draw(coordinates_of_rank[rank])
    groups, features, out = (draw(st.integers(1, 3)) for _ in range(3))
    layout = KernelLayout(coords, groups * features, groups, draw(st.booleans()))
    size = draw(st.tuples(*[st.integers(1, 3)] * rank))
    width = features + len(coords)
    channels = (groups * width, out) if layout.transposed else (groups * out, width)
    return layout, (*channels, *size)


def numbered(shape: tuple[int, ...]) -> Any:
    """Every element another."""
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape)


def parts_by_hand(layout: KernelLayout, kernel: Any, position: str = "last") -> tuple[Any, Any]:
    """Group by group, from what the layout promises."""
    n, groups = len(layout.coords), layout.groups
    plain, coordinates = [], []
    for group in np.split(kernel, groups, axis=0):  # of outputs, or of inputs if transposed
        inputs = group if layout.transposed else group.swapaxes(0, 1)
        at = n if position == "first" else 0
        features = inputs[at : at + len(inputs) - n]
        rest = inputs[:n] if position == "first" else inputs[len(inputs) - n :]
        plain.append(features if layout.transposed else features.swapaxes(0, 1))
        coordinates.append(rest.swapaxes(0, 1))
    return np.concatenate(plain), np.concatenate(coordinates)


# --- splitting and joining -----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(layouts(), st.sampled_from(POSITIONS))
def test_split_and_join_are_inverse(
    of: tuple[KernelLayout, tuple[int, ...]], position: Any
) -> None:
    layout, shape = of
    kernel = numbered(shape)
    options = (layout.groups, layout.transposed)
    features, coordinates = split_kernel(kernel, layout.coords, *options, position=position)
    for part, wanted in zip(
        (features, coordinates), parts_by_hand(layout, kernel, position), strict=True
    ):
        np.testing.assert_array_equal(part, wanted, strict=True)
        assert not np.shares_memory(part, kernel)
    out = shape[1] * layout.groups if layout.transposed else shape[0]
    assert coordinates.shape == (out, len(layout.coords), *shape[2:])
    joined = join_kernel(features, coordinates, *options, position=position)
    np.testing.assert_array_equal(joined, kernel, strict=True)
    assert not np.shares_memory(joined, features)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_a_layout_splits_and_joins_the_same(of: tuple[KernelLayout, tuple[int, ...]]) -> None:
    layout, shape = of
    kernel = numbered(shape)
    assert shape[layout.axis] == layout.width
    parts = layout.split(kernel)
    for part, wanted in zip(parts, parts_by_hand(layout, kernel), strict=True):
        np.testing.assert_array_equal(part, wanted, strict=True)
    assert parts[0].shape[layout.axis] == layout.plain_width
    np.testing.assert_array_equal(layout.join(*parts, np.concatenate), kernel, strict=True)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_coordinates_that_come_first(of: tuple[KernelLayout, tuple[int, ...]]) -> None:
    layout, shape = of
    kernel = numbered(shape)
    last = layout.moved(kernel, "last")
    for part, wanted in zip(
        layout.split(last), parts_by_hand(layout, kernel, "first"), strict=True
    ):
        np.testing.assert_array_equal(part, wanted)
    np.testing.assert_array_equal(layout.moved(last, "first"), kernel)
    np.testing.assert_array_equal(layout.fitted(kernel, np.concatenate, zeros, "first"), last)


def zeros(shape: tuple[int, ...], like: Any) -> Any:
    return np.zeros(shape, like.dtype)


# Rank, groups, transposed: all that makes one kernel another one.
KINDS = [(r, g, t) for r in (1, 2, 3) for g in (1, 2, 3) for t in (False, True)]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("rank", "groups", "transposed"), KINDS)
def test_the_kernel_is_that_of_a_convolution_over_a_concatenation(
    rank: int, groups: int, transposed: bool, position: Any
) -> None:
    """Of the features of each group and all coordinates, in whichever order."""
    rng = np.random.default_rng(0)
    geometry = ConvGeometry(
        (3, 2, 2)[:rank], stride=2, padding=1, groups=groups, transposed=transposed
    )
    coords = {1: Coordinates("x"), 2: Coordinates("yx"), 3: Coordinates("xzy")}[rank]
    layout = KernelLayout(coords, 2 * groups, groups, transposed)
    sides = (layout.width, 3) if transposed else (3 * groups, layout.width)
    kernel = rng.integers(-2, 3, (*sides, *geometry.kernel)).astype(np.float64)
    x = rng.integers(-2, 3, (2, 2 * groups, *(5, 3, 9)[:rank])).astype(np.float64)
    grid = coordinate_grid(x.shape[2:], coords)
    repeated = np.broadcast_to(grid, (len(x), *grid.shape))
    order = 1 if position == "last" else -1
    parts = [p for group in np.split(x, groups, axis=1) for p in (group, repeated)[::order]]
    whole = Reference(geometry).forward(np.concatenate(parts, axis=1), kernel)
    ours = join_kernel(
        *split_kernel(kernel, coords, groups, transposed, position=position), groups, transposed
    )
    np.testing.assert_array_equal(Reference(geometry, coords).forward(x, ours), whole)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "c8", "i1"])
def test_the_dtype_is_kept(dtype: str) -> None:
    kernel = np.arange(36).reshape(3, 4, 3).astype(dtype)
    parts = split_kernel(kernel, "x")
    assert [part.dtype for part in parts] == [np.dtype(dtype)] * 2
    assert join_kernel(*parts).dtype == np.dtype(dtype).newbyteorder("=")


def test_coords_may_be_tokens_or_all_axes() -> None:
    kernel = numbered((3, 5, 1, 1))
    for coords in (None, "yx", ("x", "r"), Coordinates("xy", span=(0, 1))):
        features, coordinates = split_kernel(kernel, coords)
        np.testing.assert_array_equal(np.concatenate([features, coordinates], axis=1), kernel)
        assert coordinates.shape[1] == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 4)), "x"), ValueError, r"1 to 3 spatial axes and 2 more, got \(2, 4\)"),
        ((np.ones([1] * 6), "x"), ValueError, "weight must have 1 to 3 spatial axes and 2 more"),
        ((np.ones((2, 4, 1)), "xy"), ValueError, "axis 'y', which a 1-D grid does not have"),
        ((np.ones((2, 4, 1)), "x", 2.0), TypeError, "groups must be an int, got 2.0"),
        ((np.ones((2, 4, 1)), "x", True), TypeError, "groups must be an int, got True"),
        ((np.ones((2, 4, 1)), "x", 0), ValueError, "divide the kernel's 2 output channels, got 0"),
        ((np.ones((2, 4, 1)), "x", 3), ValueError, "divide the kernel's 2 output channels, got 3"),
        (
            (np.ones((2, 2, 1, 1)), "xy"),
            ValueError,
            r"more than the 2 coordinates .* got 2 in shape \(2, 2, 1, 1\)",
        ),
        ((np.ones((1, 1, 4, 2)), "xyr"), ValueError, "more than the 3 coord.* got 1"),
        ((np.ones((5, 4, 1)), "x", 2, True), ValueError, "kernel's 5 input channels, got 2"),
        ((np.ones((2, 4, 1)), "x", 2, True), ValueError, "more than the 1 coord.* got 1 in shape"),
    ],
)
def test_what_cannot_be_split(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_kernel(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 4)), np.ones((2, 1))), ValueError, r"features must .* got \(2, 4\)"),
        ((np.ones((2, 4, 1)), np.ones((2, 1, 1)), 2.0), TypeError, "groups must be an int"),
        ((np.ones((2, 4, 1)), np.ones((2, 1, 1)), 3), ValueError, "2 output channels, got 3"),
        ((np.ones((3, 4, 1)), np.ones((8, 1, 1)), 2, True), ValueError, "3 input channels, got 2"),
        (
            (np.ones((2, 4, 3, 1)), np.ones((2, 2, 1, 3))),
            ValueError,
            r"coordinates must have shape \(2, n, 3, 1\), got \(2, 2, 1, 3\)",
        ),
        ((np.ones((2, 4, 1)), np.ones((3, 1, 1))), ValueError, r"shape \(2, n, 1\), got \(3, 1, 1"),
        ((np.ones((2, 4, 1)), np.ones((2, 0, 1))), ValueError, r"shape \(2, n, 1\), got \(2, 0, 1"),
        ((np.ones((2, 4, 1)), np.ones(2)), ValueError, r"shape \(2, n, 1\), got \(2,\)"),
    ],
)
def test_what_cannot_be_joined(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        join_kernel(*arguments)


@pytest.mark.parametrize("position", ["middle", "First", "", None, 0])
def test_a_position_that_is_neither_word(position: Any) -> None:
    layout = KernelLayout(Coordinates("x"), 2)
    for call in (
        lambda: split_kernel(np.ones((1, 3, 1)), "x", position=position),
        lambda: join_kernel(np.ones((1, 2, 1)), np.ones((1, 1, 1)), position=position),
        lambda: fitted_state({}, layout, position=position),
    ):
        with pytest.raises(ValueError, match=r"position must be one of \('last', 'first'\), got "):
            call()


# --- the same coordinates in another order -------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(layouts(), st.randoms(use_true_random=False))
def test_the_same_coordinates_in_another_order(
    of: tuple[KernelLayout, tuple[int, ...]], random: Any
) -> None:
    """The channels move with their coordinates, in every group, and nothing else moves."""
    layout, shape = of
    tokens = list(layout.coords.channels)
    random.shuffle(tokens)
    made_for = Coordinates.from_dict({**layout.coords.to_dict(), "channels": tokens})
    kernel = numbered(shape)
    features, coordinates = layout.split(layout.reordered(kernel, made_for))
    features_before, before = layout.split(kernel)
    np.testing.assert_array_equal(features, features_before)
    for i, token in enumerate(layout.coords.channels):
        np.testing.assert_array_equal(coordinates[:, i], before[:, tokens.index(token)])


@pytest.mark.parametrize(
    "other",
    [
        Coordinates("xy", span=(0, 1)),
        Coordinates("xy", align="edges"),
        Coordinates("xy", outside="extend"),
        Coordinates("xy", r_center=0.5),
        Coordinates("xr"),
        Coordinates("x"),
        Coordinates("xyr"),
    ],
)
def test_other_coordinates(other: Coordinates) -> None:
    assert not same_channels(other, Coordinates("xy"))


# --- a plain convolution's kernel, and a framework's state ---------------------------------------


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from(POSITIONS))
def test_a_plain_kernel_is_given_zeros_for_the_coordinates(
    of: tuple[KernelLayout, tuple[int, ...]], position: Any
) -> None:
    layout, shape = of
    plain, coordinates = layout.split(numbered(shape).astype(np.float32))
    found = layout.fitted(plain, np.concatenate, zeros, position)
    wanted = join_kernel(plain, 0 * coordinates, layout.groups, layout.transposed)
    np.testing.assert_array_equal(found, wanted, strict=True)


def test_a_kernel_that_fits_is_passed_as_it_is() -> None:
    kernel = np.ones((4, 5, 1))
    assert KernelLayout(Coordinates("x"), 4).fitted(kernel, np.concatenate, zeros) is kernel


@pytest.mark.parametrize(
    ("layout", "shape", "numbers"),
    [
        (KernelLayout(Coordinates("xyr"), 16), (8, 17, 3, 3), (19, 16, "axis 1, got 17")),
        (KernelLayout(Coordinates("xyr"), 16, 4), (8, 16, 3, 3), (7, 4, "axis 1, got 16")),
        (KernelLayout(Coordinates("xy"), 16, 1, True), (17, 8, 3, 3), (18, 16, "axis 0, got 17")),
        (KernelLayout(Coordinates("xy"), 16, 4, True), (18, 2, 3, 3), (24, 16, "axis 0, got 18")),
    ],
)
def test_a_kernel_that_fits_neither(layout: KernelLayout, shape: Any, numbers: Any) -> None:
    whole, plain, found = numbers
    message = (
        rf"a kernel must have {whole} input channels \(features and coordinates\) or {plain} "
        rf"\(features alone\) on {found} in shape \({shape[0]}, "
    )
    with pytest.raises(ValueError, match=message):
        layout.fitted(np.ones(shape), np.concatenate, zeros)
    with pytest.raises(ValueError, match=f"net.conv1.weight: {message}"):
        fitted_state({"net.conv1.weight": np.ones(shape)}, layout, "net.conv1.")


def fitted_state(state: Any, layout: KernelLayout, prefix: str = "", **options: Any) -> Any:
    fit_state(state, prefix, layout, concatenate=np.concatenate, zeros=zeros, **options)
    return state


LAYOUT = KernelLayout(Coordinates("xy"), 3)


def test_a_state_of_other_names() -> None:
    """``conv.weight`` stands for ``weight``, unless the layer has a ``conv``."""
    kernel, unused, bias = np.ones((4, 5, 1, 1)), np.zeros((4, 3, 1, 1)), np.ones(4)
    theirs = {"a.conv.weight": kernel, "a.conv.bias": bias, "b.conv.weight": unused}
    assert fitted_state(dict(theirs), LAYOUT, "a.") == {
        "a.weight": kernel,
        "a.bias": bias,
        "b.conv.weight": unused,
    }
    # As walsvid's layers, which are themselves convolutions, and never use that kernel.
    found = fitted_state({"a.weight": unused, "a.bias": 0 * bias, **theirs}, LAYOUT, "a.")
    assert found["a.weight"] is kernel
    assert found["a.bias"] is bias
    assert fitted_state(dict(theirs), LAYOUT, "a.", nested=False) == theirs


@pytest.mark.parametrize("weight", [None, np.ones(3), np.ones((3, 4)), np.ones([1] * 6), "text"])
def test_what_is_no_kernel_is_left_for_the_framework_to_refuse(weight: Any) -> None:
    state = {} if weight is None else {"weight": weight}
    assert fitted_state(dict(state), LAYOUT) == state


# --- arrays of every framework -------------------------------------------------------------------


def framework(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """A tensor of an array, the concatenation, and zeros."""
    if name == "torch":
        import torch

        return torch.tensor, torch.cat, lambda shape, like: like.new_zeros(shape)
    if name == "paddle":
        import paddle

        return paddle.to_tensor, paddle.concat, lambda s, like: paddle.zeros(s, like.dtype)
    import jax.numpy as jnp

    return jnp.asarray, jnp.concatenate, lambda shape, like: jnp.zeros(shape, like.dtype)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("name", ["torch", "paddle", "flax"])
def test_arrays_of_any_framework(name: str, groups: int, transposed: bool) -> None:
    if BACKENDS[name].missing:
        pytest.skip(f"{name} is not installed")
    tensor, concatenate, made_zeros = framework(name)
    layout = KernelLayout(Coordinates("xy"), 4, groups, transposed)
    sides = (layout.width, 3) if transposed else (3 * groups, layout.width)
    kernel = numbered((*sides, 2, 3)).astype(np.float32)
    given = tensor(kernel)
    parts, wanted = layout.split(given), layout.split(kernel)
    plain = layout.join(wanted[0], 0 * wanted[1], np.concatenate)
    for found, array in (
        *zip(parts, wanted, strict=True),
        (layout.join(*parts, concatenate), kernel),
        (layout.moved(given, "last"), layout.moved(kernel, "last")),
        (layout.moved(given, "first"), layout.moved(kernel, "first")),
        (
            layout.reordered(given, Coordinates("yx")),
            layout.reordered(kernel, Coordinates("yx")),
        ),
        (layout.fitted(parts[0], concatenate, made_zeros), plain),
    ):
        np.testing.assert_array_equal(np.asarray(found), array)
