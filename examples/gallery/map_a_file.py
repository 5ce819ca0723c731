"""
One packed file, mapped by several processes
============================================

A file of packed weights serves every CPU, and loading it copies nothing: the weights are pages of the file, which all
processes of a machine share. This example saves some layers, loads them in three processes, and asks Linux whose their
memory is.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import pyda8w4

rng = np.random.default_rng(0)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name, "model.safetensors")

# %%
# Pack once
# ---------

layers = {f"layers.{i}.up": pyda8w4.quantize(rng.standard_normal((2048, 1024), dtype=np.float32), 64) for i in range(8)}
pyda8w4.save(path, layers)
print(f"{path.stat().st_size / 1e6:.1f} MB, of {sum(4 * 2048 * 1024 for _ in layers) / 1e6:.1f} MB in float32")

# %%
# Load anywhere
# -------------
#
# ``load`` verifies checksums, which reads the file once; ``verify=False`` leaves that to the first product. Slices
# and shards of what is loaded are views of the file, too.

loaded = pyda8w4.load(path)
print(loaded["layers.0.up"])

# %%
# Several processes
# -----------------
#
# Each of these workers loads the file, multiplies by all layers, and waits until the others have done so. Then it reads
# what Linux says of its memory in this file: the resident pages, and which of them are its own.

WORKER = """
import re, sys
import numpy as np
import pyda8w4

path = sys.argv[1]
layers = pyda8w4.load(path)
x = np.ones((1, 1024), np.float32)
total = sum(float(pyda8w4.linear(x, layer).sum()) for layer in layers.values())
print(flush=True)  # ready
sys.stdin.readline()  # so are the others

maps = re.split(r"^(?=[0-9a-f]+-)", open("/proc/self/smaps").read(), flags=re.MULTILINE)
text = "".join(map for map in maps if path in map)
megabytes = {key: sum(map(int, re.findall(rf"^{key}: +(\\d+)", text, re.MULTILINE))) / 1e3
             for key in ("Rss", "Pss", "Private_Dirty")}
print(f"sum {total:.6f}; resident {megabytes['Rss']:.1f} MB, its share of these {megabytes['Pss']:.1f} MB, "
      f"of its own {megabytes['Private_Dirty']:.1f} MB", flush=True)
sys.stdin.readline()  # the others have read theirs
"""

del loaded  # this process is not to be counted
command = [sys.executable, "-c", WORKER, str(path)]
workers = [
    subprocess.Popen(command, cwd=folder.name, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(3)
]
for worker in workers:
    worker.stdout.readline()
for worker in workers:
    worker.stdin.write("\n")
    worker.stdin.flush()
    print(worker.stdout.readline().strip())
for worker in workers:
    worker.communicate()

# %%
# Whatever the CPU of a machine is, the sums are the same: the layout of the file does not depend on it, nor do the
# products.

folder.cleanup()
