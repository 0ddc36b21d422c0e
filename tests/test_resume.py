"""`grnb fit` killed with SIGKILL, run again until it ends: the same bytes as a run that nobody disturbed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from grnb import load_task

ROOT = Path(__file__).resolve().parents[1]

# One process imports and compiles everything, and forks a child for every `grnb fit`, so that a kill costs a moment and not half a minute.
DRIVER = '''
import functools, json, os, random, signal, sys, time
sys.path.insert(0, {root!r})
import grnb.core, grnb.cli
from grnb.features.text import TextEncoder
from grnb.cli import main

TextEncoder.fit = functools.partialmethod(TextEncoder.fit, steps=4)                 # enough to have something to resume

def words(out, **settings):
    return ["fit", "--items", "items.npy", "--queries", "texts.txt" if "text" in out else "queries.npy", "--positives", "positives.npy", "--recipe", "genius", "--device", "cpu", "--seed", "3", "--dev", "0.2", "--out", out,
            *[w for k, v in settings.items() for w in ("--set", f"{{k}}={{v}}")]]

SMALL = dict(K=8, L=3, d_model=16, n_layers=1, n_prefix=2, batch=32, steps={steps}, towers='true', dim=16, tower_epochs=1)

def die_after(n, *calls):
    "Kill this process right after (n even) or right before (n odd) its n-th call of these: whatever lies on disk then is all that is left"
    count, before = [0], n % 2
    def wrap(f):
        def call(*a, **k):
            count[0] += 1
            if before and count[0] == n: os.kill(os.getpid(), signal.SIGKILL)
            f(*a, **k)
            if not before and count[0] == n: os.kill(os.getpid(), signal.SIGKILL)
        return call
    for name in calls: setattr(os, name, wrap(getattr(os, name)))

def die_in_removal(n):
    "The same, counted over the files and folders that the removal of the checkpoint takes away"
    drop = grnb.cli._drop
    def dying(path):
        die_after(n, "unlink", "rmdir")
        drop(path)
    grnb.cli._drop = dying

def fit(out, renames=None, removals=None, seconds=None):
    "One `grnb fit` in a child; its exit code, negative where it was killed"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            if renames: die_after(renames, "replace", "rename")
            if removals: die_in_removal(removals)
            code = main(words(out, **SMALL))
        finally: os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert main(words("warm", **{{**SMALL, "steps": 0, "towers": "false"}})) == 0      # compiles; trains nothing, so that forking is safe
start = time.time()
codes = dict(whole=[fit("whole")], renames=[], removals=[], times=[])
took = time.time() - start
codes |= dict(text_whole=[fit("text_whole")], text_renames=[])
for out in ("renames", "text_renames"):
    n = 1                                                                          # before the very first: only a temporary file is there
    while not codes[out] or codes[out][-1] != 0 and n < 60:                        # each attempt may go a little further than the one before
        codes[out].append(fit(out, renames=n))
        n += 1
for n in (*range(1, 40, 3), None):                                                 # ever deeper into the removal, and then to its end
    codes["removals"].append(fit("removals", removals=n))
    if codes["removals"][-1] == 0: break
g = random.Random({seed})
for _ in range(4): codes["times"].append(fit("times", seconds=took * g.uniform(.05, .5)))
codes["times"].append(fit("times"))
for out in codes: assert main(["index", "--model", out, "--items", "items.npy", "--device", "cpu"]) == 0
print(json.dumps(codes))
'''


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_killed_and_run_again_ends_with_the_same_bytes(tmp_path):
    task = load_task('events', 60, source='latent', views=1)
    for name in ('items', 'queries', 'positives'): np.save(tmp_path/f'{name}.npy', getattr(task, name))
    (tmp_path/'texts.txt').write_text('\n'.join(task.texts), encoding='utf-8')
    driver = DRIVER.format(root=str(ROOT), seed=0, towers='true', steps=120)
    env = {**os.environ, **{f'{lib}_NUM_THREADS': '1' for lib in ('OMP', 'MKL', 'OPENBLAS', 'NUMBA')}}
    r = subprocess.run([sys.executable, '-c', driver], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    codes = json.loads(r.stdout.splitlines()[-1])
    killed = {k: sum(c == -9 for c in v) for k, v in codes.items()}
    assert all(v[-1] == 0 for v in codes.values()) and killed['renames'] >= 5 and killed['text_renames'] >= 3 and killed['removals'] >= 3 and killed['times'] >= 1, codes
    assert codes['renames'][0] == -9
    for name, of in dict(renames='whole', removals='whole', times='whole', text_renames='text_whole').items():
        want, got = files(tmp_path/of), files(tmp_path/name)
        assert set(want) == {'recipe.json', 'retriever.json', *(f'{part}.safetensors' for part in ('encoder', 'generator', 'pool', 'quantizer'))}
        assert got.keys() == want.keys() and [f for f in want if got[f] != want[f]] == []                    # weights, codebooks, IDs of the pool
        assert not (tmp_path/f'{name}.checkpoint').exists()
