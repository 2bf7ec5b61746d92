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


def recorded(name):
    """What is kept beside the weights of how they were made and judged."""
    return json.loads((FOLDER / "training" / name).read_text())


def table_row(first):
    """The cells of the README's line that begins so."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_they_take_at_most_16_mb_and_no_pickle():
    large = [path for path in FOLDER.rglob("*") if path.stat().st_size > 200_000]
    assert {path.suffix for path in large} == {".safetensors"}
    assert sum(path.stat().st_size for path in large) <= 16_000_000


def test_they_say_what_they_are(bundled):
    assert "Demonstration" in bundled.model.config.notice and "Not for clinical use" in bundled.model.config.notice
    assert "trained on simulated scans. Not for clinical use" in (FOLDER / "README.md").read_text()
    assert "Not for clinical use" in README


def test_they_know_22_routes_and_three_tasks(bundled):
    assert bundled.model.config.trained_routes == [route.name for route in ROUTES] and len(ROUTES) == 22
    assert bundled.model.config.trained_tasks == ["CTS", "TIA", "MI"]


def test_how_they_were_trained_is_kept_beside_them():
    for stage in ("vae", "generation", "generation_fine"):
        steps = [json.loads(line)["step"] for line in (FOLDER / "training" / f"{stage}_log.jsonl").open()]
        assert steps == sorted(set(steps)) and steps[-1] == recorded(f"{stage}_args.json")["max_train_steps"]
    base = [json.loads(line) for line in (FOLDER / "training" / "base_log.jsonl").open()]
    assert {"eyes", "places", "letters", "names", "changes"} <= {row["training"] for row in base}
    state = recorded("understanding_state.json")
    assert state["global_step"] == state["max_steps"]
    assert any("eval_accuracy/CTS" in row for row in state["log_history"])


def test_the_readme_states_how_they_answer():
    for task, found in recorded("understanding.json")["tasks"].items():
        low, high = found["likelihood"]["interval"]
        accuracy = f"{100 * found['likelihood']['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        assert table_row(task)[:3] == [str(found["n"]), f"{100 * found['chance']:.1f}", accuracy]


def test_the_readme_states_how_they_synthesise():
    for route, record in recorded("evaluation/summary.json")["routes"].items():
        assert table_row(route)[1].split(" / ")[0] == f"{100 * record['metrics']['ssim_u8_frame']['mean']:.1f}"


@pytest.mark.parametrize("modality", ["CT", "MRI"])
def test_they_name_a_modality(bundled, modality):
    case = simulate_case("pelvis", "synthrad", seed=2_000_100, num_slices=3)
    found = bundled.identify(case.images[modality][1])
    assert found["modality"] == modality and found["probability"] > 0.5


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
