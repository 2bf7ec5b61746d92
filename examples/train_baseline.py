"""What the field's usual networks make of Stage II's pairs: a U-Net regressor and a pix2pix, to stand beside the model.

    python examples/train_baseline.py --baseline unet --max_train_minutes 45 \\
        --pretrained_model_name_or_path runs/stage2/pipeline --data_dir /data/SynthRAD2023 --output_dir runs/unet

    synermedgen evaluate --baseline runs/unet --model runs/stage2/pipeline --data-dir /data/SynthRAD2023 --output unet

Of the checkpoint only the image processor is read: it owns the scale, so both sides of a pair are in [-1, 1] at the
size that the autoencoder reads. Pairs come from `load_pairs` of `train_generation.py`, in the order that Stage II draws
them in for the same seed; without `--data_dir` they are of simulated patients. Both baselines are one network for all
routes, which it is told as a class.

* `unet`: the L1 distance to the target.
* `pix2pix`: the same network, 100 times the L1 distance, and a discriminator that tells source and target from source
  and synthesis, patch by patch (Isola et al. 2017, arXiv 1611.07004).
* As in pix2pix's own generator nothing is computed at full resolution: blocks of `--patch_size` pixels are channels.
* `--max_train_minutes` counts the time of training steps alone, in this run and those it resumes, and the learning rate
  falls along a cosine to 0 when it is used up. So a baseline gets the time that a Stage II took, on the same machine.
* Checkpoints appear whole or not at all. `--resume_from_checkpoint latest` continues; with `--max_train_steps` to the
  same weights to the bit.
"""

import argparse
import io
import json
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from train_generation import (
    add_data_arguments,
    check_above_zero,
    check_data,
    checkpoint_to_resume,
    clear_leftovers,
    describe,
    discard,
    is_simulated,
    lasting_settings,
    load_checkpoint,
    load_pairs,
    open_log,
    save_checkpoint,
)
from transformers import AutoProcessor

from synermedgen_hf.data.flow_matching import PairOrder, PairPool
from synermedgen_hf.data.latents import SliceEncoder, StoredSlice, check_sizes, prepare_slice
from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.hub import check_folder
from synermedgen_hf.metrics.baselines import NETWORKS, RECORD, check_codec, codec_settings, fixed_side, predict_codes

logger = logging.getLogger(__name__)

BETAS = {"unet": (0.9, 0.95), "pix2pix": (0.5, 0.999)}  # of Adam; the second are Isola's
L1_WEIGHT = 100.0
# What a checkpoint cannot be continued with other values of.
LASTING = (
    "baseline",
    "block_out_channels",
    "layers_per_block",
    "patch_size",
    "discriminator_channels",
    "train_batch_size",
    "learning_rate",
    "lr_warmup_steps",
    "max_grad_norm",
    "mixed_precision",
    "seed",
)
ABOVE_ZERO = (
    "max_train_minutes max_train_steps train_batch_size learning_rate max_grad_norm patch_size layers_per_block "
    "checkpointing_steps checkpoints_total_limit logging_steps slice_step"
).split()
BUDGET = ("max_train_minutes", "max_train_steps")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--baseline", choices=NETWORKS, required=True)
    add("--pretrained_model_name_or_path", required=True, help="a pipeline, whose image processor alone is read")
    add("--revision", default=None, help="of the Hub repository")
    add("--output_dir", type=Path, required=True, help="where checkpoints, the log and the network go")

    add = add_data_arguments(parser).add_argument
    add("--slice_cache", choices=["memory", "off"], default="memory", help="keep slices in memory, two bytes a pixel")

    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--block_out_channels", type=int, nargs="+", default=[32, 64, 128, 192], help="from fine to coarse")
    add("--layers_per_block", type=int, default=1)
    add("--patch_size", type=int, default=2, help="side of the blocks of pixels that are channels")
    add("--discriminator_channels", type=int, nargs="+", default=[32, 64, 128], help="each halves the picture")

    train = parser.add_argument_group("training")
    add = train.add_argument
    budget = train.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max_train_minutes", type=float, default=None, help="of training steps alone")
    budget.add_argument("--max_train_steps", type=int, default=None)
    add("--train_batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=5e-4)
    add("--lr_warmup_steps", type=int, default=50)
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=["no", "bf16"], default="bf16")
    add("--seed", type=int, default=0)

    keep = parser.add_argument_group("checkpoints, log")
    add = keep.add_argument
    add("--checkpointing_steps", type=int, default=200)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--resume_from_checkpoint", default=None, help='"latest" or a folder')
    add("--logging_steps", type=int, default=25)
    args = parser.parse_args(argv)
    check_above_zero(parser, args, ABOVE_ZERO)
    for name in ("block_out_channels", "discriminator_channels"):
        if any(width < 8 or width % 8 for width in getattr(args, name)):
            parser.error(f"--{name} must be multiples of 8, got {getattr(args, name)}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class PictureEncoder(SliceEncoder):
    """
    Slices to what the autoencoder would read, one channel of it, `(1, height, width)` float16 in [-1, 1].

    Args:
        image_processor ([`SynerMedGenImageProcessor`]): Scanner units to pixels.
    """

    def __init__(self, image_processor):
        check_sizes(image_processor)
        self.image_processor, self.cache = image_processor, None

    def encode(self, stored: StoredSlice, content: bytes) -> torch.Tensor:
        """One slice; of the bands codec the channel that holds the whole window."""
        picture = Image.open(io.BytesIO(content))
        inputs = prepare_slice(self.image_processor, picture, stored.modality, stored.window, stored.case)
        return inputs.vae_pixels[:1].half()


class Batches:
    """
    Batches of a pool: the pairs that Stage II draws, in its order.

    Args:
        pool ([`PairPool`]): Of [`PictureEncoder`].
        batch_size (`int`): Pairs at a time.
        seed (`int`): Of the order.
    """

    def __init__(self, pool: PairPool, batch_size: int, seed: int):
        self.pool, self.batch_size, self.order = pool, batch_size, PairOrder(pool, [seed])
        self.labels = {route: label for label, route in enumerate(pool.pairs)}

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Sources and targets `(batch, 1, height, width)`, labels of their routes, and which cases they are of."""
        drawn = [self.order(number) for number in range(step * self.batch_size, (step + 1) * self.batch_size)]
        sides = [
            [self.pool[pair.slices[getattr(route, side)]].float() for route, pair in drawn]
            for side in ("source", "target")
        ]
        height, width = (max(picture.shape[axis] for picture in sides[0]) for axis in (1, 2))
        # Slices of several sizes are padded as the codec pads them to squares: with the low end of the window.
        sources, targets = (
            torch.stack([F.pad(one, (0, width - one.shape[2], 0, height - one.shape[1]), value=-1.0) for one in side])
            for side in sides
        )
        labels = torch.tensor([self.labels[route] for route, _ in drawn])
        return sources, targets, labels, [f"{pair.case} ({route})" for route, pair in drawn]


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def make_unet(args, routes: int) -> UNet2DModel:
    """The network of both baselines: source and route to target, attention at the coarsest level alone."""
    levels, channels = len(args.block_out_channels), args.patch_size**2
    return UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        down_block_types=["DownBlock2D"] * levels,
        up_block_types=["UpBlock2D"] * levels,
        norm_num_groups=8,
        num_class_embeds=routes,
    )


class Discriminator(nn.Module):
    """
    PatchGAN (Isola et al. 2017): for each patch of source and target, how likely the target is a true one.

    The route has its say as in Miyato and Koyama 2018 (arXiv 1802.05637): instance norm would remove what is added to
    the features before it.

    Args:
        widths (`list[int]`): Channels of the convolutions, each of which halves the picture.
        routes (`int`): How many there are.
    """

    def __init__(self, widths: list[int], routes: int):
        super().__init__()
        layers = []
        for place, (before, width) in enumerate(zip([2, *widths[:-1]], widths, strict=True)):
            layers.append(nn.Conv2d(before, width, kernel_size=4, stride=2, padding=1))
            if place:  # none on the first, as published
                layers.append(nn.InstanceNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
        self.features = nn.Sequential(*layers)
        self.logits = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        self.route = nn.Embedding(routes, widths[-1])
        nn.init.zeros_(self.route.weight)

    def forward(self, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits of the patches, `(batch, 1, rows, columns)`."""
        features = self.features(torch.cat([source, target], dim=1))
        of_route = (self.route(labels)[:, :, None, None] * features).sum(dim=1, keepdim=True)
        return self.logits(features) + of_route


class Training:
    """
    The networks of one baseline, their optimizers, and what a step does.

    Args:
        args (`argparse.Namespace`): Of [`parse_args`].
        accelerator (`Accelerator`): Knows device and precision, and keeps what is prepared here in checkpoints.
        routes (`int`): How many there are.
    """

    def __init__(self, args, accelerator: Accelerator, routes: int):
        self.args, self.accelerator = args, accelerator
        self.generator, self.optimizer = self._prepare(make_unet(args, routes))
        self.discriminator = None
        if args.baseline == "pix2pix":
            self.discriminator, self.judge_optimizer = self._prepare(Discriminator(args.discriminator_channels, routes))

    def _prepare(self, network: nn.Module):
        optimizer = torch.optim.Adam(network.parameters(), betas=BETAS[self.args.baseline])
        return self.accelerator.prepare(network, optimizer)

    def step(self, sources, targets, labels, rate: float) -> dict[str, float]:
        """
        One update of every network.

        Args:
            sources, targets (`torch.Tensor` of shape `(batch, 1, height, width)`): On the codec's scale.
            labels (`torch.Tensor` of shape `(batch,)`): Of their routes.
            rate (`float`): The learning rate.

        Returns:
            `dict[str, float]`: What is logged.

        Raises:
            `FloatingPointError`: A loss or a gradient is not a number; the networks are as they were, but for a
                discriminator that has had its turn.
        """
        made = predict_codes(self.generator, sources, labels)
        l1 = F.l1_loss(made, targets)
        losses, loss = {"loss_l1": l1.item(), "loss_copy": F.l1_loss(sources, targets).item()}, l1
        if self.discriminator is not None:
            # 1. The discriminator, half as fast as the generator, as published.
            judged = (self.discriminator(sources, one, labels) for one in (targets, made.detach()))
            of_true, of_made = map(_cross_entropy, judged, (1.0, 0.0))
            loss_discriminator = (of_true + of_made) / 2
            losses["loss_discriminator"] = loss_discriminator.item()
            self._update(self.discriminator, self.judge_optimizer, loss_discriminator, rate)
            # 2. The generator against it. Isola's sum is divided by 100, which Adam does not notice, so that gradients
            # are of one size in both baselines when they are clipped.
            self.discriminator.requires_grad_(False)
            loss_gan = _cross_entropy(self.discriminator(sources, made, labels), 1.0)
            self.discriminator.requires_grad_(True)
            losses["loss_gan"] = loss_gan.item()
            loss = l1 + loss_gan / L1_WEIGHT
        losses["grad_norm"] = self._update(self.generator, self.optimizer, loss, rate)
        return losses

    def _update(self, network: nn.Module, optimizer, loss: torch.Tensor, rate: float) -> float:
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(network.parameters(), self.args.max_grad_norm).item()
        if not math.isfinite(loss.item()) or not math.isfinite(norm):
            raise FloatingPointError(f"loss {loss.item()}, norm of the gradients {norm}")
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return norm


def _cross_entropy(logits: torch.Tensor, true: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, true))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def open_codec(args):
    """The image processor of the checkpoint, if its sizes fit the network."""
    source = args.pretrained_model_name_or_path
    check_folder(source, {"model": None, "vae": None, "scheduler": None})  # they are not needed here
    codec = AutoProcessor.from_pretrained(source, subfolder="processor", revision=args.revision).image_processor
    side = fixed_side(codec_settings(codec))
    stride = side or codec.vae_size["stride"]
    coarsest = args.patch_size * 2 ** (len(args.block_out_channels) - 1)
    if stride % coarsest:
        raise SystemExit(
            f"The codec makes pictures of {'' if side else 'multiples of '}{stride} pixels a side, and "
            f"{len(args.block_out_channels)} levels on blocks of {args.patch_size} pixels need multiples of "
            f"{coarsest}: pass fewer --block_out_channels, or a smaller --patch_size."
        )
    return codec


def share_of_budget(args, step: int, seconds: float) -> float:
    """How much of the budget is used up: 0 to 1, or a little more."""
    return step / args.max_train_steps if args.max_train_steps else seconds / 60 / args.max_train_minutes


def learning_rate(args, step: int, share: float) -> float:
    """A linear warm-up in steps, then a cosine over the budget, whatever it is counted in."""
    warm = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
    return args.learning_rate * warm * (1 + math.cos(math.pi * min(1.0, share))) / 2


def main(args):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.setLevel(logging.INFO)
    folder = checkpoint_to_resume(args, LASTING)
    check_data(args)
    state = json.loads((folder / "training_state_0.json").read_text()) if folder else {}
    done = args.output_dir / RECORD
    record = json.loads(done.read_text()) if done.exists() else None
    if record:
        had, now = record["arguments"], lasting_settings(args, (*BUDGET, *LASTING))
        changed = [f"--{name} {had[name]} (now {now[name]})" for name in now if had.get(name, now[name]) != now[name]]
        if changed:
            raise SystemExit(
                f"{args.output_dir} holds a baseline that is trained to its end with {', '.join(changed)}: choose "
                "another --output_dir."
            )
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise SystemExit("A baseline is trained by one process: start it with python, not with accelerate launch.")
    codec = open_codec(args)
    if before := record or state:
        try:
            check_codec(done if record else folder, before, codec)
        except ValueError as error:
            raise SystemExit(str(error)) from error

    # 1. The data, and one network for all routes.
    pool = PairPool(
        load_pairs(args, "train", False, args.train_cases), PictureEncoder(codec), keep=args.slice_cache == "memory"
    )
    if record:
        if record.get("fingerprint", pool.fingerprint) != pool.fingerprint:
            raise SystemExit(f"The data are not those that {done} was trained on: choose another --output_dir.")
        logger.info("%s is trained already.", args.output_dir)
        return
    if folder is not None and state["data"] != pool.fingerprint:
        raise SystemExit(f"The data are not those that {folder} was trained on. Bring them back.")
    batches = Batches(pool, args.train_batch_size, args.seed)
    describe(args, pool)
    set_seed(args.seed)
    training = Training(args, accelerator, len(pool.pairs))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    step, seconds, sums = 0, 0.0, {}
    if folder is not None:
        load_checkpoint(accelerator, folder, None)
        step, seconds, sums = state["step"], state["seconds"], state["sums"]
        logger.info("resumed from %s, after %.1f minutes of training", folder, seconds / 60)
    if args.slice_cache == "memory":
        pool.encode_all()

    # 2. Train.
    clear_leftovers(args.output_dir)
    _, log = open_log(args.output_dir / "log.jsonl", step)
    in_steps = args.max_train_steps is not None
    total = args.max_train_steps if in_steps else round(60 * args.max_train_minutes)
    progress = tqdm(total=total, desc=args.baseline, unit="step" if in_steps else "s")
    progress.update(step if in_steps else round(seconds))
    while (share := share_of_budget(args, step, seconds)) < 1:
        start, rate = time.perf_counter(), learning_rate(args, step, share)
        *batch, cases = batches(step)
        try:
            losses = training.step(*(tensor.to(accelerator.device) for tensor in batch), rate)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"The loss of step {step} is not a number ({error}). The last checkpoint is whole. Lower the learning "
                f"rate, or look at the cases of this step: {', '.join(sorted(set(cases)))}."
            ) from error
        step, seconds = step + 1, seconds + time.perf_counter() - start
        sums = {name: sums.get(name, 0.0) + value for name, value in {**losses, "steps": 1}.items()}
        progress.update((step if in_steps else min(round(seconds), total)) - progress.n)
        if step % args.logging_steps == 0:
            count = sums.pop("steps")
            means = {name: round(value / count, 5) for name, value in sums.items()}
            log.write(json.dumps({"step": step, "minutes": round(seconds / 60, 3), "lr": rate, **means}) + "\n")
            log.flush()
            progress.set_postfix(l1=f"{means['loss_l1']:.4f}", copy=f"{means['loss_copy']:.4f}", steps=step)
            sums = {}
        if step % args.checkpointing_steps == 0:
            state = {"step": step, "seconds": seconds, "sums": sums, "settings": lasting_settings(args, LASTING)}
            state |= {"data": pool.fingerprint, "codec": codec_settings(codec)}
            save_checkpoint(
                accelerator, args.output_dir / f"checkpoint-{step}", state, None, args.checkpoints_total_limit
            )
    progress.close()
    log.close()

    # 3. The network, then the record that makes the folder a baseline.
    unet = accelerator.unwrap_model(training.generator)
    save_network(unet, args.output_dir)
    record = {
        "kind": args.baseline,
        "routes": [route.name for route in pool.pairs],
        "codec": codec_settings(codec),
        "minutes": round(seconds / 60, 3),
        "fingerprint": pool.fingerprint,
        "steps": step,
        "samples": step * args.train_batch_size,
        "parameters": unet.num_parameters(),
        "data": "simulated patients of synermedgen_hf.data.phantom; no real scan"
        if is_simulated(args)
        else Path(args.data_dir or args.dataset_name).name,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }
    write_whole(args.output_dir / RECORD, json.dumps(record, indent=2) + "\n")
    logger.info("saved %s after %d steps in %.1f minutes", args.output_dir / "unet", step, seconds / 60)


def save_network(unet: UNet2DModel, output_dir: Path):
    """`unet/`, there whole or not at all."""
    unfinished = output_dir / "unet.unfinished"
    discard(unfinished)
    unet.save_pretrained(unfinished)
    discard(output_dir / "unet")
    unfinished.rename(output_dir / "unet")


if __name__ == "__main__":
    main(parse_args())
