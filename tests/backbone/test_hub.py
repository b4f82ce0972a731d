"""Weights from the hub: the real client in a process of its own, against a server on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from towers import UNIT

from sam3cache.backbone import weights_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from dataclasses import replace
from towers import UNIT
from sam3cache.backbone import weights_sha256
from sam3cache.errors import WeightsError
unit = replace(UNIT, hub_repo="acme/tower", hub_file="tower.pt")
answers = []
for backbone, weights in json.loads(sys.argv[1]):
    try:
        answers.append(weights_sha256(unit if backbone == "unit" else backbone, weights))
    except WeightsError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Hub:
    url: str
    requests: list[str]


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does to a client without access, by repository."""

    def __init__(self, tower: bytes, requests: list[str], *args: Any) -> None:
        self.tower = tower
        self.requests = requests
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        repo = "/".join(self.path.split("/")[1:3])
        self.requests.append(f"{self.command} {repo}")
        if repo == "acme/tower":
            self.send(200, {"ETag": '"1"'}, self.tower)
        elif repo == "facebook/sam3":
            self.send(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is\nlimited"})
        elif repo == "facebook/sam3.1":
            self.send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Not in the list"})
        elif repo == "acme/empty":
            self.send(404, {"X-Error-Code": "EntryNotFound"})
        elif repo == "acme/cut":
            self.send(200, {"ETag": '"2"'}, self.tower, num_sent=1000)
        else:
            self.send(401, {"X-Error-Code": "RepoNotFound"})

    def send(
        self, status: int, headers: dict[str, str], body: bytes = b"", num_sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " "))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:num_sent])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(checkpoints: dict[str, Path]) -> Iterator[Hub]:
    requests: list[str] = []
    handler = partial(Handler, checkpoints["tower"].read_bytes(), requests)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Hub(f"http://127.0.0.1:{server.server_port}", requests)
        server.shutdown()
        thread.join()


def ask(cache: Path, questions: list[tuple[str, str | None]], **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        cwd=cache,
        env=os.environ
        | {
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answers: list[str] = json.loads(result.stdout)
    assert not any("\n" in answer for answer in answers)
    return answers


PROBLEMS = {
    ("sam3", None): ("facebook/sam3/sam3.pt", "access is gated"),
    ("sam3.1", None): ("facebook/sam3.1/sam3.1_multiplex.pt", "access is gated"),
    ("sam3", "acme/none"): (
        "acme/none/sam3.pt",
        "neither a file here nor a repository that this account can see",
    ),
    ("unit", "acme/empty"): ("acme/empty/tower.pt", "the repository holds no tower.pt"),
    ("unit", "acme/cut"): ("acme/cut/tower.pt", "the download failed ("),
}
FOUND = [("unit", None), ("unit", "acme/tower")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def answers(hub: Hub, cache: Path) -> dict[tuple[str, str | None], str]:
    """What one process with a network is told, by what it asks for."""
    questions = [*PROBLEMS, *FOUND]
    return dict(zip(questions, ask(cache, questions, HF_ENDPOINT=hub.url), strict=True))


@pytest.mark.parametrize("question", PROBLEMS)
def test_weights_that_cannot_be_had_are_one_line_on_how_to_get_them(
    answers: dict[tuple[str, str | None], str], question: tuple[str, str | None]
) -> None:
    file, problem = PROBLEMS[question]
    answer = answers[question]
    assert answer.startswith(f"{file}: {problem}")
    repo = file.rpartition("/")[0]
    assert f"accept the licence at https://huggingface.co/{repo}" in answer
    assert "`hf auth login`" in answer
    assert "--weights PATH" in answer


def test_weights_are_fetched_once_and_then_found_without_the_network(
    hub: Hub,
    answers: dict[tuple[str, str | None], str],
    cache: Path,
    checkpoints: dict[str, Path],
) -> None:
    expected = weights_sha256(UNIT, checkpoints["tower"])
    assert [answers[question] for question in FOUND] == [expected, expected]
    assert sorted(hub.requests.count(f"{method} acme/tower") for method in ("HEAD", "GET")) == [
        1,
        1,
    ]
    offline, absent = ask(cache, [("unit", None), ("sam3", None)], HF_HUB_OFFLINE="1")
    assert offline == expected
    assert absent.startswith(
        "facebook/sam3/sam3.pt: not in the local cache, and the hub cannot be reached; accept"
    )
