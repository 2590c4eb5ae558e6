"""Training on several processes: forked ones on this machine, joined by gloo; the command and torchrun in `make long`."""
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from typer.testing import CliRunner

from medfusion import losses, resnet_fusion, wavelet_fusion, wavelet_lite
from medfusion.backbone import FeatureCache, load_backbone
from medfusion.cli import app, say
from medfusion.data import CTMRIDataset
from medfusion.detectability import DetectionTerm
from medfusion.inference import load_model, start_from
from medfusion.phantom import write_phantom
from medfusion.processes import Process, ProcessLost, check_processes, leave_to_first, mean_over_step, this_process
from medfusion.runs import checkpoint_files, claim_folder, load_checkpoint, open_run, read_run, seed_everything
from medfusion.training import SharedBatches, fit

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(autouse=True, scope='module')
def quick():
    "One thread, as a forked child can have no more; what several processes import, imported once."
    import torch._dynamo    # noqa: F401
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def together(count, folder, function, seconds=600):
    "How `count` processes end that each run `function`, as torchrun would have started them: their exit codes. None lives longer than so many seconds."
    store, children = folder / 'store', []
    for number in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(seconds)    # nobody waits for ever for one that is gone
                AcceleratorState._reset_state(reset_partial_state=True)    # torchrun's processes begin without one of an earlier training
                if count > 1:
                    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
                    os.environ.update(zip(names, map(str, (number, count, number, count))))
                    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=number, world_size=count)
                function()
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    store.unlink(missing_ok=True)
    return codes


# ---- a small run in double precision, so that nothing but rounding can hide -----------------------------------------

class Sines(torch.utils.data.Dataset):
    "Pairs x, sin(2 x); what x is depends on the epoch, as augmentation would make it."
    epoch = 0

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        x = torch.tensor([index / 8 + 0.01 * self.epoch], dtype=torch.float64)
        return {'name': f'{index:05d}.png', 'x': x, 'y': torch.sin(2 * x)}


class Drawn:
    "A term that draws for itself and has a state, as those of lesions and of detection do."

    def __init__(self):
        self.running = torch.zeros((), dtype=torch.float64)

    def state_dict(self):
        return {'running': self.running}

    def load_state_dict(self, state):
        self.running = state['running']

    def __call__(self, model):
        answer = model(torch.rand(1, 1, dtype=torch.float64) if model.training else torch.ones(1, 1, dtype=torch.float64)).squeeze()
        if model.training:
            self.running = 0.9 * self.running + 0.1 * answer.detach()
        return (answer - self.running - 0.5).square()


def toy_run(folder, resume=False, at=None, by=1, length=9, dropout=0.0):
    "A run of four epochs; process `by` is killed at its step number `at`. With `dropout` each draws as much as its share asks for."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)).double()
    term, optimizer, steps = Drawn(), torch.optim.Adam(net.parameters(), lr=0.05), iter(range(1000))

    def step(model, batch):
        if next(steps) == at and this_process().number == by:
            os.kill(os.getpid(), signal.SIGKILL)
        errors = (model(batch['x']) - batch['y']).square()
        ratio = errors.mean() / mean_over_step(batch['x'].mean())    # the ratio of two means, as the perceptual term is one
        return {'loss': errors.mean() + 0.1 * ratio + 0.1 * term(model), 'ratio': ratio}
    p = types.SimpleNamespace(save_dir=str(folder), run='a', checkpoint_dir='', num_epochs=4, resume=resume, replace=False)
    at_work = open_run('toy', p, checkpoint_files('toy', p, last_name='toy_final.pt', history_name='history.pt'))
    history = fit(net, step, Sines(length), Sines(5), at_work, epochs=4, batch_size=4, optimizer=optimizer, ema=0.9, clip=0.5, method='toy', config={},
                  scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), companion=term, progress='lines', resume=resume)
    leave_to_first()
    at_work.finish({'best_epoch': history.best['epoch']})


def toy_state(folder):
    return load_checkpoint(folder / 'a/checkpoints/intermediate/toy/toy_epoch_004.pt')


def numbers(value):
    "All numbers in nested dicts and lists, one after the other."
    if isinstance(value, torch.Tensor):
        return value.double().flatten().tolist()
    if isinstance(value, dict):
        return [number for name in sorted(value, key=str) for number in numbers(value[name])]
    if isinstance(value, (list, tuple)):
        return [number for one in value for number in numbers(one)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize('length', [9, 11, 8], ids=['a last batch of one', 'of three', 'no short batch'])
@pytest.mark.parametrize('count', [2, 3])
def test_several_processes_take_the_steps_of_one(tmp_path, count, length, capfd):
    "Weights, their average, moments, rates, the term's state, history and best: as one process has them, but for rounding."
    for processes in (1, count):
        assert together(processes, tmp_path, partial(toy_run, tmp_path / str(processes), length=length)) == [0] * processes
    alone, shared = (toy_state(tmp_path / str(processes)) for processes in (1, count))
    for part in ('state_dict', 'average', 'optimizer', 'scheduler', 'companion', 'history', 'best', 'steps'):
        assert numbers(shared[part]) == pytest.approx(numbers(alone[part]), rel=1e-10, abs=1e-13), part
    assert torch.equal(alone['random']['torch'], shared['random']['torch'])
    said = capfd.readouterr().out
    assert said.count('epoch   4/4') == 2 and said.count('last: epoch 4') == 2    # one process speaks
    record = read_run(tmp_path / str(count) / 'a')
    assert record['state'] == 'finished' and record['device'].endswith(f'{count} processes')


def written(folder):
    "The bytes of every file that a run left; not the record and the executed notebook, which hold times."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*'))
            if path.is_file() and path.name not in ('.running.lock', 'run.json', 'executed.ipynb')}


@pytest.mark.fault('train', 'one of two processes killed')
@pytest.mark.parametrize('by', [0, 1])
def test_one_of_two_is_killed_and_the_run_goes_on_to_the_same_files(tmp_path, by):
    straight, killed, sentence = tmp_path / 'straight', tmp_path / 'killed', tmp_path / 'sentence'
    assert together(2, tmp_path, partial(toy_run, straight, dropout=0.2, length=11)) == [0, 0]

    def lose_one():
        try:
            toy_run(killed, at=9, by=by, dropout=0.2, length=11)
        except ProcessLost as error:
            sentence.write_text(str(error))
            raise SystemExit(1) from None
    codes = together(2, tmp_path, lose_one, seconds=60)    # within a minute, in which there is all the training before, too
    assert codes[by] == -signal.SIGKILL and codes[1 - by] == 1
    assert sentence.read_text() == 'Another of the 2 processes of this training has ended, so this one ends, too.'
    assert read_run(killed / 'a')['state'] == 'interrupted'
    with claim_folder(killed / 'a', patience=0):    # the lock was given back
        pass
    assert together(2, tmp_path, partial(toy_run, killed, resume=True, dropout=0.2, length=11)) == [0, 0]
    assert written(killed) == written(straight)


def test_every_pair_is_in_one_share():
    for length in range(1, 12):
        for size in range(1, 6):
            for count in range(1, size + 1):
                shares = [SharedBatches(range(length), size, Process(number, count)) for number in range(count)]
                batches, counts = ([list(part) for part in zip(*each)] for each in (shares, [share.counts() for share in shares]))
                assert len(batches) == len(counts) == len(shares[0])
                counted = [sorted(pair for batch, (ours, _) in zip(parts, of_parts) for pair in batch[:ours]) for parts, of_parts in zip(batches, counts)]
                assert counted == [list(range(length))[start:start + size] for start in range(0, length, size)]
                assert all(part for parts in batches for part in parts)    # nobody has nothing to do


def test_more_processes_than_pairs_in_a_batch_are_refused(monkeypatch):
    with pytest.raises(ValueError, match='batch_size is 2, and 3 processes share each batch: give a batch_size of at least 3'):
        check_processes(3, 3, batch_size=2)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ValueError, match='which has 1 GPU: ask for as many'):
        check_processes(2, 2, batch_size=2)


# ---- the methods ----------------------------------------------------------------------------------------------------

def phantoms(folder, size, **kinds):
    "Slices to train on, fewer than two batches of 4, and slices to validate on."
    root = write_phantom(folder / 'Dataset', cases=4, slices=3, size=size)
    sets = [CTMRIDataset(root / part / 'CT', root / part / 'MRI', **(kinds if part == 'train' else {})) for part in ('train', 'val')]
    sets[0].pairs, sets[0].names = sets[0].pairs[:5], sets[0].names[:5]
    return sets


def fit_method(method, model, step, train, val, folder, epochs, optimizer, **more):
    p = types.SimpleNamespace(save_dir=str(folder), run='a', checkpoint_dir='', num_epochs=epochs, resume=False, replace=False)
    at_work = open_run(method, p, checkpoint_files(method, p, epoch_name='epoch_{epoch}.pt'))
    fit(model, step, train, val, at_work, epochs=epochs, batch_size=4, optimizer=optimizer, ema=0.9, method=method, config=model.config, progress='none', **more)
    leave_to_first()
    at_work.finish()


def train_wavelet(train, val, folder, epochs=1, terms=False):
    "What the wavelet notebook does to train; with `terms` those that draw for themselves."
    seed_everything(0)
    model = wavelet_fusion.WaveletFusion(width=4)
    detection, lesions = (DetectionTerm(train), losses.LesionTerm(cases=4)) if terms else (None, None)
    weights = {'mse': 1.0, 'ssim': 1.0, 'gradient': 1.0} | ({'vif': 0.1, 'scd': 1.0, 'lesion': 1.0, 'detection': 1.0} if terms else {})
    step = partial(wavelet_fusion.training_step, weights=weights, lesions=lesions, detection=detection)
    fit_method('trainable_wavelet_fusion', model, step, train, val, folder, epochs, torch.optim.Adam(model.parameters(), lr=1e-3), clip=1.0,
               companion=detection)


def train_dial(train, val, folder, epochs, start):
    "What the wavelet notebook does to train the dial of a network that is there."
    seed_everything(0)
    model = wavelet_fusion.WaveletFusion(width=4, dial=True)
    start_from(model, start)
    model.network.requires_grad_(False)
    detection, weights = DetectionTerm(train), {'mse': 1.0, 'ssim': 1.0, 'detection': 4.0, 'invented': 1.0}
    step = partial(wavelet_fusion.dial_step, dial=4.0, weights=weights, detection=detection)
    fit_method('trainable_wavelet_fusion', model, step, train, val, folder, epochs, torch.optim.Adam(model.dial.parameters(), lr=1e-3), clip=1.0,
               companion=detection)


def train_lite(train, val, folder, epochs, teacher):
    "What the notebook of the small network does to train, with a term that draws for itself."
    seed_everything(0)
    model, detection = wavelet_lite.WaveletLite(width=4), DetectionTerm(train)
    weights = {'imitation': 20.0, 'mse': 1.0, 'ssim': 1.0, 'detection': 1.0}
    step = partial(wavelet_lite.training_step, teacher=load_model(teacher, device='cpu'), weights=weights, detection=detection)
    fit_method('wavelet_lite', model, step, train, val, folder, epochs, torch.optim.Adam(model.parameters(), lr=1e-3), clip=1.0, companion=detection)


def train_resnet(train, val, folder, epochs, dial=False):
    "What the ResNet notebook does to train, with a cache of features and the perceptual term; with `dial` the second decoder alone."
    cfg = resnet_fusion.Config(save_dir=str(folder), crop=96, backbone_weights='none', deepest='layer2', perceptual_stages='stem layer1', w_lesion=1.0)
    seed_everything(0)
    model = resnet_fusion.ResNetFusion('none', deepest='layer2', dial=dial).eval()
    if dial:
        model.requires_grad_(False).dial.requires_grad_(True)
    step = partial(resnet_fusion.training_step, cfg=cfg, lesions=losses.LesionTerm(cases=4))
    train, val = resnet_fusion.training_sets(model, train, val, cfg)
    assert (train.cache.scratch is None) == (this_process().count == 1 or this_process().number > 0)    # several share a file
    fit_method('resnet_fusion', model, step, train, val, folder, epochs, torch.optim.Adam(resnet_fusion.parameter_groups(model, 1e-3, 0.8)))


def check_method(train, sets, folder, epochs, weights):
    "Two processes end where one does: `weights` is how far a weight may be apart."
    for count in (1, 2):
        assert together(count, folder, partial(train, *sets, folder / str(count), epochs)) == [0] * count
    alone, shared = (load_checkpoint(next((folder / str(count) / 'a').rglob(f'epoch_{epochs}.pt'))) for count in (1, 2))
    for part, tolerance in (('state_dict', weights), ('average', weights), ('history', 1e-5), ('companion', 1e-5)):
        assert numbers(shared[part]) == pytest.approx(numbers(alone[part]), rel=tolerance, abs=tolerance), part
    assert shared['best']['epoch'] == alone['best']['epoch']
    assert not list(folder.rglob('features_*'))    # the file of the features had no name any more


def test_two_processes_train_the_wavelet_network_as_one_does(tmp_path):
    check_method(train_wavelet, phantoms(tmp_path, 64, augment=True), tmp_path, 1, weights=1e-6)


@pytest.mark.long
def test_two_processes_train_with_terms_that_draw_as_one_does(tmp_path):
    check_method(partial(train_wavelet, terms=True), phantoms(tmp_path, 176, augment=True, crop=128), tmp_path, 3, weights=1e-5)


@pytest.mark.parametrize('train', [train_dial, train_lite])
def test_two_processes_train_on_a_network_that_is_there_as_one_does(tmp_path, train):
    "The dial of one that was trained before, and a small one that imitates it."
    sets = phantoms(tmp_path, 176, augment=True, crop=128)
    assert together(1, tmp_path, partial(train_wavelet, *sets, tmp_path / 'before')) == [0]
    there = tmp_path / 'before/a/checkpoints/intermediate/trainable_wavelet_fusion/epoch_1.pt'
    check_method(lambda *given: train(*given, str(there)), sets, tmp_path, 2, weights=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('dial', [False, True])
def test_two_processes_train_the_resnet_as_one_does(tmp_path, dial):
    check_method(partial(train_resnet, dial=dial), phantoms(tmp_path, 176), tmp_path, 3, weights=1e-4)


def test_features_are_computed_once_and_shared(tmp_path):
    "Each of two processes computes the features of every other pair; both see all, and they are those of one process, bit for bit."
    backbone, sets = load_backbone('none', 'stem').backbone, phantoms(tmp_path, 64)

    def see(count):
        cache = FeatureCache(backbone, sets[0], folder=tmp_path / 'features')
        torch.save(cache.storage, tmp_path / f'{this_process().number} of {count}')
    for count in (1, 2):
        assert together(count, tmp_path, partial(see, count)) == [0] * count
    alone, *shared = (torch.load(tmp_path / name) for name in ('0 of 1', '0 of 2', '1 of 2'))
    assert all(torch.equal(alone, one) for one in shared)
    assert not list((tmp_path / 'features').iterdir())


# ---- the command ----------------------------------------------------------------------------------------------------

SMALL = {'wavelet': {'width': 4}, 'resnet': {'backbone_weights': 'medfusion', 'save_every': 1}}


def command(folder, *words, launcher=('-m', 'medfusion'), method='wavelet', **parameters):
    "`medfusion train` of a method at smoke size, as a process."
    data = folder.parent / 'Dataset' / 'train'
    values = {'ct_dir': data / 'CT', 'mri_dir': data / 'MRI', 'save_dir': folder, 'batch_size': 4, 'run': 'a', **SMALL[method], **parameters}
    options = [word for name, value in values.items() for word in ('-p', f'{name}={value}')]
    scratch = folder.parent / 'temporary'
    scratch.mkdir(exist_ok=True)
    surroundings = {'TMPDIR': str(scratch), 'HF_HOME': str(scratch), 'CUDA_VISIBLE_DEVICES': ''}    # HF_HOME: where accelerate looks for settings
    return subprocess.Popen([sys.executable, *launcher, 'train', method, *words, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | surroundings)


def ended(process, seconds=600):
    "(output, complaint) of a process that ends within so many seconds; else it is killed, with all that it began."
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.communicate()
        raise


def finished(process):
    "What a process printed that ended well."
    said, complaint = ended(process)
    assert process.returncode == 0, complaint[-3000:]
    return said


def newest(folder, epoch):
    "The checkpoint of a run after so many epochs."
    return load_checkpoint(next(folder.glob(f'a/checkpoints/intermediate/*/*epoch_*{epoch}.pt')))


@pytest.mark.long
@pytest.mark.fault('train', 'one of two processes killed')
@pytest.mark.parametrize('method, victim, tolerance', [('wavelet', '1', 1e-5), ('resnet', '0', 1e-4)])
def test_the_command_on_two_processes_killed_and_resumed(tmp_path, method, victim, tolerance):
    "As one process to rounding; one killed, it ends within a minute; resumed, it is as two that nothing disturbed, bit for bit."
    write_phantom(tmp_path / 'Dataset', cases=4, slices=3, size=64)
    one, two, killed = (tmp_path / name for name in ('one', 'two', 'killed'))
    start = partial(command, method=method, epochs=4)
    finished(start(one))
    said = finished(start(two, '--processes', '2'))
    assert said.count('epoch   4/4') == 1 and said.count('done: ') == 1
    assert written(one).keys() == written(two).keys() and not list((tmp_path / 'temporary').iterdir())
    assert numbers(newest(two, 4)['state_dict']) == pytest.approx(numbers(newest(one, 4)['state_dict']), abs=tolerance)

    process = start(killed, '--processes', '2')
    while not list(killed.glob('a/checkpoints/intermediate/*/*epoch_*2.pt')) and process.poll() is None:
        time.sleep(0.01)
    [child] = [child for child in psutil.Process(process.pid).children() if child.environ()['RANK'] == victim]
    child.kill()
    _, complaint = ended(process, seconds=60)
    assert process.returncode == 1 and f'process {victim} was killed (SIGKILL), and the training ended with it.' in complaint
    if victim == '1':    # else the one who knows is gone
        assert f'is kept in {killed}/a. To go on: medfusion train {method} --processes 2 ' in complaint and '--run a -p resume=true' in complaint
    assert read_run(killed / 'a')['state'] == 'interrupted'
    finished(start(killed, '--processes', '2', resume='true'))
    assert written(killed) == written(two)


TORCHRUN, ACCELERATE, MODULE = ('-m', 'torch.distributed.run'), ('-m', 'accelerate.commands.launch'), ('-m', 'medfusion')


@pytest.fixture(scope='module')
def by_itself(tmp_path_factory):
    "(a folder with a data set, the weights of `--processes 2` after an epoch)."
    folder = tmp_path_factory.mktemp('processes')
    write_phantom(folder / 'Dataset', cases=4, slices=3, size=64)
    finished(command(folder / 'runs', '--processes', '2', epochs=1))
    return folder, newest(folder / 'runs', 1)['state_dict']


def check_launched(folder, weights):
    "Whether a run of two processes ended with these weights, but for rounding: launchers may give their processes other numbers of threads."
    record = read_run(folder / 'a')
    assert record['state'] == 'finished' and record['device'].endswith(' 2 processes')
    assert numbers(newest(folder, 1)['state_dict']) == pytest.approx(numbers(weights), abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('name, launcher', [('torchrun', (*TORCHRUN, '--standalone', '--nproc-per-node', '2')),
                                            ('accelerate', (*ACCELERATE, '--multi_gpu', '--num_processes', '2'))])
def test_other_launchers_start_the_command(by_itself, name, launcher):
    folder, weights = by_itself
    assert finished(command(folder / name, launcher=(*launcher, *MODULE), epochs=1)).count('done: ') == 1
    check_launched(folder / name, weights)
    process = command(folder / name, launcher=(*launcher, *MODULE), num_epoch=1)
    assert 'num_epoch is not a parameter' in ended(process)[1] and process.returncode == 1


@pytest.mark.long
def test_accelerate_starts_one_process_where_it_is_told_of_a_cpu(by_itself):
    "As nbs/10_training says."
    finished(command(by_itself[0] / 'one', launcher=(*ACCELERATE, '--cpu', '--num_processes', '2', *MODULE), epochs=1))
    assert 'processes' not in read_run(by_itself[0] / 'one/a')['device']


@pytest.mark.long
@pytest.mark.parametrize('name, place', [('static', ('--master-addr', '127.0.0.1', '--master-port')), ('c10d', ('--rdzv-backend', 'c10d', '--rdzv-endpoint'))])
def test_two_machines(by_itself, name, place):
    "As it were: two of torch's launchers on loopback, each with a folder of its own, of which the second stays empty."
    folder, weights = by_itself
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    place = (*place, f'127.0.0.1:{port}' if name == 'c10d' else str(port))
    first, second = (folder / f'{name}{number}' for number in (0, 1))
    nodes = [command(runs, launcher=(*TORCHRUN, '--nnodes', '2', '--node-rank', str(number), *place, '--nproc-per-node', '1', *MODULE), epochs=1)
             for number, runs in enumerate((first, second))]
    said = [finished(node) for node in nodes]
    assert sum(text.count('done: ') for text in said) == 1
    if not (first / 'a').exists():       # by c10d, whoever comes first is the first
        first, second = second, first
    check_launched(first, weights)
    assert not second.exists()


@pytest.mark.parametrize('number, needed, said', [('0', False, 'medfusion: a word'), ('1', False, ''), ('1', True, 'medfusion, process 1: a word')])
def test_who_speaks(number, needed, said, monkeypatch, capsys):
    for name in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(name, number)
    for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'):
        monkeypatch.setenv(name, '2')
    say('a word', needed)
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize('count, sentence', [('8', 'batch_size is 2, and 8 processes share each batch'), ('0', "Invalid value for '--processes'"),
                                             ('two', "Invalid value for '--processes'")])
def test_numbers_of_processes_that_cannot_be(count, sentence, tmp_path):
    write_phantom(tmp_path / 'Dataset', cases=4, slices=1, size=64)
    given = [word for kind in ('CT', 'MRI') for word in ('-p', f'{kind.lower()}_dir={tmp_path}/Dataset/train/{kind}')]
    result = CliRunner().invoke(app, ['train', 'wavelet', '--processes', count, '-p', f'save_dir={tmp_path}/runs', *given])
    assert result.exit_code == (1 if count == '8' else 2) and sentence in ' '.join(result.output.split())
    assert not (tmp_path / 'runs').exists()
