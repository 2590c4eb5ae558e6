"""How much of the network's speed `fuse_folder` keeps from files to files, and where the rest of the time goes.

    python benchmarks/fuse_speed.py
    python benchmarks/fuse_speed.py --ct CT --mri MRI --pairs 200 --model resnet
    python benchmarks/fuse_speed.py --device cuda --cores 16 --batch-size 32
    python benchmarks/fuse_speed.py --png

By default phantom slices, one thread for the network and one core more for the files; the process is bound to these cores
where the system allows it. "Alone" is the network on slices in memory, one by one on a CPU, where that is fastest, and in
batches on a GPU. Rounds of both alternate, and the best of each counts. On a machine that others use too, look at the last
ratio: of the processor time of the network's thread, and of the share of the time in which that thread had work.
"""
import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from machine import heading, ratio


def write_pairs(root, pairs, size):
    "Writes 8 phantom pairs of 8 bits to root/base, and links to them, `pairs` in number, to root/CT and root/MRI."
    import numpy as np

    from medfusion.files import to_depth, write_image
    from medfusion.phantom import phantom_slice
    for side in ('CT', 'MRI'):
        (root / 'base' / side).mkdir(parents=True)
    for i in range(8):
        head = phantom_slice('1', i, slices=8, size=size)
        write_image(root / 'base' / 'CT' / f'{i}.png', to_depth(head.ct, np.uint8))
        write_image(root / 'base' / 'MRI' / f'{i}.png', to_depth(head.mri, np.uint8))
    link_pairs(root, root / 'base' / 'CT', root / 'base' / 'MRI', pairs)


def link_pairs(root, ct, mri, pairs):
    "Links `pairs` names in root/CT and root/MRI to the pairs of two folders, over and over."
    from medfusion.files import list_pairs
    given = list_pairs(ct, mri)
    for side, paths in (('CT', [pair.ct for pair in given]), ('MRI', [pair.mri for pair in given])):
        (root / side).mkdir()
        for i in range(pairs):
            path = paths[i % len(paths)]
            (root / side / f'{i:06d}{path.suffix}').symlink_to(path.resolve())


def load(root, batch_size, device):
    "The first pairs of the folders as a list of batches (ct, mri) on the device: of one pair on a CPU."
    import torch

    from medfusion.files import list_pairs, read_pair, to_float
    pairs = [[torch.from_numpy(to_float(image))[None, None] for image in read_pair(pair, quiet=True)] for pair in list_pairs(root / 'CT', root / 'MRI')[:64]]
    together = 1 if device.type == 'cpu' else batch_size
    groups = [pairs[i:i + together] for i in range(0, len(pairs), together)]
    return [[torch.cat(side).to(device) for side in zip(*group)] for group in groups]


def clock():
    "Seconds: of the wall, of this thread's computing, and those in which it waited for a processor that others had."
    try:
        waited = int(Path('/proc/thread-self/schedstat').read_text().split()[1]) / 1e9
    except OSError:
        waited = 0
    return time.perf_counter(), time.thread_time(), waited


def alone(network, batches, pairs):
    "Fuses `pairs` pairs that are in memory, the batches over and over."
    import torch
    done = 0
    with torch.no_grad():
        while done < pairs:
            for ct, mri in batches:
                network(ct, mri).cpu()      # the copy waits for a GPU
                done += len(ct)
    return done


def timed(task):
    "(what a task returns, [seconds: of the wall, of computing, of waiting for a processor])."
    start = clock()
    result = task()
    return result, [end - begin for begin, end in zip(start, clock())]


def rounds(root, network, given):
    "Prints a row for each round, and the ratios."
    from medfusion.inference import fuse_folder, place_of
    batches = load(root, given.batch_size, place_of(network)['device'])
    alone(network, batches, 8)
    print('   alone, pairs/s   from files to files   ratio   CPU of the network: alone, in the folder   it had work')
    table = []
    for number in range(given.rounds):
        done, pure = timed(lambda: alone(network, batches, given.pairs))
        report, files = timed(lambda: fuse_folder(root / 'CT', root / 'MRI', root / f'out{number}', network, batch_size=given.batch_size, progress=False))
        assert report.ok and len(report.fused) == given.pairs, report
        busy = min(1, (files[1] + files[2]) / files[0])
        row = done / pure[0], given.pairs / files[0], 1000 * pure[1] / done, 1000 * files[1] / given.pairs, busy
        table.append(row)
        print(f'{row[0]:17.1f} {row[1]:21.1f} {row[1] / row[0]:7.2f} {row[2]:31.1f}, {row[3]:.1f} ms {busy:19.0%}', flush=True)
    best = [max(column) for column in zip(*table)]
    least = [min(column) for column in zip(*table)]
    print(f'best: {best[1]:.1f} of {best[0]:.1f} pairs a second')
    print(ratio(f'{given.model}, from files to files, of the network alone', best[1] / best[0], percent=True))
    if batches[0][0].device.type == 'cpu':
        print(ratio(f'{given.model}, from files to files, of the network alone, by processor time', least[2] / least[3] * best[4], percent=True))


def stages(root, network):
    "Prints what each stage of a pair costs: CPU and wall, in ms, one after the other in one thread."
    from medfusion import inference as i
    names = {'file_bytes': 'read', 'read_slice': 'decode', 'displaced_in': 'out of register?', 'fuse_batch': 'network',
             'append_line': 'line in the record', 'write_atomically': 'write and sync'}
    spent = {name: Counter() for name in ('cpu', 'wall')}

    def noted(title, function):
        def call(*given, **more):
            start = time.thread_time(), time.perf_counter()
            try:
                return function(*given, **more)
            finally:
                spent['cpu'][title] += time.thread_time() - start[0]
                spent['wall'][title] += time.perf_counter() - start[1]
        return call
    real = {name: getattr(i, name) for name in names}
    for name, title in names.items():
        setattr(i, name, noted(title, real[name]))
    folder = root / 'stages'
    folder.mkdir()
    job = i.FolderJob(network, '', i.FusedRecord(folder), i.FolderReport(folder))
    i.claim_record(job.record, '', 'benchmark', False)
    reading, fusing, writing = (noted(*one) for one in (('hash, tensors', i.read_slices), ('network', i.fuse_slices), ('encode, hash', i.write_fused)))
    pairs = i.pairs_to_fuse(root / 'CT', root / 'MRI')[0][:24]
    for pair in pairs:
        [(slices, fused)] = fusing([reading(pair, job)], network)
        writing(slices, fused, job)
    for name in names:
        setattr(i, name, real[name])
    for times in spent.values():        # what is inside another stage counts once
        times['hash, tensors'] -= times['read'] + times['decode'] + times['out of register?']
        times['encode, hash'] -= times['line in the record'] + times['write and sync']
        times['network'] /= 2
    print('stage of a pair        CPU ms   wall ms')
    order = ('read', 'decode', 'hash, tensors', 'out of register?', 'network', 'encode, hash', 'line in the record', 'write and sync')
    for title in order:
        print(f'{title:20} {1000 * spent["cpu"][title] / len(pairs):8.2f} {1000 * spent["wall"][title] / len(pairs):9.2f}')


def png_choices(root, network):
    "Prints what OpenCV's levels and strategies of PNG cost for fused slices, beside what it does by itself, which `medfusion` leaves as it is."
    import cv2
    import numpy as np

    from medfusion.files import list_pairs, read_pair, to_depth
    from medfusion.inference import fuse
    images = [fuse(*read_pair(pair, quiet=True), network) for pair in list_pairs(root / 'CT', root / 'MRI')[:16]]
    images = [to_depth(image, np.uint8) if image.dtype.kind == 'f' else image for image in images]
    strategies = {'default': 0, 'filtered': 1, 'huffman': 2, 'run length': 3, 'fixed': 4}
    choices = [('by itself', [])] + [(f'level {level}, {name}', [cv2.IMWRITE_PNG_COMPRESSION, level, cv2.IMWRITE_PNG_STRATEGY, number])
                                     for level in (1, 3, 6, 9) for name, number in strategies.items()] + [('stored', [cv2.IMWRITE_PNG_COMPRESSION, 0])]
    print('PNG                        ms     KiB')
    for title, options in choices:
        times = []
        for _ in range(5):
            start = time.thread_time()
            sizes = [len(cv2.imencode('.png', image, options)[1]) for image in images]
            times.append((time.thread_time() - start) / len(images))
        print(f'{title:22} {1000 * min(times):6.2f} {np.mean(sizes) / 1024:7.1f}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='wavelet')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1, help='of the network')
    parser.add_argument('--cores', type=int, help='for everything; one more than the threads by default')
    parser.add_argument('--pairs', type=int, default=96)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--ct', type=Path, help='a folder of CT slices to use instead of phantoms')
    parser.add_argument('--mri', type=Path, help='and that of the MRI slices')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--png', action='store_true', help='compare ways to compress a PNG, and nothing else')
    given = parser.parse_args()
    for variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):     # before NumPy and torch start their threads
        os.environ[variable] = str(given.threads)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:given.cores or given.threads + 1])
    import torch

    from medfusion.inference import load_model, place_of
    torch.set_num_threads(given.threads)
    network = load_model(given.model, given.device)
    print(heading(torch.cuda.get_device_name() if place_of(network)['device'].type == 'cuda' else ''))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if given.ct:
            link_pairs(root, given.ct, given.mri, given.pairs)
        else:
            write_pairs(root, given.pairs, given.size)
        if given.png:
            return png_choices(root, network)
        print(f'{given.model}, {given.pairs} pairs, {given.device}, {given.threads} threads for the network, {len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()} cores')
        rounds(root, network, given)
        stages(root, network)


if __name__ == '__main__':
    main()
