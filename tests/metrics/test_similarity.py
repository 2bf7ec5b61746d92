"""The fast SSIM against scikit-image, torchmetrics and pencil and paper."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from skimage.metrics import structural_similarity

from synermedgen_hf.metrics import ms_ssim, ms_ssim_synthrad2025, ssim, ssim_map
from synermedgen_hf.metrics.inputs import UndefinedMetric

WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
THEIRS = {"uniform": {}, "gaussian": WANG}
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, as published


def pair(*shape, noise=0.05):
    """A smooth image in [0, 1], and the same with noise."""
    rng = np.random.default_rng(0)
    reference = gaussian_filter(rng.standard_normal(shape), 2)
    reference = (reference - reference.min()) / np.ptp(reference)
    return reference + rng.normal(0, noise, shape), reference


@pytest.mark.parametrize("kernel", ["uniform", "gaussian"])
@pytest.mark.parametrize("shape", [(7, 40), (32, 41), (11, 12, 40), (24, 31, 17)])
def test_scikit_images_numbers(kernel, shape):
    if min(shape) < 11 and kernel == "gaussian":
        shape = (11, 40)
    prediction, reference = pair(*shape)
    theirs, their_map = structural_similarity(prediction, reference, data_range=1.0, full=True, **THEIRS[kernel])
    margin = {"uniform": 3, "gaussian": 5}[kernel]
    inner = their_map[(slice(margin, -margin),) * len(shape)]
    assert ssim(prediction, reference, 1.0, kernel=kernel) == pytest.approx(theirs, abs=1e-12)
    np.testing.assert_allclose(ssim_map(prediction, reference, 1.0, kernel), inner, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 44), (20, 24, 22)])
def test_inside_a_mask_only_windows_centred_in_it_count(shape):
    prediction, reference = pair(*shape)
    mask = np.zeros(shape, bool)
    mask[(slice(0, 11),) * len(shape)] = True  # up to the border, where windows do not fit
    _, their_map = structural_similarity(prediction, reference, data_range=1.0, full=True)
    inner = (slice(3, -3),) * len(shape)
    expected = their_map[inner][mask[inner]].mean()
    assert ssim(prediction, reference, 1.0, mask) == pytest.approx(expected, abs=1e-12)


def test_scanner_units_lose_no_digit():
    """HU with a background that the running sums come back to."""
    prediction, reference = (4024 * np.clip(image - 0.4, 0, 1) for image in pair(40, 24, 24))
    reference[10:20] = prediction[10:20] = 0
    theirs = structural_similarity(prediction, reference, data_range=4024)
    assert ssim(prediction, reference, 4024) == pytest.approx(theirs, abs=1e-12)
    single = structural_similarity(prediction.astype(np.float32), reference.astype(np.float32), data_range=4024)
    assert ssim(prediction.astype(np.float32), reference.astype(np.float32), 4024) == pytest.approx(single, abs=1e-5)


@pytest.mark.parametrize("kernel", ["uniform", "gaussian"])
def test_an_image_with_itself(kernel):
    for shape in [(180, 176), (12, 13, 14)]:
        _, reference = pair(*shape)
        assert ssim(reference, reference, 1.0, kernel=kernel) == 1
    _, reference = pair(180, 176)
    assert ms_ssim(reference, reference, 1.0, kernel) == ms_ssim_synthrad2025(reference, reference, 1.0) == 1


def test_constant_images_differ_in_luminance_only():
    one, other = np.full((16, 16), 0.2), np.full((16, 16), 0.6)
    c1 = 0.01**2
    assert ssim(one, other, 1.0) == pytest.approx((2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1))
    np.testing.assert_allclose(ssim_map(one, other, 1.0, part="contrast"), 1)


def test_offset_and_contrast_by_hand():
    """A pattern that repeats every 7 pixels has the same mean and variance in every window."""
    values = np.array([1.0, 4, 2, 8, 5, 7, 3]) / 10
    reference = np.tile(values, (20, 4))
    prediction = 0.5 * reference + 0.3
    x, y, variance = values.mean(), 0.5 * values.mean() + 0.3, 7 * values.var() * 7 / (49 - 1)
    luminance = (2 * x * y + 0.01**2) / (x**2 + y**2 + 0.01**2)
    contrast = (2 * 0.5 * variance + 0.03**2) / (1.25 * variance + 0.03**2)
    assert ssim(prediction, reference, 1.0) == pytest.approx(luminance * contrast, abs=1e-12)


def test_what_torchmetrics_does_otherwise():
    """It reflects the image at its border and averages over that rim: without the rim its numbers are ours."""
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("torchmetrics.functional.image")
    prediction, reference = pair(64, 64)
    tensors = [torch.tensor(array)[None, None] for array in (prediction, reference)]
    theirs, their_map = image.structural_similarity_index_measure(*tensors, data_range=1.0, return_full_image=True)
    ours = ssim(prediction, reference, 1.0, kernel="gaussian")
    assert ours == pytest.approx(float(their_map[..., 5:-5, 5:-5].mean()), abs=1e-6)
    assert abs(ours - float(theirs)) > 1e-4


def test_ms_ssim_is_that_of_torchmetrics_but_for_the_border():
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("torchmetrics.functional.image")
    prediction, reference = pair(256, 192)
    tensors = [torch.tensor(array)[None, None] for array in (prediction, reference)]
    theirs = image.multiscale_structural_similarity_index_measure(*tensors, data_range=1.0)
    assert ms_ssim(prediction, reference, 1.0) == pytest.approx(float(theirs), abs=2e-3)


def test_ms_ssim_by_scales():
    """From scikit-image's SSIM and block means; contrast is what is left of SSIM when means are equal."""
    prediction, reference = pair(176, 180)
    expected = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            prediction, reference = (
                array[: len(array) // 2 * 2, : array.shape[1] // 2 * 2]
                .reshape(len(array) // 2, 2, array.shape[1] // 2, 2)
                .mean((1, 3))
                for array in (prediction, reference)
            )
        _, whole = structural_similarity(prediction, reference, data_range=1.0, full=True, **WANG)
        if scale < 4:
            x, y = (gaussian_filter(array, 1.5, truncate=3.5) for array in (prediction, reference))
            whole = whole / ((2 * x * y + 1e-4) / (x * x + y * y + 1e-4))
        expected *= whole[5:-5, 5:-5].mean() ** weight
    assert ms_ssim(*pair(176, 180), 1.0) == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_of_synthrad2025_by_scales():
    """Step by step as the challenge does it, with a convolution for its halving; 3D, smaller than 97 along one axis."""
    prediction, reference = pair(99, 97, 40)
    mask = np.zeros(reference.shape, bool)
    mask[20:80, 10:90, 5:38] = True
    ours = ms_ssim_synthrad2025(prediction, reference, 1.0, mask)
    padding = [(0, 0), (0, 0), (28, 29)]
    prediction, reference, mask = (np.pad(array, padding, mode="edge") for array in (prediction, reference, mask))
    expected, inner = 1.0, (slice(3, -3),) * 3
    for weight in SCALE_WEIGHTS:
        _, whole = structural_similarity(prediction, reference, data_range=1.0, full=True)
        expected *= np.mean(np.clip(whole, 0, None)[inner][mask[inner]] ** weight)
        prediction, reference = (
            fftconvolve(array, np.full((2, 2, 2), 1 / 8), mode="same")[::2, ::2, ::2]
            for array in (prediction, reference)
        )
        mask = mask[::2, ::2, ::2]
    assert ours == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_compared():
    prediction, reference = pair(16, 16)
    with pytest.raises(UndefinedMetric, match=r"at least 7 voxels along each axis; the image has shape \(3, 16, 16\)"):
        ssim(np.stack([prediction] * 3), np.stack([reference] * 3), 1.0)
    with pytest.raises(UndefinedMetric, match="at least 176 voxels"):
        ms_ssim(prediction, reference, 1.0)
    with pytest.raises(UndefinedMetric, match="No SSIM window is centred in the mask"):
        ssim(prediction, reference, 1.0, np.zeros((16, 16), bool))
    rim = np.ones((16, 16), bool)
    rim[3:-3, 3:-3] = False
    with pytest.raises(UndefinedMetric, match="No SSIM window is centred in the mask"):
        ssim(prediction, reference, 1.0, rim)
    with pytest.raises(ValueError, match="no SSIM window 'boxcar'. Choose one of uniform, gaussian"):
        ssim(prediction, reference, 1.0, kernel="boxcar")
    for figure in (ssim, ms_ssim, ms_ssim_synthrad2025):
        with pytest.raises(ValueError, match="data range must be"):
            figure(*pair(176, 176), 0.0)
        with pytest.raises(ValueError, match=r"\(16, 15\) and the reference \(16, 16\)"):
            figure(prediction[:, 1:], reference, 1.0)
