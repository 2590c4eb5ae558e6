"""Write the tables of README.md, MODEL_CARD.md and results/README.md from recorded results, between their comments.

    tables.py              writes them (make tables)
    tables.py --check      exits with 1 if a text differs from the record
    tables.py --commands   prints the commands that make the records (make record runs them)
"""
import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pandas as pd

from medfusion.alignment import out_of_register
from medfusion.backbone import load_backbone
from medfusion.cross_validation import against_rival, detection_record, folds_table, half_widths, missing_folds, read_folds
from medfusion.detection import summarise_detection
from medfusion.evaluation import ranks, reported_columns, summarise
from medfusion.inference import load_model, methods, shipped_models
from medfusion.runs import read_run
from medfusion.tables import number_text, render, replace_blocks, titles, with_spread, write_tables

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / 'results' / 'recorded'
NETWORKS = {'wavelet': 'wavelet', 'wavelet-lite': 'wavelet-lite', 'resnet': 'ResNet', 'resnet@0': 'ResNet@0'}    # @0: the dial at 0
# The networks that ship have seen every patient; where cases 34 and 41 judge, those of the fold stand that left these out.
UNSEEN = ', '.join(f'{name}=results/recorded/cross_validation/{"".join([method, "_shipped-without-34-41", *turned])}'
                   for name in NETWORKS for method, *turned in [name.partition('@')])
# The commands that make the records; each is printed above its table.
COMMANDS = {
    'case_41': ['medfusion data harvard', 'medfusion train wavelet --run defaults',
                f"medfusion benchmark --run case_41 -p save_dir=results/recorded -p 'checkpoints=[{UNSEEN}, run:defaults]'"],
    'cases_34_41': ['medfusion data harvard',
                    "medfusion benchmark --run cases_34_41 -p save_dir=results/recorded -p 'join=[val]' "
                    f"-p 'checkpoints=[{UNSEEN}]' "
                    '-p published=results/published/peers_cases_34_41.csv -p detection=true'],
    'phantom': ['medfusion data phantom results/phantom',
                'medfusion benchmark --run phantom -p save_dir=results/recorded -p ct_dir=results/phantom/test/CT '
                "-p mri_dir=results/phantom/test/MRI -p 'checkpoints=[wavelet, wavelet-lite, resnet]'"],
}
TITLES = titles() | NETWORKS | {'defaults': 'wavelet, documented defaults'}
# Cross-validation: the recipes, by their titles. Folds are no folder with a run.json, so `make record` leaves them.
RECIPES = {'resnet_edges' if name == 'resnet@0' else f'{name}_shipped': title for name, title in NETWORKS.items()}    # the dial is added to the network of resnet_edges
BEFORE = {'wavelet_table': 'wavelet, its first recipe'}      # a recipe that another one is compared with
THRESHOLD = inspect.signature(out_of_register).parameters['gain'].default    # of the warning
# What was wanted of speed, by the names of the ratios that the benchmarks print; the two of a GPU are read from tables of its own.
WANTED = {'wavelet, as fast as at b611665': 1.8, 'resnet, as fast as at b611665': 1.9, 'wavelet-lite, as fast as wavelet at b611665': 9,
          'wavelet, from files to files, of the network alone': 80, 'evaluate, 2 processes of 2 times one': 90,
          'a training step of the wavelet network, as fast as at b611665': 1.5,
          'training wavelet, two processes of twice one': 90, 'training resnet, two processes of twice one': 90}
WANTED_OF_GPU = {'wavelet on a GPU, of the roofline': 50, 'wavelet on a GPU, from files to files, of the network alone': 95}
SEEN = '\n\n† This network was trained on slices of a case that is judged here.'


def with_command(record, table):
    "The commands that make what a record holds, in a folder of whoever types them (the record is there already), and a table of it."
    return '```sh\n' + '\n'.join(COMMANDS[record]).replace(' -p save_dir=results/recorded', '') + f'\n```\n\n{table}'


def recorded(record, table='summary'):
    "A CSV table of a recorded run, its methods called by their titles."
    frame = pd.read_csv(RECORDED / record / f'{table}.csv')
    return frame.assign(method=frame.method.map(lambda name: TITLES.get(name, name)))


def as_markdown(table, record):
    "A table of methods as Markdown: our networks bold, those that saw a judged case in training marked."
    summary = recorded(record).set_index('method')
    marks = {name: f'{name} †' for name in summary.index if isinstance(summary.get('trained_on', {}).get(name), str)}
    text = render(table.rename(index=marks, columns={'invented': 'invented ↓'}), bold=[marks.get(name, name) for name in NETWORKS.values()])
    return text + (SEEN if '†' in text else '')


def means(record, first=None):
    "The reported columns of a recorded run, by mean rank."
    return as_markdown(recorded(record).set_index('method').reindex(columns=reported_columns()).head(first), record)


def ranked(record, first=None):
    "Mean rank and the ranked columns of a recorded run."
    columns = read_run(RECORDED / record)['parameters']['columns']
    table = recorded(record).set_index('method')[['mean_rank', *columns]].head(first)
    table['mean_rank'] = table.mean_rank.map('{:.2f}'.format)
    return as_markdown(table.rename(columns={'mean_rank': 'mean rank'}), record)


def comparison(record):
    "Sentences: where a network of ours is better or worse than whichever other method is best in a column."
    tests, sentences, published = recorded(record, 'significance'), [], ' (published)'
    for name in (TITLES['wavelet'], TITLES['resnet']):
        own = tests[(tests.method == name) & (tests.rival == 'best in the column')]
        parts = []
        for verdict, word in (('better', 'ahead in'), ('worse', 'behind in'), ('open', 'not told apart in')):
            there = [f'{row.column} ({row.against.removesuffix(published)})' for row in own[own.verdict == verdict].itertuples()]
            parts += [f'{word} {", ".join(there)}'] if there else []
        worst = own[own.verdict != 'open'].p_holm.max()
        sentences.append(f'{name}: {"; ".join(parts)}; Holm-corrected p at most {worst:.1g}, a paired Wilcoxon test over {own.over.iloc[0]}.')
    return '\n'.join(f'* {sentence}' for sentence in sentences)


def complete_folds(recipes=RECIPES):
    "{title: records} of the recipes whose folds have left every patient out."
    found = {title: read_folds(RECORDED / 'cross_validation', recipe)[0] for recipe, title in recipes.items()}
    return {title: records for title, records in found.items() if records and not missing_folds(records)}


def with_intervals(table):
    "Means over patients as text, ± half of their 95 % interval, by mean rank; a row for each method."
    columns = reported_columns()
    shown, half = summarise(table, columns), half_widths(table, columns)
    order = ranks(shown[columns[:columns.index('SSIM2') + 1]]).index
    return with_spread(shown.loc[order], half.loc[order]).rename_axis('method')


def folds_commands(folds):
    "The commands that make the folds of some recipes, given by their records; one for those that leave out the same cases."
    recipes = {}
    for records in folds:
        recipes.setdefault(tuple(','.join(record['left_out']) for record in records), []).append(records[0]['recipe'])
    return '\n'.join(f'papermill nbs/92_cross_validation.ipynb out.ipynb -p make missing -y "recipes: [{", ".join(names)}]"'
                     + (f' -y "cases: {[*cases]}"' if any(',' in one for one in cases) else '') for cases, names in recipes.items())


CHOSEN = ('Case 34 chose the recipes, 34 and 41 the fourth and fifth of the wavelet network\'s six and the last of ResNet\'s three, 33 and 37 how much invented edges weigh in the '
          'last four; they are among the 8. All 8 chose how much lesions weigh in wavelet-lite, where its teacher\'s dial stands, and how high that of the wavelet network may.')


def folds_told(folds, chosen=CHOSEN):
    "What cross-validation says: how it was done, by whom the recipes were `chosen`, the table, and each network against the maximum, patient by patient."
    table = folds_table(folds)
    patients, told = table.case.unique(), []
    for title in folds:
        tests = against_rival(table, title, columns=reported_columns())
        parts = [f'{word} {", ".join(f"{row.Index} (in {row.ahead_in} of {row.patients})" for row in there.itertuples())}'
                 for verdict, word in (('better', 'ahead in'), ('worse', 'behind in'), ('open', 'not told apart in'))
                 if len(there := tests[tests.verdict == verdict])]
        told.append(f'* {title}: {"; ".join(parts)}.')
    names = {name: TITLES.get(name, name) for name in table.method.unique() if name not in folds}
    shown = with_intervals(table).rename(index=names, columns={'invented': 'invented ↓'})
    commands = f'medfusion data harvard\n{folds_commands(folds.values())}'
    trained = sorted({len(record['trained_on']) for records in folds.values() for record in records})
    lacking = [title for title in RECIPES.values() if title not in folds]
    remarks = sorted({record['remark'] for records in folds.values() for record in records if record.get('remark')})
    remarks += [f'No folds of {" and ".join(lacking)} are recorded yet.'] if lacking else []
    return (f'Means over {len(patients)} patients, each judged by a network that never saw it, trained on {" or ".join(map(str, trained))} others by one recipe, '
            f'number of epochs included, ± half of the 95 % interval (Student\'s t over patients). {chosen} '
            f'In brackets: in how many patients the network is better; they are told apart where the 95 % interval of the mean difference leaves out 0.\n\n```sh\n{commands}\n```\n\n'
            f'{render(shown, bold=list(folds))}\n\nAgainst the maximum, within each patient:\n\n{chr(10).join(told)}' + ''.join(f'\n\n{remark}' for remark in remarks))


def price():
    "What the wavelet network pays in the usual columns for lesions that can be found: its first recipe beside it, over all patients."
    folds = {title: records for title, records in complete_folds(RECIPES | BEFORE).items() if title in ('wavelet', *BEFORE.values())}
    if len(folds) < 2:
        return 'The folds of its first recipe are not recorded yet.'
    table, columns = folds_table(folds), ['SD', 'SCD', 'VIF', 'VIF_min', 'Qabf', 'SSIM2', 'invented']
    means = summarise(table, columns).T
    tests = against_rival(table, 'wavelet', BEFORE['wavelet_table'], columns).loc[means.index]
    shown = means.apply(lambda row: row.map(lambda value: number_text(value, row.name)), axis=1)[[*folds, 'maximum']]
    shown['wavelet ahead by'] = [f'{row.advantage:.3g} ({row.low:.3g} to {row.high:.3g})' for row in tests.itertuples()]
    shown['in patients'] = [f'{row.ahead_in} of {row.patients}' for row in tests.itertuples()]
    return f'```sh\n{folds_commands([folds[BEFORE["wavelet_table"]]])}\n```\n\n{render(shown.rename_axis("column"), bold=[])}'


def case_41():
    "The table of case 41 beside the headline; the headline is that table where not every fold is recorded."
    if not complete_folds():
        return 'See the table above.'
    return 'Means over the slices of case 41; recipes were chosen on case 34, the fourth and fifth of the wavelet network\'s and the last of ResNet\'s on 34 and 41 (of the documented defaults the best epoch on 34, too).\n\n' + with_command('case_41', means('case_41'))


def headline(**words):
    "The first table of the pages: over all patients where every fold is recorded (for `words` see `folds_told`), else that of case 41."
    if folds := complete_folds():
        return folds_told(folds, **words)
    return ('Means over the slices of case 41, a patient that training never saw; recipes were chosen on case 34.\n\n'
            + with_command('case_41', means('case_41')))


def lesions():
    "What each method keeps of each kind of lesion of the synthetic head."
    kept = pd.DataFrame(read_run(RECORDED / 'phantom')['numbers']['lesions_kept']).T.rename_axis('method')
    kept = kept.loc[['wavelet', 'wavelet-lite', 'resnet', 'maximum', 'average', 'copy_ct', 'copy_mri']]
    return as_markdown(kept.rename(index=TITLES).map('{:.2f}'.format), 'phantom')


def painted():
    "What can still be found of every kind of painted lesion: the efficiency of each method."
    found = recorded('cases_34_41', 'detection_summary')
    table = found.pivot(index='method', columns='lesion', values='efficiency')[list(dict.fromkeys(found.lesion))]
    rows = [TITLES.get(name, name) for name in (*NETWORKS, 'maximum', 'average', 'laplacian_pyramid', 'copy_ct', 'copy_mri')]
    return as_markdown(table.loc[rows].map('{:.2f}'.format), 'cases_34_41')


def painted_by_patient(end='', shown=('maximum', 'average', 'laplacian_pyramid')):
    """What can still be found of every kind of painted lesion, over all patients, each fused by networks that never saw it: the efficiency
    and its interval, with the location known, or uncertain where `end` is '_search'."""
    found = [path for records in complete_folds(RECIPES | BEFORE).values()
             if (path := detection_record(RECORDED / 'cross_validation', records)).is_file()]
    if not found:
        return 'No table of painted lesions over the folds is recorded yet.'
    joined = pd.concat(pd.read_csv(path, dtype={'case': str}) for path in found).drop_duplicates(['lesion', 'method', 'case'])
    summary = summarise_detection(joined)[[f'efficiency{end}{bound}' for bound in ('', '_low', '_high')]]
    told = summary.apply(lambda row: '{:.2f} ({:.2f} to {:.2f})'.format(*row), axis=1)
    table = told.unstack('method', sort=False).rename_axis('lesion')
    columns = [name for name in (*RECIPES, *BEFORE, *shown) if name in table]
    names = {**TITLES, **RECIPES, **BEFORE}
    return render(table[columns].rename(columns=names), bold=[])


def painted_on_phantom():
    "What can still be found of lesions in the tissue of the synthetic head, by the networks that ship: the efficiency and its interval."
    table = pd.read_csv(RECORDED / 'phantom_lesions.csv', comment='#')
    told = table[['efficiency', 'efficiency_low', 'efficiency_high']].apply(lambda row: '{:.2f} ({:.2f} to {:.2f})'.format(*row), axis=1)
    wide = table.assign(told=told).pivot(index='lesion', columns='method', values='told').loc[table.lesion.unique()]
    shown = [name for name in table.method.unique() if name in (*NETWORKS, 'wavelet@1', 'maximum', 'average', 'laplacian_pyramid')]
    return render(wide[shown].rename(columns=TITLES))


def conditions():
    "VIF and Qabf on slices of other sizes, contrasts, windows and noise."
    table = pd.read_csv(RECORDED / 'conditions.csv', comment='#')
    table = table.assign(method=table.method.map(lambda name: TITLES.get(name, name)))
    wide = pd.concat({column: table.pivot(index='condition', columns='method', values=column) for column in ('VIF', 'Qabf')}, axis=1)
    wide = wide.loc[table.condition.unique(), [(column, name) for column in ('VIF', 'Qabf') for name in table.method.unique()]]
    return render(wide.set_axis([' '.join(pair) for pair in wide.columns], axis=1).map('{:.3f}'.format))


def register():
    "How often a displaced pair is noticed, and what a displacement costs; for lengths that both records hold."
    found = pd.read_csv(RECORDED / 'alignment_roc.csv')
    warned = found[found.threshold == THRESHOLD].pivot(index='shift', columns='part', values='found').mul(100).map('{:.0f} %'.format)
    cost = pd.read_csv(RECORDED / 'alignment_cost.csv').query("kind == 'shift'")
    lesions = pd.read_csv(RECORDED / 'alignment_lesions.csv').query("kind == 'shift'")
    shown = lesions.assign(shown=lesions.lesion.map(lambda lesion: 'CT' if lesion in ('calcification', 'haemorrhage') else 'MRI'))
    eta = shown.groupby(['shown', 'method', 'amount']).efficiency.mean()
    columns = {f'VIF {TITLES.get(name, name)}': rows.set_index('amount').VIF for name, rows in cost.groupby('method', sort=False)}
    columns |= {f'η {kind}, {TITLES.get(name, name)}': eta[kind, name] for kind in ('CT', 'MRI') for name in cost.method.unique()}
    table = pd.DataFrame(columns).map('{:.2f}'.format).join(warned.add_prefix('warned of, '), how='outer').fillna('–')
    return render(table.rename_axis('displaced by (pixels)').rename(index=str))


def networks():
    "The shipped networks: file, size, weights (those that were trained; a frozen backbone has a row of its own), best epoch, recipe."
    rows, shipped = [], ROOT / 'medfusion' / 'shipped'
    for name in [*shipped_models(), 'backbone']:
        folder = shipped_models()[name].path.parent if name in shipped_models() else shipped / 'resnet50_backbone'
        about = json.loads((folder / 'metadata.json').read_text(encoding='utf-8'))
        file = folder / about['checkpoint']
        network = load_model(name, 'cpu') if name in shipped_models() else load_backbone('medfusion').backbone
        kept = network.state_dict()           # a fusion network's leaves its frozen backbone out
        weights = sum(weight.numel() for key, weight in network.named_parameters() if key in kept)
        rows.append((f'`{name}`', f'`{file.relative_to(shipped)}` ({file.stat().st_size / 1e6:.2g} MB)', f'{weights:,}',
                     about['epoch'], f'`{about["recipe"].split(" ")[0]}`', f'`{about["sha256"][:12]}…`'))
    columns = ['network', 'file in `medfusion/shipped/`', 'weights', 'best epoch', 'recipe', 'SHA-256']
    return render(pd.DataFrame(rows, columns=columns).set_index('network'))


def notebooks():
    "Every notebook with its module and its one line."
    rows, told = [], [method.notebook for method in methods().values()]
    order = sorted((ROOT / 'nbs').glob('*.ipynb'), key=lambda path: ('19', told.index(path.name)) if path.name in told else (path.name, 0))
    for path in order:
        cells = [''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells']]
        line = re.search(r'^> (.*(?:\n(?=\S).*)*)', cells[0], re.MULTILINE)
        module = next((found[1] for cell in cells if (found := re.search(r'#\s*\|\s*default_exp (\w+)', cell))), '')
        rows.append((f'[{path.stem}](../nbs/{path.name})', f'`medfusion.{module}`' if module else '', ' '.join(line[1].split())))
    return render(pd.DataFrame(rows, columns=['notebook', 'module', 'what it is']).set_index('notebook'))


def peers():
    "Where the published networks come from."
    table = pd.read_csv(ROOT / 'results' / 'published' / 'networks.csv', dtype=str, index_col='method')
    return render(table.rename(columns={'trained_for': 'trained for', 'seconds_per_pair': 's per 256×256 pair, one CPU thread'}))


def ratios(text):
    "{name: (value, unit, remark)} of the ratios in what benchmarks printed; the unit is % or times."
    found = re.findall(r'^ratio: (.+): ([\d.]+)(%| times)(?: \((.+)\))?$', text, re.MULTILINE)
    return {name: (float(value), unit, remark) for name, value, unit, remark in found}


def speed_of_gpu(text):
    "The same of the record of a GPU: the highest share of the roofline, and that of the network's speed from files to files."
    shares = re.findall(r'^(?:float32|bfloat16) .* (\d+)% ', text, re.MULTILINE), re.findall(r'^(?:best: .*,|ratio: .* of the network alone:) (\d+)%', text, re.MULTILINE)
    return {name: (float(max(found, key=int)), '%', '') for name, found in zip(WANTED_OF_GPU, shares)}


def speed():
    "The blocks of benchmarks/README.md: the ratios that were wanted, those that nobody had asked for, and the table of the networks."
    cpu, gpu = (ROOT / 'benchmarks' / f'{name}_speed.txt' for name in ('cpu', 'gpu'))
    if not cpu.is_file():
        return dict.fromkeys(('wanted', 'beside', 'networks'), 'Nothing is recorded yet: `python benchmarks/record.py`.')
    cpu, gpu = (path.read_text(encoding='utf-8') for path in (cpu, gpu))
    measured, wanted = ratios(cpu) | speed_of_gpu(gpu), WANTED | WANTED_OF_GPU
    rows = {name: [f'{least}{unit}', f'{value:g}{unit}', 'reached' if value >= least else 'missed']
            for name, least in wanted.items() for value, unit, _ in [measured[name]]}
    others = {name: [f'{value:g}{unit}', remark] for name, (value, unit, remark) in measured.items() if name not in wanted}
    tables = [render(pd.DataFrame.from_dict(table, orient='index', columns=columns).rename_axis('ratio'))
              for table, columns in ((rows, ['wanted', 'measured', 'verdict']), (others, ['measured', 'remark']))]
    return {'wanted': tables[0], 'beside': tables[1], 'networks': f'```text\n{cpu.split("ratio: ")[0].strip()}\n```'}


def benchmarks():
    "Every script of benchmarks/ with the first line of its docstring."
    rows = [(f'[{path.name}]({path.name})', ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))).splitlines()[0])
            for path in sorted((ROOT / 'benchmarks').glob('*.py'))]
    return render(pd.DataFrame(rows, columns=['script', 'what it shows']).set_index('script'))


def blocks():
    "{file: {name of a block: its text}}."
    total = len(recorded('cases_34_41'))
    pooled = f'{with_command("cases_34_41", ranked("cases_34_41", 6))}\n\nThe first 6 of {total} by mean rank. Against the best of the others, our networks and the copies left out, column by column:'
    kept = with_command('phantom', lesions())
    briefly = 'Among them are the patients who chose the recipes: case 34, and for some of the weights others, too ([which](MODEL_CARD.md)).'
    return {'README.md': {'patients': headline(chosen=briefly), 'cases 34 and 41': f'{pooled}\n\n{comparison("cases_34_41")}'},
            'docs/notebooks.md': {'notebooks': notebooks()},
            'MODEL_CARD.md': {'networks': networks(), 'patients': headline(), 'price': price(), 'case 41': case_41(), 'lesions': kept,
                              'painted lesions by patient': painted_by_patient(), 'painted lesions, location uncertain': painted_by_patient('_search', ('maximum', 'average')),
                              'lesions of the synthetic head': painted_on_phantom(), 'conditions': conditions(), 'register': register(), 'painted lesions': with_command('cases_34_41', painted())},
            'benchmarks/README.md': {**speed(), 'benchmarks': benchmarks()},
            'results/README.md': {'cases 34 and 41': with_command('cases_34_41', ranked('cases_34_41')), 'published networks': peers()}}


def stale():
    "The files whose text differs from the record."
    return [file for file, parts in blocks().items() if replace_blocks(text := (ROOT / file).read_text(encoding='utf-8'), parts) != text]


if __name__ == '__main__':
    if '--commands' in sys.argv:
        print('\n'.join(dict.fromkeys(command for commands in COMMANDS.values() for command in commands)))
        sys.exit()
    if '--check' in sys.argv:
        old = stale()
        sys.exit(f'{", ".join(old)}: text and record differ; make tables writes them anew.' if old else 0)
    for name, parts in blocks().items():
        print(f'{name}: {"written anew" if write_tables(ROOT / name, parts) else "as recorded"}')
