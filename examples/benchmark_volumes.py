"""Speed and memory of whole scans: ratios measured in one run.

    python examples/benchmark_volumes.py

* Slices per second of a volume against the same slices one by one.
* A simulated volume of 256x256x128 voxels with the bundled weights: seconds, and the share of reading and writing.
* Peak memory of a process for 512 slices against 64.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import zoom

from synermedgen_hf import (
    SynerMedGenPipeline,
    Volume,
    checkpoint_path,
    read_volume,
    synthesize_volume,
    write_synthesis,
    write_volume,
)
from synermedgen_hf.data.phantom import simulate_volume

ROUTE = {"target": "CT", "source": "MRI", "region": "brain", "progress": False}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(256, 256, 128), help="voxels of the volume")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--slices", type=int, default=16, help="for the ratio to single slices")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory_slices", type=int, nargs=2, default=(64, 512))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_volume(size) -> Volume:
    """A simulated head of any size."""
    case = simulate_volume("brain", "synthrad", 7, 64, 16)
    slices = case.images["MRI"].transpose(2, 1, 0)
    array = zoom(slices, np.divide(size, slices.shape), order=1).astype(np.float32)
    spacing = (180 / size[0], 220 / size[1], 150 / size[2])
    return Volume(array, np.diag([*spacing, 1.0]))


def load_pipe() -> SynerMedGenPipeline:
    return SynerMedGenPipeline.from_pretrained(checkpoint_path(), print_report=False)


def against_single_slices(pipe, args) -> float:
    """Median of slices per second of a volume over those of single slices, the two taken in turns."""
    volume = make_volume((args.size[0], args.size[1], args.slices))
    ratios = []
    for _ in range(args.repetitions):
        start = time.perf_counter()
        synthesize_volume(pipe, volume, batch_size=args.batch_size, **ROUTE)
        together = time.perf_counter() - start
        start = time.perf_counter()
        synthesize_volume(pipe, volume, batch_size=1, **ROUTE)
        ratios.append((time.perf_counter() - start) / together)
    return statistics.median(ratios)


def whole_scan(pipe, args) -> dict[str, float]:
    """Seconds of reading, synthesis and writing."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_volume(make_volume(args.size), Path(folder) / "mr.nii.gz")
        marks = [time.perf_counter()]
        volume = read_volume(path)
        marks.append(time.perf_counter())
        made = synthesize_volume(pipe, volume, batch_size=args.batch_size, **ROUTE)
        marks.append(time.perf_counter())
        write_synthesis(made, Path(folder) / "ct.nii.gz")
        marks.append(time.perf_counter())
    read, synthesis, write = np.diff(marks)
    return {
        "seconds": marks[-1] - marks[0],
        "slices": len(made.record["seeds"]) * (made.record["slices"] - len(made.record["slices_without_body"])),
        "share_of_files": (read + write) / (marks[-1] - marks[0]),
        "synthesis": synthesis,
    }


def peak_memory(slices: int) -> int:
    """Peak of a process of its own, in bytes, less what its volumes take: input, result, body."""
    command = [sys.executable, __file__, "--child", str(slices)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def child(slices: int):
    volume = make_volume((64, 64, slices))
    synthesize_volume(load_pipe(), volume, num_inference_steps=1, **ROUTE)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def main(args):
    if args.child:
        return child(args.child)
    pipe = load_pipe()
    synthesize_volume(pipe, make_volume((64, 64, 2)), **ROUTE)  # warm
    print(f"a volume against single slices: {against_single_slices(pipe, args):.2f} times the slices a second")
    whole = whole_scan(pipe, args)
    size = " x ".join(map(str, args.size))
    print(
        f"{size} voxels: {whole['seconds']:.1f} s for {whole['slices']} slices with a body, "
        f"{whole['slices'] / whole['synthesis']:.1f} slices a second; reading and writing {whole['share_of_files']:.1%}"
    )
    few, many = args.memory_slices
    low, high = peak_memory(few), peak_memory(many)
    print(f"peak memory of {many} slices against {few}: {high / low:.2f} ({low / 1e6:.0f} MB and {high / 1e6:.0f} MB)")


if __name__ == "__main__":
    main(parse_args())
