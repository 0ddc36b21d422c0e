"beam search and expansion against level-by-level and exhaustive references in numpy"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from concurrent.futures import ThreadPoolExecutor
from grnb.decode.beam import FreeCodes, batch_for, beam_search, diverse_search, exhaustive
from grnb.decode.expand import expand
from grnb.generator.frozen import FrozenPrefix
from grnb.generator.frozen_t5 import FrozenT5
from grnb.generator.prefix import PrefixGenerator
from grnb.generator.strong import StrongForm, take
from grnb.generator.t5 import T5Generator
from grnb.ids.make import SemanticIDs
from grnb.trie.layout import Trie

torch.set_num_threads(1)


class Table:
    "Step scores drawn from a table by the whole prefix: small whole numbers, so sums are exact and ties are common"
    device = "cpu"

    def __init__(self, sizes, values=4): self.sizes, self.values = tuple(sizes), values

    def steps(self, query, prefix):                                     # float32 (K,)
        g = np.random.default_rng([int(query), len(prefix), *map(int, prefix)])
        return g.integers(0, self.values, self.sizes[len(prefix)]).astype(np.float32)

    def start(self, queries): return queries[:, None, :1].long()        # (B, 1, prefix so far after the query's number)

    def step(self, state, level, beams):
        if level: state = torch.cat([take(state, beams.parent), beams.code[..., None]], -1)
        flat = state.flatten(0, 1).tolist()
        scores = torch.from_numpy(np.stack([self.steps(p[0], p[1:]) for p in flat]))
        return scores.unflatten(0, state.shape[:2]), state


def reference(score, query, codes, width):
    "Level by level over sorted distinct `codes` (U, L): leaves and scores of the beams, best first, ties by lower leaf"
    beams = [((), np.float32(0))]
    for level in range(codes.shape[1]):
        grown = []
        for prefix, total in beams:
            below = np.flatnonzero((codes[:, :level] == np.array(prefix, int).reshape(1, -1)).all(1)) if level else np.arange(len(codes))
            steps = score(query, prefix)
            for c in np.unique(codes[below, level]):
                first = below[codes[below, level] == c][0]
                grown.append((-(total + steps[c]), first, (*prefix, int(c))))
        grown.sort(key=lambda t: t[:2])
        beams = [(p, np.float32(-t)) for t, _, p in grown[:width]]
    leaf = {tuple(c): i for i, c in enumerate(codes.tolist())}
    return [leaf[p] for p, _ in beams], [s for _, s in beams]


@st.composite
def pools(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n, seed = draw(st.integers(1, 40)), draw(st.integers(0, 9999))
    tokens = np.random.default_rng(seed).integers(0, sizes, (n, len(sizes))).astype(np.uint8)
    return Trie.build(SemanticIDs(tokens, np.arange(n), tuple(sizes)), scan=draw(st.sampled_from([0, 2, 64]))), draw(st.integers(1, 45))


@settings(max_examples=60, deadline=None)
@given(pools(), st.integers(1, 4))
def test_beams_equal_the_level_by_level_reference(pool, batch):
    trie, width = pool
    table, queries = Table(trie.sizes), np.arange(3)[:, None]
    leaves, scores = beam_search(table, queries, trie, width, batch)
    assert leaves.shape == scores.shape == (3, width) and leaves.dtype == np.int64 and scores.dtype == np.float32
    for q in range(3):
        want, values = reference(table.steps, q, np.asarray(trie.codes).astype(int), width)
        n = len(want)
        assert leaves[q, :n].tolist() == want and scores[q, :n].tolist() == values
        assert (leaves[q, n:] == -1).all() and (scores[q, n:] == -np.inf).all()


@settings(max_examples=40, deadline=None)
@given(pools())
def test_a_beam_as_wide_as_the_trie_is_exhaustive(pool):
    trie, _ = pool
    table, queries = Table(trie.sizes), np.arange(2)[:, None]
    truth = exhaustive(table, queries, trie, chunk=7)
    leaves, scores = beam_search(table, queries, trie, len(trie))
    order = np.argsort(-truth, axis=1, kind="stable")                   # ties by lower leaf
    assert (leaves == order).all() and (scores == np.take_along_axis(truth, order, 1)).all()
    prefix_sums = [sum(table.steps(0, c[:l])[c[l]] for l in range(len(c))) for c in trie.codes.tolist()]
    assert truth[0].tolist() == prefix_sums


def test_without_trie_every_code_may_follow():
    table = Table((3, 2, 4), values=10 ** 6)
    codes, scores = beam_search(table, np.zeros((1, 1)), None, 24)
    everything = np.stack(np.meshgrid(*map(np.arange, table.sizes), indexing="ij"), -1).reshape(-1, 3)
    want, values = reference(table.steps, 0, everything, 24)
    assert codes[0].tolist() == everything[want].tolist() and scores[0].tolist() == values
    assert beam_search(table, np.zeros((1, 1)), None, 30)[0][0, 24:].tolist() == [[-1] * 3] * 6


def world(N=400, D=12, K=8, L=3, seed=0):
    "Items, residual codebooks made by hand, codes, trie, queries"
    g = np.random.default_rng(seed)
    x = g.normal(size=(N, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    books, r, codes = [], x.copy(), []
    for _ in range(L):
        C = r[g.choice(N, K, False)].copy()
        c = ((r[:, None] - C) ** 2).sum(-1).argmin(1)
        books.append(C); codes.append(c); r -= C[c]
    codes = np.stack(codes, 1)
    return x, books, codes, Trie.build(SemanticIDs(codes.astype(np.uint8), np.arange(N), (K,) * L)), x[:20] + 0.1 * g.normal(size=(20, D)).astype(np.float32)


def numpy_strong(books, weak=False):
    def score(q, prefix):
        xhat = sum((books[l][c] for l, c in enumerate(prefix)), np.zeros_like(q))
        C = books[len(prefix)]
        return C @ q if weak else C @ (q - xhat) - (C ** 2).sum(1) / 2
    return score


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("width", [1, 5, 60])
def test_strong_form_search_is_residual_quantised_search(weak, width):
    x, books, codes, trie, queries = world()
    leaves, scores = beam_search(StrongForm(books, weak=weak), queries, trie, width)
    for q in range(len(queries)):
        want, values = reference(numpy_strong(books, weak), queries[q], np.asarray(trie.codes).astype(int), width)
        assert leaves[q, :len(want)].tolist() == want
        assert np.allclose(scores[q, :len(want)], values, atol=1e-5)


def test_exhaustive_strong_form_ranks_ids_by_distance():
    x, books, codes, trie, queries = world()
    xhat = sum(C[c] for C, c in zip(books, np.asarray(trie.codes).astype(int).T))
    score = queries @ xhat.T - (xhat ** 2).sum(1) / 2
    assert np.allclose(exhaustive(StrongForm(books), queries, trie), score, atol=1e-5)
    assert np.allclose(exhaustive(StrongForm(books, weak=True), queries, trie), queries @ xhat.T, atol=1e-5)


@pytest.mark.parametrize("width", [1, 7, 50, 400])
def test_geometry_at_step_0_is_residual_quantised_search_bit_for_bit(width):
    x, books, codes, trie, queries = world()
    net = PrefixGenerator(12, codebooks=books, d_model=32, n_heads=4, seed=3)
    want, values = beam_search(StrongForm(books), queries, trie, width)
    for model in (net, FrozenPrefix(net), FrozenPrefix(net, "bf16")):
        leaves, scores = beam_search(model, queries, trie, width)
        assert (leaves == want).all() and (scores == 16 * values).all()
    assert net.training                                                 # as it was before the searches


def test_geometry_with_a_counter_level():
    x, books, codes, _, queries = world(K=4, L=2)
    order = np.lexsort(codes.T[::-1])
    counter = np.zeros(len(codes), int)
    for a, b in zip(order[:-1], order[1:]): counter[b] = counter[a] + 1 if (codes[a] == codes[b]).all() else 0
    size = int(counter.max()) + 1
    trie = Trie.build(SemanticIDs(np.c_[codes, counter].astype(np.uint16), np.arange(len(codes)), (4, 4, size)))
    strong, net = StrongForm(books, counter=size), PrefixGenerator(12, codebooks=books, counter=size, d_model=16, n_heads=2)
    a, b = beam_search(strong, queries, trie, 30), beam_search(net, queries, trie, 30)
    assert net.sizes == strong.sizes == (4, 4, size) and (a[0] == b[0]).all() and (16 * a[1] == b[1]).all()


@pytest.mark.parametrize("kind", ["random", "geometry", "frozen", "t5"])
def test_learned_generators_against_their_own_scores(kind):
    x, books, codes, trie, queries = world(N=150)
    if kind == "t5":
        config = dict(vocab_size=30, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=2, num_heads=4)
        model = T5Generator(config, sizes=trie.sizes).eval()
        queries = np.random.default_rng(0).integers(2, 30, (6, 5)), np.ones((6, 5), int)
    else:
        model = PrefixGenerator(12, trie.sizes, books, init="random" if kind == "random" else "geometry", d_model=16, n_heads=2).eval()
        for p in model.parameters(): p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        if kind == "frozen": model = FrozenPrefix(model)
    truth = exhaustive(model, queries, trie)
    leaves, scores = beam_search(model, queries, trie, len(trie))
    assert (np.sort(leaves, 1) == np.arange(len(trie))).all()
    assert np.allclose(scores, np.take_along_axis(truth, leaves, 1), atol=1e-4)
    assert np.allclose(scores, -np.sort(-truth, 1), atol=1e-4)
    narrow, s = beam_search(model, queries, trie, 5, batch_size=4)
    assert (np.diff(s, axis=1) <= 0).all() and np.allclose(s, np.take_along_axis(truth, narrow, 1), atol=1e-4)


def test_no_queries_and_bad_arguments():
    x, books, codes, trie, queries = world()
    strong = StrongForm(books)
    leaves, scores = beam_search(strong, queries[:0], trie, 3)
    assert leaves.shape == scores.shape == (0, 3) and exhaustive(strong, queries[:0], trie).shape == (0, len(trie))
    for call, says in ((lambda: beam_search(strong, queries, trie, 0), "beam: expected at least 1"),
                       (lambda: beam_search(strong, queries, trie, 2.5), "beam: expected a whole number"),
                       (lambda: beam_search(strong, queries, trie, 2, 0), "batch_size"),
                       (lambda: beam_search(strong, queries[:, :4], trie, 2), r"queries: expected \(B, 12\), got \(20, 4\)"),
                       (lambda: beam_search(StrongForm(books[:2]), queries, trie, 2), "trie: expected levels"),
                       (lambda: expand(np.zeros((1, 2), int), np.zeros((1, 3)), trie, 2), "leaves: expected"),
                       (lambda: expand(np.full((1, 2), len(trie)), np.zeros((1, 2)), trie, 2), "leaves: expected values below"),
                       (lambda: expand(np.zeros((1, 2), int), np.zeros((1, 2)), trie, 0), "candidates: expected at least 1")):
        with pytest.raises(ValueError, match=says): call()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.integers(1, 90), st.integers(0, 9999))
def test_free_codes_select_the_best_extensions(B, W, K, width, seed):
    "Small whole numbers, so ties abound: lower beam, then lower code"
    g = np.random.default_rng(seed)
    free, scores, steps = FreeCodes((K,)), g.integers(-2, 3, (B, W)).astype(np.float32), g.integers(-3, 3, (B, W, K)).astype(np.float32)
    scores[g.random((B, W)) < 0.2] = -np.inf
    beams = free.root(B, "cpu")._replace(scores=torch.from_numpy(scores))
    out = free.advance(beams, torch.from_numpy(steps), 0, width)
    total = (scores[..., None] + steps).reshape(B, -1)
    for b in range(B):
        order = np.argsort(-total[b], kind="stable")[:width]
        order = order[total[b][order] > -np.inf]
        n = len(order)
        assert out.scores[b, :n].tolist() == total[b][order].tolist() and (out.scores[b, n:] == -np.inf).all()
        assert (out.parent[b, :n] * K + out.code[b, :n]).tolist() == order.tolist()


def snapshots(init="geometry", precision="fp32", L=3):
    "A prefix generator's and a T5's snapshot over one trie, with queries for each"
    x, books, codes, trie, queries = world(N=600, L=L)
    net = PrefixGenerator(12, codebooks=books, init=init, d_model=32, n_heads=4)
    t5 = T5Generator(dict(vocab_size=30, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=2, num_heads=4), codebooks=books, init=init).eval()
    for m in (net, t5):
        for p in m.parameters(): p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    g = np.random.default_rng(0)
    asked = g.normal(size=(300, 12)).astype(np.float32)
    words = g.integers(2, 30, (300, 5)), (np.arange(5) < g.integers(2, 6, (300, 1))).astype(int)
    return trie, ((FrozenPrefix(net.eval(), precision), asked), (FrozenT5(t5, precision), words))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("init", ["geometry", "random"])
def test_results_do_not_depend_on_the_batch(init, which):
    trie, pairs = snapshots(init)
    model, queries = pairs[which]
    want, values = beam_search(model, queries, trie, 20, 1)
    for batch in (7, 300, None):
        leaves, scores = beam_search(model, queries, trie, 20, batch)
        assert np.allclose(scores, values, atol=1e-4) and (leaves != want).mean() < 1e-3          # where they differ, scores tie up to rounding


def test_the_batch_is_chosen_by_memory():
    trie, ((model, queries), _) = snapshots()
    sizes = [batch_for(model, W) for W in (1, 10, 50, 200, 1000, 10 ** 5)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 256 and sizes[-1] == 1
    assert batch_for(model, 10, limit=1) == 1 and model.bytes_a_query(100) > 50 * model.bytes_a_query(1, memory=0) and batch_for(StrongForm([np.ones((4, 2))]), 1000) == 4
    leaves, scores = beam_search(model, queries[:20], trie, 2000)       # wider than the trie
    assert (np.sort(leaves, 1)[:, -len(trie):] == np.arange(len(trie))).all() and (leaves[:, len(trie):] == -1).all()
    greedy = beam_search(model, queries[:20], trie, 1)
    assert greedy[0].shape == (20, 1) and (greedy[1][:, 0] <= scores[:, 0] + 1e-4).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_many_threads_share_a_snapshot(precision):
    "16 threads, different queries and beams, one engine: each gets what it gets alone"
    trie, pairs = snapshots(precision=precision)
    jobs = [(model, tuple(t[i:i + 3] for t in q) if isinstance(q, tuple) else q[i:i + 3], W) for i, W in zip(range(0, 48, 3), (1, 5, 20, 50) * 4) for model, q in pairs]
    alone = [beam_search(m, q, trie, W) for m, q, W in jobs]
    with ThreadPoolExecutor(16) as pool:
        for again in range(2):
            for (a, b), (c, d) in zip(alone, pool.map(lambda j: beam_search(j[0], j[1], trie, j[2]), jobs)): assert (a == c).all() and (b == d).all()


def slow_diverse(table, query, codes, W, G, penalty):
    "Groups one after the other, prefix by prefix"
    groups, n = [[((), 0.)] for _ in range(G)], W // G
    for level in range(codes.shape[1]):
        taken = np.zeros(table.sizes[level])
        for g in range(G):
            grown = []
            for prefix, total in groups[g]:
                below = np.flatnonzero((codes[:, :level] == np.array(prefix, int).reshape(1, -1)).all(1)) if level else np.arange(len(codes))
                steps = table.steps(query, prefix)
                for c in np.unique(codes[below, level]): grown.append((-(total + steps[c] - penalty * taken[c]), below[codes[below, level] == c][0], (*prefix, int(c)), total + steps[c]))
            grown.sort(key=lambda t: t[:2])
            groups[g] = [(p, s) for _, _, p, s in grown[:n]]
            for p, _ in groups[g]: taken[p[-1]] += 1
    leaf, best = {tuple(c): i for i, c in enumerate(codes.tolist())}, {}
    for p, s in sum(groups, []): best[leaf[p]] = max(s, best.get(leaf[p], -np.inf))
    return sorted(best.items(), key=lambda t: (-t[1], t[0]))


@settings(max_examples=30, deadline=None)
@given(pools(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0., 1., 2.5]))
def test_groups_equal_the_slow_reference(pool, G, each, penalty):
    trie, _ = pool
    table, queries = Table(trie.sizes), np.arange(3)[:, None]
    leaves, scores = diverse_search(table, queries, trie, G * each, G, penalty, batch_size=2)
    for q in range(3):
        want = slow_diverse(table, q, np.asarray(trie.codes).astype(int), G * each, G, penalty)
        n = len(want)
        assert list(zip(leaves[q, :n].tolist(), scores[q, :n].tolist())) == want
        assert (leaves[q, n:] == -1).all() and (scores[q, n:] == -np.inf).all()


def test_groups_spread_and_refuse():
    x, books, codes, trie, queries = world()
    strong, different = StrongForm(books), lambda found: np.mean([len(set(c)) for l in found for c in trie.spell(l[l >= 0]).T])       # codes a level
    assert different(diverse_search(strong, queries, trie, 12, 4, 1.)[0]) > different(beam_search(strong, queries, trie, 12)[0]) + 0.5
    for call, says in ((lambda: diverse_search(strong, queries, trie, 10, 3), "groups: expected a divisor of the beam 10"),
                       (lambda: diverse_search(strong, queries, trie, 10, 5, -1.), "penalty: expected a number"),
                       (lambda: diverse_search(strong, queries, trie, 10, 0), "groups: expected at least 1")):
        with pytest.raises(ValueError, match=says): call()


def slow_expand(leaves, scores, ids, C):
    leaf_ids, out = sorted(set(map(tuple, ids.tokens.tolist()))), []
    for leaf, score in zip(leaves, scores):
        if leaf < 0: continue
        for row in sorted(r for t, r in zip(ids.tokens.tolist(), ids.rows.tolist()) if tuple(t) == leaf_ids[leaf]):
            if row not in [r for r, _ in out]: out.append((row, score))
    out = out[:C] + [(-1, -np.inf)] * (C - len(out))
    return [r for r, _ in out], [s for _, s in out]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 70), st.integers(0, 9999))
def test_expansion(n, K, views, candidates, seed):
    g = np.random.default_rng(seed)
    rows = np.repeat(np.arange(n) * 3, views)                           # several IDs an item, gaps between rows; ascending, as make_ids gives them
    ids = SemanticIDs(g.integers(0, K, (n * views, 2)).astype(np.uint8), rows, (K, K))
    trie = Trie.build(ids)
    W = int(g.integers(1, len(trie) + 3))
    leaves = np.stack([np.r_[g.permutation(len(trie)), [-1, -1, -1]][:W] for _ in range(3)])
    scores = -np.sort(-g.normal(size=(3, W)).astype(np.float32), 1)
    found, values = expand(leaves, scores, trie, candidates)
    assert found.shape == values.shape == (3, candidates)
    for q in range(3):
        want, s = slow_expand(leaves[q], scores[q], ids, candidates)
        assert found[q].tolist() == want and values[q].tolist() == s
