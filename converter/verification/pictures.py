"""Draws the default image that encoders run on, and pictures of their features.

The default image is a page with text of several sizes, a table, a photograph and a stamp, as in documents.
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

_PAGE_SIZE = 1024  # The height and width of the drawn page in pixels
_REPORT_SIZE = 256  # The height and width of the input in a report in pixels
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
# The relative differences of a patch that are drawn in black and in white.
_BLACK, _WHITE = 1e-7, 1.0


def draw_page(size: int) -> Image.Image:
    """Draw the default page, with `size` pixels along each side."""
    return _full_size_page().resize((size, size), Image.Resampling.LANCZOS)


@cache
def _full_size_page() -> Image.Image:
    image = Image.new("RGB", (_PAGE_SIZE, _PAGE_SIZE), "#fdfcf7")
    draw = ImageDraw.Draw(image)
    _draw_text(draw, (64, 48), 64, ["On Reading Pages"])
    draw.line((64, 178, 960, 178), _INK, 3)
    _draw_text(draw, (64, 200), 20, _TEXT)
    for row, cells in enumerate(_TABLE):
        for column, cell in enumerate(cells):
            x, y = 64 + column * 160, 430 + row * 56
            draw.rectangle((x, y, x + 160, y + 56), "#dfe6ee" if row == 0 else None, "#555555", 2)
            _draw_text(draw, (x + 16, y + 14), 22, [cell])
    image.paste(_photograph(360, 300), (600, 430))
    _draw_text(draw, (64, 760), 14, [f"{i}.  {line}" for i, line in enumerate(2 * _TEXT, 1)])
    _stamp(image, (620, 800))
    return image


def _draw_text(draw: ImageDraw.ImageDraw, position: tuple[int, int], size: int, lines: Sequence[str]) -> None:
    font, (x, y) = ImageFont.load_default(size), position
    for row, line in enumerate(lines):
        draw.text((x, y + row * size * 1.6), line, _INK, font)


def _photograph(width: int, height: int) -> Image.Image:
    """Draw smooth gradients and round edges, which photographs have."""
    image = ImageOps.colorize(Image.linear_gradient("L"), "#27408b", "#f5a35c").resize((width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((-120, 190, 260, 520), "#22402c")
    draw.ellipse((140, 220, 520, 560), "#2f5a38")
    draw.ellipse((250, 50, 294, 94), "#fff3cf")
    return image


def _stamp(image: Image.Image, position: tuple[int, int]) -> None:
    stamp = Image.new("L", (330, 150), 0)
    draw = ImageDraw.Draw(stamp)
    draw.rounded_rectangle((8, 8, 322, 142), 18, None, 200, 8)
    draw.text((44, 44), "VERIFIED?", 200, ImageFont.load_default(50))
    rotated = stamp.rotate(14, Image.Resampling.BICUBIC, expand=True)
    image.paste("#b3261e", position, rotated)


def load_image(path: Path) -> Image.Image:
    """Load an image file in RGB; ContainerError if it is not an image."""
    try:
        with Image.open(path) as image:
            converted: Image.Image = image.convert("RGB")
            return converted
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ContainerError(f"{path}: cannot be read as an image: {error}") from error


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize, pad and normalise an image as DeepSeek-OCR does, to (1, 3, size, size) with values from -1 to 1."""
    square = ImageOps.pad(image.convert("RGB"), (size, size), color=(127, 127, 127))
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
    return ((values.permute(2, 0, 1).float() / 255 - 0.5) / 0.5).unsqueeze(0)


def draw_features(run: str, pixels: Tensor, reference: Tensor, converted: Tensor) -> list[Picture]:
    """Draw the input, the features of both encoders, and their difference; no pictures if the features have no grid.

    Args:
        run: The name of the run.
        pixels: The input (1, 3, H, W). There are no pictures for other inputs, such as tokens.
        reference: The reference's features.
        converted: The converted encoder's features.
    """
    grid, converted_grid = _grid(reference), _grid(converted)
    if pixels.ndim != 4 or grid is None or converted_grid is None or grid.shape != converted_grid.shape:
        return []
    image = _image((pixels[0].detach().float().cpu().permute(1, 2, 0) + 1) / 2)
    images = {"image": image.resize((_REPORT_SIZE, _REPORT_SIZE), Image.Resampling.LANCZOS)}
    images["source"], images["converted"] = map(_image, _colours(grid, converted_grid))
    images["difference"] = _image(_difference(grid, converted_grid))
    return [Picture(run, name, _png(picture)) for name, picture in images.items()]


def _grid(features: Tensor) -> Tensor | None:
    """Return features as (size, size, channels), without a class token; None if they have no square grid.

    Features are maps (1, C, size, size) or (1, size, size, C), or tokens (1, N, C).
    """
    first = features[0].detach().double().cpu()
    if first.dim() == 3:
        return first.permute(1, 2, 0) if first.shape[1] == first.shape[2] else first
    if first.dim() != 2:
        return None
    for num_class_tokens in (0, 1):
        patches = first[num_class_tokens:]
        size = round(len(patches) ** 0.5)
        if size > 1 and size**2 == len(patches):
            return patches.reshape(size, size, -1)
    return None


def _colours(reference: Tensor, converted: Tensor) -> list[Tensor]:
    """Project the features of both on the first three principal components of the reference: red, green and blue."""
    flat = reference.flatten(0, 1).nan_to_num(0, 0, 0)
    mean = flat.mean(0)
    directions = _principal_directions(flat - mean)
    projections = [(features.nan_to_num(0, 0, 0) - mean) @ directions for features in (reference, converted)]
    low, high = torch.quantile(projections[0].flatten(0, 1), torch.tensor([0.01, 0.99], dtype=mean.dtype), dim=0)
    padding = (0, 3 - directions.shape[1])
    return [functional.pad((scores - low) / (high - low).clamp_min(1e-12), padding) for scores in projections]


def _principal_directions(centred: Tensor) -> Tensor:
    """Return the first principal directions (channels, at most 3) of centred features (patches, channels)."""
    patches, channels = centred.shape
    # The eigenvectors of the smaller Gram matrix take a tenth of the time of an SVD.
    gram = centred.T @ centred if patches >= channels else centred @ centred.T
    # Eigenvalues are in ascending order.
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -3:].flip(1)
    return vectors if patches >= channels else functional.normalize(centred.T @ vectors, dim=0)


def _difference(reference: Tensor, converted: Tensor) -> Tensor:
    """Return the difference of each patch, relative to the root mean square of the norms, as a logarithmic grey."""
    rms_norm = reference.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    relative = ((converted - reference).norm(dim=-1) / rms_norm).nan_to_num(_WHITE, _WHITE).clamp(_BLACK, _WHITE)
    shade = (relative / _BLACK).log10() / math.log10(_WHITE / _BLACK)
    colours: Tensor = shade.unsqueeze(-1).expand(-1, -1, 3)
    return colours


def _image(colours: Tensor) -> Image.Image:
    """Convert colours (H, W, 3) from 0 to 1 to an image."""
    height, width, _ = colours.shape
    values = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(as_bytes(values)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
