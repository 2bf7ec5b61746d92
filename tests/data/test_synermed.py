"""`load_dataset("synermed", ...)`: the same rows by every way, splits without leaks, bad cases that cost themselves."""

import functools
import io
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import IterableDataset, get_dataset_config_names, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from torch.utils.data import DataLoader

import synermedgen_hf  # noqa: F401
from synermedgen_hf.data import synermed
from synermedgen_hf.data.splits import read_report, read_splits
from synermedgen_hf.data.synermed import PAIR_FEATURES, UNDERSTANDING_FEATURES

CONFIGS = ["pairs", "understanding", "cts", "mi", "tia", "vqa", "phantom"]
SPLITS = {"split_ratios": (0.5, 0.25, 0.25)}  # few patients, and some for each
FEW = {"slice_step": 3, **SPLITS}


@pytest.fixture(scope="session")
def root(scans, tmp_path_factory):
    """A folder of several datasets: 9 cases of 7 patients."""
    root = tmp_path_factory.mktemp("several datasets")
    scans.synthrad(root / "SynthRAD2023", "1BA001", "1BA002", "1BB003", "2PA004")
    scans.brats(root / "BraTS", "BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000")
    scans.autopet(root / "FDG-PET-CT-Lesions", "0011f3deaf", "first", "second")
    return root


@pytest.fixture(scope="session")
def built(root, tmp_path_factory):
    """Each configuration built once, as nobody interrupted it."""

    @functools.cache
    def build(config):
        cache = tmp_path_factory.mktemp(config)
        options = FEW if config == "pairs" else {"per_case": 6, **SPLITS}
        return load_dataset("synermed", config, data_dir=str(root), cache_dir=str(cache), **options)

    return build


@pytest.fixture
def small(scans, tmp_path):
    """Five patients to do things to."""
    return scans.synthrad(tmp_path / "data", "1BA001", "1BA002", "1BA003", "1BA004", "1BA005")


@pytest.fixture
def load(tmp_path):
    """`load_dataset` with a cache and a report of this test alone."""

    def load(root, config="pairs", **options):
        options = {"cache_dir": str(tmp_path / "cache"), **options}
        if root is not None:
            options["data_dir"] = str(root)
        return load_dataset("synermed", config, **options)

    return load


def raw(dataset):
    """Rows with the bytes of their pictures, numbers as precise as their columns."""
    if isinstance(dataset, IterableDataset):
        return [to_column(row) for row in dataset.decode(False)]
    return dataset.with_format("arrow")[:].to_pylist()


def to_column(value):
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, dict):
        return {name: to_column(part) for name, part in value.items()}
    return [to_column(part) for part in value] if isinstance(value, list) else value


def damage(path):
    """A download that was cut off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def reads(monkeypatch):
    """Names of the cases that are read from here on."""
    names = []

    def load_case(record, *arguments):
        names.append(record.case_id)
        return synermed_load_case(record, *arguments)

    synermed_load_case = synermed.load_case
    monkeypatch.setattr(synermed, "load_case", load_case)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


def test_the_configurations_have_names_and_pairs_is_the_default(root, load, small):
    assert get_dataset_config_names("synermed") == CONFIGS
    dataset = load_dataset("synermed", data_dir=str(small), streaming=True)
    assert dataset["train"].config_name == "pairs"
    assert dataset["train"].features == PAIR_FEATURES
    assert get_dataset_split_names("synermed", data_dir=str(small)) == ["train", "validation", "test"]


def test_pairs_come_out_in_both_directions_of_every_dataset(built):
    dataset = built("pairs")
    assert set(dataset) == {"train", "validation", "test"}
    assert all(split.features == PAIR_FEATURES for split in dataset.values())
    found = defaultdict(set)
    for row in itertools.chain(*dataset.remove_columns(["source_image", "target_image", "mask", "lesion"]).values()):
        found[row["dataset"], row["region"]].add((row["source_modality"], row["target_modality"]))
    sequences = ("T1", "T1CE", "T2", "FLAIR")
    assert found == {
        ("synthrad2023", "brain"): {("MRI", "CT"), ("CT", "MRI")},
        ("synthrad2023", "pelvis"): {("CBCT", "CT"), ("CT", "CBCT")},
        ("brats", "brain"): set(itertools.permutations(sequences, 2)),
        ("autopet", "whole-body"): {("CT", "PET"), ("PET", "CT")},
    }


def test_a_row_holds_what_is_in_the_files(built, scans):
    (seed, name) = 1, "1BA002"
    rows = [row for split in built("pairs").values() for row in split if row["case_id"] == name]
    assert [row["slice_index"] for row in rows] == [1, 1, 4, 4, 7, 7]
    for row in rows:
        for side in ("source", "target"):
            volume = scans.image(row[f"{side}_modality"], seed)
            pixels = np.asarray(row[f"{side}_image"])
            assert pixels.dtype == np.float32
            np.testing.assert_array_equal(pixels, volume[:, :, row["slice_index"]].T)
        np.testing.assert_array_equal(np.asarray(row["mask"]), scans.body(seed)[:, :, row["slice_index"]].T)
        assert row["lesion"] is None and row["centre"] == "A" and row["spacing"] == [5.0, 2.0, 2.0]


@pytest.mark.parametrize("config", CONFIGS[:5])
def test_no_patient_is_on_two_sides_in_any_configuration(built, config):
    sides = defaultdict(set)
    for name in ("pairs", config):
        for split, rows in built(name).items():
            for dataset, patient in zip(rows["dataset"], rows["patient_id"], strict=True):
                sides[dataset, patient].add(split)
    assert len(sides) == 7
    assert all(len(side) == 1 for side in sides.values()), sides


def test_time_points_and_studies_stay_with_their_patient(built):
    cases = {(row["patient_id"], row["case_id"]) for split in built("tia").values() for row in split}
    assert {case for patient, case in cases if patient == "BraTS-GLI-00001"} == {
        "BraTS-GLI-00001-000",
        "BraTS-GLI-00001-001",
    }
    assert len({case for patient, case in cases if patient == "0011f3deaf"}) == 2


@pytest.mark.parametrize("config", CONFIGS[1:5])
def test_questions_are_ready_for_a_trainer(built, processor, config):
    for split in built(config).values():
        assert split.features == UNDERSTANDING_FEATURES
        for row in split.select(range(0, len(split), 5)):
            text = processor.apply_chat_template(row["messages"], tokenize=False)
            assert text.count("<|image_pad|>") == len(row["images"])
            inputs = processor(text=[text], images=row["images"], return_tensors="pt")
            assert len(inputs["image_grid_hw"]) == len(row["images"])
            user, assistant = row["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert user["content"][-1] == {"type": "text", "text": row["question"]}
            assert assistant["content"] == [{"type": "text", "text": row["answer"]}]
            assert row["answer"] in row["options"]
            assert {image.mode for image in row["images"]} == {"L"}


def test_configurations_of_one_task_ask_it_alone_and_understanding_asks_all(built):
    tasks = {config: {task for split in built(config).values() for task in split["task"]} for config in CONFIGS[1:5]}
    assert tasks == {"understanding": {"CTS", "TIA", "MI"}, "cts": {"CTS"}, "mi": {"MI"}, "tia": {"TIA"}}
    for config in CONFIGS[1:5]:
        for split in built(config).values():
            assert max(Counter(split["case_id"]).values()) <= 12  # 6 a case, and panels of a neighbour's questions


def test_only_wanted_routes_come_out(root, load):
    rows = load(root, routes=["whole-body/CT-PET", "MRI-CT"], slice_step=9, split_ratios=(1, 0, 0))["train"]
    found = set(zip(rows["dataset"], rows["source_modality"], rows["target_modality"], strict=True))
    assert found == {("autopet", "CT", "PET"), ("synthrad2023", "MRI", "CT")}


def test_questions_keep_to_the_routes_too_or_say_they_do_not(root, load):
    try:
        rows = list(load(root, "cts", routes=["CT-MRI"], streaming=True, split_ratios=(1, 0, 0))["train"])
    except ValueError as error:
        assert "routes" in str(error)
    else:
        assert {row["route"] for row in rows} == {"brain/CT-MRI"}


def test_a_route_that_nothing_is_called_by_is_an_error(small, load):
    with pytest.raises(ValueError, match="MR-CT"):
        load(small, routes=["MR-CT"], streaming=True)


def test_a_slice_step_is_a_positive_number(small, load):
    with pytest.raises(ValueError, match="slice_step"):
        list(load(small, slice_step=0, streaming=True)["train"])


def test_simulated_patients_need_no_data(load, monkeypatch):
    monkeypatch.setattr(synermed, "PROTOCOLS", {("whole-body", "autopet"): ("CT", "PET")})
    options = {"phantom_cases": 1, "phantom_slices": 2, "phantom_size": 32}
    dataset = load(None, "phantom", **options)
    assert set(dataset) == {"train", "validation", "test"}
    assert all(split.features == PAIR_FEATURES and len(split) > 0 for split in dataset.values())
    assert len({patient for split in dataset.values() for patient in split["patient_id"]}) == 3
    assert raw(load(None, "phantom", streaming=True, **options)["test"]) == raw(dataset["test"])
    row = dataset["train"][0]
    assert (row["dataset"], row["axis"], row["source_modality"]) == ("phantom-autopet", "coronal", "CT")
    assert np.asarray(row["source_image"]).min() == -1024 and np.asarray(row["mask"]).dtype == bool
    questions = load(None, "tia", streaming=True, per_case=3, **options)["train"]
    assert [row["task"] for row in questions] == ["TIA"] * 3


# ---------------------------------------------------------------------------------------------------------------------
# The same rows by every way
# ---------------------------------------------------------------------------------------------------------------------


KEY = ("case_id", "source_modality", "target_modality", "slice_index", "index")


def options_of(config):
    return FEW if config == "pairs" else {"per_case": 6, **SPLITS}


@pytest.mark.parametrize("config", ["pairs", "understanding", "cts", "mi", "tia"])
def test_a_stream_gives_the_rows_of_the_build(root, built, load, config):
    stream = load(root, config, streaming=True, **options_of(config))
    assert {split: raw(rows) for split, rows in stream.items()} == {
        split: raw(rows) for split, rows in built(config).items()
    }


def test_numbers_of_a_stream_are_those_of_the_build_to_the_last_bit(root, built, load):
    for split, rows in load(root, streaming=True, **FEW).items():
        for column in ("spacing", "source_window", "target_window"):
            assert [row[column] for row in rows.decode(False)] == built("pairs")[split][column][:]


@pytest.mark.parametrize("config", ["pairs", "understanding"])
def test_two_processes_give_the_rows_of_one(root, built, load, config):
    both = load(root, config, num_proc=2, **options_of(config))
    for split, rows in built(config).items():
        assert raw(both[split]) == raw(rows)


@pytest.mark.parametrize("config", ["pairs", "understanding"])
def test_workers_of_a_loader_share_the_cases_out(root, built, load, config):
    stream = load(root, config, streaming=True, split="train", **options_of(config)).decode(False)
    assert stream.num_shards >= 2
    loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=dict)

    def names(rows):
        return Counter(tuple(str(row.get(name)) for name in KEY) for row in rows)

    assert names(loader) == names(raw(built(config)["train"]))


@pytest.mark.parametrize("config", ["pairs", "understanding"])
def test_a_stream_goes_on_in_the_middle(root, built, load, config):
    expected = raw(built(config)["train"])
    for stop in (1, 7, len(expected) - 1):
        stream = load(root, config, streaming=True, split="train", **options_of(config)).decode(False)
        for _ in itertools.islice(stream, stop):
            pass
        state = json.loads(json.dumps(stream.state_dict()))  # as a checkpoint keeps it
        again = load(root, config, streaming=True, split="train", **options_of(config)).decode(False)
        again.load_state_dict(state)
        assert [to_column(row) for row in again] == expected[stop:]
        assert raw(stream.skip(stop)) == expected[stop:]


def test_what_was_interrupted_is_built_as_if_it_had_not_been(root, built, load, monkeypatch):
    load_case, calls = synermed.load_case, itertools.count()

    def interrupted(record, *arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return load_case(record, *arguments)

    monkeypatch.setattr(synermed, "load_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root, **FEW)
    monkeypatch.setattr(synermed, "load_case", load_case)
    for split, rows in load(root, **FEW).items():
        assert raw(rows) == raw(built("pairs")[split])


def test_rows_do_not_depend_on_where_the_data_lies(root, built, load, tmp_path):
    shutil.copytree(root, tmp_path / "elsewhere" / "deep")
    moved = load(tmp_path / "elsewhere", streaming=True, **FEW)
    assert {split: raw(rows) for split, rows in moved.items()} == {
        split: raw(rows) for split, rows in built("pairs").items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dataset_that_was_built_is_not_read_again(small, load, reads):
    first = load(small)
    assert len(reads) == 5
    again = load(small)
    assert len(reads) == 5
    assert {split: rows._fingerprint for split, rows in again.items()} == {
        split: rows._fingerprint for split, rows in first.items()
    }


@pytest.mark.parametrize("change", ["a file", "a mask", "another case", "one case less", "an option"])
def test_a_change_of_files_or_options_builds_anew(small, scans, load, reads, change):
    load(small)
    reads.clear()
    folder, options = small / "Task1" / "brain", {}
    if change == "a file":
        scans.save(folder / "1BA003" / "mr.nii.gz", scans.image("MRI", 2) + np.int16(1))
    elif change == "a mask":
        os.utime(folder / "1BA003" / "mask.nii.gz", ns=(1, 1))
    elif change == "another case":
        scans.write(folder / "1BA006", 6, ct="CT", mr="MRI")
    elif change == "one case less":
        shutil.rmtree(folder / "1BA005")
    else:
        options = {"min_share": 0.1}
    load(small, **options)
    assert len(reads) == {"another case": 6, "one case less": 4}.get(change, 5)


def test_a_change_inside_a_dicom_folder_builds_anew(scans, load, reads, tmp_path):
    folder = scans.write(tmp_path / "data", mr="MRI")
    scans.save_dicom(folder / "ct", scans.image("CT"))
    (folder / "manifest.csv").write_text("case_id,region,MRI,CT\none,brain,mr.nii.gz,ct\n")
    load(folder)
    scans.save_dicom(folder / "ct", np.maximum(scans.image("CT"), -900))
    load(folder)
    assert len(reads) == 2


def test_another_split_file_of_the_same_name_builds_anew(small, load, tmp_path):
    file = tmp_path / "splits.json"
    for seed in range(4):
        load(small, streaming=True, split_seed=seed, report_dir=str(tmp_path / "drawn"), **SPLITS)
        shutil.copy(tmp_path / "drawn" / "splits.json", file)
        drawn = json.loads(file.read_text())["splits"]
        assert {f"synthrad2023/{patient}" for patient in patients(load(small, split_file=str(file)))["train"]} == set(
            drawn["train"]["patients"]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Without data, and beside other builders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["pairs", "understanding"])
@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_folder_it_says_what_to_pass_and_reads_no_other(small, load, reads, monkeypatch, config, streaming):
    monkeypatch.chdir(small)
    with pytest.raises(ValueError, match=r'pass data_dir="/path/to/SynthRAD2023" .*"manifest.csv" .*"phantom"\) needs'):
        load(None, config, streaming=streaming)
    assert reads == []


def test_a_folder_without_scans_says_so(load, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"There is no pair of scans below .*nothing \(the folder is empty\)"):
        load(tmp_path / "nothing")
    (tmp_path / "nothing" / "a.nii.gz").touch()
    with pytest.raises(
        ValueError, match="There is no pair of scans below .*nothing: 1 volumes that belong to no known"
    ):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        load(tmp_path / "nowhere")


def test_a_manifest_without_rows_says_so(load, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "manifest.csv").write_text("case_id,region,CT,MRI\n")
    with pytest.raises(ValueError, match="manifest.csv"):
        load(tmp_path / "own")


def test_a_folder_may_be_a_path(small, tmp_path):
    dataset = load_dataset("synermed", data_dir=small, cache_dir=str(tmp_path / "cache"), streaming=True)
    assert next(iter(dataset["train"]))["dataset"] == "synthrad2023"


def test_a_path_without_scans_says_so(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="There is no pair of scans"):
        load_dataset("synermed", data_dir=tmp_path / "nothing", cache_dir=str(tmp_path / "cache"))


def test_a_local_folder_of_the_same_name_does_not_matter(small, load, monkeypatch, tmp_path):
    (tmp_path / "work" / "synermed").mkdir(parents=True)
    (tmp_path / "work" / "synermed" / "data.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path / "work")
    assert load(small, streaming=True)["train"].features == PAIR_FEATURES


def test_other_builders_work_as_ever(tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("a,b\n1,2\n")
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert load_dataset("csv", data_files=str(tmp_path / "data" / "train.csv"), **cache)["train"][0] == {"a": 1, "b": 2}
    assert load_dataset("csv", data_dir=str(tmp_path / "data"), **cache)["train"][0] == {"a": 1, "b": 2}
    assert load_dataset("json", data_files=str(tmp_path / "lines.json"), **cache)["train"]["a"][:] == [1, 2]
    assert load_dataset(str(tmp_path / "data"), **cache)["train"][0] == {"a": 1, "b": 2}


@pytest.mark.parametrize("first", ["import datasets\nimport synermedgen_hf", "import synermedgen_hf\nimport datasets"])
def test_the_order_of_imports_does_not_matter(small, tmp_path, first):
    script = f"""{first}
print(datasets.get_dataset_config_names("synermed"))
stream = datasets.load_dataset("synermed", data_dir={str(small)!r}, streaming=True)
print(next(iter(stream["train"]))["dataset"])
(open("a.csv", "w")).write("a,b\\n1,2\\n")
print(datasets.load_dataset("csv", data_files="a.csv")["train"][0])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(CONFIGS), "synthrad2023", "{'a': 1, 'b': 2}"]


# ---------------------------------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(scans, tmp_path):
    """Own data: two patients, and a table under a name of its own."""
    folder = tmp_path / "own"
    for seed in range(2):
        scans.write(folder / "scans" / f"p{seed}", seed, ct="CT", mr="MRI")
    rows = [f"p{seed},brain,scans/p{seed}/mr.nii.gz,scans/p{seed}/ct.nii.gz\n" for seed in range(2)]
    (folder / "cases.csv").write_text("case_id,region,MRI,CT\n" + "".join(rows))
    (folder / "first.csv").write_text("case_id,region,MRI,CT\n" + rows[0])
    (folder / "second.csv").write_text("case_id,region,MRI,CT\n" + rows[1])
    return folder


def test_a_manifest_of_any_name_is_passed_as_a_file(own, load):
    dataset = load(None, data_files=str(own / "cases.csv"))
    assert {row["case_id"] for split in dataset.values() for row in split} == {"p0", "p1"}
    assert {row["dataset"] for split in dataset.values() for row in split} == {"own"}
    stream = load(None, "tia", data_files=[str(own / "cases.csv")], streaming=True)
    assert {row["task"] for row in stream["train"]} == {"TIA"}


def test_a_manifest_may_be_named_within_a_folder(own, load):
    assert len(load(own, data_files="first.csv")["train"]) > 0


def test_manifests_named_after_splits_are_these_splits_or_refused(own, load):
    try:
        files = {"train": str(own / "first.csv"), "test": str(own / "second.csv")}
        dataset = load(None, data_files=files)
    except ValueError as error:
        assert "split" in str(error)
    else:
        assert {split: set(rows["case_id"]) for split, rows in dataset.items()} == {"train": {"p0"}, "test": {"p1"}}


# ---------------------------------------------------------------------------------------------------------------------
# Bad cases, and the report
# ---------------------------------------------------------------------------------------------------------------------


def skipped(report):
    """The one thing that was skipped."""
    (problem,) = [problem for problem in read_report(report) if problem.kind == "skipped"]
    return problem


def test_a_bad_case_costs_itself_only(small, load, tmp_path, caplog):
    good = load(small, **SPLITS)
    damage(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz")
    reports = str(tmp_path / "report")
    with caplog.at_level(logging.WARNING):
        bad = load(small, report_dir=reports, **SPLITS)
    for split in good:
        rest = [row for row in raw(good[split]) if row["case_id"] != "1BA003"]
        assert (raw(bad[split]) if split in bad else []) == rest
    problem = skipped(f"{reports}/report.jsonl")
    assert (problem.kind, problem.case) == ("skipped", "synthrad2023/1BA003")
    assert problem.path == str(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz")
    assert "damaged or not complete" in problem.reason
    assert f"1 skipped; reasons in {reports}/report.jsonl" in caplog.text


def test_the_report_names_the_file_that_is_bad(small, load, tmp_path):
    path = small / "Task1" / "brain" / "1BA003" / "mr.nii.gz"
    damage(path)
    load(small, report_dir=str(tmp_path / "report"))
    (problem,) = read_report(tmp_path / "report" / "report.jsonl")
    assert problem.path == str(path)


def test_questions_lose_those_of_a_bad_case_only(small, load, tmp_path):
    good = load(small, "tia", split_ratios=(1, 0, 0), per_case=4)["train"]
    damage(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz")
    bad = load(small, "tia", split_ratios=(1, 0, 0), per_case=4, report_dir=str(tmp_path / "report"))["train"]
    assert raw(bad) == [row for row in raw(good) if row["case_id"] != "1BA003"]
    assert {problem.case for problem in read_report(tmp_path / "report" / "report.jsonl")} == {"synthrad2023/1BA003"}


def test_a_bad_case_is_one_problem_whatever_is_asked_of_it(small, load, tmp_path):
    damage(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz")
    load(small, "understanding", report_dir=str(tmp_path / "report"))
    (problem,) = read_report(tmp_path / "report" / "report.jsonl")
    assert Path(problem.path).exists()


def test_a_split_whose_cases_are_all_bad_does_not_end_the_build(small, load):
    (patient,) = load(small, **SPLITS)["test"].unique("patient_id")
    damage(small / "Task1" / "brain" / patient / "ct.nii.gz")
    dataset = load(small, **SPLITS)
    assert len(dataset["train"]) > 0 and len(dataset["validation"]) > 0


@pytest.mark.parametrize("config", ["pairs", "understanding"])
def test_each_problem_is_said_once_however_often_a_stream_is_read(small, load, tmp_path, config):
    damage(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz")
    shutil.copy(small / "Task1" / "brain" / "1BA001" / "ct.nii.gz", small / "stray.nii.gz")
    stream = load(small, config, streaming=True, report_dir=str(tmp_path / "report"))
    said = []
    for _ in range(2):
        assert sum(1 for rows in stream.values() for _ in rows)
        said.append(read_report(tmp_path / "report" / "report.jsonl"))
    assert said[0] == said[1]
    assert {problem.case for problem in said[0]} == {"", "synthrad2023/1BA003"}
    assert sum("damaged" in problem.reason for problem in said[0]) == 1


def test_opening_a_stream_leaves_the_report_of_the_build(small, load, tmp_path):
    damage(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz")
    load(small)
    (report,) = (tmp_path / "cache" / "synermed-reports").glob("*/report.jsonl")
    assert len(read_report(report)) == 1
    load(small, streaming=True)
    assert len(read_report(report)) == 1


def test_a_reader_that_is_not_installed_is_not_a_bad_case(scans, load, monkeypatch, tmp_path):
    for name, what in (("ct", "CT"), ("mr", "MRI")):
        scans.save(tmp_path / "data" / "1ABA001" / f"{name}.mha", scans.image(what))
    stream = load(tmp_path / "data", streaming=True)["train"]
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r"pip install 'synermedgen-hf\[dicom\]'"):
        next(iter(stream))


def test_what_was_repaired_is_reported_and_not_skipped(small, scans, load, tmp_path):
    stored = scans.image("CT", 2).astype(np.int32) + 1024
    scans.save(small / "Task1" / "brain" / "1BA003" / "ct.nii.gz", stored.astype(np.uint16))
    dataset = load(small, report_dir=str(tmp_path / "report"), strict=True)
    (problem,) = read_report(tmp_path / "report" / "report.jsonl")
    assert (problem.kind, problem.case) == ("repaired", "synthrad2023/1BA003")
    assert "1024 was subtracted" in problem.reason
    assert "1BA003" in {row["case_id"] for split in dataset.values() for row in split}


def test_what_is_skipped_by_name_is_in_the_report_too(small, scans, load, tmp_path):
    scans.write(small / "Task1" / "brain" / "1BA009", mr="MRI")
    scans.write(small / "other", stray="CT")
    load(small, streaming=True, report_dir=str(tmp_path / "report"))
    reasons = {problem.case: problem.reason for problem in read_report(tmp_path / "report" / "report.jsonl")}
    assert reasons["synthrad2023/1BA009"] == "missing modality: there is only MRI, no pair"
    assert reasons[""].startswith("1 volumes that belong to no known layout")


def test_two_processes_report_what_one_does(small, load, tmp_path):
    for name in ("1BA002", "1BA004"):
        damage(small / "Task1" / "brain" / name / "ct.nii.gz")
    said = []
    for num_proc in (None, 2):
        report = tmp_path / f"report-{num_proc}"
        load(small, "understanding", num_proc=num_proc, report_dir=str(report), split_ratios=(1, 0, 0))
        said.append(set(read_report(report / "report.jsonl")))
    assert said[0] == said[1]
    assert {problem.case for problem in said[0]} == {"synthrad2023/1BA002", "synthrad2023/1BA004"}


def test_questions_that_a_case_cannot_serve_are_counted_with_a_reason(scans, load, tmp_path):
    scans.write(tmp_path / "data" / "1BA001", shape=(24, 28, 3), ct="CT", mr="MRI")  # two slices that show anything
    stream = load(tmp_path / "data", "cts", streaming=True, per_case=8, report_dir=str(tmp_path / "report"))
    assert list(stream["train"]) == []
    problem = skipped(tmp_path / "report" / "report.jsonl")
    assert problem.case == "synthrad2023/1BA001"
    assert problem.reason.startswith("8 questions: CTS: fewer than 4 slices")


def test_strict_raises_for_what_is_skipped(small, scans, load):
    path = small / "Task1" / "brain" / "1BA003" / "mr.nii.gz"
    damage(path)
    with pytest.raises(ValueError, match=f"synthrad2023/1BA003: {path}: cannot be read"):
        list(load(small, streaming=True, strict=True, split_ratios=(1, 0, 0))["train"])
    with pytest.raises(DatasetGenerationError) as error:
        load(small, strict=True)
    assert "1BA003" in str(error.value.__cause__)
    scans.write(small / "other", stray="CT")
    with pytest.raises(ValueError, match="1 volumes that belong to no known layout"):
        load(small, streaming=True, strict=True)


def test_no_slice_with_enough_of_the_patient_is_a_reason(small, load, tmp_path):
    report = tmp_path / "report"
    stream = load(small, streaming=True, min_share=0.9, report_dir=str(report), split_ratios=(1, 0, 0))
    assert list(stream["train"]) == []
    problems = read_report(report / "report.jsonl")
    assert {problem.reason for problem in problems} == {"no slice shows the patient on at least 90% of the frame"}
    assert len(problems) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def patients(dataset):
    return {split: set(rows["patient_id"]) for split, rows in dataset.items()}


def test_splits_are_written_and_can_be_used_again(small, load, tmp_path):
    first = load(small, split_seed=7, report_dir=str(tmp_path / "first"), **SPLITS)
    file = tmp_path / "first" / "splits.json"
    written = json.loads(file.read_text())
    assert written["seed"] == 7
    assert {split: set(entry["patients"]) for split, entry in written["splits"].items()} == {
        split: {f"synthrad2023/{patient}" for patient in those} for split, those in patients(first).items()
    }
    again = load(small, split_file=str(file))
    assert patients(again) == patients(first)
    assert patients(load(small, split_seed=8, **SPLITS)) != patients(first)


def test_a_split_file_that_does_not_fit_is_refused(small, scans, load, tmp_path):
    load(small, streaming=True, report_dir=str(tmp_path / "first"))
    file = tmp_path / "first" / "splits.json"
    scans.write(small / "Task1" / "brain" / "1BA006", ct="CT", mr="MRI")
    load(small, split_file=str(file), streaming=True, report_dir=str(tmp_path / "second"))
    first, second = (read_splits(tmp_path / name / "splits.json") for name in ("first", "second"))
    assert second.keys() - first.keys() == {"synthrad2023/1BA006"}  # a new patient is split anew, and moves nobody
    assert all(second[patient] == split for patient, split in first.items())
    file.write_text(file.read_text().replace("1BA001", "1BA006"))
    with pytest.raises(ValueError, match="the file was changed"):
        load(small, split_file=str(file), streaming=True)


# ---------------------------------------------------------------------------------------------------------------------
# Published, and back
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back_with_the_same_features_and_pixels(hub, built, tmp_path):
    pairs, questions = built("pairs"), built("understanding")
    pairs.push_to_hub("lab/synermed-test", "pairs")
    questions.push_to_hub("lab/synermed-test", "understanding")
    files = set(hub.files("lab/synermed-test", "dataset"))
    assert {"pairs/train-00000-of-00001.parquet", "understanding/test-00000-of-00001.parquet"} < files
    for config, dataset in (("pairs", pairs), ("understanding", questions)):
        back = load_dataset("lab/synermed-test", config, cache_dir=str(tmp_path))
        for split, rows in dataset.items():
            assert back[split].features == rows.features
            assert pictures_aside(raw(back[split])) == pictures_aside(raw(rows))
            for one, other in zip(back[split], rows.select(range(5)), strict=False):
                for name, value in one.items():
                    if isinstance(value, Image.Image):
                        assert value.mode == other[name].mode
                        np.testing.assert_array_equal(np.asarray(value), np.asarray(other[name]))
    stream = load_dataset("lab/synermed-test", "pairs", split="train", streaming=True)
    row = next(iter(stream))
    assert row["source_image"].mode == "F" and row["mask"] is None or row["mask"].mode == "1"


def pictures_aside(rows):
    """The bytes of pictures alone: paths, which are made up on the way, do not count."""

    def strip(value):
        if isinstance(value, dict) and set(value) == {"bytes", "path"}:
            return value["bytes"]
        return [strip(part) for part in value] if isinstance(value, list) else value

    return [{name: strip(value) for name, value in row.items()} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The released files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    root = tmp_path / "SynerMed"
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    picture = buffer.getvalue()
    images = [[picture, picture]] * 10
    texts = [[["Generate CT from MRI.", "Turn MRI into CT."]]] * 10
    schema = pa.schema({"image_list": pa.list_(pa.binary()), "instruction_list": pa.list_(pa.list_(pa.string()))})
    (root / "slice" / "t1").mkdir(parents=True)
    table = pa.table({"image_list": images, "instruction_list": texts}, schema=schema)
    pyarrow.parquet.write_table(table, root / "SynerMed.parquet", row_group_size=4)
    with (root / "SynerMed.jsonl").open("w") as lines:
        for number in range(40):
            name = f"t1/case{number}_s001.png"
            (root / "slice" / name).write_bytes(picture)
            turns = [{"from": "human", "value": "<image>" * 5}, {"from": "gpt", "value": "B"}]
            lines.write(json.dumps({"image": [name] * 5, "conversations": turns}) + "\n")
    return root


@pytest.mark.parametrize(("config", "rows"), [("pairs", 10), ("cts", 40), ("understanding", 40)])
def test_the_released_files_come_out_in_the_same_columns(released, load, monkeypatch, config, rows):
    monkeypatch.setattr("synermedgen_hf.data.released.RANGE_BYTES", 1000)
    features = PAIR_FEATURES if config == "pairs" else UNDERSTANDING_FEATURES
    dataset = load(released, config)
    assert all(split.features == features for split in dataset.values())
    assert sum(map(len, dataset.values())) == rows
    stream = load(released, config, streaming=True)
    both = load(released, config, num_proc=2, cache_dir=str(released / "cache"))
    for split, built in dataset.items():
        assert raw(stream[split]) == raw(both[split]) == raw(built)
    assert stream["train"].num_shards > 1


def test_one_released_file_can_be_named(released, load):
    assert len(load(None, data_files=str(released / "SynerMed.parquet"))["train"]) == 10
    with pytest.raises(ValueError, match="'cts' reads SynerMed.jsonl, and there is only"):
        load(None, "cts", data_files=str(released / "SynerMed.parquet"))


def test_a_released_row_that_is_skipped_is_reported(released, load, tmp_path):
    with (released / "SynerMed.jsonl").open("a") as lines:
        lines.write("{oops\n")
    dataset = load(released, "cts", report_dir=str(tmp_path / "report"))
    assert sum(map(len, dataset.values())) == 40
    (problem,) = read_report(tmp_path / "report" / "report.jsonl")
    assert problem.kind == "skipped" and ", byte " in problem.path


def test_strict_names_the_released_row(released, load):
    with (released / "SynerMed.jsonl").open("a") as lines:
        lines.write("{oops\n")
    with pytest.raises(ValueError, match="SynerMed.jsonl, byte "):
        list(load(released, "cts", streaming=True, strict=True)["train"])


def test_scans_beside_released_files_are_read_or_said_not_to_be(released, scans, load, tmp_path):
    scans.synthrad(released, "1BA001")
    stream = load(released, streaming=True, report_dir=str(tmp_path / "report"))
    found = {row["dataset"] for row in stream["train"]}
    assert "synthrad2023" in found or read_report(tmp_path / "report" / "report.jsonl")


def test_released_files_are_found_in_a_folder_of_several(released, load):
    assert len(load(released.parent)["train"]) == 10


# ---------------------------------------------------------------------------------------------------------------------
# Simulated datasets in every layout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("synthrad2023-task1", {"MRI-CT", "CT-MRI"}),
        ("synthrad2023-task2", {"CBCT-CT", "CT-CBCT"}),
        ("synthrad2025-task1", {"MRI-CT", "CT-MRI"}),
        ("synthrad2025-task2", {"CBCT-CT", "CT-CBCT"}),
        ("brats2018", 12),
        ("brats2019", 12),
        ("brats2020", 12),
        ("brats2021", 12),
        ("brats2023", 12),
        ("autopet", {"CT-PET", "PET-CT"}),
        pytest.param("autopet-nnunet", {"CT-PET", "PET-CT"}),
        pytest.param("myops2020", 6),
        ("manifest", {"MRI-CT", "CT-MRI", "CBCT-CT", "CT-CBCT"}),
    ],
)
def test_every_layout_that_is_written_is_read_without_a_complaint(tmp_path, load, layout, expected):
    from synermedgen_hf.data.layouts import write_layout

    write_layout(layout, tmp_path / "data", subjects=2, size=32, num_slices=6)
    stream = load(tmp_path / "data", streaming=True, report_dir=str(tmp_path / "report"), slice_step=3)
    rows = [row for split in stream.values() for row in split]
    routes = {f"{row['source_modality']}-{row['target_modality']}" for row in rows}
    assert routes == expected if isinstance(expected, set) else len(routes) == expected
    assert read_report(tmp_path / "report" / "report.jsonl") == []
    assert len({row["patient_id"] for row in rows}) == 2
    for row in rows:
        source, target = np.asarray(row["source_image"]), np.asarray(row["target_image"])
        assert source.shape == target.shape and source.dtype == target.dtype == np.float32
        assert row["mask"] is None or np.asarray(row["mask"]).shape == source.shape


def test_the_released_layout_that_is_written_is_read(tmp_path, load):
    from synermedgen_hf.data.layouts import write_layout

    write_layout("synermed", tmp_path / "data", subjects=2, size=32)
    report = tmp_path / "report"
    pairs = load(tmp_path / "data", streaming=True, report_dir=str(report))["train"]
    assert {(row["source_modality"], row["target_modality"]) for row in pairs} >= {("T1", "T2"), ("MRI", "CT")}
    stream = load(tmp_path / "data", "understanding", streaming=True, report_dir=str(report))
    questions = [row for split in stream.values() for row in split]
    assert {row["task"] for row in questions} >= {"CTS", "TIA", "MI"}
    assert len(questions) == len((tmp_path / "data" / "SynerMed.jsonl").read_text().splitlines())
    assert {problem.kind for problem in read_report(report / "report.jsonl")} == {"repaired"}


def test_nothing_of_a_build_lands_beside_the_data(root, built):
    built("pairs")
    suffixes = {"".join(path.suffixes) for path in Path(root).rglob("*") if path.is_file()}
    assert suffixes == {".nii.gz"}
    assert datasets.config.HF_DATASETS_CACHE is not None


def test_simulated_patients_can_be_counted_by_split_and_tasks_chosen_by_their_mix():
    options = {"phantom_cases": [1, 0, 1], "phantom_slices": 8, "phantom_size": 32, "per_case": 8, "neighbours": 8}
    built = load_dataset("synermed", "understanding", mix={"MI": 0.5, "VQA": 0.5}, streaming=True, **options)
    assert set(built) == {"train", "test"}
    assert {row["task"] for row in built["test"]} == {"MI", "VQA"}
    with pytest.raises(ValueError, match="one number, or one for each of train, validation, test"):
        load_dataset("synermed", "phantom", phantom_cases=[1, 2])


def test_the_control_asks_ordinary_questions():
    options = {"phantom_cases": [1, 0, 0], "phantom_slices": 8, "phantom_size": 32, "per_case": 8}
    rows = list(load_dataset("synermed", "vqa", split="train", streaming=True, **options))
    assert rows and {row["task"] for row in rows} == {"VQA"}
    assert {"region", "plane"} <= {row["route"].split("/")[1] for row in rows}
    assert all(row["answer"] in row["options"] for row in rows)
