import builtins
import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pyarrow import parquet

from synermedgen_hf.data import layouts
from synermedgen_hf.data.layouts import LAYOUTS, write_layout

SIZE, SUBJECTS = 48, 4


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Every layout once, four patients each."""
    root = tmp_path_factory.mktemp("layouts")
    for name in LAYOUTS:
        write_layout(name, root / name, SUBJECTS, size=SIZE)
    return {name: root / name for name in LAYOUTS}


def files_of(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def checksums(root) -> dict[str, str]:
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files_of(root)}


def arrays_of(root, pattern="") -> dict[str, np.ndarray]:
    return {
        name: np.asarray(nib.load(root / name).dataobj)
        for name in files_of(root)
        if ".nii" in name and re.search(pattern, name)
    }


SYNTHRAD_2023 = [
    "Task{t}/brain/overview/{t}BA001_train.png",
    "Task{t}/brain/overview/{t}BB001_train.png",
    "Task{t}/brain/{t}BA001/ct.nii.gz",
    "Task{t}/brain/{t}BA001/mask.nii.gz",
    "Task{t}/brain/{t}BA001/{s}.nii.gz",
    "Task{t}/brain/{t}BB001/ct.nii.gz",
    "Task{t}/brain/{t}BB001/mask.nii.gz",
    "Task{t}/brain/{t}BB001/{s}.nii.gz",
    "Task{t}/pelvis/overview/{t}PA001_train.png",
    "Task{t}/pelvis/overview/{t}P{c}001_train.png",
    "Task{t}/pelvis/{t}PA001/ct.nii.gz",
    "Task{t}/pelvis/{t}PA001/mask.nii.gz",
    "Task{t}/pelvis/{t}PA001/{s}.nii.gz",
    "Task{t}/pelvis/{t}P{c}001/ct.nii.gz",
    "Task{t}/pelvis/{t}P{c}001/mask.nii.gz",
    "Task{t}/pelvis/{t}P{c}001/{s}.nii.gz",
]
SYNTHRAD_2025 = [
    f"synthRAD2025_Task{{t}}_Train/Task{{t}}/{site}/{{t}}{site}{centre}001/{file}.mha"
    for site, centre in (("AB", "A"), ("HN", "A"), ("TH", "A"), ("AB", "B"))
    for file in ("{s}", "ct", "mask")
] + [
    f"synthRAD2025_Task{{t}}_Train/Task{{t}}/{site}/overviews/{{t}}{site}{centre}001_overview.png"
    for site, centre in (("AB", "A"), ("HN", "A"), ("TH", "A"), ("AB", "B"))
]


def brats_names(folder: str, name: str, kinds: str, join="_", ending=".nii.gz") -> list[str]:
    return [f"{folder}{name}/{name}{join}{kind}{ending}" for kind in kinds.split()]


OLD, NEW = "t1 t1ce t2 flair seg", "t1n t1c t2w t2f seg"
CASES_2018 = ["HGG/{y}_CBICA_AAA_1", "HGG/{y}_TCIA01_101_1", "HGG/{y}_2013_1_1", "LGG/{y}_CBICA_AAB_1"]
NAMES = {
    # Task 1 of the pelvis has no centre B.
    "synthrad2023-task1": [name.format(t=1, s="mr", c="C") for name in SYNTHRAD_2023],
    "synthrad2023-task2": [name.format(t=2, s="cbct", c="B") for name in SYNTHRAD_2023],
    "synthrad2025-task1": [name.format(t=1, s="mr") for name in SYNTHRAD_2025],
    "synthrad2025-task2": [name.format(t=2, s="cbct") for name in SYNTHRAD_2025],
    "brats2018": [name for case in CASES_2018 for name in brats_names(case[:4], case[4:].format(y="Brats18"), OLD)],
    "brats2019": [name for case in CASES_2018 for name in brats_names(case[:4], case[4:].format(y="BraTS19"), OLD)],
    "brats2020": [
        name
        for i in range(1, 5)
        for name in brats_names("MICCAI_BraTS2020_TrainingData/", f"BraTS20_Training_{i:03d}", OLD, ending=".nii")
    ],
    "brats2021": [name for i in range(4) for name in brats_names("", f"BraTS2021_{i:05d}", OLD)],
    # Patients 0 and 2 have two time points.
    "brats2023": [
        name
        for case in ("00000-000", "00000-001", "00001-000", "00002-000", "00002-001", "00003-000")
        for name in brats_names("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/", f"BraTS-GLI-{case}", NEW, join="-")
    ],
    "myops2020": [
        *(f"train25/myops_training_{i}_{kind}.nii.gz" for i in (101, 102, 103) for kind in ("C0", "DE", "T2")),
        *(f"train25_myops_gd/myops_training_{i}_gd.nii.gz" for i in (101, 102, 103)),
        *(f"test20/myops_test_201_{kind}.nii.gz" for kind in ("C0", "DE", "T2")),
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_called_as_in_the_real_dataset(roots, name):
    assert files_of(roots[name]) == sorted([".phantom.json", *NAMES[name]])


def test_every_layout_is_in_these_tests():
    assert set(LAYOUTS) == {*NAMES, "autopet", "autopet-nnunet", "manifest", "synermed"}


STUDY = r"\d\d-\d\d-\d{4}-NA-PET-CT Ganzkoerper  primaer mit KM-\d{5}"


def test_autopet_files_are_called_as_in_the_real_datasets(roots):
    names = [name for name in files_of(roots["autopet"]) if name.startswith("PETCT")]
    assert all(re.fullmatch(rf"PETCT_[0-9a-f]{{10}}/{STUDY}/(SUV|CTres|CT|SEG|PET)\.nii\.gz", name) for name in names)
    studies = {name.rsplit("/", 1)[0] for name in names}
    assert len(names) == 5 * len(studies) == 30
    # Two of the four patients were scanned twice.
    assert sorted(Counter(study.split("/")[0] for study in studies).values()) == [1, 1, 2, 2]

    rest = [name for name in files_of(roots["autopet-nnunet"]) if not name.startswith(".")]
    images = [name for name in rest if re.fullmatch(rf"imagesTr/fdg_[0-9a-f]{{10}}_{STUDY}_000[01]\.nii\.gz", name)]
    labels = [name for name in rest if re.fullmatch(rf"labelsTr/fdg_[0-9a-f]{{10}}_{STUDY}\.nii\.gz", name)]
    assert len(images) == 2 * len(labels) == 12
    assert set(rest) - set(images) - set(labels) == {"dataset.json", "fdg_metadata.csv", "splits_final.json"}


def test_autopet_tables_name_the_studies(roots):
    rows = list(csv.DictReader((roots["autopet"] / "fdg_metadata.csv").open()))
    root = roots["autopet"]
    assert len(rows) == 6 and {"Subject ID", "diagnosis", "age", "sex"} <= set(rows[0])
    for row in rows:
        study = row["Study Location"].removeprefix("./FDG-PET-CT-Lesions/")
        seg = np.asarray(nib.load(root / study / "SEG.nii.gz").dataobj)
        assert seg.any() == (row["diagnosis"] != "NEGATIVE") and study.startswith(row["Subject ID"])
    about = json.loads((roots["autopet-nnunet"] / "dataset.json").read_text())
    assert about["channel_names"] == {"0": "CT", "1": "PET"} and about["numTraining"] == 6
    folds = json.loads((roots["autopet-nnunet"] / "splits_final.json").read_text())
    assert len(folds) == 5 and sum(len(fold["val"]) for fold in folds) == 6
    for fold in folds:  # no patient on both sides
        train, held_out = ({name.split("_")[1] for name in fold[side]} for side in ("train", "val"))
        assert not train & held_out and len(fold["train"]) + len(fold["val"]) == 6


# Data types and grids.


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        ("synthrad2023-task1", "(mr|ct).nii", np.int16),
        ("synthrad2023-task2", "(cbct|ct).nii", np.int16),
        ("synthrad2023-task1", "mask", np.uint8),
        ("brats2018", "_(t1|t1ce|t2|flair).nii", np.int16),
        ("brats2020", "_(t1|t1ce|t2|flair).nii", np.int16),
        ("brats2021", "_(t1|t1ce|t2|flair).nii", np.int16),
        ("brats2023", "-(t1n|t1c|t2w|t2f).nii", np.float32),
        ("brats2021", "seg", np.uint8),
        ("autopet", "/(SUV|PET|CTres).nii", np.float32),
        ("autopet", "/CT.nii", np.int16),
        ("autopet", "SEG", np.uint8),
        ("autopet-nnunet", "imagesTr", np.float32),
        ("autopet-nnunet", "labelsTr", np.uint8),
        ("myops2020", "", np.int16),
    ],
)
def test_files_have_the_data_types_of_the_real_ones(roots, name, pattern, dtype):
    arrays = arrays_of(roots[name], pattern)
    assert arrays and {array.dtype for array in arrays.values()} == {np.dtype(dtype)}


def labels_in(arrays) -> set[int]:
    return set(np.unique(np.concatenate([np.unique(array) for array in arrays.values()])).tolist())


def test_labels_are_those_of_the_real_data(roots):
    for name in ("brats2018", "brats2019", "brats2020", "brats2021"):
        assert labels_in(arrays_of(roots[name], "seg")) == {0, 1, 2, 4}
    assert labels_in(arrays_of(roots["brats2023"], "seg")) == {0, 1, 2, 3}
    assert labels_in(arrays_of(roots["myops2020"], "gd")) == {0, 200, 500, 600, 1220, 2221}
    for name, pattern in (("synthrad2023-task1", "mask"), ("autopet", "SEG"), ("autopet-nnunet", "labelsTr")):
        assert labels_in(arrays_of(roots[name], pattern)) == {0, 1}


def grid(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and RAS affine, read by the library that belongs to the format."""
    if ".nii" in path.name:
        image = nib.load(path)
        assert image.header["sform_code"] == image.header["qform_code"] == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        return image.shape, image.affine
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return image.GetSize(), np.diag([-1, -1, 1, 1]) @ affine


def case_of(name: str, layout: str) -> str:
    """What the files of one case have in common."""
    if layout == "myops2020":
        return re.search(r"\d{3}", name.split("/")[1])[0]
    if layout == "autopet-nnunet":
        return re.search(r"fdg_.*KM-\d{5}", name)[0]
    return name.rsplit("/", 1)[0]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "synermed"])
def test_the_files_of_a_case_share_a_grid(roots, layout):
    cases = {}
    for name in files_of(roots[layout]):
        if name.endswith((".nii", ".nii.gz", ".mha", ".nrrd")) and not name.endswith("/CT.nii.gz"):
            cases.setdefault(case_of(name, layout), []).append(grid(roots[layout] / name))
    assert len(cases) >= SUBJECTS
    for grids in cases.values():
        assert len(grids) >= 2
        for shape, affine in grids[1:]:
            if layout != "manifest":
                assert shape == grids[0][0]
                np.testing.assert_allclose(affine, grids[0][1], atol=1e-3)
            else:  # the axes of a hospital's files point where they like: the corners are the same
                np.testing.assert_allclose(corners(shape, affine), corners(*grids[0]), atol=1e-2)


def corners(shape, affine) -> np.ndarray:
    ends = affine @ np.array([[0, 0, 0, 1], [*(np.array(shape) - 1), 1]]).T
    return np.sort(ends[:3], axis=1)


def test_brats_lies_in_the_space_of_its_atlas(roots):
    # 240 x 240 x 155 voxels of 1 mm, here 48 x 48 x 31 of 5 mm; arrays run to the left, to the back and upwards.
    for layout in ("brats2018", "brats2020", "brats2021", "brats2023"):
        for name in NAMES[layout]:
            shape, affine = grid(roots[layout] / name)
            assert shape == (48, 48, 31)
            np.testing.assert_allclose(affine, [[-5, 0, 0, 0], [0, -5, 0, 235], [0, 0, 5, 0], [0, 0, 0, 1]])


def test_brats_is_stripped_to_exactly_zero(roots):
    for case in ("00000", "00001"):
        arrays = arrays_of(roots["brats2021"], f"{case}_(t1|t1ce|t2|flair).nii")
        background = np.stack([array == 0 for array in arrays.values()])
        assert len(arrays) == 4 and 0.5 < background.all(0).mean() < 0.9
        # Dark fluid may be 0 as well, but not much of it.
        assert (background.any(0) & ~background.all(0)).mean() < 0.01


@pytest.mark.parametrize(("task", "source"), [(1, "mr"), (2, "cbct")])
def test_synthrad2023_is_cropped_and_keeps_its_proportions(roots, task, source):
    root = roots[f"synthrad2023-task{task}"] / f"Task{task}"
    for region, ratio in (("brain", 1), ("pelvis", 2.5)):
        folder = root / region / f"{task}{region[0].upper()}A001"
        shape, affine = grid(folder / "ct.nii.gz")
        spacing = nib.affines.voxel_sizes(affine)
        np.testing.assert_allclose(spacing, np.array([1, 1, ratio]) * spacing[0], rtol=1e-5)
        # Arrays run to the patient's left and back, as ITK has it: two negative entries in RAS.
        np.testing.assert_allclose(np.sign(affine[:3, :3]), np.diag([-1, -1, 1]))
        ct, mask, other = (np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj) for name in ("ct", "mask", source))
        # Outside of the scan lies -1000, not the -1024 of later years.
        assert (ct == -1000).mean() > 0.1 and -1024 not in ct and 300 < ct.max() <= 3071
        assert other.min() >= 0 if source == "mr" else -1024 not in other
        # Cropped to the mask with 10 mm to spare, and the origin moved along.
        left, right = np.flatnonzero(mask.any((1, 2)))[[0, -1]]
        assert max(left, shape[0] - 1 - right) <= np.ceil(10 / spacing[0]) and affine[:3, 3].all()
        # The mask holds the body and a rim of air.
        body = ct > -300
        assert body[mask == 0].mean() < (0.02 if source == "mr" else 0.2) and 0.4 < body[mask == 1].mean() < 1
    overview = Image.open(root / "brain" / "overview" / f"{task}BA001_train.png")
    assert overview.mode == "L" and overview.size[0] == 2 * grid(root / "brain" / f"{task}BA001" / "ct.nii.gz")[0][0]


def test_the_mr_of_synthrad2023_depends_on_the_centre():
    cases = layouts.synthrad2023("synthrad2023-task1", 10, 0, {}, task=1)
    taken = {}
    for case in cases:
        name = next(iter(case.files)).split("/")[2]
        taken.setdefault(name[1:3], set()).add(case.volume["mr_sequence"])
    # Gadolinium in the brain at centres B and C; gradient echo of the pelvis at A, turbo spin echo at C.
    assert taken == {
        "BA": {("SPGR", False)},
        "BB": {("SPGR", True)},
        "BC": {("SPGR", True)},
        "PA": {("SPGR", False)},
        "PC": {("T2", False)},
    }


def test_synthrad2025_is_meta_image(roots):
    root = roots["synthrad2025-task2"]
    for name in files_of(root):
        if not name.endswith(".mha"):
            continue
        image = sitk.ReadImage(str(root / name))
        assert image.GetPixelID() == (sitk.sitkUInt8 if "mask" in name else sitk.sitkInt16)
        assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        pixel, _, between = image.GetSpacing()
        assert between == pytest.approx(3 * pixel)
        if "ct." in name:
            values = sitk.GetArrayViewFromImage(image)
            assert values.min() == -1024 and 300 < values.max() <= 3071


def test_centre_d_of_synthrad2025_unpacks_into_a_folder_of_its_own(tmp_path):
    write_layout("synthrad2025-task1", tmp_path, 10, size=32, num_slices=1)
    assert (tmp_path / "synthRAD2025_Task1_Train_D/Task1/AB/1ABD001/mr.mha").exists()
    assert (tmp_path / "synthRAD2025_Task1_Train/Task1/TH/1THC001/mr.mha").exists()


def test_autopet_has_suv_activity_and_two_cts(roots):
    root = roots["autopet"]
    for study in sorted({name.rsplit("/", 1)[0] for name in files_of(root) if name.startswith("PETCT")})[:2]:
        suv, pet, ctres, ct = (nib.load(root / study / f"{n}.nii.gz") for n in ("SUV", "PET", "CTres", "CT"))
        values = np.asarray(suv.dataobj)
        factor = np.asarray(pet.dataobj)[values > 1] / values[values > 1]
        assert factor.std() < 1e-3 * factor.mean() and 2000 < factor.mean() < 5000  # Bq/ml of SUV 1
        # Axial files whose arrays run to the left, to the front and upwards; slices are 1.5 pixels apart.
        assert nib.aff2axcodes(suv.affine) == ("L", "A", "S")
        np.testing.assert_allclose(suv.header.get_zooms(), suv.header.get_zooms()[0] * np.array([1, 1, 1.5]), rtol=1e-5)
        # The CT's own grid is twice as fine in the slice and covers the same patient.
        assert ct.shape == (2 * suv.shape[0], 2 * suv.shape[1], suv.shape[2])
        centre = [image.affine @ [*(np.array(image.shape) - 1) / 2, 1] for image in (suv, ct)]
        np.testing.assert_allclose(*centre, atol=1e-3)
        halves = np.asarray(ct.dataobj, np.float32).reshape(suv.shape[0], 2, suv.shape[1], 2, suv.shape[2])
        assert np.corrcoef(halves.mean((1, 3)).ravel(), np.asarray(ctres.dataobj).ravel())[0, 1] > 0.98
        # The brain, at the top, shines in PET.
        assert values[:, :, -8:].max() > 4 * np.median(values[:, :, 8:-12][values[:, :, 8:-12] > 0.3])


def test_nnunet_channels_are_ct_and_suv(roots):
    arrays = arrays_of(roots["autopet-nnunet"], "imagesTr")
    for name, array in arrays.items():
        assert array.min() == -1024 if name.endswith("_0000.nii.gz") else 0 <= array.min() < 0.1


def test_myops_has_two_to_six_thick_slices(roots):
    shapes = [(nib.load(roots["myops2020"] / name)) for name in NAMES["myops2020"]]
    assert {image.header.get_zooms()[2] for image in shapes} == {12}
    assert all(2 <= image.shape[2] <= 6 and image.shape[:2] == (SIZE, SIZE) for image in shapes)


def test_the_manifest_leads_to_files_of_every_format(roots):
    root = roots["manifest"]
    rows = list(csv.DictReader((root / "manifest.csv").open()))
    modalities = ["MRI", "CT", "CBCT", "PET", "T1", "T1CE", "T2", "FLAIR", "mask"]
    assert list(rows[0]) == ["case_id", "patient_id", "region", *modalities]
    assert [row["region"] for row in rows] == ["brain", "pelvis", "brain", "brain", "whole-body"]
    assert len({row["case_id"] for row in rows}) == 5 and len({row["patient_id"] for row in rows}) == 4
    paths = [row[column] for row in rows for column in modalities if row[column]]
    assert sorted(paths) == [name for name in files_of(root) if name.startswith("scans/")]
    assert {Path(path).suffix for path in paths} == {".gz", ".mha", ".nrrd"}
    directions = {nib.aff2axcodes(grid(root / path)[1]) for path in paths}
    assert directions == {("R", "A", "S"), ("L", "P", "S"), ("P", "S", "R")}


# The authors' released form.


def test_released_rows_use_every_known_spelling(roots):
    root = roots["synermed"]
    rows = [json.loads(line) for line in (root / "SynerMed.jsonl").read_text().splitlines()]
    assert 30 <= len(rows) < 100
    questions = [row["conversations"][0]["value"] for row in rows]
    answers = [row["conversations"][1]["value"] for row in rows]
    assert {tuple(turn["from"] for turn in row["conversations"]) for row in rows} == {("human", "gpt")}
    for spelling in ("[ABCD]", "Option [ABCD]", "Description [AB]", r'\["A" : ".*"\]', '"A" : ".*"', r".*\(MRI\)"):
        assert any(re.fullmatch(spelling, answer) for answer in answers), spelling
    assert any('"ct"' in answer or '"mr"' in answer for answer in answers)
    assert any(answer.count('"B"') == 2 and '"D"' not in answer for answer in answers)
    for row in rows:
        for image in [row["image"]] if isinstance(row["image"], str) else row["image"]:
            picture = Image.open(root / "slice" / image)
            assert picture.mode == "L" and min(picture.size) > 20
    marks = {(question.count("<image>"), len(row["image"])) for question, row in zip(questions, rows, strict=True)}
    assert {(5, 5), (1, 5), (0, 5), (2, 2), (4, 4)} <= marks
    assert any(isinstance(row["image"], str) for row in rows)
    for key in ("id", "pair", "case_id", "slice_idx"):  # optional: some rows have them
        assert any(key in row for row in rows) and not all(key in row for row in rows)


def test_released_answers_are_right(roots):
    rows = [json.loads(line) for line in (roots["synermed"] / "SynerMed.jsonl").read_text().splitlines()]
    matched = [row for row in rows if len(row["image"]) == 5]
    assert {row["conversations"][1]["value"][-1] for row in matched} == set("ABCD")
    for row in matched:
        reference, *candidates = (name.split("/")[1] for name in row["image"])
        assert candidates["ABCD".index(row["conversations"][1]["value"][-1])] == reference
        assert len(set(row["image"])) == 5 and len({name.split("/")[0] for name in row["image"][1:]}) == 1
    folders = {"t1": "T1", "t1ce": "T1CE", "t2": "T2", "flair": "FLAIR", "mr": "MRI", "ct": "CT", "pet": "PET"}
    for row in rows:
        if len(row["image"]) == 4:
            said = re.findall(r': "(\w+)', row["conversations"][1]["value"])
            shown = [folders.get(name.split("/")[0].split("_")[0], "CBCT") for name in row["image"]]
            assert [{"ct": "CT", "mr": "MRI"}.get(word, word) for word in said] == shown


def test_released_pairs_are_encoded_pictures_with_wordings(roots):
    file = parquet.ParquetFile(roots["synermed"] / "SynerMed.parquet")
    rows = file.read().to_pylist()
    assert file.schema_arrow.names == ["image_list", "instruction_list"] and file.metadata.num_row_groups == 3
    assert {len(row["image_list"]) for row in rows} == {2, 3}
    for row in rows:
        pictures = [Image.open(io.BytesIO(data)) for data in row["image_list"]]
        assert len({picture.size for picture in pictures}) == 1
        assert len(row["instruction_list"]) == len(pictures) - 1
        assert all(
            len(wordings) == 3 and all("from" in text for text in wordings) for wordings in row["instruction_list"]
        )


# Reproducible, resumable, careful.

SMALL = {"subjects": 3, "size": 32, "num_slices": 2}


@pytest.mark.parametrize(
    "name", ["synthrad2023-task2", "synthrad2025-task1", "brats2020", "autopet-nnunet", "manifest", "synermed"]
)
def test_a_second_run_gives_the_same_bytes(tmp_path, name):
    arguments = {**SMALL, "num_slices": None if name == "synermed" else 2}
    for folder in ("one", "two"):
        write_layout(name, tmp_path / folder, **arguments)
    write_layout(name, tmp_path / "other", **arguments, seed=1)
    one, two, other = (checksums(tmp_path / folder) for folder in ("one", "two", "other"))
    assert one == two
    volumes = [
        file for file in one if file.endswith((".nii", ".nii.gz", ".mha", ".nrrd", ".png")) and "seg" not in file
    ]
    assert all(one[file] != other[file] for file in volumes if file in other and "mask" not in file)
    assert one != other


def test_an_interrupted_run_leaves_no_half_file_and_goes_on(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    write_layout("myops2020", whole, 4, size=32)
    save, calls = nib.save, []

    def die_in_the_sixth(image, path):
        calls.append(path)
        if len(calls) == 6:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(image, path)

    root = tmp_path / "cut"
    monkeypatch.setattr(nib, "save", die_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        write_layout("myops2020", root, 4, size=32)
    monkeypatch.undo()
    complete = checksums(whole)
    left = checksums(root)
    assert left.items() <= complete.items() and len(left) == 6  # five and the record
    (root / layouts.UNFINISHED / "0").mkdir(parents=True)  # as a killed run would leave it
    (root / layouts.UNFINISHED / "0" / "half.nii.gz").write_bytes(b"half")
    times = {name: (root / name).stat().st_mtime_ns for name in left if name.startswith("train25/myops_training_101")}
    written = write_layout("myops2020", root, 4, size=32)
    assert checksums(root) == complete and not (root / layouts.UNFINISHED).exists()
    assert times and all((root / name).stat().st_mtime_ns == time for name, time in times.items())
    assert written.files == len(complete) - 1 and written.cases == 4


def test_what_was_written_is_summed_up(tmp_path):
    written = write_layout("myops2020", tmp_path / "new" / "folder", 1, size=32)
    files = [path for path in (tmp_path / "new" / "folder").rglob("*.nii.gz")]
    assert written.files == len(files) == 4 and written.bytes == sum(path.stat().st_size for path in files)
    assert "1 cases, 4 files" in str(written)
    assert write_layout("myops2020", tmp_path / "new" / "folder", 1, size=32) == written


def test_processes_make_no_difference(tmp_path):
    for folder, num_proc in (("one", 1), ("two", 2)):
        write_layout("myops2020", tmp_path / folder, 3, size=32, num_proc=num_proc)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_nothing_is_written_over(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else"):
        write_layout("myops2020", mine, 1, size=32)
    assert files_of(mine) == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="something else"):
        write_layout("myops2020", mine / "thesis.txt", 1, size=32)
    write_layout("myops2020", tmp_path / "made", 1, size=32)
    before = checksums(tmp_path / "made")
    with pytest.raises(FileExistsError, match="seed=0"):
        write_layout("myops2020", tmp_path / "made", 1, size=32, seed=1)
    assert checksums(tmp_path / "made") == before


def test_layouts_can_share_a_folder(tmp_path):
    for task in (1, 2):
        write_layout(f"synthrad2023-task{task}", tmp_path, 1, size=32, num_slices=1)
    write_layout("synthrad2023-task1", tmp_path, 1, size=32, num_slices=1)
    assert {path.name for path in tmp_path.iterdir()} == {"Task1", "Task2", ".phantom.json"}


def test_case_355_can_be_misnamed_as_it_is(tmp_path):
    write_layout("brats2020", tmp_path, 2, size=32, num_slices=2, misnamed=True)
    folder = tmp_path / "MICCAI_BraTS2020_TrainingData" / "BraTS20_Training_355"
    assert (folder / "W39_1998.09.19_Segm.nii").exists() and not (folder / "BraTS20_Training_355_seg.nii").exists()
    assert len(list(folder.iterdir())) == 5


def test_misregistration_and_breathing_reach_the_files(tmp_path):
    for name, option, still, moved in (
        ("synthrad2023-task1", "misregistration", "ct.nii", "mr.nii"),
        ("autopet-nnunet", "breathing", "_0000.nii", "_0001.nii"),
    ):
        for value in (False, True):
            slices = None if name.startswith("autopet") else 4
            root = tmp_path / f"{name}-{value}"
            write_layout(name, root, 1, size=32, num_slices=slices, **{option: value})
        off, on = (arrays_of(tmp_path / f"{name}-{value}") for value in (False, True))
        for path, array in off.items():
            if still in path:
                np.testing.assert_array_equal(array, on[path])
            if moved in path:
                assert not np.array_equal(array, on[path])


def test_requests_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="synthrad2023-task1"):
        write_layout("synthrad", tmp_path, 1)
    with pytest.raises(ValueError, match="subjects"):
        write_layout("brats2021", tmp_path, 0)
    for option, layout in (("misregistration", "brats2021"), ("breathing", "myops2020"), ("misnamed", "brats2021")):
        with pytest.raises(ValueError, match=option):
            write_layout(layout, tmp_path, 1, **{option: True})
    with pytest.raises(ValueError, match="num_slices"):
        write_layout("synermed", tmp_path, 1, num_slices=2)
    assert not files_of(tmp_path)


def test_missing_simpleitk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_simpleitk(name, *args, **kwargs):
        if name == "SimpleITK":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_simpleitk)
    with pytest.raises(ImportError, match=r"pip install 'synermedgen-hf\[dicom\]'"):
        write_layout("synthrad2025-task1", tmp_path, 1, size=32)
    assert not files_of(tmp_path)
    write_layout("myops2020", tmp_path, 1, size=32)  # needs none
