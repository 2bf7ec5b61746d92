"""Two evaluations against each other: known differences, tests over patients, and what is refused."""

import json

import numpy as np
import pytest
from scipy.stats import false_discovery_control, wilcoxon

from synermedgen_hf.metrics.comparison import compare, comparison_table
from synermedgen_hf.metrics.statistics import interval_of_mean, paired_p_value

STAMP = {"name": "made"}


def record(patient, slice_index=0, route="brain/T1-T2", protocol=STAMP, **metrics):
    identity = {"dataset": "made", "case_id": f"case-{patient}", "route": route, "slice_index": slice_index}
    measured = {"shape": [8, 8], "spacing": [1.0, 1.0], "range": None, "voxels": 40}
    return {**identity, "patient": f"p{patient}", "protocol": protocol, "metrics": metrics, "measured": measured}


@pytest.fixture
def evaluation(tmp_path):
    """Makes the folder of a finished evaluation."""

    def evaluation(name, records):
        folder = tmp_path / name
        folder.mkdir()
        routes = list(dict.fromkeys(one["route"] for one in records))
        (folder / "summary.json").write_text(json.dumps({"arguments": {"routes": routes}, "routes": {}}))
        (folder / "cases.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        return folder

    return evaluation


def patients(rng, count=12, slices=3, shift=0.0, spread=0.05, **more):
    """SSIM of slices that go with their patient."""
    return [
        record(patient, place, ssim_frame=0.7 + 0.01 * patient + shift + float(rng.normal(0, spread)), **more)
        for patient in range(count)
        for place in range(slices)
    ]


def test_a_difference_that_is_there_is_found(evaluation):
    first = patients(np.random.default_rng(0), spread=0.01)
    second = [
        {**one, "metrics": {"ssim_frame": one["metrics"]["ssim_frame"] - 0.02 - 0.001 * number % 0.01}}
        for number, one in enumerate(first)
    ]
    found = compare(evaluation("a", first), evaluation("b", second))["routes"]["brain/T1-T2"]["ssim_frame"]
    differences = [
        one["metrics"]["ssim_frame"] - other["metrics"]["ssim_frame"] for one, other in zip(first, second, strict=True)
    ]
    assert (found["n"], found["patients"]) == (36, 12)
    assert found["difference"] == pytest.approx(np.mean(differences)) == pytest.approx(found["first"] - found["second"])
    of_patients = np.reshape(differences, (12, 3)).mean(1)
    assert found["p"] == pytest.approx(wilcoxon(of_patients).pvalue) and found["p"] == found["q"] < 0.001
    assert 0.02 <= found["interval"][0] < found["difference"] < found["interval"][1] <= 0.031


def test_the_other_way_round_everything_is_mirrored(evaluation):
    rng = np.random.default_rng(1)
    a, b = evaluation("a", patients(rng)), evaluation("b", patients(rng, shift=0.02))
    one, other = (compare(*both)["routes"]["brain/T1-T2"]["ssim_frame"] for both in ((a, b), (b, a)))
    assert one["difference"] == pytest.approx(-other["difference"]) and one["p"] == pytest.approx(other["p"])
    assert one["interval"] == pytest.approx([-other["interval"][1], -other["interval"][0]])


def test_an_evaluation_does_not_differ_from_itself(evaluation):
    records = patients(np.random.default_rng(2))
    found = compare(evaluation("a", records), evaluation("b", records))
    own = found["routes"]["brain/T1-T2"]["ssim_frame"]
    assert own["difference"] == 0 and own["interval"] == [0, 0] and own["p"] == own["q"] == 1
    assert comparison_table(found).splitlines()[-1].endswith("| 1 | 1 |  |")


def test_many_slices_of_few_patients_prove_nothing(evaluation):
    """Two patients who happen to differ; by slices the test would be sure."""
    first = [record(patient, place, ssim_frame=0.8) for patient in range(2) for place in range(100)]
    second = [record(patient, place, ssim_frame=0.7) for patient in range(2) for place in range(100)]
    found = compare(evaluation("a", first), evaluation("b", second))
    assert found["routes"]["brain/T1-T2"]["ssim_frame"]["p"] == 0.5
    assert comparison_table(found).splitlines()[-1].endswith("| 0.5 | 0.5 |  |")


def test_one_patient_is_not_tested(evaluation):
    found = compare(evaluation("a", [record(0, ssim_frame=0.8)]), evaluation("b", [record(0, ssim_frame=0.7)]))
    own = found["routes"]["brain/T1-T2"]["ssim_frame"]
    assert own["difference"] == pytest.approx(0.1) and own["p"] is own["q"] is own["interval"] is None
    assert "| 0.1 |  |  |  |  |" in comparison_table(found)


def test_many_routes_are_corrected_for(evaluation):
    rng = np.random.default_rng(3)
    routes = [f"brain/{route}" for route in ("T1-T2", "T1-FLAIR", "T2-T1", "T2-FLAIR")]
    first, second = (
        [one for number, route in enumerate(routes) for one in patients(rng, shift=side * number / 100, route=route)]
        for side in (0, 1)
    )
    found = compare(evaluation("a", first), evaluation("b", second))["routes"]
    p, q = (np.array([found[route]["ssim_frame"][name] for route in routes]) for name in ("p", "q"))
    order = np.argsort(p)
    stepped = (p[order] * 4 / np.arange(1, 5))[::-1]
    assert q[order] == pytest.approx(np.minimum(np.minimum.accumulate(stepped)[::-1], 1))


def test_routes_are_corrected_for_together_whatever_their_unit(evaluation):
    rng = np.random.default_rng(3)
    routes = {"brain/MRI-CT": "mae_hu_mask", "brain/CT-MRI": "mae_au_body", "whole-body/CT-PET": "mae_suv_mask"}
    sides = []
    for shift in (0, 0.03):
        side = []
        for route, metric in routes.items():
            for one in patients(rng, shift=shift, route=route):
                side.append(one | {"metrics": {metric: one["metrics"]["ssim_frame"]}})
        sides.append(side)
    found = compare(evaluation("a", sides[0]), evaluation("b", sides[1]))["routes"]
    p, q = (np.array([found[route][metric][name] for route, metric in routes.items()]) for name in ("p", "q"))
    assert q == pytest.approx(false_discovery_control(p)) and (q > p).any()


@pytest.mark.parametrize(("metric", "better"), [("mae_frame", "first"), ("ssim_frame", "second")])
def test_the_better_one_is_named(evaluation, metric, better):
    first, second = (
        [record(patient, **{metric: level + 0.01 * patient}) for patient in range(10)] for level in (0.4, 0.5)
    )
    table = comparison_table(compare(evaluation("a", first), evaluation("b", second)))
    assert table.splitlines()[-1].endswith(f"| {better} |")


def test_nobody_is_better_where_one_patient_outweighs_all_others(evaluation):
    """Nine patients with a slice each say one thing, a tenth with a hundred slices says another."""
    differences = [(patient, 0, -0.02 - 0.001 * patient) for patient in range(9)]
    differences += [(9, place, 0.01) for place in range(100)]
    second = [record(patient, place, ssim_frame=0.5) for patient, place, _ in differences]
    first = [record(patient, place, ssim_frame=0.5 + by) for patient, place, by in differences]
    found = compare(evaluation("a", first), evaluation("b", second))
    own = found["routes"]["brain/T1-T2"]["ssim_frame"]
    assert own["q"] < 0.05 and own["difference"] > 0 > own["difference of patients"]
    assert comparison_table(found).splitlines()[-1].endswith("|  |")


def test_cases_with_and_without_a_mask_are_compared_apart(evaluation):
    stamps = [{"name": "made", "area": "mask: as given"}, {"name": "made", "area": "body: above 0"}]
    first = [record(patient, protocol=stamps[patient % 2], dice_bone=0.5 + 0.3 * (patient % 2)) for patient in range(8)]
    second = [{**one, "metrics": {"dice_bone": 0.4}} for one in first]
    found = compare(evaluation("a", first), evaluation("b", second))["routes"]
    assert {route: own["dice_bone"]["first"] for route, own in found.items()} == {
        "brain/T1-T2": 0.5,
        "brain/T1-T2 (body)": 0.8,
    }


def test_where_either_is_not_defined_a_case_is_left_out(evaluation):
    first = [record(patient, ssim_frame=0.5, dice=None if patient == 1 else 0.9) for patient in range(4)]
    second = [record(patient, ssim_frame=0.5, dice=None if patient == 2 else 0.8) for patient in range(4)]
    found = compare(evaluation("a", first), evaluation("b", second))["routes"]["brain/T1-T2"]
    assert found["dice"]["n"] == 2 and found["ssim_frame"]["n"] == 4


def test_a_case_in_one_of_them_only_is_named(evaluation):
    whole = [record(patient, place, ssim_frame=0.5) for patient in range(4) for place in range(3)]
    a, b = evaluation("a", whole), evaluation("b", whole[:-1])
    for both in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"/b lacks 1 cases that the other .* has: made case-3 brain/T1-T2 2\."):
            compare(*both)
    with pytest.raises(ValueError, match=r"/c lacks 9 cases .* 1\b.* and 4 more\."):
        compare(a, evaluation("c", whole[:3]))


def test_routes_that_one_of_them_was_not_asked_for_are_left_out_and_said(evaluation):
    """A baseline answers routes that the model was not trained for."""
    ours = patients(np.random.default_rng(6))
    more = [record(0, route="brain/CBCT-MRI", ssim_frame=0.5)]
    found = compare(evaluation("a", ours), evaluation("b", [*ours, *more]))
    assert list(found["routes"]) == ["brain/T1-T2"] and found["only second"] == ["brain/CBCT-MRI"]
    assert "Left out, since the second alone was asked for them: brain/CBCT-MRI." in comparison_table(found)
    with pytest.raises(ValueError, match="c and .*a have no route in common: brain/CBCT-MRI; brain/T1-T2"):
        compare(evaluation("c", more), evaluation("d", ours).parent / "a")


def test_unlike_protocols_are_refused(evaluation):
    first = [record(patient, ssim_frame=0.5) for patient in range(4)]
    second = [record(patient, ssim_frame=0.5, protocol={"name": "another"}) for patient in range(4)]
    with pytest.raises(ValueError):
        compare(evaluation("a", first), evaluation("b", second))


def test_what_is_not_finished_is_refused(evaluation, tmp_path):
    folder = evaluation("a", [record(0, ssim_frame=0.5)])
    with pytest.raises(FileNotFoundError, match="nowhere holds no finished evaluation"):
        compare(folder, tmp_path / "nowhere")


def test_a_damaged_or_foreign_line_is_named(evaluation):
    good = evaluation("good", [record(0, ssim_frame=0.5)])
    damaged, foreign, twice = (evaluation(name, [record(0, ssim_frame=0.5)] * 2) for name in "abc")
    lines = (damaged / "cases.jsonl").read_text().splitlines()
    (damaged / "cases.jsonl").write_text(f"{lines[0]}\n{lines[1][:40]}\n")
    (foreign / "cases.jsonl").write_text('{"dataset": "made", "case_id": "a", "mae": 3}\n')
    nothing = evaluation("d", [record(0, ssim_frame=0.5)])
    (nothing / "cases.jsonl").write_text("null\n")
    for folder, says in (
        (nothing, "d/cases.jsonl, line 1, is damaged: it holds no object"),
        (damaged, "a/cases.jsonl, line 2, is damaged"),
        (foreign, "b/cases.jsonl, line 1, is no record of a synthesis: it lacks route, slice_index, patient"),
        (twice, "c/cases.jsonl, line 2: made case-0 brain/T1-T2 0 has been there before"),
    ):
        for both in ((good, folder), (folder, good)):
            with pytest.raises(ValueError, match=says):
                compare(*both)
    (damaged / "summary.json").write_text('{"routes"')
    with pytest.raises(ValueError, match="a/summary.json is damaged"):
        compare(good, damaged)


def test_records_may_stand_in_another_order(evaluation):
    records = patients(np.random.default_rng(4))
    second = patients(np.random.default_rng(5), shift=0.01)
    found, turned = (
        compare(evaluation(name, records), evaluation(f"{name}2", other))["routes"]
        for name, other in (("a", second), ("b", second[::-1]))
    )
    assert found == turned


def test_an_interval_of_one_patient_and_a_test_of_none():
    assert interval_of_mean(np.array([3.0]), np.array([2])) is None
    assert paired_p_value(np.array([0.3])) is None and paired_p_value(np.zeros(5)) == 1.0


def test_other_scans_of_the_same_name_are_refused(evaluation):
    """Such as the same data set preprocessed in two ways."""
    one = [record(number, ssim_frame=0.5) for number in range(3)]
    other = [one[0], one[1] | {"measured": one[1]["measured"] | {"shape": [16, 16]}}, one[2]]
    with pytest.raises(ValueError, match=r"case-1 .*was not measured alike in both .*: shape \[8, 8\] and \[16, 16\]"):
        compare(evaluation("one", one), evaluation("other", other))
