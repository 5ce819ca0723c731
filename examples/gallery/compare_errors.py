"""
Quantize a matrix, and see what it costs
========================================

A linear layer takes two steps: its weights are quantized and packed once, and each call quantizes its activations and
multiplies. This example compares both with float32: in bytes, in the error of the weights, and in that of outputs.
"""

import numpy as np

import pyda8w4

rng = np.random.default_rng(0)
w = rng.standard_normal((1024, 1024), dtype=np.float32)  # (N, K): output and input features, as in torch.nn.Linear
x = rng.standard_normal((16, 1024), dtype=np.float32)
exact = x.astype(np.float64) @ w.T.astype(np.float64)


def error(got, wanted):
    """The norm of the difference, in percent of the norm of what is wanted."""
    return 100 * np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


# %%
# The weights
# -----------
#
# Weights become codes of 4 bits. Those of a group share a scale and an offset, which :func:`pyda8w4.quantize` searches
# for little squared error. Small groups follow the weights better, and take more bits.

for group_size in 16, 32, 64, 128, 1024:
    packed = pyda8w4.quantize(w, group_size)
    bits = 8 * packed.nbytes / w.size
    print(f"groups of {group_size:4}: {bits:.2f} bits a weight, error {error(packed.dequantize(), w):5.2f} %")

# %%
# Nothing is hidden in a packed weight: its ``repr`` says what it is, and ``dequantize`` gives the floats that it stands
# for.

packed = pyda8w4.quantize(w, group_size=64)
print(packed)
print(packed.dequantize()[0, :4], "was", w[0, :4])

# %%
# The product
# -----------
#
# :func:`pyda8w4.linear` quantizes each row of ``x`` and multiplies. Its error has two parts. That of the weights is
# fixed when they are quantized; that of the activations is chosen in each call, by ``act``. Here they are apart: first
# beside the product with the weights as they are packed, then beside that with those from before.

of_packed = x.astype(np.float64) @ packed.dequantize().T.astype(np.float64)
for act in "uint8", "int8", "int8_group", "int16":
    y = pyda8w4.linear(x, packed, act=act)
    print(f"{act:10}  activations {error(y, of_packed):6.3f} %, with weights {error(y, exact):5.2f} %")

# %%
# ``int16`` is as good as float. These numbers are random; :doc:`/accuracy` says what models lose.

# %%
# The same bits everywhere
# ------------------------
#
# The result does not depend on the kernel, which differs between CPUs, on the number of rows, or on that of threads.

y = pyda8w4.linear(x, packed)
for kernel in pyda8w4.kernels():
    with pyda8w4.use_kernel(kernel):
        print(f"{kernel}: equal {np.array_equal(pyda8w4.linear(x, packed), y)}")
print("one row alone: equal", np.array_equal(pyda8w4.linear(x[3], packed), y[3]))
