"""Two evaluations against each other: the same cases, the same protocol, paired by patient."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..data.splits import write_whole
from .protocols import check_same_protocol, same_measured
from .report import group_of, lower_is_better, markdown_table, name_groups, read_summary
from .runs import CASES, name_of, name_text, read_line
from .statistics import correct_p_values, interval_of_mean, paired_p_value

# Without one of these, a line is no record of a synthesis.
KEYS = ("dataset", "case_id", "route", "slice_index", "patient", "protocol", "metrics", "measured")


def compare(first: str | Path, second: str | Path, bootstrap: int = 1000, seed: int = 0) -> dict:
    """
    Test, for every route and metric, whether two evaluations differ.

    Args:
        first, second (`str` or `Path`): Folders of finished evaluations.
        bootstrap (`int`, defaults to 1000): How often patients are drawn for an interval.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `dict`:

        - `first` and `second`: the folders, and `bootstrap`.
        - `only first` and `only second`: routes that the other one was not asked for, such as those that a model was
          not trained for and a baseline answers.
        - `routes`: for each of the others (for each stamp, where a route has several) and metric `n` cases and
          `patients` on which both are defined, the mean of `first` and of `second`, the mean `difference` (first minus
          second), its `interval` over patients, the `difference of patients`, in which each patient counts the same,
          `p` of Wilcoxon's signed-rank test on the latter's terms, and `q`, the same corrected for testing the metric
          on all routes, in whatever unit, and whether inside masks or bodies (Benjamini and Hochberg).

    Raises:
        `FileNotFoundError`: A folder holds no finished evaluation.
        `ValueError`: They have no route in common, a case of a common route is in one of them only or is another scan
            there, the protocols differ, or a line is damaged or of something else.
    """
    asked = [read_summary(folder)["arguments"]["routes"] for folder in (first, second)]
    if not (shared := [route for route in asked[0] if route in asked[1]]):
        raise ValueError(f"{first} and {second} have no route in common: {', '.join(asked[0])}; {', '.join(asked[1])}.")
    groups: dict[tuple[str, str], dict] = {}
    values: dict[tuple[str, str], dict[str, _Pairs]] = {}
    for record, partner in _in_pairs(first, second, shared):
        check_same_protocol([record, partner])
        if unlike := same_measured(record["measured"], partner["measured"]):
            raise ValueError(
                f"{name_text(name_of(record))} was not measured alike in both evaluations, another scan or another "
                f"window: {'; '.join(unlike)}."
            )
        group = group_of(record)
        groups.setdefault(group, record)
        for metric, value in record["metrics"].items():
            paired = partner["metrics"].get(metric)
            if value is not None and paired is not None:
                values.setdefault(group, {}).setdefault(metric, _Pairs()).add(record["patient"], value, paired)
    labels = dict(zip(groups, name_groups(groups.values()), strict=True))
    routes = {
        labels[group]: {metric: pairs.figures(bootstrap, seed) for metric, pairs in metrics.items()}
        for group, metrics in values.items()
    }
    families: dict[str, list[dict]] = {}
    for metrics in routes.values():
        for metric, found in metrics.items():
            # Whatever the unit, and whether a mask was given or the body found.
            families.setdefault(re.sub(r"_(hu|suv|au)(?=_|$)|_(mask|body)$", "", metric), []).append(found)
    for family in families.values():
        correct_p_values(family)
    return {
        "first": str(first),
        "second": str(second),
        "bootstrap": bootstrap,
        "only first": [route for route in asked[0] if route not in shared],
        "only second": [route for route in asked[1] if route not in shared],
        "routes": routes,
    }


def write_comparison(file: Path, found: dict):
    """Write what [`compare`] found as JSON."""
    write_whole(file, json.dumps(found, indent=2) + "\n")


def read_cases(folder: str | Path) -> Iterator[dict]:
    """
    The records of a finished evaluation, one at a time.

    Raises:
        `ValueError`: A line is damaged: it says which.
    """
    with open(Path(folder) / CASES, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield read_line(line, Path(folder) / CASES, number)


def _places(folder: str | Path, routes: list[str]) -> dict[tuple, int]:
    """Where in its file each record of these routes begins: names fit into memory where records might not."""
    file, places, offset = Path(folder) / CASES, {}, 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = read_line(line, file, number)
            if lacking := [key for key in KEYS if key not in record]:
                raise ValueError(f"{file}, line {number}, is no record of a synthesis: it lacks {', '.join(lacking)}.")
            if (name := name_of(record)) in places:
                raise ValueError(f"{file}, line {number}: {name_text(name)} has been there before.")
            if record["route"] in routes:
                places[name] = offset
            offset += len(line)
    return places


def _in_pairs(first: str | Path, second: str | Path, routes: list[str]) -> Iterator[tuple[dict, dict]]:
    """The records of each name, in the order of the first; all of these routes are in both."""
    one, other = _places(first, routes), _places(second, routes)
    for folder, own, wanted in ((first, one, other), (second, other, one)):
        if absent := [name for name in wanted if name not in own]:
            shown = "; ".join(map(name_text, absent[:5]))
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            raise ValueError(f"{folder} lacks {len(absent)} cases that the other evaluation has: {shown}{more}.")
    with open(Path(second) / CASES, "rb") as lines:
        for record in read_cases(first):
            if (name := name_of(record)) in one:
                lines.seek(other[name])
                yield record, json.loads(lines.readline())


class _Pairs:
    """Sums over the cases of each patient of what one metric is in both evaluations."""

    def __init__(self):
        self.patients: dict[str, list[float]] = {}

    def add(self, patient: str, first: float, second: float):
        sums = self.patients.setdefault(patient, [0, 0.0, 0.0, 0.0])
        for place, value in enumerate((1, first, second, first - second)):
            sums[place] += value

    def figures(self, bootstrap: int, seed: int) -> dict:
        counts, first, second, differences = np.array([self.patients[name] for name in sorted(self.patients)]).T
        number = counts.sum()
        return {
            "n": int(number),
            "patients": len(counts),
            "first": float(first.sum() / number),
            "second": float(second.sum() / number),
            "difference": float(differences.sum() / number),
            "interval": interval_of_mean(differences, counts, bootstrap, seed),
            "difference of patients": float(np.mean(differences / counts)),
            "p": paired_p_value(differences / counts),
        }


def better_one(metric: str, own: dict) -> str:
    """
    `"first"` or `"second"` where `q` is below 0.05, the interval leaves out zero, and a difference in which each
    patient counts the same points the same way; else `""`. With five patients or fewer no test of ranks can reach that.

    Args:
        metric (`str`): Its name says which way is better.
        own (`dict`): What [`compare`] found for it on a route.
    """
    signs = {np.sign(own["difference"]), np.sign(own["difference of patients"]), *np.sign(own["interval"] or [0])}
    if own["q"] is None or own["q"] >= 0.05 or len(signs) > 1:
        return ""
    return "first" if (own["difference"] < 0) == lower_is_better(metric) else "second"


def comparison_table(found: dict) -> str:
    """What [`compare`] found as a Markdown table; the better run is named by [`better_one`]."""
    columns = ["route", "metric", "n", "patients", "first", "second", "difference", "95 % interval", "p", "q", "better"]
    lines = []
    for route, metrics in found["routes"].items():
        for metric, own in metrics.items():
            interval = own["interval"]
            figures = [f"{own[name]:.4g}" for name in ("first", "second", "difference")]
            spread = "{:.4g} to {:.4g}".format(*interval) if interval else ""
            tests = ["" if own[name] is None else f"{own[name]:.2g}" for name in ("p", "q")]
            lines.append([route, metric, own["n"], own["patients"], *figures, spread, *tests, better_one(metric, own)])
    said = [f"first: {found['first']}, second: {found['second']}"]
    for side in ("first", "second"):
        if left := found[f"only {side}"]:
            said.append(f"Left out, since the {side} alone was asked for them: {', '.join(left)}.")
    return "\n\n".join([*said, markdown_table(columns, lines)])


__all__ = ["better_one", "compare", "comparison_table", "read_cases"]
