"""Weights of other trainers start a backbone, whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from deepclust.errors import DataError, MissingError, RecipeError
from deepclust.export.backbone import export_backbone
from deepclust.models import Backbone, build_backbone, start_weights
from deepclust.models.layouts import match
from deepclust.models.start_weights import load_foreign
from deepclust.recipe import HUBS
from deepclust.stages.warm_start import load_weights

State = dict[str, Tensor]


def filled(backbone: Backbone) -> State:
    """A state of the backbone's shapes with other numbers."""
    random = torch.Generator().manual_seed(7)
    state = backbone.net.state_dict()
    return {
        k: torch.rand(v.shape, generator=random).to(v.dtype) if v.is_floating_point() else v + 3
        for k, v in state.items()
    }


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def conv4() -> Backbone:
    return build_backbone("conv4", image_size=16)


def dino(state: State) -> dict[str, Any]:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": under("module.backbone.", wrong),
        "teacher": under("backbone.", state) | {"head.mlp.0.weight": torch.ones(2)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": argparse.Namespace(arch="conv4"),
        "epoch": 3,
    }


def moco(state: State) -> dict[str, Any]:
    key = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "epoch": 3,
        "state_dict": under("module.encoder_k.", key) | under("module.encoder_q.", state),
    }


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "as it is": lambda state: state,
    "with a classifier": lambda state: state | {"fc.weight": torch.ones(2)},
    "DataParallel": lambda state: under("module.", state),
    "DINO": dino,
    "MoCo": moco,
    "SwAV": lambda s: under("module.", s) | {"module.prototypes.weight": torch.ones(2)},
    "DeepCluster": lambda s: {
        "state_dict": {k.replace(".", ".module.", 1): v for k, v in s.items()}, "arch": "alexnet"},
    "compiled": lambda state: {"model": under("_orig_mod.encoder.net.", state)},
    "old, without counts": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_read_whatever_is_around_the_network(layout: str, tmp_path: Path) -> None:
    backbone = conv4()
    state = filled(backbone)
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth")
    text = load_foreign(backbone, str(tmp_path / "w.pth"))
    for name, tensor in backbone.net.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(tensor, state[name]), name
    assert str(tmp_path / "w.pth") in text


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    backbone = conv4()
    torch.save(dino(filled(backbone)), tmp_path / "w.pth")
    text = load_foreign(backbone, str(tmp_path / "w.pth"))
    assert "under teacher/backbone." in text
    assert "not used: head.mlp.0.weight" in text


def test_our_own_exports_start_a_run_in_every_format(tmp_path: Path) -> None:
    theirs = build_backbone("resnet18", image_size=32, seed=5)
    theirs.net.load_state_dict(filled(theirs))
    for format_, name in (("torchvision", "a.pth"), ("safetensors", "a.safetensors")):
        export_backbone(theirs.eval(), tmp_path / name, format_, meta={})
        ours = build_backbone("resnet18", image_size=32)
        load_weights(ours, str(tmp_path / name))
        assert torch.equal(ours.net.conv1.weight, theirs.net.conv1.weight)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_networks_of_the_libraries_fit_the_backbones_of_their_name(
    kind: str, tmp_path: Path
) -> None:
    plain = {
        "resnet18": torchvision.models.resnet18(),
        "timm/vit_tiny_patch16_224": timm.create_model("vit_tiny_patch16_224"),
    }
    for name, net in plain.items():
        file = tmp_path / f"net.{kind}"
        save = torch.save if kind == "pth" else safetensors.torch.save_file
        save(net.state_dict(), file)
        backbone = build_backbone(name, image_size=224)
        load_foreign(backbone, str(file))
        images = torch.rand(1, 3, 224, 224)
        given = net.eval().forward_features(images) if "vit" in name else None
        if given is not None:
            torch.testing.assert_close(backbone.eval()(images), given[:, 0])
        assert "not used" in load_foreign(backbone, str(file))


def test_positions_are_interpolated_to_another_size() -> None:
    small = build_backbone("timm/vit_tiny_patch16_224", image_size=96)
    large = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    found = match(large.state_dict(), small.net.state_dict())
    assert found.is_whole
    assert found.resized == ["pos_embed"]
    assert found.state["pos_embed"].shape == (1, 37, 192)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"a.b": torch.ones(2)}, "no tensor of a conv4: its tensors are a.b"),
        (lambda s: {}, "holds no tensors"),
        (lambda s: dict(list(s.items())[3:]), "Missing: "),
        (lambda s: {k: v[..., :1] if v.ndim == 4 else v for k, v in s.items()}, "Of another shape"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    spoil: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    backbone = conv4()
    before = backbone.export_state()
    torch.save(spoil(filled(backbone)), tmp_path / "w.pth")
    with pytest.raises(RecipeError, match=message):
        load_foreign(backbone, str(tmp_path / "w.pth"))
    assert all(torch.equal(before[k], v) for k, v in backbone.export_state().items())


class Danger:
    """What a pickle could execute: it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": Danger(tmp_path / "made")}, tmp_path / "w.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:50])
    torch.save([1], tmp_path / "list.pth")
    for name in ("w.pth", "half.pth", "list.pth"):
        with pytest.raises(DataError, match=name):
            load_foreign(conv4(), str(tmp_path / name))
    assert not (tmp_path / "made").exists()
    with pytest.raises(MissingError, match=r"none\.pth"):
        load_foreign(conv4(), str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet99", "no network resnet99"),
        ("torchvision:resnet18@V9", "no weights V9 of resnet18"),
        ("timm:resnet99", "timm has no weights of resnet99"),
    ],
)
def test_a_wrong_name_is_said_without_a_network(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_foreign(conv4(), source)


def test_the_recipe_knows_the_names_of_all_hubs() -> None:
    assert [hub.rstrip(":") for hub in HUBS] == list(start_weights.SCHEMES)


class Hub(http.server.BaseHTTPRequestHandler):
    """The few pages of the Hugging Face hub that its client asks for one repository."""

    folder: Path
    sha = "0" * 40

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.partition("?")[0].rsplit("/", 1)[-1]
        if self.path.startswith("/api/models/"):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            facts = {"id": "me/net", "sha": self.sha, "siblings": files}
            tree = [{"type": "file", "path": p.name, "oid": "0" * 40, "size": p.stat().st_size}
                    for p in self.folder.iterdir()]  # fmt: skip
            data = json.dumps(tree if "/tree/" in self.path else facts).encode()
        elif (self.folder / name).is_file():
            data = (self.folder / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A server on this machine, of the files in tmp_path/hub."""
    (tmp_path / "hub").mkdir()
    handler = type("Here", (Hub,), {"folder": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_weights_come_from_a_hugging_face_hub(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, hf_api

    backbone = conv4()
    safetensors.torch.save_file(filled(backbone), tmp_path / "hub" / "model.safetensors")
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    page = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", page)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub)
    config = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(config))
    text = load_foreign(backbone, "hf-hub:me/net")
    assert start_weights.normalisation_of("hf-hub:me/net") == ((0.5,) * 3, (0.25,) * 3)
    assert text.startswith("hf-hub:me/net: ")
    assert torch.equal(backbone.net.state_dict()[key := next(iter(filled(backbone)))],
                       filled(backbone)[key])  # fmt: skip


def test_weights_come_from_torchvisions_server(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone("resnet18", image_size=32)
    file = tmp_path / "hub" / "new"
    torch.save(filled(backbone), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file.rename(file.with_name(f"resnet18-{digest}.pth"))
    weights = torchvision.models.ResNet18_Weights.DEFAULT.value
    before = weights.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    object.__setattr__(weights, "url", f"{hub}/resnet18-{digest}.pth")
    try:
        load_foreign(backbone, "torchvision:resnet18")
    finally:
        object.__setattr__(weights, "url", before)
    assert torch.equal(backbone.net.conv1.weight, filled(backbone)["conv1.weight"])


def test_a_hub_that_cannot_be_reached_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torchvision.models.ResNet18_Weights.DEFAULT.value
    before = weights.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    object.__setattr__(weights, "url", "http://127.0.0.1:9/resnet18-00000000.pth")
    try:
        with pytest.raises(DataError, match=r"give its path: init\.weights=FILE"):
            load_foreign(build_backbone("resnet18", image_size=32), "torchvision:resnet18")
    finally:
        object.__setattr__(weights, "url", before)


@pytest.mark.parametrize(
    ("source", "mean", "std"),
    [
        ("timm:vit_base_patch16_224.augreg_in21k", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("torchvision:resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_a_library_says_how_images_of_its_weights_were_normalised(
    source: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    assert start_weights.normalisation_of(source) == (mean, std)
    assert start_weights.normalisation_of("a.pth") is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
    ],
)
def test_the_configuration_beside_published_weights_says_it_too(
    tmp_path: Path, name: str, config: dict[str, object]
) -> None:
    (tmp_path / name).write_text(json.dumps(config))
    for weights in ("model.safetensors", "pytorch_model.bin"):
        own = start_weights.normalisation_of(str(tmp_path / weights))
        assert own == ((0.5,) * 3, (0.25,) * 3)
    assert start_weights.normalisation_of(str(tmp_path / "mine.pth")) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"image_mean": [1], "image_std": [0]}', '{"mean": ["a"], "std": [1]}',
             '{"image_mean": [0.5, 0.5], "image_std": [1]}', '{"mean": NaN, "std": [1]}'],
)  # fmt: skip
def test_a_configuration_without_usable_numbers_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert start_weights.normalisation_of(str(tmp_path / "model.safetensors")) is None
