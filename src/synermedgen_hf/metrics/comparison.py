"""Two evaluations against each other: the same cases, the same protocol, paired by patient."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..data.splits import write_whole
from .protocols import check_same_protocol
from .report import group_of, lower_is_better, markdown_table, name_groups, read_summary
from .runs import CASES, name_of
from .statistics import correct_p_values, interval_of_mean, paired_p_value


def compare(first: str | Path, second: str | Path, bootstrap: int = 1000, seed: int = 0) -> dict:
    """
    Test, for every route and metric, whether two evaluations differ.

    Args:
        first, second (`str` or `Path`): Folders of finished evaluations.
        bootstrap (`int`, defaults to 1000): How often patients are drawn for an interval.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `dict`: `first` and `second`, the folders, and `routes`: for each route (for each stamp, where a route has
        several) and metric `n` cases and `patients` on which both are defined, the mean of `first` and of `second`, the
        mean `difference` (first minus second), its `interval` over patients, the `difference of patients`, in which
        each patient counts the same, `p` of Wilcoxon's signed-rank test on the latter's terms, and `q`, the same
        corrected for testing the metric on all routes, in whatever unit (Benjamini and Hochberg).

    Raises:
        `FileNotFoundError`: A folder holds no finished evaluation.
        `ValueError`: A case is in one of them only or is another scan there, or the protocols differ.
    """
    for folder in (first, second):
        read_summary(folder)
    one, other = ({name_of(record): record for record in read_cases(folder)} for folder in (first, second))
    for folder, lacking, having in ((first, other, one), (second, one, other)):
        if absent := [name for name in lacking if name not in having]:
            shown = "; ".join(" ".join(str(part) for part in name if part is not None) for name in absent[:5])
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            raise ValueError(f"{folder} lacks {len(absent)} cases that the other evaluation has: {shown}{more}.")
    groups: dict[tuple[str, str], dict] = {}
    values: dict[tuple[str, str], dict[str, list]] = {}
    for name, record in one.items():
        if record["protocol"] != other[name]["protocol"]:
            check_same_protocol([record, other[name]])
        if (here := record["measured"]) != (there := other[name]["measured"]):
            unlike = [f"{key} {here[key]} and {there.get(key)}" for key in here if here[key] != there.get(key)]
            raise ValueError(
                f"{' '.join(str(part) for part in name if part is not None)} was not measured alike in both "
                f"evaluations, another scan or another window: {'; '.join(unlike)}."
            )
        groups.setdefault(group_of(record), record)
        for metric, value in record["metrics"].items():
            paired = other[name]["metrics"].get(metric)
            if value is not None and paired is not None:
                of_route = values.setdefault(group_of(record), {}).setdefault(metric, [])
                of_route.append((record["patient"], value, paired))
    labels = dict(zip(groups, name_groups(groups.values()), strict=True))
    routes = {
        labels[group]: {metric: _paired(cases, bootstrap, seed) for metric, cases in metrics.items()}
        for group, metrics in values.items()
    }
    families: dict[str, list[dict]] = {}
    for metrics in routes.values():
        for metric, found in metrics.items():
            families.setdefault(re.sub(r"_(hu|suv|au)(?=_|$)", "", metric), []).append(found)
    for family in families.values():
        correct_p_values(family)
    return {"first": str(first), "second": str(second), "bootstrap": bootstrap, "routes": routes}


def write_comparison(file: Path, found: dict):
    """Write what [`compare`] found as JSON."""
    write_whole(file, json.dumps(found, indent=2) + "\n")


def read_cases(folder: str | Path) -> Iterator[dict]:
    """The records of a finished evaluation, one at a time."""
    with open(Path(folder) / CASES, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _paired(cases: list[tuple[str, float, float]], bootstrap: int, seed: int) -> dict:
    names, first, second = zip(*cases, strict=True)
    patients, number = np.unique(names, return_inverse=True)
    differences = np.subtract(first, second)
    counts = np.bincount(number)
    sums = np.bincount(number, weights=differences)
    return {
        "n": len(cases),
        "patients": len(patients),
        "first": float(np.mean(first)),
        "second": float(np.mean(second)),
        "difference": float(np.mean(differences)),
        "interval": interval_of_mean(sums, counts, bootstrap, seed),
        "difference of patients": float(np.mean(sums / counts)),
        "p": paired_p_value(sums / counts),
    }


def comparison_table(found: dict) -> str:
    """
    What [`compare`] found as a Markdown table. A run is named the better one where `q` is below 0.05, the interval
    leaves out zero, and a difference in which each patient counts the same points the same way. With five patients or
    fewer no test of ranks can reach that.
    """
    columns = ["route", "metric", "n", "patients", "first", "second", "difference", "95 % interval", "p", "q", "better"]
    lines = []
    for route, metrics in found["routes"].items():
        for metric, own in metrics.items():
            interval, better = own["interval"], ""
            signs = {np.sign(own["difference"]), np.sign(own["difference of patients"]), *np.sign(interval or [0])}
            if own["q"] is not None and own["q"] < 0.05 and len(signs) == 1:
                better = "first" if (own["difference"] < 0) == lower_is_better(metric) else "second"
            figures = [f"{own[name]:.4g}" for name in ("first", "second", "difference")]
            spread = "{:.4g} to {:.4g}".format(*interval) if interval else ""
            tests = ["" if own[name] is None else f"{own[name]:.2g}" for name in ("p", "q")]
            lines.append([route, metric, own["n"], own["patients"], *figures, spread, *tests, better])
    return f"first: {found['first']}, second: {found['second']}\n\n{markdown_table(columns, lines)}"


__all__ = ["compare", "comparison_table", "read_cases"]
