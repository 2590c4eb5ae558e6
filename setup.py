"""Package metadata, read from settings.ini (nbdev reads the same file)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=settings['author'],
    license='Apache-2.0',
    keywords=settings['keywords'],
    packages=['medfusion'],
    package_data={'medfusion': ['*.json', '*.csv', 'shipped/*/*']},
    python_requires='>=' + settings['min_python'],
    install_requires=settings['requirements'].split(),
    extras_require={extra: settings[f'{extra}_requirements'].split() for extra in ('scans', 'onnx', 'ray', 'docs', 'dev')},
    entry_points={'console_scripts': settings['console_scripts'].split()},
    classifiers=[
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3 :: Only',
    ],
)
