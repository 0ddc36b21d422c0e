"""Run notebooks through `nbdev_test` and store their outputs, or check that the stored ones are still true.

`nbdev_test` runs cells but throws their outputs away; `exec_nb`, papermill and nbconvert keep outputs but run the cells it
would skip.  Here `nbdev_test` itself runs each notebook, one process a notebook, with a shell that records what the cells
show.  Hash seed, figure date and threads are fixed and the result is cleaned as `nbdev_clean` cleans it, so that a second
run leaves no diff.

    python tests/run_notebooks.py                       # all numbered notebooks, in order; outputs are stored
    python tests/run_notebooks.py --flags 'slow data'   # with the cells that nbdev_test leaves out
    python tests/run_notebooks.py --check --workers 2   # in a copy of the tree; exit 3 if a stored output is stale

Equal means: the same text, numbers to three digits (processors differ in the last ones), and a figure where there was a
figure.  A cell whose numbers depend more on the processor says so: `#| tolerance 0.1` allows ten per cent.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXED = {'PYTHONHASHSEED': '0', 'SOURCE_DATE_EPOCH': '0', 'MPLBACKEND': 'agg', 'TOKENIZERS_PARALLELISM': 'false',
         'HF_HUB_OFFLINE': '1', 'COLUMNS': '120', **{f'{lib}_NUM_THREADS': '1' for lib in ('OMP', 'MKL', 'OPENBLAS', 'NUMBA')}}
LIMIT = 900                                            # seconds a notebook may take; nbdev 2 has no limit of its own
NUMBER = re.compile(r'[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?')


def record(path, flags):
    "Run `path` with `nbdev_test`; outputs by cell id, or None if a cell failed"
    import nbdev.test as nt
    from execnb.shell import CaptureShell

    class Recorder(CaptureShell):
        "The shell `nbdev_test` uses, which also remembers; plain PNG, since retina doubles the size of every figure"
        ran = {}

        def __init__(self, path): super().__init__(path, mpl_format='png')

        def cell(self, cell, *args, **kwargs):
            if cell.cell_type != 'code': return
            cell.outputs = []                          # else a cell that fell silent keeps its old output
            super().cell(cell, *args, **kwargs)
            self.ran[cell.id] = json.loads(json.dumps(cell.outputs))

    nt.CaptureShell = Recorder
    try: nt.nbdev_test.__wrapped__(path=str(path), flags=flags, n_workers=0, do_print=True)
    except SystemExit: return None
    return Recorder.ran


def tidy(outputs, where):
    "Outputs without stderr (progress bars, warnings); AssertionError on a machine's path"
    kept = [o for o in outputs if o.get('name') != 'stderr']
    for o in outputs:
        text = ''.join(o.get('text', []))
        if o.get('name') == 'stderr' and 'Warning' in text: print(f'{where} warns: {text.strip()[:400]}', file=sys.stderr)
    shown = json.dumps([t for _, _, t in parts(kept)])
    if m := re.search(r'(/tmp/|/home/|/root/|/Users/|' + re.escape(str(ROOT)) + r')\S*', shown):
        raise AssertionError(f'{where} prints a path of this machine: {m[0][:80]}')
    return kept


def parts(outputs):
    "Outputs as (kind, mime type, text); figures as their mime type alone"
    for o in outputs:
        join = lambda x: ''.join(x) if isinstance(x, list) else x
        if 'text' in o: yield o['output_type'], 'text', join(o['text'])
        for mime, data in sorted(o.get('data', {}).items()):
            yield o['output_type'], mime, join(data) if mime.startswith('text/') else ''


def close(a, b, share):
    "Are two printed numbers equal to within `share`, or one unit of the last decimal shown?"
    if a == b: return True                             # also what only looks like a number, as 9E3779 in a hexadecimal one
    x, y = (float(t.replace(',', '')) for t in (a, b))
    decimals = [len(t.split('.')[1]) for t in (a, b) if '.' in t and 'e' not in t.lower()]
    return abs(x - y) <= share * max(abs(x), abs(y)) + (1.01 * 10.0**-min(decimals) if decimals else 0)


def same(old, new, share=.005):
    "Do two lists of outputs say the same?"
    old, new = list(parts(old)), list(parts(new))
    if [p[:2] for p in old] != [p[:2] for p in new]: return False
    for (_, _, a), (_, _, b) in zip(old, new):
        squeeze = lambda t: re.sub(r'(?<=[\[(]) | (?=[\])])', '', re.sub(r'\s+', ' ', NUMBER.sub('#', t))).strip()
        if squeeze(a) != squeeze(b): return False
        if not all(close(x, y, share) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b))): return False
    return True


def run_one(path, flags, check):
    "Run one notebook in this process; exit code 0 if fine, 1 if a cell failed, 3 if `check` found a difference"
    from execnb.nbio import nb2str, write_nb
    from nbdev.clean import clean_nb
    ran = record(path, flags)
    if ran is None: return 1
    nb, rc = json.loads(path.read_text(encoding='utf-8')), 0
    for i, cell in enumerate(nb['cells']):
        if cell['id'] not in ran: continue             # outputs of skipped cells stay as they are
        old, cell['outputs'] = cell['outputs'], tidy(ran[cell['id']], f'{path.name}, cell {i}')
        m = re.search(r'^#\|\s*tolerance\s+([\d.]+)', ''.join(cell['source']), re.M)
        if check and not same(old, cell['outputs'], float(m[1]) if m else .005):
            rc = 3
            for name, outputs in ('stored', old), ('now', cell['outputs']):
                print(f'{path.name}, cell {i}, {name}: ' + ' | '.join(t or mime for _, mime, t in parts(outputs))[:1500], file=sys.stderr)
    clean_nb(nb)
    if not check and nb2str(nb) != path.read_text(encoding='utf-8'): write_nb(nb, path)
    return rc


def copy_tree(to):
    "A copy of the tree to run in, so that a check writes nothing here; the package is a link, and keeps its compiled caches"
    skip = shutil.ignore_patterns('.*', 'grnb', '__pycache__', 'build', 'dist', 'runs', '*.egg-info')
    shutil.copytree(ROOT, to, ignore=skip, dirs_exist_ok=True)
    (Path(to)/'grnb').symlink_to(ROOT/'grnb')
    return Path(to)


def run(path, args, base):
    "Run one notebook of the tree `base` in a process of its own; (exit code, did nbdev_test complete it)"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | FIXED | {'PYTHONPATH': str(base)}
    cmd = [sys.executable, str(base/'tests/run_notebooks.py'), '--child', '--flags', args.flags, *['--check'] * args.check, str(base/'nbs'/path.name)]
    start = time.time()
    try: p = subprocess.run(cmd, cwd=base, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired: rc, out, err = 1, '', f'stopped after {LIMIT} s\n'
    else: rc, out, err = p.returncode, p.stdout, p.stderr
    sys.stderr.write(err if len(err) < 8000 else f'{err[:4000]}\n...\n{err[-4000:]}')
    word = {0: 'ok', 3: 'STALE'}.get(rc, 'FAILED')
    print(f'{path.name}: {word} ({time.time() - start:.1f} s)', flush=True)
    return rc, '- Completed' in out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('paths', nargs='*', type=Path, help='notebooks; all numbered ones if none is named')
    ap.add_argument('--flags', default='', help="run cells with these flags too, e.g. 'slow data'")
    ap.add_argument('--check', action='store_true', help='write nothing; fail if a stored output would change')
    ap.add_argument('--workers', type=int, default=1, help='notebooks at a time, with --check')
    ap.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.child: sys.exit(run_one(args.paths[0], args.flags, args.check))

    paths = args.paths or sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
    if missing := [str(p) for p in paths if not p.exists()]: sys.exit(f'no such notebook: {", ".join(missing)}')
    results = []
    if args.check:
        with tempfile.TemporaryDirectory() as d, ThreadPoolExecutor(args.workers) as pool:
            base = copy_tree(d)
            results = list(pool.map(lambda p: run(p, args, base), paths))
    else:
        for path in paths:
            results.append(run(path, args, ROOT))
            if results[-1][0]: break                   # later notebooks read what this one should have written
    completed = sum(done for _, done in results)
    print(f'nbdev_test ran {completed} of {len(paths)} notebooks')
    codes = {rc for rc, _ in results}
    sys.exit(1 if codes - {0, 3} or completed < len(paths) else max(codes))


if __name__ == '__main__': main()
