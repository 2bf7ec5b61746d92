"""Pairs from rows of a data set to batches of Stage II: which sample comes next, what is left out, how it is laid out.

    rows of `load_dataset("synermed", "pairs")` ──> PairPool ──> PairBatches ──> what the model's `forward` takes
    the same as a stream                        ──> StreamedBatches: one pool after another

* Sample `n` of a training is a function of the seed and `n` alone: its pair, its sources, what is dropped, its timestep
  and its noise. So a resumed run continues exactly, and two processes do what one does with twice the batch.
* Routes take turns: each is drawn equally often, however many pairs it has, and its pairs are gone through once before
  any comes again.
* The samples of a step are sorted by their number of tokens and cut into batches where least is padding. Which samples
  make a step has nothing to do with their length: steps whose samples are all alike teach less.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset
from tqdm.auto import tqdm

from ..processing_synermedgen import BlockSequence, ImageBlock, build_sequence, make_instruction, pad_sequences
from .latents import EncodedSlice, SliceEncoder, StoredSlice
from .pairs import pair_rows
from .phantom import PhantomCase
from .routes import ROUTES, Route
from .sources import CaseRecord, LoadedCase, measure_windows

LENGTHS = 6  # batches that the samples of a step are sorted into at least
_SAMPLED = 4096  # volumes of which a slice's content counts towards the fingerprint of a pool, at most about so many
_PLACE = ("dataset", "case_id", "region", "axis", "slice_index")
_COLUMNS = (
    *_PLACE,
    "source_modality",
    "target_modality",
    "source_window",
    "target_window",
    "instruction",
)


@dataclass
class PairedSlice:
    """
    One place in one patient, seen by several modalities.

    Args:
        case (`str`): Such as `"synthrad2023/1BA001"`.
        region (`str`): `"brain"`, `"pelvis"`, `"whole-body"`, ...
        slices (`dict[str, int]`): Modality -> number of the slice in its pool.
        instructions (`dict[tuple[str, str], str]`): For each pair of source and target the sentence that asks for it.
    """

    case: str
    region: str
    slices: dict[str, int] = field(default_factory=dict)
    instructions: dict[tuple[str, str], str] = field(default_factory=dict)

    def sources(self, target: str) -> list[str]:
        """All modalities that the target is made from."""
        return [source for source, made in self.instructions if made == target]


class PairPool:
    """
    The pairs that are drawn from.

    Args:
        rows (`Dataset` or `Iterable[dict]`): Rows of the `pairs` configuration. Those of a `Dataset` stay on disk until
            a picture is needed; pictures of others are `{"bytes", "path"}`, not decoded.
        encoder ([`SliceEncoder`]): What turns their slices into what the model reads; `None` if slices are all that is
            wanted, whose pairs may then be of any size.
        keep (`bool`, defaults to `True`): Keep encoded slices in memory.

    Raises:
        `ValueError`: A column is missing, there is no pair, or the two slices of a pair have different sizes.
    """

    def __init__(self, rows: Dataset | Iterable[dict], encoder: SliceEncoder, keep: bool = True):
        self.encoder, self.keep = encoder, keep
        self.stored: list[StoredSlice] = []
        self.encoded: dict[int, EncodedSlice] = {}
        self.known_grids: dict[int, tuple] = {}
        self.known_sizes: dict[int, tuple[int, int]] = {}
        self.unnamed = 0
        places: dict[tuple, PairedSlice] = {}
        pairs: dict[Route, list[PairedSlice]] = {}
        for number, (row, pictures) in enumerate(_with_pictures(rows)):
            source, target = row["source_modality"], row["target_modality"]
            if not source or not target:
                self.unnamed += 1
                continue
            case, place = f"{row['dataset']}/{row['case_id']}", tuple(row[name] for name in _PLACE)
            # Rows that do not know their place in the patient are no neighbours of any other.
            place += (number,) if row["slice_index"] < 0 else ()
            paired = places.setdefault(place, PairedSlice(case, row["region"]))
            for side, modality in (("source", source), ("target", target)):
                if modality not in paired.slices:
                    paired.slices[modality] = len(self.stored)
                    self.stored.append(StoredSlice(pictures[side], modality, row[f"{side}_window"], case))
            if (source, target) not in paired.instructions:
                paired.instructions[source, target] = row["instruction"]
                pairs.setdefault(Route(row["region"], source, target), []).append(paired)
        if not pairs:
            unnamed = f" ({self.unnamed} rows do not name source and target)" if self.unnamed else ""
            raise ValueError(f"There is no pair to train on{unnamed}.")
        known = {route: number for number, route in enumerate(ROUTES)}
        routes = sorted(pairs, key=lambda route: (known.get(route, len(known)), route))
        self.pairs = {route: pairs[route] for route in routes}
        if encoder is not None:
            self._check_sizes()
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return sum(map(len, self.pairs.values()))

    def grids(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of a slice's latent tokens and of its ViT patches, without encoding it."""
        if number not in self.known_grids:
            self.known_grids[number] = self.encoder.grids(*self.size(number))
        return self.known_grids[number]

    def size(self, number: int) -> tuple[int, int]:
        """Of a slice, as it is stored; its picture is fetched once."""
        if number not in self.known_sizes:
            self.known_sizes[number] = self.stored[number].size()
        return self.known_sizes[number]

    def _check_sizes(self):
        for route, pairs in self.pairs.items():
            for pair in pairs:
                one, other = (self.size(pair.slices[side]) for side in (route.source, route.target))
                if one != other:
                    raise ValueError(
                        f"The slices of a pair of {pair.case} ({route}) have different sizes, {one} and {other}: "
                        "resample them first."
                    )

    def _fingerprint(self) -> str:
        """
        Of every pair's place, windows and instructions, and of the content of every volume's middle slice: with a
        volume replaced, these are other data.
        """
        state = hashlib.sha256()
        for route, pairs in self.pairs.items():
            asked = (route.source, route.target)
            said = [[pair.case, pair.slices, pair.instructions[asked]] for pair in pairs]
            state.update(json.dumps([route.name, said]).encode())
        for stored in self.stored:
            state.update(json.dumps([stored.case, stored.modality, stored.window]).encode())
        volumes: dict[tuple[str, str], list[StoredSlice]] = {}
        for stored in self.stored:
            volumes.setdefault((stored.case, stored.modality), []).append(stored)
        for slices in islice(volumes.values(), 0, None, max(1, len(volumes) // _SAMPLED)):
            state.update(slices[len(slices) // 2].content())
        return state.hexdigest()

    def __getitem__(self, number: int) -> EncodedSlice:
        """An encoded slice."""
        if number in self.encoded:
            return self.encoded[number]
        encoded = self.encoder(self.stored[number])
        if self.keep:
            self.grids(number)
            self.encoded[number] = encoded
            self.stored[number].read = None  # the picture is not needed again, and may be the last hold on it
        return encoded

    def encode_all(self, process: int = 0, processes: int = 1, progress: bool = True):
        """
        Encode every slice once: into memory, or, where they are not kept there, into the encoder's cache on disk, which
        processes fill together.
        """
        numbers = range(len(self.stored)) if self.keep else range(process, len(self.stored), processes)
        for number in tqdm(numbers, desc="encode", unit="slice", disable=not progress):
            self[number]


def phantom_rows(cases: list[PhantomCase], routes: list[str] | None = None) -> Iterator[dict]:
    """Cases of [`~synermedgen_hf.data.phantom.load_phantom`] as rows of pairs; the list is emptied on the way."""
    while cases:
        case = cases.pop(0)
        record = CaseRecord(
            dataset=f"phantom-{case.protocol}",
            case_id=case.case_id,
            patient_id=case.case_id,
            region=case.region,
            axis=case.axis,
            files=dict.fromkeys(case.images, ""),
        )
        windows, usable = measure_windows(case.images), np.arange(len(case.mask))
        loaded = LoadedCase(record, case.images, case.mask, case.lesion, case.spacing, windows, usable)
        for _, row in pair_rows(loaded, routes):
            yield row


def _with_pictures(rows: Dataset | Iterable[dict]) -> Iterator[tuple[dict, dict]]:
    """Rows without pictures, and for each side what reads its picture."""
    if not isinstance(rows, Dataset):
        for row in rows:
            yield row, {side: partial(row.__getitem__, f"{side}_image") for side in ("source", "target")}
        return
    _check_columns(rows)
    files = {
        side: rows.select_columns(f"{side}_image").cast_column(f"{side}_image", Image(decode=False))
        for side in ("source", "target")
    }
    for number, row in enumerate(rows.select_columns(list(_COLUMNS))):
        yield row, {side: partial(_picture_of, files[side], number, f"{side}_image") for side in files}


def _check_columns(rows: Dataset | IterableDataset):
    there = rows.column_names  # of some streams it is not known
    if missing := [name for name in (*_COLUMNS, "source_image", "target_image") if there and name not in there]:
        raise ValueError(f"The data set has no column {', '.join(missing)}: see load_dataset('synermed', 'pairs').")


def _picture_of(files: Dataset, number: int, column: str) -> dict:
    return files[number][column]


@dataclass
class Dropout:
    """
    Probability that a sample goes without its instruction, a source's latents, a source's ViT patches, or the name of
    the region in the instruction, each independently; and that it has several sources, where there are several.
    """

    text: float = 0.1
    vae: float = 0.3
    vit: float = 0.3
    region: float = 0.0
    multi_source: float = 0.1

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"The probability of {name} must be within [0, 1], got {value}.")


@dataclass
class Sample:
    """
    One sample as it was drawn, before anything is encoded or padded.

    Args:
        route ([`Route`]): Of its first source.
        pair ([`PairedSlice`]): Where.
        latents, images (`list[int]`): Slices that are shown as latents and as ViT patches, in order.
        target (`int`): The slice to be made.
        sequence ([`BlockSequence`]): Its tokens.
        timestep (`float`): In [0, 1].
        seed (`int`): Of all its noise.
    """

    route: Route
    pair: PairedSlice
    latents: list[int]
    images: list[int]
    target: int
    sequence: BlockSequence
    timestep: float
    seed: int

    @property
    def target_tokens(self) -> int:
        return self.sequence.lengths[-1] - 2

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the generation and of the understanding expert."""
        # The delimiters of latents are understanding tokens.
        generation = sum(
            length - 2
            for kind, length in zip(self.sequence.kinds, self.sequence.lengths, strict=True)
            if kind in ("latent", "target")
        )
        return generation, len(self.sequence.input_ids) - generation


class PairOrder:
    """
    Which pair comes next: a function of its number and the seed.

    Args:
        pool ([`PairPool`]): What is drawn from.
        seed (`list[int]`): Of the order.
    """

    def __init__(self, pool: PairPool, seed: list[int]):
        self.pool, self.seed, self.routes = pool, seed, list(pool.pairs)
        self.turns = lru_cache(maxsize=4)(self._turns)
        self.order = lru_cache(maxsize=4 * len(self.routes))(self._order)

    def _turns(self, turn: int) -> np.ndarray:
        """The order of the routes in one turn."""
        return np.random.default_rng([*self.seed, 1, turn]).permutation(len(self.routes))

    def _order(self, route: int, epoch: int) -> np.ndarray:
        """The order of one route's pairs in one pass through them."""
        pairs = self.pool.pairs[self.routes[route]]
        return np.random.default_rng([*self.seed, 2, route, epoch]).permutation(len(pairs))

    def __call__(self, number: int) -> tuple[Route, PairedSlice]:
        """The route and the place of the sample of this number."""
        turn, place = divmod(number, len(self.routes))
        choice = int(self.turns(turn)[place])
        route = self.routes[choice]
        pairs = self.pool.pairs[route]
        epoch, turn = divmod(turn, len(pairs))
        return route, pairs[int(self.order(choice, epoch)[turn])]


class PairBatches:
    """
    Batches of a pool.

    Args:
        pool ([`PairPool`]): What is drawn from.
        processor ([`SynerMedGenProcessor`]), config ([`SynerMedGenConfig`]): Of the model.
        batch_size (`int`): Samples of one process at a time.
        accumulation (`int`, defaults to 1): So many batches in a step; they may be cut into more and smaller ones.
        process, processes (`int`): Which of how many this is; together they make the batches of one.
        dropout ([`Dropout`], *optional*): What is left out.
        logit_mean, logit_std (`float`): Of the logit-normal distribution of timesteps, before they are shifted.
        seed (`list[int]`): Of everything.
    """

    def __init__(
        self,
        pool: PairPool,
        processor,
        config,
        batch_size: int,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
        dropout: Dropout | None = None,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        seed: list[int] | None = None,
    ):
        self.pool, self.processor, self.config = pool, processor, config
        self.batch_size, self.accumulation = batch_size, accumulation
        self.process, self.processes = process, processes
        self.dropout, self.logit_mean, self.logit_std = dropout or Dropout(), logit_mean, logit_std
        self.seed = seed or [0]
        # Batches of a process in a step: more than asked for where that leaves few lengths to sort samples by.
        self.passes = min(max(accumulation, -(-LENGTHS // processes)), batch_size * accumulation)
        self.order = PairOrder(pool, self.seed)
        self.text_block = lru_cache(maxsize=4096)(processor.text_block)

    # 1. Which sample ------------------------------------------------------------------------------------------------

    def draw(self, number: int) -> Sample:
        """The sample of this number, a function of it and the seed."""
        route, pair = self.order(number)
        rng, dropout = np.random.default_rng([*self.seed, 3, number]), self.dropout

        sources = [route.source]
        if rng.random() < dropout.multi_source:
            more = [source for source in pair.sources(route.target) if source != route.source]
            sources += list(rng.permutation(more)[: int(rng.integers(1, 3))])
        blocks, latents, images = [], [], []
        for source in sources:
            slice_number = pair.slices[str(source)]
            latent_grid, vit_grid = self.pool.grids(slice_number)
            for kind, grid, probability, shown in (
                ("latent", latent_grid, dropout.vae, latents),
                ("image", vit_grid, dropout.vit, images),
            ):
                dropped = bool(rng.random() < probability)
                blocks.append(ImageBlock(kind, grid, dropped=dropped))
                if not dropped:
                    shown.append(slice_number)
        without_region = rng.random() < dropout.region
        instruction = pair.instructions[route.source, route.target]
        if without_region or len(sources) > 1:
            instruction = make_instruction(
                [str(source) for source in sources], route.target, None if without_region else route.region or None
            )
        text = self.text_block(instruction)
        blocks.append(type(text)(text.ids, dropped=bool(rng.random() < dropout.text)))
        target = pair.slices[route.target]
        blocks.append(ImageBlock("target", self.pool.grids(target)[0]))
        timestep = 1 / (1 + np.exp(-(self.logit_mean + self.logit_std * rng.standard_normal())))
        shift = self.config.timestep_shift
        timestep = float(shift * timestep / (1 + (shift - 1) * timestep))
        sequence = build_sequence(self.config, blocks)
        return Sample(route, pair, latents, images, target, sequence, timestep, int(rng.integers(2**62)))

    # 2. Which batch -------------------------------------------------------------------------------------------------

    def step(self, step: int) -> list[list[Sample]]:
        """This process's batches of one step, [`PairBatches.passes`] of them; neighbours in length go together."""
        size = self.batch_size * self.accumulation * self.processes
        samples = [self.draw(number) for number in range(step * size, (step + 1) * size)]
        samples.sort(key=lambda sample: sample.tokens)
        batches = cut([sample.tokens for sample in samples], self.passes * self.processes, self.batch_size)
        return [samples[first:last] for first, last in batches[self.process :: self.processes]]

    # 3. What the model takes ----------------------------------------------------------------------------------------

    def collate(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """What `forward` takes, `velocity_labels` included."""
        patch, encoder = self.config.latent_patch_size, self.pool.encoder
        latents, latent_grids, timesteps, pixels, vit_grids, wanted = [], [], [], [], [], []
        for sample in samples:
            generator = torch.Generator().manual_seed(sample.seed)
            for number in sample.latents:
                latents.append(self.pool[number].sample(generator, encoder.shift, encoder.scale, patch))
                latent_grids.append(self.pool.grids(number)[0])
                timesteps.append(0.0)
            for number in sample.images:
                pixels.append(self.pool[number].vit_patches())
                vit_grids.append(self.pool.grids(number)[1])
            clean = self.pool[sample.target].sample(generator, encoder.shift, encoder.scale, patch)
            noise = torch.randn(clean.shape, generator=generator)
            latents.append((1 - sample.timestep) * clean + sample.timestep * noise)
            latent_grids.append(self.pool.grids(sample.target)[0])
            timesteps.append(sample.timestep)
            wanted.append(noise - clean)
        batch = pad_sequences(self.config, [sample.sequence for sample in samples])
        del batch["labels"]  # no answer is learned here
        batch |= {
            "latents": torch.cat(latents),
            "latent_grid_hw": torch.tensor(latent_grids),
            "timestep": torch.tensor(timesteps),
            "velocity_labels": torch.cat(wanted),
        }
        if pixels:
            batch |= {"pixel_values": torch.cat(pixels), "image_grid_hw": torch.tensor(vit_grids)}
        return batch

    @property
    def fingerprint(self) -> str:
        return self.pool.fingerprint

    def state_dict(self) -> dict:
        """What a checkpoint must hold: nothing beside the step, and the data by which a change is noticed."""
        return {"data": self.fingerprint}

    def load_state_dict(self, state: dict):
        """Nothing is to be done: a sample is a function of its number."""


def cut(tokens: list[tuple[int, int]], count: int, largest: int) -> list[tuple[int, int]]:
    """
    Cut a sorted list of samples into batches so that the fewest slots are padding.

    Args:
        tokens (`list[tuple[int, int]]`): Of each sample and each expert.
        count (`int`): Batches, none of them empty.
        largest (`int`): Samples in a batch at most.

    Returns:
        `list[tuple[int, int]]`: First and last (excluded) of each batch.
    """
    # best[j]: slots of the first j samples in so many batches; size[k][j]: samples in the last of k + 1 batches.
    generation, understanding = np.array(tokens, float).T
    length = len(tokens)
    costs, longest = [], [np.zeros(length)] * 2
    for size in range(1, min(largest, length) + 1):
        ends = slice(size - 1, length)
        longest = [
            np.maximum(own[: length - size + 1], one[ends])
            for own, one in zip(longest, (generation, understanding), strict=True)
        ]
        costs.append(size * (longest[0] + longest[1]))
    best, sizes = np.where(np.arange(length + 1) == 0, 0.0, np.inf), []
    for _ in range(count):
        options = np.full((len(costs), length + 1), np.inf)
        for size, cost in enumerate(costs, start=1):
            options[size - 1, size:] = best[:-size] + cost
        best = options.min(axis=0)
        sizes.append(options.argmin(axis=0) + 1)
    batches, last = [], length
    for chosen in reversed(sizes):
        batches.append((last - int(chosen[last]), last))
        last = batches[-1][0]
    return batches[::-1]


def padding(samples: list[Sample]) -> tuple[int, int]:
    """Slots of a batch that hold a token, and all slots: each expert's tokens are padded to its own longest row."""
    tokens = np.array([sample.tokens for sample in samples])
    return int(tokens.sum()), int(tokens.max(axis=0).sum() * len(samples))


class StreamedBatches:
    """
    Batches of a stream, which is read pool by pool: so many pairs are read and encoded, drawn from, and let go.

    The stream is repeated without end, so processes whose shares differ in length never wait for each other. Each reads
    shards of its own where there are enough. A checkpoint holds the state of the stream at the start of the pool.

    Args:
        dataset (`IterableDataset`): Rows of the `pairs` configuration.
        make_pool: Called as `make_pool(rows)`, gives a [`PairPool`].
        make_batches: Called as `make_batches(pool, seed)`, gives [`PairBatches`] of one process.
        pool_size (`int`): Pairs in a pool.
        steps (`int`): Steps that a pool lasts.
        process, processes (`int`): Which of how many this is.
        seed (`int`): Of everything.

    Raises:
        `ValueError`: A column is missing.
    """

    def __init__(self, dataset: IterableDataset, make_pool, make_batches, pool_size, steps, process, processes, seed):
        _check_columns(dataset)
        self.shards = dataset.num_shards
        if processes > 1 and dataset.num_shards >= processes:
            dataset = dataset.shard(num_shards=processes, index=process)
        for column in ("source_image", "target_image"):
            dataset = dataset.cast_column(column, Image(decode=False))
        self.dataset = dataset.repeat(None)
        self.make_pool, self.make_batches, self.pool_size, self.steps = make_pool, make_batches, pool_size, steps
        self.process, self.seed = process, seed
        self.number, self.rows, self.start, self.batches = -1, None, None, None

    def step(self, step: int) -> list[list[Sample]]:
        """As [`PairBatches.step`]; steps must come in order."""
        while self.number < step // self.steps:
            self._read()
        return self.batches.step(step % self.steps)

    def _read(self):
        if self.rows is None:
            self.rows = iter(self.dataset)
        self.start = self.dataset.state_dict()
        rows = list(islice(self.rows, self.pool_size))
        self.number += 1
        self.batches = self.make_batches(self.make_pool(rows), [self.seed, self.process, self.number])

    def collate(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """As [`PairBatches.collate`]."""
        return self.batches.collate(samples)

    @property
    def fingerprint(self) -> str:
        """Of the pool that is drawn from, and of the number of shards: the rest of a stream is not known."""
        return f"{self.batches.fingerprint}/{self.shards}"

    @property
    def pool(self) -> PairPool:
        return self.batches.pool

    @property
    def passes(self) -> int:
        return self.batches.passes

    def state_dict(self) -> dict:
        return {"data": self.fingerprint, "stream": self.start, "pool": self.number}

    def load_state_dict(self, state: dict):
        """Go back to the pool that was drawn from."""
        self.dataset.load_state_dict(state["stream"])
        self.number, self.rows = state["pool"] - 1, None
        self._read()
        self.start = state["stream"]  # a stream that was loaded says where it is only once it has been read from


__all__ = [
    "Dropout",
    "PairBatches",
    "PairOrder",
    "PairPool",
    "PairedSlice",
    "Sample",
    "StreamedBatches",
    "padding",
    "phantom_rows",
]
