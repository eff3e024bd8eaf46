"""SAM from end to end at its true sizes but two blocks: Meta's file, converted, against segment-anything's predictor.

The picture, the widths and the decoder have their true sizes. More blocks would only take more time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from command import script
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

# Both programs compute in float32, in another order, and Pillow and torchvision round a few pixels of the resized
# picture differently. Untrained weights give logits of at most 0.03, which were found to differ by 1.2e-5 at most; the
# masks then differ in one pixel of five thousand.
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def walked(sam_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The script's own way: the converted folder, the picture, and every prompt with its answer."""
    walk, folder = script("segment_with_sam"), tmp_path_factory.mktemp("sam")
    # Blocks 1 and 2 of 12; the second of them attends to the whole image.
    dropped = re.compile(r"image_encoder\.blocks\.([03-9]|1[01])\.")
    kept = {name: tensor for name, tensor in torch.load(sam_base).items() if not dropped.match(name)}
    source = folder / "sam_2_blocks.pth"
    torch.save(
        {name.replace("blocks.1.", "blocks.0.").replace("blocks.2.", "blocks.1."): kept[name] for name in kept}, source
    )
    walk.convert(str(source), folder / "sam")
    picture = walk.draw_picture()
    segmenter = walk.Segmenter(folder / "sam", picture)
    answers = walk.ask_every_way(segmenter)
    yield {"source": source, "walk": walk, "picture": picture, "segmenter": segmenter, "answers": answers}
    source.unlink()
    (folder / "sam" / "model.safetensors").unlink()


def test_points_of_two_objects(walked: dict[str, Any]) -> None:
    _, answer = walked["answers"]["points"]
    assert walked["picture"].size == (2646, 1764)
    assert answer.inputs["pixel_values"].shape == (1, 3, 1024, 1024)
    assert answer.inputs["original_sizes"].tolist() == [[1764, 2646]]
    assert answer.inputs["reshaped_input_sizes"].tolist() == [[683, 1024]]
    points = torch.tensor([thing.points for thing in walked["walk"].THINGS])[None]
    assert answer.inputs["input_points"].shape == (1, 2, 3, 2)
    scale = torch.tensor([1024 / 2646, 683 / 1764])
    torch.testing.assert_close(answer.inputs["input_points"].float(), points * scale)
    assert answer.pred_masks.shape == (1, 2, 3, 256, 256)
    assert answer.iou_scores.shape == (1, 2, 3)
    assert answer.masks.shape == (2, 3, 1764, 2646)
    assert answer.masks.dtype == torch.bool


def test_boxes_points_and_masks_as_prompts(walked: dict[str, Any]) -> None:
    objects = {name: len(prompt.things) for name, (prompt, _) in walked["answers"].items()}
    assert objects == {"points": 2, "boxes": 2, "boxes and points": 2, "mask": 1}
    for name, (_, answer) in walked["answers"].items():
        assert answer.pred_masks.shape == (1, objects[name], 3, 256, 256)
        assert answer.masks.shape == (objects[name], 3, 1764, 2646)
        # Untrained, but no mask that is all or nothing, which would hide differences.
        share = answer.masks.float().mean((-1, -2))
        assert ((share > 0.01) & (share < 0.99)).any(-1).all()
    assert walked["answers"]["boxes"][1].inputs["input_boxes"].shape == (1, 2, 4)


def test_segment_anything_draws_the_same_masks(walked: dict[str, Any]) -> None:
    from segment_anything import SamPredictor
    from segment_anything.build_sam import _build_sam

    sizes = {"encoder_embed_dim": 768, "encoder_depth": 2, "encoder_num_heads": 12}
    model = _build_sam(**sizes, encoder_global_attn_indexes=[1], checkpoint=str(walked["source"]))
    predictor = SamPredictor(model.eval())
    predictor.set_image(numpy.array(walked["picture"]))
    torch.testing.assert_close(predictor.features, walked["segmenter"].embeddings, rtol=1e-3, atol=1e-2)
    size = (1764, 2646)
    for prompt, answer in walked["answers"].values():
        points = torch.tensor([thing.points for thing in prompt.things])
        boxes = torch.tensor([thing.box for thing in prompt.things])
        logits, scores, low = predictor.predict_torch(
            point_coords=predictor.transform.apply_coords_torch(points, size) if prompt.points else None,
            point_labels=torch.ones(points.shape[:2], dtype=torch.int) if prompt.points else None,
            boxes=predictor.transform.apply_boxes_torch(boxes, size) if prompt.boxes else None,
            mask_input=prompt.mask,
            multimask_output=True,
            return_logits=True,
        )
        torch.testing.assert_close(answer.pred_masks[0], low, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(answer.iou_scores[0], scores, rtol=0, atol=TOLERANCE)
        differing = answer.masks != (logits > 0)
        assert not differing.any() or logits[differing].abs().max() < TOLERANCE
        assert differing.float().mean() < 0.001


def test_masks_and_overlays_are_pictures(walked: dict[str, Any], tmp_path: Path) -> None:
    for name, (prompt, answer) in walked["answers"].items():
        walked["walk"].save(walked["picture"], name, prompt, answer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "boxes-and-points-board.png",
        "boxes-and-points-disc.png",
        "boxes-and-points-overlay.png",
        "boxes-board.png",
        "boxes-disc.png",
        "boxes-overlay.png",
        "mask-disc.png",
        "mask-overlay.png",
        "points-board.png",
        "points-disc.png",
        "points-overlay.png",
    ]
    _, answer = walked["answers"]["points"]
    with Image.open(tmp_path / "points-disc.png") as picture:
        saved = numpy.array(picture)
    assert (saved == answer.masks[0, answer.best[0]].numpy() * 255).all()
    with Image.open(tmp_path / "points-overlay.png") as picture:
        assert picture.size == (2646, 1764)
