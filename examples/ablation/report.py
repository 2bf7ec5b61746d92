"""What an ablation found, in tables, curves and words: `report.md` and `curves.png`.

    python examples/ablation/report.py runs/ablation

* A figure is the mean over routes of the mean over patients of the mean over slices, its spread the standard deviation
  over seeds. Figures carry the protocol of the evaluations and are never mixed with the paper's.
* A verdict comes from differences of two arms on the same patients under the same seed. It has to hold for other
  patients: the 95 % interval over patients leaves out zero, and the paired test holds after correction for all
  comparisons of a table that the paper claims something of (Benjamini and Hochberg; others are corrected apart). And
  for other trainings: so does Student's interval over seeds. Otherwise it is undecided, and said to be; a single seed
  decides nothing.
* What has not been run yet is left out; comparisons use the seeds that both arms have.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test, t

from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.metrics.comparison import read_cases
from synermedgen_hf.metrics.protocols import check_same_protocol
from synermedgen_hf.metrics.report import markdown_table
from synermedgen_hf.metrics.runs import CASES, name_of
from synermedgen_hf.metrics.statistics import correct_p_values, interval_of_mean

REPORT, CURVES, CONFIG = "report.md", "curves.png", "config.json"
SEEDS_WANTED = 3
# Which arms have been taught a task.
LEARNERS = {
    "CTS": ("all", "no-mi", "no-tia", "random"),
    "MI": ("all", "no-cts", "no-tia", "random"),
    "TIA": ("all", "no-cts", "no-mi", "random"),
}
NAMES = {
    "untaught": "nothing, nor what the base has been taught",
    "none": "nothing",
    "vqa": "ordinary questions (vqa)",
    "all": "CTS + MI + TIA",
    "no-cts": "MI + TIA, without CTS",
    "no-mi": "CTS + TIA, without MI",
    "no-tia": "CTS + MI, without TIA",
    "random": "CTS + MI + TIA, random CTS negatives",
}
# By the target: figures of one group share a unit.
GROUPS = {"to CT and CBCT": ("CT", "CBCT"), "to PET": ("PET",), "to MR": ("MRI", "T1", "T1CE", "T2", "FLAIR")}
UNITS = {"to CT and CBCT": "HU", "to PET": "SUV", "to MR": "a.u."}
METRICS = ("ssim", "psnr", "mae")

# Zhao, Dong and Chen, SynerMedGen, ICML 2026 (arXiv 2605.08724), read off its project page and figures. Of the
# ablation of the three tasks and of the negatives, no figure is public.
PAPER = (
    ("CTS / MI / TIA answered rightly, %", "26.0 / 35.3 / 47.7", "83.2 / 84.5 / 90.1"),
    ("zero-shot, Stage I alone, mean SSIM x100 of 22 routes", "39.4", "74.9"),
)
PAPER_UNSEEN = "Unseen data (SynthRAD2025, 8 routes), full against Stage II alone: SSIM x100 +7.15, MAE -2.68."

HOW_DECIDED = (
    "A comparison is decided if its difference would hold for other patients (the 95 % interval over patients leaves "
    "out zero, and q is below 0.05: the p-value of a test that flips the signs of patients, corrected for all those of "
    "the table that the paper claims something of, and apart for the others) and for other trainings (so does the 95 % "
    "interval over seeds). Of few patients the interval over them is too narrow."
)

Cells = dict[tuple[str, str], float]  # (route, patient) to the mean over slices


@dataclass(frozen=True)
class Comparison:
    """`first` is claimed to be better than `second`."""

    first: str
    second: str
    claimed: bool = True  # else it is only looked at


STAGE_TWO = (
    *(Comparison("all", other) for other in ("untaught", "none", "vqa", "no-cts", "no-mi", "no-tia", "random")),
    Comparison("none", "untaught", claimed=False),
)
ZERO_SHOT = (Comparison("all", "none"), Comparison("vqa", "none", claimed=False), Comparison("all", "vqa"))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_cells(folder: Path, firsts: dict[str, dict]) -> dict[str, Cells]:
    """
    A finished evaluation as means over slices.

    Args:
        folder (`Path`): What `synermedgen evaluate` wrote.
        firsts (`dict[str, dict]`): Route to the first record of the evaluations that stand beside this one, `{}` for
            the first of them, which adds its own.

    Returns:
        `dict[str, Cells]`: For `"ssim"`, `"psnr"` and `"mae"`, the figure that [`figure_of`] chooses.

    Raises:
        `ValueError`: It was measured in another way than those beside, or its first case of a route is another scan.
    """
    sums: dict[str, dict[tuple[str, str], list[float]]] = {metric: {} for metric in METRICS}
    for record in read_cases(folder):
        first = firsts.setdefault(record["route"], record)
        try:
            check_same_protocol([first, record])
        except ValueError as error:
            raise ValueError(
                f"{folder} cannot stand beside the other evaluations ({record['route']}): {error}"
            ) from error
        if name_of(first) == name_of(record) and first.get("measured") != record.get("measured"):
            raise ValueError(f"{folder} is of other scans of {record['route']} than the other evaluations.")
        for metric in METRICS:
            name = figure_of(record, metric)
            if (value := record["metrics"][name]) is not None:
                sums[metric].setdefault((record["route"], record["patient"]), []).append(value)
    return {metric: {cell: statistics.fmean(values) for cell, values in own.items()} for metric, own in sums.items()}


def figure_of(record: dict, metric: str) -> str:
    """The first figure of a protocol that begins so; of errors, that in the unit of the target, not in grey levels."""
    names = [name for name in record["metrics"] if name.startswith(f"{metric}_")]
    return next(name for name in names if metric != "mae" or not name.startswith("mae_u8_"))


def read_runs(output: Path, config: dict, folder: str, firsts: dict) -> dict[str, dict[int, dict[str, Cells]]]:
    """Arm to seed to figures, of the evaluations called `folder` that are done. Zero-shot `none` has no seed."""
    runs: dict[str, dict[int, dict[str, Cells]]] = {}
    known: dict[Path, dict[str, Cells]] = {}
    for arm in config["arms"]:
        for seed in config["seeds"]:
            place = output / f"seed{seed}" / arm / folder
            if arm == "none" and folder.startswith("zero-"):
                place = output / "base" / folder
            if (place / CASES).exists():
                known[place] = known.get(place) or read_cells(place, firsts)
                runs.setdefault(arm, {})[seed] = known[place]
    return runs


def answers_of(output: Path, arm: str, seed: int) -> Path:
    """Where it is kept what an arm answers before Stage II, which does not change it."""
    return output / "base" / "answers" if arm == "none" else output / f"seed{seed}" / arm / "answers"


def read_answers(output: Path, arm: str, seed: int) -> dict[str, dict]:
    """Task to its figures."""
    file = answers_of(output, arm, seed) / "summary.json"
    return json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.exists() else {}


def read_right(output: Path, arm: str, seed: int, task: str) -> dict[int, tuple[str, bool]]:
    """Number of a question to its patient and whether it was answered rightly."""
    records = read_cases(answers_of(output, arm, seed))
    return {
        one["index"]: (f"{one['dataset']}/{one['patient_id']}", one["correct"])
        for one in records
        if one["task"] == task
    }


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def mean_of(cells: Cells, targets: Iterable[str] | None = None) -> float | None:
    """Mean over routes of the mean over patients, of the routes to these targets."""
    routes: dict[str, list[float]] = {}
    for (route, _), value in cells.items():
        if targets is None or route.rsplit("-", 1)[1] in targets:
            routes.setdefault(route, []).append(value)
    return statistics.fmean(map(statistics.fmean, routes.values())) if routes else None


def with_spread(values: list[float | None], scale: float = 1, digits: int = 2) -> str:
    """Mean over seeds and, where there are several, their standard deviation."""
    values = [scale * value for value in values if value is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def overview(output: Path, runs, copied: dict[str, Cells] | None, names: dict[str, str] = NAMES) -> str:
    """Arms against understanding, and against the figures of each group of routes."""
    columns = ["Stage I", "seeds", "CTS %", "MI %", "TIA %", "SSIM x100, all routes", "PSNR, all routes"]
    columns += [f"{name} {group}" for group in GROUPS for name in ("SSIM x100", "PSNR", f"MAE ({UNITS[group]})")]

    def figures(several: list[dict[str, Cells]]) -> list[str]:
        made = []
        for targets in (None, *GROUPS.values()):
            for metric in METRICS if targets else METRICS[:2]:
                scale = 100 if metric == "ssim" else 1
                digits = 3 if targets == GROUPS["to PET"] and metric == "mae" else 2
                made.append(with_spread([mean_of(own[metric], targets) for own in several], scale, digits))
        return made

    lines = []
    for arm, seeds in runs.items():
        answers = [read_answers(output, arm, seed) for seed in seeds]
        asked = []
        for task in ("CTS", "MI", "TIA"):
            found = [own[task]["likelihood"]["accuracy"] for own in answers if task in own]
            asked.append(with_spread(found[:1] if arm == "none" else found, 100, 1))
        several = list({id(own): own for own in seeds.values()}.values())  # the base is one, whatever the seed
        lines.append([names[arm], len(several), *asked, *figures(several)])
    if copied is not None:
        lines.append(["(the source, copied)", "", "", "", "", *figures([copied])])
    return markdown_table(columns, lines)


def by_route(runs, names: dict[str, str] = NAMES) -> str:
    """SSIM of every route and arm."""
    routes = dict.fromkeys(route for seeds in runs.values() for own in seeds.values() for route, _ in own["ssim"])

    # The base is one, whatever the seed.
    several = {arm: list({id(own): own for own in seeds.values()}.values()) for arm, seeds in runs.items()}

    def of(own: dict[str, Cells], route: str) -> float | None:
        values = [value for (name, _), value in own["ssim"].items() if name == route]
        return statistics.fmean(values) if values else None

    lines = [
        [route, *(with_spread([of(own, route) for own in each], 100) for each in several.values())] for route in routes
    ]
    return markdown_table(["route, SSIM x100", *(names[arm] for arm in runs)], lines)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def difference(first: dict[int, Cells], second: dict[int, Cells]) -> dict:
    """
    Two arms on the same patients under the same seeds.

    Args:
        first, second (`dict[int, Cells]`): Seed to the figures.

    Returns:
        `dict`: `difference` (first minus second, mean over seeds, routes and patients), its `interval` over patients,
        `p` of a test by flipping signs of patients, `patients`, `by_seed`, the difference under each seed, and
        `seed_interval`, Student's 95 % interval of their mean (`None` for one seed).

    Raises:
        `ValueError`: A seed was evaluated on other cases in one of the two.
    """
    seeds = sorted(first.keys() & second.keys())
    cells = sorted(first[seeds[0]])
    for seed in seeds:
        if first[seed].keys() != second[seed].keys() or sorted(first[seed]) != cells:
            raise ValueError(f"Seed {seed} was not evaluated on the same cases in both: evaluate them alike.")
    table = np.array([[first[seed][cell] - second[seed][cell] for cell in cells] for seed in seeds])
    # Every route counts the same, and in it every patient: what each patient adds to the mean.
    in_route = Counter(route for route, _ in cells)
    table = table / np.array([in_route[route] * len(in_route) for route, _ in cells])
    routes_of: dict[str, list[str]] = {}
    for route, patient in cells:
        routes_of.setdefault(patient, []).append(route)
    patients, number = np.unique([patient for _, patient in cells], return_inverse=True)
    added = np.bincount(number, weights=table.mean(0))
    # Patients are drawn among those with the same routes: else a route would count more in one draw than in another.
    strata = [[n for n, one in enumerate(patients) if routes_of[one] == own] for own in unique(routes_of.values())]
    by_seed, seed_interval = table.sum(1), None
    if len(seeds) > 1:
        half = t.ppf(0.975, len(seeds) - 1) * by_seed.std(ddof=1) / len(seeds) ** 0.5
        seed_interval = [float(by_seed.mean() - half), float(by_seed.mean() + half)]
    return {
        "difference": float(added.sum()),
        "interval": interval_of_sum([added[stratum] for stratum in strata]),
        "p": sign_flip_p_value(added),
        "patients": len(patients),
        "by_seed": dict(zip(seeds, by_seed.tolist(), strict=True)),
        "seed_interval": seed_interval,
    }


def unique(lists: Iterable[list]) -> list[list]:
    return [list(one) for one in dict.fromkeys(map(tuple, lists))]


def interval_of_sum(strata: list[np.ndarray], bootstrap: int = 10_000, seed: int = 0) -> list[float] | None:
    """
    Where a sum over patients lies in 95 of 100 draws with replacement from each stratum; `None` where one of these is a
    single patient. Of few patients that is too narrow, see [`~synermedgen_hf.metrics.statistics.interval_of_mean`].
    """
    if min(map(len, strata)) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = sum(own[rng.integers(len(own), size=(bootstrap, len(own)))].sum(1) for own in strata)
    return np.percentile(drawn, [2.5, 97.5]).tolist()


def sign_flip_p_value(added: np.ndarray) -> float | None:
    """Two-sided p-value of the sum over patients if either arm were as good: all signs are then equally likely."""
    if len(added) < 2:
        return None
    found = permutation_test((added,), np.sum, permutation_type="samples", n_resamples=100_000, rng=0)
    return float(found.pvalue)


def compare_arms(runs, comparisons: Iterable[Comparison], metric: str = "ssim") -> dict[Comparison, dict]:
    """[`difference`] of comparisons that have been run, with `q`: `p` corrected for those that are claimed, or not."""
    found = {}
    for pair in comparisons:
        first, second = (
            {seed: own[metric] for seed, own in runs.get(arm, {}).items()} for arm in (pair.first, pair.second)
        )
        if first.keys() & second.keys():
            found[pair] = difference(first, second)
    for claimed in (True, False):
        correct_p_values(own for pair, own in found.items() if pair.claimed == claimed)
    return found


def judge(found: dict) -> str:
    """`"better"`, `"worse"` or `"undecided"`, by the rule at the head of this file."""
    intervals = [found["interval"], found["seed_interval"]]
    if None in intervals or found["q"] is None or found["q"] >= 0.05:
        return "undecided"
    if all(low > 0 for low, _ in intervals):
        return "better"
    return "worse" if all(high < 0 for _, high in intervals) else "undecided"


def why_undecided(found: dict) -> str:
    """For whom a difference does not hold."""
    patients = found["q"] is not None and found["q"] < 0.05 and leaves_out_zero(found["interval"])
    seeds = leaves_out_zero(found["seed_interval"])
    if patients and seeds:
        return "other patients and other trainings would say the opposite of each other"
    if patients:
        return "it would hold for other patients, not for other trainings"
    if seeds:
        return "it would hold for other trainings, not for other patients"
    return "it would hold for neither other patients nor other trainings"


def leaves_out_zero(interval: list[float] | None) -> bool:
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def in_words(found: dict[Comparison, dict], names: dict[str, str] = NAMES) -> str:
    """A sentence for each comparison and one for all; higher SSIM counts as better."""
    if not found:
        return "No two arms have been run that could be compared."
    said, counts = [], {"better": 0, "worse": 0, "undecided": 0}
    for pair, own in found.items():
        verdict = judge(own)
        counts[verdict] += pair.claimed
        words = {
            "better": f"better, by {100 * own['difference']:.2f}" + ": the claim holds here" * pair.claimed,
            "worse": f"worse, by {-100 * own['difference']:.2f}"
            + ": here the opposite of the claim holds" * pair.claimed,
            "undecided": f"undecided ({100 * own['difference']:+.2f}): {why_undecided(own)}",
        }[verdict]
        patients, seeds = (
            " to ".join(f"{100 * end:+.2f}" for end in own[name]) if own[name] else "none"
            for name in ("interval", "seed_interval")
        )
        each = ", ".join(f"{100 * value:+.2f}" for value in own["by_seed"].values())
        test = "" if own["q"] is None else f"; q = {own['q']:.2g}"
        run = len(own["by_seed"])
        few = f" With {run} of {SEEDS_WANTED} seeds, this is a first look and no result." if run < SEEDS_WANTED else ""
        said.append(
            f"- **{names[pair.first]}** against {names[pair.second]}, SSIM x100: {words}. 95 % interval over "
            f"{own['patients']} patients: {patients}{test}; over seeds: {seeds} ({each}).{few}"
        )
    whole = (
        f"Of {sum(counts.values())} comparisons that the paper claims something of, the claim holds in "
        f"{counts['better']}, its opposite in {counts['worse']}, and {counts['undecided']} are undecided."
    )
    return "\n".join([*said, "", whole])


def gain(output: Path, config: dict, arm: str, task: str) -> tuple[float, list[float] | None]:
    """Share of right answers above that of the base on the same questions, mean over seeds, and where over patients."""
    before = read_right(output, "none", 0, task)
    seeds = [seed for seed in config["seeds"] if (answers_of(output, arm, seed) / CASES).exists()]
    runs = [read_right(output, arm, seed, task) for seed in seeds]
    if any(run.keys() != before.keys() for run in runs):
        raise ValueError(f"{arm} was not asked the same questions of {task} as the base: ask alike.")
    gained = [statistics.fmean(run[one][1] for run in runs) - right for one, (_, right) in before.items()]
    _, number = np.unique([patient for patient, _ in before.values()], return_inverse=True)
    interval = interval_of_mean(np.bincount(number, weights=gained), np.bincount(number))
    return statistics.fmean(gained), interval


def what_was_learned(output: Path, config: dict) -> str:
    """Whether Stage I taught its tasks, beyond what the base knew: without that, Stage II says little of the claim."""
    said, base = [], read_answers(output, "none", 0)
    for task, arms in LEARNERS.items():
        for arm in arms:
            answers = [read_answers(output, arm, seed) for seed in config["seeds"] if arm in config["arms"]]
            found = [own[task] for own in answers if task in own]
            if not found:
                continue
            answered, chance = [own["likelihood"] for own in found], found[0]["chance"]
            share = with_spread([own["accuracy"] for own in answered], 100, 1)
            beside, verdict = f"chance {100 * chance:.0f} %", "learned"
            if min(own["interval"][0] if own["interval"] else 0 for own in answered) <= chance:
                verdict = "not shown to be learned: what follows says little of this task"
            elif task in base:
                more, (low, high) = gain(output, config, arm, task)
                beside = f"by the base {100 * base[task]['likelihood']['accuracy']:.1f} %, {beside}"
                by = f"by {100 * more:+.1f} ({100 * low:+.1f} to {100 * high:+.1f} over patients)"
                if low > 0:
                    verdict = f"better than by the base, {by}"
                elif high < 0:
                    verdict = f"worse than by the base, {by}: what follows says little of this task"
                else:
                    verdict = f"known, but not shown to be better, {by}: what follows says little of this task"
            said.append(f"- {task} by {NAMES[arm]}: {share} % right, {beside}: {verdict}.")
    return "\n".join(said) or "Not asked yet."


def what_is_measured(firsts: dict[str, dict]) -> str:
    """The figures' full names and, of the stamps, what they have in common."""
    names = dict.fromkeys(figure_of(record, metric) for record in firsts.values() for metric in METRICS)
    stamps = [record["protocol"] for record in firsts.values()]
    common = {name: value for name, value in stamps[0].items() if all(one.get(name) == value for one in stamps)}
    stamp = "; ".join(f"{name}: {value}" for name, value in common.items())
    return f"SSIM, PSNR and MAE are `{'`, `'.join(names)}`. Stamp: {stamp}."


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def read_curves(output: Path, config: dict) -> dict[str, dict[str, dict[int, tuple[list, list]]]]:
    """Panel to arm to seed to steps and values."""
    panels: dict[str, dict[str, dict[int, tuple[list, list]]]] = {}

    def keep(panel: str, arm: str, seed: int, points: list[tuple[int, float]]):
        if points:
            panels.setdefault(panel, {}).setdefault(arm, {})[seed] = tuple(map(list, zip(*points, strict=True)))

    for seed in config["seeds"]:
        for arm in config["arms"]:
            here, log = output / f"seed{seed}" / arm, output / f"seed{seed}" / arm / "stage2" / "log.jsonl"
            state, name = here / "stage1" / "trainer_state.json", "eval_accuracy/CTS"
            if state.exists():
                history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
                points = [(row["step"], row[name]) for row in history if name in row]
                keep("Stage I: CTS on held-out patients, %", arm, seed, points)
            if log.exists():
                rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
                points = [(row["step"], row["loss_mse"]) for row in rows if "loss_mse" in row]
                keep("Stage II: training loss", arm, seed, points)
                held = [(r["step"], [v for k, v in r.items() if k.startswith("validation/loss_mse/")]) for r in rows]
                points = [(step, statistics.fmean(values)) for step, values in held if values]
                keep("Stage II: loss on held-out patients", arm, seed, points)
    return panels


def draw_curves(panels, file: Path):
    """A panel each: the mean over seeds, and a band from the lowest to the highest."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("Curves need matplotlib: pip install 'synermedgen-hf[phantom]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
    for place, (title, arms) in zip(axes[0], panels.items(), strict=True):
        for number, (arm, seeds) in enumerate(arms.items()):
            steps = sorted(set.intersection(*(set(xs) for xs, _ in seeds.values())))
            values = np.array([[dict(zip(xs, ys, strict=True))[step] for step in steps] for xs, ys in seeds.values()])
            place.plot(steps, values.mean(0), color=f"C{number}", label=NAMES[arm], linewidth=1.2)
            place.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        place.set_title(title, fontsize=10)
        place.set_xlabel("step")
        place.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_report(output: Path) -> str:
    """
    Write `report.md` and `curves.png` from what has been run so far.

    Args:
        output (`Path`): Folder of the ablation.

    Returns:
        `str`: The Markdown.
    """
    config = json.loads((output / CONFIG).read_text(encoding="utf-8"))
    settings = config["settings"]
    states = len(config.get("code", []))
    mixed = f" The steps were run with {states} states of the code, see `{CONFIG}`." if states > 1 else ""
    parts = [
        "# What the ablation found",
        "Written by `examples/ablation/report.py`. Toy weights, simulated patients: these figures say what happens at "
        f"this size, not at the paper's. Protocol of all evaluations: `{settings['protocol']}`, slices; "
        f"{settings['test_cases']} held-out patients of each kind. Mean ± standard deviation over seeds.{mixed}",
        HOW_DECIDED,
        "### What Stage I taught",
        what_was_learned(output, config),
    ]
    for scanner, title in (("usual", "Held-out patients, usual scanners"), ("unseen", "Unseen scanners")):
        firsts: dict[str, dict] = {}
        if not (runs := read_runs(output, config, scanner, firsts)):
            continue
        copied = output / "copy" / scanner
        copied = read_cells(copied, firsts) if (copied / CASES).exists() else None
        found = compare_arms(runs, STAGE_TWO)
        parts += [f"### {title}: Stage II after ...", what_is_measured(firsts), overview(output, runs, copied)]
        parts += ["#### Verdict", in_words(found), "#### By route", by_route(runs)]
    for scanner in ("usual", "unseen"):
        if runs := read_runs(output, config, f"zero-{scanner}", {}):
            names = NAMES | {"none": "the base itself"}
            parts += [f"### Without Stage II (zero-shot), {scanner} scanners", overview(output, runs, None, names)]
            parts += ["#### Verdict", in_words(compare_arms(runs, ZERO_SHOT), names)]
            parts += ["#### By route", by_route(runs, names)]
    if panels := read_curves(output, config):
        draw_curves(panels, output / CURVES)
        parts += ["### Learning curves", f"![Mean over seeds, and the band of all of them]({CURVES})"]
    parts += [
        "### The paper's own figures",
        "Published for other weights, data and a protocol that is not public; not comparable with anything above. Of "
        "its ablation of tasks and negatives, no figure is public.",
        markdown_table(["", "after ordinary questions", "after CTS + MI + TIA"], [list(row) for row in PAPER]),
        PAPER_UNSEEN,
    ]
    text = "\n\n".join(parts) + "\n"
    write_whole(output / REPORT, text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder that run.py wrote")
    print(write_report(parser.parse_args().output_dir))
