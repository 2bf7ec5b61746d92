"""Errors of intensities: MAE, RMSE and PSNR, over a whole image or inside a mask.

They are in the units of the images. Nothing is clipped here, and no range is guessed: whoever wants a window clips both
images to it first, as [`~synermedgen_hf.metrics.protocols`] does.
"""

import math

import numpy as np

from .inputs import UndefinedMetric, check_pair, check_range


def mae(prediction, reference, mask=None) -> float:
    """
    Mean absolute error.

    Args:
        prediction, reference (array-like of shape `(rows, columns)` or `(slices, rows, columns)`): In one unit.
        mask (array-like of the same shape, *optional*): Where to compare; by default everywhere.

    Returns:
        `float`: In the unit of the images.

    Raises:
        `UndefinedMetric`: The mask is empty.
        `ValueError`: The images differ in shape or hold values that are not finite.
    """
    return float(np.abs(_differences(prediction, reference, mask)).mean())


def rmse(prediction, reference, mask=None) -> float:
    """
    Root of the mean squared error. Arguments and errors as of [`mae`].

    Returns:
        `float`: In the unit of the images.
    """
    return math.sqrt(mse(prediction, reference, mask))


def mse(prediction, reference, mask=None) -> float:
    """
    Mean squared error. Arguments and errors as of [`mae`].

    Returns:
        `float`: In the unit of the images, squared.
    """
    return float(np.square(_differences(prediction, reference, mask)).mean())


def psnr(prediction, reference, data_range: float, mask=None) -> float:
    """
    Peak signal-to-noise ratio, `10 log10(data_range² / MSE)`.

    Args:
        prediction, reference, mask: As of [`mae`].
        data_range (`float`): Between the lowest and the highest value that the scale has, not the one that an image
            happens to reach: 4024 for HU in [-1024, 3000], 255 for 8 bits.

    Returns:
        `float`: In dB; infinite where nothing differs.

    Raises:
        `UndefinedMetric`: The mask is empty.
        `ValueError`: As of [`mae`], or the range is not above zero.
    """
    data_range = check_range(data_range)
    error = mse(prediction, reference, mask)
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def finite_psnr(prediction, reference, data_range: float, mask=None) -> float:
    """
    [`psnr`] for means over slices and cases, of which a single infinite one would leave nothing.

    Raises:
        `UndefinedMetric`: Nothing differs. Otherwise as [`psnr`].
    """
    found = psnr(prediction, reference, data_range, mask)
    if math.isinf(found):
        raise UndefinedMetric("Nothing differs: the PSNR is infinite.")
    return found


def _differences(prediction, reference, mask) -> np.ndarray:
    prediction, reference, mask = check_pair(prediction, reference, mask)
    if mask is not None:
        if not mask.any():
            raise UndefinedMetric("The mask is empty: there is nothing to compare.")
        prediction, reference = prediction[mask], reference[mask]
    return np.subtract(prediction, reference, dtype=np.float64)


__all__ = ["finite_psnr", "mae", "mse", "psnr", "rmse"]
