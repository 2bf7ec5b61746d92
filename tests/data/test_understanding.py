"""Tasks made from pairs: what every row holds, what may be asked of a case, and that no answer can be guessed."""

import pickle
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest

from synermedgen_hf import MODALITIES, ROUTES
from synermedgen_hf.data.phantom import PROTOCOLS, simulate_case
from synermedgen_hf.data.sources import CaseRecord, LoadedCase
from synermedgen_hf.data.understanding import (
    NAMED_SEQUENCES,
    TaskSampler,
    parse_answer,
    parse_listing,
    parse_modality,
    wrong_pairs,
)
from synermedgen_hf.data.wordings import STAYS, STAYS_OF_REGION, describe
from synermedgen_hf.image_processing_synermedgen import to_display
from synermedgen_hf.processing_synermedgen import MODALITY_NAMES, MODALITY_QUESTION

WINDOWS = {"CT": (-1024, 3071), "CBCT": (-1024, 3071), "PET": (0, 20)}


def made_case(modalities, slices=24, between_mm=5.0, region="brain", name="made", size=(6, 8), **changes):
    """A case of noise, for what does not depend on the pictures."""
    rng = np.random.default_rng(len(name))
    record = CaseRecord(
        dataset="made", case_id=name, patient_id=f"p-{name}", region=region, axis="axial", files={}, mask=None
    )
    images = {modality: rng.random((slices, *size), dtype=np.float32) for modality in modalities}
    case = LoadedCase(
        record=record,
        images=images,
        mask=None,
        lesion=None,
        spacing=(between_mm, 1.0, 1.0),
        windows={modality: {"low": 0.0, "high": 1.0} for modality in modalities},
        usable=np.arange(slices),
    )
    return replace(case, **changes)


class Table:
    """Cases by number, counting how often each is read."""

    def __init__(self, *cases):
        self.cases, self.reads = cases, []

    def __call__(self, number):
        self.reads.append(number)
        return self.cases[number % len(self.cases)]


@pytest.fixture(scope="module")
def phantoms():
    """Ten simulated patients of each protocol, in turns; tiny, and ten names for one anatomy."""
    made = []
    for region, protocol in PROTOCOLS:
        case = simulate_case(region, protocol, seed=0, num_slices=16, size=32)
        record = CaseRecord(
            dataset=f"phantom-{protocol}", case_id="", patient_id="", region=region, axis=case.axis, files={}
        )
        windows = {
            name: dict(zip(("low", "high"), WINDOWS.get(name, (0, np.percentile(volume, 99.5))), strict=True))
            for name, volume in case.images.items()
        }
        loaded = LoadedCase(record, case.images, case.mask, case.lesion, case.spacing, windows, np.arange(16))
        made.append([replace(loaded, record=replace(record, case_id=f"{region}-{i}")) for i in range(10)])
    return [case for turn in zip(*made, strict=True) for case in turn]


@pytest.fixture(scope="module")
def sampler(phantoms):
    return TaskSampler(len(phantoms), Table(*phantoms), seed=3, neighbours=4)


@pytest.fixture(scope="module")
def rows(phantoms):
    """2,400 rows of each of the three tasks."""
    sampler = TaskSampler(
        len(phantoms),
        Table(*phantoms),
        mix=dict.fromkeys(("CTS", "TIA", "MI"), 1.0),
        per_case=180,
        name_share=0,
        neighbours=6,
        seed=1,
    )
    return [sampler[index] for index in range(len(sampler))]


def frozen(row):
    """A row as something that can be compared."""
    if row is None:
        return None
    return {**row, "images": [(picture.size, picture.tobytes()) for picture in row["images"]]}


def of_task(rows, task):
    return [row for row in rows if row["task"] == task]


def offsets(row):
    return [int(meaning) for meaning in row["meanings"]]


def option_texts(row):
    return re.findall(r"^[A-Z]\. (.*)$", row["question"], re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def test_a_row_is_ready_for_the_chat_template(sampler, phantoms, processor):
    for index in range(0, 4 * sampler.per_case, 3):
        row, case = sampler[index], phantoms[index // sampler.per_case]
        user, assistant = row["messages"]
        assert [part["type"] for part in user["content"]] == ["image"] * len(row["images"]) + ["text"]
        assert user["content"][-1]["text"] == row["question"]
        assert assistant["content"] == [{"type": "text", "text": row["answer"]}]
        assert row["options"].count(row["answer"]) == 1 and len(row["meanings"]) == len(row["options"])
        assert row["index"] == index and row["task"] in ("CTS", "TIA", "MI")
        assert row["difficulty"] in ("hard", "easy")
        if row["task"] != "MI":
            assert (row["case_id"], row["region"]) == (case.record.case_id, case.record.region)
        said = processor.apply_chat_template(row["messages"], tokenize=False)
        image, start, end = "<|image_pad|>", "<|im_start|>", "<|im_end|>"
        assert said == f"{image * len(row['images'])}{start}{row['question']}{end}{start}{row['answer']}{end}"


def test_pictures_are_the_slices_over_the_windows_of_their_volumes(sampler, phantoms):
    seen = Counter()
    for index in range(6 * sampler.per_case):
        row, case = sampler[index], phantoms[index // sampler.per_case]
        if row["task"] == "MI":
            continue
        source, target = row["route"].split("/")[1].split("-")
        places = [(source, row["slice_index"]), (target, row["slice_index"])]
        if row["task"] == "CTS":
            places = [places[0], *((target, row["slice_index"] + offset) for offset in offsets(row))]
        for picture, (name, place) in zip(row["images"], places, strict=True):
            assert picture.mode == "L"
            assert picture.tobytes() == to_display(case.images[name][place], case.windows[name]).tobytes()
        seen[row["task"]] += 1
    assert min(seen["CTS"], seen["TIA"]) > 40


def test_an_instance_depends_on_table_seed_and_index_alone(phantoms):
    def fresh(seed=5):
        return TaskSampler(8, Table(*phantoms), seed=seed, per_case=12, difficulty="mixed", listing_share=0.2)

    in_order = [frozen(row) for row in fresh()]
    assert len(in_order) == 96
    shuffled = np.random.default_rng(0).permutation(96)
    other = fresh()
    assert all(frozen(other[index]) == in_order[index] for index in shuffled)
    # From the middle, as a resumed run; on another worker, to which the sampler travels.
    late = fresh()
    assert [frozen(late[index]) for index in range(50, 96)] == in_order[50:]
    travelled = pickle.loads(pickle.dumps(late))
    assert [frozen(travelled[index]) for index in range(96)] == in_order
    assert [frozen(row) for row in fresh(seed=6)] != in_order
    with pytest.raises(IndexError):
        other[96]


def test_each_case_is_read_once(phantoms):
    table = Table(*phantoms)
    for _ in TaskSampler(10, table, per_case=16):
        pass
    # Panels of the last case may come from the first.
    assert table.reads[:10] == list(range(10)) and table.reads[10:] in ([], [0])


# ---------------------------------------------------------------------------------------------------------------------
# Mix and letters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_case", [32, 7, 1])
def test_the_mix_is_exact(per_case):
    sampler = TaskSampler(4000 // per_case + 1, Table(), per_case=per_case)
    kinds = [sampler.plan(index)[0] for index in range(4000)]
    for task, share in (("CTS", 0.468), ("TIA", 0.381), ("MI", 0.150)):
        assert kinds.count(task) == pytest.approx(4000 * share / 0.999, abs=4)
        if per_case == 32:
            first = kinds[:32].count(task)
            assert first == pytest.approx(32 * share, abs=1.5)
    # Which one comes when says nothing: the order of each block is its own.
    assert kinds[:32] != kinds[32:64]


def test_subsets_of_the_tasks_and_other_shares():
    def shares(**options):
        sampler = TaskSampler(50, Table(), **options)
        counts = Counter(sampler.plan(index)[:2] for index in range(len(sampler)))
        return {kind: round(count / len(sampler), 2) for kind, count in counts.items()}

    assert shares(tasks=["CTS"]) == {("CTS", "hard"): 1}
    assert shares(tasks=["CTS"], difficulty="easy") == {("CTS", "easy"): 1}
    assert shares(tasks=["CTS"], difficulty="mixed") == {("CTS", "hard"): 0.5, ("CTS", "easy"): 0.5}
    assert shares(tasks=["CTS", "TIA"], mix={"CTS": 3, "TIA": 1}) == {("CTS", "hard"): 0.75, ("TIA", "hard"): 0.25}
    assert shares(tasks=["MI"], name_share=0.3, listing_share=0.2) == {
        ("MI", "panel"): 0.5,
        ("MI", "name"): 0.3,
        ("MI", "listing"): 0.2,
    }


def test_images_can_be_labelled_and_nothing_else_changes():
    def draw(**options):
        cases = [made_case(["T1", "T1CE", "T2", "FLAIR"], name=name) for name in ("one", "two")]
        return [row for row in TaskSampler(2, Table(*cases), per_case=40, seed=5, listing_share=0.2, **options)]

    said = set()
    for plain, labelled in zip(draw(), draw(label_images=True), strict=True):
        content, question = labelled["messages"][0]["content"], {"type": "text", "text": plain["question"]}
        labels = [part["text"] for part in content if part["type"] == "text"][:-1]
        assert content[-1] == question
        assert [part["type"] for part in content[:-1]] == ["text", "image"] * len(labels) or len(plain["images"]) == 1
        said.add((plain["task"], len(plain["images"]), "".join(labels)))
        labelled["messages"][0]["content"] = [{"type": "image"} for _ in plain["images"]] + [question]
        assert frozen(labelled) == frozen(plain)
    assert said == {("CTS", 5, "1ABCD"), ("TIA", 2, "12"), ("MI", 4, "ABCD"), ("MI", 1, "")}


def test_letters_are_dealt_evenly(rows):
    for task in ("CTS", "TIA", "MI"):
        by_size = {}
        for row in of_task(rows, task):
            by_size.setdefault(len(row["options"]), Counter())[row["answer"]] += 1
        for size, letters in by_size.items():
            assert len(letters) == size
            # Panels are as many as the cases allow, so their decks are not dealt to the end.
            spread = max(letters.values()) - min(letters.values())
            assert spread <= (1 if task != "MI" else 4 * np.sqrt(letters.total() / size))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ["CTS", "XYZ"]}, "XYZ"),
        ({"tasks": []}, "none"),
        ({"mix": {"CTS": -1.0}}, "mix"),
        ({"mix": {"VQA": 1.0}}, "mix"),
        ({"per_case": 0}, "per_case"),
        ({"min_gap_mm": 0.0}, "min_gap_mm"),
        ({"candidates": 1}, "candidates"),
        ({"descriptions": 7}, "descriptions"),
        ({"panels": 9}, "panels"),
        ({"difficulty": "random"}, "difficulty"),
        ({"name_share": 0.7, "listing_share": 0.5}, "name_share"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TaskSampler(1, Table(), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Selecting the target
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between_mm", [0.5, 1.0, 2.0, 3.0, 4.0, 7.5])
def test_candidates_keep_their_distance_and_stay_near(between_mm):
    case = made_case(["MRI", "CT"], slices=160, between_mm=between_mm)
    sampler = TaskSampler(1, Table(case), tasks=["CTS"], per_case=150)
    spans = set()
    for row in sampler:
        assert row["difficulty"] == "hard" and len(row["images"]) == 5
        assert offsets(row)["ABCD".index(row["answer"])] == 0
        distances = [abs(one - other) for one, other in combinations(offsets(row), 2)]
        assert min(distances) * between_mm >= 4.0
        spans.add(max(distances))
    # Eight slices, or as few more as four candidates 4 mm apart need.
    assert max(spans) <= max(8, 3 * np.ceil(4 / between_mm))


def test_easy_candidates_are_far_apart_or_as_far_as_the_volume_allows():
    def smallest(slices):
        case = made_case(["MRI", "CT"], slices=slices, between_mm=2.0)
        sampler = TaskSampler(1, Table(case), tasks=["CTS"], difficulty="easy")
        assert all(row["difficulty"] == "easy" for row in sampler)
        return min(abs(one - other) for row in sampler for one, other in combinations(offsets(row), 2))

    assert smallest(60) * 2.0 >= 16
    assert smallest(10) == 3
    assert smallest(7) == 2


def test_only_usable_slices_are_shown():
    usable = np.array([3, 4, 9, 10, 15, 16, 21, 22])
    case = made_case(["MRI", "CT"], between_mm=1.0, usable=usable)
    # Four slices 4 mm apart span 17 of them here: more than eight, so the tightest are taken.
    for row in TaskSampler(1, Table(case), tasks=["CTS", "TIA"], mix={"CTS": 1, "TIA": 1}, neighbours=8):
        shown = {row["slice_index"]}
        if row["task"] == "CTS":
            shown |= {row["slice_index"] + offset for offset in offsets(row)}
            assert max(offsets(row)) - min(offsets(row)) == 17
        assert shown <= set(usable.tolist())


def test_candidates_alone_do_not_tell(rows):
    """The right one is not more often in the middle than at the end, and does not stand apart."""
    selected = of_task(rows, "CTS")
    ranks = Counter(sum(offset < 0 for offset in offsets(row)) for row in selected)
    for rank in range(4):
        assert_at_chance(ranks[rank], len(selected), 0.25)

    def most_apart(row):
        nearest = [min(abs(one - other) for other in offsets(row) if other != one) for one in offsets(row)]
        return nearest[offsets(row).index(0)] == max(nearest), nearest.count(max(nearest))

    clear = [hit for hit, ties in map(most_apart, selected) if ties == 1]
    assert_at_chance(sum(clear), len(clear), 0.25)


# ---------------------------------------------------------------------------------------------------------------------
# Identifying the modality
# ---------------------------------------------------------------------------------------------------------------------


def panels_of(*cases, n_cases=None, **options):
    table = Table(*cases)
    sampler = TaskSampler(n_cases or len(cases), table, tasks=["MI"], **{"name_share": 0, **options})
    return list(sampler), table


def test_panels_are_of_different_modalities_and_slices():
    rows, _ = panels_of(made_case(["T1", "T1CE", "T2", "FLAIR"]), made_case(["CT", "PET"], name="other"), per_case=20)
    brats = rows[:20]
    for row in rows:
        assert len(set(row["meanings"])) == len(row["meanings"])
        asked = row["meanings"][row["options"].index(row["answer"])]
        assert row["route"].endswith(f"/{asked}")
        assert row["question"].count(MODALITY_NAMES[asked].split("-")[0]) >= 1
        assert len({picture.tobytes() for picture in row["images"]}) == len(row["images"])
    assert all(len(row["images"]) == 4 and row["difficulty"] == "hard" for row in brats)


def test_a_case_with_enough_modalities_does_not_read_the_next_one():
    _, table = panels_of(made_case(["T1", "T1CE", "T2", "FLAIR"]), n_cases=2, per_case=8)
    assert table.reads == [0, 1]
    sampler = TaskSampler(2, table := Table(made_case(["T1", "T1CE", "T2", "FLAIR"])), tasks=["MI"], name_share=0)
    assert sampler[0] and table.reads == [0]


def test_panels_are_borrowed_from_the_next_case_and_asked_for_like_the_others():
    first, second = made_case(["CT", "CBCT"], name="one"), made_case(["CT", "PET"], name="other", region="whole-body")
    sampler = TaskSampler(2, Table(first, second), tasks=["MI"], name_share=0, per_case=300)
    rows = [sampler[index] for index in range(300)]
    assert {frozenset(row["meanings"]) for row in rows} == {frozenset({"CT", "CBCT", "PET"})}
    asked = Counter((row["case_id"], row["route"]) for row in rows)
    assert set(asked) == {("one", "brain/CT"), ("one", "brain/CBCT"), ("other", "whole-body/PET")}
    for count in asked.values():
        assert_at_chance(count, 300, 1 / 3)


def test_mri_is_never_beside_a_named_sequence():
    rows, _ = panels_of(made_case(["MRI", "CT"]), made_case(["T1", "T2", "CT"]), made_case(["MRI", "T1", "CT", "PET"]))
    families = set()
    for row in rows:
        named, unnamed = set(row["meanings"]) & NAMED_SEQUENCES, "MRI" in row["meanings"]
        assert not (named and unnamed)
        families.add((bool(named), unnamed))
    assert families == {(True, False), (False, True)}


def test_what_is_easily_confused_is_asked_for_clearly():
    case = made_case(MODALITIES)
    rows, _ = panels_of(case, panels=3, per_case=200)
    for row in rows:
        asked = row["route"].split("/")[1]
        for one, other, words in (
            ("CT", "CBCT", "not cone-beam"),
            ("T1", "T1CE", "without contrast"),
            ("T2", "FLAIR", "bright fluid"),
        ):
            if asked == one:
                assert (words in row["question"]) == (other in row["meanings"])
    # Three of eight at random would hold such a pair in fewer than half of the rows.
    assert sum(row["difficulty"] == "hard" for row in rows) > 0.8 * len(rows)


def test_the_name_form_is_the_pipelines_question():
    rows, _ = panels_of(made_case(["MRI", "CT", "CBCT"]), name_share=1, per_case=30)
    for row in rows:
        assert row["question"] == MODALITY_QUESTION and len(row["images"]) == 1
        # What the case could be asked as well, so that no answer is the usual one.
        assert row["meanings"] == ["MRI", "CT", "CBCT"]
        assert row["options"] == [MODALITY_NAMES[name] for name in row["meanings"]]
        assert row["answer"] == MODALITY_NAMES[row["route"].split("/")[1]]
    assert set(Counter(row["answer"] for row in rows).values()) == {10}


def test_the_listing_form_is_that_of_the_published_data():
    rows, _ = panels_of(made_case(["T1", "T1CE", "T2", "FLAIR"]), name_share=0, listing_share=1)
    for row in rows:
        assert re.fullmatch(r"A: \w+, B: \w+, C: \w+, D: \w+", row["answer"])
        assert len(set(row["options"])) == 4 and parse_answer(row["answer"], row["options"]) == row["answer"]
    assert set(Counter(row["options"].index(row["answer"]) for row in rows).values()) == {8}


# ---------------------------------------------------------------------------------------------------------------------
# Describing the change
# ---------------------------------------------------------------------------------------------------------------------


def test_descriptions_come_with_their_opposites_and_only_one_is_right(rows):
    for row in of_task(rows, "TIA"):
        region, route = row["route"].split("/")
        directions = [tuple(meaning.split("-")) for meaning in row["meanings"]]
        source, target = route.split("-")
        assert row["meanings"].index(route) == "ABCD".index(row["answer"])
        assert len(set(directions)) == 4 and (target, source) in directions
        assert {pair[::-1] for pair in directions} == set(directions)
        texts = option_texts(row)
        assert len(texts) == 4
        for text, direction in zip(texts, directions, strict=True):
            assert text in describe(*direction, region)
        assert len({len(text) for text in texts}) >= 2


@pytest.mark.parametrize(("number", "kinds"), [(2, 1), (3, 2), (6, 3)])
def test_other_numbers_of_descriptions(number, kinds):
    case = made_case(["T1", "T1CE", "T2", "FLAIR"])
    for row in TaskSampler(1, Table(case), tasks=["TIA"], descriptions=number):
        assert len(row["options"]) == len(set(row["meanings"])) == number
        assert len({frozenset(meaning.split("-")) for meaning in row["meanings"]}) == kinds


@pytest.mark.parametrize("region", ["brain", "heart"])
def test_no_wrong_pair_could_be_right(region):
    for source, target in permutations(MODALITIES, 2):
        home, away = wrong_pairs(source, target, region)
        assert home + away
        for pair in home + away:
            assert set(pair) != {source, target}
            assert not ("MRI" in pair and {source, target} & NAMED_SEQUENCES)
            assert not ("MRI" in (source, target) and set(pair) & NAMED_SEQUENCES)


def test_wrong_pairs_are_those_of_the_region_if_it_has_any():
    assert wrong_pairs("MRI", "CT", "brain")[0] == [("CBCT", "CT")]
    assert wrong_pairs("CT", "PET", "whole-body") == ([], [("CT", "MRI"), ("CBCT", "CT")])
    assert len(wrong_pairs("T1", "T2", "brain")[0]) == 5


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_each_route_has_a_pool_of_wordings(route):
    pool = describe(*route[1:], route.region)
    assert len(pool) == len(set(pool)) >= 8
    opening = Counter(" ".join(text.split()[:4]) for text in pool)
    assert max(opening.values()) <= 2  # sentences of their own, not one with other words
    for text in pool:
        said = [stays for stays in STAYS + STAYS_OF_REGION[route.region] if stays in text]
        change = text.replace(said[0], "").strip()
        assert len(said) == 1 and len(change) > 25 and change.endswith(".")
        assert "{" not in text and "  " not in text
        assert len(text) < 300
    for other in ROUTES:
        if other[1:] != route[1:]:
            assert not set(pool) & set(describe(*other[1:], other.region))


def test_any_other_pair_and_region_has_wordings_too():
    everything = {}
    for region in ("heart", "knee", ""):
        for pair in permutations(MODALITIES, 2):
            pool = describe(*pair, region)
            assert len(set(pool)) >= 8
            for text in pool:
                assert everything.setdefault(text, pair) == pair
    # What is said of the brain stays there.
    assert not any("ventricle" in text or "CSF" in text for text in everything)


# ---------------------------------------------------------------------------------------------------------------------
# Guessing
# ---------------------------------------------------------------------------------------------------------------------


def assert_at_chance(hits, n, chance):
    """Within 3.5 standard deviations of a coin with this chance: about 1 in 2,000 by accident, and seeds are fixed."""
    assert n > 100
    assert abs(hits - n * chance) <= 3.5 * np.sqrt(n * chance * (1 - chance)), f"{hits / n:.3f} instead of {chance:.3f}"


def score(rows, guess):
    """Rows that have several options with as many of them; ties among guesses count by their share."""
    hits, expected, spread = 0.0, 0.0, 0.0
    for row in rows:
        guesses = guess(row)
        chance = 1 / len(row["options"])
        hits += (row["options"].index(row["answer"]) in guesses) / len(guesses)
        expected += chance
        spread += chance * (1 - chance)
    assert len(rows) >= 2000
    assert abs(hits - expected) <= 3.5 * np.sqrt(spread), f"{hits / len(rows):.3f}, not {expected / len(rows):.3f}"


def extreme(values, best=max):
    return [place for place, value in enumerate(values) if value == best(values)]


def mentions(text):
    return sum(text.count(name) for name in (*MODALITY_NAMES.values(), *MODALITY_NAMES, "Hounsfield", "SUV"))


@pytest.mark.parametrize("task", ["CTS", "TIA", "MI"])
def test_one_letter_for_all_stays_at_chance(rows, task):
    mine = of_task(rows, task)
    for place in range(2):
        score(mine, lambda row, place=place: [place])
    score(mine, lambda row: [len(row["options"]) - 1])
    often = Counter(row["answer"] for row in mine[: len(mine) // 2]).most_common(1)[0][0]
    score(mine, lambda row: [row["options"].index(often)] if often in row["options"] else [0])


@pytest.mark.parametrize(
    "guess",
    [
        lambda row: extreme([len(text) for text in option_texts(row)]),
        lambda row: extreme([len(text) for text in option_texts(row)], min),
        lambda row: extreme([len(text.split()) for text in option_texts(row)]),
        lambda row: [int(np.argsort([len(text) for text in option_texts(row)])[1])],
        lambda row: extreme([mentions(text) for text in option_texts(row)]),
        lambda row: extreme([text.count(",") for text in option_texts(row)]),
    ],
    ids=["longest", "shortest", "most words", "second shortest", "most modalities", "most commas"],
)
def test_the_form_of_a_description_does_not_tell(rows, guess):
    score(of_task(rows, "TIA"), guess)


def test_the_length_rank_of_the_right_description_is_uniform(rows):
    mine = of_task(rows, "TIA")
    ranks = Counter()
    for row in mine:
        lengths = [len(text) for text in option_texts(row)]
        right = lengths["ABCD".index(row["answer"])]
        assert lengths.count(right) == 1
        ranks[sum(length < right for length in lengths)] += 1
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_knowing_how_often_a_direction_is_right_does_not_help(rows):
    """
    Someone who learns from half of the rows which direction is right how often, without a look at the pictures. Where
    a region has one pair of modalities only (PET and CT), that pair is known and direction is left to see: 50 %.
    """
    mine = of_task(rows, "TIA")

    def learned(rows):
        offered, right = Counter(), Counter()
        for row in rows[::2]:
            offered.update(row["meanings"])
            right[row["meanings"]["ABCD".index(row["answer"])]] += 1
        hits = total = 0
        for row in rows[1::2]:
            guess = max(row["meanings"], key=lambda meaning: right[meaning] / offered[meaning])
            hits += row["meanings"].index(guess) == "ABCD".index(row["answer"])
            total += 1
        return hits, total

    for region in ("brain", "pelvis"):
        for named in (True, False):
            part = [row for row in mine if row["region"] == region and ("T2" in str(row["meanings"])) == named]
            if part:
                assert_at_chance(*learned(part), 0.25)
    assert_at_chance(*learned([row for row in mine if row["region"] == "whole-body"]), 0.5)


def test_the_wording_of_a_question_does_not_tell(rows):
    for task in ("CTS", "MI"):
        mine, by_opening = of_task(rows, task), {}
        for row in mine:
            key = (row["question"][:12], len(row["options"]))
            by_opening.setdefault(key, Counter())[row["options"].index(row["answer"])] += 1
        for (_, options), letters in by_opening.items():
            for place in range(options) if letters.total() > 100 else ():
                assert_at_chance(letters[place], letters.total(), 1 / options)


# ---------------------------------------------------------------------------------------------------------------------
# Cases that cannot serve
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "task", "reason"),
    [
        (made_case(["MRI", "CT"], slices=3), "CTS", "CTS: fewer than 4 slices at least 4 mm apart"),
        (made_case(["MRI", "CT"], slices=12, between_mm=1.0), "CTS", "CTS: fewer than 4 slices at least 4 mm apart"),
        (made_case(["CT"]), "CTS", "CTS: one modality only"),
        (made_case(["CT"]), "TIA", "TIA: one modality only"),
        (made_case(["CT"]), "MI", "MI: fewer than two modalities"),
        (made_case(["MRI", "CT"], usable=np.array([], int)), "TIA", "TIA: no usable slice"),
        (made_case(["MRI", "CT"], usable=np.array([99])), "TIA", "TIA: its images, masks and usable slices do not fit"),
        (made_case(["MRI", "CT"], mask=np.ones((1, 2, 2), bool)), "MI", "do not fit together"),
        (made_case(["MRI", "CT"], windows={}), "TIA", "TIA: an image has no window"),
        (made_case(["MRI", "CT"], spacing=(0.0, 1.0, 1.0)), "CTS", "CTS: the distance of its slices is unknown"),
        (made_case(["ultrasound"]), "MI", "MI: none of its modalities is one of T1, T1CE"),
        (None, "CTS", "CTS: the case could not be read"),
    ],
)
def test_a_case_that_cannot_serve_gives_none_and_a_reason(case, task, reason):
    good = made_case(["T1", "T2"], name="good")
    sampler = TaskSampler(2, Table(good, case), tasks=[task], per_case=4, name_share=0)
    if task == "MI" and case is not None and "CT" in case.images and len(case.images) == 1:
        sampler = TaskSampler(1, Table(case), tasks=[task], per_case=4, name_share=0)
        assert sampler[0] is None and reason in sampler.skipped(0)
        return
    assert [sampler[index] is None for index in range(8)] == [False] * 4 + [True] * 4
    assert sampler.skipped(0) is None and reason in sampler.skipped(4)


def test_a_bad_case_costs_its_own_rows_only(phantoms):
    broken = [None if place == 2 else case for place, case in enumerate(phantoms[:6])]
    whole = TaskSampler(6, Table(*phantoms[:6]), per_case=16)
    holed = TaskSampler(6, Table(*broken), per_case=16)
    for index in range(96):
        if index // 16 == 2:
            assert holed[index] is None
        elif whole[index]["task"] != "MI":  # panels may come from the next case
            assert frozen(holed[index]) == frozen(whole[index])


def test_what_reading_raises_is_passed_on():
    def load(number):
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        TaskSampler(1, load)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The control
# ---------------------------------------------------------------------------------------------------------------------


def test_ordinary_questions_as_a_control():
    lesion = np.zeros((24, 6, 8), bool)
    lesion[4:8, 2, 1] = True  # on the left of the picture
    lesion[12:14, 2, 5:8] = True
    lesion[14:16, 2, 2:7] = True  # on both sides
    case = made_case(["T1", "T2"], lesion=lesion)
    rows = list(TaskSampler(1, Table(case), tasks=["VQA"], per_case=80))
    about = Counter((row["route"], row["answer"]) for row in rows)
    assert about["brain/region", "brain"] == about["brain/plane", "axial"] == 20
    assert abs(about["brain/lesion", "yes"] - about["brain/lesion", "no"]) <= 4
    for row in rows:
        assert len(row["images"]) == 1 and row["answer"] in row["options"]
        if row["route"] == "brain/lesion":
            assert lesion[row["slice_index"]].any() == (row["answer"] == "yes")
        if row["route"] == "brain/side":
            assert row["slice_index"] in (range(4, 8) if row["answer"] == "left" else range(12, 14))
    without = TaskSampler(1, Table(made_case(["T1"])), tasks=["VQA"])
    assert {row["route"] for row in without} == {"brain/region", "brain/plane"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading answers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", "B"),
        (" b.\n", "B"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("a", "A"),
        ("Option B", "B"),
        ("option b", "B"),
        ("Description A", "A"),
        ("Candidate (C) fits best.", "C"),
        ("Image D", "D"),
        ("The answer is D.", "D"),
        ("Answer: b", "B"),
        ("The correct answer is option C, since A has other ventricles.", "C"),
        ("B. The fluid turns bright.", "B"),
        ("C) because of the skull", "C"),
        ("Between B and C, the answer is C.", "C"),
        ("It must be B", "B"),
        ("A CT image", None),
        ("This is a slice of the brain.", None),
        ("I think so", None),
        ("A is correct", "A"),
        ("A matches best.", "A"),
        ("It is A", "A"),
        ("It is A because it fits", "A"),
        ("It's A", "A"),
        ("A\nThe slice lies higher.", "A"),
        ("**A**\n\nbecause it fits", "A"),
        ("A because it fits", "A"),
        ("A - the same outline", "A"),
        ("**A** is correct", "A"),
        ("It is **A**, because it fits", "A"),
        ("A\nB\nC\nD", None),
        ("A - the brain\nB - the pelvis\nC - the knee", None),
        ("A slice of the brain", None),
        ("It is a slice because", None),
        ("A-weighted", None),
        ("D is correct", "D"),
        ("B or C", None),
        ("A or B", None),
        ("A, B", None),
        ("A/B", None),
        ("The answer is A or B", None),
        ("The answer is option B or option C.", None),
        ("The answer is B, C has another outline.", "B"),
        ("A, B, or C", None),
        ("The answer is D, and B is too high.", "D"),
        ("The answer is B and C is wrong", "B"),
        ("Option C or D? It is option C", "C"),
        ("between A and C I pick C", "C"),
        ("Option B, or else option C", None),
        ("E", None),
        ("The answer is F.", None),
        ("", None),
        ("...", None),
        ('["A": "CT", "B": "PET"]', None),
    ],
)
def test_letters_are_read_from_answers(text, option):
    assert parse_answer(text, ["A", "B", "C", "D"]) == option


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        ("CT", "CT"),
        ("ct_FDG", "CT"),
        ("computed tomography", "CT"),
        ("It is a cone-beam CT.", "CBCT"),
        ("CBCT", "CBCT"),
        ("mr", "MRI"),
        ("An MRI", "MRI"),
        ("T2 (MRI)", "T2"),
        ("t2w", "T2"),
        ("T2-weighted MRI", "T2"),
        ("T2-FLAIR", "FLAIR"),
        ("FLAIR MRI", "FLAIR"),
        ("t2f", "FLAIR"),
        ("t1ce", "T1CE"),
        ("T1c", "T1CE"),
        ("T1-Gd", "T1CE"),
        ("contrast-enhanced T1-weighted MRI", "T1CE"),
        ("T1-weighted MRI with contrast", "T1CE"),
        ("post-contrast T1", "T1CE"),
        ("CE-T1", "T1CE"),
        ("Gd-T1", "T1CE"),
        ("T1+Gd", "T1CE"),
        ("T1w CE", "T1CE"),
        ("T1-weighted, contrast-enhanced", "T1CE"),
        ("non-contrast-enhanced T1-weighted MRI", "T1"),
        ("non-enhanced T1", "T1"),
        ("non-Gd T1", "T1"),
        ("pre-Gd T1", "T1"),
        ("no CE T1", "T1"),
        ("not contrast-enhanced T1", "T1"),
        ("unenhanced T1", "T1"),
        ("pre-contrast T1", "T1"),
        ("T1-weighted MRI", "T1"),
        ("T1-weighted MRI (without contrast agent)", "T1"),
        ("t1n", "T1"),
        ("FDG PET", "PET"),
        ("pet_FDG", "PET"),
        ("CT or CBCT", None),
        ("PET/CT", None),
        ("ultrasound", None),
        ("petrous bone, section", None),
    ],
)
def test_modalities_are_read_in_any_spelling(text, modality):
    assert parse_modality(text) == modality
    expected = None if modality is None else MODALITY_NAMES[modality]
    assert parse_answer(text, list(MODALITY_NAMES.values())) == expected


@pytest.mark.parametrize(
    ("text", "modalities"),
    [
        ("A: CT, B: CBCT, C: PET", ["CT", "CBCT", "PET"]),
        ('["A" : "CT", "B" : "CBCT", "C" : "PET", "D": "T2 (MRI)"]', ["CT", "CBCT", "PET", "T2"]),
        ('"A": "CT", "B": "CBCT", "C": "PET", "B": "FLAIR"', ["CT", "CBCT", "PET", "FLAIR"]),
        ("{'A': 'ct', 'B': 'mr'}", ["CT", "MRI"]),
        ("A = T1\nB = T1ce", ["T1", "T1CE"]),
        ("A: CT, B: something", ["CT", None]),
        ('"A": "T1-weighted, contrast-enhanced", "B": "T2"', ["T1CE", "T2"]),
        ('"A": "CT, "B": "PET"', ["CT", "PET"]),
        ("A: CT", None),
        ("Option B", None),
    ],
)
def test_listings_are_read_in_any_form(text, modalities):
    assert parse_listing(text) == modalities


def test_other_options_are_read_by_their_words():
    listings = ["A: CT, B: PET", "A: PET, B: CT"]
    assert parse_answer('["A": "pet", "B": "ct"]', listings) == listings[1]
    assert parse_answer('["A": "pet", "B": "mr"]', listings) is None
    assert parse_answer("Yes, there is.", ["yes", "no"]) == "yes"
    assert parse_answer("No.", ["yes", "no"]) == "no"
    assert parse_answer("yes and no", ["yes", "no"]) is None
    assert parse_answer("the pelvis", ["brain", "pelvis", "whole body"]) == "pelvis"
