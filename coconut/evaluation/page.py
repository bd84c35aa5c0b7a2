"""The report's HTML: one file that needs no other, on a phone as on a desk, by day and by night.

The template escapes all it is given: text from data cannot become markup.
"""

from __future__ import annotations

from base64 import b64encode
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)


def render(context: dict[str, Any], name: str = "report") -> str:
    """A page from templates/NAME.html; `context` holds plain values only (see `report.Report.write`)."""
    folder = files("coconut.evaluation") / "templates"
    template = _ENVIRONMENT.from_string((folder / f"{name}.html").read_text(encoding="utf-8"))
    sheets = ["report.css"] if name == "report" else ["report.css", f"{name}.css"]
    css = Markup("".join((folder / sheet).read_text(encoding="utf-8") for sheet in sheets))  # noqa: S704  our own
    return template.render(css=css, **context)


def render_part(name: str, **context: Any) -> str:
    """A piece of a page, from templates/NAME.html."""
    template = files("coconut.evaluation") / "templates" / f"{name}.html"
    return _ENVIRONMENT.from_string(template.read_text(encoding="utf-8")).render(**context)


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Content as an address that holds it, so that a page needs no second file."""
    return f"data:{kind};base64,{b64encode(content).decode()}"
