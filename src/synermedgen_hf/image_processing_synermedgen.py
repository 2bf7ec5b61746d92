"""Image processor of SynerMedGen: scanner units in, scanner units out, on the input's own grid.

What is special here:

- A slice is a float32 array in Hounsfield units, SUV or MR signal. One invertible *intensity record* says how it
  became [-1, 1]; one *geometry record* says how it was padded. `postprocess_slice` undoes both, so the answer lies
  pixel on pixel on the question.
- A VAE reads three channels. They hold the grey slice three times (the *plain* codec), or, for the modalities whose
  window is wide, the whole window and two narrower bands of it (the *bands* codec): see [`to_channels`].
- Nothing is cropped, nothing passes through 8 bits (a 16-bit PNG keeps all its levels), resizing is float32 bicubic.
- Ordinary pictures without a modality (understanding) take BAGEL's own path, 8-bit RGB, so its checkpoints see what
  they were trained on.

Two size rules, BAGEL's: the VAE image (generation) and the ViT image (understanding) are made from the same input.
"""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.utils import TensorType, logging

logger = logging.get_logger(__name__)

# MR has no absolute scale: the window is a percentile of the scan itself, the unit stays arbitrary.
_MR = {"unit": "a.u.", "percentile": 99.5, "low": 0.0, "reference_high": 1000.0, "scale": "linear"}
_CT = {"unit": "HU", "low": -1024.0, "high": 3071.0, "scale": "linear"}  # the 12 bits a CT stores
_PET = {"unit": "SUV", "low": 0.0, "high": 20.0, "scale": "linear"}
# The second and third channel of the bands codec, in scanner units; the first always holds the whole window.
BANDS = {
    "CT": [[-160.0, 240.0], [200.0, 1500.0]],  # soft tissue, bone
    "CBCT": [[-160.0, 240.0], [200.0, 1500.0]],
    "PET": [[0.0, 2.5], [2.0, 8.0]],  # background and most organs, lesions and what excretes
}
CODECS = ("plain", "bands")
_BAND_REACH = 0.05  # of [-1, 1], beyond a band's ends: the first channel may err by so much and still be corrected
SMALLEST_SIDE = 8  # pixels
ONLY_HOUNSFIELD = -500.0  # values below it are HU
_NOT_PICTURES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".dcm")


@dataclass
class SliceInputs:
    """One slice, ready for the model, with what is needed to come back.

    Attributes:
        vae_pixels (`torch.Tensor` of shape `(3, H, W)`): float32 in [-1, 1], see [`to_channels`].
        vit_patches (`torch.Tensor` of shape `(N, patch * patch * 3)`): float32 in [-1, 1].
        vit_grid (`tuple[int, int]`): rows and columns of the patch grid, `N = rows * columns`.
        intensity (`dict`): modality, unit, low, high, scale, perhaps bands; read by `decode_intensity`.
        geometry (`dict`): height, width, pad (top, bottom, left, right); read by `postprocess_slice`.
    """

    vae_pixels: torch.Tensor
    vit_patches: torch.Tensor
    vit_grid: tuple[int, int]
    intensity: dict[str, Any]
    geometry: dict[str, Any]


def resize_shape(
    height: int, width: int, max_size: int, min_size: int, stride: int, max_pixels: int, num_images: int = 1
) -> tuple[int, int]:
    """BAGEL's size rule: sides are multiples of `stride`; the shorter reaches `min_size` unless a bound forbids it.

    Args:
        height, width (`int`): size of the input in pixels.
        max_size, min_size (`int`): bounds of the longer and of the shorter side; on conflict `max_size` wins, and so
            does `max_pixels`.
        stride (`int`): both sides become multiples of it (rounded half to even, as Python does).
        max_pixels (`int`): bound of the area, shared by `num_images`.

    Returns:
        `tuple[int, int]`: height and width to resize to, possibly larger than the input.
    """

    def scaled(factor: float, height: int, width: int) -> tuple[int, int]:
        return tuple(max(stride, stride * round(round(side * factor) / stride)) for side in (height, width))

    factor = max(min(max_size / max(height, width), 1.0), min_size / min(height, width))
    height, width = scaled(factor, height, width)
    if height * width > max_pixels / num_images:
        # The ratio of areas, without the square root: this is what the checkpoints were trained with.
        height, width = scaled(max_pixels / num_images / (height * width), height, width)
    if max(height, width) > max_size:
        height, width = scaled(max_size / max(height, width), height, width)
    return height, width


def patchify(image: torch.Tensor, patch: int) -> torch.Tensor:
    """Cuts `(C, H, W)` into `(N, patch * patch * C)`: patches row by row; in a patch row, column, channel fastest."""
    channels, height, width = image.shape
    if height % patch or width % patch:
        raise ValueError(f"An image of {height}x{width} cannot be cut into patches of {patch}x{patch} pixels.")
    image = image.reshape(channels, height // patch, patch, width // patch, patch)
    return image.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: torch.Tensor, grid_hw: tuple[int, int], patch: int) -> torch.Tensor:
    """Puts `(N, patch * patch * C)` back together to `(C, H, W)`, the inverse of [`patchify`]."""
    rows, columns = (int(side) for side in grid_hw)
    image = tokens.reshape(rows, columns, patch, patch, -1)
    return image.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, columns * patch)


def _foreground_percentile(array: np.ndarray, low: float, percentile: float) -> float | None:
    """The percentile of the values above `low`; `None` if there are none. 16-bit volumes are counted, not sorted."""
    if array.dtype not in (np.int16, np.uint16) or low < 0:
        foreground = array[array > low]
        return float(np.percentile(foreground, percentile)) if foreground.size else None
    counts = np.bincount(array.ravel("K").view(np.uint16), minlength=1 << 16)
    counts[: int(low) + 1] = 0
    if array.dtype == np.int16:
        counts[1 << 15 :] = 0  # the negative ones
    upto = np.cumsum(counts)
    if upto[-1] == 0:
        return None
    place = percentile / 100 * (upto[-1] - 1)
    first, share = int(place), place - int(place)
    below, above = np.searchsorted(upto, [first, min(first + 1, upto[-1] - 1)], side="right")
    # As numpy interpolates, to the last bit.
    return float(above - (above - below) * (1 - share) if share >= 0.5 else below + (above - below) * share)


def square_padding(height: int, width: int) -> list[int]:
    """The centred padding `[top, bottom, left, right]` that makes `height x width` a square; it never crops."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return [top, side - height - top, left, side - width - left]


def resize_float(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, antialiased on the way down, float32 `(H, W)` in [-1, 1]; the overshoot of bicubic is clamped."""
    if image.shape == (height, width):
        return image
    # Mode "F" is the one in which Pillow keeps float32 from end to end.
    picture = Image.fromarray(np.ascontiguousarray(image, np.float32))
    return np.clip(np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)), -1.0, 1.0)


def set_codec(intensity: dict[str, dict[str, Any]], codec: str) -> dict[str, dict[str, Any]]:
    """The windows of `intensity` with the bands of [`BANDS`] (`codec="bands"`), or without any (`codec="plain"`)."""
    if codec not in CODECS:
        raise ValueError(f"Unknown codec {codec!r}. Choose one of {', '.join(CODECS)}.")
    bands = BANDS if codec == "bands" else {}
    plain = {name: {key: spec[key] for key in spec if key != "bands"} for name, spec in intensity.items()}
    return {name: {**spec, "bands": bands[name]} if name in bands else spec for name, spec in plain.items()}


def to_channels(encoded: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    """
    One slice in [-1, 1] as the three channels that a VAE reads.

    Without `bands` in the record they are equal. With them, the first channel is the slice itself and the others are
    windows inside its window, clipped: an error of the VAE, which has about the same size in every channel, then counts
    for fewer HU or SUV where a narrower band shows the same pixel. A VAE that was trained on pictures (BAGEL's own) can
    carry such a slice, but it looks like false colour to it, and no measurement says yet how well it does.

    Args:
        encoded (`np.ndarray` of shape `(H, W)`): from `encode_intensity`.
        record (`dict`): its record.

    Returns:
        `np.ndarray` of shape `(3, H, W)`: float32 in [-1, 1]; -1, the low end, is -1 in every channel.
    """
    if "bands" not in record:
        return np.repeat(np.asarray(encoded, np.float32)[None], 3, axis=0)
    channels = [2 * (encoded - low) / (high - low) - 1 for low, high in _to_unit(np.array(record["bands"]), record)]
    return np.stack([encoded, *np.clip(channels, -1, 1)]).astype(np.float32)


def from_channels(channels: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    """
    Three decoded channels as one slice: the inverse of [`to_channels`], exact where the VAE made no error.

    Equal channels are averaged. Bands are fused by one Gauss-Newton step of least squares from the first channel, which
    has seen every value: with errors of one size in every channel, a band counts by the inverse of its squared width.
    A band has no say where the first channel lies well outside of it (there it is saturated), and gains it over a
    short way (`_BAND_REACH`), so that the result is continuous. Where the channels agree, the step is zero: the inverse
    is exact.

    Args:
        channels (`np.ndarray` of shape `(3, H, W)`): about [-1, 1]; values outside are clipped.
        record (`dict`): of the target.

    Returns:
        `np.ndarray` of shape `(H, W)`: float32 in [-1, 1], for `decode_intensity`.
    """
    if "bands" not in record:
        return np.clip(channels.mean(axis=0, dtype=np.float32), -1.0, 1.0)
    whole, *bands = np.clip(np.asarray(channels, np.float64), -1, 1)
    ends = _to_unit(np.array(record["bands"]), record)
    step, weights = 0.0, 1.0
    for band, (low, high) in zip(bands, ends, strict=True):
        full, outside = (2 / (high - low)) ** 2, np.maximum(low - whole, whole - high)
        near = np.clip(1 - outside / _BAND_REACH, 0, 1)
        weight = full * near / (1 + full * (1 - near))  # the band's share of the mean grows evenly, not the weight
        step = step + weight * (low + (band + 1) / 2 * (high - low) - np.clip(whole, low, high))
        weights = weights + weight
    return np.clip(whole + step / weights, -1, 1).astype(np.float32)


def picture_pixels(picture: Image.Image, size: dict[str, int]) -> torch.Tensor:
    """BAGEL's own transform of an 8-bit picture: RGB, bicubic to [`resize_shape`], then `(x / 255 - 0.5) / 0.5`.

    Args:
        picture (`PIL.Image.Image`): an 8-bit picture; transparent parts are laid on white.
        size (`dict`): max_size, min_size, stride, max_pixels.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`: float32 in [-1, 1].
    """
    height, width = resize_shape(picture.height, picture.width, **size)
    picture = _to_rgb(picture).resize((width, height), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def own_window(image: Any) -> tuple[float, float] | None:
    """The window of an image whose modality is not known: the full range of a grey picture, or [`guess_window`].

    With a window, an image is padded to a square as it is in synthesis. `None` for other pictures, perhaps in colour,
    which are welcome where nothing is synthesised.
    """
    if isinstance(image, Image.Image) and image.mode != "F":
        return (0.0, 255.0) if image.mode == "L" else None
    array, is_picture = load_slice(image)
    return None if is_picture else guess_window(array)


def guess_window(array: np.ndarray) -> tuple[float, float]:
    """The lowest and highest value that training would show of a scan of which only the values are known.

    They tell the unit: only Hounsfield units go so far below zero, what ends between 1 and 20 is taken for SUV, and
    anything else is the signal of an MR.

    Args:
        array (`np.ndarray`): scanner units, of a slice or, better, of its whole volume.
    """
    processor = SynerMedGenImageProcessor()  # as training measures windows, whatever a checkpoint's are
    if array.min() < ONLY_HOUNSFIELD:
        return processor.intensity_window(array, "CT")
    low, high = processor.intensity_window(array, "MRI")
    suv = processor.intensity_window(array, "PET")
    return suv if 1 < high <= suv[1] else (low, high)


def to_display(
    array: np.ndarray,
    record_or_window: dict[str, Any] | tuple[float, float],
    spacing: tuple[float, float] | None = None,
) -> Image.Image:
    """An 8-bit grey picture of a slice: the window spans 0 to 255 linearly, rounded, not truncated.

    Args:
        array (`np.ndarray` of shape `(H, W)`): scanner units.
        record_or_window (`dict` or `tuple`): an intensity record, or `(low, high)` in scanner units, such as
            `(-160, 240)` for soft tissue in CT.
        spacing (`tuple[float, float]`, *optional*): mm from row to row and from column to column; the picture is
            enlarged until its pixels are square, which would squash the patient otherwise.
    """
    window = record_or_window
    low, high = (window["low"], window["high"]) if isinstance(window, dict) else window
    grey = np.clip((np.asarray(array, np.float64) - low) / (high - low), 0, 1) * 255
    picture = Image.fromarray(np.rint(grey).astype(np.uint8))
    if spacing is None or max(spacing) <= 1.01 * min(spacing):
        return picture
    rows, columns = spacing
    size = (round(picture.width * columns / min(spacing)), round(picture.height * rows / min(spacing)))
    return picture.resize(size, Image.Resampling.BILINEAR)


def load_slice(image: Any) -> tuple[np.ndarray, bool]:
    """Reads one grey slice and refuses, before anything is computed, what is none.

    Pictures (PIL images, picture files, uint8 arrays) hold grey levels; arrays of any other type, and float PIL
    images, hold scanner units.

    Args:
        image (`PIL.Image.Image`, `str`, `Path`, `np.ndarray` or `torch.Tensor`):
            a picture, the path of one (png, jpg, tif, ...), or an array of shape `(H, W)`.

    Returns:
        `tuple[np.ndarray, bool]`: the slice `(H, W)` and whether it is a picture. A picture is uint8 (grey levels 0 to
        255) or uint16 (0 to 65535, all kept), anything else float32 in scanner units.

    Raises:
        `FileNotFoundError`, `ValueError`: saying what is wrong and what to do.
    """
    if isinstance(image, (str, Path)):
        image = _open_picture(image)
    if isinstance(image, Image.Image):
        array = _grey_levels(image)
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).numpy()
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(f"Expected a PIL image, a path, an array or a tensor, got {type(image).__name__}.")

    if array.dtype.kind == "b":
        raise ValueError("Got a boolean array: that is a mask, not a slice. Pass the intensities themselves.")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"Got an array of type {array.dtype}: pass real numbers, e.g. array.astype('float32').")
    if array.size == 0:
        raise ValueError(f"Got an empty array of shape {array.shape}: there is nothing to translate.")
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        raise ValueError(
            f"Got shape {array.shape}, a colour picture or several: a scan slice is grey. Pass one of shape (H, W)."
        )
    if array.ndim != 2:
        raise ValueError(f"Got shape {array.shape}: pass one slice of shape (H, W), e.g. volume[:, :, k].")
    if min(array.shape) < SMALLEST_SIDE:
        raise ValueError(
            f"Got {array.shape[0]}x{array.shape[1]} pixels: a slice needs at least {SMALLEST_SIDE} pixels a side."
        )
    is_picture = array.dtype == np.uint8 or (isinstance(image, Image.Image) and array.dtype == np.uint16)
    if is_picture:
        return array, True
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    nans, infinities = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nans or infinities:
        raise ValueError(
            f"The slice has {nans} NaN and {infinities} infinite values of {array.size}: replace them first, e.g. by "
            "the value of air with np.nan_to_num(array, nan=-1024, posinf=3071, neginf=-1024) for CT."
        )
    return array, False


def _open_picture(source: str | Path) -> Image.Image:
    """Opens a picture as it is; `transformers.image_utils.load_image` converts to RGB and so clips 16 bits to 255."""
    name = str(source)
    if name.startswith(("http://", "https://", "data:image/")):
        with urlopen(name, timeout=60) as response:
            source = BytesIO(response.read())
        name = "The data: address" if name.startswith("data:") else name
    elif name.lower().endswith(_NOT_PICTURES):
        raise ValueError(
            f"{name} is not a picture: read it with nibabel, pydicom or SimpleITK and pass one slice in scanner units."
        )
    elif name.lower().endswith((".npy", ".npz")):
        raise ValueError(f"{name} is an array file: load it with numpy.load and pass one slice of shape (H, W).")
    elif not os.path.exists(name):
        raise FileNotFoundError(f"There is no file {name if len(name) < 300 else name[:40] + '...'}.")
    elif os.path.isdir(name):
        raise ValueError(f"{name} is a folder: pass one picture of it.")
    try:
        picture = Image.open(source)
        frames = getattr(picture, "n_frames", 1)
        picture = ImageOps.exif_transpose(picture)  # loads the pixels, so that a broken file shows here
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"({type(error).__name__}): is the file complete?"
        raise ValueError(f"{name} cannot be read as a picture {reason}") from error
    if frames > 1:
        raise ValueError(f"{name} holds {frames} frames: pass one of them.")
    return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")


def _grey_levels(picture: Image.Image) -> np.ndarray:
    """The levels of a grey picture: uint8, uint16 or (mode "F") float32. No conversion that would lose any."""
    if picture.mode == "1":
        raise ValueError("Got a black-and-white picture: that is a mask, not a slice. Pass the intensities themselves.")
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16)
    if picture.mode == "I":  # how some readers hand out 16-bit files
        levels = np.asarray(picture)
        if levels.size and (levels.min() < 0 or levels.max() > 65535):
            raise ValueError(
                "Got a 32-bit picture with values outside 0 to 65535: if these are scanner units, pass "
                "numpy.asarray(image) instead of the picture."
            )
        return levels.astype(np.uint16)
    if picture.mode in ("L", "F") and not picture.has_transparency_data:
        return np.asarray(picture)
    colours = np.asarray(_to_rgb(picture))
    if (colours != colours[..., :1]).any():
        raise ValueError(
            "Got a colour picture: a scan slice is grey. If its colour means nothing, pass image.convert('L'); a "
            "colour map (e.g. a PET overlay) cannot be turned back into intensities, pass the scan itself."
        )
    return np.ascontiguousarray(colours[..., 0])


class SynerMedGenImageProcessorKwargs(TypedDict, total=False):
    """The settings saved with the weights, and the arguments of one call (`modality`, `window`, `return_tensors`)."""

    intensity: dict[str, dict[str, Any]]
    vae_size: dict[str, int]
    vit_size: dict[str, int]
    vit_patch_size: int
    vit_max_patches_per_side: int
    latent_max_per_side: int
    latent_stride: int
    pad_to_square: bool
    modality: str | list | tuple | None
    window: tuple | list | None
    return_tensors: str | TensorType | None


class SynerMedGenImageProcessor(PilBackend):
    r"""
    Turns slices in scanner units, and pictures, into what SynerMedGen reads, and its output back into scanner units.

    Args:
        intensity (`dict[str, dict]`):
            One window per modality: `unit`, `low`, `scale` (`"linear"`, or `"asinh"` with an optional `softening` in
            scanner units, default 1), and either `high` (CT, CBCT: HU; PET: SUV) or, for MR, `percentile` of the
            foreground (values above `low`) together with `reference_high`, the scale of an MR that is *made*, where
            there is nothing to measure. To change one: `{**SynerMedGenImageProcessor.intensity, "PET": {...}}`.
            `bands`, optional, are two narrower windows `[low, high]` for the second and third channel of the VAE, in
            the units of this window; another window in a call moves them along. [`set_codec`] sets the usual ones.
        vae_size, vit_size (`dict[str, int]`):
            `max_size`, `min_size`, `stride`, `max_pixels` of [`resize_shape`] for the two images; BAGEL's values.
        vit_patch_size (`int`, defaults to 14): side of a ViT patch in pixels.
        vit_max_patches_per_side (`int`, defaults to 70): side of the ViT position table.
        latent_max_per_side (`int`, defaults to 64): side of the latent position table.
        latent_stride (`int`, defaults to 16): pixels per latent token and side.
        pad_to_square (`bool`, defaults to `True`):
            Pad slices to a centred square with the low end of the window before resizing. `False` resizes the slice by
            the rule alone, as BAGEL does. Pictures without a modality are never padded.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]
    valid_kwargs = SynerMedGenImageProcessorKwargs

    intensity = {
        "CT": dict(_CT),
        "CBCT": dict(_CT),
        "PET": dict(_PET),
        **{modality: dict(_MR) for modality in ("MRI", "T1", "T1CE", "T2", "FLAIR")},
    }
    vae_size = {"max_size": 1024, "min_size": 512, "stride": 16, "max_pixels": 1806336}
    vit_size = {"max_size": 980, "min_size": 378, "stride": 14, "max_pixels": 2007040}
    vit_patch_size = 14
    vit_max_patches_per_side = 70
    latent_max_per_side = 64
    latent_stride = 16
    pad_to_square = True
    # Of the base class; they have no meaning here and would only clutter the saved file.
    default_to_square = rescale_factor = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for modality, spec in self.intensity.items():
            if spec.get("scale") not in ("linear", "asinh"):
                raise ValueError(f"intensity[{modality!r}]: scale must be 'linear' or 'asinh'.")
            if "high" not in spec and not {"percentile", "reference_high"} <= spec.keys():
                raise ValueError(f"intensity[{modality!r}] needs 'high', or 'percentile' and 'reference_high'.")
            if not spec["low"] < spec.get("high", spec.get("reference_high")):
                raise ValueError(f"intensity[{modality!r}]: low must be below high.")
            _check_bands(modality, spec)

    # ---- intensity: scanner units <-> [-1, 1] ----

    def _spec(self, modality: str) -> dict[str, Any]:
        if modality not in self.intensity:
            known = ", ".join(sorted(self.intensity))
            raise ValueError(f"Unknown modality {modality!r}: this checkpoint knows {known}.")
        return self.intensity[modality]

    def intensity_window(self, array: np.ndarray, modality: str) -> tuple[float, float]:
        """The window `(low, high)` of a slice or, better, of its whole volume, in scanner units.

        CT, CBCT and PET have a fixed one. MR is measured: pass the volume once and hand the result to every slice as
        `window`, otherwise each slice is scaled by itself and neighbours differ in brightness.
        """
        spec = self._spec(modality)
        if "high" in spec:
            return spec["low"], spec["high"]
        high = _foreground_percentile(np.asarray(array), spec["low"], spec["percentile"])
        if high is None:
            logger.warning_once(f"A {modality} without foreground has no scale of its own: reference_high is used.")
            return spec["low"], spec["reference_high"]
        return spec["low"], high

    def encode_intensity(
        self, array: np.ndarray, modality: str | None, window: tuple[float, float] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Scanner units to [-1, 1].

        Args:
            array (`np.ndarray`): finite values in scanner units, any shape; values outside the window are clipped.
            modality (`str` or `None`): a key of `intensity`; `None` only together with `window`.
            window (`tuple[float, float]`, *optional*): `(low, high)` to use instead of the modality's own.

        Returns:
            `tuple[np.ndarray, dict]`: float32 in [-1, 1], and the record `decode_intensity` needs.
        """
        if modality is None and window is None:
            raise ValueError(
                "An array in scanner units needs its modality, e.g. modality='CT' "
                f"(one of {', '.join(sorted(self.intensity))}), or a window=(low, high)."
            )
        spec = {"unit": "a.u.", "scale": "linear"} if modality is None else self._spec(modality)
        low, high = self.intensity_window(array, modality) if window is None else window
        record = _record(modality, spec, low, high)
        clipped = np.clip(np.asarray(array, np.float64), record["low"], record["high"])
        return _to_unit(clipped, record).astype(np.float32), record

    def decode_intensity(self, array: np.ndarray, record: dict[str, Any]) -> np.ndarray:
        """[-1, 1] (clipped to it) back to scanner units, float32: the inverse of `encode_intensity`."""
        return _from_unit(np.clip(np.asarray(array, np.float64), -1, 1), record).astype(np.float32)

    def target_record(
        self, modality: str, reference: dict[str, Any] | tuple[float, float] | None = None
    ) -> dict[str, Any]:
        """The intensity record of an image that is still to be made.

        Args:
            modality (`str`): the target modality. CT and CBCT decode to HU, PET to SUV; MR to arbitrary units in which
                the 99.5 percentile of the foreground is `reference_high`.
            reference (`dict` or `tuple[float, float]`, *optional*): a record, or `(low, high)`, of a scan whose scale
                the output shall have, e.g. of the same scanner's usual T1.
        """
        spec = self._spec(modality)
        if isinstance(reference, dict):
            reference = (reference["low"], reference["high"])
        low, high = reference or (spec["low"], spec.get("high", spec.get("reference_high")))
        return _record(modality, spec, low, high)

    def _encode(self, image: Any, modality: str | None, window: tuple[float, float] | None):
        """Any slice to [-1, 1]. Pictures: see `preprocess_slice`."""
        array, is_picture = load_slice(image)
        if not is_picture:
            if modality is not None:
                window = self.intensity_window(array, modality) if window is None else window
                self._warn_of_a_wrong_scale(array, modality, window)
            return self.encode_intensity(array, modality, window)
        white = float(np.iinfo(array.dtype).max)
        if modality is not None and "high" in self._spec(modality):
            if array.dtype == np.uint16 and array.max() < 4096:
                logger.warning_once(
                    f"A 16-bit {modality} picture ends at level {array.max()} of 65535, so all of it is taken for the "
                    "low end of the window. If its levels are scanner units plus an offset, pass an array in scanner "
                    "units instead."
                )
            low, high = self.intensity_window(array, modality) if window is None else window
            return self.encode_intensity(low + array / white * (high - low), modality, (low, high))
        if modality is None and window is None:
            window = (0.0, white)
        encoded, record = self.encode_intensity(array, modality, window)
        return encoded, {**record, "unit": "grey level"}

    def _warn_of_a_wrong_scale(self, array: np.ndarray, modality: str, window: tuple[float, float]):
        """Say it where the window would throw away much of a slice: most likely its values are not in scanner units."""
        low, high = window
        below, above = (array < low).mean(), (array > high).mean()
        if "percentile" in self._spec(modality) and below > 0.05:
            logger.warning_once(
                f"{below:.0%} of a {modality} slice lies below {low:g} and is clipped: it looks normalised (z-scored). "
                "Shift it to start at 0, or pass window=(low, high)."
            )
        elif above > 0.05:
            logger.warning_once(
                f"{above:.0%} of a {modality} slice lies above {high:g} {self._spec(modality)['unit']} and is clipped: "
                "is it in scanner units (HU, SUV)?"
            )

    # ---- one slice, for generation ----

    def _pad(self, encoded: np.ndarray) -> tuple[np.ndarray, list[int]]:
        top, bottom, left, right = pad = square_padding(*encoded.shape) if self.pad_to_square else [0, 0, 0, 0]
        return np.pad(encoded, ((top, bottom), (left, right)), constant_values=-1.0), pad  # -1 is the window's low end

    def _vit_pixels(self, padded: np.ndarray) -> torch.Tensor:
        return _grey_to_rgb(resize_float(padded, *resize_shape(*padded.shape, **self.vit_size)))

    def _vit_patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        grid = (pixels.shape[1] // self.vit_patch_size, pixels.shape[2] // self.vit_patch_size)
        if max(grid) > self.vit_max_patches_per_side:
            raise ValueError(
                f"vit_size makes {grid[0]}x{grid[1]} patches, but the position table of this checkpoint ends at "
                f"{self.vit_max_patches_per_side} a side: lower vit_size['max_size'] or 'min_size'."
            )
        return patchify(pixels, self.vit_patch_size), grid

    def preprocess_slice(
        self, image: Any, modality: str | None = None, window: tuple[float, float] | None = None
    ) -> SliceInputs:
        """Everything the model needs of one slice: the VAE image, the ViT patches, and the way back.

        Arrays hold scanner units. Pictures hold grey levels: for CT, CBCT and PET black to white (0 to 255, or 0 to
        65535 in a 16-bit file) is taken to span the window linearly; for MR the grey levels are treated like any MR
        signal; without a modality the full range of the file is used.

        Args:
            image: see [`load_slice`].
            modality (`str`, *optional*): a key of `intensity`; required for arrays unless `window` is given.
            window (`tuple[float, float]`, *optional*):
                `(low, high)` of the whole volume, in scanner units (MR pictures: in grey levels).

        Returns:
            [`SliceInputs`]

        Raises:
            `ValueError`: not a slice, an unknown modality, or larger than the latent position table.
        """
        encoded, intensity = self._encode(image, modality, window)
        height, width = encoded.shape
        limit = self.latent_max_per_side * self.latent_stride
        if max(height, width) > limit:
            raise ValueError(
                f"The slice has {height}x{width} pixels, but the position table of this checkpoint ends at {limit} a "
                f"side ({self.latent_max_per_side} latents of {self.latent_stride} pixels): downsample the slice "
                "first, or use a checkpoint with larger position tables."
            )
        padded, pad = self._pad(encoded)
        size = resize_shape(*padded.shape, **self.vae_size)
        if max(size) > limit:
            raise ValueError(
                f"vae_size makes {size[0]}x{size[1]} pixels, but the position table of this checkpoint ends at "
                f"{limit} a side: lower vae_size['max_size'] or 'min_size'."
            )
        patches, grid = self._vit_patches(self._vit_pixels(padded))
        geometry = {"height": height, "width": width, "pad": pad}
        pixels = torch.from_numpy(to_channels(resize_float(padded, *size), intensity))
        return SliceInputs(pixels, patches, grid, intensity, geometry)

    def postprocess_slice(
        self, pixels: torch.Tensor | np.ndarray, intensity_record: dict[str, Any], geometry_record: dict[str, Any]
    ) -> np.ndarray:
        """A generated image back to scanner units on the input's grid: channels fused, resized, padding removed.

        Args:
            pixels (`torch.Tensor` or `np.ndarray` of shape `(3, H, W)`): in [-1, 1]; values outside are clipped.
            intensity_record (`dict`): of the *target*, see `target_record`.
            geometry_record (`dict`): of the source, see [`SliceInputs`].

        Returns:
            `np.ndarray` of shape `(height, width)`: float32 in the target's units.
        """
        if isinstance(pixels, torch.Tensor):
            pixels = pixels.detach().float().cpu().numpy()
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(f"Expected one image of shape (3, H, W), got {tuple(pixels.shape)}.")
        height, width = geometry_record["height"], geometry_record["width"]
        top, bottom, left, right = geometry_record["pad"]
        grey = resize_float(from_channels(pixels, intensity_record), top + height + bottom, left + width + right)
        return self.decode_intensity(grey[top : top + height, left : left + width], intensity_record)

    # ---- batches, for understanding: the surface transformers, TRL and pipelines call ----

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths and addresses, in nested lists too, at full depth; passes images on.

        A 2-D array gets a leading axis of one: `ProcessorMixin` takes only three axes for an image.
        """
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, Path)):
            return _open_picture(images)
        if isinstance(images, Image.Image):
            return images
        if isinstance(images, (np.ndarray, torch.Tensor)):
            return images[None] if images.ndim == 2 else images
        raise TypeError(f"Expected images, paths, or lists of them, got {type(images).__name__}.")

    def preprocess(
        self,
        images: Any,
        modality: str | list[str | None] | None = None,
        window: tuple[float, float] | list[tuple[float, float] | None] | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Images to ViT patches, one after the other in the order given.

        With a modality an image is a scan slice and goes the way of `preprocess_slice`. Without one it is a picture
        and goes BAGEL's way: RGB, resized by the rule, not padded; a 16-bit grey picture the same way in float32, 0 to
        65535. The area bound of the rule is not divided among images: an image gives the same tokens in any company.

        Args:
            images: a picture, path, `(H, W)` array in scanner units or uint8 `(H, W, 3)` array, or (nested) lists.
            modality (`str` or `list[str]`, *optional*): of all images, or one entry per image of the flattened list.
            window (`tuple` or `list[tuple]`, *optional*): `(low, high)`, or one entry per image.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.
            kwargs: settings of the class, for this call only.

        Returns:
            `BatchFeature`: `pixel_values` `(total patches, patch * patch * 3)`, float32 in [-1, 1]; `image_grid_hw`
            `(images, 2)`, int64, rows and columns of each patch grid.
        """
        unknown = kwargs.keys() - SynerMedGenImageProcessorKwargs.__annotations__.keys()
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no setting of {type(self).__name__}.")
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if kwargs:
            return type(self)(**{**self.to_dict(), **kwargs}).preprocess(images, modality, window, return_tensors)

        images = _flatten(self.fetch_images(images))
        if not images:
            raise ValueError("There is no image in the batch: pass images=None for text alone.")
        modalities = _one_each(modality, len(images), "modality", isinstance(modality, (list, tuple)))
        windows = _one_each(window, len(images), "window", window is not None and not np.isscalar(window[0]))
        pixels = [self._understanding_pixels(*each) for each in zip(images, modalities, windows, strict=True)]
        patches, grids = zip(*map(self._vit_patches, pixels), strict=True)
        data = {"pixel_values": torch.cat(patches).numpy(), "image_grid_hw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _understanding_pixels(self, image: Any, modality: str | None, window: tuple | None) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            if image.ndim == 3 and image.shape[0] == 1:
                image = image[0]  # see fetch_images
            if image.dtype in (np.uint8, torch.uint8) and (image.ndim == 2 or 3 in (image.shape[0], image.shape[-1])):
                image = np.asarray(image)
                image = Image.fromarray(image if image.ndim == 2 or image.shape[-1] == 3 else image.transpose(1, 2, 0))
        as_picture = isinstance(image, Image.Image) and modality is None and window is None
        if as_picture and not image.mode.startswith(("I", "F")):
            return picture_pixels(image, self.vit_size)
        encoded, _ = self._encode(image, modality, window)
        return self._vit_pixels(encoded if as_picture else self._pad(encoded)[0])

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Number of ViT tokens an image of this size takes, without the image; `images_kwargs` as in `preprocess`."""
        kwargs = images_kwargs or {}
        is_slice = kwargs.get("modality") is not None or kwargs.get("window") is not None
        if is_slice and kwargs.get("pad_to_square", self.pad_to_square):
            height = width = max(height, width)
        height, width = resize_shape(height, width, **kwargs.get("vit_size", self.vit_size))
        return (height // self.vit_patch_size) * (width // self.vit_patch_size)


def _record(modality: str | None, spec: dict[str, Any], low: float, high: float) -> dict[str, Any]:
    low, high = float(low), float(high)
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"The window ({low}, {high}) is empty: low must be below high, both finite.")
    record = {"modality": modality, "unit": spec["unit"], "low": low, "high": high, "scale": spec["scale"]}
    if spec["scale"] == "asinh":
        record["softening"] = float(spec.get("softening", 1.0))
    if "bands" in spec:
        own = {**record, "low": spec["low"], "high": spec.get("high", spec.get("reference_high"))}
        bands = np.array(spec["bands"], np.float64)
        moved = (low, high) != (own["low"], own["high"])
        record["bands"] = (_from_unit(_to_unit(bands, own), record) if moved else bands).tolist()
    return record


def _check_bands(modality: str, spec: dict[str, Any]):
    bands = spec.get("bands", [])
    window = (spec["low"], spec.get("high", spec.get("reference_high")))
    inside = all(len(band) == 2 and window[0] <= band[0] < band[1] <= window[1] for band in bands)
    if "bands" in spec and not (len(bands) == 2 and inside):
        raise ValueError(
            f"intensity[{modality!r}]: bands must be two windows [low, high] inside of {list(window)}, got {bands}."
        )


def _stretch(values: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    """The record's scale, before it is brought to [-1, 1]."""
    if record["scale"] == "linear":
        return values
    return record["softening"] * np.arcsinh(values / record["softening"])


def _to_unit(values: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    """Scanner units to [-1, 1], float64."""
    bottom, top = _stretch(np.array([record["low"], record["high"]]), record)
    return 2 * (_stretch(values, record) - bottom) / (top - bottom) - 1


def _from_unit(values: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    """[-1, 1] to scanner units, float64."""
    bottom, top = _stretch(np.array([record["low"], record["high"]]), record)
    values = bottom + (values + 1) / 2 * (top - bottom)
    return record["softening"] * np.sinh(values / record["softening"]) if record["scale"] == "asinh" else values


def _grey_to_rgb(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).expand(3, -1, -1).contiguous()


def _flatten(images: Any) -> list:
    if isinstance(images, list):
        return [image for each in images for image in _flatten(each)]
    return [images]


def _one_each(value: Any, count: int, name: str, is_list: bool) -> list:
    if not is_list:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"Got {len(value)} entries of {name} for {count} images: pass one for all, or one each.")
    return list(value)


__all__ = [
    "BANDS",
    "CODECS",
    "SliceInputs",
    "SynerMedGenImageProcessor",
    "from_channels",
    "guess_window",
    "load_slice",
    "own_window",
    "patchify",
    "picture_pixels",
    "resize_shape",
    "set_codec",
    "to_channels",
    "to_display",
    "unpatchify",
]
