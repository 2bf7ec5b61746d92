"""Make transformers' Auto classes know SynerMedGen, and `load_dataset` know "synermed", without importing torch.

`AutoModel.register` wants classes, and our classes want torch, which takes seconds to import. Transformers itself looks
its models up by name and imports them on use, so we do the same: our names go into its tables as soon as each table is
loaded, and this package, whose names resolve on use, answers where it looks for the module. Datasets keeps such a table
of the builders packaged with it.
"""

import hashlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path

_MODEL = "SynerMedGenForConditionalGeneration"

# Module of transformers -> its tables -> model type -> class name.
TABLES = {
    "transformers.models.auto.configuration_auto": {
        "CONFIG_MAPPING_NAMES": {"synermedgen": "SynerMedGenConfig", "synermedgen_text": "SynerMedGenTextConfig"},
    },
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": {"synermedgen": _MODEL},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": {"synermedgen": _MODEL},
    },
    "transformers.models.auto.processing_auto": {
        "PROCESSOR_MAPPING_NAMES": {"synermedgen": "SynerMedGenProcessor"},
    },
    "transformers.models.auto.image_processing_auto": {
        "IMAGE_PROCESSOR_MAPPING_NAMES": {"synermedgen": {"pil": "SynerMedGenImageProcessor"}},
    },
}


def enter(module):
    """Write our names into the tables of one loaded module of transformers."""
    for table, names in TABLES[module.__name__].items():
        getattr(module, table).update(names)


def enter_dataset(module):
    """
    Put our builder among those packaged with `datasets.load`. A packaged builder is otherwise given all files below
    `data_dir`, or below the current directory, one by one; ours finds its files itself.
    """
    factory = module.PackagedDatasetModuleFactory
    if getattr(factory, "_knows_synermed", False):
        return
    folder = Path(__file__).parent
    code = b"".join(file.read_bytes() for part in ("data", "volumes") for file in sorted((folder / part).glob("*.py")))
    version = hashlib.sha256(code).hexdigest()  # of the cache: rows made by other code are made again
    module._PACKAGED_DATASETS_MODULES["synermed"] = (f"{__package__}.data.synermed", version)
    get_module = factory.get_module

    def get_synermed_module(self):
        if self.name != "synermed" or self.data_files is not None:
            return get_module(self)
        name, version = module._PACKAGED_DATASETS_MODULES[self.name]
        nothing = {"data_files": module.DataFilesDict(), "dataset_name": self.name}
        return module.DatasetModule(name, version, nothing)

    factory.get_module, factory._knows_synermed = get_synermed_module, True


AFTER = {**dict.fromkeys(TABLES, enter), "datasets.load": enter_dataset}


class _EnterAfter(importlib.abc.MetaPathFinder):
    """Lets the modules above load as usual, then does what `AFTER` says."""

    def __init__(self):
        self.searching = set()

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER or name in self.searching:
            return None
        self.searching.add(name)  # the search below must not come back here
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_enter(module):
                load(module)
                AFTER[name](module)

            spec.loader.exec_module = load_and_enter
        return spec


def register():
    """The public way, for Auto classes loaded before us: their tables have been read already. Imports our classes."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration_synermedgen import SynerMedGenConfig, SynerMedGenTextConfig
    from .modeling_synermedgen import SynerMedGenForConditionalGeneration
    from .processing_synermedgen import SynerMedGenProcessor  # registers the image processor too

    for config in (SynerMedGenConfig, SynerMedGenTextConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in (AutoModel, AutoModelForImageTextToText):
        auto.register(SynerMedGenConfig, SynerMedGenForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SynerMedGenConfig, SynerMedGenProcessor, exist_ok=True)


def watch():
    """At once into the Auto classes loaded already, into the others as soon as they are."""
    for model_type in TABLES["transformers.models.auto.configuration_auto"]["CONFIG_MAPPING_NAMES"]:
        sys.modules[f"transformers.models.{model_type}"] = sys.modules[__package__]
    sys.meta_path.insert(0, _EnterAfter())
    if any(name in sys.modules for name in TABLES):
        register()
    if "datasets.load" in sys.modules:
        enter_dataset(sys.modules["datasets.load"])
