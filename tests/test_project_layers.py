"""The layers: a module imports only from the layers below it, inside functions too."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sam3cache"

VALUES = {
    *("errors", "records", "geometry", "metrics", "runtime", "tasks", "variants"),
    *("views", "groups", "pages"),
}
TRAINING_SIDE = VALUES | {"features", "heads", "loading"}
BELOW_COMMANDS = TRAINING_SIDE | {"images", "backbone", "extract", "training", "evaluation"}

# By part of the package, the parts that it may import.
MAY_IMPORT = {
    "errors": set[str](),
    "records": {"errors"},
    "geometry": {"errors", "records"},
    "metrics": {"errors", "records", "geometry"},
    "runtime": {"errors", "records"},
    "tasks": {"records"},
    "variants": {"errors", "records"},
    "views": set[str](),
    "groups": {"errors", "views"},
    "pages": {"records", "geometry"},
    "images": VALUES,
    "backbone": VALUES,
    "features": VALUES,
    "heads": VALUES,
    "testing": VALUES | {"heads"},
    "checking": VALUES | {"images"},
    "extract": VALUES | {"images", "backbone", "features"},
    "loading": VALUES | {"features"},
    "training": TRAINING_SIDE,
    "evaluation": TRAINING_SIDE,
    "inference": BELOW_COMMANDS,
    "commands": BELOW_COMMANDS | {"checking", "inference"},
}

# What only some parts may know, beyond the standard library and what all of them use.
ONLY_IN = {
    "click": {"commands"},
    "rich": {"commands"},
    "sam3": {"backbone"},
    "transformers": {"backbone"},
    "huggingface_hub": {"backbone"},
    "PIL": {"images", "pages"},
    "matplotlib": {"pages", "evaluation"},
    "jinja2": {"pages"},
    "tifffile": {"images"},
    "imagecodecs": {"images"},
    "zarr": {"features"},
    "boto3": {"features"},
    "botocore": {"features"},
    "ray": {"extract"},
    "pyarrow": {"features", "images"},
    "h5py": {"features", "images"},
    "pydicom": {"images"},
}

# The root is where the public API is told, and where the program starts.
ROOT_MODULES = {"__init__", "__main__"}


def imported_names(source: str) -> Iterator[str]:
    """Absolute dotted names that a source imports at run time, at any depth."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for part in node.body for inner in ast.walk(part))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            # `from sam3cache import features` names its part among the aliases.
            if node.module == "sam3cache":
                yield from (f"sam3cache.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def offences(part: str, source: str) -> list[str]:
    """What a module of ``part`` imports although its layer forbids it."""
    found = []
    for name in imported_names(source):
        top, _, rest = name.partition(".")
        if top == "sam3cache":
            other = rest.partition(".")[0]
            # The package itself, for its version.
            if other in {part, "", "__version__"}:
                continue
            if other not in MAY_IMPORT[part]:
                found.append(f"{part} imports sam3cache.{other}")
        elif part not in ONLY_IN.get(top, {part}):
            found.append(f"{part} imports {top}")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if part_of(path) not in ROOT_MODULES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    assert part_of(path) in MAY_IMPORT, "a new part of the package needs a layer"
    assert offences(part_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path",
    [PACKAGE / "pages.py", *sorted((PACKAGE / "evaluation").rglob("*.py"))],
    ids=lambda path: path.name,
)
def test_pages_encode_pictures_and_never_decode_a_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    called = {ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)}
    assert called.isdisjoint({"Image.open", "PIL.Image.open"})
    # What draws the page is imported when one is drawn: it takes longer than all of the rest.
    at_once = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = imported_names("\n".join(map(ast.unparse, at_once)))
    assert {"matplotlib", "jinja2", "PIL"}.isdisjoint(name.partition(".")[0] for name in names)
    assert not {"imread", "pyplot"} & set(re.findall(r"\w+", source))


def test_every_part_that_has_a_layer_exists() -> None:
    assert {part_of(path) for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("part", "source", "offence"),
    [
        ("training", "import sam3", "training imports sam3"),
        ("training", "def f():\n    from sam3.model import vitdet", "training imports sam3"),
        ("loading", "from PIL import Image", "loading imports PIL"),
        ("training", "from matplotlib.figure import Figure", "training imports matplotlib"),
        ("commands", "import jinja2", "commands imports jinja2"),
        ("heads", "from sam3cache.features import open_store", "heads imports sam3cache.features"),
        ("features", "from sam3cache import images", "features imports sam3cache.images"),
        ("training", "import sam3cache.evaluation", "training imports sam3cache.evaluation"),
        ("extract", "import click", "extract imports click"),
        ("errors", "import sam3cache.records", "errors imports sam3cache.records"),
        (
            "loading",
            "import importlib\nimportlib.import_module('sam3cache.backbone')",
            "loading imports sam3cache.backbone",
        ),
        (
            "heads",
            "if TYPE_CHECKING:\n    import zarr\nelse:\n    import pyarrow",
            "heads imports pyarrow",
        ),
    ],
)
def test_an_import_across_layers_is_found(part: str, source: str, offence: str) -> None:
    assert offences(part, source) == [offence]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("inference", "from sam3cache.training import train"),
        ("records", "from sam3cache.errors import ConfigError"),
        ("heads", "if TYPE_CHECKING:\n    from sam3cache.features import FeatureStore"),
        ("features", "from sam3cache.features.shards import encode"),
        ("commands", "import rich\nfrom sam3cache import __version__"),
    ],
)
def test_an_import_along_the_layers_is_allowed(part: str, source: str) -> None:
    assert offences(part, source) == []
