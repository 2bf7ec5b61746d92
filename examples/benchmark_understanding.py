"""Speed and memory of Stage I, each measured here and now.

    python examples/benchmark_understanding.py

Questions on simulated patients, asked of the bundled weights; memory with a wider model of random weights.
Runs of one comparison take turns. Seconds belong to one machine; ratios travel.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark_timing import medians
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor
from transformers.trainer_pt_utils import get_length_grouped_indices

from synermedgen_hf import SynerMedGenConfig, SynerMedGenForConditionalGeneration, checkpoint_path
from synermedgen_hf.data.collating import QuestionCollator, check_question
from synermedgen_hf.loading_synermedgen import part_of

HERE = Path(__file__).parent


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder or repository; the bundled weights by default")
    parser.add_argument("--patients", type=int, default=2, help="simulated patients of each protocol")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=12, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    return parser.parse_args(argv)


def for_stage_one(model):
    """The generation expert frozen, as `train_understanding.py` does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) != "generation")
    return model.train()


def step(model, batch):
    model(**batch).loss.backward()
    model.zero_grad()


def length_grouping(args, model, processor, rows):
    """Batches of rows in random order, and of rows of about one length, from the same rows."""
    collate = QuestionCollator(processor, model.config)
    lengths = [check_question(processor, model.config, row, 1 << 20) for row in rows]
    orders = {
        "random": torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist(),
        "grouped": get_length_grouped_indices(lengths, args.batch_size, generator=torch.Generator().manual_seed(0)),
    }
    batches, padding = {}, {}
    for name, order in orders.items():
        starts = range(0, len(order) - args.batch_size + 1, args.batch_size)
        masks = [[lengths[place] for place in order[start : start + args.batch_size]] for start in starts]
        padding[name] = 1 - sum(map(sum, masks)) / sum(max(one) * len(one) for one in masks)
        # Evenly from the whole epoch, since grouped batches are long or short.
        chosen = list(starts)[:: max(1, len(starts) // args.batches)][: args.batches]
        batches[name] = [collate([rows[place] for place in order[start:][: args.batch_size]]) for start in chosen]
    seconds = medians(
        args.repeats,
        **{name: lambda own=own: [step(model, batch) for batch in own] for name, own in batches.items()},
    )
    rate = {name: len(batches[name]) * args.batch_size / seconds[name] for name in batches}
    for name in orders:
        print(f"{name:>8} batches of {args.batch_size}: padding {padding[name]:.1%}, {rate[name]:.1f} samples/s")
    print(f"length grouping: {rate['grouped'] / rate['random']:.2f} times the samples a second")


def encoding(args, model, processor, rows):
    """A batch of questions on one patient, its repeated pictures encoded once and each time."""
    case = [row for row in rows if row["task"] == "CTS"]
    case = [row for row in case if row["case_id"] == case[0]["case_id"]][: 2 * args.batch_size]
    once = QuestionCollator(processor, model.config)(case)
    index = once["image_index"]
    images = once["pixel_values"].split(once["image_grid_hw"].prod(1).tolist())
    each = {
        **{name: value for name, value in once.items() if name != "image_index"},
        "pixel_values": torch.cat([images[number] for number in index]),
        "image_grid_hw": once["image_grid_hw"][index],
    }
    features = medians(
        4 * args.repeats,
        once=lambda: model.get_image_features(once["pixel_values"], once["image_grid_hw"], index),
        each=lambda: model.get_image_features(each["pixel_values"], each["image_grid_hw"]),
    )
    with torch.no_grad():
        apart = (model(**once).loss - model(**each).loss).abs().item()
    print(
        f"{len(case)} CTS questions on one patient show {len(images)} pictures at {len(index)} places: encoding once "
        f"takes {features['once'] / features['each']:.2f} of encoding each (losses differ by {apart:.0e})"
    )


MEMORY = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import benchmark_understanding as benchmark
model = benchmark.wide_model()
if sys.argv[2] == "checkpointed":
    model.activation_checkpointing_enable()
batch = benchmark.long_batch(model.config)
benchmark.step(model, batch)
with open("/proc/self/status") as status:
    print(1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


def wide_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 152064 // 8}
    config = SynerMedGenConfig(
        text_config={**sizes, "num_attention_heads": 8, "num_key_value_heads": 2},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        latent_token_id=6,
        target_token_id=7,
        vision_config={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 980,
            "patch_size": 14,
            "vision_use_head": False,
        },
    )
    return for_stage_one(SynerMedGenForConditionalGeneration(config))


def long_batch(config, images: int = 5, side: int = 17):
    """One CTS row with five images of 17 x 17 patches."""
    block = [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]
    ids = torch.tensor([block * images + [config.bos_token_id, *range(20, 60), config.eos_token_id]])
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(images * side**2, 14 * 14 * 3),
        "image_grid_hw": torch.full((images, 2), side),
    }


def memory(args, *_):
    """Peak of a step in a process of its own, weights and their gradients included."""
    peaks = {}
    for name in ("plain", "checkpointed"):
        command = [sys.executable, "-c", MEMORY, str(HERE), name]
        peaks[name] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    ratio = peaks["checkpointed"] / peaks["plain"]
    print(
        f"peak memory of a step with gradient checkpointing: {ratio:.2f} of the one without "
        f"({peaks['checkpointed'] / 1e6:.0f} and {peaks['plain'] / 1e6:.0f} MB, weights and gradients included)"
    )


def first_step(args, model, processor, rows):
    """From the command to the first step that is logged, the questions being cached."""
    command = [sys.executable, str(HERE / "train_understanding.py"), "--max_steps", "1", "--report_to", "none"]
    command += ["--model_name_or_path", str(args.model or checkpoint_path()), "--max_length", "4096"]
    command += ["--phantom_cases", str(args.patients), "0", "0", "--per_device_train_batch_size", str(args.batch_size)]
    command += ["--save_strategy", "no", "--bf16", "False", "--use_cpu", str(not torch.cuda.is_available())]
    command += ["--logging_steps", "1", "--disable_tqdm", "True"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    for _ in range(2):  # the first run fills the cache
        with tempfile.TemporaryDirectory() as folder:
            start, seconds = time.perf_counter(), None
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            with subprocess.Popen([*command, "--output_dir", folder], env=environment, **how) as process:
                for line in process.stdout:
                    if seconds is None and "'loss'" in line:
                        seconds = time.perf_counter() - start
            if process.returncode or seconds is None:
                raise RuntimeError("The training did not come to its first step.")
    imports = [sys.executable, "-c", "import trl, synermedgen_hf; from trl import SFTTrainer"]
    start = time.perf_counter()
    subprocess.run(imports, check=True)
    imported = time.perf_counter() - start
    print(f"to the end of the first step: {seconds:.1f} s, of which imports {imported:.1f} s")


PARTS = {"grouping": length_grouping, "encoding": encoding, "memory": memory, "first_step": first_step}


def main(args):
    source = args.model or checkpoint_path()
    model = for_stage_one(AutoModel.from_pretrained(source, print_report=False))
    processor = AutoProcessor.from_pretrained(source)
    rows = load_dataset("synermed", "understanding", split="train", phantom_cases=[args.patients, 0, 0])
    rows = list(rows)
    for part in args.only:
        PARTS[part](args, model, processor, rows)


if __name__ == "__main__":
    main(parse_args())
