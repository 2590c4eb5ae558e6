"""Tables from outside: their corners, and LaTeX as TeX would read it."""
import os
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from medfusion import tables as T

MEANS = pd.DataFrame({'SD': [60.04, 60.02, 70.0], 'invented': [0.1, 0.2, 0.05], 'SCD': [1.0, 2.0, np.nan]}, index=['a_b', 'c', 'copy_ct'])


def measured(cases=2):
    "A table of two methods and a copy on some patients of two slices."
    rows = [{'method': method, 'name': f'{case}00{index}.png', 'case': str(case), 'SD': 60 + case + rise, 'Nabf': 0.1 * rise}
            for method, rise in (('ours', 2.0), ('theirs', 1.0), ('copy_ct', 5.0)) for case in range(cases) for index in (1, 2)]
    return pd.DataFrame(rows).set_index('name')


def test_what_is_equal_in_print_is_equally_good_and_copies_stand_aside():
    marked = T.marks(MEANS)
    assert marked.SD.tolist() == ['best', 'best', ''] and marked.invented.tolist() == ['best', 'second', ''] and marked.SCD.tolist() == ['second', 'best', '']
    assert T.marks(MEANS.iloc[:1]).SD.tolist() == [''], 'alone there is no best'


def test_latex_has_as_many_cells_in_each_row_and_no_bare_special_character():
    lines = T.render(MEANS.rename(index={'c': '50 % & more_#'}), 'latex', bold=['c'], marked=T.marks(MEANS), note='two\nlines').splitlines()
    assert lines[:3] == ['% two', '% lines', r'% \usepackage{booktabs}'] and r'a\_b & \textbf{60.0}' in '\n'.join(lines)
    rows = [line for line in lines if line.endswith(r'\\')]
    assert len(rows) == 4 and {row.replace(r'\&', '').count('&') for row in rows} == {3} and r'50 \% \& more\_\#' in rows[2]
    assert rows[3].split('&')[3].strip() == r'-- \\'


NASTY = ['50 % & more_#1 {x} $2', 'a\\b~c^d', '[0, 1] * 2', '* of two', 'Läsion † −3 × η … <a> |b|', 'w_gradient=0.5+seed=1', 'MI ↑', '–']


def as_printed(latex):
    "What TeX prints of a text of a cell: its commands and escaped characters as they look."
    signs = {'uparrow': '↑', 'downarrow': '↓', 'pm': '±', 'times': '×', 'dagger': '†', 'textbackslash': '\\', 'textasciitilde': '~', 'textasciicircum': '^',
             'textbar': '|', 'ldots': '…'}
    text = re.sub(r'\$(\^?)([^$]+)\$', lambda math: {'-': '−', r'\eta': 'η'}.get(math[2], math[2]), latex)
    return re.sub(r'\\([a-z]+)(?:\{\})?|\\(.)|\{([\[*])\}', lambda found: signs[found[1]] if found[1] else found[2] or found[3], text).replace('--', '–')


def test_latex_prints_what_was_meant():
    "Read as TeX reads it: a tabular within its rules, as many cells in each row as columns, braces that match, no bare special character, and the names themselves."
    lines = T.render(MEANS.iloc[[0] * len(NASTY)].set_axis(NASTY).rename(columns={'SD': 'SD ± 5 %'}), 'latex', note='50 % of _\n& #').splitlines()
    assert [line for line in lines if line.startswith('%')] == ['% 50 % of _', '% & #', r'% \usepackage{booktabs}']
    body = [line for line in lines if not line.startswith('%')]
    assert body[0] == r'\begin{tabular}{lrrr}' and body[1] == r'\toprule' and body[3] == r'\midrule' and body[-2:] == [r'\bottomrule', r'\end{tabular}']
    rows = [body[2], *body[4:-2]]
    for row in rows:
        bare = re.sub(r'\\[a-z]+|\\.', '', row.removesuffix(r' \\'))
        assert row.endswith(r' \\') and bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0 and not re.search(r'[%#_~]|^[\[*]', bare)
        assert '^' not in re.sub(r'\$[^$]*\$', '', bare)
    cells = [re.split(r'(?<!\\) & ', row.removesuffix(r' \\')) for row in rows]
    assert [as_printed(row[0]) for row in cells] == ['', *NASTY] and as_printed(cells[0][1]) == 'SD ± 5 %' and {len(row) for row in cells} == {4}


@pytest.mark.skipif(not shutil.which('pdflatex'), reason='there is no LaTeX here')
def test_latex_compiles(tmp_path):
    table = T.render(MEANS.iloc[[0] * len(NASTY)].set_axis(NASTY), 'latex', bold=NASTY, marked=None, note='50 % of _\n& #')
    paper = T.paper_table(measured()).text('latex')
    (tmp_path / 'a.tex').write_text('\n'.join([r'\documentclass{article}', r'\usepackage{booktabs}', r'\begin{document}', table, paper, r'\end{document}']), encoding='utf-8')
    done = subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 'a.tex'], cwd=tmp_path, capture_output=True, text=True, errors='replace',
                          env={**os.environ, 'HOME': str(tmp_path), 'TEXMFVAR': str(tmp_path / 'var')})
    assert done.returncode == 0 and 'Missing character' not in done.stdout and (tmp_path / 'a.pdf').stat().st_size > 10_000, done.stdout[-2000:]


def test_markdown_stays_what_it_was():
    assert T.render(MEANS[['SD']], bold=['c']) == '|  | SD |\n| --- | --- |\n| a_b | 60.0 |\n| **c** | 60.0 |\n| copy_ct | 70.0 |'
    with pytest.raises(ValueError, match='no form .html. of a table; there are markdown, latex'):
        T.render(MEANS, 'html')


def test_patients_are_the_samples():
    paper = T.paper_table(measured(), ['SD', 'Nabf'], ['ours', 'copy_ct', 'theirs'])
    assert paper.cells.index.tolist() == ['ours', 'copy of CT', 'theirs'] and list(paper.cells) == ['SD ↑', 'Nabf ↓']
    assert paper.cells['SD ↑']['ours'] == '62.5 ± 0.7' and paper.marked['Nabf'].tolist() == ['second', '', 'best']
    twice = T.paper_table(measured(), ['SD', 'SD', 'Nabf'], ['ours', 'copy_ct', 'theirs', 'ours'])
    assert twice.cells.equals(paper.cells)
    one = T.paper_table(measured(1))
    assert one.cells['SD ↑']['ours'] == '62.0' and 'Mean over 2 slices of one patient' in one.note
    for wrong in ({'columns': ['VIV']}, {'methods': ['nobody']}):
        with pytest.raises(ValueError, match='There is no'):
            T.paper_table(measured(), **wrong)


def test_each_patient_counts_once_in_the_table_of_a_paper():
    "However many slices there are of one, and a slice that is far off counts in the mean of its patient; who saw a case is told of those that are shown."
    rows = [{'method': 'ours', 'name': f'{case}{index}', 'case': case, 'SD': value} for case, values in (('1', [10.]), ('2', [20., 20., 50.])) for index, value in enumerate(values)]
    paper = T.paper_table(pd.DataFrame(rows), seen=['theirs'])
    assert paper.cells['SD ↑'].tolist() == ['20.0 ± 14.1'] and '†' not in paper.note


@pytest.mark.parametrize('text, values', [('a,b', ['a', 'b']), ("'a,b',c", ['a,b', 'c']), ('[1,2],[3]', ['[1,2]', '[3]']), ('["x"]', ['["x"]']), (' a , b', ['a', 'b']), ('', [''])])
def test_values_between_commas(text, values):
    assert T.split_values(text) == values


@pytest.mark.parametrize('text', ['<!-- a -->\nold\n', 'old\n<!-- end of a -->', '<!-- a -->\n<!-- end of a -->\n' * 2])
def test_a_text_without_its_two_comments_is_refused(text):
    with pytest.raises(ValueError, match='<!-- end of a -->'):
        T.replace_blocks(text, {'a': 'new'})


def test_a_method_may_have_a_sign_of_a_comment_in_its_name(tmp_path):
    (tmp_path / 'metrics.csv').write_text('# a convention\n# and more\nname,method,case,VIF\np#1_001.png,net #2,p#1_,0.5\n#2_001.png,#1,#2_,0.25\n')
    table = T.read_rows(tmp_path / 'metrics.csv', index_col='name')
    assert table.values.tolist() == [['net #2', 'p#1_', .5], ['#1', '#2_', .25]] and list(table.index) == ['p#1_001.png', '#2_001.png']


def test_a_bar_in_a_name_makes_no_column_of_a_table_in_markdown():
    table = pd.DataFrame({'VIF': [.5]}, index=pd.Index(['a|b'], name='method'))
    assert T.render(table).splitlines()[-1] == r'| a\|b | 0.500 |'


def test_a_record_comes_back_as_it_was(tmp_path):
    table = pd.DataFrame({'case': ['01', '2'], 'kind': ['# 3, dark', 'bright'], 'VIF': [0.123456789, np.nan]})
    path = T.write_record(tmp_path / 'record.csv', 'two\npatients', 'none.ipynb', table)
    assert path.read_text(encoding='utf-8').splitlines()[:2] == ['# two patients; made by nbs/none.ipynb', 'case,kind,VIF']
    pd.testing.assert_frame_equal(T.read_record(path, 'patients', dtype={'case': str}), table.round(5))
    table = pd.DataFrame({'case': ['NA', '007'], 'method': ['null', 'None'], 'VIF': [.5, np.nan]})      # they may be called so
    pd.testing.assert_frame_equal(T.read_record(T.write_record(path, 'patients', 'none.ipynb', table), 'patients', dtype={'case': str}), table)
    pd.testing.assert_frame_equal(T.read_rows(path), table)
    for content in (b'', b'# a line alone\n', b'VIF\n0.5\n', b'# \xff\xfe\nVIF\n0.5\n'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'record\.csv is no record of a table .* make it anew'):
            T.read_record(path)
