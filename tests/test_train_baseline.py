"""The trained baselines run for real at tiny size: they learn, stop in time, go on when interrupted, and refuse."""

import functools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import killed

from synermedgen_hf.data.flow_matching import Dropout, PairBatches, PairPool
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.data.pairs import pair_rows
from synermedgen_hf.data.sources import CaseRecord, LoadedCase, measure_windows
from synermedgen_hf.metrics.baselines import read_network

sys.path.append(str(Path(__file__).parents[1] / "examples"))

KINDS = ("unet", "pix2pix")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
USUAL = {
    "routes": "MRI-CT",
    "slice_step": 3,
    "num_proc": 1,
    "block_out_channels": [8, 16],
    "discriminator_channels": [8, 8],
    "train_batch_size": 2,
    "lr_warmup_steps": 0,
    "mixed_precision": "no",
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 9,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def script():
    import train_baseline

    return train_baseline


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def start(work, processor):
    """A checkpoint of which there is nothing but the processor."""
    processor.save_pretrained(work / "start" / "processor")
    return work / "start"


@pytest.fixture(scope="module")
def scans(work):
    """Four patients to train on."""
    write_layout("synthrad2023-task1", work / "SynthRAD2023", subjects=6, size=32, num_slices=6)
    return work / "SynthRAD2023"


@pytest.fixture(scope="module")
def train(script, start, scans):
    """`python examples/train_baseline.py ...` in this process; six steps where nothing else is said."""

    def train(folder, **options):
        paths = {"pretrained_model_name_or_path": start, "data_dir": scans, "output_dir": folder}
        budget = {} if "max_train_minutes" in options else {"max_train_steps": 6}
        line = []
        for name, value in {**paths, **USUAL, **budget, **options}.items():
            values = value if isinstance(value, list) else [value]
            line += [] if value is None else [f"--{name}", *map(str, values)]
        script.main(script.parse_args(line))
        return folder

    return train


@pytest.fixture(scope="module")
def uninterrupted(train, work):
    return functools.cache(lambda kind: train(work / f"whole {kind}", baseline=kind))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# What is learned
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_pairs_are_learned_far_better_than_the_source_already_shows_them(train, tmp_path, kind):
    size = {"block_out_channels": [16, 32], "train_batch_size": 4, "routes": "brain/MRI-CT", "slice_step": 6}
    train(tmp_path, baseline=kind, max_train_steps=150, learning_rate=3e-3, checkpointing_steps=500, **size)
    last = log(tmp_path)[-1]
    assert last["loss_l1"] < 0.3 * last["loss_copy"]
    assert last["lr"] < 1e-5  # the cosine has come to its end


def test_a_discriminator_learns_beside_the_pix2pix_and_changes_what_is_made(uninterrupted):
    rows = log(uninterrupted("pix2pix"))
    assert rows[0]["loss_discriminator"] != rows[-1]["loss_discriminator"] > 0
    assert "loss_gan" in rows[0] and "loss_gan" not in log(uninterrupted("unet"))[0]
    before, after = (
        load_file(uninterrupted("pix2pix") / f"checkpoint-{step}" / "model_1.safetensors") for step in (2, 4)
    )
    assert all(not before[name].equal(after[name]) for name in ("features.0.weight", "logits.weight"))
    alone, against = (load_file(uninterrupted(kind) / WEIGHTS) for kind in KINDS)
    assert any(not alone[name].equal(against[name]) for name in alone)


def test_the_route_decides_what_is_made(script):
    args = script.parse_args(
        ["--baseline", "unet", "--pretrained_model_name_or_path", "x", "--output_dir", "x", "--max_train_steps", "1"]
    )
    unet = script.make_unet(args, 22).eval()
    assert 5e6 < unet.num_parameters() < 7e6
    pixels = torch.zeros(2, 1, 32, 32)
    with torch.no_grad():
        one, other = script.predict_codes(unet, pixels, torch.tensor([0, 21]))
    assert one.shape == (1, 32, 32) and not torch.allclose(one, other, atol=1e-4)


def test_the_discriminator_hears_the_route(script):
    judge = script.Discriminator([8, 8], routes=2)
    torch.nn.init.normal_(judge.route.weight)
    picture = torch.randn(1, 1, 32, 32).expand(2, -1, -1, -1)
    one, other = judge(picture, picture, torch.tensor([0, 1]))
    assert one.shape == (1, 8, 8) and not torch.allclose(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Which pairs
# ---------------------------------------------------------------------------------------------------------------------


def case(number, size):
    rng = np.random.default_rng(number)
    images = {name: rng.uniform(0, 900, (2, size, size)).astype(np.float32) for name in ("MRI", "CT")}
    record = CaseRecord("data", f"case-{number}", f"case-{number}", "brain", "axial", dict.fromkeys(images, ""))
    return LoadedCase(record, images, None, None, (1.0, 1.0, 1.0), measure_windows(images), np.arange(2))


def rows_of(*cases):
    return [row for one in cases for _, row in pair_rows(one)]


def test_pairs_come_in_the_order_in_which_stage_two_draws_them(script, processor, config):
    pool = PairPool(rows_of(case(1, 32), case(2, 32), case(3, 32)), script.PictureEncoder(processor.image_processor))
    batches = script.Batches(pool, batch_size=3, seed=7)
    stage_two = PairBatches(pool, processor, config, 3, dropout=Dropout(0, 0, 0, 0, 0), seed=[7])
    for step in range(4):
        sources, targets, labels, cases = batches(step)
        drawn = [stage_two.draw(number) for number in range(3 * step, 3 * step + 3)]
        assert cases == [f"{sample.pair.case} ({sample.route})" for sample in drawn]
        assert labels.tolist() == [list(pool.pairs).index(sample.route) for sample in drawn]
        for source, target, sample in zip(sources, targets, drawn, strict=True):
            assert target.equal(pool[sample.target].float()) and source.equal(pool[sample.latents[0]].float())


def test_both_sides_are_what_the_autoencoder_would_read(script, processor):
    rows, codec = rows_of(case(1, 40)), processor.image_processor
    batches = script.Batches(PairPool(rows, script.PictureEncoder(codec)), batch_size=4, seed=0)
    sources, targets, labels, _ = batches(0)
    there = labels == [str(route) for route in batches.labels].index("brain: MRI->CT")
    window = rows[0]["source_window"]
    for sides, modality, own in ((sources, "MRI", (window["low"], window["high"])), (targets, "CT", None)):
        wanted = [codec.preprocess_slice(one, modality, own).vae_pixels[:1] for one in case(1, 40).images[modality]]
        for made in sides[there]:
            assert min((made - one).abs().max().item() for one in wanted) < 1e-3  # kept in half precision


def test_slices_of_several_sizes_are_padded_with_the_low_end_of_the_window(script, processor):
    pool = PairPool(rows_of(case(1, 32), case(2, 48)), script.PictureEncoder(processor.image_processor))
    sources, targets, _, cases = script.Batches(pool, batch_size=8, seed=0)(0)
    assert sources.shape == targets.shape == (8, 1, 48, 48)
    small = torch.tensor([name.startswith("data/case-1") for name in cases])
    for side in (sources, targets):
        assert (side[small][..., 32:, :] == -1).all() and (side[small][..., :32, :32] > -1).any()
        assert (side[~small][..., 32:, 32:] > -1).all()


def test_simulated_patients_without_any_data(train, tmp_path):
    small = {"data_dir": None, "phantom_cases": None, "train_cases": 1, "slices_per_case": 1, "max_train_steps": 1}
    small["slice_step"] = 1
    train(tmp_path / "run", baseline="unet", cache_dir=tmp_path / "phantom", routes="whole-body/CT-PET", **small)
    record = read_network(tmp_path / "run")
    assert record["routes"] == ["whole-body/CT-PET"] and record["data"].startswith("simulated patients")


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted, resumed, in time
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_uninterrupted(train, uninterrupted, tmp_path, kind):
    whole = uninterrupted(kind)
    folder = killed(whole, tmp_path / "killed")
    train(folder, baseline=kind, resume_from_checkpoint="latest")
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert without_time(log(folder)) == without_time(log(whole)) and len(log(folder)) == 6


def test_a_time_budget_is_kept_and_used_up(train, tmp_path):
    train(tmp_path, baseline="unet", max_train_minutes=0.02, learning_rate=1e-3)
    record, rows = read_network(tmp_path), log(tmp_path)
    assert record["minutes"] >= 0.02 and rows[-1]["step"] == record["steps"] > 2
    assert rows[-2]["minutes"] <= 0.02  # none is begun when time is up
    rates = [row["lr"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    for row, after in zip(rows, rows[1:], strict=False):  # a step's rate comes from the time that those before it took
        used = min(1, row["minutes"] / 0.02)
        assert after["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * used)) / 2, abs=1e-4)


def test_time_that_was_used_before_an_interruption_counts(train, uninterrupted, tmp_path):
    folder = killed(uninterrupted("unet"), tmp_path / "killed")
    file = folder / "checkpoint-2" / "training_state_0.json"
    state = json.loads(file.read_text())
    assert 0 < state["seconds"] < 60
    file.write_text(json.dumps({**state, "seconds": 59.9999}))
    train(folder, baseline="unet", max_train_minutes=1, resume_from_checkpoint="latest")
    record = read_network(folder)
    assert record["steps"] == 3 and record["minutes"] >= 1


def test_what_is_done_is_not_done_again(train, uninterrupted):
    folder = uninterrupted("unet")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train(folder, baseline="unet", resume_from_checkpoint="latest")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_train_minutes": 90}, r"trained to its end with .*--max_train_minutes None \(now 90"),
        ({"baseline": "pix2pix"}, r"trained to its end with --baseline unet \(now pix2pix\)"),
        ({"routes": "brain/MRI-CT"}, "The data are not those that"),
    ],
    ids=["budget", "network", "data"],
)
def test_what_is_done_of_something_else_is_no_answer(train, uninterrupted, tmp_path, options, said):
    folder = shutil.copytree(uninterrupted("unet"), tmp_path / "done")
    for checkpoint in folder.glob("checkpoint-*"):  # as if it had been too short for one
        shutil.rmtree(checkpoint)
    with pytest.raises(SystemExit, match=said):
        train(folder, **{"baseline": "unet", "resume_from_checkpoint": "latest", **options})


def test_the_record_says_what_was_trained(uninterrupted, processor):
    record = read_network(uninterrupted("pix2pix"))
    assert (record["kind"], record["steps"], record["samples"]) == ("pix2pix", 6, 12)
    assert record["routes"] == ["brain/MRI-CT", "pelvis/MRI-CT"] and record["data"] == "SynthRAD2023"
    assert record["codec"]["intensity"] == processor.image_processor.intensity
    assert record["arguments"]["learning_rate"] == 5e-4


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_names_the_cases(train, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"The loss of step [12] is not a number .*synthrad2023/1\w+ .*MRI->CT"
    ):
        train(tmp_path, baseline="unet", learning_rate=1e30)
    assert not (tmp_path / "baseline.json").exists() and not (tmp_path / "unet").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "holds an earlier training. Continue it with --resume_from_checkpoint latest"),
        ({"resume_from_checkpoint": "latest", "block_out_channels": [8, 24]}, r"block_out_channels \[8, 16\] \(now"),
        ({"resume_from_checkpoint": "latest", "baseline": "pix2pix"}, r"--baseline unet \(now pix2pix\)"),
        ({"resume_from_checkpoint": "latest", "slice_step": 2}, "The data are not those that"),
        ({"resume_from_checkpoint": "nowhere"}, "There is no checkpoint nowhere"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(train, uninterrupted, tmp_path, options, says):
    folder = killed(uninterrupted("unet"), tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=says):
        train(folder, **{"baseline": "unet", **options})
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_codec_is_refused(train, uninterrupted, start, tmp_path):
    other = Path(shutil.copytree(start, tmp_path / "other"))
    file = other / "processor" / "processor_config.json"
    file.write_text(file.read_text().replace("3071.0", "2000.0"))
    folder = killed(uninterrupted("unet"), tmp_path / "run")
    with pytest.raises(SystemExit, match="was trained with another codec than that of"):
        train(folder, baseline="unet", resume_from_checkpoint="latest", pretrained_model_name_or_path=other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"baseline": "magic"}, "invalid choice: 'magic'"),
        ({"max_train_minutes": 0}, "--max_train_minutes must be above 0"),
        ({"max_train_minutes": 1, "max_train_steps": 1}, "not allowed with"),
        ({"max_train_steps": None}, "one of the arguments --max_train_minutes --max_train_steps is required"),
        ({"train_batch_size": -1}, "--train_batch_size must be above 0"),
        ({"learning_rate": "nan"}, "--learning_rate must be above 0"),
        ({"block_out_channels": [8, 20]}, "--block_out_channels must be multiples of 8"),
    ],
)
def test_arguments_that_cannot_be_are_refused(train, tmp_path, capsys, options, says):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", **{"baseline": "unet", **options})
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_does_not_go_together_is_said_before_anything_is_written(train, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        SystemExit, match="multiples of 16 pixels a side, and 5 levels on blocks of 2 pixels need multiples of 32"
    ):
        train(run, baseline="unet", block_out_channels=[8] * 5)
    with pytest.raises((OSError, ValueError), match="nowhere"):
        train(run, baseline="unet", pretrained_model_name_or_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="There is no pair to train on|brain/T1-T2"):
        train(run, baseline="unet", routes="brain/T1-T2")
    assert not run.exists()
