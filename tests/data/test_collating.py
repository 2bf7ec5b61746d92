"""Questions collated: the layout of the chat template, answers alone to be learned, no picture encoded twice."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from synermedgen_hf.data.collating import QuestionCollator, check_question
from synermedgen_hf.image_processing_synermedgen import own_window
from synermedgen_hf.modeling_synermedgen import read_layout

CONTEXT = 1024


def noise(height, width, seed=0, mode="L"):
    """A picture that is like no other."""
    rng = np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(rng.normal(size=(height, width)).astype(np.float32))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def question(*pictures, text="Which one?", answer="B", options=("A", "B", "C")):
    """A row as `load_dataset("synermed", "understanding")` gives it."""
    asked = [{"type": "image", "text": None} for _ in pictures] + [{"type": "text", "text": text}]
    said = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"images": list(pictures), "messages": messages, "options": list(options), "answer": answer}


def with_images(row):
    """The messages of a row as the processor's chat template takes them: each picture at its place."""
    pictures = iter(row["images"])
    return [
        {**one, "content": [{**p, "image": next(pictures)} if p["type"] == "image" else p for p in one["content"]]}
        for one in row["messages"]
    ]


def file_of(picture, format="PNG"):
    file = io.BytesIO()
    picture.save(file, format)
    return {"bytes": file.getvalue(), "path": f"picture.{format.lower()}"}


@pytest.fixture
def collate(processor, config):
    return QuestionCollator(processor, config)


@pytest.fixture
def check(processor, config):
    return lambda row, max_length=CONTEXT: check_question(processor, config, row, max_length)


@pytest.fixture
def two_turns():
    """Pictures before, between and after words, two answers, and white space that nobody means."""
    row = question(noise(28, 28, 1), noise(56, 56, 2), text="  Which of these?\n")
    again = [{"type": "text", "text": ""}, {"type": "text", "text": "And now?"}, {"type": "image", "text": None}]
    row["images"].append(noise(28, 28, 3))
    row["messages"] += [
        {"role": "user", "content": again},
        {"role": "assistant", "content": [{"type": "text", "text": " C "}]},
    ]
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The layout
# ---------------------------------------------------------------------------------------------------------------------


def test_a_row_is_laid_out_as_the_chat_template_does(collate, processor, config, two_turns):
    batch = collate([two_turns])
    chat = processor.apply_chat_template(
        with_images(two_turns),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_assistant_tokens_mask": True},
    )
    assert batch["input_ids"].equal(chat["input_ids"]) and batch["image_grid_hw"].equal(chat["image_grid_hw"])
    assert batch["position_ids"].equal(read_layout(config, batch["input_ids"]).positions)


def test_a_question_is_learned_as_it_is_asked(collate, processor):
    """Pictures that are no squares are padded, here and in `answer_questions`."""
    row = question(noise(40, 24, 1), noise(30, 56, 2), noise(28, 28, 3))
    prompt = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    windows = [own_window(picture) for picture in row["images"]]
    asked = processor(text=[prompt], images=row["images"], window=windows, return_tensors="pt")
    learned = collate([row])
    assert learned["pixel_values"].equal(asked["pixel_values"])
    assert learned["image_grid_hw"].equal(asked["image_grid_hw"])
    answer = processor.tokenizer("B<|im_end|>", add_special_tokens=False)["input_ids"]
    assert learned["input_ids"].tolist() == [asked["input_ids"][0].tolist() + answer]


def test_only_answers_and_their_ends_are_learned(collate, processor, two_turns):
    short = question(noise(28, 28), answer="MRI")
    batch = collate([two_turns, short])
    words = processor.tokenizer.convert_ids_to_tokens
    learned = ["".join(words(labels[labels != -100].tolist())) for labels in batch["labels"]]
    assert learned == ["B<|im_end|>C<|im_end|>", "MRI<|im_end|>"]
    kept = batch["labels"] != -100
    assert batch["labels"][kept].equal(batch["input_ids"][kept])


def test_shorter_rows_are_padded_on_the_right(collate, config, two_turns):
    rows = [question(noise(28, 28)), two_turns]
    batch, lengths = collate(rows), [collate([row])["input_ids"].shape[1] for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == lengths and lengths[0] < lengths[1]
    assert batch["input_ids"][0, lengths[0] :].eq(config.pad_token_id).all()
    assert batch["labels"][0, lengths[0] :].eq(-100).all()
    for row, length, ids in zip(rows, lengths, batch["input_ids"], strict=True):
        assert ids[:length].equal(collate([row])["input_ids"][0])


def test_a_message_of_plain_text_is_laid_out_as_the_chat_template_does(collate, processor):
    row = question(noise(28, 28))
    messages = with_images(row)
    row["messages"][1]["content"] = messages[1]["content"] = "B"
    batch = collate([row])
    chat = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert batch["input_ids"].equal(chat["input_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared():
    """Three rows that show four pictures eight times."""
    a, b, c, d = noise(28, 28, 1), noise(40, 56, 2), noise(28, 28, 3), noise(56, 30, 4, "RGB")
    return [question(a, b, c), question(c.copy(), a.copy(), text="The second?"), question(d, a.copy(), c.copy())]


def test_a_picture_that_several_rows_show_is_in_the_batch_once(collate, shared):
    batch = collate(shared)
    assert batch["image_index"].tolist() == [0, 1, 2, 2, 0, 3, 0, 2]
    assert len(batch["image_grid_hw"]) == 4
    assert len(batch["pixel_values"]) == batch["image_grid_hw"].prod(1).sum()


def test_encoding_a_picture_once_changes_neither_logits_nor_gradients(collate, model, processor, shared):
    once = collate(shared)
    pictures = [picture for row in shared for picture in row["images"]]
    encoded = processor.image_processor(pictures, window=[own_window(one) for one in pictures], return_tensors="pt")
    each = {name: tensor for name, tensor in once.items() if name != "image_index"} | dict(encoded)
    assert len(each["pixel_values"]) > len(once["pixel_values"])

    def logits_and_gradients(batch):
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        return outputs.logits.detach(), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    (logits, gradients), (expected, expected_gradients) = logits_and_gradients(once), logits_and_gradients(each)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients["model.vision_model.embeddings.patch_embedding.weight"].abs().max() > 1e-3
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_pictures_are_the_same_only_if_they_look_the_same(collate):
    grey = noise(28, 56)
    others = [grey.convert("RGB"), grey.transpose(Image.Transpose.TRANSPOSE), Image.new("L", (56, 28), 7)]
    reshaped = Image.frombytes("L", (28, 56), grey.tobytes())  # the same bytes in other rows
    assert collate([question(grey, *others, reshaped, grey)])["image_index"].tolist() == [0, 1, 2, 3, 4, 0]


def test_pictures_with_other_palettes_are_others(collate):
    picture = noise(28, 28, mode="RGB").quantize(16)
    inverted = picture.copy()
    inverted.putpalette([255 - value for value in picture.getpalette()])
    assert collate([question(picture, inverted)])["image_index"].tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What a row must be
# ---------------------------------------------------------------------------------------------------------------------

MODES = ["L", "RGB", "RGBA", "P", "1", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(40, 24), (30, 56), (28, 28), (90, 60)])
def test_the_length_is_that_of_the_collated_row(check, collate, size, mode):
    row = question(noise(*size, mode=mode), noise(33, 44))
    assert check(row) == collate([row])["input_ids"].shape[1]


@pytest.mark.parametrize(("mode", "format"), [("L", "PNG"), ("RGB", "PNG"), ("RGB", "JPEG"), ("I;16", "PNG")])
def test_files_are_measured_without_being_decoded(check, monkeypatch, tmp_path, mode, format):
    picture = noise(40, 24, mode=mode)
    length = check(question(picture, picture))
    in_memory = file_of(picture, format)
    (tmp_path / in_memory["path"]).write_bytes(in_memory["bytes"])
    on_disk = {"bytes": None, "path": str(tmp_path / in_memory["path"])}

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert check(question(in_memory, on_disk)) == length


def test_a_row_without_options_is_one_to_learn_from(check):
    row = question(noise(28, 28), answer="A slice further up.", options=())
    assert check(row) == check({name: row[name] for name in ("images", "messages")})


@pytest.mark.parametrize("images", [[], None])
def test_a_row_without_images_is_refused(check, images):
    with pytest.raises(ValueError, match="it has no image"):
        check({**question(noise(28, 28)), "images": images})


def test_a_row_without_an_answer_is_refused(check):
    row = question(noise(28, 28))
    with pytest.raises(ValueError, match="it has no answer"):
        check({**row, "messages": row["messages"][:1]})
    for nothing in ("", " \n", None):
        row["messages"][1]["content"][0]["text"] = nothing
        with pytest.raises(ValueError, match="it has no answer"):
            check(row)


def test_an_answer_that_is_no_option_is_refused(check):
    with pytest.raises(ValueError, match="the answer 'D' is none of the options A, B, C"):
        check(question(noise(28, 28), answer="D"))


def test_a_row_longer_than_the_context_is_refused(check):
    row = question(noise(56, 56), noise(56, 56))
    length = check(row)
    assert check(row, length) == length
    message = rf"it has 2 images and {length} tokens, and the context holds {length - 1}: ask for fewer .*max_length"
    with pytest.raises(ValueError, match=message):
        check(row, length - 1)


def test_every_image_has_one_place(check):
    row = question(noise(28, 28), noise(28, 28))
    with pytest.raises(ValueError, match=r"more places for images than images \(1\)"):
        check({**row, "images": row["images"][:1]})
    with pytest.raises(ValueError, match="places for 2 of 3 images"):
        check({**row, "images": [*row["images"], noise(28, 28)]})
