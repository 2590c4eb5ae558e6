"""The rule of exported cells, read from the notebooks; `make count` prints it, test_notebooks.py watches it.

A cell that nbdev exports holds imports and nothing else, or one public name: at most 30 lines, a tiny private helper beside it
if need be, and right after it (prose may stand between) a code cell that is not exported and shows what to believe.
"""
import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

LONGEST, MEDIAN, NINTH_DECILE = 30, 15, 25   # lines of an exported cell with a definition
TINY = 10                                    # lines that the private helpers of a cell may have in all
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass
class Cell:
    "One exported cell that is not a cell of imports."
    notebook: str
    number: int       # as in the file, from 0
    names: list       # public names first
    lines: int
    faults: list      # sentences

    def __str__(self):
        return f'{self.notebook}, cell {self.number} ({", ".join(self.names) or "no name"}): {"; ".join(self.faults)}'


def source(cell):
    return ''.join(cell['source'])


def directives(text):
    "The nbdev directives at the head of a cell: {'export', 'hide', ...}."
    return {match[1] for match in re.finditer(r'^#\s*\|\s*(\w+)', text, re.MULTILINE)}


def is_exported(cell):
    return cell['cell_type'] == 'code' and bool(directives(source(cell)) & {'export', 'exports', 'exporti'})


def body(text):
    "A cell without its directives and without empty lines at its ends."
    return re.sub(r'^#\s*\|.*\n?', '', text, flags=re.MULTILINE).strip('\n')


def is_example(cell):
    "A code cell that a reader sees, that is not exported and does something."
    text = source(cell)
    if cell['cell_type'] != 'code' or 'parameters' in cell['metadata'].get('tags', []) or is_exported(cell) or 'hide' in directives(text):
        return False
    return any(line.strip() and not line.lstrip().startswith('#') for line in body(text).splitlines())


def is_import(node):
    "Whether a statement imports; so does a block that silences a warning around an import, or says in a sentence why it fails."
    if isinstance(node, (ast.With, ast.Try)):
        return any(is_import(inner) for inner in node.body) and all(is_import(inner) or isinstance(inner, ast.Expr) for inner in node.body)
    return isinstance(node, (ast.Import, ast.ImportFrom))


def names_of(statements):
    "Names that statements define, with the lines of each."
    for node in statements:
        if isinstance(node, DEFINITIONS):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.end_lineno - node.lineno + 1


def faults_of(statements, lines, following):
    "What one exported cell does against the rule: names (public first) and sentences."
    named = list(names_of(statements))
    public = list(dict.fromkeys(name for name, _ in named if not name.startswith('_')))
    private = {name: count for name, count in named if name.startswith('_')}
    found = []
    if any(is_import(node) for node in statements):
        found.append('imports belong in the cell of imports')
    if len(public) != 1:
        found.append(f'{len(public)} public names, the rule is one')
    if public and sum(private.values()) > TINY:
        found.append(f'private helpers of {sum(private.values())} lines, at most {TINY} may stand beside a public name')
    if lines > LONGEST:
        found.append(f'{lines} lines, at most {LONGEST}')
    if following is None or not is_example(following):
        found.append('no visible example right after it')
    return [*public, *private], found


def exported_cells(path):
    "The exported cells of a notebook that hold more than imports, each with its faults."
    path, cells = Path(path), json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    found = []
    for number, cell in enumerate(cells):
        if not is_exported(cell):
            continue
        text = body(source(cell))
        statements = [node for node in ast.parse(text).body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
        if all(is_import(node) for node in statements):
            continue
        following = next((other for other in cells[number + 1:] if other['cell_type'] != 'markdown'), None)
        lines = len(source(cell).strip().splitlines())   # the directive counts: the cell as a reader sees it
        names, faults = faults_of(statements, lines, following)
        found.append(Cell(path.stem, number, names, lines, faults))
    return found


def unused_imports(path):
    "Names that exported cells of a notebook import and no exported cell uses; the examples' imports belong in a cell of their own."
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    nodes = list(ast.walk(ast.parse('\n'.join(body(source(cell)) for cell in cells if is_exported(cell)))))
    imported = [alias.asname or alias.name.split('.')[0] for node in nodes if is_import(node) and hasattr(node, 'names') for alias in node.names]
    return sorted(set(imported) - {node.id for node in nodes if isinstance(node, ast.Name)})


def ninth_decile(values):
    return quantiles(values, n=10, method='inclusive')[-1] if len(values) > 1 else (values or [0])[0]


def table(cells):
    "The table per notebook: exported cells, median, ninth decile, longest, faults."
    rows = [('notebook', 'cells', 'median', 'decile', 'longest', 'faults')]
    for name in [*dict.fromkeys(cell.notebook for cell in cells), 'all']:
        own = [cell for cell in cells if name in (cell.notebook, 'all')]
        lines = [cell.lines for cell in own] or [0]
        rows.append((name, len(own), f'{median(lines):g}', f'{ninth_decile(lines):g}', max(lines), sum(bool(cell.faults) for cell in own)))
    return '\n'.join(f'{row[0]:<28}' + ''.join(f'{value:>9}' for value in row[1:]) for row in rows)


if __name__ == '__main__':
    nbs = Path(__file__).resolve().parents[1] / 'nbs'
    CELLS = [cell for path in sys.argv[1:] or sorted(nbs.glob('*.ipynb')) for cell in exported_cells(path)]
    for CELL in CELLS:
        if CELL.faults:
            print(CELL)
    print(table(CELLS))
