"""What every comparison of two images asks of them first: one grid, finite values, an area that is not empty."""

import numpy as np


class UndefinedMetric(ValueError):
    """
    A figure that does not exist for this input, such as a mean over an empty mask.

    [`~synermedgen_hf.metrics.evaluate_case`] records it as `None` with the reason, so that one empty slice does not end
    the evaluation of a thousand.
    """


def check_pair(prediction, reference, mask=None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """
    Two images that can be compared, as float arrays, and the mask as bool.

    Args:
        prediction, reference (array-like of shape `(rows, columns)` or `(slices, rows, columns)`): In the same units.
        mask (array-like of the same shape, *optional*): True, or above zero, where the images are compared.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray | None]`: float64 stays float64, all else becomes float32, which holds
        every 16-bit value.

    Raises:
        `ValueError`: Shapes differ, are not 2D or 3D, or values are not finite real numbers; it says which.
    """
    prediction, reference = (
        _as_float(array, name) for array, name in ((prediction, "prediction"), (reference, "reference"))
    )
    if prediction.shape != reference.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape} and the reference {reference.shape}: only images of one grid "
            "can be compared. Resample the prediction onto the reference first."
        )
    if prediction.ndim not in (2, 3) or not prediction.size:
        raise ValueError(f"Images must be 2D or 3D and not empty, got shape {prediction.shape}.")
    for array, name in ((prediction, "prediction"), (reference, "reference")):
        if bad := int(array.size - np.count_nonzero(np.isfinite(array))):
            raise ValueError(f"{bad} of {array.size} values of the {name} are NaN or infinite.")
    if mask is None:
        return prediction, reference, None
    mask = np.asarray(mask)
    if mask.shape != reference.shape:
        raise ValueError(f"The mask has shape {mask.shape} and the images {reference.shape}: they must share one grid.")
    if bad := int(mask.size - np.count_nonzero(np.isfinite(mask))):
        raise ValueError(f"{bad} of {mask.size} values of the mask are NaN or infinite.")
    return prediction, reference, mask > 0


def check_window(window: tuple[float, float]) -> tuple[float, float]:
    """
    `(low, high)` as floats.

    Raises:
        `ValueError`: It is no pair of finite numbers in ascending order, so its range would be zero or less.
    """
    low, high = (float(end) for end in window)
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"A window goes from a lower to a higher finite value, got ({low:g}, {high:g}).")
    return low, high


def check_range(data_range: float) -> float:
    """
    The data range as a float.

    Raises:
        `ValueError`: It is not a finite number above zero.
    """
    data_range = float(data_range)
    if not (np.isfinite(data_range) and data_range > 0):
        raise ValueError(f"The data range must be a finite number above zero, got {data_range:g}.")
    return data_range


def check_structure(reference: np.ndarray):
    """
    Raise an [`UndefinedMetric`] where SSIM has nothing to compare: nothing but background is always like itself.

    Args:
        reference (`np.ndarray`): Within the range, of any shape.
    """
    if not reference.size:
        raise UndefinedMetric("The area is empty: there is nothing to compare.")
    if reference.min() == reference.max():
        raise UndefinedMetric("Within the range, the reference has one value only: there is no structure to compare.")


def _as_float(array, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"The {name} holds {array.dtype}: real numbers are needed.")
    wide = array.dtype.itemsize > 4 or (array.dtype.kind in "iu" and array.dtype.itemsize > 2)
    return np.asarray(array, np.float64 if wide else np.float32)


__all__ = ["UndefinedMetric", "check_pair", "check_range", "check_structure", "check_window"]
