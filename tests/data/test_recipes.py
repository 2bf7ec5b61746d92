"""Training mixtures of the original code come out as code that loads the same data."""

import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from synermedgen_hf.cli import app
from synermedgen_hf.data.recipes import import_recipe

MIXTURE = """\
t2i_pretrain:
  dataset_names:
  - t2i
  image_transform_args:
    image_stride: 16
    max_image_size: 1024
    min_image_size: 512
  is_mandatory: false
  weight: 1

unified_edit:
  dataset_names:
  - seedxedit_multi
  image_transform_args:
    image_stride: 16
    max_image_size: 1024
    min_image_size: 512
  vit_image_transform_args:
    image_stride: 14
    max_image_size: 518
    min_image_size: 224
  is_mandatory: false
  num_used_data:
  - 10
  weight: 3

vlm_sft:
  dataset_names:
  - llava_ov
  image_transform_args:
    image_stride: 14
    max_image_size: 980
    min_image_size: 378
    max_pixels: 2_007_040
  is_mandatory: true
  shuffle_lines: True
  num_used_data:
  - 1000
  weight: 1
"""


@pytest.fixture
def released(tmp_path):
    """The released files with ten pairs and ten questions, and a mixture beside them."""
    root = tmp_path / "Syner Med"
    (root / "slice" / "t1").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    picture = buffer.getvalue()
    images, texts = [[picture, picture]] * 10, [[["Generate CT from MRI."]]] * 10
    schema = pa.schema({"image_list": pa.list_(pa.binary()), "instruction_list": pa.list_(pa.list_(pa.string()))})
    table = pa.table({"image_list": images, "instruction_list": texts}, schema=schema)
    pyarrow.parquet.write_table(table, root / "SynerMed.parquet", row_group_size=4)
    with (root / "SynerMed.jsonl").open("w") as lines:
        for number in range(10):
            (root / "slice" / "t1" / f"case{number}_s001.png").write_bytes(picture)
            turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "T1"}]
            lines.write(json.dumps({"image": f"t1/case{number}_s001.png", "conversations": turns}) + "\n")
    (root / "mixture.yaml").write_text(MIXTURE)
    return root


def write(root, text):
    (root / "mixture.yaml").write_text(text)
    return root / "mixture.yaml"


def run(code):
    names = {}
    exec(compile(code, "recipe", "exec"), names)
    return names


def test_the_code_of_a_mixture_loads_its_data(released):
    names = run(import_recipe(released / "mixture.yaml"))
    assert [row["target_modality"] for row in names["unified_edit"]] == ["CT"] * 10
    assert {row["answer"] for row in names["vlm_sft"]} == {"T1"}
    mixed = list(itertools.islice(names["mixture"], 8))
    kinds = {"pair" if row.get("source_image") is not None else "question" for row in mixed}
    assert kinds == {"pair", "question"}


def test_weights_become_probabilities_and_what_has_no_counterpart_is_said(released):
    code = import_recipe(released / "mixture.yaml")
    assert "interleave_datasets([unified_edit, vlm_sft], probabilities=[0.75, 0.25], seed=42)" in code
    assert "# t2i_pretrain: no counterpart here; left out." in code
    for remark in (
        "10 rows in 3 row groups of SynerMed.parquet",
        "MB of SynerMed.jsonl",
        "was called seedxedit_multi",
        "mandatory: one sample in every pack",
        "image_transform_args: image_stride 14, max_image_size 980, min_image_size 378",
        "vit_image_transform_args: image_stride 14, max_image_size 518",
    ):
        assert remark in code
    assert all(len(line) < 200 for line in code.splitlines())


@pytest.mark.parametrize(("group", "configuration"), [("unified_edit", "pairs"), ("vlm_sft", "understanding")])
def test_one_group_alone_is_the_mixture(released, group, configuration):
    code = import_recipe(write(released, f"{group}:\n  weight: 0.4\n"))
    assert f'"synermed", "{configuration}"' in code and "interleave_datasets([" not in code
    names = run(code)
    assert names["mixture"] is names[group] and next(iter(names["mixture"]))


def test_a_group_of_weight_0_is_left_out(released):
    names = run(import_recipe(write(released, "unified_edit: {weight: 2}\nvlm_sft: {weight: 0}\n")))
    assert names["mixture"] is names["unified_edit"] and "vlm_sft" not in names


def test_groups_without_a_weight_count_alike(released):
    assert "probabilities=[0.5, 0.5]" in import_recipe(write(released, "unified_edit: {}\nvlm_sft: {}\n"))


def test_the_data_may_lie_elsewhere(released, tmp_path):
    (tmp_path / "recipes").mkdir()
    file = write(tmp_path / "recipes", MIXTURE)
    code = import_recipe(file)
    assert "# unified_edit: SynerMed.parquet was not found in the data folder" in code
    assert "# vlm_sft: SynerMed.jsonl was not found in the data folder" in code
    assert len(list(run(import_recipe(str(file), str(released)))["unified_edit"])) == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unified_edit: [", "is not valid YAML"),
        ("", "is no mixture: it must hold groups such as unified_edit, vlm_sft"),
        ("- unified_edit\n", "is no mixture"),
        ("unified_edit:\n", "is no mixture"),
        ("unified_edit: 1\n", "is no mixture"),
        ("t2i_pretrain: {weight: 1}\n", "has no group of unified_edit, vlm_sft, only t2i_pretrain"),
        ("unified_edit: {weight: 0}\nvlm_sft: {weight: 0.0}\n", "every group has weight 0"),
        ("unified_edit: {weight: -1}\n", "the weight of unified_edit must be a number of at least 0, got -1"),
        ("unified_edit: {weight: much}\n", "must be a number of at least 0, got 'much'"),
        ("unified_edit: {weight: true}\n", "must be a number of at least 0, got True"),
        pytest.param("unified_edit: {weight: .inf}\nvlm_sft: {weight: 1}\n", "must be a number of at least 0, got inf"),
        pytest.param("unified_edit: {weight: .nan}\nvlm_sft: {weight: 1}\n", "must be a number of at least 0, got nan"),
    ],
)
def test_what_is_no_mixture_is_refused_by_name(released, text, words):
    with pytest.raises(ValueError, match=f"mixture.yaml.*{words}"):
        import_recipe(write(released, text))


def test_files_and_folders_that_are_not_there_are_said(released, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no .*other.yaml"):
        import_recipe(released / "other.yaml")
    with pytest.raises(FileNotFoundError, match="There is no .*nowhere"):
        import_recipe(released / "mixture.yaml", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        pytest.param("unified_edit: {dataset_names: seedxedit_multi}\n", "was called seedxedit_multi"),
        pytest.param("unified_edit: {num_used_data: [10]}\n", "num_used_data 10:"),
    ],
)
def test_remarks_read_well(released, text, remark):
    assert remark in import_recipe(write(released, text))


def test_a_mixture_is_utf8_whatever_the_machine_thinks(released, request, ascii_locale):
    (released / "mixture.yaml").write_text(f"# Übung\n{MIXTURE}", encoding="utf-8")
    assert "0.75" in import_recipe(released / "mixture.yaml")


def test_the_command_prints_the_code_or_what_is_wrong(released):
    result = CliRunner().invoke(app, ["import-recipe", str(released / "mixture.yaml")])
    assert result.exit_code == 0 and result.stdout.strip() == import_recipe(released / "mixture.yaml")
    result = CliRunner().invoke(app, ["import-recipe", str(write(released, "unified_edit: 1"))])
    assert result.exit_code == 1 and "is no mixture" in result.stderr and result.stdout == ""
