"""Configuration of SynerMedGen: a text config (the two-expert transformer), a vision config (SigLIP) and the latents.

The defaults are those of BAGEL-7B-MoT, the family SynerMedGen belongs to.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig


@strict
class SynerMedGenTextConfig(Qwen2Config):
    r"""
    Sizes of the Mixture-of-Transformers. A Qwen2 configuration: each decoder layer holds an understanding expert and a
    generation expert of this same shape, and both normalise queries and keys per head.

    ```python
    >>> from synermedgen_hf import SynerMedGenTextConfig

    >>> SynerMedGenTextConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=5)
    ```
    """

    model_type = "synermedgen_text"
    base_config_key = "text_config"
    default_theta = 1_000_000.0

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be num_attention_heads ({self.num_attention_heads}) times an "
                "even head width."
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be divisible by 4 for the 2-D position tables.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )


@strict
class SynerMedGenConfig(PreTrainedConfig):
    r"""
    Configuration of [`SynerMedGenModel`] and [`SynerMedGenForConditionalGeneration`].

    Args:
        text_config (`SynerMedGenTextConfig` or `dict`, *optional*):
            The two-expert transformer.
        vision_config (`SiglipVisionConfig` or `dict`, *optional*):
            The vision transformer that reads images for understanding. `num_hidden_layers` counts the layers really
            used; `image_size // patch_size` is the side of its table of positions.
        latent_channels (`int`, defaults to 16):
            Channels of the VAE latent.
        latent_patch_size (`int`, defaults to 2):
            Latent positions per token side; one latent token holds `latent_patch_size**2 * latent_channels` values.
        max_latent_size (`int`, defaults to 64):
            Side of the table of latent positions, in tokens. It fixes the row stride of the ids: two checkpoints with
            different values are not interchangeable.
        timestep_shift (`float`, defaults to 1.0):
            Shift of the logit-normal timesteps in training. Sampling has its own, in the scheduler.
        vision_start_token_id, vision_end_token_id (`int`):
            Delimiters around every image block, `<|vision_start|>` and `<|vision_end|>`.
        image_token_id, latent_token_id, target_token_id (`int`):
            Stand-ins in `input_ids` for one ViT patch, one latent token of a conditioning image and one noised latent
            token of the image to be made. They only mark places and are never embedded.
        bos_token_id, eos_token_id, pad_token_id (`int`):
            `<|im_start|>`, `<|im_end|>` (around every text) and padding.
        trained_tasks (`list[str]`):
            What this checkpoint has learned to understand, of `"CTS"`, `"MI"`, `"TIA"` and the control `"VQA"`;
            empty if nothing yet.
        label_images (`bool`, defaults to `False`):
            Whether its training wrote before each of several images what the question calls it, such as `A`.
        trained_routes (`list[str]`):
            Names of the routes it was trained to synthesise, such as `"brain/MRI-CT"`; empty if unknown, in which
            case no route is refused.
        missing_parts (`list[str]`):
            Parts whose weights were never loaded or trained, of `"understanding"`, `"generation"`, `"vision"`; what
            needs them is refused.
        notice (`str`, *optional*):
            What every user of this checkpoint must know; the pipeline says it when it loads.
        sampling (`dict`):
            What the pipeline uses where the caller says nothing: `num_inference_steps`, `guidance_scale`,
            `image_guidance_scale`. The defaults are SynerMedGen's published ones.
    """

    model_type = "synermedgen"
    sub_configs_defaults = {"text_config": SynerMedGenTextConfig, "vision_config": SiglipVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    latent_channels: int = 16
    latent_patch_size: int = 2
    max_latent_size: int = 64
    timestep_shift: float = 1.0
    bos_token_id: int | None = 151644
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = 151643
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    latent_token_id: int = 151654
    target_token_id: int = 151656
    trained_tasks: list[str] | None = None
    label_images: bool = False
    trained_routes: list[str] | None = None
    missing_parts: list[str] | None = None
    notice: str | None = None
    sampling: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            # SigLIP so400m at 980 px without its last layer, as BAGEL cut it.
            self.vision_config = {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 980,
                "patch_size": 14,
                "vision_use_head": False,
            }
        self.trained_tasks = list(self.trained_tasks or [])
        self.trained_routes = list(self.trained_routes or [])
        self.missing_parts = list(self.missing_parts or [])
        self.sampling = {
            "num_inference_steps": 49,
            "guidance_scale": 4.0,
            "image_guidance_scale": 1.5,
            **(self.sampling or {}),
        }
        super().__post_init__(**kwargs)

    @property
    def latent_token_dim(self) -> int:
        """Values in one latent token."""
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def vision_patches_per_side(self) -> int:
        """Side of the ViT's table of positions, in patches."""
        return self.vision_config.image_size // self.vision_config.patch_size


SynerMedGenConfig.register_for_auto_class()

__all__ = ["SynerMedGenConfig", "SynerMedGenTextConfig"]
