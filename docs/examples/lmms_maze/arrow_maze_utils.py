"""Pictures of a record, as lmms-eval asks for them."""

from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path("data/arrow_maze/examples")


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(FOLDER / name).convert("RGB") for name in doc["image"]]
