"""What a model must beat, the source as it is and the best that a table of intensities can do; and what it cannot beat.

All answer in the target's units, as the model does. The first two work on the codec's scale, [-1, 1] over the window of
each volume, and never look at a pixel's neighbours, so whatever a model gains over the second is anatomy.
"""

from collections.abc import Iterable

import numpy as np

from ..data.routes import Route
from .ceiling import vae_ceiling

BINS = 256


def route_of(row: dict) -> str:
    """Such as `"brain/MRI-CT"`, of a row of pairs."""
    return Route(row["region"], row["source_modality"], row["target_modality"]).name


def encode(codec, row: dict, side: str) -> np.ndarray:
    """
    `"source"` or `"target"` of a row on the codec's scale.

    Args:
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
        row (`dict`): Of pairs, decoded.
        side (`str`): `"source"` or `"target"`.

    Returns:
        `np.ndarray` of shape `(height, width)`: float32 in [-1, 1].
    """
    window = row[f"{side}_window"]
    array = np.asarray(row[f"{side}_image"])
    return codec.encode_intensity(array, row[f"{side}_modality"], (window["low"], window["high"]))[0]


def decode(codec, row: dict, codes: np.ndarray) -> np.ndarray:
    """The codec's scale as the units in which a model makes the row's target: HU, SUV, or MR whose window is known."""
    return codec.decode_intensity(codes, codec.target_record(row["target_modality"]))


def true_target(codec, row: dict) -> np.ndarray:
    """
    The true target in the units in which a target is made: HU and SUV as they are. MR has no absolute scale, so the
    window of its volume is brought to the codec's own; values beyond the window stay beyond it.

    Args:
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
        row (`dict`): Of pairs, decoded.

    Returns:
        `np.ndarray` of shape `(height, width)`: float32.
    """
    array, modality = np.asarray(row["target_image"], np.float32), row["target_modality"]
    if "percentile" not in codec.intensity[modality]:
        return array
    window, record = row["target_window"], codec.target_record(modality)
    share = (array - window["low"]) / (window["high"] - window["low"])
    return (record["low"] + share * (record["high"] - record["low"])).astype(np.float32)


class CopySource:
    """
    Takes the source's picture for the answer.

    Args:
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
    """

    def __init__(self, codec):
        self.codec = codec

    def __call__(self, rows: list[dict], seeds: list[int]) -> list[np.ndarray]:
        """Predictions in the target's units, one a row; nothing here is random."""
        return [decode(self.codec, row, encode(self.codec, row, "source")) for row in rows]


class IntensityMapping:
    """
    Answers each pixel by the mean of the target over all training pixels of the same source intensity: of all
    functions of one pixel's intensity, the one of least squared error.

    Args:
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
        tables (`dict[str, dict]`): Of [`fit_mapping`].
    """

    def __init__(self, codec, tables: dict[str, dict]):
        self.codec, self.tables = codec, tables

    def __call__(self, rows: list[dict], seeds: list[int]) -> list[np.ndarray]:
        """Predictions in the target's units, one a row; nothing here is random."""
        made = []
        for row in rows:
            table = self.tables[route_of(row)]
            codes = np.interp(encode(self.codec, row, "source"), table["source"], table["target"])
            made.append(decode(self.codec, row, codes))
        return made


class Ceiling:
    """
    The true target through codec, autoencoder and back: what no model behind that autoencoder can beat by much.

    Args:
        vae (`AutoencoderKL`): In evaluation mode.
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
    """

    def __init__(self, vae, codec):
        self.vae, self.codec = vae, codec

    def __call__(self, rows: list[dict], seeds: list[int]) -> list[np.ndarray]:
        """Predictions in the target's units, one for each row of one case and route; nothing here is random."""
        modality = rows[0]["target_modality"]
        record = self.codec.target_record(modality)
        wanted = [true_target(self.codec, row) for row in rows]
        return list(vae_ceiling(self.vae, self.codec, wanted, modality, (record["low"], record["high"]), len(rows)))


def fit_mapping(rows: Iterable[dict], codec, routes: Iterable[str]) -> dict[str, dict]:
    """
    One table for each route, over whole frames.

    Args:
        rows (`Iterable[dict]`): Training pairs, decoded. They are gone through once and not kept.
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
        routes (`Iterable[str]`): Such as `"brain/MRI-CT"`; rows of others are passed over.

    Returns:
        `dict[str, dict]`: For each route `source` and `target`, the mean codes of both in each of 256 equal bins of the
        source that holds a pixel, in ascending order, to be interpolated between; `slices`, how many were seen.

    Raises:
        `ValueError`: There are no training pairs of a route.
    """
    sums = {route: np.zeros((3, BINS)) for route in routes}  # pixels, source, target
    slices = dict.fromkeys(sums, 0)
    for row in rows:
        route = route_of(row)
        if route not in sums:
            continue
        source, target = (encode(codec, row, side).ravel().astype(np.float64) for side in ("source", "target"))
        bins = np.minimum(((source + 1) / 2 * BINS).astype(int), BINS - 1)
        for total, weights in zip(sums[route], (None, source, target), strict=True):
            total += np.bincount(bins, weights, minlength=BINS)
        slices[route] += 1
    if unseen := [route for route, count in slices.items() if count == 0]:
        raise ValueError(f"There are no training pairs of {', '.join(unseen)} to fit an intensity mapping on.")
    tables = {}
    for route, (pixels, source, target) in sums.items():
        seen = pixels > 0
        means = {"source": (source[seen] / pixels[seen]).tolist(), "target": (target[seen] / pixels[seen]).tolist()}
        tables[route] = {"slices": slices[route], **means}
    return tables


__all__ = ["Ceiling", "CopySource", "IntensityMapping", "decode", "encode", "fit_mapping", "route_of", "true_target"]
