"""Small scans as other programs write them: what the readers of datasets are tried on."""

import locale
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from synermedgen_hf.data.sources import CaseRecord, load_case

SHAPE = (24, 28, 10)
# As scanners store them: columns to the patient's left, rows to the back.
AFFINE = np.array([[-2.0, 0, 0, 23.0], [0, -2.0, 0, 27.0], [0, 0, 5.0, -20.0], [0, 0, 0, 1]])
RANGES = {"CT": (-150, 1500), "CBCT": (-200, 1200), "PET": (0.4, 9)}
OUTSIDE = {"CT": -1024, "CBCT": -1024}


class Scans:
    """Simulated patients, one a seed, and the files they come in."""

    shape, affine = SHAPE, AFFINE

    @staticmethod
    def body(seed=0, shape=SHAPE):
        """bool, an ellipse in every axial slice but the first, a little different for each seed."""
        shift = np.random.default_rng(seed).uniform(-0.05, 0.05, 2)
        x, y, _ = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
        body = (x - shift[0]) ** 2 / 0.7 + (y - shift[1]) ** 2 / 0.8 < 1
        body[:, :, 0] = False
        return body

    @classmethod
    def image(cls, name, seed=0, shape=SHAPE):
        """A modality in scanner units, or `"mask"` or `"seg"`."""
        body = cls.body(seed, shape)
        if name == "mask":
            return body.astype(np.uint8)
        if name == "seg":
            return (body & (np.indices(shape).sum(0) % 7 == 0)).astype(np.uint8) * 4
        rng = np.random.default_rng([seed, *name.encode()])
        low, high = RANGES.get(name, (60, 1000))
        if name == "PET":
            return np.where(body, rng.uniform(low, high, shape), 0).astype(np.float32)
        return np.where(body, rng.integers(low, high, shape), OUTSIDE.get(name, 0)).astype(np.int16)

    @staticmethod
    def save(path, array, affine=AFFINE):
        """By nibabel or SimpleITK, as the extension says."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith((".nii", ".nii.gz")):
            nibabel.save(nibabel.Nifti1Image(array, affine), path)
            return path
        sitk.WriteImage(Scans._itk_image(array, affine), str(path))
        return path

    @staticmethod
    def save_dicom(folder, array, affine=AFFINE):
        """One file a slice."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        image = Scans._itk_image(array, affine)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        encoding = locale.setlocale(locale.LC_CTYPE)
        for place in range(image.GetDepth()):
            plane = image[:, :, place]
            position = "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, place))))
            tags = {"0008|0018": f"1.2.3.{place + 1}", "0008|0060": "CT", "0020|000e": "1.2.3.9", "0020|0032": position}
            for tag, value in tags.items():
                plane.SetMetaData(tag, value)
            writer.SetFileName(str(folder / f"{place}.dcm"))
            writer.Execute(plane)
        locale.setlocale(locale.LC_CTYPE, encoding)  # GDCM leaves another one behind
        return folder

    @staticmethod
    def _itk_image(array, affine):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        spacing, flip = np.linalg.norm(affine[:3, :3], axis=0), np.diag([-1.0, -1, 1])
        image.SetSpacing(spacing.tolist())
        image.SetOrigin((flip @ affine[:3, 3]).tolist())
        image.SetDirection((flip @ affine[:3, :3] / spacing).ravel().tolist())
        return image

    def write(self, folder, seed=0, shape=SHAPE, **files):
        """Files of one patient: `ct="CT"` becomes `ct.nii.gz`; a name with a dot keeps its own extension."""
        for name, content in files.items():
            name = name if "." in name else f"{name}.nii.gz"
            self.save(Path(folder) / name, self.image(content, seed, shape))
        return Path(folder)

    def synthrad(self, root, *names):
        """SynthRAD2023 cases such as `1BA001`."""
        for seed, name in enumerate(names):
            source = {"mr": "MRI"} if name[0] == "1" else {"cbct": "CBCT"}
            region = {"B": "brain", "P": "pelvis"}[name[1]]
            self.write(Path(root) / f"Task{name[0]}" / region / name, seed, ct="CT", mask="mask", **source)
        return Path(root)

    def brats(self, root, *names):
        """BraTS 2023 cases such as `BraTS-GLI-00001-000`."""
        contents = {"t1n": "T1", "t1c": "T1CE", "t2w": "T2", "t2f": "FLAIR", "seg": "seg"}
        for seed, name in enumerate(names):
            self.write(Path(root) / name, seed, **{f"{name}-{part}": what for part, what in contents.items()})
        return Path(root)

    def autopet(self, root, patient, *studies):
        """PET/CT examinations of one patient."""
        for seed, study in enumerate(studies):
            self.write(Path(root) / f"PETCT_{patient}" / study, seed, SUV="PET", CTres="CT", SEG="seg")
        return Path(root)

    def record(self, folder, region="brain", mask=None, lesion=None, axis="axial", **files):
        """The record of files in a folder, `CT="ct.nii.gz"`."""
        places = {what: str(Path(folder) / name) for what, name in (("mask", mask), ("lesion", lesion)) if name}
        paths = {modality: str(Path(folder) / name) for modality, name in files.items()}
        return CaseRecord("own", "case", "patient", region, axis, paths, **places)

    def load(self, folder, min_share=0.02, **record):
        """The case of files in a folder."""
        return load_case(self.record(folder, **record), min_share)


@pytest.fixture(scope="session")
def scans():
    return Scans()


@pytest.fixture
def ascii_locale():
    """A machine whose files are not UTF-8 unless told."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)
