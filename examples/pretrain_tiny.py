"""Give the toy what a base model brings along: eyes that tell slices apart, and the habit of comparing.

    python examples/pretrain_tiny.py --pretrained_model_name_or_path runs/tiny-init --output_dir runs/tiny-base

BAGEL starts from SigLIP2's eyes and Qwen2.5's text. The toy starts from random numbers, and the understanding tasks
alone do not take it from there: what is right depends on two images at once, and no single one of them gives a hint.
Five short trainings on simulated patients stand in for a base.

1. Eyes: ViT and connector, by contrast and by name. Of many slices, which two show the same place in two modalities
   (InfoNCE over the mean token of an image, as CLIP does between image and text), and which modality is each? Contrast
   alone would make all modalities look the same.
2. Places: the understanding expert sees one slice, then eight more, and after each of them `yes` or `no`: is it the
   same place? Asked among other things, comparing was not learned at all. The lower layers alone must tell: what the
   last layer finds, no layer could use for a letter.
3. Letters: of four slices, which one? Places go on beside it, lest the gradients of guessing undo comparing. Once
   letters are learned, the question grows from its last words to all of them: from the start, it would stand in the
   way.
4. Names: eight images in a row, each followed by its modality's name, or four, of which one after the other is asked
   for by name; with letters, lest they be forgotten. What counts is how many names are seen, and a row of Stage I has
   one.
5. Changes: the questions of TIA. After two layers, a linear reader tells source and target from the end of the second
   image, and from the end of each description as well: what image and text have in common is then the same to the
   layers above, as the letters of two slices of one place are. Names are told after two layers too; letters, names and
   panels go on beside it.

Stage I, `examples/train_understanding.py`, goes on from here.
"""

import argparse
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.data.phantom import PHANTOM_VERSION
from synermedgen_hf.data.routes import MODALITIES
from synermedgen_hf.data.synermed import load_phantom_case, phantom_records
from synermedgen_hf.data.understanding import NAMED_SEQUENCES, wrong_pairs
from synermedgen_hf.data.wordings import (
    CLARIFIED,
    CTS_QUESTIONS,
    MI_QUESTIONS,
    TIA_QUESTIONS,
    describe,
    region_name,
)
from synermedgen_hf.image_processing_synermedgen import to_display
from synermedgen_hf.loading_synermedgen import part_of
from synermedgen_hf.optimization import MuonWithAdamW
from synermedgen_hf.processing_synermedgen import (
    MODALITY_NAMES,
    MODALITY_QUESTION,
    ImageBlock,
    build_sequence,
    pad_sequences,
)

SLICES = 8  # of a volume in a batch of contrast
CANDIDATES = 8  # of a row of places
NAMES = 8  # of a row of names
DESCRIPTIONS = 6  # of a row of readings
FITTING = 0.4  # share of them that fit the images
LETTERS = "ABCD"
LEARNED = math.log(len(LETTERS)) / 4  # half the loss of guessing a letter, of which every second token is certain
LOWER = 3  # layers, of five, that compare
LOWEST = 2  # ... that read
GAP_MM = 4.0  # between slices that are told apart, as in CTS


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="what examples/init_tiny.py made")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/phantom"), help="where simulated volumes are kept")
    parser.add_argument("--train_cases", type=int, default=60, help="simulated subjects per protocol")
    parser.add_argument("--contrast_steps", type=int, default=1500)
    parser.add_argument("--contrast_volumes", type=int, default=24, help=f"a step, {SLICES} slices of each")
    parser.add_argument("--places_steps", type=int, default=600)
    parser.add_argument("--places_batch_size", type=int, default=48)
    parser.add_argument("--letters_steps", type=int, default=600)
    parser.add_argument("--letters_batch_size", type=int, default=64, help="and a quarter as many of places")
    parser.add_argument("--names_steps", type=int, default=300)
    parser.add_argument("--names_batch_size", type=int, default=64)
    parser.add_argument("--changes_steps", type=int, default=400)
    parser.add_argument("--changes_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--letters_learning_rate", type=float, default=7e-4)
    parser.add_argument("--muon_learning_rate", type=float, default=0.02, help="of the ViT's matrices, for contrast")
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--num_proc", type=int, default=2, help="processes that simulate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def display_volume(job) -> dict[str, np.ndarray]:
    """All modalities of one simulated patient as 8-bit pictures, made once and kept on disk."""
    record, cache_dir = job
    path = cache_dir / f"v{PHANTOM_VERSION}" / f"display-{record.dataset}-{record.case_id}.safetensors"
    if not path.exists():
        case = load_phantom_case(record, None, 128)
        pictures = {
            modality: np.stack([np.asarray(to_display(image, case.windows[modality])) for image in volume[case.usable]])
            for modality, volume in case.images.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(pictures | {"between_mm": np.array([case.spacing[0]])}, unfinished)
        unfinished.replace(path)
    return load_file(path)


class Slices:
    """
    Slices of simulated patients as the ViT reads them: `patches[row]`, `modality[row]` as a number, and for each volume
    where the rows of its modalities begin, its slices, how many of them make a gap, and its region.
    """

    def __init__(self, split: str, args, processor):
        jobs = [(record, args.cache_dir) for record in phantom_records(split, args.train_cases)]
        patches, modality, self.volumes, rows = [], [], [], 0
        with get_context("spawn").Pool(args.num_proc) as pool:
            volumes = tqdm(pool.imap(display_volume, jobs), total=len(jobs), desc="simulate")
            for (record, _), volume in zip(jobs, volumes, strict=True):
                gap = max(1, math.ceil(GAP_MM / volume.pop("between_mm").item() - 1e-6))
                count = len(next(iter(volume.values())))
                if count < SLICES * gap:
                    continue
                first = {}
                for name, pictures in volume.items():
                    batch = [Image.fromarray(picture) for picture in pictures]
                    inputs = processor.image_processor.preprocess(batch, window=(0.0, 255.0), return_tensors="pt")
                    # Grey: one of the three channels says it all.
                    patches.append(
                        inputs["pixel_values"].unflatten(1, (-1, 3))[..., 0].half().unflatten(0, (count, -1))
                    )
                    modality += [MODALITIES.index(name)] * count
                    first[name], rows = rows, rows + count
                self.volumes.append((first, count, gap, record.region))
        self.patches, self.modality = torch.cat(patches), torch.tensor(modality)
        side = math.isqrt(self.patches.shape[1])
        self.grid = (side, side)

    def pair(self, rng) -> tuple[int, int, int, int, str]:
        """First rows of two modalities of one volume, its slices, how many of them make a gap, and its region."""
        first, *rest = self.volumes[rng.integers(len(self.volumes))]
        return *rng.choice(list(first.values()), 2, replace=False), *rest

    def name(self, row: int) -> str:
        """Modality of a row."""
        return MODALITIES[self.modality[row]]

    def pixels(self, rows) -> dict[str, torch.Tensor]:
        values = self.patches[torch.as_tensor(np.asarray(rows))].float()
        return {
            "pixel_values": values.flatten(0, 1).repeat_interleave(3, 1),
            "image_grid_hw": torch.tensor([self.grid] * len(values)),
        }


def contrast_rows(slices: Slices, volumes: int, rng) -> np.ndarray:
    """Rows `(2, volumes * SLICES)`: the same places in two modalities. Half of the volumes give a stretch of slices."""
    chosen = []
    for _ in range(volumes):
        one, other, count, gap, _ = slices.pair(rng)
        places = np.arange(rng.integers(gap), count, gap)
        if rng.random() < 0.5 and len(places) > SLICES:
            start = rng.integers(len(places) - SLICES)
            places = places[start : start + SLICES]
        else:
            places = rng.permutation(places)[:SLICES]
        chosen.append([one + places, other + places])
    return np.concatenate(chosen, axis=1)


def contrast_loss(model, namer, slices: Slices, rows: np.ndarray, temperature: torch.Tensor) -> torch.Tensor:
    """InfoNCE in both directions, and the cross entropy of the modality's name."""
    rows = rows.reshape(-1)
    tokens = model.get_image_features(**slices.pixels(rows)).pooler_output
    image = torch.stack(tokens).float().mean(1)
    # What differs between modalities has a little room of its own: elsewhere, the same place looks the same in all.
    room = image.shape[1] // 8
    one, other = normalize(image[:, room:], dim=-1).chunk(2)
    scores = temperature.exp() * one @ other.T
    same = torch.arange(len(scores))
    place = (cross_entropy(scores, same) + cross_entropy(scores.T, same)) / 2
    return place + cross_entropy(namer(image[:, :room]), slices.modality[torch.as_tensor(rows)])


class Comparisons:
    """
    Rows in which slices are compared.

    Args:
        slices ([`Slices`]): What is asked about.
        processor ([`SynerMedGenProcessor`]): For its tokenizer.
        config ([`SynerMedGenConfig`]): For its special ids.
    """

    def __init__(self, slices: Slices, processor, config):
        self.slices, self.processor, self.config = slices, processor, config
        self.image = ImageBlock("image", slices.grid)
        tokenizer = processor.tokenizer
        self.line_ends = {number for number in range(len(tokenizer)) if "\n" in tokenizer.decode([number])}

    def said(self, text: str):
        return self.processor.text_block(text)

    def answer(self, text: str):
        return self.processor.text_block(text, learned=True)

    def batch(self, row: Callable, count: int) -> dict[str, torch.Tensor]:
        """`count` rows, of which each call of `row` gives the blocks and the slices they show."""
        blocks, shown = zip(*(row() for _ in range(count)), strict=True)
        batch = pad_sequences(self.config, [build_sequence(self.config, each) for each in blocks])
        return batch | self.slices.pixels([number for each in shown for number in each])

    def place(self, rng):
        """A slice, then others of another modality (sometimes of the same): is it the same place?"""
        one, other, place, apart, _ = self.choose(rng)
        blocks, shown = [self.said("1"), self.image], [one + place]
        for letter, right in zip(ascii_uppercase, rng.random(CANDIDATES) < 0.5, strict=False):
            blocks += [self.said(letter), self.image, self.answer("yes" if right else "no")]
            shown.append(other + (place if right else rng.choice(apart)))
        return blocks, shown

    def choose(self, rng):
        """
        First rows of two modalities of a volume, three times of ten the same, a slice, and others, by halves its
        neighbours, and the region.
        """
        one, other, count, gap, region = self.slices.pair(rng)
        other = one if rng.random() < 0.3 else other
        place = rng.integers(count)
        apart = [wrong for wrong in range(count) if abs(wrong - place) >= gap]
        if rng.random() < 0.5:
            apart = sorted(apart, key=lambda wrong: abs(wrong - place))[:8]
        return one, other, place, apart, region

    def letter(self, rng, share: float):
        """A question of CTS, cut to at most `share` of its words, from the back."""
        while True:
            one, other, place, apart, region = self.choose(rng)
            chosen = rng.permutation(apart)[: len(LETTERS) - 1].tolist()
            if len(chosen) == len(LETTERS) - 1:
                break
        answer = rng.integers(len(LETTERS))
        chosen.insert(answer, place)
        blocks, shown = [self.said("1"), self.image], [one + place]
        for letter, candidate in zip(LETTERS, chosen, strict=True):
            blocks += [self.said(letter), self.image]
            shown.append(other + candidate)
        names = {"source": MODALITY_NAMES[self.slices.name(one)], "target": MODALITY_NAMES[self.slices.name(other)]}
        question = rng.choice(CTS_QUESTIONS).format(
            **names, region=region_name(region), letters=f"A to {LETTERS[-1]}", count=len(LETTERS)
        )
        words = question.split()
        last = len(words) if rng.random() < 0.2 * (share > 0) else rng.integers(1, 2 + max(1, int(share * len(words))))
        return [*blocks, self.said(" ".join(words[-last:])), self.answer(LETTERS[answer])], shown

    def listed(self, rng, changes: list[tuple[str, str, str]]):
        """A question of TIA with a description of each change: source, target and region."""
        lines = [
            f"{letter}. {rng.choice(describe(*change))}"
            for letter, change in zip(ascii_uppercase, changes, strict=False)
        ]
        return self.said("\n".join([rng.choice(TIA_QUESTIONS), *lines]))

    def two(self, rng):
        """A slice in two modalities: blocks, rows, and source, target and region."""
        one, other, count, _, region = self.slices.pair(rng)
        place = rng.integers(count)
        blocks = [self.said("1"), self.image, self.said("2"), self.image]
        return blocks, [one + place, other + place], (self.slices.name(one), self.slices.name(other), region)

    def change(self, rng):
        """A question of TIA: which of the descriptions is it?"""
        blocks, shown, (source, target, region) = self.two(rng)
        home, away = wrong_pairs(source, target, region)
        wrong = (home or away)[rng.integers(len(home or away))]
        directions = [(source, target), (target, source), wrong, wrong[::-1]]
        order = rng.permutation(len(directions)).tolist()
        listed = self.listed(rng, [(*directions[which], region) for which in order])
        return [*blocks, listed, self.answer(LETTERS[order.index(0)])], shown

    def readings(self, rng, count: int):
        """
        `count` rows of two modalities of a slice, then any changes; and where to read (numbers of rows and of tokens,
        the end of the second image and of each description) which source and which target (`(places, 2)`, as numbers).
        """
        sequences, slices, rows, tokens, routes = [], [], [], [], []
        for row in range(count):
            blocks, shown, change = self.two(rng)
            # Of any volume, so that the descriptions do not tell what the images are.
            fitting = rng.random(DESCRIPTIONS) < FITTING
            changes = [change if fits else self.two(rng)[2] for fits in fitting]
            sequence = build_sequence(self.config, [*blocks, self.listed(rng, changes)])
            text = range(len(sequence.input_ids) - sequence.lengths[-1], len(sequence.input_ids))
            _, *lines = [place for place in text if sequence.input_ids[place] in self.line_ends]
            places = [text[0] - 1, *lines, text[-2]]
            sequences.append(sequence)
            slices += shown
            rows += [row] * len(places)
            tokens += places
            routes += [(MODALITIES.index(source), MODALITIES.index(target)) for source, target, _ in (change, *changes)]
        batch = pad_sequences(self.config, sequences) | self.slices.pixels(slices)
        del batch["labels"]
        return batch, (rows, tokens), torch.tensor(routes)

    def any_slice(self, rng) -> int:
        """Row of any slice of any volume."""
        first, count, _, _ = self.slices.volumes[rng.integers(len(self.slices.volumes))]
        return rng.choice(list(first.values())) + rng.integers(count)

    def name(self, rng):
        """Slices, each followed by its modality, half of them asked in the words of `pipe.identify`."""
        blocks, shown = [], [self.any_slice(rng) for _ in range(NAMES)]
        for row in shown:
            asked = [self.said(MODALITY_QUESTION)] if rng.random() < 0.5 else []
            blocks += [self.image, *asked, self.answer(MODALITY_NAMES[self.slices.name(row)])]
        return blocks, shown

    def panel(self, rng):
        """Slices of different modalities, then, in any order, which of them is ...?"""
        shown = {}
        while len(shown) < len(LETTERS):
            row = self.any_slice(rng)
            name = self.slices.name(row)
            together = {name, *shown}
            if not ("MRI" in together and together & NAMED_SEQUENCES):  # these are MRI as well
                shown.setdefault(name, row)
        blocks = []
        for letter in LETTERS:
            blocks += [self.said(letter), self.image]
        letters = {"letters": f"A to {LETTERS[-1]}", "count": len(LETTERS)}
        for which in rng.permutation(len(LETTERS)):
            asked = list(shown)[which]
            partner, clear = CLARIFIED.get(asked, ("", ""))
            target = clear if partner in shown else MODALITY_NAMES[asked]
            question = rng.choice(MI_QUESTIONS).format(target=target, **letters)
            blocks += [self.said(question), self.answer(LETTERS[which])]
        return blocks, list(shown.values())


def train(
    name: str,
    loss_of: Callable[[int], torch.Tensor],
    parameters: list[tuple[str, torch.nn.Parameter]],
    steps: int,
    warmup_steps: int,
    log: list[dict],
    lr: float,
    muon_lr: float | None = None,
):
    """`steps` of one of the trainings."""
    if muon_lr is None:
        optimizer = torch.optim.AdamW([p for _, p in parameters], lr=lr, betas=(0.9, 0.98))
    else:
        optimizer = MuonWithAdamW(parameters, lr=lr, muon_lr=muon_lr, betas=(0.9, 0.95))
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
    progress = tqdm(range(steps), desc=name)
    for step in progress:
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of {name} at step {step} is {loss.item()}: lower --learning_rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.append({"training": name, "step": step + 1, "loss": round(loss.item(), 4)})
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main(args):
    if (args.output_dir / "model_index.json").exists():
        raise SystemExit(f"{args.output_dir} holds a pipeline already: choose another --output_dir.")
    set_seed(args.seed)
    pipe = SynerMedGenPipeline.from_pretrained(args.pretrained_model_name_or_path, print_report=False)
    model, processor = pipe.model.train(), pipe.processor
    model.set_attn_implementation("eager")  # faster than sdpa for short rows on a CPU
    slices = Slices("train", args, processor)
    comparisons = Comparisons(slices, processor, model.config)
    temperature = torch.nn.Parameter(torch.tensor(2.3))  # of CLIP: 1 / 0.1, as a logarithm
    namer = torch.nn.Linear(model.config.text_config.hidden_size // 8, len(MODALITIES))  # not kept
    reader = torch.nn.Linear(model.config.text_config.hidden_size, 2 * len(MODALITIES))  # nor this

    def rng(step, stage):
        return np.random.default_rng([args.seed, stage, step])

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def contrast(step):
        rows = contrast_rows(slices, args.contrast_volumes, rng(step, 1))
        with autocast():
            return contrast_loss(model, namer, slices, rows, temperature)

    decoder = model.model.language_model
    layers = decoder.layers

    @contextmanager
    def only(lower):
        """The model without its upper layers, in half precision."""
        decoder.layers = layers[:lower]
        with torch.autocast("cpu", torch.bfloat16):
            yield
        decoder.layers = layers

    def place_loss(draw, count):
        batch = comparisons.batch(partial(comparisons.place, draw), count)
        with only(LOWER):
            return model(**batch).loss

    def places(step):
        return place_loss(rng(step, 2), args.places_batch_size)

    recent, grown = [], 0.0

    def letters(step):
        nonlocal grown
        draw = rng(step, 3)
        # One or two words until letters are learned, then more and more over a third of the steps.
        if grown or (len(recent) >= 10 and np.mean(recent[-10:]) < LEARNED):
            grown = min(1.0, grown + 3 / args.letters_steps)
        asked = comparisons.batch(partial(comparisons.letter, draw, grown), args.letters_batch_size)
        with autocast():
            loss = model(**asked).loss
        recent.append(loss.item())
        return loss + place_loss(draw, args.letters_batch_size // 4)

    def names(step):
        draw = rng(step, 4)
        kinds = (comparisons.name, comparisons.panel, partial(comparisons.letter, share=1.0))
        batch = comparisons.batch(lambda: kinds[draw.integers(len(kinds))](draw), args.names_batch_size)
        with autocast():
            return model(**batch).loss

    def changes(step):
        draw = rng(step, 5)
        batch, places, routes = comparisons.readings(draw, args.changes_batch_size)
        with only(LOWEST):
            hidden = model.model(**batch).last_hidden_state
        read = reader(hidden[places].float()).unflatten(1, (-1, 2))
        wrong = cross_entropy(read, routes, reduction="none").unflatten(0, (args.changes_batch_size, -1))
        loss = wrong[:, 0].mean() + wrong[:, 1:].mean()  # of the images, of the descriptions
        named = comparisons.batch(partial(comparisons.name, draw), args.changes_batch_size // 4)
        with only(LOWEST):
            loss = loss + model(**named).loss
        beside = (comparisons.name, comparisons.panel, partial(comparisons.letter, share=1.0))[step % 3]
        for kind, count in ((comparisons.change, 1), (beside, 2)):
            batch = comparisons.batch(partial(kind, draw), args.changes_batch_size // count)
            with autocast():
                loss = loss + model(**batch).loss
        return loss

    rates = {"lr": args.letters_learning_rate}
    eyes, mind = (
        [(name, p) for name, p in model.named_parameters() if part_of(name) == part]
        for part in ("vision", "understanding")
    )
    trainings = {
        "eyes": (
            contrast,
            [*eyes, ("temperature", temperature), *namer.named_parameters()],
            args.contrast_steps,
            {"lr": args.learning_rate, "muon_lr": args.muon_learning_rate},
        ),
        # What the eyes have learned stays: until comparing works, its gradients would be noise.
        "places": (places, mind, args.places_steps, {"lr": args.learning_rate}),
        "letters": (letters, mind, args.letters_steps, rates),
        "names": (names, mind, args.names_steps, rates),
        "changes": (changes, [*mind, *reader.named_parameters()], args.changes_steps, rates),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log_file = args.output_dir / "log.jsonl"
    for name, (loss_of, parameters, steps, rates) in trainings.items():
        done = args.output_dir / f"{name}.safetensors"
        if done.exists():  # of an interrupted run
            model.load_state_dict(load_tensors(done), strict=False)
            continue
        model.requires_grad_(False)
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        log: list[dict] = []
        train(name, loss_of, parameters, steps, args.warmup_steps, log, **rates)
        if name == "letters" and steps >= 100 and np.mean(recent[-10:]) >= LEARNED:  # fewer steps are a trial
            raise SystemExit("Letters were not learned, so nothing after them would be: take another --seed.")
        with log_file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in log)
        unfinished = done.with_suffix(".tmp")
        save_tensors({key: p.data for key, p in (eyes if name == "eyes" else mind)}, unfinished)
        unfinished.replace(done)

    pipe.model = model.requires_grad_(True).eval()
    pipe.save_pretrained(args.output_dir)
    for name in trainings:
        (args.output_dir / f"{name}.safetensors").unlink()
    print(f"Saved {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
