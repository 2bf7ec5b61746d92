"""Make transformers' Auto classes know SynerMedGen without importing torch.

`AutoModel.register` wants classes, and our classes want torch, which takes seconds to import. So the registration waits
until the module that holds an Auto class is loaded, which is the moment somebody asks for one.
"""

import importlib.abc
import importlib.util
import sys

_AUTO = "transformers.models.auto."
_CONFIGS = _AUTO + "configuration_auto"
_CLASSES = tuple(_AUTO + name for name in ("modeling_auto", "processing_auto", "image_processing_auto"))
_OURS = tuple(
    f"{__package__}.{name}_synermedgen" for name in ("configuration", "modeling", "image_processing", "processing")
)
_WATCHED = (_CONFIGS, *_CLASSES, *_OURS)


def register_configs():
    """Into AutoConfig. Does not need torch."""
    from transformers import AutoConfig

    from .configuration_synermedgen import SynerMedGenConfig, SynerMedGenTextConfig

    for config in (SynerMedGenConfig, SynerMedGenTextConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_classes():
    """Into the Auto classes of models and processors. Imports torch."""
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration_synermedgen import SynerMedGenConfig
    from .modeling_synermedgen import SynerMedGenForConditionalGeneration
    from .processing_synermedgen import SynerMedGenProcessor  # registers the image processor too

    for auto in (AutoModel, AutoModelForImageTextToText):
        auto.register(SynerMedGenConfig, SynerMedGenForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SynerMedGenConfig, SynerMedGenProcessor, exist_ok=True)


def _is_loading(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def register_what_is_loaded(finished: str | None = None):
    """
    Register with every Auto class loaded so far; registering again changes nothing.

    Args:
        finished (`str`, *optional*): The watched module that has just run to its end.
    """
    # These modules import one another. Half of one is no use, so wait for the outermost, which comes by here as well.
    if any(_is_loading(name) for name in _WATCHED if name != finished):
        return
    if _CONFIGS in sys.modules:
        register_configs()
    if any(name in sys.modules for name in _CLASSES):
        register_classes()


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Lets the modules above load as usual, then registers."""

    def __init__(self):
        self.searching = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _WATCHED or name in self.searching:
            return None
        self.searching.add(name)  # the search below must not come back here
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                register_what_is_loaded(finished=name)

            spec.loader.exec_module = load_and_register
        return spec


def watch():
    """At once into the Auto classes loaded already, into the others as soon as they are."""
    sys.meta_path.insert(0, _RegisterAfter())
    register_what_is_loaded()
