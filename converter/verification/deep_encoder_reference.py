"""The DeepEncoder put together from transformers' SAM and CLIP, for a transformers that has no DeepEncoder of its own.

Blocks are run by transformers; what DeepSeek puts between them (resampled positions, the compressor, the class token,
the concatenation) is written here a second time, without our encoder's functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders import DeepEncoder
from converter.verification.reference_models import (
    Runner,
    State,
    in_layout,
    label,
    transformers_clip,
    transformers_sam,
    under,
)


class Assembled(nn.Module):
    """(B, 3, H, W) -> (B, N, 2 * width), as DeepEncoder."""

    def __init__(self, sam: Any, clip: Any, net_2: Tensor, net_3: Tensor) -> None:
        super().__init__()
        self.sam, self.clip = sam, clip
        self.net_2, self.net_3 = nn.Parameter(net_2), nn.Parameter(net_3)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self._compressed(pixels)
        semantic = self._clip(features)
        return torch.cat((semantic[:, 1:], features.flatten(2).permute(0, 2, 1)), dim=-1)

    def _compressed(self, pixels: Tensor) -> Tensor:
        # Not SAM's own forward: it refuses sizes other than the trained one.
        x = self.sam.patch_embed.projection(pixels).permute(0, 2, 3, 1)
        x = x + _resized(self.sam.pos_embed.permute(0, 3, 1, 2), x.shape[1], x.shape[2]).permute(0, 2, 3, 1)
        for layer in self.sam.layers:
            found = layer(x)
            # transformers before 5 gives a tuple.
            x = found if isinstance(found, Tensor) else found[0]
        x = F.conv2d(self.sam.neck(x), self.net_2, stride=2, padding=1)
        return F.conv2d(x, self.net_3, stride=2, padding=1)

    def _clip(self, features: Tensor) -> Tensor:
        embeddings = self.clip.embeddings
        batch, width, h, w = features.shape
        table = embeddings.position_embedding.weight
        side = round((len(table) - 1) ** 0.5)
        image = table[1:].T.reshape(1, width, side, side)
        positions = torch.cat((table[:1], _resized(image, h, w)[0].flatten(1).T))
        token = embeddings.class_embedding.reshape(1, 1, width).expand(batch, 1, width)
        x = torch.cat((token, features.flatten(2).permute(0, 2, 1)), dim=1) + positions
        found: Tensor = self.clip.encoder(inputs_embeds=self.clip.pre_layrnorm(x)).last_hidden_state
        return found


def _resized(image: Tensor, h: int, w: int) -> Tensor:
    """(1, C, rows, columns) -> (1, C, h, w); in float32 at least."""
    if image.shape[-2:] == (h, w):
        return image
    wide = image.double() if image.dtype == torch.float64 else image.float()
    return F.interpolate(wide, size=(h, w), mode="bicubic", antialias=True).to(image.dtype)


def assembled_chain(whole: DeepEncoder, truth: State) -> Runner:
    """The reference for a chain, with `truth`, tensors by DeepSeek's names."""
    config, sam_state = whole.vision_model.config, under("sam_model.", truth)
    # transformers' class has a patch embedding; the chain never runs it.
    patches = torch.zeros(config.width, config.channels, config.patch, config.patch)
    clip_state = {"embeddings.patch_embedding.weight": patches, **under("vision_model.", truth)}
    sam = transformers_sam(whole.sam_model.config, in_layout("sam-hf", sam_state))
    clip = transformers_clip(config, in_layout("clip-hf", clip_state))
    inner: Any = getattr(clip.model, "vision_model", clip.model)
    model = Assembled(sam.model, inner, sam_state["net_2.weight"], sam_state["net_3.weight"]).eval()
    name = label("transformers", "SamVisionEncoder and CLIPVisionModel, put together")
    # CLIP's patch convolution is not run: its other places follow SAM's.
    return Runner(name, model, [*sam.places, *clip.places[1:]], model)
