"""`synermedgen synthesize` and `identify`, with the bundled weights on small simulated scans."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from typer.testing import CliRunner

from synermedgen_hf import Volume, checkpoint_path, cli, read_volume
from synermedgen_hf.volumes.writing import write_dicom_series

QUICK = ["--steps", "1", "--source", "MRI"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def synthesize(*arguments):
    return run("synthesize", *arguments, *QUICK)


def head(seed=0, slices=5):
    x, y, z = (np.linspace(-1.2, 1.2, side) for side in (20, 24, slices))
    radius = x[:, None, None] ** 2 + y[:, None] ** 2 + (z * 0.8) ** 2
    texture = np.random.default_rng(seed).uniform(0.5, 1, radius.shape)
    return np.where(radius < 1, 700 * texture, 0).astype(np.float32)


AFFINE = np.array([[-8, 0, 0, 80], [0, -8, 0, 90], [0, 0, 12, -30], [0, 0, 0, 1.0]])


@pytest.fixture
def scans(tmp_path):
    """Three patients with a scan and a mask each."""
    for number in range(3):
        folder = tmp_path / "scans" / f"p{number}"
        folder.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(head(number), AFFINE), folder / "mr.nii.gz")
        nibabel.save(nibabel.Nifti1Image((head(number) > 0).astype(np.uint8), AFFINE), folder / "mask.nii.gz")
    return tmp_path / "scans"


@pytest.fixture
def series(tmp_path):
    """A DICOM series of a patient with a name, in a folder of that name."""
    folder = write_dicom_series(Volume(head(), AFFINE, "MRI", "a.u."), tmp_path / "DOE^JANE")
    for file in folder.iterdir():
        header = pydicom.dcmread(file)
        header.PatientName, header.PatientID = "Doe^Jane", "4711"
        header.save_as(file)
    return folder


def test_one_scan(scans, tmp_path):
    result = synthesize(scans / "p0" / "mr.nii.gz", "-t", "CT", "-o", tmp_path / "ct.nii.gz")
    assert result.exit_code == 0 and "1 made" in result.stdout
    made = nibabel.load(tmp_path / "ct.nii.gz")
    assert made.shape == (20, 24, 5) and np.allclose(made.affine, AFFINE)
    values = made.get_fdata()
    assert values.min() == -1024 and values.max() <= 3071 and values[10, 12, 2] > -1024
    record = json.loads((tmp_path / "ct.json").read_text())
    assert record["sources"] == ["MRI"] and record["num_inference_steps"] == 1
    assert record["request"]["seed"] == 0


def test_a_folder_of_scans_and_targets_goes_on_where_it_stopped(scans, tmp_path):
    arguments = (scans, "--pattern", "*/mr.nii.gz", "-t", "CT", "-o", tmp_path / "out")
    assert synthesize(*arguments).exit_code == 0
    first = tmp_path / "out" / "p0" / "mr_CT.nii.gz"
    before = first.stat().st_mtime_ns
    (tmp_path / "out" / "p2" / "mr_CT.nii.gz").unlink()
    again = synthesize(*arguments, "--json")
    told = json.loads(again.stdout)
    assert [one["status"] for one in told["results"]] == ["kept", "kept", "made"]
    assert first.stat().st_mtime_ns == before
    other = synthesize(*arguments, "--seed", "1")
    assert other.exit_code == 1 and "seed 0 (now 1)" in other.stderr and "--overwrite" in other.stderr


def test_a_failing_case_is_told_and_stops_no_other(scans, tmp_path):
    (scans / "p1" / "mr.nii.gz").write_bytes(b"not a scan")
    result = synthesize(scans, "--pattern", "*/mr.nii.gz", "-t", "CT", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "2 made, 1 failed" in result.stdout and "case 2 (p1/mr.nii.gz) to CT: " in result.stdout
    assert not (tmp_path / "out" / "p1" / "mr_CT.nii.gz").exists()


def test_dicom_in_dicom_out_and_the_patient_is_never_named(series, tmp_path):
    result = synthesize(series.parent, "-t", "CT", "-o", tmp_path / "out", "--region", "brain")
    assert result.exit_code == 0
    assert "DOE" not in (result.stdout + result.stderr).replace(str(series), "").upper()
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    made = read_volume(folder)
    assert made.modality == "CT" and made.array.shape == (20, 24, 5)
    assert pydicom.dcmread(next(folder.iterdir())).PatientID == "4711"
    record = (tmp_path / "out" / f"{folder.name}.json").read_text()
    assert "4711" not in record and "Doe" not in record


def test_a_patients_name_is_not_in_an_error(series, tmp_path):
    """A file lies where the result's folder should go."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{series.name}_CT").write_text("in the way")
    result = synthesize(series.parent, "-t", "CT", "-o", tmp_path / "out")
    told = (result.stdout + result.stderr).replace(str(tmp_path), "")
    assert result.exit_code == 1 and "DOE" not in told


def test_several_processes_share_the_cases_out(scans, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["synermedgen_hf.cli", "synthesize", str(scans), "--pattern", "*/mr.nii.gz", "-t", "CT"]
    command += ["-o", str(tmp_path / "out"), *QUICK, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one report, of all
    assert [one["status"] for one in told["results"]] == ["made"] * 3
    assert done.stderr.count("| 0/5 [") == 3  # a bar begins once for each scan


def test_another_mask_or_dtype_is_another_result(scans, tmp_path):
    arguments = (scans / "p0" / "mr.nii.gz", "-t", "CT", "-o", tmp_path / "ct.nii.gz")
    assert synthesize(*arguments).exit_code == 0
    for changes, words in ((["--mask", scans / "p0" / "mask.nii.gz"], "mask"), (["--dtype", "bfloat16"], "dtype")):
        again = synthesize(*arguments, *changes)
        assert again.exit_code == 1 and words in again.stderr


def test_deidentified_results_are_called_by_number(series, tmp_path):
    assert synthesize(series.parent, "-t", "CT", "-o", tmp_path / "out", "--deidentify").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "case-0001_CT",
        "case-0001_CT.json",
        "cases.json",
    ]
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert b"Doe" not in file.read_bytes() and b"DOE" not in file.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-t", "MRI"], "nothing to synthesise"),
        (["-t", "CT", "--pattern", "nowhere/*"], "holds no volume"),
        (["-t", "PET"], "not trained for MRI to PET"),
        (["-t", "XYZ"], "Unknown target"),
        (["-t", "CT", "--format", "png"], "Unknown format"),
        (["-t", "CT", "--axis", "tilted"], "Unknown axis"),
        (["-t", "CT", "--device", "cuda:7"], "no device"),
        (["-t", "CT", "--model", "nowhere/at-all"], "nowhere/at-all"),
        (["-t", "CT", "--pattern", "*.xyz"], "holds no volume that matches"),
    ],
)
def test_what_cannot_be_is_said(scans, tmp_path, arguments, words):
    pattern = [] if "--pattern" in arguments else ["--pattern", "*/mr.nii.gz"]
    result = synthesize(scans, *pattern, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1 and words in result.stderr + result.stdout
    assert not list(tmp_path.glob("out/**/*.nii.gz"))


@pytest.fixture
def seeing(tmp_path):
    """The bundled weights, told that they have learned to name modalities: whatever they say, they can be asked."""
    folder = shutil.copytree(checkpoint_path(), tmp_path / "seeing")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_tasks": ["MI"]}))
    return folder


def test_identify_names_scans_and_pictures_with_a_probability(scans, seeing, tmp_path):
    (scans / "p1" / "mr.nii.gz").write_bytes(b"not a scan")
    result = run("identify", scans, "--pattern", "*/mr.nii.gz", "--model", seeing, "--json")
    assert result.exit_code == 1  # one of them is none
    found = {one["case"]: one for one in json.loads(result.stdout)["scans"]}
    assert "error" in found["case 2 (p1/mr.nii.gz)"]
    seen = found["case 1 (p0/mr.nii.gz)"]
    assert sum(seen["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert seen["probability"] == max(seen["probabilities"].values())
    options = ("--region", "whole-body", "--model", seeing, "--json")  # cut from the front instead
    (other,) = json.loads(run("identify", scans / "p0" / "mr.nii.gz", *options).stdout)["scans"]
    assert other["probabilities"] != seen["probabilities"]
    Image.fromarray(np.uint8(head()[:, :, 2] / 3)).save(tmp_path / "slice.png")
    told = run("identify", tmp_path / "slice.png", "--model", seeing)
    assert told.exit_code == 0 and "%)" in told.stdout


def test_without_a_source_the_weights_are_asked(scans, seeing, tmp_path):
    arguments = (scans / "p0" / "mr.nii.gz", "-t", "CT", "-o", tmp_path / "ct.nii.gz", "--steps", "1")
    result = run("synthesize", *arguments)
    learned = "MI" in json.loads((checkpoint_path() / "model" / "config.json").read_text())["trained_tasks"]
    assert learned or result.exit_code == 1 and "--source MRI" in result.stderr
    result = run("synthesize", *arguments, "--model", seeing, "--overwrite")
    if result.exit_code == 0:  # what they saw has a route to CT
        assert json.loads((tmp_path / "ct.json").read_text())["identified"]["modality"]
    else:
        assert "trained for" in result.stdout + result.stderr or "nothing to synthesise" in result.stdout


def test_ctrl_c_keeps_what_is_finished(scans, tmp_path):
    for number in range(3, 20):
        folder = scans / f"p{number}"
        folder.mkdir()
        nibabel.save(nibabel.Nifti1Image(head(number, slices=40), AFFINE), folder / "mr.nii.gz")
    command = [sys.executable, "-m", "synermedgen_hf.cli", "synthesize", str(scans), "--pattern", "*/mr.nii.gz"]
    command += ["-t", "CT", "-o", str(tmp_path / "out"), *QUICK]
    # A test run in the background ignores SIGINT, and so would what it starts.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)
    for _ in range(600):
        if list((tmp_path / "out").glob("p*/mr_CT.nii.gz")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and b"run the same command again" in told
    finished = list((tmp_path / "out").glob("p*/mr_CT.nii.gz"))
    assert 1 <= len(finished) < 20
    for path in finished:
        assert np.isfinite(nibabel.load(path).get_fdata()).all()
    assert not [path for path in (tmp_path / "out").rglob("*") if "tmp" in path.name]
