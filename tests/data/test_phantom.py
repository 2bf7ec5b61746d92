import builtins
import hashlib
import pickle

import numpy as np
import pytest
from scipy import ndimage

from synermedgen_hf.data import phantom_anatomy
from synermedgen_hf.data.phantom import PROTOCOLS, VOLUMES, load_phantom, simulate_case, simulate_volume

SIZE, SLICES = 64, 3

# The bundled weights were trained on these pictures: `simulate_case` with seed 3, 3 slices and 64 pixels, before there
# were volumes. SHA-256 of float32 rounded to three decimals; mean, standard deviation and mean under a ramp.
GOLDEN = {
    "brain/synthrad/MRI": ("39efab2f3b448272", 871.1603, 790.7148, 409.5505),
    "brain/synthrad/CT": ("d25c29aaf8025f88", -388.631, 607.4706, -212.9151),
    "brain/synthrad/CBCT": ("c5f3d90104769c61", -399.7546, 586.3394, -217.7746),
    "brain/synthrad/mask": ("c61ccc9777e67038", 0.5272624, 0.4992562, 0.2462638),
    "brain/synthrad/lesion": ("2aae7dc846aaf25f", 0, 0, 0),
    "pelvis/synthrad/MRI": ("6d11e0e51498addc", 1018.091, 973.7014, 502.0327),
    "pelvis/synthrad/CT": ("55c3e68871f072b6", -425.0029, 537.6633, -212.4372),
    "pelvis/synthrad/CBCT": ("1fda914833f5cb37", -455.9193, 528.0828, -228.8767),
    "pelvis/synthrad/mask": ("e7230a289e4781a2", 0.5476345, 0.4977258, 0.2739098),
    "pelvis/synthrad/lesion": ("1c02730953829883", 0, 0, 0),
    "brain/brats/T1": ("82148f2d69063c4d", 105.8546, 170.593, 49.39072),
    "brain/brats/T1CE": ("017f23da5ae84184", 566.5271, 910.2894, 262.5113),
    "brain/brats/T2": ("8df56115289b41ce", 140.2257, 237.6988, 63.57132),
    "brain/brats/FLAIR": ("980332b3a6e659f6", 512.9939, 834.3728, 234.5999),
    "brain/brats/mask": ("db8b46326a3dff1e", 0.2882487, 0.4529474, 0.1336193),
    "brain/brats/lesion": ("213345824000681e", 0.005533854, 0.07418376, 0.00111934),
    "whole-body/autopet/CT": ("2fd8ea1af3bf65e0", -478.4905, 497.5832, -201.6729),
    "whole-body/autopet/PET": ("d3fde6a3da3f72b9", 0.5503155, 1.062526, 0.3028461),
    "whole-body/autopet/mask": ("37e0bfe488280e82", 0.5231481, 0.4994639, 0.2967885),
    "whole-body/autopet/lesion": ("0a182a88ffcf20dc", 0, 0, 0),
}


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


@pytest.mark.parametrize("name", GOLDEN)
def test_cases_are_those_the_bundled_weights_know(cases, name):
    region, protocol, content = name.split("/")
    case = cases[region, protocol]
    array = case.images[content] if content in case.images else getattr(case, content)
    checksum, *numbers = GOLDEN[name]
    rounded = (np.round(array.astype(np.float64), 3) + 0).astype(np.float32)
    if hashlib.sha256(rounded.tobytes()).hexdigest()[:16] != checksum:
        # Matrix products round differently on other processors, which the seventh digit shows at most.
        ramp = np.linspace(0, 1, array.size).reshape(array.shape)
        got = array.mean(dtype=np.float64), array.std(dtype=np.float64), (array * ramp).mean(dtype=np.float64)
        np.testing.assert_allclose(got, numbers, rtol=2e-6)


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
    tissue, brain, _, _ = phantom_anatomy.brain_anatomy(np.random.default_rng(0), z, 10.0, 96, tumour=False)
    shares = {
        name: tissue.fractions[phantom_anatomy.NAMES.index(name)][brain > 0.9].mean() for name in phantom_anatomy.NAMES
    }
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
    phantom_anatomy.brain_atlas.cache_clear()
    try:
        case = simulate_case("brain", "brats", 0, num_slices=2, size=48)
        simulate_case("brain", "brats", 1, num_slices=1, size=48)
    finally:
        phantom_anatomy.brain_atlas.cache_clear()
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


# Volumes: contiguous slices with a place in the patient.


@pytest.fixture(scope="module")
def volumes():
    return {key: simulate_volume(*key, seed=3, size=48) for key in VOLUMES}


def position(volume, name):
    """Mean place of a structure in mm towards the patient's right, front and head."""
    return volume.affine[:3, :3] @ np.argwhere(volume.structures[name]).mean(0) + volume.affine[:3, 3]


@pytest.mark.parametrize("key", VOLUMES)
def test_a_volume_is_a_grid_in_mm(volumes, key):
    volume = volumes[key]
    assert tuple(volume.images) == VOLUMES[key].modalities
    shape = volume.mask.shape
    for image in volume.images.values():
        assert image.shape == shape and image.dtype == np.float32 and np.isfinite(image).all()
    for inside in (volume.mask, volume.lesion, *volume.structures.values()):
        assert inside.shape == shape and inside.dtype == bool
    # Columns of the affine: steps along slices, rows and columns, as long as the spacing says.
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), volume.spacing)
    assert volume.axis == ("coronal" if key[0] == "whole-body" else "axial")
    towards = np.sign(volume.affine[:3, :3]) @ np.eye(3)
    if volume.axis == "axial":  # slices to the head, rows to the back, columns to the patient's left
        np.testing.assert_array_equal(towards, [[0, 0, -1], [0, -1, 0], [1, 0, 0]])
    else:  # slices to the front, rows to the feet, columns to the patient's left
        np.testing.assert_array_equal(towards, [[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    assert all(np.array_equal(transform, np.eye(4)) for transform in volume.transforms.values())
    assert volume.breathing_mm == 0


@pytest.mark.parametrize(
    ("key", "ratio", "covered_mm"),
    [
        (("brain", "synthrad"), 1, 114),
        (("pelvis", "synthrad"), 2.5, 165),
        (("abdomen", "synthrad"), 3, 215),
        (("brain", "brats"), 1, 155),
        (("whole-body", "autopet"), 1.5, 904),
    ],
)
def test_slice_distances_are_in_the_proportions_of_the_dataset(volumes, key, ratio, covered_mm):
    axial = 1 if key[0] == "whole-body" else 0
    volume = volumes[key]
    between, pixel = volume.spacing[axial], volume.spacing[2]
    assert between == pytest.approx(ratio * pixel)
    assert covered_mm - between < volume.mask.shape[axial] * between <= covered_mm


def test_slices_and_their_distance_can_be_chosen():
    volume = simulate_volume("pelvis", "synthrad", 0, size=48, num_slices=4, between=3, modalities=("CT",))
    assert volume.mask.shape[0] == 4 and volume.spacing[0] == 3
    assert len(simulate_volume("heart", "myops", 0, size=48, num_slices=90).mask) == 6  # there are no more
    # At the pixel of the real data the slices have the distance of the real data.
    assert simulate_volume("brain", "brats", 0, size=240, num_slices=1, modalities=("T1",)).spacing == (1, 1, 1)


@pytest.mark.parametrize("key", VOLUMES)
def test_structures_have_the_values_of_their_organs(volumes, key):
    volume = volumes[key]
    expected = {
        "brain": {"brain", "bone", "airway"},
        "pelvis": {"bone", "bladder", "prostate", "rectum"},
        "head-neck": {"brain", "bone", "airway", "spinal cord", "eyes", "parotids"},
        "thorax": {"lungs", "heart", "aorta", "liver", "bone"},
        "abdomen": {"liver", "kidneys", "spleen", "stomach", "pancreas", "bone"},
        "whole-body": {"brain", "lungs", "heart", "liver", "kidneys", "bladder", "bone"},
        "heart": {"left ventricle", "right ventricle", "myocardium", "oedema", "scar"},
    }[key[0]]
    assert expected <= set(volume.structures)
    parts = [inside for name, inside in volume.structures.items() if key[1] != "brats" or name != "brain"]
    assert sum(part.astype(int) for part in parts).max() == 1  # no two overlap
    if "CT" in volume.images:
        hu = {name: np.median(volume.images["CT"][inside]) for name, inside in volume.structures.items()}
        assert hu["bone"] > 180
        for name, low, high in (("lungs", -900, -500), ("liver", 30, 130), ("brain", 0, 60), ("bladder", -30, 60)):
            assert name not in hu or low < hu[name] < high


def test_organs_lie_where_they_belong(volumes):
    body = volumes["whole-body", "autopet"]
    right, front, up = 0, 1, 2
    assert position(body, "liver")[right] > position(body, "heart")[right] > position(body, "spleen")[right]
    heights = [position(body, name)[up] for name in ("bladder", "kidneys", "liver", "heart", "brain")]
    assert heights == sorted(heights)
    for key in (("abdomen", "synthrad"), ("thorax", "synthrad")):
        volume = volumes[key]
        assert position(volume, "liver")[right] > position(volume, "stomach")[right] + 30
        assert position(volume, "spinal cord")[front] < position(volume, "liver")[front]
    head = volumes["head-neck", "synthrad"]
    assert position(head, "eyes")[front] > position(head, "brain")[front] > position(head, "spinal cord")[front]
    assert position(head, "brain")[up] > position(head, "airway")[up]
    pet = body.images["PET"]
    assert pet[body.structures["bladder"]].mean() > 3 * pet[body.structures["liver"]].mean()


def test_the_four_tissues_of_a_tumour_are_told_apart(volumes):
    volume = next(
        v for v in (simulate_volume("brain", "brats", seed, size=64) for seed in range(9)) if "necrosis" in v.structures
    )
    brain, oedema, rim, core = (volume.structures[n] for n in ("brain", "oedema", "enhancing rim", "necrosis"))
    healthy = brain & ~oedema & ~rim & ~core
    t1ce, flair, t2 = (volume.images[name] for name in ("T1CE", "FLAIR", "T2"))
    assert not ((oedema | rim | core) & ~brain).any() and np.array_equal(volume.lesion, rim | core)
    assert t1ce[rim].mean() > 1.3 * t1ce[healthy].mean() and t1ce[core].mean() < t1ce[healthy].mean()
    assert flair[oedema].mean() > 1.2 * flair[healthy].mean() and t2[core].mean() > 1.5 * t2[healthy].mean()


def test_an_infarct_is_bright_late_and_its_oedema_in_t2(volumes):
    volume = volumes["heart", "myops"]
    mean = {
        image: {name: values[inside].mean() for name, inside in volume.structures.items()}
        for image, values in volume.images.items()
    }
    # At 7 mm a pixel of the wall is partly blood and fat, or the differences would be larger.
    assert mean["bSSFP"]["left ventricle"] > 1.15 * mean["bSSFP"]["myocardium"]
    assert mean["LGE"]["scar"] > mean["LGE"]["left ventricle"] > 1.5 * mean["LGE"]["myocardium"]
    assert mean["T2"]["oedema"] > 1.2 * mean["T2"]["myocardium"] > 1.5 * mean["T2"]["left ventricle"]
    np.testing.assert_array_equal(volume.lesion, volume.structures["oedema"] | volume.structures["scar"])


@pytest.mark.parametrize("key", [key for key, stack in VOLUMES.items() if "CT" not in stack.modalities[:1]])
def test_mr_has_one_scale_from_slice_to_slice(volumes, key):
    volume = volumes[key]
    tissue = volume.structures["brain"] if "brain" in volume.structures else volume.mask
    share = tissue.mean((1, 2))
    slices = np.flatnonzero(share > 0.5 * share.max())
    for name, image in volume.images.items():
        if name in ("CT", "CBCT"):
            continue
        # Anatomy changes from slice to slice, too, at 5 to 27 mm: a scale of its own for each would change it far more.
        levels = np.array([np.mean(image[i][tissue[i]]) for i in slices])
        steps = np.abs(np.diff(np.log(levels)))
        assert np.median(steps) < 0.12 and steps.max() < 0.45, name


def test_the_scale_of_mr_differs_from_volume_to_volume():
    peaks = [np.percentile(simulate_volume("heart", "myops", seed, 48).images["LGE"], 99) for seed in range(4)]
    assert max(peaks) > 1.2 * min(peaks)


@pytest.mark.parametrize("key", VOLUMES)
def test_a_volume_depends_on_its_arguments_alone(volumes, key):
    volume, again = volumes[key], simulate_volume(*key, seed=3, size=48)
    other = simulate_volume(*key, seed=4, size=48, modalities=VOLUMES[key].modalities[:1])
    for name, image in volume.images.items():
        np.testing.assert_array_equal(image, again.images[name])
    assert not np.array_equal(volume.images[VOLUMES[key].modalities[0]], other.images[VOLUMES[key].modalities[0]])
    assert volume.case_id == again.case_id != other.case_id
    np.testing.assert_array_equal(volume.affine, again.affine)


def test_a_modality_is_the_same_without_the_others(volumes):
    alone = simulate_volume("brain", "synthrad", seed=3, size=48, modalities=("CBCT",))
    assert tuple(alone.images) == ("CBCT",)
    np.testing.assert_array_equal(alone.images["CBCT"], volumes["brain", "synthrad"].images["CBCT"])


def test_visits_share_the_anatomy():
    first, second = (simulate_volume("whole-body", "autopet", 3, size=48, visit=visit) for visit in (0, 1))
    for name in ("liver", "brain"):
        np.testing.assert_array_equal(first.structures[name], second.structures[name])
    assert not np.array_equal(first.images["PET"], second.images["PET"])
    assert not np.array_equal(first.affine, second.affine)  # the patient lies elsewhere on the table
    assert first.case_id != second.case_id
    with_tumour = next(seed for seed in range(9) if simulate_volume("brain", "brats", seed, 48).lesion.any())
    sizes = [simulate_volume("brain", "brats", with_tumour, 48, visit=visit).lesion.sum() for visit in (0, 2)]
    assert sizes[1] > 1.3 * sizes[0]


@pytest.mark.parametrize("name", ["MRI", "CBCT"])
def test_misregistration_is_the_stated_one(name):
    options = dict(seed=1, size=64, num_slices=16, mr_sequence=("SPGR", True), modalities=("CT", name))
    aligned = simulate_volume("brain", "synthrad", **options)
    moved = simulate_volume("brain", "synthrad", **options, misregistration=True)
    np.testing.assert_array_equal(aligned.images["CT"], moved.images["CT"])
    np.testing.assert_array_equal(moved.transforms["CT"], np.eye(4))
    transform = moved.transforms[name]
    np.testing.assert_allclose(transform[:3, :3] @ transform[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.degrees(np.arccos((np.trace(transform[:3, :3]) - 1) / 2)) < 1.8  # up to 1 degree about each axis
    middle = aligned.affine @ [*(np.array(aligned.mask.shape) - 1) / 2, 1]
    assert 1 <= np.linalg.norm((transform @ middle - middle)[:3]) <= 2
    # Moving the aligned image as stated gives the moved one, but for noise and interpolation.
    pull = np.linalg.inv(aligned.affine) @ np.linalg.inv(transform) @ aligned.affine
    expected = ndimage.affine_transform(aligned.images[name], pull[:3, :3], pull[:3, 3], order=1, mode="nearest")
    surface = ndimage.binary_dilation(aligned.mask) & ~ndimage.binary_erosion(aligned.mask)
    left = np.abs(moved.images[name] - expected)[surface].mean()
    assert left < 0.6 * np.abs(moved.images[name] - aligned.images[name])[surface].mean()


def test_breathing_lifts_the_liver_in_the_pet_alone():
    options = dict(seed=5, size=64, between=4.0)
    still, breathing = (simulate_volume("whole-body", "autopet", **options, breathing=b) for b in (False, True))
    np.testing.assert_array_equal(still.images["CT"], breathing.images["CT"])
    assert 5 <= breathing.breathing_mm <= 15
    # The lift that turns one PET into the other, looked for around the dome.
    dome = np.flatnonzero(still.structures["liver"].any((0, 2)))[0]
    rows = slice(dome - 8, dome + 12)
    lifts = np.arange(0, 20, 0.5)
    rests = [
        np.abs(ndimage.shift(still.images["PET"], (0, -lift / 4, 0), order=1) - breathing.images["PET"])[:, rows].mean()
        for lift in lifts
    ]
    assert lifts[np.argmin(rests)] == pytest.approx(breathing.breathing_mm, abs=1)
    # Far from the diaphragm nothing moves.
    head = still.structures["brain"]
    assert np.corrcoef(still.images["PET"][head], breathing.images["PET"][head])[0, 1] > 0.99


def test_requests_for_volumes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="heart/myops"):
        simulate_volume("heart", "synthrad", 0)
    with pytest.raises(ValueError, match="size"):
        simulate_volume("heart", "myops", 0, size=16)
    with pytest.raises(ValueError, match="misregistration"):
        simulate_volume("brain", "brats", 0, misregistration=True)
    with pytest.raises(ValueError, match="breathing"):
        simulate_volume("brain", "brats", 0, breathing=True)
    with pytest.raises(ValueError, match="no PET"):
        simulate_volume("brain", "synthrad", 0, modalities=("PET",))
