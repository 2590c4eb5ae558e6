"""The package as others get it: a wheel that holds everything, and an import that needs no development requirement."""
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=['='])
settings.read(ROOT / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
MODULES = sorted(path.stem for path in (ROOT / 'medfusion').glob('*.py') if not path.stem.startswith('_'))

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked}:
            raise ImportError(name + ' is a development requirement')
sys.meta_path.insert(0, Block())
import importlib
for name in {modules}:
    importlib.import_module('medfusion.' + name)
print('imported')
"""


def test_package_imports_without_development_requirements():
    blocked = {'nbdev', 'execnb', 'fastcore', 'ghapi', 'fastgit', 'jupyterlab', 'skimage', 'torchmetrics', 'pytest', 'playwright'}
    code = BLOCKED.format(blocked=blocked, modules=MODULES)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == 'imported', done.stderr


def test_wheel_holds_every_module_and_the_registry(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation',
                    '--wheel-dir', tmp_path, ROOT], check=True, capture_output=True)
    wheel, = tmp_path.glob('medfusion-*.whl')
    assert settings['version'] in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith('METADATA'))).decode()
        scripts = archive.read(next(name for name in names if name.endswith('entry_points.txt'))).decode()
    assert {f'medfusion/{name}.py' for name in MODULES} | {'medfusion/harvard_registry.json'} <= names
    assert 'Requires-Python: >=3.11' in metadata and 'medfusion = medfusion.cli:app' in scripts.replace('medfusion=', 'medfusion = ')


def test_installed_requirements_are_those_of_the_settings():
    named = {re.split(r'[<>=]', text)[0].lower() for text in requires('medfusion') if 'extra' not in text}
    assert named == {re.split(r'[<>=]', text)[0].lower() for text in settings['requirements'].split()}
    assert version('medfusion') == settings['version']


def test_lock_is_what_is_installed():
    "The environment of `make` holds the versions of the lock."
    differing = []
    for line in (ROOT / 'requirements.lock').read_text().splitlines():
        if not line or line.startswith('#'):
            continue
        name, wanted = line.split(';')[0].strip().split('==')
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if found != wanted:
            differing.append(f'{name}: {found}, locked {wanted}')
    assert not differing
