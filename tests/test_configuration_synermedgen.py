"""The configuration: BAGEL-7B-MoT by default, JSON in and out, and sizes that cannot work are refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, SiglipVisionConfig

from synermedgen_hf import SynerMedGenConfig, SynerMedGenForConditionalGeneration, SynerMedGenTextConfig


def numbers(config, names):
    return {name: getattr(config, name) for name in names}


# ---- defaults ----


def test_the_default_transformer_is_bagels():
    expected = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }
    text_config = SynerMedGenConfig().text_config
    assert numbers(text_config, expected) == expected
    assert text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000.0}


def test_the_default_vision_transformer_is_bagels():
    expected = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,  # of 27: the last is never used
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 980,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
    config = SynerMedGenConfig()
    assert numbers(config.vision_config, expected) == expected
    assert config.vision_patches_per_side == 70


def test_the_default_latents_and_token_ids_are_bagels():
    expected = {
        "latent_channels": 16,
        "latent_patch_size": 2,
        "max_latent_size": 64,
        "timestep_shift": 1.0,
        "bos_token_id": 151644,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    config = SynerMedGenConfig()
    assert numbers(config, expected) == expected
    assert config.latent_token_dim == 64
    assert config.tie_word_embeddings is False


def test_the_stand_in_ids_are_distinct_and_inside_the_vocabulary():
    config = SynerMedGenConfig()
    ids = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    assert len(ids) == 8 and max(ids) < config.text_config.vocab_size


def test_the_default_model_has_bagels_parameters():
    with torch.device("meta"):
        model = SynerMedGenForConditionalGeneration(SynerMedGenConfig())
    expert = 6_525_625_344
    counts = {
        "understanding": expert,
        "generation": expert,
        "embed_tokens": 544_997_376,
        "lm_head": 544_997_376,
        "norms": 2 * 3584,
        "vision_model": 402_552_736,
        "connector": 16_980_992,
        "time_embedder": 13_769_728,
        "vae2llm": 232_960,
        "llm2vae": 229_440,
    }

    def part(name):
        if ".layers." in name and "language_model" in name:
            return "generation" if "_moe_gen" in name else "understanding"
        return "norms" if ".norm" in name else next(part for part in counts if part in name)

    found = dict.fromkeys(counts, 0)
    for name, parameter in model.named_parameters():
        found[part(name)] += parameter.numel()
    assert found == counts


# ---- JSON ----


def test_json_round_trip(config, tmp_path):
    config = SynerMedGenConfig.from_dict({**config.to_dict(), "trained_routes": ["brain/MRI-CT"]})
    config.save_pretrained(tmp_path)
    again = SynerMedGenConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.trained_routes == ["brain/MRI-CT"] and again.text_config.hidden_size == 32
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "synermedgen"


def test_auto_config_reads_it(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SynerMedGenConfig


def test_sub_configs_are_given_as_dicts_or_objects():
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 48, "image_size": 224, "patch_size": 16}
    from_dicts = SynerMedGenConfig(text_config=sizes, vision_config=vision)
    from_objects = SynerMedGenConfig(
        text_config=SynerMedGenTextConfig(**sizes), vision_config=SiglipVisionConfig(**vision)
    )
    assert type(from_dicts.text_config) is SynerMedGenTextConfig
    assert type(from_dicts.vision_config) is SiglipVisionConfig
    assert from_dicts.to_dict() == from_objects.to_dict()
    assert from_dicts.text_config.intermediate_size == 18944  # what is not said stays BAGEL's
    assert from_dicts.get_text_config() is from_dicts.text_config


# ---- what follows from the numbers ----


@pytest.mark.parametrize(("patch", "channels", "dim"), [(2, 16, 64), (1, 4, 4), (3, 8, 72)])
def test_latent_token_dim_is_a_square_patch_of_channels(patch, channels, dim):
    assert SynerMedGenConfig(latent_patch_size=patch, latent_channels=channels).latent_token_dim == dim


@pytest.mark.parametrize(("image", "patch", "side"), [(980, 14, 70), (112, 14, 8), (120, 14, 8)])
def test_vision_patches_per_side_counts_whole_patches(image, patch, side):
    config = SynerMedGenConfig(vision_config={"image_size": image, "patch_size": patch})
    assert config.vision_patches_per_side == side


def test_sampling_defaults_fill_up_what_is_not_said():
    defaults = {"num_inference_steps": 49, "guidance_scale": 4.0, "image_guidance_scale": 1.5}
    assert SynerMedGenConfig().sampling == defaults
    assert SynerMedGenConfig(sampling={"guidance_scale": 1.0}).sampling == {**defaults, "guidance_scale": 1.0}


def test_two_configs_share_no_list_or_dict():
    first, second = SynerMedGenConfig(), SynerMedGenConfig()
    first.trained_routes.append("brain/MRI-CT")
    first.trained_tasks.append("MI")
    first.sampling["guidance_scale"] = 9.0
    assert (second.trained_routes, second.trained_tasks, second.sampling["guidance_scale"]) == ([], [], 4.0)


# ---- refusals ----


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 36, "num_attention_heads": 5}, r"hidden_size \(36\) must be num_attention_heads \(5\) times"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "an even head width"),
        ({"num_attention_heads": 28, "num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"hidden_size": 6, "num_attention_heads": 3}, r"hidden_size \(6\) must be divisible by 4"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        SynerMedGenTextConfig(**sizes)
    with pytest.raises(ValueError, match=words):
        SynerMedGenConfig(text_config=sizes)


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="max_latent_size"):
        SynerMedGenConfig(max_latent_size="64")
