"""What a hundred thousand files take: memory and the time until the first result, and what several processes gain.

    python benchmarks/many_files.py
    python benchmarks/many_files.py --pairs 1000 10000 --results 10000 --triples 1000 10000 --jobs 2

Fusing is shown with the pixel maximum of 64×64 pairs, so that nothing but the files counts; every number of pairs in a process of its own,
which is stopped after `--results` results. Measuring is shown by one cheap column of triples of that size, for memory, and by all columns of
`--rated` triples of 256×256: the rate of several processes, each with one thread, over that of one, rounds of both in turn and the best of each.
Where others use the machine too, look at the processor time of a triple instead: with what several processes cost beside.
"""
import argparse
import multiprocessing
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from machine import heading, ratio

if __name__ in ('__main__', '__mp_main__'):     # before NumPy and torch start their threads
    for variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ[variable] = '1'


def link_slices(root, sides, number, size):
    "Fills root/SIDE with so many links to 8 phantom slices; the sides are 'ct', 'mri' or 'average' of a slice, {folder: side}."
    import numpy as np

    from medfusion.files import to_depth, write_image
    from medfusion.phantom import phantom_slice
    heads = [phantom_slice('1', i, slices=8, size=size) for i in range(8)]
    for folder, side in sides.items():
        (root / folder).mkdir(parents=True)
        images = [(head.ct + head.mri) / 2 if side == 'average' else getattr(head, side) for head in heads]
        for i, image in enumerate(images):
            write_image(root / folder / f'{i:06d}.png', to_depth(image, np.uint8))
        for i in range(8, number):
            (root / folder / f'{i:06d}.png').hardlink_to(root / folder / f'{i % 8:06d}.png')


def peak_mebibytes(process='self'):
    "Peak resident memory of a process alone; getrusage would count the parent it was forked from."
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path(f'/proc/{process}/status').read_text())[1]) / 1024


def fuse_many(root, results):
    "Of a folder: MiB by which the peak of memory rises, seconds and CPU seconds until the first result stands there, pairs a second after it, CPU ms of each."
    from medfusion import inference
    written, real = [], inference.write_atomically

    def noted(*given):
        real(*given)
        written.append((time.perf_counter(), time.process_time()))
        if len(written) == results:
            raise KeyboardInterrupt
    inference.write_atomically = noted
    before, start = peak_mebibytes(), (time.perf_counter(), time.process_time())
    with suppress(KeyboardInterrupt):
        inference.fuse_folder(root / 'CT', root / 'MRI', root / 'out', 'maximum', progress=False)
    first, last = ([moment - begin for moment, begin in zip(one, start)] for one in (written[0], written[-1]))
    after = len(written) - 1
    return peak_mebibytes() - before, *first, after / (last[0] - first[0]), 1000 * (last[1] - first[1]) / after


def alone(task, *given):
    "What a task returns, done by a process of its own."
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(task, *given).result()


def report_fusing(root, numbers, results):
    "Prints a row for each number of pairs."
    print('   pairs   memory rises by   first result, s (CPU)   pairs/s   CPU ms a pair')
    for number in numbers:
        link_slices(root / str(number), {'CT': 'ct', 'MRI': 'mri'}, number, 64)
        rise, first, first_cpu, rate, cost = alone(fuse_many, root / str(number), results)
        print(f'{number:8d} {rise:13.1f} MiB {first:14.2f} ({first_cpu:.2f}) {rate:15.1f} {cost:12.2f}', flush=True)


def evaluate_many(root, jobs):
    "Of a folder: MiB by which the peak of memory rises, MiB of the largest process that measures, seconds until the first row stands in the table, triples a second after it."
    from medfusion import evaluation
    moments, peaks, real = [], [], evaluation.GrowingTable.add

    def noted(*given):
        real(*given)
        moments.append(time.perf_counter())
        if len(moments) % 100 in (0, 1):
            peaks[:] = [peak_mebibytes(process.pid) for process in multiprocessing.active_children()] or [peak_mebibytes()]     # one process is this one
    evaluation.GrowingTable.add = noted
    before, start = peak_mebibytes(), time.perf_counter()
    evaluation.evaluate_folders(root / 'CT', root / 'MRI', root / 'F', path=root / 'table.csv', columns=['SD'], jobs=jobs)
    return peak_mebibytes() - before, max(peaks), moments[0] - start, (len(moments) - 1) / (moments[-1] - moments[0])


def report_evaluating(root, numbers, jobs):
    "Prints a row for each number of triples."
    print(f' triples   memory rises by   each of {jobs} processes   first row, s   triples/s')
    for number in numbers:
        link_slices(root / f'small{number}', {'CT': 'ct', 'MRI': 'mri', 'F': 'average'}, number, 64)
        rise, largest, first, rate = alone(evaluate_many, root / f'small{number}', jobs)
        print(f'{number:8d} {rise:13.1f} MiB {largest:19.1f} MiB {first:14.2f} {rate:11.1f}', flush=True)


def measured(paths):
    "What `measure_three` says of three files, the process that did it, and how long that one has computed so far."
    from medfusion.evaluation import measure_three
    return measure_three(paths), os.getpid(), time.process_time()


def measure_many(root, jobs):
    "(seconds, ms of CPU of all processes together) a triple, without the first of each process, in which it starts."
    from medfusion.evaluation import GrowingTable, in_processes
    from medfusion.metrics import convention, wanted_columns
    triples = [tuple(root / side / name for side in ('CT', 'MRI', 'F')) for name in sorted(os.listdir(root / 'F'))]
    table, clocks, ends, start = GrowingTable(wanted_columns(None), convention(), root / f'table{jobs}.csv'), {}, [], time.process_time()
    for found, process, clock in in_processes(measured, triples, jobs):
        table.add(found)
        clocks.setdefault(process, []).append(clock)
        ends.append(time.perf_counter())
    table.close()
    beside = time.process_time() - start if jobs > 1 else 0
    computed = sum(times[-1] - times[0] for times in clocks.values()) / (len(triples) - len(clocks)) + beside / len(triples)
    return (ends[-1] - ends[jobs]) / (len(ends) - 1 - jobs), 1000 * computed


def report_measuring(root, triples, jobs, rounds=3):
    "Prints rates and costs of one process and of several, in turn, the best of some rounds."
    link_slices(root / 'triples', {'CT': 'ct', 'MRI': 'mri', 'F': 'average'}, triples, 256)
    found = {number: [] for number in (1, jobs)}
    for _ in range(rounds):
        for number, rows in found.items():
            rows.append(measure_many(root / 'triples', number))
    best = {number: [min(column) for column in zip(*rows)] for number, rows in found.items()}
    print('processes   triples/s   CPU ms a triple')
    for number, (wall, computed) in best.items():
        print(f'{number:9d} {1 / wall:11.1f} {computed:17.1f}')
    print(ratio(f'evaluate, {jobs} processes of {jobs} times one', best[1][0] / best[jobs][0] / jobs, percent=True))
    print(ratio(f'evaluate, {jobs} processes of {jobs} times one, by processor time', best[1][1] / best[jobs][1], percent=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, nargs='*', default=[1000, 10_000, 100_000])
    parser.add_argument('--results', type=int, default=1000)
    parser.add_argument('--triples', type=int, nargs='*', default=[1000, 10_000])
    parser.add_argument('--rated', type=int, default=100)
    parser.add_argument('--jobs', type=int, default=2)
    given = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        report_fusing(Path(folder), given.pairs, given.results)
        report_evaluating(Path(folder), given.triples, given.jobs)
        report_measuring(Path(folder), given.rated, given.jobs)


if __name__ == '__main__':
    main()
