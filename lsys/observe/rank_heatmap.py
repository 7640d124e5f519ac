"""A picture of what every rank did with its time: a straggler is the rank whose own work takes longest."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Of the parts of the waterfall, in the order in which they lie upon each other.
COLOURS = {
    "compute": (46, 125, 50),
    "exposed_tensor": (13, 71, 161),
    "exposed_context": (33, 150, 243),
    "exposed_pipeline": (92, 107, 192),
    "exposed_expert": (206, 147, 216),
    "exposed_data": (0, 172, 193),
    "exposed_model": (0, 105, 92),
    "exposed_world": (144, 202, 249),
    "exposed_other": (128, 203, 196),
    "imbalance": (198, 40, 40),
    "bubble": (239, 108, 0),
    "data": (106, 27, 154),
    "checkpoint": (84, 110, 122),
    "core": (121, 85, 72),
    "report": (255, 202, 40),
    "other": (189, 189, 189),
}
COLUMNS = 4  # of the legend
BARS = 64  # ranks up to which each has a bar
WIDTH, ROW, LABEL, EDGE = 560, 16, 96, 10  # pixels; TensorBoard shows about half of 1,000
INK, PAPER = (33, 33, 33), (255, 255, 255)


def colour(part: str) -> str:
    """The part's own colour in every picture, as #rrggbb; of an axis without one, that of `exposed_other`."""
    return "#{:02x}{:02x}{:02x}".format(*COLOURS.get(part, COLOURS["exposed_other"]))


def ranks_picture(ranks: Sequence[Mapping[str, float]], nodes: Sequence[int], title: str) -> np.ndarray:
    """Every rank's parts of a step: uint8 [height, width, 3].

    Up to 64 ranks have a bar each. More are cells of a grid, a row for each node, whose colour says how far the rank's own
    work is from the median; the five farthest above are named.

    Args:
        ranks: of each rank, seconds of each part. nodes: of each rank.
    """
    return _bars(ranks, nodes, title) if len(ranks) <= BARS else _cells(ranks, nodes, title)


def _canvas(height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(size=11)
    draw.text((EDGE, EDGE), title, INK)
    return image, draw


def _bars(ranks: Sequence[Mapping[str, float]], nodes: Sequence[int], title: str) -> np.ndarray:
    parts = [part for part in ranks[0] if any(rank[part] > 0 for rank in ranks)]
    top = EDGE + ROW * (2 + -(-len(parts) // COLUMNS))
    image, draw = _canvas(top + (ROW + 4) * len(ranks) + EDGE, title)
    _legend(draw, parts)
    longest = max(sum(rank.values()) for rank in ranks) or 1.0
    scale = (WIDTH - LABEL - 2 * EDGE - 70) / longest
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank]["compute"])
    for number, rank in enumerate(ranks):
        y, x = top + (ROW + 4) * number, float(LABEL + EDGE)
        marked = "*" if number == slowest and len(ranks) > 1 else ""
        draw.text((EDGE, y + 1), f"{marked}rank {number}, node {nodes[number]}", INK)
        for part in parts:
            end = x + max(0.0, rank[part]) * scale
            if round(end) > round(x):  # both edges of a rectangle are drawn
                draw.rectangle((round(x), y, round(end) - 1, y + ROW - 1), fill=colour(part))
            x = end
        draw.text((x + 4, y + 1), f"{1e3 * rank['compute']:,.0f} ms", INK)
    return np.asarray(image)


def _legend(draw: ImageDraw.ImageDraw, parts: Sequence[str]) -> None:
    for number, part in enumerate(parts):
        x, y = EDGE + number % COLUMNS * (WIDTH // COLUMNS), EDGE + ROW * (1 + number // COLUMNS) + 4
        draw.rectangle((x, y, x + 10, y + 10), fill=colour(part))
        draw.text((x + 14, y - 2), part, INK)


def _cells(ranks: Sequence[Mapping[str, float]], nodes: Sequence[int], title: str) -> np.ndarray:
    compute = np.array([rank["compute"] for rank in ranks])
    median = float(np.median(compute)) or 1.0
    off = np.clip((compute / median - 1) / 0.25, -1, 1)  # full colour from a quarter more or less
    rows = {node: [rank for rank in range(len(ranks)) if nodes[rank] == node] for node in dict.fromkeys(nodes)}
    side = max(3, min(ROW, (WIDTH - LABEL - 2 * EDGE) // max(map(len, rows.values()))))
    top = EDGE + 3 * ROW
    image, draw = _canvas(top + side * len(rows) + EDGE, title)
    slowest = ", ".join(f"{rank} ({1e3 * compute[rank]:,.0f})" for rank in np.argsort(-compute)[:5])
    draw.text((EDGE, EDGE + ROW), f"longest own work, ms: rank {slowest}; median {1e3 * median:,.0f}", INK)
    for row, (node, members) in enumerate(rows.items()):
        y = top + side * row
        if side * row % ROW < side:  # labels where there is room
            draw.text((EDGE, y), f"node {node}", INK)
        for column, rank in enumerate(members):
            x, fade = LABEL + side * column, round(230 * (1 - abs(off[rank])))
            fill = (225, fade, fade) if off[rank] > 0 else (fade, fade, 225)
            draw.rectangle((x, y, x + side - 2, y + side - 2), fill=fill)
    return np.asarray(image)
