"""A record says how it was measured, the challenges' definitions to the last digit, and nothing unlike is mixed."""

import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

import synermedgen_hf
from synermedgen_hf.metrics import (
    PROTOCOLS,
    average,
    check_same_protocol,
    evaluate_case,
    ms_ssim,
    ms_ssim_synthrad2025,
    protocols,
    z_consistency,
)
from synermedgen_hf.metrics.protocols import find_body, same_measured
from synermedgen_hf.volumes.reading import Volume

MODALITY = {"brats": "T1"}


def head(*shape, seed=0):
    """Every tissue, in shells around an air cell, with -1024 around; in HU."""
    ends = [0.7] * (len(shape) - 2) + [1, 1]
    axes = np.meshgrid(*(np.linspace(-end, end, side) for end, side in zip(ends, shape, strict=True)), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    texture = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    image = 40 + 400 * texture
    image[radius < 0.35] = -700
    image[radius < 0.2] = -1000
    image[(radius > 0.5) & (radius < 0.55)] = -100
    image[(radius > 0.6) & (radius < 0.7)] += 1000
    image[radius > 0.8] = -1024
    return image


def pair(*shape, seed=0):
    """Prediction, reference and mask; in every slice there is something of the patient."""
    reference = head(*shape, seed=seed)
    return reference + np.random.default_rng(seed + 1).normal(0, 80, shape), reference, reference != -1024


def as_modality(image, modality):
    if modality in ("CT", "CBCT"):
        return image
    return np.clip(image + 1024, 0, None) / (200 if modality == "PET" else 1)


def without_nothing(record):
    """What JSON can hold, and the same after reading it back."""
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    return record


def synthrad2023_by_the_book(prediction, reference, mask):
    """The challenge's three figures from scikit-image, in its order of steps."""
    low, high = -1024, 3000
    mae = np.abs(reference[mask] - prediction[mask]).sum() / mask.sum()
    one, other = np.clip(prediction, low, high), np.clip(reference, low, high)
    psnr = 10 * np.log10((high - low) ** 2 / np.mean((one[mask] - other[mask]) ** 2))
    one, other = (np.where(mask, image, low) - low for image in (one, other))
    _, whole = structural_similarity(other, one, data_range=high - low, full=True)
    inner = (slice(3, -3),) * mask.ndim
    return mae, psnr, whole[inner][mask[inner]].mean(dtype=np.float64)


@pytest.mark.parametrize("shape", [(48, 44), (18, 40, 36)])
def test_synthrad2023_is_the_challenges(shape):
    prediction, reference, mask = pair(*shape)
    prediction[tuple(side // 2 for side in shape)] = 5000  # MAE is not clipped, PSNR and SSIM are
    metrics = evaluate_case(prediction, reference, mask)["metrics"]
    mae, psnr, ssim = synthrad2023_by_the_book(prediction, reference, mask)
    assert metrics["mae_hu_mask"] == pytest.approx(mae, rel=1e-10)
    assert metrics["psnr_hu_mask"] == pytest.approx(psnr, rel=1e-10)
    assert metrics["ssim_hu_mask"] == pytest.approx(ssim, rel=1e-10)


def test_noise_of_80_hu_has_the_figures_that_noise_of_80_hu_must_have():
    rng = np.random.default_rng(0)
    reference = rng.uniform(-500, 2000, (20, 60, 60))
    metrics = evaluate_case(reference + rng.normal(0, 80, reference.shape), reference, reference > -600)["metrics"]
    assert metrics["mae_hu_mask"] == pytest.approx(80 * np.sqrt(2 / np.pi), rel=0.01)
    assert metrics["psnr_hu_mask"] == pytest.approx(20 * np.log10(4024 / 80), abs=0.05)


def test_synthrad2025_has_its_range_and_its_ms_ssim():
    prediction, reference, mask = pair(18, 40, 36)
    record = evaluate_case(prediction, reference, mask, protocol="synthrad2025")
    assert record["protocol"]["range"] == [-1024, 3071]
    one, other = (np.where(mask, np.clip(image, -1024, 3071) + 1024, 0) for image in (prediction, reference))
    expected = ms_ssim_synthrad2025(one, other, 4095, mask)
    assert record["metrics"]["ms_ssim_hu_mask"] == pytest.approx(expected, rel=1e-12)
    error = np.clip(prediction, -1024, 3071)[mask] - np.clip(reference, -1024, 3071)[mask]
    assert record["metrics"]["psnr_hu_mask"] == pytest.approx(10 * np.log10(4095**2 / np.mean(error**2)))


def test_brats_scales_by_percentiles_of_the_reference():
    prediction, reference, mask = (as_modality(image, "T1") for image in pair(40, 44))
    mask = mask > 0
    record = evaluate_case(prediction, reference, mask, protocol="brats", modality="T1")
    low, high = np.percentile(reference[reference > 0], [0.5, 99.5])
    assert record["measured"]["range"] == pytest.approx([low, high])
    one, other = (np.clip((image - low) / (high - low), 0, 1) for image in (prediction, reference))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    _, whole = structural_similarity(one, other, full=True, **options)
    assert record["metrics"]["ssim_norm_mask"] == pytest.approx(whole[5:-5, 5:-5][mask[5:-5, 5:-5]].mean(), rel=1e-10)
    assert record["metrics"]["mse_norm_mask"] == pytest.approx(((one - other)[mask] ** 2).mean(), rel=1e-10)

    *images, mask = pair(4, 40, 44)
    images = [as_modality(image, "T1") for image in images]
    volume = evaluate_case(*images, mask, protocol="brats", modality="T1")
    low, high = volume["measured"]["range"]
    one, other = (np.clip((image - low) / (high - low), 0, 1) for image in images)
    assert volume["metrics"]["mae_dz_norm_mask"] == pytest.approx(z_consistency(one, other, mask), rel=1e-10)


def test_paper_frame_is_made_of_grey_slices():
    prediction, reference, mask = pair(4, 40, 44)
    assert mask.any((1, 2)).all()
    record = evaluate_case(prediction, reference, mask, protocol="paper_frame")
    grey = [np.round((np.clip(image, -1024, 3071) + 1024) / 4095 * 255) for image in (prediction, reference)]
    ssim = [structural_similarity(*slices, data_range=255) for slices in zip(*grey, strict=True)]
    assert record["metrics"]["ssim_u8_frame"] == pytest.approx(np.mean(ssim), rel=1e-10)
    assert record["metrics"]["mae_u8_frame"] == pytest.approx(np.abs(grey[0] - grey[1]).mean(), rel=1e-10)
    roots = np.sqrt(np.square(grey[0] - grey[1]).mean((1, 2)))
    assert record["metrics"]["rmse_u8_frame"] == pytest.approx(roots.mean(), rel=1e-10)
    psnr = [10 * np.log10(255**2 / np.mean((one - other) ** 2)) for one, other in zip(*grey, strict=True)]
    assert record["metrics"]["psnr_u8_frame"] == pytest.approx(np.mean(psnr), rel=1e-10)
    inside = [np.abs(one - other)[own].mean() for one, other, own in zip(prediction, reference, mask, strict=True)]
    assert record["metrics"]["mae_hu_mask"] == pytest.approx(np.mean(inside), rel=1e-10)
    assert record["protocol"]["dimensions"] == "2D, mean over the slices of a volume"
    assert record["metrics"]["mae_dz_hu_mask"] == z_consistency(prediction, reference, mask)

    prediction, reference, mask = pair(2, 128, 112)
    large = evaluate_case(prediction, reference, mask, protocol="paper_frame")["metrics"]
    grey = [np.round((np.clip(image, -1024, 3071) + 1024) / 4095 * 255) for image in (prediction, reference)]
    coarse = [ms_ssim(*slices, 255, kernel="uniform") for slices in zip(*grey, strict=True)]
    assert large["ms_ssim_u8_frame"] == pytest.approx(np.mean(coarse), rel=1e-12)


def test_slices_with_nothing_but_background_are_left_out_of_the_mean():
    """They are always like themselves, and a volume has many beyond the patient."""
    prediction, reference, mask = pair(6, 40, 44)
    prediction[:2], reference[:2], mask[:2] = -1024, -1024, False
    whole = evaluate_case(prediction, reference, mask, protocol="paper_frame")["metrics"]
    inner = evaluate_case(prediction[2:], reference[2:], mask[2:], protocol="paper_frame")["metrics"]
    for name in ("ssim_u8_frame", "psnr_u8_frame", "ssim_u8_mask", "psnr_u8_mask", "mae_u8_mask", "mae_hu_mask"):
        assert whole[name] == pytest.approx(inner[name], rel=1e-9), name
    assert whole["mae_hu_frame"] == pytest.approx(inner["mae_hu_frame"] * 4 / 6)  # an error of zero is one


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_constant_images_have_errors_and_no_structure(protocol):
    modality = MODALITY.get(protocol, "CT")
    one, other = np.full((20, 40, 40), 150.0), np.full((20, 40, 40), 100.0)
    record = without_nothing(evaluate_case(one, other, np.ones(one.shape, bool), protocol, modality))
    assert all(value is None for name, value in record["metrics"].items() if "ssim" in name)
    if modality == "CT":
        assert record["metrics"]["mae_hu_mask"] == record["metrics"]["rmse_hu_mask"] == 50
    else:  # without a range of its own there is no scale from 0 to 1
        assert all(value is None for value in record["metrics"].values())


def test_background_flatters_the_frame_and_not_the_area():
    prediction, reference, mask = pair(48, 48)
    prediction[~mask] = reference[~mask] = -1024
    images = prediction, reference, mask
    padded = [np.pad(image, 40, constant_values=low) for image, low in zip(images, (-1024, -1024, False), strict=True)]
    for protocol in PROTOCOLS.keys() - {"brats", "synthrad2025"}:
        before, after = (evaluate_case(*own, protocol=protocol)["metrics"] for own in (images, padded))
        assert {name: value for name, value in before.items() if "frame" not in name} == pytest.approx(
            {name: value for name, value in after.items() if "frame" not in name}, rel=1e-9
        )
        if protocol == "paper_frame":
            assert 1 - after["ssim_u8_frame"] < (1 - before["ssim_u8_frame"]) / 3
            assert after["psnr_u8_frame"] > before["psnr_u8_frame"] + 3


@pytest.mark.parametrize(
    ("protocol", "modality"),
    [
        (protocol, modality)
        for protocol in PROTOCOLS
        for modality in ("CT", "CBCT", "PET", "MRI", "T1")
        if protocol != "brats" or modality in ("MRI", "T1")  # which judges MR alone
    ],
)
def test_records_of_a_stamp_have_the_same_names(protocol, modality):
    """However little an image shows, no figure vanishes: it is None, with the reason."""
    prediction, reference, mask = pair(20, 40, 40)
    prediction, reference = as_modality(prediction, modality), as_modality(reference, modality)
    options = {"protocol": protocol, "modality": modality}
    if modality in ("MRI", "T1") and protocol != "brats":
        options["window"] = (0, 2000)  # otherwise its errors have no unit
    full = without_nothing(evaluate_case(prediction, reference, mask, **options))
    empty = without_nothing(evaluate_case(prediction, reference, mask & False, **options))
    flat = without_nothing(evaluate_case(prediction, np.full_like(reference, reference.min()), mask, **options))
    assert full["metrics"].keys() == empty["metrics"].keys() == flat["metrics"].keys()
    assert full["protocol"] == empty["protocol"] == flat["protocol"]
    assert full["undefined"].keys() <= {"ms_ssim_u8_frame"}  # which needs 112 pixels a side
    assert all(isinstance(value, float) or name in full["undefined"] for name, value in full["metrics"].items())
    for record in (empty, flat):
        assert record["undefined"].keys() == {name for name, value in record["metrics"].items() if value is None}
    assert {name for name, value in empty["metrics"].items() if value is not None} == {
        name for name in full["metrics"] if name.endswith("_frame") and name not in full["undefined"]
    }
    assert all(flat["metrics"][name] is None for name in flat["metrics"] if "ssim" in name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_image_with_itself(protocol):
    modality = MODALITY.get(protocol, "CT")
    _, reference, mask = pair(20, 40, 40)
    reference = as_modality(reference, modality)
    record = evaluate_case(reference, reference, mask, protocol, modality)
    for name, value in record["metrics"].items():
        if name.startswith("psnr"):
            assert value is None and "infinite" in record["undefined"][name]
        elif name == "ms_ssim_u8_frame":
            assert value is None and "needs at least 112 voxels" in record["undefined"][name]
        else:
            assert value == (1 if name.startswith(("ssim", "ms_ssim", "dice")) else 0), name


def test_figures_of_the_modality():
    prediction, reference, mask = pair(20, 40, 40)
    ct = evaluate_case(reference + 50, reference, mask)["metrics"]
    assert [ct[f"mae_hu_{tissue}"] for tissue in ("air", "lung", "fat", "soft", "bone")] == pytest.approx([50] * 5)
    assert ct["mae_dz_hu_mask"] == pytest.approx(0)
    pet = evaluate_case(as_modality(reference, "PET") + 1, as_modality(reference, "PET"), mask, modality="PET")
    assert pet["metrics"]["error_suvmean_mask"] == pet["metrics"]["error_suvmax_mask"] == pytest.approx(1)
    assert not any("hu" in name.split("_") for name in pet["metrics"])
    assert "mae_dz_hu_mask" not in evaluate_case(prediction[10], reference[10], mask[10])["metrics"]


def test_without_a_mask_the_body_is_found_and_named():
    prediction, reference, _ = pair(20, 40, 40)
    reference[:, :2, :2] = 50  # a speck beside the patient
    record = evaluate_case(prediction, reference)
    assert {name.rsplit("_", 1)[1] for name in record["metrics"]} >= {"body"} and "mae_hu_mask" not in record["metrics"]
    assert record["protocol"]["area"].startswith("body: reference above -400 HU")
    body = find_body(reference, "CT")
    assert record["measured"]["voxels"] == body.sum()
    assert body[10, 20, 20] and reference[10, 20, 20] == -1000  # the air inside
    assert not body[:, :2, :2].any()
    assert not find_body(np.full((5, 5), -1024.0), "CT").any()
    assert not find_body(np.zeros((5, 5)), "T1").any()
    for modality in ("PET", "MRI"):
        assert find_body(as_modality(head(20, 40, 40), modality), modality)[10, 20, 20]


def test_slices_of_mr_are_on_the_scale_of_their_volume():
    prediction, reference, mask = pair(20, 40, 40)
    prediction, reference = as_modality(prediction, "T1"), as_modality(reference, "T1")
    own = [evaluate_case(prediction[z], reference[z], mask[z], modality="T1") for z in (2, 10)]
    assert own[0]["measured"]["range"] != own[1]["measured"]["range"]
    common = [evaluate_case(prediction[z], reference[z], mask[z], modality="T1", window=(0, 2000)) for z in (2, 10)]
    assert [record["measured"]["range"] for record in common] == [[0, 2000]] * 2
    check_same_protocol(common)
    with pytest.raises(ValueError, match="range: '0 to the 99.5th percentile.*0.0, 2000.0"):
        check_same_protocol([own[0], common[0]])


@pytest.mark.parametrize("protocol", ["synthrad2023", "synthrad2025", "paper_frame"])
def test_errors_of_mr_need_a_scale(protocol):
    """The same scan a hundred times as bright has the same SSIM and PSNR, and other errors in arbitrary units."""
    prediction, reference, mask = pair(20, 40, 40)
    prediction, reference = as_modality(prediction, "T1"), as_modality(reference, "T1")
    options = {"mask": mask, "protocol": protocol, "modality": "T1"}
    bright = {"prediction": 100 * prediction, "reference": 100 * reference}
    own = [evaluate_case(prediction, reference, **options), evaluate_case(**bright, **options)]
    found = average(own)
    errors = {name for name in own[0]["metrics"] if name.startswith(("mae_", "rmse_")) and "_u8_" not in name}
    assert (
        errors and {name for name, value in found["metrics"].items() if value is None} - {"ms_ssim_u8_frame"} == errors
    )
    assert all("MR has no absolute scale" in own[0]["undefined"][name] for name in errors)
    assert found["metrics"]["psnr_au_mask"] == pytest.approx(own[0]["metrics"]["psnr_au_mask"], rel=1e-5)
    # On a stated scale they are defined, and unlike scales are not mixed.
    stated = [
        evaluate_case(prediction, reference, window=(0, 2000), **options),
        evaluate_case(**bright, window=(0, 200000), **options),
    ]
    for name in errors:
        assert stated[1]["metrics"][name] == pytest.approx(100 * stated[0]["metrics"][name], rel=1e-5)
    for refuse in (check_same_protocol, average):
        with pytest.raises(ValueError, match=r"range: \[0.0, 2000.0\] and \[0.0, 200000.0\]"):
            refuse(stated)


def test_the_body_of_a_slice_of_mr_is_found_on_the_scale_of_its_volume():
    """Beyond the patient a slice holds noise alone, most of which is above 5 % of its own maximum."""
    noise = np.abs(np.random.default_rng(0).normal(0, 10, (40, 40)))
    assert evaluate_case(noise, noise, modality="T1")["measured"]["voxels"] > 1000
    record = evaluate_case(noise, noise, modality="T1", window=(0, 1000))
    assert record["measured"]["voxels"] == 0
    assert record["protocol"]["area"].startswith("body: reference above 5 % of the range's high end")


def test_a_stamp_says_what_is_left_out():
    prediction, reference, mask = pair(20, 40, 40)
    for protocol in PROTOCOLS:
        stamp = evaluate_case(prediction + 2e3, reference + 2e3, mask, protocol, MODALITY.get(protocol, "CT"))
        said = " ".join(map(str, stamp["protocol"].values()))
        assert "infinite" in said and "one value" in said


def test_volumes_are_compared_where_they_lie():
    prediction, reference, mask = (image.transpose(1, 2, 0) for image in pair(20, 40, 40))
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    record = evaluate_case(Volume(prediction, affine), Volume(reference, affine), Volume(mask, affine))
    assert record["measured"]["spacing"] == [3, 1, 1] and record["measured"]["shape"] == [20, 40, 40]
    turned = [image.transpose(2, 1, 0)[:, ::-1, ::-1] for image in (prediction, reference, mask)]
    assert record["metrics"] == pytest.approx(evaluate_case(*turned)["metrics"], rel=1e-12)

    moved = affine.copy()
    moved[0, 3] = 5
    with pytest.raises(ValueError, match="(?s)prediction and the reference lie on different grids.*5.0"):
        evaluate_case(Volume(prediction, affine), Volume(reference, moved))
    with pytest.raises(ValueError, match="reference and the mask lie on different grids|prediction and the mask lie"):
        evaluate_case(Volume(prediction, affine), Volume(reference, affine), Volume(mask, moved))
    across = [image.transpose(0, 2, 1) for image in (prediction, reference, mask)]
    affine = np.diag([1.0, 3.0, 1.0, 1.0])
    coronal = evaluate_case(*(Volume(image, affine) for image in across))
    assert (record["protocol"]["axis"], coronal["protocol"]["axis"]) == ("axial", "coronal")
    with pytest.raises(ValueError, match="axis: 'axial' and 'coronal'"):
        average([record, coronal])
    with pytest.raises(ValueError, match="the reference an array without"):
        evaluate_case(Volume(prediction, affine), reference)
    with pytest.raises(ValueError, match="the mask an array without an affine"):
        evaluate_case(Volume(prediction, affine), Volume(reference, affine), mask)


def test_a_volume_says_what_it_is():
    rng = np.random.default_rng(0)
    one, other = (rng.uniform(0, 900, (12, 12, 12)).astype(np.float32) for _ in range(2))
    made, true = (Volume(array, np.eye(4), modality, "a.u.") for array, modality in ((one, "T2"), (other, "T2")))
    assert evaluate_case(made, true)["protocol"]["modality"] == "T2"
    assert evaluate_case(Volume(one, np.eye(4)), Volume(other, np.eye(4)))["protocol"]["modality"] == "CT"
    # A scanner says MR and no more, and a CBCT may be held against a CT.
    assert evaluate_case(made, Volume(other, np.eye(4), "MRI"), modality="T2")["protocol"]["modality"] == "T2"
    evaluate_case(Volume(one, np.eye(4), "CBCT", "HU"), Volume(other, np.eye(4), "CT", "HU"))
    with pytest.raises(ValueError, match=r"CT is compared in HU, and the prediction is T2 in a\.u\."):
        evaluate_case(made, true, modality="CT")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"protocol": "mine"}, "no protocol 'mine'. Choose one of synthrad2023, synthrad2025, brats, paper_frame"),
        ({"modality": "MR"}, "no modality 'MR'"),
        ({"protocol": "brats"}, "'brats' is for MR, and the images are CT"),
        ({"window": (3000, -1024)}, r"got \(3000, -1024\)"),
        ({"window": (5, 5)}, "from a lower to a higher"),
        ({"spacing": (1, 1)}, "3 lengths in mm"),
        ({"spacing": (1, 0, 1)}, "3 lengths in mm above zero"),
        ({"prediction": np.zeros((20, 40, 39))}, r"shape \(20, 40, 39\) and the reference \(20, 40, 40\)"),
        ({"mask": np.ones((40, 40), bool)}, r"mask has shape \(40, 40\)"),
        ({"prediction": np.full((20, 40, 40), np.nan)}, "32000 of 32000 values of the prediction are NaN"),
        ({"mask": np.full((20, 40, 40), np.nan)}, "32000 of 32000 values of the mask are NaN"),
    ],
)
def test_what_is_refused(arguments, says):
    prediction, reference, mask = pair(20, 40, 40)
    with pytest.raises(ValueError, match=says):
        evaluate_case(**{"prediction": prediction, "reference": reference, "mask": mask, **arguments})


def test_means_tell_another_scan_on_the_same_grid():
    prediction, reference, mask = pair(20, 40, 40)
    one, same, mirrored, brighter = (
        evaluate_case(prediction, image, mask)["measured"]
        for image in (reference, reference * (1 + 1e-7), reference[:, :, ::-1] + 30 * (mask > 0), reference * 1.01)
    )
    first = reference[:10, :20, :20]
    assert len(one["means"]) == 8 and one["means"][0] == pytest.approx(first.mean())
    assert same_measured(one, same) == []
    assert same_measured(one, mirrored) == same_measured(one, brighter) == ["the reference's values"]
    assert same_measured(one, {**one, "shape": [1, 2, 3]}) == ["shape [20, 40, 40] and [1, 2, 3]"]


def test_averages_by_hand():
    prediction, reference, mask = pair(20, 40, 40)
    records = [evaluate_case(reference + 10, reference, mask), evaluate_case(reference + 40, reference, mask)]
    records.append(evaluate_case(reference, reference, mask & False))
    found = without_nothing(average(records))
    assert found["metrics"]["mae_hu_mask"] == pytest.approx(25) and found["n"]["mae_hu_mask"] == 2
    assert found["protocol"] == records[0]["protocol"]
    assert average(records[2:])["metrics"]["mae_hu_mask"] is None
    with pytest.raises(ValueError, match="no records"):
        average([])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"protocol": "synthrad2025"}, r"range: \[-1024.0, 3000.0\] and \[-1024.0, 3071.0\]"),
        ({"modality": "CBCT"}, "modality: 'CT' and 'CBCT'"),
        ({"mask": None}, "area: 'mask: as given' and 'body"),
        ({"window": (-1000, 1000)}, "range: "),
        ({"level": 10}, "dimensions: '3D' and '2D'"),
    ],
)
def test_unlike_records_are_not_mixed(other, says):
    images = dict(zip(("prediction", "reference", "mask"), pair(20, 40, 40), strict=True))
    records = [evaluate_case(**images)]
    if (level := other.pop("level", None)) is not None:
        images = {name: image[level] for name, image in images.items()}
    records.append(evaluate_case(**{**images, **other}))
    for refuse in (check_same_protocol, average):
        with pytest.raises(ValueError, match=says):
            refuse(records)


def test_a_record_without_a_stamp_is_worth_nothing():
    with pytest.raises(ValueError, match="Record 0 carries no protocol"):
        average([{"metrics": {"mae": 20.21}}])


def test_a_change_of_definition_is_another_stamp(monkeypatch):
    images = pair(20, 40, 40)
    before = evaluate_case(*images)
    monkeypatch.setattr(protocols, "VERSION", protocols.VERSION + 1)
    with pytest.raises(ValueError, match="library: 'synermedgen_hf.metrics 4' and 'synermedgen_hf.metrics 5'"):
        check_same_protocol([before, evaluate_case(*images)])


def test_it_is_at_hand():
    assert synermedgen_hf.metrics.evaluate_case is evaluate_case
    assert "evaluate_case" in dir(synermedgen_hf.metrics)
    with pytest.raises(AttributeError, match="no attribute 'accuracy'"):
        _ = synermedgen_hf.metrics.accuracy
