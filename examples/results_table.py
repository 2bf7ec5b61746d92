"""One table of several evaluations side by side: a line for each route, a column for each run.

    python examples/results_table.py model=runs/tiny/evaluation copying=runs/tiny/copying \\
        --metric ssim_u8_frame:100:1 --metric psnr_u8_frame:1:1 --metric 'mae_[!u]*_frame:1:1'

Each run is a name and the folder that `synermedgen evaluate` wrote; all of them of the same cases under the same
protocol. A metric is `FIGURE:SCALE:DIGITS`; of the figures that a pattern fits the first is taken, so `mae_[!u]*` is
the mean absolute error in the route's own unit. A cell holds all metrics in order; an asterisk says that a figure is
not defined on all cases, so that two runs may speak of different ones. The last line is the plain mean over routes,
whose ranges differ. Below: on how many routes the first run has the better mean than another, on how many of all it is
better or worse by the test of `synermedgen compare`, and what all stamps have in common.
"""

import argparse
import fnmatch

import numpy as np

from synermedgen_hf.metrics.comparison import better_one, compare
from synermedgen_hf.metrics.report import check_same_cases, lower_is_better, markdown_table, read_summary


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=split_at("=", 2), metavar="NAME=FOLDER")
    parser.add_argument(
        "--metric", action="append", type=split_at(":", 3), required=True, metavar="FIGURE:SCALE:DIGITS"
    )
    return parser.parse_args(argv)


def split_at(mark: str, count: int):
    """A type of arguments: `count` parts."""

    def split(text: str) -> list[str]:
        parts = text.split(mark)
        if len(parts) != count or not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} has not {count} parts with {mark!r} between them")
        return parts

    return split


def figure_of(record: dict, pattern: str) -> str:
    """The first figure that the pattern fits, of those that are defined on some case."""
    for name, found in record["metrics"].items():
        if fnmatch.fnmatchcase(name, pattern) and found["mean"] is not None:
            return name
    raise SystemExit(f"{record['route']} has no figure {pattern}: it has {', '.join(record['metrics'])}.")


def main(args):
    folders = dict(args.runs)
    if len(folders) < len(args.runs):
        raise SystemExit("Two runs have one name.")
    runs = {name: read_summary(folder)["routes"] for name, folder in folders.items()}
    metrics = [(pattern, float(scale), int(digits)) for pattern, scale, digits in args.metric]
    names, first = list(runs), next(iter(runs.values()))
    figures = [[figure_of(own, pattern) for pattern, _, _ in metrics] for own in first.values()]
    values = np.empty((len(first), len(runs), len(metrics)))
    whole = np.ones(values.shape, bool)
    for row, (route, own) in enumerate(first.items()):
        for column, (name, routes) in enumerate(runs.items()):
            if route not in routes:
                raise SystemExit(f"{name} has no {route}.")
            check_same_cases(route, names[0], own, name, routes[route])
            for place, figure in enumerate(figures[row]):
                found = routes[route]["metrics"][figure]
                if found["mean"] is None:
                    raise SystemExit(f"{name} has no {figure} of {route}.")
                whole[row, column, place] = found["n"] == own["cases"]
                values[row, column, place] = metrics[place][1] * found["mean"]

    def cell(own, of_all, shown) -> str:
        parts = []
        for value, (*_, digits), all_of, ok in zip(own, metrics, of_all, shown, strict=True):
            parts.append(f"{value:.{digits}f}{'' if all_of else '*'}" if ok else "-")
        return " / ".join(parts)

    everything = [True] * len(metrics)
    lines = [
        [route, own["cases"], *(cell(*one, everything) for one in zip(values[row], whole[row], strict=True))]
        for row, (route, own) in enumerate(first.items())
    ]
    # A mean over HU and SUV would mean nothing.
    kinds = [sorted(set(each)) for each in zip(*figures, strict=True)]
    means = zip(values.mean(axis=0), whole.all(axis=0), strict=True)
    lines.append(["mean over routes", "", *(cell(*one, [len(each) == 1 for each in kinds]) for one in means)])
    print(" / ".join(" or ".join(each) for each in kinds) + "\n")
    print(markdown_table(["route", "slices", *names], lines))

    for column, name in enumerate(names[1:], start=1):
        tested = compare(folders[names[0]], folders[name])["routes"]
        print(f"\n{names[0]} and {name}, of {len(first)} routes:")
        for place, kind in enumerate(kinds):
            ahead = values[:, 0, place] - values[:, column, place]
            better = int((ahead * (-1 if lower_is_better(kind[0]) else 1) > 0).sum())
            verdicts = [
                better_one(figure[place], tested[route][figure[place]])
                for route, figure in zip(first, figures, strict=True)
            ]
            print(
                f"    {' or '.join(kind)}: {names[0]} has the better mean on {better}; tested, it is better on "
                f"{verdicts.count('first')} and worse on {verdicts.count('second')}"
            )
    stamps = [own["protocol"] for own in first.values()]
    common = [f"{key}: {value}" for key, value in stamps[0].items() if all(one.get(key) == value for one in stamps)]
    print(f"\nStamps of all routes: {'; '.join(common)}.")


if __name__ == "__main__":
    main(parse_args())
