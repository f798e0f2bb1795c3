"""Tiny models that see, saved as folders with their image processor, and pictures that are drawn here: shapes on grey.

folder = shapes.detector("detr")                   # transformers loads it; random weights, the same at every call
rows = shapes.boxes(24, tmp_path)                  # [{"image": ".../0.png", "objects": {"bbox": [...], ...}}, ...]
"""

import hashlib
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support import small, tiny

SIDE = 64
COLOURS = {"disc": "red", "square": "blue"}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 8,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}
RT_DETR = {
    "encoder_hidden_dim": 64,
    "encoder_in_channels": [32, 32, 32],
    "feat_strides": [8, 16, 32],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "num_queries": 8,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_denoising": 4,
    "hidden_expansion": 0.5,
}
SEVERAL = ["stage2", "stage3", "stage4"]
# (config, its options, config of the backbone, the stages of it that are read)
DETECTORS: dict[str, tuple[str, dict[str, Any], str | None, list[str]]] = {
    "detr": ("DetrConfig", DETR, "ResNetConfig", ["stage3"]),
    "conditional-detr": ("ConditionalDetrConfig", DETR, "ResNetConfig", ["stage3"]),
    "deformable-detr": ("DeformableDetrConfig", {**DETR, "num_feature_levels": 3}, "ResNetConfig", SEVERAL),
    "rt-detr": ("RTDetrConfig", RT_DETR, "RTDetrResNetConfig", SEVERAL),
    "yolos": (
        "YolosConfig",
        {**tiny.LAYERS, "image_size": [SIDE, SIDE], "patch_size": 8, "num_detection_tokens": 8},
        None,
        [],
    ),
}


@cache
def detector(name: str, **options: Any) -> Path:
    """The folder of a model: random weights, nowhere neutral, and its image processor."""
    config_class, fields, backbone, stages = DETECTORS[name]
    if backbone:
        fields = {**fields, "backbone_config": getattr(transformers, backbone)(**RESNET, out_features=stages)}
    config = getattr(transformers, config_class)(**fields | options)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    fixed = name == "rt-detr"
    size = {"height": SIDE, "width": SIDE} if fixed else {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    processor = getattr(transformers, config_class.replace("Config", "ImageProcessorPil"))(size=size)
    return _saved(name, transformers.AutoModelForObjectDetection, config, processor)


def _saved(name: str, auto_class: Any, config: Any, processor: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=small._root()))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = auto_class.from_config(config)
        tiny.perturb(made, seed, 0.1)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def drawn(things: list[tuple[str, list[int]]], size: tuple[int, int] = (SIDE, SIDE)) -> Any:
    """A picture of shapes: (class, [left, top, width, height]) of each."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size, "lightgrey")
    draw = ImageDraw.Draw(picture)
    for kind, (left, top, width, height) in things:
        corners = (left, top, left + width - 1, top + height - 1)
        (draw.ellipse if kind == "disc" else draw.rectangle)(corners, fill=COLOURS[kind])
    return picture


def boxes(count: int, folder: Path, most: int = 2, side: int = SIDE) -> list[dict[str, Any]]:
    """Pictures of one or two shapes in different places, as files, with [left, top, width, height] of each shape."""
    draw = random.Random(3)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        things: list[tuple[str, list[int]]] = []
        for place in range(1 + index % most):
            edge = draw.randint(side // 4, side // 2 - 4)
            left = draw.randint(0, side // 2 - edge) + (side // 2) * ((index + place) % 2)
            things.append((draw.choice(list(COLOURS)), [left, draw.randint(0, side - edge), edge, edge]))
        path = folder / f"{index}.png"
        drawn(things, (side, side)).save(path)
        rows.append(
            {
                "image": str(path),
                "objects": {"bbox": [box for _, box in things], "category": [kind for kind, _ in things]},
            }
        )
    return rows
