"""The summary by hand, and a page that holds everything it shows."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from synermedgen_hf import SynerMedGenImageProcessor
from synermedgen_hf.metrics.report import (
    PAPER_SSIM,
    draw_strip,
    keep_pictures,
    lower_is_better,
    read_summary,
    summarise,
    write_report,
    write_summary,
)

STAMP = {"name": "made", "range": [0, 1]}


def record(route="brain/T1-T2", case="c0", patient=None, slice_index=0, protocol=STAMP, picture=None, **metrics):
    metrics = metrics or {"ssim_frame": 0.5, "mae_frame": 1.0}
    identity = {"dataset": "made", "case_id": case, "route": route, "slice_index": slice_index}
    shown = {"picture": picture} if picture else {}
    measured = {"shape": [4, 4], "spacing": [1.0, 1.0], "range": None, "voxels": 9}
    shown["measured"] = measured | {"means": [1.0, 2.0, 3.0, 4.0]}
    return {**identity, "patient": patient or case, "seed": 0, "protocol": protocol, "metrics": metrics, **shown}


def png(grey):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


ARGUMENTS = {
    "data_dir": "/scans/hospital",
    "routes": ["brain/T1-T2"],
    "split": "test",
    "level": "slice",
    "protocol": "made",
    "baseline": None,
    "model": "/weights/mine",
}


def finish(folder, records, **arguments):
    """A folder as an evaluation leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {**ARGUMENTS, **arguments}
    write_summary(folder, lambda: iter(map(dict, records)), arguments, {"found": 9, "without slices": 2, "repaired": 3})
    lines = [json.dumps({name: value for name, value in one.items() if name != "picture"}) for one in records]
    (folder / "cases.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def test_means_are_over_cases_and_intervals_over_patients():
    # One patient of 8 slices at 1, three of one slice each at 0.
    records = [record(case="long", slice_index=place, ssim_frame=1.0) for place in range(8)]
    records += [record(case=f"short-{number}", ssim_frame=0.0) for number in range(3)]
    found = summarise(records)["brain/T1-T2"]
    assert (found["cases"], found["patients"]) == (11, 4)
    ssim = found["metrics"]["ssim_frame"]
    assert ssim["n"] == 11 and ssim["mean"] == pytest.approx(8 / 11)
    # With chance (3/4)^4 = 0.3 the long patient is not drawn at all.
    assert ssim["interval"][0] == 0.0 and ssim["interval"][1] > 8 / 11


def test_the_interval_covers_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        levels = rng.normal(0.7, 0.1, 40)  # patients differ, their slices hardly
        records = [
            record(case=f"{patient}", slice_index=place, ssim_frame=float(level + rng.normal(0, 0.01)))
            for patient, level in enumerate(levels)
            for place in range(3)
        ]
        low, high = summarise(records, bootstrap=300, seed=trial)["brain/T1-T2"]["metrics"]["ssim_frame"]["interval"]
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.98


def test_one_patient_has_no_interval():
    records = [record(case="one", slice_index=place) for place in range(5)]
    assert summarise(records)["brain/T1-T2"]["metrics"]["mae_frame"]["interval"] is None


def test_where_a_figure_is_not_defined_it_does_not_count():
    records = [
        record(case="a", ssim_frame=0.5, bone_dice=None),
        record(case="b", ssim_frame=0.7, bone_dice=0.9),
        record(case="c", ssim_frame=0.9, bone_dice=None),
    ]
    found = summarise(records)["brain/T1-T2"]["metrics"]
    assert found["bone_dice"] == {"n": 1, "mean": 0.9, "interval": None} and found["ssim_frame"]["n"] == 3
    never = summarise([record(ssim_frame=0.5, bone_dice=None)])["brain/T1-T2"]["metrics"]["bone_dice"]
    assert never == {"n": 0, "mean": None, "interval": None}


def test_routes_are_kept_apart():
    found = summarise([record("brain/T1-T2", mae_frame=1.0), record("whole-body/CT-PET", mae_suv_frame=3.0)])
    assert {route: list(one["metrics"]) for route, one in found.items()} == {
        "brain/T1-T2": ["mae_frame"],
        "whole-body/CT-PET": ["mae_suv_frame"],
    }


def test_unlike_protocols_are_not_averaged():
    """Some cases have a mask, in others the body is found: two groups of one route."""
    records = [record(case="a"), record(case="b", protocol={**STAMP, "area": "body: found"}, ssim_frame=1.0)]
    found = summarise([*records, record(case="c")])
    assert {label: (own["route"], own["cases"]) for label, own in found.items()} == {
        "brain/T1-T2": ("brain/T1-T2", 2),
        "brain/T1-T2 (body)": ("brain/T1-T2", 1),
    }


def test_slices_along_another_axis_are_a_group_of_their_own():
    stamps = [
        {**STAMP, "area": area, "axis": axis} for area in ("mask: as given", "body: x") for axis in ("axial", "coronal")
    ]
    found = summarise(record(case=str(number), protocol=stamp) for number, stamp in enumerate(stamps))
    assert list(found) == [
        "brain/T1-T2",
        "brain/T1-T2 (coronal)",
        "brain/T1-T2 (body)",
        "brain/T1-T2 (body, coronal)",
    ]


def test_stamps_that_differ_in_more_are_refused():
    stamps = (
        {**STAMP, "area": "mask"},
        {**STAMP, "area": "mask", "range": [0, 2]},
        {**STAMP, "area": "mask", "range": 3},
    )
    with pytest.raises(ValueError, match="unlike protocols: range"):
        summarise([record(case=str(number), protocol=stamp) for number, stamp in enumerate(stamps)])


def test_other_cases_have_another_checksum():
    first, same, other = (
        summarise([record(case="a"), record(case=case, mae_frame=value)])["brain/T1-T2"]["checksum"]
        for case, value in (("b", 1.0), ("b", 2.0), ("c", 1.0))
    )
    assert first == same != other


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_of_each_route_of_a_case_three_pictures_are_kept():
    records = [record(slice_index=place, picture=png(place), ssim_frame=abs(place - 3.2)) for place in range(9)]
    records.append(record("brain/T2-T1", picture=png(100)))
    records.append(record(slice_index=9, picture=png(200), ssim_frame=None))
    keep_pictures(records)
    assert "picture" not in records[10]  # nobody knows how good it is
    values = sorted(one["metrics"]["ssim_frame"] for one in records[:9])
    kept = {one["metrics"]["ssim_frame"] for one in records[:9] if "picture" in one}
    assert kept == {values[0], values[4], values[8]} and "picture" in records[9]


@pytest.mark.parametrize(
    ("metric", "best", "worst"), [("ssim_frame", 0.9, 0.1), ("psnr_frame", 0.9, 0.1), ("mae_frame", 0.1, 0.9)]
)
def test_best_median_and_worst(tmp_path, metric, best, worst):
    values = [0.3, 0.9, 0.1, 0.5, 0.45]
    pictures = {value: png(number) for number, value in enumerate(values)}
    records = [record(case=f"{value}", picture=pictures[value], **{metric: value}) for value in values]
    shown = read_summary(finish(tmp_path, records))["routes"]["brain/T1-T2"]["pictures"]
    assert {place: one["value"] for place, one in shown.items()} == {"best": best, "median": 0.45, "worst": worst}
    assert shown["best"]["line"] == values.index(best) + 1  # of cases.jsonl
    for place, one in shown.items():
        drawn = (tmp_path / "pictures" / f"brain_T1-T2-{place}.png").read_bytes()
        assert drawn == base64.b64decode(pictures[one["value"]])


def test_which_way_a_figure_is_better():
    assert all(map(lower_is_better, ("mae_hu_mask", "rmse_frame", "mse_u8_frame")))
    assert not any(map(lower_is_better, ("ssim_mask", "ms_ssim_mask", "psnr_hu_mask", "bone_dice")))


def test_a_strip_shows_source_synthesis_truth_and_difference():
    window = {"low": -1024.0, "high": 3071.0}
    source, made, wanted = np.full((20, 40), -300.0), np.full((20, 40), 350.0), np.full((20, 40), 350.0)
    made[:, 20:] = 1000.0
    row = {"source_image": source, "source_modality": "CBCT", "source_window": window, "target_modality": "CT"}
    strip = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(draw_strip(row, made, wanted, SynerMedGenImageProcessor()))))
    )
    height, side = strip.shape[0], strip.shape[0]
    panels = [strip[height // 2, place * (side + 4) : place * (side + 4) + side] for place in range(4)]
    assert (panels[0] == 0).all() and abs(int(panels[1][5]) - 128) <= 1 and panels[1][-5] == 255
    assert abs(int(panels[2][-5]) - 128) <= 1 and panels[3][5] == 0 and panels[3][-5] == 255
    assert strip[2, 5] == 96  # beside a wide picture, no pixel of it


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the cells of all tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        self.inside = tag

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.tables[-1][-1].append(data)

    def handle_endtag(self, tag):
        self.inside = None


@pytest.fixture
def records():
    return [
        record(route, case=f"c{number}", picture=png(number), ssim_frame=0.5 + number / 10, mae_frame=3.0 - number)
        for route in ("brain/T1-T2", "brain/T1-FLAIR")
        for number in range(4)
    ]


def test_the_page_needs_nothing_from_elsewhere(tmp_path, records):
    write_report(finish(tmp_path, records))
    page = Page((tmp_path / "report.html").read_text())
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6 and all(image.startswith("data:image/png;base64,") for image in images)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if "href" in attributes]
    text = (tmp_path / "report.html").read_text()
    assert "Not for clinical use" in text and "name: made" in text and "9 cases, 2 of them" in text


def test_what_is_shown_is_text(tmp_path):
    evil = "<script>alert(1)</script>"
    write_report(finish(tmp_path, [record(case=evil, picture=png(0))], data_dir=f"/{evil}", model=f"/{evil}x"))
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_the_papers_figures_are_a_table_of_their_own_for_its_six_routes(tmp_path, records):
    said = write_report(finish(tmp_path, records))
    tables = Page((tmp_path / "report.html").read_text()).tables
    assert len(tables) == 2 and len(PAPER_SSIM) == 6
    ours, paper = tables
    assert [line[0] for line in ours[1:]] == ["brain/T1-T2", "brain/T1-FLAIR"]
    assert [line[0] for line in paper] == ["route", "brain/T1-T2"] and paper[1][-1] == "87.14"
    assert "cannot be compared" in said and not {cell for line in ours for cell in line} & set(paper[1][1:])
    without = finish(tmp_path / "other", [one for one in records if one["route"] == "brain/T1-FLAIR"])
    assert "The paper's own" not in write_report(without)


def test_baselines_stand_beside(tmp_path, records):
    mine = finish(tmp_path / "mine", records)
    worse = [{**one, "metrics": {"ssim_frame": 0.25, "mae_frame": 9.0}} for one in records]
    copy = finish(tmp_path / "copied", worse, baseline="copy")
    said = write_report(mine, beside=[copy])
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| brain/T1-")]
    assert [line[:2] for line in lines[:4]] == [
        ["brain/T1-T2", "mine"],
        ["brain/T1-T2", "copied"],
        ["brain/T1-FLAIR", "mine"],
        ["brain/T1-FLAIR", "copied"],
    ]
    assert lines[0][4].startswith("0.65 (") and lines[1][4].startswith("0.25 (0.25 to 0.25)")


def test_runs_of_one_name_keep_their_own_lines(tmp_path, records, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative folder of one part is written just as its name
    mine = finish(tmp_path / "mine", records, baseline="copy")
    worse = [{**one, "metrics": {"ssim_frame": 0.25, "mae_frame": 9.0}} for one in records]
    finish(tmp_path / "copy", worse, baseline="copy")
    said = write_report(mine, beside=["copy"])
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| brain/T1-T2")]
    assert [line[1] for line in lines[:2]] == ["copy", f"{tmp_path.name}/copy"]
    assert lines[0][4].startswith("0.65 (") and lines[1][4].startswith("0.25 (")


def test_what_cannot_be_compared_does_not_stand_beside(tmp_path, records):
    mine = finish(tmp_path / "mine", records)
    fewer = finish(tmp_path / "fewer", records[:-1])
    with pytest.raises(ValueError, match=r"fewer is of other cases of brain/T1-FLAIR than .*mine \(3 and 4\)"):
        write_report(mine, beside=[fewer])
    unlike = finish(tmp_path / "unlike", [{**one, "protocol": {**STAMP, "range": [0, 2]}} for one in records])
    with pytest.raises(ValueError):
        write_report(mine, beside=[unlike])
    with pytest.raises(FileNotFoundError, match="nowhere holds no finished evaluation"):
        write_report(mine, beside=[tmp_path / "nowhere"])
    assert not (mine / "report.html").exists()


def test_the_block_for_the_card_is_what_the_hub_reads(tmp_path, records):
    write_report(finish(tmp_path, records))
    block = yaml.safe_load((tmp_path / "model-index.yml").read_text())
    name, results = model_index_to_eval_results(block["model-index"])
    assert name == "mine" and len(results) == 4
    first = results[0]
    assert (first.dataset_config, first.dataset_split, first.metric_type) == ("brain/T1-T2", "test", "ssim_frame")
    assert first.metric_value == pytest.approx(0.65) and first.metric_name == "ssim_frame (made, slice)"
    assert first.dataset_name == "hospital"  # and no path of this machine


def test_a_baseline_makes_no_block(tmp_path, records):
    write_report(finish(tmp_path, records, baseline="copy"))
    assert not (tmp_path / "model-index.yml").exists()


def test_a_folder_of_something_else_is_no_evaluation(tmp_path):
    (tmp_path / "cases.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no .*summary.json"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"tasks": {}}')
    with pytest.raises(ValueError, match="no evaluation of synthesis"):
        read_summary(tmp_path)


def test_without_records_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="Nothing of brain/T1-T2 could be read and judged in the split test"):
        finish(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
