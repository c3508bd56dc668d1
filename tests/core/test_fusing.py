"""``fuse`` without a framework: what follows a layer, what is replaced, and what is reported."""

from types import SimpleNamespace

import numpy as np
import pytest

from coordconv.fusing import (
    FusedLayer,
    FuseReport,
    check_layer,
    checked_size,
    example,
    folded,
    followed_alone,
    followed_once,
    fused_copy,
    latest,
    layers_to_fuse,
    neighbours,
)
from coordconv.layers import CoordLayer


class Fused:
    def __init__(self, *given):
        self.given, self.size = given, given[1]


class Layer(CoordLayer):
    weight, bias, FUSED = "weight", "bias", Fused
    CONVERSION = SimpleNamespace(framework=SimpleNamespace(nn=SimpleNamespace(Identity=object)))

    def __init__(self):  # no base class that convolves
        self.training = False

    def forward(self, x):
        return x


class Norm:
    training = False


class SubNorm(Norm):
    pass


class Sequence(Norm):
    pass


class TestFollowedAlone:
    """Networks as functions on arrays: ``poison`` gives what a layer's other users see."""

    def run(self, network, pairs):
        """The pairs that hold, and how often the network ran."""
        runs = []

        def outputs(poisoned, poison):
            runs.append(dict(poisoned))

            def layer(name, x):
                """What the layer's partner is given, and what everything else is."""
                y = 2.0 * x + 1.0
                return y, poison(y.shape) if name in poisoned else y

            return network(layer)

        return followed_alone(pairs, outputs), runs

    def test_a_chain(self):
        def network(layer):
            y, _ = layer("a", np.arange(3.0))
            z, _ = layer("b", y - 1)
            return [z / 3]

        pairs = {"a": "na", "b": "nb"}
        found, runs = self.run(network, pairs)
        assert found == pairs
        assert runs == [{}, pairs, pairs, pairs]  # not one for each if nothing is seen

    def test_of_several_the_one_that_something_else_sees_is_left_out(self):
        def network(layer):
            y, seen = layer("a", np.arange(3.0))
            z, _ = layer("b", y - 1)
            return [z, seen]

        found, runs = self.run(network, {"a": "na", "b": "nb"})
        assert found == {"b": "nb"}
        assert runs == [{}, {"a": "na", "b": "nb"}, {"a": "na"}, *3 * [{"b": "nb"}]]

    def test_what_is_seen_inside(self):
        for network in (
            lambda layer: [np.where(layer("a", np.arange(3.0))[1] > 0, 1, 0)],
            lambda layer: [np.zeros(1)] * (1 if layer("a", np.ones(1))[1] > 0 else 2),
            # what NaN, which is beyond no bound and is no largest number, does not change
            lambda layer: [layer("a", np.arange(3.0))[1] > 100],
            lambda layer: [layer("a", np.arange(3.0))[1] < -100],
            lambda layer: [np.fmax(layer("a", np.arange(3.0))[1] - 100, 0)],
            lambda layer: [np.argmax(-layer("a", np.arange(3.0))[1])],
            lambda layer: [np.zeros(int(np.isnan(layer("a", np.ones(1))[1]).sum()) + 1)],
        ):
            found, _ = self.run(network, {"a": "na"})
            assert found == {}

    def test_nothing_is_shown_where_nothing_can_be_seen(self):
        for returned in ([], [np.zeros(0)], [np.array([1.0, np.nan])]):
            found, runs = self.run(lambda _, returned=returned: returned, {"a": "na"})
            assert found == {}
            assert runs == [{}]

    def test_a_network_that_draws_shows_nothing(self):
        rng = np.random.default_rng(0)
        found, _ = self.run(lambda _: [rng.normal(size=3)], {"a": "na"})
        assert found == {}

    def test_outputs_of_every_type(self):
        returned = [np.arange(3), np.array(True), np.float32(2.5), np.array(1j)]
        found, _ = self.run(lambda _: returned, {"a": "na"})
        assert found == {"a": "na"}


class TestNeighbours:
    def found(self, *modules, prefix="", more=()):
        inside = [(f"{prefix}.{i}".removeprefix("."), each) for i, each in enumerate(modules)]
        parts = prefix.split(".") if prefix else []
        around = [(".".join(parts[:i]), Sequence()) for i in range(len(parts))]
        named = [*around, (prefix, Sequence()), *inside, *more]
        return followed_once(named, neighbours(named, Sequence), (Norm,))

    def test_what_stands_behind(self):
        assert self.found(Layer(), Norm()) == {"0": "1"}
        assert self.found(Norm(), Layer(), Norm(), Norm(), prefix="a.b") == {"a.b.1": "a.b.2"}
        assert self.found(Layer(), object(), Norm()) == {}
        assert self.found(Norm(), Layer()) == {}

    def test_what_another_module_may_run_in_parts_is_left(self):
        inside = [("a", Sequence()), ("a.0", Layer()), ("a.1", Norm())]
        for around, found in ((Sequence(), {"a.0": "a.1"}), (object(), {})):
            assert neighbours([("", around), *inside], Sequence) == found

    def test_what_is_inside_of_something_is_not_behind(self):
        more = [("0.norm", Norm())]
        assert self.found(Layer(), object(), more=more) == {}

    def test_both_stand_in_one_place_alone(self):
        layer, norm = Layer(), Norm()
        assert self.found(layer, norm, more=[("again", norm)]) == {}
        assert self.found(layer, norm, more=[("again", layer)]) == {}

    def test_one_relu_that_stands_twice_still_stands_between(self):
        relu = object()
        assert self.found(relu, Layer(), relu, Norm()) == {}

    def test_the_very_class(self):
        assert self.found(Layer(), SubNorm()) == {}
        own = type("Own", (Sequence,), {})()  # which may run what is in it in another order
        named = [("", own), ("0", Layer()), ("1", Norm())]
        assert neighbours(named, Sequence) == {}


class TestLayers:
    def test_each_once_by_its_first_name(self):
        one, other = Layer(), Layer()
        named = [("", Norm()), ("a", one), ("b", other), ("c", one)]
        assert list(layers_to_fuse(named, (Norm,)).items()) == [("a", one), ("b", other)]

    def test_what_is_not_ready(self):
        with pytest.raises(ValueError, match="model has no CoordConv to fuse"):
            layers_to_fuse([("", Norm())], (Norm,))
        for late in (Layer(), SubNorm()):
            late.training = True
            with pytest.raises(ValueError, match="evaluation mode, 'late' is not: call model.eval"):
                layers_to_fuse([("0", Layer()), ("late", late)], (Norm,))

    def test_a_forward_of_its_own(self):
        with pytest.raises(ValueError, match="Layer has a forward of its own.*inside a module"):
            check_layer(Layer())

    def test_in_training(self):
        layer = Layer()
        layer.training = True
        with pytest.raises(ValueError, match="in evaluation mode to be fused: call eval"):
            check_layer(layer)


def test_a_size():
    assert checked_size([5, np.int64(6)], 2) == (5, 6)
    assert checked_size(np.array([5, 6]), 2) == (5, 6)
    for wrong in ((5,), (5.0, 6.0), (5, True)):
        with pytest.raises(ValueError, match="size must have 2 lengths, got"):
            checked_size(wrong, 2)
    with pytest.raises(TypeError, match="size must be a spatial shape, got 5"):
        checked_size(5, 2)


def test_an_example_of_the_input():
    array = np.zeros(3)
    for size in ((5, 6), [np.int64(5), 6]):
        assert example(size, np.ndarray, lambda: "noise") == ("noise",)
    assert example(array, np.ndarray, None) == (array,)
    for given in ((array, 5), (np.array(5),), ("text", {"x": 3}), [[array]]):  # all arguments
        assert example(given, np.ndarray, None) == tuple(given)
    for wrong in (5, "xy", (), {"x": 3}):
        with pytest.raises(TypeError, match="size must be a spatial shape or an example of"):
            example(wrong, np.ndarray, None)


def test_the_latest_maps():
    maps, made = {}, []

    def map_for(key):
        return latest(maps, key, lambda: made.append(key) or -key)

    assert [map_for(key) for key in (1, 1, 2)] == [-1, -1, -2]
    for key in range(3, 10):
        map_for(key)
    assert [*maps] == [*range(2, 10)]
    assert made == [*range(1, 10)]


class Model:
    def __init__(self):
        self.layer, self.norm, self.rest = Layer(), Norm(), [1, 2]
        self.all = [self.layer, self.norm]


def folding(layer, norm):
    assert (type(layer), type(norm)) == (Layer, Norm)
    return "folded weight", "folded bias"


def test_a_copy_with_all_references_replaced():
    model, size = Model(), (3, 4)
    layers = {"layer": model.layer}
    named = [*layers.items(), ("norm", model.norm)]

    def copied(pairs, sizes):
        return fused_copy(model, named, layers, pairs, ("a note",), sizes, folding)

    found = copied({"layer": "norm"}, {"layer": size})
    assert isinstance(found.layer, Fused)
    assert found.all == [found.layer, found.norm]
    assert type(found.norm) is object
    assert found.rest == [1, 2]
    assert found.rest is not model.rest
    assert isinstance(model.layer, Layer)
    row = FusedLayer("layer", "Layer", size, "norm")
    assert found.fuse_report == FuseReport((row,), ("a note",))
    assert found.layer.given == (model.layer, size, "folded weight", "folded bias")
    plain = copied({}, {})
    assert isinstance(plain.norm, Norm)
    assert plain.layer.given == (model.layer, None, "weight", "bias")


def test_the_network_may_be_the_layer():
    layer = Layer()
    found = fused_copy(layer, [("", layer)], {"": layer}, {}, (), {"": (3, 4)}, folding)
    assert isinstance(found, Fused)
    assert str(found.fuse_report) == "(itself)  Layer  one map for 3x4"


def test_a_report():
    rows = FusedLayer("stem", "CoordConv2d", (64, 48), "bn1"), FusedLayer("a.b", "CoordConv1d")
    assert str(FuseReport(rows, ("and a note",))).splitlines() == [
        "stem  CoordConv2d  one map for 64x48  folded bn1",
        "a.b   CoordConv1d  maps as they come",
        "and a note",
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_is_the_definition(groups, transposed, bias):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 4 // groups, 2) if transposed else (4, 3, 2))
    weights = {"weight": weight} | ({"bias": rng.normal(size=4)} if bias else {})
    mean, variance, scale, shift = rng.normal(size=(4, 4)) ** 2
    statistics = mean, variance, scale, shift
    found = folded(weights, statistics, 1e-3, groups=groups, transposed=transposed)
    for o in range(4):
        factor = scale[o] / np.sqrt(variance[o] + 1e-3)
        group, within = divmod(o, 4 // groups)
        of = np.s_[group * 6 // groups : (group + 1) * 6 // groups, within] if transposed else o
        assert np.allclose(found["weight"][of], weight[of] * factor)
        before = weights["bias"][o] if bias else 0
        assert np.isclose(found["bias"][o], (before - mean[o]) * factor + shift[o])


def test_folding_rounds_once_from_float64():
    weights = {"weight": np.float32([[[1 / 3]]])}
    one = np.float32([1])
    found = folded(weights, (one * 0, one * 2, one, one * 0), 0.1)
    assert found["weight"].dtype == found["bias"].dtype == np.float32
    assert found["weight"] == np.float32(np.float64(np.float32(1 / 3)) / np.sqrt(2.1))
