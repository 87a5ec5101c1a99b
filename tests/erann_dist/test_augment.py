import numpy as np
import pytest
import torch

from erann_dist.augment import clip_positions, draw_choices, make_inputs, mix_modified, mix_standard, spec_augment_mask
from erann_dist.features import LogMel
from erann_dist.keyed import MIXUP, keyed_uniform

EXAMPLES = np.arange(1000, 1008)


def inputs(examples: np.ndarray, **changes: object) -> tuple[torch.Tensor, torch.Tensor, object]:
    """A micro-batch whose clip at position p is noise seeded by p, and has the one label p mod 5."""
    keys = {"mixup": "modified", "partner": "fresh", "spec_augment": True, "seed": 3, **changes}
    positions = clip_positions(examples, keys["mixup"], keys["partner"])
    pcm = np.stack([np.random.default_rng(p).integers(-9000, 9000, 22_050, dtype=np.int16) for p in positions])
    targets = torch.eye(5)[positions % 5]
    choices = draw_choices(examples, 64, keys.pop("seed"))
    return pcm, targets, make_inputs(torch.from_numpy(pcm), targets, choices, LogMel(), **keys)


@pytest.mark.parametrize("mixup", ["none", "standard", "modified"])
@pytest.mark.parametrize("partner", ["fresh", "in_batch"])
def test_an_example_does_not_depend_on_its_micro_batch(mixup: str, partner: str) -> None:
    *_, whole = inputs(EXAMPLES, mixup=mixup, partner=partner)
    *_, first = inputs(EXAMPLES[:2], mixup=mixup, partner=partner)
    *_, again = inputs(EXAMPLES, mixup=mixup, partner=partner)
    for name in ("log_mel", "mask", "targets"):
        assert torch.equal(getattr(whole, name)[:2], getattr(first, name))
        assert torch.equal(getattr(whole, name), getattr(again, name))


def test_seeds_differ() -> None:
    (*_, a), (*_, b) = inputs(EXAMPLES, seed=3), inputs(EXAMPLES, seed=4)
    assert not torch.equal(a.targets, b.targets)
    assert not torch.equal(a.mask, b.mask)


def test_fresh_partners_are_the_positions_2e_and_2e_plus_1() -> None:
    assert clip_positions(np.array([0, 1, 7]), "modified", "fresh").tolist() == [0, 1, 2, 3, 14, 15]
    assert clip_positions(np.array([0, 1, 7]), "modified", "in_batch").tolist() == [0, 1, 7]
    assert clip_positions(np.array([0, 1, 7]), "none", "fresh").tolist() == [0, 1, 7]


@pytest.mark.parametrize("mixup", ["standard", "modified"])
def test_labels_and_waveforms_are_mixed_by_the_same_share(mixup: str) -> None:
    pcm, targets, result = inputs(EXAMPLES, mixup=mixup, spec_augment=False)
    assert result.mask is None
    share = torch.from_numpy(keyed_uniform(3, MIXUP, EXAMPLES)).float()
    expected = share[:, None] * targets[0::2] + (1 - share[:, None]) * targets[1::2]
    torch.testing.assert_close(result.targets, expected)
    torch.testing.assert_close(result.targets.sum(dim=1), torch.ones(8))
    waves = torch.from_numpy(pcm).float() / 32768
    mix = mix_standard if mixup == "standard" else mix_modified
    torch.testing.assert_close(result.log_mel, LogMel()(mix(waves[0::2], waves[1::2], share)))


def test_in_batch_partner_is_the_neighbour() -> None:
    _, targets, result = inputs(EXAMPLES, mixup="standard", partner="in_batch")
    share = torch.from_numpy(keyed_uniform(3, MIXUP, EXAMPLES)).float()
    swapped = targets[[1, 0, 3, 2, 5, 4, 7, 6]]
    torch.testing.assert_close(result.targets, share[:, None] * targets + (1 - share[:, None]) * swapped)


def test_modified_mixing_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    x1, x2 = 0.5 * rng.standard_normal((3, 4000)), 0.01 * rng.standard_normal((3, 4000))
    r = np.array([0.1, 0.5, 0.9])
    g1, g2 = (20 * np.log10(np.sqrt((x**2).mean(axis=1))) for x in (x1, x2))
    p = (1 / (1 + 10 ** ((g1 - g2) / 20) * (1 - r) / r))[:, None]
    expected = (p * x1 + (1 - p) * x2) / np.sqrt(p**2 + (1 - p) ** 2)
    mixed = mix_modified(*(torch.from_numpy(a) for a in (x1, x2, r)))
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-9)


def test_modified_mixing_balances_loudness() -> None:
    """At equal shares a loud and a soft clip are equally strong in the mix."""
    loud, soft = torch.zeros(1, 1000), torch.zeros(1, 1000)
    loud[0, ::2], soft[0, 1::2] = 0.8, 0.001
    mixed = mix_modified(loud, soft, torch.tensor([0.5]))
    torch.testing.assert_close(mixed[0, ::2], mixed[0, 1::2])


def test_silent_clips_mix_to_finite_values() -> None:
    silence, sound = torch.zeros(2, 100), torch.rand(2, 100)
    share = torch.tensor([2.0**-53, 1 - 2.0**-53])
    for pair in ((silence, sound), (sound, silence), (silence, silence)):
        assert torch.isfinite(mix_modified(*pair, share)).all()


def test_spec_augment_masks() -> None:
    examples = np.arange(2000)
    mask = spec_augment_mask(draw_choices(examples, 1024, seed=0), 1024)[:, 0].numpy()
    columns, rows = mask.all(axis=1), mask.all(axis=2)  # (M, T) time masks, (M, 128) frequency masks
    assert np.array_equal(mask, columns[:, None, :] | rows[:, :, None])
    assert columns.sum(axis=1).max() <= 2 * 64
    assert rows.sum(axis=1).max() <= 2 * 16
    assert 0.8 * 64 < columns.sum(axis=1).mean() < 64
    assert 0.8 * 16 < rows.sum(axis=1).mean() < 16
    runs = np.diff(np.pad(columns.astype(int), ((0, 0), (1, 1))), axis=1) == 1
    assert runs.sum(axis=1).max() == 2
    assert columns.mean(axis=0).min() < 1.5 * columns.mean()
