"""Where CMAM looks and which channels EAB keeps, on pictures that are hard by measure.

The modules compute neither their attention weights nor, outwardly, their selection: the weights
are computed here again from a module's input and parameters, in the plain form of its definition.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped, unused-ignore]
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eamnet.data import SegmentationData
from eamnet.data.source import read_image
from eamnet.data.transforms import resize_image, to_float
from eamnet.inference import export_weights
from eamnet.measures import area_fraction, contrast, solidity
from eamnet.metrics import discretise, write_atomic
from eamnet.model import EAMNet, weights_metadata
from eamnet.report import contact_sheet, outline_overlay, write_report
from eamnet_kernels.functional import gate_statistics
from eamnet_kernels.modules import CMAM, EAB
from eamnet_kernels.reference.external_memory import forward as external_memory

__all__ = ["Maps", "attention", "attention_maps", "choose", "cross_weights", "kept", "maps"]


# --- what the modules do ----------------------------------------------------------------------


class CrossWeights(NamedTuple):
    """The two softmaxes of a cross mix, rows of queries, and the values that each multiplies.

    Over pixels weights are ``(B, h, N, N)`` and values ``(B, h, N, d)``; over channels
    ``(B, h, d, d)`` and ``(B, h, d, N)``.
    """

    spatial: Tensor
    channel: Tensor
    v_c: Tensor
    v_s: Tensor


def cross_weights(module: CMAM, x: Tensor) -> CrossWeights:
    """The attention weights of a CMAM with ``fusion="cross"`` for its input ``(B, C, H, W)``."""
    statistics = gate_statistics(x)
    gated = (
        module.spatial_gate(statistics) * x,
        module.channel_gate(statistics)[:, :, None, None] * x,
    )

    def project(features: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        stacked = weight @ features.flatten(2)  # (B,3C,N)
        tokens = stacked.unflatten(1, (3, module.heads, -1))  # (B,3,h,d,N)
        if module.attend == "pixels":
            return tokens.transpose(3, 4).unbind(1)
        return tokens.unbind(1)

    q_s, k_s, v_s = project(gated[0], module.w_spatial)
    q_c, k_c, v_c = project(gated[1], module.w_channel)

    def softmax(q: Tensor, k: Tensor, direction: int) -> Tensor:
        if module.attend == "pixels":
            return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), 3)
        scores = F.normalize(q, dim=3) @ F.normalize(k, dim=3).transpose(2, 3)
        return torch.softmax(module.temperature[direction][:, None, None] * scores, 3)

    return CrossWeights(softmax(q_s, k_c, 0), softmax(q_c, k_s, 1), v_c, v_s)


class Maps(NamedTuple):
    """What one CMAM does with its input; each value compares within a picture, not between."""

    pixels: Tensor
    """``(B, H, W)``. Cross over pixels: the attention that a pixel gets from those of the lesion,
    1 where all get the same. Cross over channels: the length of what is added at a pixel, over its
    mean. Serial and parallel: the spatial gate."""
    channels: Tensor
    """``(B, C)``. Cross over channels: the attention that a channel gets within its head, 1 where
    all get the same. Otherwise the channel gate."""
    gain: Tensor
    """``(B, H, W)``, for every fusion alike: the length of a pixel's features after the module over
    that before."""


def maps(module: CMAM, x: Tensor, lesion: Tensor) -> Maps:
    """Recompute what a CMAM attends to.

    Args:
        module: any fusion.
        x: its input, ``(B, C, H, W)``.
        lesion: ``(B, H, W)`` from 0 to 1, the pixels whose queries count; where a picture has none,
            all do.
    """
    y: Tensor = module(x)
    gain = y.norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)
    statistics = gate_statistics(x)
    gate = module.channel_gate(statistics)
    if module.fusion != "cross":
        seen = x * gate[:, :, None, None] if module.fusion == "serial" else x
        return Maps(module.spatial_gate(gate_statistics(seen))[:, 0], gate, gain)
    weights = cross_weights(module, x)
    if module.attend == "channels":
        received = (weights.spatial + weights.channel).mean(2) / 2 * weights.spatial.shape[3]
        added = (y - x).norm(dim=1)
        mean = added.mean((1, 2), keepdim=True).clamp_min(1e-12)
        return Maps(added / mean, received.flatten(1), gain)
    queries = lesion.flatten(1)
    none = queries.sum(1, keepdim=True) == 0
    queries = torch.where(none, torch.ones_like(queries), queries)
    queries = queries / queries.sum(1, keepdim=True)
    both = (weights.spatial + weights.channel).mean(1) / 2  # over heads and directions: (B,N,N)
    received = (queries[:, None] @ both)[:, 0] * both.shape[2]
    return Maps(received.unflatten(1, x.shape[2:]), gate, gain)


def kept(module: EAB, x: Tensor) -> Tensor:
    """The channels that an EAB keeps of each picture: bool ``(B, C)`` for ``x (B, C, H, W)``."""
    return external_memory(x, module.key(), module.memory_value, module.w_out, module.top_k)[2]


# --- which pictures ---------------------------------------------------------------------------


def choose(measures: dict[str, dict[str, float]], count: int) -> dict[str, list[str]]:
    """Choose ids by measure: the ``count`` most irregular, faintest and smallest lesions.

    Args:
        measures: by id ``solidity``, ``contrast`` and ``area``; NaN or 0 area takes no part.
        count: how many of each; a picture stands in the first group that takes it.
    """
    groups: dict[str, list[str]] = {}
    taken: set[str] = set()
    for group, key in (("irregular", "solidity"), ("low contrast", "contrast"), ("small", "area")):
        able = [i for i, m in measures.items() if not math.isnan(m[key]) and m["area"] > 0]
        ids = [i for i in sorted(able, key=lambda i: (measures[i][key], i)) if i not in taken]
        groups[group] = ids[:count]
        taken.update(groups[group])
    return {group: ids for group, ids in groups.items() if ids}


# --- a run over pictures ----------------------------------------------------------------------


class _Network(NamedTuple):
    name: str
    model: EAMNet
    size: int


@dataclass
class _Collected:
    """What is kept of one network: numbers of every picture, maps of the chosen ones."""

    focus: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    maps: dict[tuple[str, int], Maps] = field(default_factory=dict)
    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    kept_of: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    predictions: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


_Item = tuple[str, Tensor, "NDArray[np.uint8] | None"]
"""Id, picture float ``(3, S, S)`` in [0, 1], mask ``(S, S)`` if there is one."""


def attention(arguments: list[str]) -> int:
    """``eamnet attention``: heat maps of CMAM and the channels that EAB keeps."""
    parser = ArgumentParser(
        prog="eamnet attention",
        description="Show where the attention of one or more networks goes, on the pictures with "
        "the most irregular, the faintest and the smallest lesions.",
    )
    parser.add_argument(
        "pictures",
        nargs="*",
        type=str,
        help="Ids of the run's data set instead of those found by measure; or, with --checkpoint "
        "alone, picture files.",
    )
    for name, what in (("run_dir", "Run folders"), ("checkpoint", ".ckpt or .safetensors files")):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=str,
            default=[],
            help=f"{what}, such as one for each fusion; give them after the pictures.",
        )
    parser.add_function_arguments(attention_maps, skip={"pictures", "run_dir", "checkpoint"})
    print(attention_maps(**vars(parser.parse_args(arguments))))
    return 0


@torch.inference_mode()
def attention_maps(
    pictures: Sequence[str] = (),
    run_dir: Sequence[str] = (),
    checkpoint: Sequence[str] = (),
    part: Literal["val", "test"] = "val",
    count: int = 2,
    output: str | None = None,
    data_root: str | None = None,
) -> Path:
    """Write ``sheet.png``, ``channels.png``, ``attention.csv`` and ``attention.json``.

    Args:
        pictures: ids, or files where there is no run.
        run_dir: runs on one split; the first brings the pictures.
        checkpoint: further networks.
        part: which part of the split; the default leaves the test part alone.
        count: pictures of each group.
        output: folder; default: ``attention`` in the first run, or here.
        data_root: where the pictures lie now, if not where the run found them.

    Returns:
        The path of the sheet.

    Raises:
        ValueError: no network, one without CMAM, sizes or splits that differ, unknown pictures.
    """
    networks = _networks(run_dir, checkpoint)
    size = networks[0].size
    folder = Path(output) if output else Path(*run_dir[:1], "attention")
    if run_dir:
        items = _Items(Path(run_dir[0]), part, data_root)
        measures = {name: _measures(image, mask) for name, image, mask in items}
        if pictures:
            unknown = [name for name in pictures if name not in measures]
            if unknown:
                raise ValueError(f"the {part} part of {run_dir[0]} has no pictures {unknown}")
            groups = {"asked for": list(pictures)}
        else:
            groups = choose(measures, count)
        source: Sequence[_Item] | _Items = items
    else:
        if not pictures:
            raise ValueError("pictures are missing: give --run_dir, or picture files")
        files = {Path(p).stem: Path(p) for p in pictures}
        source = [(n, to_float(resize_image(read_image(p), size)), None) for n, p in files.items()]
        groups, measures = {"asked for": list(files)}, {}
    chosen = [(group, name) for group, names in groups.items() for name in names]
    scales = _scales(networks[0].model)
    collected = [_Collected() for _ in networks]
    shown: dict[str, _Item] = {}
    for name, image, truth in source:
        if (lesion := truth) is None:
            lesion = discretise(networks[0].model(image[None]))[0, 0].numpy()
            measures[name] = _measures(image, lesion)
        keep = any(name == other for _, other in chosen)
        for network, of in zip(networks, collected, strict=True):
            _collect(network.model, of, scales, name, image, lesion, keep)
        if keep:
            shown[name] = (name, image, truth)
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "attention.csv", networks, collected, measures, groups)
    summary = _summary(networks, collected, scales, groups, part if run_dir else None)
    write_atomic(folder / "attention.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_atomic(
        folder / "channels.png",
        _channels_figure(networks, collected, scales, [n for _, n in chosen]),
    )
    tiles = [
        tile
        for group, name in chosen
        for tile in _row(group, shown[name], networks, collected, scales, measures[name])
    ]
    sheet = Image.fromarray(contact_sheet(tiles, columns=len(tiles) // len(chosen), tile=200))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_atomic(folder / "sheet.png", data.getvalue())
    if run_dir and output is None:
        write_report(run_dir[0])
    return folder / "sheet.png"


class _Items:
    """The pictures of a run's part, at network size; can be gone through again."""

    def __init__(self, run: Path, part: str, data_root: str | None) -> None:
        options = yaml.safe_load((run / "config.yaml").read_text())["data"]
        options |= {"split": str(run / "split.json"), "augment": False, "batch_size": 1}
        if data_root is not None:
            options["root"] = data_root
        self.data = SegmentationData(**options)
        self.part = part
        self.data.setup("validate" if part == "val" else part)

    def __iter__(self) -> Iterator[_Item]:
        loader = self.data.val_dataloader() if self.part == "val" else self.data.test_dataloader()
        for batch in loader:
            mask = batch["mask"][0, 0].numpy().astype(np.uint8)
            yield batch["id"][0], batch["image"][0], mask


def _networks(run_dir: Sequence[str], checkpoint: Sequence[str]) -> list[_Network]:
    sources = []
    for run in run_dir:
        weights = Path(run, "best.safetensors")  # of a study's trial they alone are kept
        sources.append(weights if weights.is_file() else Path(run, "checkpoints", "best.ckpt"))
    sources += map(Path, checkpoint)
    if not sources:
        raise ValueError("a network is missing: give --run_dir or --checkpoint")
    splits = {json.loads(Path(run, "split.json").read_text())["hash"][:12] for run in run_dir}
    if len(splits) > 1:
        raise ValueError(f"the runs must have one split, got {sorted(splits)}")
    loaded = []
    with tempfile.TemporaryDirectory() as folder:
        for index, source in enumerate(sources):
            path = source
            if source.suffix == ".ckpt":
                path = export_weights(source, Path(folder, f"{index}.safetensors"))
            size = int(weights_metadata(path).get("eamnet_size", 256))
            loaded.append((source, EAMNet.from_pretrained(path), size))
    if len({size for *_, size in loaded}) > 1:
        raise ValueError(f"networks must have one input size, got {[s for *_, s in loaded]}")
    for source, model, _ in loaded:
        if model.config.cmam == "none":
            raise ValueError(f"{source} has no CMAM: nothing to show")
    fusions = Counter(model.config.cmam for _, model, _ in loaded)
    return [
        _Network(
            model.config.cmam
            if fusions[model.config.cmam] == 1
            else f"{model.config.cmam} {index + 1}",
            model,
            size,
        )
        for index, (_, model, size) in enumerate(loaded)
    ]


def _scales(model: EAMNet) -> dict[str, int]:
    """The finest scale of each kind of attention: those that are looked at."""
    attend = model.config.attend
    return {kind: attend.index(kind) for kind in ("channels", "pixels") if kind in attend}


def _cmam(model: EAMNet, scale: int) -> CMAM:
    last = len(model.config.widths) - 1
    module: Any = model.bottom if scale == last else model.decoder[scale].attention
    assert isinstance(module, CMAM)
    return module


def _collect(
    model: EAMNet,
    into: _Collected,
    scales: dict[str, int],
    name: str,
    image: Tensor,
    lesion: NDArray[np.uint8],
    keep: bool,
) -> None:
    inputs: dict[torch.nn.Module, Tensor] = {}
    watched: list[torch.nn.Module] = [_cmam(model, scale) for scale in scales.values()]
    watched += [bridge for bridge in model.bridges if isinstance(bridge, EAB)]
    hooks = [m.register_forward_pre_hook(lambda m, x: inputs.update({m: x[0]})) for m in watched]
    try:
        logits = model(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    for scale in scales.values():
        module = _cmam(model, scale)
        x = inputs[module]
        mask = torch.from_numpy(lesion > 0).float()[None, None]
        mask = F.adaptive_avg_pool2d(mask, (x.shape[2], x.shape[3]))[0]
        found = maps(module, x, mask)
        into.focus[name, scale] = _focus(found.pixels, mask), _focus(found.gain, mask)
        if keep:
            into.maps[name, scale] = found
    for scale, bridge in enumerate(model.bridges):
        if isinstance(bridge, EAB):
            channels = kept(bridge, inputs[bridge])[0]
            into.kept.setdefault(scale, []).append(channels)
            if keep:
                into.kept_of[name, scale] = channels
    if keep:
        into.predictions[name] = discretise(logits)[0, 0].numpy()


def _focus(values: Tensor, mask: Tensor) -> float:
    """Mean of a map inside the lesion over that outside; NaN where there is no one of them."""
    inside, outside = mask.sum(), (1 - mask).sum()
    if not inside or not outside:
        return math.nan
    return float((values * mask).sum() / inside / ((values * (1 - mask)).sum() / outside))


def _measures(image: Tensor, mask: NDArray[np.uint8] | None) -> dict[str, float]:
    mask = np.zeros(image.shape[1:], np.uint8) if mask is None else mask
    return {
        "area": area_fraction(mask),
        "solidity": solidity(mask),
        "contrast": contrast(image.numpy(), mask),
    }


# --- what is written --------------------------------------------------------------------------


def _write_csv(
    path: Path,
    networks: Sequence[_Network],
    collected: Sequence[_Collected],
    measures: dict[str, dict[str, float]],
    groups: dict[str, list[str]],
) -> None:
    """One row for each picture, network and scale."""
    group_of = {name: group for group, names in groups.items() for name in names}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["id", "group", "area", "solidity", "contrast", "network", "scale", "focus", "gain_focus"]
    )
    for network, of in zip(networks, collected, strict=True):
        for (name, scale), focus in of.focus.items():
            numbers = ["" if math.isnan(v) else v for v in (*measures[name].values(), *focus)]
            row = [name, group_of.get(name, ""), *numbers[:3], network.name, scale, *numbers[3:]]
            writer.writerow(row)
    write_atomic(path, text.getvalue().encode())


def _summary(
    networks: Sequence[_Network],
    collected: Sequence[_Collected],
    scales: dict[str, int],
    groups: dict[str, list[str]],
    part: str | None,
) -> dict[str, Any]:
    """Means over all pictures that were looked at, and what EAB kept of them."""
    found = []
    for network, of in zip(networks, collected, strict=True):
        focus = {
            kind: {
                key: _mean_interval([f[i] for (_, s), f in of.focus.items() if s == scale])
                for i, key in enumerate(("focus", "gain_focus"))
            }
            for kind, scale in scales.items()
        }
        frequency = {
            str(scale): torch.stack(masks).float().mean(0).tolist()
            for scale, masks in of.kept.items()
        }
        found.append(
            {
                "name": network.name,
                "fusion": network.model.config.cmam,
                "attention": focus,
                "eab": {
                    scale: {
                        "kept": f,
                        "always": sum(v == 1 for v in f),
                        "never": sum(v == 0 for v in f),
                    }
                    for scale, f in frequency.items()
                },
            }
        )
    pictures = len({name for name, _ in collected[0].focus})
    return {
        "schema": 1,
        "part": part,
        "pictures": pictures,
        "scales": scales,
        "chosen": groups,
        "networks": found,
    }


def _mean_interval(values: Sequence[float]) -> dict[str, float] | None:
    """Mean with the 95 % percentile bootstrap interval over pictures; None of nothing."""
    known = np.array([v for v in values if not math.isnan(v)])
    if not len(known):
        return None
    draws = np.random.default_rng(0).integers(len(known), size=(2000, len(known)))
    low, high = np.quantile(known[draws].mean(1), [0.025, 0.975])
    return {"value": float(known.mean()), "low": float(low), "high": float(high)}


def _row(
    group: str,
    item: _Item,
    networks: Sequence[_Network],
    collected: Sequence[_Collected],
    scales: dict[str, int],
    measures: dict[str, float],
) -> list[tuple[str, NDArray[np.uint8]]]:
    """The tiles of one picture: itself with outlines, then the maps of each network."""
    name, image, truth = item
    factor = math.ceil(384 / image.shape[1])

    def enlarged(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return mask.repeat(factor, 0).repeat(factor, 1)

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    size = (pixels.shape[1] * factor, pixels.shape[0] * factor)
    picture = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    prediction = enlarged(collected[0].predictions[name])
    outline = None if truth is None else enlarged(truth)
    numbers = "area {area:.2f}, solidity {solidity:.2f}\ncontrast {contrast:.2f}".format(**measures)
    tiles = [(f"{group}: {name}\n{numbers}", outline_overlay(picture, outline, prediction))]
    for kind, scale in scales.items():
        for network, of in zip(networks, collected, strict=True):
            heat = _heat(of.maps[name, scale].pixels[0], picture)
            focus = of.focus[name, scale][0]
            caption = f"{network.name}, {kind} 1/{2**scale}\nfocus {focus:.2f}"
            tiles.append((caption, outline_overlay(heat, outline, None)))
    return tiles


def _heat(values: Tensor, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A map in colour over the picture in grey, from its 1st to its 99th percentile."""
    size = picture.shape[:2]
    map_ = F.interpolate(values[None, None].float(), size, mode="bilinear")[0, 0].numpy()
    low, high = np.quantile(map_, [0.01, 0.99])
    scaled = ((map_ - low) / max(high - low, 1e-12)).clip(0, 1)
    # One of matplotlib's maps of even brightness: also in grey, brighter is more.
    colour = mpl.colormaps["inferno"](scaled)[..., :3] * 255
    grey = picture.mean(2, keepdims=True)
    result: NDArray[np.uint8] = (0.3 * grey + 0.7 * colour).astype(np.uint8)
    return result


def _channels_figure(
    networks: Sequence[_Network],
    collected: Sequence[_Collected],
    scales: dict[str, int],
    names: Sequence[str],
) -> bytes:
    """Attention to channels and the channels kept, pictures down and channels across."""
    scale = scales.get("channels", next(iter(scales.values())))
    figure = Figure(figsize=(11, 0.8 + len(networks) * (1.2 + 0.16 * len(names))))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(networks), 3, squeeze=False)
    for row, network, of in zip(axes, networks, collected, strict=True):
        weights = np.stack([of.maps[name, scale].channels[0].numpy() for name in names])
        what = "attention received" if network.model.config.cmam == "cross" else "channel gate"
        shown = row[0].imshow(weights, aspect="auto", cmap="inferno", interpolation="nearest")
        figure.colorbar(shown, ax=row[0], pad=0.02).ax.tick_params(labelsize=6)
        row[0].set_title(f"{network.name}: {what}, 1/{2**scale}", fontsize=8)
        row[0].set_yticks(range(len(names)), names, fontsize=6)
        if of.kept:
            chosen = np.stack([of.kept_of[name, scale].numpy() for name in names])
            row[1].imshow(chosen, aspect="auto", cmap="gray_r", interpolation="nearest")
            row[1].set_title(f"{network.name}: kept by EAB (black), 1/{2**scale}", fontsize=8)
            row[1].set_yticks([])
            for at, masks in of.kept.items():
                share = torch.stack(masks).float().mean(0).sort(descending=True).values.numpy()
                row[2].plot(np.linspace(0, 1, len(share)), share, label=f"1/{2**at}")
            title = f"share of all {len(masks)} pictures that keep a channel"
            row[2].set_title(title, fontsize=8)
            row[2].set_xlabel("channels, most kept first", fontsize=7)
            row[2].legend(fontsize=6, frameon=False)
        for axis in row[:2]:
            axis.set_xlabel("channel", fontsize=7)
        for axis in row:
            axis.tick_params(labelsize=6)
            axis.set_visible(axis.has_data())
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()
