"""Writes the examples of the Space: four small examinations of simulated patients, each in two modalities.

    python spaces/synermedgen/make_examples.py

They come from the digital phantom of the package (`synermedgen_hf.data.phantom`), from patients that the bundled
weights were not trained on. No real person was scanned. `manifest.csv` makes the folder a data set of
`load_dataset("synermed")`.
"""

import csv
from pathlib import Path

import nibabel
import numpy as np

from synermedgen_hf.data.phantom import simulate_volume

FOLDER = Path(__file__).parent / "examples"
# Region, protocol, source, its pair, pixels of a side, slices kept around the middle.
EXAMPLES = (
    ("brain", "synthrad", "MRI", "CT", 128, 11),
    ("brain", "brats", "T1", "T2", 128, 11),
    ("pelvis", "synthrad", "CBCT", "CT", 128, 10),
    ("whole-body", "autopet", "CT", "PET", 96, 12),
)
SEED = 2_000_000  # of the test split
STEPS = {"CT": 4.0, "CBCT": 4.0, "PET": 0.02}  # of the stored integers, in HU and SUV; of MR, 4 arbitrary units


def main():
    rows = []
    for region, protocol, *pair, size, keep in EXAMPLES:
        volume = simulate_volume(region, protocol, SEED, size=size, modalities=tuple(pair))
        middle = int(np.median(np.flatnonzero(volume.mask.any((1, 2)))))
        first = max(0, min(middle - keep // 2, len(volume.mask) - keep))
        case_id = f"phantom-{region}-{pair[0]}-{pair[1]}".lower()
        row = {"case_id": case_id, "patient_id": case_id, "region": region}
        affine = volume.affine @ np.array([[1, 0, 0, first], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        for modality in pair:
            array = volume.images[modality][first : first + keep]
            step = STEPS.get(modality, 4.0)
            # (slice, row, column) as the phantom has them, to (column, row, slice) as NIfTI usually has.
            image = nibabel.Nifti1Image(
                np.rint(array / step).astype(np.int16).transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]
            )
            image.header.set_slope_inter(step, 0)
            image.header["descrip"] = b"simulated by synermedgen_hf, no real patient"
            row[modality] = f"{case_id}_{modality.lower()}.nii.gz"
            nibabel.save(image, FOLDER / row[modality])
        rows.append(row)
    columns = ["case_id", "patient_id", "region", "T1", "T2", "MRI", "CT", "CBCT", "PET"]
    with open(FOLDER / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main()
