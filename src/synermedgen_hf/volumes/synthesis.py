"""Whole scans: every slice through the pipeline, and a volume in the target's units on exactly the input's grid.

    volume = read_volume("mr.nii.gz")
    made = synthesize_volume(pipe, volume, target="CT", source="MRI", region="brain")
    write_synthesis(made, "sct.nii.gz")  # and sct.json beside it

- The source's window is measured once, on the whole volume; slices are cut as the data sets of the region are.
- One noise field serves all slices, so that neighbours agree, and nothing depends on how many go into a batch.
- Slices of air are not computed, and outside the body the result is the target's floor: air in CT, 0 elsewhere.
- What was done is recorded, enough to do it again: the record is written beside the volume.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from ..data.splits import write_whole
from ..loading_synermedgen import weights_checksum
from ..processing_synermedgen import MODALITY_NAMES
from .reading import (
    AXES,
    BODY_ABOVE,
    MR_BODY_SHARE,
    Volume,
    check_finite,
    extension,
    read_volume,
    same_grid,
    slice_spacing,
    slices_of,
)
from .understanding import understanding_slice
from .writing import write_volume

MIN_BODY_SHARE = 0.001  # of a slice: a cap of the head has more
BODY_MARGIN_MM = 5.0  # around what the source shows, which need not be all that the target would
HEAD_WIDTH_MM = (100, 220)  # from ear to ear, generously
NOT_FOR_VOLUMES = ("generator", "num_images_per_prompt", "output_type", "return_dict", "window")
NOTICE = "Synthetic image, made by a model. Research use only, not for diagnosis."


@dataclass
class VolumeSynthesis:
    """
    Args:
        volume ([`Volume`]): The synthesis; with several samples their mean. float32, HU, SUV or a stated MR scale.
        std ([`Volume`], *optional*): Standard deviation over the samples, voxel by voxel.
        record (`dict`): What was done, of what JSON can hold; nothing in it says whose scan it is.
    """

    volume: Volume
    std: Volume | None
    record: dict


def synthesize_volume(
    pipe,
    volume: Volume | str | Path | dict[str, Volume | str | Path],
    target: str,
    source: str | None = None,
    region: str | None = None,
    axis: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_samples: int = 1,
    overlap: int = 0,
    mask: Volume | None = None,
    progress: bool = True,
    callback: Callable[[int, int], None] | None = None,
    weights: dict[str, str | None] | None = None,
    **pipeline_arguments,
) -> VolumeSynthesis:
    """
    Synthesise a whole scan, slice by slice.

    Args:
        pipe ([`SynerMedGenPipeline`]): Any checkpoint.
        volume ([`Volume`], path, or a `dict` of those): One scan, or several modalities of one patient on one grid.
        target (`str`): Modality to make.
        source (`str`, *optional*): Modality of the scan. By default what the file says, else what the weights see in
            its middle slice, where they have learned to.
        region (`str`, *optional*): `"brain"`, `"pelvis"`, `"whole-body"`.
        axis (`str`, *optional*): `"axial"`, `"coronal"` or `"sagittal"` slices. By default those of the training data:
            coronal for the whole body and wherever PET takes part, else axial.
        batch_size (`int`, defaults to 8): Slices at a time. Bounds the memory; the result does not depend on it beyond
            the rounding of float32.
        seed (`int`, defaults to 0): Of the noise.
        num_samples (`int`, defaults to 1): Syntheses, with the seeds from `seed` upwards; the result is their mean.
        overlap (`int`, defaults to 0): Make each slice the mean of itself and so many neighbours to either side, nearer
            ones counting more: smoother through the plane, and less sharp.
        mask ([`Volume`], *optional*): The body, on the same grid, instead of what the source shows. Outside of it the
            result is the target's floor.
        progress (`bool`, defaults to `True`): Show a bar with the time left.
        callback (`Callable[[int, int], None]`, *optional*): Called with how many slices of how many are done. What it
            raises ends the work.
        weights (`dict[str, str]`, *optional*): What [`checksums`] says of the pipeline, for the record. Computed if
            absent, which takes a while with large weights: for many scans, once is enough.
        pipeline_arguments: As in [`~SynerMedGenPipeline.__call__`]: `num_inference_steps`, `guidance_scale`, ...

    Returns:
        [`VolumeSynthesis`]

    Raises:
        `ValueError`: An argument, the route or the volume cannot be used; said before anything is computed.
    """
    # 1. Check everything.
    if unwanted := sorted(set(NOT_FOR_VOLUMES) & set(pipeline_arguments)):
        raise ValueError(f"{', '.join(unwanted)}: set by synthesize_volume itself, or without meaning for a volume.")
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("num_samples", num_samples, 1),
        ("overlap", overlap, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}.")
    if isinstance(volume, dict):
        if source is not None or not volume:
            raise ValueError("A dict of volumes names its modalities itself: leave `source` out, put in at least one.")
        volumes = {name: _opened(each) for name, each in volume.items()}
    else:
        volume = _opened(volume)
        volumes = {source or volume.modality: volume}
    first = next(iter(volumes.values()))
    for name, each in volumes.items():
        _check_volume(name, each, first)
    axis = axis or default_axis(volumes, target, region)
    if axis not in ("axial", "coronal", "sagittal"):
        raise ValueError(f"Unknown axis {axis!r}. Choose 'axial', 'coronal' or 'sagittal'.")
    if mask is not None and not same_grid(mask, first):
        raise ValueError(f"The mask ({mask.array.shape}) does not lie on the grid of the scan ({first.array.shape}).")
    identified = None
    if None in volumes:
        identified = pipe.identify(understanding_slice(first, axis))
        volumes = {identified["modality"]: first}
    pipe.check_route(list(volumes), target, region)

    # 2. What is body, slice by slice.
    processor = pipe.processor.image_processor
    windows = {name: processor.intensity_window(each.array, name) for name, each in volumes.items()}
    name = next(iter(volumes))
    body = np.asarray(mask.array) > 0 if mask is not None else _find_body(first, name, windows[name], axis)
    warnings = _implausible(first, body, region)
    for warning in warnings:
        tqdm.write(f"Warning: {warning}", file=sys.stderr)
    planes = {name: slices_of(each, axis) for name, each in volumes.items()}
    inside = slices_of(Volume(body, first.affine), axis)
    frame = inside[0].size
    wanted = [place for place in range(len(inside)) if np.count_nonzero(inside[place]) > MIN_BODY_SHARE * frame]
    if not wanted:
        raise ValueError(
            "No slice shows a body: the volume is empty, or its values are not in scanner units (HU, SUV)."
        )

    # 3. Synthesise. Running mean and variance (Welford 1962), so that samples need not be kept.
    record = processor.target_record(target)
    floor = np.float32(record["low"])
    mean = np.full(first.array.shape, floor, np.float32)
    squares = np.zeros_like(mean) if num_samples > 1 else None
    one = np.full_like(mean, floor) if num_samples > 1 else mean
    into = slices_of(Volume(one, first.affine), axis)
    total, done, told = len(wanted) * num_samples, 0, None
    bar_before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=total, desc=f"{'+'.join(volumes)} to {target}", unit="slice", disable=not progress) as bar:
            if callback is not None:
                callback(0, total)
            for sample in range(num_samples):
                for start in range(0, len(wanted), batch_size):
                    places = wanted[start : start + batch_size]
                    made = pipe(
                        [
                            {name: np.ascontiguousarray(plane[place], np.float32) for name, plane in planes.items()}
                            for place in places
                        ],
                        target=target,
                        region=region,
                        seed=seed + sample,
                        window=windows,
                        output_type="np",
                        **pipeline_arguments,
                    )
                    for place, image in zip(places, made.images, strict=True):
                        into[place] = np.where(inside[place], image, floor)
                    told = made.records[0]
                    done += len(places)
                    bar.update(len(places))
                    if callback is not None:
                        callback(done, total)
                if overlap:
                    _blend(into, inside, wanted, overlap, floor)
                if squares is not None and sample == 0:
                    # As it is: a rounding of the mean, times the way here from the floor, would be a variance.
                    mean[:] = one
                elif squares is not None:
                    change = one - mean
                    mean += change / (sample + 1)
                    squares += change * (one - mean)
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **bar_before})

    # 4. On the input's grid, with a record.
    def on_the_grid(array):
        return replace(first, array=array, modality=target, unit=record["unit"])

    std = None if squares is None else on_the_grid(np.sqrt(np.maximum(squares, 0) / num_samples))
    skipped = sorted(set(range(len(inside))) - set(wanted))
    return VolumeSynthesis(
        on_the_grid(mean),
        std,
        {
            "notice": NOTICE,
            "weights_notice": pipe.model.config.notice,
            "sources": list(volumes),
            "target": target,
            "region": region,
            "unit": record["unit"],
            "source_windows": {name: [float(low), float(high)] for name, (low, high) in windows.items()},
            "target_window": [record["low"], record["high"]],
            "outside_the_body": float(floor),
            "body": "mask" if mask is not None else f"source, holes filled, {BODY_MARGIN_MM:g} mm around it",
            "axis": axis,
            "slices": len(inside),
            "slices_without_body": skipped,
            "shape": list(first.array.shape),
            "affine": np.asarray(first.affine, float).tolist(),
            "spacing_mm": [round(side, 6) for side in first.spacing],
            "model_size": told["model_size"],
            "overlap": overlap,
            "seeds": list(range(seed, seed + num_samples)),
            "noise": "one field for all slices",
            "num_inference_steps": told["num_inference_steps"],
            "guidance_scale": told["guidance_scale"],
            "image_guidance_scale": told["image_guidance_scale"],
            "other_arguments": {
                name: value
                for name, value in pipeline_arguments.items()
                if name not in told and not callable(value) and value is not None
            },
            "identified": identified,
            "warnings": warnings,
            "weights_sha256": checksums(pipe) if weights is None else weights,
            "versions": {name: version(name) for name in ("synermedgen-hf", "torch", "transformers", "diffusers")},
        },
    )


def checksums(pipe) -> dict[str, str | None]:
    """Checksums of a pipeline's weights, as the record of a synthesis holds them."""
    return {"model": weights_checksum(pipe.model), "vae": weights_checksum(pipe.vae)}


def write_synthesis(synthesis: VolumeSynthesis, path: str | Path, overwrite: bool = False) -> list[Path]:
    """
    Write a synthesis and its record: `ct.nii.gz`, `ct.json` and, with several samples, `ct-std.nii.gz`.

    Args:
        synthesis ([`VolumeSynthesis`]): Of [`synthesize_volume`].
        path (`str` or `Path`): `.nii`, `.nii.gz`, `.mha`, `.mhd` or `.nrrd`.
        overwrite (`bool`, defaults to `False`): Replace files that are there.

    Returns:
        `list[Path]`: What was written, the volume first.

    Raises:
        `ValueError`: The path is not that of a volume.
        `FileExistsError`: One of the files is there already.
        `OSError`: It cannot be written; nothing half-written is left.
    """
    path = Path(path)
    ending = extension(path)
    if not ending:
        raise ValueError(f"{path} is not the name of a volume: it should end in .nii.gz, .nii, .mha or .nrrd.")
    stem, ending = path.name[: -len(ending)], path.name[-len(ending) :]
    sidecar, spread = path.with_name(f"{stem}.json"), path.with_name(f"{stem}-std{ending}")
    written = [path, sidecar] + ([spread] if synthesis.std is not None else [])
    if not overwrite and (there := [str(file) for file in written if file.exists()]):
        raise FileExistsError(f"{', '.join(there)}: there already. Choose another name, or overwrite.")
    # The volume comes last: where it is, the rest is too; and without it the rest says nothing.
    try:
        if synthesis.std is not None:
            write_volume(synthesis.std, spread, overwrite=True)
        write_whole(sidecar, json.dumps(synthesis.record, indent=2) + "\n")
        write_volume(synthesis.volume, path, overwrite=True)
    except OSError:
        if not path.exists():
            for file in written:
                file.unlink(missing_ok=True)
        raise
    return written


def _opened(volume: Volume | str | Path) -> Volume:
    return read_volume(volume) if isinstance(volume, (str, Path)) else volume


def _check_volume(name: str | None, volume: Volume, first: Volume):
    """Raise a `ValueError` for what is no usable scan of this modality."""
    what = name or "the scan"
    if name is not None and name not in MODALITY_NAMES:
        raise ValueError(f"Unknown source {name!r}. Choose one of {', '.join(MODALITY_NAMES)}.")
    if volume.array.ndim != 3 or 0 in volume.array.shape:
        raise ValueError(f"{what} has shape {volume.array.shape}: a volume of three dimensions is needed.")
    check_finite(volume, what)
    if not same_grid(volume, first):
        raise ValueError(
            f"{what} lies on another grid {volume.array.shape} than the first scan {first.array.shape}: resample it."
        )


def default_axis(sources: Iterable[str | None], target: str, region: str | None) -> str:
    """The axis along which a route's training data are cut: whole bodies, and so PET, are looked at from the front."""
    return "coronal" if "PET" in (target, *sources) else AXES.get(region, "axial")


def _find_body(volume: Volume, modality: str, window: tuple[float, float], axis: str) -> np.ndarray:
    """Where the patient is, with a margin: above the threshold of air, holes filled slice by slice."""
    low, high = window
    body = volume.array > BODY_ABOVE.get(modality, low + MR_BODY_SHARE * (high - low))
    spacing = slice_spacing(volume, axis)[1:]
    rows, columns = (max(1, round(BODY_MARGIN_MM / side)) for side in spacing)
    planes = slices_of(Volume(body, volume.affine), axis)
    for plane in planes:
        if plane.any():
            # Closing first, so that a thin gap in the skin does not open the inside. By distance: a disc would be as
            # large as voxels are small.
            margins = ndimage.distance_transform_edt(~plane, sampling=(1 / rows, 1 / columns))
            plane[...] = ndimage.binary_fill_holes(margins <= 1 + 1e-9)
    return body


def _implausible(volume: Volume, body: np.ndarray, region: str | None) -> list[str]:
    """What the size of the body says against the region that was named."""
    shown = np.flatnonzero(body.any((1, 2)))
    if not len(shown) or region is None:
        return []
    width = (shown[-1] - shown[0] + 1) * volume.spacing[0]
    least, most = HEAD_WIDTH_MM
    if region == "brain" and width > most:
        return [f"The body is {width:.0f} mm wide, too wide for a head: is the region really the brain?"]
    if region in ("pelvis", "whole-body") and least < width < most:
        return [f"The body is {width:.0f} mm wide, as a head is: is the region really the {region}?"]
    return []


def _blend(planes: np.ndarray, inside: np.ndarray, wanted: list[int], overlap: int, floor: np.float32):
    """Each synthesised slice becomes the weighted mean of itself and its synthesised neighbours, in place."""
    there = np.zeros(len(planes), np.float32)
    there[wanted] = 1
    weights = np.float32(overlap + 1 - np.abs(np.arange(-overlap, overlap + 1)))
    before = {}  # slices as they were, as far back as they are needed
    for place in wanted:
        before[place] = planes[place].copy()
        before.pop(place - overlap - 1, None)
        total, count = np.zeros_like(before[place]), 0.0
        for step, weight in zip(range(-overlap, overlap + 1), weights, strict=True):
            other = place + step
            if 0 <= other < len(planes) and there[other]:
                # Outside its own body a neighbour says nothing about this slice.
                values = before.get(other, planes[other])
                total += weight * np.where(inside[other], values, before[place])
                count += weight
        planes[place] = np.where(inside[place], total / count, floor)


__all__ = ["VolumeSynthesis", "checksums", "synthesize_volume", "write_synthesis"]
