"""First light: synthesise from a slice of a real MR template and from one simulated patient per region.

    python examples/demo.py --output_dir demo_output

Writes one contact sheet (source, synthesis, reference where there is one, difference) and `report.json`. The real slice
is the MNI152 T1 template that comes with nilearn; it is skull-stripped, so whatever skull its CT shows is the model's
guess. The weights are a demonstration trained on simulated scans. Not for clinical use.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from nilearn.datasets import load_mni152_template
from skimage.metrics import structural_similarity

from synermedgen_hf import SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.data.phantom import simulate_case

# How each modality is shown; the metrics always use the whole range of the codec.
DISPLAY = {"CT": (-300, 1000), "CBCT": (-300, 1000), "PET": (0, 8)}
BODY_DISPLAY = {"CT": (-1000, 600), "PET": (0, 8)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder or repository; the bundled weights by default")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def axial_slice(volume, z_mm: float) -> np.ndarray:
    """
    One axial slice for display.

    Args:
        volume (`nibabel.Nifti1Image`): Axes along the patient's left-right, back-front and feet-head, in either sense.
        z_mm (`float`): Height in the volume's own coordinates.

    Returns:
        `np.ndarray` of shape `(height, width)`: anterior up, patient's right on the left.
    """
    step = np.diag(volume.affine)[:3]
    image = np.asarray(volume.dataobj, np.float32)[:, :, round((z_mm - volume.affine[2, 3]) / step[2])]
    # World coordinates grow towards the patient's right, front and head in neuroimaging's RAS+ convention.
    from_right = image if step[0] < 0 else image[::-1]
    from_front = from_right[:, ::-1] if step[1] > 0 else from_right
    return np.ascontiguousarray(from_front.T)


def make_cases(seed: int) -> list[dict]:
    """What the demo shows: title, source, its volume and modality, target, region, reference where there is one."""
    template = load_mni152_template(resolution=1)
    cases = [
        {
            "title": "Real MR template (MNI152)",
            "image": axial_slice(template, 10.0),
            "volume": np.asarray(template.dataobj),
            "source": "MRI",
            "target": "CT",
            "region": "brain",
        }
    ]
    for region, protocol, source, target in (
        ("brain", "synthrad", "MRI", "CT"),
        ("brain", "brats", "T1", "T2"),
        ("pelvis", "synthrad", "CBCT", "CT"),
        ("whole-body", "autopet", "CT", "PET"),
    ):
        # Seeds of the test split: subjects the weights have never seen.
        case = simulate_case(region, protocol, 2_000_000 + seed, num_slices=5)
        pick = 2
        cases.append(
            {
                "title": f"Simulated {region}",
                "image": case.images[source][pick],
                "volume": case.images[source],
                "reference": case.images[target][pick],
                "source": source,
                "target": target,
                "region": region,
            }
        )
    return cases


def measure(pipe, prediction: np.ndarray, reference: np.ndarray, target: str) -> dict[str, float]:
    """SSIM over the frame on the codec's scale and MAE in the target's units (MR: on the codec's 0..1 scale)."""
    codec = pipe.processor.image_processor
    made, _ = codec.encode_intensity(prediction, target)
    wanted, record = codec.encode_intensity(reference, target)
    ssim = structural_similarity(made, wanted, data_range=2.0)
    if record["unit"] in ("HU", "SUV"):
        return {
            "ssim_codec_frame": float(ssim),
            f"mae_{record['unit'].lower()}_frame": float(np.abs(prediction - reference).mean()),
        }
    return {"ssim_codec_frame": float(ssim), "mae_codec01_frame": float(np.abs(made - wanted).mean() / 2)}


def draw(rows: list[dict], notice: str, path: Path):
    """The contact sheet."""
    figure, axes = plt.subplots(len(rows), 4, figsize=(11, 2.75 * len(rows) + 0.9), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, (axis_source, axis_made, axis_wanted, axis_difference) in zip(rows, axes, strict=True):
        windows = BODY_DISPLAY if row["region"] == "whole-body" else DISPLAY

        def show(axis, array, modality, title, windows=windows, unit=None):
            low, high = windows.get(modality, (0, float(np.percentile(array, 99.7)) or 1.0))
            axis.imshow(array, cmap="gray_r" if modality == "PET" else "gray", vmin=low, vmax=high)
            axis.set_title(f"{title}\n{low:g} to {high:.0f} {unit}", fontsize=8)

        unit = row["unit"]
        source_unit = {"CT": "HU", "CBCT": "HU", "PET": "SUV"}.get(row["source"], "a.u.")
        show(axis_source, row["image"], row["source"], f"{row['title']}: {row['source']}", unit=source_unit)
        show(axis_made, row["made"], row["target"], f"synthesised {row['target']}", unit=unit)
        if row.get("reference") is None:
            axis_wanted.text(
                0.5, 0.5, "no reference:\na real scan without its pair", ha="center", va="center", fontsize=9
            )
            continue
        reference, made = row["reference"], row["made"]
        if unit == "a.u.":  # an MR has no absolute scale: put the reference on the synthesis's
            reference = reference * (np.percentile(made[made > 0], 99) / np.percentile(reference[reference > 0], 99))
        show(axis_wanted, reference, row["target"], f"reference {row['target']}", unit=unit)
        span = {"HU": 400, "SUV": 4}.get(unit, float(np.percentile(reference, 99.7)) / 2)
        axis_difference.imshow(made - reference, cmap="RdBu_r", vmin=-span, vmax=span)
        ssim = f", SSIM {100 * row['metrics']['ssim_codec_frame']:.1f}" if "metrics" in row else ""
        axis_difference.set_title(f"difference{ssim}\n-{span:.0f} to {span:.0f} {unit}", fontsize=8)
    figure.suptitle(f"SynerMedGen. {notice}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args):
    begin = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = SynerMedGenPipeline.from_pretrained(args.model or checkpoint_path())
    rows = []
    for case in make_cases(args.seed):
        # An MR slice is given the window of its volume, as in training.
        codec = pipe.processor.image_processor
        window = codec.intensity_window(case["volume"], case["source"])
        start = time.perf_counter()
        output = pipe(
            case["image"],
            target=case["target"],
            source=case["source"],
            region=case["region"],
            seed=args.seed,
            window=window,
            output_type="np",
        )
        made, record = output.images[0], output.records[0]
        row = {
            **case,
            "made": made,
            "unit": record["unit"],
            "seconds": round(time.perf_counter() - start, 2),
            "record": record,
        }
        if case.get("reference") is not None:
            row["metrics"] = measure(pipe, made, case["reference"], case["target"])
        rows.append(row)
    sheet = args.output_dir / "contact_sheet.png"
    notice = pipe.model.config.notice or ""
    draw(rows, notice, sheet)
    report = {
        "model": str(args.model or "synermedgen-tiny"),
        "notice": notice,
        "protocol": "SSIM: scikit-image, 7x7 uniform window, frame, codec scale; mean absolute error: frame",
        "cases": [
            {
                "title": row["title"],
                "route": f"{row['region']}/{row['source']}-{row['target']}",
                "unit": row["unit"],
                "seed": row["record"]["seed"],
                "num_inference_steps": row["record"]["num_inference_steps"],
                "seconds": row["seconds"],
                "metrics": row.get("metrics"),
            }
            for row in rows
        ],
        "seconds_in_all": round(time.perf_counter() - begin, 2),
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nPictures: {sheet}\nReport:   {args.output_dir / 'report.json'}")


if __name__ == "__main__":
    main(parse_args())
