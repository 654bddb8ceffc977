"""Small random models of every family of backbones, written as their libraries write them: folders, a checkpoint."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import torch
import transformers
from open_clip.push_to_hf_hub import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from baselines.large.e4e import Encoder
from baselines.large.stylegan2 import Generator

LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"image_size": 32, "patch_size": 16}
WORDS = ["<pad>", "</s>", "<unk>", ".", "an", "age", "of", "a", "photo", *map(str, range(10))]


def word_tokenizer(**special):
    """A tokenizer of whole words, with an end and a padding token but no start token, as SigLIP's."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def clip_tokenizer():
    """CLIP's byte-pair encoding as transformers has it, out of open_clip's copy of the vocabulary."""
    own = open_clip.SimpleTokenizer()
    vocabulary = {word: number for word, number in own.encoder.items() if number < 49406}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=sorted(own.bpe_ranks, key=own.bpe_ranks.get))


def hf_clip(folder):
    config = transformers.CLIPConfig(
        text_config={**LAYERS, "vocab_size": 49408}, vision_config={**LAYERS, **SQUARE}, projection_dim=16
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    _save(folder, transformers.CLIPModel(config), transformers.CLIPImageProcessor(**size), clip_tokenizer())


def hf_siglip(folder):
    """As SigLIP 1, and as SigLIP 2 at a fixed size: the model type is the same."""
    text = {**LAYERS, "vocab_size": len(WORDS), "max_position_embeddings": 16, "projection_size": 32}
    config = transformers.SiglipConfig(
        text_config={**text, "pad_token_id": 0, "eos_token_id": 1}, vision_config={**LAYERS, **SQUARE}
    )
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    _save(folder, transformers.SiglipModel(config), processor, word_tokenizer())


def hf_dinov2(folder):
    config = transformers.Dinov2Config(
        **{**LAYERS, "image_size": 48, "patch_size": 16, "drop_path_rate": 0.2, "hidden_dropout_prob": 0.1}
    )
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    _save(folder, transformers.Dinov2Model(config), transformers.BitImageProcessor(**size))


def hf_vit(folder):
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    _save(folder, transformers.ViTModel(transformers.ViTConfig(**LAYERS, **SQUARE)), processor)


def hf_convnext(folder):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.1)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32})
    _save(folder, transformers.ConvNextModel(config), processor)


def hf_resnet(folder):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)
    _save(folder, transformers.ResNetModel(config), processor)


def open_clip_vit(folder):
    _save_open_clip(folder, {"quick_gelu": True})


def open_clip_custom(folder):
    _save_open_clip(folder, {"custom_text": True})


def open_clip_siglip(folder):
    """A timm image tower and a text tower without causal mask, with a tokenizer of its own that drops full stops."""
    text = {
        "context_length": 16,
        "vocab_size": len(WORDS),
        "hf_tokenizer_name": "nobody/siglip",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    }
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    config = {"custom_text": True, "init_logit_bias": -10, "embed_dim": 64}
    _save_open_clip(folder, config, vision, text, {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"})


def latent_pair(size=32, **encoder):
    """The content of a checkpoint of e4e: a small random encoder, its generator, and their mean code.

    Args:
        size: of the generator's pictures.
        encoder: options in place of those of the generator's own encoder.
    """
    generator = Generator(size, 12, n_mlp=2, channels=8)
    encoder = Encoder(
        **{"size": size, "style_dim": 12, "input_size": 32, "units": (1, 2, 1, 1), "widths": (4, 6, 8, 10), **encoder}
    )
    for name, buffer in encoder.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"decoder.{name}": tensor for name, tensor in generator.state_dict().items()}
    return {"state_dict": state, "opts": {"encoder_type": "Encoder4Editing"}, "latent_avg": torch.randn(12)}


def e4e_pair(file):
    torch.save(latent_pair(), file)


def _save(folder, model, processor, tokenizer=None):
    _spread(model)
    for part in (model, processor, tokenizer):
        if part is not None:
            part.save_pretrained(folder)


def _save_open_clip(folder, config, vision=None, text=None, pixels=None):
    vision = vision or {"layers": 1, "width": 32, "head_width": 16, **SQUARE}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **(text or {})}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **config}
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder.parent / f"{folder.name}.json")
    model = open_clip.create_model(folder.name, force_preprocess_cfg=pixels)
    _spread(model)
    save_for_hf(model, word_tokenizer(), config, folder, safe_serialization=True)


def _spread(model, scale=1):
    """Weights large enough that a wrong mask or order shows, in layers of some 32 x `scale` numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 / math.sqrt(scale))


FAMILIES = {
    f"{next(name for name in ('open_clip', 'hf', 'e4e') if make.__name__.startswith(name))}:{make.__name__}": make
    for make in (
        hf_clip,
        hf_siglip,
        hf_dinov2,
        hf_vit,
        hf_convnext,
        hf_resnet,
        open_clip_vit,
        open_clip_custom,
        open_clip_siglip,
        e4e_pair,
    )
}
WITH_TEXT = [f"hf:{label}" for label in ("hf_clip", "hf_siglip")]
WITH_TEXT += [name for name in FAMILIES if name.startswith("open_clip")]


def make_family(name: str, folder: Path) -> str:
    """Write a family's model below `folder`; its spec."""
    torch.manual_seed(0)
    family, _, label = name.partition(":")
    FAMILIES[name](folder / label)
    return f"{family}:{folder / label}"


def cubic(x, a):
    """Keys' convolution kernel (1981)."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def interpolated(table, new, smooth):
    """Position embeddings (n, D), or (1, n, D), of another grid: what stands before the grid stays, the grid is
    interpolated bicubically, in loops over places.

    Args:
        new: places on a side.
        smooth: as Pillow does it (a = -0.5, a kernel as wide as a new place, cut off at the border), for open_clip and
            timm; else as OpenCV (a = -0.75, four places, the border repeated), for transformers.
    """
    flat = table.detach().double().reshape(-1, table.shape[-1]).numpy()
    old = math.isqrt(len(flat))
    first = len(flat) - old**2
    weights, wide = np.zeros((new, old)), max(1.0, old / new) if smooth else 1.0
    for i in range(new):
        middle = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(middle - 2 * wide), math.ceil(middle + 2 * wide) + 1):
            weight = cubic((j - middle) / wide, -0.5 if smooth else -0.75)
            if not smooth or 0 <= j < old:
                weights[i, min(max(j, 0), old - 1)] += weight
    weights /= weights.sum(axis=1, keepdims=True)
    grid = np.einsum("ia,jb,abd->ijd", weights, weights, flat[first:].reshape(old, old, -1))
    result = np.concatenate([flat[:first], grid.reshape(new * new, -1)])
    return torch.from_numpy(result).to(table.dtype).reshape(*table.shape[:-2], -1, table.shape[-1])
