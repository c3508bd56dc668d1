"""A file of weights that one backend saves gives the same answers in every other one."""

import json

import numpy as np
import pytest

from coordconv import available_backends, backends
from coordconv.parity import exchange
from coordconv.parity.exchange import Pair, check_exchange, count_steps


def test_every_backend_reads_what_another_wrote():
    others = available_backends()
    if not others:
        pytest.skip("no framework is installed")
    advanced = []
    report = check_exchange(["coord_cnn"], others, inputs=60, advance=lambda: advanced.append(1))
    assert report.ok, report.pairs
    assert len(advanced) == count_steps(others, 60)
    pairs = {(pair.saved, pair.loaded): pair for pair in report.pairs}
    assert pairs.keys() == {(a, b) for a in others for b in others}
    for pair in pairs.values():
        assert pair.inputs == pair.same == 60
        assert 0 < pair.error <= 1
        assert pair.likely <= 1


@pytest.fixture
def pretender(monkeypatch):
    """Backends of which one makes a mistake in what it exports or answers."""
    if not available_backends():
        pytest.skip("no framework is installed")
    real = backends.load(available_backends()[0])

    class Wrong:
        def __init__(self, export, answer):
            self.build, self._export, self._answer = real.build, export, answer

        def trainer(self, module, weights):
            _, export = real.trainer(module, weights)
            return None, lambda: self._export(export())

        def evaluate(self, module, weights, x):
            y, gradients = real.evaluate(module, weights, x)
            return self._answer(np.array(y)), gradients

    def use(network, export=lambda weights: weights, answer=lambda y: y):
        made = {"right": real, "wrong": Wrong(export, answer)}
        monkeypatch.setattr(backends, "load", made.__getitem__)
        return check_exchange([network], ["right", "wrong"], inputs=1)

    return use


@pytest.mark.parametrize(
    ("network", "name", "wrong"),
    [
        ("coord_classifier", "conv1.weight", lambda kernel: kernel[:, [0, 1, 3, 2]]),
        ("coord_cnn", "conv4.weight", lambda kernel: kernel[:, [*range(64), 65, 64]]),
        ("coord_cnn", "conv4.weight", lambda kernel: np.roll(kernel, 2, axis=1)),
        ("coord_cnn", "conv4.weight", lambda kernel: kernel.swapaxes(2, 3)),
    ],
    ids=["coordinates", "a later layer's coordinates", "coordinates first", "axes"],
)
def test_a_wrong_export_fails_wherever_it_is_loaded(pretender, network, name, wrong):
    def swapped(weights):
        weights[name] = wrong(weights[name]).copy()
        return weights

    report = pretender(network, export=swapped)
    assert [(p.saved, p.loaded) for p in report.pairs if not p.ok] == [
        ("wrong", "right"),
        ("wrong", "wrong"),
    ]


def test_a_wrong_output_fails_whoever_saved(pretender):
    report = pretender("coord_cnn", answer=lambda y: y * (1 + 1e-4))
    assert [(p.saved, p.loaded) for p in report.pairs if not p.ok] == [
        ("right", "wrong"),
        ("wrong", "wrong"),
    ]


def test_another_answer_fails_within_the_bound_too():
    assert Pair("a", "torch", "flax", 10, 0.5, 0.0, 10).ok
    assert not Pair("a", "torch", "flax", 10, 0.5, 0.0, 9).ok
    assert not Pair("a", "torch", "flax", 10, 1.5, 0.0, 10).ok
    assert not Pair("a", "torch", "flax", 10, 0.5, 1.5, 10).ok


def test_answers():
    assert exchange._answers(np.array([[0.5], [-0.5]])).tolist() == [True, False]
    assert exchange._answers(np.array([[0.0, 1.0], [3.0, 2.0]])).tolist() == [1, 0]


def test_report_as_json():
    report = exchange.ExchangeReport([Pair("a", "torch", "flax", 10, 0.5, 0.0, 9)])
    read = json.loads(report.to_json())
    assert read["ok"] is False
    assert read["pairs"][0]["same"] == 9
