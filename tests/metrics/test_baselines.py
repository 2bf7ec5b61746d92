"""Baselines with known answers: what copying gives in each unit, what a table of intensities can know and cannot."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from transformers import AutoProcessor

from synermedgen_hf import SynerMedGenImageProcessor, checkpoint_path
from synermedgen_hf.hub import load_vae
from synermedgen_hf.metrics.baselines import (
    Ceiling,
    CopySource,
    IntensityMapping,
    TrainedNetwork,
    check_codec,
    codec_settings,
    fit_mapping,
    fixed_side,
    predict_codes,
    read_network,
    route_of,
    true_target,
)

WINDOWS = {"CT": (-1024, 3071), "CBCT": (-1024, 3071), "PET": (0, 20), "T1": (0, 640), "T2": (0, 1300), "MRI": (0, 500)}


@pytest.fixture(scope="module")
def codec():
    return SynerMedGenImageProcessor()


def pair(source, target, route="brain/CBCT-CT"):
    """A row of pairs, decoded."""
    region, modalities = route.split("/")
    row = {"region": region}
    for side, modality, array in zip(("source", "target"), modalities.split("-"), (source, target), strict=True):
        unit = {"CT": "HU", "CBCT": "HU", "PET": "SUV"}.get(modality, "a.u.")
        window = dict(zip(("low", "high"), WINDOWS[modality], strict=True), unit=unit)
        picture = Image.fromarray(np.asarray(array, np.float32))
        row |= {f"{side}_image": picture, f"{side}_modality": modality, f"{side}_window": window}
    return row


def one_each(low, high, count=64, seed=0):
    """Slices of values all over a range."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(low, high, (16, 16)).astype(np.float32) for _ in range(count)]


def test_the_route_of_a_row():
    assert route_of(pair(np.zeros((8, 8)), np.zeros((8, 8)), "whole-body/CT-PET")) == "whole-body/CT-PET"


def test_mr_is_judged_where_the_window_of_its_volume_ends_at_the_codecs_own(codec):
    array = np.array([[0.0, 325.0], [1300.0, 1625.0]])
    made = true_target(codec, pair(array, array, "brain/T1-T2"))
    assert made.dtype == np.float32 and made == pytest.approx(np.array([[0, 250], [1000, 1250]]))  # nothing is clipped


@pytest.mark.parametrize("route", ["brain/MRI-CT", "brain/CT-CBCT", "whole-body/CT-PET"])
def test_other_modalities_are_judged_in_their_own_units(codec, route):
    array = np.array([[-2000.0, 12.0], [50.0, 5000.0]])
    assert (true_target(codec, pair(array, array, route)) == array).all()


def test_a_true_target_of_grey_levels_is_what_training_took_them_for(codec):
    row = pair(np.zeros((2, 2)), np.array([[0.0, 51.0], [102.0, 255.0]]), "brain/MRI-CT")
    row["target_window"] = {"unit": "grey level", "low": 0.0, "high": 255.0}
    low, high = (codec.target_record("CT")[end] for end in ("low", "high"))
    share = np.array([[0, 0.2], [0.4, 1]])
    assert true_target(codec, row) == pytest.approx(low + share * (high - low), abs=0.01)


def test_a_copy_of_cbct_as_ct_is_the_cbct_itself(codec):
    source = one_each(-1000, 2000, 1)[0]
    (made,) = CopySource(codec)([pair(source, source)], [0])
    assert made.dtype == np.float32 and np.abs(made - source).max() < 1e-3


def test_a_copy_keeps_its_place_in_the_window_whatever_the_unit(codec):
    source = np.full((8, 8), -1024 + 4095 / 4)
    copy = CopySource(codec)
    (made,) = copy([pair(source, source, "whole-body/CT-PET")], [0])
    assert made == pytest.approx(20 / 4)
    # MR has no scale of its own: its window is made to end at the codec's 1000.
    (made,) = copy([pair(np.full((8, 8), 320.0), source, "brain/T1-T2")], [0])
    assert made == pytest.approx(500)


def test_each_row_is_answered_by_itself(codec):
    rows = [pair(np.full((8, 8), value), np.zeros((8, 8))) for value in (-500, 0, 700)]
    assert [float(made.mean()) for made in CopySource(codec)(rows, [0, 1, 2])] == pytest.approx(
        [-500, 0, 700], abs=1e-3
    )


@pytest.mark.parametrize(
    "change",
    [lambda hu: 0.5 * hu + 100, lambda hu: 900 * np.cos(hu / 900)],
    ids=["a line", "a curve that goes up and down"],
)
def test_a_mapping_finds_any_function_of_the_intensity(codec, change):
    training = [pair(source, change(source)) for source in one_each(-1000, 2000)]
    mapping = IntensityMapping(codec, fit_mapping(training, codec, ["brain/CBCT-CT"]))
    (source,) = one_each(-950, 1950, 1, seed=9)
    (made,) = mapping([pair(source, source)], [0])
    assert np.abs(made - change(source)).max() < 5  # a bin is 16 HU wide


def test_where_the_intensity_does_not_tell_a_mapping_answers_the_mean(codec):
    source = np.full((8, 8), 40.0)  # one tissue in CT, two in PET
    training = [pair(source, np.full((8, 8), suv), "whole-body/CT-PET") for suv in (2.0, 2.0, 8.0)]
    mapping = IntensityMapping(codec, fit_mapping(training, codec, ["whole-body/CT-PET"]))
    (made,) = mapping([pair(source, source, "whole-body/CT-PET")], [0])
    assert made == pytest.approx(4.0, abs=1e-4)


def test_every_route_has_its_own_table_whose_order_of_rows_does_not_matter(codec):
    there, back = "brain/T1-T2", "brain/T2-T1"
    rows = [pair(source, 1300 - 2 * source, there) for source in one_each(0, 640)]
    rows += [pair(1300 - 2 * source, source, back) for source in one_each(0, 640)]
    tables = fit_mapping(rows, codec, [there, back])
    again = fit_mapping(rows[::-1], codec, [back, there])
    for route in (there, back):
        assert tables[route]["slices"] == 64
        assert tables[route]["target"] == pytest.approx(again[route]["target"], abs=1e-12)
    mapping = IntensityMapping(codec, json.loads(json.dumps(tables)))
    source = np.full((8, 8), 160.0)
    made = [mapping([pair(source, source, route)], [0])[0].mean() for route in (there, back)]
    assert made == pytest.approx([1000 * 980 / 1300, 1000 * 570 / 640], abs=2)  # of MR windows that end at 1000


def test_intensities_outside_of_the_training_get_the_nearest_answer(codec):
    training = [pair(source, source) for source in one_each(0, 100)]
    mapping = IntensityMapping(codec, fit_mapping(training, codec, ["brain/CBCT-CT"]))
    low, high = mapping([pair(np.full((8, 8), value), np.zeros((8, 8))) for value in (-900, 2000)], [0, 0])
    assert 0 <= low.mean() < 16 and 84 < high.mean() <= 100


def test_a_route_without_training_pairs_is_named(codec):
    rows = [pair(source, source) for source in one_each(0, 100, 2)]
    with pytest.raises(ValueError, match="no training pairs of brain/T1-T2, pelvis/CBCT-CT to fit"):
        fit_mapping(rows, codec, ["brain/T1-T2", "brain/CBCT-CT", "pelvis/CBCT-CT"])


def test_rows_of_other_routes_are_passed_over(codec):
    rows = [pair(source, source) for source in one_each(0, 100, 2)]
    other = pair(np.zeros((8, 8)), np.zeros((8, 8)), "brain/T1-T2")
    assert fit_mapping([*rows, other], codec, ["brain/CBCT-CT"]) == fit_mapping(rows, codec, ["brain/CBCT-CT"])


@pytest.mark.parametrize("route", ["brain/MRI-CT", "brain/T1-T2"])
def test_the_ceiling_is_the_truth_but_for_the_autoencoder(codec, route):
    """The bundled autoencoder on a smooth picture: near the truth in the units of the target, and not the truth."""
    source = checkpoint_path()
    vae = load_vae(source, torch.float32)[0].eval()
    codec = AutoProcessor.from_pretrained(source, subfolder="processor").image_processor
    low, high = WINDOWS[route[-2:]]
    rows, columns = np.mgrid[-1:1:48j, -1:1:40j]
    truth = low + (high - low) * 0.4 * np.exp(-3 * (rows**2 + columns**2))
    row = pair(truth, truth, route)
    (made,) = Ceiling(vae, codec)([row], [0])
    wanted = true_target(codec, row)
    assert made.shape == truth.shape and 0 < np.abs(made - wanted).mean() < 0.05 * np.ptp(wanted)


def make_unet(routes=2):
    torch.manual_seed(0)
    down, up = ["DownBlock2D"] * 2, ["UpBlock2D"] * 2
    channels = {"in_channels": 4, "out_channels": 4, "block_out_channels": [8, 8], "norm_num_groups": 4}
    blocks = {"down_block_types": down, "up_block_types": up, "layers_per_block": 1}
    return UNet2DModel(**channels, **blocks, num_class_embeds=routes).eval()


@pytest.fixture(scope="module")
def small():
    """A codec of pictures of 32 to 64 pixels."""
    return SynerMedGenImageProcessor(
        vae_size={"max_size": 64, "min_size": 32, "stride": 16, "max_pixels": 64**2},
        vit_size={"max_size": 56, "min_size": 28, "stride": 14, "max_pixels": 56**2},
    )


@pytest.mark.parametrize(
    ("route", "code", "wanted"),
    [
        ("brain/MRI-CT", -1.0, -1024),
        ("brain/MRI-CT", 0.0, 1023.5),
        ("brain/MRI-CT", 1.4, 3071),  # no further than the window
        ("whole-body/CT-PET", 0.5, 15),
        ("brain/T1-T2", 0.0, 500),  # MR is made on the codec's own scale
    ],
)
def test_a_network_answers_in_the_targets_units_on_the_sources_grid(small, route, code, wanted):
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.fill_(code)
    blank = np.zeros((40, 24))
    (made,) = TrainedNetwork(unet, small, ["pelvis/MRI-CT", route])([pair(blank, blank, route)], [0])
    assert made.shape == (40, 24) and made.dtype == np.float32 and made == pytest.approx(wanted, abs=1e-3)


def test_a_network_is_asked_as_it_was_trained(small):
    """With what the codec makes of the source, and the label of the route, whatever the batch."""
    route, unet = "brain/T1-T2", make_unet()
    rows = [pair(one, one, route) for one in one_each(0, 600, 3)]
    made = TrainedNetwork(unet, small, ["brain/T2-T1", route])(rows, [0, 0, 0])
    other = TrainedNetwork(unet, small, [route, "brain/T2-T1"])(rows[:1], [0])
    for row, one in zip(rows, made, strict=True):
        inputs = small.preprocess_slice(row["source_image"], "T1", WINDOWS["T1"])
        with torch.no_grad():
            codes = predict_codes(unet, inputs.vae_pixels[None, :1], torch.tensor([1]))[0].expand(3, -1, -1)
        wanted = small.postprocess_slice(codes, small.target_record("T2"), inputs.geometry)
        assert one == pytest.approx(wanted, abs=0.01) and np.ptp(one) > 1
    assert np.abs(other[0] - made[0]).max() > 1


def test_blocks_of_pixels_are_channels():
    unet = make_unet()
    pixels = torch.rand(2, 1, 32, 48) * 2 - 1
    seen = []
    unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        made = predict_codes(unet, pixels, torch.tensor([0, 1]))
    assert made.shape == pixels.shape and seen[0].shape == (2, 4, 16, 24)
    assert seen[0][:, 1].equal(pixels[:, 0, ::2, 1::2])


def test_another_codec_is_told_by_what_differs(codec, small):
    record = {"codec": json.loads(json.dumps(codec_settings(codec)))}
    check_codec("folder", record, codec)
    with pytest.raises(ValueError, match="^folder was trained with another codec .*: vae_size .* here .*max_size.: 64"):
        check_codec("folder", record, small)
    other = {**codec.intensity, "PET": {**codec.intensity["PET"], "high": 10.0}}
    with pytest.raises(ValueError, match=r": PET \{.*'high': 20.0.*\}, here \{.*'high': 10.0[^;]*Pass the --model"):
        check_codec("folder", record, SynerMedGenImageProcessor(intensity=other))


def test_squares_of_one_size_are_no_other_codec_for_another_stride():
    def codec(stride, **sizes):
        size = {"max_size": 64, "min_size": 64, "max_pixels": 14112 * 128, "stride": stride, **sizes}
        return SynerMedGenImageProcessor(vae_size=size)

    record = {"codec": codec_settings(codec(16))}
    check_codec("folder", record, codec(8))
    assert fixed_side(record["codec"]) == 64
    for other in (codec(8, min_size=32), codec(8, max_size=128, min_size=128), codec(8, max_pixels=1024), codec(24)):
        with pytest.raises(ValueError, match="was trained with another codec"):
            check_codec("folder", record, other)


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no baseline.json, no unet/config.json, no unet/diffusion_pytorch_model"
    ):
        read_network(tmp_path)
