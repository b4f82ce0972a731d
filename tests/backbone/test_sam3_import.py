"""What importing sam3 does to a process, and what happens when it cannot be imported."""

import subprocess
import sys
from pathlib import Path


def run_python(program: str, *, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )


def test_sam3_is_imported_with_the_first_tower_silently_and_leaves_tf32_as_it_was() -> None:
    """sam3 switches TF32 on where it sees an Ampere GPU, so it is shown one here."""
    result = run_python(
        """
import sys, types, torch
from sam3cache.backbone import BACKBONES, TowerSpec, load_tower, weights_sha256
weights_sha256("sam3-mini")
assert not any(name.partition(".")[0] in ("sam3", "torchvision") for name in sys.modules)
torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda: True
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(major=9)
switched = []
matmul = type(torch.backends.cuda.matmul)
original = matmul.__setattr__
def record(self, name, value):
    switched.append((name, value))
    original(self, name, value)
matmul.__setattr__ = record
before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
assert before == (False, True)
load_tower("sam3-mini")
assert "sam3" in sys.modules
assert ("allow_tf32", True) in switched, "sam3 no longer switches TF32 on"
assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == ""


BROKEN = {
    "operator torchvision::nms does not exist": (
        "torchvision",
        "raise RuntimeError('operator torchvision::nms does not exist')",
    ),
    "undefined symbol": ("torchvision", "raise OSError('_C.so: undefined symbol: _ZN3c10')"),
    "has no attribute 'extension'": (
        "torchvision",
        "raise AttributeError('torchvision has no attribute \\'extension\\'')",
    ),
    "No module named 'timm'": ("sam3", "raise ModuleNotFoundError('No module named \\'timm\\'')"),
    "No module named 'sam3.model'": ("sam3", ""),
}


def test_a_broken_installation_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    for index, (package, source) in enumerate(BROKEN.values()):
        folder = tmp_path / str(index) / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source, encoding="utf-8")
    result = run_python(
        f"""
import sys
from sam3cache.backbone import load_tower
from sam3cache.errors import ConfigError
for index in range({len(BROKEN)}):
    sys.path.insert(0, str(index))
    try:
        load_tower("sam3-mini")
    except ConfigError as error:
        print(error)
    for name in [name for name in sys.modules if name.startswith(("sam3.", "torchvision"))]:
        del sys.modules[name]
    sys.modules.pop("sam3", None)
    sys.path.pop(0)
""",
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line, reason in zip(lines, BROKEN, strict=True):
        assert reason in line
        assert "torch and torchvision of one build" in line
