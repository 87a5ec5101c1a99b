import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.models.base import count_parameters
from erann_dist.models.erann import ARB, ERANN, Variant
from erann_dist.models.spec import build_model, macs_of

# Parameters without the input BatchNorm for N = 527, 50, 10, 8, and GMACs for 10 s and N = 527.
TABLE = {
    "ERANN-0-3": (13_715_521, 13_531_876, 13_516_476, 13_515_706, 31.65),
    "ERANN-0-4": (24_287_569, 24_042_868, 24_022_348, 24_021_322, 56.26),
    "ERANN-0-6": (54_432_241, 54_065_428, 54_034_668, 54_033_130, 126.54),
    "ERANN-1-3": (13_739_713, 13_556_068, 13_540_668, 13_539_898, 19.32),
    "ERANN-1-4": (24_330_577, 24_085_876, 24_065_356, 24_064_330, 34.32),
    "ERANN-1-6": (54_529_009, 54_162_196, 54_131_436, 54_129_898, 77.18),
    "ERANN-2-4": (24_502_609, 24_257_908, 24_237_388, 24_236_362, 26.20),
    "ERANN-2-5": (38_195_809, 37_890_052, 37_864_412, 37_863_130, 40.93),
    "ERANN-2-6": (54_916_081, 54_549_268, 54_518_508, 54_516_970, 58.92),
    "ERANN-3-6": (56_464_369, 56_097_556, 56_066_796, 56_065_258, 53.00),
}


@pytest.mark.parametrize("name", TABLE)
def test_sizes_are_the_papers(name: str) -> None:
    *sizes, gmacs = TABLE[name]
    for classes, size in zip((527, 50, 10, 8), sizes, strict=True):
        with torch.device("meta"):
            assert count_parameters(build_model(name, classes)) == size + 256
    assert macs_of(name, 527, 441_000) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@given(s_m=st.integers(0, 3), width=st.integers(1, 2), blocks=st.integers(1, 2), classes=st.integers(1, 20))
@settings(max_examples=12, deadline=None)
def test_logits_for_every_variant(s_m: int, width: int, blocks: int, classes: int) -> None:
    model = ERANN(Variant(s_m, width), classes).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 1, 128, blocks * 4**s_m))
    assert logits.shape == (2, classes)
    assert str(model.variant) == f"ERANN-{s_m}-{width}"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("ERANN-2-1", (1, 1, 128, 24), "multiple of 16"),
        ("ERANN-0-1", (1, 1, 128, 0), "T >= 1"),
        ("ERANN-1-1", (1, 1, 64, 64), "(B, 1, 128, T)"),
        ("ERANN-1-1", (1, 128, 64), "(B, 1, 128, T)"),
    ],
)
def test_impossible_shapes_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match="takes") as error:
        build_model(name, 2)(torch.zeros(shape))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["ERANN-4-1", "ERANN-1-0", "ERANN-1", "CNN14", "ERANN-1-6x"])
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="ERANN"):
        Variant.parse(name)


def test_initialisation() -> None:
    """He's, or torch's own: uniform up to 1/√fan-in."""
    torch.manual_seed(0)
    he, torchs = build_model("ERANN-3-1", 10), build_model("ERANN-3-1", 10, "pytorch")
    assert he.fc2.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert he.fc1.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
    for layer in (torchs.fc1, torchs.fc2):
        assert layer.weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.1)


@pytest.mark.parametrize("stride", [(2, 1), (2, 2), (2, 4)])
def test_sliced_shortcut_is_the_strided_convolution(stride: tuple[int, int]) -> None:
    """Against NCHW and torch's own stride, forward and backward, in double precision."""
    torch.manual_seed(0)
    block = ARB(8, 16, stride).double()
    assert block.shortcut is not None
    x = torch.randn(2, 8, 16, 64, dtype=torch.float64)
    ours = x.clone().to(memory_format=torch.channels_last).requires_grad_()
    theirs = x.clone().requires_grad_()
    h = block.conv2(
        torch.nn.functional.leaky_relu(
            block.bn2(block.conv1(torch.nn.functional.leaky_relu(block.bn1(theirs), 0.01))), 0.01
        )
    )
    expected = h + torch.nn.functional.conv2d(theirs, block.shortcut.weight, stride=stride)
    result = block(ours)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_trains_in_channels_last() -> None:
    model = build_model("ERANN-2-1", 5)
    formats = []
    model.stages[2][1].register_forward_hook(
        lambda module, args, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    for _ in range(2):
        model(torch.randn(4, 1, 128, 64)).square().sum().backward()
    assert formats == [True, True]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.is_contiguous() for p in model.parameters())


def test_mask_zeroes_what_lies_behind_the_input_batch_norm() -> None:
    torch.manual_seed(0)
    model = build_model("ERANN-0-1", 3).eval()
    model.input_bn.running_mean.uniform_(-60, -20)
    model.input_bn.running_var.uniform_(50, 200)
    x = torch.randn(2, 1, 128, 32) * 10 - 40
    mask = torch.zeros(2, 1, 128, 32, dtype=torch.bool)
    mask[0, :, 10:20] = True
    # In evaluation the input at its mean is 0 behind the BatchNorm.
    at_mean = torch.where(mask, model.input_bn.running_mean[None, None, :, None], x)
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), model(at_mean), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(x, mask)[0], model(x)[0])
