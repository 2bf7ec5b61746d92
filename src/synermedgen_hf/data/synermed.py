"""`load_dataset("synermed", ...)`: pairs and understanding tasks from the scans people have.

    import synermedgen_hf                                             # registers the name
    load_dataset("synermed", data_dir="/data/SynthRAD2023")           # pairs, both directions
    load_dataset("synermed", "understanding", data_dir="/data", streaming=True)
    load_dataset("synermed", "phantom")                               # simulated patients, no data needed

A case is the unit of everything: it is read once, its rows follow one another, it belongs to one split, it is one shard
of a stream, and if it is bad, it is skipped with a reason. Splits go by patient. What was skipped or repaired, and who
went into which split, is written to a folder that is named when the dataset is built.
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from datasets import Features, Image, List, Value

from .pairs import PAIR_FEATURES, has_wanted_pair, is_wanted, pair_rows
from .phantom import PROTOCOLS, SPLIT_SEEDS, simulate_volume
from .phantom_scanners import SCANNERS
from .released import find_released, read_generation_rows, read_understanding_rows, released_shards
from .sources import (
    MANIFESTS,
    MODALITIES,
    CaseError,
    CaseRecord,
    LoadedCase,
    Problem,
    absent_parts,
    keep_pairs,
    load_case,
    measure_windows,
    scan,
)
from .splits import SPLITS, add_problem, hash_unit, read_report, read_splits, split_patients, write_splits, write_whole
from .understanding import UNREADABLE, TaskSampler

logger = datasets.utils.logging.get_logger(__name__)

UNDERSTANDING_FEATURES = Features(
    {
        "images": List(Image()),  # 8-bit, over the windows of their volumes
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "task": Value("string"),  # CTS, MI, TIA or VQA
        "question": Value("string"),
        "options": List(Value("string")),
        "meanings": List(Value("string")),  # what each option stands for: slice offset, modality, or direction
        "answer": Value("string"),  # one of the options
        "route": Value("string"),  # such as brain/MRI-CT
        "difficulty": Value("string"),  # easy or hard
        "region": Value("string"),
        "dataset": Value("string"),
        "case_id": Value("string"),
        "patient_id": Value("string"),
        "slice_index": Value("int32"),
        "index": Value("int64"),  # in the order of the split, skipped ones counted
    }
)
# `dataset.info.description`.
COLUMNS = """\
Pairs: source_image and target_image are float32 slices of one grid (mode F) in the unit of source_window and
target_window, which hold unit (HU, SUV, a.u. or grey level), low and high of the whole volume; source_modality and
target_modality are T1, T1CE, T2, FLAIR, MRI, CT, CBCT or PET; spacing is mm between slices, rows and columns;
slice_index counts along axis from the feet up (axial) or from back to front (coronal); mask (body) and lesion are of
mode 1, so arrays of bool, or None.
Questions: images are 8-bit grey over the window of their volume, with square pixels; messages are the chat; task is
CTS, MI, TIA or VQA; answer is one of options, and meanings say what each option stands for (slices from the right one,
modality, or direction); difficulty is easy or hard; index is the place in the order of the split."""
TASKS = {"understanding": ("CTS", "TIA", "MI"), "cts": ("CTS",), "mi": ("MI",), "tia": ("TIA",), "vqa": ("VQA",)}


@dataclass
class SynerMedConfig(datasets.BuilderConfig):
    """
    Options of `load_dataset("synermed", name, ...)`.

    Args:
        name (`str`): `"pairs"` (default), `"understanding"` (all three tasks, or those of `mix`), `"cts"`, `"mi"`,
            `"tia"`, `"vqa"` (a control: ordinary questions on the same images), `"phantom"` (pairs of simulated
            patients).
        data_dir (`str`): A dataset's root or a folder of several; known layouts are listed in
            [`~synermedgen_hf.data.sources.scan`]. Or `data_files="manifest.csv"` for own data.
        strict (`bool`, defaults to `False`): Raise for the first bad case instead of skipping it.
        routes (`list[str]`, *optional*): Only these, such as `"MRI-CT"` or `"brain/MRI-CT"`.
        slice_step (`int`, defaults to 1): Every so many usable slices of a case (pairs).
        min_share (`float`, defaults to 0.02): Smallest share of the frame that the body must cover.
        split_ratios (`tuple`, defaults to `(0.8, 0.1, 0.1)`): Of patients, within every centre of every dataset.
        split_seed (`int`, defaults to 0): Another one draws other patients.
        split_file (`str`, *optional*): A `splits.json` of an earlier build, to use its splits.
        report_dir (`str`, *optional*): Where `splits.json` and `report.jsonl` go; by default into the cache.
        seed, per_case, candidates, descriptions, panels, neighbours, min_gap_mm, difficulty, mix,
            name_share, listing_share, label_images: Of the tasks; see
            [`~synermedgen_hf.data.understanding.TaskSampler`].
        phantom_cases (`int` or `list[int]`, defaults to 0): Simulated patients per protocol instead of files, in each
            split, or in training, validation and test.
        phantom_slices, phantom_size (`int`): Axial slices per patient (by default the whole region), pixels of the
            longer side.
        phantom_scanner (`str`, defaults to `"usual"`): Or `"unseen"`: the same simulated patients in machines outside
            of the usual range.
    """

    task: str = "pairs"
    strict: bool = False
    routes: list[str] | None = None
    slice_step: int = 1
    min_share: float = 0.02
    split_ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_seed: int = 0
    split_file: str | None = None
    report_dir: str | None = None
    seed: int = 0
    per_case: int = 32
    candidates: int = 4
    descriptions: int = 4
    panels: int = 4
    neighbours: int = 8
    min_gap_mm: float = 4.0
    difficulty: str = "hard"
    mix: dict[str, float] | None = None
    name_share: float = 0.5
    listing_share: float = 0.0
    label_images: bool = False
    phantom_cases: int | list[int] = 0
    phantom_slices: int | None = None
    phantom_size: int = 128
    phantom_scanner: str = "usual"

    def create_config_id(self, config_kwargs: dict, custom_features=None) -> str:
        """The name of the cache: options, and names, sizes and times of all files."""
        self.check_options()
        self.find_cases()
        state = hashlib.sha256(repr(self.cases).encode())
        for path in sorted(path for case in self.cases for path in case.paths) + sorted(self.released.values()):
            for file in belonging(path):
                status = os.stat(file)
                state.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
        if self.split_file:
            state.update(Path(self.split_file).read_bytes())
        return super().create_config_id({**config_kwargs, "files": state.hexdigest()}, custom_features)

    def check_options(self):
        """Raise a `ValueError` for options that cannot be used, before any file is looked at."""
        if self.slice_step < 1 or self.per_case < 1:
            raise ValueError(f"slice_step and per_case must be at least 1, got {self.slice_step} and {self.per_case}.")
        if isinstance(self.routes, str):
            self.routes = [self.routes]
        if isinstance(self.phantom_cases, int):
            self.phantom_cases = [self.phantom_cases] * len(SPLITS)
        if len(self.phantom_cases) != len(SPLITS) or min(self.phantom_cases) < 0:
            raise ValueError(f"phantom_cases must be one number, or one for each of {', '.join(SPLITS)}.")
        if self.phantom_scanner not in SCANNERS or (self.phantom_scanner != "usual" and not any(self.phantom_cases)):
            known = ", ".join(SCANNERS)
            raise ValueError(f"phantom_scanner is one of {known} for simulated patients, got {self.phantom_scanner!r}.")
        if not 0 <= self.min_share < 1:
            raise ValueError(f"min_share must be within [0, 1), got {self.min_share}.")
        if self.task != "pairs":
            self.sampler(1, lambda place: None)  # says which option cannot be
        if self.routes is not None:
            if self.task != "pairs":
                raise ValueError("routes choose pairs; the tasks are made from all modalities of a case.")
            names = "|".join(MODALITIES)
            for route in self.routes:
                if not re.fullmatch(rf"([\w-]+/)?({names})-({names})", route):
                    raise ValueError(f"{route!r} names no route: it is written like MRI-CT or brain/MRI-CT.")
        if self.data_files and set(map(str, self.data_files)) - {"train"}:
            raise ValueError("Splits are made here, by patient: pass data_files as files, not by split.")

    def sampler(self, n_cases: int, load) -> TaskSampler:
        """The tasks over a table of cases."""
        return TaskSampler(
            n_cases,
            load,
            tasks=tuple(self.mix) if self.mix and self.task == "understanding" else TASKS[self.task],
            seed=self.seed,
            per_case=self.per_case,
            candidates=self.candidates,
            descriptions=self.descriptions,
            panels=self.panels,
            neighbours=self.neighbours,
            min_gap_mm=self.min_gap_mm,
            difficulty=self.difficulty,
            mix=self.mix,
            name_share=self.name_share,
            listing_share=self.listing_share,
            label_images=self.label_images,
        )

    def find_cases(self):
        """Look for cases by name, or say what to pass."""
        self.cases, self.problems, self.released = [], [], {}
        if any(self.phantom_cases):
            return
        files = [str(file) for split in (self.data_files or {}).values() for file in split]
        roots = files or ([str(self.data_dir)] if self.data_dir else [])
        if not roots:
            raise ValueError(
                'load_dataset("synermed", ...) needs the scans: pass data_dir="/path/to/SynthRAD2023" (or BraTS, '
                'AutoPET, a folder of several), or data_files="manifest.csv" for your own. '
                'load_dataset("synermed", "phantom") needs none.'
            )
        for root in roots:
            self.released = self.released or find_released(root)
        found: dict[str, CaseRecord] = {}
        for root in roots:
            # A released file named by itself is no manifest.
            cases, problems = scan(root) if not self.released or Path(root).is_dir() else ([], [])
            self.problems += problems
            for case in cases:
                if case.name in found:
                    reason = "a case of this name was found already; the first one counts"
                    self.problems.append(Problem("skipped", case.name, root, reason))
                found.setdefault(case.name, case)
        self.cases = list(found.values())
        self.cases, more = keep_pairs(self.cases)
        self.problems += more + absent_parts(self.cases)
        if self.released and self.cases:
            reason = (
                f"{len(self.cases)} cases of scans beside the authors' released files; name their own folder to read"
            )
            self.problems.append(Problem("skipped", "", roots[0], f"{reason} them"))
            self.cases = []
        skipped = [problem for problem in self.problems if problem.kind == "skipped"]
        if self.strict and skipped:
            raise ValueError(f"{skipped[0].path}: {skipped[0].reason}")
        if self.released:
            return
        if not self.cases:
            inside = list(Path(roots[0]).glob("*")) if Path(roots[0]).is_dir() else None
            if inside is None or any(file.name in MANIFESTS for file in inside):
                empty = "manifest.csv or manifest.jsonl holds no case" if inside else "the manifest holds no case"
            elif inside:
                empty = "no volume of a known format; DICOM folders go through a manifest"
            else:
                empty = "the folder is empty"
            seen = "; ".join(f"{one.path}: {one.reason}" for one in self.problems[:3]) or empty
            raise ValueError(f"There is no pair of scans below {', '.join(roots)} ({seen}).")
        there = {
            (case.region, f"{source}-{target}")
            for case in self.cases
            for source in case.files
            for target in case.files
            if source != target
        }
        if self.routes and not any(is_wanted(*route.split("-", 1), region, self.routes) for region, route in there):
            known = ", ".join(sorted(f"{region}/{route}" for region, route in there))
            raise ValueError(f"No case has one of the routes {', '.join(self.routes)}; there are {known}.")


def belonging(path: str) -> list[str]:
    """The files that a path of a volume stands for: slices of a DICOM folder, raw data beside a header."""
    if os.path.isdir(path):
        return sorted(str(file) for file in Path(path).iterdir() if file.is_file())
    if path.lower().endswith((".mhd", ".nhdr")):
        return sorted(str(file) for file in Path(path).parent.glob(f"{Path(path).stem}.*"))
    return [path] if os.path.exists(path) else []  # what is not there is said when the case is read


def phantom_records(split: str, count: int, scanner: str = "usual") -> list[CaseRecord]:
    """Simulated patients as records: no files, seed and scanner are in the names."""
    first = SPLIT_SEEDS[split]
    return [
        CaseRecord(
            dataset=f"phantom-{protocol}" if scanner == "usual" else f"phantom-{protocol}-{scanner}",
            case_id=f"{region}-{seed}",
            patient_id=f"{region}-{seed}",
            region=region,
            axis="coronal" if region == "whole-body" else "axial",
            files={name: "" for name in modalities},
        )
        for (region, protocol), modalities in PROTOCOLS.items()
        for seed in range(first, first + count)
    ]


def load_phantom_case(record: CaseRecord, num_slices: int | None, size: int, min_share: float = 0.02) -> LoadedCase:
    """A simulated patient in the form of [`load_case`]."""
    protocol, _, scanner = record.dataset.removeprefix("phantom-").partition("-")
    seed = int(record.case_id.rsplit("-", 1)[1])
    case = simulate_volume(record.region, protocol, seed, size, num_slices, scanner=scanner or "usual")
    usable = np.flatnonzero(case.mask.mean((1, 2)) >= min_share)
    windows = measure_windows(case.images)
    return LoadedCase(record, case.images, case.mask, case.lesion, case.spacing, windows, usable)


# ---------------------------------------------------------------------------------------------------------------------
# The builder
# ---------------------------------------------------------------------------------------------------------------------


class SynerMed(datasets.GeneratorBasedBuilder):
    """See the head of this file and [`SynerMedConfig`]."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = SynerMedConfig
    BUILDER_CONFIGS = [
        SynerMedConfig(name="pairs", description="Source and target slices in scanner units, both directions"),
        SynerMedConfig(name="understanding", task="understanding", description="CTS, MI and TIA made from the pairs"),
        SynerMedConfig(name="cts", task="cts", description="Which slice belongs to this one"),
        SynerMedConfig(name="mi", task="mi", description="Which modality is it"),
        SynerMedConfig(name="tia", task="tia", description="What does the change of modality change"),
        SynerMedConfig(name="vqa", task="vqa", description="A control: ordinary questions on the same images"),
        SynerMedConfig(name="phantom", phantom_cases=4, description="Pairs of simulated patients"),
    ]
    DEFAULT_CONFIG_NAME = "pairs"
    # A row holds two float32 slices; the default of 1000 rows would hold half a gigabyte.
    DEFAULT_WRITER_BATCH_SIZE = 50

    def _info(self):
        features = PAIR_FEATURES if self.config.task == "pairs" else UNDERSTANDING_FEATURES
        return datasets.DatasetInfo(description=f"{self.config.description}\n\n{COLUMNS}", features=features)

    def _split_generators(self, dl_manager):
        config = self.config
        folder = Path(config.report_dir or Path(self._cache_dir_root) / "synermed-reports" / self.config_id)
        folder.mkdir(parents=True, exist_ok=True)
        report = folder / "report.jsonl"
        if not dl_manager.is_streaming or not report.exists():  # a stream adds to the report of a build
            write_whole(report, "")
        for problem in config.problems:
            add_problem(str(report), problem)
        self.report_file, self.said = report, set()
        if config.released:
            logger.warning(f"SynerMed: the authors' released files. Report: {folder}")
        common = {"report": str(report)}
        if config.released:
            return [
                datasets.SplitGenerator(name, {"shards": shards, "split": name, **common})
                for name, shards in released_shards(config.released, config.task).items()
            ]
        if any(config.phantom_cases):
            by_split = {
                split: phantom_records(split, count, config.phantom_scanner)
                for split, count in zip(SPLITS, config.phantom_cases, strict=True)
            }
        else:
            assigned = split_patients(config.cases, config.split_ratios, config.split_seed)
            if config.split_file:
                known = read_splits(config.split_file)
                if new := sum(patient not in known for patient in assigned):
                    logger.warning(f"SynerMed: {new} patients are not in {config.split_file} and were split anew.")
                assigned = {patient: known.get(patient, split) for patient, split in assigned.items()}
            write_splits(folder / "splits.json", assigned, config.split_ratios, config.split_seed)
            by_split = {split: [] for split in SPLITS}
            for case in config.cases:
                by_split[assigned[f"{case.dataset}/{case.patient_id}"]].append(case)
            datasets_found = Counter(case.dataset for case in config.cases)
            skipped = sum(problem.kind == "skipped" for problem in config.problems)
            found = ", ".join(f"{count} {name}" for name, count in datasets_found.items())
            logger.warning(
                f"SynerMed: {len(config.cases)} cases ({found}), {len(assigned)} patients; {skipped} things skipped by "
                f"name. Splits and report: {folder}"
            )
        generators = []
        for split, cases in by_split.items():
            # What has no pair of the routes asked for need not be read.
            wanted = [case for case in cases if has_wanted_pair(case.files, case.region, config.routes)]
            cases = wanted or cases[:1]  # a split without any is not one that does not exist
            if not cases:
                continue
            # Neighbours in the table are of different datasets and centres, as far as there are several.
            table = tuple(sorted(cases, key=lambda case: (hash_unit(config.split_seed, case.name), case.name)))
            arguments = {"shards": list(range(len(table))), "split": split, "table": table, **common}
            generators.append(datasets.SplitGenerator(split, arguments))
        return generators

    def _generate_examples(self, shards, split, report, table=()):
        config = self.config
        if config.released:
            read = read_generation_rows if config.task == "pairs" else read_understanding_rows
            tasks = TASKS.get(config.task, ())
            yield from read(shards, split, config, tasks, partial(self._problem, report))
            return
        if config.task == "pairs":
            for place in shards:
                case = self._load(report, table[place])
                if case is not None:
                    yield from pair_rows(case, config.routes, config.slice_step)
            return
        sampler = config.sampler(len(table), lambda place: self._load(report, table[place]))
        for place in shards:
            reasons: Counter = Counter()
            for index in range(place * config.per_case, (place + 1) * config.per_case):
                row, reason = sampler.draw(index)
                if row is not None:
                    yield f"{split}/{index}", row
                else:
                    reasons[reason] += 1
            for reason, count in reasons.items():
                if reason.endswith(UNREADABLE):
                    continue  # the case itself has been reported
                path = next(iter(table[place].files.values()))
                problem = Problem("skipped", table[place].name, path, f"{count} questions: {reason}")
                self._problem(report, problem, fatal=False)

    def _load(self, report: str, record: CaseRecord) -> LoadedCase | None:
        """A case, or `None` with a line in the report."""
        config = self.config
        if any(config.phantom_cases):
            return load_phantom_case(record, config.phantom_slices, config.phantom_size, config.min_share)
        try:
            case = load_case(record, config.min_share)
            if len(case.usable) == 0:
                raise ValueError(f"no slice shows the patient on at least {config.min_share:.0%} of the frame")
        except (ImportError, MemoryError):
            raise  # nothing is wrong with the case
        except Exception as error:  # whatever one file makes a reader do, the other cases are wanted
            path = error.path if isinstance(error, CaseError) else next(iter(record.files.values()))
            reason = error.reason if isinstance(error, CaseError) else f"{error}" or type(error).__name__
            self._problem(report, Problem("skipped", record.name, path, reason))
            return None
        for note in case.notes:
            self._problem(report, Problem("repaired", record.name, note.path, str(note)))
        return case

    def _problem(self, report: str, problem: Problem, fatal: bool = True):
        if self.config.strict and problem.kind == "skipped" and fatal:
            raise ValueError(f"{problem.case}: {problem.path}: {problem.reason}".removeprefix(": "))
        # A stream is read again and again; what it has said once is known.
        if problem not in self.said:
            self.said.add(problem)
            add_problem(report, problem)

    def _download_and_prepare(self, *args, **kwargs):
        super()._download_and_prepare(*args, **kwargs)
        # A split whose every case was bad has no rows, and would make the others unreadable.
        for empty in [name for name, split in self.info.splits.items() if split.num_examples == 0]:
            del self.info.splits[empty]
            logger.warning(f"SynerMed: the split {empty} has no rows and is left out.")
        if not self.info.splits:
            raise ValueError(f"No row could be made of these scans; reasons in {self.report_file}")
        counts = Counter(problem.kind for problem in read_report(self.report_file))
        if counts:
            said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            logger.warning(f"SynerMed: {said}; reasons in {self.report_file}")
