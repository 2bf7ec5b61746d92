"""A look at scans that nothing was measured on: one slice of each, what the model makes of it, and the true one beside.

    python examples/look.py T1=avg152T1.nii.gz T2=avg152T2.nii.gz --height 10 --output look.png
    python examples/look.py CT=ct_brain_atlas_1mm.nii.gz --targets MRI --output look.png

Scans of one grid are taken for one patient: each becomes each of the others. There is no figure below the pictures, on
purpose: one slice of one scan proves nothing, and population averages are nobody's anatomy. Not for clinical use.
"""

import argparse
from pathlib import Path

import nibabel
import numpy as np
from demo import axial_slice, draw

from synermedgen_hf import SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.processing_synermedgen import MODALITY_NAMES


def a_scan(argument: str) -> tuple[str, Path]:
    modality, _, file = argument.partition("=")
    if modality not in MODALITY_NAMES or not file:
        raise argparse.ArgumentTypeError(f"{argument!r} is not MODALITY=FILE; modalities: {', '.join(MODALITY_NAMES)}")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {file}")
    return modality, Path(file)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=a_scan, metavar="MODALITY=FILE", help="NIfTI, along the body's axes")
    parser.add_argument("--targets", nargs="*", default=[], choices=list(MODALITY_NAMES), help="without a true one")
    parser.add_argument("--region", default="brain")
    parser.add_argument(
        "--height", type=float, default=None, help="of the slice, mm; by default the middle of the scan"
    )
    parser.add_argument("--model", default=None, help="pipeline folder or repository; the bundled weights by default")
    parser.add_argument("--output", type=Path, default=Path("look.png"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read(file: Path) -> nibabel.Nifti1Image:
    """A scan along left-right, back-front and feet-head."""
    scan = nibabel.as_closest_canonical(nibabel.load(file))
    if scan.ndim != 3 or np.abs(scan.affine[:3, :3] - np.diag(np.diag(scan.affine)[:3])).max() > 1e-3:
        raise SystemExit(f"{file} is no volume along the body's axes: resample it, or use `synermedgen synthesize`.")
    return scan


def main(args):
    scans = {modality: read(file) for modality, file in args.scans}
    if len({(scan.shape, scan.affine.round(3).tobytes()) for scan in scans.values()}) > 1:
        raise SystemExit("The scans are of different grids, so none is the true one for another: give them one by one.")
    pipe = SynerMedGenPipeline.from_pretrained(args.model or checkpoint_path())
    rows = []
    for source, scan in scans.items():
        volume = np.asarray(scan.dataobj, np.float32)
        low, high = (scan.affine[2, 3] + scan.affine[2, 2] * place for place in (0, scan.shape[2] - 1))
        height = (low + high) / 2 if args.height is None else args.height
        if not low <= height <= high:
            raise SystemExit(f"--height {height:g} is outside of the scan, which goes from {low:g} to {high:g} mm.")
        image = axial_slice(scan, height)
        for target in [*scans, *args.targets]:
            if target == source:
                continue
            # An MR slice is given the window of its volume, as in training.
            window = pipe.processor.image_processor.intensity_window(volume, source)
            how = {"source": source, "region": args.region, "window": window, "seed": args.seed}
            made = pipe(image, target=target, output_type="np", **how)
            true = axial_slice(scans[target], height) if target in scans else None
            row = {"image": image, "made": made.images[0], "reference": true, "unit": made.records[0]["unit"]}
            rows.append({"title": f"{height:g} mm", "source": source, "target": target, "region": args.region, **row})
    if not rows:
        raise SystemExit("One scan alone becomes nothing: name --targets, or another scan of its grid.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, pipe.model.config.notice or "", args.output)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main(parse_args())
