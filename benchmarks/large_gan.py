"""Train a small StyleGAN2 on calm gauges, then an encoder to its W+: what LARGE starts from, on one or two CPU cores.

    python benchmarks/large_gan.py --out FOLDER                      # started again, it goes on where it was killed
    python benchmarks/large_gan.py --out FOLDER --pictures 32000     # less, or more than before

FOLDER gets `generator.pt` and `encoder.pt`, in the public layouts that `baselines.large.stylegan2.load_generator` and
`baselines.large.e4e.load_encoder` read, and both as `model.safetensors` in half precision; `samples-*.png` and
`encoded-*.png` to look at (in the latter every second row is what the generator makes of the codes of the row above
it); and `gan-state.pt` and `encoder-state-*.pt`, from which it resumes bit for bit. An encoder belongs to a generator,
so after more pictures a new one is trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from baselines.large.e4e import Encoder
from baselines.large.stylegan2 import Discriminator, Generator
from ordinalclip import gauges
from ordinalclip.backbones import load_backbone
from ordinalclip.files import lock, whole

UNITS, WIDTHS = (1, 1, 1, 1), (16, 32, 48, 64)  # of the encoder
HALF_LIFE = 10_000  # of the running average, in pictures, and at most `RAMP` of those seen so far
RAMP = 0.05
EVALUATION = 10**9  # gauges from this number on are not trained on


@dataclass(frozen=True)
class Settings:
    """What a training is a function of; how long it takes is not among it."""

    kind: str = "tank"
    size: int = 32
    style_dim: int = 64
    n_mlp: int = 4
    channels: int = 48
    batch_size: int = 16
    rate: float = 2e-3
    r1: float = 10.0  # weight of the gradient penalty, halved as in the paper
    r1_every: int = 16  # steps
    mixing: float = 0.5  # share of pictures whose rows come from two codes
    encoder_rate: float = 1e-3
    feature_weight: float = 0.5
    code_weight: float = 0.1
    delta_weight: float = 2e-4
    seed: int = 0


def drawn(settings: Settings, start: int, number: int) -> tuple[Tensor, Tensor]:
    """Gauges `start`, `start` + 1, ...: pictures (number, 3, size, size) in [-1, 1] and their readings (number,)."""
    pictures, values = [], []
    for index in range(start, start + number):
        rng = np.random.default_rng([settings.seed, index])
        values.append(rng.uniform(0, 100))
        picture = gauges.draw(settings.kind, values[-1], rng, settings.size, style="calm")
        pictures.append(np.asarray(picture))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return pixels / 127.5 - 1, torch.tensor(values)


def gradient_penalty(discriminator: nn.Module, pictures: Tensor) -> Tensor:
    """R1 (Mescheder et al., 2018): the mean over pictures of the squared norm of d logit / d picture."""
    pictures = pictures.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(discriminator(pictures).sum(), pictures, create_graph=True)
    return gradients.square().sum(dim=(1, 2, 3)).mean()


def sampled_codes(generator: Generator, batch_size: int, mixing: float) -> Tensor:
    """Codes (B, rows, D) in W+: one w in all rows or, for a share of pictures, another from a random row on."""
    w, other = generator.style(torch.randn(2 * batch_size, generator.style_dim)).chunk(2)
    rows = torch.arange(generator.num_rows)
    switch = torch.randint(1, generator.num_rows, (batch_size, 1))
    mixed = (torch.rand(batch_size, 1) < mixing) & (rows >= switch)
    return torch.where(mixed[:, :, None], other[:, None], w[:, None])


class GAN:
    """Generator, discriminator, the running average of the generator, and the steps that train them.

    A step draws its gauges and random numbers from (seed, step) alone, so the state is all that resuming takes.
    """

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.step = settings, 0
        self.generator = Generator(settings.size, settings.style_dim, settings.n_mlp, channels=settings.channels)
        self.discriminator = Discriminator(settings.size, channels=settings.channels)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        lazy = settings.r1_every / (settings.r1_every + 1)  # the penalty is a step of its own every so often
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), settings.rate, betas=(0.0, 0.99))
        self.d_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), settings.rate * lazy, betas=(0.0, 0.99**lazy)
        )

    def parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        names = ("generator", "discriminator", "average", "g_optimizer", "d_optimizer")
        return {name: getattr(self, name) for name in names}

    def train_step(self) -> dict[str, float]:
        """One step of each network on a batch; the losses."""
        settings = self.settings
        torch.manual_seed(settings.seed * 1_000_003 + self.step)
        real, _ = drawn(settings, self.step * settings.batch_size, settings.batch_size)
        with torch.no_grad():
            fake = self.pictures()
        d_loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
        self.descend(self.d_optimizer, d_loss)
        losses = {"D": d_loss.item()}
        if self.step % settings.r1_every == 0:
            penalty = gradient_penalty(self.discriminator, real)
            self.descend(self.d_optimizer, settings.r1 / 2 * settings.r1_every * penalty)
            losses["R1"] = penalty.item()
        self.discriminator.requires_grad_(False)
        g_loss = F.softplus(-self.discriminator(self.pictures())).mean()
        self.descend(self.g_optimizer, g_loss)
        self.discriminator.requires_grad_(True)
        self.step += 1
        self.follow()
        return {**losses, "G": g_loss.item()}

    def pictures(self) -> Tensor:
        codes = sampled_codes(self.generator, self.settings.batch_size, self.settings.mixing)
        return self.generator(codes, fresh_noise=True)

    @staticmethod
    def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def follow(self) -> None:
        """Let the average follow the generator."""
        half_life = min(HALF_LIFE, RAMP * self.step * self.settings.batch_size)
        keep = 0.5 ** (self.settings.batch_size / half_life)
        for mean, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(new, 1 - keep)

    @torch.no_grad()
    def look(self, file: Path) -> None:
        """Write 64 pictures of the average, always of the same codes, as they are and half-way to the mean."""
        z = torch.randn(48, self.settings.style_dim, generator=torch.Generator().manual_seed(1))
        codes, mean = self.average.style(z), self.average.mean_code()
        codes = torch.cat([codes, mean + 0.5 * (codes[:16] - mean)])
        write_sheet(file, self.average(codes))


class Encoding:
    """An encoder of the architecture of e4e, narrow, that is taught to give back what the generator draws.

    Half of a batch are gauges; the other half are generated, so that their codes are known.
    """

    def __init__(self, settings: Settings, generator: Generator) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.step = settings, 0
        self.generator = generator.requires_grad_(False)
        self.mean = generator.mean_code()
        self.encoder = Encoder(settings.size, settings.style_dim, settings.size, UNITS, WIDTHS)
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), settings.encoder_rate)
        clip = load_backbone("tiny")
        self.clip = clip.encoder.eval().requires_grad_(False)
        self.pixels = clip.pixels

    def parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        return {"encoder": self.encoder, "optimizer": self.optimizer}

    def features(self, pictures: Tensor) -> Tensor:
        """Normalised features of the small CLIP, (B, 128), of pictures in [-1, 1]."""
        side = self.pixels.size
        pictures = F.interpolate((pictures + 1) / 2, size=(side, side), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.pixels.mean, self.pixels.std))
        return F.normalize(self.clip((pictures - mean) / std), dim=-1)

    def train_step(self) -> dict[str, float]:
        """One step on a batch; the losses."""
        settings = self.settings
        torch.manual_seed(settings.seed * 1_000_003 + self.step)
        half = settings.batch_size // 2
        real, _ = drawn(settings, self.step * half, half)
        known = sampled_codes(self.generator, half, settings.mixing)
        pictures = torch.cat([real, self.generator(known)])
        codes = self.encoder(pictures) + self.mean
        again = self.generator(codes)
        terms = {
            "pixels": (again - pictures).square().mean(),
            "features": settings.feature_weight
            * (1 - (self.features(again) * self.features(pictures)).sum(dim=1)).mean(),
            "codes": settings.code_weight * (codes[half:] - known).square().mean(),
            "deltas": settings.delta_weight * (codes[:, 1:] - codes[:, :1]).norm(dim=2).mean(dim=0).sum(),
        }
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.step += 1
        return {name: term.item() for name, term in terms.items()}

    @torch.no_grad()
    def codes(self, pictures: Tensor) -> Tensor:
        """Codes (B, rows, D) in W+, by the encoder in evaluation mode."""
        self.encoder.eval()
        codes = torch.cat([self.encoder(part) for part in pictures.split(64)]) + self.mean
        self.encoder.train()
        return codes

    @torch.no_grad()
    def look(self, file: Path) -> None:
        """Write 32 gauges that were not trained on, each with its reconstruction below it."""
        pictures, _ = drawn(self.settings, EVALUATION, 32)
        pairs = torch.stack(
            [
                pictures.view(4, 8, *pictures.shape[1:]),
                self.generator(self.codes(pictures)).view(4, 8, *pictures.shape[1:]),
            ],
            dim=1,
        )
        write_sheet(file, pairs.flatten(0, 2))

    @torch.no_grad()
    def quality(self) -> dict[str, float]:
        """On gauges that were not trained on: errors of the pixels, and of readings by ridge regression on codes.

        The regression is fitted on 300 gauges and measured on 200; `constant` is the error of their median.
        """
        pictures, values = drawn(self.settings, EVALUATION, 500)
        codes = self.codes(pictures)
        rmse = (self.generator(codes) - pictures).square().mean().sqrt().item() * 127.5
        x, y = codes.flatten(1).double().numpy(), values.double().numpy()
        error = np.abs(Ridge().fit(x[:300], y[:300]).predict(x[300:]) - y[300:]).mean().item()
        constant = np.abs(y[300:] - np.median(y[:300])).mean().item()
        return {"pixel RMSE of 255": rmse, "MAE of the reading": error, "constant": constant}


def write_sheet(file: Path, pictures: Tensor, zoom: int = 3) -> None:
    """Pictures (N, 3, H, W) in [-1, 1], eight a row, enlarged."""
    rows = torch.cat([torch.cat(list(row), dim=2) for row in pictures.split(8)], dim=1)
    image = Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)


def save_state(file: Path, training: GAN | Encoding) -> None:
    """Write all that a training goes on from, whole or not at all."""
    state = {name: part.state_dict() for name, part in training.parts().items()}
    with whole(file) as aside:
        torch.save({"settings": json.dumps(asdict(training.settings)), "step": training.step, **state}, aside)


def load_state(file: Path, training: GAN | Encoding) -> None:
    """Go on from a file of `save_state`.

    Raises:
        ValueError: it was trained with other settings.
    """
    state = torch.load(file, weights_only=True)
    given, wanted = json.loads(state["settings"]), asdict(training.settings)
    if differing := [f"{key} {given.get(key)!r}" for key in wanted if given.get(key) != wanted[key]]:
        raise ValueError(f"{file} was trained with {', '.join(differing)}; take another folder for other settings")
    training.step = state["step"]
    for name, part in training.parts().items():
        part.load_state_dict(state[name])


def run(training: GAN | Encoding, file: Path, steps: int, every: int, look: Callable[[int], None]) -> Iterator[str]:
    """Train up to `steps` in all, save and look every so many, and say how it goes."""
    if file.exists():
        load_state(file, training)
    batch_size, sums = training.settings.batch_size, {}
    began, processor, first = time.perf_counter(), time.process_time(), training.step
    while training.step < steps:
        for name, loss in training.train_step().items():
            sums.setdefault(name, []).append(loss)
        if training.step % every == 0 or training.step == steps:
            seen = (training.step - first) * batch_size
            wall, own = time.perf_counter() - began, time.process_time() - processor
            losses = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in sums.items())
            save_state(file, training)
            look(training.step * batch_size)
            yield (
                f"{training.step * batch_size:7d} pictures: {losses}; {seen / wall:.0f} pictures per second, "
                f"{seen / own:.0f} per second of processor time"
            )
            sums = {}


def write_models(folder: Path, encoding: Encoding) -> None:
    """Generator and encoder in the layouts of the public checkpoints."""
    generator, encoder = encoding.generator.state_dict(), encoding.encoder.state_dict()
    with whole(folder / "generator.pt") as aside:
        torch.save({"g_ema": generator, "latent_avg": encoding.mean}, aside)
    state = {f"decoder.{name}": tensor for name, tensor in generator.items()}
    state |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    options = {"encoder_type": "Encoder4Editing", "start_from_latent_avg": True}
    offset = encoding.mean.repeat(encoding.generator.num_rows, 1)
    with whole(folder / "encoder.pt") as aside:
        torch.save({"state_dict": state, "opts": options, "latent_avg": offset}, aside)
    halves = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    with whole(folder / "model.safetensors") as aside:  # what the package brings: ordinalclip/assets/tiny-gan
        save_file({**halves, "latent_avg": offset}, aside, {"encoder_type": "Encoder4Editing"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, or to go on in")
    parser.add_argument("--pictures", type=int, default=64_000, help="gauges that the discriminator sees")
    parser.add_argument("--encoder-pictures", type=int, default=48_000, help="pictures that the encoder sees")
    parser.add_argument("--every", type=int, default=4_000, help="pictures between checkpoints and sheets")
    parser.add_argument("--threads", type=int, default=1)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    arguments.out.mkdir(parents=True, exist_ok=True)
    every = max(1, arguments.every // settings.batch_size)

    with lock(arguments.out / "run.lock"):
        train(settings, arguments.out, arguments.pictures, arguments.encoder_pictures, every)


def train(settings: Settings, out: Path, pictures: int, encoder_pictures: int, every: int) -> None:
    """Train what is not trained yet, write the models, and print how good they are; `every` is in steps."""
    gan, steps = GAN(settings), pictures // settings.batch_size
    for line in run(gan, out / "gan-state.pt", steps, every, lambda n: gan.look(out / f"samples-{n:07d}.png")):
        print(line, flush=True)
    encoding, steps = Encoding(settings, gan.average), encoder_pictures // settings.batch_size
    file = out / f"encoder-state-{gan.step * settings.batch_size:07d}.pt"
    for line in run(encoding, file, steps, every, lambda n: encoding.look(out / f"encoded-{n:07d}.png")):
        print(line, flush=True)
    write_models(out, encoding)
    print(", ".join(f"{name} {number:.2f}" for name, number in encoding.quality().items()))


if __name__ == "__main__":
    main()
