"""ResNets with a one-number head: building them, and running them fast where nothing is trained.

The names of layers and parameters are torchvision's throughout.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.resnet import BasicBlock

from common.runtime import UserError

Arch = Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class SmallResNet(nn.Module):
    """Three basic blocks of 48, 96 and 128 channels, no max-pool: sees small things in 64 px frames, cheap on
    a CPU.

    Names as in torchvision's ResNet. Input (B, 3, H, W), output (B, 1000 or what `fc` is replaced by).
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(48)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(48, 48))
        self.layer2 = nn.Sequential(BasicBlock(48, 96, 2, _shrink(48, 96)))
        self.layer3 = nn.Sequential(BasicBlock(96, 128, 2, _shrink(96, 128)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision does
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _shrink(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def build_backbone(
    arch: str,
    pretrained: bool = False,
    hidden_dim: int | None = None,
    dropout: float = 0.1,
    num_views: int = 1,
) -> nn.Module:
    """(B, 3 * num_views, h, w) -> logits (B, 1).

    The head is one Linear, or with `hidden_dim` Linear, ReLU, Dropout, Linear.
    `pretrained`: torchvision's ImageNet weights below the head; raises UserError if they cannot be had.
    """
    if arch == "resnet10":
        if pretrained:
            raise UserError(
                "there are no pretrained weights for resnet10; set pretrained: false, or use resnet18"
            )
        backbone = SmallResNet()
    else:
        backbone = models.get_model(arch, weights=_imagenet_weights(arch) if pretrained else None)
    if num_views > 1:
        widened = nn.Conv2d(
            3 * num_views,
            backbone.conv1.out_channels,
            backbone.conv1.kernel_size,
            backbone.conv1.stride,
            backbone.conv1.padding,
            bias=False,
        )
        nn.init.kaiming_normal_(widened.weight, mode="fan_out", nonlinearity="relu")
        if (
            pretrained
        ):  # each view starts as an ImageNet picture; fresh weights must differ, or views would not
            widened.weight.data = backbone.conv1.weight.data.repeat(1, num_views, 1, 1) / num_views
        backbone.conv1 = widened
    features = backbone.fc.in_features
    if hidden_dim is None:
        backbone.fc = nn.Linear(features, 1)
    else:
        backbone.fc = nn.Sequential(
            nn.Linear(features, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, 1)
        )
    for module in backbone.fc.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return backbone


def _imagenet_weights(arch: str) -> Any:
    """torchvision's weights, downloaded into its cache. Raises UserError with the remedy if that fails."""
    weights = models.get_model_weights(arch).IMAGENET1K_V1
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no space; a wrong hash
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"the pretrained weights of {arch} cannot be had ({error}); set pretrained: false, "
            f"or put {weights.url} into {cache}"
        ) from error
    return weights


def is_fast_at_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bf16. Most CPUs only emulate it, and then fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_info = Path("/proc/cpuinfo")  # torch tells AVX512 but not, in all versions we run with, its bf16 part
    flags = cpu_info.read_text().split() if cpu_info.exists() else []
    return device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


def fast_forward(backbone: nn.Module, bf16: bool) -> Callable[[Tensor], Tensor]:
    """A frozen copy of `backbone` without its head, for inference: (B, C, h, w) -> features (B, F), float32.

    Batch norms are folded into the convolutions. On a CPU, activations stay in oneDNN's own blocked
    layout from the first convolution to the last, which is as fast as channels-last at batch 1 and
    a quarter faster at 64. torch.compile with frozen weights gains another 5 to 10 %, but needs a C++
    compiler and seconds for each batch size. In bf16 the first convolution (and the head) stay in
    float32: pixels rounded to bf16 move all logits one way, five times as far as the rest does.
    """
    fused = _fuse_conv_bn(copy.deepcopy(backbone).eval().requires_grad_(False))
    dtype = torch.bfloat16 if bf16 else torch.float32
    blocks = [child for name, child in fused.named_children() if name.startswith("layer")]
    if next(fused.parameters()).is_cpu and _has_blocked_convs(bf16):
        fused.conv1 = _BlockedConv(fused.conv1, torch.float32)
        for block in blocks:
            _block_convs(block, dtype)
    else:
        fused.to(memory_format=torch.channels_last)
        for block in blocks:
            block.to(dtype)
    fused.layer1 = nn.Sequential(_Cast(dtype), fused.layer1)
    fused.fc = _Cast(torch.float32)
    return fused.__call__  # not a module: whoever keeps it must not find it among its own weights


def _has_blocked_convs(bf16: bool) -> bool:
    """oneDNN refuses blocked bf16 on CPUs without AVX512; plain bf16 convolutions are emulated there."""
    return torch.backends.mkldnn.is_available() and (not bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Cast(nn.Module):
    """To another precision; a oneDNN tensor stays one between the blocks, and the head wants a plain one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_mkldnn:
            return x.to(self.dtype)
        plain = x.to_dense()
        return plain.to(self.dtype) if plain.dim() == 2 else plain.to_mkldnn(self.dtype)


class _BlockedConv(nn.Module):
    """A convolution in oneDNN's layout, whose tensors cannot be `nn.Conv2d`'s parameters."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = conv.weight.data.to_mkldnn(dtype), conv.bias.data.to_mkldnn(dtype)
        self.geometry = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x if x.is_mkldnn else x.to_mkldnn(), self.weight, self.bias, *self.geometry)


def _block_convs(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, _BlockedConv(child, dtype))
        else:
            _block_convs(child, dtype)


def _fuse_conv_bn(module: nn.Module) -> nn.Module:
    """Fold each BatchNorm2d into the Conv2d registered just before it (in a ResNet: the one it follows)."""
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and previous and isinstance(previous[1], nn.Conv2d):
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
            setattr(module, name, nn.Identity())
        else:
            _fuse_conv_bn(child)
        previous = name, child
    return module
