"""What is compared, where and on which scale: every result carries it, and unlike results are never mixed.

A figure such as "MAE 20" means nothing without its range, window, mask and crop. A protocol fixes all of them, its
stamp states them, and the names of the figures repeat the essence: `mae_hu_mask` is the mean absolute error in HU
inside the given mask, `psnr_u8_frame` the PSNR of 8-bit pictures over whole frames.

    <metric>_<unit>_<area>     units: hu, suv, au (MR's arbitrary units), u8 (grey levels), norm (0 to 1)
                               areas: mask (as given), body (found in the reference), frame (all of the image)
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from scipy import ndimage

from ..data.routes import MODALITIES
from ..volumes.reading import Volume, same_grid, slice_spacing, slices_of, stack_axis
from .clinical import BONE, TISSUES, bone_dice, hu_error_by_tissue, suv_errors, z_consistency
from .inputs import UndefinedMetric, check_pair, check_structure, check_window
from .intensity import finite_psnr, mae, mse, rmse
from .similarity import ms_ssim, ms_ssim_synthrad2025, ssim

# Raised when a definition here changes a number: stamps of before and after are then unlike.
VERSION = 4

UNITS = {"CT": "HU", "CBCT": "HU", "PET": "SUV"}  # MR is in arbitrary units
PET_RANGE = (0.0, 20.0)  # SUV, the window of the image processor
MR_PERCENTILE = 99.5
BODY_ABOVE = {"CT": -400.0, "CBCT": -400.0, "PET": 0.1}  # HU, SUV
BODY_SHARE = 0.05  # of the high end of MR's range
BODY_PART = 0.1  # of the largest part's voxels: arms and legs beside a trunk are kept, specks are not


@dataclass(frozen=True)
class Protocol:
    """
    Args:
        name (`str`): What it is asked for by.
        ct_range (`tuple[float, float]` or `None`): Of CT and CBCT in HU; `None` where the protocol is not for them.
        figures (`Callable`): From a [`Case`] to the figures, each as a function that may raise [`UndefinedMetric`].
        about (`dict[str, str]`): What its stamp says besides range, area and modality.
    """

    name: str
    ct_range: tuple[float, float] | None
    figures: Callable[["Case"], dict[str, Callable[[], float]]]
    about: dict[str, str]


@dataclass(frozen=True)
class Case:
    """
    Two images on one grid, checked, and the scale they are compared on.

    Args:
        prediction, reference (`np.ndarray`): In scanner units.
        area (`np.ndarray`): bool, the mask or the body.
        name (`str`): Of the area, `"mask"` or `"body"`.
        unit (`str`): As it stands in the figures' names: `"hu"`, `"suv"` or `"au"`.
        modality (`str`): Of both.
        window (`tuple[float, float]` or `None`): Low and high end of the range; `None` if there is no range.
    """

    prediction: np.ndarray
    reference: np.ndarray
    area: np.ndarray
    name: str
    unit: str
    modality: str
    window: tuple[float, float] | None

    def clipped(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Both images clipped to the range, with zero at its low end, and the range."""
        if self.window is None:
            raise UndefinedMetric(
                "The range of values is zero: the reference has no foreground, or one value only. Pass the window of "
                "its volume."
            )
        low, high = self.window
        one, other = (np.clip(image, low, high).astype(np.float64) - low for image in (self.prediction, self.reference))
        return one, other, high - low


def evaluate_case(
    prediction,
    reference,
    mask=None,
    protocol: str = "synthrad2023",
    modality: str | None = None,
    spacing: tuple[float, ...] | None = None,
    window: tuple[float, float] | None = None,
) -> dict:
    """
    Compare one synthesised image or volume with the true one.

    Args:
        prediction, reference (array-like of shape `(rows, columns)` or `(slices, rows, columns)`, or [`Volume`]): In
            scanner units (HU, SUV, MR as it comes) on one grid. A [`Volume`] is turned to `(slices, rows, columns)`
            along its coarsest axis, and the stamp says which that is. An image is compared in 2D, a volume in 3D.
        mask (array-like or [`Volume`], *optional*): Where to compare, on the same grid. By default the body: what the
            reference shows above -400 HU, 0.1 SUV, or 5 % of the high end of MR's range, in parts of at least a tenth
            of the largest one, holes filled slice by slice. A couch may be among the parts: a mask is better.
        protocol (`str`, defaults to `"synthrad2023"`):

            - `"synthrad2023"`: the challenge's. MAE unclipped in the mask; PSNR and SSIM clipped to [-1024, 3000] HU.
            - `"synthrad2025"`: the challenge's. As before, over [-1024, 3071] HU and with its MS-SSIM.
            - `"brats"`: MR only, scaled to 0..1 by the reference's 0.5th and 99.5th percentile; Gaussian SSIM.
            - `"paper_frame"`: as 2D papers mostly do: 8-bit slices, whole frames, mean over slices; the same inside
              the mask, and in scanner units, beside it. MS-SSIM needs slices of 112 pixels a side.

            Volumes are also judged from slice to slice, `mae_dz`.

            The challenges define CT only; here PET is compared over [0, 20] SUV and MR from 0 to the 99.5th percentile
            of the reference's values above 0.
        modality (`str`, *optional*): `T1`, `T1CE`, `T2`, `FLAIR`, `MRI`, `CT`, `CBCT` or `PET`; by default what a
            [`Volume`] says of itself, or CT.
        spacing (`tuple[float, ...]`, *optional*): mm along each axis, kept with the result. Volumes know theirs.
        window (`tuple[float, float]`, *optional*): Instead of the protocol's range. MR has no absolute scale: bring
            both images to one, such as 1000 at the 99.5th percentile of the reference's volume, and pass
            `(0.0, 1000.0)`. Without, each image or volume is measured on a scale of its own, and its errors in
            arbitrary units are not defined.

    Returns:
        `dict`: Of what JSON can hold.

        - `protocol`: the stamp. Records may be compared and averaged if theirs are equal, and only then.
        - `metrics`: figures by name, the same names for each record of a stamp; `None` where one is not defined.
        - `undefined`: the reason for each `None`.
        - `measured`: what belongs to this case: `shape`, `spacing`, `range` in the unit, `voxels` of the area, and
          `means`, by which another scan on the same grid is told: those of the reference's quarters, or eighths.

    Raises:
        `ValueError`: The grids differ, values are not finite, the window is no range, the protocol does not know the
            modality, or a volume says it is in another unit. Nothing is computed then.

    Example:

    ```python
    record = evaluate_case(made, real, mask, protocol="synthrad2023", modality="CT")
    record["metrics"]["mae_hu_mask"]
    ```
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {protocol!r}. Choose one of {', '.join(PROTOCOLS)}.")
    modality = _modality_of({"prediction": prediction, "reference": reference}, modality)
    if modality not in MODALITIES:
        raise ValueError(f"There is no modality {modality!r}. Choose one of {', '.join(MODALITIES)}.")
    chosen = PROTOCOLS[protocol]
    if modality in UNITS and chosen.ct_range is None:
        raise ValueError(f"The protocol {protocol!r} is for MR, and the images are {modality}. Choose another one.")
    window = None if window is None else check_window(window)
    prediction, reference, mask, spacing, axis = _on_one_grid(prediction, reference, mask, spacing)

    given = mask is not None
    rule, measured = _range(chosen, reference, modality, window)
    area = mask if given else find_body(reference, modality, window)
    unit = UNITS.get(modality, "a.u.")
    name = "mask" if given else "body"
    case = Case(prediction, reference, area, name, unit.lower().replace(".", ""), modality, measured)
    metrics, undefined = {}, {}
    for figure, compute in chosen.figures(case).items():
        try:
            if window is None and figure.startswith(("mae", "rmse")) and "_au_" in figure:
                raise UndefinedMetric("MR has no absolute scale: bring both images to one, and pass its window.")
            metrics[figure] = compute()
        except UndefinedMetric as reason:
            metrics[figure], undefined[figure] = None, str(reason)
    stamp = {
        "name": protocol,
        "modality": modality,
        "unit": unit,
        "range": rule,
        "dimensions": _dimensions(chosen, reference),
        "axis": axis,
        "area": "mask: as given" if given else f"body: {_body_rule(modality)}",
        **{name: text for name, text in chosen.about.items() if unit == "HU" or name != "tissues"},
        "library": f"synermedgen_hf.metrics {VERSION}",
    }
    facts = {"shape": list(reference.shape), "spacing": spacing, "range": measured and list(measured)}
    return {
        "protocol": stamp,
        "metrics": metrics,
        "undefined": undefined,
        "measured": {**facts, "voxels": int(area.sum()), "means": _means_of_parts(reference)},
    }


def scale_of_mr(percentile: float) -> str:
    """What the stamp says of MR that was brought to the scale of the range by a percentile of its volume above 0."""
    return f"0 to the {percentile:g}th percentile of the volume brought to the range"


def check_same_protocol(records: Iterable[dict]):
    """
    Refuse to go on with records that were measured in different ways.

    Args:
        records (`Iterable[dict]`): Each with its stamp under `protocol`.

    Raises:
        `ValueError`: A record has no stamp, or two stamps differ: it says in what.
    """
    first = None
    for number, record in enumerate(records):
        stamp = record.get("protocol")
        if not stamp:
            raise ValueError(f"Record {number} carries no protocol: nobody knows how it was measured.")
        first = first or stamp
        if stamp != first:
            unlike = [
                f"{name}: {first.get(name)!r} and {stamp.get(name)!r}"
                for name in dict.fromkeys([*first, *stamp])
                if first.get(name) != stamp.get(name)
            ]
            raise ValueError(f"Records 0 and {number} were measured under unlike protocols: {'; '.join(unlike)}.")


def average(records: Iterable[dict]) -> dict:
    """
    Mean of each figure over records of one protocol.

    Args:
        records (`Iterable[dict]`): Of [`evaluate_case`].

    Returns:
        `dict`: `protocol`, the stamp they share; `metrics`, the means over the records in which a figure is defined, or
        `None`; `n`, how many those are.

    Raises:
        `ValueError`: There are no records, or their protocols differ.
    """
    records = list(records)
    if not records:
        raise ValueError("There are no records to average.")
    check_same_protocol(records)
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    values = {
        name: [value for record in records if (value := record["metrics"].get(name)) is not None] for name in names
    }
    return {
        "protocol": records[0]["protocol"],
        "metrics": {name: math.fsum(own) / len(own) if own else None for name, own in values.items()},
        "n": {name: len(own) for name, own in values.items()},
    }


def find_body(reference: np.ndarray, modality: str, window: tuple[float, float] | None = None) -> np.ndarray:
    """
    Where an image shows the patient, by the rule that [`evaluate_case`] states.

    Args:
        reference (`np.ndarray` of shape `(rows, columns)` or `(slices, rows, columns)`): In scanner units.
        modality (`str`): Tells the threshold.
        window (`tuple[float, float]`, *optional*): Of MR, whose high end is by default measured on this image alone: a
            slice with nothing but noise would be all body.

    Returns:
        `np.ndarray`: bool, of the same shape; all False where there is nothing but background.
    """
    if modality in BODY_ABOVE:
        threshold = BODY_ABOVE[modality]
    else:
        ends = window or _foreground(reference, MR_PERCENTILE)
        threshold = math.inf if ends is None else BODY_SHARE * ends[-1]
    parts, count = ndimage.label(reference > threshold)
    if not count:
        return np.zeros(reference.shape, bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # the background
    body = (sizes >= BODY_PART * sizes.max())[parts]
    if body.ndim == 2:
        return ndimage.binary_fill_holes(body)
    return np.stack([ndimage.binary_fill_holes(plane) for plane in body])


# ---------------------------------------------------------------------------------------------------------------------
# The protocols
# ---------------------------------------------------------------------------------------------------------------------


def _synthrad(case: Case) -> dict[str, Callable[[], float]]:
    unit, area = case.unit, case.name
    return {
        f"mae_{unit}_{area}": lambda: mae(case.prediction, case.reference, case.area),
        f"rmse_{unit}_{area}": lambda: rmse(case.prediction, case.reference, case.area),
        f"psnr_{unit}_{area}": lambda: finite_psnr(*case.clipped(), case.area),
        **_clinical(case),
    }


def _synthrad2023(case: Case) -> dict[str, Callable[[], float]]:
    def masked_ssim() -> float:
        one, other, data_range = case.clipped()
        check_structure(other[case.area])
        return ssim(np.where(case.area, one, 0), np.where(case.area, other, 0), data_range, case.area)

    return {f"ssim_{case.unit}_{case.name}": masked_ssim, **_synthrad(case)}


def _synthrad2025(case: Case) -> dict[str, Callable[[], float]]:
    def masked_ms_ssim() -> float:
        one, other, data_range = case.clipped()
        check_structure(other[case.area])
        return ms_ssim_synthrad2025(np.where(case.area, one, 0), np.where(case.area, other, 0), data_range, case.area)

    return {f"ms_ssim_{case.unit}_{case.name}": masked_ms_ssim, **_synthrad(case)}


def _brats(case: Case) -> dict[str, Callable[[], float]]:
    def scaled() -> tuple[np.ndarray, np.ndarray]:
        one, other, data_range = case.clipped()
        return one / data_range, other / data_range

    def gaussian_ssim() -> float:
        one, other = scaled()
        check_structure(other[case.area])
        return ssim(one, other, 1.0, case.area, kernel="gaussian")

    return {
        f"ssim_norm_{case.name}": gaussian_ssim,
        f"mae_norm_{case.name}": lambda: mae(*scaled(), case.area),
        f"mse_norm_{case.name}": lambda: mse(*scaled(), case.area),
        f"psnr_norm_{case.name}": lambda: finite_psnr(*scaled(), 1.0, case.area),
        **_across_slices(case, "norm", lambda: (*scaled(), case.area)),
    }


def _paper_frame(case: Case) -> dict[str, Callable[[], float]]:
    @cache
    def in_range() -> tuple[np.ndarray, np.ndarray]:
        return case.clipped()[:2]

    @cache
    def grey_levels() -> tuple[np.ndarray, np.ndarray]:
        one, other, data_range = case.clipped()
        return np.round(one * (255 / data_range)), np.round(other * (255 / data_range))

    def in_units() -> tuple[np.ndarray, np.ndarray]:
        return case.prediction, case.reference

    def frame_ssim(one, other, inside) -> float:
        check_structure(other if inside is None else other[inside])
        return ssim(one, other, 255.0, inside)

    def frame_ms_ssim(one, other, inside) -> float:
        check_structure(other)
        return ms_ssim(one, other, 255.0, kernel="uniform")

    def psnr_over(data_range: float):
        return lambda one, other, inside: finite_psnr(one, other, data_range, inside)

    low, high = case.window or (0.0, 1.0)  # without a window, `in_range` says so before the range is needed
    figures = {"ms_ssim_u8_frame": partial(_mean_over_slices, frame_ms_ssim, grey_levels, None)}
    for place, inside in (("frame", None), (case.name, case.area)):
        figures |= {
            f"ssim_u8_{place}": partial(_mean_over_slices, frame_ssim, grey_levels, inside),
            f"psnr_u8_{place}": partial(_mean_over_slices, psnr_over(255.0), grey_levels, inside),
            f"psnr_{case.unit}_{place}": partial(_mean_over_slices, psnr_over(high - low), in_range, inside),
            f"mae_u8_{place}": partial(_mean_over_slices, mae, grey_levels, inside),
            f"mae_{case.unit}_{place}": partial(_mean_over_slices, mae, in_units, inside),
            f"rmse_u8_{place}": partial(_mean_over_slices, rmse, grey_levels, inside),
            f"rmse_{case.unit}_{place}": partial(_mean_over_slices, rmse, in_units, inside),
        }
    return figures | _across_slices(case, case.unit, lambda: (*in_units(), case.area))


def _mean_over_slices(figure: Callable, images: Callable, inside: np.ndarray | None) -> float:
    """Mean of a figure over the slices that have one; an image is its own only slice."""
    one, other = (image.reshape(-1, *image.shape[-2:]) for image in images())
    areas = [None] * len(one) if inside is None else inside.reshape(one.shape)
    values, reasons = [], {}
    for slices in zip(one, other, areas, strict=True):
        try:
            values.append(figure(*slices))
        except UndefinedMetric as error:
            reasons[str(error)] = None
    if not values:
        raise UndefinedMetric(" ".join(reasons))
    return float(np.mean(values))


def _clinical(case: Case) -> dict[str, Callable[[], float]]:
    """Figures that only some modalities have, or volumes."""
    images = case.prediction, case.reference, case.area
    figures = {}
    if case.unit == "hu":
        by_tissue = cache(lambda: hu_error_by_tissue(*images))

        def tissue_mae(tissue: str) -> float:
            if (found := by_tissue()[tissue]["mae"]) is None:
                raise UndefinedMetric(f"The reference shows no voxel in the HU range of {tissue}.")
            return found

        figures |= {f"mae_hu_{tissue}": partial(tissue_mae, tissue) for tissue in TISSUES}
        figures["dice_bone"] = lambda: bone_dice(*images)
    if case.unit == "suv":
        for name in ("suvmean", "suvmax"):
            figures[f"error_{name}_{case.name}"] = lambda name=name: abs(suv_errors(*images)[name])
    return figures | _across_slices(case, case.unit, lambda: images)


def _across_slices(case: Case, unit: str, images: Callable) -> dict[str, Callable[[], float]]:
    """That figure which only volumes have."""
    return {f"mae_dz_{unit}_{case.name}": lambda: z_consistency(*images())} if case.reference.ndim == 3 else {}


_UNIFORM = "uniform window of 7 voxels a side, K 0.01 and 0.03, sample covariance"
_CROP = "SSIM without the outermost 3 voxels along each axis; nothing is padded"
_PSNR = "not defined where prediction and reference are equal, since it is infinite"
_FLAT = "SSIM is not defined where the reference, clipped, has one value only in the area"
_SYNTHRAD = {
    "window": "PSNR and SSIM clipped to the range; all else unclipped",
    "outside": "for SSIM set to the low end of the range, which windows at the rim of the area see",
    "psnr": _PSNR,
    "flat": _FLAT,
    "tissues": "by HU of the reference: air < -900 <= lung < -250 <= fat < -30 <= soft < 250 <= bone; Dice above "
    f"{BONE:g} HU",
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("synthrad2023", (-1024.0, 3000.0), _synthrad2023, {**_SYNTHRAD, "ssim": _UNIFORM, "crop": _CROP}),
        Protocol(
            "synthrad2025",
            (-1024.0, 3071.0),
            _synthrad2025,
            {
                **_SYNTHRAD,
                "ssim": f"MS-SSIM of SynthRAD2025: five scales, means compared at each; {_UNIFORM}",
                "crop": "at each scale without the outermost 3 voxels along each axis; images of less than 97 voxels "
                "are continued to 97 by their outermost ones",
            },
        ),
        Protocol(
            "brats",
            None,
            _brats,
            {
                "window": "clipped to the range and scaled to 0..1 for all figures",
                "outside": "as it is: SSIM windows at the rim of the area see it",
                "psnr": _PSNR,
                "flat": _FLAT,
                "ssim": "Gaussian window of 11 voxels a side, sigma 1.5, K 0.01 and 0.03, population covariance",
                "crop": "SSIM without the outermost 5 voxels along each axis; nothing is padded",
            },
        ),
        Protocol(
            "paper_frame",
            (-1024.0, 3071.0),
            _paper_frame,
            {
                "window": "clipped to the range; u8 rounded to 256 grey levels; MAE and RMSE in units unclipped",
                "outside": "as it is: equal background flatters all figures of the frame, not those of the area",
                "ssim": f"{_UNIFORM}; MS-SSIM of Wang 2003 with that window, five scales, blocks of 2 averaged",
                "crop": f"{_CROP}; slices of one value are left out",
                "psnr": "slices equal to the reference are left out: theirs is infinite",
            },
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _modality_of(images: dict, modality: str | None) -> str:
    """The modality that was asked for, or the one that volumes say; in units of which they all are."""
    volumes = {name: image for name, image in images.items() if isinstance(image, Volume)}
    told = [volume.modality for volume in volumes.values() if volume.modality is not None]
    modality = modality or (told or ["CT"])[-1]
    unit = UNITS.get(modality, "a.u.")
    for name, volume in volumes.items():
        own = volume.unit or (volume.modality and UNITS.get(volume.modality, "a.u."))
        if own not in (None, unit):
            raise ValueError(f"{modality} is compared in {unit}, and the {name} is {volume.modality or ''} in {own}.")
    return modality


def _on_one_grid(prediction, reference, mask, spacing):
    volumes = {"prediction": prediction, "reference": reference, "mask": mask}
    volumes = {name: image for name, image in volumes.items() if isinstance(image, Volume)}
    axis = "as given"
    if volumes:
        first, placed = next(iter(volumes.items()))
        for name, image in volumes.items():
            if not same_grid(placed, image):
                raise ValueError(
                    f"The {first} and the {name} lie on different grids: shape {placed.array.shape}, affine "
                    f"{placed.affine.tolist()}, and shape {image.array.shape}, affine {image.affine.tolist()}. "
                    "Resample one onto the other first."
                )
        if missing := [name for name in ("prediction", "reference") if name not in volumes]:
            raise ValueError(
                f"The {first} is a volume with an affine and the {missing[0]} an array without: where it "
                "lies is not known. Pass both in one form."
            )
        axis = stack_axis(reference)
        spacing = slice_spacing(reference, axis)
        prediction, reference = slices_of(prediction, axis), slices_of(reference, axis)
        if isinstance(mask, Volume):
            mask = slices_of(mask, axis)
        elif mask is not None:
            raise ValueError("The images are volumes and the mask an array without an affine. Pass all in one form.")
    prediction, reference, mask = check_pair(prediction, reference, mask)
    if spacing is not None:
        spacing = [float(side) for side in spacing]
        if len(spacing) != reference.ndim or not all(math.isfinite(side) and side > 0 for side in spacing):
            raise ValueError(f"The spacing must be {reference.ndim} lengths in mm above zero, got {spacing}.")
    return prediction, reference, mask, spacing, axis


def _range(protocol: Protocol, reference: np.ndarray, modality: str, window):
    """What the stamp says of the range, and the range of this case; `None` where it would be zero."""
    if modality in UNITS:
        window = window or (PET_RANGE if modality == "PET" else protocol.ct_range)
    if window is not None:
        # All figures of a protocol for MR alone are relative to the range, which may be another one for each case.
        return "as given for each case" if protocol.ct_range is None else list(window), window
    if protocol.ct_range is None:
        rule, found = "0.5th to 99.5th percentile of the reference above 0", _foreground(reference, 0.5, 99.5)
    else:
        found = _foreground(reference, MR_PERCENTILE)
        rule, found = f"0 to the {MR_PERCENTILE}th percentile of the reference above 0", found and (0.0, *found)
    return rule, found if found and found[0] < found[1] else None


def _means_of_parts(reference: np.ndarray) -> list[float]:
    """Of each half of each axis, all axes together: it tells another scan, or the same one mirrored."""
    parts = [reference.astype(np.float64)]
    for axis in range(reference.ndim):
        parts = [half for part in parts for half in np.array_split(part, 2, axis)]
    return [float(part.mean()) if part.size else 0.0 for part in parts]


def same_measured(one: dict, other: dict) -> list[str]:
    """
    In what two records' `measured` differ, in words; nothing if they may be of the same scan.

    Args:
        one, other (`dict`): Of [`evaluate_case`]. Means may differ in last digits: machines round differently.
    """
    unlike = [
        f"{name} {one.get(name)} and {other.get(name)}"
        for name in dict.fromkeys([*one, *other])
        if name != "means" and one.get(name) != other.get(name)
    ]
    if not unlike and "means" in one and not close_means(one["means"], other.get("means")):
        unlike.append("the reference's values")
    return unlike


def close_means(one: list[float], other: list[float] | None) -> bool:
    """Whether two references have the same `means`, but for rounding."""
    if other is None or len(one) != len(other):
        return False
    return np.allclose(one, other, rtol=0, atol=1e-4 * max(map(abs, one)))


def _foreground(image: np.ndarray, *percentiles: float) -> tuple[float, ...] | None:
    """Percentiles of the values above 0, or `None` if there are none."""
    above = image[image > 0]
    return tuple(map(float, np.percentile(above, percentiles))) if above.size else None


def _dimensions(protocol: Protocol, reference: np.ndarray) -> str:
    if protocol.name == "paper_frame" and reference.ndim == 3:
        return "2D, mean over the slices of a volume"
    return f"{reference.ndim}D"


def _body_rule(modality: str) -> str:
    above = (
        f"{BODY_ABOVE[modality]:g} {UNITS[modality]}"
        if modality in BODY_ABOVE
        else f"{100 * BODY_SHARE:g} % of the range's high end"
    )
    return f"reference above {above}, parts of at least a tenth of the largest, holes filled slice by slice"


__all__ = [
    "PROTOCOLS",
    "Case",
    "Protocol",
    "average",
    "check_same_protocol",
    "close_means",
    "evaluate_case",
    "find_body",
    "same_measured",
    "scale_of_mr",
]
