import builtins
import pickle

import numpy as np
import pytest
from scipy import ndimage

from synermedgen_hf.data import phantom
from synermedgen_hf.data.phantom import PROTOCOLS, load_phantom, simulate_case

SIZE, SLICES = 64, 3


@pytest.fixture(scope="module")
def cases():
    return {key: simulate_case(*key, seed=3, num_slices=SLICES, size=SIZE) for key in PROTOCOLS}


@pytest.mark.parametrize(
    ("key", "shape", "field_of_view"),
    [
        (("brain", "synthrad"), (64, 64), 240),
        (("brain", "brats"), (64, 64), 240),
        (("pelvis", "synthrad"), (48, 64), 430),
        (("whole-body", "autopet"), (64, 36), 900),
    ],
)
def test_modalities_lie_on_one_grid(cases, key, shape, field_of_view):
    case = cases[key]
    assert case.case_id == f"phantom-{key[0]}-{key[1]}-00003"
    assert tuple(case.images) == PROTOCOLS[key]
    for image in case.images.values():
        assert image.shape == (SLICES, *shape) and image.dtype == np.float32 and np.isfinite(image).all()
    for mask in (case.mask, case.lesion):
        assert mask.shape == (SLICES, *shape) and mask.dtype == bool
    assert 0.05 < case.mask.mean() < 0.8
    assert case.spacing[1] == case.spacing[2] == pytest.approx(field_of_view / SIZE)
    assert case.axis == ("coronal" if key[0] == "whole-body" else "axial")


@pytest.mark.parametrize("key", PROTOCOLS)
def test_values_are_in_scanner_units(cases, key):
    images, mask = cases[key].images, cases[key].mask
    for name, image in images.items():
        if name in ("CT", "CBCT"):
            assert image.min() == -1024 and 300 < image.max() <= 3071
            assert np.median(image[mask]) == pytest.approx(0, abs=160)
        else:
            assert image.min() >= 0
    if "PET" in images:
        assert 3 < images["PET"].max() < 40 and 0.2 < images["PET"][mask].mean() < 3
    if "CT" in images:
        around = ~ndimage.binary_dilation(mask, np.ones((1, 3, 3)))
        assert (images["CT"][around] == -1024).all()


def test_the_case_depends_on_its_seed_alone(cases):
    case = cases["pelvis", "synthrad"]
    simulate_case("pelvis", "synthrad", seed=4, num_slices=1, size=SIZE)
    again = simulate_case("pelvis", "synthrad", seed=3, num_slices=SLICES, size=SIZE)
    other = simulate_case("pelvis", "synthrad", seed=4, num_slices=SLICES, size=SIZE)
    for name, image in case.images.items():
        np.testing.assert_array_equal(image, again.images[name])
        assert not np.array_equal(image, other.images[name])
    assert not np.array_equal(case.mask, other.mask)


def test_brats_is_skull_stripped_and_mostly_holds_a_tumour(cases):
    case = cases["brain", "brats"]
    for image in case.images.values():
        assert (image[~case.mask] == 0).all() and (image[case.mask] > 0).mean() > 0.99
    held = [simulate_case("brain", "brats", seed, 4, 48) for seed in range(8)]
    assert sum(case.lesion.any() for case in held) >= 4
    assert all(not (case.lesion & ~case.mask).any() for case in held)


def test_the_skull_is_bright_in_ct_and_dark_in_mr():
    # Some SynthRAD MRIs are stripped to the brain; the skull is looked for where the whole head is kept.
    heads = (simulate_case("brain", "synthrad", seed, 4, 96) for seed in range(10))
    case = next(case for case in heads if (case.images["MRI"][case.mask] > 0).mean() > 0.95)
    ct, mr, cbct = (case.images[name] for name in ("CT", "MRI", "CBCT"))
    bone = ct > 800
    soft_tissue = ndimage.binary_erosion((ct > -20) & (ct < 100), np.ones((1, 5, 5)))
    assert bone.sum() > 200
    assert mr[bone].mean() < 0.8 * mr[soft_tissue].mean()
    assert cbct[bone].mean() > cbct[soft_tissue].mean() + 500


def test_the_brain_has_grey_and_white_matter():
    z = np.array([20.0, 30.0])
    tissue, brain, _, _ = phantom.brain_anatomy(np.random.default_rng(0), z, 10.0, 96, tumour=False)
    shares = {name: tissue.fractions[phantom.NAMES.index(name)][brain > 0.9].mean() for name in phantom.NAMES}
    assert 0.25 < shares["grey matter"] < 0.65 and 0.25 < shares["white matter"] < 0.65
    assert 0.02 < shares["csf"] < 0.3
    np.testing.assert_allclose(tissue.fractions.sum(0), 1, atol=1e-4)


def test_mr_scale_is_the_volumes_and_not_the_slices():
    case = simulate_case("brain", "brats", seed=5, num_slices=6, size=64)
    medians = [np.median(image[mask]) for image, mask in zip(case.images["T1"], case.mask, strict=True)]
    assert max(medians) < 1.3 * min(medians)
    peaks = [np.percentile(simulate_case("brain", "brats", s, 1, 48).images["T1"], 99) for s in range(4)]
    assert max(peaks) > 1.2 * min(peaks)


def test_pet_shows_function_and_ct_shows_density():
    case = simulate_case("whole-body", "autopet", seed=1, num_slices=6)
    head = np.zeros_like(case.mask)
    head[:, :24] = case.mask[:, :24]
    # The brain takes up more than the trunk does; the lungs, in the trunk, are mostly air.
    assert np.percentile(case.images["PET"][head], 90) > 3 * np.median(case.images["PET"][case.mask & ~head])
    assert ((case.images["CT"] < -600) & ndimage.binary_erosion(case.mask, np.ones((1, 7, 7)))).mean() > 0.01


def test_orientation_is_the_radiologists():
    case = simulate_case("whole-body", "autopet", seed=1, num_slices=6)
    ct, pet = case.images["CT"], case.images["PET"]
    liver = (ct > 80) & (ct < 130) & (pet > 1.5) & (pet < 3)
    columns = np.nonzero(liver.any(0)[50:80])[1]
    assert columns.mean() < case.mask.shape[2] / 2  # the patient's right is on the left
    pelvis = simulate_case("pelvis", "synthrad", seed=1, num_slices=6)
    rows = np.nonzero((pelvis.images["CT"][-2:] > 300) & (np.abs(np.arange(128) - 63.5) < 12))[1]
    assert rows.mean() > pelvis.mask.shape[1] / 2  # the sacrum is behind, which is below


def test_unknown_requests_are_refused():
    with pytest.raises(ValueError, match="brain/synthrad"):
        simulate_case("pelvis", "brats", 0)
    with pytest.raises(ValueError, match="num_slices"):
        simulate_case("brain", "brats", 0, num_slices=0)
    with pytest.raises(ValueError, match="validation"):
        load_phantom("dev", 1)


def test_a_drawn_brain_stands_in_for_nilearn(monkeypatch, caplog):
    real_import = builtins.__import__

    def without_nilearn(name, *args, **kwargs):
        if name.startswith("nilearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_nilearn)
    phantom.brain_atlas.cache_clear()
    try:
        case = simulate_case("brain", "brats", 0, num_slices=2, size=48)
        simulate_case("brain", "brats", 1, num_slices=1, size=48)
    finally:
        phantom.brain_atlas.cache_clear()
    assert case.mask.mean() > 0.1
    assert caplog.text.count("nilearn") == 2  # the package and how to install it, in one line
    assert len(caplog.records) == 1


def test_cached_cases_come_back_as_they_were(tmp_path):
    made = load_phantom("test", 1, num_slices=1, cache_dir=tmp_path, size=48)
    read = load_phantom("test", 1, num_slices=1, cache_dir=tmp_path, size=48)
    assert [case.case_id for case in read] == [case.case_id for case in made]
    assert len(made) == len(PROTOCOLS) and not list(tmp_path.rglob("*.tmp"))
    for one, two in zip(made, read, strict=True):
        assert (one.spacing, one.axis, one.region) == (two.spacing, two.axis, two.region)
        assert tuple(two.images) == PROTOCOLS[one.region, one.protocol]
        assert all(np.array_equal(one.images[name], two.images[name]) for name in one.images)
        assert np.array_equal(one.lesion, two.lesion) and two.mask.dtype == bool
    assert pickle.loads(pickle.dumps(made[0])).case_id == made[0].case_id
