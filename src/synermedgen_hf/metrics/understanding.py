"""How well a model answers the understanding tasks: by likelihood and in its own words, with intervals over patients.

    questions = load_dataset("synermed", "understanding", data_dir="/data", split="test", streaming=True)
    records = list(answer_questions(model, processor, questions))
    print(understanding_table(summarise(records)))

- **By likelihood**, the answer is the option that the model finds most likely; no answer is lost, and how likely it was
  says whether the model knows when it knows. **By text**, the answer is what the model writes, if it can be read.
- The images and the question are computed once for all options and for the text: a cache holds them, every option is
  read against it, and the text goes on from it.
- Questions on one patient are not independent, so intervals come from drawing patients, not questions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from ..data.routes import MODALITIES
from ..data.understanding import parse_answer, parse_listing
from ..image_processing_synermedgen import own_window
from ..modeling_synermedgen import read_layout
from .runs import CASES, claim_folder, read_records
from .statistics import interval_of_mean

BATCHES_SORTED = 4  # rows of so many batches are sorted by length, so that little of a batch is padding
BINS = 10  # of confidence
COPIED = ("index", "task", "route", "difficulty", "region", "dataset", "case_id", "patient_id", "options", "answer")
UNKNOWN = "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """
    A row that is ready to be asked.

    Args:
        row (`dict`): Of the data set.
        text (`str`): The chat up to the answer.
        images (`list`): What the chat has places for.
        length (`int`): In tokens, about.
    """

    row: dict
    text: str
    images: list
    length: int


def answer_questions(
    model,
    processor,
    rows: Iterable[dict],
    batch_size: int = 16,
    generate: bool = True,
    max_new_tokens: int = 32,
) -> Iterator[dict]:
    """
    Ask questions and score the answers.

    Args:
        model ([`SynerMedGenForConditionalGeneration`]): In evaluation mode.
        processor ([`SynerMedGenProcessor`]): Tokenizer and image processor.
        rows (`Iterable[dict]`): Of `load_dataset("synermed", "understanding")` and its like. Rows of the authors' file
            whose answers are no letters have no options; they are scored by text alone.
        batch_size (`int`, defaults to 16): Questions at a time. The answers do not depend on it.
        generate (`bool`, defaults to `True`): Let the model answer in its own words too.
        max_new_tokens (`int`, defaults to 32): Longest answer in words.

    Yields:
        `dict`: One per row, in order, of what JSON can hold: `index`, `task`, `route`, `difficulty`, `region`,
        `dataset`, `case_id`, `patient_id`, `options` and `answer` as in the row; `probabilities` of the options,
        `chosen` (the likeliest) and whether it is `correct`, all `None` without options; `answer_means` and
        `chosen_means`, what the row's `meanings` say of the two. With `generate`: `text`, `parsed` (the option it
        means, or `None`), `text_correct`.

    Raises:
        `ValueError`: A row cannot be asked; it is named before any row of its batch is asked.
    """
    rows = iter(rows)
    while window := [_prepare(processor, row) for row in islice(rows, BATCHES_SORTED * batch_size)]:
        order = sorted(range(len(window)), key=lambda place: window[place].length)
        records: dict[int, dict] = {}
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            questions = [window[place] for place in places]
            answers = _ask(model, processor, questions, max_new_tokens if generate else 0)
            for place, question, (probabilities, text) in zip(places, questions, answers, strict=True):
                records[place] = _record(question.row, probabilities, text)
        yield from (records[place] for place in range(len(window)))


def _prepare(processor, row: dict) -> Question:
    """A row as a question, or a `ValueError` that names it; patients are not named, errors end up in logs."""
    if row["options"] and row["answer"] not in row["options"]:
        options = ", ".join(row["options"])
        raise ValueError(f"Row {row['index']} ({row['task']}): the answer {row['answer']!r} is none of {options}.")
    messages = list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))
    parts = []
    for content in (message["content"] for message in messages):
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    places = sum(part["type"] == "image" for part in parts)
    if not 0 < places <= len(row["images"]):
        raise ValueError(
            f"Row {row['index']} ({row['task']}): {len(row['images'])} images for {places} places in the question."
        )
    images = row["images"][:places]  # the others belong to later turns
    length = sum(len(processor.text_block(part["text"]).ids) for part in parts if part.get("text"))
    patches = processor.image_processor.get_number_of_image_patches
    length += sum(patches(image.height, image.width, {"window": own_window(image)}) for image in images)
    return Question(row, processor.apply_chat_template(messages, add_generation_prompt=True), images, length)


@torch.no_grad()
def _ask(model, processor, questions: list[Question], max_new_tokens: int) -> list[tuple[list | None, str | None]]:
    """Probabilities of the options of each question, and the text if any tokens are asked for."""
    images = [image for question in questions for image in question.images]
    inputs = processor(
        text=[question.text for question in questions],
        images=images,
        window=[own_window(image) for image in images],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    probabilities: list[list | None] = [None] * len(questions)
    if with_options := [number for number, question in enumerate(questions) if question.row["options"]]:
        options = [
            [processor.text_block(option).ids for option in questions[number].row["options"]] for number in with_options
        ]
        caches = [_of_row(cache, number, int(mask[number].sum())) for number in with_options]
        next_positions = read_layout(model.config, ids, mask).positions[:, -1] + 1
        scores = _score_options(model, logits[with_options], caches, next_positions[with_options], options)
        for number, of_row in zip(with_options, scores, strict=True):
            if not of_row.isfinite().all():
                raise ValueError(
                    f"Row {questions[number].row['index']}: what the model makes of its options is NaN or infinite. "
                    "Half precision overflows easily: try float32 or bfloat16. What was answered so far is kept."
                )
            probabilities[number] = of_row.softmax(0).tolist()

    texts: list[str | None] = [None] * len(questions)
    if max_new_tokens:
        cache.crop(-1)  # generate goes on from a cache, but for the last token
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        texts = processor.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return [(one, None if text is None else text.strip()) for one, text in zip(probabilities, texts, strict=True)]


def _of_row(cache: DynamicCache, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the last `length` tokens of one row, `(1, heads, length, head_dim)` a layer: no padding."""
    return [
        (layer.keys[row : row + 1, :, -length:], layer.values[row : row + 1, :, -length:]) for layer in cache.layers
    ]


def _score_options(
    model, logits: torch.Tensor, contexts: list, positions: torch.LongTensor, options: list[list[list[int]]]
) -> list[torch.Tensor]:
    """
    Log-likelihood of each option of each row, its `<|im_end|>` included.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Of the first token of the answer.
        contexts (`list`): Keys and values of each row's context.
        positions (`torch.LongTensor` of shape `(rows,)`): Rotary position of the first token of the answer.
        options (`list[list[list[int]]]`): Tokens of each option of each row.

    Returns:
        `list[torch.Tensor]`: `(options,)` for each row.
    """
    # One call for all: every row gets as many options, and every option as many tokens, as the most there are.
    count, longest = max(map(len, options)), max(len(ids) for row in options for ids in row)
    fed = torch.full((len(options), count, longest), model.config.pad_token_id)
    said = torch.full((len(options), count, longest + 1), -100)
    said[:, :, 0] = 0
    for row, of_row in enumerate(options):
        for number, ids in enumerate(of_row):
            fed[row, number, : len(ids)] = torch.tensor(ids)
            said[row, number, : len(ids) + 1] = torch.tensor([*ids, model.config.eos_token_id])
    fed, said = fed.to(logits.device), said.to(logits.device)
    caches = []
    for layers in contexts:
        cache = DynamicCache()
        for index, pair in enumerate(layers):
            # The options of a row share its context as views: to `update` with them would copy it for each.
            keys, values = (tensor.expand(count, -1, -1, -1) for tensor in pair)
            cache.update(keys[:, :, :0], values[:, :, :0], index)
            cache.layers[index].keys, cache.layers[index].values = keys, values
        caches.append(cache)
    places = positions[:, None] + torch.arange(longest, device=positions.device)
    later = model(
        input_ids=fed.flatten(0, 1),
        position_ids=places.repeat_interleave(count, 0),
        past_key_values=caches,
        use_cache=False,
    ).logits
    first = logits.float().log_softmax(-1).gather(1, said[:, :, 0])
    losses = cross_entropy(later.float().transpose(1, 2), said[:, :, 1:].flatten(0, 1), reduction="none")
    scores = first - losses.sum(-1).view_as(first)
    return [of_row[: len(own)] for of_row, own in zip(scores, options, strict=True)]


def _record(row: dict, probabilities: list[float] | None, text: str | None) -> dict:
    options, answer = row["options"], row["answer"]
    record = {name: row[name] for name in COPIED}
    means = dict(zip(options, row.get("meanings") or (), strict=False))
    chosen = None if probabilities is None else options[int(np.argmax(probabilities))]
    record |= {
        "answer_means": means.get(answer),
        "probabilities": probabilities,
        "chosen": chosen,
        "chosen_means": means.get(chosen),
        "correct": None if chosen is None else chosen == answer,
    }
    if text is not None:
        parsed, correct = _read_text(text, options, answer)
        record |= {"text": text, "parsed": parsed, "text_correct": correct}
    return record


def _read_text(text: str, options: list[str], answer: str) -> tuple[str | None, bool]:
    """What a text answers, and whether that is right."""
    if options:
        parsed = parse_answer(text, options)
        return parsed, parsed == answer
    if (panels := parse_listing(answer)) is not None:
        said = parse_listing(text)
        named = said is not None and None not in said
        return text if named else None, said == panels
    return text or None, text.rstrip(".").casefold() == answer.strip().rstrip(".").casefold()


def resume_cases(folder: str | Path, arguments: dict) -> list[dict]:
    """
    The records that an earlier run wrote to `cases.jsonl`; what it asked is remembered in `arguments.json`. A last line
    that was half written is removed.

    Args:
        folder (`str` or `Path`): Made if it does not exist.
        arguments (`dict`): Of what JSON can hold: everything that the answers depend on.

    Returns:
        `list[dict]`: Empty for a new run.

    Raises:
        `ValueError`: The folder holds answers to something else, or to what is not known.
    """
    claim_folder(folder, arguments)
    return read_records(Path(folder) / CASES)


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def summarise(records: Iterable[dict], bootstrap: int = 1000, seed: int = 0) -> dict:
    """
    Figures of each task.

    Args:
        records (`Iterable[dict]`): Of [`answer_questions`].
        bootstrap (`int`, defaults to 1000): How often patients are drawn for an interval.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `dict`: `bootstrap`, `seed`, and `tasks`, where each task has

        - `n`, `patients`, and `chance`: what guessing among the options gets (`None` without options);
        - `likelihood` and `text`: `n`, `accuracy` and `interval`, which holds it in 95 of 100 draws of patients (`None`
          for a single patient); `text` also `unparsed`, the share of answers that could not be read. `None` if nothing
          was scored in this way;
        - `routes` and `difficulties`: the same of each;
        - `confusion`: `labels`, and `counts` with a row for each right answer and a column for each given one, by
          likelihood or else by text. CTS and TIA have letters, MI has modalities;
        - `calibration`: `bins` of the largest probability (`low`, `high`, `n`, mean `confidence`, `accuracy`) and
          `error`, the mean distance of the two (ECE). `None` without options.
    """

    def figures(own: list[dict]) -> dict:
        options = [len(record["options"]) for record in own if record["options"]]
        return {
            "n": len(own),
            "patients": len({_patient(record) for record in own}),
            "chance": float(np.mean(1 / np.array(options))) if options else None,
            "likelihood": _accuracy(own, "correct", bootstrap, seed),
            "text": _accuracy(own, "text_correct", bootstrap, seed),
        }

    return {
        "bootstrap": bootstrap,
        "seed": seed,
        "tasks": {
            task: {
                **figures(own),
                "routes": {name: figures(part) for name, part in _groups(own, "route").items()},
                "difficulties": {name: figures(part) for name, part in _groups(own, "difficulty").items()},
                "confusion": _confusion(own),
                "calibration": _calibration(own),
            }
            for task, own in _groups(records, "task").items()
        },
    }


def _groups(records: Iterable[dict], key: str) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record[key] or UNKNOWN, []).append(record)
    return dict(sorted(groups.items()))


def _patient(record: dict) -> str:
    return f"{record['dataset']}/{record['patient_id']}"


def _accuracy(records: list[dict], key: str, bootstrap: int, seed: int) -> dict | None:
    records = [record for record in records if record.get(key) is not None]
    if not records:
        return None
    patients, number = np.unique([_patient(record) for record in records], return_inverse=True)
    asked = np.bincount(number)
    right = np.bincount(number, weights=[record[key] for record in records])
    interval = interval_of_mean(right, asked, bootstrap, seed)
    found = {"n": len(records), "accuracy": float(right.sum() / asked.sum()), "interval": interval}
    if key == "text_correct":
        found["unparsed"] = float(np.mean([record["parsed"] is None for record in records]))
    return found


def _confusion(records: list[dict]) -> dict:
    pairs = [pair for record in records for pair in _answered(record)]
    order = {name: place for place, name in enumerate(MODALITIES)}
    labels = sorted({label for pair in pairs for label in pair}, key=lambda label: (order.get(label, -1), label))
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for answer, given in pairs:
        counts[labels.index(answer), labels.index(given)] += 1
    return {"labels": labels, "counts": counts.tolist()}


def _answered(record: dict) -> list[tuple[str, str]]:
    """Right and given answer; of MI as modalities, of a listing for each panel."""
    answer, given = record["answer"], record["chosen"] or record.get("parsed")
    if record["task"] != "MI":
        return [(answer, given)] if record["options"] else []
    panels, said = parse_listing(answer), parse_listing(given or "")
    if panels and said:
        return list(zip(panels, said, strict=False))
    return [(record["answer_means"], record["chosen_means"])] if record["answer_means"] else []


def _calibration(records: list[dict]) -> dict | None:
    records = [record for record in records if record["correct"] is not None]
    if not records:
        return None
    confidence = np.array([max(record["probabilities"]) for record in records])
    right = np.array([record["correct"] for record in records], dtype=float)
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for place in range(BINS):
        own = number == place
        sure, accuracy = (float(values[own].mean()) if own.any() else None for values in (confidence, right))
        bins.append({"low": place / BINS, "high": (place + 1) / BINS, "n": int(own.sum())})
        bins[-1] |= {"confidence": sure, "accuracy": accuracy}
        error += abs(sure - accuracy) * own.mean() if own.any() else 0.0
    return {"bins": bins, "error": float(error)}


def understanding_table(summary: dict) -> str:
    """What [`summarise`] found as a Markdown table, in per cent."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    def accuracy(found: dict | None) -> str:
        if found is None:
            return ""
        interval = found["interval"]
        return percent(found["accuracy"]) + (f" ({percent(interval[0])} to {percent(interval[1])})" if interval else "")

    columns = ["task", "subset", "n", "patients", "chance", "by likelihood", "by text", "unread", "calibration error"]
    lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2)]
    for task, own in summary["tasks"].items():
        parts = [("all", own), *own["difficulties"].items(), *own["routes"].items()]
        for name, part in parts:
            calibration = part.get("calibration")
            lines.append(
                [
                    task,
                    name,
                    part["n"],
                    part["patients"],
                    percent(part["chance"]),
                    accuracy(part["likelihood"]),
                    accuracy(part["text"]),
                    percent(part["text"]["unparsed"]) if part["text"] else "",
                    percent(calibration["error"]) if calibration else "",
                ]
            )
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


__all__ = ["answer_questions", "resume_cases", "summarise", "understanding_table"]
