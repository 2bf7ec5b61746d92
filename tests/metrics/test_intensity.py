"""Errors whose size is known by hand, and the libraries' opinion on the others."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from synermedgen_hf.metrics import mae, mse, psnr, rmse
from synermedgen_hf.metrics.inputs import UndefinedMetric

RNG = np.random.default_rng(0)
REFERENCE = RNG.uniform(-1000, 2000, (5, 12, 14))
PREDICTION = REFERENCE + RNG.normal(0, 80, REFERENCE.shape)
FIGURES = [mae, rmse, lambda *images: psnr(*images[:2], 4024, *images[2:])]


def test_an_offset():
    moved = REFERENCE - 25
    assert mae(moved, REFERENCE) == pytest.approx(25)
    assert rmse(moved, REFERENCE) == pytest.approx(25)
    assert mse(moved, REFERENCE) == pytest.approx(625)
    assert psnr(moved, REFERENCE, 4024) == pytest.approx(20 * math.log10(4024 / 25))


def test_a_shift_of_a_sine():
    """Over whole periods the mean of (sin(t + s) - sin(t))² is 1 - cos s."""
    t = np.arange(64) * 2 * np.pi / 32
    image = np.tile(np.sin(t), (8, 1))
    assert rmse(np.roll(image, 3, axis=1), image) == pytest.approx(math.sqrt(1 - math.cos(3 * 2 * np.pi / 32)))


def test_an_image_with_itself():
    assert mae(REFERENCE, REFERENCE) == rmse(REFERENCE, REFERENCE) == 0
    assert psnr(REFERENCE, REFERENCE, 4024) == math.inf


def test_only_the_mask_counts():
    mask = np.zeros(REFERENCE.shape, bool)
    mask[1:3, 4:6, 7] = True
    moved = np.where(mask, REFERENCE + 10, REFERENCE + 1000)
    assert mae(moved, REFERENCE, mask) == pytest.approx(10)
    assert mae(moved, REFERENCE, mask.astype(np.uint8) * 255) == pytest.approx(10)
    assert psnr(moved, REFERENCE, 100, mask) == pytest.approx(20)


def test_integers_do_not_overflow():
    low, high = np.full((4, 4), -32000, np.int16), np.full((4, 4), 32000, np.int16)
    assert mae(low, high) == 64000
    assert mae(np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)) == 1


def test_as_scikit_image_and_torchmetrics_have_it():
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("torchmetrics.functional.image")
    assert psnr(PREDICTION, REFERENCE, 4024) == pytest.approx(
        peak_signal_noise_ratio(REFERENCE, PREDICTION, data_range=4024), abs=1e-9
    )
    # A range given as a number; a pair of ends makes torchmetrics clamp both images as well.
    theirs = image.peak_signal_noise_ratio(torch.tensor(PREDICTION), torch.tensor(REFERENCE), data_range=4024.0)
    assert psnr(PREDICTION, REFERENCE, 4024) == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.parametrize("figure", FIGURES)
def test_what_cannot_be_compared(figure):
    with pytest.raises(ValueError, match=r"shape \(5, 12, 13\) and the reference \(5, 12, 14\)"):
        figure(PREDICTION[..., 1:], REFERENCE)
    with pytest.raises(ValueError, match=r"The mask has shape \(12, 14\)"):
        figure(PREDICTION, REFERENCE, np.ones((12, 14), bool))
    broken = REFERENCE.copy()
    broken[0, 0, :2] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 840 values of the reference are NaN or infinite"):
        figure(PREDICTION, broken)
    with pytest.raises(ValueError, match="prediction holds complex128"):
        figure(PREDICTION.astype(complex), REFERENCE)
    with pytest.raises(ValueError, match="2D or 3D"):
        figure(PREDICTION[0, 0], REFERENCE[0, 0])
    with pytest.raises(UndefinedMetric, match="mask is empty"):
        figure(PREDICTION, REFERENCE, np.zeros(REFERENCE.shape, bool))


@pytest.mark.parametrize("data_range", [0, -1, math.nan, math.inf])
def test_a_range_of_nothing(data_range):
    with pytest.raises(ValueError, match="data range must be a finite number above zero"):
        psnr(PREDICTION, REFERENCE, data_range)
