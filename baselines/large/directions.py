"""Directions in latent space: from codes with scores, from two sentences, or from the generator's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import normalize

from baselines.large.inputs import check_pairs, numbers
from baselines.large.latents import Layout

Classifier = Literal["svm", "logistic"]
Images = Tensor  # whatever `render` gives and `features` takes, with codes in its first dimension


class Separation(NamedTuple):
    """A direction that separates two ends: `normal` (L, D) of length 1, and the share `accuracy` of codes held out
    that it puts on their side; None where there were too few to hold out any."""

    normal: Tensor
    accuracy: float | None


def direction_from_extremes(
    codes: ArrayLike | Tensor,
    scores: ArrayLike | Tensor,
    share: float = 0.02,
    classifier: Classifier = "svm",
    seed: int = 0,
) -> Separation:
    """Normal of the hyperplane between the codes with the highest and the lowest scores, towards the highest.

    Shen et al. (InterFaceGAN, CVPR 2020), as in their code: `share` of all codes from either end, at most half; 70 % of
    them, at random, for a linear support vector machine (C = 1), the rest to see how well it separates. Its intercept
    is left out.

    Args:
        codes: (N, L, D), N >= 2.
        scores: (N,), labels or the answers of a classifier.
        share: of the codes, for each end; one code at least.
        classifier: svm, or logistic for logistic regression (C = 1) instead.
        seed: of the choice of those held out.

    Raises:
        ValueError: other shapes, numbers that are not finite, a share outside of 0 to 1/2, an unknown classifier,
            scores that do not tell the two ends apart, or codes at the two ends that are the same.
    """
    points, values = numbers(codes, "codes", "N L D"), numbers(scores, "scores", "N")
    check_pairs(points, values, "codes and scores")
    if classifier not in get_args(Classifier):
        raise ValueError(f"classifier {classifier!r} is unknown; choices: {', '.join(get_args(Classifier))}")
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be above 0, at most 0.5, got {share}")
    if len(points) < 2:
        raise ValueError(f"a direction needs codes at two ends, got {len(points)} code")
    order = values.detach().cpu().numpy().argsort(kind="stable")
    count = max(1, int(len(order) * share))
    low, high = order[:count], order[-count:]
    highest, lowest = float(values[low].max()), float(values[high].min())
    if lowest <= highest:
        raise ValueError(
            f"the scores do not tell two ends apart: the {count} lowest of {len(order)} go up to {highest:g}, the "
            f"{count} highest down to {lowest:g}; all are on one side, or the share is too large"
        )
    rng = np.random.default_rng(seed)
    train = max(1, int(0.7 * count))
    low, high = rng.permutation(low), rng.permutation(high)

    def flat(rows: np.ndarray) -> np.ndarray:  # of the extremes alone: all codes in double precision would take room
        return points[torch.from_numpy(rows)].detach().cpu().double().flatten(1).numpy()

    model = _classifier(classifier)
    model.fit(flat(np.concatenate([low[:train], high[:train]])), np.repeat([0, 1], train))
    held_out = np.concatenate([low[train:], high[train:]])
    accuracy = float(model.score(flat(held_out), np.repeat([0, 1], count - train))) if len(held_out) else None
    normal = torch.tensor(model.coef_.reshape(points.shape[1:])).to(points)
    if not normal.any():
        raise ValueError("the codes at the two ends are the same: no direction leads from the one to the other")
    return Separation(normal / normal.norm(), accuracy)


def text_direction(
    source: str,
    target: str,
    encode: Callable[[list[str]], Tensor],
    templates: Sequence[str] = ("a photo of {name}.",),
) -> Tensor:
    """From one text to another in the space of a CLIP: the unit difference of their ends.

    Either end is the mean of the unit features of the templates with the text in them, made a unit vector again.
    StyleCLIP's global directions (Patashnik et al., ICCV 2021), as in LARGE's code, which takes 79 ImageNet templates.

    Args:
        source, target: what stands in the templates, e.g. "a young person" and "an old person".
        encode: texts -> (T, E) features, e.g. an `ordinalclip.TextTower`.
        templates: sentences with {name}.

    Returns:
        (E,), of length 1.

    Raises:
        ValueError: no templates, one without {name}, or ends whose features are the same.
    """
    if not templates:
        raise ValueError("templates must be one or more sentences with {name}, got none")
    for template in templates:
        if "{name}" not in template:
            raise ValueError(f"template {template!r} lacks the place {{name}} for the text")
    ends = []
    for text in (source, target):
        features = numbers(encode([template.replace("{name}", text) for template in templates]), "text features", "T E")
        ends.append(normalize(normalize(features.detach(), dim=1).mean(dim=0), dim=0))
    difference = ends[1] - ends[0]
    if difference.norm() < 1e-6:
        raise ValueError(f"{source!r} and {target!r} have the same features: no direction leads from one to the other")
    return normalize(difference, dim=0)


@torch.no_grad()
def channel_relevance(
    codes: ArrayLike | Tensor,
    render: Callable[[Tensor], Images],
    features: Callable[[Images], Tensor],
    step: float,
    layout: Layout | None = None,
    batch_size: int = 16,
) -> Tensor:
    """What every channel of a code does to the features of the picture: the mean over codes of
    features(render(w + step e_lc)) - features(render(w - step e_lc)).

    Needs no text: one table serves all. As in LARGE's code, which takes 100 codes and a CLIP; that renders
    2 N pictures for each of the channels.

    Args:
        codes: (N, L, D).
        render: codes (B, L, D) -> pictures, one by one independent of each other.
        features: pictures -> (B, E).
        step: how far a channel is moved, in the codes' unit.
        layout: of codes whose layers differ in width, so that only what are channels is moved.
        batch_size: codes that are rendered at once.

    Returns:
        (L, D, E).

    Raises:
        ValueError: other shapes, codes of another layout, features that are not finite, or a step that is not above 0.
    """
    codes = numbers(codes, "codes", "N L D") if layout is None else layout.check(codes)
    if not 0 < step < float("inf"):
        raise ValueError(f"step must be a finite number above 0, got {step}")
    table: Tensor | None = None
    for layer, channel in _channels(codes, layout).nonzero().tolist():
        moved = torch.cat([codes, codes])
        moved[: len(codes), layer, channel] += step
        moved[len(codes) :, layer, channel] -= step
        seen = torch.cat([numbers(features(render(part)), "features", "N E") for part in moved.split(batch_size)])
        if len(seen) != len(moved):
            raise ValueError(f"render and features must give a row per code, got {len(seen)} for {len(moved)} codes")
        if table is None:
            table = seen.new_zeros(*codes.shape[1:], seen.shape[1])
        table[layer, channel] = seen[: len(codes)].mean(dim=0) - seen[len(codes) :].mean(dim=0)
    assert table is not None  # a code has channels
    return table


def text_gradient(
    codes: ArrayLike | Tensor,
    render: Callable[[Tensor], Images],
    features: Callable[[Images], Tensor],
    text: ArrayLike | Tensor,
    batch_size: int = 16,
) -> Tensor:
    """How far every channel moves the features of the picture along a text: the mean over codes of
    d <features(render(w)), t> / d w.

    Ours. It is `channel_relevance` times t for steps without end, at the cost of one picture and its gradient a code,
    where that takes two pictures a channel.

    Args:
        codes: (N, L, D).
        render: codes (B, L, D) -> pictures, differentiable, one by one independent of each other.
        features: pictures -> (B, E), differentiable.
        text: (E,) of `text_direction`.
        batch_size: codes that are rendered at once.

    Returns:
        (L, D), for `strongest_channels`.

    Raises:
        ValueError: other shapes, or numbers that are not finite.
    """
    codes, text = numbers(codes, "codes", "N L D").detach(), numbers(text, "text", "E")
    total = torch.zeros_like(codes[0])
    for part in codes.split(batch_size):
        part = part.clone().requires_grad_()
        with torch.enable_grad():
            seen = features(render(part))
            if seen.shape != (len(part), len(text)):
                raise ValueError(f"features must be ({len(part)}, {len(text)}), as the text, got {tuple(seen.shape)}")
            (gradient,) = torch.autograd.grad((seen @ text.to(seen)).sum(), part)
        total += gradient.sum(dim=0)
    return numbers(total / len(codes), "gradients", "L D")


def direction_from_relevance(
    relevance: ArrayLike | Tensor, text: ArrayLike | Tensor, quantile: float = 0.8, layout: Layout | None = None
) -> Tensor:
    """Normals of a text direction: how far every channel moves the features along it, the weak ones left out.

    beta_lc = <relevance_lc, t>, then `strongest_channels`. As in LARGE's code, the result has no unit length.

    Args:
        relevance: (L, D, E) of `channel_relevance`.
        text: (E,) of `text_direction`.
        quantile: of the relevances that are left out; 0: none.
        layout: of codes whose layers differ in width.

    Returns:
        (L, D).

    Raises:
        ValueError: other shapes, numbers that are not finite, a quantile outside of 0 to 1, or no channel that moves
            anything along the text.

    >>> direction_from_relevance([[[1.0, 0.0], [0.0, 5.0], [-3.0, 1.0]]], [1.0, 0.0], quantile=0.8)
    tensor([[ 0.,  0., -3.]], dtype=torch.float64)
    """
    relevance, text = numbers(relevance, "relevance", "L D E"), numbers(text, "text", "E")
    if relevance.shape[2:] != text.shape:
        raise ValueError(f"relevance has {relevance.shape[2]} features and text {len(text)}: they must be of one CLIP")
    return strongest_channels(relevance @ text.to(relevance), quantile, layout)


def strongest_channels(beta: ArrayLike | Tensor, quantile: float = 0.8, layout: Layout | None = None) -> Tensor:
    """What every channel does, with 0 for those whose size is below the quantile of all (LARGE's code: 0.8).

    Args:
        beta: (L, D).
        quantile: of the sizes that are left out; 0: none.
        layout: of codes whose layers differ in width.

    Returns:
        (L, D).

    Raises:
        ValueError: another shape, numbers that are not finite, a quantile outside of 0 to 1, or no channel that does
            anything.
    """
    beta = numbers(beta, "channels", "L D")
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be 0 or above and below 1, got {quantile}")
    if layout is not None and tuple(beta.shape) != layout.shape:
        raise ValueError(f"channels must be of {layout}, shape {layout.shape}, got {tuple(beta.shape)}")
    if not beta.any():
        raise ValueError("the direction has length 0: no channel moves the features along the text")
    channels = _channels(beta[None], layout)
    # NumPy's, since torch.quantile refuses more than 16 million numbers.
    least = float(np.quantile(beta[channels].abs().detach().cpu().numpy(), quantile))
    return torch.where(channels & (beta.abs() >= least), beta, torch.zeros_like(beta))


def modulation_weights(state: Mapping[str, Tensor], layers: Sequence[int] | None = None) -> list[Tensor]:
    """The affine maps from styles to channels in a StyleGAN2, by their names in the public PyTorch ports.

    Those of `conv1`, `to_rgb1` and every `convs`; those of `to_rgbs` are left out, as in rosinality's
    closed_form_factorization.py.

    Args:
        state: the generator's state dict.
        layers: numbers of those that are wanted, in the order of the state dict; default: all.

    Returns:
        (C_i, D) each.

    Raises:
        ValueError: none there, or a layer that there is not.
    """
    found = [
        tensor
        for name, tensor in state.items()
        if name.endswith(".conv.modulation.weight") and not name.startswith("to_rgbs.")
    ]
    if not found:
        raise ValueError("no weight of the state is called *.conv.modulation.weight: it is of no StyleGAN2 generator")
    if layers is None:
        return found
    if unknown := [layer for layer in layers if not 0 <= layer < len(found)]:
        raise ValueError(f"layers must be between 0 and {len(found) - 1}, got {unknown}")
    return [found[layer] for layer in layers]


def sefa_directions(weights: Sequence[ArrayLike | Tensor], count: int = 5, normalise_channels: bool = True) -> Tensor:
    """Directions of the styles that change the channels most, without any label (Shen and Zhou, SeFa, CVPR 2021).

    Eigenvectors of A^T A with the largest eigenvalues, A the affine maps one below the other. In both public
    variants: with every channel's row of A scaled to length 1 (genforce), or as it is (rosinality).

    Args:
        weights: (C_i, D) each, e.g. of `modulation_weights`.
        count: number of directions, at most D.
        normalise_channels: scale rows to length 1; rows of zeros stay.

    Returns:
        (count, D), of length 1 and at right angles, in float64. Which way they point is arbitrary: their largest entry
        is made positive.

    Raises:
        ValueError: no weights, other shapes, numbers that are not finite, or more directions than there are.

    >>> sefa_directions([[[0.0, 3.0], [0.0, 2.0], [1.0, 0.0]]], count=1)
    tensor([[0., 1.]], dtype=torch.float64)
    """
    maps = [numbers(weight, f"weight {number}", "C D").detach().cpu().double() for number, weight in enumerate(weights)]
    if not maps or len({weight.shape[1] for weight in maps}) > 1:
        raise ValueError(f"weights must be matrices of the same D, got shapes {[tuple(each.shape) for each in maps]}")
    affine = torch.cat(maps)
    if not 1 <= count <= affine.shape[1]:
        raise ValueError(f"count must be between 1 and the width of a style, {affine.shape[1]}, got {count}")
    if normalise_channels:
        affine = normalize(affine, dim=1, eps=torch.finfo(affine.dtype).tiny)
    vectors = torch.linalg.eigh(affine.T @ affine).eigenvectors.T.flip(0)[:count]
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign()


def _classifier(name: Classifier):
    from sklearn.linear_model import LogisticRegression  # scikit-learn takes a second
    from sklearn.svm import SVC

    return SVC(kernel="linear") if name == "svm" else LogisticRegression(max_iter=10_000)


def _channels(codes: Tensor, layout: Layout | None) -> Tensor:
    """(L, D) bool: which entries of codes (N, L, D) are channels."""
    shape = codes.shape[1:]
    return (
        torch.ones(shape, dtype=torch.bool, device=codes.device)
        if layout is None
        else layout.channels().to(codes.device)
    )
