"generators: two routes to one score, snapshots, saving, seeds, bad input"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from grnb.core import load_arrays, save_arrays
from grnb.generator.frozen import FrozenPrefix
from grnb.generator.frozen_t5 import FrozenHF, FrozenT5, freeze
from grnb.generator.load import load_generator
from grnb.generator.prefix import PrefixGenerator
from grnb.generator.product import PRECISIONS, library, product
from grnb.generator.short import FinishedByGeometry, ParallelGenerator
from grnb.generator.strong import StrongForm, as_codes, follow, force, take
from grnb.generator.t5 import T5Generator

torch.set_num_threads(1)
TINY = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4)


def books(K=6, L=3, D=8, seed=0):
    g = np.random.default_rng(seed)
    return [g.normal(size=(K, D)).astype(np.float32) * 0.7 ** l for l in range(L)]


def shaken(model, by=0.1, seed=0):
    "The model with noise on every weight, so that nothing is zero or one by construction"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p += by * torch.randn(p.shape, generator=g)
    return model.eval()


def some(n, sizes, D=8, M=None, seed=0):
    g = np.random.default_rng(seed)
    codes = g.integers(0, sizes, (n, len(sizes)) if M is None else (n, M, len(sizes)))
    return torch.from_numpy(g.normal(size=(n, D)).astype(np.float32)), torch.from_numpy(codes)


def same(a, b, atol=1e-4):
    assert len(a) == len(b)
    for x, y in zip(a, b): assert x.shape == y.shape and torch.allclose(x, y, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("init", ["geometry", "random"])
@pytest.mark.parametrize("M", [None, 1, 5])
@pytest.mark.parametrize("L, counter", [(1, 0), (3, 0), (3, 4)])
def test_step_and_forward_agree(init, M, L, counter):
    net = shaken(PrefixGenerator(8, codebooks=books(L=L), counter=counter, init=init, d_model=16, n_heads=2, n_prefix=3))
    q, codes = some(4, net.sizes, M=M)
    logits = net(q, codes)
    same(force(net, q, codes), [z.log_softmax(-1) for z in logits] if init == "random" else logits)
    assert [z.shape[-1] for z in logits] == list(net.sizes) and len(net.sizes) == L + (counter > 0)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["geometry", "random"]), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_snapshot_scores_as_the_generator_does(init, layers, heads, prefix, L, table):
    net = shaken(PrefixGenerator(8, codebooks=books(L=L), init=init, d_model=16, n_layers=layers, n_heads=heads, n_prefix=prefix, d_ff=24))
    fast = FrozenPrefix.__new__(FrozenPrefix)
    if not table: fast.table_limit = 0
    fast.__init__(net)
    q, codes = some(3, net.sizes, M=4)
    same(force(fast, q, codes), force(net, q, codes), atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("precision, worst", [("bf16", 0.9), ("int8", 0.8)])
def test_lower_precision_finds_nearly_the_same(precision, worst):
    net = shaken(PrefixGenerator(32, codebooks=books(K=32, L=3, D=32), d_model=64, n_heads=4), 0.02)
    q, codes = some(20, net.sizes, D=32, M=200)
    def total(m): return sum(z.gather(2, codes[..., l:l + 1])[..., 0] for l, z in enumerate(force(m, q, codes)))
    a, b = total(net).topk(20).indices, total(FrozenPrefix(net, precision)).topk(20).indices
    assert np.mean([len(set(x) & set(y)) / 20 for x, y in zip(a.tolist(), b.tolist())]) > worst


def words(n=3, S=7, seed=0):
    ids = torch.randint(2, 40, (n, S), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(n, S, dtype=torch.long)
    mask[1:, S - 3:] = 0
    return ids, mask


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["relu", "gated-gelu", "gated-silu", "gelu"]), st.sampled_from(["geometry", "random"]), st.integers(1, 3), st.sampled_from([3, 40]), st.booleans(), st.integers(1, 5))
def test_t5_snapshot_scores_as_the_generator_does(feed, init, layers, S, table, L):
    "With kernels and with tensor operations. Short memories are folded, long ones are not; the first layer comes from tables or not; inner width differs from d_model"
    config = dict(TINY, feed_forward_proj=feed, num_decoder_layers=layers, d_kv=6)
    t5 = shaken(T5Generator(config, codebooks=books(L=L), init=init))
    fast = FrozenT5.__new__(FrozenT5)
    if not table: fast.table_limit = 0
    fast.__init__(t5)
    q, (_, codes) = words(S=max(S, 4)), some(3, t5.sizes, M=4)
    same(force(fast, q, codes), force(t5, q, codes), atol=2e-3)
    tensors = FrozenT5.__new__(FrozenT5)
    tensors.kernels = False                                             # as on an accelerator
    tensors.__init__(t5)
    same(force(tensors, q, codes), force(fast, q, codes), atol=1e-3)
    other = q[0].where(q[1].bool(), torch.tensor(9))                    # padding says nothing
    same(force(fast, q, codes), force(fast, (other, q[1]), codes), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("feed, tie", [("relu", True), ("gated-gelu", False)])
@pytest.mark.parametrize("among", ["vocabulary", "level"])
def test_hugging_face_t5_snapshot(feed, tie, among):
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**dict(TINY, vocab_size=60), feed_forward_proj=feed, tie_word_embeddings=tie, decoder_start_token_id=0)).eval()
    shaken(model)
    fast, (ids, mask) = FrozenHF(model, (6, 7, 8), (3, 20, 9), among=among), words()
    _, codes = some(3, (6, 7, 8), M=1)
    tokens = codes[:, 0] + torch.tensor([3, 20, 9])
    z = model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.cat([torch.zeros(3, 1, dtype=torch.long), tokens[:, :2]], 1)).logits
    for l, (o, K) in enumerate(zip((3, 20, 9), (6, 7, 8))):
        want = z[:, l].log_softmax(-1)[:, o:o + K] if among == "vocabulary" else z[:, l, o:o + K].log_softmax(-1)
        assert torch.allclose(force(fast, (ids, mask), codes)[l][:, 0], want, atol=1e-4)
    for bad in (((6, 7), (3, 20, 9)), ((6, 7, 60), (3, 20, 9))):
        with pytest.raises(ValueError, match="offsets: expected"): FrozenHF(model, *bad)
    with pytest.raises(ValueError, match="among"): FrozenHF(model, (6,), (3,), among="all")


@torch.no_grad()
def test_products():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 48, generator=g), torch.randn(20, 48, generator=g) / 7
    for precision, eps in zip(PRECISIONS, (1e-5, 3e-2, 6e-2)):
        for act, f in ((None, lambda y: y), ("relu", torch.relu), ("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)):
            y = product(w, precision, act)(x.bfloat16() if precision == "bf16" else x).float()
            assert torch.allclose(y, f(x @ w.T), atol=eps), (precision, act)
        assert precision in library(precision)
    for call in (lambda: product(w, "fp8"), lambda: product(w, "fp32", "swish9"), lambda: library("int8", "cuda"), lambda: FrozenPrefix(PrefixGenerator(8, (4,), init="random"), "half")):
        with pytest.raises(ValueError, match="expected"): call()


@torch.no_grad()
def test_freeze_takes_every_generator():
    strong = StrongForm(books())
    assert freeze(strong) is strong
    assert type(freeze(PrefixGenerator(8, (5, 7), init="random", d_model=16, n_heads=2), "bf16")) is FrozenPrefix
    assert type(freeze(T5Generator(TINY, sizes=(6, 6)))) is FrozenT5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["module", "frozen"])
def test_finishing_by_geometry_leaves_the_first_levels_alone(kind):
    net = shaken(PrefixGenerator(8, codebooks=books(L=4), d_model=16, n_heads=2))
    model = net if kind == "module" else FrozenPrefix(net)
    q, codes = some(3, net.sizes, M=4)
    scale = net.heads.scale0 * net.heads.log_scale.exp()
    for n in (0, 1, 3):
        short, whole, strong = (force(m, q, codes) for m in (FinishedByGeometry(model, n), model, net.strong))
        same(short[:4 - n], whole[:4 - n], atol=0)
        same(short[4 - n:] or [strong[0]], [scale * z for z in strong[4 - n:]] or [strong[0]], atol=1e-3)
    for bad, says in ((lambda: FinishedByGeometry(model, 4), "levels: expected fewer"), (lambda: FinishedByGeometry(StrongForm(books()), 1), "with geometry")):
        with pytest.raises(ValueError, match=says): bad()


@torch.no_grad()
@pytest.mark.parametrize("init", ["geometry", "random"])
def test_one_step_generator(init):
    net = shaken(ParallelGenerator(8, codebooks=books(), init=init, d_model=16, n_heads=2))
    q, codes = some(4, net.sizes, M=5)
    logits = net(q, codes)
    same(force(net, q, codes), [z.log_softmax(-1) for z in logits] if init == "random" else logits)
    same(net(q, codes[:, 0]), [z[:, 0] for z in logits])
    same(force(load_generator(*net.arrays()), q, codes), force(net, q, codes), atol=0)
    with torch.enable_grad(): assert np.isfinite(net.loss(q, codes[:, 0]).item())


def test_snapshot_does_not_follow_training():
    net = shaken(PrefixGenerator(8, codebooks=books(), d_model=16, n_heads=2))
    q, codes = some(3, net.sizes)
    with torch.no_grad():
        fast = FrozenPrefix(net)
        before = force(fast, q, codes)
        shaken(net, seed=1)
        same(before, force(fast, q, codes), atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "gated", "geometry"])
def test_t5_step_equals_the_decoder_of_transformers(kind):
    config = dict(TINY, feed_forward_proj="gated-gelu") if kind == "gated" else TINY
    if kind == "geometry": t5 = T5Generator(config, codebooks=books(), init="geometry")
    else: t5 = T5Generator(config, sizes=(6,) * 20)                     # deeper than the exact part of the relative positions
    shaken(t5)
    ids = torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    _, codes = some(3, t5.sizes, M=4)
    logits = t5((ids, mask), codes)
    same(force(t5, (ids, mask), codes), logits if kind == "geometry" else [z.log_softmax(-1) for z in logits])
    other = torch.where(mask.bool(), ids, 9)                            # padding says nothing
    same(force(t5, (ids, mask), codes), force(t5, (other, mask), codes))
    state = t5.start((ids, mask))
    assert all(t.shape[0] == 3 for kv in state.memory for t in kv)      # one memory a query, however many beams


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_far_above_the_rest_changes_nothing(beams):
    "Scores of masked positions a thousand above the others, and memories of which nothing counts"
    from grnb.generator.product import rows_of
    g = torch.Generator().manual_seed(0)
    q, kv, mask = torch.randn(2 * beams, 8, generator=g), torch.randn(2, 5, 16, generator=g), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:], mask[1] = False, False
    kv[0, 3:] = 1e3 * q[0].repeat(2)
    fast, slow = (rows_of(torch.zeros(1, 8), np.zeros(2 * beams, np.int64) if k else torch.zeros(2 * beams, dtype=torch.int64), 8, torch.float32, 1e-6, k) for k in (True, False))
    same([fast.read(q, kv, mask, 2).clone()], [slow.read(q, kv, mask, 2)])
    alone = slow.read(q[:beams], kv[:1, :3].contiguous(), mask[:1, :3].contiguous(), 2)
    same([fast.read(q, kv, mask, 2)[:beams].clone()], [alone])
    assert (fast.read(q, kv, mask, 2)[beams:] == 0).all()
    s = torch.randn(2, beams, 10, generator=g)
    s[0, :, 3:5], s[0, :, 8:] = 1e3, 1e3
    a, b = fast.shares(s.clone(), mask, 2), slow.shares(s.clone(), mask, 2)
    same([a], [b])
    assert (a[1] == 0).all() and torch.allclose(a[0].unflatten(-1, (2, 5))[..., :3].sum(-1), torch.ones(beams, 2), atol=1e-5)


@torch.no_grad()
def test_a_snapshot_of_a_model_in_training_drops_nothing():
    t5 = T5Generator(TINY | dict(dropout_rate=.5), codebooks=books(), init="geometry")
    words = torch.randint(2, 40, (3, 5), generator=torch.Generator().manual_seed(0)), torch.ones(3, 5, dtype=torch.long)
    _, codes = some(3, t5.sizes)
    t5.train()
    fast = freeze(t5)
    first = force(fast, words, codes)
    same(first, force(fast, words, codes), atol=0)
    assert all(m.training for m in t5.modules())                        # the model's own mode is nobody's but its owner's
    same(first, force(t5.eval(), words, codes), atol=1e-3)
    shared = t5.t5.encoder.block[0].layer[0].SelfAttention.q.weight
    shared.mul_(2)                                                      # training still reaches the encoder
    assert not torch.allclose(first[0], force(fast, words, codes)[0])


def test_t5_geometry_starts_at_the_strong_form_of_its_query_vectors():
    t5 = T5Generator(TINY, codebooks=books(), init="geometry").eval()
    words = torch.randint(2, 40, (3, 5), generator=torch.Generator().manual_seed(0)), torch.ones(3, 5, dtype=torch.long)
    _, codes = some(3, t5.sizes)
    with torch.no_grad():
        q = t5.query_vectors(words)
        assert torch.allclose(q.norm(dim=-1), torch.ones(3))
        for a, b in zip(force(t5, words, codes), StrongForm(books())(q, codes)): assert torch.equal(a, 16 * b)


def test_t5_from_a_folder(tmp_path):
    from transformers import T5Config, T5Model
    torch.manual_seed(0)
    T5Model(T5Config(**TINY)).save_pretrained(tmp_path)
    t5 = T5Generator(str(tmp_path), sizes=(6, 6)).eval()
    again = load_generator(*t5.arrays())
    words = torch.randint(2, 40, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    _, codes = some(2, t5.sizes)
    with torch.no_grad(): same(t5(words, codes), again(words, codes), atol=0)
    with pytest.raises(ValueError, match="config: expected"): T5Generator(3, sizes=(6, 6))


@pytest.mark.parametrize("make", [lambda: StrongForm(books(), counter=3), lambda: StrongForm(books(), weak=True),
                                  lambda: PrefixGenerator(8, codebooks=books(), counter=2, d_model=16, n_heads=2),
                                  lambda: PrefixGenerator(8, (5, 7), init="random", d_model=16, n_heads=2)])
def test_saved_and_loaded_scores_are_equal(make, tmp_path):
    model = shaken(make())
    save_arrays(tmp_path / "g.safetensors", *model.arrays())
    again = load_generator(*load_arrays(tmp_path / "g.safetensors"))
    q, codes = some(4, model.sizes)
    with torch.no_grad(): same(force(model, q, codes), force(again, q, codes), atol=0)
    arrays, meta = model.arrays()
    name = sorted(arrays)[-1]
    with pytest.raises(ValueError): load_generator({k: v for k, v in arrays.items() if k != name}, meta)
    with pytest.raises(ValueError): load_generator(arrays | {name: np.zeros((2, 2, 2), np.float32)}, meta)


def test_seeds():
    a, b, c = (PrefixGenerator(8, (5, 7), init="random", d_model=16, n_heads=2, seed=s) for s in (0, 0, 1))
    q, codes = some(4, a.sizes)
    with torch.no_grad():
        for m in (a, b, c): m.eval()
        same(a(q, codes), b(q, codes), atol=0)
        assert not torch.allclose(a(q, codes)[0], c(q, codes)[0])
    torch.manual_seed(0); first = torch.rand(1)
    torch.manual_seed(0); PrefixGenerator(8, (5, 7), init="random", d_model=16, n_heads=2)
    assert torch.equal(first, torch.rand(1))                            # the caller's random state is left alone


def test_training_lowers_the_loss_and_the_correction_stays_centred():
    for init in ("random", "geometry"):
        net = PrefixGenerator(8, codebooks=books(), init=init, d_model=32, n_heads=2, dropout=0., scale=1.)
        q, codes = some(32, net.sizes)
        opt, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
        for _ in range(60):
            loss = net.loss(q, codes)
            opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], (init, losses[0], losses[-1])
        assert net.loss(q, codes, smoothing=0.1) > net.loss(q, codes)
    scale = net.heads.scale0 * net.heads.log_scale.exp()
    with torch.no_grad():
        for z, s in zip(net(q, codes), net.strong(q, codes)): assert (z - scale * s).mean(-1).abs().max() < 1e-4
        assert max((z - scale * s).abs().max() for z, s in zip(net(q, codes), net.strong(q, codes))) > 0.1
        assert torch.equal(net.strong.book(1), torch.from_numpy(books()[1]))              # codebooks are not trained


def test_an_untrained_plain_generator_guesses():
    net = PrefixGenerator(8, (50, 50), init="random", d_model=32, n_heads=2).eval()
    q, codes = some(200, net.sizes)
    with torch.no_grad(): assert abs(net.loss(torch.nn.functional.normalize(q, dim=-1), codes).item() - np.log(50)) < 1


def test_follow_and_take():
    codes = torch.tensor([[[1, 2], [3, 4]]])
    assert follow(codes, 0).code.shape == (1, 1) and follow(codes, 1).parent.tolist() == [[0, 0]] and follow(codes, 1).code.tolist() == [[1, 3]]
    x = torch.arange(24).view(2, 3, 4)
    parent = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(take(x, parent), torch.stack([x[b][parent[b]] for b in range(2)]))


@pytest.mark.parametrize("call, says", [
    (lambda: StrongForm([]), "codebooks: expected at least one level"),
    (lambda: StrongForm([np.ones((3, 4)), np.full((3, 4), np.nan)]), r"codebooks\[1\]: expected finite"),
    (lambda: PrefixGenerator(8, (4, 4)), "codebooks: expected a list"),
    (lambda: PrefixGenerator(8, init="random"), "sizes: expected"),
    (lambda: PrefixGenerator(8, (4, 0), init="random"), "sizes: expected at least 1"),
    (lambda: PrefixGenerator(9, codebooks=books()), "dim: expected the codebooks' width 8"),
    (lambda: PrefixGenerator(8, (6, 6), books()), "sizes: expected the codebooks'"),
    (lambda: PrefixGenerator(8, codebooks=books(), init="magic"), "init: expected 'geometry' or 'random'"),
    (lambda: PrefixGenerator(8, codebooks=books(), d_model=16, n_heads=3), "n_heads: expected a divisor"),
    (lambda: T5Generator(TINY, init="geometry"), "codebooks: expected"),
    (lambda: as_codes([[1, 2, 3]], (4, 4)), "codes: expected"),
    (lambda: as_codes([[1, 9]], (4, 4)), "codes: expected values"),
    (lambda: as_codes([[1, -1]], (4, 4)), "codes: expected values"),
    (lambda: StrongForm(books()).start(torch.zeros(2, 9)), "queries: expected"),
    (lambda: load_generator({}, {}), "expected one of StrongForm"),
])
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says): call()
