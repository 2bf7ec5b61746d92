"""The authors' files as they are: which rows come out, what is repaired in them, and what is skipped with a reason."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from synermedgen_hf.data import released
from synermedgen_hf.data.released import (
    find_released,
    fold_modality,
    parse_route,
    read_generation_rows,
    read_understanding_rows,
    released_shards,
)
from synermedgen_hf.data.splits import SPLITS
from synermedgen_hf.data.synermed import PAIR_FEATURES, UNDERSTANDING_FEATURES, SynerMedConfig
from synermedgen_hf.data.understanding import parse_listing

TASKS = ("CTS", "TIA", "MI")


def png(level, size=(6, 5), mode="L"):
    buffer = io.BytesIO()
    pixels = (np.arange(size[0] * size[1]).reshape(size[::-1]) + level).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def grey(data):
    return np.asarray(Image.open(io.BytesIO(data["bytes"])))


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        ("CT", "CT"),
        ("ct", "CT"),
        ("mr", "MRI"),
        (" MRI ", "MRI"),
        ("T2 (MRI)", "T2"),
        ("T1 (MRI)", "T1"),
        ("T1CE (MRI)", "T1CE"),
        ("t1ce", "T1CE"),
        ("T1-Gd", "T1CE"),
        ("t1c", "T1CE"),
        ("t1n", "T1"),
        ("contrast-enhanced T1-weighted MRI", "T1CE"),
        ("T1-weighted contrast-enhanced MRI", "T1CE"),
        ("FLAIR", "FLAIR"),
        ("T2-FLAIR", "FLAIR"),
        ("T2-weighted", "T2"),
        ("CBCT", "CBCT"),
        ("cone-beam CT", "CBCT"),
        ("PET", "PET"),
        ("pet_FDG", "PET"),
        ("ct_FDG", "CT"),
        ("FDG-PET", "PET"),
        ("computed tomography", "CT"),
        ("magnetic resonance imaging", "MRI"),
        ("ultrasound", None),
        ("", None),
        ("contact", None),
        pytest.param("ct_brain", "CT"),
        pytest.param("t2_brats", "T2"),
    ],
)
def test_a_modality_has_one_name_whatever_its_spelling(text, modality):
    assert fold_modality(text) == modality


@pytest.mark.parametrize(
    ("instruction", "source", "target"),
    [
        (
            "Generate a T1-weighted MRI from the T2-weighted input, preserving anatomical correspondence.",
            "T2",
            "T1",
        ),
        ("Synthesise the CT image of the brain from the MRI image.", "MRI", "CT"),
        ("Synthesize the FDG PET image of the whole body from the CT image.", "CT", "PET"),
        ("Convert this CBCT slice into a CT slice.", "CBCT", "CT"),
        pytest.param("Convert the MRI of the brain into a CT.", "MRI", "CT"),
        ("Turn the image from T1CE to FLAIR and keep the anatomy.", "T1CE", "FLAIR"),
        ("Given the T1 scan, produce the contrast-enhanced T1 scan.", "T1", "T1CE"),
        ("Using the PET slice, create the CT slice.", "PET", "CT"),
        ("from mr to ct", "MRI", "CT"),
        ("Translate this slice of the brain from MRI to CT.", "MRI", "CT"),
        ("Make it a CT image.", None, None),
        ("Produce the corresponding T2-weighted slice.", None, "T2"),
        ("Sharpen the picture.", None, None),
        ("Translate CT to CT.", None, "CT"),
    ],
)
def test_a_route_is_read_from_an_instruction_or_left_open(instruction, source, target):
    assert parse_route(instruction) == (source, target)


def test_a_route_that_is_not_understood_is_left_open_rather_than_wrong():
    assert parse_route("Synthesise from the T1 image the T2 image.")[1] != "T1"


@pytest.mark.parametrize(
    ("answer", "panels"),
    [
        ('["A" : "CT", "B" : "CBCT", "C" : "PET", "D": "T2 (MRI)"]', ["CT", "CBCT", "PET", "T2"]),
        ('"A" : "T1", "B" : "T1CE", "C" : "FLAIR", "D": "T2"', ["T1", "T1CE", "FLAIR", "T2"]),
        ('["A": "ct", "B": "mr"]', ["CT", "MRI"]),
        # The second B stands where D is meant: their order counts.
        ('["A" : "CT", "B" : "CBCT", "C" : "PET", "B": "MRI"]', ["CT", "CBCT", "PET", "MRI"]),
        ('{"A": "CT", "B": "PET"}', ["CT", "PET"]),
        ("A: CT, B: PET, C: MRI", ["CT", "PET", "MRI"]),
        ("A = CT; B = PET", ["CT", "PET"]),
        ("['A': 'CT', 'B': 'PET']", ["CT", "PET"]),
        ("B", []),
        ("Option B", []),
        ("Description A", []),
        ("Suppress scatter shading: cupping, rings and truncation.", []),
        pytest.param("A: CT\nB: PET", ["CT", "PET"]),
    ],
)
def test_a_listing_of_panels_is_read_whatever_its_quotes_and_brackets(answer, panels):
    assert (parse_listing(answer) or []) == panels


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_released_files_are_known_by_their_names(tmp_path):
    assert find_released(tmp_path) == {}
    (tmp_path / "slice").mkdir()
    assert find_released(tmp_path) == {}  # any folder may be called so
    (tmp_path / "SynerMed.parquet").touch()
    (tmp_path / "SynerMed.jsonl").touch()
    parquet, jsonl = str(tmp_path / "SynerMed.parquet"), str(tmp_path / "SynerMed.jsonl")
    slices = str(tmp_path / "slice")
    assert find_released(str(tmp_path)) == {"parquet": parquet, "jsonl": jsonl, "slices": slices}
    assert find_released(jsonl) == {"jsonl": jsonl, "slices": slices}
    assert find_released(tmp_path / "manifest.csv") == {}


def test_the_released_files_are_found_in_a_folder_inside_the_one_that_is_named(tmp_path):
    (tmp_path / "SynerMed").mkdir()
    (tmp_path / "SynerMed" / "SynerMed.jsonl").touch()
    assert find_released(tmp_path) == find_released(tmp_path / "SynerMed") != {}


def test_what_a_configuration_needs_and_lacks_is_said(tmp_path):
    (tmp_path / "SynerMed.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="'pairs' reads SynerMed.parquet, and there is only .*SynerMed.jsonl"):
        released_shards(find_released(tmp_path), "pairs")
    with pytest.raises(ValueError, match="SynerMed.jsonl names pictures in a folder slice/ beside it"):
        released_shards(find_released(tmp_path), "cts")


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------

TO_CT = ["Generate the CT image of this brain slice from MRI.", "Translate this brain slice from MRI to CT."]
TO_PET = ["Generate the PET image from CT."]


def write_parquet(root, rows, row_group_size=100):
    images, instructions = zip(*rows, strict=True)
    schema = pa.schema({"image_list": pa.list_(pa.binary()), "instruction_list": pa.list_(pa.list_(pa.string()))})
    table = pa.table({"image_list": images, "instruction_list": instructions}, schema=schema)
    pyarrow.parquet.write_table(table, root / "SynerMed.parquet", row_group_size=row_group_size)
    return root


def generation(root, **options):
    """Rows by their keys, and problems."""
    config, problems = SynerMedConfig(name="pairs", **options), []
    shards = released_shards(find_released(root), "pairs")
    assert list(shards) == ["train"]  # there is nothing in the file to tell patients by
    rows = list(read_generation_rows(shards["train"], "train", config, (), problems.append))
    assert len(dict(rows)) == len(rows)
    return dict(rows), problems


def test_a_row_of_two_images_is_a_pair(tmp_path):
    rows, problems = generation(write_parquet(tmp_path, [([png(0), png(7)], [TO_CT])]))
    (row,) = rows.values()
    assert problems == [] and set(row) == set(PAIR_FEATURES)
    np.testing.assert_array_equal(grey(row["source_image"]), np.arange(30).reshape(5, 6))
    np.testing.assert_array_equal(grey(row["target_image"]), np.arange(30).reshape(5, 6) + 7)
    assert (row["source_modality"], row["target_modality"], row["region"]) == ("MRI", "CT", "brain")
    assert row["instruction"] in TO_CT
    # Pictures: grey levels are all that is known of their intensities.
    assert row["source_window"] == row["target_window"] == {"unit": "grey level", "low": 0.0, "high": 255.0}
    assert (row["dataset"], row["patient_id"], row["axis"], row["slice_index"]) == ("synermed", "", "", -1)
    assert row["mask"] is row["lesion"] is None


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_grey_levels_survive_every_mode_of_a_picture(tmp_path, mode):
    (row,) = generation(write_parquet(tmp_path, [([png(0, mode=mode), png(7)], [TO_CT])]))[0].values()
    np.testing.assert_array_equal(grey(row["source_image"]), np.arange(30).reshape(5, 6))


def test_a_chain_gives_each_of_its_steps(tmp_path):
    rows, problems = generation(write_parquet(tmp_path, [([png(0), png(50), png(100)], [TO_CT[:1], TO_PET])]))
    found = [
        (grey(row["source_image"])[0, 0], grey(row["target_image"])[0, 0], row["instruction"]) for row in rows.values()
    ]
    assert found == [(0, 50, TO_CT[0]), (50, 100, TO_PET[0])] and problems == []


def test_several_sources_with_one_instruction_give_each_source(tmp_path):
    rows, problems = generation(write_parquet(tmp_path, [([png(0), png(50), png(100)], [TO_PET])]))
    found = [(grey(row["source_image"])[0, 0], grey(row["target_image"])[0, 0]) for row in rows.values()]
    assert found == [(0, 100), (50, 100)] and problems == []


def test_of_several_wordings_one_is_drawn_by_the_seed_and_the_row(tmp_path):
    wordings = [f"Generate CT from MRI, wording {number}." for number in range(4)]
    root = write_parquet(tmp_path, [([png(0), png(1)], [wordings])] * 40, row_group_size=16)
    drawn = [[row["instruction"] for row in generation(root, seed=seed)[0].values()] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(wordings)


def test_row_groups_are_the_shards(tmp_path):
    root = write_parquet(tmp_path, [([png(place), png(1)], [TO_CT]) for place in range(10)], row_group_size=4)
    (shards,) = released_shards(find_released(root), "pairs").values()
    assert [group for _, group in shards] == [0, 1, 2]
    config = SynerMedConfig(name="pairs")
    apart = [row for shard in shards for row in read_generation_rows([shard], "train", config, (), print)]
    together, _ = generation(root)
    assert dict(apart) == together and len(together) == 10


def test_instructions_that_name_no_route_are_kept_and_counted(tmp_path):
    root = write_parquet(
        tmp_path,
        [([png(0), png(1)], [[text]]) for text in ("Sharpen it.", "Produce the T2 slice.", *TO_CT)],
    )
    rows, problems = generation(root)
    assert [(row["source_modality"], row["target_modality"]) for row in rows.values()] == [
        ("", ""),
        ("", "T2"),
        ("MRI", "CT"),
        ("MRI", "CT"),
    ]
    assert [(problem.kind, problem.path) for problem in problems] == [("repaired", str(root / "SynerMed.parquet"))]
    assert problems[0].reason == "row group 0: 2 instructions do not name source and target; left empty"


def test_only_wanted_routes_come_out(tmp_path):
    root = write_parquet(tmp_path, [([png(0), png(1)], [TO_CT]), ([png(0), png(1)], [TO_PET])])
    for routes, kept in ((["CT-PET"], ["PET"]), (["brain/MRI-CT"], ["CT"]), (["pelvis/MRI-CT"], [])):
        assert [row["target_modality"] for row in generation(root, routes=routes)[0].values()] == kept


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (([png(0), png(1)[:40]], [TO_CT]), "row group 0: "),
        (([png(0), b""], [TO_CT]), "row group 0: "),
        (([png(0), None], [TO_CT]), "row group 0: "),
        (([png(0)], [TO_CT]), "1 images and 1 instructions make no pair"),
        (([png(0), png(1)], []), "2 images and 0 instructions make no pair"),
        (([png(0), png(1)], [[]]), "make no pair"),
        ((None, None), "0 images and 0 instructions make no pair"),
        (([png(0)] * 4, [TO_CT, TO_PET]), "4 images do not go with 2 instructions"),
        pytest.param(([png(0), png(1)], [None]), "make no pair"),
        pytest.param(([png(0), png(1)], [[None]]), "an instruction is no text"),
        pytest.param(([png(0), png(1, size=(5, 6))], [TO_CT]), "row group 0: "),
    ],
)
def test_a_bad_row_is_skipped_with_its_name_and_reason(tmp_path, row, reason):
    good = ([png(0), png(1)], [TO_CT])
    rows, problems = generation(write_parquet(tmp_path, [good, row, good]))
    assert list(rows) == ["row-0-0/0", "row-0-2/0"]
    (problem,) = problems
    assert (problem.kind, problem.case, problem.path) == (
        "skipped",
        "synermed/row-0-1",
        str(tmp_path / "SynerMed.parquet"),
    )
    assert reason in problem.reason


# ---------------------------------------------------------------------------------------------------------------------
# Understanding
# ---------------------------------------------------------------------------------------------------------------------

CTS = ["t1/caseA_s070.png", *(f"t1ce/caseA_s{number}.png" for number in ("068", "070", "071", "073"))]
TIA = ["ct_FDG/caseB_s100.png", "pet_FDG/caseB_s100.png"]
MI = ["t1/caseC_s001.png", "t2/caseC_s002.png", "flair/caseC_s003.png"]
LISTING = '["A" : "T1", "B" : "T2 (MRI)", "C" : "FLAIR"]'


def question(images, text, answer, **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": turns, **more}


def write_jsonl(root, rows, ending="\n", last="\n"):
    """Rows as they are, dicts as JSON; and every picture that a dict names."""
    for row in rows:
        names = row["image"] if isinstance(row, dict) and "image" in row else []
        for name in [names] if isinstance(names, str) else names:
            file = root / "slice" / name
            if file.resolve().is_relative_to((root / "slice").resolve()):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(len(name)))
    (root / "slice").mkdir(exist_ok=True)
    text = ending.join(json.dumps(row) if isinstance(row, dict) else row for row in rows) + last
    (root / "SynerMed.jsonl").write_bytes(text.encode())
    return root


def understanding(root, tasks=TASKS, **options):
    """Rows of all splits in the order of the file, and problems."""
    config, problems, rows = SynerMedConfig(name="understanding", **options), [], []
    for split, shards in released_shards(find_released(root), "understanding").items():
        rows += [
            row | {"split": split} for _, row in read_understanding_rows(shards, split, config, tasks, problems.append)
        ]
    return sorted(rows, key=lambda row: row["index"]), problems


def said(message):
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])


def test_a_row_has_the_columns_of_the_builder(tmp_path):
    row = question(CTS, "<image>" * 5 + " Which is the counterpart? [A,B,C,D]", "B", pair={"src": "t1", "tgt": "t1ce"})
    (row,), problems = understanding(write_jsonl(tmp_path, [row | {"case_id": "caseA", "slice_idx": 70}]))
    assert set(row) == {*UNDERSTANDING_FEATURES, "split"} and problems == []
    assert [image["bytes"] for image in row["images"]] == [png(len(name)) for name in CTS]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert said(row["messages"][0]) == "<image>" * 5 + "Which is the counterpart? [A,B,C,D]"
    assert row["question"] == "Which is the counterpart? [A,B,C,D]"
    assert (row["task"], row["answer"], row["options"], row["route"]) == ("CTS", "B", list("ABCD"), "T1-T1CE")
    assert (row["dataset"], row["case_id"], row["patient_id"], row["slice_index"]) == ("synermed", "caseA", "caseA", 70)


@pytest.mark.parametrize(
    ("images", "text", "answer", "task", "route"),
    [
        (CTS, "<image>" * 5, "D", "CTS", "T1-T1CE"),
        (TIA, "<image><image>Which describes it?", "Description A", "TIA", "CT-PET"),
        (TIA, "<image><image>Describe the change.", "Lower spatial resolution, faint Poisson noise.", "TIA", "CT-PET"),
        (MI, "<image>" * 3, LISTING, "MI", "T1-FLAIR"),
        (MI[:2], "<image>" * 2, 'A: "T1", B: "T2"', "MI", "T1-T2"),
        (MI[0], "<image>Which modality is it?", "T1 (MRI)", "", ""),
    ],
)
def test_the_task_is_told_by_images_and_answer_and_the_rest_by_the_names_of_the_files(
    tmp_path, images, text, answer, task, route
):
    (row,), _ = understanding(write_jsonl(tmp_path, [question(images, text, answer)]))
    assert (row["task"], row["route"]) == (task, route)
    names = [images] if isinstance(images, str) else images
    assert row["patient_id"] == names[0].split("/")[1].split("_")[0]
    assert row["slice_index"] == int(names[0][-7:-4])
    assert len(row["images"]) == len(names) == said(row["messages"][0]).count("<image>")


def test_configurations_of_one_task_keep_to_it(tmp_path):
    rows = [
        question(CTS, "<image>" * 5, "D"),
        question(TIA, "<image><image>", "Description A"),
        question(MI, "<image>" * 3, LISTING),
    ]
    root = write_jsonl(tmp_path, [*rows, question(MI[0], "<image>", "T1")])
    for tasks in (("CTS",), ("TIA",), ("MI",)):
        assert [row["task"] for row in understanding(root, tasks)[0]] == list(tasks)
    assert [row["task"] for row in understanding(root)[0]] == ["CTS", "TIA", "MI", ""]


@pytest.mark.parametrize(
    ("text", "expected", "note"),
    [
        ("First <image>, then <image>.", "First<image>, then<image>.", None),
        (
            "Look: <image> What changed?",
            "Look:<image><image>What changed?",
            "one image marker for several images was repeated",
        ),
        ("What changed?", "<image><image>What changed?", "without image markers: images were put in front"),
    ],
)
def test_image_markers_are_brought_to_the_number_of_images(tmp_path, text, expected, note):
    (row,), problems = understanding(write_jsonl(tmp_path, [question(TIA, text, "A")]))
    assert said(row["messages"][0]) == expected
    assert [(problem.kind, problem.reason) for problem in problems] == (
        [("repaired", f"1 rows: {note}")] if note else []
    )
    if note:
        assert problems[0].path.startswith(f"{tmp_path / 'SynerMed.jsonl'}, bytes 0 to ")


def test_repairs_are_counted_not_listed(tmp_path):
    rows = [question(TIA, "What changed?", "A", case_id=f"case{number}") for number in range(30)]
    _, problems = understanding(write_jsonl(tmp_path, rows))
    assert len(problems) <= len(SPLITS)
    assert sum(int(problem.reason.split()[0]) for problem in problems) == 30


def test_listings_are_written_in_one_form_and_counted(tmp_path):
    (row,), problems = understanding(write_jsonl(tmp_path, [question(MI, "<image>" * 3, LISTING)]))
    assert row["answer"] == said(row["messages"][1]) == "A: T1, B: T2, C: FLAIR"
    assert [problem.reason for problem in problems] == ["1 rows: the listing of panels was written in one form"]
    (row,), problems = understanding(write_jsonl(tmp_path, [question(MI, "<image>" * 3, "A: T1, B: T2, C: FLAIR")]))
    assert problems == []


def test_a_panel_of_an_unknown_modality_does_not_move_the_others(tmp_path):
    answer = '["A" : "CT", "B" : "ultrasound", "C" : "MRI"]'
    rows, _ = understanding(write_jsonl(tmp_path, [question(MI, "<image>" * 3, answer)]))
    assert all("B: MRI" not in row["answer"] for row in rows)


@pytest.mark.parametrize(
    ("images", "answer", "letter"), [(CTS, "Option B", "B"), (TIA, "Description A", "A"), (CTS, "B.", "B")]
)
def test_an_answer_in_words_is_one_of_the_options(tmp_path, images, answer, letter):
    (row,), _ = understanding(write_jsonl(tmp_path, [question(images, "", answer)]))
    assert row["answer"] in row["options"] and row["answer"] == letter
    assert said(row["messages"][1]) == letter  # what is trained is what an evaluation scores


@pytest.mark.parametrize("answer", ["Lower spatial resolution.", "In image B bone is bright.", "A or B"])
def test_a_free_answer_has_no_options(tmp_path, answer):
    (row,), _ = understanding(write_jsonl(tmp_path, [question(TIA, "Describe it.", answer)]))
    assert row["options"] == [] and said(row["messages"][1]) == answer


def test_a_picture_that_was_cut_short_is_no_row(tmp_path):
    lost = ["ct/other_010.png", "mr/other_010.png"]
    write_jsonl(tmp_path, [question(TIA, "<image><image>", "A"), question(lost, "<image><image>", "B")])
    file = tmp_path / "slice" / lost[1]
    file.write_bytes(file.read_bytes()[:-20])
    rows, problems = understanding(tmp_path)
    assert [row["answer"] for row in rows] == ["A"]
    assert any(f"the picture {lost[1]} is damaged" in problem.reason for problem in problems)


def test_a_conversation_keeps_all_its_answers(tmp_path):
    row = question(TIA, "<image><image>Which letter?", "A")
    row["conversations"] += [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It has less noise."}]
    (row,), _ = understanding(write_jsonl(tmp_path, [row]))
    assert [said(message) for message in row["messages"]] == [
        "<image><image>Which letter?",
        "A",
        "Why?",
        "It has less noise.",
    ]


GOOD = question(TIA, "<image><image>", "A")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "line 1 column 2"),
        ('{"image": ["t1/a.png"], "conv', "line 1 column"),
        (question(CTS, "<image>" * 3, "A"), "3 image markers for 5 images"),
        (question(TIA, "<image>" * 3, "A"), "3 image markers for 2 images"),
        (question([], "Which?", "A"), "the row has no image"),
        (question(CTS, "", "E"), "the answer is none of the options A to D: E"),
        (question(TIA, "", "Option F"), "the answer is none of the options A to D: Option F"),
        ({"image": TIA, "conversations": [{"from": "human", "value": "<image><image>"}]}, "the row has no answer"),
        (question(["../secret.png", TIA[1]], "<image><image>", "A"), "../secret.png points out of slice/"),
        (question(["/etc/hostname", TIA[1]], "<image><image>", "A"), "/etc/hostname points out of slice/"),
        pytest.param(
            '{"image": ["t1/a.png"]}',
            "conversations",
            id="without a conversation",
        ),
        pytest.param(
            '["t1/a.png"]',
            "the row is no object",
            id="list",
        ),
        pytest.param(
            {"image": TIA, "conversations": [{"from": "gpt", "value": "A"}]},
            "the row has no question",
            id="without a question",
        ),
    ],
)
def test_a_bad_line_is_skipped_once_with_its_byte_and_reason(tmp_path, line, reason):
    (tmp_path / "secret.png").write_bytes(png(0))
    root = write_jsonl(tmp_path, [GOOD, line, GOOD])
    # Whoever its patient may be, somebody says it: here all go to training.
    rows, problems = understanding(root, split_ratios=(1, 0, 0))
    offset = len(json.dumps(GOOD)) + 1
    assert [row["index"] for row in rows][0] == 0 and len(rows) == 2
    (problem,) = problems
    assert (problem.kind, problem.path) == ("skipped", f"{root / 'SynerMed.jsonl'}, byte {offset}")
    assert reason in problem.reason


def patients_of(split, count=1):
    """Names that fall into a split."""
    config = SynerMedConfig(name="understanding")
    names = (f"case{number}" for number in range(1000))
    return [name for name in names if released.split_of(name, config) == split][:count]


@pytest.mark.parametrize(
    "split",
    [
        "train",
        *(pytest.param(split) for split in ("validation", "test")),
    ],
)
def test_a_missing_picture_is_said_whatever_the_split(tmp_path, split):
    (patient,) = patients_of(split)
    root = write_jsonl(tmp_path, [GOOD | {"case_id": patient}])
    (root / "slice" / TIA[1]).unlink()
    rows, problems = understanding(root)
    assert rows == []
    assert [problem.reason for problem in problems] == [f"there is no picture {TIA[1]} in slice/"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"slice_idx": None}),
        pytest.param({"image": ["ct/1.2.840.113704.1234567890123.png", "pet/1.2.840.113704.1234567890123.png"]}),
        {"pair": None, "case_id": None},
        {"id": 7},
    ],
    ids=["null", "a long number in the name", "other nulls", "id"],
)
def test_optional_keys_may_be_null_or_strange(tmp_path, more):
    (row,), problems = understanding(write_jsonl(tmp_path, [GOOD | more]))
    assert problems == [] and -(2**31) <= row["slice_index"] < 2**31


def test_splits_go_by_patient_over_all_tasks(tmp_path):
    rows = []
    for number in range(60):
        names = [f"{folder}/patient{number}_s{place:03d}.png" for folder in ("t1", "t2") for place in (3, 4)]
        rows.append(question([names[0], names[2]], "<image><image>", "A"))
        rows.append(question(names[1], "<image>", "T1"))
        rows.append(question([names[1], names[2]], "", "A: T1, B: T2", case_id=f"patient{number}"))
    root = write_jsonl(tmp_path, rows)
    found, _ = understanding(root)
    assert len(found) == 180
    sides = {
        row["patient_id"]: {other["split"] for other in found if other["patient_id"] == row["patient_id"]}
        for row in found
    }
    assert len(sides) == 60 and all(len(side) == 1 for side in sides.values())
    assert {row["split"] for row in found} == set(SPLITS)
    again, _ = understanding(root, split_seed=1)
    assert [row["split"] for row in again] != [row["split"] for row in found]
    halves, _ = understanding(root, split_ratios=(0.5, 0, 0.5))
    assert {row["split"] for row in halves} == {"train", "test"}


def test_time_points_of_brats_are_one_patient(tmp_path):
    rows = [question([f"t1/BraTS-GLI-00001-{visit:03d}_s070.png"], "<image>", "T1") for visit in range(2)]
    rows.append(question(["t1/a_s001.png"], "<image>", "T1", case_id="BraTS-GLI-00001-002"))
    found, _ = understanding(write_jsonl(tmp_path, rows))
    assert {row["patient_id"] for row in found} == {"BraTS-GLI-00001"}


LONG = [question(TIA, "<image><image>" + "x" * (7 * number % 40), "A", case_id=f"case{number}") for number in range(25)]


@pytest.mark.parametrize(
    ("ending", "last"), [("\n", "\n"), ("\n", ""), ("\n", "\n\n"), ("\r\n", "\r\n"), ("\n\n", "\n"), ("\n  \n", "")]
)
def test_rows_do_not_depend_on_where_the_file_is_cut(tmp_path, monkeypatch, ending, last):
    root = write_jsonl(tmp_path, LONG, ending, last)
    whole, _ = understanding(root)
    assert len(whole) == 25
    length = len(json.dumps(LONG[0])) + len(ending)
    # Among them cuts right before, on and behind the end of a line.
    for size in (17, 100, length - 1, length, length + 1, 1000):
        monkeypatch.setattr(released, "RANGE_BYTES", size)
        assert len(released_shards(find_released(root), "cts")["train"]) > 1
        assert understanding(root)[0] == whole


def test_ranges_cover_the_file_once(tmp_path, monkeypatch):
    root = write_jsonl(tmp_path, LONG)
    monkeypatch.setattr(released, "RANGE_BYTES", 1000)
    shards = released_shards(find_released(root), "understanding")
    assert list(shards) == list(SPLITS)
    for ranges in shards.values():
        edges = [(start, end) for _, start, end in ranges]
        assert edges[0][0] == 0 and edges[-1][1] == Path(root / "SynerMed.jsonl").stat().st_size
        assert all(one[1] == other[0] for one, other in zip(edges, edges[1:], strict=False))


def test_a_bad_line_on_a_border_is_said_once(tmp_path, monkeypatch):
    root = write_jsonl(tmp_path, [*LONG[:3], "{oops", *LONG[3:]])
    for size in (50, 333, 10**6):
        monkeypatch.setattr(released, "RANGE_BYTES", size)
        rows, problems = understanding(root)
        assert len(rows) == 25 and len(problems) == 1
