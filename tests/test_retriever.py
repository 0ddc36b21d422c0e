"""The face: bad input changes nothing and says what it was; any sequence of changes is that of a dict searched by brute force."""
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from grnb import GenerativeRetriever, Recipe, load_task
from grnb.core import fingerprint, unit
from grnb.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
D, N = 6, 40
SMALL = dict(baseline=Recipe(K=8, L=2), genius=Recipe(generator='prefix', K=8, L=2, d_model=16, n_layers=1, n_prefix=2, steps=3, batch=16),
             towers=Recipe(K=8, L=2, towers=True, dim=5, tower_epochs=1),
             grdr=replace(RECIPES['grdr'], K=4, L=3, d_model=4, views=3, n_layers=1, n_prefix=2, spread=1., cotrain=replace(RECIPES['grdr'].cotrain, steps=(2, 2, 2, 2), batch=16)))
rng = np.random.default_rng(0)
ITEMS, QUERIES, POSITIVES = rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(60, D)).astype(np.float32), rng.integers(0, N, 60)


def made(name, **kw): return GenerativeRetriever(SMALL[name], device='cpu', **kw).fit(ITEMS, QUERIES, POSITIVES).index(ITEMS, np.arange(N) * 2)


@pytest.fixture(scope='module', params=['baseline', 'genius'])
def gr(request): return made(request.param)


def view(gr):
    "All that a user can see"
    a, b = gr.search(QUERIES[:5]), gr.search(QUERIES[:5], k=7, rerank=False)
    return [t.tolist() for t in (*a, *b)], gr.stats()


def refuses(gr, call, says, error=ValueError):
    "The call raises `error` naming the argument, and the object stays as it was"
    before = view(gr)
    with pytest.raises(error) as e: call(gr)
    assert type(e.value) is error and says in str(e.value), str(e.value)
    assert view(gr) == before


def with_row(value, shape=(4, D)):
    a = np.ones(shape)
    a[1] = value
    return a

BAD_VECTORS = dict(flat=np.ones(D), deep=np.ones((2, 2, 2, D)), wide=np.ones((3, D + 1)), narrow=np.ones((3, D - 1)), empty_width=np.ones((3, 0)), nan=with_row(np.nan),
                   inf=with_row(np.inf), minus_inf=with_row(-np.inf), overflow=with_row(1e300), zero=with_row(0), strings=np.full((3, D), 'a'),
                   objects=np.full((3, D), None), complex=np.ones((3, D), complex), bool=np.ones((3, D), bool), ragged=[[1., 2.], [3.]], none=None, number=3., word='abc',
                   dict={'a': 1}, nothing=[], time=np.ones((3, D), 'M8[s]'), list_of_none=[None], set={1, 2}, tensor=torch.ones(3, D, requires_grad=True) * 0)
BAD_COUNTS = [0, -1, 1.5, '3', None, True, float('nan'), float('inf'), [3], np.float32(2), 10**30 * -1]
each_vector = pytest.mark.parametrize('name', BAD_VECTORS)


# --- bad input

@each_vector
def test_bad_items(gr, name):
    x = BAD_VECTORS[name]
    if name not in ('wide', 'narrow'): refuses(gr, lambda g: g.fit(x), 'items')
    refuses(gr, lambda g: g.index(x), 'items')
    refuses(gr, lambda g: g.add(x, [1, 3, 5, 7]), 'items')


@each_vector
def test_bad_queries(gr, name):
    x = BAD_VECTORS[name]
    refuses(gr, lambda g: g.search(x), 'queries')
    if name not in ('wide', 'narrow', 'none'): refuses(gr, lambda g: g.fit(ITEMS, x, np.zeros(len(x) if hasattr(x, '__len__') else 1, int)), 'queries')


def test_three_dimensional_queries(gr): refuses(gr, lambda g: g.search(np.ones((2, 2, D))), 'queries: expected shape (N, D)')


@pytest.mark.parametrize('queries', ['a red circle', ['a red circle'], ['a', 1], np.array(['a', 'b']), ('a',), [' '], ['']])
def test_texts_where_vectors_are_due(gr, queries): refuses(gr, lambda g: g.search(queries), 'queries')


@pytest.mark.parametrize('positives', [None, POSITIVES[:-1], POSITIVES.astype(float), POSITIVES - 1 - POSITIVES.max(), POSITIVES + N, POSITIVES[:, None], list('a' * 60), 3, 'ab',
                                       [None] * 60, [[1], [1, 2]], POSITIVES.astype(bool), {}])
def test_bad_positives(gr, positives): refuses(gr, lambda g: g.fit(ITEMS, QUERIES, positives), 'positives')


def test_positives_alone(gr): refuses(gr, lambda g: g.fit(ITEMS, None, POSITIVES), 'queries')


@pytest.mark.parametrize('dev', [-.1, 1, 1., 2, float('nan'), '0.1', None, True, np.ones(N, bool), np.zeros(N - 1, bool), np.zeros((N, 1), bool), [.1], np.zeros(N)])
def test_bad_dev(gr, dev): refuses(gr, lambda g: g.fit(ITEMS, QUERIES, POSITIVES, dev=dev), 'dev')


def test_no_items(gr): refuses(gr, lambda g: g.fit(np.zeros((0, D))), 'items: expected at least one')


@pytest.mark.parametrize('checkpoint', [5, 1.5, ['a'], True])
def test_bad_checkpoint(gr, checkpoint): refuses(gr, lambda g: g.fit(ITEMS, QUERIES, POSITIVES, checkpoint=checkpoint), 'checkpoint')


def test_checkpoint_of_another_run(gr, tmp_path):
    GenerativeRetriever(gr.recipe, device='cpu').fit(ITEMS, QUERIES, POSITIVES, checkpoint=tmp_path/'c')
    for change in (lambda g: g.fit(ITEMS[:-1], QUERIES, POSITIVES % (N - 1), checkpoint=tmp_path/'c'), lambda g: g.fit(ITEMS, QUERIES, POSITIVES, dev=.3, checkpoint=tmp_path/'c')):
        refuses(gr, change, 'checkpoint')


BAD_IDS = dict(twice=[1, 3, 1], negative=[1, -3, 5], mixed=[1, 'a', 3], few=[1, 3], many=[1, 3, 5, 7], floats=[1., 3., 5.], float_array=np.ones(3), word='abc', bytes=b'abc', number=5,
               deep=[[1], [3], [5]], deep_array=np.ones((3, 1), int), empty=['a', '', 'b'], nones=[None, None, None], bools=[True, False, True], bool_array=np.ones(3, bool),
               huge=[1, 3, 2**63], huger=[1, 3, 10**30], nested=[1, [2], 3], tuples=[(1,), (2,), (3,)], bytes_list=[b'a', b'b', b'c'], nan=[1, float('nan'), 3], twice_str=['a', 'a', 'b'])

@pytest.mark.parametrize('name', BAD_IDS)
def test_bad_ids(gr, name):
    ids = BAD_IDS[name]
    refuses(gr, lambda g: g.index(ITEMS[:3], ids), 'ids')
    refuses(gr, lambda g: g.add(ITEMS[:3], ids), 'ids')
    if name not in ('few', 'many'): refuses(gr, lambda g: g.remove(ids), 'ids')


def test_ids_that_do_not_fit_the_pool(gr):
    refuses(gr, lambda g: g.add(ITEMS[:2], [1, 2]), 'ids: 2 is in the pool already')
    refuses(gr, lambda g: g.add(ITEMS[:2], ['a', 'b']), 'ids: expected int as in the pool, got str')
    refuses(gr, lambda g: g.add(ITEMS[:2], None), 'ids')
    refuses(gr, lambda g: g.remove([0, 1]), 'ids: 1 is not in the pool', KeyError)
    refuses(gr, lambda g: g.remove(['0']), 'is not in the pool', KeyError)
    with pytest.raises(TypeError): gr.add(ITEMS[:2])


@pytest.mark.parametrize('value', BAD_COUNTS, ids=repr)
@pytest.mark.parametrize('argument', ['k', 'beam', 'candidates'])
def test_bad_counts(gr, argument, value): refuses(gr, lambda g: g.search(QUERIES, **{argument: value}), f'{argument}: expected')


@pytest.mark.parametrize('value', ['yes', 1, None, [True]])
def test_bad_rerank(gr, value): refuses(gr, lambda g: g.search(QUERIES, rerank=value), 'rerank: expected True or False')


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.binary(max_size=2),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=1), inner, max_size=2) | st.tuples(inner, inner), max_leaves=8),
       st.sampled_from(['fit', 'fit queries', 'fit positives', 'index', 'index ids', 'add', 'add ids', 'remove', 'search', 'k', 'beam', 'candidates', 'rerank', 'dev', 'recipe', 'seed', 'device']))
def test_anything_at_all(value, where):
    "Whatever comes raises ValueError (KeyError for ids that are not there), or is a valid call"
    g = one('baseline')
    calls = {'fit': lambda: clone(g).fit(value), 'fit queries': lambda: clone(g).fit(ITEMS, value, POSITIVES), 'fit positives': lambda: clone(g).fit(ITEMS, QUERIES, value),
             'dev': lambda: clone(g).fit(ITEMS, dev=value), 'index': lambda: clone(g).index(value), 'index ids': lambda: clone(g).index(ITEMS[:2], value), 'add': lambda: clone(g).add(value, [1]),
             'add ids': lambda: clone(g).add(ITEMS[:1], value), 'remove': lambda: clone(g).remove(value), 'search': lambda: g.search(value), 'k': lambda: g.search(QUERIES, k=value),
             'beam': lambda: g.search(QUERIES, beam=value), 'candidates': lambda: g.search(QUERIES, candidates=value), 'rerank': lambda: g.search(QUERIES, rerank=value),
             'recipe': lambda: GenerativeRetriever(value), 'seed': lambda: GenerativeRetriever(seed=value), 'device': lambda: GenerativeRetriever(device=value)}
    before = view(g)
    try: calls[where]()
    except ValueError: pass
    except KeyError: assert where == 'remove'
    assert view(g) == before


@cache
def one(name): return made(name)


def clone(g):
    "Another retriever of the same parts and pool"
    c = GenerativeRetriever(g.recipe, g.seed, g.device)
    c._fitted, c._index = g._fitted, g._index
    return c


@pytest.mark.parametrize('change, says', [
    (dict(recipe='genus'), 'recipe: expected one of baseline, genius'), (dict(recipe=None), 'recipe'), (dict(recipe=[]), 'recipe'), (dict(recipe={}), 'recipe'), (dict(recipe=3), 'recipe'),
    (dict(seed=-1), 'seed'), (dict(seed=1.), 'seed'), (dict(seed='0'), 'seed'), (dict(seed=None), 'seed'), (dict(seed=True), 'seed'),
    (dict(device='tpu'), 'device'), (dict(device='nonsense'), 'device'), (dict(device=None), 'device'), (dict(device=7), 'device'), (dict(device=''), 'device'),
])
def test_bad_construction(change, says):
    with pytest.raises(ValueError, match=says): GenerativeRetriever(**change)


@pytest.mark.parametrize('field, value', [
    ('generator', 'prefx'), ('generator', None), ('K', 0), ('K', 1.5), ('K', 'abc'), ('K', (8, 8)), ('K', 10**6), ('K', None), ('L', 0), ('L', '3'), ('ids', 'both'), ('init', 3),
    ('weak', 'yes'), ('towers', 'yes'), ('towers', 2), ('dim', 0), ('dim', 'x'), ('tower_epochs', -1), ('tower_epochs', 'x'), ('tower_epochs', float('nan')), ('text_encoder', 5), ('d_model', 0), ('n_layers', -1),
    ('n_prefix', 1.5), ('steps', -1), ('steps', '9'), ('batch', 0), ('lr', 0), ('lr', -1), ('lr', 'x'), ('lr', float('nan')), ('lr', float('inf')), ('mix', -1), ('mix', 'x'), ('mix', float('nan')),
    ('lr', [1]), ('lr', True), ('own', 1), ('own', 'x'), ('own', float('nan')), ('noise', -1), ('noise', 'x'), ('noise', float('inf')), ('generator', ['light']), ('K', [8] * 8 + [None]),
])
def test_bad_recipes(field, value):
    with pytest.raises(ValueError, match=field): Recipe(**{field: value})


def test_settings_from_numpy_and_lists_are_saved(tmp_path):
    recipe = Recipe(K=[np.int64(8), 4], L=np.int32(2), lr=np.float32(1e-3), own=0)
    g = GenerativeRetriever(recipe, seed=np.int64(3), device='cpu').fit(ITEMS)
    g.save(tmp_path/'m')
    assert GenerativeRetriever.load(tmp_path/'m').recipe == recipe


@pytest.mark.parametrize('args, kwargs, says', [
    (('event',), {}, 'name: expected one of'), ((None,), {}, 'name'), (([],), {}, 'name'), (('events', 5), {}, 'size'), (('events', 10**7), {}, 'size'), (('events', 50.), {}, 'size'), (('events', '50'), {}, 'size'),
    (('events', 50, -1), {}, 'seed'), (('events', 50, 'x'), {}, 'seed'), (('events', 50), dict(views=3), 'views'), (('events', 50), dict(source='x'), 'source'), (('events', 50), dict(colour=1), 'colour'),
    (('events', 50), dict(queries=0), 'queries'), (('events', 50), dict(path='/nowhere'), 'path'), (('flickr8k', 50), dict(path='/nowhere'), 'size'), (('flickr8k',), dict(path='/nowhere', text='x'), 'text'),
    (('events', 50), dict(views=[1]), 'views'), (('events', 50), dict(source=[]), 'source'),
])
def test_bad_tasks(args, kwargs, says):
    with pytest.raises(ValueError, match=says): load_task(*args, **kwargs)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError): load_task('flickr8k', path=tmp_path/'nowhere')


def test_before_fit_and_before_index(tmp_path):
    g = GenerativeRetriever(SMALL['baseline'], device='cpu')
    for call in (lambda: g.index(ITEMS), lambda: g.search(QUERIES), lambda: g.add(ITEMS, None), lambda: g.remove([0]), lambda: g.stats(), lambda: g.save(tmp_path/'x')):
        with pytest.raises(ValueError, match='not fitted'): call()
    g.fit(ITEMS)
    for call in (lambda: g.search(QUERIES), lambda: g.add(ITEMS, None), lambda: g.remove([0]), lambda: g.stats()):
        with pytest.raises(ValueError, match='no pool'): call()
    g.save(tmp_path/'x')
    with pytest.raises(ValueError, match='no pool'): GenerativeRetriever.load(tmp_path/'x').search(QUERIES)
    assert list(tmp_path.iterdir()) == [tmp_path/'x']


def test_fitting_again_forgets_the_pool():
    g = made('baseline').fit(ITEMS[:20])
    with pytest.raises(ValueError, match='no pool'): g.search(QUERIES)


def test_what_needs_queries_says_so():
    for recipe, kw, says in [(SMALL['towers'], {}, 'queries: expected'), (SMALL['baseline'], dict(queries=np.ones((3, D + 1)), positives=[0, 1, 2], dev=np.arange(N) < 5), 'dev: expected')]:
        with pytest.raises(ValueError, match=says): GenerativeRetriever(recipe, device='cpu').fit(ITEMS, **kw)


# --- sizes far beyond the pool

@pytest.mark.parametrize('argument', ['beam', 'candidates'])
def test_more_than_there_is_means_all(gr, argument):
    "Room is made for what exists, not for what is asked"
    a, b = (gr.search(QUERIES[:2], k=3, **{**dict(beam=1000, candidates=1000), argument: n}) for n in (1000, 10**12))
    assert (a.ids == b.ids).all() and (a.scores == b.scores).all()


# --- damaged folders

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Folders of saved retrievers, of every kind of part, and what they find"
    out = {}
    for name, ids in dict(baseline=None, genius=None, grdr=None, towers=[f'i{n}' for n in range(N)]).items():
        g = GenerativeRetriever(SMALL[name], device='cpu').fit(ITEMS, QUERIES, POSITIVES).index(ITEMS, ids)
        folder = tmp_path_factory.mktemp('saved')/name
        g.save(folder)
        out[name] = folder, [t.tolist() for t in g.search(QUERIES, beam=9)]
    return out


def loads_or_refuses(folder, want, what):
    "ValueError, or the same lists as before"
    try: g = GenerativeRetriever.load(folder, device='cpu')
    except ValueError: return
    assert [t.tolist() for t in g.search(QUERIES, beam=9)] == want, f'{what}: loaded, but the lists changed'


@pytest.mark.parametrize('name', ['baseline', 'genius', 'towers'])
def test_a_truncated_file_is_refused(saved, tmp_path, name):
    folder, want = saved[name]
    shutil.copytree(folder, bad := tmp_path/'bad')
    for file in sorted(bad.iterdir()):
        whole = file.read_bytes()
        for cut in {0, 1, 8, 40, len(whole) // 2, len(whole) - 2}:
            file.write_bytes(whole[:cut])
            with pytest.raises(ValueError): GenerativeRetriever.load(bad, device='cpu')
        file.write_bytes(whole + b'}')
        with pytest.raises(ValueError): GenerativeRetriever.load(bad, device='cpu')
        file.write_bytes(whole)
    loads_or_refuses(bad, want, 'repaired')


@pytest.mark.parametrize('name', ['baseline', 'genius', 'towers'])
def test_a_flipped_byte_is_refused_or_harmless(saved, tmp_path, name):
    folder, want = saved[name]
    shutil.copytree(folder, bad := tmp_path/'bad')
    g = np.random.default_rng(0)
    for file in sorted(bad.iterdir()):
        whole = file.read_bytes()
        head = min(len(whole), 1200 if file.suffix == '.safetensors' else len(whole))
        for at in [*g.integers(0, head, 25), *g.integers(0, len(whole), 10)]:
            broken = bytearray(whole)
            broken[at] ^= int(g.integers(1, 256))
            file.write_bytes(broken)
            loads_or_refuses(bad, want, f'{file.name}, byte {at}: {whole[at]} to {broken[at]}')
        file.write_bytes(whole)


@pytest.mark.parametrize('name', ['baseline', 'towers'])
def test_a_missing_or_foreign_file_is_refused(saved, tmp_path, name):
    folder, want = saved[name]
    shutil.copytree(folder, bad := tmp_path/'bad')
    for file in sorted(bad.iterdir()):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=file.name if file.name != 'ids.json' else None): GenerativeRetriever.load(bad, device='cpu')
        for text in (b'[]', b'{}', b'null', b'3', b'{"version": 1}'):
            file.write_bytes(text)
            with pytest.raises(ValueError): GenerativeRetriever.load(bad, device='cpu')
        file.write_bytes(whole)


def test_places_that_hold_no_retriever(tmp_path, gr):
    (tmp_path/'file').write_text('x'); (tmp_path/'empty').mkdir(); (tmp_path/'other').mkdir(); (tmp_path/'other/mine').write_text('x')
    for place in ('nowhere', 'empty', 'other'):
        with pytest.raises(FileNotFoundError): GenerativeRetriever.load(tmp_path/place)
    with pytest.raises((ValueError, OSError)): GenerativeRetriever.load(tmp_path/'file')
    for place in ('file', 'other'): refuses(gr, lambda g: g.save(tmp_path/place), 'folder')
    assert (tmp_path/'file').read_text() == 'x' and (tmp_path/'other/mine').read_text() == 'x'
    with pytest.raises(ValueError, match='device'): gr.save(tmp_path/'empty'); GenerativeRetriever.load(tmp_path/'empty', device='tpu')


# --- round trips and determinism

@pytest.mark.parametrize('name', ['baseline', 'genius', 'grdr', 'towers'])
def test_what_is_loaded_is_what_was_saved(saved, tmp_path, name):
    folder, want = saved[name]
    g = GenerativeRetriever.load(folder, device='cpu')
    assert [t.tolist() for t in g.search(QUERIES, beam=9)] == want and g.recipe == SMALL[name]
    g.save(tmp_path/'again')
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path/'again').iterdir())
    for p in folder.iterdir(): assert p.read_bytes() == (tmp_path/'again'/p.name).read_bytes(), p.name
    g.add(ITEMS[:1], ['new'] if name == 'towers' else [99]).save(tmp_path/'again')                  # over the folder, and over itself
    h = GenerativeRetriever.load(tmp_path/'again', device='cpu')
    h.save(tmp_path/'again')
    assert GenerativeRetriever.load(tmp_path/'again', device='cpu').stats()['items'] == N + 1


SCRIPT = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
from test_retriever import *
print(*[mark(n) for n in ('baseline', 'genius', 'towers')])
"""

def mark(name):
    "A hash of everything that is learned and found"
    g = made(name, seed=3)
    parts = [p.arrays()[0] for p in (g._fitted.encoder, g._fitted.generator) if p is not None]
    return fingerprint(*g._fitted.quantizer.codebooks, g._index.codes, *[a[k] for a in parts for k in sorted(a)], *g.search(QUERIES))


def test_another_process_learns_and_finds_the_same():
    env = {**os.environ, 'PYTHONHASHSEED': '77', 'OMP_NUM_THREADS': str(torch.get_num_threads())}     # a seed fixes weights for one number of threads
    code = SCRIPT.format(tests=str(ROOT/'tests'), root=str(ROOT))
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr
    torch.rand(3); np.random.rand(3)                                               # the caller's random state plays no part
    assert r.stdout.split() == [mark(n) for n in ('baseline', 'genius', 'towers')]


def test_the_seed_matters_and_the_callers_random_state_does_not_change():
    torch.manual_seed(5); a = torch.rand(1); torch.manual_seed(5)
    g = made('genius', seed=1)
    assert torch.rand(1) == a
    assert not np.array_equal(g._fitted.quantizer.codebooks[0], made('genius', seed=2)._fitted.quantizer.codebooks[0])


# --- details of the lists

def test_shapes_and_kinds(gr):
    h = gr.search(QUERIES, k=50)
    assert h.ids.shape == h.scores.shape == (60, 50) and h.ids.dtype == np.int64 and h.scores.dtype == np.float32
    assert (h.ids[:, N:] == -1).all() and (h.scores[:, N:] == -np.inf).all() and (np.diff(h.scores[:, :N]) <= 0).all()
    for q in (np.zeros((0, D)), QUERIES[:0]): assert gr.search(q, k=3).ids.shape == (0, 3)
    same = [gr.search(x, k=3) for x in (QUERIES[:2], QUERIES[:2].tolist(), QUERIES[:2].astype(np.float64) * 7, np.asfortranarray(QUERIES[:2]), torch.from_numpy(QUERIES[:2]))]
    for s in same: assert (s.ids == same[0].ids).all()


def test_string_ids_and_views():
    x = rng.normal(size=(9, 3, D))
    g = GenerativeRetriever(SMALL['baseline'], device='cpu').fit(x).index(x, [f'é{i}' for i in range(9)])
    h = g.search(QUERIES[:3], k=12)
    assert h.ids.dtype == object and set(h.ids[0, 9:]) == {''} and set(h.ids[0, :9]) == {f'é{i}' for i in range(9)}
    cos = unit(QUERIES[:3]) @ unit(unit(x.astype(np.float32)).mean(1)).T
    assert np.allclose(h.scores[:, :9], -np.sort(-cos, 1), atol=1e-5)


@pytest.mark.parametrize('rerank', [True, False])
def test_ties_go_to_the_lower_id(gr, rerank):
    g = clone(gr).index(np.tile(ITEMS[:2], (15, 1)), np.arange(30)[::-1])
    for ids, scores in zip(*g.search(QUERIES, k=30, rerank=rerank)):
        for s in np.unique(scores): assert (np.diff(ids[scores == s]) > 0).all()


def test_candidates_below_k_are_raised_and_cut_exactly(gr):
    assert (gr.search(QUERIES, k=20, candidates=1).ids == gr.search(QUERIES, k=20, candidates=20).ids).all()
    first = gr.search(QUERIES, k=5, rerank=False).ids
    assert (np.sort(gr.search(QUERIES, k=5, candidates=5).ids, 1) == np.sort(first, 1)).all()
    assert (gr.search(QUERIES, k=5, candidates=3, rerank=False).ids == first).all()


def test_arrays_of_the_caller_stay_theirs(gr):
    x, ids, q = ITEMS.copy(), np.arange(N), QUERIES.copy()
    g = clone(gr).index(x, ids)
    want = g.search(q)
    assert (x == ITEMS).all() and (q == QUERIES).all()
    x[:], ids[:] = 1, 0
    got = g.search(q)
    assert (got.ids == want.ids).all() and (got.scores == want.scores).all()
    got.ids[:] = 0
    assert (g.search(q).ids == want.ids).all()


def test_unit_length_makes_the_pool(gr):
    a, b = clone(gr).index(ITEMS), clone(gr).index(ITEMS * np.linspace(1e-20, 1e20, N)[:, None])
    assert (a.search(QUERIES).ids == b.search(QUERIES).ids).all()


# --- any sequence of changes

class Pool(RuleBasedStateMachine):
    "The retriever beside a dict of unit vectors"
    @initialize(text=st.booleans(), n=st.integers(0, 12), seed=st.integers(0, 999), kind=st.sampled_from([('baseline', ()), ('genius', ()), ('grdr', ()), ('grdr', (3,))]))
    def begin(self, text, n, seed, kind):
        (recipe, self.views), self.text, self.g, self.next = kind, text, np.random.default_rng(seed), 0
        self.gr = clone(one(recipe))
        self.replace(n)

    def fresh(self, n):
        ids = self.g.permutation(3 * n)[:n] * 2**40 + self.next
        self.next += n * 2**42
        x = self.g.choice([-1., 0, 1], (n, *self.views, D)) + 1e-3                              # few directions: collisions and ties
        return [f'n{i}' for i in ids] if self.text else ids.tolist(), x.astype(np.float32)

    @rule(n=st.integers(0, 12))
    def replace(self, n):
        ids, x = self.fresh(n)
        self.gr.index(x, ids if n else None)
        self.pool = dict(zip(ids, x))

    @rule(n=st.integers(0, 5))
    def add(self, n):
        ids, x = self.fresh(n)
        self.gr.add(x, ids)
        self.pool.update(zip(ids, x))

    @precondition(lambda self: getattr(self, 'pool', None))
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.lists(st.sampled_from(sorted(self.pool)), unique=True, max_size=len(self.pool)))
        self.gr.remove(gone)
        for i in gone: del self.pool[i]

    @precondition(lambda self: getattr(self, 'pool', None))
    @rule(data=st.data())
    def refuse(self, data):
        taken = data.draw(st.sampled_from(sorted(self.pool)))
        with pytest.raises(ValueError): self.gr.add(self.pool[taken][None], [taken])
        with pytest.raises(KeyError): self.gr.remove([taken, 'nowhere' if self.text else 1])

    @rule()
    def merge(self): self.gr.merge()

    @rule(data=st.data())
    def saved(self, data):
        "The same bytes as a fresh index of the same items, in any order"
        with tempfile.TemporaryDirectory() as d:
            self.gr.save(Path(d, 'a'))
            fresh = clone(self.gr).index(np.array([self.pool[i] for i in sorted(self.pool)] or np.zeros((0, *self.views, D))), sorted(self.pool) or None)
            fresh.save(Path(d, 'b'))
            for p in Path(d, 'a').iterdir():
                if self.pool: assert p.read_bytes() == Path(d, 'b', p.name).read_bytes(), p.name

    @rule(k=st.integers(1, 15), rerank=st.booleans(), limit=st.sampled_from([None, 'mask', 'ids', 'name']), share=st.sampled_from([0, .2, .7]))
    def search(self, k, rerank, limit, share):
        q, ids = self.g.normal(size=(2, D)).astype(np.float32), sorted(self.pool)
        mask = self.g.random(len(ids)) < share
        pool = self.pool if limit is None else {i: self.pool[i] for i, m in zip(ids, mask) if m}
        if limit == 'name': self.gr.name_filter('some', list(pool))
        given = dict(mask=mask, ids=list(pool), name='some').get(limit)
        hits, n = self.gr.search(q, k=k, beam=100, candidates=100, rerank=rerank, filter=given), min(k, len(pool))
        for row, scores, query in zip(*hits, unit(q).astype(np.float64)):
            found, s = row[:n].tolist(), scores[:n]
            assert len(set(found)) == n and set(found) <= set(pool)
            assert (scores[n:] == -np.inf).all() and all(i in (-1, '') for i in row[n:].tolist()) and (np.diff(s) <= 0).all()
            assert all(a < b for a, b, x, y in zip(found, found[1:], s, s[1:]) if x == y)
            if not rerank or not n: continue
            cos = {i: float((unit(v).astype(np.float64) @ query).max()) for i, v in pool.items()}   # the best view counts
            assert np.allclose(s, sorted(cos.values(), reverse=True)[:n], atol=1e-5) and np.allclose(s, [cos[i] for i in found], atol=1e-5)
        assert self.gr.stats()['items'] == len(self.pool)


Pool.TestCase.settings = settings(max_examples=35, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
TestPool = Pool.TestCase


# --- changes and filters

def big(n=3000, seed=0, **kw):
    "A retriever over n items, and more items to come"
    g = np.random.default_rng(seed)
    return clone(one('baseline')).index(unit(g.normal(size=(n, D)).astype(np.float32)), np.arange(n) * 10, **kw), unit(g.normal(size=(4000, D)).astype(np.float32))


def everything(gr, n): return gr.search(QUERIES, k=n, beam=9999, candidates=9999)


def test_a_merge_begins_by_itself_and_changes_nothing_that_is_found():
    gr, more = big()
    gr.add(more[:900], np.arange(900) * 10 + 5)
    assert gr._index.changed and gr._changes.merge is None
    want = everything(gr.remove(np.arange(100) * 10), 50)
    gr.add(more[900:1000], np.arange(100) * 10 + 7)                                # 1,100 changes: more than 1,024
    assert gr._changes.merge is not None or not gr._index.changed
    assert not gr.merge()._index.changed and gr._index.items == 3900 == gr.stats()['items']
    got = everything(gr.remove(np.arange(100) * 10 + 7), 50)
    assert (got.ids == want.ids).all() and np.allclose(got.scores, want.scores, atol=1e-6)


def test_changes_during_a_merge_are_made_again(monkeypatch):
    import grnb.retriever as module
    go, inside = threading.Event(), threading.Event()
    slow = lambda pool, merge=module.merge_pool: (inside.set(), go.wait(30), merge(pool))[-1]
    monkeypatch.setattr(module, 'merge_pool', slow)
    gr, more = big()
    gr.add(more[:1100], np.arange(1100) * 10 + 5)
    inside.wait(30)
    gr.add(more[1100:1110], np.arange(10) * 10 + 1).remove([0, 5, 10, 1]).name_filter('few', [11, 15, 20]).add(more[:1], [0])
    before, few = everything(gr, 30), gr.search(QUERIES, k=5, filter='few')
    go.set()
    gr.merge()
    after = everything(gr, 30)
    assert (after.ids == before.ids).all() and gr._index.items == 3000 + 1110 - 4 + 1 and not gr._index.changed
    assert (gr.search(QUERIES, k=5, filter='few').ids == few.ids).all() and (np.sort(few.ids, 1)[:, -3:] == [11, 15, 20]).all()


def test_what_ends_a_merge_is_warned_of_once_and_the_pool_stays(monkeypatch):
    import grnb.retriever as module
    gr, more = big()
    tries = []
    def fails(pool): tries.append(1); raise MemoryError('no room')
    def add(a, b):
        gr.add(more[a:b], np.arange(a, b) * 10 + 5)
        for t in threading.enumerate(): t.name == 'grnb merge' and t.join()
    monkeypatch.setattr(module, 'merge_pool', fails)
    add(0, 1100)
    with pytest.warns(RuntimeWarning, match='merging the pool in the background failed.*no room') as w: got = gr.search(QUERIES)
    assert len(w) == 1 and w[0].filename == __file__ and got.ids.shape == (60, 10) and gr._index.items == 4100 and len(tries) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                             # said once
        want = everything(gr, 20)
        add(1100, 2200)                                                            # 2,200 changes are not more than twice 1,100
        assert len(tries) == 1 and gr._index.items == 5200
        with pytest.raises(RuntimeError, match='merging the pool failed') as e: gr.merge()
        assert isinstance(e.value.__cause__, MemoryError) and len(tries) == 2
        everything(gr, 20)                                                         # merge has said it
        add(2200, 2300)
        assert len(tries) == 2 and gr._changes.failed == 2200
        want = everything(gr, 20)
        monkeypatch.undo()
        assert (everything(gr.merge(), 20).ids == want.ids).all() and gr._changes.failed == 0


def test_a_failed_merge_is_tried_again_when_changes_have_doubled(monkeypatch):
    import grnb.retriever as module
    gr, more = big()
    tries = []
    def fails(pool): tries.append(1); raise MemoryError('no room')
    monkeypatch.setattr(module, 'merge_pool', fails)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for a, b, n in ((0, 1100, 1), (1100, 2200, 1), (2200, 2210, 2), (2210, 3900, 2)):
            gr.add(more[a:b], np.arange(a, b) * 10 + 5)
            for t in threading.enumerate(): t.name == 'grnb merge' and t.join()
            assert len(tries) == n


def test_a_new_index_ends_a_merge(monkeypatch):
    import grnb.retriever as module
    go = threading.Event()
    monkeypatch.setattr(module, 'merge_pool', lambda pool, merge=module.merge_pool: (go.wait(30), merge(pool))[-1])
    gr, more = big()
    gr.add(more[:1100], np.arange(1100) * 10 + 5)
    task = gr._changes.merge
    gr.index(ITEMS)
    go.set(); task.join()
    assert gr._index.items == N and not gr._index.changed and gr.search(QUERIES, k=50).ids.max() == N - 1


def test_ties_go_to_the_lower_id_among_old_and_new():
    gr = clone(one('baseline')).index(np.tile(ITEMS[:1], (5, 1)), [10, 20, 30, 40, 50])
    gr.add(np.tile(ITEMS[:1], (4, 1)), [25, 5, 60, 26]).remove([30])
    for kw in (dict(), dict(rerank=False), dict(candidates=4), dict(filter=[60, 26, 5, 40])):
        ids = gr.search(QUERIES[:2], k=4, **kw).ids
        assert (ids == ([5, 26, 40, 60] if 'filter' in kw else [5, 10, 20, 25])).all(), kw
    assert (gr.merge().search(QUERIES[:2], k=4).ids == [5, 10, 20, 25]).all()


@pytest.mark.parametrize('which, error, says', [
    ('nothing', KeyError, "'nothing' is not the name"), ([1], KeyError, '1 is not in the pool'), (['0'], KeyError, "'0' is not in the pool"), (np.ones(N - 1, bool), ValueError, f'a mask of {N} items'),
    ([True] * 3, ValueError, 'a mask of'), (np.ones((N, 1), bool), ValueError, 'a mask of'), ([0, 0], ValueError, 'each id once'), ([.5], ValueError, 'filter'), (3, ValueError, 'filter'), ([None], ValueError, 'filter'),
    (b'ab', ValueError, 'filter'), ([[0]], ValueError, 'filter'),
])
def test_bad_filters(gr, which, error, says):
    refuses(gr, lambda g: g.search(QUERIES, filter=which), says, error)
    if not isinstance(which, str): refuses(gr, lambda g: g.name_filter('a', which), says, error)


def test_named_filters(gr):
    for name in ('', None, 3): refuses(gr, lambda g: g.name_filter(name, [0]), 'name')
    refuses(gr, lambda g: g.name_filter('a', 'b'), 'which')
    g = clone(gr).index(ITEMS, np.arange(N) * 2).name_filter('low', np.arange(N) < 5).name_filter('one', [8])
    found = lambda name: sorted(i for i in g.search(QUERIES[:1], k=N, filter=name).ids[0].tolist() if i >= 0)
    assert found('low') == [0, 2, 4, 6, 8] and found('one') == [8] and found([]) == []
    g.add(ITEMS[:2], [1, 3]).remove([2])                                           # what comes later is outside
    assert found('low') == [0, 4, 6, 8]
    g.name_filter('low', [1, 4]).merge()
    assert found('low') == [1, 4] and found('one') == [8]
    g.remove([8]).name_filter('low', None)
    assert found('one') == [] and list(g._index.filters) == ['one']
    g.remove(g._index.ids[g._index.rows] if not g._index.new else [0]).add(ITEMS[:1], [8])
    assert found('one') == []                                                      # a new item of an old id is new


@pytest.mark.parametrize('mode', ['unique', 'bucket'])
def test_either_kind_of_id_may_change(mode):
    g = GenerativeRetriever(Recipe(K=4, L=2, ids=mode), device='cpu').fit(ITEMS).index(ITEMS[:20], np.arange(20))
    g.name_filter('old', [1, 2, 3]).add(ITEMS[20:], np.arange(20, N)).remove([3, 25])
    fresh = clone(g).index(np.delete(ITEMS, [3, 25], 0), np.delete(np.arange(N), [3, 25]))
    assert (g.search(QUERIES, k=50).ids == fresh.search(QUERIES, k=50).ids).all()
    assert set(g.search(QUERIES[:1], k=9, filter='old').ids[0].tolist()) == {1, 2, -1}


def test_half_precision_and_mapped_vectors(tmp_path):
    "Vectors of a large pool may be fp16 and on disk; changes and merges leave them there"
    import grnb.pool as module
    g = clone(one('baseline')).index(ITEMS, np.arange(N))
    np.save(tmp_path/'v.npy', g._index.vectors.astype(np.float16))
    mapped = module.make_pool(g._fitted, g._index.ids, np.load(tmp_path/'v.npy', mmap_mode='r'), g._index.codes)
    g._index = mapped
    g.add(ITEMS[:3], [100, 101, 50]).remove([7])
    want = g.search(QUERIES, k=12)
    cos = unit(QUERIES) @ unit(np.r_[np.delete(ITEMS, 7, 0), ITEMS[:3]]).T
    assert np.allclose(want.scores, -np.sort(-cos, 1)[:, :12], atol=2e-3) and g._index.vectors.base is mapped.vectors
    slots = module._taken(g._index.vectors, g._index.rows, most=0)
    assert isinstance(slots, module.Vectors) and slots.base is mapped.vectors and (slots[np.arange(3)] == g._index.vectors[g._index.rows[:3]]).all()
    assert (g.merge().search(QUERIES, k=12).ids == want.ids).all() and g._index.vectors.dtype == np.float16


def test_a_search_takes_no_lock():
    "While a change holds the lock, searches go on"
    g, done = made('baseline'), []
    with g._changes.lock:
        t = threading.Thread(target=lambda: done.append(g.search(QUERIES[:2], k=3)), daemon=True)
        t.start(); t.join(20)
        assert len(done) == 1


def test_parts_and_pool_belong_together():
    "Between the two halves of a fit a search sees the parts its pool was made with; an index under way does not survive a fit"
    import grnb.retriever as module
    g, other = clone(one('baseline')), GenerativeRetriever(Recipe(K=4, L=3), device='cpu').fit(ITEMS[:, :5])
    pool, want = g._index, g.search(QUERIES, k=5)
    g._fitted = other._fitted                                                      # as far as a fit has come
    assert module._need(g) == (pool.fitted, pool) and (g.search(QUERIES, k=5).ids == want.ids).all()
    for call in (lambda: g.index(ITEMS), lambda: g.add(ITEMS[:1], [99])):
        with pytest.raises(ValueError, match='fitted anew during the call'): call()
    assert g._index is pool


@pytest.mark.parametrize('name', ['baseline', 'genius', 'grdr'])
@pytest.mark.parametrize('how', ['pickle', 'deepcopy'])
def test_copies_of_every_kind(name, how):
    import copy, pickle
    again = (lambda g: pickle.loads(pickle.dumps(g))) if how == 'pickle' else copy.deepcopy
    g = made(name).add(ITEMS[:3] + .1, [1, 3, 5]).remove([4, 1]).name_filter('few', [0, 3, 6])
    c = again(g)
    a, b = (x.search(QUERIES, k=60, beam=999, candidates=999) for x in (g, c))
    assert (a.ids == b.ids).all() and np.allclose(a.scores, b.scores, atol=1e-6) and not c._index.changed and c._index.fitted is c._fitted is not g._fitted
    assert (c.search(QUERIES, k=3, filter='few').ids == g.search(QUERIES, k=3, filter='few').ids).all()
    c.add(ITEMS[:1], [99]).merge()
    assert g._index.items == N + 1 and c._index.items == N + 2
    empty, fresh = again(g.remove(g._index.ids[g._index.ids > 4]).remove([0, 2, 3, 5])), again(GenerativeRetriever(SMALL[name], device='cpu'))
    assert empty._index.items == 0 and (empty.search(QUERIES, k=2, filter='few').ids == -1).all() and fresh._fitted is None and fresh._index is None


def test_a_copy_changes_alone():
    import copy
    g = made('baseline')
    c = copy.copy(g)
    c.add(ITEMS[:1], [99]); g.add(ITEMS[1:2], [99])
    assert c._changes.lock is not g._changes.lock and c.search(ITEMS[:1], k=2).ids[0].tolist() == [0, 99] and g.search(ITEMS[1:2], k=2).ids[0].tolist() == [2, 99]


# --- text queries

def test_texts_end_to_end(tmp_path):
    import grnb.recipes as recipes
    if recipes.TextEncoder is None: pytest.skip('no text encoder yet')
    words = 'red green blue one two three'.split()
    texts = [f'{words[i % 3]} {words[3 + i % 2]} {i}' for i in range(60)]
    g = GenerativeRetriever(Recipe(K=8, L=2, dim=8), device='cpu').fit(ITEMS, texts, POSITIVES).index(ITEMS)
    want = g.search(texts[:5], k=3)
    assert want.ids.shape == (5, 3) and g.search([], k=3).ids.shape == (0, 3)
    g.save(tmp_path/'t')
    got = GenerativeRetriever.load(tmp_path/'t', device='cpu').search(texts[:5], k=3)
    assert (got.ids == want.ids).all() and (got.scores == want.scores).all()
    for bad in ('red one', ['red', 3], [''], ['  '], QUERIES, None, [None], b'red'):
        with pytest.raises(ValueError, match='queries'): g.search(bad)
    with pytest.raises(ValueError, match='positives'): g.fit(ITEMS, texts, POSITIVES[:-1])
    assert (g.search(texts[:5], k=3).ids == want.ids).all()
