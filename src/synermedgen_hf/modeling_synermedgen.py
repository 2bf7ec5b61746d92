"""SynerMedGen: one transformer that understands paired medical scans and synthesises one modality from another.

What is special here, before the code:

* **Two experts, one attention** (Mixture-of-Transformers). Every decoder layer owns two sets of norms, projections and
  MLPs. Text, delimiters and ViT patches go through the *understanding* expert, latent tokens (clean or noised) through
  the *generation* expert, whose parameters end in `_moe_gen`. Only the attention is shared.
* **A sequence is made of blocks.** A text is `<|im_start|> ids <|im_end|>` and is read causally. An image block is
  `<|vision_start|> tokens <|vision_end|>`; its tokens see each other fully and share one rotary position. A scan enters
  twice: its VAE latents (what it looks like), then its ViT patches (what it means). The block to be synthesised holds
  noised latents; nothing outside it ever sees it.
* **Synthesis is denoising against a cache.** The context (scans and instruction) is prefilled once into an ordinary
  `DynamicCache`; a denoising step runs the target block against it and leaves it as found. The network predicts the
  velocity `noise - data` at a timestep in [0, 1].
* **Experts work on contiguous slices.** Attention does not care about order once positions and mask are given, so each
  row is sorted once: understanding tokens first, generation tokens last. Everything that enters or leaves the model
  (ids, hidden states, the cache) is in sequence order.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder
from transformers.utils import logging

from .configuration_synermedgen import SynerMedGenConfig, SynerMedGenTextConfig
from .loading_synermedgen import LoadReport, check_no_pickle, part_of, without_reports

logger = logging.get_logger(__name__)


@dataclass
class SynerMedGenModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden)`):
            After the final norm of each token's expert, in sequence order.
        past_key_values (`Cache`, *optional*):
            The cache, grown by this call if `use_cache`, untouched otherwise.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            The embeddings and each layer's output, in sequence order, where asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SynerMedGenOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Sum of the losses asked for.
        loss_ce, loss_mse (`torch.FloatTensor` of shape `()`, *optional*):
            Cross entropy over labelled tokens; mean squared velocity error over target tokens and channels.
        logits (`torch.FloatTensor` of shape `(batch, kept, vocab)`, *optional*):
            Next-token scores. Not computed for a call that only denoises.
        velocity (`torch.FloatTensor` of shape `(target_tokens, latent_token_dim)`, *optional*):
            Predicted `noise - data` of every noised latent token, in order.
        past_key_values, hidden_states:
            As in [`SynerMedGenModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    loss_ce: torch.FloatTensor | None = None
    loss_mse: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: everything the model needs to know about a sequence is read off its ids
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SequenceLayout:
    """
    Where the blocks of a batch of sequences lie. All fields are `(batch, length)`.

    Args:
        block (`torch.LongTensor`): Number of the image block a token belongs to, -1 for text.
        is_latent (`torch.BoolTensor`): Latent tokens, clean or noised: the generation expert's.
        is_target (`torch.BoolTensor`): Noised latent tokens.
        is_noise (`torch.BoolTensor`): The target's whole block, delimiters included.
        positions (`torch.LongTensor`): Rotary positions, from 0.
    """

    block: torch.LongTensor
    is_latent: torch.BoolTensor
    is_target: torch.BoolTensor
    is_noise: torch.BoolTensor
    positions: torch.LongTensor


def read_layout(config: SynerMedGenConfig, input_ids: torch.LongTensor, attention_mask=None) -> SequenceLayout:
    """
    Read the blocks off the ids. A delimiter counts as one only next to an image, latent or target token, so the same
    id inside a text is just text.

    Args:
        config ([`SynerMedGenConfig`]): Tells the special ids.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): The sequences.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 at padding.

    Returns:
        [`SequenceLayout`]
    """
    is_target = input_ids == config.target_token_id
    is_latent = is_target | (input_ids == config.latent_token_id)
    inside = is_latent | (input_ids == config.image_token_id)

    def before(flags):
        return nn.functional.pad(flags[:, 1:], (0, 1))

    def after(flags):
        return nn.functional.pad(flags[:, :-1], (1, 0))

    opens = (input_ids == config.vision_start_token_id) & before(inside)
    closes = (input_ids == config.vision_end_token_id) & after(inside)
    in_block = inside | opens | closes
    is_noise = is_target | (opens & before(is_target)) | (closes & after(is_target))
    block = torch.where(in_block, opens.long().cumsum(1) - 1, -1)

    # A text token advances the position by one, an image block by one as a whole, a target block not at all.
    step = (~in_block | (closes & ~is_noise)).long()
    if attention_mask is not None:
        step = step * (attention_mask != 0)
    positions = step.cumsum(1) - step
    return SequenceLayout(block, is_latent, is_target, is_noise, positions)


def allowed_attention(
    layout: SequenceLayout, queries: torch.LongTensor, keys: torch.LongTensor, valid: torch.BoolTensor
) -> torch.BoolTensor:
    """
    The one attention rule. A token sees everything before it except noised blocks, and all of its own image block.

    Args:
        layout ([`SequenceLayout`]): Of the new tokens.
        queries, keys (`torch.LongTensor` of shape `(batch, n)`): Sequence index of each query and of each key.
        valid (`torch.BoolTensor` of shape `(batch, n_keys)`): Keys that are not padding.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, n_queries, n_keys)`: True where attention is allowed.
    """
    query_block, key_block = layout.block.gather(1, queries), layout.block.gather(1, keys)
    key_is_noise = layout.is_noise.gather(1, keys)
    same_block = (query_block[:, :, None] == key_block[:, None, :]) & (query_block[:, :, None] >= 0)
    earlier = (keys[:, None, :] <= queries[:, :, None]) & ~key_is_noise[:, None, :]
    return ((same_block | earlier) & valid[:, None, :])[:, None]


def cache_length(cache: Cache | None) -> int:
    """Tokens in a cache; 0 for none."""
    return 0 if cache is None else cache.get_seq_length()


def backend_mask(allowed: torch.BoolTensor, implementation: str, dtype: torch.dtype):
    """Turn the boolean rule into what an attention implementation reads; `None` if nothing is forbidden."""
    if allowed.all():
        return None
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        batch, _, n_queries, n_keys = allowed.shape
        return create_block_mask(
            lambda b, h, q, k: allowed[b, 0, q, k], batch, None, n_queries, n_keys, device=allowed.device
        )
    if implementation == "eager":
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
    return allowed


# ---------------------------------------------------------------------------------------------------------------------
# Embedders
# ---------------------------------------------------------------------------------------------------------------------


def grid_ids(grid_hw: torch.LongTensor, side: int, what: str) -> torch.LongTensor:
    """
    Position ids of image grids in a square table: `row * side + column`, anchored top left, whatever the image size.

    Args:
        grid_hw (`torch.LongTensor` of shape `(images, 2)`): Rows and columns of each image, in tokens.
        side (`int`): Side of the table.
        what (`str`): Name of the table for the error.

    Returns:
        `torch.LongTensor` of shape `(sum(rows * columns),)`

    Raises:
        `ValueError`: An image is larger than the table.
    """
    ids = []
    for rows, columns in grid_hw.tolist():
        if max(rows, columns) > side:
            raise ValueError(
                f"An image of {rows}x{columns} tokens does not fit the {side}x{side} table of {what} positions. "
                "Make the image smaller, or use a checkpoint with a larger table."
            )
        row = torch.arange(rows, device=grid_hw.device)
        column = torch.arange(columns, device=grid_hw.device)
        ids.append((row[:, None] * side + column).flatten())
    return torch.cat(ids)


def check_count(name: str, given: torch.Tensor, wanted: int, what: str):
    """A row too few would be broadcast to all without a word."""
    if len(given) != wanted:
        raise ValueError(f"`{name}` has {len(given)} rows for {wanted} {what}.")


class SinCosPositionTable(nn.Module):
    """Fixed 2-D sine-cosine positions of a square grid, `(side**2, width)`, column half first."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self.side, self.width = side, width
        self.table = nn.Buffer(self.compute(), persistent=False)

    def compute(self) -> torch.FloatTensor:
        return get_2d_sincos_pos_embed(self.width, self.side, base_size=self.side, output_type="pt").float()

    def forward(self, ids: torch.LongTensor) -> torch.FloatTensor:
        return self.table[ids]


class LatentTimeEmbedder(TimestepEmbedding):
    """Timestep in [0, 1] (not multiplied by 1000) to a hidden vector: 256 sinusoids, cosine first, then an MLP."""

    def __init__(self, hidden_size: int):
        super().__init__(in_channels=256, time_embed_dim=hidden_size)
        self.sinusoid = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: torch.FloatTensor) -> torch.FloatTensor:
        return super().forward(self.sinusoid(timestep.float()).to(self.linear_1.weight.dtype))


class SynerMedGenVisionEmbeddings(nn.Module):
    """Patches to vectors: a linear layer on (row, column, channel)-ordered pixels, plus a learned position."""

    def __init__(self, config):
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: torch.FloatTensor, position_ids: torch.LongTensor) -> torch.FloatTensor:
        return self.patch_embedding(pixel_values) + self.position_embedding(position_ids)


class SynerMedGenVisionModel(nn.Module):
    """SigLIP for images of any grid: full attention within an image, none across images."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = SynerMedGenVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.FloatTensor, image_grid_hw: torch.LongTensor) -> torch.FloatTensor:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(patches, patch_size**2 * 3)`): Patches of all images in order.
            image_grid_hw (`torch.LongTensor` of shape `(images, 2)`): Patch rows and columns of each image.

        Returns:
            `torch.FloatTensor` of shape `(patches, vision_hidden)`
        """
        position_ids = grid_ids(image_grid_hw, self.embeddings.side, "ViT")
        hidden_states = self.embeddings(pixel_values.to(self.post_layernorm.weight.dtype), position_ids)
        lengths = image_grid_hw.prod(1)
        padded = nn.utils.rnn.pad_sequence(hidden_states.split(lengths.tolist()), batch_first=True)
        valid = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
        allowed = valid[:, None, None, :].expand(-1, 1, padded.shape[1], -1)
        mask = backend_mask(allowed, self.config._attn_implementation, padded.dtype)
        encoded = self.encoder(inputs_embeds=padded, attention_mask=mask).last_hidden_state
        return self.post_layernorm(encoded[valid])


class SynerMedGenConnector(nn.Module):
    """ViT features to the transformer's width."""

    def __init__(self, config: SynerMedGenConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.fc2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN["gelu_pytorch_tanh"]

    def forward(self, features: torch.FloatTensor) -> torch.FloatTensor:
        return self.fc2(self.act(self.fc1(features)))


# ---------------------------------------------------------------------------------------------------------------------
# The Mixture-of-Transformers
# ---------------------------------------------------------------------------------------------------------------------


class SynerMedGenAttention(nn.Module):
    """Grouped-query attention over both experts' tokens; each expert has its own projections and q/k norms."""

    def __init__(self, config: SynerMedGenTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        query_size, key_size = config.hidden_size, config.num_key_value_heads * self.head_dim
        for expert in ("", "_moe_gen"):
            self.add_module("q_proj" + expert, nn.Linear(config.hidden_size, query_size))
            self.add_module("k_proj" + expert, nn.Linear(config.hidden_size, key_size))
            self.add_module("v_proj" + expert, nn.Linear(config.hidden_size, key_size))
            self.add_module("o_proj" + expert, nn.Linear(query_size, config.hidden_size, bias=False))
            self.add_module("q_norm" + expert, Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps))
            self.add_module("k_norm" + expert, Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps))

    def project(self, hidden_states: torch.FloatTensor, expert: str) -> tuple[torch.FloatTensor, ...]:
        """`(batch, tokens, hidden)` to queries, keys, values of shape `(batch, heads, tokens, head_dim)`."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = getattr(self, "q_norm" + expert)(getattr(self, "q_proj" + expert)(hidden_states).view(shape))
        key = getattr(self, "k_norm" + expert)(getattr(self, "k_proj" + expert)(hidden_states).view(shape))
        value = getattr(self, "v_proj" + expert)(hidden_states).view(shape)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def attend(
        self,
        query: torch.FloatTensor,
        key: torch.FloatTensor,
        value: torch.FloatTensor,
        position_embeddings: tuple[torch.FloatTensor, torch.FloatTensor],
        caches: list[Cache | None],
        masks: list,
        use_cache: bool = False,
        sequence_order: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """Rotate, meet the cache, attend. Returns `(batch, tokens, hidden)` before the output projection."""
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        outputs = []
        groups = (tensor.chunk(len(caches)) for tensor in (query, key, value))
        for query, key, value, cache, mask in zip(*groups, caches, masks, strict=True):
            if use_cache:
                if sequence_order is not None:
                    index = sequence_order[:, None, :, None].expand(-1, key.shape[1], -1, self.head_dim)
                    key, value = key.gather(2, index), value.gather(2, index)
                key, value = cache.update(key, value, self.layer_idx)
            elif cache_length(cache):
                past = cache.layers[self.layer_idx]
                key, value = torch.cat([past.keys, key], dim=2), torch.cat([past.values, value], dim=2)
            # is_causal must be said: without a mask, scaled_dot_product_attention would otherwise be told "causal".
            options = {"scaling": self.scaling, "is_causal": False}
            options["dropout"] = self.attention_dropout if self.training else 0.0
            outputs.append(attention(self, query, key, value, mask, **options)[0])
        return torch.cat(outputs).flatten(2)


class SynerMedGenDecoderLayer(GradientCheckpointingLayer):
    """One layer of two experts around a joint attention."""

    def __init__(self, config: SynerMedGenTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SynerMedGenAttention(config, layer_idx)
        for expert in ("", "_moe_gen"):
            self.add_module("mlp" + expert, Qwen2MLP(config))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + expert, Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(
        self,
        und: torch.FloatTensor,
        gen: torch.FloatTensor | None,
        detach_understanding: bool = False,
        **attention_kwargs,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """
        Args:
            und (`torch.FloatTensor` of shape `(batch, understanding_tokens, hidden)`): Understanding expert's tokens.
            gen (`torch.FloatTensor` of shape `(batch, generation_tokens, hidden)`, *optional*): Generation expert's.
            detach_understanding (`bool`): No gradient flows into or through the understanding tokens.

        Returns:
            `und` and `gen`, one layer further.
        """
        understanding = torch.no_grad if detach_understanding else contextlib.nullcontext
        with understanding():
            query, key, value = self.self_attn.project(self.input_layernorm(und), "")
        if gen is not None:
            gen_projected = self.self_attn.project(self.input_layernorm_moe_gen(gen), "_moe_gen")
            query, key, value = (
                torch.cat(pair, dim=2) for pair in zip((query, key, value), gen_projected, strict=True)
            )
        attended = self.self_attn.attend(query, key, value, **attention_kwargs)
        with understanding():
            und = und + self.self_attn.o_proj(attended[:, : und.shape[1]])
            und = und + self.mlp(self.post_attention_layernorm(und))
        if gen is not None:
            gen = gen + self.self_attn.o_proj_moe_gen(attended[:, und.shape[1] :])
            gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und, gen


class SynerMedGenTextModel(nn.Module):
    """Token embeddings, the decoder layers, and a final norm for each expert."""

    def __init__(self, config: SynerMedGenTextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SynerMedGenDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(
        self,
        und: torch.FloatTensor,
        gen: torch.FloatTensor | None,
        position_ids: torch.LongTensor,
        detach_understanding: bool = False,
        output_hidden_states: bool = False,
        **attention_kwargs,
    ):
        """
        Runs all layers. Returns `(und, gen)` after the final norms, and a list of those before: the embeddings and each
        layer's output, where asked for.
        """
        states = []
        position_embeddings = self.rotary_emb(und, position_ids)
        for layer in self.layers:
            if output_hidden_states:
                states.append((und, gen))
            und, gen = layer(
                und,
                gen,
                detach_understanding=detach_understanding,
                position_embeddings=position_embeddings,
                **attention_kwargs,
            )
        if output_hidden_states:
            states.append((und, gen))
        with torch.no_grad() if detach_understanding else contextlib.nullcontext():
            und = self.norm(und)
        return (und, None if gen is None else self.norm_moe_gen(gen)), states


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


# Where the Auto classes find this model in a repository that carries its code.
AUTO_MAP = {
    auto_class: "modeling_synermedgen.SynerMedGenForConditionalGeneration"
    for auto_class in ("AutoModel", "AutoModelForImageTextToText")
}


def without_adapters(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base model's own tensors under their own names, out of one that PEFT has put adapters into."""
    base = {}
    for name, tensor in state_dict.items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        base[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return base


class VelocityHead(nn.Linear):
    """Latent tokens to velocities. A fresh one predicts zero, so training starts from a calm place."""


class SynerMedGenPreTrainedModel(PreTrainedModel):
    config: SynerMedGenConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SynerMedGenDecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "caches"]
    _supports_sdpa = True
    _supports_flex_attn = True
    # Flash kernels take no mask, and an image block next to a causal text cannot be said without one.
    _supports_flash_attn = False
    _supports_attention_backend = True
    # The way into and out of the latent space is a thousandth of the weights and decides the picture: kept at float32
    # under float16 (bfloat16 has float32's range), and left out of quantisation.
    _keep_in_fp32_modules = [r"(model\.)?vae2llm", "llm2vae", r"(model\.)?time_embedder"]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        allow_missing: tuple[str, ...] | list[str] = (),
        allow_unexpected: tuple[str, ...] | list[str] = (),
        print_report: bool = True,
        output_loading_info: bool = False,
        **kwargs,
    ):
        r"""
        Load weights, all of them or none: transformers' `from_pretrained` under a strict report.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a Hub repository.
            allow_missing, allow_unexpected (`list[str]`, *optional*):
                Names of tensors, or patterns with `*`, that may be absent (they start from random numbers, and
                `config.missing_parts` says so) or left out.
            print_report (`bool`, defaults to `True`):
                Print the table of what was loaded; it stays in `model.load_report`.
            args, kwargs:
                As in transformers: `dtype`, `device_map`, `quantization_config`, `attn_implementation`, `revision`, ...

        Raises:
            `ValueError`: A tensor is missing, unexpected or of another shape; it is named.
            `OSError`: There are no safetensors (pickle files are never read), or a file is damaged.
        """
        allowed_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.pop("use_safetensors", None)  # always: without, pickle files would be read
        check_no_pickle(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        try:
            with without_reports("transformers.modeling_utils"):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *args,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are named below
                    use_safetensors=True,
                    **kwargs,
                )
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: a weights file is damaged or not complete ({error}). Get it again; "
                "nothing was loaded."
            ) from error
        report = LoadReport.from_loading_info(pretrained_model_name_or_path, model, info)
        if allowed_mismatch:
            allow_missing = [*allow_missing, *(name for name, *_ in report.mismatched)]
            report.missing += [name for name, *_ in report.mismatched]
            report.mismatched = []
        report.check(allow_missing, allow_unexpected)
        if report.missing:
            model.config.missing_parts = sorted({*model.config.missing_parts, *report.missing_parts})
        if model.can_generate() and model.generation_config.suppress_tokens is None:
            model.forbid_stand_ins()  # a download may come without generation_config.json
        model.load_report = report
        if print_report and os.environ.get("RANK", "0") == "0":
            logger.warning(report.table({"": model}))
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory, state_dict: dict | None = None, max_shard_size: int | str = "5GB", **kwargs
    ):
        r"""
        Save config, code and all weights as transformers does. With adapters loaded, which transformers would save
        alone, the base weights are saved all the same, and each adapter beside them in `lora/NAME`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            state_dict (`dict[str, torch.Tensor]`, *optional*): Instead of the model's own, as trainers pass it.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): Of one file of weights.
            kwargs: As in transformers: `is_main_process`, `push_to_hub`, ...
        """
        # What transformers did to the names of an adapter, it would undo to those of the model.
        kwargs |= {"max_shard_size": max_shard_size, "save_original_format": False}
        # Entries of a repository that this was loaded from would point there.
        self.config.auto_map = dict(AUTO_MAP)
        if self.config.missing_parts:
            # Random numbers saved would count as loaded the next time.
            missing = set(self.load_report.missing) if hasattr(self, "load_report") else set()
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {
                name: tensor
                for name, tensor in state_dict.items()
                if name not in missing or part_of(name) not in self.config.missing_parts
            }
        if not self._hf_peft_config_loaded:
            return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        state_dict = self.state_dict() if state_dict is None else state_dict
        self._hf_peft_config_loaded = False
        try:
            super().save_pretrained(save_directory, state_dict=without_adapters(state_dict), **kwargs)
        finally:
            self._hf_peft_config_loaded = True
        if kwargs.get("is_main_process", True):
            self.save_adapters(Path(save_directory) / "lora", state_dict)

    def save_adapters(self, folder: Path, state_dict: dict | None = None):
        """Save every adapter in PEFT's format, `folder/NAME/adapter_model.safetensors` with its config."""
        for name, config in self.peft_config.items():
            weights = self.get_adapter_state_dict(name, state_dict=state_dict)
            weights = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in weights.items()}
            (folder / name).mkdir(parents=True, exist_ok=True)
            config.save_pretrained(folder / name)
            save_file(weights, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SinCosPositionTable):
            init.copy_(module.table, module.compute())
        elif isinstance(module, VelocityHead):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class SynerMedGenModel(SynerMedGenPreTrainedModel):
    """The backbone: embedders and the Mixture-of-Transformers, without the two output heads."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^llm2vae\."]  # so it loads from a full checkpoint

    def __init__(self, config: SynerMedGenConfig):
        super().__init__(config)
        # Both parts are plain modules: the attention implementation reaches them through their own configs.
        config._attn_implementation = config._attn_implementation
        hidden_size = config.text_config.hidden_size
        self.vision_model = SynerMedGenVisionModel(config.vision_config)
        self.connector = SynerMedGenConnector(config)
        self.vit_pos_embed = SinCosPositionTable(config.vision_patches_per_side, hidden_size)
        self.vae2llm = nn.Linear(config.latent_token_dim, hidden_size)
        self.time_embedder = LatentTimeEmbedder(hidden_size)
        self.latent_pos_embed = SinCosPositionTable(config.max_latent_size, hidden_size)
        self.language_model = SynerMedGenTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_grid_hw: torch.LongTensor,
        image_index: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        What the transformer reads of images: ViT, connector, position.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(patches, patch_size**2 * 3)`): Patches of all images in order.
            image_grid_hw (`torch.LongTensor` of shape `(images, 2)`): Patch rows and columns of each image.
            image_index (`torch.LongTensor` of shape `(blocks,)`, *optional*): Which image each image block shows, where
                one is shown several times: it is encoded once. By default every image has one block.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` are the ViT features of all patches, `pooler_output` a
            list with one `(patches, hidden)` tensor per block.
        """
        check_count("pixel_values", pixel_values, int(image_grid_hw.prod(1).sum()), "patches in `image_grid_hw`")
        features = self.vision_model(pixel_values, image_grid_hw)
        embeds = self.connector(features)
        embeds = embeds + self.vit_pos_embed(grid_ids(image_grid_hw, self.vit_pos_embed.side, "ViT"))
        per_image = list(embeds.split(image_grid_hw.prod(1).tolist()))
        if image_index is not None:
            per_image = [per_image[number] for number in image_index.tolist()]
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=per_image)

    def get_latent_features(
        self, latents: torch.FloatTensor, latent_grid_hw: torch.LongTensor, timestep: torch.FloatTensor
    ) -> torch.FloatTensor:
        """
        Embed latent tokens. Clean ones have timestep 0, whose embedding is not zero and counts.

        Args:
            latents (`torch.FloatTensor` of shape `(tokens, latent_token_dim)`): Latent tokens of all blocks in order.
            latent_grid_hw (`torch.LongTensor` of shape `(blocks, 2)`): Token rows and columns of each block.
            timestep (`torch.FloatTensor` of shape `(blocks,)`): In [0, 1]; 1 is pure noise.

        Returns:
            `torch.FloatTensor` of shape `(tokens, hidden)`
        """
        check_count("latents", latents, int(latent_grid_hw.prod(1).sum()), "tokens in `latent_grid_hw`")
        check_count("timestep", timestep, len(latent_grid_hw), "blocks in `latent_grid_hw`")
        ids = grid_ids(latent_grid_hw, self.latent_pos_embed.side, "latent")
        time = self.time_embedder(timestep).repeat_interleave(latent_grid_hw.prod(1), dim=0)
        return self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + time + self.latent_pos_embed(ids)

    def embed(
        self,
        input_ids: torch.LongTensor,
        layout: SequenceLayout,
        image_features: list[torch.FloatTensor] | None,
        latent_features: torch.FloatTensor | None,
        detach_understanding: bool,
    ) -> torch.FloatTensor:
        """Token embeddings with image and latent features at their places, `(batch, length, hidden)`."""
        is_image = input_ids == self.config.image_token_id
        n_features = 0 if image_features is None else sum(len(features) for features in image_features)
        if is_image.sum() != n_features:
            raise ValueError(
                f"Image features and image tokens do not match: {int(is_image.sum())} image tokens in `input_ids`, "
                f"{n_features} patches in `pixel_values`."
            )
        n_latents = 0 if latent_features is None else len(latent_features)
        if layout.is_latent.sum() != n_latents:
            raise ValueError(
                f"Latents and latent tokens do not match: {int(layout.is_latent.sum())} latent tokens in `input_ids`, "
                f"{n_latents} in `latents`."
            )
        with torch.no_grad() if detach_understanding else contextlib.nullcontext():
            embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image | layout.is_latent, 0))
            if n_features:
                features = torch.cat(image_features).to(embeds.dtype)
                embeds = embeds.masked_scatter(is_image[..., None], features)
        if n_latents:
            embeds = embeds.masked_scatter(layout.is_latent[..., None], latent_features.to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        latents: torch.FloatTensor | None = None,
        latent_grid_hw: torch.LongTensor | None = None,
        timestep: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        detach_understanding: bool = False,
        **kwargs,
    ) -> SynerMedGenModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Texts and image blocks, with one stand-in id per ViT patch, clean latent token and noised token.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Rotary positions. Read off `input_ids` if absent; needed when continuing a cache.
            past_key_values (`Cache` or `list[Cache]`, *optional*):
                Earlier context, seen by every new token. A list gives each of as many equal groups of consecutive rows
                a context of its own length, without padding: the branches of guidance. It is only read.
            pixel_values, image_grid_hw, image_index:
                See [`~SynerMedGenModel.get_image_features`].
            latents, latent_grid_hw, timestep:
                See [`~SynerMedGenModel.get_latent_features`]; the blocks of all rows in order, noised ones included.
            mm_encoder_outputs (`dict`, *optional*):
                Image features already computed, as `generate` passes them.
            use_cache (`bool`, *optional*):
                Write this call's keys and values to the cache. A denoising step says False.
            output_hidden_states (`bool`, *optional*):
                Return the embeddings and every layer's output.
            detach_understanding (`bool`, defaults to `False`):
                No gradient into or through understanding tokens: the cheap way to train the generation expert alone.

        Returns:
            [`SynerMedGenModelOutput`]

        Raises:
            `ValueError`: Features and their places do not match in number, an image does not fit a position table,
            a cache is continued without `position_ids`, or several are to be written or masked.
        """
        if use_cache and self.training and self.is_activation_checkpointing:
            logger.warning_once("Gradient checkpointing runs layers twice, so no cache is written (use_cache=False).")
            use_cache = False
        several = isinstance(past_key_values, (list, tuple))
        if several and (use_cache or attention_mask is not None or len(input_ids) % len(past_key_values)):
            raise ValueError(
                f"{len(past_key_values)} caches for {len(input_ids)} rows: several caches serve equal groups of rows, "
                "are only read (use_cache=False) and take no attention_mask."
            )
        caches = list(past_key_values) if several else [past_key_values]
        past = cache_length(caches[0])
        if any(map(cache_length, caches)) and position_ids is None:
            raise ValueError(
                "Continuing a cache needs `position_ids`: an image block counts as one position however many tokens "
                "it has, so they cannot be read off the length of the cache."
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
            caches = [past_key_values]
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, past + length), got shape {tuple(attention_mask.shape)}.")
        batch, length = input_ids.shape
        if attention_mask is None:
            valid = torch.ones(batch, past + length, dtype=torch.bool, device=input_ids.device)
        else:
            valid = attention_mask != 0
        layout = read_layout(self.config, input_ids, valid[:, past:])
        position_ids = layout.positions if position_ids is None else position_ids.expand(batch, -1)

        # 1. Everything becomes an embedding at its place in the sequence.
        with torch.no_grad() if detach_understanding else contextlib.nullcontext():
            image_features = None
            if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
                image_features = mm_encoder_outputs["image"].pooler_output
            elif pixel_values is not None:
                image_features = self.get_image_features(pixel_values, image_grid_hw, image_index).pooler_output
        latent_features = None
        if latents is not None:
            latent_features = self.get_latent_features(latents, latent_grid_hw, timestep)
        embeds = self.embed(input_ids, layout, image_features, latent_features, detach_understanding)

        # 2. Understanding tokens first, generation tokens last: each expert gets one contiguous slice.
        sequence_order = None
        index = torch.arange(length, device=input_ids.device).expand(batch, -1)
        und, gen = embeds, None
        key_index, key_valid = index, valid[:, past:]
        if latents is not None:
            und_index, und_used, gen_index, gen_used = split_experts(layout.is_latent, valid[:, past:])
            index = torch.cat([und_index, gen_index], dim=1)
            used = torch.cat([und_used, gen_used], dim=1)
            # Slots that only fill up a row point at token 0 and must not overwrite its own slot. Padding has none, and
            # comes back as whatever is in the first.
            slots = torch.arange(index.shape[1], device=index.device).expand(batch, -1)
            sequence_order = torch.zeros(batch, length + 1, dtype=torch.long, device=index.device)
            sequence_order = sequence_order.scatter(1, index.masked_fill(~used, length), slots)[:, :length]
            und, gen = take(embeds, und_index), take(embeds, gen_index)
            position_ids = position_ids.gather(1, index)
            if detach_understanding:
                und = und.detach()
            if not use_cache:
                # Without a cache to write, keys stay as they lie; with one they are put back in sequence order.
                key_index, key_valid = index, used & key_valid.gather(1, index)
        allowed = allowed_attention(layout, index, key_index, key_valid)
        masks = []
        for cache, own in zip(caches, allowed.chunk(len(caches)), strict=True):
            seen = own.new_ones(len(own), cache_length(cache)) if several else valid[:, :past]
            seen = seen[:, None, None].expand(-1, -1, own.shape[2], -1)
            own = torch.cat([seen, own], dim=-1)
            masks.append(backend_mask(own, self.config.text_config._attn_implementation, embeds.dtype))

        # 3. The layers, then back to sequence order.
        normed, states = self.language_model(
            und,
            gen,
            position_ids,
            detach_understanding=detach_understanding,
            output_hidden_states=bool(output_hidden_states),
            caches=caches,
            masks=masks,
            use_cache=bool(use_cache),
            sequence_order=sequence_order,
        )

        def in_order(state):
            return state[0] if sequence_order is None else take(torch.cat(state, dim=1), sequence_order)

        return SynerMedGenModelOutput(
            last_hidden_state=in_order(normed),
            past_key_values=past_key_values,
            hidden_states=tuple(map(in_order, states)) if output_hidden_states else None,
        )


def split_experts(is_latent: torch.BoolTensor, valid: torch.BoolTensor) -> tuple[torch.Tensor, ...]:
    """
    Sequence indices of understanding and generation tokens, each row filled up to the longest with index 0.

    Args:
        is_latent (`torch.BoolTensor` of shape `(batch, length)`): Generation tokens.
        valid (`torch.BoolTensor` of shape `(batch, length)`): What is no padding, which no expert needs to see.

    Returns:
        `und_index`, `und_used`, `gen_index`, `gen_used`: index and whether it is real, `(batch, longest)` each.
    """
    result = []
    for mine in (~is_latent & valid, is_latent):
        count = mine.sum(1, keepdim=True)
        index = torch.argsort((~mine).long(), dim=1, stable=True)[:, : int(count.max())]
        used = torch.arange(index.shape[1], device=index.device) < count
        result += [index.masked_fill(~used, 0), used]
    return tuple(result)


def take(hidden_states: torch.FloatTensor, index: torch.LongTensor) -> torch.FloatTensor:
    """Rows `index` of shape `(batch, n)` out of `(batch, tokens, hidden)`."""
    return hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[-1]))


class SynerMedGenForConditionalGeneration(SynerMedGenPreTrainedModel, GenerationMixin):
    """
    SynerMedGen with its two heads: `lm_head` answers, `llm2vae` denoises. All four uses go through `forward`:

    * understanding: ids with images, `labels` for training, `generate` for answers;
    * context: `use_cache=True` with images and clean latents, then keep `past_key_values`;
    * denoising: `latents`, `timestep` and that cache, read `velocity`;
    * joint training: everything at once, `labels` and `velocity_labels`.
    """

    def __init__(self, config: SynerMedGenConfig):
        super().__init__(config)
        self.model = SynerMedGenModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.llm2vae = VelocityHead(config.text_config.hidden_size, config.latent_token_dim)
        self.post_init()
        self.forbid_stand_ins()

    def forbid_stand_ins(self):
        """Stand-ins mark places and are no words: an answer must not hold any."""
        config = self.config
        self.generation_config.suppress_tokens = [
            config.image_token_id,
            config.latent_token_id,
            config.target_token_id,
        ]

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_image_features(self, *args, **kwargs):
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        latents: torch.FloatTensor | None = None,
        latent_grid_hw: torch.LongTensor | None = None,
        timestep: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        labels: torch.LongTensor | None = None,
        velocity_labels: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        detach_understanding: bool = False,
        **kwargs,
    ) -> SynerMedGenOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                `input_ids` where a token is to be learned, -100 elsewhere; shifted inside.
            velocity_labels (`torch.FloatTensor` of shape `(target_tokens, latent_token_dim)`, *optional*):
                `noise - data` of every noised token.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Compute logits of the last so many tokens only; 0 means all.

            The others as in [`SynerMedGenModel.forward`].

        Returns:
            [`SynerMedGenOutput`]
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            image_index=image_index,
            latents=latents,
            latent_grid_hw=latent_grid_hw,
            timestep=timestep,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            detach_understanding=detach_understanding,
        )
        hidden_states = outputs.last_hidden_state

        velocity, loss_mse = None, None
        is_target = input_ids == self.config.target_token_id
        if velocity_labels is not None:
            check_count("velocity_labels", velocity_labels, int(is_target.sum()), "target tokens in `input_ids`")
        if is_target.any():
            velocity = self.llm2vae(hidden_states[is_target].to(self.llm2vae.weight.dtype))
            if velocity_labels is not None:
                loss_mse = nn.functional.mse_loss(velocity.float(), velocity_labels.float())

        logits, loss_ce = None, None
        if labels is not None or velocity is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
            if labels is not None and (labels[:, 1:] != -100).any():
                loss_ce = self.loss_function(logits, labels, self.config.text_config.vocab_size, **kwargs)
            elif labels is not None:
                loss_ce = 0 * logits.float().sum()  # a batch without an answer teaches nothing, rather than NaN

        losses = [loss for loss in (loss_ce, loss_mse) if loss is not None]
        return SynerMedGenOutput(
            loss=sum(losses) if losses else None,
            loss_ce=loss_ce,
            loss_mse=loss_mse,
            logits=logits,
            velocity=velocity,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # An image block is one position however many tokens it has.
        input_ids = model_kwargs.get("input_ids")
        input_ids = inputs_tensor if input_ids is None or input_ids.shape[1] == 0 else input_ids
        return read_layout(self.config, input_ids, model_kwargs.get("attention_mask")).positions


# What is saved carries this file, and the files it imports, for those without the package.
SynerMedGenForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "SynerMedGenPreTrainedModel",
    "SynerMedGenModel",
    "SynerMedGenForConditionalGeneration",
    "SynerMedGenOutput",
    "SynerMedGenModelOutput",
    "read_layout",
]
