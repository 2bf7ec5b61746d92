"""The folder of an evaluation: what was asked is remembered in it, so that it goes on and is never mixed."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.splits import write_whole

CASES, ARGUMENTS = "cases.jsonl", "arguments.json"
PHANTOM_SLICES, PHANTOM_SIZE = 8, 128  # of a simulated patient by default, as in cli.py


def claim_folder(folder: str | Path, arguments: dict):
    """
    Make a folder that of one evaluation, or check that it is: `arguments.json` remembers what was asked.

    Args:
        folder (`str` or `Path`): Made if it does not exist.
        arguments (`dict`): Of what JSON can hold: everything that the records depend on.

    Raises:
        `ValueError`: The folder holds answers to something else, or to what is not known, or is damaged.
    """
    cases, known = Path(folder) / CASES, Path(folder) / ARGUMENTS
    if not known.exists():
        if cases.exists():
            raise ValueError(f"{cases} is in the way: without {ARGUMENTS} beside it, nobody knows what was asked.")
        write_whole(known, json.dumps(arguments, indent=2) + "\n")
        return
    before = read_json(known)
    names = dict.fromkeys([*before, *arguments])
    changed = [
        f"{name} {before.get(name)!r} (now {arguments.get(name)!r})"
        for name in names
        if before.get(name) != arguments.get(name)
    ]
    if changed:
        raise ValueError(f"{folder} holds answers to something else: {', '.join(changed)}. Choose another folder.")


@contextmanager
def sole_user(folder: str | Path):
    """
    Two runs that write into one folder would spoil each other's files.

    Raises:
        `ValueError`: Another run is writing to it.
    """
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"Another run is writing to {folder}. Wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()


def read_records(file: Path) -> list[dict]:
    """
    The records of a file of JSON lines that a run appended to, or none if there is no file. A last line that was half
    written is removed.

    Raises:
        `ValueError`: A line is no JSON.
    """
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(file, len(whole))
    try:
        return [read_line(line, file, number) for number, line in enumerate(whole.splitlines(), start=1)]
    except ValueError as error:
        raise ValueError(f"{error} Remove the file to ask again.") from error


def read_line(line: bytes, file: Path, number: int) -> dict:
    """
    One record of a file of JSON lines.

    Raises:
        `ValueError`: It is damaged: it says where.
    """
    return _object(line, f"{file}, line {number},")


def read_json(file: Path) -> dict:
    """
    What a run wrote about itself.

    Raises:
        `ValueError`: The file is damaged.
    """
    return _object(file.read_bytes(), str(file))


def _object(content: bytes, where: str) -> dict:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: it holds no object.")
    return found


def name_of(record: dict) -> tuple:
    """What a record of synthesis is found by: the same in every evaluation of the same data."""
    return record["dataset"], record["case_id"], record["route"], record["slice_index"]


def name_text(name: tuple) -> str:
    """A name of [`name_of`] in words."""
    return " ".join(str(part) for part in name if part is not None)


__all__ = ["claim_folder", "name_of", "name_text", "read_json", "read_line", "read_records", "sole_user"]
