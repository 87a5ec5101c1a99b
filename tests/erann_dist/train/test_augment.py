import numpy as np
import pytest
import torch

from erann_dist.data.permutations import MIXUP, keyed_uniform
from erann_dist.models.log_mel import LogMel
from erann_dist.models.pitch import shift_pitch
from erann_dist.recipe import AugmentSection
from erann_dist.train.augment import (
    Inputs,
    clip_positions,
    draw_augment_params,
    interpolate,
    make_inputs,
    mix_modified,
    spec_augment_mask,
)

EXAMPLES = np.arange(1000, 1008)


def inputs(examples: np.ndarray, seed: int = 3, **keys: object) -> tuple[torch.Tensor, torch.Tensor, Inputs]:
    """A micro-batch whose clip at position p is noise seeded by p, and has the one label p mod 5."""
    augment = AugmentSection.model_validate(keys)
    positions = clip_positions(examples, augment.mixup, augment.partner)
    pcm = np.stack([np.random.default_rng(p).integers(-9000, 9000, 22_050, dtype=np.int16) for p in positions])
    targets = torch.eye(5)[positions % 5]
    params = draw_augment_params(examples, 128, 64, seed, augment)
    return pcm, targets, make_inputs(torch.from_numpy(pcm), targets, params, LogMel(), augment)


@pytest.mark.parametrize("mixup_on", ["waveform", "log_mel"])
@pytest.mark.parametrize("mixup", ["none", "standard", "modified"])
@pytest.mark.parametrize("partner", ["fresh", "in_batch"])
def test_an_example_does_not_depend_on_its_micro_batch(mixup: str, mixup_on: str, partner: str) -> None:
    keys = {"mixup": mixup, "mixup_on": mixup_on, "partner": partner, "pitch_shift": 2}
    *_, whole = inputs(EXAMPLES, **keys)
    *_, first = inputs(EXAMPLES[:2], **keys)
    *_, again = inputs(EXAMPLES, **keys)
    for name in ("log_mel", "mask", "targets"):
        # As to the pitch, other batches are rounded otherwise.
        torch.testing.assert_close(getattr(whole, name)[:2], getattr(first, name), rtol=0, atol=0.01)
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
    pcm, targets, result = inputs(EXAMPLES, mixup=mixup, specaugment=False)
    assert result.mask is None
    share = torch.from_numpy(keyed_uniform(3, MIXUP, EXAMPLES)).float()
    expected = share[:, None] * targets[0::2] + (1 - share[:, None]) * targets[1::2]
    torch.testing.assert_close(result.targets, expected)
    torch.testing.assert_close(result.targets.sum(dim=1), torch.ones(8))
    waves = torch.from_numpy(pcm).float() / 32768
    mix = interpolate if mixup == "standard" else mix_modified
    torch.testing.assert_close(result.log_mel, LogMel()(mix(waves[0::2], waves[1::2], share)))


@pytest.mark.parametrize("mixup", ["standard", "modified"])
def test_log_mels_are_mixed_by_the_share(mixup: str) -> None:
    """The standard rule of what is in dB, the modified one of power."""
    pcm, targets, result = inputs(EXAMPLES, mixup=mixup, mixup_on="log_mel")
    share = keyed_uniform(3, MIXUP, EXAMPLES)
    expected = share[:, None] * targets[0::2].numpy() + (1 - share[:, None]) * targets[1::2].numpy()
    np.testing.assert_allclose(result.targets.numpy(), expected, rtol=1e-6)
    x1, x2 = (LogMel()(torch.from_numpy(pcm[part::2]).float() / 32768).double().numpy() for part in (0, 1))
    r = share[:, None, None, None]
    mixed = r * x1 + (1 - r) * x2
    if mixup == "modified":
        mixed = 10 * np.log10(r * 10 ** (x1 / 10) + (1 - r) * 10 ** (x2 / 10))
    np.testing.assert_allclose(result.log_mel.numpy(), mixed, atol=1e-4, rtol=0)
    *_, in_batch = inputs(EXAMPLES, mixup=mixup, mixup_on="log_mel", partner="in_batch")
    assert in_batch.log_mel.shape == result.log_mel.shape


@pytest.mark.parametrize("mixup", ["standard", "modified"])
def test_silence_mixed_as_log_mel_is_at_the_floor(mixup: str) -> None:
    augment = AugmentSection.model_validate({"mixup": mixup, "mixup_on": "log_mel", "pitch_shift": 2})
    params = draw_augment_params(EXAMPLES, 128, 64, 0, augment)
    pcm = torch.zeros(16, 22_050, dtype=torch.int16)
    mixed = make_inputs(pcm, torch.zeros(16, 5), params, LogMel(), augment).log_mel
    torch.testing.assert_close(mixed, torch.full_like(mixed, -100.0))


def shifts(augment: AugmentSection, examples: np.ndarray, seed: int = 0) -> np.ndarray:
    """The semitones of each crop, as they were drawn."""
    drawn = np.zeros(len(clip_positions(examples, augment.mixup, augment.partner)), int)
    for semitones, crops in draw_augment_params(examples, 128, 64, seed, augment).shifted.items():
        assert (drawn[crops.numpy()] == 0).all()  # each is shifted once
        drawn[crops.numpy()] = semitones
    return drawn


def test_shifts_are_the_clips_own_and_uniform() -> None:
    fresh = AugmentSection(pitch_shift=2)
    examples = np.arange(5000)
    drawn = shifts(fresh, examples)
    assert np.abs(np.bincount(drawn + 2, minlength=5) / 10_000 - 0.2).max() < 0.02
    assert len(np.bincount(drawn + 2)) == 5
    assert np.abs(np.corrcoef(drawn[0::2], drawn[1::2])[0, 1]) < 0.06  # of partners
    assert np.array_equal(shifts(fresh, examples[7:9]), drawn[14:18])
    alone = shifts(AugmentSection(pitch_shift=2, mixup="none"), np.arange(10_000))
    assert np.array_equal(alone, drawn)  # keyed by the clip's position, whatever example it is in
    assert not np.array_equal(shifts(fresh, examples, seed=1), drawn)
    assert (shifts(AugmentSection(), examples) == 0).all()


def test_crops_are_shifted_before_they_are_mixed() -> None:
    keys = {"mixup": "modified", "specaugment": False}
    augment = AugmentSection.model_validate({**keys, "pitch_shift": 2})
    pcm, _, result = inputs(EXAMPLES, **keys, pitch_shift=2)
    drawn = shifts(augment, EXAMPLES, seed=3)
    assert len(set(drawn)) == 5
    waves = [torch.from_numpy(each[None]).float() / 32768 for each in pcm]
    waves = torch.cat([shift_pitch(x, shift) if shift else x for x, shift in zip(waves, drawn, strict=True)])
    share = torch.from_numpy(keyed_uniform(3, MIXUP, EXAMPLES)).float()
    expected = LogMel()(mix_modified(waves[0::2], waves[1::2], share))
    torch.testing.assert_close(result.log_mel, expected, rtol=0, atol=0.01)


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
    mask = spec_augment_mask(draw_augment_params(examples, 128, 1024, 0, AugmentSection()), 128, 1024)[:, 0].numpy()
    columns, rows = mask.all(axis=1), mask.all(axis=2)  # (M, T) time masks, (M, 128) frequency masks
    assert np.array_equal(mask, columns[:, None, :] | rows[:, :, None])
    assert columns.sum(axis=1).max() <= 2 * 64
    assert rows.sum(axis=1).max() <= 2 * 16
    assert 0.8 * 64 < columns.sum(axis=1).mean() < 64
    assert 0.8 * 16 < rows.sum(axis=1).mean() < 16
    runs = np.diff(np.pad(columns.astype(int), ((0, 0), (1, 1))), axis=1) == 1
    assert runs.sum(axis=1).max() == 2
    assert columns.mean(axis=0).min() < 1.5 * columns.mean()
