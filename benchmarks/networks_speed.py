"""Milliseconds of a pair of slices for the networks that ship, and of each their parts; beside those of earlier commits, in one run.

    python benchmarks/networks_speed.py
    python benchmarks/networks_speed.py --against b611665 34074a3 --compile
    python benchmarks/networks_speed.py --sizes 256 --threads 1 --rounds 30

The package of each commit, with the networks that it shipped, is loaded by a process of its own. All take turns: in a round each network is called once to
warm up, then for 50 ms, and of all rounds the fastest call counts, with its parts. In brackets: how many times as long as here. The first commit is measured at
every size and number of threads, and the ratios are to it; the others at the first size and number of threads. The networks are also called in bfloat16, where
onnxruntime is installed as `medfusion export` writes them, and with --compile as torch.compile makes them (which takes minutes).
"""
import argparse
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from machine import ROOT, heading, ratio

NETWORKS = {'wavelet': ('mask network', 'certain pixels', 'transforms and mixing'), 'wavelet-lite': ('region network', 'certain pixels', 'transforms and mixing'),
            'resnet': ('backbone', 'fusion and decoder', 'edges and mixing'), 'laplacian_pyramid': ()}
HERE = 'here'


def parts_of(network):
    "The functions (owner, name) of each of the two parts of a network whose time is told; a rule has none."
    module = sys.modules[type(network).__module__]
    if hasattr(network, 'backbone'):
        trained = [(network, name) for name in ('fuse_features', 'decide') if hasattr(network, name)]    # of earlier commits `decide` did both
        return [[(network, 'features')], trained + [(one, 'forward') for one in [getattr(network, 'dial', None)] if one]]
    return [[(network.network, 'forward')], [(module, 'keep_certain')]] if hasattr(network, 'network') else []


def in_parts(network, pair):
    "The seconds of one call of a network (of all, of each of its two parts, of the rest), and the fused slice."
    spent = []

    def noted(place, function, *given, **more):
        start = time.perf_counter()
        result = function(*given, **more)
        spent[place] += time.perf_counter() - start
        return result
    with ExitStack() as stack:
        for place, functions in enumerate(parts_of(network)):
            spent.append(0.)
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, partial(noted, place, getattr(owner, name))))
        start = time.perf_counter()
        fused = network(*pair)
        whole = time.perf_counter() - start
    return ([whole, *spent, whole - sum(spent)] if spent else [whole]), fused.numpy()


def in_whole(call, pair):
    "The seconds of one call, and the fused slice."
    start = time.perf_counter()
    fused = call(*pair)
    return [time.perf_counter() - start], np.asarray(fused)


def by_onnx(name, threads):
    "A network as ONNX Runtime calls it, with so many threads."
    from medfusion.exporting import export_onnx, onnx_session
    with tempfile.TemporaryDirectory() as folder:
        content = export_onnx(name, Path(folder, 'network.onnx')).read_bytes()
    onnx_session(content)       # forbids what would be sent before onnxruntime is imported
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return lambda ct, mri: session.run(None, {'ct': ct.numpy(), 'mri': mri.numpy()})[0]


def way_of(way, name, threads):
    "How a network is called: a function of a pair that returns seconds and the fused slice."
    from medfusion.inference import load_model
    network = load_model(name, 'cpu')
    if way == 'torch':
        return partial(in_parts, network)
    return partial(in_whole, {'bfloat16': lambda: network.to(torch.bfloat16), 'ONNX Runtime': lambda: by_onnx(name, threads),
                              'torch.compile': lambda: torch.compile(network, dynamic=False)}[way]())


def work():
    "What a `Worker`'s process does: says which networks it has, then answers each task with the fastest of some calls."
    from medfusion import inference
    answers = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)               # what something prints is no answer
    ways, answer = {}, [name for name in NETWORKS if name in {**inference.shipped_models(), **inference.rules()}]
    while True:
        pickle.dump((inference.__file__, answer), answers)
        answers.flush()
        try:
            way, name, threads, pair = pickle.load(sys.stdin.buffer)
        except EOFError:        # there is nothing more to do
            return
        torch.set_num_threads(threads)
        key = way, name, threads if way == 'ONNX Runtime' else 0
        if key not in ways:
            ways[key] = way_of(way, name, threads)
        with torch.inference_mode():
            ways[key](pair)     # warms up
            end, answer = time.perf_counter() + .05, ways[key](pair)
            while time.perf_counter() < end:
                answer = min(answer, ways[key](pair), key=itemgetter(0))


class Worker:
    "A process with the package in a folder: `networks`, those that it has; called with way, network, threads and a pair, it returns seconds and the fused slice."

    def __init__(self, folder):
        self.process = subprocess.Popen([sys.executable, __file__, '--worker'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=os.environ | {'PYTHONPATH': str(folder)})
        place, self.networks = self.answer()
        if not Path(place).is_relative_to(folder):
            raise SystemExit(f'{place} was imported, which is not in {folder}.')

    def answer(self):
        return pickle.load(self.process.stdout)

    def __call__(self, *task):
        pickle.dump(task, self.process.stdin)
        self.process.stdin.flush()
        return self.answer()[1]

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def package_of(commit, folder):
    "The folder, with the package of a commit in it."
    packed = subprocess.run(['git', '-C', ROOT, 'archive', commit, 'medfusion'], stdout=subprocess.PIPE, check=True).stdout
    tarfile.open(fileobj=io.BytesIO(packed)).extractall(folder, filter='data')
    return folder


def pair_of(size):
    "A pair of the phantom, (1, 1, size, size) each."
    from medfusion.phantom import phantom_slice
    head = phantom_slice(12, 4, size=size)
    return [torch.as_tensor(image)[None, None].float() for image in (head.ct, head.mri)]


def measured(columns, rounds):
    "{(network, title): {setting: (seconds, fused slice)}} of columns {(network, title): (call, settings)} that take turns, the fastest of each; a setting is (size, threads)."
    best, pairs = {key: {} for key in columns}, {size: pair_of(size) for _, settings in columns.values() for size, _ in settings}
    for _ in range(rounds):
        for key, (call, settings) in columns.items():
            for size, threads in settings:
                took = call(threads, pairs[size])
                best[key][size, threads] = min(best[key].get((size, threads), took), took, key=itemgetter(0))
    return best


def told(seconds, here):
    "The text of a cell: the milliseconds of a network, beside `here`, and those of its parts."
    whole, *parts = (f'{1000 * value:.{1 if value > .01 else 2}f}' for value in seconds)
    return whole + ('' if seconds is here else f' (×{seconds[0] / here[0]:.2f})') + (f' = {" + ".join(parts)}' if parts else '')


def report(best, settings, commits):
    "Prints the table, and the ratios at the first setting."
    print(f'{"ms of a pair":<16}' + ''.join(f'{f"{size}×{size}, threads: {threads}":>39}' for size, threads in settings))
    for name, parts in NETWORKS.items():
        print(f'{name} = {" + ".join(parts)}' if parts else name)
        for (network, title), found in best.items():
            if network == name:
                print(f'  {title:<14}' + ''.join(f'{told(found[setting][0], best[name, HERE][setting][0]) if setting in found else "":>39}' for setting in settings).rstrip())

    def seconds(name, title=HERE):
        return best[name, title][settings[0]][0][0]
    for name, title in best:
        if title in commits[:1]:
            print(ratio(f'{name}, as fast as at {title}', seconds(name, title) / seconds(name)))
        elif title not in (HERE, *commits):
            apart = abs(best[name, title][settings[0]][1] - best[name, HERE][settings[0]][1]).max()
            print(ratio(f'{name} by {title}, as fast as by torch', seconds(name) / seconds(name, title), remark=f'differs by up to {255 * apart:.1g} grey levels'))
    for commit in commits[:1]:
        print(ratio(f'wavelet-lite, as fast as wavelet at {commit}', seconds('wavelet', commit) / seconds('wavelet-lite')))
    print(ratio('wavelet-lite, as fast as wavelet', seconds('wavelet') / seconds('wavelet-lite')))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[256, 512])
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--against', nargs='*', default=[], metavar='COMMIT', help='earlier commits, whose networks are called, too')
    parser.add_argument('--compile', action='store_true', help='by torch.compile, too')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work()
    print(heading())
    settings = [(size, threads) for size in given.sizes for threads in given.threads]
    ways = {'bfloat16': settings[:1]}
    ways |= {'ONNX Runtime': settings} if find_spec('onnxruntime') and find_spec('onnx') else {}
    ways |= {'torch.compile': settings[:1]} if given.compile else {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(Path(scratch, 'compiled'))
        folders = {HERE: ROOT} | {commit: package_of(commit, Path(scratch, str(number))) for number, commit in enumerate(given.against)}
        columns = {}
        for title, folder in folders.items():
            worker = Worker(folder)
            stack.callback(worker.end)
            where = settings if title in (HERE, *given.against[:1]) else settings[:1]
            columns |= {(name, title): (partial(worker, 'torch', name), where) for name in worker.networks}
            if title == HERE:
                columns |= {(name, way): (partial(worker, way, name), there) for name in NETWORKS if NETWORKS[name] for way, there in ways.items()}
        report(measured(columns, given.rounds), settings, given.against)


if __name__ == '__main__':
    main()
