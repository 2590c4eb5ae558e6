"""Are derived series as DICOM wants them? `make dicom-check`: dciodvfy (Debian's dicom3tools) finds no error in them, and SimpleITK and highdicom read them in their place."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def placed_apart(grid, folder, files):
    "Where a reader puts the series elsewhere than its grid: sentences."
    import highdicom
    import pydicom

    from medfusion.scans import sitk
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    volume = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in files])
    if np.array(volume.direction)[:, 0] @ np.reshape(grid.GetDirection(), (3, 3))[:, 2] < 0:      # highdicom counts slices from the other end
        volume = volume[::-1]
    wanted = {'origin': grid.GetOrigin(), 'spacing': grid.GetSpacing(), 'direction': grid.GetDirection()}
    axes = np.array(volume.direction)[:, ::-1]           # its axes are those of the array: slices, rows, columns
    found = {'SimpleITK': {'origin': image.GetOrigin(), 'spacing': image.GetSpacing(), 'direction': image.GetDirection()},
             'highdicom': {'origin': volume.position, 'spacing': volume.spacing[::-1], 'direction': axes.ravel()}}
    return [f'{name} reads the {what} as {tuple(np.round(there[what], 4))}' for name, there in found.items() for what in wanted
            if not np.allclose(there[what], wanted[what], atol=1e-3)]


def check():
    "Writes a series of a phantom with its patient and one without, and checks both; exit status 1 where something is wrong."
    from medfusion.phantom_volume import phantom_study, write_study
    from medfusion.scans import read_scan
    from medfusion.studies import write_derived
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        ct = read_scan(write_study(phantom_study(3, (4., 4., 6.), (4., 4., 6.)), Path(scratch, 'phantom')) / 'ct')
        values = np.random.default_rng(0).random(ct.image.GetSize()[::-1], dtype=np.float32)
        for anonymous in (False, True):
            folder = Path(scratch, f'derived{anonymous}')
            files = write_derived(folder, values, ct.image, ct.reference, 'CT and MRI fused by medfusion', 'fused brain', anonymous)
            for path in files[::10]:
                told = subprocess.run(['dciodvfy', '-new', path], capture_output=True, text=True).stderr
                wrong += [line for line in told.splitlines() if line.startswith('Error')]
            wrong += placed_apart(ct.image, folder, files)
            print(f'{len(files)} files {"without" if anonymous else "with"} their patient were written and read')
    print(*sorted(set(wrong)) or ['no error'], sep='\n')
    return 1 if wrong else 0


if __name__ == '__main__':
    if not shutil.which('dciodvfy'):
        sys.exit('dciodvfy is missing; on Debian: apt-get install dicom3tools')
    sys.exit(check())
