"""Residual levels against plain recomputation, and the quantisers on them (RQ-VAE, AVG, CART) on awkward data, on files and after interruption."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import grnb.tokenizer.avg
import grnb.tokenizer.rqvae
from grnb.core import fingerprint, load_arrays, save_arrays, torch_seed
from grnb.ids.make import collisions, make_ids
from grnb.tokenizer.avg import AVG, AVGModel
from grnb.tokenizer.cart import CART
from grnb.tokenizer.encode import residual_encode
from grnb.tokenizer.levels import Codebook, ResidualLevels, cosine_encode, in_blocks, rotation_trick, sinkhorn, straight_through
from grnb.tokenizer.load import load_quantizer
from grnb.tokenizer.rqvae import RQVAE, fetch, row_batches

fast = settings(max_examples=25, deadline=None)
ROOT = Path(__file__).resolve().parents[1]
sizes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**20))   # K, dim, L, B, seed


def plain(z, books, cosine):
    "Codes, residuals and codewords in float64, one row and one level at a time"
    r, codes, rs = z.astype(np.float64), [], []
    for C in books:
        C = C.astype(np.float64)
        side = np.linalg.norm(r, axis=1, keepdims=True)
        t = r / np.maximum(side, 1e-12) if cosine else r
        near = C / np.maximum(np.linalg.norm(C, axis=1, keepdims=True), 1e-12) if cosine else C
        d = ((t[:, None] - near) ** 2).sum(-1)
        codes.append(d); rs.append(r)
        r = r - C[d.argmin(1)]
    return codes, rs


def made(K, dim, L, B, seed, **options):
    "Levels with ordinary codewords, and a batch"
    g = np.random.default_rng(seed)
    levels = ResidualLevels((K,) * L, dim, seed=seed, **options)
    for book in levels.stored: book.put(g.normal(size=(K, dim)).astype(np.float32), 1 + g.random(K).astype(np.float32))
    return levels, torch.from_numpy(g.normal(size=(B, dim)).astype(np.float32))


# --- the levels

@fast
@given(sizes, st.booleans(), st.booleans(), st.sampled_from(["gradient", "ema"]))
def test_codes_and_loss_are_those_of_plain_recomputation(size, cosine, shared, update):
    levels, z = made(*size, distance="cosine" if cosine else "euclidean", shared=shared, update=update, beta=.6)
    out, books = levels.eval()(z), levels.books()
    assert len(books) == size[2] and (not shared or all((b == books[0]).all() for b in books))
    r, loss = z.numpy().astype(np.float64), 0
    for l, C in enumerate(books):
        (d,), _ = plain(r.astype(np.float64), [C], cosine)
        c = out.codes[:, l].numpy()
        assert (d[np.arange(len(c)), c] <= d.min(1) + 1e-4).all()                            # up to rounding, the nearest
        assert np.allclose(out.residuals[l].detach().numpy(), r, atol=1e-4)
        t = r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-12) if cosine else r
        loss += (.6 + (update == "gradient")) * ((t - C[c]) ** 2).mean() / len(books)
        r = r - C[c]
    assert np.allclose(out.zq.detach().numpy(), z.numpy() - r, atol=1e-4) and np.isclose(out.loss.item(), loss, rtol=1e-3, atol=1e-5)
    encode = cosine_encode if cosine else residual_encode
    codes = encode(z.numpy(), books)
    d, _ = plain(z.numpy(), books[:1], cosine)
    assert codes.shape == out.codes.shape and (d[0][np.arange(len(z)), codes[:, 0]] <= d[0].min(1) + 1e-4).all()


def test_levels_so_far():
    levels, z = made(5, 4, 3, 9, 0)
    whole, part = levels(z), levels(z, upto=2)
    assert (part.codes == whole.codes[:, :2]).all() and len(part.residuals) == 2


@fast
@given(sizes, st.floats(0, .999), st.booleans())
def test_one_step_of_running_means(size, decay, shared):
    K, dim, L, B, seed = size
    levels, z = made(*size, update="ema", decay=decay, eps=1e-3, revive=0., shared=shared)
    before = [(b.count.numpy().astype(np.float64), b.total.numpy().astype(np.float64)) for b in levels.stored]
    out = levels(z)
    rs, codes = [r.numpy().astype(np.float64) for r in out.residuals], out.codes.numpy()
    levels.learn(out)
    for l, (book, (count, total)) in enumerate(zip(levels.stored, before)):
        t, c = (np.concatenate(rs), codes.T.ravel()) if shared else (rs[l], codes[:, l])
        hot = np.eye(K)[c]                                                                    # (B, K)
        count = decay * count + (1 - decay) * hot.sum(0)
        total = decay * total + (1 - decay) * hot.T @ t
        smooth = (count + 1e-3) / (count.sum() + K * 1e-3) * count.sum()
        assert np.allclose(book.count.numpy(), count, rtol=1e-4, atol=1e-5) and np.allclose(book.total.numpy(), total, rtol=1e-3, atol=1e-4)
        assert np.allclose(book.words.numpy(), total / smooth[:, None], rtol=1e-2, atol=1e-3)


def test_forgetting_all_is_a_round_of_kmeans():
    levels, z = made(4, 3, 1, 200, 1, update="ema", decay=0., eps=0., revive=0.)
    out = levels(z)
    levels.learn(out)
    assert np.allclose(levels.books()[0], np.stack([z.numpy()[out.codes[:, 0] == k].mean(0) for k in range(4)]), atol=1e-5)


def test_dead_codes_move_to_residuals_of_the_batch():
    for update in ("ema", "gradient"):
        book = Codebook(6, 2, update == "ema", False)
        book.put(torch.tensor([[0., 0], [50, 50], [60, 60], [70, 70], [80, 80], [90, 90]]), torch.full((6,), 4.))
        t = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
        for step in range(3):
            with torch_seed(0, step): book.learn(t, book.nearness(t).argmax(1), .5, 1e-5, 1., 3)
            here = [any(torch.equal(w, r) for r in t) for w in book.words.detach()]
            assert here[1:] == [step == 2] * 5                                                # 4 → 2 → 1 → ½ rows; or three steps unused
        assert len(book.words.detach().unique(dim=0)) == 6                                    # not all on one row
        if update == "ema": assert (book.count[1:] == 1.).all() and torch.equal(book.total[1:], book.words.detach()[1:])
        else: assert not book.count[1:].any()


def test_revival_off_leaves_codes_alone():
    levels, z = made(8, 3, 1, 4, 2, update="ema", revive=0.)
    levels.stored[0].put(np.float32([[0, 0, 0]] + [[99, 99, 99]] * 7), np.ones(8))
    for _ in range(50): levels.learn(levels(z))
    assert np.allclose(levels.books()[0][1:], 99, rtol=.01)


def test_a_code_is_dead_below_its_own_levels_load():
    levels = RQVAE(K=(64, 4), L=2, dim=None, update="ema", batch=128, revive=.5)._levels(3)     # even loads 2 and 32 rows, thresholds 1 and 16
    for book, count in zip(levels.stored, (1.5, 10.)): book.put(torch.randn(len(book.words), 3, generator=torch.Generator().manual_seed(0)), torch.full((len(book.words),), count))
    far = [b.words.data.clone() for b in levels.stored]
    out = levels(torch.tensor([[5., 5, 5], [6, 5, 5]]))
    with torch_seed(0): levels.learn(out)
    assert torch.allclose(levels.stored[0].count.min(), torch.tensor(1.5 * .95)) and (levels.stored[1].count >= 16).all()
    kept = [torch.isclose(b.words, w, rtol=.01).all(1).sum() for b, w in zip(levels.stored, far)]
    assert kept[0] >= 62 and kept[1] == 0
    for revive in ((1.,), (1., -1.), (1., float("nan"))):
        with pytest.raises(ValueError, match="revive: "): ResidualLevels((4, 4), 3, update="ema", revive=revive)


# --- gradients

@fast
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 2**20))
def test_rotation_trick_is_its_formula(B, D, seed):
    g = np.random.default_rng(seed)
    z, q, up = (torch.from_numpy(g.normal(size=(B, D))) for _ in range(3))
    z.requires_grad_()
    y = rotation_trick(z, q)
    assert torch.equal(y.detach(), q)
    got = torch.autograd.grad((y * up).sum(), z)[0].numpy()
    for i in range(B):
        e, w = z[i].detach().numpy(), q[i].numpy()
        a, b = e / np.linalg.norm(e), w / np.linalg.norm(w)
        r = (a + b) / np.linalg.norm(a + b)
        R = np.eye(D) - 2 * np.outer(r, r) + 2 * np.outer(b, a)
        scale = np.linalg.norm(w) / np.linalg.norm(e)
        assert np.allclose(R @ R.T, np.eye(D)) and np.allclose(scale * R @ e, w)             # a rotation and a scale that take z to q
        assert np.allclose(got[i], scale * R.T @ up[i].numpy())
        assert np.isclose(np.linalg.norm(got[i]), scale * np.linalg.norm(up[i]))             # lengths are kept up to the scale


def test_rotation_of_opposite_and_zero_vectors():
    z = torch.tensor([[1., 0], [0, 0], [1, 0]], requires_grad=True)
    q = torch.tensor([[-2., 0], [1, 0], [0, 0]])
    y = rotation_trick(z, q)
    assert torch.equal(y.detach(), q) and torch.isfinite(torch.autograd.grad(y.sum(), z)[0]).all()


def test_straight_through_hands_the_gradient_on():
    z, q, up = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(3, 4)
    y = straight_through(z, q)
    assert torch.equal(y.detach(), q) and torch.equal(torch.autograd.grad((y * up).sum(), z)[0], up)


def test_gradients_through_the_levels():
    "Once from the sum of codewords; with cosine from every level's unit residual; to the codewords only by their own term"
    levels, z = made(6, 4, 3, 5, 3)
    z.requires_grad_()
    up = torch.randn(5, 4)
    assert torch.allclose(torch.autograd.grad((levels(z).zq * up).sum(), z)[0], up)
    turned, _ = made(6, 4, 3, 5, 3, gradient="rotation")
    out = turned(z)
    assert torch.allclose(torch.autograd.grad((out.zq * up).sum(), z)[0], torch.autograd.grad((rotation_trick(z, out.zq) * up).sum(), z)[0])
    cosine, _ = made(6, 4, 3, 5, 3, distance="cosine")
    out = cosine(z)
    units = sum(F.normalize(r, dim=1) for r in out.residuals)
    assert torch.allclose(torch.autograd.grad((out.zq * up).sum(), z, retain_graph=True)[0], torch.autograd.grad((units * up).sum(), z)[0])
    words = [b.words for b in levels.stored]
    assert all(w.grad is None for w in words)
    levels(z).loss.backward()
    assert all(w.grad.abs().sum() > 0 for w in words)
    means, _ = made(6, 4, 3, 5, 3, update="ema")
    assert not any(p.requires_grad for p in means.parameters())


# --- Sinkhorn

def lc_rec(d, epsilon, iters):
    "The balancing of LC-Rec, as published"
    high, low = d.max(), d.min()
    middle = (high + low) / 2
    Q = np.exp(-((d - middle) / (high - middle + 1e-5)).astype(np.float64) / epsilon)
    Q /= Q.sum()
    for _ in range(iters):
        Q /= Q.sum(1, keepdims=True); Q /= Q.shape[0]
        Q /= Q.sum(0, keepdims=True); Q /= Q.shape[1]
    return Q * Q.shape[0]


@fast
@given(st.integers(2, 30), st.integers(2, 12), st.integers(0, 2**20), st.sampled_from([.05, .2, 1.]))
def test_sinkhorn_balances_and_is_the_published_iteration(B, K, seed, epsilon):
    d = np.random.default_rng(seed).random((B, K)) ** 2
    P = sinkhorn(torch.from_numpy(d), epsilon, 100).numpy()
    assert np.allclose(P, lc_rec(d, epsilon, 100), atol=1e-6)
    assert np.allclose(P.sum(0), B / K)
    if epsilon >= .2: assert np.allclose(P.sum(1), 1, atol=1e-3)


@pytest.mark.parametrize("epsilon", [1e-6, .003, 10.])
def test_sinkhorn_stays_finite(epsilon):
    one_code = torch.cat([torch.zeros(40, 1), torch.full((40, 9), 1e9)], 1)
    for d in (one_code, torch.zeros(5, 3), torch.rand(64, 200, generator=torch.Generator().manual_seed(0)), torch.rand(1, 4), torch.rand(4, 1)):
        P = sinkhorn(d, epsilon)
        assert torch.isfinite(P).all() and torch.allclose(P.sum(0), torch.full((d.shape[1],), len(d) / d.shape[1], dtype=torch.float64))


def test_balance_is_for_training_only():
    levels, z = made(16, 4, 2, 64, 5, sinkhorn=.003)
    z = z + 3                                                                                 # few codes are near
    used = lambda out: len(out.codes[:, 0].unique())
    near, even = levels.eval()(z), levels.train()(z)
    assert used(near) < used(even) and used(even) == 16
    assert torch.equal(levels.eval()(z).codes, near.codes)
    assert np.bincount(even.codes[:, 0], minlength=16).max() <= 8 < np.bincount(near.codes[:, 0]).max()


# --- settings, blocks and batches

@pytest.mark.parametrize("make, says", [
    (lambda: ResidualLevels((4, 5), 3, shared=True), "K: expected one size"), (lambda: ResidualLevels((4,), 3, distance="l1"), "distance: "),
    (lambda: ResidualLevels((4,), 3, update="sgd"), "update: "), (lambda: ResidualLevels((4,), 3, gradient="none"), "gradient: "),
    (lambda: ResidualLevels((4,), 3, decay=1.), "decay: "), (lambda: ResidualLevels((4,), 3, beta=-1), "beta: "), (lambda: ResidualLevels((4,), 3, patience=0), "patience: "),
    (lambda: RQVAE(K=(4, 4), L=3), "K: expected one number or 3"), (lambda: RQVAE(L=0), "L: "), (lambda: RQVAE(dim=0), "dim: "), (lambda: RQVAE(distance="dot"), "distance: "),
    (lambda: RQVAE(revive=2), "revive: "), (lambda: RQVAE(seed=-1), "seed: "), (lambda: RQVAE(beta=float("nan")), "beta: "), (lambda: RQVAE(beta="a"), "beta: "),
    *[(lambda make=make, lr=lr: make(lr=lr), "lr: expected above 0") for make in (RQVAE, AVG, CART) for lr in (-1., 0, float("nan"), float("inf"), "a", None)],
    *[(lambda make=make, beta=beta: make(beta=beta), "beta: expected 0 or more") for make in (RQVAE, AVG, CART) for beta in (-1., float("inf"), None)],
    (lambda: AVG(temperature=float("inf")), "temperature: "), (lambda: AVG(weight="a"), "weight: "),
    (lambda: AVG(batch=1), "batch: expected at least 2"), (lambda: AVG(position="middle"), "position: "), (lambda: AVG(align="l1"), "align: "), (lambda: AVG(weight=-1), "weight: "),
    (lambda: AVG(dropout=1), "dropout: "), (lambda: AVG(sinkhorn=-1), "sinkhorn: "), (lambda: AVG(temperature=0), "temperature: "),
    (lambda: CART(L=1), "L: expected at least 2"), (lambda: CART(codes=0), "codes: "), (lambda: CART(dim=None), "dim: "),
])
def test_bad_settings(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_blocks_are_of_one_size():
    seen = []
    def f(x):
        seen.append(len(x))
        return x * 2
    x = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    assert (in_blocks(f, x, 4) == 2 * x).all() and seen == [4, 4, 4] and in_blocks(f, x[:0], 4).shape == (0, 3)


def test_rows_do_not_depend_on_place_or_threads():
    "Odd widths and several threads: products shared among threads would round by place"
    code = """if True:
        import hashlib, numpy as np, torch
        from grnb.tokenizer.levels import in_blocks
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(100, 70), torch.nn.GELU(), torch.nn.Linear(70, 33))
        x = np.random.default_rng(0).normal(size=(1500, 100)).astype(np.float32)
        z, threads = in_blocks(net, x), torch.get_num_threads()
        assert all((in_blocks(net, x[i:i + 7]) == z[i:i + 7]).all() for i in range(0, 1500, 41)) and torch.get_num_threads() == threads
        mark = hashlib.sha256(z).hexdigest()
        print(threads, mark)"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{f"{lib}_NUM_THREADS": "3" for lib in ("OMP", "MKL")}}
    three = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout.split()
    exec(code, here := {})
    assert three[1] == here["mark"]


def test_epochs_or_draws():
    rows = row_batches(10, 5, 0, "t")
    assert sorted(np.concatenate([rows(0), rows(1)])) == list(range(10)) and (row_batches(10, 5, 0, "t")(1) == rows(1)).all()
    few = row_batches(3, 8, 0, "t")
    assert few(0).shape == (8,) and set(few(0)) <= {0, 1, 2} and (few(4) != few(5)).any()


# --- the quantisers

x = (np.random.default_rng(0).normal(size=(9, 6))[np.random.default_rng(1).integers(9, size=90)] + .2 * np.random.default_rng(2).normal(size=(90, 6))).astype(np.float32)
captions, of = np.tile(x, (2, 1)) + np.float32(.1), np.tile(np.arange(90), 2)
short = dict(steps=12, batch=16, seed=3, device="cpu")
MAKE = {
    "gradient": lambda **s: RQVAE(6, 2, 8, 4, patience=5, **{**short, **s}),
    "sizes": lambda **s: RQVAE((6, 3), 2, 8, 4, **{**short, **s}),
    "ema": lambda **s: RQVAE(6, 2, 8, 4, update="ema", gradient="rotation", **{**short, **s}),
    "plain ema": lambda **s: RQVAE(6, 2, dim=None, update="ema", **{**short, **s}),
    "plain": lambda **s: RQVAE(6, 2, dim=None, **{**short, **s}),
    "cosine": lambda **s: RQVAE(6, 2, 8, 4, distance="cosine", **{**short, **s}),
    "avg": lambda **s: AVG(6, 2, 4, **{**short, **s}),
    "cart": lambda **s: CART(4, 5, 3, 8, 4, **{**short, **s}),
}


def fit(name, **options):
    q = MAKE[name](**options)
    return q.fit(x, captions, of) if name == "avg" else q.fit(x)


@pytest.fixture(scope="module")
def fitted(): return {name: fit(name) for name in MAKE}


def test_same_seed_same_codes_in_another_process(fitted):
    marks = [fingerprint(q.encode(x), q.decode(q.encode(x))) for q in fitted.values()]
    code = "import sys; sys.path.insert(0, 'tests')\nimport test_rqvae as t\nfor n in t.MAKE: q = t.fit(n); c = q.encode(t.x); print(t.fingerprint(c, q.decode(c)))"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())})      # a seed fixes weights for one number of threads
    assert r.stdout.split() == marks, r.stderr[-2000:]
    assert fingerprint(fit("gradient", seed=4).encode(x)) != marks[0]


@pytest.mark.parametrize("name", MAKE)
def test_codes_shapes_and_batches(fitted, name):
    q = fitted[name]
    many = np.tile(x, (60, 1))[:5000] + .05 * np.random.default_rng(3).normal(size=(5000, 6)).astype(np.float32)
    codes = q.encode(many)
    assert codes.shape == (5000, q.L) and codes.dtype == np.uint8 and (codes.max(0) < q.sizes).all() and q.encode(x[:0]).shape == (0, q.L)
    assert (np.concatenate([q.encode(many[i:i + 4096]) for i in (0, 4096)]) == codes).all()
    assert (np.concatenate([q.encode(many[i:i + 7]) for i in range(0, 700, 7)]) == codes[:700]).all()
    assert (np.concatenate([q.encode(many[i:i + 1]) for i in range(60)]) == codes[:60]).all()
    views = q.encode(many[:60].reshape(20, 3, 6))
    assert views.shape == (20, 3, q.L) and (views.reshape(60, -1) == codes[:60]).all()
    y = q.decode(codes)
    assert y.shape == many.shape and y.dtype == np.float32 and np.isfinite(y).all()
    assert q.latent == (not name.startswith("plain")) and len(q.codebooks) == q.L


@pytest.mark.parametrize("name", MAKE)
def test_save_and_load(fitted, name, tmp_path):
    q, path = fitted[name], tmp_path/"q.safetensors"
    q.save(path)
    arrays, facts = load_arrays(path)
    assert facts.pop("kind") == q.kind and not any(k.endswith((".count", ".total")) for k in arrays)
    r = type(q).from_arrays(arrays, dict(facts))
    codes = q.encode(x)
    assert (r.encode(x) == codes).all() and (r.decode(codes) == q.decode(codes)).all() and r.latent == q.latent and r.sizes == q.sizes
    r.save(tmp_path/"again.safetensors")
    assert (tmp_path/"again.safetensors").read_bytes() == path.read_bytes()
    for k in arrays:
        with pytest.raises(KeyError): type(q).from_arrays({j: v for j, v in arrays.items() if j != k}, dict(facts))
    for k in facts:
        with pytest.raises((KeyError, TypeError)): type(q).from_arrays(arrays, {j: v for j, v in facts.items() if j != k})
    with pytest.raises(TypeError): type(q).from_arrays(arrays, dict(facts, wings=2))
    with pytest.raises(KeyError): type(q).from_arrays(dict(arrays, **{"fine.more": x, "more": x}), dict(facts))


@pytest.mark.parametrize("name", ["gradient", "plain ema", "avg", "cart"])
def test_damaged_files(fitted, name, tmp_path):
    path = tmp_path/"q.safetensors"
    fitted[name].save(path)
    arrays, facts = load_arrays(path)
    assert (load_quantizer(path).encode(x) == fitted[name].encode(x)).all()
    def refused(arrays, facts):
        save_arrays(path, arrays, facts)
        with pytest.raises(ValueError, match="q.safetensors: not a quantiser of this version"): load_quantizer(path)
    for k, v in arrays.items():
        holed = v.copy()
        holed.reshape(-1)[-1] = np.nan
        for bad in (holed, v.reshape(-1)[:-1]): refused({**arrays, k: bad}, facts)
    for k in facts.keys() - {"kind", "seed"}:
        for bad in ("a", []): refused(arrays, {**facts, k: bad})


@pytest.mark.parametrize("name", MAKE)
def test_awkward_items(name):
    eye = np.eye(6, dtype=np.float32)
    for items in (x[:1], x[:3], np.ones((20, 6)), np.zeros((20, 6)), np.repeat(eye, 5, 0), 1e6 * x, 1e-6 * x):
        q = MAKE[name](steps=8)
        q.fit(items, items, np.arange(len(items))) if name == "avg" else q.fit(items)
        codes = q.encode(items)
        assert (codes.max(0) < q.sizes).all() and np.isfinite(q.decode(codes)).all()
        assert np.unique(codes, axis=0).shape[0] <= np.unique(items, axis=0).shape[0]          # equal items, equal codes
        assert (np.concatenate([q.encode(items[i:i + 1]) for i in range(min(9, len(items)))]) == codes[:9]).all()
    bad = x.copy()
    bad[7, 2] = np.nan
    for items, says in ((bad, "items: expected finite"), (x[:0], "items: expected at least one"), (x[0], "items: expected shape"), ([["a"]], "items: ")):
        with pytest.raises(ValueError, match=says): MAKE[name]().fit(items)
    with pytest.raises(ValueError, match="not fitted"): MAKE[name]().encode(x)
    with pytest.raises(ValueError, match="not fitted"): MAKE[name]().decode([[0, 0]])


@pytest.mark.parametrize("name", MAKE)
def test_bad_input_after_fitting(fitted, name):
    q = fitted[name]
    with pytest.raises(ValueError, match="items: expected width 6, got 5"): q.encode(x[:, :5])
    with pytest.raises(ValueError, match="items: expected finite"): q.encode(np.full((2, 6), np.inf))
    with pytest.raises(ValueError, match="codes: expected values below"): q.decode(np.full((1, q.L), 6))
    with pytest.raises(ValueError, match="codes: expected integers"): q.decode(np.zeros((1, q.L)))
    with pytest.raises(ValueError, match="codes: expected integers"): q.decode(np.zeros((1, q.L + 1), int))


@pytest.mark.parametrize("name, steps, stop", [("gradient", 60, 55), ("ema", 60, 55), ("plain ema", 210, 205), ("avg", 60, 55), ("cart", 60, 55)])
def test_a_stopped_fit_goes_on_as_if_nothing_had_happened(name, steps, stop, tmp_path, monkeypatch):
    whole = fit(name, steps=steps)
    module = grnb.tokenizer.avg if name == "avg" else grnb.tokenizer.rqvae
    real, calls = module.fetch, [0]
    def failing(*a):
        calls[0] += 1
        if calls[0] == stop: raise KeyboardInterrupt
        return real(*a)
    again = lambda q: q.fit(x, captions, of, checkpoint=tmp_path) if name == "avg" else q.fit(x, checkpoint=tmp_path)
    monkeypatch.setattr(module, "fetch", failing)
    with pytest.raises(KeyboardInterrupt): again(MAKE[name](steps=steps))
    assert list(tmp_path.iterdir())
    calls[0] = 10**6
    resumed = again(MAKE[name](steps=steps))
    assert calls[0] - 10**6 < 20                                                             # it went on, and did not begin again
    for k, v in whole.arrays()[0].items(): assert (resumed.arrays()[0][k] == v).all(), k
    with pytest.raises(ValueError, match="checkpoint: "): again(MAKE[name](steps=steps, beta=.7))


def test_a_memory_map_trains_like_an_array(fitted, tmp_path):
    np.save(tmp_path/"x.npy", x)
    mapped = np.load(tmp_path/"x.npy", mmap_mode="r")
    rows = np.array([5, 0, 5, 89])
    assert torch.equal(fetch(mapped, rows), fetch(x, rows)) and torch.equal(fetch(mapped[3:], rows[:3]), fetch(x[3:], rows[:3]))
    for name in ("gradient", "plain ema", "avg", "cart"):
        q = MAKE[name]().fit(mapped, *((captions, of) if name == "avg" else ()))
        assert (q.encode(mapped) == fitted[name].encode(x)).all() and all((a == b).all() for a, b in zip(q.codebooks, fitted[name].codebooks))
    bad = x.copy()
    bad[:] = np.nan
    np.save(tmp_path/"bad.npy", bad)
    with pytest.raises(ValueError, match="items: expected finite"): MAKE["plain ema"]().fit(np.load(tmp_path/"bad.npy", mmap_mode="r"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_memory_map_stays_on_disk(tmp_path):
    held = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssFile")).split()[1]) >> 10      # MiB of files in memory
    many = np.lib.format.open_memmap(tmp_path/"many.npy", "w+", np.float32, (200_000, 64))                            # 49 MiB
    for i in range(0, len(many), 10_000): many[i:i + 10_000] = np.random.default_rng(i).normal(size=(10_000, 64))
    del many
    for q in (RQVAE(4, 2, 8, 4, steps=10, batch=256, device="cpu"), RQVAE(4, 2, dim=None, update="ema", steps=10, batch=256, device="cpu"),
              AVG(4, 2, 4, steps=10, batch=256, device="cpu")):
        q.fit(x)                                                                              # loads what libraries it needs
        mapped = np.load(tmp_path/"many.npy", mmap_mode="r")
        before = held()
        q.fit(mapped)
        assert held() - before < 8, q.kind
        mapped[np.arange(0, 200_000, 70)]
        assert held() - before > 40                                                           # what rows of the map itself would hold


@pytest.mark.parametrize("name", ["gradient", "plain ema", "avg", "cart"])
def test_a_failed_fit_leaves_things_as_they_were(name, monkeypatch):
    old, new, args = MAKE[name]().fit(x), MAKE[name](), (captions[:, :5], of) if name == "avg" else ()
    facts, weights, codes = dict(old.settings), {k: v.copy() for k, v in old.arrays()[0].items()}, old.encode(x)
    module, calls = grnb.tokenizer.avg if name == "avg" else grnb.tokenizer.rqvae, [0]
    real = module.fetch
    def failing(*a):
        calls[0] += 1
        if not calls[0] % 4: raise ValueError("items: a row that is found late")
        return real(*a)
    monkeypatch.setattr(module, "fetch", failing)
    for q in (old, new):
        with pytest.raises(ValueError, match="found late"): q.fit(2 * x[:, :5], *args)
    now = old.arrays()
    assert old.settings == facts and now[0].keys() == weights.keys() and all((now[0][k] == v).all() for k, v in weights.items())
    assert (old.encode(x) == codes).all() and old.decode(codes).shape == x.shape
    with pytest.raises(ValueError, match="not fitted"): new.encode(x)


@pytest.mark.parametrize("name", ["gradient", "plain ema", "avg", "cart"])
def test_devices_of_encode(fitted, name):
    q = fitted[name]
    codes = q.encode(x)
    assert (q.encode(x, device="auto") == codes).all(1).mean() > .9 and (q.encode(x, device="cpu") == codes).all()
    with pytest.raises(ValueError, match="device: expected auto"): q.encode(x, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' is not available"): q.encode(x, device="cuda")


def test_training_lowers_the_error():
    for name in ("gradient", "ema", "avg", "cart"):
        more = dict(dropout=0., weight=0., sinkhorn=0.) if name == "avg" else {}
        error = lambda steps: ((lambda q: q.decode(q.encode(x)) - x)(fit(name, steps=steps, lr=1e-2, **more)) ** 2).mean()
        assert error(80) < .7 * error(1)


def test_plain_levels_decode_by_sums(fitted):
    q = fitted["plain ema"]
    c = q.encode(x)
    assert np.allclose(q.decode(c), sum(b[c[:, l]] for l, b in enumerate(q.codebooks)), atol=1e-6)


# --- AVG and CART

def test_avg_shares_one_codebook(fitted):
    q = fitted["avg"]
    assert (q.codebooks[0] == q.codebooks[1]).all() and sum(k.startswith("levels") for k in q.arrays()[0]) == 1


def test_avg_widths_are_the_papers():
    m = AVGModel(768, 768, .25, ResidualLevels((1024,) * 4, 768, shared=True))
    assert [(l.in_features, l.out_features) for l in m.enc if hasattr(l, "in_features")] == [(768, 1024), (1024, 512), (512, 768)]
    assert [(l.in_features, l.out_features) for l in m.dec if hasattr(l, "in_features")] == [(768, 512), (512, 1024), (1024, 768)]
    assert [type(l).__name__ for l in m.enc] == ["Dropout", "Linear", "BatchNorm1d", "ReLU"] * 2 + ["Dropout", "Linear", "BatchNorm1d"]
    assert 4.1e6 < sum(p.numel() for p in m.parameters()) < 4.3e6                            # 4.21 million


@pytest.mark.parametrize("options", [{}, dict(position="before"), dict(align="infonce"), dict(position="before", align="infonce", temperature=.1)])
def test_avg_pulls_towards_captions(options):
    g = np.random.default_rng(0)
    t = g.normal(size=(90, 6)).astype(np.float32)                                             # say nothing about x, image by image
    near = lambda q: F.cosine_similarity(torch.from_numpy(q.decode(q.encode(x))), torch.from_numpy(t)).mean() if options.get("position") != "before" else \
        F.cosine_similarity(torch.from_numpy(in_blocks(q.model.encode, x)), torch.from_numpy(t)).mean()
    make = lambda weight: AVG(32, 2, **{**short, "steps": 60}, lr=1e-2, dropout=0., sinkhorn=0., weight=weight, **options).fit(x, t, np.arange(90))
    assert near(make(4.)) > near(make(0.)) + .1


def test_avg_loss_is_its_formula():
    m = AVGModel(6, 6, 0., ResidualLevels((4,) * 2, 6, shared=True)).eval()
    v, t, groups = torch.from_numpy(x[:8]), torch.from_numpy(captions[5:13]), torch.arange(8) % 5
    z = m.encode(v)
    out = m.levels(z)
    y = m.dec(out.zq)
    base = ((y - v) ** 2).mean() + out.loss
    s = dict(weight=.5, position="after", align="mse", temperature=.2)
    cost = lambda **o: m.loss((v, t, groups), {**s, **o}).item()
    assert np.isclose(m.loss((v, None, groups), s).item(), base.item(), rtol=1e-5) and np.isclose(cost(weight=0), base.item(), rtol=1e-5)
    assert np.isclose(cost(), (base + .5 * ((y - t) ** 2).mean()).item(), rtol=1e-5)
    assert np.isclose(cost(position="before"), (base + .5 * ((z - t) ** 2).mean()).item(), rtol=1e-5)
    logits = F.normalize(y, dim=1) @ F.normalize(t, dim=1).T / .2
    same = (groups[:, None] == groups) & ~torch.eye(8, dtype=bool)
    logits = logits.masked_fill(same, -1e30)
    want = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert np.isclose(cost(align="infonce"), (base + .5 * want).item(), rtol=1e-5)


@pytest.mark.parametrize("args, says", [
    ((captions, None), "positives: "), ((captions, of[:5]), "positives: expected 180"), ((captions, of + 1), "positives: expected row numbers from 0 to 89"),
    ((captions, of - 1), "positives: expected row"), ((captions[:, :3], of), "captions: expected width 6"), ((None, of), "captions: expected vectors"),
    ((captions, of.astype(float)), "positives: "), ((captions[:0], of[:0]), "captions: expected at least one"), ((np.full_like(captions, np.nan), of), "captions: expected finite"),
])
def test_avg_refuses_bad_pairs(args, says):
    with pytest.raises(ValueError, match=says): MAKE["avg"]().fit(x, *args)


def test_avg_refuses_views_beside_captions():
    with pytest.raises(ValueError, match=r"items: expected shape \(N, D\) beside captions, got \(30, 3, 6\)"): MAKE["avg"]().fit(x.reshape(30, 3, 6), captions[:30], np.arange(30))
    assert MAKE["avg"]().fit(x.reshape(30, 3, 6)).encode(x.reshape(30, 3, 6)).shape == (30, 3, 2)


def test_a_checkpoint_is_of_its_captions(tmp_path):
    fit = lambda *args: MAKE["avg"]().fit(x, *args, checkpoint=tmp_path)
    first = fit(captions, of).encode(x)
    for args in ((captions + 1, of), (captions, of[::-1].copy()), ()):
        with pytest.raises(ValueError, match="checkpoint: "): fit(*args)
    assert (fit(captions, of).encode(x) == first).all()


def test_avg_without_captions():
    q = MAKE["avg"]().fit(x)
    assert q.encode(x).shape == (90, 2)


def test_cart_is_a_cluster_and_a_residual(fitted):
    q = fitted["cart"]
    codes = q.encode(x)
    assert q.sizes == (4, 5, 5) and (codes[:, 0] == ((x[:, None] - q.coarse) ** 2).sum(-1).argmin(1)).all()
    assert (codes[:, 1:] == q.fine.encode(x - q.coarse[codes[:, 0]])).all()
    assert np.allclose(q.decode(codes), q.coarse[codes[:, 0]] + q.fine.decode(codes[:, 1:]))
    assert collisions(make_ids(codes, q.sizes, "unique")).rate == 0
