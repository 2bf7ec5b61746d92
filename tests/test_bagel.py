"""BAGEL-family checkpoints in and out: every tensor has a place, no number is guessed, and the way back is exact.

`bagel_tensors.json` has the names and shapes of the public checkpoint at full size: of `ema.safetensors`, and for each
tensor of `ae.safetensors` its name and shape in diffusers. Everything else starts from a golden fixture, a small
checkpoint of the original modules, laid out as such checkpoints are downloaded.
"""

import contextlib
import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from synermedgen_hf import SynerMedGenConfig, SynerMedGenPipeline, bagel
from synermedgen_hf.bagel import (
    FIXED_TABLES,
    NativeCheckpoint,
    StoredTensor,
    convert_bagel,
    empty_modules,
    export_bagel,
    list_tensors,
    match,
    native_llm_config,
    read_config,
    read_native,
    read_text_config,
    read_vae_config,
    rename_model_key,
    rename_vae_key,
    write_tensors,
)
from synermedgen_hf.hub import staged
from synermedgen_hf.modeling_synermedgen import SinCosPositionTable
from synermedgen_hf.processing_synermedgen import SPECIAL_TOKENS

sys.path.append(str(Path(__file__).parent / "parity"))
from native import write_native  # noqa: E402

GOLDEN = Path(__file__).parent / "parity" / "golden_a"
FULL_SIZE = json.loads((Path(__file__).parent / "bagel_tensors.json").read_text())
GENERATION = (
    "time_embedder",
    "vae2llm",
    "llm2vae",
    "latent_pos_embed",
)  # absent after training without pictures to make
VISION = ("vit_model", "connector", "vit_pos_embed")  # absent after training without pictures to read
LLM_JSON = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "qk_norm": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
VIT_JSON = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


# ---------------------------------------------------------------------------------------------------------------------
# Folders to convert
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A complete checkpoint in the original layout; never written to."""
    folder = tmp_path_factory.mktemp("source") / "native"
    write_native(GOLDEN, folder)
    return folder


@pytest.fixture(scope="module")
def conversion(native, tmp_path_factory):
    """The same converted, and the report of that."""
    folder = tmp_path_factory.mktemp("output") / "converted"
    return folder, convert_bagel(native, folder)


@pytest.fixture(scope="module")
def converted(conversion):
    return conversion[0]


@pytest.fixture
def copy(native, tmp_path):
    """A copy of the complete checkpoint, to be spoilt."""
    return Path(shutil.copytree(native, tmp_path / "copy" / "native"))


@pytest.fixture
def output(tmp_path):
    """Where to convert to. Its name is in the model card, so it is that of `converted`."""
    return tmp_path / "output" / "converted"


def read_tensors(file):
    return load(file.read_bytes())  # a copy, so that the file may be written again


def edit_tensors(file, **changes):
    """Replace tensors of a file, or with `None` remove them."""
    tensors = read_tensors(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def edit_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def without(folder, groups):
    """Remove the tensors of some groups."""
    file = folder / "ema.safetensors"
    edit_tensors(file, **{name: None for name in read_tensors(file) if name.startswith(groups)})
    return folder


def shard(folder):
    """Lay `ema.safetensors` out as two shards and their index, every second tensor in each."""
    tensors = read_tensors(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def contents(folder, leave_out=()):
    """All files of a folder by their relative paths."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in leave_out}


def weights_of(folder):
    """The model's tensors of a converted folder, from one file or several."""
    return {name: t for file in (folder / "model").glob("*.safetensors") for name, t in read_tensors(file).items()}


def config_of(folder):
    return SynerMedGenConfig.from_pretrained(folder)


def native_config(checkpoint):
    """Both configurations of a native checkpoint."""
    vae_config = read_vae_config(checkpoint.vae, 0.3611, 0.1159)
    return read_config(checkpoint, vae_config, 1.0), vae_config


# ---------------------------------------------------------------------------------------------------------------------
# The public checkpoint, at full size, without its weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_size():
    weights = {
        name: StoredTensor(Path("ema.safetensors"), name, torch.bfloat16, tuple(shape))
        for name, shape in FULL_SIZE["ema"].items()
    }
    vae = {
        name: StoredTensor(Path("ae.safetensors"), name, torch.float32, tuple(shape))
        for name, (_, shape, _) in FULL_SIZE["ae"].items()
    }
    return NativeCheckpoint(Path("BAGEL-7B-MoT"), weights, vae, LLM_JSON, VIT_JSON)


def test_the_list_is_that_of_the_public_files(full_size):
    assert len(full_size.weights) == 1223 and len(full_size.vae) == 244
    assert sum(math.prod(tensor.shape) for tensor in full_size.vae.values()) == 83_819_683


def test_its_sizes_are_our_defaults(full_size):
    config, vae_config = native_config(full_size)
    assert config.to_dict() == SynerMedGenConfig().to_dict()
    vision = config.vision_config
    assert vision.num_hidden_layers == 26 and full_size.vit["num_hidden_layers"] == 27  # the last one was dropped
    assert config.vision_patches_per_side == 70 and config.max_latent_size == 64
    assert config.latent_patch_size == 2 and config.latent_channels == 16
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert vae_config["block_out_channels"] == [128, 256, 512, 512] and vae_config["layers_per_block"] == 2
    assert vae_config["latent_channels"] == 16 and vae_config["norm_num_groups"] == 32
    assert vae_config["scaling_factor"] == 0.3611 and vae_config["shift_factor"] == 0.1159


def test_every_tensor_has_a_place_and_every_place_a_tensor(full_size):
    modules = empty_modules(*native_config(full_size))
    report, placed = match(full_size, modules)
    assert report.missing == report.unexpected == report.mismatched == []
    for prefix, module in modules.items():
        assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
            name: tensor.shape for name, tensor in placed[prefix].items()
        }
    assert len(placed[""]) == 1223 - len(FIXED_TABLES) and len(placed["vae."]) == 244
    assert set(FIXED_TABLES) == full_size.weights.keys() - {tensor.name for tensor in placed[""].values()}


def test_the_position_tables_are_recomputed_in_the_shape_stored(full_size):
    model = empty_modules(*native_config(full_size))[""].model
    for name in FIXED_TABLES:
        assert rename_model_key(name) is None
        assert getattr(model, name.split(".")[0]).table.shape == full_size.weights[name].shape


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("time_embedder.mlp.2.bias", "model.time_embedder.linear_2.bias"),
        ("language_model.model.norm_moe_gen.weight", "model.language_model.norm_moe_gen.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_tensor_under_its_new_name(full_size, name, ours):
    _, placed = match(full_size, empty_modules(*native_config(full_size)))
    assert placed[""][ours] is full_size.weights[name]


def test_the_names_of_the_autoencoder_are_those_of_diffusers():
    names = {name: rename_vae_key(name, levels=4) for name in FULL_SIZE["ae"]}
    assert names == {name: diffusers for name, (diffusers, _, _) in FULL_SIZE["ae"].items()}


def test_every_name_goes_back():
    for name in FULL_SIZE["ema"].keys() - set(FIXED_TABLES):
        assert rename_model_key(rename_model_key(name), back=True) == name
    for name in FULL_SIZE["ae"]:
        assert rename_vae_key(rename_vae_key(name, levels=4), levels=4, back=True) == name


def test_a_name_of_another_family_is_no_name():
    with pytest.raises(KeyError, match="visual.blocks.0.norm1.weight is not a tensor of a BAGEL-family checkpoint"):
        rename_model_key("visual.blocks.0.norm1.weight")


# ---------------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_source(native, converted):
    source, ours = read_tensors(native / "ema.safetensors"), weights_of(converted)
    assert {rename_model_key(name) for name in source} - {None} == ours.keys()
    for name in source.keys() - set(FIXED_TABLES):
        assert torch.equal(ours[rename_model_key(name)], source[name]), name
    source, ours = (
        read_tensors(native / "ae.safetensors"),
        read_tensors(next((converted / "vae").glob("*.safetensors"))),
    )
    assert {rename_vae_key(name, 4) for name in source} == ours.keys()
    for name in source:
        assert torch.equal(ours[rename_vae_key(name, 4)].flatten(), source[name].flatten()), name


def test_the_report_counts_says_what_is_recomputed_and_where_all_went(native, conversion):
    folder, report = conversion
    rows = {line.split()[0]: line.split()[1:5] for line in report.splitlines() if line.startswith("  ")}
    assert rows["understanding"] == ["31", "0", "0", "0"] and rows["generation"] == ["37", "0", "0", "0"]
    assert rows["vision"] == ["41", "0", "0", "0"] and rows["autoencoder"] == ["176", "0", "0", "0"]
    assert "Recomputed, not stored: latent_pos_embed.pos_embed, vit_pos_embed.pos_embed" in report
    assert f"Wrote {folder} from native/ema.safetensors" in report
    checksum = SynerMedGenPipeline.from_pretrained(folder).load_report.table(
        {"": AutoModel.from_pretrained(folder), "vae.": AutoencoderKL.from_pretrained(folder / "vae")}
    )
    assert checksum.splitlines()[0].split()[-1] == report.splitlines()[0].split()[-1]


def test_the_auto_classes_and_the_pipeline_load_it(native, converted):
    model, pipe = AutoModel.from_pretrained(converted), SynerMedGenPipeline.from_pretrained(converted)
    assert AutoProcessor.from_pretrained(converted).tokenizer.get_vocab() == pipe.processor.tokenizer.get_vocab()
    stored = read_tensors(native / "ema.safetensors")
    for loaded in (model.state_dict(), pipe.model.state_dict()):
        assert len(loaded) == len(stored) - len(FIXED_TABLES)
        for name in stored.keys() - set(FIXED_TABLES):
            assert torch.equal(loaded[rename_model_key(name)], stored[name]), name
    for name in FIXED_TABLES:
        torch.testing.assert_close(getattr(model.model, name.split(".")[0]).table, stored[name], atol=2e-7, rtol=0)


def test_the_files_are_plain_safetensors(converted):
    for file in converted.rglob("*.safetensors"):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header, end = json.loads(content[8 : 8 + size]), 0
        assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
        for entry in header.values():  # in order, without gaps or overlaps
            assert entry["data_offsets"][0] == end
            end = entry["data_offsets"][1]
        assert len(content) == 8 + size + end
        assert load_file(file).keys() == header.keys()


def test_tensors_of_all_shapes_and_dtypes_share_a_file(tmp_path):
    tensors = {"odd": torch.ones(3, dtype=torch.bfloat16), "number": torch.tensor(2.5), "none": torch.empty(0, 4)}
    tensors |= {"double": torch.rand(5, dtype=torch.float64), "half": torch.rand(2, 3).half()}
    save_file(tensors, tmp_path / "stored")
    stored = list_tensors(tmp_path / "stored")
    names = ["odd", "double", "number", "none", "half"]  # an odd number of bytes before eight-byte values
    write_tensors(tmp_path / "written", {f"new.{name}": stored[name] for name in names}, None, lambda *_: None)
    written = load_file(tmp_path / "written")
    assert written.keys() == {f"new.{name}" for name in names}
    for name, tensor in tensors.items():
        assert written[f"new.{name}"].dtype == tensor.dtype and torch.equal(written[f"new.{name}"], tensor)


def test_shards_hold_the_same(native, converted, output):
    convert_bagel(native, output, max_shard_size="200KB")
    index = json.loads((output / "model" / "model.safetensors.index.json").read_text())
    files = {file.name: file for file in (output / "model").glob("*.safetensors")}
    assert len(files) > 3 and files.keys() == set(index["weight_map"].values())
    whole, parts = weights_of(converted), weights_of(output)
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert max(file.stat().st_size for file in files.values()) < 220_000
    loaded = AutoModel.from_pretrained(output).state_dict()
    assert all(torch.equal(whole[name], loaded[name]) for name in whole)


def test_model_safetensors_is_taken_where_there_is_no_ema(copy, converted, output):
    (copy / "ema.safetensors").rename(copy / "model.safetensors")
    assert "native/model.safetensors" in convert_bagel(copy, output)
    assert contents(output, ["README.md"]) == contents(converted, ["README.md"])


def test_a_source_in_shards_is_the_same_source(copy, converted, output):
    shard(copy)
    assert "native/2 shards" in convert_bagel(copy, output)
    assert contents(output, ["README.md"]) == contents(converted, ["README.md"])


@pytest.mark.parametrize(("choice", "value"), [(None, 1.0), ("ema.safetensors", 1.0), ("model.safetensors", 2.0)])
def test_ema_comes_first_unless_a_file_is_named(copy, output, choice, value):
    tensors = read_tensors(copy / "ema.safetensors")
    save_file(tensors | {"llm2vae.bias": torch.full((16,), 2.0)}, copy / "model.safetensors")
    save_file(tensors | {"llm2vae.bias": torch.full((16,), 1.0)}, copy / "ema.safetensors")
    convert_bagel(copy, output, weights=choice)
    assert weights_of(output)["llm2vae.bias"].unique().tolist() == [value]


def test_links_into_a_download_cache_are_followed(native, converted, output, tmp_path):
    folder = tmp_path / "snapshots" / "native"
    folder.mkdir(parents=True)
    for file in native.iterdir():
        (folder / file.name).symlink_to(file)
    convert_bagel(folder, output)
    assert contents(output) == contents(converted)
    assert not any(file.is_symlink() for file in output.rglob("*"))


def test_the_current_folder_is_a_folder(native, converted, output, monkeypatch):
    output.mkdir(parents=True)
    monkeypatch.chdir(output)
    convert_bagel(os.path.relpath(native), ".")
    assert contents(output) == contents(converted)


def in_dtypes(tensors, kind):
    """As `"bfloat16"` stores it, or `"mixed"`: the generation expert of a training run beside a bfloat16 rest."""
    return {
        name: tensor.clone() if kind == "mixed" and "_moe_gen" in name else tensor.bfloat16()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("kind", "dtype"), [("bfloat16", torch.bfloat16), ("mixed", torch.float32)])
def test_dtypes_are_kept(copy, output, kind, dtype):
    stored = in_dtypes(read_tensors(copy / "ema.safetensors"), kind)
    save_file(stored, copy / "ema.safetensors")
    convert_bagel(copy, output)
    ours = weights_of(output)
    for name in stored.keys() - set(FIXED_TABLES):
        assert ours[rename_model_key(name)].dtype == stored[name].dtype
        assert torch.equal(ours[rename_model_key(name)], stored[name]), name
    assert config_of(output).dtype == dtype
    model = AutoModel.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, stored["language_model.lm_head.weight"].float())


def test_a_dtype_is_for_the_model_alone(native, converted, output):
    convert_bagel(native, output, dtype=torch.bfloat16)
    before, after = weights_of(converted), weights_of(output)
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (output / vae).read_bytes() == (converted / vae).read_bytes()
    assert config_of(output).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(output, dtype="auto").lm_head.weight.dtype == torch.bfloat16


def test_a_dtype_that_cannot_hold_the_weights_is_refused(copy, output):
    edit_tensors(copy / "ema.safetensors", **{"llm2vae.bias": torch.full((16,), 1e6)})
    with pytest.raises(ValueError, match="llm2vae.bias.*float16"):
        convert_bagel(copy, output, dtype=torch.float16)
    assert not output.exists()


def test_numbers_without_a_file_are_the_public_ones_or_given(native, converted, output):
    numbers = {"vae_scale": 0.5, "vae_shift": 0.25, "timestep_shift": 4.0, "sampling_shift": 2.0}
    convert_bagel(native, output, **numbers, trained_routes=["brain/MRI-CT"], trained_tasks=["MI"])
    for folder, expected in ((converted, (0.3611, 0.1159, 1.0, 3.0)), (output, tuple(numbers.values()))):
        vae = json.loads((folder / "vae" / "config.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        timestep_shift = config_of(folder).timestep_shift
        assert (vae["scaling_factor"], vae["shift_factor"], timestep_shift, scheduler["shift"]) == expected
    assert config_of(output).trained_routes == ["brain/MRI-CT"] and config_of(output).trained_tasks == ["MI"]
    assert config_of(converted).trained_routes == config_of(converted).trained_tasks == []


def test_theta_eps_and_sizes_are_those_of_the_json(copy, output):
    edit_json(copy / "llm_config.json", rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=777)
    edit_json(copy / "vit_config.json", layer_norm_eps=1e-4, hidden_act="gelu")
    convert_bagel(copy, output)
    text, vision = config_of(output).text_config, config_of(output).vision_config
    assert text.rope_parameters["rope_theta"] == 5e5 and text.rms_norm_eps == 1e-5
    assert text.max_position_embeddings == 777 and text.num_key_value_heads == 2
    assert vision.layer_norm_eps == 1e-4 and vision.hidden_act == "gelu" and vision.image_size == 112


def test_theta_is_found_in_either_place_and_comes_home():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 8192}
    older = read_text_config({**LLM_JSON, "rope_scaling": {"type": "yarn", **yarn}})
    newer = {key: value for key, value in LLM_JSON.items() if key != "rope_theta"}
    newer = read_text_config({**newer, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn}})
    assert older == newer and older["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 1e6, **yarn}
    home = native_llm_config(SynerMedGenConfig(text_config=older))
    assert home["rope_theta"] == 1e6 and {"type": "yarn", **yarn}.items() <= home["rope_scaling"].items()
    assert native_llm_config(SynerMedGenConfig())["rope_scaling"] is None


@pytest.mark.parametrize(
    ("file", "name"),
    [("llm", name) for name in ("rope_theta", "rms_norm_eps", "hidden_size", "num_attention_heads", "vocab_size")]
    + [("llm", name) for name in ("num_key_value_heads", "intermediate_size", "num_hidden_layers")]
    + [("vit", name) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")],
)
def test_a_number_is_never_guessed(copy, output, file, name):
    edit_json(copy / f"{file}_config.json", **{name: None})
    with pytest.raises(ValueError, match=f"{file}_config.json lacks {name}. These numbers are never guessed"):
        convert_bagel(copy, output)
    assert not output.exists()


@pytest.mark.parametrize("stated", [2, 3, None])
def test_the_layers_of_the_vit_are_counted_in_the_weights(copy, stated):
    edit_json(copy / "vit_config.json", num_hidden_layers=stated)
    config, _ = native_config(read_native(copy))
    assert config.vision_config.num_hidden_layers == 2


def test_a_vit_with_fewer_layers_than_stated_is_refused(copy, output):
    without(copy, ("vit_model.vision_model.encoder.layers.1.",))
    with pytest.raises(ValueError, match="vit_config.json says 3 layers, and the weights have 1"):
        convert_bagel(copy, output)


@pytest.mark.parametrize(("file", "setting"), [("llm", {"use_sliding_window": True}), ("vit", {"rope": True})])
def test_what_the_model_cannot_do_is_refused(copy, output, file, setting):
    edit_json(copy / f"{file}_config.json", **setting)
    with pytest.raises(ValueError, match=f"{file}_config.json asks for .*, which"):
        convert_bagel(copy, output)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def test_stand_ins_for_image_tokens_lie_beyond_the_vocabulary(native, converted):
    config, tokenizer = config_of(converted), AutoProcessor.from_pretrained(converted).tokenizer
    ids = {name: getattr(config, name) for name in SPECIAL_TOKENS}
    assert ids == {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    assert [ids[f"{kind}_token_id"] for kind in ("image", "latent", "target")] == [96, 97, 98]
    assert config.text_config.vocab_size == 96 and weights_of(converted)["lm_head.weight"].shape[0] == 96
    generation = GenerationConfig.from_pretrained(converted)
    assert (generation.bos_token_id, generation.eos_token_id) == (90, 91)
    assert set(generation.suppress_tokens) == {96, 97, 98}
    before = AutoTokenizer.from_pretrained(native).get_vocab()
    assert before.items() <= tokenizer.get_vocab().items()


def rewrite_tokenizer(folder, change):
    """Change the vocabulary of a native folder's tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content["model"]["vocab"], content["added_tokens"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


def rename_token(old, new):
    def change(vocab, added):
        vocab[new] = vocab.pop(old)
        for token in added:
            token["content"] = new if token["content"] == old else token["content"]

    return change


def test_stand_ins_that_the_tokenizer_has_are_used(copy, output):
    for word, kind in (("w10", "image"), ("w11", "latent"), ("w12", "target")):
        rewrite_tokenizer(copy, rename_token(word, SPECIAL_TOKENS[f"{kind}_token_id"]))
    convert_bagel(copy, output)
    config = config_of(output)
    assert [config.image_token_id, config.latent_token_id, config.target_token_id] == [10, 11, 12]
    assert len(AutoProcessor.from_pretrained(output).tokenizer) == 96


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"])
def test_a_tokenizer_without_a_delimiter_is_refused(copy, output, token):
    rewrite_tokenizer(copy, rename_token(token, "other"))
    with pytest.raises(ValueError, match=f"tokenizer in .*native lacks {token}".replace("|", r"\|")):
        convert_bagel(copy, output)
    assert not output.exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(copy, output):
    def move(vocab, added):
        vocab["<|im_start|>"] = 200  # a row that the embeddings do not have
        for token in added:
            token["id"] = 200 if token["content"] == "<|im_start|>" else token["id"]

    rewrite_tokenizer(copy, move)
    with pytest.raises(ValueError, match="tokenizer.*200.*96"):
        convert_bagel(copy, output)


def test_a_tokenizer_without_its_settings_is_read(copy, output):
    (copy / "tokenizer_config.json").unlink()
    convert_bagel(copy, output)
    assert config_of(output).bos_token_id == 90


# ---------------------------------------------------------------------------------------------------------------------
# Merging, and doing without
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(native, tmp_path_factory):
    """A complete checkpoint whose weights, but for the tables, are all ones."""
    folder = Path(shutil.copytree(native, tmp_path_factory.mktemp("base") / "complete"))
    tensors = read_tensors(folder / "ema.safetensors")
    ones = {name: torch.ones_like(t) for name, t in tensors.items() if name not in FIXED_TABLES}
    save_file(tensors | ones, folder / "ema.safetensors")
    return folder


@pytest.mark.parametrize(("groups", "part"), [(GENERATION, "generation"), (VISION, "vision")])
def test_a_checkpoint_without_a_part_is_refused_alone(copy, output, groups, part):
    names = [name for name in read_tensors(copy / "ema.safetensors") if name.startswith(groups)]
    without(copy, groups)
    with pytest.raises(ValueError, match=f"Without its {part} weights .*merge .*--base") as refused:
        convert_bagel(copy, output)
    assert f"{len(names) - 1} missing: " in str(refused.value)  # all but the table, which comes with its owner
    assert not output.exists()


@pytest.mark.parametrize("groups", [GENERATION, VISION])
def test_it_merges_onto_a_complete_one_and_says_so(copy, native, base, output, groups):
    report = convert_bagel(without(copy, groups), output, base=base)
    merged = [line for line in report.splitlines() if line.startswith("Merged")]
    assert sorted(merged) == sorted(f"Merged from {base}: {group}" for group in groups)
    stored, ours = read_tensors(native / "ema.safetensors"), weights_of(output)
    assert len(ours) == len(stored) - len(FIXED_TABLES)
    for name in stored.keys() - set(FIXED_TABLES):
        expected = torch.ones_like(stored[name]) if name.startswith(groups) else stored[name]
        assert torch.equal(ours[rename_model_key(name)], expected), name
    assert config_of(output).missing_parts == []


def test_the_generation_expert_alone_is_a_group(copy, native, base, output):
    experts = [name for name in read_tensors(copy / "ema.safetensors") if "_moe_gen" in name]
    edit_tensors(copy / "ema.safetensors", **dict.fromkeys(experts))
    report = convert_bagel(copy, output, base=base)
    assert [line for line in report.splitlines() if "Merged" in line] == [f"Merged from {base}: generation expert"]
    ours = weights_of(output)
    assert all((ours[rename_model_key(name)] == 1).all() for name in experts)
    assert not (ours["lm_head.weight"] == 1).all()


def test_a_training_run_is_weights_alone_and_a_base(native, converted, base, output, tmp_path):
    run = tmp_path / "copy" / "native"
    run.mkdir(parents=True)
    shutil.copyfile(native / "ema.safetensors", run / "model.safetensors")
    with pytest.raises(OSError, match="lacks ae.safetensors, llm_config.json, vit_config.json, tokenizer.*--base"):
        convert_bagel(run, output)
    report = convert_bagel(run, output, base=base)
    merged = {line.split(": ")[1] for line in report.splitlines() if line.startswith(f"Merged from {base}")}
    assert merged == {"ae.safetensors", "llm_config.json", "vit_config.json", "tokenizer"}
    assert contents(output, ["README.md"]) == contents(converted, ["README.md"])


@pytest.mark.parametrize("name", ["time_embedder.mlp.0.bias", "language_model.model.norm.weight"])
def test_a_group_with_one_tensor_missing_is_damaged_and_not_filled(copy, base, output, name):
    edit_tensors(copy / "ema.safetensors", **{name: None})
    with pytest.raises(ValueError, match=f"1 missing: {rename_model_key(name)}"):
        convert_bagel(copy, output, base=base)


def test_a_base_of_another_size_does_not_fit(copy, base, output, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    edit_tensors(other / "ema.safetensors", **{"vae2llm.bias": torch.ones(80)})
    with pytest.raises(ValueError, match=r"vae2llm.bias \(stored 80, the configuration says 64\)"):
        convert_bagel(without(copy, GENERATION), output, base=other)


def test_a_base_that_is_converted_already_is_none(copy, converted, output):
    with pytest.raises((OSError, ValueError), match="converted already"):
        convert_bagel(copy, output, base=converted)


def test_without_generation_it_converts_if_allowed_and_what_needs_it_is_refused(copy, output, mr_slice):
    stored = read_tensors(without(copy, GENERATION) / "ema.safetensors")
    report = convert_bagel(copy, output, allow_missing=["*time_embedder*", "*vae2llm*", "*llm2vae*"])
    assert config_of(output).missing_parts == ["generation"]
    assert "Without its generation weights" in report
    assert "Recomputed, not stored: vit_pos_embed.pos_embed" in report
    assert "Synthesis is unavailable" in (output / "README.md").read_text()

    with pytest.raises(ValueError, match="missing: .*time_embedder"):
        SynerMedGenPipeline.from_pretrained(output)
    pipe = SynerMedGenPipeline.from_pretrained(output, allow_missing=["*time_embedder*", "*vae2llm*", "*llm2vae*"])
    with pytest.raises(ValueError, match="without its generation weights: it cannot synthesise"):
        pipe(mr_slice, target="CT", source="MRI")

    export_bagel(output, output.parent / "home")
    home = read_tensors(output.parent / "home" / "ema.safetensors")
    assert home.keys() == stored.keys() and all(torch.equal(home[name], stored[name]) for name in stored)


def test_without_vision_the_sizes_are_those_of_the_json(copy, output, mr_slice):
    convert_bagel(without(copy, VISION), output, allow_missing=["*vision_model*", "*connector*"])
    config = config_of(output)
    assert config.missing_parts == ["vision"]
    assert config.vision_config.num_hidden_layers == 2 and config.vision_patches_per_side == 8
    pipe = SynerMedGenPipeline.from_pretrained(output, allow_missing=["*vision_model*", "*connector*"])
    for work in (pipe.identify, lambda image: pipe(image, target="CT", source="MRI")):
        with pytest.raises(ValueError, match="without its vision weights"):
            work(mr_slice)


def test_without_vision_and_its_size_nothing_is_guessed(copy, output):
    edit_json(copy / "vit_config.json", image_size=None)
    with pytest.raises(ValueError, match="vit_config.json lacks image_size"):
        convert_bagel(without(copy, VISION), output, allow_missing=["*vision_model*", "*connector*"])


def test_what_may_be_missing_from_one_part_says_nothing_of_another(copy, output):
    edit_tensors(without(copy, GENERATION) / "ema.safetensors", **{"language_model.lm_head.weight": None})
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        convert_bagel(copy, output, allow_missing=["*time_embedder*", "*vae2llm*", "*llm2vae*"])


# ---------------------------------------------------------------------------------------------------------------------
# Every tensor is accounted for
# ---------------------------------------------------------------------------------------------------------------------


def refusal(checkpoint, modules):
    """What a checkpoint is refused with, by the rules that conversion follows; by its header alone, so it is quick."""
    try:
        native_config(checkpoint)
        match(checkpoint, modules)[0].check()
    except ValueError as error:
        return str(error)
    return ""


def test_deleting_any_one_tensor_is_caught_by_name(native, monkeypatch):
    monkeypatch.setattr(bagel, "rename_vae_key", functools.cache(rename_vae_key))  # 287 times the same names
    checkpoint = read_native(native)
    modules = {
        prefix: SimpleNamespace(config=module.config, state_dict=module.state_dict().copy)
        for prefix, module in empty_modules(*native_config(checkpoint)).items()
    }
    assert refusal(checkpoint, modules) == ""
    uncaught = []
    for tensors in (checkpoint.weights, checkpoint.vae):
        for name in [name for name in tensors if name not in FIXED_TABLES]:
            removed = tensors.pop(name)
            ours = rename_model_key(name) if tensors is checkpoint.weights else f"vae.{rename_vae_key(name, levels=4)}"
            message = refusal(checkpoint, modules)
            if f"1 missing: {ours}." not in message and f"ae.safetensors lacks {name}." not in message:
                uncaught.append(name)
            tensors[name] = removed
    assert len(checkpoint.weights) == 111 and len(checkpoint.vae) == 176
    assert uncaught == []


@pytest.mark.parametrize(
    "name",
    [
        "llm2vae.bias",
        "vae2llm.weight",
        "connector.fc2.weight",
        "language_model.model.embed_tokens.weight",
        *FIXED_TABLES,
    ],
)
def test_conversion_stops_at_a_missing_tensor(copy, output, name):
    edit_tensors(copy / "ema.safetensors", **{name: None})
    said = f"native (does not hold .*1 missing:|lacks) {rename_model_key(name) or name}"
    with pytest.raises(ValueError, match=said):
        convert_bagel(copy, output)
    assert not output.exists()


@pytest.mark.parametrize("table", FIXED_TABLES)
def test_a_missing_table_may_be_allowed_and_is_computed_all_the_same(copy, output, table):
    edit_tensors(copy / "ema.safetensors", **{table: None})
    with pytest.raises(ValueError, match=f"--allow-missing {table}"):
        convert_bagel(copy, output)
    convert_bagel(copy, output, allow_missing=[table])
    assert config_of(output).missing_parts == []


def test_a_missing_tensor_of_the_autoencoder_is_caught_too(copy, output):
    edit_tensors(copy / "ae.safetensors", **{"decoder.mid.attn_1.k.bias": None})
    with pytest.raises(ValueError, match="1 missing: vae.decoder.mid_block.attentions.0.to_k.bias"):
        convert_bagel(copy, output)


@pytest.mark.parametrize(("file", "name"), [("ema", "visual_head.weight"), ("ae", "encoder.quant_conv.weight")])
def test_an_extra_tensor_is_refused_unless_named(copy, converted, output, file, name):
    edit_tensors(copy / f"{file}.safetensors", **{name: torch.ones(3)})
    shown = f"vae.{name}" if file == "ae" else name
    with pytest.raises(ValueError, match=f"1 unexpected: {shown}"):
        convert_bagel(copy, output)
    convert_bagel(copy, output, allow_unexpected=[shown])
    assert contents(output) == contents(converted)


@pytest.mark.parametrize(
    ("file", "name", "shape"),
    [
        ("ema", "connector.fc1.weight", (64, 47)),
        ("ema", "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight", (8,)),
        ("ema", "llm2vae.bias", (16, 1)),
        ("ae", "decoder.mid.attn_1.q.weight", (64, 64, 3, 3)),
        ("ae", "decoder.conv_out.weight", (3, 16, 3, 3)),
    ],
)
def test_another_shape_is_refused_with_both_shapes(copy, output, file, name, shape):
    edit_tensors(copy / f"{file}.safetensors", **{name: torch.ones(shape)})
    stored = "x".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"{name} \(stored {stored}, the configuration says \d+"):
        convert_bagel(copy, output)


@pytest.mark.parametrize("setting", [{"hidden_size": 96}, {"vocab_size": 100}, {"num_hidden_layers": 3}])
def test_a_configuration_of_another_size_is_refused(copy, output, setting):
    edit_json(copy / "llm_config.json", **setting)
    with pytest.raises(ValueError, match="of another shape: .*different models|missing: model.language_model.layers.2"):
        convert_bagel(copy, output)


@pytest.mark.parametrize("table", FIXED_TABLES)
@pytest.mark.parametrize("change", [0.01, math.nan])
def test_a_table_of_positions_that_was_changed_is_refused(copy, output, table, change):
    stored = read_tensors(copy / "ema.safetensors")[table]
    stored[3, 5] += change
    edit_tensors(copy / "ema.safetensors", **{table: stored})
    with pytest.raises(ValueError, match=f"{table} differs by .* it was changed or trained"):
        convert_bagel(copy, output)


@pytest.mark.parametrize(
    "name",
    [
        "latent_pos_embed.pos_embed",
        "vit_pos_embed.pos_embed",
        "vit_model.vision_model.embeddings.position_embedding.weight",
    ],
)
def test_a_table_that_is_not_square_is_refused(copy, output, name):
    edit_tensors(copy / "ema.safetensors", **{name: read_tensors(copy / "ema.safetensors")[name][:60].clone()})
    with pytest.raises(
        ValueError, match=f"{name} (has 60 entries, which is not the square|has shape .60, 64., expected .64, 64.)"
    ):
        convert_bagel(copy, output)


def test_another_table_size_is_another_model(copy, output):
    table = SinCosPositionTable(6, 64).table
    edit_tensors(copy / "ema.safetensors", **{"latent_pos_embed.pos_embed": table})
    convert_bagel(copy, output)
    assert config_of(output).max_latent_size == 6
    assert AutoModel.from_pretrained(output).model.latent_pos_embed.table.shape == (36, 64)


@pytest.mark.parametrize("channels", [3, 8])
def test_an_autoencoder_of_another_channel_count_is_refused(copy, output, channels):
    changes = {"decoder.conv_in.weight": torch.ones(64, channels, 3, 3)}
    changes |= {"encoder.conv_out.weight": torch.ones(2 * channels, 64, 3, 3)}
    edit_tensors(copy / "ae.safetensors", **changes, **{"encoder.conv_out.bias": torch.ones(2 * channels)})
    with pytest.raises(ValueError, match=f"vae2llm.weight.* {channels} channels .*ae.safetensors.*another checkpoint"):
        convert_bagel(copy, output)


def test_an_autoencoder_that_diffusers_cannot_express_is_refused(copy, output):
    edit_tensors(copy / "ae.safetensors", **{"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)})
    with pytest.raises(ValueError, match="starts with 16 channels and goes on with 32"):
        convert_bagel(copy, output)


def test_a_quantised_checkpoint_is_refused(copy, output):
    edit_tensors(copy / "ema.safetensors", **{"llm2vae.weight": torch.ones(16, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match="ema.safetensors: llm2vae.weight is stored as I8.*start from the full one"):
        convert_bagel(copy, output)


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def assert_same_file(one, other):
    """The same names, dtypes, shapes and bytes; their order in the file is free."""
    one, other = read_tensors(one), read_tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_export_gives_back_every_byte(native, converted, output):
    export_bagel(converted, output)
    for file in ("ema.safetensors", "ae.safetensors"):
        assert_same_file(output / file, native / file)


def test_export_gives_back_every_number(native, converted, output):
    export_bagel(converted, output)
    for file in ("llm_config.json", "vit_config.json"):
        before, after = (json.loads((folder / file).read_text()) for folder in (native, output))
        assert {name: after[name] for name in before.keys() & after.keys()} == {
            name: before[name] for name in before.keys() & after.keys()
        }
        assert before.keys() - after.keys() <= {"rope"}
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (native, output))
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert after("w1<|im_end|>").input_ids == before("w1<|im_end|>").input_ids == [1, 91]


def test_converting_an_export_gives_the_same_folder(converted, tmp_path, output):
    export_bagel(converted, tmp_path / "native")
    convert_bagel(tmp_path / "native", output)
    assert contents(output) == contents(converted)


def test_export_from_shards_is_the_same(native, output):
    convert_bagel(native, output, max_shard_size="300KB")
    export_bagel(output, output.parent / "home")
    assert_same_file(output.parent / "home" / "ema.safetensors", native / "ema.safetensors")


@pytest.mark.parametrize("kind", ["bfloat16", "mixed"])
def test_export_keeps_dtypes(copy, output, kind):
    save_file(in_dtypes(read_tensors(copy / "ema.safetensors"), kind), copy / "ema.safetensors")
    convert_bagel(copy, output)
    export_bagel(output, output.parent / "home")
    assert_same_file(output.parent / "home" / "ema.safetensors", copy / "ema.safetensors")


def test_a_saved_pipeline_can_be_exported(native, converted, tmp_path):
    pipe = SynerMedGenPipeline.from_pretrained(converted)
    with torch.no_grad():
        pipe.model.llm2vae.bias.fill_(0.5)
    pipe.save_pretrained(tmp_path / "trained")
    export_bagel(tmp_path / "trained", tmp_path / "home")
    before, after = (read_tensors(folder / "ema.safetensors") for folder in (native, tmp_path / "home"))
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == ["llm2vae.bias"]


@pytest.mark.parametrize(
    ("file", "name"),
    [("model/model", "lm_head.weight"), ("vae/diffusion_pytorch_model", "decoder.conv_in.bias")],
)
def test_export_of_an_incomplete_pipeline_is_refused_by_name(converted, output, tmp_path, file, name):
    spoilt = Path(shutil.copytree(converted, tmp_path / "spoilt"))
    edit_tensors(spoilt / f"{file}.safetensors", **{name: None})
    with pytest.raises(ValueError, match=f"1 missing: .*{name}"):
        export_bagel(spoilt, output)
    edit_tensors(spoilt / f"{file}.safetensors", **{name: torch.ones(2), "left.over": torch.ones(2)})
    with pytest.raises(ValueError, match=f"1 unexpected: .*left.over; 1 of another shape: .*{name}"):
        export_bagel(spoilt, output)
    assert not output.exists()


def test_a_part_that_is_known_to_be_missing_excuses_no_other(copy, output):
    allowed = ["*time_embedder*", "*vae2llm*", "*llm2vae*"]
    convert_bagel(without(copy, GENERATION), output, allow_missing=allowed)
    edit_tensors(output / "model" / "model.safetensors", **{"lm_head.weight": None})
    with pytest.raises(ValueError, match="missing: .*lm_head.weight"):
        export_bagel(output, output.parent / "home")


# ---------------------------------------------------------------------------------------------------------------------
# Disks, and what is on them when something goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_files_in_the_way_are_refused_unless_allowed(native, converted, output):
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    for work, source in ((convert_bagel, native), (export_bagel, converted)):
        with pytest.raises(FileExistsError, match="converted holds files already.*--overwrite"):
            work(source, output)
    assert contents(output) == {"notes.txt": b"mine"}
    convert_bagel(native, output, overwrite=True)
    assert contents(output) == contents(converted) | {"notes.txt": b"mine"}


def test_an_empty_folder_is_not_in_the_way(native, converted, output):
    output.mkdir(parents=True)
    convert_bagel(native, output)
    assert contents(output) == contents(converted)


def test_overwriting_leaves_no_weights_of_before(native, converted, output):
    convert_bagel(native, output, max_shard_size="200KB")
    convert_bagel(native, output, overwrite=True)
    assert contents(output) == contents(converted)


@pytest.mark.parametrize("file", ["ema.safetensors", "model.safetensors"])
def test_a_checkpoint_is_never_converted_onto_itself(copy, file):
    (copy / "ema.safetensors").rename(copy / file)
    before = contents(copy)
    with pytest.raises((OSError, ValueError)):
        convert_bagel(copy, copy, overwrite=True)
    assert contents(copy) == before


def test_a_base_is_never_converted_onto(copy, base, tmp_path):
    complete = Path(shutil.copytree(base, tmp_path / "complete"))
    with pytest.raises((OSError, ValueError)):
        convert_bagel(without(copy, GENERATION), complete, base=complete, overwrite=True)
    assert contents(complete) == contents(base)


def test_a_pipeline_is_never_exported_onto_itself(converted, tmp_path):
    pipeline = Path(shutil.copytree(converted, tmp_path / "converted"))
    with pytest.raises((OSError, ValueError)):
        export_bagel(pipeline, pipeline, overwrite=True)
    assert contents(pipeline) == contents(converted)


def test_export_replaces_only_what_it_writes(converted, copy):
    shutil.copyfile(copy / "ema.safetensors", copy / "model.safetensors")
    before = contents(copy)
    export_bagel(converted, copy, overwrite=True)
    assert (copy / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_a_disk_that_is_too_small_is_known_before(native, converted, output, monkeypatch):
    needed = sum(file.stat().st_size for file in converted.rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed // 2))
    for work, source in ((convert_bagel, native), (export_bagel, converted)):
        with pytest.raises(OSError, match="converted needs 4.2 MB, and the disk has 2.1 MB free"):
            work(source, output)
        assert not output.exists()


@contextlib.contextmanager
def files_up_to(size):
    """Let no file grow beyond a size, as on a disk that is full; the log of the tests is a file too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1_000, 400_000, 2_000_000])  # in the header, the model, the autoencoder
def test_a_disk_that_fills_up_leaves_nothing(native, output, size):
    with pytest.raises(OSError), files_up_to(size):
        convert_bagel(native, output)
    assert not output.exists()


def test_a_disk_that_is_full_by_the_time_of_the_tokenizer_is_an_os_error(native, output, monkeypatch):
    save = PreTrainedTokenizerFast.save_pretrained

    def save_on_a_full_disk(*args, **kwargs):
        with files_up_to(3_000):  # tokenizer.json is larger
            return save(*args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_on_a_full_disk)
    with pytest.raises(OSError):
        convert_bagel(native, output)
    assert not output.exists()


def test_a_disk_that_fills_up_says_which_file_could_not_be_written(native, output):
    with pytest.raises(OSError, match="converted.*disk"), files_up_to(400_000):
        convert_bagel(native, output)


def test_a_disk_that_fills_up_leaves_what_was_there(native, converted, output):
    shutil.copytree(converted, output)
    for work, source in ((convert_bagel, native), (export_bagel, converted)):
        with pytest.raises(OSError), files_up_to(2_000_000):
            work(source, output, overwrite=True)
        assert contents(output) == contents(converted)


class Killed(BaseException):
    pass


def interrupted_after(renames, converted, folder, monkeypatch):
    """Put `converted` into `folder`, but die after some of the renames that end this. Whether it was still alive."""
    left, rename = renames, os.replace

    def replace(source, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            with staged(folder) as work:
                shutil.copytree(converted, work, dirs_exist_ok=True)
        except Killed:
            return False
    return True


def test_nothing_looks_complete_before_it_is(converted, tmp_path, monkeypatch):
    complete = contents(converted)
    components = {name for name in complete if "/" in name}
    for renames in range(len(complete)):
        folder = tmp_path / str(renames)
        assert not interrupted_after(renames, converted, folder, monkeypatch)
        assert not (folder / "model_index.json").exists()  # what the pipeline looks for
        if (folder / "config.json").exists():  # what the Auto classes look for
            assert components <= contents(folder).keys()
    assert interrupted_after(len(complete), converted, tmp_path / "last", monkeypatch)
    assert contents(tmp_path / "last") == complete


def test_an_old_pipeline_half_replaced_does_not_look_complete(converted, tmp_path, monkeypatch):
    complete = contents(converted)
    for renames in range(1, len(complete)):
        folder = Path(shutil.copytree(converted, tmp_path / str(renames)))
        assert not interrupted_after(renames, converted, folder, monkeypatch)
        assert not (folder / "model_index.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["convert", "export"])
def test_tensors_are_read_one_at_a_time(native, converted, output, monkeypatch, work):
    read, alive, at_once = StoredTensor.read, weakref.WeakSet(), []

    def watched(self):
        at_once.append(len(alive))
        tensor = read(self)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(StoredTensor, "read", watched)
    convert_bagel(native, output) if work == "convert" else export_bagel(converted, output)
    assert len(at_once) > 280 and max(at_once) <= 1  # the one before may live until the next is there


PEAK = """
import resource, shutil, sys
from synermedgen_hf.bagel import convert_bagel, export_bagel
peaks = []
for source in sys.argv[1:]:
    convert_bagel(source, source + "-converted")
    export_bagel(source + "-converted", source + "-home")
    shutil.rmtree(source + "-converted"), shutil.rmtree(source + "-home")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def write_large(native, folder, hidden_size=512, intermediate_size=24576):
    """A checkpoint with twelve matrices of 25 MB, zeros that take no room on the disk but for the position tables."""
    shutil.copytree(native, folder)
    edit_json(folder / "llm_config.json", hidden_size=hidden_size, intermediate_size=intermediate_size)
    checkpoint = read_native(folder)
    model = empty_modules(*native_config(checkpoint))[""]
    shapes = {rename_model_key(name, back=True): tuple(t.shape) for name, t in model.state_dict().items()}
    tables = {name: SinCosPositionTable(8, hidden_size).table.bfloat16() for name in FIXED_TABLES}
    shapes |= {name: tuple(table.shape) for name, table in tables.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "ema.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, table in tables.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(table.view(torch.uint8).numpy().tobytes())
    return max(2 * math.prod(shape) for shape in shapes.values()), end


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor(native, tmp_path):
    small, large = shutil.copytree(native, tmp_path / "small"), tmp_path / "large"
    largest, total = write_large(native, large)
    assert total > 12 * largest > 300e6
    done = subprocess.run([sys.executable, "-c", PEAK, small, large], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (1024 * int(peak) for peak in done.stdout.split()[-2:])
    assert after - before < 3 * largest + 20e6  # the tensor, a copy of it, and a hash over pieces of it
