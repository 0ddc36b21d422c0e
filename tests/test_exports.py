"""The package is what the notebooks say it is, and the notebooks are what they should be."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

NAME = 'grnb'
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
STAGES = ('core data metrics train features tokenizer ids trie generator decode rerank recipes pool retriever report bench reproduce study cli').split()


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def directives(cell): return re.findall(r'^#\s*\|\s*(\w+)', source(cell), re.M)
def exported(path): return [c for c in cells(path) if c['cell_type'] == 'code' and {'export', 'exporti', 'exports'} & set(directives(c))]


def default_exp(path):
    "Module a notebook exports to, or None; a package's own module goes by the package's name"
    return next((m[1].removesuffix('.__init__') for c in cells(path) if (m := re.match(r'#\|\s*default_exp\s+(\S+)', source(c)))), None)


MODULES = {e: p for p in NOTEBOOKS if (e := default_exp(p))}
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize('module', MODULES)


def test_every_module_comes_from_one_notebook():
    "A renamed `default_exp` leaves its old module behind, and no nbdev command says so."
    have = ['.'.join(p.relative_to(ROOT/NAME).with_suffix('').parts) for p in (ROOT/NAME).rglob('*.py') if not p.stem.startswith('_')]
    have += ['.'.join(p.parent.relative_to(ROOT/NAME).parts) for p in (ROOT/NAME).glob('*/**/__init__.py') if p.read_text()]
    assert sorted(default_exp(p) for p in NOTEBOOKS if default_exp(p)) == sorted(have)


def test_every_folder_of_modules_is_a_package():
    "Else setuptools leaves it out of the wheel."
    folders = {p.parent for p in (ROOT/NAME).rglob('*.py')}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f/'__init__.py').exists()] == []


def test_version_is_that_of_settings():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini')
    assert import_module(NAME).__version__ == cfg['DEFAULT']['version']


@each_module
def test_all_names_exist(module):
    mod = import_module(f'{NAME}.{module}')
    assert [n for n in mod.__all__ if not hasattr(mod, n)] == []


@each_notebook
def test_notebook_opens_with_a_title(path):
    nb = cells(path)
    first = source(nb[0])
    assert nb[0]['cell_type'] == 'markdown' and re.match(r'# \S.*\n\n> \S', first), 'the first cell is `# title`, a blank line, `> one sentence`'
    assert len([c['id'] for c in nb]) == len({c['id'] for c in nb})


@each_notebook
def test_exported_cells_are_short(path):
    long = {source(c).split('\n', 2)[1][:60]: n for c in exported(path) if (n := len(source(c).strip().split('\n'))) > 40}
    assert long == {}


@each_notebook
def test_directives_stand_at_the_top(path):
    "nbdev ignores a directive that follows code."
    for c in cells(path):
        if c['cell_type'] != 'code': continue
        body = re.sub(r'\A(\s*(#\s*\|.*)?\n)*(\s*#\s*\|.*\Z)?', '', source(c))
        assert not re.search(r'^#\s*\|\s*(export|hide|slow|data|gpu|eval|tolerance)', body, re.M), source(c)[:200]


@each_notebook
def test_stored_outputs_are_there_and_show_no_machine(path):
    "Each notebook that shows values has them stored; none holds an error, a warning, a path or an address."
    outputs = [o for c in cells(path) if c['cell_type'] == 'code' for o in c['outputs']]
    assert all(o['output_type'] != 'error' and o.get('name') != 'stderr' for o in outputs)
    text = '\n'.join(''.join(t) for o in outputs for t in [o.get('text', ''), *(v for k, v in o.get('data', {}).items() if k.startswith('text'))])
    assert not (m := re.search(r'(/tmp/|/home/|/root/|/Users/|site-packages| at 0x[0-9a-f]+|Warning:)\S*', text)), m
    assert all(c['execution_count'] is None for c in cells(path) if c['cell_type'] == 'code')


@each_module
def test_exported_code_is_plain_python(module):
    "No magic, no nbdev or fastcore at run time, no pickle."
    for cell in exported(MODULES[module]):
        tree = ast.parse(source(cell))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {n.split('.')[0] for n in names if n} & {'nbdev', 'fastcore', 'execnb', 'pickle', 'cloudpickle', 'joblib'}


@each_module
def test_public_functions_and_classes_have_a_docstring(module):
    bare = [n.name for c in exported(MODULES[module]) for n in ast.parse(source(c)).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_') and not ast.get_docstring(n)]
    assert bare == []


# --- import direction

def ours(module):
    "Modules of the package that `module` imports, at the top or inside functions"
    path, within = ROOT/NAME/Path(*module.split('.')).with_suffix('.py'), module.split('.')
    if not path.exists(): path, within = path.with_suffix('')/'__init__.py', [*within, '__init__']
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            base = within[:-node.level] if node.level else []
            full = '.'.join(base + (node.module or '').split('.')).strip('.')
            if not node.level:
                if full.split('.')[0] != NAME: continue
                full = full.partition('.')[2]
            yield from ([f'{full}.{a.name}'.strip('.') if f'{full}.{a.name}'.strip('.') in MODULES else full for a in node.names])
        if isinstance(node, ast.Import): yield from (a.name.partition('.')[2] for a in node.names if a.name.split('.')[0] == NAME)


def place(module): return STAGES.index(module.split('.')[0]), MODULES[module].name


@each_module
def test_imports_point_upwards(module):
    "Only stages above; within a stage, only notebooks before."
    assert module.split('.')[0] in STAGES
    wrong = [m for m in ours(module) if m in MODULES and place(m) >= place(module)]
    assert wrong == [], f'{module} imports {wrong}'


def test_the_import_test_sees_imports():
    "Guards the test above against seeing nothing."
    assert {'core', 'data.task'} <= set(ours('metrics'))
    assert {'core', 'bench'} <= set(ours('bench.latency')) and 'core' in ours('bench')


# --- light imports

def loaded_by(statement):
    "Heavy packages that `statement` loads in a fresh interpreter"
    heavy = 'torch faiss numba transformers umap matplotlib sklearn scipy pandas accelerate'.split()
    code = f'{statement}\nimport sys; print(*[m for m in {heavy!r} if m in sys.modules])'
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize('module', ['grnb', *(f'grnb.{m}' for m in ('core', 'metrics', *(m for m in MODULES if m.startswith('data.'))))])
def test_these_import_light(module): assert loaded_by(f'import {module}') == []


def test_face_is_complete():
    import grnb
    for name in grnb.__all__: assert getattr(grnb, name).__name__ == name
    assert set(grnb.__all__) <= set(dir(grnb))
    with pytest.raises(AttributeError, match='no attribute'): grnb.nonsense


# --- drift

@pytest.mark.skipif(not shutil.which('nbdev_export', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'), reason='needs the dev extras')
def test_export_and_clean_leave_no_diff(tmp_path):
    "Export and clean a copy of the tree; the copy must equal the original, byte for byte, with no file more or less."
    shutil.copy(ROOT/'settings.ini', tmp_path)
    for sub in ('nbs', NAME): shutil.copytree(ROOT/sub, tmp_path/sub, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONDONTWRITEBYTECODE': '1', 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    for cmd in ('nbdev_export', 'nbdev_clean'): subprocess.run([cmd], cwd=tmp_path, check=True, env=env, capture_output=True)
    for sub in ('nbs', NAME):
        old, new = ({p.relative_to(base): p.read_bytes() for p in (base/sub).rglob('*') if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts}
                    for base in (ROOT, tmp_path))
        assert sorted(map(str, old)) == sorted(map(str, new))
        assert [str(n) for n in old if old[n] != new[n]] == []
