"""The Hugging Face pipeline "image-ordinal-regression": pictures in, values with names and probabilities out."""

from __future__ import annotations

from typing import Any
from urllib.request import urlopen

import torch
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ordinalclip.images import load_image
from ordinalclip.model import OrdinalModel
from ordinalclip.processing import OrdinalImageProcessor

TASK = "image-ordinal-regression"


class OrdinalRegressionPipeline(Pipeline):
    """Answers for paths, URLs, PIL images and arrays, alone or in lists (`batch_size=` for batches).

    >>> pipe = pipeline("image-ordinal-regression", model="runs/demo/model")  # doctest: +SKIP
    >>> pipe("gauge.png", top_k=1)  # doctest: +SKIP
    {'value': 42.0, 'rank': 42, 'name': '42', 'unit': '%',
     'top': [{'name': '42', 'value': 42.0, 'probability': 0.21}]}

    Args of a call:
        top_k: how many of the likeliest ranks to list (default 5); heads without probabilities list none.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        spec = getattr(self.image_processor, "spec", None)
        if spec != self.model.config.pixel_spec:
            raise ValueError(f"{TASK}: the image processor gives other pixels ({spec}) than the model wants")

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ValueError(f"{TASK} has no option {', '.join(kwargs)}; it takes top_k")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, image: Any) -> Any:
        name = "image"
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            with urlopen(image) as answer:
                name, image = image, answer.read()
        pixels = self.image_processor(images=load_image(image, name), return_tensors="pt")
        return pixels.to(self.dtype)

    def _forward(self, model_inputs: Any) -> Any:
        return self.model(**model_inputs)

    def postprocess(self, model_outputs: Any, top_k: int = 5) -> dict[str, Any]:
        ranks = self.model.config.label_space
        rank = int(model_outputs.rank[0])
        answer = {"value": float(model_outputs.value[0]), "rank": rank, "name": ranks.name(rank), "unit": ranks.unit}
        top = []
        probabilities = model_outputs.get("probabilities")
        if probabilities is not None:
            likeliest = torch.topk(probabilities[0].float(), min(top_k, len(ranks)))
            for probability, index in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
                top.append({"name": ranks.name(index), "value": ranks.values[index], "probability": probability})
        return {**answer, "top": top}


def load_pipeline(name: str) -> OrdinalRegressionPipeline:
    """The pipeline of a model folder or a name on the hub. Nothing in the folder is run, nor asked whether to.

    `transformers.pipeline(TASK, model=name)` gives the same for our models; of a folder that is something else it asks
    on the terminal whether to run its code, unless `trust_remote_code=False` is given.

    Raises:
        OSError, ValueError: see `OrdinalModel.from_pretrained`.
    """
    model = OrdinalModel.from_pretrained(name)
    return OrdinalRegressionPipeline(
        model=model, image_processor=OrdinalImageProcessor.from_pretrained(name), task=TASK
    )


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=OrdinalRegressionPipeline, pt_model=OrdinalModel)
