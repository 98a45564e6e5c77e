"""Pictures of predictions: they show the right values, and the page is complete."""

import base64
import dataclasses
import json
import re
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.load import load_model
from mam2.engine.config.pretrain import DecoderConfig, RegressorConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.evaluation.pixel_predictions import reconstruct_pixels
from mam2.engine.evaluation.pretext import evaluation_mask
from mam2.engine.evaluation.regressor_attention import regressor_attention
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.motion_targets import motion_loss
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.engine.train.pretrain import pretrain
from mam2.kernels import reference, tube_mask
from tests.helpers.commands import exit_status
from tests.helpers.paths import CLIPS


@pytest.fixture(scope="module")
def videos(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=16)
    return folder / "train"


@pytest.fixture(scope="module")
def runs(videos, tmp_path_factory, small):
    found = []
    for objective in ("mam2", "videomae"):
        found.append(tmp_path_factory.mktemp(objective))
        pretrain(small(model={"objective": objective}, optim={"epochs": 1.0}), videos, found[-1], progress=False)
    return found


@pytest.mark.slow
def test_several_checkpoints_side_by_side(videos, runs, tmp_path, capsys):
    out = tmp_path / "seen"
    assert exit_status("visualize", *runs, "--data", videos, "--out", out, "--clips", 3) == 0
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 1 + 3 * 3
    page = (out / "index.html").read_text()
    assert page.count("<section") == 3
    assert "http" not in page.replace("http-equiv", "")
    # MAM2: original, masked, appearance, codes, two of motion, attention; VideoMAE: no codes, no attention
    assert page.count('class="tile"') == 3 * (7 + 5)
    for run in runs:
        assert f"<tr><th>{run}</th>" in page
        assert f"<summary>Config of {run}</summary>" in page
    assert page.count("&quot;objective&quot;: &quot;videomae&quot;") == 1
    assert page.count("&quot;objective&quot;: &quot;mam2&quot;") == 1
    maps = json.loads(re.search(r"const maps = (\[.*?\])\.map", page)[1])
    assert len(maps) == 3
    for one in maps:
        weights = np.frombuffer(base64.b64decode(one["weights"]), np.uint8)
        weights = weights.reshape(len(one["masked"]), len(one["visible"]))
        assert (weights.max(1) == 255).all()
        assert sorted(one["masked"] + one["visible"]) == list(range(np.prod(one["grid"])))
    for name in files:
        if name.endswith(".png"):
            assert np.asarray(Image.open(out / name).convert("RGB")).std() > 10
        if name.endswith(".gif"):
            assert Image.open(out / name).n_frames == 4
        if name.endswith(".mp4"):
            with av.open(str(out / name)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == 3 * 4
            assert frames[0].std() > 10


@pytest.mark.slow
def test_the_page_says_how_well_the_shown_clips_are_predicted(videos, runs, tmp_path):
    """The page has the numbers that the demo measures on the same clips and masks, or a dash without predictions."""
    assert exit_status("visualize", *runs, "--data", videos, "--out", tmp_path, "--clips", 3) == 0
    page = (tmp_path / "index.html").read_text()
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", page)[1:]
    table = {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in rows}
    everything = read_manifest(videos, progress=False)
    manifest = Manifest(tuple(everything.videos[place] for place in (0, 8, 15)))
    config = checkpoint.read_config(checkpoint.newest(runs[0]) / checkpoint.WEIGHTS)
    model = load_model(runs[0]).eval()
    tokenizer = build_tokenizer(load_vqgan(runs[0] / "tokenizer.safetensors"), config, torch.device("cpu"))
    one_view = dataclasses.replace(config.data, views=1)
    with ClipLoader(manifest, one_view, batch=1, device="cpu", seed=0, train=False) as loader:
        clips = [batch.clip for batch in loader.evaluate()]
    right, codes, moved, still = [], [], 0.0, 0.0
    for clip in clips:
        video, mask = clip.permute(0, 4, 1, 2, 3), evaluation_mask(clip, config)
        with torch.no_grad():
            latents = model.complete(video, mask)
            answers = tokenizer.codes(video).gather(1, mask.masked)
            right.append((model.predict_codes(latents, mask) == answers).double().mean())
            codes += answers.flatten().tolist()
            moved += model.motion_loss(latents, mask, video).item()
            nothing = torch.zeros_like(model.predict_motion(latents, mask))
            still += motion_loss(nothing, video, mask, config.loss, config.patch_size).item()
    accuracy, commonest = float(sum(right)) / 3, max(map(codes.count, codes)) / len(codes)
    expected = [100 * accuracy, 100 * commonest, 100 * moved / still]
    assert [float(cell.removesuffix(" %")) for cell in table[str(runs[0])][:3]] == pytest.approx(expected, abs=0.15)
    assert table[str(runs[0])][3] == "–"
    assert ('codes <span class="yes"' in table[str(runs[0])][4]) == (accuracy > commonest + 1e-9)
    assert ('motion <span class="yes"' in table[str(runs[0])][4]) == (moved < still)
    assert table[str(runs[1])][:3] == ["–", "–", "–"]
    assert 20 < float(table[str(runs[1])][3].removesuffix(" %")) < 500


@pytest.mark.slow
def test_a_checkpoint_away_from_its_run_asks_for_the_tokenizer(videos, runs, tmp_path, capsys):
    file = tmp_path / "a" / "b" / "c" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes((checkpoint.newest(runs[0]) / checkpoint.WEIGHTS).read_bytes())
    video = next(path for path in videos.rglob("*.mp4"))
    assert exit_status("visualize", file, "--data", video, "--out", tmp_path / "seen") == 2
    assert "--tokenizer" in capsys.readouterr().err
    own = runs[0] / "tokenizer.safetensors"
    assert exit_status("visualize", file, "--data", video, "--out", tmp_path / "seen", "--tokenizer", own) == 0
    assert len(list((tmp_path / "seen").glob("*.mp4"))) == 1


@pytest.mark.slow
def test_names_in_any_script_are_kept(videos, runs, tmp_path):
    (tmp_path / "clips").mkdir()
    video = next(path for path in videos.rglob("*.mp4"))
    shutil.copy(video, tmp_path / "clips" / "прыжок 跳ぶ é.mp4")
    assert exit_status("visualize", runs[1], "--data", tmp_path / "clips", "--out", tmp_path / "seen") == 0
    names = {path.name for path in (tmp_path / "seen").iterdir()}
    assert names == {"index.html", *(f"01-прыжок-跳ぶ-é.{suffix}" for suffix in ("png", "gif", "mp4"))}
    assert "01-прыжок-跳ぶ-é" in (tmp_path / "seen" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_clips_of_many_formats(runs, tmp_path):
    assert exit_status("visualize", runs[1], "--data", CLIPS / "train.csv", "--out", tmp_path, "--clips", 2) == 0
    assert len(list(tmp_path.glob("*.gif"))) == 2


@pytest.mark.parametrize("keys", ["visible", "all"])
def test_attention_is_what_the_regressor_computes(small, keys):
    """With values of 1 for one visible token and 0 for the others, the output is the weights of that token."""
    regressor = RegressorConfig(depth=1, width=24, heads=2, keys=keys)
    config = small(model={"regressor": regressor, "decoder": DecoderConfig(depth=1, width=24, heads=2)})
    torch.manual_seed(0)
    model = MAM2(config, 16).eval()
    video = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    mask = tube_mask(2, config.grid, 0.5, seed=0)
    weights = regressor_attention(model, video, mask)
    total = weights.sum(-1)
    assert weights.shape == (2, 32, 32)
    if keys == "visible":
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        assert ((total > 0.05) & (total < 0.95)).all()
    block = model.regressor.blocks[0].attn
    torch.nn.init.zeros_(block.v.bias)
    torch.nn.init.zeros_(block.proj.bias)
    with torch.no_grad():
        block.v.weight.copy_(torch.eye(24))
        block.proj.weight.copy_(torch.eye(24))
    taken = {}
    block.register_forward_hook(lambda _module, inputs, output: taken.update(inputs=inputs, output=output))
    with torch.no_grad():
        model.complete(video, mask)
        queries, context, _ = taken["inputs"]
        one = torch.zeros_like(context)
        one[:, 5] = 1  # the sixth visible token, in every value of every head
        by_head = block(queries, context, one).unflatten(-1, (2, -1)).mean((-2, -1))
    torch.testing.assert_close(weights[:, :, 5], by_head)


@pytest.mark.parametrize("objective", ["videomae", "joint"])
@pytest.mark.parametrize("normalize", ["channel", "patch", "none"])
def test_a_perfect_prediction_gives_the_clip_back(monkeypatch, small, normalize, objective):
    config = small(model={"objective": objective}, loss={"pixel_normalize": normalize})
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8))
    model = VideoMAE(config)
    mask = evaluation_mask(clip, config)
    monkeypatch.setattr(model, "predict_pixels", lambda video, mask: _target(video, mask.masked, normalize, objective))
    strips = reconstruct_pixels(model, clip, config)
    torch.testing.assert_close(strips.original, clip[:, ::2] / 255)
    torch.testing.assert_close(strips.appearance, strips.original, atol=1e-4, rtol=0)
    hidden = mask.as_bool().view(2, 4, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(strips.predicted_motion[hidden], strips.motion[hidden], atol=1e-3, rtol=0)
    assert (strips.predicted_motion[~hidden] == 0.5).all()
    assert (strips.masked[hidden] == 0.5).all()


def _target(video, masked, normalize, objective):
    deviation = None if normalize == "none" else normalize
    kind = "joint" if objective == "joint" else "pixel"
    target = reference.target(video, masked, (2, 8, 8), kind, deviation, 1e-6, None, None, torch.float32)
    return target.view(*masked.shape, -1)
