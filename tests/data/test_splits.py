"""One patient, one split, whatever else changes; and the two files that say what was done."""

import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from synermedgen_hf.data.sources import CaseRecord, Problem
from synermedgen_hf.data.splits import (
    SPLITS,
    add_problem,
    hash_unit,
    read_report,
    read_splits,
    split_patients,
    write_splits,
)

RATIOS = (0.8, 0.1, 0.1)


def case(patient, number=0, dataset="synthrad2023", region="brain", centre="A"):
    return CaseRecord(dataset, f"{patient}-{number}", patient, region, "axial", {}, centre=centre)


def hospitals(sizes, dataset="synthrad2023", region="brain"):
    """One case for each patient of several centres."""
    return [
        case(f"{centre}{number:03d}", dataset=dataset, region=region, centre=centre)
        for centre, size in sizes.items()
        for number in range(size)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Who goes where
# ---------------------------------------------------------------------------------------------------------------------


def test_all_cases_of_a_patient_go_together():
    """Time points of BraTS, studies of AutoPET, and what is filed under several regions or centres."""
    cases = [
        case(f"p{number}", visit, dataset, region, centre)
        for number in range(40)
        for visit, (region, centre) in enumerate([("brain", "A"), ("brain", "B"), ("pelvis", "A")])
        for dataset in ("brats", "autopet")
    ]
    assigned = split_patients(cases, RATIOS, seed=0)
    assert set(assigned) == {f"{one.dataset}/{one.patient_id}" for one in cases}
    sides = defaultdict(set)
    for one in cases:
        sides[one.dataset, one.patient_id].add(assigned[f"{one.dataset}/{one.patient_id}"])
    assert all(len(side) == 1 for side in sides.values())
    assert len(assigned) == 80  # a patient is one once, however many cases there are


def test_patients_of_different_datasets_with_one_name_are_different_patients():
    assigned = split_patients([case("001", dataset="one"), case("001", dataset="other")], RATIOS, seed=0)
    assert set(assigned) == {"one/001", "other/001"}


def test_a_split_depends_on_patients_ratios_and_seed_alone():
    cases = hospitals({"A": 30, "B": 7})
    assigned = split_patients(cases, RATIOS, seed=0)
    assert split_patients(cases[::-1], RATIOS, seed=0) == assigned
    twice = [*cases, *(case(one.patient_id, 1, centre=one.centre) for one in cases)]
    assert split_patients(twice, RATIOS, seed=0) == assigned
    assert split_patients(cases, RATIOS, seed=1) != assigned
    assert Counter(split_patients(cases, RATIOS, seed=1).values()) == Counter(assigned.values())


def test_the_draw_is_the_same_on_every_machine_and_in_every_release():
    """Published splits rest on it."""
    assigned = split_patients(hospitals({"A": 12}), RATIOS, seed=0)
    assert {name: split for name, split in assigned.items() if split != "train"} == {
        "synthrad2023/A003": "validation",
        "synthrad2023/A009": "test",
    }
    assert hash_unit("a", 1) == hash_unit("a/1") == pytest.approx(0.4656097097)


@pytest.mark.parametrize("ratios", [(0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (0.5, 0.3, 0.2), (0.9, 0.0, 0.1)])
@pytest.mark.parametrize("sizes", [{"A": 60, "B": 60, "C": 60}, {"A": 61, "B": 7, "C": 1, "D": 2, "E": 33}])
def test_shares_are_right_within_one_patient_in_every_centre(sizes, ratios):
    cases = hospitals(sizes)
    for seed in range(5):
        assigned = split_patients(cases, ratios, seed)
        for centre, size in sizes.items():
            here = Counter(assigned[f"synthrad2023/{one.patient_id}"] for one in cases if one.centre == centre)
            assert all(abs(here[split] - ratio * size) <= 1 for split, ratio in zip(SPLITS, ratios, strict=True))


def test_centres_of_one_patient_each_do_not_all_go_to_training():
    cases = [case(f"p{number}", centre=f"centre {number}") for number in range(400)]
    counts = Counter(split_patients(cases, RATIOS, seed=0).values())
    assert 290 < counts["train"] < 350 and counts["validation"] > 20 and counts["test"] > 20


def test_other_centres_and_data_sets_move_nobody():
    alone = split_patients(hospitals({"A": 60}), RATIOS, seed=0)
    among = split_patients(hospitals({"A": 60, "B": 35}), RATIOS, seed=0)
    assert all(among[patient] == split for patient, split in alone.items())


def test_a_case_that_is_gone_moves_those_at_the_edges_at_most():
    cases = hospitals({"A": 60})
    before, after = (split_patients(some, RATIOS, seed=0) for some in (cases, cases[1:]))
    assert sum(before[patient] != split for patient, split in after.items()) <= 2


def test_all_patients_may_go_to_one_split():
    assigned = split_patients(hospitals({"A": 5}), (0, 0, 1), seed=0)
    assert set(assigned.values()) == {"test"}


@pytest.mark.parametrize("ratios", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (0.5, 0.2, 0.2, 0.1)])
def test_ratios_are_three_shares(ratios):
    with pytest.raises(ValueError, match="split_ratios must be three numbers of at least 0 that add up to 1, got"):
        split_patients(hospitals({"A": 5}), ratios, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# splits.json
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cases():
    return hospitals({"A": 20, "B": 10})


@pytest.fixture
def file(cases, tmp_path):
    path = tmp_path / "deep" / "splits.json"
    write_splits(path, split_patients(cases, RATIOS, seed=3), RATIOS, 3)
    return path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content["splits"])
    path.write_text(json.dumps(content))


def test_splits_come_back_from_their_file(cases, file):
    assert read_splits(file) == split_patients(cases, RATIOS, seed=3)
    assert [path.name for path in file.parent.iterdir()] == ["splits.json"]  # nothing unfinished stays


def test_the_file_says_how_it_was_drawn(file):
    content = json.loads(file.read_text())
    assert (content["seed"], content["ratios"]) == (3, [0.8, 0.1, 0.1])
    assert {name: entry["count"] for name, entry in content["splits"].items()} == {
        "train": 24,
        "validation": 3,
        "test": 3,
    }
    assert all(len(entry["sha256"]) == 64 for entry in content["splits"].values())


def test_patients_that_are_no_longer_there_do_no_harm(cases, file):
    assert len(read_splits(file)) == 30


def test_a_file_that_was_changed_is_refused(cases, file):
    edit(file, lambda splits: splits["train"]["patients"].append(splits["test"]["patients"].pop()))
    with pytest.raises(ValueError, match="splits.json: the checksum of train does not fit .*the file was changed"):
        read_splits(file)


def test_a_patient_on_two_sides_is_refused(cases, file):
    edit(file, lambda splits: splits.__setitem__("test", splits["train"]))
    with pytest.raises(ValueError, match="splits.json: synthrad2023/.* is in train and in test"):
        read_splits(file)


def test_a_split_of_another_name_is_refused(cases, file):
    edit(file, lambda splits: splits.__setitem__("holdout", splits.pop("test")))
    with pytest.raises(ValueError, match="splits.json.*holdout"):
        read_splits(file)


@pytest.mark.parametrize("content", ['{"train": ["p1"]}', "[]", "train: p1"])
def test_a_file_of_another_kind_is_refused_by_name(cases, tmp_path, content):
    (tmp_path / "folds.json").write_text(content)
    with pytest.raises(ValueError, match="folds.json"):
        read_splits(tmp_path / "folds.json")


# ---------------------------------------------------------------------------------------------------------------------
# report.jsonl
# ---------------------------------------------------------------------------------------------------------------------


def test_a_report_reads_back_whatever_the_machine_thinks(tmp_path, ascii_locale):
    report, problem = str(tmp_path / "report.jsonl"), Problem("skipped", "own/Müller", "", "damaged")
    add_problem(report, problem)
    assert read_report(report) == [problem]


def test_a_problem_is_one_line_and_comes_back_once(tmp_path):
    report = str(tmp_path / "report.jsonl")
    assert read_report(report) == []
    first = Problem("skipped", "own/übung", "/data/a.nii.gz", "damaged: «cut»\nat byte 7")
    second = Problem("repaired", "own/two", "/data/b.nii.gz", "resampled")
    for problem in (first, second, first):
        add_problem(report, problem)
    assert read_report(report) == [first, second]
    written = (tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["case"] for line in written] == ["own/übung", "own/two", "own/übung"]


def test_lines_of_several_writers_do_not_mix(tmp_path):
    report = str(tmp_path / "report.jsonl")
    problems = [Problem("skipped", f"own/{number}", "/data", "x" * 2000) for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda problem: add_problem(report, problem), problems))
    assert sorted(problem.case for problem in read_report(report)) == sorted(problem.case for problem in problems)
