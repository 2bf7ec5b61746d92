"""The endpoints that programs call, through gradio_client."""

import json
import threading
import time
import zipfile
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from synermedgen_hf import checkpoint_path, read_volume
from synermedgen_hf.processing_synermedgen import MODALITY_NAMES

QUICK = {"target": "CT", "source": "MRI", "region": "brain", "steps": 1, "api_name": "/synthesize"}


@pytest.fixture(scope="module")
def client(space, tmp_path_factory):
    return Client(space["address"], verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def trained_tasks():
    return json.loads((checkpoint_path() / "model" / "config.json").read_text())["trained_tasks"]


def test_the_endpoints_are_named_and_documented(client):
    told = client.view_api(return_format="dict")["named_endpoints"]
    assert set(told) == {"/synthesize", "/identify", "/answer"}
    names = [parameter["parameter_name"] for parameter in told["/synthesize"]["parameters"]]
    assert names[:4] == ["scan", "target", "source", "region"]
    assert "PET" in told["/synthesize"]["parameters"][1]["type"]["enum"]
    for endpoint, names in {
        "/identify": ["scan", "region"],
        "/answer": ["scans", "question", "region", "labels"],
    }.items():
        assert [parameter["parameter_name"] for parameter in told[endpoint]["parameters"]] == names


def test_a_volume_comes_back_on_its_grid(client, scan):
    picture, volume, record = client.predict(scan=handle_file(scan), **QUICK)
    made, given = nibabel.load(volume), nibabel.load(scan)
    assert made.shape == given.shape and np.allclose(made.affine, given.affine)
    values = made.get_fdata()
    assert values.min() == -1024 and values.max() <= 3071 and values[20, 24, 2] > -1024
    with Image.open(picture) as shown:
        assert shown.format == "PNG"
    assert record["target"] == "CT" and record["seeds"] == [0] and "not for diagnosis" in record["notice"]


def test_a_dicom_series_as_a_zip_and_no_patient_in_the_answer(client, series, space):
    _, volume, record = client.predict(scan=handle_file(series), **QUICK)
    assert read_volume(volume).array.shape == (30, 34, 4)
    told = json.dumps(record) + space["log"].read_text(errors="replace")
    assert "Doe" not in told and "P-4711-XYZ" not in told


def test_a_picture_is_a_scan_of_one_slice(client, tmp_path):
    levels = (np.hypot(*np.mgrid[-1:1:64j, -1:1:48j]) < 0.8) * 40000
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "slice.png")
    _, volume, _ = client.predict(scan=handle_file(tmp_path / "slice.png"), **QUICK)
    assert sorted(nibabel.load(volume).shape)[0] == 1


def refused(client, path, **changes) -> str:
    with pytest.raises(AppError) as caught:
        client.predict(scan=handle_file(path), **{**QUICK, **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.png", b"<html><script>alert(1)</script></html>"),
        ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("cut.nii.gz", b"\x1f\x8b\x08\x00cut"),
        ("no.mha", b"ObjectType = Nothing"),
        ("empty.nii", b""),
        ("bad.zip", b"PK\x03\x04broken"),
    ],
)
def test_what_is_no_scan_gets_words_and_no_crash(client, space, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert len(refused(client, tmp_path / name)) > 10
    assert space["process"].poll() is None


def test_pictures_that_are_no_scan(client, tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "photo.png")
    assert "colour" in refused(client, tmp_path / "photo.png").lower()
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    assert "1" in refused(client, tmp_path / "dot.png")
    Image.new("L", (20000, 20000)).save(tmp_path / "wall.png")
    assert "too many pixels" in refused(client, tmp_path / "wall.png")


def test_a_zip_that_leads_out_or_blows_up(client, tmp_path, space):
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("../../evil.dcm", b"x")
    assert "leads out" in refused(client, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.dcm", bytes(300_000_000))
    assert (tmp_path / "bomb.zip").stat().st_size < 2_000_000
    refused(client, tmp_path / "bomb.zip")
    assert not list(space["folder"].parent.rglob("evil.dcm"))


def test_the_target_that_it_is_already(client, scan):
    assert "nothing to synthesise" in refused(client, scan, target="MRI")
    assert "not trained for MRI to PET" in refused(client, scan, target="PET")


def test_identify_and_answer_say_whether_they_have_learned(client, scan):
    calls = [
        ("MI" in trained_tasks(), {"scan": handle_file(scan), "api_name": "/identify"}),
        (
            bool(trained_tasks()),
            {"scans": [handle_file(scan)], "question": "Which modality is this image?", "api_name": "/answer"},
        ),
    ]
    for learned, call in calls:
        if learned:
            assert client.predict(**call)
        else:
            with pytest.raises(AppError, match="not been trained on the understanding tasks"):
                client.predict(**call)


def test_the_same_upload_twice_at_once(client, scan):
    made, errors = [], []

    def call(seed):
        try:
            made.append((seed, client.predict(scan=handle_file(scan), seed=seed, **QUICK)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (1, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and len(made) == 3
    volumes = {seed: [] for seed in (1, 2)}
    for seed, (_, volume, record) in made:
        assert record["seeds"] == [seed]
        volumes[seed].append(nibabel.load(volume).get_fdata())
    assert np.array_equal(*volumes[1]) and not np.array_equal(volumes[1][0], volumes[2][0])


def test_work_that_is_cancelled_stops(client, scan):
    long = {**QUICK, "steps": 100, "samples": 8}
    job = client.submit(scan=handle_file(scan), **long)
    time.sleep(3)
    job.cancel()
    begin = time.monotonic()
    client.predict(scan=handle_file(scan), **QUICK)  # one after the other: it would wait for the long one
    assert time.monotonic() - begin < 30


def test_a_picture_as_pet(client, tmp_path):
    levels = (np.hypot(*np.mgrid[-1:1:64j, -1:1:48j]) < 0.8) * 18000
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "ct.png")
    call = {**QUICK, "source": "CT", "target": "PET", "region": "whole-body"}
    picture, _, record = client.predict(scan=handle_file(tmp_path / "ct.png"), **call)
    assert record["axis"] == "axial" and Image.open(picture).size == (48, 64)


class Tab:
    """A browser's tab, in which the server remembers what is offered to it; events go by element and name."""

    def __init__(self, address: str, session: str):
        self.http, self.session = httpx.Client(base_url=f"{address}/gradio_api", timeout=120), session
        config = httpx.get(f"{address}/config").json()
        self.parts = {part["id"]: part["props"] for part in config["components"]}
        self.events = config["dependencies"]

    def find(self, function: str) -> dict:
        """The first event that calls this function of the app."""
        return next(event for event in self.events if event["api_name"] == function)

    def upload(self, file) -> dict:
        (path,) = self.http.post("/upload", files={"files": (file.name, file.read_bytes())}).json()
        return {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}

    def send(self, function: str, succeeds: bool = True, **values) -> list:
        """What the page would send, with values by element; others have the value that they begin with."""
        event = self.find(function)
        inputs = [self.parts[part] for part in event["inputs"]]
        data = [values.get(props.get("elem_id"), props.get("value")) for props in inputs]
        body = {"fn_index": event["id"], "data": data, "session_hash": self.session}
        if not event["queue"]:
            answer = self.http.post("/run/predict", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"]
        self.http.post("/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("msg") == "process_completed":
                    assert told["success"] == succeeds, told
                    return told["output"]["data"] if succeeds else told["output"]["error"]
        raise AssertionError("The server ended the connection before it was done.")


def test_a_target_that_was_chosen_before_the_source_is_left_out(space):
    """The tab sends what it shows, which may be older than what the server has offered since."""
    tab = Tab(space["address"], "stale-target")
    (offered,) = tab.send("offer", source="MRI", region="brain", targets=[])
    assert offered["value"] == ["CT"]
    (offered,) = tab.send("offer", source="CT", region="brain", targets=["T1", "CBCT"])
    assert offered["value"] == ["CBCT"]
    _, offered = tab.send("settle", source="MRI", region="brain", targets=["CBCT"])
    assert offered["value"] == ["CT"]


def test_a_slice_of_the_result_before_is_no_error(space, scan):
    """While a new result is being shown, the tab may still send target, slice, view and windows of the last one."""
    tab = Tab(space["address"], "stale-view")
    given = tab.upload(scan)
    tab.send("offer", source="MRI", region="brain", targets=[])
    tab.send("run", scan=given, source="MRI", region="brain", targets=["CT"], steps=1)
    tab.send("show")
    tab.send("choose", shown="CT")
    old = {"shown": "T2", "view": "Difference", "slice": 400, "source-window": "lung", "target-window": "brain"}
    picture, values = tab.send("paint", **old)
    assert picture and "HU" in values
    assert tab.send("write", **old, form="NIfTI", **{"keep-tags": False})


def test_a_modality_that_was_found_belongs_to_the_scan_that_is_there(space, scan):
    tab = Tab(space["address"], "found")
    given = tab.upload(scan)
    _, seen, _ = tab.send("look_at", scan=given)
    found = tab.send("settle", scan=given)[0]
    assert f"the model sees {MODALITY_NAMES[found]} (" in seen
    other = scan.with_name("other.nii.gz")
    other.write_bytes(scan.read_bytes())
    assert tab.send("settle", scan=tab.upload(other))[0] is None


@pytest.mark.parametrize("what", ["address", "folder"])
def test_only_files_that_were_uploaded_are_taken(space, scan, what):
    """gradio would fetch an address past all limits, and stumble over a folder when it clears away."""
    tab = Tab(space["address"], f"taken-{what}")
    given = tab.upload(scan)
    given["path"] = "https://example.com/scan.nii.gz" if what == "address" else str(Path(given["path"]).parent)
    for function in ("look_at", "run", "synthesize", "identify"):
        told = tab.send(function, succeeds=False, scan=given, unnamed=given, source="MRI", target="CT")
        assert "addresses and folders are not taken" in told


def test_an_upload_that_has_been_cleared_away_is_said_to_be_gone(space, scan):
    tab = Tab(space["address"], "gone")
    given = tab.upload(scan)
    Path(given["path"]).unlink()
    assert "no longer kept after 15 minutes" in tab.send("look_at", succeeds=False, scan=given)
