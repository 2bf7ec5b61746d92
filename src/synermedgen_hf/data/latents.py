"""Slices as the generator reads them, encoded once: posteriors of the VAE and pixels of the ViT, on disk if wanted.

The posterior is kept rather than a latent, because it is sampled anew each time a slice is used. A slice is encoded
alone, so that what is kept is a function of the slice and the codec, whatever else was encoded beside it.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..image_processing_synermedgen import SliceInputs, patchify, resize_shape, square_padding
from ..loading_synermedgen import weights_checksum
from .splits import write_whole

logger = logging.get_logger(__name__)

# Raised whenever a change alters what is kept.
LATENTS_VERSION = 1


@dataclass
class StoredSlice:
    """
    One slice of a data set, read when it is needed.

    Args:
        read (`Callable`): Gives its picture as `datasets` keeps it, `{"bytes", "path"}`.
        modality (`str`): T1, T1CE, T2, FLAIR, MRI, CT, CBCT or PET.
        window (`dict`): `unit`, `low` and `high` of its volume.
        case (`str`): Its case, for messages.
    """

    read: Callable[[], dict]
    modality: str
    window: dict
    case: str

    def content(self) -> bytes:
        """The file of the picture."""
        picture = self.read()
        return Path(picture["path"]).read_bytes() if picture["bytes"] is None else picture["bytes"]

    def size(self) -> tuple[int, int]:
        """Rows and columns of pixels, from the head of the file."""
        with Image.open(io.BytesIO(self.content())) as picture:
            return picture.height, picture.width

    def fingerprint(self, content: bytes) -> str:
        """64 hexadecimal digits of picture, modality and window: another one gives other latents."""
        state = hashlib.sha256(content)
        state.update(json.dumps([self.modality, self.window], sort_keys=True).encode())
        return state.hexdigest()


@dataclass
class EncodedSlice:
    """
    Args:
        mean, std (`torch.Tensor` of shape `(latent_channels, h, w)`): float16, of the VAE's posterior.
        pixels (`torch.Tensor` of shape `(patches, patch_size**2)`): float16, the grey values of the ViT's patches.
    """

    mean: torch.Tensor
    std: torch.Tensor
    pixels: torch.Tensor

    def sample(self, generator: torch.Generator, shift: float, scale: float, patch: int) -> torch.Tensor:
        """A latent drawn from the posterior, scaled and cut into tokens, `(tokens, latent_token_dim)` float32."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return patchify((self.mean.float() + self.std.float() * noise - shift) * scale, patch)

    def vit_patches(self) -> torch.Tensor:
        """`(patches, patch_size**2 * 3)`, float32: all three channels of a scan are the same."""
        return self.pixels.float().repeat_interleave(3, dim=1)


class LatentCache:
    """
    Encoded slices on disk, one safetensors file each, named by the fingerprint of its picture. Several processes may
    read and write at once: a file appears whole or not at all.

    Args:
        folder (`str` or `Path`): Made if it does not exist.
        codec (`str`): Of [`codec_fingerprint`].

    Raises:
        `ValueError`: The folder holds latents of another codec.
    """

    def __init__(self, folder: str | Path, codec: str):
        self.folder, self.codec = Path(folder), codec
        record = self.folder / "codec.json"
        if record.exists():
            self.check(json.loads(record.read_text())["codec"])
        else:
            write_whole(record, json.dumps({"codec": codec, "version": LATENTS_VERSION}) + "\n")

    def check(self, codec: str | None):
        if codec != self.codec:
            raise ValueError(
                f"{self.folder} holds latents of another codec ({str(codec)[:12]} instead of {self.codec[:12]}): of "
                "another autoencoder, other intensity windows or sizes. Choose another folder, or delete this one."
            )

    def path(self, image: str) -> Path:
        return self.folder / image[:2] / f"{image}.safetensors"

    def read(self, image: str) -> EncodedSlice | None:
        """The encoded slice of a fingerprint, or `None` where there is none that can be read."""
        path = self.path(image)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                record, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            logger.warning(f"{path} is damaged ({error}) and is made again.")
            return None
        self.check(record.get("codec"))
        return EncodedSlice(**tensors)

    def write(self, image: str, encoded: EncodedSlice):
        path = self.path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not the number of the process: in containers that share a folder it may be the same.
        unfinished = path.with_suffix(f".{uuid4().hex}.tmp")
        tensors = {name: getattr(encoded, name).contiguous() for name in ("mean", "std", "pixels")}
        save_file(tensors, unfinished, {"codec": self.codec})
        os.replace(unfinished, path)


def codec_fingerprint(vae, image_processor, precision: str = "no") -> str:
    """
    64 hexadecimal digits of all that turns a slice into latents: the weights and the configuration of the autoencoder,
    the windows and sizes of the image processor, and the precision it is run in.
    """
    names = ("intensity", "vae_size", "vit_size", "vit_patch_size", "latent_stride", "pad_to_square")
    settings = {name: getattr(image_processor, name) for name in names}
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    what = [LATENTS_VERSION, weights_checksum(vae), str(vae.dtype), precision, config, settings]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def check_sizes(image_processor):
    """Raise a `ValueError` if the sizes an image is brought to cannot be cut into whole tokens."""
    strides = {"vae_size": image_processor.latent_stride, "vit_size": image_processor.vit_patch_size}
    for name, token in strides.items():
        stride = getattr(image_processor, name)["stride"]
        if stride % token:
            raise ValueError(
                f"The image processor brings images to multiples of {stride} pixels ({name}['stride']), which are not "
                f"divisible by the {token} pixels of a token: set the stride to {token}."
            )


def window_for(image_processor, modality: str, window: dict) -> tuple[float, float] | None:
    """
    The window to read a slice of a data set through; `None` leaves it to the codec.

    HU and SUV are read through the window of the checkpoint, whatever that of the data set; MR, and grey levels, have
    no scale but that of their volume.

    Args:
        image_processor ([`SynerMedGenImageProcessor`]): The codec.
        modality (`str`): Of the slice.
        window (`dict`): `unit`, `low` and `high` of its volume.

    Returns:
        `tuple[float, float]`: `low` and `high` in the unit of the slice, or `None`.
    """
    spec = image_processor.intensity.get(modality)
    own = spec is not None and "high" in spec and window["unit"] == spec["unit"]
    return None if own else (window["low"], window["high"])


def prepare_slice(image_processor, picture: Image.Image, modality: str, window: dict, case: str) -> SliceInputs:
    """
    One slice of a data set as a model reads it.

    Args:
        image_processor ([`SynerMedGenImageProcessor`]): The codec.
        picture (`PIL.Image.Image`): The slice in scanner units, or in grey levels.
        modality (`str`): T1, T1CE, T2, FLAIR, MRI, CT, CBCT or PET.
        window (`dict`): `unit`, `low` and `high` of its volume.
        case (`str`): For messages.

    Raises:
        `ValueError`: It is none that the codec takes; the case is named.
    """
    try:
        return image_processor.preprocess_slice(picture, modality, window_for(image_processor, modality, window))
    except ValueError as error:
        raise ValueError(f"A {modality} slice of {case} cannot be used: {error}") from error


class SliceEncoder:
    """
    Slices to [`EncodedSlice`].

    Args:
        vae (`AutoencoderKL`): Frozen, where it is to be run.
        image_processor ([`SynerMedGenImageProcessor`]): Scanner units to pixels.
        precision (`str`, defaults to `"no"`): `"bf16"` runs the autoencoder in bfloat16.
        cache_dir (`str` or `Path`, *optional*): Keep what was encoded here, and look here first.

    Raises:
        `ValueError`: Sizes are not divisible by the stride, or the folder holds latents of another codec.
    """

    def __init__(self, vae, image_processor, precision: str = "no", cache_dir: str | Path | None = None):
        check_sizes(image_processor)
        self.vae, self.image_processor, self.precision = vae, image_processor, precision
        self.shift, self.scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        self.cache = None
        if cache_dir is not None:
            self.cache = LatentCache(cache_dir, codec_fingerprint(vae, image_processor, precision))

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of latent tokens and of ViT patches that a slice of so many pixels will have."""
        codec = self.image_processor
        top, bottom, left, right = square_padding(height, width) if codec.pad_to_square else (0, 0, 0, 0)
        padded, strides = (top + height + bottom, left + width + right), (codec.latent_stride, codec.vit_patch_size)
        return tuple(
            tuple(side // stride for side in resize_shape(*padded, **size))
            for size, stride in zip((codec.vae_size, codec.vit_size), strides, strict=True)
        )

    def __call__(self, stored: StoredSlice) -> EncodedSlice:
        content = stored.content()
        image = stored.fingerprint(content) if self.cache else None
        encoded = self.cache.read(image) if self.cache else None
        if encoded is None:
            encoded = self.encode(stored, content)
            if self.cache:
                self.cache.write(image, encoded)
        return encoded

    @torch.no_grad()
    def encode(self, stored: StoredSlice, content: bytes) -> EncodedSlice:
        """Encode one slice, whatever the cache holds."""
        picture = Image.open(io.BytesIO(content))
        inputs = prepare_slice(self.image_processor, picture, stored.modality, stored.window, stored.case)
        half = torch.autocast(self.vae.device.type, torch.bfloat16)
        with half if self.precision == "bf16" else contextlib.nullcontext():
            posterior = self.vae.encode(inputs.vae_pixels[None].to(self.vae.device, self.vae.dtype)).latent_dist
        return EncodedSlice(
            mean=posterior.mean[0].half().cpu(),
            std=posterior.std[0].half().cpu(),
            pixels=inputs.vit_patches.view(len(inputs.vit_patches), -1, 3)[..., 0].half(),
        )


__all__ = [
    "EncodedSlice",
    "LatentCache",
    "SliceEncoder",
    "StoredSlice",
    "check_sizes",
    "codec_fingerprint",
    "prepare_slice",
    "window_for",
]
