"""GENIUS's combiner, modality level and residual codes against plain numpy, and on awkward data."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grnb.core import load_arrays
from grnb.tokenizer.genius import GENIUS, Combiner, Modal, _fuse, _fuse_all, _pack, _pair_loss, _some, modal, modality
from grnb.tokenizer.load import load_quantizer

SMALL = dict(K=6, L=2, projection=8, hidden=16, steps=9, batch=16, device='cpu')


def world(N=60, D=8, per=2, seed=0):
    "Items of three kinds, queries of three kinds, and whose they are"
    g = np.random.default_rng(seed)
    x, kind = g.normal(size=(2, N, D)).astype(np.float32), np.arange(N) % 3
    pos = np.repeat(np.arange(N), per)
    k = g.integers(3, size=len(pos))
    return Modal(x[0], x[1], kind != 1, kind != 0), Modal(x[0][pos] + .1, x[1][pos] - .1, k != 1, k != 0), pos


def cut(m, rows): return Modal(*[None if a is None else a[rows] for a in m])


def state(L=2, K=7, D=10, P=4, H=9, seed=0):
    "A released state dict of the stated structure: twelve arrays of the combiner, four buffers a level, and level 0 once more under another name"
    g = np.random.default_rng(seed)
    w = lambda *shape: g.normal(size=shape).astype(np.float32) / 2
    s = {}
    for name, (o, i) in dict(text_projection_layer=(P, D), image_projection_layer=(P, D), combiner_layer=(H, 2 * P), output_layer=(D, H),
                             **{'dynamic_scalar.0': (H, 2 * P), 'dynamic_scalar.3': (1, H)}).items():
        s[f'encoder.{name}.weight'], s[f'encoder.{name}.bias'] = w(o, i), w(o)
    for l in range(L + 1):
        k = 3 if l == 0 else K
        for stem in [f'residual_rq.layers.{l}._codebook'] + ['vq._codebook'] * (l == 0):
            s |= {f'{stem}.initted': np.ones(1, np.float32), f'{stem}.cluster_size': np.ones((1, k), np.float32),
                  f'{stem}.embed_avg': w(1, k, D), f'{stem}.embed': w(1, k, D) / (l + 1)}
    return s


def combined(s, image, text, image_mask, text_mask):
    "The fact sheet's combiner in float64: masked inputs, text first, the gate on the text; then unit length"
    lin = lambda name, x: x @ s[f'encoder.{name}.weight'].astype(np.float64).T + s[f'encoder.{name}.bias']
    relu = lambda x: np.maximum(x, 0)
    t, v = text * text_mask[:, None], image * image_mask[:, None]
    h = np.concatenate([relu(lin('text_projection_layer', t)), relu(lin('image_projection_layer', v))], 1)
    gate = 1 / (1 + np.exp(-lin('dynamic_scalar.3', relu(lin('dynamic_scalar.0', h)))))
    z = lin('output_layer', relu(lin('combiner_layer', h))) + gate * t + (1 - gate) * v
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def residual_codes(z, books):
    "Euclidean argmin level by level, the sum of codewords, and the narrowest choice"
    codes, r, gap = np.zeros((len(z), len(books)), int), z.astype(np.float64), np.inf
    for l, C in enumerate(books):
        d = ((r[:, None] - C.astype(np.float64)) ** 2).sum(-1)
        codes[:, l] = d.argmin(1)
        gap = min(gap, np.diff(np.sort(d, 1)[:, :2], axis=1).min(initial=np.inf))
        r = r - C[codes[:, l]]
    return codes, z - r, gap


@pytest.fixture(scope='module')
def fitted():
    x, q, pos = world()
    return x, q, pos, GENIUS(**SMALL).fit(x, q, pos)


# --- what an item has

@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([(True, False), (False, True), (True, True)]), min_size=1, max_size=20), st.integers(0, 99))
def test_masks_say_the_modality_and_clear_the_rest(masks, seed):
    g = np.random.default_rng(seed)
    a, b = g.normal(size=(2, len(masks), 3)).astype(np.float32)
    im, tx = (np.array(m) for m in zip(*masks))
    m = modal(Modal(a, b, im, tx.astype(int)))
    assert modality(m).tolist() == [{(1, 0): 0, (0, 1): 1, (1, 1): 2}[k] for k in masks]
    assert (m.image[~im] == 0).all() and (m.image[im] == a[im]).all() and (m.text[~tx] == 0).all() and (m.text[tx] == b[tx]).all()
    assert m.image_mask.dtype == bool and m.text_mask.dtype == bool


def test_plain_arrays_are_images_or_texts():
    x = np.ones((4, 3), np.float32)
    assert (modality(modal(x)) == 0).all() and (modality(modal(x, 'text')) == 1).all() and (modality(modal(Modal(x, x))) == 2).all()
    assert (modality(modal(Modal(None, x))) == 1).all() and (modal(Modal(None, x)).image == 0).all()


# --- the combiner

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999))
def test_combiner_is_the_formula(seed):
    s = state(seed=seed)
    c = Combiner(10, 4, 9)
    c.load_state_dict({k[8:]: torch.from_numpy(v) for k, v in s.items() if k.startswith('encoder.')})
    g = np.random.default_rng(seed)
    image, text = g.normal(size=(2, 6, 10)).astype(np.float32)
    im, tx = np.array([1, 0, 1, 1, 0, 1], bool), np.array([0, 1, 1, 0, 1, 1], bool)
    m = modal(Modal(image, text, im, tx))
    with torch.no_grad(): got = c(torch.from_numpy(m.image), torch.from_numpy(m.text)).numpy()
    assert np.allclose(got, combined(s, image, text, im, tx), atol=1e-5) and np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_a_missing_modality_adds_nothing_itself_but_its_bias_does():
    s = state()
    q = GENIUS.from_released(s, device='cpu')
    x, y = np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
    alone = q.embed(Modal(x, None))
    assert (q.embed(Modal(x, y, np.ones(5), np.zeros(5))) == alone).all()                   # whatever is stored for a missing text
    s['encoder.text_projection_layer.bias'] = s['encoder.text_projection_layer.bias'] + 1
    moved = GENIUS.from_released(s, device='cpu').embed(Modal(x, None))
    assert not np.allclose(moved, alone, atol=1e-3)
    assert np.allclose(moved, combined(s, x, y, np.ones(5), np.zeros(5)), atol=1e-5)


# --- codes

def test_shapes_and_first_codes(fitted):
    x, q, pos, m = fitted
    codes = m.encode(x)
    assert codes.shape == (60, 3) and codes.dtype == np.uint8 and m.sizes == (3, 6, 6) and m.latent and (codes.max(0) < m.sizes).all()
    assert (codes[:, 0] == np.arange(60) % 3).all() and (m.encode(q)[:, 0] == modality(modal(q))).all()
    assert m.decode(codes).shape == (60, 8) and np.allclose(np.linalg.norm(m.decode(codes), axis=1), 1, atol=1e-5)
    assert (m.encode(x.image) == m.encode(Modal(x.image, None))).all() and (m.encode(x.image)[:, 0] == 0).all()
    views = np.stack([x.image, x.text], 1)
    assert m.encode(views).shape == (60, 2, 3) and (m.encode(views)[:, 1] == m.encode(x.text)).all()
    empty = Modal(x.image[:0], None)
    assert m.encode(empty).shape == m.encode(x.image[:0]).shape == (0, 3) and m.decode(codes[:0]).shape == (0, 8) and m.embed(empty).shape == (0, 8)


@pytest.mark.parametrize('kw', [{}, dict(modality='nearest')])
def test_codes_are_those_of_the_formula(kw):
    "First code by mask or by distance, its codeword subtracted, then the nearest codeword of each level"
    x, q, pos = world()
    m = GENIUS(**SMALL, **kw).fit(x, q, pos)
    z, first = m.embed(x), m.codebooks[0]
    kind = np.arange(60) % 3 if not kw else residual_codes(z, [first])[0][:, 0]
    want = np.c_[kind, residual_codes(z - first[kind], m.codebooks[1:])[0]]
    assert (m.encode(x) == want).mean() > .99
    total = sum(b[want[:, l]] for l, b in enumerate(m.codebooks))
    assert np.allclose(m.decode(want), total / np.linalg.norm(total, axis=1, keepdims=True), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 20), st.integers(0, 9999))
def test_released_codes_are_those_of_the_formulas(L, K, seed):
    s = state(L, K, seed=seed)
    g = np.random.default_rng(seed + 1)
    image, text, im = *g.normal(size=(2, 9, 10)).astype(np.float32), g.random(9) < .6
    tx = ~im | (g.random(9) < .5)
    q = GENIUS.from_released(s, device='cpu')
    want, total, gap = residual_codes(combined(s, image, text, im, tx), [s[f'residual_rq.layers.{l}._codebook.embed'][0] for l in range(L + 1)])
    assert q.sizes == (3,) + (K,) * L and q.settings['modality'] == 'nearest'
    if gap > 1e-5:
        assert (q.encode(Modal(image, text, im, tx)) == want).all()
        assert np.allclose(q.decode(want), total / np.linalg.norm(total, axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize('drop, says', [
    ('encoder.text_projection_layer.weight', r'text_projection_layer.weight: expected an array of shape \(\*, \*\), found none'),
    ('encoder.image_projection_layer.bias', r'image_projection_layer.bias: expected an array of shape \(4\), found none'),
    ('encoder.dynamic_scalar.3.weight', r'dynamic_scalar.3.weight: expected an array of shape \(1, 9\), found none'),
    ('residual_rq.layers.0._codebook.embed', r'layers.0._codebook.embed: expected an array of shape \(1, 3, 10\), found none'),
    ('residual_rq.layers.1._codebook.embed', r'layers.1._codebook.embed: expected an array of shape \(1, \*, 10\), found none')])
def test_a_released_file_that_lacks_a_part(drop, says):
    s = state()
    del s[drop]
    with pytest.raises(ValueError, match=says): GENIUS.from_released(s)


def test_a_released_file_of_other_shapes():
    for key, shape, says in [('encoder.output_layer.weight', (9, 10), r'output_layer.weight: expected shape \(10, 9\), got \(9, 10\)'),
                             ('residual_rq.layers.0._codebook.embed', (1, 4, 10), r'layers.0.*expected shape \(1, 3, 10\), got \(1, 4, 10\)'),
                             ('residual_rq.layers.2._codebook.embed', (7, 10), r'layers.2.*expected shape \(1, \*, 10\), got \(7, 10\)')]:
        with pytest.raises(ValueError, match=says): GENIUS.from_released(state() | {key: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match='combiner_layer.bias: expected finite'): GENIUS.from_released(state() | {'encoder.combiner_layer.bias': np.full(9, np.inf)})


@pytest.mark.parametrize('batch', [1, 7, 4096])
def test_codes_do_not_depend_on_the_batch(fitted, batch):
    m, big = fitted[3], world(700, seed=5)[0]
    whole, n = m.encode(big), 140 if batch < 9 else 700
    assert (np.concatenate([m.encode(cut(big, slice(i, min(i + batch, n)))) for i in range(0, n, batch)]) == whole[:n]).all()


def test_a_memory_map_is_read_like_an_array(fitted, tmp_path):
    x, q, pos, m = fitted
    f = np.memmap(tmp_path/'x', np.float32, 'w+', shape=x.image.shape)
    f[:] = x.image
    assert (m.encode(f) == m.encode(x.image)).all() and (m.encode(x._replace(image=f)) == m.encode(x)).all()
    assert (GENIUS(**SMALL).fit(x._replace(image=f), q, pos).encode(x) == m.encode(x)).all()
    f[33, 2] = np.nan
    with pytest.raises(ValueError, match='items: expected finite'): m.encode(f)


def mapped():
    "Megabytes of mapped files that this process holds in memory"
    status = Path('/proc/self/status')
    if not status.exists(): pytest.skip('no /proc')
    return int(next(l for l in status.read_text().splitlines() if l.startswith('RssFile')).split()[1]) / 1024


def test_maps_are_read_by_rows_and_not_kept_in_memory(fitted, tmp_path):
    "19 MB of images and texts: the pages do not stay; masked rows, and rows drawn at random, are those of the arrays"
    (x, q, pos, m), g = fitted, np.random.default_rng(0)
    big = g.normal(size=(2, 300_000, 8)).astype(np.float32)
    big.tofile(tmp_path/'x')
    both, im = np.memmap(tmp_path/'x', np.float32, 'r', shape=big.shape), np.arange(300_000) % 2 == 0
    before, codes = mapped(), m.encode(Modal(both[0], both[1], im, ~im))
    assert mapped() < before + 8
    for i in (0, 4090, 299_990): assert (codes[i:i + 10] == m.encode(Modal(big[0, i:i + 10], big[1, i:i + 10], im[i:i + 10], ~im[i:i + 10]))).all()
    rows = np.array([7, 3, 299_999, 3])
    assert all((_some(both[k], r) == big[k][r]).all() for k in (0, 1) for r in (rows, slice(5, 9), slice(299_998, 300_500)))


def test_start_rows_are_fused_in_blocks(monkeypatch):
    "The widest layers never see all start rows at once, and what comes out is what one forward gives"
    x, whole, seen = world(3000)[0], Combiner.forward, []
    monkeypatch.setattr(Combiner, 'forward', lambda self, image, text: (seen.append(len(image)), whole(self, image, text))[1])
    m = GENIUS(**{**SMALL, 'steps': 0}).fit(x)
    assert max(seen) <= 256
    packed = torch.from_numpy(_pack(x, slice(None), 'image', 'items'))
    z, kind = _fuse_all(m.model, lambda rows: packed[rows], np.arange(3000))
    want = _fuse(m.model, packed)
    assert torch.allclose(z, want[0], atol=1e-6) and (kind == want[1]).all()


def test_the_device_may_be_left_open(fitted):
    x, _, _, m = fitted
    assert (m.encode(x, device='auto') == m.encode(x)).mean() > .99 and np.allclose(m.embed(x.image, device='auto'), m.embed(x.image), atol=1e-3)
    with pytest.raises(ValueError, match='device: '): m.encode(x, device='tpu')


def test_errors_name_the_row_of_the_data(fitted, tmp_path):
    m, x = fitted[3], np.ones((6000, 8), np.float32)
    mask = np.arange(6000) != 5555
    x.tofile(tmp_path/'x')
    for a in (x, np.memmap(tmp_path/'x', np.float32, 'r', shape=x.shape)):
        with pytest.raises(ValueError, match='items: row 5555 has neither'): m.encode(Modal(a, None, mask))
        with pytest.raises(ValueError, match='items: row 5555 has neither'): GENIUS(**SMALL).fit(Modal(a, None, mask))
        with pytest.raises(ValueError, match='items: row 5555 has neither'): GENIUS(**SMALL).fit(Modal(a, None, mask), x[:3], np.array([7, 5555, 8]))
    views = np.ones((6000, 2, 8), np.float32)
    views[5555] = 0
    with pytest.raises(ValueError, match=r'items: row \[5555, 0\] is zero'): GENIUS(**SMALL).fit(views)


# --- training

@pytest.mark.parametrize('kw', [{}, dict(modality='nearest')])
def test_losses_are_the_formulas(kw):
    "The three terms of one batch, written out in numpy"
    x, q, pos = world(12, per=1)
    m = GENIUS(**{**SMALL, **kw, 'steps': 0, 'revive': 0.}).fit(x, q, pos)
    zq, zp, books = m.embed(q).astype(np.float64), m.embed(x).astype(np.float64), m.codebooks
    cq, cp = m.encode(q).astype(int), m.encode(x).astype(int)
    batch = tuple(torch.from_numpy(_pack(a, slice(None), 'image', 'items')) for a in (q, x)) + (torch.from_numpy(pos),)
    commit, hats, z, c = 0, 0, np.concatenate([zq, zp]), np.concatenate([cq, cp])
    r = z
    for l, b in enumerate(books):
        commit, hats = commit + ((b[c[:, l]] - r) ** 2).mean() / len(books), hats + b[c[:, l]]
        r = r - b[c[:, l]]
    hats = hats / np.linalg.norm(hats, axis=1, keepdims=True)
    s, log = zq @ zp.T / .01, lambda a: a - a.max(1, keepdims=True) - np.log(np.exp(a - a.max(1, keepdims=True)).sum(1, keepdims=True))
    want = -(np.diag(log(s)).mean() + np.diag(log(s.T)).mean()) / 2 + 100 * commit + 100 * ((hats[:12] - hats[12:]) ** 2).mean()
    assert np.isclose(float(_pair_loss(m.model, batch, m.settings).detach()), want, rtol=1e-3)


def test_the_first_codeword_is_the_mean_of_its_modality():
    x, q, pos = world(90)
    m = GENIUS(**{**SMALL, 'steps': 0}).fit(x)
    z, kind = m.embed(x), np.arange(90) % 3
    for k in range(3): assert np.allclose(m.codebooks[0][k], z[kind == k].mean(0), atol=1e-5)
    m = GENIUS(**SMALL).fit(x.image)
    assert (m.codebooks[0][1:] == 0).all() and (m.encode(x)[:, 0] == kind).all()            # kinds never seen: no codeword, but their code


def test_training_brings_pairs_together():
    "Texts are images turned by a fixed matrix: at first they find their images no better than chance, 0.08"
    g = np.random.default_rng(0)
    image = g.normal(size=(120, 8)).astype(np.float32)
    text = (image @ g.normal(size=(8, 8))).astype(np.float32)
    def first_ten(steps):
        m = GENIUS(**{**SMALL, 'steps': steps, 'batch': 64, 'projection': 32, 'hidden': 32, 'lr': 3e-3}).fit(image, text, np.arange(120))
        s = m.embed(Modal(None, text)) @ m.embed(image).T
        return ((s > np.diag(s)[:, None]).sum(1) < 10).mean()
    assert first_ten(0) < .3 and first_ten(120) > .7


def test_without_queries_the_combiner_stays_and_codebooks_learn():
    x = world(300)[0]
    a, b = (GENIUS(**{**SMALL, 'steps': n, 'K': 16}).fit(x) for n in (0, 60))
    assert (a.embed(x) == b.embed(x)).all()
    assert np.allclose(a.embed(x.image), x.image / np.linalg.norm(x.image, axis=1, keepdims=True), atol=1e-5)
    assert not np.allclose(a.codebooks[1], b.codebooks[1]) and (b.embed(x) * b.decode(b.encode(x))).sum(1).mean() > .7


def test_plain_queries_are_texts(fitted):
    x, q, pos, _ = fitted
    a, b = (GENIUS(**SMALL).fit(x.image, p, pos) for p in (q.text, Modal(None, q.text)))
    assert (a.encode(x) == b.encode(x)).all() and all((u == v).all() for u, v in zip(a.arrays()[0].values(), b.arrays()[0].values()))


def test_same_seed_same_codes_in_another_process(fitted, tmp_path):
    x, q, pos, m = fitted
    code = f'''
import sys, numpy as np; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_genius import *
x, q, pos = world()
np.save({str(tmp_path/"codes.npy")!r}, GENIUS(**SMALL).fit(x, q, pos).encode(x))'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': str(torch.get_num_threads())})
    assert r.returncode == 0, r.stderr[-2000:]
    assert (np.load(tmp_path/'codes.npy') == m.encode(x)).all()
    assert not (GENIUS(**{**SMALL, 'seed': 1}).fit(x, q, pos).encode(x) == m.encode(x)).all()


@pytest.mark.parametrize('alone', [False, True])
def test_a_stopped_fit_goes_on(tmp_path, monkeypatch, alone):
    "Stopped after its last checkpoint but one, and resumed: the same weights to the bit"
    import grnb.tokenizer.genius as g
    x, q, pos = world()
    args, name = ((), '_running') if alone else ((q, pos), '_pair_loss')
    kw = {**SMALL, 'steps': 220 if alone else 60}
    want, calls, whole = GENIUS(**kw).fit(x, *args), [], getattr(g, name)

    def broken(*a):
        calls.append(1)
        if len(calls) == kw['steps'] - 5: raise KeyboardInterrupt
        return whole(*a)
    monkeypatch.setattr(g, name, broken)
    with pytest.raises(KeyboardInterrupt): GENIUS(**kw).fit(x, *args, checkpoint=tmp_path)
    calls.clear()
    again = GENIUS(**kw).fit(x, *args, checkpoint=tmp_path)
    assert len(calls) < 40                                             # it went on, it did not start again
    for a, b in zip(again.arrays()[0].values(), want.arrays()[0].values()): assert (a == b).all()
    with pytest.raises(ValueError, match='checkpoint'): GENIUS(**kw).fit(cut(x, slice(0, 50)), *(() if alone else (cut(q, slice(0, 100)), pos[:100])), checkpoint=tmp_path)
    if not alone:                                                      # whose the queries are counts, too
        with pytest.raises(ValueError, match='checkpoint'): GENIUS(**kw).fit(x, q, pos[::-1].copy(), checkpoint=tmp_path)


# --- files and bad input

def test_save_and_load(fitted, tmp_path):
    x, q, pos, m = fitted
    for m in (m, GENIUS.from_released(state(D=8), device='cpu'), GENIUS(**{**SMALL, 'K': (4, 300)}).fit(x)):
        m.save(tmp_path/'q.safetensors')
        assert type(load_quantizer(tmp_path/'q.safetensors')) is GENIUS
        arrays, meta = load_arrays(tmp_path/'q.safetensors')
        assert meta.pop('kind') == 'genius'
        r = GENIUS.from_arrays(arrays, meta)
        assert (r.encode(x) == m.encode(x)).all() and (r.decode(m.encode(x)) == m.decode(m.encode(x))).all()
        r.save(tmp_path/'again.safetensors')
        assert (tmp_path/'again.safetensors').read_bytes() == (tmp_path/'q.safetensors').read_bytes()
        for k in meta:
            with pytest.raises((KeyError, TypeError)): GENIUS.from_arrays(arrays, {a: b for a, b in meta.items() if a != k})
        for k in arrays:
            with pytest.raises((KeyError, RuntimeError)): GENIUS.from_arrays({a: b for a, b in arrays.items() if a != k}, meta)
    assert m.encode(x).dtype == np.uint16


@pytest.mark.parametrize('N', [1, 2, 5])
def test_fewer_items_than_codes(N):
    x, q, pos = world(N)
    for m in (GENIUS(**{**SMALL, 'K': 16}).fit(x, q, pos), GENIUS(**{**SMALL, 'K': 16}).fit(x), GENIUS(**{**SMALL, 'K': 16}, modality='nearest').fit(x, q, pos)):
        assert m.encode(x).shape == (N, 3) and np.isfinite(m.decode(m.encode(x))).all()


def test_constant_and_repeated_items():
    x = np.repeat(np.random.default_rng(0).normal(size=(2, 6)), 20, 0).astype(np.float32)
    m = GENIUS(**SMALL).fit(x, x, np.arange(40))
    codes = m.encode(x)
    assert (codes[:20] == codes[0]).all() and (codes[20:] == codes[20]).all() and np.isfinite(m.decode(codes)).all()
    m = GENIUS(**SMALL).fit(np.ones((30, 6), np.float32))
    assert (m.encode(np.ones((3, 6))) == m.encode(np.ones((1, 6)))).all() and np.isfinite(m.decode(m.encode(np.ones((3, 6))))).all()


X, Q, P = world(20)
ONE, TWO = np.ones((3, 4), np.float32), np.ones((3, 5), np.float32)


@pytest.mark.parametrize('make, says', [
    (lambda: GENIUS(K=0), 'K: expected at least 1'), (lambda: GENIUS(K=(4, 4), L=3), 'K: expected one number or 3'), (lambda: GENIUS(L=0), 'L: '),
    (lambda: GENIUS(modality='guess'), 'modality: expected masks or nearest'), (lambda: GENIUS(pair=-1.), 'pair: expected a weight'),
    (lambda: GENIUS(temperature=0.), 'temperature: '), (lambda: GENIUS(lr=0.), 'lr: expected above'), (lambda: GENIUS(lr=np.nan), 'lr: '), (lambda: GENIUS(weight_decay=-.1), 'weight_decay: expected'),
    (lambda: GENIUS(revive=1.), 'revive: '), (lambda: GENIUS(decay=1.), 'decay: '), (lambda: GENIUS(seed=-1), 'seed: '),
    (lambda: GENIUS(steps=2.5), 'steps: '), (lambda: GENIUS().encode(X), 'not fitted'), (lambda: GENIUS().decode([[1]]), 'not fitted'), (lambda: GENIUS().embed(X), 'not fitted'),
    (lambda: GENIUS().fit(ONE[:0]), 'items: expected at least one'), (lambda: GENIUS().fit(ONE * np.nan), 'items: expected finite'),
    (lambda: GENIUS().fit(Modal(ONE * np.nan, None)), 'items.image: expected finite'), (lambda: GENIUS().fit(Modal(None, None)), 'items: expected image or text'),
    (lambda: GENIUS().fit(Modal(ONE, TWO)), 'items: expected image and text of one shape'), (lambda: GENIUS().fit(Modal(ONE, ONE[:2])), 'items: .* of one length'),
    (lambda: GENIUS().fit(Modal(ONE, ONE, [1, 0], [1, 1])), 'items: .* of one length'), (lambda: GENIUS().fit(Modal(ONE, ONE, [1, 0, 1], [1, 0, 1])), 'items: row 1 has neither'),
    (lambda: GENIUS().fit(Modal(ONE, None, [1, 1, 1], [0, 1, 0])), 'text_mask: 1 rows have it, but the array is None'),
    (lambda: GENIUS().fit(Modal(ONE, ONE, [1, 2, 1], [1, 1, 1])), 'image_mask: expected 3 values, each 0 or 1'), (lambda: GENIUS().fit(Modal(ONE, ONE, [1, .5, 1], [1, 1, 1])), 'image_mask: '),
    (lambda: GENIUS().fit(X, Q), 'queries, positives: expected both'), (lambda: GENIUS().fit(X, Q, P[:-1]), 'positives: expected 40 integers'),
    (lambda: GENIUS().fit(X, Q, P + 1), 'positives: expected numbers from 0 and below 20'), (lambda: GENIUS().fit(X, cut(Q, slice(0)), P[:0]), 'queries: expected at least one'),
    (lambda: GENIUS().fit(X, Q.text[:, :5], P), 'queries: expected width 8, got 5'), (lambda: GENIUS().fit(X, Q._replace(text=Q.text * np.inf), P), 'queries.text: expected finite'),
])
def test_bad_settings_and_data(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_a_refused_fit_leaves_the_quantiser_as_it_was(fitted):
    x, q, pos, m = fitted
    before = m.encode(x)
    with pytest.raises(ValueError): m.fit(x, q, pos + 1)
    with pytest.raises(ValueError): m.fit(ONE * np.nan)
    assert (m.encode(x) == before).all()


@pytest.mark.parametrize('stop', [KeyboardInterrupt, MemoryError])
def test_a_fit_that_stops_leaves_the_quantiser_as_it_was(fitted, tmp_path, monkeypatch, stop):
    "Stopped while it trains on vectors of another width, or by a row that only training reads"
    import grnb.tokenizer.genius as g
    x, q, pos, _ = fitted
    m, new = GENIUS(**SMALL).fit(x, q, pos), GENIUS(**SMALL)
    before, arrays = m.encode(x), {k: v.copy() for k, v in m.arrays()[0].items()}
    f = np.memmap(tmp_path/'x', np.float32, 'w+', shape=(60, 9))
    f[:] = 1
    f[40] = np.nan
    with pytest.raises(ValueError, match='expected finite'): m.fit(Modal(f, None))

    def broken(*a): raise stop
    monkeypatch.setattr(g, '_pair_loss', broken)
    for p in (m, new):
        with pytest.raises(stop): p.fit(x.image[:, :5], q.text[:, :5], pos)
    assert (m.encode(x) == before).all() and m.D == 8 and all((v == arrays[k]).all() for k, v in m.arrays()[0].items()) and new.model is None
    with pytest.raises(ValueError, match='not fitted'): new.encode(x)


def test_bad_codes_and_widths(fitted):
    x, _, _, m = fitted
    for make, says in [(lambda: m.encode(x.image[:, :5]), 'items: expected width 8, got 5'), (lambda: m.encode(Modal(x.image[:, :5], None)), 'items.image: expected width 8, got 5'),
                       (lambda: m.encode(x._replace(text_mask=None, image_mask=np.zeros(60), text=None)), 'row 0 has neither'), (lambda: m.encode(x.image * np.nan), 'items: expected finite'),
                       (lambda: m.decode(np.full((1, 3), 3)), 'codes: expected values below'), (lambda: m.decode(np.zeros((1, 2), int)), 'codes: expected integers'),
                       (lambda: m.decode(np.zeros((1, 3))), 'codes: expected integers')]:
        with pytest.raises(ValueError, match=says): make()
