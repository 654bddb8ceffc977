"""The Hugging Face pipeline "image-ordinal-regression": pictures in, values with names and probabilities out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from torch.utils.data import get_worker_info
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

from ordinalclip.heads import Prediction
from ordinalclip.images import BrokenImageError, load_image
from ordinalclip.model import OrdinalModel
from ordinalclip.processing import OrdinalImageProcessor

TASK = "image-ordinal-regression"
TIMEOUT = 60.0  # seconds for a URL
MOST_FETCHED = 1 << 28  # bytes of a URL
PIECE = 1 << 16  # bytes


class OrdinalRegressionPipeline(Pipeline):
    """Answers for whatever `load_image` reads and for URLs: alone, in lists, in data sets and from iterators.

    >>> pipe = pipeline("image-ordinal-regression", model="runs/demo/model")  # doctest: +SKIP
    >>> pipe("gauge.png", top_k=1)  # doctest: +SKIP
    {'value': 42.0, 'rank': 42, 'name': '42', 'unit': '%',
     'top': [{'name': '42', 'value': 42.0, 'probability': 0.21}]}

    Args:
        model: an `OrdinalModel`.
        image_processor: default: the model's own.

    Args of a call, or of `pipeline(...)` for all calls:
        top_k: how many of the likeliest ranks to list (default 5); heads without probabilities list none.
        timeout: seconds that a URL may take (default 60).
        interval: level, e.g. 0.9, of the interval that is given as `low` and `high`, of a model that is calibrated (see
            `OrdinalModel.interval`); default: none.
        batch_size, num_workers: pictures that are encoded at once (default 1), and processes that decode (default 0).
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: OrdinalModel, *args: Any, image_processor: Any = None, **kwargs: Any):
        own = image_processor or model.image_processor
        super().__init__(model, *args, image_processor=own, **kwargs)
        spec = getattr(self.image_processor, "spec", None)
        if spec != self.model.config.pixel_spec:
            raise ValueError(f"{TASK}: the image processor gives other pixels ({spec}) than the model wants")

    def _sanitize_parameters(
        self, top_k: int | None = None, timeout: float | None = None, interval: float | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        if kwargs:
            where = "; model_kwargs={...} takes options of the model" if "attn_implementation" in kwargs else ""
            raise ValueError(f"{TASK} has no option {', '.join(kwargs)}; it takes top_k, timeout and interval{where}")
        if top_k is not None and not (isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 0):
            raise ValueError(f"top_k must be a whole number from 0, got {top_k!r}")
        if timeout is not None and not (
            isinstance(timeout, int | float) and not isinstance(timeout, bool) and 0 < timeout < math.inf
        ):
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if interval is not None:
            self.model.check_interval(interval)
        before = {} if timeout is None else {"timeout": timeout}
        after = {"top_k": top_k, "interval": interval}
        return before, {}, {name: value for name, value in after.items() if value is not None}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """The answer for a picture, a list of them for a list or tuple; of other kinds one after the other, as asked.

        Args:
            inputs: a picture; a list or tuple of them; a generator or another iterator; a data set of torch, such as
                `KeyDataset(table, "image")`; one of `datasets` with one column of images, or such a column.
            kwargs: see the class.

        Raises:
            BrokenImageError: a picture that cannot be read or fetched; ValueError: another option, or a data set whose
                pictures are not found.
        """
        pictures = _pictures(inputs)
        if isinstance(pictures, list | KeyDataset) and not len(pictures):  # transformers looks at the first
            return [] if isinstance(pictures, list) else iter(())
        return super().__call__(pictures, **kwargs)

    def preprocess(self, image: Any, timeout: float = TIMEOUT) -> Any:
        name = "image"
        try:
            if isinstance(image, str) and image.startswith(("http://", "https://")):
                name, image = image, fetch(image, timeout)
            pixels = self.image_processor(images=load_image(image, name), return_tensors="pt")
        except BrokenImageError as error:
            if get_worker_info() is None:
                raise
            blank = torch.zeros(1, 3, *[self.image_processor.size] * 2)  # or torch would make another error of it
            return {"pixel_values": blank.to(self.dtype), "failure": error}
        return {**pixels.to(self.dtype), "failure": None}

    def _forward(self, model_inputs: Any) -> Any:
        failures = model_inputs.pop("failure")
        for failure in failures if isinstance(failures, list) else [failures]:
            if failure is not None:
                raise failure
        return self.model(**model_inputs)

    def postprocess(self, model_outputs: Any, top_k: int = 5, interval: float | None = None) -> dict[str, Any]:
        ranks = self.model.config.label_space
        rank = int(model_outputs.rank[0])
        answer = {"value": float(model_outputs.value[0]), "rank": rank, "name": ranks.name(rank), "unit": ranks.unit}
        if interval is not None:
            found = Prediction(model_outputs.value, model_outputs.rank, model_outputs.get("probabilities"))
            low, high = self.model.interval(found, interval)
            answer |= {"low": float(low[0]), "high": float(high[0])}
        top = []
        probabilities = model_outputs.get("probabilities")
        if probabilities is not None:
            likeliest = torch.topk(probabilities[0].float(), min(top_k, len(ranks)))
            for probability, index in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
                top.append({"name": ranks.name(index), "value": ranks.values[index], "probability": probability})
        return {**answer, "top": top}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The model's folder. Transformers' own would put this module's code into it, to be run where it is loaded.

        Args:
            kwargs: see `OrdinalModel.save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """See `OrdinalModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, **kwargs)


def fetch(url: str, timeout: float = TIMEOUT) -> bytes:
    """What a URL holds.

    Args:
        timeout: seconds for all of it.

    Raises:
        BrokenImageError: it is not to be had, takes longer, or is larger than `MOST_FETCHED`.
    """
    end, content = time.monotonic() + timeout, bytearray()
    try:
        with urlopen(url, timeout=timeout) as answer:
            while piece := answer.read1(PIECE):
                content += piece
                if len(content) > MOST_FETCHED:
                    raise BrokenImageError(url, f"not fetched (more than {MOST_FETCHED >> 20} MB)")
                if time.monotonic() > end:
                    raise TimeoutError
            if answer.length:
                raise BrokenImageError(url, f"not fetched (cut off, {answer.length} bytes are missing)")
    except BrokenImageError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
        why = f"no answer in time; timeout={timeout:g} seconds" if late else str(error) or type(error).__name__
        raise BrokenImageError(url, f"not fetched ({why})") from error
    return bytes(content)


def _pictures(inputs: Any) -> Any:
    """What was given, as transformers takes it: a picture, a list, a data set of torch or a generator.

    Raises:
        ValueError: a data set of `datasets` without a column of images, or with several, or its parts at once.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(inputs, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(f"a data set with parts; give one of them: {', '.join(map(str, inputs))}")
    if datasets is not None and isinstance(inputs, datasets.Dataset | datasets.IterableDataset):
        features = inputs.features or {}
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(columns) != 1:
            has = (
                f"its columns are {', '.join(features) or 'not known'}, those of images {', '.join(columns) or 'none'}"
            )
            raise ValueError(
                f"a data set whose pictures are not found: {has}; "
                'say which: KeyDataset(table, "COLUMN"), or of a stream (row["COLUMN"] for row in stream)'
            )
        inputs, column = inputs.cast_column(columns[0], datasets.Image(decode=False)), columns[0]
        if isinstance(inputs, datasets.Dataset):
            return KeyDataset(inputs, column)
        return (row[column] for row in inputs)
    if isinstance(inputs, tuple):
        return list(inputs)
    if isinstance(inputs, Iterator | Sequence) and not isinstance(inputs, str | bytes | bytearray | list):
        return (picture for picture in inputs)
    return inputs


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
