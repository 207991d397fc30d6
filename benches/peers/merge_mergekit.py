"""A recipe with mergekit: seconds and peak memory, as one JSON line.

    python benches/peers/merge_mergekit.py RECIPE OUT
"""

import json
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

command = [str(Path(sys.executable).parent / "mergekit-yaml"), *sys.argv[1:], "--no-write-model-card", "--random-seed", "0"]
if threads := os.environ.get("THREADS"):
    command += ["--num-threads", threads]
began = time.perf_counter()
ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - began
if ran.returncode:
    sys.exit(ran.stderr[-2000:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"bench": "merge", "seconds": round(seconds, 2), "peak_rss_mb": round(peak), "peers": {"mergekit": version("mergekit")}}))
