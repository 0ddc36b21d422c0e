"""Exact codes whatever the batch, the device path or the file; blocks of memory maps; the classical quantisers; beams against brute force."""
import subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.core import fast_bf16, save_arrays
from grnb.tokenizer import encode as E
from grnb.tokenizer.classic import HierarchicalKMeans, ProductQuantizer
from grnb.tokenizer.encode import ResidualEncoder, batches, residual_encode, sample_rows
from grnb.tokenizer.kmeans import ResidualKMeans, kmeans
from grnb.tokenizer.load import load_quantizer
from grnb.tokenizer.paths import best_paths

few = settings(max_examples=30, deadline=None)


def plain(x, books):
    "Residuals and distances in float64"
    r, out = x.astype(np.float64), []
    for C in books:
        score = r @ C.T.astype(np.float64) - (C.astype(np.float64) ** 2).sum(1) / 2
        out.append(score.argmax(1))
        r -= C[out[-1]]
    return np.stack(out, 1)


def random_case(seed, D=24, N=150, offset=0., scale=1.):
    g = np.random.default_rng(seed)
    books = [scale * g.normal(size=(int(k), D)) / (l + 1) for l, k in enumerate(g.integers(1, 40, size=3))]
    books[0] += offset
    x = scale * g.normal(size=(N, D)) + offset
    return x.astype(np.float32), [b.astype(np.float32) for b in books]


@few
@given(st.integers(0, 10**6), st.sampled_from([0., 10., 1000.]), st.sampled_from([1e-18, 1e-6, 1., 1e6]))
def test_codes_are_exact(seed, offset, scale):
    "Far from the origin, tiny and huge: the codes of float64, ties aside"
    x, books = random_case(seed, offset=offset * scale, scale=scale)
    codes, true = residual_encode(x, books), plain(x, books)
    wrong = (codes != true).any(1)
    for i in np.flatnonzero(wrong):                                              # only where float64 itself cannot tell
        l = np.argmax(codes[i] != true[i])
        r = x[i].astype(np.float64) - sum(books[j][true[i, j]].astype(np.float64) for j in range(l))
        far = ((r - books[l].astype(np.float64)) ** 2).sum(1)
        assert abs(far[codes[i, l]] - far[true[i, l]]) <= 1e-12 * far.max()


@few
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 64, 4096]))
def test_batches_and_order_do_not_matter(seed, batch):
    x, books = random_case(seed)
    codes, turn = residual_encode(x, books), np.random.default_rng(seed).permutation(len(x))
    assert (residual_encode(x, books, batch) == codes).all() and (residual_encode(x[turn], books) == codes[turn]).all()
    assert (best_paths(x, books, 3, batch)[0] == best_paths(x, books, 3)[0]).all()


@few
@given(st.integers(0, 10**6))
def test_rough_and_float32_products_give_the_same_codes(seed, ):
    x, books = random_case(seed, D=64, N=400)
    rough, exact = ResidualEncoder(books), ResidualEncoder(books)
    exact.fast, exact.kappa, exact.product = False, 0., E._multiply(exact.Cs, False)
    assert (rough(x) == exact(x)).all()


@few
@given(st.integers(0, 10**6))
def test_the_path_of_other_devices_gives_the_same_codes(seed):
    x, books = random_case(seed, D=64, N=300)
    encoder = ResidualEncoder(books)
    out = np.empty((len(x), 3), np.uint8)
    E._encode_far(encoder, x, out, E._room(encoder, len(x)))
    assert (out == encoder(x)).all()


def test_the_bound_is_used():
    "Two codewords that bfloat16 cannot tell apart: without the second look the codes are wrong"
    if not fast_bf16(): pytest.skip("no bfloat16 products here")
    g = np.random.default_rng(0)
    a = g.normal(size=(1, 64)).astype(np.float32)
    books = [np.concatenate([a, a * np.float32(1.0005), -a])]
    x = (a * np.linspace(.99, 1.01, 400)[:, None]).astype(np.float32)
    true = plain(x, books)
    assert (residual_encode(x, books) == true).all() and (residual_encode(x, books, bf16=True) != true).any()


def test_the_bound_covers_the_rounded_product():
    "Vectors that bfloat16 holds exactly: all that is lost is in the product"
    g = np.random.default_rng(0)
    base = g.integers(-1, 2, size=512)
    C = np.where(g.random((128, 512)) < .15, g.integers(-1, 2, size=(128, 512)), base)
    x = np.where(g.random((2000, 512)) < .15, g.integers(-1, 2, size=(2000, 512)), base).astype('f4')
    books = [np.r_[C, -C].astype('f4')]
    assert (residual_encode(x, books) == plain(x, books)).all()


def test_the_bound_covers_many_levels():
    "Items far longer than codewords, two coordinates, many subtractions: every code is a nearest one"
    g = np.random.default_rng(0)
    for D, L in ((2, 64), (4, 200)):
        books = [g.normal(size=(4, D)).astype('f4') for _ in range(L)]
        x = (1e3 * g.normal(size=(200, D))).astype('f4')
        codes, r = residual_encode(x, books).astype(int), x.astype(np.float64)
        for l, C in enumerate(books):
            far = ((r[:, None] - C) ** 2).sum(-1)
            assert (far[np.arange(len(x)), codes[:, l]] <= far.min(1) * (1 + 1e-12)).all()
            r -= C[codes[:, l]]


def test_another_process_gives_the_same_codes(tmp_path):
    program = ("import numpy as np, sys; from grnb.tokenizer.kmeans import ResidualKMeans; g = np.random.default_rng(0);"
               "x = g.normal(size=(600, 16)).astype('f4'); np.save(sys.argv[1], ResidualKMeans(K=20, L=3, seed=5, beam=int(sys.argv[2])).fit(x).encode(x))")
    for beam in ("1", "4"):
        got = []
        for name in ("a", "b"):
            subprocess.run([sys.executable, "-c", program, str(tmp_path/f"{name}.npy"), beam], check=True, timeout=120)
            got.append(np.load(tmp_path/f"{name}.npy"))
        assert (got[0] == got[1]).all()


# --- blocks

@few
@given(st.integers(0, 10**6), st.sampled_from(["f4", "f2", "f8"]), st.integers(0, 5), st.integers(1, 9))
def test_a_memory_map_reads_as_the_array(tmp_path_factory, seed, dtype, skip, batch):
    x = np.random.default_rng(seed).normal(size=(20, 3)).astype(dtype)
    path = tmp_path_factory.mktemp("map")/"x.npy"
    np.save(path, x)
    for m in (np.load(path, mmap_mode="r")[skip:], np.load(path, mmap_mode="r+")[skip:17], np.load(path, mmap_mode="c")[skip:], np.load(path, mmap_mode="r")[skip::2]):
        want = np.array(m)
        got = list(batches(m, 3, batch=batch))
        assert [i for i, _ in got] == list(range(0, len(want), batch)) and (np.concatenate([b for _, b in got]) == want.astype("f4")).all()
        assert (sample_rows(m, 4, seed) == sample_rows(want, 4, seed)).all()


def test_changes_of_a_private_map_are_seen(tmp_path):
    np.save(tmp_path/"x.npy", np.zeros((4, 2), "f4"))
    m = np.load(tmp_path/"x.npy", mmap_mode="c")
    m[2] = 1
    assert np.concatenate([b for _, b in batches(m)])[2].tolist() == [1, 1]


def test_a_file_replaced_after_mapping_is_the_one_mapped(tmp_path):
    old, new = (np.random.default_rng(i).normal(size=(50, 3)).astype('f4') for i in (0, 1))
    np.save(tmp_path/"x.npy", old); np.save(tmp_path/"y.npy", new)
    m = np.load(tmp_path/"x.npy", mmap_mode="r")
    (tmp_path/"y.npy").replace(tmp_path/"x.npy")
    assert (np.concatenate([b for _, b in batches(m)]) == old).all()


def test_a_file_cut_short(tmp_path):
    np.save(tmp_path/"x.npy", np.zeros((4000, 2), "f4"))
    m = np.load(tmp_path/"x.npy", mmap_mode="r")
    with open(tmp_path/"x.npy", "r+b") as f: f.truncate(20000)
    with pytest.raises(ValueError, match="ends before row"): list(batches(m, batch=1000))


def test_a_quantiser_encodes_and_fits_a_map(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 2, 6)).astype("f4")
    np.save(tmp_path/"x.npy", x)
    m = np.load(tmp_path/"x.npy", mmap_mode="r")
    for make in (lambda: ResidualKMeans(K=8, L=2, rows=256), lambda: ResidualKMeans(K=8, L=2, beam=3), lambda: ProductQuantizer(K=8, L=2), lambda: HierarchicalKMeans(K=3, L=3)):
        a, b = make().fit(x), make().fit(m)
        assert a.encode(x).shape[:2] == (300, 2) and (a.encode(x) == b.encode(m)).all()


def test_a_map_with_nan_is_refused(tmp_path):
    x = np.ones((50, 3), "f4"); x[33, 1] = np.nan
    np.save(tmp_path/"x.npy", x)
    m = np.load(tmp_path/"x.npy", mmap_mode="r")
    for f in (lambda: residual_encode(m, [np.eye(3, dtype="f4")]), lambda: ResidualKMeans(K=2, L=1).fit(m), lambda: best_paths(m, [np.eye(3, dtype="f4")], 2)):
        with pytest.raises(ValueError, match="expected finite numbers"): f()


# --- fitting

def test_kmeans_survives_rows_without_length():
    "Codewords that start next to the mean would take nearly every row"
    g = np.random.default_rng(0)
    x = g.normal(size=(3000, 64)).astype(np.float32)
    x[:200] *= 1e-4
    C = kmeans(x, 32, seed=1)
    sizes = np.bincount(residual_encode(x, [C])[:, 0], minlength=32)
    assert sizes.max() < 1200 and (sizes > 0).sum() >= 30


@few
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_classical_quantisers_take_any_small_set(N, K, seed):
    g = np.random.default_rng(seed)
    x = g.normal(size=(N, 5)).astype(np.float32)[g.integers(0, N, N)]
    for q in (ProductQuantizer(K, 3, seed).fit(x), HierarchicalKMeans(K, 3, seed).fit(x)):
        codes = q.encode(x)
        assert codes.shape == (N, 3) and (codes < np.array(q.sizes)).all() and q.decode(codes).shape == (N, 5)
        assert (q.encode(x[:1]) == codes[:1]).all() and len(np.unique(codes, axis=0)) <= len(np.unique(x, axis=0))
        if len(np.unique(x, axis=0)) <= K: assert np.allclose(q.decode(codes), x, atol=1e-5)


def test_product_codes_are_those_of_each_run():
    x = np.random.default_rng(0).normal(size=(400, 10)).astype(np.float32)
    q = ProductQuantizer(K=16, L=3).fit(x)
    for l, run in enumerate(np.array_split(np.arange(10), 3)):
        C = q.codebooks[l][:, run]
        assert (q.codebooks[l][:, np.setdiff1d(np.arange(10), run)] == 0).all()
        assert (q.encode(x)[:, l] == ((x[:, None, run] - C) ** 2).sum(-1).argmin(1)).all()


def test_hierarchical_codes_descend_to_the_nearest_child():
    x = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    q = HierarchicalKMeans(K=5, L=3).fit(x)
    for row, path in zip(x[:100], q.encode(x[:100])):
        node = 0
        for c in path:
            if not q.many[node]: assert c == 0; continue
            children = q.nodes[q.first[node]:q.first[node] + q.many[node]]
            assert c == ((row - children) ** 2).sum(1).argmin()
            node = q.first[node] + c
        assert (q.decode(path[None])[0] == q.nodes[node]).all()
    with pytest.raises(ValueError, match="leaves the tree|below"): q.decode(np.array([[4, 4, 4]]) if not q.many[0] == 5 else np.array([[5, 0, 0]]))


@pytest.mark.parametrize("make", [lambda: ProductQuantizer(8, 2), lambda: HierarchicalKMeans(4, 3), lambda: ResidualKMeans(8, 2, beam=4)])
def test_files(make, tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    q = make().fit(x)
    q.save(tmp_path/"q.safetensors")
    again = load_quantizer(tmp_path/"q.safetensors")
    assert type(again) is type(q) and (again.encode(x) == q.encode(x)).all() and again.sizes == q.sizes
    with pytest.raises(ValueError, match="not fitted"): make().encode(x)


@pytest.mark.parametrize("f, says", [
    (lambda: residual_encode(np.zeros((1, 1)), [np.arange(70000.)[:, None]]), "at most 65536 codes a level"),
    (lambda: residual_encode(np.zeros((1, 1)), [np.ones((20000, 1))] * 2), "at most 32768 codes over all levels"),
    (lambda: residual_encode(np.zeros((1, 1)), []), "at least one array"),
    (lambda: residual_encode(np.zeros((1, 2)), [np.ones((2, 2)), np.ones((2, 3))]), "all of one width"),
    (lambda: residual_encode(np.zeros((1, 1)), [np.ones((2, 1))], batch=2.5), "batch: expected a whole number"),
    (lambda: best_paths(np.zeros((1, 1)), [np.ones((2, 1))], 1, batch=0), "batch: expected at least 1"),
    (lambda: best_paths(np.full((1, 2), 1e25), [np.ones((2, 2))], 1), "shorter than 1e18"),
    (lambda: ResidualKMeans(device="tpu"), "device"),
])
def test_bad_calls(f, says):
    with pytest.raises(ValueError, match=says): f()


@pytest.mark.parametrize("change", [lambda a: {k: v for k, v in a.items() if k != "codebook.1"}, lambda a: a | {"codebook.0": a["codebook.0"][:, :3]}, lambda a: a | {"codebook.0": np.full_like(a["codebook.0"], np.nan)},
                                    lambda a: a | {"codebook.0": np.zeros((99, 6), "f4")}, lambda a: a | {"codebook.2": a["codebook.0"]}])
def test_damaged_files_are_refused(change, tmp_path):
    for q in (ResidualKMeans(8, 2), ProductQuantizer(8, 2)):
        arrays, settings = q.fit(np.random.default_rng(0).normal(size=(99, 6)).astype("f4")).arrays()
        save_arrays(tmp_path/"q", change(arrays), dict(kind=q.kind, **settings))
        with pytest.raises(ValueError, match="not a quantiser of this version"): load_quantizer(tmp_path/"q")


# --- beams

@few
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_a_beam_as_wide_as_all_prefixes_is_exhaustive(seed, W):
    g = np.random.default_rng(seed)
    x, books = g.normal(size=(6, 4)).astype(np.float32), [g.normal(size=(k, 4)).astype(np.float32) for k in (4, 3, 5)]
    every = np.stack(np.meshgrid(*map(np.arange, (4, 3, 5)), indexing="ij"), -1).reshape(-1, 3)
    true = np.sort(((x[:, None] - sum(b[every[:, l]] for l, b in enumerate(books))) ** 2).sum(-1), 1)
    codes, errors = best_paths(x, books, 60)
    assert np.allclose(errors, true, atol=1e-4) and all(len(np.unique(c, axis=0)) == 60 for c in codes)
    narrow = best_paths(x, books, W)[1]
    assert (narrow[:, 0] >= errors[:, 0] - 1e-4).all() and (np.diff(narrow, axis=1) >= -1e-6).all()


def test_a_wider_beam_fits_better():
    x = np.random.default_rng(0).normal(size=(1000, 12)).astype(np.float32)
    left = [((x - (q := ResidualKMeans(16, 4, beam=b).fit(x)).decode(q.encode(x))) ** 2).sum() for b in (1, 4, 16)]
    assert left[0] > left[1] > left[2]
