"""Weights: what is in the file, and an import that tells every problem at once."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from coordconv import Coordinates, load_weights, save_weights
from coordconv.weights import FORMAT_VERSION, Weights, checked

RNG = np.random.default_rng(0)
ARRAYS = {
    "conv4.weight": RNG.normal(size=(4, 3, 3, 2)).astype(np.float32),
    "conv4.coord_weight": RNG.normal(size=(4, 3, 3, 2)).astype(np.float32),
    "conv4.bias": RNG.normal(size=4).astype(np.float32),
}
COORDS = Coordinates("yxr", span=(0, 1), align="edges", outside="extend", r_center=0.5)


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
    assert metadata["format_version"] == str(FORMAT_VERSION)
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
    assert_same(checked(ARRAYS, SHAPES), ARRAYS)
    assert_same(checked(ARRAYS, SHAPES, {"conv4": COORDS}), ARRAYS)  # a dict says nothing of them
    assert_same(checked(Weights(ARRAYS, {"conv4": COORDS}), SHAPES, {"conv4": COORDS}), ARRAYS)


def test_checked_is_in_the_modules_order() -> None:
    backwards = dict(reversed(ARRAYS.items()))
    assert list(checked(backwards, SHAPES)) == list(SHAPES)


def test_lists_will_do_for_arrays() -> None:
    np.testing.assert_array_equal(checked({"w": [1.0, 2.0]}, {"w": (2,)})["w"], [1.0, 2.0])


def test_all_problems_at_once() -> None:
    wrong = Weights(
        {
            "conv4.weight": np.ones((4, 3, 2, 3)),
            "conv4.coord_weight": np.ones((4, 3, 3, 2), int),
            "conv5.bias": np.ones(7),
        },
        {"conv4": Coordinates("yxr"), "conv6": Coordinates("x")},
    )
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        checked(wrong, SHAPES, {"conv4": COORDS})
    assert str(caught.value).splitlines() == [
        "cannot import weights:",
        "  missing: conv4.bias, shape (4,)",
        "  wrong shape: conv4.weight is (4, 3, 2, 3), want (4, 3, 3, 2)",
        "  not floating-point: conv4.coord_weight is int64",
        "  unexpected: conv5.bias, shape (7,)",
        "  other coordinates: conv4.coord_weight was made for Coordinates('yxr'), want "
        "Coordinates('yxr', span=(0.0, 1.0), align='edges', outside='extend', r_center=0.5)",
    ]


@pytest.mark.parametrize("mapping", [[("w", np.ones(2))], None, np.ones(2), "weights"])
def test_not_a_mapping(mapping: Any) -> None:
    with pytest.raises(TypeError, match="weights must be a mapping of names to arrays"):
        checked(mapping, {"w": (2,)})


@pytest.mark.parametrize(
    ("made", "wanted"), [("xy", "yx"), ("yxr", "xyr"), ("rxy", "xyr"), ("zyx", "xyz")]
)
def test_the_same_coordinates_in_another_order(made: str, wanted: str) -> None:
    """The channels move with their coordinates, exactly, and nothing else moves."""
    n = len(made)
    weights = {
        "c.coord_weight": RNG.normal(size=(5, n, 3)),
        "c.weight": RNG.normal(size=(5, n, 3)),
        "d.coord_weight": RNG.normal(size=(5, n, 3)),
    }
    shapes = {name: array.shape for name, array in weights.items()}
    given = {"c": Coordinates(made, span=(0, 1)), "d": Coordinates(made)}
    want = {"c": Coordinates(wanted, span=(0, 1)), "d": Coordinates(made)}
    found = checked(Weights(weights, given), shapes, want)
    for i, token in enumerate(wanted):
        np.testing.assert_array_equal(
            found["c.coord_weight"][:, i], weights["c.coord_weight"][:, made.index(token)]
        )
    for name in ("c.weight", "d.coord_weight"):
        np.testing.assert_array_equal(found[name], weights[name])


def test_a_layer_on_its_own_has_no_prefix() -> None:
    kernel = RNG.normal(size=(2, 2, 1))
    found = checked(
        Weights({"coord_weight": kernel}, {"": Coordinates("yx")}),
        {"coord_weight": (2, 2, 1)},
        {"": Coordinates("xy")},
    )
    np.testing.assert_array_equal(found["coord_weight"], kernel[:, ::-1])


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
def test_other_coordinates_are_refused(other: Coordinates) -> None:
    weights = Weights({"coord_weight": np.ones((1, 2, 1))}, {"": other})
    with pytest.raises(ValueError, match=r"other coordinates: coord_weight was made for .*, want"):
        checked(weights, {"coord_weight": (1, 2, 1)}, {"": Coordinates("xy")})
