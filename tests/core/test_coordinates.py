"""Coordinates: tokens, options, the conventions of others, and what each mistake is told."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordconv import Coordinates, coordinate_grid
from coordconv.coordinates import axis_tokens, check_coord_init
from definition import UNIT, coordinates_of_rank

any_coordinates = st.one_of(*coordinates_of_rank.values())


def test_defaults() -> None:
    coords = Coordinates()
    assert coords.channels == "xy"
    assert coords.span == (-1.0, 1.0)
    assert (coords.align, coords.outside, coords.r_center) == ("corners", "zero", 0.0)
    assert len(Coordinates("zyxr")) == 4


@pytest.mark.parametrize("channels", ["yxr", ["y", "x", "r"], ("y", "x", "r")])
def test_tokens_in_any_sequence(channels: Any) -> None:
    assert Coordinates(channels) == Coordinates("yxr")
    assert Coordinates(channels).channels == "yxr"


def test_order_is_part_of_what_they_are() -> None:
    assert Coordinates("xy") != Coordinates("yx")
    assert len({Coordinates("xy"), Coordinates(["x", "y"]), Coordinates("yx")}) == 2


def test_span_of_any_numbers_is_floats() -> None:
    assert Coordinates(span=[0, np.float32(1)]).span == (0.0, 1.0)  # type: ignore[arg-type]
    assert all(type(end) is float for end in Coordinates(span=(0, 1)).span)
    assert type(Coordinates(r_center=1).r_center) is float


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        Coordinates().channels = "yx"  # type: ignore[misc]


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        Coordinates("xy", (0, 1))  # type: ignore[misc]


@settings(max_examples=50, deadline=None)
@given(any_coordinates)
def test_round_trips(coords: Coordinates) -> None:
    assert Coordinates.from_dict(json.loads(json.dumps(coords.to_dict()))) == coords
    assert eval(repr(coords), {"Coordinates": Coordinates}) == coords
    assert pickle.loads(pickle.dumps(coords)) == coords
    assert hash(copy.deepcopy(coords)) == hash(coords)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("xq",), {}, ValueError, "coords 'xq': unknown token 'q', want x, y, z or r"),
        ((["x", "xy"],), {}, ValueError, "unknown token 'xy'"),
        (("X",), {}, ValueError, "unknown token 'X'"),
        (("xyx",), {}, ValueError, "coords 'xyx': repeated token 'x'"),
        ((("r", "r"),), {}, ValueError, "repeated token 'r'"),
        (("",), {}, ValueError, "at least one of x, y, z, r"),
        (([],), {}, ValueError, "at least one of x, y, z, r"),
        ((2,), {}, TypeError, "coords must be a string or a sequence of the tokens"),
        (([0, 1],), {}, TypeError, r"sequence of the tokens x, y, z, r, got \[0, 1\]"),
        ((b"xy",), {}, TypeError, "sequence of the tokens"),
        (({"x", "y"},), {}, TypeError, "sequence of the tokens"),  # a set has no order
        ((), {"span": (1, 1)}, ValueError, r"two different ends, got \(1, 1\)"),
        ((), {"span": (0.0, -0.0)}, ValueError, "two different ends"),
        ((), {"span": (0, float("inf"))}, ValueError, "span must be finite, got inf"),
        ((), {"span": (0, 1e39)}, ValueError, "span must be finite, got 1e.39: float32 goes to"),
        ((), {"span": (float("nan"), 1)}, ValueError, "span must be finite, got nan"),
        ((), {"span": (0, 1, 2)}, TypeError, r"pair of numbers, got \(0, 1, 2\)"),
        ((), {"span": 1}, TypeError, "pair of numbers, got 1"),
        ((), {"span": "01"}, TypeError, "pair of numbers, got '01'"),
        ((), {"span": (0, None)}, TypeError, "span must be a number, got None"),
        ((), {"align": "centre"}, ValueError, r"align must be one of \('corners', 'edges', 's"),
        ((), {"aspect": "wide"}, ValueError, "aspect must be one of"),
        ((), {"units": "metres"}, ValueError, "units must be one of"),
        ((), {"units": "pixels", "aspect": "longer"}, ValueError, "have no span and no aspect"),
        ((), {"units": "pixels", "span": (0, 1)}, ValueError, r"got span=\(0.0, 1.0\)"),
        ((), {"span": {"x": (0, 1)}}, ValueError, "a pair of numbers for axis 'y', got {'x'"),
        ((), {"span": {"x": (0, 1), "y": 2}}, TypeError, "pair of numbers, got 2"),
        ((), {"span": {"x": (0, 1), "w": (0, 1)}}, ValueError, "for the axes x, y and z"),
        ((), {"span": {}}, ValueError, "for the axes x, y and z"),
        ((), {"outside": "wrap"}, ValueError, r"outside must be one of \('zero', 'extend'\)"),
        ((), {"r_center": float("nan")}, ValueError, "r_center must be finite, got nan"),
        ((), {"r_center": (0, 0)}, TypeError, "r_center must be a number"),
    ],
)
def test_mistakes(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Coordinates(*arguments, **options)


@pytest.mark.parametrize(("rank", "tokens"), [(1, "x"), (2, "xy"), (3, "xyz")])
def test_none_is_all_axes(rank: int, tokens: str) -> None:
    assert axis_tokens(rank) == tokens
    assert Coordinates.resolve(None, rank) == Coordinates(tokens)


def test_the_radius_needs_a_span_of_every_axis() -> None:
    coords = Coordinates("xr", span={"x": (0, 1), "y": (0, 2)})
    assert Coordinates.resolve(coords, 2) is coords
    with pytest.raises(ValueError, match="a pair of numbers for axis 'z'"):
        Coordinates.resolve(coords, 3)


def test_resolve() -> None:
    coords = Coordinates("yr", span=(0, 1))
    assert Coordinates.resolve(coords, 2) is coords
    assert Coordinates.resolve("yx", 2) == Coordinates("yx")
    assert Coordinates.resolve(["z"], 3) == Coordinates("z")


@pytest.mark.parametrize(
    ("coords", "rank", "message"),
    [
        (
            "xyz",
            2,
            "coords 'xyz' name axis 'z', which a 2-D grid does not have: want xyr",
        ),
        ("zr", 2, "name axis 'z'"),
        ("zyx", 1, "name axis 'z', 'y', which a 1-D grid"),
        (Coordinates("y"), 1, "name axis 'y'"),
        ("x", 4, "1, 2 or 3 axes, got 4"),
        (None, 0, "1, 2 or 3 axes, got 0"),
    ],
)
def test_tokens_beyond_the_rank(coords: Any, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coordinates.resolve(coords, rank)


def test_coord_init() -> None:
    check_coord_init("fan_in")
    check_coord_init("zeros")
    with pytest.raises(ValueError, match=r"coord_init must be one of .*, got 'ones'"):
        check_coord_init("ones")


# --- the conventions of other implementations, by hand -------------------------------------------

X = [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]  # of two rows and three columns
Y = [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
SQUARE_X = [[-1.0, 0.0, 1.0]] * 3
SQUARE_Y = [[-1.0] * 3, [0.0] * 3, [1.0] * 3]
ROOT2 = np.sqrt(2.0)
# from 0: the corners are sqrt(2) away, the edges' middles 1
R = [[ROOT2, 1.0, ROOT2], [ROOT2, 1.0, ROOT2]]
SQUARE_R = [[ROOT2, 1.0, ROOT2], [1.0, 0.0, 1.0], [ROOT2, 1.0, ROOT2]]
# from 0.5 on each axis: squares of -1.5, -0.5 and 0.5 are 2.25, 0.25 and 0.25
HALF_R = [np.sqrt([4.5, 2.5, 2.5]), np.sqrt([2.5, 0.5, 0.5])]
SQUARE_HALF_R = [np.sqrt([4.5, 2.5, 2.5]), np.sqrt([2.5, 0.5, 0.5]), np.sqrt([2.5, 0.5, 0.5])]


# -1 to -0.5
LOW_X = [[-1.0, -0.75, -0.5]] * 2
LOW_Y = [[-1.0] * 3, [-0.5] * 3]
SQUARE_LOW_X = [[-1.0, -0.75, -0.5]] * 3
SQUARE_LOW_Y = [[-1.0] * 3, [-0.75] * 3, [-0.5] * 3]


IN_2D: list[Any] = [
    ("paddle", False, [X, Y], [SQUARE_X, SQUARE_Y]),
    ("paddledetection", False, [LOW_X, LOW_Y], [SQUARE_LOW_X, SQUARE_LOW_Y]),
    ("paper", False, [X, Y], [SQUARE_X, SQUARE_Y]),
    ("paper", True, [X, Y, HALF_R], [SQUARE_X, SQUARE_Y, SQUARE_HALF_R]),
    ("uber", False, [X, Y], [SQUARE_X, SQUARE_Y]),
    ("uber", True, [X, Y, R], [SQUARE_X, SQUARE_Y, SQUARE_R]),
    ("mkocabas", False, [Y, X], [SQUARE_Y, SQUARE_X]),
    ("mkocabas", True, [Y, X, HALF_R], [SQUARE_Y, SQUARE_X, SQUARE_HALF_R]),
    ("walsvid", False, [Y, X], [SQUARE_Y, SQUARE_X]),
    ("walsvid", True, [Y, X, HALF_R], [SQUARE_Y, SQUARE_X, SQUARE_HALF_R]),
    ("keras", False, [Y, X], [SQUARE_Y, SQUARE_X]),
    ("keras", True, [Y, X, HALF_R], [SQUARE_Y, SQUARE_X, SQUARE_HALF_R]),
]
IN_1D: list[Any] = [
    ("walsvid", False, [[-1.0, 0.0, 1.0]]),
    ("walsvid", True, [[-1.0, 0.0, 1.0], [1.5, 0.5, 0.5]]),
    ("keras", False, [[-1.0, 0.0, 1.0]]),
]
# of two planes, one row and three columns; and of two each way
IN_3D = [[[[-1] * 3], [[1] * 3]], [[[0] * 3], [[0] * 3]], [[[-1, 0, 1]], [[-1, 0, 1]]]]
CUBE = [
    [[[-1, -1], [-1, -1]], [[1, 1], [1, 1]]],
    [[[-1, -1], [1, 1]], [[-1, -1], [1, 1]]],
    [[[-1, 1], [-1, 1]], [[-1, 1], [-1, 1]]],
]


@pytest.mark.parametrize(("name", "with_r", "wide", "square"), IN_2D)
def test_named_in_2d(name: str, with_r: bool, wide: Any, square: Any) -> None:
    coords = Coordinates.named(name, with_r=with_r)
    for shape, expected in (((2, 3), wide), ((3, 3), square)):
        grid = coordinate_grid(shape, coords, dtype=np.float64)
        np.testing.assert_array_equal(grid, np.array(expected))


@pytest.mark.parametrize(("name", "with_r", "expected"), IN_1D)
def test_named_in_1d(name: str, with_r: bool, expected: Any) -> None:
    coords = Coordinates.named(name, rank=1, with_r=with_r)
    np.testing.assert_array_equal(coordinate_grid((3,), coords), np.array(expected, np.float32))


@pytest.mark.parametrize(("shape", "expected"), [((2, 1, 3), IN_3D), ((2, 2, 2), CUBE)])
def test_named_in_3d(shape: tuple[int, ...], expected: Any) -> None:
    grid = coordinate_grid(shape, Coordinates.named("keras", rank=3))
    np.testing.assert_array_equal(grid, np.array(expected, np.float32))


@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (13, 13), (40, 64)])
def test_named_is_what_the_others_code_computes(shape: tuple[int, int]) -> None:
    """Written as their code is."""
    h, w = shape
    # PaddleDetection 2.0 and 2.1, and since 2.2, where parentheses have moved
    for name, rows, columns in (
        ("paddle", np.arange(h) / (h - 1) * 2.0 - 1, np.arange(w) / (w - 1) * 2.0 - 1),
        ("paddledetection", np.arange(h) / ((h - 1) * 2.0) - 1, np.arange(w) / ((w - 1) * 2.0) - 1),
    ):
        grid = coordinate_grid(shape, Coordinates.named(name), dtype=np.float64)
        wanted = [np.broadcast_to(columns, shape), np.broadcast_to(rows[:, None], shape)]
        np.testing.assert_allclose(grid, wanted, rtol=0, atol=4 * UNIT)
    # the paper's listing
    xx, yy = np.meshgrid(np.arange(w) / (w - 1) * 2 - 1, np.arange(h) / (h - 1) * 2 - 1)
    radius = np.sqrt(np.square(xx - 0.5) + np.square(yy - 0.5))
    grid = coordinate_grid(shape, Coordinates.named("paper", with_r=True), dtype=np.float64)
    np.testing.assert_allclose(grid, [xx, yy, radius], rtol=0, atol=16 * UNIT)


def test_named_is_default_but_for_order_scale_and_centre() -> None:
    for name in ("paddle", "uber", "paper", "mkocabas", "walsvid", "keras"):
        coords = Coordinates.named(name)
        assert coords == Coordinates(coords.channels)
    assert Coordinates.named("paddledetection") == Coordinates("xy", span=(-1.0, -0.5))
    assert Coordinates.named("paper", with_r=True) == Coordinates("xyr", r_center=0.5)
    assert Coordinates.named("mkocabas", with_r=True) == Coordinates("yxr", r_center=0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "tensorflow",
            {},
            "name must be one of paddle, paddledetection, uber, paper, mkocabas, walsvid, keras, "
            "got 'tensorflow'",
        ),
        ("paddledetection", {"with_r": True}, "'paddledetection' convention has no radius in 2-D"),
        ("paper", {"rank": 3}, "'paper' convention has no rank 3, only 2"),
        (
            "walsvid",
            {"rank": 3},
            r"'walsvid' convention has no rank 3, only 1, 2 \(its 3-D .*mixes",
        ),
        ("paddle", {"rank": 1}, "'paddle' convention has no rank 1, only 2"),
        ("uber", {"rank": 3}, "no rank 3"),
        ("paddle", {"with_r": True}, "'paddle' convention has no radius in 2-D"),
        ("keras", {"rank": 1, "with_r": True}, "'keras' convention has no radius in 1-D"),
        ("keras", {"rank": 3, "with_r": True}, "'keras' convention has no radius in 3-D"),
    ],
)
def test_named_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coordinates.named(name, **options)


def test_numbers_of_another_kind() -> None:
    with pytest.raises(TypeError, match="span must be a number, got '0'"):
        Coordinates(span=("0", "1"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="span must be finite"):
        Coordinates(span=(0, 10**400))


@pytest.mark.parametrize("name", ["uber", "paper", "paddledetection"])
def test_a_name_for_tokens_is_told_what_to_write(name: str) -> None:
    for call in (Coordinates, lambda name: Coordinates.resolve(name, 2)):
        with pytest.raises(ValueError, match=rf'write coords=Coordinates\.named\("{name}"\)'):
            call(name)
