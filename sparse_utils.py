"""Masks for sparse reinforcement learning: budgets, static pruning, Topology-Aware Revival, rewiring, masked gradients,
sparse compute. Then what is not about the algorithm: logging, checks of flags, environments, run folders, checkpoints.

Shared by `sac_tar.py` and `td3_tar.py`. Of one network, `weights` and `masks` are dictionaries from layer name to a
tensor of shape (n_out, n_in), in the order in which the layers are applied; a mask is boolean and True marks an active
connection. Nothing here draws from torch's global random generator.
"""

import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib.util
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, NoReturn

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

Masks = dict[str, Tensor]
DYNAMIC_METHODS = ("set", "rigl")  # arms whose masks change during training
MEST_LAMBDA = 1.0  # the value in the code of Nowak et al. 2023
SPARSE_PAYS_UP_TO = 0.5  # density up to which --compute auto uses the sparse kernels; measured, README
AUTO_WIDTH_C = 4.0  # connections per topology need that --active-width auto asks for
DENSE_PAYS_UP_TO = 512  # inputs or outputs of a layer up to which it does where nothing is pruned; measured, README


def linear_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable parameters of a network: the weight of every `nn.Linear`, by layer name. Biases stay dense."""
    return {name: layer.weight for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}


# BUDGETS: how many connections, and in which layer


def connection_budget(weights: dict[str, Tensor], method: str, sparsity: float, reserve: float) -> tuple[int, int]:
    """Active connections K = round((1 - sparsity) * n) of a network with n weights (all n for dense and tiny), and how
    many of them, R = round(reserve * K), are left to revival (tar and uniform; otherwise 0). Raises ValueError if no
    connection would be left."""
    size = sum(weight.numel() for weight in weights.values())
    budget = size if method in ("dense", "tiny") else round((1 - sparsity) * size)
    if budget < 1:
        raise ValueError(f"--sparsity {sparsity} keeps none of a network's {size} connections; choose a lower sparsity")
    return budget, round(reserve * budget) if method in ("tar", "uniform") else 0


def active_part(tensors: dict[str, Tensor], width: int | None) -> dict[str, Tensor]:
    """Views [:h_out, :h_in] of each layer's tensor (n_out, n_in): the first `width` neurons of every hidden layer (all
    if it is None), and all inputs and outputs of the network."""
    last = len(tensors) - 1
    return {
        name: tensor[: width if i < last else None, : width if i > 0 else None]
        for i, (name, tensor) in enumerate(tensors.items())
    }


def embed(part: Masks, whole: dict[str, Tensor]) -> Masks:
    """Masks of the shapes of `whole`, with those of `active_part` in the corner and False elsewhere."""
    masks = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}
    for name, mask in part.items():
        masks[name][: mask.shape[0], : mask.shape[1]] = mask
    return masks


def active_widths(
    weights: dict[str, dict[str, Tensor]], methods: dict[str, str], budgets: dict[str, tuple[int, int]], asked
) -> dict[str, int]:
    """Neurons of each hidden layer that have connections, for each network: `asked`; all of them if it is None, and in
    dense and tiny networks. `auto`: the most for which K >= AUTO_WIDTH_C * sum of the layers' topology needs, but never
    too few to hold K connections. Raises ValueError if `asked` is too few."""
    widths, narrowest = {}, {}
    for name, layers in weights.items():
        hidden = max(weight.shape[0] for weight in list(layers.values())[:-1])
        if asked is None or methods[name] in ("dense", "tiny"):
            widths[name] = hidden
            continue
        budget, _ = budgets[name]
        parts = {h: active_part(layers, h).values() for h in range(1, hidden + 1)}
        narrowest[name] = min(h for h, part in parts.items() if sum(w.numel() for w in part) >= budget)
        fed = [h for h, ws in parts.items() if budget >= AUTO_WIDTH_C * sum(topology_need(tuple(w.shape)) for w in ws)]
        widths[name] = max([*fed, narrowest[name]]) if asked == "auto" else asked
    if any(widths[name] < width for name, width in narrowest.items()):
        raise ValueError(
            f"--active-width {asked} cannot hold the connections; the smallest that can is {max(narrowest.values())}"
        )
    return widths


def tiny_size(n_in: int, hidden_size: int, n_out: int, sparsity: float) -> int:
    """Neurons in each of two hidden layers of the widest dense network that has no more weights than a network of
    `hidden_size` has connections at this sparsity: the largest w with w * w + (n_in + n_out) * w <= K. May be 0."""
    ends = n_in + n_out
    budget = round((1 - sparsity) * hidden_size * (hidden_size + ends))
    return (math.isqrt(ends * ends + 4 * budget) - ends) // 2


def allocate(total: int, shares: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Split `total` into whole numbers proportional to `shares`, none above its cap.

    What a capped entry cannot take goes to the others in the same proportion. Rounded by largest remainder (ties: lower
    index first), so the sum is exactly `total`. Raises ValueError if the entries with a share cannot hold `total`.
    """
    open_entries = [i for i, share in enumerate(shares) if share > 0]
    if not 0 <= total <= sum(caps[i] for i in open_entries):
        raise ValueError(f"cannot place {total} connections in layers with room for {[caps[i] for i in open_entries]}")
    counts, exact, remaining = [0] * len(shares), {}, total
    while open_entries:
        whole = sum(shares[i] for i in open_entries)
        exact = {i: remaining * (shares[i] / whole) for i in open_entries}
        full = [i for i in open_entries if exact[i] >= caps[i]]
        if not full:
            break
        for i in full:
            counts[i] = caps[i]
            remaining -= caps[i]
        open_entries = [i for i in open_entries if i not in full]
    for i in open_entries:
        counts[i] = math.floor(exact[i])
    by_remainder = sorted(open_entries, key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def layer_budgets(shapes: Sequence[tuple[int, int]], keep: int, distribution: str) -> list[int]:
    """Connections that static pruning keeps in each layer of shape (n_out, n_in), `keep` in all.

    `uniform`: the same fraction in every layer. `er`: Erdos-Renyi, density proportional to (n_in + n_out) /
    (n_in * n_out), so a count proportional to n_in + n_out; a layer that would pass density 1 is dense and the others
    are rescaled (Mocanu et al. 2018; Evci et al. 2020).
    """
    sizes = [n_out * n_in for n_out, n_in in shapes]
    return allocate(keep, sizes if distribution == "uniform" else [n_out + n_in for n_out, n_in in shapes], sizes)


# STATIC PRUNING: a score for each connection (the higher ones are kept), then an exact count by rank


def snip_scores(weights: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """|w * dL/dw| (SNIP, Lee et al. 2019)."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return {name: (w * g).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp_scores(weights: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """w * (H g), g the gradient and H the Hessian of the loss (GraSP, Wang et al. 2020). What they prune is the highest
    -w * (H g), where pruning hurts the gradient's norm least."""
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    squared_norm = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(squared_norm, list(weights.values()))
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), products, strict=True)}


def synflow_scores(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """|w * dR/dw|, R the summed output for an all-ones input with |w| for every weight and without biases and squashing
    (SynFlow, Tanaka et al. 2020). ReLU is then the identity, R a product of matrices, and its gradient at a layer the
    outer product of what reaches it from both ends. In float64: R can overflow float32.

    Raises ValueError if the layers are not a chain, each reading what the one before it writes.
    """
    magnitudes = [w.detach().abs().double() for w in weights.values()]
    if any(b.shape[1] != a.shape[0] for a, b in zip(magnitudes, magnitudes[1:])):
        raise ValueError(f"synflow needs a chain of layers, got {[tuple(m.shape) for m in magnitudes]}")
    into = [magnitudes[0].new_ones(magnitudes[0].shape[1])]
    for m in magnitudes[:-1]:
        into.append(m @ into[-1])
    out_of = [magnitudes[-1].new_ones(magnitudes[-1].shape[0])]
    for m in reversed(magnitudes[1:]):
        out_of.insert(0, m.T @ out_of[0])
    return {name: m * torch.outer(o, i) for name, m, o, i in zip(weights, magnitudes, out_of, into, strict=True)}


def keep_highest(scores: dict[str, Tensor], keep: int, distribution: str) -> Masks:
    """Masks of the `keep` highest scores, ranked over the network (`global`) or within each layer's budget. Ties go to
    the lower index, so the count is exact whatever the scores."""
    if distribution == "global":
        flat = torch.cat([s.flatten() for s in scores.values()])
        top = flat.sort(descending=True, stable=True).indices[:keep]
        active = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, top, True)
        parts = active.split([s.numel() for s in scores.values()])
        return {name: part.view_as(s) for (name, s), part in zip(scores.items(), parts, strict=True)}
    budgets = layer_budgets([tuple(s.shape) for s in scores.values()], keep, distribution)
    return {
        name: keep_highest({name: s}, budget, "global")[name]
        for (name, s), budget in zip(scores.items(), budgets, strict=True)
    }


def static_prune(
    weights: dict[str, Tensor],
    keep: int,
    criterion: str,
    distribution: str,
    generator: torch.Generator,
    loss: Tensor | None = None,
    width: int | None = None,
) -> Masks:
    """The base masks: exactly `keep` connections by `criterion` (random, magnitude, snip, grasp, synflow) and
    `distribution` (er, uniform, global), within the `active_part` of this `width`. `loss` is the network's own loss,
    for snip and grasp; `generator`, on the CPU, serves random. The weights are read, not changed."""
    if criterion == "synflow":
        part = {name: torch.ones_like(w, dtype=torch.bool) for name, w in active_part(weights, width).items()}
        size, rounds = sum(mask.numel() for mask in part.values()), 100
        for i in range(1, rounds + 1):
            masks = embed(part, weights)
            scores = active_part(synflow_scores({name: w * masks[name] for name, w in weights.items()}), width)
            # below zero, so that what is pruned stays pruned even where a cut-off connection scores zero
            scores = {name: s.masked_fill(~part[name], -1.0) for name, s in scores.items()}
            part = keep_highest(scores, round(size * (keep / size) ** (i / rounds)), distribution)
        return embed(part, weights)
    if criterion == "random":
        draw = {name: torch.rand(w.shape, generator=generator, dtype=torch.float64) for name, w in weights.items()}
        scores = {name: s.to(weights[name].device) for name, s in draw.items()}
    elif criterion == "magnitude":
        scores = {name: w.detach().abs() for name, w in weights.items()}
    elif criterion == "snip":
        scores = snip_scores(weights, loss)
    elif criterion == "grasp":
        scores = grasp_scores(weights, loss)
    else:
        raise ValueError(f"unknown criterion {criterion!r}")
    return embed(keep_highest(active_part(scores, width), keep, distribution), weights)


# TOPOLOGY-AWARE REVIVAL


def topology_need(shape: tuple[int, int]) -> float:
    """E = N * ln(N) / 2 for a layer of N = n_in + n_out neurons: the number of edges around which the random graph
    G(N, M) becomes connected (Erdos and Renyi 1960). A measure of need, not a proof: a layer is bipartite."""
    neurons = sum(shape)
    return neurons * math.log(neurons) / 2


def topology_floor(shape: tuple[int, int]) -> int:
    """Connections that a layer of shape (n_out, n_in) needs: min(n_in * n_out, ceil(E))."""
    return min(shape[0] * shape[1], math.ceil(topology_need(shape)))


def tar_budgets(masks: Masks, reserve: int) -> list[int]:
    """How many of the `reserve` connections revival gives to each layer: by topology need (Jin et al. 2026, arXiv
    2602.04166; the exact rule is ours, see the README).

    A reserve too small for all deficits is split in proportion to them. Otherwise every deficit is filled and the rest
    split in proportion to topology need, as far as a layer still has pruned connections.
    """
    kept = [int(mask.sum()) for mask in masks.values()]
    deficits = [max(0, topology_floor(tuple(m.shape)) - k) for m, k in zip(masks.values(), kept, strict=True)]
    if sum(deficits) >= reserve:
        return allocate(reserve, deficits, deficits)
    room = [mask.numel() - k - d for mask, k, d in zip(masks.values(), kept, deficits, strict=True)]
    rest = allocate(reserve - sum(deficits), [topology_need(tuple(mask.shape)) for mask in masks.values()], room)
    return [d + r for d, r in zip(deficits, rest, strict=True)]


def uniform_budgets(masks: Masks, reserve: int) -> list[int]:
    """The control: the reserve spread over all pruned connections of the network alike."""
    pruned = [mask.numel() - int(mask.sum()) for mask in masks.values()]
    return allocate(reserve, pruned, pruned)


def revive(masks: Masks, budgets: Sequence[int], generator: torch.Generator) -> Masks:
    """New masks in which each layer has `budget` more connections, drawn uniformly without replacement from its pruned
    ones. `generator` is on the CPU."""
    revived = {}
    for (name, mask), budget in zip(masks.items(), budgets, strict=True):
        pruned = (~mask).flatten().nonzero().squeeze(1)
        chosen = pruned[torch.randperm(len(pruned), generator=generator)[:budget].to(mask.device)]
        revived[name] = mask.flatten().index_fill(0, chosen, True).view_as(mask)
    return revived


# DYNAMIC SPARSE TRAINING: what set and rigl do to one layer at a rewiring


def drop_scores(weight: Tensor, gradient: Tensor, criterion: str, generator: torch.Generator) -> Tensor:
    """How much each active connection is worth, the lowest being dropped first; `weight` w and the gradient g of the
    loss there are vectors. The criteria compared by Nowak et al. 2023:

    magnitude: |w| (Han et al. 2015). set: the positive weights closest to zero and the negative ones apart, the same
    fraction of both (Mocanu et al. 2018). mest: |w| + lambda |g|, lambda = MEST_LAMBDA (Yuan et al. 2021). snip: |w g|
    (Lee et al. 2019). sensitivity: |g| / |w| and reciprocal_sensitivity: |w| / |g| (Nowak et al.; 0 / 0 counts as 0).
    random: uniform noise from `generator`, on the CPU.
    """
    magnitude, slope = weight.abs(), gradient.abs()
    if criterion == "magnitude":
        return magnitude
    if criterion == "set":
        rank = torch.empty_like(weight)  # within the weights of one sign, as a fraction of their number
        for same_sign in (weight >= 0, weight < 0):
            order = magnitude[same_sign].argsort(stable=True).argsort()
            rank[same_sign] = (order + 1) / max(1, len(order))
        return rank
    if criterion == "mest":
        return magnitude + MEST_LAMBDA * slope
    if criterion == "snip":
        return magnitude * slope
    if criterion == "sensitivity":
        return (slope / magnitude).nan_to_num(nan=0.0)
    if criterion == "reciprocal_sensitivity":
        return (magnitude / slope).nan_to_num(nan=0.0)
    if criterion == "random":
        return torch.rand(len(weight), generator=generator).to(weight.device)
    raise ValueError(f"unknown drop criterion {criterion!r}")


def drop(
    weight: Tensor, gradient: Tensor, mask: Tensor, count: int, criterion: str, generator: torch.Generator
) -> Tensor:
    """The mask without its `count` active connections of lowest `drop_scores`; ties go to the lower index."""
    active = mask.flatten().nonzero().squeeze(1)
    scores = drop_scores(weight.detach().flatten()[active], gradient.flatten()[active], criterion, generator)
    return mask.flatten().index_fill(0, active[scores.argsort(stable=True)[:count]], False).view_as(mask)


def grow(gradient: Tensor, mask: Tensor, count: int, method: str, generator: torch.Generator) -> Tensor:
    """A mask of `count` connections that are inactive in `mask`: the one after dropping (Evci et al. 2020), or the one
    before it, so that nothing is regrown at once. `rigl`: those of largest |gradient|, the dense gradient of the loss
    (Evci et al. 2020), ties to the lower index; `set`: uniformly at random by `generator`, on the CPU (Mocanu et al.
    2018)."""
    inactive = (~mask).flatten().nonzero().squeeze(1)
    if method == "rigl":
        order = gradient.flatten()[inactive].abs().argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(inactive), generator=generator).to(mask.device)
    return torch.zeros_like(mask).flatten().index_fill(0, inactive[order[:count]], True).view_as(mask)


def rewiring_flops(active: int, size: int, method: str, criterion: str) -> int:
    """Floating-point operations per sample of a rewiring, for the gradient of the network's own layers alone: 2 per
    active connection forward and 2 backward to the inputs; for the weights' gradient 2 per weight, active or not, with
    rigl (Evci et al. 2020), 2 per active one where only dropping needs it, and nothing at all where neither does."""
    if method == "rigl":
        return 4 * active + 2 * size
    return 0 if criterion in ("magnitude", "set", "random") else 6 * active


# MASKED TRAINING


@torch.no_grad()
def zero_pruned(network: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Zero, in place, a network's weights outside the masks and, with its optimizer, both Adam moments there: a moment
    left over from dense training would push the weight away from zero."""
    for name, weight in linear_weights(network).items():
        state = optimizer.state.get(weight, {}) if optimizer else {}
        for tensor in (weight, state.get("exp_avg"), state.get("exp_avg_sq")):
            if tensor is not None:
                tensor.mul_(masks[name])


@torch.no_grad()
def scale_to_active_inputs(network: nn.Module, masks: Masks) -> None:
    """Multiply, in place, each unit's incoming weights by sqrt(n_in / its active inputs): as if they had been drawn for
    that many inputs (Evci et al. 2022, "Gradient Flow in Sparse Neural Networks"). A unit with none is left alone."""
    for name, weight in linear_weights(network).items():
        active = masks[name].sum(1, keepdim=True)
        weight.mul_((weight.shape[1] / active.where(active > 0, weight.shape[1])).sqrt())


def mask_gradients(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], factors: list[Tensor]) -> None:
    """Hook the optimizer so that every step first multiplies the gradients of `weights` by `factors`, 0 where pruned
    and 1 elsewhere, in place, in one fused call. Adam's moments and steps there are then exactly zero, and what
    `zero_pruned` zeroed stays zero."""

    def zero_pruned_gradients(*_) -> None:
        torch._foreach_mul_([weight.grad for weight in weights], factors)

    optimizer.register_step_pre_hook(zero_pruned_gradients)


# SPARSE COMPUTE: a fixed mask, its stored values only


class _Layer(ctypes.Structure):
    """`Layer` of sparse_kernels.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("n_in", "n_out", "dense", "input", "output")]
        + [(name, ctypes.c_void_p) for name in ("row_start", "column", "column_start", "row", "position")]
        + [(name, ctypes.c_int64) for name in ("values", "bias")]
    )


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Build sparse_kernels.cpp for this processor, once for each version of file, compiler and processor, and load it.
    Raises OSError, RuntimeError or subprocess.CalledProcessError if there is no compiler or the build fails."""
    source = Path(__file__).parent / "sparse_kernels.cpp"
    compile = [*shlex.split(os.environ.get("CXX") or "c++"), "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
    target = subprocess.check_output([*compile, "-dM", "-E", "-x", "c++", os.devnull], stderr=subprocess.PIPE)
    key = hashlib.sha256(source.read_bytes() + target + repr(compile).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-rl-tar"
    library = cache / f"{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "kernels.so"
            command = [*compile, str(source), "-o", str(built)]
            if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
                subprocess.run(command, capture_output=True, check=True)  # one thread, where OpenMP is missing
            os.replace(built, library)
    kernels = ctypes.CDLL(str(library))
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kernels.mlp_forward.argtypes = [pointer, integer, pointer, size, pointer, pointer, pointer, integer, integer]
    kernels.mlp_backward.argtypes = [pointer, integer, pointer, size, *[pointer] * 5, integer]
    kernels.tile_width.argtypes = [size]
    return kernels


class SparseMLP(nn.Module):
    """Linear layers with ReLU between them, as one vector `flat` of stored weights and biases, layer after layer.

    `linears` is a dictionary from name to `nn.Linear`, each reading what the one before it writes. The input has shape
    (batch, n_in), the output (batch, n_out), both float32 on the CPU.
    """

    def __init__(self, linears: dict[str, nn.Linear], masks: Masks):
        super().__init__()
        self.masks = masks
        self.kernels = load_kernels()
        self.flat = nn.Parameter(self.compress({name: (m.weight, m.bias) for name, m in linears.items()}).detach())
        self.indices, self.layers = [], (_Layer * len(masks))()
        row, position = 0, 0
        for layer, mask in zip(self.layers, masks.values(), strict=True):
            by_row, by_column = mask.nonzero(), mask.T.nonzero()
            order = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, torch.arange(len(by_row)))
            index = {
                "row_start": nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)),
                "column": by_row[:, 1],
                "column_start": nn.functional.pad(mask.sum(0).cumsum(0), (1, 0)),
                "row": by_column[:, 1],
                "position": order.T[mask.T],
            }
            for name, tensor in index.items():
                self.indices.append(tensor.to(torch.int32).contiguous())  # kept alive for the kernels
                setattr(layer, name, self.indices[-1].data_ptr())
            layer.n_out, layer.n_in = mask.shape
            layer.dense = bool(mask.all())
            layer.input, layer.output = row, row + layer.n_in
            layer.values, layer.bias = position, position + len(by_row)
            row, position = layer.output, layer.bias + layer.n_out
        self.rows = row + self.layers[-1].n_out

    def compress(self, tensors: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The flat vector of dense (weight, bias) pairs, or of what is stored beside them, such as Adam's moments."""
        return torch.cat([part for name, (w, b) in tensors.items() for part in (w[self.masks[name]], b)])

    def expand(self, flat: Tensor) -> dict[str, Tensor]:
        """Dense `<layer>.weight` and `<layer>.bias` of a flat vector, zero where pruned."""
        dense = {}
        for layer, (name, mask) in zip(self.layers, self.masks.items(), strict=True):
            dense[f"{name}.weight"] = flat.new_zeros(mask.shape).masked_scatter(mask, flat[layer.values : layer.bias])
            dense[f"{name}.bias"] = flat[layer.bias : layer.bias + layer.n_out].clone()
        return dense

    def run(self, x: Tensor, flat: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The output, and the activations of all layers if they are to be kept for backward."""
        if x.dim() != 2 or x.shape[1] != self.layers[0].n_in or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"needs float32 of shape (batch, {self.layers[0].n_in}) on the CPU, got {x.dtype} {x.shape}"
            )
        batch, threads = len(x), torch.get_num_threads()
        x, y = x.contiguous(), x.new_empty(batch, self.layers[-1].n_out)
        width = self.kernels.tile_width(batch)
        workspace = x.new_empty((-(-batch // width) if keep else threads) * width * self.rows)
        self.kernels.mlp_forward(
            self.layers, len(self.layers), flat.data_ptr(), batch, x.data_ptr(), y.data_ptr(),
            workspace.data_ptr(), keep, threads,
        )  # fmt: skip
        return y, workspace

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.flat.requires_grad):
            return _SparseMLPFunction.apply(x, self.flat, self)
        return self.run(x, self.flat, keep=False)[0]


class _SparseMLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, flat, mlp):
        y, ctx.workspace = mlp.run(x, flat, keep=True)
        ctx.save_for_backward(x, flat)
        ctx.mlp = mlp
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        (x, flat), mlp, grad_y = ctx.saved_tensors, ctx.mlp, grad_y.contiguous()
        grad_x = grad_y.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        grad_flat = torch.empty_like(flat) if ctx.needs_input_grad[1] else None
        workspace, ctx.workspace = ctx.workspace, None  # the kernel overwrites it with gradients
        if workspace is None:  # a retained graph, run backward again
            _, workspace = mlp.run(x, flat, keep=True)
        width = mlp.kernels.tile_width(len(x))
        inputs = max((-(-layer.n_in // width) * width for layer in mlp.layers if layer.dense), default=0)
        scratch = flat.new_empty(max(len(flat), -(-len(x) // width) * width * inputs))
        mlp.kernels.mlp_backward(
            mlp.layers, len(mlp.layers), flat.data_ptr(), len(x), grad_y.data_ptr(),
            None if grad_x is None else grad_x.data_ptr(), None if grad_flat is None else grad_flat.data_ptr(),
            workspace.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_flat, None


def choose_sparse_compute(
    compute: str, methods: dict[str, str], device: torch.device, networks: dict[str, nn.Module], masks: dict[str, Masks]
) -> list[str]:
    """The names of the networks to train on stored values only; says on the console which they are and why. `auto`
    takes a network whose mask is fixed, on the CPU, a chain of Linear and ReLU of which at most SPARSE_PAYS_UP_TO is
    active, or all and no layer has more inputs or outputs than DENSE_PAYS_UP_TO, if the kernels can be built. `sparse`
    overrules these two limits."""

    def choose(name: str) -> tuple[str, str]:
        density = sum(int(mask.sum()) for mask in masks[name].values()) / sum(m.numel() for m in masks[name].values())
        width = max(max(mask.shape) for mask in masks[name].values())
        in_torch = "dense" if methods[name] in ("dense", "tiny") else "masked"
        if methods[name] in DYNAMIC_METHODS:
            return in_torch, f"--method {methods[name]} has no fixed mask to compile"
        if compute == "masked":
            return in_torch, "--compute masked asks for it"
        if device.type != "cpu":
            return in_torch, f"the kernels are for the CPU and the networks are on {device.type}"
        if not is_mlp(networks[name]):
            return in_torch, "it is not a chain of Linear layers with bias and a ReLU after all but the last"
        if compute == "auto" and SPARSE_PAYS_UP_TO < density < 1:
            limit = f"up to {SPARSE_PAYS_UP_TO:.0%} or where nothing is pruned"
            return in_torch, f"it is {density:.0%} dense and auto takes the kernels {limit}"
        if compute == "auto" and density == 1 and width > DENSE_PAYS_UP_TO:
            return in_torch, f"it is dense, {width} wide, and auto takes the kernels up to {DENSE_PAYS_UP_TO}"
        try:
            load_kernels()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
            return in_torch, f"sparse_kernels.cpp cannot be built here: {output.splitlines()[0]}"
        if compute == "sparse":
            return "sparse", "--compute sparse asks for it"
        return "sparse", f"it is {density:.0%} dense" if density < 1 else f"it is dense, {width} wide"

    choices = {name: choose(name) for name in networks}
    for choice in dict.fromkeys(choices.values()):
        how, why = choice
        names = ", ".join(name for name in networks if choices[name] == choice)
        tqdm.write(f"compute: {names} {how}, since {why}")
    return [name for name, (how, _) in choices.items() if how == "sparse"]


def is_mlp(network: nn.Module) -> bool:
    """Whether `SparseMLP` computes what the children of this network compute."""
    kinds = [type(child) for child in network.children()]
    with_bias = all(child.bias is not None for child in network.children() if isinstance(child, nn.Linear))
    alternating = kinds[::2] == [nn.Linear] * len(kinds[::2]) and kinds[1::2] == [nn.ReLU] * len(kinds[1::2])
    return isinstance(network, nn.Sequential) and len(kinds) % 2 == 1 and alternating and with_bias


def compact(network: nn.Sequential, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Replace, in place, the layers of a network by one `SparseMLP` that computes the same, and the optimizer's
    parameters and moments by those of the stored values."""
    linears = {name: network.get_submodule(name) for name in masks}
    mlp = SparseMLP(linears, masks)
    for name in list(network._modules):
        delattr(network, name)
    network.add_module("sparse", mlp)
    mlp.flat.requires_grad_(next(iter(linears.values())).weight.requires_grad)
    if optimizer is None:
        return
    state = {name: (optimizer.state.pop(m.weight, {}), optimizer.state.pop(m.bias, {})) for name, m in linears.items()}
    dense = {id(p) for m in linears.values() for p in m.parameters()}
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in dense] + [mlp.flat]
    if all(weight_state for weight_state, _ in state.values()):
        moments = {
            key: mlp.compress({name: (weight[key], bias[key]) for name, (weight, bias) in state.items()})
            for key in ("exp_avg", "exp_avg_sq")
        }
        optimizer.state[mlp.flat] = {"step": next(iter(state.values()))[0]["step"], **moments}


def dense_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The state dictionary on the CPU with dense weights, zero where pruned, however the network computes."""
    state = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
    if "sparse.flat" in state:
        state = network.sparse.expand(state.pop("sparse.flat")) | state
    return state


def dense_adam_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Adam's step and moments by parameter name, dense as in `dense_state_dict`; empty before the first step."""
    if (mlp := getattr(network, "sparse", None)) is None:
        return {name: dict(optimizer.state.get(param, {})) for name, param in network.named_parameters()}
    state = optimizer.state.get(mlp.flat, {})
    moments = {key: mlp.expand(tensor) for key, tensor in state.items() if key != "step"}
    names = mlp.expand(mlp.flat.detach())
    return {
        name: {"step": state["step"]} | {key: m[name] for key, m in moments.items()} if state else {} for name in names
    }


def load_adam_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]) -> None:
    """Take over what `dense_adam_state` gave, before the network is made sparse."""
    for name, param in network.named_parameters():
        if state[name]:
            optimizer.state[param] = {key: tensor.clone() for key, tensor in state[name].items()}


# FROM PRUNING TO TRAINING


def fix_masks(
    networks: dict[str, nn.Sequential],
    targets: dict[str, nn.Sequential],
    optimizers: dict[str, torch.optim.Optimizer],
    masks: dict[str, Masks],
    to_compact: list[str],
) -> dict[str, Masks]:
    """From here on each network and its target train within its masks. What is pruned is zeroed once, Adam's moments
    included, and then held at zero by one gradient hook per optimizer or, in the networks `to_compact`, not stored at
    all. Returns the hook's masks of the others as float tensors; changing them in place changes what stays zero."""
    for name, network in networks.items():
        zero_pruned(network, masks[name], optimizers[name])
    for name, target in targets.items():
        zero_pruned(target, masks[name])
    for name in to_compact:
        compact(networks[name], masks[name], optimizers[name])
        if name in targets:
            compact(targets[name], masks[name])
    factors = {
        name: {layer: mask.float() for layer, mask in masks[name].items()}
        for name in networks
        if name not in to_compact
    }
    for optimizer in dict.fromkeys(optimizers.values()):
        pairs = [
            (weight, factors[name][layer])
            for name in factors
            if optimizers[name] is optimizer and not all(bool(mask.all()) for mask in masks[name].values())
            for layer, weight in linear_weights(networks[name]).items()
        ]
        if pairs:
            mask_gradients(optimizer, *map(list, zip(*pairs, strict=True)))
    return factors


# WHAT A MASK LOOKS LIKE


def topology_report(static: Masks, masks: Masks, budget: int, reserve: int, width: int) -> dict:
    """Counts for `topology.json`, per layer. `blind_inputs` (inputs with no active connection out) and `dead_units`
    (outputs with none in) are pairs: after static pruning, after revival. They, `floor` and `deficit` are those of
    `part`, the layer's active neurons."""
    layers, before_parts = {}, active_part(static, width)
    for name, mask in active_part(masks, width).items():
        before, part = before_parts[name], tuple(mask.shape)
        kept, floor = int(before.sum()), topology_floor(part)
        layers[name] = {
            "shape": list(masks[name].shape),
            "size": masks[name].numel(),
            "part": list(part),
            "static": kept,
            "floor": floor,
            "deficit": max(0, floor - kept),
            "revived": int((mask & ~before).sum()),
            "active": int(mask.sum()),
            "blind_inputs": [int((~m.any(0)).sum()) for m in (before, mask)],
            "dead_units": [int((~m.any(1)).sum()) for m in (before, mask)],
        }
    return {"budget": budget, "reserve": reserve, "active_width": width, "layers": layers}


def topology_table(report: dict) -> str:
    """The report of every network as one markdown table, its columns aligned for the console."""
    columns = ["size", "static", "floor", "deficit", "revived", "active"]
    rows = [["layer", "shape", "active part", *columns, "density", "blind inputs", "dead units"]]
    for network, topology in report.items():
        for name, layer in topology["layers"].items():
            density = f"{layer['active'] / layer['size']:.4f}"
            pairs = ["{} -> {}".format(*layer[key]) for key in ("blind_inputs", "dead_units")]
            shapes = ["{}x{}".format(*layer[key]) for key in ("shape", "part")]
            rows.append([f"{network}.{name}", *shapes, *(str(layer[c]) for c in columns), density, *pairs])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def topology_warnings(network: str, static: Masks, masks: Masks, observation_size: int) -> list[str]:
    """Sentences on what static pruning cuts, and what revival makes of it: layers left without a connection,
    observation or action inputs left unread. A network's inputs are the observation and, for a critic, the action."""
    warnings = []
    for name, mask in masks.items():
        if not static[name].any():
            after = int(mask.sum())
            warnings.append(f"{network}.{name} keeps no connection after static pruning and has {after} after revival.")
    first = next(iter(masks))
    blind_before, blind_after = (~static[first].any(0)).tolist(), (~masks[first].any(0)).tolist()
    size = len(blind_before)
    for kind, start, stop in (("observation", 0, observation_size), ("action", observation_size, size)):
        before = [i - start for i in range(start, stop) if blind_before[i]]
        after = [i - start for i in range(start, stop) if blind_after[i]]
        if before:
            warnings.append(
                f"{network} is blind to {len(before)} of {stop - start} {kind} dimensions after static pruning: "
                f"{before}; after revival to {len(after)}{': ' + str(after) if after else ''}."
            )
    return warnings


def mask_image(static: Tensor, mask: Tensor, part: tuple[int, int]) -> np.ndarray:
    """A layer's mask after static pruning (left) and after revival (right) as uint8 of shape (height, width, 3), about
    256 pixels square each or larger. Outputs down, inputs across; dark: pruned, grey: kept, orange: revived, dark blue:
    outside the active neurons' `part`."""
    colours = torch.tensor([[24, 26, 32], [176, 182, 192], [255, 140, 0], [16, 32, 96]], dtype=torch.uint8)
    cell = [max(1, 256 // n) for n in mask.shape]
    before, after = static.cpu().long(), 2 * mask.cpu().long() - static.cpu().long()
    for kinds in (before, after):
        kinds[part[0] :], kinds[:, part[1] :] = 3, 3
    panels = [colours[kind].repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1) for kind in (before, after)]
    gap = torch.full((panels[0].shape[0], 8, 3), 255, dtype=torch.uint8)
    return torch.cat([panels[0], gap, panels[1]], 1).numpy()


def log_topology(
    writer: SummaryWriter,
    run_dir: Path,
    global_step: int,
    budgets: dict[str, tuple[int, int]],
    static_masks: dict[str, Masks],
    masks: dict[str, Masks],
    observation_size: int,
    widths: dict[str, int],
) -> None:
    """What pruning and revival did to each network: topology.json, a table and warnings on the console and in
    TensorBoard, one image per layer there."""
    report = {name: topology_report(static_masks[name], masks[name], *budgets[name], widths[name]) for name in masks}
    write_json(run_dir / "topology.json", report)
    table = topology_table(report)
    tqdm.write(f"Topology at step {global_step}:\n{table}")
    writer.add_text("topology/revival", table, global_step)
    warnings = [w for name in masks for w in topology_warnings(name, static_masks[name], masks[name], observation_size)]
    if warnings:
        tqdm.write("\n".join(f"warning: {warning}" for warning in warnings))
        writer.add_text("topology/warnings", "\n\n".join(warnings), global_step)
    for name, network_masks in masks.items():
        for layer, mask in network_masks.items():
            image = mask_image(static_masks[name][layer], mask, report[name]["layers"][layer]["part"])
            writer.add_image(f"topology/{name}.{layer}", image, global_step, dataformats="HWC")


def log_rewiring(
    run_dir: Path, global_step: int, previous: dict[str, Masks], masks: dict[str, Masks]
) -> dict[str, float]:
    """Put what the rewiring of the networks in `previous`, their masks before it, has done into topology.json. Returns
    the fraction of each one's active connections that it replaced."""
    report, replaced = json.loads((run_dir / "topology.json").read_text()), {}
    for name in previous:
        layers = report[name]["layers"]
        width = report[name].get("active_width")  # older runs have none
        before = active_part(previous[name], width)
        for layer, mask in active_part(masks[name], width).items():
            layers[layer]["last_rewiring"] = {
                "step": global_step,
                "replaced": int((mask & ~before[layer]).sum()),
                "active": int(mask.sum()),
                "blind_inputs": int((~mask.any(0)).sum()),
                "dead_units": int((~mask.any(1)).sum()),
            }
        replaced[name] = sum(layer["last_rewiring"]["replaced"] for layer in layers.values()) / report[name]["budget"]
    write_json(run_dir / "topology.json", report)
    return replaced


def log_sparsity(
    writer: SummaryWriter,
    global_step: int,
    masks: dict[str, Masks],
    first_masks: dict[str, Masks],
    rewired: dict[str, float],
) -> None:
    """The sparsity of each network and the density of each layer, counted from the masks; how far the masks have moved
    from the first ones; and the fraction that the last rewiring replaced, 0 where there was none."""
    for name, network_masks in masks.items():
        active = sum(int(mask.sum()) for mask in network_masks.values())
        size = sum(mask.numel() for mask in network_masks.values())
        lost = sum(int((first_masks[name][layer] & ~mask).sum()) for layer, mask in network_masks.items())
        writer.add_scalar(f"sparsity/{name}", 1 - active / size, global_step)
        writer.add_scalar(f"sparsity/{name}_distance", lost / active, global_step)
        writer.add_scalar(f"sparsity/{name}_rewired", rewired.get(name, 0.0), global_step)
        for layer, mask in network_masks.items():
            writer.add_scalar(f"density/{name}.{layer}", float(mask.sum()) / mask.numel(), global_step)


# ARGUMENTS AND ENVIRONMENTS


def fail(message: str, code: int = 2) -> NoReturn:
    tqdm.write(f"error: {message}", file=sys.stderr)  # not into a progress bar
    sys.exit(code)


def stop_unless_finite(writer: SummaryWriter, global_step: int, quantities: dict[str, float]) -> None:
    """End the program with one sentence, the log closed, if one of these is NaN or infinite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            writer.close()
            fail(f"{name} is {value} at step {global_step}: training diverged; the log is in {writer.log_dir}", code=1)


def complete_args(args) -> None:
    """Put in what defaults to another flag, in place. `args` is the dataclass of a script's arguments."""
    args.prune_at = args.learning_starts if args.prune_at is None else args.prune_at
    args.actor_method, args.critic_method = args.actor_method or args.method, args.critic_method or args.method
    for network in ("actor", "critic"):
        own = getattr(args, f"{network}_sparsity")
        sparsity = 0.0 if getattr(args, f"{network}_method") == "dense" else args.sparsity if own is None else own
        setattr(args, f"{network}_sparsity", sparsity)
        setattr(args, f"{network}_init", getattr(args, f"{network}_init") or args.init)


def check_args(args) -> None:
    """End the program with one sentence if a value cannot work."""
    positive = "total_timesteps hidden_size buffer_size batch_size policy_lr q_lr learning_rate policy_frequency "
    positive += "target_network_frequency eval_frequency eval_episodes torch_threads rewire_every checkpoint_frequency"
    given, rules = asdict(args), {}
    for name in filter(given.__contains__, positive.split()):
        rules[name] = (0 < given[name] < math.inf, "positive and finite")
    for name in filter(given.__contains__, ("alpha", "policy_noise", "noise_clip", "exploration_noise")):
        rules[name] = (0 <= given[name] < math.inf, "at least 0 and finite")
    for name in ("sparsity", "actor_sparsity", "critic_sparsity", "reserve"):
        rules[name] = (0 <= given[name] < 1, "at least 0 and below 1")
    for name in ("gamma", "rewire_fraction", "rewire_stop"):
        rules[name] = (0 <= given[name] <= 1, "in [0, 1]")
    rules["tau"] = (0 < args.tau <= 1, "above 0 and at most 1")
    rules["seed"] = (0 <= args.seed < 2**31, "at least 0 and below 2**31")
    for name in ("learning_starts", "prune_at"):
        within = f"at least 0 and below the end of training, --total-timesteps {args.total_timesteps}"
        rules[name] = (0 <= given[name] < args.total_timesteps, within)
    for name, (holds, rule) in rules.items():
        if not holds:
            fail(f"--{name.replace('_', '-')} must be {rule}, got {given[name]}")
    if args.criterion in ("snip", "grasp") and args.prune_at == 0:
        fail(f"--criterion {args.criterion} needs replay data and step 0 has none; set --prune-at above 0")
    if "sparse" in (args.actor_init, args.critic_init) and args.prune_at > args.learning_starts:
        fail("--init sparse does not rescale trained weights; set --prune-at to at most --learning-starts")
    if isinstance(args.active_width, int) and not 1 <= args.active_width <= args.hidden_size:
        fail(f"--active-width must be from 1 to --hidden-size {args.hidden_size}, got {args.active_width}")
    for method in (args.actor_method, args.critic_method):
        if args.compute == "sparse" and method in DYNAMIC_METHODS:
            fail(f"--compute sparse needs masks that stay fixed, and --method {method} has none; use --compute auto")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda needs a CUDA device and a torch build for it; use --device cpu")


class NewWorld(gym.Wrapper):
    """A new Box2D world for each episode. BipedalWalker keeps one for life, and its past shows in the last bits; with a
    new one an episode is a function of the generator and the actions, so that a resumed run can replay it."""

    def reset(self, **kwargs):
        self.unwrapped._destroy()
        self.unwrapped.world = type(self.unwrapped.world)(gravity=self.unwrapped.world.gravity)
        return super().reset(**kwargs)


def make_env(env_id: str, video: bool = False) -> gym.Env:
    # the older MuJoCo versions (-v4) are chosen on purpose: published results are on them
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    warnings.filterwarnings("ignore", message=".*Overwriting existing videos.*")  # on resuming
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if video else {}))
        if type(env.unwrapped).__module__.startswith("gymnasium.envs.box2d"):
            env = NewWorld(env)
    except gym.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(env_id, gym.registry, n=3)
        fail(f"unknown --env-id {env_id} ({error}); close names: {', '.join(close) or 'none'}")
    except (ImportError, TypeError, gym.error.Error) as error:
        fail(
            f"cannot make {env_id}: {error}; `pip install -r requirements.txt` brings the MuJoCo and Box2D environments"
        )
    action_space, observation_space = env.action_space, env.observation_space
    if not (isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1 and action_space.is_bounded()):
        fail(f"{env_id} has the action space {action_space}; this script needs a bounded 1-D Box")
    if not (isinstance(observation_space, gym.spaces.Box) and len(observation_space.shape) == 1):
        fail(f"{env_id} has the observation space {observation_space}; this script needs a 1-D Box")
    if video:
        check_video(env)
    return env


def check_video(env: gym.Env) -> None:
    """End the program with one sentence if `env` cannot be filmed here."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    if importlib.util.find_spec("moviepy") is None:
        fail("--capture-video needs moviepy; `pip install moviepy`")
    try:
        env.reset()
        env.render()
    except Exception as error:  # every backend has errors of its own
        fail(f"--capture-video cannot render here ({error}); without a screen install EGL (Debian: libegl1)")


# RUN FOLDERS AND CHECKPOINTS

CHECKPOINT_FORMAT = 1  # raised whenever a checkpoint of before can no longer be resumed
REPLAY_FILE_ROWS = 50_000  # transitions in one file of the replay buffer; that much is copied in memory
MAY_CHANGE = (
    "resume",
    "total_timesteps",
    "compute",
    "device",
    "torch_threads",
    "checkpoint_frequency",
    "capture_video",
)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The file is there as a whole or not at all, whenever the process or the machine dies. Ends the program with one
    sentence if it cannot be written."""
    part = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        why = error.__context__ or error  # torch hides the system's own words
        resumable = (path.parent / "checkpoint.pt").exists() or path.parent.name == "replay"
        how = (
            "the last checkpoint is whole: make room, then go on with --resume"
            if resumable
            else "make room, start anew"
        )
        fail(f"cannot write {path} ({why}); {how}", code=1)


@contextlib.contextmanager
def full_disk_in_a_sentence() -> Iterator[None]:
    """End the program with one sentence if TensorBoard's writer finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        fail(f"{error}; the last checkpoint is whole: make room, then go on with --resume", code=1)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(f"{json.dumps(content, indent=2)}\n".encode()))


def log_args(writer: SummaryWriter, args) -> None:
    """All arguments as a table and, to filter and compare runs by them, through TensorBoard's HParams plugin."""
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    shown = {key: str(value) if value is None else value for key, value in asdict(args).items()}
    metrics = dict.fromkeys(("eval/episodic_return", "charts/episodic_return", "charts/SPS"), 0)
    for summary in hparams(shown, metrics):
        writer.file_writer.add_summary(summary)


def git_commit(folder: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def make_run_dir(args) -> Path:
    """A new folder <runs_dir>/<env_id>__<exp_name>__<method>__s<sparsity>__<seed>__<unix time>/ with config.json.
    Method and sparsity are <actor's>+<critics'> where these differ. Where --active-width or --init sparse is set,
    __w<width> and __init-<init> follow the sparsity. `args` is the script's dataclass of arguments."""
    method = "+".join(dict.fromkeys([args.actor_method, args.critic_method]))
    sparsity = "+".join(dict.fromkeys([str(args.actor_sparsity), str(args.critic_sparsity)]))
    init = "+".join(dict.fromkeys([args.actor_init, args.critic_init]))
    arm = f"{method}__s{sparsity}" + (f"__w{args.active_width}" if args.active_width else "")
    arm += "" if init == "dense" else f"__init-{init}"
    unix_time = int(time.time())
    while True:
        name = f"{args.env_id}__{args.exp_name}__{arm}__{args.seed}__{unix_time}"
        run_dir = Path(args.runs_dir) / name.replace("/", "-")
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:
            unix_time += 1  # its twin started in the same second
        except OSError as error:
            fail(f"cannot make the run folder ({error}); choose another --runs-dir")
    write_config(run_dir, args)
    return run_dir


def claim(run_dir: Path) -> None:
    """Keep every other process out of a run folder for as long as this one lives; end the program with one sentence if
    another one has it. Where the system or the file system has no such locks, nothing is kept out."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        import fcntl  # Windows has none

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another process is running {run_dir}; let it end or stop it first")
    except (ImportError, OSError):
        os.close(lock)


def versions() -> dict[str, str]:
    modules = {module.__name__: str(module.__version__) for module in (torch, gym, mujoco, np)}
    return {"python": platform.python_version(), **modules}


def write_config(run_dir: Path, args) -> None:
    commit = git_commit(Path(__file__).parent)
    config = {"args": asdict(args), "versions": versions(), "git_commit": commit, "processor": processor()}
    write_json(run_dir / "config.json", config)


def load_checked(path: Path, device: torch.device | str = "cpu") -> object:
    """What torch.save has written, checked against the file's checksums. Runs no code from the file; ends the program
    with one sentence if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no {path}; check the path")
    except (OSError, EOFError, RuntimeError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        fail(f"cannot read {path} ({error}); it is damaged or not one of ours, so use another or start the run anew")
    except pickle.UnpicklingError:
        fail(f"{path} holds more than tensors and numbers and is not read; use one that this project wrote")


def load_state(path: Path, script: str, device: torch.device | str = "cpu", keys: Sequence[str] = ()) -> dict:
    """The dictionary in a final.pt or checkpoint.pt, checked as above, to be one of this script and format, and to have
    `keys`."""
    state = load_checked(path, device)
    if not isinstance(state, dict) or not {"script", "format", "args", "global_step", "actor"} <= state.keys():
        fail(f"{path} is not a file of {script}.py; use one of its final.pt or checkpoint.pt")
    if state["script"] != script:
        fail(f"{path} is of {state['script']}.py; use that script instead of {script}.py")
    if state["format"] != CHECKPOINT_FORMAT:
        fail(
            f"{path} has format {state['format']} and this version reads {CHECKPOINT_FORMAT}; use the one that wrote it"
        )
    if missing := sorted(set(keys) - state.keys()):
        fail(f"{path} lacks {', '.join(missing)} and is no checkpoint; use another or start the run anew")
    return state


def load_checkpoint(run_dir: str, script: str, device: torch.device | str = "cpu") -> dict:
    """The checkpoint of a run folder, checked."""
    if Path(run_dir).is_file():
        fail(f"--resume takes the run folder, not a file; try --resume {shlex.quote(str(Path(run_dir).parent))}")
    keys = ("adam", "revived_masks", "rewired", "actor_scalars", "training_flops", "episode", "random", "added")
    return load_state(Path(run_dir) / "checkpoint.pt", script, device, (*keys, "masks", "log_sizes", "versions"))


def load_networks(modules: dict[str, nn.Module], state: dict) -> None:
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        fail(f"the saved networks are not those of this script ({why}); use the one that saved them")


def resumed_args(arguments: type, run_dir: str, script: str):
    """The arguments of the run in this folder, of the script's dataclass."""
    saved = load_checkpoint(run_dir, script)["args"]
    try:
        return arguments(**saved | {"resume": run_dir})
    except TypeError as error:
        fail(
            f"the flags of the run in {run_dir} are not those of this {script}.py ({error}); use the one that began it"
        )


def check_resumed_args(given, saved) -> None:
    """End the program with one sentence if the arguments `given` with --resume, in which what the user left out is as
    `saved`, contradict the run."""
    for name, value in asdict(given).items():
        before = getattr(saved, name)
        if name not in MAY_CHANGE and value != before:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} {value} contradicts the run, which has {before}; leave it out or start a new run")
    if given.total_timesteps < saved.total_timesteps:
        fail(f"--total-timesteps may grow but not shrink; the run has {saved.total_timesteps}")


def random_states(mask_generator: torch.Generator, action_space: gym.Space) -> dict:
    """The state of every random generator but the environment's, in types that torch.load takes as data."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "masks": mask_generator.get_state(),
        "actions": action_space.np_random.bit_generator.state,
    }


def set_random_states(states: dict, mask_generator: torch.Generator, action_space: gym.Space) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    mask_generator.set_state(states["masks"].cpu())
    action_space.np_random.bit_generator.state = states["actions"]


def replay_files(run_dir: Path) -> dict[Path, tuple[int, int]]:
    """The files replay/<start>-<stop>.pt with transitions start to stop, in order."""
    paths = [path for path in run_dir.glob("replay/*.pt") if re.fullmatch(r"\d+-\d+", path.stem)]
    ranges = {path: tuple(map(int, path.stem.split("-"))) for path in paths}
    return dict(sorted(ranges.items(), key=lambda item: item[1]))


def save_checkpoint(run_dir: Path, state: dict, rows: Tensor | None, added: int) -> None:
    """Write checkpoint.pt as a whole, with the sizes of the event files. Of the replay buffer, `rows` (transition i of
    `added` in row i % len(rows)), only what is new is written, in files of its own; none of it if `rows` is None."""
    if rows is not None:
        start = max(0, added - len(rows), *(stop for _, stop in replay_files(run_dir).values()))
        while start < added:
            first = start % len(rows)
            stop = min(added, start + REPLAY_FILE_ROWS, start - first + len(rows))
            piece = rows[first : first + stop - start].cpu().clone()  # a view would be saved with all of its block
            write_whole(run_dir / "replay" / f"{start}-{stop}.pt", functools.partial(torch.save, piece))
            start = stop
    logs = list(run_dir.glob("*tfevents*"))
    for path in logs:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    state = state | {"log_sizes": {path.name: path.stat().st_size for path in logs}, "versions": versions()}
    write_whole(run_dir / "checkpoint.pt", functools.partial(torch.save, state))
    for path, (_, stop) in replay_files(run_dir).items():
        if rows is None or stop <= added - len(rows):
            path.unlink()


def rewind(run_dir: Path, args, checkpoint: dict, rows: Tensor, added: int) -> None:
    """Bring the run folder back to its checkpoint: cut off what was logged after it and read the replay buffer's
    `added` transitions into `rows`. config.json takes over `args`, since some may change. Warns if a log is lost or the
    packages are others. Nothing is changed before the replay buffer is known to be whole."""
    read = max(0, added - len(rows))
    for path, (start, stop) in replay_files(run_dir).items():
        if stop <= added and start <= read < stop:
            rows[torch.arange(start, stop) % len(rows)] = load_checked(path).to(rows.device)
            read = stop
    if read < added:
        fail(f"{run_dir}/replay lacks transitions {read} to {added}; start the run anew")
    logs = {path.name: path for path in run_dir.glob("*tfevents*")}
    for name, size in checkpoint["log_sizes"].items():
        if name not in logs or logs[name].stat().st_size < size:
            tqdm.write(f"warning: {name} has lost some of what was logged before the checkpoint")
        else:
            os.truncate(logs[name], size)
    for name in logs.keys() - checkpoint["log_sizes"].keys():
        logs[name].unlink()
    (run_dir / "final.pt").unlink(missing_ok=True)  # it comes anew at the end
    if checkpoint["versions"] != versions():
        tqdm.write(f"warning: the run began with {checkpoint['versions']} and goes on with {versions()}")
    write_config(run_dir, args)
    for path, (_, stop) in replay_files(run_dir).items():
        if stop > added:
            path.unlink()
