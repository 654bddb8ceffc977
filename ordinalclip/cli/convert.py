"""`ordinalclip convert`: original checkpoints, turned into what this package loads.

    ordinalclip convert ViT-B-16.pt clip                              OpenAI's file -> a folder for open_clip:clip
    ordinalclip convert best.ckpt model model.backbone=open_clip:clip ranks.low=16 ranks.high=77 ranks.num=62

The second needs what the checkpoint does not hold: the CLIP it started from (its frozen token embeddings), the ranks,
and, where they are not the defaults, head.interpolation and head.rank_position. The number of base ranks, of context
tokens and of tokens per rank follow from the shapes. An image encoder of another make (torchvision VGG and ResNet) is
named as model.backbone=timm:vgg16 with model.text=open_clip:clip. Files of open_clip's own training look like OpenAI's
but have another activation; they need no conversion: open_clip:NAME/FILE.
"""

from __future__ import annotations

import argparse

from ordinalclip.cli import add_overrides
from ordinalclip.quoting import printable

NEEDS = ("convert",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="checkpoint (.ckpt, .pt, .safetensors); only tensors are read, no code is run")
    parser.add_argument("out", help="folder to write")
    add_overrides(parser)
    parser.add_argument("--form", default="deployed", choices=("deployed", "trainable"), help="of an OrdinalCLIP model")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.epilog = (__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.config import load_config
    from ordinalclip.convert import convert

    config = load_config(None, arguments.overrides)
    print(printable(convert(arguments.file, arguments.out, config, arguments.form, arguments.overwrite)))
    return 0
