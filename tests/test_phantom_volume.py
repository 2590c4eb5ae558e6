"""The phantom volume: what two scanners see of one head, and the truth between them."""
import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from medfusion import phantom_volume
from medfusion.cli import app
from medfusion.phantom_volume import centred_grid, drawn_pose, head_value, mapped, phantom_study, write_study
from medfusion.scans import check_pair, read_scan

SMALL = {'ct_spacing': (4, 4, 5), 'mri_spacing': (4, 4, 5)}


@pytest.fixture(scope='module')
def study():
    return phantom_study(3, **SMALL, contrast='T2', pose=(20., 30.))


def arrays(study):
    return [sitk.GetArrayFromImage(image) for image in (study.ct, study.mri)]


def test_the_same_arguments_give_the_same_study(study):
    again = phantom_study(3, **SMALL, contrast='T2', pose=(20., 30.))
    for one, other in zip(arrays(study), arrays(again)):
        np.testing.assert_array_equal(one, other)
    assert study.truth.GetParameters() == again.truth.GetParameters()


def test_ct_is_in_hounsfield_units_with_bone_brain_and_couch(study):
    ct = arrays(study)[0]
    assert ct.dtype == np.float32 and ct.min() >= -1024 and 500 < ct.max() <= 3071
    assert .3 < (ct < -900).mean() < .9 and .02 < ((ct > 15) & (ct < 60)).mean()
    brain = [study.ct[study.ct.TransformPhysicalPointToIndex(point.tolist())] for point in study.brain]
    assert 10 < np.median(brain) < 60
    low = sitk.GetArrayFromImage(study.ct)[:, -12:, :]                     # behind the head is the couch
    assert (low > -800).any()


@pytest.mark.parametrize('contrast', ['T1', 'FLAIR'])
def test_the_truth_brings_the_same_anatomy_together(contrast):
    "Without noise and bias, the MRI on the grid of the CT is what an MRI there would have seen."
    options = {'ct_spacing': (8, 8, 8), 'mri_spacing': (3, 3, 3), 'contrast': contrast, 'noise': 0, 'bias': 0}
    study, still = (phantom_study(4, **options, pose=pose) for pose in ((25., 40.), sitk.Euler3DTransform()))
    moved, unmoved = (sitk.GetArrayFromImage(sitk.Resample(one.mri, still.ct, one.truth, sitk.sitkLinear)) for one in (study, still))
    inside = (moved > 0) & (unmoved > 0)
    assert np.corrcoef(moved[inside], unmoved[inside])[0, 1] > .93
    wrong = sitk.GetArrayFromImage(sitk.Resample(study.mri, still.ct, sitk.Euler3DTransform(), sitk.sitkLinear))
    assert np.corrcoef(wrong[inside], unmoved[inside])[0, 1] < .8


def test_error_is_the_mean_distance_in_the_brain(study):
    assert study.error(study.truth) < 1e-9
    shifted = sitk.CompositeTransform([sitk.TranslationTransform(3, (0, 3, 4)), study.truth])
    assert study.error(shifted) == pytest.approx(5)
    assert study.brain.shape == (400, 3)


def test_poses_are_as_far_as_asked():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pose = drawn_pose(rng, 40, 60, centre=(5, 6, 7))
        turn = np.rad2deg(np.arccos((np.trace(np.reshape(pose.GetMatrix(), (3, 3))) - 1) / 2))
        assert turn <= 40 and np.linalg.norm(mapped(pose, (5, 6, 7)) - (5, 6, 7)) <= 60


def test_heads_differ_and_none_is_its_own_mirror_image():
    grid = centred_grid((0, 0, 10), (5, 5, 20), (180, 220, 120))
    points = np.stack([grid.slice_points(index) for index in range(grid.size[2])])
    heads = [head_value(seed, 'T1', points) for seed in range(4)]
    for index, head in enumerate(heads):
        assert np.abs(head - head[..., ::-1]).mean() > .02
        assert all(np.abs(head - other).mean() > .03 for other in heads[:index])


def test_fraction_and_plane_and_contrast():
    coarse = {'ct_spacing': (8, 8, 8), 'mri_spacing': (8, 8, 5)}
    whole, half = (phantom_study(3, **coarse, fraction=share).mri for share in (1., .5))
    assert half.GetSize()[2] == pytest.approx(whole.GetSize()[2] / 2, abs=1)
    top = [image.TransformIndexToPhysicalPoint((0, 0, image.GetSize()[2] - 1))[2] for image in (whole, half)]
    assert top[0] == pytest.approx(top[1])
    sagittal = phantom_study(3, **coarse, plane='sagittal').mri
    assert np.linalg.det(np.reshape(sagittal.GetDirection(), (3, 3))) == pytest.approx(1) and sagittal.GetDirection()[2] == -1
    for wrong in ({'plane': 'oblique'}, {'contrast': 'PET'}, {'contrast': 'CT'}):
        with pytest.raises(ValueError, match='choose one of'):
            phantom_study(3, **coarse, **wrong)


def test_a_written_study_is_read_as_it_was(study, tmp_path):
    write_study(study, tmp_path / 'study')
    ct, mri = (read_scan(tmp_path / 'study' / name) for name in ('ct', 'mri'))
    assert (ct.modality, ct.is_hu, ct.notes) == ('CT', True, []) and (mri.modality, mri.is_hu, mri.notes) == ('MR', False, [])
    assert check_pair(ct, mri) == [] and ct.frame_of_reference != mri.frame_of_reference
    for scan, image, suffix in ((ct, study.ct, 'ct'), (mri, study.mri, 'mri')):
        np.testing.assert_allclose(sitk.GetArrayFromImage(scan.image), sitk.GetArrayFromImage(image), atol=.51)
        nifti = read_scan(tmp_path / 'study' / f'{suffix}.nii.gz').image
        for other in (scan.image, nifti):
            assert other.GetSize() == image.GetSize()
            np.testing.assert_allclose(other.GetOrigin(), image.GetOrigin(), atol=1e-3)
            np.testing.assert_allclose(other.GetDirection(), image.GetDirection(), atol=1e-5)
            np.testing.assert_allclose(other.GetSpacing(), image.GetSpacing(), atol=1e-5)
    assert study.error(sitk.ReadTransform(str(tmp_path / 'study' / 'truth.tfm'))) < 1e-6


@pytest.mark.fault('data scans', 'disk full, or failing')
def test_a_study_is_whole_or_absent(study, tmp_path, monkeypatch):
    monkeypatch.setattr(phantom_volume.sitk, 'WriteTransform', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        write_study(study, tmp_path / 'study')
    assert not list(tmp_path.iterdir())


def test_a_sagittal_study_is_read_as_it_was(tmp_path):
    study = phantom_study(5, ct_spacing=(9, 9, 9), mri_spacing=(6, 6, 8), plane='sagittal')
    write_study(study, tmp_path / 'study')
    scan = read_scan(tmp_path / 'study' / 'mri')
    np.testing.assert_allclose(sitk.GetArrayFromImage(scan.image), sitk.GetArrayFromImage(study.mri), atol=.51)
    np.testing.assert_allclose(scan.image.GetOrigin(), study.mri.GetOrigin(), atol=1e-3)


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ['data', 'scans', '-o', 'demo', '--voxel', '8', '--contrast', 'FLAIR'])
    assert made.exit_code == 0 and 'CT head' in made.stdout and 'MR FLAIR' in made.stdout and 'whole' in made.stdout
    again = CliRunner().invoke(app, ['data', 'scans', '-o', 'demo', '--voxel', '8'])
    assert again.exit_code == 1 and 'name a new folder' in again.stderr
    listed = CliRunner().invoke(app, ['scans', 'demo/ct'])
    assert listed.exit_code == 0 and listed.stdout.splitlines()[1].startswith('1')
    next((tmp_path / 'demo/ct').glob('IM0010')).unlink()
    assert '-p fill_gaps=true' in CliRunner().invoke(app, ['scans', 'demo/ct']).stdout
    assert CliRunner().invoke(app, ['data', 'scans', '-o', 'x', '--contrast', 'PET', '--voxel', '8']).exit_code == 1
