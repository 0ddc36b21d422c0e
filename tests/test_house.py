"""Packaging, the Makefile, and the notebook runner that the other checks rest on."""
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_notebooks import close, parts, same, tidy

ROOT = Path(__file__).resolve().parents[1]


def settings():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


def names(requirements): return {re.match(r'[\w-]+', r)[0].lower().replace('_', '-') for r in requirements.split()}


# --- packaging

def test_run_time_needs_no_notebook_tools():
    assert not names(settings()['requirements']) & {'nbdev', 'fastcore', 'execnb', 'ipython', 'pytest', 'faiss-cpu', 'ray'}


def test_every_imported_package_is_a_requirement():
    "What the modules import is what pip installs."
    import ast
    known = {'marisa_trie': 'marisa-trie', 'sklearn': 'scikit-learn', 'pil': 'pillow', 'huggingface_hub': 'huggingface-hub', 'umap': 'umap-learn'}
    have = set.union(*(names(settings()[f'{e}requirements']) for e in ('', 'cpu_', 'scale_')))
    used = set()
    for p in (ROOT/'grnb').rglob('*.py'):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            mods = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
            used |= {m.split('.')[0] for m in mods}
    third = {known.get(m.lower(), m.lower().replace('_', '-')) for m in used - set(sys.stdlib_module_names) - {'grnb'}}
    assert third - have - {'faiss', 'ray', 'vector-quantize-pytorch', 'marisa-trie'} == set()


def test_constraints_pin_every_requirement():
    lines = [l for l in (ROOT/'constraints.txt').read_text().split('\n') if l]
    assert all(re.fullmatch(r'[\w.\-]+==[\w.]+', l) for l in lines), 'exact versions, no build suffix'
    wanted = set.union(*(names(settings()[f'{e}requirements']) for e in ('', 'cpu_', 'dev_')))
    assert wanted - {l.split('==')[0].lower().replace('_', '-') for l in lines} == set()


def test_installed_versions_are_the_pinned_ones():
    "The environment under test is the one the README promises."
    if not (ROOT/'.venv') in Path(sys.executable).parents: pytest.skip('not run in .venv')
    from importlib.metadata import version
    pins = dict(l.split('==') for l in (ROOT/'constraints.txt').read_text().split())
    for name in ('numpy', 'torch', 'transformers', 'faiss-cpu', 'nbdev', 'fastcore', 'execnb'): assert version(name).split('+')[0] == pins[name]


def test_setup_reads_everything_from_settings(tmp_path):
    "The metadata that pip sees: version, extras, the command, the weights."
    for f in ('setup.py', 'settings.ini', 'MANIFEST.in', 'LICENSE', 'constraints.txt'): shutil.copy(ROOT/f, tmp_path)
    shutil.copytree(ROOT/'grnb', tmp_path/'grnb', ignore=shutil.ignore_patterns('__pycache__'))
    pytest.importorskip('setuptools')
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info'], cwd=tmp_path, check=True, capture_output=True)
    info = tmp_path/'grnb.egg-info'
    assert f'Version: {settings()["version"]}' in (info/'PKG-INFO').read_text()
    extras = set(re.findall(r'^Provides-Extra: (\w+)', (info/'PKG-INFO').read_text(), re.M))
    assert extras == {'cpu', 'gpu', 'scale', 'dev'}
    assert 'grnb = grnb.cli:main' in (info/'entry_points.txt').read_text()
    listed = (info/'SOURCES.txt').read_text()
    assert [n for p in (ROOT/'grnb').rglob('*') if p.suffix in ('.py', '.safetensors') and (n := str(p.relative_to(ROOT))) not in listed] == []


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT/'grnb').rglob('*.safetensors')) <= 2_000_000


def test_lack_of_faiss_names_both_extras():
    code = "import sys; sys.modules['faiss'] = None\nfrom grnb.core import import_faiss\nimport_faiss()"
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 1 and 'ImportError' in r.stderr and 'grnb[cpu]' in r.stderr and 'grnb[gpu]' in r.stderr


def test_make_and_ci():
    have = set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), re.M))
    assert {'reproduce', 'reproduce-full', 'test', 'clean'} <= have
    assert 'make test' in (ROOT/'.ci/run').read_text()
    for f in ('.ci/run', 'tests/check.sh'): assert os.access(ROOT/f, os.X_OK) and subprocess.run(['bash', '-n', ROOT/f]).returncode == 0


# --- what the runner calls equal

def stream(text): return [dict(output_type='stream', name='stdout', text=text.splitlines(True))]


@pytest.mark.parametrize('a, b, equal', [
    ('recall 0.812', 'recall 0.813', True),
    ('recall 0.812', 'recall 0.85', False),
    ('recall 0.812', 'mrr 0.812', False),
    ('1,234,567 bytes', '1,234,999 bytes', True),
    ('7 collisions', '8 collisions', False),
    ('[ 1.  2.5]', '[1. 2.5]', True),
    ('1e-07', '2e-07', False),
    ('-0.0', '0.0', True),
    ('done', 'done\n', True),
    ('done', '', False),
])
def test_outputs_compare_by_text_and_three_digits(a, b, equal): assert same(stream(a), stream(b) if b else []) == equal


def test_a_tolerance_widens_numbers_only():
    assert same(stream('0.80 of 50'), stream('0.85 of 54'), .1) and not same(stream('0.80'), stream('0.60'), .1) and not same(stream('a 1'), stream('b 1'), .1)
    assert close('100', '109', .1) and not close('100', '120', .1)


def test_figures_compare_by_presence():
    figure = lambda png: [dict(output_type='display_data', data={'image/png': png, 'text/plain': ['<Figure size 640x480 with 1 Axes>']})]
    assert same(figure('abc'), figure('xyz')) and not same(figure('abc'), []) and len(list(parts(figure('abc')))) == 2


def test_stderr_is_dropped_and_paths_are_refused():
    assert tidy([dict(output_type='stream', name='stderr', text=['50%|#'])], 'x') == []
    with pytest.raises(AssertionError, match='x prints a path of this machine: /tmp/abc'): tidy(stream('saved to /tmp/abc'), 'x')


# --- the runner on small trees

@pytest.fixture
def tree(tmp_path):
    "A tree with one notebook whose cells the test gives"
    (tmp_path/'tests').mkdir(); (tmp_path/'nbs').mkdir(); (tmp_path/'grnb').mkdir()
    shutil.copy(ROOT/'tests/run_notebooks.py', tmp_path/'tests'); shutil.copy(ROOT/'settings.ini', tmp_path)
    def write(name, *sources):
        cells = [dict(cell_type='code', execution_count=None, id=f'c{i}', metadata={}, outputs=[], source=s.splitlines(True)) for i, s in enumerate(sources)]
        meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
        (tmp_path/'nbs'/name).write_text(json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5), indent=1))
        return tmp_path/'nbs'/name
    return write


def runner(path, *args):
    return subprocess.run([sys.executable, str(path.parents[1]/'tests/run_notebooks.py'), *args], cwd=path.parents[1], capture_output=True, text=True)


def test_runner_stores_then_checks(tree):
    "Outputs are stored once and then stable; skipped cells keep theirs; a changed value is stale; the check writes nothing."
    path = tree('00_a.ipynb', 'x = 2\nx', '#| slow\n1/0', 'import sys; print("bar", file=sys.stderr)', 'open("../made", "w").write("!");')
    assert runner(path).returncode == 0
    stored = path.read_text()
    assert [[t for _, _, t in parts(c['outputs'])] for c in json.loads(stored)['cells']] == [['2'], [], [], []]
    assert (path.parents[1]/'made').exists()
    (path.parents[1]/'made').unlink()
    r = runner(path, '--check')
    assert r.returncode == 0 and path.read_text() == stored and 'nbdev_test ran 1 of 1 notebooks' in r.stdout
    assert not (path.parents[1]/'made').exists()
    path.write_text(stored.replace('"2"', '"3"'))
    r = runner(path, '--check')
    assert r.returncode == 3 and 'STALE' in r.stdout and 'cell 0, stored: 3' in r.stderr and 'cell 0, now: 2' in r.stderr


def test_runner_stops_at_a_failing_cell_and_counts(tree):
    a, b = tree('00_a.ipynb', 'assert 1 == 2'), tree('01_b.ipynb', '1')
    before = b.read_text()
    r = runner(a)
    assert r.returncode == 1 and 'FAILED' in r.stdout and 'AssertionError' in r.stderr and b.read_text() == before
    r = runner(a, '--check', '--workers', '2')
    assert r.returncode == 1 and '01_b.ipynb: STALE' in r.stdout


def test_runner_names_a_missing_notebook(tree):
    r = runner(tree('00_a.ipynb', '1'), 'nbs/99_none.ipynb')
    assert r.returncode == 1 and 'no such notebook: nbs/99_none.ipynb' in r.stderr
