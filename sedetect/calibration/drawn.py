"""Calibration images drawn on demand, with captions: shapes, charts, text, landscapes."""

import importlib.util
import math
from typing import Any

import numpy as np

_COLORS = {"red": "#c8322b", "blue": "#2b5fc8", "green": "#2e8b45", "purple": "#8a3ea8", "black": "#202020"}
_MONTHS = ("January", "February", "March", "April", "May", "June")
_LINES = (
    ("Opening hours", "Monday to Friday: 9 to 17", "Saturday: 10 to 14", "Closed on Sundays"),
    ("INVOICE 2048", "12 notebooks   36.00", "3 lamps        87.50", "Total         123.50"),
    ("def area(width, height):", "    return width * height", "", "print(area(3, 4))  # 12"),
    ("a^2 + b^2 = c^2", "3^2 + 4^2 = 25 = 5^2", "so c = 5"),
)


def why_not() -> str | None:
    """The reason why images cannot be drawn here; None if they can."""
    return None if importlib.util.find_spec("PIL") else "drawing needs Pillow; pip install 'sedetect[images]'"


def draw_images() -> list[list[dict[str, Any]]]:
    """Sixteen chats, the same in every run; each asks about a picture and describes it."""
    drawn = [draw(number) for number in range(4) for draw in (_shapes, _chart, _text, _landscape)]
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": "Describe this image in a sentence."},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ]
        for image, caption in drawn
    ]


def _canvas(number: int) -> Any:
    from PIL import Image

    return Image.new("RGB", ((320, 240), (256, 256), (240, 336), (384, 224))[number], "white")


def _shapes(number: int) -> tuple[Any, str]:
    from PIL import ImageDraw

    image = _canvas(number)
    width, height = image.size
    draw, names = ImageDraw.Draw(image), list(_COLORS)
    first, second, third = (names[(number + step) % len(names)] for step in range(3))
    side = min(width, height) // 4
    draw.ellipse((side // 2, side // 2, side * 3 // 2, side * 3 // 2), fill=_COLORS[first])
    draw.rectangle((width - 2 * side, side // 2, width - side // 2, side * 3 // 2), fill=_COLORS[second])
    draw.polygon(
        [
            (width // 2, height - 2 * side),
            (width // 2 - side, height - side // 3),
            (width // 2 + side, height - side // 3),
        ],
        outline=_COLORS[third],
        width=5,
    )
    return image, f"A {first} circle and a {second} rectangle above the outline of a {third} triangle."


def _chart(number: int) -> tuple[Any, str]:
    from PIL import ImageDraw

    image = _canvas(number)
    width, height = image.size
    draw, values = ImageDraw.Draw(image), [2 + (5 * month + 3 * number + month * month) % 9 for month in range(6)]
    bottom, step = height - 24, (width - 40) // 6
    for level in range(0, 11, 2):
        y = bottom - level * (bottom - 20) // 10
        draw.line((30, y, width - 8, y), fill="#c8c8c8")
        draw.text((8, y - 6), str(level), fill="black")
    for month, value in enumerate(values):
        left, top = 34 + month * step, bottom - value * (bottom - 20) // 10
        draw.rectangle((left, top, left + step - 8, bottom), fill=list(_COLORS.values())[number])
        draw.text((left, bottom + 6), _MONTHS[month][:3], fill="black")
    most = _MONTHS[values.index(max(values))]
    return image, f"A bar chart of six months, from January ({values[0]}) to June ({values[-1]}), highest in {most}."


def _text(number: int) -> tuple[Any, str]:
    from PIL import ImageDraw

    image = _canvas(number)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(_LINES[number]):
        draw.text((16, 20 + 28 * row), line, fill="black")
    return image, "It reads: " + " / ".join(line.strip() for line in _LINES[number] if line)


def _landscape(number: int) -> tuple[Any, str]:
    """A substitute for a photograph: a sky gradient, a sun, and textured hills, in soft colors."""
    from PIL import Image

    width, height = _canvas(number).size
    y, x = np.mgrid[0:height, 0:width]
    across, down = x / width, y / height
    grain = np.sin(12.9898 * x + 78.233 * y + number) * 43758.5453
    grain = grain - np.floor(grain)  # (H, W) in [0, 1), without a visible pattern
    glow = np.exp(-40 * ((across - 0.2 - 0.2 * number) ** 2 + (down - 0.25) ** 2))
    color = np.stack((90 + 120 * down + 90 * glow, 140 + 70 * down + 70 * glow, 210 - 30 * down + 20 * glow), -1)
    for hill in range(3):
        ridge = 0.5 + 0.15 * hill + 0.08 * np.sin(across * math.tau * (1 + hill) + number + hill)
        ground = np.stack([tone * (0.8 - 0.2 * hill) * (0.75 + 0.5 * grain) for tone in (90, 130, 70)], -1)
        color = np.where((down > ridge)[..., None], ground, color)
    image = Image.fromarray(np.clip(color + 6 * (grain[..., None] - 0.5), 0, 255).astype(np.uint8))
    return image, "A landscape with three rows of wooded hills under a hazy sky, and the sun in it."
