"""One repository for both libraries: what is saved and published comes back whole, by every way in."""

import copy
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, QuantoConfig

from synermedgen_hf import SynerMedGenForConditionalGeneration, SynerMedGenPipeline, SynerMedGenProcessor
from synermedgen_hf.hub import INDEX, STAGING, staged
from synermedgen_hf.loading_synermedgen import weights_checksum
from synermedgen_hf.model_card import CARD_MARK

QUICK = {"num_inference_steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 1.5, "seed": 7}
SMALL_SHARDS = {"max_shard_size": "100KB"}
GENERATION_ATTENTION = r".*\.(q|k|v|o)_proj_moe_gen"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def picture(pipe, image):
    """Hounsfield units of a short synthesis."""
    return pipe(image, target="CT", source="MRI", output_type="np", **QUICK).images[0]


def load(source, **options):
    pipe = SynerMedGenPipeline.from_pretrained(source, print_report=False, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contents(folder):
    """Every file below a folder, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(one, other):
    return weights_checksum(one) == weights_checksum(other)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "saved"


@pytest.fixture
def folder(pipe, saved_once, tmp_path):
    """The pipeline, saved."""
    if not saved_once.exists():
        pipe.save_pretrained(saved_once)
    return shutil.copytree(saved_once, tmp_path / "saved")


@pytest.fixture
def other(pipe):
    """A pipeline of the same make with other weights in model and VAE."""
    other = SynerMedGenPipeline(
        copy.deepcopy(pipe.model), pipe.processor, copy.deepcopy(pipe.vae), copy.deepcopy(pipe.scheduler)
    )
    other.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for module in (other.model, other.vae):
            for parameter in module.parameters():
                parameter.mul_(1.1)
    return other


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


# ---------------------------------------------------------------------------------------------------------------------
# The layout
# ---------------------------------------------------------------------------------------------------------------------

MODEL_FILES = {"config.json", "generation_config.json"}
PROCESSOR_FILES = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
MODEL_CODE = {"configuration_synermedgen.py", "loading_synermedgen.py", "modeling_synermedgen.py"}
PROCESSOR_CODE = {"configuration_synermedgen.py", "image_processing_synermedgen.py", "processing_synermedgen.py"}
ROOT_CODE = MODEL_CODE | PROCESSOR_CODE | {"hub.py", "model_card.py", "pipeline_synermedgen.py"}
WEIGHTS = {"model/model.safetensors", VAE_WEIGHTS}


def below(name, files):
    return {f"{name}/{file}" for file in files}


def test_a_repository_is_what_transformers_and_diffusers_each_look_for(folder):
    code = ROOT_CODE | below("model", MODEL_CODE) | below("processor", PROCESSOR_CODE)
    assert contents(folder).keys() == {
        "README.md",
        "model_index.json",
        INDEX,
        *MODEL_FILES,
        *PROCESSOR_FILES,
        *below("model", MODEL_FILES),
        *below("processor", PROCESSOR_FILES),
        "vae/config.json",
        "scheduler/scheduler_config.json",
        *WEIGHTS,
        *code,
    }


def test_the_weights_are_there_once(folder, pipe):
    stored = {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}
    assert stored.keys() == WEIGHTS
    assert len({hashlib.sha256(data).digest() for data in stored.values()}) == 2
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(pipe.model.state_dict(), "model/model.safetensors")
    assert not (folder / "model" / INDEX).exists()


def test_sharded_weights_are_there_once_too(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, **SMALL_SHARDS)
    shards = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert len(shards) > 2 and "model.safetensors" not in shards
    own = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    root = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert set(own.values()) == shards and own.keys() == pipe.model.state_dict().keys()
    assert root == {name: f"model/{shard}" for name, shard in own.items()}
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_code_at_the_root_and_beside_the_components_is_the_packages(folder):
    package = Path(sys.modules["synermedgen_hf"].__file__).parent
    for name in (ROOT_CODE - {"pipeline_synermedgen.py"}) | below("model", MODEL_CODE):
        assert (folder / name).read_text() == (package / Path(name).name).read_text()
    own, carried = ((place / "pipeline_synermedgen.py").read_text() for place in (package, folder))
    assert carried.startswith(own.rstrip())
    assert "synermedgen_hf" not in [line.split()[1] for line in carried.splitlines() if line.startswith("import ")]


def test_saving_what_was_loaded_gives_the_same_weights_and_code_and_soon_the_same_repository(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "one" / "name")
    load(tmp_path / "one" / "name").save_pretrained(tmp_path / "two" / "name")
    first, one, two = contents(folder), contents(tmp_path / "one" / "name"), contents(tmp_path / "two" / "name")
    assert first.keys() == one.keys()
    different = {name for name in first if first[name] != one[name]}
    assert not [name for name in different if name.endswith((".py", ".safetensors", INDEX))]
    assert one == two  # configurations say more once they were loaded, and from then on the same


def test_the_card_of_what_was_loaded_is_the_same(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "again" / folder.name)
    assert (tmp_path / "again" / folder.name / "README.md").read_text() == (folder / "README.md").read_text()


def test_without_remote_code_there_is_no_code_and_nothing_that_points_to_it(pipe, mr_slice, tmp_path):
    pipe.save_pretrained(tmp_path, remote_code=False)
    assert not list(tmp_path.rglob("*.py"))
    for file in tmp_path.rglob("*.json"):
        assert "auto_map" not in file.read_text(), file
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SynerMedGenPipeline"
    assert np.array_equal(picture(load(tmp_path), mr_slice), picture(pipe, mr_slice))
    assert same_weights(AutoModel.from_pretrained(tmp_path), pipe.model)


# ---------------------------------------------------------------------------------------------------------------------
# Every way in, with the package
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["a folder", "the Hub"])
def source(request, pipe, tmp_path):
    """The same pipeline in a folder and on the Hub."""
    if request.param == "a folder":
        pipe.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"
    pipe.push_to_hub("lab/tiny")
    return "lab/tiny"


def test_the_pipeline_makes_the_same_picture(source, pipe, mr_slice):
    again = load(source)
    assert type(again) is SynerMedGenPipeline
    assert np.array_equal(picture(again, mr_slice), picture(pipe, mr_slice))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("options", [{}, {"subfolder": "model"}], ids=["root", "subfolder"])
def test_the_auto_classes_read_the_model(source, pipe, auto, options):
    model = auto.from_pretrained(source, **options)
    assert type(model) is SynerMedGenForConditionalGeneration
    assert same_weights(model, pipe.model)


@pytest.mark.parametrize("options", [{}, {"subfolder": "processor"}], ids=["root", "subfolder"])
def test_the_auto_class_reads_the_processor(source, processor, options):
    again = AutoProcessor.from_pretrained(source, **options)
    assert type(again) is SynerMedGenProcessor
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template
    assert again(text="a CT").input_ids == processor(text="a CT").input_ids


def test_a_sharded_repository_is_read_by_all_of_them(pipe, mr_slice, hub, tmp_path):
    pipe.save_pretrained(tmp_path, **SMALL_SHARDS)
    pipe.push_to_hub("lab/sharded", **SMALL_SHARDS)
    assert len([name for name in hub.files("lab/sharded") if name.startswith("model/model-")]) > 2
    for source in (tmp_path, "lab/sharded"):
        assert np.array_equal(picture(load(source), mr_slice), picture(pipe, mr_slice))
        for options in ({}, {"subfolder": "model"}):
            assert same_weights(AutoModel.from_pretrained(source, **options), pipe.model)


def test_diffusers_reads_it_with_trust_and_not_without(source, pipe, mr_slice):
    with pytest.raises(ValueError, match="contains custom code in pipeline_synermedgen.py"):
        DiffusionPipeline.from_pretrained(source)
    again = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == "SynerMedGenPipeline"
    assert np.array_equal(picture(again, mr_slice), picture(pipe, mr_slice))


def test_what_diffusers_loaded_is_saved_without_any_path_of_the_machine(folder, tmp_path):
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "again")
    texts = {path: path.read_text() for path in (tmp_path / "again").rglob("*.json")}
    assert texts and [path for path, text in texts.items() if str(tmp_path) in text] == []


def test_the_installed_package_comes_first_even_where_the_repositorys_code_is_trusted(source):
    assert type(load(source, trust_remote_code=True).model) is SynerMedGenForConditionalGeneration


def test_a_folder_is_loaded_without_asking_the_hub_anything(folder, hub):
    asked = len(hub.requests)
    load(folder)
    assert hub.requests[asked:] == []


def test_a_pulled_repository_loads_again_without_the_hub(pipe, mr_slice, hub, tmp_path):
    pipe.push_to_hub("lab/offline")
    load("lab/offline", cache_dir=tmp_path)
    asked = len(hub.requests)
    again = load("lab/offline", cache_dir=tmp_path, local_files_only=True)
    assert hub.requests[asked:] == []
    assert np.array_equal(picture(again, mr_slice), picture(pipe, mr_slice))


# ---------------------------------------------------------------------------------------------------------------------
# Without the package
# ---------------------------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "synermedgen_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import numpy as np
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

repo, out, quick = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
try:
    import synermedgen_hf
except ModuleNotFoundError:
    found = {"refusals": {}}
for loader in (DiffusionPipeline, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    try:
        loader.from_pretrained(repo)
    except Exception as error:
        found["refusals"][loader.__name__] = str(error)

pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
image = np.load(out / "slice.npy")
np.save(out / "picture.npy", pipe(image, target="CT", source="MRI", output_type="np", **quick).images[0])
found["identified"], found["answer"] = pipe.identify(image), pipe.answer(image, "Which?", max_new_tokens=2)

checksum = sys.modules[type(pipe.model).__module__].LoadReport.__module__
checksum = sys.modules[checksum].weights_checksum
found["checksums"] = {}
for loader in (AutoModel, AutoModelForImageTextToText):
    for options in ({}, {"subfolder": "model"}):
        model = loader.from_pretrained(repo, trust_remote_code=True, **options)
        found["checksums"][f"{loader.__name__} {options}"] = checksum(model)
for options in ({}, {"subfolder": "processor"}):
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, **options)
    found[f"words {options}"] = processor(text="a CT").input_ids
found["classes"] = [type(one).__name__ for one in (pipe, model, processor, processor.image_processor)]
found["suppressed"] = pipe.model.generation_config.suppress_tokens
pipe.save_pretrained(out / "again" / "stranger")
pipe.push_to_hub(repo + "-again")
found["imported"] = [name for name in sys.modules if name.partition(".")[0] == "synermedgen_hf"]
(out / "found.json").write_text(json.dumps(found))
"""
STRANGER_REPO = "lab/stranger"
RAN = {}  # one interpreter for all tests below: starting it is what takes the time


@pytest.fixture
def stranger(pipe, mr_slice, hub, tmp_path_factory):
    """What a process that cannot import the package made of the pushed repository."""
    pipe.model.config.trained_tasks = ["MI"]
    if not RAN:
        out = tmp_path_factory.mktemp("stranger")
        pipe.push_to_hub(STRANGER_REPO)
        np.save(out / "slice.npy", mr_slice)
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, STRANGER_REPO, str(out), json.dumps(QUICK)],
            env={**os.environ, **hub.environment(), "HF_HOME": str(out / "home")},
            cwd=out,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        RAN.update(out=out, errors=done.stderr)
        if done.returncode == 0:
            RAN.update(found=json.loads((out / "found.json").read_text()))
    assert "found" in RAN, RAN["errors"]
    return RAN


def test_without_the_package_the_same_picture_is_made(stranger, pipe, mr_slice):
    assert stranger["found"]["imported"] == []
    assert np.array_equal(np.load(stranger["out"] / "picture.npy"), picture(pipe, mr_slice))


def test_without_the_package_the_same_answers_are_given(stranger, pipe, mr_slice):
    assert stranger["found"]["identified"] == pipe.identify(mr_slice)
    assert stranger["found"]["answer"] == pipe.answer(mr_slice, "Which?", max_new_tokens=2)


def test_without_the_package_the_auto_classes_read_every_weight_and_word(stranger, pipe, processor):
    found = stranger["found"]
    assert len(found["checksums"]) == 4 and set(found["checksums"].values()) == {weights_checksum(pipe.model)}
    words = processor(text="a CT").input_ids
    assert found["words {}"] == found["words {'subfolder': 'processor'}"] == words
    assert found["classes"] == [
        "SynerMedGenPipeline",
        "SynerMedGenForConditionalGeneration",
        "SynerMedGenProcessor",
        "SynerMedGenImageProcessor",
    ]


@pytest.mark.parametrize("loader", ["DiffusionPipeline", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"])
def test_without_the_package_nothing_loads_untrusted(stranger, loader):
    assert "trust_remote_code=True" in stranger["found"]["refusals"][loader]


def test_without_the_package_it_can_be_saved_again_with_the_same_code_and_weights(stranger, hub):
    again, pushed = contents(stranger["out"] / "again" / "stranger"), hub.files(STRANGER_REPO)
    del pushed[".gitattributes"]
    assert again.keys() == pushed.keys()
    # What the libraries write about how something was loaded, and the card's base model.
    aside = {"config.json", "generation_config.json", "model_index.json", "tokenizer_config.json", "README.md"}
    assert {Path(name).name for name in pushed if again[name] != pushed[name]} <= aside


def test_without_the_package_answers_still_hold_no_stand_ins_for_images(stranger, pipe):
    assert stranger["found"]["suppressed"] == pipe.model.generation_config.suppress_tokens != []


def test_without_the_package_it_can_be_published_again(stranger, hub, mr_slice, pipe):
    assert hub.files(STRANGER_REPO).keys() == hub.files(f"{STRANGER_REPO}-again").keys()
    assert np.array_equal(picture(load(f"{STRANGER_REPO}-again"), mr_slice), picture(pipe, mr_slice))


def test_the_strangers_copy_loads_with_the_package(stranger, mr_slice, pipe):
    again = load(stranger["out"] / "again" / "stranger")
    assert type(again.model) is SynerMedGenForConditionalGeneration
    assert np.array_equal(picture(again, mr_slice), picture(pipe, mr_slice))


# ---------------------------------------------------------------------------------------------------------------------
# Publishing
# ---------------------------------------------------------------------------------------------------------------------

# Weights of an earlier save under other names.
STALE = ["model.safetensors", f"model/{INDEX}", "model/model-00001-of-00002.safetensors"]
STALE += ["vae/diffusion_pytorch_model.fp16.safetensors"]


def test_what_is_pushed_is_what_would_be_saved(pipe, hub, tmp_path):
    address = pipe.push_to_hub("lab/published", commit_message="First")
    pipe.save_pretrained(tmp_path / "published")
    pushed = hub.files("lab/published")
    del pushed[".gitattributes"]
    assert pushed == contents(tmp_path / "published")
    assert address.startswith(f"{hub.url}/lab/published/commit/")


def test_save_pretrained_publishes_the_folder_it_saved(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path / "by-folder-name", push_to_hub=True)
    pipe.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="lab/named", commit_message="Named")
    for repo, folder in (("tester/by-folder-name", "by-folder-name"), ("lab/named", "here")):
        pushed = hub.files(repo)
        del pushed[".gitattributes"]
        assert pushed == contents(tmp_path / folder)


def test_a_revision_is_loaded_by_every_component(pipe, other, api):
    pipe.push_to_hub("lab/revised")
    first = api.model_info("lab/revised").sha
    other.push_to_hub("lab/revised")
    old, new = load("lab/revised", revision=first), load("lab/revised")
    assert same_weights(old.model, pipe.model) and same_weights(old.vae, pipe.vae)
    assert same_weights(new.model, other.model) and same_weights(new.vae, other.vae)


def test_a_private_repository_needs_the_token(pipe, hub, api):
    pipe.push_to_hub("lab/secret", private=True)
    assert api.model_info("lab/secret").private
    assert same_weights(load("lab/secret", token=hub.read_token).model, pipe.model)
    with pytest.raises(OSError, match="lab/secret is not a local folder and is not a valid model identifier"):
        load("lab/secret", token=False, force_download=True)


def test_the_model_alone_goes_to_the_hub_and_back(model, hub):
    model.push_to_hub("lab/model-alone")
    assert hub.files("lab/model-alone").keys() >= {"config.json", "model.safetensors", *MODEL_CODE}
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert same_weights(auto.from_pretrained("lab/model-alone"), model)


def test_the_processor_alone_goes_to_the_hub_and_back(processor, hub):
    processor.push_to_hub("lab/processor-alone")
    assert hub.files("lab/processor-alone").keys() >= {*PROCESSOR_FILES, *PROCESSOR_CODE}
    again = AutoProcessor.from_pretrained("lab/processor-alone")
    assert type(again) is SynerMedGenProcessor
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


def test_pushing_again_removes_the_shards_of_an_earlier_push_and_nothing_else(pipe, hub, api):
    pipe.push_to_hub("lab/again")
    kept = ["notes.txt", "lora/mine/adapter_model.safetensors", "figures/model.png"]
    for name in STALE + kept:
        api.upload_file(repo_id="lab/again", path_or_fileobj=name.encode(), path_in_repo=name)
    pipe.push_to_hub("lab/again")
    files = hub.files("lab/again")
    assert not files.keys() & set(STALE) and files.keys() >= set(kept)
    assert same_weights(load("lab/again").model, pipe.model)


def test_pushing_unsharded_over_sharded_and_back_leaves_one_copy(pipe, hub):
    for options, sharded in ((SMALL_SHARDS, True), ({}, False), (SMALL_SHARDS, True)):
        pipe.push_to_hub("lab/resharded", **options)
        weights = [name for name in hub.files("lab/resharded") if name.startswith("model/model")]
        assert ("model/model.safetensors" in weights) is not sharded and (f"model/{INDEX}" in weights) is sharded
        assert (len([name for name in weights if name.endswith(".safetensors")]) > 1) is sharded
        assert same_weights(load("lab/resharded", force_download=True).model, pipe.model)


def test_a_readme_edited_on_the_hub_stays_and_the_weights_are_replaced(pipe, other, hub, api, caplog):
    pipe.push_to_hub("lab/edited")
    assert CARD_MARK in hub.files("lab/edited")["README.md"].decode()
    api.upload_file(repo_id="lab/edited", path_or_fileobj=b"# By hand\n", path_in_repo="README.md")
    other.push_to_hub("lab/edited")
    assert hub.files("lab/edited")["README.md"] == b"# By hand\n"
    assert "README of lab/edited was changed by hand" in caplog.text
    assert same_weights(load("lab/edited").model, other.model)


def test_a_readme_of_ours_on_the_hub_is_written_anew(pipe, hub):
    pipe.push_to_hub("lab/rewritten", card={"title": "Old"})
    pipe.push_to_hub("lab/rewritten", card={"title": "New"})
    card = ModelCard.load("lab/rewritten")
    assert "# New" in card.text and "# Old" not in card.text


def test_a_token_that_may_only_read_publishes_nothing(pipe, hub):
    with pytest.raises(Exception, match="403"):
        pipe.push_to_hub("lab/forbidden", token=hub.read_token)
    with pytest.raises(KeyError):
        hub.files("lab/forbidden")


# ---------------------------------------------------------------------------------------------------------------------
# Saving over what is there, and saving that fails
# ---------------------------------------------------------------------------------------------------------------------


def test_saving_over_an_older_repository_replaces_its_weights_and_keeps_everything_else(folder, other, mr_slice):
    kept = ["notes.txt", "training/log.jsonl", "training/model.safetensors", "lora/mine/adapter_model.safetensors"]
    for name in STALE + kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    other.save_pretrained(folder)
    after = contents(folder)
    assert not after.keys() & set(STALE) and after.keys() >= set(kept)
    assert not any(STAGING in name for name in after) and not (folder / STAGING).exists()
    assert np.array_equal(picture(load(folder), mr_slice), picture(other, mr_slice))
    assert same_weights(AutoModel.from_pretrained(folder), other.model)


def test_saving_unsharded_over_sharded_and_back_leaves_one_copy(pipe, tmp_path):
    for options, sharded in ((SMALL_SHARDS, True), ({}, False), (SMALL_SHARDS, True)):
        pipe.save_pretrained(tmp_path, **options)
        assert (tmp_path / "model" / "model.safetensors").exists() is not sharded
        assert (tmp_path / "model" / INDEX).exists() is sharded
        assert same_weights(AutoModel.from_pretrained(tmp_path), pipe.model)
        assert same_weights(load(tmp_path).model, pipe.model)


def test_a_readme_edited_by_hand_stays(folder, pipe, caplog):
    assert CARD_MARK in (folder / "README.md").read_text()
    (folder / "README.md").write_text("# By hand\n")
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# By hand\n"
    assert "README.md was changed by hand and stays as it is" in caplog.text


def test_a_readme_of_ours_is_written_anew(folder, pipe):
    pipe.save_pretrained(folder, card={"title": "Another title"})
    assert "# Another title" in (folder / "README.md").read_text()


def fill_the_disk(target, name, monkeypatch):
    """Make a function fail as it does on a full disk, after it has begun a file."""

    def full(*args, **kwargs):
        folder = next(Path(arg) for arg in args if isinstance(arg, (str, Path)))
        folder = folder if folder.suffix == "" else folder.parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, name, full)


def what_writes(part, pipe):
    if part == "the code":
        return sys.modules["synermedgen_hf.hub"], "complete_repository"
    return (ModelCard, "save") if part == "the card" else (type(getattr(pipe, part)), "save_pretrained")


@pytest.mark.parametrize("part", ["model", "processor", "vae", "scheduler", "the code", "the card"])
def test_a_disk_that_fills_up_leaves_the_old_repository_as_it_was(folder, other, pipe, mr_slice, monkeypatch, part):
    before = contents(folder)
    with monkeypatch.context() as patch:
        fill_the_disk(*what_writes(part, pipe), patch)
        with pytest.raises(OSError, match="No space left on device"):
            other.save_pretrained(folder)
    assert contents(folder) == before and not (folder / STAGING).exists()
    assert np.array_equal(picture(load(folder), mr_slice), picture(pipe, mr_slice))


@pytest.mark.parametrize("part", ["model", "vae", "the card"])
def test_a_disk_that_fills_up_leaves_no_new_folder(pipe, tmp_path, monkeypatch, part):
    fill_the_disk(*what_writes(part, pipe), monkeypatch)
    with pytest.raises(OSError, match="No space left on device"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_publishes_nothing(pipe, hub, tmp_path, monkeypatch):
    fill_the_disk(*what_writes("vae", pipe), monkeypatch)
    asked = len(hub.requests)
    with pytest.raises(OSError, match="No space left on device"):
        pipe.push_to_hub("lab/unborn")
    with pytest.raises(OSError, match="No space left on device"):
        pipe.save_pretrained(tmp_path / "unborn", push_to_hub=True)
    assert hub.requests[asked:] == []


def test_an_interruption_by_hand_cleans_up_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "new") as inside:
        (inside / "model_index.json").write_text("{}")
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_what_a_killed_save_left_behind_harms_nothing_and_is_cleared(folder, other, pipe, mr_slice):
    (folder / STAGING / "model").mkdir(parents=True)
    (folder / STAGING / "model" / "model.safetensors").write_bytes(b"half")
    assert np.array_equal(picture(load(folder), mr_slice), picture(pipe, mr_slice))
    other.save_pretrained(folder)
    assert not (folder / STAGING).exists()
    assert np.array_equal(picture(load(folder), mr_slice), picture(other, mr_slice))


def test_a_new_folder_that_a_killed_save_left_behind_does_not_look_complete(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "whole")
    (tmp_path / "new").mkdir()
    (tmp_path / "whole").rename(tmp_path / "new" / STAGING)
    with pytest.raises(OSError, match="is not a SynerMedGen pipeline"):
        load(tmp_path / "new")
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(tmp_path / "new")
    pipe.save_pretrained(tmp_path / "new")
    assert same_weights(load(tmp_path / "new").model, pipe.model)


def stop_before_moving(name, monkeypatch):
    replace = os.replace

    def stopping(source, target):
        if Path(target).as_posix().endswith(name):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)


@pytest.mark.parametrize("name", ["model/model.safetensors", "processor/tokenizer.json", VAE_WEIGHTS, INDEX])
def test_a_new_folder_whose_last_step_was_interrupted_never_loads_by_halves(pipe, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        stop_before_moving(name, patch)
        with pytest.raises(OSError, match="Input/output error"):
            pipe.save_pretrained(tmp_path / "new")
    if name != INDEX:  # which only the Auto classes need
        with pytest.raises((OSError, ValueError)):
            load(tmp_path / "new")
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(tmp_path / "new")
    pipe.save_pretrained(tmp_path / "new")
    assert same_weights(load(tmp_path / "new").model, pipe.model)


def test_an_old_folder_whose_last_step_was_interrupted_never_loads_as_a_mixture(folder, other, pipe, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before_moving(VAE_WEIGHTS, patch)
        with pytest.raises(OSError, match="Input/output error"):
            other.save_pretrained(folder)
    try:
        loaded = load(folder)
    except (OSError, ValueError):
        return
    assert same_weights(loaded.model, pipe.model) and same_weights(loaded.vae, pipe.vae)


def test_pickle_is_refused_before_anything_is_written(pipe, tmp_path):
    with pytest.raises(ValueError, match="safetensors only: safe_serialization=False would be pickle"):
        pipe.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder_to_save_into(pipe, tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(NotADirectoryError, match="model.safetensors is a file; name a folder to save into"):
        pipe.save_pretrained(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_word_the_card_does_not_know_is_refused_before_anything_is_written(pipe, tmp_path):
    with pytest.raises(TypeError, match="licence"):
        pipe.save_pretrained(tmp_path / "new", card={"licence": "mit"})
    assert not (tmp_path / "new").exists()


def test_an_argument_that_would_do_nothing_is_refused(pipe, tmp_path):
    with pytest.raises(TypeError, match="max_shard_sise"):
        pipe.save_pretrained(tmp_path / "new", max_shard_sise="1GB")


# ---------------------------------------------------------------------------------------------------------------------
# Wrong folders, parts that do not fit
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "some/long/path"):
        with pytest.raises(FileNotFoundError, match="There is no folder .*(nowhere|some/long/path)"):
            load(path)


def test_a_repository_that_is_not_there():
    with pytest.raises(OSError, match="lab/nowhere is not a local folder and is not a valid model identifier"):
        load("lab/nowhere")


def test_a_file_in_place_of_a_folder(folder):
    with pytest.raises(NotADirectoryError, match="model.safetensors is a file; name the folder of a pipeline"):
        load(folder / "model" / "model.safetensors")


def test_an_original_checkpoint_is_recognised(tmp_path):
    for name in ("llm_config.json", "vit_config.json", "ema.safetensors", "ae.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(OSError, match="original BAGEL-family checkpoint: synermedgen convert-bagel makes a pipeline"):
        load(tmp_path)


def test_a_model_alone_is_recognised(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "alone")
    for path in (folder / "model", folder / "vae", tmp_path / "alone"):
        with pytest.raises(OSError, match="lacks model.*looks like a model or a component alone.*the folder above"):
            load(path)


def test_an_empty_folder_and_one_of_something_else(tmp_path):
    with pytest.raises(OSError, match="lacks model.*Name the folder that save_pretrained or convert-bagel wrote"):
        load(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(OSError, match="is not a SynerMedGen pipeline: it lacks model"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model", "processor", "vae", "scheduler"])
def test_a_component_that_is_not_there_is_named_unless_it_is_given(folder, pipe, name):
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(OSError, match=f"is not a SynerMedGen pipeline: it lacks {name}/"):
        load(folder)
    assert getattr(load(folder, **{name: getattr(pipe, name)}), name) is getattr(pipe, name)


def test_a_repository_without_one_component_is_not_called_a_component(folder):
    (folder / "vae").rename(folder / "elsewhere")
    with pytest.raises(OSError, match="lacks vae/") as error:
        load(folder)
    assert "alone" not in str(error.value)


def test_an_autoencoder_without_its_config_is_named(folder):
    (folder / "vae" / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match="vae"):
        load(folder)


def test_a_model_of_another_kind_is_named(folder):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "qwen2"}))
    with pytest.raises((OSError, ValueError), match="qwen2"):
        load(folder)


def test_a_processor_of_other_grids_does_not_fit(folder):
    file = folder / "processor" / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["latent_stride"] = 32
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit.*'latent_stride': 32.*'latent_stride': 16"):
        load(folder)


def test_an_autoencoder_of_another_scale_does_not_fit(folder, pipe):
    shallow = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=[8])
    with pytest.raises(ValueError, match="does not fit.*'latent_stride': 16.*'latent_stride': 2"):
        load(folder, vae=shallow)


def test_an_autoencoder_of_other_channels_does_not_fit(folder, pipe):
    wide = AutoencoderKL.from_config({**pipe.vae.config, "latent_channels": 8})
    with pytest.raises(ValueError, match="does not fit"):
        load(folder, vae=wide)


def test_a_tokenizer_of_other_ids_does_not_fit(folder, model):
    model.config.image_token_id = model.config.latent_token_id
    with pytest.raises(ValueError, match="does not fit"):
        load(folder, model=model)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA adapters
# ---------------------------------------------------------------------------------------------------------------------


def make_adapter(model, folder, seed=0, **options):
    """Train nothing, but save in PEFT's format what a training would leave: an adapter that is not zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": GENERATION_ATTENTION, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name of its past
        trained = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    trained.save_pretrained(folder)
    return trained


@pytest.fixture
def adapter(model, tmp_path):
    make_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def second(model, tmp_path):
    make_adapter(model, tmp_path / "second", seed=1)
    return tmp_path / "second"


def differ(one, other):
    return np.abs(one - other).mean() > 1  # HU


def test_an_adapter_changes_the_picture_and_leaves_without_a_trace(pipe, adapter, mr_slice):
    base, names = picture(pipe, mr_slice), list(pipe.model.state_dict())
    pipe.load_lora_weights(adapter)
    assert differ(picture(pipe, mr_slice), base)
    pipe.unload_lora_weights()
    assert np.array_equal(picture(pipe, mr_slice), base)
    assert list(pipe.model.state_dict()) == names and not hasattr(pipe.model, "peft_config")
    pipe.unload_lora_weights()  # without any, nothing happens
    pipe.load_lora_weights(adapter)  # and the name is free again
    assert differ(picture(pipe, mr_slice), base)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {".*q_proj_moe_gen": 2}, "alpha_pattern": {".*q_proj_moe_gen": 16}},
        {"modules_to_save": ["llm2vae"]},
    ],
    ids=["plain", "rank-stabilised", "by-name", "by-pattern", "with-a-whole-module"],
)
def test_an_adapter_acts_as_peft_merges_it(pipe, mr_slice, tmp_path, options):
    merged = make_adapter(pipe.model, tmp_path / "adapter", **options).merge_and_unload()
    base, expected = picture(pipe, mr_slice), None
    pipe.load_lora_weights(tmp_path / "adapter")
    adapted = picture(pipe, mr_slice)
    pipe.register_modules(model=merged)
    expected = picture(pipe, mr_slice)
    assert differ(adapted, base)
    np.testing.assert_allclose(adapted, expected, atol=0.05)  # of 4095 HU


def test_an_adapter_that_could_not_be_taken_out_again_is_refused(pipe, tmp_path):
    make_adapter(pipe.model, tmp_path, bias="lora_only")  # writes over the base's biases
    before = weights_checksum(pipe.model)
    with pytest.raises(ValueError, match="uses bias; only plain LoRA adapters are loaded"):
        pipe.load_lora_weights(tmp_path)
    assert weights_checksum(pipe.model) == before


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["llm2vae"]}, {"target_modules": ["embed_tokens"]}],
    ids=["whole-module", "embedding"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_other_kinds_of_adapters_leave_without_a_trace_too(pipe, mr_slice, tmp_path, options):
    make_adapter(pipe.model, tmp_path, **options)
    base, before = picture(pipe, mr_slice), weights_checksum(pipe.model)
    pipe.load_lora_weights(tmp_path)
    assert differ(picture(pipe, mr_slice), base)
    pipe.unload_lora_weights()
    assert weights_checksum(pipe.model) == before
    assert np.array_equal(picture(pipe, mr_slice), base)


def test_weights_of_adapters_scale_switch_and_add_them(pipe, adapter, second, mr_slice):
    base = picture(pipe, mr_slice)
    pipe.load_lora_weights(adapter, adapter_name="one")
    one = picture(pipe, mr_slice)
    pipe.set_adapters("one", 0.0)
    assert np.array_equal(picture(pipe, mr_slice), base)
    pipe.set_adapters("one", 0.5)
    half = picture(pipe, mr_slice)
    assert differ(half, base) and differ(half, one)
    pipe.set_adapters("one")
    assert np.array_equal(picture(pipe, mr_slice), one)

    pipe.load_lora_weights(second, adapter_name="two")  # in place of the first
    two = picture(pipe, mr_slice)
    assert differ(two, one)
    pipe.set_adapters(["one", "two"])
    both = picture(pipe, mr_slice)
    assert differ(both, one) and differ(both, two)
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert np.array_equal(picture(pipe, mr_slice), one)
    pipe.set_adapters(["one", "two"], 0.0)
    assert np.array_equal(picture(pipe, mr_slice), base)
    pipe.set_adapters(["two", "one"], [1, 1])
    np.testing.assert_allclose(picture(pipe, mr_slice), both, atol=0.05)
    pipe.unload_lora_weights()
    assert np.array_equal(picture(pipe, mr_slice), base)


def test_one_of_two_adapters_can_be_removed(pipe, adapter, second, mr_slice):
    pipe.load_lora_weights(adapter, adapter_name="one")
    one = picture(pipe, mr_slice)
    pipe.load_lora_weights(second, adapter_name="two")
    pipe.remove_adapters(["two"])
    pipe.set_adapters("one")
    assert np.array_equal(picture(pipe, mr_slice), one)


def test_set_adapters_refuses_names_and_numbers_that_do_not_fit(pipe, adapter):
    with pytest.raises(ValueError, match="No adapter called one is loaded; loaded: none"):
        pipe.set_adapters("one")
    pipe.load_lora_weights(adapter, adapter_name="one")
    with pytest.raises(ValueError, match="No adapter called two is loaded; loaded: one"):
        pipe.set_adapters(["one", "two"])
    with pytest.raises(ValueError, match="Got 2 weights for 1 adapters"):
        pipe.set_adapters("one", [1.0, 0.5])


def test_what_is_trained_and_what_is_frozen_does_not_change(pipe, adapter):
    for name, parameter in pipe.model.named_parameters():
        parameter.requires_grad_("moe_gen" in name)
    before = {name: parameter.requires_grad for name, parameter in pipe.model.named_parameters()}
    pipe.load_lora_weights(adapter)
    loaded = {
        name.replace(".base_layer.", "."): parameter.requires_grad
        for name, parameter in pipe.model.named_parameters()
        if "lora_" not in name
    }
    assert loaded == before
    pipe.unload_lora_weights()
    assert {name: parameter.requires_grad for name, parameter in pipe.model.named_parameters()} == before


def test_a_name_that_is_taken_is_refused(pipe, adapter, second, mr_slice):
    pipe.load_lora_weights(adapter, adapter_name="ct")
    one = picture(pipe, mr_slice)
    with pytest.raises(ValueError, match="An adapter called 'ct' is loaded already; choose another adapter_name"):
        pipe.load_lora_weights(second, adapter_name="ct")
    assert np.array_equal(picture(pipe, mr_slice), one)


@pytest.mark.parametrize("name", ["ct", "model", "lora", "q_proj_moe_gen"])
def test_names_that_occur_in_names_of_tensors_are_names_like_any_other(pipe, adapter, mr_slice, name):
    base = picture(pipe, mr_slice)
    pipe.load_lora_weights(adapter)
    adapted = picture(pipe, mr_slice)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter, adapter_name=name)
    assert np.array_equal(picture(pipe, mr_slice), adapted)
    pipe.unload_lora_weights()
    assert np.array_equal(picture(pipe, mr_slice), base)


def widen(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weights[name].repeat(1, 2) for name in weights}, folder / "adapter_model.safetensors")


def name_no_module(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["to_q"]}))


def lose_a_tensor(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")


def gain_a_tensor(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    extra = {"base_model.model.model.elsewhere.lora_A.weight": torch.zeros(4, 32)}
    save_file({**weights, **extra}, folder / "adapter_model.safetensors")


WRONG = [widen, name_no_module, lose_a_tensor, gain_a_tensor]


@pytest.mark.parametrize("spoil", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(pipe, adapter, mr_slice, spoil):
    base, before = picture(pipe, mr_slice), weights_checksum(pipe.model)
    spoil(adapter)
    with pytest.raises(ValueError, match="The adapter .*/adapter does not fit this model, which stays as it was"):
        pipe.load_lora_weights(adapter)
    assert weights_checksum(pipe.model) == before and not hasattr(pipe.model, "peft_config")
    assert np.array_equal(picture(pipe, mr_slice), base)


@pytest.mark.parametrize("spoil", WRONG)
def test_an_adapter_that_does_not_fit_leaves_the_ones_in_use_in_use(pipe, adapter, second, mr_slice, spoil):
    pipe.load_lora_weights(adapter, adapter_name="one")
    pipe.set_adapters("one", 0.5)
    before = picture(pipe, mr_slice)
    spoil(second)
    with pytest.raises(ValueError, match="does not fit this model"):
        pipe.load_lora_weights(second, adapter_name="two")
    assert list(pipe.model.peft_config) == ["one"]
    assert np.array_equal(picture(pipe, mr_slice), before)


def test_an_adapter_of_a_model_of_another_size_is_refused(pipe, config, mr_slice, tmp_path):
    larger = type(config).from_dict(config.to_dict())
    larger.text_config.hidden_size = 64
    make_adapter(SynerMedGenForConditionalGeneration(larger), tmp_path)
    base = picture(pipe, mr_slice)
    with pytest.raises(ValueError, match="does not fit this model, which stays as it was"):
        pipe.load_lora_weights(tmp_path)
    assert np.array_equal(picture(pipe, mr_slice), base)


def test_the_refusal_of_an_adapter_gives_no_advice_that_cannot_be_followed(pipe, adapter):
    lose_a_tensor(adapter)
    with pytest.raises(ValueError, match="does not fit this model") as error:
        pipe.load_lora_weights(adapter)
    assert "allow_missing" not in str(error.value) and "convert-bagel" not in str(error.value)


def test_files_of_an_adapter_that_are_not_there_are_named(pipe, adapter, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (adapter / name).read_bytes()
        (adapter / name).unlink()
        with pytest.raises((OSError, ValueError), match=name):
            pipe.load_lora_weights(adapter)
        (adapter / name).write_bytes(content)
    with pytest.raises(OSError, match="nowhere"):
        pipe.load_lora_weights(tmp_path / "nowhere")


def test_a_pickled_adapter_is_not_read(pipe, adapter, mr_slice):
    base = picture(pipe, mr_slice)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        pipe.load_lora_weights(adapter)
    assert np.array_equal(picture(pipe, mr_slice), base)


def test_a_damaged_adapter_is_called_damaged(pipe, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OSError, match="adapter.*damaged or not complete"):
        pipe.load_lora_weights(adapter)


def test_an_argument_that_loading_an_adapter_does_not_know_is_refused(pipe, adapter):
    with pytest.raises(TypeError, match="unknown arguments: weight_name"):
        pipe.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")


def test_without_peft_it_says_what_to_install(pipe, adapter, monkeypatch):
    monkeypatch.setattr("synermedgen_hf.hub.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install"):
        pipe.load_lora_weights(adapter)


@pytest.mark.parametrize("loaded_from", ["memory", "a folder"])
@pytest.mark.parametrize("when", ["active", "unloaded"])
def test_saving_after_an_adapter_was_loaded_keeps_the_base_weights(
    folder, pipe, adapter, mr_slice, tmp_path, when, loaded_from
):
    base = picture(pipe, mr_slice)
    used = load(folder) if loaded_from == "a folder" else pipe
    used.load_lora_weights(adapter, adapter_name="ct")
    if when == "unloaded":
        used.unload_lora_weights()
    used.save_pretrained(tmp_path / "again")
    used.model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "again" / "lora" / "ct").exists() is (when == "active")
    assert np.array_equal(picture(load(tmp_path / "again"), mr_slice), base)
    files = tmp_path / "model" / "model.safetensors", folder / "model" / "model.safetensors"
    assert files[0].read_bytes() == files[1].read_bytes()


def test_base_and_adapters_are_saved_side_by_side_and_put_together_again(
    folder, pipe, adapter, second, mr_slice, tmp_path, caplog
):
    base = picture(pipe, mr_slice)
    pipe.load_lora_weights(second, adapter_name="two")
    two = picture(pipe, mr_slice)
    pipe.load_lora_weights(adapter, adapter_name="ct")
    adapted = picture(pipe, mr_slice)
    pipe.save_pretrained(tmp_path / "both")
    assert "load_lora_weights(..., subfolder='lora/NAME')" in caplog.text
    assert np.array_equal(picture(pipe, mr_slice), adapted)  # saving changes nothing

    files = ("adapter_config.json", "adapter_model.safetensors")
    expected = {f"lora/{name}/{file}" for name in ("ct", "two") for file in files}
    assert {name for name in contents(tmp_path / "both") if "lora" in name} == expected
    again = load(tmp_path / "both")
    assert np.array_equal(picture(again, mr_slice), base)
    again.load_lora_weights(tmp_path / "both", subfolder="lora/ct", adapter_name="mine")
    assert np.array_equal(picture(again, mr_slice), adapted)
    again.load_lora_weights(tmp_path / "both" / "lora" / "two", adapter_name="two")
    assert np.array_equal(picture(again, mr_slice), two)


def test_the_model_saves_its_adapters_beside_the_base_weights_too(pipe, adapter, mr_slice, tmp_path):
    base = picture(pipe, mr_slice)
    pipe.load_lora_weights(adapter, adapter_name="ct")
    adapted = picture(pipe, mr_slice)
    pipe.model.save_pretrained(tmp_path)
    again = SynerMedGenPipeline(AutoModel.from_pretrained(tmp_path), pipe.processor, pipe.vae, pipe.scheduler)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(again, mr_slice), base)
    again.load_lora_weights(tmp_path, subfolder="lora/ct")
    assert np.array_equal(picture(again, mr_slice), adapted)


def test_a_whole_module_that_an_adapter_brings_is_saved_with_the_adapter(pipe, mr_slice, tmp_path):
    make_adapter(pipe.model, tmp_path / "adapter", modules_to_save=["llm2vae"])
    base = picture(pipe, mr_slice)
    pipe.load_lora_weights(tmp_path / "adapter", adapter_name="ct")
    adapted = picture(pipe, mr_slice)
    pipe.save_pretrained(tmp_path / "both")
    again = load(tmp_path / "both")
    assert np.array_equal(picture(again, mr_slice), base)
    again.load_lora_weights(tmp_path / "both", subfolder="lora/ct")
    assert np.array_equal(picture(again, mr_slice), adapted)


def test_an_adapter_is_loaded_from_the_hub(pipe, adapter, api, hub, mr_slice):
    pipe.load_lora_weights(adapter)
    adapted = picture(pipe, mr_slice)
    pipe.unload_lora_weights()
    api.create_repo("lab/adapters")
    api.upload_folder(repo_id="lab/adapters", folder_path=adapter)
    api.upload_folder(repo_id="lab/adapters", folder_path=adapter, path_in_repo="lora/ct")
    for options in ({}, {"subfolder": "lora/ct"}):
        pipe.load_lora_weights("lab/adapters", **options)
        assert np.array_equal(picture(pipe, mr_slice), adapted)
        pipe.unload_lora_weights()
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        pipe.load_lora_weights("lab/adapters", subfolder="lora/mri")


def test_base_and_adapter_are_published_together(pipe, adapter, mr_slice):
    base = picture(pipe, mr_slice)
    pipe.load_lora_weights(adapter, adapter_name="ct")
    adapted = picture(pipe, mr_slice)
    pipe.push_to_hub("lab/with-adapter")
    again = load("lab/with-adapter")
    assert np.array_equal(picture(again, mr_slice), base)
    again.load_lora_weights("lab/with-adapter", subfolder="lora/ct")
    assert np.array_equal(picture(again, mr_slice), adapted)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, devices, quantisation, compilation, offloading
# ---------------------------------------------------------------------------------------------------------------------

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("options", "of_model", "of_vae"),
    [
        ({}, F32, F32),
        ({"dtype": BF16}, BF16, BF16),
        ({"torch_dtype": BF16}, BF16, BF16),
        ({"dtype": {"model": BF16, "default": F32}}, BF16, F32),
        ({"dtype": {"default": BF16}}, BF16, BF16),
        ({"dtype": {"vae": BF16}}, F32, BF16),
    ],
)
def test_dtypes_go_to_model_and_autoencoder(folder, pipe, mr_slice, options, of_model, of_vae):
    loaded = load(folder, **options)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {of_model}
    assert {parameter.dtype for parameter in loaded.vae.parameters()} == {of_vae}
    exact, rough = picture(pipe, mr_slice), picture(loaded, mr_slice)
    assert rough.dtype == np.float32 and np.abs(exact - rough).mean() < 0.05 * (exact.max() - exact.min())


def test_the_way_into_and_out_of_the_latent_space_stays_in_float32_in_half_precision(folder, pipe, mr_slice):
    loaded = load(folder, dtype=F16)
    kept = {name for name, parameter in loaded.model.named_parameters() if parameter.dtype == F32}
    modules = {part for name in kept for part in name.split(".") if part in ("vae2llm", "llm2vae", "time_embedder")}
    assert modules == {"vae2llm", "llm2vae", "time_embedder"}
    assert all(any(module in name for module in modules) for name in kept)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {F16, F32}
    exact, rough = picture(pipe, mr_slice), picture(loaded, mr_slice)
    assert np.abs(exact - rough).mean() < 0.01 * (exact.max() - exact.min())


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map_places_model_and_autoencoder(folder, pipe, mr_slice, device_map):
    loaded = load(folder, device_map=device_map)
    assert loaded.model.device == loaded.vae.device == torch.device("cpu")
    assert np.array_equal(picture(loaded, mr_slice), picture(pipe, mr_slice))


def test_eight_bit_weights_are_smaller_and_the_picture_stays_close(folder, pipe, mr_slice):
    def size(model):
        return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    loaded = load(folder, quantization_config=QuantoConfig(weights="int8"))
    assert size(loaded.model) < 0.6 * size(pipe.model)  # embeddings, norms and the latent space's doors stay whole
    for name in ("model.vae2llm", "llm2vae", "model.time_embedder.linear_1"):
        assert type(loaded.model.get_submodule(name).weight.data) is torch.Tensor
    exact, rough = picture(pipe, mr_slice), picture(loaded, mr_slice)
    error = np.sqrt(np.mean((exact - rough) ** 2))
    assert 0 < error < 0.01 * 4095  # 40 dB


def test_eight_bit_weights_have_no_checksum_and_the_report_says_so(folder, caplog):
    SynerMedGenPipeline.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))
    assert "sha256 none (quantised or offloaded)" in caplog.text


def test_weights_that_cannot_be_saved_leave_no_folder(folder, tmp_path):
    loaded = load(folder, quantization_config=QuantoConfig(weights="int8"))
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_compiled_model_is_saved_like_any_other(folder, pipe, mr_slice, tmp_path):
    expected = picture(pipe, mr_slice)
    pipe.model = torch.compile(pipe.model, backend="eager")
    pipe.save_pretrained(tmp_path / "again")
    weights = "model/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()
    assert np.array_equal(picture(load(tmp_path / "again"), mr_slice), expected)


def test_a_compiled_model_denoises_to_the_same_picture(pipe, mr_slice, monkeypatch):
    quick = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 7, "output_type": "np"}
    expected = pipe(mr_slice, target="CT", source="MRI", **quick).images[0]
    pipe.model, prefill = torch.compile(pipe.model, backend="eager"), pipe.prefill

    def eagerly(*args):  # compiling the prefill takes most of the time; the slow test below does
        with torch.compiler.set_stance("force_eager"):
            return prefill(*args)

    monkeypatch.setattr(pipe, "prefill", eagerly)
    compiled = pipe(mr_slice, target="CT", source="MRI", **quick).images[0]
    torch.compiler.reset()
    np.testing.assert_allclose(compiled, expected, atol=0.05)  # of 4095 HU


@pytest.mark.slow
def test_a_compiled_model_synthesises_and_answers_the_same(pipe, mr_slice):
    pipe.model.config.trained_tasks = ["MI"]
    expected, answer = picture(pipe, mr_slice), pipe.answer(mr_slice, "Which?", 3)
    pipe.model = torch.compile(pipe.model, backend="aot_eager")
    np.testing.assert_allclose(picture(pipe, mr_slice), expected, atol=0.05)  # of 4095 HU
    assert pipe.answer(mr_slice, "Which?", 3) == answer
    torch.compiler.reset()


class Offloaded(ModelHook):
    """Like accelerate's hook for offloading: the weights are there from a forward on, until they are freed."""

    def init_hook(self, module):
        self.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.calls = 0
        self.free(module)
        return module

    def free(self, module):
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        module.load_state_dict(self.weights)
        return args, kwargs


def offload(pipe, monkeypatch):
    """Weights that only a forward brings. Returns a count of forwards by module, and of givings back as `freed`."""
    hooks = {"model": Offloaded(), "vae": Offloaded()}
    counts = {"freed": 0}

    def free():
        counts["freed"] += 1
        for name, hook in hooks.items():
            counts[name] = hook.calls
            hook.free(getattr(pipe, name))

    monkeypatch.setattr(pipe, "maybe_free_model_hooks", free)
    for name, hook in hooks.items():
        add_hook_to_module(getattr(pipe, name), hook)
    return counts


def test_synthesis_reaches_weights_through_forward_only_and_frees_them(pipe, mr_slice, monkeypatch):
    expected = picture(pipe, mr_slice)
    counts = offload(pipe, monkeypatch)
    for _ in range(2):
        assert np.array_equal(picture(pipe, mr_slice), expected)
    assert counts == {"freed": 2, "model": 8, "vae": 4}  # two contexts and two steps; encoder and decoder


@pytest.mark.parametrize(
    "ask",
    [
        "identify",
        pytest.param("answer"),
    ],
)
def test_questions_reach_weights_through_forward_only_and_free_them(pipe, mr_slice, monkeypatch, ask):
    pipe.model.config.trained_tasks = ["MI"]
    arguments = () if ask == "identify" else ("Which?", 3)
    expected = getattr(pipe, ask)(mr_slice, *arguments)
    counts = offload(pipe, monkeypatch)
    for _ in range(2):
        assert getattr(pipe, ask)(mr_slice, *arguments) == expected
    assert counts["freed"] == 2 and counts["model"] > 2 and counts["vae"] == 0


def test_offloading_moves_the_model_away_before_the_autoencoder_comes(pipe):
    assert pipe.model_cpu_offload_seq == "model->vae"
    assert {name for name in pipe.components if isinstance(getattr(pipe, name), torch.nn.Module)} == {"model", "vae"}
