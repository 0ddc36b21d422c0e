"""Recipes: what is held out, what is trained on what, what is kept, and what a checkpoint belongs to."""
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import grnb.recipes as recipes
from grnb.core import unit
from grnb.decode.beam import beam_search
from grnb.generator.strong import StrongForm
from grnb.ids.make import make_ids
from grnb.recipes import RECIPES, Recipe, as_recipe, fit_recipe, hold_out, load_fitted, save_fitted
from grnb.tokenizer.kmeans import ResidualKMeans
from grnb.trie.layout import Trie

TINY = Recipe(generator='prefix', K=6, L=2, d_model=16, n_layers=1, n_prefix=2, steps=4, batch=16)
rng = np.random.default_rng(0)
ITEMS = unit(rng.normal(size=(40, 8)).astype(np.float32))
POSITIVES = rng.integers(0, 40, 90)
QUERIES = unit(ITEMS[POSITIVES] + .3 * rng.normal(size=(90, 8)).astype(np.float32))


def fit(recipe, queries=QUERIES, positives=POSITIVES, **kw): return fit_recipe(recipe, ITEMS, queries, positives, device='cpu', **kw)


def weights(part): return {} if part is None else {k: v.tobytes() for k, v in part.arrays()[0].items()}


def same(a, b):
    return all(weights(x) == weights(y) for x, y in ((a.encoder, b.encoder), (a.generator, b.generator))) and all((x == y).all() for x, y in zip(a.quantizer.codebooks, b.quantizer.codebooks))


@given(st.integers(1, 200), st.floats(0, .999), st.integers(0, 99))
def test_a_share_of_items_is_held_out(n, dev, seed):
    mask = hold_out(n, dev, seed)
    assert mask.dtype == bool and len(mask) == n and mask.sum() == min(n - 1, round(dev * n)) and (hold_out(n, dev, seed) == mask).all()


def test_a_mask_is_taken_as_given():
    mask = np.arange(9) < 3
    assert hold_out(9, mask, 0) is mask
    for bad in (np.ones(9, bool), mask[:8], mask[:, None]):
        with pytest.raises(ValueError, match='dev: expected a mask of 9'): hold_out(9, bad, 0)
    with pytest.raises(ValueError, match='dev: expected a share'): hold_out(9, mask.astype(int), 0)


def test_names_and_settings():
    assert as_recipe('genius') is RECIPES['genius'] and as_recipe(TINY) is TINY
    with pytest.raises(ValueError, match="recipe: expected one of baseline, genius, grdr or a Recipe, got 'avg'"): as_recipe('avg')
    assert RECIPES['baseline'] == Recipe(generator='light', K=256, L=8, ids='bucket') and RECIPES['genius'].init == 'geometry'
    with pytest.raises(ValueError, match='unique'): replace(TINY, ids='unique')


@pytest.mark.parametrize('part', ['queries', 'items'])
def test_what_is_held_out_teaches_nothing(part, monkeypatch):
    "Codebooks and generator are the same whatever the held-out items and their queries are"
    held, x, q, original = np.arange(40) < 8, ITEMS.copy(), QUERIES.copy(), recipes.train
    if part == 'items': x[held] = x[held][::-1]
    else: q[held[POSITIVES]] = q[held[POSITIVES]][::-1]
    monkeypatch.setattr(recipes, 'train', lambda *a, **k: original(*a, **{**k, 'keep': 'last'}))       # dev may choose among weights; what they learn from is the question
    a, b = (fit_recipe(replace(TINY, init='random'), items, queries, POSITIVES, dev=held, device='cpu') for items, queries in ((ITEMS, QUERIES), (x, q)))
    assert same(a, b)


def test_step_0_is_residual_quantised_search():
    "The geometry-initialised generator that training did not improve finds what the strong form finds"
    f = fit(replace(TINY, steps=0))
    assert f.facts['kept'] is False
    codes = f.quantizer.encode(ITEMS)
    trie = Trie.build(make_ids(codes, tuple(map(len, f.quantizer.codebooks))))
    a, b = (beam_search(g, QUERIES[:20], trie, 7) for g in (f.generator, StrongForm(f.quantizer.codebooks)))
    assert (a[0] == b[0]).mean() > .99 and np.allclose(a[1], 16 * b[1], atol=1e-3)


def test_training_is_dropped_unless_it_helps_dev(monkeypatch):
    start = fit(replace(TINY, steps=0))
    f = fit(replace(TINY, steps=4, lr=1e-9))
    assert not f.facts['kept'] and weights(f.generator) == weights(start.generator)                     # nothing gained, nothing kept
    monkeypatch.setattr(recipes, 'earned', lambda *_: True)
    assert fit(TINY).facts['kept']
    monkeypatch.undo()
    f = fit(TINY, dev=0.)
    assert not f.facts['kept'] and weights(f.generator).keys() == weights(start.generator).keys()       # without dev queries nothing is shown to help
    assert fit(replace(TINY, init='random'), dev=0.).facts['kept']                                      # the plain variant is its training


@pytest.mark.parametrize('recipe', [Recipe(K=6, L=2), TINY, replace(TINY, init='random'), replace(TINY, towers=True, dim=5, tower_epochs=1), Recipe(K=(6, 4), L=2, ids='unique', weak=True),
                                    replace(RECIPES['grdr'], K=6, L=2, d_model=8, cotrain=replace(RECIPES['grdr'].cotrain, steps=(2, 1, 2, 2), batch=16))])
def test_saved_is_loaded(tmp_path, recipe):
    a = fit(recipe)
    save_fitted(a, tmp_path)
    b = load_fitted(tmp_path)
    assert b.recipe == recipe and b.facts == a.facts and same(a, b)
    assert (b.items(ITEMS) == a.items(ITEMS)).all() and (b.queries(QUERIES) == a.queries(QUERIES)).all()


def test_queries_and_items_of_different_widths_get_towers():
    f = fit(replace(TINY, tower_epochs=1, dim=5), queries=rng.normal(size=(90, 3)).astype(np.float32))
    assert f.encoder is not None and f.items(ITEMS).shape == (40, 5) and f.queries(np.ones((2, 3), np.float32)).shape == (2, 5) and f.facts['query_width'] == 3


def test_no_queries_at_all():
    for q, p in ((None, None), (QUERIES[:0], POSITIVES[:0])):
        f = fit(TINY, queries=q, positives=p)
        assert f.generator is not None and not f.facts['kept'] and f.encoder is None
        with pytest.raises(ValueError, match='queries: expected queries'): fit(replace(TINY, towers=True), queries=q, positives=p)


def test_every_query_held_out():
    with pytest.raises(ValueError, match='dev: expected queries left'): fit(replace(TINY, towers=True), positives=np.zeros(90, np.int64), dev=np.arange(40) < 1)


def test_a_checkpoint_belongs_to_one_run(tmp_path):
    a = fit(TINY, checkpoint=tmp_path)
    marks = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    for other in (lambda: fit(replace(TINY, L=3), checkpoint=tmp_path), lambda: fit(TINY, seed=1, checkpoint=tmp_path), lambda: fit(TINY, dev=.2, checkpoint=tmp_path),
                  lambda: fit(TINY, queries=-QUERIES, checkpoint=tmp_path), lambda: fit(TINY, positives=POSITIVES[::-1].copy(), checkpoint=tmp_path)):
        with pytest.raises(ValueError, match='belongs to a run with other data, recipe or seed'): other()
        assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == marks
    assert same(fit(TINY, checkpoint=tmp_path), a)


def test_finished_stages_are_not_run_again(tmp_path, monkeypatch):
    recipe = replace(TINY, towers=True, dim=5, tower_epochs=1)
    a = fit(recipe, checkpoint=tmp_path)
    for name in ('fit_encoder', 'fit_generator'): monkeypatch.setattr(recipes, name, lambda *_, **__: pytest.fail('ran again'))
    monkeypatch.setattr(ResidualKMeans, 'fit', lambda *_: pytest.fail('ran again'))
    b = fit(recipe, checkpoint=tmp_path)
    assert same(a, b) and a.facts == b.facts


def test_with_and_without_checkpoint_are_the_same(tmp_path):
    assert same(fit(TINY, checkpoint=tmp_path), fit(TINY)) and same(fit(TINY), fit(TINY)) and asdict(fit(TINY).recipe) == asdict(TINY)
