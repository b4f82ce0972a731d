"""SLURM on one machine, for the length of a test: munged, slurmctld and slurmd, in a folder.

As root alone, since slurmd starts jobs; from Debian's package slurm-wlm and those it needs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Say why SLURM cannot be started here; nothing where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed (Debian: slurm-wlm): no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "slurmd is started by root"


@contextmanager
def slurm_node(folder: Path, num_cpus: int = 2, patience_s: float = 60) -> Iterator[dict[str, str]]:
    """Start SLURM and end it; yields the environment that its commands need.

    Args:
        folder: empty; a short path, as a socket lies in it.
        num_cpus: that it shares out, whether or not there are so many.
        patience_s: how long to wait for the node to be there.
    """
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = {"controller_port": one.getsockname()[1], "node_port": other.getsockname()[1]}
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(host=host, folder=folder, num_cpus=num_cpus, **ports),
        encoding="utf-8",
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    munged = ["munged", "--foreground", "--force", "--key-file", str(key)]
    munged += ["--socket", str(folder / "munge.socket"), "--pid-file", str(folder / "munge.pid")]
    munged += ["--log-file", str(folder / "munge.log"), "--seed-file", str(folder / "munge.seed")]
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    with ExitStack() as ends:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            output = ends.enter_context((folder / f"{command[0]}.out").open("wb"))
            daemon = psutil.Popen(command, env=environment, stdout=output, stderr=output)
            ends.callback(_end, daemon)
            if command is munged:
                _wait_for((folder / "munge.socket").exists, patience_s)
        _wait_for(lambda: "idle" in _states(environment), patience_s)
        yield environment


def _states(environment: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _wait_for(condition, patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "SLURM does not come up"
        time.sleep(0.2)


def _end(daemon: psutil.Popen) -> None:
    family = [*daemon.children(recursive=True), daemon]
    daemon.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
