"""Uploads: what is taken, what is refused and in which words, and that nothing is left behind."""

import gzip
import io
import stat
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from synermedgen_hf.image_processing_synermedgen import SynerMedGenImageProcessor
from synermedgen_hf.volumes.reading import slices_of
from synermedgen_hf.volumes.uploads import UploadLimits, read_upload, unpacked

AFFINE = np.array([[0, -2.0, 0, 30], [1.5, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
NAME = "Doe^Jane"


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Every request's folder is made below here; after each test, whatever it was, nothing may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def scan():
    return np.random.default_rng(0).integers(-1000, 1500, (12, 16, 10)).astype(np.int16)


@pytest.fixture
def send(tmp_path):
    """Writes bytes under a name that tells a patient, as files of hospitals are often called."""

    def write(content: bytes, ending: str) -> Path:
        path = tmp_path / f"{NAME}{ending}"
        path.write_bytes(content)
        return path

    return write


def nifti(array, affine=AFFINE) -> bytes:
    return nibabel.Nifti1Image(array, affine).to_bytes()


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def dicom_slice(place: int, series: str = "1.2.3", **tags) -> bytes:
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.SeriesInstanceUID = series
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{place + 1}"
    dataset.ImagePositionPatient = [0, 0, 2.5 * place]
    dataset.InstanceNumber = place
    dataset.PatientName = NAME
    for name, value in tags.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def refused(path, limits=None) -> str:
    """The message, which never names the file."""
    with pytest.raises(ValueError) as caught:
        read_upload(path, limits)
    assert NAME not in str(caught.value) and "temporary" not in str(caught.value)
    return str(caught.value)


class TestWhatIsTaken:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    @pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".png", ""])
    def test_a_nifti_whatever_its_name_says(self, send, scan, pack, ending):
        upload = read_upload(send(pack(nifti(scan)), ending))
        straight = nibabel.as_closest_canonical(nibabel.Nifti1Image(scan, AFFINE))
        assert upload.format == "NIfTI" and upload.white is None
        np.testing.assert_array_equal(upload.volume.array, np.asarray(straight.dataobj))
        np.testing.assert_allclose(upload.volume.affine, straight.affine)

    def test_a_metaimage(self, tmp_path, scan):
        sitk = pytest.importorskip("SimpleITK")
        path = tmp_path / f"{NAME}.mha"
        sitk.WriteImage(sitk.GetImageFromArray(scan.T), str(path), useCompression=True)
        upload = read_upload(path)
        assert upload.format == "MetaImage" and sorted(upload.volume.array.ravel()) == sorted(scan.ravel())

    def test_a_dicom_file_that_begins_like_a_tiff(self, send):
        """Some have both heads, for viewers of either kind."""
        pytest.importorskip("SimpleITK")
        content = dicom_slice(0)
        upload = read_upload(send(b"II*\x00" + content[4:], ".dcm"))
        assert upload.format == "DICOM" and upload.volume.array.shape == (128, 128, 1)

    def test_a_zip_of_a_dicom_series_with_what_lies_around_it(self, send):
        pytest.importorskip("SimpleITK")
        files = {f"series/IM{place}": dicom_slice(place) for place in range(4)}
        upload = read_upload(send(zipped({**files, "series/notes.txt": b"x" * 200, "__MACOSX/._IM0": b"y"}), ".zip"))
        assert upload.format == "DICOM" and upload.volume.array.shape == (128, 128, 4)
        assert upload.volume.spacing[2] == pytest.approx(2.5)

    @pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
    def test_a_picture_keeps_all_its_levels(self, send, dtype, white):
        levels = np.arange(20 * 30, dtype=dtype).reshape(20, 30) * (white // 600 or 1)
        upload = read_upload(send(png(levels), ".png"))
        assert upload.white == white
        np.testing.assert_array_equal(slices_of(upload.volume, "axial")[0], levels)

    def test_levels_become_scanner_units_as_in_the_pipeline(self, send):
        levels = np.linspace(0, 65535, 20 * 30).astype(np.uint16).reshape(20, 30)
        processor, path = SynerMedGenImageProcessor(), send(png(levels), ".png")
        for modality in ("CT", "PET", "T1"):
            volume = read_upload(path).in_scanner_units(modality, processor)
            ours = processor.preprocess_slice(np.float32(slices_of(volume, "axial")[0]), modality)
            theirs = processor.preprocess_slice(Image.open(path), modality)
            np.testing.assert_allclose(ours.vae_pixels, theirs.vae_pixels, atol=1e-5)

    def test_the_same_file_at_once(self, send, scan):
        path = send(nifti(scan), ".nii")
        with unpacked(path) as (one, _), unpacked(path) as (other, _):
            assert one != other and one.read_bytes() == other.read_bytes()


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "content",
        [b"<!DOCTYPE html><script>alert(1)</script>", b"<svg xmlns='x' onload='alert(1)'/>", b"\xef\xbb\xbf <?xml ?>"],
    )
    def test_a_web_page_or_a_drawing_that_calls_itself_a_picture(self, send, content):
        assert "web page or a drawing" in refused(send(content, ".png"))

    @pytest.mark.parametrize("content", [b"hello", b"\x7fELF" + bytes(500), b"%PDF-1.7" + bytes(500), b"GIF89a" * 90])
    def test_what_is_no_scan(self, send, content):
        assert "no scan that could be read here" in refused(send(content, ".nii.gz"))

    def test_nothing(self, send):
        assert "empty" in refused(send(b"", ".png"))

    def test_a_colour_photograph(self, send):
        assert "colour" in refused(send(png(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)), ".png"))

    @pytest.mark.parametrize("size", [(1, 1), (5000, 20)])
    def test_a_picture_too_small_or_too_large(self, send, size):
        assert f"{size[1]} x {size[0]} pixels" in refused(send(png(np.zeros(size, np.uint8)), ".png"))

    def test_a_picture_of_400_million_pixels_is_not_decoded(self, send):
        content = bytearray(png(np.zeros((30, 30), np.uint8)))
        content[16:24] = (20000).to_bytes(4, "big") * 2
        import zlib

        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        assert "pixels" in refused(send(bytes(content), ".png"))

    def test_something_hidden_behind_a_picture(self, send):
        assert "hidden behind" in refused(send(png(np.zeros((30, 30), np.uint8)) + zipped({"a": b"b"}), ".png"))

    @pytest.mark.parametrize("keep", [0.3, 0.9])
    def test_half_a_file(self, send, scan, keep):
        whole = {
            ".nii": nifti(scan),
            ".nii.gz": gzip.compress(nifti(scan)),
            ".png": png(np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8)),
            ".zip": zipped({"a": dicom_slice(0)}),
        }
        for ending, content in whole.items():
            message = refused(send(content[: int(keep * len(content))], ending))
            assert "complete" in message or "damaged" in message

    def test_a_gzip_bomb_unpacks_no_further_than_its_header_says(self, send, scan):
        bomb = gzip.compress(nifti(scan) + bytes(50_000_000))
        assert "more than its NIfTI header says" in refused(send(bomb, ".nii.gz"))
        assert "holds no NIfTI" in refused(send(gzip.compress(bytes(50_000_000)), ".nii.gz"))

    def test_a_header_that_promises_more_than_fits(self, send, scan):
        content = bytearray(nifti(scan))
        content[42:48] = np.array([2000, 2000, 2000], "<i2").tobytes()
        message = refused(send(gzip.compress(bytes(content)), ".nii.gz"), UploadLimits(voxels=40_000_000))
        assert "10 slices of 2000 x 2000 would fit" in message and "5.8 times as long" in message

    @pytest.mark.parametrize("offset", [1 << 30, 1e12])
    def test_voxels_that_begin_far_behind_the_header(self, send, scan, offset):
        content = bytearray(nifti(scan))
        content[108:112] = np.float32(offset).tobytes()
        limits = UploadLimits(unpacked_bytes=10**7)
        assert "begin at byte" in refused(send(gzip.compress(bytes(content)), ".nii.gz"), limits)

    @pytest.mark.parametrize("sides", [(0.015, 0.015, 0.015), (1, 1, 500), (0.1, 1, 20)])
    def test_voxels_of_no_scan(self, send, scan, sides):
        assert "The scan's voxels are" in refused(send(nifti(scan, np.diag([*sides, 1])), ".nii"))

    def test_four_dimensions(self, send):
        assert "three dimensions" in refused(send(nifti(np.zeros((9, 9, 9, 2), np.int16)), ".nii"))

    def test_a_metaimage_that_names_a_file_of_this_machine(self, send):
        header = b"ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\nElementType = MET_UCHAR\n"
        assert "in another file" in refused(send(header + b"ElementDataFile = /etc/passwd\n", ".mha"))

    @pytest.mark.parametrize(
        "lines",
        [
            "elementdatafile = LOCAL\nElementDataFile = {secret}\n",
            "ElementDataFile : {secret}\nElementDataFile = LOCAL\n",
            "Comment = a\x0bElementDataFile = LOCAL\nElementDataFile = {secret}\n",
            "ElementDataFile\0 = {secret}\nElementDataFile = LOCAL\n",
            "ElementDataFile\x1c = LOCAL\nElementDataFile = {secret}\n",
            "\x0bElementDataFile = LOCAL\nElementDataFile = {secret}\n",
            "dimsize = 9 9 9\nElementDataFile = LOCAL\n",
            "DimSize = 9 9 9\nElementDataFile = LOCAL\n",
        ],
    )
    def test_a_metaimage_that_says_one_thing_here_and_another_to_its_reader(self, send, tmp_path, lines):
        (tmp_path / "secret").write_bytes(b"s" * 9**3)
        header = "ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\nElementType = MET_UCHAR\n"
        content = (header + lines.format(secret=tmp_path / "secret")).encode()
        message = refused(send(content + b"v" * 9**3, ".mha"))
        assert "cannot be read" in message or "in another file" in message

    def test_a_metaimage_whose_size_goes_on_in_the_next_line(self, send):
        header = (
            "ObjectType = Image\nNDims = 3\nDimSize = 9 9\n9 = x\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
        )
        assert "cannot be read" in refused(send(header.encode() + b"v" * 9**3, ".mha"))

    def test_more_bytes_than_are_taken(self, send, scan):
        assert "at most 0 MB" in refused(send(nifti(scan), ".nii"), UploadLimits(file_bytes=1000))


class TestZips:
    @pytest.mark.parametrize(
        "name", ["../../evil.dcm", "/etc/evil.dcm", "..\\evil.dcm", "a/../../b.dcm", "C:/evil.dcm"]
    )
    def test_a_path_that_leads_out(self, send, tmp_path, name):
        assert "leads out of it" in refused(send(zipped({name: dicom_slice(0)}), ".zip"))
        assert not list(tmp_path.rglob("evil*"))

    def test_a_series_without_the_size_of_its_pixels(self, send):
        pytest.importorskip("SimpleITK")
        files = {f"IM{place}": dicom_slice(place, PixelSpacing=None) for place in range(4)}
        assert "damaged" in refused(send(zipped(files), ".zip"))

    def test_a_link(self, send):
        link = zipfile.ZipInfo("IM0")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(link, "/etc/passwd")
        assert "link" in refused(send(file.getvalue(), ".zip"))

    def test_a_bomb(self, send):
        start = dicom_slice(0)
        bomb = zipped({f"IM{number}": start + bytes(3_000_000) for number in range(4)})
        assert len(bomb) < 200_000
        assert "unpacks to" in refused(send(bomb, ".zip"), UploadLimits(unpacked_bytes=5_000_000))

    def test_a_bomb_that_lies_about_its_size(self, send):
        content = bytearray(zipped({"IM0": dicom_slice(0) + bytes(3_000_000)}))
        place = content.rindex(b"PK\x01\x02")
        content[place + 24 : place + 28] = (1000).to_bytes(4, "little")
        message = refused(send(bytes(content), ".zip"), UploadLimits(unpacked_bytes=1_000_000))
        assert "damaged" in message or "more than it says" in message

    @pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_a_way_of_packing_that_cannot_be_unpacked_bit_by_bit(self, send, packing):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", packing) as archive:
            archive.writestr("IM0", bytes(128) + b"DICM" + bytes(10**6))
        assert "packed in an unusual way" in refused(send(file.getvalue(), ".zip"))

    def test_too_many_files(self, send):
        files = {str(number): b"" for number in range(30)}
        assert "30 files" in refused(send(zipped(files), ".zip"), UploadLimits(files=20))

    def test_a_list_of_contents_that_is_too_long(self, send):
        content = bytearray(zipped({str(number): b"" for number in range(30)}))
        end = content.rindex(b"PK\x05\x06")
        content[end + 8 : end + 12] = bytes(4)  # it says that it holds nothing
        content[end + 12 : end + 16] = (10**9).to_bytes(4, "little")
        assert "list of contents is too long" in refused(send(bytes(content), ".zip"))
        content[end + 12 : end + 16] = bytes(4)
        longer = b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + bytes(16)  # the list of more than 65,535 files
        content[end:end] = longer
        assert "list of contents is too long" in refused(send(bytes(content), ".zip"))

    def test_no_dicom_inside(self, send, scan):
        assert "no DICOM" in refused(send(zipped({"scan.nii": nifti(scan)}), ".zip"))

    def test_two_series(self, send):
        files = {"a": dicom_slice(0, "1.2.3"), "b": dicom_slice(1, "1.2.4")}
        assert "2 DICOM series" in refused(send(zipped(files), ".zip"))

    def test_a_slice_that_says_it_is_enormous(self, send):
        assert "at most" in refused(send(zipped({"a": dicom_slice(0, Rows=30000, Columns=30000)}), ".zip"))

    def test_a_deflated_header(self, send):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        dataset.add_new(0x00091001, "OB", bytes(10**7))
        file = io.BytesIO()
        dataset.save_as(file)
        assert len(file.getvalue()) < 10**5
        assert "deflated" in refused(send(file.getvalue(), ".dcm"))

    def test_far_more_beside_the_voxels_than_a_series_has(self, send):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        dataset.add_new(0x00090010, "LO", "ME")
        dataset.add_new(0x00091001, "OB", bytes(40 << 20))
        file = io.BytesIO()
        dataset.save_as(file)
        assert "carry far more" in refused(send(zipped({"IM0": file.getvalue()}), ".zip"))

    def test_frames_that_add_up_to_few(self, send):
        files = {"IM0": dicom_slice(0, NumberOfFrames=3000), "IM1": dicom_slice(1, NumberOfFrames=-2998)}
        assert "several frames" in refused(send(zipped(files), ".zip"))

    def test_a_colour_screenshot(self, send):
        assert "colour" in refused(send(zipped({"a": dicom_slice(0, SamplesPerPixel=3)}), ".zip"))
