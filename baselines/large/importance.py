"""How much a layer has to do with a direction: gradients on the way of an edit, over those between random pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from baselines.large.distances import direction
from baselines.large.inputs import numbers
from baselines.large.latents import Layout


def edit_pairs(
    codes: ArrayLike | Tensor,
    normals: ArrayLike | Tensor,
    seed: int,
    intercept: float = 0.0,
    steps: tuple[float, float] = (2.5, 5.0),
) -> tuple[Tensor, Tensor]:
    """Two codes on either side of the hyperplane for every code, which differ along the direction alone.

    w0 is the code's foot on the hyperplane <w, n> + b = 0; source w0 + u n/|n|, destination w0 - u' n/|n|, u and u'
    uniform in `steps` and independent (as in the authors' code, for unit normals).

    Args:
        codes: (N, L, D), e.g. of W (N, 1, D); convert the pairs to W+ or S afterwards.
        normals: (L, D).
        seed: of u and u'.
        intercept: b.
        steps: smallest and largest distance from the hyperplane.

    Returns:
        sources and destinations, (N, L, D) each.

    Raises:
        ValueError: other shapes, numbers that are not finite, normals that are all zero, or steps that are not
            0 <= smallest <= largest.
    """
    codes = numbers(codes, "codes", "N L D")
    normals = direction(normals, codes)
    near, far = steps
    if not 0 <= near <= far < float("inf"):
        raise ValueError(f"steps must be two finite distances, 0 <= smallest <= largest, got {steps}")
    length = normals.norm()
    unit = normals / length
    distance = (torch.einsum("nld,ld->n", codes, normals) + intercept) / length
    foot = codes - distance[:, None, None] * unit
    draw = torch.rand(2, len(codes), 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = (near + (far - near) * draw).to(codes)
    return foot + drawn[0] * unit, foot - drawn[1] * unit


def path_gradients(
    render: Callable[[Tensor], Tensor],
    sources: ArrayLike | Tensor,
    destinations: ArrayLike | Tensor,
    steps: int = 1,
    rate: float = 1e-2,
    batch_size: int = 4,
) -> Tensor:
    """Gradients with respect to the source on its way to the picture of the destination, summed over the steps.

    The loss is the mean absolute difference of the pixels; Adam moves the source. As in the authors' code, whose
    defaults these are.

    Args:
        render: codes (B, L, D) -> pictures (B, ...), differentiable, one by one independent of each other, and the same
            for the same code (fixed noise).
        sources, destinations: (M, L, D): of `edit_pairs`, or of random codes.
        steps: of Adam; random pairs, which are far apart, may want more.
        rate: Adam's learning rate.
        batch_size: pairs at once.

    Returns:
        (M, L, D), the raw sums; for `layer_importance`.

    Raises:
        ValueError: other shapes, numbers that are not finite, pictures that are not one per code, or a number of steps,
            a batch size or a rate that is not above 0.
    """
    sources, destinations = numbers(sources, "sources", "M L D"), numbers(destinations, "destinations", "M L D")
    if sources.shape != destinations.shape:
        raise ValueError(
            f"sources and destinations must be of one shape, got {tuple(sources.shape)} and {tuple(destinations.shape)}"
        )
    for name, value in (("steps", steps), ("rate", rate), ("batch_size", batch_size)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    sums = []
    for start, goal in zip(
        sources.detach().split(batch_size), destinations.detach().to(sources).split(batch_size), strict=True
    ):
        with torch.no_grad():
            wanted = render(goal)
        if len(wanted) != len(goal):
            raise ValueError(f"render must give a picture per code, got {len(wanted)} for {len(goal)} codes")
        code = start.clone().requires_grad_()
        adam = torch.optim.Adam([code], lr=rate)
        total = torch.zeros_like(start)
        for _ in range(steps):
            with torch.enable_grad():
                # The mean over each picture, then the sum: a pair's gradient does not depend on the others.
                loss = (render(code) - wanted).abs().flatten(1).mean(dim=1).sum()
                (code.grad,) = torch.autograd.grad(loss, code)
            total += code.grad
            adam.step()
        sums.append(total)
    return torch.cat(sums)


def layer_importance(
    edit_gradients: ArrayLike | Tensor, random_gradients: ArrayLike | Tensor, layout: Layout | None = None
) -> Tensor:
    """Weight of every layer, sum 1: how much it is used by an edit, more than between any two pictures.

    g_lc = mean over pairs of |edit gradient| / mean over pairs of |random gradient|, lambda_l = mean_c g_lc, divided by
    their sum. As in the authors' code but for two things: there the divisor is the sum over all channels, so that
    weights of W+ sum to 1 / D; and channels whose random gradient is zero, or nothing beside the largest (below its
    rounding), divide by zero there, and are left out of their layer's mean here.

    Args:
        edit_gradients: (M, L, D) of `path_gradients`.
        random_gradients: (M', L, D).
        layout: of codes whose layers differ in width.

    Returns:
        (L,); 0 for a layer that has no channel left.

    Raises:
        ValueError: other shapes, numbers that are not finite, or no gradient above zero in the one or the other.

    >>> layer_importance([[[4.0, 2.0], [1.0, -1.0]]], [[[2.0, 1.0], [-1.0, 0.0]]])
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    edit = numbers(edit_gradients, "edit gradients", "M L D").double()
    given = numbers(random_gradients, "random gradients", "M L D")
    random, rounding = given.double().to(edit), torch.finfo(given.dtype).eps
    shape = tuple(edit.shape[1:]) if layout is None else layout.shape
    for name, gradients in (("edit", edit), ("random", random)):
        if tuple(gradients.shape[1:]) != shape:
            raise ValueError(f"{name} gradients must be (M, {shape[0]}, {shape[1]}), got {tuple(gradients.shape)}")
    used, usual = edit.abs().mean(dim=0), random.abs().mean(dim=0)
    counted = usual > rounding * usual.max()
    if layout is not None:
        counted &= layout.channels().to(counted.device)
    share = torch.where(counted, used / torch.where(counted, usual, 1), 0)
    means = share.sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    if not means.any():
        raise ValueError("no layer can be weighed: the edit gradients or the random gradients are all zero")
    return means / means.sum()
