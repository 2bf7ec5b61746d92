"""The slice that understanding looks at is the one that the questions of training show."""

from pathlib import Path

import numpy as np
import pytest

from synermedgen_hf import Volume, read_volume
from synermedgen_hf.data.sources import load_case, read_manifest
from synermedgen_hf.data.understanding import TaskSampler
from synermedgen_hf.volumes.understanding import region_axis, shown_window, understanding_slice

EXAMPLES = Path(__file__).parents[2] / "spaces" / "synermedgen" / "examples"
CASES, _ = read_manifest(EXAMPLES / "manifest.csv")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.case_id)
def test_it_is_the_picture_of_training(case):
    sampler = TaskSampler(1, lambda _: load_case(case), tasks=("MI",), name_share=1.0, per_case=400)
    rows = [sampler[number] for number in range(len(sampler))]
    for modality, path in case.files.items():
        volume = read_volume(path)
        axis = region_axis(volume, case.region)
        made = np.asarray(understanding_slice(volume, axis))
        middle = volume.array.shape[{"axial": 2, "coronal": 1}[axis]] // 2
        route = f"{case.region}/{modality}"
        shown = next(row for row in rows if (row["route"], row["slice_index"]) == (route, middle))
        assert np.array_equal(made, np.asarray(shown["images"][0]))


@pytest.mark.parametrize(
    ("shape", "spacing", "region", "axis"),
    [
        ((20, 20, 20), (2, 2, 2), "whole-body", "coronal"),
        ((20, 20, 20), (1, 1, 5), "whole-body", "coronal"),
        ((20, 20, 5), (5, 1, 1), "brain", "axial"),
        ((20, 20, 20), (2, 2, 2), None, "axial"),
        ((5, 20, 20), (5, 1, 1), None, "sagittal"),
        ((5, 20, 20), (5, 1, 1), "heart", "sagittal"),
        ((20, 1, 20), (1, 1, 1), "brain", "coronal"),
    ],
)
def test_the_axis_is_that_of_the_region_or_of_the_stack(shape, spacing, region, axis):
    assert region_axis(Volume(np.zeros(shape, np.float32), np.diag([*spacing, 1])), region) == axis


@pytest.mark.parametrize(
    ("low", "high", "modality", "window"),
    [
        (-1000, 200, None, (-1024, 3071)),
        (0, 6, None, (0, 20)),
        (0, 1, None, (0, 1)),
        (0, 800, None, (0, 800)),
        (0, 60, "PET", (0, 20)),
        (0, 900, "CT", (-1024, 3071)),
    ],
)
def test_the_window_is_the_volumes(low, high, modality, window):
    array = np.full((10, 10, 10), high, np.float32)
    array[0] = low
    assert shown_window(Volume(array, np.eye(4), modality)) == window


def test_pixels_are_square():
    volume = Volume(np.zeros((20, 24, 5), np.float32), np.diag([1, 1, 4, 1]))
    assert understanding_slice(volume, "coronal").size == (20, 20)


def test_a_constant_scan_can_be_shown_and_one_with_gaps_is_refused():
    volume = Volume(np.full((9, 9, 9), 7, np.float32), np.eye(4), "MRI")
    assert np.all(np.asarray(understanding_slice(volume, "axial")) == 255)
    volume.array[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="1 voxels of the scan are NaN"):
        understanding_slice(volume, "axial")
