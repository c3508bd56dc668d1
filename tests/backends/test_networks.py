"""Networks in every backend: building, weights in and out, evaluation and training."""

from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, backends, load_weights, networks, save_weights
from coordconv.backends import BACKENDS
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Flatten, Linear, MeanPool, Network, ReLU
from coordconv.parity.bounds import expected

FLAX = ("flax", "linen")


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays_of(backend: str, module: Any, weights: Any) -> Any:
    """The weights of a module that has taken these; a Linen module holds none."""
    taken = module.import_weights(weights)
    return module.export_weights(*([taken] if backend == "linen" else []))


def held(backend: str, network: Network, weights: Any, x: Any, dy: Any = None) -> Any:
    """Hold a network's output, and gradients if asked for, to their bounds; what was found."""
    load = backends.load(backend)
    y, gradients = load.evaluate(load.build(network, weights), weights, x, dy)
    found = {"y": y, **gradients}
    wanted = expected(network, weights, x, dy)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert wanted[name].error(array) <= 1, name
    return found


def one(conv: Conv, *shape: int) -> Network:
    return Network("one", (conv.in_channels, *shape), (conv,))


@pytest.fixture(scope="module")
def small() -> Network:
    """A network of every kind of layer."""
    layers = (
        Conv("conv", 2, 4, ConvGeometry((3, 3), padding=1), Coordinates("xyr")),
        ReLU(),
        Conv("up", 4, 2, ConvGeometry((2, 2), stride=2, transposed=True)),
        Flatten(),
        Linear("linear", 160, 3),
    )
    return Network("small", (2, 4, 5), layers)


class TestBuild:
    @pytest.mark.parametrize("name", networks.NETWORKS)
    def test_weights_come_in_and_out_in_the_canonical_layout(self, backend, name):
        network = networks.get(name)
        weights = networks.initial_weights(name, 3)
        found = arrays_of(backend, networks.build(name, backend, seed=3), weights)
        assert {n: a.shape for n, a in found.items()} == network.weight_shapes()
        assert list(found) == list(weights)
        assert all(np.array_equal(found[key], weights[key]) for key in weights)
        assert found.coordinates == network.coordinates()
        assert found.metadata == {"network": name}

    @pytest.mark.parametrize(("name", "count"), [("plain_cnn", 158913), ("coord_cnn", 160065)])
    def test_the_parameters_are_the_articles(self, backend, name, count):
        module = networks.build(name, backend)
        if backend in FLAX:
            jax = pytest.importorskip("jax")
            x = np.zeros((1, 32, 32, 3), np.float32)
            if backend == "flax":
                from flax import nnx

                tree = nnx.state(module, nnx.Param)
            else:
                tree = jax.eval_shape(module.init, jax.random.key(0), x)
                taken = module.import_weights(networks.initial_weights(name))
                assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, taken)
            counts = [leaf.size for leaf in jax.tree.leaves(tree)]
        else:
            counts = [int(np.prod(p.shape)) for p in module.parameters()]
        assert sum(counts) == count

    def test_the_seed_says_the_weights(self, backend):
        if backend == "linen":
            pytest.skip("a Linen module holds no weights")
        same, again, other = (
            networks.build("coord_cnn", backend, seed=s).export_weights() for s in (1, 1, 2)
        )
        assert all(np.array_equal(same[name], again[name]) for name in same)
        assert not np.array_equal(same["conv4.weight"], other["conv4.weight"])

    def test_weights_travel_through_a_file(self, backend, small, tmp_path):
        path = tmp_path / "net.safetensors"
        load = backends.load(backend)
        start, other = (networks.initial_weights(small, seed) for seed in (1, 2))
        save_weights(path, arrays_of(backend, load.build(small, other), start))
        found = arrays_of(backend, load.build(small, other), load_weights(path))
        assert all(np.array_equal(found[name], start[name]) for name in start)

    def test_all_problems_at_once_and_nothing_changed(self, backend, small):
        load = backends.load(backend)
        weights = networks.initial_weights(small)
        module = load.build(small, weights)
        wrong = {name: 2 * array for name, array in weights.items()}
        del wrong["conv.bias"]
        wrong["linear.weight"] = wrong["linear.weight"].T
        for take in (module.import_weights, lambda mapping: load.build(small, mapping)):
            with pytest.raises(ValueError, match=r"missing: conv.bias, shape \(4,\)") as caught:
                take(wrong)
            assert "wrong shape: linear.weight is (160, 3), want (3, 160)" in str(caught.value)
        if backend != "linen":
            found = module.export_weights()
            assert all(np.array_equal(found[name], weights[name]) for name in weights)

    def test_the_same_coordinates_in_another_order_are_permuted(self, backend):
        other = Coordinates("ryx")
        conv = Conv("conv", 2, 4, ConvGeometry((3, 3)), Coordinates("xyr"))
        there = one(Conv("conv", 2, 4, conv.geometry, other), 4, 5)
        load = backends.load(backend)
        weights = networks.initial_weights(there)
        exported = arrays_of(backend, load.build(there, weights), weights)
        module = load.build(one(conv, 4, 5), networks.initial_weights(one(conv, 4, 5)))
        found = arrays_of(backend, module, exported)["conv.weight"]
        assert np.array_equal(found, weights["conv.weight"][:, [0, 1, 4, 3, 2]])
        exported.coordinates["conv"] = Coordinates("xyr", r_center=0.5)
        with pytest.raises(ValueError, match="other coordinates: conv.weight"):
            module.import_weights(exported)

    @pytest.mark.parametrize("with_coords", [False, True])
    @pytest.mark.parametrize(
        ("backend", "reason", "options"),
        [
            ("torch", "torch convolutions have no input_dilation", {"input_dilation": 2}),
            ("torch", "pad both ends of an axis alike", {"padding": ((1, 0), 0)}),
            ("torch", "take no negative padding", {"padding": -1}),
            ("torch", "with stride have no padding='same'", {"padding": "same", "stride": 2}),
            ("paddle", "have no input_dilation", {"input_dilation": 2}),
            (
                "paddle",
                "have no dilation with padding='SAME'",
                {"padding": "same", "dilation": 2},
            ),
            (
                "paddle",
                "have no padding_mode with padding='SAME'",
                {"padding": "same", "padding_mode": "reflect"},
            ),
            (
                "paddle",
                "have no padding_mode with unequal padding",
                {"padding": (1, 2), "padding_mode": "circular"},
            ),
            ("paddle", "have no negative padding", {"padding": ((0, -1), (0, 0))}),
            ("paddle", "have no negative padding", {"padding": -1, "transposed": True}),
            (
                "paddle",
                "have no output_padding of the stride or more",
                {"transposed": True, "output_padding": 1, "dilation": 2},
            ),
            *(
                (backend, reason, options)
                for backend in FLAX
                for reason, options in (
                    ("have no padding_mode='reflect'", {"padding": 2, "padding_mode": "reflect"}),
                    (
                        "have no padding_mode='circular'",
                        {"padding": "same", "padding_mode": "circular", "stride": 2},
                    ),
                    (
                        "have no padding_mode='replicate'",
                        {"padding": 1, "padding_mode": "replicate"},
                    ),
                    (
                        "have no padding='SAME' with input_dilation",
                        {"padding": "same", "stride": 2, "input_dilation": 2},
                    ),
                    ("Flax transposed convolutions have no groups", {"transposed": True}),
                    (
                        "XLA's convolutions are wrong",
                        {"transposed": True, "padding": ((3, 0), 0), "groups": 1},
                    ),
                    ("XLA's convolutions are wrong", {"padding": ((-1, 1), 0)}),
                    ("XLA's convolutions are wrong", {"padding": ((-1, 1), 0), "stride": 2}),
                )
            ),
        ],
    )
    def test_an_option_that_the_framework_lacks(self, backend, reason, options, with_coords):
        if BACKENDS[backend].missing:
            pytest.skip(f"{backend} is not installed")
        geometry = ConvGeometry((3, 3), **{"groups": 2, **options})
        network = one(Conv("conv", 2, 4, geometry, Coordinates() if with_coords else None), 6, 7)
        with pytest.raises(NotImplementedError, match=reason):
            networks.build(network, backend)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_types_that_paddle_lacks_on_a_cpu(self, small, dtype):
        paddle = pytest.importorskip("paddle")
        if paddle.device.get_device() != "cpu":
            pytest.skip("there are such types elsewhere")
        with pytest.raises(NotImplementedError, match="no 16-bit types on a CPU"):
            backends.load("paddle").build(small, networks.initial_weights(small), dtype)


# Convolutions of every kind, and which backends lack them.
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[str, ...]]] = {
    "strides, groups": ((3, 2), {"stride": (1, 2), "padding": (1, 2), "groups": 2}, ()),
    "three axes": ((2, 3, 2), {"padding": 1, "groups": 2}, ()),
    "one axis": ((4,), {"padding": ((1, 2),), "stride": 2}, ("torch",)),
    "unequal": ((3, 2), {"padding": ((1, 2), (0, 3)), "stride": (1, 2)}, ("torch",)),
    "cut": ((3, 2), {"padding": ((2, -1), (0, 3)), "input_dilation": 2}, ("torch", "paddle")),
    # XLA reads beyond the input, unless it is spread (jax 0.10.2, CPU): no backend is left.
    "cut at its start": (
        (3, 2),
        {"padding": ((-1, 1), 0), "stride": 2},
        ("torch", "paddle", *FLAX),
    ),
    "cut at its start, spread": (
        (3, 2),
        {"padding": ((-1, 1), 0), "stride": 2, "input_dilation": (2, 1)},
        ("torch", "paddle"),
    ),
    "same": ((3, 2), {"padding": "same"}, ()),
    "same, strides": ((3, 3), {"padding": "same", "stride": 2, "groups": 2}, ("torch",)),
    "same, spread": ((3, 2), {"padding": "same", "input_dilation": 2}, ("torch", "paddle")),
    "same, reflect": ((3, 2), {"padding": "same", "padding_mode": "reflect"}, ("paddle",)),
    "circular": (
        (3, 3),
        {"padding": ((2, 2), (1, 1)), "dilation": (2, 1), "padding_mode": "circular", "stride": 2},
        ("paddle",),
    ),
    "none, replicate": ((3, 2), {"padding": 0, "padding_mode": "replicate"}, ()),
    "transposed": ((3, 2), {"transposed": True}, ()),
    "transposed, strides": (
        (4,),
        {"padding": 1, "stride": 2, "transposed": True, "output_padding": 1},
        (),
    ),
    "transposed, dilation": (
        (3, 2),
        {"transposed": True, "dilation": (2, 1), "padding": (1, 0)},
        (),
    ),
    "transposed, unequal": (
        (3, 2),
        {"transposed": True, "stride": 2, "padding": ((3, 0), 0)},
        ("torch",),
    ),
    "transposed, groups": (
        (3, 2),
        {"stride": (2, 3), "transposed": True, "output_padding": (1, 2), "groups": 2},
        FLAX,
    ),
}


class TestEvaluate:
    @pytest.mark.parametrize("name", networks.NETWORKS)
    def test_output_and_gradients_are_within_their_bounds(self, backend, name):
        network = networks.get(name)
        *_, (_, _, output) = network.shapes()
        weights, dy = networks.initial_weights(network, 4), normal(2, *output, seed=1)
        x = normal(2, *network.input_shape)
        found = held(backend, network, weights, x, dy)
        assert found.keys() == {"y", "x", *weights}
        alone = held(backend, network, weights, x)
        assert alone.keys() == {"y"}
        # XLA compiles the two apart.
        assert backend in FLAX or np.array_equal(alone["y"], found["y"])

    @pytest.mark.parametrize(("with_coords", "bias"), [(True, True), (False, False)])
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_described_convolutions(self, backend, name, with_coords, bias):
        kernel, options, lacking = CONVOLUTIONS[name]
        geometry = ConvGeometry(kernel, **options)
        coords = Coordinates("zyx"[-geometry.rank :] + "r") if with_coords else None
        conv = Conv("conv", 4, 6, geometry, coords, bias)
        network = one(conv, *(5, 7, 4)[: geometry.rank])
        weights = networks.initial_weights(network)
        if backend in lacking:
            with pytest.raises(NotImplementedError):
                backends.load(backend).build(network, weights)
            return
        x = normal(2, *network.input_shape)
        dy = normal(2, *conv.output_shape(network.input_shape), seed=1)
        found = held(backend, network, weights, x, dy)
        assert ("conv.bias" in found) == bias

    def test_compiled_or_not(self, backend, small):
        load = backends.load(backend)
        weights, x, dy = networks.initial_weights(small), normal(2, 2, 4, 5), normal(2, 3, seed=1)
        module = load.build(small, weights)
        wanted = expected(small, weights, x, dy)
        for compiled in (False, True):
            y, gradients = load.evaluate(module, weights, x, dy, compiled=compiled)
            assert all(wanted[n].error(a) <= 1 for n, a in {"y": y, **gradients}.items())

    def test_the_weights_given_count(self, backend, small):
        """In a module that was built with others, and was compiled with others."""
        load = backends.load(backend)
        module, x = load.build(small, networks.initial_weights(small)), normal(2, 2, 4, 5)
        for seed in (1, 2):
            weights = networks.initial_weights(small, seed)
            y, _ = load.evaluate(module, weights, x)
            assert expected(small, weights, x, None)["y"].error(y) <= 1

    def test_other_types(self, backend, small):
        load, x, dy = backends.load(backend), normal(2, 2, 4, 5), normal(2, 3, seed=1)
        weights = networks.initial_weights(small)
        wanted = expected(small, weights, x, dy)
        module = load.build(small, weights, "float64")
        y, gradients = load.evaluate(module, weights, x, dy)
        for name, array in {"y": y, **gradients}.items():
            assert array.dtype == np.float64
            assert np.allclose(array, wanted[name].value, rtol=1e-12, atol=1e-12)
        if backend == "paddle":
            return  # it has no types of 16 bits on a CPU
        y, gradients = load.evaluate(load.build(small, weights, "bfloat16"), weights, x, dy)
        assert {a.dtype for a in (y, *gradients.values())} == {np.dtype(np.float32)}
        # The lower half of a float32 that is a bfloat16 is empty.
        assert not (y.view(np.uint32) & 0xFFFF).any()

    def test_a_network_without_weights(self, backend):
        x, dy = normal(2, 3, 4), normal(2, 12, seed=1)
        found = held(backend, Network("none", (3, 4), (ReLU(), Flatten())), {}, x, dy)
        assert found.keys() == {"y", "x"}

    @pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
    def test_the_mean_over_all_positions(self, backend, shape):
        """Between layers with weights, so that its output and its gradient go through others."""
        coords = Coordinates("xyz"[: len(shape)])
        conv = Conv("conv", 2, 3, ConvGeometry((1,) * len(shape)), coords)
        layers = (conv, ReLU(), MeanPool(), Linear("linear", 3, 2))
        network = Network("mean", (2, *shape), layers)
        weights, x = networks.initial_weights(network, 1), normal(4, 2, *shape)
        found = held(backend, network, weights, x, normal(4, 2, seed=1))
        assert found["y"].shape == (4, 2)

    def test_the_mean_alone_is_numpys(self, backend):
        x, dy = normal(2, 3, 4, 5), normal(2, 3, seed=1)
        found = held(backend, Network("mean", (3, 4, 5), (MeanPool(),)), {}, x, dy)
        np.testing.assert_allclose(found["y"], x.mean((2, 3)), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found["x"], np.tile(dy[..., None, None] / 20, (4, 5)), rtol=1e-5)

    def test_linen_has_the_bits_of_nnx(self, small):
        pytest.importorskip("flax")
        weights, x, dy = networks.initial_weights(small), normal(2, 2, 4, 5), normal(2, 3, seed=1)
        found = []
        for load in map(backends.load, FLAX):
            y, gradients = load.evaluate(load.build(small, weights), weights, x, dy)
            found.append({"y": y, **gradients})
        assert list(found[0]) == list(found[1])
        assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


class TestTrainer:
    def test_adam_on_the_mean_cross_entropy(self, backend):
        """Adam in float64, with the published defaults, on a network whose gradient is known."""
        network = Network("one", (4,), (Linear("fc", 4, 3),))
        initial, load = networks.initial_weights(network), backends.load(backend)
        step, export = load.trainer(load.build(network, initial), initial)
        x, labels, rate = normal(5, 4), np.array([0, 1, 2, 0, 1]), 0.125
        w = {name.removeprefix("fc."): array.astype(np.float64) for name, array in initial.items()}
        m, v = ({name: np.zeros(array.shape) for name, array in w.items()} for _ in range(2))
        for t in range(1, 4):
            p = np.exp(x @ w["weight"].T + w["bias"])
            p /= p.sum(axis=1, keepdims=True)
            loss = -np.log(p[range(5), labels]).mean()
            assert step(x, labels, rate) == pytest.approx(loss, rel=1e-5)
            dy = (p - np.eye(3)[labels]) / 5
            for name, g in {"weight": dy.T @ x, "bias": dy.sum(axis=0)}.items():
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                rms = np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8
                w[name] -= rate * m[name] / (1 - 0.9**t) / rms
        for name, array in export().items():
            np.testing.assert_allclose(array, w[name.removeprefix("fc.")], atol=1e-5)

    def test_gradient_descent_on_the_mean_squared_error(self, backend):
        network = Network("one", (4,), (Linear("fc", 4, 3),))
        initial, load = networks.initial_weights(network), backends.load(backend)
        step, export = load.trainer(load.build(network, initial), initial, "sgd")
        x, target = normal(5, 4), normal(5, 3, seed=1)
        w, b = (initial[f"fc.{name}"].astype(np.float64) for name in ("weight", "bias"))
        for rate in (0.5, 0.25):  # each step has its own
            off = x @ w.T + b - target
            assert step(x, target, rate) == pytest.approx((off**2).mean(), rel=1e-5)
            dy = 2 * off / off.size
            w, b = w - rate * dy.T @ x, b - rate * dy.sum(axis=0)
        found = export()
        np.testing.assert_allclose(found["fc.weight"], w, atol=1e-6)
        np.testing.assert_allclose(found["fc.bias"], b, atol=1e-6)

    def test_every_weight_is_trained_and_the_loss_falls(self, backend, small):
        load, weights = backends.load(backend), networks.initial_weights(small)
        module = load.build(small, networks.initial_weights(small, 9))
        step, export = load.trainer(module, weights)
        start = export()
        assert all(np.array_equal(start[name], weights[name]) for name in weights)
        x, labels = normal(6, 2, 4, 5), np.arange(6) % 3
        logits = expected(small, weights, x, None)["y"].value
        of_labels = logits[range(6), labels]
        losses = [step(x, labels, 0.01) for _ in range(10)]
        assert isinstance(losses[0], float)
        assert losses[0] == pytest.approx((np.log(np.exp(logits).sum(axis=1)) - of_labels).mean())
        assert losses == sorted(losses, reverse=True)
        trained = export()
        assert list(trained) == list(weights)
        assert trained.coordinates == small.coordinates()
        coordinates = trained["conv.weight"][:, 2:] - weights["conv.weight"][:, 2:]
        assert (coordinates != 0).all()
        assert all(not np.array_equal(trained[name], weights[name]) for name in weights)

    def test_another_optimizer(self, backend, small):
        load, weights = backends.load(backend), networks.initial_weights(small)
        with pytest.raises(ValueError, match=r"optimizer must be one of .*adam.*sgd.*, got 'lion'"):
            load.trainer(load.build(small, weights), weights, "lion")

    def test_linen_trains_as_nnx_does(self, small):
        pytest.importorskip("flax")
        weights, x, labels = networks.initial_weights(small), normal(6, 2, 4, 5), np.arange(6) % 3
        found = []
        for load in map(backends.load, FLAX):
            step, export = load.trainer(load.build(small, weights), weights)
            found.append(([step(x, labels, 0.01) for _ in range(3)], export()))
        (losses, trained), (same, there) = found
        assert losses == same
        assert all(np.array_equal(trained[name], there[name]) for name in trained)
