"""What all tests share: markers, the budgets of Hypothesis, a temporary directory of their own in which nothing may stay, and set-ups
that several of them import from here.
"""
import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

sys.modules['rfc3987_syntax'] = None    # a grammar that nbformat's jsonschema builds where JupyterLab brought it, for longer than torch is loaded
gc.set_threshold(100_000, 20, 20)      # seldom: each time, what torch brought is looked through, and that took an eighth of the tests' time


def compute_alone():
    "A forked child has none of the threads that its parent's OpenMP counts on: torch would wait for them for ever."
    if 'torch' in sys.modules:
        sys.modules['torch'].set_num_threads(1)


os.register_at_fork(after_in_child=compute_alone)

# `make test` tries the same few examples each time; `make fuzz` tries new ones, and first those that failed before.
# How busy the machine is decides nothing: neither a deadline nor the check that examples are drawn fast.
PATIENT = {'deadline': None, 'suppress_health_check': [HealthCheck.too_slow]}
settings.register_profile('quick', derandomize=True, max_examples=30, database=None, **PATIENT)
settings.register_profile('fuzz', max_examples=1000, **PATIENT)
settings.load_profile('quick')


class Leftovers:
    "Gives a test process its own temporary directory, and remembers after which test each file that stays there was first seen."

    def __init__(self, folder):
        self.folder, self.seen = Path(folder), {}
        os.environ['TMPDIR'] = str(folder)
        tempfile.tempdir = None   # read TMPDIR anew

    def names(self):
        """What is there, but for the folders of pytest, of the other processes, torch's cache, which importing it makes, and that of multiprocessing's
        server (from Python 3.14 on), which it removes when this process ends."""
        own = 'pytest-of-', 'worker-', 'torchinductor_', 'pymp-'
        return {path.name for path in self.folder.iterdir() if not path.name.startswith(own)}

    def pytest_runtest_logfinish(self, nodeid):
        for name in self.names() - self.seen.keys():
            self.seen[name] = nodeid

    def sentences(self):
        "What is still there, as sentences."
        return [f'{name} (first seen after {self.seen.get(name, "the last test")})' for name in sorted(self.names())]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    "Training flushes denormal numbers to zero, in the whole process; the next test begins without, in whatever order they run."
    if 'torch' in sys.modules:
        sys.modules['torch'].set_flush_denormal(False)


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes long; `make long` runs it and `make test` does not')
    config.addinivalue_line('markers', 'fault(door, what, points=1): tries a fault at so many points; `make long` runs these too, and prints their table')
    if hasattr(config, 'workerinput'):   # one of the processes of pytest-xdist, inside the directory of the first
        folder = Path(tempfile.gettempdir()) / f'worker-{config.workerinput["workerid"]}'
        folder.mkdir()
    else:
        folder = Path(tempfile.mkdtemp(prefix='medfusion-tests-'))
    config.leftovers = Leftovers(folder)
    config.left_by_workers = []
    config.pluginmanager.register(config.leftovers)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    "After the last test: a worker hands its list on, the first process fails the run if anything is left."
    config = session.config
    found = config.leftovers.sentences()
    if hasattr(config, 'workeroutput'):
        config.workeroutput['leftovers'] = found
    elif found + config.left_by_workers and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.left_by_workers += getattr(node, 'workeroutput', {}).get('leftovers', [])


def pytest_runtest_setup(item):
    "A fault that is tried goes into the report, so that processes side by side can be counted together."
    for mark in item.iter_markers('fault'):
        item.user_properties += [('fault', mark.args), ('points', mark.kwargs.get('points', 1))]


def fault_table(reports):
    "Lines: what was tried at which door, in how many tests and at how many points, and how many tests failed."
    rows = {}
    for report in reports:
        said = dict(report.user_properties)    # of two 'points' the later, which the test itself found out
        if report.when == 'call' and 'fault' in said:
            row = rows.setdefault(tuple(said['fault']), [0, 0, 0])
            for i, value in enumerate((1, said['points'], report.failed)):
                row[i] += value
    lines = [('door', 'fault', 'tests', 'points', 'failed'), *((*key, *row) for key, row in sorted(rows.items()))]
    return ['{:<22}{:<40}{:>7}{:>8}{:>8}'.format(*line) for line in lines] if rows else []


def pytest_terminal_summary(terminalreporter, config):
    if 'fault' in config.option.markexpr:
        terminalreporter.section('faults that were tried')
        for line in fault_table([report for kind in ('passed', 'failed') for report in terminalreporter.stats.get(kind, ())]):
            terminalreporter.line(line)
    found = config.leftovers.sentences() + config.left_by_workers
    if found:
        terminalreporter.section('left in the temporary directory', red=True)
        for sentence in ['Whoever makes a temporary file removes it (tmp_path, or TemporaryDirectory in a with).', *found]:
            terminalreporter.line(sentence)


def pytest_unconfigure(config):
    if hasattr(config, 'leftovers') and not hasattr(config, 'workerinput'):
        Finalize(None, shutil.rmtree, (config.leftovers.folder, True), exitpriority=-200)    # after multiprocessing, which removes its own folder at -100


def notebook(folder, *cells, tags=('parameters',)):
    "A notebook whose first cell is tagged `parameters`."
    path = folder / 'toy.ipynb'
    path.write_text(json.dumps({'nbformat': 4, 'nbformat_minor': 5, 'metadata': {
        'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}, 'cells': [
        {'cell_type': 'code', 'id': f'c{i}', 'source': source.splitlines(keepends=True), 'outputs': [],
         'execution_count': None, 'metadata': {'tags': list(tags)} if i == 0 else {}}
        for i, source in enumerate(cells)]}))
    return path


def run_cells(path, parameters, until=None):
    "The namespace of a notebook's cells run here one after the other with these parameters, up to the first that defines `until`."
    namespace = {'__name__': path.stem}
    try:
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'code' and until not in namespace:
                exec(compile(''.join(cell['source']), str(path), 'exec'), namespace)
                if 'parameters' in cell['metadata'].get('tags', []):
                    namespace.update(parameters)
    finally:
        if namespace.get('scratch'):
            namespace['scratch'].cleanup()
    return namespace


def write_slices(root, number, sides=('ct', 'mri'), size=48):
    "The folder `root`, in which there are now so many slices in CT, MRI and, if there is a third of these sides of a phantom slice, F: links to eight that differ."
    from medfusion.files import to_depth, write_image
    from medfusion.phantom import phantom_slice
    heads = [phantom_slice('1', i, slices=8, size=64) for i in range(8)]
    for folder, side in zip(('CT', 'MRI', 'F'), sides):
        (root / folder).mkdir(parents=True)
        for i, head in enumerate(heads):
            write_image(root / folder / f'{i:06d}.png', to_depth(getattr(head, side)[:size, :size], 'uint8'))
        for i in range(8, number):
            (root / folder / f'{i:06d}.png').hardlink_to(root / folder / f'{i % 8:06d}.png')
    return root


def memory_of(process):
    """MiB of memory of its own that the process of this number uses, 0 where it has ended: of what it shares with the processes that it was forked from,
    its part; of files that it maps, what else the machine does decides how much."""
    for file, name in (('smaps_rollup', 'Pss_Anon'), ('status', 'RssAnon')):      # older systems do not share it out
        with suppress(OSError):
            if told := re.search(rf'{name}:\s+(\d+)', Path(f'/proc/{process}/{file}').read_text()):
                return int(told[1]) // 1024
    return 0


def peak_memory(process):
    "The largest sum at one time of the `memory_of` a process and of those that it began; looked at until it ends."
    peak = 0
    while process.poll() is None:
        with suppress(OSError, psutil.NoSuchProcess):        # it has ended meanwhile
            numbers = process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))
            peak = max(peak, sum(map(memory_of, numbers)))
        time.sleep(0.05)
    return peak


def begin_child(function):
    "The process id of a child that runs `function`, and exits with the status that it asks for; forked, because importing torch takes seconds."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    return child


def in_child(function):
    "The wait status of a child process that runs `function`."
    return os.waitpid(begin_child(function), 0)[1]


def in_little_space(function, *arguments, limit=3000):
    "What a call raises in a process that may not write files of more than `limit` bytes (root neither)."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            function(*arguments)
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, encoding='utf-8') as answer:
        return answer.read()
