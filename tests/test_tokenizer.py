"""Quantisers against plain argmin, on awkward data, and on damaged files."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.core import load_arrays, save_arrays
from grnb.tokenizer.encode import residual_encode, stack
from grnb.tokenizer.kmeans import ResidualKMeans, kmeans
from grnb.tokenizer.load import load_quantizer
from grnb.tokenizer.rqvae import RQVAE

fast = settings(max_examples=40, deadline=None)


@st.composite
def books(draw):
    "Vectors and codebooks of any small shape"
    D, L, N, seed = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 30)), draw(st.integers(0, 2**20))
    g = np.random.default_rng(seed)
    return g.normal(size=(N, D)).astype(np.float32), [g.normal(size=(int(g.integers(1, 12)), D)).astype(np.float32) / (l + 1) for l in range(L)]


@fast
@given(books())
def test_codes_are_those_of_plain_argmin(case):
    x, codebooks = case
    codes, r = residual_encode(x, codebooks), x.astype(np.float64)
    assert codes.shape == (len(x), len(codebooks)) and codes.dtype == np.uint8
    for l, C in enumerate(codebooks):
        far = ((r[:, None] - C) ** 2).sum(-1)
        assert (far[np.arange(len(x)), codes[:, l]] <= far.min(1) + 1e-5).all()          # up to rounding, the nearest
        r = r - C[codes[:, l]]


@fast
@given(books(), st.integers(1, 40))
def test_batches_do_not_matter(case, batch):
    x, codebooks = case
    assert (residual_encode(x, codebooks, batch) == residual_encode(x, codebooks)).all()


def test_ties_go_to_the_lower_code():
    assert residual_encode(np.float32([[0, 0], [1, 0]]), [np.float32([[1, 0], [-1, 0], [1, 0]])]).tolist() == [[0], [0]]


def test_stack_says_where_levels_begin():
    C, offsets = stack([np.zeros((3, 2)), np.ones((2, 2))])
    assert C.shape == (5, 2) and offsets.tolist() == [0, 3, 5] and C.dtype == np.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
def test_fit_any_small_set(N, D, K, L, seed):
    "Fewer vectors than codes, repeated vectors, one vector: codes stay in range, decode sums codewords, a level never hurts"
    g = np.random.default_rng(seed)
    x = g.normal(size=(N, D)).astype(np.float32)[g.integers(0, N, N)]
    q = ResidualKMeans(K, L, seed).fit(x)
    codes = q.encode(x)
    assert codes.shape == (N, L) and all((codes[:, l] < len(b)).all() and len(b) <= K for l, b in enumerate(q.codebooks))
    y = q.decode(codes)
    assert y.dtype == np.float32 and np.allclose(y, sum(b[codes[:, l]] for l, b in enumerate(q.codebooks)))
    errors = [((x - sum(b[codes[:, i]] for i, b in enumerate(q.codebooks[:l + 1]))) ** 2).sum() for l in range(L)]
    assert (np.diff(errors) <= 1e-4).all()
    if len(np.unique(x, axis=0)) <= K: assert np.allclose(y, x, atol=1e-5)
    assert (ResidualKMeans(K, L, seed).fit(x).encode(x) == codes).all()


def test_fit_leaves_its_input_alone():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    before = x.copy()
    ResidualKMeans(4, 3).fit(x)
    assert (x == before).all()


def test_another_seed_gives_other_codebooks():
    x = np.random.default_rng(0).normal(size=(200, 4))
    a, b = (ResidualKMeans(8, 2, s).fit(x).codebooks[0] for s in (0, 1))
    assert not np.allclose(a, b)


def test_kmeans_gives_distinct_rows_where_they_suffice():
    x = np.float32([[1, 0], [1, 0], [0, 1]])
    assert sorted(kmeans(x, 2).tolist()) == [[0, 1], [1, 0]] and len(kmeans(x, 9)) == 2


def test_views_are_encoded_one_by_one():
    x = np.random.default_rng(0).normal(size=(20, 3, 4))
    q = ResidualKMeans(4, 2).fit(x)
    assert q.encode(x).shape == (20, 3, 2) and (q.encode(x)[:, 1] == q.encode(x[:, 1])).all()


def test_many_codes_need_two_bytes():
    x = np.random.default_rng(0).normal(size=(300, 4))
    assert ResidualKMeans((300, 4), 2).fit(x).encode(x).dtype == np.uint16


@pytest.fixture(scope='module')
def fitted():
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    return x, [ResidualKMeans((6, 4, 3), 3, 5).fit(x), RQVAE(K=6, L=2, width=8, dim=4, steps=12, batch=16, patience=5, device='cpu').fit(x)]


def test_save_and_load(fitted, tmp_path):
    x, quantizers = fitted
    for q in quantizers:
        q.save(tmp_path/'q.safetensors')
        r = load_quantizer(tmp_path/'q.safetensors')
        assert type(r) is type(q) and r.latent == q.latent and (r.encode(x) == q.encode(x)).all() and (r.decode(q.encode(x)) == q.decode(q.encode(x))).all()
        r.save(tmp_path/'again.safetensors')
        assert (tmp_path/'again.safetensors').read_bytes() == (tmp_path/'q.safetensors').read_bytes()


def test_rqvae_is_deterministic_and_in_range(fitted):
    x, (_, q) = fitted
    again = RQVAE(K=6, L=2, width=8, dim=4, steps=12, batch=16, patience=5, device='cpu').fit(x)
    assert (again.encode(x) == q.encode(x)).all() and q.encode(x).max() < 6 and np.isfinite(q.decode(q.encode(x))).all()
    assert q.encode(x[:0]).shape == (0, 2)


@pytest.mark.parametrize('make, says', [
    (lambda: ResidualKMeans(0), 'K: expected at least 1'), (lambda: ResidualKMeans(4, 0), 'L: expected at least 1'),
    (lambda: ResidualKMeans((4, 4), 3), 'K: expected one number or 3'), (lambda: ResidualKMeans(70_000, 1), 'K: expected at most 32768'),
    (lambda: ResidualKMeans(2.5), 'K: '), (lambda: ResidualKMeans(4, seed=-1), 'seed: '),
    (lambda: RQVAE(K=0), 'K: '), (lambda: RQVAE(steps='9'), 'steps: '),
    (lambda: ResidualKMeans(4, 2).fit(np.zeros((0, 3))), 'items: expected at least one'),
    (lambda: ResidualKMeans(4, 2).fit([[np.nan, 1]]), 'items: expected finite'),
    (lambda: ResidualKMeans(4, 2).encode([[1., 2]]), 'not fitted'), (lambda: RQVAE().decode([[1]]), 'not fitted'),
])
def test_bad_settings_and_data(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_bad_codes_and_widths(fitted):
    _, quantizers = fitted
    for q in quantizers:
        with pytest.raises(ValueError, match='items: expected width 4, got 3'): q.encode(np.ones((2, 3)))
        with pytest.raises(ValueError, match='codes: expected values below'): q.decode(np.full((1, q.L), 99))
        with pytest.raises(ValueError, match='codes: expected integers'): q.decode(np.zeros((1, q.L)))


def test_files_that_are_no_quantiser(fitted, tmp_path):
    path = tmp_path/'q.safetensors'
    save_arrays(path, dict(a=np.zeros(2)), dict(kind='trie'))
    with pytest.raises(ValueError, match="expected a quantiser's file"): load_quantizer(path)
    fitted[1][0].save(path)
    arrays, meta = load_arrays(path)
    for cut in (0, 7, 40, path.stat().st_size - 1):
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='q.safetensors'): load_quantizer(path)
        path.write_bytes(whole)


@pytest.mark.parametrize('drop', ['codebook.1', 'K', 'L', 'seed'])
def test_a_file_that_lacks_a_part(fitted, tmp_path, drop):
    path = tmp_path/'q.safetensors'
    fitted[1][0].save(path)
    arrays, meta = load_arrays(path)
    save_arrays(path, {k: v for k, v in arrays.items() if k != drop}, {k: v for k, v in meta.items() if k != drop})
    with pytest.raises(ValueError): load_quantizer(path)
