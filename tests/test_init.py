"""Importing the package: quick, and enough for the Auto classes. Each case needs an interpreter that starts afresh."""

import json
import subprocess
import sys

import pytest

import synermedgen_hf


def run(code, *args):
    """Runs `code` in a new interpreter and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def saved(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_import_loads_no_heavy_library():
    heavy = run(
        "import sys, synermedgen_hf as s; dir(s); s.ROUTES, s.MODALITIES, s.REGIONS\n"
        "print({'torch', 'numpy', 'transformers', 'diffusers', 'datasets', 'scipy'} & set(sys.modules))"
    )
    assert heavy == "set()"


@pytest.mark.parametrize("name", synermedgen_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(synermedgen_hf, name) is getattr(synermedgen_hf, name)
    assert name in dir(synermedgen_hf)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'SynerMedGan'"):
        _ = synermedgen_hf.SynerMedGan


def test_checkpoint_path_of_an_unknown_name():
    with pytest.raises(FileNotFoundError, match="'synermedgen-huge'"):
        synermedgen_hf.checkpoint_path("synermedgen-huge")


@pytest.mark.parametrize(
    "first",
    [
        "import synermedgen_hf; import transformers",
        "import transformers; import synermedgen_hf",
        "from transformers import AutoModel, AutoProcessor, pipeline; import synermedgen_hf",
        "import synermedgen_hf; from transformers import AutoModel",
        "from diffusers import AutoencoderKL; import synermedgen_hf",
        "from transformers import Qwen2Config; import synermedgen_hf",
        "from synermedgen_hf import SynerMedGenConfig",
        "from synermedgen_hf import SynerMedGenProcessor",
        "from synermedgen_hf import SynerMedGenImageProcessor",
        "from synermedgen_hf import SynerMedGenForConditionalGeneration",
        "from synermedgen_hf import SynerMedGenPipeline",
    ],
)
def test_auto_classes_load_a_checkpoint(saved, first):
    names = run(
        f"""{first}
import json, sys
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
classes = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor)
print(json.dumps([type(auto.from_pretrained(sys.argv[1])).__name__ for auto in classes]))""",
        saved,
    )
    model = "SynerMedGenForConditionalGeneration"
    expected = ["SynerMedGenConfig", model, model, "SynerMedGenProcessor", "SynerMedGenImageProcessor"]
    assert json.loads(names) == expected


@pytest.mark.parametrize("auto", ["AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor"])
def test_each_auto_class_works_as_the_first_call(saved, auto):
    run(f"import sys, synermedgen_hf; from transformers import {auto}; {auto}.from_pretrained(sys.argv[1])", saved)


@pytest.mark.parametrize(
    "made_by",
    [
        "from synermedgen_hf import SynerMedGenConfig as Config",
        "from synermedgen_hf.modeling_synermedgen import SynerMedGenConfig as Config",
        "import functools, synermedgen_hf; from transformers import AutoConfig\n"
        "Config = functools.partial(AutoConfig.for_model, 'synermedgen')",
        "import synermedgen_hf; from transformers import CONFIG_MAPPING; Config = CONFIG_MAPPING['synermedgen']",
    ],
)
def test_auto_model_from_a_config(config, tmp_path, made_by):
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    text = run(
        f"""{made_by}
import json, sys
from transformers import AutoConfig, AutoModel
settings = json.load(open(sys.argv[1]))
settings.pop("model_type")
print(type(AutoModel.from_config(Config(**settings))).__name__)
print(type(AutoConfig.for_model("synermedgen_text")).__name__)""",
        tmp_path / "config.json",
    )
    assert text.split() == ["SynerMedGenForConditionalGeneration", "SynerMedGenTextConfig"]
