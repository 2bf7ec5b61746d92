"""Which files of a folder belong together, and what is read, repaired or refused of one case."""

import codecs
import json
from pathlib import Path

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from synermedgen_hf import SynerMedGenImageProcessor
from synermedgen_hf.data.sources import (
    CaseRecord,
    Problem,
    brats_patient,
    keep_pairs,
    load_case,
    read_manifest,
    scan,
)

BRATS_MODALITIES = ["T1", "T1CE", "T2", "FLAIR"]
BRATS_OLD, BRATS_NEW = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")


def touch(root, *names):
    """Empty files: folders are recognised by names alone."""
    for name in names:
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path(root)


def found(root, problems=0):
    """Cases by name, after a look that there are as many problems as expected."""
    cases, said = scan(root)
    assert len(said) == problems, said
    assert [case.name for case in cases] == sorted(case.name for case in cases)
    return {case.name: case for case in cases}


def below(root, case):
    """Modality -> path below the root."""
    return {name: Path(path).relative_to(root).as_posix() for name, path in case.files.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def test_synthrad2023_with_both_tasks_in_one_root(tmp_path):
    touch(
        tmp_path,
        *(f"Task1/brain/1BA001/{name}.nii.gz" for name in ("mr", "ct", "mask")),
        *(f"Task1/pelvis/1PC023/{name}.nii.gz" for name in ("mr", "ct", "mask")),
        *(f"Task2/brain/2BC004/{name}.nii.gz" for name in ("cbct", "ct", "mask")),
        *(f"Task2/pelvis/2PA092/{name}.nii.gz" for name in ("cbct", "ct", "mask")),
        "Task1/brain/overview/1_brain_train.xlsx",
        "Task1/brain/overview/1BA001_train.png",
        "synthRAD2023_dataset_description.pdf",
    )
    cases = found(tmp_path)
    assert list(cases) == [f"synthrad2023/{name}" for name in ("1BA001", "1PC023", "2BC004", "2PA092")]
    folder = tmp_path / "Task1/brain/1BA001"
    assert cases["synthrad2023/1BA001"] == CaseRecord(
        dataset="synthrad2023",
        case_id="1BA001",
        patient_id="1BA001",
        region="brain",
        axis="axial",
        files={"CT": str(folder / "ct.nii.gz"), "MRI": str(folder / "mr.nii.gz")},
        mask=str(folder / "mask.nii.gz"),
        centre="A",
    )
    pelvis = cases["synthrad2023/2PA092"]
    assert (pelvis.region, pelvis.centre, set(pelvis.files)) == ("pelvis", "A", {"CBCT", "CT"})
    assert cases["synthrad2023/1PC023"].centre == "C"
    # One task, one region or one case will do as well.
    assert list(found(tmp_path / "Task2")) == ["synthrad2023/2BC004", "synthrad2023/2PA092"]
    assert list(found(str(folder))) == ["synthrad2023/1BA001"]


def test_synthrad2025(tmp_path):
    touch(
        tmp_path,
        *(f"synthRAD2025_Task1_Train/Task1/AB/1ABA005/{name}.mha" for name in ("mr", "ct", "mask")),
        *(f"synthRAD2025_Task1_Train_D/Task1/TH/1THD002/{name}.mha" for name in ("mr", "ct", "mask")),
        *(f"synthRAD2025_Task2_Train/Task2/HN/2HNE101/{name}.mha" for name in ("cbct", "ct", "mask")),
        "synthRAD2025_Task1_Train/Task1/AB/overviews/1ABA005_overview.png",
        "synthRAD2025_Task1_Train/Task1/AB/overviews/1_AB_train_parameters.xlsx",
    )
    cases = found(tmp_path)
    assert [(case.dataset, case.region, case.centre, set(case.files), bool(case.mask)) for case in cases.values()] == [
        ("synthrad2025", "abdomen", "A", {"MRI", "CT"}, True),
        ("synthrad2025", "thorax", "D", {"MRI", "CT"}, True),
        ("synthrad2025", "head-neck", "E", {"CBCT", "CT"}, True),
    ]


def test_validation_folders_without_ct_are_no_pairs_and_said_to_be_none(tmp_path):
    touch(
        tmp_path,
        "synthRAD2025_Task1_Val_Input/Task1/AB/1ABA011/mr.mha",
        "synthRAD2025_Task1_Val_Input/Task1/AB/1ABA011/mask.mha",
        "Task1/brain/1BA001/mr.nii.gz",
        "Task1/brain/1BA001/ct.nii.gz",
    )
    cases = found(tmp_path)
    kept, problems = keep_pairs(cases.values())
    assert [case.case_id for case in kept] == ["1BA001"]
    path = str(tmp_path / "synthRAD2025_Task1_Val_Input/Task1/AB/1ABA011/mr.mha")
    assert problems == [
        Problem("skipped", "synthrad2025/1ABA011", path, "missing modality: there is only MRI, no pair")
    ]


@pytest.mark.parametrize(
    ("folder", "file", "parts", "patient", "centre"),
    [
        ("HGG/Brats18_TCIA01_131_1", "{case}_{part}.nii.gz", BRATS_OLD, "TCIA01_131_1", "TCIA01"),
        ("LGG/Brats18_2013_15_1", "{case}_{part}.nii.gz", BRATS_OLD, "2013_15_1", ""),
        ("HGG/BraTS19_CBICA_AAB_1", "{case}_{part}.nii.gz", BRATS_OLD, "CBICA_AAB_1", "CBICA"),
        (
            "MICCAI_BraTS2020_TrainingData/BraTS20_Training_001",
            "{case}_{part}.nii",
            BRATS_OLD,
            "BraTS20_Training_001",
            "",
        ),
        ("BraTS2021_00495", "{case}_{part}.nii.gz", BRATS_OLD, "BraTS-GLI-00495", ""),
        (
            "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-00031-001",
            "{case}-{part}.nii.gz",
            BRATS_NEW,
            "BraTS-GLI-00031",
            "",
        ),
        ("BraTS-MET-00086-000", "{case}-{part}.nii.gz", BRATS_NEW, "BraTS-MET-00086", ""),
        ("BraTS-SSA-00002-000", "{case}-{part}.nii.gz", BRATS_NEW, "BraTS-SSA-00002", ""),
        ("BraTS-PED-00014-000", "{case}-{part}.nii.gz", BRATS_NEW, "BraTS-PED-00014", ""),
        ("BraTS-MEN-00004-000", "{case}-{part}.nii.gz", BRATS_NEW, "BraTS-MEN-00004", ""),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
def test_brats_of_every_year(tmp_path, folder, file, parts, patient, centre):
    case = folder.rsplit("/", 1)[-1]
    paths = {part: f"{folder}/{file.format(case=case, part=part)}" for part in (*parts, "seg")}
    touch(tmp_path, *paths.values())
    (record,) = found(tmp_path).values()
    assert below(tmp_path, record) == dict(zip(BRATS_MODALITIES, [paths[part] for part in parts], strict=True))
    assert record.lesion == str(tmp_path / paths["seg"]) and record.mask is None
    assert (record.dataset, record.case_id, record.patient_id) == ("brats", case, patient)
    assert (record.region, record.axis, record.centre, record.notes) == ("brain", "axial", centre, ())


def test_time_points_of_brats_are_cases_of_one_patient(tmp_path):
    names = ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000"]
    touch(tmp_path, *(f"{name}/{name}-{part}.nii.gz" for name in names for part in BRATS_NEW))
    patients = {case.case_id: case.patient_id for case in found(tmp_path).values()}
    assert patients == dict(zip(names, ["BraTS-GLI-00001", "BraTS-GLI-00001", "BraTS-GLI-00002"], strict=True))


@pytest.mark.parametrize(
    "names", [("flair", "t1", "t1ce", "t2"), ("fla", "t1", "t1c", "t2"), ("FLAIR", "T1", "T1GD", "T2")]
)
def test_brats_files_without_a_prefix(tmp_path, names):
    touch(tmp_path, *(f"input/case_7/{name}.nii.gz" for name in names))
    (record,) = found(tmp_path).values()
    assert (record.dataset, record.case_id) == ("brats", "case_7")
    assert below(tmp_path, record) == {
        modality: f"input/case_7/{name}.nii.gz"
        for modality, name in zip(["FLAIR", "T1", "T1CE", "T2"], names, strict=True)
    }


def test_the_misnamed_segmentation_of_brats_2020_is_taken_and_noted(tmp_path):
    folder = "MICCAI_BraTS2020_TrainingData/BraTS20_Training_355"
    touch(tmp_path, *(f"{folder}/BraTS20_Training_355_{part}.nii" for part in BRATS_OLD))
    touch(tmp_path, f"{folder}/W39_1998.09.19_Segm.nii")
    cases, problems = scan(tmp_path)
    assert cases[0].lesion == str(tmp_path / folder / "W39_1998.09.19_Segm.nii")
    assert list(cases[0].files) == ["FLAIR", "T1", "T1CE", "T2"]
    assert [(problem.kind, problem.case, problem.path) for problem in problems] == [
        ("repaired", "brats/BraTS20_Training_355", str(tmp_path / folder))
    ]
    assert "W39_1998.09.19_Segm.nii is the only segmentation" in problems[0].reason


def test_a_file_of_another_patient_is_not_taken_into_a_case(tmp_path):
    touch(tmp_path, *(f"BraTS2021_00002/BraTS2021_00002_{part}.nii.gz" for part in ("t1", "t2", "flair")))
    touch(tmp_path, "BraTS2021_00002/BraTS2021_00003_t1ce.nii.gz")
    cases, problems = scan(tmp_path)
    assert set(cases[0].files) == {"T1", "T2", "FLAIR"}
    (problem,) = problems
    assert (problem.kind, problem.case) == ("skipped", "brats/BraTS2021_00002")
    assert problem.path.endswith("BraTS2021_00003_t1ce.nii.gz")
    assert "in the folder of BraTS2021_00002 and is named after another patient, BraTS2021_00003" in problem.reason


def test_two_files_of_one_contrast_are_said(tmp_path):
    touch(tmp_path, *(f"BraTS2021_00002/BraTS2021_00002_{part}.nii.gz" for part in ("t1ce", "t1gd", "t2")))
    _, problems = scan(tmp_path)
    assert len(problems) == 1 and "T1CE" in problems[0].reason


def test_autopet_with_several_studies_of_one_patient(tmp_path):
    studies = ["03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-68547", "09-15-2004-NA-PET-CT Ganzkoerper-12345"]
    root = tmp_path / "FDG-PET-CT-Lesions"
    for study in studies:
        touch(root / "PETCT_0011f3deaf" / study, *(f"{name}.nii.gz" for name in ("SUV", "CTres", "CT", "SEG", "PET")))
    touch(root / "PETCT_01140d52d8" / studies[0], "SUV.nii.gz", "CT.nii.gz")
    touch(tmp_path, "fdg_metadata.csv")
    cases = list(found(tmp_path).values())
    assert [(case.patient_id, case.case_id) for case in cases] == [
        ("0011f3deaf", f"PETCT_0011f3deaf/{studies[0]}"),  # as the nnU-Net style calls the patient
        ("0011f3deaf", f"PETCT_0011f3deaf/{studies[1]}"),
        ("01140d52d8", f"PETCT_01140d52d8/{studies[0]}"),
    ]
    first, *_, last = cases
    assert (first.dataset, first.region, first.axis) == ("autopet", "whole-body", "coronal")
    # The CT that lies on the PET's grid goes before the original one.
    assert {name: Path(path).name for name, path in first.files.items()} == {"PET": "SUV.nii.gz", "CT": "CTres.nii.gz"}
    assert Path(first.lesion).name == "SEG.nii.gz"
    assert Path(last.files["CT"]).name == "CT.nii.gz" and last.lesion is None


def test_counts_without_suv_are_not_taken_as_pet(tmp_path):
    touch(tmp_path / "PETCT_01" / "study", "PET.nii.gz", "CTres.nii.gz")
    (case,), (problem,) = scan(tmp_path)
    assert list(case.files) == ["CT"]
    assert (problem.kind, Path(problem.path).name) == ("skipped", "PET.nii.gz")
    assert "Bq/ml without an SUV.nii.gz" in problem.reason


def nnunet(root):
    names = {
        "fdg_0011f3deaf_03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-68547": True,
        "fdg_0011f3deaf_09-15-2004-NA-PET-CT Ganzkoerper_nachher-12345": True,
        "psma_95b833d65be26d2f_2018-04-16": False,
    }
    for name in names:
        touch(root, f"imagesTr/{name}_0000.nii.gz", f"imagesTr/{name}_0001.nii.gz", f"labelsTr/{name}.nii.gz")
    touch(root, "dataset.json", "splits_final.json", "fdg_metadata.csv", "psma_metadata.csv")
    return [name for name, wanted in names.items() if wanted]


def test_autopet_in_nnunet_style_without_psma(tmp_path):
    names = nnunet(tmp_path)
    cases, problems = scan(tmp_path)
    assert [below(tmp_path, case) for case in cases] == [
        {"CT": f"imagesTr/{name}_0000.nii.gz", "PET": f"imagesTr/{name}_0001.nii.gz"} for name in names
    ]
    assert [case.lesion for case in cases] == [str(tmp_path / f"labelsTr/{name}.nii.gz") for name in names]
    assert {case.patient_id for case in cases} == {"0011f3deaf"}
    assert {(case.dataset, case.region, case.axis) for case in cases} == {("autopet", "whole-body", "coronal")}
    said = [problem for problem in problems if "PSMA" in problem.reason]
    assert [(problem.kind, problem.case) for problem in said] == [("skipped", "autopet/95b833d65be26d2f/2018-04-16")]


def test_labels_in_nnunet_style_are_no_strays(tmp_path):
    nnunet(tmp_path)
    _, problems = scan(tmp_path)
    assert all("no known layout" not in problem.reason for problem in problems)


def test_a_patient_in_both_styles_of_autopet_is_one_patient(tmp_path):
    nnunet(tmp_path / "autoPET III")
    touch(tmp_path / "FDG-PET-CT-Lesions" / "PETCT_0011f3deaf" / "03-23-2003", "SUV.nii.gz", "CTres.nii.gz")
    cases, _ = scan(tmp_path)
    assert len(cases) == 3 and len({case.patient_id for case in cases}) == 1


def myops(root):
    touch(root, *(f"train25/myops_training_101_{part}.nii.gz" for part in ("C0", "DE", "T2")))
    touch(root, "train25_myops_gd/myops_training_101_gd.nii.gz")
    touch(root, *(f"test20/myops_test_201_{part}.nii.gz" for part in ("C0", "DE", "T2")))


def test_myops_2020(tmp_path):
    myops(tmp_path)
    training, test = sorted(scan(tmp_path)[0], key=lambda case: case.case_id, reverse=True)
    assert (training.name, training.region, training.axis) == ("myops2020/myops_training_101", "heart", "axial")
    assert below(tmp_path, training) == {
        "MRI": "train25/myops_training_101_C0.nii.gz",
        "T1CE": "train25/myops_training_101_DE.nii.gz",
        "T2": "train25/myops_training_101_T2.nii.gz",
    }
    assert training.lesion == str(tmp_path / "train25_myops_gd/myops_training_101_gd.nii.gz")
    assert test.case_id == "myops_test_201" and test.lesion is None


def test_labels_of_myops_are_no_strays(tmp_path):
    myops(tmp_path)
    found(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Folders as they are
# ---------------------------------------------------------------------------------------------------------------------


def test_several_datasets_in_one_root(tmp_path):
    touch(tmp_path, "SynthRAD/Task1/brain/1BA001/mr.nii.gz", "SynthRAD/Task1/brain/1BA001/ct.nii.gz")
    touch(tmp_path, "2025/Task2/TH/2THA001/cbct.mha", "2025/Task2/TH/2THA001/ct.mha")
    touch(tmp_path, *(f"BraTS/BraTS2021_00000/BraTS2021_00000_{part}.nii.gz" for part in BRATS_OLD))
    touch(tmp_path, "PET/PETCT_01/study/SUV.nii.gz", "PET/PETCT_01/study/CTres.nii.gz")
    touch(tmp_path, *(f"MyoPS/train25/myops_training_101_{part}.nii.gz" for part in ("C0", "DE")))
    assert [case.dataset for case in found(tmp_path).values()] == [
        "autopet",
        "brats",
        "myops2020",
        "synthrad2023",
        "synthrad2025",
    ]


def test_stray_volumes_are_counted_and_said(tmp_path):
    touch(tmp_path, "Task1/brain/1BA001/mr.nii.gz", "Task1/brain/1BA001/ct.nii.gz")
    touch(tmp_path, "stuff/a.nii.gz", "stuff/b.mha", "stuff/notes.txt", "Task1/brain/template.nii.gz")
    cases, (problem,) = scan(tmp_path)
    assert len(cases) == 1
    assert (problem.kind, problem.path) == ("skipped", str(tmp_path))
    assert problem.reason == "3 volumes that belong to no known layout; a manifest.csv can say what they are"


def test_hidden_files_and_folders_are_not_looked_at(tmp_path):
    touch(tmp_path, "Task1/brain/1BA001/mr.nii.gz", "Task1/brain/1BA001/ct.nii.gz")
    touch(tmp_path, "Task1/brain/1BA001/._mr.nii.gz", "__MACOSX/.cache/x.nii.gz", ".snapshots/1BA002/mr.nii.gz")
    (case,) = found(tmp_path).values()
    assert below(tmp_path, case) == {"MRI": "Task1/brain/1BA001/mr.nii.gz", "CT": "Task1/brain/1BA001/ct.nii.gz"}


def test_the_compressed_copy_of_a_scan_is_the_one_that_is_read(tmp_path):
    touch(tmp_path, "1BA001/mr.nii", "1BA001/mr.nii.gz", "1BA001/ct.nii")
    (case,) = found(tmp_path).values()
    assert below(tmp_path, case) == {"MRI": "1BA001/mr.nii.gz", "CT": "1BA001/ct.nii"}


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path / "store", "1BA001/mr.nii.gz", "1BA001/ct.nii.gz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Task1").symlink_to(tmp_path / "store")
    assert list(found(tmp_path / "data")) == ["synthrad2023/1BA001"]


def test_a_folder_linked_into_itself_is_looked_at_once(tmp_path):
    touch(tmp_path, "1BA001/mr.nii.gz", "1BA001/ct.nii.gz")
    (tmp_path / "again").symlink_to(tmp_path)
    found(tmp_path)


def test_the_same_case_twice_counts_once_and_is_said(tmp_path):
    touch(tmp_path, *(f"{copy}/Task1/brain/1BA001/{name}.nii.gz" for copy in "ab" for name in ("mr", "ct")))
    (case,), (problem,) = scan(tmp_path)
    assert Path(case.files["CT"]).parent == tmp_path / "a/Task1/brain/1BA001"
    assert (problem.kind, problem.case, problem.path) == (
        "skipped",
        "synthrad2023/1BA001",
        str(tmp_path / "b/Task1/brain/1BA001"),
    )
    assert f"found already, in {tmp_path / 'a/Task1/brain/1BA001'}" in problem.reason


def test_an_empty_folder_has_no_cases_and_a_missing_one_is_an_error(tmp_path):
    assert scan(tmp_path) == ([], [])
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        scan(tmp_path / "nowhere")
    touch(tmp_path, "scan.nii.gz")
    with pytest.raises(ValueError, match="scan.nii.gz is no manifest: CSV or JSON lines are read"):
        scan(tmp_path / "scan.nii.gz")


def test_only_cases_with_two_modalities_that_exist_are_pairs(tmp_path):
    touch(tmp_path, "mr.nii.gz", "ct.nii.gz")
    here, gone = str(tmp_path / "ct.nii.gz"), str(tmp_path / "gone.nii.gz")

    def record(name, **files):
        return CaseRecord("own", name, name, "brain", "axial", files)

    pair = record("pair", CT=here, MRI=str(tmp_path / "mr.nii.gz"))
    kept, problems = keep_pairs([pair, record("alone", CT=here), record("lost", CT=here, MRI=gone)])
    assert kept == [pair]
    assert problems == [
        Problem("skipped", "own/alone", here, "missing modality: there is only CT, no pair"),
        Problem("skipped", "own/lost", gone, "the file does not exist"),
    ]


def test_a_mask_that_does_not_exist_does_not_cost_the_pair(tmp_path):
    touch(tmp_path, "mr.nii.gz", "ct.nii.gz")
    files = {"CT": str(tmp_path / "ct.nii.gz"), "MRI": str(tmp_path / "mr.nii.gz")}
    case = CaseRecord("own", "pair", "pair", "brain", "axial", files, mask=str(tmp_path / "mask.nii.gz"))
    assert keep_pairs([case])[0] == [case]


def test_one_missing_modality_of_several_costs_only_itself(tmp_path):
    touch(tmp_path, "t1.nii.gz", "t2.nii.gz")
    files = {name: str(tmp_path / f"{name.lower()}.nii.gz") for name in ("T1", "T2", "FLAIR")}
    kept, problems = keep_pairs([CaseRecord("own", "case", "case", "brain", "axial", files)])
    assert set(kept[0].files) == {"T1", "T2"}
    assert len(problems) == 1 and problems[0].path == files["FLAIR"]


# ---------------------------------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------------------------------

HEADER = "case_id,patient_id,region,MRI,CT,mask\n"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_manifest_names_own_data(tmp_path, form):
    if form == "csv":
        rows = "Case_ID,patient_id,region,MRI,CT,PET,mask,centre\n"
        rows += "one,p1,brain,scans/one/t1.nii.gz,scans/one/ct,,masks/one.nii.gz,north\n"
        rows += "two,,whole-body,,/elsewhere/ct.mha,pet.nrrd,,\n"
    else:
        rows = lines(
            {
                "case_id": "one",
                "patient_id": "p1",
                "region": "brain",
                "MRI": "scans/one/t1.nii.gz",
                "CT": "scans/one/ct",
                "mask": "masks/one.nii.gz",
                "centre": "north",
            },
            {"case_id": "two", "region": "whole-body", "MRI": None, "CT": "/elsewhere/ct.mha", "PET": "pet.nrrd"},
        )
    manifest = write(tmp_path / f"manifest.{form}", rows)
    cases, problems = read_manifest(manifest)
    assert problems == []
    assert cases == [
        CaseRecord(
            "own",
            "one",
            "p1",
            "brain",
            "axial",
            {"MRI": str(tmp_path / "scans/one/t1.nii.gz"), "CT": str(tmp_path / "scans/one/ct")},
            mask=str(tmp_path / "masks/one.nii.gz"),
            centre="north",
        ),
        # Paths are relative to the manifest unless absolute; a case is a patient unless told; whole bodies are coronal.
        CaseRecord(
            "own",
            "two",
            "two",
            "whole-body",
            "coronal",
            {"CT": "/elsewhere/ct.mha", "PET": str(tmp_path / "pet.nrrd")},
        ),
    ]
    assert scan(manifest) == scan(tmp_path) == (cases, problems)  # given itself, or found in the root


@pytest.mark.parametrize(
    "form",
    [
        "csv",
        pytest.param("jsonl"),
    ],
)
def test_a_byte_order_mark_does_not_matter(tmp_path, form):
    row = {"case_id": "one", "region": "brain", "MRI": "a.nii", "CT": "b.nii"}
    text = lines(row) if form == "jsonl" else ",".join(row) + "\r\n" + ",".join(row.values()) + "\r\n"
    manifest = tmp_path / f"manifest.{form}"
    manifest.write_bytes(codecs.BOM_UTF8 + text.encode())
    (case,), problems = read_manifest(manifest)
    assert (case.case_id, set(case.files), problems) == ("one", {"MRI", "CT"}, [])


def test_bad_rows_are_skipped_with_line_and_reason(tmp_path):
    manifest = write(
        tmp_path / "manifest.csv",
        HEADER.replace("mask", "axis")
        + "one,p1,brain,a.nii,b.nii,\n"
        + "one,p2,brain,c.nii,d.nii,\n"
        + ",p3,brain,a.nii,b.nii,\n"
        + "four,p4,knee,a.nii,b.nii,\n"
        + "five,p5,brain,,,\n"
        + "six,p6,brain,a.nii,b.nii,sagittal\n"
        + "seven,p7,brain,a.nii,b.nii,coronal\n",
    )
    cases, problems = read_manifest(manifest)
    assert [(case.case_id, case.patient_id, case.axis) for case in cases] == [
        ("one", "p1", "axial"),
        ("seven", "p7", "coronal"),
    ]
    regions = "brain, pelvis, whole-body, abdomen, thorax, head-neck, heart"
    assert [(problem.kind, problem.case, problem.path, problem.reason) for problem in problems] == [
        ("skipped", "own/one", f"{manifest}, line 3", "a case of this name stands further up; the first one counts"),
        ("skipped", "", f"{manifest}, line 4", "no case_id"),
        ("skipped", "own/four", f"{manifest}, line 5", f"unknown region 'knee'; known are {regions}"),
        ("skipped", "own/five", f"{manifest}, line 6", "no file of any modality"),
        ("skipped", "own/six", f"{manifest}, line 7", "unknown axis 'sagittal'; known are axial and coronal"),
    ]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("patient_id,region,CT,MRI", "lacks the column case_id"),
        ("patient_id,CT,MRI", "lacks the column case_id and region"),
        ("case_id,region,ct_path,mr_path", "has no column of a modality: T1, T1CE, T2, FLAIR, MRI, CT, CBCT, PET"),
        ("case_id;region;CT;MRI", "lacks the column case_id"),
    ],
)
def test_missing_columns_are_said(tmp_path, header, words):
    manifest = write(tmp_path / "manifest.csv", f"{header}\none,brain,a.nii,b.nii\n")
    with pytest.raises(ValueError, match=f"manifest.csv {words}"):
        read_manifest(manifest)


@pytest.mark.parametrize("content", [HEADER, ""])
def test_an_empty_manifest_has_no_cases(tmp_path, content):
    assert read_manifest(write(tmp_path / "manifest.csv", content)) == ([], [])
    assert read_manifest(write(tmp_path / "manifest.jsonl", "\n")) == ([], [])


def test_what_is_no_table_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="manifest.jsonl cannot be read as a manifest"):
        read_manifest(write(tmp_path / "manifest.jsonl", '{"case_id": "one", \n'))
    (tmp_path / "manifest.csv").write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(ValueError, match="manifest.csv cannot be read as a manifest"):
        read_manifest(tmp_path / "manifest.csv")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        pytest.param(
            lines({"case_id": "one", "region": "brain", "CT": "a.nii", "MRI": "b.nii"}, ["two", "brain"]),
            "one row that is a list ends all",
            id="list",
        ),
        pytest.param(
            lines(
                {"case_id": "one", "region": "brain", "CT": "a.nii", "MRI": "b.nii"},
                {"case_id": "two", "CT": "c.nii", "MRI": "d.nii"},
            ),
            "one row without a region ends all",
            id="no region",
        ),
        pytest.param(
            lines(
                {"case_id": "one", "region": "brain", "CT": "a.nii", "MRI": "b.nii"},
                {"case_id": "two", "region": "brain"},
            ),
            "one row without images ends all",
            id="no images",
        ),
        pytest.param(
            lines({"case_id": "one", "region": "brain", "CT": "a.nii", "MRI": "b.nii"}) + "{oops\n",
            "one row that is no JSON ends all",
            id="no JSON",
        ),
    ],
)
def test_a_bad_line_of_a_manifest_costs_only_itself(tmp_path, request, rows, reason):
    cases, problems = read_manifest(write(tmp_path / "manifest.jsonl", rows))
    assert len(cases) == len(rows.splitlines()) - 1
    assert [problem.path for problem in problems] == [f"{tmp_path / 'manifest.jsonl'}, line {len(rows.splitlines())}"]


@pytest.mark.parametrize(
    "form",
    ["csv", pytest.param("jsonl")],
)
def test_manifests_are_utf8_whatever_the_machine_thinks(tmp_path, form, ascii_locale):
    row = {"case_id": "Müller", "region": "brain", "MRI": "a.nii", "CT": "b.nii"}
    text = json.dumps(row, ensure_ascii=False) if form == "jsonl" else ",".join(row) + "\n" + ",".join(row.values())
    (case,), _ = read_manifest(write(tmp_path / f"manifest.{form}", text))
    assert case.case_id == "Müller"


def test_patient_0_is_a_patient(tmp_path):
    """Patients numbered from 0: two time points of the first must not come apart."""
    rows = [{"case_id": name, "patient_id": 0, "region": "brain", "T1": "a.nii", "T2": "b.nii"} for name in "ab"]
    cases, _ = read_manifest(write(tmp_path / "manifest.jsonl", lines(*rows)))
    assert {case.patient_id for case in cases} == {"0"}


# ---------------------------------------------------------------------------------------------------------------------
# One case in memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(scans, tmp_path):
    return scans.write(tmp_path, ct="CT", mr="MRI", mask="mask", seg="seg")


def test_a_case_is_read_as_it_is(scans, folder):
    case = scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz", mask="mask.nii.gz", lesion="seg.nii.gz")
    assert case.notes == []
    assert case.spacing == pytest.approx((5, 2, 2))
    for name in ("CT", "MRI"):
        # The files' columns go to the left and their rows to the back: already as a radiologist looks at them.
        np.testing.assert_array_equal(case.images[name], scans.image(name).transpose(2, 1, 0))
        assert case.images[name].dtype == np.int16
    np.testing.assert_array_equal(case.mask, scans.body().transpose(2, 1, 0))
    np.testing.assert_array_equal(case.lesion, scans.image("seg").transpose(2, 1, 0) > 0)
    assert case.mask.dtype == case.lesion.dtype == bool
    assert case.usable.tolist() == list(range(1, 10))


def test_windows_are_those_of_the_image_processor(scans, tmp_path):
    scans.write(tmp_path, ct="CT", cbct="CBCT", mr="MRI", pet="PET")
    case = scans.load(tmp_path, CT="ct.nii.gz", CBCT="cbct.nii.gz", MRI="mr.nii.gz", PET="pet.nii.gz")
    processor = SynerMedGenImageProcessor()
    units = {"CT": "HU", "CBCT": "HU", "MRI": "a.u.", "PET": "SUV"}
    for name, unit in units.items():
        low, high = processor.intensity_window(case.images[name], name)
        assert case.windows[name] == {"modality": name, "unit": unit, "low": low, "high": high}
    record = processor.encode_intensity(case.images["MRI"][4], "MRI", (low, case.windows["MRI"]["high"]))[1]
    assert record["high"] == case.windows["MRI"]["high"]


@pytest.mark.parametrize("axis", ["axial", "coronal"])
@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR"])
def test_source_and_target_lie_alike_however_they_are_stored(scans, tmp_path, codes, axis):
    stored = {}
    for name, to in (("CT", "LPS"), ("MRI", codes)):
        array, affine = scans.image(name), scans.affine
        turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(to))
        array[5, 6, 3] = 3000  # on the patient's right, in front
        stored[name] = apply_orientation(array, turn), affine @ inv_ornt_aff(turn, array.shape)
        scans.save(tmp_path / f"{name}.mha", *stored[name])
    case = scans.load(tmp_path, axis=axis, CT="CT.mha", MRI="MRI.mha")
    assert case.notes == []
    for image in case.images.values():
        assert np.argwhere(image == 3000).tolist() == [[3, 6, 5] if axis == "axial" else [21, 6, 5]]
    assert case.spacing == pytest.approx((5, 2, 2) if axis == "axial" else (2, 5, 2))


def test_formats_may_differ_within_a_case(scans, tmp_path):
    scans.save(tmp_path / "ct.mha", scans.image("CT"))
    scans.save(tmp_path / "mr.nii", scans.image("MRI"))
    scans.save(tmp_path / "cbct.nrrd", scans.image("CBCT"))
    case = scans.load(tmp_path, CT="ct.mha", MRI="mr.nii", CBCT="cbct.nrrd")
    assert case.notes == []
    for name, image in case.images.items():
        np.testing.assert_array_equal(image, scans.image(name).transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("names", "reference"), [(("MRI", "CT"), "CT"), (("CT", "PET"), "PET"), (("T1", "T2", "FLAIR"), "T1")]
)
def test_another_grid_is_resampled_onto_the_one_that_counts_and_noted(scans, tmp_path, names, reference):
    finer = scans.affine @ np.diag([0.5, 0.5, 1, 1])
    finer[:3, 3] = scans.affine[:3, 3] + (0.5, 0.5, 0)  # the corner of the first voxel stays
    for name in names:
        array, affine = scans.image(name), scans.affine
        if name != reference:
            array, affine = array.repeat(2, 0).repeat(2, 1), finer
        scans.save(tmp_path / f"{name}.nii.gz", array, affine)
    case = scans.load(tmp_path, **{name: f"{name}.nii.gz" for name in names})
    assert case.notes == [
        f"{name} lies on another grid than {reference} and was resampled onto it" for name in names if name != reference
    ]
    for name, image in case.images.items():
        # Every voxel lies in the middle of four equal ones.
        np.testing.assert_allclose(image, scans.image(name).transpose(2, 1, 0), atol=1e-2)


def test_what_another_grid_does_not_reach_is_air(scans, tmp_path):
    scans.write(tmp_path, mr="MRI")
    scans.save(tmp_path / "pet.nii.gz", scans.image("PET"))
    scans.save(
        tmp_path / "ct.nii.gz",
        scans.image("CT")[:, :, 3:],
        scans.affine @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]],
    )
    case = scans.load(tmp_path, CT="ct.nii.gz", PET="pet.nii.gz")
    assert (case.images["CT"][:3] == -1024).all()
    # Slices that one of the two does not show are of no use.
    assert case.usable.tolist() == list(range(3, 10))


def test_scans_of_different_places_are_refused(scans, folder):
    far = scans.affine.copy()
    far[2, 3] += 40
    scans.save(folder / "mr.nii.gz", scans.image("MRI"), far)
    with pytest.raises(ValueError, match="mr.nii.gz: it shares 11% of its extent with CT; .*same place of the same"):
        scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz")


def test_another_patient_under_the_right_name_is_refused(scans, folder):
    other = np.zeros(scans.shape, np.int16)
    other[:8, :9] = 500
    scans.save(folder / "mr.nii.gz", other)
    with pytest.raises(ValueError, match="mr.nii.gz: the body shares .*% with that in CT; .*another patient"):
        scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz")


def test_ct_stored_from_0_is_put_right_and_noted(scans, folder):
    stored = scans.image("CT").astype(np.int32) + 1024
    scans.save(folder / "ct.nii.gz", stored.astype(np.uint16))
    case = scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz", mask="mask.nii.gz")
    np.testing.assert_array_equal(case.images["CT"], scans.image("CT").transpose(2, 1, 0))
    assert case.notes == [f"CT was stored from 0 to {stored.max()}; 1024 was subtracted to give Hounsfield units"]
    assert case.usable.tolist() == list(range(1, 10))


@pytest.mark.parametrize("high", [255, 1.0])
def test_ct_in_grey_levels_is_refused(scans, folder, high):
    levels = np.where(scans.body(), 0.5, 0) * high
    scans.save(folder / "ct.nii.gz", levels.astype(np.uint8 if high == 255 else np.float32))
    with pytest.raises(ValueError, match="ct.nii.gz: values from 0 to .* are no Hounsfield units"):
        scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz")


def test_ct_in_counts_of_16_bits_is_refused(scans, folder):
    counts = np.where(scans.body(), scans.image("CT").astype(np.int32) * 40 + 6000, 0)
    scans.save(folder / "ct.nii.gz", counts.astype(np.uint16))
    with pytest.raises(ValueError, match="ct.nii.gz: values from 0 to .* are no Hounsfield units"):
        scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz")


@pytest.mark.parametrize("name", ["CT", "MRI", "PET", "CBCT"])
def test_a_volume_of_one_value_is_refused(scans, tmp_path, name):
    scans.save(tmp_path / "scan.nii.gz", np.full(scans.shape, -7, np.int16))
    with pytest.raises(ValueError, match="scan.nii.gz: every voxel is -7; the volume is empty"):
        scans.load(tmp_path, **{name: "scan.nii.gz"})


@pytest.mark.parametrize(("name", "background"), [("CT", -1024), ("CBCT", -1024), ("MRI", 0), ("PET", 0)])
def test_a_few_voxels_that_are_no_numbers_become_background(scans, tmp_path, name, background):
    array = scans.image(name).astype(np.float32)
    array[10, 10, 5], array[11, 10, 5] = np.nan, np.inf
    scans.save(tmp_path / "scan.nii.gz", array)
    case = scans.load(tmp_path, **{name: "scan.nii.gz"})
    assert case.notes == [f"{name} had 2 NaN or infinite voxels, now background"]
    assert case.images[name][5, 10, 10] == case.images[name][5, 10, 11] == background
    assert np.isfinite(case.images[name]).all() and np.isfinite(case.windows[name]["high"])


@pytest.mark.parametrize("share", [0.02, 1])
def test_many_voxels_that_are_no_numbers_are_refused(scans, folder, share):
    array = scans.image("MRI").astype(np.float32)
    array.ravel()[: int(share * array.size)] = np.nan
    scans.save(folder / "mr.nii.gz", array)
    with pytest.raises(ValueError, match=f"mr.nii.gz: {share:.0%} of the voxels are NaN or infinite"):
        scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz")


def test_pet_that_is_no_suv_is_refused(scans, tmp_path):
    scans.save(tmp_path / "pet.nii.gz", scans.image("PET") * 5000)
    with pytest.raises(ValueError, match=r"pet.nii.gz: values up to .* are no SUV \(activity in Bq/ml\?\)"):
        scans.load(tmp_path, PET="pet.nii.gz")


@pytest.mark.parametrize("what", ["mask", "lesion"])
def test_labels_of_no_use_are_left_out_and_noted(scans, folder, what):
    called = {"mask": "mask", "lesion": "lesion labels"}[what]
    shifted = scans.affine.copy()
    shifted[0, 3] += 1
    scans.save(folder / "shifted.nii.gz", scans.image("mask"), shifted)
    (folder / "cut.nii.gz").write_bytes((folder / "mask.nii.gz").read_bytes()[:200])
    for name, note in (
        ("shifted.nii.gz", f"the {called} lies on another grid and was left out"),
        ("cut.nii.gz", f"the {called} was left out: {folder / 'cut.nii.gz'} cannot be read"),
        ("gone.nii.gz", f"the {called} was left out: There is no file"),
    ):
        case = scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz", **{what: name})
        assert getattr(case, what) is None
        assert len(case.notes) == 1 and case.notes[0].startswith(note)
        assert case.usable.tolist() == list(range(1, 10))


def test_a_mask_without_a_voxel_is_left_out_but_a_scan_may_be_without_lesions(scans, folder):
    scans.save(folder / "nothing.nii.gz", np.zeros(scans.shape, np.uint8))
    case = scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz", mask="nothing.nii.gz", lesion="nothing.nii.gz")
    assert case.mask is None and not case.lesion.any()
    assert case.notes == ["the mask has no voxel and was left out"]


def test_labels_of_any_number_are_one(scans, folder):
    labels = scans.image("seg").astype(np.int16) // 4 * 2221
    scans.save(folder / "gd.nii.gz", labels)
    case = scans.load(folder, CT="ct.nii.gz", MRI="mr.nii.gz", lesion="gd.nii.gz")
    np.testing.assert_array_equal(case.lesion, labels.transpose(2, 1, 0) > 0)


def test_usable_slices_show_enough_of_the_patient_in_every_modality_and_mask(scans, tmp_path):
    ct, mr, mask = scans.image("CT"), scans.image("MRI"), scans.image("mask")
    ct[:, :, 9] = -1024  # not scanned
    mr[:, :, 1] = 0  # not acquired
    mask[:, :, 8] = 0  # cut off
    mask[8:, :, 7] = 0  # a part of it
    for name, array in (("ct", ct), ("mr", mr), ("mask", mask)):
        scans.save(tmp_path / f"{name}.nii.gz", array)
    names = {"CT": "ct.nii.gz", "MRI": "mr.nii.gz"}
    assert scans.load(tmp_path, **names).usable.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert scans.load(tmp_path, **names, mask="mask.nii.gz").usable.tolist() == [2, 3, 4, 5, 6, 7]
    assert scans.load(tmp_path, **names, mask="mask.nii.gz", min_share=0.2).usable.tolist() == [2, 3, 4, 5, 6]
    assert scans.load(tmp_path, **names, min_share=0.99).usable.tolist() == []


def test_coronal_slices_are_usable_by_their_own_frame(scans, tmp_path):
    scans.write(tmp_path, pet="PET", ct="CT")
    case = scans.load(tmp_path, region="whole-body", axis="coronal", PET="pet.nii.gz", CT="ct.nii.gz")
    assert case.images["PET"].shape == case.images["CT"].shape == (28, 10, 24)
    assert 0 < case.usable.min() and case.usable.max() < 27 and len(case.usable) > 20
    # Head at the top: the empty slice of the volume is the lowest.
    assert not (case.images["PET"][14, 9] > 0).any() and (case.images["PET"][14, 0] > 0).any()


def test_a_dicom_folder_is_a_path_like_any_other(scans, tmp_path):
    scans.save_dicom(tmp_path / "ct", scans.image("CT"))
    scans.save(tmp_path / "mr.nii.gz", scans.image("MRI"))
    manifest = write(tmp_path / "manifest.csv", HEADER + "one,p1,brain,mr.nii.gz,ct,\n")
    kept, problems = keep_pairs(read_manifest(manifest)[0])
    case = load_case(kept[0])
    assert problems == case.notes == []
    np.testing.assert_array_equal(case.images["CT"], scans.image("CT").transpose(2, 1, 0))


def test_one_glioma_in_two_releases_is_one_patient():
    assert brats_patient("Brats18_CBICA_AAB_1") == brats_patient("BraTS19_CBICA_AAB_1")
    assert brats_patient("BraTS2021_00495") == brats_patient("BraTS-GLI-00495-001")
    assert brats_patient("BraTS20_Training_001") != brats_patient("BraTS2021_00001")


def test_a_manifest_beside_known_layouts_hides_neither(tmp_path):
    touch(tmp_path / "Task1" / "brain" / "1BA001", "mr.nii.gz", "ct.nii.gz", "mask.nii.gz")
    touch(tmp_path / "ours" / "p1", "t1.nii.gz", "t2.nii.gz")
    rows = "case_id,patient_id,region,T1,T2\nvisit-1,p1,brain,p1/t1.nii.gz,p1/t2.nii.gz\n"
    (tmp_path / "ours" / "manifest.csv").write_text(rows)
    cases, problems = scan(tmp_path)
    assert [case.name for case in cases] == ["own/visit-1", "synthrad2023/1BA001"] and problems == []


def test_visits_of_a_patient_without_a_name_in_the_files_stay_together(tmp_path):
    for visit in ("2019-01", "2020-07"):
        touch(tmp_path / "P1" / visit, "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz")
    cases, _ = scan(tmp_path)
    assert [(case.case_id, case.patient_id) for case in cases] == [("P1/2019-01", "P1"), ("P1/2020-07", "P1")]
