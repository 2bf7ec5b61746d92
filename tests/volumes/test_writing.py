"""Files that another library reads back: the same values at the same places, and nothing unasked of a patient."""

import errno
import os
import subprocess
import sys
import warnings

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from synermedgen_hf import Volume, read_volume, write_volume
from synermedgen_hf.volumes.writing import write_dicom_series, write_parametric_map

TILT = nibabel.eulerangles.euler2mat(0.2, -0.1, 0.15)
GRIDS = [
    ((9, 11, 5), (1, 1, 1), (1, 1, 1), None),
    ((8, 12, 6), (0.7, 0.7, 5), (-1, -1, 1), None),
    ((7, 10, 8), (2, 1, 3), (-1, 1, -1), None),
    ((10, 9, 7), (1, 1.5, 2), (1, -1, 1), TILT),
]
NAMES = ["odd", "LPS", "flipped", "oblique"]


def scan(shape, spacing, flips, rotation, dtype=np.int16):
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.multiply(spacing, flips))
    if rotation is not None:
        affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 100)
    return np.random.default_rng(0).integers(-1000, 2000, shape).astype(dtype), affine


def values_by_place(path):
    """What SimpleITK finds at the middle of every voxel: index grid, LPS positions, values."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return array, np.diag([-1, -1, 1, 1]) @ affine


def same_places(array, affine, other, other_affine, tolerance_mm=1e-3):
    """Whether two arrays hold the same values at the same places, whatever the order of their axes."""
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(other_affine), nibabel.io_orientation(affine))
    turned = nibabel.orientations.apply_orientation(other, turn)
    placed = other_affine @ nibabel.orientations.inv_ornt_aff(turn, other.shape)
    return (
        turned.shape == array.shape and np.array_equal(turned, array) and np.allclose(placed, affine, atol=tolerance_mm)
    )


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize(("shape", "spacing", "flips", "rotation"), GRIDS, ids=NAMES)
def test_a_file_is_written_as_it_came(tmp_path, shape, spacing, flips, rotation, ending):
    """The order of the axes too: LPS stays LPS."""
    array, affine = scan(shape, spacing, flips, rotation)
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "scan.nii.gz")
    written = write_volume(read_volume(tmp_path / "scan.nii.gz"), tmp_path / f"again{ending}")
    if ending.startswith(".nii"):
        again = nibabel.load(written)
        found, places = np.asarray(again.dataobj), again.affine
        assert again.get_data_dtype() == np.int16
    else:
        found, places = values_by_place(written)
    assert np.array_equal(found, array) and np.allclose(places, affine, atol=1e-4)


def test_nothing_is_replaced_or_left_half_written(tmp_path, monkeypatch):
    volume = Volume(*scan(*GRIDS[0]))
    path = write_volume(volume, tmp_path / "a.nii.gz")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.nii\.gz"):
        write_volume(volume, path)

    def full(image, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    with pytest.raises(OSError, match="cannot be written: No space left"):
        write_volume(volume, path, overwrite=True)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]
    with pytest.raises(ValueError, match="not the name of a volume"):
        write_volume(volume, tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------------------------------
# Derived DICOM
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A CT series of a patient with a name, as a scanner writes it."""
    array, affine = scan(*GRIDS[1])
    folder = write_dicom_series(Volume(array, affine, "CT", "HU"), tmp_path / "source")
    for file in folder.iterdir():
        header = pydicom.dcmread(file)
        header.PatientName, header.PatientID, header.ReferringPhysicianName = "Doe^Jane", "ID-4711-X", "House^Gregory"
        header.StudyDescription, header.InstitutionName = "Doe, head", "St. Elsewhere"
        header.SeriesDescription, header.StudyDate = "Head 5 mm", "20200102"
        header.save_as(file)
    return folder


@pytest.mark.parametrize(("shape", "spacing", "flips", "rotation"), GRIDS, ids=NAMES)
def test_hounsfield_units_and_places_are_exact_for_another_library(tmp_path, shape, spacing, flips, rotation):
    array, affine = scan(shape, spacing, flips, rotation)
    folder = write_dicom_series(Volume(array, affine, "CT", "HU"), tmp_path / "ct")
    assert same_places(array, affine, *values_by_place(folder))
    again = read_volume(folder)
    assert again.modality == "CT" and again.unit == "HU" and same_places(array, affine, again.array, again.affine)


def test_a_derived_series_belongs_to_its_source_and_says_what_it_is(source, tmp_path):
    made = read_volume(source)
    details = {"sources": ["MRI"], "seeds": [3], "weights_sha256": {"model": "ab" * 32}}
    folder = write_dicom_series(made, tmp_path / "made", source_series=source, details=details)
    old = {float(one.ImagePositionPatient[2]): one for one in map(pydicom.dcmread, source.iterdir())}
    new = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    assert len(new) == len(old) == 6
    assert len({one.SOPInstanceUID for one in new} | {one.SOPInstanceUID for one in old.values()}) == 12
    for one in new:
        origin = old[float(one.ImagePositionPatient[2])]
        assert one.SourceImageSequence[0].ReferencedSOPInstanceUID == origin.SOPInstanceUID
        assert one.StudyInstanceUID == origin.StudyInstanceUID and one.FrameOfReferenceUID == origin.FrameOfReferenceUID
        assert one.SeriesInstanceUID != origin.SeriesInstanceUID and one.PatientID == "ID-4711-X"
        assert list(one.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert "not for diagnosis" in one.SeriesDescription and "abababababababab" in one.DerivationDescription
        assert np.array_equal(one.pixel_array * one.RescaleSlope, origin.pixel_array * origin.RescaleSlope)
    assert same_places(made.array, made.affine, *values_by_place(folder))


def test_deidentified_files_carry_nothing_of_the_source(source, tmp_path):
    folder = write_dicom_series(read_volume(source), tmp_path / "made", source_series=source, deidentify=True)
    old = pydicom.dcmread(next(source.iterdir()))
    for file in folder.iterdir():
        content = file.read_bytes()
        for words in (b"Doe", b"ID-4711-X", b"House", b"Elsewhere", b"20200102", b"Head 5 mm"):
            assert words not in content
        for uid in (old.StudyInstanceUID, old.FrameOfReferenceUID, old.SeriesInstanceUID):
            assert str(uid).encode() not in content


@pytest.mark.parametrize(("modality", "unit", "high"), [("PET", "SUV", 23.7), ("T2", "a.u.", 870.0)])
def test_other_units_keep_sixteen_bits_of_their_range(tmp_path, modality, unit, high):
    array, affine = scan(*GRIDS[0])
    array = (np.abs(array) / 2000 * high).astype(np.float32)
    folder = write_dicom_series(Volume(array, affine, modality, unit), tmp_path / "made")
    again = read_volume(folder)
    assert again.modality == ("PET" if modality == "PET" else "MRI")
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(again.affine), nibabel.io_orientation(affine))
    assert np.abs(nibabel.orientations.apply_orientation(again.array, turn) - array).max() <= high / 65535


def test_a_parametric_map_keeps_float32(source, tmp_path):
    made = read_volume(source)
    made.array = made.array.astype(np.float32) / 7
    path = write_parametric_map(made, tmp_path / "map.dcm", source)
    dataset = pydicom.dcmread(path)
    stored = np.frombuffer(dataset.FloatPixelData, np.float32)
    assert np.array_equal(np.sort(stored), np.sort(made.array.ravel()))
    assert "not for diagnosis" in dataset.SeriesDescription


def test_what_cannot_be_written_is_said(source, tmp_path):
    volume = read_volume(source)
    with pytest.raises(ValueError, match="no modality"):
        write_dicom_series(Volume(volume.array, volume.affine), tmp_path / "made")
    with pytest.raises(ValueError, match="does not lie on the grid"):
        write_dicom_series(Volume(volume.array[:, :, 1:], volume.affine, "CT"), tmp_path / "made", source_series=source)
    with pytest.raises(FileExistsError, match="source"):
        write_dicom_series(volume, source)
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Series that are no volume
# ---------------------------------------------------------------------------------------------------------------------


def change(folder, edit):
    for number, file in enumerate(sorted(folder.iterdir())):
        header = pydicom.dcmread(file)
        edit(number, header)
        header.save_as(file)


def lean(number, header):
    x, y, z = header.ImagePositionPatient
    header.ImagePositionPatient = [x, y + 1.5 * number, z]


def turn_one(number, header):
    if number == 2:
        header.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def double_one(number, header):
    if number == 3:
        x, y, z = header.ImagePositionPatient
        header.ImagePositionPatient = [x, y, z - 5]


def compress(number, header):
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # HTJ2K, and the pixels are none
    header.PixelData = pydicom.encaps.encapsulate([b"not an image "])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lean, "gantry tilt"),
        (turn_one, "several orientations"),
        (double_one, "one position"),
        (compress, "compressed.*High-Throughput"),
    ],
)
def test_series_that_are_no_volume(source, edit, words):
    change(source, edit)
    with pytest.raises(ValueError, match=words) as caught:
        read_volume(source)
    assert "Doe" not in str(caught.value)


def test_a_missing_slice(source):
    sorted(source.iterdir())[2].unlink()
    with pytest.raises(ValueError, match="5 to 10 mm apart; some are missing"):
        read_volume(source)


def test_suv_is_made_of_activity(tmp_path):
    """70 kg, 350 MBq an hour before: Bq/ml times weight over the decayed dose."""
    array, affine = scan(*GRIDS[0])
    array = np.abs(array).astype(np.float32)
    folder = write_dicom_series(Volume(array, affine, "PET", "SUV"), tmp_path / "pet")

    def activity(number, header):
        header.Units, header.PatientWeight, header.DecayCorrection = "BQML", "70", "START"
        header.Manufacturer, header.CorrectedImage = "SIEMENS", ["ATTN", "DECY"]
        header.SeriesDate = header.AcquisitionDate = "20240101"
        header.SeriesTime = header.AcquisitionTime = "110000"
        dose = pydicom.Dataset()
        dose.RadiopharmaceuticalStartTime, dose.RadionuclideTotalDose = "100000", "350000000"
        dose.RadionuclideHalfLife = "6586.2"
        header.RadiopharmaceuticalInformationSequence = pydicom.Sequence([dose])

    change(folder, activity)
    factor = 70_000 / (350e6 * 2 ** (-3600 / 6586.2))
    again = read_volume(folder)
    assert again.unit == "SUV"
    assert again.array.max() == pytest.approx(array.max() * factor, rel=1e-4)

    def lighten(number, header):
        del header.PatientWeight

    change(folder, lighten)
    with pytest.raises(ValueError, match="SUV cannot be made"):
        read_volume(folder)


@pytest.mark.parametrize("name", ["full.nii", "full.nii.gz", "full.mha", "full.mhd", "full.nrrd", "series"])
def test_a_full_disk_leaves_nothing(tmp_path, name):
    """A limit on the size of files stands for the disk; it holds for a process of its own."""
    write = "write_dicom_series" if name == "series" else "write_volume"
    program = f"""
import numpy as np, resource, signal
from synermedgen_hf.volumes.reading import Volume
from synermedgen_hf.volumes.writing import write_dicom_series, write_volume
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
volume = Volume(np.random.default_rng(0).integers(-1024, 3072, (96, 96, 8)).astype(np.int16), np.eye(4), "CT")
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
{write}(volume, {str(tmp_path / name)!r})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1 and f"{name} cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_in_a_second_file_are_found(tmp_path, ending):
    array, affine = scan(*GRIDS[0])
    found, place = values_by_place(write_volume(Volume(array, affine), tmp_path / f"a{ending}"))
    np.testing.assert_array_equal(found, array)
    np.testing.assert_allclose(place, affine, atol=1e-4)


def test_slices_may_have_slopes_of_their_own(tmp_path):
    """As PET often does; the first one is whole here, the others are not."""
    folder = write_dicom_series(Volume(np.full((8, 8, 4), 3, np.float32), np.eye(4), "MRI"), tmp_path / "slopes")
    for number, file in enumerate(sorted(folder.iterdir())):
        header = pydicom.dcmread(file)
        header.RescaleSlope = 1 + number / 8
        header.save_as(file)
    array = read_volume(folder).array
    np.testing.assert_allclose(sorted(np.unique(array)), [3, 3.375, 3.75, 4.125])


def test_a_series_that_cannot_be_exchanged_stays_as_it_was(source, tmp_path, monkeypatch):
    volume = read_volume(source)
    folder = write_dicom_series(volume, tmp_path / "made")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    replace, calls = os.replace, []

    def fail_once(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="cannot be written"):
        write_dicom_series(volume, folder, overwrite=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    write_dicom_series(volume, folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_no_warning_quotes_the_patient(source, tmp_path):
    """highdicom warns of names that are not in parts, with the name."""
    for file in source.iterdir():
        header = pydicom.dcmread(file)
        header.PatientName = "JaneDoe"
        header.save_as(file)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        write_parametric_map(read_volume(source), tmp_path / "map.dcm", source)
    assert not [one for one in heard if "JaneDoe" in str(one.message)]
