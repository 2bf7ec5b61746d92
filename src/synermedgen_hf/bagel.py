"""BAGEL-family checkpoints (BAGEL, UniMedVL, SynerMedGen training runs) in our names.

The tensors are the same; only names differ, the ViT's patch weight is a linear layer in both, and the two tables of
fixed positions are computed instead of stored.
"""

import re

import torch

# BAGEL name -> our name, in order; the first match wins.
MODEL_RENAMING = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vit_model\.vision_model\.", "model.vision_model."),
    (r"^connector\.", "model.connector."),
    (r"^vae2llm\.", "model.vae2llm."),
    (r"^llm2vae\.", "llm2vae."),
    (r"^time_embedder\.mlp\.0\.", "model.time_embedder.linear_1."),
    (r"^time_embedder\.mlp\.2\.", "model.time_embedder.linear_2."),
)
FIXED_TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")

# FLUX autoencoder name -> diffusers AutoencoderKL name; every pattern that matches is applied.
VAE_RENAMING = (
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def rename_model_key(name: str) -> str | None:
    """
    Our name of a BAGEL model tensor.

    Args:
        name (`str`): Name in `ema.safetensors` or `model.safetensors`.

    Returns:
        `str`, or `None` for a fixed table of positions, which the model computes.

    Raises:
        `KeyError`: Not a tensor of this family.
    """
    if name in FIXED_TABLES:
        return None
    for pattern, replacement in MODEL_RENAMING:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(f"{name} is not a tensor of a BAGEL-family checkpoint.")


def convert_vae_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    FLUX autoencoder tensors (`ae.safetensors`) to those of diffusers' `AutoencoderKL`.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Native tensors.

    Returns:
        `dict[str, torch.Tensor]`: The same values; decoder levels counted from the bottom, the middle attention's 1x1
        convolutions as linear layers.
    """
    levels = 1 + max(int(name.split(".")[2]) for name in state_dict if name.startswith("decoder.up."))

    def decoder_level(match):
        kind = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}.{kind}."

    converted = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^decoder\.up\.(\d+)\.(block|upsample)\.", decoder_level, name)
        for pattern, replacement in VAE_RENAMING:
            name = re.sub(pattern, replacement, name)
        if ".attentions." in name and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        converted[name] = tensor
    return converted
