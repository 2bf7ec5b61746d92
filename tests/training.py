"""What the tests of both stages share: scripts run from their files, trainings killed, processes of their own."""

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(name: str):
    """`examples/NAME.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def killed(folder: Path, copy: Path, keep: int = 2) -> Path:
    """A training as it lies there after it was killed, with the checkpoint of step `keep` as its newest."""
    late = [path.name for path in folder.glob("checkpoint-*") if int(path.name.split("-")[1]) > keep]
    # At the top alone: a checkpoint has an adapter of its own.
    made = ["pipeline", "adapter_model.safetensors", "unet", "baseline.json", *late]
    return shutil.copytree(folder, copy, ignore=lambda inside, _: made if Path(inside) == folder else [])


def fill_disk(monkeypatch, module, name: str):
    """From here on, `write_whole` of a module finds the disk full for any path with `name` in it."""
    write = module.write_whole

    def fills_up(path, text):
        if name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(module, "write_whole", fills_up)


def in_processes(
    script: str, arguments: list[str], count: int, timeout: int = 300, succeeds: bool = True, sharded: bool = False
):
    """`torchrun` on the CPU; after `timeout` seconds it ends its processes, as it does when it is told to end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    launch += [str(Path(__file__).parent / "sharded_on_cpu.py")] if sharded else []
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*launch, str(EXAMPLES / f"{script}.py"), *arguments], env=environment) as process:
        try:
            assert (process.wait(timeout) == 0) == succeeds
        finally:
            process.terminate()
