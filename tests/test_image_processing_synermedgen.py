"""The image processor: every way in has an exact way back, and what is no slice is refused in words."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synermedgen_hf.image_processing_synermedgen import (
    SynerMedGenImageProcessor,
    from_channels,
    load_slice,
    patchify,
    picture_pixels,
    resize_shape,
    set_codec,
    square_padding,
    to_channels,
    to_display,
    unpatchify,
)

GOLDEN = Path(__file__).parent / "parity" / "golden_a"
MODALITIES = ["CT", "CBCT", "PET", "MRI", "T1", "T1CE", "T2", "FLAIR"]


@pytest.fixture
def processor():
    return SynerMedGenImageProcessor()


@pytest.fixture
def random():
    return np.random.default_rng(0)


def smooth_slice(height, width, low=-1000.0, high=1500.0):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    wave = np.sin(x / width * 5) * np.cos(y / height * 4)
    return (low + (high - low) * (wave + 1) / 2).astype(np.float32)


# ---- the size rule and the patches ----


@pytest.mark.parametrize("setting", json.loads((GOLDEN / "transforms.json").read_text()), ids=lambda s: s["name"])
def test_resize_shape_is_bagels_on_every_row(setting):
    rule = {key: setting[key] for key in ("max_size", "min_size", "stride", "max_pixels")}
    rows = setting["rows_in_w_in_h_out_w_out_h"]
    ours = [resize_shape(height, width, **rule, num_images=setting["img_num"]) for width, height, _, _ in rows]
    assert ours == [(height, width) for _, _, width, height in rows]


@pytest.mark.skipif(not (GOLDEN / "cases.safetensors").exists(), reason="needs the golden cases")
def test_picture_pixels_are_bagels():
    from safetensors.torch import load_file

    cases = load_file(GOLDEN / "cases.safetensors")
    options = json.loads((GOLDEN / "cases.json").read_text())["e2e"]
    vae_size = {**options["vae_transform"], "max_pixels": 1806336}
    vit_size = {**options["vit_transform"], "max_pixels": 1806336}
    resized = Image.fromarray(cases["e2e.resized_uint8"].numpy())
    torch.testing.assert_close(picture_pixels(resized, vae_size), cases["e2e.vae_input"], rtol=0, atol=1e-6)
    torch.testing.assert_close(picture_pixels(resized, vit_size), cases["e2e.vit_input"], rtol=0, atol=1e-6)


def test_patchify_has_the_channel_fastest_and_unpatchify_is_its_inverse():
    image = torch.arange(3 * 4 * 6).reshape(3, 4, 6)
    tokens = patchify(image, 2)
    assert tokens.shape == (6, 12)
    assert tokens[0, :3].tolist() == image[:, 0, 0].tolist()  # one pixel, three channels
    assert tokens[0, 3:6].tolist() == image[:, 0, 1].tolist()  # then the next column
    assert tokens[1, :3].tolist() == image[:, 0, 2].tolist()  # the next patch lies to the right
    assert torch.equal(unpatchify(tokens, (2, 3), 2), image)
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(image, 4)


# ---- intensities ----


@pytest.mark.parametrize("modality", MODALITIES)
def test_intensity_round_trip(processor, random, modality):
    low, high = {"CT": (-1024, 3071), "CBCT": (-1024, 3071), "PET": (0, 20)}.get(modality, (0, 1800))
    values = random.uniform(low, high, (64, 48)).astype(np.float32)
    encoded, record = processor.encode_intensity(values, modality, window=(low, high))
    assert encoded.dtype == np.float32 and -1 <= encoded.min() and encoded.max() <= 1
    assert json.loads(json.dumps(record)) == record  # a record can be stored beside the image
    np.testing.assert_allclose(processor.decode_intensity(encoded, record), values, atol=(high - low) * 1e-7)


def test_ct_window_is_fixed_and_clips(processor):
    encoded, record = processor.encode_intensity(np.float32([[-3000, -1024, 3071, 9000]]), "CT")
    assert encoded.tolist() == [[-1, -1, 1, 1]]
    assert record == {"modality": "CT", "unit": "HU", "low": -1024.0, "high": 3071.0, "scale": "linear"}


def test_mr_window_is_the_percentile_of_the_foreground(processor, random):
    volume = np.zeros((20, 32, 32), np.float32)
    volume[:, 8:24, 8:24] = random.uniform(1, 500, (20, 16, 16))
    window = processor.intensity_window(volume, "T1")
    assert window == (0.0, pytest.approx(np.percentile(volume[volume > 0], 99.5)))
    _, record = processor.encode_intensity(volume[3], "T1", window)
    assert (record["low"], record["high"], record["unit"]) == (*window, "a.u.")


def test_empty_mr_slice_falls_back_to_the_reference(processor):
    encoded, record = processor.encode_intensity(np.zeros((16, 16), np.float32), "T2")
    assert record["high"] == 1000.0 and (encoded == -1).all()


def test_asinh_spreads_the_low_uptake_and_is_inverted(random):
    pet = {"unit": "SUV", "low": 0.0, "high": 20.0, "scale": "asinh"}
    processor = SynerMedGenImageProcessor(intensity={**SynerMedGenImageProcessor.intensity, "PET": pet})
    suv = random.uniform(0, 20, (32, 32)).astype(np.float32)
    encoded, record = processor.encode_intensity(suv, "PET")
    np.testing.assert_allclose(encoded, 2 * np.arcsinh(suv) / np.arcsinh(20) - 1, atol=1e-6)
    np.testing.assert_allclose(processor.decode_intensity(encoded, record), suv, atol=1e-5)


def test_target_record(processor):
    assert processor.target_record("CT")["unit"] == "HU"
    assert processor.target_record("T2") == {
        "modality": "T2", "unit": "a.u.", "low": 0.0, "high": 1000.0, "scale": "linear"
    }  # fmt: skip
    assert processor.target_record("T2", (0, 640))["high"] == 640.0
    assert processor.target_record("T2", processor.target_record("T2", (0, 640)))["high"] == 640.0


def test_intensity_refusals(processor):
    with pytest.raises(ValueError, match="Unknown modality 'ct'.*CBCT, CT"):
        processor.encode_intensity(np.zeros((8, 8)), "ct")
    with pytest.raises(ValueError, match="needs its modality"):
        processor.encode_intensity(np.zeros((8, 8)), None)
    with pytest.raises(ValueError, match="window .* is empty"):
        processor.encode_intensity(np.zeros((8, 8)), "CT", window=(5, 5))
    with pytest.raises(ValueError, match="scale must be"):
        SynerMedGenImageProcessor(intensity={"CT": {"unit": "HU", "low": 0, "high": 1, "scale": "log"}})
    with pytest.raises(ValueError, match="needs 'high'"):
        SynerMedGenImageProcessor(intensity={"CT": {"unit": "HU", "low": 0, "scale": "linear"}})


# ---- bands: one scanner value over three channels ----


@pytest.fixture
def banded():
    return SynerMedGenImageProcessor(intensity=set_codec(SynerMedGenImageProcessor.intensity, "bands"))


def asinh_pet(codec):
    pet = {"unit": "SUV", "low": 0.0, "high": 20.0, "scale": "asinh", "softening": 1.0}
    return SynerMedGenImageProcessor(intensity=set_codec({**SynerMedGenImageProcessor.intensity, "PET": pet}, codec))


def test_bands_are_windows_of_the_same_slice(banded):
    hounsfield = np.float32([[-1024, -160, 40, 240, 850, 3071]])
    encoded, record = banded.encode_intensity(hounsfield, "CT")
    assert record["bands"] == [[-160.0, 240.0], [200.0, 1500.0]] and json.loads(json.dumps(record)) == record
    whole, soft, bone = to_channels(encoded, record)
    assert np.array_equal(whole, encoded[0:1])
    np.testing.assert_allclose(soft, [[-1, -1, 0, 1, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(bone, [[-1, -1, -1, -1 + 2 * 40 / 1300, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("make", [lambda: asinh_pet("bands"), lambda: asinh_pet("plain")], ids=["bands", "plain"])
def test_channels_that_agree_give_back_what_went_in(make, modality):
    processor = make()
    record = processor.target_record(modality)
    values = np.linspace(record["low"], record["high"], 100_000, dtype=np.float32)[None]
    encoded, _ = processor.encode_intensity(values, modality, (record["low"], record["high"]))
    back = processor.decode_intensity(from_channels(to_channels(encoded, record), record), record)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, values, atol=(record["high"] - record["low"]) * 3e-7)


def test_fused_values_change_without_a_jump(banded):
    record = banded.target_record("CT")
    whole, others = np.linspace(-1, 1, 200_001), np.linspace(-1, 1, 9)
    for soft in others:
        for bone in others:
            channels = np.stack([whole[None], np.full((1, 200_001), soft), np.full((1, 200_001), bone)])
            # A step of 1e-5 moves the answer by a limited factor, also where channels contradict one another; a jump
            # would be of the size of a band.
            assert np.abs(np.diff(from_channels(channels, record))).max() < 2e-3


def test_equal_errors_count_for_less_in_a_band(banded, random):
    hounsfield = random.uniform(-100, 180, (64, 64)).astype(np.float32)
    encoded, record = banded.encode_intensity(hounsfield, "CT")
    noise = 0.01 * random.standard_normal((3, 64, 64)).astype(np.float32)

    def error(record):
        fused = from_channels(to_channels(encoded, record) + noise, record)
        return np.abs(banded.decode_intensity(fused, record) - hounsfield).mean()

    plain = {key: value for key, value in record.items() if key != "bands"}
    assert error(plain) > 8 and error(record) < 2  # HU


@pytest.mark.parametrize("value", [-1000, -500, -250, 2000])
def test_a_band_has_no_say_outside_of_it(banded, value):
    encoded, record = banded.encode_intensity(np.full((1, 1), value, np.float32), "CT")
    channels = to_channels(encoded, record)
    channels[1:] += np.where(channels[1:] < 0, 0.1, -0.1)  # saturated, as a VAE gives it back: not quite
    fused = banded.decode_intensity(from_channels(channels, record), record)
    assert fused[0, 0] == pytest.approx(value, abs=25)  # HU; the bands alone would say -140 or 1435


def test_a_window_of_the_user_moves_the_bands_along(banded):
    record = banded.encode_intensity(np.zeros((8, 8)), "CBCT", window=(0, 4095))[1]  # counts from 0 instead of -1024
    np.testing.assert_allclose(record["bands"], [[864, 1264], [1224, 2524]])
    narrow = banded.encode_intensity(np.float32([[-100, 0, 50, 100]]), "CT", window=(-100, 100))
    back = banded.decode_intensity(from_channels(to_channels(*narrow), narrow[1]), narrow[1])
    np.testing.assert_allclose(back, [[-100, 0, 50, 100]], atol=1e-4)
    assert "bands" not in banded.encode_intensity(np.zeros((8, 8)), None, window=(0, 1))[1]


def test_padding_is_the_low_end_of_every_channel(banded):
    inputs = banded.preprocess_slice(np.full((256, 512), 1000, np.float32), "CT")
    assert (inputs.vae_pixels[:, :128] == -1).all() and (inputs.vae_pixels[1, 130:380] == 1).all()


def test_a_slice_in_bands_comes_back_on_its_own_grid(banded):
    hounsfield = smooth_slice(197, 233)
    inputs = banded.preprocess_slice(hounsfield, "CT")
    back = banded.postprocess_slice(inputs.vae_pixels, inputs.intensity, inputs.geometry)
    plain = SynerMedGenImageProcessor().preprocess_slice(hounsfield, "CT")
    expected = SynerMedGenImageProcessor().postprocess_slice(plain.vae_pixels, plain.intensity, plain.geometry)
    np.testing.assert_allclose(back, expected, atol=2e-3)
    # The ViT goes on seeing the whole window: understanding does not depend on the codec.
    assert torch.equal(inputs.vit_patches, plain.vit_patches)


def test_an_8_bit_picture_in_bands_comes_back(banded):
    grey = np.tile(np.arange(256, dtype=np.uint8), (512, 2))
    inputs = banded.preprocess_slice(Image.fromarray(grey), "CT")
    hounsfield = banded.postprocess_slice(inputs.vae_pixels, inputs.intensity, inputs.geometry)
    assert np.array_equal(np.asarray(to_display(hounsfield, inputs.intensity)), grey)


def test_bands_are_saved_with_the_weights_and_old_ones_stay_plain(banded, tmp_path):
    banded.save_pretrained(tmp_path / "new")
    assert SynerMedGenImageProcessor.from_pretrained(tmp_path / "new").intensity == banded.intensity
    SynerMedGenImageProcessor().save_pretrained(tmp_path / "old")
    loaded = SynerMedGenImageProcessor.from_pretrained(tmp_path / "old")
    assert not any("bands" in spec for spec in loaded.intensity.values())
    assert set_codec(banded.intensity, "plain") == loaded.intensity


def test_plain_windows_are_what_they_were_to_the_bit():
    """Digests of inputs and outputs from before there were bands: checkpoints that have none must not notice them."""
    processor, random = asinh_pet("plain"), np.random.default_rng(0)
    digest = hashlib.sha256()
    for modality in MODALITIES:
        low, high = {"CT": (-1100, 3200), "CBCT": (-1100, 3200), "PET": (0, 22)}.get(modality, (0, 900))
        inputs = processor.preprocess_slice(random.uniform(low, high, (96, 128)).astype(np.float32), modality)
        decoded = inputs.vae_pixels + torch.from_numpy(0.1 * random.standard_normal(inputs.vae_pixels.shape)).float()
        back = processor.postprocess_slice(decoded, processor.target_record(modality), inputs.geometry)
        for array in (inputs.vae_pixels.numpy(), inputs.vit_patches.numpy(), back):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(json.dumps(inputs.intensity).encode())
    assert digest.hexdigest() == "bee3f62eb09a9450a3fb257a9b2abb9168cd38230dcdbb4f6aeca81658fbe6d3"


def test_bands_that_cannot_be(banded):
    for bands in ([[-160, 240]], [[-160, 240], [200, 4000]], [[240, -160], [200, 1500]]):
        with pytest.raises(ValueError, match=r"intensity\['CT'\]: bands must be two windows .* inside of"):
            SynerMedGenImageProcessor(
                intensity={"CT": {"unit": "HU", "low": -1024, "high": 3071, "scale": "linear", "bands": bands}}
            )
    with pytest.raises(ValueError, match="Unknown codec 'rgb'. Choose one of plain, bands"):
        set_codec(banded.intensity, "rgb")


# ---- geometry ----


@pytest.mark.parametrize("shape", [(197, 233), (96, 128), (128, 96), (240, 240), (181, 217), (60, 300), (512, 512)])
@pytest.mark.parametrize("pad_to_square", [True, False])
def test_a_slice_comes_back_on_its_own_grid(shape, pad_to_square):
    processor = SynerMedGenImageProcessor(pad_to_square=pad_to_square)
    hounsfield = smooth_slice(*shape)
    inputs = processor.preprocess_slice(hounsfield, "CT")
    _, height, width = inputs.vae_pixels.shape
    assert inputs.vae_pixels.dtype == torch.float32 and height % 16 == width % 16 == 0
    assert inputs.vit_patches.shape == (inputs.vit_grid[0] * inputs.vit_grid[1], 588)
    assert (height == width) or not pad_to_square
    back = processor.postprocess_slice(inputs.vae_pixels, inputs.intensity, inputs.geometry)
    assert back.shape == shape and back.dtype == np.float32
    if inputs.vae_pixels.shape[1:] == shape:
        np.testing.assert_allclose(back, hounsfield, atol=1e-3)
    assert np.abs(back - hounsfield).mean() < 8  # HU; what is left is the bicubic filter at the padded border


def test_padding_is_centred_and_holds_the_low_end(processor):
    assert square_padding(197, 233) == [18, 18, 0, 0] and square_padding(10, 7) == [0, 0, 1, 2]
    inputs = processor.preprocess_slice(np.full((256, 512), 1000, np.float32), "CT")
    assert inputs.geometry == {"height": 256, "width": 512, "pad": [128, 128, 0, 0]}
    assert (inputs.vae_pixels[:, :128] == -1).all() and (inputs.vae_pixels[:, 128:384] > -0.1).all()


def test_channels_are_averaged_and_clipped(processor):
    pixels = torch.stack([torch.full((512, 512), value) for value in (0.0, 0.3, 0.6)])
    geometry = {"height": 512, "width": 512, "pad": [0, 0, 0, 0]}
    image = processor.postprocess_slice(pixels, processor.target_record("PET"), geometry)
    np.testing.assert_allclose(image, 13.0, rtol=1e-6)
    assert processor.postprocess_slice(pixels + 9, processor.target_record("PET"), geometry).max() == 20
    with pytest.raises(ValueError, match=r"shape \(3, H, W\)"):
        processor.postprocess_slice(pixels[None], processor.target_record("PET"), geometry)


def test_larger_than_the_position_table(processor):
    with pytest.raises(ValueError, match="1025x600 pixels.*ends at 1024 a side.*downsample"):
        processor.preprocess_slice(np.zeros((1025, 600), np.float32), "CT")
    with pytest.raises(ValueError, match="vae_size makes 512x512"):
        SynerMedGenImageProcessor(latent_max_per_side=8).preprocess_slice(np.zeros((100, 100), np.float32), "CT")
    with pytest.raises(ValueError, match="vit_size makes 27x27 patches"):
        SynerMedGenImageProcessor(vit_max_patches_per_side=8).preprocess_slice(np.zeros((100, 100), np.float32), "CT")


# ---- pictures ----


def test_display_rounds(processor):
    assert np.asarray(to_display(np.float32([[0, 0.499, 0.501, 1.0, 2.0]]), (0, 1))).tolist() == [
        [0, 127, 128, 255, 255]
    ]
    assert np.asarray(to_display(np.float32([[-1024, 3071]]), processor.target_record("CT"))).tolist() == [[0, 255]]


def test_an_8_bit_ct_picture_spans_the_window_and_comes_back(processor):
    grey = np.tile(np.arange(256, dtype=np.uint8), (512, 2))
    inputs = processor.preprocess_slice(Image.fromarray(grey), "CT")
    hounsfield = processor.postprocess_slice(inputs.vae_pixels, inputs.intensity, inputs.geometry)
    assert (hounsfield.min(), hounsfield.max(), inputs.intensity["unit"]) == (-1024, 3071, "HU")
    assert np.array_equal(np.asarray(to_display(hounsfield, inputs.intensity)), grey)


def test_an_mr_picture_is_windowed_like_any_mr(processor):
    grey = np.tile(np.arange(128, dtype=np.uint8), (128, 1))
    record = processor.preprocess_slice(Image.fromarray(grey), "T1").intensity
    assert record["unit"] == "grey level" and record["high"] == pytest.approx(np.percentile(grey[grey > 0], 99.5))


def test_a_16_bit_png_keeps_all_its_levels(processor, tmp_path):
    levels = np.arange(512 * 512, dtype=np.uint32).reshape(512, 512) // 4
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "slice.png")
    array, is_picture = load_slice(tmp_path / "slice.png")
    assert is_picture and array.dtype == np.uint16 and np.array_equal(array, levels)

    inputs = processor.preprocess_slice(str(tmp_path / "slice.png"))
    assert inputs.intensity["unit"] == "grey level" and inputs.intensity["high"] == 65535
    back = processor.postprocess_slice(inputs.vae_pixels, inputs.intensity, inputs.geometry)
    assert np.array_equal(np.rint(back), levels)
    # By way of the processor's own door too: fetch_images of transformers would clip to 255.
    assert len(np.unique(processor(str(tmp_path / "slice.png"))["pixel_values"])) > 50_000


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I", "CMYK"])
def test_grey_pictures_of_any_mode(mode):
    grey = Image.fromarray(np.tile(np.uint8([0, 255]), (16, 8)))
    array, is_picture = load_slice(grey.convert(mode))
    assert is_picture and array.shape == (16, 16) and np.array_equal(array.astype(np.uint8), np.asarray(grey))


def test_a_black_and_white_picture_is_a_mask():
    with pytest.raises(ValueError, match="black-and-white picture: that is a mask"):
        load_slice(Image.new("1", (16, 16)))


def test_float_pictures_and_tensors_hold_scanner_units():
    hounsfield = smooth_slice(16, 20)
    for image in (Image.fromarray(hounsfield), torch.from_numpy(hounsfield), hounsfield.astype(np.float64)):
        array, is_picture = load_slice(image)
        assert not is_picture and array.dtype == np.float32 and np.array_equal(array, hounsfield)
    assert load_slice(hounsfield.astype(np.int16))[1] is False
    assert load_slice(torch.zeros(8, 8, dtype=torch.bfloat16))[0].dtype == np.float32
    assert load_slice(np.zeros((8, 8), np.uint8))[1] is True  # what a display picture looks like as an array


# ---- what is no slice ----


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((16, 16), bool), "boolean array: that is a mask"),
        (np.zeros((0, 16)), "empty array"),
        (np.zeros((16, 16, 30)), r"Got shape \(16, 16, 30\): pass one slice.*volume\[:, :, k\]"),
        (torch.zeros(1, 16, 16), r"Got shape \(1, 16, 16\)"),
        (np.zeros((16, 16), complex), "complex128"),
        (np.full((16, 16), None), "object"),
        (np.zeros((7, 16)), "7x16 pixels.*at least 8"),
        (np.where(np.eye(16) > 0, np.nan, 1.0), "16 NaN and 0 infinite values of 256"),
        (np.where(np.eye(16) > 0, np.inf, 1.0), "0 NaN and 16 infinite"),
        (Image.new("RGB", (16, 16), (200, 30, 30)), "colour picture"),
        (Image.fromarray(np.full((16, 16), 70000, np.int32)), "32-bit picture"),
        ([[1, 2], [3, 4]], "got list"),
        ("scan.nii.gz", "not a picture: read it with nibabel"),
        ("scan.dcm", "not a picture"),
        ("scan.npy", "numpy.load"),
        (Path(__file__).parent, "is a folder"),
        (Path(__file__), "cannot be read as a picture"),
    ],
)
def test_what_is_no_slice_is_refused_in_words(image, message):
    with pytest.raises(ValueError, match=message):
        load_slice(image)


def test_missing_broken_and_many_framed_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.png"):
        load_slice(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"no file x{40}\.\.\.\.$"):
        load_slice("x" * 100_000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is the file complete"):
        load_slice(tmp_path / "half.png")
    frame = Image.new("L", (16, 16))
    frame.save(tmp_path / "stack.tif", save_all=True, append_images=[frame, frame])
    with pytest.raises(ValueError, match="holds 3 frames"):
        load_slice(tmp_path / "stack.tif")


# ---- the surface transformers calls ----


def test_a_nested_batch_of_pictures(processor):
    wide, square = Image.new("RGB", (640, 400), (200, 30, 30)), Image.new("L", (240, 240))
    for return_tensors, kind in (("pt", torch.Tensor), (None, np.ndarray)):
        batch = processor(images=[[wide, square], [square]], return_tensors=return_tensors)
        assert isinstance(batch["pixel_values"], kind) and isinstance(batch["image_grid_hw"], kind)
    grids = batch["image_grid_hw"]
    assert grids.tolist() == [[29, 46], [27, 27], [27, 27]] and grids.dtype == np.int64
    assert batch["pixel_values"].shape == (int(grids.prod(1).sum()), 588) and batch["pixel_values"].dtype == np.float32
    assert [processor.get_number_of_image_patches(*size) for size in ((400, 640), (240, 240))] == [29 * 46, 27 * 27]


def test_slices_go_through_the_codec(processor):
    hounsfield = smooth_slice(197, 233)
    batch = processor([hounsfield, torch.from_numpy(hounsfield)], modality="CT", return_tensors="pt")
    patches = processor.preprocess_slice(hounsfield, "CT").vit_patches
    assert torch.equal(batch["pixel_values"], torch.cat([patches, patches]))
    assert processor.get_number_of_image_patches(197, 233, {"modality": "CT"}) == len(patches)
    mixed = processor([hounsfield, np.zeros((40, 60, 3), np.uint8)], modality=["CT", None], window=[(-160, 240), None])
    assert mixed["image_grid_hw"].tolist() == [[27, 27], [27, 40]]


def test_every_spelling_of_a_picture_gives_the_same_tokens(processor, random, tmp_path):
    levels = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "panel.png"
    Image.fromarray(levels).save(path)
    address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    spellings = [levels, torch.from_numpy(levels).permute(2, 0, 1), Image.fromarray(levels), path, str(path), address]
    first, *others = (processor(image)["pixel_values"] for image in spellings)
    assert all(np.array_equal(first, other) for other in others)


def test_settings_of_one_call(processor):
    size = {"max_size": 518, "min_size": 224, "stride": 14, "max_pixels": 1806336}
    assert processor(Image.new("L", (240, 240)), vit_size=size)["image_grid_hw"].tolist() == [[17, 17]]
    assert processor.vit_size["max_size"] == 980
    with pytest.raises(ValueError, match="do_rescale: no setting"):
        processor(Image.new("L", (240, 240)), do_rescale=False)


def test_batch_refusals(processor):
    with pytest.raises(ValueError, match="no image in the batch"):
        processor([[]])
    with pytest.raises(ValueError, match="2 entries of modality for 1 images"):
        processor(np.zeros((16, 16)), modality=["CT", "CT"])
    with pytest.raises(ValueError, match="needs its modality"):
        processor(np.zeros((16, 16)))
    with pytest.raises(ValueError, match="pass one slice"):
        processor(np.zeros((3, 16, 16)), modality="CT")
    with pytest.raises(TypeError, match="got int"):
        processor([3])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    intensity = {**SynerMedGenImageProcessor.intensity}
    intensity["PET"] = {"unit": "SUV", "low": 0.0, "high": 10.0, "scale": "asinh", "softening": 0.5}
    processor = SynerMedGenImageProcessor(intensity=intensity, pad_to_square=False, latent_max_per_side=32)
    processor.save_pretrained(tmp_path)
    loaded = SynerMedGenImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.intensity["PET"]["high"] == 10.0 and loaded.pad_to_square is False
    assert SynerMedGenImageProcessor().intensity["PET"]["high"] == 20.0
    assert SynerMedGenImageProcessor.from_pretrained(tmp_path, pad_to_square=True).pad_to_square is True


# ---- intensities that are most likely not in scanner units are said ----


def test_a_normalised_mr_is_said(processor, caplog):
    processor.preprocess_slice(np.linspace(-1.7, 1.9, 1024, dtype=np.float32).reshape(32, 32), "T1")
    assert "47% of a T1 slice lies below 0 and is clipped: it looks normalised" in caplog.text


def test_pet_in_becquerel_is_said(processor, caplog):
    processor.preprocess_slice(np.linspace(0, 20_000, 1024, dtype=np.float32).reshape(32, 32), "PET")
    assert "of a PET slice lies above 20 SUV and is clipped" in caplog.text


def test_twelve_bits_of_ct_in_a_sixteen_bit_picture_are_said(processor, caplog):
    levels = np.linspace(0, 4001, 1024).astype(np.uint16).reshape(32, 32)
    processor.preprocess_slice(Image.fromarray(levels), "CT")
    assert "A 16-bit CT picture ends at level 4001 of 65535" in caplog.text


def test_ordinary_scans_are_not_complained_of(processor, caplog):
    for modality, low, high in (("CT", -1024, 3071), ("PET", 0, 15), ("T2", 0, 800)):
        processor.preprocess_slice(np.linspace(low, high, 1024, dtype=np.float32).reshape(32, 32), modality)
    assert caplog.text == ""
