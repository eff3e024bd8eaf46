"""Folders written by the training libraries themselves, after two steps of training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch

import converter
from converter.errors import ContainerError

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


class _Pixels(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.full((3, 56, 56), index / 4), "labels": torch.zeros(1)}


def test_transformers_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return model(pixel_values=inputs["pixel_values"]).pooler_output.square().mean()

    torch.manual_seed(0)
    model = models.clip_hf_vision()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Own(model, arguments, train_dataset=_Pixels()).train()
    with pytest.raises(ContainerError, match="2 of its folders have one: checkpoint-1, checkpoint-2"):
        converter.convert(tmp_path / "runs", "clip", dry_run=True)
    step = tmp_path / "runs" / "checkpoint-2"
    safetensors.torch.save_file(model.state_dict(), tmp_path / "trained.safetensors")
    safetensors.torch.save_file(before, tmp_path / "base.safetensors")
    assert converter.diff(tmp_path / "trained.safetensors", step).equal
    assert converter.diff(tmp_path / "base.safetensors", step).encoders == {"clip": False}
    # Each file that the Trainer writes has a name in the table.
    assert [files.name for files in converter.inspect(step).folder if not files.what] == []
