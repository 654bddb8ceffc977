"""Small random text encoders of every type that is taken, and CLIPs of open_clip that have one, as their libraries
write them."""

import json
from pathlib import Path

import open_clip
import torch
import transformers
from families import WORDS, _spread
from open_clip.push_to_hf_hub import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING

from ordinalclip.backbones.hf_text import model_class

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
STACK = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}  # T5's
NLLB = {"d_model": 32, "scale_embedding": True, "max_position_embeddings": 64}
NLLB |= {f"{half}_layers": 2 for half in ("encoder", "decoder")}
NLLB |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
NLLB |= {f"{half}_ffn_dim": 64 for half in ("encoder", "decoder")}
OFFSET = {"max_position_embeddings": 66}  # positions are counted from the padding's number on
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
KINDS = {  # what differs from SIZES
    "albert": {"embedding_size": 16},
    "bert": {},
    "camembert": OFFSET,
    "data2vec-text": OFFSET,
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "eurobert": {"num_key_value_heads": 2, "mask_token_id": 3},
    "gte": {},
    "m2m_100": NLLB,
    "megatron-bert": {},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "mpnet": OFFSET,
    "mt5": STACK,
    "nomic_bert": {},
    "rembert": {"input_embedding_size": 16},
    "roberta": OFFSET,
    "roberta-prelayernorm": OFFSET,
    "roformer": {},
    "t5": STACK,
    "umt5": STACK,
    "xlm-roberta": OFFSET,
    "xlm-roberta-xl": OFFSET,
}
WHOLE = {"m2m_100": transformers.M2M100ForConditionalGeneration, "mt5": transformers.MT5ForConditionalGeneration}
SINGLE = ("deberta", "eurobert", "modernbert", "mt5", "t5", "umt5")  # norms or rotations are float32 whatever comes in
STARTS = {"m2m_100": "eng_Latn", "mt5": None, "t5": None, "umt5": None}  # before a text; of the others [CLS] or <s>
POOLING = {"bert": "cls", "roberta": "mean", "albert": "max"}  # of the others none is noted
GROWS = ("size", "heads", "dim", "d_model", "d_ff")  # ends of the options that are widths, or numbers of heads


def tokenizer(start="[CLS]", end="[SEP]", padding="<pad>", longest=64):
    """Whole words, with a token at the end and one at the start: BERT's, RoBERTa's, NLLB's language; or none, as T5."""
    words = [start or "<s>", "<pad>", end, "<unk>", *WORDS[3:]]  # padding is 1, as in RoBERTa
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    around, numbers = f"{start or ''} $A {end}".strip(), [(words[0], 0), (end, 2)]
    own.post_processor = processors.TemplateProcessing(around, special_tokens=numbers)
    names = {"pad_token": padding, "unk_token": "<unk>"}
    if start in ("[CLS]", "<s>"):
        names |= {"cls_token": start, "sep_token": end}
    if end == "</s>":
        names |= {"bos_token": "<s>" if start in ("<s>", None) else None, "eos_token": end}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names, model_max_length=longest)


def make(kind, folder, scale=1, longest=64, **options):
    """A small random text encoder, its tokenizer, and the note of its pooling if it has one; the spec.

    Args:
        scale: times 32 is the width.
        longest: most tokens of a text.
        options: of its configuration, in place of those here.
    """
    starts = kind in STARTS or KINDS[kind] is OFFSET
    words = tokenizer(*((STARTS.get(kind, "<s>"), "</s>") if starts else ()), longest=longest)
    torch.manual_seed(0)
    sizes = {**({} if kind in ("distilbert", *STARTS) else SIZES), **KINDS[kind]}
    sizes = {name: value * scale if name.endswith(GROWS) else value for name, value in sizes.items()}
    if "max_position_embeddings" in sizes:
        sizes["max_position_embeddings"] += longest - 64
    numbers = {"vocab_size": len(words), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = CONFIG_MAPPING[kind](**{**numbers, **sizes, **options})
    model = WHOLE[kind](config) if kind in WHOLE else model_class(config).from_config(config)
    _spread(model, scale)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if kind in POOLING:
        types = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
        modes = {f"pooling_mode_{mode}": POOLING[kind] in mode for mode in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling").mkdir()
        (folder / "modules.json").write_text(json.dumps(types))
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return f"hf:{folder}"


def clip_with(folder, text, words=None, vision=None, embed_dim=16, scale=1, longest=64, encoder=None, **options):
    """An open_clip model whose text tower is an encoder of transformers, written as open_clip does.

    Args:
        text: type of the encoder.
        words: its tokenizer; default: that of `make`.
        vision: `vision_cfg`; default: a small ViT of timm.
        encoder: options of the encoder's configuration.
        options: of `text_cfg`.
    """
    own = Path(options.get("hf_model_name", folder.parent / text))
    make(text, own, scale, longest, **(encoder or {}))
    if words is not None:
        words.save_pretrained(own)
    options = {"hf_model_name": str(own), "hf_tokenizer_name": str(own), "hf_proj_type": "mlp", **options}
    options = {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 48, **options}
    path = folder.parent / f"{folder.name}.json"
    tower = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    config = {"embed_dim": embed_dim, "vision_cfg": vision or tower, "text_cfg": options, "custom_text": True}
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    model = open_clip.create_model(folder.name)
    _spread(model.text, scale)
    _spread(model.visual, scale)
    save_for_hf(
        model, words or transformers.AutoTokenizer.from_pretrained(own), config, folder, safe_serialization=True
    )
    return model.eval()


def differences(value, parameter, place, step=1e-4):
    """The slope of `value` along one number of a parameter, by central differences of fourth order."""

    def at(steps):
        with torch.no_grad():
            parameter.view(-1)[place] += steps * step
            result = value().item()
            parameter.view(-1)[place] -= steps * step
        return result

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
