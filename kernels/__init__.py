"""The GPU's kernels, in Triton: a leaf, which imports nothing of cibp_fast.

Importing this package does not import Triton; its modules do.

A batch in here is one contiguous tensor [S, N, H, W, C] of S = 3 streams: center m, radius r and
nominal z; or the first two. After ReLU m and r tell the state of a unit:

    m = mu, r = radius      where mu > radius (active)
    m = r = (mu + radius)/2 where mu + radius > 0 (unstable)
    m = r = 0               elsewhere (dead)

so that the bounds are m - r and m + r. NaN stays NaN.
"""
