"""How many pairs a second `fuse_folder` fuses, from files to files, and how much of it is the network.

    python benchmarks/fuse_speed.py --model wavelet --threads 1 2
    python benchmarks/fuse_speed.py --model resnet --device cuda --batch-size 32

Phantom slices are written to a temporary folder first. "n threads" means n cores for everything: the process is
bound to them where the system allows it, so that reading and writing do not happen on cores that are not counted.
Every row runs in a process of its own, after one batch to warm up.
"""
import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path


def write_pairs(root, pairs, size):
    "Writes `pairs` phantom pairs of 8 bits to root/CT and root/MRI."
    import numpy as np

    from medfusion.files import to_depth, write_image
    from medfusion.phantom import phantom_slice
    heads = [phantom_slice('1', i, slices=8, size=size) for i in range(8)]
    for folder in ('CT', 'MRI'):
        (root / folder).mkdir()
    for i in range(pairs):
        head = heads[i % 8]
        write_image(root / 'CT' / f'1{i:03d}.png', to_depth(head.ct, np.uint8))
        write_image(root / 'MRI' / f'1{i:03d}.png', to_depth(head.mri, np.uint8))


def measure(threads, root, model, device, batch_size):
    "Prints a row: threads, pairs a second from files to files, milliseconds a pair, milliseconds of the network alone."
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    import torch

    from medfusion.files import read_image, to_float
    from medfusion.inference import fuse_folder, load_model
    torch.set_num_threads(threads)
    network = load_model(model, device)
    device = next(network.parameters()).device
    paths = sorted((root / 'CT').iterdir())[:batch_size]
    ct, mri = (torch.stack([torch.from_numpy(to_float(read_image(root / side / path.name)))[None] for path in paths]).to(device)
               for side in ('CT', 'MRI'))
    alone = network_seconds(network, ct, mri) / len(paths)
    report = fuse_folder(root / 'CT', root / 'MRI', root / f'out{threads}', network, batch_size=batch_size, progress=False)
    assert report.ok and not report.skipped, report
    pair = report.seconds / len(report.fused)
    print(f'{threads:7d} {1 / pair:15.1f} {1000 * pair:12.2f} {1000 * alone:20.2f}', flush=True)


def network_seconds(network, ct, mri, repeats=5):
    "The shortest of some timings of one batch, after one to warm up."
    import torch
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            network(ct, mri).cpu()  # the copy waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='wavelet')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--pairs', type=int, default=96)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--batch-size', type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), given.pairs, given.size)
        print(f'{given.model}, {given.pairs} pairs of {given.size}×{given.size}, batches of {given.batch_size}, {given.device}')
        print('threads  pairs a second   ms a pair   network alone, ms a pair')
        for threads in given.threads:
            child = multiprocessing.get_context('spawn').Process(
                target=measure, args=(threads, Path(folder), given.model, given.device, given.batch_size))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(child.exitcode)


if __name__ == '__main__':
    main()
