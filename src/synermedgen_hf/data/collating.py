"""Questions from rows of a data set to batches of the model: what a row must hold, its length, its layout."""

from io import BytesIO

import torch
from PIL import Image

from ..image_processing_synermedgen import own_window
from ..processing_synermedgen import ImageBlock, TextBlock, build_sequence, pad_sequences


def question_blocks(processor, messages: list[dict], grids: list[tuple[int, int]]) -> list[TextBlock | ImageBlock]:
    """
    A conversation as blocks, as the processor's chat template lays it out; what the assistant says is to be learned.

    Args:
        processor ([`SynerMedGenProcessor`]): For its tokenizer.
        messages (`list[dict]`): With `role` and `content`, a list of `{"type": "image"}` and `{"type": "text", ...}`.
        grids (`list[tuple[int, int]]`): Rows and columns of patches of each image, in order.

    Raises:
        `ValueError`: There are more or fewer places for images than images.
    """
    blocks, left = [], list(grids)
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                if not left:
                    raise ValueError(f"the messages have more places for images than images ({len(grids)})")
                blocks.append(ImageBlock("image", left.pop(0)))
            elif part["text"] and part["text"].strip():
                blocks.append(processor.text_block(part["text"].strip(), learned=message["role"] == "assistant"))
    if left:
        raise ValueError(f"the messages have places for {len(grids) - len(left)} of {len(grids)} images")
    return blocks


def check_question(processor, tokens, row: dict, max_length: int) -> int:
    """
    The length of a row in tokens, once it is known to be one that can be learned from.

    Args:
        processor ([`SynerMedGenProcessor`]): Tokenizer and image processor.
        tokens: Anything with the special ids, see [`~synermedgen_hf.processing_synermedgen.build_sequence`].
        row (`dict`): `images` (pictures, or their files as `{"bytes", "path"}`, which are opened but not decoded),
            `messages`, and perhaps `options` and `answer`.
        max_length (`int`): The context, in tokens.

    Raises:
        `ValueError`: There is no image, one cannot be opened, the answer is empty or none of the options, or the row is
            too long.
    """
    if not row.get("images"):
        raise ValueError("it has no image")
    grids = []
    for picture in row["images"]:
        if isinstance(picture, dict):
            try:
                picture = Image.open(picture["path"] if picture["bytes"] is None else BytesIO(picture["bytes"]))
            except OSError:  # its words name the file, and a file may be named after a patient
                raise ValueError(f"its image {len(grids) + 1} of {len(row['images'])} cannot be opened") from None
        window = {"window": own_window(picture)}
        count = processor.image_processor.get_number_of_image_patches(picture.height, picture.width, window)
        grids.append((1, count))
    blocks = question_blocks(processor, row["messages"], grids)
    answers = [block for block in blocks if isinstance(block, TextBlock) and block.learned]
    if not answers or not all(block.ids for block in answers):
        raise ValueError("it has no answer")
    if row.get("options") and row["answer"] not in row["options"]:
        raise ValueError(f"the answer {row['answer']!r} is none of the options {', '.join(row['options'])}")
    length = len(build_sequence(tokens, blocks).input_ids)
    if length > max_length:
        raise ValueError(
            f"it has {len(grids)} images and {length} tokens, and the context holds {max_length}: ask for fewer "
            "candidates or panels, make the images smaller (vit_size), or raise max_length"
        )
    return length


class QuestionCollator:
    """
    Rows to a batch. A picture that several rows show is in it once, and `image_index` says where it is shown.

    Args:
        processor ([`SynerMedGenProcessor`]): Tokenizer and image processor.
        tokens: Anything with the special ids and `pad_token_id`: the model's configuration.
    """

    def __init__(self, processor, tokens):
        self.processor, self.tokens = processor, tokens

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        number_of, pictures, shown = {}, [], []
        for picture in (picture for row in rows for picture in row["images"]):
            colours = (picture.getpalette(), picture.info.get("transparency")) if picture.mode == "P" else None
            content = (picture.mode, picture.size, picture.tobytes(), str(colours))
            if content not in number_of:
                number_of[content] = len(pictures)
                pictures.append(picture)
            shown.append(number_of[content])
        windows = [own_window(picture) for picture in pictures]
        images = self.processor.image_processor(pictures, window=windows, return_tensors="pt")
        grids = [tuple(images["image_grid_hw"][number].tolist()) for number in shown]
        sequences = []
        for row in rows:
            mine, grids = grids[: len(row["images"])], grids[len(row["images"]) :]
            blocks = question_blocks(self.processor, row["messages"], mine)
            sequences.append(build_sequence(self.tokens, blocks))
        return {**pad_sequences(self.tokens, sequences), **images, "image_index": torch.tensor(shown)}


__all__ = ["QuestionCollator", "check_question", "question_blocks"]
