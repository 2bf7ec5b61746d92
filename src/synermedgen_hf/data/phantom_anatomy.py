"""The patients of the digital phantom: what tissue lies where, in fractions per pixel, and how it is called.

The scanners that look at them are in [`synermedgen_hf.data.phantom`]. The brain is the MNI grey and white matter atlas
of the nilearn package, deformed per subject and wrapped in a modelled skull; everything else is drawn from soft-edged
ellipsoids deformed by smooth noise.
"""

import logging
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage

logger = logging.getLogger(__name__)

# HU | proton density, T1 ms, T2 ms at 1.5 T | T1, T2 at 3 T | SUV | gadolinium mM
# HU: Schneider 2000 PMB 45:459. T1/T2: Stanisz 2005 MRM 54:507, de Bazelaire 2004 Radiology 230:652, Bojorquez 2017
# MRI 35:69, Gold 2004 AJR 183:343. SUV: Wang 2007, Boellaard 2015. Abdominal HU are portal-venous, as in AutoPET.
TISSUES = {
    "air": (-1000, 0.0, 1000, 50, 1000, 50, 0.0, 0.0),
    "csf": (8, 1.00, 4200, 1800, 4300, 1500, 0.5, 0.0),
    "grey matter": (39, 0.84, 950, 95, 1400, 90, 9.0, 0.06),
    "white matter": (29, 0.72, 640, 74, 850, 69, 3.2, 0.03),
    "cortical bone": (1450, 0.04, 250, 0.5, 223, 0.4, 0.4, 0.0),
    "marrow": (300, 0.80, 380, 95, 480, 85, 1.5, 0.05),
    "fat": (-105, 0.95, 290, 160, 370, 130, 0.3, 0.02),
    "muscle": (55, 0.80, 1010, 44, 1412, 40, 0.6, 0.12),
    "skin": (25, 0.75, 850, 40, 1100, 36, 0.5, 0.15),
    "blood": (45, 0.35, 1440, 150, 1930, 110, 1.7, 1.3),
    "dura": (60, 0.60, 1000, 60, 1300, 50, 1.2, 0.9),
    "urine": (6, 1.00, 3500, 1500, 3800, 1200, 22.0, 0.0),
    "prostate": (42, 0.88, 1320, 98, 1600, 90, 1.5, 0.25),
    "bowel": (35, 0.85, 1000, 80, 1300, 70, 1.6, 0.2),
    "liver": (105, 0.80, 580, 46, 810, 38, 2.3, 0.3),
    "spleen": (115, 0.85, 1060, 79, 1330, 65, 1.9, 0.3),
    "kidney": (150, 0.86, 970, 87, 1140, 76, 3.2, 0.5),
    "lung": (-790, 0.15, 1000, 40, 1200, 35, 0.5, 0.1),
    "myocardium": (115, 0.80, 1030, 45, 1470, 42, 6.5, 0.3),
    "disc": (70, 0.70, 1000, 80, 1200, 70, 0.8, 0.0),
    "necrosis": (17, 0.95, 2600, 420, 3000, 380, 2.0, 0.0),
    "enhancing rim": (42, 0.90, 1400, 130, 1700, 115, 9.5, 0.85),
    "oedema": (17, 0.92, 1300, 170, 1650, 150, 2.6, 0.02),
    "nodule": (60, 0.85, 1200, 90, 1500, 80, 9.0, 0.4),
}
NAMES = list(TISSUES)
LUT = np.array(list(TISSUES.values()), dtype=np.float32)


class Tissue:
    """
    Tissue fractions of a stack of slices, painted one soft-edged structure over another.

    Args:
        shape (`tuple[int, ...]`): `(slices, height, width)`.
        names (`list[str]`): What can be painted; all is air at first.

    Attributes:
        fractions (`np.ndarray`): float32 `(tissues, slices, height, width)`, summing to 1 over tissues.
        structures (`dict[str, np.ndarray]`): Name such as `"liver"` to bool `(slices, height, width)`.
    """

    def __init__(self, shape: tuple[int, ...], names: list[str] = NAMES):
        self.names = names
        self.fractions = np.zeros((len(names), *shape), np.float32)
        self.fractions[names.index("air")] = 1
        self.structures: dict[str, np.ndarray] = {}
        self._painted = {names.index("air")}

    def paint(self, name: str, cover: np.ndarray, structure: str | None = None):
        """Cover by `cover` in [0, 1] whatever lies there; where it is the larger part, it belongs to `structure`."""
        uncovered = 1 - cover
        # Most structures are small: outside the box around what changes, nothing is multiplied by 1.
        changed = uncovered != 1
        flat = changed.any(0)
        within = (changed.any((1, 2)), flat.any(1), flat.any(0))
        if flat.any():
            box = tuple(slice(places[0], places[-1] + 1) for places in map(np.flatnonzero, within))
            for index in self._painted:
                self.fractions[index][box] *= uncovered[box]
        self.fractions[self.names.index(name)] += cover
        self._painted.add(self.names.index(name))
        if structure is not None:
            self.mark(structure, cover > 0.5)

    def mark(self, structure: str, inside: np.ndarray, within: str | None = None):
        """Add to `structure` and take away from all others, except from the one that it is a part of."""
        for name, other in self.structures.items():
            if name not in (structure, within):
                other &= ~inside
        self.structures[structure] = inside | self.structures.get(structure, False)

    def mix(self, values: np.ndarray) -> np.ndarray:
        """One value per tissue to an image."""
        return np.tensordot(values.astype(np.float32), self.fractions, 1)


def soft(distance_mm: np.ndarray, edge_mm: float) -> np.ndarray:
    """Signed distance (positive inside) to coverage, with an edge about one pixel wide."""
    return (1 / (1 + np.exp(np.clip(-4 * distance_mm / edge_mm, -30, 30)))).astype(np.float32)


def smooth_noise(rng: np.random.Generator, shape, sigma) -> np.ndarray:
    """Gaussian-filtered noise of unit standard deviation."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigma, mode="wrap")
    return noise / (noise.std() + 1e-9)


def ellipsoid(points, centre, radii) -> np.ndarray:
    """Approximate signed distance in mm (positive inside) of points `(x, y, z)` to an axis-aligned ellipsoid."""
    scaled = [(p - c) / r for p, c, r in zip(points, centre, radii, strict=True)]
    return (1 - np.sqrt(sum(s * s for s in scaled) + 1e-9)) * min(radii)


@lru_cache(maxsize=1)
def brain_atlas() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grey matter, white matter, signed distance to the brain's envelope in mm, and the affine of their 2 mm grid."""
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template
    except ImportError:
        logger.warning("nilearn is not installed: the phantom's brain is drawn from ellipsoids (pip install nilearn).")
        return _drawn_brain()
    grey, white = load_mni152_gm_template(resolution=2), load_mni152_wm_template(resolution=2)
    grey_map = np.clip(np.asarray(grey.dataobj, np.float32), 0, 1)
    white_map = np.clip(np.asarray(white.dataobj, np.float32), 0, 1)
    return grey_map, white_map, _envelope(grey_map + white_map > 0.3), grey.affine


def _envelope(brain: np.ndarray) -> np.ndarray:
    """Signed distance in mm (2 mm voxels, positive inside) to the brain closed over its sulci by 30 mm."""
    padded = np.pad(brain, 20)
    grown = ndimage.distance_transform_edt(~padded) <= 7.5
    closed = ndimage.distance_transform_edt(grown) > 7.5
    closed |= padded
    distance = ndimage.distance_transform_edt(closed) - ndimage.distance_transform_edt(~closed)
    return 2 * ndimage.gaussian_filter(distance[20:-20, 20:-20, 20:-20].astype(np.float32), 1.5)


def _drawn_brain() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What [`brain_atlas`] returns, from ellipsoids: a noise-folded cortex around white matter and two ventricles."""
    affine = np.array([[2.0, 0, 0, -98], [0, 2, 0, -134], [0, 0, 2, -72], [0, 0, 0, 1]])
    points = np.indices((99, 117, 95), dtype=np.float32)
    x, y, z = (2 * points[i] + affine[i, 3] for i in range(3))
    outer = ellipsoid((x, y, z), (0, -18, 12), (68, 86, 62))
    folds = smooth_noise(np.random.default_rng(0), outer.shape, 2.0)
    ventricles = ellipsoid((np.abs(x), y, z), (12, -12, 16), (7, 30, 14))
    cortex = 6 + 3 * folds
    inside, deep, wet = soft(outer - 2, 2), soft(outer - 2 - cortex, 2), soft(ventricles, 2)
    return inside * (1 - deep) * (1 - wet), deep * (1 - wet), outer, affine


class Grid(NamedTuple):
    """Where the pixels of a stack of slices lie in the patient, in mm, each array `(slices, height, width)`."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    pixel: float
    between: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def mirrored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates folded over the midline, to draw what comes in pairs."""
        return np.abs(self.x), self.y, self.z

    def noise(self, rng: np.random.Generator, sigma_mm: float) -> np.ndarray:
        """Smooth noise of the same coarseness in mm whatever the pixel and the distance of slices."""
        within = sigma_mm / self.pixel
        return smooth_noise(rng, self.shape, (sigma_mm / self.between, within, within))

    def warped(self, rng: np.random.Generator, shift_mm: float, sigma_mm: float) -> "Grid":
        """The same grid with every point displaced smoothly, which deforms whatever is drawn on it."""
        return self._replace(**{a: getattr(self, a) + shift_mm * self.noise(rng, sigma_mm) for a in ("x", "y", "z")})


def brain_anatomy(
    rng: np.random.Generator,
    z_mm: np.ndarray,
    between: float,
    size: int,
    tumour: bool,
    growth: float = 1.0,
    tumour_z: tuple[float, float] | None = None,
    neck: bool = False,
    width_mm: float | None = None,
) -> tuple[Tissue, np.ndarray, np.ndarray, float]:
    """
    One head in axial slices.

    Args:
        rng (`np.random.Generator`): The subject.
        z_mm (`np.ndarray`): Heights of the slices, mm in MNI space.
        between (`float`): mm from slice to slice.
        size (`int`): Rows and columns.
        tumour (`bool`): With a tumour: necrotic core, enhancing rim, oedema and mass effect.
        growth (`float`, defaults to 1): Factor of the tumour's radius, to see the same patient later.
        tumour_z (`tuple[float, float]`, *optional*): Heights between which its centre lies, by default those of the
            slices.
        neck (`bool`, defaults to `False`): Draw the face and the neck below the skull as well.
        width_mm (`float`, *optional*): Field of view, by default 240 mm, and 300 mm with the neck.

    Returns:
        `(tissue, brain, lesion, pixel)`: brain coverage in [0, 1], tumour as bool, pixel in mm.
    """
    grey_map, white_map, envelope_map, affine = brain_atlas()
    pixel, half = (width_mm or (300 if neck else 240)) / size, (size - 1) / 2
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    shape = (len(z_mm), size, size)
    # In MNI space x grows to the patient's right, which is shown on the left; the head's middle lies at y = -16.
    x = np.broadcast_to((half - columns) * pixel, shape)
    y = np.broadcast_to((half - rows) * pixel - 16, shape)
    z = np.broadcast_to(z_mm[:, None, None], shape).astype(np.float32)

    # Size, pose and a smooth deformation of the subject.
    scale = 1 / rng.normal(1, 0.035, 3)
    nod, tilt, turn = np.deg2rad(rng.normal(0, 3, 3))
    xr, yr = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    yr, zr = yr - np.sin(nod) * z, z + np.sin(nod) * y + np.sin(tilt) * x
    points = np.stack([xr * scale[0], yr * scale[1], zr * scale[2]])
    # Neighbouring nodes of the lattice lie 30 mm apart: smoothed, or the skull would be dented rather than shaped.
    lattice = ndimage.gaussian_filter(rng.standard_normal((3, 9, 10, 9)), (0, 1, 1, 1), mode="nearest")
    lattice = (lattice - lattice.mean((1, 2, 3), keepdims=True)) * 4.5 / lattice.std()
    where = [(points[i] + span / 2) / span * (n - 1) for i, (span, n) in enumerate(((240, 9), (260, 10), (240, 9)))]
    points = points + np.stack([ndimage.map_coordinates(field, where, order=3, mode="nearest") for field in lattice])
    points = points.astype(np.float32)
    grid = Grid(*points, pixel, between)

    if tumour:
        lowest, highest = tumour_z or (z_mm.min(), z_mm.max())
        place = rng.choice([-1, 1]) * rng.uniform(18, 42), rng.uniform(-55, 30), rng.uniform(lowest, highest)
        radius = rng.uniform(10, 24) * growth
        offset = points - np.array(place, np.float32)[:, None, None, None]
        from_centre = np.sqrt((offset**2).sum(0)) + 1e-6
        lesion_distance = radius - from_centre + 3 * grid.noise(rng, 7)
        # Mass effect: tissue around the lesion is pushed outwards, so it is looked up nearer to the centre.
        points = points - offset / from_centre * (0.35 * radius * np.exp(-((from_centre / (1.8 * radius)) ** 2)))

    to_voxel = np.linalg.inv(affine)
    voxels = (to_voxel[:3, :3] @ points.reshape(3, -1) + to_voxel[:3, 3:]).reshape(3, *shape)

    def sample(volume, outside):
        return ndimage.map_coordinates(volume, voxels, order=1, mode="constant", cval=outside).astype(np.float32)

    grey, white, depth = sample(grey_map, 0), sample(white_map, 0), sample(envelope_map, -60)
    brain = soft(depth, pixel)
    # The atlas is a mean of 152 heads and blurred by their differences; squaring its shares gives one head's edges.
    fluid = np.clip(1 - grey - white, 0, 1)
    total = grey**2 + white**2 + fluid**2 + 1e-6
    grey, white = grey**2 / total * brain, white**2 / total * brain

    # Shells around the brain, their thickness varying smoothly: meninges, skull, scalp.
    wobble = 1 + 0.2 * np.clip(grid.noise(rng, 24), -1.5, 1.5)
    outside = -depth
    gap, table, skin = 2.5, 2.0, 2.0
    skull = gap + 2 * table + rng.uniform(3, 6) * wobble
    surface = skull + 1.5 + rng.uniform(2, 6) * wobble + skin
    under_skin = soft(surface - skin - outside, pixel)
    tissue = Tissue(shape)
    tissue.paint("skin", soft(surface - outside, pixel))
    tissue.paint("fat", under_skin)
    tissue.paint("muscle", soft(skull + 1.5 - outside, pixel))
    temporal = soft(ellipsoid(grid.mirrored, (70, 5, -5), (16, 38, 38)), pixel)
    tissue.paint("muscle", temporal * under_skin * soft(outside - skull, pixel))
    tissue.paint("cortical bone", soft(skull - outside, pixel), "bone")
    tissue.paint("marrow", soft(skull - table - outside, pixel))
    tissue.paint("cortical bone", soft(gap + table - outside, pixel))
    sinus = ellipsoid(grid[:3], (rng.normal(0, 3), 74, -8), (rng.uniform(12, 26), 9, rng.uniform(10, 20)))
    tissue.paint(
        "air", soft(sinus, pixel) * soft(outside - gap - 1, pixel) * soft(skull - 1 - outside, pixel), "airway"
    )
    tissue.paint("dura", soft(gap - outside, pixel), "meninges")
    tissue.paint("csf", soft(gap - 1 - outside, pixel))
    falx = soft(1 - np.abs(grid.x), pixel) * soft(75 - np.abs(grid.y + 10), 5) * soft(grid.z - 20 + 25 * (y < -40), 8)
    tissue.paint("dura", falx * brain)
    sagittal_sinus = soft(4 - np.hypot(grid.x, grid.y + 88 - 0.3 * grid.z), pixel)
    if neck:
        sagittal_sinus *= soft(gap - outside, pixel)  # it leaves the skull below
    tissue.paint("blood", sagittal_sinus * soft(outside + 8, 4))
    # White first, enlarged by what grey then takes away from it, so that both end up with their own shares.
    tissue.paint("white matter", np.clip(white / np.maximum(1 - grey, 1e-3), 0, 1))
    tissue.paint("grey matter", grey)
    tissue.mark("brain", brain > 0.5)
    tissue.paint("blood", soft(grid.noise(rng, 2.2) - 2.4, 1) * brain * (1 - white))

    lesion = np.zeros(shape, bool)
    if tumour:
        oedema = soft(lesion_distance + 12 + 3 * grid.noise(rng, 9), 4) * brain
        tissue.paint("oedema", oedema * np.clip(0.15 + white, 0, 1) * 0.9)
        tissue.paint("enhancing rim", soft(lesion_distance, pixel) * brain)
        tissue.paint("necrosis", soft(lesion_distance - rng.uniform(2.5, 4.5), pixel) * brain)
        lesion = (lesion_distance > 0) & (brain > 0.5)
        # Oedema counts where it is the larger part of the white matter, as one would outline it.
        tissue.mark("oedema", (oedema > 0.5) & (white > 0.4), within="brain")
        tissue.mark("enhancing rim", lesion, within="brain")
        necrosis = tissue.fractions[NAMES.index("necrosis")] > 0.5
        tissue.mark("necrosis", necrosis & lesion, within="brain")
    if neck:
        _paint_face_and_neck(rng, tissue, grid, outside - skull)
    return tissue, brain, lesion, pixel


# One half of the neck's muscles and glands, mm in MNI space: tissue, centre and radii.
NECK_PARTS = (
    ("muscle", (44, -2, -120), (11, 17, 52)),  # sternocleidomastoid
    ("muscle", (26, -70, -125), (24, 14, 80)),  # splenius and trapezius
    ("muscle", (20, -48, -130), (15, 13, 70)),  # deep muscles of the back
    ("muscle", (36, -32, -160), (12, 16, 45)),  # scalenes and levator scapulae
    ("muscle", (9, -18, -125), (8, 6, 55)),  # before the spine
    ("muscle", (57, 22, -74), (8, 22, 30)),  # masseter
    ("muscle", (38, 18, -66), (9, 17, 24)),  # pterygoids
    ("bowel", (33, 30, -112), (10, 15, 11)),  # submandibular gland
    ("disc", (17, 20, -172), (9, 12, 20)),  # thyroid, dense with iodine as a disc is with collagen
    ("blood", (27, 3, -140), (5, 5, 70)),  # carotid
    ("blood", (35, -5, -140), (7, 7, 70)),  # jugular
)


def _paint_face_and_neck(rng: np.random.Generator, tissue: Tissue, grid: Grid, above_skull: np.ndarray):
    """Draw what lies below the brain's skull, wherever the distance to its outer table `above_skull` is positive."""
    x, y, z = grid[:3]
    ax, pixel = np.abs(x), grid.pixel
    free = soft(above_skull, pixel)

    def paint(name, distance, share=1.0, structure=None):
        tissue.paint(name, soft(distance, pixel) * free * share, structure)

    def half(centre, radii):
        return ellipsoid(grid.mirrored, centre, radii)

    levels = [-230, -205, -185, -165, -140, -126, -115, -98, -60, -30, -5, 15]
    wide = np.interp(z, levels, [175, 135, 90, 68, 58, 57, 60, 64, 70, 73, 72, 55])
    front = np.interp(z, levels, [78, 72, 62, 52, 50, 58, 84, 90, 90, 90, 86, 40])
    back = np.interp(z, levels, [-98, -96, -93, -90, -87, -87, -90, -96, -108, -110, -104, -60])
    deep, middle = (front - back) / 2, (front + back) / 2
    ahead = np.clip((y - middle) / deep, 0, 1)
    narrowed = wide * (1 - 0.22 * ahead**2 * soft(z + 125, 12))
    outline = (1 - (np.abs(x / narrowed) ** 2.3 + np.abs((y - middle) / deep) ** 2.3) ** (1 / 2.3)) * np.minimum(
        wide, deep
    )
    outline = np.minimum(outline, 15 - z)
    outline = np.maximum(outline, ellipsoid(grid[:3], (0, 92, -50), (13, 17, 22)))  # nose
    outline = np.maximum(outline, half((73, -14, -42), (7, 13, 28)))  # ears
    fat = rng.uniform(3, 8) + 5 * soft(-z - 150, 30)
    ragged = 2 * grid.noise(rng, 7)
    paint("skin", outline)
    paint("fat", outline - 2.2)
    wall = soft(outline - 2.2 - fat + ragged, pixel)
    paint("fat", half((52, 45, -70), (18, 22, 22)), wall)  # cheek
    tissue.paint("muscle", wall * free * soft(-20 - z, 10))
    # Planes of fat between the muscles, along the surface where smooth noise crosses zero.
    planes = soft(0.07 - np.abs(grid.noise(rng, 14)), 0.1)
    tissue.paint("fat", planes * wall * free * soft(-20 - z, 10) * 0.7)

    def bone(distance, cortex=2.0):
        distance = np.minimum(distance, outline - 3)
        paint("cortical bone", distance, 0.9, "bone")
        paint("marrow", distance - cortex)

    for name, centre, radii in NECK_PARTS:
        part = half([c + rng.normal(0, 1.5) for c in centre], radii) + 0.5 * ragged
        paint("fat", part + 1.4, wall)
        paint(name, part, wall)
    paint("fat", half((58, 0, -78), (14, 18, 24)), 0.55 * wall, "parotids")

    # Face, from behind and above to the front and below.
    bone(np.minimum(half((53, -28, -50), (14, 18, 18)), 62 - ax))
    tissue.paint("air", soft(grid.noise(rng, 3) - 0.2, 0.6) * soft(half((53, -28, -52), (11, 14, 14)), pixel) * free)
    paint("air", np.minimum(3 - np.hypot(y + 8, z + 45), ax - 50))  # ear canal
    bone(half((20, 14, -42), (34, 20, 9)), 1.5)  # sphenoid
    bone(ellipsoid(grid[:3], (0, -8, -50), (14, 10, 16)))  # clivus
    bone(np.minimum(half((30, 56, -54), (19, 22, 26)), 44 - ax), 0)  # maxilla, hollowed out below
    paint("fat", half((30, 56, -54), (15.5, 18, 22)), 0.5)
    paint("air", half((29, 55, -54), (14, 15, 17)))
    orbit = half((31, 54, -28), (20, 30, 19))
    bone(np.minimum(orbit, outline - 5), 0)
    paint("fat", np.minimum(orbit + 0.5, half((31, 56, -28), (17.5, 28, 17))))
    paint("muscle", np.minimum(2 - np.abs(np.hypot(ax - 31 + 0.25 * (66 - y), z + 28) - 9), np.minimum(y - 30, 60 - y)))
    paint("muscle", np.minimum(2.2 - np.hypot(ax - 31 + 0.35 * (66 - y), z + 28), np.minimum(y - 28, 60 - y)))
    paint("csf", half((31, 68, -28), (12, 12, 12)), structure="eyes")
    paint("muscle", half((31, 78, -28), (5, 2.5, 5)))  # lens
    bone(np.minimum(4 - np.hypot(ax - 63 + 0.006 * (y - 30) ** 2, z + 46), np.minimum(y - 5, 62 - y)), 2)  # zygoma
    bone(ellipsoid(grid[:3], (0, 62, -30), (12, 24, 13)), 0)  # ethmoid cells
    paint("air", ellipsoid(grid[:3], (0, 62, -31), (11, 22, 12)), 0.75)
    nasal = ellipsoid(grid[:3], (0, 62, -55), (15, 34, 17))
    paint("muscle", nasal + 2)
    paint(
        "air",
        np.minimum(nasal, np.maximum(np.abs(half((9, 60, -57), (5, 28, 9))) - 2.5, -half((9, 60, -57), (5, 28, 9)))),
    )
    paint("cortical bone", np.minimum(nasal, 1.0 - ax), 0.5)  # septum

    # Jaws: horseshoes in the axial plane, teeth on both.
    arch = np.hypot(x / 30, (y - 44) / 40)
    outer = np.hypot(x / 47, (y - 26) / 54)
    bone(np.minimum(np.minimum(7 - np.abs(arch - 1) * 34, y - 25), np.minimum(z + 86, -70 - z)))
    vault = z + 72 + 0.2 * (y - 40) + 0.012 * x**2
    bone(np.minimum(np.minimum(1.3 - np.abs(vault), (1 - arch) * 34), y - 14), 3)  # hard palate
    body = np.minimum(np.minimum(6 - np.abs(outer - 1) * 50, y - 8), np.minimum(z + 120, -98 - z))
    bone(body, 2.5)
    bone(
        np.minimum(np.minimum(5 - np.abs(ax - 47), 16 - np.abs(y - 8 - 0.1 * (z + 75))), np.minimum(z + 112, -44 - z)),
        2,
    )
    teeth = np.minimum(np.minimum(4.5 - np.abs(arch - 1) * 34, y - 28), np.minimum(z + 101, -83 - z))
    gaps = 0.75 + 0.25 * np.cos(np.arctan2(x, y - 44) * 28)
    teeth = np.minimum(teeth, outline - 4)
    paint("cortical bone", teeth, gaps)
    paint("cortical bone", teeth - 1.5, gaps)

    # Mouth and airway.
    paint("muscle", ellipsoid(grid[:3], (0, 42, -93), (24, 32, 18)))
    paint("fat", ellipsoid(grid[:3], (0, 42, -95), (22, 30, 15)), 0.25)
    course = np.interp(z, [-200, -170, -150, -130, -110, -85, -60], [8, 14, 20, 20, 9, 8, 20])
    breadth = np.interp(z, [-200, -160, -145, -125, -100, -80, -60], [9, 9, 5, 14, 15, 12, 13])
    thickness = np.interp(z, [-200, -160, -145, -125, -100, -80, -60], [8.5, 9, 9, 7, 8, 7, 10])
    airway = (1 - np.hypot(x / breadth, (y - course) / thickness)) * np.minimum(breadth, thickness)
    airway = np.minimum(airway, -58 - z)
    paint("muscle", airway + 3.5)
    shield = np.minimum(1.8 - np.abs(y - 42 + 0.75 * ax), np.minimum(22 - ax, np.minimum(z + 158, -132 - z)))
    paint("marrow", shield, 0.6)  # thyroid cartilage, partly turned to bone
    paint("marrow", np.minimum(2.5 - np.abs(np.hypot(x, y - 16) - 13), 7 - np.abs(z + 160)), 0.5)  # cricoid
    hyoid = np.minimum(2.5 - np.abs(np.hypot(x / 22, (y - 20) / 26) - 1) * 24, np.minimum(4 - np.abs(z + 122), y - 16))
    paint("cortical bone", hyoid, 0.6)
    paint("air", airway, 1.0, "airway")

    # Cervical spine.
    line = np.interp(z, [-230, -190, -130, -75], [-52, -44, -30, -32])
    disc = soft(np.cos((z + 80) * 2 * np.pi / 18) - 0.78, 0.2)
    below = -66 - z
    vertebra = np.minimum((1 - np.hypot(x / 13, (y - line) / 9)) * 9, below)
    ring = np.minimum(13 - np.hypot(x / 1.15, y - line + 19), below)
    process = np.minimum(np.minimum(3.2 - ax, np.minimum(-26 - (y - line), y - line + 46)), below)
    wings = np.minimum(np.minimum(3.5 - np.abs(y - line + 8), 27 - ax), below)
    level = soft(np.cos((z + 71) * 2 * np.pi / 18) - 0.1, 0.4)
    paint("cortical bone", process, 0.8 * level, "bone")
    paint("cortical bone", wings, 0.6 * level, "bone")
    bone(ring, 2)
    bone(vertebra, 1.6)
    paint("disc", vertebra - 1, disc)
    paint("fat", np.minimum(10 - np.hypot(x / 1.15, y - line + 19), below))
    paint("csf", np.minimum(8.5 - np.hypot(x / 1.15, y - line + 19), below))
    paint("white matter", np.minimum(5 - np.hypot(x / 1.3, y - line + 19), -55 - z), structure="spinal cord")


# Muscles of one half of the pelvis, mm from the middle between the femoral heads: centre and radii.
PELVIC_MUSCLES = (
    ((80, -60, 15), (64, 36, 110)),  # gluteus maximus
    ((126, -8, 55), (32, 56, 66)),  # gluteus medius
    ((66, 26, 70), (34, 26, 80)),  # iliacus and psoas
    ((82, 38, 0), (21, 15, 48)),  # iliopsoas before the hip
    ((28, 84, 70), (30, 10, 100)),  # rectus abdominis
    ((118, -22, -45), (36, 42, 50)),  # vastus lateralis
    ((60, 18, -50), (38, 34, 42)),  # adductors
    ((12, 0, -52), (20, 34, 24)),  # perineum
    ((56, 45, -14), (22, 14, 26)),  # pectineus
    ((106, 46, -10), (20, 17, 66)),  # rectus femoris and sartorius
    ((132, 22, -8), (15, 30, 56)),  # tensor fasciae latae
    ((52, -8, -2), (11, 34, 38)),  # obturator internus
    ((60, -50, 40), (36, 12, 24)),  # piriformis
    ((30, -94, 100), (27, 16, 60)),  # erector spinae
)


def pelvis_anatomy(
    rng: np.random.Generator, z_mm: np.ndarray, between: float, size: int, width_mm: float = 430.0
) -> tuple[Tissue, np.ndarray, float]:
    """
    One male pelvis in axial slices.

    Args:
        rng (`np.random.Generator`): The subject.
        z_mm (`np.ndarray`): Heights of the slices, mm above the femoral heads.
        between (`float`): mm from slice to slice.
        size (`int`): Columns; there are three quarters as many rows.
        width_mm (`float`, defaults to 430): Field of view along the rows.

    Returns:
        `(tissue, body, pixel)`: the body as bool, pixel in mm.
    """
    pixel, height = width_mm / size, 3 * size // 4
    rows, columns = np.mgrid[0:height, 0:size].astype(np.float32)
    shape = (len(z_mm), height, size)
    build = rng.normal(1, 0.06)
    grid = Grid(
        np.broadcast_to((columns - (size - 1) / 2) * pixel, shape) / build,
        np.broadcast_to(((height - 1) / 2 - rows) * pixel, shape) / build,
        np.broadcast_to(z_mm[:, None, None], shape).astype(np.float32),
        pixel,
        between,
    ).warped(rng, 4, 30)
    x, y, z = grid[:3]
    ax = np.abs(x)
    tissue = Tissue(shape)

    def jitter(spread: float) -> float:
        return rng.normal(0, spread)

    width, depth = 178 + jitter(8), 112 + jitter(8)
    body = (1 - (np.abs(x / width) ** 2.5 + np.abs(y / depth) ** 2.5) ** 0.4) * depth
    thigh = np.hypot((ax - 88) / 88, y / 95)
    body = np.where(z < -60, (1 - thigh) * 88, body)
    cleft = 22 * np.exp(-((x / 9) ** 2)) * soft(-55 - y, 20) * soft(30 - z, 20)
    body = body - cleft
    fat = rng.uniform(9, 26) * (1 + 0.35 * soft(-y - 30, 60))
    ragged = 3 * grid.noise(rng, 9)
    tissue.paint("skin", soft(body, pixel))
    tissue.paint("fat", soft(body - 2.5, pixel))
    wall = soft(body - fat + ragged, pixel)

    for centre, radii in PELVIC_MUSCLES:
        centre = [c + jitter(3) for c in centre]
        radii = [r * (1.06 + jitter(0.06)) for r in radii]
        muscle = ellipsoid(grid.mirrored, centre, radii) + ragged
        # A thin plane of fat parts each muscle from those it lies upon.
        tissue.paint("fat", soft(muscle + 2.2, pixel) * wall)
        tissue.paint("muscle", soft(muscle, pixel) * wall)
    tissue.paint("fat", soft(grid.noise(rng, 4) - 2.1, 0.8) * 0.7 * wall)

    # Peritoneal space: bowel above, organs below.
    cavity = soft(ellipsoid(grid[:3], (0, 12, 80), (76, 56, 95)), pixel)
    loops = grid.noise(rng, 11)
    tissue.paint("fat", cavity * soft(z - 25, 12))
    tissue.paint("bowel", cavity * soft(loops + 0.3, 0.6) * soft(z - 40, 10))
    tissue.paint("air", cavity * soft(loops - 1.7, 0.5) * soft(z - 45, 10) * soft(y - 10, 20))

    fill = rng.uniform(0.65, 1.25)
    bladder = ellipsoid(grid[:3], (jitter(3), 30 + jitter(4), 32), (42 * fill, 31 * fill, 34 * fill))
    tissue.paint("bowel", soft(bladder + 3.5, pixel), "bladder")
    tissue.paint("urine", soft(bladder, pixel))
    grow = rng.uniform(0.8, 1.3)
    prostate = ellipsoid(grid[:3], (0, 12 + jitter(2), -12), (24 * grow, 19 * grow, 20 * grow))
    tissue.paint("prostate", soft(prostate, pixel), "prostate")
    tissue.paint("prostate", soft(ellipsoid(grid.mirrored, (14, -12, 12), (20, 6, 9)), pixel) * 0.8, "seminal vesicles")
    bend = 6 * np.sin(z / 30 + jitter(1))
    radius = rng.uniform(12, 19)
    tissue.paint("bowel", soft(radius - np.hypot(x - bend, y + 40), pixel), "rectum")
    gas = soft(radius * rng.uniform(0.2, 0.75) - np.hypot(x - bend, y + 38), pixel)
    tissue.paint("air", gas * soft(z - jitter(20), 10))
    beside = 52 + 0.12 * z
    tissue.paint("blood", soft(6 - np.hypot(ax - beside, y - 56 + 0.35 * z), pixel))
    tissue.paint("blood", soft(5.5 - np.hypot(ax - beside + 12, y - 51 + 0.35 * z), pixel))

    def bone(distance, cortex):
        tissue.paint("cortical bone", soft(distance, pixel), "bone")
        tissue.paint("marrow", soft(distance - cortex, pixel))

    hip = 90 + jitter(3)
    # The iliac wing runs from the sacrum (behind, near the midline) outwards to the front.
    lean = -0.5 + jitter(0.05)
    across, along = ax - (hip - 4 + 0.2 * z), y + 10
    across, along = across * np.cos(lean) + along * np.sin(lean), along * np.cos(lean) - across * np.sin(lean)
    blade = (1 - np.hypot(across / 8.5, along / (50 + 0.15 * z))) * 8.5
    bone(np.minimum(blade, z - 24), 2.2)
    bone(ellipsoid(grid.mirrored, (44, -38, -24), (15, 20, 32)), 2.2)
    bone(ellipsoid(grid.mirrored, (30, 54, -4), (28, 9, 15)), 2)
    bone(ellipsoid(grid.mirrored, (40, 28, -28), (9, 34, 9)), 2)
    from_head = np.sqrt((ax - hip) ** 2 + y**2 + z**2)
    socket = np.minimum(np.minimum(36 - from_head, from_head - 20), np.minimum(hip + 4 - ax + 0.3 * z, 30 + z))
    bone(socket, 2.2)
    tissue.paint("muscle", soft(27 - from_head, pixel))
    bone(ellipsoid(grid.mirrored, (hip + 20, -3, -12), (27, 14, 15)), 2.2)
    bone(24.5 - from_head, 1)
    bone(ellipsoid(grid.mirrored, (hip + 34, -6, -24), (17, 19, 28)), 2.5)
    bone(np.minimum(15 - np.hypot(ax - hip - 28, y + 2), -30 - z), 5.5)
    sacrum = (1 - np.hypot(x / (30 + 0.2 * np.clip(z, 0, 100)), (y + 74 - 0.1 * (z - 60)) / 20)) * 20
    bone(np.minimum(sacrum, z - 16), 2)
    tissue.paint("fat", soft(4 - np.hypot(ax - 20, y + 70), pixel) * soft(z - 20, 5))
    tissue.paint("csf", soft(7 - np.hypot(x, y + 84), pixel) * soft(z - 45, 5))
    bone(ellipsoid(grid[:3], (0, -66, 6), (11, 9, 14)), 1.8)
    return tissue, body > 0, pixel


def body_anatomy(
    rng: np.random.Generator, y_mm: np.ndarray, between: float, size: int
) -> tuple[Tissue, np.ndarray, np.ndarray, float]:
    """
    One patient from the head to the thighs in coronal slices.

    Args:
        rng (`np.random.Generator`): The subject.
        y_mm (`np.ndarray`): Places of the slices, mm in front of the trunk's middle.
        between (`float`): mm from slice to slice.
        size (`int`): Rows of a field of view of 900 mm; there are nine sixteenths as many columns.

    Returns:
        `(tissue, body, lesion, pixel)`: the body and the FDG-avid nodules as bool, pixel in mm.
    """
    pixel, columns_wide = 900 / size, 9 * size // 16
    rows, columns = np.mgrid[0:size, 0:columns_wide].astype(np.float32)
    shape = (len(y_mm), size, columns_wide)
    build, height = rng.normal(1, 0.07), rng.normal(1, 0.03)
    # The patient's right on the left, head up, z from the thighs.
    grid = Grid(
        np.broadcast_to((columns - (columns_wide - 1) / 2) * pixel, shape) / build,
        np.broadcast_to(y_mm[:, None, None], shape).astype(np.float32) / build,
        np.broadcast_to(((size - 1) / 2 - rows) * pixel, shape) / height + 472,
        pixel,
        between,
    )
    return *draw_body(rng, grid, rng, y_mm), pixel


def axial_body_anatomy(
    rng: np.random.Generator,
    z_mm: np.ndarray,
    between: float,
    size: int,
    width_mm: float = 430.0,
    arms_raised: float = 1.0,
    nodule_rng: np.random.Generator | None = None,
) -> tuple[Tissue, np.ndarray, np.ndarray, float]:
    """
    The patient of [`body_anatomy`] in axial slices, with the details that these show.

    Args:
        rng (`np.random.Generator`): The subject.
        z_mm (`np.ndarray`): Heights of the slices, mm above the thighs; shoulders at 640, top of the head at 890.
        between (`float`): mm from slice to slice.
        size (`int`): Columns; there are three quarters as many rows.
        width_mm (`float`, defaults to 430): Field of view along the rows.
        arms_raised (`float`, defaults to 1): Probability that the arms are out of the picture.
        nodule_rng (`np.random.Generator`, *optional*): The FDG-avid nodules, if they should not be the subject's.

    Returns:
        `(tissue, body, lesion, pixel)`: the body and the FDG-avid nodules as bool, pixel in mm.
    """
    pixel, rows_high = width_mm / size, 3 * size // 4
    rows, columns = np.mgrid[0:rows_high, 0:size].astype(np.float32)
    shape = (len(z_mm), rows_high, size)
    build, height = rng.normal(1, 0.07), rng.normal(1, 0.03)
    grid = Grid(
        np.broadcast_to((columns - (size - 1) / 2) * pixel, shape) / build,
        np.broadcast_to(((rows_high - 1) / 2 - rows) * pixel, shape) / build,
        np.broadcast_to(z_mm[:, None, None], shape).astype(np.float32) / height,
        pixel,
        between,
    )
    depths = np.linspace(-64, 64, 17)
    return *draw_body(rng, grid, nodule_rng or rng, depths, arms_raised, detail=True), pixel


def draw_body(
    rng: np.random.Generator,
    grid: Grid,
    nodule_rng: np.random.Generator,
    nodule_y_mm: np.ndarray,
    arms_raised: float = 0.3,
    detail: bool = False,
) -> tuple[Tissue, np.ndarray, np.ndarray]:
    """
    Whole body on any grid of `x` to the patient's left, `y` to the front and `z` up from the thighs.

    Args:
        rng (`np.random.Generator`): The subject.
        grid ([`Grid`]): Where the pixels lie.
        nodule_rng (`np.random.Generator`): The FDG-avid nodules, which change from visit to visit.
        nodule_y_mm (`np.ndarray`): Their possible depths.
        arms_raised (`float`, defaults to 0.3): Probability that the arms are out of the picture, above the head.
        detail (`bool`, defaults to `False`): Draw what axial slices show and coronal ones hardly do: a squarer outline,
            vertebral arches and the spinal cord, muscles of the back, vessels, bronchi, pancreas, colon.

    Returns:
        `(tissue, body, lesion)`: body and nodules as bool.
    """
    # What is drawn squarer is bent less, or the details would be bent out of shape.
    grid = grid.warped(rng, 3.5, 45) if detail else grid.warped(rng, 5, 35)
    x, y, z = grid[:3]
    ax, pixel, shape = np.abs(x), grid.pixel, grid.shape
    tissue = Tissue(shape)

    def jitter(spread: float) -> float:
        return rng.normal(0, spread)

    levels = [0, 90, 140, 200, 300, 400, 520, 600, 650, 675, 700, 720]
    wide = np.interp(z, levels, [158, 168, 176, 172, 150, 158, 168, 172, 165, 110, 58, 52])
    deep = np.interp(z, levels, [85, 95, 105, 108, 100, 108, 112, 105, 85, 68, 58, 55])
    if detail:
        trunk = (1 - (np.abs(x / wide) ** 2.5 + np.abs(y / deep) ** 2.5) ** 0.4) * np.minimum(wide, deep)
    else:
        trunk = (1 - np.sqrt((x / wide) ** 2 + (y / deep) ** 2 + 1e-9)) * np.minimum(wide, deep)
    trunk = np.minimum(trunk, 725 - z)
    legs = np.minimum(80 - np.hypot(ax - 84, y), 100 - z)
    trunk = np.where(z < 60, legs, np.where(z < 100, np.maximum(legs, trunk), trunk))
    head = ellipsoid(grid[:3], (0, 5, 795), (74, 92, 100))
    raised = rng.random() < arms_raised
    arm_x = np.interp(z, [150, 600], [wide.max() + 34, wide.max() + 20])
    arm = np.full(shape, -99.0) if raised else np.minimum(33 - np.hypot(ax - arm_x, y), np.minimum(z - 130, 640 - z))
    body = np.maximum(np.maximum(trunk, head), arm)
    fat = rng.uniform(8, 26)
    tissue.paint("skin", soft(body, pixel))
    tissue.paint("fat", soft(body - 3, pixel))
    tissue.paint("muscle", soft(np.maximum(trunk - fat, arm - 9), pixel))
    tissue.paint("fat", soft(np.minimum(ellipsoid(grid[:3], (0, 12, 300), (128, 78, 170)), trunk - fat - 8), pixel))

    loops = grid.noise(rng, 14)
    gut = soft(ellipsoid(grid[:3], (0, 25, 250), (105, 62, 105)), pixel)
    tissue.paint("bowel", gut * soft(loops + 0.2, 0.6))
    tissue.paint("air", gut * soft(loops - 1.9, 0.5))

    # Lungs stand on the domes of the diaphragm.
    diaphragm = 455 + jitter(8) - 0.004 * (ax - 70) ** 2 - 0.15 * x + 5 * grid.noise(rng, 35)
    lungs = ellipsoid(grid.mirrored, (78 + jitter(3), -4, 520 + jitter(6)), (64, 88, 138 + jitter(8)))
    lungs = np.minimum(lungs, z - diaphragm)
    tissue.paint("lung", soft(lungs, pixel), "lungs")
    vessels = grid.noise(rng, 7) + 1.2 * np.exp(-((ax - 35) ** 2) / 1500) - 2.2
    tissue.paint("blood", soft(vessels, 0.8) * soft(lungs - 3, pixel) * 0.7)
    tissue.paint("fat", soft(ellipsoid(grid[:3], (0, 5, 560), (34, 60, 90)), pixel), "mediastinum")
    heart = np.array([26 + jitter(4), 28 + jitter(4), 508 + jitter(6)])
    tissue.paint("blood", soft(ellipsoid(grid[:3], heart, (58, 48, 58)), pixel), "heart")
    ventricle = ellipsoid(grid[:3], heart + (20, 2, -8), (33, 32, 36))
    tissue.paint("myocardium", soft(ventricle, pixel), "heart")
    tissue.paint("blood", soft(ventricle - 11, pixel))
    aorta = soft(13 - np.hypot(x - 8, y + 22), pixel) * soft(z - 240, 10) * soft(640 - z, 10)
    tissue.paint("blood", aorta, "aorta")
    tissue.paint("blood", soft(14 - np.hypot(x + 6, y - 8), pixel) * soft(z - 540, 8) * soft(630 - z, 10))

    # Upper abdomen, cut off by the diaphragm above.
    grow = rng.normal(1, 0.08)
    under = np.minimum(diaphragm - z, trunk - 14)
    stomach = np.minimum(ellipsoid(grid[:3], (60, 22, 400), (42, 38, 56)), under)
    tissue.paint("bowel", soft(stomach, pixel), "stomach")
    tissue.paint("air", soft(np.minimum(stomach - 6, z - 420 - jitter(10)), pixel))
    spleen = np.minimum(ellipsoid(grid[:3], (104, -34, 405), (32 * grow, 40, 54 * grow)), under)
    tissue.paint("spleen", soft(spleen, pixel), "spleen")
    liver = ellipsoid(grid[:3], (-72, 8, 405), (92 * grow, 88, 92 * grow))
    liver = np.maximum(liver, ellipsoid(grid[:3], (0, 34, 425), (72, 46, 44)))
    liver = np.minimum(np.minimum(liver, under), z - 335 - 0.55 * (x + 110))
    tissue.paint("liver", soft(liver, pixel), "liver")
    kidney_z = 340 + jitter(6)
    kidneys = ellipsoid(grid.mirrored, (66, -42, kidney_z), (27, 26, 54))
    tissue.paint("kidney", soft(kidneys, pixel), "kidneys")
    pelves = ellipsoid(grid.mirrored, (56, -40, kidney_z), (9, 10, 22))
    tissue.paint("urine", soft(pelves, pixel) * rng.uniform(0.1, 0.5))
    fill = rng.uniform(0.5, 1.2)
    bladder = ellipsoid(grid[:3], (0, 32, 95), (42 * fill, 34 * fill, 34 * fill))
    tissue.paint("urine", soft(bladder, pixel), "bladder")

    def bone(distance, cortex):
        tissue.paint("cortical bone", soft(distance, pixel) * 0.85, "bone")
        tissue.paint("marrow", soft(distance - cortex, pixel))

    spine = np.minimum(21 - np.hypot(x, y + 52), np.minimum(z - 190, 725 - z))
    tissue.paint("cortical bone", soft(spine, pixel) * 0.4)
    tissue.mark("bone", spine > 0)
    tissue.paint("marrow", soft(spine - 3, pixel))
    tissue.paint("disc", soft(np.cos(z * 2 * np.pi / 33) - 0.72, 0.2) * soft(spine - 2, pixel))
    # A cage narrowing to the apex; a cylinder below, so that no rib runs across the abdomen.
    cage = np.interp(z, [360, 500, 600, 650], [1.0, 1.0, 0.9, 0.6])
    around = (cage - np.sqrt((x / 146) ** 2 + (y / 92) ** 2)) * 92
    ribs = np.cos((z + 0.35 * (y - 40) - 0.25 * ax) * 2 * np.pi / 27) - 0.45
    shell = soft(4.5 - np.abs(around - 4), pixel) * soft(ribs, 0.4) * soft(z - 385, 10) * soft(650 - z, 10)
    shell *= soft(trunk - 6, pixel)
    tissue.paint("cortical bone", shell * 0.45)
    tissue.paint("marrow", shell * 0.4)
    tissue.mark("bone", shell > 0.5)
    bone(np.minimum(8 - np.hypot(y - 25, z - 645 + 0.1 * ax), 150 - ax), 3)
    # Iliac wings flare upwards and outwards from the hip sockets.
    wing = 8 - np.abs(ax - 78 - 0.42 * (z - 130) + 0.0016 * (z - 130) ** 2)
    wing = np.minimum(wing, np.minimum(np.minimum(232 - z, z - 118), 55 - np.abs(y + 12)))
    bone(wing, 2.5)
    bone(np.minimum(ellipsoid(grid[:3], (0, -68, 165), (50, 20, 50)), 215 - z), 2.5)
    bone(ellipsoid(grid.mirrored, (46, 14, 80), (30, 24, 15)), 2.5)
    bone(ellipsoid(grid.mirrored, (88, 0, 105), (27, 27, 25)), 2.5)
    bone(np.minimum(16 - np.hypot(ax - 102, y), 95 - z), 5.5)
    if not raised:
        bone(np.minimum(arm - 21, 640 - z), 4.5)
    bone(ellipsoid(grid.mirrored, (128 if detail and raised else 150, -5, 632), (24, 24, 24)), 2.5)

    tissue.paint("cortical bone", soft(head - 7, pixel), "bone")
    # The face is a mixture of small bones and soft tissue.
    tissue.paint("muscle", soft(np.minimum(head - 7, 762 - z), pixel) * 0.8, "face")
    brain = np.minimum(ellipsoid(grid[:3], (0, -2, 808), (66, 82, 72)), z - 752)
    folds = 4 * grid.noise(rng, 8)
    tissue.paint("csf", soft(brain, pixel), "brain")
    tissue.paint("grey matter", soft(brain - 2 + 0.3 * folds, pixel))
    tissue.paint("white matter", soft(brain - 14 + folds, pixel))
    tissue.paint("grey matter", soft(ellipsoid(grid.mirrored, (18, 0, 800), (12, 22, 14)), pixel))
    tissue.paint("csf", soft(ellipsoid(grid.mirrored, (9, -5, 815), (5, 28, 11)), pixel))
    tissue.paint("muscle", soft(ellipsoid(grid[:3], (0, 40, 730), (48, 45, 36)), pixel))
    tissue.paint("air", soft(9 - np.hypot(x, y - 10), pixel) * soft(z - 590, 8) * soft(745 - z, 8))

    if detail:
        _paint_trunk_detail(rng, tissue, grid, trunk)

    # Lungs, liver, abdomen: where nodules lie, and how far they scatter.
    sites = ((76, 560, 45), (-76, 560, 45), (-72, 405, 40), (0, 280, 60))
    lesion = np.zeros(shape, bool)
    for _ in range(nodule_rng.poisson(2.0)):
        middle, level, spread = sites[nodule_rng.integers(len(sites))]
        across = middle + nodule_rng.normal(0, spread / 2)
        centre = across, float(nodule_rng.choice(nodule_y_mm)), level + nodule_rng.normal(0, spread)
        nodule = np.minimum(ellipsoid(grid[:3], centre, [nodule_rng.uniform(7, 20)] * 3), trunk - 8)
        tissue.paint("nodule", soft(nodule, pixel))
        lesion |= nodule > 0
    return tissue, body > 0, lesion


# Muscles of one half of the trunk, mm in the coordinates of the whole body: centre and radii.
TRUNK_MUSCLES = (
    ((33, -85, 400), (25, 13, 330)),  # erector spinae
    ((36, -50, 255), (16, 19, 100)),  # psoas
    ((68, -66, 280), (18, 9, 70)),  # quadratus lumborum
    ((62, 90, 590), (50, 8, 52)),  # pectoralis
    ((138, -42, 540), (9, 40, 95)),  # latissimus and serratus
    ((48, -100, 600), (44, 6, 70)),  # trapezius and rhomboids
)


def _paint_trunk_detail(rng: np.random.Generator, tissue: Tissue, grid: Grid, trunk: np.ndarray):
    """Draw into a trunk what only axial slices show; `trunk` is the signed distance to its skin in mm."""
    x, y, z = grid[:3]
    ax, pixel = np.abs(x), grid.pixel
    # Neither lungs nor abdominal organs nor ribs are painted over.
    lung = tissue.fractions[NAMES.index("lung")] + tissue.fractions[NAMES.index("air")]
    bony = tissue.fractions[NAMES.index("cortical bone")] + tissue.fractions[NAMES.index("marrow")]
    organs = np.zeros(grid.shape, bool)
    for name in ("liver", "spleen", "stomach", "kidneys", "heart"):
        organs |= tissue.structures[name]
    free = np.clip(1 - lung - bony, 0, 1) * ~organs * soft(trunk - 5, pixel)
    ragged = 2 * grid.noise(rng, 8)

    def paint(name, distance, share=1.0, structure=None):
        tissue.paint(name, soft(distance, pixel) * share, structure)

    def tube(across, along, radius, low, high):
        return np.minimum(radius - np.hypot(x - across, y - along), np.minimum(z - low, high - z))

    for centre, radii in TRUNK_MUSCLES:
        muscle = ellipsoid(grid.mirrored, [c + rng.normal(0, 2) for c in centre], radii) + ragged
        paint("fat", muscle + 2.5, free)
        paint("muscle", muscle, free)

    # Upper abdomen.
    paint("blood", np.minimum((1 - np.hypot((x + 20) / 12, (y + 26) / 9)) * 9, np.minimum(z - 180, 452 - z)), free)
    bend = y - 4 + 0.0035 * (x - 5) ** 2
    pancreas = np.minimum(11 - np.hypot(bend, 0.55 * (z - 378 - 0.15 * x)), np.minimum(x + 34, 92 - x)) + ragged
    paint("fat", pancreas + 2, free)
    paint("bowel", pancreas, free, "pancreas")
    paint("blood", 6 - np.hypot(x + 12, y - 16 + 0.4 * (z - 385)), free * soft(z - 355, 8) * soft(425 - z, 8))
    gallbladder = ellipsoid(grid[:3], (-52 + rng.normal(0, 4), 46, 366), (13, 19, 27))
    paint("bowel", gallbladder + 1.5, soft(trunk - 18, pixel))
    paint("csf", gallbladder, soft(trunk - 18, pixel), "gallbladder")  # bile: as watery, and without FDG
    inside = soft(trunk - 20, pixel)
    lumps = 3.5 * np.cos(z * 2 * np.pi / 42 + rng.uniform(0, 6)) + ragged
    transverse = np.hypot(y - 58 - 0.0008 * x**2, z - 300 + 0.0022 * x**2 + 8 * np.sin(x / 40))
    for side, course, radius in (
        (-1, np.hypot(x + 104, y - 2), 21),
        (1, np.hypot(x - 108, y + 14), 15),
        (0, transverse, 16),
    ):
        colon = radius - course + lumps
        if side:
            colon = np.minimum(colon, np.minimum(z - 150, 330 - z))
        else:
            colon = np.minimum(colon, 108 - ax)
        there = inside * ~organs
        paint("bowel", colon, there, "colon")
        # Stool and gas; what is gas rises to the front of the patient, who lies on the back.
        content = soft(colon - 3, pixel) * there
        tissue.paint("air", content * soft(grid.noise(rng, 4) - 0.4, 0.7) * 0.35)
        height_in_colon = y - (58 if side == 0 else (2 if side < 0 else -14))
        tissue.paint("air", content * soft(height_in_colon - rng.uniform(-4, 10), 3))
    # Veins of the liver, darker or brighter than it as the contrast agent has it.
    liver = soft(ndimage.gaussian_filter(tissue.structures["liver"].astype(np.float32), 1.0) - 0.8, 0.2)
    tissue.paint(
        "blood", soft(0.12 - np.abs(grid.noise(rng, 14)), 0.1) * soft(grid.noise(rng, 12) - 0.4, 0.4) * liver * 0.7
    )

    # Mediastinum.
    paint("blood", np.minimum(11 - np.hypot(x + 20, y - 10), np.minimum(z - 545, 650 - z)), free)  # superior vena cava
    along = np.clip(((x + 6) * 14 + (y - 8) * -30) / (14**2 + 30**2), 0, 1)
    paint("blood", 12 - np.sqrt((x + 6 - 14 * along) ** 2 + (y - 8 + 30 * along) ** 2 + (z - 618) ** 2), free)  # arch
    paint("blood", ellipsoid(grid.mirrored, (24, 0, 566), (26, 10, 11)), free)  # pulmonary arteries
    paint("muscle", tube(3, -30, 8, 425, 720), free)
    paint("air", tube(3, -29, rng.uniform(1, 4), 425, 720), free)
    paint("air", np.minimum(9 - np.hypot(x, y - 2), np.minimum(z - 575, 600 - z)), structure="airway")
    bronchus = np.hypot(ax - 0.8 * (588 - z), y + 1)
    paint("air", np.minimum(6.5 - bronchus, np.minimum(z - 545, 590 - z)), structure="airway")

    # Bones that ribs and spine leave out.
    plate = 3.5 - np.abs((ax - 104) * 0.62 + (y + 72) * -0.78 + 0.02 * (z - 600))
    reach = 34 - np.abs((ax - 104) * 0.78 + (y + 72) * 0.62)
    scapula = np.minimum(np.minimum(plate, reach), np.minimum(z - 535, 655 - z))
    paint("cortical bone", scapula, free * 0.7, "bone")
    sternum = ellipsoid(grid[:3], (0, 88, 560), (18, 6, 88))
    paint("cortical bone", sternum, soft(trunk - 6, pixel) * 0.5, "bone")
    paint("marrow", sternum - 1.5, soft(trunk - 6, pixel))
    below = np.minimum(z - 190, 725 - z)
    vertebral = np.cos((z - 16) * 2 * np.pi / 33)
    level = soft(vertebral + 0.2, 0.4) * soft(trunk - 6, pixel)
    paint("cortical bone", np.minimum(np.minimum(3.5 - ax, np.minimum(-84 - y, y + 108)), below), 0.8 * level, "bone")
    wings = np.minimum(4 - np.abs(y + 76 + 0.1 * (ax - 14)), np.minimum(38 - ax, below))
    paint("cortical bone", wings, 0.6 * level * (1 - lung), "bone")
    ring = np.hypot(x / 1.2, y + 76)
    paint("cortical bone", np.minimum(13.5 - ring, below), 0.85, "bone")
    paint("fat", np.minimum(10.5 - ring, below))
    paint("csf", np.minimum(8.5 - ring, below))
    paint(
        "white matter", np.minimum(5 - np.hypot(x / 1.2, y + 76), np.minimum(z - 330, 725 - z)), structure="spinal cord"
    )


# Columns as in TISSUES; gadolinium is what is left ten minutes after injection, when LGE is taken. A scar keeps the
# agent, healthy myocardium washes it out: chosen to give the T1 of 280, 330 and 450 ms that are seen in scar, blood and
# myocardium at 1.5 T (Messroghli 2007 JMRI 26:1081). T2 of oedema: Giri 2009 JCMR 11:56. Blood flows in slowly enough
# for the balanced sequence, hence the full proton density.
HEART_TISSUES = TISSUES | {
    "blood": (45, 0.95, 1440, 250, 1930, 180, 1.7, 0.57),
    "muscle": (55, 0.80, 1010, 44, 1412, 40, 0.6, 0.25),
    "myocardium": (45, 0.80, 1030, 50, 1470, 45, 6.5, 0.30),
    "heart oedema": (45, 0.85, 1200, 68, 1600, 62, 6.5, 0.32),
    "scar": (45, 0.82, 1200, 64, 1600, 58, 6.5, 0.67),
}


def heart_anatomy(
    rng: np.random.Generator, z_mm: np.ndarray, between: float, size: int
) -> tuple[Tissue, np.ndarray, np.ndarray, float]:
    """
    One chest in short-axis slices of the heart, the left ventricle in the middle and the right one on its left.

    The infarct takes a sector of the left ventricle's wall from the inside outwards, amid a larger sector of oedema.

    Args:
        rng (`np.random.Generator`): The subject.
        z_mm (`np.ndarray`): Places of the slices, mm from the base (0) towards the apex (90).
        between (`float`): mm from slice to slice.
        size (`int`): Columns of a field of view of 340 mm; there are as many rows.

    Returns:
        `(tissue, body, infarct, pixel)`: body and infarct (scar and oedema) as bool, pixel in mm.
    """
    pixel, half = 340 / size, (size - 1) / 2
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    shape = (len(z_mm), size, size)
    grid = Grid(
        np.broadcast_to((columns - half) * pixel, shape),
        np.broadcast_to((half - rows) * pixel, shape),
        np.broadcast_to(z_mm[:, None, None], shape).astype(np.float32),
        pixel,
        between,
    ).warped(rng, 2.5, 30)
    x, y, z = grid[:3]
    tissue = Tissue(shape, list(HEART_TISSUES))

    def jitter(spread: float) -> float:
        return rng.normal(0, spread)

    def paint(name, distance, share=1.0, structure=None):
        tissue.paint(name, soft(distance, pixel) * share, structure)

    def disc(across, along, wide, deep):
        return (1 - np.hypot((x - across) / wide, (y - along) / deep)) * min(wide, deep)

    # The chest around it: the breastbone ahead on the left, the spine behind, the liver below.
    wide, deep = 140 + jitter(5), 110 + jitter(4)
    body = (1 - (np.abs((x + 22) / wide) ** 2.4 + np.abs((y + 18) / deep) ** 2.4) ** (1 / 2.4)) * deep
    fat = rng.uniform(8, 24)
    paint("skin", body)
    paint("fat", body - 2.5)
    wall = body - fat
    paint("muscle", wall + 2 * grid.noise(rng, 9))
    ribs = 5 - np.abs(body - fat - 9)
    around = np.arctan2(y + 18, x + 22)
    bony = soft(ribs, pixel) * soft(np.cos(around * 11 + jitter(1)) - 0.35, 0.3)
    tissue.paint("cortical bone", bony * 0.5, "bone")
    tissue.paint("marrow", bony * 0.5)
    inner = body - fat - 16
    tissue.paint("fat", soft(inner, pixel))
    for across, width in ((68, 58), (-96, 62)):
        lung = np.minimum(disc(across, -22, width, 92), inner - 1)
        paint("lung", lung, structure="lungs")
        vessels = soft(grid.noise(rng, 5) - 1.9, 0.5) * soft(lung - 4, pixel)
        tissue.paint("blood", vessels * 0.7)
    dome = -52 - 0.35 * z + jitter(6) + 0.0016 * (x + 50) ** 2
    liver = np.minimum(np.minimum(disc(-70, -60, 78, 70), inner - 1), dome - y + 0.25 * (30 - x))
    paint("liver", liver, structure="liver")
    paint("muscle", disc(-34, -92, 34, 20))
    paint("cortical bone", disc(-30, -86, 21, 19), structure="bone")
    paint("marrow", disc(-30, -86, 18.5, 16.5))
    paint("csf", disc(-30, -112, 9, 8))
    paint("blood", disc(-2, -66, 11, 11), structure="aorta")

    # Ventricles; both narrow towards the apex.
    taper = np.sqrt(np.clip(1 - (np.clip(z, 0, 200) / (96 + jitter(4))) ** 2, 0.02, 1))
    pool_radius, thickness = 26 + jitter(2), 10 + jitter(0.8)
    from_middle = np.hypot(x, y / 1.04) + 0.6 * grid.noise(rng, 10)
    outer = (pool_radius + thickness) * (0.25 + 0.75 * taper)
    pool = np.maximum(outer - thickness * (1.05 - 0.15 * (1 - taper)), 1)
    sac = np.maximum(disc(-16, 2, 56, 48), outer + 6 - from_middle)
    paint("fat", sac)
    right_wide, right_deep = 36 * taper + 4, 33 * taper + 4
    right = (1 - np.hypot((x + 28) / right_wide, (y - 7) / right_deep)) * right_deep
    paint("myocardium", right + 3.5)
    paint("blood", right, structure="right ventricle")
    # Trabeculae at the wall of the right ventricle.
    ridges = soft(grid.noise(rng, 4) - 1.2, 0.5) * soft(right, pixel) * soft(9 - right, 3)
    tissue.paint("myocardium", ridges * 0.7)
    paint("fat", np.minimum(outer + 2 - from_middle, right + 1), 0.15)
    paint("myocardium", outer - from_middle, structure="myocardium")
    depth = np.clip((from_middle - pool) / np.maximum(outer - pool, 1), 0, 1)  # 0 inside, 1 outside
    turn = np.arctan2(y, x)
    # Coronary territories, seen from the apex: before (LAD), below (RCA), at the side (LCX).
    middle = np.deg2rad(rng.choice([110.0, -100.0, 10.0]) + jitter(15))
    away = np.abs((turn - middle + np.pi) % (2 * np.pi) - np.pi)
    reach = np.deg2rad(rng.uniform(25, 50))
    transmural = rng.uniform(0.45, 1.05)
    level = rng.uniform(25, 65)
    along = soft(rng.uniform(22, 40) - np.abs(z - level), 6)
    ring = np.minimum(outer - from_middle, from_middle - pool)
    at_risk = soft((reach + 0.35 - away) * pool_radius, 4) * along
    dead = soft((reach - away) * pool_radius, 3) * soft((transmural - depth) * thickness + 1.5 * grid.noise(rng, 6), 2)
    tissue.paint("heart oedema", at_risk * soft(ring, pixel), "oedema")
    tissue.paint("scar", dead * along * soft(ring, pixel), "scar")
    paint("blood", pool - from_middle, structure="left ventricle")
    for angle in (60, -50):
        papillary = pool - 6.5
        across, beside = papillary * np.cos(np.deg2rad(angle)), papillary * np.sin(np.deg2rad(angle))
        muscle = np.minimum(4.5 - np.hypot(x - across, y - beside), np.minimum(z - 18, 72 - z))
        paint("myocardium", muscle, soft(pool - 9, 2))
    infarct = tissue.structures["oedema"] | tissue.structures["scar"]
    return tissue, body > 0, infarct, pixel
