"""The model card of a saved pipeline: what it can do, on which scale, what it has seen, and for whom it is not."""

import json
import math
import os
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD_MARK = "<!-- Written by synermedgen_hf. Remove this line to keep your own changes when saving again. -->"
METRICS = ("ssim", "ms_ssim", "psnr", "mae", "rmse")


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
        evaluation (`dict` or path, *optional*): As `examples/evaluate_routes.py` writes it, or its path: `protocol`,
            `subjects`, and `routes` with one record each. It becomes the card's model-index and a table.
        repo_id (`str`, *optional*): Where it will be published: no model is its own base.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: The evaluation lacks `protocol` or `routes`.
    """
    if base_model is None:
        loaded_from = getattr(config, "_name_or_path", "") or ""
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", loaded_from) and not Path(loaded_from).exists()
        base_model = loaded_from if is_repository and loaded_from != repo_id else None
    if isinstance(evaluation, (str, os.PathLike)):
        evaluation = json.loads(Path(evaluation).read_text())
    if evaluation is not None:
        check_evaluation(evaluation)
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


def check_evaluation(evaluation):
    """Raise a `ValueError` for an evaluation that makes no table: it names the record."""
    if not isinstance(evaluation, dict) or not {"protocol", "routes"} <= evaluation.keys():
        got = ", ".join(map(str, evaluation)) if isinstance(evaluation, dict) else type(evaluation).__name__
        raise ValueError(f"The evaluation must hold 'protocol' and 'routes', got {got or 'nothing'}.")
    records = evaluation["routes"]
    if not isinstance(records, list) or not records:
        raise ValueError("The evaluation's 'routes' must be a list of records, and holds none.")
    for place, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("route"), str):
            raise ValueError(f"Record {place} of the evaluation's routes is no object with a 'route': {record!r}.")
        if record.keys() != records[0].keys():
            raise ValueError(f"Record {place} of the evaluation, {record['route']}, has other columns than the first.")
        for name, value in record.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if name != "route" and not is_number:
                raise ValueError(f"{name} of {record['route']} in the evaluation is no number: {value!r}.")


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


def _intensity_table(intensity: dict[str, dict]) -> str:
    rows = ["| modality | unit | window | scale |", "|---|---|---|---|"]
    for modality, record in sorted(intensity.items()):
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


__all__ = ["make_model_card", "may_replace_card"]
