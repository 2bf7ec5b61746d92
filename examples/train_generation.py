"""Stage II: train SynerMedGen to synthesise one modality from another, by flow matching in the VAE's latent space.

    accelerate launch examples/train_generation.py \\
        --pretrained_model_name_or_path runs/tiny-init --output_dir runs/tiny --freeze none

The command of the bundled weights, with all its arguments, is in `examples/train_tiny.sh`. The data are simulated.

Each sample is a simulated patient's slice: source modality (VAE latents, then ViT patches), the instruction, and the
noised latents of the target. The network predicts `noise - data` at the target's tokens.

* Timesteps: logit-normal, then shifted by the model's `timestep_shift`; never snapped to a grid.
* Conditions are dropped independently (text, VAE image, ViT image), which is what guidance needs at inference.
* `--freeze detach` (default) trains the generation expert with understanding activations detached, `grad` freezes the
  understanding parameters but lets gradients pass through them, `none` trains everything: the way from random weights.
* Every random choice is a function of (seed, step, process), so a resumed run continues exactly.
"""

import argparse
import json
import logging
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data.phantom import load_phantom
from synermedgen_hf.data.routes import ROUTES, Route
from synermedgen_hf.image_processing_synermedgen import patchify
from synermedgen_hf.loading_synermedgen import part_of
from synermedgen_hf.processing_synermedgen import ImageBlock, build_sequence, make_instruction, pad_sequences

logger = logging.getLogger(__name__)

NOTICE = "Demonstration weights trained on simulated scans. Not for clinical use."


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="a pipeline folder or Hub repository")
    parser.add_argument(
        "--allow_missing", nargs="*", default=[], help="tensors, or patterns with *, that may start from random numbers"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/phantom"), help="where simulated cases are kept")
    parser.add_argument("--train_cases", type=int, default=200, help="simulated subjects per protocol")
    parser.add_argument("--slices_per_case", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=48)
    parser.add_argument("--max_train_steps", type=int, default=8000)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--adam_beta1", type=float, default=0.9)
    parser.add_argument("--adam_beta2", type=float, default=0.95)
    parser.add_argument("--adam_weight_decay", type=float, default=0.01)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--freeze", choices=["detach", "grad", "none"], default="detach")
    parser.add_argument("--drop_text", type=float, default=0.1, help="probability of leaving the instruction out")
    parser.add_argument("--drop_vae", type=float, default=0.3, help="... a source's latents")
    parser.add_argument("--drop_vit", type=float, default=0.3, help="... a source's ViT patches")
    parser.add_argument("--drop_region", type=float, default=0.3, help="... the region's name in the instruction")
    parser.add_argument(
        "--multi_source", type=float, default=0.1, help="probability of a batch with several sources a row"
    )
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default=None, help='"latest" or a folder')
    parser.add_argument(
        "--save_dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the saved model and autoencoder"
    )
    parser.add_argument("--sampling_steps", type=int, default=None, help="saved as the pipeline's num_inference_steps")
    parser.add_argument("--guidance_scale", type=float, default=None, help="saved as the pipeline's default")
    parser.add_argument("--image_guidance_scale", type=float, default=None, help="saved as the pipeline's default")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that simulate cases")
    parser.add_argument("--logging_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def is_route(route: Route, source: str) -> bool:
    """Whether the route's target is made from this source too."""
    return route._replace(source=source) in ROUTES


class LatentPairs:
    """
    All training slices as the model reads them, encoded once: posterior of the VAE, and the ViT's grey pixels.

    `slices[route]` lists `(sources, target)` rows into the tables, where `sources` are all modalities of the same
    patient and slice that have a trained route to this target, the route's own first.
    """

    @torch.no_grad()
    def __init__(self, cases, pipe: SynerMedGenPipeline, autocast, batch_size: int = 32):
        means, stds, pixels, rows = [], [], [], {}
        processor = pipe.processor.image_processor
        for number, case in enumerate(tqdm(cases, desc="encode")):
            inputs = []
            for modality, volume in case.images.items():
                window = processor.intensity_window(volume, modality)
                for index, image in enumerate(volume):
                    rows[number, modality, index] = len(pixels) + len(inputs)
                    inputs.append(processor.preprocess_slice(image, modality, window))
            for start in range(0, len(inputs), batch_size):
                batch = torch.stack([one.vae_pixels for one in inputs[start : start + batch_size]])
                with autocast():
                    posterior = pipe.vae.encode(batch.to(pipe.vae.device)).latent_dist
                means.append(posterior.mean.half().cpu())
                stds.append(posterior.std.half().cpu())
            pixels += [one.vit_patches.view(*one.vit_patches.shape[:1], -1, 3)[..., 0].half() for one in inputs]
            self.vit_grid, self.latent_grid = inputs[0].vit_grid, pipe.latent_grid(inputs[0])
        self.means, self.stds, self.pixels = torch.cat(means), torch.cat(stds), torch.stack(pixels)
        self.shift, self.scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
        self.slices = {
            route: [
                (
                    [route.source, *(m for m in case.images if m != route.source and is_route(route, m))],
                    {m: rows[number, m, index] for m in case.images},
                )
                for number, case in enumerate(cases)
                if case.region == route.region and {route.source, route.target} <= case.images.keys()
                for index in range(len(case.mask))
            ]
            for route in ROUTES
        }

    def latents(self, row: int, patch: int, generator: torch.Generator) -> torch.Tensor:
        """One sampled latent as tokens."""
        mean, std = self.means[row].float(), self.stds[row].float()
        sample = mean + std * torch.randn(mean.shape, generator=generator)
        return patchify((sample - self.shift) * self.scale, patch)


def make_batch(pairs: LatentPairs, pipe: SynerMedGenPipeline, args, step: int, process: int) -> dict:
    """The batch of one step: a function of the seed, the step and the process alone."""
    config, processor = pipe.model.config, pipe.processor
    rng = np.random.default_rng([args.seed, step, process])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    patch = config.latent_patch_size
    rows, pixel_values, latents, timesteps, wanted = [], [], [], [], []
    # One number of sources for the whole batch: rows are padded to the longest, and a scan is 100 tokens long.
    count, routes = 1, ROUTES
    if rng.random() < args.multi_source:
        count = int(rng.integers(2, 4))
        routes = [route for route in ROUTES if len(pairs.slices[route][0][0]) >= count]
    for _ in range(args.train_batch_size):
        route = routes[rng.integers(len(routes))]
        modalities, row_of = pairs.slices[route][rng.integers(len(pairs.slices[route]))]
        sources = modalities[:1] + list(rng.permutation(modalities[1:])[: count - 1])
        blocks = []
        for source in sources:
            dropped = rng.random() < args.drop_vae
            blocks.append(ImageBlock("latent", pairs.latent_grid, dropped=dropped))
            if not dropped:
                latents.append(pairs.latents(row_of[source], patch, generator))
                timesteps.append(0.0)
            dropped = rng.random() < args.drop_vit
            blocks.append(ImageBlock("image", pairs.vit_grid, dropped=dropped))
            if not dropped:
                pixel_values.append(pairs.pixels[row_of[source]].float().repeat_interleave(3, dim=1))
        region = None if rng.random() < args.drop_region else route.region
        instruction = make_instruction(sources, route.target, region)
        blocks.append(processor.text_block(instruction, dropped=rng.random() < args.drop_text))
        blocks.append(ImageBlock("target", pairs.latent_grid))
        rows.append(build_sequence(config, blocks))
        clean = pairs.latents(row_of[route.target], patch, generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randn((), generator=generator).sigmoid().item()
        t = config.timestep_shift * t / (1 + (config.timestep_shift - 1) * t)
        latents.append((1 - t) * clean + t * noise)
        timesteps.append(t)
        wanted.append(noise - clean)
    batch = pad_sequences(config, rows)
    del batch["labels"]  # no answer is learned here
    batch |= {
        "latents": torch.cat(latents),
        "latent_grid_hw": torch.tensor([pairs.latent_grid] * len(latents)),
        "timestep": torch.tensor(timesteps),
        "velocity_labels": torch.cat(wanted),
    }
    if pixel_values:
        batch["pixel_values"] = torch.cat(pixel_values)
        batch["image_grid_hw"] = torch.tensor([pairs.vit_grid] * len(pixel_values))
    return batch


def main(args):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (args.output_dir / "log.jsonl").exists() and not args.resume_from_checkpoint:
        raise SystemExit(
            f"{args.output_dir} holds an earlier training. Continue it with --resume_from_checkpoint latest, or choose "
            "another --output_dir."
        )
    # With nothing frozen, some understanding parameters of the last layer never meet the flow loss.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.freeze == "none")],
    )
    set_seed(args.seed)
    pipe = SynerMedGenPipeline.from_pretrained(
        args.pretrained_model_name_or_path, allow_missing=args.allow_missing, print_report=False
    )
    trained_parts = {"generation"} if args.freeze != "none" else {"generation", "understanding", "vision"}
    if random := [part for part in pipe.model.config.missing_parts if part not in trained_parts]:
        raise SystemExit(
            f"{args.pretrained_model_name_or_path} came without its {' and '.join(random)} weights, which this "
            "training would leave as random numbers. Start from a complete checkpoint."
        )
    pipe.vae.requires_grad_(False)
    model = pipe.model.train()
    model.lm_head.requires_grad_(False)  # the flow loss does not reach it
    if args.freeze != "none":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) == "generation")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if accelerator.is_main_process:
        logger.info(pipe.load_report.table({"": model, "vae.": pipe.vae}))
    optimizer = torch.optim.AdamW(
        trained,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once for every process.
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    ema = EMAModel(trained, decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    step = 0
    checkpoints = sorted(args.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if args.resume_from_checkpoint and (checkpoints or args.resume_from_checkpoint != "latest"):
        folder = checkpoints[-1] if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
        accelerator.load_state(folder)
        ema.to(accelerator.device)
        step = int(folder.name.split("-")[1])
        logger.info("resumed from %s", folder)

    if step < args.max_train_steps:
        with accelerator.main_process_first():
            cases = load_phantom(
                "train", args.train_cases, args.slices_per_case, args.cache_dir, num_proc=args.num_proc
            )
        pipe.vae.to(accelerator.device)
        pairs = LatentPairs(cases, pipe, accelerator.autocast)
        logger.info("%d slices of %d simulated subjects, %d routes", len(pairs.means), len(cases), len(pairs.slices))
        del cases

    start, losses = time.monotonic(), []
    if accelerator.is_main_process:
        minutes, log = open_log(args.output_dir / "log.jsonl", step)
        start -= 60 * minutes
    progress = tqdm(total=args.max_train_steps, initial=step, desc="flow", disable=not accelerator.is_main_process)
    while step < args.max_train_steps:
        for micro in range(args.gradient_accumulation_steps):
            number = step * args.gradient_accumulation_steps + micro
            batch = make_batch(pairs, pipe, args, number, accelerator.process_index)
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            with accelerator.accumulate(model):
                loss = model(**batch, detach_understanding=args.freeze == "detach").loss
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"The loss is {loss.item()} at step {step}. Lower the learning rate.")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        ema.step(trained)
        step += 1
        progress.update()
        if step % args.logging_steps == 0 and accelerator.is_main_process:
            mean = math.fsum(losses) / len(losses)
            losses.clear()
            row = {"step": step, "loss_mse": round(mean, 5), "lr": scheduler.get_last_lr()[0]}
            row["minutes"] = round((time.monotonic() - start) / 60, 2)
            progress.set_postfix(loss=f"{mean:.4f}")
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step % args.checkpointing_steps == 0:
            accelerator.save_state(args.output_dir / f"checkpoint-{step}")
            if accelerator.is_main_process:
                prune_checkpoints(args.output_dir, args.checkpoints_total_limit)
            accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        pipe.model = accelerator.unwrap_model(model)
        ema.copy_to(trained)
        config = pipe.model.config
        config.missing_parts = [part for part in config.missing_parts if part not in trained_parts]
        config.trained_routes = [route.name for route in ROUTES]
        config.notice = NOTICE
        sampling = {
            "num_inference_steps": args.sampling_steps,
            "guidance_scale": args.guidance_scale,
            "image_guidance_scale": args.image_guidance_scale,
        }
        config.sampling |= {name: value for name, value in sampling.items() if value is not None}
        pipe.model.requires_grad_(True).eval().to(getattr(torch, args.save_dtype))
        pipe.vae.to(getattr(torch, args.save_dtype))
        pipe.save_pretrained(
            args.output_dir / "pipeline",
            card={"training_data": "Simulated patients of synermedgen_hf.data.phantom; no real scan."},
        )
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        (args.output_dir / "training_args.json").write_text(json.dumps(settings, indent=2) + "\n")
        logger.info("saved %s", args.output_dir / "pipeline")
    accelerator.end_training()


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


def prune_checkpoints(folder: Path, keep: int):
    """Keep the newest `keep` checkpoints."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for old in checkpoints[:-keep]:
        shutil.rmtree(old)


if __name__ == "__main__":
    main(parse_args())
