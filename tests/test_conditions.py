"""The notebook of other conditions: what it sets side by side, and what it does not."""
from pathlib import Path

import pytest
from conftest import run_cells

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / 'results' / 'recorded' / 'conditions.csv'


@pytest.mark.parametrize('change, columns', [
    (lambda line: line, ['gain', 'without, ahead of maximum', 'with, ahead of maximum']),
    (lambda line: line.replace('# case 34', '# case 41'), ['gain']),
    (lambda line: line[:-2] + '22' if line.endswith('11') else line, ['gain']),
    (lambda line: line.replace(',maximum,', ',pixel maximum,'), ['gain'])], ids=['as it is', 'another case', 'more slices', 'no maximum'])
def test_networks_are_set_beside_the_maximum_of_the_same_slices(tmp_path, change, columns):
    record = tmp_path / 'record.csv'
    record.write_text('\n'.join(map(change, RECORD.read_text(encoding='utf-8').splitlines())), encoding='utf-8')
    gain = run_cells(ROOT / 'nbs' / '93_conditions.ipynb', {'record': str(record)}, until='gain')['gain']
    assert list(gain.columns.levels[0][gain.columns.codes[0]].unique()) == columns and len(gain) == 12
