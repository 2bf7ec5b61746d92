"""BAGEL-family checkpoints (BAGEL, UniMedVL, SynerMedGen training runs) in, and our training back out.

The tensors are the same in both worlds; only names differ, the autoencoder's middle attention is a 1x1 convolution
there and a linear layer here, and the two tables of fixed positions are computed here instead of stored. All sizes come
from the checkpoint: from its JSON files, or from the shapes of its tensors. Tensors stream from file to file one at a
time, so 29 GB pass through the memory of the largest tensor.
"""

import contextlib
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers import __version__ as diffusers_version
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_synermedgen import SynerMedGenConfig
from .hub import STAGING, complete_repository, staged
from .image_processing_synermedgen import SynerMedGenImageProcessor
from .loading_synermedgen import LoadReport, combine_digests, is_allowed, part_of, tensor_digest
from .model_card import make_model_card, may_replace_card
from .modeling_synermedgen import AUTO_MAP, SinCosPositionTable, SynerMedGenForConditionalGeneration
from .processing_synermedgen import MODALITY_NAMES, SPECIAL_TOKENS, SynerMedGenProcessor

# BAGEL name -> our name, by their beginnings.
MODEL_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vit_model.vision_model.", "model.vision_model."),
    ("connector.", "model.connector."),
    ("vae2llm.", "model.vae2llm."),
    ("llm2vae.", "llm2vae."),
    ("time_embedder.mlp.0.", "model.time_embedder.linear_1."),
    ("time_embedder.mlp.2.", "model.time_embedder.linear_2."),
)
# Computed instead of stored. Each comes and goes with another group of tensors.
TABLE_OWNERS = {"latent_pos_embed.pos_embed": "vae2llm", "vit_pos_embed.pos_embed": "connector"}
FIXED_TABLES = tuple(TABLE_OWNERS)

# FLUX autoencoder name -> that of diffusers' AutoencoderKL. {r} counts decoder levels from the other end.
VAE_NAMES = (
    ("encoder.down.{i}.block.{j}.", "encoder.down_blocks.{i}.resnets.{j}."),
    ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
    ("decoder.up.{i}.block.{j}.", "decoder.up_blocks.{r}.resnets.{j}."),
    ("decoder.up.{i}.upsample.", "decoder.up_blocks.{r}.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    ("coder.norm_out.", "coder.conv_norm_out."),
)
VAE_ATTENTION = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")  # (C, C, 1, 1) there, (C, C) here

# Public values of BAGEL, in no file of the checkpoint.
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
PIECE = 1 << 24  # values converted at a time
TIMESTEP_SHIFT, SAMPLING_SHIFT = 1.0, 3.0

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NO_PICKLE = (
    "Pickle files can run any code and are never read: get the safetensors release, or save them as safetensors where "
    "you trust them."
)


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def rename_model_key(name: str, back: bool = False) -> str | None:
    """
    Our name of a BAGEL model tensor, or with `back` the other way round.

    Args:
        name (`str`): Name in `ema.safetensors` or `model.safetensors`.
        back (`bool`, defaults to `False`): `name` is ours.

    Returns:
        `str`, or `None` for a fixed table of positions, which the model computes.

    Raises:
        `KeyError`: Not a tensor of this family.
    """
    if name in FIXED_TABLES and not back:
        return None
    for native, ours in MODEL_NAMES:
        old, new = (ours, native) if back else (native, ours)
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(f"{name} is not a tensor of a BAGEL-family checkpoint.")


def rename_vae_key(name: str, levels: int, back: bool = False) -> str:
    """
    The `AutoencoderKL` name of a FLUX autoencoder tensor, or with `back` the other way round.

    Args:
        name (`str`): Name in `ae.safetensors`.
        levels (`int`): Resolution levels of the autoencoder; diffusers counts the decoder's from the bottom.
        back (`bool`, defaults to `False`): `name` is diffusers'.
    """
    for native, diffusers in VAE_NAMES:
        old, new = (diffusers, native) if back else (native, diffusers)
        pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(old))
        if match := re.search(pattern, name):
            found = {key: int(value) for key, value in match.groupdict().items()}
            if "r" in old + new:
                other = "i" if "r" in found else "r"
                found[other] = levels - 1 - found.get("r", found.get("i", 0))
            name = name[: match.start()] + new.format(**found) + name[match.end() :]
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class StoredTensor:
    """A tensor in a file: where, as what, how large. `shape` is what it becomes when that differs from the file's."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        # Mapped into memory, a file larger than the machine's may not be opened at all.
        with safe_open(self.file, "pt", backend="pread") as weights:
            return weights.get_tensor(self.name).reshape(self.shape)


def list_tensors(file: Path) -> dict[str, StoredTensor]:
    """
    What a safetensors file holds, from its header alone.

    Raises:
        `ValueError`: The file is damaged, not complete, or of a type this family does not use.
    """
    tensors = {}
    try:
        with safe_open(file, "pt", backend="pread") as weights:
            for name in weights.keys():
                entry = weights.get_slice(name)
                if entry.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: {name} is stored as {entry.get_dtype()}; supported are {', '.join(DTYPES)}. "
                        "A quantised checkpoint cannot be converted: start from the full one."
                    )
                tensors[name] = StoredTensor(file, name, DTYPES[entry.get_dtype()], tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not complete ({error}). Download it again.") from error
    return tensors


def write_tensors(
    file: Path,
    tensors: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    after: Callable[[str, torch.Tensor, torch.dtype], None],
):
    """
    Write one safetensors file, reading its tensors one at a time. (The library writes only what is all in memory.)

    Args:
        file (`Path`): To be made.
        tensors (`dict[str, StoredTensor]`): By the names they shall have.
        dtype (`torch.dtype`, *optional*): To convert to.
        after (`Callable`): Called with name, tensor as read, and type as written.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        size = math.prod(tensor.shape) * kind.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in tensors.items():
            value = tensor.read().contiguous()
            for piece in value.reshape(-1).split(PIECE):  # a converted copy of the whole would double the memory
                converted = piece.to(dtype or tensor.dtype)
                if converted.dtype != piece.dtype and not converted.isfinite().all() and piece.isfinite().all():
                    raise ValueError(
                        f"{tensor.file}: {tensor.name} holds values too large for {converted.dtype}; choose another "
                        "--dtype."
                    )
                out.write(converted.view(torch.uint8).numpy().data)
            after(name, value, dtype or tensor.dtype)


def read_json(file: Path) -> dict:
    """A JSON object from a file; a `ValueError` that names the file otherwise."""
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def check_output(folder: Path, needed: int, overwrite: bool, sources: Iterable[Path]):
    """Raise before any work if the output is in the way, one of the sources, or too large for the disk."""
    if folder.resolve() in {source.resolve() for source in sources}:
        raise ValueError(f"{folder} is read from; name another folder to write to.")
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; name a folder to write to.")
    if folder.exists() and any(path.name != STAGING for path in folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} holds files already. Name a new folder, or allow it with --overwrite.")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} needs {_size(needed)}, and the disk has {_size(free)} free. Make room, or name a folder on "
            "another disk."
        )


@contextlib.contextmanager
def writing(folder: Path, **options) -> Iterator[Path]:
    """`staged`, with an error that says what it was about."""
    try:
        with staged(folder, **options) as staging:
            yield staging
    except (KeyboardInterrupt, ValueError):
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise, for a full disk too
        raise OSError(
            f"{folder} could not be written ({error}). Is the disk full? What was written is removed; run the same "
            "command again."
        ) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# A native folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class NativeCheckpoint:
    """
    A folder in the original layout, as far as it goes.

    Args:
        folder (`Path`): Where.
        weights (`dict[str, StoredTensor]`): Model tensors by their native names.
        vae (`dict[str, StoredTensor]`): Autoencoder tensors by their native names.
        llm, vit (`dict`): The two JSON files; empty where absent.
        weights_file (`str`): What the model tensors were read from.
        merged (`dict[str, str]`): Group of tensors -> the other folder it was taken from.
    """

    folder: Path
    weights: dict[str, StoredTensor] = field(default_factory=dict)
    vae: dict[str, StoredTensor] = field(default_factory=dict)
    llm: dict = field(default_factory=dict)
    vit: dict = field(default_factory=dict)
    weights_file: str = ""
    merged: dict[str, Path] = field(default_factory=dict)

    @property
    def has_tokenizer(self) -> bool:
        files = ({"tokenizer.json"}, {"vocab.json", "merges.txt", "tokenizer_config.json"})
        return any(all((self.folder / name).exists() for name in names) for names in files)


def find_weights(folder: Path, choice: str | None = None) -> list[Path]:
    """
    The files of model weights: `choice`, or else `ema.safetensors`, `model.safetensors`, or the shards of an index.

    Raises:
        `OSError`: There are none; it says what there is instead.
    """
    names = [choice] if choice else ["ema.safetensors", "model.safetensors", "model.safetensors.index.json"]
    for name in names:
        file = folder / name
        if not file.exists():
            continue
        if not name.endswith(".index.json"):
            return [file]
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{file} has no weight_map of tensors to files. Download it again.")
        shards = sorted({folder / shard for shard in weight_map.values()})
        if absent := [shard.name for shard in shards if not shard.exists()]:
            raise OSError(f"{file} names {', '.join(absent[:5])}, which {folder} lacks. Download the rest.")
        return [shard for shard in shards if shard.name != "ae.safetensors"]
    pickles = sorted(path.name for pattern in PICKLE for path in folder.glob(pattern))
    if pickles and choice is None:
        raise OSError(f"{folder} holds {', '.join(pickles[:5])} but no safetensors. {NO_PICKLE}")
    raise OSError(f"{folder} holds none of {', '.join(names)}. Name the folder of the checkpoint as downloaded.")


def read_native(folder: str | Path, choice: str | None = None) -> NativeCheckpoint:
    """Read the headers and JSON files of a native folder; nothing is required but model weights."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise OSError(f"{folder} {what}. Name the folder of the checkpoint as downloaded.")
    if (folder / "model_index.json").exists():
        raise OSError(f"{folder} is converted already; export-bagel goes the other way.")
    if choice and any(fnmatch(choice, pattern) for pattern in PICKLE):
        raise OSError(f"{choice} is a pickle file. {NO_PICKLE}")
    files = find_weights(folder, choice)
    found = NativeCheckpoint(folder, weights_file=files[0].name if len(files) == 1 else f"{len(files)} shards")
    for file in files:
        for name, tensor in list_tensors(file).items():
            if name in found.weights:
                raise ValueError(f"{name} is in {found.weights[name].file.name} and in {file.name}; keep one of them.")
            found.weights[name] = tensor
    if (folder / "ae.safetensors").exists():
        found.vae = list_tensors(folder / "ae.safetensors")
    for name in ("llm", "vit"):
        if (folder / f"{name}_config.json").exists():
            setattr(found, name, read_json(folder / f"{name}_config.json"))
    return found


def group_of(name: str) -> str:
    """The group a native tensor is trained and saved with: its top-level prefix; the LLM's two experts are two."""
    prefix = name.split(".")[0]
    if prefix != "language_model":
        return prefix
    return "generation expert" if "_moe_gen" in name else "understanding expert"


def merge(checkpoint: NativeCheckpoint, base: NativeCheckpoint) -> NativeCheckpoint:
    """
    Fill whole groups that `checkpoint` lacks, and its missing files, from `base`. A group of which only some tensors
    are missing is not filled: that is a damaged file, and will be reported.
    """
    own = {group_of(name) for name in checkpoint.weights}
    for name, tensor in base.weights.items():
        if group_of(name) not in own:
            checkpoint.weights[name] = tensor
            checkpoint.merged[group_of(name)] = base.folder
    for part in ("vae", "llm", "vit"):
        if not getattr(checkpoint, part) and getattr(base, part):
            setattr(checkpoint, part, getattr(base, part))
            checkpoint.merged[{"vae": "ae.safetensors"}.get(part, f"{part}_config.json")] = base.folder
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Sizes: from the JSON files, or from shapes
# ---------------------------------------------------------------------------------------------------------------------


def root(number: int, what: str) -> int:
    """The whole square root of a number that must have one."""
    side = math.isqrt(number)
    if side * side != number:
        raise ValueError(f"{what} has {number} entries, which is not the square of a whole number.")
    return side


def numbers(config: dict, names: Iterable[str], file: str) -> dict:
    """Entries of a JSON file that have no default: positive numbers."""
    if absent := [name for name in names if config.get(name) is None]:
        raise ValueError(f"{file} lacks {', '.join(absent)}. These numbers are never guessed.")
    for name in names:
        if isinstance(config[name], bool) or not isinstance(config[name], (int, float)) or config[name] <= 0:
            raise ValueError(f"{file}: {name} must be a positive number, got {config[name]!r}.")
    return {name: config[name] for name in names}


def dimensions(tensor: StoredTensor, count: int) -> tuple[int, ...]:
    """The shape of a tensor that must have so many dimensions."""
    if len(tensor.shape) != count:
        raise ValueError(f"{tensor.file}: {tensor.name} has shape {tensor.shape}, expected {count} dimensions.")
    return tensor.shape


def read_text_config(llm: dict) -> dict:
    """`SynerMedGenTextConfig` arguments from `llm_config.json`."""
    if llm.get("use_sliding_window"):
        raise ValueError("llm_config.json asks for sliding-window attention, which this family does not have.")
    rope = llm.get("rope_parameters") or llm.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"llm_config.json: the rope parameters must be an object, got {rope!r}.")
    rope = dict(rope)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    if rope["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
        raise ValueError(f"llm_config.json: unknown rope type {rope['rope_type']!r}; known are {known}.")
    theta = rope.get("rope_theta", llm.get("rope_theta"))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    required = numbers(
        {**llm, "rope_theta": theta}, (*sizes, "num_key_value_heads", "rms_norm_eps", "rope_theta"), "llm_config.json"
    )
    rope["rope_theta"] = float(required.pop("rope_theta"))
    optional = ("max_position_embeddings", "hidden_act", "attention_dropout", "initializer_range")
    return required | {name: llm[name] for name in optional if name in llm} | {"rope_parameters": rope}


def read_vision_config(vit: dict, weights: dict[str, StoredTensor]) -> dict:
    """`SiglipVisionConfig` arguments from `vit_config.json`; layers and table side from the tensors."""
    if vit.get("rope"):
        raise ValueError("vit_config.json asks for rotary positions in the ViT, which are not supported.")
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
    config = numbers(vit, sizes, "vit_config.json")
    config |= {name: vit[name] for name in ("num_channels", "layer_norm_eps", "hidden_act") if name in vit}
    prefix = "vit_model.vision_model."
    layers = {int(name.split(".")[4]) for name in weights if name.startswith(prefix + "encoder.layers.")}
    stated = vit.get("num_hidden_layers")
    if layers:
        # The public file counts one more than is used: the last layer was dropped.
        config["num_hidden_layers"] = max(layers) + 1
        if stated is not None and config["num_hidden_layers"] not in (stated, stated - 1):
            raise ValueError(
                f"vit_config.json says {stated} layers, and the weights have {config['num_hidden_layers']}: "
                "tensors are missing, or the file belongs to another checkpoint."
            )
    else:
        config["num_hidden_layers"] = numbers(vit, ["num_hidden_layers"], "vit_config.json")["num_hidden_layers"] - 1
    table = weights.get(prefix + "embeddings.position_embedding.weight")
    if table is None:
        side = numbers(vit, ["image_size"], "vit_config.json")["image_size"] // vit["patch_size"]
    else:
        side = root(dimensions(table, 2)[0], table.name)
    return config | {"image_size": side * vit["patch_size"], "vision_use_head": False}


def read_vae_config(vae: dict[str, StoredTensor], scale: float, shift: float) -> dict:
    """`AutoencoderKL` arguments from the shapes of `ae.safetensors`."""

    def shape(name):
        if name not in vae:
            raise ValueError(f"ae.safetensors lacks {name}.")
        return dimensions(vae[name], 4)

    blocks = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name) for name in vae]
    found = {(int(match[1]), int(match[2])) for match in blocks if match}
    if not found:
        raise ValueError("ae.safetensors holds no encoder.down.* tensors: it is not an autoencoder of this family.")
    levels = 1 + max(level for level, _ in found)
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if shape("encoder.conv_in.weight")[0] != widths[0]:
        raise ValueError(
            f"The autoencoder starts with {shape('encoder.conv_in.weight')[0]} channels and goes on with {widths[0]}; "
            "diffusers' AutoencoderKL cannot express a first multiplier other than 1."
        )
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": 1 + max(block for _, block in found),
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "norm_num_groups": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": scale,
        "shift_factor": shift,
    }


def read_config(checkpoint: NativeCheckpoint, vae_config: dict, timestep_shift: float) -> SynerMedGenConfig:
    """The model's configuration, but for the token ids."""
    weights, channels = checkpoint.weights, vae_config["latent_channels"]
    config = {
        "text_config": read_text_config(checkpoint.llm),
        "vision_config": read_vision_config(checkpoint.vit, weights),
        "latent_channels": channels,
        "timestep_shift": timestep_shift,
    }
    if "vae2llm.weight" in weights:
        width = dimensions(weights["vae2llm.weight"], 2)[1]
        patch = math.isqrt(width // channels)
        if patch**2 * channels != width:
            raise ValueError(
                f"A latent token of {width} numbers (vae2llm.weight) is no square patch of the {channels} channels of "
                "ae.safetensors: the autoencoder belongs to another checkpoint."
            )
        config["latent_patch_size"] = patch
    if "latent_pos_embed.pos_embed" in weights:
        table = weights["latent_pos_embed.pos_embed"]
        config["max_latent_size"] = root(dimensions(table, 2)[0], table.name)
    try:
        return SynerMedGenConfig(**config)
    except StrictDataclassError as error:
        raise ValueError(f"llm_config.json or vit_config.json holds a value of the wrong type: {error}") from error


def read_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a native folder. The stand-ins for image tokens, if it lacks them, are added beyond the vocabulary:
    they only mark places and have no embedding.

    Raises:
        `ValueError`: It cannot be read, or lacks the start, end or vision delimiters, or the model has no embedding for
            them.
    """
    try:
        if (folder / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise ValueError(
            f"{folder / 'tokenizer.json'} and the files beside it are no tokenizer that can be read ({error}). "
            "Download them again."
        ) from error
    stand_ins = [SPECIAL_TOKENS[f"{kind}_token_id"] for kind in ("image", "latent", "target")]
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in SPECIAL_TOKENS.values() if token not in vocabulary and token not in stand_ins]:
        raise ValueError(f"The tokenizer in {folder} lacks {', '.join(absent)}: it is not that of this family.")
    delimiters = {token: vocabulary[token] for token in SPECIAL_TOKENS.values() if token not in stand_ins}
    if beyond := [f"{token} ({index})" for token, index in delimiters.items() if index >= vocab_size]:
        raise ValueError(
            f"The tokenizer in {folder} numbers {', '.join(beyond)} beyond the {vocab_size} embeddings of the weights: "
            "it belongs to another checkpoint."
        )
    new = [token for token in stand_ins if token not in vocabulary]
    if new:
        fillers = [f"<|unused_{index}|>" for index in range(len(tokenizer), vocab_size)]
        tokenizer.add_special_tokens({"additional_special_tokens": [*fillers, *new]})
    tokenizer.padding_side = "left"
    return tokenizer


def make_processor(config: SynerMedGenConfig, stride: int, tokenizer: PreTrainedTokenizerBase) -> SynerMedGenProcessor:
    """The processor; BAGEL's image sizes, as far as the position tables reach."""
    vit, side = config.vision_config, config.vision_patches_per_side
    vae_size, vit_size = dict(SynerMedGenImageProcessor.vae_size), dict(SynerMedGenImageProcessor.vit_size)
    for size, step, count in ((vae_size, stride, config.max_latent_size), (vit_size, vit.patch_size, side)):
        size["stride"] = step
        size["max_size"] = min(size["max_size"] // step, count) * step
        size["min_size"] = min(size["min_size"], size["max_size"])
    image_processor = SynerMedGenImageProcessor(
        vae_size=vae_size,
        vit_size=vit_size,
        vit_patch_size=vit.patch_size,
        vit_max_patches_per_side=side,
        latent_max_per_side=config.max_latent_size,
        latent_stride=stride,
    )
    return SynerMedGenProcessor(image_processor, tokenizer)


def check_table(stored: StoredTensor, side: int, width: int):
    """Raise a `ValueError` if a stored table of positions is not the one the model computes."""
    if stored.shape != (side**2, width):
        raise ValueError(f"{stored.file}: {stored.name} has shape {stored.shape}, expected {(side**2, width)}.")
    computed = SinCosPositionTable(side, width).table
    error = (stored.read().float() - computed.to(stored.dtype).float()).abs().max().item()
    if not error <= 2 * torch.finfo(stored.dtype).eps:  # not a number is no either
        raise ValueError(
            f"{stored.name} differs by {error:.2g} from the fixed table of positions that this family computes: it "
            "was changed or trained, and leaving it out would change the model."
        )


# ---------------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------------


def check_trained(routes: Iterable[str], tasks: Iterable[str]):
    """Raise a `ValueError` for the name of a route or a task that cannot be one."""
    modalities = "|".join(MODALITY_NAMES)
    for route in routes:
        if not re.fullmatch(rf"[\w-]+/({modalities})(\+({modalities}))*-({modalities})", route):
            raise ValueError(f"{route!r} names no route: it is written like brain/MRI-CT.")
    for task in tasks:
        if task not in ("CTS", "MI", "TIA"):
            raise ValueError(f"{task!r} names no task: known are CTS, MI and TIA.")


def empty_modules(config: SynerMedGenConfig, vae_config: dict) -> dict[str, torch.nn.Module]:
    """Model and autoencoder without memory, by the prefix of their names in a report."""
    with torch.device("meta"):
        return {"": SynerMedGenForConditionalGeneration(config), "vae.": AutoencoderKL.from_config(vae_config)}


def match(
    checkpoint: NativeCheckpoint, modules: dict[str, torch.nn.Module]
) -> tuple[LoadReport, dict[str, dict[str, StoredTensor]]]:
    """Give every native tensor its place. Returns the report and, for each module, its tensors by their new names."""
    levels = len(modules["vae."].config.block_out_channels)
    renames = {"": rename_model_key, "vae.": functools.partial(rename_vae_key, levels=levels)}
    report, placed = LoadReport(str(checkpoint.folder)), {}
    for (prefix, module), natives in zip(modules.items(), (checkpoint.weights, checkpoint.vae), strict=True):
        wanted, given, misshapen = (
            {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()},
            {},
            set(),
        )
        for native, tensor in natives.items():
            try:
                name = renames[prefix](native)
            except KeyError:
                name = native
            if name is None:
                continue  # a fixed table
            if VAE_ATTENTION.search(native) and tensor.shape[2:] == (1, 1):
                tensor.shape = tensor.shape[:2]
            if name not in wanted:
                report.unexpected.append(prefix + native)
            elif tensor.shape != wanted[name]:
                report.mismatched.append((prefix + native, tensor.shape, wanted[name]))
                misshapen.add(name)
            else:
                given[name] = tensor
        placed[prefix] = {name: given[name] for name in wanted if name in given}
        report.loaded += [prefix + name for name in placed[prefix]]
        report.missing += [prefix + name for name in wanted if name not in given and name not in misshapen]
    return report, placed


def convert_bagel(
    source: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    vae_scale: float = VAE_SCALE,
    vae_shift: float = VAE_SHIFT,
    timestep_shift: float = TIMESTEP_SHIFT,
    sampling_shift: float = SAMPLING_SHIFT,
    trained_routes: Iterable[str] = (),
    trained_tasks: Iterable[str] = (),
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    overwrite: bool = False,
) -> str:
    """
    Convert a BAGEL-family checkpoint to the layout of `hub.py`, a tensor at a time.

    Args:
        source (`str` or `Path`): Folder as downloaded: `ema.safetensors`, `model.safetensors` or shards with an index;
            `ae.safetensors`, `llm_config.json`, `vit_config.json`, tokenizer files.
        output (`str` or `Path`): Folder to make. Until all is written, nothing in it looks like a checkpoint.
        base (`str` or `Path`, *optional*): A complete native folder; whole groups of tensors and files that `source`
            lacks are taken from it.
        weights (`str`, *optional*): File of model weights in `source`, such as `"model.safetensors"` where an
            `ema.safetensors` is there too.
        dtype (`torch.dtype`, *optional*): To convert the model to; the autoencoder keeps its own.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Of one file of weights.
        vae_scale, vae_shift (`float`): `latent = scale * (z - shift)`; BAGEL's public values.
        timestep_shift (`float`, defaults to 1.0): Shift of the timesteps in training.
        sampling_shift (`float`, defaults to 3.0): Shift of the timesteps in sampling.
        trained_routes, trained_tasks (`Iterable[str]`): What the checkpoint was trained for, such as `"brain/MRI-CT"`
            and `"MI"`; empty if nothing is known.
        allow_missing, allow_unexpected (`Iterable[str]`): Names of tensors, or patterns with `*`, in our names for
            missing and in native ones for unexpected tensors.
        overwrite (`bool`, defaults to `False`): Write into a folder that holds files already.

    Returns:
        `str`: The report: what was merged, what was loaded, where it is.

    Raises:
        `OSError`, `ValueError`: With what is wrong, where, and what to do; before anything is written, unless the disk
            fills up, in which case what was written is removed.
    """
    # 1. Read headers and numbers.
    output = Path(output)
    check_trained(trained_routes, trained_tasks)
    positive = {"vae_scale": vae_scale, "timestep_shift": timestep_shift, "sampling_shift": sampling_shift}
    if wrong := [name for name, value in positive.items() if not 0 < value < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be a positive number.")
    if not math.isfinite(vae_shift):
        raise ValueError(f"vae_shift must be a number, got {vae_shift}.")
    checkpoint = read_native(source, weights)
    tokenizer_folder = checkpoint.folder
    if base is not None:
        base = read_native(base)
        checkpoint = merge(checkpoint, base)
        if not checkpoint.has_tokenizer:
            tokenizer_folder = base.folder
            checkpoint.merged["tokenizer"] = base.folder
    absent = {"ae.safetensors": checkpoint.vae, "llm_config.json": checkpoint.llm, "vit_config.json": checkpoint.vit}
    absent["tokenizer files"] = checkpoint.has_tokenizer or (base is not None and base.has_tokenizer)
    if absent := [name for name, there in absent.items() if not there]:
        raise OSError(
            f"{source} lacks {', '.join(absent)}. A training run keeps them in the folder it started from: name that "
            "one with --base."
        )
    vae_config = read_vae_config(checkpoint.vae, vae_scale, vae_shift)
    config = read_config(checkpoint, vae_config, timestep_shift)

    # 2. Every tensor must have a place, and every place a tensor.
    modules = empty_modules(config, vae_config)
    report, placed = match(checkpoint, modules)
    report.routes = list(trained_routes)
    report.command_line = True
    config.missing_parts = [part for part in report.missing_parts if part != "autoencoder"]
    tables = {name: checkpoint.weights.get(name) for name in FIXED_TABLES}
    here = {group_of(name) for name in checkpoint.weights}
    report.check(allow_missing, allow_unexpected)
    lost = [name for name, table in tables.items() if table is None and TABLE_OWNERS[name] in here]
    if lost := [name for name in lost if not is_allowed(name, allow_missing)]:
        raise ValueError(
            f"{source} lacks {', '.join(lost)}, which comes with the other tensors and tells how large a table of "
            f"positions is. Get the complete checkpoint, or allow it: --allow-missing {lost[0]} takes the public size."
        )
    for name, table in tables.items():
        if table is not None:
            check_table(table, getattr(modules[""].model, name.split(".")[0]).side, config.text_config.hidden_size)

    # 3. The small files' contents.
    tokenizer = read_tokenizer(tokenizer_folder, config.text_config.vocab_size)
    processor = make_processor(
        config, config.latent_patch_size * 2 ** (len(vae_config["block_out_channels"]) - 1), tokenizer
    )
    for name in SPECIAL_TOKENS:
        setattr(config, name, getattr(processor, name))
    config.pad_token_id = tokenizer.pad_token_id
    config.trained_routes, config.trained_tasks = list(trained_routes), list(trained_tasks)
    config.architectures = ["SynerMedGenForConditionalGeneration"]
    stored = {tensor.dtype for tensor in placed[""].values()}
    config.dtype = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
    config.auto_map = dict(AUTO_MAP)
    model = modules[""]
    model.generation_config.bos_token_id = config.bos_token_id
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.generation_config.suppress_tokens = [config.image_token_id, config.latent_token_id, config.target_token_id]

    # 4. Write.
    sizes = {
        prefix: sum(math.prod(t.shape) * ((dtype if prefix == "" else None) or t.dtype).itemsize for t in own.values())
        for prefix, own in placed.items()
    }
    check_output(output, sum(sizes.values()), overwrite, [checkpoint.folder, *([base.folder] if base else [])])
    title = output.resolve().name
    files = f"{checkpoint.folder.name}/{checkpoint.weights_file}"
    card = make_model_card(
        config,
        processor.image_processor.intensity,
        title,
        training_data=f"Converted from a BAGEL-family checkpoint ({files}); its own card says what it has seen.",
    )
    digests = {}
    with (
        writing(output) as folder,
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="Converting") as progress,
    ):

        def after(prefix, name, tensor, kind):
            digests[prefix + name] = tensor_digest(prefix + name, tensor, kind)
            progress.update(tensor.numel() * kind.itemsize)

        for sub in ("model", "processor", "vae", "scheduler"):
            (folder / sub).mkdir()
        write_sharded(folder / "model", placed[""], dtype, max_shard_size, functools.partial(after, ""))
        write_tensors(
            folder / "vae" / "diffusion_pytorch_model.safetensors",
            placed["vae."],
            None,
            functools.partial(after, "vae."),
        )
        config.save_pretrained(folder / "model")
        model.generation_config.save_pretrained(folder / "model")
        modules["vae."].save_config(folder / "vae")
        processor.save_pretrained(folder / "processor")
        FlowMatchEulerDiscreteScheduler(shift=sampling_shift).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))
        complete_repository(folder)
        readme = output / "README.md"
        if may_replace_card(readme.read_text() if readme.exists() else None):
            card.save(folder / "README.md")
    for (prefix, module), kind in zip(modules.items(), (config.dtype, None), strict=True):
        torch.nn.Module.to(module, kind or next(iter(placed[prefix].values())).dtype)  # for the report
    lines = [f"Merged from {folder}: {group}" for group, folder in checkpoint.merged.items()]
    beside = checkpoint.folder / "model.safetensors"
    if checkpoint.weights_file == "ema.safetensors" and beside.exists():
        lines.append("model.safetensors was left out beside ema.safetensors; --weights model.safetensors takes it")
    lines.append(report.table(modules, checksum=combine_digests(digests)[:16]))
    recomputed = [name for name, table in tables.items() if table is not None]
    lines.append(f"Recomputed, not stored: {', '.join(recomputed) or 'nothing'}")
    if config.missing_parts:
        lines.append(f"Without its {' and '.join(config.missing_parts)} weights: what needs them will be refused.")
    lines.append(f"Wrote {output} from {files}, {_size(sum(sizes.values()))} of weights")
    return "\n".join(lines)


MODEL_INDEX = {
    "_class_name": "SynerMedGenPipeline",
    "_diffusers_version": diffusers_version,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_sharded(
    folder: Path,
    tensors: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    after: Callable,
):
    """Model weights as transformers lays them out: one file, or shards and their index."""
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, dtype, after)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def export_bagel(
    source: str | Path,
    output: str | Path,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    overwrite: bool = False,
) -> str:
    """
    The inverse of [`convert_bagel`]: a pipeline folder in the original layout, every tensor byte for byte.

    Args:
        source (`str` or `Path`): Folder of a pipeline.
        output (`str` or `Path`): Folder to make: `ema.safetensors`, `ae.safetensors`, `llm_config.json`,
            `vit_config.json` and tokenizer files.
        allow_missing, allow_unexpected (`Iterable[str]`): Names of tensors, or patterns with `*`; neither is written.
        overwrite (`bool`, defaults to `False`): Write into a folder that holds files already.

    Returns:
        `str`: The report.

    Raises:
        `OSError`, `ValueError`: As [`convert_bagel`].
    """
    source, output = Path(source), Path(output)
    needed = {"model": "config.json", "vae": "config.json", "processor": "tokenizer_config.json"}
    needed["scheduler"] = "scheduler_config.json"
    if absent := [f"{part}/{file}" for part, file in needed.items() if not (source / part / file).exists()]:
        raise OSError(f"{source} is not the folder of a SynerMedGen pipeline: it lacks {', '.join(absent)}.")
    # 1. Read headers and numbers; every tensor must be there.
    config = SynerMedGenConfig.from_pretrained(source / "model")
    vae_config = read_json(source / "vae" / "config.json")
    if vae_config.get("norm_num_groups", 32) != 32 or not vae_config.get("mid_block_add_attention", True):
        raise ValueError(
            f"{source}: the original layout knows autoencoders with 32 normalisation groups and middle attention only; "
            "this one cannot be exported."
        )
    modules = empty_modules(config, vae_config)
    files = {
        "": find_weights(source / "model", None),
        "vae.": find_weights(source / "vae", "diffusion_pytorch_model.safetensors"),
    }
    report, stored = LoadReport(str(source), routes=config.trained_routes, command_line=True), {}
    for prefix, module in modules.items():
        stored[prefix] = {name: tensor for file in files[prefix] for name, tensor in list_tensors(file).items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        report.loaded += [prefix + name for name in wanted if name in stored[prefix]]
        report.missing += [prefix + name for name in wanted if name not in stored[prefix]]
        report.unexpected += [prefix + name for name in stored[prefix] if name not in wanted]
        report.mismatched += [
            (prefix + name, tensor.shape, wanted[name])
            for name, tensor in stored[prefix].items()
            if name in wanted and tensor.shape != wanted[name]
        ]
    # What the configuration knows to be missing is missing as a whole group, as an original training run leaves it out.
    there = {group_of(rename_model_key(name, back=True)) for name in report.loaded if not name.startswith("vae.")}
    known = [
        name
        for name in report.missing
        if part_of(name) in config.missing_parts and group_of(rename_model_key(name, back=True)) not in there
    ]
    report.check([*allow_missing, *known], allow_unexpected)

    # 2. Back to the native names and shapes, with the tables of positions that belong to what is there.
    levels, tensors, names = len(vae_config["block_out_channels"]), {"": {}, "vae.": {}}, {}
    for prefix, own in stored.items():
        for name in (name for name in modules[prefix].state_dict() if name in own):
            tensor = own[name]
            native = rename_vae_key(name, levels, back=True) if prefix else rename_model_key(name, back=True)
            if prefix and VAE_ATTENTION.search(native):
                tensor.shape = (*tensor.shape, 1, 1)
            tensors[prefix][native], names[prefix + native] = tensor, prefix + name
    dtype = next(iter(stored[""].values())).dtype
    for native, owner in TABLE_OWNERS.items():
        if any(group_of(name) == owner for name in tensors[""]):
            table = getattr(modules[""].model, native.split(".")[0])
            tensors[""][native] = ComputedTensor(table.side, table.width, dtype)

    # 3. Write.
    total = sum(tensor.nbytes for own in tensors.values() for tensor in own.values())
    check_output(output, total, overwrite, [source])
    tokenizer = AutoTokenizer.from_pretrained(source / "processor")
    digests = {}
    with (
        writing(output, replaces=None) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc="Exporting") as progress,
    ):

        def after(prefix, native, tensor, kind):
            if name := names.get(prefix + native):
                shape = modules[prefix].get_parameter(name.removeprefix(prefix)).shape
                digests[name] = tensor_digest(name, tensor.reshape(shape))
            progress.update(tensor.nbytes)

        write_tensors(folder / "ema.safetensors", tensors[""], None, functools.partial(after, ""))
        write_tensors(folder / "ae.safetensors", tensors["vae."], None, functools.partial(after, "vae."))
        (folder / "llm_config.json").write_text(json.dumps(native_llm_config(config), indent=2) + "\n")
        (folder / "vit_config.json").write_text(json.dumps(native_vit_config(config), indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which the original reads
    for prefix, module in modules.items():
        torch.nn.Module.to(module, next(iter(stored[prefix].values())).dtype)  # for the report
    table = report.table(modules, checksum=combine_digests(digests)[:16])
    sampling = read_json(source / "scheduler" / "scheduler_config.json").get("shift", SAMPLING_SHIFT)
    back = f"--vae-scale {vae_config['scaling_factor']:g} --vae-shift {vae_config.get('shift_factor') or 0:g} "
    back += f"--timestep-shift {config.timestep_shift:g} --sampling-shift {sampling:g}"
    return (
        f"{table}\nWrote {output}: {len(tensors[''])} model tensors and {len(tensors['vae.'])} of the autoencoder\n"
        f"Not in any of its files, for the way back: {back}"
    )


@dataclass
class ComputedTensor:
    """A table of fixed positions in the place of a stored tensor."""

    side: int
    width: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.side**2, self.width

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        return SinCosPositionTable(self.side, self.width).table


def native_llm_config(config: SynerMedGenConfig) -> dict:
    """`llm_config.json`."""
    text = config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act", "attention_dropout")
    names += ("initializer_range",)
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{name: getattr(text, name) for name in names},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": False,
        "qk_norm": True,
        "layer_module": "Qwen2MoTDecoderLayer",
    }


def native_vit_config(config: SynerMedGenConfig) -> dict:
    """`vit_config.json`, which counts one layer more than is used."""
    names = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "patch_size")
    names += ("num_channels", "layer_norm_eps", "hidden_act")
    vit = config.vision_config
    values = {name: getattr(vit, name) for name in names}
    return {"model_type": "siglip_vision_model", **values, "num_hidden_layers": vit.num_hidden_layers + 1}
