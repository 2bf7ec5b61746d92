"""The page of examples and the card of the data set."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from synermedgen_hf.data.sheet import GAP, HEIGHT, LABEL, MARK, data_card, draw_strip, write_sheet


def made_row(task="CTS", images=5, answer="B", size=(8, 6), **changes):
    letters = ["A", "B", "C", "D"]
    row = {
        "images": [Image.new("L", size, 40 * place) for place in range(images)],
        "task": task,
        "question": "Which of A to D?",
        "options": letters,
        "meanings": ["-2", "0", "+1", "+3"],
        "answer": answer,
        "route": "brain/MRI-CT",
        "difficulty": "hard",
        "region": "brain",
        "dataset": "made",
        "case_id": "one",
        "patient_id": "one",
        "slice_index": 7,
        "index": 12,
    }
    return {**row, **changes}


class Page(HTMLParser):
    """Tags that were opened, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file(tmp_path):
    page = write_sheet([made_row(), None, made_row("TIA", images=2, index=13)], tmp_path / "new" / "sheet", "Examples")
    assert page == tmp_path / "new" / "sheet" / "index.html"
    read = Page(page.read_text())
    pictures = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    assert len(pictures) == 2 and all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not [tag for tag, attributes in read.tags if tag in ("script", "link") or "href" in attributes]
    assert sorted(path.name for path in page.parent.glob("*.png")) == ["CTS-000012.png", "TIA-000013.png"]


def test_the_answer_is_marked_and_everything_is_said(tmp_path):
    row = made_row(case_id="<b>1 & 2</b>", question="A. Less <than>\nB. More & more")
    text = write_sheet([row], tmp_path, "Less < more").read_text()
    assert re.findall(r"<li class=answer>(\w)", text) == ["B"] and text.count("<li") == 4
    read = Page(text)
    assert "b" not in [tag for tag, _ in read.tags]
    for said in (
        "Less < more",
        "<b>1 & 2</b>",
        "A. Less <than>\nB. More & more",
        "brain/MRI-CT",
        "hard",
        "slice 7",
        "+3",
    ):
        assert said in read.text


def test_rows_without_meanings_have_a_page_too(tmp_path):
    row = made_row("MI", images=1, options=["MRI", "CT"], answer="CT")
    del row["meanings"]
    assert "<li class=answer>CT</li>" in write_sheet([row], tmp_path, "From a data set").read_text()


@pytest.mark.parametrize(
    ("row", "framed"),
    [
        (made_row(answer="B"), 2),  # after the reference
        (made_row("MI", images=4, answer="D"), 3),
        (made_row("TIA", images=2, answer="A"), None),
        (made_row("MI", images=1, answer="CT"), None),
    ],
)
def test_pictures_stand_side_by_side_and_the_right_one_is_framed(row, framed):
    strip = draw_strip(row)
    width = round(8 * HEIGHT / 6)
    assert strip.size == (len(row["images"]) * (width + GAP) + GAP, HEIGHT + LABEL + 2 * GAP)
    pixels = np.asarray(strip)
    for place in range(len(row["images"])):
        left = GAP + place * (width + GAP)
        assert (pixels[LABEL + GAP + HEIGHT // 2, left + width // 2] == 40 * place).all()
        assert (tuple(pixels[LABEL + GAP + HEIGHT // 2, left - 2]) == MARK) == (place == framed)


def test_the_card_counts_what_is_there(tmp_path):
    rows = [made_row(), made_row(), made_row("TIA"), made_row("MI", region="pelvis", route="pelvis/CT")]
    text = data_card(
        "My pairs",
        rows,
        splits={"train": {"patients": 3, "rows": 4}, "test": {"patients": 1}},
        skipped={"CTS: one modality only": 2, "MI: a | b": 5},
    )
    card = DatasetCard(text)
    assert card.data.license == "unknown" and card.data.pretty_name == "My pairs"
    assert card.data.size_categories == "n<1K" and card.data.task_categories == ["visual-question-answering"]
    assert "| dataset | region | route | CTS | MI | TIA | all |" in text
    assert "| made | brain | brain/MRI-CT | 2 | 0 | 1 | 3 |" in text
    assert "| made | pelvis | pelvis/CT | 0 | 1 | 0 | 1 |" in text
    assert "| all |  |  | 2 | 1 | 1 | 4 |" in text
    assert "| train | 3 | 4 |" in text and "| test | 1 | 0 |" in text
    assert text.index("a \\| b | 5") < text.index("one modality only | 2")
    assert "Unknown. The scans keep the terms" in text


def test_the_card_states_a_licence_only_if_told():
    text = data_card("Simulated", [made_row()] * 1500, skipped={}, license="cc-by-4.0")
    assert DatasetCard(text).data.license == "cc-by-4.0" and "Unknown" not in text
    assert "## Skipped\n\nNothing." in text and "## Splits" not in text
    assert DatasetCard(text).data.size_categories == "1K<n<10K"
