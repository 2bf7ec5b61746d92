"""The example scripts, run for real at tiny size: train, resume, evaluate, demonstrate, measure."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nibabel import Nifti1Image
from PIL import Image
from safetensors.torch import load_file, save_file
from training import EXAMPLES, fill_disk, load_script

from synermedgen_hf import ROUTES, SynerMedGenImageProcessor, SynerMedGenPipeline
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.data.phantom import simulate_case
from synermedgen_hf.image_processing_synermedgen import unpatchify

sys.path.append(str(EXAMPLES))


def run(script: str, *arguments):
    """`python examples/SCRIPT.py ARGUMENTS`, in this process."""
    module = load_script(script)
    if arguments:
        module.main(module.parse_args([str(argument) for argument in arguments]))
    return module


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(work):
    return ["--cache_dir", work / "phantom", "--train_cases", 1, "--slices_per_case", 1, "--num_proc", 1]


def train_vae(folder, data, steps, *more):
    sizes = ["--block_out_channels", 8, 8, 8, "--train_batch_size", 2, "--checkpointing_steps", 2]
    run("train_vae", "--output_dir", folder, "--resolution", 64, *sizes, "--max_train_steps", steps, *data, *more)


@pytest.fixture(scope="module")
def vae(work, data):
    train_vae(work / "vae", data, 4)
    return work / "vae"


@pytest.fixture(scope="module")
def start(work, vae):
    """An untrained pipeline around that autoencoder."""
    sizes = ["--resolution", 64, "--hidden_size", 64, "--intermediate_size", 64, "--num_hidden_layers", 1]
    sizes += ["--vit_hidden_size", 32, "--vit_layers", 1]
    run("init_tiny", "--vae", vae / "vae", "--output_dir", work / "start", *sizes)
    return work / "start"


def train_generation(folder, start, data, steps, *more):
    options = ["--train_batch_size", 4, "--checkpointing_steps", 2, "--logging_steps", 1, "--freeze", "none"]
    options += ["--max_train_steps", steps, "--lr_scheduler", "constant"]
    run("train_generation", "--pretrained_model_name_or_path", start, "--output_dir", folder, *options, *data, *more)


@pytest.fixture(scope="module")
def trained(work, start, data):
    train_generation(work / "trained", start, data, 4, "--sampling_steps", 2, "--guidance_scale", 1.0)
    return work / "trained"


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_autoencoder_is_saved_with_the_scale_of_its_latents(vae):
    config = json.loads((vae / "vae" / "config.json").read_text())
    assert config["scaling_factor"] not in (1.0, 0.18215) and config["shift_factor"] != 0
    assert json.loads((vae / "training_args.json").read_text())["max_train_steps"] == 4


def test_training_the_autoencoder_resumes_from_the_newest_checkpoint_that_is_whole(work, data, monkeypatch):
    import train_generation

    folder = work / "vae_resumed"
    with monkeypatch.context() as patch:
        fill_disk(patch, train_generation, "checkpoint-4")
        with pytest.raises(OSError, match="No space left on device"):
            train_vae(folder, data, 6)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4.unfinished"}
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "l')  # killed while it was written
    train_vae(folder, data, 6, "--resume_from_checkpoint", "latest")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_training_the_autoencoder_stops_at_a_gradient_that_is_no_number(work, data):
    folder = work / "vae_nan"
    with pytest.raises(FloatingPointError, match="The gradient of step 1 is not a number"):
        train_vae(folder, data, 4, "--learning_rate", 1e30, "--lr_warmup_steps", 0, "--checkpointing_steps", 1)
    (whole,) = folder.glob("checkpoint-*")
    assert whole.name == "checkpoint-1" and not (folder / "vae").exists()


def test_the_toy_takes_the_windows_of_its_autoencoder(vae, start, tmp_path):
    taken = SynerMedGenPipeline.from_pretrained(start).processor.image_processor
    assert taken.intensity == SynerMedGenImageProcessor.from_pretrained(vae / "vae").intensity
    shutil.copytree(vae / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "preprocessor_config.json").unlink()
    with pytest.raises(SystemExit, match="no preprocessor_config.json, the windows it was trained on"):
        run("init_tiny", "--vae", tmp_path / "vae", "--output_dir", tmp_path / "start")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--intensity", "windows.json"], "windows.json has windows of pet; modalities are CT,"),
        (["--routes", "CT-PET"], "--routes needs --data_dir or --phantom_cases"),
        (["--intensity", "narrow.json", "--codec", "bands"], "narrow.json has windows of PET without bands"),
    ],
)
def test_what_an_autoencoder_would_not_heed_is_refused(work, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("windows.json").write_text(json.dumps({"pet": {"unit": "SUV", "low": 0, "high": 40, "scale": "linear"}}))
    Path("narrow.json").write_text(json.dumps({"PET": {"unit": "SUV", "low": 0, "high": 5, "scale": "linear"}}))
    with pytest.raises(SystemExit, match=said):
        train_vae(tmp_path / "out", arguments, 2)


def test_an_autoencoder_of_own_scans_sees_each_slice_once_in_own_windows(work):
    write_layout("synthrad2023-task1", work / "scans", subjects=4, size=32, num_slices=6)
    windows = {"CT": {"unit": "HU", "low": -100.0, "high": 200.0, "scale": "linear"}}
    (work / "windows.json").write_text(json.dumps(windows))
    scans = ["--data_dir", work / "scans", "--intensity", work / "windows.json", "--num_proc", 1]
    train_vae(work / "vae_of_scans", scans, 2)
    assert (work / "vae_of_scans" / "vae" / "config.json").exists()
    with pytest.raises(SystemExit, match="was trained on other windows than these: start anew"):
        train_vae(work / "vae_of_scans", [*scans[:2], "--num_proc", 1], 4, "--resume_from_checkpoint", "latest")

    again = [*scans, "--resume_from_checkpoint", "latest"]
    train_vae(work / "vae_of_scans", again, 4)
    write_layout("synthrad2023-task1", work / "more scans", subjects=5, size=32, num_slices=6)
    with pytest.raises(SystemExit, match="The data are not those that .* was trained on"):
        train_vae(work / "vae_of_scans", ["--data_dir", work / "more scans", *again[2:]], 6)

    script = run("train_vae")
    rows = script.load_pairs(script.parse_args(list(map(str, ["--output_dir", work, *scans]))), "train", False, 1)
    size = {"max_size": 64, "min_size": 64, "stride": 16, "max_pixels": 14112 * 128}
    usual = SynerMedGenImageProcessor(vae_size=size)
    own = SynerMedGenImageProcessor(vae_size=size, intensity={**usual.intensity, **windows})
    data, slices = script.encode_pairs(rows, own), rows.filter(lambda row: row["source_modality"] == "CT")
    assert data.shape == (2 * len(slices), 1, 64, 64)
    wanted = own.preprocess_slice(slices[0]["source_image"], "CT").vae_pixels[:1].half()
    assert any(one.equal(wanted) for one in data)
    assert not any(one.equal(wanted) for one in script.encode_pairs(rows, usual))


def test_a_resumed_training_is_identical_to_an_uninterrupted_one(trained, work, start, data):
    train_generation(work / "resumed", start, data, 2)
    train_generation(work / "resumed", start, data, 4, "--resume_from_checkpoint", "latest")
    whole = load_file(trained / "pipeline" / "model" / "model.safetensors")
    resumed = load_file(work / "resumed" / "pipeline" / "model" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not whole[name].equal(resumed[name])] == []
    assert [row["loss_mse"] for row in log(trained)] == [row["loss_mse"] for row in log(work / "resumed")]


@pytest.mark.parametrize("train", [train_vae, train_generation])
def test_a_folder_that_holds_a_training_is_not_written_over(train, vae, trained, start, data):
    folder, needed = (vae, []) if train is train_vae else (trained, [start])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="holds an earlier training.*--resume_from_checkpoint latest"):
        train(folder, *needed, data, 4)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_log_holds_every_step_once(trained, work, start, data):
    train_generation(work / "logged", start, data, 2)
    with open(work / "logged" / "log.jsonl", "a") as file:
        file.write(
            '{"step": 3, "loss_mse": 0.0, "lr": 0.0, "minutes": 0.1}\n'
        )  # logged, then killed before it was saved
    train_generation(work / "logged", start, data, 4, "--resume_from_checkpoint", "latest")
    assert [row["step"] for row in log(work / "logged")] == [1, 2, 3, 4]
    assert [row["loss_mse"] for row in log(work / "logged")] == [row["loss_mse"] for row in log(trained)]


def test_training_moves_the_generation_expert(trained, start):
    before = load_file(start / "model" / "model.safetensors")
    after = load_file(trained / "pipeline" / "model" / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert {"llm2vae.weight", "model.language_model.layers.0.mlp_moe_gen.up_proj.weight"} <= moved


def test_finer_tokens_read_and_write_what_larger_ones_did(trained, work):
    run("finer_tokens", "--pretrained_model_name_or_path", trained / "pipeline", "--output_dir", work / "finer")
    old, new = (SynerMedGenPipeline.from_pretrained(run / "pipeline") for run in (trained, work / "finer"))
    assert (old.model.config.latent_patch_size, new.model.config.latent_patch_size) == (4, 2)
    assert old.model.generation_config.to_dict() == new.model.generation_config.to_dict()
    channels, generator = old.model.config.latent_channels, torch.Generator().manual_seed(0)
    small, hidden = torch.randn(3, 2 * 2 * channels, generator=generator), torch.randn(3, 64, generator=generator)
    with torch.no_grad():
        large = small.unflatten(1, (2, 2, channels)).tile(2, 2, 1).flatten(1)
        torch.testing.assert_close(new.model.model.vae2llm(small), old.model.model.vae2llm(large))
        # unpatchify puts the tokens' rows, columns and channels in their places
        written, finer = unpatchify(old.model.llm2vae(hidden[:1]), (1, 1), 4), new.model.llm2vae(hidden[:1])
        quarters = [written[:, row : row + 2, column : column + 2] for row in (0, 2) for column in (0, 2)]
        torch.testing.assert_close(unpatchify(finer, (1, 1), 2), torch.stack(quarters).mean(0))
    before, after = old.model.state_dict(), new.model.state_dict()
    unlike = {name for name in before if before[name].shape != after[name].shape or not before[name].equal(after[name])}
    assert unlike == {"model.vae2llm.weight", "llm2vae.weight", "llm2vae.bias"}
    image = np.random.default_rng(0).uniform(0, 1000, (48, 48)).astype(np.float32)
    made = new(image, source="MRI", target="CT", output_type="np", num_inference_steps=2, seed=0).images[0]
    assert made.shape == image.shape and np.isfinite(made).all()


def test_tokens_that_cannot_be_halved_are_refused(start, work):
    halved = [start, work / "halved" / "pipeline", work / "quartered" / "pipeline", work / "eighths" / "pipeline"]
    for before, after in itertools.pairwise(halved[:3]):
        run("finer_tokens", "--pretrained_model_name_or_path", before, "--output_dir", after.parent)
    with pytest.raises(SystemExit, match="A token of 1 latent positions a side cannot be halved"):
        run("finer_tokens", "--pretrained_model_name_or_path", halved[2], "--output_dir", halved[3].parent)
    pipe = SynerMedGenPipeline.from_pretrained(start)
    pipe.model.config.max_latent_size = 7
    with pytest.raises(SystemExit, match="up to 64 pixels a side would have more than the 7 tokens of 8 pixels"):
        load_script("finer_tokens").with_finer_tokens(pipe)


@pytest.mark.slow
def test_a_base_learns_to_see_and_to_answer_and_goes_on_where_it_stopped(work, start):
    sizes = ["--train_cases", 1, "--contrast_steps", 2, "--contrast_volumes", 2]
    sizes += ["--places_steps", 2, "--places_batch_size", 2]  # the first step has no learning rate yet
    sizes += ["--letters_steps", 1, "--letters_batch_size", 4, "--names_steps", 1, "--names_batch_size", 4]
    sizes += ["--changes_steps", 1, "--changes_batch_size", 4]
    sizes += ["--num_proc", 1, "--cache_dir", work / "phantom"]
    common = ["--pretrained_model_name_or_path", start, *sizes, "--output_dir"]

    def pretrain(folder, *more):  # in a process of its own: it simulates in others
        command = [sys.executable, EXAMPLES / "pretrain_tiny.py", *common, folder, *more]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)

    pretrain(work / "base")
    before = load_file(start / "model" / "model.safetensors")
    after = load_file(work / "base" / "model" / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert any("vision" in name for name in moved) and any("mlp.up_proj" in name for name in moved)
    assert not any("moe_gen" in name or "vae" in name or "time_embedder" in name for name in moved)
    log = [json.loads(line) for line in (work / "base" / "log.jsonl").open()]
    assert [row["training"] for row in log] == ["eyes", "eyes", "places", "places", "letters", "names", "changes"]
    assert all(np.isfinite(row["loss"]) for row in log)

    # Killed after the first training, as it was then.
    half = work / "half-a-base"
    half.mkdir()
    (half / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log[:2]))
    save_file(
        {name: after[name].float() for name in after if "vision" in name or "connector" in name},
        half / "eyes.safetensors",
    )
    pretrain(half)
    again = load_file(half / "model" / "model.safetensors")
    assert again.keys() == after.keys() and all(again[name].equal(after[name]) for name in after)
    assert [json.loads(line) for line in (half / "log.jsonl").open()] == log


def test_detached_training_leaves_the_understanding_branch_alone(work, start, data):
    train_generation(work / "detached", start, data, 2, "--freeze", "detach")
    before = load_file(start / "model" / "model.safetensors")
    after = load_file(work / "detached" / "pipeline" / "model" / "model.safetensors")
    moved = [name for name in before if not before[name].equal(after[name])]
    assert moved and all(
        any(part in name for part in ("_moe_gen", "vae2llm", "llm2vae", "time_embedder")) for name in moved
    )


def test_the_saved_pipeline_knows_its_routes_and_its_sampling(trained):
    config = SynerMedGenPipeline.from_pretrained(trained / "pipeline").model.config
    assert config.trained_routes == [route.name for route in ROUTES] and len(ROUTES) == 22
    assert config.trained_tasks == []
    assert "simulated scans. Not for clinical use" in config.notice
    assert config.sampling == {"num_inference_steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.5}


def test_the_demo_writes_a_contact_sheet_and_a_report(trained, work):
    run("demo", "--model", trained / "pipeline", "--output_dir", work / "demo")
    report = json.loads((work / "demo" / "report.json").read_text())
    assert report["cases"][0]["title"].startswith("Real MR template") and report["cases"][0]["metrics"] is None
    assert {case["route"].split("/")[0] for case in report["cases"]} == {"brain", "pelvis", "whole-body"}
    assert all(case["metrics"] for case in report["cases"][1:])
    assert "Not for clinical use" in report["notice"]
    sheet = Image.open(work / "demo" / "contact_sheet.png")
    assert min(sheet.size) > 800 and len(sheet.convert("L").getcolors()) > 100


@pytest.fixture
def scans(tmp_path):
    case = simulate_case("brain", "brats", 3, num_slices=6)
    for name in ("T1", "T2"):
        volume = case.images[name].transpose(2, 1, 0)[::-1, ::-1]
        Nifti1Image(volume, np.diag([2.0, 2.0, 4.0, 1.0])).to_filename(tmp_path / f"{name}.nii.gz")
    return [f"{name}={tmp_path / name}.nii.gz" for name in ("T1", "T2")]


def test_a_look_shows_each_scan_of_a_grid_become_the_other(trained, scans, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run("demo"), "draw", lambda rows, notice, path: drawn.extend(rows))
    run("look", *scans, "--targets", "FLAIR", "--model", trained / "pipeline", "--output", tmp_path / "look.png")
    assert [(row["source"], row["target"]) for row in drawn] == [
        ("T1", "T2"),
        ("T1", "FLAIR"),
        ("T2", "T1"),
        ("T2", "FLAIR"),
    ]
    assert (drawn[0]["reference"] == drawn[2]["image"]).all() and drawn[1]["reference"] is None
    assert "metrics" not in drawn[0]  # a look, and no figure


def test_a_look_is_drawn(trained, scans, tmp_path):
    run("look", *scans, "--model", trained / "pipeline", "--output", tmp_path / "new" / "look.png")
    assert min(Image.open(tmp_path / "new" / "look.png").size) > 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height", "999"], "outside of the scan, which goes from 0 to 20 mm"),
        (["MRI=other.nii.gz"], "different grids"),
        (["XR=other.nii.gz"], "'XR=other.nii.gz' is not MODALITY=FILE"),
        (["CT=nothing.nii.gz"], "there is no file nothing.nii.gz"),
        (["MRI=oblique.nii.gz"], "oblique.nii.gz is no volume along the body's axes"),
    ],
)
def test_a_look_refuses_what_it_cannot_show(trained, scans, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)).to_filename("other.nii.gz")
    turned = np.array([[1, -0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    Nifti1Image(np.ones((4, 4, 4), np.float32), turned).to_filename("oblique.nii.gz")
    with pytest.raises(SystemExit) as refused:
        run("look", *scans, *arguments, "--model", trained / "pipeline")
    assert said in str(refused.value) + capsys.readouterr().err


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_an_axial_slice_shows_anterior_up_and_the_right_on_the_left(signs):
    data = np.zeros((4, 5, 6), np.float32)
    # A marker at x = 3 (right), y = 4 (front), z = 2, in voxels of 1 mm that run either way along each axis.
    place = [p if sign > 0 else n - 1 - p for p, sign, n in zip((3, 4, 2), signs, data.shape, strict=True)]
    data[tuple(place)] = 1
    affine = np.diag([*signs, 1.0])
    affine[:3, 3] = [0 if sign > 0 else n - 1 for sign, n in zip(signs, data.shape, strict=True)]
    image = run("demo").axial_slice(Nifti1Image(data, affine), 2.0)
    assert image.shape == (5, 4) and np.argwhere(image).tolist() == [[0, 0]]


@pytest.mark.slow
def test_the_benchmark_compares_with_the_ideal_and_with_recomputing(work):
    run("benchmark", "--only", "W1", "W2", "cache", "--repeats", 1, "--output", work / "mid.json")
    figures = json.loads((work / "mid.json").read_text())
    assert figures["W1"]["ratio"] > 1 and figures["W2"]["ratio"] > 1
    assert figures["W1"]["seconds"] > figures["W2"]["seconds"]
    assert figures["cache"]["recomputed_to_cached"] > 1


@pytest.mark.slow
def test_the_benchmark_measures_training_steps(trained, work):
    run(
        "benchmark",
        "--training",
        "--model",
        trained / "pipeline",
        "--steps",
        10,
        "--repeats",
        1,
        "--output",
        work / "t",
    )
    figures = json.loads((work / "t").read_text())
    assert figures["W4"]["ratio"] > 1 and figures["W4"]["pairs_per_second"] > 0
    assert figures["detach"]["kept_passing_through_to_detached"] > 1


def test_the_step_of_a_wide_model_is_held_against_a_bare_product(monkeypatch):
    benchmark = run("benchmark")
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    figures = benchmark.measure_wide("cpu", 1, widths | {"num_attention_heads": 2, "num_key_value_heads": 1}, 256)
    assert figures["tokens_per_second"] > 0 and figures["tflop_per_second"] > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        benchmark.benchmark_gpu(None)


def test_the_benchmark_states_ratios(trained, work):
    run("benchmark", "--model", trained / "pipeline", "--only", "tiny", "--repeats", 1, "--output", work / "speed.json")
    figures = json.loads((work / "speed.json").read_text())["tiny"]
    assert figures["seconds_one_synthesis"] > 0 and 0 < figures["batch_of_8_to_8_singles"] < 3
