"""A digital phantom: simulated patients seen by every modality, for tests, demonstrations and the bundled weights.

One anatomy, many scanners. A subject is a set of tissue fractions per pixel (so partial volume comes for free); each
modality looks its own values up by tissue, mixes them by fraction and passes them through its own scanner model.
Everything is therefore aligned between modalities, and masks are known.

The brain is the MNI grey and white matter atlas of the nilearn package, deformed per subject and wrapped in a modelled
skull; pelvis and whole body are drawn from soft-edged ellipsoids deformed by smooth noise. This is a simulation: it
looks like the real thing from a distance and is no substitute for it.
"""

import json
import os
import zlib
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import ndimage
from tqdm.auto import tqdm

from synermedgen_hf.data.phantom_anatomy import (
    LUT,
    NAMES,
    Tissue,
    body_anatomy,
    brain_anatomy,
    pelvis_anatomy,
    smooth_noise,
)

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


def mr_signal(sequence: str, field: float, contrast: bool, flip_degrees: float = 11) -> np.ndarray:
    """
    Signal of every tissue under one MR sequence.

    Spin echo T1 (TR 520, TE 11 ms), turbo spin echo T2 (5000, 95), FLAIR (TR 9000, TI 2400, TE 115) and spoiled
    gradient echo (7 / 3.4 ms), by their textbook steady-state equations.

    Args:
        sequence (`str`): `"T1"`, `"T2"`, `"FLAIR"` or `"SPGR"`.
        field (`float`): 1.5 or 3.0 tesla.
        contrast (`bool`): After gadolinium.
        flip_degrees (`float`, defaults to 11): Of the gradient echo; a larger angle parts grey from white further.

    Returns:
        `np.ndarray` of shape `(tissues,)`
    """
    pd = LUT[:, 1]
    t1, t2 = (LUT[:, 2], LUT[:, 3]) if field == 1.5 else (LUT[:, 4], LUT[:, 5])
    if contrast:
        r1, r2 = RELAXIVITY[field]
        t1 = 1000 / (1000 / t1 + r1 * LUT[:, 7])
        t2 = 1000 / (1000 / t2 + r2 * LUT[:, 7])
    if sequence == "T1":
        return pd * (1 - np.exp(-520 / t1)) * np.exp(-11 / t2)
    if sequence == "T2":
        return pd * (1 - np.exp(-5000 / t1)) * np.exp(-95 / t2)
    if sequence == "FLAIR":
        return pd * np.abs(1 - 2 * np.exp(-2400 / t1) + np.exp(-9000 / t1)) * np.exp(-115 / t2)
    e1, angle = np.exp(-7 / t1), np.deg2rad(flip_degrees)
    return pd * np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1) * np.exp(-3.4 / t2)


def scan_mr(rng, tissue: Tissue, signal: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Point spread, texture, bias field and Rician noise; scale and bias are the volume's, not the slice's."""
    image = tissue.mix(signal)
    if keep is not None:
        image = image * keep
    image = ndimage.gaussian_filter(image, (0, 0.45, 0.45))
    image = image * (1 + 0.02 * smooth_noise(rng, image.shape, (0.5, 1.2, 1.2)))
    slices, height, width = image.shape
    coarse = smooth_noise(rng, (4, 6, 6), 1.2)
    zoom = (slices / 4, height / 6, width / 6)
    bias = ndimage.zoom(coarse, zoom, order=3, grid_mode=True, mode="nearest")
    image = image * np.exp(rng.uniform(0.03, 0.10) * bias)
    peak = np.percentile(image, 99)
    noise = rng.uniform(0.008, 0.02) * peak
    image = np.hypot(image + noise * rng.standard_normal(image.shape), noise * rng.standard_normal(image.shape))
    if keep is not None:
        image = image * (keep > 0.5)
    return (image / peak * rng.uniform(300, 3000)).astype(np.float32)


def scan_ct(rng: np.random.Generator, tissue: Tissue, body: np.ndarray) -> np.ndarray:
    """HU with the blur and correlated noise of a diagnostic scanner; everything around the body is -1024."""
    image = ndimage.gaussian_filter(tissue.mix(LUT[:, 0]), (0, 0.55, 0.55))
    image = image + rng.uniform(12, 20) * smooth_noise(rng, image.shape, (0, 0.7, 0.7))
    # One pixel more than the body, so that its blurred edge stays.
    image[~ndimage.binary_dilation(body, np.ones((1, 3, 3), bool))] = -1024
    return np.clip(image, -1024, 3071).astype(np.float32)


def scan_cbct(rng: np.random.Generator, ct: np.ndarray, pixel_mm: float, radius_mm: float) -> np.ndarray:
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

    Returns:
        `np.ndarray`: float32 of the same shape, HU as uncalibrated as an onboard imager's.
    """
    from skimage.transform import iradon, radon

    water = 0.02  # attenuation per mm
    height, width = ct.shape[1:]
    side = max(height, width) // 2
    angles = np.linspace(0, 180, 120, endpoint=False)
    scatter_share, hardening, photons = rng.uniform(0.3, 0.6), rng.uniform(0.002, 0.004), rng.uniform(2e4, 6e4)
    gain_spread, shift = rng.uniform(0.001, 0.003), rng.normal(0, 25)

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


def scan_pet(rng: np.random.Generator, tissue: Tissue, pixel_mm: float, between_mm: float) -> np.ndarray:
    """SUV through the resolution and the counting noise of a PET scanner, smoothed again as for reading."""

    def blur(image, fwhm_mm):
        sigma = fwhm_mm / 2.355
        return ndimage.gaussian_filter(image, (sigma / between_mm, sigma / pixel_mm, sigma / pixel_mm))

    uptake = LUT[:, 6] * rng.normal(1, 0.06, len(NAMES))
    # These depend on the patient more than on the tissue: fasting, drinking, the tumour.
    for name, low, high in (("myocardium", 0.8, 9), ("urine", 8, 25), ("nodule", 4, 14)):
        uptake[NAMES.index(name)] = rng.uniform(low, high)
    image = blur(tissue.mix(uptake), rng.uniform(5, 6.5))
    counts = rng.uniform(60, 160)
    return blur(rng.poisson(np.maximum(image, 0) * counts) / counts, 4.2).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


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
        sequences = {"T1": ("T1", False), "T1CE": ("T1", True), "T2": ("T2", False), "FLAIR": ("FLAIR", False)}
        images = {
            name: scan_mr(rng, tissue, mr_signal(sequence, field, contrast), brain)
            for name, (sequence, contrast) in sequences.items()
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
