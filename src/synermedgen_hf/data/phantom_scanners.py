"""The machines that look at the phantom: those that training sees, and others that it never does.

`"usual"` spans the range of the training data. `"unseen"` lies outside of it in everything at once, as another hospital
does: field strength, sequence timing, coil, dose, detector, reconstruction and field of view. Its patients are those of
`"usual"`, so what changes in a figure is the machine's doing.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scanner:
    """
    What differs from machine to machine; a pair of numbers is a range that an examination draws from.

    Args:
        field_of_view (`float`): Factor of the width that a region has by default.
        fields (`tuple[float, ...]`): Tesla.
        spin_echo, turbo_spin_echo (`tuple[float, float]`): TR and TE of T1 and of T2, ms.
        flair (`tuple[float, float, float]`): TR, TI and TE, ms.
        gradient_echo (`tuple[float, float]`): TR and TE, ms.
        flip_degrees (`tuple[float, float]`): Of the gradient echo.
        mr_bias, mr_noise (`tuple[float, float]`): Logarithmic depth of the bias field; noise as a share of the peak.
        ct_blur (`float`): Standard deviation in pixels.
        ct_noise (`tuple[float, float]`): HU.
        scatter, photons (`tuple[float, float]`): Of the cone beam: scatter over primary behind the thickest ray;
            photons a detector element.
        cone_shift (`float`): Mean error of the cone beam's calibration, HU; it spreads by 25 HU.
        cone_width (`float`): Factor of its field of view.
        pet_fwhm (`tuple[float, float]`): Resolution, mm.
        pet_counts (`tuple[float, float]`): Counts a voxel at an SUV of 1.
    """

    field_of_view: float = 1
    fields: tuple[float, ...] = (1.5, 3.0)
    spin_echo: tuple[float, float] = (520, 11)
    turbo_spin_echo: tuple[float, float] = (5000, 95)
    flair: tuple[float, float, float] = (9000, 2400, 115)
    gradient_echo: tuple[float, float] = (7, 3.4)
    flip_degrees: tuple[float, float] = (10, 18)
    mr_bias: tuple[float, float] = (0.03, 0.10)
    mr_noise: tuple[float, float] = (0.008, 0.02)
    ct_blur: float = 0.55
    ct_noise: tuple[float, float] = (12, 20)
    scatter: tuple[float, float] = (0.3, 0.6)
    photons: tuple[float, float] = (2e4, 6e4)
    cone_shift: float = 0
    cone_width: float = 1
    pet_fwhm: tuple[float, float] = (5, 6.5)
    pet_counts: tuple[float, float] = (60, 160)


# The physics gives the direction, the size is our choice; every range lies outside of the usual one.
# - 0.35 T is the field of the first MR-linac in the clinic, 0.55 T that of recent whole-body magnets. The signal grows
#   with the field, so an image has two to three times the noise.
# - T1 is shorter there, so the same weighting wants a shorter TR. The gradient echo is a slow one of 2D; FLAIR's
#   inversion time nulls fluid at its shorter TR (TI = T1 ln(2 / (1 + exp(-TR / T1))), 2150 ms for a T1 of 4 s).
# - Noise goes with the inverse root of the dose: CT at an eighth of it, the cone beam at a fifth, PET at a quarter.
# - A cone beam without a grid has as much scatter as primary behind the pelvis, or more (Siewerdsen & Jaffray 2001).
# - 8 to 9 mm is the resolution of PET before time of flight, smoothed for reading.
SCANNERS = {
    "usual": Scanner(),
    "unseen": Scanner(
        field_of_view=1.15,
        fields=(0.35, 0.55),
        spin_echo=(300, 20),
        turbo_spin_echo=(3200, 125),
        flair=(7000, 2150, 90),
        gradient_echo=(20, 6),
        flip_degrees=(25, 35),
        mr_bias=(0.15, 0.25),
        mr_noise=(0.025, 0.045),
        ct_blur=0.8,
        ct_noise=(38, 55),
        scatter=(0.8, 1.2),
        photons=(5e3, 1e4),
        cone_shift=70,
        cone_width=0.8,
        pet_fwhm=(8, 9),
        pet_counts=(15, 40),
    ),
}
USUAL = SCANNERS["usual"]


def relaxation_times(table: np.ndarray, field: float) -> tuple[np.ndarray, np.ndarray]:
    """
    T1 and T2 of every tissue.

    At 1.5 and 3 T they are the table's. Below 1.5 T, T1 follows a power of the field, at most the cube root (Bottomley
    1984 Med Phys 11:425): the power between the table's two fields where that is less, as in fluid. T2 hardly depends
    on the field there and stays.

    Args:
        table (`np.ndarray`): Rows such as those of [`~synermedgen_hf.data.phantom_anatomy.TISSUES`].
        field (`float`): Tesla, up to 1.5, or 3.0.

    Returns:
        Two `np.ndarray` of shape `(tissues,)`, ms.
    """
    if field == 3.0:
        return table[:, 4], table[:, 5]
    if field == 1.5:
        return table[:, 2], table[:, 3]
    power = np.clip(np.log2(table[:, 4] / table[:, 2]), 0, 1 / 3)
    return table[:, 2] * (field / 1.5) ** power, table[:, 3]


__all__ = ["SCANNERS", "USUAL", "Scanner", "relaxation_times"]
