"""The lines of docs/coordinates.md, each held to its project's formula, computed directly."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, Function, Given, Window, coordinate_grid, fourier

PAGE = Path(__file__).parents[2] / "docs" / "coordinates.md"
ROWS = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
LINES = {
    (int(row), k): line
    for row, said in ROWS
    for k, line in enumerate(re.findall(r"`(coords=[^`]*)`", said))
}
SIZES = [(2, 4), (6, 10), (16, 16), (8, 34), (48, 64)]
NAMES = {each.__name__: each for each in (Coordinates, Function, Given, Window, fourier)} | {
    "np": np
}

USES: dict[tuple[int, int], Any] = {}


def use(row: int, line: int = 0) -> Any:
    """Mark the function that computes what a line of a row gives.

    It takes height, width and a generator, and returns the shape of the input, what the line names,
    and the channels: an array, or each by its name where their order does not matter; and where a
    rounding on the way counts for more than one of the channels, how much more.
    """

    def keep(function: Any) -> Any:
        assert (row, line) not in USES
        USES[row, line] = function
        return function

    return keep


def corners(h: int, w: int, low: float = -1.0, high: float = 1.0) -> Any:
    """Rows and columns that reach from ``low`` to ``high``."""
    return np.meshgrid(np.linspace(low, high, h), np.linspace(low, high, w), indexing="ij")


def some_boxes(h: int, w: int, rng: Any) -> tuple[int, int, Any]:
    """Height and width of crops, and three of them: left, top, right, bottom."""
    ch, cw = int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1))
    top, left = rng.integers(0, h - ch + 1, 3), rng.integers(0, w - cw + 1, 3)
    return ch, cw, np.stack([left, top, left + cw, top + ch], 1)


def cut(whole: Any, boxes: Any) -> Any:
    """The crops of an array ``(..., h, w)``."""
    return np.stack([whole[..., y0:y1, x0:x1] for x0, y0, x1, y1 in boxes])


@use(2)
@use(5)
@use(7)
@use(17)
@use(18, 1)
@use(21)
def x_and_y(h, w, rng):
    y, x = corners(h, w)
    return (h, w), {}, np.stack([x, y])


@use(1)
def paddledetection_until_2_1(h, w, rng):
    x, y = (np.arange(n) / (n - 1) * 2 - 1 for n in (w, h))
    return (h, w), {}, np.stack(np.meshgrid(x, y))


@use(1, 1)
def paddledetection(h, w, rng):
    x, y = (np.arange(n) / ((n - 1) * 2) - 1 for n in (w, h))
    return (h, w), {}, np.stack(np.meshgrid(x, y))


def resized(values: Any, size: int) -> Any:
    """Linear interpolation of an axis to another size, as ``align_corners=False`` has it."""
    n = len(values)
    place = ((np.arange(size) + 0.5) * n / size - 0.5).clip(0, n - 1)
    below = np.floor(place).astype(int)
    share = place - below
    return values[below] * (1 - share) + values[(below + 1).clip(max=n - 1)] * share


@use(3)
def solo_v2(h, w, rng):
    size = int(rng.integers(1, min(h, w) + 1))
    x, y = (resized(np.linspace(-1, 1, n), size) for n in (w, h))
    return (size, size), {"h": h, "w": w}, np.stack(np.meshgrid(x, y))


@use(4)
def cond_inst(h, w, rng):
    stride, extent = 8, np.array([h, w])
    centre = rng.uniform(0, stride * extent, (5, 2))
    size = rng.choice([64.0, 128, 256, 512, 1024], (5, 1))
    place_x, place_y = (np.arange(n) * stride + stride // 2 for n in (w, h))
    expected = [
        np.stack(np.meshgrid((cx - place_x) / s, (cy - place_y) / s))
        for (cy, cx), (s,) in zip(centre, size, strict=True)
    ]
    given = {"centre": centre, "size": size, "stride": stride, "extent": extent}
    return (h, w), given, np.stack(expected)


@use(6)
def yolact(h, w, rng):
    grid = rng.normal(size=(3, h, w))
    return (h, w), {"grid": grid}, grid


@use(8)
def monai(h, w, rng):
    volume = np.array([h + 3, h, w])
    axes = np.meshgrid(*(np.linspace(-0.5, 0.5, n) for n in volume), indexing="ij")
    patch = rng.integers(1, volume + 1)
    start = rng.integers(0, volume - patch + 1, (4, 3))
    expected = [[axis[tuple(map(slice, s, s + patch))] for axis in axes] for s in start]
    return tuple(patch), {"start": start, "stop": start + patch, "volume": volume}, expected


@use(9)
def nodules(h, w, rng):
    scan, crop = np.array([2 * h + 40, 4 * h + 40, 4 * w + 40]), np.array([16, 4 * h, 4 * w])
    samples = crop // 4
    start = rng.integers(0, scan - crop + 1, (3, 3))
    ends = start / scan - 0.5, (start + crop) / scan - 0.5
    expected = [
        np.meshgrid(*map(np.linspace, first, last, samples), indexing="ij")
        for first, last in zip(*ends, strict=True)
    ]
    return tuple(samples), between(*ends, samples), expected


def between(first: Any, last: Any, samples: Any) -> dict[str, Any]:
    """What the lines name of coordinates that are known at the first and the last sample."""
    return {"first": first, "last": last, "step": (last - first) / (np.array(samples) - 1)}


@use(10)
def corr_diff(h, w, rng):
    ch, cw, boxes = some_boxes(h, w, rng)
    y, x = corners(h, w)
    return (ch, cw), {"boxes": boxes, "h": h, "w": w}, cut(np.stack([x, y]), boxes)


@use(10, 1)
def corr_diff_in_waves(h, w, rng):
    ch, cw, boxes = some_boxes(h, w, rng)
    y, x = corners(h, w, 0, 2 * np.pi)
    bands = 2.0 ** np.linspace(0, 5, 5)
    waves = {
        f"{of}({float(band)!r} {axis})": cut(getattr(np, of)(band * values), boxes)
        for band in bands
        for of in ("sin", "cos")
        for axis, values in (("x", x), ("y", y))
    }
    given = {"boxes": boxes, "h": h, "w": w, "bands": bands}
    return (ch, cw), given, waves, 2 * np.pi * bands[-1]


@use(11)
def makani(h, w, rng):
    y, x = np.meshgrid(*(np.linspace(0, 1, n + 1)[:-1] for n in (h, w)), indexing="ij")
    start, every = np.array([h, w]) // 4, 2  # a rank's first row and column; each second is taken
    shape = (np.array([h, w]) - start) // every
    stop = start + every * shape
    part = tuple(slice(a, b, every) for a, b in zip(start, stop, strict=True))
    waves = {
        f"{of}({float(k)!r} {axis})": getattr(np, of)(k * values)[part]
        for k in range(1, 17)
        for of in ("sin", "cos")
        for axis, values in (("y", y), ("x", x))
    }
    return tuple(shape), {"start": start, "stop": stop, "h": h, "w": w}, waves, 16


@use(11, 1)
def makani_on_its_grid(h, w, rng):
    lat = np.deg2rad(np.linspace(90, -90, h) + rng.uniform(-0.1, 0.1, h))
    land = rng.integers(0, 2, (h, w))
    expected = {"land": land}
    for k in range(1, 17):
        expected[f"sin {k} lat"] = np.broadcast_to(np.sin(k * lat)[:, None], (h, w))
        expected[f"cos {k} lat"] = np.broadcast_to(np.cos(k * lat)[:, None], (h, w))
    return (h, w), {"lat": lat, "land": land}, expected


@use(12)
def neural_operator(h, w, rng):
    axes = np.linspace(0, 1, h + 1)[:-1], np.linspace(-2, 6, w + 1)[:-1]
    return (h, w), {}, np.stack(np.meshgrid(*axes, indexing="ij"))


@use(13)
def pde(h, w, rng):
    return (h, w), {}, np.stack(corners(h, w, 0, 1))


@use(13, 1)
def pde_in_3d(h, w, rng):
    axes = (np.linspace(0, 1, n) for n in (3, h, w))
    return (3, h, w), {}, np.stack(np.meshgrid(*axes, indexing="ij"))


@use(14)
def robomimic(h, w, rng):
    ch, cw, boxes = some_boxes(h, w, rng)
    whole = np.stack(np.meshgrid(np.arange(h) / h, np.arange(w) / w, indexing="ij"))
    return (ch, cw), {"boxes": boxes, "h": h, "w": w}, cut(whole, boxes)


def plane(h: int, w: int, a: float) -> tuple[Any, Any]:
    """Columns and rows of a plane of an aspect ratio whose half diagonal is 1."""
    ends = a / (1 + a * a) ** 0.5, 1 / (1 + a * a) ** 0.5
    axes = (
        np.linspace(-end * (n - 1) / n, end * (n - 1) / n, n)
        for end, n in zip(ends, (w, h), strict=True)
    )
    x, y = np.meshgrid(*axes)
    return x, y


@use(15)
def moge(h, w, rng):
    return (h, w), {}, np.stack(plane(h, w, w / h))


@use(15, 1)
def moge_of_another_image(h, w, rng):
    a = rng.uniform(0.3, 3)
    return (h, w), {"a": a}, np.stack(plane(h, w, a))


@use(15, 2)
def vggt(h, w, rng):
    k = 8
    waves = {}
    for i in range(k):
        frequency = 1 / 100.0 ** (i / k)
        for axis, values in zip("xy", plane(h, w, w / h), strict=True):
            for of in ("sin", "cos"):
                waves[axis, of, i] = getattr(np, of)(values * frequency)
    order = [(axis, of, i) for axis in "xy" for i in range(k) for of in ("sin", "cos")]
    return (h, w), {"k": k}, np.stack([waves[each] for each in order])


@use(16)
def slot_attention(h, w, rng):
    y, x = corners(h, w, 0, 1)
    return (h, w), {}, np.stack([y, x, 1 - y, 1 - x])


@use(18)
def romp(h, w, rng):
    depths = np.sort(rng.normal(size=5))
    y, x = (np.arange(n) / n * 2 - 1 for n in (h, w))
    return (5, h, w), {"depths": depths}, np.stack(np.meshgrid(depths, y, x, indexing="ij"))


@use(19)
def bat_detect(h, w, rng):
    return (h, w), {}, corners(h, w)[0][None]


@use(20)
def tornet(h, w, rng):
    low = np.stack([rng.uniform(0, 300, 4), rng.uniform(0, 1, 4)], 1)  # degrees and 100 km
    high = low + np.array([60, 0.6])
    low[0, 1] = 0.001  # below the range of the radar
    stride, nearest, expected = int(rng.choice([1, 2])), 2125e-5, []
    for (azimuth_low, range_low), (azimuth_high, range_high) in zip(low, high, strict=True):
        azimuth = np.linspace(
            (90 - azimuth_low) * np.pi / 180, (90 - azimuth_high) * np.pi / 180, h
        )
        reach, azimuth = np.meshgrid(np.linspace(range_low, range_high, w), azimuth)
        reach = np.where(reach >= nearest, reach, nearest)
        expected.append(np.stack([reach, azimuth, 1 / reach])[:, ::stride, ::stride])
    steepest = nearest**-2  # of 1 / range
    return (h // stride, w // stride), between(low, high, (h, w)), np.stack(expected), steepest


def camera(h: int, w: int, rng: Any) -> tuple[Any, Any, list[list[Any]]]:
    """An image, the centres of three cameras, and how far from each the samples of a map lie.

    The map is of half the size, and its corners lie on the corners of the image.
    """
    image = np.array([2 * h, 2 * w])
    centres = image / 2 + rng.uniform(-3, 3, (3, 2))
    return (
        image,
        centres,
        [
            [
                np.linspace(0, n - 1, m) - c + 0.5
                for n, m, c in zip(image, (h, w), each, strict=True)
            ]
            for each in centres
        ],
    )


@use(21, 1)
def cam_convs(h, w, rng):
    image, centres, places = camera(h, w, rng)
    ends = between(0.5 - centres, image - 0.5 - centres, (h, w))
    return (h, w), ends, np.stack([np.stack(np.meshgrid(x / 320, y / 320)) for y, x in places])


@use(21, 2)
def cam_convs_view(h, w, rng):
    centre, focal = np.array([h, w]) / 2 + rng.uniform(-3, 3, (3, 2)), rng.uniform(50, 500, (3, 2))
    expected = [
        np.stack(
            np.meshgrid(
                np.arctan((np.arange(w) - cx + 0.5) / fx), np.arctan((np.arange(h) - cy + 0.5) / fy)
            )
        )
        for (cy, cx), (fy, fx) in zip(centre, focal, strict=True)
    ]
    ends = between(0.5 - centre, np.array([h, w]) - 0.5 - centre, (h, w))
    return (h, w), ends | {"focal": focal}, np.stack(expected)


@use(21, 3)
def cam_convs_to_left_and_top(h, w, rng):
    return (h, w), {}, np.stack(np.meshgrid(np.arange(w), np.arange(h)))


@use(21, 4)
def cam_convs_to_right_and_bottom(h, w, rng):
    return (h, w), {}, np.stack(np.meshgrid(w - np.arange(w) - 1, h - np.arange(h) - 1))


@use(22)
def adaptive_wing(h, w, rng):
    rows, columns = (2 * (np.arange(n) / (n - 1)) - 1 for n in (h, w))
    x, y = np.meshgrid(rows, columns, indexing="ij")
    r = np.sqrt(x**2 + y**2)
    return (h, w), {}, np.stack([x, y, r / r.max()])


@use(24)
def recipes(h, w, rng):
    y, x = corners(h, w)
    return (h, w), {}, np.stack([x, y, np.sqrt((x - 0.5) ** 2 + (y - 0.5) ** 2)])


@use(25)
def in_jax(h, w, rng):
    y, x = corners(h, w)
    return (h, w), {}, np.stack([x, y, np.sqrt(x**2 + y**2)])


@use(26)
def in_metres(h, w, rng):
    metres = rng.choice([1.0, 10, 30], 3)  # of a pixel
    north, west = rng.uniform(-1e4, 1e4, (2, 3))
    upper_left = np.stack([north, west], 1)
    lower_right = np.stack([north - h * metres, west + w * metres], 1)
    expected = [
        np.stack(np.meshgrid(x + (np.arange(w) + 0.5) * m, y - (np.arange(h) + 0.5) * m))
        for y, x, m in zip(north, west, metres, strict=True)
    ]
    return (h, w), {"upper_left": upper_left, "lower_right": lower_right}, np.stack(expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("key", LINES, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_line_gives_what_the_project_computes(key, size):
    """Within 16 roundings of the largest number."""
    shape, given, expected, *largest = USES[key](*size, np.random.default_rng(size))
    said = eval(f"dict({LINES[key]})", NAMES | given)
    window = said.pop("window", None)
    (coords,) = said.values()
    found = coordinate_grid([*map(int, shape)], coords, window=window, dtype=np.float64)
    if isinstance(expected, dict):
        names = Coordinates.resolve(coords, len(shape)).names
        assert {*names} == {*expected}
        expected = np.stack([expected[name] for name in names], axis=-len(shape) - 1)
    expected = np.asarray(expected)
    if window is not None and expected.ndim == len(shape) + 1:
        expected = expected[None]  # one window for the batch
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()), *largest)
    assert np.abs(found - expected).max() <= 16 * 2.0**-53 * scale


def test_the_table_has_all_uses():
    assert [int(row) for row, _ in ROWS] == list(range(1, 27))
    assert {*LINES} == {*USES}
    expressed = {row for row, _ in LINES}
    assert len(expressed) >= 22
    for row, said in ROWS:
        assert int(row) in expressed or said.startswith("not here: ")


def test_the_arctangent_of_smaller_maps():
    """CAM-Convs interpolates it between pixels, and is a little off the arctangent there."""
    rng = np.random.default_rng(0)
    image, centres, places = camera(24, 32, rng)
    ends = between(0.5 - centres, image - 0.5 - centres, (24, 32))
    focal = rng.uniform(50, 500, (3, 2))
    said = eval(f"dict({LINES[21, 2]})", NAMES | ends | {"focal": focal})
    found = coordinate_grid((24, 32), said["coords"], window=said["window"], dtype=np.float64)
    for each, (y, x), c, f in zip(found, places, centres, focal, strict=True):
        for got, place, middle, length, n in zip(
            (each[1, :, 0], each[0, 0]), (y, x), c, f, image, strict=True
        ):
            pixels = np.arange(n) - middle + 0.5
            theirs = np.interp(place, pixels, np.arctan(pixels / length))
            # An eighth of the squared step times the largest second derivative of the arctangent.
            assert np.abs(got - theirs).max() <= 3 * 3**0.5 / 8 / 8 / length**2 + 1e-15
