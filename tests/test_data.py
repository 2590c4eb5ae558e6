"""What 02_data.ipynb does not show: unusual names and folders, broken slices, full disks, interrupted fillings and downloads."""
import errno
import json
import os
import pickle
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_little_space
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.utils.data import DataLoader

import medfusion.data as data
from medfusion.data import (CTMRIDataset, audit_split, case_of, check_names, check_sides, check_split, crop_pair,
                            download_harvard, fill_dataset, harvard_split, inspect_dataset, names_in_part, plan_split, prepare_dataset,
                            recorded_files, split_by_case, split_files, write_split_info)
from medfusion.files import list_pairs, read_image, read_json, sha256_of, to_float, write_image


some = settings(suppress_health_check=list(HealthCheck))    # how many, and which, conftest.py says


def noise(seed=0, shape=(24, 20), dtype=np.uint8):
    return np.random.default_rng(seed).integers(1, np.iinfo(dtype).max, shape).astype(dtype)


def make_flat(folder, cases=('1', '2', '16', '20'), slices=2, shape=(24, 24)):
    "A flat CT/ + MRI/ folder of noise."
    for seed, modality in enumerate(('CT', 'MRI')):
        (folder / modality).mkdir(parents=True)
        for case in cases:
            for index in range(slices):
                image = noise((seed, int(case), index), shape)
                write_image(folder / modality / f'{case}{index:03d}.png', image)
    return folder


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*'))


@pytest.fixture
def flat(tmp_path):
    return make_flat(tmp_path / 'flat')


# --- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, case', [('34010.png', '34'), ('2005.tif', '2'), ('patient7_012.png', 'patient7_'),
                                        ('a.b010.png', 'a.b'), ('010.png', '010'), ('head.png', 'head')])
def test_case_of(name, case):
    assert case_of(name) == case


def test_names_that_tell_the_case():
    for names in (['34010.png', '35010.png', '2005.png'], [f'{case}{index:03d}.png' for case in (1, 2) for index in (0, 5)],
                  ['patient034_001.png', 'patient035_001.png'], ['p1_0500.png', 'p1_0501.png'], ['0950.png']):
        check_names(names)
    for names, sentence in ((['p1_0999.png', 'p1_1000.png'], 'p1_0999.png and p1_1000.png in here may be slices of one'),
                            (['p_1950.png', 'p_2001.png'], 'of one patient or of two'),
                            (['0500.png', '1500.png'], '0500.png and 1500.png'),
                            (['34010.png', 'pA_s1.png'], 'The case of pA_s1.png in here cannot be told'),
                            (['001.png', '002.png'], 'The case of 001.png')):
        with pytest.raises(ValueError, match=sentence):
            check_names(names, where='here')
        check_names(names, lambda name: name[0])  # a rule of one's own is taken at its word


def test_one_case_in_two_unicode_forms():
    assert case_of('Jos\u00e9010.png') == case_of('Jose\u0301011.png')


# --- the data set ----------------------------------------------------------------------------------------------------

def test_items(flat):
    dataset = CTMRIDataset(flat / 'CT', flat / 'MRI')
    assert len(dataset) == 8 and dataset.cases == ['1', '2', '16', '20'] and len(list(dataset)) == 8
    item = dataset[0]
    assert item['name'] == '1000.png' == dataset.names[0] and item['case'] == '1'
    for modality in ('ct', 'mri'):
        expected = to_float(read_image(flat / modality.upper() / '1000.png'))
        assert item[modality].dtype == torch.float32 and np.array_equal(item[modality][0], expected)
    assert repr(dataset) == 'CTMRIDataset: 8 pairs of 24×24 pixels, cases 1, 2, 16, 20'
    assert '<img' in dataset._repr_html_()


def test_depths_may_differ_within_a_pair(flat):
    for image, name in ((noise(1, (24, 24), np.uint16), 'CT/1000.png'), (noise(2, (24, 24, 3)), 'MRI/1000.png')):
        write_image(flat / name, image)
    item = CTMRIDataset(flat / 'CT', flat / 'MRI', cases=[1])[0]
    assert item['ct'].shape == item['mri'].shape == (1, 24, 24)
    assert torch.equal(item['ct'][0] * 65535, torch.from_numpy(noise(1, (24, 24), np.uint16).astype(np.float32)))


def test_cases_restrict(flat):
    assert CTMRIDataset(flat / 'CT', flat / 'MRI', cases=['20', 2]).cases == ['2', '20']
    for cases, sentence in ((['2', '3'], 'case 3 has no slice'), ([], 'an empty list of cases')):
        with pytest.raises(ValueError, match=f'{sentence}.* are 1, 2, 16, 20'):
            CTMRIDataset(flat / 'CT', flat / 'MRI', cases=cases)
    first_letter = CTMRIDataset(flat / 'CT', flat / 'MRI', cases=['2'], case_of=lambda name: name[0])
    assert first_letter.names == ['2000.png', '20000.png', '20001.png', '2001.png']


def test_two_sizes_in_a_pair(flat):
    write_image(flat / 'MRI/2001.png', noise(1, (24, 26)))
    with pytest.raises(ValueError, match=r'CT/2001\.png is 24×24 pixels and .*MRI/2001\.png is 24×26;'):
        CTMRIDataset(flat / 'CT', flat / 'MRI')


def test_a_broken_slice_is_found_before_training(flat):
    content = (flat / 'CT/20001.png').read_bytes()
    for broken, sentence in ((content[:-30], 'truncated'), (b'', 'is empty'), (b'hello', 'not an image')):
        (flat / 'CT/20001.png').write_bytes(broken)
        with pytest.raises(ValueError, match=rf'CT/20001\.png .*{sentence}'):
            CTMRIDataset(flat / 'CT', flat / 'MRI')


def test_a_black_slice_is_a_warning(flat):
    write_image(flat / 'MRI/2001.png', np.zeros((24, 24), np.uint8))
    with pytest.warns(UserWarning, match=r'MRI/2001\.png is all black'):
        dataset = CTMRIDataset(flat / 'CT', flat / 'MRI')
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # said once, not every epoch
        assert all(item['ct'].max() > 0 for item in dataset)


def coordinates(folder, shape):
    "A flat folder whose CT holds the row and whose MRI the column of each pixel."
    for modality, image in zip(('CT', 'MRI'), np.mgrid[:shape[0], :shape[1]].astype(np.uint8)):
        (folder / modality).mkdir(parents=True)
        write_image(folder / modality / '1000.png', image)
    return folder / 'CT', folder / 'MRI'


@pytest.mark.filterwarnings('ignore:.*nearly black')
@pytest.mark.parametrize('shape, crop, expected', [((30, 30), None, (30, 30)), ((30, 22), None, (30, 22)),
                                                   ((30, 22), 16, (16, 16)), ((31, 33), (16, 20), (16, 20)),
                                                   ((31, 33), (31, 33), (31, 33))])
def test_augmentation_keeps_the_pair_together(tmp_path, shape, crop, expected):
    dataset = CTMRIDataset(*coordinates(tmp_path, shape), augment=True, crop=crop)
    seen = set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        row, column = ((dataset[0][modality][0] * 255).round().int() for modality in ('ct', 'mri'))
        assert row.shape == expected
        assert row.min() % 2 == 0 and column.min() % 2 == 0
        assert len(set(zip(row.flatten().tolist(), column.flatten().tolist()))) == row.numel()
        seen.add((row[0, 0].item(), column[0, 0].item(), row[0, 1].item()))
    corners = 8 if expected[0] == expected[1] else 4
    assert len(seen) >= corners if crop in (None, (31, 33)) else len(seen) > corners


@pytest.mark.filterwarnings('ignore:.*nearly black')
def test_crop_without_augmentation_is_the_middle(tmp_path):
    dataset = CTMRIDataset(*coordinates(tmp_path, (31, 33)), crop=16)
    assert (dataset[0]['ct'] * 255).round()[0, 0, 0] == 6 and (dataset[0]['mri'] * 255).round()[0, 0, 0] == 8
    with pytest.raises(ValueError, match=r'A window of 40×40 does not fit into .*CT/.*\.png of 31×33; choose a smaller crop \(crop=31\)'):
        CTMRIDataset(*(tmp_path / modality for modality in ('CT', 'MRI')), crop=40)
    for crop in (0, 4.5, 'x', (8, 8, 8), (-8, 8), True + 0.5):
        with pytest.raises(ValueError, match='A crop is a whole number of pixels'):
            crop_pair(noise(), noise(), crop)


def test_augmentation_depends_on_seed_epoch_and_index_alone(flat):
    def epoch(number, seed=0, order=range(8)):
        dataset = CTMRIDataset(flat / 'CT', flat / 'MRI', augment=True, crop=16, seed=seed)
        dataset.set_epoch(number)
        items = {i: dataset[i]['ct'] for i in order}
        return torch.stack([items[i] for i in range(8)])
    assert torch.equal(epoch(3), epoch(3, order=reversed(range(8))))
    assert not torch.equal(epoch(3), epoch(4)) and not torch.equal(epoch(3), epoch(3, seed=1))
    dataset = CTMRIDataset(flat / 'CT', flat / 'MRI', augment=True)
    assert torch.equal(dataset[-1]['ct'], dataset[7]['ct'])
    with pytest.raises(IndexError):
        dataset[8]


def test_a_share_of_the_crops_comes_from_another_scanner(flat):
    def epochs(vary):
        dataset = CTMRIDataset(flat / 'CT', flat / 'MRI', augment=True, crop=16, vary=vary)
        for epoch in range(5):
            dataset.set_epoch(epoch)
            yield torch.stack([torch.cat([item['ct'], item['mri']]) for item in dataset])
    never, often, always = (list(epochs(vary)) for vary in (0, 0.3, 1))
    assert all(map(torch.equal, often, epochs(0.3)))  # by seed, epoch and index alone
    assert not torch.equal(never[0], always[0]) and all(one.shape == (8, 2, 16, 16) for one in always)
    assert all(0 <= one.min() and one.max() <= 1 for one in always)
    for wrong in ({'vary': 0.3}, {'vary': 0.3, 'crop': 16}, {'vary': 1.5, 'augment': True, 'crop': 16}, {'vary': 0.3, 'augment': True, 'crop': (16, 16)}):
        with pytest.raises(ValueError, match='vary is .* needs augment and a crop'):
            CTMRIDataset(flat / 'CT', flat / 'MRI', **wrong)


def test_a_share_of_the_crops_shows_slices_of_others(flat):
    white = np.ones((20, 24), np.float32)

    def names(share, others=[(white, white)]):
        dataset = CTMRIDataset(flat / 'CT', flat / 'MRI', augment=True, crop=16, others=others, share=share)
        for epoch in range(5):
            dataset.set_epoch(epoch)
            for item in dataset:
                assert item['ct'].shape == item['mri'].shape == (1, 16, 16) and (item['ct'].min() == 1) == (item['name'] == 'of others')
                assert bool(item['case']) == (item['name'] in dataset.names)
                yield item['name']
    never, often, always = (list(names(share)) for share in (0, 0.3, 1))
    assert 'of others' not in never and set(always) == {'of others'} and 4 < often.count('of others') < 24 and often == list(names(0.3))  # 40 draws: 12, give or take 2.9
    assert len(dict.fromkeys(often)) == 9  # each of the eight slices is still seen
    for wrong in ({'share': 0.3}, {'share': 0.3, 'others': []}, {'share': -1}, {'share': 0.3, 'others': [(white[:12], white[:12])]}):
        with pytest.raises(ValueError, match='share is .* other slices of its size'):
            CTMRIDataset(flat / 'CT', flat / 'MRI', augment=True, crop=16, **wrong)


def test_running_workers_learn_of_the_epoch(flat):
    dataset = CTMRIDataset(flat / 'CT', flat / 'MRI', augment=True, crop=16)
    loader = DataLoader(dataset, batch_size=8, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        from_worker = next(iter(loader))['ct']
        assert torch.equal(from_worker, torch.stack([item['ct'] for item in dataset]))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_slices_are_read_once_while_there_is_room(tmp_path, monkeypatch, dtype):
    for modality in ('CT', 'MRI'):
        (tmp_path / modality).mkdir()
        for index in range(3):
            write_image(tmp_path / modality / f'1{index:03d}.png', noise((index,), (20, 24), dtype))
    dataset = CTMRIDataset(tmp_path / 'CT', tmp_path / 'MRI')
    items, pairs = [dataset[i] for i in range(3)], dataset.pairs
    monkeypatch.setattr(data, 'read_pair', lambda pair, *more, **options: pytest.fail(f'{pair.name} is read again'))
    for again, item in zip(dataset, items):
        item['ct'].zero_()  # what a caller does to an item does not reach the next one
        assert torch.equal(again['ct'], torch.from_numpy(to_float(read_image(tmp_path / 'CT' / item['name'])))[None])
    monkeypatch.undo()
    bytes_of_two = 2 * 2 * 20 * 24 * np.dtype(dtype).itemsize
    assert list(data.read_pairs(pairs, room=bytes_of_two)[1]) == [0, 1]
    dataset._kept.clear()
    assert torch.equal(dataset[2]['ct'], dataset[2]['mri'])  # without room it is read when it is asked for


def test_slices_of_different_sizes_need_a_crop_or_batches_of_one(flat):
    for modality in ('CT', 'MRI'):
        write_image(flat / modality / '2000.png', noise(1, (32, 20)))
    dataset = CTMRIDataset(flat / 'CT', flat / 'MRI')
    assert dataset.sizes == [(24, 24), (32, 20)] and '24×24, 32×20' in repr(dataset)
    assert len(list(DataLoader(dataset, batch_size=1))) == 8
    assert len(list(DataLoader(CTMRIDataset(flat / 'CT', flat / 'MRI', crop=16), batch_size=8))) == 1


def test_a_data_set_can_be_pickled(flat):
    dataset = CTMRIDataset(flat / 'CT', flat / 'MRI')
    assert pickle.loads(pickle.dumps(dataset)).names == dataset.names


# --- splits and records ----------------------------------------------------------------------------------------------

def test_split_by_case():
    cases = ['20', '2', '16', '1', '2', '20']
    split = split_by_case(cases, val=1, test=1, seed=3)
    assert split == split_by_case(sorted(cases), val=1, test=1, seed=3)
    assert sorted(sum(split.values(), [])) == sorted(set(cases))
    assert [len(split[part]) for part in ('train', 'val', 'test')] == [2, 1, 1]
    assert len({str(split_by_case(cases, seed=seed)) for seed in range(30)}) > 5
    assert split_by_case(cases, val=0, test=0) == {'train': ['1', '2', '16', '20'], 'val': [], 'test': []}
    for val, test in ((2, 2), (-1, 1), (5, 0)):
        with pytest.raises(ValueError, match='4 cases of here cannot give'):
            split_by_case(cases, val, test, where='here')
    with pytest.raises(ValueError, match=r'^1 case cannot give .* \(val=0, test=0\), or add patients'):
        split_by_case(['1', '1'])
    with pytest.raises(ValueError, match='A seed is 0 or more, not -1'):
        split_by_case(cases, seed=-1)


@pytest.fixture
def dataset(flat, tmp_path):
    return prepare_dataset(flat, tmp_path / 'Dataset')


def test_prepare_dataset(flat, dataset):
    info = check_split(dataset)
    assert set(info) == {'format', 'rule', 'seed', 'source', 'cases', 'held_out', 'files'}
    assert info['seed'] == 0 and info['source'] == 'flat' and 'case' in info['rule']
    assert info['cases'] == split_by_case(['1', '2', '16', '20']) and len(info['files']) == 16
    for name in info['files']:
        part, modality, file = name.split('/')
        assert (dataset / name).read_bytes() == (flat / modality / file).read_bytes()
        assert case_of(file) in info['cases'][part]
    assert CTMRIDataset(dataset / 'train/CT', dataset / 'train/MRI').cases == info['cases']['train']


def test_a_given_split(flat, tmp_path):
    split = {'train': ['1'], 'val': ['2'], 'test': ['16'], 'held_out': ['20', '21']}
    info = check_split(prepare_dataset(flat, tmp_path / 'Dataset', split))
    assert info['cases'] == {part: split[part] for part in ('train', 'val', 'test')}
    assert info['held_out'] == ['20', '21'] and '20' not in {entry['case'] for entry in info['files'].values()}
    for bad, sentence in (({'train': ['1'], 'val': ['2'], 'test': ['16']}, 'Case 20 of .* is in no part'),
                          ({**split, 'val': ['2', '3']}, 'holds no slice of case 3'),
                          ({**split, 'held_out': ['20', '2']}, 'Case 2 is on two sides'),
                          ({**split, 'val': ['1', '2']}, 'Case 1 is on two sides in the split: train and val'),
                          ({'trian': ['1'], 'val': ['2'], 'test': ['16', '20']}, "'trian' .* did you mean 'train'"),
                          ({**split, 'test': '16'}, "The part 'test' of the split is '16'; give a list")):
        with pytest.raises(ValueError, match=sentence):
            prepare_dataset(flat, tmp_path / 'Other', bad)
    assert tree(tmp_path / 'Dataset') and not (tmp_path / 'Other').exists()


def test_names_that_do_not_tell_the_case(tmp_path):
    for modality in ('CT', 'MRI'):
        (tmp_path / 'flat' / modality).mkdir(parents=True)
        for name in ('ann-1.png', 'ann-2.png', 'bob-1.png', 'cy-1.png'):
            write_image(tmp_path / 'flat' / modality / name, noise())
    with pytest.raises(ValueError, match=r'The case of ann-1\.png in .* cannot be told'):
        prepare_dataset(tmp_path / 'flat', tmp_path / 'Dataset')
    root = prepare_dataset(tmp_path / 'flat', tmp_path / 'Dataset', case_of=lambda name: name.split('-')[0])
    assert sorted(sum(check_split(root)['cases'].values(), [])) == ['ann', 'bob', 'cy']


def test_prepare_leaves_nothing_behind_when_a_slice_is_broken(flat, tmp_path):
    (flat / 'MRI/20001.png').write_bytes((flat / 'MRI/20001.png').read_bytes()[:-40])
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='MRI/20001.png is truncated'):
        prepare_dataset(flat, tmp_path / 'Dataset')
    assert tree(tmp_path) == before


def edit(root, **changes):
    path = root / 'split_info.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_check_split_notices(dataset):
    record = json.loads((dataset / 'split_info.json').read_text())
    name = next(name for name in record['files'] if name.startswith('train'))
    content = (dataset / name).read_bytes()

    def complaint(error=ValueError):
        with pytest.raises(error) as caught:
            check_split(dataset)
        return str(caught.value)

    (dataset / name).unlink()
    assert f'{dataset / name} is missing' in complaint()
    (dataset / name).write_bytes(content + b'\0')
    assert f'{dataset / name} and its SHA-256 in split_info.json do not agree' in complaint()
    (dataset / name).write_bytes(content)
    (dataset / 'test/MRI/99001.png').write_bytes(content)
    assert f'{dataset / "test/MRI/99001.png"} is not listed' in complaint()
    (dataset / 'test/MRI/99001.png').unlink()
    train, val = record['cases']['train'], record['cases']['val']
    edit(dataset, cases={**record['cases'], 'val': val + train[:1]})
    assert f'Case {train[0]} is on two sides' in complaint()
    edit(dataset, cases=record['cases'], held_out=train[:1])
    assert f'Case {train[0]} is on two sides' in complaint()
    edit(dataset, held_out=[], cases={**record['cases'], 'train': train[1:]})
    assert f'belongs to case {train[0]}' in complaint()
    edit(dataset, **record)
    assert check_split(dataset) == record
    (dataset / 'split_info.json').write_text('{"format": "medfusion-spl')
    assert 'is not JSON' in complaint()
    (dataset / 'split_info.json').write_text('[]')
    assert 'holds no JSON object' in complaint()
    for wrong in ({'format': 1}, {'cases': ['1']}, {'cases': {'train': '12'}}, {'cases': {'trian': ['1']}}, {'held_out': None},
                  {'files': []}, {'files': {'train/CT/1000.png': 'sha'}}, {'files': {'../x.png': record['files'][name]}},
                  {'files': {name: {'case': '1', 'sha256': 'x'}}}):
        (dataset / 'split_info.json').write_text(json.dumps({**record, **wrong}))
        assert 'split_info.json' in complaint() and 'anew' in complaint()
        assert any('split_info.json' in problem for problem in inspect_dataset(dataset).problems)
    (dataset / 'split_info.json').unlink()
    assert 'There is no' in complaint(FileNotFoundError)


def test_a_case_on_two_sides_is_not_recorded(tmp_path):
    for part, name in (('train', '7001.png'), ('test', '7002.png')):
        for modality in ('CT', 'MRI'):
            (tmp_path / part / modality).mkdir(parents=True)
            write_image(tmp_path / part / modality / name, noise())
    with pytest.raises(ValueError, match='Case 7 is on two sides'):
        write_split_info(tmp_path, rule='by hand')
    assert not (tmp_path / 'split_info.json').exists()
    with pytest.raises(ValueError, match='no folder train, val or test'):
        write_split_info(tmp_path / 'train', rule='by hand')


def test_labels_are_part_of_the_record(tmp_path):
    for folder in ('train/CT', 'train/MRI', 'train/labels'):
        (tmp_path / folder).mkdir(parents=True)
        write_image(tmp_path / folder / '7001.png', noise())
    assert 'train/labels/7001.png' in write_split_info(tmp_path, rule='by hand')['files']
    (tmp_path / 'train/labels/7001.png').unlink()
    with pytest.raises(ValueError, match='is missing'):
        check_split(tmp_path)


# --- whatever a record may hold ---------------------------------------------------------------------------------------

ANYTHING = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@some
@given(st.sampled_from(['format', 'rule', 'seed', 'source', 'cases', 'held_out', 'files', 'train', 'entry', 'all']), ANYTHING)
def test_a_record_that_was_changed_is_a_sentence(tmp_path, key, value):
    root = tmp_path / 'Dataset'
    if not root.exists():
        prepare_dataset(make_flat(tmp_path / 'flat', slices=1), root)
        (tmp_path / 'good.json').write_bytes((root / 'split_info.json').read_bytes())
    record = read_json(tmp_path / 'good.json')
    if key == 'train':
        record['cases']['train'] = value
    elif key == 'entry':
        record['files'][next(iter(record['files']))] = value
    else:
        record = value if key == 'all' else {**record, key: value}
    (root / 'split_info.json').write_text(json.dumps(record))
    report = inspect_dataset(root)
    try:
        check_split(root)
    except ValueError as error:
        assert 'split_info.json' in str(error) or 'on two sides' in str(error)
        assert str(error) in report.problems
    else:
        assert report.problems == []


@some
@given(st.dictionaries(st.sampled_from(['train', 'val', 'test', 'held_out', 'Train']), ANYTHING, max_size=4))
def test_a_split_is_whole_or_refused(split):
    try:
        checked = check_sides(split)
    except ValueError as error:
        assert str(error)
    else:
        members = [case for part in checked.values() for case in set(part)]
        assert len(members) == len(set(members)) and set(checked) == set(split)


@some
@given(st.lists(st.text('ab12', min_size=1, max_size=3), max_size=12), st.integers(-1, 4), st.integers(-1, 4), st.integers(0, 99))
def test_every_case_is_on_one_side(cases, val, test, seed):
    if min(val, test) < 0 or val + test >= len(set(cases)):
        with pytest.raises(ValueError, match='cannot give'):
            split_by_case(cases, val, test, seed)
        return
    split = split_by_case(cases, val, test, seed)
    assert sorted(sum(split.values(), [])) == sorted(set(cases)) and len(split['val']) == val and len(split['test']) == test


# --- filling a folder ------------------------------------------------------------------------------------------------

def test_a_filled_folder_is_refused(flat, tmp_path):
    root = tmp_path / 'Dataset'
    root.mkdir()
    (root / 'README.md').write_text('keep me')
    (root / '.gitkeep').touch()
    (root / 'notes.txt').write_text('mine')
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r'Dataset is not empty \(it holds notes\.txt\)'):
        prepare_dataset(flat, root)
    assert tree(tmp_path) == before
    (root / 'notes.txt').unlink()
    check_split(prepare_dataset(flat, root))
    assert (root / 'README.md').read_text() == 'keep me' and (root / '.gitkeep').exists()
    with pytest.raises(FileExistsError, match='split_info.json, test, train, val'):
        prepare_dataset(flat, root)


def test_a_file_in_the_folders_place(flat, tmp_path):
    (tmp_path / 'Dataset').write_text('a file')
    for replace in (False, True):
        with pytest.raises(FileExistsError, match='is a file where the data set folder should be'):
            prepare_dataset(flat, tmp_path / 'Dataset', replace=replace)
    assert (tmp_path / 'Dataset').read_text() == 'a file'


def test_replacing_takes_what_our_record_lists_and_nothing_else(flat, dataset, tmp_path):
    make_flat(dataset / 'CT-MRI', cases=('5', '6', '7'))
    for name in ('train/src/important.py', 'train/CT/notes.txt', 'train/CT/Thumbs.db', 'mine.txt'):
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_text('mine')
    prepare_dataset(dataset / 'CT-MRI', dataset, replace=True)
    assert sorted(sum(check_split(dataset)['cases'].values(), [])) == ['5', '6', '7']
    assert len(list_pairs(dataset / 'CT-MRI/CT', dataset / 'CT-MRI/MRI')) == 6
    for name in ('train/src/important.py', 'train/CT/notes.txt', 'train/CT/Thumbs.db', 'mine.txt'):
        assert (dataset / name).read_text() == 'mine'
    with pytest.raises(ValueError, match='lies in the data set that would be replaced'):
        prepare_dataset(dataset / 'train', dataset, replace=True)
    assert not [name for name in tree(tmp_path) if '.tmp' in name]


def test_somebody_elses_folder_of_that_name_stays(flat, tmp_path):
    for name in ('train/src/important.py', 'val.txt', 'train/figure.svg'):
        (tmp_path / 'proj' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'proj' / name).write_text('mine')
    with pytest.raises(FileExistsError, match='is not empty'):
        prepare_dataset(flat, tmp_path / 'proj')
    for _ in range(2):
        check_split(prepare_dataset(flat, tmp_path / 'proj', replace=True))
        assert (tmp_path / 'proj/train/src/important.py').read_text() == 'mine' and (tmp_path / 'proj/val.txt').exists()


def test_slices_that_our_record_does_not_list_are_not_replaced(flat, dataset, tmp_path):
    write_image(dataset / 'train/CT/99001.png', noise())
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r'does not list \(train/CT/99001\.png\); move them away first'):
        prepare_dataset(flat, dataset, replace=True)
    (dataset / 'train/CT/99001.png').unlink()
    (dataset / 'split_info.json').unlink()  # without a record nothing is ours
    with pytest.raises(FileExistsError, match='does not list .*, ...'):
        prepare_dataset(flat, dataset, replace=True)
    assert tree(tmp_path) == [name for name in before if name not in ('Dataset/train/CT/99001.png', 'Dataset/split_info.json')]
    with pytest.raises(FileExistsError, match='is no folder for a data set'):
        prepare_dataset(flat, '/', replace=True)


@pytest.mark.fault('data', 'disk full, or failing', points=7)
def test_a_failed_replacement_leaves_the_old_data_set(flat, dataset, tmp_path, monkeypatch):
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), fill_dataset(dataset, replace=True) as folder:
        (folder / 'train').mkdir()
        raise RuntimeError
    assert tree(tmp_path) == before and check_split(dataset)
    move, calls = data.shutil.move, []
    for fatal in (1, 5, 16, 17, 20, 32, 33):  # 16 files go out, 17 come in

        def fails(source, target):
            calls.append(source)
            if len(calls) == fatal:
                raise PermissionError('not today')
            return move(source, target)
        calls.clear()
        monkeypatch.setattr(data.shutil, 'move', fails)
        with pytest.raises(PermissionError):
            prepare_dataset(flat, dataset, replace=True, seed=9)
        assert tree(tmp_path) == before and check_split(dataset)['seed'] == 0
    fresh = tmp_path / 'Fresh'
    calls[:] = [None] * 30
    with pytest.raises(PermissionError):
        prepare_dataset(flat, fresh)
    assert not [path for path in tree(fresh)]


@pytest.mark.fault('data', 'killed between two writes', points=4)
def test_a_killed_replacement_can_be_done_again(flat, dataset, tmp_path):
    (dataset / 'train/CT/notes.txt').write_text('mine')
    for after in (3, 16, 20, 32):
        child = os.fork()
        if child == 0:  # dies among the moves, without a chance to clean up
            move, calls = data.shutil.move, []

            def dies(source, target):
                calls.append(source)
                return os._exit(9) if len(calls) > after else move(source, target)
            data.shutil.move = dies
            prepare_dataset(flat, dataset, replace=True, seed=3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        with pytest.raises(ValueError, match=r'was being filled when that was cut short; fill it again'):
            check_split(dataset)
        assert set(recorded_files(dataset)) == set(split_files(dataset))  # what is there is known as ours
        assert [name for name in tree(tmp_path) if '.tmp' in name]
        with pytest.raises(FileExistsError):
            prepare_dataset(flat, dataset)
        check_split(prepare_dataset(flat, dataset, replace=True))
        assert not [name for name in tree(tmp_path) if '.tmp' in name]  # the dead one's scratch folder neither
        assert (dataset / 'train/CT/notes.txt').read_text() == 'mine'


@pytest.mark.fault('data', 'several at once', points=4)
def test_two_fillings_of_one_folder(flat, tmp_path):
    children = []
    for seed in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                prepare_dataset(flat, tmp_path / 'Dataset', replace=True, seed=seed)
            except FileExistsError:  # in a sentence: there was a moment with slices and no record
                os._exit(7)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 7} and 0 in codes
    assert check_split(tmp_path / 'Dataset')['seed'] in [seed for seed, code in enumerate(codes) if code == 0]
    assert not list(tmp_path.glob('.*'))


@pytest.mark.fault('data', 'disk full, or failing')
def test_no_space_left_for_a_data_set(tmp_path):
    source, root = make_flat(tmp_path / 'flat', shape=(99, 99)), tmp_path / 'new/Dataset'
    before = tree(tmp_path)
    message = in_little_space(prepare_dataset, source, root)
    assert message == ("[Errno 27] Cannot fill the data set (File too large), and nothing was left half-written: "
                       f"'{root}'")
    assert tree(tmp_path) == before


def test_a_folder_of_ones_own_in_one_of_others_is_filled(flat, tmp_path, monkeypatch):
    "As a volume of a container, above which nothing can be written: the new data set grew there, and was refused."
    (tmp_path / 'others/mine').mkdir(parents=True)
    real = Path.mkdir

    def refuse(path, *arguments, **more):
        if path.parent == tmp_path / 'others' and not path.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *arguments, **more)
    monkeypatch.setattr(Path, 'mkdir', refuse)
    for seed in (0, 1):
        assert check_split(prepare_dataset(flat, tmp_path / 'others/mine', replace=bool(seed), seed=seed))['seed'] == seed
    assert [path.name for path in (tmp_path / 'others').iterdir()] == ['mine'] and not list((tmp_path / 'others/mine').glob('.*'))
    with pytest.raises(PermissionError, match='Cannot fill the data set .Permission denied.*others/new'):
        prepare_dataset(flat, tmp_path / 'others/new')


def test_new_parents_are_made_only_on_success(flat, tmp_path):
    root = tmp_path / 'a/b/Dataset'
    with pytest.raises(RuntimeError), fill_dataset(root):
        raise RuntimeError
    assert not (tmp_path / 'a').exists()
    check_split(prepare_dataset(flat, root))


def test_somebody_elses_data_set_is_not_overrun(tmp_path):
    with pytest.raises(FileExistsError), fill_dataset(tmp_path / 'Dataset') as folder:
        (folder / 'train').mkdir()
        (tmp_path / 'Dataset/val').mkdir(parents=True)  # another process was quicker
    assert tree(tmp_path) == ['Dataset', 'Dataset/val']


# --- links and clutter -------------------------------------------------------------------------------------------------

def test_a_data_set_of_links_is_the_data_set(dataset, tmp_path):
    plain = inspect_dataset(dataset)
    for part in ('train', 'val', 'test'):  # every folder on another disk
        for modality in ('CT', 'MRI'):
            (tmp_path / 'disk' / part).mkdir(parents=True, exist_ok=True)
            (dataset / part / modality).rename(tmp_path / 'disk' / part / modality)
            (dataset / part / modality).symlink_to(tmp_path / 'disk' / part / modality)
    assert check_split(dataset)
    linked = inspect_dataset(dataset)
    assert linked.problems == [] and linked.files.equals(plain.files) and repr(linked) == repr(plain)
    (tmp_path / 'blobs').mkdir()
    for number, path in enumerate(sorted((tmp_path / 'disk').rglob('*.png'))):  # and every file in a store of blobs
        path.rename(tmp_path / 'blobs' / f'{number:04x}')
        path.symlink_to(tmp_path / 'blobs' / f'{number:04x}')
    assert check_split(dataset) and inspect_dataset(dataset).files.equals(plain.files)
    assert CTMRIDataset(dataset / 'train/CT', dataset / 'train/MRI').cases == check_split(dataset)['cases']['train']
    again = prepare_dataset(tmp_path / 'flat', dataset, replace=True)  # replaces through the links
    assert check_split(again) and (dataset / 'train/CT').is_symlink()


def test_names_that_tell_their_kind_belong_to_the_case_of_their_pair(tmp_path):
    for part, case in (('train', 1), ('val', 2), ('test', 3)):
        for kind in ('CT', 'MRI'):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in (0, 1):
                write_image(tmp_path / part / kind / f'{case}00{number}_{kind}.png', noise(number))
    assert set(inspect_dataset(tmp_path).files.case) == {'1', '2', '3'}
    write_split_info(tmp_path, 'by hand')
    assert check_split(tmp_path)['cases'] == {'train': ['1'], 'val': ['2'], 'test': ['3']}
    os.rename(tmp_path / 'test/MRI/3001_MRI.png', tmp_path / 'test/MRI/1001_MRI.png'), os.rename(tmp_path / 'test/CT/3001_CT.png', tmp_path / 'test/CT/1001_CT.png')
    assert any('Case 1 is on two sides: train and test' in problem for problem in inspect_dataset(tmp_path).problems)


def test_a_pair_of_two_formats_is_not_copied_under_one_name(tmp_path):
    for kind, ending in (('CT', 'png'), ('MRI', 'tif')):
        (tmp_path / 'from' / kind).mkdir(parents=True)
        for case in (1, 2, 3):
            write_image(tmp_path / 'from' / kind / f'{case}001_{kind}.{ending}', noise(case))
    with pytest.raises(ValueError, match='1001_CT.png and .*1001_MRI.tif have two endings, .* convert one of them'):
        prepare_dataset(tmp_path / 'from', tmp_path / 'to')
    assert not (tmp_path / 'to' / 'train').exists()


def test_links_in_a_circle(dataset):
    (dataset / 'train/CT/again').symlink_to(dataset / 'train')
    assert check_split(dataset) and inspect_dataset(dataset).problems == []


def test_clutter_stops_nothing(flat, dataset):
    for folder in (*flat.iterdir(), *dataset.glob('*/*')):
        for name in ('Thumbs.db', '.DS_Store', '._1000.png', 'README.txt'):
            (folder / name).write_text('clutter')
    assert inspect_dataset(dataset).problems == [] and check_split(dataset)
    assert inspect_dataset(flat).problems == [] and len(CTMRIDataset(flat / 'CT', flat / 'MRI')) == 8
    check_split(prepare_dataset(flat, dataset, replace=True))


def test_a_record_from_a_system_that_writes_names_otherwise(flat, tmp_path):
    for modality in ('CT', 'MRI'):
        for path in sorted((flat / modality).iterdir()):
            path.rename(path.with_name('M\u00e4rz' + path.name))
    root = prepare_dataset(flat, tmp_path / 'Dataset')
    for path in sorted(root.rglob('*.png')):
        path.rename(path.with_name(path.name.replace('M\u00e4rz', 'Ma\u0308rz')))  # as a Mac would
    assert check_split(root) and inspect_dataset(root).problems == []


def test_twelve_bits_in_sixteen(flat, tmp_path):
    for path in (flat / 'CT').iterdir():
        write_image(path, noise(1, (24, 24)).astype(np.uint16) * 16)
    with pytest.warns(UserWarning, match=r'CT: the largest value is 4064 of 65535.*value_range=\(0, 4095\)') as said:
        CTMRIDataset(flat / 'CT', flat / 'MRI')
    assert len(said) == 1  # not one for each slice
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dataset = CTMRIDataset(flat / 'CT', flat / 'MRI', value_range=(0, 4080))
    assert torch.allclose(dataset[0]['ct'], torch.from_numpy(to_float(noise(1, (24, 24)))), atol=1e-6)
    assert torch.equal(dataset[0]['mri'][0], torch.from_numpy(to_float(read_image(flat / 'MRI/1000.png'))))  # 8 bits stay
    dataset._kept.clear()
    assert dataset[0]['ct'].max() > 0.9  # read again, with the range
    problem, = inspect_dataset(flat).problems
    assert problem.startswith('CT in all: the largest value is 4064 of 65535') and '--range 0,4095' in problem
    assert inspect_dataset(flat, value_range=(0, 4095)).problems == []
    assert inspect_dataset(flat, value_range=(0, 65535)).problems == []     # it was told to say 0,0.0622 of what is in a range already


# --- the download ----------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path, monkeypatch):
    "A loopback server with a small tree like the public one; `.requests`, `.broken` (names answered badly)."
    site = tmp_path / 'site'
    make_flat(site / 'CT-MRI', cases=sum(harvard_split().values(), []), slices=1)
    names = [name for name in tree(site) if name.endswith('.png')]
    registry = {'repository': 'nobody/nothing', 'commit': 'c0ffee',
                'sha256': {name: sha256_of(site / name) for name in names}}
    monkeypatch.setattr(data, 'harvard_registry', lambda: registry)
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # pooch waits before it tries again

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip('/')
            self.server.requests.append(name)
            fault = self.server.broken.get(name)
            if fault is None:
                return super().do_GET()
            if fault == 500:
                return self.send_error(500)
            content = (site / name).read_bytes()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-20] if fault == 'cut' else content[:-20] + bytes(20))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(site)))
    server.names, server.requests, server.broken = names, [], {}
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_download(server, tmp_path, capsys):
    root = download_harvard(tmp_path / 'Dataset', tmp_path / 'cache', server.url)
    info = check_split(root)
    assert {**info['cases'], 'held_out': info['held_out']} == harvard_split()
    assert info['source'] == 'github.com/nobody/nothing at c0ffee' and len(info['files']) == 2 * 8
    assert not any(case_of(name) in ('16', '21') for name in tree(root) if name.endswith('.png'))
    assert sorted(server.requests) == server.names
    captured = capsys.readouterr()
    assert captured.out == f'Harvard slices: all 20 files are in {tmp_path / "cache"}, verified.\n' and not captured.err
    with pytest.raises(FileExistsError):
        download_harvard(root, tmp_path / 'cache', server.url + '/')
    check_split(download_harvard(root, tmp_path / 'cache', server.url, replace=True, progress=False))
    assert len(server.requests) == 20 and capsys.readouterr() == ('', '')  # nothing is fetched twice


@pytest.mark.fault('data', 'a server that fails')
@pytest.mark.parametrize('fault', [500, 'cut', 'changed'])
def test_download_goes_on_where_it_stopped(server, tmp_path, fault):
    server.broken[server.names[7]] = fault
    with pytest.raises(OSError, match='could not be fetched, after 7 of 20 files .*run it again') as caught:
        download_harvard(tmp_path / 'Dataset', tmp_path / 'cache', server.url)
    assert server.names[7] in str(caught.value)
    assert not (tmp_path / 'Dataset').exists() and not list(tmp_path.glob('.Dataset*'))
    assert not (tmp_path / 'cache' / server.names[7]).exists()
    server.broken.clear()
    server.requests.clear()
    check_split(download_harvard(tmp_path / 'Dataset', tmp_path / 'cache', server.url))
    assert server.requests == server.names[7:]


def test_a_spoilt_cache_is_noticed(server, tmp_path):
    download_harvard(tmp_path / 'Dataset', tmp_path / 'cache', server.url)
    server.requests.clear()
    (tmp_path / 'cache' / server.names[3]).write_bytes(b'spoilt')
    check_split(download_harvard(tmp_path / 'Other', tmp_path / 'cache', server.url))
    assert server.requests == [server.names[3]]


def test_no_server(tmp_path):
    with pytest.raises(OSError, match='after 0 of 368 files'):
        download_harvard(tmp_path / 'Dataset', tmp_path / 'cache', 'http://127.0.0.1:9')
    assert not (tmp_path / 'Dataset').exists()


def test_an_impatient_user(flat, tmp_path, monkeypatch):
    "Ctrl-C while the data set is being arranged leaves no half of it."
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt  # what Python makes of Ctrl-C; the signal itself is ignored where a shell says so

    monkeypatch.setattr(data, 'write_split_info', interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(flat, tmp_path / 'Dataset')
    assert os.listdir(tmp_path) == ['flat']


def test_the_shipped_registry():
    registry = data.harvard_registry()
    assert len(registry['sha256']) == 368 and all(len(digest) == 64 for digest in registry['sha256'].values())
    names = {modality: {name.split('/')[-1] for name in registry['sha256'] if f'/{modality}/' in name}
             for modality in ('CT', 'MRI')}
    assert names['CT'] == names['MRI'] and len(names['CT']) == 184
    assert {case_of(name) for name in names['CT']} == set(sum(harvard_split().values(), []))


@pytest.mark.skipif(not (Path(__file__).parents[1] / '../shared/harvard').is_dir(), reason='no ../shared/harvard here')
def test_real_slices(tmp_path):
    source = Path(__file__).parents[1] / '../shared/harvard'
    info = check_split(prepare_dataset(source, tmp_path / 'Dataset', harvard_split()))
    assert {**info['cases'], 'held_out': info['held_out']} == harvard_split() and len(info['files']) == 2 * 149
    registry = data.harvard_registry()['sha256']
    for name, entry in info['files'].items():
        assert entry['sha256'] == registry['CT-MRI/' + name.split('/', 1)[1]]


# --- the inspector ---------------------------------------------------------------------------------------------------

def test_inspect_a_good_data_set(dataset):
    report = inspect_dataset(dataset)
    assert report.problems == [] and report.duplicates == [] and report.black == [] and len(report.files) == 16
    assert f'Data set {dataset}' in repr(report) and 'no problems' in repr(report)
    assert '24×24 pixels; 8 bit grey' in repr(report)


def test_inspect_a_flat_folder_with_every_trouble(flat):
    (flat / 'CT/1001.png').unlink()
    (flat / 'MRI/2000.png').write_bytes(b'')
    write_image(flat / 'MRI/2001.png', noise(1, (24, 26), np.uint16))
    write_image(flat / 'CT/2001.png', noise(1, (24, 24, 3)))
    write_image(flat / 'CT/16000.png', np.zeros((24, 24), np.uint8))
    (flat / 'CT/20000.png').write_bytes((flat / 'CT/20001.png').read_bytes())
    report = inspect_dataset(flat)
    text = '\n'.join(report.problems)
    assert 'MRI/2000.png is empty' in text and 'MRI slice 1001.png has no CT slice' in text
    assert '2001.png in all has two sizes, 24×24 and 24×26' in text and len(report.problems) == 3
    assert report.black == ['CT/16000.png'] and report.duplicates == [['CT/20000.png', 'CT/20001.png']]
    assert all(depth in repr(report) for depth in ('8 bit grey', '8 bit RGB', '16 bit grey'))


def test_inspect_finds_a_case_on_two_sides_and_a_changed_file(dataset):
    info = check_split(dataset)
    name = f'{info["cases"]["train"][0]}000.png'
    for modality in ('CT', 'MRI'):
        write_image(dataset / 'test' / modality / name, noise(1, (24, 24)))
    text = '\n'.join(inspect_dataset(dataset).problems)
    assert f'Case {info["cases"]["train"][0]} is on two sides: train and test' in text
    assert 'is not listed in split_info.json' in text


def test_inspect_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / 'none'):
        with pytest.raises(FileNotFoundError, match='holds no slices'):
            inspect_dataset(folder)


# --- leaks -----------------------------------------------------------------------------------------------------------

def test_audit_of_a_split():
    train = ['34010.png', '34012.png', '2005.png', 'CT/2006.png']
    clean = audit_split(train, ['41010.png', '41011.png'])
    assert not clean.leaks and (clean.train, clean.test) == (4, 2) and 'No case is on both sides' in str(clean)
    leaky = audit_split(train, ['34011.png', '34014.png', '34020.png', '2005.tif', '41001.png'])
    assert leaky.leaks and leaky.cases == ['2', '34']
    assert leaky.of_case == ['34011.png', '34014.png', '34020.png', '2005.tif']
    assert leaky.near == ['34011.png', '2005.tif'] and leaky.nearly == ['34011.png', '34014.png', '2005.tif']
    assert '4 of 5 test slices are of a case that is in training too (case 2, 34), 2 have' in str(leaky)


def test_the_rule_of_an_audit_can_be_replaced():
    rule = r'(?P<slice>\d+)-of-(?P<case>\w+)'
    assert audit_split(['7-of-ann.png'], ['8-of-ann.png'], rule).near == ['8-of-ann.png']
    for wrong, sentence in ((None, 'The case and the number of 7-of-ann.png cannot be told'), (r'(\w+', 'is no rule'), (r'(.+)', 'is no rule'),
                            (r'(?P<case>\d+)-(?P<slice>.+)', 'is no rule')):
        with pytest.raises(ValueError, match=sentence):
            audit_split(['7-of-ann.png'], ['8-of-ann.png'], wrong)


def test_names_of_a_part(flat, tmp_path):
    names = ['1000.png', '1001.png']
    for file, text in (('a.txt', '1000.png\n\n1001.png\n'), ('a.csv', 'name,more\n1000.png,1\n1001.png,2\n'), ('a.json', json.dumps(names)),
                       ('b.json', json.dumps({'train': ['2000.png'], 'test': names}))):
        (tmp_path / file).write_text(text)
        assert names_in_part(tmp_path / file, 'test') == names
    assert names_in_part(flat, 'test') == names_in_part(flat / 'MRI', 'test')
    for file, text in (('c.json', '{}'), ('c.csv', 'file\n1000.png\n'), ('c.txt', '')):
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=f'{file} lists no slices for test'):
            names_in_part(tmp_path / file, 'test')


@pytest.mark.parametrize('file, content', [('a.json', b'["1000.png", '), ('a.json', b'[' * 100_000), ('a.csv', b''), ('a.csv', b'name\n1\n1,2,3\n'),
                                           ('a.csv', b'name\n"1000.png'), ('a.csv', b'\x89PNG\r\n\x1a\n\0'), ('a.png', b'\x89PNG\r\n\x1a\n\0'),
                                           ('a.txt', '1000.png'.encode('utf-16')), ('a.txt', '1000.png'.encode('utf-16-le'))])
def test_a_list_that_cannot_be_read(file, content, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf'{file} lists no slices for test \([^)]+.*; give a folder of slices'):
        names_in_part(tmp_path / file, 'test')


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    for file, text in (('a.txt', '1000.png'), ('a.csv', 'name\n1000.png\n'), ('a.json', '["1000.png"]')):
        (tmp_path / file).write_text(text, encoding='utf-8-sig')
        assert names_in_part(tmp_path / file, 'test') == ['1000.png']


def test_of_a_filling_that_is_stopped_no_folder_is_left(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, 'exchange_files', stopped)
    with pytest.raises(KeyboardInterrupt), data.fill_dataset(tmp_path / 'new' / 'Dataset') as folder:
        (folder / 'train').mkdir()
    assert not list(tmp_path.iterdir())


def test_a_split_that_is_given_for_names_that_tell_no_case_is_warned_of():
    "By the rule P1-11 and P1-12 are two cases, and one patient may lie on both sides."
    names = ['P1-11.png', 'P1-12.png', 'P2-11.png']
    with pytest.warns(UserWarning, match='The case of P1-11.png in mine cannot be told from its name; read as they are, one patient may lie on two sides'):
        plan_split(names, 'mine', {'train': ['P1-11', 'P2-11'], 'test': ['P1-12']})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan_split(['1011.png', '2011.png'], 'mine', {'train': ['1'], 'test': ['2']})
        plan_split(names, 'mine', {'train': ['P1'], 'test': ['P2']}, case_of=lambda name: name[:2])
