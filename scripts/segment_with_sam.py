#!/usr/bin/env python3
"""Segments a picture with transformers' SAM, from a folder converted from Meta's file.

    python scripts/segment_with_sam.py sam_vit_b_01ec64.pth -o segmented

Converts the checkpoint into OUT/sam, once; draws a picture of two objects; asks for them by points, by boxes, by both,
and for the first one by a mask. For each way, OUT holds a mask of every object and the picture overlaid with them.
With weights that were never trained the masks are noise, of the right shapes. Needs transformers and torchvision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import converter

WIDTH, HEIGHT = 2646, 1764
Point = tuple[float, float]
Box = tuple[float, float, float, float]


class Thing(NamedTuple):
    """An object of the picture: an ellipse or a rectangle, its bounding box in pixels, and three points on it."""

    name: str
    shape: str
    colour: str
    box: Box
    points: tuple[Point, Point, Point]


THINGS = (
    Thing("disc", "ellipse", "firebrick", (400, 400, 1100, 1300), ((750, 600), (600, 850), (900, 1100))),
    Thing("board", "rectangle", "steelblue", (1500, 600, 2300, 1400), ((1700, 800), (1900, 1000), (2100, 1200))),
)


class Prompt(NamedTuple):
    """What SAM is asked: an object a row of `points` or `boxes`, in the picture's pixels, or a mask of the first one.

    `mask` holds logits (1, 1, 256, 256); transformers takes one a picture.
    """

    things: tuple[Thing, ...]
    points: bool = False
    boxes: bool = False
    mask: Tensor | None = None


class Answer(NamedTuple):
    """What SAM says of N objects, three masks each.

    `inputs` are the processor's; `pred_masks` (1, N, 3, 256, 256) logits; `iou_scores` (1, N, 3); `masks`
    (N, 3, H, W) booleans of the picture's own size.
    """

    inputs: dict[str, Tensor]
    pred_masks: Tensor
    iou_scores: Tensor
    masks: Tensor

    @property
    def best(self) -> list[int]:
        """Each object's mask that SAM itself trusts most."""
        return [int(index) for index in self.iou_scores[0].argmax(-1)]


class Segmenter:
    """SAM loaded from a folder, and one picture that is encoded once, however often it is asked about."""

    def __init__(self, folder: Path, picture: Image.Image) -> None:
        from transformers import SamModel, SamProcessor

        self.model = SamModel.from_pretrained(folder).eval()
        self.processor = SamProcessor.from_pretrained(folder)
        self.picture = picture
        pixels = self.processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            # (1, 256, 64, 64)
            self.embeddings: Tensor = self.model.get_image_embeddings(pixels)

    def ask(self, prompt: Prompt) -> Answer:
        """The three masks of each object."""
        words: dict[str, Any] = {}
        if prompt.points:
            words["input_points"] = [[[list(point) for point in thing.points] for thing in prompt.things]]
        if prompt.boxes:
            words["input_boxes"] = [[list(thing.box) for thing in prompt.things]]
        inputs = dict(self.processor(self.picture, return_tensors="pt", **words))
        asked = {name: inputs[name].float() for name in words}
        if prompt.mask is not None:
            asked["input_masks"] = prompt.mask
        with torch.no_grad():
            out = self.model(image_embeddings=self.embeddings, **asked)
        return Answer(inputs, out.pred_masks, out.iou_scores, self.masks(out.pred_masks, inputs))

    def masks(self, pred_masks: Tensor, inputs: dict[str, Tensor], binarize: bool = True) -> Tensor:
        """Masks in the picture's own size, (N, 3, H, W): the padding cut off; logits, unless `binarize`."""
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        found: Tensor = self.processor.image_processor.post_process_masks(pred_masks, *sizes, binarize=binarize)[0]
        return found


def draw_picture() -> Image.Image:
    """The two objects before a light ground, 2646 x 1764."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "gainsboro")
    draw = ImageDraw.Draw(picture)
    for thing in THINGS:
        getattr(draw, thing.shape)(thing.box, fill=thing.colour)
    return picture


def convert(source: str, folder: Path) -> None:
    """Meta's file as a folder for transformers, prompt encoder and mask decoder included."""
    converter.convert(source, "sam", to="sam-hf", full_model=True, out=folder)


def ask_every_way(segmenter: Segmenter) -> dict[str, tuple[Prompt, Answer]]:
    """The prompts that SAM takes and its answers, by what they are made of."""
    prompts = {
        "points": Prompt(THINGS, points=True),
        "boxes": Prompt(THINGS, boxes=True),
        "boxes and points": Prompt(THINGS, points=True, boxes=True),
    }
    answers = {name: (prompt, segmenter.ask(prompt)) for name, prompt in prompts.items()}
    first = answers["points"][1]
    # As SAM is used over several rounds: what it answered is what it is asked with.
    prompt = Prompt(THINGS[:1], mask=first.pred_masks[:, 0, first.best[0]][None])
    return {**answers, "mask": (prompt, segmenter.ask(prompt))}


def save(picture: Image.Image, name: str, prompt: Prompt, answer: Answer, out: Path) -> None:
    """The best mask of each object, and the picture with all of them, as PNG."""
    overlay = picture.copy()
    for index, thing in enumerate(prompt.things):
        mask = _image(answer.masks[index, answer.best[index]])
        mask.save(out / f"{name.replace(' ', '-')}-{thing.name}.png")
        tint = Image.new("RGB", picture.size, ("orange", "limegreen")[index])
        overlay.paste(tint, mask=mask.point(lambda value: value // 2))
    draw = ImageDraw.Draw(overlay)
    for thing in prompt.things:
        if prompt.boxes:
            draw.rectangle(thing.box, outline="black", width=8)
        for x, y in thing.points if prompt.points else ():
            draw.ellipse((x - 16, y - 16, x + 16, y + 16), fill="black")
    overlay.save(out / f"{name.replace(' ', '-')}-overlay.png")


def _image(mask: Tensor) -> Image.Image:
    return Image.fromarray((mask.to(torch.uint8) * 255).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="Meta's sam_vit_b_01ec64.pth, or a SAM in any other layout")
    parser.add_argument("-o", "--out", type=Path, default=Path("segmented"), help="default %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "sam").exists():
        convert(args.source, args.out / "sam")
    picture = draw_picture()
    picture.save(args.out / "picture.png")
    for name, (prompt, answer) in ask_every_way(Segmenter(args.out / "sam", picture)).items():
        save(picture, name, prompt, answer, args.out)
        scores = ", ".join(f"{thing.name} {answer.iou_scores[0, i].max():.3f}" for i, thing in enumerate(prompt.things))
        print(f"{name:16}  masks {tuple(answer.masks.shape)}  IoU as SAM estimates it: {scores}")


if __name__ == "__main__":
    main()
