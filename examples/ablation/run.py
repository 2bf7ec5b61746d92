"""The paper's claim put to the test at toy size: what does Stage I add to Stage II, and which of its tasks adds it?

    python examples/ablation/run.py --base runs/tiny-base --output_dir runs/ablation

One command trains and evaluates everything, step by step, each step a process of the ordinary scripts and commands:

    base ──> Stage I of an arm ──┬──> Stage II ──> evaluation on usual and on unseen scanners
                                 ├──> evaluation of the understanding tasks
                                 └──> generation expert of a base that knows general edits ──> evaluation (zero-shot)

* The arms of a seed share data, steps, batch and seed; they differ in the questions of Stage I and in nothing else. The
  spread over seeds is that of both trainings; the base is one.
* A step works in `NAME.unfinished`, which becomes `NAME` when it is done. So what was interrupted goes on: finished
  steps are skipped, and the step that was cut off continues by its own means. Checkpoints of finished trainings go.
* `config.json` holds every setting, all recipes and the command of every step. A folder that holds another ablation is
  refused, and so is one whose steps were run with other code; seeds and arms may be added, also by a second command
  that runs beside the first.
* `report.md` and `curves.png` are written after each evaluation, see `report.py`.
* Recipes may name scans to train on; evaluations are of simulated patients all the same.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import report
import yaml
from filelock import FileLock
from tqdm.auto import tqdm

import synermedgen_hf
from synermedgen_hf.data.routes import ROUTES
from synermedgen_hf.data.splits import write_whole
from synermedgen_hf.data.understanding import DEFAULT_MIX

HERE = Path(__file__).parent
EXAMPLES = HERE.parent
TASKS = ("CTS", "TIA", "MI")
# Arm to the tasks of its Stage I, and the wrong candidates of CTS where they are not the recipe's.
ARMS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "untaught": ((), None),  # without Stage I like "none", and without what the base has been taught
    "none": ((), None),
    "vqa": (("VQA",), None),
    "all": (TASKS, None),
    "no-cts": (("TIA", "MI"), None),
    "no-mi": (("CTS", "TIA"), None),
    "no-tia": (("CTS", "MI"), None),
    "random": (TASKS, "random"),
}
ZERO_SHOT = ("none", "vqa", "all")  # arms that are asked to synthesise without Stage II, too
SCANNERS = ("usual", "unseen")
PROTOCOLS = ("synthrad2023", "paper_frame")  # those that know all routes slice by slice, and SSIM
TIMINGS, CONFIG = "timings.jsonl", "config.json"
LIBRARIES = ("torch", "transformers", "trl", "diffusers", "datasets", "numpy", "scipy")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="pipeline that all arms start from, of examples/pretrain_tiny.py")
    add("--output_dir", type=Path, required=True)
    add("--untaught", type=Path, help="pipeline that the base was trained from: a further arm starts from it")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--arms", nargs="+", choices=ARMS, help="by default all that can be had")
    add("--no_zero_shot", action="store_true", help="leave out the base of general edits and what follows from it")
    add("--stage1_recipe", type=Path, default=EXAMPLES / "recipes" / "understanding_tiny.yaml")
    add("--stage2_recipe", type=Path, default=EXAMPLES / "recipes" / "generation_tiny.yaml")
    add("--stage1_steps", type=int, default=None, help="by default the recipe's")
    add("--stage2_steps", type=int, default=None, help="by default the recipe's")
    add("--edit_pictures", type=int, default=4000, help="general pictures with an edit, for zero-shot")
    add("--edit_steps", type=int, default=None, help="by default as many as in Stage II")
    add("--test_cases", type=int, default=6, help="held-out simulated patients of each protocol")
    add("--slice_step", type=int, default=8, help="every so many of their slices")
    add("--phantom_size", type=int, default=128, help="pixels of a slice's longer side, in the evaluation")
    add("--phantom_slices", type=int, default=None, help="axial slices of a patient, by default the whole region")
    add("--protocol", default="synthrad2023", choices=PROTOCOLS, help="of the evaluation")
    add("--batch_size", type=int, default=16, help="of the evaluation")
    add("--accept_changed_code", action="store_true", help="go on although earlier steps were run with other code")
    add("--plan", action="store_true", help="say what would be done, and stop")
    args = parser.parse_args(argv)
    args.arms = args.arms or [arm for arm in ARMS if args.untaught or arm != "untaught"]
    if "untaught" in args.arms and not args.untaught:
        parser.error("the arm 'untaught' needs --untaught, the pipeline that the base was trained from.")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What is to be done
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """
    One process that makes one folder.

    Args:
        folder (`Path`): There when the step is done.
        kind (`str`): Steps of a kind take about as long as each other.
        command (`tuple[str, ...]`): Ends with the option that names the folder; the folder's working name is added.
    """

    folder: Path
    kind: str
    command: tuple[str, ...]

    @property
    def working(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.unfinished")

    @property
    def is_done(self) -> bool:
        return self.folder.exists()


def make_steps(args) -> list[Step]:
    """All steps in their order: what all arms need, then seed after seed."""
    output, stage1, stage2 = args.output_dir, read_yaml(args.stage1_recipe), read_yaml(args.stage2_recipe)
    python, command_line = sys.executable, (sys.executable, "-m", "synermedgen_hf.cli")
    routes = stage2.get("routes") or [route.name for route in ROUTES]
    steps: list[Step] = []

    def add(folder: Path, kind: str, command) -> Path:
        steps.append(Step(folder, kind, tuple(map(str, command))))
        return folder

    def evaluate(folder: Path, kind: str, scanner: str, *what):
        asked = ["--phantom-cases", args.test_cases, "--slice-step", args.slice_step, "--protocol", args.protocol]
        asked += ["--phantom-size", args.phantom_size, "--phantom-scanner", scanner, "--batch-size", args.batch_size]
        asked += ["--phantom-slices", args.phantom_slices] if args.phantom_slices else []
        asked += [part for route in routes for part in ("--routes", route)]
        add(folder, kind, [*command_line, "evaluate", *what, *asked, "--output"])

    def answer(folder: Path, model: Path):
        scans = stage1.get("data_dir")
        asked = ["--data-dir", scans] if scans else ["--phantom-cases", args.test_cases]
        asked += ["--no-text", "--batch-size", args.batch_size]
        asked += ["--label-images"] if stage1.get("label_images") else []
        add(folder, "answers", [*command_line, "evaluate-understanding", "--model", model, *asked, "--output"])

    # 1. What all arms share.
    for scanner in SCANNERS:
        evaluate(output / "copy" / scanner, f"copying, {scanner}", scanner, "--baseline", "copy", "--model", args.base)
    answer(output / "base" / "answers", args.base)
    edits = None
    if not args.no_zero_shot:
        edit_steps = args.edit_steps or args.stage2_steps or stage2["max_train_steps"]
        options = ["--base", args.base, "--pictures", args.edit_pictures, "--recipe", args.stage2_recipe]
        script = [python, HERE / "edits.py", *options, "--max_train_steps", edit_steps]
        edits = add(output / "edits", "edits", [*script, "--output_dir"])

    for seed in args.seeds:
        for arm in args.arms:
            (tasks, negatives), here = ARMS[arm], output / f"seed{seed}" / arm

            # 2. Stage I, and what it taught.
            start = args.untaught if arm == "untaught" else args.base
            if tasks:
                options = ["--config", args.stage1_recipe, "--model_name_or_path", start]
                options += ["--seed", seed, "--data_seed", seed]
                options += ["--report_to", "none", "--resume_from_checkpoint", "latest"]
                options += ["--max_steps", args.stage1_steps] if args.stage1_steps else []
                options += ["--dataset_config", "vqa" if tasks == ("VQA",) else "understanding"]
                options += ["--tasks", *tasks, "--task_shares", *shares_of(tasks, stage1)]
                options += ["--negatives", negatives] if negatives else []
                script = [python, EXAMPLES / "train_understanding.py", *options, "--output_dir"]
                start = add(here / "stage1", "Stage I", script) / "pipeline"
                answer(here / "answers", start)

            # 3. Stage II, and what comes out.
            options = ["--config", args.stage2_recipe, "--pretrained_model_name_or_path", start, "--seed", seed]
            # Autoencoder and slices are the same for all arms: they are encoded once.
            options += ["--resume_from_checkpoint", "latest", "--latent_cache_dir", output / "latents"]
            options += ["--max_train_steps", args.stage2_steps] if args.stage2_steps else []
            script = [python, EXAMPLES / "train_generation.py", *options, "--output_dir"]
            made = add(here / "stage2", "Stage II", script) / "pipeline"
            for scanner in SCANNERS:
                evaluate(here / scanner, f"evaluation, {scanner}", scanner, "--model", made)

            # 4. Synthesis without Stage II. Without Stage I as well, it is the base's, which knows no seed.
            if edits is None or arm not in ZERO_SHOT or (not tasks and seed != args.seeds[0]):
                continue
            here = here if tasks else output / "base"
            zero = edits / "pipeline"
            if tasks:
                script = [python, HERE / "graft.py", "--generation", zero, "--understanding", start, "--output_dir"]
                zero = add(here / "zero", "graft", script) / "pipeline"
            for scanner in SCANNERS:
                evaluate(here / f"zero-{scanner}", f"evaluation, {scanner}", scanner, "--model", zero)
    return steps


def shares_of(tasks: tuple[str, ...], recipe: dict) -> list[float]:
    """The recipe's shares of the tasks, or those of the published set; they need not sum to 1."""
    known = dict(zip(recipe.get("tasks") or (), recipe.get("task_shares") or (), strict=False))
    return [known.get(task, DEFAULT_MIX.get(task, 1.0)) for task in tasks]


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def checksum(pipeline: Path) -> str:
    state = hashlib.sha256()
    for file in sorted(path for path in pipeline.rglob("*") if path.is_file()):
        state.update(f"{file.relative_to(pipeline)} {file.stat().st_size}\n".encode())
        state.update(file.read_bytes())
    return state.hexdigest()


def code_state() -> dict[str, str]:
    """What the figures depend on besides settings: the code, but for its comments and its layout, and the libraries."""
    package = Path(synermedgen_hf.__file__).parent
    files = {f"{package.name}/{file.relative_to(package)}": file for file in package.rglob("*.py")}
    files |= {name: EXAMPLES / name for name in ("train_understanding.py", "train_generation.py")}
    files |= {f"ablation/{name}": HERE / name for name in ("edits.py", "graft.py", "run.py")}
    state = hashlib.sha256()
    for name, file in sorted(files.items()):
        state.update(f"{name} {ast.dump(ast.parse(file.read_text(encoding='utf-8')))}\n".encode())
    return {"code": state.hexdigest()} | {library: version(library) for library in LIBRARIES}


def describe(args) -> dict:
    """All that makes an ablation this one."""
    left_out = ("seeds", "arms", "plan", "untaught", "accept_changed_code", "output_dir", "base", "no_zero_shot")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return {
        # As JSON will have them, to be compared with what was written.
        "settings": json.loads(json.dumps(settings, default=str)),
        "files of the base": checksum(args.base),
        "Stage I": read_yaml(args.stage1_recipe),
        "Stage II": read_yaml(args.stage2_recipe),
    }


def changes(before: dict, now: dict, place: str = "") -> list[str]:
    """What differs, in words; in dictionaries, entry by entry."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += changes(one, other, f"{name}: ")
        elif one != other:
            found.append(f"{place}{name} {one} (now {other})")
    return found


def claim(args, steps: list[Step]):
    """Write `config.json`, or refuse a folder that holds another ablation."""
    config, code = describe(args), code_state()
    known, before = args.output_dir / CONFIG, {}
    if known.exists():
        before = json.loads(known.read_text(encoding="utf-8"))
        if "code" not in before:
            raise SystemExit(
                f"{args.output_dir} was begun when the code was not yet noted, so it cannot go on; report.py still "
                "reads it. Choose another --output_dir."
            )
        if changed := changes({name: before.get(name) for name in config}, config):
            raise SystemExit(
                f"{args.output_dir} holds another ablation: {'; '.join(changed)}. Choose another --output_dir."
            )
    states = before.get("code", [])
    if states and states[-1] != code:
        if not args.accept_changed_code:
            raise SystemExit(
                f"The steps in {args.output_dir} were run with other code or libraries: "
                f"{'; '.join(changes(states[-1], code))}. Choose another --output_dir, or mix them on purpose with "
                "--accept_changed_code: the report says so, or, where their evaluations are unlike, refuses."
            )
        states = [*states, code]
    config["code"] = states or [code]
    if args.untaught:  # an arm of its own, which may come later
        config["untaught"] = {"pipeline": str(args.untaught), "checksum": checksum(args.untaught)}
    if before.get("untaught") and config.setdefault("untaught", before["untaught"]) != before["untaught"]:
        raise SystemExit(f"{args.output_dir} holds an ablation with another --untaught: {before['untaught']}.")
    config["seeds"] = sorted({*before.get("seeds", []), *args.seeds})
    config["arms"] = [arm for arm in ARMS if arm in {*before.get("arms", []), *args.arms}]
    config["steps"] = before.get("steps", {}) | {
        str(step.folder.relative_to(args.output_dir)): [*step.command, str(step.working)] for step in steps
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(known, json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Doing it
# ---------------------------------------------------------------------------------------------------------------------


def read_timings(output: Path) -> dict[str, list[float]]:
    """Kind of step to the seconds that each took, of those that were not interrupted."""
    seconds: dict[str, list[float]] = {}
    file = output / TIMINGS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        if not row["resumed"]:
            seconds.setdefault(row["kind"], []).append(row["seconds"])
    return seconds


def time_left(steps: list[Step], output: Path) -> str:
    """How long the steps that are not done will take, as far as steps of their kind have been measured here."""
    seconds = read_timings(output)
    kinds = [step.kind for step in steps if not step.is_done]
    said = []
    if any(kind in seconds for kind in kinds):
        known = sum(statistics.median(seconds[kind]) for kind in kinds if kind in seconds)
        said.append(f"about {known / 3600:.1f} h")
    if unknown := [kind for kind in dict.fromkeys(kinds) if kind not in seconds]:
        counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in unknown)
        said.append(f"unknown for {counted}, of which none has been measured here")
    return ", and ".join(said) or "nothing"


@contextmanager
def held(file: Path) -> Iterator[int]:
    """
    Wait for a lock and hold it. Yields its file descriptor: a process that inherits it holds the lock too, so that the
    step of a run that was killed is not done twice at the same time.
    """
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def do(step: Step, output: Path, lock: int):
    """Run one step, from where an earlier run stopped, and note how long it took; its process keeps the lock."""
    resumed = step.working.exists()
    step.working.parent.mkdir(parents=True, exist_ok=True)
    log = output / "logs" / f"{'-'.join(step.folder.relative_to(output).parts)}.txt"
    log.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    with open(log, "ab") as said:
        command = [*step.command, str(step.working)]
        done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, check=False, pass_fds=[lock])
    if done.returncode:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        said = f"{step.folder} failed with exit status {done.returncode}; all it said is in {log}."
        raise SystemExit("\n".join([*end, f"{said} The same command goes on from here."]))
    keep_course(step.working)
    step.working.rename(step.folder)
    # Not before the step has its name: with half of its checkpoints it could neither go on nor begin.
    for checkpoint in checkpoints_of(step.folder):
        shutil.rmtree(checkpoint)
    row = {"step": str(step.folder.relative_to(output)), "kind": step.kind}
    row |= {"seconds": round(time.monotonic() - start, 1), "resumed": resumed}
    with open(output / TIMINGS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def checkpoints_of(folder: Path) -> list[Path]:
    """Those of a training, from the oldest to the newest."""
    numbered = [path for path in folder.rglob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.split("-")[1]))


def keep_course(folder: Path):
    """Keep what the newest checkpoint of Stage I says about the course of the training."""
    newest = checkpoints_of(folder)[-1:]
    if newest and (newest[0] / "trainer_state.json").exists():
        shutil.copy(newest[0] / "trainer_state.json", folder)


def main(args):
    if not (args.base / "model_index.json").exists():
        raise SystemExit(f"{args.base} holds no pipeline: make one with examples/pretrain_tiny.py.")
    if args.untaught and not (args.untaught / "model_index.json").exists():
        raise SystemExit(f"{args.untaught} holds no pipeline: --untaught is what the base was made of.")
    if not find_spec("matplotlib"):  # and not after hours, when the first curves are to be drawn
        raise SystemExit("Curves need matplotlib: pip install 'synermedgen-hf[phantom]'.")
    steps = make_steps(args)
    kinds = [step.kind for step in steps if not step.is_done]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"
    print(f"{len(kinds)} of {len(steps)} steps are to be done: {counted}.")
    print(f"Time left: {time_left(steps, args.output_dir)}.")
    if args.plan:
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(args.output_dir / ".lock"):
        claim(args, steps)
    start = describe(args), code_state()
    progress = tqdm(steps, unit="step")
    for step in progress:
        name = step.folder.relative_to(args.output_dir)
        progress.set_postfix_str(f"{name}; left: {time_left(steps, args.output_dir)}")
        step.folder.parent.mkdir(parents=True, exist_ok=True)
        # Another run may be at it, of other seeds: what all seeds need is done once.
        with held(step.folder.with_name(f".{step.folder.name}.lock")) as lock:
            if step.is_done:
                continue
            if (describe(args), code_state()) != start:
                raise SystemExit(
                    "The code, a recipe or the base has changed while this ran. Bring it back, or start elsewhere."
                )
            do(step, args.output_dir, lock)
        if step.kind.startswith("evaluation"):
            try:
                report.write_report(args.output_dir)
            except ValueError as error:  # what is left to do can be done all the same
                tqdm.write(f"No report: {error}")
    try:
        report.write_report(args.output_dir)
    except ValueError as error:
        raise SystemExit(f"All steps are done, but there is no report: {error}") from error
    print(f"Wrote {args.output_dir / report.REPORT} and {args.output_dir / report.CURVES}")


if __name__ == "__main__":
    main(parse_args())
