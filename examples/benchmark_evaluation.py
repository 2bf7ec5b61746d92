"""What judging costs beside synthesising, and what memory it takes, each measured here and now.

    python examples/benchmark_evaluation.py

Simulated patients are written as NIfTI in SynthRAD2023's layout and evaluated as `synermedgen evaluate` does. Seconds
belong to one machine; ratios travel.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import load_dataset
from tqdm.auto import tqdm

from synermedgen_hf import SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.metrics.evaluation import Judge, Synthesis, judge_case

# Peak memory of one evaluation of the copied source, in a process of its own, in bytes.
MEMORY = """
import sys
from pathlib import Path
from synermedgen_hf.metrics.evaluation import evaluate

evaluate(sys.argv[2], data_dir=sys.argv[1], split="train", baseline="copy", routes=["MRI-CT"])
lines = Path("/proc/self/status").read_text().splitlines()
print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder or repository; the bundled weights by default")
    parser.add_argument("--only", nargs="+", choices=["overhead", "memory"], default=["overhead", "memory"])
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a slice")
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--protocol", default="synthrad2023")
    parser.add_argument("--cases", type=int, nargs=2, default=(4, 40), help="few and many patients, for the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_evaluation.json"))
    return parser.parse_args(argv)


class Timed:
    """A prediction that knows how long it took in all."""

    def __init__(self, predict):
        self.predict, self.seconds = predict, 0.0

    def __call__(self, rows, seeds):
        start = time.perf_counter()
        made = self.predict(rows, seeds)
        self.seconds += time.perf_counter() - start
        return made


def overhead(args, work: Path) -> dict:
    """The whole of an evaluation, from the files of a case to its records, against the synthesis in it."""
    pipe = SynerMedGenPipeline.from_pretrained(args.model or checkpoint_path(), print_report=False)
    pipe.set_progress_bar_config(disable=True)
    write_layout("synthrad2023-task1", work / "speed", 1, size=args.size, num_slices=args.slices)
    rows = load_dataset(
        "synermed", data_dir=str(work / "speed"), split="train", streaming=True, split_ratios=(1.0, 0.0, 0.0)
    )
    names = sorted({f"{row['region']}/{row['source_modality']}-{row['target_modality']}" for row in rows})
    predict = Timed(Synthesis(pipe, pipe.model.config.sampling))
    judge = Judge(predict, pipe.processor.image_processor, args.protocol, batch_size=args.batch_size)
    judge_case(judge, rows, names, work / "warm.jsonl", tqdm(disable=True))
    ratios = []
    for repeat in range(args.repeats):
        predict.seconds, start = 0.0, time.perf_counter()
        judge_case(judge, rows, names, work / f"{repeat}.jsonl", tqdm(disable=True))
        ratios.append((time.perf_counter() - start) / predict.seconds)
    slices = len((work / "warm.jsonl").read_text().splitlines())
    print(f"{slices} slices of {args.size} pixels: evaluation to synthesis {np.median(ratios):.3f}")
    return {"slices": slices, "evaluation_to_synthesis": float(np.median(ratios)), "all": ratios}


def memory(args, work: Path) -> dict:
    """Peak memory with many cases against few: the same few scans again and again."""
    write_layout("synthrad2023-task1", work / "scans", 4, size=args.size, num_slices=args.slices)
    scans = sorted(path.parent for path in (work / "scans").rglob("ct.nii.gz"))
    peaks = []
    for count in args.cases:
        folder = work / str(count)
        for number in range(count):
            scan = scans[number % len(scans)]
            case = folder / "Task1" / scan.parent.name / f"{scan.name[:3]}{number:03d}"
            case.mkdir(parents=True)
            for file in scan.iterdir():
                (case / file.name).hardlink_to(file)
        command = [sys.executable, "-c", MEMORY, str(folder), str(work / f"evaluated-{count}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    print(f"peak memory of {args.cases[1]} cases against {args.cases[0]}: {peaks[1] / peaks[0]:.3f}")
    return {"cases": list(args.cases), "bytes": peaks, "many_to_few": peaks[1] / peaks[0]}


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: {"overhead": overhead, "memory": memory}[name](args, Path(folder)) for name in args.only}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
