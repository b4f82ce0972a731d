import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from picture_folder import write_images
from torch.overrides import TorchFunctionMode

from sam3cache.commands import doctor as doctor_module
from sam3cache.commands import main
from sam3cache.commands.doctor import OTHER_PARTS, TOWER_PARAMETERS, Finding


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one whole run found on this machine, by name."""
    folder = tmp_path_factory.mktemp("store")
    done = CliRunner().invoke(
        main, ["doctor", "--json", "--device", "cpu", "--path", str(folder)], catch_exceptions=False
    )
    report = json.loads(done.stdout)
    assert done.exit_code == (0 if report["ok"] else 1)
    assert not list(folder.iterdir())
    return {finding["name"]: finding for finding in report["findings"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAM 3, for images", "840,509,750"),
        ("its vision tower", "454,039,808 (54%): trunk 446,237,696, neck 7,802,112"),
        ("trainable", "0"),
        ("torch", torch.__version__.partition("+")[0]),
    ],
)
def test_the_doctor_counts_what_is_run(findings: Any, name: str, value: str) -> None:
    assert findings[name]["value"].partition("+")[0] == value


@pytest.mark.parametrize(
    ("picture", "content"),
    [
        ("800 x 600", "1008 x 756"),
        ("512 x 768", "672 x 1008"),
        ("1024 x 1024", "1008 x 1008"),
        ("640 x 480", "1008 x 756"),
    ],
)
def test_every_picture_size_reaches_the_features(findings: Any, picture: str, content: str) -> None:
    way = f"-> {content} on 1008 x 1008 -> fpn_72 256 x 72 x 72 in "
    assert findings[picture]["value"].startswith(way)
    assert not findings[picture]["problem"]


def test_the_disk_is_measured(findings: Any) -> None:
    for name in ("write, flushed to the disk", "read, while in memory"):
        assert float(findings[name]["value"].removesuffix(" MB/s").replace(",", "")) > 0


class OnMeta(TorchFunctionMode):
    """Sends what sam3 would put on a CUDA device to the meta device, too."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:  # whose values are read while building
            kwargs["device"] = "cpu"
        elif str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def test_sam3_itself_builds_the_parts_that_the_doctor_lists(tmp_path: Path) -> None:
    from sam3.model_builder import build_sam3_image_model

    # Only the vocabulary's length matters for the size of the model.
    vocabulary = tmp_path / "vocabulary.txt.gz"
    with gzip.open(vocabulary, "wt", encoding="utf-8") as file:
        file.write("header\n" + "\n".join(f"a{i} b{i}" for i in range(49152 - 256 - 2)))
    with torch.device("meta"), OnMeta():
        model = build_sam3_image_model(str(vocabulary), device="meta", load_from_HF=False)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == 840_509_750 == TOWER_PARAMETERS + sum(OTHER_PARTS.values())
    assert count(model.backbone.vision_backbone) == TOWER_PARAMETERS
    assert list(OTHER_PARTS.values()) == [
        count(part)
        for part in (
            model.backbone.language_backbone,
            model.transformer,
            model.geometry_encoder,
            model.segmentation_head,
            model.dot_prod_scoring,
        )
    ]


@pytest.mark.skipif(os.name == "nt", reason="a stand-in for nvidia-smi needs a POSIX shell")
def test_a_card_that_torch_cannot_use_is_the_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch uses this machine's card")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200'\necho 'NVIDIA L4'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = list(doctor_module._devices())[-1]
    assert found.value == "NVIDIA H200, NVIDIA L4"
    expected = "built for the CPU alone" if torch.version.cuda is None else "hides every card"
    assert expected in found.problem


def test_a_machine_without_a_card_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu, cuda = doctor_module._devices()
    assert cpu.name == "cpu"
    assert cuda == Finding("Devices", "cuda", "no NVIDIA card, or no driver for one")


@pytest.mark.skipif(sys.platform != "linux", reason="uses a file system that holds nothing")
def test_a_disk_without_room_is_the_problem() -> None:
    (free,) = doctor_module._disk(Path("/proc/features"))
    assert "choose another --path" in free.problem


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["doctor", "--device", "cuda:99", "--path", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 2
    assert done.stderr.startswith("sam3cache: error: device cuda:99 is not there")
    assert done.stderr.count("\n") == 1


@pytest.mark.full_size
@pytest.mark.timeout(3600)
def test_the_full_tower_runs() -> None:
    found = list(doctor_module._pictures("sam3", "cpu", "fp32"))
    assert [finding.problem for finding in found] == [""] * 5
    assert found[-1].name == "a batch of 8"


def test_the_doctor_says_what_each_precision_keeps_of_ones_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, num_images=9)
    monkeypatch.setattr(doctor_module, "MOST_IMAGES", 1)
    pictures = doctor_module._pictures_in(tmp_path)
    assert [picture.source for picture in pictures] == ["00.png"]
    found = list(doctor_module._precisions(pictures, "sam3-mini", None, "cpu"))
    kept = {finding.name: finding.value for finding in found}
    assert len(kept) == 4 * 5
    errors = {name: float(value.split("error ")[1].split(",")[0]) for name, value in kept.items()}
    assert errors["fpn_72"] < 4e-4 < errors["fpn_72.r7"] < 3e-3 < errors["fpn_72.int8"] < 3e-2
    assert not any(finding.problem for finding in found)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--weights", "sam3.pt"), "--weights is for --images: name a folder of pictures, too"),
        (("--images", "nowhere"), "--images nowhere is no folder; give one that holds pictures"),
        (("--images", "."), "--images . holds no picture"),
    ],
)
def test_the_doctor_refuses_pictures_that_are_none(
    options: tuple[str, ...], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["doctor", *options], catch_exceptions=False)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"sam3cache: error: {line}")
