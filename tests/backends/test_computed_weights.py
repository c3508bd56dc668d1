"""Canonical weights of torch's and Paddle's layers whose weight others compute."""

import numpy as np
import pytest
from changing_cases import FACES

from coordconv.backends import BACKENDS


@pytest.fixture(params=FACES)
def face(request):
    if BACKENDS[request.param].missing:
        pytest.skip(f"{request.param} is not installed")
    return FACES[request.param]()


def normed(face, kind):
    """A layer, and what computes its weight at each call."""
    layer = face.coord()(3, 4, 3)
    getattr(face.nn.utils, kind)(layer)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_neither_exported_nor_imported(face, kind):
    """The weight of the last call is old after a step, and the next call would overwrite it."""
    layer, weights = normed(face, kind), face.coord()(3, 4, 3).export_weights()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(
        ValueError, match="weight must be a parameter, but is computed from weight_"
    ):
        layer.export_weights()
    with pytest.raises(ValueError, match="weight must be a parameter, but is computed"):
        layer.import_weights(weights)
    assert all((tensor == before[name]).all() for name, tensor in layer.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_both_after_it_is_removed(face):
    layer, weights = normed(face, "weight_norm"), face.coord()(3, 4, 3).export_weights()
    with face.package.no_grad():
        layer.weight_g.copy_(2 * layer.weight_g)
    x = face.images()
    wanted = layer(x)
    face.nn.utils.remove_weight_norm(layer)
    other = face.coord()(3, 4, 3)
    other.import_weights(layer.export_weights())
    assert abs((other(x) - wanted).detach().numpy()).max() <= 1e-5
    layer.import_weights(weights)
    assert np.array_equal(layer.export_weights()["weight"], weights["weight"])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_parametrization_is_exported_as_it_is_now(kind):
    torch = pytest.importorskip("torch")
    from coordconv.backends.torch import CoordConv2d

    layer, x = CoordConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    getattr(torch.nn.utils.parametrizations, kind)(layer).eval()
    layer(x)
    with torch.no_grad():
        for parameter in layer.parametrizations.parameters():
            parameter.mul_(2)
    other = CoordConv2d(3, 4, 3)
    other.import_weights(layer.export_weights())
    assert torch.allclose(other(x), layer(x), atol=1e-5)
    with pytest.raises(ValueError, match="weight must be a parameter, but is computed"):
        layer.import_weights(other.export_weights())
