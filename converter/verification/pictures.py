"""The image that encoders run on, and pictures of their features.

The default image is a drawn page with what documents have: text of several sizes, a table, a photograph, a stamp.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

from converter.errors import ContainerError
from converter.tensors.evaluate import as_bytes
from converter.verification.result import Picture

_SIDE = 1024  # Pixels of the drawn page.
_SHOWN = 256  # Pixels of the image in the report.
_INK = "#1c1c22"
_TEXT = (
    "The encoder reads a page in two steps. A windowed transformer attends within squares of",
    "fourteen patches; a convolution then keeps one token of sixteen, and a second transformer",
    "attends over the whole page. Few tokens hold a page of text.",
    "Positions are learned at one size and resampled for all others. At the trained size nothing",
    "is resampled, and a mistake in it does not show.",
)
_TABLE = (
    ("mode", "pixels", "tokens"),
    ("tiny", "512", "64"),
    ("small", "640", "100"),
    ("base", "1024", "256"),
    ("large", "1280", "400"),
)
# Relative differences of a patch that are drawn black and white.
_BLACK, _WHITE = 1e-7, 1.0


def page(size: int) -> Image.Image:
    """The drawn page, `size` pixels along each side."""
    return _drawn_page().resize((size, size), Image.Resampling.LANCZOS)


@cache
def _drawn_page() -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), "#fdfcf7")
    draw = ImageDraw.Draw(image)
    _write(draw, (64, 48), 64, ["On Reading Pages"])
    draw.line((64, 178, 960, 178), _INK, 3)
    _write(draw, (64, 200), 20, _TEXT)
    for i, row in enumerate(_TABLE):
        for j, cell in enumerate(row):
            x, y = 64 + j * 160, 430 + i * 56
            draw.rectangle((x, y, x + 160, y + 56), "#dfe6ee" if i == 0 else None, "#555555", 2)
            _write(draw, (x + 16, y + 14), 22, [cell])
    image.paste(_photograph(360, 300), (600, 430))
    _write(draw, (64, 760), 14, [f"{i}.  {line}" for i, line in enumerate(2 * _TEXT, 1)])
    _stamp(image, (620, 800))
    return image


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], size: int, lines: Sequence[str]) -> None:
    font = ImageFont.load_default(size)
    for row, line in enumerate(lines):
        draw.text((place[0], place[1] + row * size * 1.6), line, _INK, font)


def _photograph(width: int, height: int) -> Image.Image:
    """Smooth shades and round edges, as photographs have them."""
    image = ImageOps.colorize(Image.linear_gradient("L"), "#27408b", "#f5a35c").resize((width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((-120, 190, 260, 520), "#22402c")
    draw.ellipse((140, 220, 520, 560), "#2f5a38")
    draw.ellipse((250, 50, 294, 94), "#fff3cf")
    return image


def _stamp(image: Image.Image, place: tuple[int, int]) -> None:
    stamp = Image.new("L", (330, 150), 0)
    draw = ImageDraw.Draw(stamp)
    draw.rounded_rectangle((8, 8, 322, 142), 18, None, 200, 8)
    draw.text((44, 44), "VERIFIED?", 200, ImageFont.load_default(50))
    rotated = stamp.rotate(14, Image.Resampling.BICUBIC, expand=True)
    image.paste("#b3261e", place, rotated)


def load(path: Path) -> Image.Image:
    """Load an image file; ContainerError if it is none."""
    try:
        with Image.open(path) as image:
            converted: Image.Image = image.convert("RGB")
            return converted
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ContainerError(f"{path}: cannot be read as an image: {error}") from error


def pixels(image: Image.Image, size: int) -> Tensor:
    """The image as DeepSeek-OCR prepares it: fitted and padded with grey, (1, 3, size, size) between -1 and 1."""
    square = ImageOps.pad(image.convert("RGB"), (size, size), color=(127, 127, 127))
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
    return ((values.permute(2, 0, 1).float() / 255 - 0.5) / 0.5).unsqueeze(0)


def draw(run: str, pixels: Tensor, reference: Tensor, converted: Tensor) -> list[Picture]:
    """Draw the input, the features of both encoders, and their difference; nothing if the features have no grid.

    Args:
        run: The name of the run.
        pixels: The input (1, 3, H, W); nothing is drawn of other inputs.
        reference: The reference's features.
        converted: The converted encoder's features.
    """
    before, after = _grid(reference), _grid(converted)
    if pixels.ndim != 4 or before is None or after is None or before.shape != after.shape:
        return []
    image = _image((pixels[0].detach().float().cpu().permute(1, 2, 0) + 1) / 2)
    image = image.resize((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    source, target = map(_image, _colours(before, after))
    images = {"image": image, "source": source, "converted": target, "difference": _image(_difference(before, after))}
    return [Picture(run, name, _png(picture)) for name, picture in images.items()]


def _grid(features: Tensor) -> Tensor | None:
    """Features as (side, side, channels), without a class token; None if they have no square grid.

    They are maps (1, C, side, side) or (1, side, side, C), or tokens (1, N, C).
    """
    first = features[0].detach().double().cpu()
    if first.dim() == 3:
        return first.permute(1, 2, 0) if first.shape[1] == first.shape[2] else first
    if first.dim() != 2:
        return None
    for skip in (0, 1):
        side = round((len(first) - skip) ** 0.5)
        if side > 1 and side**2 == len(first) - skip:
            return first[skip:].reshape(side, side, -1)
    return None


def _colours(reference: Tensor, converted: Tensor) -> list[Tensor]:
    """Both as red, green and blue: the first three principal components of the reference."""
    flat = reference.flatten(0, 1).nan_to_num(0, 0, 0)
    mean = flat.mean(0)
    directions = _principal_directions(flat - mean)
    scores = [(features.nan_to_num(0, 0, 0) - mean) @ directions for features in (reference, converted)]
    low, high = torch.quantile(scores[0].flatten(0, 1), torch.tensor([0.01, 0.99], dtype=mean.dtype), dim=0)
    missing = (0, 3 - directions.shape[1])
    return [functional.pad((each - low) / (high - low).clamp_min(1e-12), missing) for each in scores]


def _principal_directions(centred: Tensor) -> Tensor:
    """The principal directions (channels, 3 or fewer) of features (patches, channels)."""
    patches, channels = centred.shape
    # From the smaller of the two Gram matrices, which is ten times as fast as an SVD.
    products = centred.T @ centred if patches >= channels else centred @ centred.T
    # Ascending eigenvalues: the last three vectors, the largest first.
    vectors: Tensor = torch.linalg.eigh(products).eigenvectors[:, -3:].flip(1)
    return vectors if patches >= channels else functional.normalize(centred.T @ vectors, dim=0)


def _difference(reference: Tensor, converted: Tensor) -> Tensor:
    """The difference of each patch relative to the root mean square norm, as a grey on a logarithmic scale."""
    usual = reference.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    relative = ((converted - reference).norm(dim=-1) / usual).nan_to_num(_WHITE, _WHITE).clamp(_BLACK, _WHITE)
    shade = (relative / _BLACK).log10() / math.log10(_WHITE / _BLACK)
    colours: Tensor = shade.unsqueeze(-1).expand(-1, -1, 3)
    return colours


def _image(colours: Tensor) -> Image.Image:
    """(H, W, 3) between 0 and 1."""
    height, width, _ = colours.shape
    values = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(as_bytes(values)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
