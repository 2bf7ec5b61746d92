"""All figures of a protocol, of slices or volumes, inside masks, for `evaluate.load`."""

import evaluate
import numpy as np
from datasets import Features, Image, List

from synermedgen_hf.metrics.protocols import average, evaluate_case

INPUTS = """
Args:
    predictions, references (`list[np.ndarray]`): Slices `(rows, columns)` or volumes `(slices, rows, columns)`, all of
        one kind, in scanner units and of any size; pairs must have one shape. Of float32 or whole numbers, and kept as
        float32; make half precision float32 first.
    masks (`list[np.ndarray]`, *optional*): Passed to `compute`, one for each pair, in their order. By default the body
        is found in each reference.
    protocol, modality, spacing, window: As of `synermedgen_hf.metrics.evaluate_case`.

Returns:
    `dict`: `protocol`, the stamp; `metrics`, the mean of each figure over the pairs in which it is defined, or `None`;
    `n`, how many those are.
"""


class Case(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="All figures of a protocol, of synthesised slices or volumes, inside masks.",
            citation="",
            inputs_description=INPUTS,
            features=[
                Features(dict.fromkeys(("predictions", "references"), kind)) for kind in (Image(), List(Image()))
            ],
        )

    def _compute(self, predictions, references, masks=None, **options):
        masks = [None] * len(references) if masks is None else masks
        if len(masks) != len(references):
            raise ValueError(f"There are {len(masks)} masks for {len(references)} pairs: pass one for each, or none.")
        records = []
        for place, (one, other, mask) in enumerate(zip(predictions, references, masks, strict=True)):
            try:
                records.append(evaluate_case(_array(one), _array(other), mask, **options))
            except ValueError as error:
                raise ValueError(f"Pair {place}: {error}") from error
        return average(records)


def _array(image) -> np.ndarray:
    """A slice, or the slices of a volume put back together."""
    return np.stack([np.asarray(one) for one in image]) if isinstance(image, list) else np.asarray(image)
