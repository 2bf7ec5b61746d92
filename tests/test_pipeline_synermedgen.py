"""The pipeline: what comes out, that batches change nothing, and what is refused before any computing."""

import inspect
import re

import numpy as np
import pytest
import torch
from PIL import Image

from synermedgen_hf import SynerMedGenPipeline
from synermedgen_hf.pipeline_synermedgen import guide_velocity

QUICK = {"num_inference_steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 1.5, "seed": 7}


@pytest.fixture
def scans(mr_slice):
    """Three slices of one size and different content."""
    return [mr_slice, mr_slice[::-1].copy(), mr_slice[:, ::-1] * 0.5]


def hounsfield(pipe, image, **options):
    return pipe(image, **{"target": "CT", "source": "MRI", "output_type": "np", **QUICK, **options}).images


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


def test_arrays_are_float32_in_the_targets_units_on_the_inputs_grid(pipe, mr_slice):
    output = pipe(mr_slice, target="CT", source="MRI", region="brain", output_type="np", **QUICK)
    (image,), (record,) = output.images, output.records
    assert image.dtype == np.float32 and image.shape == mr_slice.shape
    assert -1024 <= image.min() < image.max() <= 3071
    assert record["unit"] == "HU" and record["seed"] == 7 and record["route"] == "MRI-CT"


def test_output_types_agree(pipe, mr_slice):
    (array,) = hounsfield(pipe, mr_slice)
    (tensor,) = hounsfield(pipe, mr_slice, output_type="pt")
    (picture,) = hounsfield(pipe, mr_slice, output_type="pil")
    (latent,) = hounsfield(pipe, mr_slice, output_type="latent")
    assert np.array_equal(tensor.numpy(), array)
    assert picture.size == (48, 40) and picture.mode == "L"
    assert np.abs(np.asarray(picture) - (array + 1024) / 4095 * 255).max() <= 0.51
    assert latent.shape == (4, 6, 6)  # 48 pixels squared, an eighth of it


def test_a_picture_is_the_default(pipe, mr_slice):
    assert isinstance(pipe(mr_slice, target="CT", source="MRI", **QUICK).images[0], Image.Image)


def test_return_dict_false_gives_a_tuple(pipe, mr_slice):
    images, records = pipe(mr_slice, target="CT", source="MRI", return_dict=False, **QUICK)
    assert len(images) == len(records) == 1


def test_pictures_paths_and_tensors_are_taken_too(pipe, mr_slice, tmp_path):
    levels = (mr_slice / mr_slice.max() * 60000).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "slice.png")
    (from_picture,) = hounsfield(pipe, Image.fromarray(levels))
    (from_path,) = hounsfield(pipe, str(tmp_path / "slice.png"))
    (from_tensor,) = hounsfield(pipe, torch.from_numpy(levels.astype(np.float32)))
    assert np.array_equal(from_picture, from_path)
    np.testing.assert_allclose(from_picture, from_tensor, atol=0.01)  # of 4095 HU


def test_sixteen_bit_levels_are_not_clipped_to_eight(pipe, mr_slice):
    levels = (mr_slice / mr_slice.max() * 60000).astype(np.uint16)
    clipped = np.minimum(levels, 255).astype(np.uint8)
    assert not np.allclose(*hounsfield(pipe, [Image.fromarray(levels), Image.fromarray(clipped)]), atol=1.0)


def test_one_case_seen_by_two_modalities(pipe, mr_slice):
    case = {"T1": mr_slice, "T2": mr_slice.max() - mr_slice}
    both = pipe(case, target="FLAIR", output_type="np", **QUICK)
    one = pipe(case["T1"], source="T1", target="FLAIR", output_type="np", **QUICK)
    assert both.records[0]["route"] == "T1+T2-FLAIR"
    assert both.images[0].shape == mr_slice.shape and not np.allclose(both.images[0], one.images[0])


def test_a_batch_of_dicts_equals_single_dicts(pipe, scans):
    cases = [{"T1": scan, "T2": scan.max() - scan} for scan in scans]
    batch = pipe(cases, target="FLAIR", output_type="np", **QUICK).images
    single = [pipe(case, target="FLAIR", output_type="np", **QUICK).images[0] for case in cases]
    np.testing.assert_allclose(batch, single, atol=0.05)  # of 1000 arbitrary units


def test_each_slice_may_have_the_window_of_its_volume(pipe, scans):
    windows = [(0.0, 900.0), (0.0, 1200.0), (0.0, 500.0)]
    batch = hounsfield(pipe, scans, window=windows, output_type="latent")
    for latent, scan, window in zip(batch, scans, windows, strict=True):
        (alone,) = hounsfield(pipe, scan, window=window, output_type="latent")
        torch.testing.assert_close(latent, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(batch[0], hounsfield(pipe, scans[0], output_type="latent")[0])


def test_each_modality_may_have_its_own_window(pipe, mr_slice):
    case = {"T1": mr_slice, "T2": 3 * mr_slice}
    scaled = {"T1": 2 * mr_slice, "T2": mr_slice}
    one = pipe(case, "FLAIR", window={"T1": (0, 900), "T2": (0, 2700)}, output_type="latent", **QUICK).images[0]
    other = pipe(scaled, "FLAIR", window={"T1": (0, 1800), "T2": (0, 900)}, output_type="latent", **QUICK).images[0]
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_prompt_replaces_the_instruction(pipe, mr_slice):
    (usual,) = hounsfield(pipe, mr_slice)
    (same,) = hounsfield(pipe, mr_slice, prompt="Synthesise the CT image from the MRI image.")
    (other,) = hounsfield(pipe, mr_slice, prompt="Something else.")
    assert np.array_equal(usual, same) and not np.array_equal(usual, other)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and seeds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_of_three_equals_three_single_calls(pipe, scans, guidance):
    options = {"guidance_scale": guidance, "output_type": "latent"}
    batch = torch.stack(hounsfield(pipe, scans, **options))
    single = torch.stack([hounsfield(pipe, scan, **options)[0] for scan in scans])
    assert (batch[0] - batch[1]).abs().max() > 1e-3
    torch.testing.assert_close(batch, single, atol=1e-4, rtol=1e-4)


def test_slices_of_different_sizes_in_one_call(pipe, scans):
    mixed = [scans[0], scans[1][:, :24], scans[2]]
    batch = hounsfield(pipe, mixed)
    assert [image.shape for image in batch] == [scan.shape for scan in mixed]
    for image, scan in zip(batch, mixed, strict=True):
        np.testing.assert_allclose(image, hounsfield(pipe, scan)[0], atol=0.2)  # of 4095 HU


def test_the_same_seed_gives_the_same_picture(pipe, mr_slice):
    first, again = hounsfield(pipe, mr_slice), hounsfield(pipe, mr_slice)
    assert np.array_equal(first, again)
    assert not np.allclose(first, hounsfield(pipe, mr_slice, seed=8))


def test_a_generator_instead_of_a_seed(pipe, mr_slice):
    generator = torch.Generator().manual_seed(7)
    assert np.array_equal(hounsfield(pipe, mr_slice), hounsfield(pipe, mr_slice, seed=None, generator=generator))


def test_repetitions_use_the_seeds_that_follow(pipe, scans):
    repeated = hounsfield(pipe, scans[:2], num_images_per_prompt=2, output_type="latent")
    assert len(repeated) == 4
    for latent, scan, seed in zip(repeated, [scans[0], scans[0], scans[1], scans[1]], [7, 8, 7, 8], strict=True):
        (alone,) = hounsfield(pipe, scan, seed=seed, output_type="latent")
        torch.testing.assert_close(latent, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(repeated[2], repeated[3])
    assert [r["seed"] for r in pipe(scans[:2], "CT", "MRI", num_images_per_prompt=2, **QUICK).records] == [7, 8, 7, 8]


def test_one_seed_per_case(pipe, scans):
    batch = hounsfield(pipe, scans[:2], seed=[3, 4], output_type="latent")
    alone = hounsfield(pipe, scans[1], seed=4, output_type="latent")
    torch.testing.assert_close(batch[1], alone[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def test_timestep_shift_holds_for_one_call_only(pipe, mr_slice):
    before = hounsfield(pipe, mr_slice)
    shifted = hounsfield(pipe, mr_slice, timestep_shift=1.0)
    assert not np.allclose(before, shifted)
    assert np.array_equal(before, hounsfield(pipe, mr_slice))


def test_the_callback_sees_every_step_and_may_change_the_latents(pipe, mr_slice):
    seen = []

    def stop_at_zero(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    (latent,) = hounsfield(pipe, mr_slice, output_type="latent", callback_on_step_end=stop_at_zero)
    assert [step for step, *_ in seen] == [0, 1] and seen[0][1] > seen[1][1]
    assert seen[0][2] == (1, 9, 16)
    assert (latent == 0).all()


def test_guidance_outside_its_interval_is_no_guidance(pipe, mr_slice):
    none = hounsfield(pipe, mr_slice, guidance_scale=1.0)
    # Two steps lie at timesteps 1 and 0.75 (shift 3).
    outside = hounsfield(pipe, mr_slice, guidance_interval=(0.0, 0.7))
    inside = hounsfield(pipe, mr_slice, guidance_interval=(0.7, 1.0))
    assert np.array_equal(none, outside) and not np.allclose(none, inside)


def test_a_timestep_on_the_lower_end_of_the_interval_is_not_guided(pipe, mr_slice):
    # Five steps without shift lie at 1, 0.8, 0.6, 0.4, 0.2, and 0.4 is a little more than that in float32.
    options = {"num_inference_steps": 5, "timestep_shift": 1.0}
    on_it = hounsfield(pipe, mr_slice, guidance_interval=(0.4, 1.0), **options)
    assert np.array_equal(on_it, hounsfield(pipe, mr_slice, guidance_interval=(0.5, 1.0), **options))
    assert not np.allclose(on_it, hounsfield(pipe, mr_slice, guidance_interval=(0.3, 1.0), **options))


def test_image_guidance_alone_does_nothing(pipe, mr_slice):
    options = {"guidance_scale": 1.0}
    assert np.array_equal(
        hounsfield(pipe, mr_slice, image_guidance_scale=3.0, **options),
        hounsfield(pipe, mr_slice, image_guidance_scale=1.0, **options),
    )


def test_the_context_is_prefilled_once_and_branches_run_together(pipe, mr_slice):
    calls = []
    handle = pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs["use_cache"], len(kwargs["input_ids"]))), with_kwargs=True
    )
    hounsfield(pipe, [mr_slice] * 2, num_inference_steps=3)
    handle.remove()
    # Both slices with text, the text alone, then three steps of 2 slices x 3 branches.
    assert calls == [(True, 2), (True, 1), (False, 6), (False, 6), (False, 6)]


def test_rescaled_guidance_never_grows_the_velocity():
    torch.manual_seed(0)
    full, no_text, no_image = torch.randn(3, 2, 5, 4)
    for mode, dims in (("global", (1, 2)), ("channel", 2), ("text_channel", 2)):
        # Image guidance comes after the rescaling of "text_channel", so it is left out there.
        guided = guide_velocity(full, no_text, no_image, 4.0, 1.0 if mode == "text_channel" else 2.0, mode)
        assert (guided.norm(dim=dims) <= full.norm(dim=dims) + 1e-5).all()
    off = guide_velocity(full, no_text, no_image, 4.0, 2.0, "global", rescale_min=1.0)
    torch.testing.assert_close(off, no_image + 2 * (no_text + 4 * (full - no_text) - no_image))


# ---------------------------------------------------------------------------------------------------------------------
# Saving, precision
# ---------------------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip_is_array_equal(pipe, mr_slice, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SynerMedGenPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(hounsfield(pipe, mr_slice), hounsfield(loaded, mr_slice))
    assert {path.suffix for path in tmp_path.rglob("*.*") if path.stat().st_size > 100_000} <= {".safetensors"}


def test_parts_that_do_not_fit_together_are_refused(pipe):
    pipe.processor.image_processor.latent_stride = 32
    try:
        with pytest.raises(ValueError, match="does not fit.*'latent_stride': 32.*'latent_stride': 16"):
            SynerMedGenPipeline(pipe.model, pipe.processor, pipe.vae, pipe.scheduler)
    finally:
        pipe.processor.image_processor.latent_stride = 16


def test_no_path_of_the_machine_is_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "here")
    SynerMedGenPipeline.from_pretrained(tmp_path / "here").save_pretrained(tmp_path / "there")
    texts = [path.read_text() for path in (tmp_path / "there").rglob("*.json")]
    assert texts and not any(str(tmp_path) in text for text in texts)


def test_a_notice_is_said_when_loading(pipe, tmp_path, caplog):
    pipe.model.config.notice = "Trained on a toy."
    pipe.save_pretrained(tmp_path)
    SynerMedGenPipeline.from_pretrained(tmp_path)
    assert "Trained on a toy." in caplog.messages


def test_a_component_of_ones_own_replaces_the_stored_one(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert SynerMedGenPipeline.from_pretrained(tmp_path, vae=pipe.vae).vae is pipe.vae


def test_bfloat16_runs_and_lies_near_float32(pipe, mr_slice, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = SynerMedGenPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.model.dtype == half.vae.dtype == torch.bfloat16
    exact, rough = hounsfield(pipe, mr_slice)[0], hounsfield(half, mr_slice)[0]
    assert rough.dtype == np.float32
    assert np.abs(exact - rough).mean() < 0.1 * (exact.max() - exact.min())


def test_every_argument_is_documented():
    described = "".join(
        line for line in SynerMedGenPipeline.__call__.__doc__.splitlines() if line.rstrip().endswith(":")
    )
    names = set(inspect.signature(SynerMedGenPipeline.__call__).parameters) - {"self"}
    assert [name for name in names if not re.search(rf"\b{name}\b", described)] == []


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: a clear error, before the model runs once
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def idle(pipe):
    """A pipeline whose networks must not be run, trained for two routes."""

    def refuse(*args):
        raise AssertionError("computing began before the input was checked")

    pipe.model.config.trained_routes = ["brain/MRI-CT", "pelvis/CBCT-CT"]
    pipe.model.register_forward_pre_hook(refuse)
    pipe.vae.encoder.register_forward_pre_hook(refuse)
    return pipe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "Xray"}, "Unknown target 'Xray'.*T1, T1CE"),
        ({"target": ["CT"]}, "Unknown target"),
        ({"source": ["T1", "T2"]}, "Unknown source"),
        ({"prompt": ["a", "b"]}, "prompt must be one text"),
        ({"target": "MRI"}, "both MRI: there is nothing to synthesise"),
        ({"source": "T1"}, "not trained for T1 to CT.*trained for: brain/MRI-CT"),
        ({"source": "mr"}, "Unknown source 'mr'"),
        ({"region": "pelvis"}, "not trained for MRI to CT of the pelvis"),
        ({"region": "knee"}, "Unknown region 'knee'.*brain, pelvis"),
        ({"source": None}, "Say which modality.*source='MRI'"),
        ({"num_inference_steps": -5}, "num_inference_steps must be a whole number of at least 1, got -5"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"image_guidance_scale": -1}, "image_guidance_scale must be a number"),
        ({"guidance_interval": (0.9, 0.2)}, r"0 <= low < high <= 1, got \(0.9, 0.2\)"),
        ({"guidance_interval": None}, "guidance_interval must be"),
        ({"guidance_interval": (0.2,)}, "guidance_interval must be"),
        ({"timestep_shift": float("nan")}, "timestep_shift must be positive"),
        ({"seed": 1.5}, "seed must be a whole number, or a list with one per case, got 1.5"),
        ({"seed": None, "generator": 3}, "must be a torch.Generator"),
        ({"window": (5, 5)}, r"window of MRI must be \(low, high\)"),
        ({"window": {"T1": (0, 5)}}, "a window for T1, but the case holds MRI"),
        ({"window": [(0, 5), (0, 6)]}, "2 windows for 1 cases"),
        ({"guidance_rescale": "local"}, "Unknown guidance_rescale 'local'.*text_channel"),
        ({"guidance_rescale_min": 2}, "guidance_rescale_min must be within"),
        ({"timestep_shift": 0}, "timestep_shift must be positive"),
        ({"output_type": "nifti"}, "Unknown output_type 'nifti'"),
        ({"seed": [1, 2]}, "2 seeds for 1 cases"),
        ({"generator": torch.Generator()}, "either seed or generator"),
    ],
)
def test_a_bad_argument_is_refused(idle, mr_slice, options, words):
    with pytest.raises(ValueError, match=words):
        hounsfield(idle, mr_slice, **options)


def colour_photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def with_values(*values):
    image = np.ones((32, 32), np.float32)
    image.flat[: len(values)] = values
    return image


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (colour_photograph(), "colour picture"),
        (np.ones((32, 32), bool), "boolean array: that is a mask"),
        (np.ones((0, 32), np.float32), "empty array"),
        (with_values(np.nan, np.nan, np.inf), "2 NaN and 1 infinite values of 1024"),
        (np.ones((32, 32, 32), np.float32), r"shape \(32, 32, 32\): pass one slice"),
        (np.ones((32, 32, 3), np.float32), "colour picture or several: a scan slice is grey"),
        (np.ones((4, 4), np.float32), "at least 8 pixels"),
        (np.ones((300, 300), np.float32), "300x300 pixels.*position table"),
        ([], "empty list"),
        ({"MRI": np.ones((32, 32), np.float32)}, "leave `source` out"),
        ([np.ones((32, 32), np.float32), {"MRI": np.ones((32, 32), np.float32)}], "mixes dicts and images"),
        (object(), "Expected a PIL image, a path, an array or a tensor, got object"),
        ([with_values(1.0), with_values(np.nan)], "1 NaN"),
    ],
)
def test_a_bad_image_is_refused(idle, image, words):
    with pytest.raises(ValueError, match=words):
        hounsfield(idle, image)


def test_an_unreadable_path_is_refused(idle, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*absent.png"):
        hounsfield(idle, tmp_path / "absent.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    with pytest.raises(ValueError, match="broken.png cannot be read as a picture"):
        hounsfield(idle, tmp_path / "broken.png")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"T1": np.ones((32, 32), np.float32), "T2": np.ones((32, 40), np.float32)}, "different grids"),
        ({"T1": [np.ones((32, 32), np.float32)] * 2}, "pass a list of dicts"),
        ({"T1": np.ones((32, 32), np.float32), "FLAIR": np.ones((32, 32), np.float32)}, "nothing to synthesise"),
        ([{"T1": np.ones((32, 32), np.float32)}, {"T2": np.ones((32, 32), np.float32)}], "same modalities"),
        ({}, "same modalities"),
    ],
)
def test_a_wrong_dict_is_refused(idle, case, words):
    idle.model.config.trained_routes = []
    with pytest.raises(ValueError, match=words):
        idle(case, target="FLAIR", **QUICK)


# ---------------------------------------------------------------------------------------------------------------------
# Understanding
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_that_have_not_learned_to_understand_say_so(idle, mr_slice):
    with pytest.raises(ValueError, match="cannot identify a modality.*Stage I"):
        idle.identify(mr_slice)
    with pytest.raises(ValueError, match="cannot answer questions.*Stage I"):
        idle.answer(mr_slice, "Which modality is this image?")


@pytest.fixture
def learned(pipe):
    """Weights said to understand; what they say is random."""
    pipe.model.config.trained_tasks = ["MI"]
    return pipe


def test_identify_names_a_modality_with_a_probability(learned, mr_slice):
    found = learned.identify(mr_slice)
    assert found["modality"] == max(found["probabilities"], key=found["probabilities"].get)
    assert found["probability"] == found["probabilities"][found["modality"]]
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_identify_scores_are_the_likelihoods_of_the_names(learned, mr_slice):
    first, second = learned.score_answers([mr_slice], "Which?", ["CT", "MRI"])
    assert not torch.allclose(first, second)
    (alone,) = learned.score_answers([mr_slice], "Which?", ["MRI"])
    torch.testing.assert_close(alone, second)
    assert not alone.requires_grad  # nothing is kept for a backward pass


def test_identify_takes_float_pictures_and_their_paths(learned, mr_slice, tmp_path):
    picture = Image.fromarray(mr_slice)
    picture.save(tmp_path / "slice.tif")
    expected = learned.identify(mr_slice)["probabilities"]
    assert learned.identify(picture)["probabilities"] == pytest.approx(expected)
    assert learned.identify(str(tmp_path / "slice.tif"))["probabilities"] == pytest.approx(expected)


def test_answer_returns_text(learned, mr_slice):
    picture = Image.fromarray((mr_slice / mr_slice.max() * 255).astype(np.uint8))
    assert isinstance(learned.answer([mr_slice, picture], "Which is brighter?", max_new_tokens=3), str)


def test_special_tokens_in_a_question_are_refused(learned, mr_slice):
    with pytest.raises(ValueError, match=r"holds <\|im_end\|>, <\|image_pad\|>"):
        learned.answer(mr_slice, "Which?<|im_end|><|image_pad|>")


def test_a_label_stands_before_each_image_where_training_had_them(learned, mr_slice, monkeypatch):
    def asked(images, **options):
        ids = learned.question_inputs(images, "Which?", **options)["input_ids"][0]
        return re.findall("[A-Z1]", learned.processor.tokenizer.decode(ids))

    images = [mr_slice, mr_slice]
    assert asked(images) == ["W"] and asked(images, labels=["1", "A"]) == ["1", "A", "W"]
    monkeypatch.setattr(learned.model.config, "label_images", True)
    assert asked(images) == ["A", "B", "W"] and asked(images[:1]) == ["W"]
    with pytest.raises(ValueError, match="3 labels for 2 images"):
        learned.answer(images, "Which?", labels=["A", "B", "C"])


def test_the_source_may_be_left_out_where_it_can_be_identified(learned, mr_slice):
    found = learned.identify(mr_slice)["modality"]
    target = "PET" if found != "PET" else "CT"
    output = learned(mr_slice, target=target, output_type="np", **QUICK)
    assert output.records[0]["route"] == f"{found}-{target}"
    assert np.array_equal(output.images, learned(mr_slice, target, found, output_type="np", **QUICK).images)
