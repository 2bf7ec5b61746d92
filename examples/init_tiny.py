"""Make the untrained starting point of the demonstration weights: SynerMedGen's own classes at toy size.

    python examples/init_tiny.py --vae runs/vae/vae --output_dir runs/tiny-init

The result is an ordinary pipeline folder with random transformer weights, the trained autoencoder and a small tokenizer
made from SynerMedGen's own sentences; `examples/pretrain_tiny.py` takes it from there.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from synermedgen_hf import (
    REGIONS,
    SynerMedGenConfig,
    SynerMedGenForConditionalGeneration,
    SynerMedGenImageProcessor,
    SynerMedGenPipeline,
    SynerMedGenProcessor,
)
from synermedgen_hf.data.routes import ROUTES
from synermedgen_hf.data.wordings import (
    CTS_QUESTIONS,
    MI_QUESTIONS,
    TIA_QUESTIONS,
    VQA_QUESTIONS,
    describe,
    region_name,
)
from synermedgen_hf.modeling_synermedgen import grid_ids
from synermedgen_hf.processing_synermedgen import MODALITY_NAMES, MODALITY_QUESTION, make_instruction

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained autoencoder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--latent_patch_size", type=int, default=None, help="by default a token is 16 pixels a side")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--intermediate_size", type=int, default=480)
    parser.add_argument("--num_hidden_layers", type=int, default=5)
    parser.add_argument("--vit_hidden_size", type=int, default=128)
    parser.add_argument("--vit_layers", type=int, default=2)
    parser.add_argument("--vit_resolution", type=int, default=64)
    parser.add_argument("--vit_patch_size", type=int, default=32)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen2.5's, with the same special tokens, learned on the sentences the model meets."""
    regions, names = [None, *REGIONS], list(MODALITY_NAMES)
    sentences = [
        make_instruction(source, target, region)
        for source, target, region in itertools.product(names, names, regions)
        if source != target
    ]
    sentences += [
        make_instruction([one, other], "T2", region)
        for one, other, region in itertools.product(names, names, regions)
        if one != other
    ]
    for route in ROUTES:
        words = {"source": MODALITY_NAMES[route.source], "target": MODALITY_NAMES[route.target]}
        words |= {"region": region_name(route.region), "letters": "A to D", "count": 4}
        sentences += [question.format(**words) for question in (*CTS_QUESTIONS, *MI_QUESTIONS)] * 4
        sentences += describe(route.source, route.target, route.region) * 4
    sentences += [MODALITY_QUESTION, *VQA_QUESTIONS.values(), *MODALITY_NAMES.values()] * 20
    sentences += [f"{question}\nA.\nB.\nC.\nD." for question in TIA_QUESTIONS] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )


def windows_of(vae: Path) -> dict:
    """The windows that an autoencoder was trained on: in others it would be fed what it has never seen."""
    if not (vae / "preprocessor_config.json").exists():
        raise SystemExit(f"{vae} has no preprocessor_config.json, the windows it was trained on: see train_vae.py.")
    return SynerMedGenImageProcessor.from_pretrained(vae).intensity


@torch.no_grad()
def prepare_weights(model: SynerMedGenForConditionalGeneration, image_tokens: int):
    """
    Random weights from which a model of this size starts to learn within minutes instead of hours.

    * Deviations follow the width of what is read, instead of one deviation for a model of 3,584 columns.
    * The positions of a small image are nearly one and the same vector, louder than any content: the connector's bias
      takes it away.
    * Queries start as keys, nearly: a token looks at what resembles it, which is how slices are compared (mimetic
      initialisation, Trockman and Kolter 2023).

    Args:
        image_tokens (`int`): Tokens of an image.
    """
    layers = model.config.text_config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.normal_(0, 0.5 if name.endswith("embed_tokens") else 0.1)
        elif isinstance(module, torch.nn.Linear) and name not in ("lm_head", "llm2vae"):
            module.weight.normal_(0, module.in_features**-0.5)
            if name.split(".")[-1].startswith(("o_proj", "down_proj", "out_proj")) or name.endswith("mlp.fc2"):
                module.weight /= (2 * layers) ** 0.5  # sums of many layers stay of one size
    side = math.isqrt(image_tokens)
    positions = grid_ids(torch.tensor([[side, side]]), model.model.vit_pos_embed.side, "ViT")
    model.model.connector.fc2.bias -= model.model.vit_pos_embed(positions).mean(0)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for expert in ("", "_moe_gen"):
            query, key = (getattr(attention, f"{name}_proj{expert}").weight for name in "qk")
            heads = key.unflatten(0, (-1, attention.head_dim))
            heads = heads.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
            query.copy_(heads + 0.3 * query)


def main(args):
    set_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latent_patch = args.latent_patch_size or 16 // scale
    latent_stride = scale * latent_patch
    side, vit_patch, vit_side, no_bound = args.resolution, args.vit_patch_size, args.vit_resolution, 14112 * 128
    image_processor = SynerMedGenImageProcessor(
        vae_size={"max_size": side, "min_size": side, "stride": latent_stride, "max_pixels": no_bound},
        vit_size={"max_size": vit_side, "min_size": vit_side, "stride": vit_patch, "max_pixels": no_bound},
        vit_patch_size=vit_patch,
        vit_max_patches_per_side=vit_side // vit_patch,
        latent_max_per_side=32,
        latent_stride=latent_stride,
        intensity=windows_of(args.vae),
    )
    processor = SynerMedGenProcessor(image_processor, make_tokenizer(args.vocab_size))
    config = SynerMedGenConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": args.hidden_size,
            "intermediate_size": args.intermediate_size,
            "num_hidden_layers": args.num_hidden_layers,
            "num_attention_heads": args.hidden_size // 64,
            "num_key_value_heads": max(1, args.hidden_size // 128),
            "max_position_embeddings": 4096,
        },
        vision_config={
            "hidden_size": args.vit_hidden_size,
            "intermediate_size": 3 * args.vit_hidden_size,
            "num_hidden_layers": args.vit_layers,
            "num_attention_heads": args.vit_hidden_size // 32,
            "image_size": vit_side,
            "patch_size": vit_patch,
            "vision_use_head": False,
        },
        latent_channels=vae.config.latent_channels,
        latent_patch_size=latent_patch,
        max_latent_size=32,
        # The source already tells where everything is: what is left to learn lies at high noise.
        timestep_shift=3.0,
        pad_token_id=processor.tokenizer.pad_token_id,
        **{
            name: getattr(processor, name)
            for name in (
                "bos_token_id",
                "eos_token_id",
                "vision_start_token_id",
                "vision_end_token_id",
                "image_token_id",
                "latent_token_id",
                "target_token_id",
            )
        },
    )
    model = SynerMedGenForConditionalGeneration(config)
    prepare_weights(model, (vit_side // vit_patch) ** 2)
    pipe = SynerMedGenPipeline(model, processor, vae, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.save_pretrained(args.output_dir)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {torch.finfo(torch.bfloat16).bits // 8 * count / 1e6:.1f} MB in bfloat16")


if __name__ == "__main__":
    main(parse_args())
