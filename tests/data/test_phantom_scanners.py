"""Scanners outside of the training's range: outside they are, the patients stay, and so do the usual pictures."""

import json

import numpy as np
import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from synermedgen_hf import cli
from synermedgen_hf.data.phantom import PROTOCOLS, mr_signal, simulate_volume
from synermedgen_hf.data.phantom_anatomy import LUT, NAMES
from synermedgen_hf.data.phantom_scanners import SCANNERS, USUAL, relaxation_times
from synermedgen_hf.data.synermed import phantom_records

UNSEEN = SCANNERS["unseen"]
# Of `simulate_volume` with seed 3, 48 pixels and 8 slices, before there were other scanners: mean, standard deviation
# and mean under a ramp.
GOLDEN = {
    "brain/synthrad/MRI": (582.9405, 812.1245, 258.3566),
    "brain/synthrad/CT": (-633.5725, 575.4236, -336.2189),
    "brain/synthrad/CBCT": (-633.8965, 543.3329, -335.5894),
    "pelvis/synthrad/MRI": (822.5763, 946.2291, 408.7675),
    "pelvis/synthrad/CT": (-518.7071, 536.5081, -260.1468),
    "pelvis/synthrad/CBCT": (-503.3059, 520.2689, -252.9752),
    "brain/brats/T1": (310.195, 617.7294, 187.0011),
    "brain/brats/T1CE": (59.10866, 117.1672, 36.19186),
    "brain/brats/T2": (79.36659, 160.0697, 48.25097),
    "brain/brats/FLAIR": (283.5437, 577.3258, 173.387),
    "whole-body/autopet/CT": (-901.2593, 337.65, -449.4553),
    "whole-body/autopet/PET": (0.3994364, 1.395581, 0.194554),
}


@pytest.fixture(scope="module")
def volumes():
    return {
        (key, name): simulate_volume(*key, seed=3, size=48, num_slices=8, scanner=name)
        for key in PROTOCOLS
        for name in SCANNERS
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_usual_pictures_are_what_they_were(volumes, name):
    region, protocol, modality = name.split("/")
    image = volumes[(region, protocol), "usual"].images[modality]
    ramp = np.linspace(0, 1, image.size).reshape(image.shape)
    found = image.mean(dtype=np.float64), image.std(dtype=np.float64), (image * ramp).mean(dtype=np.float64)
    np.testing.assert_allclose(found, GOLDEN[name], rtol=2e-6)


def test_every_range_lies_outside_of_the_usual_one():
    for name, usual in vars(USUAL).items():
        unseen = getattr(UNSEEN, name)
        if not isinstance(usual, tuple):
            assert unseen != usual, name
        elif name in ("spin_echo", "turbo_spin_echo", "flair", "gradient_echo"):
            assert all(one != other for one, other in zip(unseen, usual, strict=True)), name
        else:
            assert max(unseen) < min(usual) or min(unseen) > max(usual), name


@pytest.mark.parametrize("key", PROTOCOLS)
def test_the_patients_are_the_same_in_a_wider_field_of_view(volumes, key):
    usual, unseen = (volumes[key, name] for name in ("usual", "unseen"))
    assert unseen.spacing[2] == pytest.approx(1.15 * usual.spacing[2])
    assert unseen.case_id == f"{usual.case_id}-unseen"
    assert unseen.images.keys() == usual.images.keys()
    # Slices are thicker, and not at the same heights: areas in mm2 agree roughly.
    areas = [volume.mask.any(0).sum() * volume.spacing[1] * volume.spacing[2] for volume in (usual, unseen)]
    assert areas[1] == pytest.approx(areas[0], rel=0.25)


def test_noise_is_that_of_a_low_dose(volumes):
    for key, modality in ((("pelvis", "synthrad"), "CT"), (("pelvis", "synthrad"), "CBCT")):
        spread = []
        for name in SCANNERS:
            image, volume = volumes[key, name].images[modality], volumes[key, name]
            soft = volume.structures["bladder"] if "bladder" in volume.structures else volume.mask & (abs(image) < 150)
            spread.append(image[soft].std())
        assert spread[1] > 1.3 * spread[0], modality


def test_relaxation_is_faster_in_lower_fields():
    names = [NAMES.index(name) for name in ("grey matter", "white matter", "csf", "cortical bone")]
    t1, t2 = relaxation_times(LUT, 0.55)
    at = LUT[:, 2]
    # By the cube root of the field at most; fluid hardly, and bone, slower at 1.5 T, not at all.
    assert t1[names[:2]] / at[names[:2]] == pytest.approx([(0.55 / 1.5) ** (1 / 3)] * 2)
    assert 0.96 < t1[names[2]] / at[names[2]] < 1 and t1[names[3]] == at[names[3]]
    np.testing.assert_array_equal(t2, LUT[:, 3])
    np.testing.assert_array_equal(relaxation_times(LUT, 1.5)[0], LUT[:, 2])
    np.testing.assert_array_equal(relaxation_times(LUT, 3.0)[1], LUT[:, 5])


def test_contrasts_stay_what_they_are_called():
    grey, white, csf = (NAMES.index(name) for name in ("grey matter", "white matter", "csf"))
    for field in UNSEEN.fields:
        t1 = mr_signal("T1", field, False, scanner=UNSEEN)
        gradient_echo = mr_signal("SPGR", field, False, min(UNSEEN.flip_degrees), UNSEEN)
        t2, flair = (mr_signal(name, field, False, scanner=UNSEEN) for name in ("T2", "FLAIR"))
        assert t1[white] > t1[grey] > t1[csf]
        assert gradient_echo[white] > gradient_echo[grey] > gradient_echo[csf]
        assert t2[csf] > t2[grey] > t2[white]
        assert flair[csf] < 0.15 * flair[grey]


def test_a_data_set_of_them_is_told_from_the_usual_one():
    rows = {}
    for name in SCANNERS:
        asked = dict(phantom_cases=1, phantom_slices=16, phantom_size=32, routes=["T1-T2"], streaming=True)
        rows[name] = next(iter(load_dataset("synermed", "pairs", split="test", phantom_scanner=name, **asked)))
    assert [rows[name]["dataset"] for name in SCANNERS] == ["phantom-brats", "phantom-brats-unseen"]
    assert rows["usual"]["patient_id"] == rows["unseen"]["patient_id"]
    assert not np.array_equal(*(np.asarray(rows[name]["source_image"]) for name in SCANNERS))
    assert [record.dataset for record in phantom_records("test", 1)][0] == "phantom-synthrad"


def test_they_are_evaluated_and_never_beside_the_usual_ones(tmp_path):
    size = ["--phantom-slices", "20", "--phantom-size", "32", "--slice-step", "8", "--routes", "CT-PET"]
    for name in SCANNERS:
        asked = ["--phantom-cases", "1", "--phantom-scanner", name, *size, "--baseline", "copy"]
        done = CliRunner().invoke(cli.app, ["evaluate", "--output", str(tmp_path / name), *asked])
        assert done.exit_code == 0, done.stderr
    arguments = [json.loads((tmp_path / name / "arguments.json").read_text()) for name in SCANNERS]
    # What an evaluation remembers of the usual ones is what it was.
    assert "phantom_scanner" not in arguments[0] and arguments[1]["phantom_scanner"] == "unseen"
    mixed = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "usual"), str(tmp_path / "unseen")])
    assert mixed.exit_code == 1 and "lacks" in mixed.stderr


def test_unknown_scanners_are_refused():
    with pytest.raises(ValueError, match="no scanner 'new'"):
        simulate_volume("brain", "brats", 0, scanner="new")
    with pytest.raises(ValueError, match="'unseen' for heart/myops"):
        simulate_volume("heart", "myops", 0, scanner="unseen")
    with pytest.raises(ValueError, match="phantom_scanner"):
        load_dataset("synermed", "pairs", phantom_cases=1, phantom_scanner="new")
    with pytest.raises(ValueError, match="simulated patients"):
        load_dataset("synermed", "pairs", data_dir=".", phantom_scanner="unseen")
