"""Speed and memory of the SynerMed data, each measured here and now.

    python examples/benchmark_data.py

Simulated patients are written as NIfTI in SynthRAD2023's layout, and read back as `load_dataset("synermed", ...)` does.
Seconds belong to one machine; ratios travel.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from datasets import load_dataset
from PIL import Image

import synermedgen_hf  # noqa: F401  registers "synermed"
from synermedgen_hf.data.pairs import pair_rows
from synermedgen_hf.data.phantom import simulate_case
from synermedgen_hf.data.sources import load_case, scan
from synermedgen_hf.data.understanding import TaskSampler


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4, help="patients for the speed of reading")
    parser.add_argument("--size", type=int, default=192, help="rows and columns of a slice")
    parser.add_argument("--slices", type=int, default=96)
    parser.add_argument("--jsonl_mb", type=int, default=1000, help="size of the JSON lines that are streamed")
    return parser.parse_args()


def write_cases(folder: Path, count: int, size: int, slices: int, simulated: int = 2):
    """`count` patients in SynthRAD2023's layout; the later ones are the first ones again, with noise of their own."""
    cases = [simulate_case("brain", "synthrad", seed, slices, size) for seed in range(min(count, simulated))]
    for number in range(count):
        case, rng = cases[number % len(cases)], np.random.default_rng(number)
        target = folder / "Task1" / "brain" / f"1B{'ABC'[number % 3]}{number:03d}"
        target.mkdir(parents=True)
        between, rows, columns = case.spacing
        affine = np.diag([columns, rows, between, 1])
        for name, volume in (("mr", case.images["MRI"]), ("ct", case.images["CT"]), ("mask", case.mask)):
            array = volume[:, ::-1, ::-1].transpose(2, 1, 0)
            if name == "mask":
                array = array.astype(np.uint8)
            else:
                array = (array + rng.normal(0, 4, array.shape)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(array, affine), target / f"{name}.nii.gz")


def timed(work, repeat: int = 3) -> float:
    """The best of some runs, in seconds."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def stream(folder: Path, decode: bool = True, **options):
    dataset = load_dataset(
        "synermed", data_dir=str(folder), split="train", streaming=True, split_ratios=(1.0, 0.0, 0.0), **options
    )
    return dataset if decode else dataset.decode(False)


def reading(args, work: Path):
    folder = work / "speed"
    write_cases(folder, args.cases, args.size, args.slices)
    files = sorted(folder.rglob("*.nii.gz"))
    inflate = timed(lambda: [gzip.open(file).read() for file in files])
    pairs = sum(1 for _ in stream(folder, decode=False))
    encoded = timed(lambda: sum(1 for _ in stream(folder, decode=False)))
    decoded = timed(lambda: sum(1 for _ in stream(folder)))
    print(f"pairs from NIfTI, {args.cases} patients, {args.size}x{args.size}x{args.slices}, both directions: {pairs}")
    print(f"  decompressing the same files alone: {inflate:.2f} s")
    print(f"  rows with their slices encoded: {encoded / inflate:.2f} of that ({pairs / encoded:.0f} pairs/s)")
    print(f"  rows with their slices decoded: {decoded / inflate:.2f} of that ({pairs / decoded:.0f} pairs/s)")


def processes(work: Path):
    folder = work / "twice"
    for number, case in enumerate(16 * sorted((work / "speed" / "Task1" / "brain").iterdir())):
        target = folder / "Task1" / "brain" / f"1B{'ABC'[number % 3]}{number:03d}"
        target.mkdir(parents=True)
        for file in case.iterdir():
            (target / file.name).hardlink_to(file)
    seconds = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            load_dataset("synermed", data_dir=str(folder), cache_dir=cache, num_proc=count)
            seconds[count] = time.perf_counter() - start
    print(f"into the cache with two processes: {seconds[1] / seconds[2]:.2f} times as fast as with one")


def many_files(work: Path):
    folder = work / "many"
    case = work / "speed" / "Task1" / "brain"
    small = next(case.iterdir())
    for number in range(500):
        target = folder / "Task1" / "brain" / f"1B{'ABC'[number % 3]}{number:03d}"
        target.mkdir(parents=True)
        for name in ("mr", "ct"):
            (target / f"{name}.nii.gz").hardlink_to(small / f"{name}.nii.gz")
    with tempfile.TemporaryDirectory() as cache:
        options = {"data_dir": str(folder), "cache_dir": cache, "slice_step": 1000, "routes": ["MRI-CT"]}
        load_dataset("synermed", **options, num_proc=2)
        print(f"cached reload of 1,000 volumes: {timed(lambda: load_dataset('synermed', **options)):.3f} s")


def understanding(args, work: Path):
    cases, _ = scan(work / "speed")
    loaded = [load_case(case) for case in cases]
    sampler = TaskSampler(len(loaded), loaded.__getitem__, per_case=200)
    rows = sum(sampler[index] is not None for index in range(len(sampler)))
    seconds = timed(lambda: [sampler[index] for index in range(len(sampler))], repeat=1)
    sliced = timed(lambda: sum(1 for case in loaded for _ in pair_rows(case)), repeat=1)
    print(f"understanding rows on top of volumes in memory: {rows / seconds:.0f} rows/s (pairs: {sliced:.2f} s in all)")


# The peak of this process alone, as the system counts it; what `resource` says includes that of the parent.
MEASURE = """
import sys
from pathlib import Path
from datasets import load_dataset
import synermedgen_hf
name, folder = sys.argv[1:]
options = {"split": "train", "streaming": True, "split_ratios": (1.0, 0.0, 0.0)}
for row in load_dataset("synermed", name, data_dir=folder, **options).decode(False):
    pass
lines = Path("/proc/self/status").read_text().splitlines()
print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def peak(name: str, folder: Path) -> int:
    """Peak memory in bytes of a process that reads a whole stream."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return int(done.stdout)


def memory(args, work: Path):
    peaks = {}
    for count in (20, 200):
        folder = work / f"cases-{count}"
        write_cases(folder, count, 64, 12)
        peaks[count] = peak("pairs", folder)
    print(f"peak memory of 200 small cases against 20: {peaks[200] / peaks[20]:.2f} ({peaks[200] / 1e6:.0f} MB)")
    sizes = {}
    for megabytes in (10, args.jsonl_mb):
        folder = work / f"jsonl-{megabytes}"
        (folder / "slice" / "t1").mkdir(parents=True)
        Image.new("L", (32, 32)).save(folder / "slice" / "t1" / "a_s001.png")
        line = json.dumps(
            {
                "image": ["t1/a_s001.png", "t1/a_s001.png"],
                "conversations": [
                    {"from": "human", "value": "<image><image>" + "Which description fits? " * 100},
                    {"from": "gpt", "value": "B"},
                ],
                "case_id": "a",
            }
        )
        with (folder / "SynerMed.jsonl").open("w") as lines:
            for _ in range(megabytes * 1_000_000 // len(line)):
                lines.write(line + "\n")
        sizes[megabytes] = peak("understanding", folder)
    ratio, most = sizes[args.jsonl_mb] / sizes[10], sizes[args.jsonl_mb] / 1e6
    print(f"peak memory of {args.jsonl_mb} MB of JSON lines against 10 MB: {ratio:.2f} ({most:.0f} MB)")


def main(args):
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        reading(args, work)
        processes(work)
        understanding(args, work)
        many_files(work)
        memory(args, work)


if __name__ == "__main__":
    main(parse_args())
