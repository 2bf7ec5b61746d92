"""SSIM of every route on held-out simulated patients, beside copying the source and beside the autoencoder's ceiling.

    python examples/evaluate_routes.py --output runs/tiny/evaluation.json

SSIM is scikit-image's (7x7 uniform window) over the whole frame on the codec's scale, times 100, mean over slices.
"copy" takes the source's picture as the answer; "ceiling" is the true target through the autoencoder and back, which no
generator behind this autoencoder can beat by much. Subjects are those of the phantom's test split.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from synermedgen_hf import ROUTES, SynerMedGenPipeline, checkpoint_path, metrics
from synermedgen_hf.data.phantom import load_phantom


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder or repository; the bundled weights by default")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation.json"))
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--cases", type=int, default=8, help="subjects per protocol")
    parser.add_argument("--slices_per_case", type=int, default=3)
    parser.add_argument("--num_inference_steps", type=int, default=None)
    parser.add_argument("--guidance_scale", type=float, default=None)
    parser.add_argument("--image_guidance_scale", type=float, default=None)
    parser.add_argument("--timestep_shift", type=float, default=None)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/phantom"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def ssim(made: np.ndarray, wanted: np.ndarray) -> float:
    return 100 * metrics.ssim(made, wanted, data_range=2.0)


@torch.no_grad()
def main(args):
    pipe = SynerMedGenPipeline.from_pretrained(args.model or checkpoint_path())
    pipe.set_progress_bar_config(disable=True)
    codec = pipe.processor.image_processor
    cases = load_phantom(args.split, args.cases, args.slices_per_case, args.cache_dir)
    options = {
        name: getattr(args, name)
        for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale", "timestep_shift")
    }
    rows = []
    for route in tqdm(ROUTES, desc="routes"):
        mine = [
            case for case in cases if case.region == route.region and {route.source, route.target} <= case.images.keys()
        ]
        sources, windows, pictures, wanted = [], [], [], []
        for case in mine:
            window = codec.intensity_window(case.images[route.source], route.source)
            target_window = codec.intensity_window(case.images[route.target], route.target)
            for source, target in zip(case.images[route.source], case.images[route.target], strict=True):
                sources.append(source)
                windows.append(window)
                pictures.append(codec.encode_intensity(source, route.source, window)[0])
                wanted.append(codec.encode_intensity(target, route.target, target_window)[0])
        record = codec.target_record(route.target)
        made = pipe(
            sources,
            target=route.target,
            source=route.source,
            region=route.region,
            seed=args.seed,
            window=windows,
            output_type="np",
            **options,
        ).images
        made = [codec.encode_intensity(one, route.target, (record["low"], record["high"]))[0] for one in made]
        ceiling = [codec.decode_intensity(one, record) for one in wanted]
        inputs = [codec.preprocess_slice(one, route.target, (record["low"], record["high"])) for one in ceiling]
        latents = pipe.vae.encode(torch.stack([one.vae_pixels for one in inputs])).latent_dist.mean
        decoded = pipe.vae.decode(latents).sample
        through = [
            codec.encode_intensity(
                codec.postprocess_slice(pixels, record, one.geometry), route.target, (record["low"], record["high"])
            )[0]
            for pixels, one in zip(decoded, inputs, strict=True)
        ]
        rows.append(
            {
                "route": route.name,
                "slices": len(wanted),
                "ssim": float(np.mean([ssim(a, b) for a, b in zip(made, wanted, strict=True)])),
                "copy": float(np.mean([ssim(a, b) for a, b in zip(pictures, wanted, strict=True)])),
                "ceiling": float(np.mean([ssim(a, b) for a, b in zip(through, wanted, strict=True)])),
            }
        )
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("ssim", "copy", "ceiling")}
    better = sum(row["ssim"] > row["copy"] for row in rows)
    result = {
        "protocol": "ssim x100, scikit-image 7x7 uniform, whole frame, codec scale, mean over slices",
        "subjects": f"{args.cases} simulated subjects per protocol, {args.split} split, {args.slices_per_case} slices",
        "sampling": {**pipe.model.config.sampling, **{k: v for k, v in options.items() if v is not None}},
        "mean": mean,
        "routes_above_copy": better,
        "routes": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n| {'route':20} | SSIM | copy the source | VAE ceiling |\n|{'-' * 22}|---|---|---|")
    for row in [*rows, {"route": "mean", **mean}]:
        print(f"| {row['route']:20} | {row['ssim']:.1f} | {row['copy']:.1f} | {row['ceiling']:.1f} |")
    print(f"\n{better} of {len(rows)} routes above copying the source")


if __name__ == "__main__":
    main(parse_args())
