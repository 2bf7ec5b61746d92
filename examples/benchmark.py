"""Speed and memory, as ratios measured in one run.

    python examples/benchmark.py --output benchmark.json
    python examples/benchmark.py --training

* `tiny`: one synthesis with the bundled weights (20 steps, text and image guidance): seconds, peak memory of the
  process, and a batch of 8 slices against 8 single calls.
* `W1`, `W2`: a mid-size model with random weights, 10 evaluations with both guidances (W1) or none (W2), context
  prefill included, VAE excluded, against its *ideal*: the bare matrix products and attention calls that this work
  cannot do without, on buffers allocated beforehand. 1.0 would be a model that spends no time on anything else.
* `cache`: the same denoising with the context recomputed at every step, against the cached context.

With `--training`, Stage II instead:

* `W4`: forward and backward of 8 samples of the mid-size model (7,008 tokens), generation expert trained, understanding
  detached, against the bare matrix products and attention calls of that step.
* `detach`: the same step with gradients passing through the frozen understanding expert, against the detached one:
  time, and what is kept for the backward pass.
* `latents`: a batch of the bundled model whose slices lie in memory, on disk, or are encoded anew, against its step.
* `memory`: of the process, over `--steps` training steps with the bundled weights.

With `--only gpu`, on a GPU:

* `gpu`: the step of `W4` at the widths of a 7B model, four layers, in bfloat16 by autocast: tokens a second, and its
  operations a second (worked out) as a share of what a product of two 8192 x 8192 matrices reaches.

Runs of one comparison are interleaved and their medians compared, so that the machine's mood falls on both sides.
Seconds belong to one machine; ratios travel.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from benchmark_timing import medians
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm

from synermedgen_hf import (
    SynerMedGenConfig,
    SynerMedGenForConditionalGeneration,
    SynerMedGenPipeline,
    checkpoint_path,
)
from synermedgen_hf.data.flow_matching import PairBatches, PairPool, phantom_rows
from synermedgen_hf.data.latents import SliceEncoder
from synermedgen_hf.data.phantom import simulate_case
from synermedgen_hf.image_processing_synermedgen import SliceInputs
from synermedgen_hf.loading_synermedgen import part_of
from synermedgen_hf.processing_synermedgen import ImageBlock, TextBlock, build_sequence, pad_sequences

# The mid-size model.
HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD = 512, 1408, 8, 8, 2, 64
VIT_HIDDEN, VIT_MLP, VIT_LAYERS, VIT_HEADS, PATCH = 256, 1024, 4, 4, 14
LATENT_GRID, VIT_GRID, TEXT, EVALUATIONS = (16, 16), (18, 18), 32, 10


# Four layers of Qwen2.5-7B.
WIDE = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4}
WIDE |= {"num_attention_heads": 28, "num_key_value_heads": 4}


SYNTHESIS, TRAINING, GPU = ["tiny", "W1", "W2", "cache"], ["W4", "detach", "latents", "memory"], ["gpu"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder or repository; the bundled weights by default")
    parser.add_argument("--output", type=Path, default=None, help="where to write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--training", action="store_true", help="measure training steps")
    parser.add_argument("--steps", type=int, default=500, help="of `memory`")
    parser.add_argument("--only", nargs="+", choices=[*SYNTHESIS, *TRAINING, *GPU], default=None)
    args = parser.parse_args(argv)
    args.only = args.only or (TRAINING if args.training else SYNTHESIS)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The bundled weights
# ---------------------------------------------------------------------------------------------------------------------


def benchmark_tiny(args) -> dict:
    pipe = SynerMedGenPipeline.from_pretrained(args.model or checkpoint_path())
    pipe.set_progress_bar_config(disable=True)
    slices = list(simulate_case("brain", "synthrad", seed=2_000_000, num_slices=8).images["MRI"])
    options = {"target": "CT", "source": "MRI", "region": "brain", "output_type": "np", "seed": 0}
    options |= {"num_inference_steps": 20, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    pipe(slices[0], **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = medians(
        args.repeats,
        single=lambda: pipe(slices[0], **options),
        batch_of_8=lambda: pipe(slices, **options),
        eight_singles=lambda: [pipe(image, **options) for image in slices],
    )
    return {
        "seconds_one_synthesis": seconds["single"],
        "peak_memory_of_the_process_mb": peak / 1e6,
        "batch_of_8_to_8_singles": seconds["batch_of_8"] / seconds["eight_singles"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The mid-size model
# ---------------------------------------------------------------------------------------------------------------------


def make_pipeline(**widths: int) -> SynerMedGenPipeline:
    torch.manual_seed(0)
    special = ["bos", "eos", "pad", "vision_start", "vision_end", "image", "latent", "target"]
    config = SynerMedGenConfig(
        text_config={
            "vocab_size": 2048,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            **widths,
        },
        vision_config={
            "hidden_size": VIT_HIDDEN,
            "intermediate_size": VIT_MLP,
            "num_hidden_layers": VIT_LAYERS,
            "num_attention_heads": VIT_HEADS,
            "image_size": 70 * PATCH,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        **{f"{name}_token_id": 2040 + index for index, name in enumerate(special)},
    )
    model = SynerMedGenForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    # Only its number of levels matters here: it is never run.
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
    )
    pipe = SynerMedGenPipeline(model, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Synthesis:
    """One request: context [VAE 256+2][ViT 324+2][text 32+2], target 256+2."""

    def __init__(self, guided: bool):
        self.pipe = make_pipeline()
        self.scales = {"guidance_scale": 4.0, "image_guidance_scale": 1.5} if guided else {}
        self.scales = self.scales or {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1, 256, 64, generator=generator)
        self.latents = torch.randn(256, 64, generator=generator)
        patches = torch.randn(324, 3 * PATCH**2, generator=generator)
        self.source = SliceInputs(torch.zeros(3, 256, 256), patches, VIT_GRID, {}, {})
        self.text = TextBlock(list(range(TEXT)))

    def contexts(self):
        return self.pipe.make_contexts([[self.source]], [[self.latents]], self.text, *self.scales.values())

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        return self.pipe.denoise(
            self.noise, LATENT_GRID, *self.contexts(), num_inference_steps=EVALUATIONS, **self.scales
        )

    @torch.no_grad()
    def run_without_cache(self) -> torch.Tensor:
        """The full sequence at every step, context and target in one forward. Without guidance only."""
        pipe, config = self.pipe, self.pipe.model.config
        blocks = [ImageBlock("latent", LATENT_GRID), ImageBlock("image", VIT_GRID), self.text]
        sequence = build_sequence(config, [*blocks, ImageBlock("target", LATENT_GRID)])
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 0, EVALUATIONS + 1)[:-1])
        tokens = self.noise[0]
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            velocity = pipe.model(
                input_ids=torch.tensor([sequence.input_ids]),
                pixel_values=self.source.vit_patches,
                image_grid_hw=torch.tensor([VIT_GRID]),
                latents=torch.cat([self.latents, tokens]),
                latent_grid_hw=torch.tensor([LATENT_GRID] * 2),
                timestep=torch.tensor([0.0, float(pipe.scheduler.sigmas[step])]),
                use_cache=False,
            ).velocity
            tokens = pipe.scheduler.step(velocity, timestep, tokens).prev_sample
        return tokens[None]


class Ideal:
    """
    What one request cannot do without: its matrix products and attention calls, nothing between them.

    Weights and inputs are random buffers. Query, key and value are one product, gate and up another; all branches are
    one batch padded to the longest context, attended without a mask.
    """

    def __init__(self, guided: bool):
        self.buffers = {}
        self.generator = torch.Generator().manual_seed(0)
        latent, vit, text = 258, 326, TEXT + 2
        # Of each expert: (batch, rows, keys) of every block of the context.
        self.prefill = {
            "gen": [(1, latent, latent)],
            "und": [(1, vit, latent + vit), (1, text, latent + vit + text)],
        }
        if guided:
            self.prefill["und"].append((1, text, text))
        self.branches = 3 if guided else 1
        self.target, self.keys = 258, latent + vit + text + 258
        width = HIDDEN + 2 * KV_HEADS * HEAD
        shapes = {"qkv": (width, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * MLP, HIDDEN), "down": (HIDDEN, MLP)}
        self.experts = {
            (expert, layer, name): self.random(*shape)
            for expert in ("und", "gen")
            for layer in range(LAYERS)
            for name, shape in shapes.items()
        }
        shapes = {"qkv": (3 * VIT_HIDDEN, VIT_HIDDEN), "o": (VIT_HIDDEN, VIT_HIDDEN)}
        shapes |= {"fc1": (VIT_MLP, VIT_HIDDEN), "fc2": (VIT_HIDDEN, VIT_MLP)}
        self.vit = [{name: self.random(*shape) for name, shape in shapes.items()} for _ in range(VIT_LAYERS)]
        self.ends = [
            self.random(VIT_HIDDEN, 3 * PATCH**2),
            self.random(HIDDEN, VIT_HIDDEN),
            self.random(HIDDEN, HIDDEN),
        ]

    def random(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) / shape[-1] ** 0.5

    def buffer(self, *key) -> torch.Tensor:
        """A random buffer of a use and a shape, made on first use, that is, in the warm-up run."""
        if key not in self.buffers:
            self.buffers[key] = self.random(*key[1:])
        return self.buffers[key]

    def product(self, rows: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
        return torch.mm(rows, weight.t(), out=self.buffer(name, len(rows), len(weight)))

    def attend(self, query, batch: int, keys: int, heads: int, kv_heads: int) -> torch.Tensor:
        query = query.view(batch, -1, heads, query.shape[1] // heads).transpose(1, 2)
        key, value = (self.buffer(name, batch, kv_heads, keys, query.shape[-1]) for name in ("key", "value"))
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads)
        return attended.transpose(1, 2).reshape(-1, heads * query.shape[-1])

    def layer(self, blocks: list[tuple[int, int, int]], expert: str, layer: int):
        """One expert's share of a layer: its products over all rows at once, attention block by block."""
        weight = {name: self.experts[expert, layer, name] for name in ("qkv", "o", "gate_up", "down")}
        counts = [batch * rows for batch, rows, _ in blocks]
        hidden = self.buffer("hidden", sum(counts), HIDDEN)
        query = self.product(hidden, weight["qkv"], "qkv")[:, :HIDDEN]
        for part, (batch, _, keys) in zip(query.split(counts), blocks, strict=True):
            attended = self.attend(part, batch, keys, HEADS, KV_HEADS)
        self.product(attended if len(blocks) == 1 else hidden, weight["o"], "o")
        self.product(self.product(hidden, weight["gate_up"], "gate_up")[:, :MLP], weight["down"], "down")

    @torch.no_grad()
    def run(self):
        hidden = self.product(self.buffer("pixels", 324, 3 * PATCH**2), self.ends[0], "patches")
        for weight in self.vit:
            query = self.product(hidden, weight["qkv"], "vit_qkv")[:, :VIT_HIDDEN]
            self.product(self.attend(query, 1, 324, VIT_HEADS, VIT_HEADS), weight["o"], "vit_o")
            self.product(self.product(hidden, weight["fc1"], "fc1"), weight["fc2"], "fc2")
        self.product(self.product(hidden, self.ends[1], "connector"), self.ends[2], "features")
        for layer in range(LAYERS):
            for expert, blocks in self.prefill.items():
                self.layer(blocks, expert, layer)
        for _ in range(EVALUATIONS):
            for layer in range(LAYERS):
                self.layer([(self.branches, self.target, self.keys)], "gen", layer)


def benchmark_ideal(args, guided: bool) -> dict:
    ours, ideal = Synthesis(guided), Ideal(guided)
    seconds = medians(args.repeats, ours=ours.run, ideal=ideal.run)
    return {"seconds": seconds["ours"], "seconds_ideal": seconds["ideal"], "ratio": seconds["ours"] / seconds["ideal"]}


def benchmark_cache(args) -> dict:
    synthesis = Synthesis(guided=False)
    torch.testing.assert_close(synthesis.run(), synthesis.run_without_cache(), atol=1e-4, rtol=1e-4)
    seconds = medians(args.repeats, cached=synthesis.run, recomputed=synthesis.run_without_cache)
    return {"seconds_cached": seconds["cached"], "recomputed_to_cached": seconds["recomputed"] / seconds["cached"]}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class TrainingStep:
    """Forward and backward of 8 samples: [VAE 256+2][ViT 324+2][text 32+2], target 256+2."""

    ROWS = 8
    GENERATION, UNDERSTANDING = 512, 364  # tokens of a sample

    def __init__(self, device: str = "cpu", **widths: int):
        self.model = make_pipeline(**widths).model.to(device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(part_of(name) == "generation")
        blocks = [ImageBlock("latent", LATENT_GRID), ImageBlock("image", VIT_GRID), TextBlock(list(range(TEXT)))]
        sequence = build_sequence(self.model.config, [*blocks, ImageBlock("target", LATENT_GRID)])
        generator = torch.Generator().manual_seed(0)
        batch = pad_sequences(self.model.config, [sequence] * self.ROWS)
        del batch["labels"]
        batch |= {
            "pixel_values": torch.randn(self.ROWS * 324, 3 * PATCH**2, generator=generator),
            "image_grid_hw": torch.tensor([VIT_GRID] * self.ROWS),
            "latents": torch.randn(self.ROWS * 512, 64, generator=generator),
            "latent_grid_hw": torch.tensor([LATENT_GRID] * (2 * self.ROWS)),
            "timestep": torch.tensor([0.0, 0.5] * self.ROWS),
            "velocity_labels": torch.randn(self.ROWS * 256, 64, generator=generator),
        }
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}

    def run(self, detach: bool = True):
        self.model.zero_grad(set_to_none=True)
        self.model(**self.batch, detach_understanding=detach).loss.backward()

    def operations(self) -> float:
        """
        Of the matrix products of both experts and of attention: forward, and backward through the generation expert
        twice as many. The ViT, norms and rotations are left out.
        """
        text, length = self.model.config.text_config, self.GENERATION + self.UNDERSTANDING
        head = text.hidden_size // text.num_attention_heads
        attention = text.hidden_size * (2 * text.hidden_size + 2 * head * text.num_key_value_heads)
        expert = attention + 3 * text.hidden_size * text.intermediate_size
        products = 2 * expert * (3 * self.GENERATION + self.UNDERSTANDING)
        attended = 4 * length * (length + 2 * self.GENERATION) * text.hidden_size
        return self.ROWS * text.num_hidden_layers * (products + attended)

    def kept_mb(self, detach: bool) -> float:
        """What the forward pass keeps for the backward pass, parameters left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.model(**self.batch, detach_understanding=detach).loss
        del loss
        return sum(size for place, size in kept.items() if place not in own) / 1e6


class IdealTrainingStep(Ideal):
    """
    The bare products of [`TrainingStep`]: both experts and the ViT forward, the gradients of the generation expert's
    inputs and weights, and attention of all tokens to all tokens, forward and backward, without a mask.
    """

    ROWS, GENERATION, UNDERSTANDING = TrainingStep.ROWS, TrainingStep.GENERATION, TrainingStep.UNDERSTANDING

    def __init__(self):
        super().__init__(guided=False)
        length = self.GENERATION + self.UNDERSTANDING
        self.heads = [
            self.random(self.ROWS, heads, length, HEAD).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        self.attended_gradient = self.random(self.ROWS, HEADS, length, HEAD)

    def backward(self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, name: str):
        """Gradients of a product's inputs and of its weight."""
        torch.mm(gradient, weight, out=self.buffer(name + "_inputs", len(gradient), weight.shape[1]))
        torch.mm(gradient.t(), inputs, out=self.buffer(name + "_weight", *weight.shape))

    @torch.no_grad()
    def run(self):
        images = self.ROWS
        hidden = self.product(self.buffer("pixels", images * 324, 3 * PATCH**2), self.ends[0], "patches")
        for weight in self.vit:
            query = self.product(hidden, weight["qkv"], "vit_qkv")[:, :VIT_HIDDEN]
            self.product(self.attend(query, images, 324, VIT_HEADS, VIT_HEADS), weight["o"], "vit_o")
            self.product(self.product(hidden, weight["fc1"], "fc1"), weight["fc2"], "fc2")
        self.product(self.product(hidden, self.ends[1], "connector"), self.ends[2], "features")
        attended = []
        for layer in range(LAYERS):
            for expert, tokens in (("und", self.UNDERSTANDING), ("gen", self.GENERATION)):
                rows = self.buffer(f"rows_{expert}", images * tokens, HIDDEN)
                weight = {name: self.experts[expert, layer, name] for name in ("qkv", "o", "gate_up", "down")}
                self.product(rows, weight["qkv"], f"qkv_{expert}")
                self.product(rows, weight["o"], f"o_{expert}")
                gate = self.product(rows, weight["gate_up"], f"gate_up_{expert}")[:, :MLP]
                self.product(gate, weight["down"], f"down_{expert}")
            with torch.enable_grad():
                attended.append(F.scaled_dot_product_attention(*self.heads, enable_gqa=True))
        rows, width = images * self.GENERATION, HIDDEN + 2 * KV_HEADS * HEAD
        hidden, inner = self.buffer("rows_gen", rows, HIDDEN), self.buffer("inner", rows, MLP)
        gradients = {size: self.buffer(f"gradient_{size}", rows, size) for size in (HIDDEN, 2 * MLP, width)}
        for layer in reversed(range(LAYERS)):
            weight = {name: self.experts["gen", layer, name] for name in ("qkv", "o", "gate_up", "down")}
            self.backward(gradients[HIDDEN], inner, weight["down"], "down")
            self.backward(gradients[2 * MLP], hidden, weight["gate_up"], "gate_up")
            self.backward(gradients[HIDDEN], hidden, weight["o"], "o")
            torch.autograd.grad(attended.pop(), self.heads, self.attended_gradient)
            self.backward(gradients[width], hidden, weight["qkv"], "qkv")


def benchmark_step(args) -> dict:
    ours, ideal = TrainingStep(), IdealTrainingStep()
    seconds = medians(args.repeats, ours=ours.run, ideal=ideal.run)
    return {
        "pairs_per_second": ours.ROWS / seconds["ours"],
        "seconds": seconds["ours"],
        "seconds_ideal": seconds["ideal"],
        "ratio": seconds["ours"] / seconds["ideal"],
    }


def benchmark_gpu(args) -> dict:
    if not torch.cuda.is_available():
        raise SystemExit("`gpu` needs a GPU that torch can use; see `synermedgen doctor`.")
    return measure_wide("cuda", args.repeats, WIDE, 8192)


def measure_wide(device: str, repeats: int, widths: dict[str, int], side: int) -> dict:
    step, factor = TrainingStep(device, **widths), torch.randn(side, side, device=device, dtype=torch.bfloat16)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def train():
        with torch.autocast(device, torch.bfloat16):
            step.run()
        wait()

    def multiply():
        factor @ factor
        wait()

    seconds = medians(repeats, train=train, multiply=multiply)
    reached, peak = step.operations() / seconds["train"], 2 * side**3 / seconds["multiply"]
    return {
        "tokens_per_second": step.batch["input_ids"].numel() / seconds["train"],
        "tflop_per_second": reached / 1e12,
        "share_of_a_bare_product": reached / peak,
    }


def benchmark_detach(args) -> dict:
    step = TrainingStep()
    seconds = medians(args.repeats, detached=step.run, through=lambda: step.run(detach=False))
    kept = {name: step.kept_mb(detach) for name, detach in (("detached", True), ("through", False))}
    return {
        "seconds_detached": seconds["detached"],
        "passing_through_to_detached": seconds["through"] / seconds["detached"],
        "kept_for_backward_detached_mb": kept["detached"],
        "kept_passing_through_to_detached": kept["through"] / kept["detached"],
    }


def training_batches(pipe, encoder: SliceEncoder, keep: bool) -> PairBatches:
    """Batches of 8 from one simulated patient."""
    rows = phantom_rows([simulate_case("brain", "synthrad", seed=2_000_000, num_slices=8)])
    pool = PairPool(rows, encoder, keep=keep)
    pool.encode_all(progress=False)
    return PairBatches(pool, pipe.processor, pipe.model.config, 8)


def training_pipeline(args):
    pipe = SynerMedGenPipeline.from_pretrained(args.model or checkpoint_path(), dtype=torch.float32)
    for name, parameter in pipe.model.named_parameters():
        parameter.requires_grad_(part_of(name) == "generation")
    pipe.vae.requires_grad_(False)
    return pipe


def train_on(pipe, batches: PairBatches, number: int):
    pipe.model.zero_grad(set_to_none=True)
    for samples in batches.step(number):
        pipe.model(**batches.collate(samples), detach_understanding=True).loss.backward()


def benchmark_latents(args) -> dict:
    pipe = training_pipeline(args)
    plain = SliceEncoder(pipe.vae, pipe.processor.image_processor)
    with tempfile.TemporaryDirectory() as folder:
        cached = SliceEncoder(pipe.vae, pipe.processor.image_processor, cache_dir=folder)
        ways = {
            "memory": training_batches(pipe, plain, keep=True),
            "disk": training_batches(pipe, cached, keep=False),
            "encoded_anew": training_batches(pipe, plain, keep=False),
        }
        collate = {
            name: lambda own=own: [own.collate(samples) for samples in own.step(0)] for name, own in ways.items()
        }
        seconds = medians(args.repeats, step=lambda: train_on(pipe, ways["memory"], 0), **collate)
    figures = {f"{name}_to_step": seconds[name] / seconds["step"] for name in ways}
    return {"seconds_step_with_latents_in_memory": seconds["step"], **figures}


def benchmark_memory(args) -> dict:
    pipe = training_pipeline(args)
    batches = training_batches(pipe, SliceEncoder(pipe.vae, pipe.processor.image_processor), keep=True)
    process, early = psutil.Process(), 0
    for number in tqdm(range(args.steps), desc="memory"):
        train_on(pipe, batches, number)
        if number == args.steps // 5:  # allocators have seen every shape by then
            early = process.memory_info().rss
    late = process.memory_info().rss
    return {"memory_mb": late / 1e6, "memory_at_the_end_to_after_a_fifth": late / early}


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    }
    # The bundled weights first: the peak memory of the process is then theirs.
    work = {
        "tiny": benchmark_tiny,
        "W1": lambda args: benchmark_ideal(args, guided=True),
        "W2": lambda args: benchmark_ideal(args, guided=False),
        "cache": benchmark_cache,
        "W4": benchmark_step,
        "gpu": benchmark_gpu,
        "detach": benchmark_detach,
        "latents": benchmark_latents,
        "memory": benchmark_memory,
    }
    for name, measure in work.items():
        if name in args.only:
            result[name] = measure(args)
    print("\n| item | figure | value |\n|---|---|---|")
    for name in args.only:
        for figure, value in result[name].items():
            print(f"| {name} | {figure.replace('_', ' ')} | {value:.3g} |")
    print("\n" + json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
