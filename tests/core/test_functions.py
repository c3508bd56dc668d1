"""Channels of a user's own: their values, what files keep of them, and what mistakes are told."""

import json
import pickle
from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, Function, Given, coordinate_grid, fourier
from coordconv.functions import from_description
from coordconv.weights import join_kernel, split_kernel
from coordconv.weights.kernels import same_channels


def saddle(x: Any, y: Any) -> Any:
    return x * x - y * y


def test_a_function_takes_the_coordinates_on_their_scale() -> None:
    coords = Coordinates(["y", Function("saddle", "xy", saddle)], span=(0, 4), align="edges")
    y, found = coordinate_grid((8, 4), coords, dtype=np.float64)
    x = 4 * (np.arange(4) + 0.5) / 4
    assert np.array_equal(found, x**2 - y**2)


def test_the_order_of_the_axes_is_the_order_of_the_arguments() -> None:
    one = coordinate_grid((3, 5), [Function("f", "yx", saddle)])
    other = coordinate_grid((3, 5), [Function("f", "xy", saddle)])
    assert np.array_equal(one, -other)


def test_fourier_is_what_nerf_encodes() -> None:
    found = coordinate_grid((7, 5), fourier("xy", bands=3), dtype=np.float64)
    x, y = coordinate_grid((7, 5), "xy", dtype=np.float64)
    wanted = [
        wave(np.pi * 2**band * axis)
        for axis in (x, y)
        for band in range(3)
        for wave in (np.sin, np.cos)
    ]
    assert np.array_equal(found, wanted)
    assert len({each.name for each in fourier("xy", bands=3)}) == 12


def test_given_maps_of_one_axis_and_of_all() -> None:
    mask = np.arange(15).reshape(3, 5) % 4
    coords = Coordinates([Given("lat", [9, 8, 7], "y"), "x", Given("mask", mask)])
    lat, x, found = coordinate_grid((3, 5), coords)
    assert np.array_equal(lat, np.repeat([[9], [8], [7]], 5, 1))
    assert np.array_equal(x[0], [-1, -0.5, 0, 0.5, 1])
    assert np.array_equal(found, mask)


def test_what_is_the_same_channel() -> None:
    assert Function("f", "x", np.sin) == Function("f", "x", np.sin)
    assert Function("f", "x", np.sin) != Function("f", "x", np.cos)
    assert fourier("x", 2) == fourier("x", 2)
    assert Given("m", [1, 2]) == Given("m", np.array([1.0, 2.0]))
    assert hash(Given("m", [1, 2])) == hash(Given("m", [1, 2]))
    assert Given("m", [1, 2]) != Given("m", [1, 3])
    assert Given("m", [1, 2], "x") != Given("m", [1, 2], "y")
    assert pickle.loads(pickle.dumps(Given("m", [1, 2]))) == Given("m", [1, 2])


def test_a_map_is_the_users_copy_no_more() -> None:
    array = np.ones(3)
    given = Given("m", array)
    array[0] = 5
    assert np.array_equal(given.array, np.ones(3))
    with pytest.raises(ValueError, match="read-only"):
        given.array[0] = 5


def test_files_keep_names() -> None:
    coords = Coordinates(["y", Function("saddle", "xy", saddle), Given("lat", [1, 2], "y")])
    read = Coordinates.from_dict(json.loads(json.dumps(coords.to_dict())))
    assert read.names == ("y", "saddle", "lat")
    assert same_channels(read, coords)
    assert not same_channels(read, Coordinates(["y", Function("other", "xy", saddle), "x"]))
    for other in (
        ["y", Function("saddle", "yx", saddle), Given("lat", [1, 2], "y")],
        ["y", Function("saddle", "xy", saddle), Given("lat", [1, 2], "x")],
        ["y", Function("saddle", "xy", saddle), Function("lat", "y", np.cos)],
    ):
        assert not same_channels(read, Coordinates(other))
    assert same_channels(read, Coordinates([*coords.channels[:2], Given("lat", [[1, 2]])]))
    with pytest.raises(ValueError, match=r"'saddle' is known by its name alone.*'xy', fn\)"):
        coordinate_grid((2, 2), read.only([read.channels[1]]))
    with pytest.raises(ValueError, match=r"'lat' is known by its name alone.*Given\('lat', array"):
        coordinate_grid((2, 2), read.only([read.channels[2]]))


def test_files_have_fourier_whole() -> None:
    coords = Coordinates(["x", *fourier("xy", frequencies=[1, np.pi, -2.5e-7])])
    assert Coordinates.from_dict(json.loads(json.dumps(coords.to_dict()))) == coords


@pytest.mark.parametrize("name", ["sin(", "sin(1.0 x", "tan(1.0 x)", "sin(nan x)", "sin(one x)"])
def test_what_looks_like_fourier_is_a_name(name: str) -> None:
    assert from_description({"function": name, "axes": "x"}) == Function(name, "x")


def test_kernels_of_many_channels() -> None:
    coords = Coordinates(["x", *fourier("xy", 6)])
    kernel = np.arange(3.0 * 30 * 9).reshape(3, 30, 3, 3)
    features, coordinates = split_kernel(kernel, coords)
    assert coordinates.shape == (3, 25, 3, 3)
    assert np.array_equal(join_kernel(features, coordinates), kernel)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Function("x", "x", np.sin), ValueError, "none of x, y, z and r, got 'x'"),
        (lambda: Function("", "x", np.sin), ValueError, "name must be one"),
        (lambda: Function(3, "x", np.sin), TypeError, "name must be a string, got 3"),  # type: ignore[arg-type]
        (lambda: Function("f", "xx", np.sin), ValueError, "axes must be different ones"),
        (lambda: Function("f", "xr", np.sin), ValueError, "of x, y and z, got 'xr'"),
        (lambda: Function("f", ("x",), np.sin), TypeError, "axes must be a string"),  # type: ignore[arg-type]
        (lambda: Function("f", "x", 3), TypeError, "fn of 'f' must be a function, got 3"),  # type: ignore[arg-type]
        (lambda: fourier("xy", 0), ValueError, "bands must be an int of at least 1, got 0"),
        (lambda: fourier("r", 1), ValueError, "axes must be different ones"),
        (lambda: fourier("x", frequencies=[np.nan]), ValueError, "must be finite numbers"),
        (lambda: fourier("x", frequencies=[]), ValueError, "must be finite numbers"),
        (lambda: Given("m", ["a"]), TypeError, "array of numbers"),
        (lambda: Given("m", [1j, 2]), TypeError, "an array of numbers, got complex128"),
        (lambda: Given("m", [1, 1e39]), ValueError, "finite numbers, got 1e.39: float32 goes to"),
        # As netCDF4 reads them, with a large number in each gap.
        (
            lambda: Given("m", np.ma.masked_equal([1, 9e36], 9e36)),
            ValueError,
            "'m' must have .* got a masked array with gaps: fill them",
        ),
        (
            lambda: coordinate_grid((3,), [Function("f", "x", lambda x: np.ma.masked_less(x, 0))]),
            ValueError,
            "'f' must return .* got a masked array",
        ),
        (
            lambda: coordinate_grid((3,), [Function("f", "x", lambda x: x * 1j)]),
            TypeError,
            "'f' must return an array of numbers, got complex128",
        ),
        (lambda: Given("m", [1, np.nan]), ValueError, "'m' must have finite numbers, got nan"),
        (lambda: Given("m", [[1, 2]], "x"), ValueError, r"for each of x, got shape \(1, 2\)"),
        (lambda: Given("m", 3), ValueError, "one axis for each"),
        (
            lambda: Coordinates([Function("f", "x", np.sin), Given("f", [1])]),
            ValueError,
            "repeated name 'f'",
        ),
        (
            lambda: Coordinates([Given("m", [1, 2], "x")], outside="extend"),
            ValueError,
            "where the map 'm' has no values",
        ),
        (lambda: Coordinates([3]), TypeError, "sequence of the tokens"),
        (
            lambda: Coordinates([Function("f", "yx", np.add)], span={"x": (0, 1)}),
            ValueError,
            "axis 'y'",
        ),
        (
            lambda: Coordinates.resolve([Function("f", "z", np.sin)], 2),
            ValueError,
            "name axis 'z', which a 2-D grid does not have",
        ),
        (
            lambda: Coordinates.resolve([Given("m", [1, 2])], 2),
            ValueError,
            r"must have the 2 axes of the grid, got shape \(2,\)",
        ),
        (
            lambda: coordinate_grid((3, 3), [Given("m", [1, 2], "x")]),
            ValueError,
            r"has shape \(2,\), and the grid there \(3,\)",
        ),
        (
            lambda: coordinate_grid((3,), [Function("f", "x", np.sum)]),
            ValueError,
            r"must return an array of its arguments' shape \(3,\), got \(\)",
        ),
        (
            lambda: coordinate_grid((3,), [Function("f", "x", lambda x: x * np.nan)]),
            ValueError,
            "'f' must return finite numbers, got nan",
        ),
    ],
)
def test_mistakes(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
