"""Put questions to a trained model: one, a conversation, or a file of them.

    python launch/generate.py --checkpoint RUN/final --image maze.png --question "start a4 ?"
    python launch/generate.py --checkpoint RUN/final                      asks for questions; :help says how
    python launch/generate.py --checkpoint RUN/final --input questions.jsonl --output answers.jsonl

A file's records need a "question"; "image" (a path, relative to the file) and any other field may stand beside it. The
output repeats each record with "prediction", the whole text, and "predicted_answer", what follows the last ###.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.result import require_folder
from coconut.evaluation.run import find_checkpoint, require_room, require_stage
from coconut.types import CoconutError, ConfigError

if TYPE_CHECKING:
    from coconut.evaluation.ask import Settings
    from coconut.evaluation.loaded import Loaded

LEAST_TEMPERATURE = 1e-4  # below, logits divided by it leave the range of their numbers
HELP = """  any text           is the next question, about the current picture
  :image PATH ...    show this picture from now on (:image alone: none)
  :latents N         think N thoughts before answering (:latents alone: the checkpoint's own number)
  :quit              leave (or end of input)"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder that the trainer wrote: RUN/final, RUN/stage_2, or RUN")
    add("--question", help="answer this one question (default: ask for questions)")
    add("--image", nargs="+", default=[], metavar="PATH", help="picture, or pictures, of the question")
    add("--input", type=Path, metavar="FILE", help="answer every record of a JSON or JSONL file")
    add("--output", type=Path, metavar="FILE", help="JSONL file to write the answers of --input to")
    add("--image-root", type=Path, help="folder of the images of --input (default: the folder of the file)")
    add("--batch-size", type=int, default=16, help="questions of --input at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=100, help="cut a text there (default: %(default)s)")
    add(
        "--latents", type=int, metavar="N", help="thoughts before the answer (default: those of the checkpoint's stage)"
    )
    add("--temperature", type=float, default=0.0, help="of sampling; 0: the likeliest token (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--num-threads", type=int, help="CPU threads (default: torch's choice, or OMP_NUM_THREADS)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check(arguments)
        run(arguments)
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name, least in (
        ("batch_size", 1),
        ("max_new_tokens", 1),
        ("latents", 0),
        ("temperature", 0),
        ("num_threads", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and not value >= least:  # nor is NaN
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give a number of at least {least}")
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output belong together: a file of questions, and one to write the answers to")
    if arguments.input is not None:
        if arguments.question is not None or arguments.image:
            raise ConfigError("--input brings its own questions and images; leave out --question and --image")
        if not arguments.input.is_file():
            raise ConfigError(f"--input {arguments.input} is no file")
        if arguments.output.resolve() == arguments.input.resolve():
            raise ConfigError(f"--output {arguments.output} would overwrite --input; choose another file")
        if arguments.output.is_dir():
            raise ConfigError(f"--output {arguments.output} is a folder; name a file")
        require_folder(arguments.output.parent)
    if 0 < arguments.temperature < LEAST_TEMPERATURE:
        raise ConfigError(f"--temperature {arguments.temperature} is no different from 0: give 0, the likeliest token")
    if not 0 <= arguments.seed < 2**32:
        raise ConfigError(f"--seed is {arguments.seed}; give a number from 0 to {2**32 - 1}")
    for image in arguments.image:
        if not Path(image).is_file():
            raise ConfigError(f"--image {image} is no file")
    checkpoint = find_checkpoint(arguments.checkpoint)
    spec = require_stage(checkpoint)
    if arguments.latents and not spec["markers"]:
        raise ConfigError(
            f"--latents {arguments.latents}: this checkpoint was trained without thoughts (cot or no_cot); leave it out"
        )
    require_room(checkpoint, arguments.latents or 0)


def run(arguments: argparse.Namespace) -> None:
    # These take seconds to import: not for a typing error, nor for --help.
    import torch

    from coconut.evaluation.ask import Settings, answer_file
    from coconut.evaluation.loaded import load
    from coconut.evaluation.run import log_to_console
    from coconut.utils.seed import set_seed

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    log_to_console(False)
    loaded = load(find_checkpoint(arguments.checkpoint))
    set_seed(arguments.seed)
    settings = Settings(arguments.max_new_tokens, arguments.latents, arguments.temperature)
    if arguments.input is not None:
        n_answered, n_failed = answer_file(
            loaded, arguments.input, arguments.output, settings, arguments.batch_size, arguments.image_root
        )
        print(f"{n_answered} answered, {n_failed} could not be asked: {arguments.output}")
    elif arguments.question is not None:
        speak(loaded, arguments.question, arguments.image, settings)
        if loaded.processor and not arguments.image:
            print("note: this model sees images; the question was asked without one (--image)", file=sys.stderr)
    else:
        converse(loaded, arguments.image, settings)


def speak(loaded: Loaded, text: str, images: list[str], settings: Settings) -> None:
    """Answer one question, writing each word as it comes."""
    from transformers import TextStreamer

    from coconut.evaluation.ask import ask, question

    class Streamer(TextStreamer):
        """Shows every token but the end of sequence: a special one in the middle is a fault, and is to be seen."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(text.replace(loaded.tokenizer.eos_token, ""), stream_end)

    streamer = Streamer(loaded.tokenizer, skip_prompt=True)
    ask(loaded, [question(text, images)], settings, streamer)


def converse(loaded: Loaded, images: list[str], settings: Settings, read: Callable[[str], str] = input) -> None:
    """Answer what is typed, until the end of input."""
    from dataclasses import replace

    print("Type a question, or :help.")
    if loaded.processor and not images:
        print("This model sees images: show it one with :image PATH.")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if command == ":quit":
            return
        try:
            if command == ":image":
                images = _pictures(rest)
            elif command == ":latents":
                settings = replace(settings, n_latents=_number(rest))
            elif command.startswith(":"):
                print(HELP)
            elif line:
                speak(loaded, line, images, settings)
        except CoconutError as error:  # a picture that is not there must not end the conversation
            print(f"error: {error}")


def _pictures(text: str) -> list[str]:
    """Paths as a shell reads them, so that one in quotes may hold blanks."""
    try:
        paths = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f":image {text}: {error}") from error
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ConfigError(f":image {missing[0]} is no file; put a path with blanks in quotes")
    return paths


def _number(text: str) -> int | None:
    if text and not text.isdecimal():
        raise ConfigError(f":latents {text}: give a number, 0 or more, or nothing")
    return int(text) if text else None


if __name__ == "__main__":
    sys.exit(main())
