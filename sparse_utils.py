"""Functions that both scripts share: the number of connections in each layer, static pruning, Topology-Aware Revival,
and the hooks that keep pruned weights at zero.

`weights` and `masks` of a network are dictionaries from layer name to a tensor of shape (n_out, n_in), in the order in
which the network defines its layers. A mask is boolean, and True marks an active connection. Nothing here uses torch's
global random generator.

To add a rule, write a function and add one line to the dictionary of its kind: CRITERIA, DISTRIBUTIONS or REVIVALS
here, DROPS or GROWTHS in lab/baselines.py. Flags, their help, sweeps and comparisons take its name from there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

Masks = dict[str, Tensor]
AUTO_WIDTH_C = 4.0  # --active-width auto aims at a K of at least this many times the topology need


def linear_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable parameters of a network: the weight of every `nn.Linear`, by layer name. Biases stay dense. FLOPs
    count these weights alone. The first layer and the last are the input and output layers of --active-width. Raises
    RuntimeError for layers in the kernels, outside `in_torch`."""
    layers = network.named_modules()
    return {name: layer.weight for name, layer in layers if getattr(layer, "prunable", isinstance(layer, nn.Linear))}


@dataclass(eq=False)
class Net:
    """One network that trains under a mask, with everything that has to follow when the mask changes."""

    network: nn.Module
    target: nn.Module | None
    optimizer: torch.optim.Optimizer | None
    method: str
    sparsity: float
    size: int = 0  # the number of its weights
    active: int = 0  # its active connections now; all before pruning
    budget: int = 0  # K: its active connections after pruning and revival
    reserve: int = 0  # R: how many of the K connections revival places
    width: int | None = None  # neurons of each hidden layer that get connections; None: all
    static: Masks = field(default_factory=dict)  # what static pruning kept; empty before pruning
    masks: Masks = field(default_factory=dict)  # what trains; empty before pruning
    in_kernels: bool = False  # speed only: whether lab/kernels computes it after pruning

    def state_dict(self) -> dict:
        """The fields for a checkpoint, without the networks and the optimizer, which are saved separately."""
        return {name: part for name, part in vars(self).items() if not hasattr(part, "state_dict")}

    def load_state_dict(self, state: dict) -> None:
        """Put back, in place, what `state_dict` gave."""
        vars(self).update(state)
        for masks in (self.static, self.masks):
            masks |= {name: mask.to(self.weights[name].device) for name, mask in masks.items()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return linear_weights(self.network)

    @property
    def networks(self) -> list[nn.Module]:
        """The network and, if it has one, its target."""
        return [network for network in (self.network, self.target) if network is not None]


# BUDGETS: how many connections, and in which layer


def plan(net: Net, reserve: float, active_width: int | str | None = None) -> None:
    """Set, in place, net.size and net.active, net.budget (K = round((1 - sparsity) * size)), net.reserve (R =
    round(reserve * K)) and net.width. K is all weights if the method prunes nothing, and R is 0 if it revives nothing.
    Raises ValueError if no connection would be left, a weight is computed from others, shared, in no layer of its name
    or not of shape (n_out, n_in), a layer of the target has no namesake in the network, or `choose_width` finds
    `active_width` too small or the layers no chain."""
    net.size = net.active = net.budget = sum(weight.numel() for weight in net.weights.values())
    layers = dict(net.network.named_modules())
    if odd := [name for name, weight in net.weights.items() if name not in layers or weight.dim() != 2]:
        raise ValueError(f"linear_weights gives {odd[0]}; it must name layers and give weights of shape (n_out, n_in)")
    if found := [name for name, weight in net.weights.items() if not isinstance(weight, nn.Parameter)]:
        raise ValueError(f"the weight of {found[0]} must be a parameter of its own, not computed as by weight_norm")
    if net.method in UNPRUNED:
        return
    if len({*map(id, net.weights.values())}) < len(net.weights):
        raise ValueError("two layers of a network share a weight, which can have one mask alone; give each its own")
    if net.target and not linear_weights(net.target).keys() <= layers.keys():
        raise ValueError("a target's layers must have the names of its network's; of an AveragedModel pass `module`")
    if not net.size:
        raise ValueError("a network without an nn.Linear has nothing that can be pruned; use --method dense for it")
    net.budget = round((1 - net.sparsity) * net.size)
    if net.budget < 1:
        raise ValueError(f"--sparsity {net.sparsity} keeps none of {net.size} connections; choose a lower sparsity")
    net.reserve = round(reserve * net.budget) if net.method in REVIVALS else 0
    if active_width is not None:
        net.width = choose_width(net.weights, net.budget, active_width)


def allocate(total: int, shares: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Split `total` into whole numbers proportional to `shares`, none above its cap.

    The rest of a capped entry's share goes to the others in the same proportion. Rounded by largest remainder, ties to
    the lower index, so the sum is exactly `total`. Raises ValueError if the entries with a share cannot hold `total`.
    """
    open_entries = [i for i, share in enumerate(shares) if share > 0]
    if not 0 <= total <= sum(caps[i] for i in open_entries):
        raise ValueError(f"cannot place {total} connections in layers with room for {[caps[i] for i in open_entries]}")
    counts, full = [0] * len(shares), True
    while full:
        whole, remaining = sum(shares[i] for i in open_entries), total - sum(counts)
        exact = {i: remaining * shares[i] / whole for i in open_entries}
        full = [i for i in open_entries if exact[i] >= caps[i]]
        for i in full:
            counts[i] = caps[i]
        open_entries = [i for i in open_entries if i not in full]
    for i in open_entries:
        counts[i] = math.floor(exact[i])
    for i in sorted(open_entries, key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[i] += 1
    return counts


def room(scores: dict[str, Tensor]) -> list[int]:
    """How many connections each layer can keep: those pruned in earlier rounds score minus infinity."""
    return [int((s != -math.inf).sum()) for s in scores.values()]


def er_budgets(scores: dict[str, Tensor], keep: int) -> list[int]:
    """Erdos-Renyi: in each layer in proportion to n_in + n_out, at most all (Mocanu et al. 2018; Evci et al. 2020)."""
    return allocate(keep, [sum(s.shape) for s in scores.values()], room(scores))


def uniform_layer_budgets(scores: dict[str, Tensor], keep: int) -> list[int]:
    """The same fraction in every layer."""
    return allocate(keep, [s.numel() for s in scores.values()], room(scores))


def global_budgets(scores: dict[str, Tensor], keep: int) -> list[int]:
    """One ranking of all connections of the network. Ties go to the lower index."""
    ranked = torch.cat([s.flatten() for s in scores.values()])
    active = highest(ranked, keep, torch.ones_like(ranked, dtype=torch.bool))
    return [int(part.sum()) for part in active.split([s.numel() for s in scores.values()])]


# how static pruning spreads `keep` connections over the layers: (scores, keep) -> a count for each layer
DISTRIBUTIONS = {"er": er_budgets, "uniform": uniform_layer_budgets, "global": global_budgets}


# ACTIVE WIDTH [ours]: only the first h neurons of each hidden layer have connections


def active_part(tensors: dict[str, Tensor], width: int | None) -> dict[str, Tensor]:
    """Views of the connections between active neurons: the first `width` of each hidden layer (None: all)."""
    names = list(tensors)
    return {n: t[: None if n == names[-1] else width, : None if n == names[0] else width] for n, t in tensors.items()}


def embed(part: Masks, weights: dict[str, Tensor]) -> Masks:
    """Masks of the weights' shapes that are `part` between active neurons and False elsewhere."""
    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
    for name, mask in part.items():
        masks[name][: mask.shape[0], : mask.shape[1]] = mask
    return masks


def chain_shapes(weights: dict[str, Tensor], what: str) -> list[tuple[int, int]]:
    """The shapes (n_out, n_in) of the layers. Raises ValueError, which says that `what` needs a chain, unless each
    layer has as many inputs as the one before it has outputs."""
    shapes = [tuple(weight.shape) for weight in weights.values()]
    if any(b[1] != a[0] for a, b in zip(shapes, shapes[1:])):
        raise ValueError(f"{what} needs layers that read one another in a chain, but their shapes are {shapes}")
    return shapes


def choose_width(weights: dict[str, Tensor], budget: int, asked: int | str) -> int:
    """Neurons of each hidden layer that have connections: `asked`, or with "auto" the most for which K is at least
    AUTO_WIDTH_C times the topology need of all layers together, but never too few to hold K connections. Raises
    ValueError if `asked` is too few or the layers are not a chain."""
    shapes = chain_shapes(weights, "--active-width")
    hidden = max((n_out for n_out, _ in shapes[:-1]), default=0)
    parts = {h: active_part(weights, h).values() for h in range(1, hidden + 1)}
    narrowest = min((h for h, part in parts.items() if sum(w.numel() for w in part) >= budget), default=0)
    fed = [h for h, ws in parts.items() if budget >= AUTO_WIDTH_C * sum(topology_need(w.shape) for w in ws)]
    width = max([*fed, narrowest]) if asked == "auto" else asked
    if width < narrowest:
        what = f"--active-width {asked} cannot hold {budget} connections of layers of shapes {shapes}"
        raise ValueError(f"{what}; the smallest that can is {narrowest}")
    return width


# STATIC PRUNING: a score for each connection, of which the highest are kept, and an exact count by rank


class Rule(NamedTuple):
    """How connections are scored; the highest are kept. `scores` is a function (weights, masks, loss, generator) ->
    a tensor (n_out, n_in) for each layer name; masks are those left by earlier rounds. The first sentence of its
    docstring is the help of its name. Rules of rewiring (lab/baselines.py) take a lab.baselines.Layer alone."""

    scores: Callable
    uses_loss: bool = False  # whether it reads the network's own loss (in rewiring: the gradient); if not, it gets None
    rounds: int = 1  # pruning: rounds of scoring the remaining connections and pruning further; 1 if it uses the loss
    drop: str = "magnitude"  # growth: the default of --drop-criterion
    by_topology: bool = False  # growth: drop connections of neurons without inputs or outputs; stop in settled layers


def random_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """Uniform noise."""
    return {n: torch.rand(w.shape, generator=generator, dtype=torch.float64).to(w.device) for n, w in weights.items()}


def magnitude_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """|w|, w the weight of the connection."""
    return {name: w.detach().abs() for name, w in weights.items()}


def snip_scores(weights: dict[str, Tensor], masks: Masks, loss: Tensor, generator: torch.Generator):
    """|w dL/dw|, L the loss on replay data (SNIP, Lee et al. 2019)."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return {name: (w * g).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp_scores(weights: dict[str, Tensor], masks: Masks, loss: Tensor, generator: torch.Generator):
    """w (H g), g and H the gradient and the Hessian of the loss on replay data (GraSP, Wang et al. 2020). The paper
    prunes the connections with the highest -w * (H g), since pruning these reduces the gradient's norm least."""
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    squared_norm = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(squared_norm, list(weights.values()))
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), products, strict=True)}


@torch.enable_grad()
def synflow_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """|w dR/dw|, R the sum of outputs for inputs of 1 and weights |w|, 100 rounds (SynFlow, Tanaka et al. 2020). R
    leaves out biases and the squashing of outputs, so it is a product of matrices. In float64: R can overflow float32.
    Raises ValueError if the layers are not a chain."""
    chain_shapes(weights, "synflow")
    magnitudes = {name: (w.detach() * masks[name]).abs().double().requires_grad_() for name, w in weights.items()}
    first, *_ = magnitudes.values()
    flow = torch.ones_like(first[0])
    for m in magnitudes.values():
        flow = m @ flow
    gradients = torch.autograd.grad(flow.sum(), list(magnitudes.values()))
    return {name: (m * g).detach() for (name, m), g in zip(magnitudes.items(), gradients, strict=True)}


CRITERIA = {
    "random": Rule(random_scores),
    "magnitude": Rule(magnitude_scores),
    "snip": Rule(snip_scores, uses_loss=True),
    "grasp": Rule(grasp_scores, uses_loss=True),
    "synflow": Rule(synflow_scores, rounds=100),
}


def highest(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """A mask of the `count` highest `scores` among the True entries of `among`, of the same shape. By rank, ties to the
    lower index, so the count is exact whatever the scores. Raises ValueError if a score is not a number."""
    indices = among.flatten().nonzero().squeeze(1)
    ranked = scores.flatten()[indices]
    if ranked.isnan().any():
        raise ValueError("a score is not a number, so it has no rank: training diverged, or the rule divides by zero")
    top = indices[ranked.sort(descending=True, stable=True).indices[:count]]
    return torch.zeros_like(among).flatten().index_fill_(0, top, True).view_as(among)


def static_prune(
    net: Net, keep: int, criterion: str, distribution: str, generator: torch.Generator, loss: Tensor | None = None
) -> Masks:
    """Masks of exactly `keep` connections of a network by CRITERIA[criterion] and DISTRIBUTIONS[distribution], all of
    them between active neurons, and among net.masks if an earlier pruning has made these. `loss` is the network's own,
    for criteria that use it; `generator` is on the CPU. The network is read, not changed. Raises ValueError if a score
    is not a number, the counts of a distribution are wrong, or a rule lacks its loss or uses it in several rounds."""
    rule, weights = CRITERIA[criterion], net.weights
    if rule.uses_loss and loss is None:
        raise ValueError(f"criterion {criterion} needs a loss of each network, and own_losses of the script lacks one")
    if rule.uses_loss and rule.rounds > 1:
        raise ValueError(f"criterion {criterion} uses the loss of the dense network, so it can have one round only")
    masks = net.masks or embed({n: torch.ones_like(w) for n, w in active_part(weights, net.width).items()}, weights)
    size = sum(int(mask.sum()) for mask in masks.values())
    if keep == size:
        return masks
    for i in range(1, rule.rounds + 1):
        scores = rule.scores(weights, masks, loss, generator)
        # minus infinity, so that pruned connections stay pruned even where active ones score zero
        scores = {name: scores[name].masked_fill(~mask, -math.inf) for name, mask in masks.items()}
        scores = active_part(scores, net.width)
        count = round(size * (keep / size) ** (i / rule.rounds))
        counts = DISTRIBUTIONS[distribution](scores, count)
        most = room(scores)
        if sum(counts) != count or any(not 0 <= n <= m for n, m in zip(counts, most, strict=True)):
            where = f"{counts} connections to layers with room for {most}; {count} are to be placed"
            raise ValueError(f"distribution {distribution} gives {where}")
        masks = embed({name: highest(s, n, s != -math.inf) for (name, s), n in zip(scores.items(), counts)}, weights)
    return masks


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
    """Prune, then revive connections in the layers whose topology needs them (Jin et al. 2026, arXiv 2602.04166; the
    exact rule is ours, see the README).

    Returns how many of the `reserve` connections each layer gets. A layer's deficit is what it lacks of its
    `topology_floor`. A reserve too small for all deficits is split in proportion to them. Otherwise every deficit is
    filled, and the rest is split in proportion to topology need, as far as a layer still has pruned connections.
    """
    kept = [int(mask.sum()) for mask in masks.values()]
    deficits = [max(0, topology_floor(m.shape) - k) for m, k in zip(masks.values(), kept, strict=True)]
    if sum(deficits) >= reserve:
        return allocate(reserve, deficits, deficits)
    space = [mask.numel() - k - d for mask, k, d in zip(masks.values(), kept, deficits, strict=True)]
    rest = allocate(reserve - sum(deficits), [topology_need(mask.shape) for mask in masks.values()], space)
    return [d + r for d, r in zip(deficits, rest, strict=True)]


def uniform_budgets(masks: Masks, reserve: int) -> list[int]:
    """Prune, then revive the same fraction of each layer's pruned connections (the control in Jin et al. 2026)."""
    pruned = [mask.numel() - int(mask.sum()) for mask in masks.values()]
    return allocate(reserve, pruned, pruned)


# methods that revive: (masks, R) -> how many of the R connections each layer gets
REVIVALS = {"tar": tar_budgets, "uniform": uniform_budgets}
# for methods of REVIVALS that revive by score within a layer, not at random: (weight, mask, generator) -> scores
PLACES = {}
CONTROLS = {"static": "Prune to K connections and revive none"}  # lab/compare.py compares other methods with these
UNPRUNED = {"dense": "Prune nothing"}


def revival_counts(net: Net) -> list[int]:
    """How many connections to revive in each layer of a network that has just been pruned: R in all, by the rule of its
    method, counted between its active neurons. Raises ValueError if the counts of a rule do not add up to R or do not
    fit into the layers."""
    part = active_part(net.static, net.width)
    if not net.reserve:
        return [0] * len(part)
    counts = list(REVIVALS[net.method](part, net.reserve))
    pruned = [mask.numel() - int(mask.sum()) for mask in part.values()]
    if sum(counts) != net.reserve or any(not 0 <= c <= p for c, p in zip(counts, pruned, strict=True)):
        must = f"they must add up to {net.reserve} and be at most the {pruned} that are pruned there"
        raise ValueError(f"the revival rule of method {net.method} gives the layers {counts} connections; {must}")
    return counts


def revive(net: Net, counts: Sequence[int], generator: torch.Generator) -> Masks:
    """Masks that are net.static and `counts` more connections in each layer, all between active neurons: pruned ones
    drawn uniformly without replacement, or the highest by the method's rule in PLACES. `generator` is on the CPU."""
    revived, places = {}, PLACES.get(net.method) if net.reserve else None
    static, weights = active_part(net.static, net.width), active_part(net.weights, net.width)
    for (name, mask), count in zip(static.items(), counts, strict=True):
        if places:
            revived[name] = mask | highest(places(weights[name].detach(), mask, generator), count, ~mask)
            continue
        pruned = (~mask).flatten().nonzero().squeeze(1)
        chosen = pruned[torch.randperm(len(pruned), generator=generator)[:count].to(mask.device)]
        revived[name] = mask.flatten().index_fill(0, chosen, True).view_as(mask)
    return embed(revived, net.static)


# MASKED TRAINING


@torch.no_grad()
def zero_pruned(net: Net) -> None:
    """Zero, in place, the weights of a network and its target outside the masks, and what the optimizer keeps of them,
    such as Adam's moments: one left over from dense training would push its weight away from zero."""
    targets = linear_weights(net.target) if net.target else {}
    for name, weight in net.weights.items():
        state = net.optimizer.state.get(weight, {}).values() if net.optimizer else ()
        for tensor in (weight, targets.get(name), *state):
            # a tensor that is zero there already is not written to, so that backward through it stays possible
            if torch.is_tensor(tensor) and tensor.shape == weight.shape and tensor[~net.masks[name]].any():
                tensor.masked_fill_(~net.masks[name], 0)  # not a product, which would be NaN for an infinite value


def mask_gradients(net: Net) -> None:
    """Hook each weight so that its gradient is zero outside the mask as soon as `backward()` returns. Then Adam's steps
    there are exactly zero, and what `zero_pruned` zeroed stays zero. The hooks read net.masks when they run. A network
    that is all active needs no hook. The kernels run no such hook, as they compute no gradient outside the mask: change
    gradients in a hook of your own, which keeps a network in torch."""

    def zero_gradient(name: str, weight: nn.Parameter) -> None:
        weight.grad.masked_fill_(~net.masks[name], 0)

    if all(mask.all() for mask in net.masks.values()):
        return
    for name, weight in net.weights.items():
        trained, weight.requires_grad = weight.requires_grad, True  # or a frozen one would take no hook
        if not hasattr(weight, "mask_hook"):
            weight.mask_hook = weight.register_post_accumulate_grad_hook(partial(zero_gradient, name))
        weight.requires_grad = trained


def fix_masks(nets: dict[str, Net]) -> None:
    """From here on each network trains, and its target stays, within its masks: pruned weights and their Adam moments
    are zeroed, so they start at zero if they return, and their gradients are zero once `backward()` returns. Called
    again at checkpoints and rewirings, so what is to happen once belongs in the block of `train`."""
    for net in [net for net in nets.values() if net.masks]:  # the others are not pruned yet
        zero_pruned(net)
        mask_gradients(net)
        net.active = sum(int(mask.sum()) for mask in net.masks.values())
