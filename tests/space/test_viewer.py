"""What the page shows of a result: windows, differences and values, in the scans' own units."""

import numpy as np
import pytest


@pytest.fixture
def viewer(app_module):
    import viewer

    return viewer


def layer(viewer, modality, unit, slices, window=(0.0, 1000.0)):
    return viewer.Layer(modality, modality, unit, np.asarray(slices, np.float32), window)


@pytest.fixture
def result(viewer):
    """Two slices of CT beside an MR, with a measured CT that is 100 HU lower."""
    mr, ct = np.full((2, 8, 8), 500), np.full((2, 8, 8), 40)
    made = viewer.Result(layer(viewer, "MRI", "a.u.", mr), (1.0, 1.0), "scan")
    made.made["CT"] = layer(viewer, "CT", "HU", ct)
    made.reference = layer(viewer, "CT", "HU", ct - 100)
    return made


def grey(picture):
    return int(np.asarray(picture).reshape(-1)[0])


@pytest.mark.parametrize(
    "window, expected", [("Brain", 128), ("Soft tissue", 128), ("Bone", 83), ("Body", 133), ("no such window", 133)]
)
def test_a_window_is_in_hounsfield_units(viewer, result, window, expected):
    source, made = viewer.pair(result, "CT", "Source and synthesis", 0, "Whole range", window)
    assert abs(grey(made) - expected) <= 1 and abs(grey(source) - 128) <= 1


def test_pet_is_dark_on_white(viewer):
    made = viewer.Result(layer(viewer, "CT", "HU", np.zeros((1, 8, 8))), (1.0, 1.0), "scan")
    made.made["PET"] = layer(viewer, "PET", "SUV", np.full((1, 8, 8), 4.0))
    _, dark = viewer.pair(made, "PET", "Source and synthesis", 0, "", "0 to 5 SUV")
    assert abs(grey(dark) - 51) <= 1


def test_a_difference_is_red_where_the_synthesis_is_higher(viewer, result):
    _, shown = viewer.pair(result, "CT", "Difference from the reference", 0, "", "")
    red, _, blue = np.asarray(shown)[0, 0]
    assert red > blue
    assert "100 HU" in viewer.table(result, "CT", 0).split("Mean absolute difference")[1]


def test_the_reference_of_an_mr_is_put_on_the_scale_of_the_synthesis(viewer):
    made = viewer.Result(layer(viewer, "CT", "HU", np.zeros((1, 8, 8))), (1.0, 1.0), "scan")
    made.made["T1"] = layer(viewer, "T1", "a.u.", np.full((1, 8, 8), 500.0), (0, 1000))
    made.reference = layer(viewer, "T1", "a.u.", np.full((1, 8, 8), 50.0), (0, 100))
    assert np.all(viewer.difference(made, "T1", 0) == 0)


@pytest.mark.parametrize(
    "unit, window, value, said",
    [("HU", (-1024, 3071), 40.4, "40"), ("SUV", (0, 20), 1.234, "1.23"), ("a.u.", (0, 1000), 512.3, "512")]
    + [("a.u.", (0, 1), 0.512, "0.51"), ("a.u.", (0, 0.01), 0.00512, "0.0051")],
)
def test_values_have_as_many_digits_as_they_deserve(viewer, unit, window, value, said):
    assert layer(viewer, "any", unit, [[[value]]], window).number(value) == said
