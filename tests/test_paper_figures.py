"""Figures of a paper: where slices come from, what a record becomes, and the command."""
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from medfusion.cli import app
from medfusion.figures import Box, as_picture, save_figure
from medfusion.files import list_pairs, write_image
from medfusion.paper_figures import (bars_figure, box_figure, box_of, chosen_pairs, figure_kinds, finished_slices, named_method, pairs_of, paper_figure,
                                     radar_figure, record_table, slice_of)
from medfusion.runs import write_run

CHARTS = {'bars': bars_figure, 'boxes': box_figure, 'radar': radar_figure}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two pairs, one in colour, and somebody's finished slices."
    root = tmp_path_factory.mktemp('figures')
    noise = np.random.default_rng(0)
    for part in ('CT', 'MRI', 'theirs', 'others'):
        (root / part).mkdir()
    for name, depth in (('41003', np.uint8), ('41004', np.uint16)):
        write_image(root / f'CT/{name}.png', (noise.random((40, 32)) * np.iinfo(depth).max).astype(depth))
        write_image(root / f'MRI/{name}.png', (noise.random((40, 32, 3)) * 255).astype(np.uint8))
        write_image(root / f'theirs/{name}.png', (noise.random((40, 32)) * 255).astype(np.uint8))
        write_image(root / f'others/{name}_fused.png', (noise.random((40, 32)) * 255).astype(np.uint8))
    return root


def record(patients, slices=2, methods=3):
    "The rows of a benchmark that nobody ran."
    rows = [{'name': f'{case}{number:03d}.png', 'method': f'method_{m}', 'case': str(case)} for m in range(methods) for case in range(1, 1 + patients)
            for number in range(slices)]
    values = np.random.default_rng(1).random((len(rows), 4))
    return pd.concat([pd.DataFrame(rows), pd.DataFrame(values, columns=['EN', 'VIF', 'Qabf', 'invented'])], axis=1).set_index('name')


@pytest.fixture
def benchmark(folder, tmp_path):
    "The folder of a benchmark: its record, numbers and slices."
    write_run(tmp_path, method='benchmark', parameters={'ct_dir': str(folder / 'CT'), 'mri_dir': str(folder / 'MRI'), 'join': []},
              state='finished', started=0., split={'test': ['41']})
    (tmp_path / 'metrics.csv').write_text('# a convention, with commas\n' + record(3).to_csv())
    for method in ('theirs', 'network'):
        (tmp_path / 'fused' / method).mkdir(parents=True)
        for pair in list_pairs(folder / 'CT', folder / 'MRI'):
            write_image(tmp_path / 'fused' / method / pair.name, np.zeros((40, 32), np.uint8))
    return tmp_path


def words(figure):
    "All that is written on a figure."
    import matplotlib
    return ' '.join(text.get_text().replace('\n', ' ') for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize('spec, wanted', [('wavelet', ('wavelet', 'wavelet')), ('run:resnet_fusion/x_1', ('x 1', 'run:resnet_fusion/x_1')),
                                          ('Ours, 2=a/b.pt', ('Ours, 2', 'a/b.pt')), ('a/b_c.pt', ('b c', 'a/b_c.pt')), ('=x', ('=x', '=x')), ('run:w_gradient=0.5+seed=1', ('w gradient=0.5+seed=1', 'run:w_gradient=0.5+seed=1'))])
def test_a_method_has_a_title_and_a_meaning(spec, wanted):
    assert named_method(spec) == wanted


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    (tmp_path / 'a=b').mkdir()
    assert named_method(tmp_path / 'a=b') == ('a=b', str(tmp_path / 'a=b'))


def test_finished_slices_are_a_folder_a_file_or_a_pattern(folder):
    [first, _] = list_pairs(folder / 'CT', folder / 'MRI')
    for spec, file in ((folder / 'theirs', 'theirs/41003.png'), (folder / 'theirs/41003.png', 'theirs/41003.png'),
                       (folder / 'others/{name}_fused.png', 'others/41003_fused.png'), (folder / 'others/{name}_fused', 'others/41003_fused.png')):
        assert np.array_equal(slice_of(first, spec), as_picture(folder / file))
    assert finished_slices('wavelet') is None and finished_slices(folder) is None
    assert slice_of(first, 'maximum').shape == (40, 32, 3)      # in the colours of the second source


def test_hidden_files_decide_nothing(tmp_path):
    for name in ('._a.png', '._mine.pt'):
        (tmp_path / name).write_bytes(b'of macOS')
    assert finished_slices(tmp_path) is None
    (tmp_path / 'a.png').touch()
    assert finished_slices(tmp_path) == tmp_path


def test_the_names_of_all_pairs_tell_how_finished_slices_are_named(tmp_path):
    for number in range(1, 13):
        for part, name in (('CT', '{}'), ('MRI', '{}'), ('plain', '{}'), ('theirs', '{}_fused')):
            (tmp_path / part).mkdir(exist_ok=True)
            write_image(tmp_path / part / f'{name.format(number)}.png', np.full((40, 32), 200 + number, np.uint8))
    folders, theirs = [tmp_path / 'CT', tmp_path / 'MRI'], [f'theirs={tmp_path}/theirs']
    files = [folder / '2.png' for folder in folders]
    assert {'1', 'theirs'} <= set(words(paper_figure(folders, models=theirs, pairs=['1'])).split())
    assert 'theirs' in words(paper_figure(files, models=theirs))
    for file in ('theirs/2_fused.png', 'plain/2.png'):
        (tmp_path / file).unlink()
    for sources, pairs, models in ((folders, ['2'], theirs), (files, (), theirs), (folders, ['2'], [tmp_path / 'plain'])):
        with pytest.raises(ValueError, match='has no fused image for 2.png'):       # 12 is another patient's
            paper_figure(sources, models=models, pairs=pairs)


def test_two_sources_have_two_titles_and_a_slice_one_pair(folder):
    folders, one = [folder / 'CT', folder / 'MRI'], f'them={folder}/theirs/41003.png'
    for titles in (['CT'], ['CT', 'MRI', 'PET'], []):
        with pytest.raises(ValueError, match='give two, as in CT,MRI'):
            paper_figure(folders, models=['maximum'], titles=titles)
    with pytest.raises(ValueError, match='41003.png is the slice of one pair, and 2 are shown'):
        paper_figure(folders, models=[one])
    assert '41003' in words(paper_figure(folders, models=[one], pairs=['41003']))
    with pytest.raises(ValueError, match='3 sources were given'):
        paper_figure([*folders, folder / 'theirs'])


def test_sources_may_have_a_pattern(folder):
    pairs = pairs_of([folder / 'CT', folder / 'MRI'])
    assert pairs_of([folder / 'CT/{name}.png', folder / 'MRI/{name}.png']) == pairs


def test_pairs_are_named_with_an_ending_or_without(folder):
    pairs = pairs_of([folder / 'CT', folder / 'MRI'])
    assert chosen_pairs(pairs, ['41004', '41003.png']) == pairs[::-1] and chosen_pairs(pairs) == pairs
    with pytest.raises(ValueError, match='no pair 41005; there are 41003 to 41004'):
        chosen_pairs(pairs, ['41005'])
    with pytest.raises(ValueError, match='shows those that you name, as in --pair'):
        chosen_pairs(4 * pairs)


@pytest.mark.parametrize('kind', ['slices', 'difference'])
def test_a_figure_of_folders_and_of_a_record(folder, benchmark, kind):
    given = paper_figure([folder / 'CT', folder / 'MRI'], kind, models=['maximum', f'them={folder}/theirs'], boxes=[Box(4, 4, 9, 9)], width=5)
    assert {'maximum', 'them'} <= set(words(given).split()) and '41003' in words(given)
    (benchmark / 'fused/.ipynb_checkpoints').mkdir()        # JupyterLab leaves them
    shown = words(paper_figure([benchmark], kind, pairs=['41004'], width=5))
    assert 'network' in shown and 'theirs' in shown and '41004' in shown and '41003' not in shown
    assert 'network' not in words(paper_figure([benchmark], kind, models=['theirs'], width=5))


@pytest.mark.parametrize('kind', CHARTS)
def test_charts_say_of_whom_they_are(benchmark, tmp_path, kind):
    columns = ['VIF', 'Qabf', 'invented']
    text = words(paper_figure([benchmark], kind, columns=columns, width=4))
    assert '6 slices of 3 patients' in text and 'method 2' in text and all(column in text for column in columns)
    with pytest.raises(ValueError, match='record of one benchmark'):
        paper_figure([benchmark], kind, boxes=2)
    with pytest.raises(ValueError, match='record of one benchmark'):
        paper_figure([benchmark], kind, pairs=['1000'])
    assert words(paper_figure([benchmark], kind, columns=[*columns, 'VIF'], width=4)) == text


def test_a_patient_or_method_may_be_called_what_pandas_takes_for_nothing(tmp_path):
    table = record(3).replace({'case': {'1': 'NA', '2': 'None'}, 'method': {'method_0': 'null'}})
    (tmp_path / 'metrics.csv').write_text('# a convention\n' + table.to_csv())
    assert set(record_table(tmp_path).case) == {'NA', 'None', '3'} and 'null' in set(record_table(tmp_path).method)
    shown = CliRunner().invoke(app, ['benchmark', '--record', str(tmp_path), '--columns', 'VIF'])
    assert 'over 3 patients' in shown.stdout and 'null' in shown.stdout, shown.output


def test_bars_are_means_over_patients_with_their_intervals():
    from scipy import stats
    table = record(patients=5, slices=3)
    axis = bars_figure(table, ['VIF'], ['method_1', 'method_2']).axes[0]
    of_patients = table[table.method.isin(['method_1', 'method_2'])].groupby(['method', 'case']).VIF.mean().unstack()
    names = [text.get_text().replace(' ', '_') for text in axis.get_yticklabels()]
    assert np.allclose([bar.get_width() for bar in axis.patches], of_patients.mean(axis=1)[names])
    low, high = stats.t.interval(.95, 4, of_patients.loc[names[0]].mean(), stats.sem(of_patients.loc[names[0]]))
    whisker = axis.collections[0].get_segments()[0]
    assert np.allclose(whisker[:, 0], [low, high])


def test_what_has_one_patient_or_means_alone_has_no_interval():
    assert 'no interval without several patients' in words(bars_figure(record(patients=1)))
    less = record(patients=3)
    less = less[(less.method != 'method_1') | (less.case != less.case.iloc[0])]
    assert '3 patients, not the same for every method;' in words(bars_figure(less)), 'means over other patients do not tell which method is better'
    means = record(patients=1, slices=1).assign(case=None)
    assert 'means as recorded' in words(bars_figure(means)) and 'means as recorded' in words(radar_figure(means, ['EN', 'VIF', 'Qabf']))
    with pytest.raises(ValueError, match='holds means alone'):
        box_figure(means)


def test_a_radar_needs_spokes_and_room():
    with pytest.raises(ValueError, match='on three columns or more'):
        radar_figure(record(1), ['EN', 'VIF'])
    many = record(1, methods=10)
    assert 'Rank among the 8 methods shown, the best of 10 (' in words(radar_figure(many, ['EN', 'VIF', 'Qabf'])), 'who is left out is said'
    with pytest.raises(ValueError, match='up to eight methods'):
        radar_figure(many, ['EN', 'VIF', 'Qabf'], list(many.method.unique()))


def test_records_of_every_kind_are_read(tmp_path, benchmark):
    assert record_table(benchmark).method.nunique() == 3 and record_table(benchmark / 'metrics.csv').case.nunique() == 3
    with pytest.raises(FileNotFoundError, match='holds no metrics.csv'):
        record_table(benchmark / 'fused')
    for case in '12':
        (tmp_path / f'wavelet_shipped-without-{case}.json').write_text(json.dumps({
            'format': 'medfusion fold 2', 'left_out': [case], 'recipe_sha256': 'x', 'trained_on': [], 'numbers': {case: {'network': {'VIF': 1.}, 'maximum': {'VIF': .5}}}}))
    (tmp_path / 'metrics.csv').unlink()
    folds = record_table(tmp_path)
    assert list(folds.method.unique()) == ['wavelet', 'maximum'] and folds.case.nunique() == 2


@pytest.mark.parametrize('text', ['1,2', '1,2,x', '', '1,2,3,4'])
def test_what_is_no_box_is_refused(text):
    with pytest.raises(ValueError, match='is no box; write its left edge'):
        box_of(text)


def test_the_command_draws(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    call = ['figure', 'CT', 'MRI', '-m', 'maximum', '-m', 'Them=theirs', '--pair', '41003']
    result = CliRunner().invoke(app, [*call, '--box', '3,4,8', '--titles', 'CT,PET', '-o', str(tmp_path / 'a.svg')])
    assert result.exit_code == 0 and result.output.strip() == str(tmp_path / 'a.svg')
    assert all(f'>{word}</text>' in (tmp_path / 'a.svg').read_text() for word in ('PET', 'Them', '41003', '× 4'))
    drawn = (tmp_path / 'a.svg').read_bytes()
    for more, code in (([], 1), (['--replace'], 0)):
        result = CliRunner().invoke(app, [*call, '-o', str(tmp_path / 'a.svg'), *more])
        assert result.exit_code == code and ('a.svg is there already; name another file, or replace it (--replace)' in result.stderr) == bool(code)
        assert ((tmp_path / 'a.svg').read_bytes() == drawn) == bool(code)
    for wrong, words_ in ((['-o', 'a.gif'], 'does not end in .pdf, .svg, .png'), (['-o', 'a.pdf', '--box', '1,2'], 'is no box'),
                          (['-o', 'a.pdf', '--kind', 'pie'], 'no kind of figure; there are slices'), (['-o', 'a.pdf', '-m', 'Them=maximum'], 'Two columns')):
        result = CliRunner().invoke(app, [*call, *wrong])
        assert result.exit_code == 1 and re.search(words_, result.stderr) and result.stderr.count('\n') == 1
    assert not (folder / 'a.pdf').exists()


@pytest.mark.parametrize('kind, more', [('slices', ['--columns', 'VIF']), ('difference', ['--columns', 'VIF']), ('bars', ['--titles', 'CT,PET']), ('radar', ['--range', '0,200'])])
def test_an_option_that_the_kind_takes_no_notice_of_is_refused(folder, benchmark, tmp_path, kind, more):
    sources = ['CT', 'MRI', '-m', 'maximum'] if kind in ('slices', 'difference') else [str(benchmark)]
    result = CliRunner().invoke(app, ['figure', *(str(folder / one) if one in ('CT', 'MRI') else one for one in sources), '--kind', kind, *more, '-o', str(tmp_path / 'a.png')])
    assert result.exit_code == 1 and re.search(f'medfusion: {kind} .*; ', result.stderr) and result.stderr.count('\n') == 1, result.output
    assert not (tmp_path / 'a.png').exists()


def test_blanks_beside_commas_are_no_part_of_a_name(benchmark, tmp_path, monkeypatch):
    drawn = CliRunner().invoke(app, ['figure', str(benchmark), '--kind', 'bars', '--columns', 'VIF, Qabf', '-o', str(tmp_path / 'a.svg')])
    assert drawn.exit_code == 0 and 'Qabf' in (tmp_path / 'a.svg').read_text(), drawn.output
    asked = []
    monkeypatch.setattr('medfusion.cli.run_notebook', lambda notebook, given, *more: asked.append(given) or tmp_path)
    CliRunner().invoke(app, ['benchmark', '--columns', 'VIF, Qabf'])
    assert asked[0]['columns'] == ['VIF', 'Qabf']


def test_a_finished_slice_is_not_drawn_over(folder, benchmark, monkeypatch):
    "Of a column, by its folder, its pattern or its file; of a benchmark's record, with methods named or not."
    monkeypatch.chdir(folder)
    slices = {path: path.read_bytes() for path in [*folder.rglob('*.png'), *benchmark.rglob('*.png')]}
    for sources, out in ((['CT', 'MRI', '-m', 'Them=theirs'], 'theirs/41003.png'), (['CT', 'MRI', '-m', 'Them=others/{name}_fused.png'], 'others/41003_fused.png'),
                         (['CT/41003.png', 'MRI/41003.png', '-m', 'Them=theirs/41003.png'], 'theirs/41003.png'), (['CT', 'MRI', '-m', 'maximum'], 'MRI/41004.png'),
                         ([str(benchmark)], str(benchmark / 'fused/theirs/41003.png')), ([str(benchmark), '-m', 'theirs'], str(benchmark / 'fused/network/41003.png'))):
        result = CliRunner().invoke(app, ['figure', *sources, '-o', out])
        assert result.exit_code == 1 and 'is what is read' in result.stderr and result.stderr.count('\n') == 1, (out, result.output)
    assert all(path.read_bytes() == data for path, data in slices.items())


def test_a_name_is_the_network_or_the_rule_whatever_folder_is_called_so(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('maximum', 'wavelet@1'):
        shutil.copytree(folder / 'theirs', name)
        assert finished_slices(name) is None and finished_slices(f'./{name}') == tmp_path / name


def test_the_table_of_kinds_is_what_the_help_names():
    help_ = CliRunner().invoke(app, ['figure', '--help']).output
    assert all(kind in help_ for kind in figure_kinds())


def test_colour_and_depth_are_what_they_are(folder, tmp_path):
    figure = paper_figure([folder / 'CT/41004.png', folder / 'MRI/41004.png'], models=['maximum'], boxes=0, width=4)
    shapes = [axis.get_images()[0].get_array().shape for axis in figure.axes]
    assert shapes == [(40, 32), (40, 32, 3), (40, 32, 3)]
    assert save_figure(figure, tmp_path / 'colour.png').stat().st_size


def test_rules_are_called_as_in_the_table():
    import matplotlib
    table = record(2).assign(method=lambda rows: rows.method.map(lambda name: {'method_1': 'wavelet_maximum', 'method_2': 'copy_ct'}.get(name, name)))
    called = {'wavelet rule', 'copy of CT'}
    assert called <= {text.get_text() for text in bars_figure(table, ['VIF']).axes[0].get_yticklabels()}
    assert called <= {text.get_text() for text in radar_figure(table, ['EN', 'VIF', 'Qabf']).findobj(matplotlib.text.Text)}


def test_a_method_whose_slices_a_benchmark_does_not_keep_is_named(benchmark):
    with pytest.raises(ValueError, match=r"no method 'others' among the slices in .*fused \(others are drawn from a CT and an MRI folder, with -m NAME=FOLDER\); there are network, theirs"):
        paper_figure([benchmark], models=['others'])


@pytest.mark.parametrize('kind', CHARTS)
@pytest.mark.parametrize('width', [2.5, 5, 7])
def test_the_note_below_a_chart_is_on_the_paper(benchmark, kind, width):
    figure = paper_figure([benchmark], kind, columns=['EN', 'VIF', 'Qabf'], width=width)
    figure.draw_without_rendering()
    told, paper = figure._supxlabel.get_window_extent(), figure.bbox
    assert paper.x0 <= told.x0 and told.x1 <= paper.x1 and paper.y0 <= told.y0
    assert all(axis.get_window_extent().y0 > told.y1 for axis in figure.axes)
