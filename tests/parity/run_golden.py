"""Compare this implementation with recorded outputs of the original modules.

    python tests/parity/run_golden.py tests/parity/golden_a

DIR holds a fixture in the golden format: `config.json` (plain numbers), `model.safetensors` and `ae.safetensors`
(native names), `cases.safetensors` / `cases.json` (inputs and outputs), `train_grads.json`, `layouts.json`,
`transforms.json`.
One line is printed per case with its largest error. The exit code is 1 if any case is outside atol = rtol = 1e-4
(gradient norms: rtol 1e-3, atol 1e-5; 8-bit images: one level; token ids, layouts and sizes: exactly).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from native import write_native
from PIL import Image
from safetensors.torch import load_file

from synermedgen_hf.bagel import FIXED_TABLES, convert_bagel, rename_model_key
from synermedgen_hf.image_processing_synermedgen import patchify, picture_pixels, resize_shape, unpatchify
from synermedgen_hf.loading_synermedgen import part_of
from synermedgen_hf.modeling_synermedgen import (
    allowed_attention,
    grid_ids,
    read_layout,
)
from synermedgen_hf.pipeline_synermedgen import Context, SynerMedGenPipeline
from synermedgen_hf.processing_synermedgen import ImageBlock, TextBlock, build_sequence

TOLERANCE = 1e-4
Result = tuple[str, float, bool]


def close(name: str, ours, theirs, atol: float = TOLERANCE, rtol: float = TOLERANCE) -> Result:
    ours, theirs = torch.as_tensor(ours).detach().float(), torch.as_tensor(theirs).float()
    if ours.shape != theirs.shape:
        return f"{name} (shape {tuple(ours.shape)} instead of {tuple(theirs.shape)})", float("inf"), False
    error = (ours - theirs).abs()
    return name, error.max().item() if error.numel() else 0.0, bool((error <= atol + rtol * theirs.abs()).all())


def same(name: str, ours, theirs) -> Result:
    ours = ours.tolist() if isinstance(ours, torch.Tensor) else ours
    theirs = theirs.tolist() if isinstance(theirs, torch.Tensor) else theirs
    return name, float(ours != theirs), ours == theirs


class Golden:
    """One fixture folder and the models it describes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.numbers = self.json("config")
        self.cases = self.json("cases")
        self.tensors = load_file(folder / "cases.safetensors")
        with tempfile.TemporaryDirectory() as work:
            native, converted = Path(work) / "native", Path(work) / "converted"
            write_native(folder, native)
            numbers = self.numbers
            convert_bagel(
                native,
                converted,
                vae_scale=numbers["vae"]["scale_factor"],
                vae_shift=numbers["vae"]["shift_factor"],
                timestep_shift=numbers["bagel"]["timestep_shift"],
            )
            self.pipe = SynerMedGenPipeline.from_pretrained(converted, print_report=False)
        self.model, self.vae, self.config = self.pipe.model, self.pipe.vae, self.pipe.model.config
        stored = load_file(folder / "model.safetensors")
        self.native_names = {rename_model_key(name): name for name in stored if name not in FIXED_TABLES}
        self.fixed_tables = {name: stored[name] for name in FIXED_TABLES}
        self.pipe.set_progress_bar_config(disable=True)
        self.vit_patch, self.latent_patch = self.config.vision_config.patch_size, self.config.latent_patch_size

    def json(self, name: str):
        return json.loads((self.folder / f"{name}.json").read_text())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def vit_input(self, image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        return patchify(image, self.vit_patch), (image.shape[1] // self.vit_patch, image.shape[2] // self.vit_patch)

    def latent_tokens(self, latent: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Cut to whole patches: `(tokens, channels)` and the grid."""
        patch = self.latent_patch
        grid = (latent.shape[1] // patch, latent.shape[2] // patch)
        return patchify(latent[:, : grid[0] * patch, : grid[1] * patch], patch), grid

    def prefill(self, plan: list[dict], block_by_block: bool = False) -> Context:
        """The context of a plan of `cases.json`: in one pass, or block after block through the cache."""
        blocks, images, latents = [], [], []
        for item in plan:
            if item["type"] == "text":
                blocks.append(TextBlock(item["ids"]))
            elif item["type"] == "vit":
                images.append(self.vit_input(self[item["image"]]))
                blocks.append(ImageBlock("image", images[-1][1]))
            else:
                latents.append(self.latent_tokens(self[item["latent"]]))
                blocks.append(ImageBlock("latent", latents[-1][1]))
        sequence = build_sequence(self.config, blocks)
        if not block_by_block:
            return self.pipe.prefill([sequence], images, latents)
        cache, start, hidden = None, 0, []
        images, latents = iter(images), iter(latents)
        for kind, length in zip(sequence.kinds, sequence.lengths, strict=True):
            inputs = {}
            if kind == "image":
                patches, grid = next(images)
                inputs = {"pixel_values": patches, "image_grid_hw": torch.tensor([grid])}
            elif kind == "latent":
                tokens, grid = next(latents)
                inputs = {"latents": tokens, "latent_grid_hw": torch.tensor([grid]), "timestep": torch.zeros(1)}
            outputs = self.model.model(
                input_ids=torch.tensor([sequence.input_ids[start : start + length]]),
                position_ids=torch.tensor([sequence.position_ids[start : start + length]]),
                past_key_values=cache,
                use_cache=True,
                **inputs,
            )
            cache, start = outputs.past_key_values, start + length
            hidden.append(outputs.last_hidden_state[0])
        context = Context(cache, torch.tensor([sequence.next_position]))
        return context, torch.cat(hidden), sequence


def blocks(golden: Golden) -> Iterator[Result]:
    model = golden.model.model
    t = golden["blocks.timesteps"]
    yield close("blocks.timestep_sinusoid", model.time_embedder.sinusoid(t), golden["blocks.timestep_sinusoid"])
    yield close("blocks.timestep_embed", model.time_embedder(t), golden["blocks.timestep_embed"])
    patches, grid = golden.vit_input(golden["blocks.vit_image"])
    grids = torch.tensor([grid])
    ids = grid_ids(grids, golden.config.vision_patches_per_side, "ViT")
    yield close("blocks.vit_patches", patches, golden["blocks.vit_patches"])
    yield same("blocks.vit_position_ids", ids, golden["blocks.vit_position_ids"])
    features = model.get_image_features(patches, grids)
    yield close("blocks.vit_last_hidden", features.last_hidden_state, golden["blocks.vit_last_hidden"])
    yield close("blocks.connector_out", model.connector(features.last_hidden_state), golden["blocks.connector_out"])
    yield close("blocks.vit_llm_embed", features.pooler_output[0], golden["blocks.vit_llm_embed"])
    for name, table in golden.fixed_tables.items():
        yield close(f"blocks.{name}", getattr(model, name.split(".")[0]).table, table)


def vae(golden: Golden) -> Iterator[Result]:
    posterior = golden.vae.encode(golden["vae.images"]).latent_dist
    scale, shift = golden.vae.config.scaling_factor, golden.vae.config.shift_factor
    yield close("vae.moments", posterior.parameters, golden["vae.moments"])
    yield close("vae.mean", posterior.mean, golden["vae.mean"])
    yield close("vae.logvar", posterior.logvar, golden["vae.logvar"])
    sample = golden.pipe.encode_latents(golden["vae.images"], golden["vae.eps"])
    yield close("vae.latent_sample", sample, golden["vae.latent_sample"])
    yield close("vae.latent_mode", scale * (posterior.mode() - shift), golden["vae.latent_mode"])
    for kind in ("sample", "mode"):
        decoded = golden.pipe.decode_latents(golden[f"vae.latent_{kind}"])
        yield close(f"vae.decoded_from_{kind}", decoded, golden[f"vae.decoded_from_{kind}"])


def cache_results(name: str, golden: Golden, context: Context) -> Iterator[Result]:
    for index, layer in enumerate(context.cache.layers):
        yield close(f"{name}.k.{index}", layer.keys[0].transpose(0, 1), golden[f"{name}.k.{index}"])
        yield close(f"{name}.v.{index}", layer.values[0].transpose(0, 1), golden[f"{name}.v.{index}"])


def understanding(golden: Golden) -> Iterator[Result]:
    plan, text = golden.cases["und"]["plan"], golden["und.text_indexes"]
    context, hidden, sequence = golden.prefill(plan, block_by_block=True)
    positions = torch.tensor(sequence.position_ids)
    ids = torch.tensor(sequence.input_ids)
    is_image = ids == golden.config.image_token_id
    yield same("und.token_ids", ids.masked_fill(is_image, -1), golden["und.token_ids"])
    yield same("und.position_ids", positions, golden["und.position_ids"])
    yield same("und.read_layout", read_layout(golden.config, ids[None]).positions[0], golden["und.position_ids"])
    yield same(
        "und.state",
        [context.cache.get_seq_length(), int(context.position)],
        [golden.cases["und"][key] for key in ("kv_len", "next_rope")],
    )
    yield close("und.cached.final_hidden", hidden, golden["und.cached.final_hidden"])
    yield close("und.cached.logits", golden.model.lm_head(hidden[text]), golden["und.cached.logits"])
    yield from cache_results("und.cache", golden, context)
    images = [golden.vit_input(golden[item["image"]]) for item in plan if item["type"] == "vit"]
    outputs = golden.model(
        input_ids=ids[None],
        pixel_values=torch.cat([patches for patches, _ in images]),
        image_grid_hw=torch.tensor([grid for _, grid in images]),
        output_hidden_states=True,
    )
    yield close("und.train.embed_in", outputs.hidden_states[0][0], golden["und.train.embed_in"])
    for index, layer_out in enumerate(outputs.hidden_states[1:]):
        yield close(f"und.train.layer_out.{index}", layer_out[0], golden[f"und.train.layer_out.{index}"])
    yield close("und.train.logits", outputs.logits[0, text], golden["und.train.logits"])
    joint = golden.model.model(
        input_ids=ids[None],
        pixel_values=torch.cat([patches for patches, _ in images]),
        image_grid_hw=torch.tensor([grid for _, grid in images]),
    )
    yield close("und.train.final_hidden", joint.last_hidden_state[0], golden["und.train.final_hidden"])


def greedy(golden: Golden, plan: list[dict], max_length: int, stop: int | None) -> tuple[list[int], torch.Tensor]:
    """BOS and the greedy answer as the original returns it, and the logits of every step."""
    blocks, images = [], []
    for item in plan:
        if item["type"] == "text":
            blocks.append(TextBlock(item["ids"]))
        else:
            images.append(golden.vit_input(golden[item["image"]]))
            blocks.append(ImageBlock("image", images[-1][1]))
    prompt = [*build_sequence(golden.config, blocks).input_ids, golden.config.bos_token_id]
    outputs = golden.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pixel_values=torch.cat([patches for patches, _ in images]),
        image_grid_hw=torch.tensor([grid for _, grid in images]),
        max_new_tokens=max_length,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = outputs.sequences[0, len(prompt) :].tolist()
    ids = [golden.config.bos_token_id, *answer[:-1]]
    return ids, torch.cat(outputs.logits)


def text(golden: Golden) -> Iterator[Result]:
    plan, case = golden.cases["und"]["plan"], golden.cases["text"]
    # The recorded run has no end token, so an EOS in its midst is a word like any other.
    ids, logits = greedy(golden, plan, case["max_length"], None)
    yield same("text.ids", ids, golden["text.ids"])
    yield close("text.logits", logits, golden["text.logits"])
    ids, logits = greedy(golden, plan, case["max_length"], case["stop"]["end_token_id"])
    yield same("text.stop.ids", ids, golden["text.stop.ids"])
    yield close("text.stop.logits", logits, golden["text.stop.logits"])


def generation_contexts(golden: Golden) -> dict[str, Context]:
    case = golden.cases["gen"]
    plan = case["plan"]
    texts = [item for item in plan if item["type"] == "text"]
    last_text = max(index for index, item in enumerate(plan) if item["type"] == "text")
    return {
        "ctx": golden.prefill(plan),
        "cfg_text": golden.prefill([item for index, item in enumerate(plan) if index != last_text]),
        "cfg_img": golden.prefill(texts),
        "t2i": golden.prefill([{"type": "text", "ids": case["t2i_ids"]}]),
        "uncond": golden.prefill([]),
    }


def target_grid(golden: Golden) -> tuple[int, int]:
    return tuple(golden.cases["gen"]["target_grid"])


def velocities(golden: Golden) -> Iterator[Result]:
    case, contexts = golden.cases["gen"], generation_contexts(golden)
    for index, item in enumerate(item for item in case["plan"] if item["type"] == "vae"):
        latent = golden.pipe.encode_latents(golden[item["image"]][None], golden[f"gen.vae_eps.{index}"][None])[0]
        yield close(f"gen.vae_latent.{index}", latent, golden[item["latent"]])
        ids = grid_ids(torch.tensor([golden.latent_tokens(latent)[1]]), golden.config.max_latent_size, "latent")
        yield same(f"gen.vae_position_ids.{index}", ids, golden[f"gen.vae_position_ids.{index}"])
    yield from cache_results("gen.cache", golden, contexts["ctx"])
    for name, key in (("ctx", "gen"), ("cfg_text", "cfg_text"), ("cfg_img", "cfg_img")):
        state = [contexts[name].cache.get_seq_length(), int(contexts[name].position)]
        yield same(f"gen.state.{name}", state, [case[key]["kv_len"], case[key]["rope"]])
    block_by_block = golden.prefill(case["plan"], block_by_block=True)[0]
    yield from (
        (f"{name} (block by block)", *rest) for name, *rest in cache_results("gen.cache", golden, block_by_block)
    )

    grid, x_t, t_values = target_grid(golden), golden["gen.x_t"], case["t_values"]
    yield same(
        "gen.latent_position_ids",
        grid_ids(torch.tensor([grid]), golden.config.max_latent_size, "latent"),
        golden["gen.latent_position_ids"],
    )
    context = contexts["ctx"]
    target = build_sequence(golden.config, [ImageBlock("target", grid)])
    positions = context.position[:, None].expand(-1, len(target.input_ids))
    yield same("gen.query_position_ids", positions[0], golden["gen.query_position_ids"])
    outputs = golden.model.model(
        input_ids=torch.tensor([target.input_ids]),
        position_ids=positions,
        past_key_values=context.cache,
        latents=x_t,
        latent_grid_hw=torch.tensor([grid]),
        timestep=torch.tensor([t_values[1]]),
        output_hidden_states=True,
    )
    yield close("gen.query_in", outputs.hidden_states[0][0], golden["gen.query_in"])
    yield close("gen.query_hidden", outputs.last_hidden_state[0], golden["gen.query_hidden"])
    for name, context in contexts.items():
        for index, t in enumerate(t_values):
            velocity = golden.pipe.velocity(x_t[None], t, [context], grid)[0][0]
            yield close(f"gen.v_t.{name}.{index}", velocity, golden[f"gen.v_t.{name}.{index}"])


def sample(golden: Golden, options: dict, full: Context, no_text: Context, no_image: Context, noise, grid):
    """One run: the timesteps, the guided velocities and the final tokens."""
    states = [noise]
    final = golden.pipe.denoise(
        noise[None],
        grid,
        full,
        no_text,
        no_image,
        num_inference_steps=options["num_timesteps"] - 1,
        guidance_scale=options["cfg_text_scale"],
        image_guidance_scale=options["cfg_img_scale"],
        guidance_interval=options["cfg_interval"],
        guidance_rescale=options["cfg_renorm_type"],
        guidance_rescale_min=options["cfg_renorm_min"],
        timestep_shift=options["timestep_shift"],
        callback_on_step_end=lambda pipe, step, timestep, kwargs: states.append(kwargs["latents"][0]),
    )[0]
    sigmas = golden.pipe.scheduler.sigmas
    steps = [(states[i] - states[i + 1]) / (sigmas[i] - sigmas[i + 1]) for i in range(len(states) - 1)]
    return sigmas[:-1], torch.stack(steps), final


def sampling(golden: Golden) -> Iterator[Result]:
    case, contexts, grid = golden.cases["sample"], generation_contexts(golden), target_grid(golden)
    noise = golden["sample.init_noise"]
    finals = {}
    for name, options in case["runs"].items():
        t, v, final = sample(golden, options, contexts["ctx"], contexts["cfg_text"], contexts["cfg_img"], noise, grid)
        finals[name] = final
        yield close(f"sample.{name}.t", t, golden[f"sample.{name}.t"])
        yield close(f"sample.{name}.v", v, golden[f"sample.{name}.v"])
        yield close(f"sample.{name}.final", final, golden[f"sample.{name}.final"])
    t2i, empty = contexts["t2i"], contexts["uncond"]
    _, v, final = sample(golden, case["runs_t2i"], t2i, empty, t2i, noise, grid)
    yield close("sample.t2i.v", v, golden["sample.t2i.v"])
    yield close("sample.t2i.final", final, golden["sample.t2i.final"])
    latent = unpatchify(finals["text_channel"], grid, golden.latent_patch)
    decoded = golden.pipe.decode_latents(latent[None])[0]
    yield close("sample.text_channel.latent_chw", latent, golden["sample.text_channel.latent_chw"])
    yield close("sample.text_channel.decoded_float", decoded, golden["sample.text_channel.decoded_float"])
    yield close(
        "sample.text_channel.decoded_uint8", to_uint8(decoded), golden["sample.text_channel.decoded_uint8"], 1, 0
    )


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """As the original writes pictures: truncated, not rounded."""
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)


def end_to_end(golden: Golden) -> Iterator[Result]:
    case = golden.cases["e2e"]
    limits = {"max_pixels": 14 * 14 * 9 * 1024}
    vae_size, vit_size = {**case["vae_transform"], **limits}, {**case["vit_transform"], **limits}
    picture = Image.fromarray(golden["e2e.image_uint8"].numpy())
    height, width = resize_shape(picture.height, picture.width, **vae_size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    yield close("e2e.resized_uint8", np.array(resized), golden["e2e.resized_uint8"], 0, 0)
    vae_input, vit_input = picture_pixels(resized, vae_size), picture_pixels(resized, vit_size)
    yield close("e2e.vae_input", vae_input, golden["e2e.vae_input"])
    yield close("e2e.vit_input", vit_input, golden["e2e.vit_input"])

    tokens, grid = golden.latent_tokens(golden.pipe.encode_latents(vae_input[None], golden["e2e.vae_eps"][None])[0])
    patches, vit_grid = golden.vit_input(vit_input)
    prompt = TextBlock(case["prompt_ids"])
    vision = [ImageBlock("latent", grid), ImageBlock("image", vit_grid)]

    def prefill(blocks, with_images):
        sequence = [build_sequence(golden.config, blocks)]
        inputs = ([(patches, vit_grid)], [(tokens, grid)]) if with_images else ()
        return golden.pipe.prefill(sequence, *inputs)

    _, _, final = sample(
        golden,
        case["edit"],
        prefill([*vision, prompt], True),
        prefill(vision, True),
        prefill([prompt], False),
        golden["e2e.init_noise"],
        grid,
    )
    yield close("e2e.edit.final", final, golden["e2e.edit.final"])
    decoded = golden.pipe.decode_latents(unpatchify(final, grid, golden.latent_patch)[None])[0]
    yield close("e2e.edit.image_uint8", to_uint8(decoded), golden["e2e.edit.image_uint8"], 1, 0)

    golden.tensors["e2e.vit_own"] = vit_input
    plan = [{"type": "vit", "image": "e2e.vit_own"}, {"type": "text", "ids": prompt.ids}]
    ids, _ = greedy(golden, plan, case["und"]["max_think_token_n"], golden.config.eos_token_id)
    # The recorded answer is without BOS; whether one in its midst went too, its record does not say.
    answers = [
        [i for i in answer if i != golden.config.bos_token_id] for answer in (ids, golden["e2e.und.ids"].tolist())
    ]
    yield same("e2e.und.ids", *answers)


def training_batch(golden: Golden) -> tuple[dict[str, torch.Tensor], list]:
    """The packed samples as rows of one right-padded batch."""
    case, config = golden.cases["train"], golden.config
    latent_shapes = iter(zip(case["patchified_vae_latent_shapes"], golden["train.padded_latent"], strict=True))
    t_tokens, noise = golden["train.t"], golden["train.noise"]
    rows, pixel_values, image_grids, latents, latent_grids, timesteps, labels_v = [], [], [], [], [], [], []
    start = 0
    for row in case["samples"]:
        texts, images = iter(row["text_ids"]), iter(row["images"])
        blocks = []
        for item in row["plan"]:
            if item["type"] == "text":
                blocks.append(TextBlock(next(texts), learned=bool(item["loss"])))
                continue
            image = golden[next(images)]
            if item["type"] == "vit_image":
                patches, grid = golden.vit_input(image)
                pixel_values.append(patches)
                image_grids.append(grid)
                blocks.append(ImageBlock("image", grid))
                continue
            grid, latent = next(latent_shapes)
            p, count = golden.latent_patch, grid[0] * grid[1]
            clean = patchify(latent[:, : grid[0] * p, : grid[1] * p], p)
            t = t_tokens[start].item()
            eps = noise[start : start + count]
            latents.append((1 - t) * clean + t * eps)
            latent_grids.append(grid)
            timesteps.append(t)
            if item["loss"]:
                labels_v.append(eps - clean)
            blocks.append(ImageBlock("target" if item["loss"] else "latent", tuple(grid)))
            start += count
        rows.append(build_sequence(config, blocks))
    length = max(len(row.input_ids) for row in rows)

    def pad(values, filler):
        return torch.tensor([value + [filler] * (length - len(value)) for value in values])

    batch = {
        "input_ids": pad([row.input_ids for row in rows], 0),
        "attention_mask": pad([[1] * len(row.input_ids) for row in rows], 0),
        "position_ids": pad([row.position_ids for row in rows], 0),
        "labels": pad([row.labels for row in rows], -100),
    }
    if pixel_values:
        batch |= {"pixel_values": torch.cat(pixel_values), "image_grid_hw": torch.tensor(image_grids)}
    if latents:
        batch |= {"latents": torch.cat(latents), "latent_grid_hw": torch.tensor(latent_grids)}
        batch |= {"timestep": torch.tensor(timesteps), "velocity_labels": torch.cat(labels_v)}
    return batch, rows


def packing(golden: Golden, batch: dict[str, torch.Tensor], rows: list) -> Iterator[Result]:
    """The rows of the batch, laid end to end, are the recorded pack."""
    case, config = golden.cases["train"], golden.config
    real = batch["attention_mask"].bool()
    ids = batch["input_ids"][real]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)[real]
    is_vit, is_target = ids == config.image_token_id, ids == config.target_token_id
    is_latent = is_target | (ids == config.latent_token_id)
    is_text = ~is_vit & ~is_latent
    packed = {
        "packed_text_ids": ids[is_text],
        "packed_text_indexes": is_text.nonzero().flatten(),
        "packed_vae_token_indexes": is_latent.nonzero().flatten(),
        "mse_loss_indexes": is_target.nonzero().flatten(),
        "ce_loss_indexes": (labels != -100).nonzero().flatten(),
    }
    if "pixel_values" in batch:
        grids = batch["image_grid_hw"]
        packed["packed_vit_token_indexes"] = is_vit.nonzero().flatten()
        packed["packed_vit_position_ids"] = grid_ids(grids, config.vision_patches_per_side, "ViT")
        packed["vit_token_seqlens"] = grids.prod(1)
        yield close("train.packed_vit_tokens", batch["pixel_values"], golden["train.packed_vit_tokens"])
    if "latents" in batch:
        packed["packed_latent_position_ids"] = grid_ids(batch["latent_grid_hw"], config.max_latent_size, "latent")
        latent = golden.pipe.encode_latents(golden["train.padded_images"], golden["train.vae_eps"])
        yield close("train.padded_latent", latent, golden["train.padded_latent"])
    for name, ours in packed.items():
        yield same(f"train.{name}", ours, golden[f"train.{name}"])
    modes = {"text": "causal", "image": "full", "latent": "full", "target": "noise"}
    splits = [[[n, modes[kind]] for kind, n in zip(row.kinds, row.lengths, strict=True)] for row in rows]
    yield same("train.splits_per_sample", splits, case["splits_per_sample"])


def training(golden: Golden) -> Iterator[Result]:
    case, config = golden.cases["train"], golden.config
    batch, rows = training_batch(golden)
    yield from packing(golden, batch, rows)
    real = batch["attention_mask"].bool()
    yield same("train.packed_position_ids", batch["position_ids"][real], golden["train.packed_position_ids"])
    layout = read_layout(config, batch["input_ids"], real)
    yield same("train.read_layout", layout.positions[real], golden["train.packed_position_ids"])
    index = torch.arange(real.shape[1]).expand(len(rows), -1)
    allowed = allowed_attention(layout, index, index, real)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        yield same(f"train.allowed.{number}", allowed[number, 0, :length, :length], golden[f"train.allowed.{number}"])
    u = golden["train.packed_timesteps"]
    t = u.sigmoid()
    shift = config.timestep_shift
    yield close("train.t", shift * t / (1 + (shift - 1) * t), golden["train.t"])

    outputs = golden.model(**batch, output_hidden_states=True)
    yield close("train.embed_in", outputs.hidden_states[0][real], golden["train.embed_in"])
    for number, layer_out in enumerate(outputs.hidden_states[1:]):
        yield close(f"train.layer_out.{number}", layer_out[real], golden[f"train.layer_out.{number}"])
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "velocity_labels")}
    hidden = golden.model.model(**inputs).last_hidden_state
    yield close("train.final_hidden", hidden[real], golden["train.final_hidden"])
    yield close("train.pred_v", outputs.velocity, golden["train.pred_v"])
    error = (outputs.velocity - batch["velocity_labels"]) ** 2
    yield close("train.mse", error, golden["train.mse"])
    yield close("train.mse_per_token", error.mean(1), golden["train.mse_per_token"])
    learned = batch["labels"][:, 1:] != -100
    logits, wanted = outputs.logits[:, :-1][learned], batch["labels"][:, 1:][learned]
    ce = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    yield same("train.packed_label_ids", wanted, golden["train.packed_label_ids"])
    yield close("train.ce_logits", logits, golden["train.ce_logits"])
    yield close("train.ce", ce, golden["train.ce"])
    weights = golden["train.ce_loss_weights"]
    yield close("train.loss_ce", outputs.loss_ce, case["loss_ce"])
    yield close("train.loss_mse", outputs.loss_mse, case["loss_mse"])
    yield close("train.loss", outputs.loss, case["loss"])
    yield close("train.loss_ce_reweighted", (ce * weights).sum() / weights.sum(), case["loss_ce_reweighted"])


def gradients(golden: Golden) -> Iterator[Result]:
    tables, (batch, _) = golden.json("train_grads"), training_batch(golden)
    runs = {  # table, loss, and `--freeze` of Stage II
        "both": ("loss_ce_plus_mse", "loss", "none"),
        "none": ("loss_mse_only", "loss_mse", "none"),
        "grad": ("loss_mse_only", "loss_mse", "grad"),
        "detach": ("loss_ce_plus_mse_with_bagel_freeze_und", "loss", "detach"),
    }
    for name, (table, loss, freeze) in runs.items():
        golden.model.zero_grad(set_to_none=True)
        for ours, parameter in golden.model.named_parameters():
            parameter.requires_grad_(freeze != "grad" or part_of(ours) == "generation")
        with torch.enable_grad():
            golden.model(**batch, detach_understanding=freeze == "detach")[loss].backward()
        worst, all_close, where = 0.0, True, ""
        for ours, parameter in golden.model.named_parameters():
            native = golden.native_names[ours]
            recorded = tables[table].get(native)
            if not parameter.requires_grad or "vit_model" in native and native.endswith("k_proj.bias"):
                continue
            norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
            wanted = 0.0 if recorded is None else recorded[0]
            error = abs(norm - wanted)
            if error > 1e-5 + 1e-3 * wanted:
                all_close, where = False, f" ({native}: {norm:.6g} instead of {wanted:.6g})"
            worst = max(worst, error / max(wanted, 1e-2))
        yield f"grads.{name} (relative){where}", worst, all_close
    golden.model.requires_grad_(True).zero_grad(set_to_none=True)


def layouts(golden: Golden) -> Iterator[Result]:
    config = golden.config
    for layout in golden.json("layouts"):
        draws, texts = iter(layout["dropout_draws"]), iter(layout["text_ids"])
        images = iter(layout["images_hw"])
        blocks, clean, latent_grids, vit_grids = [], [], [], []
        for kind, loss, droppable in layout["plan"]:
            # The fixture draws with probability 0.5, so 0.0 drops a block and 0.99 keeps it.
            dropped = bool(droppable) and next(draws) < 0.5
            if kind == "text":
                blocks.append(TextBlock(next(texts), learned=bool(loss), dropped=dropped))
                continue
            height, width = next(images)
            if kind == "vit_image":
                grid = (height // golden.vit_patch, width // golden.vit_patch)
                blocks.append(ImageBlock("image", grid, dropped=dropped))
                vit_grids += [] if dropped else [grid]
            else:
                stride = golden.pipe.vae_scale_factor * golden.latent_patch
                grid = (height // stride, width // stride)
                blocks.append(ImageBlock("target" if loss else "latent", grid, dropped=dropped))
                if not dropped:
                    latent_grids.append(grid)
                    clean += [not loss] * (grid[0] * grid[1])
        sequence = build_sequence(config, blocks)
        ids = torch.tensor(sequence.input_ids)
        is_vit, is_target = ids == config.image_token_id, ids == config.target_token_id
        is_latent = is_target | (ids == config.latent_token_id)
        is_text = ~is_vit & ~is_latent
        labels = torch.tensor([*sequence.labels[1:], -100])

        def ids_of(grids, side, what):
            return grid_ids(torch.tensor(grids), side, what).tolist() if grids else []

        modes = {"text": "causal", "image": "full", "latent": "full", "target": "noise"}
        ours = {
            "packed_text_ids": ids[is_text].tolist(),
            "packed_text_indexes": is_text.nonzero().flatten().tolist(),
            "packed_position_ids": sequence.position_ids,
            "packed_vae_token_indexes": is_latent.nonzero().flatten().tolist(),
            "packed_vit_token_indexes": is_vit.nonzero().flatten().tolist(),
            "mse_loss_indexes": is_target.nonzero().flatten().tolist(),
            "ce_loss_indexes": (labels != -100).nonzero().flatten().tolist(),
            "packed_label_ids": labels[labels != -100].tolist(),
            "timestep_is_clean": clean,
            "splits": [[n, modes[kind]] for kind, n in zip(sequence.kinds, sequence.lengths, strict=True)],
            "sample_lens": [len(sequence.input_ids)],
            "latent_position_ids": ids_of(latent_grids, config.max_latent_size, "latent"),
            "vit_position_ids": ids_of(vit_grids, config.vision_patches_per_side, "ViT"),
            "vae_shapes": [list(grid) for grid in latent_grids],
        }
        wrong = [key for key, value in ours.items() if value != layout[key]]
        yield same(f"layouts.{layout['name']}{' wrong: ' + ', '.join(wrong) if wrong else ''}", wrong, [])


def resize_table(golden: Golden) -> Iterator[Result]:
    for setting in golden.json("transforms"):
        limits = {key: setting[key] for key in ("max_size", "min_size", "stride", "max_pixels")}
        ours = [
            [width, height, *resize_shape(height, width, **limits, num_images=setting["img_num"])[::-1]]
            for width, height, _, _ in setting["rows_in_w_in_h_out_w_out_h"]
        ]
        yield same(f"transforms.{setting['name']}.n{setting['img_num']}", ours, setting["rows_in_w_in_h_out_w_out_h"])


CASES = (
    blocks,
    vae,
    understanding,
    text,
    velocities,
    sampling,
    end_to_end,
    training,
    gradients,
    layouts,
    resize_table,
)


@torch.no_grad()
def run(folder: str | Path) -> list[Result]:
    """All results of one fixture folder."""
    golden = Golden(Path(folder))
    return [result for case in CASES for result in case(golden)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="folder in the golden format")
    results = run(parser.parse_args().dir)
    for name, error, passed in results:
        print(f"{'ok  ' if passed else 'FAIL'} {error:9.2e}  {name}")
    failed = sum(not passed for _, _, passed in results)
    print(f"{len(results) - failed} of {len(results)} cases agree")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
