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


def test_what_is_refused(slices):
    with pytest.raises(ValueError, match="psnr needs window="):
        metrics.load("psnr").compute(**slices)
    with pytest.raises(ValueError, match="from a lower to a higher"):
        metrics.load("ssim").compute(**slices, window=(3, 3))
    crossed = {**slices, "predictions": slices["predictions"][::-1]}
    with pytest.raises(ValueError, match=r"Slice 0: The prediction has shape \(190, 176\)"):
        metrics.load("mae").compute(**crossed)
    with pytest.raises(ValueError, match="no module 'fid'. Choose one of mae, rmse"):
        metrics.load("fid")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "synermedgen_hf.metrics.modules", raising=False)
    metrics.__dict__.pop("load", None)
    with pytest.raises(ImportError, match=r"synermedgen-hf\[metrics\]"):
        _ = metrics.load
