"""The modules of `evaluate` give what the functions give."""

import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

evaluate = pytest.importorskip("evaluate")

from synermedgen_hf import metrics  # noqa: E402
from synermedgen_hf.metrics.modules import FOLDER, NAMES  # noqa: E402

WINDOW = (-1024, 3000)


@pytest.fixture(scope="module")
def slices():
    """Two pairs in HU, one as integers; of two sizes, large enough for five scales."""
    rng = np.random.default_rng(0)
    references = [2000 * gaussian_filter(rng.standard_normal(shape), 2) for shape in ((176, 180), (190, 176))]
    references = [references[0].astype(np.int16), references[1].astype(np.float32)]
    predictions = [(one + rng.normal(0, 60, one.shape)).astype(np.float32) for one in references]
    return {"predictions": predictions, "references": references}


def by_function(name, slices, window):
    function, found = getattr(metrics, name), []
    for one, other in zip(slices["predictions"], slices["references"], strict=True):
        if window is not None:
            one, other = (np.clip(image, *window).astype(np.float64) - window[0] for image in (one, other))
        ranged = () if name in ("mae", "rmse") else (window[1] - window[0],)
        found.append(function(one, other, *ranged))
    return np.mean(found)


@pytest.mark.parametrize("name", NAMES)
def test_as_the_functions(name, slices):
    found = metrics.load(name).compute(**slices, window=WINDOW)
    assert found[f"{name}_frame"] == pytest.approx(by_function(name, slices, WINDOW), rel=1e-9)
    assert found[f"{name}_protocol"]["range"] == [-1024, 3000]


def test_by_path_and_in_parts(slices):
    module = evaluate.load(str(FOLDER / "synermedgen_mae"))
    module.add(prediction=slices["predictions"][0], reference=slices["references"][0])
    module.add_batch(predictions=slices["predictions"][1:], references=slices["references"][1:])
    found = module.compute()
    assert found["mae_frame"] == pytest.approx(by_function("mae", slices, None), rel=1e-9)
    assert found["mae_protocol"]["window"] == "unclipped"


def test_combined(slices):
    found = metrics.combine().compute(**slices, window=WINDOW)
    for name in NAMES:
        assert found[f"{name}_frame"] == pytest.approx(by_function(name, slices, WINDOW), rel=1e-9)


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim"])
def test_a_slice_without_the_figure_does_not_spoil_the_mean(name, slices):
    """As in the records of `evaluate_case`: nothing differs, or nothing but background."""
    flat = np.full((176, 176), -1024, np.float32)
    more = {side: [images[0], flat, images[1]] for side, images in slices.items()}
    found = metrics.load(name).compute(**more, window=WINDOW)
    assert found[f"{name}_frame"] == pytest.approx(by_function(name, slices, WINDOW), rel=1e-9)
    assert list(found[f"{name}_undefined"]) == [1]
    found = metrics.load(name).compute(predictions=[flat], references=[flat], window=WINDOW)
    assert found[f"{name}_frame"] is None


@pytest.fixture(scope="module")
def volumes():
    """Two pairs of volumes in HU of two sizes, with masks."""
    rng = np.random.default_rng(0)
    references = [2000 * gaussian_filter(rng.standard_normal(shape), 2) for shape in ((9, 20, 24), (8, 24, 20))]
    references = [one.astype(np.float32) for one in references]
    predictions = [(one + rng.normal(0, 60, one.shape)).astype(np.float32) for one in references]
    return {"predictions": predictions, "references": references}, [one > -100 for one in references]


def averaged(pairs, masks, **options):
    together = zip(pairs["predictions"], pairs["references"], masks, strict=True)
    return metrics.average([metrics.evaluate_case(*own, **options) for own in together])


def test_volumes_in_masks_under_a_protocol(volumes):
    pairs, masks = volumes
    found = metrics.load("case").compute(**pairs, masks=masks, protocol="synthrad2025", modality="CBCT")
    assert found == averaged(pairs, masks, protocol="synthrad2025", modality="CBCT")
    assert found["n"]["mae_hu_mask"] == 2 and found["metrics"]["mae_dz_hu_mask"] > 0


def test_slices_without_masks_and_one_by_one(slices):
    module = metrics.load("case")
    for one, other in zip(slices["predictions"], slices["references"], strict=True):
        module.add(prediction=one, reference=other)
    assert module.compute(protocol="paper_frame") == averaged(slices, [None, None], protocol="paper_frame")


def test_cases_that_cannot_be_judged(volumes):
    pairs, masks = volumes
    with pytest.raises(ValueError, match="There are 1 masks for 2 pairs"):
        metrics.load("case").compute(**pairs, masks=masks[:1])
    with pytest.raises(ValueError, match="Pair 0: The mask has shape"):
        metrics.load("case").compute(**pairs, masks=masks[::-1])


def test_what_is_refused(slices):
    with pytest.raises(ValueError, match="psnr needs window="):
        metrics.load("psnr").compute(**slices)
    with pytest.raises(ValueError, match="from a lower to a higher"):
        metrics.load("ssim").compute(**slices, window=(3, 3))
    crossed = {**slices, "predictions": slices["predictions"][::-1]}
    with pytest.raises(ValueError, match=r"Slice 0: The prediction has shape \(190, 176\)"):
        metrics.load("mae").compute(**crossed)
    with pytest.raises(ValueError, match="no module 'fid'. Choose one of mae, rmse, psnr, ssim, ms_ssim, case"):
        metrics.load("fid")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "synermedgen_hf.metrics.modules", raising=False)
    metrics.__dict__.pop("load", None)
    with pytest.raises(ImportError, match=r"synermedgen-hf\[metrics\]"):
        _ = metrics.load
