"""Many scans at once: what `synermedgen synthesize` and `synermedgen identify` do.

Everything is checked before the weights are put to work. A case that fails is told at the end and stops no other; what
is finished is kept, and the same call goes on from it. Several processes share the cases out.
"""

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..data.splits import write_whole
from ..processing_synermedgen import MODALITY_NAMES
from .folders import (
    FORMATS,
    Case,
    Job,
    Outcome,
    check_writable,
    find_cases,
    fingerprint,
    plan_outputs,
    request,
    run_jobs,
    share_of,
    sort_out,
    write_cases,
)
from .reading import Volume, extension, read_volume
from .synthesis import VolumeSynthesis, checksums, synthesize_volume, write_synthesis
from .understanding import region_axis, understanding_slice
from .writing import write_dicom_series

PATIENCE = timedelta(days=30)  # of a process that is done and waits for the others
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def this_process() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; without a GPU too."""
    cpu = not torch.cuda.is_available()
    backend = {"backend": "gloo"} if cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    return PartialState(cpu=cpu, timeout=PATIENCE, **backend)


def synthesize_cases(
    pipe,
    scans: str | Path,
    targets: list[str],
    output: str | Path,
    source: str | None = None,
    region: str | None = None,
    pattern: str | None = None,
    series_uid: str | None = None,
    mask: str | Path | None = None,
    file_format: str | None = None,
    deidentify: bool = False,
    overwrite: bool = False,
    batch_size: int = 8,
    **settings,
) -> list[Outcome]:
    """
    Synthesise one scan or a folder of them, each to one or several targets.

    Args:
        pipe ([`SynerMedGenPipeline`]): Any checkpoint.
        scans (`str` or `Path`): A volume, a folder with a DICOM series, or a folder of many of both.
        targets (`list[str]`): Modalities to make.
        output (`str` or `Path`): A file for one result, else a folder.
        source (`str`, *optional*): Modality of the scans; by default what DICOM says or the weights see.
        region (`str`, *optional*): Of all scans.
        pattern (`str`, *optional*): Which files below a folder, such as `"*/mr.nii.gz"`.
        series_uid (`str`, *optional*): Which DICOM series, where a folder holds several.
        mask (`str` or `Path`, *optional*): The body, for a single scan.
        file_format (`str`, *optional*): `"nifti"`, `"mha"`, `"nrrd"` or `"dicom"`; by default the scan's own.
        deidentify (`bool`, defaults to `False`): DICOM without anything of its source, results called by number.
        overwrite (`bool`, defaults to `False`): Make again what is there.
        batch_size (`int`, defaults to 8): Slices at a time.
        settings: `axis`, `seed`, `num_samples`, `overlap` and what the pipeline takes, as in [`synthesize_volume`].

    Returns:
        `list[Outcome]`: One for every case and target; on several processes the same list on each.

    Raises:
        `ValueError`, `OSError`: Something cannot be used; said before anything is computed. Or the disk is full.
    """
    output = Path(output)
    for target in targets:
        if target not in MODALITY_NAMES:
            raise ValueError(f"Unknown target {target!r}. Choose one of {', '.join(MODALITY_NAMES)}.")
        if source is not None:
            pipe.check_route([source], target, region)
    if file_format is not None and file_format not in FORMATS:
        raise ValueError(f"Unknown format {file_format!r}. Choose one of {', '.join(FORMATS)}.")
    folder = output.parent if extension(output) else output
    cases = find_cases(scans, pattern, leave_out=folder)
    if source is None and "MI" not in pipe.model.config.trained_tasks and not all(case.is_dicom for case in cases):
        raise ValueError(
            "Say which modality the scans are, such as --source MRI: their files do not say it, and these weights have "
            "not learned to see it."
        )
    if mask is not None and len(cases) > 1:
        raise ValueError(f"One mask does not fit {len(cases)} scans: name a single scan.")
    body = None if mask is None else read_volume(mask)
    jobs = plan_outputs(cases, targets, output, file_format, anonymous=deidentify)
    state = this_process()
    check_writable(folder)
    weights = checksums(pipe)
    wanted = {
        "source": source,
        "region": region,
        "series": series_uid,
        "mask": None if mask is None else fingerprint(Path(mask)),
        "deidentify": deidentify,
        **settings,
        "weights": weights,
        "dtype": str(pipe.model.dtype),
    }
    finished, pending = sort_out(jobs, wanted, sidecar_of, overwrite)
    state.wait_for_everyone()  # nobody writes while another still looks at what is there

    def read(case: Case) -> Volume:
        return read_volume(case.path, series_uid if case.is_dicom else None)

    def make(scan: Volume, job: Job):
        made = synthesize_volume(
            pipe, scan, job.target, source, region, mask=body, batch_size=batch_size, weights=weights, **settings
        )
        made.record["request"] = request(job, wanted)
        _write(made, job, series_uid, deidentify)

    mine = share_of(pending, state.process_index, state.num_processes)
    outcomes = [outcome for _, outcome in run_jobs(mine, read, make)]
    outcomes = gather_object(outcomes) if state.num_processes > 1 else outcomes
    outcomes += [Outcome(job.case.number, job.case.label, job.target, "kept") for job in finished]
    order = {(job.case.number, job.target): place for place, job in enumerate(jobs)}
    outcomes.sort(key=lambda outcome: order[outcome.case, outcome.target])
    if state.is_main_process and not extension(output):
        write_cases(folder, jobs, outcomes, anonymous=deidentify or any(case.is_dicom for case in cases))
    return outcomes


def sidecar_of(path: Path) -> Path:
    """Where the record of a result lies."""
    return path.with_name(f"{path.name[: len(path.name) - len(extension(path))]}.json")


def _write(made: VolumeSynthesis, job: Job, series_uid: str | None, deidentify: bool):
    job.output.parent.mkdir(parents=True, exist_ok=True)
    if extension(job.output):
        write_synthesis(made, job.output, overwrite=True)
        return
    write_whole(sidecar_of(job.output), json.dumps(made.record, indent=2) + "\n")
    told = {"from": "+".join(made.record["sources"]), "seed": made.record["seeds"][0]}
    told["weights"] = (made.record["weights_sha256"]["model"] or "unknown")[:16]
    write_dicom_series(
        made.volume,
        job.output,
        source_series=job.case.path if job.case.is_dicom else None,
        series_uid=series_uid,
        deidentify=deidentify,
        details=told,
        overwrite=True,
    )


def identify_scans(
    pipe,
    scans: str | Path,
    pattern: str | None = None,
    series_uid: str | None = None,
    region: str | None = None,
) -> list[dict]:
    """
    Name the modality of a scan, a picture, or of every scan in a folder, by its middle slice.

    Args:
        pipe ([`SynerMedGenPipeline`]): A checkpoint that has learned it.
        scans (`str` or `Path`), pattern (`str`, *optional*), series_uid (`str`, *optional*): As in
            [`synthesize_cases`].
        region (`str`, *optional*): Of all scans; says along which axis the weights are used to see them.

    Returns:
        `list[dict]`: `case`, `modality`, `probability` and `probabilities`; or `case` and `error`.

    Raises:
        `ValueError`: There is no scan, or the weights have not learned to identify modalities.
    """
    pipe.check_task("MI", "identify a modality")
    scans = Path(scans)
    if scans.is_file() and scans.suffix.lower() in PICTURES:
        return [{"case": str(scans), **pipe.identify(scans)}]

    found: list[dict] = []

    def make(volume: Volume, job: Job):
        picture = understanding_slice(volume, region_axis(volume, region))
        found.append({"case": job.case.label, **pipe.identify(picture)})

    cases = find_cases(scans, pattern)
    jobs = [Job(case, "", Path(".") / "none") for case in cases]
    for _, outcome in run_jobs(jobs, lambda case: read_volume(case.path, series_uid if case.is_dicom else None), make):
        if outcome.error:
            found.append({"case": outcome.label, "error": outcome.error})
    return found


__all__ = ["identify_scans", "sidecar_of", "synthesize_cases", "this_process"]
