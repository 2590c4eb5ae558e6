"""README and model card: their commands are understood, their links lead somewhere, their tables are those of the records."""
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from medfusion import cli
from medfusion.evaluation import cases_trained_on
from medfusion.files import read_image, sha256_of
from medfusion.inference import find_model
from medfusion.phantom import write_phantom
from medfusion.runs import check_parameters, notebook_parameters, read_run, write_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['README.md', 'MODEL_CARD.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'results/README.md', 'benchmarks/README.md', 'docs/notebooks.md', 'docs/index.md']
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
sys.path[:0] = [str(ROOT / '.ci'), str(ROOT / 'benchmarks')]
import machine  # noqa: E402  (it lies in benchmarks)
import tables  # noqa: E402  (it lies in .ci)


def commands(text):
    "The medfusion commands in the shell blocks of a page, without comments."
    blocks = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
    return [re.split(r'\s+#\s', line)[0].strip() for block in blocks for line in block.splitlines() if line.startswith('medfusion ')]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands((ROOT / page).read_text(encoding='utf-8'))))
RUNS = [command for command in COMMANDS if command.split()[1] in ('train', 'benchmark')]


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    "A folder with slices of a small phantom in the places that the README names."
    root = tmp_path_factory.mktemp('workplace')
    phantom = write_phantom(root / 'phantom', cases=3, slices=2, size=64)
    for kind in ('CT', 'MRI'):
        for folder in (root / kind.lower(), root / 'my_slices' / kind):
            folder.mkdir(parents=True)
            for path in phantom.glob(f'*/{kind}/*.png'):
                shutil.copy(path, folder)
    for kind in ('ct', 'mri'):
        shutil.copy(next((root / kind).iterdir()), root / f'{kind}.png')
    shutil.copytree(ROOT / 'params', root / 'params')
    shutil.copytree(ROOT / 'results' / 'published', root / 'results' / 'published')
    return root


def invoke(command, *more):
    "What a command ended with, in this process."
    return CliRunner().invoke(cli.app, [*shlex.split(command)[1:], *map(str, more)])


def test_readme_is_one_page():
    assert len(TEXT.splitlines()) <= 120


def test_tables_are_those_of_the_records():
    assert tables.stale() == [], 'text and record differ; make tables writes the pages anew'


def test_the_order_of_notebooks_is_not_that_of_the_folder(monkeypatch):
    "The methods stand in the order of their table, wherever a filesystem puts their files."
    told, files = tables.notebooks(), Path.glob
    for way in (1, -1):
        monkeypatch.setattr(Path, 'glob', lambda folder, pattern: sorted(files(folder, pattern))[::way])
        assert tables.notebooks() == told


def test_no_network_weighs_nothing():
    assert '(0.0 MB)' not in tables.networks()


def as_run(command, monkeypatch):
    "The notebook that a train or benchmark command would run, its checked parameters, and the run's name."
    ran = []
    monkeypatch.setattr('medfusion.inference.check_model', lambda spec: None)       # of runs that nobody made here
    monkeypatch.setattr(cli, 'run_notebook', lambda notebook, given, run, *more: ran.append((notebook, check_parameters(notebook, given), run)) or Path('run'))
    done = invoke(command)
    assert done.exit_code == 0, done.output
    return ran[0]


@pytest.mark.parametrize('command', RUNS)
def test_training_and_benchmark_commands_are_understood(command, workplace, monkeypatch):
    "The runs themselves are those of test_papermill.py and test_benchmark.py."
    monkeypatch.chdir(workplace)
    notebook, parameters, _ = as_run(command, monkeypatch)
    assert (ROOT / 'nbs' / notebook).is_file() and parameters.keys() == notebook_parameters(notebook).keys()


@pytest.mark.parametrize('record', tables.COMMANDS)
def test_the_command_above_a_table_makes_its_record(record, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, parameters, name = as_run(tables.COMMANDS[record][-1], monkeypatch)
    recorded = read_run(ROOT / 'results' / 'recorded' / record)
    places = {key: value for key, value in parameters.items() if isinstance(value, str) and os.path.isabs(value)}
    assert name == record == recorded['run'] and recorded['state'] == 'finished'
    given = parameters | {key: os.path.relpath(value, ROOT / 'nbs') for key, value in places.items()} | {'save_dir': f'../results/recorded/{record}'}
    given['checkpoints'] = [spec.replace(f'={ROOT}/', '=../') for spec in given['checkpoints']]
    # What the notebook had no parameter for had its default.
    assert check_parameters('90_benchmark.ipynb', recorded['parameters']) == check_parameters('90_benchmark.ipynb', given)
    columns = [column for column in pd.read_csv(ROOT / 'results' / 'recorded' / record / 'summary.csv') if not column.endswith('_sd')]
    assert set(parameters['columns']) <= set(columns)


@pytest.mark.parametrize('record', ['case_41', 'cases_34_41', 'phantom'])
def test_records_are_of_the_shipped_networks_or_of_the_fold_that_never_saw_the_patients(record):
    there = read_run(ROOT / 'results' / 'recorded' / record)
    hashes, judged = {name.split(':')[0]: sha256 for name, sha256 in there['checkpoints'].items()}, {*there['split']['test']}
    for name, model in tables.shipped_models().items():
        place = model.path
        if judged & {*model.metadata['cases']['train']}:
            place = find_model(str(ROOT / f'results/recorded/cross_validation/{name}_shipped-without-34-41')).path
        assert hashes[name] == sha256_of(place) and not judged & cases_trained_on(place)


def test_the_other_commands_run(workplace, monkeypatch):
    "Fusing, importing and checking, in the order of the page; `medfusion scan` is that of test_scan_fusion.py."
    others = [command for command in commands(TEXT) if command not in RUNS and 'harvard' not in command and ' scan ' not in command]
    assert len(others) >= 3
    monkeypatch.chdir(workplace)
    for command in others:
        done = invoke(command)
        assert done.exit_code == 0, done.output
    assert len(list((workplace / 'fused').glob('*.png'))) == len(list((workplace / 'ct').iterdir()))


def test_the_sweep_is_understood(workplace):
    options, = re.findall(r'medfusion sweep.*?\(`(-p [^`]*)`\)', TEXT)
    done = invoke(f'medfusion sweep wavelet {options} --dry-run', *(word for kind in ('CT', 'MRI') for word in ('-p', f'{kind.lower()}_dir={workplace}/my_slices/{kind}')),
                  '-p', f'save_dir={workplace}/sweeps')
    assert done.exit_code == 0 and done.stdout.count('begin') == 4, done.output


def test_the_download_fails_with_a_sentence_where_there_is_no_server(workplace):
    "The one command that needs a network; the downloads themselves are tested in test_data.py."
    assert 'medfusion data harvard' in COMMANDS
    done = invoke('medfusion data harvard', workplace / 'harvard', '--base-url', 'http://127.0.0.1:9', '--cache', workplace / 'cache')
    assert done.exit_code == 1 and '127.0.0.1' in done.output and 'Traceback' not in done.output
    assert not (workplace / 'harvard').exists()


def test_the_three_lines_of_python(workplace, monkeypatch):
    [code] = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
    monkeypatch.chdir(workplace)
    names = {}
    exec(code, names)
    assert names['fused'].shape == read_image('ct.png').shape and names['fused'].dtype == 'uint8'


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)#]+)\)', text) if not link.startswith('http')]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_no_number_of_a_table_is_typed_by_hand():
    "Outside of the blocks that `make tables` writes, README and model card hold no decimal fractions as tables have them; those of sentences (.02) are asked for below."
    for page in ('README.md', 'MODEL_CARD.md'):
        text = (ROOT / page).read_text(encoding='utf-8')
        by_hand = re.sub(r'<!-- (.+?) -->.*?<!-- end of \1 -->', '', text, flags=re.DOTALL)
        assert re.findall(r'(?<![\w.])\d+\.\d+(?![\w.]*\w)', by_hand.replace('Apache-2.0', '').replace('apache-2.0', '')) == []


def said_in_words():
    "[(a sentence of the model card, a group for each number, those numbers by the records)]."
    dial, head, conditions = (pd.read_csv(ROOT / f'results/recorded/{name}.csv', comment='#') for name in ('dial', 'phantom/summary', 'conditions'))
    folds = tables.folds_table(tables.complete_folds(tables.RECIPES | tables.BEFORE)).groupby('method')
    mean, worst = folds.mean(numeric_only=True), 100 * folds.invented_worst.max()
    lead, first, at_0 = mean - mean.loc['maximum'], tables.BEFORE['wavelet_table'], dial[dial.lesions == '0'].mean(numeric_only=True)
    head, seen = head.set_index('method'), conditions.pivot(index='condition', columns='method', values='VIF')
    kept = [head[column][name] for column in ('Qabf', 'VIF_min') for name in ('wavelet', 'maximum')]
    return [(r'same rule, VIF and Qabf (\S+) and (\S+) above', [lead.VIF['ResNet'], lead.Qabf['ResNet']]),
            (r'VIF that is left is (\S+) above', [lead.VIF['wavelet']]),
            (r'first recipe \((\S+) and (\S+)\) and Qabf nearly the same \((\S+) and (\S+)\)', [at_0.VIF, mean.VIF[first], at_0.Qabf, mean.Qabf[first]]),
            (r"VIF is (\S+) there, SCD ahead of the maximum's by (\S+); Qabf, (\S+) \((\S+)\), and VIF_min, (\S+) \((\S+)\), stay below",
             [head.VIF['wavelet'], head.SCD['wavelet'] - head.SCD['maximum'], *kept]),
            (r"VIF is (\S+) on the synthetic head's test slices, Qabf (\S+), VIF_min (\S+)\.", [*head.loc['resnet', ['VIF', 'Qabf', 'VIF_min']]]),
            (r'no slice of it has more than (\S+) % .* with the dial at 0 they have (\S+) %', [worst['ResNet'], worst['ResNet@0']]),
            (r'left-out slice of the eight patients has more than (\S+) %', [worst['wavelet']]),
            (r'`wavelet-lite` is behind it in VIF in (\S+)', [sum(seen['wavelet-lite'] < seen.maximum)])]


def test_what_the_model_card_says_in_words_is_what_is_recorded():
    text, words = (ROOT / 'MODEL_CARD.md').read_text(encoding='utf-8'), {'three': 3, 'four': 4, 'five': 5, 'six': 6}
    for sentence, numbers in said_in_words():
        [found] = re.finditer(sentence, text)
        for said, number in zip(found.groups(), numbers, strict=True):
            half = 0.6 * 10 ** -len(said.partition('.')[2])    # a little more: bounds are rounded up
            assert float(words.get(said, said)) == pytest.approx(number, abs=half), (sentence, said, number)


def test_ratios_are_read_as_the_benchmarks_print_them():
    printed = '\n'.join(['a table', machine.ratio('a, by b', 1.234, remark='slower elsewhere'), machine.ratio('c: d', .9, percent=True)])
    assert tables.ratios(printed) == {'a, by b': (1.23, ' times', 'slower elsewhere'), 'c: d': (90, '%', '')}


def test_what_the_readme_says_of_speed_is_what_was_recorded():
    value, *_ = tables.ratios((ROOT / 'benchmarks/cpu_speed.txt').read_text(encoding='utf-8'))['wavelet-lite, as fast as wavelet']
    said, = re.findall(r'more than (\w+) times as fast', TEXT)
    assert ['five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve'].index(said) + 5 == int(value)


def test_the_demonstration_judges_what_was_trained(tmp_path, monkeypatch, capsys):
    "From the records of its runs, whichever methods have one."
    import demo  # it lies in .ci
    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    rows = {'wavelet fusion': {'SF': 20.0, 'SD': 70.0}, 'average': {'SF': 10.0, 'SD': 60.0}}
    kept = {'wavelet fusion': {'tumour': 0.8, 'oedema': 0.7}, 'average': {'tumour': 0.9, 'oedema': 0.7}}
    for method, means in (('trainable_wavelet_fusion', rows), ('resnet_fusion', {'ResNet fusion': {'SF': 15.0, 'SD': 65.0}})):
        write_run(tmp_path / 'results' / method / 'demo', method=method, parameters={}, state='finished', started=0.0,
                  numbers={'means': means, 'lesions_kept': kept if means is rows else None})
    assert demo.report() == 1
    printed = capsys.readouterr()
    assert 'ResNet fusion' in printed.out and 'lesions keep 0.75' in printed.err and 'SF' not in printed.err
    assert demo.shortfalls('wavelet fusion', rows, {**kept, 'wavelet fusion': {'tumour': 0.8, 'oedema': 0.9}}) == []
    assert [found.split()[0] for found in demo.shortfalls('average', rows, kept)] == ['SF', 'SD', 'lesions']
