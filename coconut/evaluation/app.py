"""The demo's page, built with gradio: picture, question and number of thoughts in; answer and thoughts out.

Whatever comes from data or model goes through templates that escape it. The page asks for nothing from other servers:
fonts are the system's, and a policy that is sent with each reply forbids the browser the rest.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from coconut.data import open_dataset
from coconut.data.image import open_image
from coconut.evaluation.app_answer import MAX_PICTURE_MB, MAX_QUESTION_CHARS, Answerer, message_of
from coconut.evaluation.page import data_uri, render_part
from coconut.types import ConfigError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and by every part of it
try:
    import gradio as gr
except ImportError as error:
    raise ConfigError("the app needs gradio, which is not installed here: bash launch/setup.sh app") from error

MAX_EXAMPLES = 4
MAX_WAITING = 20  # questions in the queue; the next one is told to come back
#: Styles and scripts of the page itself, pictures held in it, and nothing of other servers.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' blob: data:; object-src 'none'"
)

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class OwnServerOnly:
    """ASGI middleware that tells browsers to load nothing from other servers."""

    def __init__(self, app: Callable[[Scope, Any, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def read_examples(data: Path, folder: Path) -> list[tuple[Path, str]]:
    """Pictures, written to a folder, and questions of the first samples of a data set that have one picture.

    Args:
        data: JSON or JSONL file, or folder of shards.
        folder: that exists; the pictures are decoded and encoded anew.

    Raises:
        DataError: the data cannot be read, or an image is broken.
        ConfigError: no sample has exactly one picture.
    """
    source = open_dataset(data)
    found: list[tuple[Path, str]] = []
    for index in range(len(source)):
        sample = source.read(index)
        if len(sample.images) == 1:
            path = folder / f"example_{len(found) + 1}.png"
            open_image(sample.images[0]).save(path)
            found.append((path, sample.question))
        if len(found) == MAX_EXAMPLES:
            break
    if not found:
        raise ConfigError(f"--examples {data}: no sample has exactly one picture")
    return found


def build_app(answerer: Answerer, title: str, examples: Sequence[tuple[Path, str]] = ()) -> gr.Blocks:
    """The page.

    Args:
        answerer: of the checkpoint.
        title: what the checkpoint is called.
        examples: pictures with their questions.
    """
    most = answerer.max_latents

    def respond(picture: str | None, text: str, n_latents: float) -> Iterator[tuple[str, str]]:
        try:
            content = Path(picture).read_bytes() if picture else None
            for answered in answerer.stream(content, text or "", int(n_latents)):
                views = [
                    {
                        "label": view.label,
                        "tokens": [{"token": t, "share": f"{s:.0%}", "v": round(s, 3)} for t, s in view.tokens],
                        "image": data_uri(view.picture) if view.picture else None,
                        "share": None if view.share is None else f"{view.share:.0%}",
                    }
                    for view in answered.views
                ]
                shown = render_part("app_thoughts", views=views, note=answered.note) if answered.done else ""
                yield render_part("app_answer", answered=answered), shown
        except Exception as error:  # whatever it is, the next question must find the app alive
            yield render_part("app_answer", error=message_of(error)), ""

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.HTML(render_part("app_head", title=title, n_latents=most, spec=answerer.loaded.spec))
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                picture = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=300,
                    buttons=[],
                    visible=answerer.takes_pictures,
                )
                # Gradio's own decoding knows more formats, and answers a broken file with a trace; `Answerer` decodes.
                picture.preprocess = lambda payload: payload.path if payload else None
                text = gr.Textbox(
                    label="Question",
                    lines=2,
                    max_length=MAX_QUESTION_CHARS,
                    placeholder="What is asked?",
                    elem_id="ask",
                )
                latents = gr.Slider(
                    0,
                    max(most, 1),
                    value=most,
                    step=1,
                    label="Latent thoughts",
                    info="before the answer; the checkpoint was trained with the most that can be chosen",
                    visible=most > 0,
                )
                button = gr.Button("Answer", variant="primary")
            with gr.Column(scale=6, min_width=280):
                answer = gr.HTML(render_part("app_answer"), elem_id="answer")
                thoughts = gr.HTML("", elem_id="thoughts")
        if examples and answerer.takes_pictures:
            gr.Examples(
                [[str(path), asked] for path, asked in examples],
                [picture, text],
                label="Examples",
                cache_examples=False,
                elem_id="examples",
            )
        for event in (button.click, text.submit):
            event(
                respond, [picture, text, latents], [answer, thoughts], concurrency_limit=1, concurrency_id="model",
                show_progress="minimal", trigger_mode="once",
            )  # fmt: skip
    app.queue(max_size=MAX_WAITING, api_open=False)
    return app


def launch_app(app: gr.Blocks, host: str, port: int, share: bool) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigError: the public address that `share` asks for cannot be had.
    """
    system = ["system-ui", "sans-serif"]
    _, _, public = app.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=f"{MAX_PICTURE_MB}mb",
        theme=gr.themes.Default(primary_hue="teal", font=system, font_mono=["ui-monospace", "monospace"]),
        css=(files("coconut.evaluation") / "templates" / "app.css").read_text(encoding="utf-8"),
        app_kwargs={"middleware": [_middleware()]},
        prevent_thread_lock=True,
    )
    try:
        if share and not public:
            raise ConfigError("--share: no public address could be had; is there a network? Leave it out to serve here")
        print(f"ready: {app.local_url}" + (f" and, for anybody, {public}" if public else ""), flush=True)
        app.block_thread()
    finally:
        app.close()


def _middleware() -> Any:
    from starlette.middleware import Middleware

    return Middleware(OwnServerOnly)
