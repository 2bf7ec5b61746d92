"""SynerMedGen for Hugging Face: understanding paired medical scans, and synthesising one modality from another.

Importing this package is quick: torch, transformers and diffusers come in when a class is first used (or at once, if
Auto classes of transformers are loaded already). The Auto classes know SynerMedGen from here on (`_auto.py`).
"""

from importlib import import_module
from pathlib import Path

from . import _auto

_HOME = {
    "SynerMedGenConfig": "configuration_synermedgen",
    "SynerMedGenTextConfig": "configuration_synermedgen",
    "SynerMedGenModel": "modeling_synermedgen",
    "SynerMedGenForConditionalGeneration": "modeling_synermedgen",
    "SynerMedGenImageProcessor": "image_processing_synermedgen",
    "SynerMedGenProcessor": "processing_synermedgen",
    "SynerMedGenPipeline": "pipeline_synermedgen",
    "ROUTES": "data.routes",
    "MODALITIES": "data.routes",
    "REGIONS": "data.routes",
    "Volume": "volumes.reading",
    "read_volume": "volumes.reading",
    "write_volume": "volumes.writing",
    "synthesize_volume": "volumes.synthesis",
    "write_synthesis": "volumes.synthesis",
}

__all__ = ["checkpoint_path", "metrics", *_HOME]


def checkpoint_path(name: str = "synermedgen-tiny") -> Path:
    """The folder of weights that come with the package, for `from_pretrained`."""
    folder = Path(__file__).parent / "checkpoints"
    if not (folder / name).is_dir():
        bundled = ", ".join(sorted(path.name for path in folder.glob("*") if path.is_dir())) or "none"
        raise FileNotFoundError(f"No bundled checkpoint is called {name!r} (there: {bundled}; looked in {folder}).")
    return folder / name


def model_source(model: str | Path | None) -> str:
    """A folder or a Hub repository as it was named; the bundled weights by their name, or where nothing is named."""
    if model is None:
        return str(checkpoint_path())
    model = str(model)
    is_bundled = "/" not in model and not Path(model).exists() and (checkpoint_path().parent / model).is_dir()
    return str(checkpoint_path(model)) if is_bundled else model


def __getattr__(name):
    if name == "metrics":  # a package, lazy itself
        return import_module(".metrics", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})


_auto.watch()
