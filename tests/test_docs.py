"""The site: every page is in it, every reference leads somewhere, and nothing is fetched when it is read."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX = (ROOT / 'docs/index.md').read_text(encoding='utf-8')


def test_every_notebook_and_page_is_in_the_index():
    entries = [line for block in re.findall(r'```\{toctree\}\n(.*?)```', INDEX, re.DOTALL) for line in block.splitlines() if line and line[0] != ':']
    pages = [f'/nbs/{path.stem}' for path in (ROOT / 'nbs').glob('*.ipynb')] + [f'/{path.stem}' for path in ROOT.glob('*.md')]
    pages += [path.stem for path in (ROOT / 'docs').glob('*.md') if path.stem != 'index']
    assert [page for page in pages if sum(fnmatch(page, entry) for entry in entries) != 1] == []
    first = re.findall(r'/nbs/.*', INDEX)[:2]
    assert first == ['/nbs/trainable-wavelet-fusion', '/nbs/resnet_based_fusion']


def notebook_text(path):
    return '\n'.join(''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'])


def references():
    "[(the text of an entry, its surnames, its year, the notebooks that use it)] of docs/references.md."
    lines = re.findall(r'^\* (.+) Used in (.+)\.$', (ROOT / 'docs/references.md').read_text(encoding='utf-8'), re.MULTILINE)
    return [(text.replace('\\', ''), [name.split()[-1] for name in text.split(': *')[0].split(', ')], re.search(r'(\d{4})\.$', text)[1],
             re.findall(r'nbs/(.+?)\.ipynb', used)) for text, used in lines]


def test_every_picture_of_the_gallery_is_drawn_by_the_line_beside_it():
    lines = (ROOT / 'docs/gallery.md').read_text(encoding='utf-8').splitlines()[4:]
    assert len(lines) > 10
    for line in lines:
        notebook, code = re.fullmatch(r'\* \[.+\]\(\.\./(nbs/.+\.ipynb)\): `(.+)`', line).groups()
        cells = json.loads((ROOT / notebook).read_text(encoding='utf-8'))['cells']
        drawn = [cell for cell in cells if code in ''.join(cell['source']) and any(kind.startswith('image/') for out in cell.get('outputs', []) for kind in out.get('data', ()))]
        assert len(drawn) == 1, line


def test_every_source_stands_once_and_where_it_is_said_to_be_used():
    entries = references()
    assert len(entries) > 30 and len({text for text, *_ in entries}) == len(entries)
    for text, surnames, year, notebooks in entries:
        for name in notebooks:
            there = notebook_text(ROOT / f'nbs/{name}.ipynb')
            assert surnames[0] in there and year in there, f'{name} does not name {text}'


def test_what_a_notebook_cites_is_among_the_sources():
    lists, citations = 0, 0
    for path in sorted((ROOT / 'nbs').glob('*.ipynb')):
        own = [(entry, surnames, year) for entry, surnames, year, notebooks in references() if path.stem in notebooks]
        text, _, listed = notebook_text(path).partition('## Sources')
        lines = re.findall(r'^\d+\. (.+)$', listed, re.MULTILINE)
        assert [line for line in lines if re.sub(r' \([^()]+\)\.$', '.', line) not in [entry for entry, *_ in own]] == [], path.stem
        cited = re.findall(r'([A-Z][a-zć]+)(?: et al\.?|,? (?:and|&) (?:[A-Z]\. )*[A-Z][a-zć]+)[^()|;]{0,80}?\b((?:19|20)\d\d)\b', text)
        assert [(name, year) for name, year in cited if not any(name in surnames and year == of for _, surnames, of in own)] == [], path.stem
        lists, citations = lists + bool(lines), citations + len(cited)
    assert lists >= 3 and citations > 15


@pytest.mark.long
def test_the_site_is_built_without_a_complaint_and_fetches_nothing(tmp_path):
    "`make docs`, but for the folder; then Chromium, if there is one, reads pages of it without a network."
    if not all(map(importlib.util.find_spec, ('myst_nb', 'latex2mathml'))):
        pytest.skip('the requirements of the site are not installed; make docs does it')
    built = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', 'docs', '-d', tmp_path / 'doctrees', '.', tmp_path / 'site'],
                           cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / 'site').rglob('*.html'))
    assert len(pages) > 30
    fetched = re.compile(r'<(?:script|img|iframe|link)[^>]+(?:src|href)="(?:https?:)?//[^"]+"')
    assert [(page.name, found) for page in pages for found in fetched.findall(page.read_text(encoding='utf-8'))] == []
    untold = re.compile(r'>(\\[a-zA-Z]+)</m[a-z]+>')     # a command of LaTeX that did not become a sign
    assert [(page.name, found) for page in pages for found in untold.findall(page.read_text(encoding='utf-8'))] == []
    from test_browser import CHROMIUM_ARGS, chromium, missing
    if missing():
        return
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
        page, asked = browser.new_context(offline=True).new_page(), []
        page.on('request', lambda request: asked.append(request.url))
        for name in ('docs/index', 'nbs/05_metrics', 'nbs/trainable-wavelet-fusion', 'docs/api'):
            page.goto((tmp_path / 'site' / f'{name}.html').as_uri())
        browser.close()
    assert [url for url in asked if not url.startswith(('file:', 'data:'))] == []
