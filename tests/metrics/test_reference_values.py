"""Figures that scikit-image and MONAI gave for three images with noise, copied as numbers: ours are theirs.

Where a library pads or crops otherwise, its own figure is another one; what remains then is in the tests of SSIM. The
figures of SynthRAD2023's own script (63.948816 HU, 34.058384 dB, 0.92474506) belong to a pair of which nothing else is
known; its definition is held against scikit-image in the tests of the protocols.
"""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from synermedgen_hf.metrics import ms_ssim, psnr, ssim


@pytest.fixture(scope="module")
def pairs():
    """A plane and a volume in [0, 1], and each pixel of the plane four times: MS-SSIM needs 176 pixels a side."""
    rng, made = np.random.default_rng(0), {}
    for name, shape in (("plane", (128, 128)), ("volume", (48, 64, 64))):
        reference = gaussian_filter(rng.random(shape), 2)
        reference = (reference - reference.min()) / np.ptp(reference)
        made[name] = np.clip(reference + rng.normal(0, 0.05, shape), 0, 1), reference
    made["doubled"] = [image.repeat(2, axis=0).repeat(2, axis=1) for image in made["plane"]]
    return made


def test_psnr(pairs):
    assert psnr(*pairs["plane"], 1.0) == pytest.approx(26.03172, abs=5e-6)


def test_ssim_of_a_plane(pairs):
    assert ssim(*pairs["plane"], 1.0) == pytest.approx(0.840758, abs=5e-7)
    assert ssim(*pairs["plane"], 1.0, kernel="gaussian") == pytest.approx(0.794023, abs=5e-7)


def test_ssim_of_a_volume_is_not_the_mean_over_its_slices(pairs):
    assert ssim(*pairs["volume"], 1.0) == pytest.approx(0.75646, abs=5e-6)
    assert np.mean([ssim(*slices, 1.0) for slices in zip(*pairs["volume"], strict=True)]) == pytest.approx(
        0.70684, abs=5e-6
    )
    assert ssim(*pairs["volume"], 1.0, kernel="gaussian") == pytest.approx(0.69358, abs=5e-6)


def test_ms_ssim(pairs):
    """MONAI's figure; torchmetrics' own averages over a reflected border."""
    assert ms_ssim(*pairs["doubled"], 1.0) == pytest.approx(0.90825, abs=5e-6)
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("torchmetrics.functional.image")
    tensors = [torch.tensor(array)[None, None] for array in pairs["doubled"]]
    theirs = image.multiscale_structural_similarity_index_measure(*tensors, data_range=1.0)
    assert float(theirs) == pytest.approx(0.90816, abs=5e-6)


def test_what_torchmetrics_gives_and_why(pairs):
    """Reflected and not cropped its figures are others; cropped they are ours, but for its population covariance."""
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("torchmetrics.functional.image")

    def theirs(name, crop=0, **options):
        # Its convolution in 3D is a hundred times slower in float64.
        dtype = torch.float32 if name == "volume" else torch.float64
        tensors = [torch.tensor(array, dtype=dtype)[None, None] for array in pairs[name]]
        whole, rim = image.structural_similarity_index_measure(
            *tensors, data_range=1.0, return_full_image=True, **options
        )
        inner = (..., *[slice(crop, -crop)] * (rim.ndim - 2))
        return float(rim[inner].mean()) if crop else float(whole)

    uniform = {"gaussian_kernel": False, "kernel_size": 7}
    assert theirs("plane", **uniform) == pytest.approx(0.841250, abs=5e-7)
    assert theirs("plane", crop=3, **uniform) == pytest.approx(0.841005, abs=5e-7)
    population = structural_similarity(*pairs["plane"], data_range=1.0, use_sample_covariance=False)
    assert population == pytest.approx(0.841005, abs=5e-7)
    assert theirs("plane") == pytest.approx(0.796542, abs=5e-7)
    assert theirs("plane", crop=5) == pytest.approx(0.794023, abs=5e-7)
    assert theirs("volume") == pytest.approx(0.70976, abs=5e-6)
    assert theirs("volume", crop=5) == pytest.approx(0.69358, abs=1e-5)  # of float32


def test_equal_background_flatters(pairs):
    padded = [np.pad(image, 64) for image in pairs["plane"]]
    assert ssim(*padded, 1.0) == pytest.approx(0.961, abs=5e-4)
    assert psnr(*padded, 1.0) == pytest.approx(32.1, abs=0.05)


def test_the_scale_must_begin_at_zero(pairs):
    """In [-1, 1] the same images have other ratios of luminance."""
    assert ssim(*(2 * image - 1 for image in pairs["plane"]), 2.0) == pytest.approx(0.814, abs=5e-4)
