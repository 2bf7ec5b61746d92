"""SSIM and MS-SSIM in 2D and 3D: scikit-image's numbers, several times faster.

A plane of the four window sums that SSIM is made of (x, y, x² + y², xy) fits the processor's cache, a volume of them
does not. So planes are taken one after another: sums along the stack are carried on from plane to plane, sums within a
plane are a few additions of shifted copies, and the finished plane of the map is all that is kept. scikit-image filters
five whole volumes, three times each.

Only windows that lie wholly inside the image count, as in scikit-image's mean: nothing is padded, so nothing that is
padded can flatter. torchmetrics reflects the image at its border instead and averages over that rim too.

Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE TIP
13(4), 2004; Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment", Asilomar 2003.
"""

from collections.abc import Iterator

import numpy as np
from scipy.ndimage import correlate1d

from .inputs import UndefinedMetric, check_pair, check_range

K1, K2 = 0.01, 0.03
SIZES = {"uniform": 7, "gaussian": 11}
SIGMA = 1.5  # voxels; 11 taps reach 3.5 of them to either side
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang 2003, from the finest scale to the coarsest
SYNTHRAD2025_SIDE = 97  # (7 - 1) * 2**4 + 1 voxels: what the 7-window needs at the coarsest of five scales


def ssim(prediction, reference, data_range: float, mask=None, kernel: str = "uniform") -> float:
    """
    Mean structural similarity, over all windows that lie inside the image.

    Args:
        prediction, reference (array-like of shape `(rows, columns)` or `(slices, rows, columns)`): In one unit, with
            zero where the scale begins: luminance is compared by ratio, so HU have to be shifted by 1024.
        data_range (`float`): From the lowest to the highest value of the scale.
        mask (array-like of the same shape, *optional*): Average over windows whose centre lies in it. What lies outside
            still enters the windows at its rim; set it to one value beforehand if it shall not.
        kernel (`str`, defaults to `"uniform"`): `"uniform"`, 7 voxels a side and sample covariance, is scikit-image's
            default and SynthRAD2023's definition. `"gaussian"`, 11 voxels, sigma 1.5 and population covariance, is that
            of Wang 2004.

    Returns:
        `float`: 1 for equal images.

    Raises:
        `UndefinedMetric`: No window fits the image, or none is centred in the mask.
        `ValueError`: The images differ in shape or hold values that are not finite, the range is not above zero, or
            there is no such kernel.

    Example:

    ```python
    ssim(np.clip(made, -1024, 3000) + 1024, np.clip(real, -1024, 3000) + 1024, data_range=4024)
    ```
    """
    prediction, reference, mask = check_pair(prediction, reference, mask)
    check_range(data_range)
    if mask is None:
        return float(ssim_map(prediction, reference, data_range, kernel).mean())
    inside = valid(mask, kernel)
    if not inside.any():
        raise UndefinedMetric("No SSIM window is centred in the mask and lies wholly inside the image.")
    # Windows elsewhere need not be computed: the map of the box around the mask is that part of the map.
    box = _bounding_box(inside)
    around = tuple(slice(side.start, side.stop + SIZES[kernel] - 1) for side in box)
    return float(ssim_map(prediction[around], reference[around], data_range, kernel)[inside[box]].mean())


def ssim_map(prediction, reference, data_range: float, kernel: str = "uniform", part: str = "ssim") -> np.ndarray:
    """
    Structural similarity of each window that lies inside the image.

    Args:
        prediction, reference, data_range, kernel: As of [`ssim`].
        part (`str`, defaults to `"ssim"`): `"contrast"` leaves the comparison of means out.

    Returns:
        `np.ndarray`: float64, shorter than the image by 6 (uniform) or 10 (Gaussian) along each axis.

    Raises:
        As of [`ssim`].
    """
    prediction, reference, _ = check_pair(prediction, reference)
    c1, c2 = ((factor * check_range(data_range)) ** 2 for factor in (K1, K2))
    size = _size(kernel)
    if min(prediction.shape) < size:
        raise UndefinedMetric(
            f"SSIM with a {kernel} window needs at least {size} voxels along each axis; the image has shape "
            f"{prediction.shape}."
        )
    # An unbiased estimate for the uniform window; Wang's weighted moments for the Gaussian one.
    count = size**prediction.ndim
    covariance = count / (count - 1) if kernel == "uniform" else 1.0
    result = np.empty([side - size + 1 for side in prediction.shape])
    planes = result if result.ndim == 3 else result[None]
    for plane, (mean_x, mean_y, squares, products) in zip(
        planes, _window_means(prediction, reference, kernel), strict=True
    ):
        # In place where it can be: what is not allocated does not leave the cache.
        mean_xy = mean_x * mean_y
        mean_x *= mean_x
        mean_y *= mean_y
        mean_x += mean_y  # x² + y² of the means
        products -= mean_xy
        products *= 2 * covariance
        products += c2
        squares -= mean_x
        squares *= covariance
        squares += c2
        np.divide(products, squares, out=plane)
        if part == "ssim":
            mean_xy *= 2
            mean_xy += c1
            mean_x += c1
            mean_xy /= mean_x
            plane *= mean_xy
    return result


def valid(array: np.ndarray, kernel: str = "uniform") -> np.ndarray:
    """The part of an array at the centres of the windows of [`ssim_map`]: without 3 (uniform) or 5 voxels of border."""
    margin = _size(kernel) // 2
    return array[tuple(slice(margin, side - margin) for side in array.shape)]


def ms_ssim(prediction, reference, data_range: float, kernel: str = "gaussian") -> float:
    """
    Multi-scale structural similarity of Wang 2003: contrast and structure at five scales, means at the coarsest only,
    each averaged over the image and raised to its weight. Between scales, blocks of 2 voxels a side are averaged.

    Args:
        prediction, reference, data_range, kernel: As of [`ssim`].

    Returns:
        `float`: 1 for equal images. An average below zero counts as zero, since it has no fractional power.

    Raises:
        `UndefinedMetric`: The image is smaller than 176 voxels (Gaussian) or 112 (uniform) along an axis.
        `ValueError`: As of [`ssim`].
    """
    prediction, reference, _ = check_pair(prediction, reference)
    needed = _size(kernel) * 2 ** (len(SCALE_WEIGHTS) - 1)
    if min(prediction.shape) < needed:
        raise UndefinedMetric(
            f"MS-SSIM with a {kernel} window needs at least {needed} voxels along each axis; the image has shape "
            f"{prediction.shape}."
        )
    result = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            prediction, reference = _halve(prediction), _halve(reference)
        part = "ssim" if scale == len(SCALE_WEIGHTS) - 1 else "contrast"
        result *= max(ssim_map(prediction, reference, data_range, kernel, part).mean(), 0.0) ** weight
    return float(result)


def ms_ssim_synthrad2025(prediction, reference, data_range: float, mask=None) -> float:
    """
    Multi-scale structural similarity as the SynthRAD2025 challenge computes it, which is not that of Wang 2003: the
    whole SSIM, means included, counts at every scale; it is raised to the scale's weight in each voxel and averaged
    then, over the mask; the window is uniform, of 7 voxels.

    An image of less than 97 voxels along an axis is continued to 97 by its outermost voxels, and the mask with it.
    Between scales every second voxel is kept, averaged with its lower neighbours, where zero stands before the first;
    of the mask every second voxel is kept as it is.

    Args:
        prediction, reference, data_range, mask: As of [`ssim`].

    Returns:
        `float`: 1 for equal images.

    Raises:
        As of [`ssim`].
    """
    prediction, reference, mask = check_pair(prediction, reference, mask)
    mask = np.ones(reference.shape, bool) if mask is None else mask
    short = [max(SYNTHRAD2025_SIDE - side, 0) for side in reference.shape]
    padding = [(lack // 2, lack - lack // 2) for lack in short]
    prediction, reference, mask = (np.pad(array, padding, mode="edge") for array in (prediction, reference, mask))
    result = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            prediction, reference = _every_second(prediction), _every_second(reference)
            mask = mask[(slice(None, None, 2),) * mask.ndim]
        inside = valid(mask)
        if not inside.any():
            raise UndefinedMetric(f"At scale {scale + 1} of 5 no SSIM window is centred in the mask.")
        similar = ssim_map(prediction, reference, data_range)[inside]
        result *= np.mean(np.maximum(similar, 0) ** weight)
    return float(result)


def _size(kernel: str) -> int:
    if kernel not in SIZES:
        raise ValueError(f"There is no SSIM window {kernel!r}. Choose one of {', '.join(SIZES)}.")
    return SIZES[kernel]


def _window_means(x: np.ndarray, y: np.ndarray, kernel: str) -> Iterator[np.ndarray]:
    """For each plane of the map, the means of x, y, x² + y² and xy over its windows, `(4, rows, columns)`."""
    size = _size(kernel)
    depth = size if x.ndim == 3 else 1
    x, y = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    distance = np.arange(size) - size // 2
    weights = np.exp(-(distance**2) / (2 * SIGMA**2)) if kernel == "gaussian" else np.ones(size)
    weights /= weights.sum()
    along = weights if depth > 1 else np.ones(1)
    last = np.zeros((depth, 4, *x.shape[1:]))  # the planes within reach, each in place number % depth
    total = np.zeros_like(last[0])
    for number in range(len(x)):
        place = last[number % depth]
        if kernel == "uniform":
            total -= place
        place[0], place[1] = x[number], y[number]
        np.multiply(place[0], place[0], out=place[2])
        place[2] += place[1] * place[1]
        np.multiply(place[0], place[1], out=place[3])
        if kernel == "uniform":
            total += place
        if number < depth - 1:
            continue
        if kernel == "uniform":
            means = _sum_of_7(_sum_of_7(total, -2), -1)
            means *= 1 / (depth * size**2)
        else:
            # The oldest plane is the one that the next would replace.
            total = np.tensordot(np.roll(along, number + 1), last, 1)
            means = total
            for axis in (-2, -1):
                means = _within(correlate1d(means, weights, axis, mode="constant"), size, axis)
        yield means


def _sum_of_7(array: np.ndarray, axis: int) -> np.ndarray:
    """Sums over 7 neighbours along an axis, in four additions: 7 = 4 + 2 + 1."""
    array = np.moveaxis(array, axis, 0)
    two = array[:-1] + array[1:]
    four = two[:-2] + two[2:]
    result = four[:-3] + two[4:-1]
    result += array[6:]
    return np.moveaxis(result, 0, axis)


def _within(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    return np.moveaxis(np.moveaxis(array, axis, 0)[size // 2 : array.shape[axis] - size // 2], 0, axis)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        there = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(there[0]), int(there[-1]) + 1))
    return tuple(box)


def _halve(array: np.ndarray) -> np.ndarray:
    """Means of blocks of 2 voxels a side; an odd last one is left out."""
    for axis in range(array.ndim):
        array = np.moveaxis(array, axis, 0)
        even = len(array) // 2 * 2
        array = np.moveaxis((array[:even:2] + array[1:even:2]) / 2, 0, axis)
    return array


def _every_second(array: np.ndarray) -> np.ndarray:
    for axis in range(array.ndim):
        array = np.moveaxis(array, axis, 0)
        halved = array[::2] / 2
        halved[1:] += array[1:-1:2] / 2
        array = np.moveaxis(halved, 0, axis)
    return array


__all__ = ["ms_ssim", "ms_ssim_synthrad2025", "ssim", "ssim_map"]
