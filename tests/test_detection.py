"""The tasks of detection against known answers: painted lesions, observers, the task as folders, the phantom's seeds."""
import ast
import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_cells
from typer.testing import CliRunner

from medfusion import detection
from medfusion.baselines import average, copy_ct
from medfusion.cli import app
from medfusion.detection import (PaintedLesion, PaintedSlice, brain_region, calibrate_amplitude, check_fused, detection_table, efficiency_table, heads_note, lesion_channels,
                                 leave_one_head_out, outputs_of, paint_lesions, painted_lesions, painted_slices, phantom_heads, read_task, score_task,
                                 summarise_detection, with_controls, write_task)
from medfusion.files import list_images, read_image, write_image
from medfusion.detectability import synthetic_slices
from medfusion.losses import LesionCrops, LesionTerm
from medfusion.observer import detectability
from medfusion.phantom import PhantomSlice, Spot, check_training_seed, phantom_seeds, phantom_slice, write_phantom

GRID = np.argwhere(np.ones((3, 3))) * 64 + 64     # nine places, 64 pixels apart


class Heads:
    "A data set of four heads: a ring of bone around independent noise in both modalities."

    def __init__(self, slices=2, heads=4):
        rng, y, x = np.random.default_rng(0), *np.mgrid[:256, :256] - 127.5
        radius, self.items = np.hypot(x, y), []
        for number in range(slices * heads):
            ct, mri = .4 + .05 * rng.standard_normal((2, 256, 256))
            ct = np.where(radius < 110, ct, np.where(radius < 120, 1, 0))
            images = {kind: torch.from_numpy(np.float32(image)[None].clip(0, 1)) for kind, image in (('ct', ct), ('mri', mri))}
            self.items.append({**images, 'name': f'{number // slices + 1}{number % slices:03d}.png', 'case': str(number // slices + 1)})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope='module')
def heads():
    return Heads()


@pytest.fixture(scope='module')
def slices():
    "Painted slices of six heads with a lesion that only the CT shows, on independent noise of the same strength in both modalities."
    rng, dot, found = np.random.default_rng(1), PaintedLesion('dot', (3., 3.), 1., 0.), []
    for case in range(6):
        for _ in range(4):
            clean = np.rint(120 + 15 * rng.standard_normal((2, 256, 256))).clip(0, 255).astype(np.uint8)
            painted = paint_lesions(*clean, GRID, dot, 7, rng)
            found.append(PaintedSlice(str(case), [str(len(found)), ''], clean, painted[None], [GRID]))
    return found


def test_known_efficiencies(slices):
    "A copy of the CT loses nothing; the average of both sees the noise of both: η = 1/2; a function for each case is taken for it."
    methods = {'copy_ct': copy_ct, 'average': average, 'either': {str(case): average if case else copy_ct for case in range(6)}}
    table = leave_one_head_out(outputs_of(slices, methods, lesion_channels(PaintedLesion('dot', (3., 3.), 1., 0.)), reach=1))
    d = table.groupby('method')['d'].mean()
    # 36 lesions a head, 216 in all: d' of about 1.5 has a standard error of 7 %; both see the same images
    assert (d['copy_ct'] / d['joint']) ** 2 == pytest.approx(1, abs=.15)
    assert (d['average'] / d['joint']) ** 2 == pytest.approx(.5, abs=.15)
    # rounding to 8 bits moves an average by half a grey level at most
    of = table.set_index(['method', 'case'])['area_search']
    assert (of['joint'] > .5).all() and of['either', '0'] != of['average', '0']


def test_an_observer_learns_from_the_other_heads_alone():
    "One head shows its lesions in another channel than the other: who looks where the other did finds nothing."
    rng, heads = np.random.default_rng(0), {}
    for channel, case in enumerate(('1', '2')):
        absent, present = rng.standard_normal((2, 300, 1, 2))
        present[..., channel] += 3
        heads[case] = absent, present
    assert leave_one_head_out({'joint': heads})['d'].abs().max() < .5


def test_a_method_for_each_case_needs_each(slices):
    with pytest.raises(ValueError, match='no method for case 1'):
        outputs_of(slices, {'folds': {'0': average}}, lesion_channels(painted_lesions()['tumour']))


def test_painted_slices(heads):
    lesion = painted_lesions()['haemorrhage']
    one = list(painted_slices(heads, lesion, 40, paintings=2))
    alone = Heads()
    alone.items = alone.items[4:6]                # case 3 by itself is painted as in company
    again = list(painted_slices(alone, lesion, 40, paintings=2))
    assert np.array_equal(one[4].painted, again[0].painted) and one[4].names == again[0].names
    region = brain_region(heads[0]['ct'][0])
    assert all(region[tuple(place)] for group in one[0].places for place in group)
    difference = one[0].painted[0].astype(int) - one[0].clean
    row, column = one[0].places[0][0]
    assert difference[0, row, column] == pytest.approx(40, abs=1) and difference[1, row, column] == pytest.approx(-12, abs=1)


def test_beside_bone_and_in_noise(heads):
    beside = next(painted_slices(heads, painted_lesions()['beside bone'], 40))
    radii = [np.hypot(*(place - 127.5)) for group in beside.places for place in group]
    assert 95 < min(radii) and max(radii) < 110
    noisy, plain = (next(painted_slices(heads, painted_lesions()[kind], 40)) for kind in ('in noise', 'tumour'))
    assert (noisy.clean[1].astype(float) - plain.clean[1]).std() == pytest.approx(8, rel=.05)
    assert noisy.names[0] != plain.names[0]


@pytest.fixture(scope='module')
def task(heads, tmp_path_factory):
    "A written task, and the pixelwise maximum of its pairs."
    folder = write_task(heads, tmp_path_factory.mktemp('task') / 'task', kinds=['haemorrhage', 'in noise'], paintings=2)
    fused = folder.parent / 'fused'
    fused.mkdir()
    for path in list_images(folder / 'CT'):
        write_image(fused / path.name, np.maximum(read_image(path), read_image(folder / 'MRI' / path.name)))
    return folder, fused


def test_an_observer_of_the_phantom_learns_from_his_own_heads_alone(monkeypatch):
    "They show a lesion in another channel than the judged ones: who looks there finds nothing."
    rng = np.random.default_rng(0)

    def outputs(task, name, method, purpose, present, lesion, contrast):
        found = rng.standard_normal((300, 1, 2))
        found[..., ('observer', 'judged').index(purpose)] += 3 * present
        return [(found, found)]
    monkeypatch.setattr(detection, 'phantom_outputs', outputs)
    [absent], [present] = detection.phantom_verdicts(None, 'mine', None, None, 1)
    assert abs(detectability(absent[:, 0], present[:, 0])) < .5


def test_a_task_of_the_phantom_knows_methods_not_names():
    task, kind = detection.PhantomTask(heads=2, slices=(4,)), ['haemorrhage, 12 mm']
    detection.phantom_table({'network': copy_ct}, kind, task=task)
    again, fresh = (detection.phantom_table({'network': average}, kind, task=one) for one in (task, detection.PhantomTask(heads=2, slices=(4,))))
    assert again.equals(fresh)


def test_a_scored_task_is_the_table(heads, task):
    amplitudes, _ = read_task(task[0])
    there = score_task(*task).set_index(['lesion', 'method', 'case'])
    here = detection_table(heads, {}, list(amplitudes), paintings=2, amplitudes=amplitudes).set_index(['lesion', 'method', 'case'])
    for kind in amplitudes:
        assert there.loc[kind, 'fused'].equals(there.loc[kind, 'maximum'])
        for method in ('joint', 'maximum', 'copy_mri'):
            assert np.allclose(there.loc[kind, method], here.loc[kind, method])
    assert here.xs('joint', level='method').groupby('lesion').area.mean().between(.85, .95).all()
    assert efficiency_table(there.reset_index()).loc['fused', 'least'] >= 0
    assert set(with_controls({})) <= set(summarise_detection(there.reset_index()).loc['in noise'].index)


def test_the_command_writes_and_scores(heads, task, tmp_path):
    result = CliRunner().invoke(app, ['evaluate', str(task[1]), '--task', str(task[0]), '--csv', str(tmp_path / 'scores.csv')])
    assert result.exit_code == 0 and 'efficiency, location known' in result.stdout and '4 heads' in result.stdout
    assert {'fused', 'joint', 'average', 'copy_ct'} <= set(pd.read_csv(tmp_path / 'scores.csv').method)
    for kind, folder in (('ct', 'CT'), ('mri', 'MRI')):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / '1000.png', np.zeros((64, 64), np.uint8))
    refused = CliRunner().invoke(app, ['evaluate', str(tmp_path / 'CT'), str(tmp_path / 'MRI'), '--task', str(tmp_path / 'new')])
    assert refused.exit_code == 1 and 'room for a painted lesion' in refused.stderr and not (tmp_path / 'new').exists()
    assert CliRunner().invoke(app, ['evaluate', 'a', 'b', 'c', '--task', 'd']).exit_code == 2
    assert CliRunner().invoke(app, ['evaluate', str(task[1])]).exit_code == 2


def test_a_program_that_makes_black_slices_keeps_nothing(task, tmp_path):
    for path in list_images(task[1]):
        write_image(tmp_path / path.name, 0 * read_image(path))
    result = CliRunner().invoke(app, ['evaluate', str(tmp_path), '--task', str(task[0])])
    assert result.exit_code == 0 and re.search(r'^fused +0.00 +0.00 +0.00 +0.00$', result.stdout, re.M)


def test_scores_replace_no_other_file(task, tmp_path):
    scores, letter = tmp_path / 'scores.csv', tmp_path / 'letter.csv'
    letter.write_text('Dear all,')
    refused = CliRunner().invoke(app, ['evaluate', str(task[1]), '--task', str(task[0]), '--csv', str(letter)])
    assert refused.exit_code == 1 and 'letter.csv is there already, and no table of a scored task; name another file.' in refused.stderr
    assert letter.read_text() == 'Dear all,'
    scores.write_text('lesion,method,case,d\n')
    assert CliRunner().invoke(app, ['evaluate', str(task[1]), '--task', str(task[0]), '--csv', str(scores)]).exit_code == 0
    assert len(pd.read_csv(scores)) > 8


def test_too_few_slices_are_told(tmp_path):
    y, x = np.mgrid[:128, :128] - 63.5
    radius = np.hypot(x, y)
    for folder in ('CT', 'MRI'):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / '1000.png', np.select([radius < 50, radius < 60], [100, 255]).astype(np.uint8))
    refused = CliRunner().invoke(app, ['evaluate', str(tmp_path / 'CT'), str(tmp_path / 'MRI'), '--task', str(tmp_path / 'new')])
    assert refused.exit_code == 1 and not (tmp_path / 'new').exists()
    assert re.search(r'slices are too few: to be tested on head 1, first half, .* needs 13; give more slices or more patients', refused.stderr)


def without_a_name(record):
    record['trials'][0]['names'].pop()


def with_a_place(place):
    def damage(record):
        record['trials'][1]['places'][0][0] = place
    return damage


@pytest.mark.parametrize('fault, damage', [
    ('amplitudes', lambda record: record.pop('amplitudes')), ('amplitudes', lambda record: record['amplitudes'].clear()),
    ('amplitudes', lambda record: record['amplitudes'].update(cyst=3)), ('amplitudes', lambda record: record['amplitudes'].update(haemorrhage='3')),
    ('trials', lambda record: record.pop('trials')), ('no trial of haemorrhage', lambda record: record['trials'].clear()),
    ('trial 1', lambda record: record.update(trials=['1000'])), ('trial 1', lambda record: record['trials'][0].pop('names')),
    ('trial 1', lambda record: record['trials'][0].update(names='1000')), ('trial 1', lambda record: record['trials'][0].update(lesion=['tumour'])),
    ('trial 1', lambda record: record['trials'][0].update(case=1)), ('trial 1', without_a_name), ('trial 2', with_a_place([90])),
    ('trial 2', with_a_place('90')), ('the places of trial 2', with_a_place([300, 90])), ('the places of trial 2', with_a_place([90, 250])),
    ('the places of trial 2', with_a_place([0, 90])), ('the places of trial 2', with_a_place([-90, 90]))])
def test_a_damaged_task_is_a_sentence(fault, damage, task, tmp_path):
    record = json.loads((task[0] / 'task.json').read_text())
    damage(record)
    shutil.copytree(task[0] / 'CT', tmp_path / 'CT')
    (tmp_path / 'task.json').write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf'task.json is damaged \({fault}\); .*write it anew: medfusion evaluate CT MRI --task {tmp_path}'):
        score_task(tmp_path, task[1])


@pytest.mark.parametrize('change', [lambda image: image[:200], lambda image: image.astype(np.uint16) * 257])
def test_a_slice_of_a_task_that_was_changed_is_named(change, task, tmp_path):
    shutil.copytree(task[0], tmp_path / 'task')
    file = tmp_path / 'task/MRI/1001_haemorrhage_0.png'
    write_image(file, change(read_image(file)))
    with pytest.raises(ValueError, match=f'{file} has another size or depth than it was written with; remove {tmp_path / "task"} and write it anew'):
        score_task(tmp_path / 'task', task[1])


@pytest.mark.fault('evaluate --task', 'disk full, or failing')
def test_a_task_is_whole_or_absent(heads, tmp_path, monkeypatch):
    monkeypatch.setattr(detection, 'write_json', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError):
        write_task(heads, tmp_path / 'task', kinds=['in noise'], paintings=1)
    assert not list(tmp_path.iterdir())


def test_bad_folders_are_sentences(heads, task, tmp_path):
    folder = task[0]
    _, trials = read_task(folder)
    with pytest.raises(FileExistsError, match='not empty'):
        write_task(heads, folder)
    with pytest.raises(FileNotFoundError, match='no image 1000.png .*are missing'):
        check_fused(folder, tmp_path, trials)
    for name in sorted({name for trial in trials for name in trial['names']}):
        write_image(tmp_path / f'{name}.png', np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match='32 × 32 pixels, its sources 256 × 256'):
        check_fused(folder, tmp_path, trials)
    (tmp_path / 'task.json').write_text(json.dumps({'format': 'other'}))
    with pytest.raises(ValueError, match='write the task anew'):
        read_task(tmp_path)
    with pytest.raises(FileNotFoundError, match='There is no folder .*nowhere; check the path'):
        read_task(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match="'cyst' is not a kind"):
        detection_table(heads, {}, ['cyst'])


def test_few_heads_are_a_quick_look():
    table = detection_table(Heads(3, 1), {}, ['oedema'], paintings=2, amplitudes={'oedema': 60})
    assert table['case'].nunique() == 2 and heads_note(table).startswith('A quick look: one head (1)')
    assert summarise_detection(table)['efficiency_low'].isna().all()
    assert 'interval' not in heads_note(pd.DataFrame({'lesion': 'oedema', 'case': ['1', '2', '3']})), 'what is printed below it shows none'


def test_a_kind_that_fewer_heads_have_room_for_stands_on_those():
    "Where two heads have room for a kind it has no interval, however many have room for another; and the note tells."
    many, few = (pd.DataFrame([{'lesion': kind, 'method': method, 'case': case, 'd': d, 'd_search': d, 'area': .9, 'area_search': .8, 'amplitude': 9}
                               for method in ('joint', 'mine') for d, case in enumerate(cases, 1)])
                 for kind, cases in (('oedema', ('Doe, A 1', 'Doe, B 1', '3')), ('tumour', ('Doe, A 1', '3'))))
    table = pd.concat([many, few], ignore_index=True)
    missing = summarise_detection(table).efficiency_low.isna()
    assert not missing['oedema'].any() and missing['tumour'].all()
    assert heads_note(table) == '3 heads, each tested by an observer that learnt from the others. Fewer have room for tumour (2).'
    halves = few.replace({'case': {'Doe, A 1': '3, first half', '3': '3, second half'}})
    assert heads_note(halves).startswith('A quick look: one head (3)') and heads_note(many[many.case != '3']).startswith('A quick look: two heads (Doe, A 1 and Doe, B 1)')
    assert heads_note(pd.concat([many, halves])).endswith('Fewer have room for tumour (1).')


def test_a_head_with_one_lesion_is_learnt_from_and_not_tested(slices):
    "Its d' would have no spread, and be no number, which took the numbers of all heads along."
    outputs = outputs_of(slices[:4], {'average': average}, lesion_channels(painted_lesions()['tumour']))
    lesions = {method: {'0': cases['0'], '1': tuple(part[:20] for part in cases['0']), '2': tuple(part[:1] for part in cases['0'])} for method, cases in outputs.items()}
    table = leave_one_head_out(lesions)
    assert set(table.case) == {'0', '1'} and table.notna().all(axis=None)
    with pytest.raises(ValueError, match='no head shows two painted lesions; give more slices of each'):
        leave_one_head_out({method: {str(i): cases['2'] for i in range(30)} for method, cases in lesions.items()})


@pytest.mark.parametrize('name, given, words', [('91_ablation', {'kinds': ['bleeding']}, "'bleeding' is not a kind of painted lesion"),
                                                ('94_dial', {'kinds': ['bleeding']}, "'bleeding' is not a kind of painted lesion"),
                                                ('96_lesions', {'painted': ['bleeding']}, "'bleeding' is not a kind of painted lesion"),
                                                ('96_lesions', {'recipes': []}, 'recipes is empty; name one of the folds')])
def test_notebooks_refuse_lesions_that_are_none_before_the_work(name, given, words):
    with pytest.raises(ValueError, match=words):
        run_cells(Path(__file__).resolve().parents[1] / 'nbs' / f'{name}.ipynb', given | {'make': 'all'}, until='p')


# The phantom's task

def test_seeds_that_are_judged_on_are_never_trained_on(tmp_path):
    seeds = phantom_seeds()
    assert sum(map(len, seeds.values())) == len({seed for reserved in seeds.values() for seed in reserved})
    used = [inspect.signature(maker).parameters['seed'].default for maker in (phantom_slice, write_phantom, LesionCrops, LesionTerm, synthetic_slices)]
    assert all(seed in seeds['training'] and seed + 1 in seeds['training'] for seed in used)     # LesionTerm validates on the next one
    assert not {used[0], used[1]} & {seed + later for seed in used[2:] for later in (0, 1)}, 'the test slices of a data set are no heads from which a loss takes lesions or crops'
    for seed in (seeds['observer'][0], seeds['judged'][1]):
        for refuse in (lambda: LesionCrops(seed=seed), lambda: write_phantom(tmp_path / 'Dataset', seed=seed), lambda: synthetic_slices(seed=seed), lambda: check_training_seed(seed)):
            with pytest.raises(ValueError, match='never trained on'):
                refuse()
    assert not list(tmp_path.iterdir())


def test_a_spot_changes_its_place_alone():
    plain, spotted = phantom_slice(2, 4), phantom_slice(2, 4, spots=[Spot('calcification', 120, 90, 6.)])
    assert isinstance(spotted, PhantomSlice)
    changed = np.argwhere(np.abs(plain.ct - spotted.ct) > .05)
    assert len(changed) and np.abs(changed - (120, 90)).max() <= 6
    assert spotted.ct[120, 90] == 1 > plain.ct[120, 90]


def test_numbers_of_the_phantom_compare_like_with_like():
    "The method's known location with the joint observer's, its search with that one's search: d' of 1, 3, 2 and 4."
    absent = np.random.default_rng(0).standard_normal((2000, 4))
    area, eta, area_search, eta_search, d = detection.phantom_numbers(absent, absent + [1, 3, 2, 4])
    assert [eta, eta_search, d] == pytest.approx([1 / 4, 9 / 16, 1], rel=.1) and .7 < area < .8 and area_search > .95


def test_each_head_of_the_task_has_a_seed_for_what_it_is_asked_for():
    heads, seeds = detection.PhantomTask(heads=1, slices=(4,)).heads, phantom_seeds()
    drawn = {place: {slice_.key[0] for slices in of_case.values() for slice_ in slices} for place, of_case in heads.items()}
    assert len(drawn) == 4 == len(set.union(*drawn.values())) and all(own <= {*seeds[purpose]} for (purpose, _), own in drawn.items())


def test_heads_of_the_task_are_t2_and_places_are_in_their_regions():
    found = phantom_heads(phantom_seeds()['judged'][0], heads=2, slices=(4,))
    for slices in found.values():
        assert slices[0].plane.head.sequence == 0
        assert np.abs(slices[0].places - slices[0].centres).max() <= 6


def test_detection_imports_from_below():
    "Only from notebooks of lower numbers, and from none that trains."
    numbers = {}
    for path in sorted((Path(detection.__file__).parents[1] / 'nbs').glob('*.ipynb')):
        text = path.read_text(encoding='utf-8')
        if '#| default_exp ' in text:
            numbers[text.split('#| default_exp ')[1].split('"')[0].split('\\n')[0]] = path.name
    tree = ast.parse(Path(detection.__file__).read_text(encoding='utf-8'))
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert used and all(numbers[module] < numbers['detection'] for module in used), used
    assert not used & {'training', 'wavelet_fusion', 'resnet_fusion'}


def test_the_name_of_the_observer_of_both_sources_is_taken():
    with pytest.raises(ValueError, match="called 'joint'.* name of its own"):
        with_controls({'joint': average})


def test_an_amplitude_that_ends_at_its_limit_is_told(heads):
    with pytest.warns(UserWarning, match=r"speck: .* 1 to 200 grey levels .* area of 0\.9"):
        assert calibrate_amplitude(heads, PaintedLesion('speck', (.3, .3), .05, 0.), paintings=1, steps=2) == 200


def test_a_slice_named_like_a_painted_one_is_refused(heads, tmp_path):
    twins = Heads()
    twins.items[1] = twins.items[1] | {'name': '1000_oedema_0.png'}
    with pytest.raises(ValueError, match=r"1000_oedema_0\.png .* rename"):
        write_task(twins, tmp_path / 'task', kinds=['oedema'], paintings=1)
    assert not (tmp_path / 'task').exists()


def test_fused_slices_that_are_nearly_black_are_told_once(task, tmp_path):
    task, fused = task
    for path in list_images(fused):
        write_image(tmp_path / path.name, np.uint16(read_image(path)) * 16)
    scored = CliRunner().invoke(app, ['evaluate', str(tmp_path), '--task', str(task)])
    assert scored.exit_code == 0 and scored.stderr.count('nearly black') == 1
    assert '--range' not in scored.stderr and 'write them over the whole range of their type' in scored.stderr
