"""The model card of what is saved and published: true, complete, and readable by the Hub."""

import json
import re

import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from synermedgen_hf import SynerMedGenConfig, SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.data.routes import MODALITIES
from synermedgen_hf.model_card import CARD_MARK, make_model_card, may_replace_card

ROUTES = ["brain/MRI-CT", "brain/CT-MRI"]
PROTOCOL = {"name": "paper_frame", "area": "frame"}
EVALUATION = {
    "arguments": {"phantom_cases": 8, "split": "test", "level": "slice", "protocol": "paper_frame"},
    "routes": {
        "brain/MRI-CT": {
            "cases": 24,
            "protocol": PROTOCOL,
            "metrics": {"ssim_frame": {"mean": 0.8281556123}, "psnr_frame": {"mean": 27.25}},
        },
        "brain/CT-MRI": {
            "cases": 24,
            "protocol": PROTOCOL,
            "metrics": {"ssim_frame": {"mean": 0.355}, "psnr_frame": {"mean": None}},
        },
    },
}
EVERYTHING = {
    "base_model": "lab/base",
    "license": "mit",
    "datasets": ["lab/brains", "lab/pelvises"],
    "training_data": "It has seen 8 simulated subjects.",
    "evaluation": EVALUATION,
}


@pytest.fixture
def config(config):
    """What a trained checkpoint says about itself."""
    config = type(config).from_dict(config.to_dict())
    config.trained_routes, config.trained_tasks = list(ROUTES), ["MI", "TIA"]
    return config


@pytest.fixture
def intensity(processor):
    return processor.image_processor.intensity


@pytest.fixture
def card(config, intensity):
    return make_model_card(config, intensity, "synermedgen-brain", **EVERYTHING)


def section(card, title):
    """The text under one heading."""
    parts = re.split(r"^#+ (.+)$", card.text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title].strip()


def rows(text):
    """The cells of a table, without the line under its head."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if set(line[0]) != {"-"}]


# ---------------------------------------------------------------------------------------------------------------------
# Front matter
# ---------------------------------------------------------------------------------------------------------------------


def test_the_front_matter_holds_every_field_the_hub_reads(card):
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "image-to-image"
    assert {"medical-imaging", "synermedgen", "transformers", "research-use-only"} <= set(data["tags"])
    assert data["base_model"] == "lab/base" and data["license"] == "mit"
    assert data["datasets"] == ["lab/brains", "lab/pelvises"]
    assert [model["name"] for model in data["model-index"]] == ["synermedgen-brain"]


def test_fields_without_a_value_are_left_out(config, intensity):
    data = make_model_card(config, intensity, "plain").data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "license", "tags"}
    assert data["license"] == "apache-2.0"


def test_it_reads_back_as_written(card, tmp_path):
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text
    assert ModelCardData(**again.data.to_dict(), ignore_metadata_errors=False).to_dict() == card.data.to_dict()


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["nothing", "everything"])
def test_the_hubs_own_check_accepts_it(hub, config, intensity, options):
    asked = len(hub.requests)
    make_model_card(config, intensity, "checked", **options).validate()
    assert hub.requests[asked:] == [("POST", "/api/validate-yaml")]


def test_results_go_through_the_hubs_model_index_and_back(card):
    index = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "synermedgen-brain" and eval_results_to_model_index(name, results) == index
    found = {(result.dataset_config, result.metric_type): result.metric_value for result in results}
    assert found == {  # what is undefined, is no result
        ("brain/MRI-CT", "ssim_frame"): 0.828156,
        ("brain/MRI-CT", "psnr_frame"): 27.25,
        ("brain/CT-MRI", "ssim_frame"): 0.355,
    }
    for result in results:  # a number without its protocol cannot be compared with any other
        assert result.metric_name == f"{result.metric_type} (paper_frame, slice)"
        assert result.task_type == "image-to-image" and result.dataset_split == "test"
        assert result.dataset_name == "8 simulated patients of each protocol"


def test_an_evaluation_is_taken_as_a_dict_or_from_its_folder_or_file(card, config, intensity, tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(EVALUATION))
    for source in (path, str(path), tmp_path):
        again = make_model_card(config, intensity, "synermedgen-brain", **{**EVERYTHING, "evaluation": source})
        assert str(again) == str(card)


def test_a_title_of_any_letters_leaves_the_front_matter_whole(config, intensity):
    title = "Überblick: 'CT' & \"MRI\" – #1"
    card = ModelCard(str(make_model_card(config, intensity, title, evaluation=EVALUATION)))
    assert card.data.to_dict()["model-index"][0]["name"] == title
    assert f"# {title}\n" in card.text


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def test_it_says_for_whom_it_is_not_before_anything_else(card):
    assert section(card, "synermedgen-brain").startswith("**Research use only. Not for clinical use:**")


def test_it_lists_routes_and_tasks(card):
    text = section(card, "Routes and tasks")
    assert [line[2:] for line in text.splitlines() if line.startswith("* ")] == ROUTES
    assert "Understanding: MI, TIA." in text


def test_it_says_so_where_routes_and_tasks_are_unknown(config, intensity):
    config.trained_routes, config.trained_tasks = [], []
    text = section(make_model_card(config, intensity, "untrained"), "Routes and tasks")
    assert "it is not recorded which routes" in text
    assert "Understanding: not trained; it does not identify modalities or answer questions." in text


def test_it_states_the_scale_of_every_modality(card):
    head, *table = rows(section(card, "Intensity settings"))
    assert head == ["modality", "unit", "window", "scale"]
    assert {row[0] for row in table} == set(MODALITIES)
    stated = {modality: cells for modality, *cells in table}
    assert stated["CT"] == ["HU", "-1024 to 3071", "linear"]
    assert stated["PET"] == ["SUV", "0 to 20", "linear"]
    assert stated["MRI"] == ["a.u.", "0 to the 99.5th percentile of the volume", "linear"]


def test_it_states_what_the_weights_have_seen(card, config, intensity):
    assert section(card, "Training data") == "It has seen 8 simulated subjects."
    assert section(make_model_card(config, intensity, "silent"), "Training data") == "Not stated."
    config.notice = "Demonstration weights, trained on simulated scans."
    noticed = make_model_card(config, intensity, "noticed")
    assert section(noticed, "Training data") == config.notice
    assert config.notice in section(noticed, "noticed")


def test_it_shows_the_evaluation_with_its_protocol(card, config, intensity):
    text = section(card, "Evaluation")
    assert text.startswith("8 simulated patients of each protocol, split test, judged by slice under `paper_frame`")
    assert "name: paper_frame; area: frame." in text
    assert rows(text) == [
        ["route", "slices", "ssim_frame", "psnr_frame"],
        ["brain/MRI-CT", "24", "0.8282", "27.25"],
        ["brain/CT-MRI", "24", "0.355", ""],
    ]
    assert "## Evaluation" not in make_model_card(config, intensity, "unmeasured").text


def test_it_names_its_limits_and_how_to_cite_it(card):
    limits = section(card, "Limits")
    assert "Lesions may vanish or appear" in limits and "arbitrary units" in limits
    assert re.search(r"```bibtex\n@inproceedings\{\w+,\n.*arxiv\.org.*\n\}\n```", section(card, "Citation"), re.S)


def test_its_example_names_what_the_package_has(card):
    code = re.search(r"```python\n(.*?)```", section(card, "Use"), re.S)[1]
    compile(code, "card", "exec")
    assert "from synermedgen_hf import SynerMedGenPipeline" in code and "trust_remote_code=True" in card.text


def without(config, intensity, *parts):
    config.missing_parts = list(parts)
    return section(make_model_card(config, intensity, "partial"), "Routes and tasks")


def test_it_says_what_is_unavailable_without_the_generation_expert(config, intensity):
    text = without(config, intensity, "generation")
    assert "Synthesis is unavailable: without its generation weights." in text
    assert not any(route in text for route in ROUTES)
    assert "Understanding: MI, TIA." in text


@pytest.mark.parametrize(
    "part",
    [
        "vision",
        pytest.param("understanding"),
    ],
)
def test_it_promises_no_synthesis_that_the_pipeline_refuses(config, intensity, part):
    text = without(config, intensity, part)
    assert f"Synthesis is unavailable: without its {part} weights." in text
    assert not any(route in text for route in ROUTES)


@pytest.mark.parametrize("part", ["vision", "understanding"])
def test_it_promises_no_answers_that_the_pipeline_refuses(config, intensity, part):
    assert "MI, TIA" not in without(config, intensity, part)


# ---------------------------------------------------------------------------------------------------------------------
# Where it stands
# ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_carries_its_card_titled_by_its_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "my-model", card={"license": "mit", "evaluation": EVALUATION})
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.license == "mit" and "# my-model\n" in card.text
    assert card.data.model_name == "my-model" and len(card.data.eval_results) == 3


def test_the_hub_reads_the_card_of_a_pushed_pipeline(hub, pipe):
    pipe.push_to_hub("lab/carded", card=EVERYTHING)
    info = HfApi(endpoint=hub.url, token=hub.token).model_info("lab/carded")
    assert info.library_name == "diffusers" and info.pipeline_tag == "image-to-image"
    assert "synermedgen" in info.tags and info.card_data.base_model == "lab/base"
    card = ModelCard.load("lab/carded")
    assert "# carded\n" in card.text and card.data.model_name == "carded"


def test_the_base_model_is_the_repository_the_model_came_from(pipe, tmp_path):
    pipe.push_to_hub("lab/origin")
    SynerMedGenPipeline.from_pretrained("lab/origin").save_pretrained(tmp_path / "tuned")
    assert ModelCard.load(tmp_path / "tuned" / "README.md").data.base_model == "lab/origin"


def test_the_base_model_the_caller_names_comes_first(pipe, tmp_path):
    pipe.push_to_hub("lab/origin")
    SynerMedGenPipeline.from_pretrained("lab/origin").save_pretrained(tmp_path, card={"base_model": "lab/true"})
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "lab/true"


def test_a_path_is_never_the_base_model(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("runs/best")
    for path in ("runs/best", "./runs/best", tmp_path / "runs" / "best"):  # the first looks like a Hub id
        SynerMedGenPipeline.from_pretrained(path).save_pretrained("saved")
        text = (tmp_path / "saved" / "README.md").read_text()
        assert "base_model" not in text and "runs" not in text and str(tmp_path) not in text


def test_no_repository_is_its_own_base_model(pipe):
    pipe.push_to_hub("lab/itself")
    SynerMedGenPipeline.from_pretrained("lab/itself").push_to_hub("lab/itself")
    assert ModelCard.load("lab/itself").data.base_model is None


def test_only_a_card_of_ours_may_be_replaced(card):
    assert CARD_MARK in str(card) and may_replace_card(str(card)) and may_replace_card(None)
    assert not may_replace_card("# By hand") and not may_replace_card("")
    assert not may_replace_card(str(card).replace(CARD_MARK, ""))


def test_the_bundled_checkpoint_makes_a_valid_card_of_its_evaluation(hub, intensity):
    folder = checkpoint_path("synermedgen-tiny")
    config = SynerMedGenConfig.from_pretrained(folder / "model")
    evaluation = folder / "training" / "evaluation" / "summary.json"
    card = make_model_card(config, intensity, folder.name, evaluation=evaluation)
    card.validate()
    routes = json.loads(evaluation.read_text())["routes"]
    assert {result.dataset_config for result in card.data.eval_results} == set(routes) == set(config.trained_routes)
    assert all(result.metric_value is not None for result in card.data.eval_results)
    shown = rows(section(card, "Evaluation"))
    assert {line[0] for line in shown} == {*routes, "route"}
    assert "Demonstration" in section(card, "synermedgen-tiny")


# ---------------------------------------------------------------------------------------------------------------------
# Bad evaluations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [{}, {"routes": {}}, {"arguments": {}}, {"mean": {"ssim": 1.0}}])
def test_an_evaluation_without_arguments_or_routes_is_refused(config, intensity, evaluation):
    held = ", ".join(evaluation) or "nothing"
    with pytest.raises(ValueError, match=f"must hold 'arguments' and 'routes', got {held}"):
        make_model_card(config, intensity, "bad", evaluation=evaluation)


def record(**changes):
    return {"cases": 1, "protocol": PROTOCOL, "metrics": {}} | changes


@pytest.mark.parametrize(
    "routes",
    [
        [],
        {},
        {"brain/MRI-CT": 0.8},
        {"brain/MRI-CT": {"metrics": {}}},
        {"brain/MRI-CT": record(metrics={"ssim": {"mean": float("nan")}})},
        {"brain/MRI-CT": record(metrics={"ssim": {"mean": "82 %"}})},
    ],
    ids=["a-list", "no-routes", "a-number", "no-protocol", "not-a-number", "a-text"],
)
def test_an_evaluation_whose_records_cannot_be_shown_is_refused(config, intensity, routes):
    with pytest.raises(ValueError, match="evaluation"):
        make_model_card(config, intensity, "bad", evaluation={**EVALUATION, "routes": routes})


def test_a_bad_evaluation_stops_a_save_before_anything_is_written(pipe, tmp_path):
    with pytest.raises(ValueError, match="must hold 'arguments' and 'routes'"):
        pipe.save_pretrained(tmp_path / "new", card={"evaluation": {"ssim": 1.0}})
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        pipe.save_pretrained(tmp_path / "new", card={"evaluation": "nowhere.json"})
    assert not (tmp_path / "new").exists()
