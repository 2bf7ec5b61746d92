"""What lies in a folder of scans: which dataset, which patients, which files belong together. (Interfaces first.)"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class CaseRecord:
    """
    One case of a dataset: files that show the same anatomy on (nearly) one grid.

    Args:
        dataset (`str`): Such as `"synthrad2023"`, `"brats"`, `"autopet"`.
        case_id (`str`): Unique within the dataset.
        patient_id (`str`): Cases of one patient (time points, studies) share it; splits go by it.
        region (`str`): `"brain"`, `"pelvis"`, `"whole-body"`, `"abdomen"`, `"thorax"`, `"head-neck"`, `"heart"`.
        axis (`str`): Direction of the slices: `"axial"` or `"coronal"`.
        files (`dict[str, str]`): Modality -> path.
        mask (`str`, *optional*): Path.
        centre (`str`): Hospital or site, for stratified splits; empty if unknown.
    """

    dataset: str
    case_id: str
    patient_id: str
    region: str
    axis: str
    files: dict[str, str]
    mask: str | None = None
    centre: str = ""


@dataclass
class LoadedCase:
    """
    A case in memory, on one grid, as slices that lie as a radiologist looks at them.

    Args:
        record ([`CaseRecord`]): Where it comes from.
        images (`dict[str, np.ndarray]`): Modality -> float32 `(slices, rows, columns)` in scanner units (HU, SUV,
            arbitrary MR units). Axial: anterior up, patient's right on the left. Coronal: head up, right on the left.
        mask (`np.ndarray`, *optional*): bool, of the same shape.
        spacing (`tuple[float, float, float]`): mm between slices, rows and columns.
        windows (`dict[str, dict]`): Modality -> intensity record (`unit`, `low`, `high`, `scale`) of the volume.
        usable (`np.ndarray`): Indices of slices that show enough of the patient, increasing.
        notes (`list[str]`): What was repaired, in words.
    """

    record: CaseRecord
    images: dict[str, np.ndarray]
    mask: np.ndarray | None
    spacing: tuple[float, float, float]
    windows: dict[str, dict]
    usable: np.ndarray
    notes: list[str] = field(default_factory=list)
