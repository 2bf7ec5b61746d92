"""The VAE ceiling: the error that no training can remove.

A generator behind a codec and a VAE can at best hand over the latents of the true target. So the true targets go
through codec, VAE and back, and what is lost on the way is measured:

    true target -> window, same grid -> channels -> VAE -> channels -> window, same grid -> compare with itself

It tells whether a wish (such as 10 HU) can be met at all, and which window or codec loses less.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm
from transformers import AutoProcessor

from ..data.phantom import simulate_case
from ..data.sources import CaseError, CaseRecord, load_case
from ..data.splits import write_whole
from ..data.synermed import phantom_records
from ..hub import check_folder
from ..image_processing_synermedgen import SynerMedGenImageProcessor, set_codec
from ..loading_synermedgen import weights_checksum
from .protocols import PROTOCOLS, VERSION, check_same_protocol, evaluate_case, scale_of_mr
from .runs import CASES, PHANTOM_SIZE, PHANTOM_SLICES, claim_folder, read_records, sole_user


@torch.no_grad()
def vae_ceiling(
    vae: AutoencoderKL,
    image_processor: SynerMedGenImageProcessor,
    images: np.ndarray | Sequence[np.ndarray],
    modality: str,
    window: tuple[float, float] | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """
    True slices after codec, VAE and back: the best that a model behind them can answer.

    The mean of the posterior is decoded, not a sample: noise is nothing that has to be lost.

    Args:
        vae (`AutoencoderKL`): In evaluation mode.
        image_processor ([`SynerMedGenImageProcessor`]): The codec.
        images (`np.ndarray` of shape `(slices, height, width)`, or a list of slices of one size):
            In scanner units (HU, SUV, MR signal).
        modality (`str`): Of the slices.
        window (`tuple[float, float]`, *optional*): `(low, high)` of their volume; by default measured on `images`.
        batch_size (`int`, defaults to 8): Slices at a time.

    Returns:
        `np.ndarray` of shape `(slices, height, width)`: float32 on the grid and in the units of `images`.

    Raises:
        `ValueError`: An unknown modality, or something that is no slice.
    """
    window = image_processor.intensity_window(np.asarray(images), modality) if window is None else window
    made = []
    for start in range(0, len(images), batch_size):
        inputs = [
            image_processor.preprocess_slice(image, modality, window) for image in images[start : start + batch_size]
        ]
        pixels = torch.stack([one.vae_pixels for one in inputs]).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        made += [
            image_processor.postprocess_slice(channels, one.intensity, one.geometry)
            for channels, one in zip(decoded, inputs, strict=True)
        ]
    return np.stack(made)


def case_ceiling(
    vae: AutoencoderKL,
    image_processor: SynerMedGenImageProcessor,
    images: dict[str, np.ndarray],
    mask: np.ndarray | None = None,
    chosen: Sequence[int] | slice = slice(None),
    protocol: str = "synthrad2023",
    batch_size: int = 8,
) -> list[dict]:
    """
    The ceiling of every modality of a case.

    Args:
        vae, image_processor, batch_size: As in [`vae_ceiling`].
        images (`dict[str, np.ndarray]`): Modality to `(slices, height, width)` in scanner units.
        mask (`np.ndarray`, *optional*): bool, of the same shape: the body, inside of which errors are told too.
        chosen (`Sequence[int]` or `slice`): Only these slices; windows are measured on all of them.
        protocol (`str`, defaults to `"synthrad2023"`): See [`~synermedgen_hf.metrics.protocols.evaluate_case`].

    Returns:
        `list[dict]`: One record for each modality that the image processor knows: `modality`, `slices`, the stamp
        `protocol` and `metrics`, means over slices: the protocol's, and `mae_..._frame` and `rmse_..._frame` over whole
        frames in scanner units. MR, which has no absolute scale, is brought to the codec's own first, as in an
        evaluation.
    """
    records = []
    for modality, volume in images.items():
        if modality not in image_processor.intensity:
            continue
        window, wanted = image_processor.intensity_window(volume, modality), np.asarray(volume[chosen], np.float32)
        spec, own = image_processor.intensity[modality], None if mask is None else mask[chosen]
        scale = None
        if "percentile" in spec:
            target = image_processor.target_record(modality)
            scale = target["low"], target["high"]
            share = (wanted - window[0]) / (window[1] - window[0])
            wanted, window = (scale[0] + share * (scale[1] - scale[0])).astype(np.float32), scale
        made = vae_ceiling(vae, image_processor, wanted, modality, window, batch_size)
        # A slice of MR is judged on the scale of its volume; of the others the protocol knows the range.
        judged = _judge(made, wanted, own, modality, protocol, scale, spec["unit"])
        if scale is not None:
            judged["protocol"]["scale"] = scale_of_mr(spec["percentile"])
        records.append({"modality": modality, "slices": len(wanted), **judged})
    return records


def _judge(
    made: np.ndarray,
    wanted: np.ndarray,
    mask: np.ndarray | None,
    modality: str,
    protocol: str,
    window: tuple[float, float] | None,
    unit: str,
) -> dict:
    """The protocol's figures of every slice, in 2D, and errors in scanner units over the whole frames, as means."""
    slices = []
    for place, (one, other) in enumerate(zip(made, wanted, strict=True)):
        own = None if mask is None else mask[place]
        judged = evaluate_case(one, other, mask=own, protocol=protocol, modality=modality, window=window)
        error, name = one.astype(np.float64) - other, unit.lower().replace(".", "")
        metrics = {f"mae_{name}_frame": np.abs(error).mean(), f"rmse_{name}_frame": np.sqrt((error**2).mean())}
        slices.append({**{key: float(value) for key, value in metrics.items()}, **judged["metrics"]})
    return {"protocol": judged["protocol"], "metrics": _means(slices)}


def _means(figures: list[dict]) -> dict[str, float | None]:
    """Means of figures by name, without those that are not defined."""
    means = {}
    for name in dict.fromkeys(name for own in figures for name in own):
        known = [own[name] for own in figures if own.get(name) is not None]
        means[name] = float(np.mean(known)) if known else None
    return means


def measure_ceiling(
    output: str | Path,
    model: str | Path,
    data_dir: str | Path | None = None,
    phantom_cases: int | None = None,
    phantom_slices: int = PHANTOM_SLICES,
    phantom_size: int = PHANTOM_SIZE,
    codec: str | None = None,
    protocol: str = "synthrad2023",
    slice_step: int = 1,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> dict:
    """
    The ceiling of a data set, per modality, into a folder. A run that was interrupted goes on with the next case.

    Args:
        output (`str` or `Path`): Folder for `cases.jsonl` (a line for each case and modality), `arguments.json` and
            `summary.json`.
        model (`str` or `Path`): Folder or Hub repository of a pipeline; its VAE and its processor are read.
        data_dir (`str` or `Path`, *optional*): Scans, as for `load_dataset("synermed")`; all of their splits.
        phantom_cases (`int`, *optional*): Instead of scans, so many simulated patients of each protocol.
        phantom_slices, phantom_size (`int`): Slices of each, pixels of the longer side.
        codec (`str`, *optional*): `"plain"` or `"bands"` instead of the checkpoint's own.
        protocol (`str`, defaults to `"synthrad2023"`): See [`~synermedgen_hf.metrics.protocols.evaluate_case`].
        slice_step (`int`, defaults to 1): Every so many usable slices.
        batch_size (`int`, defaults to 8): Slices at a time.
        dtype (`torch.dtype`, defaults to float32): Of the VAE.
        device (`str`, *optional*): By default a GPU where there is one.

    Returns:
        `dict`: `arguments`; `modalities`, for each `unit`, `cases`, `slices`, `protocol` and the `metrics`' means over
        cases; `skipped`, the cases that could not be read, and why.

    Raises:
        `ValueError`: An argument cannot be used, the folder holds something else, or no case can be read.
    """
    if (data_dir is None) == (phantom_cases is None):
        raise ValueError("Pass either --data-dir or --phantom-cases.")
    asked = {"phantom_slices": (phantom_slices, PHANTOM_SLICES), "phantom_size": (phantom_size, PHANTOM_SIZE)}
    if data_dir and (needless := [name for name, (value, usual) in asked.items() if value != usual]):
        raise ValueError(f"{', '.join(needless)} would do nothing: they are of simulated patients, not of scans.")
    if protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {protocol!r}. Choose one of {', '.join(PROTOCOLS)}.")
    if protocol == "brats":
        raise ValueError("brats is for MR volumes; a ceiling is measured on slices of all modalities. Choose another.")
    if min(slice_step, batch_size) < 1:
        raise ValueError(f"slice_step and batch_size must be at least 1, got {slice_step} and {batch_size}.")
    check_folder(model, {"model": None, "scheduler": None})  # they are not needed here
    cases, data = _find_cases(data_dir, phantom_cases, phantom_slices, phantom_size)
    image_processor = AutoProcessor.from_pretrained(model, subfolder="processor").image_processor
    if codec is not None:
        intensity = set_codec(image_processor.intensity, codec)
        image_processor = type(image_processor)(**{**image_processor.to_dict(), "intensity": intensity})
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype, use_safetensors=True).eval()
    arguments = {
        "metrics": VERSION,
        **data,
        "model": str(model),
        "checksum of the VAE": weights_checksum(vae),
        **{f"window of {name}": spec for name, spec in image_processor.intensity.items()},
        "size": image_processor.vae_size,
        "protocol": protocol,
        "scale of MR": "the codec's",
        "slice_step": slice_step,
        "dtype": str(dtype).removeprefix("torch."),
    }
    output = Path(output)
    claim_folder(output, arguments)
    vae.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    skipped = []
    with sole_user(output):
        records = _whole_cases(output / CASES, cases, image_processor.intensity)
        done = {(record["dataset"], record["case_id"]) for record in records}
        with open(output / CASES, "a", encoding="utf-8") as file:
            for case in tqdm(cases, desc="VAE ceiling", unit="case"):
                if (case.dataset, case.case_id) in done:
                    continue
                try:
                    images, mask, usable = _load(case, phantom_slices if phantom_cases else None, phantom_size)
                except CaseError as error:
                    skipped.append({"case": case.name, "reason": error.reason})
                    continue
                if not len(usable):
                    skipped.append({"case": case.name, "reason": "no slice shows enough of the patient"})
                    continue
                identity = {"dataset": case.dataset, "case_id": case.case_id, "region": case.region}
                try:
                    found = case_ceiling(vae, image_processor, images, mask, usable[::slice_step], protocol, batch_size)
                except ValueError as error:
                    raise ValueError(f"{case.name} cannot be judged: {error} Is dtype {dtype} enough?") from error
                new = [{**identity, **record} for record in found]
                file.write("".join(f"{json.dumps(record)}\n" for record in new))
                file.flush()
                records += new
    if not records:
        reason = skipped[0]["reason"] if skipped else "the checkpoint knows none of their modalities"
        raise ValueError(f"None of {len(cases)} cases gave a slice: {reason}.")
    summary = {"arguments": arguments, "modalities": summarise(records, image_processor.intensity), "skipped": skipped}
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _whole_cases(file: Path, cases: list[CaseRecord], known: Iterable[str]) -> list[dict]:
    """The records of cases of which all modalities are there; of a case that was half written none stays."""
    wanted = {(case.dataset, case.case_id): set(case.files).intersection(known) for case in cases}
    found: dict[tuple[str, str], list[dict]] = {}
    records = read_records(file)
    for record in records:
        found.setdefault((record["dataset"], record["case_id"]), []).append(record)
    kept = [
        record
        for name, own in found.items()
        if {record["modality"] for record in own} == wanted.get(name)
        for record in own
    ]
    if len(kept) < len(records):
        write_whole(file, "".join(f"{json.dumps(record)}\n" for record in kept))
    return kept


def _find_cases(data_dir, phantom_cases, phantom_slices, phantom_size) -> tuple[list[CaseRecord], dict]:
    """The cases, and what they depend on."""
    from datasets import load_dataset_builder  # slow to import, and only needed here

    if phantom_cases:
        data = {"phantom_cases": phantom_cases, "phantom_slices": phantom_slices, "phantom_size": phantom_size}
        return phantom_records("test", phantom_cases), data
    builder = load_dataset_builder("synermed", "pairs", data_dir=str(data_dir))
    if builder.config.released:
        raise ValueError(
            "These are the authors' released pictures, 8 bits over windows that nobody knows. A ceiling in HU or SUV "
            "needs scans in scanner units."
        )
    state = f"{builder.config_id}-{builder.hash[:16]}"
    return builder.config.cases, {"data_dir": str(data_dir), "state of the data": state}


def _load(case: CaseRecord, phantom_slices: int | None, phantom_size: int):
    """Images, mask and the usable slices of one case."""
    if phantom_slices is None:
        loaded = load_case(case)
        return loaded.images, loaded.mask, loaded.usable
    protocol, seed = case.dataset.removeprefix("phantom-"), int(case.case_id.rsplit("-", 1)[1])
    simulated = simulate_case(case.region, protocol, seed, phantom_slices, phantom_size)
    return simulated.images, simulated.mask, range(phantom_slices)


def summarise(records: Iterable[dict], intensity: dict[str, dict]) -> dict[str, dict]:
    """
    Means over cases for each modality.

    Args:
        records (`Iterable[dict]`): As [`case_ceiling`] gives them.
        intensity (`dict`): The image processor's windows.

    Returns:
        `dict[str, dict]`: Modality to `unit`, `cases`, `slices`, `protocol`, `metrics`; in the order of `intensity`. A
        modality that was measured under two stamps, as with a mask and without, comes twice, its area in the name.

    Raises:
        `ValueError`: Stamps of one modality differ in more than the area.
    """
    by_modality: dict[str, dict[str, list[dict]]] = {}
    for record in records:
        stamp = json.dumps(record["protocol"], sort_keys=True)
        by_modality.setdefault(record["modality"], {}).setdefault(stamp, []).append(record)
    for stamps in by_modality.values():
        firsts = {own[0]["protocol"]["area"]: own[0] for own in stamps.values()}
        if len(firsts) < len(stamps):
            check_same_protocol(own[0] for own in stamps.values())  # they differ in more than their area
    return {
        modality if len(by_modality[modality]) == 1 else f"{modality} ({own[0]['protocol']['area']})": {
            "unit": intensity[modality]["unit"],
            "cases": len(own),
            "slices": sum(record["slices"] for record in own),
            "protocol": own[0]["protocol"],
            "metrics": _means([record["metrics"] for record in own]),
        }
        for modality in intensity
        for own in by_modality.get(modality, {}).values()
    }


def ceiling_table(summary: dict[str, dict]) -> str:
    """The result of [`summarise`] as a Markdown table: for each modality, what the best of models would still miss."""
    plain = {}
    for modality, own in summary.items():
        unit = f"_{own['unit'].lower().replace('.', '')}_"  # it has a column of its own
        plain[modality] = {
            name.replace(unit, "_"): value for name, value in own["metrics"].items() if value is not None
        }
    columns = list(dict.fromkeys(name for metrics in plain.values() for name in metrics))
    lines = ["| " + " | ".join(["modality", "unit", "cases", "slices", *columns]) + " |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for modality, own in summary.items():
        values = [f"{plain[modality][name]:.4g}" if name in plain[modality] else "" for name in columns]
        lines.append("| " + " | ".join([modality, own["unit"], f"{own['cases']}", f"{own['slices']}", *values]) + " |")
    return "\n".join(lines)


__all__ = ["case_ceiling", "ceiling_table", "measure_ceiling", "summarise", "vae_ceiling"]
