"""Understanding tasks made from paired scans: which slice belongs to which, what modality, what a change changes.

- **CTS**, cross-modality target selection: one reference slice, several slices of another modality of the same volume;
  which one is the same slice?
- **MI**, modality identification: one image, or one of several panels.
- **TIA**, transformation awareness: two modalities of one slice and several descriptions; which one is right, in this
  direction?
- **VQA**, a control: ordinary questions on the same images, which synthesis does not need.

No answer can be read off without comparing what is compared. Letters are dealt like cards. The candidates of CTS are
drawn as a set before one of them becomes the right one, so it is not the one in the middle or the one that stands
apart; the same holds for the panels of MI. Descriptions come with those of the opposite direction, and the right one is
as often the shortest as the longest. What cannot be hidden is which modalities there are: where all data of a region is
one pair, such as CT and PET, whoever knows that guesses TIA right half of the time.
"""

import math
import operator
import random
import re
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import permutations
from string import ascii_uppercase

import numpy as np
from PIL import Image

from ..image_processing_synermedgen import to_display
from ..processing_synermedgen import MODALITY_NAMES, MODALITY_QUESTION, REGION_NAMES
from .routes import MODALITIES, ROUTES, Route
from .sources import LoadedCase
from .wordings import (
    CLARIFIED,
    CTS_QUESTIONS,
    LISTING_QUESTIONS,
    MI_QUESTIONS,
    TIA_QUESTIONS,
    VQA_QUESTIONS,
    describe,
    region_name,
)

TASKS = ("CTS", "TIA", "MI", "VQA")
DEFAULT_MIX = {"CTS": 0.468, "TIA": 0.381, "MI": 0.150}  # of the published understanding set
NAMED_SEQUENCES = frozenset({"T1", "T1CE", "T2", "FLAIR"})
CONFUSABLE = ({"CT", "CBCT"}, {"T1", "T1CE"}, {"T2", "FLAIR"})
# Modalities between which there are routes, each pair once.
ROUTE_PAIRS = tuple(dict.fromkeys(tuple(sorted((route.source, route.target))) for route in ROUTES))
EASY_GAP = 4  # times the smallest distance
LENGTH_TRIES = 64
UNREADABLE = "the case could not be read"


class _CannotServe(Exception):
    """Why a case cannot serve a task; the caller of the sampler gets it as a reason."""


class TaskSampler:
    """
    Instances of the tasks from a table of cases, each a pure function of the table, the seed and its index.

    Instance `i` belongs to case `i // per_case`, whatever came before: any worker can make any of them, and a run goes
    on where it stopped. A case is read once if indices are taken in order. Tasks come in the proportions of `mix`,
    exactly so in the long run; an instance that its case cannot serve is `None` and [`skipped`](TaskSampler.skipped)
    says why.

    Args:
        n_cases (`int`): Cases of the table.
        load (`Callable[[int], LoadedCase | None]`): Case of the table, whose order should be shuffled; `None` if it
            cannot be used. What it raises is passed on.
        tasks (`Sequence[str]`, defaults to `("CTS", "TIA", "MI")`): Of [`TASKS`].
        mix (`dict[str, float]`, *optional*): Share of each task; the published set's by default. Need not sum to 1.
        seed (`int`, defaults to 0): Another seed makes other instances of the same cases, for instance for each epoch.
        per_case (`int`, defaults to 32): Instances of each case.
        candidates (`int`, defaults to 4): Target slices of CTS.
        descriptions (`int`, defaults to 4): Of TIA. An even number, so that each comes with its opposite, else text
            alone says something about the answer.
        panels (`int`, defaults to 4): Of MI. Fewer where a case and the next one have fewer modalities between them
            that can be told apart.
        neighbours (`int`, defaults to 8): Hard candidates of CTS lie at most so many slices apart; further only where
            slices are so thin that `candidates` at `min_gap_mm` would not fit.
        min_gap_mm (`float`, defaults to 4): Smallest distance between any two candidates.
        difficulty (`str`, defaults to `"hard"`): Of CTS. `"easy"` draws candidates from the whole volume, four times
            `min_gap_mm` apart or as far as it allows; `"mixed"` half of each.
        name_share (`float`, defaults to 0.5): Share of MI with one image and a name as the answer.
        listing_share (`float`, defaults to 0): Share of MI that asks for the modality of every panel.
        label_images (`bool`, defaults to `False`): Write before each of several images what the question calls it (the
            letter, or the number of an image without one). The published data has images without labels, so a model
            has to count them; a small one learns to compare them much sooner if it need not.

    Rows are dicts: `images` (8-bit grey PIL pictures over their volumes' windows, of the scan's own size, shared
    between rows), `messages` (a question and its answer as TRL and the chat template take them), `task`, `question`,
    `options` (what may be answered), `answer` (one of them), `meanings` (what each option stands for: CTS slices from
    the right one, MI modalities, TIA directions such as `"CT-MRI"`), `route` (CTS, TIA `"brain/MRI-CT"`, MI
    `"brain/CT"`), `difficulty` (`"hard"` or `"easy"`; MI is hard where two panels are easily confused),
    `region`, `dataset`, `case_id`, `patient_id`, `slice_index`, `index`. Where MI asks for one of several panels, these
    are that panel's.

    Raises:
        `ValueError`: A setting cannot be used.
    """

    def __init__(
        self,
        n_cases: int,
        load: Callable[[int], LoadedCase | None],
        tasks: Sequence[str] = ("CTS", "TIA", "MI"),
        mix: dict[str, float] | None = None,
        seed: int = 0,
        per_case: int = 32,
        candidates: int = 4,
        descriptions: int = 4,
        panels: int = 4,
        neighbours: int = 8,
        min_gap_mm: float = 4.0,
        difficulty: str = "hard",
        name_share: float = 0.5,
        listing_share: float = 0.0,
        label_images: bool = False,
    ):
        unknown = [task for task in (*tasks, *(mix or ())) if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"Choose tasks of {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}.")
        if n_cases < 0 or per_case < 1 or neighbours < 1 or not min_gap_mm > 0:
            raise ValueError(
                "n_cases must not be negative; per_case, neighbours and min_gap_mm must be positive, got "
                f"{n_cases}, {per_case}, {neighbours} and {min_gap_mm}."
            )
        for name, number, most in (("candidates", candidates, 26), ("descriptions", descriptions, 6)):
            if not 2 <= number <= most:
                raise ValueError(f"{name} must be between 2 and {most}, got {number}.")
        if not 2 <= panels <= len(MODALITIES):
            raise ValueError(f"panels must be between 2 and {len(MODALITIES)}, got {panels}.")
        if difficulty not in ("hard", "easy", "mixed"):
            raise ValueError(f"difficulty must be 'hard', 'easy' or 'mixed', got {difficulty!r}.")
        if not (0 <= name_share and 0 <= listing_share and name_share + listing_share <= 1):
            raise ValueError(f"name_share and listing_share must be shares, got {name_share} and {listing_share}.")
        self.n_cases, self.load, self.seed, self.per_case = n_cases, load, seed, per_case
        self.candidates, self.descriptions, self.panels = candidates, descriptions, panels
        self.neighbours, self.min_gap_mm, self.label_images = neighbours, min_gap_mm, label_images

        mix = mix or {task: DEFAULT_MIX.get(task, 1.0) for task in tasks}
        hard = {"hard": 1.0, "easy": 0.0, "mixed": 0.5}[difficulty]
        forms = {
            "CTS": {"hard": hard, "easy": 1 - hard},
            "TIA": {"hard": 1.0},
            "MI": {"panel": 1 - name_share - listing_share, "name": name_share, "listing": listing_share},
            "VQA": {"easy": 1.0},
        }
        shares = {(task, form): mix.get(task, 0.0) * part for task in tasks for form, part in forms[task].items()}
        self.kinds = [kind for kind, share in shares.items() if share > 1e-9]
        total = sum(shares[kind] for kind in self.kinds)
        if not self.kinds or min(shares.values()) < 0 or not math.isfinite(total):
            raise ValueError(f"mix must give the tasks shares above 0, got {mix}.")
        self.shares = [shares[kind] / total for kind in self.kinds]
        # Planned together: so many instances that each kind comes up at least once, a whole number of cases.
        self._round = per_case * math.ceil(1 / (min(self.shares) * per_case))
        self._plan: tuple[int, list] = (-1, [])
        self._cases: OrderedDict[int, _Case | None] = OrderedDict()

    def __len__(self) -> int:
        return self.n_cases * self.per_case

    def __getitem__(self, index: int) -> dict | None:
        return self.draw(index)[0]

    def skipped(self, index: int) -> str | None:
        """Why there is no instance of this index, such as `"CTS: fewer than 4 slices ..."`; `None` if there is one."""
        return self.draw(index)[1]

    def __getstate__(self) -> dict:
        # A worker reads its own cases.
        return {**self.__dict__, "_cases": OrderedDict(), "_plan": (-1, [])}

    # ---- what comes where ----

    def plan(self, index: int) -> tuple[str, str, int]:
        """
        What an instance is to be.

        Returns:
            `(task, form, ordinal)`: the form is the difficulty of CTS or the way MI is asked; `ordinal` counts the
            instances of this task and form.
        """
        number, place = divmod(index, self._round)
        if self._plan[0] != number:
            before, after = self._counts(number * self._round), self._counts((number + 1) * self._round)
            plan = [
                (*kind, ordinal)
                for kind, start, end in zip(self.kinds, before, after, strict=True)
                for ordinal in range(start, end)
            ]
            random.Random(f"{self.seed}/plan/{number}").shuffle(plan)
            self._plan = (number, plan)
        return self._plan[1][place]

    def _counts(self, total: int) -> list[int]:
        """How many of the first `total` instances are of each kind: by largest remainder."""
        exact = [total * share for share in self.shares]
        counts = [math.floor(number) for number in exact]
        by_remainder = sorted(range(len(exact)), key=lambda kind: counts[kind] - exact[kind])
        for kind in by_remainder[: total - sum(counts)]:
            counts[kind] += 1
        return counts

    def _deal(self, what: str, ordinal: int, n: int) -> int:
        """Card `ordinal` of a deck of `n`, shuffled anew whenever it is used up: random, and balanced at any time."""
        number, place = divmod(ordinal, n)
        deck = list(range(n))
        random.Random(f"{self.seed}/{what}/{n}/{number}").shuffle(deck)
        return deck[place]

    def _case(self, number: int) -> "_Case | None":
        if number not in self._cases:
            loaded = self.load(number)
            self._cases[number] = None if loaded is None else _Case(loaded)
            if len(self._cases) > 2:  # this one, and the next one for the panels of MI
                self._cases.popitem(last=False)
        self._cases.move_to_end(number)
        return self._cases[number]

    def draw(self, index: int) -> tuple[dict | None, str | None]:
        """
        An instance, or why there is none.

        Args:
            index (`int`): From 0 to `len(self) - 1`.

        Returns:
            `(row, reason)`: one of them is `None`.

        Raises:
            `IndexError`: There is no such index.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"There is no instance {index} of {len(self)}.")
        task, form, ordinal = self.plan(index)
        number = index // self.per_case
        case = self._case(number)
        make = {
            "CTS": self._select_target,
            "TIA": self._describe_change,
            "MI": {"name": self._name, "panel": self._pick_panel, "listing": self._list_panels}.get(form),
            "VQA": self._ask,
        }[task]
        try:
            if case is None:
                raise _CannotServe(UNREADABLE)
            if case.fault:
                raise _CannotServe(case.fault)
            row = make(case, number, form, ordinal, random.Random(f"{self.seed}/{index}"))
        except _CannotServe as reason:
            return None, f"{task}: {reason}"
        if self.label_images and len(row["images"]) > 1:
            row["messages"][0]["content"] = _labelled(row["messages"][0]["content"], task)
        return {**row, "task": task, "index": index}, None

    # ---- the tasks ----

    def _route(self, case: "_Case", what: str, ordinal: int) -> tuple[str, str]:
        if not case.routes:
            raise _CannotServe("one modality only")
        return case.routes[self._deal(f"{what}/route", ordinal, len(case.routes))]

    def _select_target(self, case: "_Case", number: int, form: str, ordinal: int, rng: random.Random) -> dict:
        source, target = self._route(case, f"CTS/{form}", ordinal)
        chosen = self._spread(case, form, rng)
        answer = self._deal(f"CTS/{form}/letter", ordinal, len(chosen))
        # Any of the set may be the right one; only now it becomes the answer.
        true = chosen.pop(rng.randrange(len(chosen)))
        rng.shuffle(chosen)
        chosen.insert(answer, true)
        question = rng.choice(CTS_QUESTIONS).format(
            source=MODALITY_NAMES[source],
            target=MODALITY_NAMES[target],
            region=region_name(case.record.region),
            **_letters(len(chosen)),
        )
        pictures = [case.picture(source, true), *(case.picture(target, place) for place in chosen)]
        meanings = [f"{place - true:+d}" if place != true else "0" for place in chosen]
        letters = list(ascii_uppercase[: len(chosen)])
        route = f"{case.record.region}/{source}-{target}"
        return _row(case, pictures, question, letters, meanings, answer, route, form, true)

    def _spread(self, case: "_Case", form: str, rng: random.Random) -> list[int]:
        """
        Slices for CTS, any two at least the gap apart, increasing.

        Hard ones span at most `neighbours` slices, so that whichever becomes the right one, the others are its
        neighbours.
        """
        n, slices = self.candidates, case.slices
        gap = max(1, math.ceil(self.min_gap_mm / case.between_mm - 1e-6))
        tightest = case.tightest(n, gap)
        if not tightest:
            raise _CannotServe(f"fewer than {n} slices at least {self.min_gap_mm:g} mm apart")
        reach = max(self.neighbours, min(comb[-1] - comb[0] for comb in tightest))
        if form == "easy":
            wide = max(gap, math.ceil(EASY_GAP * self.min_gap_mm / case.between_mm - 1e-6))
            wide = min(wide, (slices[-1] - slices[0]) // (n - 1))
            while not (fitting := case.tightest(n, wide)):
                wide -= 1
            gap, tightest, reach = wide, fitting, slices[-1] - slices[0]
        first = rng.choice([comb for comb in tightest if comb[-1] - comb[0] <= reach])
        # The last slice each place may take, so that those after it still fit.
        latest = [slices[bisect_right(slices, first[0] + reach) - 1]]
        while len(latest) < n:
            latest.insert(0, slices[bisect_right(slices, latest[0] - gap) - 1])
        chosen = [first[0]]
        for last in latest[1:]:
            chosen.append(rng.choice(slices[bisect_left(slices, chosen[-1] + gap) : bisect_right(slices, last)]))
        return chosen

    def _describe_change(self, case: "_Case", number: int, form: str, ordinal: int, rng: random.Random) -> dict:
        source, target = self._route(case, "TIA", ordinal)
        region, n = case.record.region, self.descriptions
        home, away = wrong_pairs(source, target, region)
        wrong = rng.sample(home, len(home)) + rng.sample(away, len(away))
        directions = [(source, target), (target, source)]
        for pair in wrong[: (n - 1) // 2]:
            directions += rng.sample([pair, pair[::-1]], 2)
        directions = directions[:n]
        n = len(directions)
        pools = [describe(*direction, region) for direction in directions]
        texts = _of_length_rank(pools, self._deal("TIA/length", ordinal, n), rng)

        answer = self._deal("TIA/letter", ordinal, n)
        order = list(range(1, n))
        rng.shuffle(order)
        order.insert(answer, 0)
        letters = list(ascii_uppercase[:n])
        lines = [f"{letter}. {texts[which]}" for letter, which in zip(letters, order, strict=True)]
        question = "\n".join([rng.choice(TIA_QUESTIONS), *lines])
        place = rng.choice(case.slices)
        pictures = [case.picture(source, place), case.picture(target, place)]
        meanings = ["-".join(directions[which]) for which in order]
        return _row(case, pictures, question, letters, meanings, answer, f"{region}/{source}-{target}", form, place)

    def _name(self, case: "_Case", number: int, form: str, ordinal: int, rng: random.Random) -> dict:
        """The question of `pipe.identify`, answered by a name."""
        modality = case.modalities[self._deal("MI/name", ordinal, len(case.modalities))]
        place = rng.choice(case.slices)
        # What the case could be asked as well, so that no answer is the usual one; an MRI is never told from its
        # sequences, both being true.
        codes = [code for code in case.modalities if code == modality or not _clash({code}, {modality})]
        codes = codes if len(codes) > 1 else list(MODALITY_NAMES)
        names = [MODALITY_NAMES[code] for code in codes]
        picture, route = case.picture(modality, place), f"{case.record.region}/{modality}"
        form = _confusion(codes)
        return _row(case, [picture], MODALITY_QUESTION, names, codes, codes.index(modality), route, form, place)

    def _pick_panel(self, case: "_Case", number: int, form: str, ordinal: int, rng: random.Random) -> dict:
        panels = self._choose_panels(case, number, rng)
        # They are in random order, so any letter may be asked for; dealing makes the letters come out even.
        answer = self._deal("MI/panel", ordinal, len(panels))
        owner, asked, place = panels[answer]
        modalities = [modality for _, modality, _ in panels]
        partner, clear = CLARIFIED.get(asked, ("", ""))
        name = clear if partner in modalities else MODALITY_NAMES[asked]
        question = rng.choice(MI_QUESTIONS).format(target=name, **_letters(len(panels)))
        letters, route = list(ascii_uppercase[: len(panels)]), f"{owner.record.region}/{asked}"
        return _row(
            owner, _pictures(panels), question, letters, modalities, answer, route, _confusion(modalities), place
        )

    def _list_panels(self, case: "_Case", number: int, form: str, ordinal: int, rng: random.Random) -> dict:
        """All panels named, as in the published data; the other options have the same names in another order."""
        panels = self._choose_panels(case, number, rng)
        modalities = [modality for _, modality, _ in panels]
        wrong = [list(order) for order in permutations(modalities) if list(order) != modalities]
        listings = rng.sample(wrong, min(len(wrong), 3))
        answer = self._deal("MI/listing", ordinal, len(listings) + 1)
        listings.insert(answer, modalities)
        options = [", ".join(f"{ascii_uppercase[i]}: {name}" for i, name in enumerate(each)) for each in listings]
        question = rng.choice(LISTING_QUESTIONS).format(**_letters(len(panels)))
        route = f"{case.record.region}/{'+'.join(sorted(modalities, key=MODALITIES.index))}"
        place = panels[0][2]
        return _row(case, _pictures(panels), question, options, options, answer, route, _confusion(modalities), place)

    def _choose_panels(self, case: "_Case", number: int, rng: random.Random) -> list[tuple["_Case", str, int]]:
        """
        `(case, modality, slice)` of panels with different modalities, in random order: of the case, then of the next.

        "MRI" is never put beside a named sequence, which is an MRI as well.
        """
        owners = [case]
        if len(case.modalities) < self.panels:
            following = self._case((number + 1) % self.n_cases)
            if following is not None and following is not case and not following.fault:
                owners.append(following)
        found: dict[str, tuple[_Case, str, int]] = {}
        for owner in owners:
            left = list(owner.modalities)
            rng.shuffle(left)
            # An MRI clashes with all of its sequences: where it would stand alone, they come first.
            if {*left} - NAMED_SEQUENCES == {"MRI"}:
                left.sort(key=lambda name: name == "MRI")
            places = rng.sample(owner.slices, min(len(owner.slices), len(left)))
            while left and len(found) < self.panels:
                # Whatever is easily confused with a panel that is there comes first.
                left.sort(key=lambda name: not any({name, other} in CONFUSABLE for other in found))
                modality = left.pop(0)
                if modality not in found and not _clash({modality}, set(found)):
                    place = places.pop() if places else rng.choice(owner.slices)
                    found[modality] = (owner, modality, place)
        if len(found) < 2:
            raise _CannotServe("fewer than two modalities that can be told apart, with the next case")
        return rng.sample(list(found.values()), len(found))

    def _ask(self, case: "_Case", number: int, form: str, ordinal: int, rng: random.Random) -> dict:
        """Ordinary questions; those on lesions are balanced over their answers, region and plane are as they are."""
        with_lesion, without, sides = case.lesions
        questions = ["region", "plane"]
        questions += ["lesion"] if with_lesion and without else []
        questions += ["side"] if sides else []
        about = questions[self._deal("VQA/question", ordinal, len(questions))]
        place = rng.choice(case.slices)
        if about == "region":
            options = list(dict.fromkeys([*REGION_NAMES.values(), region_name(case.record.region)]))
            answer = region_name(case.record.region)
        elif about == "plane":
            options, answer = ["axial", "coronal"], case.record.axis
        elif about == "lesion":
            options = ["yes", "no"]
            answer = options[self._deal("VQA/lesion", ordinal, 2)]
            place = rng.choice(with_lesion if answer == "yes" else without)
        else:
            options = ["left", "right"]
            place = rng.choice(list(sides))
            answer = sides[place]
        if answer not in options:
            raise _CannotServe(f"the plane {answer!r} is neither axial nor coronal")
        picture = case.picture(rng.choice(case.modalities), place)
        route = f"{case.record.region}/{about}"
        question = VQA_QUESTIONS[about]
        return _row(case, [picture], question, options, options, options.index(answer), route, form, place)


class _Case:
    """A loaded case with its 8-bit pictures, each made once, and `fault` if nothing can be made of it."""

    def __init__(self, loaded: LoadedCase):
        self.loaded, self.record = loaded, loaded.record
        self.modalities = [name for name in MODALITIES if name in loaded.images]
        self.slices = [int(place) for place in loaded.usable]
        self.between_mm = float(loaded.spacing[0])
        self.fault = None
        masks = [array for array in (loaded.mask, loaded.lesion) if array is not None]
        shapes = {array.shape for array in (*(loaded.images[name] for name in self.modalities), *masks)}
        if not self.modalities:
            self.fault = f"none of its modalities is one of {', '.join(MODALITIES)}"
        elif not self.slices:
            self.fault = "no usable slice"
        elif any(name not in loaded.windows for name in self.modalities):
            self.fault = "an image has no window"
        elif len(shapes) > 1 or not 0 <= min(self.slices) <= max(self.slices) < next(iter(shapes))[0]:
            self.fault = "its images, masks and usable slices do not fit together"
        elif not self.between_mm > 0:
            self.fault = "the distance of its slices is unknown"
        pairs = list(permutations(self.modalities, 2))
        known = {(route.source, route.target) for route in ROUTES if route.region == self.record.region}
        # The 22 routes where the case has any of them; whatever else there is serves regions without routes.
        self.routes = [pair for pair in pairs if pair in known] or pairs
        self._pictures: dict[tuple[str, int], Image.Image] = {}
        self._tightest: dict[tuple[int, int], list[list[int]]] = {}
        self._lesions = None

    def picture(self, modality: str, place: int) -> Image.Image:
        key = (modality, place)
        if key not in self._pictures:
            image, window = self.loaded.images[modality][place], self.loaded.windows[modality]
            self._pictures[key] = to_display(image, window, self.loaded.spacing[1:])
        return self._pictures[key]

    def tightest(self, n: int, gap: int) -> list[list[int]]:
        """For each first slice that allows it, the nearest `n` slices upwards with `gap` from one to the next."""
        if (n, gap) not in self._tightest:
            self._tightest[n, gap] = combs = []
            for first in self.slices:
                comb = [first]
                while len(comb) < n and (place := bisect_left(self.slices, comb[-1] + gap)) < len(self.slices):
                    comb.append(self.slices[place])
                if len(comb) == n:
                    combs.append(comb)
        return self._tightest[n, gap]

    @property
    def lesions(self) -> tuple[list[int], list[int], dict[int, str]]:
        """Slices with lesions, slices without, and on which side of the picture where they lie on one side only."""
        if self._lesions is None:
            labels, with_lesion, without, sides = self.loaded.lesion, [], [], {}
            for place in self.slices if labels is not None else ():
                (with_lesion if labels[place].any() else without).append(place)
                columns = np.flatnonzero(labels[place].any(0))
                if not columns.size:
                    continue
                # The midline is the body's where that is known: it need not lie in the middle of the picture.
                body = None if self.loaded.mask is None else np.flatnonzero(self.loaded.mask[place].any(0))
                width = labels.shape[2]
                middle = (width - 1) / 2 if body is None or not body.size else (body[0] + body[-1]) / 2
                if columns[-1] < middle - 0.02 * width:
                    sides[place] = "left"
                elif columns[0] > middle + 0.02 * width:
                    sides[place] = "right"
            self._lesions = with_lesion, without, sides
        return self._lesions


def _row(case, pictures, question, options, meanings, answer, route, difficulty, place) -> dict:
    record, said = case.record, options[answer]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    return {
        "images": pictures,
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ],
        "question": question,
        "options": options,
        "meanings": meanings,
        "answer": said,
        "route": route,
        "difficulty": difficulty,
        "region": record.region,
        "dataset": record.dataset,
        "case_id": record.case_id,
        "patient_id": record.patient_id,
        "slice_index": place,
    }


def _labelled(content: list[dict], task: str) -> list[dict]:
    """A question with a label before each of its images: numbers for those that are compared, letters for panels."""
    labels = {"CTS": ["1", *ascii_uppercase], "TIA": ["1", "2"]}.get(task, ascii_uppercase)
    images, question = content[:-1], content[-1]
    named = zip(labels, images, strict=False)
    return [part for label, image in named for part in ({"type": "text", "text": label}, image)] + [question]


def _pictures(panels: list[tuple[_Case, str, int]]) -> list[Image.Image]:
    return [owner.picture(modality, place) for owner, modality, place in panels]


def _confusion(modalities: list[str]) -> str:
    return "hard" if any(pair <= set(modalities) for pair in CONFUSABLE) else "easy"


def _letters(n: int) -> dict[str, str | int]:
    return {"letters": f"A to {ascii_uppercase[n - 1]}" if n > 2 else "A and B", "count": n}


def _clash(one: set[str], other: set[str]) -> bool:
    """Whether "MRI" stands on one side and a named sequence on the other: both names would be right."""
    return bool("MRI" in one and other & NAMED_SEQUENCES or "MRI" in other and one & NAMED_SEQUENCES)


def wrong_pairs(source: str, target: str, region: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """
    Pairs of modalities that could be mistaken for these two but are others, both directions of each being wrong.

    Two sequences go with other sequences, scans without named sequences with such.

    Returns:
        `(home, away)`: pairs with routes in this region, and the rest. The region can be seen, so a pair that never
        occurs there would be ruled out without a look at the modalities.
    """
    truth = {source, target}
    pairs = [pair for pair in ROUTE_PAIRS if set(pair) != truth and not _clash(set(pair), truth)]
    if truth <= NAMED_SEQUENCES:
        pairs = [pair for pair in pairs if set(pair) <= NAMED_SEQUENCES]
    elif truth & NAMED_SEQUENCES:
        pairs = [pair for pair in pairs if set(pair) & truth] or pairs
    else:
        pairs = [pair for pair in pairs if not set(pair) & NAMED_SEQUENCES]
    home = [pair for pair in pairs if Route(region, *pair) in ROUTES]
    return home, [pair for pair in pairs if pair not in home]


def _of_length_rank(pools: list[tuple[str, ...]], rank: int, rng: random.Random) -> list[str]:
    """
    One wording of each pool, such that `rank` of the others are shorter than the first and none is of its length.

    Drawn until it is so, which is what keeps any other trait of a text from telling; should it never be so, the draw
    that comes nearest is taken.
    """
    nearest, off = [], math.inf
    for _ in range(LENGTH_TRIES):
        texts = [rng.choice(pool) for pool in pools]
        lengths = [len(text) for text in texts]
        shorter = sum(length < lengths[0] for length in lengths)
        distance = abs(shorter - rank) + (lengths.count(lengths[0]) - 1)
        if distance < off:
            nearest, off = texts, distance
        if off == 0:
            break
    return nearest


# ---------------------------------------------------------------------------------------------------------------------
# Reading answers
# ---------------------------------------------------------------------------------------------------------------------

# Every spelling of a modality as one alternative, longer ones first; the name of the group is the modality.
_WEIGHTED = r"(?:[\s-]*w(?:eighted|i)?)?\b(?:\s*\(?\s*mri?\b\)?)?"
_CONTRAST = r"(?:contrast[\s-]*enhanced|post[\s-]*(?:contrast|gadolinium)|enhanced|gadolinium[\s-]*enhanced)"
_SPOKEN = re.compile(
    rf"""
    (?P<FLAIR>\bt2f\b|\b(?:t2[\s/-]*)?flair\b(?:\s*\(?\s*mri?\b\)?)?)
    | (?P<T1>\bt1n\b|\bt1{_WEIGHTED}[\s(]*(?:without|before|pre-?)\s*(?:contrast|gadolinium|gd)(?:\s*agent)?
        |\b(?:non|not|no|pre|without)[\s-]+(?:{_CONTRAST}|ce|gd)[\s-]*t1{_WEIGHTED})
    | (?P<T1CE>\b(?:{_CONTRAST}|ce|gd)[\s-]*t1{_WEIGHTED}|\bt1[\s_-]*(?:ce|c|gd|\+\s*c|\+\s*gd|contrast)\b{_WEIGHTED}
        |\bt1{_WEIGHTED}[\s,(-]*(?:{_CONTRAST}|ce|gd)\b(?:\s*mri?\b)?
        |\bt1{_WEIGHTED}[\s(]*(?:with|after|post-?)\s*(?:contrast|gadolinium|gd)(?:\s*agent)?)
    | (?P<T2>\bt2{_WEIGHTED})
    | (?P<T1_>\bt1{_WEIGHTED})
    | (?P<CBCT>\bcbct\b|\bcone[\s-]*beam(?:\s*ct\b|\s*computed\s*tomography)?)
    | (?P<PET>\b(?:fdg[\s_-]*)?pet(?:[\s_-]*fdg)?\b|\bpositron[\s-]*emission\s*tomography)
    | (?P<CT>\bct(?:_fdg)?\b|\bcomputed\s*tomography)
    | (?P<MRI>\bmri?\b|\bmagnetic\s*resonance(?:\s*imag(?:e|ing))?)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# A letter that is meant as one: "a" may be an article, unless the text ends there.
_LETTER = r"([A-Z]\b|[b-z]\b|a\b(?=\W*$))"
CALLED = r"(?i:option|description|candidate|panel|choice|image|letter)"
_LETTER_FORMS = (
    rf"\b(?i:answer)\b(?i:\s+is)?\W*(?:{CALLED}\W*)?{_LETTER}",
    rf"\b{CALLED}\b\W*{_LETTER}",
    r"^[\"'(\[*]*([A-Z])[\"'*]*\s*[.:,)\]]",
    r"\(([A-Za-z])\)",
    r"^[\"'(\[*]*(A)\b[\"'*]*(?=,?\s+(?:is|matches|fits|belongs|corresponds|shows|because|since)\b)",
    r"^[\"'(\[*]*(A)\b[\"'*]*(?=\s*\n|\s+[-\u2013\u2014]\s)(?![\s\S]*\n\W*[B-Z]\b)",  # no list of all of them
    r"\b(?i:is|it's|be|choose|pick|say)\s+[\"'*]*(A)\b(?=\W*$|[\"'*]*,?\s+(?:because|since)\b)",
    r"\b([B-HJ-Z])\b(?![-'’])",  # "A" and "I" are words too
)
# Several letters, between which a text does not choose.
_ONE = r"(?:[A-HJ-Z]|[b-z])\b(?![-'’])"
# Between them a comma, an "or" or an "and", if no clause follows: "B, and C is wrong" has chosen.
_BETWEEN = rf"(?:/|&|(?:,|,?\s*\b(?:or|and)\b)(?=\s*(?:{CALLED}\s+)?{_ONE}(?:\W*$|[.?!]|\s*,|\s+(?:or|and)\b)))"
_SEVERAL = re.compile(rf"\b{_ONE}(?:\s*{_BETWEEN}\s*(?:{CALLED}\s+)?{_ONE})+")
# A panel's letter and its label, which may hold a comma where it is quoted.
_PANEL = re.compile(
    r"""(?:^|[\s"'\[{(,;])([A-Za-z])["']?\s*[:=]\s*(?:"([^":\n]+)"(?=\s*(?:[,;\])}\n]|$))|["']?([^"',;\]}\n]+))"""
)


def find_modalities(text: str) -> list[tuple[int, str]]:
    """Where a text names modalities, and which, in whatever spelling."""
    return [(match.start(), match.lastgroup.rstrip("_")) for match in _SPOKEN.finditer(text)]


def parse_modality(text: str) -> str | None:
    """The one modality that a text names in whatever spelling, such as `"T2 (MRI)"`; `None` if none or several."""
    named = {modality for _, modality in find_modalities(text)}
    return named.pop() if len(named) == 1 else None


def parse_listing(text: str) -> list[str | None] | None:
    """
    The modalities of panels in their order, from `A: CT, B: PET` or from something like JSON with or without brackets.

    The order counts, not the letters: published answers hold a letter twice. A label that names no modality is `None`.

    Returns:
        `list[str | None]` of at least two, or `None` if the text is no listing.
    """
    labels = [quoted or plain for _, quoted, plain in _PANEL.findall(text)]
    return [parse_modality(label) for label in labels] if len(labels) >= 2 else None


def parse_answer(text: str, options: Sequence[str]) -> str | None:
    """
    Which option an answer in words means.

    Letters are understood as `B`, `(b)`, `B. because ...`, `Option B`, `Description A`, `The answer is D.`; a name of a
    modality in any spelling; a listing of panels in any of its spellings; other options by their words.

    Args:
        text (`str`): What was answered.
        options (`Sequence[str]`): What may be answered.

    Returns:
        `str`: One of the options, or `None` if the text means none of them, or several.
    """
    text = text.strip()
    if all(re.fullmatch("[A-Z]", option) for option in options):
        return _parse_letter(text, options)
    for read in (parse_listing, parse_modality):
        meant = [read(option) for option in options]
        if None not in meant:
            said = read(text)
            return options[meant.index(said)] if said in meant else None
    said = [option for option in options if re.search(rf"\b{re.escape(option)}\b", text, re.IGNORECASE)]
    return said[0] if len(said) == 1 else None


def _parse_letter(text: str, options: Sequence[str]) -> str | None:
    alone = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", text)
    if alone is None and parse_listing(text) is not None:
        return None
    # The most explicit form that occurs decides; if it names two letters, the text does not choose.
    if alone:
        letters = {alone[1].upper()}
    else:
        found = next(filter(None, (list(re.finditer(form, text)) for form in _LETTER_FORMS)), [])
        undecided = [match.span() for match in _SEVERAL.finditer(text)]
        chosen = [match for match in found if not any(start <= match.start(1) < end for start, end in undecided)]
        letters = {match[1].upper() for match in chosen}
    return letters.pop() if len(letters) == 1 and letters <= set(options) else None


__all__ = ["TaskSampler", "find_modalities", "parse_answer", "parse_listing", "parse_modality", "wrong_pairs"]
