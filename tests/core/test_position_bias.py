"""Append or map: P by NumPy against the definition, and what decides between the two ways."""

import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv import position_bias
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.position_bias import (
    APPEND,
    MANY_PRODUCTS,
    MAP,
    MapPlan,
    choose,
    costs,
    known,
)
from coordconv.reference import Reference
from coordconv.weights.kernels import KernelLayout
from definition import UNIT, Case, cases, coordinate, coordinates_of_rank, gamma, geometries, reads

GRID = MapPlan.padded_grid


def convolution(grid: Any, kernel: Any, bias: Any, stride: Any, padding: int, dilation: Any) -> Any:
    """A backend's convolution of a padded grid, tap by tap."""
    grid = grid[0]
    steps = list(zip(stride, dilation, strict=True))
    lengths = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, (s, d) in zip(grid.shape[1:], kernel.shape[2:], steps, strict=True)
    ]
    total = np.zeros((len(kernel), *lengths), kernel.dtype)
    for tap in product(*map(range, kernel.shape[2:])):
        window = tuple(
            slice(k * d, k * d + (m - 1) * s + 1, s)
            for k, m, (s, d) in zip(tap, lengths, steps, strict=True)
        )
        total += np.einsum("oc,c...->o...", kernel[(..., *tap)], grid[(slice(None), *window)])
    return total[None]


def coordinates_part(case: Case) -> Any:
    assert case.coords
    g = case.geometry
    layout = KernelLayout(case.coords, case.channels, g.groups, g.transposed)
    return layout.split(case.weights["weight"])[1]


def plan_of(case: Case) -> MapPlan:
    assert case.coords
    return MapPlan(case.geometry, case.coords, case.shape, case.geometry.output_shape(case.shape))


def map_of(case: Case, dtype: Any, by_axes: bool) -> Any:
    """P, as the backends make it."""
    assert case.coords
    plan, kernel = plan_of(case), coordinates_part(case).astype(dtype)
    divided = plan.divided(None if by_axes else 0)
    assert (divided[0] is not None) == (by_axes and case.coords.channels != "r")

    def contract(axes: MapPlan, part: Any) -> Any:
        return axes.contract(part, known(MapPlan.tables, axes, dtype), np.einsum, case.out)

    def convolve(others: MapPlan, part: Any) -> Any:
        if case.geometry.transposed:  # NumPy has no kernel.flip
            part = np.flip(part, tuple(range(2, part.ndim)))
        options = others.stride, 0, case.geometry.per_axis.dilation
        return convolution(known(GRID, others, dtype)[None], part, None, *options)[0]

    return plan.position_bias(kernel, divided, contract, convolve)


def real(case: Case, seed: int) -> Case:
    """The case with real numbers for its integers."""
    rng = np.random.default_rng(seed)
    case.x = rng.normal(size=case.x.shape)
    case.weights = {name: rng.normal(size=a.shape) for name, a in case.weights.items()}
    return case


def by_definition(case: Case) -> tuple[Any, Any]:
    """P as what the definition makes of an input of zeros, and the sum of its terms' sizes."""
    reference = Reference(case.geometry, case.coords)
    nothing = np.zeros((1, case.channels, *case.shape))
    return tuple(
        reference.forward(nothing, case.weights["weight"], magnitudes=magnitudes)[0]
        for magnitudes in (False, True)
    )


@pytest.mark.parametrize("by_axes", [False, True])
@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_is_what_the_coordinates_add(by_axes: bool, case: Case, seed: int) -> None:
    case = real(case, seed)
    expected, size = by_definition(case)
    # a coordinate may take eight roundings, and its product with a kernel one for each axis
    bound = 2 * gamma(case.count + len(case.shape) + 8) * size
    found = map_of(case, np.float64, by_axes)
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) <= bound)


@pytest.mark.parametrize("by_axes", [False, True])
@settings(max_examples=200, deadline=None)
@given(cases())
def test_float32_is_as_close_as_float32_can_be(by_axes: bool, case: Case) -> None:
    expected, size = by_definition(case)
    found = map_of(case, np.float32, by_axes)
    assert found.dtype == np.float32
    bound = gamma(case.count + 2 * len(case.shape) + 1, 2.0**-24) * size
    assert np.all(np.abs(found - expected) <= bound)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tables_are_what_the_taps_read(data: st.DataObject) -> None:
    """Of each axis coordinate, read place by place, beyond the border too."""
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 9 - rank)] * rank))
    geometry = data.draw(geometries(shape))
    token = data.draw(st.sampled_from("xyz"[:rank]))
    coords = Coordinates(token, outside="extend")
    plan = MapPlan(geometry, coords, shape, geometry.output_shape(shape))
    tables = known(MapPlan.tables, plan, np.float64)
    axes = reads(geometry, shape)
    for t in product(*(range(len(outputs)) for outputs in axes)):
        taps = {
            tap: tuple(outputs[p][k] for outputs, p, k in zip(axes, t, tap, strict=True))
            for tap in product(*(outputs[p] for outputs, p in zip(axes, t, strict=True)))
        }
        for tap in product(*map(range, geometry.kernel)):
            found = np.prod([a[0, k, p] for a, k, p in zip(tables, tap, t, strict=True)])
            expected = coordinate(coords, token, taps[tap], shape) if tap in taps else 0
            assert abs(found - float(expected)) <= 2 * UNIT * abs(float(expected))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_known_grid_is_float64_rounded_once(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    geometry, coords = data.draw(geometries(shape)), data.draw(coordinates_of_rank[rank])
    plan = MapPlan(geometry, coords, shape, geometry.output_shape(shape))
    exact, rounded = (known(GRID, plan, dtype) for dtype in (np.float64, np.float32))
    assert len(exact) == len(coords)
    np.testing.assert_array_equal(exact.astype(np.float32), rounded)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_floats_read_what_ints_read(data: st.DataObject) -> None:
    """A framework may count samples in floats, in the graph: the same values in float64."""
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    geometry, coords = data.draw(geometries(shape)), data.draw(coordinates_of_rank[rank])
    plan = MapPlan(geometry, coords, shape, geometry.output_shape(shape))

    def floats(n: int) -> Any:
        return np.arange(n, dtype=np.float64)

    np.testing.assert_array_equal(plan.padded_grid(floats, np), known(GRID, plan, np.float64))
    if "r" not in coords.channels:
        found = plan.tables(floats, np)
        for one, other in zip(found, known(MapPlan.tables, plan, np.float64), strict=True):
            np.testing.assert_array_equal(one, other)


# --- which way -----------------------------------------------------------------------------------

SAME = ConvGeometry((3, 3), padding=1)
XY = Coordinates("xy")


def chosen(geometry: ConvGeometry, sizes: tuple[int, int, int, int], **options: Any) -> str:
    batch, channels, out, positions = sizes
    coords = options.pop("coords", XY)
    return choose(geometry, coords, channels, out, batch=batch, positions=positions, **options)


@pytest.mark.parametrize(
    ("geometry", "sizes", "way"),
    [
        # DESIGN section 3: what was measured on shapes where one way is clearly the faster
        (ConvGeometry((7, 7), stride=2, padding=3), (8, 3, 64, 112**2), MAP),
        (SAME, (8, 64, 64, 56**2), MAP),
        (ConvGeometry((5, 5), padding=2), (4, 48, 96, 40**2), MAP),
        (SAME, (1, 3, 32, 512**2), APPEND),  # output far larger than input
        (SAME, (1, 512, 512, 7**2), APPEND),  # kernel far larger than input
    ],
)
def test_the_faster_way_is_chosen(
    geometry: ConvGeometry, sizes: tuple[int, int, int, int], way: str
) -> None:
    assert chosen(geometry, sizes) == way


@given(
    st.integers(1, 64), st.integers(1, 600), st.integers(1, 600), st.integers(1, 2**18), st.data()
)
def test_the_cheaper_way_is_chosen(
    batch: int, channels: int, out: int, positions: int, data: st.DataObject
) -> None:
    geometry = data.draw(geometries((7, 7)))
    sizes = channels, out, batch, positions
    append, map = costs(geometry, 2, *sizes)
    assert append > 0
    assert map > 0
    way = chosen(geometry, (batch, channels, out, positions))
    assert way == (MAP if geometry.groups > 1 or map <= append else APPEND)
    # P that is never written by itself makes the map the cheaper
    assert costs(geometry, 2, *sizes, fused=True)[1] < map


def test_what_must_not_be_appended_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    large = 1, 3, 32, 512**2
    for forced in (None, APPEND):
        monkeypatch.setattr(position_bias, "FORCED", forced)
        assert chosen(SAME, large) == APPEND
        assert chosen(SAME, large, low_precision=True) == MAP
        assert chosen(SAME, large, coords=Coordinates("xy", outside="extend")) == MAP


def test_unknown_sizes_make_the_simpler_graph() -> None:
    assert choose(SAME, XY, 64, 64, batch=None, positions=None) == APPEND
    assert choose(SAME, XY, 64, 64, batch=8, positions=None) == APPEND
    assert choose(SAME, XY, 64, 64, batch=None, positions=49, fused=True) == APPEND


def test_p_that_is_never_written_is_the_cheaper() -> None:
    large = 1, 3, 32, 512**2
    assert [chosen(SAME, large, fused=fused) for fused in (False, True)] == [APPEND, MAP]
    # but for a kernel far larger than the input
    assert chosen(SAME, (1, 512, 512, 7**2), fused=True) == APPEND


@pytest.mark.parametrize("way", [APPEND, MAP])
def test_a_way_can_be_forced(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_bias, "FORCED", way)
    for geometry in (SAME, ConvGeometry((3, 3), groups=4)):
        for positions in (1, 512**2):
            assert chosen(geometry, (1, 4, 4, positions)) == way


def test_large_maps_are_made_axis_by_axis() -> None:
    coords = Coordinates("xry")
    few = MANY_PRODUCTS // (9 * 2) - 1  # channels of axes times taps
    assert tokens_of(coords, few) == (None, "xry")
    for positions in (few + 2, None):
        assert tokens_of(coords, positions) == ("xy", "r")
        assert tokens_of(XY, positions) == ("xy", None)
        assert tokens_of(Coordinates("r"), positions) == (None, "r")


def tokens_of(coords: Coordinates, positions: int | None) -> tuple[str | None, ...]:
    """What is contracted and what is convolved, of a layer with one output channel."""
    plan = MapPlan(SAME, coords, (positions or 1,), (positions or 1,))
    parts = plan.divided(None if positions is None else 1)
    return tuple(part and part.coords.channels for part in parts)


def test_each_part_of_a_kernel_makes_its_own_part_of_p() -> None:
    plan = MapPlan(SAME, Coordinates("xry"), (5, 5), (5, 5))
    kernel = np.arange(3)[None, :, None, None]
    seen = []
    plan.position_bias(
        kernel,
        plan.divided(None),
        lambda axes, part: seen.append(part.ravel().tolist()) or np.zeros(1),
        lambda others, part: seen.append(part.ravel().tolist()) or np.zeros(1),
    )
    assert seen == [[0, 2], [1]]


# --- the cache -----------------------------------------------------------------------------------


def test_arrays_are_read_only_and_shared() -> None:
    first = known(GRID, MapPlan(SAME, Coordinates("xr"), (5, 5), (5, 5)))
    with pytest.raises(ValueError, match="read-only"):
        first[...] = 0
    other = MapPlan(ConvGeometry((3, 3), padding=1), Coordinates("xr"), (5, 5), (5, 5))
    assert known(GRID, other) is first


@pytest.mark.parametrize(
    "other",
    [
        (ConvGeometry((3, 3), padding=2), XY, (5, 5), (7, 7)),
        (ConvGeometry((3, 3), padding=1, padding_mode="reflect"), XY, (5, 5), (5, 5)),
        (ConvGeometry((3, 3), padding=1, input_dilation=2), XY, (5, 5), (9, 9)),
        (SAME, Coordinates("yx"), (5, 5), (5, 5)),
        (SAME, Coordinates("xy", span=(0, 1)), (5, 5), (5, 5)),
        (SAME, Coordinates("xy", align="edges"), (5, 5), (5, 5)),
        (SAME, Coordinates("xy", outside="extend"), (5, 5), (5, 5)),
        (SAME, XY, (5, 6), (5, 6)),
        (SAME, XY, (5, 5), (5, 5), np.float64),
        (ConvGeometry((3, 3), stride=2, padding=1, transposed=True), XY, (5, 5), (9, 9)),
    ],
)
def test_the_cache_is_keyed_by_everything_that_matters(other: tuple[Any, ...]) -> None:
    one = known(GRID, MapPlan(SAME, XY, (5, 5), (5, 5)))
    two = known(GRID, MapPlan(*other[:4]), *other[4:])
    assert one.dtype != two.dtype or not np.array_equal(one, two)


def test_the_output_of_a_transposed_convolution_is_a_key() -> None:
    geometry = ConvGeometry((3,), stride=2, transposed=True)
    x = Coordinates("x")
    shapes = [known(GRID, MapPlan(geometry, x, (4,), (m,))).shape for m in (9, 10)]
    assert shapes == [(1, 11), (1, 12)]


def test_the_cache_is_bounded() -> None:
    for n in range(3, 300):
        known(GRID, MapPlan(ConvGeometry((3,)), Coordinates("x"), (n,), (n - 2,)))
    info = known.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize < 297


def test_threads_share_the_cache() -> None:
    coords = Coordinates("xyr")
    known.cache_clear()
    plans = {n: MapPlan(SAME, coords, (n, n + 1), (n, n + 1)) for n in range(1, 90)}
    expected = {n: known(GRID, plan) for n, plan in plans.items()}
    known.cache_clear()
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in np.random.default_rng(seed).permutation(list(expected)).tolist():
                found = known(GRID, plans[n])
                np.testing.assert_array_equal(found, expected[n])
        except BaseException as problem:  # noqa: BLE001  # told to the main thread
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
