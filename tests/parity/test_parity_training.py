"""Training parity: every backend stays within the bound, and one with a mistake does not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from coordconv import backends
from coordconv.parity import training
from coordconv.parity.bounds import Expected, expected
from coordconv.parity.training import (
    TASKS,
    ExactRun,
    Task,
    TrainingOutcome,
    TrainingReport,
    check_training,
    exact_run,
    plot_training,
)

STEPS = 10  # of the 50 that the command takes
CNN_SGD, CNN_ADAM, CLASSIFIER_SGD, CLASSIFIER_ADAM = TASKS
SMALL = replace(
    CLASSIFIER_SGD, network=replace(CLASSIFIER_SGD.network, input_shape=(2, 9, 9)), batch=1
)


@pytest.fixture(scope="module")
def exact():
    """The exact run of a task, computed once."""
    kept: dict[Task, ExactRun] = {}

    def of(task):
        if task not in kept:
            kept[task] = exact_run(task, STEPS)
        return kept[task]

    return of


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_weights_stay_within_the_bound(backend, exact, task):
    outcome = exact(task).check_backend(backend)
    assert outcome.ok, (outcome.errors, outcome.worst)
    assert list(outcome.errors) == [10]
    assert max(outcome.errors.values()) > 0
    assert outcome.losses == pytest.approx(exact(task).losses, rel=1e-4)  # what the picture shows


class Spoilt:
    """Training in float64, within the bound but for a mistake."""

    def __init__(self, mistake=""):
        self.mistake = mistake

    def build(self, network, weights):
        return network

    def trainer(self, network, weights, optimizer, epsilon):
        weights = {name: array.astype(np.float64) for name, array in weights.items()}
        first, second = ({n: np.zeros(a.shape) for n, a in weights.items()} for _ in range(2))
        steps = 0

        def step(x, target, rate):
            nonlocal steps
            steps += 1
            y = expected(network, weights, x, None)["y"].value
            loss, dy = Task(network, optimizer, rate).loss(y, target)
            gradients = expected(network, weights, x, dy.value)
            for name in weights:
                g = gradients[name].value
                if self.mistake == name:  # its coordinates, the last two inputs, are not trained
                    g = g * (np.arange(g.shape[1]) < g.shape[1] - 2)[:, None, None]
                if self.mistake == "learning rate":
                    g = g * (1 + 2e-3) if optimizer == "sgd" else g
                if optimizer == "sgd":
                    weights[name] = weights[name] - rate * g
                    continue
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                one, two = 1 - 0.9**steps, 1 - 0.999**steps
                if self.mistake == "no correction":
                    one = two = 1
                root = np.sqrt(second[name] / two) + epsilon
                if self.mistake == "epsilon uncorrected":
                    root = (np.sqrt(second[name]) + epsilon) / np.sqrt(two)
                if self.mistake == "epsilon inside":
                    root = np.sqrt(second[name] / two + epsilon)
                move = first[name] / one / root
                move = move * (1 + 2e-3) if self.mistake == "learning rate" else move
                weights[name] = weights[name] - rate * move
            return loss

        return step, lambda: weights


def spoilt(monkeypatch, exact, task, mistake):
    monkeypatch.setattr(backends, "load", lambda name: Spoilt(mistake))
    return exact(task).check_backend("spoilt")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_training_in_float64_is_all_but_the_reference(monkeypatch, exact, task):
    assert spoilt(monkeypatch, exact, task, "").errors[10] < 1e-3


@pytest.mark.parametrize(
    ("task", "mistake"),
    [
        (CNN_SGD, "learning rate"),
        (CNN_ADAM, "learning rate"),
        (CLASSIFIER_SGD, "learning rate"),
        (CLASSIFIER_ADAM, "learning rate"),
        (CNN_ADAM, "no correction"),
        (CLASSIFIER_ADAM, "no correction"),
        (CNN_ADAM, "epsilon uncorrected"),
        (CLASSIFIER_ADAM, "epsilon uncorrected"),
        (CNN_ADAM, "epsilon inside"),
        (CLASSIFIER_ADAM, "epsilon inside"),
        (CNN_SGD, "conv4.weight"),
        (CNN_ADAM, "conv4.weight"),
        (CLASSIFIER_SGD, "conv1.weight"),
        (CLASSIFIER_ADAM, "conv1.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_training_with_a_mistake_fails(monkeypatch, exact, task, mistake):
    outcome = spoilt(monkeypatch, exact, task, mistake)
    assert not outcome.ok, outcome.errors


class TestBound:
    def test_a_gradient_of_unknown_sign_moves_by_the_rate_either_way_and_no_farther(self):
        rule = training._Adam(1e-8)
        for _ in range(50):
            move = rule.update(Expected(np.array([0.0, 1.0]), np.array([1e-3, 0.0])))
            assert 1 <= move.bound[0] < 1.7
            assert abs(move.value[1] - 1) < 1e-6
            assert move.bound[1] < 1e-3

    def test_no_move_is_beyond_the_limit(self):
        """The worst there is: gradients that grow as fast as the limit allows for."""
        rule = training._Adam(0.0)
        ratio = 0.9 / 0.999
        for t in range(30):
            move = rule.update(Expected(np.array(ratio ** (29 - t)), np.zeros(())))
        assert move.value == pytest.approx(rule._limit())

    def test_where_nothing_is_unknown_the_bound_is_that_of_the_arithmetic(self, exact):
        for weights in exact(CNN_SGD).weights.values():
            for wanted in weights.values():
                assert (wanted.bound >= 2.0**-24 * np.abs(wanted.value)).all()

    def test_it_grows(self):
        found = exact_run(SMALL, 20).weights
        assert all((found[20][name].bound > found[10][name].bound).all() for name in found[10])

    def test_the_losses_gradient_is_its_finite_difference(self):
        rng = np.random.default_rng(0)
        for task, shape in ((CNN_SGD, (4, 1)), (CLASSIFIER_SGD, (4, 256))):
            _, target = next(iter(task.batches(1)))
            y, direction = rng.standard_normal((2, *shape))
            slope = (task.loss(y + 1e-6 * direction, target)[0] - task.loss(y, target)[0]) / 1e-6
            assert slope == pytest.approx((task.loss(y, target)[1].value * direction).sum(), 1e-4)


def test_batches_are_the_tasks(exact):
    for task in TASKS:
        batches = list(task.batches(5))
        assert np.array_equal(batches[0][0], batches[4][0])  # four take turns
        assert not np.array_equal(batches[0][0], batches[1][0])
        for x, target in batches:
            assert x.shape == (task.batch, *task.network.input_shape)
            assert x.dtype == np.float32
            if task.network.name == "coord_cnn":
                assert target.dtype == np.float32
                assert (x.sum(axis=(1, 2, 3)) == 3 * 9 * 9).all()
                centre = (x[:, 0] * np.linspace(-1, 1, 32)).sum(axis=(1, 2)) / 81
                assert target[:, 0] == pytest.approx(centre, abs=1e-6)
            else:
                column = (x[:, 0, 0, 0] + 1) * 7.5
                row = (x[:, 1, 0, 0] + 1) * 7.5
                assert target == pytest.approx(row * 16 + column, abs=1e-4)


def test_report(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda name: Spoilt("learning rate"))
    advanced = []
    report = check_training([SMALL], ["spoilt"], 10, lambda: advanced.append(1))
    assert len(advanced) == 20
    assert not report.ok
    read = json.loads(report.to_json())
    assert read["ok"] is False
    assert len(read["exact_losses"][SMALL.name]) == 10
    (outcome,) = read["outcomes"]
    assert outcome["errors"]["10"] > 1
    assert TrainingReport({}, []).ok


def test_picture(tmp_path, exact):
    pytest.importorskip("matplotlib")
    losses = exact(CLASSIFIER_SGD).losses
    outcome = TrainingOutcome("a", "torch", {10: 0.1, 20: 0.2}, {10: "w", 20: "w"}, losses)
    report = TrainingReport({"a": losses, "b": losses}, [outcome, replace(outcome, backend="x")])
    plot_training(tmp_path / "training.png", report)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
