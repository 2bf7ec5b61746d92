"""The command line: `synermedgen COMMAND`. Each command imports what it needs when it runs, so that help is quick.

Every command has `--json` and ends with one of the exit codes that the help states.
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from . import model_source  # light: the rest of the package is not imported with it

app = typer.Typer(
    name="synermedgen",
    help="SynerMedGen: CT, MRI, CBCT and PET synthesised from one another. Research use only.",
    epilog="Exit codes: 0 fine, 1 wrong input or failed cases, 2 a command that is not understood, 130 interrupted.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


class Questions(StrEnum):
    understanding = "understanding"
    cts = "cts"
    mi = "mi"
    tia = "tia"
    vqa = "vqa"


class Difficulty(StrEnum):
    hard = "hard"
    easy = "easy"
    mixed = "mixed"


class Scanner(StrEnum):
    usual = "usual"
    unseen = "unseen"


class Level(StrEnum):
    slice = "slice"
    volume = "volume"


class Codec(StrEnum):
    plain = "plain"
    bands = "bands"


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Report(NamedTuple):
    """What a command found: in words, the same as a dictionary for --json, and the exit code it asks for."""

    text: str
    record: dict
    exit_code: int = 0


def run(work, *args, as_json: bool = False, **kwargs):
    """
    Run one command's work: its report, which is a [`Report`] or text, to stdout; or what is wrong to stderr and exit
    code 1. With `as_json`, stdout is one JSON object either way. Work without a report, as of a second process, says
    nothing.
    """
    try:
        report = work(*args, **kwargs)
        if report is None:
            return
        if not isinstance(report, Report):
            report = Report(str(report), {"report": str(report)})
        typer.echo(json.dumps(report.record, indent=2) if as_json else report.text)
        if report.exit_code:
            raise typer.Exit(report.exit_code)
    except (OSError, ValueError, ImportError) as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error)}, indent=2))
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("Interrupted. What was half-written is removed; run the same command again.", err=True)
        raise typer.Exit(130) from None


AllowMissing = Annotated[
    list[str] | None,
    typer.Option(help="A tensor, or a pattern with *, that may be missing."),
]
AllowUnexpected = Annotated[list[str] | None, typer.Option(help="A tensor, or a pattern with *, that may be left out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files already.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout instead of text.")]
Device = Annotated[
    str | None, typer.Option(help="Compute on it: cpu, cuda, cuda:1, mps; by default a GPU where there is one.")
]
Model = Annotated[
    str | None, typer.Option(help="Folder or Hub repository of a pipeline; by default the bundled weights.")
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder or Hub repository of a pipeline; by default the bundled weights.")
]
Pattern = Annotated[str | None, typer.Option(help="Which files below a folder, such as '*/mr.nii.gz'.")]
Series = Annotated[str | None, typer.Option(help="UID of a DICOM series, where a folder holds several.")]
Scans = Annotated[Path | None, typer.Option(help="Folder of scans, as for load_dataset.")]
PhantomCases = Annotated[
    int | None, typer.Option(min=1, help="Instead of scans, so many simulated patients of each protocol.")
]
PhantomSize = Annotated[int, typer.Option(min=32, help="Pixels of a simulated slice's longer side.")]
Split = Annotated[str, typer.Option(help="Of the patients: train, validation or test.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of the sampler; by default the checkpoint's.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Slices at a time.")]
ComputeDtype = Annotated[Dtype, typer.Option(help="Compute in it.")]


def load_pipeline(model: str | None, device: str | None, dtype: Dtype):
    """The pipeline of a checkpoint, where and in what it is to compute."""
    import torch

    from . import SynerMedGenPipeline
    from .doctor import choose_device
    from .volumes.runs import this_process

    process = this_process()
    where = process.device if device is None and process.num_processes > 1 else choose_device(device)
    pipe = SynerMedGenPipeline.from_pretrained(
        model_source(model), dtype=getattr(torch, dtype.value), print_report=False
    )
    return pipe.to(where)


@app.command()
def info(
    model: ModelArgument = None,
    as_json: Json = False,
):
    """Say what a checkpoint can do and where it comes from, without loading its weights."""

    def describe():
        from .doctor import describe_checkpoint, info_text

        record = describe_checkpoint(model_source(model))
        return Report(info_text(record), record)

    run(describe, as_json=as_json)


@app.command()
def doctor(
    model: ModelArgument = None,
    device: Device = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Load the weights and synthesise one small slice.")
    ] = True,
    as_json: Json = False,
):
    """Look at the machine, the libraries and a checkpoint, try a synthesis, and say in plain words what to do."""

    def look():
        from .doctor import doctor_text, examine

        record = examine(model_source(model), device, self_test)
        return Report(doctor_text(record), record, exit_code=1 if record["problems"] else 0)

    run(look, as_json=as_json)


@app.command()
def synthesize(
    scans: Annotated[
        Path, typer.Argument(help="A volume (.nii.gz, .mha, .nrrd), a folder with a DICOM series, or a folder of many.")
    ],
    target: Annotated[list[str], typer.Option("--target", "-t", help="Modality to make; several times for several.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A file for one result, else a folder.")],
    source: Annotated[
        str | None, typer.Option(help="Modality of the scans; by default what DICOM says or the weights see.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="brain, pelvis or whole-body.")] = None,
    axis: Annotated[
        str | None, typer.Option(help="axial, coronal or sagittal slices; by default those of the training data.")
    ] = None,
    model: Model = None,
    pattern: Pattern = None,
    series: Series = None,
    mask: Annotated[Path | None, typer.Option(help="Volume that is above 0 in the body, for a single scan.")] = None,
    format: Annotated[
        str | None, typer.Option(help="nifti, mha, nrrd or dicom; by default that of the output, or the scan's own.")
    ] = None,
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="DICOM without a tag of its source; results are called by number.")
    ] = False,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="By the text.")] = None,
    image_guidance_scale: Annotated[float | None, typer.Option(min=0, help="By the source.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Mean and standard deviation of so many syntheses.")] = 1,
    overlap: Annotated[int, typer.Option(min=0, help="Blend each slice with so many neighbours to either side.")] = 0,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ComputeDtype = Dtype.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make again what is there.")] = False,
    as_json: Json = False,
):
    """Synthesise whole scans: calibrated volumes on exactly the input's grid, each with a record. Research use only.

    Interrupted, the same command goes on. On several GPUs: accelerate launch -m synermedgen_hf.cli synthesize ...
    """

    def make():
        from dataclasses import asdict

        from .volumes.folders import find_cases
        from .volumes.reading import extension
        from .volumes.runs import synthesize_cases, this_process

        # What is misspelt is said before the weights are read.
        find_cases(scans, pattern, leave_out=output.parent if extension(output) else output)
        outcomes = synthesize_cases(
            load_pipeline(model, device, dtype),
            scans,
            target,
            output,
            source=source,
            region=region,
            pattern=pattern,
            series_uid=series,
            mask=mask,
            file_format=format,
            deidentify=deidentify,
            overwrite=overwrite,
            batch_size=batch_size,
            axis=axis,
            seed=seed,
            num_samples=samples,
            overlap=overlap,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
        )
        if not this_process().is_main_process:  # the first one speaks for all
            return None
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        lines = [
            f"{sum(outcome.status == status for outcome in outcomes)} {words}"
            for status, words in (("made", "made"), ("kept", "there already"), ("failed", "failed"))
            if any(outcome.status == status for outcome in outcomes)
        ]
        text = f"{', '.join(lines)}: {output}" + "".join(
            f"\n{one.label} to {one.target}: {one.error}" for one in failed
        )
        return Report(text, {"output": str(output), "results": [asdict(one) for one in outcomes]}, 1 if failed else 0)

    run(make, as_json=as_json)


@app.command()
def identify(
    scans: Annotated[Path, typer.Argument(help="A picture, a volume, a folder with a DICOM series, or one of many.")],
    model: Model = None,
    pattern: Pattern = None,
    series: Series = None,
    region: Annotated[str | None, typer.Option(help="Of all scans; says along which axis they are cut.")] = None,
    device: Device = None,
    dtype: ComputeDtype = Dtype.float32,
    as_json: Json = False,
):
    """Name the modality of scans by their middle slice, and how sure the weights are."""

    def look():
        from .volumes.runs import identify_scans

        found = identify_scans(load_pipeline(model, device, dtype), scans, pattern, series, region)
        lines = [
            f"{one['case']}: {one['error']}"
            if "error" in one
            else f"{one['case']}: {one['modality']} ({one['probability']:.0%})"
            for one in found
        ]
        return Report("\n".join(lines), {"scans": found}, 1 if any("error" in one for one in found) else 0)

    run(look, as_json=as_json)


@app.command()
def convert_bagel(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder as downloaded: ema.safetensors, model.safetensors or shards; ae.safetensors, llm_config.json, "
            "vit_config.json, tokenizer files."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    base: Annotated[
        Path | None,
        typer.Option(help="A complete folder of the same kind; parts and files that SOURCE lacks are taken from it."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="File of model weights in SOURCE, where there are several.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Convert the model to it; the autoencoder keeps its own. By default, kept.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    vae_scale: Annotated[float, typer.Option(help="latent = scale * (z - shift)")] = 0.3611,
    vae_shift: Annotated[float, typer.Option(help="latent = scale * (z - shift)")] = 0.1159,
    timestep_shift: Annotated[float, typer.Option(help="Shift of the timesteps in training.")] = 1.0,
    sampling_shift: Annotated[float, typer.Option(help="Shift of the timesteps in sampling.")] = 3.0,
    trained_route: Annotated[
        list[str] | None,
        typer.Option(help="A route it was trained for, such as brain/MRI-CT; several times for several."),
    ] = None,
    trained_task: Annotated[
        list[str] | None, typer.Option(help="An understanding task it was trained on: CTS, MI or TIA.")
    ] = None,
    allow_missing: AllowMissing = None,
    allow_unexpected: AllowUnexpected = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
):
    """Convert a BAGEL-family checkpoint (BAGEL, UniMedVL, SynerMedGen training runs) to a pipeline of this package."""
    import torch

    from .bagel import convert_bagel

    run(
        convert_bagel,
        source,
        output,
        base=base,
        weights=weights,
        dtype=getattr(torch, dtype.value) if dtype else None,
        max_shard_size=max_shard_size,
        vae_scale=vae_scale,
        vae_shift=vae_shift,
        timestep_shift=timestep_shift,
        sampling_shift=sampling_shift,
        trained_routes=trained_route or (),
        trained_tasks=trained_task or (),
        allow_missing=allow_missing or (),
        allow_unexpected=allow_unexpected or (),
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command()
def export_bagel(
    source: Annotated[Path, typer.Argument(help="Folder of a pipeline.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    allow_missing: AllowMissing = None,
    allow_unexpected: AllowUnexpected = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
):
    """Write a pipeline in the original layout, byte for byte the inverse of convert-bagel."""
    from .bagel import export_bagel

    run(
        export_bagel,
        source,
        output,
        allow_missing=allow_missing or (),
        allow_unexpected=allow_unexpected or (),
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command()
def phantom(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    layout: Annotated[
        str,
        typer.Option(
            help="How to lay it out: synthrad2023-task1, synthrad2023-task2, synthrad2025-task1, synthrad2025-task2, "
            "brats2018, brats2019, brats2020, brats2021, brats2023, autopet, autopet-nnunet, myops2020, manifest, "
            "synermed."
        ),
    ] = "synthrad2023-task1",
    subjects: Annotated[int, typer.Option(min=1, help="Patients in all.")] = 4,
    seed: Annotated[int, typer.Option(help="Another one makes other patients.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Pixels of a slice's longer side.")] = 64,
    num_slices: Annotated[
        int | None, typer.Option(min=1, help="Slices of a volume; by default as the size asks.")
    ] = None,
    misregistration: Annotated[bool, typer.Option(help="Move modalities against one another by a little.")] = False,
    breathing: Annotated[bool, typer.Option(help="Lift the organs in PET against CT.")] = False,
    num_proc: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    as_json: Json = False,
):
    """Write simulated patients in the layout of a public data set, to try things on. Research use only."""

    def write():
        from .data.layouts import write_layout

        written = write_layout(
            layout,
            output,
            subjects,
            seed=seed,
            size=size,
            num_slices=num_slices,
            misregistration=misregistration,
            breathing=breathing,
            num_proc=num_proc,
        )
        return f"Wrote {written.cases} cases, {written.files} files, {written.bytes / 1e6:.1f} MB to {written.folder}"

    run(write, as_json=as_json)


@app.command()
def preview(
    data_dir: Annotated[Path, typer.Argument(help="Folder of scans, as for load_dataset.")],
    output: Annotated[Path, typer.Argument(help="Folder to write index.html, pictures and a data card to.")],
    config: Annotated[Questions, typer.Option(help="Which tasks.")] = Questions.understanding,
    rows: Annotated[int, typer.Option(min=1, help="Examples on the sheet.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    as_json: Json = False,
):
    """Write a sheet of understanding tasks for a person to check, and the data card of the set."""

    def write():
        from datasets import load_dataset
        from tqdm.auto import tqdm

        from .data.sheet import data_card, write_sheet

        def load(**options):
            return load_dataset("synermed", config.value, data_dir=str(data_dir), streaming=True, seed=seed, **options)

        # A few of each case, so that the sheet shows many patients.
        examples = []
        for stream in load(per_case=2).values():
            examples += list(stream.take(rows - len(examples))) if len(examples) < rows else []
        splits = {}

        def count():
            for split, stream in load().items():
                patients, number = set(), 0
                for row in tqdm(stream.decode(False), desc=split, unit="row"):
                    patients.add(f"{row['dataset']}/{row['patient_id']}")
                    number += 1
                    yield row
                splits[split] = {"patients": len(patients), "rows": number}

        page = write_sheet(examples, output, f"SynerMed {config.value}")
        (output / "README.md").write_text(data_card(data_dir.resolve().name, count(), splits))
        return f"Wrote {page} and {output / 'README.md'}"

    run(write, as_json=as_json)


@app.command()
def evaluate_understanding(
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write cases.jsonl (a line for each question) and summary.json to. A run that was "
            "interrupted goes on where it stopped."
        ),
    ],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of scans, or of the released SynerMed files, as for load_dataset.")
    ] = None,
    phantom_cases: PhantomCases = None,
    model: Model = None,
    config: Annotated[
        Questions, typer.Option(help="Which tasks; vqa are ordinary questions, a control.")
    ] = Questions.understanding,
    split: Split = "test",
    difficulty: Annotated[Difficulty, typer.Option(help="Of the candidates of CTS.")] = Difficulty.hard,
    label_images: Annotated[
        bool | None,
        typer.Option(
            help="Write before each image what the question calls it, or not; by default as the weights were trained."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions; a later run with more goes on from them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time; the answers do not depend on it.")] = 16,
    text: Annotated[
        bool, typer.Option("--text/--no-text", help="Let the model answer in its own words too, which takes longer.")
    ] = True,
    dtype: ComputeDtype = Dtype.float32,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    as_json: Json = False,
):
    """Score the understanding tasks on held-out patients: accuracy, confusion, calibration. Research use only."""

    def evaluate():
        if (data_dir is None) == (phantom_cases is None):
            raise ValueError("Pass either --data-dir or --phantom-cases.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("evaluate-understanding is for one process, and several would answer everything twice.")
        import torch
        from datasets import load_dataset_builder
        from tqdm.auto import tqdm
        from transformers import AutoConfig, AutoModel, AutoProcessor

        from .data.splits import write_whole
        from .data.synermed import TASKS
        from .hub import check_folder
        from .loading_synermedgen import PART_PATTERNS, part_of, weights_checksum
        from .metrics.runs import sole_user
        from .metrics.understanding import CASES, answer_questions, resume_cases, summarise, understanding_table

        scans = {"data_dir": str(data_dir)} if data_dir else {"phantom_cases": phantom_cases}
        source = model_source(model)
        check_folder(source, {"vae": None, "scheduler": None})  # they are not needed here
        parts = ("understanding", "vision")  # nor are the others
        told = AutoConfig.from_pretrained(source, subfolder="model")
        labels = told.label_images if label_images is None else label_images
        asked = {"seed": seed, "difficulty": difficulty.value, "label_images": labels}
        builder = load_dataset_builder("synermed", config.value, **asked, **scans)
        rows = builder.as_streaming_dataset(split=split)
        if builder.config.released:  # its questions are as they are
            if label_images is not None or difficulty != Difficulty.hard or seed != 0:
                raise ValueError(
                    f"{data_dir} holds questions, which are asked as they are: leave out --label-images, --difficulty "
                    "and --seed, which are for questions made of scans."
                )
            asked = dict.fromkeys(asked)
            if told.label_images:
                warning = "Warning: these weights were trained with labels before images, which these questions lack."
                typer.secho(warning, err=True, fg=typer.colors.YELLOW)

        if missing := [part for part in told.missing_parts if part in parts]:
            raise ValueError(f"{source} came without its {' and '.join(missing)} weights: it cannot answer questions.")
        if told.notice:
            typer.secho(told.notice, err=True)
        if unlearned := [task for task in TASKS[config.value] if task not in told.trained_tasks]:
            warning = f"Warning: these weights have not been trained on {', '.join(unlearned)}. Expect chance."
            typer.secho(warning, err=True, fg=typer.colors.YELLOW)
        allowed = PART_PATTERNS["generation"] if "generation" in told.missing_parts else ()
        options = {"dtype": getattr(torch, dtype.value), "allow_missing": allowed, "print_report": False}
        weights = AutoModel.from_pretrained(source, subfolder="model", **options).eval()
        processor = AutoProcessor.from_pretrained(source, subfolder="processor")

        asking = [name for name in weights.state_dict() if part_of(name) in parts]
        arguments = {
            **scans,
            "config": config.value,
            "split": split,
            **asked,
            "text": text,
            "dtype": dtype.value,
            "model": str(source),
            # The same names may come to stand for something else.
            "checksum of the weights": weights_checksum(weights, asking),
            "state of the data": f"{builder.config_id}-{builder.hash[:16]}",
        }
        output.mkdir(parents=True, exist_ok=True)
        with sole_user(output):
            records = resume_cases(output, arguments)
            if limit is not None and len(records) > limit:
                raise ValueError(f"{output} holds {len(records)} answers already, more than --limit {limit}.")
            rows = rows.skip(len(records)) if limit is None else rows.take(limit).skip(len(records))
            weights.to("cuda" if torch.cuda.is_available() else "cpu")
            answers = answer_questions(weights, processor, rows, batch_size, generate=text)
            with open(output / CASES, "a", encoding="utf-8") as cases:
                for record in tqdm(answers, desc=split, unit="question", initial=len(records), total=limit):
                    cases.write(json.dumps(record) + "\n")
                    cases.flush()
                    records.append(record)
            if not records:
                raise ValueError(f"There are no questions of {config.value} in the split {split}.")
            summary = summarise(records)
            write_whole(output / "summary.json", json.dumps({"arguments": arguments, **summary}, indent=2) + "\n")
        said = f"{understanding_table(summary)}\n\nWrote {output / CASES} and {output / 'summary.json'}"
        return Report(said, {"arguments": arguments, **summary})

    run(evaluate, as_json=as_json)


@app.command()
def evaluate(
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write cases.jsonl, summary.json, report.html and model-index.yml to. A run that was "
            "interrupted goes on where it stopped. cases.jsonl names cases as the data set does, for bare folders by "
            "the folder's name; besides it, only the path of --data-dir is kept."
        ),
    ],
    data_dir: Scans = None,
    phantom_cases: PhantomCases = None,
    model: Model = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="copy|mapping|ceiling|FOLDER",
            help="Instead of the model: the source as it is, a table of intensities fitted on training patients, the "
            "true target through the autoencoder, or a network that examples/train_baseline.py trained.",
        ),
    ] = None,
    routes: Annotated[
        list[str] | None,
        typer.Option(help="A route, such as MRI-CT or brain/MRI-CT; several times for several. By default all."),
    ] = None,
    split: Split = "test",
    slice_step: Annotated[int, typer.Option(min=1, help="Every so many slices of a case.")] = 1,
    phantom_slices: Annotated[
        int | None, typer.Option(min=1, help="Axial slices of a simulated patient; by default the whole region.")
    ] = None,
    phantom_size: PhantomSize = 128,
    phantom_scanner: Annotated[
        Scanner, typer.Option(help="Of simulated patients: usual, or unseen, machines outside of the training's range.")
    ] = Scanner.usual,
    level: Annotated[
        Level,
        typer.Option(help="Judge the slices that show enough of the patient, in 2D, or volumes of all slices, in 3D."),
    ] = Level.slice,
    protocol: Annotated[
        str,
        typer.Option(
            help="What is compared, where and on which scale: synthrad2023, synthrad2025, paper_frame, or brats (MR "
            "volumes)."
        ),
    ] = "synthrad2023",
    samples: Annotated[int, typer.Option(min=1, help="Mean of so many syntheses.")] = 1,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="By the text; by default the checkpoint's.")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(min=0, help="By the source; by default the checkpoint's.")
    ] = None,
    timestep_shift: Annotated[float | None, typer.Option(help="By default the scheduler's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Slices at a time, within a case and route.")] = 8,
    dtype: ComputeDtype = Dtype.float32,
    seed: Annotated[int, typer.Option(help="Another one draws other noise for every case.")] = 0,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Another evaluation to print beside, such as a baseline's.")
    ] = None,
    untrained_routes: Annotated[
        bool, typer.Option("--untrained-routes", help="Judge routes too that the model was not trained for.")
    ] = False,
    as_json: Json = False,
):
    """Synthesise and judge every route of held-out patients. On several GPUs: accelerate launch -m synermedgen_hf.cli.

    Research use only.
    """

    def judge():
        from .metrics.evaluation import evaluate

        text = evaluate(
            output,
            data_dir=data_dir,
            phantom_cases=phantom_cases,
            model=model,
            baseline=baseline,
            routes=routes or (),
            split=split,
            slice_step=slice_step,
            phantom_slices=phantom_slices,
            phantom_size=phantom_size,
            phantom_scanner=phantom_scanner.value,
            level=level.value,
            protocol=protocol,
            samples=samples,
            num_inference_steps=steps,
            guidance_scale=guidance,
            image_guidance_scale=image_guidance,
            timestep_shift=timestep_shift,
            batch_size=batch_size,
            dtype=dtype.value,
            seed=seed,
            beside=beside or (),
            untrained_routes=untrained_routes,
        )
        if text is None:  # the first process speaks for all
            return None
        return Report(text, json.loads((output / "summary.json").read_text(encoding="utf-8")))

    run(judge, as_json=as_json)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder that `synermedgen evaluate` wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same cases under the same protocol.")],
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    as_json: Json = False,
):
    """Test whether two evaluations differ, paired by patient: Wilcoxon's signed-rank test, corrected for all routes.

    Differences are first minus second. With five patients or fewer no difference can be told from chance.
    """

    def work():
        from .metrics.comparison import compare, comparison_table, write_comparison

        found = compare(first, second)
        if output is not None:
            write_comparison(output, found)
        return Report(comparison_table(found), found)

    run(work, as_json=as_json)


@app.command()
def vae_ceiling(
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write cases.jsonl (a line for each case and modality) and summary.json to. A run that was "
            "interrupted goes on where it stopped."
        ),
    ],
    data_dir: Scans = None,
    phantom_cases: PhantomCases = None,
    phantom_slices: Annotated[int, typer.Option(min=1, help="Of each simulated patient.")] = 8,
    phantom_size: PhantomSize = 128,
    model: Model = None,
    codec: Annotated[
        Codec | None,
        typer.Option(help="Of the three channels; by default the one that the checkpoint was trained with."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Of the comparison: synthrad2023, synthrad2025, paper_frame.")
    ] = "synthrad2023",
    slice_step: Annotated[int, typer.Option(min=1, help="Every so many slices.")] = 1,
    batch_size: BatchSize = 8,
    dtype: ComputeDtype = Dtype.float32,
    device: Device = None,
    as_json: Json = False,
):
    """Measure the error that no training can remove: true targets through codec and autoencoder and back."""

    def measure():
        import torch

        from .metrics.ceiling import ceiling_table, measure_ceiling

        summary = measure_ceiling(
            output,
            model_source(model),
            data_dir=data_dir,
            phantom_cases=phantom_cases,
            phantom_slices=phantom_slices,
            phantom_size=phantom_size,
            codec=codec and codec.value,
            protocol=protocol,
            slice_step=slice_step,
            batch_size=batch_size,
            dtype=getattr(torch, dtype.value),
            device=device,
        )
        said = [ceiling_table(summary["modalities"])]
        said += [f"Left out: {one['case']}. {one['reason']}" for one in summary["skipped"]]
        return Report("\n\n".join([*said, f"Wrote {output / 'cases.jsonl'} and {output / 'summary.json'}"]), summary)

    run(measure, as_json=as_json)


@app.command()
def import_recipe(
    file: Annotated[Path, typer.Argument(help="YAML mixture of the original training code.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of SynerMed.parquet, SynerMed.jsonl and slice/; by default the file's.")
    ] = None,
    as_json: Json = False,
):
    """Print the load_dataset calls that match a training mixture of the original code."""
    from .data.recipes import import_recipe

    run(import_recipe, file, data_dir, as_json=as_json)


if __name__ == "__main__":
    app()
