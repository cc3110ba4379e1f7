"""The ResNet reward model: its numbers against plain torchvision, its checkpoints through all their doors."""

import json
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from common import resnet_reward
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.runtime import UserError

SMALL = {"arch": "resnet10", "hidden_dim": 16, "image_size": [3, 32, 32]}


def settle(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights that a fusion cannot get right by luck."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.2)
            module.bias.data.uniform_(-0.2, 0.2)
    return model


def small_model(**changes) -> ResNetRewardModel:
    torch.manual_seed(0)
    return settle(ResNetRewardModel(ResNetRewardConfig(**{**SMALL, **changes}))).eval()


def frames(count: int, size: int = 32, views: tuple[str, ...] = ("main_images",)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, size, size, 3)
    return {view: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for view in views}


def shades() -> torch.Tensor:
    """(8, 32, 32, 3) uint8: frames that differ as a whole. To a random network all noise looks alike."""
    ramp = torch.linspace(0, 255, 32)[None, :, None, None] * torch.linspace(0, 1, 8)[:, None, None, None]
    return ramp.expand(8, 32, 32, 3).to(torch.uint8)


@pytest.fixture
def checkpoint(tmp_path):
    model = small_model()
    golden = frames(4)["main_images"]
    model.save(
        tmp_path / "checkpoint", {"threshold": 0.7, "frame_size": [32, 32], "render": {"fov": 1.0}}, golden
    )
    return tmp_path / "checkpoint"


def load(path, **section) -> ResNetRewardModel:
    return load_resnet(ResNetRewardConfig(model_path=str(path), **section))


# --- The network


@pytest.mark.parametrize("hidden_dim", [None, 256])
def test_parameter_names_and_output_are_those_of_the_reference(hidden_dim):
    """RLinf's weights: a torchvision ResNet named `backbone`, its `fc` a Linear or a four-part Sequential."""
    torch.manual_seed(0)
    reference = torchvision.models.resnet18()
    reference.fc = nn.Linear(512, 1)
    if hidden_dim:
        reference.fc = nn.Sequential(
            nn.Linear(512, hidden_dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden_dim, 1)
        )
    settle(reference).eval()
    section = ResNetRewardConfig(arch="resnet18", hidden_dim=hidden_dim, image_size=[3, 48, 40])
    model = ResNetRewardModel(section).eval()
    model.load_state_dict({f"backbone.{name}": value for name, value in reference.state_dict().items()})

    images = frames(2, size=64)["main_images"]
    planes = F.interpolate(images.permute(0, 3, 1, 2) / 255, (48, 40), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        expected = reference((planes - mean) / std).squeeze(-1)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(images / 255), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arch", "precision"),  # bf16 only where a network that learned nothing is tame enough for it
    [
        ("resnet10", "fp32"),
        ("resnet18", "fp32"),
        ("resnet50", "fp32"),
        ("resnet10", "bf16"),
        ("resnet18", "bf16"),
    ],
)
def test_the_fast_forward_agrees_with_the_plain_one(arch, precision):
    model = small_model(arch=arch, precision=precision)
    images = shades()
    with torch.no_grad():  # spread a random network's probabilities over the middle, where errors show most
        logits = model(images)
        head = model.backbone.fc[-1]
        head.weight /= logits.std()
        head.bias.copy_(-logits.mean() / logits.std())
        expected = model(images).sigmoid()
    assert expected.max() - expected.min() > 0.4
    got = model.score({"main_images": images})
    assert (got.dtype, got.device.type, got.shape) == (torch.float32, "cpu", (8,))
    assert (got - expected).abs().max() < (1e-4 if precision == "fp32" else 0.01)


def test_scores_do_not_depend_on_the_company_a_frame_is_in():
    model = small_model(precision="fp32")
    torch.testing.assert_close(model.score(frames(7), batch_size=3), model.score(frames(7)))
    assert model.score({"main_images": torch.empty(0, 32, 32, 3, dtype=torch.uint8)}).shape == (0,)


def test_scoring_follows_the_weights():
    """The fused copy is made at the first score; one that outlived an update would score the old network."""
    model = small_model(precision="fp32")
    before = model.score(frames(2))
    model.train()
    with torch.no_grad():
        model.backbone.fc[-1].bias += 1.0
    model.eval()
    torch.testing.assert_close(model.score(frames(2)).logit(), before.logit() + 1.0, atol=1e-4, rtol=1e-4)
    other = small_model(precision="fp32")
    other.score(frames(2))
    torch.manual_seed(5)
    other.load_state_dict(ResNetRewardModel(ResNetRewardConfig(**SMALL)).state_dict())
    assert not torch.equal(other.score(frames(2)), before)


def test_two_views_are_told_apart():
    model = small_model(views=["main_images", "extra_view_images"])
    both = frames(3, views=("main_images", "extra_view_images"))
    swapped = {"main_images": both["extra_view_images"], "extra_view_images": both["main_images"]}
    assert model.score(both).shape == (3,)
    assert not torch.allclose(model.score(both), model.score(swapped), atol=1e-3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"extra_view_images": torch.zeros(1, 32, 32, 3, dtype=torch.uint8)},
            "main_images, which is not among",
        ),
        ({"main_images": torch.zeros(1, 32, 32, 3)}, "must be uint8 RGB .* got torch.float32"),
        (
            {"main_images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
            r"must be uint8 RGB .*\(1, 3, 32, 32\)",
        ),
        ({"main_images": torch.zeros(1, 64, 48, 3, dtype=torch.uint8)}, "are 64x48, .* trained on 32x32"),
    ],
)
def test_unfit_frames_are_refused(checkpoint, bad, message):
    with pytest.raises(UserError, match=message):
        load(checkpoint).score(bad)


def test_pretrained_weights_out_of_reach(monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(
        UserError, match=r"weights of resnet18 cannot be had .* pretrained: false, or put https"
    ):
        ResNetRewardModel(ResNetRewardConfig(arch="resnet18", pretrained=True))
    with pytest.raises(UserError, match="no pretrained weights for resnet10"):
        ResNetRewardModel(ResNetRewardConfig(arch="resnet10", pretrained=True))


def test_pretrained_weights_arrive_below_the_head(monkeypatch):
    torch.manual_seed(3)
    imagenet = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: imagenet)
    one = ResNetRewardModel(ResNetRewardConfig(arch="resnet18", pretrained=True))
    two = ResNetRewardModel(ResNetRewardConfig(arch="resnet18", pretrained=True, views=["a", "b"]))
    assert torch.equal(one.backbone.conv1.weight, imagenet["conv1.weight"])
    assert torch.equal(one.backbone.layer4[1].conv2.weight, imagenet["layer4.1.conv2.weight"])
    assert torch.equal(two.backbone.conv1.weight[:, 3:] * 2, imagenet["conv1.weight"])


# --- Checkpoints


def test_a_checkpoint_rebuilds_its_model_alone(checkpoint):
    loaded = load(checkpoint, precision="fp32")
    torch.testing.assert_close(loaded.score(frames(5)), small_model(precision="fp32").score(frames(5)))
    assert (loaded.threshold, loaded.views, loaded.window) == (0.7, ("main_images",), 1)
    assert loaded.meta["render"] == {"fov": 1.0}
    assert not loaded.training
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "golden.safetensors",
        "model.safetensors",
        "reward.json",
    ]


def test_two_view_checkpoint(tmp_path):
    views = ["main_images", "extra_view_images"]
    model = small_model(views=views, precision="fp32")
    both = frames(3, views=tuple(views))
    model.save(tmp_path / "c", {"threshold": 0.5}, torch.stack(list(both.values()), dim=1))
    torch.testing.assert_close(load(tmp_path / "c", precision="fp32").score(both), model.score(both))


def test_golden_frames_notice_other_weights(checkpoint):
    """The story: weights copied over from another run, beside the old reward.json."""
    torch.manual_seed(9)
    other = settle(ResNetRewardModel(ResNetRewardConfig(**SMALL))).state_dict()
    save_file(other, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"golden frames .* off what was written"):
        load(checkpoint)


def test_bf16_that_moves_golden_frames_falls_back_to_fp32(checkpoint, monkeypatch):
    exact = resnet_reward.fast_forward
    monkeypatch.setattr(
        resnet_reward,
        "fast_forward",
        lambda backbone, bf16: lambda images: exact(backbone, False)(images) + (9.0 if bf16 else 0.0),
    )
    monkeypatch.setattr(resnet_reward, "is_fast_at_bf16", lambda device: True)
    # make the golden scores sensitive: near one half
    golden = load_file(checkpoint / "golden.safetensors")
    model = small_model()
    with torch.no_grad():
        model.backbone.fc[-1].bias -= model(golden["frames/main_images"]).mean()
        model.backbone.fc[-1].weight *= 0.1
    model.save(checkpoint, {"threshold": 0.7}, golden["frames/main_images"])
    assert load(checkpoint).precision == "fp32"
    with pytest.raises(UserError, match="golden"):
        load(checkpoint, precision="bf16")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"arch": "resnet18"}, "trained with arch resnet10, but the config says resnet18"),
        ({"hidden_dim": 256}, "trained with hidden_dim 16, but the config says 256"),
        ({"image_size": [3, 64, 64]}, r"trained with image_size \[3, 32, 32\], but"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(checkpoint, section, message):
    with pytest.raises(UserError, match=message):
        load(checkpoint, **section)


def test_missing_and_foreign_files(checkpoint, tmp_path):
    with pytest.raises(UserError, match="model_path is not set"):
        load_resnet(ResNetRewardConfig())
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(tmp_path / "nowhere.safetensors")
    meta = json.loads((checkpoint / "reward.json").read_text())
    (checkpoint / "reward.json").write_text(json.dumps({**meta, "model_type": "history_vlm"}))
    with pytest.raises(UserError, match="of type 'history_vlm', not resnet"):
        load(checkpoint)
    (checkpoint / "reward.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="lacks 'arch'"):
        load(checkpoint)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_state_dicts_load(tmp_path, prefix, suffix):
    """RLinf saves no meta data, sometimes its `mean` and `std` buffers, and the prefixes of its wrappers."""
    model = small_model(precision="fp32")
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    weights[prefix + "mean"] = torch.zeros(1, 3, 1, 1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    loaded = load(path, precision="fp32", **SMALL)
    torch.testing.assert_close(loaded.score(frames(3)), model.score(frames(3)))
    assert (loaded.meta, loaded.threshold) == ({}, None)


def test_weights_of_another_network_are_named(tmp_path):
    torch.save(small_model(hidden_dim=None).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(
        UserError, match=r"missing: backbone.fc.0.bias and 3 more; unexpected: backbone.fc.bias"
    ):
        load(tmp_path / "linear.pt", **SMALL)
    torch.save(small_model(hidden_dim=8).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(UserError, match=r"of another shape: backbone.fc.0.bias"):
        load(tmp_path / "narrow.pt", **SMALL)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no state dict"):
        load(tmp_path / "list.pt", **SMALL)


def test_an_interrupted_save_leaves_the_older_checkpoint(checkpoint, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(resnet_reward, "save_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_model().save(checkpoint, {"threshold": 0.1}, frames(4)["main_images"])
    assert load(checkpoint).threshold == 0.7
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
