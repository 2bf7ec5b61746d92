"""Tissues, bone, uptake and slices, with errors that are put in by hand."""

import numpy as np
import pytest

from synermedgen_hf.metrics import bone_dice, hu_error_by_tissue, suv_errors, z_consistency
from synermedgen_hf.metrics.inputs import UndefinedMetric


def test_hu_error_by_tissue_of_the_reference():
    reference = np.repeat([[-1000.0], [-700], [-100], [40], [900]], 4, axis=1)
    errors = np.array([[0.0], [10], [-20], [30], [-400]]) * [1, 1, 1, -1]
    found = hu_error_by_tissue(reference + errors, reference)
    assert {name: (own["voxels"], own["mae"], own["bias"]) for name, own in found.items()} == {
        "air": (4, 0, 0),
        "lung": (4, 10, 5),
        "fat": (4, 20, -10),
        "soft": (4, 30, 15),
        "bone": (4, 400, -200),
    }


def test_every_voxel_is_of_one_tissue():
    reference = np.linspace(-1100, 3000, 4101).reshape(1, -1)  # every HU, the ends between tissues among them
    found = hu_error_by_tissue(reference, reference)
    assert sum(own["voxels"] for own in found.values()) == reference.size
    mask = reference < -900
    found = hu_error_by_tissue(reference, reference, mask)
    assert found["air"] == {"voxels": 200, "mae": 0, "bias": 0}
    assert found["bone"] == {"voxels": 0, "mae": None, "bias": None}


def test_bone_dice():
    reference, prediction = np.zeros((10, 20)), np.zeros((10, 20))
    reference[:, 0:8], prediction[:, 4:12] = 700, 700
    assert bone_dice(prediction, reference) == 0.5
    assert bone_dice(reference, reference) == 1
    assert bone_dice(prediction, reference, mask=np.arange(20) * np.ones((10, 1)) >= 4) == pytest.approx(8 / 12)
    assert bone_dice(np.full((10, 20), 250.0), reference) == 0  # above, not at
    with pytest.raises(UndefinedMetric, match="250 HU"):
        bone_dice(np.zeros((4, 4)), np.zeros((4, 4)))


def test_suv_errors():
    reference = np.ones((6, 6))
    reference[2:4, 2:4] = 8
    prediction = reference * 0.75
    lesion = reference > 4
    assert suv_errors(prediction, reference, lesion) == {"suvmean": -2, "suvmax": -2}
    prediction[0, 0] = 9
    assert suv_errors(prediction, reference)["suvmax"] == 1
    with pytest.raises(UndefinedMetric, match="mask is empty"):
        suv_errors(prediction, reference, lesion & False)


def test_slices_that_flicker_and_slices_that_do_not():
    reference = np.random.default_rng(0).normal(size=(6, 5, 5))
    flicker = np.array([1, -1, 1, -1, 1, -1]).reshape(-1, 1, 1) * 10
    assert z_consistency(reference + 10, reference) == pytest.approx(0)
    assert z_consistency(reference + flicker, reference) == pytest.approx(20)
    mask = np.zeros(reference.shape, bool)
    mask[2:4, 1:3] = True
    outside = np.where(mask, 0, flicker)
    assert z_consistency(reference + outside, reference, mask) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"volumes, got images of shape \(5, 5\)"):
        z_consistency(reference[0], reference[0])
    with pytest.raises(UndefinedMetric, match="no neighbour"):
        z_consistency(reference[:1], reference[:1])
    alone = np.zeros(reference.shape, bool)
    alone[::2] = True
    with pytest.raises(UndefinedMetric):
        z_consistency(reference, reference, alone)
