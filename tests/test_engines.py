"""Fusing on a Ray cluster that is begun here: the results of one process, and nothing lost or done twice, whoever is killed.

`make ray` runs all of it. Elsewhere these tests are skipped where Ray is missing; with MEDFUSION_REQUIRE_RAY=1 that is a failure.

What is promised of a kill: each pair has one result, which one line of the record tells, and a result that stood there whole is not made again. The
record may tell twice, in the same words, of what was on its way when a worker died: its line comes first. In a folder these are the pairs that its
threads were writing; elsewhere those of its block.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import memory_of, write_slices
from typer.testing import CliRunner

from medfusion.cli import app
from medfusion import engines
from medfusion.engines import block_size, fuse_on_ray, pairs_in, run_on_ray, store_of, worker_shares
from medfusion.files import read_image, sha256_of
from medfusion.inference import fuse_folder

MISSING = '' if find_spec('ray') and find_spec('pyarrow') else 'Ray Data is not installed: make ray, or pip install "medfusion[ray]"'
engine = pytest.mark.skipif(bool(MISSING) and os.environ.get('MEDFUSION_REQUIRE_RAY') != '1', reason=MISSING)

RUN = """
import json, sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from medfusion.engines import fuse_on_ray
root, address, kind, model = sys.argv[1:]
far = SubTreeFileSystem(root, LocalFileSystem()) if kind == 'elsewhere' else None
folders = ['CT', 'MRI', 'out'] if far else [Path(root, name) for name in ('CT', 'MRI', 'out')]
report = fuse_on_ray(*folders, model, progress=False, address=address, filesystem=far)
print(json.dumps({'fused': len(report.fused), 'skipped': len(report.skipped), 'failed': report.failed}))
"""


def names_in(folder):
    return sorted(path.name for path in folder.glob('*.png'))


def results(out):
    "How often the record, and the parts of it, have each line about a result, {(file, SHA-256 of the result, the whole line): times}."
    texts = [path.read_text() for path in (out / 'fused.jsonl', *out.glob('fused.parts/*'))]
    lines = [line for text in texts for line in text.split('\n')[:-1]]      # what follows the last is being written
    return Counter((told['file'], told['sha256'], line) for line in lines if 'file' in (told := json.loads(line)))


def standing(out):
    "{name: (number of the file on the disk, when it was written)} of the results that are there whole, as the record says."
    told = {(file, sha256) for file, sha256, _ in results(out)}
    found = {path.name: path for path in out.glob('*.png') if (path.name, sha256_of(path)) in told}
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in found.items()}


def check_once(out, number, before, killed, kind):
    "Whether there are so many results, of which those `before` a kill of so many workers were not touched, and the record tells of each as was promised."
    lines, there = results(out), standing(out)
    assert len(lines) == len({file for file, *_ in lines}) == len(there) == len(names_in(out)) == number
    assert before.items() <= there.items()
    twice = {file: times for (file, *_), times in lines.items() if times > 1}
    assert not twice.keys() & before.keys() and set(twice.values()) <= {2}
    assert len(twice) <= killed * (8 if kind == 'folder' else block_size(number, 8, workers=2))
    assert len(fuse_folder(out.parent / 'CT', out.parent / 'MRI', out, 'maximum', progress=False).skipped) == number


@pytest.fixture(scope='module')
def cluster():
    "(address, folder) of a Ray cluster of two workers on loopback, which ends with these tests. On a busy machine Ray may give up at the first attempt."
    if MISSING:
        pytest.fail(MISSING)
    folder = tempfile.mkdtemp(prefix='ray', dir='/tmp')      # short, because paths of sockets are
    patch = pytest.MonkeyPatch()
    patch.setenv('RAY_AUTH_MODE', 'disabled')                # a cluster begun where ~/.ray/auth_token is asks for it, and a given address does not send it
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [Path(sys.executable).with_name('ray'), 'start', '--head', '--block', '--node-ip-address=127.0.0.2', f'--port={port}', '--num-cpus=2',
             '--include-dashboard=false', '--disable-usage-stats', f'--object-store-memory={2 ** 28}', f'--temp-dir={folder}',
             '--min-worker-port=0', '--max-worker-port=0'],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', 'RAY_worker_niceness': '0'})
        if any('runtime started' in line for line in process.stdout):
            break
        process.wait()
    else:
        pytest.fail('Ray did not start')
    yield f'127.0.0.2:{port}', folder
    process.terminate()
    process.communicate()
    shutil.rmtree(folder, ignore_errors=True)
    patch.undo()


def workers(folder):
    "The process numbers of the workers that fuse in the cluster of this folder."
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        try:
            title, parent = (path / 'cmdline').read_bytes(), re.search(r'PPid:\s+(\d+)', (path / 'status').read_text())[1]
            if b'ray::' in title and b'Fuser' in title and folder.encode() in Path('/proc', parent, 'cmdline').read_bytes():
                found.append(int(path.name))
        except OSError:
            pass        # it has ended
    return found


def begin(root, cluster, kind='folder', model='maximum'):
    "A process that fuses the pairs in `root` on the cluster."
    return subprocess.Popen([sys.executable, '-c', RUN, str(root), cluster[0], kind, model], stdout=subprocess.PIPE, text=True)


def wait_for(number, root, process):
    while len(names_in(root / 'out')) < number:
        assert process.poll() is None, 'it ended too early'
        time.sleep(0.02)


def end(process):
    "What the process printed."
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1])       # Ray says before it that a worker died


@engine
def test_twenty_pairs(cluster, tmp_path, monkeypatch):
    "By the command, and then as if the folders were an object store: the results, report and record of fuse_folder."
    root = write_slices(tmp_path, 20)
    (root / 'MRI' / '000003.png').unlink()
    for name, data in (('000004.png', b'no picture'), ('000005.png', b'')):
        (root / 'CT' / name).unlink()
        (root / 'CT' / name).write_bytes(data)
    plain = fuse_folder(root / 'CT', root / 'MRI', root / 'plain', batch_size=4, progress=False)
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ['fuse', 'CT', f'file://{root}/MRI', '-o', 'out', '--engine', 'ray', '--address', cluster[0]])
    assert done.exit_code == 1 and '17 fused, 0 already there, 3 failed' in done.output
    far = end(begin(root, cluster, 'elsewhere', 'wavelet'))
    assert far['skipped'] == 17 and far['failed'].keys() == plain.failed.keys()
    shutil.rmtree(root / 'out')
    far = end(begin(root, cluster, 'elsewhere', 'wavelet'))
    assert far['fused'] == 17 and not list(root.glob('out/fused.parts/*'))
    for name, why in plain.failed.items():
        assert re.sub(r'subtree:(?=CT|MRI)', f'{root}/', far['failed'][name]) == why
    assert names_in(root / 'out') == names_in(root / 'plain') == sorted(file for file, *_ in results(root / 'out').elements())
    for name in plain.fused:
        assert np.abs(read_image(root / 'out' / name).astype(int) - read_image(root / 'plain' / name)).max() <= 1, name
    assert fuse_folder(root / 'CT', root / 'MRI', root / 'out', progress=False).skipped == plain.fused


@engine
def test_an_engine_of_this_machine(tmp_path, monkeypatch):
    "Begun by the command, and ended with it."
    folder = tempfile.mkdtemp(prefix='ray', dir='/tmp')
    monkeypatch.setenv('RAY_TMPDIR', folder)
    monkeypatch.setenv('HOME', str(tmp_path))        # an engine of this machine makes itself a token there
    monkeypatch.delenv('RAY_AUTH_MODE', raising=False)
    root = write_slices(tmp_path, 8)
    done = subprocess.run([sys.executable, '-m', 'medfusion', 'fuse', root / 'CT', root / 'MRI', '-o', root / 'out', '-m', 'maximum', '--engine', 'ray'],
                          capture_output=True, text=True)
    shutil.rmtree(folder)
    assert done.returncode == 0 and done.stdout.startswith('8 fused'), done


@engine
@pytest.mark.long
@pytest.mark.fault('fuse on an engine', 'a worker killed')
@pytest.mark.parametrize('kind', ['folder', 'elsewhere'])
def test_a_worker_that_is_killed(cluster, tmp_path, kind):
    root = write_slices(tmp_path, 2000)
    process = begin(root, cluster, kind)
    wait_for(300, root, process)
    victim, before = workers(cluster[1])[0], standing(root / 'out')
    os.kill(victim, signal.SIGKILL)
    said = end(process)
    assert said['fused'] + said['skipped'] == 2000 and not said['failed']
    check_once(root / 'out', 2000, before, killed=1, kind=kind)


@engine
@pytest.mark.long
@pytest.mark.fault('fuse on an engine', 'the driver killed')
@pytest.mark.parametrize('kind', ['folder', 'elsewhere'])
def test_a_driver_that_is_killed(cluster, tmp_path, kind):
    root = write_slices(tmp_path, 2000)
    process = begin(root, cluster, kind)
    wait_for(300, root, process)
    process.kill()
    process.communicate()
    while workers(cluster[1]):
        time.sleep(0.1)
    before = standing(root / 'out')
    said = end(begin(root, cluster, kind))
    assert said['skipped'] == len(before) > 200 and said['fused'] == 2000 - len(before) and not said['failed']
    check_once(root / 'out', 2000, before, killed=2, kind=kind)


@engine
@pytest.mark.long
def test_memory_is_flat(cluster, tmp_path):
    "Of the driver from the first 2,000 of 10,000 pairs to the last, of the workers from 6,000 on: Ray begins the second one late, and a worker grows until it is warm."
    root = write_slices(tmp_path, 10_000)
    process = begin(root, cluster)
    wait_for(2000, root, process)
    before = {process.pid: memory_of(process.pid)}
    wait_for(6000, root, process)
    before |= {number: memory_of(number) for number in workers(cluster[1])}
    wait_for(9500, root, process)
    after = {number: memory_of(number) for number in before}
    said = end(process)
    assert said['fused'] == 10_000 and len(before) > 1
    assert all(after[number] - before[number] < 48 for number in before), (before, after)


def test_without_an_engine_there_are_sentences():
    for words, part in ((['--address', 'a:1'], 'add --engine ray'), (['-m', 'maximum'], 's3://b/mri is on another filesystem; add --engine ray')):
        done = CliRunner().invoke(app, ['fuse', '.', 's3://b/mri', '-o', 'out', *words])
        assert done.exit_code == 2 and part in done.output


def test_nothing_to_fuse_asks_nothing_of_an_engine():
    assert list(run_on_ray(None, None, [], (2, 1, 0))) == []


def test_what_an_engine_cannot_do_is_told():
    for out in ('x/{name}_fused.png', '{name}'):
        with pytest.raises(ValueError, match='ends in a pattern of names'):
            fuse_on_ray('CT', 'MRI', out, 'maximum')
    with pytest.raises(ValueError, match="'cuda:1' is one GPU.*use cuda"):
        worker_shares({'CPU': 16, 'GPU': 4}, 'cuda:1')


def elsewhere(root):
    "A filesystem of pyarrow whose paths begin in this folder, as if an object store."
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
    return SubTreeFileSystem(str(root), LocalFileSystem())


@engine
@pytest.mark.parametrize('ct, out', [('CT', 'CT/'), ('CT/', 'CT'), ('CT', 'MRI//')])
def test_slices_elsewhere_are_not_replaced_by_results(tmp_path, monkeypatch, ct, out):
    "However many slashes end a name; before the work."
    root = write_slices(tmp_path, 2)
    before = {path: path.read_bytes() for path in root.rglob('*.png')}
    monkeypatch.setattr(engines, 'ray_engine', lambda address: nullcontext(SimpleNamespace(cluster_resources=lambda: {'CPU': 1})))
    with pytest.raises(ValueError, match='is what is read'):
        fuse_on_ray(ct, 'MRI', out, 'maximum', progress=False, replace=True, filesystem=elsewhere(root))
    assert {path: path.read_bytes() for path in root.rglob('*') if path.is_file()} == before


@engine
def test_an_mri_before_the_ct_is_refused_elsewhere_too(tmp_path):
    far = elsewhere(write_slices(tmp_path, 2))
    for places in (('MRI', 'CT'), ('CT/{name}_mri.png', 'MRI/{name}_ct.png')):
        with pytest.raises(ValueError, match='The order is CT, then MRI'):
            pairs_in(*(store_of(place, far) for place in places))


@engine
def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / 'CT').touch()
    with pytest.raises(OSError, match='^subtree:CT could not be listed .*; check its name'):
        pairs_in(*(store_of('CT', elsewhere(tmp_path)) for _ in range(2)))


@pytest.mark.parametrize('address, why', [('127.0.0.2:1', 'refused'), ('127.0.0.2:99999', ''), ('[::1]:1', ''), ('10.0.0.1', 'it is not HOST:PORT'),
                                          ('no.such.host.invalid:6379', '')])
def test_where_no_cluster_is_ray_is_not_asked(monkeypatch, address, why):
    "It would try for a quarter of an hour."
    ray = ModuleType('ray')
    ray.is_initialized = lambda: False
    monkeypatch.setitem(sys.modules, 'ray', ray), monkeypatch.setitem(sys.modules, 'ray.data', ModuleType('ray.data'))
    with pytest.raises(ConnectionError, match=re.escape(f'No Ray cluster answers at {address} (') + f'.*{why}.*begin one by: ray start --head'):
        with engines.ray_engine(address):
            pass


def test_a_machine_without_the_package_is_a_sentence(tmp_path):
    "Its worker cannot begin; Ray says so in pages."
    class RayError(Exception):
        pass

    class Lost:
        DataContext, ActorPoolStrategy = SimpleNamespace(get_current=SimpleNamespace), dict
        from_blocks = map_batches = lambda self, *_, **__: self

        def iter_batches(self, **_):
            raise RayError('The actor died in its creation task, __init__() (pid=7)\n  File "serialization.py", line 595\nModuleNotFoundError: No module named \'medfusion\'\n')
    root = write_slices(tmp_path, 1)
    pairs, _ = pairs_in(*(store_of(root / side) for side in ('CT', 'MRI')))
    ray = SimpleNamespace(data=Lost(), exceptions=SimpleNamespace(RayTaskError=KeyError, RayError=RayError))
    with pytest.raises(ConnectionError, match="^Ray gave up .ModuleNotFoundError: No module named 'medfusion'.; each machine .* needs medfusion"):
        list(run_on_ray(ray, SimpleNamespace(batch_size=8), pairs, (1, 1, 0)))


def test_a_cluster_of_another_version_is_a_sentence(monkeypatch):
    ray = ModuleType('ray')
    ray.is_initialized = lambda: False
    ray.shutdown = lambda: None

    def init(*_, **__):
        raise RuntimeError('Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1')
    ray.init = init
    monkeypatch.setitem(sys.modules, 'ray', ray), monkeypatch.setitem(sys.modules, 'ray.data', ModuleType('ray.data'))
    with pytest.raises(ConnectionError, match='^Ray cannot be used at auto .Version mismatch: The cluster was started with: Ray: 2.60.0 Python: 3.12.1.'):
        with engines.ray_engine('auto'):
            pass
