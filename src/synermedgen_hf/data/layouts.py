"""Simulated patients on disk, in the layouts of the datasets people have: for trying readers on, and for tests.

Names, folders, data types, labels, grids and directions are those of the real datasets, traps included; the pictures
are those of [`synermedgen_hf.data.phantom`] and small. What is not known of a layout is said where it is chosen.
"""

import csv
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from synermedgen_hf.data.phantom import PHANTOM_VERSION, PhantomVolume, simulate_volume

# What made a folder, kept in it so that a run can be taken up again and nothing else is ever written over.
RECORD = ".phantom.json"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Case:
    """
    One examination to be simulated and written.

    Args:
        volume (`dict`): Arguments of [`simulate_volume`].
        files (`dict[str, str]`): Path inside the dataset to what it holds, such as `"CT"` or `"mask"`.
        contents (`Callable`): [`PhantomVolume`] to what there is to hold: name to `(array, affine)`, in the order
            `(slice, row, column)` of the phantom and of the data type of the file.
        orientation (`str`, defaults to `"LPS"`): Where the three axes of the file point to, as nibabel calls it.
        row (`dict`): What tables and indices of the dataset say about the case.
    """

    volume: dict
    files: dict[str, str]
    contents: Callable[[PhantomVolume], dict]
    orientation: str = "LPS"
    row: dict = field(default_factory=dict)


class Written(NamedTuple):
    """What [`write_layout`] wrote or found written: the folder, the number of cases and files, and bytes in all."""

    folder: Path
    cases: int
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.folder}: {self.cases} cases, {self.files} files, {self.bytes / 2**20:.1f} MB"


def _volume_seed(layout: str, seed: int, patient: int) -> int:
    """Patients of different layouts and seeds have nothing in common."""
    return zlib.crc32(f"{layout}/{seed}/{patient}".encode())


def _rng(layout: str, seed: int, patient: int) -> np.random.Generator:
    return np.random.default_rng(_volume_seed(layout, seed, patient))


# ---------------------------------------------------------------------------------------------------------------------
# From volumes to the contents of files
# ---------------------------------------------------------------------------------------------------------------------


def _int16(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), -32768, 32767).astype(np.int16)


def _outline(volume: PhantomVolume, margin_mm: float = 10) -> np.ndarray:
    """SynthRAD's mask: the body with a rim of air, as far as the CBCT reaches if there is one."""
    pixel = volume.spacing[1]
    mask = np.stack([ndimage.distance_transform_edt(~slice_) * pixel <= margin_mm for slice_ in volume.mask])
    if "CBCT" in volume.images:
        mask &= ndimage.binary_fill_holes((volume.images["CBCT"] > -1024).any(0))
    return mask


def _picture(image: np.ndarray) -> np.ndarray:
    """The middle slice from black to white."""
    middle = image[len(image) // 2]
    return np.rint(255 * (middle - middle.min()) / max(np.ptp(middle), 1e-6)).astype(np.uint8)


def synthrad_contents(volume: PhantomVolume, fill: int) -> dict:
    """MRI or CBCT, CT and mask, cropped to the mask with 10 mm to spare; outside the field of view lies `fill`."""
    mask = _outline(volume)
    spare = np.ceil(10 / np.array(volume.spacing)).astype(int) * (0, 1, 1)
    places = np.argwhere(mask)
    low = np.maximum(places.min(0) - spare, 0)
    high = np.minimum(places.max(0) + spare + 1, mask.shape)
    crop = tuple(map(slice, low, high))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    arrays = {name: _int16(image[crop]) for name, image in volume.images.items()}
    for name in arrays:
        if name != "MRI":
            arrays[name][arrays[name] == -1024] = fill
    arrays["mask"] = mask[crop].astype(np.uint8)
    arrays["overview"] = np.concatenate([_picture(image[crop]) for image in volume.images.values()], 1)
    return {name: (array, affine) for name, array in arrays.items()}


def brats_contents(volume: PhantomVolume, labels: tuple[int, int, int], dtype: type) -> dict:
    """Four contrasts in the space of the SRI24 atlas, and the segmentation with `labels` for necrosis, oedema, rim."""
    seg = np.zeros(volume.mask.shape, np.uint8)
    for name, label in zip(("oedema", "enhancing rim", "necrosis"), (labels[1], labels[2], labels[0]), strict=True):
        if name in volume.structures:
            seg[volume.structures[name]] = label
    between, pixel, _ = volume.spacing
    # All cases share the affine of the atlas, whose origin is a corner of the volume.
    affine = np.array([[0, 0, -pixel, 0], [0, -pixel, 0, pixel * (seg.shape[1] - 1)], [between, 0, 0, 0], [0, 0, 0, 1]])
    convert = _int16 if dtype is np.int16 else np.asarray
    arrays = {name: convert(image) for name, image in volume.images.items()} | {"seg": seg}
    return {name: (array, affine) for name, array in arrays.items()}


def autopet_contents(volume: PhantomVolume, becquerel_per_suv: float) -> dict:
    """PET in SUV and in Bq/ml, CT on the PET's grid and on its own finer one, segmentation 0/1."""
    suv, ct = volume.images["PET"], volume.images["CT"]
    # Rows and slices of the phantom's coronal volume are z and y: the scanner's own pixels lie in x and y.
    fine = ndimage.zoom(ct, (2, 1, 2), order=1, grid_mode=True, mode="nearest")
    halved = np.diag([0.5, 1, 0.5, 1.0])
    halved[:3, 3] = -0.25, 0, -0.25  # the corner of the first pixel stays where it is
    arrays = {
        "SUV": suv,
        "PET": suv * np.float32(becquerel_per_suv),
        "CTres": ct,
        "SEG": volume.lesion.astype(np.uint8),
    }
    contents = {name: (array, volume.affine) for name, array in arrays.items()}
    return contents | {"CT": (_int16(fine), volume.affine @ halved)}


def myops_contents(volume: PhantomVolume) -> dict:
    """Three sequences and the labels 200, 500, 600, 1220 and 2221."""
    gd = np.zeros(volume.mask.shape, np.int16)
    labels = {"myocardium": 200, "left ventricle": 500, "right ventricle": 600, "oedema": 1220, "scar": 2221}
    for name, label in labels.items():
        if name in volume.structures:
            gd[volume.structures[name]] = label
    arrays = {name: _int16(image) for name, image in volume.images.items()} | {"gd": gd}
    return {name: (array, volume.affine) for name, array in arrays.items()}


def plain_contents(volume: PhantomVolume) -> dict:
    """Float32 images in scanner units and the body's mask."""
    arrays = volume.images | {"mask": volume.mask.astype(np.uint8)}
    return {name: (array, volume.affine) for name, array in arrays.items()}


def picture_contents(volume: PhantomVolume, count: int) -> dict:
    """
    `count` slices around the middle as pictures, named such as `"CT 3"`, from the volume's minimum to its maximum.

    Which window the authors used is not published; the grey values in their figures fit this one best.
    """
    first = (len(volume.mask) - count) // 2
    pictures = {}
    for name, image in volume.images.items():
        grey = np.rint(255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)
        for i in range(count):
            pictures[f"{name} {i}"] = (grey[first + i], None)
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: which cases there are and how their files are called
# ---------------------------------------------------------------------------------------------------------------------

SYNTHRAD2023_CENTRES = {(1, "brain"): "ABC", (1, "pelvis"): "AC", (2, "brain"): "ABC", (2, "pelvis"): "ABC"}
# MR of SynthRAD2023 by region and centre: sequence, contrast agent.
SYNTHRAD2023_MR = {
    ("brain", "A"): ("SPGR", False),
    ("brain", "B"): ("SPGR", True),
    ("brain", "C"): ("SPGR", True),
    ("pelvis", "A"): ("SPGR", False),
    ("pelvis", "C"): ("T2", False),
}
SYNTHRAD2025_REGIONS = {"AB": "abdomen", "HN": "head-neck", "TH": "thorax"}


def synthrad2023(layout: str, subjects: int, seed: int, options: dict, task: int) -> list[Case]:
    """`Task1/brain/1BA001/{mr,ct,mask}.nii.gz`: brain and pelvis in turn, then the next centre."""
    cases = []
    for i in range(subjects):
        region = ("brain", "pelvis")[i % 2]
        centres = SYNTHRAD2023_CENTRES[task, region]
        centre, number = centres[i // 2 % len(centres)], i // 2 // len(centres) + 1
        name = f"{task}{region[0].upper()}{centre}{number:03d}"
        folder = f"Task{task}/{region}"
        source, file = ("MRI", "mr") if task == 1 else ("CBCT", "cbct")
        volume = dict(region=region, protocol="synthrad", seed=_volume_seed(layout, seed, i), **options)
        volume["modalities"] = source, "CT"
        if task == 1:
            volume["mr_sequence"] = SYNTHRAD2023_MR[region, centre]
        contents = {file: source, "ct": "CT", "mask": "mask"}
        files = {f"{folder}/{name}/{file}.nii.gz": content for file, content in contents.items()}
        files[f"{folder}/overview/{name}_train.png"] = "overview"
        cases.append(Case(volume, files, partial(synthrad_contents, fill=-1000)))
    return cases


def synthrad2025(layout: str, subjects: int, seed: int, options: dict, task: int) -> list[Case]:
    """`synthRAD2025_Task1_Train/Task1/AB/1ABA001/{mr,ct,mask}.mha`; centre D comes in a folder of its own."""
    cases = []
    for i in range(subjects):
        site = list(SYNTHRAD2025_REGIONS)[i % 3]
        centre, number = "ABCDE"[i // 3 % 5], i // 15 + 1
        name = f"{task}{site}{centre}{number:03d}"
        folder = f"synthRAD2025_Task{task}_Train{'_D' if centre == 'D' else ''}/Task{task}/{site}"
        source, file = ("MRI", "mr") if task == 1 else ("CBCT", "cbct")
        region = SYNTHRAD2025_REGIONS[site]
        volume = dict(region=region, protocol="synthrad", seed=_volume_seed(layout, seed, i), **options)
        volume["modalities"] = source, "CT"
        contents = {file: source, "ct": "CT", "mask": "mask"}
        files = {f"{folder}/{name}/{file}.mha": content for file, content in contents.items()}
        files[f"{folder}/overviews/{name}_overview.png"] = "overview"
        cases.append(Case(volume, files, partial(synthrad_contents, fill=-1024)))
    return cases


def brats(layout: str, subjects: int, seed: int, options: dict, year: int, misnamed: bool = False) -> list[Case]:
    """The five naming schemes of BraTS; from 2023 on every other patient comes a second time."""
    cases = []
    for i in range(subjects):
        volume = dict(region="brain", protocol="brats", seed=_volume_seed(layout, seed, i), **options)
        contents = {"t1": "T1", "t1ce": "T1CE", "t2": "T2", "flair": "FLAIR", "seg": "seg"}
        labels, dtype, ending = (1, 2, 4), np.int16, ".nii.gz"
        if year >= 2023:
            contents = {"t1n": "T1", "t1c": "T1CE", "t2w": "T2", "t2f": "FLAIR", "seg": "seg"}
            labels, dtype = (1, 2, 3), np.float32
            for visit in range(2 - i % 2):
                name = f"BraTS-GLI-{i:05d}-{visit:03d}"
                folder = f"ASNR-MICCAI-BraTS{year}-GLI-Challenge-TrainingData/{name}"
                files = {f"{folder}/{name}-{kind}{ending}": content for kind, content in contents.items()}
                make = partial(brats_contents, labels=labels, dtype=dtype)
                cases.append(Case(volume | {"visit": visit}, files, make))
            continue
        if year >= 2021:
            folder = name = f"BraTS2021_{i:05d}"
        elif year == 2020:
            # The segmentation of case 355 carries another name in the real data.
            number = 355 if misnamed and i == subjects - 1 else i + 1
            name, ending = f"BraTS20_Training_{number:03d}", ".nii"
            folder = f"MICCAI_BraTS2020_TrainingData/{name}"
        else:
            site, number = ("CBICA", "TCIA01", "2013")[i % 3], i // 3
            letters = "".join(chr(ord("A") + number // 26**k % 26) for k in (2, 1, 0))
            patient = letters if site == "CBICA" else f"{101 + number}" if site == "TCIA01" else f"{number + 1}"
            name = f"{'Brats18' if year == 2018 else 'BraTS19'}_{site}_{patient}_1"
            folder = f"{'LGG' if i % 4 == 3 else 'HGG'}/{name}"
        files = {f"{folder}/{name}_{kind}{ending}": content for kind, content in contents.items()}
        if year == 2020 and name.endswith("355"):
            del files[f"{folder}/{name}_seg{ending}"]
            files[f"{folder}/W39_1998.09.19_Segm.nii"] = "seg"
        cases.append(Case(volume, files, partial(brats_contents, labels=labels, dtype=dtype)))
    return cases


def autopet(layout: str, subjects: int, seed: int, options: dict, nnunet: bool) -> list[Case]:
    """`PETCT_<hash>/<study>/SUV.nii.gz` or `imagesTr/fdg_<hash>_<study>_0001.nii.gz`; every other patient twice."""
    cases = []
    for i in range(subjects):
        rng = _rng(layout, seed, i)
        patient = f"{rng.integers(16**10):010x}"
        age, sex, year = int(rng.integers(20, 85)), str(rng.choice(["M", "F"])), 2001 + int(rng.integers(4))
        for visit in range(2 - i % 2):
            date = f"{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}-{year + visit}"
            # Blanks, even two in a row, are in the real names.
            study = f"{date}-NA-PET-CT Ganzkoerper  primaer mit KM-{rng.integers(10**4, 10**5)}"
            # 350 MBq an hour earlier in 50 to 110 kg: Boellaard 2015.
            weight, decay = rng.uniform(50, 110), 0.5 ** (60 / 109.8)
            make = partial(autopet_contents, becquerel_per_suv=float(350e6 * decay / (1000 * weight)))
            volume = dict(region="whole-body", protocol="autopet", seed=_volume_seed(layout, seed, i), visit=visit)
            if nnunet:
                name = f"fdg_{patient}_{study}"
                files = {f"imagesTr/{name}_0000.nii.gz": "CTres", f"imagesTr/{name}_0001.nii.gz": "SUV"}
                files[f"labelsTr/{name}.nii.gz"] = "SEG"
            else:
                contents = ("SUV", "CTres", "CT", "SEG", "PET")
                files = {f"PETCT_{patient}/{study}/{name}.nii.gz": name for name in contents}
            row = {"patient": patient, "study": study, "age": age, "sex": sex}
            cases.append(Case(volume | options, files, make, "LAS", row))
    return cases


def myops2020(layout: str, subjects: int, seed: int, options: dict) -> list[Case]:
    """25 of 45 subjects for training, the others without labels; 2 to 6 slices, whose directions are not known."""
    tests = subjects * 20 // 45
    cases = []
    for i in range(subjects):
        training = i < subjects - tests
        name = f"myops_training_{101 + i}" if training else f"myops_test_{201 + i - (subjects - tests)}"
        folder = "train25" if training else "test20"
        contents = {"C0": "bSSFP", "DE": "LGE", "T2": "T2"}
        files = {f"{folder}/{name}_{kind}.nii.gz": content for kind, content in contents.items()}
        if training:
            files[f"train25_myops_gd/{name}_gd.nii.gz"] = "gd"
        volume = dict(region="heart", protocol="myops", seed=_volume_seed(layout, seed, i))
        volume["num_slices"] = int(_rng(layout, seed, i).integers(2, 7))
        cases.append(Case(volume | options, files, myops_contents))
    return cases


# Own data: region, protocol, column of the manifest to file, where the axes of the file point to.
MANIFEST_CASES = (
    ("brain", "synthrad", {"MRI": "t1.nii.gz", "CT": "ct.nii.gz", "mask": "head.nii.gz"}, "RAS"),
    ("pelvis", "synthrad", {"CBCT": "cone beam.mha", "CT": "planning.mha", "mask": "body.nii.gz"}, "LPS"),
    ("brain", "brats", {"T1": "t1.nrrd", "T1CE": "t1ce.nrrd", "T2": "t2.nrrd", "FLAIR": "flair.nrrd"}, "LPS"),
    ("whole-body", "autopet", {"CT": "ct.mha", "PET": "suv.nii.gz"}, "PSR"),
)


def manifest(layout: str, subjects: int, seed: int, options: dict) -> list[Case]:
    """`manifest.csv` and files as a hospital might have them: formats and directions mixed, masks for some."""
    cases = []
    for i in range(subjects):
        region, protocol, contents, orientation = MANIFEST_CASES[i % len(MANIFEST_CASES)]
        for visit in range(2 if protocol == "brats" else 1):
            name = f"{region}-{i + 1:03d}" + (f"-{visit + 1}" if protocol == "brats" else "")
            paths = {content: f"scans/{name}/{file}" for content, file in contents.items()}
            volume = dict(region=region, protocol=protocol, seed=_volume_seed(layout, seed, i), visit=visit)
            volume["modalities"] = tuple(content for content in contents if content != "mask")
            row = {"case_id": name, "patient_id": f"P{i + 1:03d}", "region": region, **paths}
            files = {path: content for content, path in paths.items()}
            cases.append(Case(volume | options, files, plain_contents, orientation, row))
    return cases


# The released pictures: region, protocol, modality to folder. Published are the folders of BraTS and PET/CT only.
SYNERMED_CASES = (
    ("brain", "brats", {"T1": "t1", "T1CE": "t1ce", "T2": "t2", "FLAIR": "flair"}),
    ("brain", "synthrad", {"MRI": "mr_brain", "CT": "ct_brain"}),
    ("whole-body", "autopet", {"CT": "ct_FDG", "PET": "pet_FDG"}),
    ("pelvis", "synthrad", {"CBCT": "cbct_pelvis", "CT": "ct_pelvis"}),
)
SYNERMED_SLICES = 8
# mm from slice to slice: far enough for neighbours to be told apart, whatever the size of the pictures.
SYNERMED_BETWEEN = {"brain": 5, "pelvis": 8, "whole-body": 10}


def synermed(layout: str, subjects: int, seed: int, options: dict) -> list[Case]:
    """The authors' form: `slice/t1/<case>_s000.png`, `SynerMed.parquet` and `SynerMed.jsonl`."""
    cases = []
    for i in range(subjects):
        region, protocol, folders = SYNERMED_CASES[i % len(SYNERMED_CASES)]
        name = f"{region.replace('-', '')}{i + 1:03d}"
        files = {
            f"slice/{folder}/{name}_s{k:03d}.png": f"{modality} {k}"
            for modality, folder in folders.items()
            for k in range(SYNERMED_SLICES)
        }
        volume = dict(region=region, protocol=protocol, seed=_volume_seed(layout, seed, i), **options)
        volume |= {"between": SYNERMED_BETWEEN[region], "modalities": tuple(folders)}
        row = {"case": name, "region": region, "folders": folders}
        cases.append(Case(volume, files, partial(picture_contents, count=SYNERMED_SLICES), row=row))
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# What belongs to a dataset rather than to a case
# ---------------------------------------------------------------------------------------------------------------------


def _table(rows: list[dict], columns: list[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def autopet_tables(root: Path, cases: list[Case], seed: int) -> dict[str, bytes]:
    """`fdg_metadata.csv`; for nnU-Net also `dataset.json` and five folds that keep patients together."""
    rows = []
    for case in cases:
        seg = next(path for path, content in case.files.items() if content == "SEG")
        positive = bool(np.asarray(nib.load(root / seg).dataobj).any())
        place = f"./FDG-PET-CT-Lesions/PETCT_{case.row['patient']}/{case.row['study']}"
        rows.append(
            {
                "Subject ID": f"PETCT_{case.row['patient']}",
                "Study Location": place,
                # What made the nodules is not simulated.
                "diagnosis": "LYMPHOMA" if positive else "NEGATIVE",
                "age": case.row["age"],
                "sex": case.row["sex"],
            }
        )
    tables = {"fdg_metadata.csv": _table(rows, list(rows[0]))}
    if any(path.startswith("imagesTr/") for path in cases[0].files):
        about = {
            "channel_names": {"0": "CT", "1": "PET"},
            "labels": {"background": 0, "tumor": 1},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
        }
        patients = sorted({case.row["patient"] for case in cases})
        held_out = {patient: k % 5 for k, patient in enumerate(patients)}
        names = {f"fdg_{case.row['patient']}_{case.row['study']}": held_out[case.row["patient"]] for case in cases}
        folds = [
            {"train": [n for n, f in names.items() if f != k], "val": [n for n, f in names.items() if f == k]}
            for k in range(5)
        ]
        tables["dataset.json"] = json.dumps(about, indent=2).encode()
        tables["splits_final.json"] = json.dumps(folds, indent=2).encode()
    return tables


def manifest_tables(root: Path, cases: list[Case], seed: int) -> dict[str, bytes]:
    """`manifest.csv`, with paths relative to it and empty cells for what a case lacks."""
    columns = ["case_id", "patient_id", "region", "MRI", "CT", "CBCT", "PET", "T1", "T1CE", "T2", "FLAIR", "mask"]
    return {"manifest.csv": _table([case.row for case in cases], columns)}


# As the released answers spell modalities.
SPELLINGS = {"MRI": "MRI", "CT": "CT", "CBCT": "CBCT", "PET": "PET"} | {
    name: f"{name} (MRI)" for name in ("T1", "T1CE", "T2", "FLAIR")
}
INSTRUCTIONS = (
    "Generate the {target} image of this {region} slice from {source}.",
    "Translate this slice of the {region} from {source} to {target}.",
    "Turn the image from {source} into {target} and keep the anatomy.",
)
DESCRIPTIONS = "The contrast changes from {source} to {target}; shape and position of all structures stay."


def synermed_tables(root: Path, cases: list[Case], seed: int) -> dict[str, bytes]:
    """
    `SynerMed.parquet` with pairs, and a chain of three images per case that has as many modalities; `SynerMed.jsonl`
    with every spelling of answers, every way of marking images and every optional key that is known.
    """
    import pyarrow as pa
    from pyarrow import parquet

    images, instructions, lines = [], [], []
    modality_of = {folder: name for case in cases for name, folder in case.row["folders"].items()}
    for number, case in enumerate(cases):
        rng = _rng("synermed rows", seed, number)
        name, region, folders = case.row["case"], case.row["region"], case.row["folders"]

        def place(folder, k, name=name):
            return f"{folder}/{name}_s{k:03d}.png"

        def texts(source, target, region=region):
            return [text.format(source=source, target=target, region=region) for text in INSTRUCTIONS]

        modalities = list(folders)
        pairs = [(one, two) for one in modalities for two in modalities if one != two]
        for k in range(SYNERMED_SLICES):
            source, target = pairs[k % len(pairs)]
            images.append([(root / "slice" / place(folders[m], k)).read_bytes() for m in (source, target)])
            instructions.append([texts(source, target)])
        if len(modalities) > 2:
            images.append([(root / "slice" / place(folders[m], 0)).read_bytes() for m in modalities[:3]])
            instructions.append([texts(*modalities[:2]), texts(*modalities[1:3])])

        for k, (source, target) in enumerate(pairs[:4]):
            middle = 3 + k % 2
            candidates = rng.permutation([middle - 2, middle - 1, middle, middle + 1])
            letter = "ABCD"[list(candidates).index(middle)]
            # One mark a file, or one for all of them, or none: all three occur.
            marks = ("<image>" * 5, "<image>", "")[(number + k) % 3]
            ask = f"{marks}Which of the {target} slices is the counterpart of the reference? [A,B,C,D]"
            row = {
                "image": [place(folders[source], middle)] + [place(folders[target], c) for c in candidates],
                "conversations": _dialogue(ask, letter if k % 2 == 0 else f"Option {letter}"),
            }
            if k < 2:
                row |= {"pair": {"src": folders[source], "tgt": folders[target]}, "case_id": name, "slice_idx": middle}
            lines.append(row)

        source, target = pairs[int(rng.integers(len(pairs)))]
        both = [place(folders[source], 2), place(folders[target], 2)]
        right, wrong = (DESCRIPTIONS.format(source=a, target=b) for a, b in ((source, target), (target, source)))
        swap = bool(rng.integers(2))
        ask = f"<image><image>Which instruction fits? A: {wrong if swap else right} B: {right if swap else wrong}"
        lines.append({"id": f"{name}-tia", "image": both, "conversations": _dialogue(ask, f"Description {'AB'[swap]}")})
        ask = "<image>\n<image>\nSame case, same slice: describe the transformation."
        lines.append({"image": both, "conversations": _dialogue(ask, right)})

        # Panels of any patients, or no case with two modalities could fill four.
        chosen = rng.choice(sorted(modality_of), 4, replace=len(modality_of) < 4)
        panels = []
        for folder in chosen:
            shown = [other.row["case"] for other in cases if folder in other.row["folders"].values()]
            panels.append(place(folder, int(rng.integers(SYNERMED_SLICES)), str(rng.choice(shown))))
        said = [SPELLINGS[modality_of[folder]] for folder in chosen]
        spelled = ", ".join(f'"{letter}" : "{word}"' for letter, word in zip("ABCD", said, strict=True))
        lower = ", ".join(f'"{letter}": "{_sloppy(word)}"' for letter, word in zip("ABCD", said, strict=True))
        doubled = spelled.replace('"D"', '"B"')
        answers = (f"[{spelled}]", spelled, f"[{lower}]", f"[{doubled}]")
        ask = f"{'<image>' * 4}Name the modality of each panel."
        for answer in answers:
            lines.append({"image": panels, "conversations": _dialogue(ask, answer)})
        # A single image may stand without a list.
        lines.append({"image": panels[0], "conversations": _dialogue("<image>Which modality is this?", said[0])})

    schema = {"image_list": pa.list_(pa.binary()), "instruction_list": pa.list_(pa.list_(pa.string()))}
    sink = io.BytesIO()
    table = pa.table({"image_list": images, "instruction_list": instructions}, schema=pa.schema(list(schema.items())))
    # 4096 in the release; several groups of a small file are what is worth reading.
    parquet.write_table(table, sink, row_group_size=16)
    jsonl = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return {"SynerMed.parquet": sink.getvalue(), "SynerMed.jsonl": jsonl.encode()}


def _dialogue(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _sloppy(word: str) -> str:
    """`"ct"` and `"mr"`, as some of the released answers have it."""
    return {"CT": "ct", "MRI": "mr"}.get(word, word)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "synthrad2023-task1": (partial(synthrad2023, task=1), None),
    "synthrad2023-task2": (partial(synthrad2023, task=2), None),
    "synthrad2025-task1": (partial(synthrad2025, task=1), None),
    "synthrad2025-task2": (partial(synthrad2025, task=2), None),
    "brats2018": (partial(brats, year=2018), None),
    "brats2019": (partial(brats, year=2019), None),
    "brats2020": (partial(brats, year=2020), None),
    "brats2021": (partial(brats, year=2021), None),
    "brats2023": (partial(brats, year=2023), None),
    "autopet": (partial(autopet, nnunet=False), autopet_tables),
    "autopet-nnunet": (partial(autopet, nnunet=True), autopet_tables),
    "myops2020": (myops2020, None),
    "manifest": (manifest, manifest_tables),
    "synermed": (synermed, synermed_tables),
}


def write_layout(
    layout: str,
    folder: str | Path,
    subjects: int,
    seed: int = 0,
    size: int = 64,
    num_slices: int | None = None,
    misregistration: bool = False,
    breathing: bool = False,
    misnamed: bool = False,
    num_proc: int = 1,
) -> Written:
    """
    Write a miniature dataset exactly as users have it.

    The same arguments give the same bytes on one machine and with the same versions of libraries. A run that was cut
    off goes on where it stopped when it is started again with the same arguments; every file is written aside and then
    renamed, so that none is ever half there. Several layouts can share a folder.

    Args:
        layout (`str`): A key of [`LAYOUTS`].
        folder (`str` or `Path`): Where the dataset's own folders go; made if absent.
        subjects (`int`): Patients in all. They take turns over regions and centres; of BraTS 2023, AutoPET and the
            BraTS cases of a manifest some have two examinations.
        seed (`int`, defaults to 0): Other patients for another seed.
        size (`int`, defaults to 64): Columns of a volume before it is cropped; the field of view is fixed, and the
            slice distance grows with the pixel.
        num_slices (`int`, *optional*): At most so many neighbouring axial slices; by default the whole region (MyoPS: 2
            to 6).
        misregistration (`bool`, defaults to `False`): SynthRAD only: the MRI or CBCT is off by 1 to 2 mm and up to 1
            degree.
        breathing (`bool`, defaults to `False`): AutoPET only: the liver's dome is 5 to 15 mm higher in the PET.
        misnamed (`bool`, defaults to `False`): BraTS 2020 only: the last patient is the real data's case 355, whose
            segmentation is called `W39_1998.09.19_Segm.nii`.
        num_proc (`int`, defaults to 1): Processes that simulate.

    Returns:
        [`Written`]: Folder, cases, files and bytes of this layout.

    Raises:
        `ValueError`: Unknown layout, no subjects, or an option that the layout does not know.
        `FileExistsError`: The folder holds files that this call has not written.
        `ImportError`: Layouts with `.mha` or `.nrrd` files need SimpleITK.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}. Choose one of {', '.join(LAYOUTS)}.")
    if subjects < 1 or num_proc < 1:
        raise ValueError(f"subjects and num_proc must be at least 1, got {subjects} and {num_proc}.")
    known = {"misregistration": "synthrad", "breathing": "autopet", "misnamed": "brats2020"}
    chosen = {"misregistration": misregistration, "breathing": breathing, "misnamed": misnamed}
    for option, family in known.items():
        if chosen[option] and not layout.startswith(family):
            raise ValueError(f"{option} is an option of {family}, not of {layout}.")
    options = {"size": size}
    if num_slices is not None:
        if layout == "synermed":
            raise ValueError("synermed has a fixed number of slices: leave num_slices out.")
        options["num_slices"] = num_slices
    options |= {name: True for name in ("misregistration", "breathing") if chosen[name]}
    plan, tables = LAYOUTS[layout]
    if misnamed:
        plan = partial(plan, misnamed=True)
    cases = plan(layout, subjects, seed, options)
    if any(path.endswith((".mha", ".nrrd")) for case in cases for path in case.files):
        _simpleitk()

    root = Path(folder)
    arguments = dict(subjects=subjects, seed=seed, size=size, num_slices=num_slices, version=PHANTOM_VERSION, **chosen)
    _claim(root, layout, arguments, cases)
    written = [path for case in cases for path in case.files]
    jobs = [(root, number, case) for number, case in enumerate(cases)]
    shutil.rmtree(root / UNFINISHED, ignore_errors=True)
    try:
        if num_proc == 1:
            for job in tqdm(jobs, desc=layout):
                _write_case(job)
        else:
            with get_context("spawn").Pool(num_proc) as pool:
                list(tqdm(pool.imap_unordered(_write_case, jobs), total=len(jobs), desc=layout))
        for name, data in (tables(root, cases, seed) if tables else {}).items():
            _put(root, "tables", name, partial(_write_bytes, data=data))
            written.append(name)
    finally:
        shutil.rmtree(root / UNFINISHED, ignore_errors=True)
    return Written(root, len(cases), len(written), sum((root / path).stat().st_size for path in written))


def _claim(root: Path, layout: str, arguments: dict, cases: list[Case]):
    """Note in the folder that this call writes there, or refuse."""
    record = {}
    if (root / RECORD).exists():
        record = json.loads((root / RECORD).read_text())
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} holds something else already. Name a new or empty folder.")
    if record.get(layout, arguments) != arguments:
        differing = ", ".join(f"{k}={v}" for k, v in record[layout].items() if arguments.get(k) != v)
        raise FileExistsError(
            f"{root} holds {layout} made with other arguments ({differing}). Repeat these, or name another folder."
        )
    if layout not in record:
        taken = next((path for case in cases for path in case.files if (root / path).exists()), None)
        if taken is not None:
            raise FileExistsError(f"{root} holds {taken} of another layout. Name another folder.")
    root.mkdir(parents=True, exist_ok=True)
    record[layout] = arguments
    unfinished = root / f"{RECORD}.tmp"
    unfinished.write_text(json.dumps(record, indent=2))
    os.replace(unfinished, root / RECORD)


def _write_case(job: tuple[Path, int, Case]):
    root, number, case = job
    if all((root / path).exists() for path in case.files):
        return
    contents = case.contents(simulate_volume(**case.volume))
    for path, content in case.files.items():
        array, affine = contents[content]
        _put(root, str(number), path, partial(_write_array, array=array, affine=affine, orientation=case.orientation))


def _put(root: Path, aside: str, name: str, write: Callable[[Path], object]):
    """Let `write` make a file aside and give it its name when it is complete."""
    unfinished, path = root / UNFINISHED / aside / Path(name).name, root / name
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished)
    os.replace(unfinished, path)


def _write_bytes(path: Path, data: bytes):
    path.write_bytes(data)


def _write_array(path: Path, array: np.ndarray, affine: np.ndarray | None, orientation: str):
    """Write an array `(slice, row, column)` in the format of the ending, with axes that point as `orientation` says."""
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
        return
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(orientation))
    turned = affine @ inv_ornt_aff(turn, array.shape) + 0.0  # + 0.0: no -0 in the header
    array = apply_orientation(array, turn)
    if path.name.endswith((".nii", ".nii.gz")):
        image = nib.Nifti1Image(array, turned)
        image.header.set_xyzt_units("mm")
        image.set_sform(turned, 1)
        image.set_qform(turned, 1)
        nib.save(image, path)
        return
    sitk = _simpleitk()
    # ITK counts towards the patient's left and back where nibabel counts towards right and front.
    spacing = np.linalg.norm(turned[:3, :3], axis=0)
    flip = np.diag([-1.0, -1.0, 1.0])
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((flip @ turned[:3, 3] + 0.0).tolist())
    image.SetDirection((flip @ turned[:3, :3] / spacing + 0.0).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _simpleitk():
    try:
        import SimpleITK
    except ImportError:
        raise ImportError("Writing .mha and .nrrd needs SimpleITK: pip install 'synermedgen-hf[dicom]'.") from None
    return SimpleITK
