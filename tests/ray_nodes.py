"""A Ray cluster on loopback whose nodes come and go while an extraction is at work on it.

A program: ``python ray_nodes.py PICTURES STORE LEVELS``. It starts a head and two nodes of a core
each, runs ``sam3cache extract --engine ray`` on them, kills one as soon as some blocks are done,
adds another, and ends with the command's own exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def num_blocks_done(store: Path) -> int:
    return len(list((store / "receipts" / "samples").glob("*.json")))


def main(pictures: str, store: Path, levels: str) -> int:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    lost = cluster.add_node(**NODE)
    cluster.add_node(**NODE)
    command = [sys.executable, "-m", "sam3cache", "extract", pictures, "-o", str(store)]
    command += ["--levels", levels, "--backbone", "sam3-mini", "--engine", "ray"]
    extraction = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address})
    try:
        while num_blocks_done(store) < 2:
            assert extraction.poll() is None, "it has ended before a node could be lost"
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        sys.stdout.write(f"a node was lost with {num_blocks_done(store)} blocks done\n")
        cluster.add_node(wait=False, **NODE)
        sys.stdout.write(f"one was added with {num_blocks_done(store)} blocks done\n")
        return extraction.wait()
    finally:
        extraction.kill()
        extraction.wait()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
