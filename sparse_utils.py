"""Masks for sparse reinforcement learning: budgets, static pruning, Topology-Aware Revival, rewiring, masked gradients.

Shared by `sac_tar.py` and `td3_tar.py`. Everything works on one network at a time. `weights` and `masks` are
dictionaries from layer name to a tensor of shape (n_out, n_in), in the order in which the layers are applied; a mask is
boolean and True marks an active connection. Nothing here draws from torch's global random generator.
"""

import ctypes
import functools
import hashlib
import json
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Masks = dict[str, Tensor]
FIXED_METHODS = ("tar", "static", "uniform")  # arms whose mask never changes after pruning and revival
MEST_LAMBDA = 1.0  # the value in the code of Nowak et al. 2023
SPARSE_PAYS_UP_TO = 0.5  # density up to which --compute auto uses the sparse kernels; measured, README


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
) -> Masks:
    """The base masks: exactly `keep` connections by `criterion` (random, magnitude, snip, grasp, synflow) and
    `distribution` (er, uniform, global). `loss` is the network's own loss, for snip and grasp; `generator`, on the CPU,
    serves random. The weights are read, not changed."""
    if criterion == "synflow":
        masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        size, rounds = sum(w.numel() for w in weights.values()), 100
        for i in range(1, rounds + 1):
            scores = synflow_scores({name: w * masks[name] for name, w in weights.items()})
            # below zero, so that what is pruned stays pruned even where a cut-off connection scores zero
            scores = {name: s.masked_fill(~masks[name], -1.0) for name, s in scores.items()}
            masks = keep_highest(scores, round(size * (keep / size) ** (i / rounds)), distribution)
        return masks
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
    return keep_highest(scores, keep, distribution)


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
    """A mask of `count` connections that are inactive in `mask`, which is the one before dropping, so that nothing is
    regrown at once. `rigl`: those of largest |gradient|, the dense gradient of the loss (Evci et al. 2020), ties to the
    lower index; `set`: uniformly at random by `generator`, on the CPU (Mocanu et al. 2018)."""
    inactive = (~mask).flatten().nonzero().squeeze(1)
    if method == "rigl":
        order = gradient.flatten()[inactive].abs().argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(inactive), generator=generator).to(mask.device)
    return torch.zeros_like(mask).flatten().index_fill(0, inactive[order[:count]], True).view_as(mask)


def rewiring_flops(active: int, size: int, method: str, criterion: str) -> int:
    """Floating-point operations per sample for the gradient that a rewiring of a network needs: 2 per active connection
    forward and 2 backward to the inputs; for the weights' gradient 2 per weight, active or not, with rigl (Evci et al.
    2020), 2 per active one where only dropping needs it, and nothing at all where neither does."""
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
        [(name, ctypes.c_int64) for name in ("n_in", "n_out", "input", "output")]
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
        transposed = torch.empty_like(flat)
        mlp.kernels.mlp_backward(
            mlp.layers, len(mlp.layers), flat.data_ptr(), len(x), grad_y.data_ptr(),
            None if grad_x is None else grad_x.data_ptr(), None if grad_flat is None else grad_flat.data_ptr(),
            workspace.data_ptr(), transposed.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_flat, None


def choose_sparse_compute(
    compute: str, methods: dict[str, str], device: torch.device, networks: dict[str, nn.Module], masks: dict[str, Masks]
) -> list[str]:
    """The names of the networks to train on stored values only; says on the console which they are and why. `auto`
    takes a network whose mask is fixed, on the CPU, a chain of Linear and ReLU of which at most SPARSE_PAYS_UP_TO is
    active, if the kernels can be built. `sparse` overrules the density, unless nothing at all is pruned."""

    def choose(name: str) -> tuple[bool, str]:
        density = sum(int(mask.sum()) for mask in masks[name].values()) / sum(m.numel() for m in masks[name].values())
        if methods[name] not in FIXED_METHODS:
            return False, f"--method {methods[name]} has no fixed mask to compile"
        if compute == "masked":
            return False, "--compute masked asks for it"
        if device.type != "cpu":
            return False, f"the kernels are for the CPU and the networks are on {device.type}"
        if not is_mlp(networks[name]):
            return False, "it is not a chain of Linear layers with bias and a ReLU after all but the last"
        if density == 1 or (compute == "auto" and density > SPARSE_PAYS_UP_TO):
            return False, f"it is {density:.0%} dense and the kernels pay off up to {SPARSE_PAYS_UP_TO:.0%}"
        try:
            load_kernels()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
            return False, f"sparse_kernels.cpp cannot be built here: {output.splitlines()[0]}"
        return True, f"it is {density:.0%} dense"

    choices = {name: choose(name) for name in networks}
    for choice in dict.fromkeys(choices.values()):
        sparse, why = choice
        names = ", ".join(name for name in networks if choices[name] == choice)
        tqdm.write(f"compute: {names} {'sparse' if sparse else 'masked'}, since {why}")
    return [name for name, (sparse, _) in choices.items() if sparse]


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


def topology_report(static: Masks, masks: Masks, budget: int, reserve: int) -> dict:
    """Counts for `topology.json`, per layer. `blind_inputs` (inputs with no active connection out) and `dead_units`
    (outputs with none in) are pairs: after static pruning, after revival."""
    layers = {}
    for name, mask in masks.items():
        before, shape = static[name], tuple(mask.shape)
        kept, floor = int(before.sum()), topology_floor(shape)
        layers[name] = {
            "shape": list(shape),
            "size": mask.numel(),
            "static": kept,
            "floor": floor,
            "deficit": max(0, floor - kept),
            "revived": int((mask & ~before).sum()),
            "active": int(mask.sum()),
            "blind_inputs": [int((~m.any(0)).sum()) for m in (before, mask)],
            "dead_units": [int((~m.any(1)).sum()) for m in (before, mask)],
        }
    return {"budget": budget, "reserve": reserve, "layers": layers}


def topology_table(report: dict) -> str:
    """The report of every network as one markdown table, its columns aligned for the console."""
    columns = ["size", "static", "floor", "deficit", "revived", "active"]
    rows = [["layer", "shape", *columns, "density", "blind inputs", "dead units"]]
    for network, topology in report.items():
        for name, layer in topology["layers"].items():
            density = f"{layer['active'] / layer['size']:.4f}"
            pairs = ["{} -> {}".format(*layer[key]) for key in ("blind_inputs", "dead_units")]
            shape = "{}x{}".format(*layer["shape"])
            rows.append([f"{network}.{name}", shape, *(str(layer[c]) for c in columns), density, *pairs])
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


def mask_image(static: Tensor, mask: Tensor) -> np.ndarray:
    """A layer's mask after static pruning (left) and after revival (right) as uint8 of shape (height, width, 3), about
    256 pixels square each or larger. Outputs down, inputs across; dark: pruned, grey: kept, orange: revived."""
    colours = torch.tensor([[24, 26, 32], [176, 182, 192], [255, 140, 0]], dtype=torch.uint8)
    cell = [max(1, 256 // n) for n in mask.shape]
    before, after = static.cpu().long(), 2 * mask.cpu().long() - static.cpu().long()
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
) -> None:
    """What pruning and revival did to each network: topology.json, a table and warnings on the console and in
    TensorBoard, one image per layer there."""
    report = {name: topology_report(static_masks[name], masks[name], *budgets[name]) for name in masks}
    (run_dir / "topology.json").write_text(json.dumps(report, indent=2) + "\n")
    table = topology_table(report)
    tqdm.write(f"Topology at step {global_step}:\n{table}")
    writer.add_text("topology/revival", table, global_step)
    warnings = [w for name in masks for w in topology_warnings(name, static_masks[name], masks[name], observation_size)]
    if warnings:
        tqdm.write("\n".join(f"warning: {warning}" for warning in warnings))
        writer.add_text("topology/warnings", "\n\n".join(warnings), global_step)
    log_sparsity(writer, global_step, masks, masks, {})
    for name, network_masks in masks.items():
        for layer, mask in network_masks.items():
            image = mask_image(static_masks[name][layer], mask)
            writer.add_image(f"topology/{name}.{layer}", image, global_step, dataformats="HWC")


def log_rewiring(
    run_dir: Path, global_step: int, previous: dict[str, Masks], masks: dict[str, Masks]
) -> dict[str, float]:
    """Put what the rewiring of the networks in `previous`, their masks before it, has done into topology.json. Returns
    the fraction of each one's active connections that it replaced."""
    report, replaced = json.loads((run_dir / "topology.json").read_text()), {}
    for name in previous:
        layers = report[name]["layers"]
        for layer, mask in masks[name].items():
            layers[layer]["last_rewiring"] = {
                "step": global_step,
                "replaced": int((mask & ~previous[name][layer]).sum()),
                "active": int(mask.sum()),
                "blind_inputs": int((~mask.any(0)).sum()),
                "dead_units": int((~mask.any(1)).sum()),
            }
        replaced[name] = sum(layer["last_rewiring"]["replaced"] for layer in layers.values()) / report[name]["budget"]
    (run_dir / "topology.json.tmp").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(run_dir / "topology.json.tmp", run_dir / "topology.json")
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
