"""Make a finished run's network the one that ships: python .ci/ship.py METHOD RUN, or make ship METHOD=wavelet RUN=NAME.

The run must have ended, by the recipe params/METHOD_shipped.yaml with any seed, and its slices must lie where they lay, unchanged: the cases of each
part stand in the metadata. What a network has seen that the run started from counts as seen. A network that was trained on all patients
has nobody left to be judged by: its numbers are those of its recipe's folds, which have to be recorded.
"""
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml

os.environ.setdefault('OMP_NUM_THREADS', '1')

from medfusion.cross_validation import folds_table, missing_folds, read_folds, recipe_values, run_values, seen_before, values_sha256
from medfusion.data import sort_cases
from medfusion.evaluation import reported_columns, summarise
from medfusion.files import sha256_of
from medfusion.inference import find_model, in_place, methods, network_roles
from medfusion.runs import data_sha256, find_run, open_parts, read_run, resolve_path, run_checkpoint, split_of, write_metadata

ROOT = Path(__file__).resolve().parents[1]


def check_recipe(record, method, recipe):
    "Raises ValueError where a run was not made with the values of a recipe; seed and the networks that it stands on are free, and told."
    had, wanted = (recipe_values(method.notebook, one) for one in (record['parameters'], yaml.safe_load(recipe.read_text(encoding='utf-8'))))
    for name in sorted((had.keys() | wanted.keys()) - {*network_roles()}):
        if had.get(name) != wanted.get(name):
            told = [f'{one[name]!r}' if name in one else 'the default' for one in (had, wanted)]
            raise ValueError(f'{name} of the run {record["run"]} is {told[0]}, and of {recipe.name} {told[1]}: a network that ships is made by '
                             'its recipe. Train it again, or put what the run had into the recipe.')


def cases_seen(record):
    "The cases that a run's network was trained on, those of what it stands on among them."
    before = seen_before(record['parameters'])
    if judged := before & {*record['split']['val'], *record['split']['test']}:
        raise ValueError(f'What the run {record["run"]} stands on ({", ".join(network_roles())}, backbone_weights) was trained on case {sort_cases(judged)[0]}, by which '
                         'the run is judged; take what never saw it.')
    return sort_cases({*record['split']['train']} | before)


def numbers_of(means, cases, convention):
    "The means of a network on some cases, as metadata.json tells them."
    return {'cases': ', '.join(sort_cases(cases)), 'convention': convention,
            'means': {name: round(value, 6 if name == 'invented' else 4) for name, value in means.items()}}


def cross_validated(folder, patients, recipe, convention, recorded):
    "What the folds of a run's recipe say: means over its patients, each judged by a network that never saw it. ValueError where a fold is missing."
    records, _ = read_folds(recorded, recipe.stem, values_sha256(run_values(folder)))
    cases = {case for record in records for case in record['left_out']}
    if lacking := {*patients} - cases or missing_folds(records):
        raise ValueError(f'The run in {folder} was trained on all patients, and {recorded} holds no fold of {recipe.stem} that left case '
                         f'{sort_cases(lacking)[0]} out: nothing says how well its network does. nbs/92_cross_validation.ipynb makes the folds.')
    means = summarise(folds_table({recipe.stem: records}), reported_columns()).loc[recipe.stem]
    return numbers_of(means, cases, convention) | {'cases': f'{", ".join(sort_cases(cases))}, each by a fold that never saw it'}


def facts_of(folder, record, recipe, recorded):
    "What metadata.json says of the network of a run, beside what the checkpoint says itself."
    train, val, test = parts = open_parts(SimpleNamespace(**record['parameters']))
    if data_sha256(train, val) != record['data_sha256'] or split_of(*parts) != record['split']:
        raise ValueError(f'The slices in {train.pairs[0].ct.parents[1]} are not those that the run {record["run"]} was trained on.')
    names, everyone = {'train': train, 'validation': val, 'test': test}, record['split']['test'] == ['phantom']
    how = 'all cases; `numbers` are of the synthetic head' if everyone else 'split by case'
    convention = (folder / 'metrics.csv').read_text(encoding='utf-8').splitlines()[0].lstrip('# ')
    facts = {'shipped': True, 'recipe': recipe.relative_to(ROOT).as_posix(),
             'data': f'CT-MRI slices of the Whole Brain Atlas (Harvard Medical School), 256x256, 8 bit; {how}',
             'cases': {name: sort_cases(part.cases) if part else [] for name, part in names.items()} | {'train': cases_seen(record)},
             'pairs': {name: len(part) if part else 0 for name, part in names.items()},
             'seed': record['seed'], 'numbers': numbers_of(next(iter(record['numbers']['means'].values())), test.cases, convention)}
    for role in network_roles():
        if network := record['parameters'].get(role):
            facts[role] = {'name': in_place(network, lambda path: f'run:{Path(path).name}'), 'sha256': sha256_of(find_model(in_place(network, resolve_path)).path)}
    if everyone:
        facts['cross_validated_numbers'] = cross_validated(folder, facts['cases']['train'], recipe, convention, recorded)
    if val:
        facts['validation_numbers'] = numbers_of(record['numbers']['validation'], val.cases, convention)
    return facts | {'intended_use': 'research on image fusion; not for diagnosis'}


def ship(name, run, results=ROOT / 'results', shipped=ROOT / 'medfusion' / 'shipped', recorded=ROOT / 'results' / 'recorded' / 'cross_validation'):
    "The metadata.json of a network that ships from now on; ValueError or FileNotFoundError for a run that may not."
    if name not in methods():
        raise ValueError(f'{name!r} is no method; the methods are {", ".join(methods())}.')
    method, recipe = methods()[name], ROOT / 'params' / f'{name}_shipped.yaml'
    folder = find_run(f'{method.directory}/{run}', results)
    record = read_run(folder)
    if record['state'] != 'finished':
        raise ValueError(f'The run {run} is {record["state"]}; only a finished one can ship. resume=true goes on with it.')
    check_recipe(record, method, recipe)
    facts, place = facts_of(folder, record, recipe, recorded), Path(shipped) / method.directory / method.best_name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run_checkpoint(folder), place.with_suffix('.tmp'))
    os.replace(place.with_suffix('.tmp'), place)
    return write_metadata(place, **facts)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('ship.py METHOD RUN, such as wavelet final')
    try:
        print(f'written: {ship(*sys.argv[1:]).relative_to(ROOT)}; next: make record, and the pages that tell of the network')
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
