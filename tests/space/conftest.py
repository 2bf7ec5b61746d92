"""The Space as a visitor meets it: the real app in a process of its own, on localhost."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from synermedgen_hf import Volume
from synermedgen_hf.volumes.writing import write_dicom_series

SPACE = Path(__file__).parents[2] / "spaces" / "synermedgen"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """Address, process and temporary folder of the running app."""
    port, folder = free_port(), tmp_path_factory.mktemp("space")
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = open(folder.parent / "space.log", "wb")
    process = subprocess.Popen([sys.executable, SPACE / "app.py"], env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(960):  # a busy machine is slow to begin
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder.parent / "space.log").read_text()
                time.sleep(0.25)
        else:
            pytest.fail("The app did not start within four minutes.")
        yield {"address": address, "process": process, "folder": folder, "log": folder.parent / "space.log"}
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def app_module(tmp_path_factory):
    """`app.py` as a module of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SPACE)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("app")))
        import app

        yield app


@pytest.fixture
def app(app_module):
    """The app around the bundled weights, told that they have learned everything."""
    pipe = app_module.load_pipeline()
    pipe.model.config.trained_tasks = ["CTS", "MI", "TIA"]
    return app_module.App(pipe)


@pytest.fixture
def scan(tmp_path):
    """A small head, flipped and with thick slices, as NIfTI."""
    x, y, z = (np.linspace(-1.2, 1.2, side) for side in (40, 48, 5))
    radius = x[:, None, None] ** 2 + y[:, None] ** 2 + (z * 0.8) ** 2
    texture = np.random.default_rng(0).uniform(0.5, 1, radius.shape)
    affine = np.array([[-4, 0, 0, 80], [0, -4, 0, 90], [0, 0, 12, -30], [0, 0, 0, 1.0]])
    path = tmp_path / "mr.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.where(radius < 1, 700 * texture, 0).astype(np.float32), affine), path)
    return path


@pytest.fixture
def series(tmp_path):
    """A DICOM series of a patient with a name, in a zip."""
    array = np.zeros((30, 34, 4), np.float32)
    array[5:25, 5:29] = np.random.default_rng(3).uniform(300, 700, (20, 24, 4))
    folder = write_dicom_series(Volume(array, np.diag([5.0, 5, 8, 1]), "MRI", "a.u."), tmp_path / "series")
    path = tmp_path / "Doe.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            header = pydicom.dcmread(file)
            header.PatientName, header.PatientID = "Doe^Jane", "P-4711-XYZ"
            header.add(pydicom.DataElement("SeriesInstanceUID", "UI", "1.2.Doe", validation_mode=pydicom.config.IGNORE))
            header.save_as(file)
            archive.write(file, f"series/{file.name}")
    return path
