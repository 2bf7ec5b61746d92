"""What a model must beat, the source as it is and the best that a table of intensities can do; and what it cannot beat.

All answer in the target's units, as the model does. The first two work on the codec's scale, [-1, 1] over the window of
each volume, and never look at a pixel's neighbours, so whatever a model gains over the second is anatomy. The networks
of `examples/train_baseline.py`, a U-Net or a pix2pix, say what the field's usual way makes of the same pairs.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from ..data.latents import prepare_slice, window_for
from ..data.routes import Route
from ..image_processing_synermedgen import to_channels
from .ceiling import vae_ceiling

BINS = 256
NETWORKS = ("unet", "pix2pix")
RECORD, WEIGHTS = "baseline.json", "unet/diffusion_pytorch_model.safetensors"


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
    array, modality = np.asarray(row[f"{side}_image"]), row[f"{side}_modality"]
    return codec.encode_intensity(array, modality, window_for(codec, modality, row[f"{side}_window"]))[0]


def decode(codec, row: dict, codes: np.ndarray) -> np.ndarray:
    """The codec's scale as the units in which a model makes the row's target: HU, SUV, or MR whose window is known."""
    return codec.decode_intensity(codes, codec.target_record(row["target_modality"]))


def true_target(codec, row: dict) -> np.ndarray:
    """
    The true target in the units in which a target is made: HU and SUV as they are, grey levels of a CT or PET as
    training has read them. MR has no absolute scale, so the window of its volume is brought to the codec's own; values
    beyond the window stay beyond it.

    Args:
        codec ([`SynerMedGenImageProcessor`]): Owns the scale.
        row (`dict`): Of pairs, decoded.

    Returns:
        `np.ndarray` of shape `(height, width)`: float32.
    """
    array, modality = np.asarray(row["target_image"], np.float32), row["target_modality"]
    window, record = row["target_window"], codec.target_record(modality)
    if "percentile" not in codec.intensity[modality]:
        in_units = window_for(codec, modality, window) is None
        return array if in_units else decode(codec, row, encode(codec, row, "target"))
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


class TrainedNetwork:
    """
    Answers by a network that was trained on pairs: a U-Net, or the generator of a pix2pix.

    Args:
        unet (`UNet2DModel`): As `examples/train_baseline.py` trains it, in evaluation mode.
        codec ([`SynerMedGenImageProcessor`]): The one it was trained with.
        routes (`list[str]`): In the order of its class labels.
    """

    def __init__(self, unet: UNet2DModel, codec, routes: list[str]):
        self.unet, self.codec, self.routes = unet, codec, routes

    @torch.no_grad()
    def __call__(self, rows: list[dict], seeds: list[int]) -> list[np.ndarray]:
        """Predictions in the target's units, one for each row of one case and route; nothing here is random."""
        inputs = [
            prepare_slice(
                self.codec, row["source_image"], row["source_modality"], row["source_window"], row.get("case_id", "")
            )
            for row in rows
        ]
        sources = torch.stack([one.vae_pixels[:1] for one in inputs]).to(self.unet.device, self.unet.dtype)
        labels = torch.tensor([self.routes.index(route_of(row)) for row in rows], device=self.unet.device)
        made = []
        for row, one, codes in zip(rows, inputs, predict_codes(self.unet, sources, labels), strict=True):
            record = self.codec.target_record(row["target_modality"])
            channels = to_channels(codes[0].float().clamp(-1, 1).cpu().numpy(), record)
            made.append(self.codec.postprocess_slice(channels, record, one.geometry))
        return made


def predict_codes(unet: UNet2DModel, sources: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    What a network makes of sources on the codec's scale.

    Args:
        unet (`UNet2DModel`): Takes and gives `patch**2` channels: blocks of pixels, as in Shi et al. 2016
            (arXiv 1609.05158).
        sources (`torch.Tensor` of shape `(batch, 1, height, width)`): In [-1, 1].
        labels (`torch.Tensor` of shape `(batch,)`): Numbers of their routes.

    Returns:
        `torch.Tensor` of shape `(batch, 1, height, width)`: About [-1, 1], not clipped.
    """
    patch = math.isqrt(unet.config.in_channels)
    # A U-Net for diffusion wants a timestep; here it is always the same.
    made = unet(F.pixel_unshuffle(sources, patch), timestep=0, class_labels=labels).sample
    return F.pixel_shuffle(made, patch)


def codec_settings(codec) -> dict:
    """All of a codec that decides what a network sees of a slice, as JSON keeps it."""
    names = ("intensity", "vae_size", "pad_to_square")
    return json.loads(json.dumps({name: getattr(codec, name) for name in names}))


def fixed_side(settings: dict) -> int | None:
    """Of [`codec_settings`]: the side in pixels if all pictures are squares of one size, whatever the stride."""
    try:
        side, smallest, stride, pixels = (
            settings["vae_size"][n] for n in ("max_size", "min_size", "stride", "max_pixels")
        )
        squares = settings["pad_to_square"]
    except (KeyError, TypeError):  # the record of a network is a file, and may hold anything
        return None
    return side if squares and side == smallest and side % stride == 0 and side**2 <= pixels else None


def read_network(folder: str | Path) -> dict:
    """
    The record of a trained network, every file in place.

    Args:
        folder (`str` or `Path`): That `examples/train_baseline.py` wrote.

    Returns:
        `dict`: `kind`, `routes` in the order of the labels, `codec`, `minutes`, `steps`, `arguments`.

    Raises:
        `FileNotFoundError`: There is no such folder, or a file is missing.
        `ValueError`: The record is none of a network.
    """
    folder = Path(folder)
    if absent := [name for name in (RECORD, "unet/config.json", WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} holds no trained baseline: there is no {', no '.join(absent)}. examples/train_baseline.py "
            "writes them when it is done."
        )
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    wanted = {"kind", "routes", "codec", "minutes", "steps", "arguments"}
    if not isinstance(record, dict) or not wanted <= record.keys() or record["kind"] not in NETWORKS:
        raise ValueError(f"{folder / RECORD} is not what examples/train_baseline.py writes: train the baseline again.")
    labels = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")).get("num_class_embeds")
    if labels != len(record["routes"]):
        raise ValueError(f"The network in {folder} knows {labels} routes, its record {len(record['routes'])}.")
    return record


def check_codec(folder: str | Path, record: dict, codec):
    """Raise a `ValueError` if a network was trained with another codec than this one."""
    theirs, mine = record["codec"], codec_settings(codec)
    if fixed_side(mine) is not None and fixed_side(theirs) == fixed_side(mine):
        theirs, mine = ({**one, "vae_size": fixed_side(mine)} for one in (theirs, mine))
    if theirs == mine:
        return
    # Of the windows only those that differ.
    theirs, mine = ({**one.pop("intensity", {}), **one} for one in (dict(theirs), dict(mine)))
    differing = [
        f"{name} {theirs.get(name)}, here {mine.get(name)}"
        for name in dict.fromkeys([*theirs, *mine])
        if theirs.get(name) != mine.get(name)
    ]
    raise ValueError(
        f"{folder} was trained with another codec than that of the model: {'; '.join(differing)}. Pass the --model "
        "that it was trained with."
    )


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


__all__ = [
    "Ceiling",
    "CopySource",
    "IntensityMapping",
    "TrainedNetwork",
    "check_codec",
    "codec_settings",
    "decode",
    "encode",
    "fit_mapping",
    "fixed_side",
    "predict_codes",
    "read_network",
    "route_of",
    "true_target",
]
