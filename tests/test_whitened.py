"""Whitened residual k-means: plain at power 0, deterministic, restored from a file, and better at telling groups apart."""
import numpy as np
import pytest

from grnb.core import load_arrays
from grnb.tokenizer.kmeans import ResidualKMeans
from grnb.tokenizer.whitened import WhitenedKMeans


def grouped(n, seed):
    "Groups around centres; members of every group scatter in the same few directions"
    w, g = np.random.default_rng(0), np.random.default_rng(seed)
    centres, groups, A = w.normal(size=(20, 48)) / 7, w.normal(size=(20, 10, 48)) / 7, w.normal(size=(6, 48)) / 7
    c, s = g.integers(20, size=n), g.integers(10, size=n)
    x = .6 * centres[c] + .5 * groups[c, s] + .2 * g.normal(size=(n, 6)) @ A + .1 * g.normal(size=(n, 48)) / 7
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def found(quantizer, x, q, candidates):
    codes = quantizer.encode(x).astype(int)
    sums = sum(b[codes[:, l]] for l, b in enumerate(quantizer.codebooks))
    top = np.argsort(-(q @ sums.T - .5 * (sums ** 2).sum(1)), 1)[:, :candidates]
    exact = np.argsort(-(q @ x.T), 1)[:, :10]
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(top, exact)])


x, q = grouped(3000, 1), grouped(200, 2)
fit = lambda power, **o: WhitenedKMeans((20, 8, 8, 8), 4, power=power, iters=8, **o).fit(x)


def test_it_tells_groups_apart_where_plain_codes_do_not():
    plain = ResidualKMeans((20, 8, 8, 8), 4, iters=8).fit(x)
    assert found(fit(1.5), x, q, 30) > found(plain, x, q, 30) + .1


def test_power_0_changes_nothing_but_the_seeds():
    a = fit(0.)
    assert np.allclose(a.W, np.eye(48), atol=1e-5)
    sums = sum(b[a.encode(x)[:, l].astype(int)] for l, b in enumerate(a.codebooks))
    assert np.allclose(sums, a.decode(a.encode(x)), atol=1e-5)


def test_decode_undoes_the_whitening():
    a = fit(2.)
    error = lambda y: ((x - y) ** 2).sum(1).mean()
    first = a.codebooks[0][a.encode(x)[:, 0].astype(int)]
    assert error(a.decode(a.encode(x))) < error(first)


@pytest.mark.parametrize('power', [0., 1., 1.9, 2., 4., 8.])
def test_decode_is_right_at_every_power(power):
    "Also where items lie in a few directions, and float32 cannot hold the inverse"
    flat = np.random.default_rng(3).normal(size=(1500, 4)) @ np.random.default_rng(4).normal(size=(4, 24))
    for y in (x, flat.astype(np.float32)):
        a = WhitenedKMeans((20, 8, 8, 8), 4, power=power, iters=8).fit(y)
        codes = a.encode(y)
        error = lambda z: ((y - z) ** 2).sum(1).mean()
        assert error(a.decode(codes)) <= error(a.codebooks[0][codes[:, 0].astype(int)]) and np.isfinite(a.decode(codes)).all()
        if power == 1.: assert np.allclose(a.decode(codes) @ a.W, a.inner.decode(codes[:, 1:]) + a.codebooks[0][codes[:, 0].astype(int)] @ a.W, atol=1e-3)


def test_files_without_plain_codebooks_still_load():
    a = fit(1.)
    arrays, settings = a.arrays()
    b = WhitenedKMeans.from_arrays({k: v for k, v in arrays.items() if not k.startswith('plain')}, settings)
    codes = a.encode(x)
    assert (b.encode(x) == codes).all() and np.allclose(a.decode(codes), b.decode(codes), atol=1e-3)
    with pytest.raises(KeyError): WhitenedKMeans.from_arrays({k: v for k, v in arrays.items() if k != 'plain2'}, settings)


def test_same_seed_same_codes_whatever_the_batch_and_from_a_file(tmp_path):
    a = fit(2.)
    codes = a.encode(x)
    assert codes.dtype == np.uint8 and (fit(2.).encode(x) == codes).all() and (np.concatenate([a.encode(x[:7]), a.encode(x[7:])]) == codes).all()
    a.save(tmp_path / 'q.safetensors')
    arrays, meta = load_arrays(tmp_path / 'q.safetensors')
    assert meta.pop('kind') == 'whitened_kmeans'
    b = WhitenedKMeans.from_arrays(arrays, meta)
    assert (b.encode(x) == codes).all() and np.array_equal(a.decode(codes), b.decode(codes))
    with pytest.raises(KeyError): WhitenedKMeans.from_arrays({k: v for k, v in arrays.items() if k != 'whitening'}, meta)
    views = x[:20].reshape(10, 2, 48)
    assert (a.encode(views) == codes[:20].reshape(10, 2, 4)).all()


def test_bad_input():
    for call, says in [(lambda: WhitenedKMeans(8, 1), 'L: '), (lambda: WhitenedKMeans(8, 3, power=-1), 'power: '), (lambda: WhitenedKMeans(8, 3, power='2'), 'power: '),
                       (lambda: fit(2.).encode(x[:, :5]), 'expected width 48'), (lambda: WhitenedKMeans(8, 3).decode(np.zeros((2, 3), int)), 'not fitted'),
                       (lambda: WhitenedKMeans(8, 3).arrays(), 'not fitted'), (lambda: fit(2.).decode(np.full((1, 4), 20)), 'codes')]:
        with pytest.raises(ValueError, match=says): call()
    with pytest.raises((ValueError, RuntimeError)): WhitenedKMeans(8, 3).encode(x)
