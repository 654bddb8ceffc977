"""`ordinalclip convert`."""

from __future__ import annotations

import argparse

from ordinalclip import convert
from ordinalclip.cli import add_overrides
from ordinalclip.config import load_config
from ordinalclip.quoting import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="checkpoint (.ckpt, .pt, .safetensors); only tensors are read, no code is run")
    parser.add_argument("out", help="folder to write")
    add_overrides(parser)
    parser.add_argument("--form", default="deployed", choices=("deployed", "trainable"), help="of an OrdinalCLIP model")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.epilog = (convert.__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    config = load_config(None, arguments.overrides)
    print(printable(convert.convert(arguments.file, arguments.out, config, arguments.form, arguments.overwrite)))
    return 0
