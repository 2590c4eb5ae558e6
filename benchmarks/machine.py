"What the benchmarks say of themselves: where and when they ran, and the ratios for which a record is kept."
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def processor():
    "The name of the processor, as Linux tells it, or of its kind."
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def commit():
    "The commit of the clone, and whether files differ from it; empty where there is no clone."
    said = subprocess.run(['git', '-C', ROOT, 'describe', '--always', '--dirty', '--exclude=*', '--abbrev=7'], capture_output=True, text=True)
    return said.stdout.strip()


def heading(device=''):
    "The line above what a benchmark prints: date, command, commit, device or processor, and torch."
    import torch
    command = ' '.join(['python', os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return f'{datetime.date.today()}: {command}\n{device or f"{processor()}, {os.cpu_count()} cores"}; torch {torch.__version__}; commit {commit()}'


def ratio(name, value, percent=False, remark=''):
    "The line that records a ratio; benchmarks/README.md holds them against what is wanted."
    return f'ratio: {name}: ' + (f'{value:.0%}' if percent else f'{value:.2f} times') + (f' ({remark})' if remark else '')
