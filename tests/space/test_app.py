"""What lies behind the buttons, without a server."""

import os
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from synermedgen_hf import MODALITIES, read_volume
from synermedgen_hf.volumes.understanding import understanding_slice

SETTINGS = {"steps": 1, "guidance": 1.0, "image_guidance": 1.0, "seed": 0, "samples": 1}


def sees(app, monkeypatch, modality, probability=0.9):
    """Lets the model see a modality; the pictures that it is shown are in the list returned."""
    shown = []
    others = (1 - probability) / (len(MODALITIES) - 1)
    probabilities = {name: probability if name == modality else others for name in MODALITIES}
    found = {"modality": modality, "probability": probability, "probabilities": probabilities}
    monkeypatch.setattr(app.pipe, "identify", lambda image: shown.append(image) or found)
    return shown


def made(app, scan, targets=("CT",), source="MRI", region="brain", **settings):
    *_, (_, result) = app.make(str(scan), list(targets), source, region, **{**SETTINGS, **settings})
    return result


def test_a_picture_that_is_shown_again_is_not_written_again(app_module):
    """Who fetches it meanwhile would get a part of it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    path = Path(app_module.whole_file(picture))
    with open(path, "rb") as fetched:
        assert app_module.whole_file(picture) == str(path)
        assert path.stat().st_ino == os.fstat(fetched.fileno()).st_ino
        assert np.array_equal(np.asarray(Image.open(fetched)), np.asarray(picture))
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]


# ---------------------------------------------------------------------------------------------------------------------
# A scan comes in
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_scan_outweighs_what_the_model_sees(app, scan, monkeypatch):
    sees(app, monkeypatch, "CT")
    _, seen, found = app.look_at(str(scan), None, "brain")
    assert found == (str(scan), "CT") and "model sees CT (90% sure)" in seen
    settled = [{"path": str(scan)}, "MRI", "brain", []]
    assert app.settle(*settled, found)[0] == "MRI"  # an example's, or chosen while the model looked
    settled[1] = None
    assert app.settle(*settled, found)[0] == "CT"
    assert app.settle(*settled, ("another scan", "CT"))[0] is None
    sees(app, monkeypatch, "CT", probability=0.3)
    assert app.look_at(str(scan), None, "brain")[2] == (str(scan), None)


def test_chosen_targets_stay_where_they_can_be_made(app):
    assert app.offer("T1", "brain", ["T2", "CT"]).value == ["T2"]
    assert app.offer("MRI", "brain", ["T2"]).value == ["CT"]
    assert app.offer(None, "brain", ["T2"]).value == []


def test_the_model_is_shown_what_training_showed(app, scan, monkeypatch):
    shown = sees(app, monkeypatch, "MRI")
    preview = Image.open(app.look_at(str(scan), None, "whole-body")[0])
    app.name_modality(str(scan), "whole-body")
    app.name_modality(str(scan), "")
    coronal, axial = (np.asarray(understanding_slice(read_volume(scan), axis)) for axis in ("coronal", "axial"))
    for picture, expected in zip([preview, *shown], [coronal, coronal, coronal, axial], strict=True):
        assert np.array_equal(np.asarray(picture), expected)


def test_pictures_keep_their_grey_levels_even_if_there_is_one_alone(app, tmp_path, monkeypatch):
    shown = sees(app, monkeypatch, "CT")
    for level, dtype, grey in ((100, np.uint8, 100), (257 * 30, np.uint16, 30)):
        Image.fromarray(np.full((20, 24), level, dtype)).save(tmp_path / "flat.png")
        preview, *_ = app.look_at(str(tmp_path / "flat.png"), None, "")
        assert np.all(np.asarray(Image.open(preview)) == grey)
        assert np.all(np.asarray(shown.pop()) == grey)


# ---------------------------------------------------------------------------------------------------------------------
# Synthesis
# ---------------------------------------------------------------------------------------------------------------------


def test_a_derived_series_comes_from_the_scan_that_was_synthesised(app, series):
    result = made(app, series)
    archive, _ = app.files(result, "Derived DICOM", "CT", 0, keep_tags=True)
    with zipfile.ZipFile(archive) as files:
        header = pydicom.dcmread(files.open(files.namelist()[-1]))
    assert header.PatientID == "P-4711-XYZ"
    series.unlink()
    with pytest.raises(ValueError, match="no longer kept"):
        app.files(result, "Derived DICOM", "CT", 0)


def test_a_source_that_is_not_said_is_what_the_model_is_sure_to_see(app, scan, monkeypatch):
    sees(app, monkeypatch, "MRI")
    assert made(app, scan, source=None).syntheses["CT"].record["sources"] == ["MRI"]
    sees(app, monkeypatch, "MRI", probability=0.3)
    with pytest.raises(ValueError, match="Say which modality"):
        made(app, scan, source=None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seed": None}, "whole number from 0"),
        ({"seed": -1}, "whole number from 0"),
        ({"seed": 2**32}, "whole number from 0"),
        ({"steps": None}, "leave none of them empty"),
        ({"targets": []}, "at least one target"),
        ({"targets": [None]}, "at least one target"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_scan_is_read(app, wrong, words):
    with pytest.raises(ValueError, match=words):
        made(app, "no such file", **wrong)


def test_a_reference_that_cannot_be_read_is_said_before_any_work(app, scan, tmp_path, monkeypatch):
    (tmp_path / "reference.png").write_bytes(b"<html>")
    monkeypatch.setattr(app.pipe, "synthesise_batch", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="web page"):
        made(app, scan, reference=(str(tmp_path / "reference.png"), "CT"))


def test_a_reference_of_another_place_is_refused(app, scan, tmp_path, monkeypatch):
    image = nibabel.load(scan)
    elsewhere = image.affine.copy()
    elsewhere[:3, 3] += 5000
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), elsewhere), tmp_path / "reference.nii.gz")
    monkeypatch.setattr(app.pipe, "synthesise_batch", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="shares 0% of its extent with the scan"):
        made(app, scan, reference=(str(tmp_path / "reference.nii.gz"), "CT"))


def test_a_target_named_twice_is_made_once(app, scan):
    shares = [share for share, _ in app.make(str(scan), ["CT"] * 3, "MRI", "brain", **SETTINGS)]
    assert max(shares) == 1 and list(made(app, scan, targets=["CT"] * 3).syntheses) == ["CT"]


def test_work_for_days_is_refused(app, scan, app_module, monkeypatch):
    monkeypatch.setattr(app_module, "MAX_EVALUATIONS", 9)
    monkeypatch.setattr(app.pipe, "synthesise_batch", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="5 slices x 2 steps x 1 seeds are 10 evaluations of the model; 9 are done"):
        made(app, scan, steps=2, samples=1)


def test_whoever_leaves_waits_for_nobody_and_the_next_one_for_the_step_that_is_left(app_module):
    leave, over, order = threading.Event(), threading.Event(), []

    def long_step(report, step):
        leave.set()
        over.wait(20)
        order.append("first")

    first = iter(app_module.Work(long_step))
    next(first)
    assert leave.wait(20)
    begin = time.monotonic()
    first.close()
    assert time.monotonic() - begin < 5  # gradio closes it where everybody's requests are served
    threading.Timer(0.5, over.set).start()
    second = app_module.Work(lambda report, step: order.append("second"))
    list(second)
    assert order == ["first", "second"]


def test_what_nobody_needs_any_more_is_cleared_away(app_module, tmp_path):
    (tmp_path / "upload").mkdir()
    for name in ("example.png", "tmp12345", "upload/part"):
        (tmp_path / name).write_bytes(b"x")
    app_module.clear_away(tmp_path, set(), seconds=1000)
    assert len(list(tmp_path.rglob("*"))) == 4
    app_module.clear_away(tmp_path, {tmp_path / "example.png"}, seconds=-1)
    assert list(tmp_path.iterdir()) == [tmp_path / "example.png"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_said(app, scan, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(app.pipe, "synthesise_batch", fail)
    request = SimpleNamespace(session_hash="visitor")
    shown = []
    with pytest.raises(gr.Error, match="more memory than this machine has"):
        shown.extend(app.run(str(scan), ["CT"], "MRI", "brain", *SETTINGS.values(), None, "", request))
    assert "That did not work" in shown[-1]
    with pytest.raises(gr.Error, match="more memory than this machine has"):
        list(app.synthesize(str(scan), "CT", "MRI", "brain", *SETTINGS.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Understanding
# ---------------------------------------------------------------------------------------------------------------------


def test_several_scans_are_called_as_the_question_calls_them(app, app_module, scan, monkeypatch):
    called = []
    monkeypatch.setattr(app.pipe, "answer", lambda images, question, labels: called.append(labels) or "")
    letters, numbers, candidates = app_module.LABELS
    three = [str(scan)] * 3
    app.config.label_images = False
    app.answer(three, "Which?", "brain", numbers)
    app.config.label_images = True  # as weights say that were trained so
    for labels in (None, letters, numbers, candidates):
        app.answer(three, "Which?", "brain", labels)
    app.answer(three[:1], "Which?", "brain", letters)
    assert called == [None, ["A", "B", "C"], ["A", "B", "C"], ["1", "2", "3"], ["1", "A", "B"], None]


@pytest.mark.parametrize(
    ("scans", "question", "words"),
    [
        (1, " ", "Ask a question"),
        (1, "?" * 1001, "at most 1,000"),
        (0, "Which?", "at least one scan"),
        (9, "Which?", "at most 8"),
        (1, "Which?<|im_end|>", "leave them out"),
    ],
)
def test_questions_that_cannot_be_asked(app, scan, scans, question, words):
    with pytest.raises(gr.Error, match=words):
        app.answer([str(scan)] * scans, question)


def test_what_has_not_been_learned_is_said(app):
    assert app.missing_lesson() == ""
    app.config.trained_tasks = ["MI", "TIA"]
    assert app.missing_lesson().endswith("which slices belong together: in the quiz you play alone.")
    app.config.trained_tasks = []
    assert "switched off" in app.missing_lesson()


def test_the_quiz_serves_visitors_at_once(app):
    indices = list(range(0, len(app.quiz), 7))
    expected = [row and row["question"] for row in map(app.quiz_row, indices)]
    found = {}

    def ask(worker):
        found[worker] = [row and row["question"] for row in map(app.quiz_row, indices[worker:] + indices[:worker])]

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[worker] == expected[worker:] + expected[:worker] for worker in range(8))


def test_a_space_installs_what_the_package_needs(app_module):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = (app_module.HERE / "requirements.txt").read_text().splitlines()
    installed = [line for line in lines if not line.startswith("#")]
    assert installed == project["dependencies"] + project["optional-dependencies"]["dicom"]
