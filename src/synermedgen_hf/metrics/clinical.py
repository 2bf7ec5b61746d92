"""Figures in the terms of those who use a scan: HU of tissues, bone, uptake, and slices that fit together."""

import numpy as np

from .inputs import UndefinedMetric, check_pair
from .intensity import mae

# HU of the reference, from the lower end on and below the upper one. They adjoin, so every voxel is in one of them:
# what lies between pure tissues is partial volume, and goes to the nearer one.
TISSUES = {
    "air": (-np.inf, -900.0),
    "lung": (-900.0, -250.0),
    "fat": (-250.0, -30.0),
    "soft": (-30.0, 250.0),
    "bone": (250.0, np.inf),
}
BONE = 250.0  # HU; above the soft tissues of a scan with contrast agent, too


def hu_error_by_tissue(prediction, reference, mask=None) -> dict[str, dict]:
    """
    Errors of HU by the tissue that the reference shows.

    Args:
        prediction, reference (array-like of shape `(rows, columns)` or `(slices, rows, columns)`): In HU.
        mask (array-like of the same shape, *optional*): Where to compare; by default everywhere.

    Returns:
        `dict[str, dict]`: For `air` (below -900 HU), `lung` (to -250), `fat` (to -30), `soft` (to 250) and `bone`:
        `voxels`, `mae` and `bias`, the mean of prediction minus reference, in HU; `None` where there is no such voxel.

    Raises:
        `ValueError`: The images differ in shape or hold values that are not finite.
    """
    prediction, reference, mask = check_pair(prediction, reference, mask)
    if mask is not None:
        prediction, reference = prediction[mask], reference[mask]
    found = {}
    for name, (low, high) in TISSUES.items():
        inside = (reference >= low) & (reference < high)
        error = np.subtract(prediction[inside], reference[inside], dtype=np.float64)
        means = {"mae": float(np.abs(error).mean()), "bias": float(error.mean())} if error.size else {}
        found[name] = {"voxels": int(error.size), "mae": None, "bias": None, **means}
    return found


def bone_dice(prediction, reference, mask=None, threshold: float = BONE) -> float:
    """
    Dice coefficient of what is denser than bone's threshold in either image.

    Args:
        prediction, reference, mask: As of [`hu_error_by_tissue`].
        threshold (`float`, defaults to 250): In HU.

    Returns:
        `float`: 1 where both agree, 0 where they have no voxel in common.

    Raises:
        `UndefinedMetric`: There is bone in neither.
        `ValueError`: As of [`hu_error_by_tissue`].
    """
    prediction, reference, mask = check_pair(prediction, reference, mask)
    mask = True if mask is None else mask
    one, other = (prediction > threshold) & mask, (reference > threshold) & mask
    total = int(one.sum()) + int(other.sum())
    if not total:
        raise UndefinedMetric(f"Neither image has a voxel above {threshold:g} HU to compare.")
    return 2 * int((one & other).sum()) / total


def suv_errors(prediction, reference, mask=None) -> dict[str, float]:
    """
    How far mean and maximum uptake of a region are off, prediction minus reference.

    Args:
        prediction, reference (array-like of shape `(rows, columns)` or `(slices, rows, columns)`): In SUV.
        mask (array-like of the same shape, *optional*): The region, such as a lesion; by default all.

    Returns:
        `dict[str, float]`: `suvmean` and `suvmax`, in SUV.

    Raises:
        `UndefinedMetric`: The mask is empty.
        `ValueError`: The images differ in shape or hold values that are not finite.
    """
    prediction, reference, mask = check_pair(prediction, reference, mask)
    if mask is not None:
        prediction, reference = prediction[mask], reference[mask]
    if not prediction.size:
        raise UndefinedMetric("The mask is empty: there is no uptake to compare.")
    return {
        "suvmean": float(prediction.mean(dtype=np.float64) - reference.mean(dtype=np.float64)),
        "suvmax": float(prediction.max()) - float(reference.max()),
    }


def z_consistency(prediction, reference, mask=None) -> float:
    """
    Mean absolute error of the change from one slice to the next: what is seen as bands when slices that were made one
    by one are looked at across. An error that is the same in all slices does not count.

    Args:
        prediction, reference (array-like of shape `(slices, rows, columns)`): In one unit.
        mask (array-like of the same shape, *optional*): Changes count where both slices are inside.

    Returns:
        `float`: In the unit of the images; 0 for equal changes.

    Raises:
        `UndefinedMetric`: There are no two neighbouring slices inside the mask.
        `ValueError`: The images are not volumes, differ in shape or hold values that are not finite.
    """
    prediction, reference, mask = check_pair(prediction, reference, mask)
    if reference.ndim != 3:
        raise ValueError(f"Consistency along the slices needs volumes, got images of shape {reference.shape}.")
    if len(reference) < 2:
        raise UndefinedMetric("A single slice has no neighbour to be consistent with.")
    inside = None if mask is None else mask[1:] & mask[:-1]
    return mae(np.diff(prediction, axis=0), np.diff(reference, axis=0), inside)


__all__ = ["bone_dice", "hu_error_by_tissue", "suv_errors", "z_consistency"]
