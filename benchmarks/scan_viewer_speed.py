"""How long the scan viewer takes on a study of full size: from the call to the first picture, and for each change of it.

    python benchmarks/scan_viewer_speed.py [--size 512 512 150] [--changes 12]

The study is a phantom, brought onto a lattice of that size, with noise, and written as `medfusion scan` writes it. A change is timed from
setting a control's value to the end of drawing (slices, colours, PNG), as the kernel does it. `wall` and `cpu` are seconds: of the clock, and of
the processor; where the clock's is far longer, the machine was busy with something else."""
import argparse
import time
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from medfusion.phantom_volume import phantom_study
from medfusion.registration import resampled
from medfusion.scan_viewer import view_scan
from medfusion.scans import sitk
from medfusion.studies import empty_volume, fill_study, frame_of, scan_fusion


def full_size(size):
    "A study of a phantom on a lattice of this size (x, y, z)."
    drawn = phantom_study(12, ct_spacing=(4., 4., 6.), mri_spacing=(4., 4., 6.), pose=(8., 10.))
    study = scan_fusion(drawn.ct, drawn.mri, 'brain', 'maximum', transform=drawn.truth)
    frame = frame_of(study.grid)
    grid = empty_volume(frame | {'size': size, 'spacing': [count * step / new for count, step, new in zip(frame['size'], frame['spacing'], size)]})
    noise, one = np.random.default_rng(0).standard_normal(size[::-1], dtype=np.float32), study.series[0]

    def enlarged(values, sigma=0.):
        image = sitk.GetImageFromArray(values)
        image.CopyInformation(study.grid)
        return sitk.GetArrayFromImage(resampled(image, grid, outside=float(values.min()))) + sigma * noise
    study.ct, one.mri, one.weight = enlarged(study.ct, 8), enlarged(one.mri, 10), enlarged(one.weight)
    one.fused = {name: enlarged(values, .02).clip(0, 1) for name, values in one.fused.items()}
    study.grid, study.ct_weight = grid, np.ones_like(study.ct)
    return study


def changes(viewer, count):
    "The changes to time: (kind, control, value), in the order in which they are made."
    def through(kind):
        for plane, control in viewer.planes.items():
            yield from [(f'{plane} slice, {kind}', control, control.value + step) for step in range(-count // 2, count // 2)]
    yield from through('fused')
    yield 'opacity', viewer.layers['fused'].opacity, .5
    yield from through('three layers')
    yield 'checkerboard', viewer.mode, 'checkerboard'
    yield from through('checkerboard')
    yield 'nudge, the first', viewer.nudge.mm[0], 1.
    yield from [('nudge', viewer.nudge.mm[0], 2. + step / 2) for step in range(count)]
    yield from through('nudged')


def timed(act):
    "The seconds that something takes, of the clock and of the processor."
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return {'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, nargs=3, default=[512, 512, 150])
    parser.add_argument('--changes', type=int, default=12)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        fill_study(folder, full_size(options.size))
        viewers = []
        first = timed(lambda: viewers.append(view_scan(folder)))
        print(f'{options.size[0]}×{options.size[1]}×{options.size[2]}: from call to picture {first["wall"]:.2f} s ({first["cpu"]:.2f} s of the processor)')
        rows = [{'change': kind} | timed(partial(setattr, control, 'value', value)) for kind, control, value in changes(viewers[0], options.changes)]
    kinds = pd.DataFrame(rows).groupby('change', sort=False)
    print(pd.DataFrame({'median': kinds['wall'].median(), 'worst': kinds['wall'].max(), 'cpu': kinds['cpu'].median(), 'times': kinds.size()}).round(3).to_string())


if __name__ == '__main__':
    main()
