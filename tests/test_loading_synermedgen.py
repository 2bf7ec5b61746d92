"""Every tensor of a checkpoint is accounted for: what did not arrive is named, and nothing loads around it."""

import ast
import copy
import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from synermedgen_hf import SynerMedGenForConditionalGeneration, SynerMedGenModel, SynerMedGenPipeline
from synermedgen_hf.loading_synermedgen import (
    LoadReport,
    combine_digests,
    part_of,
    tensor_digest,
    weights_checksum,
)

ROUTES = ["brain/MRI-CT", "brain/CT-MRI"]
GENERATION = ["*_moe_gen*", "*vae2llm*", "*llm2vae*", "*time_embedder*"]
VISION = ["*vision_model*", "*connector*"]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "saved"


@pytest.fixture
def folder(pipe, saved_once, tmp_path):
    """A saved pipeline whose weights a test may spoil."""
    pipe.model.config.trained_routes, pipe.model.config.trained_tasks = ROUTES, ["MI"]
    if not saved_once.exists():
        pipe.save_pretrained(saved_once)
    return shutil.copytree(saved_once, tmp_path / "saved")


@pytest.fixture
def weights(folder):
    return folder / "model" / "model.safetensors"


@pytest.fixture
def vae_weights(folder):
    return folder / "vae" / "diffusion_pytorch_model.safetensors"


def rewrite(file, remove=(), **changed):
    """Take tensors out of a file of weights, or put others in."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in remove}
    save_file({**tensors, **changed}, file, metadata={"format": "pt"})


def names_in(file, part=None):
    return [name for name in load_file(file) if part is None or part_of(name) == part]


def load_model(folder, **options):
    return SynerMedGenForConditionalGeneration.from_pretrained(folder / "model", **options)


def load_pipe(folder, **options):
    pipe = SynerMedGenPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reports(caplog):
    """The tables that were printed, ours only."""
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Weights of ")]


def read_table(text):
    """`(first line, {part: {column: cell}})`"""
    first, header, *rows = text.splitlines()
    columns = header.split()
    cells = (re.split(r"\s{2,}", row.strip()) for row in rows)
    return first, {part: dict(zip(columns[1:], values, strict=True)) for part, *values in cells}


# ---------------------------------------------------------------------------------------------------------------------
# The report by itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vae.encoder.conv_in.weight", "autoencoder"),
        ("model.language_model.layers.0.self_attn.q_proj_moe_gen.weight", "generation"),
        ("model.language_model.norm_moe_gen.weight", "generation"),
        ("model.vae2llm.bias", "generation"),
        ("llm2vae.weight", "generation"),
        ("model.time_embedder.linear_1.weight", "generation"),
        ("model.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.connector.fc1.weight", "vision"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "understanding"),
        ("lm_head.weight", "understanding"),
    ],
)
def test_every_tensor_belongs_to_one_part(name, part):
    assert part_of(name) == part


def test_a_complete_report_raises_nothing():
    LoadReport("here", loaded=["a", "b"]).check()


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_error():
    report = LoadReport("here", missing=["lm_head.weight"], unexpected=["extra"], mismatched=[("norm", (3, 2), (4,))])
    with pytest.raises(ValueError) as error:
        report.check()
    message = str(error.value)
    assert message.startswith("here does not hold the weights of this model.")
    assert "1 missing: lm_head.weight;" in message
    assert "1 unexpected: extra;" in message
    assert "1 of another shape: norm (stored 3x2, the configuration says 4)." in message


def test_a_number_has_no_shape_to_show():
    with pytest.raises(ValueError, match=r"scale \(stored a number, the configuration says 2\)"):
        LoadReport("here", mismatched=[("scale", (), (2,))]).check()


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_long_lists_are_shortened_and_counted(kind):
    names = [f"layer.{i}" for i in range(11)]
    entries = [(name, (1,), (2,)) for name in names] if kind == "mismatched" else names
    with pytest.raises(ValueError) as error:
        LoadReport("here", **{kind: entries}).check()
    sentence = str(error.value).split(". ")[1]
    assert "11 " in sentence and sentence.count("layer.") == 8
    assert "layer.7" in sentence and sentence.endswith("and 3 more")


def test_allowed_tensors_raise_nothing():
    report = LoadReport("here", missing=["a.weight", "a.bias", "b"], unexpected=["c.0", "c.1"])
    report.check(allow_missing=["a.*", "b"], allow_unexpected=["c.?"])
    with pytest.raises(ValueError, match="Tensors 1 missing: b; 1 unexpected: c.1."):
        report.check(allow_missing=("a.*",), allow_unexpected=("c.0",))


def test_patterns_distinguish_upper_and_lower_case():
    with pytest.raises(ValueError, match="1 missing: LM_head"):
        LoadReport("here", missing=["LM_head"]).check(allow_missing=["lm_*"])


def test_another_shape_cannot_be_allowed_as_missing():
    with pytest.raises(ValueError, match="both from one place"):
        LoadReport("here", mismatched=[("a", (1,), (2,))]).check(allow_missing=["*"], allow_unexpected=["*"])


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llm2vae.bias", "Without its generation weights it cannot synthesise.*`identify` and `answer` remain"),
        ("model.connector.fc1.bias", "Without its vision weights.*`identify`, `answer` and synthesis.*unavailable"),
        ("lm_head.weight", "Without its understanding weights nothing works"),
        ("vae.encoder.conv_in.bias", "Without its autoencoder weights it cannot synthesise"),
    ],
)
def test_the_error_says_which_routes_and_functions_are_lost_and_what_to_do(name, lost):
    with pytest.raises(ValueError, match=lost) as error:
        LoadReport("here", missing=[name], routes=ROUTES).check()
    assert "(brain/MRI-CT, brain/CT-MRI)" in str(error.value)
    assert "convert-bagel --base" in str(error.value) and f"allow_missing=['{name}']" in str(error.value)


def advice(error, argument):
    """The list that an error says to pass."""
    return ast.literal_eval(re.search(rf"{argument}=(\[.*?\])\.", str(error.value))[1])


@pytest.mark.parametrize("part", ["generation", "vision"])
def test_following_the_advice_for_a_whole_part_lets_that_part_pass_and_no_other(model, part):
    missing = [name for name in model.state_dict() if part_of(name) == part]
    report = LoadReport("here", missing=missing)
    with pytest.raises(ValueError) as error:
        report.check()
    allowed = advice(error, "allow_missing")
    assert allowed == (GENERATION if part == "generation" else VISION)
    report.check(allow_missing=allowed)
    for other in (name for name in model.state_dict() if part_of(name) != part):
        with pytest.raises(ValueError, match=f"1 missing: {re.escape(other)}"):
            LoadReport("here", missing=[other]).check(allow_missing=allowed)


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_following_the_advice_for_a_few_names_lets_exactly_these_pass(kind):
    report = LoadReport("here", **{kind: ["lm_head.weight", "llm2vae.bias"]})
    with pytest.raises(ValueError) as error:
        report.check()
    allowed = advice(error, f"allow_{kind}")
    assert allowed == ["lm_head.weight", "llm2vae.bias"]
    report.check(**{f"allow_{kind}": allowed})


def test_the_advice_is_never_to_allow_everything(model):
    missing = [name for name in model.state_dict() if part_of(name) == "understanding"]
    with pytest.raises(ValueError) as error:
        LoadReport("here", missing=missing).check()
    assert "'*'" not in str(error.value)


def test_reports_add_up():
    model = LoadReport("here", ["a"], ["b"], ["c"], [("d", (1,), (2,))], ROUTES)
    vae = LoadReport("vae", ["vae.a"], ["vae.b"], ["vae.c"], [("vae.d", (1,), (2,))])
    both = LoadReport("there") + model + vae
    assert (both.source, both.loaded, both.missing) == ("there", ["a", "vae.a"], ["b", "vae.b"])
    assert (both.unexpected, [name for name, *_ in both.mismatched]) == (["c", "vae.c"], ["d", "vae.d"])
    assert both.routes == ROUTES
    assert both.missing_parts == ["autoencoder", "understanding"]


def test_the_table_counts_tensors_and_parameters_of_every_part(pipe):
    pipe.model.requires_grad_(False)
    for name, parameter in pipe.model.named_parameters():
        parameter.requires_grad_(part_of(name) == "generation")
    pipe.model.model.vision_model.to(torch.bfloat16)
    missing, mismatched = "model.connector.fc1.bias", ("model.connector.fc2.bias", (1,), (32,))
    own = list(pipe.model.state_dict())
    loaded = [name for name in own if name not in (missing, mismatched[0])]
    loaded += [f"vae.{name}" for name in pipe.vae.state_dict()]
    report = LoadReport("here", loaded, [missing], ["vae.extra"], [mismatched])

    first, rows = read_table(report.table({"": pipe.model, "vae.": pipe.vae}))
    assert re.fullmatch("Weights of here, sha256 [0-9a-f]{16}", first)
    assert list(rows) == ["understanding", "vision", "generation", "autoencoder"]
    for part, row in rows.items():
        assert row["loaded"] == str(sum(part_of(name) == part for name in loaded))
        assert row["missing"] == row["mismatched"] == str(int(part == "vision"))
        assert row["unexpected"] == str(int(part == "autoencoder"))
        assert row["dtype"] == ("bfloat16/float32" if part == "vision" else "float32")
        trained = part in ("generation", "autoencoder")
        assert row["trained" if trained else "frozen"] == row["parameters"] != "0"
        assert row["frozen" if trained else "trained"] == "0"
    sizes = [parameter.numel() for name, parameter in pipe.model.named_parameters() if part_of(name) == "generation"]
    assert rows["generation"]["parameters"] == f"{sum(sizes) / 1e6:.2f} M"


def test_the_table_stays_short_and_its_columns_align(pipe):
    table = LoadReport("here").table({"": pipe.model, "vae.": pipe.vae}).splitlines()
    assert len(table) == 6 and len({len(line) for line in table[1:]}) == 1
    assert max(map(len, table)) <= 120


def test_the_checksum_of_the_table_is_that_of_all_modules_together(pipe):
    names = {"": pipe.model, "vae.": pipe.vae}
    digests = {
        prefix + name: tensor_digest(prefix + name, tensor)
        for prefix, module in names.items()
        for name, tensor in module.state_dict().items()
    }
    table = LoadReport("here").table(names)
    assert f"sha256 {combine_digests(digests)[:16]}\n" in table
    assert "sha256 cafe\n" in LoadReport("here").table(names, checksum="cafe")


def test_the_table_of_weights_without_values_says_so(model):
    assert "sha256 none (quantised or offloaded)" in LoadReport("here").table({"": model.to("meta")})


# ---------------------------------------------------------------------------------------------------------------------
# Checksums
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checksum_does_not_depend_on_how_values_are_stored(model, folder):
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert weights_checksum(half) == weights_checksum(copy.deepcopy(half).float()) != weights_checksum(model)
    half.save_pretrained(folder / "model")
    as_half, as_float = (load_model(folder, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert as_half.dtype == torch.bfloat16 and as_float.dtype == torch.float32
    assert weights_checksum(as_half) == weights_checksum(as_float) == weights_checksum(half)


def test_a_checksum_is_64_digits_and_survives_saving(model, folder):
    assert re.fullmatch("[0-9a-f]{64}", weights_checksum(model))
    assert weights_checksum(load_model(folder)) == weights_checksum(model)


def change_one_value(layer):
    layer.weight[3, 2] += 1e-6


def swap_two_rows(layer):
    layer.weight[[0, 1]] = layer.weight[[1, 0]].clone()


def transpose(layer):
    layer.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)


def reshape(layer):
    layer.weight = nn.Parameter(layer.weight.reshape(2, 8), requires_grad=False)


@pytest.mark.parametrize("change", [change_one_value, swap_two_rows, transpose, reshape])
@torch.no_grad()
def test_a_checksum_notices(change):
    layer = nn.Linear(4, 4)
    before = weights_checksum(layer)
    change(layer)
    assert weights_checksum(layer) != before


def test_a_checksum_notices_a_tensor_under_another_name():
    layer = nn.Linear(4, 4)
    assert weights_checksum(nn.ModuleDict({"a": layer})) != weights_checksum(nn.ModuleDict({"b": layer}))
    assert weights_checksum(nn.ModuleDict({"a": layer})) == weights_checksum(layer, prefix="a.")


def test_a_checksum_does_not_depend_on_the_order_of_modules():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    one, other = nn.ModuleDict({"a": first, "b": second}), nn.ModuleDict()
    other.add_module("b", second)
    other.add_module("a", first)
    assert list(one.state_dict()) != list(other.state_dict())
    assert weights_checksum(one) == weights_checksum(other)


def test_a_checksum_does_not_depend_on_strides():
    layer, strided = nn.Linear(4, 6), nn.Linear(4, 6)
    strided.bias = layer.bias
    strided.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not strided.weight.is_contiguous()
    assert weights_checksum(strided) == weights_checksum(layer)


def test_a_checksum_in_pieces_is_that_of_the_whole(monkeypatch):
    layer = nn.Linear(7, 5).to(torch.bfloat16)
    whole = weights_checksum(layer)
    monkeypatch.setattr("synermedgen_hf.loading_synermedgen._PIECE", 3)
    assert weights_checksum(layer) == whole


@torch.no_grad()
def test_a_checksum_of_some_tensors_leaves_the_others_out():
    layer = nn.Linear(4, 4)
    weight, bias = weights_checksum(layer, ["weight"]), weights_checksum(layer, ["bias"])
    layer.bias += 1
    assert weights_checksum(layer, ["weight"]) == weight != weights_checksum(layer)
    assert weights_checksum(layer, ["bias"]) != bias


@torch.no_grad()
def test_a_checksum_counts_whole_numbers_and_buffers():
    norm = nn.BatchNorm1d(3)
    before = weights_checksum(norm)
    norm.num_batches_tracked += 1
    assert weights_checksum(norm) != before


def test_tensors_without_values_have_no_checksum():
    assert weights_checksum(nn.Linear(4, 4, device="meta")) is None
    half_there = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")})
    assert weights_checksum(half_there) is None


# ---------------------------------------------------------------------------------------------------------------------
# Models: missing, unexpected, misshapen
# ---------------------------------------------------------------------------------------------------------------------


def test_any_one_tensor_missing_from_the_model_is_caught_by_name(folder, weights):
    whole = load_file(weights)
    assert len(whole) > 90
    for name in whole:
        save_file({other: whole[other] for other in whole if other != name}, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"Tensors 1 missing: {re.escape(name)}\. "):
            load_model(folder)


def test_tensors_missing_from_the_autoencoder_are_caught_by_name(folder, vae_weights, pipe):
    whole = load_file(vae_weights)
    others = {name: getattr(pipe, name) for name in ("model", "processor", "scheduler")}
    for name in list(whole)[::5]:  # diffusers loads it, in one way for all: one in five is enough
        save_file({other: whole[other] for other in whole if other != name}, vae_weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"Tensors 1 missing: vae\.{re.escape(name)}\. "):
            load_pipe(folder, **others)


def test_a_tensor_missing_below_the_root_is_caught_from_the_root_too(folder, weights):
    rewrite(weights, remove=["lm_head.weight"])
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        load_pipe(folder)


def test_a_tensor_too_many_is_caught_by_name(folder, weights, vae_weights):
    rewrite(weights, **{"model.extra": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 unexpected: model\.extra.*allow_unexpected=\['model\.extra'\]"):
        load_model(folder)
    rewrite(vae_weights, **{"encoder.extra": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 unexpected: vae\.encoder\.extra\."):
        load_pipe(folder, allow_unexpected=["model.extra"])


def test_a_tensor_of_another_shape_is_shown_with_both_shapes(folder, weights, vae_weights):
    rewrite(weights, **{"lm_head.weight": torch.zeros(5, 32)})
    with pytest.raises(ValueError, match=r"lm_head\.weight \(stored 5x32, the configuration says 264x32\)"):
        load_model(folder)
    with pytest.raises(ValueError, match=r"lm_head\.weight \(stored 5x32, the configuration says 264x32\)"):
        load_pipe(folder, allow_missing=["*"])
    rewrite(vae_weights, **{"encoder.conv_in.weight": torch.zeros(8, 1, 3, 3)})
    with pytest.raises(ValueError, match=r"vae\.encoder\.conv_in\.weight \(stored 8x1x3x3, .* says 8x3x3x3\)"):
        load_pipe(folder, model=SynerMedGenForConditionalGeneration(load_config(folder)))


def load_config(folder):
    return SynerMedGenForConditionalGeneration.config_class.from_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 64}, r"71 of another shape: .*stored 16x32, the configuration says 16x64.* and 63 more"),
        ({"intermediate_size": 96}, r"mlp\.down_proj\.weight \(stored 32x48, the configuration says 32x96\)"),
        ({"num_hidden_layers": 3}, r"missing: model\.language_model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected: model\.language_model\.layers\.1\."),
        ({"vocab_size": 300}, r"lm_head\.weight \(stored 264x32, the configuration says 300x32\)"),
    ],
)
def test_config_and_weights_of_different_sizes_are_told_apart(folder, change, said):
    file = folder / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"].update(change)
    config["text_config"].pop("layer_types", None)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        load_model(folder)


def test_the_weights_of_another_autoencoder_are_told_apart(folder):
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latent_channels": 8}))
    with pytest.raises(ValueError, match=r"vae\.decoder\.conv_in\.weight \(stored 8x4x3x3, .* says 8x8x3x3\)"):
        load_pipe(folder)


def test_a_shape_may_differ_where_transformers_is_told_so(folder, weights):
    rewrite(weights, **{"lm_head.weight": torch.zeros(5, 32)})
    model = load_model(folder, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (264, 32)
    assert model.load_report.missing == ["lm_head.weight"] and model.config.missing_parts == ["understanding"]


def test_what_is_allowed_loads_and_the_report_keeps_it(folder, weights):
    rewrite(weights, remove=["llm2vae.bias"], **{"model.extra": torch.zeros(2), "other": torch.zeros(2)})
    model = load_model(folder, allow_missing=["llm2vae.*"], allow_unexpected=["model.ex*", "other"])
    assert model.load_report.missing == ["llm2vae.bias"]
    assert model.load_report.unexpected == ["model.extra", "other"]
    assert torch.isfinite(model.llm2vae.bias).all()
    assert len(model.load_report.loaded) == len(model.state_dict()) - 1


def test_allowing_one_name_allows_no_other(folder, weights):
    rewrite(weights, remove=["llm2vae.bias", "lm_head.weight"])
    with pytest.raises(ValueError, match=r"Tensors 1 missing: lm_head\.weight\. "):
        load_model(folder, allow_missing=["llm2vae.bias"])


def test_a_whole_checkpoint_reports_all_tensors_as_loaded(folder):
    pipe = load_pipe(folder)
    own = [*pipe.model.state_dict(), *(f"vae.{name}" for name in pipe.vae.state_dict())]
    assert pipe.load_report.loaded == own
    assert not (pipe.load_report.missing or pipe.load_report.unexpected or pipe.load_report.mismatched)
    assert pipe.model.config.missing_parts == []


def test_the_loading_info_of_transformers_is_still_to_be_had(folder):
    model, info = load_model(folder, output_loading_info=True)
    assert isinstance(model, SynerMedGenForConditionalGeneration)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_backbone_leaves_the_heads_out_and_nothing_else(folder, weights):
    backbone = SynerMedGenModel.from_pretrained(folder / "model")
    assert not backbone.load_report.unexpected and not backbone.load_report.missing
    rewrite(weights, remove=["model.vae2llm.bias"])
    with pytest.raises(ValueError, match="1 missing: vae2llm.bias"):
        SynerMedGenModel.from_pretrained(folder / "model")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints without a part
# ---------------------------------------------------------------------------------------------------------------------


def test_without_the_generation_expert_it_says_which_routes_and_functions_are_unavailable(folder, weights):
    rewrite(weights, remove=names_in(weights, "generation"))
    with pytest.raises(ValueError) as error:
        load_pipe(folder)
    message = str(error.value)
    assert "37 missing: llm2vae.bias, " in message and "and 29 more" in message
    assert "calling the pipeline is unavailable on every route (brain/MRI-CT, brain/CT-MRI)" in message
    assert "`identify` and `answer` remain" in message
    assert advice(error, "allow_missing") == GENERATION


def test_without_the_generation_expert_it_still_answers_but_refuses_to_synthesise(folder, weights, pipe, mr_slice):
    before = pipe.identify(mr_slice)
    rewrite(weights, remove=names_in(weights, "generation"))
    partial = load_pipe(folder, allow_missing=GENERATION)
    assert partial.model.config.missing_parts == ["generation"]
    assert partial.identify(mr_slice) == before
    assert partial.answer(mr_slice, "Which?", max_new_tokens=2) == pipe.answer(mr_slice, "Which?", max_new_tokens=2)
    with pytest.raises(ValueError, match="came without its generation weights: it cannot synthesise on any route"):
        partial(mr_slice, target="CT", source="MRI")


@pytest.mark.parametrize(
    ("removed", "allowed", "part"),
    [(None, VISION, "vision"), (["lm_head.weight"], ["lm_head.weight"], "understanding")],
)
def test_without_the_other_parts_nothing_is_answered_or_synthesised(folder, weights, mr_slice, removed, allowed, part):
    rewrite(weights, remove=removed or names_in(weights, part))
    partial = load_pipe(folder, allow_missing=allowed)
    assert partial.model.config.missing_parts == [part]
    with pytest.raises(ValueError, match=f"came without its {part} weights: it cannot synthesise on any route"):
        partial(mr_slice, target="CT", source="MRI")
    with pytest.raises(ValueError, match=f"came without its {part} weights, so it cannot identify a modality"):
        partial.identify(mr_slice)
    with pytest.raises(ValueError, match=f"came without its {part} weights, so it cannot answer questions"):
        partial.answer(mr_slice, "What is this?")


def test_missing_parts_survive_saving_so_random_numbers_are_never_taken_for_weights(folder, weights, mr_slice):
    rewrite(weights, remove=names_in(weights, "generation"))
    load_pipe(folder, allow_missing=GENERATION).save_pretrained(folder.parent / "again")
    with pytest.raises(ValueError, match="Without its generation weights"):
        load_pipe(folder.parent / "again")  # the random numbers are not stored, so they cannot count as loaded
    again = load_pipe(folder.parent / "again", allow_missing=GENERATION)
    assert again.model.config.missing_parts == ["generation"]
    with pytest.raises(ValueError, match="without its generation weights"):
        again(mr_slice, target="CT", source="MRI")


def test_missing_parts_add_up_over_several_loads(folder, weights):
    rewrite(weights, remove=names_in(weights, "generation"))
    load_model(folder, allow_missing=GENERATION).save_pretrained(folder / "model")
    rewrite(weights, remove=names_in(weights, "vision"))
    assert load_model(folder, allow_missing=[*GENERATION, *VISION]).config.missing_parts == ["generation", "vision"]


def test_one_pattern_may_be_given_as_it_is(folder, weights):
    rewrite(weights, remove=names_in(weights, "generation"))
    with pytest.raises(ValueError, match="Without its generation weights"):
        load_model(folder, allow_missing="*connector*")


def test_without_the_autoencoder_it_refuses_to_synthesise(folder, vae_weights, mr_slice):
    rewrite(vae_weights, remove=["encoder.conv_in.weight"])
    partial = load_pipe(folder, allow_missing=["vae.*"])
    with pytest.raises(ValueError, match="without its autoencoder weights"):
        partial(mr_slice, target="CT", source="MRI", num_inference_steps=1, guidance_scale=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files, pickle files
# ---------------------------------------------------------------------------------------------------------------------


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


def break_header(file):
    data = bytearray(file.read_bytes())
    data[200] ^= 0xFF
    file.write_bytes(data)


DAMAGES = {
    "empty": lambda file: cut(file, 0),
    "cut_in_the_length": lambda file: cut(file, 5),
    "cut_in_the_header": lambda file: cut(file, 100),
    "cut_in_the_values": lambda file: cut(file, -1),
    "longer_than_it_says": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "broken_header": break_header,
    "a_web_page": lambda file: file.write_text("<html>Sign in</html>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_model_is_refused_by_every_way_in(folder, weights, damage):
    DAMAGES[damage](weights)
    for load in (load_model, load_pipe, AutoModel.from_pretrained):
        with pytest.raises(OSError, match=f"^{re.escape(str(folder))}.*damaged or not complete.*Get it again"):
            load(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_autoencoder_is_refused(folder, vae_weights, damage):
    DAMAGES[damage](vae_weights)
    with pytest.raises(OSError, match="vae"):
        load_pipe(folder)


def test_a_damaged_file_of_the_autoencoder_is_called_damaged(folder, vae_weights):
    cut(vae_weights, -1)
    with pytest.raises(OSError, match="autoencoder's weights are damaged or not complete.*Get them again"):
        load_pipe(folder)


def test_a_missing_or_damaged_shard_is_caught(model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-8])
    with pytest.raises(OSError, match="damaged or not complete"):
        load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        load_model(tmp_path)
    shards[1].write_bytes(content)
    load_model(tmp_path)


def test_a_pickle_file_is_not_read_in_place_of_safetensors(folder, weights, vae_weights):
    for file, pickled in [(vae_weights, "diffusion_pytorch_model.bin"), (weights, "pytorch_model.bin")]:
        torch.save(load_file(file), file.with_name(pickled))
        file.unlink()
        with pytest.raises(OSError, match=f"{pickled} and no safetensors. Pickle files can run any code"):
            load_pipe(folder)
    with pytest.raises(OSError, match="Pickle files can run any code"):
        load_model(folder)


def test_a_pickle_file_is_not_read_even_when_asked_for(folder, weights):
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises((OSError, ValueError), match="pickle|safetensors"):
        load_model(folder, use_safetensors=False)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


def test_the_model_prints_one_table(folder, caplog):
    model = load_model(folder)
    (table,) = reports(caplog)
    first, rows = read_table(table)
    assert first.startswith(f"Weights of {folder / 'model'}, sha256 {weights_checksum(model)[:16]}")
    assert list(rows) == ["understanding", "vision", "generation"]
    assert sum(int(row["loaded"]) for row in rows.values()) == len(model.state_dict())


def test_the_pipeline_prints_one_table_for_model_and_autoencoder_together(folder, caplog):
    load_pipe(folder)
    (table,) = reports(caplog)
    first, rows = read_table(table)
    assert first.startswith(f"Weights of {folder}, ")
    assert list(rows) == ["understanding", "vision", "generation", "autoencoder"]


def test_the_table_goes_to_the_terminal_without_any_setup(folder, capfd, monkeypatch):
    # What Python does where nobody has configured logging; pytest has.
    monkeypatch.setattr(logging.root, "handlers", [])
    load_model(folder)
    printed = capfd.readouterr()
    assert printed.err.count("Weights of ") == 1 and not printed.out


def test_print_report_false_prints_nothing_and_keeps_the_report(folder, caplog):
    model, pipe = load_model(folder, print_report=False), load_pipe(folder, print_report=False)
    assert caplog.messages == []
    assert model.load_report.loaded and pipe.load_report.loaded


def test_only_the_first_of_several_processes_prints(folder, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_model(folder)
    load_pipe(folder)
    assert reports(caplog) == []
    monkeypatch.setenv("RANK", "0")
    load_model(folder)
    assert len(reports(caplog)) == 1


def test_the_table_shows_what_was_allowed(folder, weights, caplog):
    rewrite(weights, remove=["llm2vae.bias"], extra=torch.zeros(1))
    load_model(folder, allow_missing=["llm2vae.bias"], allow_unexpected=["extra"])
    _, rows = read_table(reports(caplog)[0])
    assert rows["generation"]["missing"] == "1" and rows["understanding"]["unexpected"] == "1"


def test_no_other_table_is_printed_beside_ours(folder, weights, vae_weights, caplog):
    rewrite(weights, remove=["llm2vae.bias"])
    rewrite(vae_weights, remove=["encoder.conv_in.bias"])
    load_pipe(folder, allow_missing=["llm2vae.bias", "vae.encoder.conv_in.bias"])
    assert caplog.messages == reports(caplog)
