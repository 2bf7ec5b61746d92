"""A digital phantom: simulated patients seen by every modality, for tests, demonstrations and the bundled weights.

One anatomy, many scanners. A subject is a set of tissue fractions per pixel (so partial volume comes for free); each
modality looks its own values up by tissue, mixes them by fraction and passes them through its own scanner model.
Everything is therefore aligned between modalities, and masks are known.

[`simulate_case`] gives slices spread over a region, which the bundled weights were trained on and which therefore stay
as they are to the bit; [`simulate_volume`] gives contiguous slices with a place in the patient, structures by name, and
what real pairs suffer from: misregistration and breathing. The patients are drawn in
[`synermedgen_hf.data.phantom_anatomy`]. This is a simulation: it looks like the real thing from a distance and is no
substitute for it.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

from synermedgen_hf.data.phantom_anatomy import (
    HEART_TISSUES,
    LUT,
    NAMES,
    Tissue,
    axial_body_anatomy,
    body_anatomy,
    brain_anatomy,
    heart_anatomy,
    pelvis_anatomy,
    smooth_noise,
)
from synermedgen_hf.data.phantom_scanners import SCANNERS, USUAL, Scanner, relaxation_times

# Raised whenever a change alters the pictures, so that cached cases of another version are not mixed in.
PHANTOM_VERSION = 2

PROTOCOLS = {
    ("brain", "synthrad"): ("MRI", "CT", "CBCT"),
    ("pelvis", "synthrad"): ("MRI", "CT", "CBCT"),
    ("brain", "brats"): ("T1", "T1CE", "T2", "FLAIR"),
    ("whole-body", "autopet"): ("CT", "PET"),
}


@dataclass(frozen=True)
class PhantomCase:
    """
    One simulated patient.

    Args:
        case_id (`str`): Such as `"phantom-brain-synthrad-00012"`; the patient and the case are one.
        region, protocol (`str`): A key of [`PROTOCOLS`].
        images (`dict[str, np.ndarray]`): Modality to float32 `(slices, height, width)` in scanner units: HU, SUV, or
            arbitrary MR units.
        mask (`np.ndarray`): bool `(slices, height, width)`, the body (BraTS: the brain).
        lesion (`np.ndarray`): bool, tumour or FDG-avid nodules.
        spacing (`tuple[float, float, float]`): mm between slices, rows, columns.
        axis (`str`): `"axial"` (anterior up, patient's right on the left) or `"coronal"` (head up).
    """

    case_id: str
    region: str
    protocol: str
    images: dict[str, np.ndarray]
    mask: np.ndarray
    lesion: np.ndarray
    spacing: tuple[float, float, float]
    axis: str


# ---------------------------------------------------------------------------------------------------------------------
# Scanners
# ---------------------------------------------------------------------------------------------------------------------

# Relaxivities of a gadolinium agent, 1/(s mM), at 1.5 and 3 T: Rohrer 2005 Invest Radiol 40:715.
RELAXIVITY = {1.5: (4.1, 5.0), 3.0: (3.7, 5.2)}


def mr_signal(
    sequence: str, field: float, contrast: bool, flip_degrees: float = 11, scanner: Scanner = USUAL
) -> np.ndarray:
    """
    Signal of every tissue under one MR sequence.

    Spin echo T1 (usually TR 520, TE 11 ms), turbo spin echo T2 (5000, 95), FLAIR (TR 9000, TI 2400, TE 115) and spoiled
    gradient echo (7 / 3.4 ms), by their textbook steady-state equations.

    Args:
        sequence (`str`): `"T1"`, `"T2"`, `"FLAIR"` or `"SPGR"`.
        field (`float`): Tesla, see [`~synermedgen_hf.data.phantom_scanners.relaxation_times`].
        contrast (`bool`): After gadolinium; below 1.5 T it acts as at 1.5 T.
        flip_degrees (`float`, defaults to 11): Of the gradient echo; a larger angle parts grey from white further.
        scanner ([`Scanner`], *optional*): Whose timing it is.

    Returns:
        `np.ndarray` of shape `(tissues,)`
    """
    pd = LUT[:, 1]
    t1, t2 = relaxation_times(LUT, field)
    if contrast:
        r1, r2 = RELAXIVITY[max(field, 1.5)]
        t1 = 1000 / (1000 / t1 + r1 * LUT[:, 7])
        t2 = 1000 / (1000 / t2 + r2 * LUT[:, 7])
    if sequence in ("T1", "T2"):
        tr, te = scanner.spin_echo if sequence == "T1" else scanner.turbo_spin_echo
        return pd * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)
    if sequence == "FLAIR":
        tr, ti, te = scanner.flair
        return pd * np.abs(1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)
    tr, te = scanner.gradient_echo
    e1, angle = np.exp(-tr / t1), np.deg2rad(flip_degrees)
    return pd * np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1) * np.exp(-te / t2)


def heart_signal(sequence: str, field: float) -> np.ndarray:
    """
    Signal of every one of [`HEART_TISSUES`] under the three sequences of a viability examination.

    Balanced steady state (TR 2.8, TE 1.4 ms, 60 degrees); late gadolinium enhancement, an inversion recovery ten
    minutes after contrast whose inversion time nulls healthy myocardium; black-blood T2 with inverted fat (TI 170, TE
    75 ms).

    Args:
        sequence (`str`): `"bSSFP"`, `"LGE"` or `"T2"`.
        field (`float`): 1.5 or 3.0 tesla.

    Returns:
        `np.ndarray` of shape `(tissues,)`
    """
    table = np.array(list(HEART_TISSUES.values()), dtype=np.float32)
    names = list(HEART_TISSUES)
    pd, (t1, t2) = table[:, 1], table[:, 2:4].T if field == 1.5 else table[:, 4:6].T
    if sequence == "bSSFP":
        e1, e2, angle = np.exp(-2.8 / t1), np.exp(-2.8 / t2), np.deg2rad(60)
        return pd * np.sin(angle) * (1 - e1) / (1 - (e1 - e2) * np.cos(angle) - e1 * e2) * np.exp(-1.4 / t2)
    beats = 1800  # ms between inversions: every second heartbeat
    if sequence == "LGE":
        t1 = 1000 / (1000 / t1 + RELAXIVITY[field][0] * table[:, 7])
        inversion = t1[names.index("myocardium")] * np.log(2)
        return pd * np.abs(1 - 2 * np.exp(-inversion / t1) + np.exp(-beats / t1))
    signal = pd * np.abs(1 - 2 * np.exp(-170 / t1) + np.exp(-beats / t1)) * np.exp(-75 / t2)
    signal[names.index("blood")] *= 0.08  # it has left the slice before the echo
    return signal


@dataclass(frozen=True)
class Elsewhere:
    """
    Tissue that lies elsewhere by the time a scanner looks at it.

    Args:
        tissue ([`Tissue`]): The patient.
        resample (`Callable`): Image of the patient, in place, to image of the patient where the scanner finds it.
    """

    tissue: Tissue
    resample: Callable[[np.ndarray], np.ndarray]

    def mix(self, values: np.ndarray) -> np.ndarray:
        """As [`Tissue.mix`]."""
        return self.resample(self.tissue.mix(values))


def scan_mr(
    rng: np.random.Generator,
    tissue: Tissue | Elsewhere,
    signal: np.ndarray,
    keep: np.ndarray | None = None,
    bias_nodes: tuple[int, int, int] = (4, 6, 6),
    scanner: Scanner = USUAL,
) -> np.ndarray:
    """
    Point spread, texture, bias field and Rician noise; scale and bias are the volume's, not the slice's.

    Args:
        rng (`np.random.Generator`): The scan.
        tissue ([`Tissue`] or [`Elsewhere`]): The patient.
        signal (`np.ndarray`): `(tissues,)`.
        keep (`np.ndarray`, *optional*): Coverage in [0, 1] of what is left by skull stripping.
        bias_nodes (`tuple[int, int, int]`, defaults to `(4, 6, 6)`): How often the bias field may bend along slices,
            rows and columns.
        scanner ([`Scanner`], *optional*): Depth of the bias field, and noise.

    Returns:
        `np.ndarray`: float32 of the shape of the tissue, in arbitrary units.
    """
    image = tissue.mix(signal)
    if keep is not None:
        image = image * keep
    image = ndimage.gaussian_filter(image, (0, 0.45, 0.45))
    image = image * (1 + 0.02 * smooth_noise(rng, image.shape, (0.5, 1.2, 1.2)))
    slices, height, width = image.shape
    coarse = smooth_noise(rng, bias_nodes, 1.2)
    zoom = [n / nodes for n, nodes in zip((slices, height, width), bias_nodes, strict=True)]
    bias = ndimage.zoom(coarse, zoom, order=3, grid_mode=True, mode="nearest")
    image = image * np.exp(rng.uniform(*scanner.mr_bias) * bias)
    peak = np.percentile(image, 99)
    noise = rng.uniform(*scanner.mr_noise) * peak
    image = np.hypot(image + noise * rng.standard_normal(image.shape), noise * rng.standard_normal(image.shape))
    if keep is not None:
        image = image * (keep > 0.5)
    return (image / peak * rng.uniform(300, 3000)).astype(np.float32)


# HU of organs without contrast agent, as in the planning CT of SynthRAD2025: Piekarski 1980 Radiology 137:727 (liver,
# spleen); kidney and heart muscle differ little from blood.
UNENHANCED = {"liver": 58, "spleen": 50, "kidney": 33, "myocardium": 46}


def scan_ct(
    rng: np.random.Generator,
    tissue: Tissue | Elsewhere,
    body: np.ndarray,
    hu: np.ndarray | None = None,
    scanner: Scanner = USUAL,
) -> np.ndarray:
    """
    HU with the blur and correlated noise of a diagnostic scanner; everything around the body is -1024.

    Args:
        rng (`np.random.Generator`): The scan.
        tissue ([`Tissue`] or [`Elsewhere`]): The patient.
        body (`np.ndarray`): bool, of the shape of the tissue.
        hu (`np.ndarray`, *optional*): `(tissues,)`; by default portal-venous.
        scanner ([`Scanner`], *optional*): Blur and noise.

    Returns:
        `np.ndarray`: float32 of the same shape.
    """
    image = ndimage.gaussian_filter(tissue.mix(LUT[:, 0] if hu is None else hu), (0, scanner.ct_blur, scanner.ct_blur))
    image = image + rng.uniform(*scanner.ct_noise) * smooth_noise(rng, image.shape, (0, 0.7, 0.7))
    # One pixel more than the body, so that its blurred edge stays.
    image[~ndimage.binary_dilation(body, np.ones((1, 3, 3), bool))] = -1024
    return np.clip(image, -1024, 3071).astype(np.float32)


def scan_cbct(
    rng: np.random.Generator, ct: np.ndarray, pixel_mm: float, radius_mm: float, scanner: Scanner = USUAL
) -> np.ndarray:
    """
    CT plus the artefacts of a cone-beam scan: filtered back-projection of (degraded - ideal) parallel projections.

    Scatter leaves a pedestal behind the thickest rays (Siewerdsen & Jaffray 2001, Sun & Star-Lack 2010), the beam
    hardens, detector gains differ (rings), photons are few, and the body may reach out of the circular field of view,
    whose edge is then too bright. Half resolution is enough for artefacts and four times as fast.

    Args:
        rng (`np.random.Generator`): The scan.
        ct (`np.ndarray`): `(slices, height, width)` in HU.
        pixel_mm (`float`): Of the CT.
        radius_mm (`float`): Of the field of view, outside of which all is -1024.
        scanner ([`Scanner`], *optional*): Scatter, photons and calibration.

    Returns:
        `np.ndarray`: float32 of the same shape, HU as uncalibrated as an onboard imager's.
    """
    from skimage.transform import iradon, radon

    water = 0.02  # attenuation per mm
    height, width = ct.shape[1:]
    side = max(height, width) // 2
    angles = np.linspace(0, 180, 120, endpoint=False)
    scatter_share, hardening = rng.uniform(*scanner.scatter), rng.uniform(0.002, 0.004)
    photons = rng.uniform(*scanner.photons)
    gain_spread, shift = rng.uniform(0.001, 0.003), rng.normal(scanner.cone_shift, 25)

    def resize(volume, rows, columns):
        zoom = (1, rows / volume.shape[1], columns / volume.shape[2])
        return ndimage.zoom(volume, zoom, order=1, grid_mode=True, mode="nearest")

    small = resize(ct, height // 2, width // 2)
    pad = [((side - n) // 2, side - n - (side - n) // 2) for n in small.shape[1:]]
    attenuation = np.pad(np.clip(1 + small / 1000, 0, None) * water, [(0, 0), *pad])
    paths = np.stack([radon(image, angles, circle=False) for image in attenuation]) * 2 * pixel_mm
    gains = rng.normal(1, gain_spread, (paths.shape[1], 1))
    scatter = scatter_share * np.exp(-paths.max((1, 2), keepdims=True))
    counts = rng.poisson(photons * (np.exp(-paths) + scatter) * np.clip(gains, 0.9, 1.1))
    errors = -np.log(np.maximum(counts, 1) / photons) - hardening * paths**2 - paths
    artefact = np.stack([iradon(error, angles, output_size=side, circle=False) for error in errors])
    artefact = artefact[:, pad[0][0] : side - pad[0][1], pad[1][0] : side - pad[1][1]] * 1000 / water / (2 * pixel_mm)
    image = ct + resize(artefact, height, width) + shift

    rows, columns = np.indices((height, width))
    to_edge = radius_mm - pixel_mm * np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2)
    image = image + 150 * np.exp(-np.clip(to_edge, 0, None) / 8) * (ct > -500)
    image[:, to_edge < 0] = -1024
    return np.clip(image, -1024, 3071).astype(np.float32)


def scan_pet(
    rng: np.random.Generator,
    tissue: Tissue | Elsewhere,
    pixel_mm: float,
    between_mm: float,
    scanner: Scanner = USUAL,
) -> np.ndarray:
    """SUV through the resolution and the counting noise of a PET scanner, smoothed again as for reading."""

    def blur(image, fwhm_mm):
        sigma = fwhm_mm / 2.355
        return ndimage.gaussian_filter(image, (sigma / between_mm, sigma / pixel_mm, sigma / pixel_mm))

    uptake = LUT[:, 6] * rng.normal(1, 0.06, len(NAMES))
    # These depend on the patient more than on the tissue: fasting, drinking, the tumour.
    for name, low, high in (("myocardium", 0.8, 9), ("urine", 8, 25), ("nodule", 4, 14)):
        uptake[NAMES.index(name)] = rng.uniform(low, high)
    image = blur(tissue.mix(uptake), rng.uniform(*scanner.pet_fwhm))
    counts = rng.uniform(*scanner.pet_counts)
    return blur(rng.poisson(np.maximum(image, 0) * counts) / counts, 4.2).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


# Modality of BraTS to pulse sequence and whether after gadolinium.
BRATS_SEQUENCES = {"T1": ("T1", False), "T1CE": ("T1", True), "T2": ("T2", False), "FLAIR": ("FLAIR", False)}

# mm of the modelled range the slices spread over: height in MNI space, height above the femoral heads, front to back.
SPANS = {"brain": (-20, 65), "pelvis": (-45, 105), "whole-body": (-64, 64)}


def simulate_case(region: str, protocol: str, seed: int, num_slices: int = 8, size: int = 128) -> PhantomCase:
    """
    Simulate one patient, the same for the same arguments.

    The MRI of SynthRAD's brains is a T1-weighted gradient echo, half of them after contrast; about a third come
    skull-stripped (background 0) while their CT keeps the whole head, since research MR often is. Four of five MRIs of
    SynthRAD's pelvises are T2-weighted. BraTS cases are skull-stripped and most hold a tumour.

    Args:
        region, protocol (`str`): A key of [`PROTOCOLS`].
        seed (`int`): The patient.
        num_slices (`int`, defaults to 8): Spread evenly over the region.
        size (`int`, defaults to 128): Longer side in pixels; the field of view is fixed.

    Returns:
        [`PhantomCase`]

    Raises:
        `ValueError`: No such region and protocol, or fewer than one slice.
    """
    if (region, protocol) not in PROTOCOLS:
        known = ", ".join(f"{r}/{p}" for r, p in PROTOCOLS)
        raise ValueError(f"There is no phantom {region}/{protocol}. Choose one of {known}.")
    if num_slices < 1 or size < 32:
        raise ValueError(f"num_slices must be at least 1 and size at least 32, got {num_slices} and {size}.")
    rng = np.random.default_rng([zlib.crc32(f"{region}/{protocol}".encode()), seed])
    field = float(rng.choice([1.5, 3.0]))

    low, high = SPANS[region]
    between = (high - low) / num_slices
    positions = low + between * (np.arange(num_slices) + rng.uniform(0.1, 0.9))
    if region == "brain":
        tumour = protocol == "brats" and rng.random() < 0.85
        tissue, brain, lesion, pixel = brain_anatomy(rng, positions, between, size, tumour)
        # The air of the frontal sinus is within the head, hence the filling.
        head = np.stack([ndimage.binary_fill_holes(air < 0.5) for air in tissue.fractions[0]])
        mask = brain > 0.5 if protocol == "brats" else head
    elif region == "pelvis":
        tissue, mask, pixel = pelvis_anatomy(rng, positions, between, size)
        lesion = np.zeros_like(mask)
    else:
        tissue, mask, lesion, pixel = body_anatomy(rng, positions, between, size)

    if protocol == "brats":
        images = {
            name: scan_mr(rng, tissue, mr_signal(sequence, field, contrast), brain)
            for name, (sequence, contrast) in BRATS_SEQUENCES.items()
        }
    elif protocol == "synthrad":
        if region == "brain":
            keep, radius = brain if rng.random() < 0.3 else None, 120
            signal = mr_signal("SPGR", field, bool(rng.random() < 0.5), rng.uniform(10, 18))
        else:
            # Wider patients reach out of a field of view of ordinary size.
            keep, radius = None, rng.uniform(165, 215)
            signal = mr_signal("T2" if rng.random() < 0.8 else "T1", field, False)
        ct = scan_ct(rng, tissue, mask)
        images = {"MRI": scan_mr(rng, tissue, signal, keep), "CT": ct, "CBCT": scan_cbct(rng, ct, pixel, radius)}
    else:
        images = {"CT": scan_ct(rng, tissue, mask), "PET": scan_pet(rng, tissue, pixel, between)}
    return PhantomCase(
        case_id=f"phantom-{region}-{protocol}-{seed:05d}",
        region=region,
        protocol=protocol,
        images=images,
        mask=mask,
        lesion=lesion,
        spacing=(float(between), float(pixel), float(pixel)),
        axis="coronal" if region == "whole-body" else "axial",
    )


class Stack(NamedTuple):
    """What a volume shows: modalities, mm of the modelled range, and slice distance in pixels but at least in mm."""

    modalities: tuple[str, ...]
    low: float
    high: float
    between_pixels: float
    between_mm: float


# Slice distances are those of the datasets at their own pixel sizes, so that a small volume has the proportions of a
# large one. The heart has few thick slices however small the picture.
VOLUMES = {
    ("brain", "synthrad"): Stack(("MRI", "CT", "CBCT"), -26, 88, 1, 1),
    ("pelvis", "synthrad"): Stack(("MRI", "CT", "CBCT"), -55, 110, 2.5, 2.5),
    ("head-neck", "synthrad"): Stack(("MRI", "CT", "CBCT"), -180, 45, 3, 3),
    ("thorax", "synthrad"): Stack(("MRI", "CT", "CBCT"), 428, 626, 3, 3),
    ("abdomen", "synthrad"): Stack(("MRI", "CT", "CBCT"), 255, 470, 3, 3),
    ("brain", "brats"): Stack(("T1", "T1CE", "T2", "FLAIR"), -70, 85, 1, 1),
    ("whole-body", "autopet"): Stack(("CT", "PET"), 8, 912, 1.5, 3),
    ("heart", "myops"): Stack(("bSSFP", "LGE", "T2"), 6, 78, 0, 12),
}

# Sequence and contrast agent of SynthRAD's MR, each with how often it is taken.
MR_SEQUENCES = {
    "brain": ((("SPGR", False), 0.5), (("SPGR", True), 0.5)),
    "pelvis": ((("T2", False), 0.8), (("T1", False), 0.2)),
    "head-neck": ((("SPGR", True), 0.5), (("T2", False), 0.5)),
    "thorax": ((("T2", False), 0.5), (("SPGR", False), 0.5)),
    "abdomen": ((("T2", False), 0.5), (("SPGR", False), 0.5)),
}


@dataclass(frozen=True)
class PhantomVolume(PhantomCase):
    """
    One simulated examination: contiguous slices that have a place in the patient.

    Args:
        structures (`dict[str, np.ndarray]`): Name to bool `(slices, height, width)`, of what the region has: `"brain"`,
            `"bone"`, `"bladder"`, `"prostate"`, `"rectum"`, `"liver"`, `"lungs"`, `"kidneys"`, `"heart"`, ...; parts of
            a brain tumour are `"necrosis"`, `"enhancing rim"` and `"oedema"`; a heart has `"left ventricle"`,
            `"right ventricle"`, `"myocardium"` (healthy), `"oedema"` and `"scar"`. They do not overlap, except that the
            tumour is part of the brain.
        affine (`np.ndarray`): `(4, 4)`, indices `(slice, row, column)` to mm towards the patient's right, front and
            head (RAS+).
        transforms (`dict[str, np.ndarray]`): Modality to `(4, 4)`: where a point of the patient, in the mm of `affine`,
            is found in that image. Identity without misregistration, and always for the CT.
        breathing_mm (`float`): By how much the dome of the liver stands higher in the PET than in the CT.
    """

    structures: dict[str, np.ndarray]
    affine: np.ndarray
    transforms: dict[str, np.ndarray]
    breathing_mm: float


def simulate_volume(
    region: str,
    protocol: str,
    seed: int,
    size: int = 128,
    num_slices: int | None = None,
    between: float | None = None,
    visit: int = 0,
    misregistration: bool = False,
    breathing: bool = False,
    mr_sequence: tuple[str, bool] | None = None,
    modalities: tuple[str, ...] | None = None,
    scanner: str = "usual",
) -> PhantomVolume:
    """
    Simulate one examination of one patient, the same for the same arguments.

    The patients are others than those of [`simulate_case`]. Needs 150 to 450 bytes of memory per voxel while it
    runs, the more the more kinds of tissue there are.

    Args:
        region, protocol (`str`): A key of [`VOLUMES`].
        seed (`int`): The patient.
        size (`int`, defaults to 128): Columns; the field of view is fixed (240 mm for the brain, 300 mm with the neck,
            340 mm for the heart, 430 mm for pelvis, abdomen and thorax, 506 mm for the whole body).
        num_slices (`int`, *optional*): At most so many neighbouring slices, from a place that depends on the patient;
            by default the whole region.
        between (`float`, *optional*): mm from slice to slice, by default in the proportions of the dataset: 1 pixel for
            the brain, 2.5 for the pelvis, 3 for the regions of SynthRAD2025, 1.5 for the whole body; 12 mm for the
            heart.
        visit (`int`, defaults to 0): Examinations of one patient share the anatomy; the tumour grows by 15 % each time,
            FDG-avid nodules come and go, and the patient lies elsewhere on the table.
        misregistration (`bool`, defaults to `False`): The MRI and the CBCT of SynthRAD are off by 1 to 2 mm and up to 1
            degree about each axis, as is left over by rigid registration.
        breathing (`bool`, defaults to `False`): The PET was taken while breathing freely, the CT while holding a
            breath: the liver's dome stands 5 to 15 mm higher in the PET.
        mr_sequence (`tuple[str, bool]`, *optional*): Sequence of SynthRAD's MRI (see [`mr_signal`]) and whether after
            contrast; by default one of [`MR_SEQUENCES`].
        modalities (`tuple[str, ...]`, *optional*): Take only these; they are what they are beside the others.
        scanner (`str`, defaults to `"usual"`): `"unseen"` takes the same patients with machines outside the range of
            the training data, for the keys of [`PROTOCOLS`]; see [`~synermedgen_hf.data.phantom_scanners`].

    Returns:
        [`PhantomVolume`]: The whole body in coronal slices, everything else in axial ones. The short-axis slices of a
        heart count as axial.

    Raises:
        `ValueError`: No such region and protocol, fewer than one slice, or an option or modality that the protocol does
            not have.
    """
    if (region, protocol) not in VOLUMES:
        known = ", ".join(f"{r}/{p}" for r, p in VOLUMES)
        raise ValueError(f"There is no phantom volume {region}/{protocol}. Choose one of {known}.")
    if size < 32 or (num_slices is not None and num_slices < 1) or (between is not None and between <= 0):
        got = f"got {size}, {num_slices} and {between}"
        raise ValueError(f"size must be at least 32, num_slices at least 1 and between positive, {got}.")
    if (misregistration or mr_sequence) and protocol != "synthrad":
        raise ValueError(f"misregistration and mr_sequence are options of synthrad volumes, not of {protocol}.")
    if breathing and protocol != "autopet":
        raise ValueError(f"breathing is an option of autopet volumes, not of {protocol}.")
    if scanner not in SCANNERS or (scanner != "usual" and (region, protocol) not in PROTOCOLS):
        raise ValueError(f"There is no scanner {scanner!r} for {region}/{protocol}; scanners: {', '.join(SCANNERS)}.")
    stack, machine = VOLUMES[region, protocol], SCANNERS[scanner]
    unknown = set(modalities or ()) - set(stack.modalities)
    if unknown:
        raise ValueError(
            f"{region}/{protocol} has no {', '.join(sorted(unknown))}, only {', '.join(stack.modalities)}."
        )

    def stream(name: str, visit: int = 0) -> np.random.Generator:
        # One for each purpose, so that no option, modality or visit changes what it has nothing to do with.
        return np.random.default_rng([zlib.crc32(f"{region}/{protocol}/{name}".encode()), seed, visit])

    patient, examination = stream("patient"), stream("examination", visit)
    field = float(examination.choice(machine.fields))
    table_mm = np.round([*examination.uniform(-15, 15, 2), examination.uniform(-900, 300)], 1)

    width = {"brain": 240, "head-neck": 300, "heart": 340, "whole-body": 506}.get(region, 430)
    width *= machine.field_of_view
    between = float(between or max(stack.between_pixels * width / size, stack.between_mm))
    most = max(int((stack.high - stack.low) / between), 1)
    slices = min(num_slices or most, most)
    start = stack.low + patient.random() * (stack.high - stack.low - slices * between)
    z_mm = start + between * (np.arange(slices) + 0.5)

    brain = None
    if region in ("brain", "head-neck"):
        tumour = protocol == "brats" and patient.random() < 0.85
        # Somewhere in the slices, and high enough to be in the cerebrum.
        where = tuple(np.clip((-20, 60), z_mm.min(), z_mm.max()))
        tissue, brain, lesion, pixel = brain_anatomy(
            patient, z_mm, between, size, tumour, 1.15**visit, where, neck=region == "head-neck", width_mm=width
        )
        # Air inside the head is within it, hence the filling.
        head = np.stack([ndimage.binary_fill_holes(air < 0.5) for air in tissue.fractions[0]])
        mask = brain > 0.5 if protocol == "brats" else head
    elif region == "pelvis":
        tissue, mask, pixel = pelvis_anatomy(patient, z_mm, between, size, width)
        lesion = np.zeros_like(mask)
    elif region == "heart":
        tissue, mask, lesion, pixel = heart_anatomy(patient, z_mm, between, size)
    else:
        arms_raised = 0.3 if region == "whole-body" else 1.0
        nodules = stream("nodules", visit)
        tissue, mask, lesion, pixel = axial_body_anatomy(patient, z_mm, between, size, width, arms_raised, nodules)

    # Columns run to the patient's left, rows to the back, slices to the head.
    rows, columns = mask.shape[1:]
    affine = np.array([[0, 0, -pixel, 0], [0, -pixel, 0, 0], [between, 0, 0, 0], [0, 0, 0, 1.0]])
    affine[:3, 3] = table_mm + (pixel * (columns - 1) / 2, pixel * (rows - 1) / 2, z_mm[0])

    if mr_sequence is None and protocol == "synthrad":
        choices, shares = zip(*MR_SEQUENCES[region], strict=True)
        mr_sequence = choices[examination.choice(len(choices), p=shares)]
    hu = LUT[:, 0]
    if protocol == "synthrad":
        hu = np.array([UNENHANCED.get(name, portal_venous) for name, portal_venous in zip(NAMES, hu, strict=True)])
    # The bias field bends about every 45 mm along the slices, as it does within them.
    bias_nodes = (max(1, round(slices * between / 45)), 6, 6)
    breathing_mm = stream("breathing", visit).uniform(5, 15) if breathing else 0.0

    images, transforms = {}, {}
    for name in modalities or stack.modalities:
        rng, seen, body = stream(name, visit), tissue, mask
        transforms[name] = np.eye(4)
        if misregistration and name != "CT":
            transforms[name] = _small_motion(stream(f"motion of {name}", visit), affine, mask.shape)
            resample = _rigid(transforms[name], affine)
            seen, body = Elsewhere(tissue, resample), resample(mask.astype(np.float32)) > 0.5
        if name == "CT":
            images[name] = scan_ct(rng, seen, body, hu, machine)
        elif name == "CBCT":
            # Heads fit into the field of view of a cone beam; wider patients reach out of it.
            radius = {"brain": 120, "head-neck": rng.uniform(125, 150)}.get(region, rng.uniform(165, 215))
            ct = scan_ct(rng, seen, body, hu, machine)
            images[name] = scan_cbct(rng, ct, pixel, radius * machine.cone_width, machine)
        elif name == "PET":
            if breathing:
                seen = Elsewhere(tissue, partial(_lifted, z_mm=z_mm, between=between, lift_mm=breathing_mm))
            images[name] = scan_pet(rng, seen, pixel, between, machine)
        elif protocol == "myops":
            images[name] = scan_mr(rng, seen, heart_signal(name, field), bias_nodes=bias_nodes)
        else:
            sequence, contrast = mr_sequence or BRATS_SEQUENCES[name]
            signal = mr_signal(sequence, field, contrast, rng.uniform(*machine.flip_degrees), machine)
            images[name] = scan_mr(rng, seen, signal, brain if protocol == "brats" else None, bias_nodes, machine)

    structures = {name: inside for name, inside in tissue.structures.items() if inside.any()}
    spacing = (between, pixel, pixel)
    if region == "whole-body":
        # Slices from the thighs upwards become rows from the head downwards, rows from the front slices from the back.
        def coronal(volume):
            return np.ascontiguousarray(volume.transpose(1, 0, 2)[::-1, ::-1])

        images = {name: coronal(image) for name, image in images.items()}
        structures = {name: coronal(inside) for name, inside in structures.items()}
        mask, lesion = coronal(mask), coronal(lesion)
        turn = np.array([[0, -1, 0, slices - 1], [-1, 0, 0, rows - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        affine, spacing = affine @ turn, (pixel, between, pixel)
    return PhantomVolume(
        case_id=f"phantom-volume-{region}-{protocol}-{seed:05d}-{visit}{'' if scanner == 'usual' else f'-{scanner}'}",
        region=region,
        protocol=protocol,
        images=images,
        mask=mask,
        lesion=lesion,
        spacing=tuple(map(float, spacing)),
        axis="coronal" if region == "whole-body" else "axial",
        structures=structures,
        affine=affine,
        transforms=transforms,
        breathing_mm=float(breathing_mm),
    )


def _small_motion(rng: np.random.Generator, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A rigid transform `(4, 4)` in mm: up to 1 degree about each axis through the volume's middle, then 1 to 2 mm."""
    rotation = Rotation.from_euler("xyz", rng.uniform(-1, 1, 3), degrees=True).as_matrix()
    direction = rng.standard_normal(3)
    shift = direction / np.linalg.norm(direction) * rng.uniform(1, 2)
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    transform = np.eye(4)
    transform[:3, :3] = rotation
    transform[:3, 3] = middle - rotation @ middle + shift
    return transform


def _rigid(transform: np.ndarray, affine: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Moves an image on the grid of `affine` by `transform`, linearly interpolated as SynthRAD's are."""
    pull = np.linalg.inv(affine) @ np.linalg.inv(transform) @ affine

    def resample(image: np.ndarray) -> np.ndarray:
        return ndimage.affine_transform(image, pull[:3, :3], pull[:3, 3], order=1, mode="nearest")

    return resample


def _lifted(image: np.ndarray, z_mm: np.ndarray, between: float, lift_mm: float) -> np.ndarray:
    """Shifts axial slices upwards, by `lift_mm` at the diaphragm and less and less above and below it."""
    lift = lift_mm * np.exp(-(((z_mm - 455) / 110) ** 2))
    places = np.clip(np.arange(len(z_mm)) - lift / between, 0, len(z_mm) - 1)
    below = places.astype(int)
    share = (places - below).astype(np.float32)[:, None, None]
    return image[below] * (1 - share) + image[np.minimum(below + 1, len(image) - 1)] * share


# Seeds of the subjects of each split. A subject is one seed: no two splits can share one, nor any of its slices.
SPLIT_SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}


def load_phantom(
    split: str,
    cases_per_protocol: int,
    num_slices: int = 8,
    cache_dir: str | Path | None = None,
    size: int = 128,
    num_proc: int = 1,
) -> list[PhantomCase]:
    """
    Simulated cases of all protocols, made once and kept on disk.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`; splits have no subject in common.
        cases_per_protocol (`int`): Subjects of each of [`PROTOCOLS`].
        num_slices (`int`, defaults to 8): Slices per subject.
        cache_dir (`str` or `Path`, *optional*): Where cases are kept as safetensors; not kept if absent.
        size (`int`, defaults to 128): Longer side in pixels.
        num_proc (`int`, defaults to 1): Processes that simulate.

    Returns:
        `list[PhantomCase]`: Protocol after protocol, in the order of seeds.

    Raises:
        `ValueError`: Unknown split.
    """
    if split not in SPLIT_SEEDS:
        raise ValueError(f"Unknown split {split!r}. Choose one of {', '.join(SPLIT_SEEDS)}.")
    first = SPLIT_SEEDS[split]
    jobs = [
        (region, protocol, seed, num_slices, size, None if cache_dir is None else Path(cache_dir))
        for region, protocol in PROTOCOLS
        for seed in range(first, first + cases_per_protocol)
    ]
    if num_proc == 1:
        return [_cached_case(job) for job in tqdm(jobs, desc=f"phantom {split}")]
    with get_context("spawn").Pool(num_proc) as pool:
        return list(tqdm(pool.imap(_cached_case, jobs, chunksize=4), total=len(jobs), desc=f"phantom {split}"))


def _cached_case(job) -> PhantomCase:
    region, protocol, seed, num_slices, size, cache_dir = job
    if cache_dir is None:
        return simulate_case(region, protocol, seed, num_slices, size)
    path = cache_dir / f"v{PHANTOM_VERSION}" / f"{region}-{protocol}-{seed}-{num_slices}x{size}.safetensors"
    if path.exists():
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            record = json.loads(file.metadata()["case"])
        return PhantomCase(
            images={name: tensors[f"images.{name}"] for name in PROTOCOLS[region, protocol]},
            mask=tensors["mask"],
            lesion=tensors["lesion"],
            spacing=tuple(record.pop("spacing")),
            **record,
        )
    case = simulate_case(region, protocol, seed, num_slices, size)
    record = {name: getattr(case, name) for name in ("case_id", "region", "protocol", "spacing", "axis")}
    tensors = {f"images.{name}": array for name, array in case.images.items()}
    tensors |= {"mask": case.mask, "lesion": case.lesion}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that an interrupted run leaves no half file under the final name.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, unfinished, {"case": json.dumps(record)})
    os.replace(unfinished, path)
    return case
