"""Memory of converting a checkpoint, and what quantisation costs, each measured here and now.

    python examples/benchmark_checkpoints.py                 # one full-width layer: 5 GB of disk, a minute
    python examples/benchmark_checkpoints.py --layers 28     # all of BAGEL-7B-MoT: 30 GB of disk

The first part makes a checkpoint with the widths of BAGEL-7B-MoT (zeros, in a sparse file) and converts it with
`synermedgen convert-bagel`; peak memory is that of the whole process, as the system counts it. The second part
synthesises one slice on every route with the bundled weights, in float32 and in smaller types, and compares.
"""

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, QuantoConfig

from synermedgen_hf import ROUTES, SynerMedGenConfig, SynerMedGenPipeline, checkpoint_path
from synermedgen_hf.bagel import (
    DTYPE_NAMES,
    FIXED_TABLES,
    empty_modules,
    native_llm_config,
    native_vit_config,
    rename_model_key,
    rename_vae_key,
)
from synermedgen_hf.data.phantom import simulate_case
from synermedgen_hf.modeling_synermedgen import SinCosPositionTable
from synermedgen_hf.processing_synermedgen import SPECIAL_TOKENS

# The FLUX autoencoder.
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PROTOCOL = {"brain": "synthrad", "pelvis": "synthrad", "whole-body": "autopet"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="full-width layers; BAGEL-7B-MoT has 28")
    parser.add_argument("--skip_conversion", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args()


def write_sparse(file: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], filled: dict[str, torch.Tensor]):
    """A safetensors file of zeros that takes no room on the disk, but for the tensors in `filled`."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        out.truncate(8 + len(head) + end)
        for name, tensor in filled.items():
            out.seek(8 + len(head) + header[name]["data_offsets"][0])
            out.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def make_checkpoint(folder: Path, layers: int) -> tuple[int, int]:
    """A native folder at the widths of BAGEL-7B-MoT. Returns bytes in all and in the largest tensor."""
    folder.mkdir()
    config = SynerMedGenConfig(text_config={"num_hidden_layers": layers})
    modules = empty_modules(config, VAE)
    weights = {
        rename_model_key(name, back=True): (torch.bfloat16, tuple(tensor.shape))
        for name, tensor in modules[""].state_dict().items()
    }
    tables = {}
    for native in FIXED_TABLES:
        table = getattr(modules[""].model, native.split(".")[0])
        tables[native] = SinCosPositionTable(table.side, table.width).table.bfloat16()
        weights[native] = (torch.bfloat16, tuple(tables[native].shape))
    write_sparse(folder / "ema.safetensors", weights, tables)
    vae = {}
    for name, tensor in modules["vae."].state_dict().items():
        native, shape = rename_vae_key(name, 4, back=True), tuple(tensor.shape)
        vae[native] = (torch.float32, (*shape, 1, 1) if ".attn_1." in native and len(shape) == 2 else shape)
    write_sparse(folder / "ae.safetensors", vae, {})
    (folder / "llm_config.json").write_text(json.dumps(native_llm_config(config)))
    (folder / "vit_config.json").write_text(json.dumps(native_vit_config(config)))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in [*weights.values(), *vae.values()]]
    return sum(sizes), max(sizes)


def conversion(layers: int):
    with tempfile.TemporaryDirectory() as work:
        total, largest = make_checkpoint(Path(work) / "native", layers)
        command = [sys.executable, "-m", "synermedgen_hf.cli", "convert-bagel", f"{work}/native", f"{work}/converted"]
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"converting {total / 1e9:.1f} GB, layers: {layers}: {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB, "
        f"which is the largest tensor ({largest / 1e9:.2f} GB) plus {(peak - largest) / 1e9:.2f} GB"
    )


def weight_bytes(model) -> int:
    """Bytes of all stored tensors, packed ones as they are packed."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def synthesise(seed: int, **kwargs) -> tuple[list[np.ndarray], int]:
    """One slice on every route, each on [0, 1] of the target's window, and the model's bytes."""
    pipe = SynerMedGenPipeline.from_pretrained(checkpoint_path(), print_report=False, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for route in ROUTES:
        protocol = "brats" if route.source in ("T1", "T1CE", "T2", "FLAIR") else PROTOCOL[route.region]
        case = CASES.setdefault((route.region, protocol), simulate_case(route.region, protocol, seed=seed))
        source = case.images[route.source][len(case.images[route.source]) // 2]
        result = pipe(source, target=route.target, source=route.source, region=route.region, seed=0, output_type="np")
        low, high = result.records[0]["window"]
        images.append((result.images[0] - low) / (high - low))
    return images, weight_bytes(pipe.model)


CASES: dict = {}


def quantisation(seed: int):
    variants = {
        "bfloat16": {"dtype": {"model": torch.bfloat16, "default": torch.float32}},
        "quanto int8": {"quantization_config": QuantoConfig(weights="int8")},
        "quanto int4": {"quantization_config": QuantoConfig(weights="int4")},
    }
    if importlib.util.find_spec("bitsandbytes"):
        # Not its 4 bits: on a CPU they want rows of whole blocks of 64, and some of the toy's have 480.
        variants["bitsandbytes int8"] = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    reference, full = synthesise(seed)
    print("| model weights | bytes of float32 | PSNR to float32, mean over routes | worst route |\n|---|---|---|---|")
    for name, options in variants.items():
        images, size = synthesise(seed, **options)
        errors = [float(np.mean((ours - theirs) ** 2)) for ours, theirs in zip(images, reference, strict=True)]
        ratios = [-10 * math.log10(error) for error in errors]
        print(f"| {name} | {size / full:.2f} | {np.mean(ratios):.1f} dB | {min(ratios):.1f} dB |")


def main(args):
    if not args.skip_conversion:
        conversion(args.layers)
    quantisation(args.seed)


if __name__ == "__main__":
    main(parse_args())
