"""Train a small autoencoder: that of the demonstration weights on simulated patients, or one for your own scans.

    python examples/train_vae.py --output_dir runs/vae
    python examples/train_vae.py --data_dir /data/AutoPET --intensity windows.json --output_dir runs/vae-pet

Data are those of `train_generation.py`: every slice of its pairs, once. One slice in [-1, 1] becomes a latent of a
quarter of its side. Its three channels hold the same grey levels, or, with `--codec bands`, three windows of CT, CBCT
and PET. `--intensity` is a JSON file of windows that take the place of the usual ones, such as
`{"PET": {"unit": "SUV", "low": 0, "high": 40, "scale": "asinh"}}`. The pipeline's processor then needs the same
windows. The loss is L1 + SSIM + a light KL term; there is no adversary, since an invented texture is the last thing
wanted here. At the end `scaling_factor` and `shift_factor` are measured on the training latents, so that the generator
sees unit variance.

Checkpoints appear whole or not at all. `--resume_from_checkpoint latest` continues from the newest.
"""

import argparse
import hashlib
import io
import json
import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from train_generation import (
    add_data_arguments,
    check_above_zero,
    check_data,
    checkpoint_to_resume,
    clear_leftovers,
    is_simulated,
    lasting_settings,
    load_checkpoint,
    load_pairs,
    open_log,
    save_checkpoint,
)

from synermedgen_hf.data.flow_matching import PairPool
from synermedgen_hf.data.latents import prepare_slice
from synermedgen_hf.data.phantom import load_phantom
from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.image_processing_synermedgen import BANDS, CODECS, SynerMedGenImageProcessor, set_codec

logger = logging.getLogger(__name__)

# What a checkpoint cannot be continued with other values of.
LASTING = (
    "resolution codec block_out_channels latent_channels layers_per_block train_batch_size learning_rate "
    "lr_warmup_steps ssim_weight kl_weight max_grad_norm seed"
).split()

ABOVE_ZERO = (
    "resolution latent_channels layers_per_block train_batch_size max_train_steps learning_rate "
    "max_grad_norm checkpointing_steps checkpoints_total_limit slice_step"
).split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    add_data_arguments(parser)
    parser.add_argument("--resolution", type=int, default=128, help="side of a slice, padded to a square")
    parser.add_argument("--codec", choices=CODECS, default="plain", help="how a slice fills the three channels")
    parser.add_argument("--intensity", type=Path, default=None, help="JSON file of windows by modality; see above")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--layers_per_block", type=int, default=1)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--ssim_weight", type=float, default=0.2)
    parser.add_argument("--kl_weight", type=float, default=1e-5)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default=None, help='"latest" or a folder')
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_above_zero(parser, args, ABOVE_ZERO)
    return args


def encode_slices(cases, image_processor) -> torch.Tensor:
    """
    Every slice of every modality as the codec sees it, float16 in [-1, 1]: `(n, 3, height, width)`, or
    `(n, 1, height, width)` where all three channels are the same.
    """
    slices = []
    for case in tqdm(cases, desc="codec"):
        for modality, volume in case.images.items():
            window = image_processor.intensity_window(volume, modality)
            for image in volume:
                inputs = image_processor.preprocess_slice(image, modality, window)
                slices.append(channels_of(inputs, image_processor))
    return torch.stack(slices)


def encode_pairs(rows, image_processor) -> torch.Tensor:
    """The same of every slice in rows of pairs, each once."""
    slices = []
    for stored in tqdm(PairPool(rows, encoder=None).stored, desc="codec"):
        picture = Image.open(io.BytesIO(stored.content()))
        inputs = prepare_slice(image_processor, picture, stored.modality, stored.window, stored.case)
        slices.append(channels_of(inputs, image_processor))
    return torch.stack(slices)


def channels_of(inputs, image_processor) -> torch.Tensor:
    """Of a slice's three channels those that differ from one another."""
    spread = any("bands" in spec for spec in image_processor.intensity.values())
    return inputs.vae_pixels[: 3 if spread else 1].half()


def ssim_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - mean SSIM over 7x7 windows (Wang et al. 2004, K = 0.01 and 0.03) of images in [-1, 1], range 2."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def mean(image):
        return F.avg_pool2d(image, 7, 1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return 1 - (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def main(args):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoint_to_resume(args, LASTING)
    check_data(args)
    if args.routes and is_simulated(args) and not args.phantom_cases:
        raise SystemExit("--routes needs --data_dir or --phantom_cases: this autoencoder learns all modalities.")
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise SystemExit("This small autoencoder is trained by one process: run the script with python.")
    own = json.loads(args.intensity.read_text()) if args.intensity else {}
    if unknown := own.keys() - SynerMedGenImageProcessor.intensity.keys():
        known = ", ".join(SynerMedGenImageProcessor.intensity)
        raise SystemExit(f"{args.intensity} has windows of {', '.join(sorted(unknown))}; modalities are {known}.")
    if args.codec == "bands" and (
        lacking := [name for name, spec in own.items() if name in BANDS and "bands" not in spec]
    ):
        raise SystemExit(
            f"{args.intensity} has windows of {', '.join(lacking)} without bands, which --codec bands needs: add "
            '"bands": [[low, high], [low, high]] inside of each.'
        )
    image_processor = SynerMedGenImageProcessor(
        vae_size={"max_size": args.resolution, "min_size": args.resolution, "stride": 16, "max_pixels": 14112 * 128},
        intensity={**set_codec(SynerMedGenImageProcessor.intensity, args.codec), **own},
    )
    if is_simulated(args) and not args.phantom_cases:  # whole volumes, which need not become rows first
        cases = load_phantom("train", args.train_cases, args.slices_per_case, args.cache_dir, num_proc=args.num_proc)
        data = encode_slices(cases, image_processor)
    else:
        data = encode_pairs(load_pairs(args, "train", False, args.train_cases), image_processor)
    logger.info("%d slices", len(data))
    if len(data) < args.train_batch_size:
        raise SystemExit(f"There are {len(data)} slices, and --train_batch_size {args.train_batch_size} needs as many.")
    train(args, data, image_processor, accelerator)
    accelerator.end_training()


def train(args, data: torch.Tensor, image_processor, accelerator: Accelerator) -> AutoencoderKL:
    """Train on encoded slices, save to `args.output_dir / "vae"`, and return what was saved."""
    set_seed(args.seed)
    levels = len(args.block_out_channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        norm_num_groups=8,
        sample_size=args.resolution,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    loader = DataLoader(data, batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    vae, optimizer, loader, scheduler = accelerator.prepare(vae, optimizer, loader, scheduler)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    step, folder = 0, checkpoint_to_resume(args, LASTING)
    windows = json.loads(json.dumps(image_processor.intensity))
    seen = hashlib.sha256(data.numpy().reshape(-1)).hexdigest()[:16]
    # The order of slices starts anew after a resumption; everything else continues.
    if folder is not None:
        state = load_checkpoint(accelerator, folder, None)
        step, before = state["step"], state.get("windows")
        if before != windows:
            raise SystemExit(
                f"{folder} was trained on other windows than these{'' if before else ', or did not say which'}: start "
                "anew in another --output_dir."
            )
        if state.get("data", seen) != seen:
            raise SystemExit(f"The data are not those that {folder} was trained on. Bring them back.")

    clear_leftovers(args.output_dir)
    minutes, log = open_log(args.output_dir / "log.jsonl", step)
    start = time.monotonic() - 60 * minutes
    progress = tqdm(total=args.max_train_steps, initial=step, desc="VAE")
    done = step >= args.max_train_steps
    while not done:
        for pixels in loader:
            channels = pixels.shape[1]
            pixels = pixels.float().expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                posterior = accelerator.unwrap_model(vae).encode(pixels).latent_dist
                decoded = accelerator.unwrap_model(vae).decode(posterior.sample()).sample
            # Equal channels are averaged when they are read, bands are not.
            made = decoded.float() if channels == 3 else decoded.float().mean(1, keepdim=True)
            wanted = pixels[:, :channels]
            l1, ssim = (decoded.float() - pixels).abs().mean(), ssim_loss(made, wanted)
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            loss = l1 + args.ssim_weight * ssim + args.kl_weight * kl
            accelerator.backward(loss)
            if not torch.isfinite(accelerator.clip_grad_norm_(vae.parameters(), args.max_grad_norm)):
                raise FloatingPointError(
                    f"The gradient of step {step} is not a number. Nothing was changed by this step; the last "
                    "checkpoint is whole. Lower the learning rate."
                )
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            progress.update()
            if step % 25 == 0:
                row = {"step": step, "l1": l1.item(), "ssim": 1 - ssim.item(), "kl": kl.item()}
                row["minutes"] = (time.monotonic() - start) / 60
                progress.set_postfix(l1=f"{row['l1']:.4f}", ssim=f"{row['ssim']:.4f}")
                log.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
                log.flush()
            if step % args.checkpointing_steps == 0:
                folder = args.output_dir / f"checkpoint-{step}"
                state = {"step": step, "settings": lasting_settings(args, LASTING), "windows": windows, "data": seen}
                save_checkpoint(accelerator, folder, state, None, args.checkpoints_total_limit)
            done = step >= args.max_train_steps
            if done:
                break

    vae = accelerator.unwrap_model(vae).eval()
    measure_latents(vae, data, args.train_batch_size)
    vae.save_pretrained(args.output_dir / "vae")
    image_processor.save_pretrained(args.output_dir / "vae")  # an autoencoder knows the windows it was trained on alone
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_whole(args.output_dir / "training_args.json", json.dumps(settings, indent=2) + "\n")
    logger.info("saved %s", args.output_dir / "vae")
    return vae


@torch.no_grad()
def measure_latents(vae, data: torch.Tensor, batch_size: int, n: int = 512):
    """Set `shift_factor` and `scaling_factor` so that `(z - shift) * scale` has mean 0 and variance 1."""
    chosen = data[torch.linspace(0, len(data) - 1, min(n, len(data))).long()].float().expand(-1, 3, -1, -1)
    latents = torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean for batch in chosen.split(batch_size)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


if __name__ == "__main__":
    main(parse_args())
