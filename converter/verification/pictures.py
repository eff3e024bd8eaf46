"""An image for the encoders to look at, and what they see in it as a picture.

The page is drawn here: it has what documents have (text in several sizes, a table, a photograph, a stamp), and no
file has to be shipped or fetched.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from converter.errors import ContainerError
from converter.tensors.evaluate import as_bytes
from converter.verification.result import Picture

_SIDE = 1024  # pixels at which the page is drawn
_SHOWN = 256  # pixels at which the report shows an image
_PARAGRAPHS = (
    "The encoder reads a page in two steps. A windowed transformer looks at every patch of sixteen",
    "pixels; a convolution then keeps one token of sixteen, and a second transformer relates",
    "what is left across the whole page. Few tokens hold a page of text.",
    "",
    "Positions are learned at one size and resampled for all others. At the trained size nothing",
    "is resampled, and a mistake in it does not show: so this page is looked at in several sizes.",
)
_SMALL_PRINT = (
    "Of sixteen by sixteen pixels is one patch made.",
    "Windows of fourteen patches do not see each other;",
    "four blocks of twelve look at the whole of the page,",
    "and whatever they find is kept in one token of 16.",
)
_TABLE = (
    ("mode", "pixels", "tokens"),
    ("tiny", "512", "64"),
    ("small", "640", "100"),
    ("base", "1024", "256"),
    ("large", "1280", "400"),
)
# Per patch, relative difference from which the picture of differences is black, and at which it is white.
_BLACK, _WHITE = 1e-7, 1.0


def page(size: int) -> Image.Image:
    """A page of a document, `size` pixels along each side; the same page at every size."""
    image = Image.new("RGB", (_SIDE, _SIDE), "#fdfcf7")
    draw = ImageDraw.Draw(image)
    ink = "#1c1c22"
    draw.text((64, 48), "On Reading Pages", ink, ImageFont.load_default(64))
    draw.text((66, 132), "a page to look at, drawn by dsocr-verify", "#8a2b2b", ImageFont.load_default(26))
    draw.line((64, 178, 960, 178), ink, 3)
    for row, line in enumerate(_PARAGRAPHS):
        draw.text((64, 200 + 32 * row), line, ink, ImageFont.load_default(20))
    _draw_table(draw, 64, 430)
    image.paste(_photograph(360, 300), (600, 430))
    draw.text((600, 738), "Fig. 1: a hill at dusk", "#444444", ImageFont.load_default(18))
    for row in range(8):
        draw.text((64, 760 + 24 * row), f"{row + 1}.  {_SMALL_PRINT[row % 4]}", ink, ImageFont.load_default(14))
    _stamp(image, (620, 800))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _draw_table(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    width, height = 160, 56
    for i, row in enumerate(_TABLE):
        for j, cell in enumerate(row):
            x, y = left + j * width, top + i * height
            draw.rectangle((x, y, x + width, y + height), "#dfe6ee" if i == 0 else None, "#555555", 2)
            draw.text((x + 16, y + 14), cell, "#1c1c22", ImageFont.load_default(22))


def _photograph(width: int, height: int) -> Image.Image:
    """Smooth shades and round edges, as photographs have them."""
    sky = ImageOps.colorize(Image.linear_gradient("L"), "#27408b", "#f5a35c").resize((width, height))
    light = ImageOps.invert(Image.radial_gradient("L")).resize((width, height))
    sky.paste("#ffe9b0", (60, -40), light.point(lambda value: max(value - 80, 0)))
    draw = ImageDraw.Draw(sky)
    draw.ellipse((-120, 190, 260, 520), "#22402c")
    draw.ellipse((140, 220, 520, 560), "#2f5a38")
    draw.ellipse((250, 50, 294, 94), "#fff3cf")
    return sky


def _stamp(image: Image.Image, place: tuple[int, int]) -> None:
    stamp = Image.new("L", (330, 150), 0)
    draw = ImageDraw.Draw(stamp)
    draw.rounded_rectangle((8, 8, 322, 142), 18, None, 200, 8)
    draw.text((44, 44), "VERIFIED?", 200, ImageFont.load_default(50))
    turned = stamp.rotate(14, Image.Resampling.BICUBIC, expand=True)
    image.paste("#b3261e", place, turned)


def load(path: Path) -> Image.Image:
    """A user's image. Raises ContainerError if it is none."""
    try:
        with Image.open(path) as image:
            image.load()
            converted: Image.Image = image.convert("RGB")
            return converted
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ContainerError(f"{path}: cannot be read as an image: {error}") from error


def pixels(image: Image.Image, size: int) -> Tensor:
    """The image (1, 3, size, size) as DeepSeek-OCR prepares it: fitted, padded with grey, between -1 and 1."""
    square = ImageOps.pad(image.convert("RGB"), (size, size), color=(127, 127, 127))
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
    return ((values.permute(2, 0, 1).float() / 255 - 0.5) / 0.5).unsqueeze(0)


def draw(run: str, seen: Tensor, reference: Tensor, converted: Tensor) -> list[Picture]:
    """The image (1, 3, H, W) that was seen, the features of both encoders in the same colours, and how they differ.

    No pictures where the features lie on no grid, or not on the same one.
    """
    before, after = grid(reference), grid(converted)
    if before is None or after is None or before.shape != after.shape:
        return []
    image = _image((seen[0].detach().float().cpu().permute(1, 2, 0) + 1) / 2)
    image = image.resize((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    shown = [_image(colours) for colours in _colours(before, after)]
    names = ("image", "source", "converted", "difference")
    drawn = [image, *shown, _image(_difference(before, after))]
    return [Picture(run, name, _png(picture)) for name, picture in zip(names, drawn, strict=True)]


def grid(features: Tensor) -> Tensor | None:
    """Features as (side, side, channels): of maps (1, C, side, side) or (1, side, side, C), or of tokens (1, N, C).

    A class token before the grid is left out.
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
    """Of both, the first three principal components of the reference, as red, green and blue."""
    flat = reference.flatten(0, 1).nan_to_num(0, 0, 0)
    mean = flat.mean(0)
    directions = _main_directions(flat - mean)
    scores = (flat - mean) @ directions
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    spread = (high - low).clamp_min(1e-12)
    drawn = []
    for features in (reference, converted):
        scores = (features.nan_to_num(0, 0, 0) - mean) @ directions
        drawn.append(torch.nn.functional.pad((scores - low) / spread, (0, 3 - directions.shape[1])))
    return drawn


def _main_directions(centred: Tensor) -> Tensor:
    """The directions (channels, 3 or fewer) in which features (patches, channels) vary most.

    From the smaller of the two matrices of products: ten times as quick as their singular value decomposition.
    """
    patches, channels = centred.shape
    products = centred.T @ centred if patches >= channels else centred @ centred.T
    # Ascending eigenvalues: the last three vectors, the largest first.
    found: Tensor = torch.linalg.eigh(products).eigenvectors[:, -3:].flip(1)
    if patches >= channels:
        return found
    found = centred.T @ found
    found /= found.norm(dim=0).clamp_min(1e-12)
    return found


def _difference(reference: Tensor, converted: Tensor) -> Tensor:
    """Per patch, the difference relative to the features' usual norm, in shades by its logarithm."""
    usual = reference.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    relative = ((converted - reference).norm(dim=-1) / usual).nan_to_num(_WHITE, _WHITE).clamp(_BLACK, _WHITE)
    shade = (relative / _BLACK).log10() / torch.tensor(_WHITE / _BLACK).log10()
    drawn: Tensor = shade.unsqueeze(-1).expand(-1, -1, 3)
    return drawn


def _image(colours: Tensor) -> Image.Image:
    """(H, W, 3) between 0 and 1."""
    values = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    height, width, _ = values.shape
    return Image.frombytes("RGB", (width, height), bytes(as_bytes(values)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
