"""The image success classifier: a ResNet that looks at one frame and says how likely the task is done.

Parameter names are RLinf's (`backbone.*`, torchvision's names below that), so weights travel both ways.

**Checkpoint**: a folder of three files that appears whole or not at all.
- `model.safetensors`: the weights.
- `reward.json`: the network (`model_type`, `arch`, `hidden_dim`, `dropout`, `image_size`, `views`, `window`,
  `normalisation`), `threshold` and the rule that chose it, `frame_size` and `render` of the data's cameras,
  its hash, class counts and validation metrics.
- `golden.safetensors`: `frames/VIEW`, a few uint8 frames of each view, and `success_prob`, their scores in
  plain fp32, compared again at every load; `feature_mean` and `feature_std` of the validation frames, whose
  bounds are `frame_statistics` in `reward.json`: later frames are compared with them (`common.drift`).

What a reward model must offer, of whatever kind: `score(frames) -> success_prob`, `views`, `window`, `meta`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.drift import DriftWatch, FrameStatistics
from common.files import load_json, load_torch, save_json, whole_folder
from common.resnets import Arch, build_backbone, fast_forward, is_fast_at_bf16
from common.runtime import UserError, pick_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GOLDEN_TOLERANCE = 0.02  # of success_prob; bf16 moves it by a few thousandths


@dataclass
class ResNetRewardConfig:
    """`reward.model` in RL, `actor.model` in training. A checkpoint folder says what is null here."""

    model_type: Literal["resnet"] = "resnet"
    # checkpoint folder or bare state dict (.pt, .safetensors); null: fresh; in RL several may judge together
    model_path: str | list[str] | None = None
    ensemble: Literal["min", "mean"] = "min"  # what the success_prob of several models come to
    arch: Arch | None = None  # null: resnet18; resnet10 is ours, small, for CPUs
    pretrained: bool = False  # start from torchvision's ImageNet weights
    hidden_dim: int | None = None  # head: Linear -> ReLU -> Dropout -> Linear; null: one Linear
    dropout: float = 0.1  # in the head with a hidden layer
    image_size: list[int] | None = None  # [3, height, width] of what the network sees; null: [3, 128, 128]
    views: list[str] | None = None  # several are stacked as channels; null: those of the data it learns from
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware is fast at it
    device: str = "auto"
    infer_micro_batch_size: int = 32  # frames scored at once in RL

    def __post_init__(self):
        if self.infer_micro_batch_size < 1:
            raise ValueError(f"infer_micro_batch_size must be at least 1, got {self.infer_micro_batch_size}")
        if self.image_size is not None and (len(self.image_size) != 3 or self.image_size[0] != 3):
            raise ValueError(f"image_size must be [3, height, width], got {self.image_size}")
        if self.views == []:
            raise ValueError("views must name at least one view, such as main_images")


class ResNetRewardModel(nn.Module):
    """Frames in, probability of success out.

    `score` is the door for everyone but the trainer. `meta` is the checkpoint's `reward.json` (empty for
    weights without one), `threshold` the success threshold in it.
    """

    window = 1  # frames per verdict

    def __init__(self, section: ResNetRewardConfig):
        """Fresh (or ImageNet) weights; `section.model_path` is for `load_resnet`."""
        super().__init__()
        self.arch = section.arch or "resnet18"
        self.hidden_dim, self.dropout = section.hidden_dim, section.dropout
        self.image_size = tuple(section.image_size or (3, 128, 128))
        self.views = tuple(section.views or ("main_images",))
        self.precision = section.precision
        self.meta: dict[str, Any] = {}
        # told the features (B, F) and the brightness in [0, 1] (B, V) of whatever is scored
        self.onlooker: Callable[[Tensor, Tensor], None] | None = None
        self.backbone = build_backbone(
            self.arch, section.pretrained, self.hidden_dim, self.dropout, len(self.views)
        )
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            channels = torch.tensor(values).repeat(len(self.views)).view(1, -1, 1, 1)
            self.register_buffer(name, channels, persistent=False)
        self._fast_forward: Callable[[Tensor], Tensor] | None = None
        self.register_load_state_dict_post_hook(lambda *_: self._drop_fast_forward())

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def threshold(self) -> float | None:
        return self.meta.get("threshold")

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, H, W, 3), for V views (B, V, H, W, 3), uint8 or in [0, 1] -> normalised float (B, 3V, h, w)."""
        if images.dim() == 5:
            images = images.permute(0, 1, 4, 2, 3).flatten(1, 2)
        else:
            images = images.permute(0, 3, 1, 2)  # channels-last memory, what the convolutions below want
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        images = images.float()
        if images.shape[-2:] != self.image_size[1:]:
            images = F.interpolate(images, size=self.image_size[1:], mode="bilinear", align_corners=False)
        return (images - self.mean * scale) / (self.std * scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,) of images as `preprocess` takes them. Differentiable; what the trainer calls."""
        return self.backbone(self.preprocess(images)).squeeze(-1)

    def train(self, mode: bool = True) -> "ResNetRewardModel":
        self._drop_fast_forward()  # weights may change from here on
        return super().train(mode)

    def _apply(self, *args: Any) -> "ResNetRewardModel":
        self._drop_fast_forward()  # `to(device)` and its like
        return super()._apply(*args)

    def _drop_fast_forward(self) -> None:
        self._fast_forward = None

    @torch.inference_mode()
    def score(self, frames: dict[str, Tensor], batch_size: int = 64) -> Tensor:
        """success_prob (B,) float32 on the CPU, of uint8 RGB frames (B, H, W, 3) for each of `views`.

        Runs the fused network, `batch_size` frames at a time. Raises UserError if a view is missing, no uint8
        RGB, or of another size than the frames the model was trained on.
        """
        images = self._checked(frames)
        if len(images) == 0:
            return torch.empty(0)
        if self._fast_forward is None:
            self.eval()
            self._fast_forward = fast_forward(self.backbone, self.uses_bf16)
        logits = []
        for batch in images.split(batch_size):
            pixels = self.preprocess(batch.to(self.device, non_blocking=True))
            features = self._fast_forward(pixels)
            logits.append(self.backbone.fc(features))
            if self.onlooker is not None:
                self.onlooker(features, self._brightness(pixels))
        return torch.cat(logits).squeeze(-1).sigmoid().cpu()

    def _brightness(self, pixels: Tensor) -> Tensor:
        """(B, V) in [0, 1] of preprocessed pixels (B, 3V, h, w)."""
        channels = pixels.mean((2, 3)) * self.std.flatten() + self.mean.flatten()
        return channels.unflatten(1, (len(self.views), 3)).mean(2)

    @property
    def uses_bf16(self) -> bool:
        return self.precision == "bf16" or (self.precision == "auto" and is_fast_at_bf16(self.device))

    def _checked(self, frames: dict[str, Tensor]) -> Tensor:
        """One tensor of the frames of `views`: (B, H, W, 3), or (B, V, H, W, 3) if there are several."""
        if missing := [view for view in self.views if view not in frames]:
            raise UserError(
                f"the reward model looks at {missing[0]}, which is not among the frames: {list(frames)}"
            )
        chosen = [frames[view] for view in self.views]
        for view, images in zip(self.views, chosen, strict=True):
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
                raise UserError(
                    f"{view} must be uint8 RGB (B, H, W, 3), got {images.dtype} {tuple(images.shape)}"
                )
            expected = self.meta.get("frame_size", list(images.shape[1:3]))
            if list(images.shape[1:3]) != expected:
                raise UserError(
                    f"{view} are {images.shape[1]}x{images.shape[2]}, but the reward model was trained on "
                    f"{expected[0]}x{expected[1]} frames; render that size, or train it on the new one"
                )
        return chosen[0] if len(chosen) == 1 else torch.stack(chosen, dim=1)

    def save(
        self,
        folder: str | Path,
        meta: dict[str, Any],
        golden_frames: Tensor,
        statistics: FrameStatistics | None = None,
    ) -> None:
        """Write the checkpoint folder (format above), replacing an older one of that name in one step.

        `meta` is what only the trainer knows (threshold, frame_size, render, ...); `golden_frames` a few
        uint8 images as `preprocess` takes them; `statistics` what frames looked like (`common.drift`). The
        model is left in eval mode, and `self.meta` is what was written.
        """
        self.eval()
        with torch.inference_mode():
            golden_prob = self(golden_frames.to(self.device)).sigmoid().cpu()
        self.meta = {
            "model_type": "resnet",
            "arch": self.arch,
            "hidden_dim": self.hidden_dim,
            "dropout": self.dropout,
            "image_size": list(self.image_size),
            "views": list(self.views),
            "window": self.window,
            "normalisation": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
            **meta,
        }
        golden = {"success_prob": golden_prob}
        by_view = golden_frames if golden_frames.dim() == 5 else golden_frames.unsqueeze(1)
        golden |= {f"frames/{view}": by_view[:, i].contiguous() for i, view in enumerate(self.views)}
        if statistics is not None:
            golden |= {"feature_mean": statistics.mean, "feature_std": statistics.std}
            self.meta["frame_statistics"] = {
                "max_distance": statistics.max_distance,
                "brightness": dict(zip(self.views, statistics.brightness, strict=True)),
            }
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        with whole_folder(folder) as temporary:
            save_file(weights, temporary / "model.safetensors")
            save_file(golden, temporary / "golden.safetensors")
            save_json(self.meta, temporary / "reward.json")

    def load_weights(self, path: str | Path) -> None:
        """Load a checkpoint folder's or a bare file's weights. Raises UserError naming what does not fit."""
        path = Path(path)
        weights = _read_state_dict(path / "model.safetensors" if path.is_dir() else path)
        own = self.state_dict()
        missing = sorted(own.keys() - weights.keys())
        unexpected = sorted(weights.keys() - own.keys())
        reshaped = sorted(
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        )
        if missing or unexpected or reshaped:
            parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            raise UserError(
                f"{path} does not fit {self.arch}, hidden_dim {self.hidden_dim}, {len(self.views)} view(s): "
                + "; ".join(f"{what}: {_first_of(names)}" for what, names in parts if names)
                + "; set arch, hidden_dim and views to those it was trained with"
            )
        self.load_state_dict(weights)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, without the prefixes that wrappers leave and without the buffers we make ourselves."""
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    else:
        weights = load_torch(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} is no state dict (tensors by name), so its weights cannot be loaded")
    clean = {}
    for name, value in weights.items():
        for prefix in ("module.", "_orig_mod.", "model."):  # DDP, torch.compile, RLinf's actor
            name = name.removeprefix(prefix)
        if name not in ("mean", "std", "_mean", "_std"):
            clean[name] = value
    return clean


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def load_resnet(section: ResNetRewardConfig, device: torch.device | None = None) -> ResNetRewardModel:
    """The model of `section.model_path`, ready to score, on `device` (default: the section's).

    From a checkpoint folder everything but precision and device is read from its `reward.json`; golden
    frames are scored and compared. Another arch, hidden_dim or image_size in the section is refused; its
    views and dropout give way. A bare state dict is rebuilt by the section alone and has an empty `meta`.
    Raises UserError.
    """
    if section.model_path is None:
        raise UserError("model_path is not set; give the checkpoint that train_resnet.py wrote")
    if isinstance(section.model_path, list):
        raise UserError(f"model_path must name one checkpoint here, got {section.model_path}")
    path, device = Path(section.model_path), device or pick_device(section.device)
    section = replace(section, pretrained=False)
    if not path.is_dir():
        model = ResNetRewardModel(section)
        model.load_weights(path)
        return model.to(device).eval()

    meta = load_json(path / "reward.json")
    if meta.get("model_type") != "resnet":
        raise UserError(f"{path} holds a reward model of type '{meta.get('model_type')}', not resnet")
    model = ResNetRewardModel(replace(section, **_architecture(path, meta, section)))
    model.load_weights(path)
    model.meta = meta
    model.to(device).eval()
    golden = load_file(path / "golden.safetensors")
    _check_golden(model, path, golden)
    if "frame_statistics" in meta:
        known = meta["frame_statistics"]
        statistics = FrameStatistics(
            golden["feature_mean"],
            golden["feature_std"],
            known["max_distance"],
            [known["brightness"][view] for view in model.views],
        )
        model.onlooker = DriftWatch(statistics, f"the reward model {path}", model.views)
    return model


def _architecture(path: Path, meta: dict[str, Any], section: ResNetRewardConfig) -> dict[str, Any]:
    """What `reward.json` says of the network. Raises UserError where `section` says otherwise."""
    try:
        written = {name: meta[name] for name in ("arch", "hidden_dim", "dropout", "image_size", "views")}
    except KeyError as error:
        raise UserError(f"{path}/reward.json lacks {error}; is it a reward model's checkpoint?") from error
    for name in ("arch", "hidden_dim", "image_size"):
        asked = {"arch": section.arch, "hidden_dim": section.hidden_dim, "image_size": section.image_size}[
            name
        ]
        if asked is not None and asked != written[name]:
            raise UserError(
                f"{path} was trained with {name} {written[name]}, but the config says {asked}; "
                f"leave {name} out, or give another checkpoint"
            )
    return written


def _check_golden(model: ResNetRewardModel, path: Path, golden: dict[str, Tensor]) -> None:
    """Score the golden frames as RL would. Where bf16 was our choice and moves them, go back to fp32."""
    if "frames" in golden:  # as they were written at first, in the order of views
        frames = golden["frames"] if golden["frames"].dim() == 5 else golden["frames"].unsqueeze(1)
        by_view = {view: frames[:, index] for index, view in enumerate(model.views)}
    else:
        by_view = {view: golden[f"frames/{view}"] for view in model.views}
    error = (model.score(by_view) - golden["success_prob"]).abs().max().item()
    if error > GOLDEN_TOLERANCE / 2 and model.precision == "auto" and model.uses_bf16:
        model.precision = "fp32"
        model.eval()
        error = (model.score(by_view) - golden["success_prob"]).abs().max().item()
    if not error <= GOLDEN_TOLERANCE:  # also where it is nan
        raise UserError(
            f"{path} scores its golden frames {error:.3f} off what was written beside them (at most "
            f"{GOLDEN_TOLERANCE} allowed): the weights or the preprocessing have changed; train it again"
        )
