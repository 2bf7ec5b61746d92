"""The commands `evaluate` and `compare`: options arrive, and what is wrong is one sentence."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from synermedgen_hf import checkpoint_path, cli
from synermedgen_hf.data import synermed
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.metrics import PROTOCOLS

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))


def run(*arguments):
    """A command in this process; an exception that would be a traceback fails the test."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Ten patients, CBCT and CT, two slices each."""
    folder = tmp_path_factory.mktemp("scans") / "SynthRAD2023"
    write_layout("synthrad2023-task2", folder, 10, size=32, num_slices=2)
    return folder


@pytest.fixture(scope="module")
def runs(scans, tmp_path_factory):
    """A model and a baseline, on the training patients."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--data-dir", scans, "--split", "train", "--routes", "CBCT-CT"]
    copied = run("evaluate", "--output", folder / "copy", *common, "--baseline", "copy")
    sampling = ["--steps", 1, "--guidance", 1, "--image-guidance", 1, "--timestep-shift", 2, "--samples", 2]
    made = run("evaluate", "--output", folder / "model", *common, *sampling, "--seed", 3, "--beside", folder / "copy")
    assert copied.exit_code == made.exit_code == 0, copied.stderr + made.stderr
    return folder, made


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """A pix2pix of two steps, for the codec of the bundled weights."""
    import train_baseline

    folder = tmp_path_factory.mktemp("trained") / "baseline"
    line = ["--baseline", "pix2pix", "--pretrained_model_name_or_path", checkpoint_path(), "--output_dir", folder]
    line += ["--data_dir", scans, "--routes", "brain/CBCT-CT", "--block_out_channels", 8, 8, "--max_train_steps", 2]
    line += ["--discriminator_channels", 8, 8, "--train_batch_size", 2, "--num_proc", 1]
    train_baseline.main(train_baseline.parse_args([str(one) for one in line]))
    return folder


def read_json(file):
    return json.loads(file.read_text())


def test_an_evaluation_says_what_it_found_and_where(runs):
    folder, made = runs
    for file in ("report.html", "summary.json", "cases.jsonl"):
        assert f"{folder / 'model' / file}" in made.stdout and (folder / "model" / file).exists()
    assert "| brain/CBCT-CT | synermedgen-tiny |" in made.stdout and "| brain/CBCT-CT | copy |" in made.stdout


def test_every_option_arrives(runs):
    folder, _ = runs
    arguments = read_json(folder / "model" / "arguments.json")
    assert arguments["sampling"] == {
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
        "timestep_shift": 2.0,
    }
    assert (arguments["samples"], arguments["seed"], arguments["split"]) == (2, 3, "train")
    assert arguments["routes"] == ["brain/CBCT-CT", "pelvis/CBCT-CT"] and arguments["level"] == "slice"
    assert arguments["protocol"] == "synthrad2023" and arguments["dtype"] == "float32"


def test_every_protocol_is_named_in_the_help():
    options = {option.name: option.help for option in get_command(cli.app).commands["evaluate"].params}
    assert all(name in options["protocol"] for name in PROTOCOLS)


def test_simulated_patients_without_any_data(tmp_path, monkeypatch):
    monkeypatch.setattr(synermed, "PROTOCOLS", {("whole-body", "autopet"): ("CT", "PET")})
    size = ["--phantom-slices", 20, "--phantom-size", 32, "--slice-step", 8]
    done = run("evaluate", "--output", tmp_path / "run", "--phantom-cases", 2, *size, "--baseline", "mapping")
    assert done.exit_code == 0, done.stderr
    routes = read_json(tmp_path / "run" / "summary.json")["routes"]
    assert {name: found["patients"] for name, found in routes.items()} == {
        "whole-body/CT-PET": 2,
        "whole-body/PET-CT": 2,
    }


def test_a_trained_network_stands_among_the_baselines(trained, tmp_path, monkeypatch):
    """On one simulated patient, of whom the routes it does not know are left out."""
    monkeypatch.setattr(synermed, "PROTOCOLS", {("brain", "synthrad"): ("MRI", "CT", "CBCT")})
    size = ["--phantom-cases", 1, "--phantom-slices", 9, "--phantom-size", 32, "--slice-step", 4]
    done = run("evaluate", "--output", tmp_path / "run", *size, "--baseline", trained)
    assert done.exit_code == 0, done.stderr
    assert "| brain/CBCT-CT | pix2pix |" in done.stdout and "brain/CT-MRI" not in done.stdout
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["routes"].keys() == {"brain/CBCT-CT"} and summary["routes"]["brain/CBCT-CT"]["cases"] > 0
    arguments = summary["arguments"]
    assert (arguments["baseline"], arguments["trained"]["steps"]) == ("pix2pix", 2)
    assert len(arguments["checksum of the weights"]) == 64
    assert not (tmp_path / "run" / "model-index.yml").exists()  # it is no model of ours


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({}, ["--routes", "pelvis/CBCT-CT"], "not trained for pelvis/CBCT-CT. It was trained for: brain/CBCT-CT"),
        ({"baseline.json": None}, [], "no trained baseline: there is no baseline.json"),
        (
            {"unet/diffusion_pytorch_model.safetensors": None},
            [],
            "there is no unet/diffusion_pytorch_model.safetensors",
        ),
        ({"baseline.json": {"kind": "magic"}}, [], "baseline.json is not what examples/train_baseline.py writes"),
        ({"baseline.json": {"routes": []}}, [], "knows 1 routes, its record 0"),
        ({"baseline.json": {"codec": {"vae_size": 64}}}, [], "was trained with another codec"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(trained, scans, tmp_path, change, arguments, says):
    folder = Path(shutil.copytree(trained, tmp_path / "baseline"))
    for name, value in change.items():
        if value is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(json.dumps({**read_json(folder / name), **value}))
    common = ["--data-dir", scans, "--split", "train", "--baseline", folder]
    done = run("evaluate", "--output", tmp_path / "run", *common, *arguments)
    assert done.exit_code == 1 and says in done.stderr and done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_two_evaluations_are_compared(runs, tmp_path):
    folder, _ = runs
    done = run("compare", folder / "model", folder / "copy", "--output", tmp_path / "found.json")
    assert done.exit_code == 0 and f"first: {folder / 'model'}, second: {folder / 'copy'}" in done.stdout
    found = read_json(tmp_path / "found.json")["routes"]
    summaries = [read_json(folder / name / "summary.json")["routes"] for name in ("model", "copy")]
    for route, metrics in found.items():
        for metric, own in metrics.items():
            means = [summary[route]["metrics"][metric]["mean"] for summary in summaries]
            assert [own["first"], own["second"]] == pytest.approx(means)
            assert f"| {route} | {metric} | {own['n']} |" in done.stdout


def test_what_cannot_be_compared_is_said(runs, scans, tmp_path):
    folder, _ = runs
    done = run("compare", folder / "model", folder / "nothing")
    assert done.exit_code == 1 and "nothing holds no finished evaluation" in done.stderr and done.stdout == ""
    common = ["--data-dir", scans, "--split", "train", "--baseline", "copy"]
    run("evaluate", "--output", tmp_path / "fewer", *common, "--routes", "CBCT-CT", "--slice-step", 2)
    done = run("compare", folder / "copy", tmp_path / "fewer")
    assert done.exit_code == 1 and f"{tmp_path / 'fewer'} lacks " in done.stderr and "brain/CBCT-CT" in done.stderr
    run("evaluate", "--output", tmp_path / "unlike", *common, "--routes", "CBCT-CT", "--protocol", "synthrad2025")
    done = run("compare", folder / "copy", tmp_path / "unlike")
    assert done.exit_code == 1 and done.stderr.startswith("Error: ") and done.stdout == ""


def test_another_evaluation_in_the_folder_is_refused(runs, scans):
    folder, _ = runs
    before = {path: path.read_bytes() for path in (folder / "copy").rglob("*") if path.is_file()}
    done = run("evaluate", "--output", folder / "copy", "--data-dir", scans, "--split", "test", "--baseline", "copy")
    assert done.exit_code == 1 and "holds answers to something else" in done.stderr and done.stdout == ""
    assert before == {path: path.read_bytes() for path in (folder / "copy").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 1, "Pass either --data-dir or --phantom-cases"),
        (["--phantom-cases", 1, "--model", "nowhere/at-all/here"], 1, "There is no folder nowhere/at-all/here"),
        (["--phantom-cases", 1, "--routes", "brain/CT-T1"], 1, "brain/CT-T1"),
        (["--phantom-cases", 1, "--baseline", "magic"], 1, "choose one of copy, mapping, ceiling, or a folder"),
        (["--phantom-cases", 1, "--samples", 0], 2, "--samples"),
        (["--phantom-cases", 1, "--phantom-slices", 3], 1, "pictures of 3 rows for whole-body/CT-PET"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, arguments, code, says):
    done = run("evaluate", "--output", tmp_path / "run", *arguments)
    assert done.exit_code == code and says in done.stderr and done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_both_commands_speak_json(runs, scans, tmp_path):
    """The same as the files they write."""
    folder, _ = runs
    common = ["--data-dir", scans, "--split", "train", "--routes", "CBCT-CT", "--baseline", "copy", "--json"]
    done = run("evaluate", "--output", tmp_path / "copy", *common)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == read_json(tmp_path / "copy" / "summary.json")
    done = run("compare", folder / "copy", folder / "model", "--output", tmp_path / "found.json", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout) == read_json(tmp_path / "found.json")


def test_a_table_sets_evaluations_side_by_side(runs, tmp_path, capsys):
    folder, _ = runs
    spec = importlib.util.spec_from_file_location("results_table", EXAMPLES / "results_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    both = [f"ours={folder / 'model'}", f"copied={folder / 'copy'}"]
    table.main(table.parse_args([*both, "--metric", "mae_[!u]*_mask:1:1", "--metric", "ssim_hu_mask:100:2"]))
    shown = capsys.readouterr().out
    routes = [read_json(folder / name / "summary.json")["routes"] for name in ("model", "copy")]
    cells = [
        f"{each['brain/CBCT-CT']['metrics']['mae_hu_mask']['mean']:.1f} / "
        f"{100 * each['brain/CBCT-CT']['metrics']['ssim_hu_mask']['mean']:.2f}"
        for each in routes
    ]
    assert shown.startswith("mae_hu_mask / ssim_hu_mask\n")
    assert f"| brain/CBCT-CT | {routes[0]['brain/CBCT-CT']['cases']} | {cells[0]} | {cells[1]} |" in shown
    better = sum(
        routes[0][route]["metrics"]["mae_hu_mask"]["mean"] < routes[1][route]["metrics"]["mae_hu_mask"]["mean"]
        for route in routes[0]
    )
    assert f"mae_hu_mask: ours has the better mean on {better}; tested, it is better on 0 and worse on 0" in shown
    assert "Stamps of all routes: name: synthrad2023" in shown
    # Which way is better, the figure says and not the pattern.
    table.main(table.parse_args([*both, "--metric", "*mae_hu_mask:1:1"]))
    assert f"mae_hu_mask: ours has the better mean on {better};" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Two runs have one name"):
        table.main(table.parse_args([both[0], f"ours={folder / 'copy'}", "--metric", "mae_hu_mask:1:1"]))
    less = shutil.copytree(folder / "copy", tmp_path / "less")
    summary = read_json(less / "summary.json")
    summary["routes"]["brain/CBCT-CT"]["metrics"]["mae_hu_mask"]["n"] -= 1
    (less / "summary.json").write_text(json.dumps(summary))
    table.main(table.parse_args([both[0], f"less={less}", "--metric", "mae_hu_mask:1:1"]))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| brain/CBCT-CT"))
    assert line.count("*") == 1 and line.endswith("* |")  # not defined on all of its cases
    with pytest.raises(SystemExit, match="has no figure ssim_magic"):
        table.main(table.parse_args([*both, "--metric", "ssim_magic:1:1"]))
    with pytest.raises(SystemExit):
        table.parse_args([str(folder), "--metric", "mae_hu_mask:1:1"])
    assert "has not 2 parts" in capsys.readouterr().err
