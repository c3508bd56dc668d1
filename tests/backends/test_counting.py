"""What tools that count operations say of a CoordConv of torch."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coordconv import position_bias
from coordconv.backends.torch import CoordConv2d, fuse

BATCH, CHANNELS, OUT, SIZE = 4, 8, 16, 20
X = torch.zeros(BATCH, CHANNELS, SIZE, SIZE)


def layer():
    return CoordConv2d(CHANNELS, OUT, 3, padding=1).eval()


def products(channels, batch=BATCH):
    return batch * channels * OUT * 9 * SIZE**2


FEATURES, BOTH, ONE_MAP = products(CHANNELS), products(CHANNELS + 2), products(2, 1)


@pytest.mark.parametrize(
    ("way", "wanted"), [(position_bias.APPEND, BOTH), (position_bias.MAP, FEATURES + ONE_MAP)]
)
def test_torch_counts_what_is_computed(way, wanted, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", way)
    with FlopCounterMode(display=False) as counter:
        layer()(X)
    assert counter.get_total_flops() == 2 * wanted


def test_torch_counts_a_fused_layer_as_the_plain_one():
    fused = fuse(layer(), (SIZE, SIZE))
    with FlopCounterMode(display=False) as counter:
        fused(X)
    assert counter.get_total_flops() == 2 * FEATURES


def test_fvcore():
    count = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    for module, wanted in (
        (layer(), {BOTH, FEATURES + ONE_MAP}),
        (fuse(layer(), (20, 20)), {FEATURES}),
    ):
        analysis = count(module, X).unsupported_ops_warnings(False)
        assert analysis.by_operator()["conv"] in wanted


def test_torchinfo():
    summary = pytest.importorskip("torchinfo").summary
    found = summary(layer(), input_data=X, verbose=0)
    bias = BATCH * OUT * SIZE**2
    assert (found.total_mult_adds, found.total_params) == (BOTH + bias, 10 * OUT * 9 + OUT)


def test_thop_is_told_of_the_class():
    thop = pytest.importorskip("thop")
    from thop.vision.basic_hooks import count_convNd

    rules = {CoordConv2d: count_convNd}
    (found, _), (unknown, _) = (
        thop.profile(nn.Sequential(layer()), (X,), custom_ops=each, verbose=False)
        for each in (rules, None)
    )
    assert (found, unknown) == (FEATURES, 0)


def test_ptflops_is_told_of_the_class():
    ptflops = pytest.importorskip("ptflops")

    def count(module, inputs, output):
        module.__flops__ += output.numel() * (module.weight[0].numel() + 1)

    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    found, _ = ptflops.get_model_complexity_info(
        nn.Sequential(layer()),
        (CHANNELS, SIZE, SIZE),
        backend="pytorch",
        custom_modules_hooks={CoordConv2d: count},
        **options,
    )
    assert found == (BOTH + BATCH * OUT * SIZE**2) // BATCH
