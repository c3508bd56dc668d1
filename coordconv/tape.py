"""Networks, evaluation, training and recording in a framework that records a tape.

PyTorch and Paddle remember what a module computed from its parameters, and take gradients of that.
Their modules and tensors have methods of the same names: ``parameters``, ``named_parameters``,
``named_buffers``, ``register_forward_hook`` and ``add_module``; ``detach``, ``clone``, ``copy_``,
``requires_grad_``, ``is_floating_point`` and ``backward``. Where the two differ, a :class:`Tape`
has a function for each. All that they do alike is here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Layer, Linear, Network, ReLU
from coordconv.recording import Names, OutputGradient, Recorded, See, record
from coordconv.weights.canonical import Weights, checked, layouts


@dataclass(frozen=True)
class Tape:
    """What a framework has to say, beside the methods that its tensors and modules share.

    Args:
        nn: the framework's ``nn``, with ``Linear``, ``ReLU``, ``Flatten`` and the ``mse_loss`` and
            ``cross_entropy`` of ``functional``, both means.
        conv: a convolution from its description, with coordinates or without.
        tensor: ``tensor(array, like)``: an array as a tensor; a floating-point one has the type and
            the device of the tensor ``like``, if that is not None.
        numpy: a copy of a tensor's values; bfloat16, which NumPy lacks, as float32.
        is_array: whether something is a tensor whose values NumPy can have.
        gradients: ``gradients(outputs, inputs, output_gradients)``, all of them sequences; zeros of
            what the outputs do not depend on.
        grad_enabled: ``with grad_enabled(False)`` the tape stops.
        compiled: the module before the framework's compiler.
        modules: the modules inside a module, itself included, by name, as far as they take hooks.
        optimizers: ``adam(parameters, epsilon)`` and ``sgd(parameters, epsilon)``.
        set_rate: ``set_rate(optimizer, learning_rate)``.
        from_state: canonical arrays from the arrays of a state of a network.
        to_state: the inverse.
    """

    nn: Any
    conv: Callable[[Conv], Any]
    tensor: Callable[[Array, Any], Any]
    numpy: Callable[[Any], Array]
    is_array: Callable[[Any], bool]
    gradients: Callable[[list[Any], list[Any], list[Any]], Iterable[Any]]
    grad_enabled: Callable[[bool], AbstractContextManager[Any]]
    compiled: Callable[[Any], Callable[[Any], Any]]
    modules: Callable[[Any], Mapping[str, Any]]
    optimizers: Mapping[str, Callable[[list[Any], float], Any]]
    set_rate: Callable[[Any, float], None]
    from_state: Callable[[Network, Mapping[str, Array]], dict[str, Array]]
    to_state: Callable[[Network, Mapping[str, Array]], dict[str, Array]]

    def layer(self, layer: Layer) -> Any:
        """A module from the description of a layer."""
        match layer:
            case Conv():
                return self.conv(layer)
            case Linear():
                return self.nn.Linear(layer.in_features, layer.out_features)
            case ReLU():
                return self.nn.ReLU()
            case Flatten():
                return self.nn.Flatten()

    def evaluate(
        self,
        module: Any,
        weights: Mapping[str, Array],
        x: Array,
        dy: Array | None = None,
        *,
        compiled: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Output and gradients; see :class:`coordconv.backends.protocols.Backend`."""
        module.import_weights(weights)
        parameters = dict(module.named_parameters())
        like = next(iter(parameters.values()), None)
        run = self.compiled(module) if compiled else module
        given = self.tensor(x, like)
        if dy is None:
            with self.grad_enabled(False):
                return self.numpy(run(given)), {}
        given = given.requires_grad_()
        output = run(given)
        of = {"x": given, **parameters}
        found = self.gradients([output], [*of.values()], [self.tensor(dy, like)])
        arrays = {name: self.numpy(each) for name, each in zip(of, found, strict=True)}
        return self.numpy(output), self.from_state(module.network, arrays)

    def trainer(
        self,
        module: Any,
        weights: Mapping[str, Array],
        optimizer: str = "adam",
        epsilon: float = 1e-8,
    ) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
        """A training step, and the weights that it leaves; see ``Backend``, as above."""
        if optimizer not in self.optimizers:
            raise ValueError(f"optimizer must be one of {[*self.optimizers]}, got {optimizer!r}")
        module.import_weights(weights)
        parameters = [*module.parameters()]
        rule = self.optimizers[optimizer](parameters, epsilon)

        def step(x: Array, target: Array, learning_rate: float) -> float:
            self.set_rate(rule, learning_rate)
            rule.zero_grad()
            wanted = self.tensor(target, parameters[0])
            losses = self.nn.functional
            criterion = losses.mse_loss if wanted.is_floating_point() else losses.cross_entropy
            loss = criterion(module(self.tensor(x, parameters[0])), wanted)
            loss.backward()
            rule.step()
            return float(loss.item())

        return step, module.export_weights

    def recorded(
        self, module: Any, names: Names, output_gradient: OutputGradient, options: dict[str, Any]
    ) -> Recorded:
        """``recorded`` of a backend; ``options`` go to the call. See ``Backend``, as above."""

        def run(*inputs: Array) -> Mapping[str, Array]:
            like = next((p for p in module.parameters() if p.is_floating_point()), None)
            given = [self.tensor(x, like) for x in inputs]
            if output_gradient is not None:
                given = [x.requires_grad_() if x.is_floating_point() else x for x in given]

            with ExitStack() as stack, self.grad_enabled(output_gradient is not None):
                stack.enter_context(self._restored(module))

                def call(see: See) -> Any:
                    for name, each in self.modules(module).items():
                        if name:  # the output of the module itself is recorded as the model's
                            hook = _hook(name, see)
                            stack.callback(each.register_forward_hook(hook).remove)
                    # Clones, since no leaf of a graph can be written to.
                    return module(*(x.clone() for x in given), **options)

                return record(
                    call,
                    given,
                    names,
                    output_gradient,
                    numpy=self.numpy,
                    is_array=self.is_array,
                    is_floating=lambda tensor: bool(tensor.is_floating_point()),
                    watch=_watched,
                    gradients=self._named_gradients,
                )

        return run

    def _named_gradients(
        self, outputs: dict[str, Any], inputs: dict[str, Any], given: dict[str, Array]
    ) -> dict[str, Array]:
        of = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        if not of:
            return {}
        dys = [self.tensor(given[name], output) for name, output in outputs.items()]
        found = self.gradients([*outputs.values()], [*of.values()], dys)
        return {name: self.numpy(gradient) for name, gradient in zip(of, found, strict=True)}

    @contextmanager
    def _restored(self, module: Any) -> Iterator[None]:
        """Afterwards the module has the state of before, such as batch statistics.

        What is trained no call changes. A lazy module keeps what its first call has made of it.
        """
        modules = [
            (each, set(dir(each)), dict(each.named_buffers("", False, False)))
            for each in self.modules(module).values()
        ]
        fixed = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
        values = [(tensor, tensor.clone()) for tensor in fixed if self.is_array(tensor)]
        try:
            yield
        finally:
            with self.grad_enabled(False):
                for tensor, value in values:
                    if not (tensor == value).all():
                        tensor.copy_(value)
            for each, attributes, buffers in modules:
                now = dict(each.named_buffers("", False, False))
                for name in now.keys() | buffers.keys():
                    if name not in attributes:
                        delattr(each, name)
                    elif now.get(name) is not buffers.get(name):
                        setattr(each, name, buffers.get(name))  # None, which named_buffers omits


def _hook(name: str, see: See) -> Callable[[Any, Any, Any], Any]:
    return lambda module, inputs, output: see(name, output)


def _watched(tensor: Any) -> tuple[Any, Any]:
    """A tensor of the graph with these values, and a clone of it, which may be written to."""
    watched = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    return watched, watched.clone()


class NetworkModule:
    """A :class:`coordconv.networks.Network` as a module: a base class before ``nn.Sequential``."""

    TAPE: ClassVar[Tape]
    named_parameters: Any  # of nn.Sequential, as the next
    add_module: Any

    def __init__(self, network: Network) -> None:
        super().__init__()
        for i, layer in enumerate(network.layers):
            name = layer.name or f"{layer.kind.lower()}{i}"
            self.add_module(name, self.TAPE.layer(layer))
        self.network = network

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        arrays = {name: self.TAPE.numpy(tensor) for name, tensor in self.named_parameters()}
        return Weights.of(self.network, self.TAPE.from_state(self.network, arrays))

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed and nothing is changed.
        """
        arrays = checked(mapping, self.network.weight_shapes(), layouts(self.network))
        state = self.TAPE.to_state(self.network, arrays)
        with self.TAPE.grad_enabled(False):
            for name, parameter in self.named_parameters():
                parameter.copy_(self.TAPE.tensor(state[name], parameter))
