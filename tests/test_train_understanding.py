"""Stage I run for real at tiny size: what is learned, what stays, what survives a kill, what is refused and saved."""

import contextlib
import errno
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset, Features, Image, IterableDataset, List, load_dataset
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from training import EXAMPLES, in_processes, killed, load_script
from transformers.trainer_callback import TrainerState

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data import synermed
from synermedgen_hf.data.collating import QuestionCollator
from synermedgen_hf.loading_synermedgen import PART_PATTERNS, part_of
from synermedgen_hf.metrics.understanding import COPIED, answer_questions
from synermedgen_hf.modeling_synermedgen import SynerMedGenAttention

SCRIPT, RECIPES = EXAMPLES / "train_understanding.py", sorted((EXAMPLES / "recipes").glob("understanding*.yaml"))
WEIGHTS = "model/model.safetensors"
# Read by PEFT off every model it wraps.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# 8 rows, CTS and TIA, in an epoch of 4 steps; a checkpoint at 2, 4 and 6.
USUAL = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "max_steps": 6,
}
ROWS = 8
LORA = {"use_peft": True, "learning_rate": 0.01, "lora_dropout": 0.1}
BRIEF = {"max_steps": 2, "save_strategy": "no"}
MODES = {
    "random": {},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "stream": {"dataset_streaming": True},
    "Muon": {"muon_learning_rate": 0.02, "lr_scheduler_type": "cosine"},
    "LoRA": LORA,
}


def command_line(options):
    arguments = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return arguments


@pytest.fixture(scope="module")
def script():
    return load_script("train_understanding")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("stage one")


@pytest.fixture(scope="module")
def arguments(start, scans):
    """The command line of a training into a folder."""

    def arguments(folder, **options):
        paths = {"model_name_or_path": start, "data_dir": scans, "output_dir": folder}
        if "dataset_name" in options or "phantom_cases" in options:
            del paths["data_dir"]
        made = {} if {"dataset_name", "data_dir"} & options.keys() else {"per_case": 2}
        return command_line({**paths, **USUAL, **made, **options})

    return arguments


@pytest.fixture(scope="module")
def train(script, arguments):
    """`python examples/train_understanding.py ...` in this process; what it printed."""

    def train(folder, **options):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                script.main(*script.parse_args(arguments(folder, **options)))
        finally:
            # The next one may be of another precision.
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return said.getvalue()

    return train


@pytest.fixture(scope="module")
def uninterrupted(work, train):
    """A training in one of the modes that nobody disturbed."""

    @functools.cache
    def uninterrupted(mode):
        folder = work / f"whole {mode}"
        (folder.parent / f"{folder.name}.txt").write_text(train(folder, **MODES[mode]))
        return folder

    return uninterrupted


@pytest.fixture(scope="module")
def trained(uninterrupted):
    return uninterrupted("random")


@pytest.fixture(scope="module")
def rows(scans):
    """The questions that are trained on, pictures as files."""
    return questions(scans)


@pytest.fixture(scope="module")
def labelled_rows(scans):
    return questions(scans, label_images=True)


def questions(scans, **options):
    dataset = load_dataset("synermed", "understanding", data_dir=str(scans), split="train", per_case=2, **options)
    return list(dataset.cast_column("images", List(Image(decode=False))))


@pytest.fixture
def own(tmp_path):
    """Options for a data set of one's own, one list of rows a file."""

    def own(*files, split="train"):
        for number, rows in enumerate(files):
            features = Features({name: synermed.UNDERSTANDING_FEATURES[name] for name in rows[0]})
            name = f"{split}-{number:05}-of-{len(files):05}.parquet"
            (tmp_path / "own" / "data").mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "own" / "data" / name))
        return {"dataset_name": tmp_path / "own", "dataset_config": "default"}

    return own


def history(folder, step=None):
    """What was logged up to the last checkpoint, or that of a step."""
    folders = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = folders[-1] if step is None else folder / f"checkpoint-{step}"
    return json.loads((state / "trainer_state.json").read_text())["log_history"]


def losses(folder, step=None):
    return [row["loss"] for row in history(folder, step) if "loss" in row]


def weights(pipeline):
    return load_file(pipeline / WEIGHTS)


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(pipeline, **options):
    return SynerMedGenPipeline.from_pretrained(pipeline, print_report=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# What is learned
# ---------------------------------------------------------------------------------------------------------------------


def test_the_generation_expert_stays_and_everything_else_learns(start, trained):
    before = weights(start)
    expected = {name for name in before if part_of(name) in ("understanding", "vision")}
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.connector.fc1.weight"} < expected
    assert moved(before, weights(trained / "pipeline")) == expected
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (trained / "pipeline" / vae).read_bytes() == (start / vae).read_bytes()


def test_the_eyes_stay_where_that_is_asked_for(start, train, tmp_path):
    train(tmp_path / "frozen", **BRIEF, freeze_vision=True)
    before = weights(start)
    expected = {name for name in before if part_of(name) == "understanding"}
    assert moved(before, weights(tmp_path / "frozen" / "pipeline")) == expected


@pytest.mark.parametrize("options", [{}, {**LORA, "load_in_4bit": True}], ids=["float32", "4 bit"])
def test_a_generation_expert_that_changed_is_found_and_nothing_is_saved(script, train, tmp_path, monkeypatch, options):
    def damage(trainer, **kwargs):
        name = "model.language_model.layers.1.mlp_moe_gen.up_proj.weight"
        parameters = dict(trainer.model.named_parameters())
        weight = next(parameter for full, parameter in parameters.items() if full.endswith(name))
        weight.data.view(-1)[0] += 1  # where it is quantised, a byte of two values

    monkeypatch.setattr(script.StageOneTrainer, "train", damage)
    with pytest.raises(RuntimeError, match="generation expert has changed"):
        train(tmp_path / "out", **{**options, **BRIEF})
    assert not [*tmp_path.glob("out/pipeline"), *tmp_path.glob("out/adapter*")]


def test_adapters_of_a_quantised_model_leave_it_as_it_is_and_go_into_the_weights_as_stored(train, start, tmp_path):
    said = train(tmp_path / "out", load_in_4bit=True, merge_adapter=True, **{**LORA, **BRIEF})
    assert re.search(r"The generation expert is untouched: checksum [0-9a-f]{64}", said)
    before = weights(start)
    assert moved(before, weights(tmp_path / "out" / "pipeline")) == {
        name for name in before if MATRICES.fullmatch(name)
    }


def test_labels_of_images_are_remembered(trained, train, tmp_path):
    assert load(trained / "pipeline").model.config.label_images is False
    train(tmp_path / "labelled", **BRIEF, label_images=True)
    assert load(tmp_path / "labelled" / "pipeline").model.config.label_images is True


def test_the_result_is_a_pipeline_that_answers(trained, scans):
    pipe = load(trained / "pipeline")
    assert pipe.model.config.trained_tasks == ["CTS", "TIA"]
    assert not pipe.model.training and all(parameter.requires_grad for parameter in pipe.model.parameters())
    row = next(iter(load_dataset("synermed", "mi", data_dir=str(scans), split="test", streaming=True)))
    assert isinstance(pipe.answer(row["images"], row["question"], max_new_tokens=2), str)


def test_the_report_comes_first_and_the_card_last(trained, start, work):
    said = (work / "whole random.txt").read_text()
    assert 0 <= said.index(f"Weights of {start}, sha256") < said.index("'loss'")
    assert re.search(r"\n  understanding +\d+ +0 +0 +0 +0.03 M +0.03 M +0 +float32", said)
    assert re.search(r"\n  generation +\d+ +0 +0 +0 +0.03 M +0 +0.03 M +float32", said)
    assert said.index("'loss'") < said.index("The generation expert is untouched: checksum ")
    assert "Stage I (CTS, TIA) on SynthRAD2023, 6 steps." in (trained / "pipeline" / "README.md").read_text()


@pytest.mark.parametrize("mode", ["random", "LoRA"])
def test_the_report_is_of_the_weights_loaded_and_of_what_is_trained(uninterrupted, work, start, mode):
    folder, pipe = uninterrupted(mode), load(start)
    said = (work / f"whole {mode}.txt").read_text()
    assert pipe.load_report.table({"": pipe.model, "vae.": pipe.vae}).splitlines()[0] in said
    trained = dict(re.findall(r"\n  (\w+) +\d+ +0 +0 +0 +\d.\d\d M +([\d.]+)", said))
    assert [part for part, size in trained.items() if float(size) > 0] == {
        "random": ["understanding", "vision"],
        "LoRA": ["understanding"],
    }[mode]
    if mode == "LoRA":
        adapter = load_file(folder / "adapter_model.safetensors")
        size = sum(tensor.numel() for tensor in adapter.values())
        assert trained["understanding"] == f"{size / 1e6:.2f}"


@pytest.mark.parametrize("batch", [ROWS, 2])
def test_the_loss_is_that_of_the_answers_tokens(train, start, scans, tmp_path, batch):
    """However many rows are in a step's batches, every token of an answer counts the same."""
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": ROWS // batch}
    train(tmp_path / "out", max_steps=1, save_steps=1, learning_rate=1e-8, **options)
    pipe = load(start)
    rows = list(load_dataset("synermed", "understanding", data_dir=str(scans), split="train", per_case=2))
    inputs = QuestionCollator(pipe.processor, pipe.model.config)(rows)
    with torch.no_grad():
        outputs = pipe.model(**inputs)
    assert losses(tmp_path / "out") == [pytest.approx(float(outputs.loss_ce), rel=1e-5)]
    answers = [pipe.processor.tokenizer(row["answer"] + "<|im_end|>")["input_ids"] for row in rows]
    assert (inputs["labels"] != -100).sum() == sum(map(len, answers))


@pytest.mark.parametrize("negatives", ["neighbours", "random", "both"])
def test_wrong_candidates_are_of_the_kind_asked_for(script, arguments, tmp_path, negatives):
    options, *_ = script.parse_args(arguments(tmp_path / "out", tasks=["CTS"], negatives=negatives))
    rows = script.load_questions(options, 0, "train", per_case=4, streaming=True)
    expected = {"neighbours": {"hard"}, "random": {"easy"}, "both": {"hard", "easy"}}
    assert {row["difficulty"] for row in rows} == expected[negatives]


def test_a_stream_comes_in_another_order_each_time(script):
    def rows_of(cases):
        for case in cases:
            yield from ({"row": 300 * case + row} for row in range(300))

    stream = IterableDataset.from_generator(rows_of, gen_kwargs={"cases": list(range(4))})
    passes = [row["row"] for row in islice(script.without_end(stream, seed=0), 2400)]
    assert passes[:1200] != passes[1200:]
    again = [row["row"] for row in islice(script.without_end(stream, seed=0), 2400)]
    assert passes == again
    assert len(set(passes)) == 1200 and max(passes.count(row) for row in range(1200)) <= 4


def test_some_of_the_tasks_are_learned_and_remembered(train, start, tmp_path):
    train(tmp_path / "MI", tasks=["MI"], negatives="random", **BRIEF)
    config = load(tmp_path / "MI" / "pipeline").model.config
    assert config.trained_tasks == ["MI"]
    assert "Stage I (MI) on SynthRAD2023, 2 steps." in (tmp_path / "MI" / "pipeline" / "README.md").read_text()
    first = {"model_name_or_path": tmp_path / "MI" / "pipeline"}
    train(tmp_path / "VQA", dataset_config="vqa", **first, **BRIEF)
    assert load(tmp_path / "VQA" / "pipeline").model.config.trained_tasks == ["MI", "VQA"]


def test_the_shares_of_tasks_are_those_asked_for(script, arguments, tmp_path):
    options, *_ = script.parse_args(arguments(tmp_path / "out", tasks=["MI", "VQA"], task_shares=[1, 9]))
    tasks = [row["task"] for row in script.load_questions(options, 0, "train", per_case=20)]
    assert set(tasks) == {"MI", "VQA"} and tasks.count("VQA") > 3 * tasks.count("MI")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ["MI", "VQA"], "task_shares": [1]}, "--task_shares has 1 numbers for 2 --tasks"),
        ({"task_shares": [1, 2]}, "--task_shares has 2 numbers for 0 --tasks"),
        ({"dataset_config": "mi", "tasks": ["MI", "CTS"]}, "--dataset_config mi has no other tasks"),
        ({"phantom_cases": [1, 1, 1], "data_dir": "scans"}, "--phantom_cases is in the place of --data_dir"),
        ({"muon_learning_rate": 0.02, "use_peft": True}, "--muon_learning_rate trains whole matrices, and --use_peft"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_anything_is_loaded(train, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "out", model_name_or_path="nowhere", **options)


MADE = {
    "phantom_cases": [1, 1, 1],
    "tasks": ["MI"],
    "task_shares": [1],
    "negatives": "neighbours",
    "neighbours": 8,
    "min_gap_mm": 4.0,
    "label_images": True,
    "per_case": 2,
}


@pytest.fixture
def released(tmp_path, rows):
    """The authors' files with one question of two images for each of some patients, in a folder of a folder."""
    folder = tmp_path / "data" / "SynerMed"
    (folder / "slice").mkdir(parents=True)
    lines = []
    for number in range(20):
        names = [f"p{number}/{kind}_70.png" for kind in ("ct", "mr")]
        for name, picture in zip(names, rows[0]["images"], strict=False):
            (folder / "slice" / name).parent.mkdir(exist_ok=True)
            (folder / "slice" / name).write_bytes(picture["bytes"])
        turns = [("human", "<image><image>Which text says what changes? A, B, C or D."), ("gpt", "A")]
        told = [{"from": role, "value": value} for role, value in turns]
        lines.append(json.dumps({"image": names, "conversations": told, "case_id": f"p{number}", "slice_idx": 70}))
    (folder / "SynerMed.jsonl").write_text("\n".join(lines))
    return {"data_dir": tmp_path / "data"}


@pytest.mark.parametrize("name", MADE)
def test_arguments_of_questions_made_here_are_refused_for_those_of_a_file(script, name, released, own, rows):
    assert set(MADE) == set(script.OF_MADE_QUESTIONS)
    for where in (released, own(rows)):
        paths = {"model_name_or_path": "nowhere", "output_dir": "nowhere", "use_cpu": True, **where}
        with pytest.raises(SystemExit, match=f"holds questions, .*: --{name} would do nothing"):
            script.main(*script.parse_args(command_line({**paths, name: MADE[name]})))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_rows_hold_is_remembered_whatever_the_weights_had_learned(
    own, rows, labelled_rows, train, start, tmp_path, streaming
):
    options = {**own(labelled_rows), "dataset_streaming": streaming, **BRIEF}
    train(tmp_path / "labelled", **options)
    config = load(tmp_path / "labelled" / "pipeline").model.config
    assert config.trained_tasks == ["CTS", "TIA"] and config.label_images is True


def test_what_the_authors_file_holds_is_remembered(released, train, start, tmp_path):
    train(tmp_path / "out", **released, **BRIEF)
    config = load(tmp_path / "out" / "pipeline").model.config
    assert config.trained_tasks == ["TIA"] and config.label_images is False


def test_rows_tell_their_tasks_and_whether_their_images_are_labelled(script, rows, labelled_rows):
    assert script.held_by(rows) == (["CTS", "TIA"], False)
    assert script.held_by(labelled_rows) == (["CTS", "TIA"], True)
    assert script.held_by([*rows, *labelled_rows])[1] is False
    one = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]}
    assert script.held_by([one, {**one, "task": "VQA"}, {**one, "task": "MI"}]) == (["MI", "VQA"], None)


def test_weights_trained_on_simulated_patients_say_so(train, tmp_path, monkeypatch):
    simulate = synermed.load_phantom_case
    monkeypatch.setattr(synermed, "load_phantom_case", lambda record, *size: simulate(record, 12, 32))
    train(tmp_path / "out", phantom_cases=[1, 1, 1], dataset_streaming=True, tasks=["MI"], **BRIEF)
    assert "simulated scans. Not for clinical use" in load(tmp_path / "out" / "pipeline").model.config.notice
    assert "no real scan, 2 steps." in (tmp_path / "out" / "pipeline" / "README.md").read_text()


def test_tasks_of_a_data_set_of_ones_own_are_remembered(own, rows, train, tmp_path):
    train(tmp_path / "out", **own(rows), **BRIEF)
    tasks = load(tmp_path / "out" / "pipeline").model.config.trained_tasks
    assert set(tasks) == {row["task"] for row in rows}


def test_evaluation_tells_accuracy_by_task_and_route(script, arguments, train, trained, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_questions": 7, "per_device_eval_batch_size": 2}
    train(tmp_path / "out", max_steps=4, **options)
    logged = [row for row in history(tmp_path / "out") if any(name.startswith("eval_accuracy/") for name in row)]
    assert [row["step"] for row in logged] == [2, 4]
    # The same as if the saved pipeline were asked.
    args, *_ = script.parse_args(arguments(tmp_path))
    asked = script.load_questions(args, 0, "validation", per_case=8, streaming=True)
    pipe = load(tmp_path / "out" / "pipeline")
    expected = script.accuracies(list(answer_questions(pipe.model, pipe.processor, asked.take(7), generate=False)))
    assert {name: value for name, value in logged[-1].items() if name in expected} == expected
    tasks, routes = [{name for name in expected if name.count("/") == slashes} for slashes in (1, 3)]
    assert tasks == {"eval_accuracy/CTS", "eval_accuracy/TIA", "eval_accuracy/MI"}
    assert {"eval_accuracy/TIA/brain/MRI-CT"} <= routes or {"eval_accuracy/TIA/brain/CT-MRI"} <= routes
    # Asking changes nothing.
    assert losses(tmp_path / "out") == losses(trained, 4)


def test_evaluation_without_options_to_choose_from_is_of_the_loss_alone(own, rows, train, tmp_path):
    rows = [{name: row[name] for name in ("images", "messages")} for row in rows]
    own(rows, split="validation")
    train(tmp_path / "out", max_steps=2, eval_strategy="steps", eval_steps=2, **own(rows))
    assert any("eval_loss" in row for row in history(tmp_path / "out"))


def test_answers_in_words_are_judged_where_there_is_nothing_to_choose_from(own, rows, train, tmp_path):
    rows = [{name: row[name] for name in ("images", "messages", "options", "answer")} for row in rows]
    in_words = [{**row, "options": []} for row in rows]
    own(in_words[:4], split="validation")
    train(tmp_path / "out", max_steps=2, eval_strategy="steps", eval_steps=2, **own(rows))
    (judged,) = [row for row in history(tmp_path / "out") if "eval_accuracy/questions" in row]
    # The same as if the saved pipeline were asked.
    asked = [
        {**dict.fromkeys(COPIED), **row} for row in Dataset.from_list(in_words[:4]).cast_column("images", List(Image()))
    ]
    pipe = load(tmp_path / "out" / "pipeline")
    records = list(answer_questions(pipe.model, pipe.processor, asked, generate=True))
    right = [record["text_correct"] for record in records]
    assert judged["eval_accuracy/questions"] == 100 * sum(right) / 4


def test_the_best_checkpoint_is_that_of_the_best_accuracy(train, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy/CTS"}
    train(tmp_path / "out", max_steps=4, eval_strategy="steps", eval_steps=2, eval_questions=4, **best)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [row["eval_accuracy/CTS"] for row in state["log_history"] if "eval_accuracy/CTS" in row]
    assert len(logged) == 2 and state["best_metric"] == max(logged)


def test_gradient_checkpointing_gives_the_same_losses(train, trained, tmp_path, monkeypatch):
    calls, attend = [], SynerMedGenAttention.attend
    monkeypatch.setattr(SynerMedGenAttention, "attend", lambda *args, **kw: calls.append(1) or attend(*args, **kw))
    train(tmp_path / "out", max_steps=2, gradient_checkpointing=True)
    assert losses(tmp_path / "out") == pytest.approx(losses(trained, 2), rel=1e-6)
    assert len(calls) == 2 * 2 * 2  # steps, layers, and each layer once more


def test_half_precision_trains_float32_weights(train, trained, tmp_path):
    train(tmp_path / "out", max_steps=2, bf16=True)
    assert losses(tmp_path / "out") == pytest.approx(losses(trained, 2), rel=0.02)
    assert losses(tmp_path / "out") != losses(trained, 2)
    assert {tensor.dtype for tensor in weights(tmp_path / "out" / "pipeline").values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_training_killed_twice_is_identical_to_an_uninterrupted_one(uninterrupted, train, tmp_path, mode):
    whole = uninterrupted(mode)
    assert len(set(losses(whole))) == 6
    once = killed(whole, tmp_path / "once", keep=2)
    train(once, resume_from_checkpoint="latest", **MODES[mode])
    twice = killed(once, tmp_path / "twice", keep=4)
    train(twice, resume_from_checkpoint="latest", **MODES[mode])
    for folder in (once, twice):
        assert losses(folder) == losses(whole)
        result = "adapter_model.safetensors" if mode == "LoRA" else f"pipeline/{WEIGHTS}"
        assert (folder / result).read_bytes() == (whole / result).read_bytes()


def test_a_data_set_with_other_pictures_beside_goes_on(rows, train, tmp_path):
    features = Features({**synermed.UNDERSTANDING_FEATURES, "mask": Image()})
    (tmp_path / "own").mkdir()
    Dataset.from_list([{**row, "mask": row["images"][0]} for row in rows], features=features).to_parquet(
        str(tmp_path / "own" / "train.parquet")
    )
    own = {"dataset_name": tmp_path / "own", "dataset_config": "default", "save_steps": 1}
    train(tmp_path / "out", max_steps=1, **own)
    train(tmp_path / "out", max_steps=2, resume_from_checkpoint="latest", **own)
    assert len(losses(tmp_path / "out")) == 2


def test_a_training_goes_on_beyond_its_first_end(trained, train, tmp_path):
    train(tmp_path / "out", max_steps=2)
    train(tmp_path / "out", resume_from_checkpoint="latest")
    assert losses(tmp_path / "out") == losses(trained)


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": ["MI"]},
        {"per_case": 3},
        {"data_seed": 7},
        {"seed": 7},
        {"train_sampling_strategy": "group_by_length"},
        {"shuffle_answers": True},
    ],
)
def test_other_questions_are_noticed_when_a_training_goes_on(trained, train, tmp_path, options):
    folder = killed(trained, tmp_path / "out", keep=2)
    with pytest.raises(SystemExit, match=f"was trained on other questions: .*{next(iter(options))} .*now"):
        train(folder, resume_from_checkpoint="latest", **options)


def test_latest_of_nothing_is_the_beginning(trained, train, tmp_path):
    train(tmp_path / "out", max_steps=2, resume_from_checkpoint="latest")
    assert losses(tmp_path / "out") == losses(trained, 2)


@pytest.mark.parametrize("how", ["no state", "half a state", "empty state"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(script, trained, tmp_path, caplog, how):
    PartialState()
    folder = killed(trained, tmp_path / "out", keep=4)
    (folder / "checkpoint-best").mkdir()
    assert script.newest_checkpoint(folder) == str(folder / "checkpoint-4")
    state = folder / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    state.unlink() if how == "no state" else state.write_text(text[: len(text) // 2] if how == "half a state" else "")
    assert script.newest_checkpoint(folder) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is not whole and is passed over" in caplog.text


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_whole(trained, train, tmp_path, monkeypatch, file):
    def fills_up(write):
        def write_half(*args, **kwargs):
            path = next((Path(arg) for arg in args if isinstance(arg, (str, Path))), Path())
            if path.parts[-2:] != ("checkpoint-4", file):
                return write(*args, **kwargs)
            path.write_bytes(b"{")
            raise OSError(errno.ENOSPC, "No space left on device")

        return write_half

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fills_up(torch.save))
        patch.setattr(TrainerState, "save_to_json", fills_up(TrainerState.save_to_json))
        with pytest.raises(OSError, match="No space left on device"):
            train(tmp_path / "out", save_total_limit=1)
    assert not (tmp_path / "out" / "pipeline").exists()
    train(tmp_path / "out", resume_from_checkpoint="latest")
    assert losses(tmp_path / "out") == losses(trained)
    assert moved(weights(trained / "pipeline"), weights(tmp_path / "out" / "pipeline")) == set()


def test_a_folder_that_holds_a_training_is_not_written_over(trained, train):
    before = contents(trained)
    with pytest.raises(SystemExit, match="holds an earlier training.*--resume_from_checkpoint latest"):
        train(trained)
    assert contents(trained) == before


@pytest.mark.parametrize("mode", ["random", "LoRA"])
def test_a_folder_that_holds_a_result_is_not_written_over(train, tmp_path, mode):
    train(tmp_path / "out", **{**MODES[mode], **BRIEF})
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit, match="holds an earlier training"):
        train(tmp_path / "out", **{**MODES[mode], **BRIEF, "seed": 1})
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------------------------------------------------------------
# Controls
# ---------------------------------------------------------------------------------------------------------------------


def test_shuffled_answers_are_options_drawn_at_random(script, rows):
    shuffled = [{**row, **script.shuffle_answer(row, number, seed=0)} for number, row in enumerate(rows * 50)]
    right = sum(row["answer"] == true["answer"] for row, true in zip(shuffled, rows * 50, strict=True))
    assert {len(row["options"]) for row in rows} == {4} and 0.15 < right / len(shuffled) < 0.35
    for row, true in zip(shuffled, rows * 50, strict=True):
        *asked, told = row["messages"]
        assert asked == true["messages"][:-1] and told["role"] == "assistant"
        assert told["content"] == [{"type": "text", "text": row["answer"]}] and row["answer"] in row["options"]
    with pytest.raises(ValueError, match="Row 3 .* has no options to draw from"):
        script.shuffle_answer({**rows[0], "options": []}, 3, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_trained_on_shuffled_answers_have_learned_no_task(trained, train, tmp_path, streaming):
    train(tmp_path / "out", shuffle_answers=True, dataset_streaming=streaming, max_steps=2, save_steps=2)
    assert load(tmp_path / "out" / "pipeline").model.config.trained_tasks == []
    assert "answers shuffled, a control" in (tmp_path / "out" / "pipeline" / "README.md").read_text()
    assert streaming or losses(tmp_path / "out") != losses(trained, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])  # chosen before the first of them was run
def test_only_what_is_taught_is_learned(train, scans, tmp_path, seed):
    """Whoever learns MI knows no CTS, and whoever learns MI from shuffled answers knows nothing."""
    # Hardly a row comes twice: answers of chance could be learned by heart.
    options = {"tasks": ["MI"], "per_case": 1024, "max_steps": 300, "per_device_train_batch_size": 16}
    options |= {"learning_rate": 3e-3, "save_strategy": "no", "seed": seed, "data_seed": seed}
    train(tmp_path / "MI", **options)
    train(tmp_path / "shuffled", **options, shuffle_answers=True)

    def knows(folder, task):
        """How likely the right option is to the model, and would be by chance: the likeliest alone could be luck."""
        pipe = load(folder / "pipeline")
        asked = load_dataset("synermed", task, data_dir=str(scans), split="test", per_case=256)
        records = list(answer_questions(pipe.model, pipe.processor, asked, generate=False))
        right = [record["probabilities"][record["options"].index(record["answer"])] for record in records]
        return sum(right) / len(records), sum(1 / len(record["options"]) for record in records) / len(records)

    for folder, task, is_learned in (("MI", "mi", True), ("MI", "cts", False), ("shuffled", "mi", False)):
        right, chance = knows(tmp_path / folder, task)
        assert right > 0.9 if is_learned else abs(right - chance) < 0.05, (folder, task, right, chance)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be learned from
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_without_images_is_refused(own, rows, train, tmp_path, streaming):
    rows = [{name: value for name, value in row.items() if name != "images"} for row in rows]
    with pytest.raises(ValueError, match="has no column images: see load_dataset"):
        train(tmp_path / "out", dataset_streaming=streaming, **own(rows), **BRIEF)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_whose_answer_is_no_option_is_named_without_its_patient(own, rows, train, tmp_path, streaming):
    rows = [*rows[:3], {**rows[3], "answer": "Z"}, *rows[4:]]
    message = rf"Row 3 of train \({rows[3]['task']}\) cannot be learned from: the answer 'Z' is none of the options"
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path / "out", dataset_streaming=streaming, **own(rows), **BRIEF)
    assert rows[3]["patient_id"] not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_whose_picture_is_none_is_named_and_its_file_is_not(own, rows, train, tmp_path, streaming):
    damaged = {"bytes": b"no picture", "path": "Jane Doe.png"}
    rows = [*rows[:3], {**rows[3], "images": [damaged, *rows[3]["images"][1:]]}, *rows[4:]]
    count = len(rows[3]["images"])
    message = rf"Row 3 of train .* cannot be learned from: its image 1 of {count} cannot be opened"
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path / "out", dataset_streaming=streaming, **own(rows), **BRIEF)
    assert "Jane" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_may_be_named_by_path_and_rows_have_a_length_of_something_else(rows, train, tmp_path, streaming):
    lines = []
    for number, row in enumerate(rows):
        names = [str(tmp_path / f"{number}-{place}.png") for place in range(len(row["images"]))]
        for name, picture in zip(names, row["images"], strict=True):
            Path(name).write_bytes(picture["bytes"])
        lines.append(json.dumps({"images": names, "messages": row["messages"], "length": "long"}))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("\n".join(lines))
    own = {"dataset_name": tmp_path / "own", "dataset_config": "default", "dataset_streaming": streaming}
    train(tmp_path / "out", **own, **BRIEF)
    assert (tmp_path / "out" / "pipeline").exists()


def test_a_row_longer_than_the_context_is_named_before_training(train, tmp_path):
    message = (
        r"Row \d of train \((CTS|TIA|MI)\) cannot .* it has \d images and \d+ tokens, and the context holds 100: ask"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", max_length=100)
    assert not list(tmp_path.glob("out/checkpoint-*"))


def without(start, folder, unwanted):
    """The pipeline without some of its tensors."""
    shutil.copytree(start, folder)
    kept = {name: tensor for name, tensor in weights(start).items() if not unwanted(name)}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_model_that_does_not_load_whole_is_refused(train, start, tmp_path):
    lost = "model.language_model.layers.1.mlp.up_proj.weight"
    base = without(start, tmp_path / "base", lambda name: name == lost)
    with pytest.raises(ValueError, match=rf"1 missing: {re.escape(lost)}"):
        train(tmp_path / "out", model_name_or_path=base)


def test_a_model_without_generation_expert_is_trained_where_that_is_allowed(train, start, tmp_path):
    base = without(start, tmp_path / "base", lambda name: part_of(name) == "generation")
    with pytest.raises(ValueError, match="Without its generation weights it cannot synthesise"):
        train(tmp_path / "out", model_name_or_path=base)
    train(tmp_path / "out", model_name_or_path=base, allow_missing=PART_PATTERNS["generation"], **BRIEF)
    result = weights(tmp_path / "out" / "pipeline")
    assert moved(weights(base), result) == result.keys()
    again = load(tmp_path / "out" / "pipeline", allow_missing=PART_PATTERNS["generation"])
    assert again.model.config.missing_parts == ["generation"]


def test_what_would_stay_random_is_refused(train, start, tmp_path):
    base = without(start, tmp_path / "base", lambda name: part_of(name) == "vision")
    options = {"model_name_or_path": base, "allow_missing": PART_PATTERNS["vision"], "freeze_vision": True}
    with pytest.raises(SystemExit, match="came without its vision weights"):
        train(tmp_path / "out", **options, **BRIEF)


def test_other_weights_are_noticed_when_a_training_goes_on(train, trained, start, tmp_path):
    folder = killed(trained, tmp_path / "out", keep=2)
    shutil.copytree(start, tmp_path / "start")
    tensors = load_file(tmp_path / "start" / WEIGHTS)
    tensors["model.language_model.norm.weight"] += 1
    save_file(tensors, tmp_path / "start" / WEIGHTS, metadata={"format": "pt"})
    options = {"model_name_or_path": tmp_path / "start", "resume_from_checkpoint": folder / "checkpoint-2"}
    for output in (folder, tmp_path / "elsewhere"):
        with pytest.raises(SystemExit, match="started from other weights"):
            train(output, **options)


def test_a_training_of_nothing_is_refused(script, train, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "part_of", lambda name: "generation")
    with pytest.raises(SystemExit, match="Nothing would be trained: every parameter is frozen"):
        train(tmp_path / "out", **BRIEF)


def test_an_adapter_on_modules_that_are_not_there_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="Target modules nothing_like_it not found in the base model"):
        train(tmp_path / "out", lora_target_modules=["nothing_like_it"], **{**LORA, **BRIEF})


@pytest.mark.parametrize("pattern", [r".*_proj_moe_gen", r".*layers.*q_proj(_moe_gen)?"])
def test_an_adapter_on_the_generation_expert_is_refused(train, tmp_path, pattern):
    with pytest.raises(SystemExit, match="generation expert"):
        train(tmp_path / "out", lora_target_modules=[pattern], **{**LORA, **BRIEF})


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

MATRICES = re.compile(r"model\.language_model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")


def test_an_adapter_is_on_the_understanding_expert_and_is_all_that_is_saved(uninterrupted, start):
    folder = uninterrupted("LoRA")
    assert not (folder / "pipeline").exists() and not list(folder.rglob("model*.safetensors"))
    adapter = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").replace("lora_A.", "").replace("lora_B.", "") for name in adapter}
    assert names == {name for name in weights(start) if MATRICES.fullmatch(name)}
    assert all(tensor.any() for tensor in adapter.values())


def test_an_adapter_is_loaded_by_the_pipeline(uninterrupted, start):
    pipe = load(start)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = pipe.model(ids).logits
        pipe.load_lora_weights(uninterrupted("LoRA"))
        assert (pipe.model(ids).logits - before).abs().max() > 1e-3


def test_a_merged_adapter_is_a_pipeline(train, uninterrupted, start, tmp_path):
    train(tmp_path / "out", merge_adapter=True, **LORA)
    before, after = weights(start), weights(tmp_path / "out" / "pipeline")
    assert moved(before, after) == {name for name in before if MATRICES.fullmatch(name)}
    assert load(tmp_path / "out" / "pipeline").model.config.trained_tasks == ["CTS", "TIA"]
    # The same as the adapter alone, put on the same weights.
    adapter = load_file(uninterrupted("LoRA") / "adapter_model.safetensors")
    config = json.loads((uninterrupted("LoRA") / "adapter_config.json").read_text())
    for name in moved(before, after):
        down, up = (adapter[f"base_model.model.{name[:-7]}.lora_{matrix}.weight"] for matrix in "AB")
        merged = before[name] + config["lora_alpha"] / config["r"] * (up @ down)
        torch.testing.assert_close(after[name], merged, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Publishing, recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_pipeline_is_published(train, trained, hub, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "lab/stage-one", "hub_private_repo": True}
    train(tmp_path / "out", **options)
    pushed, local = hub.files("lab/stage-one"), contents(tmp_path / "out" / "pipeline")
    assert pushed[WEIGHTS] == local[Path(WEIGHTS)] and pushed.keys() - {".gitattributes"} == set(map(str, local))
    assert HfApi(endpoint=hub.url, token=hub.token).model_info("lab/stage-one").private
    assert "Stage I (CTS, TIA) on SynthRAD2023, 6 steps." in pushed["README.md"].decode()
    assert load("lab/stage-one").model.config.trained_tasks == ["CTS", "TIA"]


def test_an_adapter_is_published(train, hub, tmp_path):
    train(tmp_path / "out", push_to_hub=True, hub_model_id="lab/stage-one-lora", **{**LORA, **BRIEF})
    api = HfApi(endpoint=hub.url, token=hub.token)
    assert "adapter_model.safetensors" in api.list_repo_files("lab/stage-one-lora")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not for clinical use" in card and "Stage I (CTS, TIA) on SynthRAD2023, 2 steps." in card


def arguments_of(recipe):
    paths = {"model_name_or_path": "start", "data_dir": "scans", "output_dir": "out"}
    return ["--config", str(recipe), *command_line({**paths, "use_cpu": True})]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_understood(script, recipe):
    parsed = {name: value for part in script.parse_args(arguments_of(recipe)) for name, value in vars(part).items()}
    own = {"model_name_or_path", "data_dir", "output_dir"}  # said on the command line, which goes before the recipe
    for name, value in yaml.safe_load(recipe.read_text()).items():
        assert name in own or parsed[name] in (value, [value]), name


def test_the_context_of_a_recipe_holds_the_rows_it_speaks_of(script):
    for recipe in RECIPES:
        rows = [int(tokens.replace(",", "")) for tokens in re.findall(r"([\d,]+) tokens", recipe.read_text())]
        max_length = script.parse_args(arguments_of(recipe))[1].max_length
        assert max_length is None or max_length >= min(rows, default=0), recipe.name


def test_the_command_of_the_header_gets_as_far_as_the_first_step(script, start, scans, tmp_path, monkeypatch):
    """As it is written, but for its paths and on a CPU: no row is refused, nor would a longer one be."""
    command, _ = re.findall(r"\n\n    (\S.+?)(?=\n\n)", script.__doc__, re.DOTALL)
    launched = shlex.split(command.replace("\\\n", ""))
    assert launched[:3] == ["accelerate", "launch", "examples/train_understanding.py"]
    args = script.parse_args([*launched[3:], "--use_cpu"])
    assert (args[0].dataset_name, args[0].data_dir) == ("synermed", "/data/SynthRAD2023")
    assert args[1].max_length is None  # TRL's own 1024 tokens are fewer than five slices take
    args[0].data_dir, args[1].output_dir, args[2].model_name_or_path = str(scans), str(tmp_path / "out"), str(start)

    class Reached(Exception):
        pass

    def trainer(**kwargs):
        raise Reached

    monkeypatch.setattr(script, "StageOneTrainer", trainer)
    with pytest.raises(Reached):
        script.main(*args)


def test_the_files_that_commands_name_are_there():
    named = {name for file in (SCRIPT, *RECIPES) for name in re.findall(r"examples/[\w/.]+", file.read_text())}
    assert len(named) > 3 and [name for name in sorted(named) if not (EXAMPLES.parent / name).exists()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Processes of their own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [(1, None), (42, 0)])
def test_processes_with_different_seeds_are_refused_before_anything_is_loaded(
    script, train, tmp_path, monkeypatch, others
):
    monkeypatch.setattr(script, "gather_object", lambda mine: [*mine, others])
    with pytest.raises(SystemExit, match="Processes were started with --seed .* and --seed .* Start all with the same"):
        train(tmp_path / "out", model_name_or_path="nowhere")


@pytest.mark.slow
def test_two_processes_started_with_different_seeds_are_both_refused(arguments, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments(tmp_path / "out", seed=rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        assert "Start all with the same" in process.communicate(timeout=300)[1] and process.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["random", "by length"])
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(train, arguments, tmp_path, mode):
    options = {**MODES[mode], "eval_strategy": "steps", "eval_steps": 3, "eval_questions": 7}
    train(tmp_path / "one", **options, per_device_train_batch_size=4)
    in_processes("train_understanding", arguments(tmp_path / "two", **options), 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    accuracy = [
        [value for row in history(tmp_path / name) for key, value in row.items() if key.startswith("eval_accuracy")]
        for name in ("one", "two")
    ]
    assert accuracy[0] == accuracy[1] and len(accuracy[0]) > 6
    resumed = killed(tmp_path / "two", tmp_path / "resumed", keep=2)
    in_processes("train_understanding", arguments(resumed, **options, resume_from_checkpoint="latest"), 2)
    assert losses(resumed) == losses(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, LORA], ids=["whole", "accumulated", "LoRA"]
)
def test_two_processes_that_share_out_the_weights_do_what_two_whole_ones_do(arguments, tmp_path, options):
    """FSDP2, with the settings of the configuration that the recipes name."""
    options = {**options, "eval_strategy": "steps", "eval_steps": 3, "eval_questions": 7}
    in_processes("train_understanding", arguments(tmp_path / "whole", **options), 2)
    in_processes("train_understanding", arguments(tmp_path / "sharded", **options), 2, sharded=True)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    name = "adapter_model.safetensors" if options.get("use_peft") else f"pipeline/{WEIGHTS}"
    made, expected = (load_file(tmp_path / folder / name) for folder in ("sharded", "whole"))
    assert made.keys() == expected.keys()
    assert max(float((made[name] - expected[name]).abs().max()) for name in made) < 1e-4
    resumed = killed(tmp_path / "sharded", tmp_path / "resumed", keep=2)
    in_processes("train_understanding", arguments(resumed, **options, resume_from_checkpoint="latest"), 2, sharded=True)
    assert losses(resumed) == losses(tmp_path / "sharded")


@pytest.mark.slow
def test_sharded_training_in_half_precision_sees_what_whole_training_sees(arguments, tmp_path):
    options = {"bf16": True, "max_steps": 2}
    for folder, sharded in (("whole", False), ("sharded", True)):
        in_processes("train_understanding", arguments(tmp_path / folder, **options), 2, sharded=sharded)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=0.01)


@pytest.mark.slow
def test_two_processes_read_streams_of_different_lengths(own, rows, arguments, tmp_path):
    """5 and 14 rows: batches of the last step are 1 and 2."""
    options = {**own(rows[:5], [*rows, *rows[:6]]), "dataset_streaming": True, "gradient_accumulation_steps": 2}
    in_processes("train_understanding", arguments(tmp_path / "out", **options), 2, timeout=60)
    assert len(losses(tmp_path / "out")) == 6


@pytest.mark.slow
def test_a_killed_process_leaves_a_training_that_goes_on(train, arguments, tmp_path):
    options = {"max_steps": 40, "save_steps": 1, "save_total_limit": 2}
    train(tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    with subprocess.Popen([sys.executable, str(SCRIPT), *arguments(folder, **options)]) as process:
        while process.poll() is None and not (folder / "checkpoint-3").exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train(folder, **options, resume_from_checkpoint="latest")
    assert losses(folder) == losses(tmp_path / "whole")


def test_batches_of_one_length_come_in_random_order(script):
    """All rows, batches of nearly one length, the longest first, and no run of long ones followed by short ones."""
    lengths = [20] * 64 + [90] * 64 + [300] * 64 + [301]
    sampler = script.MixedGroupsSampler(8, lengths, seed=0)
    indices = list(sampler)
    assert sorted(indices) == list(range(193)) and lengths[indices[0]] == 301
    batches = [[lengths[index] for index in indices[start : start + 8]] for start in range(0, 193, 8)]
    assert sum(max(batch) - min(batch) > 1 for batch in batches) <= 12  # one or two at each border of a mega-batch
    changes = sum(one[0] != other[0] for one, other in zip(batches[:-1], batches[1:], strict=True))
    assert changes > 10
    assert list(sampler) == indices
    sampler.set_epoch(1)
    assert list(sampler) != indices


def test_the_batches_of_an_accumulated_step_are_grouped_one_by_one(script, train, tmp_path, monkeypatch):
    asked = []

    class Noted(script.MixedGroupsSampler):
        def __init__(self, batch_size, lengths, seed):
            asked.append((batch_size, seed))
            super().__init__(batch_size, lengths, seed)

    monkeypatch.setattr(script, "MixedGroupsSampler", Noted)
    options = {**MODES["by length"], **BRIEF, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    train(tmp_path / "out", **options, data_seed=5)
    assert asked == [(2, 5)]
