"HubEncoder on tiny checkpoints with random weights: BERT, T5, ViT, ResNet, CLIP; resume; refusals"
import inspect, shutil

import numpy as np
import pytest
import torch
from PIL import Image

from grnb.features.hub import HubEncoder
from grnb.features.store import FeatureStore

WORDS = "a red blue ball cube rolls jumps left right and".split()
TEXTS = ["a red ball", "a blue cube jumps left and right", "ball", "a red ball rolls", "cube and ball"]


def tokenizer(folder, start="[CLS]", end="[SEP]"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", start, end, *WORDS])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, 2), (end, 3)])
    PreTrainedTokenizerFast(tokenizer_object=t, pad_token="[PAD]", unk_token="[UNK]", bos_token=start, eos_token=end, model_max_length=12).save_pretrained(folder)
    return len(vocab)

def save(model, folder):
    model.save_pretrained(folder)
    return folder

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel
    d = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    return save(BertModel(BertConfig(vocab_size=tokenizer(d), max_position_embeddings=12, **SMALL)), d)

@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    from transformers import T5Config, T5Model
    d = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    return save(T5Model(T5Config(vocab_size=tokenizer(d), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)), d)

@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel
    d = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTImageProcessor(size=dict(height=16, width=16)).save_pretrained(d)
    return save(ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)), d)

@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor
    d = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(d)
    return save(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), d)

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    d = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    n = tokenizer(d)
    CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16)).save_pretrained(d)
    text = dict(vocab_size=n, max_position_embeddings=12, eos_token_id=3, bos_token_id=2, pad_token_id=0, **SMALL)
    return save(CLIPModel(CLIPConfig(text_config=text, vision_config=dict(image_size=16, patch_size=8, **SMALL), projection_dim=10)), d)

def images(n=5):
    g = np.random.default_rng(0)
    return [g.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8) for i in range(n)]


@pytest.mark.parametrize("name", ["bert", "t5", "clip"])
def test_texts_do_not_depend_on_their_batch(name, request):
    folder = request.getfixturevalue(name)
    together = HubEncoder(folder, device="cpu", batch_size=8).encode_texts(TEXTS)
    alone = HubEncoder(folder, device="cpu", batch_size=1).encode_texts(TEXTS)
    assert together.shape == (5, 10 if name == "clip" else 16) and together.dtype == np.float32
    assert np.allclose(together, alone, atol=1e-5) and np.isfinite(together).all()
    assert len(np.unique(together.round(4), axis=0)) == 5


@pytest.mark.parametrize("name, width", [("vit", 16), ("resnet", 16), ("clip", 10)])
def test_images_of_every_kind(name, width, request, tmp_path):
    enc, arrays = HubEncoder(request.getfixturevalue(name), device="cpu", batch_size=2), images()
    paths = [tmp_path/f"{i}.png" for i in range(5)]
    for p, a in zip(paths, arrays): Image.fromarray(a).save(p)
    x = enc.encode_images(arrays)
    assert x.shape == (5, width) and x.dtype == np.float32
    assert np.array_equal(x, enc.encode_images([Image.fromarray(a) for a in arrays])) and np.array_equal(x, enc.encode_images(paths))


def test_against_transformers_itself(bert, clip):
    from transformers import AutoModel, AutoTokenizer
    model, tok = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    with torch.no_grad(): hidden = model(**tok(["a red ball"], return_tensors="pt")).last_hidden_state
    assert np.allclose(HubEncoder(bert, device="cpu").encode_texts(["a red ball"]), hidden.mean(1), atol=1e-6)
    assert np.allclose(HubEncoder(bert, device="cpu", pool="first").encode_texts(["a red ball"]), hidden[:, 0], atol=1e-6)
    model, tok = AutoModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    with torch.no_grad(): want = model.text_projection(model.text_model(**{k: v for k, v in tok(["a red ball"], return_tensors="pt").items() if k != "token_type_ids"}).pooler_output)
    assert np.allclose(HubEncoder(clip, device="cpu").encode_texts(["a red ball"]), want, atol=1e-6)


def test_long_and_strange_texts(bert):
    x = HubEncoder(bert, device="cpu").encode_texts(["ball " * 500, "", "žluťoučký kůň 🐎"])
    assert x.shape == (3, 16) and np.isfinite(x).all()


def test_killed_half_way_resumes(bert, tmp_path):
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:2]]
    enc = HubEncoder(bert, device="cpu", batch_size=16)
    whole, forward, calls = enc.encode_texts(texts), enc.model.forward, []
    def dying(*a, **k):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return forward(*a, **k)
    enc.model.forward = dying
    enc.model.forward.__signature__ = inspect.signature(forward)
    with pytest.raises(KeyboardInterrupt): enc.encode_texts(texts, store=tmp_path, chunk=32)
    assert len(FeatureStore(tmp_path).missing()) == 5               # two of seven chunks were done
    calls[:] = [1] * 10
    assert np.allclose(enc.encode_texts(texts, store=tmp_path, chunk=32), whole, atol=1e-5)
    assert len(calls) - 10 == 9                                     # 136 texts in chunks of 32, batches of 16
    with pytest.raises(ValueError, match="holds about"): enc.encode_texts(texts[::-1], store=tmp_path, chunk=32)


def test_refusals(bert, vit, tmp_path):
    with pytest.raises(ValueError, match="kind"): HubEncoder(bert, kind="sound")
    with pytest.raises(ValueError, match="is of kind text, not image"): HubEncoder(bert, kind="image")
    with pytest.raises(ValueError, match="has no model"): HubEncoder(tmp_path)
    with pytest.raises(ValueError, match="pool"): HubEncoder(bert, pool="max")
    with pytest.raises(ValueError, match="batch_size"): HubEncoder(bert, batch_size=0)
    enc = HubEncoder(vit, device="cpu")
    with pytest.raises(ValueError, match="encodes images only"): enc.encode_texts(["a"])
    with pytest.raises(ValueError, match="images: expected"): enc.encode_images([np.zeros((4, 4))])
    with pytest.raises(ValueError, match="at least one"): enc.encode_images([])
    enc = HubEncoder(bert, device="cpu")
    with pytest.raises(ValueError, match="encodes texts only"): enc.encode_images(images())
    for bad in ("one text", ["a", 3]):
        with pytest.raises(ValueError, match="list of strings"): enc.encode_texts(bad)


def test_pickled_weights_are_not_read(bert, tmp_path):

    shutil.copytree(bert, tmp_path/"m")
    (tmp_path/"m/model.safetensors").unlink()
    torch.save(HubEncoder(bert, device="cpu").model.state_dict(), tmp_path/"m/pytorch_model.bin")
    with pytest.raises(ValueError, match="has no model"): HubEncoder(tmp_path/"m")
