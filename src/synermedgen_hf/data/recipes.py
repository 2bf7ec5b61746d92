"""The mixtures of the original training code, as `load_dataset` calls.

A mixture is a YAML file of groups: `unified_edit` (the Parquet file of pairs), `vlm_sft` (the JSON lines of questions),
`t2i_pretrain`. Each has a `weight`, its share of the samples, and `is_mandatory`, which puts one of it into every pack.
"""

import math
from pathlib import Path

import pyarrow.parquet
import yaml

from .released import JSONL, PARQUET, find_released

# Group of the mixture -> configuration of the builder.
CONFIGURATIONS = {"unified_edit": "pairs", "vlm_sft": "understanding"}


def import_recipe(file: str | Path, data_dir: str | Path | None = None) -> str:
    """
    The Python code that loads what a mixture trains on.

    Args:
        file (`str` or `Path`): The YAML file.
        data_dir (`str` or `Path`, *optional*): The folder of the released files; by default that of the YAML file.

    Returns:
        `str`: Code to paste: one `load_dataset` call a group, and their interleaving. What has no counterpart is said
        in comments.

    Raises:
        `FileNotFoundError`: There is no such file or folder.
        `ValueError`: It is no mixture.
    """
    file = Path(file)
    data_dir = Path(data_dir) if data_dir is not None else file.parent
    for path in (file, data_dir):
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}.")
    try:
        groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML ({error}).") from error
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{file} is no mixture: it must hold groups such as {', '.join(CONFIGURATIONS)}.")
    if not groups.keys() & CONFIGURATIONS.keys():
        raise ValueError(f"{file} has no group of {', '.join(CONFIGURATIONS)}, only {', '.join(map(str, groups))}.")
    released = find_released(data_dir)
    lines = [
        "import synermedgen_hf  # makes load_dataset know the name",
        "from datasets import interleave_datasets, load_dataset",
        "",
        f"# From {file.name}.",
    ]
    names, weights = [], []
    for name, group in groups.items():
        if name not in CONFIGURATIONS:
            lines.append(f"# {name}: no counterpart here; left out.")
            continue
        weight = group.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"{file}: the weight of {name} must be a number of at least 0, got {weight!r}.")
        lines += [f"# {name}: {remark}" for remark in _remarks(name, group, released)]
        options = f'"synermed", "{CONFIGURATIONS[name]}", data_dir={str(data_dir)!r}, split="train", streaming=True'
        if name == "vlm_sft":
            lines.append("# The original trains on every row; leave split_ratios out to hold patients back.")
            options += ", split_ratios=(1, 0, 0)"
        lines.append(f"{name} = load_dataset({options})")
        if weight > 0:
            names.append(name)
            weights.append(float(weight))
        else:
            lines[-1] = f"# {lines[-1]}  # weight 0"
    if not names:
        raise ValueError(f"{file}: every group has weight 0.")
    if len(names) == 1:
        lines.append(f"mixture = {names[0]}")
    else:
        shares = ", ".join(f"{weight / sum(weights):.6g}" for weight in weights)
        lines += [
            "# The rows of the two have different columns: for one joint training, interleave; for Stage I and",
            "# Stage II one after the other, as the paper trains, use each by itself.",
            f"mixture = interleave_datasets([{', '.join(names)}], probabilities=[{shares}], seed=42)",
        ]
    return "\n".join(lines)


def _remarks(name: str, group: dict, released: dict[str, str]) -> list[str]:
    """What a reader should know of one group."""
    remarks = []
    key, wanted = ("parquet", PARQUET) if name == "unified_edit" else ("jsonl", JSONL)
    if key not in released:
        remarks.append(f"{wanted} was not found in the data folder")
    elif key == "parquet":
        footer = pyarrow.parquet.ParquetFile(released[key]).metadata
        remarks.append(f"{footer.num_rows} rows in {footer.num_row_groups} row groups of {wanted}")
    else:
        remarks.append(f"{Path(released[key]).stat().st_size / 1e6:.1f} MB of {wanted}")
    if names := group.get("dataset_names"):
        remarks.append(f"was called {_listed(names)}")
    if group.get("is_mandatory"):
        remarks.append("mandatory: one sample in every pack; here its share is its weight alone")
    if group.get("num_used_data"):
        remarks.append(f"num_used_data {_listed(group['num_used_data'])}: add .take(n) for a part of it")
    for transform in ("image_transform_args", "vit_image_transform_args"):
        if isinstance(group.get(transform), dict):
            sizes = ", ".join(f"{key} {value}" for key, value in group[transform].items())
            part = "vit_size" if transform.startswith("vit") or name == "vlm_sft" else "vae_size"
            remarks.append(f"{transform}: {sizes}; the image processor's {part}")
    return remarks


def _listed(value) -> str:
    """One value or several, in one line."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
