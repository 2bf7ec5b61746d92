"""What an evaluation found: `summary.json`, a page that needs no other file, and the block for a model card.

Figures of a route are means over its cases with intervals over patients, under one protocol, which is printed along.
The paper's own figures stand beside as a table of their own: its data and protocol are not public.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image, ImageOps

from ..data.splits import write_whole
from ..image_processing_synermedgen import to_display
from ..model_card import evaluation_results, last_name, subjects
from .protocols import check_same_protocol, close_means
from .runs import CASES, name_of, read_json
from .statistics import interval_of_mean

SUMMARY, REPORT, MODEL_INDEX, PICTURES = "summary.json", "report.html", "model-index.yml", "pictures"
PLACES = ("best", "median", "worst")
PATHS = ("data_dir", "model", "folder")  # among the arguments: a page shows their last parts alone
SIDE, GAP = 144, 4  # pixels of a panel, and between two
# How a modality is shown; the figures use the whole range. MR is shown over the window of its volume.
DISPLAY = {"CT": (-300.0, 1000.0), "CBCT": (-300.0, 1000.0), "PET": (0.0, 8.0)}
PANELS = (
    "Source, synthesis, truth, and their absolute difference. CT and CBCT from -300 to 1000 HU, PET from 0 to 8 SUV in "
    "reversed grey, MR over the window of its volume; the difference from 0 to half of that width. Of each case the "
    "best, the middle and the worst picture are kept; median is the one of them that is nearest to the median of all."
)
LOWER_IS_BETTER = ("mae", "rmse", "mse", "error")

# SSIM x100 after both stages, as published: Zhao, Dong and Chen, SynerMedGen, ICML 2026 (arXiv 2605.08724). The other
# sixteen routes are not public, and neither are split, preprocessing, window, mask and implementation.
PAPER_METHODS = (
    "Pix2Pix",
    "CycleGAN",
    "BBDM",
    "ResViT",
    "SynDiff",
    "RCD",
    "HealthGPT",
    "UniMedVL",
    "SynerMedGen",
)
PAPER_SSIM = {
    "brain/CBCT-CT": (66.17, 53.32, 71.09, 85.00, 85.47, 85.97, 57.37, 51.48, 87.15),
    "pelvis/CBCT-CT": (63.55, 55.87, 60.49, 84.00, 83.21, 86.22, 46.89, 43.94, 87.14),
    "brain/MRI-CT": (74.33, 52.65, 68.99, 86.39, 87.19, 86.12, 84.29, 54.11, 88.87),
    "whole-body/CT-PET": (72.21, 65.98, 67.68, 87.07, 88.12, 88.90, 66.54, 74.12, 91.10),
    "brain/T2-T1": (59.34, 57.19, 56.77, 86.94, 88.31, 88.01, 60.13, 77.26, 90.58),
    "brain/T1-T2": (62.10, 53.31, 56.41, 85.78, 84.25, 86.19, 70.32, 78.88, 87.14),
}
PAPER_NOTE = (
    "SSIM x100 as published for the paper's own weights, data and protocol, none of which is public. It says where the "
    "field stands; it cannot be compared with the figures above."
)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_strip(row: dict, made: np.ndarray, wanted: np.ndarray, codec) -> str:
    """
    Source, synthesis, truth and their difference side by side.

    Args:
        row (`dict`): Of pairs, decoded.
        made, wanted (`np.ndarray` of shape `(height, width)`): Prediction and truth in the same units.
        codec ([`SynerMedGenImageProcessor`]): Knows the target's window.

    Returns:
        `str`: A PNG in base64.
    """
    record, source = codec.target_record(row["target_modality"]), row["source_window"]
    low, high = DISPLAY.get(row["target_modality"], (record["low"], record["high"]))
    panels = [
        _shown(np.asarray(row["source_image"]), row["source_modality"], (source["low"], source["high"])),
        _shown(made, row["target_modality"], (low, high)),
        _shown(wanted, row["target_modality"], (low, high)),
        to_display(np.abs(made - wanted), (0.0, (high - low) / 2)),
    ]
    strip = Image.new("L", (4 * SIDE + 3 * GAP, SIDE), 96)
    for place, panel in enumerate(panels):
        panel = ImageOps.contain(panel, (SIDE, SIDE), Image.Resampling.BILINEAR)
        left = place * (SIDE + GAP) + (SIDE - panel.width) // 2
        strip.paste(panel, (left, (SIDE - panel.height) // 2))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _shown(array: np.ndarray, modality: str, window: tuple[float, float]) -> Image.Image:
    picture = to_display(array, DISPLAY.get(modality, window))
    return ImageOps.invert(picture) if modality == "PET" else picture


def ranked_by(metrics: dict) -> str:
    """The figure that tells the best case from the worst: SSIM where there is one."""
    return next((name for name in metrics if name.startswith("ssim")), next(iter(metrics)))


def lower_is_better(metric: str) -> bool:
    return metric.startswith(LOWER_IS_BETTER)


def keep_pictures(records: list[dict]):
    """Of each route keep the pictures of the best, the median and the worst record, and remove the others."""
    for own in _by_route(records).values():
        kept = []
        if ranked := sorted((one for one in own if _rank(one) is not None), key=_rank):
            kept = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
        for record in own:
            if not any(record is one for one in kept):
                record.pop("picture", None)


def _rank(record: dict) -> float | None:
    """The smaller, the worse; `None` where the figure is not defined."""
    name = ranked_by(record["metrics"])
    value = record["metrics"][name]
    return None if value is None else (-value if lower_is_better(name) else value)


def _by_route(records: Iterable[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["route"], []).append(record)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def summarise(records: Iterable[dict], bootstrap: int = 1000, seed: int = 0) -> dict[str, dict]:
    """
    Figures of each route.

    Args:
        records (`Iterable[dict]`): Of an evaluation; gone through once and not kept.
        bootstrap (`int`, defaults to 1000): How often patients are drawn for an interval.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `dict[str, dict]`: For each route, and for each stamp if a route has several (cases with and without a mask, or
        of slices along several axes),

        - `route`, `cases`, `patients`, `protocol` (the stamp), `checksum` of the cases' names, grids and areas, and
          `means` of the references' parts over the cases, by which other scans of the same names are told;
        - `metrics`: for each metric `mean` over its `n` cases where it is defined, and `interval`, which holds the mean
          in 95 of 100 draws of patients (`None` for a single patient);
        - `ranked_by`: the metric that tells the best case from the worst, and its `median`.

    Raises:
        `ValueError`: Stamps of one route differ in more than area and axis.
    """
    found: dict[tuple[str, str], _Sums] = {}
    for record in records:
        found.setdefault(group_of(record), _Sums(record)).add(record)
    labels = name_groups(sums.first for sums in found.values())
    return {label: sums.figures(bootstrap, seed) for label, sums in zip(labels, found.values(), strict=True)}


def name_groups(firsts: Iterable[dict]) -> list[str]:
    """
    What groups of records are called: by their route, and by the area and the axis of the slices as well where a route
    has several stamps.

    Args:
        firsts (`Iterable[dict]`): A record of each group.

    Raises:
        `ValueError`: Stamps of one route differ in more than that.
    """
    named: dict[str, dict] = {}
    for first in firsts:
        label = route = first["route"]
        if route in named:
            known, own = named[route]["protocol"], first["protocol"]
            unlike = [name for name in dict.fromkeys([*known, *own]) if known.get(name) != own.get(name)]
            if not set(unlike) <= {"area", "axis"}:
                check_same_protocol([named[route], first])
            label = f"{route} ({', '.join(own[name].partition(':')[0] for name in unlike)})"
        named[label] = first
    return list(named)


def group_of(record: dict) -> tuple[str, str]:
    """What may be averaged: one route under one protocol."""
    return record["route"], json.dumps(record["protocol"])


class _Sums:
    """Sums of one route for each patient; of each slice only the value that it is ranked by is kept."""

    def __init__(self, first: dict):
        self.first, self.cases, self.names = first, 0, hashlib.sha256()
        self.patients: dict[str, int] = {}
        self.metrics: dict[str, dict[int, list[float]]] = {name: {} for name in first["metrics"]}
        self.ranked: list[float] = []
        self.means = np.zeros(len(first["measured"]["means"]))

    def add(self, record: dict):
        self.cases += 1
        measured = [record["measured"][name] for name in ("shape", "spacing", "voxels")]
        self.names.update(json.dumps([name_of(record), measured]).encode())
        self.means += record["measured"]["means"]
        patient = self.patients.setdefault(record["patient"], len(self.patients))
        for name, value in record["metrics"].items():
            if value is not None:
                sums = self.metrics.setdefault(name, {}).setdefault(patient, [0.0, 0])
                sums[0] += value
                sums[1] += 1
        if (value := record["metrics"][ranked_by(record["metrics"])]) is not None:
            self.ranked.append(value)

    def figures(self, bootstrap: int, seed: int) -> dict:
        metrics = {}
        for name, by_patient in self.metrics.items():
            sums, counts = np.array(list(by_patient.values()), dtype=float).reshape(-1, 2).T
            mean = float(sums.sum() / counts.sum()) if len(sums) else None
            interval = interval_of_mean(sums, counts, bootstrap, seed)
            metrics[name] = {"n": int(counts.sum()), "mean": mean, "interval": interval}
        return {
            "route": self.first["route"],
            "cases": self.cases,
            "patients": len(self.patients),
            "metrics": metrics,
            "ranked_by": ranked_by(self.first["metrics"]),
            "median": float(np.median(self.ranked)) if self.ranked else None,
            "protocol": self.first["protocol"],
            "checksum": self.names.hexdigest()[:16],
            "means": (self.means / self.cases).tolist(),
        }


def write_summary(output: Path, records: Callable[[], Iterator[dict]], arguments: dict, cases: dict):
    """
    Write `summary.json` and, for each route, pictures of its best, its median and its worst case.

    Args:
        output (`Path`): Folder of the evaluation.
        records (`Callable`): Gives all records from the first, each time it is called; some hold a `picture`.
        arguments (`dict`): What was asked.
        cases (`dict`): How many were found, how many gave no slice, how many were repaired by the rules of the data
            set, and the routes that none of them shows.

    Raises:
        `ValueError`: There are no records.
    """
    routes = summarise(records())
    if not routes:
        raise ValueError(
            f"Nothing of {', '.join(arguments['routes'])} could be read and judged in the split {arguments['split']}."
        )
    labels = {group_of(own): label for label, own in routes.items()}
    chosen: dict[tuple[str, str], tuple[float, int, dict]] = {}
    for line, record in enumerate(records(), start=1):
        rank, label = _rank(record), labels[group_of(record)]
        if "picture" not in record or rank is None:
            continue
        off = abs(record["metrics"][routes[label]["ranked_by"]] - routes[label]["median"])
        for place, distance in zip(PLACES, (-rank, off, rank), strict=True):
            if (label, place) not in chosen or distance < chosen[label, place][0]:
                chosen[label, place] = distance, line, record
    (output / PICTURES).mkdir(exist_ok=True)
    for (label, place), (_, line, record) in chosen.items():
        _picture(output, label, place).write_bytes(base64.b64decode(record["picture"]))
        # The name of a case may be that of a patient's folder, and page and summary are made to be shown.
        shown = {"line": line, "value": record["metrics"][routes[label]["ranked_by"]]}
        routes[label].setdefault("pictures", {})[place] = shown
    summary = {"arguments": arguments, "cases": cases, "bootstrap": 1000, "routes": routes}
    write_whole(output / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _picture(output: Path, route: str, place: str) -> Path:
    return output / PICTURES / f"{route.replace('/', '_').replace(' ', '_')}-{place}.png"


def read_summary(folder: str | Path) -> dict:
    """
    `summary.json` of an evaluation.

    Raises:
        `FileNotFoundError`: The folder holds no finished evaluation.
        `ValueError`: It holds one of another kind, or a damaged one.
    """
    file, cases = Path(folder) / SUMMARY, Path(folder) / CASES
    if absent := [str(path) for path in (cases, file) if not path.exists()]:
        raise FileNotFoundError(f"{folder} holds no finished evaluation: there is no {absent[0]}.")
    summary = read_json(file)
    if not {"arguments", "routes"} <= summary.keys():
        raise ValueError(f"{folder} holds no evaluation of synthesis.")
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def write_report(output: str | Path, beside: Iterable[str | Path] = ()) -> str:
    """
    Write the page and the block for a model card from a finished evaluation.

    Args:
        output (`str` or `Path`): Its folder; `report.html` and `model-index.yml` are written to it.
        beside (`Iterable[str | Path]`): Folders of other evaluations, printed in the same tables.

    Returns:
        `str`: The tables in Markdown, and what was written.

    Raises:
        `ValueError`: An evaluation beside is of other cases or under another protocol.
    """
    output = Path(output)
    summary = read_summary(output)
    title = _title(summary["arguments"])
    runs = {title: summary}
    for name, folder in _short_names(beside, title).items():
        runs[name] = read_summary(folder)
        _check_comparable(output, summary, folder, runs[name])
    tables = _tables(runs)
    shared = dict.fromkeys(own["route"] for own in summary["routes"].values() if own["route"] in PAPER_SSIM)
    paper = [[route, *map("{:.2f}".format, PAPER_SSIM[route])] for route in shared]
    if paper:
        tables.append(("The paper's own figures", PAPER_NOTE, ["route", *PAPER_METHODS], paper))
    write_whole(output / REPORT, _page(output, summary, tables))
    if summary["arguments"]["baseline"] is None:
        write_whole(output / MODEL_INDEX, _model_index(summary))
    text = "\n\n".join(f"{title}. {note}\n\n{markdown_table(columns, lines)}" for title, note, columns, lines in tables)
    return f"{text}\n\nWrote {output / REPORT}, {output / SUMMARY} and {output / CASES}"


def _short_names(folders: Iterable[str | Path], taken: str) -> dict[str, Path]:
    """What folders are called in the tables: their last parts, as many as tell them apart."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    length, names = 1, [path.name for path in paths]
    while len({taken, *names}) <= len(names):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return dict(zip(names, paths, strict=True))


def _check_comparable(mine: Path, summary: dict, theirs: Path, other: dict):
    for route, own in summary["routes"].items():
        if (found := other["routes"].get(route)) is None:
            continue
        check_same_cases(route, str(mine), own, str(theirs), found)


def check_same_cases(route: str, mine: str, own: dict, theirs: str, found: dict):
    """
    Refuse to set figures of a route side by side that are of other cases, or of other scans under the same names.

    Args:
        route (`str`): Its label in both summaries.
        mine, theirs (`str`): What the evaluations are called.
        own, found (`dict`): Of [`summarise`].

    Raises:
        `ValueError`: They are not alike in protocol, cases or scans.
    """
    check_same_protocol([own, found])
    if own["checksum"] != found["checksum"] or not close_means(own["means"], found["means"]):
        raise ValueError(
            f"{theirs} is of other cases of {route} than {mine} ({found['cases']} and {own['cases']}); synermedgen "
            "compare says which."
        )


def _tables(runs: dict[str, dict]) -> list[tuple[str, str, list[str], list[list]]]:
    """Title, note, columns and lines; routes with the same metrics and protocol share one table."""
    first = next(iter(runs.values()))
    groups: dict[str, list[str]] = {}
    for route, own in first["routes"].items():
        groups.setdefault(json.dumps([own["protocol"], list(own["metrics"])]), []).append(route)
    tables = []
    for key, routes in groups.items():
        stamp, metrics = json.loads(key)
        lines = []
        for route in routes:
            for name, run in runs.items():
                if (own := run["routes"].get(route)) is not None:
                    cells = [_cell(own["metrics"].get(metric), own["cases"]) for metric in metrics]
                    lines.append([route, name, own["cases"], own["patients"], *cells])
        targets = dict.fromkeys(first["routes"][route]["route"].rsplit("-", 1)[1] for route in routes)
        title = f"To {', '.join(targets)}, under {first['arguments']['protocol']}, by {first['arguments']['level']}"
        columns = ["route", "run", f"{first['arguments']['level']}s", "patients", *metrics]
        tables.append((title, f"Mean and 95 % interval over patients. {_stamp_text(stamp)}", columns, lines))
    return tables


def _cell(found: dict | None, cases: int) -> str:
    if found is None or found["mean"] is None:
        return ""
    interval = " ({:.4g} to {:.4g})".format(*found["interval"]) if found["interval"] else ""
    fewer = f", n = {found['n']}" if found["n"] < cases else ""
    return f"{found['mean']:.4g}{interval}{fewer}"


def _stamp_text(stamp: dict) -> str:
    return "; ".join(f"{name}: {value}" for name, value in stamp.items())


def markdown_table(columns: list[str], lines: list[list]) -> str:
    rows = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _model_index(summary: dict) -> str:
    """The front matter of a card, as the Hub reads it."""
    index = eval_results_to_model_index(last_name(summary["arguments"]["model"]), evaluation_results(summary))
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)


def _title(arguments: dict) -> str:
    return arguments["baseline"] or last_name(arguments["model"])


_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
section { margin: 2rem 0; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid var(--line); padding: .2rem .5rem; text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:first-child { text-align: left; }
figure { margin: .75rem 0; }
figure img { max-width: 100%; display: block; }
figcaption, small { opacity: .75; font-size: 13px; }
pre { white-space: pre-wrap; font-size: 12px; }
"""


def _page(output: Path, summary: dict, tables: list[tuple[str, str, list[str], list[list]]]) -> str:
    say, arguments = html.escape, summary["arguments"]
    title = f"Evaluation of {_title(arguments)}"
    found = f"{summary['cases']['found']} cases, {summary['cases']['without slices']} of them with nothing to judge"
    found += f", {summary['cases']['repaired']} repaired"
    if unseen := summary["cases"].get("routes without cases"):
        found += f"; none of {', '.join(unseen)}"
    whom = f"{subjects(arguments)}, split {arguments['split']}: {found}."
    parts = [f"<h1>{say(title)}</h1>", f"<p>{say(whom)}</p>"]
    parts.append("<p>Research use only. Not for clinical use: every synthesis may be wrong.</p>")
    for heading, note, columns, lines in tables:
        head = "".join(f"<th>{say(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{say(str(cell))}</td>" for cell in line) + "</tr>" for line in lines)
        parts.append(f"<section><h2>{say(heading)}</h2><p><small>{say(note)}</small></p>")
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>")
    parts.append(f"<h2>Pictures</h2><p><small>{say(PANELS)}</small></p>")
    for route, own in summary["routes"].items():
        parts.append(f"<section><h3>{say(route)}</h3>")
        for place, shown in own.get("pictures", {}).items():
            png = base64.b64encode(_picture(output, route, place).read_bytes()).decode()
            caption = f"{place}: {own['ranked_by']} {shown['value']:.4g}, line {shown['line']} of {CASES}"
            parts.append(f'<figure><img alt="{say(place)}" src="data:image/png;base64,{png}">')
            parts.append(f"<figcaption>{say(caption)}</figcaption></figure>")
        parts.append("</section>")
    told = {name: last_name(value) if name in PATHS and value else value for name, value in arguments.items()}
    parts.append(f"<details><summary>Arguments</summary><pre>{say(json.dumps(told, indent=2))}</pre></details>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{say(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


__all__ = [
    "check_same_cases",
    "draw_strip",
    "group_of",
    "keep_pictures",
    "lower_is_better",
    "name_groups",
    "read_summary",
    "summarise",
    "write_report",
    "write_summary",
]
