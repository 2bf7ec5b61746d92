"""DICOM series: which are in a folder, whether their slices make a volume, and what their values mean.

SimpleITK puts slices together, pydicom reads headers, pysuv makes SUV of activities. What is said here, in errors too,
never names a patient.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODALITIES = {"CT": "CT", "PT": "PET", "MR": "MRI"}
POSITION_TOLERANCE = 0.05  # of the distance of slices
TILT_TOLERANCE_MM = 0.5  # over the whole stack


@dataclass(frozen=True)
class Series:
    """
    One series of a folder, without a word about the patient.

    Args:
        uid (`str`): SeriesInstanceUID.
        modality (`str`): DICOM's: `"CT"`, `"MR"`, `"PT"`, ...
        slices (`int`): Files.
        rows, columns (`int`): Of a slice.
        files (`tuple[str, ...]`): Paths, in the order of their positions.
    """

    uid: str
    modality: str
    slices: int
    rows: int
    columns: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """
    The slices of a series as one grid.

    Args:
        files (`list[str]`): Along the normal of the slices.
        headers (`list`): pydicom's, of the files, without voxels.
        affine (`np.ndarray`): `(4, 4)`, of column, row and slice to mm in RAS+.
    """

    files: list[str]
    headers: list
    affine: np.ndarray


def list_series(folder: str | Path) -> list[Series]:
    """
    The image series in a folder, largest first.

    Raises:
        `ValueError`: There is none.
        `ImportError`: pydicom or SimpleITK is not installed.
    """
    sitk, pydicom = dicom_libraries()
    folder = str(folder)
    found = []
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder):
        # Details off: GDCM's own ids of sub-series are no UIDs anybody knows.
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, uid, False)
        header = pydicom.dcmread(files[0], stop_before_pixels=True, force=True)
        if "Rows" in header:
            found.append(
                Series(
                    str(header.get("SeriesInstanceUID", uid)),
                    str(header.get("Modality", "")),
                    len(files),
                    int(header.Rows),
                    int(header.Columns),
                    tuple(files),
                )
            )
    if not found:
        raise ValueError(f"{folder} holds 0 DICOM series: name a folder with one.")
    return sorted(found, key=lambda series: -series.slices)


def choose_series(folder: str | Path, series_uid: str | None = None) -> Series:
    """
    The series of a folder that is meant.

    Raises:
        `ValueError`: Several are there and none is named, or the named one is not there.
    """
    series = list_series(folder)
    listed = "; ".join(f"{one.uid} ({one.modality}, {one.slices} slices)" for one in series)
    if series_uid is not None:
        chosen = [one for one in series if one.uid == series_uid]
        if not chosen:
            raise ValueError(f"{folder} has no series {series_uid}. There are: {listed}.")
        return chosen[0]
    if len(series) > 1:
        raise ValueError(f"{folder} holds {len(series)} DICOM series. Choose one by its UID: {listed}.")
    return series[0]


def read_series(
    folder: str | Path, series_uid: str | None = None
) -> tuple[np.ndarray, np.ndarray, str | None, str | None]:
    """
    One series in scanner units.

    Args:
        folder (`str` or `Path`): Of DICOM files.
        series_uid (`str`, *optional*): Which series, where there are several.

    Returns:
        `(array, affine, modality, unit)`: voxels `(x, y, z)` in the files' own order, `(4, 4)` to mm in RAS+; HU, SUV
        by body weight, or a.u. The modality is `None` where there is none of ours.

    Raises:
        `ValueError`: The slices make no volume: missing, doubled, tilted, of several orientations, or compressed in a
            way that cannot be read; or PET without what SUV needs.
    """
    sitk, _ = dicom_libraries()
    series = choose_series(folder, series_uid)
    stack = stack_of(folder, series)
    modality = MODALITIES.get(series.modality)
    factor = suv_factor(folder, stack.headers[0]) if modality == "PET" else None
    scales = [
        float(header.get(name, default))
        for header in stack.headers
        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    ]
    whole = all(scale.is_integer() for scale in scales) and stack.headers[0].get("BitsStored", 16) <= 16
    reader = sitk.ImageSeriesReader()
    # A type is named, since ITK takes that of the first slice, whose slope may be another than those of the rest.
    reader.SetOutputPixelType(sitk.sitkInt32 if whole else sitk.sitkFloat32)
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(stack.files)
    try:
        # One slice of each way of packing first, before the work.
        for file in {
            header.file_meta.TransferSyntaxUID: file for file, header in zip(stack.files, stack.headers, strict=True)
        }.values():
            sitk.ReadImage(file, imageIO="GDCMImageIO")
        image = reader.Execute()
    except RuntimeError as error:
        packed = sorted(
            {
                header.file_meta.TransferSyntaxUID.name
                for header in stack.headers
                if header.file_meta.TransferSyntaxUID.is_compressed
            }
        )
        reason = f" Its slices are compressed ({', '.join(packed)}), which may be the reason: decompress them first."
        raise ValueError(
            f"{folder} cannot be read: it is damaged or not complete.{reason if packed else ''}"
        ) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{folder} is no volume of three dimensions with one value a voxel.")
    unit = {"CT": "HU", "PET": "SUV"}.get(modality, "a.u.")
    array = sitk.GetArrayViewFromImage(image).transpose(2, 1, 0)
    small = whole and factor in (None, 1) and array.min() >= -(1 << 15) and array.max() < 1 << 15
    array = array.astype(np.int16 if small else np.float32)
    return array if factor is None else array * np.float32(factor), stack.affine, modality, unit


def stack_of(folder: str | Path, series: Series) -> Stack:
    """
    The slices of a series along their normal, and the grid that they are.

    Raises:
        `ValueError`: They are none: see [`read_series`].
    """
    _, pydicom = dicom_libraries()
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
    _check_geometry(folder, headers)
    along, down = np.array(headers[0].ImageOrientationPatient, float).reshape(2, 3)
    positions = np.array([header.ImagePositionPatient for header in headers], float)
    order = np.argsort(positions @ np.cross(along, down), kind="stable")
    headers, positions = [headers[place] for place in order], positions[order]
    if len(order) > 1:
        towards = (positions[-1] - positions[0]) / (len(order) - 1)
    else:
        thickness = headers[0].get("SpacingBetweenSlices") or headers[0].get("SliceThickness") or 1
        towards = np.cross(along, down) * float(thickness)
    rows, columns = (float(side) for side in headers[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.column_stack([along * columns, down * rows, towards, positions[0]])
    return Stack([series.files[place] for place in order], headers, np.diag([-1, -1, 1, 1]) @ affine)  # LPS to RAS


def suv_factor(folder: str | Path, header) -> float:
    """What the values of a PET series are multiplied by to be SUV by body weight; 1 where they are already."""
    units = str(header.get("Units", ""))
    if units == "GML":
        if (kind := str(header.get("SUVType") or "BW")) != "BW":
            raise ValueError(f"{folder}: the PET holds SUV of type {kind}; by body weight (BW) is needed.")
        return 1.0
    try:
        import pysuv
    except ImportError:
        raise ImportError("SUV of a PET series needs pysuv: pip install 'synermedgen-hf[dicom]'.") from None
    try:
        return float(pysuv.get_suv_factor(header, "bw").suv_factor)
    except Exception as error:  # pysuv raises many kinds, and some name what is in the header
        raise ValueError(
            f"{folder}: SUV cannot be made of this PET series (units {units or 'unknown'}): dose, its time, the weight "
            f"or the attenuation correction are missing or not plausible ({type(error).__name__})."
        ) from None


def _check_geometry(folder: str | Path, headers: list):
    """Raise a `ValueError` for slices that make no volume."""
    oriented = [
        header for header in headers if "ImageOrientationPatient" in header and "ImagePositionPatient" in header
    ]
    if len(oriented) < len(headers):
        raise ValueError(f"{folder}: {len(headers) - len(oriented)} slices say nothing about their position.")
    turns = np.array([header.ImageOrientationPatient for header in headers], float)
    if np.abs(turns - turns[0]).max() > 1e-3:
        raise ValueError(f"{folder}: the slices have several orientations, as a localiser has. It makes no volume.")
    sizes = Counter((int(header.Rows), int(header.Columns)) for header in headers)
    if len(sizes) > 1:
        raise ValueError(f"{folder}: the slices have several sizes: {', '.join(f'{r} x {c}' for r, c in sizes)}.")
    if len(headers) < 2:
        return
    places = np.array([header.ImagePositionPatient for header in headers], float)
    normal = np.cross(turns[0, :3], turns[0, 3:])
    along = places @ normal
    order = np.argsort(along)
    steps = np.diff(along[order])
    if steps.min() < 1e-3:
        raise ValueError(
            f"{folder}: {int((steps < 1e-3).sum()) + 1} slices lie at one position: several phases or echoes?"
        )
    step = float(np.median(steps))
    if np.abs(steps - step).max() > POSITION_TOLERANCE * step + 1e-3:
        raise ValueError(
            f"{folder}: the slices of the DICOM series lie {steps.min():.4g} to {steps.max():.4g} mm apart; some are "
            "missing or doubled."
        )
    drift = places[order[-1]] - places[order[0]] - (along[order[-1]] - along[order[0]]) * normal
    if np.linalg.norm(drift) > TILT_TOLERANCE_MM:
        angle = np.degrees(np.arctan(np.linalg.norm(drift) / (along[order[-1]] - along[order[0]])))
        raise ValueError(
            f"{folder}: the stack leans by {angle:.1f} degrees (gantry tilt). Its voxels are no right-angled grid: "
            "resample it first, for instance with dcm2niix."
        )


def dicom_libraries():
    """SimpleITK and pydicom, or an `ImportError` that says what to install."""
    try:
        import pydicom
        import SimpleITK as sitk
    except ImportError:
        raise ImportError("DICOM needs pydicom and SimpleITK: pip install 'synermedgen-hf[dicom]'.") from None
    return sitk, pydicom


__all__ = ["Series", "choose_series", "dicom_libraries", "list_series", "read_series"]
