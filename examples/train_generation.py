"""Stage II: teach SynerMedGen to synthesise one modality from another, by flow matching in the VAE's latent space.

    accelerate launch examples/train_generation.py \\
        --pretrained_model_name_or_path runs/stage1/pipeline --data_dir /data/SynthRAD2023 --output_dir runs/stage2

    python examples/train_generation.py --config examples/recipes/generation_tiny.yaml

Arguments are those of the diffusers scripts; a recipe is a YAML file of them, and the command line has the last word.
Without `--data_dir` the data are simulated patients. Each sample is a slice of one patient: the source (VAE latents,
then ViT patches), the instruction, and the noised latents of the target, whose velocity `noise - data` is predicted.

* `--freeze detach` (default) trains the generation expert, `vae2llm`, `llm2vae` and the time embedder, with
  understanding activations detached; `grad` lets gradients pass through them; `none` trains everything but the VAE: the
  way from random weights. The pipeline is saved in the dtype of the one it started from, so that what is frozen stays
  what it was, to the bit; before it is saved, it is compared by checksum.
* `--lora_rank` trains adapters on the generation expert alone.
* Every sample is a function of the seed and its number: see [`~synermedgen_hf.data.flow_matching.PairBatches`]. Every
  target token counts the same, whatever batch, micro-batch or process it is in.
* Checkpoints appear whole or not at all. `--resume_from_checkpoint latest` continues to the same weights, on a CPU
  to the bit; on a GPU some sums have no fixed order.
"""

import argparse
import base64
import contextlib
import io
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import groupby, islice, zip_longest
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from datasets import IterableDataset, load_dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data.flow_matching import Dropout, PairBatches, PairPool, StreamedBatches, padding, phantom_rows
from synermedgen_hf.data.latents import SliceEncoder, codec_fingerprint, window_for
from synermedgen_hf.data.pairs import PAIR_FEATURES
from synermedgen_hf.data.phantom import load_phantom
from synermedgen_hf.data.released import find_released
from synermedgen_hf.data.routes import ROUTES
from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.loading_synermedgen import part_of, weights_checksum
from synermedgen_hf.model_card import make_adapter_card
from synermedgen_hf.optimization import MuonWithAdamW, configure_sharding

logger = logging.getLogger(__name__)

NOTICE = "Demonstration weights trained on simulated scans. Not for clinical use."
# Full paths: names alone would also hit the understanding expert and the ViT.
GENERATION_EXPERT = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj_moe_gen|mlp_moe_gen\.(gate|up|down)_proj)"
)
# What a checkpoint cannot be continued with other values of: samples would be repeated or left out, or what the
# checkpoint holds would overrule the value.
LASTING = (
    "freeze drop_text drop_vae drop_vit drop_region multi_source train_batch_size gradient_accumulation_steps "
    "mixed_precision learning_rate lr_scheduler lr_warmup_steps muon_learning_rate use_8bit_adam adam_beta1 adam_beta2 "
    "adam_weight_decay adam_epsilon max_grad_norm ema_decay logit_mean logit_std lora_rank lora_alpha seed streaming "
    "stream_pool"
).split()
ABOVE_ZERO = (
    "train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps checkpoints_total_limit "
    "validation_images logging_steps slice_step stream_pool lora_rank learning_rate max_grad_norm"
).split()
# What a checkpoint says of the pipeline that its training started from, in words.
WHAT = {
    "frozen": "understanding branch",
    "codec": "autoencoder, other intensity windows or other sizes",
    "adapted": "base of its adapter",
}
FLAG = {"action": argparse.BooleanOptionalAction, "default": False}  # a recipe's can be taken back, by --no-...
BANDS = (0.125, 0.375, 0.625, 0.875)  # timesteps at which the validation loss is taken


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=None, help="a recipe: a YAML file of arguments")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--pretrained_model_name_or_path", help="a pipeline folder or Hub repository")
    add("--revision", default=None, help="of the Hub repository")
    add(
        "--allow_missing", nargs="*", default=[], help="tensors, or patterns with *, that may start from random numbers"
    )
    add("--attn_implementation", default=None, help="sdpa, eager or flex_attention")
    add("--output_dir", type=Path, help="where checkpoints, logs and the trained pipeline go")
    add("--freeze", choices=["detach", "grad", "none"], default="detach", help="the understanding branch; see above")
    add("--lora_rank", type=int, default=None, help="train adapters of this rank on the generation expert")
    add("--lora_alpha", type=int, default=None, help="by default the rank")
    add("--lora_dropout", type=float, default=None, help="by default none")
    add("--merge_adapter", **FLAG, help="put the adapter into the weights and save a pipeline")

    add = add_data_arguments(parser).add_argument
    add("--streaming", **FLAG, help="read the data as it is needed")
    # Of BraTS, one patient has 1,700.
    add("--stream_pool", type=int, default=2048, help="pairs of a stream to draw from at a time, best of many patients")
    add("--latent_cache", choices=["memory", "disk", "off"], default="memory", help="where encoded slices are kept")
    add("--latent_cache_dir", type=Path, default=None, help="... on disk, for this run and later ones")
    add("--drop_text", type=float, default=0.1, help="probability of leaving the instruction out")
    add("--drop_vae", type=float, default=0.3, help="... a source's latents")
    add("--drop_vit", type=float, default=0.3, help="... a source's ViT patches")
    add("--drop_region", type=float, default=0.3, help="... the region's name in the instruction")
    add("--multi_source", type=float, default=0.1, help="probability of several sources, where there are")

    train = parser.add_argument_group("training")
    add = train.add_argument
    add("--train_batch_size", type=int, default=48, help="samples of a process at a time")
    add("--gradient_accumulation_steps", type=int, default=1, help="so many batches a step, or more and smaller ones")
    add("--max_train_steps", type=int, default=8000)
    add("--gradient_checkpointing", **FLAG)
    add("--mixed_precision", choices=["no", "bf16"], default="bf16")
    add("--learning_rate", type=float, default=1e-3)
    add("--lr_scheduler", default="cosine")
    add("--lr_warmup_steps", type=int, default=200)
    add("--muon_learning_rate", type=float, help="of Muon, for the layers' matrices; the rest by AdamW")
    add("--use_8bit_adam", **FLAG, help="moments of AdamW in 8 bits, by bitsandbytes")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.95)
    add("--adam_weight_decay", type=float, default=0.01)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_decay", type=float, default=0.999, help="of the moving average that is saved; 0 for none")
    add("--logit_mean", type=float, default=0.0, help="of the timesteps, before they are shifted")
    add("--logit_std", type=float, default=1.0)
    add("--seed", type=int, default=0)

    keep = parser.add_argument_group("checkpoints, validation, logs")
    add = keep.add_argument
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--resume_from_checkpoint", default=None, help='"latest" or a folder')
    add("--allow_changed_data", **FLAG, help="resume although the data are others than before")
    add("--validation_steps", type=int, default=0, help="synthesise held-out slices every so many steps; 0: never")
    add("--validation_images", type=int, default=8, help="... how many")
    add("--validation_protocol", default="paper_frame", help="... and how, see metrics.protocols.evaluate_case")
    add("--logging_steps", type=int, default=25)
    add("--report_to", default="none", help="tensorboard, wandb, ... beside log.jsonl")
    add("--sampling_steps", type=int, default=None, help="saved as the pipeline's num_inference_steps")
    add("--guidance_scale", type=float, default=None, help="saved as the pipeline's default")
    add("--image_guidance_scale", type=float, default=None, help="saved as the pipeline's default")
    add("--push_to_hub", **FLAG)
    add("--hub_model_id", default=None, help="by default the name of the output folder")

    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args(argv)
    args = parser.parse_args([*read_recipe(known.config), *argv])
    for name in ("pretrained_model_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is required")
    check_above_zero(parser, args, ABOVE_ZERO)
    if args.latent_cache == "disk" and args.latent_cache_dir is None:
        parser.error("--latent_cache disk needs --latent_cache_dir")
    if args.latent_cache == "off" and args.latent_cache_dir is not None:
        parser.error("--latent_cache off keeps nothing: leave out --latent_cache_dir")
    if args.validation_steps < 0:
        parser.error(f"--validation_steps must be 0 (never) or more, got {args.validation_steps}")
    for name in ("lora_alpha", "lora_dropout", "merge_adapter"):
        if getattr(args, name) and not args.lora_rank:
            parser.error(f"--{name} is of an adapter: it needs --lora_rank")
    if args.lora_rank and args.freeze == "none":
        parser.error("--lora_rank trains adapters on the generation expert alone: choose --freeze detach or grad")
    return args


def add_data_arguments(parser: argparse.ArgumentParser):
    """What [`load_pairs`] reads, as a group of arguments."""
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset_name", default="synermed", help='"synermed", or a Hub dataset with its columns')
    add("--dataset_config_name", default="pairs")
    add("--data_dir", default=None, help="folder of scans, see load_dataset('synermed')")
    add("--routes", nargs="+", default=None, help="only these, such as MRI-CT or brain/MRI-CT")
    add("--slice_step", type=int, default=1, help="every so many slices of a case")
    add("--phantom_cases", type=int, nargs=3, default=None, help="simulated volumes: training, validation, test")
    add("--cache_dir", type=Path, default=Path("runs/phantom"), help="where simulated slices are kept")
    add("--train_cases", type=int, default=200, help="simulated patients per protocol, without --data_dir")
    add("--slices_per_case", type=int, default=8)
    add("--num_proc", type=int, default=2, help="processes that simulate or read cases")
    return data


def check_above_zero(parser: argparse.ArgumentParser, args, names: Iterable[str]):
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be above 0, got {value}")


def read_recipe(path: Path | None) -> list[str]:
    """A YAML file of arguments as a command line."""
    arguments = []
    # As strings: otherwise YAML takes the words "off" and "no", which are values of arguments, for false.
    for name, value in ((yaml.load(path.read_text(), yaml.BaseLoader) if path else None) or {}).items():
        if value in ("", "~", "null"):
            continue
        flag = {"true": f"--{name}", "false": f"--no-{name}"}.get(str(value).lower())
        arguments += [flag] if flag else [f"--{name}", *(value if isinstance(value, list) else [value])]
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def is_simulated(args) -> bool:
    return args.dataset_name == "synermed" and args.data_dir is None


def check_data(args):
    """Raise for arguments that would do nothing with these data."""
    if args.phantom_cases and not is_simulated(args):
        raise SystemExit("--phantom_cases are simulated, and --data_dir and --dataset_name are other data: choose one.")
    if args.dataset_name != "synermed" and (args.routes or args.slice_step > 1):
        raise SystemExit(
            f"--routes and --slice_step choose among scans, and {args.dataset_name} is made of pairs already: leave "
            "them out, or pass --slice_step 1 where a recipe has another."
        )
    made = is_simulated(args) and not args.phantom_cases
    if args.slice_step > 1 and (made or (args.data_dir and find_released(args.data_dir))):
        raise SystemExit("--slice_step is for scans, and these slices are chosen already: pass --slice_step 1.")


def load_pairs(args, split: str, streaming: bool, cases: int):
    """One split of the pairs: a data set, or an iterator over rows of `cases` simulated patients per protocol."""
    # A simulated patient is seen by more scanners at once than any real one.
    routes = args.routes or ([route.name for route in ROUTES] if is_simulated(args) else None)
    if is_simulated(args) and not args.phantom_cases:
        made = load_phantom(split, cases, args.slices_per_case, args.cache_dir, num_proc=args.num_proc)
        return phantom_rows(made, routes)
    options = {"data_dir": args.data_dir} if args.data_dir else {}
    if args.dataset_name == "synermed":
        options |= {"phantom_cases": args.phantom_cases or 0, "routes": routes, "slice_step": args.slice_step}
    how = {"streaming": True} if streaming else {"num_proc": args.num_proc}
    return load_dataset(args.dataset_name, args.dataset_config_name, split=split, **how, **options)


def make_batches(args, pipe, encoder: SliceEncoder, accelerator: Accelerator):
    """The training batches, every slice encoded where that is wanted."""
    process, processes = accelerator.process_index, accelerator.num_processes
    common = {
        "processor": pipe.processor,
        "config": pipe.model.config,
        "batch_size": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "dropout": Dropout(args.drop_text, args.drop_vae, args.drop_vit, args.drop_region, args.multi_source),
        "logit_mean": args.logit_mean,
        "logit_std": args.logit_std,
    }
    with accelerator.main_process_first():
        rows = load_pairs(args, "train", args.streaming, args.train_cases)
    if args.streaming:
        # On average every pair of a pool is drawn once.
        steps = max(1, args.stream_pool // (args.train_batch_size * args.gradient_accumulation_steps))
        return StreamedBatches(
            rows,
            partial(PairPool, encoder=encoder, keep=args.latent_cache == "memory"),
            lambda pool, seed: PairBatches(pool, seed=seed, **common),
            args.stream_pool,
            steps,
            process,
            processes,
            args.seed,
        )
    pool = PairPool(rows, encoder, keep=args.latent_cache == "memory")
    if args.latent_cache != "off":
        pool.encode_all(process, processes, progress=accelerator.is_main_process)
        accelerator.wait_for_everyone()
    where = {"process": process, "processes": processes}
    return PairBatches(pool, seed=[args.seed], **where, **common)


def describe(args, pool: PairPool):
    """Say what there is to train on, and what there is not."""
    logger.info("%d slices, %d pairs of %d routes", len(pool.stored), len(pool), len(pool.pairs))
    for route, pairs in pool.pairs.items():
        logger.info("  %-24s %6d", route.name, len(pairs))
    names = {route.name for route in pool.pairs}
    for wanted in args.routes or []:
        if not any(name == wanted or name.split("/")[1] == wanted for name in names):
            so_far = "among the first pairs of the stream" if args.streaming else "and it will not be learned"
            logger.warning("There is no pair of the route %s, %s.", wanted, so_far)
    if pool.unnamed:
        logger.warning("%d rows do not name source and target and are left out.", pool.unnamed)


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


class Validation:
    """
    Fixed pairs of held-out patients, synthesised with fixed seeds: figures under a protocol, beside those of copying
    the source and of the autoencoder alone; the loss at four timesteps; a contact sheet.
    """

    def __init__(self, args, pipe, encoder: SliceEncoder):
        # The extra `metrics` is asked for here, before anything is trained.
        from synermedgen_hf.metrics import baselines, protocols, report

        self.args, self.pipe, self.codec = args, pipe, pipe.processor.image_processor
        self.baselines, self.evaluate_case, self.draw_strip = baselines, protocols.evaluate_case, report.draw_strip
        try:
            files = self.choose(load_pairs(args, "validation", True, math.ceil(args.validation_images / 4)))
        except ValueError as error:
            if "split" not in str(error):
                raise
            raise SystemExit(f"There are no held-out patients: pass --validation_steps 0. ({error})") from error
        if not files:
            raise SystemExit("No held-out patient has a pair of these routes: pass --validation_steps 0.")
        self.rows = [PAIR_FEATURES.decode_example(row) for row in files]
        batches = PairBatches(
            PairPool(files, encoder), pipe.processor, pipe.model.config, len(files), dropout=Dropout(0, 0, 0, 0, 0)
        )
        samples = [batches.draw(number) for number in range(len(files))]
        self.banded = {t: batches.collate([replace(one, timestep=t) for one in samples]) for t in BANDS}
        self.beside = {}
        for name, baseline in (
            ("copy", baselines.CopySource(self.codec)),
            ("ceiling", baselines.Ceiling(pipe.vae, self.codec)),
        ):
            made = [baseline([row], [args.seed])[0] for row in self.rows]
            self.beside |= {f"{name}/{metric}": value for metric, value in self.judge(made)[0].items()}

    def choose(self, rows) -> list[dict]:
        """Of the first few cases the middle slice of every route, the routes by turns."""
        if isinstance(rows, IterableDataset):
            for column in ("source_image", "target_image", "mask", "lesion"):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        by_route: dict[str, list[dict]] = {}
        for _, case in islice(
            groupby(rows, key=lambda row: (row["dataset"], row["case_id"])), self.args.validation_images
        ):
            own: dict[str, list[dict]] = {}
            for row in case:
                if row["source_modality"] and row["target_modality"]:
                    own.setdefault(self.baselines.route_of(row), []).append(row)
            for route, slices in own.items():
                by_route.setdefault(route, []).append(slices[len(slices) // 2])
        turns = zip_longest(*by_route.values())
        return [row for turn in turns for row in turn if row is not None][: self.args.validation_images]

    def judge(self, made: list[np.ndarray]) -> tuple[dict[str, float], list[dict]]:
        """Mean of every metric over the targets of each modality, and the record of every slice."""
        records, values = [], {}
        for row, one in zip(self.rows, made, strict=True):
            modality = row["target_modality"]
            window = self.codec.target_record(modality)
            record = self.evaluate_case(
                one,
                self.baselines.true_target(self.codec, row),
                mask=None if row["mask"] is None else np.asarray(row["mask"], bool),
                protocol=self.args.validation_protocol,
                modality=modality,
                spacing=tuple(row["spacing"][1:]) if all(row["spacing"]) else None,  # released pairs do not say it
                window=(window["low"], window["high"]) if "percentile" in self.codec.intensity[modality] else None,
            )
            for metric, value in record["metrics"].items():
                if value is not None:
                    values.setdefault(f"{modality}/{metric}", []).append(value)
            records.append({"route": self.baselines.route_of(row), **record})
        return {metric: float(np.mean(several)) for metric, several in values.items()}, records

    @torch.no_grad()
    def run(self, step: int, device) -> dict[str, float]:
        """Judge the pipeline as it is, write `validation/STEP.png` and `.json`, and return all figures."""
        pipe = self.pipe
        pipe.model.eval()
        pipe.set_progress_bar_config(disable=True)
        made = []
        for row in self.rows:
            made += pipe(
                row["source_image"],
                target=row["target_modality"],
                source=row["source_modality"],
                region=row["region"] or None,
                window=window_for(self.codec, row["source_modality"], row["source_window"]),
                seed=self.args.seed,
                output_type="np",
            ).images
        means, records = self.judge(made)
        figures = dict(means)
        for timestep, batch in self.banded.items():
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            figures[f"loss_mse/t={timestep}"] = pipe.model(**batch).loss_mse.item()
        pipe.model.train()
        if PartialState().is_main_process:  # sharded, all of them look
            folder = self.args.output_dir / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            self.draw(made).save(folder / f"{step}.png")
            record = {"step": step, **figures, "beside": self.beside, "slices": records}
            write_whole(folder / f"{step}.json", json.dumps(record, indent=2) + "\n")
        return figures | self.beside

    def draw(self, made: list[np.ndarray]) -> Image.Image:
        """Source, synthesis, truth and difference of every slice."""
        strips = []
        for row, one in zip(self.rows, made, strict=True):
            strip = self.draw_strip(row, one, self.baselines.true_target(self.codec, row), self.codec)
            strip = Image.open(io.BytesIO(base64.b64decode(strip)))
            ImageDraw.Draw(strip).text((4, 4), self.baselines.route_of(row), fill=255)
            strips.append(strip)
        sheet = Image.new("L", (strips[0].width, sum(strip.height for strip in strips)))
        for place, strip in enumerate(strips):
            sheet.paste(strip, (0, place * strip.height))
        return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first. One that is being written, or being deleted, has another name."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_to_resume(args, lasting: Iterable[str] = ()) -> Path | None:
    """
    The checkpoint that `--resume_from_checkpoint` means, `None` for the beginning.

    Args:
        args: Of the script.
        lasting (`Iterable[str]`): Names of the arguments that have to be what they were.

    Raises:
        `SystemExit`: Not asked to go on, and the folder holds a training; there is no such checkpoint, or there are
            later ones, which would come to be taken for this run's; an argument was another one before.
    """
    known = checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None:
        names = ("log.jsonl", "pipeline", "adapter_model.safetensors")
        if known or any((args.output_dir / name).exists() for name in names):
            raise SystemExit(
                f"{args.output_dir} holds an earlier training. Continue it with --resume_from_checkpoint latest, or "
                "choose another --output_dir."
            )
        return None
    if args.resume_from_checkpoint == "latest":
        folder = (known or [None])[-1]
    else:
        folder = Path(args.resume_from_checkpoint)
    if folder is None:
        return None
    if not (state := folder / "training_state_0.json").is_file():
        raise SystemExit(f"There is no checkpoint {folder}.")
    state = json.loads(state.read_text())
    if later := [path.name for path in known if int(path.name.removeprefix("checkpoint-")) > state["step"]]:
        raise SystemExit(
            f"{args.output_dir} holds later checkpoints than {folder}: {', '.join(later)}. To go on from the earlier "
            "one, delete them, or choose another --output_dir."
        )
    before, now = state.get("settings", {}), lasting_settings(args, lasting)
    changed = [f"--{name} {before[name]} (now {now[name]})" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise SystemExit(f"{folder} was trained with {', '.join(changed)}: it cannot be continued with another value.")
    return folder


def lasting_settings(args, lasting: Iterable[str]) -> dict:
    return {name: getattr(args, name) for name in lasting}


def discard(folder: Path):
    """Delete a folder that must never be seen half deleted."""
    if folder.exists():
        leaving = folder.with_name(f"{folder.name}.discarded")
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving)


def clear_leftovers(output_dir: Path):
    """Delete what a killed run was about to write or to delete."""
    for ending in ("unfinished", "discarded"):
        for folder in output_dir.glob(f"*.{ending}"):
            shutil.rmtree(folder)


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict, ema: EMAModel | None, keep: int):
    """
    Weights, optimizer, schedule and random states by accelerate; moving average and our own state beside them. The
    folder gets its name when everything is in it, then the oldest go.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if accelerator.is_main_process:
        discard(unfinished)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    if ema is not None:
        averages = gather(accelerator, {str(number): one for number, one in enumerate(ema.shadow_params)})
        state = state | {"ema_steps": ema.optimization_step}
        if accelerator.is_main_process:
            save_file(averages, unfinished / "ema.safetensors")
    write_whole(unfinished / f"training_state_{accelerator.process_index}.json", json.dumps(state) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        discard(folder)
        unfinished.rename(folder)
        for old in checkpoints(folder.parent)[:-keep]:
            discard(old)
    accelerator.wait_for_everyone()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded over processes, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors put together one after the other, which takes every process; only the main one keeps them."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if accelerator.is_main_process:
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def load_checkpoint(accelerator: Accelerator, folder: Path, ema: EMAModel | None) -> dict:
    """The state that [`save_checkpoint`] was given."""
    states = list(folder.glob("training_state_*.json"))
    if len(states) != accelerator.num_processes:
        raise SystemExit(
            f"{folder} was written by {len(states)} processes and cannot be continued by {accelerator.num_processes}."
        )
    # What is frozen is not in a checkpoint.
    accelerator.load_state(folder, strict=False)
    state = json.loads((folder / f"training_state_{accelerator.process_index}.json").read_text())
    if ema is not None:
        averages = load_file(folder / "ema.safetensors")
        for number, shadow in enumerate(ema.shadow_params):
            average = averages[str(number)].to(shadow.device)
            if isinstance(shadow, DTensor):
                average = distribute_tensor(average, shadow.device_mesh, shadow.placements)
            shadow.copy_(average)
        ema.optimization_step = state["ema_steps"]
    return state


def leave_out_frozen(models, weights, folder):
    """Frozen weights come from where they came from, and need not be in every checkpoint."""
    for model, state in zip(models, weights, strict=True):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name in frozen & state.keys():
            del state[name]


def open_log(path: Path, step: int):
    """
    The log, ready to go on after `step`, and the minutes trained until there. Rows beyond `step` are dropped: an
    interrupted run may have logged more than it saved, the last row but half.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [row for row in rows if row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    minutes = [row["minutes"] for row in rows if "minutes" in row]
    return minutes[-1] if minutes else 0, path.open("a")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(args, model) -> torch.optim.Optimizer:
    rates = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.muon_learning_rate is not None:
        return MuonWithAdamW(model.named_parameters(), muon_lr=args.muon_learning_rate, **rates)
    kind = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], **rates)


def check(args):
    """Raise for what cannot be used, before anything is loaded."""
    checkpoint_to_resume(args, LASTING)
    check_data(args)
    installed = [tracker.value for tracker in get_available_trackers()]
    if args.report_to not in ("none", "all", *installed):
        there = ", ".join(["none", *installed])
        raise SystemExit(f"--report_to {args.report_to} is not installed; there is {there}.")
    if args.use_8bit_adam and args.muon_learning_rate is not None:
        raise SystemExit("--use_8bit_adam and --muon_learning_rate are two optimizers: choose one.")
    if args.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise SystemExit("--use_8bit_adam needs bitsandbytes: pip install 'synermedgen-hf[quantization]'")
    if args.streaming and is_simulated(args) and not args.phantom_cases:
        raise SystemExit("--streaming needs --data_dir, --phantom_cases or --dataset_name.")


def stop_at_nan(args, accelerator, step: int, batches, batch_list, losses):
    """
    Keep the batches that gave no number and raise, in every process: the norm of the gradients, which all share, has
    told them all. Where the losses are finite everywhere, the gradients have overflowed, and any batch may be to blame.
    """
    bad = [not torch.isfinite(loss) for loss in losses]
    overflown = not any(gather_object([any(bad)]))
    cases = set()
    for number, samples in enumerate(batch_list):
        if not bad[number] and not overflown:
            continue
        names = sorted({f"{sample.pair.case} ({sample.route})" for sample in samples})
        cases |= set(names)
        path = args.output_dir / f"nan-step-{step}-process-{accelerator.process_index}-{number}.safetensors"
        save_file(batches.collate(samples), path, {"cases": json.dumps(names)})
    accelerator.wait_for_everyone()  # whoever ends first makes the launcher kill the others
    what = "gradient" if overflown else "loss"
    mine = f"Batches of this process are kept in {args.output_dir}; their cases: {', '.join(sorted(cases))}."
    raise FloatingPointError(
        f"The {what} of step {step} is not a number. {mine if cases else 'The losses of this process are finite.'} "
        "Nothing was changed by this step; the last checkpoint is whole. Look at these cases, or lower the learning "
        "rate."
    )


def main(args):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check(args)
    # With nothing frozen, some understanding parameters of the last layer never meet the flow loss.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / "logs"),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=args.freeze == "none"),
            # All others wait while the first one makes the data set, validates and saves.
            InitProcessGroupKwargs(timeout=timedelta(days=7)),
        ],
    )
    is_main, is_sharded = accelerator.is_main_process, accelerator.distributed_type == DistributedType.FSDP
    if is_sharded and (args.muon_learning_rate is not None or args.use_8bit_adam):
        name = "--use_8bit_adam" if args.use_8bit_adam else "--muon_learning_rate"
        raise SystemExit(f"{name} needs whole matrices, and FSDP shares them out: use AdamW.")
    if is_sharded and args.freeze == "none":
        raise SystemExit(
            "--freeze none cannot be shared out by FSDP: where a batch drops all pictures the ViT has no gradient, and "
            "processes would wait for each other. Use --freeze detach or grad, or DDP."
        )
    if is_sharded:
        configure_sharding(accelerator)
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    if args.push_to_hub and is_main:  # now, and not after days, is when a missing login should show
        create_repo(repository_of(args), exist_ok=True)

    # 1. The model, every tensor accounted for.
    set_seed(args.seed)
    pipe = load_start(args)
    model, config, stored_dtype = pipe.model, pipe.model.config, pipe.model.dtype
    trained_parts = {"generation"} if args.freeze != "none" else {"generation", "understanding", "vision"}
    if random := [part for part in config.missing_parts if part not in trained_parts or args.lora_rank]:
        raise SystemExit(
            f"{args.pretrained_model_name_or_path} came without its {' and '.join(random)} weights, which this "
            "training would leave as random numbers. Start from a complete checkpoint."
        )
    pipe.vae.requires_grad_(False).to(accelerator.device)
    # The flow loss does not reach lm_head.
    frozen = [name for name in model.state_dict() if part_of(name) not in trained_parts or name.startswith("lm_head")]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and not args.lora_rank)
    before = weights_checksum(model, frozen)
    start = {"frozen": before, "codec": codec_fingerprint(pipe.vae, pipe.processor.image_processor)}
    start |= {"adapted": weights_checksum(model)} if args.lora_rank else {}
    # Under adapters all is frozen, and half precision will do; they themselves are float32 all the same.
    half = args.lora_rank and args.mixed_precision == "bf16"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
    if args.lora_rank:
        from peft import LoraConfig, PeftModel, get_peft_model

        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha or args.lora_rank,
            lora_dropout=args.lora_dropout or 0.0,
            target_modules=GENERATION_EXPERT,
        )
        model = get_peft_model(model, lora)
    if args.gradient_checkpointing:
        pipe.model.activation_checkpointing_enable()
    model.train()
    if is_main:
        logger.info(pipe.load_report.table({"": model, "vae.": pipe.vae}))
    config.missing_parts = [part for part in config.missing_parts if part not in trained_parts]
    sampling = {
        "num_inference_steps": args.sampling_steps,
        "guidance_scale": args.guidance_scale,
        "image_guidance_scale": args.image_guidance_scale,
    }
    config.sampling |= {name: value for name, value in sampling.items() if value is not None}
    old_routes, config.trained_routes = config.trained_routes, []  # unchecked while they are being learned

    # 2. Optimizer and schedule.
    if not is_sharded:
        accelerator.register_save_state_pre_hook(leave_out_frozen)
    optimizer = make_optimizer(args, model)
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        # accelerate advances the schedule once for every process.
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = None
    if args.ema_decay:
        ema = EMAModel(trained, decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        ema.to(accelerator.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    step, state = 0, {}
    if (folder := checkpoint_to_resume(args, LASTING)) is not None:
        state = load_checkpoint(accelerator, folder, ema)
        step = state["step"]
        if changed := [WHAT[name] for name, value in start.items() if state.get(name, value) != value]:
            raise SystemExit(
                f"{folder} was trained with another {' and another '.join(changed)} than that of "
                f"{args.pretrained_model_name_or_path}."
            )
        logger.info("resumed from %s", folder)
    routes = state.get("routes", [])

    # 3. The data.
    batches = validation = None
    if step < args.max_train_steps:
        encoder = SliceEncoder(pipe.vae, pipe.processor.image_processor, args.mixed_precision, args.latent_cache_dir)
        if args.validation_steps and (is_main or is_sharded):
            validation = Validation(args, pipe, encoder)
        batches = make_batches(args, pipe, encoder, accelerator)
        if state:
            batches.load_state_dict(state["batches"])
            said = f"The data are not those that {folder} was trained on"
            if state["batches"]["data"] != batches.fingerprint:
                if not args.allow_changed_data:
                    raise SystemExit(f"{said}. Bring them back, or go on with --allow_changed_data.")
                logger.warning("%s; the training goes on with these.", said)
        batches.step(step)
        describe(args, batches.pool)

    # 4. Train.
    accelerator.gradient_accumulation_steps = passes = batches.passes if batches else 1
    total_samples = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    logger.info("%d samples in a step", total_samples)
    if args.report_to != "none":
        accelerator.init_trackers("synermedgen-generation", {name: str(value) for name, value in vars(args).items()})
    seconds, log = 0.0, None
    if is_main:
        clear_leftovers(args.output_dir)
        minutes, log = open_log(args.output_dir / "log.jsonl", step)
        seconds = 60 * minutes
    # Since the last row of the log: squared error, target tokens, slots with a token, slots.
    sums = torch.tensor(state.get("sums", [0.0] * 4), device=accelerator.device)
    progress = tqdm(total=args.max_train_steps, initial=step, desc="flow", disable=not is_main)
    while step < args.max_train_steps:
        begin = time.monotonic()
        micro_batches = batches.step(step)
        counts = [sum(sample.target_tokens for sample in samples) for samples in micro_batches]
        tokens = accelerator.reduce(torch.tensor(float(sum(counts)), device=accelerator.device)).item()
        losses = []
        for samples, count in zip(micro_batches, counts, strict=True):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batches.collate(samples).items()}
            with accelerator.accumulate(model):
                loss = model(**batch, detach_understanding=args.freeze == "detach").loss
                losses.append(loss.detach())
                # backward() divides by the number of micro-batches, and processes are averaged: here every token of the
                # step counts the same.
                share = count / tokens * accelerator.num_processes * passes
                accelerator.backward(loss * share)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    if not torch.isfinite(whole(norm)):
                        stop_at_nan(args, accelerator, step, batches, micro_batches, losses)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if ema is not None:
            ema.step(trained)
        step += 1
        progress.update()
        for samples, count, loss in zip(micro_batches, counts, losses, strict=True):
            used, slots = padding(samples)
            sums += torch.stack([loss.float() * count, *torch.tensor([count, used, slots], device=loss.device)])
        # Of steps alone, as train_baseline.py counts: a baseline may take as long, and validates nothing.
        seconds += time.monotonic() - begin
        routes = list(dict.fromkeys([*routes, *(route.name for route in batches.pool.pairs)]))
        if step % args.logging_steps == 0:
            error, count, used, slots = accelerator.reduce(sums).tolist()
            sums = torch.zeros_like(sums)
            row = {"step": step, "loss_mse": round(error / count, 5), "lr": scheduler.get_last_lr()[0]}
            row |= {"grad_norm": round(float(whole(norm)), 4), "padding": round(1 - used / slots, 4)}
            row["minutes"] = round(seconds / 60, 2)
            progress.set_postfix(loss=f"{row['loss_mse']:.4f}", padding=f"{row['padding']:.1%}")
            write_log(accelerator, log, row)
        if validation is not None and step % args.validation_steps == 0:
            with averaged(ema, trained), root_gathered(model):
                figures = validation.run(step, accelerator.device)
            write_log(accelerator, log, {"step": step, **{f"validation/{name}": one for name, one in figures.items()}})
        if args.validation_steps and step % args.validation_steps == 0:
            accelerator.wait_for_everyone()
        if step % args.checkpointing_steps == 0:
            state = {"step": step, **start, "routes": routes, "sums": sums.tolist()}
            state |= {"batches": batches.state_dict(), "settings": lasting_settings(args, LASTING)}
            folder = args.output_dir / f"checkpoint-{step}"
            save_checkpoint(accelerator, folder, state, ema, args.checkpoints_total_limit)

    # 5. What was frozen is what it was; the rest is saved.
    if ema is not None:
        ema.copy_to(trained)
    routes = gather_object(routes)  # of a stream every process knows its own
    model = accelerator.unwrap_model(model)
    if args.lora_rank:
        adapter = gather(accelerator, {name: one for name, one in model.named_parameters() if one.requires_grad})
        if is_main:
            save_adapter(args, model, adapter)
        if is_main and args.merge_adapter:
            # Into the weights as they are stored, not as they were rounded for this training.
            model = PeftModel.from_pretrained(load_start(args).model, args.output_dir).merge_and_unload()
            model.config = config
    elif is_sharded:
        weights = accelerator.get_state_dict(model)
        if is_main:
            model = type(pipe.model)(config)
            model.load_state_dict(weights)
    if is_main and (not args.lora_rank or args.merge_adapter):
        pipe.model = model.requires_grad_(True).eval().to("cpu", stored_dtype)
        if before != weights_checksum(pipe.model, frozen):
            raise RuntimeError("The frozen weights have changed, which must never be. Nothing was saved.")
        if args.freeze != "none":
            logger.info("The understanding branch is untouched: checksum %s", before)
        save_pipeline(args, pipe, [*old_routes, *routes])
    accelerator.wait_for_everyone()
    accelerator.end_training()


def load_start(args) -> SynerMedGenPipeline:
    """What the training starts from, every tensor accounted for; the model in the dtype in which it is stored."""
    options = {"revision": args.revision, "attn_implementation": args.attn_implementation}
    return SynerMedGenPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        dtype={"model": "auto", "vae": torch.float32},
        allow_missing=args.allow_missing,
        print_report=False,
        **{name: value for name, value in options.items() if value is not None},
    )


@contextlib.contextmanager
def averaged(ema: EMAModel | None, parameters):
    """The moving average in the place of the weights."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


@contextlib.contextmanager
def root_gathered(model):
    """
    Under FSDP, what is outside of the layers put together for synthesis, which may call parts of a model or the base of
    an adapter, and shared out again afterwards: the next training step would see the average's weights.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for root in sharded[:1]:
        root.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def write_log(accelerator: Accelerator, log, row: dict):
    """A row of the log and of the trackers."""
    if log is not None:
        log.write(json.dumps(row) + "\n")
        log.flush()
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def repository_of(args) -> str:
    return args.hub_model_id or args.output_dir.resolve().name


def seen(args) -> str:
    """What is trained on, for a card; of a folder, its name alone."""
    simulated = "simulated patients of synermedgen_hf.data.phantom; no real scan"
    source = simulated if is_simulated(args) else Path(args.data_dir or args.dataset_name).name
    return f"Stage II ({args.max_train_steps} steps) on {source}."


def save_adapter(args, model, weights: dict[str, torch.Tensor]):
    """The adapter in PEFT's format with its card; it is published where no pipeline will be."""
    model.save_pretrained(args.output_dir, state_dict=weights)
    make_adapter_card(repository_of(args), args.pretrained_model_name_or_path, seen(args)).save(
        args.output_dir / "README.md"
    )
    logger.info("saved the adapter in %s", args.output_dir)
    if args.push_to_hub and not args.merge_adapter:
        repo_id = create_repo(repository_of(args), exist_ok=True).repo_id
        upload_folder(repo_id=repo_id, folder_path=args.output_dir, allow_patterns=["README.md", "adapter_*"])


def save_pipeline(args, pipe, routes: list[str]):
    """The trained model with everything around it, and the arguments."""
    config = pipe.model.config
    config.trained_routes = list(dict.fromkeys(routes))
    if is_simulated(args):
        config.notice = NOTICE
    pipe.vae.to("cpu")
    card = {"training_data": seen(args)}
    pipe.save_pretrained(args.output_dir / "pipeline", card=card)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_whole(args.output_dir / "training_args.json", json.dumps(settings, indent=2) + "\n")
    logger.info("saved %s", args.output_dir / "pipeline")
    if args.push_to_hub:
        pipe.push_to_hub(repository_of(args), card=card)


if __name__ == "__main__":
    main(parse_args())
