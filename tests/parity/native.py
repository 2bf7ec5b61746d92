"""A golden fixture as a folder in the original layout, the way such checkpoints are downloaded."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def write_native(golden: Path, folder: Path):
    """
    Args:
        golden (`Path`): Holds `config.json` (plain numbers), `model.safetensors` and `ae.safetensors`.
        folder (`Path`): Gets `ema.safetensors`, `ae.safetensors`, `llm_config.json`, `vit_config.json`, a tokenizer.
    """
    folder.mkdir(parents=True)
    numbers = json.loads((golden / "config.json").read_text())
    shutil.copyfile(golden / "model.safetensors", folder / "ema.safetensors")
    shutil.copyfile(golden / "ae.safetensors", folder / "ae.safetensors")
    vit = {**numbers["vit"], "model_type": "siglip_vision_model"}
    vit["image_size"] = numbers["bagel"]["vit_max_num_patch_per_side"] * vit["patch_size"]
    vit["num_hidden_layers"] += 1  # the public file counts the layer that is dropped
    (folder / "vit_config.json").write_text(json.dumps(vit))
    (folder / "llm_config.json").write_text(json.dumps({**numbers["llm"], "model_type": "qwen2"}))

    special = numbers["special_tokens"]
    names = {
        special["bos_token_id"]: "<|im_start|>",
        special["eos_token_id"]: "<|im_end|>",
        special["start_of_image"]: "<|vision_start|>",
        special["end_of_image"]: "<|vision_end|>",
    }
    words = {names.get(index, f"w{index}"): index for index in range(numbers["llm"]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(list(names.values()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
