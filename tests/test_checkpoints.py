"""The weights that come with the package: small, labelled, documented, and better than nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from synermedgen_hf import ROUTES, SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.data.phantom import simulate_case

FOLDER = checkpoint_path("synermedgen-tiny")
README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def bundled():
    pipe = SynerMedGenPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def evaluation():
    return json.loads((FOLDER / "training" / "evaluation.json").read_text())


def test_they_take_at_most_16_mb_and_no_pickle():
    weights = [path for path in FOLDER.rglob("*") if path.stat().st_size > 200_000]
    assert {path.suffix for path in weights} == {".safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 16_000_000


def test_they_say_what_they_are(bundled):
    assert "Demonstration" in bundled.model.config.notice and "Not for clinical use" in bundled.model.config.notice
    assert "trained on simulated scans. Not for clinical use" in (FOLDER / "README.md").read_text()
    assert "Not for clinical use" in README


def test_they_know_22_routes_and_no_understanding_task_yet(bundled):
    assert bundled.model.config.trained_routes == [route.name for route in ROUTES] and len(ROUTES) == 22
    with pytest.raises(ValueError, match="Stage I"):
        bundled.identify(np.ones((64, 64), np.float32))


def test_how_they_were_trained_is_kept_beside_them():
    for stage in ("vae", "generation"):
        steps = [json.loads(line)["step"] for line in (FOLDER / "training" / f"{stage}_log.jsonl").open()]
        arguments = json.loads((FOLDER / "training" / f"{stage}_args.json").read_text())
        assert steps == sorted(set(steps)) and steps[-1] == arguments["max_train_steps"]


def test_the_readme_states_the_evaluation(evaluation):
    for row in [*evaluation["routes"], {"route": "mean", **evaluation["mean"]}]:
        cells = [row["route"], *(f"{row[key]:.1f}" for key in ("ssim", "copy", "ceiling"))]
        assert [cells] == [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in README.splitlines()
            if line.startswith(f"| {row['route']} ")
        ]
    assert f"{evaluation['routes_above_copy']} of 22" in README


@pytest.mark.parametrize(
    ("region", "protocol", "source", "target", "bound"),
    [("brain", "synthrad", "MRI", "CT", 0.9), ("whole-body", "autopet", "PET", "CT", 0.8)],
)
def test_a_synthesis_resembles_the_reference(bundled, region, protocol, source, target, bound):
    case = simulate_case(region, protocol, seed=2_000_100, num_slices=3)
    window = bundled.processor.image_processor.intensity_window(case.images[source], source)
    (made,) = bundled(case.images[source][1], target, source, region, seed=0, window=window, output_type="np").images
    reference = np.clip(case.images[target][1], -1024, 3071)
    assert made.shape == reference.shape
    assert np.corrcoef(made.ravel(), reference.ravel())[0, 1] > bound
