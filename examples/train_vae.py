"""Train the small autoencoder of the demonstration weights on the digital phantom.

    python examples/train_vae.py --output_dir runs/vae

One slice in [-1, 1] becomes a latent of a quarter of its side. Its three channels hold the same grey levels, or, with
`--codec bands`, three windows of CT, CBCT and PET; the pipeline's processor then needs the same windows. The loss is
L1 + SSIM + a light KL term; there is no adversary, since an invented texture is the last thing wanted here. At the end
`scaling_factor` and `shift_factor` are measured on the training latents, so that the generator sees unit variance.

Checkpoints are written every `--checkpointing_steps`; `--resume_from_checkpoint latest` continues from the newest.
"""

import argparse
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
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from synermedgen_hf.data.phantom import load_phantom
from synermedgen_hf.image_processing_synermedgen import CODECS, SynerMedGenImageProcessor, set_codec

logger = logging.getLogger(__name__)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/phantom"), help="where simulated cases are kept")
    parser.add_argument("--train_cases", type=int, default=200, help="simulated subjects per protocol")
    parser.add_argument("--slices_per_case", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--codec", choices=CODECS, default="plain", help="how a slice fills the three channels")
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
    parser.add_argument("--resume_from_checkpoint", default=None, help='"latest" or a folder')
    parser.add_argument("--num_proc", type=int, default=2, help="processes that simulate cases")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def encode_slices(cases, image_processor) -> torch.Tensor:
    """
    Every slice of every modality as the codec sees it, float16 in [-1, 1]: `(n, 3, height, width)`, or
    `(n, 1, height, width)` where all three channels are the same.
    """
    spread = any("bands" in spec for spec in image_processor.intensity.values())
    slices = []
    for case in tqdm(cases, desc="codec"):
        for modality, volume in case.images.items():
            window = image_processor.intensity_window(volume, modality)
            for image in volume:
                pixels = image_processor.preprocess_slice(image, modality, window).vae_pixels
                slices.append(pixels[: 3 if spread else 1].half())
    return torch.stack(slices)


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
    if (args.output_dir / "log.jsonl").exists() and not args.resume_from_checkpoint:
        raise SystemExit(
            f"{args.output_dir} holds an earlier training. Continue it with --resume_from_checkpoint latest, or choose "
            "another --output_dir."
        )
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise SystemExit("This small autoencoder is trained by one process: run the script with python.")
    image_processor = SynerMedGenImageProcessor(
        vae_size={"max_size": args.resolution, "min_size": args.resolution, "stride": 16, "max_pixels": 14112 * 128},
        intensity=set_codec(SynerMedGenImageProcessor.intensity, args.codec),
    )
    cases = load_phantom("train", args.train_cases, args.slices_per_case, args.cache_dir, num_proc=args.num_proc)
    data = encode_slices(cases, image_processor)
    logger.info("%d slices of %d simulated subjects", len(data), len(cases))
    train(args, data, accelerator)
    accelerator.end_training()


def train(args, data: torch.Tensor, accelerator: Accelerator) -> AutoencoderKL:
    """Train on slices from [`encode_slices`], save to `args.output_dir / "vae"`, and return what was saved."""
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
    step = 0
    # The order of slices starts anew after a resumption; everything else continues.
    folders = sorted(args.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if args.resume_from_checkpoint and (folders or args.resume_from_checkpoint != "latest"):
        folder = folders[-1] if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
        accelerator.load_state(folder)
        step = int(folder.name.split("-")[1])

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
            accelerator.clip_grad_norm_(vae.parameters(), args.max_grad_norm)
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
                accelerator.save_state(args.output_dir / f"checkpoint-{step}")
            done = step >= args.max_train_steps
            if done:
                break

    vae = accelerator.unwrap_model(vae).eval()
    measure_latents(vae, data, args.train_batch_size)
    vae.save_pretrained(args.output_dir / "vae")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    (args.output_dir / "training_args.json").write_text(json.dumps(settings, indent=2) + "\n")
    logger.info("saved %s", args.output_dir / "vae")
    return vae


def open_log(path: Path, step: int):
    """
    The log, ready to go on after `step`, and the minutes trained until there. Rows beyond `step` are dropped: an
    interrupted run may have logged more than it saved.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.replace(path)
    return rows[-1]["minutes"] if rows else 0, path.open("a")


@torch.no_grad()
def measure_latents(vae, data: torch.Tensor, batch_size: int, n: int = 512):
    """Set `shift_factor` and `scaling_factor` so that `(z - shift) * scale` has mean 0 and variance 1."""
    chosen = data[torch.linspace(0, len(data) - 1, min(n, len(data))).long()].float().expand(-1, 3, -1, -1)
    latents = torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean for batch in chosen.split(batch_size)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


if __name__ == "__main__":
    main(parse_args())
