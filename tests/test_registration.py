"""Registration beyond its notebook: other poses, mirrors and other heads; transforms as other programs write them."""
import numpy as np
import pytest

pytest.importorskip('SimpleITK')
from medfusion.phantom_volume import phantom_study
from medfusion.registration import (
    ScanPyramid,
    distance_between,
    graded,
    half_disagreement,
    head_mask,
    judge,
    looks_like_ct,
    mirrored,
    moved,
    pose_of,
    quarter_turns,
    read_transform,
    register,
    rigid,
    search_pose,
    shrunk,
    starting_poses,
    thickness,
    write_transform,
)
from medfusion.scans import sitk
from medfusion.studies import mri_limits

COARSE = {'ct_spacing': (3., 3., 4.), 'mri_spacing': (3., 3., 5.)}


@pytest.fixture(scope='module')
def study():
    return phantom_study(11, pose=(12., 15.), **COARSE)


def turned(image, truth, matrix):
    "The image as if its head had lain turned by a matrix in the scanner, and the truth for it."
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([(count - 1) / 2 for count in image.GetSize()]))
    other = sitk.Image(image)
    other.SetDirection((matrix @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    other.SetOrigin((matrix @ (np.array(image.GetOrigin()) - middle) + middle).tolist())
    return other, rigid(sitk.CompositeTransform([pose_of(matrix, middle, middle), truth]))


@pytest.mark.long
def test_refining_a_nudged_pose_finds_the_truth_and_the_same_bits(study):
    nudge = pose_of(np.eye(3), (0, 0, 0), (5, -4, 3))
    start = rigid(sitk.CompositeTransform([study.truth, nudge]))
    found = register(study.ct, study.mri, start=start)
    assert study.error(start) > 5 and study.error(found.transform) < 1 and found.verdict == 'good' and not found.starts
    assert register(study.ct, study.mri, start=start).transform.GetParameters() == found.transform.GetParameters()


@pytest.mark.long
def test_a_head_that_lay_turned_by_180_degrees_is_found(study):
    mri, truth = turned(study.mri, study.truth, np.diag([-1., 1., -1.]))
    pose, tried = search_pose(ScanPyramid.of(study.ct, mri))
    assert distance_between(pose, truth, study.brain) < 2
    assert tried[0][1] > 1.15 * min(value for _, value in tried[:6])


@pytest.mark.long
def test_a_ct_that_reaches_from_the_chest_to_the_crown(study):
    "Shoulders below the head draw its centre of mass by 150 mm into the chest."
    values, step = sitk.GetArrayFromImage(study.ct), study.ct.GetSpacing()
    rows, columns = ((np.arange(count) - count / 2) * mm for count, mm in zip(values.shape[1:], step[1::-1]))
    below = np.full((50, *values.shape[1:]), -1000, np.float32)
    for depth, picture in enumerate(below[::-1]):
        wide = min(60 + 1.2 * max(0, depth * step[2] - 20), 118)
        picture[(rows[:, None] / min(wide, 90)) ** 2 + (columns / wide) ** 2 < 1] = 40
    ct = sitk.GetImageFromArray(np.concatenate([below, values]))
    ct.CopyInformation(sitk.Image(ct.GetSize(), sitk.sitkFloat32))
    ct.SetSpacing(step), ct.SetDirection(study.ct.GetDirection())
    ct.SetOrigin(study.ct.TransformIndexToPhysicalPoint((0, 0, -50)))
    pyramid = ScanPyramid.of(ct, study.mri)
    pose, _ = search_pose(pyramid)
    assert distance_between(pose, study.truth, study.brain) < 2
    assert np.median(half_disagreement(pyramid, pose)) < 4


@pytest.mark.long
def test_a_mirrored_mri_is_not_called_good(study):
    seen = mirrored(study.mri, moved(study.truth, study.brain.mean(0)[None])[0], (1, 0, 0))
    found = register(study.ct, seen, start=study.truth)
    assert found.verdict != 'good' and 'left and right' in found.sentence


@pytest.mark.long
def test_halves_of_a_wrong_pose_disagree(study):
    pyramid = ScanPyramid.of(study.ct, study.mri)
    wrong = pose_of(quarter_turns()[7], study.brain.mean(0), moved(study.truth, study.brain.mean(0)[None])[0])
    assert np.median(half_disagreement(pyramid, study.truth)) < 4 < np.median(half_disagreement(pyramid, wrong))


@pytest.mark.parametrize('value', [1e7, -300, -1e7])
def test_single_voxels_far_beyond_all_others_change_nothing_else(study, value):
    spike = study.mri + 0
    spike[20, 20, 10] = value
    heads = [sitk.GetArrayFromImage(head_mask(shrunk(graded(image), 4))) > 0 for image in (spike, study.mri)]
    assert (heads[0] != heads[1]).mean() < .002        # of -300 all of its volume was taken for a head
    plain, clamped = sitk.GetArrayFromImage(study.mri), sitk.GetArrayFromImage(graded(spike))
    assert np.array_equal(sitk.GetArrayFromImage(graded(study.mri)), plain)
    assert (clamped != plain).sum() == 1 and np.ptp(clamped) < 3 * np.ptp(plain)


def test_an_mri_of_signed_values_is_no_ct(study):
    "Real and phase-sensitive inversion recovery reach far below 0."
    signed = sitk.Cast(study.mri, sitk.sitkFloat32) * 4 - 2000
    assert looks_like_ct(signed)
    plain, of_signed = (ScanPyramid.of(study.ct, image) for image in (study.mri, signed))
    assert np.array_equal(of_signed.mri_points, plain.mri_points)
    np.testing.assert_allclose(sitk.GetArrayFromImage(of_signed.mri[4]), sitk.GetArrayFromImage(plain.mri[4]) * 4 - 2000, atol=.1)
    np.testing.assert_allclose(mri_limits(signed), np.array(mri_limits(study.mri)) * 4 - 2000, atol=.5)


def test_what_is_said_where_halves_fail_names_a_stripped_mri():
    signs = {'halves_mm': 20., 'mirror_ratio': .97, 'seen_share': 1., 'seen_mm': 100.}
    assert 'without scalp and skull' in judge(signs)[1][0] and 'without scalp' not in judge(signs | {'halves_mm': 5.})[1][0]
    stretched = dict.fromkeys(('stretch_rows', 'stretch_columns', 'stretch_slices'), -.25)      # as measured of one: a brain is smaller than a head
    assert judge(signs | stretched)[1][-1].startswith('if both scans are of one head, with scalp and skull, one of the two headers may tell a wrong spacing')
    assert judge(signs | stretched | {'halves_mm': 5.})[1][-1].startswith('one of the two headers')


def test_verdicts():
    good = {'halves_mm': 1., 'mirror_ratio': .8, 'seen_share': 1., 'seen_mm': 140.}
    for sign, value, verdict in (('halves_mm', 5., 'doubtful'), ('halves_mm', 9., 'failed'), ('mirror_ratio', .95, 'doubtful'),
                                 ('mirror_ratio', 1.3, 'failed'), ('seen_share', .2, 'doubtful'), ('seen_share', .05, 'failed'), ('seen_mm', 30., 'doubtful'),
                                 ('seen_mm', 0., 'doubtful'), ('stretch_rows', .07, 'doubtful'), ('stretch_columns', -.07, 'doubtful'), ('stretch_slices', -.5, 'doubtful'),
                                 ('stretch_slices', .05, 'good')):
        assert judge(good | {sign: value})[0] == verdict
    assert len(judge({'halves_mm': 9., 'mirror_ratio': 1.3, 'seen_share': .05, 'seen_mm': 9.})[1]) == 4


@pytest.mark.parametrize('factors, told', [((1, 1, 1.06), '% longer in the MRI than in the CT from slice to slice'),
                                           pytest.param((1, 1, .83), '% shorter in the MRI than in the CT from slice to slice', marks=pytest.mark.long),
                                           pytest.param((1.1, 1, 1), '% longer in the MRI than in the CT along the rows', marks=pytest.mark.long)])
def test_a_spacing_that_a_header_tells_wrongly_is_told(study, factors, told):
    "Of slices 6 % too far apart halves agree, and the mirror fits worse."
    mri, middle = sitk.Image(study.mri), study.brain.mean(0)
    mri.SetSpacing(np.multiply(mri.GetSpacing(), factors).tolist())
    place = np.array(mri.GetOrigin()) + factors * (moved(study.truth, middle[None])[0] - mri.GetOrigin())
    found = register(study.ct, mri, start=pose_of(np.reshape(study.truth.GetMatrix(), (3, 3)), middle, place))
    assert found.verdict != 'good' and told in found.sentence


@pytest.mark.parametrize('part', ['whole', pytest.param('MRI', marks=pytest.mark.long), pytest.param('CT', marks=pytest.mark.long)])
def test_no_stretch_is_told_where_spacings_are_right(study, part):
    ct, mri = {'MRI': (study.ct, study.mri[:, :, 12:]), 'CT': (study.ct[:, :, 20:48], study.mri)}.get(part, (study.ct, study.mri))
    found = register(ct, mri, start=study.truth)
    assert 'longer' not in found.sentence and 'shorter' not in found.sentence


@pytest.mark.parametrize('part', ['MRI below', pytest.param('CT above', marks=pytest.mark.long), pytest.param('CT below', marks=pytest.mark.long)])
def test_a_slab_far_from_the_middle_is_found(study, part):
    "Laid into the middle of the other scan it is 70 to 110 mm off; the lowest part of the CT reaches out of the MRI."
    ct = {'CT above': study.ct[:, :, 34:], 'CT below': study.ct[:, :, :19]}.get(part, study.ct)
    pyramid = ScanPyramid.of(ct, study.mri[:, :, 2:12] if part == 'MRI below' else study.mri)
    pose, _ = search_pose(pyramid)
    assert distance_between(pose, study.truth, study.brain) < 4


def test_only_slabs_start_from_more_places(study):
    "A head starts as it always did."
    pyramid = ScanPyramid.of(study.ct, study.mri)
    starts = starting_poses(pyramid)
    assert [number for number, _ in starts] == list(range(24))
    assert all(np.allclose(moved(pose, pyramid.points.mean(0)[None])[0], pyramid.mri_points.mean(0)) for _, pose in starts)
    assert len(starting_poses(ScanPyramid.of(study.ct[:, :, :19], study.mri))) > 72


@pytest.mark.parametrize('swap', [pytest.param(False, marks=pytest.mark.long), True])
def test_a_thin_slab_is_never_called_good(study, swap):
    "It lies in the other scan as a whole, and its halves agree where it is millimetres off. It may be the CT that is thin."
    ct, mri = (study.ct[:, :, 30:37], study.mri) if swap else (study.ct, study.mri[:, :, 14:20])
    found = register(ct, mri, start=study.truth)
    assert found.signs['seen_share'] > .9 and 15 < found.signs['seen_mm'] < 35
    assert found.verdict != 'good' and ' mm of the head are seen by both scans' in found.sentence


def test_thickness_is_that_of_the_slab_however_it_lies():
    box = np.random.default_rng(0).uniform((-80, -100, -15), (80, 100, 15), (4000, 3))
    tilted = moved(sitk.VersorRigid3DTransform((1, 2, 3), .7, (30., 40., 50.)), box)
    assert 29 < thickness(box) < 30 and abs(thickness(tilted) - thickness(box)) < .5
    assert thickness(box[:0]) == thickness(box[:3]) == 0


def test_an_image_that_shows_nothing_is_refused(study):
    with pytest.raises(ValueError, match='MRI holds one value'):
        register(study.ct, study.mri * 0)


def test_transforms_of_other_programs(tmp_path):
    versor = sitk.VersorRigid3DTransform((0, 0, 1), .3, (1., 2., 3.), (4., 5., 6.))
    for name in ('slicer.h5', 'slicer.tfm'):
        sitk.WriteTransform(versor, str(tmp_path / name))
        assert np.allclose(read_transform(tmp_path / name).TransformPoint((7., 8., 9.)), versor.TransformPoint((7., 8., 9.)))
    assert sitk.ReadTransform(str(write_transform(tmp_path / 'own.tfm', rigid(versor)))).GetName() == 'VersorRigid3DTransform'
    (tmp_path / 'text.tfm').write_text('no transform')
    with pytest.raises(ValueError, match='no transform'):
        read_transform(tmp_path / 'text.tfm')


@pytest.mark.long
@pytest.mark.parametrize('seed', [21, 22, 23])
def test_any_pose_both_ways_and_another_head(seed):
    study = phantom_study(seed, pose=(40., 60.), contrast=('T1', 'T2', 'FLAIR')[seed % 3], ct_spacing=(1.6, 1.6, 3.2), mri_spacing=(1.5, 1.5, 4.))
    found, back = register(study.ct, study.mri), register(study.mri, study.ct)
    assert study.error(found.transform) < 1 and found.verdict == 'good'
    points = np.array(study.brain)
    apart = np.linalg.norm(moved(back.transform, moved(found.transform, points)) - points, axis=1).mean()
    assert apart < 1e-6 and back.verdict == found.verdict        # the CT is held either way: the same computation
    other = phantom_study(seed + 30, pose=(5., 5.), ct_spacing=(6., 6., 6.), mri_spacing=(1.5, 1.5, 4.))
    assert register(study.ct, other.mri).verdict != 'good'
