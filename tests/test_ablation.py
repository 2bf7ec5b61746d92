"""The ablation: what it will do, that it goes on after a kill, what its report says of given figures; run for real."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Image
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from synermedgen_hf import SynerMedGenForConditionalGeneration, SynerMedGenPipeline
from synermedgen_hf.data.flow_matching import Dropout, PairBatches, PairPool
from synermedgen_hf.data.latents import SliceEncoder
from synermedgen_hf.data.layouts import write_layout
from synermedgen_hf.loading_synermedgen import part_of

FOLDER = Path(__file__).parents[1] / "examples" / "ablation"
sys.path.append(str(FOLDER))

import edits  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

WEIGHTS = "model/model.safetensors"


@pytest.fixture
def options(tmp_path):
    """A command line of the ablation with a base that is none."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")

    def options(*more):
        given = ["--base", base, "--output_dir", tmp_path / "out", *more]
        return run.parse_args([str(one) for one in given])

    return options


# ---------------------------------------------------------------------------------------------------------------------
# What is to be done
# ---------------------------------------------------------------------------------------------------------------------


def commands(steps, kind):
    """Arm to the command of its step of a kind, under seed 0, the folders of the arm left out."""
    return {
        step.folder.parts[-2]: [part.replace(f"/{step.folder.parts[-2]}/", "/ARM/") for part in step.command]
        for step in steps
        if step.kind == kind and "seed0" in step.folder.parts
    }


def test_arms_differ_in_their_questions_alone(options):
    steps = run.make_steps(options("--untaught", "init"))
    recipe = yaml.safe_load((FOLDER.parent / "recipes" / "understanding_tiny.yaml").read_text())
    known = dict(zip(recipe["tasks"], map(str, recipe["task_shares"]), strict=True))
    stage1 = commands(steps, "Stage I")
    assert set(stage1) == {*run.ARMS} - {"none", "untaught"}
    questions = {}
    for arm, command in stage1.items():
        start, end = command.index("--dataset_config"), command.index("--output_dir")
        questions[arm], stage1[arm] = command[start:end], command[:start] + command[end:]
    assert len({tuple(command) for command in stage1.values()}) == 1
    for arm, asked in questions.items():
        tasks = asked[asked.index("--tasks") + 1 : asked.index("--task_shares")]
        assert tasks == list(run.ARMS[arm][0])
        shares = asked[asked.index("--task_shares") + 1 :][: len(tasks)]
        assert arm == "vqa" or shares == [known[task] for task in tasks]
        assert asked[1] == ("vqa" if arm == "vqa" else "understanding")
        assert ("--negatives" in asked) == (arm == "random") == (asked[-2:] == ["--negatives", "random"])
    stage2 = commands(steps, "Stage II")
    assert set(stage2) == {*run.ARMS}
    start = {arm: command.index("--pretrained_model_name_or_path") + 1 for arm, command in stage2.items()}
    starts = {arm: stage2[arm].pop(start[arm]) for arm in stage2}
    assert starts.pop("none").endswith("/base") and starts.pop("untaught") == "init"
    assert all(path.endswith("ARM/stage1/pipeline") for path in starts.values())
    assert len({tuple(command) for command in stage2.values()}) == 1


@pytest.mark.parametrize("stage", ["understanding", "generation"])
def test_the_short_version_differs_from_the_recipe_in_what_it_says(stage):
    short = yaml.safe_load((FOLDER / f"{stage}.yaml").read_text())
    whole = yaml.safe_load((FOLDER.parent / "recipes" / f"{stage}_tiny.yaml").read_text())
    changed = {name for name in short.keys() | whole.keys() if short.get(name) != whole.get(name)}
    steps = {"understanding": "max_steps", "generation": "max_train_steps"}[stage]
    assert whole[steps] / short[steps] == {"understanding": 4, "generation": 8}[stage]
    logged = {name for name in changed if name.startswith(("logging", "eval", "save", "checkpointing", "validation"))}
    sizes = {"understanding": {"phantom_cases", "per_case", "warmup_steps"}, "generation": {"lr_warmup_steps"}}[stage]
    sizes |= {"ema_decay", "train_batch_size"} if stage == "generation" else {"dataset_num_proc", "report_to"}
    assert changed - logged - {steps, "output_dir", "model_name_or_path", "pretrained_model_name_or_path"} == sizes


def test_every_arm_is_evaluated_on_both_kinds_of_scanners_and_three_of_them_without_stage_two(options):
    steps = run.make_steps(options("--seeds", 4, 5))
    for arm in {*run.ARMS} - {"untaught"}:
        for scanner in ("usual", "unseen"):
            step = next(one for one in steps if one.folder.parts[-3:] == ("seed5", arm, scanner))
            assert step.command[step.command.index("--phantom-scanner") + 1] == scanner
            assert step.command[step.command.index("--model") + 1].endswith(f"seed5/{arm}/stage2/pipeline")
    zero = ["/".join(step.folder.parts[-3:]) for step in steps if step.folder.name == "zero-unseen"]
    assert zero == [
        "out/base/zero-unseen",
        *(f"seed{seed}/{arm}/zero-unseen" for seed in (4, 5) for arm in ("vqa", "all")),
    ]
    assert len({step.folder for step in steps}) == len(steps)


def test_a_folder_is_that_of_one_ablation_which_may_grow(options):
    few = options("--seeds", 0, "--arms", "none")
    run.claim(few, run.make_steps(few))
    more = options("--seeds", 1, "--arms", "all")
    run.claim(more, run.make_steps(more))
    config = json.loads((more.output_dir / "config.json").read_text())
    assert (config["seeds"], config["arms"]) == ([0, 1], ["none", "all"])
    assert {"seed0/none/stage2", "seed1/all/stage1"} < config["steps"].keys()
    assert config["Stage II"]["freeze"] == "detach"
    (few.base.parent / "init").mkdir()
    (few.base.parent / "init" / "model.safetensors").write_bytes(b"random")
    wider = options("--untaught", few.base.parent / "init")
    run.claim(wider, run.make_steps(wider))
    assert "seed0/untaught/stage2" in json.loads((more.output_dir / "config.json").read_text())["steps"]
    run.claim(more, run.make_steps(more))
    (few.base.parent / "init" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SystemExit, match="another --untaught"):
        run.claim(wider, run.make_steps(wider))
    other = options("--test_cases", 3)
    with pytest.raises(SystemExit, match=r"holds another ablation: settings: test_cases 6 \(now 3\)\."):
        run.claim(other, run.make_steps(other))
    (few.base / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(SystemExit, match="files of the base"):
        run.claim(few, run.make_steps(few))


def test_steps_of_other_code_are_not_mixed_unnoticed(options, monkeypatch):
    args = options("--seeds", 0, "--arms", "none")
    run.claim(args, run.make_steps(args))
    run.claim(args, run.make_steps(args))
    (state,) = json.loads((args.output_dir / "config.json").read_text())["code"]
    assert state == run.code_state() and state["torch"] == torch.__version__
    monkeypatch.setattr(run, "code_state", lambda: {**state, "code": "other", "torch": "9.9"})
    with pytest.raises(
        SystemExit, match=r"other code or libraries: code .* \(now other\); torch .* \(now 9.9\)\. Choose"
    ):
        run.claim(args, run.make_steps(args))
    args.accept_changed_code = True
    run.claim(args, run.make_steps(args))
    assert len(json.loads((args.output_dir / "config.json").read_text())["code"]) == 2


def test_comments_are_no_other_code(tmp_path, monkeypatch):
    scripts = [*(tmp_path / name for name in ("train_understanding.py", "train_generation.py"))]
    scripts += [tmp_path / "ablation" / name for name in ("edits.py", "graft.py", "run.py")]
    (tmp_path / "ablation").mkdir()
    for script in scripts:
        script.write_text("made = 1\n")
    monkeypatch.setattr(run, "EXAMPLES", tmp_path)
    monkeypatch.setattr(run, "HERE", tmp_path / "ablation")
    before = run.code_state()
    scripts[0].write_text("# Why.\nmade = (1)\n")
    assert run.code_state() == before
    scripts[0].write_text("made = 2\n")
    assert run.code_state() != before


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------

# Makes its folder, and fails the first time in the middle of its work.
FAILS_ONCE = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
begun = folder.exists()
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "work.txt", "a") as file:
    file.write("second half" if begun else "first half, ")
if not begun:
    sys.exit("no space left")
"""


def test_a_step_that_was_cut_off_goes_on_and_its_time_is_no_measure(tmp_path):
    step = run.Step(tmp_path / "seed0" / "all" / "stage1", "Stage I", (sys.executable, "-c", FAILS_ONCE))
    assert run.time_left([step], tmp_path).startswith("unknown for 1 x Stage I")
    with run.held(tmp_path / "lock") as lock:
        with pytest.raises(SystemExit, match="(?s)no space left.*failed with exit status 1.*seed0-all-stage1.txt"):
            run.do(step, tmp_path, lock)
        assert not step.is_done
        run.do(step, tmp_path, lock)
    assert step.is_done and not step.working.exists()
    assert (step.folder / "work.txt").read_text() == "first half, second half"
    assert run.read_timings(tmp_path) == {}
    assert run.time_left([step], tmp_path) == "nothing"


def test_the_time_left_is_that_of_like_steps(tmp_path):
    rows = [{"step": "", "kind": "Stage I", "seconds": seconds, "resumed": False} for seconds in (3000, 3600, 9000)]
    (tmp_path / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [run.Step(tmp_path / str(number), "Stage I", ()) for number in range(3)]
    (tmp_path / "0").mkdir()
    assert run.time_left(steps, tmp_path) == "about 2.0 h"
    steps.append(run.Step(tmp_path / "other", "Stage II", ()))
    assert run.time_left(steps, tmp_path).startswith("about 2.0 h, and unknown for 1 x Stage II")


# Makes its folder with two checkpoints, as Stage I does.
TRAINS = """
import pathlib, sys
for step in (200, 1400):
    folder = pathlib.Path(sys.argv[1]) / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(str(step))
"""


def test_checkpoints_of_a_finished_training_go_but_its_course_stays(tmp_path):
    step = run.Step(tmp_path / "stage1", "Stage I", (sys.executable, "-c", TRAINS))
    with run.held(tmp_path / "lock") as lock:
        run.do(step, tmp_path, lock)
    assert (step.folder / "trainer_state.json").read_text() == "1400"
    assert [path.name for path in step.folder.iterdir()] == ["trainer_state.json"]


def test_killed_while_checkpoints_go_the_step_is_done(tmp_path, monkeypatch):
    """With half of its checkpoints a training could neither go on nor begin."""
    step = run.Step(tmp_path / "stage1", "Stage I", (sys.executable, "-c", TRAINS))

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.shutil, "rmtree", killed)
    with run.held(tmp_path / "lock") as lock, pytest.raises(KeyboardInterrupt):
        run.do(step, tmp_path, lock)
    assert step.is_done and not step.working.exists()


RUNS_A_STEP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import run
folder = Path(sys.argv[2])
sleeps = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).mkdir(); time.sleep(600)"
step = run.Step(folder / "stage1", "Stage I", (sys.executable, "-c", sleeps))
with run.held(folder / "lock") as lock:
    run.do(step, folder, lock)
"""


def test_the_step_of_a_run_that_was_killed_keeps_its_lock(tmp_path):
    """It lives on, and a second run that began the same step would write between its lines."""
    first = subprocess.Popen([sys.executable, "-c", RUNS_A_STEP, FOLDER, tmp_path], start_new_session=True)
    while first.poll() is None and not (tmp_path / "stage1.unfinished").exists():
        time.sleep(0.1)
    assert first.poll() is None, "it ended before it could be killed"
    first.kill()
    first.wait()
    with open(tmp_path / "lock") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.killpg(first.pid, signal.SIGKILL)  # the step, which is of its group
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_an_interval_needs_two_patients_of_each_kind():
    assert report.interval_of_sum([np.array([0.1]), np.array([0.2])]) is None
    low, high = report.interval_of_sum([np.array([0.1, 0.3]), np.array([0.2, 0.2])])
    assert low == pytest.approx(0.6) and high == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------

ROUTES = {"brain/MRI-CT": ("hu", "CT"), "whole-body/CT-PET": ("suv", "PET"), "brain/T1-T2": ("au", "T2")}


def write_evaluation(folder, ssim, spread=0.0, patients=8):
    """A finished evaluation: each patient's SSIM lies `spread` higher or lower than asked for, by turns."""
    folder.mkdir(parents=True)
    lines = []
    for route, (unit, modality) in ROUTES.items():
        for patient in range(patients):
            for number in range(2):
                value = ssim + spread * (-1) ** patient
                metrics = {f"mae_{unit}_mask": 10.0 + number, "psnr_mask": 30.0, "ssim_mask": value}
                record = {"dataset": "phantom", "case_id": str(patient), "patient": str(patient), "route": route}
                record |= {"slice_index": number, "protocol": {"name": "test", "modality": modality}}
                lines.append(json.dumps(record | {"metrics": metrics}))
    (folder / "cases.jsonl").write_text("\n".join(lines) + "\n")


def write_answers(folder, accuracy):
    """100 questions of ten patients a task; the more are right, the more patients have them right."""
    folder.mkdir(parents=True)
    cases = [
        {
            "index": index,
            "task": task,
            "dataset": f"set {index % 2}",
            "patient_id": str(index % 10 // 2),
            "correct": index < 100 * accuracy,
        }
        for task in ("CTS", "MI", "TIA")
        for index in range(100)
    ]
    (folder / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    tasks = {
        task: {
            "chance": 0.25,
            "likelihood": {"n": 100, "accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.05]},
        }
        for task in ("CTS", "MI", "TIA")
    }
    (folder / "summary.json").write_text(json.dumps({"tasks": tasks}))


@pytest.fixture
def ablation(tmp_path):
    """Three seeds: `all` above `none`, below `vqa`, and now above and now below `random`."""
    seeds, arms = [0, 1, 2], ["none", "vqa", "all", "random"]
    config = {"settings": {"protocol": "test", "test_cases": 8}, "Stage I": {}, "seeds": seeds, "arms": arms}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for seed in seeds:
        shift = 0.001 * seed
        for arm, ssim in (("none", 0.70), ("vqa", 0.80), ("all", 0.75), ("random", 0.75 + 0.01 * (-1) ** seed)):
            # Patients differ far more from each other than arms do: only pairs can tell.
            write_evaluation(tmp_path / f"seed{seed}" / arm / "usual", ssim + shift, spread=0.1)
            if arm != "none":
                write_answers(tmp_path / f"seed{seed}" / arm / "answers", 0.27 if arm == "vqa" else 0.60)
    write_answers(tmp_path / "base" / "answers", 0.25)
    return tmp_path


def test_the_table_holds_mean_and_spread_over_seeds(ablation):
    text = report.write_report(ablation)
    line = next(line for line in text.splitlines() if line.startswith("| CTS + MI + TIA | 3 |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2:7] == ["60.0 ± 0.0"] * 3 + ["75.10 ± 0.10", "30.00 ± 0.00"]
    assert cells[7:] == ["75.10 ± 0.10", "30.00 ± 0.00", "10.50 ± 0.00"] + [
        "75.10 ± 0.10",
        "30.00 ± 0.00",
        "10.500 ± 0.000",
        "75.10 ± 0.10",
        "30.00 ± 0.00",
        "10.50 ± 0.00",
    ]
    assert "| whole-body/CT-PET | 70.10 ± 0.10 | 80.10 ± 0.10 | 75.10 ± 0.10 |" in text
    assert text == (ablation / "report.md").read_text()
    assert "CTS by CTS + MI + TIA: 60.0 ± 0.0 % right, by the base 25.0 %, chance 25 %: better than by the base" in text
    assert "SSIM, PSNR and MAE are `ssim_mask`, `psnr_mask`, `mae_hu_mask`, `mae_suv_mask`, `mae_au_mask`" in text


def test_the_verdict_follows_the_figures_whichever_way_they_fall(ablation):
    text = report.write_report(ablation)
    start = "- **CTS + MI + TIA** against "
    said = {line[len(start) :].split(", SSIM")[0]: line for line in text.splitlines() if line.startswith(start)}
    assert "better, by 5.00: the claim holds here" in said["nothing"]
    # All of 8 patients on one side: p = 2 / 2^8.
    assert "8 patients: +5.00 to +5.00; q = 0.0078; over seeds: +5.00 to +5.00 (+5.00, +5.00, +5.00)" in said["nothing"]
    assert "worse, by 5.00: here the opposite of the claim holds" in said["ordinary questions (vqa)"]
    random = said["CTS + MI + TIA, random CTS negatives"]
    assert "undecided (-0.33): it would hold for other patients, not for other trainings" in random
    assert "A comparison is decided if" in text
    assert (
        "Of 3 comparisons that the paper claims something of, the claim holds in 1, its opposite in 1, and 1 are "
        "undecided." in text
    )


def test_evaluations_that_were_measured_otherwise_are_not_set_beside(ablation):
    file = ablation / "seed2" / "vqa" / "usual" / "cases.jsonl"
    before = file.read_text()
    file.write_text(before.replace('"name": "test"', '"name": "another"'))
    with pytest.raises(ValueError, match="vqa/usual cannot stand beside the other evaluations .*: name: 'test' and"):
        report.write_report(ablation)
    file.write_text(before.replace('"protocol":', '"measured": {"shape": [3, 3]}, "protocol":'))
    with pytest.raises(ValueError, match="vqa/usual is of other scans of brain/MRI-CT"):
        report.write_report(ablation)


def test_what_the_paper_does_not_claim_is_not_counted():
    found = report.difference(seeds(0.8, 0.81, 0.8), seeds(0.7, 0.7, 0.7)) | {"q": 0.01}
    words = report.in_words({report.Comparison("none", "untaught", claimed=False): found})
    assert "better, by 10.33. 95 %" in words and "Of 0 comparisons that the paper claims something of" in words


def seeds(*values, patients=8):
    return {seed: {("a/MRI-CT", str(one)): value for one in range(patients)} for seed, value in enumerate(values)}


def test_few_seeds_or_patients_decide_nothing():
    found = report.difference(seeds(0.8), seeds(0.7)) | {"q": 0.01}
    assert report.judge(found) == "undecided"
    words = report.in_words({report.Comparison("all", "none"): found})
    assert "With 1 of 3 seeds, this is a first look and no result." in words
    one = report.difference(seeds(0.8, 0.8, 0.8, patients=1), seeds(0.7, 0.7, 0.7, patients=1))
    assert report.judge(one) == "undecided"


def test_other_patients_and_other_trainings_have_to_agree():
    steady = report.difference(seeds(0.80, 0.81, 0.82), seeds(0.7, 0.7, 0.7))
    # t of 2 degrees of freedom: 4.303; standard error 0.01 / sqrt(3).
    assert steady["seed_interval"] == pytest.approx([0.11 - 0.02484, 0.11 + 0.02484], abs=1e-5)
    assert report.judge(steady | {"q": 0.01}) == "better" and report.judge(steady | {"q": 0.2}) == "undecided"
    # Every seed is above, but so unequally that a fourth might not be.
    shaky = report.difference(seeds(0.71, 0.80, 0.90), seeds(0.7, 0.7, 0.7))
    assert min(shaky["by_seed"].values()) > 0 and shaky["interval"][0] > 0
    assert report.judge(shaky | {"q": 0.01}) == "undecided"


def test_what_was_not_learned_is_said(ablation):
    folder = ablation / "seed1" / "all" / "answers"
    shutil.rmtree(folder)
    write_answers(folder, 0.27)  # its interval holds the chance of 25 %
    text = report.write_report(ablation)
    assert "CTS by CTS + MI + TIA: 49.0 ± 19.1 % right, chance 25 %: not shown to be learned" in text
    assert "random CTS negatives: 60.0 ± 0.0 % right, by the base 25.0 %, chance 25 %: better than by the base" in text


def test_what_the_base_knew_already_is_not_what_stage_one_taught(ablation):
    for accuracy, verdict in (
        (0.58, "known, but not shown to be better, by +2.0 (+0.0 to +5.0 over patients)"),
        (0.75, "worse than by the base, by -15.0 (-18.0 to -12.0 over patients)"),
    ):
        shutil.rmtree(ablation / "base" / "answers")
        write_answers(ablation / "base" / "answers", accuracy)
        text = report.write_report(ablation)
        assert f"by the base {100 * accuracy:.1f} %, chance 25 %: {verdict}: what follows says little" in text


def test_routes_count_alike_however_many_a_patient_has():
    """Some patients have many routes, others one: the mean over routes, its interval and its test are of one figure."""
    rng = np.random.default_rng(0)
    many = [(f"brain/T{number}", f"brats {one}") for number in range(12) for one in range(8)]
    cells = many + [("pelvis/CT-MRI", f"synthrad {one}") for one in range(8)]
    before = {cell: rng.uniform(0.5, 0.9) for cell in cells}
    after = {cell: value + (0.02 if "brats" in cell[1] else -0.015) for cell, value in before.items()}
    found = report.difference({0: after}, {0: before})
    assert found["difference"] == pytest.approx((12 * 0.02 - 0.015) / 13)
    assert found["interval"] == pytest.approx([found["difference"]] * 2)  # every patient says the same of its routes
    assert found["p"] < 0.05


def test_other_cases_are_refused():
    one = {0: {("a/MRI-CT", "1"): 0.5, ("a/MRI-CT", "2"): 0.5}}
    other = {0: {("a/MRI-CT", "1"): 0.5}}
    with pytest.raises(ValueError, match="Seed 0 was not evaluated on the same cases"):
        report.difference(one, other)


def test_curves_are_drawn_of_what_there_is(ablation):
    pytest.importorskip("matplotlib")
    for seed in range(2):
        here = ablation / f"seed{seed}" / "all"
        (here / "stage1").mkdir()
        history = [{"step": step, "eval_accuracy/CTS": 20.0 + step} for step in (2, 4)]
        state = {"log_history": [*history, {"step": 4, "loss": 1}]}
        (here / "stage1" / "trainer_state.json").write_text(json.dumps(state))
        (here / "stage2").mkdir()
        held = {"validation/loss_mse/t=0.125": 1, "validation/loss_mse/t=1": 3}
        rows = [{"step": 1, "loss_mse": 2.0}, {"step": 1, **held}]
        (here / "stage2" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads((ablation / "config.json").read_text())
    panels = report.read_curves(ablation, config)
    assert panels["Stage I: CTS on held-out patients, %"]["all"][1] == ([2, 4], [22.0, 24.0])
    assert panels["Stage II: loss on held-out patients"]["all"][0] == ([1], [2.0])
    report.write_report(ablation)
    assert (ablation / "curves.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------------
# General edits
# ---------------------------------------------------------------------------------------------------------------------


def decoded(row):
    return [np.asarray(Image().decode_example(row[f"{side}_image"])) for side in ("source", "target")]


def test_captions_say_what_was_done():
    rows = {row["instruction"]: row for row in edits.edit_rows(len(edits.EDITS), 64, seed=0)}
    assert rows.keys() == edits.EDITS.keys()
    again = list(edits.edit_rows(3, 64, seed=0))
    assert again[2]["target_image"] == list(rows.values())[2]["target_image"]
    for caption, row in rows.items():
        before, after = decoded(row)
        assert before.shape == after.shape == (64, 64) and 0 <= after.min() <= after.max() <= 255
        assert np.array_equal(before, after) == (caption == "Leave the picture as it is.")
    before, after = decoded(rows["Mirror the picture."])
    np.testing.assert_array_equal(after, before[:, ::-1])
    before, after = decoded(rows["Swap dark and bright."])
    np.testing.assert_allclose(after, 255 - before, atol=1e-3)


def test_nothing_in_the_edits_is_medical():
    words = " ".join(edits.EDITS).lower()
    assert not any(word in words for word in ("mri", "ct ", "pet", "scan", "brain", "bone", "modality", "synthesise"))


def test_the_caption_is_what_the_model_reads(processor, config, make_vae):
    pool = PairPool(list(edits.edit_rows(22, 32, seed=0)), SliceEncoder(make_vae(), processor.image_processor))
    batches = PairBatches(pool, processor, config, 2, dropout=Dropout(0, 0, 0, region=0, multi_source=0))
    read = [batches.draw(number) for number in range(22)]
    for caption in edits.EDITS:
        ids = str(processor.text_block(caption).ids)[1:-1]
        assert any(ids in str(list(sample.sequence.input_ids)) for sample in read), caption
    assert torch.isfinite(batches.collate(read[:2])["velocity_labels"]).all()


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory, config, processor, make_vae):
    """The pipeline that the ablation starts from, saved."""
    folder = tmp_path_factory.mktemp("start") / "base"
    torch.manual_seed(0)
    model = SynerMedGenForConditionalGeneration(type(config).from_dict(config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    SynerMedGenPipeline(model, processor, make_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Both stages for two steps, on six patients of 32 pixels."""
    folder = tmp_path_factory.mktemp("recipes")
    write_layout("synthrad2023-task1", folder / "SynthRAD2023", subjects=10, size=32, num_slices=16)
    common = {"data_dir": str(folder / "SynthRAD2023"), "learning_rate": 1e-3, "logging_steps": 1}
    stage1 = {"tasks": ["CTS", "TIA", "MI"], "task_shares": [0.4, 0.3, 0.3], "per_case": 2, "use_cpu": True}
    stage1 |= {"bf16": False, "per_device_train_batch_size": 2, "max_steps": 2, "save_steps": 1, "disable_tqdm": True}
    stage1 |= {"gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 1, "eval_questions": 4}
    stage2 = {"routes": ["MRI-CT", "CT-MRI"], "train_batch_size": 2, "max_train_steps": 2, "checkpointing_steps": 1}
    stage2 |= {"mixed_precision": "no", "lr_warmup_steps": 0, "num_proc": 1}
    stage2 |= {"sampling_steps": 1, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    for name, recipe in (("stage1", stage1), ("stage2", stage2)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | recipe))
    return folder


def moved(before: Path, after: Path) -> set[str]:
    """Parts of the model that differ between two pipelines."""
    one, other = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    return {part_of(name) for name in one if not one[name].equal(other[name])}


@pytest.mark.slow
def test_an_ablation_killed_and_started_again_comes_to_its_end(start, recipes, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, FOLDER / "run.py", "--base", start, "--output_dir", out, "--seeds", 0]
    command += ["--arms", "none", "all", "--stage1_recipe", recipes / "stage1.yaml", "--edit_pictures", 22]
    command += ["--stage2_recipe", recipes / "stage2.yaml", "--edit_steps", 1, "--test_cases", 1]
    command += ["--phantom_size", 32, "--phantom_slices", 10, "--slice_step", 4]
    command = [str(part) for part in command]

    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (out / "seed0" / "all" / "stage1.unfinished").exists():
        time.sleep(0.1)
    assert first.poll() is None, "it ended before it could be killed"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    made = {path: path.stat().st_mtime_ns for path in (out / "seed0" / "none" / "stage2").rglob("*") if path.is_file()}
    assert made and not (out / "seed0" / "all" / "stage1").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert not list(out.rglob("*.unfinished")) and not list(out.rglob("checkpoint-*"))

    # Stage I and II change what is theirs; zero-shot has the one's understanding and the edits' generation.
    here = out / "seed0" / "all"
    assert moved(start, here / "stage1" / "pipeline") <= {"understanding", "vision"}
    assert moved(here / "stage1" / "pipeline", here / "stage2" / "pipeline") == {"generation"}
    assert moved(start, out / "edits" / "pipeline") == {"generation"}
    assert moved(here / "zero" / "pipeline", out / "edits" / "pipeline") == moved(start, here / "stage1" / "pipeline")
    assert moved(here / "zero" / "pipeline", here / "stage1" / "pipeline") == {"generation"}

    text = (out / "report.md").read_text()
    for title in ("usual scanners: Stage II after", "Unseen scanners: Stage II after", "Without Stage II (zero-shot)"):
        assert title in text
    assert "With 1 of 3 seeds, this is a first look and no result." in text
    assert (out / "curves.png").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0 of" in again.stdout and "Time left: nothing." in again.stdout
