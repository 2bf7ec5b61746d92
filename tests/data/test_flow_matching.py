"""From rows of pairs to batches: which sample comes when, what is left out, how little is padding."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from synermedgen_hf.data.flow_matching import Dropout, PairBatches, PairPool, StreamedBatches, cut, padding
from synermedgen_hf.data.latents import SliceEncoder
from synermedgen_hf.data.pairs import PAIR_FEATURES, pair_rows
from synermedgen_hf.data.sources import CaseRecord, LoadedCase, measure_windows
from synermedgen_hf.modeling_synermedgen import read_layout, split_experts
from synermedgen_hf.processing_synermedgen import ImageBlock, build_sequence, make_instruction

NOTHING = Dropout(0, 0, 0, 0, 0)


def case(number, modalities=("MRI", "CT"), region="brain", size=32, slices=3):
    rng = np.random.default_rng(number)
    images = {name: rng.uniform(1, 900, (slices, size, size)).astype(np.float32) for name in modalities}
    record = CaseRecord("set", f"case{number}", f"case{number}", region, "axial", dict.fromkeys(modalities, ""))
    mask = np.ones((slices, size, size), bool)
    return LoadedCase(record, images, mask, None, (1.0, 1.0, 1.0), measure_windows(images), np.arange(slices))


def rows_of(*cases):
    return [row for one in cases for _, row in pair_rows(one)]


@pytest.fixture
def encoder(make_vae, processor):
    torch.manual_seed(0)
    return SliceEncoder(make_vae().requires_grad_(False), processor.image_processor)


@pytest.fixture
def rows():
    return rows_of(case(0), case(1), case(2, ("T1", "T2", "FLAIR"), slices=2), case(3, region="pelvis", slices=1))


@pytest.fixture
def batches(rows, encoder, processor, config):
    def batches(batch_size=4, own_rows=None, **options):
        pool = PairPool(rows if own_rows is None else own_rows, encoder)
        return PairBatches(pool, processor, config, batch_size, **options)

    return batches


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_slice_that_several_rows_show_is_in_the_pool_once(rows, encoder):
    pool = PairPool(rows, encoder)
    assert len(pool) == len(rows) == 6 + 6 + 12 + 2
    assert len(pool.stored) == 6 + 6 + 6 + 2
    assert {route.name: len(pairs) for route, pairs in pool.pairs.items()}["brain/T1-FLAIR"] == 2


def test_a_data_set_on_disk_and_rows_in_memory_are_the_same_pool(rows, encoder, batches):
    dataset = Dataset.from_list(rows, features=PAIR_FEATURES)
    one, other = batches(), batches(own_rows=dataset)
    assert one.fingerprint == other.fingerprint
    assert same(one.collate(one.step(0)[0]), other.collate(other.step(0)[0]))


def test_other_data_have_another_fingerprint(rows, encoder):
    prints = [PairPool(own, encoder).fingerprint for own in (rows, rows[:-1], rows_of(case(0)), rows_of(case(9)))]
    assert len(set(prints)) == 4 and PairPool(rows, encoder).fingerprint == prints[0]


def test_a_volume_that_was_replaced_is_noticed_among_many(encoder):
    """A CT that was registered anew has the same name, slices and window as before."""
    before = rows_of(*(case(number) for number in range(40)))
    after = [dict(row) for row in before]
    replaced = {row["slice_index"]: row for row in rows_of(case(99)) if row["target_modality"] == "CT"}
    for row in after:
        for side in ("source", "target"):
            if row["case_id"] == "case17" and row[f"{side}_modality"] == "CT":
                row[f"{side}_image"] = replaced[row["slice_index"]]["target_image"]
    assert PairPool(after, encoder).fingerprint != PairPool(before, encoder).fingerprint


def test_every_route_comes_equally_often_and_every_pair_once_before_any_again(batches):
    own = batches()
    routes = own.order.routes
    samples = [own.draw(number) for number in range(6 * len(routes))]
    assert set(Counter(sample.route for sample in samples).values()) == {6}
    mine = [sample.pair for sample in samples if sample.route.name == "brain/MRI-CT"]
    assert len({id(pair) for pair in mine}) == 6
    assert [sample.route for sample in samples[: len(routes)]] != routes  # in another order each time


def test_a_sample_is_a_function_of_its_number_alone(batches):
    one, other = batches(), batches()
    wanted = [one.draw(number) for number in range(5)]
    for number in (4, 0, 2):
        assert same(one.collate([wanted[number]]), other.collate([other.draw(number)]))
    assert not same(one.collate([wanted[0]]), batches(seed=[1]).collate([batches(seed=[1]).draw(0)]))


def numbers(samples):
    return sorted(sample.seed for sample in samples)


@pytest.mark.parametrize("processes, accumulation", [(1, 3), (2, 1), (4, 1), (2, 3)])
def test_however_the_work_is_shared_a_step_has_the_same_samples(batches, processes, accumulation):
    whole = batches(12)
    for step in (0, 1, 7):
        parts = [
            batches(12 // processes // accumulation, accumulation=accumulation, processes=processes, process=process)
            for process in range(processes)
        ]
        shares = [own.step(step) for own in parts]
        assert len({len(share) for share in shares}) == 1 and all(batch for share in shares for batch in share)
        assert max(len(batch) for share in shares for batch in share) <= 12 // processes // accumulation
        together = [sample for share in shares for batch in share for sample in batch]
        assert numbers(together) == numbers(sample for batch in whole.step(step) for sample in batch)


def test_little_is_padding(batches, rows):
    own = batches(32, own_rows=[*rows, *rows_of(case(7, size=64), case(8, size=64))])
    slots = np.array([padding(batch) for step in range(8) for batch in own.step(step)]).sum(axis=0)
    assert 1 - slots[0] / slots[1] < 0.1
    one_batch = np.array([padding([sample for batch in own.step(step) for sample in batch]) for step in range(8)])
    assert 1 - one_batch.sum(axis=0)[0] / one_batch.sum(axis=0)[1] > 0.2


def test_padding_counts_what_the_model_computes(batches):
    own = batches()
    samples = [own.draw(number) for number in range(8)]
    assert len({sample.tokens[0] for sample in samples}) > 1  # else latents would be dropped from none, or all
    batch = own.collate(samples)
    used, slots = padding(samples)
    valid = batch["attention_mask"] != 0
    is_latent = read_layout(own.config, batch["input_ids"], valid).is_latent
    und_index, und_used, gen_index, gen_used = split_experts(is_latent, valid)
    assert used == int(valid.sum()) == int(und_used.sum() + gen_used.sum())
    assert slots == und_index.numel() + gen_index.numel() > used


def brute_force(tokens, count, largest):
    if count == 0:
        return 0 if not tokens else float("inf")
    return min(
        (
            size * (max(a for a, _ in tokens[:size]) + max(b for _, b in tokens[:size]))
            + brute_force(tokens[size:], count - 1, largest)
            for size in range(1, min(largest, len(tokens)) + 1)
        ),
        default=float("inf"),
    )


@pytest.mark.parametrize("count, largest", [(1, 8), (3, 8), (4, 2), (8, 8), (3, 4)])
def test_batches_are_cut_where_least_is_padded(count, largest):
    rng = np.random.default_rng(count)
    tokens = sorted((int(rng.integers(1, 4)) * 64, int(rng.integers(20, 90))) for _ in range(8))
    batches = cut(tokens, count, largest)
    assert len(batches) == count and batches[0][0] == 0 and batches[-1][1] == 8
    assert all(last == first for (_, last), (first, _) in zip(batches, batches[1:], strict=False))
    parts = [tokens[first:last] for first, last in batches]
    slots = sum(len(part) * (max(a for a, _ in part) + max(b for _, b in part)) for part in parts)
    assert slots == brute_force(tokens, count, largest)


def test_a_sample_is_laid_out_source_instruction_target(batches, processor, config):
    own = batches(dropout=NOTHING)
    sample = own.draw(0)
    assert sample.sequence.kinds == ["latent", "image", "text", "target"]
    text = processor.text_block(make_instruction(sample.route.source, sample.route.target, sample.route.region))
    latent_grid, vit_grid = own.pool.grids(sample.target)
    blocks = [ImageBlock("latent", latent_grid), ImageBlock("image", vit_grid), text, ImageBlock("target", latent_grid)]
    assert sample.sequence == build_sequence(config, blocks)


@pytest.mark.parametrize(
    "dropped, kinds, text_starts",
    [
        ({"vae": 1}, ["image", "text", "target"], 2),
        ({"vit": 1}, ["latent", "text", "target"], 2),
        ({"vae": 1, "vit": 1}, ["text", "target"], 2),
        ({"text": 1}, ["latent", "image", "target"], None),
    ],
)
def test_a_dropped_image_keeps_its_position_and_a_dropped_text_does_not(batches, dropped, kinds, text_starts):
    own = batches(dropout=Dropout(**{"text": 0, "vae": 0, "vit": 0, "region": 0, "multi_source": 0} | dropped))
    sequence = own.draw(0).sequence
    assert sequence.kinds == kinds
    if text_starts is None:
        assert sequence.position_ids[-1] == 2
    else:
        assert sequence.position_ids[sequence.input_ids.index(own.config.bos_token_id)] == text_starts


def test_each_is_dropped_as_often_as_asked_for(batches):
    own = batches(dropout=Dropout(0.1, 0.3, 0.5, 0, 0))
    kinds = [own.draw(number).sequence.kinds for number in range(600)]
    share = {kind: 1 - sum(kind in own for own in kinds) / len(kinds) for kind in ("text", "latent", "image", "target")}
    assert share == pytest.approx({"text": 0.1, "latent": 0.3, "image": 0.5, "target": 0}, abs=0.05)


def holds(sample, processor, text):
    """Whether a sample asks for its target in these words."""
    start = sum(sample.sequence.lengths[: sample.sequence.kinds.index("text")])
    ids = processor.text_block(text).ids
    return sample.sequence.input_ids[start + 1 : start + 1 + len(ids)] == ids


def test_the_region_is_left_out_of_the_words(batches, processor):
    sample = batches(dropout=Dropout(0, 0, 0, 1, 0)).draw(0)
    assert holds(sample, processor, make_instruction(sample.route.source, sample.route.target))


def test_several_sources_are_of_one_place_and_named(batches, processor):
    own = batches(dropout=Dropout(0, 0, 0, 0, 1))
    several = [sample for sample in map(own.draw, range(40)) if len(sample.latents) > 1]
    assert several and all(sample.route.target in ("T1", "T2", "FLAIR") for sample in several)
    for sample in several:
        assert len(set(sample.latents)) == len(sample.latents) == len(sample.images) <= 3
        assert sample.target not in sample.latents
        assert set(sample.latents) <= set(sample.pair.slices.values())
        modalities = {number: name for name, number in sample.pair.slices.items()}
        named = [modalities[number] for number in sample.latents]
        assert holds(sample, processor, make_instruction(named, sample.route.target, "brain"))
    alone = [sample for sample in map(own.draw, range(40)) if sample.route.target == "CT"]
    assert alone and all(len(sample.latents) == 1 for sample in alone)


def test_timesteps_are_logit_normal_then_shifted(batches, config):
    own = batches(logit_mean=0.5, logit_std=0.7)
    timesteps = torch.tensor([own.draw(number).timestep for number in range(800)], dtype=torch.float64)
    shift = config.timestep_shift
    normal = torch.logit(timesteps / (shift - (shift - 1) * timesteps))
    assert float(normal.mean()) == pytest.approx(0.5, abs=0.08) and float(normal.std()) == pytest.approx(0.7, abs=0.06)
    assert len(set(timesteps.tolist())) == 800  # on no grid


def test_the_target_is_noised_and_its_velocity_is_noise_minus_data(batches, encoder):
    own = batches(dropout=NOTHING)
    sample = own.draw(3)
    batch = own.collate([sample])
    tokens = sample.target_tokens
    noised, velocity, t = batch["latents"][-tokens:], batch["velocity_labels"], sample.timestep
    assert batch["timestep"].tolist() == pytest.approx([0.0, t])
    clean = noised - t * velocity
    mean = own.pool[sample.target].mean.float()
    assert float(clean.mean()) == pytest.approx(float((mean.mean() - encoder.shift) * encoder.scale), abs=0.1)
    assert float((clean + velocity).std()) == pytest.approx(1, abs=0.3)  # the noise


def test_the_model_takes_a_batch(batches, model):
    own = batches(8)
    for batch in own.step(0):
        assert torch.isfinite(model(**own.collate(batch)).loss)


def test_rows_that_name_no_modality_are_counted_and_no_pair_at_all_is_refused(rows, encoder):
    unnamed = [{**row, "source_modality": ""} for row in rows[:5]]
    assert PairPool([*unnamed, *rows[5:]], encoder).unnamed == 5
    with pytest.raises(ValueError, match=r"no pair to train on \(5 rows do not name source and target\)"):
        PairPool(unnamed, encoder)


def test_slices_that_do_not_know_their_place_are_no_neighbours(encoder):
    rows = [{**row, "slice_index": -1} for row in rows_of(case(0, ("T1", "T2", "FLAIR"), slices=1))]
    pool = PairPool(rows, encoder)
    assert all(pair.sources(route.target) == [route.source] for route, pairs in pool.pairs.items() for pair in pairs)


def test_pairs_of_different_sizes_name_the_case(encoder):
    small, large = rows_of(case(0))[0], rows_of(case(0, size=64))[0]
    with pytest.raises(ValueError, match=r"set/case0.*have different sizes, \(\d+, \d+\) and \(64, 64\)"):
        PairPool([{**small, "target_image": large["target_image"]}], encoder)
    # Where slices are all that is wanted, as for an autoencoder, pairs need not match.
    assert len(PairPool([{**small, "target_image": large["target_image"]}], None).stored) == 2


def test_a_missing_column_is_named(rows, encoder):
    with pytest.raises(ValueError, match="no column region"):
        PairPool(Dataset.from_list(rows, features=PAIR_FEATURES).remove_columns("region"), encoder)
    stream = Dataset.from_list(rows, features=PAIR_FEATURES).remove_columns("target_image").to_iterable_dataset()
    with pytest.raises(ValueError, match="no column target_image"):
        StreamedBatches(stream, None, None, 5, 2, 0, 1, 0)


@pytest.fixture
def streamed(rows, encoder, processor, config):
    def streamed(process=0, processes=1, shards=3):
        def generate(shards):
            for shard in shards:
                yield from rows[shard::3]

        stream = IterableDataset.from_generator(
            generate, features=PAIR_FEATURES, gen_kwargs={"shards": list(range(shards))}
        )
        return StreamedBatches(
            stream,
            lambda own: PairPool(own, encoder),
            lambda pool, seed: PairBatches(pool, processor, config, 2, seed=seed),
            pool_size=5,
            steps=2,
            process=process,
            processes=processes,
            seed=0,
        )

    return streamed


def seeds(batches, steps):
    return [numbers(sample for batch in batches.step(step) for sample in batch) for step in steps]


@pytest.mark.parametrize("stops", [(1,), (3,), (3, 4), (3, 5), (2, 4), (17,)])
def test_a_stream_goes_on_where_it_was_however_often_it_is_stopped(streamed, stops):
    whole = streamed()
    wanted = [[whole.collate(batch) for batch in whole.step(step)] for step in range(20)]
    state, first = None, 0
    for stop in (*stops, 20):
        own = streamed()
        if state:
            own.load_state_dict(state)
        for step in range(first, stop):
            made = [own.collate(batch) for batch in own.step(step)]
            assert len(made) == len(wanted[step]) and all(map(same, made, wanted[step]))
        state, first = own.state_dict(), stop


def test_processes_read_different_shares_of_a_stream_without_end(streamed):
    """26 rows; nine of one process, and a pool of five is read 30 times."""
    shares = [seeds(streamed(process, 2), range(60)) for process in range(2)]
    assert all(len(share) == 60 for share in shares) and not set(map(tuple, shares[0])) & set(map(tuple, shares[1]))
    assert seeds(streamed(0, 2, shards=1), [0]) != seeds(streamed(1, 2, shards=1), [0])


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_probabilities_are_checked(value):
    with pytest.raises(ValueError, match=r"probability of vit must be within \[0, 1\]"):
        Dropout(vit=value)
