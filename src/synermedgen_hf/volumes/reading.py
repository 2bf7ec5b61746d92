"""Scans from files into one form: float32 voxels in scanner units on RAS+ axes, with the affine that places them.

nibabel reads NIfTI, SimpleITK reads MHA, NRRD and DICOM series; both are brought to the same axes here, so that nothing
above this file has to know where a scan came from.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import nibabel.processing
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from .dicom import Series, list_series, read_series  # noqa: F401 (where one looks for them)

NIFTI = (".nii", ".nii.gz")
UNITS_IN_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # of a NIfTI's affine by its code: m, mm, micrometres
ITK_READERS = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO"}
ITK = tuple(ITK_READERS)
EXTENSIONS = NIFTI + ITK
AXES = {"whole-body": "coronal"}  # of the slices; every other region: axial
# Above what a voxel belongs to the patient: HU, SUV.
BODY_ABOVE = {"CT": -500.0, "CBCT": -500.0, "PET": 0.1}
MR_BODY_SHARE = 0.05  # of the window's high end


@dataclass(frozen=True)
class Grid:
    """
    How a file holds its voxels, to write on the same grid again.

    Args:
        affine (`np.ndarray`): `(4, 4)`, of the file's own axes, to mm in RAS+.
        orientation (`np.ndarray`): `(3, 2)`, nibabel's: which way each of the file's axes goes.
    """

    affine: np.ndarray
    orientation: np.ndarray


@dataclass
class Volume:
    """
    Args:
        array (`np.ndarray`): `(x, y, z)`; the axes grow to the patient's right, front and head as nearly as the grid
            allows. float32, or the file's own integers where it needs no scaling.
        affine (`np.ndarray`): `(4, 4)`, voxel index to mm in RAS+.
        modality (`str`, *optional*): Where the file says it, or a synthesis made it.
        unit (`str`, *optional*): Of the voxels: HU, SUV or a.u.
        original ([`Grid`], *optional*): The file's own axes.
    """

    array: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    unit: str | None = None
    original: Grid | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along x, y, z."""
        return tuple(float(side) for side in np.linalg.norm(self.affine[:3, :3], axis=0))


def extension(path: str | Path) -> str:
    """`".nii.gz"`, `".mha"`, ...; empty for what is no file of a volume."""
    name = str(path).lower()
    return next((ending for ending in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(ending)), "")


def read_volume(path: str | Path, series_uid: str | None = None, modality: str | None = None) -> Volume:
    """
    Read one scan.

    Args:
        path (`str` or `Path`): `.nii`, `.nii.gz`, `.mha`, `.mhd`, `.nrrd`, or a folder with a DICOM series.
        series_uid (`str`, *optional*): Which series, where a folder holds several: see [`list_series`].
        modality (`str`, *optional*): Of the scan, where the file does not say it or says it otherwise.

    Returns:
        [`Volume`], with a modality where DICOM says it. Its voxels may hold NaN where the file's do.

    Raises:
        `ValueError`: Not a volume, damaged, not three-dimensional, without a usable affine, or a DICOM series that is
            no regular grid.
        `FileNotFoundError`: There is no such file.
        `ImportError`: SimpleITK, pydicom or pysuv is needed and not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if not path.is_dir() and not extension(path):
        raise ValueError(f"{path} is not a volume: known are {', '.join(EXTENSIONS)} and folders of one DICOM series.")
    if series_uid is not None and not path.is_dir():
        raise ValueError(f"{path} is a file: a series UID chooses among the DICOM series of a folder.")
    if path.is_dir():
        array, affine, known, unit = read_series(path, series_uid)
        volume = _turned(array, affine, known, unit)
    else:
        volume = _read_nifti(path) if extension(path) in NIFTI else _read_itk(path)
    shape, affine = volume.array.shape, volume.affine
    if volume.array.ndim != 3 or min(shape) < 1:
        raise ValueError(f"{path} has shape {shape}: a volume of three dimensions is needed.")
    if not _spans_space(affine):
        raise ValueError(f"{path} has no usable affine: its axes do not span space.")
    if modality is not None:
        volume.modality = modality
    return volume


def check_finite(volume: Volume, what: str):
    """Raise a `ValueError` for a volume with voxels that are no numbers; `what` it is called."""
    if volume.array.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(volume.array)))):
        raise ValueError(
            f"{bad} voxels of {what} are NaN or infinite: replace them first, by the value of air or of the background."
        )


def same_grid(one: Volume, other: Volume, tolerance_mm: float = 1e-2) -> bool:
    """Whether every voxel of two volumes lies at the same place."""
    if one.array.shape != other.array.shape:
        return False
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * (*one.array.shape, 1)
    return bool(np.abs(corners @ (one.affine - other.affine).T).max() <= tolerance_mm)


def shared_extent(one: Volume, other: Volume) -> float:
    """Overlap of the boxes of two volumes in space, as a share of the smaller one's."""
    boxes = []
    for volume in (one, other):  # between the middles of the outer voxels; a single slice is as thick as it is
        shape = np.array(volume.array.shape)
        low = np.where(shape == 1, -0.5, 0)
        high = shape - 1 - low
        corners = [[*np.where(side, high, low), 1] for side in np.ndindex(2, 2, 2)]
        places = np.array(corners) @ volume.affine.T
        boxes.append((places[:, :3].min(0), places[:, :3].max(0)))
    (low_a, high_a), (low_b, high_b) = boxes
    common = np.clip(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0, None)
    smaller = min(np.prod(np.maximum(high_a - low_a, 1e-6)), np.prod(np.maximum(high_b - low_b, 1e-6)))
    return float(np.prod(common) / smaller)


def resample(volume: Volume, onto: Volume, fill: float) -> Volume:
    """A volume on the grid of another one, linearly interpolated; `fill` where it does not reach."""
    image = nibabel.Nifti1Image(np.asarray(volume.array, np.float32), volume.affine)
    grid = (onto.array.shape, onto.affine)
    moved = nibabel.processing.resample_from_to(image, grid, order=1, mode="constant", cval=fill)
    return Volume(np.asarray(moved.dataobj, np.float32), onto.affine)


def slices_of(volume: Volume, axis: str) -> np.ndarray:
    """
    A view of a volume as `(slices, rows, columns)` the way a radiologist looks at them.

    Args:
        volume ([`Volume`]): Any.
        axis (`str`): `"axial"`: from the feet up, anterior at the top, the patient's right on the left; `"coronal"`:
            from back to front, the head at the top, the patient's right on the left; `"sagittal"`: from left to right,
            the head at the top, the front on the left.
    """
    if axis == "axial":
        return volume.array[::-1, ::-1].transpose(2, 1, 0)
    if axis == "sagittal":
        return volume.array[:, ::-1, ::-1].transpose(0, 2, 1)
    return volume.array[::-1, :, ::-1].transpose(1, 2, 0)


def stack_axis(volume: Volume) -> str:
    """The direction in which a stack of thick slices was acquired: that of its coarsest voxels."""
    coarsest = int(np.argmax(np.round(volume.spacing, 3)[::-1]))  # of equal ones, the axial one
    return ("axial", "coronal", "sagittal")[coarsest]


def slice_spacing(volume: Volume, axis: str) -> tuple[float, float, float]:
    """mm between slices, rows and columns of [`slices_of`]."""
    x, y, z = volume.spacing
    return {"axial": (z, y, x), "coronal": (y, z, x), "sagittal": (x, z, y)}[axis]


def _spans_space(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6)


def _read_nifti(path: Path) -> Volume:
    try:
        image = nibabel.load(path)
        if len(image.shape) > 3 and all(side == 1 for side in image.shape[3:]):
            image = image.slicer[(slice(None),) * 3 + (0,) * (len(image.shape) - 3)]
        if len(image.shape) != 3:
            raise ValueError(f"{path} has shape {image.shape}: a volume of three dimensions is needed.")
        affine = image.affine.copy()
        affine[:3] *= UNITS_IN_MM.get(int(image.header["xyzt_units"]) & 7, 1.0)  # the other bits are of time
        if not _spans_space(affine):
            raise ValueError(f"{path} has no usable affine: its axes do not span space.")
        if not image.header["sform_code"] and not image.header["qform_code"]:
            raise ValueError(
                f"{path} has no affine: sform_code and qform_code are 0, so that left and right are unknown. Set the "
                "affine of the scanner first, for example with nibabel: image.set_sform(affine, code=1)."
            )
        array = np.asanyarray(image.dataobj)  # keeps integers where no scaling is needed
    except (ImageFileError, HeaderDataError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: it is damaged or not complete ({error}).") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {array.dtype}: one real number a voxel is needed.")
    return _turned(array, affine)


def _read_itk(path: Path) -> Volume:
    try:
        import SimpleITK as sitk
    except ImportError:
        raise ImportError(f"Reading {path.name} needs SimpleITK: pip install 'synermedgen-hf[dicom]'.") from None
    try:
        # Named, since ITK knows endings in small letters only.
        image = sitk.ReadImage(str(path), imageIO=ITK_READERS[extension(path)])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} cannot be read: it is damaged or not complete ({reason}).") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path} is no volume of three dimensions with one value a voxel.")
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return _turned(array, np.diag([-1, -1, 1, 1]) @ affine)  # LPS to RAS


def _turned(array: np.ndarray, affine: np.ndarray, modality: str | None = None, unit: str | None = None) -> Volume:
    """The axes of a file brought to those nearest to right, front and head."""
    orientation = nibabel.io_orientation(affine)
    turned = nibabel.orientations.apply_orientation(array, orientation)
    turned = plain(turned.copy())
    placed = affine @ nibabel.orientations.inv_ornt_aff(orientation, array.shape)
    return Volume(turned, placed, modality, unit, Grid(affine, orientation))


def plain(array: np.ndarray) -> np.ndarray:
    """Native integers of up to 16 bits as they are, anything else as float32."""
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.astype(np.float32)


__all__ = [
    "Grid",
    "Series",
    "Volume",
    "check_finite",
    "extension",
    "list_series",
    "read_volume",
    "resample",
    "same_grid",
    "shared_extent",
    "slice_spacing",
    "slices_of",
    "stack_axis",
]
