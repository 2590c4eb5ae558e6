"""The package as others get it: a wheel that holds everything, an import that needs no development requirement, a lock for many platforms."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import cv2
import numpy as np
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=['='])
settings.read(ROOT / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
MODULES = sorted(path.stem for path in (ROOT / 'medfusion').glob('*.py') if not path.stem.startswith('_'))
LOCKED = [Requirement(line) for line in (ROOT / 'requirements.lock').read_text().splitlines() if not line.startswith('#')]
SLICES = {'cli', 'data', 'inference', 'evaluation', 'training', 'explorer'}   # what works without the extra for volumes
IMPORT_NAMES = {'scikit-image': 'skimage', 'pytest-xdist': 'xdist', 'simpleitk': 'SimpleITK', 'dicom-anonymizer': 'dicomanonymizer'}   # where they differ from the requirement's

BLOCKED = """
import importlib
import sys
from importlib.machinery import PathFinder

find_spec, blocked = PathFinder.find_spec, {blocked} | {extra}
PathFinder.find_spec = lambda name, path=None, target=None: None if name.split('.')[0] in blocked else find_spec(name, path, target)
import medfusion.inference
training = {{'accelerate', 'medfusion.training', 'papermill'}} & set(sys.modules)
assert not training, f'inference imports {{training}}'
volumes = []
for name in {modules}:
    try:
        importlib.import_module('medfusion.' + name)
    except ImportError as error:
        assert 'pip install "medfusion[scans]"' in str(error), error
        volumes.append(name)
from typer.testing import CliRunner
from medfusion.cli import app
said = CliRunner().invoke(app, ['scans', '.']).stderr
assert 'pip install "medfusion[scans]"' in said and 'foreseen' not in said, said
blocked -= {extra}
for name in volumes:
    importlib.import_module('medfusion.' + name)
print(*volumes)
"""


def names(requirements):
    return {Requirement(text).name.lower() for text in requirements.split()}


def test_package_imports_without_development_requirements():
    "And without the extra for volumes, but for the modules that read them: these name it, and so does the command. Inference stands without training."
    blocked, extra = ({IMPORT_NAMES.get(name, name) for kind in kinds for name in names(settings[f'{kind}_requirements'])}
                      for kinds in (('dev', 'onnx', 'ray'), ('scans',)))
    code = BLOCKED.format(blocked=blocked, extra=extra, modules=MODULES)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT.parent)
    found = set(done.stdout.split())
    assert {'scans', 'phantom_volume'} <= found and not found & SLICES, done.stdout + done.stderr


def test_a_missing_library_of_the_system_is_said_in_a_sentence(tmp_path):
    (tmp_path / 'cv2.py').write_text('raise ImportError("libxcb.so.1: cannot open shared object file")')
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import medfusion.inference'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and re.search(r'libxcb.so.1.*pip install opencv-python-headless$', done.stderr.strip())


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel of this tree, built from a copy: setuptools would leave build/ here."
    copy = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / 'medfusion', copy / 'medfusion', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation',
                    '--wheel-dir', copy / 'dist', copy], check=True, capture_output=True)
    found, = (copy / 'dist').glob('medfusion-*.whl')
    return found


def test_wheel_holds_the_whole_package(wheel):
    "Every module, the registry and the recorded tables, and the shipped networks with their descriptions."
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'medfusion').rglob('*') if path.is_file() and '__pycache__' not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        metadata = archive.read(next(name for name in held if name.endswith('METADATA'))).decode()
        scripts = archive.read(next(name for name in held if name.endswith('entry_points.txt'))).decode()
    assert wanted <= held, f'package_data of setup.py leaves out {sorted(wanted - held)}'
    assert sum(name.startswith('medfusion/shipped/') and name.endswith('.pt') for name in held) >= 3
    assert settings['version'] in wheel.name and f'Requires-Python: >={settings["min_python"]}' in metadata
    assert 'medfusion = medfusion.cli:app' in scripts.replace('medfusion=', 'medfusion = ')


FUSE = """
import medfusion, numpy
from medfusion.inference import fuse
assert {target!r} in medfusion.__file__, medfusion.__file__
for name in ('wavelet', 'resnet'):
    fused = fuse('ct.png', 'mri.png', name)
    assert fused.shape == (64, 48) and fused.std() > 0, name
import runpy, sys
sys.argv = 'medfusion fuse ct.png mri.png -m resnet -o resnet.png'.split()
runpy.run_module('medfusion', run_name='__main__')      # as `python -m medfusion` does
"""


def test_an_installed_wheel_fuses_where_there_is_no_clone(wheel, tmp_path):
    "With both shipped networks, from Python and by the command."
    target = tmp_path / 'installed'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-compile', '--target', target, wheel], check=True, capture_output=True)
    for name, image in zip(('ct.png', 'mri.png'), np.random.default_rng(0).integers(0, 256, (2, 64, 48), np.uint8)):
        cv2.imwrite(str(tmp_path / name), image)
    environment = os.environ | {'PYTHONPATH': str(target)}
    for command in (['-c', FUSE.format(target=str(target))], ['-m', 'medfusion', 'fuse', 'ct.png', 'mri.png', '-m', 'wavelet', '-o', 'wavelet.png']):
        done = subprocess.run([sys.executable, '-W', 'ignore', *command], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    assert all(cv2.imread(str(tmp_path / f'{name}.png'), cv2.IMREAD_UNCHANGED).shape == (64, 48) for name in ('wavelet', 'resnet'))


def test_installed_requirements_are_those_of_the_settings():
    named = {Requirement(text).name.lower() for text in requires('medfusion') if 'extra' not in text}
    assert named == names(settings['requirements'])
    assert version('medfusion') == settings['version']


def test_lock_names_versions_and_nothing_else():
    "No address of a registry and no path: the lock works with whatever registry pip is set up for."
    for line in (ROOT / 'requirements.lock').read_text().splitlines():
        assert line.startswith('#') or re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; [a-z_<>=!.'()*0-9 A-Z-]+)?", line), line


def test_lock_fits_the_settings():
    for text in ' '.join(settings[f'{extra}requirements'] for extra in ('', 'scans_', 'onnx_', 'dev_')).split():
        wanted = Requirement(text)
        found = [locked for locked in LOCKED if locked.name == wanted.name.lower()]
        assert found, f'{wanted.name} is not in the lock; run `make lock`'
        assert all(wanted.specifier.contains(next(iter(locked.specifier)).version) for locked in found), f'{text}: run `make lock`'


def test_lock_is_what_is_installed():
    "The environment of `make` holds the versions of the lock that are meant for this machine."
    differing = []
    for locked in LOCKED:
        if locked.marker and not locked.marker.evaluate():
            continue
        found = None
        for name in (locked.name, f'{locked.name}-headless'):   # opencv-python-headless takes its place on a machine without a screen
            try:
                found = found or version(name)
            except PackageNotFoundError:
                pass
        if found != next(iter(locked.specifier)).version:
            differing.append(f'{locked} is locked, {found} is installed')
    assert not differing


@pytest.mark.parametrize('python, platform', [
    *[(python, 'x86_64-unknown-linux-gnu') for python in ('3.11.0', '3.12', '3.13', '3.14')],
    ('3.12', 'aarch64-unknown-linux-gnu'),
    ('3.12', 'aarch64-apple-darwin'),
])
def test_lock_resolves_from_wheels(tmp_path, python, platform):
    "uv finds a wheel for every locked version without installing any."
    uv = shutil.which('uv') or shutil.which('uv', path=str(Path(sys.executable).parent))
    if not uv:
        pytest.skip('uv is not installed (`pip install uv` brings it)')
    done = subprocess.run([uv, 'pip', 'install', '--dry-run', '--no-config', '--target', tmp_path / 'target', '--only-binary', ':all:',
                           '--python-version', python, '--python-platform', platform, '--requirement', ROOT / 'requirements.lock'],
                          capture_output=True, text=True, timeout=300)
    if done.returncode and re.search('error sending request|dns error|Failed to fetch|timed out', done.stderr):
        pytest.skip(f'the registry cannot be reached: {done.stderr.strip().splitlines()[-1]}')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('version', [(3, 10), (3, 15)])
def test_a_python_that_the_lock_does_not_know_is_refused_before_anything_is_installed(tmp_path, version):
    python = tmp_path / 'python3'
    python.write_text(f'#!{sys.executable}\nimport sys\ncode = sys.argv[2]\nsys.version_info = ({version[0]}, {version[1]}, 0)\nexec(code)\n')
    python.chmod(0o755)
    done = subprocess.run([ROOT / '.ci/set-up', python, tmp_path / 'venv'], capture_output=True, text=True)
    assert done.returncode == 1 and 'Python 3.11 to 3.14' in done.stderr and 'make PYTHON=' in done.stderr and not (tmp_path / 'venv').exists()
