"""Scans from strangers: a file is told by its bytes, bounded before it is read, and never outlives its request.

Whoever uploads may mean harm or merely hold the wrong file; both get a sentence that says what is wrong. Names are
never trusted: a file gets a neutral one in a temporary folder of its own, so that no path of a zip can lead elsewhere
and no patient's name, often part of a file's, can turn up in a message or a log.
"""

import gzip
import io
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from PIL import Image

from ..image_processing_synermedgen import load_slice
from .reading import Volume, read_volume

KNOWN = "a PNG, a NIfTI (.nii, .nii.gz), a MetaImage (.mha) or a zip of one DICOM series"
PICTURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\x00": "TIFF", b"MM\x00*": "TIFF"}
# What says where the voxels are and how many, by its only spelling.
METAIMAGE_NAMES = {
    name.lower(): name
    for name in ("ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "ElementDataFile")
}
ENTRY_BYTES = 1024  # at most, on the average, of a zip's list of contents: 46, a name, what an archiver adds
MAX_HEADER = 16 << 20  # bytes of a file before or beside its voxels: extensions, private elements
DEFLATED_DICOM = "1.2.840.10008.1.2.1.99"  # the one transfer syntax whose header is compressed, too
VOXEL_MM, MAX_RATIO = (0.02, 100.0), 100.0  # sides of voxels that are taken, and how unequal they may be
END_OF_PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# In memory for every voxel while a volume is synthesised: as read, float32, mean and deviation, a copy to write.
BYTES_PER_VOXEL = 40


@dataclass(frozen=True)
class UploadLimits:
    """
    What an upload may hold at most.

    Args:
        file_bytes (`int`): Of the file as sent.
        unpacked_bytes (`int`): Of everything in it.
        files (`int`): In a zip.
        smallest_side, side (`int`): Pixels along a side of a slice.
        slices (`int`): Of a volume.
        voxels (`int`, *optional*): Of a volume; by default what the free memory of the machine takes.
    """

    file_bytes: int = 1 << 30
    unpacked_bytes: int = 4 << 30
    files: int = 4096
    smallest_side: int = 8
    side: int = 4096
    slices: int = 2048
    voxels: int | None = None


@dataclass(frozen=True)
class Upload:
    """
    A scan that came in.

    Args:
        volume ([`Volume`]): A picture is a volume of one axial slice of 1 mm voxels.
        format (`str`): `"PNG"`, `"JPEG"`, `"TIFF"`, `"NIfTI"`, `"MetaImage"` or `"DICOM"`.
        white (`int`, *optional*): Of a picture, the grey level of white: 255 or 65535; its values are grey levels.
    """

    volume: Volume
    format: str
    white: int | None = None

    def in_scanner_units(self, modality: str, image_processor) -> Volume:
        """
        The scan as `modality`: the levels of a picture span the window of a CT, CBCT or PET and are taken for the
        signal of an MR, exactly as the pipeline takes them. Volumes are in scanner units already.

        Args:
            modality (`str`): Such as `"CT"`.
            image_processor ([`SynerMedGenImageProcessor`]): Knows the windows.
        """
        if self.white is None or "high" not in image_processor.intensity[modality]:
            return self.volume
        low, high = image_processor.intensity_window(self.volume.array, modality)
        array = (low + self.volume.array / self.white * (high - low)).astype(np.float32)
        return replace(self.volume, array=array)


def free_memory() -> int:
    """Bytes this process may still take: of the machine, or of the container it runs in where that is less."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return max(free, 0)


def read_upload(path: str | os.PathLike, limits: UploadLimits | None = None) -> Upload:
    """
    Read a scan that somebody sent: checked first, then read, and nothing of it left on disk.

    Args:
        path (`str` or `Path`): The file; what its name says does not matter.
        limits ([`UploadLimits`], *optional*): What to accept.

    Returns:
        [`Upload`]

    Raises:
        `ValueError`: Not a scan, damaged, in colour, larger than the limits, or hostile. The message says which, and
            never holds the name of the file.
    """
    limits = limits or UploadLimits()
    with unpacked(path, limits) as (scan, format):
        if format in PICTURES.values():
            return _read_picture(scan, format, limits)
        try:
            volume = read_volume(scan)
            _check_spacing(volume)
            return Upload(volume, format)
        except (ValueError, MemoryError) as error:
            # The place is ours and gone by now; only the reason is of use.
            reason = str(error).replace(f"{scan}: ", "").replace(str(scan), f"The {format} file")
            raise ValueError(reason or f"The {format} file does not fit into memory.") from None
        except (AttributeError, TypeError, LookupError, ArithmeticError):  # of headers that lack or twist something
            raise ValueError(f"The {format} file is damaged: what it must say is missing, or makes no sense.") from None


@contextmanager
def unpacked(path: str | os.PathLike, limits: UploadLimits | None = None) -> Iterator[tuple[Path, str]]:
    """
    The checked contents of an upload in a temporary folder, which is gone afterwards.

    Args:
        path (`str` or `Path`): The file.
        limits ([`UploadLimits`], *optional*): What to accept.

    Yields:
        `tuple[Path, str]`: A file with a neutral name, or for DICOM a folder of files, and the format as in [`Upload`].

    Raises:
        `ValueError`: As [`read_upload`], before anything large is unpacked.
    """
    limits = limits or UploadLimits()
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError("The file is empty.")
    if size > limits.file_bytes:
        raise ValueError(f"The file has {_megabytes(size)}; at most {_megabytes(limits.file_bytes)} are taken.")
    with tempfile.TemporaryDirectory(prefix="synermedgen-upload-") as folder, open(path, "rb") as file:
        start = file.read(4096)
        file.seek(0)
        yield _unpack(file, start, path.resolve(), Path(folder), limits)


def _unpack(file, start: bytes, path: Path, folder: Path, limits: UploadLimits) -> tuple[Path, str]:
    if start[128:132] == b"DICM":  # before all others: its first 128 bytes may be anything, even a TIFF's
        (folder / "series").mkdir()
        _named(path, folder / "series" / "000000.dcm")
        _check_dicom(folder / "series", limits)
        return folder / "series", "DICOM"
    for magic, format in PICTURES.items():
        if start.startswith(magic):
            return path, format
    if start.startswith(b"\x1f\x8b"):
        return _gunzip(file, folder / "scan.nii", limits), "NIfTI"
    if _is_nifti(start):
        _check_nifti(start, path.stat().st_size, limits)
        return _named(path, folder / "scan.nii"), "NIfTI"
    if start.startswith(b"ObjectType"):
        _check_metaimage(file.read(1 << 16), limits)  # some keep all of a DICOM header in theirs
        return _named(path, folder / "scan.mha"), "MetaImage"
    if start.startswith(b"PK\x03\x04"):
        return _unzip(file, folder / "series", limits), "DICOM"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<script")):
        raise ValueError(f"This is a web page or a drawing (HTML, SVG), whatever its name says. Send {KNOWN}.")
    if text.startswith(b"nrrd"):
        raise ValueError(f"NRRD files are not taken here. Send {KNOWN}.")
    raise ValueError(f"This is no scan that could be read here. Send {KNOWN}.")


def _named(path: Path, name: Path) -> Path:
    name.symlink_to(path)
    return name


def _megabytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GB"


# ---- what would be too large, told from headers ----


def _check_size(shape: tuple[int, ...], itemsize: int, limits: UploadLimits):
    """Raise a `ValueError` for a volume `(columns, rows, slices)` that is too small, too large, or none."""
    size = " x ".join(str(side) for side in shape)
    shape = (*shape, *(1,) * (3 - len(shape)))
    if len(shape) > 3 and prod(shape[3:]) != 1 or min(shape) < 1:
        raise ValueError(f"The scan has {size} voxels: a volume of three dimensions is needed, one value a voxel.")
    if sorted(shape[:3])[1] < limits.smallest_side:
        raise ValueError(f"The scan has {size} voxels: slices need at least {limits.smallest_side} pixels a side.")
    slices = min(shape[:3])  # whichever axis is the stack, no slice may be larger than the sides allow
    if max(shape[:3]) > max(limits.side, limits.slices) or slices > limits.slices:
        raise ValueError(
            f"The scan has {size} voxels: at most {limits.slices} slices of {limits.side} x {limits.side} are taken."
        )
    voxels = free_memory() // BYTES_PER_VOXEL if limits.voxels is None else limits.voxels
    voxels = min(voxels, limits.unpacked_bytes // itemsize)
    if prod(shape[:3]) > voxels:
        columns, rows, count = shape[:3]
        fitting = voxels // (columns * rows)
        factor = (prod(shape[:3]) / max(voxels, 1)) ** (1 / 3)
        advice = f"about {fitting} slices of {columns} x {rows} would fit, or" if fitting else "what would fit is"
        raise ValueError(
            f"The scan has {size} voxels, more than the free memory of this machine takes: {advice} the whole scan "
            f"with voxels {factor:.1f} times as long. Crop or resample it, or run the package on a larger machine."
        )


def _check_spacing(volume: Volume):
    """Raise a `ValueError` for voxels of no scan: what counts in mm, or makes them square, would take for ever."""
    sides = volume.spacing
    if min(sides) < VOXEL_MM[0] or max(sides) > VOXEL_MM[1] or max(sides) > MAX_RATIO * min(sides):
        said = " x ".join(f"{side:.3g}" for side in sides)
        raise ValueError(
            f"The scan's voxels are {said} mm; from {VOXEL_MM[0]} to {VOXEL_MM[1]:.0f} mm are taken, one side at most "
            f"{MAX_RATIO:.0f} times another. Correct the header, or resample the scan."
        )


def _is_nifti(start: bytes) -> bool:
    sizes = (348, 540)
    return len(start) >= 348 and any(int.from_bytes(start[:4], order) in sizes for order in ("little", "big"))


def _check_nifti(start: bytes, size: int | None, limits: UploadLimits) -> int:
    """The size in bytes that a NIfTI file has by its header; a `ValueError` if it is none or too large."""
    second = 540 in (int.from_bytes(start[:4], order) for order in ("little", "big"))
    header_class, length = (nibabel.Nifti2Header, 540) if second else (nibabel.Nifti1Header, 348)
    try:
        header = header_class(start[:length])
        shape, itemsize = header.get_data_shape(), header.get_data_dtype().itemsize
        offset = header.get_data_offset()
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise ValueError("The NIfTI header cannot be read: the file is damaged or something else.") from error
    _check_size(shape, itemsize, limits)
    # Up to there lie extensions, which are read into memory as they are.
    if not 0 <= offset <= MAX_HEADER:
        raise ValueError(f"The NIfTI header says that its voxels begin at byte {offset:,}: it is damaged or a trap.")
    whole = offset + prod(shape) * itemsize
    if size is not None and size < whole:
        raise ValueError(f"The NIfTI file is not complete: {whole:,} bytes by its header, {size:,} are there.")
    return whole


def _gunzip(file, target: Path, limits: UploadLimits) -> Path:
    """Unpack a NIfTI up to the size that its header says, so that nothing can swell beyond it."""
    try:
        with gzip.GzipFile(fileobj=file) as packed:
            start = packed.read(4096)
            if not _is_nifti(start):
                raise ValueError(f"The gzip file holds no NIfTI. Send {KNOWN}.")
            left = _check_nifti(start, None, limits)
            with open(target, "wb") as unpacked:
                chunk = start
                while chunk and left > 0:
                    unpacked.write(chunk[:left])
                    left -= len(chunk)
                    chunk = packed.read(1 << 20)
                if chunk:
                    raise ValueError("The gzip file holds more than its NIfTI header says: it is damaged or a trap.")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError("The gzip file is damaged or not complete: send it again.") from error
    if left > 0:
        raise ValueError(f"The NIfTI file is not complete: {left:,} bytes are missing.")
    return target


def _check_metaimage(start: bytes, limits: UploadLimits):
    """
    Only a header whose voxels follow in the same file: another file could be any of this machine.

    The library that reads the file afterwards takes `:` for `=`, knows names in one spelling only and passes over what
    it does not know. A header that could mean one thing here and another thing there is refused.
    """
    damaged = "The MetaImage header cannot be read: the file is damaged or something else."
    header: dict[str, str] = {}
    for line in start.decode("latin-1").split("\n"):
        name, equals, value = line.partition("=")
        name, value = name.strip(" \t"), value.strip(" \t\r")
        known = METAIMAGE_NAMES.get(name.lower())
        if not equals or not name.isascii() or not name.isprintable() or ":" in name or len(name) > 80:
            raise ValueError(damaged)
        if known not in (None, name) or known in header:
            raise ValueError(damaged)
        if known:
            header[known] = value
        if name == "ElementDataFile":
            break
    if header.get("ElementDataFile") not in ("LOCAL", "Local", "local"):
        raise ValueError("The MetaImage keeps its voxels in another file: send an .mha, which holds them itself.")
    if header.get("ElementNumberOfChannels", "1") != "1":
        raise ValueError("The MetaImage holds several values a voxel: a scan has one.")
    try:
        sides = [side for side in header["DimSize"].split(" ") if side]
        shape = tuple(int(side) for side in sides)
        # Numbers that are missing here would be read from the next line there.
        if header["NDims"] != str(len(shape)) or not all(side.isascii() and side.isdigit() for side in sides):
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(damaged) from None
    _check_size(shape, 8, limits)


def _check_directory(file, limits: UploadLimits):
    """
    Raise a `ValueError` for a list of contents that is too long, before it is read: each entry becomes an object.

    The list ends with a record of 22 bytes and perhaps a comment, which says how long the list is, at its bytes 12 to
    16 (APPNOTE.TXT 4.3.16). A longer one may stand before it, which is found by its locator of 20 bytes (4.3.15); what
    needs that is no upload.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 20 - 22 - 0xFFFF))
    end = file.read()
    file.seek(0)
    place = end.rfind(b"PK\x05\x06")
    record = end[place : place + 22]
    if place < 0 or len(record) < 22:
        raise ValueError("The zip is damaged or not complete: pack and send it again.")
    entries, length = int.from_bytes(record[10:12], "little"), int.from_bytes(record[12:16], "little")
    if length > limits.files * ENTRY_BYTES or end[max(0, place - 20) : place].startswith(b"PK\x06\x07"):
        raise ValueError(f"The zip's list of contents is too long: at most {limits.files:,} files are taken.")
    if entries > limits.files:
        raise ValueError(f"The zip holds {entries:,} files; at most {limits.files:,} are taken.")


def _unzip(file, folder: Path, limits: UploadLimits) -> Path:
    """The DICOM files of a zip under numbers for names. What a zip says of its sizes is checked, not believed."""
    folder.mkdir()
    kept = others = written = 0
    _check_directory(file, limits)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > limits.files:
                raise ValueError(f"The zip holds {len(members):,} files; at most {limits.files:,} are taken.")
            for member in members:
                _check_member(member)
            if (total := sum(member.file_size for member in members)) > limits.unpacked_bytes:
                unpacked, most = _megabytes(total), _megabytes(limits.unpacked_bytes)
                raise ValueError(f"The zip unpacks to {unpacked}; at most {most} are taken.")
            for member in members:
                if member.is_dir():
                    continue
                with archive.open(member) as packed:
                    start = packed.read(132)
                    if start[128:] != b"DICM":
                        others += 1
                        continue
                    with open(folder / f"{kept:06d}.dcm", "wb") as unpacked:
                        chunk = start
                        while chunk:
                            written += len(chunk)
                            if written > limits.unpacked_bytes:
                                most = _megabytes(limits.unpacked_bytes)
                                raise ValueError(f"The zip unpacks to more than it says and more than {most}.")
                            unpacked.write(chunk)
                            chunk = packed.read(1 << 20)
                kept += 1
    # zipfile raises the last one for a way of packing that it does not know.
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError) as error:
        raise ValueError("The zip is damaged or not complete: pack and send it again.") from error
    if not kept:
        raise ValueError(f"The zip holds no DICOM file among its {others} files. Send {KNOWN}.")
    _check_dicom(folder, limits)
    return folder


def _check_member(member: zipfile.ZipInfo):
    parts = member.filename.replace("\\", "/").split("/")
    if member.filename.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise ValueError("The zip holds a path that leads out of it: it is refused. Pack the series anew.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError("The zip holds a link instead of a file: it is refused. Pack the files themselves.")
    # Of other ways of packing, zipfile unpacks whatever it has read at once, however much that becomes.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("The zip is packed in an unusual way: pack it as an ordinary zip (deflate).")
    if member.flag_bits & 1:
        raise ValueError("The zip is locked with a password: pack it without one.")


def _check_dicom(folder: Path, limits: UploadLimits):
    try:
        import pydicom
    except ImportError:
        raise ImportError("Reading DICOM needs pydicom: pip install 'synermedgen-hf[dicom]'.") from None
    tags = ["Rows", "Columns", "NumberOfFrames", "SeriesInstanceUID", "SamplesPerPixel"]
    series, slices, sides, beside = set(), 0, [], 0
    for file in sorted(folder.iterdir()):
        try:
            packed = pydicom.filereader.read_file_meta_info(file).get("TransferSyntaxUID") == DEFLATED_DICOM
            if not packed:
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
                rows, columns = int(header.get("Rows", 0)), int(header.get("Columns", 0))
                frames = int(header.get("NumberOfFrames") or 1)
        except Exception as error:  # pydicom raises nearly anything on a damaged file
            raise ValueError("A DICOM file is damaged or not complete: send the series again.") from error
        if packed:  # nobody knows how large it is before it is unpacked
            raise ValueError("The DICOM series is deflated, header and all: export it uncompressed.")
        if not rows or not columns:
            file.unlink()  # a DICOMDIR, a report: no image
            continue
        if frames != 1:
            raise ValueError("The DICOM files hold several frames each, which are not read: export single slices.")
        slices += 1
        beside += max(0, file.stat().st_size - 8 * rows * columns)
        if beside > MAX_HEADER + slices * (MAX_HEADER // 16):
            raise ValueError("The DICOM files carry far more beside their voxels than a series does: they are refused.")
        if int(header.get("SamplesPerPixel") or 1) != 1:
            raise ValueError("The DICOM series is in colour: a scan slice is grey. Screenshots cannot be used.")
        series.add(str(header.get("SeriesInstanceUID")))
        sides.append((columns, rows))
    if not sides:
        raise ValueError("The DICOM files hold no image.")
    if len(series) > 1:
        raise ValueError(f"The upload holds {len(series)} DICOM series: send one series alone.")
    _check_size((max(side[0] for side in sides), max(side[1] for side in sides), slices), 4, limits)


# ---- pictures ----


def _read_picture(path: Path, format: str, limits: UploadLimits) -> Upload:
    try:
        with Image.open(path, formats=[format]) as picture:
            width, height = picture.size
            if max(width, height) > limits.side or min(width, height) < limits.smallest_side:
                raise ValueError(
                    f"The picture has {width} x {height} pixels; from {limits.smallest_side} to {limits.side} a side "
                    "are taken."
                )
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"The file holds {picture.n_frames} pictures: send one of them, or a volume.")
            if format == "PNG" and not _ends_as_png(path):
                raise ValueError(
                    "The PNG does not end where a PNG ends: it is not complete, or something is hidden behind it. Save "
                    "the picture again."
                )
            picture.load()
    except Image.DecompressionBombError:
        raise ValueError(f"The picture has too many pixels; up to {limits.side} a side are taken.") from None
    except (OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"The {format} file cannot be read: it is damaged or not complete.") from error
    levels, is_picture = load_slice(picture)
    if not is_picture:
        raise ValueError("The picture holds real numbers instead of grey levels: send it as NIfTI or MetaImage.")
    # The slice that `slices_of(volume, "axial")` shows is the picture.
    volume = Volume(np.ascontiguousarray(levels.T[::-1, ::-1, None]), np.eye(4))
    return Upload(volume, format, int(np.iinfo(levels.dtype).max))


def _ends_as_png(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(END_OF_PNG), io.SEEK_END)
        return file.read() == END_OF_PNG


__all__ = ["Upload", "UploadLimits", "free_memory", "read_upload", "unpacked"]
