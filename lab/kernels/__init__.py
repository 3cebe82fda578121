"""Speed only: networks computed from their stored values alone, by kernels.cpp beside this file.

While the mask of a network is fixed, its active connections and biases are one vector (one for each layer in networks
other than a chain of layers), which is all that forward, backward, Adam and the target update then touch. Torch and
kernels agree to rounding.

It is used in a few lines with `kernels.` in them: `Adam` in place of torch's, `choose` in lab/run.py before training,
`with in_torch(nets):` around code that reads or changes masks, weights or optimizers, and `with frozen(critics):`.
Without these lines and this folder, training is the same to rounding, and slower.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import inspect
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

import sparse_utils
from sparse_utils import Masks, Net

Times = tuple[float, float]  # milliseconds of a training pass in torch, and in the kernels
MOST_BY_LAYER = 0.25  # the density of a single layer above which torch takes less time for it


class Adam(torch.optim.Adam):
    """torch's Adam(fused=True), to the bit, without what torch wraps around `zero_grad` and `step` for profilers and
    compilers, a tenth of the CPU time of a sparse step. Where anyone has hooked into a step or gives it a closure,
    torch's own runs."""

    def __init__(self, params: Iterable, **options):
        super().__init__(params, fused=True, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def step(self, closure: Callable | None = None) -> float | None:
        hooks = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
        hooks += self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        plain = closure is None and not any(hooks) and not hasattr(self, "found_inf")  # set by torch.amp
        if not plain or not all(group["fused"] for group in self.param_groups):  # a loaded state may be unfused
            theirs = torch.optim.Adam.step  # runs hooks only after torch has built an Adam that is not ours
            return (theirs if hasattr(theirs, "hooked") else self.profile_hook_step(theirs))(self, closure)
        with torch.no_grad():
            for group in self.param_groups:
                tensors = [[] for _ in range(6)]  # parameters, their gradients, three moments, and steps so far
                self._init_group(group, *tensors)
                if tensors[0]:
                    torch._foreach_add_(tensors[-1], 1)
                    update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
                    update(
                        *tensors, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                        weight_decay=group["weight_decay"], amsgrad=group["amsgrad"], maximize=group["maximize"],
                        grad_scale=None, found_inf=None,
                    )  # fmt: skip

    step.hooked = True  # or torch would wrap it


class _Layer(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("n_in", "n_out", "dense", "input", "output")]
        + [(name, ctypes.c_void_p) for name in ("row_start", "column", "column_start", "row", "position")]
        + [(name, ctypes.c_int64) for name in ("values", "bias")]
    )


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Build kernels.cpp, once for each version of file, compiler and processor, and load it. Raises OSError,
    RuntimeError or subprocess.CalledProcessError if there is no compiler or the build fails."""
    source = Path(__file__).with_name("kernels.cpp")
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise RuntimeError(f"CXX={os.environ['CXX']} is not a command ({error})") from None
    compile = [*compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
    apart = {"start_new_session": True}  # or Ctrl-C would end the compiler, as if it could not build
    macros = [*compile, "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.check_output(macros, stderr=subprocess.PIPE, **apart)
    key = hashlib.sha256(source.read_bytes() + target + repr(compile).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-rl-tar"

    def named(file: Path) -> str:  # with a checksum, since to load half a file would kill the process
        return f"{key}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"

    library = next((file for file in sorted(cache.glob(f"{key}-*.so")) if file.name == named(file)), None)
    if library is None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "kernels.so"
            command = [*compile, str(source), "-o", str(built)]
            if subprocess.run([*command, "-fopenmp"], capture_output=True, **apart).returncode:
                subprocess.run(command, capture_output=True, check=True, **apart)
                tqdm.write(f"compute: the kernels use one thread, without OpenMP; once it is installed, delete {cache}")
            library = cache / named(built)
            os.replace(built, library)
    kernels = ctypes.CDLL(str(library))
    kernels.times = cache / f"{library.stem.partition('-')[2]}.times"  # a folder, see known_times
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kernels.mlp_forward.argtypes = [pointer, integer, pointer, size, pointer, pointer, pointer, integer, integer]
    kernels.mlp_backward.argtypes = [pointer, integer, pointer, size, *[pointer] * 5, integer]
    kernels.tile_width.argtypes = [size]
    kernels.width = functools.cache(kernels.tile_width)  # asked for in every pass
    return kernels


def not_here(*_: object) -> None:
    instead = "do it inside `with kernels.in_torch(nets):`, or train with --compute masked"
    raise RuntimeError(f"a layer in the kernels cannot be read, saved or changed by itself; {instead}")


def too_late(_: object) -> None:
    what = "a loss cannot be differentiated once layers have entered or left the kernels, as by `in_torch`"
    raise RuntimeError(f"{what}; compute loss and gradient on one side, or train with --compute masked")


def guard(param: nn.Parameter) -> RemovableHandle:
    """Refuse a gradient of this parameter, which no longer trains, also one of a loss that was computed before."""
    trained, param.requires_grad = param.requires_grad, True  # or a frozen one would take no hook
    handle = param.register_hook(too_late)
    param.requires_grad = trained
    return handle


class InChain:
    """Stands under the name of one of the layers that a `SparseMLP` has replaced, and refuses every use of it."""

    __call__ = __setattr__ = __delattr__ = not_here

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # which Python asks for, as to copy it
            raise AttributeError(name)
        not_here()


class Submodules(dict):
    """The submodules of a network, of which one has replaced its layers. Refuses to give them one after another, as to
    `for layer in network`, `network[0]` or `network[:-1]`, except to its own `forward`."""

    def values(self):
        caller = sys._getframe(2)  # of __iter__ or __getitem__; a comprehension is a frame of its own
        if caller.f_code is nn.Sequential.forward.__code__:  # first, since it is the usual one, and f_locals are slow
            return super().values()
        forwards = [frame for frame in (caller, caller.f_back or caller) if frame.f_code.co_name == "forward"]
        owners = [frame.f_locals.get((*frame.f_code.co_varnames, "")[0]) for frame in forwards]  # the first arguments
        if not any(getattr(owner, "_modules", None) is self for owner in owners):
            not_here()
        return super().values()

    def items(self):
        if sys._getframe(1).f_code.co_name == "__getitem__":  # of nn.Sequential, for a slice
            self.values()
        return super().items()


class SparseMLP(nn.Module):
    """Linear layers with ReLU between them, as one vector `flat` of stored weights and biases, layer after layer.

    `linears` is a dictionary from name to `nn.Linear`, each reading what the one before it writes; `masks` has the mask
    of each, and may have others. The input has shape (..., n_in), the output (..., n_out), both float32 on the CPU.
    """

    weight = bias = property(not_here)
    in_features, out_features = property(lambda mlp: mlp.n_in), property(lambda mlp: mlp.n_out)
    apply = reset_parameters = _load_from_state_dict = not_here
    _save_to_state_dict = not_here  # the vector alone does not say which connections it holds
    prunable = True  # so that `linear_weights` reads `weight`, which raises RuntimeError

    def __init__(self, linears: dict[str, nn.Linear], masks: Masks):
        nn.Module.__init__(self)
        self.masks = {name: masks[name].clone() for name in linears}
        self.flat = nn.Parameter(self.compress(p for m in linears.values() for p in (m.weight, m.bias)).detach())
        self.index()

    def index(self) -> None:
        """Where the kernels find the stored values of each layer."""
        self.kernels = load_kernels()
        self.indices, self.layers = [], (_Layer * len(self.masks))()
        row, position = 0, 0
        for layer, mask in zip(self.layers, self.masks.values(), strict=True):
            by_row, by_column = mask.nonzero(), mask.T.nonzero()
            index = {
                "row_start": nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)),
                "column": by_row[:, 1],
                "column_start": nn.functional.pad(mask.sum(0).cumsum(0), (1, 0)),
                "row": by_column[:, 1],
                "position": (mask.flatten().cumsum(0) - 1).view_as(mask).T[mask.T],
            }
            for name, tensor in index.items():
                self.indices.append(tensor.to(torch.int32).contiguous())  # kept alive for the kernels
                setattr(layer, name, self.indices[-1].data_ptr())
            layer.n_out, layer.n_in = mask.shape
            layer.dense = bool(mask.all())
            layer.input, layer.output = row, row + layer.n_in
            layer.values, layer.bias = position, position + len(by_row)
            row, position = layer.output, layer.bias + layer.n_out
        self.n_in, self.n_out, self.rows = self.layers[0].n_in, self.layers[-1].n_out, row + self.layers[-1].n_out
        self.widest_dense_input = max((layer.n_in for layer in self.layers if layer.dense), default=0)

    def __getstate__(self) -> dict:
        """For copy.deepcopy and torch.save: pointers are made anew by the copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("kernels", "indices", "layers")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.index()

    def compress(self, tensors: Iterable[Tensor]) -> Tensor:
        """The flat vector of each layer's dense weight and bias in turn, or of their gradients or Adam's moments."""
        places = [place for mask in self.masks.values() for place in (mask, ...)]  # a bias is stored whole
        return torch.cat([tensor[place] for tensor, place in zip(tensors, places, strict=True)])

    def expand(self, flat: Tensor) -> dict[str, Tensor]:
        """Dense `<layer>.weight` and `<layer>.bias` of a flat vector, zero where pruned."""
        dense = {}
        for layer, (name, mask) in zip(self.layers, self.masks.items(), strict=True):
            dense[f"{name}.weight"] = flat.new_zeros(mask.shape).masked_scatter(mask, flat[layer.values : layer.bias])
            dense[f"{name}.bias"] = flat[layer.bias : layer.bias + layer.n_out].clone()
        return dense

    def run(self, x: Tensor, flat: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The output, and the activations of all layers if they are to be kept for backward."""
        here = x.dtype is flat.dtype is torch.float32 and x.is_cpu and flat.is_cpu
        if x.shape[1] != self.n_in or not here or torch.is_autocast_enabled("cpu"):
            wanted = f"the kernels need float32 of shape (batch, {self.n_in}), and parameters of that type, on the CPU"
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}, and {flat.dtype} on {flat.device}"
            raise ValueError(f"{wanted}, without autocast; got {got}. Or train with --compute masked")
        batch, threads = x.shape[0], torch.get_num_threads()  # len(x) is slow
        x, y = x.contiguous(), x.new_empty(batch, self.n_out)
        width = self.kernels.width(batch)
        workspace = x.new_empty((-(-batch // width) if keep else threads) * width * self.rows)
        self.kernels.mlp_forward(
            self.layers, len(self.layers), flat.data_ptr(), batch, x.data_ptr(), y.data_ptr(),
            workspace.data_ptr(), keep, threads,
        )  # fmt: skip
        return y, workspace

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            return self(input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], self.n_out)
        flat = self.flat  # which is slow to look up
        if torch.is_grad_enabled() and (input.requires_grad or flat.requires_grad):
            return _SparseMLPFunction.apply(input, flat, self)
        return self.run(input, flat, keep=False)[0]


class SparseLayer(SparseMLP, nn.Linear):
    """A `SparseMLP` in the place of one layer alone, for whose type a `forward` may ask."""

    extra_repr = nn.Module.extra_repr  # that of nn.Linear reads the bias


class _SparseMLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, flat, mlp):
        y, ctx.workspace = mlp.run(x, flat, keep=True)
        ctx.save_for_backward(x, flat)
        ctx.mlp = mlp
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled():  # for create_graph=True
            raise RuntimeError("the kernels have no second derivative; train with --compute masked")
        (x, flat), mlp, grad_y = ctx.saved_tensors, ctx.mlp, grad_y.contiguous()
        grad_x = grad_y.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        grad_flat = torch.empty_like(flat) if ctx.needs_input_grad[1] else None
        workspace, ctx.workspace = ctx.workspace, None  # the kernel overwrites it with gradients
        if workspace is None:  # a retained graph, run backward again
            _, workspace = mlp.run(x, flat, keep=True)
        batch = x.shape[0]
        width = mlp.kernels.width(batch)
        inputs = -(-mlp.widest_dense_input // width) * width
        scratch = flat.new_empty(max(flat.shape[0], -(-batch // width) * width * inputs))
        mlp.kernels.mlp_backward(
            mlp.layers, len(mlp.layers), flat.data_ptr(), batch, grad_y.data_ptr(),
            None if grad_x is None else grad_x.data_ptr(), None if grad_flat is None else grad_flat.data_ptr(),
            workspace.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_flat, None


# WHICH NETWORKS, AND HOW


def trace(network: nn.Module) -> tuple[list | None, set[str]]:
    """The operations of a network's forward in order, and the names of the parameters that forward itself reads, as far
    as torch.fx can follow. The operations are None if torch.fx cannot follow forward, for example through an `if` on a
    value, or if forward stores in the network a tensor that it computed."""
    tracer, generators = torch.fx.Tracer(), (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(devices=[]):
            tracer.trace(traced := copy.deepcopy(network))  # a copy, since forward may leave something there
        left = {name: value for name, value in vars(traced).items() if name not in vars(nn.Module())}
        followed = "Proxy(" not in repr(left)  # torch.fx runs forward with Proxy objects as tensors
    except Exception:  # of any kind, since the Proxy objects are not tensors
        followed = False
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    nodes = {node: i for i, node in enumerate(tracer.graph.nodes)} if hasattr(tracer, "graph") else {}
    steps = [(str(n.target).split(".")[-1], torch.fx.map_arg((n.args, n.kwargs), nodes.get)) for n in nodes]
    return steps if followed else None, {node.target for node in nodes if node.op == "get_attr"}


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class itself, without hooks or anything of its own."""
    may_differ = {"training", "inplace", "in_features", "out_features", "_parameters"}
    usual = nn.Linear(1, 1, device="meta") if kind is nn.Linear else kind()
    found, expected = ({k: v for k, v in vars(m).items() if k not in may_differ} for m in (module, usual))
    return type(module) is kind and found == expected and module._parameters.keys() == usual._parameters.keys()


def has_hooks(param: nn.Parameter) -> bool:
    """Whether a parameter has hooks other than that of its mask."""
    return bool(param._backward_hooks) or len(param._post_accumulate_grad_hooks or ()) > hasattr(param, "mask_hook")


def training_of(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> tuple[bool, list[int], int, bool]:
    """Whether a parameter is trained, which groups of the optimizer have it, its steps, and whether grad is None."""
    groups = [i for i, group in enumerate(optimizer.param_groups) if any(p is param for p in group["params"])]
    return param.requires_grad, groups, int(optimizer.state.get(param, {}).get("step", 0)), param.grad is None


def is_chain(net: Net) -> bool:
    """Whether a network is a chain of Linear layers, all trained alike, with ReLU between them, and its forward uses
    these layers only in this order, so that one submodule can take the place of all of them. No method of its class but
    those that its constructor calls names a layer."""
    children, (steps, _) = dict(net.network.named_children()), trace(net.network)
    kinds = [nn.ReLU if i % 2 else nn.Linear for i in range(len(children))]
    if steps is None or len(kinds) % 2 == 0 or any(hasattr(network, "sparse") for network in net.networks):
        return False
    if any(trace(target)[0] != steps for target in net.networks[1:]):
        return False
    own = [kind for kind in type(net.network).__mro__ if not kind.__module__.startswith("torch.")]
    functions = [inspect.unwrap(f) for kind in own for f in vars(kind).values() if inspect.isfunction(f)]
    names = {f: {*f.__code__.co_names} for f in functions}
    made_by = {"__init__", "forward"}.union(*(names[f] for f in functions if f.__name__ == "__init__"))
    if any(children.keys() & names[f] for f in functions if f.__name__ not in made_by):
        return False
    if not all(all(map(is_plain, network.children(), kinds)) for network in net.networks):
        return False
    if list(net.weights) != list(children)[::2]:  # an edited `linear_weights` may leave layers out, without masks
        return False
    training = [training_of(param, net.optimizer) for child in children.values() for param in child.parameters()]
    moved = copy.deepcopy(net.network)
    for name in children:
        delattr(moved, name)
    moved.add_module("sparse", nn.Sequential(OrderedDict(children)))
    return all(t == training[0] for t in training) and steps == trace(moved)[0]


def parts(net: Net, masks: Masks) -> list[list[str]]:
    """The names of the modules that each `SparseMLP` of a network replaces: all children of a chain together; in other
    networks each Linear alone, except those with so many connections that torch is faster."""
    if is_chain(net):
        return [list(dict(net.network.named_children()))]
    return [[name] for name, mask in masks.items() if mask.float().mean() <= MOST_BY_LAYER]


def why_not_in_kernels(net: Net, nets: dict[str, Net]) -> str | None:
    """Why the kernels cannot compute a network here; None if they can."""
    for param in net.network.parameters():
        if param.device.type != "cpu":
            return f"the kernels are for the CPU and the networks are on {param.device.type}"
    adams = (Adam, torch.optim.Adam, torch.optim.AdamW)
    if type(net.optimizer) not in adams or any(group["amsgrad"] for group in net.optimizer.param_groups):
        return "its optimizer is not plain Adam"
    if hasattr(net.network, "_orig_mod"):
        return "torch.compile has wrapped it; network.compile() does not"
    networks = [network for row in nets.values() for network in row.networks]
    uses = Counter(id(p) for network in networks for _, p in network.named_parameters(remove_duplicate=False))
    _, read = trace(net.network)
    if net.target is not None and not net.weights.keys() <= sparse_utils.linear_weights(net.target).keys():
        return "its target lacks layers of it"
    for name in net.weights:
        layer, *of_target = (network.get_submodule(name) for network in net.networks)
        params = {f"{name}.{part}": param for part, param in layer.named_parameters()}
        plain = all(is_plain(each, nn.Linear) and each.bias is not None for each in (layer, *of_target))
        if not plain or layer is net.network or any(p.dtype != torch.float32 or has_hooks(p) for p in params.values()):
            which = f"its layer {name or 'itself'}, or that of its target,"
            return f"{which} is not a plain nn.Linear in float32, with a bias and without hooks"
        if any(uses[id(param)] > 1 for param in params.values()):
            return f"its layer {name} shares a parameter with another layer or network"
        if params.keys() & read:
            return f"its forward reads {min(params.keys() & read)} by itself"
        weight, bias = (training_of(param, net.optimizer) for param in params.values())
        if weight != bias or len(weight[1]) != 1:
            return f"weight and bias of its layer {name} are not trained alike, in one group of its optimizer"
    try:
        load_kernels()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
        return f"kernels.cpp cannot be built here: {output.splitlines()[0]}"
    return None if net.weights else "it has no nn.Linear"


def time_passes(net: Net, batch_size: int) -> Times:
    """The least milliseconds of a training pass, forward and backward, in masked torch and in the kernels, since other
    work on the machine only adds to them. Both run copies of the parts of a network that the kernels would compute,
    with K random connections between its active neurons. They take turns, and draw from no random generator of
    training."""
    generator = torch.Generator().manual_seed(0)
    row = Net(copy.deepcopy(net.network).requires_grad_(True), None, None, "static", 0.0, width=net.width)
    row.masks = sparse_utils.static_prune(row, net.budget, "random", "er", generator)
    sparse_utils.mask_gradients(row)
    ways, inputs, times = ([], []), [], ([], [])
    for names in parts(net, row.masks):
        modules = {name: row.network.get_submodule(name) for name in names}
        linears = {name: modules[name] for name in names if name in row.masks}
        ways[0].append(nn.Sequential(*modules.values()))
        ways[1].append(SparseMLP(linears, row.masks))
        x = torch.randn(batch_size, modules[names[0]].in_features, generator=generator)
        inputs.append(x.requires_grad_(names[0] != next(iter(row.masks))))
    leaves = [*inputs, *(param for modules in ways for module in modules for param in module.parameters())]
    started = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() < started + 0.05:
        for modules, so_far in zip(ways, times, strict=True):
            for leaf in leaves:
                leaf.grad = None
            before = time.perf_counter()
            for module, x in zip(modules, inputs, strict=True):
                module(x).sum().backward()
            so_far.append(1000 * (time.perf_counter() - before))
    return tuple(map(min, times))


def known_times(net: Net, batch_size: int) -> Times:
    """`time_passes`, once on a machine: the first result is kept in a file beside the kernels, so that runs of the same
    networks make the same choice. Without such a file it is measured each time."""
    shapes = [list(weight.shape) for weight in net.weights.values()]
    own = (shapes, is_chain(net), net.budget, net.width, MOST_BY_LAYER)
    what = repr((*own, batch_size, torch.get_num_threads(), torch.__version__))
    file = load_kernels().times / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"

    def read() -> Times | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no such file, or a damaged one
            in_torch, in_kernels = map(float, json.loads(file.read_text())["milliseconds"])
            return (in_torch, in_kernels) if min(in_torch, in_kernels) > 0 else None

    if (times := read()) is None:
        times = time_passes(net, batch_size)
        with contextlib.suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent) as whole:
                json.dump({"of": what, "milliseconds": times}, whole)
                whole.flush()
                if read() is None:
                    file.unlink(missing_ok=True)  # damaged
                os.link(whole.name, file)  # raises FileExistsError if another process was first: its result counts
    return read() or times


def choose(
    nets: dict[str, Net], compute: str, batch_size: int, kept: list[str] | None = None, held: dict | None = None
) -> dict[str, Times]:
    """Set `in_kernels` of each network, and print how each is computed and why. `held` gives, by network, a reason why
    its layers cannot be replaced. Returns the `time_passes` of the networks that were measured.

    With `auto` the kernels compute a network if its training passes take less time there; in a resumed run, if it is in
    `kept`. With `sparse` they compute the `parts` of every network, with `masked` none. Raises ValueError if, with
    `sparse`, they cannot compute a network.
    """
    times = {}

    def decide(name: str, net: Net) -> tuple[str, str]:
        """How a network is computed, and why."""
        in_torch = "dense" if net.budget == net.size else "masked"
        if compute == "masked":
            return in_torch, "--compute masked asks for it"
        if why_not := (held or {}).get(name) or why_not_in_kernels(net, nets):
            if compute == "sparse":
                raise ValueError(f"--compute sparse cannot compute the {name}: {why_not}; use --compute auto")
            return in_torch, why_not
        in_kernels = "sparse" if is_chain(net) else f"sparse in layers with up to {MOST_BY_LAYER:.0%} of connections"
        if compute == "sparse":
            return in_kernels, "--compute sparse asks for it"
        if kept is not None:
            return in_kernels if name in kept else in_torch, "the run was begun so"
        if net.budget > MOST_BY_LAYER * net.size and not is_chain(net):
            return in_torch, "single layers with so many connections take less time in torch"
        try:
            copy.deepcopy(net.network)
        except Exception as error:  # of any kind, since it may hold an open file or the like
            return in_torch, f"it cannot be copied to be timed: {next(iter(str(error).splitlines()), '')}"
        times[name] = by_torch, by_kernels = known_times(net, batch_size)
        comparison = f"{by_kernels / by_torch:.2f} of torch's time ({by_kernels:.2f} of {by_torch:.2f} ms a pass)"
        if by_kernels < by_torch:
            return in_kernels, f"it takes {comparison}"
        return in_torch, f"the kernels would take {comparison}"

    choices = {name: decide(name, net) for name, net in nets.items()}
    for how, why in dict.fromkeys(choices.values()):
        names = ", ".join(name for name in nets if choices[name] == (how, why))
        tqdm.write(f"compute: {names} {how}, since {why}")
    for name, net in nets.items():
        net.in_kernels = choices[name][0].startswith("sparse")
    return times


# WHAT TAKES THE PLACE OF LAYERS


def compact(nets: dict[str, Net]) -> None:
    """Replace each of the `parts` of every network that is `in_kernels` and has masks, and of its target, by a
    `SparseMLP`, whose vector is trained in place of their parameters. A network that the kernels can no longer compute,
    for example because it has been given a hook, goes on in torch, and the console says so."""
    for name, net in nets.items():
        if not (net.in_kernels and net.masks):
            continue
        if why_not := why_not_in_kernels(net, nets):
            tqdm.write(f"compute: {name} goes on in torch, since {why_not}")
            net.in_kernels = False
            continue
        for names in parts(net, net.masks):
            compact_part(net.network, names, net.masks, net.optimizer)
            if net.target is not None:
                compact_part(net.target, names, net.masks)


def expand(nets: dict[str, Net]) -> None:
    """Undo `compact`, to the bit: restore the original layers, with current values and moments, zero where pruned.
    Raises RuntimeError if masks of layers in the kernels have changed meanwhile."""
    for name, net in nets.items():
        for network in net.networks:
            optimizer = net.optimizer if network is net.network else None
            for mlp in [module for module in network.modules() if isinstance(module, SparseMLP)]:
                if not all(n in net.masks and torch.equal(mask, net.masks[n]) for n, mask in mlp.masks.items()):
                    where = "outside of `with kernels.in_torch(nets):`"
                    raise RuntimeError(f"masks of the {name} changed {where}; change them inside such a block")
                expand_part(network, mlp, optimizer)


@contextlib.contextmanager
def in_torch(nets: dict[str, Net]) -> Iterator[None]:
    """Inside the block all networks are ordinary torch modules, whose masks, weights and optimizers may be read and
    changed; afterwards each trains within its masks, also where these are new, and networks that are `in_kernels` are
    compact again. Such blocks must not be nested."""
    expand(nets)
    yield
    sparse_utils.fix_masks(nets)
    compact(nets)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside the block no parameter of the network gets a gradient, which saves the time of computing it."""
    fixed = {name for name, param in network.named_parameters() if not param.requires_grad}
    network.requires_grad_(False)
    yield
    for name, param in network.named_parameters():  # which `in_torch` may have put in the place of others
        param.requires_grad_(name not in fixed)


def compact_part(
    network: nn.Module, names: list[str], masks: Masks, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """`compact` for the modules of these names. Their parameters stay in the optimizer, so that `expand` leaves its
    groups in the original order. They get no gradients: one of a loss from before ends in a RuntimeError."""
    replaced = {name: network.get_submodule(name) for name in names}
    linears = {name: replaced[name] for name in names if name in masks}
    mlp = (SparseMLP if len(names) > 1 else SparseLayer)(linears, masks)
    mlp.replaced = replaced  # a plain dictionary, so these are not its submodules
    dense = [param for layer in linears.values() for param in (layer.weight, layer.bias)]
    mlp.guards = [guard(param) for param in dense]
    mlp.flat.requires_grad_(dense[0].requires_grad)
    if all(param.grad is not None for param in dense):
        mlp.flat.grad = mlp.compress(param.grad for param in dense)
    if len(names) == 1:
        network.set_submodule(names[0], mlp)
    else:
        for name in names:
            delattr(network, name)
            setattr(network, name, InChain())
        network.add_module("sparse", mlp)
        vars(network)["_modules"] = Submodules(network._modules)
    if optimizer is None:
        return
    (group,) = training_of(dense[0], optimizer)[1]
    optimizer.param_groups[group]["params"].append(mlp.flat)
    states = [optimizer.state.pop(param, {}) for param in dense]
    if all(states):
        moments = {name: mlp.compress(state[name] for state in states) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[mlp.flat] = {"step": states[0]["step"]} | moments
    for param in dense:
        param.grad = None


@torch.no_grad()
def expand_part(network: nn.Module, mlp: SparseMLP, optimizer: torch.optim.Optimizer | None = None) -> None:
    """`expand` for the modules that `compact_part` has replaced."""
    guard(mlp.flat)
    for handle in mlp.guards:
        handle.remove()
    if len(mlp.replaced) > 1:
        vars(network)["_modules"] = dict(network._modules)
        del network.sparse
    for name, module in mlp.replaced.items():
        vars(network).pop(name, None)  # of a chain
        network.set_submodule(name, module)
    state = optimizer.state.pop(mlp.flat, {}) if optimizer else {}
    for group in optimizer.param_groups if optimizer else ():
        group["params"][:] = [param for param in group["params"] if param is not mlp.flat]
    moments = {key: mlp.expand(tensor) for key, tensor in state.items() if key != "step"}
    gradients = {} if mlp.flat.grad is None else mlp.expand(mlp.flat.grad)
    for name, value in mlp.expand(mlp.flat).items():
        param = network.get_parameter(name)
        param.copy_(value)
        param.requires_grad_(mlp.flat.requires_grad)
        param.grad = gradients.get(name)
        if state:
            own = {key: tensors[name] for key, tensors in moments.items()}
            optimizer.state[param] = {"step": state["step"].clone()} | own
