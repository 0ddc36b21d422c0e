"Towers and the text encoder: learning, determinism, resume, saving, shared spaces, refusals"
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from grnb.core import load_arrays, mean_view, rng, save_arrays, unit
from grnb.features.text import TextEncoder, learn_bpe, token_matrix
from grnb.features.towers import Siblings, Tower, Towers, dev_recall, settle, view_mix


def world(n=120, seed=0, views=3, width=10, query_width=6, each=2):
    "Items and queries made of the same hidden points"
    g = rng(seed, "world")
    point = g.standard_normal((n, 4))
    items = np.abs(point @ rng(0, "eye").standard_normal((4, width)))[:, None] + 0.1 * np.abs(g.standard_normal((n, views, width)))
    positives = np.repeat(np.arange(n), each)
    queries = np.abs(point @ rng(0, "eye").standard_normal((4, width)))[positives] @ rng(0, "ear").standard_normal((width, query_width))
    return items, queries + 0.05 * g.standard_normal(queries.shape), positives

def r1(enc, items, queries, positives): return ((enc.encode_queries(queries) @ enc.encode_items(items).T).argmax(1) == positives).mean()

SMALL, FAST = dict(dim=12, hidden=24, noise=0.1), dict(steps=120, batch_size=64, lr=3e-3, device="cpu")


def test_unseen_items_are_found_and_what_is_kept_is_the_best_on_dev():
    dev = world(60, 1)
    t = Towers(**SMALL).fit(*world(), dev=dev, **FAST)
    assert r1(t, *dev) > 0.4                                       # chance is 1 / 60
    assert t.result.best_score == max(s for _, s in t.result.history) > t.result.history[0][1]


def test_shapes_units_and_views():
    items, queries, positives = world()
    t = Towers(**SMALL).fit(items, queries, positives, **{**FAST, "steps": 5})
    a, b, q = t.encode_items(items), t.encode_items(items, views=True), t.encode_queries(queries)
    assert a.shape == (120, 12) and b.shape == (120, 3, 12) and q.shape == (240, 12) and a.dtype == np.float32
    for x in (a, b, q): assert np.allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    assert np.allclose(t.encode_items(items[:, 0]), b[:, 0], atol=1e-5)
    assert t.encode_items(items[:0]).shape == (0, 12) and t.encode_queries(queries[:0]).shape == (0, 12)
    assert np.allclose(t.encode_items(items[5:6] * 1000), a[5], atol=1e-5)                   # length carries nothing


def test_same_seed_same_bits_other_seed_other_bits():
    a, b, c = (Towers(**SMALL).fit(*world(), seed=s, **{**FAST, "steps": 20}).arrays()[0] for s in (0, 0, 1))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert any(not np.array_equal(a[k], c[k]) for k in a)


def test_save_and_load(tmp_path):
    items, queries, positives = world()
    t = Towers(**SMALL).fit(items, queries, positives, **{**FAST, "steps": 5})
    save_arrays(tmp_path/"t.safetensors", *t.arrays())
    u = Towers.from_arrays(*load_arrays(tmp_path/"t.safetensors"))
    assert np.array_equal(t.encode_items(items), u.encode_items(items)) and np.array_equal(t.encode_queries(queries), u.encode_queries(queries))
    arrays, facts = load_arrays(tmp_path/"t.safetensors")
    with pytest.raises(ValueError, match="items.mean"): Towers.from_arrays({k: v for k, v in arrays.items() if k != "items.mean"}, facts)
    with pytest.raises(ValueError, match="shape"): Towers.from_arrays(arrays, {**facts, "dim": 13})


@given(st.integers(2, 6), st.integers(2, 12), st.integers(1, 3))
def test_a_shared_space_is_left_alone_before_the_first_step(n, width, views):
    g = rng(n, "shared", width)
    items, queries = g.standard_normal((n, views, width)), g.standard_normal((n, width))
    for dim in (None, width + 3):
        t = Towers(dim=dim, hidden=4).fit(items, queries, np.arange(n), steps=0, device="cpu")
        assert np.allclose(t.encode_queries(queries) @ t.encode_items(items).T, unit(np.float32(queries)) @ mean_view(np.float32(items)).T, atol=1e-5)
        assert t.encode_items(items).shape[1] == (dim or width)


def test_training_that_hurts_a_shared_space_is_not_kept():
    g = rng(0, "hurt")
    x = g.standard_normal((200, 8))
    wrong = g.permutation(100)                                     # the training pairs are nonsense, the dev pairs are right
    t = Towers().fit(x[:100], x[wrong], np.arange(100), dev=(x[100:], x[100:], np.arange(100)), **FAST)
    assert t.result.best_step == 0 and r1(t, x[100:], x[100:], np.arange(100)) == 1


def test_few_items_and_one_item():
    for n in (1, 2, 50):
        items, queries, positives = world(n)
        t = Towers(**SMALL).fit(items, queries, positives, dev=(items, queries, positives), **{**FAST, "steps": 10})
        assert np.isfinite(t.encode_items(items)).all()
    constant = np.ones((5, 4))
    t = Towers(**SMALL).fit(constant, rng(0).standard_normal((5, 3)), np.arange(5), **{**FAST, "steps": 3})
    assert np.isfinite(t.encode_items(constant)).all()


def test_settle_standardises():
    for x, root in ((rng(0).random((50, 2, 4)), True), (rng(0).standard_normal((50, 2, 4)), False)):
        x = torch.from_numpy(np.float32(x))
        t = Tower(4, 3)
        settle(t, x)
        z = t.prepare(x).reshape(-1, 4)
        assert bool(t.root) == root and torch.allclose(z.mean(0), torch.zeros(4), atol=1e-5) and torch.allclose(z.std(0, correction=0), torch.ones(4), atol=1e-4)


def test_dev_recall_against_numpy():
    g = rng(0, "recall")
    q, x, o = (unit(np.float32(g.standard_normal((n, 5)))) for n in (40, 15, 25))
    p = g.integers(0, 15, 40)
    want = []
    for pool in (x, np.concatenate([x, o])):
        s = q @ pool.T
        rank = 1 + (s > s[np.arange(40), p][:, None]).sum(1)
        want += [(rank <= k).mean() for k in (1, 5, 10, 50, 100)]
    assert abs(dev_recall(*map(torch.from_numpy, (q, x, p, o))) - np.mean(want)) < 1e-6


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 9))
def test_siblings_share_the_item(positives, seed):
    p = np.array(positives)
    s, rows = Siblings(p), np.arange(len(p))
    assert np.array_equal(p[s.draw(rows, rng(seed))], p)


def test_view_mix_stays_between_the_views():
    z = torch.rand(50, 4, 3)
    m = view_mix(z, rng(0))
    assert (m >= z.min(1).values - 1e-6).all() and (m <= z.max(1).values + 1e-6).all() and view_mix(z[:, 0], rng(0)) is not None


@pytest.mark.parametrize("change, words", [(dict(items=np.full((4, 3), np.nan)), "items: expected finite"), (dict(queries=np.ones(3)), "queries: expected shape"), (dict(items=np.zeros((4, 3))), "items: row .* is zero"),
    (dict(positives=[0, 1]), "one item row for each of 4"), (dict(positives=[0, 1, 2, 4]), "rows from 0 to 3"), (dict(positives=[0., 1, 2, 3]), "whole numbers"),
    (dict(positives=[]), "positives"), (dict(dev=(np.ones((1, 3)), np.ones((1, 2)), [1])), "dev positives"), (dict(steps=-1), "steps"), (dict(batch_size=0), "batch_size")])
def test_bad_input(change, words):
    g = rng(0)
    given_ = dict(items=g.standard_normal((4, 3)), queries=g.standard_normal((4, 2)), positives=[0, 1, 2, 3], steps=2, batch_size=4, device="cpu")
    with pytest.raises(ValueError, match=words): Towers(**SMALL).fit(**{**given_, **change})


def test_bad_construction_and_unfitted():
    for kw in (dict(dim=0), dict(hidden=0), dict(noise=1.), dict(noise=-0.1)):
        with pytest.raises(ValueError): Towers(**kw)
    for call in (lambda: Towers().encode_items(np.ones((1, 2))), lambda: Towers().arrays(), lambda: TextEncoder().encode(["a"]), lambda: Towers().to("cpu")):
        with pytest.raises(ValueError, match="not fitted"): call()


@pytest.mark.parametrize("text", [False, True])
def test_stopped_and_started_again(tmp_path, monkeypatch, text):
    from grnb.features import text as text_module, towers as towers_module
    module, name = (text_module, "feed_texts") if text else (towers_module, "feed")
    feed = getattr(module, name)
    def broken(*a):
        def batch(step):
            if step == 33: raise KeyboardInterrupt
            return feed(*a)(step)
        return batch
    def go(**kw):
        if text: return text_encoder(item_tower=True, fit=kw).arrays()[0]
        return Towers(**SMALL).fit(*world(), dev=world(60, 1), **{**FAST, "steps": 60}, **kw).arrays()[0]
    whole = go()
    monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(module, "train", lambda *a, _train=module.train, **k: _train(*a, **k, save_every=10))
    with pytest.raises(KeyboardInterrupt): go(checkpoint=tmp_path)
    monkeypatch.setattr(module, name, feed)
    rest = go(checkpoint=tmp_path)
    assert whole.keys() == rest.keys() and all(np.array_equal(whole[k], rest[k]) for k in whole)


# --- texts

COLOURS, SHAPES = "red blue green gold pink".split(), "ball cube cone star ring disc".split()
COMBOS = [(c, s) for c in COLOURS for s in SHAPES]

def texts(rows):
    parts = {w: rng(0, w).standard_normal(10) for w in COLOURS + SHAPES}
    vectors = np.stack([parts[c] + parts[s] for c, s in COMBOS])[rows]
    return [w.format(*COMBOS[i]) for i in rows for w in ("a {} {}", "one {} {} here")], vectors, np.repeat(np.arange(len(rows)), 2)

def text_encoder(fit={}, **kw):
    rows = np.arange(len(COMBOS))
    return TextEncoder(dim=16, width=32, vocab=350, noise=0.1, **kw).fit(*texts(rows[rows % 4 > 0]), dev=texts(rows[rows % 4 == 0]), steps=80, batch_size=32, lr=5e-3, device="cpu", **fit)


@pytest.mark.parametrize("tower", [False, True])
def test_texts_find_unseen_combinations_and_come_back_from_disk(tower, tmp_path):
    enc, held = text_encoder(item_tower=tower), texts(np.arange(len(COMBOS))[::4])
    assert r1(enc, held[1], held[0], held[2]) > 0.5
    assert enc.encode(held[0]).shape == (16, 16 if tower else 10)
    save_arrays(tmp_path/"e.safetensors", *enc.arrays())
    again = TextEncoder.from_arrays(*load_arrays(tmp_path/"e.safetensors"))
    assert np.array_equal(again.encode_queries(held[0]), enc.encode(held[0])) and np.array_equal(again.encode_items(held[1]), enc.encode_items(held[1]))
    same = text_encoder(item_tower=tower).arrays()
    assert same[1] == enc.arrays()[1] and all(np.array_equal(v, same[0][k]) for k, v in enc.arrays()[0].items())
    odd = enc.encode(["", "žluťoučký 🐎", "ball " * 300, " "])
    assert np.isfinite(odd).all() and np.allclose(np.linalg.norm(odd, axis=1), 1, atol=1e-5) and enc.encode([]).shape == (0, odd.shape[1])
    for bad in ("one", [1], [None]):
        with pytest.raises(ValueError, match="texts"): enc.encode(bad)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_every_text_has_tokens_that_spell_it(bpe, strings):
    m = token_matrix(bpe, strings)
    assert m.shape[0] == len(strings) and m.min() >= 0 and m.max() < bpe.get_vocab_size() and m.shape[1] <= 64

@pytest.fixture(scope="module")
def bpe(): return learn_bpe(texts(np.arange(30))[0], vocab=300)

def test_spelling(bpe):
    assert bpe.decode(bpe.encode("Gold ball").ids).strip() == "gold ball"
    with pytest.raises(ValueError, match="vocab"): learn_bpe(["a"], vocab=100)


def test_bad_text_input():
    g = rng(0)
    for args, words in (((["a", "b"], g.standard_normal((2, 3)), [0]), "one item row"), ((["a", 2], g.standard_normal((2, 3)), [0, 1]), "texts: expected strings"),
                        (("ab", g.standard_normal((2, 3)), [0, 1]), "single string"), ((["a", "b"], g.standard_normal(3), [0, 1]), "items")):
        with pytest.raises(ValueError, match=words): TextEncoder().fit(*args, steps=1, device="cpu")
    for kw in (dict(dim=0), dict(vocab=1.5), dict(noise=2), dict(layers=-1)):
        with pytest.raises(ValueError): TextEncoder(**kw)
