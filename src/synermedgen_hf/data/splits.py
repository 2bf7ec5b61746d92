"""Who goes into which split, by patient, and the report of what was skipped or repaired: two small files."""

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np

from .sources import CaseRecord, Problem

SPLITS = ("train", "validation", "test")


def hash_unit(*parts) -> float:
    """A number in [0, 1) that depends on nothing but the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_patients(cases: list[CaseRecord], ratios: tuple[float, ...], seed: int) -> dict[str, str]:
    """
    Patient (`dataset/patient_id`) -> split. All cases of a patient go together; within every centre of every dataset
    and region, patients are ranked by a hash and shared out by the ratios.

    Raises:
        `ValueError`: The ratios are not three numbers of at least 0 with the sum 1.
    """
    if len(ratios) != 3 or min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(f"split_ratios must be three numbers of at least 0 that add up to 1, got {ratios}.")
    strata: dict[tuple, list[str]] = defaultdict(list)
    seen = set()
    for case in sorted(cases, key=lambda case: case.name):
        patient = f"{case.dataset}/{case.patient_id}"
        if patient not in seen:
            seen.add(patient)
            strata[case.dataset, case.region, case.centre].append(patient)
    # Within a stratum alone, so that whatever else is there moves nobody; a patient more or less moves those at the two
    # edges at most. Where the edges fall between patients, the stratum's own hash decides.
    assigned, edges = {}, np.cumsum(ratios)[:2]
    for stratum, patients in strata.items():
        ranked = sorted(patients, key=lambda patient: (hash_unit(seed, patient), patient))
        offset = hash_unit(seed, *stratum)
        for place, patient in enumerate(ranked):
            assigned[patient] = SPLITS[int(np.searchsorted(edges * len(ranked), place + offset, side="right"))]
    # A handful of patients still makes every split: the largest gives one away.
    for split, ratio in zip(SPLITS, ratios, strict=True):
        if ratio > 0 and split not in assigned.values() and (split == "train" or len(assigned) >= len(SPLITS)):
            largest = max(SPLITS, key=list(assigned.values()).count)
            spare = [patient for patient, where in assigned.items() if where == largest]
            assigned[max(spare, key=lambda patient: hash_unit(seed, patient))] = split
    return assigned


def write_splits(path: Path, assigned: dict[str, str], ratios, seed: int):
    """`splits.json`: who went where, with a checksum of each split."""
    content = {"seed": seed, "ratios": list(ratios), "splits": {}}
    for split in SPLITS:
        patients = sorted(patient for patient, where in assigned.items() if where == split)
        checksum = hashlib.sha256("\n".join(patients).encode()).hexdigest()
        content["splits"][split] = {"patients": patients, "count": len(patients), "sha256": checksum}
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_splits(path: str | Path) -> dict[str, str]:
    """
    The splits of an earlier build.

    Raises:
        `ValueError`: The file was changed (a checksum does not fit), or puts a patient into two splits.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict) or not all({"patients", "sha256"} <= set(entry) for entry in splits.values()):
        raise ValueError(f"{path} is no splits.json of an earlier build.")
    if odd := sorted(set(splits) - set(SPLITS)):
        raise ValueError(f"{path} has a split {odd[0]!r}; known are {', '.join(SPLITS)}.")
    assigned = {}
    for split, entry in splits.items():
        if hashlib.sha256("\n".join(entry["patients"]).encode()).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: the checksum of {split} does not fit its patients; the file was changed.")
        for patient in entry["patients"]:
            if patient in assigned:
                raise ValueError(f"{path}: {patient} is in {assigned[patient]} and in {split}.")
            assigned[patient] = split
    return assigned


def write_whole(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the number of the process: in containers that share a folder it may be the same.
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def add_problem(path: str, problem: Problem):
    """Append to a report, from any process: one short line is written at once."""
    with open(path, "a", encoding="utf-8") as report:
        report.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")


def read_report(path: str | Path) -> list[Problem]:
    """What was skipped or repaired, each once: a stream that is read twice says it twice."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return list(dict.fromkeys(Problem(**json.loads(line)) for line in lines))
