"""Scans to files: NIfTI, MHA and NRRD, on exactly the grid and in the axis order of the file they came from.

A file is written under a temporary name beside its place and renamed, so that nothing half-written is left.
"""

import os
from pathlib import Path

import nibabel
import numpy as np

from .reading import NIFTI, Volume, extension


def write_volume(volume: Volume, path: str | Path, overwrite: bool = False) -> Path:
    """
    Write one scan.

    Args:
        volume ([`Volume`]): Its array and affine; what `original` holds decides the order of the axes.
        path (`str` or `Path`): `.nii`, `.nii.gz`, `.mha`, `.mhd`, `.nrrd` or `.nhdr`.
        overwrite (`bool`, defaults to `False`): Replace a file that is there.

    Returns:
        `Path`: Of the file.

    Raises:
        `ValueError`: The name is not that of a volume.
        `FileExistsError`: The file is there already.
        `OSError`: It cannot be written; nothing half-written is left.
        `ImportError`: SimpleITK is needed and not installed.
    """
    path = Path(path)
    ending = extension(path)
    if not ending:
        raise ValueError(f"{path} is not the name of a volume: it should end in .nii.gz, .nii, .mha or .nrrd.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another name, or overwrite.")
    array, affine = in_original_order(volume)
    unfinished = path.with_name(f".{path.name[: -len(ending)]}.{os.getpid()}.tmp{ending}")
    try:
        if ending in NIFTI:
            image = nibabel.Nifti1Image(array, affine)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, unfinished)
        else:
            _write_itk(array, affine, unfinished)
        os.replace(unfinished, path)
    except RuntimeError as error:  # of SimpleITK
        raise OSError(f"{path} cannot be written: {str(error).strip().splitlines()[-1]}") from error
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def in_original_order(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine with the axes of the file that the volume came from."""
    if volume.original is None:
        return volume.array, volume.affine
    back = nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), volume.original.orientation)
    array = nibabel.orientations.apply_orientation(volume.array, back)
    return np.ascontiguousarray(array), volume.original.affine


def _write_itk(array: np.ndarray, affine: np.ndarray, path: Path):
    try:
        import SimpleITK as sitk
    except ImportError:
        raise ImportError(f"Writing {extension(path)} needs SimpleITK: pip install 'synermedgen-hf[dicom]'.") from None
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    affine = np.diag([-1, -1, 1, 1]) @ affine  # RAS to LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=path.suffix.lower() != ".mhd")


__all__ = ["in_original_order", "write_volume"]
