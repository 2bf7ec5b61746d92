"""Latent tokens of half the side: a start for a generation expert that has learned with larger ones.

    python examples/finer_tokens.py --pretrained_model_name_or_path runs/tiny/pipeline --output_dir runs/tiny-finer

With four times the tokens a picture has finer detail, and a step takes two to three times as long. Most of what is
learned does not depend on the size of a token, so it is learned with large ones, and training goes on from here with
small ones.

A small token is read as the large one that it would fill if it stood there four times, and written as the mean of what
the four quarters of the large one would be. All other weights stay what they are. Places have to be learned anew, since
token (i, j) now lies half as far from the corner.
"""

import argparse
import copy
from pathlib import Path

import torch

from synermedgen_hf import SynerMedGenForConditionalGeneration, SynerMedGenPipeline


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="a pipeline folder or Hub repository")
    parser.add_argument("--output_dir", type=Path, required=True, help="the result is OUTPUT_DIR/pipeline")
    return parser.parse_args(argv)


def with_finer_tokens(pipe: SynerMedGenPipeline) -> SynerMedGenPipeline:
    """
    Args:
        pipe ([`SynerMedGenPipeline`]): Its parts are shared with the result, but for model and image processor.

    Returns:
        [`SynerMedGenPipeline`]: Its latent tokens are half as wide and half as high.

    Raises:
        `SystemExit`: The side of a token is not even, or its pictures would have more tokens than there are places.
    """
    config, processor = copy.deepcopy(pipe.model.config), copy.deepcopy(pipe.processor)
    images = processor.image_processor
    if config.latent_patch_size % 2:
        raise SystemExit(f"A token of {config.latent_patch_size} latent positions a side cannot be halved.")
    stride = images.latent_stride // 2
    if images.vae_size["max_size"] > config.max_latent_size * stride:
        raise SystemExit(
            f"Pictures of up to {images.vae_size['max_size']} pixels a side would have more than the "
            f"{config.max_latent_size} tokens of {stride} pixels that there are places for."
        )
    half = config.latent_patch_size // 2
    config.latent_patch_size = half
    images.latent_stride, images.vae_size = stride, {**images.vae_size, "stride": stride}

    # Of a large token's numbers: upper or lower half, row in it, left or right half, column in it, channel.
    parts = (2, half, 2, half, config.latent_channels)
    weights = pipe.model.state_dict()
    reader, head, bias = (weights[name] for name in ("model.vae2llm.weight", "llm2vae.weight", "llm2vae.bias"))
    weights["model.vae2llm.weight"] = reader.unflatten(1, parts).sum((1, 3)).flatten(1)
    weights["llm2vae.weight"] = head.unflatten(0, parts).mean((0, 2)).flatten(0, 2)
    weights["llm2vae.bias"] = bias.unflatten(0, parts).mean((0, 2)).flatten()
    model = SynerMedGenForConditionalGeneration(config)
    model.load_state_dict(weights)
    model.generation_config = pipe.model.generation_config
    return SynerMedGenPipeline(model, processor, pipe.vae, pipe.scheduler)


def main(args):
    pipe = SynerMedGenPipeline.from_pretrained(
        args.pretrained_model_name_or_path, dtype=torch.float32, print_report=False
    )
    with_finer_tokens(pipe).save_pretrained(args.output_dir / "pipeline")
    print(f"Saved {args.output_dir / 'pipeline'}")


if __name__ == "__main__":
    main(parse_args())
