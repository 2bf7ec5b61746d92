"""Words and images to the model's inputs: modalities, instructions, blocks, and the chat template's other half.

A SynerMedGen sequence has no roles. A text is `<|im_start|> ids <|im_end|>`, an image is `<|vision_start|> one id per
token <|vision_end|>`, and blocks simply follow one another. `build_sequence` is the only place that lays them out.
"""

from dataclasses import dataclass

import torch
from transformers import AutoImageProcessor
from transformers.processing_utils import ProcessorMixin

from .configuration_synermedgen import SynerMedGenConfig
from .image_processing_synermedgen import SynerMedGenImageProcessor

# What the words of an instruction call each modality.
MODALITY_NAMES = {
    "T1": "T1-weighted MRI",
    "T1CE": "contrast-enhanced T1-weighted MRI",
    "T2": "T2-weighted MRI",
    "FLAIR": "FLAIR MRI",
    "MRI": "MRI",
    "CT": "CT",
    "CBCT": "cone-beam CT",
    "PET": "FDG PET",
}
REGION_NAMES = {
    "brain": "brain",
    "pelvis": "pelvis",
    "whole-body": "whole body",
    "abdomen": "abdomen",
    "thorax": "thorax",
    "head-neck": "head and neck",
    "heart": "heart",
}
# Name of the id in the configuration -> the token of Qwen2.5's vocabulary.
SPECIAL_TOKENS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "latent_token_id": "<|vision_pad|>",
    "target_token_id": "<|video_pad|>",
}
MODALITY_QUESTION = "Which modality is this image?"

# One answer turn is `<|im_start|>` (given) and the answer with its `<|im_end|>` (learned).
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
<|image_pad|>
{%- elif part['type'] == 'text' and part['text'] and part['text'].strip() -%}
<|im_start|>
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ part['text'].strip() }}<|im_end|>{%- endgeneration -%}
{%- else -%}
{{ part['text'].strip() }}<|im_end|>
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}
"""


def make_instruction(sources: str | list[str], target: str, region: str | None = None) -> str:
    """
    The sentence that asks for a synthesis, the same in training and inference.

    Args:
        sources (`str` or `list[str]`): Modality or modalities of the given images, such as `"MRI"`.
        target (`str`): Modality to make.
        region (`str`, *optional*): `"brain"`, `"pelvis"` or `"whole-body"`; left out of the sentence if unknown.

    Returns:
        `str`

    Raises:
        `ValueError`: Unknown modality or region.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    for name in [*sources, target]:
        if name not in MODALITY_NAMES:
            raise ValueError(f"Unknown modality {name!r}. Choose one of {', '.join(MODALITY_NAMES)}.")
    if region is not None and region not in REGION_NAMES:
        raise ValueError(f"Unknown region {region!r}. Choose one of {', '.join(REGION_NAMES)}.")
    place = "" if region is None else f" of the {REGION_NAMES[region]}"
    given = " and ".join(MODALITY_NAMES[name] for name in sources)
    return f"Synthesise the {MODALITY_NAMES[target]} image{place} from the {given} image."


@dataclass
class TextBlock:
    """
    Args:
        ids (`list[int]`): Tokens without `<|im_start|>` and `<|im_end|>`.
        learned (`bool`): Whether the text is an answer to be learned.
        dropped (`bool`): Left out by condition dropout.
    """

    ids: list[int]
    learned: bool = False
    dropped: bool = False


@dataclass
class ImageBlock:
    """
    Args:
        kind (`str`): `"image"` (ViT patches), `"latent"` (clean latents) or `"target"` (noised latents).
        grid_hw (`tuple[int, int]`): Rows and columns of tokens.
        dropped (`bool`): Left out by condition dropout.
    """

    kind: str
    grid_hw: tuple[int, int]
    dropped: bool = False


@dataclass
class BlockSequence:
    """
    Args:
        input_ids, position_ids, labels (`list[int]`):
            As the model takes them, of equal length.
        kinds (`list[str]`):
            The kinds of the blocks kept, in order; texts are `"text"`.
        lengths (`list[int]`):
            Their lengths in tokens, delimiters included.
        next_position (`int`):
            Rotary position of whatever follows.
    """

    input_ids: list[int]
    position_ids: list[int]
    labels: list[int]
    kinds: list[str]
    lengths: list[int]
    next_position: int = 0


def build_sequence(tokens, blocks: list[TextBlock | ImageBlock]) -> BlockSequence:
    """
    Lay blocks out one after another.

    A text advances the rotary position by its length, an image by one, a target not at all. A dropped image still takes
    its position while a dropped text leaves none behind, as the weights of this family were trained.

    Args:
        tokens: Anything with the special ids as attributes: a [`SynerMedGenConfig`] or a [`SynerMedGenProcessor`].
        blocks (`list`): [`TextBlock`] and [`ImageBlock`] in order.

    Returns:
        [`BlockSequence`]
    """
    sequence = BlockSequence([], [], [], [], [])
    position = 0
    for block in blocks:
        is_text = isinstance(block, TextBlock)
        if block.dropped:
            position += 0 if is_text or block.kind == "target" else 1
            continue
        if is_text:
            ids = [tokens.bos_token_id, *block.ids, tokens.eos_token_id]
            positions = list(range(position, position + len(ids)))
            position += len(ids)
            labels = [-100, *ids[1:]] if block.learned else [-100] * len(ids)
        else:
            stand_in = getattr(tokens, f"{block.kind}_token_id")
            count = block.grid_hw[0] * block.grid_hw[1]
            ids = [tokens.vision_start_token_id, *[stand_in] * count, tokens.vision_end_token_id]
            positions = [position] * len(ids)
            position += 0 if block.kind == "target" else 1
            labels = [-100] * len(ids)
        sequence.input_ids += ids
        sequence.position_ids += positions
        sequence.labels += labels
        sequence.kinds.append("text" if is_text else block.kind)
        sequence.lengths.append(len(ids))
    sequence.next_position = position
    return sequence


def pad_sequences(tokens, sequences: list[BlockSequence]) -> dict[str, torch.Tensor]:
    """
    Rows of a batch, padded on the right to the longest.

    Args:
        tokens: As in [`build_sequence`], with `pad_token_id`.
        sequences (`list[BlockSequence]`): One per row.

    Returns:
        `dict`: `input_ids`, `attention_mask` (0 at padding), `position_ids` and `labels` (-100 where nothing is to be
        learned), int64 `(rows, longest)`.
    """
    longest = max(len(sequence.input_ids) for sequence in sequences)

    def pad(rows, filler):
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": pad([sequence.input_ids for sequence in sequences], tokens.pad_token_id),
        "attention_mask": pad([[1] * len(sequence.input_ids) for sequence in sequences], 0),
        "position_ids": pad([sequence.position_ids for sequence in sequences], 0),
        "labels": pad([sequence.labels for sequence in sequences], -100),
    }


class SynerMedGenProcessor(ProcessorMixin):
    r"""
    Tokenizer and image processor in one.

    ```python
    >>> inputs = processor(text="<|image_pad|><|im_start|>Which modality is this image?<|im_end|><|im_start|>",
    ...                    images=image, return_tensors="pt")
    ```

    Each `<|image_pad|>` in a text becomes one image block; the chat template writes both texts and images in this form.

    Args:
        image_processor ([`SynerMedGenImageProcessor`]): Scanner units to model units and back.
        tokenizer (`PreTrainedTokenizerBase`): A Qwen2.5 tokenizer, or one with the same special tokens.
        chat_template (`str`, *optional*): Defaults to SynerMedGen's own.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = SPECIAL_TOKENS["image_token_id"]
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {', '.join(missing)}. Use a Qwen2.5 tokenizer, or add them as special tokens."
            )
        for name, token in SPECIAL_TOKENS.items():
            setattr(self, name, vocabulary[token])
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The token string of one image block, by its patch grid."""
        rows, columns = image_inputs["image_grid_hw"][image_idx]
        return f"<|vision_start|>{self.image_token * int(rows * columns)}<|vision_end|>"

    def text_block(self, text: str, **flags) -> TextBlock:
        """Tokenise one text into a [`TextBlock`]."""
        return TextBlock(self.tokenizer(text, add_special_tokens=False)["input_ids"], **flags)


AutoImageProcessor.register(
    SynerMedGenConfig, image_processor_classes={"pil": SynerMedGenImageProcessor}, exist_ok=True
)
SynerMedGenProcessor.register_for_auto_class()

__all__ = [
    "SynerMedGenProcessor",
    "BlockSequence",
    "ImageBlock",
    "TextBlock",
    "build_sequence",
    "make_instruction",
    "pad_sequences",
]
