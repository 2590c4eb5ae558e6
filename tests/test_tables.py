"""Tables from outside: their corners, and LaTeX as TeX would read it."""
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


def test_markdown_stays_what_it_was():
    assert T.render(MEANS[['SD']], bold=['c']) == '|  | SD |\n| --- | --- |\n| a_b | 60.0 |\n| **c** | 60.0 |\n| copy_ct | 70.0 |'
    with pytest.raises(ValueError, match='no form .html. of a table; there are markdown, latex'):
        T.render(MEANS, 'html')


def test_patients_are_the_samples():
    paper = T.paper_table(measured(), ['SD', 'Nabf'], ['ours', 'copy_ct', 'theirs'])
    assert paper.cells.index.tolist() == ['ours', 'copy of CT', 'theirs'] and list(paper.cells) == ['SD ↑', 'Nabf ↓']
    assert paper.cells['SD ↑']['ours'] == '62.5 ± 0.7' and paper.marked['Nabf'].tolist() == ['second', '', 'best']
    one = T.paper_table(measured(1))
    assert one.cells['SD ↑']['ours'] == '62.0' and 'Mean over 2 slices of one patient' in one.note
    for wrong in ({'columns': ['VIV']}, {'methods': ['nobody']}):
        with pytest.raises(ValueError, match='There is no'):
            T.paper_table(measured(), **wrong)


@pytest.mark.parametrize('text, values', [('a,b', ['a', 'b']), ("'a,b',c", ['a,b', 'c']), ('[1,2],[3]', ['[1,2]', '[3]']), ('["x"]', ['["x"]']), (' a , b', ['a', 'b']), ('', [''])])
def test_values_between_commas(text, values):
    assert T.split_values(text) == values


@pytest.mark.parametrize('text', ['<!-- a -->\nold\n', 'old\n<!-- end of a -->', '<!-- a -->\n<!-- end of a -->\n' * 2])
def test_a_text_without_its_two_comments_is_refused(text):
    with pytest.raises(ValueError, match='<!-- end of a -->'):
        T.replace_blocks(text, {'a': 'new'})
