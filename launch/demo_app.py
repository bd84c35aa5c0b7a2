"""A page to try a trained model on: a picture, a question, and how many thoughts it may think before it answers.

    python launch/demo_app.py --checkpoint RUN --examples DATA/val

It shows the answer as it is written, each thought's likeliest words, and where on the picture the model looks. The page
is served on this machine alone (127.0.0.1) unless --host or --share says otherwise. Needs gradio, which
`bash launch/setup.sh app` installs.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.run import find_checkpoint, require_stage
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder that the trainer wrote: RUN/final, RUN/stage_2, or RUN")
    add("--examples", type=Path, metavar="DATA", help="JSON or JSONL file, or folder of shards, to take examples from")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one (default: %(default)s)")
    add("--port", type=int, default=7860, help="(default: %(default)s)")
    add("--share", action="store_true", help="also have gradio's server give the page a public address, for anybody")
    add("--max-new-tokens", type=int, default=100, help="cut a text there (default: %(default)s)")
    add("--num-threads", type=int, help="CPU threads (default: torch's choice, or OMP_NUM_THREADS)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check(arguments)
        # Ended by a service manager as by Ctrl-C: the uploaded pictures go.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with tempfile.TemporaryDirectory(prefix="coconut-app-") as folder:
            run(arguments, Path(folder))
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name in ("max_new_tokens", "num_threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give a number of at least 1")
    if not 1 <= arguments.port <= 65535:
        raise ConfigError(f"--port is {arguments.port}; give a number from 1 to 65535")
    if arguments.examples is not None and not arguments.examples.exists():
        raise ConfigError(f"--examples {arguments.examples} does not exist")
    require_stage(find_checkpoint(arguments.checkpoint))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            arguments.host, arguments.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--host {arguments.host} --port {arguments.port} cannot be listened on: {reason}; choose another"
        ) from None


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Load the checkpoint and serve; uploaded pictures live in `folder`, which goes when the app ends."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    # These take seconds to import: not for a typing error, nor for --help.
    import torch

    from coconut.evaluation.app import build_app, launch_app, read_examples
    from coconut.evaluation.app_answer import Answerer
    from coconut.evaluation.loaded import load
    from coconut.evaluation.run import log_to_console

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    log_to_console(True)
    checkpoint = find_checkpoint(arguments.checkpoint)
    examples = read_examples(arguments.examples, folder) if arguments.examples is not None else []
    loaded = load(checkpoint)
    title = "/".join(checkpoint.resolve().parts[-2:])
    app = build_app(Answerer(loaded, arguments.max_new_tokens), title, examples)
    launch_app(app, arguments.host, arguments.port, arguments.share)


if __name__ == "__main__":
    sys.exit(main())
