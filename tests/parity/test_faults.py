"""What can go wrong with a file of weights: one clear error or the right arrays, never half."""

import errno
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from coordconv import (
    Coordinates,
    available_backends,
    convert,
    load_weights,
    networks,
    save_weights,
)
from coordconv.geometry import ConvGeometry
from coordconv.weights import Weights, files
from coordconv.weights.canonical import checked, layouts
from coordconv.weights.files import FORMAT_VERSION

posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and permissions of POSIX")

NETWORK = networks.Network(
    "small",
    (2, 5, 5),
    (
        networks.Conv("conv", 2, 3, ConvGeometry((3, 3)), Coordinates("yxr", r_center=0.5)),
        networks.Flatten("flatten"),
        networks.Linear("linear", 27, 2),
    ),
)
WEIGHTS = Weights.of(NETWORK, networks.initial_weights(NETWORK))


def assert_same(found: Any, expected: Any) -> None:
    assert dict(found).keys() == dict(expected).keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.safetensors"


# --- damaged files -------------------------------------------------------------------------------


def test_cut_short_anywhere(path: Path) -> None:
    save_weights(path, Weights({"w": np.arange(4.0)}, {"": Coordinates("yxr")}), {"note": "x"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a safetensors file, or is damaged") as caught:
            load_weights(path)
        assert str(path) in str(caught.value)


def test_cut_short_at_every_hundredth_byte(path: Path) -> None:
    """A network's file, shorter and shorter."""
    save_weights(path, networks.initial_weights("coord_classifier"))
    for length in reversed(range(0, path.stat().st_size, 100)):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="not a safetensors file, or is damaged"):
            load_weights(path)


def test_a_flipped_bit_of_the_header_is_harmless_or_told_of(path: Path) -> None:
    """By the file or, where it still is a valid one, by the import; else it changed no array."""
    coords = Coordinates("xr", r_center=0.5)
    layer = networks.Conv("conv", 1, 2, ConvGeometry((1,)), coords, bias=False)
    network = networks.Network("flipped", (1, 3), (layer,))
    name, shapes = "conv.weight", network.weight_shapes()
    arrays = {name: np.arange(6, dtype=np.float32).reshape(shapes[name])}
    save_weights(path, Weights.of(network, arrays), {"note": "x"})
    written = path.read_bytes()
    told = {"load": 0, "import": 0}
    for place in range(len(written) - arrays[name].nbytes):
        for bit in range(8):
            changed = bytearray(written)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            step = "load"
            try:
                found = load_weights(path)
                step = "import"
                assert_same(checked(found, shapes, layouts(network)), arrays)
            except ValueError as error:
                told[step] += 1
                assert step == "import" or str(path) in str(error)  # noqa: PT017  # one outcome
    assert min(told.values()) > 0
    assert sum(told.values()) > 4 * place


def header(content: Any, data: int = 16, size: int | None = None) -> bytes:
    """A file of that header, which may claim another ``size``, and ``data`` bytes."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


def tensor(shape: Any = (4,), end: int = 16, dtype: str = "F32", start: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def twice(first: dict[str, Any], second: dict[str, Any]) -> bytes:
    return header(f'{{"w": {json.dumps(first)}, "w": {json.dumps(second)}}}'.encode())


DAMAGED = {
    "empty": b"",
    "a byte": b"\0",
    "zeros": b"\0" * 64,
    "text": b"text, and no safetensors file at all",
    "a zip archive": b"PK\3\4" + b"\0" * 60,
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
    "one byte too many": header({"w": tensor()}, 17),
    "one byte too few": header({"w": tensor()}, 15),
    "a header longer than the file": header({"w": tensor()}, size=1000),
    "a header of 2**63 bytes": header({"w": tensor()}, size=2**63),
    "a header of all that there is": header({"w": tensor()}, size=2**64 - 1),
    "an array beyond the file": header({"w": tensor((400,), 1600)}),
    "an array of 2**64 elements": header({"w": tensor((2**62, 4))}),
    "an array larger than its bytes": header({"w": tensor((5,))}),
    "an array of negative length": header({"w": tensor((-4,))}),
    "arrays that overlap": header({"v": tensor(), "w": tensor()}),
    "arrays with a hole between": header({"v": tensor((1,), 4), "w": tensor((1,), 16, start=12)}),
    "more axes than NumPy has": header({"w": tensor([1] * 99 + [4])}),
    "a dtype that does not exist": header({"w": tensor(dtype="Q32")}),
    "a dtype that NumPy lacks": header({"w": tensor((16,), dtype="F8_E4M3")}),
    "a name twice": twice(tensor((2,), 8), tensor((2,), 16, start=8)),
    "a name twice, for the same bytes": twice(tensor(), tensor((2, 2))),
    "no names": header([tensor()]),
    "metadata that is no text": header({"__metadata__": {"epoch": 3}, "w": tensor()}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file|holds what NumPy") as caught:
        load_weights(path)
    assert str(path) in str(caught.value)


def test_what_the_damaged_files_would_be_if_whole(path: Path) -> None:
    path.write_bytes(header({"w": tensor()}))
    assert_same(load_weights(path), {"w": np.zeros(4, np.float32)})


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "99", "1.5", "-1", "", "new"])
def test_a_newer_format(version: str, path: Path) -> None:
    safetensors.numpy.save_file(WEIGHTS, path, metadata={"format_version": version})
    with pytest.raises(
        ValueError, match=f"has format version {version}; this coordconv reads version 2"
    ):
        load_weights(path)


def test_a_version_of_more_digits_than_python_reads(path: Path) -> None:
    safetensors.numpy.save_file(WEIGHTS, path, metadata={"format_version": "9" * 5000})
    with pytest.raises(ValueError, match="w.safetensors has format version 9{20}; this"):
        load_weights(path)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[" * 100_000,
        '{"": ' * 100_000,
        "[]",
        "null",
        '{"": 3}',
        '{"": {"channels": "xx"}}',
        '{"": {"channels": "xy", "span": [1, 1]}}',
        '{"": {"tokens": "xy"}}',
        '{"": {"channels": null}}',
    ],
)
def test_damaged_coordinates(text: str, path: Path) -> None:
    safetensors.numpy.save_file(WEIGHTS, path, metadata={"coordinates": text})
    with pytest.raises(ValueError, match="w.safetensors has damaged coordinates metadata"):
        load_weights(path)


# --- arrays that are not what they should be -----------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_read_and_told_of(
    value: float, dtype: Any, path: Path
) -> None:
    arrays = {name: np.ones((2, 2), dtype) for name in ("a.weight", "b.weight", "c.weight")}
    arrays["b.weight"][1, 0] = value
    save_weights(path, arrays)
    with pytest.warns(UserWarning, match=r"w\.safetensors holds NaN or infinity in b\.weight$"):
        assert_same(load_weights(path), arrays)


MISFITS: dict[str, Callable[[Weights], Any]] = {
    "missing: linear.weight": lambda weights: weights.pop("linear.weight"),
    "missing: conv.weight": lambda weights: weights.pop("conv.weight"),
    "unexpected: conv9.weight": lambda weights: weights.update({"conv9.weight": np.ones(1)}),
    "wrong shape: linear.weight is (27, 2)": lambda weights: weights.update(
        {"linear.weight": np.ones((27, 2))}
    ),
    "wrong shape: conv.weight is (3, 5)": lambda weights: weights.update(
        {"conv.weight": np.ones((3, 5))}
    ),
    "not floating-point: linear.bias is int32": lambda weights: weights.update(
        {"linear.bias": np.ones(2, np.int32)}
    ),
    "not floating-point: linear.bias is bool": lambda weights: weights.update(
        {"linear.bias": np.ones(2, bool)}
    ),
    "other coordinates: conv.weight": lambda weights: weights.coordinates.update(
        conv=Coordinates("yxr")
    ),
}


@pytest.mark.parametrize("problem", MISFITS)
def test_nothing_is_loaded_of_a_file_that_does_not_fit(
    backend: str, problem: str, path: Path
) -> None:
    """Everything else in it fits, and would be other values than the module has."""
    module = networks.build(NETWORK, backend, seed=1)
    weights = Weights.of(NETWORK, networks.initial_weights(NETWORK, 2))
    MISFITS[problem](weights)
    save_weights(path, weights)
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        module.import_weights(load_weights(path))
    assert problem in str(caught.value)
    if backend != "linen":  # whose modules hold nothing
        assert_same(module.export_weights(), networks.initial_weights(NETWORK, 1))


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
    step: str, problem: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(path, {"w": np.ones(3)})
    monkeypatch.setattr(files.os, step, fail(problem))
    with pytest.raises(type(problem)) as caught:
        save_weights(path, {"w": np.zeros(1000)})
    monkeypatch.undo()
    if isinstance(problem, OSError):
        assert "cannot write weights: No space left on device" in str(caught.value)
        assert str(path) in str(caught.value)
        assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
    assert_same(load_weights(path), {"w": np.ones(3)})
    assert list(path.parent.iterdir()) == [path]


@posix
def test_a_disk_that_takes_a_part_of_the_file(path: Path) -> None:
    import resource

    save_weights(path, {"w": np.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot write weights: File too large") as caught:
            save_weights(path, {"w": np.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert_same(load_weights(path), {"w": np.ones(3)})
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_saved_leaves_the_old_file(path: Path) -> None:
    save_weights(path, WEIGHTS)
    with pytest.raises(TypeError):
        save_weights(path, {**WEIGHTS, "more": np.ones(1, complex)})
    assert_same(load_weights(path), WEIGHTS)
    assert list(path.parent.iterdir()) == [path]


def test_success_leaves_nothing_else(path: Path) -> None:
    for _ in range(3):
        save_weights(path, WEIGHTS)
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, resource, signal, sys
import numpy as np
from coordconv import save_weights

path, step = sys.argv[1:]
if step == "write":  # the system kills whoever writes beyond the limit
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
else:
    setattr(os, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
save_weights(path, {"w": np.zeros(1000)})
"""


@posix
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_process_killed_while_it_saves(step: str, path: Path) -> None:
    save_weights(path, {"w": np.ones(3)})
    done = subprocess.run([sys.executable, "-c", KILLED, path, step], check=False)
    assert -done.returncode == (signal.SIGXFSZ if step == "write" else signal.SIGKILL)
    assert_same(load_weights(path), {"w": np.ones(3)})
    assert [p for p in path.parent.iterdir() if p.suffix != ".tmp"] == [path]
    save_weights(path, {"w": np.zeros(3)})  # what the dead one left is in nobody's way
    assert_same(load_weights(path), {"w": np.zeros(3)})


SAVING = """
import sys
import numpy as np
from coordconv import save_weights

path, value = sys.argv[1], float(sys.argv[2])
sys.stdin.read()  # until both are there
for _ in range(30):
    save_weights(path, {"w": np.full(5000, value)})
"""


def test_two_processes_that_save_to_one_name(path: Path) -> None:
    """And one that reads: whatever it meets is whole."""
    save_weights(path, {"w": np.full(5000, 0.0)})
    writers = [
        subprocess.Popen([sys.executable, "-c", SAVING, path, value], stdin=subprocess.PIPE)
        for value in ("1", "2")
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    met = set()
    while any([writer.poll() is None for writer in writers]):  # noqa: C419  # poll them all
        array = load_weights(path)["w"]
        assert array.shape == (5000,)
        (value,) = set(array.tolist())
        met.add(value)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert met <= {0.0, 1.0, 2.0}
    assert load_weights(path)["w"][0] in (1.0, 2.0)
    assert list(path.parent.iterdir()) == [path]


# --- paths that are no file ----------------------------------------------------------------------


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "none" / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="cannot write weights: No such file") as caught:
        save_weights(path, WEIGHTS)
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError, match="w.safetensors"):
        load_weights(path)


def test_a_path_that_is_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match="cannot write weights: it is not a regular file"):
        save_weights(path, WEIGHTS)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(IsADirectoryError if os.name == "posix" else OSError, match="folder"):
        load_weights(path)


@posix
def test_a_path_that_is_a_pipe(tmp_path: Path) -> None:
    """It is not replaced, and not waited on."""
    path = tmp_path / "w"
    os.mkfifo(path)
    with pytest.raises(OSError, match="cannot write weights: it is not a regular file") as caught:
        save_weights(path, WEIGHTS)
    assert caught.value.filename == str(path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]
    for loader in LOADERS:
        with pytest.raises(OSError, match="it is not a regular file") as caught:
            loader(path)
        assert caught.value.filename == str(path)


@posix
@pytest.mark.parametrize("there", [True, False])
def test_a_path_that_is_a_link(there: bool, tmp_path: Path) -> None:
    """It stays, and leads to what was written."""
    (tmp_path / "folder").mkdir()
    file, link, twice = tmp_path / "folder" / "file", tmp_path / "link", tmp_path / "twice"
    link.symlink_to(Path("folder") / "file")
    twice.symlink_to(link)
    if there:
        save_weights(file, {"w": np.ones(1)})
    save_weights(twice, WEIGHTS)
    assert (link.readlink(), twice.readlink()) == (Path("folder") / "file", link)
    assert_same(load_weights(file), WEIGHTS)
    assert list(file.parent.iterdir()) == [file]
    link.unlink()
    link.symlink_to(twice)
    with pytest.raises(OSError, match="cannot write weights: .*symbolic links"):
        save_weights(link, WEIGHTS)


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_keeps_its_permissions(mode: int, path: Path) -> None:
    save_weights(path, {"w": np.ones(1)})
    path.chmod(mode)
    save_weights(path, WEIGHTS)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert_same(load_weights(path), WEIGHTS)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "w.safetensors"
    with pytest.raises(NotADirectoryError, match="cannot write weights") as caught:
        save_weights(path, WEIGHTS)
    assert caught.value.filename == str(path)
    with pytest.raises(NotADirectoryError, match="w.safetensors"):
        load_weights(path)


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """A folder that a user without privileges can reach, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, also where the one who runs the tests is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@posix
def test_a_file_that_may_not_be_read(foreign_folder: Path) -> None:
    path = foreign_folder / "w.safetensors"
    save_weights(path, WEIGHTS)
    path.chmod(0)
    with unprivileged(), pytest.raises(PermissionError, match="w.safetensors"):
        load_weights(path)


@posix
@pytest.mark.parametrize("mode", [0, 0o444])
@pytest.mark.parametrize("backend", [n for n in ("flax", "linen") if n in available_backends()])
def test_a_checkpoint_that_may_not_be_read(backend: str, mode: int, foreign_folder: Path) -> None:
    path = foreign_folder / "w"
    convert.save(path, WEIGHTS, NETWORK, format=backend)
    path.chmod(mode)
    with unprivileged(), pytest.raises(PermissionError, match=f"{path}/_METADATA"):
        convert.load(path, NETWORK, format=backend)
    path.chmod(0o755)


@posix
def test_a_folder_that_may_not_be_written(foreign_folder: Path) -> None:
    path = foreign_folder / "w.safetensors"
    save_weights(path, WEIGHTS)
    path.chmod(0o644)
    foreign_folder.chmod(0o555)
    with unprivileged():
        with pytest.raises(PermissionError, match="cannot write weights: Permission denied"):
            save_weights(path, {"w": np.ones(1)})
        assert_same(load_weights(path), WEIGHTS)
    assert list(foreign_folder.iterdir()) == [path]


@posix
def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("w" * 243 + ".safetensors")
    path.touch()  # the file system takes it
    save_weights(path, WEIGHTS)
    assert_same(load_weights(path), WEIGHTS)


# --- code in the place of weights ----------------------------------------------------------------


class Malicious:
    """What a pickle of it does when it is read: make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _bare(path: Path, what: Any) -> None:
    path.write_bytes(pickle.dumps(what))


def _text(path: Path, what: Any) -> None:
    path.write_bytes(pickle.dumps(what, protocol=0))


def _in_a_dict(path: Path, what: Any) -> None:
    path.write_bytes(pickle.dumps({"weight": what}, protocol=2))


def _zipped(path: Path, what: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # as torch.save does
        archive.writestr("archive/data.pkl", pickle.dumps(what))


def _npy(path: Path, what: Any) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([what], object), allow_pickle=True)


def _npz(path: Path, what: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, weight=np.array([what], object))


def _in_metadata(path: Path, what: Any) -> None:
    text = pickle.dumps(what, protocol=0).decode("ascii")
    safetensors.numpy.save_file(WEIGHTS, path, metadata={"coordinates": text})


# Every format's, as far as its framework is installed.
LOADERS = [
    load_weights,
    *(partial(convert.load, format=name) for name in (convert.CANONICAL, *available_backends())),
]
PICKLES = [_bare, _text, _in_a_dict, _zipped, _npy, _npz, _in_metadata]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("write", PICKLES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pt", ".pdparams", ".npz", ".npy"])
def test_a_pickle_is_not_run(
    loader: Callable[[Path], Any], write: Callable[[Path, Any], None], suffix: str, tmp_path: Path
) -> None:
    marker, path = tmp_path / "it ran", tmp_path / f"weights{suffix}"
    write(path, Malicious(marker))
    with pytest.raises(ValueError, match="weights"):
        loader(path)
    assert not marker.exists()


def test_the_pickles_would_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()
