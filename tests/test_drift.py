"""Are live frames like those of training? The rule by hand, and a warning from wherever the model judges."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_resnet_reward import settle
from torch import Tensor, tensor

from common import drift, resnet_reward
from common.drift import DriftWatch, FrameStatistics
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.reward_client import make_reward_client
from common.reward_config import RewardConfig
from common.runtime import UserError

KNOWN = FrameStatistics(tensor([1.0, 0.0]), tensor([2.0, 1.0]), 1.5, [[0.4, 0.6]])


def test_statistics_by_hand():
    """Two features, one of them constant: its std is a tenth of the mean std, (1 + 0) / 2 here."""
    features, brightness = tensor([[0.0, 5.0], [2.0, 5.0]]), tensor([[0.25], [0.75]])
    known = FrameStatistics.of(features, brightness)
    assert known.mean.tolist() == [1.0, 5.0] and known.std.tolist() == pytest.approx([1.0, 0.05])
    assert known.max_distance == pytest.approx(0.5**0.5)  # sqrt((1 + 0) / 2), of both
    assert known.brightness[0] == pytest.approx([0.2525, 0.7475])  # 0.5 % and 99.5 % between the two
    assert known.distance(tensor([[1.0, 5.1], [4.0, 5.0]])).tolist() == pytest.approx([2**0.5, 4.5**0.5])


def test_a_frame_lies_outside_by_either_number():
    features = tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 2.2], [1.0, 0.0], [1.0, 0.0]])
    distance = KNOWN.distance(features)
    assert distance.tolist() == pytest.approx([0, 2**0.5, 2.2 / 2**0.5, 0, 0])
    brightness = tensor([[0.4], [0.6], [0.5], [0.39], [0.61]])
    assert KNOWN.outside(distance, brightness).tolist() == [False, False, True, True, True]


def test_most_held_out_frames_lie_inside():
    generator = torch.Generator().manual_seed(0)
    features, brightness = (
        torch.randn(4000, 16, generator=generator),
        torch.rand(4000, 2, generator=generator),
    )
    known = FrameStatistics.of(features[:2000], brightness[:2000])
    outside = known.outside(known.distance(features[2000:]), brightness[2000:])
    assert 0.01 < outside.float().mean() < 0.06  # 1 % by distance, 1 % by each of two views
    assert known.outside(known.distance(features[2000:] + 2.0), brightness[2000:]).float().mean() > 0.99


def watch_of() -> tuple[DriftWatch, list[str]]:
    said: list[str] = []
    return DriftWatch(KNOWN, "the model", ("main_images",), said.append), said


def see(watch: DriftWatch, count: int, brightness: float) -> None:
    watch(tensor([[1.0, 1.0]]).expand(count, 2), torch.full((count, 1), brightness))


def test_more_than_half_of_the_last_200_frames_are_told_once():
    watch, said = watch_of()
    see(watch, 100, 0.9)
    see(watch, 99, 0.5)
    assert not said  # 199 frames
    see(watch, 1, 0.5)
    assert not said and watch.num_outside == 100  # half of 200
    see(watch, 100, 0.5)  # the first hundred are forgotten
    see(watch, 100, 0.8)
    assert not said
    see(watch, 1, 0.8)
    assert said == [
        "101 of the last 200 frames that the model judged look unlike those it was trained on: feature "
        "distance 0.71 (known: up to 1.50), brightness of main_images 0.800 (known: 0.400 to 0.600). "
        "Look at a few (light, camera, scene), or collect such frames and train on them too"
    ]
    see(watch, 1000, 0.8)
    assert len(said) == 1


# ----------------------------------------------------------------------------------------------------
# A checkpoint that knows what its frames looked like


def shades(count: int, low: int, high: int, size: int = 32) -> Tensor:
    """(count, size, size, 3) uint8 with noise, of rising brightness."""
    level = torch.linspace(low, high, count)[:, None, None, None]
    noise = torch.randint(-9, 10, (count, size, size, 3), generator=torch.Generator().manual_seed(0))
    return (level + noise).clamp(0, 255).to(torch.uint8)


VIEWS = ["main_images", "extra_view_images"]


@pytest.fixture
def checkpoint(tmp_path):
    """A model of two cameras, the second much darker, with statistics as train_resnet.py takes them."""
    torch.manual_seed(0)
    section = ResNetRewardConfig(arch="resnet10", image_size=[3, 24, 24], views=VIEWS)
    model = settle(ResNetRewardModel(section)).eval()
    frames = {"main_images": shades(100, 100, 150), "extra_view_images": shades(100, 20, 40)}
    with torch.no_grad():  # logits that spread, so that a golden score tells something
        logits = model(torch.stack(list(frames.values()), dim=1))
        model.backbone.fc.weight *= 2 / logits.std()
        model.backbone.fc.bias.copy_(-2 * logits.mean() / logits.std())
    looks = []
    model.onlooker = lambda *look: looks.append(look)
    model.score(frames)
    statistics = FrameStatistics.of(*(torch.cat(part) for part in zip(*looks, strict=True)))
    golden = torch.stack([images[::10] for images in frames.values()], dim=1)
    model.save(tmp_path / "c", {"threshold": 0.5, "frame_size": [32, 32]}, golden, statistics)
    return tmp_path / "c"


def load(path) -> ResNetRewardModel:
    return load_resnet(ResNetRewardConfig(model_path=str(path), precision="fp32"))


def test_brightness_is_that_of_the_pictures_and_comes_back(checkpoint):
    model = load(checkpoint)
    known = model.onlooker.statistics
    (low, high), dark = known.brightness
    assert (low, high) == (pytest.approx(100 / 255, abs=0.01), pytest.approx(150 / 255, abs=0.01))
    assert dark == [pytest.approx(20 / 255, abs=0.01), pytest.approx(40 / 255, abs=0.01)]
    seen = []
    model.onlooker = lambda features, brightness: seen.append(brightness)
    frames = {view: shades(3, 0, 200) for view in VIEWS}
    model.score(frames)
    expected = torch.stack([f.float().mean((1, 2, 3)) / 255 for f in frames.values()], dim=1)
    torch.testing.assert_close(seen[0], expected, atol=0.005, rtol=0)
    assert json.loads((checkpoint / "reward.json").read_text())["frame_statistics"][
        "brightness"
    ].keys() == set(VIEWS)


@pytest.mark.parametrize("placement", ["inline", "worker"])
def test_a_darker_room_is_told_where_the_model_judges(checkpoint, capfd, placement):
    model = ResNetRewardConfig(model_path=str(checkpoint), infer_micro_batch_size=50)
    cfg = RewardConfig(True, "per_step", placement=placement, model=model)
    with make_reward_client(cfg) as client:
        client.score({"main_images": shades(250, 100, 150), "extra_view_images": shades(250, 20, 40)})
        assert "unlike" not in capfd.readouterr().err
        dark = {"main_images": shades(250, 60, 90), "extra_view_images": shades(250, 20, 40)}
        client.score(dark)
        told = capfd.readouterr().err
        client.score(dark)
    assert told.count("warning: ") == 1 and f"the reward model {checkpoint} judged look unlike" in told
    assert "brightness of main_images 0.2" in told and "(known: 0.3" in told
    assert "unlike" not in capfd.readouterr().err


def test_older_checkpoints_and_fresh_models_have_no_onlooker(checkpoint):
    golden = load_file(checkpoint / "golden.safetensors")
    frames = torch.stack([golden[f"frames/{view}"] for view in VIEWS], dim=1)
    save_file({"frames": frames, "success_prob": golden["success_prob"]}, checkpoint / "golden.safetensors")
    meta = json.loads((checkpoint / "reward.json").read_text())
    del meta["frame_statistics"]
    (checkpoint / "reward.json").write_text(json.dumps(meta))
    assert load(checkpoint).onlooker is None
    assert ResNetRewardModel(ResNetRewardConfig(arch="resnet10")).onlooker is None


# --- What golden frames notice


def change(path, **meta) -> None:
    written = json.loads((path / "reward.json").read_text())
    (path / "reward.json").write_text(json.dumps({**written, **meta}))


def test_golden_frames_notice_cameras_in_another_order(checkpoint):
    """Regression: they were kept in the order of `views`, and followed it."""
    change(checkpoint, views=VIEWS[::-1])
    with pytest.raises(UserError, match="scores its golden frames"):
        load(checkpoint)


def test_golden_frames_notice_another_size(checkpoint):
    change(checkpoint, image_size=[3, 12, 12])
    with pytest.raises(UserError, match="scores its golden frames"):
        load(checkpoint)


def test_golden_frames_notice_another_resize(checkpoint, monkeypatch):
    """As another torch might: here the nearest pixel, in place of a blend."""
    interpolate = F.interpolate
    nearest = lambda images, size, **_: interpolate(images, size=size, mode="nearest")  # noqa: E731
    monkeypatch.setattr(resnet_reward.F, "interpolate", nearest)
    with pytest.raises(UserError, match="scores its golden frames"):
        load(checkpoint)


def test_golden_frames_notice_other_colours(checkpoint, monkeypatch):
    monkeypatch.setattr(resnet_reward, "IMAGENET_MEAN", resnet_reward.IMAGENET_MEAN[::-1])
    with pytest.raises(UserError, match="scores its golden frames"):
        load(checkpoint)


def test_the_warning_goes_to_stderr(capsys):
    drift.complain("x")
    assert capsys.readouterr().err == "warning: x\n"
