"""One repository for transformers and diffusers: how a saved pipeline is laid out, described and published.

    config.json, model.safetensors.index.json, processor and tokenizer files     AutoModel, AutoProcessor
    model_index.json, model/, processor/, vae/, scheduler/                       SynerMedGenPipeline, DiffusionPipeline
    *_synermedgen.py, hub.py, model_card.py                                      the same without this package

There is one copy of the weights: the index at the root points into `model/`. The code lies at the root for transformers
and for the pipeline, and once more in `model/` and `processor/`, where diffusers looks for components. This file is
part of what a repository carries, so a pipeline loaded from there can be saved again.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from huggingface_hub import ModelCard, create_repo, hf_hub_download, list_repo_files, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file, is_peft_available

from .loading_synermedgen import LoadReport, check_no_pickle, without_reports
from .model_card import make_model_card, may_replace_card

logger = logging.get_logger(__name__)

CODE = (
    "configuration_synermedgen",
    "loading_synermedgen",
    "modeling_synermedgen",
    "image_processing_synermedgen",
    "processing_synermedgen",
    "model_card",
    "hub",
    "pipeline_synermedgen",
)
COMPONENT_CODE = {
    "model": ("configuration_synermedgen", "loading_synermedgen", "modeling_synermedgen"),
    "processor": ("configuration_synermedgen", "image_processing_synermedgen", "processing_synermedgen"),
}
COMPONENT_CLASS = {
    "model": ("modeling_synermedgen", "SynerMedGenForConditionalGeneration"),
    "processor": ("processing_synermedgen", "SynerMedGenProcessor"),
}
INDEX = "model.safetensors.index.json"
# Weights of an earlier save that must not outlive it: the Auto classes would take them first.
WEIGHTS = re.compile(
    r"((model/)?model|vae/diffusion_pytorch_model)(-\d{5}-of-\d{5})?(\.\w+)?\.safetensors(\.index\.json)?"
)
STAGING = ".incomplete"

CONFIG_FILES = {
    "model": "config.json",
    "processor": "processor_config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
}
COMPONENTS = tuple(CONFIG_FILES)
CARD_FACTS = ("license", "base_model", "datasets")
HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")

_FETCH_MARK = "# Names, for a download, the files that must come along; never run."


@contextlib.contextmanager
def staged(folder: str | os.PathLike, replaces: re.Pattern | None = WEIGHTS) -> Iterator[Path]:
    """
    A folder to write into that becomes part of `folder` only when all is written; on any error it is removed. What a
    killed process left behind is cleared by the next one.

    Args:
        folder (`str` or `os.PathLike`): Made if it does not exist. Files of the same name are replaced, those that
            match `replaces` wholly removed, everything else stays.
        replaces (`re.Pattern`, *optional*): Names of files that must not outlive an earlier save.

    Raises:
        `NotADirectoryError`: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
    is_new = not folder.exists()
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    # Only renames from here on. Without these files a folder does not load: they go first and come last.
    entrances = [Path(name) for name in ("config.json", INDEX, "model_index.json")]
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    files.sort(key=lambda path: path in entrances)
    for name in entrances:
        if name in files:
            (folder / name).unlink(missing_ok=True)
    for old in [*folder.glob("*.safetensors*"), *folder.glob("*/*.safetensors*")]:
        name = old.relative_to(folder)
        if replaces and replaces.fullmatch(name.as_posix()) and name not in files:
            logger.warning("%s of an earlier save is removed.", old)
            old.unlink()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    shutil.rmtree(staging)


def complete_repository(folder: Path, remote_code: bool = True):
    """
    Turn a folder with the four components into the layout above.

    Args:
        folder (`Path`): Holds `model_index.json`, `model/`, `processor/`, `vae/`, `scheduler/` as `save_pretrained`
            writes them.
        remote_code (`bool`, defaults to `True`): Carry the code, for use without the package.
    """
    model, processor = folder / "model", folder / "processor"
    index = _without(_read_json(folder / "model_index.json"), "_name_or_path")
    _write_json(folder / "vae" / "config.json", _without(_read_json(folder / "vae" / "config.json"), "_name_or_path"))
    if remote_code:
        here = Path(__file__).parent
        for name in CODE:
            source = (here / f"{name}.py").read_text()
            if name == "pipeline_synermedgen":
                source = source.split(_FETCH_MARK)[0].rstrip() + "\n\n\n" + _fetch_lines()
            (folder / f"{name}.py").write_text(source)
        for component, names in COMPONENT_CODE.items():
            for name in names:
                shutil.copyfile(here / f"{name}.py", folder / component / f"{name}.py")
        index["_class_name"] = ["pipeline_synermedgen", "SynerMedGenPipeline"]
        for component, names in COMPONENT_CLASS.items():
            index[component] = list(names)
    else:
        for component in COMPONENT_CODE:
            for code in (folder / component).glob("*.py"):
                code.unlink()
            for file in (folder / component).glob("*config.json"):
                _write_json(file, _without(_read_json(file), "auto_map"))
    _write_json(folder / "model_index.json", index)

    for file in (model / "config.json", model / "generation_config.json", *processor.iterdir()):
        if file.is_file() and file.suffix != ".py":
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / INDEX, _root_index(model))


def _without(content, key: str):
    """A copy of a JSON value without one key, at any depth."""
    if not isinstance(content, dict):
        return content
    return {name: _without(value, key) for name, value in content.items() if name != key}


def _root_index(model: Path) -> dict:
    """transformers' index of shards, each with `model/` before its name."""
    if (model / INDEX).exists():
        index = _read_json(model / INDEX)
        index["weight_map"] = {name: f"model/{file}" for name, file in index["weight_map"].items()}
        return index
    with safe_open(model / "model.safetensors", "pt", backend="pread") as weights:
        names = list(weights.keys())
    size = (model / "model.safetensors").stat().st_size
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, "model/model.safetensors")}


def _fetch_lines() -> str:
    """What diffusers' scanner for relative imports must see in the pipeline's file, since it does not look further."""
    modules = [f".{name}" for name in CODE if name != "pipeline_synermedgen"]
    modules += [f".{component}.{name}" for component, names in COMPONENT_CODE.items() for name in names]
    lines = "".join(f"    from {module} import __doc__ as _\n" for module in modules)
    return f"{_FETCH_MARK}\nif False:\n{lines}"


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline's way in and out
# ---------------------------------------------------------------------------------------------------------------------


def check_folder(path, given: dict[str, Any]):
    """Raise an `OSError` if `path` is a local folder without the components that are not `given`, saying what it is."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1:
            raise FileNotFoundError(f"There is no folder {path}.")
        return  # a Hub repository
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} is a file; name the folder of a pipeline.")
    needed = {name: f"{name}/{file}" for name, file in CONFIG_FILES.items() if name not in given}
    absent = [file for file in needed.values() if not (folder / file).is_file()]
    if not absent:
        kind = "synermedgen" if "model" in given else _read_json(folder / needed["model"]).get("model_type")
        if kind != "synermedgen":
            raise OSError(f"{path} holds a pipeline of another kind: its model is a {kind}.")
        if not given and not (folder / "model_index.json").is_file():
            raise OSError(f"{path} lacks model_index.json: a save into it was interrupted. Save it or get it again.")
        return
    advice = "Name the folder that save_pretrained or convert-bagel wrote."
    if (folder / "llm_config.json").exists():
        advice = "It holds an original BAGEL-family checkpoint: synermedgen convert-bagel makes a pipeline of it."
    elif (folder / "model_index.json").exists():
        advice = "The pipeline is not complete: get it again, or pass the components that are missing."
    elif (folder / "config.json").exists():
        advice = "It looks like a model or a component alone: load it with its Auto class, or name the folder above it."
    raise OSError(f"{path} is not a SynerMedGen pipeline: it lacks {', '.join(absent)}. {advice}")


def read_card_facts(path, **where) -> dict:
    """Licence, base model and data sets that the card of a folder or repository names."""
    if Path(path).is_dir():
        file = Path(path) / "README.md"
    else:
        file = cached_file(str(path), "README.md", _raise_exceptions_for_missing_entries=False, **where)
    if file is None or not Path(file).exists():
        return {}
    try:
        data = ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, UnicodeDecodeError):
        return {}
    return {name: data[name] for name in CARD_FACTS if data.get(name)}


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype by its name; `"auto"`, that of the file, stays."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"Unknown dtype {dtype!r}: pass a torch.dtype, its name such as 'bfloat16', or 'auto'.")
    return getattr(torch, dtype)


def load_vae(path, dtype: torch.dtype | str, **where) -> tuple[AutoencoderKL, LoadReport]:
    """The autoencoder of a pipeline folder or repository, and what was loaded of it."""
    check_no_pickle(path, "vae")
    try:
        with without_reports("diffusers.models.modeling_utils"):
            vae, info = AutoencoderKL.from_pretrained(
                path,
                subfolder="vae",
                torch_dtype=None if dtype == "auto" else dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report names them
                low_cpu_mem_usage=False,  # which cannot be had with the line above
                **where,
            )
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path}: the autoencoder's weights are damaged or not complete, or not there ({error}). Get them again."
        ) from error
    # Or it would be saved, and published, with the path it was loaded from.
    vae.register_to_config(_name_or_path="")
    return vae.eval(), LoadReport.from_loading_info(path, vae, info, prefix="vae.")


def check_plain_lora(source: str, config):
    """Raise a `ValueError` for an adapter that changes more than low-rank additions, and so could not be taken out."""
    odd = {
        "bias": getattr(config, "bias", "none") != "none",
        "use_dora": getattr(config, "use_dora", False),
        "trainable_token_indices": getattr(config, "trainable_token_indices", None) is not None,
    }
    if odd := [name for name, is_set in odd.items() if is_set]:
        raise ValueError(f"The adapter {source} uses {', '.join(odd)}; only plain LoRA adapters are loaded.")


class HubMixin:
    """What [`SynerMedGenPipeline`] does with folders and repositories: load, save, publish, and LoRA adapters."""

    # Loading, saving, publishing --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        allow_missing: list[str] | tuple[str, ...] = (),
        allow_unexpected: list[str] | tuple[str, ...] = (),
        print_report: bool = True,
        **kwargs,
    ):
        r"""
        Load the four components from their subfolders, every tensor accounted for.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository.
            dtype (`torch.dtype`, `str` or `dict`, defaults to `torch.float32`):
                Of model and VAE, as transformers calls it; `"auto"` keeps the model's own; a dict has one per component
                and `"default"`.
            torch_dtype (`torch.dtype` or `dict`, *optional*): The same, as diffusers calls it.
            allow_missing, allow_unexpected (`list[str]`, *optional*):
                Names of tensors, or patterns with `*`, that may be absent or left out; the autoencoder's begin with
                `vae.`.
            print_report (`bool`, defaults to `True`): Print the table of what was loaded; it stays in
                `pipe.load_report`.
            kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` go to every component; a
                component given by name (`vae=...`) replaces the stored one; anything else (`device_map`,
                `quantization_config`, `attn_implementation`, ...) goes to the model. With a `device_map` the VAE lies
                where the model begins.

        Raises:
            `ValueError`: A tensor is missing, unexpected or of another shape, or the components do not fit together.
            `OSError`: The folder is none of a pipeline, there are no safetensors, or a file is damaged.
        """
        path = pretrained_model_name_or_path
        components = {name: kwargs.pop(name) for name in COMPONENTS if kwargs.get(name) is not None}
        check_folder(path, components)
        where = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        trust = {"trust_remote_code": kwargs.pop("trust_remote_code")} if "trust_remote_code" in kwargs else {}
        dtype = dtype or torch_dtype or torch.float32
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        of = {name: dtypes.get(name, dtypes.get("default", torch.float32)) for name in ("model", "vae")}
        of = {name: as_dtype(one) for name, one in of.items()}
        allowed = {"allow_missing": allow_missing, "allow_unexpected": allow_unexpected}
        report = LoadReport(str(path))
        if "model" not in components:
            components["model"] = AutoModel.from_pretrained(
                path, subfolder="model", dtype=of["model"], print_report=False, **allowed, **where, **trust, **kwargs
            )
            report += components["model"].load_report
        if "vae" not in components:
            components["vae"], vae_report = load_vae(path, of["vae"], **where)
            vae_report.routes = report.routes
            vae_report.check(**allowed)
            report += vae_report
            if vae_report.missing:
                config = components["model"].config
                config.missing_parts = sorted({*config.missing_parts, "autoencoder"})
        elif "autoencoder" in components["model"].config.missing_parts:
            components["model"].config.missing_parts.remove("autoencoder")
            if kwargs.get("device_map") is not None:
                components["vae"].to(components["model"].device)
        if "processor" not in components:
            components["processor"] = AutoProcessor.from_pretrained(path, subfolder="processor", **where, **trust)
        if "scheduler" not in components:
            components["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(
                path, subfolder="scheduler", **where
            )
        pipe = cls(**components)
        pipe.load_report = report
        pipe.card_facts = read_card_facts(path, **where)
        if print_report and os.environ.get("RANK", "0") == "0":
            logger.warning(report.table({"": pipe.model, "vae.": pipe.vae}))
        if pipe.model.config.notice:
            logger.warning(pipe.model.config.notice)
        return pipe

    def save_pretrained(
        self,
        save_directory,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        remote_code: bool = True,
        card: dict | None = None,
        **kwargs,
    ):
        r"""
        Save everything as one repository that `AutoModel`, `AutoProcessor`, this class and, with the code it carries,
        `DiffusionPipeline` load from (layout in `hub.py`). Until all is written, nothing in the folder changes. Loaded
        LoRA adapters are saved beside the base weights, in `lora/NAME`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): Of one file of weights.
            push_to_hub (`bool`, defaults to `False`): Publish the folder too, as `repo_id` (by default its name).
            remote_code (`bool`, defaults to `True`): Carry the code, for use without this package.
            card (`dict`, *optional*): What the model card shall say: `base_model`, `license`, `datasets`,
                `training_data`, `evaluation`, `title`; see [`~synermedgen_hf.hub.make_model_card`].
            kwargs: With `push_to_hub`, those of [`~SynerMedGenPipeline.push_to_hub`].

        Raises:
            `ValueError`: Pickle was asked for (`safe_serialization=False`).
            `OSError`: The disk is full or not writable; the folder is as it was.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("Weights are saved as safetensors only: safe_serialization=False would be pickle.")
        known = ("repo_id", "commit_message", "private", "token", "create_pr") if push_to_hub else ()
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError(f"save_pretrained got unknown arguments: {', '.join(unknown)}.")
        save_directory = Path(save_directory)
        title = save_directory.resolve().name
        if push_to_hub:
            card = {"repo_id": kwargs.get("repo_id", title), **(card or {})}
        intensity = self.processor.image_processor.intensity
        # What the card said when this was loaded, until it is said anew.
        card = {"title": title, **getattr(self, "card_facts", {}), **(card or {})}
        self.card_facts = {name: card[name] for name in CARD_FACTS if name in card}
        card = make_model_card(self.model.config, intensity, **card)
        with staged(save_directory) as folder:
            super().save_pretrained(folder, max_shard_size=max_shard_size)
            if (folder / "model" / "lora").exists():
                (folder / "model" / "lora").rename(folder / "lora")
                logger.warning(
                    "Base weights and adapters (%s) are saved side by side; load_lora_weights(..., "
                    "subfolder='lora/NAME') puts them together again.",
                    ", ".join(sorted(path.name for path in (folder / "lora").iterdir())),
                )
            complete_repository(folder, remote_code)
            readme = save_directory / "README.md"
            if may_replace_card(readme.read_text() if readme.exists() else None):
                card.save(folder / "README.md")
            else:
                logger.warning("%s was changed by hand and stays as it is.", readme)
            written = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if push_to_hub:
            self.upload_repository(save_directory, kwargs.pop("repo_id", title), files=written, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        remote_code: bool = True,
        card: dict | None = None,
    ) -> str:
        r"""
        Save and publish as one repository.

        Args:
            repo_id (`str`): `"organisation/name"`; made if it does not exist.
            commit_message, private, token, create_pr: As everywhere on the Hub.
            max_shard_size, remote_code, card: As in [`~SynerMedGenPipeline.save_pretrained`].

        Returns:
            `str`: The address of the commit.
        """
        card = {"title": repo_id.split("/")[-1], "repo_id": repo_id, **(card or {})}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, remote_code=remote_code, card=card)
            return self.upload_repository(folder, repo_id, commit_message, private, token, create_pr)

    def upload_repository(
        self,
        folder,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        files: list[str] | None = None,
    ) -> str:
        """
        Publish a saved folder, or only `files` of it; a README that was changed by hand on the Hub stays, weights of an
        earlier push do not.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        files = files or [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
        try:
            published = Path(hf_hub_download(repo_id, "README.md", token=token)).read_text()
        except EntryNotFoundError:
            published = None
        if not may_replace_card(published):
            logger.warning("The README of %s was changed by hand and stays as it is.", repo_id)
            files = [name for name in files if name != "README.md"]
        there = list_repo_files(repo_id, token=token)
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload SynerMedGenPipeline",
            token=token,
            create_pr=create_pr,
            allow_patterns=files,
            delete_patterns=[name for name in there if WEIGHTS.fullmatch(name) and name not in files] or None,
        )

    # LoRA adapters ----------------------------------------------------------------------------------------------------

    def load_lora_weights(self, pretrained_model_name_or_path, adapter_name: str = "default", **kwargs):
        r"""
        Add a LoRA adapter to the model and use it, in place of those used until now.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository in PEFT's format.
            adapter_name (`str`, defaults to `"default"`): What to call it.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`.

        Raises:
            `OSError`: There is no `adapter_model.safetensors`; pickle files are never read.
            `ValueError`: The name is taken, or the adapter does not fit the model, which stays as it was.
        """
        if not is_peft_available():
            raise ImportError("LoRA adapters need peft: pip install 'synermedgen-hf[train]'.")
        from peft import PeftConfig

        where = {name: kwargs.pop(name) for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
        if kwargs:
            raise TypeError(f"load_lora_weights got unknown arguments: {', '.join(kwargs)}.")
        if adapter_name in getattr(self.model, "peft_config", {}):
            raise ValueError(f"An adapter called {adapter_name!r} is loaded already; choose another adapter_name.")
        source = str(pretrained_model_name_or_path)
        file = cached_file(source, "adapter_model.safetensors", **where)
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise OSError(f"{file} is damaged or not complete ({error}). Get it again.") from error
        config = PeftConfig.from_pretrained(source, **where)
        check_plain_lora(source, config)
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with without_reports("transformers.integrations.peft"):
                info = self.model.load_adapter(
                    adapter_name=adapter_name, peft_config=config, adapter_state_dict=weights
                )
            own = {name for name in self.model.state_dict() if ".lora_" in name and f".{adapter_name}." in name}
            for what, names in (("missing", info.missing_keys & own), ("unexpected", info.unexpected_keys)):
                if names:
                    raise ValueError(f"Tensors {what}: {', '.join(sorted(names)[:8])}")
        except Exception as error:
            self.remove_adapters([adapter_name])
            raise ValueError(f"The adapter {source} does not fit this model, which stays as it was. {error}") from error
        finally:
            for parameter, flag in trained:  # peft freezes the layers it wraps
                parameter.requires_grad_(flag)
        self.set_adapters(adapter_name)

    def set_adapters(self, adapter_names: str | list[str], weights: float | list[float] | None = None):
        r"""
        Choose which loaded adapters act, and how strongly.

        Args:
            adapter_names (`str` or `list[str]`): One or several, added up.
            weights (`float` or `list[float]`, *optional*): Factor of each; 1 by default, 0 switches one off.

        Raises:
            `ValueError`: A name is not loaded, or names and weights differ in number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        factors = (
            list(weights) if isinstance(weights, (list, tuple)) else [1.0 if weights is None else weights] * len(names)
        )
        loaded = list(getattr(self.model, "peft_config", {}))
        if unknown := [name for name in names if name not in loaded]:
            raise ValueError(
                f"No adapter called {', '.join(unknown)} is loaded; loaded: {', '.join(loaded) or 'none'}."
            )
        if len(factors) != len(names):
            raise ValueError(f"Got {len(factors)} weights for {len(names)} adapters.")
        self.model.set_adapter(names)
        for module in self.model.modules():
            if hasattr(module, "lora_A"):
                for name, factor in zip(names, factors, strict=True):
                    module.set_scale(name, factor)

    def unload_lora_weights(self):
        """Remove all adapters; the model is exactly what it was before the first one. Without any, nothing happens."""
        self.remove_adapters(list(getattr(self.model, "peft_config", {})))

    def remove_adapters(self, names: list[str]):
        """Delete adapters, and with the last one peft's wrappers around the layers."""
        loaded = getattr(self.model, "peft_config", {})
        if names := [name for name in names if name in loaded]:
            self.model.delete_adapter(names)
        if getattr(self.model, "peft_config", None):
            return
        for name, module in list(self.model.named_modules()):
            for wrapped in ("base_layer", "original_module"):
                if hasattr(module, wrapped):
                    self.model.set_submodule(name, getattr(module, wrapped))
        self.model._hf_peft_config_loaded = False


__all__ = ["HubMixin", "complete_repository", "staged"]
