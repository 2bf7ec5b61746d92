"""Folders of many scans: what counts as a case, where results go, and what a run does when some of it fails."""

import errno
import json
import resource
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from synermedgen_hf.volumes.folders import (
    Case,
    check_writable,
    describe_error,
    find_cases,
    fingerprint,
    plan_outputs,
    request,
    run_jobs,
    share_of,
    sort_out,
    write_cases,
)


def write_scan(path, value=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(np.full((4, 4, 4), value, np.int16), np.eye(4)).to_filename(path)
    return path


def write_dicom(folder, count=2, ending=".dcm"):
    """Files that begin as DICOM does; nothing here reads further."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"IM{number}{ending}").write_bytes(bytes(128) + b"DICM" + bytes([number]))
    return folder


def names(cases):
    return [case.name for case in cases]


def sidecar(output):
    return output.with_name(output.name + ".json")


def finish(job, settings):
    """Leaves what a finished job leaves."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text("result")
    sidecar(job.output).write_text(json.dumps({"request": request(job, settings)}))


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_is_one_case(tmp_path):
    (case,) = find_cases(write_scan(tmp_path / "p1.nii.gz"))
    assert (case.number, case.name, case.is_dicom) == (1, "p1", False)
    assert case.label == str(tmp_path / "p1.nii.gz")  # as the user named it


def test_a_folder_of_dicom_files_is_one_case(tmp_path):
    (case,) = find_cases(write_dicom(tmp_path / "series"))
    assert (case.name, case.is_dicom, case.label) == ("series", True, str(tmp_path / "series"))


def test_all_volumes_below_a_folder_are_cases_in_the_order_of_their_paths(tmp_path):
    for name in ("b.nii", "a.nii.gz", "deep/er/c.MHA", "d.nrrd", "notes.txt", ".hidden.nii.gz", ".cache/e.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")  # nothing here reads it
    cases = find_cases(tmp_path)
    assert names(cases) == ["a", "b", "d", "deep/er/c"]
    assert [case.number for case in cases] == [1, 2, 3, 4]
    assert cases[3].label == "case 4 (deep/er/c.MHA)"


@pytest.mark.parametrize("ending", [".dcm", "", ".IMA", ".1.2.840.3"])
def test_dicom_folders_below_a_folder_are_called_by_number_only(tmp_path, ending):
    for name in ("DOE^JOHN/T1", "ROE^JANE/T1"):
        write_dicom(tmp_path / name, ending=ending)
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "DOE^JOHN" / "report.pdf").write_bytes(b"%PDF")
    cases = find_cases(tmp_path)
    assert names(cases) == ["DOE^JOHN/T1", "ROE^JANE/T1"]
    assert [case.label for case in cases] == ["case 1", "case 2"]


def test_files_and_dicom_folders_mix(tmp_path):
    write_scan(tmp_path / "a.nii.gz")
    write_dicom(tmp_path / "b")
    assert [(case.name, case.is_dicom) for case in find_cases(tmp_path)] == [("a", False), ("b", True)]


def test_a_pattern_chooses(tmp_path):
    for patient in ("p1", "p2"):
        for name in ("mr.nii.gz", "ct.nii.gz", "mask.nii.gz"):
            write_scan(tmp_path / patient / name)
    assert names(find_cases(tmp_path, "*/mr.nii.gz")) == ["p1/mr", "p2/mr"]
    assert len(find_cases(tmp_path, "**/*.nii.gz")) == 6


def test_several_volumes_in_every_folder_want_a_pattern(tmp_path):
    for patient in ("p1", "p2"):
        for name in ("mr.nii.gz", "ct.nii.gz", "mask.nii.gz"):
            write_scan(tmp_path / patient / name)
    with pytest.raises(ValueError, match=r"hold several volumes each \(ct.*, mask.*, mr.*\).*--pattern '\*/ct.nii.gz'"):
        find_cases(tmp_path)


def test_the_folder_of_the_results_is_not_searched(tmp_path):
    write_scan(tmp_path / "a.nii.gz")
    write_scan(tmp_path / "out" / "a_CT.nii.gz")
    assert names(find_cases(tmp_path, leave_out=tmp_path / "out")) == ["a"]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda path: path / "nowhere", FileNotFoundError, "There is no file or folder"),
        (lambda path: path, ValueError, "holds no volume: known are .nii"),
        (lambda path: write_dicom(path / "s") / "IM0.dcm", ValueError, "one file of a DICOM series: name the folder"),
        (lambda path: Path(shutil.copy(__file__, path / "scan.png")), ValueError, "scan.png is not a volume"),
    ],
)
def test_what_is_no_scan_is_said(tmp_path, make, error, says):
    with pytest.raises(error, match=says):
        find_cases(make(tmp_path))


def test_a_pattern_that_matches_nothing_is_said(tmp_path):
    write_scan(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"holds no volume that matches \*/mr.nii.gz"):
        find_cases(tmp_path, "*/mr.nii.gz")


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def cases_of(*paths):
    return [Case(number, path.name.split(".")[0], path, path.name) for number, path in enumerate(paths, 1)]


def outputs(jobs, folder):
    return [job.output.relative_to(folder).as_posix() for job in jobs]


def test_one_result_goes_into_the_file_that_is_named(tmp_path):
    (case,) = cases_of(tmp_path / "p1.nii.gz")
    assert outputs(plan_outputs([case], ["CT"], tmp_path / "ct.mha"), tmp_path) == ["ct.mha"]
    assert outputs(plan_outputs([case], ["CT"], tmp_path / "ct.nii", "nifti"), tmp_path) == ["ct.nii"]


def test_several_results_go_into_a_folder_by_case_and_target(tmp_path):
    cases = cases_of(tmp_path / "p1.nii.gz", tmp_path / "p2.mhd", write_dicom(tmp_path / "p3"))
    own = plan_outputs(cases, ["CT", "PET"], tmp_path / "out")
    assert outputs(own, tmp_path / "out") == [
        "p1_CT.nii.gz", "p1_PET.nii.gz", "p2_CT.mha", "p2_PET.mha", "p3_CT", "p3_PET"
    ]  # fmt: skip
    nrrd = plan_outputs(cases, ["CT"], tmp_path / "out", "nrrd")
    assert outputs(nrrd, tmp_path / "out") == ["p1_CT.nrrd", "p2_CT.nrrd", "p3_CT.nrrd"]
    anonymous = plan_outputs(cases, ["CT"], tmp_path / "out", "dicom", anonymous=True)
    assert outputs(anonymous, tmp_path / "out") == ["case-0001_CT", "case-0002_CT", "case-0003_CT"]


@pytest.mark.parametrize(
    ("files", "targets", "output", "file_format", "says"),
    [
        (
            ["a.nii.gz", "b.nii.gz"],
            ["CT"],
            "ct.nii.gz",
            None,
            "is one file, and 2 results are asked for: name a folder",
        ),
        (["a.nii.gz"], ["CT", "PET"], "ct.nii.gz", None, "is one file, and 2 results"),
        (["a.nii.gz"], ["CT"], "ct.nii.gz", "mha", "ct.nii.gz is no name for the format mha, which ends in .mha"),
        (["a.nii.gz"], ["CT"], "ct.mha", "dicom", "no name for the format dicom, which is a folder"),
        (["a.nii.gz"], ["CT"], "a.nii.gz", None, "would replace the scan itself"),
        (["a.nii.gz"], ["CT", "CT"], "out", None, "CT is asked for twice"),
        (["a.nii.gz", "a.nii"], ["CT"], "out", None, "a.nii.gz and a.nii differ only in their endings"),
    ],
)
def test_results_that_cannot_be_are_said_before_anything_is_done(tmp_path, files, targets, output, file_format, says):
    cases = cases_of(*(tmp_path / file for file in files))
    with pytest.raises(ValueError, match=says):
        plan_outputs(cases, targets, tmp_path / output, file_format)


def test_a_place_that_cannot_be_written_to_is_found_by_trying(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/out cannot be written to .*: name another output"):
        check_writable(tmp_path / "file" / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path):
    """One result for each of three scans."""
    for value, name in enumerate("abc"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz", value)
    return plan_outputs(find_cases(tmp_path / "in"), ["CT"], tmp_path / "out")


def test_what_is_finished_is_not_done_again(jobs):
    finish(jobs[1], {"seed": 0})
    finished, pending = sort_out(jobs, {"seed": 0}, sidecar)
    assert finished == [jobs[1]] and pending == [jobs[0], jobs[2]]
    assert sort_out(jobs, {"seed": 1}, sidecar, overwrite=True) == ([], jobs)


def test_what_was_made_otherwise_is_not_mixed_in(jobs):
    finish(jobs[1], {"seed": 0})
    with pytest.raises(ValueError, match=r"case 2 \(b.nii.gz\): .* made otherwise: seed 0 \(now 1\).*--overwrite"):
        sort_out(jobs, {"seed": 1}, sidecar)


def test_a_scan_that_has_changed_is_another_one(jobs):
    finish(jobs[0], {"seed": 0})
    write_scan(jobs[0].case.path, 7)
    with pytest.raises(ValueError, match="made otherwise: input"):
        sort_out(jobs, {"seed": 0}, sidecar)


def test_what_somebody_else_put_there_stays(jobs):
    jobs[2].output.parent.mkdir(parents=True)
    jobs[2].output.write_text("mine")
    for content in (None, "{", "{}", "[]"):
        if content is not None:
            sidecar(jobs[2].output).write_text(content)
        with pytest.raises(ValueError, match=r"case 3 .*does not say that this command made it.*--overwrite"):
            sort_out(jobs, {"seed": 0}, sidecar)
    assert jobs[2].output.read_text() == "mine"


def test_a_copy_is_the_same_scan_and_any_edit_another(tmp_path):
    folder = write_dicom(tmp_path / "s", 3)
    before = fingerprint(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "IM0.dcm").rename(copy / "A0.dcm")
    assert fingerprint(copy) == before
    (copy / "IM1.dcm").unlink()
    assert fingerprint(copy) != before
    big = tmp_path / "big.nii"
    big.write_bytes(bytes(1 << 20))
    before = fingerprint(big)
    big.write_bytes(bytes((1 << 20) - 1) + b"1")
    assert fingerprint(big) != before


def test_processes_share_cases_and_every_job_is_done_once(tmp_path):
    cases = cases_of(*(tmp_path / f"{name}.nii.gz" for name in "abcde"))
    jobs = plan_outputs(cases, ["CT", "PET"], tmp_path / "out")
    shares = [share_of(jobs, process, 3) for process in range(3)]
    assert sorted(job.output for share in shares for job in share) == sorted(job.output for job in jobs)
    assert [len(share) for share in shares] == [4, 4, 2]
    assert all(len({job.case.number for job in share}) * 2 == len(share) for share in shares)  # a scan is read once


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def outcomes_of(jobs, make, read=lambda case: case.name):
    return [outcome for _, outcome in run_jobs(jobs, read, make)]


def test_a_scan_is_read_once_for_all_its_targets(tmp_path):
    jobs = plan_outputs(cases_of(tmp_path / "a.nii", tmp_path / "b.nii"), ["CT", "PET"], tmp_path / "out")
    was_read, made = [], []
    outcomes = outcomes_of(
        jobs,
        lambda scan, job: made.append((scan, job.target)),
        lambda case: was_read.append(case.name) or case.name,
    )
    assert was_read == ["a", "b"] and made == [("a", "CT"), ("a", "PET"), ("b", "CT"), ("b", "PET")]
    assert {outcome.status for outcome in outcomes} == {"made"} and all(outcome.error is None for outcome in outcomes)


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError, ImportError, MemoryError])
def test_what_fails_stops_no_other(jobs, kind):
    def make(scan, job):
        if job.case.number == 2:
            raise kind(f"{job.case.path} is damaged.")

    outcomes = outcomes_of(jobs, make)
    assert [outcome.status for outcome in outcomes] == ["made", "failed", "made"]
    says = "out of memory: use a smaller --batch-size" if kind is MemoryError else "case 2 (b.nii.gz) is damaged."
    assert outcomes[1].error.startswith(says)


def test_a_scan_that_cannot_be_read_fails_for_all_its_targets(tmp_path):
    jobs = plan_outputs(cases_of(tmp_path / "a.nii", tmp_path / "b.nii"), ["CT", "PET"], tmp_path / "out")

    def read(case):
        if case.number == 1:
            raise ValueError("not complete")
        return case

    outcomes = outcomes_of(jobs, lambda scan, job: None, read)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "made", "made"]


def test_a_mistake_of_ours_is_no_failed_case(jobs):
    with pytest.raises(ZeroDivisionError):
        outcomes_of(jobs, lambda scan, job: 1 / 0)


def test_an_interruption_keeps_what_is_finished(jobs):
    done = []

    def make(scan, job):
        if job.case.number == 2:
            raise KeyboardInterrupt
        finish(job, {})

    with pytest.raises(KeyboardInterrupt):
        for _, outcome in run_jobs(jobs, lambda case: case, make):
            done.append(outcome)
    assert [outcome.case for outcome in done] == [1]
    assert sort_out(jobs, {}, sidecar) == ([jobs[0]], jobs[1:])


def test_a_full_disk_ends_the_run_at_once(jobs):
    jobs[0].output.parent.mkdir(parents=True)
    tried = []

    def make(scan, job):
        tried.append(job.case.number)
        if job.case.number == 2:  # writes for real, beyond what a file may grow to
            job.output.write_bytes(bytes(100_000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="disk of the results fails .* finished is kept.*run the same command again"):
            outcomes_of(jobs, make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tried == [1, 2]


def test_no_space_left_ends_it_too(jobs):
    def make(scan, job):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        outcomes_of(jobs, make)


def test_paths_of_a_dicom_series_are_taken_out_of_errors(tmp_path):
    folder = tmp_path / "DOE^JOHN" / "1.5"
    write_dicom(folder)
    (folder / "IM0.dcm").rename(folder / "DOE JOHN 1.dcm")
    (case,) = find_cases(tmp_path)
    error = ValueError(f"{folder}: {folder}/DOE JOHN 1.dcm and IM1.dcm lie\n  1.5 mm apart.")
    said = describe_error(error, case)
    assert said == "case 1: case 1/one of its files and one of its files lie 1.5 mm apart."


def test_the_result_is_named_in_no_error_and_words_stay_whole(tmp_path):
    """A folder whose name is part of other words, such as `a` or `ct`, must not be cut out of them."""
    folder = tmp_path / "a" / "ct" / "DOE_a_ct"
    folder.mkdir(parents=True)
    case = Case(1, "DOE_a_ct/1.5", folder, "case 1")
    output = tmp_path / "a" / "ct" / "DOE_a_ct_PET"
    error = FileExistsError(f"What exactly is in the way of {output}: DOE_a_ct_PET, 1.5 mm, as is DOE_a_ct.")
    said = describe_error(error, case, output)
    assert said == "What exactly is in the way of its result: its result, 1.5 mm, as is its result."


def test_the_list_of_cases_says_which_number_is_which_scan(jobs, tmp_path):
    outcomes = outcomes_of(jobs, lambda scan, job: None)
    write_cases(tmp_path / "out", jobs, outcomes, anonymous=False)
    rows = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert [(row["case"], row["scan"], row["output"], row["status"]) for row in rows] == [
        (number, name, f"{name}_CT.nii.gz", "made") for number, name in enumerate("abc", 1)
    ]
    write_cases(tmp_path / "out", jobs, outcomes, anonymous=True)
    assert "scan" not in json.loads((tmp_path / "out" / "cases.json").read_text())[0]
