"""Codes to IDs: order, counters, several IDs an item, collisions against brute force."""
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.ids.make import collisions, id_order, make_ids

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
