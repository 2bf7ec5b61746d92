"""The Space: SynerMedGen in a browser, for anybody. Research use only.

    python spaces/synermedgen/app.py                                        # the bundled demonstration weights
    SYNERMEDGEN_CHECKPOINT=you/synermedgen-7b python spaces/synermedgen/app.py

One model serves all visitors, one request at a time, in the order they came. The app holds no logic of its own: the
package reads, checks, synthesises and writes; this file lays out the page, and `viewer.py` paints slices.

Uploads are hostile and private. A file is checked by `synermedgen_hf.volumes.uploads`, read once, and never named in a
message or a log; what a visitor looks at is kept in memory until the tab closes; files of the page are gone after
fifteen minutes.
"""

import atexit
import html
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from string import ascii_uppercase

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "GRADIO_TEMP_DIR" not in os.environ:  # uploads and pictures of this run of the app alone, gone with it
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="synermedgen-space-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

import gradio as gr
import numpy as np
import pydicom
import torch
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from viewer import Result, Results, in_plane, layer_of, pair, picture, table

from synermedgen_hf import MODALITIES, SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.data.sources import MIN_SHARED_EXTENT, load_case, read_manifest
from synermedgen_hf.data.understanding import TaskSampler
from synermedgen_hf.image_processing_synermedgen import to_display
from synermedgen_hf.processing_synermedgen import MODALITY_NAMES, REGION_NAMES
from synermedgen_hf.volumes.reading import check_finite, resample, same_grid, shared_extent, slices_of
from synermedgen_hf.volumes.synthesis import checksums, default_axis, synthesize_volume, write_synthesis
from synermedgen_hf.volumes.understanding import region_axis, understanding_slice
from synermedgen_hf.volumes.uploads import Upload, UploadLimits, free_memory, read_upload, unpacked
from synermedgen_hf.volumes.writing import write_dicom_series

# Its warnings repeat what a header holds, and they end up in the log.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

HERE = Path(__file__).parent
SURE = 0.5  # how likely a modality must be to be taken for granted; below, the visitor is asked
KEPT_SECONDS = 900  # files of the page: uploads, pictures, downloads
MAX_SEED = 2**32 - 1
MAX_EVALUATIONS = 200_000  # of the model in one run: slices x steps x seeds x targets
MAX_ASKED = 8  # scans of one question
MAX_QUESTION = 1000  # letters
TASK_NAMES = {"CTS": "which slices belong together", "MI": "naming a modality", "TIA": "describing a change"}
WITHOUT = {
    "CTS": "in the quiz you play alone",
    "MI": "no modality is named",
    "TIA": "what it says of a change is a guess",
}
# What several scans are called where training wrote names before them, by what is asked.
LABELS = {
    "A, B, C … (which of them is it?)": list(ascii_uppercase),
    "1, 2 … (what changed from one to the other?)": [str(number) for number in range(1, MAX_ASKED + 1)],
    "1, then A, B, C … (which one belongs to the first?)": ["1", *ascii_uppercase],
}
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
AT_ONCE = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
# Values as the browser sends them: what a page shows may be older than what has just been offered to it, and gradio
# would refuse a choice that is no longer offered.
AS_SENT = {"preprocess": False}


def load_pipeline() -> SynerMedGenPipeline:
    """The checkpoint that SYNERMEDGEN_CHECKPOINT names, or the bundled weights; on a GPU where there is one."""
    pipe = SynerMedGenPipeline.from_pretrained(
        os.environ.get("SYNERMEDGEN_CHECKPOINT") or checkpoint_path(),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def uploaded_only(file: gr.File):
    """
    Make it take what was uploaded to this page. Else gradio would also fetch addresses, past all limits, and take
    folders, which its clearing away stumbles over.
    """
    move = file.async_move_resource_to_block_cache

    async def checked(path):
        if "://" in str(path) or Path(path).is_dir():
            raise gr.Error("Upload the file itself: addresses and folders are not taken.", print_exception=False)
        return await move(path) if Path(path).exists() else str(path)  # `check_kept` says what has become of it

    file.async_move_resource_to_block_cache = checked


def whole_file(picture: Image.Image) -> str:
    """
    A picture in gradio's cache, whole from the moment it is there. gradio moves files in whole, but a picture it writes
    in place, anew each time it is shown: a page that fetches it just then gets a part of it, and does not ask twice.
    """
    with tempfile.TemporaryDirectory() as apart:
        picture.save(Path(apart) / "image.png")
        return save_file_to_cache(Path(apart) / "image.png", cache_dir=get_upload_folder())


def clear_away(folder: Path, kept: set[Path], seconds: float):
    """
    Delete files older than that, but for those to be kept. gradio clears away what it has handed on; uploads that were
    broken off, and what a failed request left, it does not know of.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for path in {Path(place) / name for name in names} - kept:
            with suppress(OSError):  # gone meanwhile
                told = path.stat()
                if time.time() - max(told.st_mtime, told.st_ctime) > seconds:
                    path.unlink()
        with suppress(OSError):  # gone, or not empty
            if Path(place) != folder and time.time() - Path(place).stat().st_mtime > seconds:
                Path(place).rmdir()


def keep_clear(folder: Path):
    """[`clear_away`] once a minute, from now on; what lies there now belongs to the page."""
    kept = {path for path in folder.rglob("*") if path.is_file()}

    def work():
        while True:
            time.sleep(60)
            clear_away(folder, kept, KEPT_SECONDS)

    threading.Thread(target=work, daemon=True).start()


class Stopped(Exception):
    """The visitor cancelled, or closed the page."""


class Work:
    """
    Long work in a thread of its own, so that a visitor who leaves can stop it between two steps of the model. Work that
    was stopped may still be in such a step: the next one begins when it is over, one after the other.

    Args:
        work (`Callable`): Called with two functions: `report(done, total)`, and one for the pipeline's
            `callback_on_step_end`. Either raises [`Stopped`] once nobody waits any more.
    """

    one_at_a_time = threading.Lock()

    def __init__(self, work):
        self.stop, self.done, self.total, self.result, self.error = threading.Event(), 0, 0, None, None
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)

    def _run(self, work):
        try:
            with self.one_at_a_time:
                self._report(0, 0)  # stopped while it waited?
                self.result = work(self._report, self._step)
        except BaseException as error:  # raised again where the visitor is
            self.error = error

    def _report(self, done: int, total: int):
        self.done, self.total = done, total
        if self.stop.is_set():
            raise Stopped

    def _step(self, pipe, step, timestep, tensors):
        if self.stop.is_set():
            raise Stopped
        return tensors

    def __iter__(self):
        self.thread.start()
        try:
            while self.thread.is_alive():
                self.thread.join(0.25)
                yield self.done, self.total
        finally:  # also when the page is closed or the run cancelled: gradio closes the iterator, and must not wait
            self.stop.set()
        if self.error is not None:
            raise self.error


@contextmanager
def mistakes_told():
    """What is wrong is said in the package's own words; of an `OSError`, which names visitors' files, only the kind."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        text = "The scan needs more memory than this machine has. Crop or resample it, or choose fewer targets."
    except OSError as error:
        text = error.strerror or type(error).__name__
    except (ValueError, ImportError) as error:
        text = str(error)
    raise gr.Error(html.escape(text), duration=None, print_exception=False, title="That did not work")


def status(text: str, share: float | None = None) -> str:
    bar = "" if share is None else f"<div class=bar><div style='width:{100 * share:.0f}%'></div></div>"
    return f"<div class=status role=status>{text}{bar}</div>"


def time_left(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class App:
    """
    The page around one pipeline.

    Args:
        pipe ([`SynerMedGenPipeline`]): The model of all visitors.
        limits ([`UploadLimits`], *optional*): What an upload may hold.
    """

    def __init__(self, pipe: SynerMedGenPipeline, limits: UploadLimits | None = None):
        self.pipe, self.config, self.weights = pipe, pipe.model.config, checksums(pipe)
        self.codec = pipe.processor.image_processor
        self.limits = limits or UploadLimits()
        self.results = Results(max_bytes=free_memory() // 4)
        self.cases = read_manifest(HERE / "examples" / "manifest.csv")[0]
        self.quiz = TaskSampler(len(self.cases), lambda number: load_case(self.cases[number]), tasks=("CTS",))
        self.quiz_lock = threading.Lock()  # asking does not wait for the model, answering does: two threads

    # ---- what the checkpoint can do ----

    @property
    def routes(self) -> list[tuple[str, str, str]]:
        """Region, source, target. All are offered where a checkpoint does not say what it was trained for."""
        named = [name.rpartition("/") for name in self.config.trained_routes]
        trained = [(region, *pair.split("-")) for region, _, pair in named]
        return trained or [(None, a, b) for a in MODALITIES for b in MODALITIES if a != b]

    def sources(self) -> list[str]:
        known = {source for _, source, _ in self.routes}
        return [name for name in MODALITIES if name in known]

    def regions(self) -> list[str]:
        return list(dict.fromkeys(region for region, _, _ in self.routes if region))

    def targets(self, source: str | None, region: str | None) -> list[str]:
        known = {b for where, a, b in self.routes if a == source and (not region or where == region)}
        return [name for name in MODALITIES if name in known]

    def learned(self, task: str) -> bool:
        return task in self.config.trained_tasks

    def missing_lesson(self) -> str:
        """Says plainly what the checkpoint has not been taught; empty if it has been taught everything."""
        missing = [name for task, name in TASK_NAMES.items() if not self.learned(task)]
        if not missing:
            return ""
        if len(missing) == len(TASK_NAMES):
            return (
                "This checkpoint has not been trained on the understanding tasks: it synthesises, but it names no "
                "modality and answers no question. These buttons are switched off; in the quiz you play alone."
            )
        without = "; ".join(WITHOUT[task] for task in TASK_NAMES if not self.learned(task))
        return f"This checkpoint has not been trained on {', '.join(missing)}: {without}."

    # ---- a scan comes in ----

    def read(self, scan: str | None) -> Upload:
        if not scan:
            raise ValueError("Choose a scan first: upload one or take an example.")
        self.check_kept(scan)
        return read_upload(scan, self.limits)

    def check_kept(self, scan: str):
        if not Path(scan).exists():
            raise ValueError(f"This upload is no longer kept after {KEPT_SECONDS // 60} minutes: send it again.")

    def picture_of(self, upload: Upload, region: str | None) -> Image.Image:
        """The slice that the model looks at to understand a scan."""
        window = None if upload.white is None else (0, upload.white)
        return understanding_slice(upload.volume, region_axis(upload.volume, region or None), window)

    def recognise(self, upload: Upload, region: str | None) -> tuple[str | None, dict[str, float]]:
        """What a scan is, by its file or by the model where that is sure, and the model's probabilities."""
        stated = upload.volume.modality
        if not self.learned("MI"):
            return stated, {}
        found = self.pipe.identify(self.picture_of(upload, region))
        sure = found["modality"] if found["probability"] >= SURE else None
        return stated or sure, found["probabilities"]

    def look_at(self, scan: str | None, source: str | None, region: str | None):
        """The slice that is looked at, what is seen, and `(scan, modality)` as far as anybody can tell."""
        if not scan:
            return None, "<p class=seen>Nothing uploaded yet.</p>", (None, None)
        with mistakes_told():
            upload = self.read(scan)
            preview = self.picture_of(upload, region)
            recognised, probabilities = self.recognise(upload, region)
        stated = upload.volume.modality
        size = " × ".join(str(side) for side in upload.volume.array.shape) if upload.white is None else "one slice"
        lines = [f"{upload.format}, {size}"]
        if stated:
            lines.append(f"the file says {MODALITY_NAMES.get(stated, stated)}")
        if probabilities:
            best = max(probabilities, key=probabilities.get)
            lines.append(f"the model sees {MODALITY_NAMES[best]} ({probabilities[best]:.0%} sure)")
        if not source and not stated and not probabilities:
            lines.append("say below what it is: this checkpoint has not learned to tell")
        recognised = recognised if recognised in self.sources() else None
        return whole_file(preview), f"<p class=seen>{'; '.join(map(html.escape, lines))}.</p>", (scan, recognised)

    def settle(self, scan: dict | None, source: str | None, region: str | None, targets: list[str], found: tuple):
        """A source that is not known is what was found; what is known, or was chosen meanwhile, stays."""
        source = source or (found[1] if scan and found[0] == scan["path"] else None)
        return source, self.offer(source, region, targets)

    def forget_the_scan(self):
        """
        Of another scan nothing is known: neither source, region, reference and its modality, nor whether its patient's
        tags may be kept; and what was seen was the one before.
        """
        return None, "", None, "", False, None, "", (None, None)

    def offer(self, source: str | None, region: str | None, wanted: list[str]):
        """The targets that this checkpoint was trained for; those of `wanted` among them are chosen, or the first."""
        choices = self.targets(source, region)
        named = [(MODALITY_NAMES[name], name) for name in choices]
        told = (
            "" if choices or source is None else f"This checkpoint makes nothing from {MODALITY_NAMES[source]} there."
        )
        told = told or ("" if choices else "Say first which modality the scan is.")
        return gr.CheckboxGroup(
            choices=named,
            value=[name for name in choices if name in wanted] or choices[:1],
            info=told or "Several at once if you like.",
        )

    def take_example(self, event: gr.SelectData):
        """An example, with what is known of it."""
        case = self.cases[event.index]
        source, target = list(case.files)[:2]
        if (case.region, source, target) not in [route for route in self.routes]:
            source, target = target, source
        offered = self.offer(source, case.region, [target])
        return case.files[source], source, case.region, case.files[target], target, offered

    # ---- synthesis ----

    def make(self, scan, targets, source, region, steps, guidance, image_guidance, seed, samples, reference=None):
        """Everything is checked, then target after target is made. Yields `(share done, text)`, last the result."""
        begin = time.monotonic()
        targets = list(dict.fromkeys(targets or []))
        if not targets or None in targets:
            raise ValueError("Choose at least one target.")
        if None in (steps, guidance, image_guidance, samples):
            raise ValueError("Steps, guidance and the number of seeds are numbers: leave none of them empty.")
        if seed is None or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"The seed is a whole number from 0 to {MAX_SEED}.")
        upload = None
        if not source:
            upload = self.read(scan)
            source, _ = self.recognise(upload, region)
            if not source:
                raise ValueError("Say which modality the scan is: neither its file nor this checkpoint can tell.")
        for target in targets:
            self.pipe.check_route([source], target, region or None)
        upload = upload or self.read(scan)
        volume = upload.in_scanner_units(source, self.codec)
        arguments = {"source": source, "region": region or None, "seed": int(seed), "num_samples": int(samples)}
        arguments |= {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        arguments |= {"image_guidance_scale": float(image_guidance), "progress": False, "weights": self.weights}
        if upload.white is not None:  # a picture is one axial slice, whatever the target
            arguments["axis"] = "axial"
        axes = [arguments.get("axis") or default_axis([source], target, region or None) for target in targets]
        slices = sum(len(slices_of(volume, axis)) for axis in axes)
        if (asked := slices * int(steps) * int(samples)) > MAX_EVALUATIONS:
            raise ValueError(
                f"{slices} slices x {int(steps)} steps x {int(samples)} seeds are {asked:,} evaluations of the model; "
                f"{MAX_EVALUATIONS:,} are done in one run. Choose fewer steps, seeds or targets, or run the package."
            )
        measured = None
        if reference is not None:
            path, modality = reference
            measured = self.read(path).in_scanner_units(modality, self.codec)
            check_finite(measured, "the reference")
            if not same_grid(measured, volume):
                if (shared := shared_extent(measured, volume)) < MIN_SHARED_EXTENT:
                    raise ValueError(
                        f"The reference shares {shared:.0%} of its extent with the scan: it has to show the same place "
                        "of the same patient."
                    )
                gr.Warning("The reference lies on another grid and was resampled onto the scan's.")
                measured = resample(measured, volume, self.codec.intensity[modality]["low"])
        syntheses = {}
        for number, target in enumerate(targets):
            work = Work(
                lambda report, step, target=target: synthesize_volume(
                    self.pipe, volume, target, callback=report, callback_on_step_end=step, **arguments
                )
            )
            for done, total in work:
                share = (number + (done / total if total else 0)) / len(targets)
                passed = time.monotonic() - begin
                left = f", about {time_left(passed / share - passed)} left" if share > 0.05 else ""
                of = f"slice {done} of {total}" if total else "reading the scan"
                yield share, f"{MODALITY_NAMES[target]}: {of}{left}"
            syntheses[target] = work.result
            for warning in work.result.record["warnings"]:
                gr.Warning(html.escape(warning))
        axis = next(iter(syntheses.values())).record["axis"]
        result = Result(
            source=layer_of(source, source, volume, axis, self.codec),
            spacing=in_plane(volume, axis),
            upload=scan,
            syntheses=syntheses,
        )
        for target, synthesis in syntheses.items():
            title = f"Synthetic {target}"
            result.made[target] = layer_of(title, target, synthesis.volume, axis, self.codec)
            if synthesis.std is not None:
                result.spread[target] = layer_of("Spread over seeds", target, synthesis.std, axis, self.codec)
        if measured is not None:
            result.reference = layer_of(f"Reference {modality}", modality, measured, axis, self.codec)
        yield 1.0, result

    def run(
        self,
        scan,
        targets,
        source,
        region,
        steps,
        guidance,
        image_guidance,
        seed,
        samples,
        reference,
        reference_target,
        request: gr.Request,
    ):
        """The button of the page: progress, then the result is there to be looked at."""
        begin = time.monotonic()
        measured = (reference, reference_target or (targets or [None])[0]) if reference else None
        work = self.make(
            scan, targets, source, region, steps, guidance, image_guidance, seed, samples, reference=measured
        )
        try:
            yield status("Checking the scan", 0.0)
            with mistakes_told():
                for share, told in work:
                    if isinstance(told, Result):
                        self.results.put(request.session_hash, told)
                    else:
                        yield status(html.escape(told), share)
        except Exception:
            yield status("That did not work.")
            raise
        finally:
            work.close()
        yield status(f"Done in {time_left(time.monotonic() - begin)}.")

    # ---- looking ----

    def result_of(self, request: gr.Request) -> Result:
        result = self.results.get(request.session_hash)
        if result is None:
            raise gr.Error("This result is no longer kept. Synthesise it again.", print_exception=False)
        return result

    def show(self, request: gr.Request):
        """A new result: the first target, the middle slice, the usual windows; no file of the one before."""
        result = self.result_of(request)
        target = next(iter(result.made))
        last = len(result.source.slices) - 1
        return (
            gr.Radio(choices=[(MODALITY_NAMES[name], name) for name in result.made], value=target),
            gr.Slider(maximum=max(last, 1), value=last // 2, interactive=last > 0),
            gr.Column(visible=True),
            gr.HTML(visible=False),
            None,
        )

    def choose(self, target: str, request: gr.Request):
        """Another target: its views and windows."""
        result = self.result_of(request)
        target, _ = result.nearest(target)
        made, source, views = result.made[target], result.source, result.views(target)
        return (
            gr.Radio(choices=views, value=views[0]),
            gr.Dropdown(
                choices=list(source.windows), value=source.usual_window, label=f"Window of the {source.modality}"
            ),
            gr.Dropdown(choices=list(made.windows), value=made.usual_window, label=f"Window of the synthetic {target}"),
        )

    def paint(self, target, view, index, source_window, target_window, request: gr.Request):
        """The slice under the slider, and its values."""
        result = self.result_of(request)
        target, index = result.nearest(target, index)
        view = view if view in result.views(target) else result.views(target)[0]
        pictures = pair(result, target, view, index, source_window, target_window)
        return tuple(map(whole_file, pictures)), table(result, target, index)

    def point(self, target, index, event: gr.EventData, request: gr.Request):
        """Values under the pointer."""
        result = self.results.get(request.session_hash)
        if result is None:
            return gr.skip()
        x, y = (min(max(float(share), 0.0), 1.0) for share in event._data["at"])
        return table(result, *result.nearest(target, index), (x, y))

    def forget(self, request: gr.Request):
        self.results.drop(request.session_hash)

    # ---- taking away ----

    def write(self, form, target, index, keep_tags, request: gr.Request):
        """Files of what is looked at, each with its side-car; none carries a tag of the patient unless asked."""
        result = self.result_of(request)
        with mistakes_told():
            return self.files(result, form, *result.nearest(target, index), bool(keep_tags))

    def write_picture(self, form, target, index, keep_tags, request: gr.Request):
        """Another slice: only the file of a single slice has to be written again."""
        return self.write(form, target, index, keep_tags, request) if form == "PNG of this slice" else gr.skip()

    def files(self, result: Result, form: str, target: str, index: int, keep_tags: bool = False) -> list[str]:
        # In the folder that gradio serves from and clears away, under a name that nobody can guess.
        folder = Path(get_upload_folder()) / secrets.token_hex(20)
        folder.mkdir(parents=True)
        try:
            return self.write_files(folder, result, form, target, index, keep_tags)
        except BaseException:
            shutil.rmtree(folder)
            raise

    def write_files(self, folder: Path, result: Result, form: str, target: str, index: int, keep_tags: bool):
        synthesis, name = result.syntheses[target], f"synthetic_{target.lower()}"
        sidecar = folder / f"{name}.json"
        if form == "NIfTI":
            write_synthesis(synthesis, folder / f"{name}.nii.gz")
        elif form == "MetaImage":
            write_synthesis(synthesis, folder / f"{name}.mha")
        elif form == "PNG of this slice":
            made = result.made[target]
            low, high = made.window
            levels = np.clip((made.slices[index] - low) / (high - low), 0, 1) * 65535
            Image.fromarray(np.rint(levels).astype(np.uint16)).save(folder / f"{name}_slice{index:03d}.png")
            levels = {"slice": index, "black": low, "white": high, "levels": 65535, "unit": made.unit}
            sidecar.write_text(json.dumps({**synthesis.record, "png": levels}, indent=2) + "\n")
        else:
            self.check_kept(result.upload)
            with unpacked(result.upload, self.limits) as (series, format):
                if format != "DICOM":
                    raise ValueError(
                        "A derived DICOM series needs the DICOM series it is derived from: upload it as a zip."
                    )
                write_dicom_series(synthesis.volume, folder / name, source_series=series, deidentify=not keep_tags)
            shutil.make_archive(str(folder / name), "zip", folder / name)
            shutil.rmtree(folder / name)
            sidecar.write_text(json.dumps(synthesis.record, indent=2) + "\n")
        return [str(path) for path in sorted(folder.iterdir(), reverse=True)]

    # ---- understanding ----

    def name_modality(self, scan: str | None, region: str | None = None) -> dict[str, float]:
        """Probability of each modality for the middle slice of a scan, cut as scans of the region are."""
        with mistakes_told():
            probabilities = self.pipe.identify(self.picture_of(self.read(scan), region))["probabilities"]
        return {MODALITY_NAMES[name]: share for name, share in probabilities.items()}

    def answer(
        self, scans: list[str] | None, question: str, region: str | None = None, labels: str | None = None
    ) -> str:
        """
        The model's answer to a question about one or several scans of a region, the middle slice of each. `labels` says
        what the question calls several scans; only weights that were trained with such names see them.
        """
        with mistakes_told():
            question = (question or "").strip()
            if not question:
                raise ValueError("Ask a question first.")
            if len(question) > MAX_QUESTION:
                raise ValueError(f"The question has {len(question):,} letters; at most {MAX_QUESTION:,} are taken.")
            if not scans:
                raise ValueError("Add at least one scan to ask about.")
            if len(scans) > MAX_ASKED:
                raise ValueError(f"These are {len(scans)} scans; at most {MAX_ASKED} are taken in one question.")
            names = None
            if self.config.label_images and len(scans) > 1:
                names = LABELS[labels or next(iter(LABELS))][: len(scans)]
            pictures = [self.picture_of(self.read(scan), region) for scan in scans]
            return self.pipe.answer(pictures, question, labels=names)

    def quiz_row(self, index: int) -> dict | None:
        with self.quiz_lock:
            return self.quiz[index]

    def ask(self, score: dict):
        """A new question of the quiz."""
        row = None
        while row is None:
            index = random.randrange(len(self.quiz))
            row = self.quiz_row(index)
        reference, *candidates = row["images"]
        source, target = (MODALITY_NAMES[name] for name in row["route"].split("/")[1].split("-"))
        labelled = [(whole_file(image), letter) for image, letter in zip(candidates, row["options"], strict=True)]
        told = (
            f"<p>The first picture is a slice of a {source}. Which of the four {target} slices is the same place?</p>"
        )
        return {**score, "index": index}, whole_file(reference), labelled, gr.Radio(value=None, interactive=True), told

    def check(self, score: dict, choice: str | None):
        """The truth, the visitor's choice and, where it has learned to choose, the model's."""
        if choice is None or score["index"] is None:
            return score, gr.skip(), gr.skip()
        row = self.quiz_row(score["index"])
        right = row["answer"]
        score = {**score, "index": None, "asked": score["asked"] + 1, "you": score["you"] + (choice == right)}
        told = [f"It is <b>{right}</b>. You chose {choice}" + (", which is right." if choice == right else ".")]
        if self.learned("CTS"):
            labels = ["1", *row["options"]] if self.config.label_images else None  # as in training
            scores = self.pipe.score_answers(row["images"], row["question"], row["options"], labels).softmax(0)
            guess = row["options"][int(scores.argmax())]
            score["model"] += guess == right
            told.append(f"The model chose {guess} ({float(scores.max()):.0%} sure).")
            told.append(f"You {score['you']}, the model {score['model']}, of {score['asked']}.")
        else:
            told.append(f"You have {score['you']} of {score['asked']}. The model has not been trained to play.")
        return score, f"<p>{' '.join(told)}</p>", gr.Radio(interactive=False)

    # ---- for programs ----

    def synthesize(self, scan, target, source, region, steps, guidance, image_guidance, seed, samples):
        """
        Synthesise one target from a scan: a picture of the middle slice over the target's window, the volume as NIfTI
        on the grid of the scan, and the record of how it was made. Without a source, the scan is what its file says or
        what the model is sure to see.
        """
        work = self.make(scan, [target], source, region, steps, guidance, image_guidance, seed, samples)
        try:
            with mistakes_told():
                for _, told in work:
                    if isinstance(told, Result):
                        made = told.made[target]
                        middle = (len(made.slices) - 1) // 2
                        volume = self.files(told, "NIfTI", target, middle)
                        nifti = next(path for path in volume if path.endswith(".nii.gz"))
                        for other in set(volume) - {nifti}:  # gradio clears away what it was given, no more
                            Path(other).unlink()
                        shown = to_display(made.slices[middle], made.window, told.spacing)
                        yield shown, nifti, told.syntheses[target].record
                    else:  # nothing new, but a place where a caller who left can be noticed
                        yield gr.skip(), gr.skip(), gr.skip()
        finally:
            work.close()

    # ---- the page ----

    def build(self) -> gr.Blocks:
        """Lays out the page and ties it to the methods above."""
        config, sampling = self.config, self.config.sampling
        name = Path(os.environ.get("SYNERMEDGEN_CHECKPOINT") or checkpoint_path()).name
        millions = sum(parameter.numel() for parameter in self.pipe.model.parameters()) / 1e6
        notice = f"Research use only, not for clinical use. {config.notice or ''}"
        device = str(self.pipe.device).upper()
        modalities = [(MODALITY_NAMES[each], each) for each in self.sources()]
        regions = [("not said", ""), *((REGION_NAMES.get(each, each), each) for each in self.regions())]
        routes = f"{len(config.trained_routes)} routes" if config.trained_routes else "routes not stated"
        lesson = self.missing_lesson()

        with gr.Blocks(title="SynerMedGen", delete_cache=(60, KEPT_SECONDS), analytics_enabled=False) as demo:
            gr.HTML(
                f"<header><h1>SynerMedGen</h1><p>One medical scan in, the same anatomy in another modality out.</p>"
                f"<p class=model>{html.escape(name)} · {millions:,.1f} M parameters · {routes} · {device}</p></header>"
            )
            with gr.Tabs():
                with gr.Tab("Synthesise", id="synthesise"):
                    self._build_synthesis(modalities, regions, sampling)
                with gr.Tab("Understand", id="understand"):
                    self._build_understanding(regions, lesson)
                with gr.Tab("About", id="about"):
                    gr.HTML(self._about(notice, lesson))
            gr.HTML(f"<footer role=note>{html.escape(notice)}</footer>", elem_id="notice")
            demo.unload(self.forget)
        demo.queue(max_size=200, api_open=False)
        return demo

    def _build_synthesis(self, modalities, regions, sampling):
        with gr.Row(elem_id="workspace"):
            with gr.Column(scale=4, min_width=320, elem_id="controls"):
                gr.HTML("<h2>Scan</h2>")
                scan = gr.File(label="PNG, NIfTI, MHA or a zip of a DICOM series", elem_id="scan", height=140)
                uploaded_only(scan)
                gr.HTML("<p class=hint>Or take a simulated example:</p>")
                examples = gr.Gallery(
                    [(self._thumbnail(case), self._caption(case)) for case in self.cases],
                    label="Simulated examples",
                    show_label=False,
                    columns=4,
                    height=170,
                    allow_preview=False,
                    object_fit="contain",
                    format="png",
                    buttons=[],
                    elem_id="examples",
                )
                with gr.Row(elem_id="recognised"):
                    preview = gr.Image(
                        label="Middle slice",
                        show_label=False,
                        container=False,
                        format="png",
                        height=96,
                        interactive=False,
                        buttons=[],
                        scale=1,
                        min_width=96,
                        elem_id="preview",
                    )
                    with gr.Column(scale=3, min_width=180):
                        seen = gr.HTML("<p class=seen>Nothing uploaded yet.</p>")
                with gr.Row():
                    source = gr.Dropdown(modalities, value=None, label="It is a", elem_id="source", min_width=130)
                    region = gr.Dropdown(regions, value="", label="of the", elem_id="region", min_width=130)
                gr.HTML("<h2>Target</h2>")
                targets = gr.CheckboxGroup(
                    [], label="Make", info="Say first which modality the scan is.", elem_id="targets"
                )
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    steps = gr.Slider(1, 100, sampling["num_inference_steps"], step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(1, 10, sampling["guidance_scale"], step=0.1, label="Guidance by the text")
                    image_guidance = gr.Slider(
                        1, 5, sampling["image_guidance_scale"], step=0.1, label="Guidance by the image"
                    )
                    seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", elem_id="seed")
                    samples = gr.Slider(
                        1,
                        8,
                        1,
                        step=1,
                        label="Seeds to average",
                        info="From two on, their spread can be looked at.",
                        elem_id="samples",
                    )
                    reference = gr.File(
                        label="Reference, measured in the target's modality", height=90, elem_id="reference"
                    )
                    uploaded_only(reference)
                    reference_target = gr.Dropdown(
                        [("the first target", ""), *((MODALITY_NAMES[name], name) for name in MODALITIES)],
                        value="",
                        label="The reference is a",
                    )
                with gr.Row():
                    start = gr.Button("Synthesise", variant="primary", elem_id="start", min_width=120)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
                progress = gr.HTML(status(""), elem_id="progress")
            with gr.Column(scale=7, min_width=320, elem_id="stage"):
                gr.HTML("<h2>Look</h2>")
                empty = gr.HTML(
                    "<div class=empty><p>Upload a scan or take an example, choose a target, and it appears here: "
                    "source and synthesis under one slider, slice by slice.</p></div>"
                )
                with gr.Column(visible=False) as looking:
                    with gr.Row():
                        shown = gr.Radio([], label="Synthesis", elem_id="shown", min_width=200)
                        view = gr.Radio([], label="Left and right of the slider", elem_id="view", min_width=260)
                    pictures = gr.ImageSlider(
                        format="png",
                        interactive=False,
                        show_label=False,
                        container=False,
                        max_height=620,
                        buttons=["fullscreen"],
                        elem_id="pictures",
                    )
                    index = gr.Slider(0, 1, 0, step=1, label="Slice", elem_id="slice")
                    with gr.Row():
                        source_window = gr.Dropdown([], label="Window of the source", elem_id="source-window")
                        target_window = gr.Dropdown([], label="Window of the synthesis", elem_id="target-window")
                    values = gr.HTML(elem_id="values")
                    pointer = gr.HTML("", elem_id="pointer", js_on_load=(HERE / "pointer.js").read_text())
                    gr.HTML("<h2>Take away</h2>")
                    with gr.Row():
                        form = gr.Radio(
                            ["NIfTI", "MetaImage", "PNG of this slice", "Derived DICOM"],
                            value="NIfTI",
                            label="As",
                            elem_id="form",
                        )
                        keep_tags = gr.Checkbox(
                            label="Keep the patient's tags",
                            info="Derived DICOM only. Otherwise the series is de-identified.",
                            elem_id="keep-tags",
                        )
                    files = gr.File(
                        label="On the grid of the scan, with a side-car that says how it was made",
                        file_count="multiple",
                        interactive=False,
                        elem_id="files",
                    )

        private = {"api_visibility": "private"}
        found = gr.State((None, None))
        heard, looked, settled = [scan, source, region], [preview, seen, found], [source, targets]
        known = [*heard, reference, reference_target]
        forgotten = [*known[1:], keep_tags, *looked]
        queued = {"show_progress": "hidden", **private, **ONE_AT_A_TIME}
        # The last one counts: a look at the scan before may still be waiting for the model.
        looking_at = queued | {"trigger_mode": "always_last"}
        examples.select(self.take_example, None, [*known, targets], **private).success(
            self.look_at, heard, looked, **looking_at
        )
        uploaded = scan.upload(self.forget_the_scan, None, forgotten, **AT_ONCE).then(
            self.look_at, heard, looked, **looking_at
        )
        cleared = scan.clear(self.forget_the_scan, None, forgotten, **AT_ONCE).then(
            self.look_at, heard, looked, **looking_at
        )
        gr.on([source.input, region.input], self.offer, [source, region, targets], targets, **AT_ONCE, **AS_SENT)
        # Scans of another region are cut along another axis.
        cut = region.input(self.look_at, heard, looked, **looking_at)
        for seen_now in (uploaded, cleared, cut):
            seen_now.success(self.settle, [*heard, targets, found], settled, **AT_ONCE, **AS_SENT)

        settings = [scan, targets, source, region, steps, guidance, image_guidance, seed, samples]
        inputs = [*settings, reference, reference_target]
        running = start.click(self.run, inputs, progress, **queued)
        cancel.click(None, cancels=[running])  # first, or a last report of progress would overwrite the word
        cancel.click(lambda: status("Cancelled."), None, progress, **AT_ONCE)

        painted = [shown, view, index, source_window, target_window]
        taken = [form, shown, index, keep_tags]
        look = AT_ONCE | AS_SENT
        # One after the other, the last one always: what is offered is what is chosen, not what was.
        take = private | AS_SENT | {"trigger_mode": "always_last", "concurrency_id": "files", "concurrency_limit": 1}
        shown_now = running.success(self.show, None, [shown, index, looking, empty, files], **AT_ONCE)
        shown_now = shown_now.success(self.choose, shown, [view, source_window, target_window], **look)
        shown_now = shown_now.success(self.paint, painted, [pictures, values], **look)
        shown_now.success(self.write, taken, files, **take)
        shown.input(self.choose, shown, [view, source_window, target_window], **look).success(
            self.paint, painted, [pictures, values], **look
        ).success(self.write, taken, files, **take)
        gr.on([view.input, source_window.input, target_window.input], self.paint, painted, [pictures, values], **look)
        index.change(self.paint, painted, [pictures, values], **look)
        pointer.point(self.point, [shown, index], values, **look)
        gr.on([shown.input, form.input, keep_tags.input], lambda: None, None, files, **AT_ONCE)
        gr.on([form.input, keep_tags.input], self.write, taken, files, **take)
        index.change(self.write_picture, taken, files, **look)

        with gr.Group(visible=False):  # the same for programs, one target a call
            target = gr.Dropdown([(name, name) for name in MODALITIES], label="target")
            called = gr.Button()
            out_picture = gr.Image(format="png", label="picture of the middle slice, over the target's window")
            out_volume = gr.File(label="volume, NIfTI in the target's unit on the grid of the scan")
            out_record = gr.JSON(label="record of how it was made")
        called.click(
            self.synthesize,
            [scan, target, source, region, steps, guidance, image_guidance, seed, samples],
            [out_picture, out_volume, out_record],
            api_name="synthesize",
            **ONE_AT_A_TIME,
        )

    def _build_understanding(self, regions, lesson: str):
        private = {"api_visibility": "private"}
        if lesson:
            gr.HTML(f"<div class=lesson role=note>{lesson}</div>")
        region = gr.Dropdown(regions, value="", label="Region of the scans", elem_id="asked-region")
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML("<h2>Name the modality</h2>")
                unnamed = gr.File(label="PNG, NIfTI, MHA or a zip of a DICOM series", height=140, elem_id="unnamed")
                uploaded_only(unnamed)
                identify = gr.Button("Identify", variant="primary", interactive=self.learned("MI"), elem_id="identify")
                named = gr.Label(label="probability of each modality", num_top_classes=4, elem_id="named")
            with gr.Column(min_width=320):
                gr.HTML("<h2>Ask a question</h2>")
                asked = gr.File(
                    label="one or several scans, in the order of the question",
                    file_count="multiple",
                    height=140,
                    elem_id="asked",
                )
                uploaded_only(asked)
                question = gr.Textbox(
                    label="question",
                    placeholder="Which modality is this image?",
                    info=f"At most {MAX_QUESTION:,} letters.",
                    max_length=MAX_QUESTION,
                    elem_id="question",
                )
                labels = gr.Dropdown(
                    list(LABELS),
                    label="the question calls several scans",
                    visible=self.config.label_images,
                    elem_id="labels",
                )
                can_answer = bool(self.config.trained_tasks)
                ask = gr.Button("Ask", variant="primary", interactive=can_answer, elem_id="ask")
                answer = gr.Textbox(label="answer", interactive=False, elem_id="answer")
        gr.HTML("<h2>Quiz: which slice belongs to this one?</h2>")
        score = gr.State({"index": None, "asked": 0, "you": 0, "model": 0})
        told = gr.HTML("<p>Simulated patients; you against the model.</p>", elem_id="told")
        with gr.Row():
            shown = gr.Image(
                label="This slice",
                show_label=False,
                format="png",
                interactive=False,
                buttons=[],
                height=240,
                scale=1,
                min_width=200,
                elem_id="quiz-slice",
            )
            candidates = gr.Gallery(
                label="Candidates",
                show_label=False,
                columns=4,
                height=240,
                format="png",
                allow_preview=False,
                object_fit="contain",
                buttons=[],
                interactive=False,
                scale=4,
                min_width=320,
                elem_id="candidates",
            )
        with gr.Row():
            choice = gr.Radio(["A", "B", "C", "D"], label="Your choice", interactive=False, elem_id="choice")
            following = gr.Button("New question", elem_id="next-question")
        identify.click(self.name_modality, [unnamed, region], named, api_name="identify", **ONE_AT_A_TIME)
        ask.click(self.answer, [asked, question, region, labels], answer, api_name="answer", **ONE_AT_A_TIME)
        following.click(self.ask, score, [score, shown, candidates, choice, told], **private)
        choice.input(self.check, [score, choice], [score, told, choice], **private, **ONE_AT_A_TIME)

    def _about(self, notice: str, lesson: str) -> str:
        rows = {}
        for region, source, target in self.routes:
            rows.setdefault((region, source), []).append(target)
        table = "".join(
            f"<tr><td>{REGION_NAMES.get(region, region or 'any')}</td><td>{MODALITY_NAMES[source]}</td>"
            f"<td>{', '.join(MODALITY_NAMES[target] for target in targets)}</td></tr>"
            for (region, source), targets in rows.items()
        )
        learned = ", ".join(TASK_NAMES.get(task, task) for task in self.config.trained_tasks) or "nothing yet"
        return f"""<div class=about>
<h2>What this is</h2><p>One model that understands paired medical scans and synthesises one modality from another.
Values stay in their units (HU, SUV; an MR has arbitrary ones) and every voxel stays in its place: the result lies on
the grid of the scan.</p><p><b>{html.escape(notice)}</b></p>
<h2>What this checkpoint has learned</h2><p>To understand: {html.escape(learned)}. {lesson}</p>
<table class=values><thead><tr><th>Region</th><th>From</th><th>To</th></tr></thead><tbody>{table}</tbody></table>
<h2>Your scans</h2><p>A scan is read for the request and its file is deleted within {KEPT_SECONDS // 60 + 1} minutes.
What you look at is kept in memory until you close the page. Tags that tell a patient are neither shown, logged nor
kept, and no download carries one unless you ask for it. Do not upload scans that you may not share with whoever runs
this page.</p>
<h2>For programs</h2><p>The endpoints <code>/synthesize</code>, <code>/identify</code> and <code>/answer</code> are
described under “Use via API” at the foot of the page. The examples are simulated; no person was scanned for them.</p>
</div>"""

    def _thumbnail(self, case) -> Image.Image:
        layer = layer_of(
            "", next(iter(case.files)), read_upload(next(iter(case.files.values()))).volume, case.axis, self.codec
        )
        return picture(layer.slices[len(layer.slices) // 2], layer.windows[layer.usual_window], (1, 1))

    def _caption(self, case) -> str:
        source, target = list(case.files)[:2]
        return f"{REGION_NAMES.get(case.region, case.region)}: {source}, {target}"


def theme() -> gr.themes.Base:
    """Quiet greys, hairlines, one accent, and the fonts that the visitor's own machine has."""
    teal = gr.themes.Color(
        *"#eefafa #d5f1f1 #aee2e3 #7ccdd0 #45b0b5 #1f9299 #14767d #125f66 #134c52 #123f45 #08292e".split()
    )
    grey = gr.themes.Color(
        *"#f8f9f9 #eff1f2 #e1e5e7 #cbd1d5 #9aa4ab #6d7980 #525d64 #3b454b #262e33 #181e22 #0f1316".split()
    )
    base = gr.themes.Base(
        primary_hue=teal,
        secondary_hue=teal,
        neutral_hue=grey,
        radius_size=gr.themes.sizes.radius_sm,
        text_size=gr.themes.sizes.text_sm,
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_500",
        block_label_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_text_weight="500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_large_text_size="*text_md",
        button_large_padding="8px 14px",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
        checkbox_label_background_fill="transparent",
        checkbox_label_background_fill_dark="transparent",
    )


def launch(demo: gr.Blocks, **arguments):
    """Starts the page, with what belongs to its look and to the safety of its visitors."""
    keep_clear(Path(get_upload_folder()))
    return demo.launch(
        theme=theme(),
        css=(HERE / "style.css").read_text(),
        head=f"<style>{(HERE / 'frame.css').read_text()}</style>",
        allowed_paths=[str(HERE / "examples")],
        max_file_size=UploadLimits.file_bytes,
        enable_monitoring=False,
        run_history=False,  # it would keep scans in the visitor's browser
        footer_links=["api", "settings"],
        ssr_mode=False,
        **arguments,
    )


demo = App(load_pipeline()).build()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what was uploaded is cleared away then, too
    launch(demo)
