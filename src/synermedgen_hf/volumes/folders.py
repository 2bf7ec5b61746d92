"""A folder of many scans: which of its files are cases, where their results go, and a run that can be interrupted.

Nothing but the results themselves remembers a run: a result with its side-car is finished, anything else is made. So a
run goes on after Ctrl-C, after a crash, and on another machine. Cases are shared out among processes by their place.

The name of a DICOM folder is often a patient's. Such a case is only ever called by its number, and its paths are taken
out of what an error says.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.splits import write_whole
from .reading import EXTENSIONS, extension

# Endings that a format has; the first is the one that is written. A DICOM series is a folder.
FORMATS = {"nifti": (".nii.gz", ".nii"), "mha": (".mha", ".mhd"), "nrrd": (".nrrd", ".nhdr"), "dicom": ("",)}
CASES = "cases.json"
_DICOM_NAME = re.compile(r".*(\.dcm|\.dicom|\.ima|\.\d+)|[^.]+", re.I)  # scanners like no ending, or a number
_EDGE = 1 << 16  # bytes
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_LEAST_FREE = 1 << 20  # bytes


@dataclass(frozen=True)
class Case:
    """
    Args:
        number (`int`): From 1 on, in the order of the sorted paths.
        name (`str`): Path below the folder without its ending: what a result is called.
        path (`Path`): File of a volume, or folder of a DICOM series.
        label (`str`): What it is called in messages.
    """

    number: int
    name: str
    path: Path
    label: str

    @property
    def is_dicom(self) -> bool:
        return self.path.is_dir()


@dataclass(frozen=True)
class Job:
    """One result to be made: `target` of a case, written to `output`, a file or, as DICOM, a folder."""

    case: Case
    target: str
    output: Path


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        case (`int`): Its number.
        label (`str`): What it is called in messages.
        target (`str`): Modality.
        status (`str`): `"made"`, `"kept"` (finished before) or `"failed"`.
        seconds (`float`): Spent on it.
        error (`str`, *optional*): What went wrong.
    """

    case: int
    label: str
    target: str
    status: str
    seconds: float = 0.0
    error: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# What is there, and what is to be made
# ---------------------------------------------------------------------------------------------------------------------


def find_cases(source: str | os.PathLike, pattern: str | None = None, leave_out: Path | None = None) -> list[Case]:
    """
    The scans that a path stands for: a file, a folder with DICOM files, or all volumes and DICOM folders below it.

    Args:
        source (`str` or `os.PathLike`): As the user named it.
        pattern (`str`, *optional*): Below a folder, only what matches this glob, such as `"*/mr.nii.gz"`.
        leave_out (`Path`, *optional*): A folder that is not searched: that of the results.

    Returns:
        `list[Case]`, sorted by path.

    Raises:
        `FileNotFoundError`: There is no such path.
        `ValueError`: Nothing there is a scan, or several folders hold several volumes each and no `pattern` chooses.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"There is no file or folder {source}.")
    if source.is_file():
        if is_dicom(source):
            raise ValueError(f"{source} is one file of a DICOM series: name the folder that holds the series.")
        if not extension(source):
            raise ValueError(
                f"{source} is not a volume: known are {', '.join(EXTENSIONS)} and folders of a DICOM series."
            )
        return [Case(1, _without_extension(source.name), source, str(source))]
    if pattern is None and _holds_dicom(source):
        return [Case(1, source.resolve().name, source, str(source))]
    if pattern is None:
        found = sorted(_search(source, leave_out.resolve() if leave_out else None))
        _check_choice(source, found)
    else:
        found = sorted(path for path in source.glob(pattern) if extension(path) or path.is_dir() and _holds_dicom(path))
    if not found:
        which = f" that matches {pattern}" if pattern else ""
        raise ValueError(
            f"{source} holds no volume{which}: known are {', '.join(EXTENSIONS)} and folders of a DICOM series."
        )
    cases = []
    for number, path in enumerate(found, 1):
        name = path.relative_to(source).as_posix()
        label = f"case {number}" if path.is_dir() else f"case {number} ({name})"
        cases.append(Case(number, _without_extension(name), path, label))
    return cases


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM files do: a preamble of 128 bytes, then DICM."""
    try:
        with open(file, "rb") as content:
            return content.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _holds_dicom(folder: Path) -> bool:
    """Whether DICOM files lie in a folder itself. A DICOMDIR is only a list of files that lie elsewhere."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name != "DICOMDIR")
    return any(is_dicom(file) for file in files if _DICOM_NAME.fullmatch(file.name))


def _search(source: Path, leave_out: Path | None) -> Iterator[Path]:
    for folder, folders, files in os.walk(source):
        folder = Path(folder)
        folders[:] = [one for one in folders if one[0] != "." and (folder / one).resolve() != leave_out]
        volumes = [folder / file for file in files if file[0] != "." and extension(file)]
        yield from volumes
        if not volumes and folder != source and _holds_dicom(folder):
            yield folder


def _check_choice(source: Path, found: list[Path]):
    """Raise a `ValueError` where every patient's folder holds several volumes: images, masks, other modalities."""
    below: dict[Path, list[str]] = {}
    for path in found:
        if path.parent != source and not path.is_dir():
            below.setdefault(path.parent, []).append(path.name)
    crowded = [names for names in below.values() if len(names) > 1]
    if len(crowded) > 1 or (crowded and len(below) > 1):
        names = sorted(crowded[0])
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ValueError(
            f"Several folders of {source} hold several volumes each ({shown}). Say which of them to take with a "
            f"pattern, such as --pattern '*/{names[0]}', or '**/*{extension(names[0])}' for all."
        )


def _without_extension(name: str) -> str:
    return name[: len(name) - len(extension(name))]


def plan_outputs(
    cases: list[Case],
    targets: list[str],
    output: str | os.PathLike,
    file_format: str | None = None,
    anonymous: bool = False,
) -> list[Job]:
    """
    Where every result goes.

    Args:
        cases (`list[Case]`): As found.
        targets (`list[str]`): Modalities to make of each.
        output (`str` or `os.PathLike`): A file, for one result, or a folder. In a folder, a result has its case's path
            and name, `_` and its target.
        file_format (`str`, *optional*): A key of `FORMATS`; by default that of `output`, else the case's own.
        anonymous (`bool`, defaults to `False`): Call results in a folder by the number of their case.

    Returns:
        `list[Job]`, by case and target.

    Raises:
        `ValueError`: One file for several results, a file of another format, or results that would be one file.
    """
    output, ending = Path(output), extension(output)
    if doubled := {target for target in targets if targets.count(target) > 1}:
        raise ValueError(f"{', '.join(sorted(doubled))} is asked for twice.")
    if ending:
        if len(cases) * len(targets) > 1:
            raise ValueError(
                f"{output} is one file, and {len(cases) * len(targets)} results are asked for: name a folder."
            )
        if file_format is not None and ending not in FORMATS[file_format]:
            wanted = f"ends in {FORMATS[file_format][0]}" if file_format != "dicom" else "is a folder"
            raise ValueError(f"{output} is no name for the format {file_format}, which {wanted}.")
        jobs = [Job(cases[0], targets[0], output)]
    else:
        jobs = []
        for case in cases:
            own = "" if case.is_dicom else extension(case.path)
            endings = FORMATS[file_format] if file_format else next(one for one in FORMATS.values() if own in one)
            name = f"case-{case.number:04d}" if anonymous else case.name
            jobs += [Job(case, target, output / f"{name}_{target}{endings[0]}") for target in targets]
    places: dict[Path, Job] = {}
    for job in jobs:
        place = job.output.resolve()
        if place == job.case.path.resolve():
            raise ValueError(f"The result of {job.case.label} would replace the scan itself: name another output.")
        if place in places:
            raise ValueError(
                f"{places[place].case.label} and {job.case.label} differ only in their endings, so their results would "
                "be one file: take them apart with a pattern."
            )
        places[place] = job
    return jobs


def check_writable(folder: Path):
    """Raise an `OSError` for a folder that cannot be made or written into, by trying it."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}): name another output.") from error


# ---------------------------------------------------------------------------------------------------------------------
# What is finished
# ---------------------------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """
    16 hexadecimal digits that change when a scan does, without reading all of it: sizes, first and last 64 KiB of its
    files. Names and times do not count, so that a copy is the same scan.
    """
    content = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            with open(file, "rb") as data:
                content.update(f"{size} ".encode() + data.read(_EDGE))
                data.seek(max(size - _EDGE, 0))
                content.update(data.read(_EDGE))
    return content.hexdigest()[:16]


def sort_out(
    jobs: list[Job], settings: dict, sidecar: Callable[[Path], Path], overwrite: bool = False
) -> tuple[list[Job], list[Job]]:
    """
    Which jobs are finished and which are to be done.

    Args:
        jobs (`list[Job]`): All of them.
        settings (`dict`): What a result depends on, besides its scan and target. A finished one holds the same in its
            side-car, as `"request"` (see [`request`]).
        sidecar (`Callable`): Path of a result -> that of its side-car.
        overwrite (`bool`, defaults to `False`): Do all of them again.

    Returns:
        `tuple[list[Job], list[Job]]`: Finished, to be done.

    Raises:
        `ValueError`: A result is there that was made otherwise, or by something else.
    """
    if overwrite:
        return [], jobs
    finished, pending = [], []
    for job in jobs:
        if not job.output.exists():
            pending.append(job)
            continue
        try:
            made = json.loads(sidecar(job.output).read_text(encoding="utf-8"))["request"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{job.case.label}: there is something at the place of its {job.target} already, and its side-car does "
                "not say that this command made it. Choose another output, or replace it with --overwrite."
            ) from None
        wanted = request(job, settings)
        if other := [
            f"{name} {made.get(name)!r} (now {value!r})" for name, value in wanted.items() if made.get(name) != value
        ]:
            raise ValueError(
                f"{job.case.label}: its {job.target} is there already and was made otherwise: {', '.join(other)}. "
                "Choose another output, or make it again with --overwrite."
            )
        finished.append(job)
    return finished, pending


def request(job: Job, settings: dict) -> dict:
    """What a result depends on: kept in its side-car, so that a later run knows it is the one it was asked for."""
    return {"input": fingerprint(job.case.path), "target": job.target, **settings}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run_jobs(
    jobs: list[Job], read: Callable[[Case], object], make: Callable[[object, Job], None]
) -> Iterator[tuple[Job, Outcome]]:
    """
    Do the jobs one after another; what fails is told and stops no other.

    Args:
        jobs (`list[Job]`): Those of a case are neighbours: its scan is read once.
        read (`Callable`): Case -> its scan, as `make` takes it.
        make (`Callable`): Makes the result from the scan and writes it whole.

    Raises:
        `OSError`: The disk of the results is full or not writable: nothing that follows could be kept.
    """
    case = scan = unreadable = None
    for job in jobs:
        start = time.perf_counter()
        try:
            if job.case is not case:
                case, scan, unreadable = job.case, None, None
                try:
                    scan = read(case)
                except (OSError, ValueError, RuntimeError, ImportError) as error:
                    unreadable = error
            if unreadable is not None:
                raise unreadable
            make(scan, job)
            error = None
        except (OSError, ValueError, RuntimeError, ImportError, MemoryError) as raised:
            _check_disk(job, raised)
            error = describe_error(raised, job.case, job.output)
        status, seconds = "failed" if error else "made", round(time.perf_counter() - start, 3)
        yield job, Outcome(job.case.number, job.case.label, job.target, status, seconds, error)


def share_of(jobs: list[Job], process: int, processes: int) -> list[Job]:
    """The jobs of one of several processes: every so many-th case, with all its targets."""
    numbers = list(dict.fromkeys(job.case.number for job in jobs))[process::processes]
    return [job for job in jobs if job.case.number in numbers]


def describe_error(error: BaseException, case: Case, output: Path | None = None) -> str:
    """What went wrong, in one line, without the paths of a DICOM series or of what is made of it."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "out of memory: use a smaller --batch-size, --dtype bfloat16, or fewer processes."
    text = " ".join(str(error).split()) or type(error).__name__
    if not case.is_dicom:
        return text.replace(str(case.path), case.label)
    if output is not None:  # first: its path may begin with that of the scan
        text = text.replace(str(output), "its result")
    text = text.replace(str(case.path), case.label).replace(str(case.path.resolve()), case.label)
    # A result is called as its scan is. Whole names alone: a folder called `a` is no part of a word.
    results = {output.name, *Path(case.name).parts} if output is not None else set()
    files = {file.name for file in case.path.iterdir()}
    for name in sorted(results | files, key=len, reverse=True):
        if not re.fullmatch(r"[\d.]+", name):  # numbers name nobody, and stand elsewhere in a sentence
            named = "one of its files" if name in files else "its result"
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", named, text)
    return text


def _check_disk(job: Job, error: BaseException):
    """Raise an `OSError` if an error comes from the disk of the results and so will come again."""
    place = next(folder for folder in job.output.parents if folder.exists())
    is_full = shutil.disk_usage(place).free < _LEAST_FREE
    if is_full or getattr(error, "errno", None) in _HOPELESS:
        reason = "is full" if is_full else f"fails ({os.strerror(error.errno)})"
        raise OSError(
            f"The disk of the results {reason}. What is finished is kept, nothing is half-written: make room and run "
            "the same command again."
        ) from error


def write_cases(folder: Path, jobs: list[Job], outcomes: list[Outcome], anonymous: bool):
    """`cases.json`: which number is which scan and what became of it. With `anonymous`, without the scans' names."""
    by_job = {(outcome.case, outcome.target): outcome for outcome in outcomes}
    rows = []
    for job in jobs:
        outcome = by_job.get((job.case.number, job.target))
        if outcome is None:
            continue
        row = asdict(outcome)
        del row["label"]
        output = job.output.relative_to(folder).as_posix()
        rows.append({**row, "output": output} if anonymous else {**row, "scan": job.case.name, "output": output})
    write_whole(folder / CASES, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
