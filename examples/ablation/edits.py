"""A toy base that knows general edits: pictures of shapes and textures, what is done to them, and a caption of it.

    python examples/ablation/edits.py --base runs/tiny-base --output_dir runs/ablation/edits

BAGEL, which SynerMedGen starts from, has learned to edit pictures of everything before it sees a scan. This stands in
for it: no scan, no anatomy, no name of a modality. The pairs go through `examples/train_generation.py` as any data set
does; its instruction is the caption. `OUTPUT_DIR/pipeline` is the base with a generation expert that has learned them.

What is not general: autoencoder and eyes are the base's own, and have seen simulated scans.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm.auto import tqdm

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data.pairs import PAIR_FEATURES, encode_slice
from synermedgen_hf.data.splits import write_whole

sys.path.append(str(Path(__file__).parents[1]))
import train_generation  # noqa: E402

# Names that choose a codec, grey levels over a given window, and that no caption holds.
SOURCE, TARGET = "T1", "T2"
WINDOW = {"unit": "grey level", "low": 0.0, "high": 255.0}

# What is taken over from the recipe of Stage II.
TRAINING = (
    *("freeze", "drop_text", "drop_vae", "drop_vit", "train_batch_size", "gradient_accumulation_steps"),
    *("mixed_precision", "learning_rate", "muon_learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1"),
    *("adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "ema_decay", "logit_mean", "logit_std"),
    *("checkpointing_steps", "logging_steps", "sampling_steps", "guidance_scale", "image_guidance_scale"),
)

# Caption to what is done to a picture in [0, 1].
EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Blur the picture.": lambda a: ndimage.gaussian_filter(a, 3),
    "Blur the picture a little.": lambda a: ndimage.gaussian_filter(a, 1.2),
    "Sharpen the picture.": lambda a: 2 * a - ndimage.gaussian_filter(a, 2),
    "Swap dark and bright.": lambda a: 1 - a,
    "Raise the contrast.": lambda a: 0.5 + 1.8 * (a - 0.5),
    "Lower the contrast.": lambda a: 0.5 + 0.4 * (a - 0.5),
    "Make the picture brighter.": lambda a: a**0.5,
    "Make the picture darker.": lambda a: a**2,
    "Make bright parts white and dark parts black.": lambda a: (a > 0.5).astype(float),
    "Keep three levels of grey.": lambda a: np.round(a * 2) / 2,
    "Show the edges alone.": lambda a: 2.5 * ndimage.gaussian_gradient_magnitude(a, 1),
    "Make bright parts thicker.": lambda a: ndimage.grey_dilation(a, 7),
    "Make bright parts thinner.": lambda a: ndimage.grey_erosion(a, 7),
    "Remove the texture.": lambda a: ndimage.median_filter(a, 9),
    "Keep the texture alone.": lambda a: 0.5 + 1.5 * (a - ndimage.gaussian_filter(a, 4)),
    "Mirror the picture.": lambda a: a[:, ::-1],
    "Turn the picture upside down.": lambda a: a[::-1],
    "Turn the picture to the left.": lambda a: np.rot90(a),
    "Move the picture to the right.": lambda a: np.roll(a, a.shape[1] // 4, 1),
    "Make everything in the picture smaller.": lambda a: _shrink(a),
    "Darken the left half.": lambda a: a * np.where(np.arange(a.shape[1]) < a.shape[1] // 2, 0.4, 1),
    "Leave the picture as it is.": lambda a: a,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--output_dir", type=Path, required=True)
    add("--pictures", type=int, default=4000)
    add("--size", type=int, default=128, help="pixels of a side")
    add("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "generation_tiny.yaml")
    add("--max_train_steps", type=int, required=True)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _shrink(picture: np.ndarray) -> np.ndarray:
    side = picture.shape[0]
    small = ndimage.zoom(picture, 0.5, order=1, grid_mode=True, mode="nearest")
    return np.pad(small, [((side - n) // 2, side - n - (side - n) // 2) for n in small.shape])


def draw_picture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two to six shapes of one grey each on a ground, each with a texture or without, `(size, size)` in [0, 1]."""
    rows, columns = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]

    def texture() -> np.ndarray:
        kind, angle, period = rng.integers(4), rng.uniform(0, np.pi), rng.uniform(0.06, 0.25)
        along = rows * np.sin(angle) + columns * np.cos(angle)
        across = columns * np.sin(angle) - rows * np.cos(angle)
        stripes, others = (np.sin(2 * np.pi * place / period) for place in (along, across))
        noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), rng.uniform(0.7, 4))
        return (np.zeros_like(rows), stripes, np.sign(stripes * others), noise / noise.std())[kind]

    picture = rng.uniform(0, 1) + rng.uniform(0, 0.15) * texture() + rng.uniform(-0.3, 0.3) * rows
    for _ in range(rng.integers(2, 7)):
        mask = Image.new("L", (size, size))
        pen, (x, y), radius = ImageDraw.Draw(mask), rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0.08, 0.3) * size
        kind, flat = rng.integers(4), rng.uniform(0.4, 1) * radius
        if kind == 0:
            pen.ellipse([x - radius, y - flat, x + radius, y + flat], fill=255)
        elif kind == 1:
            pen.rectangle([x - radius, y - flat, x + radius, y + flat], fill=255)
        elif kind == 2:
            pen.ellipse([x - radius, y - flat, x + radius, y + flat], outline=255, width=max(2, int(radius / 5)))
        else:
            turns = rng.uniform(0, 2 * np.pi) + np.arange(3) * 2 * np.pi / 3
            pen.polygon([(x + radius * np.cos(t), y + radius * np.sin(t)) for t in turns], fill=255)
        cover = ndimage.gaussian_filter(np.asarray(mask, float) / 255, 0.6)
        picture = picture * (1 - cover) + cover * (rng.uniform(0, 1) + rng.uniform(0, 0.2) * texture())
    return np.clip(picture, 0, 1)


def edit_rows(pictures: int, size: int, seed: int) -> Iterator[dict]:
    """Rows of [`PAIR_FEATURES`], the edits by turns; a row is a function of the seed and its number."""
    captions = list(EDITS)
    for number in tqdm(range(pictures), desc="pictures"):
        caption = captions[number % len(captions)]
        before = draw_picture(np.random.default_rng([seed, number]), size)
        after = np.clip(EDITS[caption](before), 0, 1)
        name = f"picture-{number:06d}"
        yield {
            "source_image": encode_slice(255 * before),
            "target_image": encode_slice(255 * after),
            "source_modality": SOURCE,
            "target_modality": TARGET,
            "region": "",
            "axis": "",
            "slice_index": -1,  # no row is the neighbour of another
            "spacing": [1.0, 1.0, 1.0],
            "dataset": "general edits",
            "case_id": name,
            "patient_id": name,
            "centre": "",
            "mask": None,
            "lesion": None,
            "source_window": WINDOW,
            "target_window": WINDOW,
            "instruction": caption,
        }


def main(args):
    training = args.output_dir / "training"
    pictures = args.output_dir / f"pictures-{args.pictures}-{args.size}-{args.seed}"
    if not pictures.exists():
        rows = Dataset.from_list(list(edit_rows(args.pictures, args.size, args.seed)), features=PAIR_FEATURES)
        unfinished = pictures.with_name(f"{pictures.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(unfinished / "train.parquet")
        unfinished.rename(pictures)

    # Of the recipe, what does not speak of data. A caption stands as it is: it names no region, and has one source.
    recipe = yaml.load(args.recipe.read_text(encoding="utf-8"), yaml.BaseLoader)  # "no" is a word, as it is there
    recipe = {name: value for name, value in recipe.items() if name in TRAINING}
    recipe |= {"pretrained_model_name_or_path": str(args.base), "output_dir": str(training)}
    recipe |= {"dataset_name": str(pictures), "dataset_config_name": "default", "drop_region": 0, "multi_source": 0}
    recipe |= {"max_train_steps": args.max_train_steps, "seed": args.seed}
    write_whole(args.output_dir / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    options = ["--config", args.output_dir / "recipe.yaml", "--resume_from_checkpoint", "latest"]
    train_generation.main(train_generation.parse_args(list(map(str, options))))

    # The edits are no routes: asked for one, the base must answer as well as it can instead of refusing.
    pipe = SynerMedGenPipeline.from_pretrained(training / "pipeline", dtype="float32", print_report=False)
    pipe.model.config.trained_routes = []
    pipe.save_pretrained(args.output_dir / "pipeline")
    print(f"Saved {args.output_dir / 'pipeline'}")


if __name__ == "__main__":
    main(parse_args())
