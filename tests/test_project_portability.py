"""Linux and Windows: what only one of them has is used only where a guard stands beside it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sam3cache"

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "select"}
NAMES = re.compile(
    r"os\.(fork|forkpty|pread|pwrite|preadv|pwritev|sendfile|posix_\w+|getuid|geteuid|chown"
    r"|mkfifo|killpg|setsid|statvfs|sched_\w+|getloadavg|O_DIRECT|O_DIRECTORY|O_NOFOLLOW|O_SYNC)"
    r"|signal\.(SIGKILL|SIGHUP|SIGUSR1|SIGUSR2|SIGALRM|SIGCHLD|alarm|setitimer|pthread_kill)"
    # Flushing a directory needs os.open, which cannot open one on Windows.
    r"|os\.open"
    # Where the target exists, renaming fails on Windows; os.replace does not.
    r"|os\.rename"
)
PATHS = re.compile(r"/(proc|dev|sys|tmp|etc)/")

# By file and use, the guard that it stands behind.
GUARDED = {
    ("runtime.py", "/proc/cpuinfo"): 'sys.platform == "linux"',
    ("runtime.py", "/proc/self/status"): 'sys.platform == "linux"',
    ("runtime.py", "/proc/self/cgroup"): 'sys.platform == "linux"',
    ("runtime.py", "/sys/fs/cgroup"): 'sys.platform == "linux"',
    ("runtime.py", "os.open"): 'os.name != "posix"',
    ("loading/shared.py", "/dev/shm"): 'sys.platform == "linux"',
}


def unportable_uses(source: str) -> Iterator[str]:
    """What a source uses that only one of the systems understands, or that each reads its way."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name in MODULES)
            case ast.ImportFrom(module=str(module)) if module in MODULES:
                yield module
            case ast.Attribute() if NAMES.fullmatch(name := ast.unparse(node)):
                yield name
            case ast.Constant(value=str(text)) if PATHS.match(text):
                yield text
            case ast.Constant(value="fork" | "forkserver"):
                yield node.value
            case ast.Call() if opens_text_without_encoding(node):
                yield ast.unparse(node)


def opens_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the system prefers."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    name = ast.unparse(call.func).rpartition(".")[2]
    if name in {"read_text", "write_text"}:
        return not any(keyword.arg is None for keyword in call.keywords)
    if name != "open":
        return False
    mode = call.args[1:2] if isinstance(call.func, ast.Name) else call.args[:1]
    match mode:
        case []:
            return not call.keywords and len(call.args) == isinstance(call.func, ast.Name)
        case [ast.Constant(value=str(text))]:
            return re.fullmatch(r"[rwax+t]+", text) is not None
        case _:  # the open() of some other class
            return False


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_code_runs_on_linux_and_windows(path: Path) -> None:
    name, source = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
    allowed = {use for (file, use), guard in GUARDED.items() if file == name and guard in source}
    assert set(unportable_uses(source)) <= allowed


@pytest.mark.parametrize(("file", "use"), GUARDED)
def test_every_allowed_use_is_still_there(file: str, use: str) -> None:
    assert use in set(unportable_uses((PACKAGE / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("import fcntl", "fcntl"),
        ("def f():\n    import resource", "resource"),
        ("pid = os.fork()", "os.fork"),
        ("get_context('fork')", "fork"),
        ("os.preadv(file, buffers, offset)", "os.preadv"),
        ("flags = os.O_RDONLY | os.O_DIRECT", "os.O_DIRECT"),
        ("os.kill(pid, signal.SIGKILL)", "signal.SIGKILL"),
        ("os.fsync(os.open(folder, os.O_RDONLY))", "os.open"),
        ("os.rename(temporary, path)", "os.rename"),
        ("Path('/proc/self/status')", "/proc/self/status"),
        ("open(path)", "open(path)"),
        ("path.open('w', newline='')", "path.open('w', newline='')"),
        ("path.read_text()", "path.read_text()"),
    ],
)
def test_code_for_one_system_alone_is_found(source: str, use: str) -> None:
    assert list(unportable_uses(source)) == [use]


@pytest.mark.parametrize(
    "source",
    [
        "os.replace(temporary, path)",
        "path.open('rb')",
        "open(path, 'wb')",
        "path.open('w', encoding='utf-8', newline='')",
        "Image.open(path)",
        "# os.fork would be quicker",
        "path.read_text(encoding='utf-8')",
    ],
)
def test_portable_code_is_left_alone(source: str) -> None:
    assert list(unportable_uses(source)) == []
