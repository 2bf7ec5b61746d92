"""The authors' released SynerMed files as they are: `SynerMed.parquet`, `SynerMed.jsonl` and the pictures in `slice/`.

They hold 8-bit pictures whose windows are unknown, so their unit is the grey level. The Parquet file (generation) names
neither patients nor modalities: the route is read from the instruction where it says so, and everything is training
data. The JSON lines (understanding) name their pictures, and with them the patient, by which they are split.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image as PILImage

from .pairs import encode_slice, is_wanted
from .sources import BRATS_TIME_POINT, Problem
from .splits import SPLITS, hash_unit
from .understanding import CALLED, find_modalities, parse_answer, parse_listing, parse_modality

PARQUET, JSONL, SLICES = "SynerMed.parquet", "SynerMed.jsonl", "slice"
RANGE_BYTES = 64 << 20  # of the JSON lines in one shard
WINDOW = {"unit": "grey level", "low": 0.0, "high": 255.0}

REGION_WORDS = (("brain", r"\bbrain|\bhead\b"), ("pelvis", r"\bpelvi"), ("whole-body", r"whole[- ]body"))
MARKER = "<image>"
# A letter that is the whole answer: a description of what changes may well say "image B".
LETTER_ALONE = re.compile(rf"\W*(?i:the\s+)?(?i:(?:correct\s+)?answer\s*(?:is|:)?\W*)?(?:{CALLED})?\W*[A-Za-z]\W*")


def find_released(root: str | Path) -> dict[str, str]:
    """
    Paths of the released files, `parquet`, `jsonl` and `slices`: in a folder, in a folder inside it, or named directly.
    Empty if there are none.
    """
    root = Path(root).expanduser()
    if root.is_file():
        return _released_in(root.parent, {root.name})
    inside = sorted(root.iterdir()) if root.is_dir() else []
    return next(filter(None, (_released_in(folder, {PARQUET, JSONL}) for folder in (root, *inside))), {})


def _released_in(folder: Path, named: set[str]) -> dict[str, str]:
    found = {}
    for key, name in (("parquet", PARQUET), ("jsonl", JSONL)):
        if name in named and (folder / name).is_file():
            found[key] = str(folder / name)
    if found and (folder / SLICES).is_dir():
        found["slices"] = str(folder / SLICES)
    return found


def released_shards(released: dict[str, str], task: str) -> dict[str, list]:
    """
    Split -> shards: row groups of the Parquet file, or ranges of bytes of the JSON lines.

    Raises:
        `ValueError`: The file that this configuration reads is not there.
    """
    needed, name = ("parquet", PARQUET) if task == "pairs" else ("jsonl", JSONL)
    if needed not in released:
        raise ValueError(f"The configuration {task!r} reads {name}, and there is only {', '.join(released.values())}.")
    path = released[needed]
    if task == "pairs":
        groups = pyarrow.parquet.ParquetFile(path).num_row_groups
        return {"train": [(path, group) for group in range(groups)]}
    if "slices" not in released:
        raise ValueError(f"{path} names pictures in a folder {SLICES}/ beside it, which is not there.")
    size = os.path.getsize(path)
    ranges = [(path, start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
    return {split: list(ranges) for split in SPLITS}


def fold_modality(label: str) -> str | None:
    """One of the eight modalities for a label or a folder's name, such as `"T2 (MRI)"` or `"ct_FDG"`; or `None`."""
    return parse_modality(label.replace("_", " "))


# Words whose object is the image to make, and those whose object is the given one.
TARGET_WORD = r"to|into|generate|synthesi[sz]e|produce|create|predict"
SOURCE_WORD = r"from|given|using|convert|translate|transform|turn|change"


def parse_route(instruction: str) -> tuple[str | None, str | None]:
    """
    Source and target of an instruction. Every modality it names belongs to the nearest word before it that tells
    ("into", "from", "generate", ...) and has none yet; one without such a word is the source. `None` for what it does
    not say.
    """
    cues = [(match.start(), "target") for match in re.finditer(rf"\b(?:{TARGET_WORD})\b", instruction, re.IGNORECASE)]
    cues += [(match.start(), "source") for match in re.finditer(rf"\b(?:{SOURCE_WORD})\b", instruction, re.IGNORECASE)]
    found: dict[str, str] = {}
    before_any = bool(cues)
    for place, modality in find_modalities(instruction):
        before = [cue for cue in cues if cue[0] < place]
        cue = max(before, default=(0, "source"))
        if before:
            cues.remove(cue)
        found.setdefault(cue[1], modality)
    source, target = found.get("source"), found.get("target")
    if target is None and not before_any:
        return None, None
    return (None if source == target else source), target


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


def read_generation_rows(
    shards: list, split: str, config, tasks: tuple, problem: Callable[[Problem], None]
) -> Iterator[tuple[str, dict]]:
    """
    Pairs of the Parquet file, in the columns of the builder. Of the wordings of an instruction one is chosen by a hash
    of the row; a chain of images gives each step, several sources with one instruction give each source.
    """
    for path, group in shards:
        file = pyarrow.parquet.ParquetFile(path)
        unsure, number = 0, 0
        for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=["image_list", "instruction_list"]):
            for row in batch.to_pylist():
                name = f"row-{group}-{number}"
                number += 1
                try:
                    images = [_read_grey(data) for data in row["image_list"] or []]
                    steps = _steps(images, row["instruction_list"] or [])
                except (OSError, ValueError, SyntaxError) as error:
                    problem(Problem("skipped", f"synermed/{name}", path, f"row group {group}: {error}"))
                    continue
                for step, (first, last, wordings) in enumerate(steps):
                    text = wordings[int(hash_unit(config.seed, name, step) * len(wordings))]
                    source, target = parse_route(text)
                    unsure += source is None or target is None
                    region = next((region for region, word in REGION_WORDS if re.search(word, text.lower())), "")
                    if not is_wanted(source, target, region, config.routes):
                        continue
                    yield (
                        f"{name}/{step}",
                        {
                            "source_image": encode_slice(images[first]),
                            "target_image": encode_slice(images[last]),
                            "source_modality": source or "",
                            "target_modality": target or "",
                            "region": region,
                            "axis": "",
                            "slice_index": -1,
                            "spacing": [0.0, 0.0, 0.0],
                            "dataset": "synermed",
                            "case_id": name,
                            "patient_id": "",
                            "centre": "",
                            "mask": None,
                            "lesion": None,
                            "source_window": WINDOW,
                            "target_window": WINDOW,
                            "instruction": text,
                        },
                    )
        if unsure:
            reason = f"row group {group}: {unsure} instructions do not name source and target; left empty"
            problem(Problem("repaired", "", path, reason))


def _read_grey(data: bytes | dict):
    """Grey levels of an encoded picture, `(rows, columns)`."""
    data = data["bytes"] if isinstance(data, dict) else data
    return np.asarray(PILImage.open(io.BytesIO(data)).convert("L"))


def _steps(images: list, instructions: list) -> list[tuple[int, int, list[str]]]:
    """`(source, target, wordings)` of the images of one row."""
    count = len(images)
    instructions = [[one] if isinstance(one, str) else list(one or []) for one in instructions]
    wordings = [text for one in instructions for text in one]
    if count < 2 or not instructions or not all(instructions):
        raise ValueError(f"{count} images and {len(instructions)} instructions make no pair")
    if not all(isinstance(text, str) and text.strip() for text in wordings):
        raise ValueError("an instruction is no text")
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"the images are of different sizes: {', '.join(str(image.shape) for image in images)}")
    if len(instructions) == count - 1:
        return [(place, place + 1, texts) for place, texts in enumerate(instructions)]
    if len(instructions) == 1:
        return [(place, count - 1, instructions[0]) for place in range(count - 1)]
    raise ValueError(f"{count} images do not go with {len(instructions)} instructions")


# ---------------------------------------------------------------------------------------------------------------------
# Understanding
# ---------------------------------------------------------------------------------------------------------------------


def read_understanding_rows(
    shards: list, split: str, config, tasks: tuple, problem: Callable[[Problem], None]
) -> Iterator[tuple[str, dict]]:
    """Questions of the JSON lines, in the columns of the builder; the file is streamed, never read whole."""
    for path, start, end in shards:
        slices = Path(path).parent / SLICES
        counts: Counter = Counter()
        with open(path, "rb") as lines:
            lines.seek(max(start - 1, 0))
            if start:
                lines.readline()  # up to the first line that begins in this range
            while (offset := lines.tell()) < end:
                line = lines.readline()
                if not line.strip():
                    continue
                where = f"{path}, byte {offset}"
                try:
                    row, notes = _understanding_row(json.loads(line), offset)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    # A line that cannot be read has no patient: said once, by the first split.
                    if split == SPLITS[0]:
                        problem(Problem("skipped", "", where, f"{error}" or type(error).__name__))
                    continue
                wanted = (*tasks, "") if len(tasks) > 1 else tasks
                if split_of(row["patient_id"], config) != split or row["task"] not in wanted:
                    continue
                try:
                    row = _with_pictures(row, slices)
                except (ValueError, OSError) as error:
                    problem(Problem("skipped", row["case_id"], where, str(error)))
                    continue
                counts.update(notes)
                yield f"{split}/{offset}", row
        for note, count in counts.items():
            problem(Problem("repaired", "", f"{path}, bytes {start} to {end}, {split}", f"{count} rows: {note}"))


def split_of(patient: str, config) -> str:
    """The split of a patient, by a hash alone: no table of patients can be had without reading all lines."""
    place, edge = hash_unit(config.split_seed, patient), 0.0
    for split, ratio in zip(SPLITS, config.split_ratios, strict=True):
        edge += ratio
        if place < edge:
            return split
    return SPLITS[-1]


def _understanding_row(line: dict, offset: int) -> tuple[dict, list[str]]:
    """One line without its pictures read, and what was repaired in it."""
    if not isinstance(line, dict) or absent_in(line):
        raise ValueError("the row is no object" if not isinstance(line, dict) else f"the row has no {absent_in(line)}")
    notes = []
    names = [line["image"]] if isinstance(line["image"], str) else list(line["image"])
    if not names:
        raise ValueError("the row names no image")
    turns = [(turn["from"], turn["value"]) for turn in line["conversations"]]
    questions, answers = ([value for role, value in turns if role == one] for one in ("human", "gpt"))
    if not questions or not answers:
        raise ValueError(f"the row has no {'answer (a turn of gpt)' if questions else 'question (a turn of human)'}")
    markers = sum(question.count(MARKER) for question in questions)
    if markers == 1 and len(names) > 1:
        turns = [(role, value.replace(MARKER, MARKER * len(names))) for role, value in turns]
        notes.append("one image marker for several images was repeated")
    elif markers == 0:
        first = [role for role, _ in turns].index("human")
        turns[first] = ("human", MARKER * len(names) + turns[first][1])
        notes.append("without image markers: images were put in front")
    elif markers != len(names):
        raise ValueError(f"{markers} image markers for {len(names)} images")
    answer = answers[0].strip()
    if not answer:
        raise ValueError("the answer is empty")
    panels = parse_listing(answer)
    if panels is not None:
        if len(panels) != len(names):
            raise ValueError(f"{len(panels)} panels in the answer for {len(names)} images")
        if None in panels:
            raise ValueError(f"a panel of the answer names no modality: {answer}")
        listing = ", ".join(f"{letter}: {panel}" for letter, panel in zip("ABCDEFGH", panels, strict=False))
        if listing != answer:
            notes.append("the listing of panels was written in one form")
        first = [role for role, _ in turns].index("gpt")
        turns[first] = ("gpt", listing)
        task, options, answer = "MI", [], listing
    else:
        task = {5: "CTS", 2: "TIA"}.get(len(names), "")
        options = ["A", "B", "C", "D"] if task in ("CTS", "TIA") else []
        letter = parse_answer(answer, options) if task == "CTS" or options and LETTER_ALONE.fullmatch(answer) else None
        if options and letter is None and LETTER_ALONE.fullmatch(answer):
            raise ValueError(f"the answer is none of the options A to D: {answer}")
        if letter and letter != answer:
            first = [role for role, _ in turns].index("gpt")
            turns[first] = ("gpt", letter)
            notes.append("the answer was cut down to its letter")
        options, answer = (options, letter) if letter else ([], answer)
    pair = line.get("pair") or {}
    source, target = (fold_modality(str(pair.get(key) or "")) for key in ("src", "tgt"))
    if source is None or target is None:
        source, target = fold_modality(Path(names[0]).parent.name), fold_modality(Path(names[-1]).parent.name)
    stem = Path(names[0]).stem
    case = str(line.get("case_id") or re.sub(r"[_-]s?\d+$", "", stem))
    time_point = BRATS_TIME_POINT.match(case)
    numbers = re.findall(r"\d+", stem)
    slice_index = line.get("slice_idx")
    slice_index = (
        int(numbers[-1]) if slice_index is None and numbers else int(-1 if slice_index is None else slice_index)
    )
    return {
        "images": names,
        "messages": [_message(role, value) for role, value in turns],
        "task": task,
        "question": questions[0].replace(MARKER, "").strip(),
        "options": options,
        "meanings": [],
        "answer": answer,
        "route": f"{source}-{target}" if source and target and source != target else "",
        "difficulty": "",
        "region": "",
        "dataset": "synermed",
        "case_id": case,
        "patient_id": time_point[1] if time_point else case,
        "slice_index": slice_index if 0 <= slice_index < 1 << 31 else -1,
        "index": offset,
    }, notes


def absent_in(line: dict) -> str:
    """The first key that a row must have and has not."""
    return next((key for key in ("image", "conversations") if not line.get(key)), "")


def _message(role: str, value: str) -> dict:
    """A turn as TRL reads it: markers become images, the rest text."""
    content = []
    for place, text in enumerate(value.split(MARKER)):
        if place:
            content.append({"type": "image", "text": None})
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    return {"role": "user" if role == "human" else "assistant", "content": content}


def _with_pictures(row: dict, slices: Path) -> dict:
    """The row with the bytes of its pictures, all of them from below `slices`."""
    pictures = []
    for name in row["images"]:
        file = (slices / name).resolve()
        if not file.is_relative_to(slices.resolve()):
            raise ValueError(f"{name} points out of {SLICES}/")
        if not file.is_file():
            raise ValueError(f"there is no picture {name} in {SLICES}/")
        content = file.read_bytes()
        try:
            # One that was cut short would stop a training in its middle. Decoding alone forgives a PNG its last bytes.
            PILImage.open(io.BytesIO(content)).verify()
            PILImage.open(io.BytesIO(content)).load()
        except Exception as error:  # whatever the reader of the format raises
            raise ValueError(f"the picture {name} is damaged: {error}") from error
        pictures.append({"bytes": content, "path": None})
    return {**row, "images": pictures}
