"""`SynerMedGenPipeline`: one scan in, the same anatomy in another modality out, in scanner units on the same grid.

    scan -> image processor (window, square, resize) -> context blocks -> one prefill into a cache
         -> denoise the target block against the cache -> VAE -> back to scanner units on the input's grid

The context is computed once. Guidance needs the same step under reduced contexts (without the text, without the
images); these branches, and all slices of a batch, run as one batch.
"""

from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from transformers import DynamicCache, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from .hub import HubMixin
from .image_processing_synermedgen import SliceInputs, load_slice, own_window, patchify, to_display, unpatchify
from .processing_synermedgen import (
    MODALITY_NAMES,
    MODALITY_QUESTION,
    SPECIAL_TOKENS,
    BlockSequence,
    ImageBlock,
    TextBlock,
    build_sequence,
    make_instruction,
)

RESCALE_MODES = ("global", "channel", "text_channel")
VOLUME_ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


@dataclass
class SynerMedGenPipelineOutput(BaseOutput):
    """
    Args:
        images (`list`): One per input and repetition, in that order: PIL images, float32 arrays or tensors in scanner
            units on the input's grid; for `output_type="latent"` scaled latents `(channels, h, w)`.
        records (`list[dict]`): What each image is: route, region, unit, window, seed (`None` where the caller gave a
            generator), model_size (rows and columns at which it was made, before it was put on the input's grid), steps
            and guidance.
    """

    images: list
    records: list[dict]


@dataclass
class Context:
    """
    A prefilled context for a batch of target blocks.

    Args:
        cache (`DynamicCache`): Keys and values, `(batch, heads, length, head_dim)` a layer; empty for no context.
        position (`torch.LongTensor` of shape `(batch,)`): Rotary position of the target block.
    """

    cache: DynamicCache
    position: torch.LongTensor

    def map(self, change) -> DynamicCache:
        """A new cache with `change` applied to every key and value tensor."""
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(change(layer.keys), change(layer.values), index)
        return cache

    def shortened(self, length: int, position: int) -> "Context":
        """Only the first `length` tokens: what stood in the cache before the rest was prefilled."""
        cache = self.map(lambda tensor: tensor[:, :, :length])
        return Context(cache, torch.full_like(self.position, position))

    def repeat(self, times: int) -> "Context":
        """Every row `times` times in a row."""
        cache = self.map(lambda tensor: tensor.repeat_interleave(times, 0))
        return Context(cache, self.position.repeat_interleave(times))


def guide_velocity(
    full: torch.Tensor,
    no_text: torch.Tensor | None,
    no_image: torch.Tensor | None,
    guidance_scale: float,
    image_guidance_scale: float,
    rescale: str = "text_channel",
    rescale_min: float = 0.0,
) -> torch.Tensor:
    """
    Classifier-free guidance in two directions, with the velocity's norm kept from growing.

    With `v`, `u`, `w` the velocities under the full context, without the text and without the images:
    `y = u + a (v - u)` and `z = w + b (y - w)`. The result is multiplied by `clamp(|v| / |z|, rescale_min, 1)`, its
    norms taken per sample (`"global"`), per token (`"channel"`), or per token on `y`, before image guidance
    (`"text_channel"`), as BAGEL's sampler does. Image guidance alone (`a <= 1`) has no effect.

    Args:
        full, no_text, no_image (`torch.Tensor` of shape `(batch, tokens, channels)`):
            Velocities; the last two may be `None` where their scale is at most 1.
        guidance_scale (`float`): Text guidance `a`.
        image_guidance_scale (`float`): Image guidance `b`.
        rescale (`str`): `"global"`, `"channel"` or `"text_channel"`.
        rescale_min (`float`): In [0, 1]; 1 switches the rescaling off.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, channels)`
    """
    if guidance_scale <= 1:
        return full

    def rescaled(velocity, dims):
        ratio = full.norm(dim=dims, keepdim=True) / (velocity.norm(dim=dims, keepdim=True) + 1e-8)
        return velocity * ratio.clamp(min=rescale_min, max=1.0)

    guided = no_text + guidance_scale * (full - no_text)
    if rescale == "text_channel":
        guided = rescaled(guided, -1)
    if image_guidance_scale > 1:
        guided = no_image + image_guidance_scale * (guided - no_image)
    if rescale == "text_channel":
        return guided
    return rescaled(guided, (-2, -1) if rescale == "global" else -1)


def is_pair(value) -> bool:
    """Whether a value is two real numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(one, Real) for one in value)


def is_volume(image) -> bool:
    """Whether an image is a whole scan: a [`~synermedgen_hf.Volume`], the path of one, or a dict of those."""
    if isinstance(image, dict):
        return bool(image) and all(map(is_volume, image.values()))
    if isinstance(image, (str, Path)):
        return str(image).lower().endswith(VOLUME_ENDINGS) or Path(image).is_dir()
    return hasattr(image, "affine")


class SynerMedGenPipeline(HubMixin, DiffusionPipeline):
    r"""
    Cross-modality synthesis, and the questions the same weights can answer.

    ```python
    >>> pipe = SynerMedGenPipeline.from_pretrained(checkpoint)
    >>> ct = pipe(mr_slice, target="CT", source="MRI", region="brain", output_type="np", seed=0).images[0]  # HU
    ```

    Args:
        model ([`SynerMedGenForConditionalGeneration`]): Both experts.
        processor ([`SynerMedGenProcessor`]): Tokenizer and image processor.
        vae (`AutoencoderKL`): Pictures to latents and back.
        scheduler (`FlowMatchEulerDiscreteScheduler`): Its `shift` is the default `timestep_shift`.
    """

    model_cpu_offload_seq = "model->vae"

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | None,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(model=model, processor=processor, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if processor is not None:
            self.check_components()
        # A tensor read from a file lies wherever the file put it. On a CPU, kernels round differently at odd addresses,
        # so that what was saved and loaded again would differ in its last bit.
        for module in (model, vae):
            for parameter in module.parameters():
                plain = type(parameter.data) is torch.Tensor and parameter.device.type == "cpu"
                if plain and parameter.data_ptr() % 64:
                    parameter.data = parameter.data.clone()

    def check_components(self):
        """Raise a `ValueError` if processor, model and VAE are of different checkpoints: other grids, other tokens."""
        config, image_processor = self.model.config, self.processor.image_processor
        pairs = {
            "latent_stride": (image_processor.latent_stride, self.vae_scale_factor * config.latent_patch_size),
            "latent_max_per_side": (image_processor.latent_max_per_side, config.max_latent_size),
            "vit_patch_size": (image_processor.vit_patch_size, config.vision_config.patch_size),
            "vit_max_patches_per_side": (image_processor.vit_max_patches_per_side, config.vision_patches_per_side),
            **{name: (getattr(self.processor, name), getattr(config, name)) for name in SPECIAL_TOKENS},
        }
        has, needs = ({name: pair[side] for name, pair in pairs.items() if pair[0] != pair[1]} for side in (0, 1))
        if has:
            raise ValueError(f"The processor does not fit the model and its VAE: it has {has}, they need {needs}.")
        if self.vae.config.latent_channels != config.latent_channels:
            raise ValueError(
                f"The VAE does not fit the model: its latents have {self.vae.config.latent_channels} channels, and the "
                f"model's {config.latent_channels}."
            )

    # 1. Check everything before any computing ------------------------------------------------------------------------

    def check_inputs(
        self,
        target,
        region,
        prompt,
        num_inference_steps,
        guidance_scale,
        image_guidance_scale,
        guidance_interval,
        guidance_rescale,
        guidance_rescale_min,
        timestep_shift,
        num_images_per_prompt,
        output_type,
    ):
        """Raise a `ValueError` for an argument of [`~SynerMedGenPipeline.__call__`] that cannot be used."""
        if not isinstance(target, str) or target not in MODALITY_NAMES:
            raise ValueError(f"Unknown target {target!r}. Choose one of {', '.join(MODALITY_NAMES)}.")
        regions = sorted({name.split("/")[0] for name in self.model.config.trained_routes})
        if region is not None and regions and region not in regions:
            raise ValueError(f"Unknown region {region!r}. This checkpoint was trained for {', '.join(regions)}.")
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, count in counts.items():
            if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
        scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
        for name, scale in scales.items():
            if not isinstance(scale, Real) or not 0 <= scale < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0 (up to 1 means no guidance), got {scale!r}.")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt must be one text for all cases, got {type(prompt).__name__}.")
        if not is_pair(guidance_interval) or not 0 <= guidance_interval[0] < guidance_interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low < high <= 1, got {guidance_interval!r}. "
                "Guidance acts while low < timestep <= high; 1 is pure noise, 0 the finished image."
            )
        if guidance_rescale not in RESCALE_MODES:
            raise ValueError(
                f"Unknown guidance_rescale {guidance_rescale!r}. Choose one of {', '.join(RESCALE_MODES)}."
            )
        if not 0 <= guidance_rescale_min <= 1:
            raise ValueError(f"guidance_rescale_min must be within [0, 1], got {guidance_rescale_min}.")
        if timestep_shift is not None and not 0 < timestep_shift < float("inf"):
            raise ValueError(f"timestep_shift must be positive, got {timestep_shift}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"Unknown output_type {output_type!r}. Choose 'pil', 'np', 'pt' or 'latent'.")

    def check_route(self, sources: list[str], target: str, region: str | None):
        """Raise a `ValueError` for a route, by name, that the checkpoint was not trained for."""
        if missing := self.model.config.missing_parts:
            raise ValueError(
                f"This checkpoint came without its {' and '.join(missing)} weights: it cannot synthesise on any route."
            )
        if target in sources:
            raise ValueError(f"Target and source are both {target}: there is nothing to synthesise.")
        routes = self.model.config.trained_routes
        for source in sources:
            if not isinstance(source, str) or source not in MODALITY_NAMES:
                raise ValueError(f"Unknown source {source!r}. Choose one of {', '.join(MODALITY_NAMES)}.")
            known = [name for name in routes if name.split("/")[1] == f"{source}-{target}"]
            if routes and not [name for name in known if region is None or name.split("/")[0] == region]:
                place = "" if region is None else f" of the {region}"
                raise ValueError(
                    f"This checkpoint was not trained for {source} to {target}{place}. "
                    f"It was trained for: {', '.join(routes)}."
                )

    def read_cases(self, image, source: str | None) -> list[dict[str, Any]]:
        """Any accepted form of `image` as a list of cases `{modality or None: image}`."""
        if source is not None and not isinstance(source, str):
            raise ValueError(
                f"Unknown source {source!r}: it names one modality. For several pass a dict of images, "
                '{"T1": ..., "T2": ...}.'
            )
        batch = list(image) if isinstance(image, (list, tuple)) else [image]
        if not batch:
            raise ValueError("Got an empty list of images.")
        kinds = {isinstance(item, dict) for item in batch}
        if len(kinds) > 1:
            raise ValueError(
                "Got a list that mixes dicts and images. Pass either images of one modality, or one dict "
                '{"T1": ..., "T2": ...} per case.'
            )
        if kinds == {False}:
            return [{source: item} for item in batch]
        if source is not None:
            raise ValueError("A dict of images names its modalities itself: leave `source` out.")
        names = list(batch[0])
        for number, case in enumerate(batch):
            if not case or list(case) != names:
                raise ValueError(
                    f"All cases of a batch need the same modalities in the same order: case 0 has {names}, case "
                    f"{number} has {list(case)}."
                )
            for name, item in case.items():
                if isinstance(item, (list, tuple, dict)):
                    raise ValueError(
                        f"{name} of case {number} is a {type(item).__name__}. A dict holds one image per modality; for "
                        'a batch pass a list of dicts, [{"T1": a0, "T2": b0}, {"T1": a1, "T2": b1}].'
                    )
        return batch

    def read_windows(self, window, cases: list[dict]) -> list[dict[str, tuple[float, float] | None]]:
        """Any accepted form of `window` as one `{modality: (low, high) or None}` per case."""
        per_case = window if isinstance(window, list) and not is_pair(window) else [window] * len(cases)
        if len(per_case) != len(cases):
            raise ValueError(f"Got {len(per_case)} windows for {len(cases)} cases.")
        windows = []
        for case, own in zip(cases, per_case, strict=True):
            by_modality = own if isinstance(own, dict) else dict.fromkeys(case, own)
            for name, pair in by_modality.items():
                if name not in case:
                    raise ValueError(f"Got a window for {name}, but the case holds {', '.join(case)}.")
                if pair is not None and not (is_pair(pair) and pair[0] < pair[1]):
                    raise ValueError(f"The window of {name} must be (low, high) with low < high, got {pair!r}.")
            windows.append({name: by_modality.get(name) for name in case})
        return windows

    # 2. Context -------------------------------------------------------------------------------------------------------

    def prefill(
        self,
        sequences: list[BlockSequence],
        images: list[tuple[torch.Tensor, tuple[int, int]]] = (),
        latents: list[tuple[torch.Tensor, tuple[int, int]]] = (),
    ) -> Context:
        """
        Run context sequences of one length through the model, once.

        Args:
            sequences (`list[BlockSequence]`): One per row, of equal length.
            images (`list` of `(patches, grid_hw)`): ViT patches of all images, in the order of rows and blocks.
            latents (`list` of `(tokens, grid_hw)`): Clean latent tokens of all images, in the same order.

        Returns:
            [`Context`]
        """
        device = self._execution_device
        input_ids = torch.tensor([sequence.input_ids for sequence in sequences], dtype=torch.long, device=device)
        position = torch.tensor([sequence.next_position for sequence in sequences], device=device)
        if input_ids.shape[1] == 0:
            return Context(DynamicCache(), position)
        inputs = {}
        if images:
            inputs["pixel_values"] = torch.cat([patches for patches, _ in images]).to(device)
            inputs["image_grid_hw"] = torch.tensor([grid for _, grid in images], device=device)
        if latents:
            inputs["latents"] = torch.cat([tokens for tokens, _ in latents]).to(device)
            inputs["latent_grid_hw"] = torch.tensor([grid for _, grid in latents], device=device)
            inputs["timestep"] = torch.zeros(len(latents), device=device)
        outputs = self.model(
            input_ids=input_ids,
            position_ids=torch.tensor([sequence.position_ids for sequence in sequences], device=device),
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        return Context(outputs.past_key_values, position)

    def make_contexts(
        self,
        cases: list[list[SliceInputs]],
        latents: list[list[torch.Tensor]],
        text: TextBlock,
        guidance_scale: float,
        image_guidance_scale: float,
    ) -> tuple[Context, Context | None, Context | None]:
        """
        The full context of a batch and, where guidance needs them, the one without text and the one without images.

        Args:
            cases (`list[list[SliceInputs]]`): Sources of each case; the same grids in every case.
            latents (`list[list[torch.Tensor]]`): Their clean latent tokens, `(tokens, latent_token_dim)`.
            text ([`TextBlock`]): The instruction.
        """
        config = self.model.config
        latent_grid = self.latent_grid(cases[0][0])
        blocks = []
        for source in cases[0]:
            blocks += [ImageBlock("latent", latent_grid), ImageBlock("image", source.vit_grid)]
        sequence = build_sequence(config, [*blocks, text])
        full = self.prefill(
            [sequence] * len(cases),
            [(source.vit_patches, source.vit_grid) for case in cases for source in case],
            [(tokens, latent_grid) for case in latents for tokens in case],
        )
        no_text = no_image = None
        if guidance_scale > 1:
            # Images never see the text that follows them, so "without text" is the same cache cut before the text.
            images = build_sequence(config, blocks)
            no_text = full.shortened(len(images.input_ids), images.next_position)
            if image_guidance_scale > 1:
                no_image = self.prefill([build_sequence(config, [text])]).repeat(len(cases))
        return full, no_text, no_image

    def latent_grid(self, source: SliceInputs) -> tuple[int, int]:
        """Latent tokens of a source, which are also those of its target: rows and columns."""
        side = self.vae_scale_factor * self.model.config.latent_patch_size
        return source.vae_pixels.shape[1] // side, source.vae_pixels.shape[2] // side

    def encode_latents(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Images to scaled latents. The posterior is sampled, as this family always does.

        Args:
            pixels (`torch.Tensor` of shape `(n, 3, height, width)`): In [-1, 1].
            noise (`torch.Tensor` of shape `(n, latent_channels, h, w)`): Standard normal.
        """
        posterior = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist
        sample = posterior.mean + posterior.std * noise.to(posterior.mean)
        return (sample - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents `(n, latent_channels, h, w)` to images `(n, 3, height, width)`, about [-1, 1], float32."""
        latents = latents.to(self._execution_device, self.vae.dtype)
        return self.vae.decode(latents / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample.float()

    # 3. Denoising -----------------------------------------------------------------------------------------------------

    def velocity(
        self, tokens: torch.Tensor, timestep: float, contexts: list[Context], grid_hw: tuple[int, int]
    ) -> list[torch.Tensor]:
        """
        One evaluation of the model under each of several contexts, as one batch; the contexts are left as found.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, latent_token_dim)`): Noised latents.
            timestep (`float`): In [0, 1].
            contexts (`list[Context]`): Each of the same batch: the branches of guidance.
            grid_hw (`tuple[int, int]`): Rows and columns of the tokens.

        Returns:
            `list[torch.Tensor]`, one per context, of the shape of `tokens`, float32: `noise - data`.
        """
        rows, device = len(tokens) * len(contexts), self._execution_device
        target = build_sequence(self.model.config, [ImageBlock("target", grid_hw)])
        input_ids = torch.tensor([target.input_ids], device=device).expand(rows, -1)
        outputs = self.model(
            input_ids=input_ids,
            position_ids=torch.cat([context.position for context in contexts])[:, None].expand_as(input_ids),
            past_key_values=[context.cache for context in contexts],
            latents=tokens.to(self.model.dtype).flatten(0, 1).repeat(len(contexts), 1),
            latent_grid_hw=torch.tensor([grid_hw], device=device).expand(rows, -1),
            timestep=torch.full((rows,), float(timestep), device=device),
            use_cache=False,
        )
        return list(outputs.velocity.float().view(len(contexts), *tokens.shape))

    def denoise(
        self,
        tokens: torch.Tensor,
        grid_hw: tuple[int, int],
        full: Context,
        no_text: Context | None,
        no_image: Context | None,
        num_inference_steps: int,
        guidance_scale: float = 4.0,
        image_guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: str = "text_channel",
        guidance_rescale_min: float = 0.0,
        timestep_shift: float | None = None,
        callback_on_step_end=None,
    ) -> torch.Tensor:
        """
        Euler steps from noise to latents. Guidance acts on steps whose shifted timestep is in `(low, high]`.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, latent_token_dim)`): Standard normal noise.
            others: As in [`~SynerMedGenPipeline.__call__`] and [`~SynerMedGenPipeline.velocity`].

        Returns:
            `torch.Tensor` of the shape of `tokens`, float32.
        """
        self.scheduler.set_shift(self.scheduler.config.shift if timestep_shift is None else timestep_shift)
        # n steps are n evaluations at the points of linspace(1, 0, n + 1) but its last; the scheduler shifts them.
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=self._execution_device
        )
        branches = [full]
        if guidance_scale > 1:
            branches += [no_text, no_image] if image_guidance_scale > 1 else [no_text]
        tokens = tokens.float().to(self._execution_device)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                # A float32 scalar: compared in float32, so that 0.4 is not above a lower end of 0.4.
                sigma = self.scheduler.sigmas[step]
                if len(branches) > 1 and guidance_interval[0] < sigma <= guidance_interval[1]:
                    v, u, w = (*self.velocity(tokens, sigma, branches, grid_hw), None)[:3]
                    velocity = guide_velocity(
                        v, u, w, guidance_scale, image_guidance_scale, guidance_rescale, guidance_rescale_min
                    )
                else:
                    (velocity,) = self.velocity(tokens, sigma, [full], grid_hw)
                tokens = self.scheduler.step(velocity, timestep, tokens).prev_sample
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, float(sigma), {"latents": tokens}) or {}
                    tokens = changed.get("latents", tokens)
                progress.update()
        return tokens

    # 4. The call ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image,
        target: str,
        source: str | None = None,
        region: str | None = None,
        prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: str = "text_channel",
        guidance_rescale_min: float = 0.0,
        timestep_shift: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        window: tuple[float, float] | dict | list | None = None,
        output_type: str = "pil",
        callback_on_step_end=None,
        return_dict: bool = True,
    ) -> SynerMedGenPipelineOutput | tuple:
        r"""
        Synthesise `target` from one or more scans.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `dict` or `list` of those):
                One slice: a picture (8- or 16-bit, its levels spanning the modality's window), a `(height, width)`
                array in scanner units (HU, SUV, any MR scale) or the path of a picture. A list is a batch. A dict
                `{"T1": a, "T2": b}` is one case seen by several modalities, on one grid. Or a whole scan, as a
                [`~synermedgen_hf.Volume`] or the path of a NIfTI, MHA or NRRD file or of a DICOM folder: it goes
                through [`~synermedgen_hf.synthesize_volume`], and `images` holds one volume.
            target (`str`):
                Modality to make: T1, T1CE, T2, FLAIR, MRI, CT, CBCT or PET.
            source (`str`, *optional*):
                Modality of `image`. May be left out where the weights have learned to identify it.
            region (`str`, *optional*):
                `"brain"`, `"pelvis"` or `"whole-body"`.
            prompt (`str`, *optional*):
                Instruction to use instead of the one made from source, target and region.
            num_inference_steps (`int`, *optional*):
                Evaluations of the model (BAGEL's `num_timesteps=50` makes 49). The default is the checkpoint's, from
                `model.config.sampling`.
            guidance_scale, image_guidance_scale (`float`, *optional*):
                Guidance by the text and by the images, see [`guide_velocity`]; at most 1 switches it off. The defaults
                are the checkpoint's.
            guidance_interval (`tuple[float, float]`, defaults to (0, 1)):
                Timesteps `low < t <= high` that are guided.
            guidance_rescale (`str`, defaults to `"text_channel"`), guidance_rescale_min (`float`, defaults to 0):
                See [`guide_velocity`].
            timestep_shift (`float`, *optional*):
                Spends more steps near the noise the larger it is; the scheduler's by default.
            seed (`int` or `list[int]`, *optional*):
                Randomness belongs to the case: with one seed every case of a batch gives what it would give alone;
                repetition `j` of a case is what `seed + j` gives. A list holds one seed per case.
            generator (`torch.Generator` or `list`, *optional*):
                Instead of `seed`: one for the whole batch, or one per case.
            num_images_per_prompt (`int`, defaults to 1):
                Repetitions of each case.
            window (`tuple[float, float]`, `dict` or `list` of those, *optional*):
                `(low, high)` of the source in scanner units instead of the slice's own window: an MR slice should be
                given the window of its volume. A dict holds one per modality, a list one entry per case.
            output_type (`str`, defaults to `"pil"`):
                `"pil"` 8-bit pictures over the target's window; `"np"` / `"pt"` float32 in the target's units; both on
                the grid of the input. `"latent"`: the scaled latents, `(channels, h, w)`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `f(pipe, step, timestep, {"latents": tokens})` with the timestep in (0, 1]; may return a dict
                with changed `latents`, `(batch, tokens, latent_token_dim)`. Cases on another grid are a batch of their
                own and start again at step 0.
            return_dict (`bool`, defaults to `True`):
                Return a [`SynerMedGenPipelineOutput`] rather than a tuple.

        Returns:
            [`SynerMedGenPipelineOutput`]

        Raises:
            `ValueError`: An argument or an image cannot be used; said before any computing.
        """
        if is_volume(image):
            sampling = {
                "prompt": prompt,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "image_guidance_scale": image_guidance_scale,
                "guidance_interval": guidance_interval,
                "guidance_rescale": guidance_rescale,
                "guidance_rescale_min": guidance_rescale_min,
                "timestep_shift": timestep_shift,
                "callback_on_step_end": callback_on_step_end,
            }
            if generator is not None or window is not None or num_images_per_prompt != 1 or output_type == "latent":
                raise ValueError(
                    "A whole scan takes `seed` and its own window: leave generator, window, num_images_per_prompt and "
                    "output_type out, or use synthesize_volume(..., num_samples=n)."
                )
            try:
                from synermedgen_hf import synthesize_volume
            except ImportError:
                raise ImportError("Whole scans need the package: pip install synermedgen-hf.") from None
            seed = int(torch.randint(2**31, (1,))) if seed is None else seed
            made = synthesize_volume(self, image, target, source, region, seed=seed, **sampling)
            images, records = [made.volume], [made.record]
            return SynerMedGenPipelineOutput(images, records) if return_dict else (images, records)

        # 1. Check everything.
        defaults = self.model.config.sampling
        if num_inference_steps is None:
            num_inference_steps = defaults["num_inference_steps"]
        if guidance_scale is None:
            guidance_scale = defaults["guidance_scale"]
        if image_guidance_scale is None:
            image_guidance_scale = defaults["image_guidance_scale"]
        self.check_inputs(
            target,
            region,
            prompt,
            num_inference_steps,
            guidance_scale,
            image_guidance_scale,
            guidance_interval,
            guidance_rescale,
            guidance_rescale_min,
            timestep_shift,
            num_images_per_prompt,
            output_type,
        )
        cases = self.read_cases(image, source)
        generators = self.make_generators(seed, generator, len(cases), num_images_per_prompt)
        if None in cases[0]:
            if "MI" not in self.model.config.trained_tasks:
                raise ValueError(
                    "Say which modality the image is, e.g. source='MRI': these weights have not learned to identify it."
                )
            for case in cases:
                load_slice(case[None])
            cases = [{self.identify(case[None])["modality"]: case[None]} for case in cases]
        for case in cases:
            self.check_route(list(case), target, region)
        windows = self.read_windows(window, cases)
        inputs = [
            [self.processor.image_processor.preprocess_slice(item, name, own[name]) for name, item in case.items()]
            for case, own in zip(cases, windows, strict=True)
        ]
        self.check_grids(cases, inputs)

        # 2. Synthesise, one batch per grid and instruction (slices of one study share both).
        groups: dict[tuple, list[int]] = {}
        for number, (case, sources) in enumerate(zip(cases, inputs, strict=True)):
            key = (tuple(case), tuple((source.vae_pixels.shape, source.vit_grid) for source in sources))
            groups.setdefault(key, []).append(number)
        finished: list[list] = [[] for _ in cases]
        record = self.processor.image_processor.target_record(target)
        for (names, _), members in groups.items():
            latents = self.synthesise_batch(
                [inputs[number] for number in members for _ in range(num_images_per_prompt)],
                make_instruction(list(names), target, region) if prompt is None else prompt,
                [one for number in members for one in generators[number]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                guidance_interval=guidance_interval,
                guidance_rescale=guidance_rescale,
                guidance_rescale_min=guidance_rescale_min,
                timestep_shift=timestep_shift,
                callback_on_step_end=callback_on_step_end,
            )
            # 3. Back to scanner units on the input's grid.
            pixels = latents if output_type == "latent" else self.decode_latents(latents).cpu()
            for row, made in enumerate(pixels):
                number = members[row // num_images_per_prompt]
                geometry = inputs[number][0].geometry
                finished[number].append(
                    made if output_type == "latent" else self.to_output(made, record, geometry, output_type)
                )

        images = [image for own in finished for image in own]
        records = [
            {
                "route": f"{'+'.join(case)}-{target}",
                "region": region,
                "unit": record["unit"],
                "window": [record["low"], record["high"]],
                "seed": None if generator is not None else one.initial_seed(),
                "model_size": list(sources[0].vae_pixels.shape[1:]),
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "image_guidance_scale": image_guidance_scale,
            }
            for case, sources, own in zip(cases, inputs, generators, strict=True)
            for one in own
        ]
        self.maybe_free_model_hooks()
        return SynerMedGenPipelineOutput(images, records) if return_dict else (images, records)

    def make_generators(self, seed, generator, n_cases: int, repetitions: int) -> list[list[torch.Generator]]:
        """
        One generator per case and repetition. Raises a `ValueError` for seeds or generators that do not fit the cases.
        """
        if seed is not None and generator is not None:
            raise ValueError("Pass either seed or generator, not both.")
        if generator is not None:
            per_case = list(generator) if isinstance(generator, (list, tuple)) else [generator] * n_cases
            if not all(isinstance(one, torch.Generator) for one in per_case):
                raise ValueError("generator must be a torch.Generator, or a list with one per case.")
            if len(per_case) != n_cases:
                raise ValueError(f"Got {len(per_case)} generators for {n_cases} cases.")
            return [[one] * repetitions for one in per_case]
        if seed is None:
            seed = [int(torch.randint(2**31, (1,))) for _ in range(n_cases)]
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * n_cases
        if not all(isinstance(one, Integral) for one in seeds):
            raise ValueError(f"seed must be a whole number, or a list with one per case, got {seed!r}.")
        if len(seeds) != n_cases:
            raise ValueError(f"Got {len(seeds)} seeds for {n_cases} cases.")
        return [
            [torch.Generator().manual_seed(int(one) + repetition) for repetition in range(repetitions)] for one in seeds
        ]

    def check_grids(self, cases: list[dict], inputs: list[list[SliceInputs]]):
        """Raise a `ValueError` if the sources of a case lie on different grids."""
        for case, sources in zip(cases, inputs, strict=True):
            grids = {(source.geometry["height"], source.geometry["width"]) for source in sources}
            if len(grids) > 1:
                raise ValueError(
                    f"The images of one case lie on different grids: {sorted(grids)} for {', '.join(map(str, case))}. "
                    "Resample them to one grid first."
                )

    def synthesise_batch(
        self, cases: list[list[SliceInputs]], instruction: str, generators: list[torch.Generator], **sampling
    ) -> torch.Tensor:
        """
        Cases on one grid with one instruction, as one batch.

        Args:
            cases (`list[list[SliceInputs]]`): Sources of each case.
            instruction (`str`): What to make.
            generators (`list[torch.Generator]`): One per case.
            sampling: As in [`~SynerMedGenPipeline.denoise`].

        Returns:
            `torch.Tensor` of shape `(cases, channels, h, w)`: scaled latents.
        """
        config = self.model.config
        rows, columns = grid = self.latent_grid(cases[0][0])
        patch = config.latent_patch_size
        shape = (config.latent_channels, rows * patch, columns * patch)
        encoder_noise, noise = [], []
        for sources, generator in zip(cases, generators, strict=True):
            # A case draws the noise of its encoder first, then its own: the same alone and in any batch.
            where = {"generator": generator, "device": generator.device}
            encoder_noise += [torch.randn(shape, **where) for _ in sources]
            noise.append(torch.randn(rows * columns, config.latent_token_dim, **where))
        pixels = torch.stack([source.vae_pixels for sources in cases for source in sources])
        encoded = self.encode_latents(pixels, torch.stack(encoder_noise))
        tokens = [patchify(latent, patch) for latent in encoded]
        n_sources = len(cases[0])
        contexts = self.make_contexts(
            cases,
            [tokens[start : start + n_sources] for start in range(0, len(tokens), n_sources)],
            self.processor.text_block(instruction),
            sampling["guidance_scale"],
            sampling["image_guidance_scale"],
        )
        made = self.denoise(torch.stack(noise), grid, *contexts, **sampling)
        return torch.stack([unpatchify(one, grid, patch) for one in made])

    def to_output(self, pixels: torch.Tensor, record: dict, geometry: dict, output_type: str):
        """One decoded image `(3, height, width)` as the caller wants it."""
        array = self.processor.image_processor.postprocess_slice(pixels, record, geometry)
        if output_type == "np":
            return array
        return torch.from_numpy(array) if output_type == "pt" else to_display(array, record)

    # 5. Understanding -------------------------------------------------------------------------------------------------

    def check_task(self, task: str, what: str):
        parts = ("understanding", "vision")  # the others only synthesise
        missing = [part for part in self.model.config.missing_parts if part in parts]
        if missing:
            raise ValueError(f"This checkpoint came without its {' and '.join(missing)} weights, so it cannot {what}.")
        if task not in self.model.config.trained_tasks:
            learned = ", ".join(self.model.config.trained_tasks) or "none"
            raise ValueError(
                f"These weights cannot {what}: they have not been trained on the understanding tasks (learned so far: "
                f"{learned}). Use a checkpoint that has been through Stage I."
            )

    @torch.no_grad()
    def identify(self, image) -> dict[str, Any]:
        """
        Name the modality of an image.

        Args:
            image: One slice, as for [`~SynerMedGenPipeline.__call__`]. An array is windowed over its own range, since
                its modality is what is asked. A grey picture of 8 bits is shown as it is: of a volume, best the one
                that `synermedgen_hf.volumes.understanding.understanding_slice` makes, which is what training showed.

        Returns:
            `dict`: `modality`, its `probability`, and `probabilities` of all modalities, from the likelihood of each
            name as the answer.

        Raises:
            `ValueError`: The weights have not learned to identify modalities.
        """
        self.check_task("MI", "identify a modality")
        scores = self.score_answers([image], MODALITY_QUESTION, list(MODALITY_NAMES.values()))
        self.maybe_free_model_hooks()
        probabilities = dict(zip(MODALITY_NAMES, scores.softmax(0).tolist(), strict=True))
        best = max(probabilities, key=probabilities.get)
        return {"modality": best, "probability": probabilities[best], "probabilities": probabilities}

    @torch.no_grad()
    def answer(self, images, question: str, max_new_tokens: int = 64, labels: list[str] | None = None) -> str:
        """
        Answer a question about one or several images, which come before the question.

        Args:
            images: One image or a list, as for [`~SynerMedGenPipeline.identify`].
            question (`str`): Any text without the tokenizer's special tokens.
            max_new_tokens (`int`, defaults to 64): Upper bound of the answer's length.
            labels (`list[str]`, *optional*): Written before each image. By default there are none, but for a model that
                was trained with labels (`config.label_images`): there, several images are called A, B, C and so on.

        Returns:
            `str`

        Raises:
            `ValueError`: The weights have learned no understanding task, there are more or fewer labels than images, or
                the question holds special tokens.
        """
        tasks = self.model.config.trained_tasks
        self.check_task(tasks[0] if tasks else "any", "answer questions")
        # They would end the question, or stand for images that are not there.
        if special := [token for token in self.processor.tokenizer.get_added_vocab() if token in question]:
            raise ValueError(
                f"The question holds {', '.join(special)}, which are no words to these weights: leave them out."
            )
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        inputs = self.question_inputs(images, question, labels)
        # generate() encodes the images before it calls forward, where offloading would bring the model in.
        if (hook := getattr(self.model, "_hf_hook", None)) is not None:
            hook.pre_forward(self.model)
        generated = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer = generated[0, inputs["input_ids"].shape[1] :]
        self.maybe_free_model_hooks()
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def question_inputs(self, images: list, question: str, labels: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Images, each after its label if there are labels, then the question, then the start of the answer."""
        if labels is None and self.model.config.label_images and 1 < len(images) <= len(ascii_uppercase):
            labels = list(ascii_uppercase[: len(images)])
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"There are {len(labels)} labels for {len(images)} images.")
        shown = [[{"type": "text", "text": label}, {"type": "image"}] for label in labels or ()]
        content = [part for parts in shown for part in parts] or [{"type": "image"}] * len(images)
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        fetch = self.processor.image_processor.fetch_images
        images = [fetch(image) if isinstance(image, (str, Path)) else image for image in images]
        windows = [own_window(image) for image in images]
        return self.processor(text=text, images=images, window=windows, return_tensors="pt").to(self._execution_device)

    @torch.no_grad()
    def score_answers(
        self, images: list, question: str, answers: list[str], labels: list[str] | None = None
    ) -> torch.Tensor:
        """Log-likelihood of each answer, `(answers,)`; `labels` as for [`~SynerMedGenPipeline.answer`]."""
        inputs = self.question_inputs(images, question, labels)
        scores = []
        for answer in answers:
            ids = [*self.processor.text_block(answer).ids, self.model.config.eos_token_id]
            ids = torch.tensor([ids], device=self._execution_device)
            whole = torch.cat([inputs["input_ids"], ids], dim=1)
            logits = self.model(
                **{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)},
                logits_to_keep=ids.shape[1] + 1,
            ).logits[:, :-1]
            scores.append(logits.float().log_softmax(-1).gather(2, ids[..., None]).sum())
        return torch.stack(scores)


__all__ = ["SynerMedGenPipeline", "SynerMedGenPipelineOutput", "guide_velocity"]
