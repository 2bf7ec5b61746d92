"""Our model against recorded outputs of the original modules, case by case, and the command line that says so."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_golden
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden_a"
GROUPS = ["blocks", "vae", "und", "text", "gen", "sample", "e2e", "train", "grads", "layouts", "transforms"]


@pytest.fixture(scope="module")
def results():
    return run_golden.run(GOLDEN)


@pytest.mark.parametrize("group", GROUPS)
def test_every_case_agrees(results, group):
    cases = [(name, error, passed) for name, error, passed in results if name.startswith(f"{group}.")]
    assert cases
    failed = [f"{name}: largest error {error:.2e}" for name, error, passed in cases if not passed]
    assert not failed, "\n".join(failed)


def test_every_case_belongs_to_a_group_above(results):
    assert {name.split(".")[0] for name, _, _ in results} == set(GROUPS)


def command_line(folder):
    return subprocess.run([sys.executable, run_golden.__file__, folder], capture_output=True, text=True)


def test_the_command_line_succeeds_where_all_agree(results):
    done = command_line(GOLDEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(results)} of {len(results)} cases agree"


def test_the_command_line_fails_and_names_the_case_that_differs(results, tmp_path):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    cases = load_file(tmp_path / "cases.safetensors")
    cases["und.train.logits"] += 0.01
    save_file(cases, tmp_path / "cases.safetensors")

    done = command_line(tmp_path)
    *lines, summary = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert [line.split()[-1] for line in lines if line.startswith("FAIL")] == ["und.train.logits"]
    assert summary == f"{len(results) - 1} of {len(results)} cases agree"
