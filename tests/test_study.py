"""study: the correlation against a plain one, pieces that are kept or made anew, the files of a small run, and the command."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from grnb.core import read_json
from grnb.report import load_results
from grnb.reproduce import Experiment
from grnb.study import grdr_gallery, grdr_tables, grdr_times, pieces as P, tables as T
from grnb.study.pieces import Subject, seed_pieces
from grnb.study.tables import SUBJECTS, spearman, study
from grnb.tokenizer.genius import GENIUS
from grnb.tokenizer.grdr import GRDR
from grnb.tokenizer.kmeans import ResidualKMeans
from grnb.tokenizer.rqvae import RQVAE

TINY = Experiment('events', (('size', 200), ('queries', 200)), pools=(('test',), ('train', 'test')), seeds=(0,))
FEW = {'residual k-means': Subject(ResidualKMeans, dict(K=16, L=2)), 'GENIUS': Subject(GENIUS, dict(K=16, L=2, steps=3), captions=True),
       'GENIUS, no pair term': Subject(GENIUS, dict(K=16, L=2, steps=3, pair=0.), captions=True),
       'GRDR, one ID': Subject(GRDR, dict(V=1, K=16, L=2, steps=3), captions=True), 'GRDR, two IDs of two codes': Subject(GRDR, dict(V=2, K=16, L=2, steps=3), captions=True)}


# --- correlation

def plain_spearman(a, b):
    rank = lambda x: [sum(w < v for w in x) + (sum(w == v for w in x) - 1) / 2 for v in x]
    return np.corrcoef(rank(a), rank(b))[0, 1]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_spearman_is_the_correlation_of_ranks(pairs):
    a, b = zip(*pairs)
    e = spearman(a, b, rounds=50)
    if len(set(a)) == 1 or len(set(b)) == 1: assert e is None
    else: assert np.isclose(e.value, plain_spearman(a, b)) and -1 - 1e-9 <= e.low <= e.high <= 1 + 1e-9 and e.n == len(pairs)


def test_spearman_agrees_with_scipy_and_is_seeded():
    stats = pytest.importorskip('scipy.stats')
    g = np.random.default_rng(0)
    a, b = g.integers(0, 5, 30), g.normal(size=30)
    assert np.isclose(spearman(a, b).value, stats.spearmanr(a, b).statistic)
    assert spearman(a, b) == spearman(a, b) and spearman(a, b, seed=1).low != spearman(a, b).low
    assert spearman(a, 2 * a + 1) == spearman(a, a) and spearman(a, -a).value == -1
    for bad in ([1, 2], [1, 2, np.nan]):
        with pytest.raises(ValueError, match='a, b'): spearman([1, 2, 3], bad)
    assert spearman([1, 2], [3, 4]) is None


# --- a small run

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    d = tmp_path_factory.mktemp('study')
    return d, study('events', d/'results', d/'work', FEW, TINY, pages=(), say=lambda line: None)


def test_files_and_rows(ran):
    d, files = ran
    assert [f.name for f in files] == ['tokenizers_events.json', 'tokenizers_events_tell.json', 'tokenizers_events.times.json', 'ledger.json']
    cells = load_results(d/'results', 'tokenizers_events')['values']
    assert {c['row'] for c in cells} == {'exact dense', *FEW} and len({c['panel'] for c in cells}) == 2
    per = {row: {c['column'] for c in cells if c['row'] == row} for row in FEW}
    assert per['residual k-means'] == per['GENIUS'] == per['GRDR, two IDs of two codes'] and {'collision', 'error, unseen', 'agreement on 1 code', 'two-stage R@10, beam 10', 'alone R@50, decoded'} <= per['GENIUS']
    assert {c['column'] for c in cells if c['row'] == 'exact dense'} == set(T.OUTCOMES)
    assert {c['column'] for c in load_results(d/'results', 'tokenizers_events', times=True)['values']} == {'fit', 'encode'}
    claims = read_json(d/'results'/'ledger.json')['values']
    assert {'GRDR', 'GENIUS', 'grnb'} <= {c['paper'] for c in claims} and all(c['dataset'].startswith('events tokenizers, pool') for c in claims)


def test_correlations_are_those_of_the_table(ran):
    d, _ = ran
    cells, tell = load_results(d/'results', 'tokenizers_events')['values'], load_results(d/'results', 'tokenizers_events_tell')['values']
    pool = cells[-1]['panel']
    get = lambda column, rows: [next(c['value'] for c in cells if (c['row'], c['column'], c['panel']) == (row, column, pool)) for row in rows]
    told = {}
    for c in tell:
        if c['column'] == 'rho' and c['panel'].endswith(pool):
            rows = [row for row in FEW if not row.startswith('GENIUS') or c['row'] not in T._OWN_SPACE]       # a space of its own is not ranked with the others
            told[c['row']] = len(rows)
            assert np.isclose(c['value'], plain_spearman(get(c['row'], rows), get(c['panel'].removesuffix(f', {pool}'), rows)), atol=1e-5), c
    assert told['collision'] > told['error']


def test_a_second_run_makes_nothing_and_writes_the_same(ran, monkeypatch):
    d, files = ran
    before = [f.read_bytes() for f in files]
    monkeypatch.setattr(P, '_piece', None)
    study('events', d/'results', d/'work', FEW, TINY, pages=(), say=lambda line: None)
    assert [f.read_bytes() for f in files] == before


def test_a_changed_setting_makes_a_new_piece(ran):
    d, _ = ran
    v = seed_pieces(TINY, 0, {}, d/'work'/'events', lambda line: None)[1]
    s = FEW['residual k-means']
    marks = [P._mark(x, v) for x in (s, replace(s, settings=dict(K=16, L=3)), replace(s, captions=True), FEW['GENIUS'], None)]
    assert len(set(marks)) == 5 and P._mark(replace(s), v) == marks[0]


def test_pages_are_written_and_drawn(ran, monkeypatch):
    "With a stand-in for UMAP, which takes too long to compile here; a page that is there is not made again"
    import sys, types
    from grnb.ids.diagnose import Diagnosis, Map, draw_diagnosis
    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=lambda **k: types.SimpleNamespace(fit_transform=lambda x: x[:, :2])))
    d, _ = ran
    for again in (False, True):
        if again: monkeypatch.setattr(T, 'diagnose', None)
        files = study('events', d/'results', d/'work', FEW, TINY, pages=tuple(FEW), say=lambda line: None)
        assert {f'events-{P._slug(row)}.json' for row in FEW} <= {f.name for f in files}
    for row in FEW:
        doc = read_json(d/'results'/'pages'/f'events-{P._slug(row)}.json')
        report = Diagnosis(**doc['diagnosis'])
        assert doc['row'] == row and report.items == doc['pool'] and report.agreement and report.error
        assert len(draw_diagnosis(report, Map(**{k: np.array(v) for k, v in doc['map'].items()})).axes) == 6


def test_other_claims_stay_in_the_ledger(ran):
    d, _ = ran
    path = d/'results'/'ledger.json'
    kept = dict(read_json(path)['values'][0], dataset='events, pool 5 (test)')
    path.write_text(json.dumps(dict(values=[kept, *read_json(path)['values']])))
    study('events', d/'results', d/'work', FEW, TINY, pages=(), say=lambda line: None)
    assert kept in read_json(path)['values']


def test_same_seed_same_ranks(ran, tmp_path):
    d, _ = ran
    row = {'GENIUS': FEW['GENIUS']}
    a, b = (seed_pieces(TINY, 0, row, w, lambda line: None)[0]['GENIUS'][0] for w in (d/'work'/'events', tmp_path))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_every_row_has_32_bits():
    for name, s in SUBJECTS.items():
        q = s.quantizer(**s.settings)
        K = s.settings.get('K', getattr(q, 'K', 256))
        bits = np.log2(K).sum() if isinstance(K, tuple) else (s.settings.get('L') or q.L) * np.log2(K)
        assert (bits * getattr(q, 'V', 1) == 32) == s.equal, name


# --- the command, and what is refused

GRDR_RUNS = [(grdr_tables, 'grdr_study', True), (grdr_times, 'task_times', True), (grdr_gallery, 'gallery_page', False), (grdr_times, 'grdr_times', False)]     # module, function, is it of every task

@pytest.mark.parametrize('task', ['events', 'flickr8k'])
@pytest.mark.parametrize('name, runs', [('tokenizers', [(T, 'study', True)]), ('grdr', GRDR_RUNS)])
def test_the_command_runs_the_study(name, runs, task, monkeypatch, tmp_path, capsys):
    "The gallery and the corpora belong to events alone; nothing is written beside the folder that is named"
    import grnb.report
    from grnb.cli import main
    calls, folder = [], tmp_path/'figures'
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    for module, function, _ in runs: monkeypatch.setattr(module, function, lambda *a, _f=function, **k: calls.append((_f, a, k)))
    monkeypatch.setattr(grnb.report, 'redraw', lambda *a: [f'drawn in {a[0]}'])
    assert main(f'reproduce --task {task} --study {name} --figures {folder}'.split()) == 0 and capsys.readouterr().out == f'drawn in {folder}\n'
    assert calls == [(f, (task, folder/'results') if every else (folder/'results',), {}) for _, f, every in runs if every or task == 'events']
    done = len(calls)
    assert main(f'reproduce --full --study {name}'.split()) == 2 and '--full: a study has one size' in capsys.readouterr().err
    assert main('reproduce --study atlantis'.split()) == 2 and len(calls) == done
    assert [*tmp_path.iterdir()] == [tmp_path/'here'] and not [*(tmp_path/'here').iterdir()]


def test_unknown_task():
    with pytest.raises(ValueError, match='task: expected one of events'): study('atlantis')
