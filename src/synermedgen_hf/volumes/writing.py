"""Scans to files: NIfTI, MHA, NRRD on exactly the grid and axes of the file they came from, and derived DICOM series.

Everything is written under a temporary name beside its place and renamed when it is whole, so that nothing half-written
is left. Derived DICOM says in every file that it is synthetic and not for diagnosis.
"""

import datetime
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np

from .dicom import Stack, choose_series, stack_of
from .reading import ITK_READERS, NIFTI, Volume, extension, plain

MANUFACTURER = "synermedgen-hf"  # how a series of ours is known again before it is replaced
NOTICE = "Synthetic image made by a generative model from another scan. Research use only, not for diagnosis."
SAME_PLACE_MM = 1e-2  # as in `same_grid`
# DICOM's modality and storage class.
CLASSES = {"CT": ("CT", "1.2.840.10008.5.1.4.1.1.2"), "PET": ("PT", "1.2.840.10008.5.1.4.1.1.128")}
MR = ("MR", "1.2.840.10008.5.1.4.1.1.4")
# Along which of a volume's axes slices are stacked -> column, row and slice, the way they are hung up.
HUNG = {2: "LPS", 1: "LIP", 0: "PIR"}
PATIENT = (
    "SpecificCharacterSet PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge PatientSize "
    "PatientWeight PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "LongitudinalTemporalInformationModified"
).split()
STUDY = (
    "StudyInstanceUID StudyDate StudyTime StudyID StudyDescription AccessionNumber ReferringPhysicianName "
    "FrameOfReferenceUID PositionReferenceIndicator PatientPosition"
).split()


def write_volume(volume: Volume, path: str | Path, overwrite: bool = False) -> Path:
    """
    Write one scan.

    Args:
        volume ([`Volume`]): Its array and affine; what `original` holds decides the order of the axes.
        path (`str` or `Path`): `.nii`, `.nii.gz`, `.mha`, `.mhd`, `.nrrd` or `.nhdr`. float32 and integers of up to 16
            bits stay what they are.
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
    if path.is_dir() or path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another name, or overwrite.")
    array, affine = in_original_order(volume)
    array = array.astype(np.uint8) if array.dtype == bool else plain(array)
    with _whole(path) as folder:
        if ending in NIFTI:
            _write_nifti(array, affine, folder / path.name)
        else:
            _write_itk(array, affine, folder / path.name, ending)
        # .mhd and .nhdr keep their voxels in a second file, which goes first.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    return path


def in_original_order(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine with the axes of the file that the volume came from."""
    if volume.original is None:
        return volume.array, volume.affine
    back = nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], volume.original.orientation)
    array = np.ascontiguousarray(nibabel.orientations.apply_orientation(volume.array, back))
    turned = volume.affine @ nibabel.orientations.inv_ornt_aff(back, volume.array.shape)
    if np.abs((turned - volume.original.affine) @ (*array.shape, 1)).max() > SAME_PLACE_MM:
        raise ValueError("The volume was cropped or moved since it was read: set its `original` to None.")
    return array, volume.original.affine


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, gone afterwards; what goes wrong inside names `path`."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        yield folder
    except RuntimeError as error:  # of SimpleITK
        raise OSError(f"{path} cannot be written: {str(error).strip().splitlines()[-1]}") from error
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_nifti(array: np.ndarray, affine: np.ndarray, path: Path):
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned")
    if np.abs((image.get_qform() - affine) @ (*array.shape, 1)).max() > SAME_PLACE_MM:
        image.set_qform(affine, code="unknown")  # sheared: only the sform can say it
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _write_itk(array: np.ndarray, affine: np.ndarray, path: Path, ending: str):
    try:
        import SimpleITK as sitk
    except ImportError:
        raise ImportError(f"Writing {ending} needs SimpleITK: pip install 'synermedgen-hf[dicom]'.") from None
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    affine = np.diag([-1, -1, 1, 1]) @ affine  # RAS to LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    writer = sitk.ImageFileWriter()
    writer.SetImageIO(ITK_READERS[ending])  # named, since ITK knows endings in small letters only
    writer.SetUseCompression(ending != ".mhd")
    writer.SetFileName(str(path))
    writer.Execute(image)


# ---------------------------------------------------------------------------------------------------------------------
# Derived DICOM
# ---------------------------------------------------------------------------------------------------------------------


def write_dicom_series(
    volume: Volume,
    folder: str | Path,
    source_series: str | Path | None = None,
    series_uid: str | None = None,
    deidentify: bool = False,
    description: str | None = None,
    details: dict | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a derived DICOM series, one file a slice.

    CT is stored as whole HU (slope 1); PET (SUV by body weight) and MR in 16 bits of their range, MR that is whole
    numbers already with slope 1. Where that is too coarse, see [`write_parametric_map`].

    Args:
        volume ([`Volume`]): With its modality: `"CT"`, `"CBCT"`, `"PET"` or any MR.
        folder (`str` or `Path`): Of the new series; holds nothing yet.
        source_series (`str` or `Path`, *optional*): DICOM folder that the volume was made from, on the same grid. The
            new series joins its patient, study and frame of reference, and refers to its slices. Without one it is
            a study of its own, of nobody.
        series_uid (`str`, *optional*): Which series of `source_series`, where it holds several.
        deidentify (`bool`, defaults to `False`): Carry over nothing but the geometry: no tags, no UIDs. The only date
            is that of the writing.
        description (`str`, *optional*): SeriesDescription, up to 64 characters. By default `"Synthetic CT, not for
            diagnosis"`.
        details (`dict`, *optional*): For DerivationDescription: model, seed, ... of short values. They must not say
            whose scan it is.
        overwrite (`bool`, defaults to `False`): Replace a series that this function wrote.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: The volume cannot be a series, or `source_series` is not on its grid.
        `FileExistsError`: There is something in the folder already.
        `OSError`: It cannot be written; nothing half-written is left.
        `ImportError`: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise ImportError("Writing DICOM needs pydicom: pip install 'synermedgen-hf[dicom]'.") from None
    folder = Path(folder)
    _check_folder(folder, source_series, overwrite)
    modality, description = _checked(volume, description)
    modality, storage = CLASSES.get("CT" if modality == "CBCT" else modality, MR)
    stack = None if source_series is None else stack_of(source_series, choose_series(source_series, series_uid))
    array, affine = _as_slices(volume, stack)
    stored, slope = _stored(array, modality)
    common = pydicom.Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
        setattr(common, name, "")
    common.AccessionNumber = common.ReferringPhysicianName = common.PositionReferenceIndicator = ""
    common.StudyInstanceUID, common.FrameOfReferenceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    number = 1000
    if stack is not None and not deidentify:
        header = pydicom.dcmread(stack.files[0], stop_before_pixels=True)
        for name in PATIENT + STUDY:
            if name in header:
                common[name] = header[name]
        number += int(header.get("SeriesNumber") or 0)
    if deidentify:
        common.PatientIdentityRemoved = "YES"
        common.DeidentificationMethod = "Only geometry and voxels were taken from the source"
    now = datetime.datetime.now()
    common.SOPClassUID, common.Modality = storage, modality
    common.SeriesInstanceUID, common.SeriesNumber = pydicom.uid.generate_uid(), number
    common.SeriesDescription, common.DerivationDescription = description, _derivation(details)
    common.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if modality == "CT" else "OTHER"]
    common.Manufacturer, common.SoftwareVersions = MANUFACTURER, version("synermedgen-hf")
    for name in ("Series", "Content", "InstanceCreation"):
        setattr(common, f"{name}Date", now.strftime("%Y%m%d"))
        setattr(common, f"{name}Time", now.strftime("%H%M%S"))
    common.BurnedInAnnotation = "NO"
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.Columns, common.Rows = stored.shape[:2]
    common.BitsAllocated = common.BitsStored = 16
    common.HighBit, common.PixelRepresentation = 15, int(stored.dtype.kind == "i")
    common.RescaleSlope, common.RescaleIntercept = _decimal(slope), "0"
    common.RescaleType = {"CT": "HU", "PT": "SUV"}.get(modality, "US")
    low, high = (-160, 240) if modality == "CT" else (float(array.min()), max(float(array.max()), slope))
    common.WindowCenter, common.WindowWidth = _decimal((low + high) / 2), _decimal(max(high - low, slope))
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    along, down = affine[:3, 0] / steps[0], affine[:3, 1] / steps[1]
    common.PixelSpacing = [_decimal(steps[1]), _decimal(steps[0])]
    common.SliceThickness = common.SpacingBetweenSlices = _decimal(steps[2])
    common.ImageOrientationPatient = [_decimal(value) for value in (*along, *down)]
    common.update(_of_the_modality(modality, array.shape[2]))
    normal = np.cross(along, down)
    if "PatientPosition" not in common:
        common.PatientPosition = ""

    with _whole(folder) as unfinished:
        series = unfinished / "series"
        series.mkdir()
        for place in range(array.shape[2]):
            one = pydicom.Dataset(common)
            one.SOPInstanceUID, one.InstanceNumber = pydicom.uid.generate_uid(), place + 1
            position = affine[:3, 3] + place * affine[:3, 2]
            one.ImagePositionPatient = [_decimal(value) for value in position]
            one.SliceLocation = _decimal(position @ normal)
            if modality == "PT":
                one.ImageIndex = place + 1
            if stack is not None and not deidentify:
                reference = pydicom.Dataset()
                reference.ReferencedSOPClassUID = stack.headers[place].SOPClassUID
                reference.ReferencedSOPInstanceUID = stack.headers[place].SOPInstanceUID
                one.SourceImageSequence = [reference]
            one.PixelData = np.ascontiguousarray(stored[:, :, place].T).tobytes()
            one["PixelData"].VR = "OW"
            one.file_meta = pydicom.dataset.FileMetaDataset()
            one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            one.save_as(series / f"{place + 1:05d}.dcm", enforce_file_format=True)
        _exchange(series, folder)
    return folder


def write_parametric_map(
    volume: Volume,
    path: str | Path,
    source_series: str | Path,
    series_uid: str | None = None,
    description: str | None = None,
    details: dict | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a volume as one DICOM parametric map, which holds float32: nothing is rounded.

    Args:
        volume ([`Volume`]): With its modality.
        path (`str` or `Path`): Of the new file.
        source_series (`str` or `Path`): DICOM folder that the volume was made from, on the same grid. The map joins its
            patient, study and frame of reference.
        series_uid (`str`, *optional*): Which series of `source_series`, where it holds several.
        description, details, overwrite: As in [`write_dicom_series`].

    Returns:
        `Path`: Of the file.

    Raises:
        `ValueError`: The volume cannot be a map, or `source_series` is not on its grid.
        `FileExistsError`: The file is there already.
        `OSError`: It cannot be written; nothing half-written is left.
        `ImportError`: highdicom is not installed.
    """
    try:
        import highdicom
        import pydicom
        from highdicom.sr import CodedConcept
    except ImportError:
        raise ImportError("Writing DICOM needs highdicom: pip install 'synermedgen-hf[dicom]'.") from None
    path = Path(path)
    if path.is_dir() or path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another name, or overwrite.")
    modality, description = _checked(volume, description)
    stack = stack_of(source_series, choose_series(source_series, series_uid))
    array, affine = _as_slices(volume, stack)
    array = array.astype(np.float32)
    unit = {
        "CT": CodedConcept("[hnsf'U]", "UCUM", "Hounsfield unit"),
        "CBCT": CodedConcept("[hnsf'U]", "UCUM", "Hounsfield unit"),
        "PET": CodedConcept("{SUVbw}g/ml", "UCUM", "Standardized Uptake Value body weight"),
    }.get(modality, CodedConcept("1", "UCUM", "no units"))
    low, high = float(array.min()), float(array.max())
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="1", lut_explanation="as stored", unit=unit, value_range=(low, high), slope=1, intercept=0
    )
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in stack.files]
    frame = headers[0].get("FrameOfReferenceUID")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # highdicom's quote the patient's name
        made = highdicom.pm.ParametricMap(
            source_images=headers,
            pixel_array=highdicom.Volume(array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]], "PATIENT", frame),
            series_instance_uid=highdicom.UID(),
            series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=version("synermedgen-hf"),
            device_serial_number="0",
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[
                highdicom.VOILUTTransformation(window_center=(low + high) / 2, window_width=max(high - low, 1.0))
            ],
            content_label="SYNTHETIC",
            content_description=description,
            series_description=description,
        )
    made.DerivationDescription = _derivation(details)
    with _whole(path) as folder:
        made.save_as(folder / path.name)
        os.replace(folder / path.name, path)
    return path


def _exchange(made: Path, folder: Path):
    """Put a finished folder in its place; what is there goes only once that has worked."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(made, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_folder(folder: Path, source_series: str | Path | None, overwrite: bool):
    """Raise an error unless the folder is free, or holds a series of ours and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir() or source_series is not None and folder.resolve() == Path(source_series).resolve():
        raise FileExistsError(f"{folder} is a file or the scan itself: name another folder.")
    there = list(folder.iterdir())
    if not there:
        return
    import pydicom

    ours = all(file.suffix in (".dcm", ".json") for file in there) and all(
        pydicom.dcmread(file, specific_tags=["Manufacturer"], stop_before_pixels=True).get("Manufacturer")
        == MANUFACTURER
        for file in there
        if file.suffix == ".dcm"
    )
    if not overwrite or not ours:
        hint = "choose another" if ours else "it holds other files than a series of ours, which are not replaced"
        raise FileExistsError(f"{folder} is there already: {hint}{', or overwrite' if ours else ''}.")


def _checked(volume: Volume, description: str | None) -> tuple[str, str]:
    """Modality and description; a `ValueError` for what cannot be DICOM."""
    if volume.modality is None:
        raise ValueError("The volume has no modality: set it, so that DICOM can say what it shows.")
    if volume.array.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(volume.array)))):
        raise ValueError(f"{bad} voxels are NaN or infinite, which DICOM cannot hold: replace them first.")
    description = description or f"Synthetic {volume.modality}, not for diagnosis"
    if len(description) > 64:
        raise ValueError(f"The description has {len(description)} characters; DICOM takes 64.")
    return volume.modality, description


def _as_slices(volume: Volume, stack: Stack | None) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine, to mm in LPS, of column, row and slice: those of the source, else as slices are hung up."""
    if stack is not None:
        orientation = nibabel.io_orientation(stack.affine)
    else:
        stacked = 2 if volume.original is None else int(volume.original.orientation[2, 0])
        orientation = nibabel.orientations.axcodes2ornt(HUNG[stacked])
    turn = nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], orientation)
    array = nibabel.orientations.apply_orientation(volume.array, turn)
    affine = volume.affine @ nibabel.orientations.inv_ornt_aff(turn, volume.array.shape)
    if stack is not None:
        shape = (int(stack.headers[0].Columns), int(stack.headers[0].Rows), len(stack.files))
        if array.shape != shape or np.abs((affine - stack.affine) @ (*shape, 1)).max() > SAME_PLACE_MM:
            raise ValueError("The volume does not lie on the grid of the source: resample it, or leave the source out.")
        affine = stack.affine
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3:
        raise ValueError("The axes of the volume are not at right angles, as those of DICOM slices are: resample it.")
    return array, np.diag([-1, -1, 1, 1]) @ affine


def _stored(array: np.ndarray, modality: str) -> tuple[np.ndarray, float]:
    """16-bit integers and the slope that gives the values back."""
    low, high = float(array.min()), float(array.max())
    whole = array.dtype.kind in "iub" or modality == "MR" and bool((array == np.rint(array)).all())
    signed = modality == "CT" or low < 0
    most = (1 << 15) - 1 if signed else (1 << 16) - 1
    largest = max(abs(low), abs(high))
    if modality == "CT" or whole and largest <= most:
        slope = 1.0
        if largest > most:
            raise ValueError(f"CT of {low:g} to {high:g} HU does not fit into 16 bits: are these Hounsfield units?")
    else:
        # DICOM PET has no intercept; without one, MR keeps its proportions where a program ignores the slope.
        slope = float(_decimal(largest / most)) or 1.0
    return np.clip(np.rint(array / slope), -most, most).astype("<i2" if signed else "<u2"), slope


def _of_the_modality(modality: str, slices: int):
    """What the standard asks of CT, MR and PET images besides, as far as a synthesis has it."""
    import pydicom

    tags = pydicom.Dataset()
    if modality == "CT":
        tags.KVP = tags.AcquisitionNumber = ""
    elif modality == "MR":
        tags.ScanningSequence, tags.SequenceVariant, tags.ScanOptions = "RM", "NONE", ""
        tags.MRAcquisitionType = tags.EchoTime = tags.EchoTrainLength = tags.RepetitionTime = ""
    else:
        tags.Units, tags.SUVType, tags.SeriesType = "GML", "BW", ["STATIC", "IMAGE"]
        tags.CountsSource, tags.DecayCorrection, tags.NumberOfSlices = "EMISSION", "NONE", slices
        tags.CorrectedImage = tags.CollimatorType = ""
        tags.RadiopharmaceuticalInformationSequence = []
        tags.FrameReferenceTime, tags.ActualFrameDuration = "0", "0"
    return tags


def _derivation(details: dict | None) -> str:
    """Up to 1024 characters, as DICOM takes them."""
    text = "; ".join(f"{name}: {value}" for name, value in (details or {}).items())
    return f"{NOTICE} {text}".strip()[:1024]


def _decimal(value: float) -> str:
    """A number in the up to 16 characters of a DICOM decimal string, as exact as they allow."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value) + 0.0)  # no -0


__all__ = ["in_original_order", "write_dicom_series", "write_parametric_map", "write_volume"]
