"""Whole scans: everything stays in its place, nothing depends on the batch, and the record says what was done."""

import copy
import errno
import json

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from synermedgen_hf import SynerMedGenPipeline, Volume, read_volume, synthesize_volume, write_synthesis
from synermedgen_hf.volumes.synthesis import _find_body
from synermedgen_hf.volumes.understanding import understanding_slice

QUICK = {"source": "MRI", "target": "CT", "num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
TILT = nibabel.eulerangles.euler2mat(0.2, -0.1, 0.15)


def affine_of(spacing, flips=(1, 1, 1), rotation=None):
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.multiply(spacing, flips))
    if rotation is not None:
        affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 100)
    return affine


def head(shape=(24, 28, 9), affine=None, seed=0):
    """An ellipsoid of MR signal with air around it, and air alone in the first and the last slice."""
    x, y, z = (np.linspace(-1.2, 1.2, side) for side in shape)
    radius = x[:, None, None] ** 2 + y[:, None] ** 2 + (z * 0.9) ** 2
    texture = np.random.default_rng(seed).uniform(0.5, 1, shape)
    array = np.where(radius < 1, 700 * texture, 0).astype(np.float32)
    return Volume(array, affine_of((8, 8, 12)) if affine is None else affine)


class IdentityPipeline(SynerMedGenPipeline):
    """Makes of every slice what the codec made of it: what comes out is what went in, or was lost on the way."""

    def synthesise_batch(self, cases, instruction, generators, **sampling):
        self.batches.append(len(cases))
        return [sources[0].vae_pixels for sources in cases]

    def decode_latents(self, latents):
        import torch

        return torch.stack(list(latents))


@pytest.fixture
def identity(pipe):
    """Slices are computed at their own size, so that nothing is resampled."""
    made = IdentityPipeline(pipe.model, copy.deepcopy(pipe.processor), pipe.vae, pipe.scheduler)
    made.processor.image_processor.vae_size = {"max_size": 128, "min_size": 1, "stride": 1, "max_pixels": 128**2}
    made.batches = []
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The same grid
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize(
    ("shape", "spacing", "flips", "rotation"),
    [
        ((23, 31, 9), (1, 1, 1), (1, 1, 1), None),
        ((16, 40, 19), (0.7, 0.7, 5), (-1, -1, 1), None),
        ((17, 21, 18), (2, 1, 3), (-1, 1, -1), None),
        ((20, 19, 17), (1, 1.5, 2), (1, -1, 1), TILT),
    ],
    ids=["odd", "LPS-thick", "flipped", "oblique"],
)
def test_an_identity_model_gives_the_scan_back(identity, tmp_path, axis, shape, spacing, flips, rotation):
    """CT to CBCT has one window for both, so that only the codec's float32 lies between the scan and the result."""
    affine = affine_of(spacing, flips, rotation)
    array = np.random.default_rng(1).uniform(-400, 2000, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "ct.nii.gz")
    made = synthesize_volume(identity, tmp_path / "ct.nii.gz", "CBCT", "CT", axis=axis, progress=False)
    write_synthesis(made, tmp_path / "cbct.nii.gz")
    back = nibabel.load(tmp_path / "cbct.nii.gz")
    assert back.shape == shape and np.allclose(back.affine, affine, atol=1e-5)
    assert np.abs(back.get_fdata() - array).max() < 1e-2  # HU, of 4095


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_landmark_stays_on_its_voxel(identity, tmp_path, axis):
    array = np.zeros((19, 22, 17), np.float32)
    array[5, 14, 11] = 1500
    nibabel.save(nibabel.Nifti1Image(array, affine_of((1, 2, 3), (-1, 1, -1), TILT)), tmp_path / "ct.nii.gz")
    made = synthesize_volume(identity, tmp_path / "ct.nii.gz", "CBCT", "CT", axis=axis, progress=False)
    write_synthesis(made, tmp_path / "cbct.mha")
    import SimpleITK

    image = SimpleITK.ReadImage(str(tmp_path / "cbct.mha"))
    world = nibabel.affines.apply_affine(affine_of((1, 2, 3), (-1, 1, -1), TILT), (5, 14, 11))
    index = image.TransformPhysicalPointToIndex([-world[0], -world[1], world[2]])
    assert image[index] == pytest.approx(1500, abs=1e-2)


def test_the_default_axis_is_that_of_the_training_data(pipe):
    assert synthesize_volume(pipe, head(), **QUICK).record["axis"] == "axial"
    pet = Volume(head().array / 100, head().affine)
    arguments = {**QUICK, "source": "PET"}
    assert synthesize_volume(pipe, pet, **arguments, region="whole-body").record["axis"] == "coronal"


def test_an_unknown_source_is_looked_at_as_training_shows_it(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(pipe, "identify", lambda image: seen.append(image) or {"modality": "MRI"})
    made = synthesize_volume(pipe, head(), region="whole-body", **{**QUICK, "source": None})
    assert made.record["sources"] == ["MRI"]
    assert np.array_equal(seen, [understanding_slice(head(), "coronal")])


def test_one_slice_is_a_volume_too(pipe):
    single = Volume(head().array[:, :, 4:5], head().affine)
    made = synthesize_volume(pipe, single, **QUICK)
    assert made.volume.array.shape == (24, 28, 1) and made.record["slices"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_batch(pipe):
    whole = synthesize_volume(pipe, head(), **QUICK, batch_size=16).volume.array
    single = synthesize_volume(pipe, head(), **QUICK, batch_size=1).volume.array
    assert whole.std() > 1
    assert np.abs(whole - single).max() < 0.05  # HU, of 4095


def test_air_is_not_computed_and_is_the_targets_floor(identity):
    scan = head()
    made = synthesize_volume(identity, scan, "CT", "MRI", batch_size=3, progress=False)
    assert made.record["slices_without_body"] == [0, 8]
    assert identity.batches == [3, 3, 1]
    assert made.record["outside_the_body"] == -1024
    assert (made.volume.array[:, :, [0, 8]] == -1024).all()
    assert (made.volume.array[0] == -1024).all() and made.volume.array[12, 14, 4] > -1024


@pytest.mark.parametrize("spacing", [(1, 1), (0.7, 1.3), (3, 3), (0.35, 2.2), (6, 8)])
def test_the_body_has_a_margin_as_a_disc_would_draw_it(spacing):
    rng = np.random.default_rng(0)
    array = np.where(ndimage.gaussian_filter(rng.standard_normal((40, 44, 3)), (4, 4, 0)) > 0.1, 0.0, -1000.0)
    body = _find_body(Volume(array, np.diag([*spacing, 5, 1])), "CT", (-1024, 3071), "axial")
    columns, rows = (max(1, round(5 / side)) for side in spacing)
    y, x = np.ogrid[-rows : rows + 1, -columns : columns + 1]
    disc = (y / rows) ** 2 + (x / columns) ** 2 <= 1
    for place in range(3):
        wanted = ndimage.binary_fill_holes(ndimage.binary_dilation(array[..., place].T > -500, disc))
        np.testing.assert_array_equal(body[..., place].T, wanted)


def test_a_mask_says_what_is_body(identity):
    scan = head()
    mask = np.zeros(scan.array.shape, np.uint8)
    mask[8:16, 8:16, 3:5] = 1
    made = synthesize_volume(identity, scan, "CT", "MRI", mask=Volume(mask, scan.affine), progress=False)
    assert sum(identity.batches) == 2
    assert (made.volume.array[mask == 0] == -1024).all() and (made.volume.array[mask == 1] > -1024).all()


def test_one_window_for_all_slices(identity):
    """A dark slice stays darker than a bright one: MR is not scaled slice by slice."""
    array = np.full((20, 20, 4), 500, np.float32)
    array[..., 1] = 250
    made = synthesize_volume(identity, Volume(array, affine_of((9, 9, 9))), "T2", "T1", progress=False)
    bright, dark = made.volume.array[..., 0].mean(), made.volume.array[..., 1].mean()
    assert dark == pytest.approx(bright / 2, rel=1e-3)
    assert made.record["source_windows"]["T1"][1] == pytest.approx(500, rel=1e-3)


def test_one_noise_field_so_that_equal_slices_become_equal(pipe):
    array = np.repeat(head().array[:, :, 4:5], 3, axis=2)
    made = synthesize_volume(pipe, Volume(array, head().affine), **QUICK, batch_size=2).volume.array
    assert np.allclose(made[..., 0], made[..., 2], atol=0.05)
    other = synthesize_volume(pipe, Volume(array, head().affine), **QUICK, seed=1).volume.array
    assert np.abs(other - made).max() > 1


def test_samples_are_averaged(pipe):
    one, two = (synthesize_volume(pipe, head(), **QUICK, seed=seed).volume.array for seed in (3, 4))
    made = synthesize_volume(pipe, head(), **QUICK, seed=3, num_samples=2)
    assert np.allclose(made.volume.array, (one + two) / 2, atol=0.01)
    assert np.allclose(made.std.array, np.abs(one - two) / 2, atol=0.01)
    assert made.record["seeds"] == [3, 4]


def test_overlap_blends_neighbours_by_their_distance(identity):
    array = np.zeros((20, 20, 5), np.float32)
    array[..., 2] = 1000
    made = synthesize_volume(identity, Volume(array, affine_of((9, 9, 9))), "CBCT", "CT", overlap=1, progress=False)
    along = made.volume.array[10, 10]
    assert np.allclose(along, [0, 250, 500, 250, 0], atol=0.1)


def test_several_sources_are_one_case(pipe):
    volumes = {"T1": head(), "T2": head(seed=1)}
    made = synthesize_volume(pipe, volumes, "FLAIR", num_inference_steps=1, guidance_scale=1.0, progress=False)
    assert made.record["sources"] == ["T1", "T2"] and made.volume.modality == "FLAIR"


def test_the_callback_hears_of_every_batch_and_can_end_the_work(pipe):
    heard = []
    synthesize_volume(pipe, head(), **QUICK, batch_size=4, callback=lambda done, total: heard.append((done, total)))
    assert heard == [(0, 7), (4, 7), (7, 7)]

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize_volume(pipe, head(), **QUICK, batch_size=1, callback=stop)


# ---------------------------------------------------------------------------------------------------------------------
# The record, and files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_record_is_enough_to_do_it_again(pipe, tmp_path):
    scan = head()
    made = synthesize_volume(pipe, scan, **QUICK, seed=5, region="brain", overlap=1)
    write_synthesis(made, tmp_path / "ct.nii.gz")
    told = json.loads((tmp_path / "ct.json").read_text())
    assert told["notice"].startswith("Synthetic") and len(told["weights_sha256"]["model"]) == 64
    again = synthesize_volume(
        pipe,
        scan,
        told["target"],
        *told["sources"],
        told["region"],
        axis=told["axis"],
        seed=told["seeds"][0],
        overlap=told["overlap"],
        num_inference_steps=told["num_inference_steps"],
        guidance_scale=told["guidance_scale"],
        progress=False,
    )
    assert np.array_equal(again.volume.array, read_volume(tmp_path / "ct.nii.gz").array)


def test_samples_leave_their_deviation_beside_the_mean_and_nothing_is_replaced(pipe, tmp_path):
    made = synthesize_volume(pipe, head(), **QUICK, num_samples=2)
    written = write_synthesis(made, tmp_path / "ct.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct-std.nii.gz", "ct.json", "ct.nii.gz"]
    assert written[0] == tmp_path / "ct.nii.gz"
    before = written[0].read_bytes()
    with pytest.raises(FileExistsError, match=r"ct\.nii\.gz"):
        write_synthesis(made, tmp_path / "ct.nii.gz")
    assert written[0].read_bytes() == before
    write_synthesis(made, tmp_path / "ct.nii.gz", overwrite=True)


def test_a_full_disk_leaves_nothing_alone(pipe, tmp_path, monkeypatch):
    """No record of a volume that is not there."""
    made = synthesize_volume(pipe, head(), **QUICK, num_samples=2)

    def full(image, name):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_synthesis(made, tmp_path / "ct.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_takes_volumes_and_their_paths(pipe, tmp_path):
    nibabel.save(nibabel.Nifti1Image(head().array, head().affine), tmp_path / "mr.nii")
    options = {"target": "CT", "source": "MRI", "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 2}
    (by_path,) = pipe(str(tmp_path / "mr.nii"), **options).images
    (by_volume,) = pipe(head(), **options).images
    assert by_path.modality == "CT" and by_path.unit == "HU"
    assert np.array_equal(by_path.array, by_volume.array) and np.allclose(by_path.affine, head().affine)
    with pytest.raises(ValueError, match="num_samples"):
        pipe(head(), **options, num_images_per_prompt=2)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, before any computing
# ---------------------------------------------------------------------------------------------------------------------


def broken(change):
    scan = head()
    array = scan.array.copy()
    change(array)
    return Volume(array, scan.affine)


@pytest.mark.parametrize(
    ("volume", "changes", "words"),
    [
        (head(), {"target": "MRI"}, "nothing to synthesise"),
        (head(), {"source": "XYZ"}, "Unknown source"),
        (head(), {"source": None}, "not been trained|not learned"),
        (head(), {"axis": "tilted"}, "axis"),
        (head(), {"batch_size": 0}, "batch_size"),
        (head(), {"overlap": -1}, "overlap"),
        (head(), {"num_samples": True}, "num_samples"),
        (head(), {"output_type": "pil"}, "output_type"),
        (head(), {"mask": head((5, 5, 5))}, "mask"),
        (broken(lambda array: array.__setitem__((3, 3, 3), np.nan)), {}, "1 voxels of MRI are NaN"),
        (broken(lambda array: array.fill(0)), {}, "No slice shows a body"),
        (Volume(head().array[0], head().affine), {}, "three dimensions"),
    ],
)
def test_what_cannot_be_is_said_before_any_computing(identity, volume, changes, words):
    with pytest.raises(ValueError, match=words):
        synthesize_volume(identity, volume, **{**QUICK, **changes})
    assert identity.batches == []


def test_volumes_of_one_case_must_share_a_grid(pipe):
    with pytest.raises(ValueError, match="T2 lies on another grid"):
        synthesize_volume(pipe, {"T1": head(), "T2": head((24, 28, 8))}, "FLAIR", progress=False)


@pytest.mark.parametrize(
    ("region", "spacing", "warned"), [("pelvis", 7, True), ("brain", 7, False), ("brain", 15, True), (None, 7, False)]
)
def test_a_body_that_does_not_fit_the_region_is_said(identity, region, spacing, warned):
    """The ellipsoid is about 20 voxels wide."""
    scan = head(affine=affine_of((spacing, spacing, 5)))
    made = synthesize_volume(identity, scan, "CT", "MRI", region, progress=False)
    assert bool(made.record["warnings"]) is warned
