"""Real classes at tiny size, random weights: what every test of the model and the pipeline starts from.

Every request to the Hub goes to a server on localhost. The libraries read where the Hub is when they are imported, so
it is started, and the environment set, before that.
"""

import os
import tempfile

from localhost_hub import LocalhostHub

HUB = LocalhostHub().start()
HF_HOME = tempfile.TemporaryDirectory(prefix="synermedgen-tests-")
os.environ.update(HUB.environment(), HF_HOME=HF_HOME.name)

# ruff: noqa: E402
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from synermedgen_hf import (
    SynerMedGenConfig,
    SynerMedGenForConditionalGeneration,
    SynerMedGenImageProcessor,
    SynerMedGenPipeline,
    SynerMedGenProcessor,
)
from synermedgen_hf.data.layouts import write_layout

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(autouse=True)
def forget_the_accelerator():
    """What a script in one test said about precision and processes does not hold for the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def hub():
    """The Hub that all tests talk to."""
    yield HUB
    HUB.stop()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, no merges: every text can be said, in many tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], padding_side="left")


@pytest.fixture(scope="session")
def processor(tokenizer):
    size = {"max_pixels": 14112 * 128}
    image_processor = SynerMedGenImageProcessor(
        vae_size={"max_size": 64, "min_size": 32, "stride": 16, **size},
        vit_size={"max_size": 56, "min_size": 28, "stride": 14, **size},
        vit_patch_size=14,
        vit_max_patches_per_side=8,
        latent_max_per_side=8,
        latent_stride=16,
    )
    return SynerMedGenProcessor(image_processor, tokenizer)


@pytest.fixture(scope="session")
def config(processor):
    names = ["bos", "eos", "vision_start", "vision_end", "image", "latent", "target"]
    return SynerMedGenConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "vision_use_head": False,
        },
        latent_channels=4,
        latent_patch_size=2,
        max_latent_size=8,
        pad_token_id=processor.tokenizer.pad_token_id,
        **{f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in names},
    )


@pytest.fixture
def model(config):
    """Weights large enough to matter, and a generation head that is not zero."""
    torch.manual_seed(0)
    model = SynerMedGenForConditionalGeneration(type(config).from_dict(config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def make_vae():
    """Makes small autoencoders."""

    def make():
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.5,
            shift_factor=0.1,
        ).eval()

    return make


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Scans of four patients to train on, one to validate and one to test."""
    root = tmp_path_factory.mktemp("scans") / "SynthRAD2023"
    write_layout("synthrad2023-task1", root, subjects=6, size=32, num_slices=16)
    return root


@pytest.fixture(scope="session")
def start(tmp_path_factory, config, processor, make_vae):
    """The pipeline that a training starts from, saved."""
    torch.manual_seed(0)
    model = SynerMedGenForConditionalGeneration(type(config).from_dict(config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("weights") / "start"
    SynerMedGenPipeline(model, processor, make_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(model, processor, make_vae):
    torch.manual_seed(0)
    pipe = SynerMedGenPipeline(model, processor, make_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def mr_slice():
    """A `(40, 48)` MR-like slice in arbitrary units."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1:1:40j, -1:1:48j]
    return (800 * np.exp(-3 * (rows**2 + columns**2)) + 20 * rng.random((40, 48))).astype(np.float32)
