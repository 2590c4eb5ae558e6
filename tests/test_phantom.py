"What the pages of 01_phantom cannot show: many sizes, seeds and cases, speed, and bad arguments."
import time
from itertools import product

import cv2
import numpy as np
import pytest
import torch

from medfusion.data import CTMRIDataset, case_of, check_split
from medfusion.files import read_image, to_depth
from medfusion.anatomy import label_names
from medfusion.losses import LesionCrops, LesionTerm, lesion_loss
from medfusion.metrics import contrast_to_noise, lesion_contrast
from medfusion.phantom import phantom_slice, phantom_slices, write_phantom

LESIONS = 'calcification', 'haemorrhage', 'oedema', 'tumour'


@pytest.fixture(scope='module')
def default_slices():
    "The 96 slices of the default data set."
    return [phantom_slice(case, index) for case in range(1, 13) for index in range(8)]


@pytest.mark.parametrize('size', [64, 65, (64, 80), (97, 71), 159, 160, (161, 200), 384])
def test_any_size(size):
    shape = (size, size) if isinstance(size, int) else size
    for index in (0, 4, 7):
        cut = phantom_slice(3, index, size=size)
        for image in (cut.ct, cut.mri):
            assert image.shape == shape and image.dtype == np.float32
            assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
        assert cut.labels.shape == shape and cut.labels.dtype == np.uint8
        assert set(np.unique(cut.labels)) <= set(label_names())


def test_same_head_at_every_size():
    large, small = phantom_slice(2, 4, size=384), phantom_slice(2, 4, size=128)
    shrunk = cv2.resize(large.mri, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(shrunk.ravel(), small.mri.ravel())[0, 1] > .95


def test_reproducible_in_any_order_and_thread_count():
    threads = cv2.getNumThreads()
    first = {key: phantom_slice(*key, size=192) for key in product((1, 2, 3), (0, 3))}
    cv2.setNumThreads(1)
    try:
        for key, cut in reversed(first.items()):
            again = phantom_slice(*key, size=192)
            for part in ('ct', 'mri', 'labels'):
                assert np.array_equal(getattr(cut, part), getattr(again, part)), (key, part)
    finally:
        cv2.setNumThreads(threads)


def test_seed_case_and_index_matter():
    cuts = [phantom_slice(1, 4, size=96), phantom_slice(2, 4, size=96), phantom_slice(1, 4, size=96, seed=1),
            phantom_slice(1, 5, size=96)]
    for one, other in zip(cuts, cuts[1:]):
        assert not np.array_equal(one.ct, other.ct) and not np.array_equal(one.labels, other.labels)


def test_anatomy_does_not_depend_on_the_number_of_cases():
    cut = [cut for cut in phantom_slices(cases=2, slices=4, size=64)][5]
    assert np.array_equal(cut.ct, phantom_slice(2, 1, slices=4, size=64).ct)


def test_neighbouring_slices_are_alike():
    skulls = [phantom_slice(5, index, slices=60, size=96).labels == 3 for index in (30, 31, 45)]
    overlap = [(skulls[0] & other).sum() / (skulls[0] | other).sum() for other in skulls[1:]]
    assert overlap[0] > .8 > overlap[1]


def test_backgrounds_and_grey_levels(default_slices):
    names = {name: number for number, name in label_names().items()}
    for cut in default_slices:
        corner = np.zeros(cut.ct.shape, bool)
        corner[:16, :16] = corner[:16, -16:] = True
        assert (cut.ct[corner] == 0).all() and (cut.mri[corner] * 255).mean() < 6, cut.name
        brain = np.isin(cut.labels, [names['grey matter'], names['white matter']])
        assert 70 < np.median(cut.ct[brain]) * 255 < 135, cut.name
        assert np.median(cut.ct[cut.labels == names['skull']]) > .95, cut.name


def test_every_part_shows_all_lesions(default_slices):
    seen = {}
    for cut in default_slices:
        numbers = [number for number in np.unique(cut.labels) if (cut.labels == number).sum() >= 12]
        seen.setdefault(cut.case, set()).update({label_names()[number] for number in numbers} & set(LESIONS))
    assert len(seen) == 12 and all(seen.values())
    assert seen['9'] | seen['10'] == seen['11'] | seen['12'] == set(LESIONS)


@pytest.mark.parametrize('seed', range(1, 6))
def test_other_seeds_show_all_lesions_in_test(seed):
    seen = {label_names()[number] for case, index in product((11, 12), range(1, 7))
            for number in np.unique(phantom_slice(case, index, size=160, seed=seed).labels)}
    assert set(LESIONS) <= seen


def test_ct_sees_two_kinds_and_mri_the_others(default_slices):
    found = {lesion: [] for lesion in LESIONS}
    for cut in default_slices:
        table = lesion_contrast(cut.ct, cut.mri, cut.ct, cut.labels)
        for row in table.itertuples():
            if (cut.labels == list(label_names().values()).index(row.lesion)).sum() > 60:
                found[row.lesion].append((row.ct, row.mri))
    for lesion, values in found.items():
        ct, mri = np.median(values, axis=0)
        assert (ct > mri) == (lesion in ('calcification', 'haemorrhage')), (lesion, ct, mri)
        assert max(ct, mri) > 2, (lesion, ct, mri)


def test_fast_enough():
    phantom_slice(1, 0)
    start = time.process_time()
    for index in range(8):
        phantom_slice(4, index)
    assert time.process_time() - start < 10 * 8 / 96          # 96 slices in 10 s


@pytest.mark.parametrize('arguments, words', [
    (dict(case=1, index=0, size=63), 'too small'), (dict(case=1, index=0, size=(64, 32)), 'too small'),
    (dict(case=1, index=8), 'no slice 8'), (dict(case=1, index=-1), 'no slice -1'),
    (dict(case=0, index=0), 'no case 0')])
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        phantom_slice(**arguments)


def test_contrast_to_noise_by_hand():
    labels = np.full((256, 256), 8, np.uint8)
    labels[100:140, 100:140] = 17
    image = np.indices(labels.shape).sum(0) % 2 * .2          # a chequerboard: mean 0.1, standard deviation 0.1
    image[labels == 17] = .6
    assert np.isclose(contrast_to_noise(image, labels, 'tumour'), 5, rtol=1e-2)
    assert np.isclose(contrast_to_noise(2 * image + 3, labels, 'tumour'), contrast_to_noise(image, labels, 'tumour'))
    assert np.isclose(contrast_to_noise(torch.from_numpy(image)[None, None], torch.from_numpy(labels), 'tumour'), 5, rtol=1e-2)
    assert np.isnan(contrast_to_noise(image, labels, 'oedema'))
    assert np.isnan(contrast_to_noise(image, np.full_like(labels, 17), 'tumour'))
    assert np.isnan(contrast_to_noise(np.zeros(labels.shape), labels, 'tumour'))
    with pytest.raises(ValueError, match='not a kind of lesion'):
        contrast_to_noise(image, labels, 'cyst')


def test_lesion_contrast_table():
    cut = phantom_slice(12, 4)
    table = lesion_contrast(cut.ct, cut.mri, cut.ct, cut.labels)
    assert list(table.columns) == ['lesion', 'ct', 'mri', 'fused', 'kept'] and len(table) >= 1
    assert np.allclose(table['kept'], table['fused'] / table[['ct', 'mri']].max(axis=1))
    empty = lesion_contrast(cut.ct, cut.mri, cut.ct, np.zeros_like(cut.labels))
    assert list(empty.columns) == list(table.columns) and len(empty) == 0


def test_write_phantom(tmp_path):
    root = write_phantom(tmp_path / 'Dataset', cases=6, slices=2, size=(64, 72), seed=3)
    assert check_split(root)['cases'] == {'train': ['1', '2', '3', '4'], 'val': ['5'], 'test': ['6']}
    dataset = CTMRIDataset(root / 'train' / 'CT', root / 'train' / 'MRI')
    assert len(dataset) == 8 and case_of(dataset.names[0]) == dataset[0]['case'] == '1'
    cut = phantom_slice(6, 1, slices=2, size=(64, 72), seed=3)
    assert np.array_equal(read_image(root / 'test' / 'CT' / cut.name), to_depth(cut.ct, np.uint8))
    assert np.array_equal(read_image(root / 'test' / 'labels' / cut.name), cut.labels)


def test_write_phantom_replaces_only_when_told(tmp_path):
    write_phantom(tmp_path, cases=3, slices=1, size=64)
    with pytest.raises(FileExistsError):
        write_phantom(tmp_path, cases=3, slices=1, size=64)
    write_phantom(tmp_path, cases=4, slices=1, size=64, replace=True)
    assert check_split(tmp_path)['cases']['train'] == ['1', '2']


def test_too_few_cases(tmp_path):
    with pytest.raises(ValueError, match='3 or more'):
        write_phantom(tmp_path / 'new', cases=2, slices=1, size=64)
    assert not (tmp_path / 'new').exists()


@pytest.fixture(scope='module')
def crops():
    return LesionCrops(size=48, cases=4, slices=4)


def test_lesion_crops_hold_a_lesion_and_its_surroundings(crops):
    drawn = crops.draw(32, torch.Generator().manual_seed(0))
    assert {name: tuple(part.shape) for name, part in drawn.items()} == dict.fromkeys(drawn, (32, 1, 48, 48))
    assert all(0 <= part.min() and part.max() <= 1 for part in drawn.values())
    assert (drawn['lesion'].sum((1, 2, 3)) > 0).all() and (drawn['lesion'] * drawn['ring']).max() == 0
    assert (drawn['ring'].sum((1, 2, 3)) > 0).float().mean() > .9


@pytest.mark.parametrize('arguments, words', [
    (dict(size=300), 'Crops of 300 pixels'), (dict(cases=0), 'None of the 0 × 6 slices')])
def test_lesion_crops_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        LesionCrops(**arguments)


def test_lesion_crops_follow_the_random_states_that_a_run_saves(crops):
    torch.manual_seed(3)
    one, other = crops.draw(4), crops.draw(4)
    torch.manual_seed(3)
    again = crops.draw(4)
    assert all((one[name] == again[name]).all() for name in one) and (one['ct'] != other['ct']).any()


def test_lesion_loss_has_finite_gradients_also_on_constant_images(crops):
    drawn = crops.draw(4, torch.Generator().manual_seed(1))
    for fused in (torch.zeros_like(drawn['ct']), torch.ones_like(drawn['ct']), drawn['ct'].clone()):
        loss = lesion_loss(fused.requires_grad_(), **drawn)
        loss.backward()
        assert 0 <= loss <= 1 and fused.grad.isfinite().all()
    empty = dict.fromkeys(drawn, torch.zeros(1, 1, 16, 16))
    assert lesion_loss(torch.rand(1, 1, 16, 16), **empty).isfinite()


def test_lesion_term_validates_on_the_same_crops_and_trains_on_others():
    class Brighter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, ct, mri):
            return self.gain * torch.maximum(ct, mri)

    term, model = LesionTerm(cases=3), Brighter()
    model.eval()
    assert term(model) == term(model)
    model.train()
    assert len({float(term(model).detach()) for _ in range(4)}) == 4
