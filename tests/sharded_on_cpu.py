"""Runs a training script under FSDP2 on CPU processes, which accelerate does on accelerators alone: for tests.

    torchrun --nproc_per_node 2 tests/sharded_on_cpu.py examples/train_generation.py --output_dir ...

Everything but the choice of the device is accelerate's own, with the settings of
`examples/accelerate_configs/fsdp2.yaml`.
"""

import os
import runpy
import sys
from pathlib import Path

import yaml

CONFIG = Path(__file__).parents[1] / "examples" / "accelerate_configs" / "fsdp2.yaml"
settings = yaml.safe_load(CONFIG.read_text())["fsdp_config"]
# As `accelerate launch` hands them on; it calls one of them otherwise.
names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
os.environ |= {
    names.get(name, name.upper()): str(value).lower() if isinstance(value, bool) else str(value)
    for name, value in settings.items()
}
os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}

from accelerate.state import AcceleratorState, PartialState  # noqa: E402  (reads the environment)
from accelerate.utils import DistributedType  # noqa: E402

begin = AcceleratorState.__init__


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    known = self.initialized
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if not known and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


AcceleratorState.__init__ = sharded
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
