"""Does it pay to spread a scan over the VAE's three channels? Two small autoencoders, one for each codec, say it.

    python examples/compare_codecs.py --output_dir runs/codecs

Both have one architecture, start from one seed, and take the same number of steps on the same simulated slices, cut
into tiles; only what the three channels hold differs. Then true targets of other simulated patients go through each,
and the error in HU and SUV is what no generator behind that autoencoder can undo. CT is also told by tissue, since the
bands are narrow where contrast is low. `--as_it_is` measures the bundled autoencoder with both codecs too: bands are
something that it has never seen.

A comparison counts as far as both are trained: look at the figures of twice the steps before believing those of one.
With 600 steps of 4 tiles (`--train_batch_size 4`, three minutes of one core) neither codec wins: bands lose a third
less in soft tissue (CT 22 against 33 HU, CBCT 28 against 40) and 40 to 50 % more in air and lung, so that the body
comes out even and the frame a little worse; so does PET. Plain windows therefore stay the default.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from train_vae import encode_slices, train
from train_vae import parse_args as parse_training_args

from synermedgen_hf import SynerMedGenImageProcessor, checkpoint_path
from synermedgen_hf.data.phantom import PhantomCase, load_phantom
from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.image_processing_synermedgen import CODECS, set_codec
from synermedgen_hf.metrics.ceiling import vae_ceiling

# HU or SUV, by the true value of a pixel of the body.
RANGES = {
    "CT": {"air, lung": (-1025, -200), "fat": (-200, -30), "soft": (-30, 80), "dense": (80, 250), "bone": (250, 4000)},
    "PET": {"low": (0, 1), "organs": (1, 2.5), "active": (2.5, 5), "hot": (5, 1000)},
}
RANGES["CBCT"] = RANGES["CT"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/phantom"), help="where simulated cases are kept")
    parser.add_argument("--train_cases", type=int, default=12, help="simulated subjects per protocol")
    parser.add_argument("--test_cases", type=int, default=2)
    parser.add_argument("--slices_per_case", type=int, default=8)
    parser.add_argument("--tile", type=int, default=64, help="side of a tile in pixels")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[16, 24, 32])
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--as_it_is", action="store_true", help="measure the bundled autoencoder with both codecs too")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def tiles(cases: list[PhantomCase], side: int) -> list[PhantomCase]:
    """The four corners of every slice of CT, CBCT and PET, as cases of their own; the mask is cut with them."""
    cut = []
    for case in cases:
        images = {name: volume for name, volume in case.images.items() if name in RANGES}
        height, width = case.mask.shape[1:]
        for top in {0, max(0, height - side)} if images else ():
            for left in {0, max(0, width - side)}:
                place = (slice(None), slice(top, top + side), slice(left, left + side))
                corner = {name: volume[place] for name, volume in images.items()}
                cut.append(replace(case, images=corner, mask=case.mask[place], lesion=case.lesion[place]))
    return cut


def make_image_processor(side: int, codec: str) -> SynerMedGenImageProcessor:
    """The bundled checkpoint's windows with the codec, at the size of a tile."""
    bundled = SynerMedGenImageProcessor.from_pretrained(checkpoint_path(), subfolder="processor")
    size = {**bundled.vae_size, "max_size": side, "min_size": side}
    return SynerMedGenImageProcessor(
        **{**bundled.to_dict(), "vae_size": size, "intensity": set_codec(bundled.intensity, codec)}
    )


def measure(vae: AutoencoderKL, image_processor: SynerMedGenImageProcessor, cases: list[PhantomCase]) -> dict:
    """For every modality the mean absolute error over frame, body and ranges, and the RMSE in the body; pooled."""
    pixels: dict[str, list] = {}
    for case in cases:
        for modality, wanted in case.images.items():
            made = vae_ceiling(vae, image_processor, wanted, modality, batch_size=32)
            pixels.setdefault(modality, []).append((made.ravel(), wanted.ravel(), case.mask.ravel()))
    figures = {}
    for modality, found in pixels.items():
        made, wanted, body = (np.concatenate(part) for part in zip(*found, strict=True))
        error = np.abs(made.astype(np.float64) - wanted)
        own = {"MAE frame": error.mean(), "MAE body": error[body].mean()}
        own["RMSE body"] = np.sqrt((error[body] ** 2).mean())
        for name, (low, high) in RANGES[modality].items():
            inside = body & (wanted >= low) & (wanted < high)
            own[f"MAE {name}"] = error[inside].mean() if inside.any() else np.nan
        figures[modality] = {name: None if np.isnan(value) else float(value) for name, value in own.items()}
    return figures


def table(results: dict[str, dict]) -> str:
    """One line for each figure, one column for each autoencoder."""
    lines = [f"| error | {' | '.join(results)} |", "|---" * (1 + len(results)) + "|"]
    first = next(iter(results.values()))
    for modality, own in first.items():
        unit = "SUV" if modality == "PET" else "HU"
        for name in own:
            values = [results[column][modality][name] for column in results]
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            lines.append(f"| {modality}, {name} ({unit}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args):
    if (args.output_dir / "comparison.json").exists():
        raise SystemExit(f"{args.output_dir} holds a comparison already. Choose another --output_dir.")
    options = {"num_slices": args.slices_per_case, "cache_dir": args.cache_dir}
    training = tiles(load_phantom("train", args.train_cases, **options), args.tile)
    held_out = load_phantom("test", args.test_cases, **options)
    results = {}
    if args.as_it_is:
        vae = AutoencoderKL.from_pretrained(checkpoint_path(), subfolder="vae").eval()
        whole = [case for case in held_out if case.images.keys() & RANGES.keys()]
        whole = [replace(case, images={k: v for k, v in case.images.items() if k in RANGES}) for case in whole]
        for codec in CODECS:
            image_processor = make_image_processor(128, codec)
            results[f"bundled, {codec}"] = measure(vae, image_processor, whole)
    held_out = tiles(held_out, args.tile)
    for codec in CODECS:
        image_processor = make_image_processor(args.tile, codec)
        data = encode_slices(training, image_processor)
        settings = ["--output_dir", args.output_dir / codec, "--codec", codec, "--resolution", args.tile]
        settings += ["--block_out_channels", *args.block_out_channels, "--latent_channels", args.latent_channels]
        settings += ["--train_batch_size", args.train_batch_size, "--max_train_steps", args.max_train_steps]
        settings += ["--checkpointing_steps", args.max_train_steps, "--mixed_precision", "no", "--seed", args.seed]
        settings += ["--resume_from_checkpoint", "latest"]  # a codec that is trained already is not trained again
        args_of_training = parse_training_args([str(one) for one in settings])
        vae = train(args_of_training, data, image_processor, Accelerator(mixed_precision="no"))
        results[codec] = measure(vae.cpu(), image_processor, held_out)
    told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_whole(
        args.output_dir / "comparison.json", json.dumps({"arguments": told, "results": results}, indent=2) + "\n"
    )
    print(table(results))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")  # the codecs are told apart by fractions of a HU
    main(parse_args())
