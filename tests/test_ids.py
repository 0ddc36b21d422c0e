"""Codes to IDs: order, counters, several IDs an item, collisions against brute force."""
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.ids.make import Lookup, Vocabulary, collisions, id_order, make_ids

fast = settings(max_examples=80, deadline=None)


@st.composite
def codes(draw, views=True, least=0):
    "Codes (N, L) or (N, V, L) that collide often, and the sizes of the levels; now and then levels of many bits"
    sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 300, 70_000]), min_size=1, max_size=6)))
    shape = (draw(st.integers(least, 40)), draw(st.integers(1, 4)), len(sizes))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    few = np.minimum(sizes, draw(st.integers(1, 4)))
    c = (np.array(sizes) - 1 - g.integers(0, few, shape))                        # high codes, so that no bit is unused
    return (c if views and draw(st.booleans()) else c[:, 0]), sizes


@fast
@given(codes())
def test_buckets_hold_every_distinct_id_of_every_item_once(case):
    c, sizes = case
    ids = make_ids(c, sizes)
    want = [(n, v) for n, item in enumerate(c if c.ndim == 3 else c[:, None]) for v in dict.fromkeys(map(tuple, item.tolist()))]
    assert list(zip(ids.rows.tolist(), map(tuple, ids.tokens.tolist()))) == want and ids.sizes == sizes
    assert ids.tokens.dtype == (np.uint8 if max(sizes) <= 256 else np.uint16 if max(sizes) <= 65536 else np.uint32)


@fast
@given(codes())
def test_unique_appends_a_counter(case):
    c, sizes = case
    ids, bucket = make_ids(c, sizes, 'unique'), make_ids(c, sizes)
    assert (ids.tokens[:, :-1] == bucket.tokens).all() and (ids.rows == bucket.rows).all()
    assert len(set(map(tuple, ids.tokens.tolist()))) == len(ids.tokens)
    seen = Counter()
    for t in ids.tokens.tolist():                                               # counted in item order
        assert t[-1] == seen[tuple(t[:-1])]
        seen[tuple(t[:-1])] += 1
    assert ids.sizes == (*sizes, max(seen.values(), default=1)) and (ids.tokens < ids.sizes).all()


@fast
@given(codes(views=False))
def test_order_is_that_of_tuples(case):
    c, sizes = case
    tokens = make_ids(c, sizes).tokens
    assert id_order(tokens, sizes).tolist() == sorted(range(len(tokens)), key=lambda i: (tokens[i].tolist(), i))


@fast
@given(codes(least=1))
def test_collisions_are_those_of_a_count(case):
    c, sizes = case
    ids = make_ids(c, sizes)
    count = Counter(map(tuple, ids.tokens.tolist()))
    free = {r for r, t in zip(ids.rows.tolist(), ids.tokens.tolist()) if count[tuple(t)] == 1}
    got = collisions(ids)
    assert (got.items, got.ids, got.largest) == (len(c), len(count), max(count.values())) and np.isclose(got.rate, 1 - len(free) / len(c))
    for l in range(len(sizes)):
        prefix = Counter(tuple(t[:l + 1]) for t in ids.tokens.tolist())
        assert got.prefixes[l] == len(prefix) and np.isclose(got.alone[l], sum(n == 1 for n in prefix.values()) / len(ids.rows))


def test_unique_never_collides_and_nothing_is_well():
    assert collisions(make_ids(np.zeros((5, 2), int), (1, 1), 'unique'))[:4] == (5, 5, 0., 1)
    empty = collisions(make_ids(np.zeros((0, 2), int), (3, 3)))
    assert empty[:4] == (0, 0, 0., 0) and empty.prefixes == (0, 0)


@pytest.mark.parametrize('c, sizes, mode, says', [
    (np.zeros((2, 2)), (3, 3), 'bucket', 'codes: expected integers'),
    (np.zeros(4, int), (3,), 'bucket', 'codes: expected integers'),
    (np.zeros((2, 3), int), (3, 3), 'bucket', 'codes: expected 2 levels, got 3'),
    (np.full((2, 2), 3), (3, 4), 'bucket', 'codes: expected values from 0 and below'),
    (np.full((2, 2), -1), (3, 4), 'bucket', 'codes: expected values from 0 and below'),
    (np.zeros((2, 2), int), (3, 3), 'both', "mode: expected 'bucket' or 'unique', got 'both'"),
])
def test_bad_codes(c, sizes, mode, says):
    with pytest.raises(ValueError, match=says): make_ids(c, sizes, mode)


# --- codes, tokens, items

@st.composite
def vocabularies(draw):
    "IDs of any variant (several an item, counter, mixed sizes) and a vocabulary over their levels"
    c, sizes = draw(codes())
    ids = make_ids(c, sizes, draw(st.sampled_from(['bucket', 'unique'])))
    special = draw(st.sampled_from([(), ('pad', 'eos', 'unk'), ('eos',)]))
    first = draw(st.sampled_from([None, 32_100]))
    return ids, Vocabulary(ids.sizes, draw(st.booleans()), special, first)


@fast
@given(vocabularies())
def test_codes_tokens_and_text_go_round(case):
    ids, v = case
    t = v.tokens(ids.tokens)
    assert t.dtype == np.int64 and (v.codes(t) == ids.tokens).all() and (v.parse(v.spell(ids.tokens)) == ids.tokens).all()
    assert len(set(v.spell(ids.tokens))) == len(set(map(tuple, ids.tokens.tolist()))) == len(set(map(tuple, t.tolist())))
    assert (t >= v.starts[0]).all() and (t < v.size).all() and not set(t.ravel().tolist()) & set(v.special.values())
    for l, size in enumerate(v.sizes):                                            # every code of a level has its own token, and its name says so
        assert v.tokens(np.array([[0] * l + [size - 1] + [0] * (len(v.sizes) - l - 1)]))[0, l] == v.ends[l] - 1
    if not v.shared: assert len(set().union(*[range(a, b) for a, b in zip(v.starts[:5], v.ends[:5])])) == sum(v.sizes[:5])


@fast
@given(vocabularies(), st.data())
def test_no_token_is_mistaken_for_a_code(case, data):
    "Special tokens, text tokens, tokens of other levels and of no vocabulary are refused wherever they stand."
    ids, v = case
    own = v.tokens(np.array([[s - 1 for s in v.sizes]]))
    level = data.draw(st.integers(0, len(v.sizes) - 1))
    wrong = {*v.special.values(), v.starts[0] - 1, v.size, -1, 2**40, *v.starts, *(v.ends - 1)} - set(range(v.starts[level], v.ends[level]))
    for token in wrong:
        t = own.copy(); t[0, level] = token
        with pytest.raises(ValueError, match=rf'at level {level}, got {token} '): v.codes(t)
    for name, token in v.special.items():
        t = own.copy(); t[0, level] = token
        with pytest.raises(ValueError, match=f"special token '{name}'"): v.codes(t)
        assert v.meaning(token) == f"special token '{name}'"


@fast
@given(vocabularies())
def test_items_and_ids_find_each_other(case):
    ids, _ = case
    look = Lookup(ids)
    for row, found in zip(ids.tokens.tolist(), look.items(ids.tokens)):
        assert found.tolist() == sorted(r for r, t in zip(ids.rows.tolist(), ids.tokens.tolist()) if t == row)
    for row in range(int(ids.rows.max(initial=-1)) + 3):
        own = look.ids(row)
        assert own.tolist() == ids.tokens[ids.rows == row].tolist() and all(row in f for f in look.items(own))
    have = set(map(tuple, ids.tokens.tolist()))
    others = [t for t in np.random.default_rng(0).integers(0, ids.sizes, (20, len(ids.sizes))).tolist() if tuple(t) not in have]
    if others: assert all(len(f) == 0 for f in look.items(others))


def test_vocabularies_of_the_papers():
    genius = Vocabulary((3,) + (4096,) * 8)
    assert genius.size == 32_774 and genius.starts.tolist() == [3] + [6 + 4096 * l for l in range(8)] and genius.special == dict(pad=0, eos=1, unk=2)
    assert genius.spell([[0] * 9])[0] == '<a0><b0><c0><d0><e0><f0><g0><h0><i0>'
    avg = Vocabulary((1024,) * 4, shared=True, first=32_100)
    assert avg.size == 33_124 and avg.tokens([[5, 5, 0, 1023]]).tolist() == [[32_105, 32_105, 32_100, 33_123]]
    assert Vocabulary((2,) * 30).letters[24:] == ('y', 'z', 'aa', 'ab', 'ac', 'ad')
    assert avg.tokens(np.zeros((2, 3, 4), int)).shape == (2, 3, 4)               # several IDs an item
    assert genius.codes(np.zeros((0, 9), int)).shape == (0, 9) and genius.parse([]).shape == (0, 9)


@pytest.mark.parametrize('make, says', [
    (lambda: Vocabulary(()), 'sizes: expected at least one level'),
    (lambda: Vocabulary((3, 0)), 'sizes: expected at least 1, got 0'),
    (lambda: Vocabulary((3,), special=('pad', 'pad')), 'special: expected each name once'),
    (lambda: Vocabulary((3,), first=2), 'first: expected at least 3, after the special tokens, got 2'),
    (lambda: Vocabulary((3,)).tokens([[3]]), 'codes: expected values from 0 and below'),
    (lambda: Vocabulary((3,)).tokens([0]), 'codes: expected integers'),
    (lambda: Vocabulary((3, 3)).tokens([[0]]), 'codes: expected 2 levels, got 1'),
    (lambda: Vocabulary((3,)).codes([[3.]]), 'tokens: expected integers'),
    (lambda: Vocabulary((3, 3)).codes([[3]]), 'tokens: expected integers'),
    (lambda: Vocabulary((3,)).codes([3]), 'tokens: expected integers'),
    (lambda: Vocabulary((3,)).parse('<a0>'), 'single string'),
    (lambda: Lookup(make_ids([[0]], (3,))).items([[3]]), 'codes: expected values from 0 and below'),
])
def test_bad_vocabularies_and_look_ups(make, says):
    with pytest.raises(ValueError, match=says): make()


@pytest.mark.parametrize('text', ['', '<a0>', '<a0><b3>', '<b0><a0>', '<a0><b0><c0>', '<a0> <b0>', '<a00><b0>', '<a-1><b0>', '<a0><b9999999999>', '<a0><b\u0661>', 'a0b0', '<a0><b0>\n'])
def test_text_that_is_no_id(text):
    with pytest.raises(ValueError, match='texts: expected codes such as <a2><b2>'): Vocabulary((3, 3)).parse([text])


def test_views_are_spelled_one_row_an_id():
    v = Vocabulary((4, 4))
    with pytest.raises(ValueError, match='one row an ID'): v.spell(np.zeros((2, 3, 2), int))
    assert v.spell(np.zeros((1, 2), int)) == ['<a0><b0>']
