"the trie under models of transformers: only IDs come out, and those that brute force and prefix_allowed_tokens_fn give"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, T5Config, T5ForConditionalGeneration
from grnb.decode.beam import descend, spelled
from grnb.decode.hf import TrieLogitsProcessor, allowed_tokens, token_map
from grnb.generator.frozen_t5 import FrozenHF
from grnb.ids.make import SemanticIDs
from grnb.trie.layout import Trie

torch.set_num_threads(1)
SIZES, OFFSETS = (8, 8, 8), (10, 18, 26)


def pool(n=30, seed=0, sizes=SIZES, scan=64):
    return Trie.build(SemanticIDs(np.random.default_rng(seed).integers(0, sizes, (n, len(sizes))).astype(np.uint8), np.arange(n), sizes), scan=scan)


def t5(seed=0, **more):
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(**dict(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0) | more)).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=0)).eval()


WORDS = dict(input_ids=torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]]), attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
HOW = dict(max_new_tokens=3, min_new_tokens=3, length_penalty=0., return_dict_in_generate=True, output_scores=True, do_sample=False)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(0, 9999), st.sampled_from([0, 3, 64]), st.integers(0, 2), st.booleans())
def test_mask_equals_brute_force(n, seed, scan, depth, shuffled):
    "Any prefixes, known or not, tokens in any order, shared between levels"
    g, trie = np.random.default_rng(seed), pool(n, seed, scan=scan)
    tokens = [g.permutation(40)[:8] for _ in range(3)] if shuffled else OFFSETS
    p, ids = TrieLogitsProcessor(trie, tokens, begin=2), set(map(tuple, trie.codes.tolist()))
    rows, scores = np.c_[g.integers(0, 40, (9, 2)), np.zeros((9, depth), int)], torch.randn(9, 40)
    known = trie.codes[g.integers(0, len(trie), 9)].astype(int)
    for l in range(depth): rows[:, 2 + l] = np.where(g.random(9) < 0.8, p.tokens[l][known[:, l]], g.integers(0, 40, 9))
    out = p(torch.from_numpy(rows), scores)
    for row, got, had in zip(rows, out, scores):
        prefix = [dict(zip(p.tokens[l].tolist(), range(8))).get(int(t), -1) for l, t in enumerate(row[2:])]
        live = {int(p.tokens[depth][i[depth]]) for i in ids if list(i[:depth]) == prefix}
        assert {t for t in range(40) if got[t] > -torch.inf} == live and all(got[t] == had[t] for t in live)
        assert sorted(allowed_tokens(trie, tokens, begin=2)(0, torch.from_numpy(row))) == sorted(live)


@pytest.mark.parametrize("beams", [1, 4, 20])
def test_generate_with_t5(beams):
    model, trie = t5(), pool()
    how = HOW | dict(num_beams=beams, num_return_sequences=beams)
    ours = model.generate(**WORDS, **how, logits_processor=LogitsProcessorList([TrieLogitsProcessor(trie, OFFSETS)]))
    theirs = model.generate(**WORDS, **how, prefix_allowed_tokens_fn=allowed_tokens(trie, OFFSETS))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert (trie.find(ours.sequences[:, 1:].numpy() - OFFSETS) >= 0).all()
    free = model.generate(**WORDS, **how).sequences[:, 1:].numpy()
    assert not all((0 <= f - OFFSETS).all() and (f - OFFSETS < 8).all() and trie.find((f - OFFSETS)[None])[0] >= 0 for f in free)  # without it, others come out


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), dict(d_kv=6)])
def test_our_decoder_finds_what_generate_finds(more):
    "Same sequences in the same order, scores to rounding; and brute force over all IDs"
    model, trie, W = t5(**more), pool(60), 12
    ours = descend(FrozenHF(model, SIZES, OFFSETS), (WORDS["input_ids"], WORDS["attention_mask"]), trie, W, 2)
    theirs = model.generate(**WORDS, **HOW, num_beams=W, num_return_sequences=W, prefix_allowed_tokens_fn=allowed_tokens(trie, OFFSETS))
    assert (spelled(ours).flatten(0, 1) + torch.tensor(OFFSETS)).tolist() == theirs.sequences[:, 1:].tolist()
    assert torch.allclose(ours[-1].scores.flatten(), theirs.sequences_scores, atol=1e-4)
    ids = torch.from_numpy(np.asarray(trie.codes).astype(np.int64)) + torch.tensor(OFFSETS)
    start = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), ids[:, :2]], 1)
    z = model(input_ids=WORDS["input_ids"][1:].expand(len(ids), -1), attention_mask=WORDS["attention_mask"][1:].expand(len(ids), -1), decoder_input_ids=start).logits
    total = z.log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1)
    wide = descend(FrozenHF(model, SIZES, OFFSETS), (WORDS["input_ids"][1:], WORDS["attention_mask"][1:]), trie, len(trie), 1)[-1]
    assert torch.allclose(wide.scores[0], total.sort(descending=True).values, atol=1e-4)


@torch.no_grad()
def test_a_model_left_in_training_gives_the_scores_of_evaluation():
    model, trie = t5(dropout_rate=.5), pool()
    words = WORDS["input_ids"], WORDS["attention_mask"]
    want = descend(FrozenHF(model, SIZES, OFFSETS), words, trie, 8, 2)[-1].scores
    fast = FrozenHF(model.train(), SIZES, OFFSETS)
    assert torch.equal(descend(fast, words, trie, 8, 2)[-1].scores, want) and model.encoder.training and model.encoder.dropout.training


@torch.no_grad()
def test_our_decoder_and_generate_at_full_width():
    "d=512, 8 heads, 50 beams of 256 codes: the same top 50 in the same order; bf16 shares most"
    sizes, offsets, W = (256,) * 4, (2, 258, 514, 770), 50
    trie = pool(20_000, sizes=sizes)
    model = t5(vocab_size=1026, d_model=512, d_kv=64, d_ff=1024, num_heads=8)
    words = torch.randint(2, 1026, (1, 10), generator=torch.Generator().manual_seed(0)), torch.ones(1, 10, dtype=torch.long)
    ours = descend(FrozenHF(model, sizes, offsets), words, trie, W, 1)
    theirs = model.generate(input_ids=words[0], attention_mask=words[1], **HOW | dict(max_new_tokens=4, min_new_tokens=4), num_beams=W, num_return_sequences=W,
                            logits_processor=LogitsProcessorList([TrieLogitsProcessor(trie, offsets)]))
    assert (spelled(ours)[0] + torch.tensor(offsets)).tolist() == theirs.sequences[:, 1:].tolist()
    assert torch.allclose(ours[-1].scores[0], theirs.sequences_scores, atol=1e-3)
    for precision, share in (("bf16", 0.85), ("int8", 0.75)):
        other = descend(FrozenHF(model, sizes, offsets, precision), words, trie, W, 1)
        assert len(set(ours[-1].lo[0].tolist()) & set(other[-1].lo[0].tolist())) / W >= share, precision


@pytest.mark.parametrize("beams", [1, 4])
def test_generate_with_llama_then_eos(beams):
    model, trie = llama(), pool()
    prompt = dict(input_ids=torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]]), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))      # padded on the left
    how = HOW | dict(max_new_tokens=4, num_beams=beams, num_return_sequences=beams)
    ours = model.generate(**prompt, **how, logits_processor=LogitsProcessorList([TrieLogitsProcessor(trie, OFFSETS, eos=1, begin=4)]))
    theirs = model.generate(**prompt, **how, prefix_allowed_tokens_fn=allowed_tokens(trie, OFFSETS, eos=1, begin=4))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert (ours.sequences[:, -1] == 1).all() and (trie.find(ours.sequences[:, 4:7].numpy() - OFFSETS) >= 0).all()


def test_fewer_ids_than_beams():
    "Sequences that are no ID carry a score no ID has"
    model, trie = t5(), pool(3)
    out = model.generate(**WORDS, **HOW, num_beams=6, num_return_sequences=6, logits_processor=LogitsProcessorList([TrieLogitsProcessor(trie, OFFSETS)]))
    known = trie.find((out.sequences[:, 1:].numpy() - OFFSETS).clip(0, 7)) >= 0
    known &= ((out.sequences[:, 1:].numpy() >= OFFSETS) & (out.sequences[:, 1:].numpy() < np.array(OFFSETS) + 8)).all(1)
    assert known.reshape(2, 6)[:, :len(trie)].all() and not (out.sequences_scores.reshape(2, 6)[:, len(trie):] > -1e8).any()


def test_bad_arguments():
    trie = pool()
    for call, says in ((lambda: TrieLogitsProcessor(trie, (1, 2)), "tokens: expected 3 offsets or arrays"),
                       (lambda: token_map(trie, (1, 2, 33), 40), r"tokens\[2\]: expected tokens below"),
                       (lambda: token_map(trie, [np.zeros(8, int)] * 3), r"tokens\[0\]: expected 8 different tokens"),
                       (lambda: TrieLogitsProcessor(None, OFFSETS), "trie: expected a Trie, got NoneType"),
                       (lambda: TrieLogitsProcessor(trie, OFFSETS, begin=-1), "begin"),
                       (lambda: token_map(trie, ("a", 9, 17)), r"tokens\[0\]: expected a whole number or 8 of them, got <U1"),
                       (lambda: token_map(trie, (1, 9.5, 17)), r"tokens\[1\]: expected a whole number or 8 of them, got float64"),
                       (lambda: TrieLogitsProcessor(trie, OFFSETS, eos=-1), "eos: expected at least 0, got -1"),
                       (lambda: TrieLogitsProcessor(trie, OFFSETS, eos=9999)(torch.zeros(1, 4).long(), torch.zeros(1, 40)), "eos: expected a token below the vocabulary's 40, got 9999"),
                       (lambda: TrieLogitsProcessor(trie, (10, 18, 36))(torch.zeros(1, 3).long(), torch.zeros(1, 40)), r"tokens\[2\]: expected tokens below"),
                       (lambda: TrieLogitsProcessor(trie, OFFSETS)(torch.zeros(1, 4).long(), torch.zeros(1, 40)), "max_new_tokens: expected at most the 3 levels")):
        with pytest.raises(ValueError, match=says): call()
