"""Understanding scored: the same answers in any batch, figures that can be checked by hand, intervals over patients."""

import io
import json
import re

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from synermedgen_hf.data.sources import CaseRecord, LoadedCase
from synermedgen_hf.data.understanding import TaskSampler
from synermedgen_hf.metrics import understanding
from synermedgen_hf.metrics.understanding import answer_questions, resume_cases, summarise, understanding_table

# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


def noise_case(number, modalities, size=(20, 28), slices=24):
    rng = np.random.default_rng(number)
    images = {modality: rng.random((slices, *size), dtype=np.float32) for modality in modalities}
    windows = {modality: {"low": 0.0, "high": 1.0} for modality in modalities}
    record = CaseRecord(
        dataset="made", case_id=f"case-{number}", patient_id=f"p-{number}", region="brain", axis="axial", files={}
    )
    return LoadedCase(
        record=record,
        images=images,
        mask=None,
        lesion=None,
        spacing=(5.0, 1.0, 1.0),
        windows=windows,
        usable=np.arange(slices),
    )


def sampled(n_cases=3, **options):
    """Rows as a data set gives them; pictures are not square."""
    protocols = [("MRI", "CT"), ("T1", "T1CE", "T2", "FLAIR"), ("CT", "PET")]
    sampler = TaskSampler(n_cases, lambda number: noise_case(number, protocols[number % len(protocols)]), **options)
    return [row for index in range(len(sampler)) if (row := sampler[index]) is not None]


@pytest.fixture(scope="module")
def rows():
    """All tasks: letters, names and listings, 2 to 8 options, 1 to 5 images."""
    return sampled(tasks=("CTS", "TIA", "MI", "VQA"), per_case=8, listing_share=0.3, name_share=0.4)


def ask(model, processor, rows, batch_size=16, **options):
    return list(answer_questions(model, processor, rows, batch_size, **{"max_new_tokens": 6, **options}))


def probabilities(records):
    return [value for record in records for value in record["probabilities"]]


def says(model, monkeypatch, tokenizer, answers):
    """Let the model answer each question, found by a word of it, with the text given."""
    texts = []

    def generate(input_ids, **kwargs):
        prompts = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in input_ids.tolist()]
        texts[:] = [next(text for word, text in answers.items() if word in prompt) for prompt in prompts]
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(tokenizer, "batch_decode", lambda *args, **kwargs: list(texts))


def test_answers_do_not_depend_on_the_batch(model, processor, rows):
    assert len({len(row["options"]) for row in rows}) > 1 and len({len(row["images"]) for row in rows}) > 2
    alone = ask(model, processor, rows, 1)
    for batch_size in (2, 5, len(rows)):
        together = ask(model, processor, rows, batch_size)
        assert probabilities(together) == pytest.approx(probabilities(alone), abs=1e-5)
        for one, other in zip(together, alone, strict=True):
            assert {**one, "probabilities": None} == {**other, "probabilities": None}


def test_a_model_that_answers_nan_is_not_right(model, processor, rows, monkeypatch):
    """The first option would be chosen, and be right by chance."""
    score = understanding._score_options
    monkeypatch.setattr(understanding, "_score_options", lambda *all: [one * float("nan") for one in score(*all)])
    with pytest.raises(ValueError, match=f"Row {rows[0]['index']}: what the model makes of its options is NaN"):
        ask(model, processor, rows[:1])


def test_answers_come_in_the_order_of_the_rows_and_say_what_was_asked(model, processor, rows):
    records = ask(model, processor, iter(rows), 3)
    for row, record in zip(rows, records, strict=True):
        for name in ("index", "task", "route", "difficulty", "region", "dataset", "case_id", "patient_id", "options"):
            assert record[name] == row[name]
        assert record["answer"] == row["answer"]
        assert record["answer_means"] == row["meanings"][row["options"].index(row["answer"])]
        assert record["chosen"] == row["options"][int(np.argmax(record["probabilities"]))]
        assert record["chosen_means"] == row["meanings"][row["options"].index(record["chosen"])]
        assert record["correct"] == (record["chosen"] == row["answer"])
        assert sum(record["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert isinstance(record["text"], str) and record["text_correct"] == (record["parsed"] == row["answer"])
    assert json.loads(json.dumps(records)) == records


def test_likelihoods_and_texts_are_those_of_the_pipeline(pipe, processor, rows):
    pipe.model.config.trained_tasks = ["MI"]
    records = ask(pipe.model, processor, rows, 5)
    for row, record in zip(rows, records, strict=True):
        with torch.no_grad():
            scores = pipe.score_answers(row["images"], row["question"], row["options"])
        assert record["probabilities"] == pytest.approx(scores.softmax(0).tolist(), abs=1e-5)
    for row, record in list(zip(rows, records, strict=True))[::4]:
        assert record["text"] == pipe.answer(row["images"], row["question"], max_new_tokens=6)


def test_a_context_is_computed_once_for_all_options_and_the_text(model, processor, rows):
    lengths, images = [], []
    model.register_forward_pre_hook(lambda _, args, kw: lengths.append(kw["input_ids"].shape), with_kwargs=True)
    model.model.vision_model.register_forward_pre_hook(lambda _, args: images.append(len(args[1])))
    asked = [row for row in rows if row["task"] == "CTS"][:3]
    ask(model, processor, asked, max_new_tokens=4)
    # Context, letters, and the text, which begins with the last token of the context.
    assert [length[0] for length in lengths] == [3, 3 * 4, 3, 3, 3, 3]
    assert [length[1] for length in lengths[1:]] == [1] * 5
    assert images == [3 * 5]
    lengths.clear()
    ask(model, processor, asked, generate=False)
    assert len(lengths) == 2


def test_a_batch_holds_rows_of_about_one_length(model, processor, rows):
    short = [row for row in rows if len(row["images"]) == 1][:2]
    long = [row for row in rows if len(row["images"]) == 5][:2]
    counts = []
    model.model.vision_model.register_forward_pre_hook(lambda _, args: counts.append(len(args[1])))
    records = ask(model, processor, [short[0], long[0], short[1], long[1]], 2, generate=False)
    assert counts == [2, 10]
    assert [record["index"] for record in records] == [row["index"] for row in (short[0], long[0], short[1], long[1])]


def test_without_text_there_is_none(model, processor, rows):
    for record in ask(model, processor, rows[:2], generate=False):
        assert not {"text", "parsed", "text_correct"} & set(record)


def test_pictures_are_padded_to_a_square_as_in_the_pipeline(model, processor, rows, monkeypatch):
    windows = []
    image_processor = processor.image_processor
    preprocess = type(image_processor).preprocess

    def record(self, images, modality=None, window=None, *args, **kwargs):
        windows.extend(window)
        return preprocess(self, images, modality, window, *args, **kwargs)

    monkeypatch.setattr(type(image_processor), "preprocess", record)
    ask(model, processor, rows[:1], generate=False)
    assert windows == [(0.0, 255.0)] * len(rows[0]["images"])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("B", "B"), ("(b) is right", "B"), ("The answer is C.", "C"), ("B or C", None), ("nothing", None), ("", None)],
)
def test_letters_are_read_in_any_spelling(model, processor, rows, monkeypatch, text, parsed):
    row = next(row for row in rows if row["task"] == "CTS" and row["answer"] == "B")
    says(model, monkeypatch, processor.tokenizer, {"": text})
    (record,) = ask(model, processor, [row])
    assert (record["text"], record["parsed"], record["text_correct"]) == (text, parsed, parsed == "B")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": "E", "options": list("ABCD")}, "the answer 'E' is none of A, B, C, D"),
        ({"images": []}, "0 images for"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_before_any_is(model, processor, rows, changes, says):
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    bad = {**rows[1], **changes, "index": 4711}
    with pytest.raises(ValueError, match=re.escape(f"Row 4711 ({bad['task']}): {says}")) as error:
        ask(model, processor, [rows[0], bad])
    assert bad["patient_id"] not in str(error.value) and bad["case_id"] not in str(error.value)


def test_weights_that_learned_nothing_are_right_by_chance(model, processor):
    balanced = sampled(6, tasks=("CTS",), per_case=16)
    assert len(balanced) == 96 and {sum(row["answer"] == letter for row in balanced) for letter in "ABCD"} == {24}
    (found,) = summarise(ask(model, processor, balanced, generate=False))["tasks"].values()
    assert found["chance"] == 0.25
    # Four standard deviations of guessing.
    assert found["likelihood"]["accuracy"] == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 96) ** 0.5)
    low, high = found["likelihood"]["interval"]
    assert low <= found["likelihood"]["accuracy"] <= high


# ---------------------------------------------------------------------------------------------------------------------
# The authors' file
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    """Their four forms, read as a data set."""

    def line(place, names, question, answer):
        turns = [("human", "<image>" * len(names) + question), ("gpt", answer)]
        conversations = [{"from": role, "value": value} for role, value in turns]
        for number, name in enumerate(names):
            file = tmp_path / "slice" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.new("L", (16, 24), 20 * number + place).save(buffer, "PNG")
            file.write_bytes(buffer.getvalue())
        return json.dumps({"image": names, "conversations": conversations})

    lines = [
        line(0, ["t1/a_s1.png", *(f"t2/a_s{number}.png" for number in range(4))], "Which is it?", "Option B"),
        line(1, ["ct_FDG/b_s1.png", "pet_FDG/b_s1.png"], "What changes? A. One. B. Two.", "Description A"),
        line(2, ["t1/c_s1.png", "t2/c_s1.png"], "Name all panels.", '["A" : "T1", "B" : "T2 (MRI)"]'),
        line(3, ["t1/d_s1.png"], "Say something.", "A head."),
    ]
    (tmp_path / "SynerMed.jsonl").write_text("\n".join(lines) + "\n")
    streams = load_dataset(
        "synermed", "understanding", data_dir=str(tmp_path), report_dir=str(tmp_path / "report"), streaming=True
    )
    return sorted((row for stream in streams.values() for row in stream), key=lambda row: row["index"])


def test_the_released_file_is_scored_by_likelihood_where_it_has_letters(model, processor, released, monkeypatch):
    right = {"Which": "Option B", "What": "A.", "Name": "A: T1-weighted MRI, B: T2", "Say": "a head"}
    says(model, monkeypatch, processor.tokenizer, right)
    records = ask(model, processor, released)
    assert [record["task"] for record in records] == ["CTS", "TIA", "MI", ""]
    assert [record["probabilities"] is None for record in records] == [False, False, True, True]
    assert [record["correct"] is None for record in records] == [False, False, True, True]
    assert [record["text_correct"] for record in records] == [True] * 4
    assert [record["parsed"] for record in records] == ["B", "A", right["Name"], "a head"]
    assert {record["answer_means"] for record in records} == {None}

    wrong = {"Which": "C", "What": "?", "Name": "A: T2, B: T1", "Say": "a foot"}
    says(model, monkeypatch, processor.tokenizer, wrong)
    records = ask(model, processor, released)
    assert [record["text_correct"] for record in records] == [False] * 4
    tasks = summarise(records)["tasks"]
    assert set(tasks) == {"CTS", "TIA", "MI", "unknown"}
    assert tasks["MI"]["likelihood"] is tasks["MI"]["calibration"] is tasks["MI"]["chance"] is None
    assert tasks["MI"]["confusion"] == {"labels": ["T1", "T2"], "counts": [[0, 1], [1, 0]]}
    assert tasks["TIA"]["text"]["unparsed"] == 1 and tasks["MI"]["text"]["unparsed"] == 0
    assert tasks["unknown"]["confusion"]["labels"] == []


@pytest.mark.parametrize("text", ["", "T1, T2", "A: T1, B: ultrasound", "A: T1, B: T2, C: FLAIR"])
def test_a_listing_that_is_not_right(model, processor, released, monkeypatch, text):
    says(model, monkeypatch, processor.tokenizer, {"": text})
    (record,) = ask(model, processor, [row for row in released if row["task"] == "MI"])
    assert record["text_correct"] is False
    assert record["parsed"] == (text if "FLAIR" in text else None)


def test_later_turns_of_a_chat_are_not_asked(model, processor, released):
    row = next(row for row in released if row["task"] == "TIA")
    more = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    longer = {**row, "messages": row["messages"] + more, "images": row["images"] + row["images"][:1]}
    assert probabilities(ask(model, processor, [longer])) == probabilities(ask(model, processor, [row]))


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def record(correct=True, patient="one", sure=0.7, answer="A", chosen=None, task="CTS", n=4, **changes):
    """A record as [`answer_questions`] makes them."""
    options = list("ABCDEFGH"[:n])
    chosen = chosen or (answer if correct else next(option for option in options if option != answer))
    others = (1 - sure) / (n - 1)
    return {
        "index": 0,
        "task": task,
        "route": "brain/MRI-CT",
        "difficulty": "hard",
        "region": "brain",
        "dataset": "made",
        "case_id": patient,
        "patient_id": patient,
        "options": options,
        "answer": answer,
        "answer_means": None,
        "probabilities": [sure if option == chosen else others for option in options],
        "chosen": chosen,
        "chosen_means": None,
        "correct": chosen == answer,
        **changes,
    }


def only(records, **options):
    (found,) = summarise(records, **options)["tasks"].values()
    return found


def test_accuracy_by_likelihood_and_by_text():
    spoken = [
        record(True, text="A", parsed="A", text_correct=True),
        record(True, text="?", parsed=None, text_correct=False),
        record(False, text="B", parsed="B", text_correct=False),
        record(False, text="?", parsed=None, text_correct=False),
    ]
    found = only(spoken)
    assert (found["n"], found["patients"], found["chance"]) == (4, 1, 0.25)
    assert found["likelihood"] == {"n": 4, "accuracy": 0.5, "interval": None}
    assert found["text"] == {"n": 4, "accuracy": 0.25, "interval": None, "unparsed": 0.5}
    assert only([record()])["text"] is None


def test_chance_is_what_guessing_gets():
    assert only([record(n=2), record(n=8)])["chance"] == pytest.approx((1 / 2 + 1 / 8) / 2)


def test_tasks_routes_and_difficulties_are_counted_apart():
    records = [
        record(True),
        record(False, route="pelvis/MRI-CT"),
        record(True, difficulty="easy"),
        record(False, task="TIA", difficulty="", route=""),
    ]
    tasks = summarise(records)["tasks"]
    assert list(tasks) == ["CTS", "TIA"]
    cts = tasks["CTS"]
    assert {name: (part["n"], part["likelihood"]["accuracy"]) for name, part in cts["routes"].items()} == {
        "brain/MRI-CT": (2, 1.0),
        "pelvis/MRI-CT": (1, 0.0),
    }
    assert {name: part["likelihood"]["accuracy"] for name, part in cts["difficulties"].items()} == {
        "easy": 1.0,
        "hard": 0.5,
    }
    assert list(tasks["TIA"]["routes"]) == list(tasks["TIA"]["difficulties"]) == ["unknown"]


def test_patients_are_drawn_not_questions():
    def interval(records):
        return only(records)["likelihood"]["interval"]

    few = [record(number < 5, f"p{number}") for number in range(10)]
    low, high = interval(few)
    assert 0.1 <= low <= 0.3 and 0.7 <= high <= 0.9
    # Asking each of ten patients a hundred times tells no more about patients.
    assert interval(few * 100) == pytest.approx([low, high])
    many = [record(number % 2 == 0, f"p{number}") for number in range(1000)]
    assert interval(many)[1] - interval(many)[0] < 0.08
    # Patients that are all alike.
    alike = [record(right, f"p{number}") for number in range(10) for right in (True, False)]
    assert interval(alike) == [0.5, 0.5]
    # One patient says nothing about others.
    assert interval([record(right) for right in (True, False)] * 50) is None
    # The same name in two data sets means two patients.
    assert only([record(), record(dataset="other")])["patients"] == 2


def test_an_interval_weighs_patients_by_their_questions():
    records = [record(True, "one")] * 99 + [record(False, "two")]
    assert only(records)["likelihood"]["accuracy"] == 0.99
    assert only(records)["likelihood"]["interval"] == [0.0, 1.0]


def test_a_summary_is_the_same_for_the_same_seed_and_can_be_written():
    rng = np.random.default_rng(0)
    records = [record(bool(rng.integers(2)), f"p{rng.integers(20)}") for _ in range(200)]
    once, again, other = (summarise(records, 300, seed) for seed in (3, 3, 4))
    assert once == again != other and (once["bootstrap"], once["seed"]) == (300, 3)
    assert json.loads(json.dumps(once)) == once
    assert summarise([])["tasks"] == {}


@pytest.mark.parametrize("sure", [0.35, 0.8, 1.0])
def test_calibration_of_a_model_that_knows_how_sure_it_is(sure):
    records = [record(number < 100 * sure, sure=sure) for number in range(100)]
    found = only(records)["calibration"]
    assert found["error"] == pytest.approx(0, abs=1e-9)
    (filled,) = [one for one in found["bins"] if one["n"]]
    assert filled["n"] == 100 and filled["low"] <= sure <= filled["high"]
    assert filled["confidence"] == pytest.approx(sure) and filled["accuracy"] == pytest.approx(sure)
    assert len(found["bins"]) == 10
    assert all(one["confidence"] is one["accuracy"] is None for one in found["bins"] if not one["n"])


def test_calibration_error_is_the_mean_distance():
    # 100 answers at 0.9 of which half are right, 300 at 0.5 of which all are.
    records = [record(number < 50, sure=0.9) for number in range(100)] + [record(True, sure=0.5)] * 300
    found = only(records)["calibration"]
    assert found["error"] == pytest.approx((100 * 0.4 + 300 * 0.5) / 400)
    assert {one["low"]: one["n"] for one in found["bins"] if one["n"]} == {0.5: 300, 0.9: 100}


def test_confusion_of_letters():
    records = [record(answer="A", chosen="A")] * 3 + [record(answer="A", chosen="C"), record(answer="C", chosen="B")]
    assert only(records)["confusion"] == {"labels": ["A", "B", "C"], "counts": [[3, 0, 1], [0, 0, 0], [0, 1, 0]]}


def test_confusion_of_modalities_however_they_were_asked_for():
    records = [
        record(task="MI", answer="B", chosen="C", answer_means="CT", chosen_means="T1"),
        record(task="MI", options=["CT", "FDG PET"], answer="CT", chosen="CT", answer_means="CT", chosen_means="CT"),
        record(task="MI", answer="A: CT, B: T1", chosen="A: T1, B: CT", answer_means="?", chosen_means="?"),
    ]
    assert only(records)["confusion"] == {"labels": ["T1", "CT"], "counts": [[0, 1], [2, 1]]}


def test_the_table_shows_all_of_it():
    records = [
        record(number % 4 > 0, f"p{number}", text="A", parsed=None, text_correct=False, sure=0.75)
        for number in range(40)
    ]
    unscored = {**record(task="TIA", options=[]), "correct": None}
    lines = understanding_table(summarise([*records, unscored])).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells}) == 1
    assert cells[0][:5] == ["task", "subset", "n", "patients", "chance"]
    assert [line[:2] for line in cells[2:5]] == [["CTS", "all"], ["CTS", "hard"], ["CTS", "brain/MRI-CT"]]
    assert re.fullmatch(r"75\.0 \(\d\d\.\d to \d\d\.\d\)", cells[2][5])
    assert cells[2][2:5] == ["40", "40", "25.0"] and cells[2][6:] == ["0.0 (0.0 to 0.0)", "100.0", "0.0"]
    assert cells[5] == ["TIA", "all", "1", "1", "", "", "", "", ""]


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------

ARGUMENTS = {"config": "cts", "seed": 0, "text": True, "limit": None}


def test_a_run_goes_on_from_the_last_whole_line(tmp_path):
    folder = tmp_path / "new" / "run"
    assert resume_cases(folder, ARGUMENTS) == [] and json.loads((folder / "arguments.json").read_text()) == ARGUMENTS
    assert resume_cases(folder, ARGUMENTS) == []
    cases = folder / "cases.jsonl"
    for half in ("", '{"index": 2, "ta', "{"):
        cases.write_text('{"index": 0}\n{"index": 1}\n' + half)
        assert resume_cases(folder, ARGUMENTS) == [{"index": 0}, {"index": 1}]
        assert cases.read_text() == '{"index": 0}\n{"index": 1}\n'
    cases.write_text('{"ind')
    assert resume_cases(folder, ARGUMENTS) == [] and cases.read_text() == ""


def test_answers_to_something_else_are_not_mixed(tmp_path):
    resume_cases(tmp_path, ARGUMENTS)
    with pytest.raises(ValueError, match=r"something else: seed 0 \(now 1\), text True \(now False\)\. Choose another"):
        resume_cases(tmp_path, {**ARGUMENTS, "seed": 1, "text": False})
    with pytest.raises(ValueError, match=r"data_dir None \(now '/scans'\)"):
        resume_cases(tmp_path, {**ARGUMENTS, "data_dir": "/scans"})


def test_files_that_are_not_of_a_run_stay(tmp_path):
    (tmp_path / "cases.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="cases.jsonl is in the way"):
        resume_cases(tmp_path, ARGUMENTS)
    assert (tmp_path / "cases.jsonl").read_text() == "mine\n"


def test_a_damaged_line_is_said(tmp_path):
    resume_cases(tmp_path, ARGUMENTS)
    (tmp_path / "cases.jsonl").write_text('{"index": 0}\nno json\n')
    with pytest.raises(ValueError, match="cases.jsonl, line 2, is damaged.*Remove the file to ask again"):
        resume_cases(tmp_path, ARGUMENTS)
