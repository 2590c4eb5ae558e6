"""The notebooks in a real browser: every cell runs in JupyterLab, the explorer answers to the keyboard, no cell fails.

Chromium is the system's own, driven by Playwright. Without one the tests are skipped; with MEDFUSION_REQUIRE_BROWSER=1
(which `make browser` sets) they fail instead. Screenshots are written to results/browser/."""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ('resnet_based_fusion.ipynb', 'trainable-wavelet-fusion.ipynb', '40_explorer.ipynb')
CHROMIUM_ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
                 '--disable-component-update', '--disable-sync']
# No news from the network, and every cell in the page (by default JupyterLab holds only the cells near the window).
LAB_SETTINGS = {
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False, 'doNotDisturbMode': True},
    'notebook-extension/tracker': {'windowingMode': 'none'},
}
# Where an exception is shown, and what a widget says in place of itself when it fails; a callback's goes to stderr.
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], .jp-OutputArea-error, .jupyter-widgets-error-widget'
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'
PICTURE = '.medfusion-explorer img'
HANDLE = '.medfusion-slice .noUi-handle'


def missing():
    "Why a browser test cannot run here, or an empty string."
    if not chromium():
        return 'no chromium: install the system package `chromium` (Debian, Ubuntu, Fedora) to run the browser tests'
    for package in ('playwright', 'jupyterlab'):
        if not any((Path(folder) / package).is_dir() for folder in sys.path):
            return f'no {package}: install the development requirements, pip install -e .[dev]'
    return ''


def chromium():
    "The path of the system's chromium or chrome, or None."
    names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope='module')
def browser(server):
    "A headless chromium; the server, which was asked for first, starts meanwhile."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "JupyterLab, starting on loopback over a copy of nbs/ (those of the repository stay as they are): (process, url, token, home)."
    if reason := missing():
        if os.environ.get('MEDFUSION_REQUIRE_BROWSER') == '1':
            pytest.fail(reason)
        print(reason)
        pytest.skip(reason)
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT / 'nbs', home / 'work/nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for part in ('params', 'results/recorded', 'results/published'):      # what the notebooks read
        shutil.copytree(ROOT / part, home / 'work' / part)
    shutil.copy(ROOT / 'settings.ini', home / 'work')
    with jupyterlab(home) as started:
        yield *started, home


@contextmanager
def jupyterlab(home):
    "JupyterLab, starting on loopback over the folder `work` in `home`, where its settings and its log go too: (process, url, token)."
    for name, values in LAB_SETTINGS.items():
        path = home / f'settings/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_DATA_DIR': 'data', 'JUPYTER_RUNTIME_DIR': 'runtime',
               'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces',
               'IPYTHONDIR': 'ipython'}
    env = {**os.environ, **{name: str(home / folder) for name, folder in folders.items()}, 'IN_TEST': '1'}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
               f'--ServerApp.root_dir={home / "work"}', '--LabApp.extension_manager=readonly']
    with open(home / 'server.log', 'w') as log:
        server = subprocess.Popen(command, env=env, cwd=home / 'work', stdout=log, stderr=subprocess.STDOUT)
    try:
        yield server, f'http://127.0.0.1:{port}', token
    finally:
        server.terminate()  # JupyterLab stops its kernels on SIGTERM
        server.wait(timeout=30)


@pytest.fixture(scope='module')
def lab(server, browser):
    "JupyterLab, which answers: (url, token, folder)."
    process, url, token, home = server
    wait_for(process, url, token, home / 'server.log')
    return url, token, home / 'work/nbs'


def wait_for(process, url, token, log):
    "Returns when JupyterLab answers; AssertionError with its log where it does not within 60 s."
    for _ in range(600):
        with suppress(OSError):
            return ask(url, token, 'status')
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f'JupyterLab did not answer within 60 s:\n{log.read_text()}')


def ask(url, token, what, **sent):
    "Asks JupyterLab for something, or, with values, to make it."
    data = json.dumps(sent).encode() if sent else None
    return urlopen(Request(f'{url}/api/{what}', data, {'Authorization': f'token {token}', 'Content-Type': 'application/json'}), timeout=60).read()


def begin_kernel(url, token, name):
    "Starts the kernel that JupyterLab will find when it opens the notebook: it comes up while the page is loaded."
    ask(url, token, 'sessions', path=f'nbs/{name}', name=name, type='notebook', kernel={'name': 'python3'})


def open_notebook(page, url, token, name):
    "Opens a notebook of nbs/ in a workspace of its own, and returns when its kernel is there."
    begin_kernel(url, token, name)
    page.goto(f'{url}/lab/workspaces/{Path(name).stem}/tree/nbs/{name}?token={token}')
    page.wait_for_selector('.jp-NotebookPanel .jp-CodeCell', timeout=60_000)
    page.get_by_text('| Idle').wait_for(timeout=60_000)  # the status bar; before that, JupyterLab asks for a kernel


def run_all(page, seconds):
    "Runs all cells from the menu and waits until none is running or waiting; returns early when a cell fails."
    page.get_by_role('menubar').get_by_text('Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_selector('.jp-CodeCell .jp-InputPrompt:text("[*]:")', timeout=30_000)
    page.wait_for_function("""() => {
        const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim());
        return prompts.every(text => text !== '[*]:');
    }""", timeout=seconds * 1000, polling=250)


def errors(page):
    "The text of every output that reports an error; a warning is none."
    tracebacks = page.locator(STDERR).filter(has_text='Traceback')
    return [text.strip() for text in page.locator(ERRORS).all_inner_texts() + tracebacks.all_inner_texts()]


def press(page, key):
    "Presses a key on the slice slider; returns the seconds until the picture on the page is another one."
    before = page.locator(PICTURE).first.get_attribute('src')
    page.locator(HANDLE).first.focus()
    start = time.perf_counter()
    page.keyboard.press(key)
    page.wait_for_function("""([selector, before]) => {
        const picture = document.querySelector(selector);
        return picture.src !== before && picture.complete && picture.naturalWidth > 0;
    }""", arg=[PICTURE, before], timeout=20_000, polling='raf')
    return time.perf_counter() - start


def changed(page, act, picture=PICTURE):
    "Does something and returns when the picture on the page is another one, and the last: the wheel and the hand may ask for several."
    before = page.locator(picture).first.get_attribute('src')
    act()
    page.wait_for_function("""([selector, before]) => {
        const now = document.querySelector(selector).src, same = now === window.pictureSeen;
        window.pictureSeen = now;
        return same && now !== before;
    }""", arg=[picture, before], timeout=20_000, polling=100)


def slider_row(page, name, widget='.medfusion-explorer'):
    "A slider of the explorer, by its description."
    return page.locator(f'{widget} .widget-hslider').filter(has=page.get_by_text(name, exact=True))


def number(page, name, widget='.medfusion-explorer'):
    "What a slider of the explorer says, by its description."
    row = slider_row(page, name, widget).first
    return float(row.locator('.widget-readout').inner_text())


def photograph(page, path, widget='.medfusion-explorer'):
    "A picture of the explorer, with a margin."
    explorer = page.locator(widget).first
    explorer.scroll_into_view_if_needed()
    box = explorer.bounding_box()
    page.screenshot(path=path, clip={'x': box['x'] - 8, 'y': box['y'] - 4, 'width': box['width'] + 12, 'height': box['height'] + 8})


def use_mouse(page, shots, stem):
    "Zooms with the wheel, drags and points at the picture; the picture fits the window, in its own proportions."
    picture = page.locator(PICTURE).first
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    natural = picture.evaluate('image => image.naturalWidth / image.naturalHeight')
    assert abs(box['width'] / box['height'] / natural - 1) < .02, 'the picture is distorted'
    assert box['height'] <= page.viewport_size['height'], 'the picture is higher than the window'
    x, y = box['x'] + box['width'] * .1, box['y'] + box['height'] * .6
    page.mouse.move(x, y)
    changed(page, lambda: page.mouse.wheel(0, -300))
    zoom, down = number(page, 'zoom'), number(page, 'down')
    assert zoom > 1

    def drag():
        page.mouse.down()
        page.mouse.move(x, y + 25, steps=5)
        page.mouse.up()
    changed(page, drag)
    assert number(page, 'down') < down and number(page, 'zoom') == zoom
    page.mouse.move(x + 5, y)
    page.locator('.medfusion-explorer').get_by_text('row ').first.wait_for(timeout=10_000)
    photograph(page, shots / f'{stem}-mouse.png')


def save_and_show_differences(page, shots, stem):
    "Presses the mode and the button; the file is named in place."
    explorer = page.locator('.medfusion-explorer').first
    for mode in ('difference', 'invented', 'maps'):
        changed(page, lambda mode=mode: explorer.get_by_role('button', name=mode, exact=True).click())
        photograph(page, shots / f'{stem}-{mode}.png')
    explorer.get_by_role('button', name='save this view').click()
    explorer.get_by_text('Saved as').wait_for(timeout=10_000)
    assert 'show_view(explorer' in explorer.get_by_text('Saved as').inner_text()


@pytest.mark.long
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_explorer_in_jupyterlab(lab, browser, name):
    url, token, folder = lab
    if not (folder / name).exists():
        pytest.skip(f'{name} is not written yet')
    shots = ROOT / 'results/browser'
    shots.mkdir(parents=True, exist_ok=True)
    stem = Path(name).stem
    page = browser.new_page(viewport={'width': 1440, 'height': 1100})
    try:
        open_notebook(page, url, token, name)
        run_all(page, seconds=400)
        assert errors(page) == []
        unrun = page.locator('.jp-CodeCell .jp-InputPrompt').filter(has_text='[ ]:').count()
        assert unrun == 0, f'{unrun} cells of {name} did not run'
        page.wait_for_selector(PICTURE, timeout=30_000)
        page.locator('.medfusion-explorer').first.scroll_into_view_if_needed()
        photograph(page, shots / f'{stem}-explorer.png')
        seconds = [press(page, key) for key in ('ArrowRight', 'ArrowLeft')]
        print(f'{name}: key to picture {", ".join(f"{1000 * s:.0f} ms" for s in seconds)}')
        press(page, 'ArrowRight')
        assert errors(page) == []
        photograph(page, shots / f'{stem}-next-slice.png')
        use_mouse(page, shots, stem)
        save_and_show_differences(page, shots, stem)
        assert errors(page) == []
    finally:
        page.screenshot(path=shots / f'{stem}-page.png')
        page.close()


@pytest.mark.long
def test_scan_viewer_in_jupyterlab(lab, browser, tmp_path):
    "What `medfusion view` opens: wheel, click, opacity, nudge, save; nothing is fetched from elsewhere, and no picture is kept."
    pytest.importorskip('SimpleITK')
    from medfusion.phantom_volume import phantom_study
    from medfusion.scan_viewer import viewer_notebook
    from medfusion.studies import fill_study, scan_fusion
    url, token, folder = lab
    drawn = phantom_study(12, ct_spacing=(4., 4., 6.), mri_spacing=(4., 4., 6.), pose=(8., 10.))
    fill_study(tmp_path, scan_fusion(drawn.ct, drawn.mri, 'brain', 'maximum', transform=drawn.truth))
    (folder / 'study.ipynb').write_text(json.dumps(viewer_notebook(tmp_path)))
    shots, viewer = ROOT / 'results/browser', '.medfusion-scan-viewer'
    shots.mkdir(parents=True, exist_ok=True)
    page, asked = browser.new_page(viewport={'width': 1440, 'height': 1100}), []
    page.on('request', lambda request: asked.append(request.url))
    change, slices = lambda act: changed(page, act, f'{viewer} img'), lambda: {name: number(page, name, viewer) for name in ('axial', 'coronal', 'sagittal')}
    try:
        open_notebook(page, url, token, 'study.ipynb')
        run_all(page, seconds=200)
        page.wait_for_selector(f'{viewer} img', timeout=30_000)
        picture, before = page.locator(f'{viewer} img').first, slices()
        picture.scroll_into_view_if_needed()
        box = picture.bounding_box()
        page.mouse.move(box['x'] + box['width'] / 6, box['y'] + box['height'] / 2)
        change(lambda: page.mouse.wheel(0, -100))
        assert slices() == before | {'axial': before['axial'] + 1}
        change(lambda: page.mouse.click(box['x'] + box['width'] / 8, box['y'] + box['height'] / 3))
        assert slices()['coronal'] < before['coronal'] and slices()['sagittal'] < before['sagittal'] and slices()['axial'] == before['axial'] + 1
        photograph(page, shots / 'scan_viewer.png', viewer)
        slider_row(page, 'opacity', viewer).nth(2).locator('.noUi-handle').focus()
        change(lambda: page.keyboard.press('ArrowLeft'))
        page.locator(viewer).get_by_text('checkerboard', exact=True).click()
        page.locator(viewer).get_by_text('move the MRI').click()
        slider_row(page, 'P mm', viewer).locator('.noUi-handle').focus()
        change(lambda: page.keyboard.press('ArrowRight'))
        page.locator(viewer).get_by_text('by hand').wait_for(timeout=10_000)
        page.locator(viewer).get_by_role('button', name='save transform').click()
        page.locator(viewer).get_by_text('Saved as').wait_for(timeout=10_000)
        assert (tmp_path / 'mri_to_ct_nudged.tfm').is_file()
        photograph(page, shots / 'scan_viewer-nudged.png', viewer)
        page.get_by_role('menubar').get_by_text('File', exact=True).click()
        page.get_by_text('Save Notebook', exact=True).click()
        for _ in range(100):
            saved = (folder / 'study.ipynb').read_text()
            if 'widget-view' in saved:
                break
            page.wait_for_timeout(100)
        assert 'widget-view' in saved and 'image/png' not in saved and len(saved) < 5000
        assert errors(page) == [] and [one for one in asked if not one.startswith((url, 'data:', 'blob:'))] == []
    finally:
        page.screenshot(path=shots / 'scan_viewer-page.png')
        page.close()


def test_reason_without_chromium(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert 'install the system package' in missing()
