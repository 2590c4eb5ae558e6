"""The site: the notebooks and pages of the clone as they are, and the docstrings. `make docs` builds it; when it is read, nothing is fetched."""
import base64
import hashlib
import html
import inspect
import json
import re
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=['='])
settings.read(ROOT / 'settings.ini', encoding='utf-8')
project, version, copyright = (settings['DEFAULT'][name] for name in ('lib_name', 'version', 'copyright'))

extensions = ['myst_nb', 'sphinx.ext.autodoc']
root_doc = 'docs/index'
include_patterns = ['docs/*.md', 'nbs/*.ipynb', '*.md', 'results/README.md', 'benchmarks/README.md', 'Dataset/README.md']
nb_execution_mode = 'off'               # their outputs are committed
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
html_math_renderer = 'mathml'
html_theme = 'alabaster'
html_theme_options = {'page_width': 'auto', 'body_max_width': '62rem', 'sidebar_width': '15rem', 'fixed_sidebar': True, 'show_powered_by': False}
html_sidebars = {'**': ['searchbox.html', 'globaltoc.html']}
html_show_sourcelink = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
autodoc_inherit_docstrings = False


def modules():
    "The modules of the package, as the notebooks export them."
    return sorted(path.stem for path in (ROOT / 'medfusion').glob('*.py') if not path.stem.startswith('_'))


def reference(app, name, source):
    "The page of the reference names no module: they are those that there are."
    if name == 'docs/api':
        parts = [f'## {module}\n\n```{{eval-rst}}\n.. automodule:: medfusion.{module}\n   :members:\n```\n' for module in modules()]
        source[0] += '\n' + '\n'.join(parts)


def gallery(app, name, source):
    "A line of the gallery becomes the picture of the notebook's cell that holds its code, above its words."
    def figure(line):
        caption, notebook, code = line.groups()
        cells = json.loads((ROOT / notebook).read_text(encoding='utf-8'))['cells']
        shown = [out['data'] for cell in cells if code in ''.join(cell['source']) for out in cell.get('outputs', []) if 'data' in out]
        kind, data = next((kind, data[kind]) for data in shown for kind in ('image/svg+xml', 'image/png') if kind in data)
        picture = ''.join(data).encode() if 'svg' in kind else base64.b64decode(data)
        file = Path(app.outdir, '_images', f'gallery-{hashlib.sha256(picture).hexdigest()[:12]}{".svg" if "svg" in kind else ".png"}')
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
        page = f'../{notebook.removesuffix(".ipynb")}.html'
        return (f'<figure style="margin: 0 0 2rem"><a href="{page}"><img src="../_images/{file.name}" alt="{caption}"></a>'
                f'<figcaption><a href="{page}">{caption}</a>: <code>{html.escape(code)}</code></figcaption></figure>')
    if name == 'docs/gallery':
        source[0] = re.sub(r'^\* \[(.+)\]\(\.\./(nbs/.+\.ipynb)\): `(.+)`$', figure, source[0], flags=re.MULTILINE)


def as_restructured(app, what, name, obj, options, lines):
    "Docstrings are prose with `names`; the signs of reStructuredText are no signs in them."
    text = inspect.cleandoc('\n'.join(lines))
    parts = re.split(r'(`[^`\n]+`)', text)
    plain = [re.sub(r'([*|_\\])', r'\\\1', part) for part in parts]
    ends = [r'\ ' * after[:1].isalnum() for after in (*plain[1:], '')]       # `Pair`s
    lines[:] = ''.join(f'`{parts[i]}`{ends[i]}' if i % 2 else plain[i] for i in range(len(parts))).splitlines()


def math(self, node):
    "A formula as MathML, which browsers draw themselves."
    block, text = node.tagname == 'math_block', node.astext()
    for name, sign in ((r'\langle', '⟨'), (r'\rangle', '⟩')):     # after \big, latex2mathml knows the sign only
        text = re.sub(rf'\{name}(?![a-z])', sign, text)
    formula = convert(text, display='block' if block else 'inline')
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise SkipNode


def setup(app):
    app.connect('source-read', reference)
    app.connect('source-read', gallery)
    app.connect('autodoc-process-docstring', as_restructured)
    app.add_html_math_renderer('mathml', (math, None), (math, None))
