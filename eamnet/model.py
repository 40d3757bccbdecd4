"""EAM-Net (arXiv:2512.07275): configuration, network, and weights as safetensors.

``docs/network.md`` lists every value that the paper leaves open, what is chosen and how to change
it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eamnet.blocks import DecoderStage, EncoderStage, MultiScaleHead, pad_to_multiple
from eamnet_kernels.modules import CMAM, EAB, MRCF

__all__ = ["EAMNet", "EAMNetConfig", "EAMNetOutput", "available_weights", "weights_metadata"]

Attend = Literal["channels", "pixels"]
Fusion = Literal["none", "cross", "serial", "parallel"]
Activation = Literal["relu", "silu", "identity"]

_WEIGHTS = Path(__file__).parent / "weights"
_CONFIG_KEY = "eamnet_config"


class EAMNetOutput(NamedTuple):
    """What :class:`EAMNet` returns in training mode; both are logits ``(B, num_classes, H, W)``."""

    logits: Tensor
    """The prediction, from the decoder (MSDF)."""
    auxiliary: Tensor | None
    """The encoder's prediction (MSEF), for the loss only; ``None`` with ``msef=False``."""


@dataclasses.dataclass(frozen=True)
class EAMNetConfig:
    """Everything that decides the network's architecture. The defaults are the paper's size.

    Per-scale values go from the finest scale to the coarsest; scale ``i`` has stride ``2**i``.
    Lists are accepted where tuples are declared. Invalid values raise ``ValueError`` or
    ``TypeError`` naming the field.
    """

    in_channels: int = 3
    """Channels of the picture."""
    num_classes: int = 1
    """Channels of the prediction: 1 for a sigmoid, more for a softmax."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of each encoder stage."""
    blocks: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks in each encoder stage."""
    decoder_widths: tuple[int, ...] = (16, 64, 128)
    """Channels of each decoder stage's result; one fewer than the encoder has stages."""
    decoder_blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks in each decoder stage."""
    mrcf: bool = True
    """Multi-resolution multi-channel fusion after each encoder stage."""
    dilations: tuple[int, ...] = (3, 5, 7)
    """Dilations of the MRCF's branches; widths must divide by one more than their number."""
    depthwise: bool = False
    """Depthwise instead of dense convolutions in the MRCF's branches."""
    activation: Activation = "relu"
    """Activation of the MRCF's branches."""
    eab: bool = True
    """External attention bridge on each encoder output; off: plain skip connections."""
    memory_size: int = 64
    """Slots of the EAB's memory."""
    top_k: int | tuple[int, ...] | None = None
    """Channels that the EAB keeps, for all scales or one by one; ``None``: half of them. The
    widths themselves switch the selection off."""
    cmam: Fusion = "cross"
    """Attention at the fusion points and at the bottom: ``cross`` (CMAM), ``serial`` (channel then
    spatial gate, CBAM), ``parallel`` (sum of both gates), or ``none``."""
    attend: tuple[Attend, ...] = ("channels", "channels", "channels", "pixels")
    """What the tokens of the cross-mix attention are at each scale. The cost of ``pixels`` grows
    with the square of the number of pixels."""
    heads: int | tuple[int, ...] = 4
    """Heads of the cross-mix attention, for all scales or one by one."""
    reduction: int = 16
    """Reduction of the channel gate's hidden layer."""
    msdf: bool = True
    """Multi-scale decoder fusion: the prediction from all decoder scales; off: from the finest."""
    msef: bool = True
    """Multi-scale encoder fusion: the auxiliary prediction in training."""

    def __post_init__(self) -> None:
        for name in ("widths", "blocks", "decoder_widths", "decoder_blocks", "dilations"):
            self._set_tuple(name)
        scales = len(self.widths)
        if scales < 2:
            raise ValueError(
                f"EAMNetConfig.widths: two or more stages are needed, got {self.widths}"
            )
        for name, length in (
            ("blocks", scales),
            ("decoder_widths", scales - 1),
            ("decoder_blocks", scales - 1),
        ):
            self._check_length(name, length)
        for name in ("in_channels", "num_classes", "memory_size", "reduction"):
            _check_positive(name, getattr(self, name))
        for name in ("mrcf", "depthwise", "eab", "msdf", "msef"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"EAMNetConfig.{name}: True or False is accepted, got {getattr(self, name)!r}"
                )
        self._check_choices("cmam", (self.cmam,), get_args(Fusion))
        self._check_choices("activation", (self.activation,), get_args(Activation))
        attend: object = self.attend
        if not isinstance(attend, (tuple, list)):
            raise TypeError(
                f"EAMNetConfig.attend: a sequence of names, one per stage, is accepted, "
                f"got {attend!r}"
            )
        object.__setattr__(self, "attend", tuple(attend))
        self._check_length("attend", scales)
        self._check_choices("attend", self.attend, get_args(Attend))
        for name in ("heads", "top_k"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)):
                self._set_tuple(name)
                self._check_length(name, scales)
            elif value is not None or name == "heads":
                _check_positive(name, value)
        self._check_widths()

    def _set_tuple(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (tuple, list)):
            raise TypeError(
                f"EAMNetConfig.{name}: a sequence of positive integers is accepted, got {value!r}"
            )
        for item in value:
            _check_positive(name, item)
        object.__setattr__(self, name, tuple(value))

    def _check_length(self, name: str, length: int) -> None:
        value = getattr(self, name)
        if len(value) != length:
            raise ValueError(
                f"EAMNetConfig.{name}: {length} values are needed for {len(self.widths)} stages "
                f"(widths={self.widths}), got {value}"
            )

    def _check_choices(self, name: str, given: tuple[str, ...], accepted: tuple[str, ...]) -> None:
        for item in given:
            if item not in accepted:
                raise ValueError(
                    f"EAMNetConfig.{name}: one of {', '.join(accepted)} is accepted, got {item!r}"
                )

    def _check_widths(self) -> None:
        groups = len(self.dilations) + 1
        if self.mrcf and any(width % groups for width in self.widths):
            raise ValueError(
                f"EAMNetConfig.widths: with {len(self.dilations)} dilations the MRCF needs widths "
                f"that divide by {groups}, got {self.widths}"
            )
        if self.cmam != "none" and any(
            w % h for w, h in zip(self.widths, self.heads_per_scale, strict=True)
        ):
            raise ValueError(
                f"EAMNetConfig.heads: they must divide the widths {self.widths}, got {self.heads}"
            )
        if any(
            k > w for w, k in zip(self.widths, self.top_k_per_scale, strict=True) if k is not None
        ):
            raise ValueError(
                f"EAMNetConfig.top_k: no more channels than a stage has can be kept "
                f"(widths={self.widths}), got {self.top_k}"
            )

    @property
    def stride(self) -> int:
        """Stride of the coarsest scale; pictures are padded to a multiple of it."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def heads_per_scale(self) -> tuple[int, ...]:
        """``heads`` written out, one value per scale."""
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * len(self.widths)

    @property
    def top_k_per_scale(self) -> tuple[int | None, ...]:
        """``top_k`` written out, one value per scale."""
        if isinstance(self.top_k, tuple):
            return self.top_k
        return (self.top_k,) * len(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it: lists for tuples."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EAMNetConfig:
        """Inverse of :meth:`to_dict`. Absent fields take their default.

        Raises:
            ValueError: a key is not a field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                close = difflib.get_close_matches(key, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"EAMNetConfig: unknown field {key!r}{hint} Accepted: {', '.join(names)}"
                )
        return cls(**values)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"EAMNetConfig.{name}: positive integers are accepted, got {value!r}")
    if value < 1:
        raise ValueError(f"EAMNetConfig.{name}: positive integers are accepted, got {value}")


class EAMNet(nn.Module):
    """Effective attention-guided multi-scale network for segmentation (arXiv:2512.07275).

    An encoder of residual stages, each closed by an MRCF and followed by 2x2 max pooling; an EAB
    on every encoder output; CMAM at the bottom and at every fusion point of the decoder; the
    prediction fused from all decoder scales (MSDF); in training also one from all encoder scales
    (MSEF).

    Args:
        config: the architecture; the default is the paper's size.
    """

    def __init__(self, config: EAMNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EAMNetConfig()
        widths = config.widths
        self.stages = nn.ModuleList(
            EncoderStage(previous, width, blocks, _mrcf(config, width))
            for previous, width, blocks in zip(
                (config.in_channels, *widths[:-1]), widths, config.blocks, strict=True
            )
        )
        self.bridges = nn.ModuleList(_eab(config, scale) for scale in range(len(widths)))
        self.bottom = _cmam(config, len(widths) - 1)
        coarser = (*config.decoder_widths[1:], widths[-1])
        self.decoder = nn.ModuleList(
            DecoderStage(coarser[i], widths[i], width, blocks, _cmam(config, i))
            for i, (width, blocks) in enumerate(
                zip(config.decoder_widths, config.decoder_blocks, strict=True)
            )
        )
        self.msdf = MultiScaleHead(
            config.decoder_widths if config.msdf else config.decoder_widths[:1],
            config.num_classes,
        )
        self.msef = MultiScaleHead(widths, config.num_classes) if config.msef else None

    def forward(self, x: Tensor) -> Tensor | EAMNetOutput:
        """Segment pictures.

        Args:
            x: ``(B, in_channels, H, W)``, floating point, any ``H, W >= 1`` and any ``B``. Sizes
                that do not divide by ``config.stride`` are padded and the result is cropped back.

        Returns:
            Logits ``(B, num_classes, H, W)`` in evaluation mode, :class:`EAMNetOutput` in training
            mode.

        Raises:
            ValueError: wrong number of dimensions or channels, an empty picture, or, in training,
                a batch with a single value per channel at the coarsest scale, which batch
                normalisation cannot use.
            TypeError: ``x`` is not floating point.
        """
        self._check_input(x)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.config.stride)
        encoded: list[Tensor] = []
        for stage in self.stages:
            x = stage(F.max_pool2d(x, 2) if encoded else x)
            encoded.append(x)
        skips = [bridge(feature) for bridge, feature in zip(self.bridges, encoded, strict=True)]
        x = self.bottom(skips.pop())
        decoded: list[Tensor] = []
        for stage, skip in zip(reversed(self.decoder), reversed(skips), strict=True):
            x = stage(x, skip)
            decoded.insert(0, x)
        finest = len(self.msdf.heads)
        logits: Tensor = self.msdf(decoded[:finest])[..., :height, :width]
        if not self.training:
            return logits
        auxiliary = None
        if self.msef is not None:
            auxiliary = self.msef(encoded)[..., :height, :width]
        return EAMNetOutput(logits, auxiliary)

    def _check_input(self, x: Tensor) -> None:
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"EAMNet: x of shape (B, {channels}, H, W) is accepted, got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"EAMNet: x of a floating-point dtype is accepted, got {x.dtype}")
        batch, _, height, width = x.shape
        if height == 0 or width == 0:
            raise ValueError(f"EAMNet: x must have H, W >= 1, got {tuple(x.shape)}")
        stride = self.config.stride
        if self.training and batch == 1 and height <= stride and width <= stride:
            raise ValueError(
                f"EAMNet: in training, one picture of at most {stride}x{stride} pixels leaves a "
                f"single value per channel at the coarsest scale, too few for batch normalisation; "
                f"use a larger picture or batch, got x of shape {tuple(x.shape)}"
            )

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write weights and configuration to one safetensors file, whole or not at all.

        Args:
            path: file name, ending in ``.safetensors``. Folders are created.
            dtype: floating-point dtype to store (for example ``torch.float16`` to halve the file);
                by default each tensor keeps its own.
            metadata: more to say about the weights, for :func:`weights_metadata`.

        Returns:
            The file's path.

        Raises:
            ValueError: wrong file ending, or a value that ``dtype`` cannot hold.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"path: a name ending in .safetensors is accepted, got {str(path)!r}")
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            # Safetensors refuses the strides of channels-last weights.
            stored = tensor.detach().cpu().contiguous()
            if dtype is not None and stored.is_floating_point():
                stored = stored.to(dtype)
                if not stored.isfinite().all() and tensor.isfinite().all():
                    raise ValueError(f"dtype: {dtype} cannot hold the values of {name!r}")
            tensors[name] = stored
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"format": "pt", _CONFIG_KEY: json.dumps(self.config.to_dict())}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, unfinished, metadata={**(metadata or {}), **own})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> EAMNet:
        """Build a network from a file of :meth:`save_pretrained` or from bundled weights.

        Args:
            name_or_path: a path ending in ``.safetensors``, or a name out of
                :func:`available_weights`.
            device: where the network is put.
            dtype: floating-point dtype of the network, whatever the file stores.

        Returns:
            The network in evaluation mode.

        Raises:
            FileNotFoundError: no such file, or no bundled weights of that name.
            ValueError: not a file of :meth:`save_pretrained`, or its tensors are not exactly those
                that its configuration asks for.
        """
        path = _find_weights(name_or_path)
        metadata = weights_metadata(path)
        if _CONFIG_KEY not in metadata:
            raise ValueError(
                f"{path} holds no EAM-Net configuration ({_CONFIG_KEY!r} in its metadata); "
                f"write weights with EAMNet.save_pretrained"
            )
        config = EAMNetConfig.from_dict(json.loads(metadata[_CONFIG_KEY]))
        # The initial values are thrown away; the caller's random state is left as it was.
        with torch.random.fork_rng(devices=[]):
            model = cls(config)
        model.to(device=device, dtype=dtype)
        try:
            model.load_state_dict(load_file(path), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its own configuration: {error}") from error
        return model.eval()


def available_weights() -> list[str]:
    """Names of the weights that come with the package, for :meth:`EAMNet.from_pretrained`."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))


def weights_metadata(name_or_path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file of weights says about itself, the configuration as JSON included.

    Args:
        name_or_path: as for :meth:`EAMNet.from_pretrained`, which raises the same errors.
    """
    path = _find_weights(name_or_path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"name_or_path: no file {str(path)!r}")
        return path
    names = available_weights()
    if str(name_or_path) not in names:
        raise FileNotFoundError(
            f"name_or_path: {str(name_or_path)!r} is neither a .safetensors file nor one of the "
            f"bundled weights: {', '.join(names) or 'there are none'}"
        )
    return _WEIGHTS / f"{name_or_path}.safetensors"


def _mrcf(config: EAMNetConfig, width: int) -> nn.Module:
    if not config.mrcf:
        return nn.Identity()
    return MRCF(
        width,
        dilations=config.dilations,
        depthwise=config.depthwise,
        activation=config.activation,
    )


def _eab(config: EAMNetConfig, scale: int) -> nn.Module:
    if not config.eab:
        return nn.Identity()
    return EAB(
        config.widths[scale],
        memory_size=config.memory_size,
        top_k=config.top_k_per_scale[scale],
    )


def _cmam(config: EAMNetConfig, scale: int) -> nn.Module:
    if config.cmam == "none":
        return nn.Identity()
    return CMAM(
        config.widths[scale],
        attend=config.attend[scale],
        heads=config.heads_per_scale[scale],
        reduction=config.reduction,
        fusion=config.cmam,
    )
