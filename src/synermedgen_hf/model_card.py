"""The model card of a saved pipeline: what it can do, on which scale, what it has seen, and for whom it is not."""

import json
import math
import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD_MARK = "<!-- Written by synermedgen_hf. Remove this line to keep your own changes when saving again. -->"
NOT_CLINICAL = (
    "**Research use only. Not for clinical use:** what it makes is synthetic, may be wrong, and must not inform "
    "the care of a patient."
)
SUMMARY = "summary.json"  # of a folder that `synermedgen evaluate` wrote


def make_model_card(
    config,
    intensity: dict[str, dict],
    title: str,
    base_model: str | None = None,
    license: str = "apache-2.0",
    datasets: list[str] | None = None,
    training_data: str | None = None,
    evaluation: dict | str | os.PathLike | None = None,
    repo_id: str | None = None,
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
        evaluation (`dict` or path, *optional*): Folder that `synermedgen evaluate` wrote, or its `summary.json` as a
            path or loaded. It becomes the card's model-index and its tables.
        repo_id (`str`, *optional*): Where it will be published: no model is its own base.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `FileNotFoundError`: There is no such evaluation.
        `ValueError`: It is none of synthesis, or not whole.
    """
    if base_model is None:
        loaded_from = getattr(config, "_name_or_path", "") or ""
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", loaded_from) and not Path(loaded_from).exists()
        base_model = loaded_from if is_repository and loaded_from != repo_id else None
    if isinstance(evaluation, (str, os.PathLike)):
        path = Path(evaluation)
        evaluation = json.loads((path / SUMMARY if path.is_dir() else path).read_text(encoding="utf-8"))
    if evaluation is not None:
        check_evaluation(evaluation)
    results = evaluation_results(evaluation) if evaluation else None
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
        NOT_CLINICAL + (f" {config.notice}" if config.notice else ""),
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
        "## Intensity settings\n\n" + intensity_table(intensity),
        "## Training data\n\n" + (training_data or config.notice or "Not stated."),
    ]
    if evaluation:
        sections.append("## Evaluation\n\n" + _evaluation_tables(evaluation))
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


def make_adapter_card(title: str, base_model: str, training_data: str, license: str = "apache-2.0") -> ModelCard:
    """
    The card of a LoRA adapter: what it belongs to, what it has seen, and for whom it is not.

    Args:
        title (`str`): Name of the adapter.
        base_model (`str`): The weights it was trained on: a Hub repository, or a folder, whose name alone is told.
        training_data (`str`): What it has seen, in words.
        license (`str`, defaults to `"apache-2.0"`): A licence identifier of the Hub.

    Returns:
        `huggingface_hub.ModelCard`
    """
    is_folder = Path(base_model).exists()
    base = Path(base_model).resolve().name if is_folder else base_model
    data = ModelCardData(
        library_name="peft",
        license=license,
        base_model=None if is_folder else base,
        tags=["lora", "medical-imaging", "synermedgen", "research-use-only"],
    )
    sections = [
        f"# {title}",
        NOT_CLINICAL,
        f"A LoRA adapter for SynerMedGen, trained on {base}.",
        "## Use\n\n"
        "```python\n"
        "from synermedgen_hf import SynerMedGenPipeline\n\n"
        'pipe = SynerMedGenPipeline.from_pretrained("...")  # the weights named above\n'
        'pipe.load_lora_weights("...")  # this repository\n'
        "```\n\n"
        "Routes and tasks are those that the base names: what the adapter alone has learned has to be added to\n"
        "`pipe.model.config.trained_routes` or `trained_tasks`. `--merge_adapter` of the training scripts saves a\n"
        "whole pipeline instead, which knows both.",
        "## Training data\n\n" + training_data,
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def check_evaluation(summary):
    """Raise a `ValueError` for an evaluation that makes no table: it names the route."""
    if not isinstance(summary, dict) or not {"arguments", "routes"} <= summary.keys():
        got = ", ".join(map(str, summary)) if isinstance(summary, dict) else type(summary).__name__
        raise ValueError(f"The evaluation must hold 'arguments' and 'routes', got {got or 'nothing'}.")
    if not isinstance(summary["routes"], dict) or not summary["routes"]:
        raise ValueError("The evaluation's 'routes' must be an object with a record for each route, and holds none.")
    for route, record in summary["routes"].items():
        if not isinstance(record, dict) or not {"protocol", "metrics", "cases"} <= record.keys():
            raise ValueError(f"The evaluation's record of {route} must hold 'protocol', 'metrics' and 'cases'.")
        for name, found in record["metrics"].items():
            mean = found.get("mean") if isinstance(found, dict) else found
            if mean is not None and not (isinstance(mean, (int, float)) and math.isfinite(mean)):
                raise ValueError(f"{name} of {route} in the evaluation is no number: {mean!r}.")


def may_replace_card(text: str | None) -> bool:
    """Whether a repository's README is ours to write: there is none, or it still carries our mark."""
    return text is None or CARD_MARK in text


def _routes_text(config) -> str:
    lines = []
    if config.missing_parts:
        lines.append(f"Synthesis is unavailable: without its {' and '.join(config.missing_parts)} weights.")
    elif config.trained_routes:
        lines.append("Synthesis:\n\n" + "\n".join(f"* {name}" for name in config.trained_routes))
    else:
        lines.append("Synthesis: it is not recorded which routes these weights were trained for.")
    if blind := [part for part in config.missing_parts if part in ("understanding", "vision")]:
        lines.append(f"Understanding is unavailable: without its {' and '.join(blind)} weights.")
    elif config.trained_tasks:
        lines.append(f"Understanding: {', '.join(config.trained_tasks)}.")
    else:
        lines.append("Understanding: not trained; it does not identify modalities or answer questions.")
    return "\n\n".join(lines)


def intensity_table(intensity: dict[str, dict]) -> str:
    """The windows of an image processor as a Markdown table."""
    rows = ["| modality | unit | window | scale |", "|---|---|---|---|"]
    for modality, record in sorted(intensity.items()):
        if "percentile" in record:
            window = f"{record['low']:g} to the {record['percentile']:g}th percentile of the volume"
        else:
            window = f"{record['low']:g} to {record['high']:g}"
        rows.append(f"| {modality} | {record['unit']} | {window} | {record['scale']} |")
    return "\n".join(rows)


def subjects(arguments: dict) -> str:
    """Whom an evaluation was about, in words without a path."""
    if "phantom_cases" in arguments:
        return f"{arguments['phantom_cases']} simulated patients of each protocol"
    return last_name(arguments["data_dir"])


def last_name(place: str) -> str:
    """Of a folder or a repository; of `.` that of the folder it stands for."""
    name = Path(place).name
    return Path(place).resolve().name if name in ("", "..") else name


def _evaluation_tables(summary: dict) -> str:
    """One table for the routes of one protocol and one set of metrics."""
    arguments = summary["arguments"]
    groups: dict[str, list[str]] = {}
    for route, record in summary["routes"].items():
        groups.setdefault(json.dumps([record["protocol"], list(record["metrics"])]), []).append(route)
    parts = [
        f"{subjects(arguments)}, split {arguments['split']}, judged by {arguments['level']} under "
        f"`{arguments['protocol']}`; means."
    ]
    for key, routes in groups.items():
        stamp, metrics = json.loads(key)
        rows = [f"| route | {arguments['level']}s | {' | '.join(metrics)} |", "|---" * (len(metrics) + 2) + "|"]
        for route in routes:
            record = summary["routes"][route]
            means = [record["metrics"][name]["mean"] for name in metrics]
            cells = ["" if mean is None else f"{mean:.4g}" for mean in means]
            rows.append(f"| {route} | {record['cases']} | {' | '.join(cells)} |")
        parts += ["; ".join(f"{name}: {value}" for name, value in stamp.items()) + ".", "\n".join(rows)]
    return "\n\n".join(parts)


def evaluation_results(summary: dict) -> list[EvalResult]:
    """
    What the Hub's model-index holds of an evaluation: one result for each route and metric, named with its protocol.

    Args:
        summary (`dict`): As `synermedgen evaluate` writes it.
    """
    arguments = summary["arguments"]
    return [
        EvalResult(
            task_type="image-to-image",
            task_name=f"Synthesis {route}",
            dataset_type="synermed",
            dataset_name=subjects(arguments),
            dataset_config=route,
            dataset_split=arguments["split"],
            metric_type=metric,
            metric_name=f"{metric} ({arguments['protocol']}, {arguments['level']})",
            metric_value=round(found["mean"], 6),
        )
        for route, record in summary["routes"].items()
        for metric, found in record["metrics"].items()
        if found["mean"] is not None
    ]


__all__ = [
    "evaluation_results",
    "intensity_table",
    "make_adapter_card",
    "make_model_card",
    "may_replace_card",
    "subjects",
]
