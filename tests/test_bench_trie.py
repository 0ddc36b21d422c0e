"""Constraints beside ours, and the two benches on them: the same beams from every trie, recorded products, resuming, verdicts from numbers."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grnb.bench import Ratio, constraints as others, decoder, trie as bench
from grnb.bench.constraints import HashNodes, Marisa, NestedDict, SparseRows, present, random_codes, random_ids, random_steps, spelt, top_k, walk
from grnb.bench.decoder import DecoderBench, Generate, Given, Products, bench_decoder, memories, plain_products, shared, t5
from grnb.bench.trie import FREE, MASK, OURS, Masked, Replayed, TrieBench, bench_trie, fresh_build, timed_walk
from grnb.decode.beam import FreeCodes, descend
from grnb.ids.make import make_ids
from grnb.report import load_results
from grnb.trie.layout import Trie

HERE = [p for p, why in present().items() if not why]


# --- constraints

@st.composite
def pools(draw):
    "Random codes of up to five levels, sizes of their own, few enough that prefixes die and IDs repeat"
    sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    g = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    return g.integers(sizes, size=(draw(st.integers(1, 60)), len(sizes))).astype(np.uint8), sizes


def best(codes, steps, width):
    "Brute force: one query's beams over the set of prefixes, best first"
    beams = [((), 0, np.float32(0))]
    for l, scores in enumerate(steps):
        kids = [(p + (c,), i, np.float32(s + scores[0, i, c])) for i, (p, _, s) in enumerate(beams) for c in sorted({r[l] for r in codes.tolist() if tuple(r[:l]) == p})]
        beams = sorted(kids, key=lambda k: -k[2])[:width]
    return [(p, s) for p, _, s in beams]


@settings(max_examples=40, deadline=None)
@given(pools(), st.integers(1, 12), st.integers(0, 99))
def test_every_constraint_gives_the_beams_of_brute_force(pool, width, seed):
    codes, sizes = pool
    unique, steps = np.unique(codes, axis=0), random_steps(1, width, sizes, seed)
    want = best(unique, [s.numpy() for s in steps], width)
    for tree in [Trie.build(make_ids(codes, sizes))] + [p(unique, sizes) for p in HERE]:
        scores, found = spelt(walk(tree, steps, width))
        alive = np.isfinite(scores[0])
        assert np.allclose(scores[0][alive], [s for _, s in want], rtol=0, atol=0), tree
        assert found[0][alive].tolist() == [list(p) for p, _ in want] and (found[0][~alive] == -1).all(), tree


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_queries_of_a_batch_do_not_meet(B, seed):
    codes, sizes = random_codes(300, seed, 4, 8), (8,) * 4
    unique, steps = np.unique(codes, axis=0), random_steps(B, 6, sizes, seed)
    for p in HERE:
        tree = p(unique, sizes)
        together = spelt(walk(tree, steps, 6))
        alone = [spelt(walk(tree, [s[b:b + 1] for s in steps], 6)) for b in range(B)]
        for i in (0, 1): assert np.array_equal(together[i], np.concatenate([a[i] for a in alone])), p.name


def test_prefix_trees_list_what_follows():
    codes = np.uint8([[0, 1, 2], [0, 1, 3], [0, 5, 0], [7, 0, 0]])
    for p in (NestedDict, Marisa, HashNodes):
        if p not in HERE: continue
        tree = p(codes, (8,) * 3)
        assert [sorted(tree.get(x)) for x in ([], [0], [0, 1], [7, 0], [3], [0, 2])] == [[0, 7], [1, 5], [2, 3], [0], [], []]
        assert tree.bytes() > 0


def test_marisa_characters_tell_codes_apart():
    if Marisa not in HERE: pytest.skip('no marisa-trie')
    codes = np.array([[0, 60_000], [0, 55_295], [0, 55_296], [65_535, 0], [40_000, 57_343]])
    tree = Marisa(codes, (65_536,) * 2)
    assert sorted(tree.get([0])) == [55_295, 55_296, 60_000] and tree.get([40_000]) == [57_343] and tree.get([]) == [0, 40_000, 65_535]


def test_static_counts_its_arrays():
    codes = np.unique(random_codes(500, L=4, K=16), axis=0)
    tree = SparseRows(codes, (16,) * 4)
    nodes = [len(np.unique(codes[:, :d], axis=0)) for d in (2, 3, 4)]
    assert tree.bytes() == 16 + 256 * 5 + 4 * (nodes[0] + nodes[1] + 1) + 8 * (nodes[1] + nodes[2])


def test_topk_is_selection():
    beams, scores = FreeCodes((9,)).root(2, 'cpu'), torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(0))
    a, b = top_k(beams, scores, 0, 4), FreeCodes((9,)).advance(beams, scores, 0, 4)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.code, b.code)


def test_random_codes_are_seeded_skewed_and_prefixes():
    a = random_codes(70_000, 3)
    assert np.array_equal(random_codes(100, 3), a[:100]) and not np.array_equal(random_codes(100, 4), a[:100])
    share = np.bincount(a[:, 0], minlength=256) / len(a)
    want = 1 / np.arange(1, 257) / (1 / np.arange(1, 257)).sum()
    assert np.abs(share - want).max() < .01 and (np.bincount(a[:, 1], minlength=256) > 0).all()
    assert random_codes(1000, L=2, K=7).max() == 6
    assert random_ids(10).tokens.dtype == np.uint8 and random_ids(10).rows.tolist() == list(range(10))


@pytest.mark.parametrize('args, says', [((0,), 'n: expected at least 1'), ((5, 0, 2, 257), 'K: expected 2 to 256'), ((5, 0, 0), 'L: expected at least 1')])
def test_bad_codes(args, says):
    with pytest.raises(ValueError, match=says): random_codes(*args)


def test_an_absent_peer_is_left_out(monkeypatch):
    monkeypatch.setattr(others, 'find_spec', lambda name: None)
    monkeypatch.setitem(others._built, 'tree', None)
    assert others.present()[Marisa] and others.present()[HashNodes]
    with pytest.raises(OSError, match='no C'): HashNodes(np.uint8([[0]]), (1,))


def test_a_compiler_that_fails_leaves_it_out(monkeypatch):
    monkeypatch.setattr(others, '_built', {})
    monkeypatch.setattr(others.shutil, 'which', lambda name: '/bin/false')
    assert others._library() is None


# --- the trie's bench

def test_mask_alone_does_all_but_choose():
    codes, sizes, steps = np.unique(random_codes(900, L=4, K=8), axis=0), (8,) * 4, random_steps(2, 5, (8,) * 4)
    tree, calls = SparseRows(codes, sizes), []
    alone = Replayed(tree, steps, 5)
    tree.select = lambda *args: calls.append(1)
    assert np.array_equal(spelt(walk(alone, steps, 5))[1], spelt(walk(SparseRows(codes, sizes), steps, 5))[1])
    assert not calls
    ours = Trie.build(make_ids(codes, sizes))
    masked, free = Masked(ours, steps, 5), walk(ours, steps, 5)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(walk(masked, steps, 5), free))


def test_a_walk_is_timed_and_evicted():
    evicted, steps = [], random_steps(1, 3, (4, 4))
    trie = Trie.build(make_ids(random_codes(30, L=2, K=4), (4, 4)))
    assert timed_walk(trie, steps, 3) > 0 and timed_walk(trie, steps, 3, lambda: evicted.append(1)) > 0 and len(evicted) == 2


def test_a_wrong_constraint_is_noticed():
    codes, sizes, steps = np.unique(random_codes(200, L=2, K=8), axis=0), (8, 8), random_steps(1, 5, (8, 8))
    ours = Trie.build(make_ids(codes, sizes))
    bench._same('itself', SparseRows(codes, sizes), ours, [steps], 5)
    with pytest.raises(AssertionError, match='liar: its beams are not ours'): bench._same('liar', FreeCodes(sizes), ours, [steps], 5)


def test_fresh_build_fails_loudly(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'CHILD', 'raise SystemExit("no room")')
    with pytest.raises(RuntimeError, match='ended with code 1: no room'): fresh_build(10, 0, 2, 1000, tmp_path/'x.safetensors')


def made(cold, seconds=.25, ids=1.9, load=.03, peak=1.5, n=10_000_000):
    steps = {OURS: [.1, .1], SparseRows.name: [.1 * cold + .1] * 2, f'{SparseRows.name}, {MASK}': [.1 * cold] * 2}
    facts = dict(seconds=seconds, peak=peak * n * (ids + 4), bytes=dict(ids=ids * n, entries=0, rows=4 * n))
    return TrieBench({n: facts}, {n: dict(load=[load], build={'a': 1}, bytes={'a': 1}, steps={'cold caches, 1': steps})})


@pytest.mark.parametrize('change, fails', [({}, None), (dict(cold=3.9), "STATIC's mask over ours with selection"), (dict(seconds=.6), 'first build'),
                                           (dict(ids=2.2), 'bytes an item'), (dict(load=.06), 'load'), (dict(peak=2.1), 'peak')])
def test_trie_verdicts_follow_the_numbers(change, fails):
    found = bench.verdicts(made(**dict(cold=4.1) | change))
    assert len([v for v in found if v[4] is not None]) >= 5
    assert [q for q, *_, holds in found if holds is False and fails and q.startswith(fails)] if fails else all(holds is not False for *_, holds in found)
    assert all(holds is not False for q, *_, holds in found if not fails or not q.startswith(fails))


def test_no_bar_but_at_its_size():
    assert all(bar is None for *_, bar, _ in bench.verdicts(made(4.1, n=20_000)) if bar != 4.)


def test_quick_trie_bench_saves_and_resumes(tmp_path, monkeypatch):
    said = []
    again = dict(sizes=(2000,), alone=0, W=10, rounds=2, patience=.01, K=32, folder=tmp_path/'r', work=tmp_path/'w', say=said.append)
    monkeypatch.setattr(bench, 'EVICT', 1)
    monkeypatch.setattr(bench, 'package_mark', lambda: 'same')
    first = bench_trie(**again)
    assert set(first.pools[2000]['build']) == {p.name for p in HERE} and 'cold index, 16' in first.pools[2000]['steps']
    assert any(line.startswith('bytes an item') for line in said)
    assert {p.name for p in (tmp_path/'r').iterdir()} == {'trie.json', 'trie.times.json', 'trie_verdicts.times.json'}
    assert load_results(tmp_path/'r', 'trie')['values']
    monkeypatch.setattr(bench, '_measure', None)
    monkeypatch.setattr(bench, 'fresh_build', None)
    assert bench_trie(**again) == TrieBench(*({int(k): v for k, v in d.items()} for d in json.loads(json.dumps(first))))


def test_ours_alone_where_memory_permits(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(bench, '_available', lambda: 10 ** 6)
    monkeypatch.setattr(bench, '_pool', lambda n, *a: (dict(seconds=1, peak=None, bytes=dict(ids=n, entries=n, rows=n), leaves=n), dict(load=[1.], build={}, bytes={}, steps={})))
    got = bench_trie((1000,), alone=100_000, folder=None, work=tmp_path, say=said.append)
    assert list(got.pools) == [1000] and 'left out' in said[-1]
    monkeypatch.setattr(bench, '_available', lambda: 10 ** 9)
    assert list(bench_trie((1000,), alone=100_000, folder=None, work=tmp_path, say=None).pools) == [1000, 100_000]


@pytest.mark.parametrize('f', [bench_trie, bench_decoder])
@pytest.mark.parametrize('args, says', [(dict(sizes=[10]), 'sizes: expected at least 1000'), (dict(sizes=[]), 'expected at least one of each'), (dict(K=1), 'K: expected 2 to 256'),
                                        (dict(W=0), 'W: expected at least 1'), (dict(batches=[]), 'expected at least one of each'), (dict(rounds=0), 'rounds: expected at least 1')])
def test_bad_settings(f, args, says):
    with pytest.raises(ValueError, match=says): f(**args, folder=None)


# --- the decoder's bench

@pytest.fixture(scope='module')
def small():
    "A decoder, IDs and a trie"
    codes = random_codes(1500, L=3, K=16)
    return t5(2, 16, 64), codes, Trie.build(make_ids(codes, (16,) * 3))


def test_ours_is_generate(small):
    model, codes, trie = small
    query = memories(1, 3, 64)[0]
    with torch.inference_mode(): ours = spelt(descend(Given(model, trie.sizes, 'fp32'), query, trie, 10, 3))[1]
    theirs = Generate(model, np.unique(codes, axis=0), 10)(query)
    assert shared(ours, theirs) == 1. and np.mean(ours == theirs) > .95


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_products_are_those_of_the_decode(small, precision):
    model, _, trie = small
    generator, own, plain = Given(model, trie.sizes, precision), Products(), Products()
    query = memories(1, 2, 64)[0]
    with torch.inference_mode():
        descend(generator, query, trie, 10, 2)
        with own: descend(generator, query, trie, 10, 2)
        shape = plain_products(model.config, 3, precision, 2, 10)
        with plain: shape()
        own.again()
    layers, levels = 2, 3
    assert len(plain.calls) == layers * (6 * levels + 1) + levels      # six products a level and layer, the memory once, a head a level
    assert 0 < len(own.calls) <= len(plain.calls) + 2 * layers         # folding the memory takes two


def test_peers_agree_in_the_decoder(small):
    model, codes, trie = small
    unique, generator = np.unique(codes, axis=0), Given(model, trie.sizes, 'fp32')
    methods = {OURS: decoder._decode(generator, trie, 8)} | {p.name: decoder._decode(generator, p(unique, trie.sizes), 8) for p in HERE}
    assert decoder._agree(methods, memories(1, 2, 64)[0]) == {k: 1. for k in methods}
    with pytest.raises(AssertionError, match='share only'):
        decoder._overhead(generator, trie, {'liar': FreeCodes(trie.sizes)}, 1500, 8, 1, 1, .01, np.random.default_rng(0), 0)


def test_pairs_are_of_one_query_and_the_slow_get_fewer():
    seen = []
    def wait(name, n):
        def f(q):
            seen.append((name, q))
            for _ in range(n): torch.ones(200, 200) @ torch.ones(200, 200)
        return f
    times = decoder.beside(dict(base=wait('base', 1), fast=wait('fast', 1), slow=wait('slow', 100)), 'base', [0, 1, 2], 12, .01, np.random.default_rng(0))
    assert set(times) == {'fast', 'slow'} and len(times['fast']) > len(times['slow']) == 3
    assert decoder.over(times['slow']).value > 5 and decoder.under(times['slow']).value < .2
    for (a, q), (b, r) in zip(seen[6::2], seen[7::2]): assert q == r and {a, b} in ({'base', 'fast'}, {'base', 'slow'})
    assert len({a for a, _ in seen[6::2]}) > 1                          # which goes first is drawn


def decoded(ours=10.2, peer=11., n=10_000_000, flat=1.01, plain=1.3, own=1.35, generate=45., equal=30., live=1.1, same=1.):
    p = lambda v, base=10.: [[v / 1e3, base / 1e3]] * 3
    models = {}
    for precision, g in (('fp32', {'generate, fp32': equal}), ('bf16', {'generate, fp32': generate, 'generate, bf16': equal})):
        models[2, precision] = dict(times={"shape's products": p(10 / plain), 'own products': p(10 / own)} | {k: p(v) for k, v in g.items()}, library='lib', shared=same)
    return DecoderBench({(2, 'bf16', 1, n): dict(times={OURS: p(ours), 'peer': p(peer)})}, models, dict(small='10,000', large='10,000,000', pairs=p(10 * flat)),
                        {1: dict(steps={'changed': p(10 * live), 'merged': p(10)}, decode={'changed': p(10), 'merged': p(10)})})


@pytest.mark.parametrize('change, fails', [({}, None), (dict(ours=10.6), 'constrained over unconstrained'), (dict(ours=10.3, peer=10.2), 'peers whose interval'), (dict(flat=1.1), 'search in'),
                                           (dict(plain=1.5), "decode over its shape's products"), (dict(own=1.5), 'decode over its own products'), (dict(generate=39.), 'generate, fp32, over ours, 2 layers, bf16'),
                                           (dict(equal=24.), 'generate'), (dict(live=1.3), 'steps, changed'), (dict(same=.98), 'share of the best')])
def test_decoder_verdicts_follow_the_numbers(change, fails):
    found = decoder.verdicts(decoded(**change))
    wrong = [q for q, *_, holds in found if holds is False]
    assert (wrong and all(q.startswith(fails) for q in wrong)) if fails else not wrong
    assert len([1 for *_, holds in found if holds is not None]) >= 9


def test_peers_within_the_interval_are_no_failure():
    bench = decoded()
    bench.overhead[2, 'bf16', 1, 10_000_000]['times']['peer'] = [[.0100, .01], [.0101, .01], [.0104, .01]]
    assert all(holds for q, *_, holds in decoder.verdicts(bench) if q.startswith('peers'))


def test_quick_decoder_bench_saves_and_resumes(tmp_path, monkeypatch):
    said = []
    settings = dict(sizes=(1500,), shapes=((2, 'bf16'),), d=64, W=8, batches=(1,), pool=1500, changes=20, rounds=2, patience=.01, folder=tmp_path/'r', work=tmp_path/'w', say=said.append)
    monkeypatch.setattr(decoder, 'package_mark', lambda: 'same')
    first = bench_decoder(**settings)
    (key, found), = first.overhead.items()
    assert key == (2, 'bf16', 1, 1500) and set(found['times']) == {OURS} | {p.name for p in HERE}
    assert set(first.live[1]['steps']) == set(first.live[1]['light search']) == {'changed', 'merged'}
    assert {p.name for p in (tmp_path/'r').iterdir()} == {'decoder.times.json', 'decoder_verdicts.times.json'}
    monkeypatch.setattr(decoder, '_model', None)
    monkeypatch.setattr(decoder, '_overhead', None)
    monkeypatch.setattr(decoder, '_live', None)
    assert bench_decoder(**settings).models == first.models
