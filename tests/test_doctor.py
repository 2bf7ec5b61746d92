"""The reports of `synermedgen doctor` and `synermedgen info`: true of this machine, and of a checkpoint as it is."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from safetensors.torch import load, save_file
from typer.testing import CliRunner

from synermedgen_hf import checkpoint_path, cli, doctor
from synermedgen_hf.doctor import choose_device, describe_checkpoint, doctor_text, examine, info_text, try_synthesis


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the bundled weights, to spoil."""
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "pipeline"))


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def remove_tensors(file, *names):
    tensors = load(file.read_bytes())
    for name in names:
        del tensors[name]
    save_file(tensors, file)


@pytest.fixture(scope="module")
def record():
    """What `doctor` finds here, with the bundled weights."""
    return examine()


# ---------------------------------------------------------------------------------------------------------------------
# info
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_described_as_it_is():
    found = describe_checkpoint(checkpoint_path())
    config = json.loads((checkpoint_path() / "model" / "config.json").read_text())
    assert found["routes"] == config["trained_routes"] and len(found["routes"]) == 22
    assert found["notice"] == config["notice"] and found["license"] == "apache-2.0"
    assert found["sampling"].items() >= config["sampling"].items()
    scheduler = json.loads((checkpoint_path() / "scheduler" / "scheduler_config.json").read_text())
    assert found["sampling"]["timestep_shift"] == scheduler["shift"]
    assert found["training_data"].startswith("Stage I (CTS, TIA, MI) on questions about 240 simulated patients")
    assert found["intensity"]["CT"]["unit"] == "HU"
    tensors = [
        tensor
        for file in ("model/model.safetensors", "vae/diffusion_pytorch_model.safetensors")
        for tensor in load((checkpoint_path() / file).read_bytes()).values()
    ]
    assert sum(found["parameters"].values()) == sum(tensor.numel() for tensor in tensors)
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert all(count > 0 for count in found["parameters"].values())


def test_a_repository_on_the_hub_is_described_without_its_weights(hub):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("lab/described")
    api.upload_folder(repo_id="lab/described", folder_path=checkpoint_path())
    there, here = describe_checkpoint("lab/described"), describe_checkpoint(checkpoint_path())
    assert {**there, "model": None} == {**here, "model": None}
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--lab--described"
    assert cache.exists() and not list(cache.rglob("*.safetensors"))


def test_the_description_in_words():
    done = run("info")
    assert done.exit_code == 0
    for said in ("synermedgen-tiny", "trained on simulated scans", "apache-2.0", "slices of 800", "7.95 M parameters"):
        assert said in done.stdout
    for said in ("4 steps", "whole-body  CT-PET, PET-CT", "| CT | HU | -1024 to 3071 |", "Not for clinical use"):
        assert said in done.stdout
    assert "understands    CTS, TIA, MI" in done.stdout
    assert run("info", "synermedgen-tiny").stdout == run("info", checkpoint_path()).stdout == done.stdout


def test_the_description_for_programs():
    done = run("info", "--json")
    assert json.loads(done.stdout) == json.loads(json.dumps(describe_checkpoint(checkpoint_path())))


def test_a_checkpoint_without_parts_and_without_a_card_says_so(checkpoint):
    edit_json(checkpoint / "model" / "config.json", missing_parts=["generation"], trained_routes=[], notice=None)
    edit_json(checkpoint / "model" / "config.json", trained_tasks=["CTS", "MI"])
    (checkpoint / "README.md").unlink()
    said = info_text(describe_checkpoint(checkpoint))
    for words in ("licence        not stated", "training data  not stated", "missing        generation weights"):
        assert words in said
    assert "understands    CTS, MI" in said and "not recorded which routes" in said
    edit_json(checkpoint / "model" / "config.json", trained_tasks=[])
    assert "nothing yet: it does not identify modalities" in info_text(describe_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/no/such/folder", "There is no folder /no/such/folder"),
        (Path(__file__), "is a file; name the folder of a pipeline"),
        (Path(__file__).parent, "is not a SynerMedGen pipeline: it lacks model/config.json"),
    ],
)
def test_what_is_no_checkpoint_is_said(model, says):
    for as_json in ([], ["--json"]):
        done = run("info", model, *as_json)
        assert done.exit_code == 1 and says in done.stderr
        assert done.stdout == "" if not as_json else says in json.loads(done.stdout)["error"]


def test_a_repository_that_is_not_there_is_said(hub):
    done = run("info", "lab/nothing-there")
    assert done.exit_code == 1 and "lab/nothing-there" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------------------------------


def test_the_machine_is_what_it_is(record):
    assert record["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["devices"][-1]["device"] == "cpu"
    assert record["device"] in [one["device"] for one in record["devices"]]
    assert {one["use"] for one in record["disk"]} == {"Hub cache", "working folder", "temporary files"}
    assert all(one["free_bytes"] > 0 for one in record["disk"])
    assert set(record["attention"]) == {"sdpa", "eager", "flex_attention", "flash_attention_2"}


def test_the_libraries_are_those_the_package_asks_for(record):
    core = {one["name"]: one["version"] for one in record["libraries"] if one["extra"] is None}
    asked = [Requirement(line) for line in importlib.metadata.requires("synermedgen-hf")]
    assert set(core) == {one.name for one in asked if one.marker is None}
    assert core["torch"] == importlib.metadata.version("torch")


def test_the_checkpoint_is_loaded_and_tried(record):
    assert record["problems"] == []
    assert "understanding      73        0           0" in record["checkpoint"]["load_report"]
    found = record["self_test"]
    assert found["route"] == "brain/MRI-CT" and found["repeats"] and found["unit"] == "HU"
    assert found["error"] < 0.5 * found["error_of_a_constant"]
    assert found["seconds"] < doctor.SELF_TEST_SECONDS


def test_the_report_in_words(record):
    said = doctor_text(record)
    for words in (
        "Machine",
        "Devices",
        "Attention",
        "Libraries",
        "Disk",
        "Checkpoint",
        "Self-test",
        "No problem found.",
    ):
        assert f"\n{words}" in said
    assert "brain/MRI-CT in one step" in said and "the same twice" in said
    assert all(sentence in said for sentence in record["advice"])
    assert json.loads(json.dumps(record)) == record  # for --json


def test_the_command(checkpoint):
    done = run("doctor", checkpoint, "--no-self-test", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and "self_test" not in found and "load_report" not in found["checkpoint"]
    done = run("doctor", "--no-self-test")
    assert done.exit_code == 0 and "No problem found." in done.stdout


def test_tensors_that_did_not_load_are_a_problem(checkpoint):
    remove_tensors(checkpoint / "model" / "model.safetensors", "llm2vae.weight")
    done = run("doctor", checkpoint)
    assert done.exit_code == 1 and "1 missing: llm2vae.weight" in done.stdout
    assert "Problems" in done.stdout and "No problem found." not in done.stdout


def test_a_damaged_file_is_a_problem(checkpoint):
    file = checkpoint / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = run("doctor", checkpoint)
    assert done.exit_code == 1 and "damaged or not complete" in done.stdout


def test_weights_that_compute_nonsense_are_noticed(checkpoint):
    """As on a device whose kernels are wrong; the self-test knows what the bundled weights must answer."""
    pipe = doctor_pipe(checkpoint)
    with torch.no_grad():
        pipe.model.llm2vae.weight.mul_(-5)
    found = try_synthesis(pipe, torch.device("cpu"), is_bundled=True)
    assert "more than a constant would be" in found["error_message"]
    with torch.no_grad():
        pipe.model.llm2vae.weight.fill_(float("nan"))
    found = try_synthesis(pipe, torch.device("cpu"))
    assert "not finite" in found["error_message"]


def doctor_pipe(folder):
    from synermedgen_hf import SynerMedGenPipeline

    return SynerMedGenPipeline.from_pretrained(folder, print_report=False)


def test_a_checkpoint_without_a_part_is_loaded_and_not_tried(checkpoint):
    file = checkpoint / "model" / "model.safetensors"
    remove_tensors(file, *(name for name in load(file.read_bytes()) if "_moe_gen" in name))
    edit_json(checkpoint / "model" / "config.json", missing_parts=["generation"])
    found = examine(checkpoint)
    assert found["problems"] == [] and found["self_test"]["skipped"] == "it came without its generation weights"
    assert "not made: it came without its generation weights." in doctor_text(found)


def test_a_route_that_no_simulated_patient_has_is_tried_all_the_same(checkpoint):
    edit_json(checkpoint / "model" / "config.json", trained_routes=["thorax/CBCT-CT"])
    found = examine(checkpoint)
    assert found["problems"] == [] and found["self_test"]["route"] == "thorax/CBCT-CT"


def test_weights_larger_than_the_memory_are_not_loaded(checkpoint, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10_000_000))
    found = examine(checkpoint, device="cpu")
    assert "load_report" not in found["checkpoint"] and "self_test" not in found
    assert "The weights take 15.9 MB, and cpu has 10.0 MB free" in found["problems"][0]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=20_000_000))
    found = examine(checkpoint, device="cpu")
    assert found["problems"] == [] and "bfloat16" in found["checkpoint"]["load_report"]
    assert any("use --dtype bfloat16, 15.9 MB" in sentence for sentence in found["advice"])


def test_a_test_that_would_take_too_long_is_not_made(monkeypatch):
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 1e-6)
    found = try_synthesis(doctor_pipe(checkpoint_path()), torch.device("cpu"))
    assert "it would take about" in found["skipped"]


def test_a_library_out_of_range_is_a_problem(monkeypatch):
    lines = ["torch<2", "nothing-of-this-name", "neither-this; extra == 'dicom'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = examine(self_test=False)
    assert any(one.startswith(f"torch {torch.__version__} is installed and <2 is needed") for one in found["problems"])
    assert "Not installed: nothing-of-this-name. Run pip install synermedgen-hf." in found["problems"]
    assert any("neither-this: pip install 'synermedgen-hf[dicom]'" in one for one in found["advice"])


def test_an_nvidia_driver_without_a_gpu_in_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else which(name))
    found = examine(self_test=False)
    assert any("has an NVIDIA driver, but torch" in sentence for sentence in found["problems"])


def test_a_device_that_is_not_there_is_refused_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"There is no device '{name}'. This machine has: .*cpu"):
            choose_device(name)
    done = run("doctor", "--device", "cuda:99")
    assert done.exit_code == 1 and "There is no device 'cuda:99'" in done.stderr


def test_the_home_folder_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(checkpoint_path(), tmp_path / "weights")
    said = doctor_text(examine(tmp_path / "weights"))
    assert str(tmp_path) not in said and "~/weights" in said
