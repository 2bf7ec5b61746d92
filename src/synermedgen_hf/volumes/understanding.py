"""The slice of a scan that understanding looks at, made as the questions of training make theirs.

Weights learn from 8-bit pictures: slices along the axis of their region, over the window of the whole volume, with
square pixels. A scan that is shown to them otherwise is a scan of a kind they have never seen.
"""

from PIL import Image

from ..image_processing_synermedgen import SynerMedGenImageProcessor, guess_window, to_display
from .reading import AXES, Volume, check_finite, slice_spacing, slices_of, stack_axis


def region_axis(volume: Volume, region: str | None = None) -> str:
    """
    The axis along which the training data of a region are cut.

    Args:
        volume ([`Volume`]): Where nothing is known of the region, it is cut as it was acquired; so is a heart, which
            lies obliquely. A single slice is itself.
        region (`str`, *optional*): Such as `"whole-body"`.
    """
    if 1 in volume.array.shape:
        return ("sagittal", "coronal", "axial")[volume.array.shape.index(1)]
    return AXES.get(region, "axial") if region and region != "heart" else stack_axis(volume)


def shown_window(volume: Volume) -> tuple[float, float]:
    """
    The lowest and highest value that training would show of a scan: those of its modality where the file says it, else
    those that its values tell.
    """
    if volume.modality is None:
        return guess_window(volume.array)
    # As training measures windows, whatever a checkpoint's are.
    return SynerMedGenImageProcessor().intensity_window(volume.array, volume.modality)


def understanding_slice(volume: Volume, axis: str, window: tuple[float, float] | None = None) -> Image.Image:
    """
    The middle slice of a scan as a picture for `pipe.identify`, `pipe.answer` and `pipe.score_answers`.

    Args:
        volume ([`Volume`]): Any scan.
        axis (`str`): Of the slices, see [`region_axis`].
        window (`tuple[float, float]`, *optional*): Of the whole volume; by default [`shown_window`].

    Returns:
        `PIL.Image.Image`: 8-bit grey.

    Raises:
        `ValueError`: Voxels are NaN or infinite.
    """
    check_finite(volume, "the scan")
    slices = slices_of(volume, axis)
    window = shown_window(volume) if window is None else window
    return to_display(slices[len(slices) // 2], window, slice_spacing(volume, axis)[1:])


__all__ = ["region_axis", "shown_window", "understanding_slice"]
