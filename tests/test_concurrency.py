"""Sixteen threads search while another adds, removes and merges: every answer is that of some moment between the beginning and the end of its call."""
import sys
import threading
from functools import cache

import numpy as np
import pytest

from grnb import GenerativeRetriever, Recipe
from grnb.core import unit

D, N, K = 8, 1500, 10
g = np.random.default_rng(0)
ITEMS, MORE, QUERIES = (unit(g.normal(size=(n, D)).astype(np.float32)) for n in (N, 4000, 6))


class History:
    "Which items there were after each change; a change has begun before its items are seen, and is done after"
    def __init__(self, ids): self.states, self.begun, self.done = [frozenset(ids)], 0, 0

    def change(self, call, ids):
        self.states.append(frozenset(ids))
        self.begun += 1
        call()
        self.done += 1


@cache
def fitted(name):
    recipe = dict(baseline=Recipe(K=16, L=3), genius=Recipe(generator='prefix', K=16, L=3, d_model=16, n_layers=1, n_prefix=2, steps=1, batch=16))[name]
    return GenerativeRetriever(recipe, device='cpu').fit(ITEMS, QUERIES, np.arange(6))


def vector(i): return ITEMS[i] if i < N else MORE[i - N]


def expected(ids, allowed, q):
    "Brute force over one state: ids and cosines, best first, ties by lower id"
    there = np.array(sorted(i for i in ids if allowed is None or i in allowed))
    cos = np.array([vector(i) for i in there]) @ q
    order = np.argsort(-cos, kind='stable')[:K]
    return there[order], cos[order]


def agrees(hit, score, want, cos):
    "The same list; sums of float32 may come in another order"
    n = len(want)
    return (hit[:n] == want).all() and np.allclose(score[:n], cos, atol=1e-5) and (hit[n:] == -1).all()


@pytest.mark.parametrize('name, n, rounds', [('baseline', N, 60), ('genius', 200, 30)])
def test_no_wrong_and_no_missing_answer(name, n, rounds):
    gr = GenerativeRetriever.from_fitted(fitted(name)._fitted, device='cpu').index(ITEMS[:n], np.arange(n))
    even = frozenset(range(0, n, 2))
    gr.name_filter('even', sorted(even))
    history, stop, answers, failures = History(range(n)), threading.Event(), [], []

    def search(seed):
        r = np.random.default_rng(seed)
        try:
            while not stop.is_set():
                q, name = r.integers(len(QUERIES)), [None, 'even'][r.integers(2)]
                since = history.done
                hits = gr.search(QUERIES[q:q + 1], k=K, beam=9999, candidates=9999, filter=name)
                answers.append((q, name, since, history.begun, hits))
        except Exception as e: failures.append(e)

    searchers = [threading.Thread(target=search, args=(s,)) for s in range(16)]
    old, r, ids, fresh = sys.getswitchinterval(), np.random.default_rng(99), set(range(n)), iter(range(N, N + len(MORE)))
    sys.setswitchinterval(1e-4)                                                # threads change places often
    for t in searchers: t.start()
    try:
        for i in range(rounds):
            near = {int(gr.search(QUERIES[j:j + 1], k=1).ids[0, 0]) for j in r.integers(len(QUERIES), size=2)}
            gone = sorted(near | set(r.choice(sorted(ids), n // 150, replace=False).tolist())) if i % 2 else []
            new = [] if i % 2 else [next(fresh) for _ in range(n // 50)]
            after = (ids - set(gone)) | set(new)
            call = (lambda: gr.remove(gone)) if gone else (lambda: gr.add(np.array([vector(j) for j in new]), new))
            history.change(call, after)
            ids = after
            if i % 10 == 7: gr.merge()
    finally:
        stop.set()
        for t in searchers: t.join()
        sys.setswitchinterval(old)
    assert not failures, failures[0]
    assert len(answers) >= 16 and any(b > a for *_, a, b, _ in answers)
    want = cache(lambda state, name, q: expected(history.states[state], even if name else None, QUERIES[q]))
    wrong = [a for a in answers if not any(agrees(a[4].ids[0], a[4].scores[0], *want(s, a[1], a[0])) for s in range(a[2], a[3] + 1))]
    assert not wrong, f'{len(wrong)} of {len(answers)} answers are of no moment of their call: {wrong[0]}'
    assert set(gr.merge().search(QUERIES[:1], k=9999, beam=9999, candidates=9999).ids[0].tolist()) - {-1} == ids


def test_many_threads_give_the_answers_of_one():
    gr = GenerativeRetriever.from_fitted(fitted('genius')._fitted, device='cpu').index(ITEMS, np.arange(N))
    gr.add(MORE[:50], np.arange(N, N + 50)).remove(np.arange(0, 100))
    want, out = [gr.search(QUERIES, k=K, beam=20, rerank=r) for r in (True, False)], [None] * 16
    def one(i): out[i] = gr.search(QUERIES, k=K, beam=20, rerank=i % 2 == 0)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    for i, h in enumerate(out): assert (h.ids == want[i % 2].ids).all() and (h.scores == want[i % 2].scores).all()
