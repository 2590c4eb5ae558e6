"""What 21_evaluation.ipynb does not show: files of other depths and kinds, complaints, and the statistics' corners."""
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import peak_memory, write_slices

from medfusion import evaluation as E
from medfusion.baselines import average, maximum
from medfusion.data import CTMRIDataset
from medfusion.files import read_image, to_float, write_image
from medfusion.inference import fuse
from medfusion.metrics import read_table, write_table
from medfusion.phantom import write_phantom


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "The test part of a small synthetic data set."
    test = write_phantom(tmp_path_factory.mktemp('evaluation') / 'Dataset', cases=3, slices=4, size=64) / 'test'
    return CTMRIDataset(test / 'CT', test / 'MRI')


def folders(pairs):
    return pairs.pairs[0].ct.parent, pairs.pairs[0].mri.parent


def slices(path, dtype, suffix='.png', size=(48, 40)):
    "CT and MRI folders with one random pair in them, and its data set."
    rng = np.random.default_rng(0)
    for kind in ('CT', 'MRI'):
        (path / kind).mkdir()
        write_image(path / kind / f'7001{suffix}', rng.integers(0, np.iinfo(dtype).max, size).astype(dtype))
    return CTMRIDataset(path / 'CT', path / 'MRI')


def test_a_network_is_a_method(pairs):
    class Network(torch.nn.Module):
        def forward(self, ct, mri):
            return (ct + mri) / 2
    of_network, of_rule = (E.evaluate(pairs, {'x': method}, ['EN']) for method in (Network().eval(), average))
    assert np.allclose(of_network.EN, of_rule.EN, rtol=1e-6)


def test_folders_give_what_the_data_set_gives(pairs, tmp_path):
    "The reader is the same. (A rule that makes no half-way values: on the way to a file those may be rounded otherwise.)"
    E.write_fused(tmp_path, pairs, E.fuse_pairs(pairs, {'x': maximum})['x'])
    of_files, of_data = E.evaluate_folders(*folders(pairs), tmp_path, columns=['EN', 'VIF']), E.evaluate(pairs, {'x': maximum}, ['EN', 'VIF'])
    assert np.allclose(of_files.EN, of_data.EN, rtol=1e-6) and np.allclose(of_files.VIF, of_data.VIF, rtol=1e-6)
    assert list(of_files.index) == pairs.names


def test_sixteen_bits_stay_sixteen(tmp_path):
    data_set = slices(tmp_path, np.uint16, '.tif')
    [file] = E.write_fused(tmp_path / 'fused', data_set, E.fuse_pairs(data_set, {'x': average})['x'])
    fused, ct = read_image(file), read_image(data_set.pairs[0].ct)
    assert file.name == '7001.png' and fused.dtype == np.uint16 and len(np.unique(fused)) > 1000
    assert E.find_fused(tmp_path / 'fused', data_set) == {'7001.tif': file}, 'found although the suffix is another'
    assert E.evaluate_files(data_set.pairs[0].ct, data_set.pairs[0].mri, file, columns=['SD']).SD.iloc[0] < ct.std() / 257


def test_twelve_bits_in_sixteen_have_a_range_and_one_warning_a_folder(tmp_path):
    "The sources' range is given; the fused image was written over the whole range of its type."
    data_set = slices(tmp_path, np.uint16)
    for path in data_set.pairs[0][1:]:
        write_image(path, read_image(path) // 16)
        write_image(path.with_name('7002.png'), read_image(path, quiet=True))
    [full] = E.write_fused(tmp_path / 'fused', data_set, {'7001.png': torch.rand(1, 1, 48, 40, generator=torch.Generator().manual_seed(0))})
    write_image(full.with_name('7002.png'), read_image(full))
    given = E.evaluate_folders(*folders(data_set), tmp_path / 'fused', columns=['SSIM2'], value_range=(0, 4095))
    with pytest.warns(UserWarning, match='nearly black') as said:
        without = E.evaluate_folders(*folders(data_set), tmp_path / 'fused', columns=['SSIM2'])
    assert len(said) == 2, 'one for the CT folder, one for that of the MRI'
    assert (given.SSIM2 != without.SSIM2).all()


def test_a_pair_is_joined_once(tmp_path):
    for part in ('val', 'test'):
        for kind in ('CT', 'MRI'):
            (tmp_path / part / kind).mkdir(parents=True)
            write_image(tmp_path / part / kind / '1000.png', np.arange(256, dtype=np.uint8).reshape(16, 16))
    for join in (['val'], ['test']):
        with pytest.raises(ValueError, match='Two of the pairs that are joined are called 1000.png; join each part once'):
            E.judged_pairs(tmp_path / 'test/CT', tmp_path / 'test/MRI', join)


@pytest.mark.parametrize('dtype', [np.int16, np.float32, np.uint16])
def test_fused_slices_of_values_with_a_range_are_written_and_compared(tmp_path, dtype):
    for side in ('CT', 'MRI'):
        (tmp_path / side).mkdir()
        cv2.imwrite(str(tmp_path / side / '1001.tif'), np.random.default_rng(len(side)).integers(0, 4095, (32, 40)).astype(dtype))
    slices = E.JoinedPairs(CTMRIDataset(tmp_path / 'CT', tmp_path / 'MRI', value_range=(0, 4095)))
    [path] = E.write_fused(tmp_path / 'others' / 'mine', slices, E.fuse_pairs(slices, {'m': maximum})['m'])
    assert read_image(path).dtype == np.uint16 and E.colour_table(slices, {'m': maximum}) is None
    table = E.evaluate(slices, E.find_external(tmp_path / 'others', slices) | {'m': maximum}, columns=['SSIM255'])
    assert table.SSIM255.iloc[0] == pytest.approx(table.SSIM255.iloc[1], abs=1e-6)


def test_jpegs_of_another_method_are_said(tmp_path):
    "Their compression alone changes EN and SSIM2."
    data_set = slices(tmp_path, np.uint8)
    (tmp_path / 'fused').mkdir()
    write_image(tmp_path / 'fused' / '7001.jpg', np.zeros((48, 40), np.uint8))
    with pytest.warns(UserWarning, match='fused holds 1 JPEG file, such as 7001.jpg: their compression alone changes the metrics'):
        E.find_fused(tmp_path / 'fused', data_set)


def damaged(path):
    "A JPEG that stops half-way."
    data = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 255, (48, 40), np.uint8))[1].tobytes()
    path.with_suffix('.jpg').write_bytes(data[:len(data) // 2])


def deep(path):
    "A TIFF of 32-bit integers."
    from PIL import Image
    Image.fromarray(np.full((48, 40), 70000, np.int32)).save(path.with_suffix('.tif'))


@pytest.mark.parametrize('write, words', [(damaged, 'truncated'), (deep, '32')])
def test_what_cannot_be_read_rightly_is_refused_in_folders_too(tmp_path, write, words):
    data_set = slices(tmp_path, np.uint8)
    (tmp_path / 'fused').mkdir()
    write(tmp_path / 'fused' / '7001')
    with pytest.raises(ValueError, match=words):
        E.evaluate_folders(*folders(data_set), tmp_path / 'fused')


def test_a_folder_needs_both_sources_one_size_and_one_file_a_pair(tmp_path):
    data_set, fused = slices(tmp_path, np.uint8), tmp_path / 'fused'
    fused.mkdir()
    write_image(fused / '7001.png', np.zeros((48, 48), np.uint8))
    with pytest.raises(ValueError, match='differ in size: .*7001.png has 48×48'):
        E.evaluate_folders(*folders(data_set), fused)
    with pytest.raises(ValueError, match='48 x 48 pixels, its sources 48 x 40'):
        E.evaluate(data_set, {'x': E.find_fused(fused, data_set)})
    write_image(fused / '7001.bmp', np.zeros((48, 40), np.uint8))
    with pytest.raises(ValueError, match='fused 7001.bmp and 7001.png .* are the same slice'):
        E.evaluate_folders(*folders(data_set), fused)
    (fused / '7001.bmp').rename(fused / '7002.bmp')
    (fused / '7001.png').unlink()
    with pytest.raises(ValueError, match='fused slice 7002.bmp has no CT slice of the same name'):
        E.evaluate_folders(*folders(data_set), fused)


def test_a_pair_without_a_fused_image_is_named(pairs):
    with pytest.raises(ValueError, match=f'no fused image for {pairs.names[1]}'):
        E.evaluate(pairs, {'x': {pairs.names[0]: torch.zeros(1, 1, 64, 64)}}, ['EN'])


def test_a_pair_too_small_to_fuse_is_named(tmp_path):
    data_set = slices(tmp_path, np.uint8, size=(15, 40))
    with pytest.raises(ValueError, match=f'^{data_set.names[0]}: A slice of 15×40'):
        E.fuse_pairs(data_set, {'x': maximum})


def test_without_labels_there_are_no_lesions(tmp_path):
    data_set = slices(tmp_path, np.uint8)
    assert E.lesion_table(data_set, {'x': maximum}) is None
    numbers = E.run_numbers(E.evaluate(data_set, {'x': maximum}, ['EN']), None, None, 3)
    assert numbers['lesions_kept'] is None and numbers['validation'] is None and numbers['best_epoch'] == 3


def test_the_numbers_of_a_run_are_plain(pairs):
    table = E.evaluate(pairs, {'a': average, 'b': maximum}, ['EN', 'VIF_min'])
    numbers = E.run_numbers(table, E.lesion_table(pairs, {'a': average, 'b': maximum}), table[table.method == 'a'], 1)
    assert json.loads(json.dumps(numbers)) == numbers and list(numbers['means']) == ['a', 'b']
    assert numbers['validation'] == numbers['means']['a'] and set(numbers['means']['a']) == {'EN', 'VIF_min'}


def paired(advantages, column='VIF'):
    "A table of two methods on patients with two slices each, in which one is ahead by these amounts."
    names = [f'{case}{index:03d}.png' for case in range(len(advantages)) for index in (1, 2)]
    cases = [name[:-7] for name in names]
    ahead = pd.DataFrame({'method': 'ours', 'case': cases, column: [0.5 + advantages[int(case)] for case in cases]}, index=names)
    return pd.concat([ahead, ahead.assign(method='theirs', **{column: 0.5})]).rename_axis('name')


def test_patients_are_paired_where_there_are_six():
    six = E.compare(paired([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), ['ours'], 'theirs')
    five = E.compare(paired([0.1, 0.2, 0.3, 0.4, 0.5]), ['ours'], 'theirs')
    assert six.over[0] == '6 patients' and six.p[0] == pytest.approx(2 / 2 ** 6) and six.verdict[0] == 'better'
    assert five.over[0] == '10 slices of 5 patients' and five.p[0] < 0.01


def test_fewer_faults_are_an_advantage():
    assert E.compare(paired([0.1] * 6, 'Nabf'), ['ours'], 'theirs', ['Nabf']).advantage[0] == pytest.approx(-0.1)


def test_the_side_that_is_ahead_wherever_they_differ_is_the_better_one():
    rows = [{'name': f'1{i:03d}.png', 'method': method, 'case': '1', 'invented': i / 999 * (method == 'theirs' and i < 9)}
            for method in ('ours', 'theirs') for i in range(1, 21)]
    tests = E.compare(pd.DataFrame(rows).set_index('name'), ['ours'], 'theirs', ['invented'])
    assert tests.advantage[0] == 0 and tests.effect[0] == 1 and tests.wins[0] == 8 and tests.verdict[0] == 'better'


def test_no_difference_and_no_value_are_open():
    equal, absent = (E.compare(paired([value] * 6), ['ours'], {'VIF': 'theirs'}, ['VIF']) for value in (0.0, np.nan))
    assert equal.p[0] == absent.p[0] == 1 and equal.verdict[0] == absent.verdict[0] == 'open'


def test_the_size_of_an_effect_and_what_cannot_be_read_from_a_test():
    few = E.pairwise(paired([0.1, -0.2, 0.3, 0.4, 0.5, 0.6]), ['theirs', 'ours'])
    assert few.effect[0] == pytest.approx(-(21 - 2 * 2) / 21) and few.wins[0] == 1 and few.pairs[0] == 6
    assert 'over 6 patients, Holm-corrected over 1 tests' in E.reading_notes(few)[0] and len(E.reading_notes(few)) == 1
    always = E.reading_notes(E.pairwise(paired([0.1] * 7)))
    assert 'VIF: ours ahead wherever the two of a comparison differ' in always[1]
    never = E.reading_notes(E.pairwise(paired([0.0] * 7)))
    assert 'no difference is possible' in never[1]
    assert 'No verdict was possible: with 4 pairs' in E.reading_notes(E.pairwise(paired([0.1, -0.1])))[-1]
    with pytest.raises(ValueError, match="no method 'nobody' in the table; there are ours, theirs"):
        E.pairwise(paired([0.1]), ['nobody'])


def test_holm_is_the_textbook_procedure():
    p_values = np.random.default_rng(0).random(20) ** 3
    order, rejected = np.argsort(p_values), set()
    for i, index in enumerate(order):  # step down: stop at the first that does not pass
        if p_values[index] > 0.05 / (20 - i):
            break
        rejected.add(index)
    assert rejected and rejected == set(np.flatnonzero(E.holm(p_values) <= 0.05))
    assert len(E.holm([])) == 0


def test_ranks_share_ties_and_put_undefined_last():
    table = E.ranks(pd.DataFrame({'EN': [1.0, 2.0, 2.0, np.nan], 'Nabf': [1.0, 2.0, 3.0, 4.0]}))
    assert table.sort_index().EN.tolist() == [3, 1.5, 1.5, 4] and table.sort_index().Nabf.tolist() == [1, 2, 3, 4]
    assert table.index[0] == 1 and table.mean_rank.is_monotonic_increasing


@pytest.mark.parametrize('content, words', [('method,name,EN\nA,1.png,1\n', "no column 'SD'"),
                                            ('method,name,EN,SD\nA,1.png,1,1\nA,1.png,2,2\n', 'a pair of a method twice')])
def test_published_numbers_are_checked(tmp_path, content, words):
    (tmp_path / 'published.csv').write_text(content)
    with pytest.raises(ValueError, match=words):
        E.read_published(tmp_path / 'published.csv', ['1.png'], ['EN', 'SD'])


def test_a_table_of_a_benchmark_is_one_of_published_numbers(pairs, tmp_path):
    table = E.evaluate(pairs, {'maximum': maximum}, columns=['EN', 'SD'])
    write_table(table, tmp_path / 'metrics.csv')
    assert E.read_published(tmp_path / 'metrics.csv', pairs.names, ['EN', 'SD']).case.tolist() == table.case.tolist()


def test_hidden_folders_are_no_methods(pairs, tmp_path):
    E.write_fused(tmp_path / 'theirs', pairs, E.fuse_pairs(pairs, {'m': maximum})['m'])
    (tmp_path / '.ipynb_checkpoints').mkdir()       # JupyterLab leaves them
    assert list(E.find_external(tmp_path, pairs)) == ['theirs']


def test_published_methods_may_be_called_anything(tmp_path):
    (tmp_path / 'published.csv').write_text('# told\nmethod,name,EN,SD,VIF_min\nnet #2,1.png,1,2,-\nNA,1.png,3,,0.5\n')
    table = E.read_published(tmp_path / 'published.csv', ['1.png'], ['EN', 'SD'])
    assert table.method.tolist() == ['net #2', 'NA'] and table.EN.tolist() == [1, 3] and table.VIF_min.isna().tolist() == [True, False]


def test_a_published_value_that_is_missing_is_told(tmp_path):
    (tmp_path / 'published.csv').write_text('method,name,EN,SD\nold,1,5,\nold,2,5,\nnew,1,5,60\nnew,2,5,\n')
    with pytest.warns(UserWarning, match='SD of 1 of 2 pairs of new is missing in .*published.csv; its mean is over the others') as said:
        E.read_published(tmp_path / 'published.csv', ['1.png', '2.png'], ['EN', 'SD'])
    assert len(said) == 1, 'old never had it, and gets a dash'


def test_a_dash_is_no_published_value(tmp_path):
    (tmp_path / 'published.csv').write_text('method,name,EN,SD\n')     # none at all yet
    assert E.read_published(tmp_path / 'published.csv', ['1.png'], ['EN', 'SD']).empty
    for text, sd in (('-', 'nan'), ('–', 'nan'), ('60', '60.0')):
        (tmp_path / 'published.csv').write_text(f'method,name,EN,SD\nold,1,5,{text}\n', encoding='utf-8')
        assert [str(float(value)) for value in E.read_published(tmp_path / 'published.csv', ['1.png'], ['EN', 'SD']).SD] == [sd]
    (tmp_path / 'published.csv').write_text('method,name,EN,SD\nold,1,5,60*\n')
    with pytest.raises(ValueError, match='published.csv has texts in its column SD'):
        E.read_published(tmp_path / 'published.csv', ['1.png'], ['EN', 'SD'])


def test_files_in_colour_are_judged_in_luminance_and_by_their_colour(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(60, 190, (48, 40, 3)).astype(np.uint8)
    for name, image in {'ct': colour[..., 1], 'pet': colour, 'same': colour, 'turned': colour[..., ::-1].copy(), 'grey': colour[..., 0]}.items():
        write_image(tmp_path / f'{name}.png', image)
    same, turned, grey = (E.evaluate_files(tmp_path / 'ct.png', tmp_path / 'pet.png', tmp_path / f'{name}.png', columns=['SSIM2']).iloc[0] for name in ('same', 'turned', 'grey'))
    assert same.hue_error < 1e-6 and abs(same.saturation_loss) < 1e-6 and same.SSIM2 > grey.SSIM2
    assert turned.hue_error > 45 and np.isnan(grey.hue_error) and grey.saturation_loss == pytest.approx(1)
    assert 'hue_error' not in E.evaluate_files(*[tmp_path / 'ct.png'] * 3, columns=['SD'])


def test_sources_and_results_keep_their_names(pairs, tmp_path):
    "`1000_CT.png` and `1000_MRI.png` in one folder, `fused_1000_v2.png` in another."
    made = E.fuse_pairs(pairs, {'x': maximum})['x']
    for pair, file in zip(pairs.pairs, E.write_fused(tmp_path / 'fused', pairs, made)):
        file.rename(file.with_name(f'fused_{file.stem}_v2.png'))
        for path, kind in ((pair.ct, 'CT'), (pair.mri, 'MRI')):
            (tmp_path / 'sources').mkdir(exist_ok=True)
            write_image(tmp_path / 'sources' / f'{path.stem}_{kind}.png', read_image(path))
    plain = E.evaluate(pairs, {'x': E.find_fused(tmp_path / 'fused', pairs)}, ['SD', 'VIF'])
    there = E.evaluate_folders(tmp_path / 'sources', tmp_path / 'sources', tmp_path / 'fused', columns=['SD', 'VIF'])
    said = E.evaluate_folders(tmp_path / 'sources/{name}_CT.png', tmp_path / 'sources/{name}_MRI.png', tmp_path / 'fused/fused_{name}_v2', columns=['SD', 'VIF'])
    assert list(there.index) == list(said.index) == [f'{name[:-4]}_CT.png' for name in pairs.names]
    assert np.allclose(there.VIF, plain.VIF) and np.allclose(said.VIF, plain.VIF)
    assert CTMRIDataset(tmp_path / 'sources', tmp_path / 'sources').names == pairs.names
    with pytest.raises(ValueError, match='has no fused image for .*; it holds fused_'):
        E.find_fused(tmp_path / 'fused', SimpleNamespace(names=['9001.png']))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_results_in_colour_are_written_as_fuse_writes_them(tmp_path, dtype):
    slices(tmp_path, dtype)
    write_image(tmp_path / 'MRI' / '7001.png', np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (48, 40, 3)).astype(dtype))
    data_set = CTMRIDataset(tmp_path / 'CT', tmp_path / 'MRI')
    [file] = E.write_fused(tmp_path / 'fused', data_set, E.fuse_pairs(data_set, {'x': average})['x'])
    there, wanted = read_image(file, color=True), fuse(data_set.pairs[0].ct, data_set.pairs[0].mri, 'average')
    assert there.dtype == wanted.dtype == dtype and there.shape == wanted.shape == (48, 40, 3)
    assert np.abs(to_float(there) - to_float(wanted)).max() < 4 / 255, 'the data set holds luminance in 8 bits'


# A table of many files

COLUMNS = ['EN', 'SD', 'VIF']


@pytest.fixture
def triples(pairs, tmp_path):
    "Folders CT, MRI and F of four triples, of which the fused image of each is the CT of the next."
    for side, place in (('CT', 'ct'), ('MRI', 'mri'), ('F', 'ct')):
        (tmp_path / side).mkdir()
        for i, pair in enumerate(pairs.pairs):
            shutil.copy(getattr(pairs.pairs[(i + (side == 'F')) % 4], place), tmp_path / side / pair.name)
    return tmp_path


def measured(root, **options):
    "(the table, the names of what was measured, and not found in the table on disk)."
    names, real = [], E.measure_three

    def noted(paths, **given):
        names.append(paths[0].name)
        return real(paths, **given)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(E, 'measure_three', noted)
        table = E.evaluate_folders(root / 'CT', root / 'MRI', root / 'F', **{'columns': COLUMNS, 'path': root / 't.csv'} | options)
    return table, names


def test_a_row_counts_if_it_is_of_these_files(triples, pairs):
    "Measured is what is new, or changed; what is gone leaves the table."
    first, names = measured(triples)
    assert names == pairs.names and measured(triples)[1] == []
    shutil.copy(triples / 'F' / names[0], triples / 'F' / names[2])
    changed, again = measured(triples)
    assert again == names[2:3] and changed.drop(index=again).equals(first.drop(index=again)) and changed.EN[names[2]] != first.EN[names[2]]
    assert measured(triples, columns=['EN', 'AG'])[1] == names
    alone, again = measured(triples, columns=['AG'])     # in the table already, which keeps the others
    assert again == [] and list(alone) == ['AG'] and list(read_table(triples / 't.csv'))[:4] == ['EN', 'SD', 'AG', 'VIF']
    (triples / 'F' / names[1]).unlink()
    left, again = measured(triples, columns=['AG'])
    assert again == [] and list(left.index) == list(read_table(triples / 't.csv').index) == [names[0], *names[2:]]


@pytest.mark.parametrize('other, words', [({'preset': 'textbook'}, 'textbook; of'), ({'value_range': (0, 200)}, "'F', range 0,200"), ('G', "'G'"), ('CT', "'CT', 'MRI', 'CT'")])
def test_a_table_of_another_method_or_other_conventions_is_refused(triples, monkeypatch, other, words):
    "Before anything is measured, and nothing of it is lost; the same folders told otherwise are the same."
    measured(triples)
    before = (triples / 't.csv').read_bytes()
    shutil.copytree(triples / 'F', triples / 'G')
    monkeypatch.setattr(E, 'measure_three', int)     # which would fail
    with pytest.raises(FileExistsError, match=rf"t.csv holds other rows \(preset cvpr; of 'CT', 'MRI', 'F'\) than those asked for .*{words}.*; name another file"):
        E.evaluate_folders(triples / 'CT', triples / 'MRI', triples / (other if isinstance(other, str) else 'F'), columns=COLUMNS, path=triples / 't.csv',
                           **(other if isinstance(other, dict) else {}))
    with pytest.raises(FileExistsError, match='holds other rows'):
        E.evaluate_files(*(next((triples / side).iterdir()) for side in ('CT', 'MRI', 'F')), path=triples / 't.csv')
    monkeypatch.chdir(triples / 'CT')
    E.evaluate_folders('.', '../MRI', '../F', columns=COLUMNS, path='../t.csv')
    assert (triples / 't.csv').read_bytes() == before


def test_a_line_torn_within_a_letter_costs_one_row(triples, pairs):
    whole = measured(triples)[0]
    lines = (triples / 't.csv').read_bytes()
    (triples / 't.csv').write_bytes(lines[:lines.rfind(b'\n', 0, -1) + 1] + 'M\u00fc'.encode()[:-1])
    left, again = measured(triples)
    assert again == pairs.names[3:] and left.equals(whole)


def test_a_table_of_other_columns_or_a_torn_one_is_replaced(triples, pairs):
    measured(triples)
    first = (triples / 't.csv').read_text().partition('\n')[0]
    for text in ('', f'{first}\nname,EN,SD,VIF,files\n"', f'{first}\nname,EN,SD,VIF,files\n{pairs.names[0]},1,2,3\n'):
        (triples / 't.csv').write_text(text)
        assert measured(triples)[1] == pairs.names


@pytest.mark.parametrize('content', [b'holiday', b'name,EN\n1001.png,3\n', b'# x\nprice,EN\n', b'a\0b\n\0\n', b'\xff\xfe\n'])
def test_another_file_is_not_replaced_by_a_table(triples, content):
    (triples / 't.csv').write_bytes(content)
    with pytest.raises(FileExistsError, match='t.csv is there already, and no table of measurements; name another file'):
        measured(triples)
    assert (triples / 't.csv').read_bytes() == content


@pytest.mark.parametrize('methods, reason', [({}, 'no method to measure'), ({'m': 'maximum'}, "'maximum' is a name; a method is what load_model")])
def test_what_is_no_method_is_refused(pairs, methods, reason):
    with pytest.raises(ValueError, match=reason):
        E.evaluate(pairs, methods, ['EN'])


def test_a_bad_file_does_not_cost_the_others_their_rows_in_one_process_or_two(triples, pairs):
    "Both complain alike and write the same table, byte for byte; what was mended is added."
    names, whole = pairs.names, (triples / 'MRI' / pairs.names[1]).read_bytes()
    (triples / 'MRI' / names[1]).write_bytes(whole[:99])
    write_image(triples / 'F' / names[3], np.zeros((20, 20), np.uint8))
    for jobs, path in ((1, triples / 'one.csv'), (2, triples / 't.csv')):
        with pytest.raises(ValueError, match=f'2 of 4 rows .* the others are in .*{path.name}, .*{names[1]} is truncated.*differ in size: .*{names[3]} has 20×20'):
            E.evaluate_folders(triples / 'CT', triples / 'MRI', triples / 'F', columns=COLUMNS, path=path, jobs=jobs)
        assert list(read_table(path).index) == [names[0], names[2]]
    assert (triples / 'one.csv').read_bytes() == (triples / 't.csv').read_bytes()
    (triples / 'MRI' / names[1]).write_bytes(whole)
    shutil.copy(triples / 'F' / names[0], triples / 'F' / names[3])
    table, again = measured(triples)
    assert again == [names[1], names[3]] and list(table.index) == names and read_table(triples / 't.csv').equals(table)
    with pytest.raises(ValueError, match='jobs is 0'):
        E.evaluate_folders(triples / 'CT', triples / 'MRI', triples / 'F', jobs=0)


def test_nothing_but_faults_leaves_the_table_that_was_there(triples, pairs):
    measured(triples)
    before = (triples / 't.csv').read_bytes()
    for name in pairs.names:
        (triples / 'F' / name).write_bytes(b'no image')
    with pytest.raises(ValueError, match='None of 4 rows .*; and 1 more'):
        measured(triples)
    assert (triples / 't.csv').read_bytes() == before


def test_coloured_pairs_among_grey_ones(triples, pairs):
    "Whether there are columns of colour is known at the end; the rows before have none."
    grey = read_image(triples / 'MRI' / pairs.names[3])
    write_image(triples / 'MRI' / pairs.names[3], np.stack([grey, grey // 2, 255 - grey], 2))
    table, _ = measured(triples)
    assert table.saturation_loss.isna().tolist() == [True, True, True, False] and measured(triples)[0].equals(table)
    (triples / 'F' / pairs.names[3]).unlink()
    assert 'hue_error' not in measured(triples)[0] and 'hue_error' not in (triples / 't.csv').read_text()


class Killed(BaseException):
    "Stands for the end of the process: nothing that catches errors catches it."


@pytest.mark.fault('evaluate', 'killed between two writes', points=10)
@pytest.mark.parametrize('moment', ['before', 'after', 'within'])
def test_killed_at_any_write_the_table_is_valid_and_goes_on(triples, pairs, moment):
    "The table of before, or whole rows of this one; what is there is not measured again, and in the end all is as if undisturbed."
    path, names = triples / 't.csv', pairs.names
    whole = measured(triples)[0]
    final, old = path.read_bytes(), (triples / 'old.csv')
    first, heads, *rows = final.splitlines(keepends=True)
    old.write_bytes(first + heads + b''.join(row.rpartition(b',')[0] + b',of other files\n' for row in rows))
    for last in itertools.count():
        shutil.copy(old, path)
        calls = []

        def dying(*given, real, **more):
            calls.append(given)
            if len(calls) > last:
                if moment == 'after':
                    real(*given, **more)
                if moment == 'within' and real is E.add_whole:
                    os.write(given[0], given[1][:20])
                raise Killed
            return real(*given, **more)
        with pytest.MonkeyPatch.context() as patched:
            for door in ('write_table', 'add_whole'):
                patched.setattr(E, door, lambda *given, real=getattr(E, door), **more: dying(*given, real=real, **more))
            try:
                measured(triples)
                assert last == len(calls) == 5
                break
            except Killed:
                pass
        if path.read_bytes() != old.read_bytes():
            text = path.read_bytes()
            path.write_bytes(text[:text.rfind(b'\n') + 1])       # for read_table; the next run cuts it by itself
            rows = read_table(path)
            assert rows[whole.columns].equals(whole.loc[rows.index]), last
            path.write_bytes(text)
        there = E.rows_there(path, COLUMNS).keys() if path.read_bytes() != old.read_bytes() else set()
        assert measured(triples)[1] == [name for name in names if name not in there], last
        assert path.read_bytes() == final


@pytest.mark.fault('evaluate', 'disk full, or failing', points=4)
def test_no_space_for_one_more_row(triples, pairs):
    "The rows before stay; a limit on the size of files stands for the full disk."
    from conftest import in_little_space
    measured(triples)
    whole = (triples / 't.csv').read_bytes()
    lines = whole.splitlines(keepends=True)
    for rows in range(1, 4):
        (triples / 't.csv').unlink()
        space = sum(map(len, lines[:2 + rows])) + 40        # the growing table has two columns more
        said = in_little_space(E.evaluate_folders, triples / 'CT', triples / 'MRI', triples / 'F', 'cvpr', COLUMNS, None, triples / 't.csv', limit=space)
        assert 't.csv could not take one more row' in said, said
        assert list(read_table(triples / 't.csv').index) == pairs.names[:rows]
    (triples / 't.csv').unlink()
    said = in_little_space(E.evaluate_folders, triples / 'CT', triples / 'MRI', triples / 'F', 'cvpr', COLUMNS, None, triples / 't.csv', limit=100)
    assert 't.csv could not be written' in said and not list(triples.glob('*.csv'))


@pytest.mark.fault('evaluate', 'several at once')
def test_two_runs_into_one_table(triples, pairs):
    "Each adds to its own; the last one's whole table stands there."
    one, two = E.GrowingTable(COLUMNS, 'one', triples / 't.csv'), E.GrowingTable(COLUMNS, 'two', triples / 't.csv')
    rows = [E.Measured(name, f'{i}' * 32, dict.fromkeys(COLUMNS, i)) for i, name in enumerate(pairs.names)]
    for row in rows:
        one.add(row)
        two.add(row)
        assert [key for _, key in E.rows_there(triples / 't.csv', COLUMNS).values()] == [known.key for known in rows[:rows.index(row) + 1]]
    assert (triples / 't.csv').read_text().startswith('# two')
    one.close()
    two.close()


def lonely(children):
    "Those of some process numbers that are alive."
    def alive(number):
        try:
            return Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
        except FileNotFoundError:
            return False
    return [number for number in children if alive(number)]


def all_end(children):
    "Whether these processes end within a minute."
    deadline = time.monotonic() + 60
    while lonely(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not lonely(children)


@pytest.mark.long
@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='processes are looked up in /proc')
@pytest.mark.fault('evaluate', 'killed from outside')
def test_killed_for_real_with_its_processes(triples, pairs):
    "SIGKILL of the first process: the others end too, the rows are kept. SIGKILL of one of the others: a sentence."
    for i in range(60):
        for side in ('CT', 'MRI', 'F'):
            (triples / side / f'9{i:03d}.png').hardlink_to(triples / side / pairs.names[i % 4])
    code = ('from pathlib import Path; from medfusion.evaluation import evaluate_folders\n'
            'if __name__ == "__main__": evaluate_folders("CT", "MRI", "F", path=Path("t.csv"), jobs=2)')
    (triples / 'main.py').write_text(code)
    process = subprocess.Popen([sys.executable, '-W', 'ignore', 'main.py'], cwd=triples)
    while not (triples / 't.csv').exists() and process.poll() is None:
        time.sleep(0.01)
    children = [int(number) for number in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2 and all_end(children)
    there = set(E.rows_there(triples / 't.csv', []))
    table, names = measured(triples, columns=None)
    assert there and len(names) == 64 - len(there) and not there & set(names) and len(table) == 64
    with pytest.raises(ChildProcessError, match='ended from outside'):
        list(E.in_processes(die, [1, 2, 3], jobs=2))


@pytest.mark.long
@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='memory and processes are looked up in /proc')
@pytest.mark.fault('evaluate', 'killed from outside')
def test_ten_thousand_triples(tmp_path):
    """By the command, on two processes: killed and called again, it keeps the rows that are there (one of them has a number that nobody would measure),
    the table is whole, and the three processes together take no more memory than for 500, but for 96 MiB: rows of 42 columns. (The slices would be 280 MB.)"""
    def begin(root):
        return subprocess.Popen([sys.executable, '-m', 'medfusion', 'evaluate', 'CT', 'MRI', 'F', '--jobs', '2', '--csv', 't.csv'], cwd=root, stdout=subprocess.DEVNULL)
    few, many = (write_slices(tmp_path / str(number), number, ('ct', 'mri', 'ct')) for number in (500, 10_000))
    process, path = begin(many), many / 't.csv'
    while not path.exists() or path.read_bytes().count(b'\n') < 2000:
        assert process.poll() is None, 'it ended too early'
        time.sleep(0.05)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    assert all_end(children)
    there = len(E.rows_there(path, []))
    path.write_text(re.sub(r'^(000000\.png),[^,]+', r'\1,99', path.read_text(), flags=re.MULTILINE))
    memory = {number: peak_memory(begin(root)) for number, root in ((500, few), (10_000, many))}
    table = read_table(path)
    assert there >= 1998 and list(table.index) == [f'{i:06d}.png' for i in range(10_000)] and len(read_table(few / 't.csv')) == 500
    kinds = table.iloc[1:].groupby(np.arange(1, 10_000) % 8)
    assert table.iloc[0, 0] == 99 and (kinds.nunique(dropna=False) == 1).all(axis=None) and kinds.first().nunique().max() == 8
    assert measured(many, columns=['EN'])[1] == []        # all rows are of these files
    assert memory[10_000] - memory[500] < 96, memory


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_column_in_which_no_rival_has_a_number_is_left_out():
    "As VIF, which a copy has of the smallest slices and a fused slice has not: it ended a training in KeyError."
    table = pd.DataFrame({'method': ['ours', 'average', 'maximum'] * 2, 'case': ['1'] * 6, 'VIF': [.5, np.nan, np.nan] * 2, 'SD': [3., 1., 2.] * 2},
                         index=pd.Index(['1000.png'] * 3 + ['1001.png'] * 3, name='name'))
    rivals = E.best_in(E.summarise(table).loc[['average', 'maximum']])
    assert list(E.compare(table, ['ours'], against=rivals).column) == ['SD']


def test_the_best_in_a_column_of_artefacts_has_the_least():
    means = pd.DataFrame({'VIF': [.4, .6], 'invented': [.001, .05], 'SCD': [np.nan, np.nan]}, index=['average', 'maximum'])
    assert E.best_in(means) == {'VIF': 'maximum', 'invented': 'average'}


def test_a_column_of_ones_own_is_not_lost(tmp_path):
    data_set = slices(tmp_path, np.uint8)
    [fused] = E.write_fused(tmp_path / 'fused', data_set, {'7001.png': torch.rand(1, 1, 48, 40)})
    arguments = [*folders(data_set), fused.parent, 'cvpr', ['SD'], None, tmp_path / 't.csv']
    E.evaluate_folders(*arguments)
    told, head, row = (tmp_path / 't.csv').read_text().splitlines()
    (tmp_path / 't.csv').write_text(f'{told}\n{head},rating\n{row},good\n')
    with pytest.raises(FileExistsError, match="t.csv has a column 'rating' that is none of the measurements; name another file, or it would be lost"):
        E.evaluate_folders(*arguments)
    assert 'good' in (tmp_path / 't.csv').read_text()


def test_of_fused_slices_that_are_nearly_black_no_range_is_the_remedy(tmp_path):
    data_set = slices(tmp_path, np.uint8)
    [fused] = E.write_fused(tmp_path / 'fused', data_set, {'7001.png': torch.rand(1, 1, 48, 40)})
    write_image(fused, np.uint16(read_image(fused)) * 16)
    with pytest.warns(UserWarning, match='fused: .* nearly black; write them over the whole range of their type') as said:
        E.evaluate_folders(*folders(data_set), fused.parent, columns=['SD'])
    assert len(said) == 1 and '--range' not in str(said[0].message)


def test_where_no_row_can_be_measured_no_others_are_told_of():
    assert E.faults_sentence(['a is empty.', 'b is empty.'], 2, 't.csv') == 'None of 2 rows could be measured: a is empty; b is empty.'


def test_what_is_odd_about_fused_files_is_told_wherever_they_are_judged(tmp_path):
    data_set = slices(tmp_path, np.uint8)
    [fused] = E.write_fused(tmp_path / 'fused', data_set, {'7001.png': torch.rand(1, 1, 48, 40)})
    write_image(tmp_path / 'dark.png', np.uint16(read_image(fused)) * 16)
    with pytest.warns(UserWarning, match='nearly black; write them over the whole range') as said:
        E.fused_image({'7001.png': tmp_path / 'dark.png'}, data_set[0])
    assert len(said) == 1 and '--range' not in str(said[0].message)
    write_image(fused.with_suffix('.jpg'), read_image(fused))
    fused.unlink()
    for judge in (lambda: E.find_fused(fused.parent, data_set), lambda: E.evaluate_folders(*folders(data_set), fused.parent, columns=['SD'])):
        with pytest.warns(UserWarning, match=r'fused holds 1 JPEG file, such as 7001.jpg: their compression alone changes the metrics'):
            judge()


def test_the_colours_of_a_colour_map_are_told(tmp_path):
    data_set = slices(tmp_path, np.uint8)
    (tmp_path / 'others' / 'mapped').mkdir(parents=True)
    grey = read_image(data_set.pairs[0].ct)
    write_image(tmp_path / 'others' / 'mapped' / '7001.png', np.dstack([grey, 255 - grey, grey // 2]))
    for judge in (lambda: E.find_external(tmp_path / 'others', data_set), lambda: E.evaluate_folders(*folders(data_set), tmp_path / 'others' / 'mapped', columns=['SD'])):
        with pytest.warns(UserWarning, match='mapped: a fused slice is in colour and its sources are grey, so that luminance is measured') as said:
            judge()
        assert len(said) == 1
    write_image(data_set.pairs[0].mri, np.dstack([grey, 255 - grey, grey // 2]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        E.find_external(tmp_path / 'others', data_set), E.evaluate_folders(*folders(data_set), tmp_path / 'others' / 'mapped', columns=['SD'])
