"""Draw how weights were trained, from the logs that are kept beside them.

    python examples/learning_curves.py src/synermedgen_hf/checkpoints/synermedgen-tiny/training

Writes `learning_curves.png` into that folder: the losses of the base, accuracy on held-out patients during Stage I, and
the loss of Stage II.
"""

import argparse
import json
import math
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

SMOOTHED = 25  # steps of the base to a point


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw_base(axes, folder: Path):
    done = 0
    for name, rows in groupby(read_lines(folder / "base_log.jsonl"), key=itemgetter("training")):
        rows = list(rows)
        points = groupby(rows, key=lambda row: math.ceil(row["step"] / SMOOTHED))
        means = [(done + point * SMOOTHED, fmean(row["loss"] for row in some)) for point, some in points]
        axes.plot(*zip(*means, strict=True), label=name)
        done += rows[-1]["step"]
    axes.set(title="Base: loss of each training", xlabel="step", yscale="log")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize="small")


def draw_understanding(axes, folder: Path):
    history = json.loads((folder / "understanding_state.json").read_text(encoding="utf-8"))["log_history"]
    for task in ("CTS", "MI", "TIA"):
        points = [(row["step"], row[name]) for row in history if (name := f"eval_accuracy/{task}") in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=task)
    axes.set(title="Stage I: right answers on held-out patients, %", xlabel="step", ylim=(0, 100))
    axes.legend()


def draw_generation(axes, folder: Path):
    done = 0
    for name, tokens in (("generation_log", 64), ("generation_fine_log", 256)):
        if not (folder / f"{name}.jsonl").exists():  # a training of one part
            continue
        rows = [row for row in read_lines(folder / f"{name}.jsonl") if "loss_mse" in row]
        axes.plot([done + row["step"] for row in rows], [row["loss_mse"] for row in rows], label=f"{tokens} tokens")
        done += rows[-1]["step"]
    axes.set(title="Stage II: loss of the velocity", xlabel="step", yscale="log")
    axes.legend()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="training/ beside the weights")
    folder = parser.parse_args(argv).folder
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for panel, draw in zip(axes, (draw_base, draw_understanding, draw_generation), strict=True):
        draw(panel, folder)
        panel.grid(alpha=0.3)
    figure.savefig(folder / "learning_curves.png", dpi=100)


if __name__ == "__main__":
    main()
