"""Pairs as rows: two slices of one grid in scanner units, lossless, with all that is needed to go back to the scan."""

import io
from collections.abc import Iterable, Iterator
from itertools import permutations

import numpy as np
from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from ..processing_synermedgen import make_instruction
from .sources import LoadedCase

WINDOW = {"unit": Value("string"), "low": Value("float32"), "high": Value("float32")}
PAIR_FEATURES = Features(
    {
        "source_image": Image(),  # mode F: float32 in scanner units (HU, SUV, arbitrary MR units), lossless
        "target_image": Image(),  # the same slice of the same grid
        "source_modality": Value("string"),  # T1, T1CE, T2, FLAIR, MRI, CT, CBCT or PET
        "target_modality": Value("string"),
        "region": Value("string"),  # brain, pelvis, whole-body, abdomen, thorax, head-neck, heart
        "axis": Value("string"),  # axial or coronal
        "slice_index": Value("int32"),  # along the axis; from the feet up, or from back to front
        "spacing": List(Value("float32"), length=3),  # mm between slices, rows, columns
        "dataset": Value("string"),
        "case_id": Value("string"),
        "patient_id": Value("string"),
        "centre": Value("string"),  # empty where unknown
        "mask": Image(),  # mode 1, so an array of bool: the body; None where there is none
        "lesion": Image(),  # mode 1; None where there is none
        "source_window": WINDOW,  # of the whole volume: what an MR slice must be scaled by
        "target_window": WINDOW,
        "instruction": Value("string"),
    }
)


def encode_slice(array: np.ndarray) -> dict:
    """One slice as the bytes of a float32 TIFF, the form in which `Image` keeps every value."""
    buffer = io.BytesIO()
    PILImage.fromarray(np.ascontiguousarray(array, np.float32)).save(buffer, "TIFF")
    return {"bytes": buffer.getvalue(), "path": None}


def encode_mask(array: np.ndarray | None) -> dict | None:
    """A mask of one slice as the bytes of a PNG of one bit a pixel."""
    if array is None:
        return None
    buffer = io.BytesIO()
    PILImage.fromarray(np.ascontiguousarray(array, bool)).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def is_wanted(source: str, target: str, region: str, routes: list[str] | None) -> bool:
    """Whether a route is among those asked for; `routes` name it with or without the region."""
    return routes is None or f"{source}-{target}" in routes or f"{region}/{source}-{target}" in routes


def has_wanted_pair(modalities: Iterable[str], region: str, routes: list[str] | None) -> bool:
    """Whether a case of these modalities has one of the routes asked for."""
    pairs = permutations(modalities, 2)
    return routes is None or any(is_wanted(*pair, region, routes) for pair in pairs)


def pair_rows(case: LoadedCase, routes: list[str] | None = None, slice_step: int = 1) -> Iterator[tuple[str, dict]]:
    """
    Rows of one case: every usable slice, every ordered pair of modalities.

    Args:
        case ([`LoadedCase`]): In memory.
        routes (`list[str]`, *optional*): Only these.
        slice_step (`int`, defaults to 1): Every so many usable slices.

    Yields:
        A key that is unique in the dataset, and the row; every slice is encoded once, whatever the number of rows.
    """
    record = case.record
    pairs = [
        (source, target)
        for source in case.images
        for target in case.images
        if source != target and is_wanted(source, target, record.region, routes)
    ]
    if not pairs:
        return
    needed = {name for pair in pairs for name in pair}
    # Rounded as the table will round them, so that a stream gives the same.
    windows = {
        name: {
            "unit": window["unit"],
            "low": float(np.float32(window["low"])),
            "high": float(np.float32(window["high"])),
        }
        for name, window in case.windows.items()
    }
    instructions = {pair: make_instruction(*pair, record.region) for pair in pairs}
    for index in case.usable[::slice_step]:
        images = {name: encode_slice(case.images[name][index]) for name in needed}
        mask, lesion = (None if array is None else encode_mask(array[index]) for array in (case.mask, case.lesion))
        for source, target in pairs:
            yield (
                f"{record.name}/{source}-{target}/{index}",
                {
                    "source_image": images[source],
                    "target_image": images[target],
                    "source_modality": source,
                    "target_modality": target,
                    "region": record.region,
                    "axis": record.axis,
                    "slice_index": int(index),
                    "spacing": list(case.spacing),
                    "dataset": record.dataset,
                    "case_id": record.case_id,
                    "patient_id": record.patient_id,
                    "centre": record.centre,
                    "mask": mask,
                    "lesion": lesion,
                    "source_window": windows[source],
                    "target_window": windows[target],
                    "instruction": instructions[source, target],
                },
            )
