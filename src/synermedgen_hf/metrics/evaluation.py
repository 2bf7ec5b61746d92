"""`synermedgen evaluate`: every route of a data set synthesised and judged, the same however the work is shared out.

    cases of the data set ─> rows ─> batches of one case and route ─> predict ─> protocols ─> parts/00017.jsonl
    all parts ─> summary.json, report.html, model-index.yml, cases.jsonl

- A case (one examination) is the unit that processes share: each takes every n-th, and a batch never holds more than
  one case. So a batch is the same in any number of processes, and so is each of its digits.
- Seeds come from the names of case, route and slice. Neither order nor batch size nor a restart changes the noise.
- A case that is done is a file of its own, and a batch that is done is a few lines of it: what was interrupted goes on
  from there.
- One case is in memory at a time; what is summed up are sums for each patient.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
from accelerate import Accelerator, InitProcessGroupKwargs
from datasets import IterableDataset, load_dataset_builder
from datasets.utils import logging
from diffusers import UNet2DModel
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor

from .. import model_source
from ..data.latents import window_for
from ..data.pairs import PAIR_FEATURES
from ..data.routes import ROUTES, Route
from ..data.sources import Problem
from ..data.splits import hash_unit, write_whole
from ..data.synermed import phantom_records
from ..hub import as_dtype, check_folder, load_vae
from ..image_processing_synermedgen import SMALLEST_SIDE, SynerMedGenImageProcessor
from ..loading_synermedgen import weights_checksum
from ..pipeline_synermedgen import SynerMedGenPipeline
from .baselines import (
    Ceiling,
    CopySource,
    IntensityMapping,
    TrainedNetwork,
    check_codec,
    codec_settings,
    fit_mapping,
    read_network,
    route_of,
    true_target,
)
from .protocols import VERSION, evaluate_case, scale_of_mr
from .report import draw_strip, keep_pictures, read_summary, write_report, write_summary
from .runs import CASES, PHANTOM_SIZE, claim_folder, name_of, name_text, read_records, sole_user

logger = logging.get_logger(__name__)

WINDOWS = SynerMedGenImageProcessor().intensity  # by which a data set measures those of its volumes
PARTS, MAPPING = "parts", "mapping.json"
BASELINES, LEVELS = ("copy", "mapping", "ceiling"), ("slice", "volume")
Predict = Callable[[list[dict], list[int]], list[np.ndarray]]


def evaluate(
    output: str | Path,
    data_dir: str | Path | None = None,
    phantom_cases: int | None = None,
    model: str | Path | None = None,
    baseline: str | Path | None = None,
    routes: Iterable[str] = (),
    split: str = "test",
    slice_step: int = 1,
    phantom_slices: int | None = None,
    phantom_size: int = PHANTOM_SIZE,
    phantom_scanner: str = "usual",
    level: str = "slice",
    protocol: str = "synthrad2023",
    samples: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    timestep_shift: float | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    seed: int = 0,
    beside: Iterable[str | Path] = (),
    untrained_routes: bool = False,
) -> str | None:
    """
    Evaluate a model or a baseline, in every process of a launch.

    Args:
        output (`str` or `Path`): Folder of this evaluation; the same arguments go on where it was interrupted. Batch
            size, device and versions of libraries are not among them: last digits depend on them, so an evaluation to
            be published is best made with one of each. `cases.jsonl` names the cases as the data set does, for bare
            folders by the folder's name; no other file does, but for the folder of a single case that is passed as
            `data_dir`.
        data_dir (`str` or `Path`, *optional*): Scans, as for `load_dataset("synermed")`.
        phantom_cases (`int`, *optional*): Instead of scans, so many simulated patients of each protocol.
        model (`str` or `Path`, *optional*): Pipeline; by default the bundled weights. Of a baseline only its processor
            is read, which owns the scale, and of the ceiling its autoencoder.
        baseline (`str` or `Path`, *optional*): `"copy"`, `"mapping"`, `"ceiling"`, or a folder that
            `examples/train_baseline.py` made, instead of the model; see [`~synermedgen_hf.metrics.baselines`].
        routes (`Iterable[str]`): Such as `"MRI-CT"` or `"brain/MRI-CT"`; by default all that the data has and the model
            was trained for.
        split (`str`, defaults to `"test"`): Of the patients.
        slice_step (`int`, defaults to 1): Every so many usable slices.
        phantom_slices, phantom_size (`int`): Axial slices of a simulated patient (by default the whole region), and
            pixels of the longer side.
        phantom_scanner (`str`, defaults to `"usual"`): Or `"unseen"`, machines outside the range of the training data.
        level (`str`, defaults to `"slice"`): `"slice"` judges each slice in 2D that shows enough of the patient,
            `"volume"` all slices of a case and route put back together, in 3D. There, one seed makes all slices.
        protocol (`str`, defaults to `"synthrad2023"`): See [`~synermedgen_hf.metrics.protocols.evaluate_case`].
            `"brats"` judges volumes alone.
        samples (`int`, defaults to 1): Mean of so many syntheses, of seeds that follow one another.
        num_inference_steps, guidance_scale, image_guidance_scale, timestep_shift: Of the sampler; by default as the
            checkpoint says.
        batch_size (`int`, defaults to 8): Slices at a time, within a case and route.
        dtype (`str`, defaults to `"float32"`): Of model and autoencoder.
        seed (`int`, defaults to 0): Another one draws other noise for every case.
        beside (`Iterable[str | Path]`): Folders of other evaluations of the same cases under the same protocol, such as
            baselines, to print beside.
        untrained_routes (`bool`, defaults to `False`): Judge the model on routes too that it was not trained for, such
            as those of other regions.

    Returns:
        `str`: The tables of the report; `None` in all processes but the first.

    Raises:
        `ValueError`: An argument cannot be used, a route was not trained for, the folder holds another evaluation, or
            what is to stand beside was asked in another way: said before any synthesis. Other scans under the same
            names are told afterwards, by their grids, masks and values. A prediction that is not finite is named.
    """
    if (data_dir is None) == (phantom_cases is None):
        raise ValueError("Pass either --data-dir or --phantom-cases.")
    if level not in LEVELS:
        raise ValueError(f"There is no level {level!r}: choose one of {', '.join(LEVELS)}.")
    network = folder = None
    if baseline not in (None, *BASELINES):
        folder = Path(baseline)
        if not folder.is_dir():
            raise ValueError(
                f"There is no baseline {str(baseline)!r}: choose one of {', '.join(BASELINES)}, or a folder that "
                "examples/train_baseline.py made."
            )
        network = read_network(folder)
        baseline = network["kind"]
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    given |= {"image_guidance_scale": image_guidance_scale, "timestep_shift": timestep_shift}
    sampler = [name for name, value in given.items() if value is not None]
    sampler += [name for name, value in {"samples": samples - 1, "seed": seed}.items() if value]
    if baseline is not None and sampler:
        raise ValueError(
            f"{', '.join(sampler)} would do nothing: they are of the model, and {baseline} draws no noise."
        )
    if baseline in ("copy", "mapping") and dtype != "float32":
        raise ValueError(f"dtype would do nothing: it is of weights, and {baseline} has none.")
    if baseline is not None and untrained_routes:
        raise ValueError("untrained_routes would do nothing: it is of the model, and a baseline answers what it can.")
    simulated = {"phantom_slices": None, "phantom_size": PHANTOM_SIZE, "phantom_scanner": "usual"}
    asked = {"phantom_slices": phantom_slices, "phantom_size": phantom_size, "phantom_scanner": phantom_scanner}
    if data_dir and (needless := [name for name, value in asked.items() if value != simulated[name]]):
        raise ValueError(f"{', '.join(needless)} would do nothing: they are of simulated patients, not of scans.")
    if min(samples, batch_size) < 1:
        raise ValueError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}.")
    if level == "slice" and protocol == "brats":
        raise ValueError(
            "brats scales by the 0.5th and 99.5th percentile of a volume, and its slices know but the latter: judge "
            "volumes (--level volume), or choose another protocol."
        )
    if level == "volume" and slice_step != 1:
        raise ValueError("A volume needs all of its slices: leave --slice-step out, or judge slices.")
    beside = list(beside)
    others = {str(other): read_summary(other)["arguments"] for other in beside}
    # A case may take hours, and whoever is done first waits for the others.
    processes = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])

    # 1. What is asked, checked before any weights are loaded.
    source = model_source(model)
    needless = {None: (), "ceiling": ("model", "scheduler")}.get(baseline, ("model", "scheduler", "vae"))
    check_folder(source, dict.fromkeys(needless))
    known = network["routes"] if network else []
    if baseline is None:
        told = AutoConfig.from_pretrained(source, subfolder="model")
        known = [] if untrained_routes else told.trained_routes
        if told.missing_parts:
            raise ValueError(
                f"The model came without its {' and '.join(told.missing_parts)} weights: it cannot synthesise."
            )
    processor = AutoProcessor.from_pretrained(source, subfolder="processor")
    codec = processor.image_processor
    if network:
        check_codec(folder, network, codec)
    options = {"data_dir": str(data_dir)} if data_dir else {"phantom_cases": phantom_cases}
    if phantom_cases:
        options |= {"phantom_slices": phantom_slices, "phantom_size": phantom_size}
    if phantom_scanner != "usual":
        options |= {"phantom_scanner": phantom_scanner}
    options |= {"slice_step": slice_step}
    if level == "volume":
        options |= {"min_share": 0.0}  # all slices of a case, as challenges judge it, those beyond the patient too
    with processes.main_process_first():
        builder, names = _open_pairs(options, list(routes), known)
    if phantom_slices is not None and phantom_slices < SMALLEST_SIDE:
        if turned := [name for name in names if name.startswith("whole-body/")]:
            raise ValueError(
                f"--phantom-slices {phantom_slices} leaves pictures of {phantom_slices} rows for {', '.join(turned)}: "
                f"whole bodies are looked at from the front. Ask for at least {SMALLEST_SIDE} axial slices, or for all "
                "of them and every so many of the pictures (--slice-step)."
            )
    rows = builder.as_streaming_dataset(split=split)
    targets = {name.split("-")[-1] for name in names}
    if unknown := sorted(targets - codec.intensity.keys()):
        raise ValueError(f"The processor of {source} has no window for {', '.join(unknown)}.")
    blank = np.zeros((32, 32), np.float32)
    for target in sorted(targets):
        evaluate_case(blank, blank, protocol=protocol, modality=target)  # says if the two do not go together
    same = {"metrics": VERSION, "protocol": protocol, "level": level, "split": split, "slice_step": slice_step}
    same |= {"phantom_cases": phantom_cases, **asked}
    for other, told in others.items():
        shared = {name.split("-")[-1] for name in names if name in told["routes"]}
        here = {**same, **_scales(codec.intensity, shared)}
        told = {**simulated, **told, **_scales(told["codec"]["intensity"], shared)}
        if unlike := [f"{name} {told.get(name)} (here {own})" for name, own in here.items() if told.get(name) != own]:
            raise ValueError(f"{other} cannot stand beside this evaluation: {', '.join(unlike)}.")
    arguments = {
        "metrics": VERSION,
        **options,
        "state of the data": f"{builder.config_id}-{builder.hash[:16]}",
        "routes": names,
        "split": split,
        "level": level,
        "protocol": protocol,
        "codec": codec_settings(codec),
        "baseline": baseline,
        **({"untrained_routes": True} if untrained_routes else {}),
    }
    if baseline is None:
        predict, made_by = _load_model(source, given, samples, dtype, processes.device)
        arguments |= {"model": str(source), **made_by, "dtype": dtype, "samples": samples, "seed": seed}
    elif baseline == "ceiling":
        vae, _ = load_vae(source, as_dtype(dtype))
        predict = Ceiling(vae.eval().to(processes.device), codec)
        arguments |= {"model": str(source), "checksum of the autoencoder": weights_checksum(vae), "dtype": dtype}
    elif baseline == "copy":
        predict = CopySource(codec)
    elif network:
        unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, torch_dtype=as_dtype(dtype))
        predict = TrainedNetwork(unet.eval().to(processes.device), codec, network["routes"])
        arguments |= {"folder": str(folder), "trained": {name: network[name] for name in ("minutes", "steps")}}
        arguments |= {"checksum of the weights": weights_checksum(unet), "dtype": dtype}
    output = Path(output)
    with processes.main_process_first():
        claim_folder(output, arguments)
    with sole_user(output) if processes.is_main_process else nullcontext():
        # Nobody writes before the lock is held: where it is refused, the other processes end here with the first.
        processes.wait_for_everyone()
        # 2. The cases, every n-th in each process.
        if not (output / CASES).exists():
            if baseline == "mapping":
                with processes.main_process_first():
                    # On scanners and slices as in training, whatever is evaluated.
                    usual = {
                        name: value for name, value in options.items() if name not in ("phantom_scanner", "min_share")
                    }
                    training = builder if usual == options else _open_pairs(usual, list(routes), known)[0]
                    predict = IntensityMapping(codec, _fit(output, training, codec, names))
            judge = Judge(predict, codec, protocol, level, batch_size, seed)
            own = range(processes.process_index, rows.num_shards, processes.num_processes)
            progress = tqdm(own, desc=split, unit="case", disable=not processes.is_main_process)
            for place in progress:
                part = output / PARTS / f"{place:06d}.jsonl"
                judge_case(judge, rows.shard(rows.num_shards, place), names, part, progress, builder.said)
            processes.wait_for_everyone()

        # 3. All of them together.
        if not processes.is_main_process:
            return None
        if not (output / CASES).exists():
            _gather(output, rows.num_shards, arguments, builder.report_file)
        # What a run left that was killed in its last step names cases, too.
        shutil.rmtree(output / PARTS, ignore_errors=True)
        for unfinished in output.glob(f"{CASES}.*.tmp"):
            unfinished.unlink()
        return write_report(output, beside)


def _scales(intensity: dict[str, dict], targets: set[str]) -> dict[str, float]:
    """Where a codec puts the window of each MR that is made."""
    known = {target: intensity.get(target, {}).get("reference_high") for target in sorted(targets)}
    return {f"scale of {target}": high for target, high in known.items() if high is not None}


def _open_pairs(options: dict, asked: list[str], known: list[str]) -> tuple[object, list[str]]:
    """The builder of the pairs, and the routes to evaluate, all of them known to the weights if these say any."""
    builder = load_dataset_builder("synermed", "pairs", routes=asked or None, **options)
    if builder.config.released:
        raise ValueError(
            "These are the authors' released pictures: 8 bits over windows that nobody knows, and all of them training "
            "data. An evaluation needs scans in scanner units."
        )
    names = _routes_of(builder.config)
    if not names:
        raise ValueError(f"No case has one of the routes {', '.join(asked)}.")
    untrained = [name for name in names if known and name not in known]
    if untrained and (asked or len(untrained) == len(names)):
        raise ValueError(
            f"The model was not trained for {', '.join(untrained)}. It was trained for: {', '.join(known)}."
        )
    if untrained:
        logger.warning(f"Left out, since the model was not trained for them: {', '.join(untrained)}.")
        names = [name for name in names if name not in untrained]
        builder = load_dataset_builder("synermed", "pairs", routes=names, **options)
    return builder, names


def _routes_of(config) -> list[str]:
    """The routes of the cases that were found, in the order of [`ROUTES`]."""
    cases = phantom_records("test", 1) if any(config.phantom_cases) else config.cases
    found = {
        Route(region, one, other)
        for region, modalities in {(case.region, tuple(case.files)) for case in cases}
        for one in modalities
        for other in modalities
        if one != other
    }
    wanted = config.routes
    if wanted is not None:
        found = {route for route in found if route.name in wanted or route.name.split("/")[1] in wanted}
    order = {route: place for place, route in enumerate(ROUTES)}
    return [route.name for route in sorted(found, key=lambda route: (order.get(route, len(order)), route))]


def _load_model(source, given: dict, samples: int, dtype: str, device) -> tuple["Synthesis", dict]:
    """The model ready to be asked, and what its answers depend on."""
    pipe = SynerMedGenPipeline.from_pretrained(source, dtype=dtype, print_report=False).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.model.config.trained_routes = []  # which routes may be asked for has been checked
    sampling = {**pipe.model.config.sampling, "timestep_shift": pipe.scheduler.config.shift}
    sampling |= {name: value for name, value in given.items() if value is not None}
    rest = {"guidance_interval": (0.0, 1.0), "guidance_rescale": "text_channel", "guidance_rescale_min": 0.0}
    pipe.check_inputs("CT", None, None, **sampling, **rest, num_images_per_prompt=samples, output_type="np")
    checksums = [weights_checksum(pipe.model), weights_checksum(pipe.vae)]
    whole = None if None in checksums else hashlib.sha256("".join(checksums).encode()).hexdigest()
    return Synthesis(pipe, sampling, samples), {"sampling": sampling, "checksum of the weights": whole}


def _fit(output: Path, builder, codec, names: list[str]) -> dict[str, dict]:
    """The intensity mapping, fitted on the training patients once and kept in the folder."""
    file = output / MAPPING
    if not file.exists():
        training = tqdm(builder.as_streaming_dataset(split="train"), desc="Fitting the mapping", unit="slice")
        write_whole(file, json.dumps(fit_mapping(training, codec, names)) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


class Synthesis:
    """
    The model's answers.

    Args:
        pipe ([`SynerMedGenPipeline`]): Loaded.
        sampling (`dict`): Arguments of its call.
        samples (`int`, defaults to 1): Mean of so many.
    """

    def __init__(self, pipe: SynerMedGenPipeline, sampling: dict, samples: int = 1):
        self.pipe, self.sampling, self.samples = pipe, sampling, samples

    def __call__(self, rows: list[dict], seeds: list[int]) -> list[np.ndarray]:
        """Predictions `(height, width)` in the target's units, one for each row of one route."""
        codec = self.pipe.processor.image_processor
        made = self.pipe(
            [np.asarray(row["source_image"]) for row in rows],
            target=rows[0]["target_modality"],
            source=rows[0]["source_modality"],
            region=rows[0]["region"],
            seed=seeds,
            window=[window_for(codec, row["source_modality"], row["source_window"]) for row in rows],
            num_images_per_prompt=self.samples,
            output_type="np",
            **self.sampling,
        ).images
        return [np.mean(made[start : start + self.samples], axis=0) for start in range(0, len(made), self.samples)]


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """
    Predicts and compares.

    Args:
        predict (`Callable`): Rows of one case and route and their seeds to predictions in the target's units.
        codec ([`SynerMedGenImageProcessor`]): Says in which units MR is made.
        protocol (`str`): Of the comparison.
        level (`str`, defaults to `"slice"`): Or `"volume"`.
        batch_size (`int`, defaults to 8): Slices predicted at a time.
        seed (`int`, defaults to 0): Of the evaluation.
    """

    predict: Predict
    codec: object
    protocol: str = "synthrad2023"
    level: str = "slice"
    batch_size: int = 8
    seed: int = 0

    def units(self, rows: Iterable[dict]) -> Iterator[list[dict]]:
        """What is judged in one go, always the same: a batch of slices of a route, or all of them as a volume."""
        waiting: dict[str, list[dict]] = {}
        for row in rows:
            route = route_of(row)
            waiting.setdefault(route, []).append(row)
            if self.level == "slice" and len(waiting[route]) == self.batch_size:
                yield waiting.pop(route)
        yield from waiting.values()

    def identities(self, unit: list[dict]) -> list[dict]:
        """Who each record of a unit is; also what its noise is drawn from."""
        rows = unit if self.level == "slice" else unit[:1]
        return [
            {
                "dataset": row["dataset"],
                "case_id": row["case_id"],
                "route": route_of(row),
                "slice_index": row["slice_index"] if self.level == "slice" else None,
                # Patients have to be told apart, not known.
                "patient": hashlib.sha256(f"{row['dataset']}/{row['patient_id']}".encode()).hexdigest()[:16],
            }
            for row in rows
        ]

    def scale(self, modality: str) -> tuple[float, float] | None:
        """Where the codec puts the window of an MR; HU and SUV are what they are."""
        if "percentile" not in self.codec.intensity[modality]:
            return None
        record = self.codec.target_record(modality)
        return record["low"], record["high"]

    def __call__(self, unit: list[dict]) -> list[dict]:
        """
        Records of one unit: identity, `seed`, what [`evaluate_case`] found, and `picture`, a PNG in base64.

        Args:
            unit (`list[dict]`): Rows of one case and route, pictures not decoded.
        """
        identities = self.identities(unit)
        for identity in identities:
            identity["seed"] = int(hash_unit(self.seed, *name_of(identity)) * 2**48)
        rows = [PAIR_FEATURES.decode_example(dict(row)) for row in unit]
        seeds = [identity["seed"] for identity in identities] * (len(rows) // len(identities))
        made = []
        for start in range(0, len(rows), self.batch_size):
            batch = slice(start, start + self.batch_size)
            made += self.predict(rows[batch], seeds[batch])
        wanted = [true_target(self.codec, row) for row in rows]
        masks = [None if row["mask"] is None else np.asarray(row["mask"], bool) for row in rows]
        modality, scale = rows[0]["target_modality"], self.scale(rows[0]["target_modality"])
        for row, prediction in zip(rows, made, strict=True):
            _check_finite(prediction, row)
        if self.level == "volume":
            middle = len(rows) // 2
            shown = [(rows[middle], made[middle], wanted[middle])]
            made, wanted, masks = [np.stack(made)], [np.stack(wanted)], [_stack_masks(masks)]
            identities[0]["slices"] = len(rows)
        else:
            shown = list(zip(rows, made, wanted, strict=True))
        records = []
        for identity, one, other, mask, picture in zip(identities, made, wanted, masks, shown, strict=True):
            try:
                judged = evaluate_case(
                    one,
                    other,
                    mask=mask,
                    protocol=self.protocol,
                    modality=modality,
                    spacing=tuple(rows[0]["spacing"][-one.ndim :]),
                    # MR is judged on the codec's scale, where its window is known. HU and SUV have their protocol's
                    # own range, and so has all of BraTS's.
                    window=None if self.protocol == "brats" else scale,
                )
            except ValueError as error:
                raise ValueError(f"{name_text(name_of(identity))} cannot be judged: {error}") from error
            judged["protocol"]["axis"] = rows[0]["axis"]
            if scale is not None and self.protocol != "brats":
                judged["protocol"]["scale"] = scale_of_mr(WINDOWS[modality]["percentile"])
            records.append({**identity, **judged, "picture": draw_strip(*picture, self.codec)})
        return records


def _check_finite(prediction: np.ndarray, row: dict):
    if bad := int((~np.isfinite(prediction)).sum()):
        raise ValueError(
            f"{row['dataset']}/{row['case_id']}, {route_of(row)}, slice {row['slice_index']}: of the prediction's "
            f"{prediction.size} values {bad} are NaN or infinite. Half precision overflows easily: try --dtype float32 "
            "or bfloat16 in another folder. What was evaluated so far is kept."
        )


def _stack_masks(masks: list[np.ndarray | None]) -> np.ndarray | None:
    return None if masks[0] is None else np.stack(masks)


def judge_case(
    judge: Judge,
    rows: IterableDataset,
    names: list[str],
    part: Path,
    progress: tqdm,
    problems: Collection[Problem] = (),
):
    """
    Judge one case into a file of its own, from where an earlier run stopped.

    Args:
        judge ([`Judge`]): As set up.
        rows (`IterableDataset`): Of the case.
        names (`list[str]`): Routes, in the order of the records.
        part (`Path`): The file; it appears when the case is done.
        progress (`tqdm`): Told how many slices there were.
        problems (`Collection[Problem]`, *optional*): Where the data set says what it had to repair while it is read: of
            a case that is among them, the records say so.
    """
    if part.exists():
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    unfinished = part.with_suffix(".unfinished")
    done = {name_of(record): record for record in read_records(unfinished)}
    with open(unfinished, "a", encoding="utf-8") as file:
        for unit in judge.units(rows.decode(False)):
            # A batch is the same as ever or it is not made: with others in it, last digits would be others.
            if not all(name_of(identity) in done for identity in judge.identities(unit)):
                records = judge(unit)
                file.write("".join(f"{json.dumps(record, allow_nan=False)}\n" for record in records))
                file.flush()
                done |= {name_of(record): record for record in records}
            progress.set_postfix(records=len(done))
    order = {name: place for place, name in enumerate(names)}
    records = sorted(done.values(), key=lambda record: (order[record["route"]], record["slice_index"] or 0))
    keep_pictures(records)
    # Reasons name files, and with them patients: that there was one is enough.
    case = f"{records[0]['dataset']}/{records[0]['case_id']}" if records else None
    if any((problem.kind, problem.case) == ("repaired", case) for problem in problems):
        records = [{**record, "repaired": True} for record in records]
    write_whole(part, "".join(f"{json.dumps(record)}\n" for record in records))
    unfinished.unlink()


def _gather(output: Path, count: int, arguments: dict, report: Path):
    """From the parts to the summary, the pictures and, at last, `cases.jsonl`."""
    parts = [output / PARTS / f"{place:06d}.jsonl" for place in range(count)]
    if absent := [part.name for part in parts if not part.exists()]:
        raise ValueError(
            f"{output / PARTS} lacks {', '.join(absent[:5])}: the folder must be one that all machines of a run share."
        )

    if empty := sum(part.stat().st_size == 0 for part in parts):
        logger.warning(f"{empty} of {count} cases gave nothing to judge; what could not be read is in {report}.")

    def records() -> Iterator[dict]:
        return chain.from_iterable(map(read_records, parts))

    shown = {record["route"] for record in records()}
    if unseen := [route for route in arguments["routes"] if route not in shown]:
        logger.warning(f"No case of the split {arguments['split']} shows {', '.join(unseen)}.")
    repaired = {(record["dataset"], record["case_id"]) for record in records() if "repaired" in record}
    if repaired:
        logger.warning(
            f"{len(repaired)} of {count} cases were repaired before they were judged; how is in {report}, or in that "
            "of the machine or the run that read them."
        )
    cases = {"found": count, "without slices": empty, "repaired": len(repaired), "routes without cases": unseen}
    write_summary(output, records, arguments, cases)
    unfinished = output / f"{CASES}.{os.getpid()}.tmp"
    with open(unfinished, "w", encoding="utf-8") as file:
        for record in records():
            record.pop("picture", None)
            file.write(json.dumps(record) + "\n")
    os.replace(unfinished, output / CASES)


__all__ = ["Judge", "Synthesis", "evaluate", "judge_case"]
