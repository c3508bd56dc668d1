"""The files that the users of a framework save, as each backend reads and writes them."""

from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, backends, networks
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Flatten, Linear, Network

NETWORK = Network(
    "all",
    (2, 3, 4),
    (
        Conv("conv", 2, 4, ConvGeometry((3, 2), padding=1), Coordinates("xyr"), bias=False),
        Conv("up", 4, 2, ConvGeometry((2, 3), transposed=True), Coordinates("yx")),
        Flatten("flatten"),
        Linear("linear", 84, 3),
    ),
)
X = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)


def loaded(backend: str, path: str) -> Any:
    """A network of ours with what the framework's own reader found in a file."""
    load = backends.load(backend)
    module = load.build(NETWORK, networks.initial_weights(NETWORK, 9))
    if backend == "torch":
        import torch

        module.load_state_dict(torch.load(path, weights_only=True))
        return module.export_weights()
    if backend == "paddle":
        import paddle

        missing, unexpected = module.set_state_dict(paddle.load(path))
        assert not missing
        assert not unexpected
        return module.export_weights()
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(path)
    if backend == "linen":
        return module.export_weights(tree)
    from flax import nnx

    nnx.update(module, tree)
    return module.export_weights()


def test_what_is_written_is_what_the_framework_reads(backend, tmp_path):
    path = str(tmp_path / "model")
    weights, load = networks.initial_weights(NETWORK, 1), backends.load(backend)
    load.write_state(path, NETWORK, weights)
    found = loaded(backend, path)
    assert all(np.array_equal(found[name], weights[name]) for name in weights)
    if backend == "paddle":  # it writes a pickle, as paddle.save does, and reads none
        import paddle

        paddle.save(paddle.load(path), path, safetensors=True)
    state = load.read_state(path)
    assert {n: a.dtype for n, a in state.items()} == dict.fromkeys(state, np.dtype("f4"))
    again = load.from_state(NETWORK, state)
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_what_is_not_the_networks_stays_for_the_caller_to_refuse(backend):
    strange = {"other.weight": np.ones((2, 3)), "conv.count": np.arange(3)}
    found = backends.load(backend).from_state(NETWORK, strange)
    assert found.keys() == strange.keys()
    assert all(np.array_equal(found[name], strange[name]) for name in strange)


def test_errors_name_the_file(backend, tmp_path):
    load, path = backends.load(backend), str(tmp_path / "model")
    with pytest.raises(OSError, match="model"):
        load.read_state(path)
    load.write_state(path, NETWORK, networks.initial_weights(NETWORK))
    if backend in ("flax", "linen"):
        (tmp_path / "model" / "_METADATA").write_text("{")
        with pytest.raises(ValueError, match="model is a damaged Orbax checkpoint"):
            load.read_state(path)
        with pytest.raises(ValueError, match=r"is not an Orbax .* in it: name model"):
            load.read_state(str(tmp_path))
        with pytest.raises(OSError, match="cannot write weights: it exists; remove it"):
            load.write_state(path, NETWORK, networks.initial_weights(NETWORK))
    else:
        content = (tmp_path / "model").read_bytes()
        (tmp_path / "model").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="model is (not a safetensors file, or is )?damaged"):
            load.read_state(path)
    with pytest.raises(OSError, match="cannot write weights"):
        load.write_state(
            str(tmp_path / "none" / "model"), NETWORK, networks.initial_weights(NETWORK)
        )


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    def read(self, torch, tmp_path, content):
        path = str(tmp_path / "model.pt")
        torch.save(content, path)
        return backends.load("torch").read_state(path)

    def test_bfloat16_is_read_as_float32(self, torch, tmp_path):
        found = self.read(torch, tmp_path, {"w": torch.ones(2, dtype=torch.bfloat16) / 3})
        assert found["w"].dtype == np.float32

    @pytest.mark.parametrize("make", ["to_sparse", "expand", "float8"])
    def test_tensors_that_numpy_lacks(self, torch, tmp_path, make):
        ones = torch.ones(1)
        tensor = {
            "to_sparse": ones.to_sparse(),
            "expand": ones.expand(5),
            "float8": ones.to(torch.float8_e4m3fn),
        }[make]
        with pytest.raises(ValueError, match="holds what NumPy arrays by name cannot: w: "):
            self.read(torch, tmp_path, {"w": tensor})

    def test_a_state_inside_of_something_else(self, torch, tmp_path):
        with pytest.raises(ValueError, match=r"no weights by name, but mappings, 'net': write"):
            self.read(torch, tmp_path, {"net": {"w": torch.ones(1)}, "epoch": 3})
        with pytest.raises(ValueError, match="holds no weights by name: write it by"):
            self.read(torch, tmp_path, [torch.ones(1)])

    def test_code_is_not_run(self, torch, tmp_path):
        with pytest.raises(ValueError, match="may be code: torch.load.* refuses it"):
            self.read(torch, tmp_path, {"w": print})


def test_paddles_pickles_are_not_run(tmp_path):
    paddle = pytest.importorskip("paddle")
    path = str(tmp_path / "model.pdparams")
    paddle.save({"w": paddle.ones([2])}, path, safetensors=False)
    with pytest.raises(ValueError, match=r"(?s)pickles, which may hold code.*safe\.pdparams"):
        backends.load("paddle").read_state(path)
