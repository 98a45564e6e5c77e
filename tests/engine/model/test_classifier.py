"""The classifier against its formulas, its heads, layer decay, and where text embeddings come from."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mam2.engine.config.finetune import FinetuneOptimConfig
from mam2.engine.errors import UserError
from mam2.engine.model.classifier import (
    LEAST_DEVIATION,
    Classifier,
    TextHead,
    linear_head,
    pooled_features,
    standardize_features,
)
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.text_head import embed_classes, read_text_embeddings
from mam2.engine.train.classifier_step import ClassifierObjective
from mam2.engine.train.optimizer import build_layered_optimizer

DEPTH, WIDTH, CLASSES = 3, 24, 5


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    encoder = Encoder((2, 2, 2), (2, 8, 8), width=WIDTH, depth=DEPTH, heads=2)
    model = Classifier(encoder, linear_head(WIDTH, CLASSES))
    for parameter in model.parameters():  # fresh norms and biases would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def video():
    return torch.randint(0, 256, (3, 3, 4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def blocks_only(model, video):
    encoder, index = model.encoder, torch.arange(8).expand(len(video), -1)
    tokens = encoder.patch_embed(encoder.tokens(video, index)) + encoder.positions
    return tokens, encoder.blocks


def test_logits_are_the_head_of_the_normed_mean_over_tokens(classifier, video):
    tokens, blocks = blocks_only(classifier, video)
    for block in blocks:
        tokens = block(tokens)
    mean = tokens.mean(1)
    normed = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    features = normed * classifier.norm.weight + classifier.norm.bias
    expected = features @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(video), expected, rtol=1e-4, atol=1e-5)


def test_standardized_features_have_mean_0_and_variance_1(classifier):
    """Works also if features hardly differ between clips; the encoder does not change."""
    videos = torch.randint(0, 256, (40, 3, 4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        classifier.encoder.blocks[-1].mlp.fc2.bias[0] += 60.0
    before = {name: tensor.clone() for name, tensor in classifier.encoder.state_dict().items()}
    pooled = pooled_features(classifier, videos.split(16))
    assert classifier.training
    share = standardize_features(classifier, pooled)
    with torch.no_grad():
        features = classifier.norm(classifier.encoder.encode(videos).mean(1))
        plain = F.layer_norm(pooled, (WIDTH,), eps=classifier.norm.eps)
    assert share == pytest.approx(float(plain.var(0, correction=0).sum() / plain.square().mean(0).sum()), rel=1e-3)
    assert share < 0.1
    torch.testing.assert_close(features.mean(0), torch.zeros(WIDTH), atol=1e-2, rtol=0)
    deviation = plain.std(0, correction=0)
    assert (deviation > LEAST_DEVIATION).sum() > WIDTH / 2
    expected = deviation / deviation.clamp(min=LEAST_DEVIATION)
    torch.testing.assert_close(features.std(0, correction=0), expected, atol=1e-2, rtol=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.encoder.state_dict().items())


def test_a_branch_that_is_left_out_is_left_out_of_one_clip(classifier, video):
    scales = torch.ones(DEPTH, 2, 3)
    torch.testing.assert_close(classifier(video, scales), classifier(video), rtol=1e-5, atol=1e-6)
    scales[1, 0, 2], scales[1, 1, 2], scales[2, 1, 0] = 0, 2.5, 0
    tokens, blocks = blocks_only(classifier, video)
    clips = []
    for clip in range(3):
        state = tokens[clip : clip + 1]
        for number, block in enumerate(blocks):
            state = state + scales[number, 0, clip] * block.attn(block.norm1(state))
            state = state + scales[number, 1, clip] * block.mlp(block.norm2(state))
        clips.append(classifier.head(classifier.norm(state.mean(1))))
    torch.testing.assert_close(classifier(video, scales), torch.cat(clips), rtol=1e-4, atol=1e-5)


def test_a_step_is_one_graph(classifier, video):
    objective = ClassifierObjective(classifier, lambda part: torch.compile(part, backend="eager", fullgraph=True))
    inputs = video, torch.full((3, CLASSES), 1 / CLASSES), torch.rand(DEPTH, 2, 3), torch.rand(3, WIDTH)
    loss, values, _ = objective(*inputs)
    loss.backward()
    expected = torch.nn.CrossEntropyLoss()(classifier(video, *inputs[2:]), inputs[1])
    torch.testing.assert_close(loss, expected)
    assert torch.equal(values["loss/training"], loss)
    assert all(parameter.grad.isfinite().all() for parameter in classifier.parameters())


def test_dropped_features_do_not_reach_the_head(classifier, video):
    scales = torch.zeros(3, WIDTH)
    torch.testing.assert_close(classifier(video, None, scales), classifier.head.bias.expand(3, -1))


def test_a_fresh_linear_head_is_small():
    head = linear_head(512, 100)
    assert float(head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert not head.bias.any()


def test_a_text_heads_logits_are_cosines_over_the_temperature():
    torch.manual_seed(0)
    embeddings, features = torch.randn(4, 6), torch.randn(3, 8)
    head = TextHead(8, embeddings, temperature=0.05)
    torch.nn.init.normal_(head.projection.bias)
    projected = features @ head.projection.weight.T + head.projection.bias
    expected = torch.stack([F.cosine_similarity(projected, row[None]) for row in embeddings], 1) / 0.05
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    assert not head.embeddings.requires_grad
    assert TextHead(8, embeddings, frozen=False).embeddings.requires_grad


def test_every_parameter_has_the_rate_of_its_layer(classifier):
    """Scales equal written-out powers; each parameter is in one group; only matrices have weight decay."""
    optimizer = build_layered_optimizer(classifier, DEPTH, FinetuneOptimConfig(layer_decay=0.5, weight_decay=0.1))
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["scale"], group["weight_decay"]
    first = {"patch_embed": 0.5**4, "blocks.0": 0.5**3, "blocks.1": 0.5**2, "blocks.2": 0.5}
    for name, parameter in classifier.named_parameters():
        expected = next((s for part, s in first.items() if name.startswith(f"encoder.{part}.")), 1.0)
        assert found[id(parameter)] == (expected, 0.1 if parameter.ndim > 1 else 0.0), name
    assert len(found) == len(list(classifier.parameters()))


def test_frozen_embeddings_are_not_optimized(classifier):
    classifier.head = TextHead(WIDTH, torch.randn(CLASSES, 6))
    optimizer = build_layered_optimizer(classifier, DEPTH, FinetuneOptimConfig())
    assert all(p is not classifier.head.embeddings for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_embeddings_are_put_in_the_order_of_the_classes(kind, tmp_path):
    table = torch.randn(3, 4)
    if kind == "npy":
        np.save(tmp_path / "text.npy", table.double().numpy())
        (tmp_path / "text.txt").write_text("wave\narchery\nsegway\n")
    else:
        names = {"classes": json.dumps(["wave", "archery", "segway"])}
        save_file({"embeddings": table}, tmp_path / "text.safetensors", metadata=names)
    path = tmp_path / f"text.{kind}"
    assert torch.equal(read_text_embeddings(path, ["archery", "wave"]), table[[1, 0]])
    with pytest.raises(UserError, match="no embedding for the class 'juggling'"):
        read_text_embeddings(path, ["archery", "juggling"])


def test_embeddings_without_names_must_be_as_many_as_the_classes(tmp_path):
    np.save(tmp_path / "text.npy", np.zeros((3, 4), np.float32))
    assert read_text_embeddings(tmp_path / "text.npy", ["a", "b", "c"]).shape == (3, 4)
    with pytest.raises(UserError, match="3 embeddings without names, for 2 classes"):
        read_text_embeddings(tmp_path / "text.npy", ["a", "b"])


def test_wrong_embedding_files_are_one_clear_line(tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    for name, message in (
        ("text.npy", "cannot be read"),
        ("flat.npy", "expected finite"),
        ("absent.npy", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_text_embeddings(tmp_path / name, ["a", "b", "c"])


def test_a_local_text_encoder_embeds_the_names(tmp_path):
    """A random BERT of two layers: each embedding is the mean over the tokens of its own prompt, without padding."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "video", "of", "ice", "skating", "archery"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).eval()
    model.save_pretrained(tmp_path)
    found = embed_classes(tmp_path, ["ice_skating", "archery"], "a video of {}")
    for row, text in zip(found, ("ice skating", "archery"), strict=True):
        tokens = torch.tensor([[2, 5, 6, 7, *(words.index(word) for word in text.split()), 3]])
        with torch.no_grad():
            expected = model(tokens).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="no such folder"):
        embed_classes(tmp_path / "nothing", ["a"], "{}")


def test_the_temperature_is_learned_from_its_start():
    head = TextHead(8, torch.randn(4, 6), temperature=0.01)
    assert float(head.log_scale.detach()) == pytest.approx(math.log(100))
    assert head.log_scale.requires_grad
