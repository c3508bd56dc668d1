"""Weights: the file whole or not at all, and an import that tells every problem at once."""

import errno
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from coordconv import Coordinates, load_weights, save_weights
from coordconv import weights as weights_module
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
        np.array([1.5, np.inf, np.nan, -0.0], np.float16),
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


# --- whole or not at all -------------------------------------------------------------------------


def fail(problem: BaseException) -> Callable[..., None]:
    def call(*_: Any) -> None:
        raise problem

    return call


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    step: str, problem: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": np.ones(3)})
    monkeypatch.setattr(weights_module.os, step, fail(problem))
    with pytest.raises(type(problem)) as caught:
        save_weights(path, {"w": np.zeros(1000)})
    monkeypatch.undo()
    if isinstance(problem, OSError):
        assert "cannot write weights: No space left on device" in str(caught.value)
        assert str(path) in str(caught.value)
        assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
    assert_same(load_weights(path), {"w": np.ones(3)})
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, ARRAYS)
    with pytest.raises(TypeError):
        save_weights(path, {**ARRAYS, "more": np.ones(1, complex)})
    assert_same(load_weights(path), ARRAYS)


def test_success_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for _ in range(3):
        save_weights(path, ARRAYS)
    assert list(tmp_path.iterdir()) == [path]


def test_readers_meet_whole_files_only(tmp_path: Path) -> None:
    """Two writers and a reader on one path."""
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": np.full(5000, 0.0)})
    problems: list[BaseException] = []
    done = threading.Event()

    def write(value: float) -> None:
        try:
            for _ in range(20):
                save_weights(path, {"w": np.full(5000, value)})
        except BaseException as problem:  # noqa: BLE001  # told to the main thread
            problems.append(problem)

    def read() -> None:
        try:
            while not done.is_set():
                array = load_weights(path)["w"]
                assert array.shape == (5000,)
                assert len(set(array.tolist())) == 1
        except BaseException as problem:  # noqa: BLE001  # told to the main thread
            problems.append(problem)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not problems
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "none" / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="cannot write weights: No such file") as caught:
        save_weights(path, ARRAYS)
    assert caught.value.filename == str(path)


def test_a_path_that_is_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="cannot write weights"):
        save_weights(path, ARRAYS)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "w.safetensors"
    with pytest.raises(NotADirectoryError, match="cannot write weights") as caught:
        save_weights(path, ARRAYS)
    assert caught.value.filename == str(path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(PermissionError, match="cannot write weights: Permission denied"):
        save_weights(folder / "w.safetensors", ARRAYS)


@pytest.mark.skipif(os.name != "posix", reason="names of up to 255 bytes")
def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("w" * 243 + ".safetensors")
    path.touch()  # the file system takes it
    save_weights(path, ARRAYS)
    assert_same(load_weights(path), ARRAYS)


def test_a_name_that_the_format_keeps_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="__metadata__"):
        save_weights(path, {"__metadata__": np.ones(2)})
    assert not path.exists()


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'w': float"):
        save_weights(tmp_path / "w.safetensors", {"w": np.ones(2, np.longdouble)})


# --- damaged files -------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.safetensors"
    save_weights(path, Weights({"w": np.arange(4.0)}, {"": COORDS}), {"note": "x"})
    return path.read_bytes()


def test_cut_short_anywhere(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    for length in range(len(written)):
        path.write_bytes(written[:length])
        with pytest.raises(ValueError, match="not a safetensors file, or is damaged") as caught:
            load_weights(path)
        assert str(path) in str(caught.value)


def test_too_long(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(written + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        load_weights(path)


def test_a_changed_header_is_read_or_refused(written: bytes, tmp_path: Path) -> None:
    """Any byte of the header changed: another valid file, or one clear error, never a crash."""
    path = tmp_path / "changed.safetensors"
    (size,) = struct.unpack("<Q", written[:8])
    refused = 0
    for place in range(8 + size):
        for mask in (1, 4, 16, 128):
            changed = bytearray(written)
            changed[place] ^= mask
            path.write_bytes(changed)
            try:
                load_weights(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017  # many outcomes, one of them this
                refused += 1
    assert refused > size


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\0" * 64, b"text, and no safetensors file at all", b"PK\3\4" + b"\0" * 60],
    ids=["empty", "byte", "zeros", "text", "zip"],
)
def test_not_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="w.safetensors is not a safetensors file, or is damaged"):
        load_weights(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError if os.name == "posix" else OSError):
        load_weights(tmp_path)


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "99", "1.5", "-1", "", "new"])
def test_a_newer_format(version: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format_version": version})
    with pytest.raises(ValueError, match=f"has format version {version}; this coordconv reads up"):
        load_weights(path)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        "null",
        '{"": 3}',
        '{"": {"channels": "xx"}}',
        '{"": {"channels": "xy", "span": [1, 1]}}',
        '{"": {"tokens": "xy"}}',
        '{"": {"channels": null}}',
    ],
)
def test_damaged_coordinates(text: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"coordinates": text})
    with pytest.raises(ValueError, match="w.safetensors has damaged coordinates metadata"):
        load_weights(path)


def test_a_dtype_that_numpy_lacks(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    entry = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x38\x38")
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load_weights(path)


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
