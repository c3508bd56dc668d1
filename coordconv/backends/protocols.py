"""What a backend provides, as a type that mypy holds every backend to.

Weights are canonical, arrays NumPy's and channels first, so that whatever compares, trains or
converts the networks of backends is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from coordconv.grid import Array
from coordconv.networks import Network
from coordconv.recording import Recorded
from coordconv.weights.canonical import Weights


class Backend(Protocol):
    """A package of this folder, as :func:`coordconv.backends.load` returns it.

    What it has for a network is below. For layers it has those of its framework and a
    ``PositionBias``, with ``export_weights`` and ``import_weights``, and ``AddCoords``.
    """

    COMPILED: bool
    """Whether the framework's users mostly put its compiler before a network."""

    recorded: Callable[..., Recorded]
    """``recorded(module, *, names=None, output_gradient=None, **kwargs) -> run``, for any module.

    ``run(*arrays)`` returns, by dotted names and in the order of the calls, what each module inside
    returned, and then ``"model output"``. A module's later calls are numbered, as in ``relu#2``;
    the parts of a tuple, a list, a mapping or a dataclass have their place, key or field in
    brackets, as in ``lstm[0]``. ``names`` gives modules other names, so that those of two models
    meet; ``kwargs`` go to the call. With an ``output_gradient``, an array or arrays by name, there
    follow in the order of the pass back ``"gradient of NAME"`` of each, and of ``"model input"``
    (``"model input[0]"`` and so on where there are several). When run, TypeError says that there is
    no array in what the module returned, ValueError that ``names`` has a module that was not called
    or that ``output_gradient`` does not fit. The module is left as it was; bfloat16, which NumPy
    lacks, becomes float32. Those of Flax also take ``channels_last``, and Linen's the variables
    after the module.
    """

    def build(self, network: Network, weights: Mapping[str, Array], dtype: str = "float32") -> Any:
        """The network as a module with these weights, computing in that type.

        It has ``network``, ``export_weights()`` and ``import_weights(mapping)``. A Linen module has
        no weights: its ``export_weights(variables)`` takes them, its ``import_weights(mapping)``
        returns them. NotImplementedError says which option the framework lacks, ValueError which
        weights do not fit.
        """

    def evaluate(
        self,
        module: Any,
        weights: Mapping[str, Array],
        x: Array,
        dy: Array | None = None,
        *,
        compiled: bool = ...,
    ) -> tuple[Array, dict[str, Array]]:
        """The output of a built network for ``x (N, C, *S)`` with these weights, and gradients.

        Those are, by name, of ``x`` and of all weights; none without the output's, ``dy``. The
        framework's compiler comes before the network where ``compiled``, whose default is
        ``COMPILED``. bfloat16 is returned as float32.
        """

    def trainer(
        self,
        module: Any,
        weights: Mapping[str, Array],
        optimizer: str = "adam",
        epsilon: float = 1e-8,
    ) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
        """Training of a network built in float32, from these weights on.

        The optimizer is ``"adam"`` (``beta`` 0.9 and 0.999, ``epsilon`` beside the root of the
        corrected moment) or ``"sgd"``, plain gradient descent. What is returned is
        ``step(x, target, learning_rate) -> loss``, which takes one step, and ``export()``, the
        weights that it leaves. The loss is the mean softmax cross-entropy where the target is
        labels, integers ``(N,)``, and the mean squared error where it is floats of the output's
        shape.
        """

    def read_state(self, path: str) -> dict[str, Array]:
        """The arrays of a file that the framework's users save, by its names and in its layout.

        It runs no code that the file holds. ValueError says what is wrong with the file.
        """

    def from_state(self, network: Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """What ``read_state`` read, by canonical names and in canonical layout.

        Arrays that are not the network's stay as they are, for the caller to refuse.
        """

    def write_state(self, path: str, network: Network, weights: Mapping[str, Array]) -> None:
        """Write canonical weights as such a file, whole or not at all."""


if TYPE_CHECKING:
    from coordconv.backends import flax, linen, paddle, torch

    _torch: Backend = torch
    _paddle: Backend = paddle
    _flax: Backend = flax
    _linen: Backend = linen
