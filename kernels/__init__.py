"""The GPU's kernels, in Triton, and (`cuda`) launches of those in CUDA C++, which need no Triton.

Importing this package does not import Triton; its modules but `cuda` do.

A batch in here is one contiguous tensor [S, N, H, W, C] of S = 3 streams: center m, radius r and
nominal z; or the first two. After ReLU m and r tell the state of a unit, as in csrc/cpu/layers.h:

    m = mu, r = radius      where mu > radius (active)
    m = r = (mu + radius)/2 where mu + radius > 0 (unstable)
    m = r = 0               elsewhere (dead)

so that the bounds are m - r and m + r. NaN stays NaN.
"""
