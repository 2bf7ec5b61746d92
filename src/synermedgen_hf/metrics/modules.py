"""The metrics as modules of Hugging Face's `evaluate`: `load("ssim").compute(predictions=..., references=...)`.

Each module is a file of its own under `evaluate_modules/`, as `evaluate.load` wants it; what they share is here.
`case` is [`~synermedgen_hf.metrics.evaluate_case`]: all figures of a protocol, of slices or volumes, inside masks. The
others are one figure each, of whole slices.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from datasets import Features, Image

from .inputs import UndefinedMetric, check_pair, check_window
from .protocols import VERSION

try:
    import evaluate
except ImportError:
    raise ImportError(
        "Modules of `evaluate` need that library: pip install 'synermedgen-hf[metrics]'. The functions of "
        "`synermedgen_hf.metrics` do not."
    ) from None

FOLDER = Path(__file__).parent / "evaluate_modules"
NAMES = ("mae", "rmse", "psnr", "ssim", "ms_ssim")  # of one figure
INPUTS = """
Args:
    predictions, references (`list[np.ndarray]`): Slices `(rows, columns)` in one unit, of any size; pairs must have one
        shape. Of float32 or whole numbers, and kept as float32; make half precision float32 first.
    window (`tuple[float, float]`): Both are clipped to it first, and its width is the data range, such as
        `(-1024, 3000)` in HU. MAE and RMSE do without: then nothing is clipped.

Returns:
    `dict`: `<name>_frame`, the mean over the slices in which it is defined, each taken whole, or `None`;
    `<name>_undefined`, the place of each other slice, and the reason; `<name>_protocol`, what that means.
"""


def load(name: str, **options) -> "evaluate.Metric":
    """
    One of the modules.

    Args:
        name (`str`): `"mae"`, `"rmse"`, `"psnr"`, `"ssim"`, `"ms_ssim"`, or `"case"` for all figures of a protocol.
        options: Of `evaluate.load`, such as `num_process` and `process_id`.

    Returns:
        `evaluate.Metric`: With `compute`, `add` and `add_batch`.

    Raises:
        `ValueError`: There is no such module.
    """
    if name not in (*NAMES, "case"):
        raise ValueError(f"There is no module {name!r}. Choose one of {', '.join(NAMES)}, case.")
    return evaluate.load(str(FOLDER / f"synermedgen_{name}"), **options)


def combine(names: Iterable[str] = NAMES) -> "evaluate.CombinedEvaluations":
    """Several modules of one figure in one, as of `evaluate.combine`; their `compute` shares one `window`."""
    return evaluate.combine([load(name) for name in names])


class SliceMetric(evaluate.Metric):
    """What those of one figure share. A subclass says `name`, `about`, `needs_window`, and how a pair is compared."""

    name: str
    about: str
    needs_window = True
    compare: Callable[[np.ndarray, np.ndarray, float | None], float]

    def _info(self):
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description=INPUTS,
            features=Features({"predictions": Image(), "references": Image()}),
        )

    def _compute(self, predictions, references, window=None):
        if window is None and self.needs_window:
            raise ValueError(f"{self.name} needs window=(low, high): without a range of values it has no meaning.")
        low, high = (None, None) if window is None else check_window(window)
        found, undefined = [], {}
        for place, pair in enumerate(zip(predictions, references, strict=True)):
            try:
                one, other, _ = check_pair(*map(np.asarray, pair))
                if window is not None:
                    one, other = (np.clip(image, low, high).astype(np.float64) - low for image in (one, other))
                found.append(type(self).compare(one, other, None if window is None else high - low))
            except UndefinedMetric as reason:
                undefined[place] = str(reason)
            except ValueError as error:
                raise ValueError(f"Slice {place}: {error}") from error
        stamp = {
            "range": None if window is None else [low, high],
            "window": "unclipped" if window is None else "clipped to the range",
            "area": "frame",
            "dimensions": "2D, mean over slices",
            "about": self.about,
            "library": f"synermedgen_hf.metrics {VERSION}",
        }
        return {
            f"{self.name}_frame": float(np.mean(found)) if found else None,
            f"{self.name}_undefined": undefined,
            f"{self.name}_protocol": stamp,
        }


__all__ = ["SliceMetric", "combine", "load"]
