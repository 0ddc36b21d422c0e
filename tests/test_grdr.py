"""GRDR's views and cosine quantiser against the released formulas written out in numpy, and on awkward data."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grnb.core import load_arrays
from grnb.tokenizer.grdr import GRDR, _centred, _views_loss, _PHASES, assign_views
from grnb.tokenizer.load import load_quantizer

SMALL = dict(V=3, K=6, L=3, steps=9, batch=16, device='cpu')


def world(N=50, D=8, per=4, seed=0):
    g = np.random.default_rng(seed)
    x = g.normal(size=(N, D)).astype(np.float32)
    pos = np.repeat(np.arange(N), per)
    return x, (x[pos] + g.normal(size=(len(pos), D))).astype(np.float32), pos


def state(V=3, L=2, K=7, D=10, dim=6, seed=0, names='video_rqvae.rq.vq_layers.{}.embedding.weight'):
    "A released state dict with random weights, and a tensor of T5 that is not ours"
    g = np.random.default_rng(seed)
    w = lambda *shape: g.normal(size=shape).astype(np.float32)
    s = {'model.shared.weight': w(4, 4), 'logit_scale': np.float32(4.6)}
    for v in range(V):
        for side, (a, b) in dict(encoder=(dim, D), decoder=(D, dim)).items():
            s[f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.weight'], s[f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.bias'] = w(a, b), w(a)
    for l in range(L): s[names.format(l)] = w(K, dim) / (l + 1)
    return s


def released_codes(s, x, V, L, names='video_rqvae.rq.vq_layers.{}.embedding.weight'):
    "Fact by fact: heads, then per level unit residual, cosine distance 2 − 2cos, argmin, raw code subtracted; with the two nearest distances"
    out, gap = np.zeros((len(x), V, L), int), np.inf
    sums = np.zeros((len(x), V, s[names.format(0)].shape[1]))
    for v in range(V):
        r = x.astype(np.float64) @ s[f'video_rqvae.encoder.mlps.{v}.mlp_layers.1.weight'].T + s[f'video_rqvae.encoder.mlps.{v}.mlp_layers.1.bias']
        for l in range(L):
            C = s[names.format(l)].astype(np.float64)
            d = 2 - 2 * (r / np.linalg.norm(r, axis=1, keepdims=True)) @ (C / np.linalg.norm(C, axis=1, keepdims=True)).T
            out[:, v, l] = d.argmin(1)
            gap = min(gap, np.diff(np.sort(d, 1)[:, :2]).min())
            r = r - C[out[:, v, l]]
            sums[:, v] += C[out[:, v, l]]
    decoded = np.mean([sums[:, v] @ s[f'video_rqvae.decoder.mlps.{v}.mlp_layers.1.weight'].T + s[f'video_rqvae.decoder.mlps.{v}.mlp_layers.1.bias'] for v in range(V)], 0)
    return out, decoded, gap


@pytest.fixture(scope='module')
def fitted():
    x, c, pos = world()
    return x, c, pos, GRDR(**SMALL).fit(x, c, pos)


# --- captions to views

def inertia(x, label): return sum(((x[label == c] - x[label == c].mean(0)) ** 2).sum() for c in np.unique(label))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9999))
def test_views_of_an_item_are_near_the_best_partition(n, V, seed):
    "All partitions of few captions are tried"
    from itertools import product
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, 2)).astype(np.float32)
    label = assign_views(x, np.zeros(n, int), V, seed)
    k = min(n, V)
    assert label.shape == (n,) and len(np.unique(label)) <= k and label.max() < k and label[0] == 0
    best = min(inertia(x, np.array(p)) for p in product(range(k), repeat=n))
    assert inertia(x, label) <= best * 1.3 + 1e-6                      # Lloyd stops at a local optimum; ten starts find a good one


def test_views_match_sklearn():
    "The same inertia as its KMeans with ten starts, item by item"
    from sklearn.cluster import KMeans
    g = np.random.default_rng(0)
    x = (np.repeat(g.normal(size=(40, 16)), 5, 0) + .7 * g.normal(size=(200, 16))).astype(np.float32)
    pos = np.repeat(np.arange(10), 20)
    ours, ratios = assign_views(x, pos, 4), []
    for i in range(10): ratios.append(inertia(x[pos == i], ours[pos == i]) / KMeans(4, n_init=10, random_state=42).fit(x[pos == i]).inertia_)
    assert np.mean(ratios) < 1.01 and max(ratios) < 1.05


def test_views_do_not_depend_on_other_items_or_order():
    x, c, pos = world(12, per=5)
    whole, some = assign_views(c, pos, 3), np.isin(pos, (3, 7))
    assert (assign_views(c[some], pos[some], 3) == whole[some]).all()
    inter = np.argsort(np.tile(np.arange(5), 12), kind='stable')       # all first captions, then all second ones, ...
    assert (assign_views(c[inter], pos[inter], 3) == whole[inter]).all()


def test_views_on_awkward_captions():
    same = np.ones((5, 3), np.float32)
    assert (assign_views(same, np.zeros(5, int), 4) == 0).all()                             # equal captions have one view
    assert (assign_views(same, np.arange(5), 4) == 0).all()                                 # one caption an item
    assert assign_views(same[:3], np.zeros(3, int), 4).tolist() == [0, 1, 2]                # no more captions than views: one each
    assert assign_views(same[:0], np.zeros(0, int), 4).shape == (0,)
    assert (assign_views(world()[1], world()[2], 1) == 0).all()


# --- the quantiser

def test_shapes_and_ranges(fitted):
    x, c, pos, q = fitted
    codes = q.encode(x)
    assert codes.shape == (50, 3, 3) and codes.dtype == np.uint8 and codes.max() < 6 and q.sizes == (6, 6, 6) and q.latent
    assert q.decode(codes).shape == q.decode(codes[:, 0]).shape == (50, 8) and q.views(x).shape == (50, 3, 8) and q.embed(c).shape == (200, 8)
    assert np.allclose(np.linalg.norm(q.decode(codes), axis=1), 1, atol=1e-5)
    assert q.encode(x[:0]).shape == (0, 3, 3) and q.decode(codes[:0]).shape == (0, 8) and q.views(x[:0]).shape == (0, 3, 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 20), st.integers(0, 9999), st.sampled_from(
    ['video_rqvae.rq.vq_layers.{}.embedding.weight', 'code_embedding.{}.weight', 'centroids.{}.codebook.weight']))
def test_released_codes_are_those_of_the_formulas(V, L, K, seed, names):
    s = state(V, L, K, seed=seed, names=names)
    x = np.random.default_rng(seed + 1).normal(size=(9, 10)).astype(np.float32) * 3
    q = GRDR.from_released(s, device='cpu')
    want, decoded, gap = released_codes(s, x, V, L, names)
    assert q.V == V and q.sizes == (K,) * L and not q.settings['unit']
    if gap > 1e-5:
        assert (q.encode(x) == want).all()
        assert np.allclose(q.decode(want), decoded, atol=1e-3)


def test_one_id_is_read_by_all_heads():
    s = state(2, 2)
    q = GRDR.from_released(s, device='cpu')
    codes = np.array([[1, 2], [0, 5]])
    zq = sum(s[f'video_rqvae.rq.vq_layers.{l}.embedding.weight'][codes[:, l]] for l in range(2))
    want = np.mean([zq @ s[f'video_rqvae.decoder.mlps.{v}.mlp_layers.1.weight'].T + s[f'video_rqvae.decoder.mlps.{v}.mlp_layers.1.bias'] for v in range(2)], 0)
    assert np.allclose(q.decode(codes), want, atol=1e-4)


def test_fitted_codes_are_those_of_the_formulas(fitted):
    "The same recomputation on a fitted model: items scaled to unit length first"
    x, _, _, q = fitted
    m = q.model
    s = {f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.{part}': getattr(m, f'{side[:3]}_{part[0]}')[v].numpy() for v in range(3) for side in ('encoder', 'decoder') for part in ('weight', 'bias')}
    s |= {f'video_rqvae.rq.vq_layers.{l}.embedding.weight': b for l, b in enumerate(q.codebooks)}
    want, decoded, _ = released_codes(s, x / np.linalg.norm(x, axis=1, keepdims=True), 3, 3)
    assert (q.encode(x) == want).mean() > .99
    assert np.allclose(q.decode(want), decoded / np.linalg.norm(decoded, axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize('drop, says', [
    ('video_rqvae.encoder.mlps.1.mlp_layers.1.bias', r'encoder.mlps.1.mlp_layers.1.bias: expected an array of shape \(6\), found none'),
    ('video_rqvae.encoder.mlps.0.mlp_layers.1.weight', r'mlps.0.mlp_layers.1.weight: expected an array of shape \(\*, \*\), found none'),
    ('video_rqvae.decoder.mlps.2.mlp_layers.1.weight', r'decoder.mlps.2.mlp_layers.1.weight: expected an array of shape \(10, 6\), found none'),
    ('video_rqvae.rq.vq_layers.0.embedding.weight', r'vq_layers.0.embedding.weight: expected an array of shape \(\*, 6\), found none')])
def test_a_released_file_that_lacks_a_part(drop, says):
    s = state()
    del s[drop]
    with pytest.raises(ValueError, match=says): GRDR.from_released(s)


def test_a_released_file_of_other_shapes():
    key = 'video_rqvae.decoder.mlps.1.mlp_layers.1.weight'
    with pytest.raises(ValueError, match=r'decoder.mlps.1.*expected shape \(10, 6\), got \(6, 10\)'): GRDR.from_released(state() | {key: np.zeros((6, 10), np.float32)})
    with pytest.raises(ValueError, match='vq_layers.1.*expected shape'): GRDR.from_released(state() | {'video_rqvae.rq.vq_layers.1.embedding.weight': np.zeros((8, 6))})
    with pytest.raises(ValueError, match='mlps.1.*expected finite'): GRDR.from_released(state() | {key: np.full((10, 6), np.nan)})


@pytest.mark.parametrize('batch', [1, 7, 4096])
def test_codes_do_not_depend_on_the_batch(fitted, batch):
    x, _, _, q = fitted
    big = np.random.default_rng(5).normal(size=(700, 8)).astype(np.float32)
    part = [q.encode(big[i:i + batch]) for i in range(0, 140 if batch < 9 else len(big), batch)]
    assert (np.concatenate(part) == q.encode(big)[:sum(map(len, part))]).all()


def test_views_of_an_item_are_averaged_on_entry(fitted):
    x, _, _, q = fitted
    both = np.stack([x, x * 2], 1)
    assert (q.encode(both) == q.encode(x)).mean() > .99 and q.encode(both).shape == (50, 3, 3)
    a, b = np.random.default_rng(1).normal(size=(2, 50, 8)).astype(np.float32)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    assert (q.encode(np.stack([a, b], 1)) == q.encode(unit(a) + unit(b))).mean() > .99


def test_a_memory_map_is_read_like_an_array(fitted, tmp_path):
    x, c, pos, q = fitted
    m = np.memmap(tmp_path/'x', np.float32, 'w+', shape=x.shape)
    m[:] = x
    assert (q.encode(m) == q.encode(x)).all()
    assert (GRDR(**SMALL).fit(m, c, pos).encode(x) == q.encode(x)).all()
    m[33, 2] = np.nan
    with pytest.raises(ValueError, match='items: expected finite'): q.encode(m)


def mapped():
    "Megabytes of mapped files that this process holds in memory"
    status = Path('/proc/self/status')
    if not status.exists(): pytest.skip('no /proc')
    return int(next(l for l in status.read_text().splitlines() if l.startswith('RssFile')).split()[1]) / 1024


def test_a_map_of_views_is_read_in_blocks_and_not_kept_in_memory(fitted, tmp_path):
    "24 MB of three views an item: the pages do not stay, the codes are those of the array, block borders included"
    x, q = np.random.default_rng(0).normal(size=(250_000, 3, 8)).astype(np.float32), fitted[3]
    x.tofile(tmp_path/'x')
    m, before = np.memmap(tmp_path/'x', np.float32, 'r', shape=x.shape), mapped()
    codes = q.encode(m)
    assert mapped() < before + 8
    for i in (0, 1270, 249_990): assert (codes[i:i + 10] == q.encode(x[i:i + 10])).all()
    for bad in (m[:, :0], m[..., :5]):
        with pytest.raises(ValueError, match='items: expected'): q.encode(bad)


def test_the_device_may_be_left_open(fitted):
    x, _, _, q = fitted
    assert (q.encode(x, device='auto') == q.encode(x)).mean() > .99 and np.allclose(q.views(x, device='auto'), q.views(x), atol=1e-3)
    with pytest.raises(ValueError, match='device: '): q.encode(x, device='tpu')


def test_errors_name_the_row_of_the_data(fitted, tmp_path):
    q, x = fitted[3], np.random.default_rng(0).normal(size=(6000, 2, 8)).astype(np.float32)
    x[5555] = 0
    x.tofile(tmp_path/'x')
    for a in (x, np.memmap(tmp_path/'x', np.float32, 'r', shape=x.shape)):
        with pytest.raises(ValueError, match=r'items: row \[5555, 0\] is zero'): q.encode(a)
        with pytest.raises(ValueError, match=r'items: row \[5555\] is zero'): q.encode(a[:, 0])
    m = np.memmap(tmp_path/'x', np.float32, 'r', shape=x.shape)
    with pytest.raises(ValueError, match=r'items: row \[5555, 0\] is zero'): GRDR(**SMALL).fit(m)                # a start row, in whatever order they are drawn
    with pytest.raises(ValueError, match=r'items: row \[5555, 0\] is zero'): GRDR(**SMALL).fit(m, x[:6, 0], np.array([9, 4, 5555, 9, 2, 1]))


# --- training

def test_centred_residuals():
    "Prefix means are gone, the mean of all is back, and a single prefix changes nothing"
    g = np.random.default_rng(0)
    r, prefix = g.normal(size=(60, 5)).astype(np.float32), g.integers(3, size=(60, 2))
    y = _centred(r, prefix)
    for p in np.unique(prefix, axis=0): assert np.allclose(y[(prefix == p).all(1)].mean(0), r.mean(0), atol=1e-5)
    assert np.allclose(_centred(r, np.zeros((60, 2), int)), r, atol=1e-5) and _centred(r, prefix[:, :0]) is r


def test_losses_are_the_formulas():
    "Reconstruction and quantiser terms of a batch, written out in numpy"
    x, c, pos = world(20)
    q = GRDR(**{**SMALL, 'steps': 0}).fit(x)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = (torch.from_numpy(x), torch.zeros(20, dtype=torch.long), None, None)
    z = q.views(x).astype(np.float64)
    rq, r, total = 0, z, 0
    for b in q.codebooks:
        u = r / np.linalg.norm(r, axis=-1, keepdims=True)
        e = b[(u @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T).argmax(-1)]
        rq, r, total = rq + (1 + .65) * ((e - u) ** 2).mean() / 3, r - e, total + e
    m = q.model
    back = np.mean([total[:, v] @ m.dec_w[v].numpy().T + m.dec_b[v].numpy() for v in range(3)], 0)
    recon = (1 - (back * x).sum(1) / np.linalg.norm(back, axis=1)).mean()
    assert np.isclose(float(_views_loss(m, rows, _PHASES['with_it'], 2, None)), .3 * rq + .1 * recon, atol=1e-4)


def test_caption_and_drift_terms_are_the_formulas():
    "Both phases of the second level, written out in numpy: captions at temperature 0.07, older levels at 100 cos"
    x, c, pos = world(20, per=2)
    q = GRDR(**{**SMALL, 'steps': 6}).fit(x, c, pos)
    unit, log = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True), lambda a: a - a.max(1, keepdims=True) - np.log(np.exp(a - a.max(1, keepdims=True)).sum(1, keepdims=True))
    m, x, c, view = q.model, unit(x), unit(c), np.random.default_rng(1).integers(3, size=40)
    old = copy.deepcopy(m)
    with torch.no_grad(): m.enc_w.add_(.2 * torch.randn(m.enc_w.shape, generator=torch.Generator().manual_seed(0)))
    z, before = (np.array([xi.astype('f8') @ k.enc_w[v].numpy().T + k.enc_b[v].numpy() for xi, v in zip(x[pos], view)]) for k in (m, old))
    C, near = q.codebooks, lambda r, b: (unit(r) @ unit(b).T).argmax(1)
    drift = -log(100 * unit(z) @ unit(C[0]).T)[np.arange(40), near(before, C[0])].mean()
    zq = C[0][near(z, C[0])]
    zq = zq + C[1][near(z - zq, C[1])]
    same = (pos[:, None] == pos) & ~np.eye(40, dtype=bool)
    for phase, to, weights in (('before', z, (.5, .5)), ('with_it', zq, (.2, .8))):
        s = np.where(same, -1e9, unit(c @ m.ask.weight.numpy().T) @ unit(to).T / .07)
        captions = -(np.diag(log(s)).mean() + np.diag(log(s.T)).mean()) / 2
        batch = tuple(map(torch.from_numpy, (x[pos], view, c, pos)))
        only = dict(_PHASES[phase], recon=0., rq=1e-12 if phase == 'with_it' else 0.)                          # quantised, without the weight of it
        assert captions > .1 and drift > .1 and np.isclose(float(_views_loss(m, batch, only, 1, old)), np.dot(weights, (captions, drift)), rtol=1e-3)
    assert (_PHASES['with_it']['recon'], _PHASES['with_it']['rq'], _PHASES['before']['recon'], _PHASES['before']['rq']) == (.1, .3, 0, 0)


def test_older_codebooks_stay_and_the_newest_moves(monkeypatch):
    x, c, pos = world()
    books = []
    whole = GRDR._fit_level
    monkeypatch.setattr(GRDR, '_fit_level', lambda self, *a: (whole(self, *a), books.append([b.words.detach().numpy().copy() for b in self.model.levels.levels]))[0])
    GRDR(**SMALL).fit(x, c, pos)
    assert (books[0][0] == books[1][0]).all() and (books[1][:2][1] == books[2][1]).all() and not np.allclose(books[0][1], books[1][1])


def test_captions_find_their_items():
    "Training brings a caption's vector nearer to its item than chance, and given views are kept to"
    x, c, pos = world(60, 8, 6)
    views = (np.arange(len(pos)) % 2)
    q = GRDR(V=2, K=8, L=2, steps=120, batch=64, device='cpu').fit(x, c, pos, views=views)
    e, z = q.embed(c), q.views(x)
    e, z = e / np.linalg.norm(e, axis=-1, keepdims=True), z / np.linalg.norm(z, axis=-1, keepdims=True)
    score = np.einsum('qd,nvd->qnv', e, z).max(2)
    assert ((score > score[np.arange(len(pos)), pos][:, None]).sum(1) < 6).mean() > .5      # chance is 0.1


def test_without_captions_the_reconstruction_learns():
    x = world(300, 8)[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cos = [(x * q.decode(q.encode(x))).sum(1).mean() for q in (GRDR(V=2, K=16, L=2, steps=s, batch=64, device='cpu').fit(x) for s in (0, 100))]
    assert cos[1] > cos[0] + .1 and cos[1] > .6
    with pytest.raises(ValueError, match='fitted without'): GRDR(**SMALL).fit(x).embed(x)


def test_same_seed_same_codes_in_another_process(fitted, tmp_path):
    x, c, pos, q = fitted
    code = f'''
import sys, numpy as np; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_grdr import *
x, c, pos = world()
np.save({str(tmp_path/"codes.npy")!r}, GRDR(**SMALL).fit(x, c, pos).encode(x))'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': str(torch.get_num_threads())})
    assert r.returncode == 0, r.stderr[-2000:]
    assert (np.load(tmp_path/'codes.npy') == q.encode(x)).all()
    assert not (GRDR(**{**SMALL, 'seed': 1}).fit(x, c, pos).encode(x) == q.encode(x)).all()


def test_a_stopped_fit_goes_on(fitted, tmp_path, monkeypatch):
    "Stopped in the second level, and resumed: the same weights to the bit"
    x, c, pos, q = fitted
    whole, calls = GRDR._fit_level, []

    def broken(self, *a):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return whole(self, *a)
    monkeypatch.setattr(GRDR, '_fit_level', broken)
    with pytest.raises(KeyboardInterrupt): GRDR(**SMALL).fit(x, c, pos, checkpoint=tmp_path)
    monkeypatch.setattr(GRDR, '_fit_level', whole)
    again = GRDR(**SMALL).fit(x, c, pos, checkpoint=tmp_path)
    for a, b in zip(again.arrays()[0].values(), q.arrays()[0].values()): assert (a == b).all()
    with pytest.raises(ValueError, match='checkpoint'): GRDR(**SMALL).fit(x + 1, c, pos, checkpoint=tmp_path)
    with pytest.raises(ValueError, match='checkpoint'): GRDR(**SMALL, beta=.1).fit(x, c, pos, checkpoint=tmp_path)


def test_a_checkpoint_belongs_to_all_rows_and_to_the_views(tmp_path):
    "In its first phase already, which starts from the same weights whatever the data"
    x, c, pos = world(400, per=1)
    few = GRDR(**SMALL | dict(L=1, steps=3))
    few.fit(x, c, pos, checkpoint=tmp_path)
    with pytest.raises(ValueError, match='checkpoint: .*level0-before'): few.fit(x, c, pos, views=np.arange(400) % 3, checkpoint=tmp_path)
    x[399, 0] += 1
    with pytest.raises(ValueError, match='checkpoint: .*level0-before'): few.fit(x, c, pos, checkpoint=tmp_path)


# --- files and bad input

def test_save_and_load(fitted, tmp_path):
    x, c, pos, q = fitted
    for q in (q, GRDR.from_released(state(D=8), device='cpu'), GRDR(**SMALL, dim=5).fit(x)):
        q.save(tmp_path/'q.safetensors')
        assert type(load_quantizer(tmp_path/'q.safetensors')) is GRDR
        arrays, meta = load_arrays(tmp_path/'q.safetensors')
        assert meta.pop('kind') == 'grdr'
        r = GRDR.from_arrays(arrays, meta)
        assert (r.encode(x) == q.encode(x)).all() and (r.decode(q.encode(x)) == q.decode(q.encode(x))).all()
        r.save(tmp_path/'again.safetensors')
        assert (tmp_path/'again.safetensors').read_bytes() == (tmp_path/'q.safetensors').read_bytes()
        for k in meta:
            with pytest.raises((KeyError, TypeError)): GRDR.from_arrays(arrays, {a: b for a, b in meta.items() if a != k})
        for k in arrays:
            with pytest.raises((KeyError, RuntimeError)): GRDR.from_arrays({a: b for a, b in arrays.items() if a != k}, meta)


@pytest.mark.parametrize('N', [1, 2, 5])
def test_fewer_items_than_codes(N):
    x, c, pos = world(N, 8, 3)
    for q in (GRDR(V=2, K=16, L=3, steps=6, batch=8, device='cpu').fit(x, c, pos), GRDR(V=2, K=16, L=3, steps=6, batch=8, device='cpu').fit(x)):
        codes = q.encode(x)
        assert codes.shape == (N, 2, 3) and codes.max() < 16 and np.isfinite(q.decode(codes)).all()


def test_constant_and_repeated_items():
    x = np.repeat(np.random.default_rng(0).normal(size=(2, 6)), 20, 0).astype(np.float32)
    q = GRDR(V=2, K=4, L=2, steps=9, batch=8, device='cpu').fit(x)
    codes = q.encode(x)
    assert (codes[:20] == codes[0]).all() and (codes[20:] == codes[20]).all() and np.isfinite(q.decode(codes)).all()
    q = GRDR(V=2, K=4, L=2, steps=9, batch=8, device='cpu').fit(np.ones((30, 6), np.float32))
    assert (q.encode(np.ones((3, 6))) == q.encode(np.ones((1, 6)))).all() and np.isfinite(q.views(np.ones((3, 6)))).all()


X, C, P = world(20)


@pytest.mark.parametrize('make, says', [
    (lambda: GRDR(V=0), 'V: expected at least 1'), (lambda: GRDR(K=2.5), 'K: '), (lambda: GRDR(L=0), 'L: '), (lambda: GRDR(steps=-1), 'steps: '),
    (lambda: GRDR(dim=0), 'dim: '), (lambda: GRDR(lr=0.), 'lr: expected'), (lambda: GRDR(lr=np.nan), 'lr: '), (lambda: GRDR(beta=-.1), 'beta: expected'), (lambda: GRDR(beta=np.inf), 'beta: '),
    (lambda: GRDR(seed=-1), 'seed: '), (lambda: GRDR().encode(X), 'not fitted'), (lambda: GRDR().decode([[1]]), 'not fitted'),
    (lambda: GRDR().views(X), 'not fitted'), (lambda: GRDR().embed(X), 'not fitted'), (lambda: GRDR().save('x'), 'not fitted'),
    (lambda: GRDR().fit(X[:0]), 'items: expected at least one'), (lambda: GRDR().fit([[np.nan, 1]]), 'items: expected finite'),
    (lambda: GRDR().fit(np.zeros((3, 4))), 'items: row .* is zero'), (lambda: GRDR().fit(X, C), 'captions, positives: expected both'),
    (lambda: GRDR().fit(X, C, P[:-1]), 'positives: expected 80 integers'), (lambda: GRDR().fit(X, C, P + 1), 'positives: expected numbers from 0 and below 20'),
    (lambda: GRDR().fit(X, C, P, views=P), 'views: expected numbers from 0 and below 4'), (lambda: GRDR().fit(X, C[:0], P[:0]), 'captions: expected at least one'),
    (lambda: GRDR().fit(X, C * np.nan, P), 'captions: expected finite'), (lambda: assign_views(C, P, 0), 'V: '), (lambda: assign_views(C, P - 1, 2), 'positives: '),
    (lambda: assign_views(C, P + .5, 2), 'positives: '), (lambda: assign_views(C * np.inf, P, 2), 'captions: '),
])
def test_bad_settings_and_data(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_a_refused_fit_leaves_the_quantiser_as_it_was(fitted):
    x, c, pos, q = fitted
    before = q.encode(x)
    for bad in (x * 0, x * np.nan, x[:9]):
        with pytest.raises(ValueError): q.fit(bad, c, pos)
    assert (q.encode(x) == before).all()


@pytest.mark.parametrize('stop', [KeyboardInterrupt, MemoryError])
def test_a_fit_that_stops_leaves_the_quantiser_as_it_was(fitted, tmp_path, monkeypatch, stop):
    "Stopped in its second level, or by a row that only training reads"
    x, c, pos, _ = fitted
    q = GRDR(**SMALL).fit(x, c, pos)
    before, arrays = q.encode(x), {k: v.copy() for k, v in q.arrays()[0].items()}
    m = np.memmap(tmp_path/'x', np.float32, 'w+', shape=(50, 9))
    m[:] = 1
    m[40] = np.nan
    with pytest.raises(ValueError, match='items: expected finite'): q.fit(m)
    whole, new = GRDR._fit_level, GRDR(**SMALL)

    def broken(self, l, *a):
        if l: raise stop
        return whole(self, l, *a)
    monkeypatch.setattr(GRDR, '_fit_level', broken)
    for p in (q, new):
        with pytest.raises(stop): p.fit(x[:, :5], c, pos)
    assert (q.encode(x) == before).all() and all((v == arrays[k]).all() for k, v in q.arrays()[0].items()) and new.model is None
    with pytest.raises(ValueError, match='not fitted'): new.encode(x)


def test_bad_codes_and_widths(fitted):
    x, c, _, q = fitted
    for make, says in [(lambda: q.encode(x[:, :5]), 'items: expected width 8, got 5'), (lambda: q.encode(x * np.nan), 'items: expected finite'),
                       (lambda: q.decode(np.full((1, 3), 6)), 'codes: expected values below'), (lambda: q.decode(np.zeros((1, 2, 3), int)), 'codes: expected 3 views, got 2'),
                       (lambda: q.decode(np.zeros((1, 3))), 'codes: expected integers'), (lambda: q.embed(c[:, :3]), 'captions: expected width 8')]:
        with pytest.raises(ValueError, match=says): make()
