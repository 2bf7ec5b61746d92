"""Make transformers' Auto classes know SynerMedGen without importing torch.

`AutoModel.register` wants classes, and our classes want torch, which takes seconds to import. So the registration waits
until the module that holds an Auto class is loaded, which is the moment somebody asks for one.
"""

import importlib.abc
import importlib.util
import sys


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


_AFTER = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_classes,
    "transformers.models.auto.processing_auto": register_classes,
    "transformers.models.auto.image_processing_auto": register_classes,
}


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Lets the modules above load as usual, then registers."""

    def __init__(self):
        self.waiting = set(_AFTER)

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        self.waiting.discard(name)  # the search below must not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                _AFTER[name]()

            spec.loader.exec_module = load_and_register
        return spec


def watch():
    """At once into the Auto classes loaded already, into the others as soon as they are."""
    for name in [name for name in _AFTER if name in sys.modules]:
        _AFTER[name]()
    sys.meta_path.insert(0, _RegisterAfter())
