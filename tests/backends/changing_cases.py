"""torch and Paddle behind the same few names, for networks that are given coordinates."""

import copy
import pickle
from typing import ClassVar

import pytest
from harness import normal

from coordconv import backends


class Face:
    """What differs between the two in these tests."""

    def __init__(self):
        self.ours = backends.load(self.name)
        self.add_coords, self.remove_coords = self.ours.add_coords, self.ours.remove_coords

    def network(self):
        self.seed(0)
        return self.nn.Sequential(
            self.conv(3, 8, 3, padding=1),
            self.norm(8),
            self.nn.ReLU(),
            self.conv(8, 8, 1, groups=2, bias=False),
            self.conv(8, 16, 3, stride=2, padding=1, padding_mode="circular"),
            self.conv(16, 6, 2, stride=2, groups=2, transposed=True),
        )

    def conv(self, channels, out, kernel, *, rank=2, transposed=False, bias=True, **options):
        if not bias:
            options[self.bias] = False
        return self.kind(rank, transposed)(channels, out, kernel, **options)

    def coord(self, rank=2, transposed=False):
        """Our class."""
        return getattr(self.ours, f"Coord{self.kind(rank, transposed).__name__}")

    def optimizer(self, name, model):
        return self.optimizers[name](self.kinds, list(model.parameters()))

    def step(self, model, optimizer, x, target=0):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        self.forget_gradients(model)
        return loss.item()

    def copies(self, module):
        """By copy and, where the framework can, by pickle; Paddle 3.2 cannot."""
        yield copy.deepcopy(module)
        try:
            pickle.dumps(self.conv(1, 1, 1))
        except TypeError:
            return
        yield pickle.loads(pickle.dumps(module))

    def images(self, *shape):
        return self.tensor(normal(*(shape or (4, 3, 18, 22)), seed=1))

    def fill(self, parameter, seed=5):
        with self.package.no_grad():
            parameter.copy_(self.tensor(normal(*parameter.shape, seed=seed)).to(parameter.dtype))


class Torch(Face):
    name, bias = "torch", "bias"
    # Of the package's optim or optimizer, and of parameters.
    optimizers: ClassVar = {
        "plain": lambda kinds, p: kinds.SGD(p, 0.05),
        "momentum": lambda kinds, p: kinds.SGD(p, 0.05, momentum=0.9),
        "adam": lambda kinds, p: kinds.Adam(p, 0.01),
        "fused adam": lambda kinds, p: kinds.Adam(p, 0.01, fused=True),
        "adagrad": lambda kinds, p: kinds.Adagrad(p, 0.01),
        "groups": lambda kinds, p: kinds.AdamW([{"params": [each]} for each in p], 0.01),
    }

    def __init__(self):
        import torch

        super().__init__()
        self.package, self.nn, self.norm = torch, torch.nn, torch.nn.BatchNorm2d
        self.seed, self.tensor, self.kinds = torch.manual_seed, torch.from_numpy, torch.optim
        self.functional_conv = torch.nn.functional.conv2d

    def kind(self, rank, transposed):
        return getattr(self.nn, f"Conv{'Transpose' * transposed}{rank}d")

    def modules(self, model):
        return dict(model.named_modules())

    def forget_gradients(self, model):
        model.zero_grad()

    def without_gradients(self):
        return self.package.inference_mode()

    def load(self, model, state):
        model.load_state_dict(state, strict=True)


class Paddle(Face):
    name, bias = "paddle", "bias_attr"
    optimizers: ClassVar = {
        "plain": lambda kinds, p: kinds.SGD(0.05, p),
        "momentum": lambda kinds, p: kinds.Momentum(0.05, parameters=p),
        "many momenta": lambda kinds, p: kinds.Momentum(0.05, parameters=p, use_multi_tensor=True),
        "adam": lambda kinds, p: kinds.Adam(0.01, parameters=p),
        "many adam": lambda kinds, p: kinds.Adam(0.01, parameters=p, use_multi_tensor=True),
        "adagrad": lambda kinds, p: kinds.Adagrad(0.01, parameters=p),
        "nadam": lambda kinds, p: kinds.NAdam(0.01, parameters=p),
        "rprop": lambda kinds, p: kinds.Rprop(0.01, parameters=p),
        "groups": lambda kinds, p: kinds.AdamW(0.01, parameters=[{"params": [q]} for q in p]),
    }

    def __init__(self):
        import paddle

        super().__init__()
        self.package, self.nn, self.norm = paddle, paddle.nn, paddle.nn.BatchNorm2D
        self.seed, self.tensor, self.kinds = paddle.seed, paddle.to_tensor, paddle.optimizer
        self.functional_conv = paddle.nn.functional.conv2d

    def kind(self, rank, transposed):
        return getattr(self.nn, f"Conv{rank}D{'Transpose' * transposed}")

    def modules(self, model):
        return dict(model.named_sublayers(include_self=True))

    def forget_gradients(self, model):
        model.clear_gradients()

    def without_gradients(self):
        return self.package.no_grad()

    def load(self, model, state):
        missing, unexpected = model.set_state_dict(self.ours.adapt_state_dict(model, state))
        assert not missing
        assert not unexpected


FACES = {"torch": Torch, "paddle": Paddle}


def equal(one, other):
    one, other = (each.detach().numpy() for each in (one, other))
    return one.shape == other.shape and one.dtype == other.dtype and (one == other).all()


def snapshot(face, model):
    """All that a refused call must leave as it is."""
    parameters = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters()]
    return parameters, [(name, type(module)) for name, module in face.modules(model).items()]


def refused(face, model, message, error=ValueError, **options):
    before = snapshot(face, model)
    with pytest.raises(error, match=message):
        face.add_coords(model, **options)
    after = snapshot(face, model)
    assert after[1] == before[1]
    for one, other in zip(after[0], before[0], strict=True):
        assert one[:2] == other[:2]
        assert equal(one[2], other[2])


def set_training(model, training):
    model.train() if training else model.eval()
    return model
