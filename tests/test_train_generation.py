"""Stage II run for real at tiny size: what is learned, what stays, what survives a kill, what is refused and saved."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, load_dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import EXAMPLES, fill_disk, in_processes, killed, load_script

from synermedgen_hf import SynerMedGenImageProcessor, SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.data.pairs import PAIR_FEATURES
from synermedgen_hf.loading_synermedgen import part_of
from synermedgen_hf.metrics.baselines import Ceiling, true_target
from synermedgen_hf.metrics.protocols import evaluate_case
from synermedgen_hf.modeling_synermedgen import SynerMedGenAttention

SCRIPT, RECIPES = EXAMPLES / "train_generation.py", sorted((EXAMPLES / "recipes").glob("generation*.yaml"))
WEIGHTS = "pipeline/model/model.safetensors"
# Read by PEFT off every model it wraps.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

USUAL = {
    "mixed_precision": "no",
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "ema_decay": 0.9,
    "logging_steps": 1,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 9,
    "max_train_steps": 6,
    "num_proc": 1,
}
STREAM = {"streaming": True, "stream_pool": 5}
LORA = {"lora_rank": 2, "learning_rate": 0.01, "lora_dropout": 0.1}
MODES = {
    "detach": {},
    "none": {"freeze": "none", "lr_scheduler": "cosine"},
    "accumulated": {"gradient_accumulation_steps": 2, "freeze": "grad"},
    "Muon": {"muon_learning_rate": 0.02, "lr_scheduler": "cosine"},
    "8 bit": {"use_8bit_adam": True},
    "stream": STREAM,
    "LoRA": LORA,
}


def command_line(options):
    arguments = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not False:
            arguments += [f"--{name}", *([] if value is True else map(str, values))]
    return arguments


@pytest.fixture(scope="module")
def script():
    return load_script("train_generation")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("stage two")


@pytest.fixture(scope="module")
def arguments(start, scans):
    """The command line of a training into a folder."""

    def arguments(folder, **options):
        paths = {"pretrained_model_name_or_path": start, "data_dir": scans, "output_dir": folder}
        return command_line({**paths, **USUAL, **options})

    return arguments


@pytest.fixture(scope="module")
def train(script, arguments):
    """`python examples/train_generation.py ...` in this process."""

    def train(folder, **options):
        try:
            script.main(script.parse_args(arguments(folder, **options)))
        finally:
            # The next one may be of another precision.
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        return folder

    return train


@pytest.fixture(scope="module")
def uninterrupted(train, work):
    """A training in one of the modes that nobody disturbed."""
    return functools.cache(lambda mode: train(work / f"whole {mode}", **MODES[mode]))


@pytest.fixture(scope="module")
def trained(uninterrupted):
    return uninterrupted("detach")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss_mse"] for row in log(folder) if "loss_mse" in row]


def weights(folder):
    return load_file(folder / WEIGHTS)


def result(folder):
    """The bytes of all that was trained."""
    adapter = folder / "adapter_model.safetensors"
    return (adapter if adapter.exists() else folder / WEIGHTS).read_bytes()


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# What is learned
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["detach", "accumulated"])
def test_the_understanding_branch_and_the_vae_stay_and_the_generation_expert_learns(uninterrupted, start, mode):
    before, after = load_file(start / "model" / "model.safetensors"), weights(uninterrupted(mode))
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if part_of(name) == "generation"}
    assert {"model.vae2llm.weight", "llm2vae.bias", "model.time_embedder.linear_1.weight"} < moved
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (uninterrupted(mode) / "pipeline" / vae).read_bytes() == (start / vae).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [{}, {**LORA, "merge_adapter": True}], ids=["detach", "LoRA"])
def test_what_is_frozen_is_saved_to_the_bit_as_the_start_stores_it(train, start, tmp_path, mode, dtype):
    """In half precision, where adapters are trained beside rounded weights."""
    SynerMedGenPipeline.from_pretrained(start, dtype={"model": dtype}).save_pretrained(tmp_path / "start")
    options = {"pretrained_model_name_or_path": tmp_path / "start", "mixed_precision": "bf16", "max_train_steps": 2}
    train(tmp_path / "out", **options, **mode)
    before, after = load_file(tmp_path / "start" / "model" / "model.safetensors"), weights(tmp_path / "out")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {dtype}
    assert {part_of(name) for name in before if not before[name].equal(after[name])} == {"generation"}
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "pipeline" / vae).read_bytes() == (start / vae).read_bytes()


def test_nothing_but_the_last_word_of_understanding_is_left_out_when_nothing_is_frozen(uninterrupted, start):
    before, after = load_file(start / "model" / "model.safetensors"), weights(uninterrupted("none"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert {"model.language_model.embed_tokens.weight", "model.connector.fc1.weight"} < moved
    assert "lm_head.weight" not in moved


def test_detaching_gives_other_gradients_than_freezing(train, trained, tmp_path):
    train(tmp_path / "grad", freeze="grad")
    assert losses(tmp_path / "grad")[0] == losses(trained)[0]
    assert losses(tmp_path / "grad")[-1] != losses(trained)[-1]


def test_every_target_token_counts_the_same_however_a_step_is_cut(train, tmp_path):
    """4 samples as one batch, as two of two, and as four of one."""
    cuts = [{"train_batch_size": 4 // parts, "gradient_accumulation_steps": parts} for parts in (1, 2, 4)]
    folders = [train(tmp_path / str(number), max_train_steps=3, **cut) for number, cut in enumerate(cuts)]
    for folder in folders[1:]:
        assert losses(folder) == pytest.approx(losses(folders[0]), abs=1e-4)
        assert largest_difference(weights(folder), weights(folders[0])) < 1e-4


def test_what_is_saved_is_the_moving_average(train, tmp_path):
    train(tmp_path / "average", ema_decay=0.9)
    train(tmp_path / "last", ema_decay=0)
    assert losses(tmp_path / "average") == losses(tmp_path / "last")
    assert largest_difference(weights(tmp_path / "average"), weights(tmp_path / "last")) > 1e-5


def test_the_saved_pipeline_knows_its_routes(trained):
    pipe = SynerMedGenPipeline.from_pretrained(trained / "pipeline")
    wanted = {f"{region}/{route}" for region in ("brain", "pelvis") for route in ("MRI-CT", "CT-MRI")}
    assert set(pipe.model.config.trained_routes) == wanted
    card = (trained / "pipeline" / "README.md").read_text()
    assert "Stage II (6 steps) on SynthRAD2023." in card and "simulated" not in card


def test_adapters_are_those_of_the_generation_expert_alone(uninterrupted, train, start, tmp_path):
    names = load_file(uninterrupted("LoRA") / "adapter_model.safetensors").keys()
    assert names and all("_moe_gen" in name and ".lora_" in name for name in names)
    assert not (uninterrupted("LoRA") / "pipeline").exists()
    train(tmp_path / "merged", merge_adapter=True, **LORA)
    before, after = load_file(start / "model" / "model.safetensors"), weights(tmp_path / "merged")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all(re.search(r"_(proj_moe_gen|moe_gen\.\w+_proj)\.weight", name) for name in moved)


def test_an_adapter_is_published_where_no_pipeline_is(train, hub, start, tmp_path):
    options = {"max_train_steps": 1, "push_to_hub": True, **LORA}
    train(tmp_path / "adapter", hub_model_id="lab/stage-two-lora", **options)
    pushed = hub.files("lab/stage-two-lora")
    assert b"Not for clinical use" in pushed["README.md"] and b"Stage II (1 steps)" in pushed["README.md"]
    assert pushed.keys() - {".gitattributes"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert pushed["adapter_model.safetensors"] == result(tmp_path / "adapter")
    SynerMedGenPipeline.from_pretrained(start).load_lora_weights("lab/stage-two-lora")
    train(tmp_path / "merged", hub_model_id="lab/stage-two-merged", merge_adapter=True, **options)
    pushed = hub.files("lab/stage-two-merged")
    assert "model/model.safetensors" in pushed and "adapter_model.safetensors" not in pushed


@pytest.mark.parametrize("mode", ["detach", "LoRA"])
def test_gradient_checkpointing_gives_the_same_losses(train, tmp_path, monkeypatch, mode):
    calls, attend = [], SynerMedGenAttention.attend
    monkeypatch.setattr(SynerMedGenAttention, "attend", lambda *args, **kw: calls.append(1) or attend(*args, **kw))
    train(tmp_path / "plain", **MODES[mode])
    without = len(calls)
    train(tmp_path / "out", gradient_checkpointing=True, **MODES[mode])
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert len(calls) - without == 2 * without  # each layer once more


def test_half_precision_trains_float32_weights(train, trained, tmp_path):
    train(tmp_path / "out", mixed_precision="bf16")
    assert losses(tmp_path / "out") == pytest.approx(losses(trained), rel=0.05)
    assert losses(tmp_path / "out") != losses(trained)


def test_validation_judges_fixed_slices_and_changes_nothing(train, trained, tmp_path):
    pytest.importorskip("skimage")
    train(tmp_path / "out", validation_steps=3, validation_images=2, sampling_steps=2, guidance_scale=1)
    assert losses(tmp_path / "out") == losses(trained)
    assert result(tmp_path / "out") == result(trained)
    rows = [row for row in log(tmp_path / "out") if "loss_mse" not in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert {f"validation/loss_mse/t={t}" for t in (0.125, 0.375, 0.625, 0.875)} < rows[0].keys()
    saved = json.loads((tmp_path / "out" / "validation" / "6.json").read_text())
    assert len(saved["slices"]) == 2 and all(row["protocol"] for row in saved["slices"])
    figures = {name.removeprefix("validation/"): value for name, value in rows[1].items() if name != "step"}
    made = {name for name in figures if not name.startswith(("loss_mse", "copy", "ceiling"))}
    assert made and {f"{beside}/{name}" for beside in ("copy", "ceiling") for name in made} == saved["beside"].keys()
    assert saved["beside"].items() < figures.items()
    assert min(Image.open(tmp_path / "out" / "validation" / "6.png").size) > 100


def test_validation_reads_grey_levels_in_the_window_that_training_reads_them_in(train, scans, tmp_path, monkeypatch):
    """Pictures of 8 bits, as the released ones: their levels are no HU."""
    pytest.importorskip("skimage")
    grey = {"unit": "grey level", "low": 0.0, "high": 255.0}

    def as_picture(row):
        sides = {
            name: Image.fromarray(np.uint8(np.clip(row[name], 0, 255))) for name in ("source_image", "target_image")
        }
        return {**row, **sides, "source_window": grey, "target_window": grey}

    for split in ("train", "validation"):
        rows = load_dataset("synermed", "pairs", data_dir=str(scans), split=split, routes=["CT-MRI"], slice_step=8)
        rows = [as_picture(row) for row in rows]
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=PAIR_FEATURES).to_parquet(tmp_path / "pictures" / f"{split}.parquet")
    windows, preprocess = [], SynerMedGenImageProcessor.preprocess_slice

    def noted(self, image, modality=None, window=None):
        if modality == "CT":
            windows.append((getattr(image, "mode", "array"), window))
        return preprocess(self, image, modality, window)

    monkeypatch.setattr(SynerMedGenImageProcessor, "preprocess_slice", noted)
    options = {"dataset_name": "parquet", "dataset_config_name": "default", "data_dir": tmp_path / "pictures"}
    train(tmp_path / "out", **options, max_train_steps=1, validation_steps=1, validation_images=1, sampling_steps=1)
    assert set(windows) == {("L", (0.0, 255.0))} and len(windows) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_training_killed_twice_is_identical_to_an_uninterrupted_one(uninterrupted, train, tmp_path, mode):
    whole = uninterrupted(mode)
    once = killed(whole, tmp_path / "once", keep=2)
    train(once, resume_from_checkpoint="latest", **MODES[mode])
    twice = killed(once, tmp_path / "twice", keep=4)
    train(twice, resume_from_checkpoint="latest", **MODES[mode])
    for folder in (once, twice):
        assert losses(folder) == losses(whole) and len(losses(whole)) == 6
        assert result(folder) == result(whole)


def test_a_checkpoint_holds_what_is_trained_alone(trained, uninterrupted):
    frozen = [
        name
        for name in load_file(trained / "checkpoint-6" / "model.safetensors")
        if part_of(name) in ("understanding", "vision")
    ]
    assert frozen == []
    adapter = load_file(uninterrupted("LoRA") / "checkpoint-6" / "model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)


def test_old_checkpoints_go_when_the_new_one_is_whole(train, tmp_path):
    train(tmp_path / "out", checkpoints_total_limit=1)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_whole(trained, train, script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, script, "checkpoint-4")
        with pytest.raises(OSError, match="No space left on device"):
            train(tmp_path / "out", checkpoints_total_limit=1)
    assert script.checkpoints(tmp_path / "out") == [tmp_path / "out" / "checkpoint-2"]
    train(tmp_path / "out", checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert result(tmp_path / "out") == result(trained)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("keep", [2, 6])
def test_what_a_killed_training_left_half_done_is_cleared_away(trained, train, tmp_path, keep):
    folder = killed(trained, tmp_path / "out", keep=keep)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 7, "loss_m')
    for name in ("checkpoint-8.unfinished", "checkpoint-1.discarded"):
        (folder / name).mkdir()
    train(folder, resume_from_checkpoint="latest")
    assert losses(folder) == losses(trained) and len(losses(trained)) == 6
    assert not [*folder.glob("*.unfinished"), *folder.glob("*.discarded")]


def test_latest_of_nothing_is_the_beginning(trained, train, tmp_path):
    train(tmp_path / "out", resume_from_checkpoint="latest")
    assert result(tmp_path / "out") == result(trained)


@pytest.mark.parametrize("mode", ["detach", "stream"])
def test_other_data_are_noticed_when_a_training_goes_on(uninterrupted, train, tmp_path, mode):
    write_layout("synthrad2023-task1", tmp_path / "other", subjects=7, size=32, num_slices=16)
    folder = killed(uninterrupted(mode), tmp_path / "out", keep=2)
    options = {**MODES[mode], "data_dir": tmp_path / "other", "resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit, match="The data are not those that .*checkpoint-2 was trained on.*--allow_changed"):
        train(folder, **options)
    train(folder, allow_changed_data=True, **options)
    assert [row["step"] for row in log(folder)] == [1, 2, 3, 4, 5, 6]


def test_an_earlier_checkpoint_is_not_gone_on_from_beside_later_ones(trained, train, tmp_path):
    """Those would be the newest ones for the next `latest`, and the first of this run the oldest to be deleted."""
    folder = killed(trained, tmp_path / "out", keep=6)
    with pytest.raises(SystemExit, match="holds later checkpoints than .*checkpoint-2: checkpoint-4, checkpoint-6"):
        train(folder, resume_from_checkpoint=folder / "checkpoint-2")
    shutil.copytree(folder / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train(tmp_path / "again", resume_from_checkpoint=tmp_path / "again" / "checkpoint-2")
    assert result(tmp_path / "again") == result(trained)


@pytest.mark.parametrize(
    "name, value", [("learning_rate", 1e-5), ("gradient_accumulation_steps", 3), ("seed", 5), ("streaming", True)]
)
def test_other_arguments_are_refused_when_a_training_goes_on(trained, train, tmp_path, name, value):
    folder = killed(trained, tmp_path / "out", keep=2)
    with pytest.raises(SystemExit, match=rf"was trained with --{name} .* \(now {value}\): it cannot be continued"):
        train(folder, resume_from_checkpoint="latest", **{name: value})


@pytest.mark.parametrize(
    "mode, file, name, said",
    [
        ("detach", "model/model", "model.connector.fc1.weight", "another understanding branch than that of"),
        (
            "detach",
            "vae/diffusion_pytorch_model",
            "encoder.conv_in.bias",
            "another autoencoder, other intensity windows",
        ),
        ("LoRA", "model/model", "model.language_model.norm_moe_gen.weight", "another base of its adapter than that of"),
    ],
)
def test_another_start_is_noticed_when_a_training_goes_on(
    uninterrupted, train, start, tmp_path, mode, file, name, said
):
    folder = killed(uninterrupted(mode), tmp_path / "out", keep=2)
    shutil.copytree(start, tmp_path / "start")
    file = tmp_path / "start" / f"{file}.safetensors"
    tensors = load_file(file)
    tensors[name] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SystemExit, match=said):
        options = {"pretrained_model_name_or_path": tmp_path / "start", "resume_from_checkpoint": "latest"}
        train(folder, **MODES[mode], **options)


def test_other_windows_are_noticed_when_a_training_goes_on(trained, train, start, tmp_path):
    folder = killed(trained, tmp_path / "out", keep=2)
    shutil.copytree(start, tmp_path / "start")
    for file in (tmp_path / "start").rglob("processor_config.json"):
        content = json.loads(file.read_text())
        content["image_processor"]["intensity"]["CT"]["high"] = 2000.0
        file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another autoencoder, other intensity windows or other sizes than that of"):
        train(folder, pretrained_model_name_or_path=tmp_path / "start", resume_from_checkpoint="latest")


# ---------------------------------------------------------------------------------------------------------------------
# Latents
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["detach", "stream"])
def test_wherever_latents_are_kept_the_training_is_the_same(uninterrupted, train, tmp_path, mode):
    caches = [
        {"latent_cache": "off"},
        {"latent_cache_dir": tmp_path / "cache"},
        {"latent_cache_dir": tmp_path / "cache"},
    ]
    caches[2]["latent_cache"] = "disk"
    for number, cache in enumerate(caches):
        train(tmp_path / str(number), **MODES[mode], **cache)
        assert result(tmp_path / str(number)) == result(uninterrupted(mode))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > 10


def test_latents_of_another_codec_are_refused(train, tmp_path):
    train(tmp_path / "one", latent_cache_dir=tmp_path / "cache", max_train_steps=1)
    with pytest.raises(ValueError, match="holds latents of another codec"):
        train(tmp_path / "two", latent_cache_dir=tmp_path / "cache", mixed_precision="bf16")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_cases(train, tmp_path):
    with pytest.raises(FloatingPointError, match="The loss of step [12] is not a number.*synthrad2023") as error:
        train(tmp_path / "out", learning_rate=1e37)
    kept = sorted((tmp_path / "out").glob("nan-step-*.safetensors"))
    with safe_open(kept[0], "pt") as file:
        assert {"latents", "velocity_labels", "input_ids"} <= set(file.keys())
        cases = json.loads(file.metadata()["cases"])
    assert cases and all(case in str(error.value) for case in cases)
    assert not (tmp_path / "out" / "pipeline").exists()


def test_a_checkpoint_that_is_not_complete_is_refused(train, start, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    file = tmp_path / "start" / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.connector.fc1.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="connector.fc1.weight"):
        train(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "start")
    with pytest.raises(SystemExit, match="vision weights, which this training would leave as random numbers"):
        options = {"allow_missing": ["*connector*"], "pretrained_model_name_or_path": tmp_path / "start"}
        train(tmp_path / "out", **options)


def test_sizes_that_cannot_be_cut_into_tokens_are_refused(train, start, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    for file in (tmp_path / "start").rglob("processor_config.json"):
        content = json.loads(file.read_text())
        content["image_processor"]["vae_size"]["stride"] = 8
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not divisible by the 16 pixels of a token"):
        train(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "start")


def test_a_route_without_a_pair_is_said(train, tmp_path, caplog):
    train(tmp_path / "out", routes=["MRI-CT", "pelvis/MRI-PET"], max_train_steps=1)
    assert "There is no pair of the route pelvis/MRI-PET" in caplog.text


def test_a_folder_that_holds_a_training_is_not_written_over(train, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="holds an earlier training.*--resume_from_checkpoint latest"):
        train(trained)
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lora_rank": 2, "freeze": "none"}, "generation expert alone"),
        ({"latent_cache": "disk"}, "--latent_cache_dir"),
        ({"latent_cache": "off", "latent_cache_dir": "here"}, "leave out --latent_cache_dir"),
        ({"resume_from_checkpoint": "nowhere"}, "There is no checkpoint nowhere"),
        ({"use_8bit_adam": True, "muon_learning_rate": 0.02}, "two optimizers: choose one"),
        ({"report_to": "nowhere"}, "--report_to nowhere is not installed; there is none"),
        ({"merge_adapter": True}, "--merge_adapter is of an adapter: it needs --lora_rank"),
        ({"lora_alpha": 8}, "--lora_alpha is of an adapter"),
        ({"validation_steps": -1}, "--validation_steps must be 0"),
        ({"phantom_cases": [1, 1, 1]}, "--phantom_cases are simulated, and --data_dir and --dataset_name are other"),
        ({"drop_vae": 1.5}, r"probability of vae must be within \[0, 1\]"),
        ({"logging_steps": 0}, "--logging_steps must be above 0, got 0"),
        ({"checkpoints_total_limit": -1}, "--checkpoints_total_limit must be above 0, got -1"),
        (
            {"dataset_name": "lab/pairs", "routes": "MRI-CT"},
            "--routes and --slice_step choose among scans, and lab/pairs",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(train, tmp_path, capsys, options, said):
    with pytest.raises((SystemExit, ValueError)) as error:
        train(tmp_path / "out", **options)
    assert re.search(said, f"{error.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_what_must_be_installed_is_said(script, train, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs bitsandbytes: pip install 'synermedgen-hf\[quantization\]'"):
        train(tmp_path / "out", use_8bit_adam=True)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_the_command_line_has_the_last_word(script, recipe, tmp_path):
    more = ["--pretrained_model_name_or_path", "start", "--output_dir", str(tmp_path), "--max_train_steps", "7"]
    more += ["--latent_cache_dir", str(tmp_path)]
    args = script.parse_args(["--config", str(recipe), *more])
    assert args.max_train_steps == 7
    for name, value in yaml.safe_load(recipe.read_text()).items():
        if name not in ("pretrained_model_name_or_path", "output_dir", "max_train_steps"):
            assert getattr(args, name) == value, name


def test_there_are_recipes_and_each_says_what_it_takes():
    assert [recipe.stem for recipe in RECIPES] == [
        "generation_full_8gpu",
        "generation_single_gpu_lora",
        "generation_tiny",
        "generation_tiny_fine",
    ]
    assert all("worked out" in recipe.read_text() and "hours" in recipe.read_text() for recipe in RECIPES)


def test_words_of_yaml_are_taken_as_they_are_written(script, tmp_path):
    """`off` and `no` are values here, and a flag can be taken back on the command line."""
    recipe, more = tmp_path / "recipe.yaml", ["--pretrained_model_name_or_path", "start", "--output_dir", "out"]
    recipe.write_text(
        "latent_cache: off\nmixed_precision: no\ngradient_checkpointing: True\nstreaming: false\n"
        "routes: null\nlora_rank:\n"
    )
    args = script.parse_args(["--config", str(recipe), *more])
    assert (args.latent_cache, args.mixed_precision) == ("off", "no")
    assert args.gradient_checkpointing is True and args.streaming is False
    assert args.routes is None and args.lora_rank is None
    again = script.parse_args(["--config", str(recipe), *more, "--no-gradient_checkpointing", "--streaming"])
    assert again.gradient_checkpointing is False and again.streaming is True
    recipe.write_text("# nothing yet\n")
    assert script.parse_args(["--config", str(recipe), *more]).latent_cache == "memory"


def test_an_unknown_argument_of_a_recipe_is_refused(script, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1.0\n")
    with pytest.raises(SystemExit):
        script.parse_args(["--config", str(tmp_path / "recipe.yaml")])
    assert "learning_rat" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Processes of their own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["detach", "none"])
def test_two_processes_do_what_one_does_with_twice_the_batch(train, arguments, tmp_path, mode):
    train(tmp_path / "one", **MODES[mode], train_batch_size=4)
    in_processes("train_generation", arguments(tmp_path / "two", **MODES[mode]), 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-4
    once = killed(tmp_path / "two", tmp_path / "once", keep=2)
    in_processes("train_generation", arguments(once, **MODES[mode], resume_from_checkpoint="latest"), 2)
    twice = killed(once, tmp_path / "twice", keep=4)
    in_processes("train_generation", arguments(twice, **MODES[mode], resume_from_checkpoint="latest"), 2)
    assert result(once) == result(twice) == result(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["detach", "accumulated", "LoRA"])
def test_two_processes_that_share_out_the_weights_do_what_two_whole_ones_do(arguments, start, tmp_path, mode):
    """FSDP2, with the settings of the configuration that the recipes name."""
    in_processes("train_generation", arguments(tmp_path / "whole", **MODES[mode]), 2)
    in_processes("train_generation", arguments(tmp_path / "sharded", **MODES[mode]), 2, sharded=True)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    made = [
        load_file(folder / "adapter_model.safetensors") if mode == "LoRA" else weights(folder)
        for folder in (tmp_path / "sharded", tmp_path / "whole")
    ]
    assert largest_difference(*made) < 1e-4
    once = killed(tmp_path / "sharded", tmp_path / "once", keep=2)
    options = MODES[mode] | {"resume_from_checkpoint": "latest"}
    in_processes("train_generation", arguments(once, **options), 2, sharded=True)
    assert result(once) == result(tmp_path / "sharded")


@pytest.mark.slow
def test_sharded_training_in_half_precision_sees_what_whole_training_sees(arguments, tmp_path):
    options = {"mixed_precision": "bf16", "max_train_steps": 2}
    in_processes("train_generation", arguments(tmp_path / "whole", **options), 2)
    in_processes("train_generation", arguments(tmp_path / "sharded", **options), 2, sharded=True)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["detach", "LoRA"])
def test_a_look_at_held_out_patients_changes_nothing_of_a_sharded_training(arguments, tmp_path, mode):
    options = {**MODES[mode], "ema_decay": 0.9, "checkpointing_steps": 100}
    in_processes("train_generation", arguments(tmp_path / "blind", **options), 2, sharded=True)
    seen = {"validation_steps": 3, "validation_images": 2}
    in_processes("train_generation", arguments(tmp_path / "seen", **options, **seen), 2, sharded=True)
    assert (
        losses(tmp_path / "seen") == losses(tmp_path / "blind")
        and (tmp_path / "seen" / "validation" / "3.png").exists()
    )
    assert result(tmp_path / "seen") == result(tmp_path / "blind")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"freeze": "none"}, {"muon_learning_rate": 0.02}, {"use_8bit_adam": True}])
def test_what_cannot_be_shared_out_is_refused(arguments, tmp_path, options):
    in_processes("train_generation", arguments(tmp_path / "out", **options), 2, succeeds=False, sharded=True)
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.slow
def test_two_processes_read_shares_of_a_stream_of_different_length(arguments, tmp_path):
    """Three patients on one, one on the other; a pool is longer than that."""
    options = {"streaming": True, "stream_pool": 40, "train_batch_size": 1}
    in_processes("train_generation", arguments(tmp_path / "two", **options), 2)
    assert len(losses(tmp_path / "two")) == 6
    once = killed(tmp_path / "two", tmp_path / "once", keep=2)
    in_processes("train_generation", arguments(once, **options, resume_from_checkpoint="latest"), 2)
    twice = killed(once, tmp_path / "twice", keep=4)
    in_processes("train_generation", arguments(twice, **options, resume_from_checkpoint="latest"), 2)
    assert result(once) == result(twice) == result(tmp_path / "two")


@pytest.mark.slow
def test_routes_that_one_process_alone_has_read_are_known_of_the_whole(arguments, tmp_path):
    """A brain on one, a pelvis on the other."""
    write_layout("synthrad2023-task1", tmp_path / "scans", subjects=4, size=32, num_slices=16)
    in_processes(
        "train_generation", arguments(tmp_path / "two", data_dir=tmp_path / "scans", max_train_steps=2, **STREAM), 2
    )
    known = SynerMedGenPipeline.from_pretrained(tmp_path / "two" / "pipeline").model.config.trained_routes
    assert set(known) == {f"{region}/{route}" for region in ("brain", "pelvis") for route in ("MRI-CT", "CT-MRI")}


@pytest.mark.slow
def test_two_processes_stop_together_when_a_loss_is_no_number(arguments, tmp_path):
    in_processes("train_generation", arguments(tmp_path / "out", learning_rate=1e37), 2, succeeds=False)
    assert list((tmp_path / "out").glob("nan-step-*.safetensors"))


@pytest.mark.slow
def test_a_training_killed_twenty_times_at_random_moments_ends_in_the_same_weights(train, arguments, tmp_path):
    """A checkpoint at every step, so that many are killed while they are written."""
    options = {"max_train_steps": 200, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    train(tmp_path / "whole", **options)
    folder, rng = tmp_path / "killed", random.Random(0)
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments(folder, **options, resume_from_checkpoint="latest")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        ) as process:
            newest = max(numbers(folder), default=0)
            while process.poll() is None and max(numbers(folder), default=0) <= newest:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        assert process.returncode == -signal.SIGKILL  # or it came to its end before
    train(folder, **options, resume_from_checkpoint="latest")
    assert losses(folder) == losses(tmp_path / "whole") and len(losses(folder)) == 200
    assert result(folder) == result(tmp_path / "whole")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-199", "checkpoint-200"}


def numbers(folder):
    return [
        int(path.name.removeprefix("checkpoint-"))
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]


@pytest.mark.slow
def test_four_pairs_are_learned_by_heart(script, tmp_path):
    """The bundled weights, one slice of four routes: SSIM above 0.95 of what the autoencoder lets through."""
    pytest.importorskip("skimage")
    routes = ["brain/MRI-CT", "brain/CT-MRI", "brain/T1-T2", "whole-body/CT-PET"]
    options = {"pretrained_model_name_or_path": checkpoint_path(), "output_dir": tmp_path / "out", "routes": routes}
    options |= {"cache_dir": tmp_path / "phantom", "train_cases": 1, "slices_per_case": 1, "num_proc": 1}
    options |= {"drop_text": 0, "drop_vae": 0, "drop_vit": 0, "drop_region": 0, "multi_source": 0, "freeze": "none"}
    options |= {"train_batch_size": 8, "max_train_steps": 1000, "lr_warmup_steps": 20, "checkpointing_steps": 10_000}
    options |= {"ema_decay": 0.99, "sampling_steps": 20}
    options |= {"guidance_scale": 1, "image_guidance_scale": 1}
    args = script.parse_args(command_line(options))
    script.main(args)
    pipe = SynerMedGenPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    codec, ceiling = pipe.processor.image_processor, Ceiling(pipe.vae, pipe.processor.image_processor)
    rows = [PAIR_FEATURES.decode_example(row) for row in script.load_pairs(args, "train", False, 1)]
    assert len(rows) == 4
    for row in rows:
        window = row["source_window"]
        how = {"source": row["source_modality"], "target": row["target_modality"], "region": row["region"], "seed": 1}
        if "percentile" in codec.intensity[row["source_modality"]]:
            how["window"] = (window["low"], window["high"])
        made = pipe(np.asarray(row["source_image"]), output_type="np", **how).images[0]
        judge = {"protocol": "paper_frame", "modality": row["target_modality"]}
        wanted = true_target(codec, row)
        ours, best = (
            evaluate_case(one, wanted, **judge)["metrics"]["ssim_u8_frame"] for one in (made, ceiling([row], [0])[0])
        )
        assert ours > 0.95 * best, (row["source_modality"], row["target_modality"], ours, best)


def test_the_rows_of_a_data_set_are_those_that_are_trained_on(script, arguments, scans, tmp_path):
    args = script.parse_args(arguments(tmp_path / "out", routes=["MRI-CT"]))
    rows = script.load_pairs(args, "train", False, 1)
    wanted = load_dataset("synermed", "pairs", data_dir=str(scans), split="train", routes=["MRI-CT"])
    assert len(rows) == len(wanted) and set(rows["target_modality"]) == {"CT"}
