"""The check of generated layers: every backend passes it, and a wrong one does not."""

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from coordconv import available_backends, backends, position_bias
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network, get
from coordconv.parity import Case, check_layers, generate, strategies
from coordconv.parity.bounds import expected


def test_every_case_is_within_its_bound_and_exact_ones_to_the_last_bit(backend):
    report = check_layers(generate(40, seed=2), [backend])
    (tally,) = report.tallies
    assert report.ok, "\n".join(tally.failures)
    assert tally.networks == 3
    assert tally.layers + sum(tally.excluded.values()) == 40
    assert tally.layers >= 20
    assert tally.bitwise == tally.exact >= 10
    assert 0 < tally.forward_error <= 1
    assert 0 < tally.gradient_error <= 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_types_are_within_their_bounds(backend, dtype):
    (tally,) = check_layers(generate(8, seed=5, dtype=dtype), [backend]).tallies
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.networks + tally.layers + sum(tally.excluded.values()) == 11
    if backend == "paddle" and dtype != "float64":
        assert tally.excluded == {"paddle convolutions have no 16-bit types on a CPU": 11}
    else:
        assert tally.layers >= 4
        assert tally.bitwise == tally.exact
        assert bool(tally.exact) == (dtype == "float64")
        assert 0 < tally.forward_error <= tally.gradient_error <= 1


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_or_not(backend, compiled):
    """A few, of every rank: torch takes seconds to compile one, JAX without compiling as long."""
    exact = [case for case in generate(40, seed=6) if case.is_layer and case.exact]
    kinds = {case.kind[:5]: case for case in exact if case.network.layers[0].geometry.groups == 1}
    cases = list(kinds.values())
    assert {kind[:3] for kind in kinds} == {"1-D", "2-D", "3-D"}
    (tally,) = check_layers(cases, [backend], compiled=compiled).tallies
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.bitwise == tally.layers >= 3
    assert tally.modes == {f"float32, {'compiled' if compiled else 'eager'}": tally.layers}


@given(strategies.cases())
@settings(max_examples=40, deadline=None)
def test_the_strategy_gives_what_the_reference_can_run(case):
    wanted = expected(case.network, *case.data())
    assert wanted["y"].value.shape[0] == case.batch
    assert all(np.isfinite(value.bound).all() for value in wanted.values())
    if case.exact:
        assert all(value.equals(value.value.astype(np.float32)) for value in wanted.values())


@given(case=strategies.cases())
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,  # some options have XLA end the process, without coordinates too
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_case_of_the_strategy_passes(backend, case):
    (tally,) = check_layers([case], [backend]).tallies
    assert not tally.failures, "\n".join(tally.failures)


@pytest.fixture
def backend_to_spoil():
    """One that is installed; which one does not matter to the comparison."""
    if not available_backends():
        pytest.skip("no framework is installed")
    return backends.load(available_backends()[0])


def layers(count, **options):
    """Plain layers that every framework has."""
    layer = Conv("conv", 2, 3, ConvGeometry((3, 3), padding=1), Coordinates("yx"))
    network = Network("layer", (2, 5, 9), (layer,))
    return [Case(network, batch=2, seed=seed, **options) for seed in range(count)]


class Spoilt:
    """A backend with one array of every evaluation spoilt."""

    def __init__(self, module, name, spoil):
        self.build, self._evaluate, self.COMPILED = module.build, module.evaluate, module.COMPILED
        self._name, self._spoil = name, spoil

    def evaluate(self, *args, **kwargs):
        y, gradients = self._evaluate(*args, **kwargs)
        arrays = {"y": np.array(y), **{k: np.array(v) for k, v in gradients.items()}}
        if self._name in arrays:
            arrays[self._name] = self._spoil(arrays[self._name])
        return arrays.pop("y"), arrays


@pytest.mark.parametrize("name", ["y", "x", "conv.weight", "conv.bias"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a * (1 + 2.0**-10),
        lambda a: a[::-1].copy(),
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a),
        lambda a: a[..., None],
    ],
    ids=["scaled", "reversed", "nan", "shape"],
)
def test_a_wrong_array_fails(monkeypatch, backend_to_spoil, name, spoil):
    spoilt = Spoilt(backend_to_spoil, name, spoil)
    monkeypatch.setattr(backends, "load", lambda _: spoilt)
    report = check_layers(layers(1), ["spoilt"])
    assert not report.ok
    (tally,) = report.tallies
    assert all(failure.startswith(name) for failure in tally.failures)


def test_an_output_in_another_type_fails(monkeypatch):
    """As of a layer that forgets to round the sum with the map, which is a float32 then."""

    class Unrounded:
        COMPILED = False

        @staticmethod
        def build(network, weights, dtype):
            return network

        @staticmethod
        def evaluate(network, weights, x, dy=None, *, compiled):
            wanted = expected(network, weights, x, dy)
            found = {name: value.value.astype(np.float32) for name, value in wanted.items()}
            return found.pop("y"), found

    monkeypatch.setattr(backends, "load", lambda _: Unrounded)
    assert check_layers(layers(1), ["unrounded"]).ok
    (tally,) = check_layers(layers(1, dtype="bfloat16"), ["unrounded"]).tallies
    (failure,) = tally.failures
    assert "y: not in bfloat16" in failure


def test_a_backend_that_raises_fails_with_the_case(monkeypatch):
    class Raising:
        COMPILED = False

        @staticmethod
        def build(network, weights, dtype):
            raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(backends, "load", lambda _: Raising)
    (case,) = layers(1)
    (tally,) = check_layers([case], ["raising"]).tallies
    assert tally.failures == [f"RuntimeError: no such thing in {case!r}"]


def test_processes_report_what_one_does(backend_to_spoil):
    name = available_backends()[0]
    cases = generate(12, seed=8)
    assert check_layers(cases, [name], workers=2) == check_layers(cases, [name])


@dataclass(frozen=True)
class Asking(Case):
    """A case that wants one of the two ways forced, or None."""

    way: str | None = None

    def data(self):
        assert self.way == position_bias.FORCED
        return super().data()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("way", [None, position_bias.APPEND, position_bias.MAP])
def test_a_way_is_forced_while_cases_run_and_no_longer(backend_to_spoil, way, workers):
    name = available_backends()[0]
    cases = [Asking(case.network, 1, 0, case.exact, way=way) for case in generate(2, seed=9)[:2]]
    seen = []
    report = check_layers(
        cases, [name], lambda: seen.append(position_bias.FORCED), way=way, workers=workers
    )
    assert report.ok
    assert seen == [None, None]  # between two cases it is the caller's turn
    with pytest.raises(AssertionError):
        check_layers([Asking(cases[0].network, 1, 0, way="another")], [name], way=way)
    assert position_bias.FORCED is None


def test_another_way_is_refused():
    message = "way must be None or one of append, map, got 'apart'"
    with pytest.raises(ValueError, match=message):
        check_layers([], [], way="apart")
    with pytest.raises(ValueError, match="backend must be one of torch.* got 'keras'"):
        check_layers(layers(1), ["keras"])


@pytest.mark.parametrize("way", [position_bias.APPEND, position_bias.MAP])
def test_every_case_passes_in_either_way(backend, way):
    """Both are right for these cases, which differ from backend to backend only in what it has."""
    cases = [case for case in generate(60, seed=12) if case.is_layer]
    cases = [case for case in cases if case.network.layers[0].coords.outside == "zero"][:14]
    (tally,) = check_layers(cases, [backend], way=way).tallies
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.layers >= 6
    assert tally.bitwise == tally.exact >= 3


@dataclass(frozen=True)
class Ending(Case):
    """A case that ends the process, as an assertion in a framework's own code does."""

    always: bool = True

    def data(self):
        if self.always or self.network.layers[0].coords:
            os._exit(1)
        return super().data()


@pytest.mark.parametrize("always", [True, False])
def test_a_process_that_ends(backend_to_spoil, always):
    """The cases beside it are run all the same; it fails if the coordinates are what it takes."""
    name = available_backends()[0]
    one, two = layers(2)
    ending = Ending(one.network, 1, 0, always=always)
    (tally,) = check_layers([one, ending, two], [name], workers=2).tallies
    if always:
        assert tally.excluded == {"the framework ends its process, without coordinates too": 1}
        assert not tally.failures
    else:
        assert tally.failures == [f"the framework ended its process in {ending!r}"]
    assert tally.layers == 3 - always
    mode = "compiled" if backends.load(name).COMPILED else "eager"
    assert tally.modes == {f"float32, {mode}": tally.layers}


def test_one_unit_in_the_last_place_fails_an_exact_case(monkeypatch, backend_to_spoil):
    spoilt = Spoilt(backend_to_spoil, "y", lambda a: np.nextafter(a, np.float32(np.inf)))
    monkeypatch.setattr(backends, "load", lambda _: spoilt)
    (tally,) = check_layers(layers(3, exact=True), ["spoilt"]).tallies
    assert len(tally.failures) == tally.exact == 3
    assert tally.bitwise == 0


def test_a_failure_is_one_line_that_makes_the_case_again(monkeypatch, backend_to_spoil):
    spoilt = Spoilt(backend_to_spoil, "y", lambda a: a + 1)
    monkeypatch.setattr(backends, "load", lambda _: spoilt)
    (case,) = layers(1, exact=True)
    (tally,) = check_layers([case], ["spoilt"]).tallies
    (line,) = tally.failures
    assert "\n" not in line
    names = {
        "Case": Case,
        "Network": Network,
        "Conv": Conv,
        "ConvGeometry": ConvGeometry,
        "Coordinates": Coordinates,
    }
    assert eval(line.partition(" in ")[2], names) == case


def test_an_option_that_a_framework_lacks_is_counted_under_its_reason(monkeypatch):
    class Lacking:
        COMPILED = False

        @staticmethod
        def build(network, weights, dtype):
            raise NotImplementedError("no such padding")

    monkeypatch.setattr(backends, "load", lambda _: Lacking)
    report = check_layers(generate(3), ["lacking"])
    assert report.ok
    assert report.tallies[0].excluded == {"no such padding": 6}


def test_report_as_json(backend_to_spoil):
    name = available_backends()[0]
    read = json.loads(check_layers([*layers(2), Case(get("plain_cnn"), 1, 0)], [name]).to_json())
    assert read["ok"] is True
    (tally,) = read["backends"]
    assert (tally["backend"], tally["layers"], tally["networks"]) == (name, 2, 1)
    assert tally["kinds"] == {"2-D zeros": 2}


def test_cases_come_from_the_seed_alone():
    assert generate(20, seed=5) == generate(20, seed=5)
    assert generate(20, seed=5) != generate(20, seed=6)
    first, second = (generate(1, seed=5)[0].data() for _ in range(2))
    assert np.array_equal(first[1], second[1])


def test_generated_cases_cover_the_options():
    geometries = [case.network.layers[0].geometry for case in generate(300) if case.is_layer]
    assert {g.padding_mode for g in geometries} == {"zeros", "reflect", "replicate", "circular"}
    for attribute in ("stride", "dilation", "input_dilation", "groups", "padding"):
        assert len({getattr(g, attribute) for g in geometries}) > 2
    layers = [case.network.layers[0] for case in generate(300) if case.is_layer]
    assert {"xy", "yx", "r"} <= {layer.coords.channels for layer in layers}
    assert {layer.coords.outside for layer in layers} == {"zero", "extend"}
