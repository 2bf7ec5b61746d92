"""What this machine and a checkpoint can do: the reports of `synermedgen doctor` and `synermedgen info`.

A report is a plain dictionary, for programs; `doctor_text` and `info_text` put it into words. Whatever would stop a
user is in its `problems`, whatever would slow one down in its `advice`, each with what to do about it. It names
hardware, versions and folders (the home folder as `~`), so that it can be pasted into an issue.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import (
    constants,
    list_repo_files,
    parse_local_safetensors_file_metadata,
    parse_safetensors_file_metadata,
)
from packaging.requirements import Requirement
from transformers import AutoConfig
from transformers.utils import cached_file, is_torch_flex_attn_available

from . import checkpoint_path
from .hub import check_folder, read_card_facts
from .image_processing_synermedgen import SynerMedGenImageProcessor
from .loading_synermedgen import PART_PATTERNS, PARTS, part_of
from .model_card import intensity_table

PACKAGE = "synermedgen-hf"
EXTRAS = {
    "dicom": "DICOM, MHA and NRRD",
    "metrics": "evaluation",
    "train": "training",
    "demo": "the browser demo",
    "quantization": "int8 and int4 weights",
}
SELF_TEST_SECONDS = 5
WEIGHTS_OF_7B = 30e9  # bytes of a BAGEL-7B checkpoint in bfloat16, autoencoder included
_WEIGHT_FILES = re.compile(r"(model|vae)/[^/]+\.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint, without its weights
# ---------------------------------------------------------------------------------------------------------------------


def describe_checkpoint(model: str | os.PathLike) -> dict:
    """
    What a checkpoint is, from its small files and the headers of its weights; no weight is read or downloaded.

    Args:
        model (`str` or `os.PathLike`): A folder or a Hub repository.

    Returns:
        `dict`: `model`, `notice`, `routes`, `tasks`, `missing_parts`, `sampling`, `intensity` (the codec), `vae_size`,
        `license`, `base_model`, `datasets`, `training_data`, `parameters` by part, `dtypes` and `bytes` as stored.

    Raises:
        `OSError`: It is not a pipeline of SynerMedGen, or a file of it is missing or damaged.
    """
    check_folder(model, {})
    config = AutoConfig.from_pretrained(model, subfolder="model")
    if config.model_type != "synermedgen":
        raise OSError(f"{model} holds a pipeline of another kind: its model is a {config.model_type}.")
    image_processor = SynerMedGenImageProcessor.from_pretrained(model, subfolder="processor")
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(model, subfolder="scheduler")
    parameters, dtypes, size = dict.fromkeys(reversed(PARTS), 0), set(), 0
    for name, tensor in _stored_tensors(model):
        parameters[part_of(name)] += tensor.parameter_count
        dtypes.add(tensor.dtype)
        size += tensor.data_offsets[1] - tensor.data_offsets[0]
    return {
        "model": str(model),
        "notice": config.notice,
        "routes": config.trained_routes,
        "tasks": config.trained_tasks,
        "missing_parts": config.missing_parts,
        "sampling": {**config.sampling, "timestep_shift": scheduler["shift"]},
        "intensity": image_processor.intensity,
        "vae_size": dict(image_processor.vae_size),
        **dict.fromkeys(("license", "base_model", "datasets")),
        **read_card_facts(model),
        "training_data": _training_data(model),
        "parameters": parameters,
        "dtypes": sorted(dtypes),
        "bytes": size,
    }


def _stored_tensors(model):
    """Name, type and shape of every tensor, from the headers of the files of weights."""
    folder = Path(model)
    if folder.is_dir():
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.glob("*/*.safetensors"))}
    else:
        files = dict.fromkeys(sorted(list_repo_files(str(model))))
    for name, file in files.items():
        if not _WEIGHT_FILES.fullmatch(name):
            continue
        header = parse_local_safetensors_file_metadata(file) if file else parse_safetensors_file_metadata(model, name)
        prefix = "vae." if name.startswith("vae/") else ""
        yield from ((prefix + key, tensor) for key, tensor in header.tensors.items())


def _training_data(model) -> str | None:
    """The section of the model card that says what the weights have seen."""
    if Path(model).is_dir():
        file = Path(model) / "README.md"
    else:
        file = cached_file(str(model), "README.md", _raise_exceptions_for_missing_entries=False)
    if file is None or not Path(file).exists():
        return None
    found = re.search(r"^## Training data\n+(.+?)(?=\n## |\Z)", Path(file).read_text(errors="replace"), re.M | re.S)
    return found.group(1).strip() if found else None


def info_text(record: dict) -> str:
    """The report of [`describe_checkpoint`] in words."""
    parts = {name: count for name, count in record["parameters"].items() if count}
    sampling = record["sampling"]
    pixels = " to ".join(str(side) for side in sorted({record["vae_size"]["min_size"], record["vae_size"]["max_size"]}))
    lines = [Path(record["model"]).name if Path(record["model"]).is_dir() else record["model"]]
    lines += [f"  {record['notice']}"] if record["notice"] else []
    rows = {
        "licence": record["license"] or "not stated",
        "base model": record["base_model"],
        "data sets": ", ".join(record["datasets"]) if record["datasets"] else None,
        "training data": record["training_data"] or "not stated",
        "size": f"{_millions(sum(parts.values()))} parameters ("
        + ", ".join(f"{name} {_millions(count)}" for name, count in parts.items())
        + f"), {_gigabytes(record['bytes'])} as {' and '.join(record['dtypes'])}",
        "slices": f"worked on at {pixels} pixels a side; output on the input's grid",
        "sampling": f"{sampling['num_inference_steps']} steps, guidance scale {sampling['guidance_scale']:g}, image "
        f"guidance scale {sampling['image_guidance_scale']:g}, timestep shift {sampling['timestep_shift']:g}",
        "understands": ", ".join(record["tasks"])
        or "nothing yet: it does not identify modalities, so give --source with synthesize",
        "missing": f"{' and '.join(record['missing_parts'])} weights" if record["missing_parts"] else None,
    }
    width = max(map(len, rows))
    lines += [f"  {name.ljust(width)}  {value}" for name, value in rows.items() if value]
    if record["routes"]:
        lines.append(f"\nRoutes it was trained for ({len(record['routes'])})")
        regions = list(dict.fromkeys(route.split("/")[0] for route in record["routes"]))
        for region in regions:
            pairs = [route.split("/")[1] for route in record["routes"] if route.split("/")[0] == region]
            lines.append(f"  {region.ljust(max(map(len, regions)))}  {', '.join(pairs)}")
    else:
        lines.append("\nIt is not recorded which routes it was trained for: none is refused.")
    lines += ["\nIntensity codec", intensity_table(record["intensity"])]
    lines.append("\nResearch use only. Not for clinical use.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def examine(model: str | os.PathLike | None = None, device: str | None = None, self_test: bool = True) -> dict:
    """
    Look at the machine, the libraries and a checkpoint, and try a synthesis.

    Args:
        model (`str` or `os.PathLike`, *optional*): A folder or a Hub repository; by default the bundled weights.
        device (`str`, *optional*): Such as `"cuda:1"`; by default the first accelerator, or the CPU.
        self_test (`bool`, defaults to `True`): Load the weights and synthesise one simulated slice.

    Returns:
        `dict`: `machine`, `devices`, `device` (the one used), `attention`, `libraries`, `disk`, `checkpoint`,
        `self_test`, and the sentences `problems` and `advice`.

    Raises:
        `ValueError`: There is no such device.
    """
    record = {"problems": [], "advice": []}
    record["machine"] = _machine()
    record["devices"] = _devices()
    record["device"] = str(choose_device(device))
    record["attention"] = _attention()
    record["libraries"] = _libraries(record)
    record["disk"] = _disk(record)
    _advise_on_devices(record)
    source = checkpoint_path() if model is None else model
    try:
        record["checkpoint"] = describe_checkpoint(source)
    except (OSError, ValueError) as error:
        record["checkpoint"] = None
        record["problems"].append(str(error))
        return record
    _advise_on_checkpoint(record)
    if self_test and record["checkpoint"]["fits"]:
        _try_checkpoint(record, source)
    return record


def choose_device(name: str | None = None) -> torch.device:
    """
    The device to compute on: the named one, else the first accelerator, else the CPU.

    Raises:
        `ValueError`: There is no such device.
    """
    here = [one["device"] for one in _devices()]
    if name is None:
        return torch.device(here[0])
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = None
    if wanted is None or str(torch.device(wanted.type, wanted.index or 0)) not in [*here, "cpu:0"]:
        raise ValueError(f"There is no device {name!r}. This machine has: {', '.join(here)}.")
    return wanted


def _machine() -> dict:
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "nvidia_driver": shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists(),
    }


def _devices() -> list[dict]:
    """Every device torch can compute on, the best first; the CPU is always there."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": total,
                "free_memory_bytes": free,
                "capability": f"{properties.major}.{properties.minor}",
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and kind.type != "cuda":
        for index in range(torch.accelerator.device_count()):
            found.append({"device": f"{kind.type}:{index}", "name": kind.type.upper()})
    memory = psutil.virtual_memory()
    cpu = {"memory_bytes": memory.total, "free_memory_bytes": memory.available}
    return [*found, {"device": "cpu", "name": platform.processor() or platform.machine(), **cpu}]


def _attention() -> dict[str, str]:
    """Back-ends of `attn_implementation`, and what is known of each here."""
    flex = "available; compiles at its first use" if is_torch_flex_attn_available() else "this torch does not have it"
    return {
        "sdpa": "the default",
        "eager": "available; slower, for comparison",
        "flex_attention": flex,
        "flash_attention_2": "not used: image blocks and causal text in one sequence need a mask; nothing to install",
    }


def _libraries(record: dict) -> list[dict]:
    """The libraries this package asks for, with their versions; what is too old or too new is a problem."""
    rows = []
    wanted = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    for extra in (None, *EXTRAS):
        lacking = []
        for requirement in wanted:
            mark = requirement.marker
            belongs = (mark is None) if extra is None else mark is not None and mark.evaluate({"extra": extra})
            if not belongs or requirement.name == PACKAGE:
                continue
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = None
                lacking.append(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            asked = {"name": requirement.name, "version": version, "needs": str(requirement.specifier), "fits": fits}
            rows.append({**asked, "extra": extra})
            if version is not None and not fits:
                record["problems"].append(
                    f"{requirement.name} {version} is installed and {requirement.specifier} is needed: "
                    f"pip install '{requirement.name}{requirement.specifier}'."
                )
        if lacking and extra is None:
            record["problems"].append(f"Not installed: {', '.join(lacking)}. Run pip install {PACKAGE}.")
        elif lacking:
            record["advice"].append(
                f"For {EXTRAS[extra]} install {', '.join(lacking)}: pip install '{PACKAGE}[{extra}]'."
            )
    return rows


def _disk(record: dict) -> list[dict]:
    """Free space where checkpoints are kept, where the user works, and where temporary files go."""
    rows = []
    for use, folder in {
        "Hub cache": Path(constants.HF_HUB_CACHE),
        "working folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
    }.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        writable = os.access(there, os.W_OK)
        free = shutil.disk_usage(there).free
        rows.append({"use": use, "folder": _home(folder), "free_bytes": free, "writable": writable})
        if not writable:
            way = " Set HF_HOME to a folder of yours." if use == "Hub cache" else ""
            record["problems"].append(f"The folder of the {use}, {_home(folder)}, cannot be written to.{way}")
        elif use == "Hub cache" and free < WEIGHTS_OF_7B:
            record["advice"].append(
                f"A checkpoint of 7B size takes about {_gigabytes(WEIGHTS_OF_7B)}, and the Hub cache "
                f"{_home(folder)} has {_gigabytes(free)}: set HF_HOME to a larger disk before downloading one."
            )
    return rows


def _advise_on_devices(record: dict):
    machine, device = record["machine"], torch.device(record["device"])
    if machine["threads"] < machine["cpus"] and device.type == "cpu":
        record["advice"].append(
            f"torch uses {machine['threads']} of {machine['cpus']} CPU cores: set OMP_NUM_THREADS={machine['cpus']}."
        )
    accelerators = [one for one in record["devices"] if one["device"] != "cpu"]
    if not accelerators and machine["nvidia_driver"]:
        built = torch.version.cuda
        why = f"finds no GPU: its driver may be too old for CUDA {built}" if built else "is a build for the CPU"
        record["problems"].append(
            f"This machine has an NVIDIA driver, but torch {why}. Install the build that pytorch.org names for it."
        )
    elif not accelerators:
        record["advice"].append(
            "No GPU: synthesis runs on the CPU. That is fine for synermedgen-tiny; a 7B checkpoint wants a GPU."
        )
    for one in accelerators:
        if one.get("bfloat16") is False:
            record["advice"].append(
                f"{one['device']} has no bfloat16 units: use --dtype float32, or float16 for half the memory."
            )
        if "free_memory_bytes" in one and one["free_memory_bytes"] < 0.8 * one["memory_bytes"]:
            taken = one["memory_bytes"] - one["free_memory_bytes"]
            record["advice"].append(
                f"Something else holds {_gigabytes(taken)} of the {_gigabytes(one['memory_bytes'])} of {one['device']}."
            )


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint on this machine
# ---------------------------------------------------------------------------------------------------------------------


def _advise_on_checkpoint(record: dict):
    """Whether the weights fit, and in which type."""
    checkpoint, device = record["checkpoint"], torch.device(record["device"])
    count = sum(checkpoint["parameters"].values())
    wanted = str(torch.device(device.type, device.index or 0)) if device.type != "cpu" else "cpu"
    here = next(one for one in record["devices"] if one["device"] == wanted)
    free = here.get("free_memory_bytes", record["machine"]["free_memory_bytes"])
    checkpoint["fits"] = checkpoint["bytes"] < free
    sizes = {"float32": 4 * count, "bfloat16": 2 * count}
    checkpoint["dtype"] = "float32" if sizes["float32"] < free else "auto"
    if not checkpoint["fits"]:
        record["problems"].append(
            f"The weights take {_gigabytes(checkpoint['bytes'])}, and {wanted} has {_gigabytes(free)} free: they are "
            "not loaded here. Load them with quantization_config= (int8 takes about half of bfloat16), or on several "
            'devices with device_map="auto".'
        )
    elif checkpoint["dtype"] == "auto":
        record["advice"].append(
            f"In float32, the default, the weights take {_gigabytes(sizes['float32'])} and {wanted} has "
            f"{_gigabytes(free)} free: use --dtype bfloat16, {_gigabytes(sizes['bfloat16'])}."
        )
    if "MI" not in checkpoint["tasks"]:
        record["advice"].append("These weights do not identify modalities: give --source with synthesize.")


def _try_checkpoint(record: dict, source):
    """Load the weights, say what arrived, and synthesise one slice of a simulated patient."""
    from .pipeline_synermedgen import SynerMedGenPipeline

    checkpoint = record["checkpoint"]
    without = [pattern for part in checkpoint["missing_parts"] for pattern in PART_PATTERNS.get(part, ("vae.*",))]
    options = {"dtype": checkpoint["dtype"], "allow_missing": without, "print_report": False}
    start = time.perf_counter()
    try:
        pipe = SynerMedGenPipeline.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        record["problems"].append(str(error))
        return
    checkpoint["load_seconds"] = round(time.perf_counter() - start, 3)
    pipe.load_report.source = _home(Path(source))
    checkpoint["load_report"] = pipe.load_report.table({"": pipe.model, "vae.": pipe.vae})
    if missing := pipe.model.config.missing_parts:
        record["self_test"] = {"skipped": f"it came without its {' and '.join(missing)} weights"}
        return
    record["self_test"] = found = try_synthesis(pipe, torch.device(record["device"]), Path(source) == checkpoint_path())
    if "error_message" in found:
        record["problems"].append(f"The self-test failed: {found['error_message']}")
    elif not found.get("repeats", True):
        record["advice"].append("One seed gave slightly different values twice: kernels here are not deterministic.")


def try_synthesis(pipe, device: torch.device, is_bundled: bool = False) -> dict:
    """
    One slice of a simulated patient on the first route of a checkpoint, in one step, twice with the same seed.

    Args:
        pipe ([`SynerMedGenPipeline`]): Any; it is left on `device`.
        device (`torch.device`): Where to compute.
        is_bundled (`bool`): The weights know the simulated patients, so the answer must be near the true one.

    Returns:
        `dict`: `route`, `device`, `dtype`, `seconds` of the second time, `repeats` (both were equal to the bit) and,
        with `is_bundled`, the mean absolute `error` and that of the best constant, `error_of_a_constant`, in the
        target's `unit`. Or `skipped`, or `error_message`: why.
    """
    from .data.phantom import PROTOCOLS, simulate_case

    route = (pipe.model.config.trained_routes or ["brain/MRI-CT"])[0]
    region, (source, target) = route.split("/")[0], route.split("/")[1].split("-")
    seconds = _expected_seconds(pipe, device)
    if seconds > SELF_TEST_SECONDS:
        return {"skipped": f"it would take about {seconds:.0f} s on {device}, and has {SELF_TEST_SECONDS} s"}
    known = [place for place, modalities in PROTOCOLS.items() if source in modalities]
    place = next((one for one in known if one[0] == region), known[0])
    images = simulate_case(*place, seed=0, num_slices=1, size=64).images
    found = {"route": route, "device": str(device), "dtype": str(pipe.model.dtype).removeprefix("torch.")}
    pipe.set_progress_bar_config(disable=True)
    arguments = {"target": target, "source": source, "region": region, "output_type": "np", "seed": 0}
    arguments |= {"num_inference_steps": 1, "guidance_scale": 1.0}
    outputs = []
    try:
        pipe.to(device)
        for _ in range(2):
            start = time.perf_counter()
            made = pipe(images[source][0], **arguments)
            found["seconds"] = round(time.perf_counter() - start, 3)
            outputs.append(made.images[0])
    except (RuntimeError, ValueError) as error:  # out of memory, a kernel that is not there
        return {**found, "error_message": str(error).strip().splitlines()[0]}
    if outputs[0].shape != images[source][0].shape or not np.isfinite(outputs[0]).all():
        return {**found, "error_message": "the output is not finite, or lies on another grid than the input."}
    found["repeats"] = bool(np.array_equal(*outputs))
    if is_bundled:
        true = images[target][0]
        found["error"], found["unit"] = float(np.abs(outputs[0] - true).mean()), made.records[0]["unit"]
        found["error_of_a_constant"] = float(np.abs(true - np.median(true)).mean())
        if found["error"] > found["error_of_a_constant"]:
            found["error_message"] = (
                f"the bundled weights are off by {found['error']:.0f} {found['unit']} on a simulated patient, more "
                f"than a constant would be ({found['error_of_a_constant']:.0f}): torch computes wrongly on {device}."
            )
    return found


def _expected_seconds(pipe, device: torch.device) -> float:
    """One synthesis with one step, from the speed of a matrix product here: two operations a weight and token."""
    config, image_processor = pipe.model.config, pipe.processor.image_processor
    side = image_processor.vae_size["min_size"] // image_processor.latent_stride
    tokens = 2 * side**2 + (image_processor.vit_size["max_size"] // image_processor.vit_patch_size) ** 2
    text = config.text_config
    weights = text.num_hidden_layers * (3 * text.intermediate_size + 2 * text.hidden_size) * text.hidden_size
    one = torch.ones(512, 512, device=device, dtype=pipe.model.dtype)
    (one @ one).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        product = one @ one
    product.sum().item()  # waits for the device
    speed = 4 * 2 * 512**3 / (time.perf_counter() - start)
    return 2 * weights * tokens / speed


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def doctor_text(record: dict) -> str:
    """The report of [`examine`] in words."""
    machine, checkpoint = record["machine"], record["checkpoint"]
    sections = {
        "Machine": [
            ("system", machine["system"]),
            ("Python", machine["python"]),
            ("CPU", f"{machine['cpus']} cores, {machine['threads']} threads in torch"),
            ("memory", _free(machine)),
        ],
        "Devices": [
            (one["device"], one["name"] + (" (used)" if one["device"] == record["device"] else ""), _free(one))
            for one in record["devices"]
        ],
        "Attention": list(record["attention"].items()),
        "Libraries": [
            (one["name"], one["version"] or "not installed", f"needs {one['needs'] or 'any'}")
            for one in record["libraries"]
            if one["extra"] is None
        ],
        "Extras": [
            (
                extra,
                ", ".join(
                    f"{one['name']} {one['version'] or 'not installed'}"
                    for one in record["libraries"]
                    if one["extra"] == extra
                ),
            )
            for extra in EXTRAS
            if extra in {one["extra"] for one in record["libraries"]}
        ],
        "Disk": [(one["use"], f"{_gigabytes(one['free_bytes'])} free", one["folder"]) for one in record["disk"]],
    }
    lines = [f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"]
    for title, rows in sections.items():
        lines += [f"\n{title}", _columns(rows)]
    if checkpoint is not None:
        count = sum(checkpoint["parameters"].values())
        lines.append(f"\nCheckpoint\n  {_home(Path(checkpoint['model']))}")
        lines.append(
            f"  {_millions(count)} parameters, {_gigabytes(checkpoint['bytes'])}, {len(checkpoint['routes'])} routes"
        )
        lines += [f"  {checkpoint['notice']}"] if checkpoint["notice"] else []
        lines += [checkpoint["load_report"]] if "load_report" in checkpoint else []
    if "self_test" in record:
        lines.append(f"\nSelf-test\n  {_self_test_text(record['self_test'])}")
    for title in ("problems", "advice"):
        if record[title]:
            lines.append(f"\n{title.capitalize()}")
            lines += [f"  {number}. {sentence}" for number, sentence in enumerate(record[title], 1)]
    if not record["problems"]:
        lines.append("\nNo problem found.")
    return "\n".join(lines)


def _self_test_text(found: dict) -> str:
    if "skipped" in found:
        return f"not made: {found['skipped']}."
    if "error_message" in found:
        return f"failed: {found['error_message']}"
    text = f"{found['route']} in one step on {found['device']}, {found['dtype']}: {found['seconds']:.2f} s"
    text += ", the same twice" if found["repeats"] else ", not quite the same twice"
    if "error" in found:
        text += f", off by {found['error']:.0f} {found['unit']} (a constant: {found['error_of_a_constant']:.0f})"
    return text + "."


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _free(record: dict) -> str:
    if "free_memory_bytes" not in record:
        return ""
    return f"{_gigabytes(record['free_memory_bytes'])} free of {_gigabytes(record['memory_bytes'])}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _home(folder: Path) -> str:
    """A folder with the home folder, which is named after the user, as `~`."""
    home = str(Path.home())
    return "~" + str(folder)[len(home) :] if str(folder).startswith(home + os.sep) else str(folder)
