"""The grid: every value rounded once from the true one, the array shared and read-only."""

import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordconv import Coordinates, coordinate_grid
from coordconv.grid import _grid, evaluate
from definition import UNIT, coordinate, coordinates_of_rank, largest_end

DTYPES = [np.float16, np.float32, np.float64]


def nearest(value: Fraction, dtype: Any) -> Any:
    """The number of ``dtype`` nearest to ``value``, ties to even, by comparison alone."""
    guess = dtype(float(value))
    around = [guess, np.nextafter(guess, dtype(-np.inf)), np.nextafter(guess, dtype(np.inf))]
    distances = [abs(Fraction(float(number)) - value) for number in around]
    closest = [n for n, d in zip(around, distances, strict=True) if d == min(distances)]
    even = [n for n in closest if int(n.view(f"u{n.itemsize}")) % 2 == 0]
    return closest[0] if len(closest) == 1 else even[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align", ["corners", "edges", "start"])
@pytest.mark.parametrize("n", [*range(1, 34), 63, 64, 65, 100, 224, 513, 1000, 2047])
def test_correctly_rounded(n: int, align: Any, dtype: Any) -> None:
    coords = Coordinates("x", align=align)
    grid = coordinate_grid((n,), coords, dtype=dtype)
    expected = [nearest(coordinate(coords, "x", (i,), (n,)), dtype) for i in range(n)]
    assert grid.dtype == dtype
    np.testing.assert_array_equal(grid, [np.array(expected)])


@settings(max_examples=100, deadline=None)
@example(n=3, first=0, last=1, align="corners")
@given(
    n=st.integers(1, 100),
    first=st.integers(-1000, 1000),
    last=st.integers(-1000, 1000),
    align=st.sampled_from(["corners", "edges", "start"]),
)
def test_correctly_rounded_on_any_span_of_integers(
    n: int, first: int, last: int, align: Any
) -> None:
    coords = Coordinates("x", span=(first, last + (first == last)), align=align)
    grid = coordinate_grid((n,), coords)
    expected = [nearest(coordinate(coords, "x", (i,), (n,)), np.float32) for i in range(n)]
    np.testing.assert_array_equal(grid, [np.array(expected)])


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 100), first=finite, last=finite, data=st.data())
def test_any_span_in_float64(n: int, first: float, last: float, data: st.DataObject) -> None:
    """Within four roundings of the true value, relative to the span."""
    if first == last:
        last += 1
    coords = Coordinates(
        "x", span=(first, last), align=data.draw(st.sampled_from(["corners", "edges", "start"]))
    )
    i = data.draw(st.integers(-n, 2 * n))
    value = evaluate(coords, [np.array([i])], (n,))[0, 0]
    reach = 4 * max(abs(first), abs(last)) * max(2, n / max(n - 1, 1))
    error = abs(Fraction(float(value)) - coordinate(coords, "x", (i,), (n,)))
    assert error <= 4 * UNIT * reach


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_channel_everywhere(data: st.DataObject) -> None:
    """All ranks, channels and options, inside and outside, against exact arithmetic."""
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * rank))
    coords = data.draw(coordinates_of_rank[rank])
    # beyond the border there is a coordinate only if the ramp goes on
    around = 1 if coords.outside == "extend" else 0
    place = tuple(data.draw(st.integers(-n * around, n - 1 + n * around)) for n in shape)
    values = evaluate(coords, [np.array([i]) for i in place], shape).reshape(-1)
    largest = 8 * largest_end(coords, shape) + abs(coords.r_center)
    for token, value in zip(coords.channels, values, strict=True):
        error = abs(Fraction(float(value)) - coordinate(coords, token, place, shape))
        assert error <= 8 * UNIT * largest * rank**0.5
    grid = coordinate_grid(shape, coords, dtype=np.float64)
    assert grid.shape == (len(coords), *shape)
    if all(0 <= i < n for i, n in zip(place, shape, strict=True)):
        np.testing.assert_array_equal(grid[(slice(None), *place)], values)


@pytest.mark.parametrize("span", [(-1, 1), (0, 1), (1, -1), (-3, 5)])
def test_ends_and_middle_are_exact(span: tuple[int, int]) -> None:
    for n in range(2, 600):
        (line,) = coordinate_grid((n,), Coordinates("x", span=span), dtype=np.float64)
        assert (line[0], line[-1]) == span
        if n % 2:
            assert line[n // 2] == sum(span) / 2


def test_symmetric() -> None:
    for align in ("corners", "edges"):
        (line,) = coordinate_grid((101,), Coordinates("x", align=align), dtype=np.float64)
        np.testing.assert_array_equal(line, -line[::-1])


def test_none_is_all_axes() -> None:
    for shape, tokens in (((3,), "x"), ((3, 2), "xy"), ((3, 2, 4), "xyz")):
        np.testing.assert_array_equal(coordinate_grid(shape), coordinate_grid(shape, tokens))


def test_axes_are_not_swapped() -> None:
    x, y, z = coordinate_grid((2, 3, 5), "xyz")
    np.testing.assert_array_equal(x, np.broadcast_to([-1, -0.5, 0, 0.5, 1], (2, 3, 5)))
    np.testing.assert_array_equal(y, np.broadcast_to([[-1], [0], [1]], (2, 3, 5)))
    np.testing.assert_array_equal(z, np.broadcast_to([[[-1]], [[1]]], (2, 3, 5)))


def test_radius_is_over_all_axes_whichever_are_named() -> None:
    (r,) = coordinate_grid((3, 3, 3), "r", dtype=np.float64)
    assert r[1, 1, 1] == 0
    assert r[0, 1, 1] == r[1, 2, 1] == r[1, 1, 0] == 1
    assert r[0, 0, 0] == np.sqrt(3.0)


def test_radius_of_a_span_and_a_centre() -> None:
    coords = Coordinates("r", span=(0, 4), r_center=1)
    np.testing.assert_array_equal(coordinate_grid((5,), coords), [[1, 0, 1, 2, 3]])


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("coords", [None, "x", "r", Coordinates("x", span=(3, 5))])
def test_an_axis_of_length_one_has_coordinate_zero(shape: tuple[int, ...], coords: Any) -> None:
    grid = coordinate_grid(shape, coords)
    assert np.isfinite(grid).all()
    if max(shape) == 1:
        np.testing.assert_array_equal(grid, np.zeros_like(grid))


def test_edges_of_one_sample_is_its_middle() -> None:
    coords = Coordinates("x", span=(2, 5), align="edges")
    np.testing.assert_array_equal(coordinate_grid((1,), coords), [[3.5]])


def test_read_only_and_kept() -> None:
    grid = coordinate_grid((4, 5))
    assert coordinate_grid([4, np.int64(5)], "xy") is grid
    with pytest.raises(ValueError, match="read-only"):
        grid[0, 0, 0] = 7
    assert grid.flags.c_contiguous
    assert coordinate_grid((4, 5), dtype=np.float64) is not grid
    copy = grid.copy()
    copy[0, 0, 0] = 7
    assert coordinate_grid((4, 5))[0, 0, 0] == -1


def test_the_cache_is_bounded() -> None:
    for n in range(2, 200):
        coordinate_grid((n,))
    info = _grid.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize <= 64


def test_threads() -> None:
    """More shapes than the cache holds, from several threads at once."""
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in np.random.default_rng(seed).integers(2, 60, 400).tolist():
                grid = coordinate_grid((n, 2), "x", dtype=np.float64)
                np.testing.assert_array_equal(grid[0], [[-1.0, 1.0]] * n)
                assert grid.shape == (1, n, 2)
                assert not grid.flags.writeable
        except BaseException as problem:  # noqa: BLE001  # told to the main thread
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, r"shape must have no empty axis, got \(0, 3\)"),
        ((3, -1), {}, ValueError, r"no empty axis, got \(3, -1\)"),
        ((), {}, ValueError, r"1, 2 or 3 axes, got \(\)"),
        ((1, 2, 3, 4), {}, ValueError, r"1, 2 or 3 axes, got \(1, 2, 3, 4\)"),
        ((2.0, 3), {}, TypeError, r"shape must hold integers, got 2.0 in \(2.0, 3\)"),
        ((True, 3), {}, TypeError, "shape must hold integers, got True"),
        (("2", 3), {}, TypeError, "shape must hold integers, got '2'"),
        ((2, 3), {"dtype": np.int32}, TypeError, "dtype must be floating-point, got int32"),
        ((2, 3), {"dtype": complex}, TypeError, "dtype must be floating-point, got complex128"),
        ((2, 3), {"coords": "xyz"}, ValueError, "axis 'z', which a 2-D grid does not have"),
        ((3,), {"coords": "y"}, ValueError, "axis 'y', which a 1-D grid does not have"),
        ((2, 3), {"coords": "xx"}, ValueError, "repeated token 'x'"),
        ((2, 3), {"coords": "w"}, ValueError, "unknown token 'w'"),
    ],
)
def test_mistakes(
    shape: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        coordinate_grid(shape, **options)


def test_a_shape_that_is_a_number() -> None:
    with pytest.raises(TypeError, match="shape must be one int per axis, got 3"):
        coordinate_grid(3)  # type: ignore[arg-type]
