"""Encoded slices: what they hold, and what a cache on disk gives back, refuses and makes again."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from synermedgen_hf import SynerMedGenImageProcessor
from synermedgen_hf.data.latents import LatentCache, SliceEncoder, StoredSlice, check_sizes, codec_fingerprint
from synermedgen_hf.data.pairs import encode_slice

HU = {"unit": "HU", "low": -1024.0, "high": 3071.0}


@pytest.fixture
def codec(processor):
    return processor.image_processor


@pytest.fixture
def vae(make_vae):
    torch.manual_seed(0)
    return make_vae().requires_grad_(False)


def ct(seed=0, shape=(40, 48)):
    return np.random.default_rng(seed).uniform(-1000, 1500, shape).astype(np.float32)


def stored(array, modality="CT", window=HU):
    picture = encode_slice(array)
    return StoredSlice(lambda: picture, modality, window, "set/case")


def same(one, other):
    return all(getattr(one, name).equal(getattr(other, name)) for name in ("mean", "std", "pixels"))


def test_a_slice_is_encoded_as_inference_encodes_it(vae, codec):
    encoded = SliceEncoder(vae, codec)(stored(ct()))
    inputs = codec.preprocess_slice(ct(), "CT")
    posterior = vae.encode(inputs.vae_pixels[None]).latent_dist
    torch.testing.assert_close(encoded.mean.float(), posterior.mean[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(encoded.std.float(), posterior.std[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(encoded.vit_patches(), inputs.vit_patches, atol=1e-3, rtol=0)


def test_a_latent_is_drawn_from_the_posterior_and_scaled(vae, codec):
    encoded = SliceEncoder(vae, codec)(stored(ct()))
    tokens = [encoded.sample(torch.Generator().manual_seed(seed), 0.1, 0.5, 2) for seed in (0, 0, 1)]
    assert tokens[0].equal(tokens[1]) and not tokens[0].equal(tokens[2])
    channels, rows, columns = encoded.mean.shape
    assert tokens[0].shape == (rows * columns // 4, 4 * channels)
    mean = torch.stack([encoded.sample(torch.Generator().manual_seed(seed), 0.1, 0.5, 2) for seed in range(400)]).mean()
    assert mean == pytest.approx(float((encoded.mean.float().mean() - 0.1) * 0.5), abs=0.02)


@pytest.mark.parametrize("shape", [(40, 48), (30, 30), (64, 20), (100, 30)])
def test_the_grids_are_known_without_encoding(vae, codec, shape):
    encoder, slice_ = SliceEncoder(vae, codec), stored(ct(shape=shape))
    latent_grid, vit_grid = encoder.grids(*slice_.size())
    encoded = encoder(slice_)
    assert latent_grid == (encoded.mean.shape[1] // 2, encoded.mean.shape[2] // 2)
    assert vit_grid == codec.preprocess_slice(ct(shape=shape), "CT").vit_grid


def test_ct_keeps_the_checkpoints_window_and_mr_brings_its_volumes(vae, processor):
    encoder = SliceEncoder(vae, processor.image_processor)
    other = {**HU, "low": 0.0, "high": 500.0}
    assert same(encoder(stored(ct())), encoder(stored(ct(), window=other)))
    narrow, wide = ({"unit": "a.u.", "low": 0.0, "high": high} for high in (500.0, 2000.0))
    assert not same(*(encoder(stored(abs(ct()), "MRI", window)) for window in (narrow, wide)))
    # Grey levels of a picture are no HU.
    grey = {"unit": "grey level", "low": 0.0, "high": 255.0}
    pixels = encoder(stored(np.full((32, 32), 255, np.float32), "CT", grey)).pixels
    assert (pixels == 1).all()


def test_a_cache_gives_back_what_was_put_in(vae, codec, tmp_path):
    encoder = SliceEncoder(vae, codec, cache_dir=tmp_path)
    first = encoder(stored(ct()))
    vae.encode = None  # not run again
    assert same(first, SliceEncoder(vae, codec, cache_dir=tmp_path)(stored(ct())))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.name != "codec.json"] == [
        ".safetensors"
    ]


def test_another_picture_window_or_modality_is_another_entry(vae, codec, tmp_path):
    encoder = SliceEncoder(vae, codec, cache_dir=tmp_path)
    mr = {"unit": "a.u.", "low": 0.0, "high": 900.0}
    for one in (
        stored(ct()),
        stored(ct(1)),
        stored(abs(ct()), "MRI", mr),
        stored(abs(ct()), "T1", mr),
        stored(abs(ct()), "T1", {**mr, "high": 901.0}),
    ):
        encoder(one)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5


def change_weights(vae, codec):
    vae.encoder.conv_in.weight += 1e-3
    return vae, codec


def change_scale(vae, codec):
    vae.register_to_config(scaling_factor=0.4)
    return vae, codec


def change_window(vae, codec):
    intensity = {**codec.intensity, "CT": {**codec.intensity["CT"], "high": 2000.0}}
    return vae, SynerMedGenImageProcessor(**{**codec.to_dict(), "intensity": intensity})


@pytest.mark.parametrize("change", [change_weights, change_scale, change_window])
def test_latents_of_another_codec_are_refused(vae, codec, tmp_path, change):
    SliceEncoder(vae, codec, cache_dir=tmp_path)(stored(ct()))
    with pytest.raises(ValueError, match=f"{tmp_path} holds latents of another codec.*Choose another folder"):
        SliceEncoder(*change(vae, codec), cache_dir=tmp_path)


def test_a_latent_of_another_codec_in_the_right_folder_is_refused(vae, codec, tmp_path):
    image = stored(ct())
    encoded = SliceEncoder(vae, codec, cache_dir=tmp_path / "one")(image)
    LatentCache(tmp_path / "other", "another").write(image.fingerprint(image.content()), encoded)
    foreign = next((tmp_path / "other").rglob("*.safetensors"))
    target = next((tmp_path / "one").rglob("*.safetensors"))
    target.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match="another codec"):
        SliceEncoder(vae, codec, cache_dir=tmp_path / "one")(image)


def test_the_precision_is_part_of_the_codec(vae, codec):
    assert codec_fingerprint(vae, codec) == codec_fingerprint(vae, codec, "no") != codec_fingerprint(vae, codec, "bf16")


def test_a_damaged_file_is_made_again(vae, codec, tmp_path):
    encoder = SliceEncoder(vae, codec, cache_dir=tmp_path)
    first = encoder(stored(ct()))
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    assert same(first, encoder(stored(ct())))
    assert same(first, encoder.cache.read(file.stem))


def test_what_cannot_be_encoded_names_the_case(vae, codec):
    with pytest.raises(ValueError, match="CT slice of set/case cannot be used: The slice has 1 NaN"):
        SliceEncoder(vae, codec)(stored(np.where(np.eye(40) * np.arange(40) == 1, np.nan, 0).astype(np.float32)))


@pytest.mark.parametrize("name, token", [("vae_size", 16), ("vit_size", 14)])
def test_sizes_must_be_multiples_of_a_token(codec, name, token):
    check_sizes(codec)
    size = {**getattr(codec, name), "stride": token - 2}
    with pytest.raises(ValueError, match=rf"multiples of {token - 2} pixels \({name}.*not\s*divisible by the {token}"):
        check_sizes(SynerMedGenImageProcessor(**{**codec.to_dict(), name: size}))


def test_an_eight_bit_picture_can_be_encoded(vae, codec):
    buffer = io.BytesIO()
    Image.fromarray(np.repeat([0, 255], 16)[:, None].repeat(32, 1).astype(np.uint8)).save(buffer, "PNG")
    picture = {"bytes": buffer.getvalue(), "path": None}
    window = {"unit": "grey level", "low": 0.0, "high": 255.0}
    pixels = SliceEncoder(vae, codec)(StoredSlice(lambda: picture, "T1", window, "set/case")).pixels
    assert pixels.min() == -1 and pixels.max() == 1
