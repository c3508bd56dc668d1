"""Layers, networks, training and recording in a framework that records a tape.

PyTorch and Paddle remember what a module computed from its parameters, and take gradients of that.
Their modules and tensors have methods of the same names: ``parameters``, ``named_parameters``,
``named_buffers`` and ``named_children``; ``detach``, ``clone``, ``copy_``, ``new_zeros``,
``requires_grad``, ``is_floating_point`` and ``backward``. Where the two differ, a :class:`Tape` has
a function for each. All that they do alike is here, once.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from coordconv.coordinates import CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.layers import CanonicalLayer, CoordLayer
from coordconv.networks import Conv, Flatten, Layer, Linear, MeanPool, Network, ReLU
from coordconv.recording import Names, OutputGradient, Recorded, See, record
from coordconv.weights.canonical import Weights, checked, layouts
from coordconv.weights.files import replace_file
from coordconv.weights.kernels import Position, fit_state


def to_numpy(tensor: Any) -> Array:
    """A copy of a tensor's values; bfloat16, which NumPy lacks, becomes float32."""
    tensor = tensor.detach()
    tensor = (tensor.full_tensor() if is_distributed(tensor) else tensor).cpu()
    if str(tensor.dtype).endswith("bfloat16"):
        tensor = tensor.float()
    return np.array(tensor.numpy())


def zeros(shape: tuple[int, ...], like: Any) -> Any:
    """Zeros of the type and on the device of a tensor, or of an array of NumPy."""
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def is_distributed(tensor: Any) -> bool:
    """Whether it is PyTorch's DTensor, of which every rank has a part."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # PyTorch loads it where it is used
    return hasattr(module, "DTensor") and isinstance(tensor, module.DTensor)


def replicated(tensor: Any, like: Any) -> Any:
    """A tensor that is the same on every rank, as a DTensor beside one: PyTorch mixes no two."""
    if is_distributed(like) and not is_distributed(tensor):
        return type(like).from_local(tensor.to(like.device), like.device_mesh, run_check=False)
    return tensor


def all_modules(module: Any) -> list[tuple[str, Any]]:
    """The modules in a module, itself included; one that stands in two places has both names."""
    if hasattr(module, "named_sublayers"):  # Paddle's
        return [*module.named_sublayers(include_self=True, remove_duplicate=False)]
    return [*module.named_modules(remove_duplicate=False)]


def refuse_computed(layer: Any, parametrized: bool = False) -> None:
    """Raise ValueError if a hook computes the weight or the bias, which are those of the last call.

    Pruning does so, and so do the norms of PyTorch and Paddle that are no parametrizations. What a
    parametrization computes is a property, which is never old; ``parametrized`` refuses it, too.
    """
    own = dict(layer.named_parameters("", False))
    for name in ("weight", "bias"):
        is_property = isinstance(getattr(type(layer), name, None), property)
        allowed = name in own or (is_property and not parametrized)
        if not allowed and getattr(layer, name) is not None:
            parts = " and ".join(each for each in own if each.startswith(f"{name}_"))
            source = f" from {parts}" if parts else ""
            raise ValueError(
                f"{name} must be a parameter, but is computed{source} at each call, "
                "as by a norm, a parametrization or pruning: remove that first, as with "
                "remove_weight_norm"
            )


class TapeWeights(CanonicalLayer):
    """A layer whose ``weight`` and ``bias``, which may be None, are in canonical layout."""

    weight: Any
    bias: Any
    state_dict: Any
    named_parameters: Any

    def _canonical(self) -> dict[str, Array]:
        self.state_dict()  # whose hooks have FSDP2 let go of what it gathered for a call
        refuse_computed(self)
        found = {"weight": self.weight, "bias": self.bias}
        return {name: to_numpy(tensor) for name, tensor in found.items() if tensor is not None}

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights, as :meth:`.CanonicalLayer.import_weights` does.

        Raises:
            ValueError: as there; a weight or a bias that is computed from other parameters, as in
                pruning: the next call would compute what was imported anew.
        """
        refuse_computed(self, parametrized=True)
        super().import_weights(mapping)


class TapeLayer(TapeWeights, CoordLayer):
    """What the layers share beside their arithmetic."""

    CONVERSION: ClassVar[Any]  # the framework's coordconv.tape_changing.Conversion
    FUSED: ClassVar[Any]  # the class of a fused layer
    named_children: Any

    @classmethod
    def from_conv(cls, conv: Any, coords: CoordinatesLike = None, *, init: str = "zeros") -> Any:
        """A layer from a copy of its framework's own convolution, with the weights of that.

        Args:
            conv: a convolution of the class that this class is a subclass of.
            coords: the coordinate channels: tokens, a :class:`~coordconv.Coordinates`, or None for
                all axes.
            init: ``"zeros"``: the layer computes what ``conv`` computes, and is ``map_only``, so
                that in PyTorch's float32 no bit differs; ``"fan_in"``: the coordinates' part is
                drawn as in a new layer.

        Raises:
            TypeError: ``conv`` is of another class.
            ValueError: ``coords`` beyond the rank; another ``init``; a kernel that others compute,
                as in pruning.
        """
        check_coord_init(init, "init")
        return cls.CONVERSION.from_conv(cls, conv, coords, init)

    def fuse(self, size: Sequence[int] | None = None) -> Any:
        """For inference: a plain convolution and one constant map, or the maps of the last sizes.

        Args:
            size: the spatial shape of all inputs to come; None for any.

        Returns:
            The framework's ``FusedCoordConv``, with copies of the layer's parameters.

        Raises:
            TypeError: ``size`` is no spatial shape.
            ValueError: the layer is in training mode, or ``size`` of another rank.

        Example: in the docstring of ``TorchCoordLayer`` and of ``PaddleCoordLayer``.
        """
        return self.FUSED(self, size, self.weight, self.bias)

    def _adapt(self, state: Any, prefix: str, position: Position = "last") -> None:
        """Give a state, in place, this layer's names and kernel; see :func:`adapt_state_dict`."""

        def concatenate(parts: list[Any], axis: int) -> Any:
            of_numpy = isinstance(parts[0], np.ndarray)
            return (np.concatenate if of_numpy else self.CONVERSION.framework.concat)(parts, axis)

        fit_state(
            state,
            prefix,
            self.layout,
            nested="conv" not in dict(self.named_children()),
            position=position,
            concatenate=concatenate,
            zeros=zeros,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coords={self.coords!r}"  # type: ignore[misc]  # a mixin


def adapt_state_dict(
    module: Any, state_dict: Mapping[str, Any], *, position: Position = "last"
) -> dict[str, Any]:
    """Another implementation's state, as a module of PyTorch or Paddle with CoordConvs takes it.

    CoordConvs do the same as they are loaded, but for ``position="first"``: where coordinates come
    before the features, as in SparseInst, CondInst and CAM-Convs, no shape tells it. Of a network
    of Paddle the outermost layer alone is asked, so that it needs this, too.

    Args:
        module: the network, or one layer.
        state_dict: tensors, in Paddle also arrays of NumPy, by name; it is left as it is.
        position: where the coordinates are among the input channels of each group.

    Returns:
        The same with its metadata, but for the kernels of CoordConvs. Those over features and
        coordinates have the coordinates last, and a plain convolution's has zeros for them;
        ``conv.weight`` is ``weight``.

    Raises:
        ValueError: a kernel whose channels fit neither; another ``position``.

    Example: in ``networks.py`` of each of the two.
    """
    state = OrderedDict(state_dict)
    vars(state).update(getattr(state_dict, "__dict__", {}))  # of PyTorch, _metadata
    for name, each in all_modules(module):
        if isinstance(each, TapeLayer):
            each._adapt(state, f"{name}." if name else "", position)
    return state


@dataclass(frozen=True)
class Tape:
    """What a framework has to say, beside the methods that its tensors and modules share."""

    framework: Any  # the package itself, with ``nn``, ``save`` and ``set_grad_enabled``
    conv: Callable[[Conv], Any]  # a convolution from its description
    mean_pool: Callable[[int], Any]  # the framework's adaptive average pooling over one axis
    # tensor(array, like): on the device and, if floating-point, of the type of `like`, unless None.
    tensor: Callable[[Array, Any], Any]
    is_array: Callable[[Any], bool]  # whether it is a tensor whose values NumPy can have
    # grad(outputs, inputs, output_gradients, allow_unused=True)
    grad: Callable[..., Iterable[Any]]
    compiled: Callable[[Any], Callable[[Any], Any]]  # the module before the framework's compiler
    # The modules in a module, itself included, by name, as far as they take hooks.
    modules: Callable[[Any], Mapping[str, Any]]
    register_hook: str  # the method of a module that has a function see what the module returned
    optimizers: Mapping[str, Callable[[list[Any], float], Any]]  # of parameters and Adam's epsilon
    # begin_step(optimizer, learning_rate): which it takes, and forgets gradients.
    begin_step: Callable[[Any, float], None]
    # Canonical arrays from those of a network's state, and the inverse: it is its own.
    from_state: Callable[[Network, Mapping[str, Array]], dict[str, Array]]

    def layer(self, layer: Layer) -> Any:
        """A module from the description of a layer."""
        match layer:
            case Conv():
                return self.conv(layer)
            case Linear():
                return self.framework.nn.Linear(layer.in_features, layer.out_features)
            case ReLU():
                return self.framework.nn.ReLU()
            case Flatten():
                return self.framework.nn.Flatten()
            case MeanPool():
                nn = self.framework.nn
                return nn.Sequential(nn.Flatten(2), self.mean_pool(1), nn.Flatten())

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
            with self.framework.set_grad_enabled(False):
                return to_numpy(run(given)), {}
        given.requires_grad = True
        output = run(given)
        of = {"x": given, **parameters}
        gradients = self._gradients([output], of, [self.tensor(dy, like)])
        return to_numpy(output), self.from_state(module.network, gradients)

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
            self.begin_step(rule, learning_rate)
            wanted = self.tensor(target, parameters[0])
            losses = self.framework.nn.functional
            criterion = losses.mse_loss if wanted.is_floating_point() else losses.cross_entropy
            loss = criterion(module(self.tensor(x, parameters[0])), wanted)
            loss.backward()
            rule.step()
            return float(loss.item())

        return step, module.export_weights

    def write_state(self, path: str, network: Network, weights: Mapping[str, Array]) -> None:
        """Write what the framework saves of a module; see ``Backend``, as above."""
        state = self.from_state(network, weights)
        content = BytesIO()
        self.framework.save({n: self.tensor(array, None) for n, array in state.items()}, content)
        replace_file(path, content.getvalue())

    def recorded(
        self,
        module: Any,
        *,
        names: Names = None,
        output_gradient: OutputGradient = None,
        **kwargs: Any,
    ) -> Recorded:
        """The module as a function on NumPy arrays that returns what each module in it returned.

        It makes models for :func:`coordconv.parity.compare`; arguments, results and errors are
        those of :attr:`coordconv.backends.protocols.Backend.recorded`. The module runs as it is, in
        training or in evaluation; what it draws moves the framework's generator on. Inputs that are
        floating-point get the type and the device of its first floating-point parameter. What runs
        in compiled and scripted modules and in transformations of ``torch.func`` is not recorded,
        nor are nested, sparse and quantized tensors.

        Example: in ``networks.py`` of each of the two.
        """
        differentiated = output_gradient is not None

        def run(*inputs: Array) -> Mapping[str, Array]:
            like = next((p for p in module.parameters() if p.is_floating_point()), None)
            given = [self.tensor(x, like) for x in inputs]
            for x in given:
                x.requires_grad = differentiated and x.is_floating_point()

            tape = self.framework.set_grad_enabled(differentiated)
            with tape, self.restored(module), ExitStack() as stack:

                def call(see: See) -> Any:
                    for name, each in self.modules(module).items():
                        if name:  # the output of the module itself is recorded as the model's
                            register = getattr(each, self.register_hook)
                            hook = register(lambda _, inputs, output, name=name: see(name, output))
                            stack.callback(hook.remove)
                    # Clones, since no leaf of a graph can be written to.
                    return module(*(x.clone() for x in given), **kwargs)

                def gradients(
                    outputs: dict[str, Any], inputs: dict[str, Any], dys: dict[str, Array]
                ) -> dict[str, Array]:
                    of = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
                    given = [self.tensor(dys[name], y) for name, y in outputs.items()]
                    return self._gradients([*outputs.values()], of, given) if of else {}

                return record(
                    call,
                    given,
                    names,
                    output_gradient,
                    numpy=to_numpy,
                    is_array=self.is_array,
                    is_floating=lambda tensor: bool(tensor.is_floating_point()),
                    watch=_watched,
                    gradients=gradients,
                )

        return run

    def _gradients(
        self, outputs: list[Any], inputs: dict[str, Any], output_gradients: list[Any]
    ) -> dict[str, Array]:
        """By the names of the inputs; zeros of what the outputs do not depend on."""
        found = self.grad(outputs, [*inputs.values()], output_gradients, allow_unused=True)
        return {
            name: np.zeros_like(to_numpy(x)) if gradient is None else to_numpy(gradient)
            for (name, x), gradient in zip(inputs.items(), found, strict=True)
        }

    @contextmanager
    def restored(self, module: Any) -> Iterator[None]:
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
            with self.framework.set_grad_enabled(False):
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


def _watched(tensor: Any) -> tuple[Any, Any]:
    """A tensor of the graph with these values, and a clone of it, which may be written to.

    It is a new one, since a module may return its input, which other modules may take, too.
    """
    if tensor.requires_grad:
        tensor = tensor.clone()
    else:
        tensor = tensor.detach()
        tensor.requires_grad = True
    return tensor, tensor.clone()


class NetworkModule:
    """A :class:`coordconv.networks.Network` as a module: a base class before ``nn.Sequential``."""

    TAPE: ClassVar[Tape]
    named_parameters: Any  # of nn.Sequential
    state_dict: Any

    def __init__(self, network: Network) -> None:
        super().__init__()
        for i, layer in enumerate(network.layers):
            name = layer.name or f"{layer.kind.lower()}{i}"
            setattr(self, name, self.TAPE.layer(layer))
        self.network = network

    @classmethod
    def build(cls, network: Network, weights: Mapping[str, Array], dtype: str = "float32") -> Any:
        """A network with these weights; see :class:`coordconv.backends.protocols.Backend`."""
        module: Any = cls(network)
        module.to(dtype=getattr(cls.TAPE.framework, dtype))
        module.import_weights(weights)
        return module

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        self.state_dict()  # as in TapeLayer
        arrays = {name: to_numpy(tensor) for name, tensor in self.named_parameters()}
        return Weights.of(self.network, self.TAPE.from_state(self.network, arrays))

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights; ValueError, which lists what does not fit, changes nothing."""
        arrays = checked(mapping, self.network.weight_shapes(), layouts(self.network))
        state = self.TAPE.from_state(self.network, arrays)
        self.state_dict()
        with self.TAPE.framework.set_grad_enabled(False):
            for name, parameter in self.named_parameters():
                parameter.copy_(replicated(self.TAPE.tensor(state[name], parameter), parameter))
