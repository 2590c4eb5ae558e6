"""What `medfusion scan` takes for a CT of 512×512×150 and an MRI of 256×256×120: wall time, CPU time and the peak of memory of its processes together.

    python benchmarks/scan_speed.py             the whole command; targets: at most 120 s, 3 GB
    python benchmarks/scan_speed.py --stages    its stages, one after the other in one process; target of registering: at most 30 s

The phantom is drawn with coarse voxels and interpolated: how long it takes does not depend on how sharp it is. Memory is the sum of the processes' proportional
sets: what they share is counted once. On a machine that does other work, CPU time is what to compare, with OMP_NUM_THREADS=1, for two threads wait for each other.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil


def drawn(folder):
    "Writes the study into a folder: ct/ and mri/ in DICOM, and truth.tfm."
    from medfusion.phantom_volume import phantom_study, write_study
    from medfusion.scans import sitk
    coarse = phantom_study(7, (2.5, 2.5, 3.), (2.5, 2.5, 3.), pose=(15., 20.))

    def finer(image, size, noise):
        extent = np.multiply(image.GetSize(), image.GetSpacing())
        step = extent / size
        corner = np.array(image.TransformContinuousIndexToPhysicalPoint([-.5] * 3))
        direction = np.reshape(image.GetDirection(), (3, 3))
        fine = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, (corner + direction @ (step / 2)).tolist(), step.tolist(), image.GetDirection(), 0., sitk.sitkFloat32)
        values = sitk.GetArrayFromImage(fine)
        noisy = sitk.GetImageFromArray(values + noise * np.random.default_rng(0).standard_normal(values.shape, dtype=np.float32))
        noisy.CopyInformation(fine)
        return noisy
    write_study(replace(coarse, ct=finer(coarse.ct, (512, 512, 150), 6), mri=finer(coarse.mri, (256, 256, 120), 15)), folder)


def whole_command(folder, scratch):
    "Runs the command on the scans of a folder and prints what it took; the study goes to a folder that is empty."
    words = [sys.executable, '-m', 'medfusion', 'scan', folder / 'ct', folder / 'mri', '-o', scratch / 'study', '--truth', folder / 'truth.tfm', '--dicom']
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            top = psutil.Process(process.pid)
            peak = max(peak, sum(one.memory_full_info().pss for one in (top, *top.children(recursive=True))))
        except psutil.NoSuchProcess:      # one that has just ended
            pass
        time.sleep(.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(process.stdout.read())
    if process.returncode:
        raise SystemExit(process.returncode)
    told = json.loads((scratch / 'study/run.json').read_text())['mri']['']
    print(f'whole command: {time.perf_counter() - began:.0f} s wall, {used.ru_utime + used.ru_stime:.0f} s CPU, {peak / 1e9:.2f} GB at its peak; '
          f'registered in {told["seconds"]:.0f} s wall')


@contextmanager
def timed(name):
    "Prints what the block took."
    began, wall = time.process_time(), time.perf_counter()
    yield
    print(f'{name:<12} {time.process_time() - began:>6.1f} s CPU {time.perf_counter() - wall:>6.1f} s wall, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB', flush=True)


def stages(folder, scratch):
    "Runs the stages on the scans of a folder and prints what each took; what they write goes to a folder that is empty."
    from medfusion import studies
    with timed('read'):
        ct, mri = (studies.read_scan(folder / name) for name in ('ct', 'mri'))
    with timed('register'):
        found = studies.brought_together(ct, mri)
    with timed('grid, fuse'):                  # with the tables
        study = studies.scan_fusion(ct, mri, transform=found.transform)
    one = study.series[0]
    with timed('fuse alone'):
        studies.fuse_volume(studies.windows()['brain'].of(study.ct), one.grey, study.grid)
    with timed('pictures'):
        for picture in (studies.checkerboards, studies.bone_contours, studies.fused_planes):
            picture(study)
    (scratch / 'again').mkdir()
    with timed('write'):
        studies.fill_study(scratch / 'again', study)
    with timed('write DICOM'):
        studies.write_dicom(scratch / 'again', study, ct.reference)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stages', action='store_true')
    parser.add_argument('--scans', type=Path, help='a folder for the phantom, which stays there for the next time')
    options = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '2')
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.scans or Path(scratch)
        if not (folder / 'brain.json').is_file():
            subprocess.run([sys.executable, '-c', 'import sys; sys.path.insert(0, sys.argv[1]); import scan_speed; scan_speed.drawn(sys.argv[2])',
                            Path(__file__).parent, folder], check=True)      # by a process of its own, whose memory does not count
        (stages if options.stages else whole_command)(folder, Path(scratch))
