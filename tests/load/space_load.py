"""Many visitors at once: is a request lost, is the order fair, does memory stay, does anybody get another's picture?

    python tests/load/space_load.py --clients 40 --seconds 120 [--output load.json]

Starts the Space in a process of its own. Every client has a scan that nobody else has; what comes back, picture and
volume, is compared value by value with what the same client got while it was alone. Prints the figures and exits with 1
if one is wrong.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import nibabel
import numpy as np
import psutil
from gradio_client import Client, handle_file
from PIL import Image

APP = Path(__file__).parents[2] / "spaces" / "synermedgen" / "app.py"
ONE_STEP = {"target": "CT", "source": "MRI", "region": "brain", "steps": 1, "api_name": "/synthesize"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    return parser.parse_args(argv)


def start_space(folder: Path) -> tuple[subprocess.Popen, str]:
    """The app on a free port, its files below `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    log = open(folder.parent / "space.log", "wb")
    process = subprocess.Popen([sys.executable, APP], env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(480):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return process, address
        except OSError:
            if process.poll() is not None:
                raise RuntimeError((folder.parent / "space.log").read_text()) from None
            time.sleep(0.25)
    raise RuntimeError("The Space did not start.")


class Visitor:
    """One client with a scan of its own."""

    def __init__(self, number: int, address: str, folder: Path):
        self.number, self.folder = number, folder / f"client-{number}"
        self.folder.mkdir()
        self.client = Client(address, verbose=False, download_files=self.folder)
        rng = np.random.default_rng(number)
        array = np.zeros((32, 32, 1), np.float32)
        array[4:28, 4:28] = rng.uniform(200, 900, (24, 24, 1))
        self.path = self.folder / "scan.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, np.diag([6.0, 6, 6, 1])), self.path)
        self.asked, self.errors, self.strangers, self.served = 0, [], 0, []
        self.alone = self.ask()

    def ask(self) -> tuple[bytes, bytes]:
        """Pixels of the picture, voxels of the volume."""
        picture, volume, record = self.client.predict(scan=handle_file(self.path), seed=self.number, **ONE_STEP)
        assert record["seeds"] == [self.number]
        pixels = Image.open(picture["path"] if isinstance(picture, dict) else picture)
        return pixels.tobytes(), np.asarray(nibabel.load(volume).dataobj).tobytes()

    def visit(self, until: float):
        while (sent := time.monotonic()) < until:
            self.asked += 1
            try:
                made = self.ask()
            except Exception as error:
                self.errors.append(repr(error))
                continue
            self.strangers += made != self.alone
            self.served.append((sent, time.monotonic()))


def overtaken(served: list[tuple[float, float]], slack: float) -> float:
    """Share of pairs of requests in which the one sent later, by more than `slack` seconds, was answered first."""
    sent, done = np.array(sorted(served)).reshape(-1, 2).T
    later = sent[None] > sent[:, None] + slack
    return float((later & (done[None] < done[:, None])).sum() / max(later.sum(), 1))


def waits(served: list[tuple[float, float]]) -> dict[str, float | None]:
    """How long a request took; nothing is known of it where none was served."""
    if not served:
        return {"wait_median_s": None, "wait_longest_over_median": None}
    seconds = np.array([done - sent for sent, done in served])
    middle = float(np.median(seconds))
    return {"wait_median_s": round(middle, 2), "wait_longest_over_median": round(float(seconds.max()) / middle, 2)}


def run_load(clients: int, seconds: float) -> dict:
    """The figures of one run."""
    with tempfile.TemporaryDirectory(prefix="synermedgen-load-") as folder:
        files = Path(folder) / "files"
        files.mkdir()
        begin = time.monotonic()
        process, address = start_space(files)
        started = time.monotonic() - begin
        try:
            visitors = [Visitor(number, address, Path(folder)) for number in range(clients)]
            server, memory, begin = psutil.Process(process.pid), [], time.monotonic()
            threads = [threading.Thread(target=each.visit, args=(begin + seconds,)) for each in visitors]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                memory.append(server.memory_info().rss / 2**20)
                time.sleep(max(seconds / 100, 0.2))
            took = time.monotonic() - begin
        finally:
            process.terminate()
            process.wait(30)
        # What is handed out is cleared away after a while; records beside it would stay.
        stayed = list(files.rglob("synthetic_*.json"))
        served = [one for each in visitors for one in each.served]
        counts = [len(each.served) for each in visitors]
        quarter = max(len(memory) // 4, 1)
        return {
            "start_s": round(started, 1),
            "clients": clients,
            "seconds": round(took, 1),
            "asked": sum(each.asked for each in visitors),
            "served": len(served),
            "lost": sum(len(each.errors) for each in visitors),
            "first_error": next((error for each in visitors for error in each.errors), None),
            "of_another_visitor": sum(each.strangers for each in visitors),
            "served_per_client": [min(counts), max(counts)],
            **waits(served),
            "overtaken_share": round(overtaken(served, 0.5), 4),
            "files_that_stayed": len(stayed),
            "memory_mb": [round(float(np.median(part))) for part in (memory[quarter : 2 * quarter], memory[-quarter:])],
        }


def faults(figures: dict) -> list[str]:
    """What is wrong with the figures, in words."""
    low, high = figures["served_per_client"]
    early, late = figures["memory_mb"]
    checks = {
        "nothing was served": figures["served"] == 0,
        "requests were lost": figures["lost"] > 0 or figures["served"] != figures["asked"],
        "somebody got another's picture": figures["of_another_visitor"] > 0,
        "the order is not fair": high - low > max(2, 0.25 * high) or figures["overtaken_share"] > 0.05,
        "memory grows": late > 1.1 * early,
        "it was there too late": figures["start_s"] > 15,
        "files stay that nobody gets": figures["files_that_stayed"] > 0,
    }
    return [fault for fault, found in checks.items() if found]


def main(args) -> int:
    figures = run_load(args.clients, args.seconds)
    wrong = faults(figures)
    print(json.dumps(figures, indent=2))
    print("; ".join(wrong) or "No request lost, order fair, memory flat, everybody got their own.")
    if args.output:
        args.output.write_text(json.dumps({**figures, "faults": wrong}, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
