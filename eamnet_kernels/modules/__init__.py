"""CMAM, EAB and MRCF as `torch.nn.Module`, for any network: (B,C,H,W) in, (B,C,H,W) out."""

from eamnet_kernels.modules.cmam import CMAM
from eamnet_kernels.modules.eab import EAB
from eamnet_kernels.modules.gates import ChannelGate, SpatialGate
from eamnet_kernels.modules.mrcf import MRCF

__all__ = ["CMAM", "EAB", "MRCF", "ChannelGate", "SpatialGate"]
