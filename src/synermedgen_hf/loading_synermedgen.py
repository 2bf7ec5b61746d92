"""What was loaded and what was not: one short table, and an error for every tensor missing, left over or misshapen.

Weights that quietly failed to load are the most expensive mistake with models of this kind: the loss still falls, and
the pictures are noise. So every `from_pretrained`, the converters and the trainers go through a [`LoadReport`].
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

# Part -> pattern of its tensors; the first that is found in a name wins. The autoencoder's names start with "vae.".
PARTS = {
    "autoencoder": r"^vae\.",
    "generation": r"_moe_gen\b|\bvae2llm\b|\bllm2vae\b|\btime_embedder\b|\blatent_pos_embed\b",
    "vision": r"\bvision_model\b|\bconnector\b|\bvit_pos_embed\b",
    "understanding": r"",
}
# What `allow_missing` takes for a part; transformers, PEFT and fnmatch read the same names.
PART_PATTERNS = {
    "generation": ("*_moe_gen*", "*vae2llm*", "*llm2vae*", "*time_embedder*"),
    "vision": ("*vision_model*", "*connector*"),
}
_WITHOUT = {
    "generation": "it cannot synthesise: calling the pipeline is unavailable on every route{routes}; `identify` and "
    "`answer` remain",
    "vision": "it cannot look at images: `identify`, `answer` and synthesis on every route{routes} are unavailable; "
    "only text remains",
    "understanding": "nothing works: every route{routes} and every question needs it",
    "autoencoder": "it cannot synthesise: every route{routes} passes through it",
}
_SHOWN = 8  # names in an error
_PIECE = 1 << 22  # values hashed at a time


def part_of(name: str) -> str:
    """The part a tensor belongs to: `"understanding"`, `"generation"`, `"vision"` or `"autoencoder"`."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


def is_allowed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of `patterns`, in which `*` stands for anything; one pattern may be given as it is."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def tensor_digest(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bytes:
    """
    SHA-256 over name, shape and values of one tensor on the CPU. Floating-point values count as float32, so bfloat16
    weights read as float32 are still the same weights. With a `dtype`, of the values as that type holds them.
    """
    values, content = tensor.detach().contiguous().reshape(-1), hashlib.sha256()
    for piece in values.split(_PIECE):  # a float32 copy of the whole would be the largest thing in memory
        piece = piece.to(dtype or piece.dtype)
        piece = piece.float() if piece.is_floating_point() else piece
        content.update(piece.view(torch.uint8).numpy())
    return hashlib.sha256(f"{name} {tuple(tensor.shape)} {content.hexdigest()}".encode()).digest()


def combine_digests(digests: dict[str, bytes]) -> str:
    """One checksum of 64 hexadecimal digits from those of the tensors, whatever their order."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def weights_checksum(module: nn.Module, names: Iterable[str] | None = None, prefix: str = "") -> str | None:
    """
    One checksum of a module's parameters and persistent buffers. Two modules have the same one exactly if all values
    are the same, however they are stored.

    Args:
        module (`nn.Module`): Any.
        names (`Iterable[str]`, *optional*): Only these tensors, such as the frozen ones before and after a training.
        prefix (`str`): Put before every name.

    Returns:
        `str` of 64 hexadecimal digits, or `None` where there are no plain values (quantised or offloaded tensors).
    """
    digests = _digests(module, names, prefix)
    return None if digests is None else combine_digests(digests)


def _digests(module: nn.Module, names: Iterable[str] | None = None, prefix: str = "") -> dict[str, bytes] | None:
    tensors = module.state_dict()
    tensors = tensors if names is None else {name: tensors[name] for name in names}
    if any(tensor.is_meta or type(tensor) is not torch.Tensor for tensor in tensors.values()):
        return None
    if getattr(module, "is_quantized", False):
        return None
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        found = pool.map(lambda item: tensor_digest(prefix + item[0], item[1].cpu()), tensors.items())
        return dict(zip((prefix + name for name in tensors), found, strict=True))


@dataclass
class LoadReport:
    """
    Which tensors of a checkpoint arrived in a model.

    Args:
        source (`str`): The folder, file or repository.
        loaded, missing, unexpected (`list[str]`): Names of tensors.
        mismatched (`list[tuple[str, tuple, tuple]]`): Name, stored shape, shape that the configuration asks for.
        routes (`list[str]`): Routes the checkpoint was trained for, to say what is lost without a part.
        command_line (`bool`): Advice names options rather than arguments.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    command_line: bool = False

    @classmethod
    def from_loading_info(cls, source, module: nn.Module, info: dict, prefix: str = "") -> "LoadReport":
        """From what transformers and diffusers return for `output_loading_info=True`; `prefix` goes before names."""
        mismatched = [(prefix + name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"]]
        absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        return cls(
            source=str(source),
            loaded=[prefix + name for name in module.state_dict() if name not in absent],
            missing=sorted(prefix + name for name in info["missing_keys"]),
            unexpected=sorted(prefix + name for name in info["unexpected_keys"]),
            mismatched=sorted(mismatched),
            routes=list(getattr(module.config, "trained_routes", None) or []),
        )

    def __add__(self, other: "LoadReport") -> "LoadReport":
        names = ("loaded", "missing", "unexpected", "mismatched")
        return LoadReport(
            self.source, *(getattr(self, name) + getattr(other, name) for name in names), self.routes or other.routes
        )

    @property
    def missing_parts(self) -> list[str]:
        """Parts of which at least one tensor is missing."""
        absent = {part_of(name) for name in (*self.missing, *(name for name, *_ in self.mismatched))}
        return sorted(absent)

    def check(self, allow_missing: Iterable[str] = (), allow_unexpected: Iterable[str] = ()):
        """
        Raise a `ValueError` that names what did not load, unless it is allowed.

        Args:
            allow_missing, allow_unexpected (`Iterable[str]`): Names, or patterns with `*`.
        """
        problems = []
        missing = [name for name in self.missing if not is_allowed(name, allow_missing)]
        unexpected = [name for name in self.unexpected if not is_allowed(name, allow_unexpected)]
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                problems.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{rest}")
        if self.mismatched:
            shown = [
                f"{name} (stored {_shape(stored)}, the configuration says {_shape(wanted)})"
                for name, stored, wanted in self.mismatched[:_SHOWN]
            ]
            rest = f" and {len(self.mismatched) - _SHOWN} more" if len(self.mismatched) > _SHOWN else ""
            problems.append(f"{len(self.mismatched)} of another shape: {', '.join(shown)}{rest}")
        if not problems:
            return
        message = f"{self.source} does not hold the weights of this model. Tensors " + "; ".join(problems) + "."
        lost = sorted({part_of(name) for name in missing})
        if lost:
            routes = f" ({', '.join(self.routes)})" if self.routes else ""
            for part in lost:
                message += f" Without its {part} weights {_WITHOUT[part].format(routes=routes)}."
            message += (
                " Get the complete checkpoint, or, if it came without whole parts, merge it onto a complete one "
                "(synermedgen convert-bagel --base). To go on without them, name them: "
                f"{self._allow('missing', missing)}."
            )
        if unexpected:
            message += f" To leave the unexpected ones out, name them: {self._allow('unexpected', unexpected)}."
        if self.mismatched:
            message += " Configuration and weights belong to different models: get both from one place."
        raise ValueError(message)

    def _allow(self, what: str, names: list[str]) -> str:
        """How a caller allows exactly these names."""
        patterns = _allowing(names)
        if self.command_line:
            return " ".join(f"--allow-{what} '{pattern}'" for pattern in patterns)
        return f"allow_{what}={patterns}"

    def table(self, modules: dict[str, nn.Module], checksum: str | None = None) -> str:
        """
        The report in one short table.

        Args:
            modules (`dict[str, nn.Module]`): The modules by the prefix of their names in this report, which is `""` for
                the model and `"vae."` for the autoencoder. They tell sizes, dtypes, and what is trained as they are
                now.
            checksum (`str`, *optional*): Where it is known already.
        """
        header = ("part", "loaded", "missing", "unexpected", "mismatched", "parameters", "trained", "frozen", "dtype")
        counts = {"loaded": self.loaded, "missing": self.missing, "unexpected": self.unexpected}
        counts["mismatched"] = [name for name, *_ in self.mismatched]
        parameters = [
            (part_of(prefix + name), parameter)
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        ]
        rows = [header]
        for part in reversed(PARTS):
            own = [parameter for owner, parameter in parameters if owner == part]
            if not own:
                continue
            sizes = [sum(map(_numel, own)), sum(_numel(p) for p in own if p.requires_grad)]
            rows.append(
                (
                    part,
                    *(str(sum(part_of(name) == part for name in names)) for names in counts.values()),
                    *map(_millions, (sizes[0], sizes[1], sizes[0] - sizes[1])),
                    "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in own})),
                )
            )
        if checksum is None:
            digests = [_digests(module, prefix=prefix) for prefix, module in modules.items()]
            whole = None if None in digests else {name: one for part in digests for name, one in part.items()}
            checksum = "none (quantised or offloaded)" if whole is None else combine_digests(whole)[:16]
        return f"Weights of {self.source}, sha256 {checksum}\n{align(rows)}"


def align(rows: list[tuple[str, ...]]) -> str:
    """Rows as text, their columns aligned: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into a byte
    return parameter.numel() if state is None else state.shape.numel()


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count else "0"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _allowing(names: list[str]) -> list[str]:
    """The shortest way to allow these names: patterns of whole parts where a part is gone, of all layers elsewhere."""
    patterns = []
    for part, own in PART_PATTERNS.items():
        concerned = [name for name in names if part_of(name) == part]
        if len(concerned) > _SHOWN:
            patterns += [pattern for pattern in own if any(fnmatchcase(name, pattern) for name in concerned)]
            names = [name for name in names if name not in concerned]
    if len(names) > _SHOWN:
        names = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    return patterns + names


@contextlib.contextmanager
def without_reports(logger: str) -> Iterator[None]:
    """Keep a library from printing its own table of what did not load: ours says it, and raises."""

    def others(record):
        text = record.getMessage()
        return not any(words in text for words in ("LOAD REPORT", "newly initialized", "were not used when"))

    logging.getLogger(logger).addFilter(others)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(others)


def check_no_pickle(path: str | os.PathLike, subfolder: str = ""):
    """Raise an `OSError` for a local folder whose only weights are pickle files."""
    folder = Path(path or "") / subfolder
    if not path or not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return
    if pickles := sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)
    ):
        raise OSError(
            f"{folder} holds {', '.join(pickles[:5])} and no safetensors. Pickle files can run any code and are never "
            "read: get the safetensors release, or save them as safetensors where you trust them."
        )


__all__ = [
    "LoadReport",
    "check_no_pickle",
    "combine_digests",
    "part_of",
    "tensor_digest",
    "weights_checksum",
    "without_reports",
]
