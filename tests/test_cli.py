"""The command line: quick help, every option where it belongs, and errors that say what is wrong and what to do.

Commands run in this process, but for those that must start afresh or die.
"""

import importlib.metadata
import inspect
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load, save_file
from transformers import AutoModel
from typer.testing import CliRunner

from synermedgen_hf import SynerMedGenConfig, SynerMedGenPipeline, bagel, checkpoint_path, cli
from synermedgen_hf.bagel import convert_bagel
from synermedgen_hf.data import synermed
from synermedgen_hf.metrics import understanding

sys.path.append(str(Path(__file__).parent / "parity"))
from native import write_native  # noqa: E402

GOLDEN = Path(__file__).parent / "parity" / "golden_a"
COMMANDS = {"convert-bagel", "export-bagel"}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A complete checkpoint in the original layout; never written to."""
    folder = tmp_path_factory.mktemp("source") / "native"
    write_native(GOLDEN, folder)
    return folder


@pytest.fixture(scope="module")
def converted(native, tmp_path_factory):
    """The same converted by a call in Python."""
    folder = tmp_path_factory.mktemp("output") / "converted"
    convert_bagel(native, folder)
    return folder


@pytest.fixture
def output(tmp_path):
    """Where to write to. Its name is in the model card, so it is that of `converted`."""
    return tmp_path / "output" / "converted"


def run(*arguments):
    """A command in this process; an exception that would be a traceback fails the test."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def run_afresh(*arguments, code=None):
    """A command in a new interpreter, or `code` with the same arguments."""
    start = ["-m", "synermedgen_hf.cli"] if code is None else ["-c", code]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], capture_output=True, text=True)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(file):
    return json.loads(file.read_text())


def edit_json(file, **changes):
    file.write_text(json.dumps(read_json(file) | changes))


def edit_tensors(file, **changes):
    """Replace tensors of a file, or with `None` remove them."""
    tensors = load(file.read_bytes()) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


def test_help_takes_less_than_a_second():
    seconds = []
    for _ in range(3):  # the best of three, for a machine that does other things too
        start = time.perf_counter()
        done = run_afresh("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS)
    assert min(seconds) < 1


def test_help_imports_no_heavy_library():
    heavy = "{'torch', 'numpy', 'transformers', 'diffusers', 'datasets', 'scipy'} & set(sys.modules)"
    code = f"import sys\nfrom synermedgen_hf.cli import app\ntry:\n    app()\nfinally:\n    print('loaded:', {heavy})"
    for arguments in (["--help"], ["convert-bagel", "--help"], ["convert-bagel", "--no-such-option"]):
        assert run_afresh(*arguments, code=code).stdout.splitlines()[-1] == "loaded: set()"


def test_every_command_and_option_is_explained():
    assert COMMANDS <= {name.name or name.callback.__name__.replace("_", "-") for name in cli.app.registered_commands}
    for command in cli.app.registered_commands:
        assert command.callback.__doc__
        for name, parameter in inspect.signature(command.callback).parameters.items():
            assert any(getattr(note, "help", None) for note in parameter.annotation.__metadata__), name


def test_the_defaults_are_those_of_the_function():
    here, there = (inspect.signature(work).parameters for work in (cli.convert_bagel, bagel.convert_bagel))
    names = {"trained_route": "trained_routes", "trained_task": "trained_tasks"}
    assert [names.get(name, name) for name in here] == [*there, "as_json"]
    for name, parameter in list(here.items())[:-1]:
        assert (parameter.default or None) == (there[names.get(name, name)].default or None), name


def test_it_is_installed_as_a_command():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="synermedgen")
    assert entry.load() is cli.app


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["convert-bagel"],
        ["convert-bagel", "only-one-folder"],
        ["convert-bagel", "a", "b", "--no-such-option"],
        ["convert-bagel", "a", "b", "--dtype", "int8"],
        ["convert-bagel", "a", "b", "--vae-scale", "large"],
        ["export-bagel", "a", "b", "--base", "c"],
    ],
)
def test_a_command_that_is_not_understood_has_exit_code_2_and_says_where_help_is(arguments):
    done = run(*arguments)
    assert done.exit_code == 2 and "--help" in done.stderr and done.stdout == ""


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_convert_and_export(native, converted, output, tmp_path):
    done = run("convert-bagel", native, output)
    assert done.exit_code == 0 and contents(output) == contents(converted)
    assert "autoencoder" in done.stdout and f"Wrote {output} from native/ema.safetensors" in done.stdout
    assert "Converting" in done.stderr and "Converting:" not in done.stdout  # the progress bar

    done = run("export-bagel", output, tmp_path / "home")
    assert done.exit_code == 0 and f"Wrote {tmp_path / 'home'}" in done.stdout and "Exporting" in done.stderr
    for file in ("ema.safetensors", "ae.safetensors"):
        before, after = (load((folder / file).read_bytes()) for folder in (native, tmp_path / "home"))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_every_option_arrives(native, output):
    options = ["--vae-scale", 0.5, "--vae-shift", 0.25, "--timestep-shift", 4.0, "--sampling-shift", 2.0]
    options += ["--dtype", "bfloat16", "--max-shard-size", "100KB"]
    options += ["--trained-route", "brain/MRI-CT", "--trained-route", "pelvis/MRI-CT", "--trained-task", "MI"]
    done = run("convert-bagel", native, output, *options)
    assert done.exit_code == 0 and "bfloat16" in done.stdout
    vae = read_json(output / "vae" / "config.json")
    assert (vae["scaling_factor"], vae["shift_factor"]) == (0.5, 0.25)
    assert read_json(output / "scheduler" / "scheduler_config.json")["shift"] == 2.0
    config = SynerMedGenConfig.from_pretrained(output)
    assert config.timestep_shift == 4.0 and config.dtype == torch.bfloat16
    assert config.trained_routes == ["brain/MRI-CT", "pelvis/MRI-CT"] and config.trained_tasks == ["MI"]
    assert len(list((output / "model").glob("*.safetensors"))) > 3


def test_base_and_weights(native, converted, output, tmp_path):
    training_run = tmp_path / "native"
    training_run.mkdir()
    shutil.copyfile(native / "ema.safetensors", training_run / "step_100.safetensors")
    done = run("convert-bagel", training_run, output, "--base", native, "--weights", "step_100.safetensors")
    assert done.exit_code == 0 and f"Merged from {native}: ae.safetensors" in done.stdout
    before, after = contents(converted), contents(output)
    assert [name for name in before if before[name] != after[name]] == ["README.md"]
    assert b"native/step_100.safetensors" in after["README.md"]


def test_what_may_be_missing_or_left_out(native, output, tmp_path):
    source = Path(shutil.copytree(native, tmp_path / "native"))
    edit_tensors(source / "ema.safetensors", **{"vae2llm.bias": None, "one": torch.ones(1), "two": torch.ones(1)})
    allowed = ["--allow-missing", "*vae2llm*", "--allow-unexpected", "one", "--allow-unexpected", "t*"]
    done = run("convert-bagel", source, output, *allowed)
    assert done.exit_code == 0 and "Without its generation weights" in done.stdout
    rows = {line.split()[0]: line.split()[1:5] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert rows["generation"] == ["36", "1", "0", "0"]
    assert sum(int(row[2]) for name, row in rows.items() if name != "part") == 2


def test_an_option_that_is_wrong_is_said_so_before_anything_is_written(native, output):
    done = run("convert-bagel", native, output, "--max-shard-size", "banana")
    assert done.exit_code == 1 and "banana" in done.stderr and not output.exists()


@pytest.mark.parametrize(("option", "value"), [("--trained-route", "MRI-CT"), ("--trained-task", "XYZ")])
def test_a_route_or_task_that_does_not_exist(native, output, option, value):
    done = run("convert-bagel", native, output, option, value)
    assert done.exit_code in (1, 2) and value in done.stderr and not output.exists()


def test_interrupting_removes_what_was_half_written(native, output, monkeypatch):
    def interrupt(name, tensor, dtype=None):
        raise KeyboardInterrupt  # as SIGINT does, unless the tests run where it is ignored

    monkeypatch.setattr(bagel, "tensor_digest", interrupt)
    done = run("convert-bagel", native, output)
    assert done.exit_code == 130 and not output.exists()
    assert "Interrupted" in done.stderr and "run the same command again" in done.stderr and done.stdout == ""


KILLED_AT_THE_DECODER = """
import os, signal, sys
from synermedgen_hf import bagel, cli

digest = bagel.tensor_digest
def tensor_digest(name, tensor, dtype=None):
    if name.startswith("vae.decoder"):
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(name, tensor, dtype)

bagel.tensor_digest = tensor_digest
cli.app(sys.argv[1:])
"""


def test_a_conversion_that_was_killed_looks_like_nothing_and_can_be_run_again(native, converted, output):
    done = run_afresh("convert-bagel", native, output, code=KILLED_AT_THE_DECODER)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = contents(output)
    assert left and all(name.startswith(".incomplete/") for name in left)
    for loader in (SynerMedGenPipeline, AutoModel):
        with pytest.raises((OSError, ValueError)):
            loader.from_pretrained(output)
    done = run("export-bagel", output, output.parent / "home")
    assert done.exit_code == 1 and not (output.parent / "home").exists()

    done = run_afresh("convert-bagel", native, output)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(converted)
    assert "Wrote" in done.stdout and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def case(spoil, *says, marks=()):
    return pytest.param(spoil, says, id=spoil.__name__.replace("_", " "), marks=marks)


def check_refused(done, output, says):
    assert done.exit_code == 1 and done.stdout == ""
    assert "Error: " in done.stderr and "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr
    assert not output.exists()


def truncated(folder):
    file = folder / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:500_000])


def cut_in_its_header(folder):
    (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:100])


def empty(folder):
    (folder / "ae.safetensors").write_bytes(b"")


def corrupt_header(folder):
    content = bytearray((folder / "ema.safetensors").read_bytes())
    content[8:40] = b"x" * 32
    (folder / "ema.safetensors").write_bytes(content)


def header_of_another_file(folder):
    """Offsets that reach beyond the end."""
    small, large = (folder / name for name in ("ema.safetensors", "ae.safetensors"))
    size = 8 + int.from_bytes(large.read_bytes()[:8], "little")
    small.write_bytes(large.read_bytes()[:size] + b"\0" * 1000)


def absent(folder):
    shutil.rmtree(folder)


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def no_weights(folder):
    (folder / "ema.safetensors").unlink()


def pickle_only(folder):
    (folder / "ema.safetensors").rename(folder / "pytorch_model.bin")


def a_checkpoint_of_pytorch(folder):
    (folder / "ema.safetensors").rename(folder / "ema.pt")


def a_shard_that_is_not_there(folder):
    (folder / "ema.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{number}-of-00002.safetensors" for name, number in (("a", 1), ("b", 2))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def an_index_of_no_shards(folder):
    (folder / "ema.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def json_cut_off(folder):
    (folder / "llm_config.json").write_text('{"hidden_size": 64,')


def json_of_another_kind(folder):
    (folder / "vit_config.json").write_text("[]")


def json_that_is_no_text(folder):
    (folder / "llm_config.json").write_bytes(b"\xff\xfe\x00")


def no_autoencoder(folder):
    (folder / "ae.safetensors").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def tokenizer_cut_off(folder):
    (folder / "tokenizer.json").write_text('{"model":')


def tokenizer_of_another_kind(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")


def a_number_that_is_a_word(folder):
    edit_json(folder / "llm_config.json", hidden_size="64")


def a_patch_of_no_size(folder):
    edit_json(folder / "vit_config.json", patch_size=0)


def positions_of_an_unknown_kind(folder):
    edit_json(folder / "llm_config.json", rope_scaling={"type": "spiral", "factor": 2.0})


def heads_that_do_not_divide(folder):
    edit_json(folder / "llm_config.json", num_attention_heads=5)


def a_tensor_without_dimensions(folder):
    edit_tensors(folder / "ema.safetensors", **{"vae2llm.weight": torch.tensor(1.0)})


def a_table_without_columns(folder):
    edit_tensors(folder / "ema.safetensors", **{"latent_pos_embed.pos_embed": torch.ones(64)})


def a_table_that_is_not_square(folder):
    table = load((folder / "ema.safetensors").read_bytes())["latent_pos_embed.pos_embed"]
    edit_tensors(folder / "ema.safetensors", **{"latent_pos_embed.pos_embed": table[:60].clone()})


def another_autoencoder(folder):
    save_file({"post_quant_conv.weight": torch.ones(4, 4, 1, 1)}, folder / "ae.safetensors")


DAMAGED = "is damaged or not complete"
AGAIN = "Download it again."
AS_DOWNLOADED = "Name the folder of the checkpoint as downloaded."


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        case(truncated, "native/ema.safetensors", DAMAGED, AGAIN),
        case(cut_in_its_header, "native/ema.safetensors", DAMAGED, AGAIN),
        case(empty, "native/ae.safetensors", DAMAGED, AGAIN),
        case(corrupt_header, "native/ema.safetensors", DAMAGED, AGAIN),
        case(header_of_another_file, "native/ema.safetensors", DAMAGED, AGAIN),
        case(absent, "native does not exist", AS_DOWNLOADED),
        case(a_file, "native is a file, not a folder", AS_DOWNLOADED),
        case(no_weights, "native holds none of ema.safetensors, model.safetensors", AS_DOWNLOADED),
        case(pickle_only, "holds pytorch_model.bin but no safetensors", "get the safetensors release"),
        case(a_checkpoint_of_pytorch, "holds ema.pt but no safetensors", "get the safetensors release"),
        case(a_shard_that_is_not_there, "names model-00002-of-00002.safetensors", "Download the rest."),
        case(
            an_index_of_no_shards,
            "native/model.safetensors.index.json",
        ),
        case(json_cut_off, "native/llm_config.json is not valid JSON"),
        case(json_of_another_kind, "native/vit_config.json must hold a JSON object, got list"),
        case(json_that_is_no_text, "native/llm_config.json is not valid JSON"),
        case(no_autoencoder, "native lacks ae.safetensors", "--base"),
        case(no_tokenizer, "native lacks tokenizer files", "--base"),
        case(tokenizer_cut_off, "native/tokenizer.json"),
        case(tokenizer_of_another_kind, "native/tokenizer.json"),
        case(
            a_number_that_is_a_word,
            "llm_config.json",
            "hidden_size",
        ),
        case(a_patch_of_no_size, "vit_config.json", "patch_size"),
        case(positions_of_an_unknown_kind, "llm_config.json", "spiral"),
        case(heads_that_do_not_divide, "num_attention_heads (5)"),
        case(a_tensor_without_dimensions, "vae2llm.weight"),
        case(a_table_without_columns, "latent_pos_embed.pos_embed"),
        case(a_table_that_is_not_square, "latent_pos_embed.pos_embed has 60 entries", "not the square"),
        case(another_autoencoder, "ae.safetensors holds no encoder.down.* tensors"),
    ],
)
def test_a_source_that_is_not_right(native, output, tmp_path, spoil, says):
    source = Path(shutil.copytree(native, tmp_path / "native"))
    spoil(source)
    check_refused(run("convert-bagel", source, output), output, says)


def test_a_source_that_is_converted_already(converted, output):
    done = run("convert-bagel", converted, output)
    check_refused(done, output, ["converted is converted already", "export-bagel goes the other way"])


def test_a_pickle_is_refused_even_if_it_is_asked_for(native, output, tmp_path):
    source = Path(shutil.copytree(native, tmp_path / "native"))
    torch.save({"llm2vae.bias": torch.ones(16)}, source / "pytorch_model.bin")
    done = run("convert-bagel", source, output, "--weights", "pytorch_model.bin")
    check_refused(done, output, ["pytorch_model.bin", "never read"])


def test_a_file_of_weights_that_is_not_there(native, output, tmp_path):
    source = Path(shutil.copytree(native, tmp_path / "native"))
    (source / "optimizer.pt").write_bytes(b"")
    done = run("convert-bagel", source, output, "--weights", "step_7.safetensors")
    check_refused(done, output, ["holds none of step_7.safetensors"])


def test_missing_tensors_are_named_with_what_is_lost_and_the_way_out(native, output, tmp_path):
    source = Path(shutil.copytree(native, tmp_path / "native"))
    edit_tensors(source / "ema.safetensors", **{"llm2vae.weight": None})
    done = run("convert-bagel", source, output, "--trained-route", "brain/MRI-CT")
    says = ["native does not hold the weights of this model", "1 missing: llm2vae.weight", "every route (brain/MRI-CT)"]
    check_refused(done, output, [*says, "Get the complete checkpoint", "--base"])


@pytest.mark.parametrize("work", ["convert-bagel", "export-bagel"])
def test_an_output_that_is_in_the_way(native, converted, output, work):
    source = native if work == "convert-bagel" else converted
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    done = run(work, source, output)
    assert done.exit_code == 1 and done.stdout == ""
    assert f"{output} holds files already. Name a new folder, or allow it with --overwrite." in done.stderr
    assert contents(output) == {"notes.txt": b"mine"}
    assert run(work, source, output, "--overwrite").exit_code == 0
    assert contents(output)["notes.txt"] == b"mine" and len(contents(output)) > 5


@pytest.mark.parametrize("work", ["convert-bagel", "export-bagel"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_that_is_a_file(native, converted, tmp_path, work, overwrite):
    (tmp_path / "file").write_text("mine")
    done = run(work, native if work == "convert-bagel" else converted, tmp_path / "file", *overwrite)
    assert done.exit_code == 1 and "file is a file; name a folder to write to" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("work", ["convert-bagel", "export-bagel"])
def test_a_disk_that_is_too_small(native, converted, output, monkeypatch, work):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = run(work, native if work == "convert-bagel" else converted, output)
    check_refused(done, output, [f"{output} needs 4.2 MB, and the disk has 0.0 MB free"])


@pytest.mark.parametrize("work", ["convert-bagel", "export-bagel"])
def test_a_disk_that_fills_up(native, converted, output, work):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # no file may grow beyond it, as on a full disk
    try:
        done = run(work, native if work == "convert-bagel" else converted, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_refused(done, output, [])


def pipeline_without_processor(folder):
    shutil.rmtree(folder / "processor")


def pipeline_without_autoencoder(folder):
    shutil.rmtree(folder / "vae")


def weights_cut_off(folder):
    (folder / "model" / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes()[:5000])


def weights_gone(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def configuration_cut_off(folder):
    (folder / "model" / "config.json").write_text("{")


def configuration_of_the_autoencoder_cut_off(folder):
    (folder / "vae" / "config.json").write_text("{")


def nothing_there(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        case(nothing_there, "pipeline is not the folder of a SynerMedGen pipeline"),
        case(pipeline_without_autoencoder, "pipeline is not the folder of a SynerMedGen pipeline: it lacks"),
        case(
            pipeline_without_processor,
            "pipeline is not the folder of a SynerMedGen pipeline: it lacks",
            "processor/",
        ),
        case(weights_cut_off, "model/model.safetensors", DAMAGED),
        case(weights_gone, "pipeline/vae holds none of diffusion_pytorch_model.safetensors"),
        case(configuration_cut_off, "model/config.json"),
        case(configuration_of_the_autoencoder_cut_off, "vae/config.json is not valid JSON"),
    ],
)
def test_a_pipeline_that_cannot_be_exported(converted, output, tmp_path, spoil, says):
    source = Path(shutil.copytree(converted, tmp_path / "pipeline"))
    spoil(source)
    check_refused(run("export-bagel", source, output), output, says)


def test_an_original_checkpoint_is_no_pipeline(native, output):
    done = run("export-bagel", native, output)
    check_refused(done, output, ["native is not the folder of a SynerMedGen pipeline"])


# ---------------------------------------------------------------------------------------------------------------------
# Understanding
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Ten questions on ten patients in the layout of the authors' file."""
    folder = tmp_path_factory.mktemp("released")
    lines = []
    for number in range(10):
        names = [f"{modality}/Patient{number}_s{number}.png" for modality in ("t1", "t2")]
        for place, name in enumerate(names):
            (folder / "slice" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 24), 20 * number + 10 * place).save(folder / "slice" / name)
        turns = [("human", "<image><image>What changes?"), ("gpt", f"Description {'ABCD'[number % 4]}")]
        conversations = [{"from": role, "value": value} for role, value in turns]
        lines.append(json.dumps({"image": names, "conversations": conversations}))
    (folder / "SynerMed.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_an_evaluation_of_understanding_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("evaluate-understanding", "--output", tmp_path / "scores", "--phantom-cases", 1)
    assert done.exit_code == 1 and "is for one process" in done.stderr
    assert not (tmp_path / "scores").exists()


@pytest.fixture
def evaluate(questions, tmp_path):
    """The command on these questions, those of the largest split."""

    def evaluate(*arguments, output=tmp_path / "scores"):
        options = ["--output", output, "--data-dir", questions, "--config", "tia", "--split", "train", *arguments]
        return run("evaluate-understanding", *options)

    return evaluate


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("options", [("--no-label-images",), ("--difficulty", "easy"), ("--seed", 3)])
def test_questions_that_are_there_already_are_asked_as_they_are(evaluate, options, tmp_path):
    done = evaluate(*options)
    assert done.exit_code and "leave out --label-images, --difficulty" in " ".join(done.output.split())
    assert not (tmp_path / "scores").exists()


def test_answers_that_another_run_is_writing_are_left_alone(evaluate, tmp_path):
    (tmp_path / "scores").mkdir()
    with FileLock(tmp_path / "scores" / ".lock"):
        done = evaluate()
    assert done.exit_code == 1 and "Another run is writing to" in done.stderr
    assert [file.name for file in (tmp_path / "scores").iterdir()] == [".lock"]


def test_understanding_is_evaluated_question_by_question(evaluate, tmp_path):
    done = evaluate()
    assert done.exit_code == 0
    records, summary = read_lines(tmp_path / "scores" / "cases.jsonl"), read_json(tmp_path / "scores" / "summary.json")
    assert 4 < len(records) <= 10 and len({record["patient_id"] for record in records}) == len(records)
    assert all(len(record["probabilities"]) == 4 and isinstance(record["text"], str) for record in records)
    found = summary["tasks"]["TIA"]
    assert found["n"] == found["patients"] == len(records) and found["chance"] == 0.25
    assert found["likelihood"]["accuracy"] == sum(record["correct"] for record in records) / len(records)
    assert summary["arguments"]["split"] == "train" and summary["arguments"]["text"] is True
    assert f"| TIA | all | {len(records)} | {len(records)} | 25.0 |" in done.stdout
    assert "Expect chance" not in done.stderr
    assert "Patient" not in done.stdout + done.stderr


def test_understanding_is_evaluated_on_simulated_patients(tmp_path, monkeypatch):
    load_phantom_case = synermed.load_phantom_case
    monkeypatch.setattr(synermed, "PROTOCOLS", {("whole-body", "autopet"): ("CT", "PET")})
    monkeypatch.setattr(synermed, "load_phantom_case", lambda record, *_: load_phantom_case(record, 12, 32))
    counts = []
    for config, difficulty in (("vqa", "hard"), ("cts", "hard"), ("cts", "easy")):
        output = tmp_path / f"{config}-{difficulty}"
        options = ["--phantom-cases", 2, "--limit", 3, "--no-text", "--seed", 1]
        done = run(
            "evaluate-understanding", "--output", output, "--config", config, "--difficulty", difficulty, *options
        )
        assert done.exit_code == 0, done.stderr
        records = read_lines(output / "cases.jsonl")
        assert len(records) == 3 and "text" not in records[0]
        assert {record["task"] for record in records} == {config.upper()}
        counts.append({record["difficulty"] for record in records})
    assert counts[1:] == [{"hard"}, {"easy"}]


def test_an_evaluation_that_was_interrupted_goes_on(evaluate, tmp_path, monkeypatch):
    evaluate("--no-text", output=tmp_path / "whole")
    answer_questions, asked = understanding.answer_questions, []

    def interrupted(model, processor, rows, *args, **kwargs):
        for number, record in enumerate(answer_questions(model, processor, rows, *args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield record

    def counted(model, processor, rows, *args, **kwargs):
        return answer_questions(model, processor, (asked.append(row) or row for row in rows), *args, **kwargs)

    monkeypatch.setattr(understanding, "answer_questions", interrupted)
    assert evaluate("--no-text").exit_code == 130
    cases = tmp_path / "scores" / "cases.jsonl"
    assert len(read_lines(cases)) == 3 and not (tmp_path / "scores" / "summary.json").exists()
    with open(cases, "a") as file:
        file.write('{"index": 12, "tas')  # as a process that was killed leaves it

    monkeypatch.setattr(understanding, "answer_questions", counted)
    done = evaluate("--no-text", "--batch-size", "2")  # no answer depends on it
    assert done.exit_code == 0
    whole = read_lines(tmp_path / "whole" / "cases.jsonl")
    assert len(asked) == len(whole) - 3
    for record, expected in zip(read_lines(cases), whole, strict=True):
        assert record["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
        assert {**record, "probabilities": None} == {**expected, "probabilities": None}
    assert evaluate("--no-text").exit_code == 0 and len(read_lines(cases)) == len(whole)


def test_an_evaluation_goes_on_with_a_larger_limit(evaluate, tmp_path):
    for limit in (2, 5):
        assert evaluate("--no-text", "--limit", limit).exit_code == 0
        assert len(read_lines(tmp_path / "scores" / "cases.jsonl")) == limit
        assert read_json(tmp_path / "scores" / "summary.json")["tasks"]["TIA"]["n"] == limit
    done = evaluate("--no-text", "--limit", 4)
    assert done.exit_code == 1 and "holds 5 answers already, more than --limit 4" in done.stderr


def test_answers_of_another_evaluation_stay(evaluate, tmp_path):
    evaluate("--no-text", "--limit", 2)
    before = contents(tmp_path / "scores")
    for arguments, says in (
        (["--no-text", "--split", "test"], "split 'train' (now 'test')"),
        (["--text"], "text False (now True)"),
        (["--no-text", "--dtype", "bfloat16"], "dtype 'float32' (now 'bfloat16')"),
    ):
        done = evaluate(*arguments)
        assert done.exit_code == 1 and says in done.stderr and "Choose another folder" in done.stderr
    assert contents(tmp_path / "scores") == before


def test_answers_of_other_weights_of_the_same_name_are_not_mixed(evaluate, tmp_path):
    model = Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))
    evaluate("--no-text", "--limit", 2, "--model", model)
    file = model / "model" / "model.safetensors"
    edit_tensors(file, **{"lm_head.weight": load(file.read_bytes())["lm_head.weight"] + 1})
    done = evaluate("--no-text", "--limit", 2, "--model", model)
    assert done.exit_code == 1 and "something else: checksum of the weights" in done.stderr


def test_weights_that_cannot_look_or_read_are_not_asked(evaluate, tmp_path):
    model = Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))
    edit_json(model / "model" / "config.json", missing_parts=["generation", "vision"])
    done = evaluate("--model", model)
    assert done.exit_code == 1 and "came without its vision weights: it cannot answer questions" in done.stderr
    assert not (tmp_path / "scores").exists()


def test_weights_without_a_part_that_only_synthesises_are_asked(evaluate, tmp_path):
    model = Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))
    shutil.rmtree(model / "vae")
    file = model / "model" / "model.safetensors"
    edit_tensors(file, **{name: None for name in load(file.read_bytes()) if "_moe_gen" in name})
    edit_json(model / "model" / "config.json", missing_parts=["generation"])
    for _ in range(2):  # what is missing is random, and different each time
        assert evaluate("--model", model, "--no-text", "--limit", 1).exit_code == 0


def test_weights_that_have_not_learned_it_are_asked_with_a_warning(evaluate, tmp_path):
    model = Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))
    edit_json(model / "model" / "config.json", trained_tasks=["MI"])
    done = evaluate("--model", model, "--no-text", "--limit", 1)
    assert done.exit_code == 0
    assert "Warning: these weights have not been trained on TIA. Expect chance." in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Pass either --data-dir or --phantom-cases"),
        (["--data-dir", "here", "--phantom-cases", 1], "Pass either --data-dir or --phantom-cases"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--phantom-cases", 1, "--split", "exam"], "exam"),
        (["--phantom-cases", 1, "--model", "nowhere/at-all/here"], "There is no folder nowhere/at-all/here"),
        (["--phantom-cases", 1, "--model", GOLDEN], "is not a SynerMedGen pipeline"),
    ],
)
def test_an_evaluation_that_cannot_be_says_so_before_anything_is_written(tmp_path, arguments, says):
    done = run("evaluate-understanding", "--output", tmp_path / "scores", *arguments)
    assert done.exit_code == 1 and says in done.stderr and done.stdout == ""
    assert not (tmp_path / "scores").exists()
