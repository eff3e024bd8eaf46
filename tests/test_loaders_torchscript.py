from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from loaders_oracle import assert_same, opened
from torch import Tensor, nn

from converter.errors import ContainerError

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


class Everything(nn.Module):
    """Parameters, buffers, plain tensors, constants, containers, and a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2, bias=False)))
        self.norm = nn.BatchNorm1d(2)
        self.many = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.named = nn.ModuleDict({"left": nn.Linear(2, 2)})
        self.again = self.many[0]
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.weight16 = nn.Parameter(torch.ones(2, dtype=torch.float16))
        self.tied = self.weight16
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)
        self.plain = torch.ones(3)
        self.list = [torch.ones(1)]
        self.table = {"a": torch.ones(1)}
        self.numbers, self.floats, self.flags, self.text = [1, 2], [1.0], [True], "text"
        self.device, self.dtype = torch.device("cpu"), torch.float16

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(x)) * self.scale + self.weight16 + self.tied + self.count + self.hidden
        for layer in self.many:
            x = layer(x)
        x = self.again(self.named["left"](x)) + self.list[0] + self.table["a"] + self.numbers[0] + self.floats[0]
        if self.flags[0] and self.text == "text":
            x = x + torch.tensor([1.0, 2.0]).to(self.device, self.dtype)
        return x + self.plain[0]


class Restores(nn.Module):
    """A module that restores its state by code, which torch.jit.load runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[dict[str, Tensor], bool]:
        return {"weight": self.weight}, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[dict[str, Tensor], bool]) -> None:
        print("run")
        self.weight = state[0]["weight"]
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def saved(path: Path, module: Any) -> Path:
    torch.jit.save(module, str(path))
    return path


def agree(path: Path) -> None:
    assert_same(opened(path, "TorchScript"), torch.jit.load(str(path)).state_dict())


def test_scripted_module(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", torch.jit.script(Everything()))
    agree(path)
    assert "plain" not in opened(path, "TorchScript")


def test_traced_module(tmp_path: Path) -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GELU(), nn.Conv2d(4, 2, 1)).half()
            self.register_buffer("size", torch.tensor(224))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers.float()(x) + self.size + torch.randn(2, 1, 1)

    agree(saved(tmp_path / "x", torch.jit.trace(Traced(), torch.ones(1, 3, 4, 4), check_trace=False)))


def test_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "layers": 2, "width": 64, "head_width": 32, "patch_size": 4},
        text_cfg={"context_length": 4, "vocab_size": 10, "width": 8, "heads": 2, "layers": 1},
    )
    inputs = (torch.ones(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.long))
    traced = torch.jit.trace(model.eval(), inputs, check_trace=False)
    path = saved(tmp_path / "x", traced)
    agree(path)
    assert any(key.endswith("attn.in_proj_weight") for key in opened(path, "TorchScript"))


def test_code_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x", torch.jit.script(nn.Sequential(Restores())))
    with pytest.raises(ContainerError, match=r"Restores' restores itself(.|\n)*executed"):
        opened(path, "TorchScript")
    assert capfd.readouterr().out == ""
    torch.jit.load(str(path))
    assert "run" in capfd.readouterr().out


def test_frozen_modules_have_no_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())))
    with pytest.raises(ContainerError, match="frozen"):
        opened(path, "TorchScript")


def changed(path: Path, change: Any) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_old_archives_do_not_list_buffers(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(2)
    path = saved(tmp_path / "x", torch.jit.script(module))

    def old(members: dict[str, bytes]) -> None:
        for name, data in members.items():
            if name.endswith(".py"):
                members[name] = b"\n".join(line for line in data.split(b"\n") if b"__buffers__" not in line)

    # Current torch leaves these buffers out, but they are weights.
    assert_same(opened(changed(path, old), "TorchScript"), dict(module.state_dict()))


def module_of(*parts: bytes) -> bytes:
    """A data.pkl of a module of the class __torch__.M; `parts` are the opcodes of its state."""
    return b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01}(" + b"".join(parts) + b"ub."


MODULE = b'class M(Module):\n  __parameters__ = ["a", ]\n  __buffers__ = []\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (module_of(b"X\x01\0\0\0ah\x01"), "nested"),  # a module in itself
        (module_of(b"X\x01\0\0\0acos\nsystem\n"), "os.system"),
        (module_of(b"X\x01\0\0\0ac__torch__x\nM\n"), "__torch__x.M"),
        (module_of(), "without parameters"),
        (b"\x80\x02c__torch__\nM\n)\x81.", "restores itself"),
        (b"\x80\x02c__torch__\nM\n)\x81]b.", "restores itself"),
        (b"\x80\x02c__torch__.gone\nM\n)\x81}b.", "no member"),
        (b"\x80\x02c__torch__./../../etc\nM\n)\x81}b.", "no member"),
        (b"\x80\x02c__torch__\nOther\n)\x81}b.", "without parameters"),
        (b"\x80\x02c__torch__\nM\n.", "restores itself"),
        (b"\x80\x02}.", "a dict, not of a module"),
    ],
)
def test_hostile_modules(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", data), ("constants.pkl", b"\x80\x02)."), ("code/__torch__.py", MODULE)):
            archive.writestr(f"m/{name}", content)
    with pytest.raises(ContainerError, match=message):
        opened(path, "TorchScript")
