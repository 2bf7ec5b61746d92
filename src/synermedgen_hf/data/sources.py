"""What lies in a folder of scans: which dataset, which patients, which files belong together; and one case in memory.

`scan` looks at names alone and is quick; `load_case` reads the files of one case, checks them against each other, and
repairs or refuses by the rules stated there. Both put what they skip or repair into words: nothing is dropped silently.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..image_processing_synermedgen import SynerMedGenImageProcessor
from ..processing_synermedgen import REGION_NAMES
from ..volumes.reading import (
    AXES,
    BODY_ABOVE,
    MR_BODY_SHARE,
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
from .routes import MODALITIES

BACKGROUND = {"CT": -1024.0, "CBCT": -1024.0}  # what lies outside of the patient
# Rules of `load_case`.
MIN_SHARED_EXTENT = 0.5
MIN_SHARED_BODY = 0.3
MIN_SHARED_BRAIN = 0.9  # of BraTS, whose sequences are stripped by one mask
MAX_NAN_SHARE = 0.01
MAX_SUV = 1000.0
MAX_STORED_CT = 8191  # 12 bits, or the 13 of an extended scale


@dataclass(frozen=True)
class CaseRecord:
    """
    One case of a dataset: files that show the same anatomy on (nearly) one grid.

    Args:
        dataset (`str`): Such as `"synthrad2023"`, `"brats"`, `"autopet"`.
        case_id (`str`): Unique within the dataset.
        patient_id (`str`): Cases of one patient (time points, studies) share it; splits go by it.
        region (`str`): `"brain"`, `"pelvis"`, `"whole-body"`, `"abdomen"`, `"thorax"`, `"head-neck"`, `"heart"`.
        axis (`str`): Direction of the slices: `"axial"` or `"coronal"`; a heart's may turn out `"sagittal"` too.
        files (`dict[str, str]`): Modality -> path.
        mask (`str`, *optional*): Path of a mask of the body, inside of which results count.
        lesion (`str`, *optional*): Path of labels of tumours or lesions.
        centre (`str`): Hospital or site, for stratified splits; empty if unknown.
        notes (`tuple[str, ...]`): What was repaired in naming, in words.
    """

    dataset: str
    case_id: str
    patient_id: str
    region: str
    axis: str
    files: dict[str, str]
    mask: str | None = None
    lesion: str | None = None
    centre: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique over datasets, such as `"synthrad2023/1BA001"`."""
        return f"{self.dataset}/{self.case_id}"

    @property
    def paths(self) -> list[str]:
        """All files of the case."""
        return [path for path in (*self.files.values(), self.mask, self.lesion) if path]


@dataclass
class LoadedCase:
    """
    A case in memory, on one grid, as slices that lie as a radiologist looks at them.

    Args:
        record ([`CaseRecord`]): Where it comes from.
        images (`dict[str, np.ndarray]`): Modality -> `(slices, rows, columns)` in scanner units (HU, SUV, arbitrary MR
            units), float32 or the file's integers. Axial: anterior up, patient's right on the left. Coronal: head up,
            right on the left.
        mask (`np.ndarray`, *optional*): bool, of the same shape: the body.
        lesion (`np.ndarray`, *optional*): bool, of the same shape.
        spacing (`tuple[float, float, float]`): mm between slices, rows and columns.
        windows (`dict[str, dict]`): Modality -> intensity record (`modality`, `unit`, `low`, `high`) of the volume.
        usable (`np.ndarray`): Indices of slices that show enough of the patient, increasing.
        notes (`list[Note]`): What was repaired, in words.
    """

    record: CaseRecord
    images: dict[str, np.ndarray]
    mask: np.ndarray | None
    lesion: np.ndarray | None
    spacing: tuple[float, float, float]
    windows: dict[str, dict]
    usable: np.ndarray
    notes: "list[Note]" = field(default_factory=list)


class CaseError(ValueError):
    """A case that is refused, and the file that is the reason."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Note(str):
    """What was repaired, in words, and the file it is about."""

    path: str

    def __new__(cls, path: str, text: str):
        note = super().__new__(cls, text)
        note.path = path
        return note

    def __getnewargs__(self):
        return self.path, str(self)


@dataclass(frozen=True)
class Problem:
    """
    Something that was skipped or repaired, or that is worth knowing.

    Args:
        kind (`str`): `"skipped"`, `"repaired"`, or `"noted"` where nothing was changed.
        case (`str`): Name of the case, or empty.
        path (`str`): The file or folder it is about.
        reason (`str`): What is wrong, and what was done or can be done.
    """

    kind: str
    case: str
    path: str
    reason: str


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong together
# ---------------------------------------------------------------------------------------------------------------------

SYNTHRAD_2023 = re.compile(r"^[12]([BP])([A-Z])\d{3}$")
SYNTHRAD_2025 = re.compile(r"^[12](AB|HN|TH)([A-E])(\d{3})$")
SYNTHRAD_REGIONS = {"B": "brain", "P": "pelvis", "AB": "abdomen", "HN": "head-neck", "TH": "thorax"}
SYNTHRAD_FILES = {"mr": "MRI", "ct": "CT", "cbct": "CBCT"}
BRATS_CASE = re.compile(r"^(brats[-_]?(?:\d{2,4}|gli|men|met|ssa|ped|africa)[-_].+)$", re.IGNORECASE)
BRATS_TIME_POINT = re.compile(r"^(BraTS-[A-Za-z]+-\d+)-\d{3}$")
BRATS_SITE = re.compile(r"^brats1[89]_([A-Za-z]+\d*)_", re.IGNORECASE)
BRATS_FILE = re.compile(r"^(?:(.+)[-_])?(t1n|t1ce|t1c|t1gd|t1w|t1|t2w|t2f|t2|flair|fla|seg)$", re.IGNORECASE)
BRATS_ALIASES = {
    **dict.fromkeys(("t1", "t1n", "t1w"), "T1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd"), "T1CE"),
    **dict.fromkeys(("t2", "t2w"), "T2"),
    **dict.fromkeys(("flair", "fla", "t2f"), "FLAIR"),
    "seg": "seg",
}
NNUNET_FILE = re.compile(r"^(fdg|psma)_([^_]+)_(.+)_000([01])$", re.IGNORECASE)
MYOPS_FILE = re.compile(r"^(myops_(?:training|test)_\d+)_(C0|DE|T2|gd)$", re.IGNORECASE)
# Balanced SSFP has no name of its own here; late enhancement is a T1-weighted image after contrast.
MYOPS_FILES = {"c0": "MRI", "de": "T1CE", "t2": "T2"}
# Labels that lie in folders of their own; they are found from their images.
LABELS = re.compile(r"^labels[^/]*/(fdg|psma)_|_gd$", re.IGNORECASE)
# A folder that is called after a visit rather than a patient.
VISIT = re.compile(r"^(ses|session|visit|scan|time|tp)?[-_]?\d[\d._-]*$", re.IGNORECASE)
BARE = "?"  # a case whose files do not name it; called after its folders
MANIFESTS = ("manifest.csv", "manifest.jsonl")


def walk(root: Path) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Every folder below `root` with the volumes in it, by their names without the extension; hidden ones left out."""
    seen = set()  # a folder may be linked into itself
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        volumes = {}
        for name in sorted(names):
            ending = extension(name)
            if ending and not name.startswith("."):
                # Uncompressed beside compressed: the same scan twice. The compressed one comes later and stays.
                volumes[name[: -len(ending)]] = Path(folder) / name
        yield Path(folder), volumes


def scan(root: str | Path) -> tuple[list[CaseRecord], list[Problem]]:
    """
    Find the cases below a folder, by names alone.

    Known are SynthRAD2023 and 2025, BraTS 2018 to 2023 and later, FDG-PET-CT-Lesions (AutoPET) as NIfTI and in nnU-Net
    style, MyoPS 2020, and a `manifest.csv` or `manifest.jsonl`; the folder may be a dataset's root or hold several.

    Args:
        root (`str` or `Path`): A folder, or a manifest.

    Returns:
        `tuple[list[CaseRecord], list[Problem]]`: Cases by name, and what was not taken, with reasons.

    Raises:
        `FileNotFoundError`: There is no such folder.
        `ValueError`: A manifest cannot be read.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"There is no folder {root}.")
    if root.is_file():
        return read_manifest(root)
    cases: dict[str, CaseRecord] = {}
    problems: list[Problem] = []
    stray, claimed = 0, set()  # files that a manifest speaks for

    def take(found: list[CaseRecord], where: Path):
        for case in found:
            if case.name in cases:
                first = next(iter(cases[case.name].files.values()))
                reason = f"a case of this name was found already, in {Path(first).parent}; the first one counts"
                problems.append(Problem("skipped", case.name, str(where), reason))
                continue
            cases[case.name] = case
            problems.extend(Problem("repaired", case.name, str(where), note) for note in case.notes)

    for folder, volumes in walk(root):
        for name in MANIFESTS:
            if (folder / name).is_file():
                found, own = read_manifest(folder / name)
                claimed |= {os.path.normpath(path) for case in found for path in case.paths}
                problems += own
                take(found, folder / name)
        volumes = {name: path for name, path in volumes.items() if os.path.normpath(path) not in claimed}
        if not volumes:
            if (SYNTHRAD_2023.match(folder.name) or SYNTHRAD_2025.match(folder.name)) and not any(folder.iterdir()):
                problems.append(Problem("skipped", folder.name, str(folder), "the folder of a case is empty"))
            continue
        found, own = [], []
        for recognise in (_synthrad, _brats, _autopet, _nnunet, _myops):
            found, own = recognise(folder, volumes)
            if found or own:
                break
        else:
            stray += sum(not LABELS.search(f"{folder.name}/{name}") for name in volumes)
        problems += own
        take([_bare_case(case, root) if case.case_id == BARE else case for case in found], folder)
    problems += _doubtful_releases(cases.values(), root)
    if stray:
        reason = f"{stray} volumes that belong to no known layout; a manifest.csv can say what they are"
        problems.append(Problem("skipped", "", str(root), reason))
    return [cases[name] for name in sorted(cases)], problems


def _synthrad(folder: Path, volumes: dict[str, Path]) -> tuple[list[CaseRecord], list[Problem]]:
    old, new = SYNTHRAD_2023.match(folder.name), SYNTHRAD_2025.match(folder.name)
    match = new or old
    files = {SYNTHRAD_FILES[name]: str(path) for name, path in volumes.items() if name in SYNTHRAD_FILES}
    if not match or not files:
        return [], []
    region = SYNTHRAD_REGIONS[match[1]]
    mask = volumes.get("mask")
    case = CaseRecord(
        dataset="synthrad2025" if new else "synthrad2023",
        case_id=folder.name,
        patient_id=folder.name,
        region=region,
        axis="axial",
        files=files,
        mask=None if mask is None else str(mask),
        centre=match[2],
    )
    return [case], []


def _brats(folder: Path, volumes: dict[str, Path]) -> tuple[list[CaseRecord], list[Problem]]:
    files, problems, notes, prefixes = {}, [], [], set()
    for name, path in volumes.items():
        match = BRATS_FILE.match(name)
        if not match:
            continue
        if match[1] and match[1] != folder.name and BRATS_CASE.match(folder.name):
            reason = f"it lies in the folder of {folder.name} and is named after another patient, {match[1]}"
            problems.append(Problem("skipped", f"brats/{folder.name}", str(path), reason))
            continue
        prefixes.add(match[1])
        modality = BRATS_ALIASES[match[2].lower()]
        if modality in files:
            reason = f"a second {modality} beside {Path(files[modality]).name}; the first one counts"
            problems.append(Problem("skipped", f"brats/{folder.name}", str(path), reason))
            continue
        files[modality] = str(path)
    images = {modality: path for modality, path in files.items() if modality != "seg"}
    named = BRATS_CASE.match(folder.name)
    if not named and (prefixes != {None} or len(images) < 2):
        return [], []
    lesion = files.get("seg")
    if lesion is None and named:
        # The public copy of BraTS 2020 names one segmentation after the hospital's own number.
        odd = [path for name, path in volumes.items() if "seg" in name.lower() and not BRATS_FILE.match(name)]
        if len(odd) == 1:
            lesion = str(odd[0])
            notes.append(f"{odd[0].name} is the only segmentation of its folder and is taken as that")
    site = BRATS_SITE.match(folder.name)
    case = CaseRecord(
        dataset="brats",
        case_id=folder.name if named else BARE,
        patient_id=brats_patient(folder.name) if named else str(folder),
        region="brain",
        axis="axial",
        files=images,
        lesion=lesion,
        centre=site[1] if site else "",
        notes=tuple(notes),
    )
    return [case] if images else [], problems


def brats_patient(case_id: str) -> str:
    """
    The patient of a BraTS case: its time points, the releases of 2018 and 2019 (which differ in the prefix alone) and
    those of 2021 and 2023 (which number the same gliomas alike) meet in one name.
    """
    if time_point := BRATS_TIME_POINT.match(case_id):
        case_id = time_point[1]
    if match := re.match(r"^BraTS(?:2021_|-GLI-)(\d{5})$", case_id, re.IGNORECASE):
        return f"BraTS-GLI-{match[1]}"
    return re.sub(r"^brats1[89]_", "", case_id, flags=re.IGNORECASE)


def _bare_case(case: CaseRecord, root: Path) -> CaseRecord:
    """Files without a patient's name in theirs: the case is called after its folder, or a visit after its patient's."""
    place = Path(case.patient_id)
    if VISIT.match(place.name) and place.parent != root:
        return replace(case, case_id=f"{place.parent.name}/{place.name}", patient_id=place.parent.name)
    return replace(case, case_id=place.name, patient_id=place.name)


def absent_parts(cases: Iterable[CaseRecord]) -> list[Problem]:
    """What a data set has of every case and not of these; they are read all the same."""
    problems = []
    for case in cases:
        if case.dataset.startswith("synthrad") and case.mask is None:
            reason = "there is no mask; what the images show decides on the slices"
        elif case.dataset == "brats" and len(case.files) < 4:
            absent = [name for name in ("T1", "T1CE", "T2", "FLAIR") if name not in case.files]
            reason = f"missing modality: {', '.join(absent)}"
        else:
            continue
        problems.append(Problem("noted", case.name, next(iter(case.files.values())), reason))
    return problems


def _doubtful_releases(cases: Iterable[CaseRecord], root: Path) -> list[Problem]:
    """BraTS 2020 numbers the patients of other releases anew: together they may put one patient into two splits."""
    names = [case.case_id for case in cases if case.dataset == "brats"]
    of_2020 = sum(name.upper().startswith("BRATS20_") for name in names)
    if not 0 < of_2020 < len(names):
        return []
    reason = (
        "BraTS 2020 lies beside other releases and has patients in common with them under other numbers; read it alone"
    )
    return [Problem("noted", "", str(root), f"{reason}, or a patient may stand in two splits")]


def _autopet(folder: Path, volumes: dict[str, Path]) -> tuple[list[CaseRecord], list[Problem]]:
    names = {name.lower(): path for name, path in volumes.items()}
    patient = folder.parent.name if folder.parent.name.startswith("PETCT_") else ""
    if not patient or not names.keys() & {"suv", "ctres", "pet"}:
        return [], []
    name = f"autopet/{patient}/{folder.name}"
    files, problems = {}, []
    if "suv" in names:
        files["PET"] = str(names["suv"])
    elif "pet" in names:
        reason = "counts in Bq/ml without an SUV.nii.gz: make SUV from the DICOM files first"
        problems.append(Problem("skipped", name, str(names["pet"]), reason))
    ct = names.get("ctres", names.get("ct"))
    if ct is not None:
        files["CT"] = str(ct)
    seg = names.get("seg")
    case = CaseRecord(
        dataset="autopet",
        case_id=f"{patient}/{folder.name}",
        patient_id=patient.removeprefix("PETCT_"),  # as the nnU-Net style calls the same patient
        region="whole-body",
        axis="coronal",
        files=files,
        lesion=None if seg is None else str(seg),
    )
    return [case], problems


def _nnunet(folder: Path, volumes: dict[str, Path]) -> tuple[list[CaseRecord], list[Problem]]:
    grouped: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, path in volumes.items():
        if match := NNUNET_FILE.match(name):
            key = (match[1].lower(), match[2], match[3])
            grouped.setdefault(key, {})["CT" if match[4] == "0" else "PET"] = str(path)
    cases, problems = [], []
    for (tracer, patient, study), files in grouped.items():
        if tracer != "fdg":
            reason = "the tracer is PSMA; PET here is FDG"
            problems.append(Problem("skipped", f"autopet/{patient}/{study}", next(iter(files.values())), reason))
            continue
        label = folder.parent / folder.name.replace("images", "labels") / f"{tracer}_{patient}_{study}.nii.gz"
        cases.append(
            CaseRecord(
                dataset="autopet",
                case_id=f"{patient}/{study}",
                patient_id=patient,
                region="whole-body",
                axis="coronal",
                files=files,
                lesion=str(label) if label.exists() else None,
            )
        )
    return cases, problems


def _myops(folder: Path, volumes: dict[str, Path]) -> tuple[list[CaseRecord], list[Problem]]:
    grouped: dict[str, dict[str, str]] = {}
    for name, path in volumes.items():
        if match := MYOPS_FILE.match(name):
            grouped.setdefault(match[1], {})[match[2].lower()] = str(path)
    cases = []
    for case_id, files in grouped.items():
        images = {MYOPS_FILES[name]: path for name, path in files.items() if name != "gd"}
        beside = folder.parent / f"{folder.name}_myops_gd" / f"{case_id}_gd.nii.gz"
        label = files.get("gd") or (str(beside) if beside.exists() else None)
        if images:
            cases.append(CaseRecord("myops2020", case_id, case_id, "heart", "axial", images, lesion=label))
    # A folder of labels alone belongs to the images beside it.
    return cases, []


def read_manifest(file: str | Path) -> tuple[list[CaseRecord], list[Problem]]:
    """
    Own data: a table with one case a row.

    Args:
        file (`str` or `Path`): CSV or JSON lines. Columns: `case_id`, `region`, one for each modality (`T1`, `T1CE`,
            `T2`, `FLAIR`, `MRI`, `CT`, `CBCT`, `PET`) with a path or nothing; optionally `patient_id` (by default the
            case), `mask`, `lesion`, `centre`, `axis`, `dataset`. Paths are relative to the manifest; a path is a
            volume or a folder with one DICOM series.

    Returns:
        As [`scan`].

    Raises:
        `ValueError`: Not a table, or without the columns it needs.
    """
    file = Path(file)
    problems: list[Problem] = []
    columns: set[str] = set()
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            table = csv.DictReader(text.splitlines())
            numbered, columns = list(enumerate(table, start=2)), set(table.fieldnames or [])
        elif file.suffix.lower() in (".jsonl", ".json"):
            numbered = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        else:
            raise ValueError(f"{file} is no manifest: CSV or JSON lines are read.")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as a manifest ({error}).") from error
    known = {modality.lower(): modality for modality in MODALITIES}
    cases: dict[str, CaseRecord] = {}
    columns = {str(column).strip().lower() for column in columns}
    for number, row in numbered:
        where = f"{file}, line {number}"
        try:
            row = json.loads(row) if isinstance(row, str) else row
            row = {str(key).strip().lower(): value for key, value in row.items() if key is not None}
        except (json.JSONDecodeError, AttributeError) as error:
            problems.append(Problem("skipped", "", where, f"no object of columns and values ({error})"))
            continue
        columns |= row.keys()
        row = {key: "" if value is None else str(value).strip() for key, value in row.items()}
        if absent := [name for name in ("case_id", "region") if name not in row]:
            problems.append(Problem("skipped", "", where, f"no {' and no '.join(absent)}"))
            continue
        case_id = row["case_id"]
        dataset = row.get("dataset") or "own"
        name = f"{dataset}/{case_id}"
        reason = None
        if not case_id:
            reason = "no case_id"
        elif name in cases:
            reason = "a case of this name stands further up; the first one counts"
        elif row["region"] not in REGION_NAMES:
            reason = f"unknown region {row['region']!r}; known are {', '.join(REGION_NAMES)}"
        elif row.get("axis") and row["axis"] not in ("axial", "coronal"):
            reason = f"unknown axis {row['axis']!r}; known are axial and coronal"
        files = {known[key]: str(file.parent / value) for key, value in row.items() if key in known and value}
        if reason is None and not files:
            reason = "no file of any modality"
        if reason is not None:
            problems.append(Problem("skipped", name if case_id else "", where, reason))
            continue
        cases[name] = CaseRecord(
            dataset=dataset,
            case_id=case_id,
            patient_id=row.get("patient_id") or case_id,
            region=row["region"],
            axis=row.get("axis") or AXES.get(row["region"], "axial"),
            files=files,
            mask=str(file.parent / row["mask"]) if row.get("mask") else None,
            lesion=str(file.parent / row["lesion"]) if row.get("lesion") else None,
            centre=row.get("centre", ""),
        )
    if numbered and not columns:
        raise ValueError(f"{file} cannot be read as a manifest ({problems[0].reason}).")
    if columns and (absent := [name for name in ("case_id", "region") if name not in columns]):
        raise ValueError(f"{file} lacks the column {' and '.join(absent)}.")
    if columns and not known.keys() & columns:
        raise ValueError(f"{file} has no column of a modality: {', '.join(MODALITIES)}.")
    return [cases[name] for name in sorted(cases)], problems


def keep_pairs(cases: Iterable[CaseRecord]) -> tuple[list[CaseRecord], list[Problem]]:
    """
    Cases with at least two modalities whose files exist, and the others as problems. An image that does not exist is
    left out of its case, with a problem of its own; what becomes of masks, [`load_case`] says.
    """
    kept, problems = [], []
    for case in cases:
        files = {name: path for name, path in case.files.items() if Path(path).exists()}
        for path in case.files.values():
            if path not in files.values():
                problems.append(Problem("skipped", case.name, path, "the file does not exist"))
        if len(files) >= 2:
            kept.append(replace(case, files=files))
        elif files == case.files:
            path, there = next(iter(files.values()), ""), ", ".join(files) or "nothing"
            problems.append(Problem("skipped", case.name, path, f"missing modality: there is only {there}, no pair"))
    return kept, problems


# ---------------------------------------------------------------------------------------------------------------------
# One case in memory
# ---------------------------------------------------------------------------------------------------------------------


def load_case(record: CaseRecord, min_share: float = 0.02) -> LoadedCase:
    """
    Read, check and align the files of one case.

    Rules. Repaired and noted: another grid (resampled linearly, once, onto PET's, else CT's, else the first file's); CT
    stored from 0 instead of -1024 (nothing is negative: 1024 is subtracted); up to 1 % NaN or infinite voxels
    (background instead); a mask on another grid or without a voxel (left out). Refused: a volume of one value, or with
    more NaN; CT or CBCT whose range is not that of Hounsfield units; PET that is no SUV; grids that share less than
    half of the smaller one's extent, or bodies that share less than 30 % of their union (another patient).

    Args:
        record ([`CaseRecord`]): At least one file.
        min_share (`float`, defaults to 0.02): A slice is usable if the body (mask, or what every modality shows) covers
            this share of the frame.

    Returns:
        [`LoadedCase`]

    Raises:
        `CaseError`: The case is refused; it tells the file and the reason.
    """
    notes: list[Note] = []
    volumes = {name: _checked(name, path, notes) for name, path in record.files.items()}
    reference = next((name for name in ("PET", "CT") if name in volumes), next(iter(volumes)))
    onto = volumes[reference]
    if record.region == "heart":  # short-axis stacks lie obliquely, and each differently
        record = replace(record, axis=stack_axis(onto))
    for name, volume in volumes.items():
        if same_grid(volume, onto):
            continue
        if (shared := shared_extent(volume, onto)) < MIN_SHARED_EXTENT:
            raise CaseError(
                record.files[name],
                f"it shares {shared:.0%} of its extent with {reference}; the files of a case must show the same place "
                "of the same patient",
            )
        fill = BACKGROUND.get(name, 0.0)
        text = f"{name} lies on another grid than {reference} and was resampled onto it"
        notes.append(Note(record.files[name], text))
        volumes[name] = resample(volume, onto, fill)
    windows = measure_windows({name: volume.array for name, volume in volumes.items()})
    bodies = {}
    for name, volume in volumes.items():
        low, high = windows[name]["low"], windows[name]["high"]
        # The background of BraTS is exactly 0.
        floor = 0 if record.dataset == "brats" else low + MR_BODY_SHARE * (high - low)
        bodies[name] = volume.array > BODY_ABOVE.get(name, floor)
    _check_overlap(record, bodies, reference)
    mask = _read_labels(record.mask, onto, "mask", notes)
    lesion = _read_labels(record.lesion, onto, "lesion labels", notes)

    def turned(array):
        return slices_of(Volume(array, onto.affine), record.axis)

    within = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[record.axis]
    areas = [np.count_nonzero(body, axis=within) for body in (*bodies.values(), *([] if mask is None else [mask]))]
    frame = np.prod([onto.array.shape[side] for side in within])
    usable = np.min(areas, axis=0) >= min_share * frame
    return LoadedCase(
        record=record,
        images={name: turned(volume.array) for name, volume in volumes.items()},
        mask=None if mask is None else turned(mask),
        lesion=None if lesion is None else turned(lesion),
        spacing=slice_spacing(onto, record.axis),
        windows=windows,
        usable=np.flatnonzero(usable),
        notes=notes,
    )


def measure_windows(volumes: dict[str, np.ndarray]) -> dict[str, dict]:
    """The intensity record of every volume (`modality`, `unit`, `low`, `high`), as the image processor windows it."""
    processor, windows = SynerMedGenImageProcessor(), {}
    for name, volume in volumes.items():
        low, high = processor.intensity_window(volume, name)
        windows[name] = {"modality": name, "unit": processor.intensity[name]["unit"], "low": low, "high": high}
    return windows


def _checked(name: str, path: str, notes: list[Note]) -> Volume:
    """One volume, its values plausible for its modality."""
    try:
        volume = read_volume(path)
    except (ValueError, FileNotFoundError) as error:
        raise CaseError(path, str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")) from error
    array = volume.array
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
        if share := float(bad.mean()):
            if share > MAX_NAN_SHARE:
                raise CaseError(path, f"{share:.0%} of the voxels are NaN or infinite")
            array = np.where(bad, np.float32(BACKGROUND.get(name, 0.0)), array)
            notes.append(Note(path, f"{name} had {int(bad.sum())} NaN or infinite voxels, now background"))
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise CaseError(path, f"every voxel is {low:g}; the volume is empty")
    if name in ("CT", "CBCT"):
        if high - low <= 256 or (low >= 0 and high > MAX_STORED_CT):
            what = "a picture's grey levels" if high - low <= 256 else "raw counts"
            raise CaseError(path, f"values from {low:g} to {high:g} are no Hounsfield units ({what}?)")
        if low >= 0:
            array = array.astype(np.float32) - np.float32(1024)
            text = f"{name} was stored from {low:g} to {high:g}; 1024 was subtracted to give Hounsfield units"
            notes.append(Note(path, text))
    if name == "PET" and high > MAX_SUV:
        raise CaseError(path, f"values up to {high:g} are no SUV (activity in Bq/ml?); make SUV first")
    return Volume(array, volume.affine)


def _check_overlap(record: CaseRecord, bodies: dict[str, np.ndarray], reference: str):
    """Another patient's scan under the right name lies on the same grid and does not cover the same body."""
    step = max(1, min(bodies[reference].shape) // 32)
    coarse = {name: body[::step, ::step, ::step] for name, body in bodies.items()}
    for name, body in coarse.items():
        union = (body | coarse[reference]).sum()
        shared = (body & coarse[reference]).sum() / union if union else 0.0
        if name != reference and shared < (MIN_SHARED_BRAIN if record.dataset == "brats" else MIN_SHARED_BODY):
            raise CaseError(
                record.files[name],
                f"the body shares {shared:.0%} with that in {reference}; it seems to be another patient or place",
            )


def _read_labels(path: str | None, onto: Volume, what: str, notes: list[Note]) -> np.ndarray | None:
    """Labels as bool on the case's grid; left out, with a note, if they are of no use."""
    if path is None:
        return None
    try:
        labels = read_volume(path)
    except (ValueError, FileNotFoundError) as error:
        notes.append(Note(path, f"the {what} was left out: {error}"))
        return None
    if not same_grid(labels, onto):
        notes.append(Note(path, f"the {what} lies on another grid and was left out"))
        return None
    array = labels.array > 0
    if what == "mask" and not array.any():
        notes.append(Note(path, "the mask has no voxel and was left out"))
        return None
    return array


__all__ = [
    "absent_parts",
    "CaseError",
    "CaseRecord",
    "LoadedCase",
    "Problem",
    "keep_pairs",
    "load_case",
    "measure_windows",
    "read_manifest",
    "scan",
]
