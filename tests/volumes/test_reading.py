"""Scans of every format come to one array on one set of axes, and nothing that is not a scan gets through."""

import gzip
import locale
import struct
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from synermedgen_hf.volumes.reading import (
    Volume,
    extension,
    read_volume,
    resample,
    same_grid,
    shared_extent,
    slice_spacing,
    slices_of,
    stack_axis,
)

SHAPE = (24, 28, 10)
AFFINE = np.array([[2.0, 0, 0, -21.5], [0, 2.5, 0, -30.25], [0, 0, 5.0, 12.0], [0, 0, 0, 1]])
FORMATS = ("nii", "nii.gz", "mha", "mhd", "nrrd", "nhdr", "dicom")


@pytest.fixture(scope="module")
def scan():
    """Hounsfield units, `(x, y, z)` with the axes to the patient's right, front and head."""
    return np.random.default_rng(0).integers(-1024, 3071, SHAPE).astype(np.int16)


def itk_image(array, affine=AFFINE):
    """As SimpleITK has it: axes the other way round, mm to the patient's left and back."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    flip = np.diag([-1.0, -1, 1])
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((flip @ affine[:3, 3]).tolist())
    image.SetDirection((flip @ affine[:3, :3] / spacing).ravel().tolist())
    return image


def write_dicom(array, folder, affine=AFFINE, series="1.2.826.0.1.3680043.2.1125.1"):
    """One file a slice, under names that say nothing about their order."""
    folder.mkdir(exist_ok=True)
    image = itk_image(array, affine)
    towards = np.array(image.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    encoding = locale.setlocale(locale.LC_CTYPE)
    for place in range(image.GetDepth()):
        plane = image[:, :, place]
        position = image.TransformIndexToPhysicalPoint((0, 0, place))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{place + 1}",
            "0008|0060": "CT",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": series,
            "0020|0013": str(place + 1),
            "0020|0032": "\\".join(f"{value:g}" for value in position),
            "0020|0037": "\\".join(f"{value:g}" for value in (*towards[:, 0], *towards[:, 1])),
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(place * 7) % image.GetDepth()}-{series[-1]}.dcm"))
        writer.Execute(plane)
    locale.setlocale(locale.LC_CTYPE, encoding)  # GDCM leaves another one behind
    return folder


def write_nifti(array, path, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def write(array, folder, form, affine=AFFINE):
    if form == "dicom":
        return write_dicom(array, folder / "series", affine)
    path = folder / f"scan.{form}"
    if form.startswith("nii"):
        return write_nifti(array, path, affine)
    sitk.WriteImage(itk_image(array, affine), str(path))
    return path


def turned(array, affine, codes):
    """The same scan stored along other axes, such as `"LPS"`."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    return apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)


def rotation(degrees, axis):
    first, second = [place for place in range(3) if place != axis]
    matrix, angle = np.eye(3), np.deg2rad(degrees)
    matrix[[first, first, second, second], [first, second, first, second]] = (
        np.cos(angle),
        -np.sin(angle),
        np.sin(angle),
        np.cos(angle),
    )
    return matrix


# ---------------------------------------------------------------------------------------------------------------------
# One form for all
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_comes_to_the_same_array_and_affine(scan, tmp_path, form):
    volume = read_volume(write(scan, tmp_path, form))
    np.testing.assert_array_equal(volume.array, scan)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.spacing == pytest.approx((2, 2.5, 5))


@pytest.mark.parametrize(
    "form",
    [
        "nii",
        "nii.gz",
        "nrrd",
        pytest.param("mha"),
    ],
)
def test_an_extension_in_capitals_is_read_as_well(scan, tmp_path, form):
    path = write(scan, tmp_path, form)
    np.testing.assert_array_equal(read_volume(path.rename(tmp_path / f"SCAN.{form.upper()}")).array, scan)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "RPI", "PSR", "SPL", "AIL"])
@pytest.mark.parametrize("form", ["nii", "mha", "nrrd"])
def test_flipped_and_permuted_axes_come_to_the_same_array(scan, tmp_path, form, codes):
    array, affine = turned(scan, AFFINE, codes)
    volume = read_volume(write(array, tmp_path, form, affine))
    np.testing.assert_array_equal(volume.array, scan)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
@pytest.mark.parametrize("form", ["nii", "mha", "nrrd", "dicom"])
def test_a_landmark_of_an_oblique_scan_keeps_its_place_in_mm(tmp_path, form, codes):
    tilted = AFFINE.copy()
    tilted[:3, :3] = rotation(20, 2) @ rotation(-12, 0) @ AFFINE[:3, :3]
    array = np.zeros(SHAPE, np.int16)
    array[5, 21, 7] = 1000
    in_mm = tilted @ (5, 21, 7, 1)
    array, affine = turned(array, tilted, codes)
    volume = read_volume(write(array, tmp_path, form, affine))
    found = np.argwhere(volume.array == 1000)
    assert len(found) == 1
    np.testing.assert_allclose(volume.affine @ (*found[0], 1), in_mm, atol=1e-3)
    # Nothing is interpolated: the axes are only those nearest to right, front and head.
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")


def test_a_nrrd_whose_header_counts_to_the_right_and_front_lies_where_it_says(scan, tmp_path):
    """Most programs write left-posterior-superior; this header is one that some others write."""
    header = "\n".join(
        [
            "NRRD0004",
            "type: short",
            "dimension: 3",
            "space: right-anterior-superior",
            "sizes: 24 28 10",
            "space directions: (2,0,0) (0,2.5,0) (0,0,5)",
            "endian: little",
            "encoding: raw",
            "space origin: (-21.5,-30.25,12)",
            "",
            "",
        ]
    )
    path = tmp_path / "scan.nrrd"
    path.write_bytes(header.encode() + scan.astype("<i2").tobytes("F"))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, scan)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Slices as a radiologist looks at them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PSR", "SPL"])
def test_right_is_on_the_left_and_front_or_head_at_the_top(tmp_path, codes):
    places = {"right": (20, 14, 5), "front": (12, 25, 5), "head": (12, 14, 9)}
    array = np.zeros(SHAPE, np.int16)
    for value, place in enumerate(places.values(), start=1):
        array[place] = value
    array, affine = turned(array, AFFINE, codes)
    volume = read_volume(write_nifti(array, tmp_path / "scan.nii.gz", affine))
    axial, coronal = slices_of(volume, "axial"), slices_of(volume, "coronal")
    assert axial.shape == (10, 28, 24) and coronal.shape == (28, 10, 24)
    # (slice, row, column): axial slices go up, coronal ones from back to front.
    assert _found(axial) == {1: (5, 13, 3), 2: (5, 2, 11), 3: (9, 13, 11)}
    assert _found(coronal) == {1: (14, 4, 3), 2: (25, 4, 11), 3: (14, 0, 11)}
    assert slice_spacing(volume, "axial") == pytest.approx((5, 2.5, 2))
    assert slice_spacing(volume, "coronal") == pytest.approx((2.5, 5, 2))


def _found(slices):
    return {int(slices[tuple(place)]): tuple(map(int, place)) for place in np.argwhere(slices)}


def test_slices_are_views():
    volume = Volume(np.zeros(SHAPE, np.int16), AFFINE)
    assert all(np.shares_memory(slices_of(volume, axis), volume.array) for axis in ("axial", "coronal"))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nii.gz", "mha", "nrrd"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8])
def test_small_integers_stay_what_they_are(tmp_path, form, dtype):
    array = np.random.default_rng(1).integers(0, 200, SHAPE).astype(dtype)
    volume = read_volume(write(array, tmp_path, form))
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, array)


@pytest.mark.parametrize("form", ["nii", "mha", "nrrd"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_everything_else_becomes_float32(tmp_path, form, dtype):
    array = np.random.default_rng(2).uniform(-5, 40000, SHAPE).astype(dtype)
    volume = read_volume(write(array, tmp_path, form))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array.astype(np.float32))


def test_slope_and_intercept_of_a_nifti_file_are_applied(scan, tmp_path):
    path = write_nifti(scan, tmp_path / "scan.nii")
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<2f", 0.5, -24)
    path.write_bytes(content)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, scan * np.float32(0.5) - 24)


@pytest.mark.parametrize("code, factor", [(0, 1), (1, 1e3), (2, 1), (3, 1e-3), (10, 1), (66, 1), (255, 1)])
def test_the_unit_of_a_nifti_counts(scan, tmp_path, code, factor):
    image = nibabel.Nifti1Image(scan, np.diag([1 / factor, 1 / factor, 1 / factor, 1]) @ AFFINE)
    image.header["xyzt_units"] = code  # some have codes that the standard does not know
    nibabel.save(image, tmp_path / "scan.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "scan.nii").affine, AFFINE, rtol=1e-6)


def test_a_big_endian_file_gives_native_numbers(scan, tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(scan, AFFINE, header), tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes()[:4] == struct.pack(">i", 348)
    volume = read_volume(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.array, scan)
    assert volume.array.dtype.isnative


def test_axes_of_length_one_behind_the_third_are_dropped(scan, tmp_path):
    volume = read_volume(write_nifti(scan[..., None, None], tmp_path / "scan.nii.gz"))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, scan)


# ---------------------------------------------------------------------------------------------------------------------
# What is no scan
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.nii", ".nii"),
        ("A.NII.GZ", ".nii.gz"),
        ("W39_1998.09.19_Segm.nii", ".nii"),
        ("ct.mha", ".mha"),
        ("ct.mhd", ".mhd"),
        ("ct.nrrd", ".nrrd"),
        ("ct.raw", ""),
        ("ct.nii.png", ""),
        ("nii", ""),
    ],
)
def test_the_extension_of_a_volume(name, ending):
    assert extension(name) == ending


def test_four_dimensions_are_refused(scan, tmp_path):
    several = write_nifti(np.stack([scan, scan], -1), tmp_path / "several.nii.gz")
    with pytest.raises(ValueError, match=r"several.nii.gz has shape \(24, 28, 10, 2\): .*three dimensions"):
        read_volume(several)
    flat = write_nifti(scan[:, :, 0], tmp_path / "flat.nii.gz")
    with pytest.raises(ValueError, match="flat.nii.gz .*three dimensions"):
        read_volume(flat)
    colours = tmp_path / "colours.mha"
    sitk.WriteImage(sitk.Compose([itk_image(scan)] * 3), str(colours))
    with pytest.raises(ValueError, match="colours.mha is no volume of three dimensions with one value a voxel"):
        read_volume(colours)
    series = tmp_path / "several.nrrd"
    sitk.WriteImage(sitk.JoinSeries([itk_image(scan)] * 2), str(series))
    with pytest.raises(ValueError, match="several.nrrd is no volume of three dimensions"):
        read_volume(series)


@pytest.mark.parametrize("column", [0, 2])
def test_an_affine_that_does_not_span_space_is_refused(scan, tmp_path, column):
    path = write_nifti(scan, tmp_path / "scan.nii")
    content = bytearray(path.read_bytes())
    rows = np.array(struct.unpack("<12f", content[280:328])).reshape(3, 4)
    rows[:, column] = 0
    content[280:328] = struct.pack("<12f", *rows.ravel())
    path.write_bytes(content)
    with pytest.raises(ValueError, match="scan.nii has no usable affine: its axes do not span space"):
        read_volume(path)


def test_an_affine_that_is_not_finite_is_refused(scan, tmp_path):
    path = write_nifti(scan, tmp_path / "scan.nii")
    content = bytearray(path.read_bytes())
    content[280:284] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="scan.nii has no usable affine"):
        read_volume(path)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _invert(path):
    content = bytearray(path.read_bytes())
    content[2000:2050] = bytes(255 - byte for byte in content[2000:2050])
    path.write_bytes(content)


def _unknown_type(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[70:72] = struct.pack("<h", 32767)
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>Please log in to download</html>" * 20),
        lambda path: path.write_bytes(gzip.compress(b"<html>Please log in to download</html>" * 20)),
        pytest.param(_invert),
        pytest.param(_unknown_type),
    ],
    ids=["cut", "empty", "a page", "a compressed page", "inverted bytes", "unknown type"],
)
def test_a_damaged_gzip_is_refused_by_name(scan, tmp_path, damage):
    path = write_nifti(scan, tmp_path / "scan.nii.gz")
    damage(path)
    with pytest.raises(ValueError, match="scan.nii.gz cannot be read: it is damaged or not complete"):
        read_volume(path)


@pytest.mark.parametrize("form", ["nii", "mha", "nrrd"])
def test_a_file_that_was_cut_is_refused_by_name(scan, tmp_path, form):
    path = write(scan, tmp_path, form)
    _cut(path)
    with pytest.raises(ValueError, match=f"scan.{form} cannot be read: it is damaged or not complete"):
        read_volume(path)


def test_colours_in_a_nifti_file_are_refused_by_name(tmp_path):
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    path = write_nifti(colours, tmp_path / "colours.nii")
    with pytest.raises(ValueError, match="colours.nii"):
        read_volume(path)


def test_what_is_not_there_or_no_volume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*scan.nii.gz"):
        read_volume(tmp_path / "scan.nii.gz")
    (tmp_path / "scan.png").write_bytes(b"")
    with pytest.raises(ValueError, match="scan.png is not a volume: known are .nii, .nii.gz, .mha, .*DICOM series"):
        read_volume(str(tmp_path / "scan.png"))


def test_a_folder_holds_exactly_one_dicom_series(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "series")
    write_dicom(scan, folder, series="1.2.826.0.1.3680043.2.1125.2")
    with pytest.raises(ValueError, match=r"holds 2 DICOM series. Choose one by its UID: [\d.]+ \(CT, 10 slices\); "):
        read_volume(folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other holds 0 DICOM series"):
        read_volume(tmp_path / "other")


def test_formats_beyond_nifti_say_what_to_install(scan, tmp_path, monkeypatch):
    mha, nii = write(scan, tmp_path, "mha"), write(scan, tmp_path, "nii")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r"Reading scan.mha needs SimpleITK: pip install 'synermedgen-hf\[dicom\]'"):
        read_volume(mha)
    read_volume(nii)


# ---------------------------------------------------------------------------------------------------------------------
# Grids
# ---------------------------------------------------------------------------------------------------------------------


def moved(mm):
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


def test_a_grid_is_its_shape_and_its_place():
    array = np.zeros(SHAPE, np.int16)
    volume = Volume(array, AFFINE)
    assert same_grid(volume, Volume(array.astype(np.float32), moved(1e-4)))
    assert not same_grid(volume, Volume(array, moved((0, 0, 0.5))))
    assert not same_grid(volume, Volume(array[:-1], AFFINE))
    scaled = AFFINE.copy()
    scaled[0, 0] *= 1.01  # the first voxels coincide, the last ones do not
    assert not same_grid(volume, Volume(array, scaled))


@pytest.mark.parametrize(
    ("mm", "shared"),
    [((0, 0, 0), 1), ((23, 0, 0), 0.5), ((23, 33.75, 0), 0.25), ((0, 0, 45), 0), ((0, 0, -1000), 0)],
)
def test_the_shared_extent_is_a_share_of_the_smaller_box(mm, shared):
    array = np.zeros(SHAPE, np.int16)
    one, other = Volume(array, AFFINE), Volume(array, moved(mm))
    assert shared_extent(one, other) == pytest.approx(shared, abs=1e-6)
    part = Volume(array[6:18], moved((6 * 2, 0, 0)))
    assert shared_extent(one, part) == shared_extent(part, one) == pytest.approx(1)


def test_single_slices_at_one_place_share_their_extent():
    array = np.zeros((24, 28, 1), np.int16)
    assert shared_extent(Volume(array, AFFINE), Volume(array, moved((1, 0, 0)))) > 0.9


def test_resampling_interpolates_linearly_and_fills_what_is_out_of_reach():
    ramp = np.broadcast_to(10.0 * np.arange(SHAPE[0])[:, None, None], SHAPE).astype(np.float32)
    half_a_voxel = Volume(np.zeros(SHAPE, np.int16), moved((1, 0, 0)))
    result = resample(Volume(ramp, AFFINE), half_a_voxel, fill=-1024)
    assert same_grid(result, half_a_voxel) and result.array.dtype == np.float32
    np.testing.assert_allclose(result.array[:-1], ramp[:-1] + 5, atol=1e-3)
    assert (result.array[-1] == -1024).all()


def test_resampling_onto_its_own_grid_changes_nothing(scan):
    result = resample(Volume(scan, AFFINE), Volume(np.zeros(SHAPE), AFFINE), fill=0)
    np.testing.assert_allclose(result.array, scan, atol=1e-2)


@pytest.mark.parametrize(("spacing", "axis"), [((1, 1, 8), "axial"), ((1, 8, 1), "coronal"), ((8, 1, 1), "sagittal")])
def test_a_stack_is_cut_the_way_it_was_acquired(spacing, axis):
    volume = Volume(np.zeros([{8: 5}.get(side, 20) for side in spacing], np.int16), np.diag([*spacing, 1.0]))
    assert stack_axis(volume) == axis
    assert slices_of(volume, axis).shape == (5, 20, 20) and slice_spacing(volume, axis) == (8, 1, 1)


def test_a_stack_of_cubes_is_axial():
    assert stack_axis(Volume(np.zeros((4, 4, 4), np.int16), np.eye(4))) == "axial"
