"""The GRDR study: what is refused, the files of a small run, resuming, ranks worked out anew, statistics by hand, verdicts, times and storage, figures, reported numbers."""
import shutil
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import grnb.recipes.cotrain as cotrain
from grnb.core import read_json, unit
from grnb.data.events import make_scenes, make_splits
from grnb.data.reported import reported
from grnb.ids.make import make_ids
from grnb.metrics import ranks
from grnb.recipes.cotrain import CoTraining, codes_now
from grnb.recipes.shared import SharedGenerator, start_from_geometry
from grnb.report import VERDICTS, cell, load_results, markdown, redraw
from grnb.reproduce import Experiment
from grnb.study import grdr as G, grdr_figures as F, grdr_tables as T, grdr_times as X
from grnb.study.grdr import GEOMETRY, PUBLISHED, STUDIES, TRAPS, WAYS, Light, Study, Vectors, Way, health, main_beam, merged, seed_ways, view_places
from grnb.study.grdr_gallery import SHOWN, draw_gallery, gallery_page
from grnb.study.grdr_tables import grdr_study, reported_cells, view_use
from grnb.study.pieces import _slug
from grnb.trie.layout import Trie

# 300 IDs a beam are more than the 16 × 16 there can be: the search sees all
TINY = Study(Experiment('events', (('size', 200), ('queries', 200)), seeds=(0, 1)), each=4, main=T.MAIN, dim=32, beams=(10, 300), few=(10, 300), depth=100, candidates=(10, 100), xpool=.1)
SHORT = replace(PUBLISHED, K=16, L=2, training=CoTraining(steps=(3, 2, 3, 2), batch=32))
OURS = replace(GEOMETRY, K=16, L=2, training=replace(GEOMETRY.training, steps=(2, 1, 2, 1), batch=32))
FEW = {'GRDR, ours': OURS, 'GRDR, published': SHORT, 'published, V=1': replace(SHORT, V=1), 'published, tokenizer first': G._with(SHORT, cotrain=False, steps=(*SHORT.training.steps[:3], G._updates(SHORT))),
       'ours, trained to the end': replace(OURS, choose=False), 'an ID a view, not trained': Way(0, 16, 2, 'views'), 'one ID of the mean, not trained': Way(1, 16, 2, 'mean', once=True)}


def quiet(line): pass


def same(a, b): return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- ways and studies

def test_what_is_no_way_or_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match='init: expected published, geometry, views or mean, got .luck'): Way(init='luck')
    with pytest.raises(ValueError, match='task: expected one of events, flickr8k, got .atlantis'): grdr_study('atlantis', tmp_path, tmp_path)
    for bad in (dict(candidates=(10, 50)), dict(beams=(10, 20), few=(50,))):
        with pytest.raises(ValueError, match='study: expected 100 among candidates, and a beam'): replace(TINY, **bad)
    with pytest.raises(ValueError, match='study: expected a depth of at least 101, the most candidates, got 100'): replace(TINY, candidates=(100, 101))
    with pytest.raises(ValueError, match='task: expected one of events, flickr8k, got .atlantis'): X.task_times('atlantis', tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_compared_at_a_beam_that_all_have():
    assert [main_beam(s) for s in STUDIES.values()] == [400, 400] and main_beam(TINY) == 300
    assert main_beam(replace(TINY, beams=(10, 50, 390), few=(10, 50, 401))) == 50


def test_every_row_has_a_file_of_its_own_and_claims_stand_on_three_seeds():
    assert len({_slug(row) for row in WAYS} | {'exact'}) == len(WAYS) + 1
    for row, way in WAYS.items(): assert row in T.MAIN or replace(way, once=False) != WAYS[T._base(row)]
    told = {row for _, *pair, _ in T._SEVERAL for row in pair} | {'published, tokenizer first', *T.MAIN, *(row for s in STUDIES.values() for row in s.light)}
    assert told <= WAYS.keys() and not any(WAYS[row].once for row in told)
    for s in STUDIES.values(): assert set(T.LEARNED) <= set(s.main) <= set(T.MAIN) and set(T.LEARNED) <= set(s.light) and all(WAYS[row].V for row in s.light)
    assert all(len(set(s.experiment.seeds)) >= 3 and len(s.experiment.pools) == 2 for s in STUDIES.values())


# --- a small run

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    d = tmp_path_factory.mktemp('grdr')
    return d, grdr_study('events', d/'results', d/'work', FEW, TINY, quiet)


@pytest.fixture(scope='module')
def pieces(ran): return [seed_ways(TINY, seed, FEW, ran[0]/'work'/'events', quiet) for seed in (0, 1)]


@pytest.fixture(scope='module')
def v(ran): return Vectors(TINY.experiment, 0, ran[0]/'work'/'events'/'seed0')


NAMES = ['grdr_events', 'grdr_events_ablations', 'grdr_events_candidates', 'grdr_events_stages', 'grdr_events_views', 'grdr_events_health', 'grdr_reported']

def test_files_load_and_are_drawn(ran, pieces):
    d, files = ran
    assert [f.name for f in files] == [f'{name}.json' for name in NAMES] + ['ledger.json'] and all(f.parent == d/'results' for f in files)
    kept = {row: sum(any(h['best_step'] for h in s[row][1]['history']) for s in pieces) for row in T.LEARNED}
    assert load_results(d/'results', 'grdr_events')['caption'].endswith(f"Seeds of which dev kept an update: {kept['GRDR, ours']} of 2 (GRDR, ours), {kept['GRDR, published']} of 2 (GRDR, published).")
    for name in NAMES:
        r = load_results(d/'results', name)
        text = markdown(r['values'], r['caption'])
        assert '{' not in r['caption'] and all(c['row'] in text for c in r['values']) and all(np.isfinite(c['value']) for c in r['values'])
    lines = redraw(d, expected=())
    assert [line for line in lines if not line.startswith('drawn: ')] == ['missing: ' + str(d/'results'/'latency.times.json') + '; `grnb bench` writes it']
    assert {p.stem for p in (d/'tables').glob('*.md')} == {*NAMES, 'ledger'}


def test_systems_rows_and_settings(ran, pieces):
    d, _ = ran
    get = lambda name: load_results(d/'results', name)['values']
    panels = [f'{s}, {n:,} items' for s, n in zip(('inductive', 'full'), pieces[0]['exact'][1]['pools'])]
    for name in NAMES[:5]: assert {c['panel'] for c in get(name)} == set(panels), name
    light, stages = ('light search', 'light search, then cosine'), ('first stage alone', 'two-stage, cosine', 'two-stage, X-Pool')
    exact = {'exact dense', 'exact dense, all views', 'X-Pool over everything'}
    rows = lambda name: {c['row'] for c in get(name)}
    assert rows('grdr_events') == exact | {f'{row}: {how}' for row in T.LEARNED for how in light} | {f'{row}: {how}' for row in T.MAIN for how in stages}
    r = T._Rows(TINY, pieces)
    assert r.main == list(T.MAIN) and r.codes == {} and T._Rows(TINY, pieces, FEW).codes == {row: way.V * way.L for row, way in FEW.items()}
    only = [{row: (a if row in T.LEARNED or row == 'exact' else {k: x for k, x in a.items() if 'xpool' not in k}, f) for row, (a, f) in s.items()} for s in pieces]
    assert T._Rows(TINY, only).main == list(T.LEARNED)      # what X-Pool did not see has no place in the result tables
    assert rows('grdr_events_ablations') == {'exact dense', 'exact dense, all views', *FEW}
    assert rows('grdr_events_views') == set(T.MAIN)
    assert rows('grdr_events_candidates') == exact | {f'{row}, beam {b}' for row in T.MAIN for b in TINY.beams} | {f'{row}: light search' for row in T.LEARNED}
    assert rows('grdr_events_stages') == {'exact dense', 'X-Pool over everything'} | {f'{row}, {how}' for row in T.MAIN for how in ('cosine', 'X-Pool')}
    for s in pieces: assert {row for row, (a, _) in s.items() if 'light0-300' in a} == {*T.LEARNED, 'ours, trained to the end'}
    assert {c['dataset'] for c in read_json(d/'results'/'ledger.json')['values']} == {f'events grdr, {p}' for p in panels}


def test_storage_claims_are_in_the_ledger(ran):
    "Three countings of each trained row, in both settings"
    rows = [c for c in read_json(ran[0]/'results'/'ledger.json')['values'] if c['claim'].startswith('42 times less storage')]
    assert len(rows) == len({(c['dataset'], c['claim']) for c in rows}) == 2 * 3 * len(T.LEARNED)


def test_as_many_updates_and_last_weights(pieces):
    "The tokenizer-first row has the published row's updates of the generator; a row that does not choose has the weights of every phase's end"
    done = lambda row: sum(h['steps'] for h in pieces[0][row][1]['history'])
    assert done('published, tokenizer first') == done('GRDR, published') == 15 and WAYS['published, tokenizer first'].training.steps[3] == 580
    last, chosen = (pieces[0][row][1]['history'] for row in ('ours, trained to the end', 'GRDR, ours'))
    assert all(h['best_step'] == h['steps'] and h['score'] is None for h in last) and all(h['score'] is not None for h in chosen) and len(last) == len(chosen)


def test_cells_are_means_over_queries_and_seeds(ran, pieces):
    d, _ = ran
    cells = {(c['row'], c['column'], c['panel'].split(',')[0]): c for name in NAMES[:2] for c in load_results(d/'results', name)['values']}
    curve = {(c['panel'].split(',')[0], c['series'], c['x']): c for c in load_results(d/'results', 'grdr_events_candidates')['values']}
    share = lambda row, key, k: 100 * np.mean([np.mean([0 < r <= k for r in s[row][0][key]]) for s in pieces if row in s])
    near = lambda c, value: np.isclose(c['value'], value, rtol=1e-5, atol=1e-9)
    for i, setting in enumerate(T.SETTINGS):
        for k in (1, 5, 10, 100):
            assert near(cells['exact dense, all views', f'R@{k}', setting], share('exact', f'all-views{i}', k))
            for c in TINY.candidates:
                for row in T.MAIN: assert near(curve[setting, f'{row}, beam 10', c], share(row, f'alone{i}-10', c))
                for row in T.LEARNED: assert near(curve[setting, f'{row}: light search', c], share(row, f'light{i}-300', c))
                for row, key in (('exact dense', 'dense'), ('exact dense, all views', 'views'), ('X-Pool over everything', 'xpool')): assert near(curve[setting, row, c], share('exact', f'{key}{i}', c))
            for row in T.LEARNED:
                for how, key in (('first stage alone', f'alone{i}-300'), ('two-stage, cosine', f'two{i}-300-100'), ('two-stage, X-Pool', f'xpool{i}-100'), ('light search', f'light{i}-300'), ('light search, then cosine', f'light-two{i}-300-100')):
                    assert near(cells[f'{row}: {how}', f'R@{k}', setting], share(row, f'all-{key}', k)), (row, how, k)
        for row in FEW:
            for beam in (10, 300): assert near(cells[row, f'R@100, beam {beam}', setting], share(row, f'alone{i}-{beam}', 100))
            assert near(cells[row, 'two-stage R@10', setting], share(row, f'two{i}-300-100', 10)) and cells[row, 'R@100, beam 10', setting]['seeds'] == 2 - FEW[row].once
        seeds = [s for s in pieces if 'one ID of the mean, not trained' in s]
        change = np.mean([np.mean([float(0 < a <= 100) - float(0 < b <= 100) for a, b in zip(s['one ID of the mean, not trained'][0][f'alone{i}-300'], s['GRDR, ours'][0][f'alone{i}-300'])]) for s in seeds])
        assert near(cells['one ID of the mean, not trained', 'change, beam 300', setting], 100 * change)
        facts = pieces[0]['exact'][1]
        vector, size = 4 * facts['width'], lambda row: cells[row, 'bytes an item', setting]['value']
        assert size('exact dense') == vector and size('exact dense, all views') == size('X-Pool over everything') == vector * facts['frames']
        for row in T.MAIN:
            alone = size(f'{row}: first stage alone')
            assert 0 < alone < vector and np.isclose(alone, np.mean([s[row][1]['bytes'][i] for s in pieces]), rtol=1e-5)
            assert np.isclose(size(f'{row}: two-stage, cosine'), alone + vector, rtol=1e-5) and np.isclose(size(f'{row}: two-stage, X-Pool'), alone + vector * facts['frames'], rtol=1e-5)
            if row in T.LEARNED: assert size(f'{row}: light search') == alone and np.isclose(size(f'{row}: light search, then cosine'), alone + vector, rtol=1e-5)


def test_captions_that_ask(v):
    "Every fourth is one caption of each event; its own item is among those that match; frames stand where their item does"
    assert (v.groups.reshape(-1, 4) == v.groups[::4, None]).all() and len(v.queries) == len(v.groups)
    for x, frames in ((v.train, v.train_frames), (v.dev, v.dev_frames), (v.pool0, v.frames0), (v.pool1, v.frames1)):
        mean = frames.mean(1)
        assert np.allclose(x, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)       # a video is the mean of its quarters
    for i in (0, 1):
        for each in (1, 4):
            q, qrels = v.asks(i, each)
            assert np.array_equal(q, v.queries[::each]) and len(qrels.indptr) == len(q) + 1
            assert all(own in qrels.rows[a:b] for own, a, b in zip(v.arrays[f'own{i}'][::each], qrels.indptr, qrels.indptr[1:]))


# --- resuming

def test_a_second_run_makes_nothing_and_writes_the_same(ran, monkeypatch):
    d, files = ran
    before = [f.read_bytes() for f in files]
    for made in ('_piece', '_exact', '_reranker'): monkeypatch.setattr(G, made, None)
    assert grdr_study('events', d/'results', d/'work', FEW, TINY, quiet) == files and [f.read_bytes() for f in files] == before


def test_killed_in_a_phase_and_between_pieces_it_ends_the_same(pieces, tmp_path, monkeypatch):
    ways = {row: FEW[row] for row in ('GRDR, published', 'published, V=1')}
    made, steps, feed, piece, train = [], [], cotrain._feed, G._piece, cotrain.train
    monkeypatch.setattr(cotrain, 'train', lambda *a, **k: train(*a, **k, save_every=1))
    monkeypatch.setattr(G, '_piece', lambda row, way, *a: made.append(way) or piece(row, way, *a))
    def watched(stop):
        def new(*a):
            batch = feed(*a)
            def step(n):
                if (a[-1], n) == stop: raise KeyboardInterrupt
                steps.append((a[-1], n))
                return batch(n)
            return step
        monkeypatch.setattr(cotrain, '_feed', new)
    def go(say=quiet):
        made.clear(), steps.clear()
        return seed_ways(TINY, 0, ways, tmp_path, say)

    watched(('level1-main', 1))
    with pytest.raises(KeyboardInterrupt): go()
    assert made == [ways['GRDR, published']] and steps[-1] == ('level1-main', 0) and len(list(tmp_path.glob('seed0/*/level1-main/train.safetensors'))) == 1
    watched(None)
    lines = []
    def killed(line):
        lines.append(line)
        if len(lines) == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go(killed)
    assert lines[1].startswith('seed 0, GRDR, published: ') and steps == [('level1-main', 1), ('level1-main', 2), ('level1-fit', 0), ('level1-fit', 1)]
    got = go()
    assert made == [ways['published, V=1']] and list(got) == ['exact', *ways]
    for row, (arrays, facts) in got.items():
        want, known = pieces[0][row]
        assert same(arrays, want) and {k: f for k, f in facts.items() if k != 'fit'} == {k: f for k, f in known.items() if k != 'fit'}, row
    assert [p.name[:6] for p in (tmp_path/'seed0').iterdir() if p.is_dir()] == ['xpool-']       # unfinished work is gone


def test_a_piece_replaces_only_its_own_forerunner(tmp_path):
    path = lambda name, mark: tmp_path/f'{name}-{mark:016x}.safetensors'
    make = lambda n: lambda work: ({'a': np.arange(n)}, {'work': str(work)})
    for name, mark in (('v', 1), ('v-1', 1), ('v', 2)): G._kept(path(name, mark), make(mark))
    assert {p.name for p in tmp_path.iterdir()} == {path('v', 2).name, path('v-1', 1).name}
    arrays, facts = G._kept(path('v', 2), None)
    assert arrays['a'].tolist() == [0, 1] and facts == {'work': str(tmp_path/path('v', 2).stem)}


def test_what_a_piece_depends_on_is_in_its_name(ran, monkeypatch):
    "Another way, study, seed or source makes another piece, and being in the main or the light rows; more seeds or other rows among them do not"
    d, names = ran[0], []
    monkeypatch.setattr(G, '_kept', lambda path, make: names.append(path.name) or ({'dense1': np.ones(1, int), 'alone1-300': np.ones(1, int)}, dict(fit=0.)))
    few = replace(TINY, main=('b',), light=('c',))
    def name(study=few, seed=0, way=SHORT):
        seed_ways(study, seed, {'a': way}, d/'work'/'events', quiet)
        return names[-1]
    known = [name(), name(way=replace(SHORT, traps=True)), name(way=replace(SHORT, training=replace(SHORT.training, lr=2e-3))), name(replace(few, depth=110)), name(seed=1), name(replace(few, main=('a',))), name(replace(few, light=('a',)))]
    assert len(set(known)) == 7 and name() == known[0]
    more = replace(few, main=('c', 'd'), light=('b',), experiment=replace(few.experiment, seeds=(0, 1, 2)))
    names.clear()
    assert name(more) == known[0]
    exact = names[0]
    names.clear()
    assert name() == known[0] and names[0] == exact != known[0]         # exact search hangs on neither
    assert name(replace(more, main=('a',))) == known[5] and name(replace(more, light=('a',))) == known[6]
    monkeypatch.setattr(G, '_sources', lambda *names: 'changed')
    assert name() not in known


# --- ranks, worked out anew

def slow(scores, ids, depth):
    "Item rows in the order of the scores of their IDs (U,), equal scores by ID, each item once; ids: (ID, its items) in order"
    out = []
    for u in sorted(range(len(ids)), key=lambda u: (-scores[u], u)): out += [row for row in ids[u][1] if row not in out]
    return out[:depth]


def place(found, right): return next((n for n, row in enumerate(found, 1) if row in right), 0)


def spelled(codes):
    "(ID, its items) in order"
    items = defaultdict(set)
    for row, own in enumerate(codes.tolist()):
        for code in own: items[tuple(code)].add(row)
    return [(code, sorted(rows)) for code, rows in sorted(items.items())]


@torch.no_grad()
def every_score(t, q, codes):
    "The generator's score of every ID (Q, U), no search: the whole model forward, or ⟨q, x̂⟩ − ½‖x̂‖² where nothing is trained"
    if t.model is None:
        x = sum(C[codes[:, l]].astype(np.float64) for l, C in enumerate(t.tokenizer.codebooks))
        return q.astype(np.float64) @ x.T - (x ** 2).sum(1) / 2
    levels = t.model(torch.from_numpy(q), torch.from_numpy(np.broadcast_to(codes, (len(q), *codes.shape)).copy()))
    pick = torch.from_numpy(codes)[None].expand(len(q), -1, -1)
    if not t.model.geometry: levels = [z.log_softmax(-1) for z in levels]
    return sum(z.double().gather(2, pick[..., l:l + 1])[..., 0] for l, z in enumerate(levels)).numpy()


@torch.no_grad()
def every_light(model, q, codes):
    "The score of every ID (Q, U) by codebooks alone, float64: ⟨z, x̂⟩ − ½‖x̂‖² of the mapped query; or log-probabilities by the cosines of what is left of each view, and of the best view"
    w = {k: p.double().numpy() for k, p in model.state_dict().items()}
    words = [w[f'tok.levels.stored.{l}.words'] for l in range(codes.shape[1])]
    q = q.astype(np.float64)
    if model.geometry:
        x = sum(C[codes[:, l]] for l, C in enumerate(words))
        return q @ w['tok.ask.weight'].T @ x.T - (x ** 2).sum(1) / 2
    best = np.full((len(q), len(codes)), -np.inf)
    for W, b in zip(w['tok.enc_w'], w['tok.enc_b']):
        rest, total = np.repeat((q @ W.T + b)[:, None], len(codes), 1), 0.                          # (Q, U, d)
        for l, C in enumerate(words):
            cos = model.scale().item() * (rest / np.linalg.norm(rest, axis=2, keepdims=True)) @ (C / np.linalg.norm(C, axis=1, keepdims=True)).T
            total, rest = total + cos[:, np.arange(len(codes)), codes[:, l]] - np.log(np.exp(cos).sum(2)), rest - C[codes[:, l]]
        best = np.maximum(best, total)
    return best


@pytest.mark.parametrize('row', ['GRDR, published', 'GRDR, ours', 'ours, trained to the end', 'an ID a view, not trained', 'one ID of the mean, not trained'])
def test_ranks_are_those_of_scoring_every_id(row, v, pieces, tmp_path):
    "The beam holds all IDs, so search is a sort; two stages and light search likewise"
    t, have = G._Trained(FEW[row], v, TINY.dim, tmp_path), pieces[0][row][0]
    pre, each = ('all-', 1) if row in TINY.main else ('', TINY.each)
    for i in (0, 1):
        x, (q, qrels) = v.arrays[f'pool{i}'], v.asks(i, each)
        codes = t.codes(x, v.arrays[f'frames{i}']).astype(np.int64)
        ids = spelled(codes)
        whole = np.array([code for code, _ in ids])
        assert len(ids) <= 300 and np.isclose(pieces[0][row][1]['ids'][i] * len(x), sum(len(rows) for _, rows in ids))
        scores, near = every_score(t, q, whole), q.astype(np.float64) @ x.T.astype(np.float64)
        ways = [('alone', 'two', scores)] + ([('light', 'light-two', every_light(t.model, q, whole))] if row in TINY.light else [])
        want = defaultdict(list)
        for n, own in enumerate(v.arrays[f'own{i}'][::each]):
            right = set(qrels.rows[qrels.indptr[n]:qrels.indptr[n + 1]].tolist())
            for stage, two, s in ways:
                found = slow(s[n], ids, TINY.depth)
                want[f'{pre}{stage}{i}-300'].append(place(found, right))
                want[f'{pre}{two}{i}-300-100'].append(place(sorted(found[:100], key=lambda r: (-near[n, r], r)), right))
            order = {ids[u][0]: p for p, u in enumerate(sorted(range(len(ids)), key=lambda u: (-scores[n, u], u)), 1)}
            want[f'{pre}places{i}'].append([order[tuple(code)] for code in codes[own].tolist()])
        for key, r in want.items(): assert np.array_equal(have[key], r), (key, np.flatnonzero(have[key] != np.array(r)))


@pytest.mark.parametrize('init, V', [('released', 1), ('released', 3), ('geometry', 2)])
@settings(max_examples=6)
@given(L=st.integers(1, 3), seed=st.integers(0, 1000), room=st.integers(0, 5))
def test_light_search_is_a_sort_of_all_ids(init, V, L, seed, room):
    "Leaves and scores, of a beam that holds all IDs and some more"
    g = np.random.default_rng(seed)
    m = SharedGenerator(6, dict(width=6, n_layers=1, n_heads=2, n_prefix=2), V, 4, L, 4, init=init, seed=seed).eval()
    x, q = (unit(g.normal(size=(n, 6)).astype(np.float32)) for n in (12, 5))
    if m.geometry: start_from_geometry(m, x, .5, seed)
    trie = Trie.build(make_ids(codes_now(m, torch.from_numpy(x), L).numpy(), m.sizes))
    n = len(trie)
    leaves, scores = Light(m).search(q, trie, n + room)
    want = every_light(m, q, np.asarray(trie.codes).astype(np.int64))
    assert leaves.shape == scores.shape == (5, n + room) and (np.sort(leaves[:, :n], 1) == np.arange(n)).all() and (leaves[:, n:] == -1).all() and (scores[:, n:] == -np.inf).all()
    assert np.allclose(np.take_along_axis(want, leaves[:, :n], 1), scores[:, :n], atol=1e-3) and (np.diff(scores[:, :n]) <= 0).all()


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 6), st.integers(1, 20), st.integers(0, 2 ** 31))
def test_merged_by_hand(V, Q, W, beam, seed):
    "Each leaf once, with its best score; of equal scores the earlier list, then the earlier place; nothing of what is dead"
    g, lists = np.random.default_rng(seed), []
    for _ in range(V):
        leaves, scores = np.stack([g.permutation(8)[:W] for _ in range(Q)]) if Q else np.zeros((0, W), int), -np.sort(g.integers(0, 5, size=(Q, W)).astype(np.float32), 1)
        dead = np.sort(g.random((Q, W)) < .2, 1)
        lists.append((np.where(dead, -1, leaves), np.where(dead, -np.inf, scores).astype(np.float32)))
    have, have_scores = merged(lists, beam)
    assert have.shape == have_scores.shape == (Q, beam)
    for n in range(Q):
        best = {}
        for score, leaf in sorted(((s, leaf) for leaves, scores in lists for s, leaf in zip(scores[n].tolist(), leaves[n].tolist()) if leaf >= 0), key=lambda p: -p[0]): best.setdefault(leaf, score)
        want = list(best.items())[:beam]
        assert have[n].tolist() == [leaf for leaf, _ in want] + [-1] * (beam - len(want)) and have_scores[n].tolist() == [s for _, s in want] + [-np.inf] * (beam - len(want))


def test_exact_ranks_and_xpool_are_plain_sorts(ran, v, pieces, tmp_path):
    folder, = (ran[0]/'work'/'events'/'seed0').glob('xpool-*')
    xpool, exact, t = G._reranker(TINY, v, folder), pieces[0]['exact'][0], G._Trained(FEW['GRDR, published'], v, TINY.dim, tmp_path)
    for i in (0, 1):
        x, frames, (q, qrels) = v.arrays[f'pool{i}'].astype(np.float64), v.arrays[f'frames{i}'], v.asks(i, 1)
        views = frames / np.linalg.norm(frames, axis=2, keepdims=True)
        pooled = xpool.score(q, frames, np.broadcast_to(np.arange(len(x)), (len(q), len(x))))
        for name, s in dict(dense=q @ x.T, views=np.einsum('qd,nfd->qnf', q, views).max(2), xpool=pooled).items():
            r = ranks(np.argsort(-s, 1, kind='stable')[:, :TINY.depth], qrels)
            assert np.array_equal(exact[f'all-{name}{i}'], r) and np.array_equal(exact[f'{name}{i}'], r[::TINY.each]), (name, i)
        codes = t.codes(v.arrays[f'pool{i}'], frames).astype(np.int64)
        ids = spelled(codes)
        s = every_score(t, q, np.array([code for code, _ in ids]))
        for c in (10, 100):
            right = [set(qrels.rows[a:b].tolist()) for a, b in zip(qrels.indptr, qrels.indptr[1:])]
            r = np.array([place(sorted(slow(s[n], ids, TINY.depth)[:c], key=lambda row: (-pooled[n, row], row)), right[n]) for n in range(len(q))])[::TINY.each]
            assert np.array_equal(pieces[0]['GRDR, published'][0][f'xpool{i}-{c}'], r), (i, c)


def test_an_id_a_view_is_the_code_of_each_frame(v, tmp_path):
    t = G._Trained(FEW['an ID a view, not trained'], v, TINY.dim, tmp_path)
    codes, frames = t.codes(v.pool1, v.frames1), v.frames1
    assert codes.shape == (len(v.pool1), frames.shape[1], 2)
    for f in range(frames.shape[1]): assert np.array_equal(codes[:, f], t.tokenizer.encode(frames[:, f]))
    assert t.parameters() == 2 * 16 * v.pool1.shape[1]


# --- the released traps

def test_traps_drop_ids_and_choose_on_the_test_set(v, tmp_path, monkeypatch):
    "A code 1 before the last level ends the search: those IDs are not in the trie; only this way is shown the test set"
    tries, shown, found, together = [], [], G._found, G.train_together
    monkeypatch.setattr(G, '_found', lambda t, study, i, q, qrels, trie, *a: tries.append((i, trie, t.codes(v.arrays[f'pool{i}'], v.arrays[f'frames{i}']))) or found(t, study, i, q, qrels, trie, *a))
    monkeypatch.setattr(G, 'train_together', lambda *a, **k: shown.append(k['test']) or together(*a, **k))
    few = replace(TINY, all=False, few=(300,))
    trapped = replace(SHORT, traps=True, training=replace(SHORT.training, released=TRAPS))
    got, _ = G._piece('published, with its traps', trapped, few, v, None, tmp_path/'a')
    left, lost = 0, 0
    for i, trie, codes in tries:
        whole = {tuple(c) for c in codes.reshape(-1, 2).tolist()}
        assert {tuple(c) for c in trie.codes.tolist()} == {c for c in whole if c[0] != 1} and {c for c in whole if c[1] == 1 and c[0] != 1} <= {tuple(c) for c in trie.codes.tolist()}
        gone, (_, qrels) = (codes[..., 0] == 1).all(1), v.asks(i, few.each)
        only = np.array([gone[qrels.rows[a:b]].all() for a, b in zip(qrels.indptr, qrels.indptr[1:])])
        assert not got[f'alone{i}-300'][only].any() and not got[f'two{i}-300-100'][only].any()
        left, lost = left + len(whole), lost + len(whole) - len(trie)
    assert len(tries) == 2 and 0 < lost < left
    assert len(shown[0]) == 3 and all(np.array_equal(a, b) for a, b in zip(shown[0], (v.pool0, v.queries, v.own0)))
    G._Trained(SHORT, v, TINY.dim, tmp_path/'b')
    assert shown[1:] == [None]


# --- statistics

@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2 ** 31))
def test_health_of_codes_by_hand(V, L, N, seed):
    codes = np.random.default_rng(seed).integers(0, 3, size=(N, V, L))
    have, distinct = health(None, np.zeros((N, 2)), codes), [len({tuple(c) for c in own}) for own in codes.tolist()]
    first = max(sum(int(codes[n, w, 0] == c) for n in range(N)) for w in range(V) for c in range(3))
    want = {'videos with an ID twice': 100 * sum(d < V for d in distinct) / N, 'distinct IDs a video': sum(distinct) / N, 'largest share of a first code': 100 * first / N}
    want |= {f'codes used, level {l}, view {w}': len({int(c) for c in codes[:, w, l]}) for w in range(V) for l in range(L)}
    assert have.keys() == want.keys() and all(np.isclose(have[k], want[k]) for k in want)


@pytest.mark.parametrize('init', ['released', 'geometry'])
@settings(max_examples=10)
@given(V=st.integers(1, 3), L=st.integers(1, 3), seed=st.integers(0, 1000))
def test_health_of_a_model_by_hand(init, V, L, seed):
    g, m = np.random.default_rng(seed), SharedGenerator(6, dict(width=6, n_layers=1, n_heads=2, n_prefix=2), V, 4, L, 4, init=init, seed=seed)
    x, codes = g.normal(size=(7, 6)).astype(np.float32), g.integers(0, 4, size=(7, V, L))
    w = {k: p.detach().double().numpy() for k, p in m.state_dict().items()}
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    pairs = [(i, j) for i in range(V) for j in range(V) if i != j]
    back, before, after = [], [], []
    for n in range(7):
        z = [w['tok.enc_w'][i] @ x[n] + w['tok.enc_b'][i] for i in range(V)]
        zq = [sum(w[f'tok.levels.stored.{l}.words'][codes[n, i, l]] for l in range(L)) for i in range(V)]
        back.append(cos(x[n], sum(w['tok.dec_w'][i] @ zq[i] + w['tok.dec_b'][i] for i in range(V)) / V))
        before += [cos(z[i], z[j]) for i, j in pairs]
        after += [cos(zq[i], zq[j]) for i, j in pairs]
    have = health(m, x, codes)
    assert np.isclose(have['reconstruction cosine'], np.mean(back), atol=1e-5)
    for name, values in (('before', before), ('after', after)):
        key = f'cosine between views, {name}'
        assert np.isclose(have[key], np.mean(values), atol=1e-5) if V > 1 else key not in have


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2 ** 31))
def test_view_places_by_hand(Q, W, V, seed):
    g = np.random.default_rng(seed)
    leaves = np.stack([g.permutation(8)[:W] for _ in range(Q)]) if Q else np.zeros((0, W), int)
    leaves, own = np.where(g.random(leaves.shape) < .2, -1, leaves), g.integers(-1, 8, size=(Q, V))
    want = [[next((p for p, leaf in enumerate(beam.tolist(), 1) if leaf == o and o >= 0), 0) for o in mine] for beam, mine in zip(leaves, own.tolist())]
    have = view_places(leaves, own)
    assert have.dtype == np.int16 and have.shape == (Q, V) and have.tolist() == want


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2 ** 31)), min_size=1, max_size=12))
def test_view_use_by_hand(V, queries):
    groups, places = np.array([item for item, _ in queries]), np.array([np.random.default_rng(s).integers(0, 4, size=V) for _, s in queries], np.int16)
    first, many, through = [0.] * V, [], defaultdict(list)
    for item, own in zip(groups.tolist(), places.tolist()):
        hits = [p for p in own if p > 0]
        if not hits: continue
        top = {w for w, p in enumerate(own) if p == min(hits)}             # equal IDs share the first place
        for w in top: first[w] += 1 / len(top)
        many.append(len(set(hits))), through[item].append(top)
    want, several = {}, [not set.intersection(*tops) for tops in through.values() if len(tops) > 1]
    if many: want = {f'view {w + 1} first': 100 * first[w] / len(many) for w in range(V)} | {f'{n} of the IDs in the beam': 100 * many.count(n) / len(many) for n in range(1, V + 1)}
    if several: want['items reached by several views'] = 100 * sum(several) / len(several)
    have = view_use(places, groups)
    assert have.keys() == want.keys() and all(np.isclose(have[k], want[k]) for k in want)


def test_view_use_of_the_table(ran, pieces):
    cells = {(c['row'], c['panel'].split(',')[0], c['column']): c for c in load_results(ran[0]/'results', 'grdr_events_views')['values']}
    for i, setting in enumerate(T.SETTINGS):
        for row in T.MAIN:
            each = [view_use(s[row][0][f'all-places{i}'], s[row][0]['all-groups']) for s in pieces if row in s]
            for column in each[0]: assert np.isclose(cells[row, setting, column]['value'], np.mean([e.get(column, 0.) for e in each]), rtol=1e-5)


# --- verdicts

def made(found, n=200, all=False, once=(), apart=False, kept=(1, 1, 1), ways=None, width=4, facts=None):
    """Pieces in which row → key → share of n queries found, or a share a seed, and half of it where all captions ask;
    `apart`: every seed has items of its own; `kept`: the update of the last phase that dev kept; `facts`: row → a dict a seed"""
    seeds = []
    for seed in range(3):
        s = {'exact': ({}, dict(pools=[n], width=width, frames=2))}
        for row, keys in found.items():
            if row in once and seed: continue
            p = {key: share[seed] if isinstance(share, tuple) else share for key, share in keys.items()}
            a = {key: (np.arange(n) < round(n * share)).astype(np.int64) for key, share in p.items()} | {f'all-{key}': (np.arange(n) < round(n * share / 2)).astype(np.int64) for key, share in p.items() if all}
            items = np.arange(n) + 1000 * seed * apart
            groups = {'groups': items} | ({'all-groups': items} if all else {})
            s[row] = a | groups, s.get(row, (0, dict(history=[dict(best_step=0), dict(best_step=kept[seed])])))[1] | (facts[row][seed] if facts else {})
        seeds.append(s)
    return T._Rows(replace(TINY, all=all), seeds, ways)


def verdicts(rows): return {c['claim']: (c['verdict'], c['effect']) for c in T._claims(rows, 'events')}


SEVERAL = {a: says for _, a, _, says in T._SEVERAL}
EXACT = {'exact': {'dense0': .9, 'views0': .9, 'xpool0': .9}}
MAIN = 'alone0-300', 'light0-300', 'two0-300-100', 'xpool0-100'

@pytest.mark.parametrize('ours, other, holds', [(.9, .5, True), (.5, .9, False), (.7, .7, False), (.7, .69, False)])
def test_the_interval_decides(ours, other, holds):
    rows = made(EXACT | {'GRDR, published': dict.fromkeys(MAIN, ours), 'published, V=1': {'alone0-300': other}})
    verdict, effect = verdicts(rows)[SEVERAL['GRDR, published']]
    assert np.isclose(effect['value'], 100 * (ours - other)) and effect['seeds'] == 3 and effect['low'] <= effect['value'] <= effect['high']
    assert (effect['low'] > 0) == holds and verdict == VERDICTS[0 if holds else 1]


@pytest.mark.parametrize('apart', [False, True])
def test_rows_of_one_seed_are_compared_with_the_first_seed_only(apart):
    base = dict.fromkeys(MAIN, .5) | {'alone0-300': (.4, 1., 1.)}
    rows = made(EXACT | {'GRDR, published': base, 'published, V=1': {'alone0-300': .8}}, once=('published, V=1',), apart=apart)
    verdict, effect = verdicts(rows)[SEVERAL['GRDR, published']]
    assert verdict == VERDICTS[1] and effect['seeds'] == 1 and np.isclose(effect['value'], -40)
    e = rows.less('published, V=1', 'alone0-300', 100, 'GRDR, published', 'alone0-300')
    assert e.seeds == 1 and np.isclose(e.value, 40) and rows.share('GRDR, published', 'alone0-300', 100).seeds == 3
    assert rows.less('published, V=2', 'alone0-300', 100, 'GRDR, published', 'alone0-300') is None


SHARE = {'alone0-300': .8, 'light0-300': .55, 'two0-300-100': .7, 'xpool0-100': .45}

@pytest.mark.parametrize('all', [False, True])
def test_claims_hold_what_they_name_against_what_they_name(all):
    "Each key has a share of its own, so a claim on another key would have another effect; where all captions ask, the main rows' claims are on them"
    ways = {row: {k: p - .05 * n for k, p in SHARE.items()} for n, row in enumerate(T.MAIN)}
    ways['an ID a view, not trained'].pop('light0-300')
    others = {'published, V=1': .2, 'ours, V=1': .9, 'one ID of the mean, not trained': .3, 'published, tokenizer first': .1}
    rows = made({'exact': {'dense0': .5, 'views0': .4, 'xpool0': .35}, **ways, **{row: {'alone0-300': p} for row, p in others.items()}, 'ours, trained to the end': {'alone0-300': .65, 'light0-300': .25}}, all=all)
    assert rows.main == list(T.MAIN) and [rows.trained(row) for row in T.LEARNED] == [3, 3]
    claims, half = T._claims(rows, 'events'), .5 if all else 1
    got = {c['claim']: c for c in claims}
    one, = (says for says in got if says.startswith('co-training tokenizer and generator helps'))
    want = {SEVERAL['GRDR, ours']: .8 - .9, SEVERAL['GRDR, published']: .75 - .2, SEVERAL['an ID a view, not trained']: .7 - .3, one: .75 - .1,
            'the learned generator beats light search over its own codes (trained to the end)': .65 - .25}
    for row, less, dense in (('ours', 0., .5), ('published', .05, .5), ('an ID a view, not trained', .1, .4)):
        want |= {f'the first stage keeps 97 % of dense search\'s candidates ({row})': half * (.8 - less - .97 * dense), f'two stages keep X-Pool\'s accuracy ({row}, X-Pool)': half * (.45 - less - .98 * .35)}
        if dense == .5: want |= {f'two stages keep dense accuracy, R@{k} ({row}, cosine)': half * (.7 - less - .98 * .5) for k in (1, 5, 10)} | {f'the learned generator beats light search over its own codes ({row})': half * (.8 - .55)}
    assert want.keys() == got.keys() and len(claims) == len(got)
    for says, value in want.items():
        effect = got[says]['effect']
        assert np.isclose(effect['value'], 100 * value, atol=1e-3) and effect['seeds'] == 3 and got[says]['verdict'] == VERDICTS[0 if effect['low'] > 0 else 1], says
        assert got[says]['reason'] == '' and got[says]['paper'] == ('grnb' if 'an ID a view' in says or says == SEVERAL['an ID a view, not trained'] else 'GRDR'), says


@pytest.mark.parametrize('kept, said', [((0, 0, 0), True), ((0, 1, 0), False)])
def test_a_row_that_training_did_not_change_is_said_to_be_its_start(kept, said):
    "Only of what a trained row's own claims are about"
    ways = {row: {k: p for k, p in SHARE.items() if row in T.LEARNED or k != 'light0-300'} for row in T.MAIN}
    others = {row: {'alone0-300': .3} for row in ('published, V=1', 'one ID of the mean, not trained')}
    rows = made(EXACT | ways | others, kept=kept)
    assert [rows.trained(row) for row in (*T.LEARNED, 'published, V=2')] == [sum(kept)] * 2 + [0]
    reasons = {c['claim']: c['reason'] for c in T._claims(rows, 'events')}
    for says, why in reasons.items(): assert why == ('dev kept no update in any seed: this is the untrained start' if said and 'not trained' not in says else ''), says
    assert SEVERAL['GRDR, published'] in reasons and SEVERAL['an ID a view, not trained'] in reasons


def test_storage_claims_by_hand():
    "A vector of 512 numbers over 12 or 16 codes of four bytes; over the bytes of IDs and trie, which seeds differ in; and frames over everything"
    each = {row: [dict(bytes=[b], parameters=1000) for b in (20., 40., 30. + 20 * (row == 'GRDR, ours'))] for row in T.MAIN} | {'exact': [{}] * 3}
    rows = made(EXACT | {row: dict.fromkeys(MAIN, .5) for row in T.MAIN}, width=512, facts=each, ways=WAYS)
    got = {(c['claim'].split('(')[1].split(';')[0], c['claim'].split('; ')[1].rstrip(')')): c for c in T._storage_claims(rows, 'there', 0)}
    assert {row for row, _ in got} == {'ours', 'published'} and len(got) == 6
    for (row, what), c in got.items():
        last = 50 if row == 'ours' else 30
        if 'four bytes each' in what: want = [2048 / (4 * (2 * 8 if row == 'ours' else 4 * 3))] * 3
        elif 'strict' in what: want = [4096 / (4096 + b + 4 * 1000 / 200) for b in (20, 40, last)]
        else: want = [2048 / b for b in (20, 40, last)]
        assert np.allclose([c['effect'][k] for k in ('value', 'low', 'high')], [np.mean(want) - 42, min(want) - 42, max(want) - 42], rtol=1e-4, atol=1e-4) and c['effect']['n'] == 200 and c['effect']['seeds'] == 3
        assert c['verdict'] == VERDICTS[0 if min(want) > 42 else 1] and c['dataset'] == 'there' and c['reason'].startswith(f'measured: {np.mean(want):.3g} times') and ('below 1 by construction' in c['reason']) == ('strict' in what)
    assert {what: c['verdict'] for (row, what), c in got.items() if row == 'published'} == dict(zip([what for row, what in got if row == 'published'], (VERDICTS[0], VERDICTS[0], VERDICTS[1])))
    assert T._storage_claims(made(EXACT | {row: dict.fromkeys(MAIN, .5) for row in T.MAIN}), 'there', 0) == []


def test_no_claim_without_its_rows():
    assert T._claims(made(EXACT), 'events') == []


# --- times and storage of growing corpora

def test_storage_by_hand():
    trie = SimpleNamespace(bytes=lambda: dict(ids=300, entries=100, rows=200))          # 60 bytes an item
    assert list(X.storage(10, trie, 50, 2048, 24576).values()) == [2048 / 48, 2048 / 60, 24576 / (60 + 20 + 24576)]
    assert next(iter(X.storage(10, trie, 50, 2048, 24576, ids=4).values())) == 2048 / 16


def test_ratio_claims_decide_in_the_largest_corpus():
    "300 times as fast, 42 times less, and a rival that is only to be beaten; what a smaller corpus shows decides nothing"
    def ratio(name, n, value, low, high): return cell(name, n, value, 'simulated', unit='times', low=low, high=high, n=5, series=name, x=n, over='bootstrap over queries')
    def stored(name, n, value, low, high): return cell(name, n, value, 'simulated', unit='times', low=low, high=high, seeds=3, series=name, x=n, over='range over seeds of the codes')
    read, strict, rival = (name.format(b) for name, b in ((X.RELEASED, 100), (X.STRICT, 100), (X.RIVAL, 100)))
    beaten, names = X.RIVAL.format(20), list(X.storage(10, SimpleNamespace(bytes=lambda: dict(ids=1)), 1, 1, 1))
    ratios = [ratio(read, 9000, 400, 310, 500), ratio(strict, 9000, 350, 290, 400), ratio(rival, 9000, 1.2, 1.1, 1.3), ratio(beaten, 9000, .9, .8, 1.01), *(ratio(name, 1000, 1000, 900, 1100) for name in (read, strict, rival, beaten))]
    kept = [stored(names[0], 9000, 42.67, 42.67, 42.67), stored(names[1], 9000, 45, 41, 49), stored(names[2], 9000, .99, .98, .995), stored(names[1], 1000, 99, 98, 99)]
    got = {c['claim'].split(' (', 1)[1][:-1]: c for c in X.ratio_claims(ratios, kept)}
    want = {read: (100, 10, 200, True), strict: (50, -10, 100, False), rival: (.2, .1, .3, True), beaten: (-.1, -.2, .01, False), names[0]: (.67, .67, .67, True), names[1]: (3, -1, 7, False), names[2]: (-41.01, -41.02, -41.005, False)}
    assert list(got) == list(want)
    for name, (*effect, holds) in want.items():
        c = got[name]
        assert np.allclose([c['effect'][k] for k in ('value', 'low', 'high')], effect, atol=1e-6) and c['verdict'] == VERDICTS[0 if holds else 1], name
        timed = name not in names
        assert (c['effect']['n'], c['effect']['seeds']) == ((5, 1) if timed else (9000, 3)) and ('one thread' in c['test']) == timed and c['test'].endswith('bootstrap over queries' if timed else 'range over seeds of the codes')
        bar, says = (1, 'sooner than two stages without generation') if 'without generation' in name else (300, '300 times faster') if timed else (42, '42 times less storage')
        assert c['test'].startswith(f'ratio less {bar}, 9,000 simulated videos') and says in c['claim'] and ('below 1 by construction' in c['reason']) == (name == names[2])


@pytest.fixture(scope='module')
def figures(ran, tmp_path_factory):
    "The small run's results with times, and two small corpora under a T5 of one layer"
    d = tmp_path_factory.mktemp('figures')
    shutil.copytree(ran[0]/'results', d/'results')
    assert X.task_times('events', d/'results', ran[0]/'work', 1, TINY, {row: FEW[row] for row in T.MAIN}) == d/'results'/'grdr_events.times.json'
    files = X.grdr_times(d/'results', (150, 100), 2, 10, (0, 1), dict(X.T5_SMALL, num_layers=1, num_decoder_layers=1, num_heads=1, d_ff=8, vocab_size=32000))
    assert [f.name for f in files] == ['grdr_corpus.times.json', 'grdr_ratios.times.json', 'grdr_storage.json', 'ledger.json'] and all(f.parent == d/'results' for f in files)
    return d


def test_times_of_every_system_of_the_tables(figures):
    "A time for every row of the result table and for every beam of the curves, a panel a setting"
    ms = load_results(figures/'results', 'grdr_events', True)['values']
    table, curve = (load_results(figures/'results', name)['values'] for name in ('grdr_events', 'grdr_events_candidates'))
    assert {(c['panel'], c['row']) for c in ms} == {(c['panel'], c['row']) for c in table + curve if ': light search' not in c['row'] or c in table} and all(c['value'] > 0 and c['n'] == 1 for c in ms)


def test_corpora_are_timed_and_weighed(figures):
    get = lambda name, times: load_results(figures/'results', name, times)['values']
    took = {(c['row'], c['x']): c['value'] for c in get('grdr_corpus', True)}
    assert {n for _, n in took} == {100, 150} and {name for pair in X.OVER.values() for name in pair} == {name for name, _ in took}
    assert {(c['row'], c['x']) for c in get('grdr_ratios', True)} == {(name, n) for name in X.OVER for n in (100, 150)} and all(0 < c['low'] <= c['value'] <= c['high'] for c in get('grdr_ratios', True))
    for c in get('grdr_storage', False): assert c['seeds'] == 2 and ('released' not in c['row'] or c['value'] == float(f'{2048 / 48:.6g}'))
    rows = [c for c in read_json(figures/'results'/'ledger.json')['values'] if c['dataset'] == 'grdr corpus, simulated']
    assert len(rows) == len(X.OVER) + 3 and all('150 simulated videos' in c['test'] for c in rows) and any(c['dataset'].startswith('events grdr') for c in read_json(figures/'results'/'ledger.json')['values'])


# --- tables and figures

@pytest.mark.parametrize('setting', T.SETTINGS)
def test_the_table_of_a_setting(setting, ran, figures, tmp_path):
    "Ours and reported, apart; with times where there are some, and of rows of the table only"
    shutil.copytree(ran[0]/'results', tmp_path/'results')
    without, caption = F.setting_table(tmp_path, setting)
    with_times, _ = F.setting_table(figures, setting)
    here = [c for c in load_results(tmp_path/'results', 'grdr_events')['values'] if c['panel'].startswith(setting)]
    items = here[0]['panel'].split(', ')[1]
    assert without == [c | dict(panel=items) for c in here] + [c | dict(panel='') for c in reported_cells() if c['panel'] == setting]
    times = [c for c in with_times if c not in without]
    assert {c['row'] for c in times} == {c['row'] for c in here} and {(c['column'], c['panel'], c['unit']) for c in times} == {('latency', items, 'ms')} and len(with_times) == len(without) + len(times)
    assert (tmp_path/'tables'/f'grdr_{setting}.md').read_text(encoding='utf-8') == markdown(without, caption) and (tmp_path/'tables'/f'grdr_{setting}.tex').exists()


def test_tables_of_no_setting_or_no_results(tmp_path):
    with pytest.raises(ValueError, match='setting: expected one of inductive, full, got .both'): F.setting_table(tmp_path, 'both')
    with pytest.raises(FileNotFoundError, match='grdr_events.json is missing'): F.setting_table(tmp_path, 'full')
    with pytest.raises(FileNotFoundError, match='grdr_gallery.json is missing'): draw_gallery(tmp_path)


def lines(ax): return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def stored(figures, name, times=False):
    "Cells of a result by panel, and the panels"
    cells = load_results(figures/'results', name, times)['values']
    return {p: [c for c in cells if c['panel'] == p] for p in dict.fromkeys(c['panel'] for c in cells)}


def files_of(figures, name): return all((figures/f'{name}.{ending}').stat().st_size for ending in ('png', 'svg', 'pdf', 'md'))


def test_draw_stages(figures):
    fig = F.draw_stages(figures, 'events')
    panels = stored(figures, 'grdr_events_stages')
    assert [ax.get_title() for ax in fig.axes] == list(panels) and files_of(figures, 'grdr_events_stages')
    for ax, cells in zip(fig.axes, panels.values()):
        at = lines(ax)
        for c in cells:
            if 'x' in c: assert at[c['series']][1][at[c['series']][0].index(c['x'])] == c['value']
            else: assert set(at[c['row']][1]) == {c['value']}
        assert at.keys() == {c['row'] for c in cells}


def test_draw_ablations(figures):
    "Rows of one start together; hollow where there is one seed"
    fig = F.draw_ablations(figures, 'events')
    panels = stored(figures, 'grdr_events_ablations')
    rows = ['GRDR, published', 'published, V=1', 'published, tokenizer first', 'GRDR, ours', 'ours, trained to the end', 'an ID a view, not trained', 'one ID of the mean, not trained']
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == rows and files_of(figures, 'grdr_events_ablations')
    for ax, cells in zip(fig.axes, panels.values()):
        value = {c['row']: c['value'] for c in cells if c['column'] == 'R@100, beam 300'}
        dots = {line.get_ydata()[0]: line for line in ax.lines if line.get_marker() == 'o'}
        assert [dots[y].get_xdata()[0] for y in range(len(rows))] == [value[row] for row in rows]
        assert [dots[y].get_markerfacecolor() == 'white' for y in range(len(rows))] == [row.startswith('one ID') for row in rows]
        assert {name: x[0] for name, (x, _) in lines(ax).items() if name.startswith('exact')} == {row: value[row] for row in value if row.startswith('exact')}


def test_draw_candidates_frontier_and_views(figures):
    curve, ms = stored(figures, 'grdr_events_candidates'), stored(figures, 'grdr_events', True)
    fig = F.draw_candidates(figures, 'events')
    assert [ax.get_title(loc='left') for ax in fig.axes] == [f'{row}; {p}' for row in T.MAIN for p in curve]
    for ax in fig.axes:
        row, panel = ax.get_title(loc='left').split('; ')
        value = lambda series: [c['value'] for c in curve[panel] if c['series'] == series]
        assert lines(ax) == {'exact dense': ([10, 100], value('exact dense'))} | {f'beam {b} IDs': ([10, 100], value(f'{row}, beam {b}')) for b in TINY.beams}
    for ax, panel in zip(F.draw_frontier(figures, 'events').axes, curve):
        took, found = {c['row']: c['value'] for c in ms[panel]}, {c['series']: c['value'] for c in curve[panel] if c['x'] == 100}
        want = {f'{row}, first stage': sorted((took[f'{row}, beam {b}'], found[f'{row}, beam {b}']) for b in TINY.beams) for row in T.MAIN} | {name: [(took[name], found[name])] for name in found if ', beam ' not in name}
        assert {name: list(zip(*xy)) for name, xy in lines(ax).items()} == want
    fig, use = F.draw_views(figures, 'events'), stored(figures, 'grdr_events_views')
    for ax, (panel, cells) in zip(fig.axes, use.items()):
        assert ax.get_title(loc='left') == panel and np.isclose(sum(b.get_width() for b in ax.patches), 100 * len(T.MAIN), atol=.01)
        assert np.allclose([b.get_width() for b in ax.patches], [c['value'] for c in cells if c['column'].endswith('first')])
    assert all(files_of(figures, f'grdr_events_{name}') for name in ('candidates', 'frontier', 'views'))


def test_draw_corpus(figures):
    left, right = F.draw_corpus(figures).axes
    for ax, name, times, headline in ((left, 'grdr_ratios', True, 300), (right, 'grdr_storage', False, 42)):
        cells, at = load_results(figures/'results', name, times)['values'], lines(ax)
        for c in cells: assert at[c['series']][0] == [100, 150] and at[c['series']][1][[100, 150].index(c['x'])] == c['value']
        assert [headline, headline] in [y for _, y in at.values()] and len(at) == len({c['series'] for c in cells}) + 1
    assert files_of(figures, 'grdr_corpus')


def test_gallery_shows_what_was_found(ran, v, figures):
    "Each hit has the ID of the view it names, matches where the pool says so, and is a video of the full corpus; the drawing has a strip a hit"
    path = gallery_page(figures/'results', ran[0]/'work', 1, 3, TINY, {row: FEW[row] for row in SHOWN})
    page = read_json(path)
    pool, scenes, t = np.flatnonzero(np.isin(make_splits(200, 0), TINY.experiment.pools[-1])), make_scenes(200, 0), G._Trained(FEW[SHOWN[0]], v, TINY.dim, None)
    assert path == figures/'results'/'pages'/'grdr_gallery.json' and page['pool'] == len(pool) == len(v.pool1) and page['queries']
    q, qrels = v.asks(1, 1)
    for asked in page['queries']:
        own = np.flatnonzero(pool == asked['video'])[0]
        right = [set(qrels.rows[a:b].tolist()) for n, (a, b) in enumerate(zip(qrels.indptr, qrels.indptr[1:])) if v.own1[n] == own]
        assert scenes.starts[asked['video'] + 1] - scenes.starts[asked['video']] == 3 and right and set(asked['found']) == set(SHOWN)
        for hits in asked['found'].values():
            assert len(hits) == 3 and all(h['video'] == pool[h['row']] for h in hits)
            assert any([h['match'] for h in hits] == [h['row'] in r for h in hits] for r in right)
        for h in asked['found'][SHOWN[0]]: assert h['id'] == t.tokenizer.encode(v.frames1[h['row'], h['view'] - 1][None])[0].tolist()
    fig = draw_gallery(figures)
    hits = [h for asked in page['queries'] for row in SHOWN for h in asked['found'][row]]
    titles = [ax.get_title(loc='left') for ax in fig.axes]
    assert len(titles) == len(hits) and all(title.startswith('-'.join(map(str, h['id']))) and title.endswith('match' if h['match'] else f"view {h['view']}") for title, h in zip(titles, hits)) and files_of(figures, 'grdr_gallery')
    framed = [len(ax.patches) for ax in fig.axes]
    assert framed == [int(row == SHOWN[0]) for asked in page['queries'] for row in SHOWN for h in asked['found'][row]]


# --- what is reported

def test_reported_cells_are_the_reported_numbers(ran):
    cells = reported_cells()
    for c in cells:
        two = c['row'].endswith('two-stage, X-Pool')
        got = reported('two-stage', c['dataset'], c['panel'], 'readme') if two else reported('first stage', c['dataset'], c['panel'])
        assert c['value'] == got[c['column']] and c['row'].startswith('GRDR, as its authors report: '), c
    places = {(c['dataset'], c['panel']) for c in cells}
    assert places == {(data, setting) for data in ('msrvtt', 'actnet', 'didemo', 'lsmdc') for setting in T.SETTINGS}
    assert load_results(ran[0]/'results', 'grdr_reported')['values'] == cells


def test_reported_numbers_stand_apart(ran):
    paper, ours = set(), set()
    for name in NAMES:
        for c in load_results(ran[0]/'results', name)['values']: (paper if c['source'] == 'paper' else ours).add((c['dataset'], c['source']))
    assert ours == {('events', 'this run')} and paper == {(data, 'paper') for data in ('msrvtt', 'actnet', 'didemo', 'lsmdc')} and not {data for data, _ in paper} & set(STUDIES)
    released = [c for c in load_results(ran[0]/'results', 'grdr_events_health')['values'] if c['column'] == 'released checkpoint']
    assert {(c['panel'], c['row']): c['value'] for c in released} == {(split, k): x for split in ('train', 'test') for k, x in reported('tokenizer', 'msrvtt', split).items()}
    assert all(c['dataset'] == 'msrvtt' and c['source'] == 'paper' for c in released)
