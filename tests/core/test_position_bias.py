"""The position bias, contracted by NumPy, against the definition: concatenate, then convolve."""

import math
import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import coordinate_grid
from coordconv.position_bias import (
    MOST_TOGETHER,
    Share,
    by_axis,
    position_bias,
    shares,
)
from coordconv.reference import Reference
from definition import UNIT, Case, cases, coordinate, coordinates_of_rank, gamma, geometries, reads


def convolve(share: Share, kernel: Any) -> Any:
    """What a backend's convolution does with a channel that is not separable, tap by tap."""
    padded, rank = share.padded, len(share.stride)
    if share.flip:
        kernel = np.flip(kernel, tuple(range(-rank, 0)))
    lengths = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(
            padded.shape[1:], kernel.shape[2:], share.stride, share.dilation, strict=True
        )
    ]
    total = np.zeros((len(kernel), *lengths), kernel.dtype)
    for tap in product(*map(range, kernel.shape[2:])):
        window = tuple(
            slice(k * d, k * d + (m - 1) * s + 1, s)
            for k, d, m, s in zip(tap, share.dilation, lengths, share.stride, strict=True)
        )
        read = padded[(slice(None), *window)]
        total += np.einsum("oc,c...->o...", kernel[(..., *tap)], read)
    return total


def bias_of(case: Case, dtype: Any = np.float64, make: Any = by_axis, **options: Any) -> Any:
    assert case.coords
    arrays = make(case.geometry, case.coords, case.shape, dtype)
    kernel = case.weights["coord_weight"].astype(dtype)
    return position_bias(kernel, arrays, convolve=convolve, **options)


def real(case: Case, seed: int) -> Case:
    """The case with real numbers for its integers."""
    rng = np.random.default_rng(seed)
    case.x = rng.normal(size=case.x.shape)
    case.weights = {name: rng.normal(size=a.shape) for name, a in case.weights.items()}
    return case


def by_definition(case: Case) -> tuple[Any, Any]:
    """The position bias as what the coordinates add, and the sum of its terms' absolute values."""
    weight = np.zeros_like(case.weights["weight"])
    features = np.zeros((1, case.channels, *case.shape))
    reference = Reference(case.geometry, case.coords)
    kernel = case.weights["coord_weight"]
    return tuple(
        reference.forward(features, weight, kernel, magnitudes=magnitudes)[0]
        for magnitudes in (False, True)
    )


@pytest.mark.parametrize("make", [shares, by_axis])  # axes together where they are small, or apart
@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_adds_to_a_convolution_what_the_coordinates_would(make: Any, case: Case, seed: int) -> None:
    """CoordConv(x) - Conv(x) = P, within the rounding of the three."""
    case = real(case, seed)
    weight, bias = case.weights["weight"], case.weights.get("bias")
    kernel = case.weights["coord_weight"]
    whole, plain = Reference(case.geometry, case.coords), Reference(case.geometry)
    difference = whole.forward(case.x, weight, kernel, bias) - plain.forward(
        case.x, weight, bias=bias
    )
    sizes = [
        whole.forward(case.x, weight, kernel, bias, magnitudes=True),
        plain.forward(case.x, weight, bias=bias, magnitudes=True),
        by_definition(case)[1],
    ]
    # each sum has at most `count` terms, and a term of P one more factor per axis
    bound = gamma(case.count + len(case.shape) + 1) * sum(sizes)
    assert np.all(np.abs(bias_of(case, make=make) - difference) <= bound)


@pytest.mark.parametrize("make", [shares, by_axis])
@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_float32_is_as_close_as_float32_can_be(make: Any, case: Case, seed: int) -> None:
    """Each factor of a term rounds once, each term once per product, and the sum once per term."""
    case = real(case, seed)
    case.weights["coord_weight"] = case.weights["coord_weight"].astype(np.float32)
    expected, size = by_definition(case)
    computed = bias_of(case, np.float32, make)
    assert computed.dtype == np.float32
    count = case.count + 2 * len(case.shape) + 1
    assert np.all(np.abs(computed - expected) <= gamma(count, 2.0**-24) * size)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [shares, by_axis])
@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_order_is_the_same_map(make: Any, fused: bool, last: bool, case: Case) -> None:
    bias = bias_of(case, make=make, channels_last=last, fused=fused)
    bias = np.moveaxis(bias, -1, 0) if last else bias
    bound = 2 * gamma(case.count + len(case.shape)) * by_definition(case)[1]
    assert np.all(np.abs(bias - bias_of(case)) <= bound)


@pytest.mark.parametrize("make", [shares, by_axis])
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tables_are_what_the_taps_read(make: Any, data: st.DataObject) -> None:
    """Of each coordinate, read place by place; through bases up to the roundings of the steps."""
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 9 - rank)] * rank))
    geometry = data.draw(geometries(shape))
    token = data.draw(st.sampled_from("xyz"[:rank] + "r" * (make is shares)))
    coords = Coordinates(token, outside="extend")
    (share,) = make(geometry, coords, shape, np.float64)
    axes = reads(geometry, shape)
    expected = np.zeros((*geometry.kernel, *map(len, axes)))
    for t in product(*(range(len(outputs)) for outputs in axes)):
        for tap in product(*(outputs[p] for outputs, p in zip(axes, t, strict=True))):
            place = tuple(outputs[p][k] for outputs, p, k in zip(axes, t, tap, strict=True))
            expected[(*tap, *t)] = coordinate(coords, token, place, shape)
    for row, (start, stop) in zip(share.last, share.where, strict=True):
        assert not row[:start].any()
        assert not row[stop:].any()
        assert start == stop or (row[start] != 0 and row[stop - 1] != 0)
    found = read_through(share).reshape(expected.shape)
    if share.bases or token == "r":
        # What comes of the middle tap's coordinate and of steps rounds, and so does a root.
        assert np.all(np.abs(found - expected) <= 4 * UNIT * (1 + 2 * np.abs(expected).max()))
    else:
        np.testing.assert_array_equal(found, expected)


def read_through(share: Share) -> Any:
    """What each tap reads at each output position, ``(channels * taps, positions)``."""
    products = np.ones((1, 1))
    for basis in share.bases:
        products = np.kron(products, basis)
    return share.table @ products if share.bases else share.table


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_bases_are_no_larger_than_tables(data: st.DataObject) -> None:
    """At most as many functions as the taps have rows: a ramp and a constant each."""
    shape = data.draw(st.tuples(*[st.integers(1, 12)] * 2))
    geometry = data.draw(geometries(shape))
    for share in by_axis(geometry, Coordinates("xy"), shape, np.float64):
        for basis, k in zip(share.bases, geometry.kernel, strict=True):
            assert len(basis) <= 2 * k


@pytest.mark.parametrize(
    ("options", "functions"),
    [
        ({"padding": 1}, 4),  # constant, ramp, two borders
        ({"padding": 1, "stride": 2}, 3),  # of 8 samples, the last is met in the middle
        ({}, 2),
        ({"padding": 2, "padding_mode": "circular"}, 4),  # constant everywhere, three taps' ramps
        ({"padding": 2, "dilation": 2}, 6),  # two at each border: no fewer than the rows
        ({"transposed": True, "stride": 2}, 6),
    ],
)
def test_functions_are_few(options: dict[str, Any], functions: int) -> None:
    (share,) = by_axis(ConvGeometry((3, 3), **options), Coordinates("xy"), (8, 8), np.float64)
    assert [len(basis) for basis in share.bases] == [functions] * 2


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_arrays_are_float64_rounded_once(data: st.DataObject) -> None:
    """So that every backend, and every precision, stands on the same numbers."""
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    geometry, coords = data.draw(geometries(shape)), data.draw(coordinates_of_rank[rank])
    wide = shares(geometry, coords, shape, np.float64)
    narrow = shares(geometry, coords, shape, np.float32)
    for one, other in zip(wide, narrow, strict=True):
        assert (one.start, one.stop) == (other.start, other.stop)
        for a, b in zip(arrays_of(one), arrays_of(other), strict=True):
            assert b.dtype == np.float32
            np.testing.assert_array_equal(a.astype(np.float32), b)


def test_large_maps_have_a_basis_for_each_axis() -> None:
    geometry, coords = ConvGeometry((1, 1)), Coordinates("xy")
    side = math.isqrt(MOST_TOGETHER // 2)
    (small,) = shares(geometry, coords, (side, side), np.float32)
    (large,) = shares(geometry, coords, (side, 2 * side), np.float32)
    assert (len(small.bases), len(large.bases)) == (0, 2)
    assert small.table.size <= MOST_TOGETHER


def arrays_of(share: Share) -> tuple[Any, ...]:
    return (share.padded,) if share.table is None else (share.table, *share.bases)


@pytest.mark.parametrize(
    ("channels", "runs"),
    [
        ("x", [(0, 1)]),
        ("xy", [(0, 2)]),
        ("r", [(0, 1)]),
        ("xyr", [(0, 2), (2, 3)]),
        ("ryx", [(0, 1), (1, 3)]),
        ("xry", [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_channels_keep_their_order(channels: str, runs: list[tuple[int, int]]) -> None:
    """The radius may stand anywhere; its neighbours' kernels must not move."""
    geometry = ConvGeometry((2, 3), padding=1)
    arrays = by_axis(geometry, Coordinates(channels), (4, 5), np.float64)
    assert [(share.start, share.stop) for share in arrays] == runs
    kernel = np.random.default_rng(0).normal(size=(3, len(channels), 2, 3))
    computed = position_bias(kernel, arrays, convolve=convolve)
    apart = [
        position_bias(
            kernel[:, [i]],
            shares(geometry, Coordinates(token), (4, 5), np.float64),
            convolve=convolve,
        )
        for i, token in enumerate(channels)
    ]
    # products of at most 18 terms, summed in another order
    size = sum(map(np.abs, apart)) + np.abs(kernel).sum(axis=(1, 2, 3)).reshape(-1, 1, 1) * 2
    assert np.all(np.abs(computed - sum(apart)) <= gamma(18 + 4) * 2 * size)


@example(n=2, k=1)
@example(n=1, k=3)
@given(n=st.integers(1, 40), k=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_one_tap_reads_the_grid(n: int, k: int) -> None:
    """The middle tap of a same convolution sees the grid itself."""
    (share,) = shares(ConvGeometry((k,), padding="same"), Coordinates("x"), (n,), np.float32)
    np.testing.assert_array_equal(share.table[(k - 1) // 2], coordinate_grid((n,))[0])


def test_arrays_are_read_only_and_shared() -> None:
    geometry, coords = ConvGeometry((3, 3), padding=1), Coordinates("xr")
    first = shares(geometry, coords, (5, 5), np.float32)
    for share in first:
        for array in arrays_of(share):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    assert shares(ConvGeometry((3, 3), padding=1), Coordinates("xr"), (5, 5), np.float32) is first


@pytest.mark.parametrize(
    "other",
    [
        (ConvGeometry((3, 3), padding=2), Coordinates("xy"), (5, 5), np.float32),
        (
            ConvGeometry((3, 3), padding=1, padding_mode="reflect"),
            Coordinates("xy"),
            (5, 5),
            np.float32,
        ),
        (ConvGeometry((3, 3), padding=1, stride=2), Coordinates("xy"), (5, 5), np.float32),
        (ConvGeometry((3, 3), padding=1), Coordinates("yx"), (5, 5), np.float32),
        (ConvGeometry((3, 3), padding=1), Coordinates("xy", span=(0, 1)), (5, 5), np.float32),
        (ConvGeometry((3, 3), padding=1), Coordinates("xy", align="edges"), (5, 5), np.float32),
        (ConvGeometry((3, 3), padding=1), Coordinates("xy", outside="extend"), (5, 5), np.float32),
        (ConvGeometry((3, 3), padding=1), Coordinates("xy"), (5, 6), np.float32),
        (ConvGeometry((3, 3), padding=1), Coordinates("xy"), (5, 5), np.float64),
    ],
)
def test_the_cache_is_keyed_by_everything_that_matters(other: tuple[Any, ...]) -> None:
    base = shares(ConvGeometry((3, 3), padding=1), Coordinates("xy"), (5, 5), np.float32)
    (one,), (two,) = base, shares(*other)
    same = [
        a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(arrays_of(one), arrays_of(two), strict=True)
    ]
    assert not all(same)


def test_the_cache_is_bounded() -> None:
    geometry = ConvGeometry((3,))
    for n in range(3, 300):
        shares(geometry, Coordinates("x"), (n,), np.float32)
    info = shares.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize < 297


def test_threads_share_the_cache() -> None:
    geometry, coords = ConvGeometry((3, 3), padding=1), Coordinates("xyr")
    shares.cache_clear()
    expected = {n: shares(geometry, coords, (n, n + 1), np.float64) for n in range(1, 90)}
    shares.cache_clear()
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in np.random.default_rng(seed).permutation(list(expected)).tolist():
                found = shares(geometry, coords, (n, n + 1), np.float64)
                for a, b in zip(found, expected[n], strict=True):
                    for one, other in zip(arrays_of(a), arrays_of(b), strict=True):
                        np.testing.assert_array_equal(one, other)
        except BaseException as problem:  # noqa: BLE001  # told to the main thread
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize(
    ("geometry", "coords", "shape", "message"),
    [
        (ConvGeometry((3, 3)), "xyz", (5, 5), "axis 'z', which a 2-D grid does not have"),
        (ConvGeometry((3, 3)), "xy", (5,), "2 spatial axes"),
        (ConvGeometry((3, 3)), "xy", (0, 5), "no empty axis"),
        (ConvGeometry((3, 3)), "xy", (2, 5), "output would be empty"),
    ],
)
def test_errors(geometry: ConvGeometry, coords: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(geometry, Coordinates(coords), shape, np.float32)


def test_with_one_tap_the_radius_is_a_table() -> None:
    """Compiled by torch, the gradient of such a convolution with one channel fails."""
    for geometry in (ConvGeometry((1, 1), stride=2), ConvGeometry((1, 1), transposed=True)):
        runs = by_axis(geometry, Coordinates("rx"), (5, 7), np.float32)
        assert all(share.table is not None and share.padded is None for share in runs)
    (share, _) = by_axis(ConvGeometry((1, 3)), Coordinates("rx"), (5, 7), np.float32)
    assert share.padded is not None
