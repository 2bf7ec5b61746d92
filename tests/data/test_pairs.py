"""Two slices of one grid as one row: every value kept, both directions, and what is needed to go back to the scan."""

import io
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from synermedgen_hf.data.pairs import PAIR_FEATURES, encode_mask, encode_slice, is_wanted, pair_rows
from synermedgen_hf.data.sources import CaseRecord, LoadedCase
from synermedgen_hf.processing_synermedgen import make_instruction

SHAPE = (6, 10, 8)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    record = CaseRecord("own", "one", "p1", "brain", "axial", {}, centre="north")
    images = {
        "MRI": rng.integers(0, 40000, SHAPE).astype(np.uint16),
        "CT": rng.integers(-1024, 3071, SHAPE).astype(np.int16),
        "PET": rng.uniform(0, 9, SHAPE).astype(np.float32),
    }
    windows = {name: {"modality": name, "unit": "HU", "low": -1024.0, "high": 3071.0} for name in images}
    windows["PET"] |= {"unit": "SUV", "low": 0.0, "high": 20.0}
    mask = images["CT"] > 0
    return LoadedCase(record, images, mask, images["CT"] > 2000, (5.0, 2.5, 2.0), windows, np.array([1, 2, 4, 5]))


def table(case, *arguments, **options):
    return Dataset.from_list([row for _, row in pair_rows(case, *arguments, **options)], features=PAIR_FEATURES)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([-1024, -1, 0, 3071], id="Hounsfield units"),
        pytest.param([0, 32767, 32768, 65535], id="above 15 bits"),
        pytest.param([0.0, 2.2000000477, 1e-7, 19.999], id="SUV"),
        pytest.param([-3.4e38, 3.4e38, 1 / 3, -0.0], id="any float32"),
    ],
)
def test_a_slice_comes_back_to_the_last_bit(values):
    array = np.resize(np.array(values, np.float32), (9, 13))
    picture = Image.open(io.BytesIO(encode_slice(array)["bytes"]))
    assert picture.mode == "F" and picture.size == (13, 9)
    np.testing.assert_array_equal(np.asarray(picture).view(np.uint32), array.view(np.uint32))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8, ">i2"])
def test_integers_of_the_file_are_kept_as_float32(dtype):
    array = np.arange(100, 130).reshape(5, 6).astype(dtype)
    array = array[::-1].T  # as a view of a volume is: not contiguous
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_slice(array)["bytes"]))), array)


def test_a_mask_comes_back_as_bool():
    mask = np.random.default_rng(0).random((9, 13)) > 0.5
    back = np.asarray(Image.open(io.BytesIO(encode_mask(mask)["bytes"])))
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)
    assert encode_mask(None) is None


def test_every_usable_slice_gives_every_ordered_pair(case):
    keys = [key for key, _ in pair_rows(case)]
    assert len(set(keys)) == len(keys) == 4 * 6
    rows = table(case)
    assert rows["slice_index"][:6] == [1] * 6
    assert sorted(set(rows["slice_index"])) == [1, 2, 4, 5]
    routes = {(source, target) for source, target in zip(rows["source_modality"], rows["target_modality"], strict=True)}
    assert routes == {(one, two) for one in case.images for two in case.images if one != two}


def test_a_row_holds_both_slices_and_all_that_is_known_of_them(case):
    rows = table(case)
    for row in rows:
        index = row["slice_index"]
        for side in ("source", "target"):
            name = row[f"{side}_modality"]
            np.testing.assert_array_equal(np.asarray(row[f"{side}_image"]), case.images[name][index])
            assert row[f"{side}_window"] == {key: case.windows[name][key] for key in ("unit", "low", "high")}
        np.testing.assert_array_equal(np.asarray(row["mask"]), case.mask[index])
        np.testing.assert_array_equal(np.asarray(row["lesion"]), case.lesion[index])
        assert row["instruction"] == make_instruction(row["source_modality"], row["target_modality"], "brain")
    assert {name: rows[0][name] for name in ("region", "axis", "dataset", "case_id", "patient_id", "centre")} == {
        "region": "brain",
        "axis": "axial",
        "dataset": "own",
        "case_id": "one",
        "patient_id": "p1",
        "centre": "north",
    }
    assert rows[0]["spacing"] == [5.0, 2.5, 2.0]


def test_masks_are_optional(case):
    row = table(replace(case, mask=None, lesion=None))[0]
    assert row["mask"] is None and row["lesion"] is None


@pytest.mark.parametrize(
    ("routes", "kept"),
    [
        (None, {"MRI-CT", "CT-MRI", "MRI-PET", "PET-MRI", "CT-PET", "PET-CT"}),
        (["MRI-CT"], {"MRI-CT"}),
        (["brain/MRI-CT", "pelvis/CT-MRI", "CT-PET"], {"MRI-CT", "CT-PET"}),
        (["pelvis/MRI-CT"], set()),
    ],
)
def test_routes_are_named_with_or_without_their_region(case, routes, kept):
    rows = [row for _, row in pair_rows(case, routes)]
    assert {f"{row['source_modality']}-{row['target_modality']}" for row in rows} == kept


def test_a_route_is_a_direction():
    assert is_wanted("MRI", "CT", "brain", ["MRI-CT"]) and not is_wanted("CT", "MRI", "brain", ["MRI-CT"])


@pytest.mark.parametrize(("step", "slices"), [(1, [1, 2, 4, 5]), (2, [1, 4]), (3, [1, 5]), (9, [1])])
def test_a_slice_step_counts_usable_slices(case, step, slices):
    assert [row["slice_index"] for _, row in pair_rows(case, ["MRI-CT"], slice_step=step)] == slices


def test_a_case_of_one_modality_gives_nothing(case):
    assert list(pair_rows(replace(case, images={"CT": case.images["CT"]}))) == []
