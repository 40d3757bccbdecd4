"""Fused operators for attention and multi-dilation convolution, as they are used in EAM-Net.

- `functional`: the five operators.
- `CMAM`, `EAB`, `MRCF`: the modules built from them.
- `use_backend`, `backends.explain`: which implementation runs, and why.
- `tune`: search for better block sizes of the Triton kernels on the card at hand.
- `patch`: put the operators into somebody else's network, and take them out again.
"""

from eamnet_kernels import backends, functional, patch, tune
from eamnet_kernels.backends import explain, use_backend
from eamnet_kernels.modules import CMAM, EAB, MRCF

__version__ = "0.1.0"

__all__ = [
    "CMAM",
    "EAB",
    "MRCF",
    "backends",
    "explain",
    "functional",
    "patch",
    "tune",
    "use_backend",
]
