"""The page of `ordinalclip demo`: a picture and its reasons, prompts to type and to drag (gradio, extra `demo`).

`Playground` computes what the page shows, `build` lays it out, `serve` answers for it until it is told to stop.
"""

from __future__ import annotations

import html
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from ordinalclip import explore
from ordinalclip.explain import Explainer
from ordinalclip.heads import head_options
from ordinalclip.images import load_image
from ordinalclip.language import PrototypeHead
from ordinalclip.prompts import Interpolation, RankPosition
from ordinalclip.quoting import printable
from ordinalclip.ranks import Ranks
from ordinalclip.results.figures import inline_svg
from ordinalclip.results.pages import data_uri, thumbnail
from ordinalclip.results.record import RunRecord, read_run

STRIP = 8  # example pictures
MOST_RANKS = 200  # whose prompts are encoded at every keystroke
CONTEXT = "the value of the picture is"  # where a method has no prompts
THUMBNAIL = 192  # pixels of a side
LARGEST = "64mb"  # of a file that is handed in
PORT = 7860  # the first that is tried
PORTS = 100  # as many are
STYLE = """
.gradio-container { --ink: #1b1f24; --muted: #5b6570; --grid: #dfe3e8; --blue: #0072b2; }
.dark .gradio-container, .gradio-container.dark { --ink: #e8eaed; --muted: #9aa4af; --grid: #3c4550; --blue: #4aa8de; }
.drawing svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; overflow: visible; }
.drawing svg text { font-family: system-ui, sans-serif !important; }
.answer { font-size: 1.15rem; margin: .3rem 0; }
.problem { border-left: 4px solid #d55e00; padding: .4rem .8rem; overflow-wrap: anywhere; }
.answer b { font-size: 1.7rem; }
.answer, .about, .strip { overflow-wrap: anywhere; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .7rem; }
.strip figure { margin: 0; }
.strip img { width: 100%; border-radius: 6px; }
.strip figcaption { font-size: .85rem; line-height: 1.3; }
.strip span { color: var(--muted); }
.table { overflow-x: auto; }
.table table { border-collapse: collapse; border: 0 !important; }
.table th, .table td { padding: .3rem .8rem; text-align: right; border: 0; border-bottom: 1px solid var(--grid); }
.table th:first-child, .table td:first-child { text-align: left; padding-left: 0; }
#examples, #examples .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)) !important; }
#reasons, #matrix { min-height: 8rem; }
"""


class Playground:
    """What the page shows, without the page.

    Args:
        run: a finished run folder.

    Raises:
        FileNotFoundError, ValueError: no finished run there, or a damaged one; ImportError: captum is not installed.
    """

    def __init__(self, run: str | Path):
        self.run = str(run)
        self.record: RunRecord = read_run(run)
        self.explainer = Explainer(run)
        self.has_prototypes = isinstance(self.record.model.head, PrototypeHead)

    @property
    def about(self) -> str:
        """Method, error and label space, in a sentence."""
        record, ranks = self.record, self.record.ranks
        error = record.scores.get("mae")
        scored = f", mean absolute error {error:.3g} {ranks.unit}".rstrip() + f" on the {record.part} part"
        space = f"{len(ranks)} ranks from {ranks.say(ranks.values[0])} to {ranks.say(ranks.values[-1])}"
        return f"{record.config.method}: {space}{scored if error is not None else ''}."

    # ---- a picture

    def why(self, picture: str | Path | Image.Image) -> tuple[str, Figure]:
        """The answer to a picture in a sentence of HTML, and the figure of its reasons.

        Raises:
            BrokenImageError: it cannot be read.
        """
        name = "picture"
        if isinstance(picture, str | Path):  # named as its owner does, not by where the server keeps it
            name, picture = Path(picture).name, load_image(Path(picture).read_bytes(), Path(picture).name)
        found = replace(self.explainer(picture), name=name)
        say = found.ranks.say
        sentence = f"<b>{escaped(say(found.value))}</b>"
        if found.interval is not None:
            low, high = (escaped(say(end)) for end in found.interval[:2])
            sentence += f"<br>{found.interval.kind}: {low} to {high}"
        return sentence, found.figure()

    @cached_property
    def examples(self) -> list[tuple[Image.Image, float]]:
        """Pictures of the part that is shown, spread evenly over its sorted labels, with their labels."""
        part = self.record.images
        if part is None:
            return []
        order = np.argsort(part.values, kind="stable")
        rows = order[np.unique(np.linspace(0, len(order) - 1, min(STRIP, len(order))).round().astype(int))]
        return [(part.image(int(row)), float(part.values[row])) for row in rows]

    # ---- prompts

    @property
    def clip(self) -> str:
        """Whose text encoder reads the prompts."""
        model = self.record.config.model
        return (model.text or model.backbone) if self.has_prototypes else "tiny"

    @property
    def first_prompts(self) -> tuple[str, str, int, Interpolation, RankPosition]:
        """What stands in the fields: the run's own options where it has them."""
        ranks, config = self.record.ranks, self.record.config
        defaults = {name: option.default for name, option in head_options(config.method).items()}
        head = {**defaults, **config.head} if self.has_prototypes else {}
        names = [ranks.name(rank) for rank in range(len(ranks))]
        return (
            head.get("prompt") or CONTEXT,
            ("\n" if any("," in name for name in names) else ", ").join(names),
            head.get("num_base_ranks", 0 if self.has_prototypes else min(3, len(ranks))) or 0,
            head.get("interpolation", "linear"),
            head.get("rank_position", "tail"),
        )

    def prompts(
        self, context: str, names: str, num_base_ranks: int, interpolation: Interpolation, rank_position: RankPosition
    ) -> explore.RankPrompts:
        """The prompts of a typed context and typed names.

        Args:
            names: one a line; or between commas, if it is one line.
            num_base_ranks: 0: every rank has an embedding of its own.

        Raises:
            ValueError: no context, names that are not as many as the run's ranks, more base ranks than ranks.
        """
        own = self.record.ranks
        typed = [name.strip() for name in names.split("\n" if "\n" in names.strip() else ",")]
        typed = [name for name in typed if name]
        if len(typed) != len(own):
            raise ValueError(
                f"{len(typed)} names, but the run has {len(own)} ranks; one name a line, or between commas"
            )
        if not 0 <= num_base_ranks <= len(own):
            raise ValueError(f"base ranks must be 0 (every rank has its own) to {len(own)}, got {num_base_ranks}")
        ranks = Ranks(own.values, tuple(typed), own.unit)
        pooling = self.record.config.model.text_pooling if self.has_prototypes else None
        options = (num_base_ranks or None, interpolation, rank_position)
        return explore.interpolated(context, ranks, *options, self.clip, title="typed", text_pooling=pooling)

    def ordinality(self, prompts: explore.RankPrompts) -> pd.DataFrame:
        """A row for what is typed, and one for what the run has learned, if it is a run with prompts."""
        given: list[explore.Given] = [prompts, self.run] if self.has_prototypes else [prompts]
        return explore.ordinality(*given).rename_axis("prompts").reset_index()

    def read(self, prompts: explore.RankPrompts) -> list[tuple[Image.Image, dict[str, str]]]:
        """The example pictures, each with what the prompts read, what the learned ones read and what is true.

        They are seen by the run's image encoder, with nothing trained again; where the method keeps no rank prototypes
        by that of the CLIP, and nothing learned is beside them.
        """
        if not self.examples:
            return []
        images, ranks = [image for image, _ in self.examples], self.record.ranks
        if self.has_prototypes:
            found = explore.read(images, prompts, self.run, by=self.run)
        else:
            found = explore.read(images, prompts, by=self.clip)
        readings = {"typed": [prompts.ranks.say(value) for value in found[prompts.title]]}
        if self.has_prototypes:
            readings["learned"] = [ranks.say(value) for value in found.iloc[:, 1]]
        readings["true"] = [ranks.say(label) for _, label in self.examples]
        rows = zip(*readings.values(), strict=True)
        return [(image, dict(zip(readings, row, strict=True))) for image, row in zip(images, rows, strict=True)]

    @property
    def readers(self) -> str:
        """Through which encoders words and pictures go, in sentences."""
        if self.has_prototypes:
            return (
                f"What is typed goes through the text encoder of {self.clip}, before anything is learned; pictures go "
                "through the run's image encoder, which has learned to meet the learned prompts. Nothing is trained."
            )
        return (
            f"{self.record.config.method} keeps no rank prototypes: words and pictures go through {self.clip}, the "
            "CLIP of drawn dials and tanks that ships, which knows nothing of this run."
        )


def escaped(text: object) -> str:
    """Text for HTML."""
    return html.escape(printable(text))


def drawn(figure: Figure, name: str, title: str) -> str:
    """A figure as HTML that fits its place and follows the page's theme."""
    return f'<div class="drawing">{inline_svg(figure, name, title)}</div>'


def listed(pictures: Sequence[tuple[Image.Image, dict[str, str]]]) -> str:
    """Pictures, each with named lines below it, as HTML."""
    cells = []
    for image, lines in pictures:
        told = "<br>".join(f"<span>{name}:</span> {escaped(line)}" for name, line in lines.items())
        picture = f'<img alt="" src="{data_uri(thumbnail(image, THUMBNAIL))}">'
        cells.append(f"<figure>{picture}<figcaption>{told}</figcaption></figure>")
    return f'<div class="strip">{"".join(cells)}</div>'


def as_integer(number: float | None) -> int:
    """What a slider's box holds.

    Raises:
        ValueError: nothing, or no whole number.
    """
    if number is None or number != number // 1:
        raise ValueError("base ranks must be a whole number")
    return int(number)


def build(run: str | Path) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        ImportError: gradio or captum is not installed; FileNotFoundError, ValueError: no finished run there.
    """
    gr = _gradio()
    play = Playground(run)
    ranks, say, few = play.record.ranks, play.record.ranks.say, len(play.record.ranks) <= MOST_RANKS

    def told(work: Callable[..., Any], outputs: int = 1) -> Callable[..., Any]:
        """What is wrong with the input in the place of the answer, so that nothing stands beside it that is not its."""

        @wraps(work)
        def safely(*given: Any) -> Any:
            try:
                return work(*given)
            except ValueError as error:
                said = f'<p class="problem">{escaped(error)}</p>'
                return said if outputs == 1 else (said, *[None] * (outputs - 1))

        return safely

    def on_picture(path: str | None) -> str:
        return "" if path is None else shown(path)

    def on_example(event: Any) -> tuple[str, None]:
        return shown(play.examples[event.index][0]), None

    on_example.__annotations__["event"] = gr.SelectData  # by which gradio knows that it wants one

    def shown(picture: str | Image.Image) -> str:
        sentence, figure = play.why(picture)
        return f'<p class="answer">{sentence}</p>{drawn(figure, "why", "reasons of the answer")}'

    def on_prompts(context: str, names: str, bases: float | None, *options: Any) -> tuple[str, str, str]:
        prompts = play.prompts(context, names, as_integer(bases), *options)
        matrix = drawn(explore.similarity_matrix(prompts), "similarity", "similarity of the prompts")
        table = play.ordinality(prompts).to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="-")
        return f'<div class="table">{table}</div>', matrix, listed(play.read(prompts))

    name = printable(Path(run).resolve().name)
    # One after the other: matplotlib's style and torch's generator are the process's, and the last input counts.
    alone: dict[str, Any] = {"concurrency_id": "page", "concurrency_limit": 1}
    with gr.Blocks(title=f"ordinalclip: {name}", analytics_enabled=False) as page:
        gr.HTML(f'<h2>{escaped(name)}</h2><p class="about">{escaped(play.about)}</p>', padding=False)
        with gr.Tab("Picture"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.File(label="a picture of yours", type="filepath", elem_id="picture", height=140)
                examples = [(thumbnail(image, THUMBNAIL), say(label)) for image, label in play.examples]
                with gr.Column(visible=bool(examples)):
                    gr.HTML(f"<p>or one of the {play.record.part} part:</p>", padding=False)
                    strip = gr.Gallery(
                        examples,
                        show_label=False,
                        columns=4,
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_id="examples",
                    )
            with gr.Column(scale=3, min_width=300):
                reasons = gr.HTML(elem_id="reasons", padding=False)
            for event in (picture.upload, picture.clear):
                event(told(on_picture), picture, reasons, trigger_mode="always_last", **alone)
            # Not "always_last": with it gradio answers the first click of several once more (6.31).
            strip.select(told(on_example, 2), None, [reasons, picture], trigger_mode="multiple", **alone)
        with gr.Tab("Prompts", visible=few) as tab, gr.Row():
            context, names, bases, interpolation, position = play.first_prompts
            with gr.Column(scale=2, min_width=300):
                typed = [
                    gr.Textbox(context, label="context", elem_id="context"),
                    gr.Textbox(names, label="names of the ranks, lowest first", lines=3, elem_id="names"),
                    gr.Slider(
                        0, len(ranks), bases, step=1, label="base ranks (0: every rank has its own)", elem_id="bases"
                    ),
                    gr.Radio(list(get_args(Interpolation)), value=interpolation, label="interpolation"),
                    gr.Radio(list(get_args(RankPosition)), value=position, label="place of the rank in the prompt"),
                ]
                gr.HTML(f'<p class="about">{escaped(play.readers)}</p>', padding=False)
            with gr.Column(scale=3, min_width=300):
                gr.HTML("<p>Ordinality: how often similarity falls with the distance of ranks</p>", padding=False)
                table = gr.HTML(elem_id="ordinality", padding=False)
                matrix = gr.HTML(elem_id="matrix", padding=False)
                gr.HTML("<p>Example pictures, read by these prompts:</p>", padding=False, visible=bool(examples))
                answers = gr.HTML(elem_id="answers", padding=False)
            changes = [each.change for each in typed]
            gr.on(
                [*changes, tab.select],
                told(on_prompts, 3),
                typed,
                [table, matrix, answers],
                show_progress_on=matrix,
                trigger_mode="always_last",
                **alone,
            )
    return page


def serve(
    run: str | Path, host: str = "127.0.0.1", port: int | None = None, say: Callable[[str], None] = print
) -> None:
    """Serve the page until it is interrupted.

    Args:
        host: the address it answers at; 127.0.0.1 is this machine alone.
        port: None: the first that is free of 100.
        say: told the address.

    Raises:
        OSError: the port, or all of them, are taken; and see `build`.
    """
    gr = _gradio()
    _check_host(host)
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks itself whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"theme": theme, "css": STYLE, "footer_links": [], "max_file_size": LARGEST, "quiet": True}
    with tempfile.TemporaryDirectory(prefix="ordinalclip-demo-") as handed_in:
        os.environ["GRADIO_TEMP_DIR"] = handed_in
        page = build(run)
        for chosen in [port] if port is not None else range(PORT, PORT + PORTS):
            try:  # share: nobody else's machine in between, whatever a variable of gradio's says
                page.launch(server_name=host, server_port=chosen, share=False, prevent_thread_lock=True, **options)
            except OSError:
                continue
            break
        else:
            ports = str(port) if port is not None else f"{PORT} to {PORT + PORTS - 1}"
            raise OSError(f"{host}:{ports} cannot be had: in use, or not allowed; choose another with --port")
        try:
            say(f"http://{host}:{chosen}  (Ctrl-C ends it)")
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _check_host(host: str) -> None:
    """Raises:
    OSError: no address of this machine."""
    if not host or ":" in host:
        raise OSError(f"--host {host!r}: a name or an IPv4 address is needed")
    try:
        socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError as error:
        raise OSError(f"--host {host}: {error.strerror}") from error


def _gradio() -> Any:
    """gradio, which asks its owners for nothing: no version, no statistics."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("ordinalclip demo needs gradio: pip install 'ordinalclip[demo]'") from error
    return gradio
