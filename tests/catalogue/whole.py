"""Whole models with random weights, as small as they can be: of transformers, of peft, our own."""

import importlib
import sys
import warnings
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, T = 11, 5
"""Words, and positions of a sentence."""

_WIDTHS: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 9,
    "max_position_embeddings": 7,
}
_IMAGES = {"image_size": 6, "patch_size": 3, "num_channels": 2, "num_labels": 3}
_GPT2 = {"n_positions": 7, "n_embd": 6, "n_layer": 2, "n_head": 2, "eos_token_id": 0}
_T5 = {"d_model": 6, "d_kv": 3, "d_ff": 9, "num_layers": 2, "num_heads": 2}
_POSITIONS = {"relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "pad_token_id": 0}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "GPT2": {"vocab_size": V, "bos_token_id": 0, **_GPT2},
    "Bert": _WIDTHS,
    "Llama": {**_WIDTHS, "num_key_value_heads": 1},
    "ViT": {**_WIDTHS, **_IMAGES},
    "T5": {
        "vocab_size": V,
        "relative_attention_num_buckets": 8,
        "decoder_start_token_id": 0,
        **_T5,
    },
}


def package(name: str) -> Any:
    """`transformers` or `peft`, without torchvision: it is not used, and may fit another torch."""
    hidden = "torchvision" not in sys.modules
    if hidden:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        found = importlib.import_module(name)
        assert importlib.import_module("transformers").PreTrainedModel  # looks for it only now
        return found
    finally:
        if hidden:
            del sys.modules["torchvision"]


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation mode, with weights that are all different."""
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.5)
        if name.endswith(("key.bias", "k_proj.bias")):  # no gradient: softmax does not see it
            p.requires_grad_(False)
    for name, x in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(x, 0.5, 2)
    return model.eval()


def transformer(kind: str, task: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A model of transformers."""
    library = package("transformers")
    config = getattr(library, f"{kind}Config")(**{**CONFIGURATIONS[kind], **options})
    config._attn_implementation = attention
    return randomised(getattr(library, f"{kind}{task}")(config))


def checkpointed(model: nn.Module) -> nn.Module:
    """Training, without dropout, with layers whose forward pass is run again in the backward."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or getattr(model, name.replace("activation", "gradient"))
    enable({"use_reentrant": False})
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for option in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return model


def adapted(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """A model as peft changes it: frozen, with something small that is trained."""
    library = package("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what one library calls by a name old to the other
        found = library.get_peft_model(model, getattr(library, f"{kind}Config")(**options))
    for p in found.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)  # peft begins with zeros
    return found.eval()


class Adapter(nn.Module):
    """A frozen layer, and a narrow network that adds to what it returns."""

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.out_features, width)
        self.up = nn.Linear(width, layer.out_features)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self.scale * self.up(F.gelu(self.down(x)))


def with_adapters(model: nn.Module) -> nn.Module:
    """Frozen, with an adapter behind each layer that ends a block."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.endswith(("output.dense", "down_proj")):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Adapter(module, 3))
    return randomised(model)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(2, channels)


class BasicBlock(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = _norm(norm, outputs), _norm(norm, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1:
            point = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(point, _norm(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


def resnet18(norm: str, width: int = 2) -> nn.Module:
    """A ResNet-18 of few channels, for images `[B, 3, 16, 16]`."""
    blocks, inputs = [], width
    for i in range(4):
        outputs = width * (i + 1)
        blocks += [BasicBlock(inputs, outputs, 1 + (i > 0), norm)]
        blocks += [BasicBlock(outputs, outputs, 1, norm)]
        inputs = outputs
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), _norm(norm, width), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3)]
    return randomised(nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head))


class UNet(nn.Module):
    """Down twice and up again, with what was seen on the way down."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        pairs = list(pairwise(sizes))
        self.down = nn.ModuleList(self._convolution(i, o) for i, o in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, 2) for i, o in pairs[:0:-1])
        self.up = nn.ModuleList(self._convolution(2 * i, i) for i, _ in pairs[:0:-1])
        self.head = nn.Conv2d(width, 2, 1)

    def _convolution(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.down:
            x = layer(x if not seen else F.max_pool2d(x, 2))
            seen.append(x)
        for grow, layer, skipped in zip(self.grow, self.up, seen[-2::-1], strict=True):
            x = layer(torch.cat([skipped, grow(x)], 1))
        return self.head(x)
