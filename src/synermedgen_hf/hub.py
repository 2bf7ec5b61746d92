"""One repository for transformers and diffusers: how a saved pipeline is laid out, described and published.

    config.json, model.safetensors.index.json, processor and tokenizer files     AutoModel, AutoProcessor
    model_index.json, model/, processor/, vae/, scheduler/                       SynerMedGenPipeline, DiffusionPipeline
    *_synermedgen.py, hub.py                                                     the same without this package

There is one copy of the weights: the index at the root points into `model/`. The code lies at the root for transformers
and for the pipeline, and once more in `model/` and `processor/`, where diffusers looks for components. This file is
part of what a repository carries, so a pipeline loaded from there can be saved again.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

CODE = (
    "configuration_synermedgen",
    "loading_synermedgen",
    "modeling_synermedgen",
    "image_processing_synermedgen",
    "processing_synermedgen",
    "hub",
    "pipeline_synermedgen",
)
COMPONENT_CODE = {
    "model": ("configuration_synermedgen", "loading_synermedgen", "modeling_synermedgen"),
    "processor": ("configuration_synermedgen", "image_processing_synermedgen", "processing_synermedgen"),
}
COMPONENT_CLASS = {
    "model": ("modeling_synermedgen", "SynerMedGenForConditionalGeneration"),
    "processor": ("processing_synermedgen", "SynerMedGenProcessor"),
}
INDEX = "model.safetensors.index.json"
# Weights of an earlier save that must not outlive it: the Auto classes would take them first.
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "vae/*.safetensors", "vae/*.safetensors.index.json")
STAGING = ".incomplete"
CARD_MARK = "<!-- Written by synermedgen_hf. Remove this line to keep your own changes when saving again. -->"
METRICS = ("ssim", "ms_ssim", "psnr", "mae", "rmse")

_FETCH_MARK = "# Names, for a download, the files that must come along; never run."


@contextlib.contextmanager
def staged(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write into that becomes part of `folder` only when all is written; on any error it is removed. What a
    killed process left behind is cleared by the next one.

    Args:
        folder (`str` or `os.PathLike`): Made if it does not exist. Files of the same name are replaced, weights of an
            earlier save removed, everything else stays.

    Raises:
        `NotADirectoryError`: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
    is_new = not folder.exists()
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    # Only renames from here on. The files that make a folder loadable come last.
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    files.sort(key=lambda path: str(path) in ("config.json", INDEX, "model_index.json"))
    for old in list(folder.rglob("*.safetensors*")):
        name = old.relative_to(folder)
        if STAGING not in name.parts and name not in files and any(fnmatch(str(name), one) for one in WEIGHTS):
            old.unlink()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    shutil.rmtree(staging)


def complete_repository(folder: Path, remote_code: bool = True):
    """
    Turn a folder with the four components into the layout above.

    Args:
        folder (`Path`): Holds `model_index.json`, `model/`, `processor/`, `vae/`, `scheduler/` as `save_pretrained`
            writes them.
        remote_code (`bool`, defaults to `True`): Carry the code, for use without the package.
    """
    model, processor = folder / "model", folder / "processor"
    index = _read_json(folder / "model_index.json")
    if remote_code:
        here = Path(__file__).parent
        for name in CODE:
            source = (here / f"{name}.py").read_text()
            if name == "pipeline_synermedgen":
                source = source.split(_FETCH_MARK)[0].rstrip() + "\n\n\n" + _fetch_lines()
            (folder / f"{name}.py").write_text(source)
        for component, names in COMPONENT_CODE.items():
            for name in names:
                shutil.copyfile(here / f"{name}.py", folder / component / f"{name}.py")
        index["_class_name"] = ["pipeline_synermedgen", "SynerMedGenPipeline"]
        for component, names in COMPONENT_CLASS.items():
            index[component] = list(names)
    else:
        for component in COMPONENT_CODE:
            for code in (folder / component).glob("*.py"):
                code.unlink()
            for file in (folder / component).glob("*config.json"):
                _write_json(file, {key: value for key, value in _read_json(file).items() if key != "auto_map"})
    _write_json(folder / "model_index.json", index)

    for file in (model / "config.json", model / "generation_config.json", *processor.iterdir()):
        if file.is_file() and file.suffix != ".py":
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / INDEX, _root_index(model))


def _root_index(model: Path) -> dict:
    """transformers' index of shards, each with `model/` before its name."""
    if (model / INDEX).exists():
        index = _read_json(model / INDEX)
        index["weight_map"] = {name: f"model/{file}" for name, file in index["weight_map"].items()}
        return index
    with safe_open(model / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    size = (model / "model.safetensors").stat().st_size
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, "model/model.safetensors")}


def _fetch_lines() -> str:
    """What diffusers' scanner for relative imports must see in the pipeline's file, since it does not look further."""
    modules = [f".{name}" for name in CODE if name != "pipeline_synermedgen"]
    modules += [f".{component}.{name}" for component, names in COMPONENT_CODE.items() for name in names]
    lines = "".join(f"    from {module} import __doc__ as _\n" for module in modules)
    return f"{_FETCH_MARK}\nif False:\n{lines}"


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


def make_model_card(
    config,
    intensity: dict[str, dict],
    title: str,
    base_model: str | None = None,
    license: str = "apache-2.0",
    datasets: list[str] | None = None,
    training_data: str | None = None,
    evaluation: dict | str | os.PathLike | None = None,
) -> ModelCard:
    """
    The model card of a pipeline: what it can do, on which scale, what it has seen, how well it did, and for whom it is
    not.

    Args:
        config ([`SynerMedGenConfig`]): Tells routes, tasks and the notice.
        intensity (`dict`): The image processor's windows.
        title (`str`): Name of the model.
        base_model (`str`, *optional*): Hub id of the weights the training started from; by default the repository the
            model was loaded from, if it was one.
        license (`str`, defaults to `"apache-2.0"`): A licence identifier of the Hub.
        datasets (`list[str]`, *optional*): Hub ids of the training data.
        training_data (`str`, *optional*): A statement of what the weights have seen, in words.
        evaluation (`dict` or path, *optional*): As `examples/evaluate_routes.py` writes it, or its path: `protocol`,
            `subjects`, and `routes` with one record each. It becomes the card's model-index and a table.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: The evaluation lacks `protocol` or `routes`.
    """
    if base_model is None:
        loaded_from = getattr(config, "_name_or_path", "") or ""
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", loaded_from) and not Path(loaded_from).exists()
        base_model = loaded_from if is_repository else None
    if isinstance(evaluation, (str, os.PathLike)):
        evaluation = _read_json(Path(evaluation))
    if evaluation is not None and not {"protocol", "routes"} <= evaluation.keys():
        raise ValueError(f"The evaluation must hold 'protocol' and 'routes', got {', '.join(evaluation) or 'nothing'}.")
    results = _eval_results(evaluation) if evaluation else None
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        license=license,
        base_model=base_model,
        datasets=datasets,
        tags=[
            "medical-imaging",
            "image-synthesis",
            "flow-matching",
            "transformers",
            "synermedgen",
            "research-use-only",
        ],
        model_name=title if results else None,
        eval_results=results,
    )
    sections = [
        CARD_MARK,
        f"# {title}",
        "**Research use only. Not for clinical use:** what it makes is synthetic, may be wrong, and must not inform "
        "the care of a patient." + (f" {config.notice}" if config.notice else ""),
        "A SynerMedGen model: one Mixture-of-Transformers that understands paired medical scans and synthesises one "
        "modality from another, in scanner units on the grid of the input.",
        "## Use\n\n"
        "```python\n"
        "from synermedgen_hf import SynerMedGenPipeline\n\n"
        'pipe = SynerMedGenPipeline.from_pretrained("...")  # this repository\n'
        'image = pipe(mr_slice, target="CT", source="MRI", output_type="np").images[0]\n'
        "```\n\n"
        "`AutoModel`, `AutoModelForImageTextToText` and `AutoProcessor` read it too; without the package, so does\n"
        '`DiffusionPipeline.from_pretrained("...", trust_remote_code=True)`.',
        "## Routes and tasks\n\n" + _routes_text(config),
        "## Intensity settings\n\n" + _intensity_table(intensity),
        "## Training data\n\n" + (training_data or config.notice or "Not stated."),
    ]
    if evaluation:
        sections.append("## Evaluation\n\n" + _evaluation_table(evaluation))
    sections += [
        "## Limits\n\n"
        "* Trained for the routes above; other anatomy, scanners and protocols are outside of what it has seen.\n"
        "* Lesions may vanish or appear, and fine structure is invented where the source does not show it.\n"
        "* An MR image has no absolute scale: synthesised MR is in arbitrary units.",
        "## Citation\n\n"
        "```bibtex\n"
        "@inproceedings{zhao2026synermedgen,\n"
        "  author    = {Zhao, Weiren and Dong, Yi and Chen, Cheng},\n"
        "  title     = {SynerMedGen: Synergizing Medical Multimodal Understanding with Generation via Task "
        "Alignment},\n"
        "  booktitle = {International Conference on Machine Learning},\n"
        "  year      = {2026},\n"
        "  url       = {https://arxiv.org/abs/2605.08724}\n"
        "}\n"
        "```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def may_replace_card(text: str | None) -> bool:
    """Whether a repository's README is ours to write: there is none, or it still carries our mark."""
    return text is None or CARD_MARK in text


def _routes_text(config) -> str:
    lines = []
    if "generation" in config.missing_parts or "vision" in config.missing_parts:
        lines.append(f"Synthesis is unavailable: without its {' and '.join(config.missing_parts)} weights.")
    elif config.trained_routes:
        lines.append("Synthesis:\n\n" + "\n".join(f"* {name}" for name in config.trained_routes))
    else:
        lines.append("Synthesis: it is not recorded which routes these weights were trained for.")
    if config.trained_tasks:
        lines.append(f"Understanding: {', '.join(config.trained_tasks)}.")
    else:
        lines.append("Understanding: not trained; it does not identify modalities or answer questions.")
    return "\n\n".join(lines)


def _intensity_table(intensity: dict[str, dict]) -> str:
    rows = ["| modality | unit | window | scale |", "|---|---|---|---|"]
    for modality, record in intensity.items():
        if "percentile" in record:
            window = f"{record['low']:g} to the {record['percentile']:g}th percentile of the volume"
        else:
            window = f"{record['low']:g} to {record['high']:g}"
        rows.append(f"| {modality} | {record['unit']} | {window} | {record['scale']} |")
    return "\n".join(rows)


def _evaluation_table(evaluation: dict) -> str:
    columns = [name for name in evaluation["routes"][0] if name not in ("route", "slices")]
    rows = [f"| route | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for record in evaluation["routes"]:
        rows.append(f"| {record['route']} | {' | '.join(f'{record[name]:.1f}' for name in columns)} |")
    where = f" {evaluation['subjects']}." if "subjects" in evaluation else ""
    return f"{evaluation['protocol']}.{where}\n\n" + "\n".join(rows)


def _eval_results(evaluation: dict) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-to-image",
            task_name=f"Synthesis {record['route']}",
            dataset_type=evaluation.get("dataset", "synermed"),
            dataset_name=evaluation.get("subjects", "SynerMed"),
            dataset_config=record["route"],
            metric_type=metric,
            metric_name=f"{metric} ({evaluation['protocol']})",
            metric_value=round(record[metric], 4),
        )
        for record in evaluation["routes"]
        for metric in METRICS
        if metric in record
    ]


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


__all__ = ["complete_repository", "make_model_card", "may_replace_card", "staged"]
