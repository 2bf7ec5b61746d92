"""Stage I: teach SynerMedGen which slice belongs to which, what modality an image is, and what a change changes.

    accelerate launch examples/train_understanding.py \\
        --model_name_or_path runs/bagel --dataset_name synermed --data_dir /data/SynthRAD2023 --output_dir runs/stage1

    python examples/train_understanding.py --config examples/recipes/understanding_tiny.yaml

Arguments are TRL's (`SFTConfig`, `ModelConfig`, `ScriptArguments`) and those of [`UnderstandingArguments`]; a recipe
is a YAML file of them. Every sample is some images, a question and its answer; the loss is the cross entropy of the
answer's tokens.

* The understanding expert, ViT, connector, embeddings and `lm_head` are trained, with `--freeze_vision` all but ViT and
  connector. The generation expert is frozen and its checksum is compared before and after, quantised or not. Always the
  full model: Stage II goes on from `OUTPUT_DIR/pipeline`.
* With `--use_peft`, LoRA adapters on the understanding expert are all that is trained. With `--merge_adapter` they are
  put into the weights as the start stores them, and saved as a pipeline.
* `--train_sampling_strategy group_by_length` makes batches of rows of about one length. A picture that occurs several
  times in a batch is encoded once.
* Rows are checked before the first step (those of a stream when they come): pictures, answers, and length against the
  context, which is the model's unless `--max_length` says otherwise. Rows are never cut.
* `--shuffle_answers` is a control: whoever learns from such rows must stay at chance.
* `--resume_from_checkpoint latest` goes on from the newest checkpoint that is whole, to the same losses.
"""

import hashlib
import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from huggingface_hub import HfApi
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data.collating import QuestionCollator, check_question
from synermedgen_hf.data.released import find_released
from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.data.synermed import TASKS
from synermedgen_hf.data.understanding import DEFAULT_MIX
from synermedgen_hf.loading_synermedgen import combine_digests, part_of, tensor_digest
from synermedgen_hf.metrics.understanding import COPIED, answer_questions
from synermedgen_hf.model_card import make_adapter_card
from synermedgen_hf.optimization import MuonWithAdamW, configure_sharding

logger = get_logger(__name__)

NOTICE = "Demonstration weights trained on simulated scans. Not for clinical use."
# Full paths: names alone would also hit the ViT.
UNDERSTANDING_EXPERT = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
FIRST_ROWS = 256  # of a stream, which tell what it holds; and so many are shuffled at a time
START = "start.json"
SAID = ("index", "task", "messages", "options", "answer", "length")  # columns that are not pictures
# Arguments of questions that are made here, of scans. Rows that are questions already are taken as they are.
OF_MADE_QUESTIONS = (
    "phantom_cases",
    "tasks",
    "task_shares",
    "negatives",
    "neighbours",
    "min_gap_mm",
    "label_images",
    "per_case",
)


@dataclass
class UnderstandingArguments(ScriptArguments):
    """
    Which questions are asked of what, and what TRL has no argument for.
    """

    dataset_name: str = field(default="synermed", metadata={"help": '"synermed", or a Hub dataset with its columns.'})
    dataset_config: str = field(
        default="understanding", metadata={"help": "understanding, cts, mi, tia, or the control: vqa."}
    )
    dataset_test_split: str = field(default="validation", metadata={"help": "Split of the questions asked meanwhile."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of scans, or of the released SynerMed files."})
    phantom_cases: list[int] | None = field(
        default=None,
        metadata={"help": "Simulated patients per protocol instead of --data_dir: training, validation, test."},
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "A subset of CTS, TIA, MI and VQA; by default CTS, TIA and MI."}
    )
    task_shares: list[float] | None = field(
        default=None, metadata={"help": "Share of each of --tasks; by default those of the published set."}
    )
    negatives: str | None = field(
        default=None,
        metadata={
            "help": "Wrong candidates of CTS: neighbours of the slice (default), random slices of the volume, four "
            "times --min_gap_mm apart or as far as it allows, or both by halves.",
            "choices": ["neighbours", "random", "both"],
        },
    )
    neighbours: int | None = field(default=None, metadata={"help": "How far neighbours lie, in slices; 8 by default."})
    min_gap_mm: float | None = field(
        default=None, metadata={"help": "Smallest distance of two candidates; 4 by default."}
    )
    label_images: bool = field(
        default=False, metadata={"help": "Write before each image what the question calls it; helps small models."}
    )
    per_case: int | None = field(default=None, metadata={"help": "Questions of each case; 32 by default."})
    shuffle_answers: bool = field(
        default=False, metadata={"help": "A control: train on options drawn at random in the place of the answers."}
    )
    eval_questions: int = field(default=240, metadata={"help": "Held-out questions asked at each evaluation."})
    allow_missing: list[str] = field(
        default_factory=list, metadata={"help": "Tensors, or patterns with *, that may start from random numbers."}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Train the matrices of the layers with Muon at this rate, such as 0.02, and the rest with AdamW: "
            "for small models from random weights. Needs torch 2.9."
        },
    )
    freeze_vision: bool = field(
        default=False, metadata={"help": "Leave ViT and connector as they are: what they tell apart is easily lost."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "With --use_peft: put the adapter into the weights and save a pipeline."}
    )


def makes_questions(args: UnderstandingArguments) -> bool:
    """Whether questions are made of scans, rather than read from the authors' files or another data set."""
    return args.dataset_name == "synermed" and not (args.data_dir and find_released(args.data_dir))


def check_arguments(script_args: UnderstandingArguments, training_args: SFTConfig, model_args: ModelConfig):
    """What can be refused before anything is loaded: arguments that cannot work, and seeds that differ."""
    given = [name for name in OF_MADE_QUESTIONS if getattr(script_args, name)]
    if given and not makes_questions(script_args):
        where = script_args.data_dir if script_args.dataset_name == "synermed" else script_args.dataset_name
        raise SystemExit(
            f"{where} holds questions, which are taken as they are: --{', --'.join(given)} would do nothing. They are "
            "for questions made of scans; leave them out."
        )
    if script_args.phantom_cases and script_args.data_dir:
        raise SystemExit("--phantom_cases is in the place of --data_dir: leave one of them out.")
    tasks, shares, config = script_args.tasks, script_args.task_shares, script_args.dataset_config
    if shares and len(shares) != len(tasks or ()):
        raise SystemExit(f"--task_shares has {len(shares)} numbers for {len(tasks or ())} --tasks.")
    if tasks and config != "understanding" and not set(tasks) <= set(TASKS.get(config, ())):
        raise SystemExit(f"--dataset_config {config} has no other tasks: leave out --tasks, or take understanding.")
    if script_args.muon_learning_rate is not None and model_args.use_peft:
        raise SystemExit("--muon_learning_rate trains whole matrices, and --use_peft none of them: leave one out.")
    seeds = set(gather_object([(training_args.seed, training_args.data_seed)]))
    if len(seeds) > 1:
        said = " and ".join(f"--seed {seed} --data_seed {data_seed}" for seed, data_seed in sorted(seeds, key=str))
        raise SystemExit(
            f"Processes were started with {said}: they would not share out the same rows. Start all with the same."
        )


def load_questions(args: UnderstandingArguments, seed: int, split: str, per_case: int | None = None, **how):
    """One split of the questions; `per_case` counts where they are made here."""
    options = {"data_dir": args.data_dir} if args.data_dir else {}
    if makes_questions(args):
        given = {"neighbours": args.neighbours, "min_gap_mm": args.min_gap_mm, "per_case": per_case or args.per_case}
        options |= {name: value for name, value in given.items() if value is not None}
        difficulty = {"neighbours": "hard", "random": "easy", "both": "mixed"}[args.negatives or "neighbours"]
        options |= {"difficulty": difficulty, "label_images": args.label_images, "seed": seed}
        if args.phantom_cases:
            options["phantom_cases"] = args.phantom_cases
        if args.tasks:
            shares = args.task_shares or [DEFAULT_MIX.get(task, 1.0) for task in args.tasks]
            options["mix"] = dict(zip(args.tasks, shares, strict=True))
    return load_dataset(args.dataset_name, args.dataset_config, split=split, **how, **options)


def load_held_out(args: UnderstandingArguments, seed: int, **how) -> Dataset:
    """Some questions of the held-out split, of as many patients and tasks as can be had."""
    split, count = args.dataset_test_split, args.eval_questions
    if not makes_questions(args) and not args.dataset_streaming:
        with PartialState().main_process_first():
            rows = load_questions(args, seed, split, **how).shuffle(seed=seed)
        return rows.select(range(min(len(rows), count)))
    # A few questions on each of many patients.
    stream = load_questions(args, seed, split, per_case=8, streaming=True)
    if not makes_questions(args):  # a file's first rows may all be of one patient or of one task
        stream = stream.shuffle(seed=seed, buffer_size=4 * count)
    return Dataset.from_list(list(stream.take(count)), features=stream.features)


def check_questions(dataset, processor, config, max_length: int, split: str):
    """
    The data set with a column `length`, once every row is known to be one that can be learned from. A stream is checked
    as it flows.
    """

    def length_of(row: dict, number: int) -> int:
        try:
            return check_question(processor, config, row, max_length)
        except (ValueError, KeyError, TypeError) as error:
            what = f" ({row['task']})" if "task" in row else ""  # patients are not named: errors end up in logs
            raise ValueError(f"Row {number} of {split}{what} cannot be learned from: {error}.") from error

    def with_length(row: dict, number: int) -> dict:
        number = row.get("index", number)  # a stream comes in an order of its own
        return {"length": length_of(row, number)}

    missing = {"images", "messages"} - set(dataset.column_names or ())
    if missing:
        raise ValueError(
            f"The data set has no column {' and no '.join(sorted(missing))}: see load_dataset('synermed')."
        )
    if "length" in dataset.column_names:  # of something else
        dataset = dataset.remove_columns("length")
    files, pictures = List(Image(decode=False)), List(Image())
    dataset = dataset.cast_column("images", files)
    if not isinstance(dataset, Dataset):
        features = Features({**dataset.features, "images": pictures, "length": Value("int64")})
        return dataset.map(with_length, with_indices=True).cast(features)
    lengths = [None]
    if PartialState().is_main_process:
        rows = tqdm(dataset, desc=f"check {split}", unit="row")
        lengths = [[length_of(row, number) for number, row in enumerate(rows)]]
    return dataset.cast_column("images", pictures).add_column("length", broadcast_object_list(lengths)[0])


def shuffle_answer(row: dict, number: int, seed: int) -> dict:
    """The row with one of its options, drawn at random, in the place of its answer."""
    if not row["options"]:
        raise ValueError(f"Row {number} ({row['task']}) has no options to draw from: --shuffle_answers needs them.")
    answer = random.Random(f"{seed}/{number}").choice(row["options"])
    *asked, told = row["messages"]
    return {"answer": answer, "messages": [*asked, {**told, "content": [{"type": "text", "text": answer}]}]}


def check_start(facts: dict, checkpoint: str | Path | None):
    """
    Refuse to go on from other weights or questions than a training began with: a checkpoint would write over the ones,
    and the others would come twice or never.

    Args:
        facts (`dict`): What the training starts from, as `main` keeps it beside the checkpoints; a part of it will do.
        checkpoint (`str` or `Path`, *optional*): What is gone on from.

    Raises:
        `SystemExit`: The checkpoint belongs to another training.
    """
    known = None if checkpoint is None else Path(checkpoint).parent / START
    if known is None or not known.exists():
        return
    before = json.loads(known.read_text())
    if before["weights"] != facts.get("weights", before["weights"]):
        raise SystemExit(
            f"{checkpoint} belongs to a training that started from other weights (see {START} beside it). Name those "
            "with --model_name_or_path."
        )
    now = json.loads(json.dumps(facts.get("questions", {})))
    had = before.get("questions", {})
    if changed := [f"{name} {had[name]} (now {value})" for name, value in now.items() if had.get(name, value) != value]:
        raise SystemExit(
            f"{checkpoint} was trained on other questions: {', '.join(changed)}. Bring them back, or choose another "
            "--output_dir."
        )


def questions_of(args: UnderstandingArguments, training_args: SFTConfig, rows) -> dict:
    """What questions are made of, what they say (`rows` of [`told_by`]) and in which order, to be compared later."""
    said = hashlib.sha256()
    for row in rows:
        said.update(json.dumps(row, sort_keys=True, default=str).encode())
    names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming", "shuffle_answers")
    order = ("seed", "data_seed", "train_sampling_strategy")
    facts = {name: getattr(args, name) for name in (*names, *OF_MADE_QUESTIONS)}
    return facts | {name: getattr(training_args, name) for name in order} | {"rows, sha256": said.hexdigest()[:16]}


def told_by(dataset) -> Iterable[dict]:
    """What rows say, without pictures; of a stream the first rows, so that what they hold is known before training."""
    told = dataset.select_columns([name for name in SAID if name in dataset.column_names])
    return told if isinstance(dataset, Dataset) else list(told.take(FIRST_ROWS))


def held_by(rows) -> tuple[list[str], bool | None]:
    """The tasks that rows name, and whether several images are labelled; `None` where no row shows several."""
    tasks, labelled = set(), []
    for row in rows:
        tasks.add(row.get("task"))
        for message in row["messages"]:
            content = message["content"]
            kinds = [] if isinstance(content, str) else [part["type"] for part in content]
            if kinds.count("image") > 1:
                before = ["image", *kinds]
                labelled.append(all(before[place] == "text" for place, kind in enumerate(kinds) if kind == "image"))
    known = [task for task in DEFAULT_MIX if task in tasks]
    return known + sorted(tasks - {None, "", *known}), all(labelled) if labelled else None


class AskQuestions(TrainerCallback):
    """
    Asks held-out questions at each evaluation and logs how many are answered rightly, by task and by route: by the
    likeliest option, or by the model's own words where there are none to choose from. Processes share the work.
    """

    def __init__(self, processor, rows: Dataset, batch_size: int):
        # One's own rows need not say more than what is asked and answered.
        rows = [{**dict.fromkeys(COPIED), **row, "index": place} for place, row in enumerate(rows)]
        self.chosen = [row for row in rows if row["options"]]
        self.told = [{**row, "options": []} for row in rows if row["answer"] and not row["options"]]
        self.processor, self.batch_size = processor, batch_size
        self.trainer = None

    def on_evaluate(self, args, state, control, model, metrics, **kwargs):
        accelerator = self.trainer.accelerator
        training = model.training
        model.eval()
        records = []
        for rows, generate in ((self.chosen, False), (self.told, True)):
            # Sharded weights need as many calls of every process, and words are not of one length.
            if rows and not (generate and self.trainer.is_fsdp_enabled):
                with accelerator.split_between_processes(rows, apply_padding=True) as mine:
                    records += answer_questions(model, self.processor, mine, self.batch_size, generate)
        model.train(training)
        records = list({record["index"]: record for record in gather_object(records)}.values())
        asked = accuracies(records)
        metrics.update(asked)  # what `--metric_for_best_model` chooses from
        self.trainer.log(asked)


def without_end(stream: IterableDataset, seed: int) -> IterableDataset:
    """
    The rows of a stream, again and again, in another order each time. Without an end, since processes whose shares end
    at different times would wait for each other. One case is read at a time; but its rows follow one another, and a
    step of one patient would be a poor step, so `FIRST_ROWS` rows are kept to choose from.
    """
    return stream.repeat(None).shuffle(seed=seed, buffer_size=FIRST_ROWS, max_buffer_input_shards=1)


def accuracies(records: list[dict]) -> dict[str, float]:
    """`eval_accuracy/TASK` and `eval_accuracy/TASK/ROUTE`, in per cent."""
    right: dict[str, list[bool]] = {}
    for record in records:
        task = record["task"] or "questions"
        for key in (task, f"{task}/{record['route']}") if record["route"] else (task,):
            right.setdefault(key, []).append(record["text_correct" if record["correct"] is None else "correct"])
    return {f"eval_accuracy/{key}": 100 * sum(values) / len(values) for key, values in sorted(right.items())}


class MixedGroupsSampler(LengthGroupedSampler):
    """
    Batches of rows of about one length, in random order. `LengthGroupedSampler` goes from long rows to short ones again
    and again: a task would be trained for dozens of steps on end, and forgotten over the next.

    Args:
        batch_size (`int`): Rows that go through the model at once, of all processes together.
        lengths (`list[int]`): Of all rows.
        seed (`int`): Seed of the order; every epoch has its own.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        indices = list(super().__iter__())
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        # The longest row stays in the first batch, where memory would run out at once; the last one may be short.
        first, middle, last = batches[:1], batches[1:-1], batches[1:][-1:]
        middle = [middle[place] for place in torch.randperm(len(middle), generator=self.generator).tolist()]
        return chain.from_iterable(first + middle + last)


class StageOneTrainer(SFTTrainer):
    """`SFTTrainer`, with groups of one length in random order, and Muon where it is asked for."""

    muon_learning_rate: float | None = None

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # One batch of every process, not a whole accumulated step, which would then be of one length and one task.
            at_once = self.args.train_batch_size * self.args.world_size
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return MixedGroupsSampler(at_once, list(sampler.lengths), seed)
        return sampler

    def create_optimizer(self, model=None):
        if self.muon_learning_rate is not None and self.optimizer is None:
            if self.is_fsdp_enabled:
                raise SystemExit("--muon_learning_rate needs whole matrices, and FSDP shares them out: use AdamW.")
            args = self.args
            self.optimizer = MuonWithAdamW(
                (self.model if model is None else model).named_parameters(),
                lr=args.learning_rate,
                muon_lr=self.muon_learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        return super().create_optimizer(model)


def newest_checkpoint(output_dir: Path) -> str | None:
    """
    The newest checkpoint that is whole: its state, which is written last, can be read. One that was being written when
    a process died or the disk was full is passed over.
    """
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for folder in sorted(numbered, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
        except (OSError, ValueError):
            logger.warning("%s is not whole and is passed over.", folder)
    return None


def load_start(script_args: UnderstandingArguments, model_args: ModelConfig, **options) -> SynerMedGenPipeline:
    """What the training starts from, every tensor accounted for."""
    options |= {"attn_implementation": model_args.attn_implementation, "revision": model_args.model_revision}
    return SynerMedGenPipeline.from_pretrained(
        model_args.model_name_or_path,
        allow_missing=script_args.allow_missing,
        print_report=False,
        **{name: value for name, value in options.items() if value is not None},
    )


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """That of `weights_checksum`, and of quantised weights too, which count with their bytes and their scales."""
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the GIL
        digests = pool.map(lambda name: tensor_digest(name, tensors[name].cpu()), tensors)
        return combine_digests(dict(zip(tensors, digests, strict=True)))


def main(script_args: UnderstandingArguments, training_args: SFTConfig, model_args: ModelConfig):
    check_arguments(script_args, training_args, model_args)
    output_dir = Path(training_args.output_dir)
    is_main = PartialState().is_main_process
    resume = training_args.resume_from_checkpoint
    if resume == "latest":
        resume = newest_checkpoint(output_dir)
    elif resume is None and any(
        any(output_dir.glob(name)) for name in ("checkpoint-*", "pipeline", "adapter_model.safetensors")
    ):
        raise SystemExit(
            f"{output_dir} holds an earlier training. Continue it with --resume_from_checkpoint latest, or choose "
            "another --output_dir."
        )

    # 1. The model, every tensor accounted for.
    set_seed(training_args.seed)
    pipe = load_start(
        script_args,
        model_args,
        dtype=model_args.dtype or "float32",
        quantization_config=get_quantization_config(model_args),
    )
    model, processor, config = pipe.model, pipe.processor, pipe.model.config
    if "generation" in config.missing_parts and is_main:
        logger.warning("There is no generation expert yet: it stays as random numbers, which Stage II has to train.")
    trained_parts = {"understanding"} if script_args.freeze_vision else {"understanding", "vision"}
    trained_parts = set() if model_args.use_peft else trained_parts  # adapters leave all of it as it is
    if random_parts := [
        part for part in config.missing_parts if part not in {"generation", "autoencoder", *trained_parts}
    ]:
        raise SystemExit(
            f"{model_args.model_name_or_path} came without its {' and '.join(random_parts)} weights, which this "
            "training would leave as random numbers. Start from a complete checkpoint."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained_parts)
    pipe.vae.requires_grad_(False)
    if model_args.use_peft and not model_args.lora_target_modules:
        model_args.lora_target_modules = UNDERSTANDING_EXPERT
    peft_config = get_peft_config(model_args)
    if is_main:  # now: adapters give tensors other names
        loaded = {**model.state_dict(), **{f"vae.{name}": tensor for name, tensor in pipe.vae.state_dict().items()}}
        frozen = [name for name in model.state_dict() if part_of(name) == "generation"]
        before, whole = checksum({name: loaded[name] for name in frozen}), checksum(loaded)
        del loaded
        check_start({"weights": whole}, resume)

    # 2. The questions, every row looked at.
    max_length = training_args.max_length or config.text_config.max_position_embeddings
    how = {"streaming": True} if script_args.dataset_streaming else {"num_proc": training_args.dataset_num_proc}
    seed = training_args.data_seed or 0
    held_out, callbacks = None, []
    if training_args.eval_strategy != "no":
        held_out = load_held_out(script_args, seed, **how)
        held_out = check_questions(held_out, processor, config, max_length, script_args.dataset_test_split)
        callbacks.append(AskQuestions(processor, held_out, training_args.per_device_eval_batch_size))
    with PartialState().main_process_first():
        train = load_questions(script_args, seed, script_args.dataset_train_split, **how)
    train = check_questions(train, processor, config, max_length, script_args.dataset_train_split)
    told = told_by(train)
    if is_main:
        start = {"weights": whole, "questions": questions_of(script_args, training_args, told)}
        check_start(start, resume)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / START, json.dumps(start, default=str) + "\n")
    tasks, labelled = held_by(told)
    if script_args.dataset_streaming and makes_questions(script_args):
        tasks, labelled = script_args.tasks or TASKS[script_args.dataset_config], script_args.label_images
    if script_args.shuffle_answers:
        train = train.map(partial(shuffle_answer, seed=seed), with_indices=True)
    if script_args.dataset_streaming:
        train = without_end(train, seed)

    # 3. Train.
    training_args.max_length = None  # rows are never cut: what is too long has been refused
    training_args.remove_unused_columns = False  # the sampler reads `length`, the collator takes what it needs
    publish, training_args.push_to_hub = training_args.push_to_hub, False  # the whole pipeline, at the end
    trainer = StageOneTrainer(
        model=model,
        args=training_args,
        data_collator=QuestionCollator(processor, config),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.muon_learning_rate = script_args.muon_learning_rate
    if trainer.is_fsdp_enabled:
        configure_sharding(trainer.accelerator)
    for callback in callbacks:
        callback.trainer = trainer
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise SystemExit("Nothing would be trained: every parameter is frozen. See --lora_target_modules.")
    trained = {part_of(name) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    if "generation" in trained:
        raise SystemExit("--lora_target_modules reaches the generation expert, which Stage I must never change.")
    if is_main:
        print(pipe.load_report.table({"": trainer.model, "vae.": pipe.vae}, whole[:16]))
    trainer.train(resume_from_checkpoint=resume)

    # 4. The generation expert is what it was; the rest is saved for Stage II.
    accelerator, tensors = trainer.accelerator, trainer.model.state_dict()
    if trainer.is_fsdp_enabled:
        tensors = accelerator.get_state_dict(trainer.model_wrapped)  # gathered, for the main process alone
    prefix = "" if peft_config is None else "base_model.model."
    if is_main:
        if before != checksum({name: tensors[prefix + name] for name in frozen}):
            raise RuntimeError("The generation expert has changed, which Stage I must never do. Nothing was saved.")
        print(f"The generation expert is untouched: checksum {before}")
    repo_id = training_args.hub_model_id or output_dir.resolve().name
    simulated = "simulated patients of synermedgen_hf.data.phantom; no real scan"
    source = simulated if script_args.phantom_cases else script_args.data_dir or script_args.dataset_name
    named = ", ".join(tasks) or "questions of no named task"
    named += "; answers shuffled, a control" if script_args.shuffle_answers else ""
    seen = f"Stage I ({named}) on {Path(source).name}, {trainer.state.max_steps} steps."
    if is_main and peft_config is not None:
        trainer.model.save_pretrained(output_dir, state_dict=tensors)  # the adapter alone
        make_adapter_card(repo_id, model_args.model_name_or_path, seen).save(output_dir / "README.md")
        if publish and not script_args.merge_adapter:
            api = HfApi(token=training_args.hub_token)
            repo_id = api.create_repo(repo_id, private=training_args.hub_private_repo, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=["adapter_*", "README.md"])
    if is_main and (peft_config is None or script_args.merge_adapter):
        if peft_config is not None:
            # Into the weights as the start stores them: those here may be sharded, quantised or rounded.
            pipe = load_start(script_args, model_args, dtype="auto")
            pipe.model = PeftModel.from_pretrained(pipe.model, output_dir).merge_and_unload()
        elif trainer.is_fsdp_enabled:
            pipe.model = type(pipe.model)(config)
            pipe.model.load_state_dict(tensors)
        pipe.model.requires_grad_(True).eval()
        config = pipe.model.config
        config.missing_parts = [part for part in config.missing_parts if part not in trained_parts]
        if labelled is not None:
            config.label_images = labelled
        learned = () if script_args.shuffle_answers else tasks
        config.trained_tasks = list(dict.fromkeys([*config.trained_tasks, *learned]))
        if script_args.phantom_cases:
            config.notice = NOTICE
        card = {"training_data": seen}
        pipe.save_pretrained(output_dir / "pipeline", card=card)
        print(f"Saved {output_dir / 'pipeline'}")
        if publish:
            private = training_args.hub_private_repo
            pipe.push_to_hub(repo_id, private=private, token=training_args.hub_token, card=card)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def parse_args(argv=None) -> tuple[UnderstandingArguments, SFTConfig, ModelConfig]:
    parser = TrlParser((UnderstandingArguments, SFTConfig, ModelConfig))
    # TRL would cut at 1024 tokens, which a question about five slices exceeds; nothing is cut here. And all others wait
    # while the first process makes and checks the questions, and while it saves.
    parser.set_defaults(max_length=None, ddp_timeout=7 * 24 * 3600)
    return parser.parse_args_and_config(argv)


if __name__ == "__main__":
    main(*parse_args())
