"""How much memory and time `read_scan` takes for a series of DICOM files: the peak of the process over the size of the voxels as float32.

    python benchmarks/scan_memory.py
    python benchmarks/scan_memory.py --slices 2000 --side 512 --tilt 10

The series is written to a temporary folder first, by a process of its own; what importing takes is not counted. Target: at most 3 times the voxels.
"""
import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path


def write(folder, slices, side, tilt):
    "Writes a CT series of `slices` slices of side × side pixels, leaning by `tilt` degrees."
    import numpy as np
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    rng, angle = np.random.default_rng(0), np.deg2rad(tilt)
    for index in range(slices):
        one = Dataset()
        one.update({'SOPClassUID': CTImageStorage, 'SOPInstanceUID': generate_uid(), 'Modality': 'CT', 'SeriesInstanceUID': '1.2.3', 'PatientID': '1',
                    'ImagePositionPatient': [0, 0, index], 'ImageOrientationPatient': [1, 0, 0, 0, f'{np.cos(angle):.10f}', f'{np.sin(angle):.10f}'],
                    'PixelSpacing': [.5, .5], 'Rows': side, 'Columns': side, 'SamplesPerPixel': 1, 'PhotometricInterpretation': 'MONOCHROME2',
                    'BitsAllocated': 16, 'BitsStored': 16, 'HighBit': 15, 'PixelRepresentation': 0, 'RescaleSlope': 1, 'RescaleIntercept': -1024})
        one.PixelData = rng.integers(0, 1000, (side, side), np.uint16).tobytes()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.save_as(Path(folder, f'{index:05d}'), enforce_file_format=True)


def measure(folder, sender):
    "Sends the voxels, the memory of the process before and at its peak (bytes), and the seconds that reading took."
    from medfusion.scans import read_scan
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, start = peak(), time.perf_counter()
    scan = read_scan(folder)
    sender.send((scan.image.GetNumberOfPixels(), before, peak(), time.perf_counter() - start))


def row(slices, side, tilt):
    "One line of the table."
    processes = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory() as folder:
        writer = processes.Process(target=write, args=(folder, slices, side, tilt))
        writer.start()
        writer.join()
        receiver, sender = processes.Pipe(duplex=False)
        reader = processes.Process(target=measure, args=(folder, sender))
        reader.start()
        sender.close()              # the reader's is open: where it ends without an answer, recv does not wait for ever
        voxels, before, peak, seconds = receiver.recv()
        reader.join()
    size = 4 * voxels
    return f'{slices:>7} {side:>6} {tilt:>6g} {size / 2 ** 20:>10.0f} {(peak - before) / 2 ** 20:>10.0f} {(peak - before) / size:>8.2f} {seconds:>8.1f}'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--slices', type=int)
    parser.add_argument('--side', type=int, default=512)
    parser.add_argument('--tilt', type=float, default=0)
    options = parser.parse_args()
    series = [(options.slices, options.side, options.tilt)] if options.slices else [(2000, 256, 0), (60, 1024, 0), (60, 1024, 10)]
    print(f'{"slices":>7} {"side":>6} {"tilt":>6} {"voxels/MiB":>10} {"more/MiB":>10} {"times":>8} {"seconds":>8}')
    for one in series:
        print(row(*one), flush=True)
