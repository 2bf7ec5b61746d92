"""The VAE ceiling: nothing is lost without a VAE's error, all of a VAE's error is told, and a run goes on."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from typer.testing import CliRunner

from synermedgen_hf import checkpoint_path, cli
from synermedgen_hf.image_processing_synermedgen import SynerMedGenImageProcessor, set_codec
from synermedgen_hf.metrics.ceiling import case_ceiling, ceiling_table, measure_ceiling, summarise, vae_ceiling

pytest.importorskip("skimage")


class Off(AutoencoderKL):
    """An autoencoder that hands its input through, off by a constant in every channel."""

    def encode(self, pixels):
        return type("Output", (), {"latent_dist": type("Posterior", (), {"mean": pixels})})

    def decode(self, latents):
        return type("Output", (), {"sample": latents + self.by})


@pytest.fixture
def off():
    def make(by):
        vae = Off(block_out_channels=[8], norm_num_groups=4)
        vae.by = by
        return vae

    return make


@pytest.fixture(params=["plain", "bands"])
def image_processor(request):
    size = {"max_size": 48, "min_size": 48, "stride": 16, "max_pixels": 14112 * 128}
    intensity = set_codec(SynerMedGenImageProcessor.intensity, request.param)
    return SynerMedGenImageProcessor(vae_size=size, intensity=intensity)


@pytest.fixture
def hounsfield():
    return np.random.default_rng(0).uniform(-900, 900, (5, 48, 48)).astype(np.float32)


def test_nothing_is_lost_without_an_error_of_the_vae(image_processor, off, hounsfield):
    made = vae_ceiling(off(0.0), image_processor, hounsfield, "CT", batch_size=2)
    assert made.shape == hounsfield.shape and made.dtype == np.float32
    np.testing.assert_allclose(made, hounsfield, atol=2e-3)


def test_an_error_of_the_vae_is_told_in_scanner_units(off, hounsfield):
    plain = SynerMedGenImageProcessor(
        vae_size={"max_size": 48, "min_size": 48, "stride": 16, "max_pixels": 14112 * 128}
    )
    (record,) = case_ceiling(off(0.01), plain, {"CT": hounsfield}, chosen=[1, 3])
    assert (record["modality"], record["slices"]) == ("CT", 2) and record["protocol"]
    # A hundredth of [-1, 1] over a window of 4095 HU.
    assert record["metrics"]["mae_hu_frame"] == pytest.approx(20.475, abs=1e-2)
    assert record["metrics"]["rmse_hu_frame"] == pytest.approx(20.475, abs=1e-2)
    assert set(summarise([record, record], plain.intensity)["CT"]) == {
        "unit", "cases", "slices", "protocol", "metrics"
    }  # fmt: skip


def test_the_window_of_mr_is_that_of_the_whole_volume(image_processor, off):
    volume = np.zeros((3, 48, 48), np.float32)
    volume[:, 8:40, 8:40] = np.array([100, 200, 1000])[:, None, None]
    (record,) = case_ceiling(off(0.01), image_processor, {"T1": volume}, chosen=[0])
    # The background is clipped to the window's low end and back, so half of 1000 * 0.01 is seen everywhere.
    assert record["metrics"]["mae_au_frame"] == pytest.approx(5, abs=0.1)
    # MR has no absolute scale: the same scan in other arbitrary units has the same error.
    (louder,) = case_ceiling(off(0.01), image_processor, {"T1": 10 * volume}, chosen=[0])
    assert louder["metrics"]["mae_au_frame"] == pytest.approx(record["metrics"]["mae_au_frame"], rel=1e-3)
    assert louder["protocol"] == record["protocol"] and record["protocol"]["range"] == [0, 1000]


def test_records_of_unlike_stamps_are_not_averaged(image_processor, off, hounsfield):
    (one,) = case_ceiling(off(0.01), image_processor, {"CT": hounsfield})
    other = {**one, "protocol": {**one["protocol"], "range": [0, 1]}}
    with pytest.raises(ValueError, match="range"):
        summarise([one, other], image_processor.intensity)


def test_what_the_processor_does_not_know_is_left_out(image_processor, off, hounsfield):
    assert case_ceiling(off(0.0), image_processor, {"LGE": hounsfield}) == []


def run(folder, *more):
    arguments = ["vae-ceiling", "--phantom-cases", 1, "--phantom-slices", 1, "--phantom-size", 48, "--output", folder]
    arguments = [str(one) for one in (*arguments, "--device", "cpu", *more)]
    return CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


def test_the_command_tells_every_modality_and_goes_on(tmp_path):
    first = run(tmp_path)
    assert first.exit_code == 0, first.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["modalities"]) == {"CT", "CBCT", "PET", "MRI", "T1", "T1CE", "T2", "FLAIR"}
    assert (summary["modalities"]["CT"]["unit"], summary["modalities"]["CT"]["cases"]) == ("HU", 3)
    assert summary["modalities"]["PET"]["metrics"]["mae_suv_frame"] > 0
    assert ceiling_table(summary["modalities"]) in first.stdout

    # Interrupted after the first case, or in the middle of it: the rest is made again, to the same figures.
    cases = tmp_path / "cases.jsonl"
    lines = cases.read_text().splitlines(keepends=True)
    for whole in (3, 1):
        cases.write_text("".join(lines[:whole]) + lines[whole][:20])
        (tmp_path / "summary.json").unlink()
        assert run(tmp_path).exit_code == 0
        assert cases.read_text() == "".join(lines)
        assert json.loads((tmp_path / "summary.json").read_text()) == summary

    other = run(tmp_path, "--codec", "bands")
    assert other.exit_code == 1 and "holds answers to something else: window of" in other.stderr


def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path):
    options = {"phantom_cases": 1, "phantom_slices": 1, "phantom_size": 48}
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="Another run is writing to"):
        measure_ceiling(tmp_path, checkpoint_path(), **options)


def test_refusals_come_before_any_work(tmp_path):
    for options, message in (
        ({}, "either --data-dir or --phantom-cases"),
        ({"phantom_cases": 1, "protocol": "mine"}, "There is no protocol 'mine'"),
        ({"phantom_cases": 1, "protocol": "brats"}, "brats is for MR volumes"),
        ({"phantom_cases": 1, "batch_size": 0}, "must be at least 1"),
        ({"phantom_cases": 1, "codec": "rgb"}, "Unknown codec 'rgb'"),
        ({"data_dir": "scans", "phantom_slices": 4}, "phantom_slices would do nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_ceiling(tmp_path / "never", checkpoint_path(), **options)
    assert not (tmp_path / "never").exists()


def test_the_bundled_vae_has_never_seen_bands(hounsfield):
    vae = AutoencoderKL.from_pretrained(checkpoint_path(), subfolder="vae").eval()
    own = SynerMedGenImageProcessor.from_pretrained(checkpoint_path(), subfolder="processor")
    bands = type(own)(**{**own.to_dict(), "intensity": set_codec(own.intensity, "bands")})
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    image = (-1000 + 1050 * torch.sigmoid(20 * (0.8 - rows.hypot(columns))))[None].numpy()
    plain, spread = (np.abs(vae_ceiling(vae, one, image, "CT") - image).mean() for one in (own, bands))
    assert spread > 2 * plain
