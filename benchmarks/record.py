"""The record of what a CPU makes of the networks: runs the benchmarks below and writes what they print to cpu_speed.txt.

    python benchmarks/record.py     about ten minutes, on a machine that does nothing else

Commit first: the record names the commit. The tables of README.md are then written from it, and results/recorded/lite_widths.csv has new times.
"""
import os
import subprocess
import sys
from pathlib import Path

from machine import ROOT, commit

RECORD = Path(__file__).with_name('cpu_speed.txt')
# README.md says what the commits changed. What writes a recorded result comes last: from then on the clone differs from the commit.
BENCHMARKS = ['networks_speed.py --compile --against b611665 9c7c484 f53cabb^ f53cabb 34074a3 2cbee10 fe2d96d 67e7146',
              'step_speed.py --against b611665', 'gpu_speed.py --device cpu --batches 1', 'gpu_speed.py --device cpu --batches 1 --model resnet', 'fuse_speed.py --rounds 5', 'fuse_speed.py --png',
              'many_files.py --pairs 1000 10000 --results 10000 --triples 1000 10000', 'processes_speed.py --method wavelet', 'processes_speed.py --method resnet',
              'lite_widths.py']


def printed(benchmark):
    "What a benchmark prints, which is shown meanwhile. CalledProcessError where it fails."
    command = [sys.executable, *benchmark.split()]
    lines = []
    with subprocess.Popen(command, cwd=RECORD.parent, env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end='', flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return ''.join(lines)


if __name__ == '__main__':
    if commit().endswith('-dirty'):
        raise SystemExit('Commit first: the record names the commit.')
    RECORD.write_text('\n'.join([printed(benchmark) for benchmark in BENCHMARKS]), encoding='utf-8')
    subprocess.run([sys.executable, ROOT / '.ci/tables.py'], env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
