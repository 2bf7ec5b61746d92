"""One table of several evaluations side by side: a line for each route, a column for each run.

    python examples/results_table.py --metric ssim_u8_frame --scale 100 model=runs/tiny/judged copying=runs/tiny/copied

Each run is a name and the folder that `synermedgen evaluate` wrote; all of them of the same cases under the same
protocol. `mae_*` takes whichever of the route's figures fits first: HU, SUV and arbitrary units each have their own.
Below: on how many routes the first run is better than each of the others.
"""

import argparse
import fnmatch

import numpy as np

from synermedgen_hf.metrics.protocols import check_same_protocol
from synermedgen_hf.metrics.report import lower_is_better, markdown_table, read_summary


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--metric", required=True, help="a figure's name, or a pattern with *")
    parser.add_argument("--scale", type=float, default=1.0, help="figures are multiplied by it")
    parser.add_argument("--digits", type=int, default=1)
    return parser.parse_args(argv)


def figure_of(record: dict, pattern: str) -> tuple[str, float]:
    """Name and mean of the first figure that the pattern fits."""
    for name, found in record["metrics"].items():
        if fnmatch.fnmatch(name, pattern) and found["mean"] is not None:
            return name, found["mean"]
    raise SystemExit(f"{record['route']} has no figure {pattern}: it has {', '.join(record['metrics'])}.")


def main(args):
    if bad := [run for run in args.runs if "=" not in run]:
        raise SystemExit(f"{bad[0]} is no NAME=FOLDER.")
    runs = {name: read_summary(folder)["routes"] for name, folder in (run.split("=", 1) for run in args.runs)}
    names, first = list(runs), next(iter(runs.values()))
    lines, values = [], []
    for route, own in first.items():
        for name, routes in runs.items():
            if route not in routes:
                raise SystemExit(f"{name} has no {route}.")
            check_same_protocol([own, routes[route]])
            if routes[route]["checksum"] != own["checksum"]:
                raise SystemExit(f"{name} is of other cases of {route} than {names[0]}.")
        found = [figure_of(routes[route], args.metric) for routes in runs.values()]
        values.append([args.scale * value for _, value in found])
        lines.append([route, found[0][0], own["cases"], *(f"{value:.{args.digits}f}" for value in values[-1])])
    figures = {line[1] for line in lines}
    if len(figures) == 1:  # a mean over HU and SUV would mean nothing
        lines.append(["mean", *figures, "", *(f"{value:.{args.digits}f}" for value in np.mean(values, axis=0))])
    print(markdown_table(["route", "figure", "slices", *names], lines))
    sign = -1 if lower_is_better(args.metric) else 1
    for place, name in enumerate(names[1:], 1):
        better = sum(sign * row[0] > sign * row[place] for row in values)
        print(f"\n{names[0]} is better than {name} on {better} of {len(values)} routes.")


if __name__ == "__main__":
    main(parse_args())
