"What the pages of the phantom cannot show: many sizes, seeds and cases, bad arguments, and that its pixels stay."
from itertools import product

import cv2
import numpy as np
import pytest

from medfusion.anatomy import label_names
from medfusion.data import CTMRIDataset, case_of, check_split
from medfusion.files import read_image, to_depth
from medfusion.metrics import lesion_contrast
from medfusion.phantom import phantom_slice, phantom_slices, write_phantom

LESIONS = 'calcification', 'haemorrhage', 'oedema', 'tumour'


@pytest.fixture(scope='module')
def default_slices():
    "The 96 slices of the default data set, at the smallest size that is painted as it is."
    return list(phantom_slices(size=160))


@pytest.mark.parametrize('size', [64, (97, 71), 159, 160, (161, 200)])
def test_any_size(size):
    shape = (size, size) if isinstance(size, int) else size
    for index in (0, 7):
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
    first = {key: phantom_slice(*key, size=192) for key in product((1, 2), (0, 3))}
    cv2.setNumThreads(1)
    try:
        for key, cut in reversed(first.items()):
            again = phantom_slice(*key, size=192)
            for part in ('ct', 'mri', 'labels'):
                assert np.array_equal(getattr(cut, part), getattr(again, part)), (key, part)
    finally:
        cv2.setNumThreads(threads)


@pytest.mark.parametrize('case, index, size, ct, mri, counts', [
    (1, 4, 256, 0.20747, 0.19198, [6030, 8348, 7157]),
    (2, 0, 192, 0.18762, 0.13278, [3354, 1091, 252]),
    (5, 6, 64, 0.17487, 0.13034, [341, 501, 156]),
    (12, 3, (97, 71), 0.18397, 0.1371, [539, 643, 713])])
def test_pixels_stay_what_they_were(case, index, size, ct, mri, counts):
    "Recorded numbers rest on the phantom's pixels. Other CPUs round otherwise, which moves single pixels of a label."
    cut = phantom_slice(case, index, size=size)
    assert abs(cut.ct.mean() - ct) < 2e-4 and abs(cut.mri.mean() - mri) < 2e-4
    for name, count in zip(('skull', 'grey matter', 'white matter'), counts):
        assert abs((cut.labels == list(label_names().values()).index(name)).sum() - count) <= 3 + .002 * count


def test_numbers_of_numpy_are_numbers():
    "As of an array of indices, or of sizes."
    plain, other = phantom_slice(2, 4, size=(70, 200)), phantom_slice(*np.array([2, 4]), size=np.array([70, 200]), slices=np.int64(8), seed=np.int64(0))
    assert np.array_equal(plain.ct, other.ct) and np.array_equal(plain.mri, other.mri) and plain.name == other.name
    assert np.array_equal(phantom_slice(2, np.int64(4), size=np.int64(160)).mri, phantom_slice(2, 4, size=160).mri)


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
        corner[:10, :10] = corner[:10, -10:] = True
        assert (cut.ct[corner] == 0).all() and (cut.mri[corner] * 255).mean() < 6, cut.name
        brain = np.isin(cut.labels, [names['grey matter'], names['white matter']])
        assert 70 < np.median(cut.ct[brain]) * 255 < 135, cut.name
        assert np.median(cut.ct[cut.labels == names['skull']]) > .95, cut.name


def test_every_part_shows_all_lesions(default_slices):
    seen = {}
    for cut in default_slices:
        numbers = [number for number in np.unique(cut.labels) if (cut.labels == number).sum() >= 5]
        seen.setdefault(cut.case, set()).update({label_names()[number] for number in numbers} & set(LESIONS))
    assert len(seen) == 12 and all(seen.values())
    assert seen['9'] | seen['10'] == seen['11'] | seen['12'] == set(LESIONS)


@pytest.mark.parametrize('seed', (1, 2))
def test_other_seeds_show_all_lesions_in_test(seed):
    seen = {label_names()[number] for case, index in product((11, 12), range(1, 7))
            for number in np.unique(phantom_slice(case, index, size=160, seed=seed).labels)}
    assert set(LESIONS) <= seen


def test_ct_sees_two_kinds_and_mri_the_others(default_slices):
    found = {lesion: [] for lesion in LESIONS}
    for cut in default_slices:
        table = lesion_contrast(cut.ct, cut.mri, cut.ct, cut.labels)
        for row in table.itertuples():
            if (cut.labels == list(label_names().values()).index(row.lesion)).sum() > 24:
                found[row.lesion].append((row.ct, row.mri))
    for lesion, values in found.items():
        ct, mri = np.median(values, axis=0)
        assert (ct > mri) == (lesion in ('calcification', 'haemorrhage')), (lesion, ct, mri)
        assert max(ct, mri) > 2, (lesion, ct, mri)


@pytest.mark.parametrize('arguments, words', [
    (dict(case=1, index=0, size=63), 'too small'), (dict(case=1, index=0, size=(64, 32)), 'too small'),
    (dict(case=1, index=8), 'no slice 8'), (dict(case=1, index=-1), 'no slice -1'),
    (dict(case=0, index=0), 'no case 0')])
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        phantom_slice(**arguments)


def test_write_phantom(tmp_path):
    root = write_phantom(tmp_path / 'Dataset', cases=6, slices=2, size=(64, 72), seed=3)
    assert check_split(root)['cases'] == {'train': ['1', '2', '3', '4'], 'val': ['5'], 'test': ['6']}
    dataset = CTMRIDataset(root / 'train' / 'CT', root / 'train' / 'MRI')
    assert len(dataset) == 8 and case_of(dataset.names[0]) == dataset[0]['case'] == '1'
    cut = phantom_slice(6, 1, slices=2, size=(64, 72), seed=3)
    assert np.array_equal(read_image(root / 'test' / 'CT' / cut.name), to_depth(cut.ct, np.uint8))
    assert np.array_equal(read_image(root / 'test' / 'labels' / cut.name, quiet=True), cut.labels)


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
