"""Understanding tasks on a page, for a person to check, and the card of a data set made from them."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import DatasetCardData
from PIL import Image, ImageDraw, ImageFont

HEIGHT, LABEL, GAP = 176, 20, 6  # pixels of the pictures on the sheet, of the line above them, between them
MARK = (46, 160, 67)
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --mark: rgb(46, 160, 67); }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
article header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; opacity: .8; font-size: 13px; }
article img { max-width: 100%; margin: .75rem 0; display: block; }
p { white-space: pre-wrap; margin: .5rem 0; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; margin: .5rem 0 0; }
li { background: var(--soft); border-radius: 6px; padding: .1rem .6rem; }
li.answer { outline: 2px solid var(--mark); font-weight: 600; }
small { opacity: .7; font-weight: 400; }
"""


def write_sheet(rows: Iterable[dict], folder: str | Path, title: str) -> Path:
    """
    Write examples as one page, `index.html`, that needs no other file, and each one's pictures as a PNG beside it.

    Args:
        rows (`Iterable[dict]`): As [`TaskSampler`] makes them, or as read back from a data set; `None` is left out.
        folder (`str` or `Path`): Made if it does not exist.
        title (`str`): Heading of the page.

    Returns:
        `Path`: The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    articles = []
    for row in rows:
        if row is None:
            continue
        buffer = io.BytesIO()
        draw_strip(row).save(buffer, "PNG")
        (folder / f"{row['task']}-{row['index']:06d}.png").write_bytes(buffer.getvalue())
        articles.append(_article(row, base64.b64encode(buffer.getvalue()).decode()))
    page = folder / "index.html"
    page.write_text(
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(articles) + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def draw_strip(row: dict) -> Image.Image:
    """
    The pictures of one instance side by side at one height, with their letters; the answer, if it is one of the
    pictures, is framed in green.
    """
    pictures = [
        picture.convert("RGB").resize(
            (max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT), Image.Resampling.BICUBIC
        )
        for picture in row["images"]
    ]
    labels = _labels(row)
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) + 1)
    strip = Image.new("RGB", (width, HEIGHT + LABEL + 2 * GAP), (96, 96, 96))
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    left = GAP
    for picture, label in zip(pictures, labels, strict=True):
        strip.paste(picture, (left, LABEL + GAP))
        draw.text((left + 2, 4), label, (255, 255, 255), font)
        if row["task"] in ("CTS", "MI") and label == row["answer"]:
            box = (left - 3, LABEL + GAP - 3, left + picture.width + 2, LABEL + GAP + HEIGHT + 2)
            draw.rectangle(box, outline=MARK, width=3)
        left += picture.width + GAP
    return strip


def _labels(row: dict) -> list[str]:
    n = len(row["images"])
    letters = [chr(ord("A") + place) for place in range(n)]
    if n == 1:
        return [""]
    return {"CTS": ["reference", *letters[: n - 1]], "TIA": ["first", "second"]}.get(row["task"], letters)


def _article(row: dict, png: str) -> str:
    say = html.escape
    facts = [row["task"], row["route"], row["difficulty"], f"{row['dataset']} {row['case_id']}"]
    facts += [f"slice {row['slice_index']}", f"index {row['index']}"]
    meanings = row.get("meanings") or row["options"]
    options = [
        f"<li{' class=answer' if option == row['answer'] else ''}>{say(option)}"
        + (f" <small>{say(meaning)}</small>" if meaning != option else "")
        + "</li>"
        for option, meaning in zip(row["options"], meanings, strict=True)
    ]
    return (
        f"<article><header>{''.join(f'<span>{say(str(fact))}</span>' for fact in facts)}</header>"
        f'<img alt="" src="data:image/png;base64,{png}"><p>{say(row["question"])}</p>'
        f"<ul>{''.join(options)}</ul></article>"
    )


def data_card(
    name: str,
    rows: Iterable[dict],
    splits: Mapping[str, Mapping[str, int]] | None = None,
    skipped: Mapping[str, int] | None = None,
    license: str | None = None,
) -> str:
    """
    `README.md` of a data set of understanding tasks, with the front matter of the Hub.

    Args:
        name (`str`): Of the data set.
        rows (`Iterable[dict]`): All rows, for counting; only `dataset`, `region`, `route` and `task` are looked at.
        splits (`Mapping[str, Mapping[str, int]]`, *optional*): Split -> what is counted in it, such as `patients`,
            `cases` and `rows`.
        skipped (`Mapping[str, int]`, *optional*): Reason -> how often.
        license (`str`, *optional*): A licence identifier of the Hub. Unknown if absent: what is made from scans falls
            under the terms of the scans, and this package cannot know them.

    Returns:
        `str`
    """
    counts = Counter((row["dataset"], row["region"], row["route"], row["task"]) for row in rows)
    total = sum(counts.values())
    tasks = sorted({task for *_, task in counts})
    by_route: dict[tuple[str, str, str], dict[str, int]] = {}
    for (*where, task), count in counts.items():
        by_route.setdefault(tuple(where), {})[task] = count
    table = [
        [*where, *(per_task.get(task, 0) for task in tasks), sum(per_task.values())]
        for where, per_task in sorted(by_route.items())
    ]
    sums = [sum(count for (*_, of), count in counts.items() if of == task) for task in tasks]
    table.append(["all", "", "", *sums, total])
    front = DatasetCardData(
        license=license or "unknown",
        pretty_name=name,
        language="en",
        task_categories=["visual-question-answering"],
        size_categories=_size_category(total),
        tags=["medical", "medical-imaging", "synermedgen", "research-use-only"],
    )
    sections = [
        f"# {name}",
        "Questions made from paired medical scans by `synermedgen_hf`: which slice belongs to which (CTS), which "
        "modality it is (MI), what a change of modality changes and keeps (TIA). **Research use only, not for clinical "
        "use.**",
        "## Contents\n\n" + _table(["dataset", "region", "route", *tasks, "all"], table),
    ]
    if splits:
        columns = list(dict.fromkeys(key for counted in splits.values() for key in counted))
        lines = [[split, *(counted.get(key, 0) for key in columns)] for split, counted in splits.items()]
        sections.append("## Splits\n\nBy patient: none is in two of them.\n\n" + _table(["split", *columns], lines))
    if skipped is not None:
        lines = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        sections.append("## Skipped\n\n" + (_table(["reason", "times"], lines) if lines else "Nothing."))
    sections += [
        "## Fields\n\n"
        "`images` 8-bit grey slices over the window of their volume, `messages` question and answer in the form of a "
        "chat, `task`, `question`, `options` what may be answered, `answer` one of them, `route`, `difficulty`, "
        "`region`, `dataset`, `case_id`, `patient_id`, `slice_index`, and `index`, from which and the seed the row can "
        "be made again.",
        "## Licence\n\n"
        + (
            f"{license}, as stated by whoever made this data set."
            if license
            else "Unknown. The scans keep the terms they were obtained under; look them up at their source before "
            "passing on anything made from them."
        ),
        "## Limits\n\n"
        "* Letters are balanced; modalities and regions come as often as the scans have them. Where all scans of a "
        "region are one pair of modalities, half of TIA there can be guessed without looking.\n"
        "* Descriptions are general statements on modalities. Nobody has compared them with each single slice: a "
        "sentence on tumours or oedema also stands beside slices without any.\n"
        "* 8 bits over a wide window hide small differences, so scanner units cannot be read back from the pictures.",
    ]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _size_category(total: int) -> str:
    edges = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
    return next((name for limit, name in edges if total < limit), "n>10M")


def _table(columns: list[str], lines: Iterable[Iterable]) -> str:
    def row(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([row(columns), "|" + "---|" * len(columns), *map(row, lines)])


__all__ = ["data_card", "draw_strip", "write_sheet"]
