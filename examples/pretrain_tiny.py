"""Give the toy what a base model brings along: eyes that tell slices apart, and the habit of comparing pictures.

    python examples/pretrain_tiny.py --pretrained_model_name_or_path runs/tiny-init --output_dir runs/tiny-base

BAGEL starts from SigLIP2's eyes and Qwen2.5's text. The toy starts from random numbers, and the understanding tasks
alone do not take it from there: what is right depends on two images at once, and no single one of them gives a hint.
Two short trainings on simulated patients stand in for a base.

1. ViT and connector, by contrast and by name: of many slices, which two show the same place in two modalities (InfoNCE
   over the mean token of an image, as CLIP does between image and text), and which modality is each? Contrast alone
   would make all modalities look the same.
2. The understanding expert, by comparing: one slice, then eight more, and after each of them `yes` or `no`.

Stage I, `examples/train_understanding.py`, goes on from here.
"""

import argparse
import json
import math
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data.phantom import PHANTOM_VERSION
from synermedgen_hf.data.routes import MODALITIES
from synermedgen_hf.data.synermed import load_phantom_case, phantom_records
from synermedgen_hf.image_processing_synermedgen import to_display
from synermedgen_hf.loading_synermedgen import part_of
from synermedgen_hf.optimization import MuonWithAdamW
from synermedgen_hf.processing_synermedgen import ImageBlock, build_sequence, pad_sequences

SLICES = 8  # of a volume in a batch of contrast
CANDIDATES = 8
GAP_MM = 4.0  # between slices that are told apart, as in CTS


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="what examples/init_tiny.py made")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/phantom"), help="where simulated volumes are kept")
    parser.add_argument("--train_cases", type=int, default=60, help="simulated subjects per protocol")
    parser.add_argument("--contrast_steps", type=int, default=1500)
    parser.add_argument("--contrast_volumes", type=int, default=24, help=f"a step, {SLICES} slices of each")
    parser.add_argument("--compare_steps", type=int, default=600)
    parser.add_argument("--compare_batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--muon_learning_rate", type=float, default=0.02, help="of the ViT's matrices, for contrast")
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--num_proc", type=int, default=2, help="processes that simulate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def display_volume(job) -> dict[str, np.ndarray]:
    """All modalities of one simulated patient as 8-bit pictures, made once and kept on disk."""
    record, cache_dir = job
    path = cache_dir / f"v{PHANTOM_VERSION}" / f"display-{record.dataset}-{record.case_id}.safetensors"
    if not path.exists():
        case = load_phantom_case(record, None, 128)
        pictures = {
            modality: np.stack([np.asarray(to_display(image, case.windows[modality])) for image in volume[case.usable]])
            for modality, volume in case.images.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(pictures | {"between_mm": np.array([case.spacing[0]])}, unfinished)
        unfinished.replace(path)
    return load_file(path)


class Slices:
    """
    Slices of simulated patients as the ViT reads them: `patches[row]`, `modality[row]` as a number, and where each
    volume's rows begin.
    """

    def __init__(self, split: str, args, processor):
        jobs = [(record, args.cache_dir) for record in phantom_records(split, args.train_cases)]
        patches, modality, self.volumes, rows = [], [], [], 0
        with get_context("spawn").Pool(args.num_proc) as pool:
            for volume in tqdm(pool.imap(display_volume, jobs), total=len(jobs), desc="simulate"):
                gap = max(1, math.ceil(GAP_MM / volume.pop("between_mm").item() - 1e-6))
                count = len(next(iter(volume.values())))
                if count < SLICES * gap:
                    continue
                first = {}
                for name, pictures in volume.items():
                    batch = [Image.fromarray(picture) for picture in pictures]
                    inputs = processor.image_processor.preprocess(batch, window=(0.0, 255.0), return_tensors="pt")
                    # Grey: one of the three channels says it all.
                    patches.append(
                        inputs["pixel_values"].unflatten(1, (-1, 3))[..., 0].half().unflatten(0, (count, -1))
                    )
                    modality += [MODALITIES.index(name)] * count
                    first[name], rows = rows, rows + count
                self.volumes.append((first, count, gap))
        self.patches, self.modality = torch.cat(patches), torch.tensor(modality)
        side = math.isqrt(self.patches.shape[1])
        self.grid = (side, side)

    def pair(self, rng) -> tuple[int, int, int, int]:
        """First rows of two modalities of one volume, its slices, and how many of them make a gap."""
        first, count, gap = self.volumes[rng.integers(len(self.volumes))]
        one, other = rng.choice(list(first.values()), 2, replace=False)
        return one, other, count, gap

    def pixels(self, rows) -> dict[str, torch.Tensor]:
        values = self.patches[torch.as_tensor(np.asarray(rows))].float()
        return {
            "pixel_values": values.flatten(0, 1).repeat_interleave(3, 1),
            "image_grid_hw": torch.tensor([self.grid] * len(values)),
        }


def contrast_rows(slices: Slices, volumes: int, rng) -> np.ndarray:
    """Rows `(2, volumes * SLICES)`: the same places in two modalities. Half of the volumes give a stretch of slices."""
    chosen = []
    for _ in range(volumes):
        one, other, count, gap = slices.pair(rng)
        places = np.arange(rng.integers(gap), count, gap)
        if rng.random() < 0.5 and len(places) > SLICES:
            start = rng.integers(len(places) - SLICES)
            places = places[start : start + SLICES]
        else:
            places = rng.permutation(places)[:SLICES]
        chosen.append([one + places, other + places])
    return np.concatenate(chosen, axis=1)


def contrast_loss(model, namer, slices: Slices, rows: np.ndarray, temperature: torch.Tensor) -> torch.Tensor:
    """InfoNCE in both directions, and the cross entropy of the modality's name."""
    rows = rows.reshape(-1)
    tokens = model.get_image_features(**slices.pixels(rows)).pooler_output
    image = torch.stack(tokens).float().mean(1)
    # What differs between modalities has a little room of its own: elsewhere, the same place looks the same in all.
    room = image.shape[1] // 8
    one, other = normalize(image[:, room:], dim=-1).chunk(2)
    scores = temperature.exp() * one @ other.T
    same = torch.arange(len(scores))
    place = (cross_entropy(scores, same) + cross_entropy(scores.T, same)) / 2
    return place + cross_entropy(namer(image[:, :room]), slices.modality[torch.as_tensor(rows)])


def compare_batch(model, processor, slices: Slices, count: int, rng) -> dict[str, torch.Tensor]:
    """A slice, then candidates of another modality (sometimes of the same), each followed by `yes` or `no`."""
    sequences, shown = [], []
    answers = [processor.text_block(word, learned=True) for word in ("no", "yes")]
    while len(sequences) < count:
        one, other, number, gap = slices.pair(rng)
        other = one if rng.random() < 0.3 else other
        place = rng.integers(number)
        apart = [wrong for wrong in range(number) if abs(wrong - place) >= gap]
        if rng.random() < 0.5:  # neighbours
            apart = sorted(apart, key=lambda wrong: abs(wrong - place))[:8]
        blocks = [processor.text_block("1"), ImageBlock("image", slices.grid)]
        shown.append(one + place)
        for right in rng.random(CANDIDATES) < 0.5:
            blocks += [ImageBlock("image", slices.grid), answers[int(right)]]
            shown.append(other + (place if right else rng.choice(apart)))
        sequences.append(build_sequence(model.config, blocks))
    return pad_sequences(model.config, sequences) | slices.pixels(shown)


def train(name: str, loss_of, parameters, args, steps: int, muon_lr: float | None, log: list):
    """`steps` of one of the two trainings."""
    if muon_lr is None:
        optimizer = torch.optim.AdamW([p for _, p in parameters], lr=args.learning_rate, betas=(0.9, 0.98))
    else:
        optimizer = MuonWithAdamW(parameters, lr=args.learning_rate, muon_lr=muon_lr, betas=(0.9, 0.95))
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, steps)
    progress = tqdm(range(steps), desc=name)
    for step in progress:
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of {name} is {loss.item()} at step {step}. Lower the learning rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.append({"training": name, "step": step + 1, "loss": round(loss.item(), 4)})
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main(args):
    if (args.output_dir / "model_index.json").exists():
        raise SystemExit(f"{args.output_dir} holds a pipeline already: choose another --output_dir.")
    set_seed(args.seed)
    pipe = SynerMedGenPipeline.from_pretrained(args.pretrained_model_name_or_path, print_report=False)
    model, processor = pipe.model.train(), pipe.processor
    model.set_attn_implementation("eager")  # faster than sdpa for short rows on a CPU
    slices = Slices("train", args, processor)
    log: list[dict] = []

    def rng(step, stage):
        return np.random.default_rng([args.seed, stage, step])

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def contrast(step):
        rows = contrast_rows(slices, args.contrast_volumes, rng(step, 1))
        with autocast():
            return contrast_loss(model, namer, slices, rows, temperature)

    def compare(step):
        batch = compare_batch(model, processor, slices, args.compare_batch_size, rng(step, 2))
        with autocast():
            return model(**batch).loss

    temperature = torch.nn.Parameter(torch.tensor(2.3))  # of CLIP: 1 / 0.1, as a logarithm
    namer = torch.nn.Linear(model.config.text_config.hidden_size // 8, len(MODALITIES))  # not kept
    eyes = [(name, p) for name, p in model.named_parameters() if part_of(name) == "vision"]
    half_way = args.output_dir / "eyes.safetensors"
    if half_way.exists():  # of an interrupted run
        model.load_state_dict(load_tensors(half_way), strict=False)
    else:
        trained = [*eyes, ("temperature", temperature), *namer.named_parameters()]
        train("contrast", contrast, trained, args, args.contrast_steps, args.muon_learning_rate, log)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        save_tensors({name: parameter.data for name, parameter in eyes}, half_way)

    # What the eyes have learned stays: until comparing works, its gradients would be noise.
    model.requires_grad_(False)
    mind = [(name, p) for name, p in model.named_parameters() if part_of(name) == "understanding"]
    for _, parameter in mind:
        parameter.requires_grad_(True)
    train("compare", compare, mind, args, args.compare_steps, None, log)

    pipe.model = model.requires_grad_(True).eval()
    pipe.save_pretrained(args.output_dir)
    half_way.unlink()
    (args.output_dir / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    print(f"Saved {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
