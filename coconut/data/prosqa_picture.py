"""A ProsQA graph drawn as a picture: boxes in rows by depth, an arrow from each node to its kinds.

Long edges are led through free places of the rows between, and rows are ordered so that arrows cross little
(the usual layered drawing). Everything is decided by the graph alone: the same record gives the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

WIDTH, ROW_PX, BOX_PX, MARGIN = 1120, 92, 30, 24  # pixels
_SCALE = 2  # drawn larger and scaled down, for smooth lines
_SWEEPS = 12
_INK = ["#1b6ca8", "#b0413e", "#2e7d4f", "#8e5aa8", "#b07318", "#2a8c8c", "#6b4b3a", "#c2477f"]


def draw_graph(record: dict[str, Any]) -> bytes:
    """PNG of the graph of a record in ProsQA's public layout (idx_to_symbol, edges)."""
    edges = [(int(start), int(end)) for start, end in record["edges"]]
    names: list[str] = record["idx_to_symbol"]
    used = sorted({node for edge in edges for node in edge})
    rows, chains = _rows(used, edges)
    places = _places(rows, chains)
    image = Image.new("RGB", (WIDTH * _SCALE, (len(rows) * ROW_PX + MARGIN) * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    for chain in chains:
        _arrow(draw, [places[node] for node in chain], _INK[chain[0] % len(_INK)])
    parents = {end for _, end in edges}
    for node in used:
        _box(draw, places[node], names[node], entity=node not in parents)
    file = io.BytesIO()
    image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


def _rows(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of nodes by longest distance from a root, and each edge as a chain of one node a row.

    Bends of long edges are nodes of their own, numbered from the last real one on.
    """
    depth = dict.fromkeys(nodes, 0)
    for start, end in sorted(edges, key=lambda edge: edge[1]):  # parents have smaller numbers
        depth[end] = max(depth[end], depth[start] + 1)
    for node in nodes:  # an entity stands just above its first kind, not at the top of everything
        below = [depth[end] for start, end in edges if start == node]
        if below and all(end != node for _, end in edges):
            depth[node] = min(below) - 1
    rows: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in nodes:
        rows[depth[node]].append(node)
    bend = max(nodes) + 1
    chains = []
    for start, end in edges:
        chain = [start]
        for row in range(depth[start] + 1, depth[end]):
            rows[row].append(bend)
            chain.append(bend)
            bend += 1
        chains.append([*chain, end])
    return rows, chains


def _places(rows: list[list[int]], chains: list[list[int]]) -> dict[int, Point]:
    """Centre of every node and bend, in final pixels."""
    neighbours: dict[int, list[int]] = {}
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            neighbours.setdefault(upper, []).append(lower)
            neighbours.setdefault(lower, []).append(upper)
    across = {node: (place + 1) / (len(row) + 1) for row in rows for place, node in enumerate(row)}
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            near = {node: sum(across[other] for other in neighbours[node]) / len(neighbours[node]) for node in row}
            row.sort(key=lambda node: (near[node], node))
            across |= {node: (place + 1) / (len(row) + 1) for place, node in enumerate(row)}
    return {node: (across[node] * WIDTH, (r + 0.5) * ROW_PX + MARGIN / 2) for r, row in enumerate(rows) for node in row}


def _arrow(draw: ImageDraw.ImageDraw, points: list[Point], colour: str) -> None:
    (x, y), (x_end, y_end) = points[0], points[-1]
    path = [(x, y + BOX_PX / 2), *points[1:-1], (x_end, y_end - BOX_PX / 2)]
    scaled = [(px * _SCALE, py * _SCALE) for px, py in path]
    (ax, ay), tip = scaled[-2:]
    angle, head = math.atan2(tip[1] - ay, tip[0] - ax), 9 * _SCALE
    base = (tip[0] - head * math.cos(angle), tip[1] - head * math.sin(angle))
    across = (4 * _SCALE * math.sin(angle), -4 * _SCALE * math.cos(angle))
    draw.line([*scaled[:-1], base], fill=colour, width=round(1.6 * _SCALE), joint="curve")
    draw.polygon(
        [tip, (base[0] + across[0], base[1] + across[1]), (base[0] - across[0], base[1] - across[1])], fill=colour
    )


def _box(draw: ImageDraw.ImageDraw, place: Point, name: str, *, entity: bool) -> None:
    font = _font()
    half = (font.getlength(name) / 2 + 7 * _SCALE, BOX_PX / 2 * _SCALE)
    x, y = place[0] * _SCALE, place[1] * _SCALE
    corners = (x - half[0], y - half[1], x + half[0], y + half[1])
    draw.rounded_rectangle(corners, 6 * _SCALE, fill="#ffe9b8" if entity else "#eef3f8", outline="black", width=_SCALE)
    draw.text((x, y), name, fill="black", font=font, anchor="mm")


@lru_cache
def _font() -> Any:
    return ImageFont.load_default(15 * _SCALE)
