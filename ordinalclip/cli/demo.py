"""`ordinalclip demo`: a page in the browser for a finished run.

    ordinalclip demo runs/mine

One tab takes a picture and shows the answer with its reasons, as `ordinalclip explain` draws them. The other has the
context, the names of the ranks and their interpolation to type and to drag; similarity, ordinality and what example
pictures are read as follow. Nothing is trained or written, and nothing is asked from the network.
"""

from __future__ import annotations

import argparse

from ordinalclip.cli import add_imports, import_given, whole_number

NEEDS = ("playground",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of a finished run")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to answer at (default 127.0.0.1: this machine alone; 0.0.0.0: whoever reaches it)",
    )
    parser.add_argument("--port", type=whole_number(1, 65535), help="default: the first free one from 7860 on")
    add_imports(parser)
    parser.epilog = (__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.playground import serve

    import_given(arguments)
    serve(arguments.run, arguments.host, arguments.port, lambda address: print(address, flush=True))
    return 0
