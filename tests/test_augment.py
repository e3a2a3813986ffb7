"""Random shift against slicing a padded image, and colour jitter against hand-worked pixels."""

import cmath
import colorsys
import math

import cv2
import numpy as np
import pytest
import torch

from so101.learn.augment import color_jitter, random_shift, shift


def images(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shift_is_slicing_an_edge_padded_image(dtype):
    pad, batch = 4, images(81, 9, 7, 3, dtype=dtype)
    offsets = torch.tensor([(top, left) for top in range(9) for left in range(9)])
    shifted = shift(batch, offsets, pad)
    for image, (top, left), got in zip(batch.numpy(), offsets.tolist(), shifted.numpy(), strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        np.testing.assert_array_equal(got, padded[top : top + 9, left : left + 7])


def test_random_shift_draws_each_offset_equally_often_and_one_for_each_camera():
    ramp = torch.arange(32, dtype=torch.uint8).expand(32, 32)  # a pixel's value is its column
    both = torch.stack([ramp, ramp.T], dim=-1)[..., [0, 1, 1]]  # red: column, green and blue: row
    shifted = random_shift(both.expand(2000, 2, 32, 32, 3), 4, torch.Generator().manual_seed(0))
    assert shifted.shape == (2000, 2, 32, 32, 3) and shifted.dtype == torch.uint8
    offsets = shifted[:, :, 16, 16, :2].int() - 16  # of each image, from its centre pixel
    counts = torch.bincount((9 * (offsets[..., 0] + 4) + offsets[..., 1] + 4).flatten(), minlength=81)
    # 4000 draws over 81 cells: 49.4 each; chi-squared with 80 degrees of freedom is below 125 at p = 0.001
    assert len(counts) == 81 and ((counts - 4000 / 81) ** 2 / (4000 / 81)).sum() < 125
    assert (offsets[:, 0] == offsets[:, 1]).all(dim=1).float().mean() < 0.05  # by chance 1 in 81


def test_random_shift_depends_on_its_generator_only():
    batch = images(5, 16, 16, 3)
    once = random_shift(batch, 4, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(once, random_shift(batch, 4, torch.Generator().manual_seed(3)))
    assert not torch.equal(once, random_shift(batch, 4, torch.Generator().manual_seed(4)))


def test_no_jitter_changes_nothing():
    batch = images(3, 2, 8, 8, 3)
    assert torch.equal(color_jitter(batch, torch.Generator(), 0.0, 0.0, 0.0, 0.0, 0.0), batch)


def drawn(index, seed=0):
    """What the first image draws of brightness, contrast, saturation, hue, sharpness: uniform in [-1, 1]."""
    return 2 * torch.rand(1, 5, generator=torch.Generator().manual_seed(seed))[0, index].item() - 1


def factor(strength, index):
    """The same, spread over [1 - strength, 1 + strength]."""
    return 1 + strength * drawn(index)


def test_jitter_by_hand():
    # One image of two pixels: (100, 50, 0) and (20, 40, 60), greys 59.25 and 36.30, mean grey 47.775.
    pair = torch.tensor([[[[100, 50, 0], [20, 40, 60]]]], dtype=torch.uint8)

    def jitter(*strengths):
        return color_jitter(pair, torch.Generator().manual_seed(0), *strengths).flatten().tolist()

    b, c, s = factor(0.4, 0), factor(0.4, 1), factor(0.4, 2)
    flat = [100, 50, 0, 20, 40, 60]
    assert jitter(0.4, 0, 0) == [round(b * v) for v in flat]
    contrasted = [47.775 + c * (v - 47.775) for v in flat]
    assert jitter(0, 0.4, 0) == [max(0, round(v)) for v in contrasted]
    greys = [59.25] * 3 + [36.30] * 3
    saturated = [g + s * (v - g) for v, g in zip(flat, greys, strict=True)]
    assert jitter(0, 0, 0.4) == [max(0, round(v)) for v in saturated]


def test_jitter_clips_instead_of_wrapping_and_differs_by_image():
    bright = torch.full((64, 4, 4, 3), 250, dtype=torch.uint8)
    jittered = color_jitter(bright, torch.Generator().manual_seed(0), 0.5, 0.0, 0.0)
    levels = jittered[:, 0, 0, 0]
    assert (jittered.flatten(1) == levels[:, None]).all()  # an even image stays even
    assert levels.max() == 255 and levels.min() >= 125  # half of 250, never wrapped around to near 0
    assert len(levels.unique()) > 20


def test_a_grey_image_keeps_its_colour_under_saturation():
    grey = torch.arange(48, dtype=torch.uint8).reshape(1, 4, 12, 1).expand(1, 4, 12, 3)
    assert torch.equal(color_jitter(grey, torch.Generator().manual_seed(0), 0.0, 0.0, 0.9), grey)


def test_hue_turns_the_colour_and_leaves_luma_and_grey():
    """Against the standard library's YIQ, whose coefficients are rounded otherwise: hence 4 levels."""
    colours = torch.tensor([[200, 120, 90], [60, 110, 170], [90, 140, 80], [130, 130, 130]], dtype=torch.uint8)
    turned = color_jitter(colours.view(1, 1, 4, 3), torch.Generator().manual_seed(0), 0, 0, 0, hue=0.1)[0, 0]
    angle = 2 * math.pi * 0.1 * drawn(3)
    assert abs(angle) > 0.1  # or there would be nothing to see
    for before, after in zip(colours.tolist(), turned.tolist(), strict=True):
        y, i, q = colorsys.rgb_to_yiq(*(v / 255 for v in before))
        chroma = complex(i, q) * cmath.exp(1j * angle)
        expected = [255 * v for v in colorsys.yiq_to_rgb(y, chroma.real, chroma.imag)]
        np.testing.assert_allclose(after, expected, atol=4)
        luma = [np.dot(rgb, (0.299, 0.587, 0.114)) for rgb in (before, after)]
        assert luma[0] == pytest.approx(luma[1], abs=0.6)  # rounding
    assert turned[3].tolist() == [130, 130, 130] and (turned[0].int() - colours[0].int()).abs().max() > 3


def test_sharpness_moves_each_pixel_away_from_the_smoothed_image():
    batch = images(20, 12, 10, 3) // 2 + 60  # far from 0 and 255
    changed = color_jitter(batch, torch.Generator().manual_seed(3), 0, 0, 0, sharpness=1.0)
    draws = 2 * torch.rand(20, 5, generator=torch.Generator().manual_seed(3))[:, 4] - 1
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    for image, after, draw in zip(batch.numpy(), changed.numpy(), draws.tolist(), strict=True):
        smoothed = cv2.filter2D(image.astype(np.float64), -1, kernel)
        expected = smoothed + 2**draw * (image - smoothed)  # 1/2 .. 2
        expected[[0, -1]], expected[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
        np.testing.assert_allclose(after, expected.clip(0, 255), atol=0.51)
    assert (changed[draws > 0.5].float().std() > batch.float().std()) and 0 < (draws > 0).sum() < 20


def test_jitter_does_all_of_it_at_once_and_stays_an_image():
    batch = images(4, 2, 16, 16, 3)
    jittered = color_jitter(batch, torch.Generator().manual_seed(0), 0.6, 0.3, 0.5, 0.1, 1.0)
    assert jittered.shape == batch.shape and jittered.dtype == torch.uint8
    assert not torch.equal(jittered[0, 0], jittered[0, 1]) and (jittered != batch).float().mean() > 0.8
