"""Weights: what is in the file, and an import that tells every problem at once."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from coordconv import Coordinates, load_weights, networks, save_weights
from coordconv.geometry import ConvGeometry
from coordconv.weights import Weights, join_kernel
from coordconv.weights.canonical import checked, layouts
from coordconv.weights.files import FORMAT_VERSION
from coordconv.weights.kernels import KernelLayout

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv4.weight": RNG.normal(size=(4, 3 + 3, 3, 2)).astype(np.float32),
    "conv4.bias": RNG.normal(size=4).astype(np.float32),
}
COORDS = Coordinates("yxr", span=(0, 1), align="edges", outside="extend", r_center=0.5)
LAYOUTS = {"conv4": KernelLayout(COORDS, 3)}


def assert_same(found: Any, expected: Any) -> None:
    assert dict(found).keys() == dict(expected).keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


# --- the file ------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, Weights(ARRAYS, {"conv4": COORDS}), {"trained_on": "squares", "é": "ß"})
    found = load_weights(path)
    assert_same(found, ARRAYS)
    assert found.coordinates == {"conv4": COORDS}
    assert found.metadata == {"trained_on": "squares", "é": "ß"}
    save_weights(path, found)  # what was read is written back as it was
    again = load_weights(path)
    assert_same(again, ARRAYS)
    assert (again.coordinates, again.metadata) == (found.coordinates, found.metadata)


def test_a_plain_dict_and_a_text_path_do(tmp_path: Path) -> None:
    path = str(tmp_path / "net.safetensors")
    save_weights(path, ARRAYS)
    found = load_weights(path)
    assert_same(found, ARRAYS)
    assert (found.coordinates, found.metadata) == ({}, {})


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(4, 6)[::2, ::-3],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(3.0),
        np.zeros((0, 3), np.float32),
        np.arange(3, dtype=">f4"),
        np.array([1.5, 65504.0, 6e-8, -0.0], np.float16),
        np.array([True, False]),
        np.arange(3, dtype=np.int64),
    ],
    ids=["strided", "fortran", "scalar", "empty", "big-endian", "half", "bool", "int"],
)
def test_any_array_keeps_its_values(array: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": array})
    found = load_weights(path)["w"]
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    """What another reader of safetensors finds there."""
    path = tmp_path / "w.safetensors"
    save_weights(path, Weights(ARRAYS, {"conv4": COORDS}))
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(ARRAYS)
    assert metadata["format_version"] == str(FORMAT_VERSION) == "2"
    assert json.loads(metadata["coordinates"]) == {
        "conv4": {
            "channels": "yxr",
            "span": [0.0, 1.0],
            "align": "edges",
            "outside": "extend",
            "r_center": 0.5,
        }
    }


def test_any_safetensors_file_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    assert_same(load_weights(path), ARRAYS)
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt"})
    assert load_weights(path).metadata == {"format": "pt"}


@pytest.mark.parametrize("version", ["1", "01", "0"])
def test_a_file_of_two_kernels_is_refused_by_its_version(version: str, tmp_path: Path) -> None:
    """The first edition's: what it calls ``weight`` is the features' part alone."""
    path = tmp_path / "w.safetensors"
    arrays = {"weight": np.ones((4, 3, 1)), "coord_weight": np.ones((4, 1, 1))}
    safetensors.numpy.save_file(arrays, path, metadata={"format_version": version})
    message = (
        rf"{path} has format version {version}, in which .* weight and coord_weight; .* reads "
        r"version 2.*: read the file by safetensors.numpy.load_file, join each such pair by "
        r"coordconv.weights.join_kernel"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(path)
    # What the message says to do.
    found = safetensors.numpy.load_file(path)
    save_weights(path, {"weight": join_kernel(found["weight"], found["coord_weight"])})
    assert load_weights(path)["weight"].shape == (4, 4, 1)


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    """Every value of it, and exactly."""
    path, bits = tmp_path / "w.safetensors", np.arange(2**16, dtype=np.uint32)
    entries = {
        "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "w": {"dtype": "BF16", "shape": [2, 2**15], "data_offsets": [4, 4 + 2**17]},
        "x": {"dtype": "BF16", "shape": [], "data_offsets": [4 + 2**17, 6 + 2**17]},
        "y": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [6 + 2**17, 6 + 2**17]},
    }
    header = json.dumps(entries).encode()
    data = np.float32(1.5).tobytes() + bits.astype("<u2").tobytes() + b"\x80\x3f"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.warns(UserWarning, match="NaN or infinity in w$"):
        found = load_weights(path)
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {
        name: (np.float32, tuple(entry["shape"])) for name, entry in entries.items()
    }
    np.testing.assert_array_equal(found["w"].view(np.uint32).ravel(), bits << 16)
    assert (found["v"][0], found["x"]) == (1.5, 1.0)


def test_a_path_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(os.fsencode(path), ARRAYS)
    assert_same(load_weights(os.fsencode(path)), ARRAYS)


@pytest.mark.parametrize(
    ("weights", "metadata", "error", "message"),
    [
        ({"w": np.ones(2, complex)}, None, TypeError, "numeric arrays, got 'w': complex128"),
        ({"w": np.array(["a"])}, None, TypeError, "numeric arrays, got 'w'"),
        ({"w": np.array([None])}, None, TypeError, "numeric arrays, got 'w': object"),
        ({1: np.ones(2)}, None, TypeError, "names to numeric arrays, got 1"),
        (ARRAYS, {"epoch": 3}, TypeError, "metadata must map text to text, got 'epoch': 3"),
        (ARRAYS, {3: "epoch"}, TypeError, "metadata must map text to text, got 3: 'epoch'"),
        (ARRAYS, {"format_version": "9"}, ValueError, "'format_version', which the format itself"),
        (ARRAYS, {"coordinates": "{}"}, ValueError, "'coordinates', which the format itself"),
    ],
)
def test_what_cannot_be_saved(
    weights: Any, metadata: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_weights(tmp_path / "w.safetensors", weights, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_format_keeps_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="__metadata__"):
        save_weights(path, {"__metadata__": np.ones(2)})
    assert not path.exists()


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'w': float"):
        save_weights(tmp_path / "w.safetensors", {"w": np.ones(2, np.longdouble)})


# --- what an import checks -----------------------------------------------------------------------

SHAPES = {name: array.shape for name, array in ARRAYS.items()}


def test_checked_passes_what_fits() -> None:
    assert_same(checked(ARRAYS, SHAPES, {}), ARRAYS)
    assert_same(checked(ARRAYS, SHAPES, LAYOUTS), ARRAYS)  # a dict says nothing of them
    assert_same(checked(Weights(ARRAYS, {"conv4": COORDS}), SHAPES, LAYOUTS), ARRAYS)


def test_checked_is_in_the_modules_order() -> None:
    backwards = dict(reversed(ARRAYS.items()))
    assert list(checked(backwards, SHAPES, {})) == list(SHAPES)


def test_lists_will_do_for_arrays() -> None:
    np.testing.assert_array_equal(checked({"w": [1.0, 2.0]}, {"w": (2,)}, {})["w"], [1.0, 2.0])


def test_all_problems_at_once() -> None:
    wrong = Weights(
        {"conv4.weight": np.ones((4, 6, 2, 3)), "conv4.bias": np.ones(4, int), "b": np.ones(7)},
        {"conv4": Coordinates("yxr"), "conv6": Coordinates("x")},
    )
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        checked(wrong, {**SHAPES, "linear.bias": (1,)}, LAYOUTS, {"b": "'theirs'"})
    assert str(caught.value).splitlines() == [
        "cannot import weights:",
        "  missing: linear.bias, shape (1,)",
        "  wrong shape: conv4.weight is (4, 6, 2, 3), want (4, 6, 3, 2)",
        "  not floating-point: conv4.bias is int64",
        "  unexpected: b (from 'theirs'), shape (7,)",
        "  other coordinates: conv4.weight was made for Coordinates('yxr'), want "
        "Coordinates('yxr', span=(0.0, 1.0), align='edges', outside='extend', r_center=0.5)",
    ]


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (1, True), (4, True)])
@pytest.mark.parametrize("off", [-2, -1, 1])
def test_a_kernel_of_other_channels_is_told_the_three_numbers(
    groups: int, transposed: bool, off: int
) -> None:
    """As many as there are, as features and coordinates are, and as the features alone are."""
    layout = KernelLayout(Coordinates("xy"), 16, groups, transposed)
    shape = [layout.width, 8 // groups, 3] if transposed else [8, layout.width, 3]
    wanted = tuple(shape)
    shape[layout.axis] += off * (groups if transposed else 1)  # -2: a plain convolution's
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        checked({"weight": np.ones(shape)}, {"weight": wanted}, {"": layout})
    assert str(caught.value).splitlines()[1:] == [
        f"  wrong shape: weight is {tuple(shape)}, want {wanted}: {shape[layout.axis]} input "
        f"channels, where features and coordinates have {layout.width}, and features alone "
        f"{layout.plain_width}"
    ]


@pytest.mark.parametrize("mapping", [[("w", np.ones(2))], None, np.ones(2), "weights"])
def test_not_a_mapping(mapping: Any) -> None:
    with pytest.raises(TypeError, match="weights must be a mapping of names to arrays"):
        checked(mapping, {"w": (2,)}, {})


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize(
    ("made", "wanted"), [("xy", "yx"), ("yxr", "xyr"), ("rxy", "xyr"), ("zyx", "xyz")]
)
def test_the_same_coordinates_in_another_order(
    made: str, wanted: str, groups: int, transposed: bool
) -> None:
    """The channels move with their coordinates, exactly, and nothing else moves."""
    layout = KernelLayout(Coordinates(wanted, span=(0, 1)), 4, groups, transposed)
    other = KernelLayout(Coordinates(made), 4, groups, transposed)
    sides = (layout.width, 3) if transposed else (6, layout.width)
    weights = {f"{name}.weight": RNG.normal(size=(*sides, 3)) for name in "cd"}
    shapes = {name: array.shape for name, array in weights.items()}
    given = {"c": Coordinates(made, span=(0, 1)), "d": Coordinates(made)}
    found = checked(Weights(weights, given), shapes, {"c": layout, "d": other})
    features, coordinates = layout.split(found["c.weight"])
    features_before, before = layout.split(weights["c.weight"])
    np.testing.assert_array_equal(features, features_before)
    for i, token in enumerate(wanted):
        np.testing.assert_array_equal(coordinates[:, i], before[:, made.index(token)])
    np.testing.assert_array_equal(found["d.weight"], weights["d.weight"])


def test_a_layer_on_its_own_has_no_prefix() -> None:
    kernel = RNG.normal(size=(2, 1 + 2, 1))
    found = checked(
        Weights({"weight": kernel}, {"": Coordinates("yx")}),
        {"weight": (2, 3, 1)},
        {"": KernelLayout(Coordinates("xy"), 1)},
    )
    np.testing.assert_array_equal(found["weight"], kernel[:, [0, 2, 1]])


@pytest.mark.parametrize(
    "other",
    [
        Coordinates("xy", span=(0, 1)),
        Coordinates("xy", align="edges"),
        Coordinates("xy", outside="extend"),
        Coordinates("xr"),
        Coordinates("x"),
    ],
)
@pytest.mark.parametrize("layer", ["", "conv4"])
def test_other_coordinates_are_refused_by_name(other: Coordinates, layer: str) -> None:
    name, coords = f"{layer}.weight".strip("."), Coordinates("xy")
    weights = Weights({name: np.ones((1, 5, 1))}, {layer: other})
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        checked(weights, {name: (1, 5, 1)}, {layer: KernelLayout(coords, 3)})
    expected = f"  other coordinates: {name} was made for {other!r}, want {coords!r}"
    assert str(caught.value).splitlines()[1:] == [expected]


# --- a network's ---------------------------------------------------------------------------------


def test_copies_have_the_coordinates(tmp_path: Path) -> None:
    start = networks.initial_weights("coord_cnn")
    for made in (start, start.copy(), Weights(start)):
        save_weights(tmp_path / "w.safetensors", made)
        found = load_weights(tmp_path / "w.safetensors")
        assert found.coordinates == {"conv4": Coordinates("xy")}
        assert found.metadata == {"network": "coord_cnn"}
    assert not Weights.of(networks.get("plain_cnn"), start).coordinates


def test_the_weights_of_a_network() -> None:
    network = networks.get("coord_cnn").with_coordinates("yx")
    arrays = networks.initial_weights(network)
    weights = Weights.of(network, arrays)
    assert_same(weights, arrays)
    assert weights.coordinates == {"conv4": Coordinates("yx")}
    assert weights.metadata == {"network": "coord_cnn"}


def test_the_layouts_of_a_network() -> None:
    geometry = ConvGeometry((2, 2), groups=2, transposed=True)
    layers = (
        networks.Conv("a", 4, 6, ConvGeometry((3, 3), groups=2), Coordinates("yx")),
        networks.Conv("plain", 6, 4, ConvGeometry((1, 1))),
        networks.ReLU(),
        networks.Conv("b", 4, 2, geometry, Coordinates("xyr")),
    )
    network = networks.Network("own", (4, 9, 9), layers)
    found = layouts(network)
    assert found == {
        "a": KernelLayout(Coordinates("yx"), 4, 2),
        "b": KernelLayout(Coordinates("xyr"), 4, 2, transposed=True),
    }
    shapes = network.weight_shapes()
    assert {name: shapes[f"{name}.weight"][kl.axis] for name, kl in found.items()} == {
        name: layout.width for name, layout in found.items()
    }
