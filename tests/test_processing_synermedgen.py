"""Words and images to the model's inputs: instructions, blocks, the chat template and the processor itself."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast

from synermedgen_hf import MODALITIES, REGIONS, ROUTES, SynerMedGenProcessor
from synermedgen_hf.processing_synermedgen import ImageBlock, TextBlock, build_sequence, make_instruction

SCAN, VIEW, TARGET = ImageBlock("latent", (1, 2)), ImageBlock("image", (2, 1)), ImageBlock("target", (1, 1))
QUESTION, ANSWER = TextBlock([5, 6]), TextBlock([7], learned=True)


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def say(text):
    return {"type": "text", "text": text}


def show(image):
    return {"type": "image", "image": image}


WIDE, SQUARE = picture(28, 42), picture(56, 56, seed=1)  # 2x3 and 4x4 patches
CHAT = [
    {"role": "user", "content": [show(WIDE), say("Left?"), show(SQUARE), say("Right?"), show(WIDE)]},
    {"role": "assistant", "content": [say("CT")]},
    {"role": "user", "content": [say("Sure?")]},
    {"role": "assistant", "content": "Yes"},
]


def chat_inputs(processor, messages, **options):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, **{"return_tensors": "pt", **options}
    )


def blocks_of(processor, *parts):
    """Texts and grids as blocks; an answer comes as a one-element list."""

    def block(part):
        if isinstance(part, tuple):
            return ImageBlock("image", part)
        return processor.text_block(part[0], learned=True) if isinstance(part, list) else processor.text_block(part)

    return build_sequence(processor, [block(part) for part in parts])


# ---------------------------------------------------------------------------------------------------------------------
# Instructions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_each_route_has_an_instruction_of_its_own(route):
    mine = make_instruction(route.source, route.target, route.region)
    others = [make_instruction(other.source, other.target, other.region) for other in ROUTES if other != route]
    assert mine not in others
    assert route.region.replace("-", " ") in mine


def test_the_words_of_an_instruction():
    assert make_instruction("MRI", "CT", "brain") == "Synthesise the CT image of the brain from the MRI image."
    assert make_instruction("CBCT", "CT") == "Synthesise the CT image from the cone-beam CT image."
    assert make_instruction("CT", "PET", "whole-body") == (
        "Synthesise the FDG PET image of the whole body from the CT image."
    )


def test_several_sources_are_named_in_order():
    assert make_instruction(["T1", "T2", "T1CE"], "FLAIR", "brain") == (
        "Synthesise the FLAIR MRI image of the brain from the T1-weighted MRI and T2-weighted MRI and "
        "contrast-enhanced T1-weighted MRI image."
    )
    assert make_instruction(["MRI"], "CT") == make_instruction("MRI", "CT")
    assert make_instruction(["T1", "T2"], "FLAIR") != make_instruction(["T2", "T1"], "FLAIR")


def test_every_public_modality_and_region_has_words():
    pairs = itertools.permutations(MODALITIES, 2)
    assert len({make_instruction(*pair, region) for pair in pairs for region in REGIONS}) == 8 * 7 * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mri", "CT"), "Unknown modality 'mri'. Choose one of T1, T1CE, T2, FLAIR, MRI, CT, CBCT, PET"),
        (("MRI", "Xray"), "Unknown modality 'Xray'"),
        ((["T1", "T3"], "CT"), "Unknown modality 'T3'"),
        (("MRI", "CT", "knee"), "Unknown region 'knee'. Choose one of brain, pelvis, whole-body"),
    ],
)
def test_unknown_names_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_instruction(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_sequence_is_its_blocks_one_after_another(config):
    bos, eos, start, end = 257, 258, 259, 260
    latent, image, target = 261, 262, 263
    sequence = build_sequence(config, [SCAN, VIEW, QUESTION, TARGET, ANSWER])
    assert sequence.input_ids == [
        *[start, latent, latent, end],
        *[start, image, image, end],
        *[bos, 5, 6, eos],
        *[start, target, end],
        *[bos, 7, eos],
    ]
    # An image is one position, a text one per token, a target none.
    assert sequence.position_ids == [*[0] * 4, *[1] * 4, 2, 3, 4, 5, *[6] * 3, 6, 7, 8]
    assert sequence.labels == [-100] * 16 + [7, eos]
    assert sequence.kinds == ["latent", "image", "text", "target", "text"]
    assert sequence.lengths == [4, 4, 4, 3, 3]


def test_only_answers_are_learned(config):
    assert set(build_sequence(config, [VIEW, QUESTION, TARGET]).labels) == {-100}


def test_a_dropped_image_keeps_its_position_and_a_dropped_text_does_not(config):
    no_image = build_sequence(config, [ImageBlock("latent", (1, 2), dropped=True), QUESTION, TARGET])
    assert no_image.position_ids == [1, 2, 3, 4, 5, 5, 5] and no_image.kinds == ["text", "target"]
    no_text = build_sequence(config, [VIEW, TextBlock([5, 6], dropped=True), TARGET])
    assert no_text.position_ids == [0, 0, 0, 0, 1, 1, 1] and no_text.kinds == ["image", "target"]
    no_target = build_sequence(config, [ImageBlock("target", (1, 1), dropped=True), QUESTION])
    assert no_target.position_ids == [0, 1, 2, 3]


def test_a_sequence_is_the_same_by_config_and_by_processor(config, processor):
    blocks = [SCAN, VIEW, QUESTION, TARGET, ANSWER]
    assert build_sequence(config, blocks) == build_sequence(processor, blocks)


def test_a_text_block_has_no_special_tokens(processor):
    block = processor.text_block("MRI", learned=True)
    assert processor.tokenizer.convert_ids_to_tokens(block.ids) == ["M", "R", "I"]
    assert block.learned and not block.dropped


# ---------------------------------------------------------------------------------------------------------------------
# The processor
# ---------------------------------------------------------------------------------------------------------------------


def test_each_image_token_becomes_one_block_of_patches(processor):
    text = "<|image_pad|><|im_start|>Left?<|im_end|><|image_pad|><|im_start|>Right?<|im_end|>"
    inputs = processor(text=text, images=[WIDE, SQUARE], return_tensors="pt")
    assert inputs["image_grid_hw"].tolist() == [[2, 3], [4, 4]]
    assert inputs["pixel_values"].shape == (2 * 3 + 4 * 4, 3 * 14 * 14)
    expected = blocks_of(processor, (2, 3), "Left?", (4, 4), "Right?")
    assert inputs["input_ids"].tolist() == [expected.input_ids]


def test_pixels_are_the_image_processors(processor):
    inputs = processor(text="<|image_pad|><|image_pad|>", images=[WIDE, SQUARE], return_tensors="pt")
    alone = processor.image_processor([WIDE, SQUARE], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])


def test_text_alone(processor):
    inputs = processor(text="<|im_start|>Hello<|im_end|>", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [blocks_of(processor, "Hello").input_ids]
    assert "pixel_values" not in inputs


def test_a_batch_is_padded_on_the_left(processor):
    texts = ["<|im_start|>Hi<|im_end|>", "<|image_pad|><|im_start|>A longer one<|im_end|>"]
    inputs = processor(text=texts, images=[[], [WIDE]], padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert (ids[0, mask[0] == 0] == processor.tokenizer.pad_token_id).all()
    assert ids[0, mask[0] == 1].tolist() == blocks_of(processor, "Hi").input_ids and mask[0, -4:].all()
    assert ids[1].tolist() == blocks_of(processor, (2, 3), "A longer one").input_ids and mask[1].all()


# ---------------------------------------------------------------------------------------------------------------------
# The chat template
# ---------------------------------------------------------------------------------------------------------------------


def test_a_chat_is_written_without_roles(processor):
    assert processor.apply_chat_template(CHAT, tokenize=False) == (
        "<|image_pad|><|im_start|>Left?<|im_end|><|image_pad|><|im_start|>Right?<|im_end|><|image_pad|>"
        "<|im_start|>CT<|im_end|><|im_start|>Sure?<|im_end|><|im_start|>Yes<|im_end|>"
    )


def test_a_chat_gives_the_same_ids_as_its_blocks(processor):
    inputs = chat_inputs(processor, CHAT)
    expected = blocks_of(processor, (2, 3), "Left?", (4, 4), "Right?", (2, 3), ["CT"], "Sure?", ["Yes"])
    assert inputs["input_ids"].tolist() == [expected.input_ids]
    assert inputs["image_grid_hw"].tolist() == [[2, 3], [4, 4], [2, 3]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == inputs["image_grid_hw"].prod(1).sum()


def test_the_assistant_mask_marks_what_a_block_learns(processor):
    inputs = chat_inputs(processor, CHAT, return_assistant_tokens_mask=True)
    labels = inputs["input_ids"].masked_fill(inputs["assistant_masks"] == 0, -100)
    expected = blocks_of(processor, (2, 3), "Left?", (4, 4), "Right?", (2, 3), ["CT"], "Sure?", ["Yes"])
    assert labels.tolist() == [expected.labels]
    learned = labels[labels != -100]
    assert processor.tokenizer.convert_ids_to_tokens(learned) == ["C", "T", "<|im_end|>", "Y", "e", "s", "<|im_end|>"]


def test_the_generation_prompt_opens_an_answer(processor):
    asked = chat_inputs(processor, CHAT[:1], add_generation_prompt=True)["input_ids"][0].tolist()
    answered = chat_inputs(processor, CHAT[:2])["input_ids"][0].tolist()
    assert asked[-1] == processor.bos_token_id
    assert asked == answered[: len(asked)]


def test_empty_texts_leave_nothing_and_white_space_is_stripped(processor):
    tidy = [{"role": "user", "content": [show(WIDE), say("Left?")]}]
    untidy = [{"role": "user", "content": [say("  "), show(WIDE), say("\n Left? \n"), say("")]}]
    assert processor.apply_chat_template(untidy, tokenize=False) == processor.apply_chat_template(tidy, tokenize=False)


def test_a_batch_of_chats(processor):
    chats = [CHAT[:1], [{"role": "user", "content": [say("Here:"), show(SQUARE)]}]]
    batch = chat_inputs(processor, chats, add_generation_prompt=True, processor_kwargs={"padding": True})
    assert batch["image_grid_hw"].tolist() == [[2, 3], [4, 4], [2, 3], [4, 4]]
    for number, chat in enumerate(chats):
        alone = chat_inputs(processor, chat, add_generation_prompt=True)
        real = batch["attention_mask"][number] == 1
        assert batch["input_ids"][number, real].tolist() == alone["input_ids"][0].tolist()


def test_the_model_learns_and_answers_a_chat(processor, model):
    inputs = chat_inputs(processor, CHAT, return_assistant_tokens_mask=True)
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)
    assert torch.isfinite(model(**inputs, labels=labels).loss_ce)
    question = chat_inputs(processor, CHAT[:1], add_generation_prompt=True)
    answer = model.generate(**question, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > question["input_ids"].shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Saving, loading, refusing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [AutoProcessor, SynerMedGenProcessor])
def test_save_and_load(processor, config, tmp_path, loader):
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert type(again) is SynerMedGenProcessor
    assert again.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    ours, theirs = chat_inputs(processor, CHAT), chat_inputs(again, CHAT)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_chat_template_of_ones_own(processor, tmp_path):
    own = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    SynerMedGenProcessor(processor.image_processor, processor.tokenizer, chat_template=own).save_pretrained(tmp_path)
    again = SynerMedGenProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == "<|im_start|>Hi<|im_end|>"


def test_a_tokenizer_without_the_special_tokens_is_refused(processor):
    plain = Tokenizer(models.BPE(vocab={"a": 0, "<|im_start|>": 1}, merges=[]))
    with pytest.raises(ValueError, match=r"lacks <\|im_end\|>, <\|vision_start\|>.*Use a Qwen2.5 tokenizer"):
        SynerMedGenProcessor(processor.image_processor, PreTrainedTokenizerFast(tokenizer_object=plain))


@pytest.mark.parametrize("images", [[WIDE], [WIDE, SQUARE, WIDE]])
def test_another_number_of_images_than_image_tokens_is_refused(processor, images):
    with pytest.raises(
        ValueError, match=r"total number of <\|image_pad\|> tokens .* number of images passed. Found total 2"
    ):
        processor(text="<|image_pad|><|image_pad|>", images=images, return_tensors="pt")
