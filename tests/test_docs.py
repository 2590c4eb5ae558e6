"""The site: every page is in it, every reference leads somewhere, and nothing is fetched when it is read."""
import importlib.util
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
