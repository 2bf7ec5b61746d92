"""Every route judged, the same in any batch, in any number of processes, and after any interruption."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import nibabel
import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from filelock import FileLock

from synermedgen_hf import SynerMedGenForConditionalGeneration, SynerMedGenImageProcessor, SynerMedGenPipeline
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.metrics import evaluation
from synermedgen_hf.metrics.baselines import fit_mapping
from synermedgen_hf.metrics.comparison import compare
from synermedgen_hf.metrics.evaluation import evaluate
from synermedgen_hf.metrics.protocols import evaluate_case
from synermedgen_hf.metrics.report import read_summary
from synermedgen_hf.volumes.reading import read_volume

FAST = {"num_inference_steps": 2, "guidance_scale": 1.0}
RESULTS = ("cases.jsonl", "summary.json", "report.html", "model-index.yml", "arguments.json")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Six patients in SynthRAD2023's layout, brain and pelvis; four in training, five slices each."""
    folder = tmp_path_factory.mktemp("scans") / "SynthRAD2023"
    write_layout("synthrad2023-task1", folder, 6, size=32, num_slices=5)
    return folder


@pytest.fixture(scope="module")
def weights(config, processor, make_vae, tmp_path_factory):
    """A pipeline with random weights, trained for all that the scans have."""
    torch.manual_seed(0)
    model = SynerMedGenForConditionalGeneration(type(config).from_dict(config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.config.trained_routes = [f"{region}/{way}" for region in ("brain", "pelvis") for way in ("MRI-CT", "CT-MRI")]
    pipe = SynerMedGenPipeline(model, processor, make_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    pipe.save_pretrained(folder, remote_code=False)
    return folder


@pytest.fixture(scope="module")
def pipe(weights):
    pipe = SynerMedGenPipeline.from_pretrained(weights, print_report=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run(scans, weights, tmp_path):
    """An evaluation of the training patients, into a folder of a name."""

    def run(name, **arguments):
        sampler = {} if "baseline" in arguments else FAST
        arguments = {"data_dir": scans, "model": weights, "split": "train", "batch_size": 4, **sampler, **arguments}
        evaluate(tmp_path / name, **arguments)
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def whole(scans, weights, tmp_path_factory):
    """The evaluation that others are held against."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    evaluate(folder, data_dir=scans, model=weights, split="train", batch_size=4, **FAST)
    return folder


@pytest.fixture(scope="module")
def rows(scans):
    """What is judged, row by row."""
    return list(load_dataset("synermed", data_dir=str(scans), split="train", streaming=True))


def with_window(weights, folder, modality, **changed):
    """The same weights, the window of a modality another one."""
    shutil.copytree(weights, folder)
    for file in folder.rglob("processor_config.json"):
        content = json.loads(file.read_text())
        content["image_processor"]["intensity"][modality] |= changed
        file.write_text(json.dumps(content))
    return folder


def records_of(folder):
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def name_of(record):
    return record["case_id"], record["route"], record["slice_index"]


def check_alike(one, other, tolerance):
    """Figures of two records: the same names, undefined together, equal but for rounding."""
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert value is other[name] is None or value == pytest.approx(other[name], rel=tolerance, abs=1e-6), name


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


# ---------------------------------------------------------------------------------------------------------------------
# What is judged
# ---------------------------------------------------------------------------------------------------------------------


def test_every_slice_of_every_route_has_a_record(whole, rows):
    records = records_of(whole)
    wanted = [
        (row["case_id"], f"{row['region']}/{row['source_modality']}-{row['target_modality']}", row["slice_index"])
        for row in rows
    ]
    assert len(records) == len(rows) and {name_of(record) for record in records} == set(wanted)
    summary = read_summary(whole)
    assert set(summary["routes"]) == {f"{part}/{way}" for part in ("brain", "pelvis") for way in ("MRI-CT", "CT-MRI")}
    assert sum(found["cases"] for found in summary["routes"].values()) == len(rows)
    assert summary["cases"] == {
        "found": len({row["case_id"] for row in rows}),
        "without slices": 0,
        "repaired": 0,
        "routes without cases": [],
    }


def test_a_record_is_what_the_model_makes_from_its_seed_under_its_protocol(whole, rows, pipe):
    records = {name_of(record): record for record in records_of(whole)}
    row = next(row for row in rows if row["region"] == "pelvis" and row["target_modality"] == "CT")
    record = records[row["case_id"], "pelvis/MRI-CT", row["slice_index"]]
    window = (row["source_window"]["low"], row["source_window"]["high"])
    made = pipe(
        np.asarray(row["source_image"]),
        target="CT",
        source="MRI",
        region="pelvis",
        window=window,
        seed=record["seed"],
        output_type="np",
        **FAST,
    ).images[0]
    judged = evaluate_case(made, np.asarray(row["target_image"]), np.asarray(row["mask"]), modality="CT")
    check_alike(record["metrics"], judged["metrics"], 1e-3)
    assert record["protocol"] == {**judged["protocol"], "axis": "axial"}


def test_every_case_has_noise_of_its_own(whole):
    seeds = [record["seed"] for record in records_of(whole)]
    assert len(set(seeds)) == len(seeds)


def test_another_seed_is_other_noise_and_the_mean_of_samples_is_of_seeds_in_a_row(pipe, rows):
    row = next(row for row in rows if row["target_modality"] == "CT")
    one, three = (evaluation.Synthesis(pipe, FAST, samples) for samples in (1, 3))
    singles = [one([row], [100 + number])[0] for number in range(3)]
    assert not np.array_equal(singles[0], singles[1])
    assert three([row], [100])[0] == pytest.approx(np.mean(singles, axis=0), abs=0.05)  # HU


def test_no_patient_is_named(tmp_path):
    """A manifest with names in it, as a hospital might have."""
    write_layout("manifest", tmp_path / "scans", 5, size=32, num_slices=2)
    manifest = tmp_path / "scans" / "manifest.csv"
    with open(manifest, newline="") as file:
        table = list(csv.DictReader(file))
    for number, row in enumerate(table):
        row["patient_id"] = f"Mustermann-{number // 2}"
        if row["mask"]:  # what is said of a file that cannot be read names it
            mask = (tmp_path / "scans" / row["mask"]).rename(tmp_path / "scans" / f"Mustermann-{number}.nii.gz")
            mask.write_bytes(mask.read_bytes()[:100])
            row["mask"] = mask.name
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    evaluate(tmp_path / "run", data_dir=tmp_path / "scans", split="train", baseline="copy")
    records = records_of(tmp_path / "run")
    assert len({record["case_id"] for record in records}) > len({record["patient"] for record in records}) > 0
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"Mustermann" not in file.read_bytes()


def test_of_a_bare_folder_only_the_file_that_says_so_names_the_case(tmp_path):
    """Whose name may be the patient's: the page, the summary and their pictures are made to be shown."""
    write_layout("brats2021", tmp_path / "one", 4, size=32, num_slices=4)
    for number, folder in enumerate(sorted((tmp_path / "one").glob("BraTS2021_*"))):
        for file in folder.iterdir():
            file.rename(folder / file.name.removeprefix(f"{folder.name}_"))
        folder.rename(folder.with_name(f"Mustermann_{number}"))
    evaluate(tmp_path / "run", data_dir=tmp_path / "one", split="train", baseline="copy")
    named = {file.name for file in (tmp_path / "run").rglob("*") if file.is_file() and b"Muster" in file.read_bytes()}
    assert named == {"cases.jsonl"}
    shown = next(iter(read_summary(tmp_path / "run")["routes"].values()))["pictures"]["worst"]
    assert records_of(tmp_path / "run")[shown["line"] - 1]["metrics"]["ssim_au_body"] == shown["value"]
    assert str(tmp_path) not in (tmp_path / "run" / "report.html").read_text()  # nor where the scans are kept


# ---------------------------------------------------------------------------------------------------------------------
# The same however it is done
# ---------------------------------------------------------------------------------------------------------------------


def test_batches_of_one_and_of_four_judge_alike(whole, run):
    one = records_of(run("one", batch_size=1))
    for record, expected in zip(one, records_of(whole), strict=True):
        check_alike(record["metrics"], expected["metrics"], 1e-4)
        assert {**record, "metrics": None} == {**expected, "metrics": None}


def test_what_was_interrupted_ends_as_what_was_not(whole, run, tmp_path, monkeypatch):
    synthesise, asked = evaluation.Synthesis.__call__, []

    def interrupted(self, rows, seeds):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return synthesise(self, rows, seeds)

    monkeypatch.setattr(evaluation.Synthesis, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("again")
    folder = tmp_path / "again"
    assert not (folder / "cases.jsonl").exists() and not (folder / "report.html").exists()
    (unfinished,) = (folder / "parts").glob("*.unfinished")
    with open(unfinished, "a") as file:
        file.write('{"dataset": "syn')  # as a process that was killed leaves it
    before = sum(asked)
    asked.clear()
    asked.append(-10)  # does not end a second time
    monkeypatch.setattr(evaluation.Synthesis, "__call__", lambda *all: asked.append(len(all[1])) or synthesise(*all))
    assert contents(run("again")) == contents(whole)
    assert before + sum(asked) + 10 == len(records_of(whole))  # nothing was made twice
    assert not (folder / "parts").exists()


def test_a_batch_of_which_a_part_is_known_is_made_anew_as_a_whole(whole, run, tmp_path, monkeypatch):
    """Of a last line cut off, the others of its batch stay, and digits may depend on the company."""
    synthesise, sizes = evaluation.Synthesis.__call__, []

    def counted(self, rows, seeds):
        sizes.append(len(rows))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return synthesise(self, rows, seeds)

    monkeypatch.setattr(evaluation.Synthesis, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run("again")
    (unfinished,) = (tmp_path / "again" / "parts").glob("*.unfinished")
    lines = unfinished.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    unfinished.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    sizes += [0]
    assert contents(run("again")) == contents(whole)
    assert sizes[3] == 4


def test_a_finished_evaluation_is_not_done_again(whole, run, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "again")
    monkeypatch.setattr(evaluation, "judge_case", None)
    assert contents(run("again")) == contents(whole)


def launch(processes, folder, scans, weights, port, options=("--steps", "2", "--guidance", "1")):
    """The command under torchrun, on CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(port), "-m", "synermedgen_hf.cli", "evaluate", "--output", str(folder)]
    command += ["--data-dir", str(scans), "--model", str(weights), "--split", "train"]
    command += ["--batch-size", "4", *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_report_what_one_does(scans, weights, tmp_path):
    for processes in (1, 2):
        done = launch(processes, tmp_path / str(processes), scans, weights, 29571 + processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Wrote ") == 1  # one of them speaks
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_two_real_processes_share_out_a_baseline_or_are_refused_together(run, scans, weights, tmp_path):
    """One command, one digit, one voice; where a folder is taken, none of the two waits for the other."""
    one = run("one", baseline="copy")
    options = ["--baseline", "copy"]
    done = launch(2, tmp_path / "two", scans, weights, 29575, options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1
    two = tmp_path / "two"
    assert {name: (two / name).read_bytes() for name in RESULTS if (two / name).exists()} == {
        name: (one / name).read_bytes() for name in RESULTS if (one / name).exists()
    }
    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"):
        done = launch(2, tmp_path / "busy", scans, weights, 29576, options)
    assert done.returncode != 0 and "Another run is writing to" in done.stderr
    assert not list((tmp_path / "busy").rglob("*.jsonl"))


def test_each_process_takes_every_nth_case(whole, run, tmp_path, monkeypatch):
    """What two processes write, one after the other, is together what one writes."""

    class Place(evaluation.Accelerator):
        place = 0
        num_processes, process_index = 2, property(lambda self: Place.place)
        is_main_process = property(lambda self: Place.place == 0)

        def wait_for_everyone(self):
            waits.append(Place.place)
            if waits == [0]:  # with the lock in hand, before any case
                assert not list((tmp_path / "two").rglob("*.jsonl"))
            elif self.is_main_process:
                parts.update(path.name for path in (tmp_path / "two" / "parts").glob("*.jsonl"))
                assert parts == {"000000.jsonl", "000002.jsonl"}
                Place.place = 1
                run("two")
                Place.place = 0

    parts, waits = set(), []
    monkeypatch.setattr(evaluation, "Accelerator", Place)
    assert contents(run("two")) == contents(whole)
    assert waits == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Volumes
# ---------------------------------------------------------------------------------------------------------------------


def blank(folder, places):
    """Nothing but air and noise in some axial slices of all volumes of a folder, and no mask."""
    for file in folder.rglob("*.nii.gz"):
        image = nibabel.load(file)
        voxels = image.get_fdata(dtype=np.float32)
        noise = np.abs(np.random.default_rng(0).normal(0, 2, voxels.shape))
        low = {"mask": 0, "mr": noise, "ct": noise - 1024, "cbct": noise - 1024}[file.name.split(".")[0]]
        voxels[:, :, places] = np.broadcast_to(low, voxels.shape)[:, :, places]
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)


def test_a_volume_is_all_of_its_slices_put_back_together(tmp_path, weights, pipe):
    """Those beyond the patient too, as the challenges judge it: what is invented there counts, in SSIM's windows."""
    write_layout("synthrad2023-task1", tmp_path / "scans", 1, size=32, num_slices=8)
    blank(tmp_path / "scans", [0, 1, 7])
    scans = {"data_dir": str(tmp_path / "scans"), "split": "train"}
    options = {"level": "volume", "routes": ["MRI-CT"], "batch_size": 3}
    evaluate(tmp_path / "run", model=weights, **scans, **options, **FAST)
    (record,) = records_of(tmp_path / "run")
    asked = {"streaming": True, "routes": ["MRI-CT"], **scans}
    assert len(list(load_dataset("synermed", **asked))) == 5
    rows = list(load_dataset("synermed", min_share=0.0, **asked))
    assert record["slice_index"] is None and record["slices"] == len(rows) == 8
    # One noise for all slices: neighbours differ by their anatomy alone.
    made = evaluation.Synthesis(pipe, FAST)(rows, [record["seed"]] * 8)
    wanted, mask = (np.stack([np.asarray(row[name]) for row in rows]) for name in ("target_image", "mask"))
    judged = evaluate_case(np.stack(made), wanted, mask=mask, modality="CT", spacing=tuple(rows[0]["spacing"]))
    check_alike(record["metrics"], judged["metrics"], 1e-3)


def test_brats_scales_a_volume_by_its_own_percentiles(tmp_path):
    write_layout("brats2021", tmp_path / "scans", 1, size=32, num_slices=12)
    scans = {"data_dir": str(tmp_path / "scans"), "split": "train"}
    options = {"level": "volume", "protocol": "brats", "routes": ["T1-T2"], "baseline": "copy"}
    evaluate(tmp_path / "run", **scans, **options)
    (record,) = records_of(tmp_path / "run")
    assert "scale" not in record["protocol"]  # its range is measured, whatever the scale
    rows = load_dataset("synermed", streaming=True, min_share=0.0, **scans)
    rows = [row for row in rows if row["target_modality"] == "T2"]
    wanted = np.stack([np.asarray(row["target_image"]) for row in rows if row["source_modality"] == "T1"])
    low, high = np.percentile(wanted[wanted > 0], [0.5, 99.5])
    # On the codec's scale, on which the window of each volume ends at 1000.
    scale = 1000 / rows[0]["target_window"]["high"]
    assert record["measured"]["range"] == pytest.approx([scale * low, scale * high], rel=1e-4) and low > 0


def test_a_volume_is_judged_as_the_challenge_would(tmp_path):
    """From the files alone: a CBCT that is copied, against the CT, inside the mask."""
    write_layout("synthrad2023-task2", tmp_path / "scans", 1, size=32, num_slices=10)
    blank(tmp_path / "scans", [0, 1, 9])
    scans = {"data_dir": tmp_path / "scans", "split": "train"}
    evaluate(tmp_path / "run", level="volume", routes=["CBCT-CT"], baseline="copy", **scans)
    (record,) = records_of(tmp_path / "run")
    cbct, ct, mask = (
        read_volume(next((tmp_path / "scans").rglob(f"{name}.nii.gz"))) for name in ("cbct", "ct", "mask")
    )
    check_alike(record["metrics"], evaluate_case(cbct, ct, mask, modality="CT")["metrics"], 1e-4)


def test_sources_are_read_through_the_windows_of_the_checkpoint(weights, scans, rows, tmp_path):
    """As they were in training: those of the data set are the usual ones, which this checkpoint does not have."""
    model = with_window(weights, tmp_path / "narrow", "CT", high=1000.0)
    options = {"data_dir": scans, "split": "train", "routes": ["CT-MRI"], "slice_step": 5}
    evaluate(tmp_path / "run", model=model, **options, **FAST)
    pipe = SynerMedGenPipeline.from_pretrained(model, print_report=False)
    by_name = {(row["case_id"], row["slice_index"]): row for row in rows if row["target_modality"] == "MRI"}
    record = records_of(tmp_path / "run")[0]
    row = by_name[record["case_id"], record["slice_index"]]
    asked = {"target": "MRI", "source": "CT", "region": row["region"], "seed": record["seed"], "output_type": "np"}
    made = pipe(np.asarray(row["source_image"]), **asked, **FAST).images[0]
    wanted = evaluation.true_target(pipe.processor.image_processor, row)
    judged = evaluate_case(made, wanted, mask=np.asarray(row["mask"], bool), modality="MRI", window=(0.0, 1000.0))
    check_alike(record["metrics"], judged["metrics"], 1e-3)
    # What is copied is read and answered through one window: -1024 to 1000 HU become 0 to 1000 of MR.
    evaluate(tmp_path / "copy", model=model, baseline="copy", **options)
    copied = (np.clip(np.asarray(row["source_image"]), -1024, 1000) + 1024) * 1000 / 2024
    judged = evaluate_case(copied, wanted, mask=np.asarray(row["mask"], bool), modality="MRI", window=(0.0, 1000.0))
    check_alike(records_of(tmp_path / "copy")[0]["metrics"], judged["metrics"], 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mapping_is_fitted_on_training_patients_alone(run, scans, rows):
    folder = run("mapping", baseline="mapping", split="test", routes=["brain/MRI-CT", "pelvis/MRI-CT"])
    tables = json.loads((folder / "mapping.json").read_text())
    assert tables == fit_mapping(rows, SynerMedGenImageProcessor(), ["brain/MRI-CT", "pelvis/MRI-CT"])
    trained = {row["case_id"] for row in rows}
    assert not trained & {record["case_id"] for record in records_of(folder)}


def test_baselines_are_no_model(run):
    folder = run("copy", baseline="copy", routes=["MRI-CT"])
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["baseline"] == "copy" and "checksum of the weights" not in arguments


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def refused(run, tmp_path, name="new", **arguments):
    """What is said, and that nothing was written."""
    with pytest.raises((OSError, ValueError)) as error:
        run(name, **arguments)
    assert not (tmp_path / name).exists()
    return str(error.value)


@pytest.fixture
def brain_only(weights, tmp_path):
    """The weights, as if they had been trained for one route."""
    model = Path(shutil.copytree(weights, tmp_path / "brain-only"))
    config = json.loads((model / "model" / "config.json").read_text())
    (model / "model" / "config.json").write_text(json.dumps({**config, "trained_routes": ["brain/MRI-CT"]}))
    return model


def test_routes_that_the_model_was_not_trained_for_are_refused_by_name(run, tmp_path, brain_only):
    said = refused(run, tmp_path, model=brain_only, routes=["MRI-CT"])
    assert said == "The model was not trained for pelvis/MRI-CT. It was trained for: brain/MRI-CT."
    with pytest.raises(ValueError, match="No case has one of the routes T1-T2"):
        run("new", routes=["T1-T2"])


def test_without_a_wish_only_trained_routes_are_evaluated_and_the_others_said(run, brain_only, caplog):
    summary = read_summary(run("some", model=brain_only))
    assert list(summary["routes"]) == summary["arguments"]["routes"] == ["brain/MRI-CT"]
    assert "not trained for them: brain/CT-MRI, pelvis/MRI-CT, pelvis/CT-MRI" in caplog.text


def test_routes_without_training_are_judged_where_that_is_asked_for(run, brain_only):
    folder = run("all", model=brain_only, untrained_routes=True, slice_step=5)
    assert set(read_summary(folder)["routes"]) == {
        f"{region}/{way}" for region in ("brain", "pelvis") for way in ("MRI-CT", "CT-MRI")
    }
    with pytest.raises(ValueError, match="holds answers to something else: .*untrained_routes"):
        run("all", model=brain_only, slice_step=5)


def test_cases_without_a_wanted_route_are_not_counted(run):
    summary = read_summary(run("pelvis", baseline="copy", routes=["pelvis/MRI-CT"]))
    assert summary["cases"]["without slices"] == 0 and 0 < summary["cases"]["found"] < 4


def test_a_route_that_no_case_of_the_split_has_is_said(run, caplog):
    summary = read_summary(run("test split", baseline="copy", split="test", slice_step=5))
    missing = [name for name in summary["arguments"]["routes"] if name not in summary["routes"]]
    assert missing and summary["cases"]["routes without cases"] == missing
    assert f"No case of the split test shows {', '.join(missing)}" in caplog.text


def test_weights_that_cannot_synthesise_are_not_asked(run, weights, tmp_path):
    model = Path(shutil.copytree(weights, tmp_path / "model"))
    config = json.loads((model / "model" / "config.json").read_text())
    (model / "model" / "config.json").write_text(json.dumps({**config, "missing_parts": ["generation"]}))
    assert "came without its generation weights" in refused(run, tmp_path, model=model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"data_dir": None}, "Pass either --data-dir or --phantom-cases"),
        ({"phantom_cases": 1}, "Pass either --data-dir or --phantom-cases"),
        ({"baseline": "magic"}, "magic"),
        ({"level": "patient"}, "patient"),
        ({"protocol": "mine"}, "mine"),
        ({"split": "exam"}, "exam"),
        ({"samples": 0}, "samples and batch_size must be at least 1"),
        ({"protocol": "brats"}, "brats scales by the 0.5th and 99.5th percentile of a volume"),
        ({"level": "volume", "slice_step": 2}, "leave --slice-step out"),
        ({"guidance_scale": -1.0}, "guidance_scale must be"),
        ({"routes": ["sideways"]}, "'sideways' names no route"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"phantom_slices": 4}, "phantom_slices would do nothing: they are of simulated patients"),
        ({"baseline": "copy", "guidance_scale": 0}, "guidance_scale would do nothing: they are of the model, and copy"),
        ({"baseline": "copy", "dtype": "bfloat16"}, "dtype would do nothing: it is of weights"),
        ({"baseline": "copy", "samples": 8}, "samples would do nothing: they are of the model, and copy"),
        ({"baseline": "copy", "untrained_routes": True}, "untrained_routes would do nothing"),
        ({"beside": ["nowhere"]}, "nowhere holds no finished evaluation"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(run, tmp_path, arguments, says):
    assert says in refused(run, tmp_path, **arguments)


def test_what_cannot_stand_beside_is_said_before_anything_is_written(run, whole, tmp_path):
    said = refused(run, tmp_path, baseline="copy", beside=[whole], protocol="paper_frame")
    assert said == f"{whole} cannot stand beside this evaluation: protocol synthrad2023 (here paper_frame)."
    said = refused(run, tmp_path, baseline="copy", beside=[whole], slice_step=2)
    assert said == f"{whole} cannot stand beside this evaluation: slice_step 1 (here 2)."
    said = refused(run, tmp_path, baseline="copy", beside=[whole], data_dir=None, phantom_cases=1, phantom_size=64)
    assert "phantom_cases None (here 1), phantom_size 128 (here 64)" in said


def test_mr_on_another_scale_cannot_stand_beside(run, whole, weights, tmp_path):
    model = with_window(weights, tmp_path / "scaled", "MRI", reference_high=500.0)
    said = refused(run, tmp_path, model=model, baseline="copy", beside=[whole])
    assert said == f"{whole} cannot stand beside this evaluation: scale of MRI 1000.0 (here 500.0)."
    run("apart", model=model, baseline="copy", beside=[whole], routes=["MRI-CT"])  # where no MR is made


def test_mr_that_the_other_does_not_make_may_be_on_any_scale(run, weights, tmp_path):
    one = run("one", baseline="copy", routes=["MRI-CT"])
    model = with_window(weights, tmp_path / "scaled", "MRI", reference_high=500.0)
    run("two", model=model, baseline="copy", beside=[one])


def test_the_authors_released_pictures_are_no_scans(run, tmp_path):
    write_layout("synermed", tmp_path / "released", 2, size=32)
    assert "8 bits over windows that nobody knows" in refused(run, tmp_path, data_dir=tmp_path / "released")


def test_another_evaluation_in_the_same_folder_is_refused(whole, run, tmp_path, brain_only):
    shutil.copytree(whole, tmp_path / "again")
    before = contents(tmp_path / "again")
    for arguments, says in (
        ({"seed": 5}, r"seed 0 \(now 5\)"),
        ({"routes": ["brain/MRI-CT"]}, "routes"),
        ({"num_inference_steps": 3}, "sampling"),
        ({"split": "test"}, "split 'train'"),
        ({"baseline": "copy"}, "baseline None"),
        ({"model": brain_only}, "model"),
    ):
        with pytest.raises(ValueError, match=f"holds answers to something else: .*{says}.*Choose another folder"):
            run("again", **arguments)
    assert contents(tmp_path / "again") == before


def test_other_scans_under_the_same_name_are_refused(run, scans, tmp_path):
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    run("again", data_dir=data, routes=["brain/MRI-CT"], baseline="copy")
    volume = next(data.rglob("mr.nii.gz"))
    shutil.copyfile(volume, tmp_path / "copy")
    os.utime(volume, (0, 0))  # written anew
    with pytest.raises(ValueError, match="something else: state of the data"):
        run("again", data_dir=data, routes=["brain/MRI-CT"], baseline="copy")


def test_a_folder_that_another_run_writes_to_is_left_alone(run, tmp_path):
    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"), pytest.raises(ValueError, match="Another run is writing to"):
        run("busy", baseline="copy")


def test_a_prediction_that_is_not_finite_is_named_and_the_rest_kept(whole, run, tmp_path, monkeypatch):
    synthesise = evaluation.Synthesis.__call__

    def spoiled(self, rows, seeds):
        made = synthesise(self, rows, seeds)
        if rows[0]["source_modality"] == "CT":
            made[-1][3, 4:6] = np.nan, np.inf
        return made

    monkeypatch.setattr(evaluation.Synthesis, "__call__", spoiled)
    with pytest.raises(ValueError, match=r"CT-MRI, slice \d+: of the prediction's \d+ values 2 are NaN or infinite"):
        run("again")
    monkeypatch.setattr(evaluation.Synthesis, "__call__", synthesise)
    assert contents(run("again")) == contents(whole)


def test_a_case_that_cannot_be_read_is_counted_and_said(run, scans, tmp_path, caplog):
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    first = load_dataset("synermed", data_dir=str(data), split="train", streaming=True)
    case = next(iter(first))["case_id"]
    (volume,) = data.rglob(f"{case}/mr.nii.gz")
    volume.write_bytes(volume.read_bytes()[:300])
    summary = read_summary(run("rest", data_dir=data, baseline="copy"))
    assert summary["cases"]["without slices"] == 1 and "1 of" in caplog.text and "report.jsonl" in caplog.text
    assert case not in {record["case_id"] for record in records_of(tmp_path / "rest")}


def test_a_case_that_was_repaired_is_counted_and_said(run, scans, tmp_path, caplog):
    """A reference that is not as it was found: who reads the figures must know."""
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    case = next(iter(load_dataset("synermed", data_dir=str(data), split="train", streaming=True)))["case_id"]
    (file,) = data.rglob(f"{case}/ct.nii.gz")
    image = nibabel.load(file)
    voxels = image.get_fdata(dtype=np.float32)
    voxels[0, 0, :2] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    folder = run("repaired", data_dir=data, baseline="copy")
    assert read_summary(folder)["cases"]["repaired"] == 1
    assert "1 of 4 cases were repaired" in caplog.text
    assert "1 repaired" in (folder / "report.html").read_text()
    assert {record["case_id"] for record in records_of(folder) if record.get("repaired")} == {case}


def test_what_was_repaired_before_an_interruption_is_counted(run, scans, tmp_path, monkeypatch):
    """The report of the data set is in a cache, which may be another one, or empty, when the run goes on."""
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    for file in data.rglob("ct.nii.gz"):
        image = nibabel.load(file)
        voxels = np.clip(image.get_fdata(dtype=np.float32), -1024, None) + 1024
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    monkeypatch.setattr(evaluation, "_gather", None)
    with pytest.raises(TypeError):
        run("repaired", data_dir=data, baseline="copy")
    monkeypatch.undo()
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / "synermed-reports")
    assert read_summary(run("repaired", data_dir=data, baseline="copy"))["cases"]["repaired"] == 4


def test_what_an_earlier_version_called_repaired_does_not_count(run, scans, tmp_path, caplog):
    """The report of a data set is added to, by whatever read it."""
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    folder = run("one", data_dir=data, baseline="copy")
    said = next(message for message in caplog.messages if "Splits and report" in message)
    report = Path(said.rsplit("report: ", 1)[1]) / "report.jsonl"
    problem = {"kind": "repaired", "case": "synthrad2023/" + records_of(folder)[0]["case_id"], "path": "", "reason": ""}
    report.write_text(json.dumps(problem) + "\n")
    assert read_summary(run("two", data_dir=data, baseline="copy"))["cases"]["repaired"] == 0


def test_slices_whose_mask_is_empty_do_not_spoil_a_volume(run, scans, tmp_path):
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    case = next(iter(load_dataset("synermed", data_dir=str(data), split="train", streaming=True)))["case_id"]
    (file,) = data.rglob(f"{case}/mask.nii.gz")
    image = nibabel.load(file)
    voxels = np.asarray(image.dataobj).copy()
    voxels[:, :, 2] = 0
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    folder = run("empty", data_dir=data, baseline="copy", level="volume", protocol="paper_frame")
    empty = [record for record in records_of(folder) if record["case_id"] == case]
    whole = [record for record in records_of(run("whole", baseline="copy", level="volume", protocol="paper_frame"))]
    assert len(empty) == 2 and len(whole) == len(records_of(folder))
    assert all(record["metrics"]["psnr_u8_mask"] is not None for record in empty)
    assert all(record["measured"]["voxels"] == np.count_nonzero(voxels) for record in empty)


def test_a_case_without_a_mask_is_not_called_repaired(run, scans, tmp_path):
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    for mask in data.rglob("mask.nii.gz"):
        mask.unlink()
    assert read_summary(run("maskless", data_dir=data, baseline="copy"))["cases"]["repaired"] == 0


def test_what_a_run_left_that_was_killed_at_its_end_is_removed(run, tmp_path):
    folder = run("killed", baseline="copy")
    (folder / "parts").mkdir()
    (folder / "parts" / "000000.jsonl").write_text("{}")
    (folder / "cases.jsonl.123.tmp").write_text("{}")
    run("killed", baseline="copy")
    assert not (folder / "parts").exists() and not list(folder.glob("*.tmp"))


def test_other_scans_of_the_same_names_and_masks_are_told(run, scans, tmp_path):
    """Such as a data set that was preprocessed in two ways, here mirrored."""
    data = Path(shutil.copytree(scans, tmp_path / "data"))
    for file in data.rglob("mr.nii.gz"):
        image = nibabel.load(file)
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32)[::-1], image.affine), file)
    options = {"baseline": "copy", "routes": ["CT-MRI"]}
    one, other = run("one", **options), run("other", data_dir=data, **options)
    with pytest.raises(ValueError, match="was not measured alike in both .*: the reference's values"):
        compare(one, other)
    with pytest.raises(ValueError, match="one is of other cases of .*/CT-MRI than"):
        run("other", data_dir=data, beside=[one], **options)
