"""Weights from one framework's file to another's, and the description of a file."""

import contextlib
import errno
import itertools
import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordconv import available_backends, backends, load_weights, networks, save_weights
from coordconv.convert import CANONICAL, FORMATS, convert, describe, format_of, load, save
from coordconv.coordinates import Coordinates
from coordconv.weights import Weights, join_kernel, split_kernel

INSTALLED = (CANONICAL, *available_backends())
SUFFIX = {name: (b.suffixes or ("",))[0] for name, b in backends.BACKENDS.items()}
SUFFIX[CANONICAL] = ".safetensors"
FOLDERS = ("flax", "linen")


def initial(network: str | networks.Network, seed: int = 0) -> Weights:
    network = networks.get(network)
    return Weights.of(network, networks.initial_weights(network, seed))


def params_of(network: str, weights: Any) -> Any:
    """As Flax has them."""
    from coordconv.backends.jax.files import to_params

    return to_params(networks.get(network), weights)


def assert_same(found: Any, expected: Any) -> None:
    assert dict(found).keys() == dict(expected).keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def named(folder: Path, format: str, stem: str = "weights") -> Path:
    return folder / f"{stem}-{format}{SUFFIX[format]}"


def orbax(path: Path, tree: Any, kind: str = "StandardCheckpointer") -> None:
    import orbax.checkpoint as ocp

    with getattr(ocp, kind)() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def restored(path: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)


def save_as_users_do(backend: str, path: Path, network: Any, weights: Any) -> None:
    """With nothing of ours but the module."""
    module = backends.load(backend).build(networks.get(network), weights)
    if backend == "torch":
        import torch

        torch.save(module.state_dict(), path)
    elif backend == "paddle":
        import paddle

        paddle.save(module.state_dict(), str(path), safetensors=True)
    elif backend == "flax":
        from flax import nnx

        orbax(path, nnx.to_pure_dict(nnx.state(module)))
    else:
        orbax(path, module.import_weights(weights))


def load_as_users_do(backend: str, path: Path, network: Any) -> Any:
    """Into a module of other weights; what it has afterwards."""
    other = initial(network, seed=9)
    module = backends.load(backend).build(networks.get(network), other)
    if backend == "torch":
        import torch

        module.load_state_dict(torch.load(path))
    elif backend == "paddle":
        import paddle

        assert module.set_state_dict(paddle.load(str(path))) == ([], [])
    elif backend == "flax":
        from flax import nnx

        state = nnx.state(module)
        nnx.replace_by_pure_dict(state, restored(path, nnx.to_pure_dict(state)))
        nnx.update(module, state)
    else:
        return module.export_weights(restored(path, module.import_weights(other)))
    return module.export_weights()


def without_pickle(path: Path) -> Path:
    """The file, or for a pickle of Paddle's one made as the error says that it can be made."""
    try:
        describe(path)
    except ValueError as error:
        (lines,) = re.findall(r"  import paddle\n  paddle\.save\(.*\)", str(error))
        with contextlib.chdir(path.parent):
            exec("\n".join(line.strip() for line in lines.splitlines()), {})
        return path.parent / "safe.pdparams"
    return path


# --- what frameworks' users save -----------------------------------------------------------------


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_what_users_save_is_read_and_its_network_is_found(
    backend: str, network: str, tmp_path: Path
) -> None:
    path, weights = named(tmp_path, backend), initial(network, seed=3)
    save_as_users_do(backend, path, network, weights)
    found = load(path)
    assert_same(found, weights)
    assert found.coordinates == weights.coordinates
    assert found.metadata == {"network": network}


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_what_is_written_is_what_users_load(backend: str, network: str, tmp_path: Path) -> None:
    path, weights = named(tmp_path, backend), initial(network, seed=3)
    save(path, weights, format=backend)
    assert_same(load_as_users_do(backend, path, network), weights)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(INSTALLED, INSTALLED)))
def test_from_any_format_to_any_other_and_back(source: str, target: str, tmp_path: Path) -> None:
    weights = initial("coord_cnn", seed=4)
    first, second = named(tmp_path, source), named(tmp_path, target, "second")
    save(first, weights, format=source)
    convert(without_pickle(first), second, target_format=target)
    last = tmp_path / "last.safetensors"
    convert(without_pickle(second), last)
    found = load_weights(last)
    assert_same(found, weights)
    assert found.coordinates == weights.coordinates
    assert found.metadata == {"network": "coord_cnn"}


@pytest.mark.parametrize("kind", ["StandardCheckpointer", "PyTreeCheckpointer"])
@pytest.mark.parametrize("reader", FOLDERS)
def test_every_form_of_a_flax_checkpoint(reader: str, kind: str, tmp_path: Path) -> None:
    if backends.BACKENDS[reader].missing:
        pytest.skip(f"{reader} is not installed")
    from flax import nnx

    weights = initial("coord_classifier", seed=5)
    module = backends.load("flax").build(networks.get("coord_classifier"), weights)
    pure = nnx.to_pure_dict(nnx.state(module))
    moments = {"mu": pure, "nu": None}
    for name, tree in {
        "pure": pure,
        "state": nnx.state(module),
        "variables": {"params": pure},
        "train state": {"params": pure, "step": 3, "opt_state": [moments, ()]},
    }.items():
        orbax(tmp_path / name, tree, kind)
        found = load(tmp_path / name, format=None if reader == "flax" else reader)
        assert_same(found, weights)


def save_unchecked(format: str, path: Path, weights: dict[str, Any]) -> None:
    """What ``save`` would refuse, as the framework would write it."""
    if format == CANONICAL:
        save_weights(path, weights)
    elif format == "torch":
        import torch

        torch.save({name: torch.tensor(array) for name, array in weights.items()}, path)
    elif format == "paddle":
        swapped = {n: a.T if n.startswith("linear") else a for n, a in weights.items()}
        save_weights(path, swapped)
    else:
        tree: dict[str, dict[str, Any]] = {}
        for name, array in weights.items():
            layer, _, own = name.partition(".")
            own, axes = own.replace("weight", "kernel"), (*range(2, array.ndim), 1, 0)
            tree.setdefault(layer, {})[own] = array.transpose(axes) if array.ndim > 1 else array
        orbax(path, tree if format == "flax" else {"params": tree}, "PyTreeCheckpointer")


@pytest.mark.parametrize("position", ["last", "first"])
@pytest.mark.parametrize(
    ("format", "prefix"),
    [
        (f, p)
        for f in INSTALLED
        for p in ("conv4.", "conv4.conv.")
        if f not in FOLDERS or p == "conv4."
    ],
)
def test_another_implementations_kernel(
    format: str, prefix: str, position: Any, tmp_path: Path
) -> None:
    weights = initial("coord_cnn", seed=6)
    state = dict(weights)
    parts = split_kernel(state.pop("conv4.weight"), "xy")
    state[f"{prefix}weight"] = join_kernel(*parts, position=position)
    state[f"{prefix}bias"] = state.pop("conv4.bias")
    path, target = named(tmp_path, format), tmp_path / "target.safetensors"
    save_unchecked(format, path, state)
    assert_same(load(path, format=format, position=position), weights)
    assert_same(convert(path, target, source_format=format, position=position), weights)
    assert_same(load(target), weights)  # which has the coordinates last


@pytest.mark.parametrize("format", INSTALLED)
def test_a_plain_networks_weights_in_a_network_with_coordinates(
    format: str, tmp_path: Path
) -> None:
    """Which they are taken for when it is named alone: the coordinates' part is zero."""
    weights, path = initial("plain_cnn", seed=6), named(tmp_path, format)
    save_unchecked(format, path, dict(weights))
    found = load(path, format=format)
    assert found.metadata == {"network": "plain_cnn"}
    assert_same(found, weights)
    filled = load(path, "coord_cnn", format=format)
    assert filled.metadata == {"network": "coord_cnn"}
    features, coordinates = split_kernel(filled.pop("conv4.weight"), "xy")
    assert not coordinates.any()
    np.testing.assert_array_equal(features, weights.pop("conv4.weight"))
    assert_same(filled, weights)


@pytest.mark.parametrize("format", INSTALLED)
def test_a_position_that_is_neither_word(format: str, tmp_path: Path) -> None:
    """It is told before anything is read."""
    path, target = named(tmp_path, format), tmp_path / "target.safetensors"
    for call in (
        lambda: load(path, position="middle"),  # type: ignore[arg-type]
        lambda: convert(path, target, position="middle"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"position must be one of \('last', 'first'\), got"):
            call()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_type_is_kept(backend: str, dtype: Any, tmp_path: Path) -> None:
    weights = initial("plain_cnn")
    weights.update({name: array.astype(dtype) for name, array in weights.items()})
    path = named(tmp_path, backend)
    save(path, weights, format=backend)
    assert_same(load(without_pickle(path)), weights)


def test_bfloat16_is_read_as_float32(backend: str, tmp_path: Path) -> None:
    path, weights = named(tmp_path, backend), initial("plain_cnn")
    if backend == "paddle":
        import paddle

        swapped = {n: a.T if n.startswith("linear") else a for n, a in weights.items()}
        halves = {n: paddle.to_tensor(a).astype("bfloat16") for n, a in swapped.items()}
        paddle.save(halves, str(path), safetensors=True)
    elif backend == "torch":
        import torch

        module = backends.load(backend).build(networks.get("plain_cnn"), weights)
        torch.save(module.to(torch.bfloat16).state_dict(), path)
    else:
        import jax

        params = params_of("plain_cnn", weights)
        orbax(path, jax.tree.map(lambda a: jax.numpy.asarray(a, "bfloat16"), params))
    found = load(path)
    for name, array in weights.items():
        assert found[name].dtype == np.float32
        assert np.allclose(found[name], array, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("backend", [name for name in FOLDERS if name in INSTALLED])
def test_what_jax_has_in_8_bits_is_not_taken_for_weights(
    backend: str, dtype: str, tmp_path: Path
) -> None:
    """Quantized, that is, with a scale elsewhere."""
    import jax

    path, weights = named(tmp_path, backend), initial("plain_cnn")
    params = params_of("plain_cnn", weights)
    params["conv1"]["kernel"] = jax.numpy.asarray(params["conv1"]["kernel"], dtype)
    orbax(path, params)
    for reader in (load, describe):
        with pytest.raises(ValueError, match="not floating-point of 16 bits") as caught:
            reader(path, format=backend)
        assert str(path) in str(caught.value)
        assert f"conv1.kernel is {dtype}" in str(caught.value)


@pytest.mark.parametrize("backend", [name for name in FOLDERS if name in INSTALLED])
def test_text_beside_the_weights_of_a_checkpoint(backend: str, tmp_path: Path) -> None:
    path, weights = named(tmp_path, backend), initial("plain_cnn")
    params = params_of("plain_cnn", weights)
    orbax(path, {"params": params, "note": "squares"}, "PyTreeCheckpointer")
    assert_same(load(path, format=backend), weights)
    rows = {row.name: row for row in describe(path, format=backend).arrays}
    assert (rows["note"].shape, rows["note"].largest) == ((), None)


@pytest.mark.parametrize("change", ["bytes", "strides", "view"])
@pytest.mark.parametrize("format", INSTALLED)
def test_arrays_of_any_layout_are_written(format: str, change: str, tmp_path: Path) -> None:
    weights = initial("coord_cnn")
    changed = {
        "bytes": lambda a: a.astype(a.dtype.newbyteorder()),
        "strides": lambda a: np.flip(np.flip(a).copy()),
        "view": lambda a: np.repeat(a, 2, axis=0)[::2],
    }[change]
    path = named(tmp_path, format)
    save(path, {name: changed(a) for name, a in weights.items()}, "coord_cnn", format=format)
    assert_same(load(without_pickle(path)), weights)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
@pytest.mark.parametrize("format", INSTALLED)
def test_a_type_that_no_file_has(format: str, tmp_path: Path) -> None:
    weights = initial("plain_cnn")
    weights["conv1.bias"] = weights["conv1.bias"].astype(np.longdouble)
    with pytest.raises(ValueError, match="float16, float32, float64, got 'conv1.bias': float"):
        save(named(tmp_path, format), weights, format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", INSTALLED)
def test_paths_of_bytes(format: str, tmp_path: Path) -> None:
    weights = initial("plain_cnn")
    path, copy = os.fsencode(named(tmp_path, format)), os.fsencode(tmp_path / "copy.safetensors")
    save(path, weights, format=format)
    if format == "paddle":
        path = os.fsencode(without_pickle(named(tmp_path, format)))
    convert(path, copy)
    assert_same(load(copy), weights)
    assert describe(path).parameters == describe(copy).parameters
    with pytest.raises(ValueError, match="are the same file"):
        convert(copy, tmp_path / "copy.safetensors")


def test_metadata_goes_from_canonical_to_canonical(tmp_path: Path) -> None:
    """And so do Coordinates: another order is put in the network's."""
    yx = networks.get("coord_cnn").with_coordinates("yx")
    weights = initial(yx)
    save_weights(tmp_path / "a.safetensors", weights, {"trained_on": "squares"})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_weights(tmp_path / "b.safetensors")
    assert found.metadata == {"network": "coord_cnn", "trained_on": "squares"}
    assert found.coordinates == {"conv4": Coordinates("xy")}
    flipped = weights["conv4.weight"][:, [*range(64), 65, 64]]
    np.testing.assert_array_equal(found["conv4.weight"], flipped)


def test_every_networks_export_names_it(backend: str, tmp_path: Path) -> None:
    module = networks.build("coord_cnn", backend)
    exported = (
        module.export_weights(module.import_weights(initial("coord_cnn")))
        if backend == "linen"
        else module.export_weights()
    )
    save_weights(tmp_path / "w.safetensors", exported)
    assert load_weights(tmp_path / "w.safetensors").metadata == {"network": "coord_cnn"}


def test_a_network_of_ones_own(backend: str, tmp_path: Path) -> None:
    network = networks.Network("mine", (1, 2, 2), (networks.Linear("linear", 3, 2),))
    weights = initial(network)
    path = named(tmp_path, backend)
    save(path, weights, network, format=backend)
    assert_same(load(without_pickle(path), network), weights)


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("w.safetensors", "safetensors"),
        ("w.pt", "torch"),
        ("w.PTH", "torch"),
        ("w.pdparams", "paddle"),
        ("w.orbax", "flax"),
        ("w.orbax/", "flax"),
        ("w/", "flax"),
        (".", "flax"),
        (Path("w.pt"), "torch"),
    ],
)
def test_the_suffix_says_the_format(path: Any, format: str) -> None:
    assert format_of(path) == format
    assert format_of(path, "linen") == "linen"


@pytest.mark.parametrize("path", ["w", "w.bin", "w.pt.bak"])
def test_an_unknown_suffix(path: str) -> None:
    with pytest.raises(ValueError, match=f"the suffix of {path} does not say its format"):
        format_of(path)


def test_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="format must be one of safetensors, .*, got 'keras'"):
        format_of("w.pt", "keras")


@pytest.mark.parametrize("format", [f for f in FORMATS if f != CANONICAL])
def test_a_missing_framework(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "w.safetensors"
    save_weights(source, initial("plain_cnn"))
    missing = backends.BackendInfo(format, ("no_such_package",), (), ("extra>=1",), (".missing",))
    monkeypatch.setitem(backends.BACKENDS, format, missing)
    for call in (
        lambda: load(tmp_path / "w.missing"),
        lambda: describe(tmp_path / "w.missing"),
        lambda: convert(source, tmp_path / "w.missing"),
    ):
        with pytest.raises(ImportError, match=r"needs no_such_package: pip install 'extra>=1'"):
            call()
    assert list(tmp_path.iterdir()) == [source]


# --- what goes wrong -----------------------------------------------------------------------------

MISFITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing: conv4.weight, shape (64, 66, 3, 3)": lambda w: w.pop("conv4.weight"),
    "wrong shape: conv4.weight is (64, 65, 3, 3), want (64, 66, 3, 3): 65 input channels, where "
    "features and coordinates have 66, and features alone 64": lambda w: w.update(
        {"conv4.weight": np.ones((64, 65, 3, 3))}
    ),
    "missing: linear2.bias, shape (1,)": lambda w: w.pop("linear2.bias"),
    "unexpected: conv9.bias, shape (1,)": lambda w: w.update({"conv9.bias": np.ones(1)}),
    "wrong shape: conv1.weight is (32, 3, 5, 5)": lambda w: w.update(
        {"conv1.weight": np.ones((32, 3, 5, 5))}
    ),
    "not floating-point: conv1.bias is int64": lambda w: w.update(
        {"conv1.bias": np.ones(32, np.int64)}
    ),
}


@pytest.mark.parametrize("problem", MISFITS)
@pytest.mark.parametrize("format", INSTALLED)
def test_arrays_that_do_not_fit(format: str, problem: str, tmp_path: Path) -> None:
    weights = dict(initial("coord_cnn"))
    path = named(tmp_path, format)
    MISFITS[problem](weights)
    save_unchecked(format, path, weights)
    with pytest.raises(ValueError, match="cannot import weights") as caught:
        load(path, "coord_cnn")
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"they fit none: name the network \(--network\)"):
        load(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "params.", ""])
@pytest.mark.parametrize("format", [f for f in INSTALLED if f not in FOLDERS])
def test_arrays_that_fit_no_network_are_named(format: str, prefix: str, tmp_path: Path) -> None:
    weights = initial("coord_cnn")
    changed = {f"{prefix}{name}": array for name, array in weights.items()}
    changed[f"{prefix}conv9.bias"] = np.ones(1, np.float32)
    path = named(tmp_path, format)
    save_unchecked(format, path, changed)
    with pytest.raises(ValueError, match="they fit none") as caught:
        load(path)
    told = str(caught.value).splitlines()[-1]
    assert told.startswith(f"it holds {len(changed)} arrays: {prefix}conv")
    assert f"{prefix}conv1.bias (32,)" in told
    expected = prefix.removeprefix("params.")
    assert told.partition("; ")[2].startswith(f"all begin with {expected!r}: " if expected else "")


@pytest.mark.parametrize("format", INSTALLED)
def test_another_network(format: str, tmp_path: Path) -> None:
    path = named(tmp_path, format)
    save(path, initial("coord_cnn"), format=format)
    with pytest.raises(ValueError, match=r"wrong shape: conv4.weight is \(64, 66, 3, 3\), want"):
        load(without_pickle(path), "plain_cnn")
    with pytest.raises(ValueError, match="network must be one of plain_cnn, .*, got 'resnet'"):
        load(without_pickle(path), "resnet")


def test_metadata_of_a_network_that_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, initial("coord_cnn"), {"network": "mine"})
    with pytest.raises(ValueError, match="network must be one of .* got 'mine'") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert load(path, "coord_cnn").metadata == {"network": "coord_cnn"}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for format in INSTALLED:
        with pytest.raises(FileNotFoundError, match="weights-"):
            load(named(tmp_path, format), format=format)


@pytest.mark.parametrize("length", [0, 1, 10, 100, -100, -1])
@pytest.mark.parametrize("backend", [name for name in available_backends() if name not in FOLDERS])
def test_a_file_cut_short(backend: str, length: int, tmp_path: Path) -> None:
    path = named(tmp_path, backend)
    save_as_users_do(backend, path, "plain_cnn", initial("plain_cnn"))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damaged") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("backend", [name for name in FOLDERS if name in INSTALLED])
def test_a_damaged_folder(backend: str, tmp_path: Path) -> None:
    """A file of it empty, or gone: told of, or what is read is right all the same."""
    weights = initial("plain_cnn")
    whole = named(tmp_path, backend)
    save(whole, weights, format=backend)
    told = set()
    for file in [file for file in whole.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        for damage in (lambda: file.write_bytes(b""), file.unlink):  # noqa: B023  # called at once
            damage()
            try:
                assert_same(load(whole, format=backend), weights)
            except ValueError as error:
                assert str(whole) in str(error)  # noqa: PT017  # one of two outcomes
                told.add(file.name)
            file.write_bytes(content)
    assert {"_METADATA", "manifest.ocdbt"} <= told
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty is not an Orbax checkpoint.* _METADATA$"):
        load(empty, format=backend)


@pytest.mark.parametrize("backend", [name for name in FOLDERS if name in INSTALLED])
def test_a_folder_of_checkpoints(backend: str, tmp_path: Path) -> None:
    """As an Orbax CheckpointManager leaves it: the error says what to name."""
    import orbax.checkpoint as ocp

    weights = initial("plain_cnn")
    params = params_of("plain_cnn", weights)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave(params))
    for folder, inside in (("run", "7/default"), ("run/7", "default")):
        with pytest.raises(ValueError, match=f"there is one in it: name {inside}$"):
            load(tmp_path / folder, format=backend)
        assert_same(load(tmp_path / folder / inside, format=backend), weights)


def test_the_coordinates_in_a_state_of_torch(tmp_path: Path) -> None:
    """Layers of ours put them in its metadata: in another order they are put in the network's."""
    torch = pytest.importorskip("torch")
    network, path = networks.get("coord_classifier"), tmp_path / "state.pt"
    turned = network.with_coordinates("yx")
    weights = networks.initial_weights(turned, 1)
    state = backends.load("torch").build(turned, weights).state_dict()
    torch.save(state, path)
    assert describe(path).coordinates == {"conv1": Coordinates("yx")}
    assert np.array_equal(load(path, turned)["conv1.weight"], weights["conv1.weight"])
    found = load(path, network)["conv1.weight"]
    assert np.array_equal(found, weights["conv1.weight"][:, [*range(found.shape[1] - 2), -1, -2]])
    with pytest.raises(ValueError, match="conv1.weight was made for .*'yx'.*, want .*'xyr'"):
        load(path, network.with_coordinates("xyr"))
    with pytest.raises(ValueError, match="position must be 'last' for weights that carry their"):
        load(path, network, position="first")
    state._metadata["conv1"]["coords"] = {"channels": 5}
    torch.save(state, path)
    with pytest.raises(ValueError, match="state.pt has damaged coordinates metadata"):
        load(path, network)


def test_files_of_torch_that_hold_no_state(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for what in (torch.ones(2), {"epoch": 3, "model": {"w": torch.ones(2)}}, {1: torch.ones(2)}):
        torch.save(what, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="w.pt holds no weights by name"):
            load(tmp_path / "w.pt")
    torch.save({"epoch": 3, "model": {"w": torch.ones(2)}, "ema": {}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"but mappings, 'model', 'ema': .*w.pt'\)\['model'\]"):
        load(tmp_path / "w.pt")
    for tensor in (torch.eye(2).to_sparse(), torch.ones(1).expand(10**12)):
        torch.save({"v": torch.ones(2), "w": tensor}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="w.pt holds what NumPy arrays by name cannot: w: "):
            load(tmp_path / "w.pt")
    views = dict(zip("vw", torch.ones(2, 2).T, strict=True))  # of one storage, which is none
    torch.save(views, tmp_path / "w.pt")
    assert [row.shape for row in describe(tmp_path / "w.pt").arrays] == [(2,), (2,)]
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")  # the module itself, which is code
    with pytest.raises(ValueError, match="w.pt is damaged, or holds other things than weights"):
        load(tmp_path / "w.pt")


@pytest.mark.parametrize("format", INSTALLED)
def test_what_cannot_be_written(format: str, tmp_path: Path) -> None:
    weights = initial("plain_cnn")
    with pytest.raises(FileNotFoundError, match="cannot write weights: No such file"):
        save(named(tmp_path / "none", format), weights, format=format)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot write weights: Not a directory"):
        save(named(tmp_path / "file", format), weights, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("format", INSTALLED)
def test_what_is_refused_leaves_no_file(format: str, tmp_path: Path) -> None:
    weights = initial("plain_cnn")
    del weights["conv1.bias"]
    with pytest.raises(ValueError, match="missing: conv1.bias"):
        save(named(tmp_path, format), weights, format=format)
    with pytest.raises(ValueError, match="do not say whose they are: name the network, one of"):
        save(named(tmp_path, format), dict(weights), format=format)
    for name in ("resnet", ""):
        with pytest.raises(ValueError, match=f"network must be one of .*, got '{name}'"):
            save(named(tmp_path, format), weights, name, format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", INSTALLED)
def test_whole_or_not_at_all(
    format: str, problem: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Any, target: Any) -> None:
        if not os.path.basename(target).startswith("weights-"):
            return rename(source, target)  # Orbax's own, of what is not yet in place
        raise problem

    path, rename = named(tmp_path, format), os.rename
    if format not in FOLDERS:
        path.write_text("old")
    for step in ("replace", "rename"):
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(problem), match="cannot write weights: No space|^$"):
        save(path, initial("plain_cnn"), format=format)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == ([] if format in FOLDERS else [path])
    if format not in FOLDERS:
        assert path.read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("format", INSTALLED)
def test_a_disk_that_takes_a_part(format: str, tmp_path: Path) -> None:
    import resource

    network = networks.Network("large", (1, 2, 2), (networks.Linear("linear", 512, 512),))
    weights = initial(network)
    save(named(tmp_path, format, "before"), weights, network, format=format)  # what it caches is
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot write weights: .*File too large"):
            save(named(tmp_path, format), weights, network, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name[:6] for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("backend", [name for name in FOLDERS if name in INSTALLED])
def test_a_folder_is_not_replaced(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    for content in ([], ["precious"]):
        for name in content:
            (path / name).write_text("")
        with pytest.raises(FileExistsError, match="cannot write weights: it exists") as caught:
            save(path, initial("plain_cnn"), format=backend)
        assert caught.value.filename == str(path)
        assert [file.name for file in path.iterdir()] == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_converted_into_itself(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(path, initial("plain_cnn"))
    content = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for target in (path, tmp_path / "." / "w.safetensors", tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match="source and target are the same file"):
            convert(path, target)
    assert path.read_bytes() == content


def test_values_that_are_not_finite_are_told_of(backend: str, tmp_path: Path) -> None:
    weights = initial("plain_cnn")
    weights["conv1.bias"][0] = np.nan
    path = named(tmp_path, backend)
    save(path, weights, format=backend)
    path = without_pickle(path)
    with pytest.warns(UserWarning, match=r"holds NaN or infinity in conv1\.bias$") as told:
        assert_same(load(path), weights)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"holds NaN or infinity in conv1\.bias$") as told:
        convert(path, tmp_path / "w.safetensors")
    assert told[0].filename == __file__


# --- code in the place of weights ----------------------------------------------------------------


class Malicious:
    """What a pickle of it does when it is read: make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_among_the_weights_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    marker, path = tmp_path / "it ran", tmp_path / "w.pt"
    for new in (True, False):
        state = {"conv1.weight": torch.ones(2), "more": Malicious(marker)}
        torch.save(state, path, _use_new_zipfile_serialization=new)
        for reader in (load, describe):
            with pytest.raises(ValueError, match="w.pt is damaged, or holds other things"):
                reader(path)
        assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


def test_code_among_the_weights_of_paddle(tmp_path: Path) -> None:
    """A file of ``paddle.save`` is never read by ``paddle.load``, which runs it."""
    paddle = pytest.importorskip("paddle")
    marker, path = tmp_path / "it ran", tmp_path / "w.pdparams"
    path.write_bytes(pickle.dumps({"conv1.weight": np.ones(2), "more": Malicious(marker)}, 4))
    for reader in (load, describe):
        with pytest.raises(ValueError, match="w.pdparams is not a safetensors file"):
            reader(path)
    assert not marker.exists()
    paddle.load(str(path))
    assert marker.exists()  # it would have


@pytest.mark.parametrize("backend", [name for name in FOLDERS if name in INSTALLED])
def test_code_in_the_place_of_any_file_of_a_checkpoint(backend: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "it ran", named(tmp_path, backend)
    weights = initial("plain_cnn")
    save(path, weights, format=backend)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        for protocol in (0, 4):
            file.write_bytes(pickle.dumps(Malicious(marker), protocol))
            with contextlib.suppress(ValueError):
                assert_same(load(path, format=backend), weights)
        file.write_bytes(content)
    assert not marker.exists()


# --- what is in a file ---------------------------------------------------------------------------


def test_a_description(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    arrays = {
        "a": np.array([[1, -2], [np.nan, np.inf]], np.float32),
        "b": np.zeros((0, 3)),
        "c": np.array(7, np.int64),
        "d": np.array([True, False]),
        "e": np.full(2, np.nan, np.float16),
    }
    save_weights(path, Weights(arrays, {"": Coordinates("xr", r_center=0.5)}, {"by": "hand"}))
    found = describe(path)
    assert (found.format, found.parameters) == ("safetensors", 9)
    assert (found.coordinates, found.metadata) == (
        {"": Coordinates("xr", r_center=0.5)},
        {"by": "hand"},
    )
    rows = {row.name: tuple(vars(row).values())[1:] for row in found.arrays}
    assert rows == {
        "a": ((2, 2), "float32", 4, -2.0, 1.0, 1, 1),
        "b": ((0, 3), "float64", 0, None, None, 0, 0),
        "c": ((), "int64", 1, 7.0, 7.0, 0, 0),
        "d": ((2,), "bool", 2, 0.0, 1.0, 0, 0),
        "e": ((2,), "float16", 2, None, None, 2, 0),
    }
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["arrays"][1]["shape"] == [0, 3]


def test_a_description_of_what_users_save(backend: str, tmp_path: Path) -> None:
    """Under their own names, in their own layout."""
    path, weights = named(tmp_path, backend), initial("coord_cnn")
    save_as_users_do(backend, path, "coord_cnn", weights)
    found = describe(path, format=backend)
    shapes = {row.name: row.shape for row in found.arrays}
    expected = {
        "torch": {"linear1.weight": (64, 1024), "conv4.weight": (64, 66, 3, 3)},
        "paddle": {"linear1.weight": (1024, 64), "conv4.weight": (64, 66, 3, 3)},
        "flax": {"linear1.kernel": (1024, 64), "conv4.kernel": (3, 3, 66, 64)},
        "linen": {"params.linear1.kernel": (1024, 64), "params.conv1.bias": (32,)},
    }
    assert expected[backend].items() <= shapes.items()
    assert (found.format, found.parameters) == (backend, 160_065)
