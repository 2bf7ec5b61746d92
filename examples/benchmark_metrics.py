"""Speed and memory of the metrics, as ratios to scikit-image measured in one run.

    python examples/benchmark_metrics.py --output benchmark_metrics.json

* `ssim`: SSIM of a pair of volumes (by default 256 x 256 x 128, uniform window of 7) and `ssim_gaussian`, the same with
  Wang's Gaussian window: seconds of both libraries, their ratio, and by how much the numbers differ.
* `memory`: what one SSIM allocates at its peak, in volumes of float64.
* `case`: one whole `evaluate_case` in the masked protocol of SynthRAD2023, against scikit-image's SSIM alone.

Runs of one comparison take turns and their medians are compared, so that the machine's mood falls on both sides.
Seconds belong to one machine; ratios travel.
"""

import argparse
import json
import platform
import tracemalloc
from pathlib import Path

import numpy as np
from benchmark_timing import medians
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from synermedgen_hf import metrics

RANGE = 4024.0  # HU
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="where to write the figures as JSON")
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 256, 256], help="slices, rows, columns")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def make_pair(shape) -> tuple[np.ndarray, np.ndarray]:
    """A smooth volume in [0, 4024] with air around it, and the same with 80 HU of noise."""
    rng = np.random.default_rng(0)
    reference = gaussian_filter(rng.standard_normal(shape), 3)
    reference = np.clip(1064 + 600 * reference / reference.std(), 0, RANGE)
    reference[:, : shape[1] // 8] = reference[:, -shape[1] // 8 :] = 0
    return np.clip(reference + rng.normal(0, 80, shape), 0, RANGE), reference


def compare_ssim(args, kernel: str, **options) -> dict:
    prediction, reference = make_pair(args.shape)
    found = {}

    def ours():
        found["ours"] = metrics.ssim(prediction, reference, RANGE, kernel=kernel)

    def theirs():
        found["theirs"] = structural_similarity(prediction, reference, data_range=RANGE, **options)

    seconds = medians(args.repeats, ours=ours, scikit_image=theirs)
    return {
        "seconds": seconds,
        "times_faster": seconds["scikit_image"] / seconds["ours"],
        "ssim": found["ours"],
        "difference": abs(found["ours"] - found["theirs"]),
    }


def compare_memory(args) -> dict:
    prediction, reference = make_pair(args.shape)
    work = {
        "ours": lambda: metrics.ssim(prediction, reference, RANGE),
        "scikit_image": lambda: structural_similarity(prediction, reference, data_range=RANGE),
    }
    peaks = {}
    for name, run in work.items():
        tracemalloc.start()
        run()
        peaks[name] = tracemalloc.get_traced_memory()[1] / reference.nbytes
        tracemalloc.stop()
    return {"volumes": peaks, "times_less": peaks["scikit_image"] / peaks["ours"]}


def compare_case(args) -> dict:
    prediction, reference = (volume.astype(np.float32) - 1024 for volume in make_pair(args.shape))
    mask = reference > -1024
    seconds = medians(
        args.repeats,
        evaluate_case=lambda: metrics.evaluate_case(prediction, reference, mask),
        scikit_image_ssim=lambda: structural_similarity(
            prediction.astype(np.float64), reference.astype(np.float64), data_range=RANGE
        ),
    )
    return {"seconds": seconds, "share": seconds["evaluate_case"] / seconds["scikit_image_ssim"]}


def main(args):
    figures = {
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "shape": args.shape,
        "ssim": compare_ssim(args, "uniform"),
        "ssim_gaussian": compare_ssim(args, "gaussian", **WANG),
        "memory": compare_memory(args),
        "case": compare_case(args),
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
