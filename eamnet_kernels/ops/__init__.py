"""The operators in PyTorch's dispatcher, `torch.ops.eamnet_kernels.*`; importing defines them."""

from eamnet_kernels.ops.registration import define_schemas

define_schemas()

from eamnet_kernels.ops import (  # noqa: E402 - each registers its operator, schemas come first
    cross_mix_channels,
    cross_mix_pixels,
    external_memory,
    gate_statistics,
    multi_dilation_conv,
)

__all__ = [
    "cross_mix_channels",
    "cross_mix_pixels",
    "external_memory",
    "gate_statistics",
    "multi_dilation_conv",
]
