"""What 21_evaluation.ipynb does not show: files of other depths and kinds, complaints, and the statistics' corners."""
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from medfusion import evaluation as E
from medfusion.baselines import average, maximum
from medfusion.data import CTMRIDataset
from medfusion.files import read_image, to_float, write_image
from medfusion.inference import fuse
from medfusion.phantom import write_phantom


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "The test part of a small synthetic data set."
    test = write_phantom(tmp_path_factory.mktemp('evaluation') / 'Dataset', cases=3, slices=4, size=64) / 'test'
    return CTMRIDataset(test / 'CT', test / 'MRI')


def folders(pairs):
    return pairs.pairs[0].ct.parent, pairs.pairs[0].mri.parent


def slices(path, dtype, suffix='.png'):
    "CT and MRI folders with one random pair in them, and its data set."
    rng = np.random.default_rng(0)
    for kind in ('CT', 'MRI'):
        (path / kind).mkdir()
        write_image(path / kind / f'7001{suffix}', rng.integers(0, np.iinfo(dtype).max, (48, 40)).astype(dtype))
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


def test_jpegs_of_another_method_are_said(tmp_path):
    "Their compression alone changes EN and SSIM2."
    data_set = slices(tmp_path, np.uint8)
    (tmp_path / 'fused').mkdir()
    write_image(tmp_path / 'fused' / '7001.jpg', np.zeros((48, 40), np.uint8))
    with pytest.warns(UserWarning, match='fused holds 1 JPEG files, such as 7001.jpg: their compression alone changes the metrics'):
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


def test_no_difference_and_no_value_are_open():
    equal, absent = (E.compare(paired([value] * 6), ['ours'], {'VIF': 'theirs'}, ['VIF']) for value in (0.0, np.nan))
    assert equal.p[0] == absent.p[0] == 1 and equal.verdict[0] == absent.verdict[0] == 'open'


def test_the_size_of_an_effect_and_what_cannot_be_read_from_a_test():
    few = E.pairwise(paired([0.1, -0.2, 0.3, 0.4, 0.5, 0.6]), ['theirs', 'ours'])
    assert few.effect[0] == pytest.approx(-(21 - 2 * 2) / 21) and few.wins[0] == 1 and few.pairs[0] == 6
    assert 'over 6 patients, Holm-corrected over 1 tests' in E.reading_notes(few)[0] and len(E.reading_notes(few)) == 1
    always = E.reading_notes(E.pairwise(paired([0.1] * 7)))
    assert 'VIF: ours ahead in all 7 pairs' in always[1]
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
