"""Masks for sparse reinforcement learning: budgets, static pruning, Topology-Aware Revival, rewiring, masked gradients.

Shared by `sac_tar.py` and `td3_tar.py`. Of one network, `weights` and `masks` are dictionaries from layer name to a
tensor of shape (n_out, n_in), in the order in which the layers are applied; a mask is boolean and True marks an active
connection. Nothing here moves torch's global random generator.

To add a rule, write a function and put it into the dictionary behind its kin: CRITERIA, DISTRIBUTIONS, REVIVALS (PLACES
too, if what it revives within a layer is not random), DROPS, GROWTHS. The scripts' flags take their choices and their
help from there.
"""

import bisect
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

Masks = dict[str, Tensor]
MEST_LAMBDA = 1.0  # the value in the code of Nowak et al. 2023
AUTO_WIDTH_C = 4.0  # connections per topology need that --active-width auto asks for
EARLY_STOP = 0.9  # fraction of what grows that was just dropped, above which a layer has settled (Zhang et al. 2024)


class Rule(NamedTuple):
    """How connections are scored; the highest are kept or grown. The first sentence of the function's docstring is its
    help. Pruning: (weights, masks, loss, generator) -> scores of a network; masks are of what earlier rounds have left.
    Rewiring: (layer) -> scores of one `Layer`, of which only some count."""

    scores: Callable
    uses_loss: bool = False  # reads `loss`, or its `gradient`, which is None for the others
    rounds: int = 1  # of pruning, without a loss: as many times scored and pruned, ever further
    drop: str = "magnitude"  # growth: the criterion of dropping in its source
    by_topology: bool = False  # growth: removes chains across layers, and stops in a layer where it has settled


def linear_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The prunable parameters of a network: the weight of every `nn.Linear`, by layer name. Biases stay dense."""
    return {name: layer.weight for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}


# BUDGETS: how many connections, and in which layer


def connection_budget(size: int, method: str, sparsity: float, reserve: float) -> tuple[int, int]:
    """Active connections K = round((1 - sparsity) * size) of a network with `size` weights (all, if the method prunes
    nothing) and how many of them, R = round(reserve * K), are left to revival (0, if the method has none). Raises
    ValueError if no connection would be left or the method is unknown."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; METHODS has {', '.join(METHODS)}")
    budget = size if method in UNPRUNED else round((1 - sparsity) * size)
    if budget < 1:
        raise ValueError(f"--sparsity {sparsity} keeps none of a network's {size} connections; choose a lower sparsity")
    return budget, round(reserve * budget) if method in REVIVALS else 0


def hidden_neurons(network: Callable[[int], nn.Module], hidden_size: int, method: str, sparsity: float) -> int:
    """Neurons in each hidden layer: `hidden_size`, and with `tiny` the most at which `network(neurons)`, dense, has no
    more weights than `network(hidden_size)` has connections at this sparsity. Raises ValueError if that is 0."""
    if method != "tiny":
        return hidden_size

    def weights(hidden):
        return sum(weight.numel() for weight in linear_weights(network(hidden)).values())

    with torch.random.fork_rng(devices=[]):  # networks built to be counted must not shift the run's random numbers
        budget = round((1 - sparsity) * weights(hidden_size))
        neurons = bisect.bisect_right(range(1, hidden_size + 1), budget, key=weights)
    if neurons < 1:
        raise ValueError("--method tiny has no connections for even one hidden neuron; choose a lower --sparsity")
    return neurons


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


def room(scores: dict[str, Tensor]) -> list[int]:
    """How many connections each layer can keep: what an earlier round has pruned scores minus infinity."""
    return [int((s > -math.inf).sum()) for s in scores.values()]


def er_budgets(scores: dict[str, Tensor], keep: int) -> list[int]:
    """Erdos-Renyi. Density proportional to (n_in + n_out) / (n_in * n_out), so a count proportional to n_in + n_out; a
    layer that would pass density 1 is dense and the others are rescaled (Mocanu et al. 2018; Evci et al. 2020)."""
    return allocate(keep, [sum(s.shape) for s in scores.values()], room(scores))


def uniform_layer_budgets(scores: dict[str, Tensor], keep: int) -> list[int]:
    """The same fraction in every layer."""
    return allocate(keep, [s.numel() for s in scores.values()], room(scores))


def global_budgets(scores: dict[str, Tensor], keep: int) -> list[int]:
    """One ranking of all connections of the network. Ties go to the lower index."""
    top = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True, stable=True).indices[:keep]
    active = torch.zeros(sum(s.numel() for s in scores.values()), dtype=torch.bool).index_fill_(0, top.cpu(), True)
    return [int(part.sum()) for part in active.split([s.numel() for s in scores.values()])]


# how static pruning spreads `keep` connections over the layers: (scores, keep) -> a count for each layer
DISTRIBUTIONS = {"er": er_budgets, "uniform": uniform_layer_budgets, "global": global_budgets}


# ACTIVE WIDTH [ours]: only the first h neurons of each hidden layer have connections


def active_part(tensors: dict[str, Tensor], width: int | None) -> dict[str, Tensor]:
    """Views of the connections between active neurons: the first `width` of each hidden layer (None: all)."""
    names = list(tensors)
    return {
        name: t[: None if name == names[-1] else width, : None if name == names[0] else width]
        for name, t in tensors.items()
    }


def embed(part: Masks, weights: dict[str, Tensor]) -> Masks:
    """Masks of the weights' shapes that are `part` between active neurons and False elsewhere."""
    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
    for name, mask in part.items():
        masks[name][: mask.shape[0], : mask.shape[1]] = mask
    return masks


def active_widths(
    networks: dict[str, nn.Module], methods: dict[str, str], budgets: dict[str, tuple[int, int]], asked
) -> dict[str, int]:
    """Neurons of each hidden layer that have connections, for each network: `asked`, or all if it is None or nothing is
    pruned. `auto`: the most for which K >= AUTO_WIDTH_C * the topology need of all layers, but never too few to hold K
    connections. Raises ValueError if `asked` is too few."""
    widths, narrowest = {}, {}
    for name, network in networks.items():
        layers = linear_weights(network)
        shapes = [weight.shape for weight in layers.values()]
        if asked is not None and any(b[1] != a[0] for a, b in zip(shapes, shapes[1:])):
            raise ValueError(f"--active-width needs layers that are a chain, and those of {name} are {shapes}")
        hidden = max((n for (n_out, _), (_, n_in) in zip(shapes, shapes[1:]) for n in (n_out, n_in)), default=0)
        if asked is None or methods[name] in UNPRUNED:
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


# DENSITY DECAY: from more connections down to K


def starting_budgets(
    networks: dict[str, nn.Module],
    methods: dict[str, str],
    budgets: dict[str, tuple[int, int]],
    widths: dict[str, int],
    density: float | None,
) -> dict[str, tuple[int, int]]:
    """What `budgets` are at the first pruning: with --density-start that fraction of a network's weights, and no
    revival. Raises ValueError unless that is more than K and less than the active neurons can hold."""
    starts = dict(budgets)
    for name in [name for name, method in methods.items() if density is not None and method not in UNPRUNED]:
        weights = linear_weights(networks[name])
        size, most = (sum(w.numel() for w in ws.values()) for ws in (weights, active_part(weights, widths[name])))
        starts[name] = (round(density * size), 0)
        if not budgets[name][0] < starts[name][0] < most:
            raise ValueError(
                f"--density-start {density} of {name} is {starts[name][0]} connections; choose one above the "
                f"{budgets[name][0]} of the end and below the {most} that its active neurons can have"
            )
    return starts


def decayed(start: int, end: int, done: float) -> int:
    """Connections when a fraction of the rewirings is done: from `start` to `end` by a sigmoid over [-6, 6], stretched
    so that both are met (CHTss, Zhang et al. 2025)."""
    return round(start + (end - start) * (1 + math.tanh(6 * done - 3) / math.tanh(3)) / 2)


# STATIC PRUNING: a score for each connection (the higher ones are kept), then an exact count by rank


def random_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """Uniform noise."""
    draws = {name: torch.rand(w.shape, generator=generator, dtype=torch.float64) for name, w in weights.items()}
    return {name: draw.to(weights[name].device) for name, draw in draws.items()}


def magnitude_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """|w|."""
    return {name: w.detach().abs() for name, w in weights.items()}


def snip_scores(weights: dict[str, Tensor], masks: Masks, loss: Tensor, generator: torch.Generator):
    """|w dL/dw| on replay data (SNIP, Lee et al. 2019)."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return {name: (w * g).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp_scores(weights: dict[str, Tensor], masks: Masks, loss: Tensor, generator: torch.Generator):
    """w (H g) on replay data (GraSP, Wang et al. 2020). g is the gradient and H the Hessian of the loss. They prune the
    highest -w * (H g), where pruning hurts the gradient's norm least."""
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    squared_norm = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(squared_norm, list(weights.values()))
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), products, strict=True)}


def synflow_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """|w dR/dw|, R the flow of an all-ones input through |w|, 100 rounds (SynFlow, Tanaka et al. 2020). Without biases
    and squashing ReLU is the identity, R a product of matrices, and its gradient at a layer the outer product of what
    reaches it from both ends. In float64: R can overflow float32.

    Raises ValueError if the layers are not a chain, each reading what the one before it writes.
    """
    magnitudes = [(w.detach() * masks[name]).abs().double() for name, w in weights.items()]
    if any(b.shape[1] != a.shape[0] for a, b in zip(magnitudes, magnitudes[1:])):
        raise ValueError(f"synflow needs a chain of layers, got {[tuple(m.shape) for m in magnitudes]}")
    into = [magnitudes[0].new_ones(magnitudes[0].shape[1])]
    for m in magnitudes[:-1]:
        into.append(m @ into[-1])
    out_of = [magnitudes[-1].new_ones(magnitudes[-1].shape[0])]
    for m in reversed(magnitudes[1:]):
        out_of.insert(0, m.T @ out_of[0])
    return {name: m * torch.outer(o, i) for name, m, o, i in zip(weights, magnitudes, out_of, into, strict=True)}


def diagonal_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """Whole diagonals in random order (the structure of DynaDiag, Tyagi et al. 2025). A part of (m, n) active neurons
    has max(m, n) of them, each of min(m, n) connections, one for each neuron of the shorter side; the last one may be
    kept in part. So the fan of these neurons, and in a square layer of all, is the same up to one, if nothing was
    pruned before."""
    scores = {}
    for name, mask in masks.items():
        m, n = int(mask.any(1).sum()), int(mask.any(0).sum())
        diagonal = (torch.arange(n) - torch.arange(m).unsqueeze(1)) % max(m, n)
        scores[name] = torch.zeros(mask.shape, dtype=torch.float64)
        scores[name][:m, :n] = torch.randperm(max(m, n), generator=generator)[diagonal] / max(m, n)
    return {name: s.to(weights[name].device) for name, s in scores.items()}


CRITERIA = {
    "random": Rule(random_scores),
    "magnitude": Rule(magnitude_scores),
    "snip": Rule(snip_scores, uses_loss=True),
    "grasp": Rule(grasp_scores, uses_loss=True),
    "synflow": Rule(synflow_scores, rounds=100),
    "diagonal": Rule(diagonal_scores),
}


def highest(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """A mask of the `count` highest scores among the connections of another mask. By rank, ties to the lower index, so
    the count is exact whatever the scores."""
    indices = among.flatten().nonzero().squeeze(1)
    top = indices[scores.flatten()[indices].sort(descending=True, stable=True).indices[:count]]
    return torch.zeros_like(among).flatten().index_fill_(0, top, True).view_as(among)


def static_prune(
    weights: dict[str, Tensor],
    keep: int,
    criterion: str,
    distribution: str,
    generator: torch.Generator,
    loss: Tensor | None = None,
    width: int | None = None,
    masks: Masks | None = None,
) -> Masks:
    """The base masks: exactly `keep` connections by the rules CRITERIA[criterion] and DISTRIBUTIONS[distribution], all
    between active neurons, and of `masks`, if an earlier pruning has left these. `loss` is the network's own loss, for
    the criteria that use it; `generator` is on the CPU. The weights are read, not changed."""
    rule = CRITERIA[criterion]
    if rule.uses_loss and rule.rounds > 1:
        raise ValueError(f"criterion {criterion} uses the loss, that of the dense network, so it has one round")
    masks = masks or embed({name: torch.ones_like(w) for name, w in active_part(weights, width).items()}, weights)
    size = sum(int(mask.sum()) for mask in masks.values())
    for i in range(1, rule.rounds + 1):
        scores = rule.scores(weights, masks, loss, generator)
        # so that what is pruned stays pruned even where a cut-off connection scores zero
        scores = {name: s.masked_fill(~masks[name], -math.inf) for name, s in scores.items()}
        scores, left = active_part(scores, width), active_part(masks, width)
        counts = DISTRIBUTIONS[distribution](scores, round(size * (keep / size) ** (i / rule.rounds)))
        masks = embed({name: highest(scores[name], n, left[name]) for name, n in zip(left, counts)}, weights)
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

    How many of the `reserve` connections each layer gets. A reserve too small for all deficits is split in proportion
    to them. Otherwise every deficit is filled and the rest split in proportion to topology need, as far as a layer
    still has pruned connections.
    """
    kept = [int(mask.sum()) for mask in masks.values()]
    deficits = [max(0, topology_floor(tuple(m.shape)) - k) for m, k in zip(masks.values(), kept, strict=True)]
    if sum(deficits) >= reserve:
        return allocate(reserve, deficits, deficits)
    room = [mask.numel() - k - d for mask, k, d in zip(masks.values(), kept, deficits, strict=True)]
    rest = allocate(reserve - sum(deficits), [topology_need(tuple(mask.shape)) for mask in masks.values()], room)
    return [d + r for d, r in zip(deficits, rest, strict=True)]


def uniform_budgets(masks: Masks, reserve: int) -> list[int]:
    """Prune, then revive all pruned connections of the network alike (the control in Jin et al. 2026)."""
    pruned = [mask.numel() - int(mask.sum()) for mask in masks.values()]
    return allocate(reserve, pruned, pruned)


def tar_ch_budgets(masks: Masks, reserve: int) -> list[int]:
    """As tar, but within a layer not at random: where Cannistraci-Hebb scores are highest."""
    return tar_budgets(masks, reserve)


# how the reserve R is spread over the layers of the base masks: (masks, R) -> a count for each layer
REVIVALS = {"tar": tar_budgets, "tar_ch": tar_ch_budgets, "uniform": uniform_budgets}


def no_revival(masks: Masks, reserve: int) -> list[int]:
    """For the methods that revive nothing."""
    return [0] * len(masks)


def ch_scores(mask: Tensor) -> Tensor:
    """CH2-L3n of each pair of an output and an input that are not connected, 0 elsewhere: float64, of shape (n_out,
    n_in). The neurons between the two, on paths of three connections, are their local community; the score is the sum
    over these of (1 + connections within it) / (1 + connections that leave it and the pair) (Muscoloni et al. 2022)."""

    def by_community(m: Tensor) -> Tensor:  # that half of it which shares the kind of the rows
        common = m @ m.T  # connections of neuron j into the community of i and another neuron that j reads
        leaving = (m.sum(1) - common - 1).clamp(min=0)
        return (common + (common > 0)) / (1 + leaving) @ m

    m = mask.double()
    return (by_community(m) + by_community(m.T).T) * ~mask


def ch_places(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Cannistraci-Hebb scores; a little noise makes ties random."""
    return ch_scores(mask) + 1e-9 * torch.rand(mask.shape, generator=generator).to(mask.device)


# where in a layer connections are revived, the highest first, if not at random: (mask, generator) -> scores
PLACES = {"tar_ch": ch_places}


def revive(masks: Masks, budgets: Sequence[int], generator: torch.Generator, places: Callable | None = None) -> Masks:
    """New masks in which each layer has `budget` more connections: the pruned ones of highest `places`, or drawn
    uniformly without replacement. `generator` is on the CPU."""
    revived = {}
    for (name, mask), budget in zip(masks.items(), budgets, strict=True):
        if places:
            revived[name] = mask | highest(places(mask, generator), budget, ~mask)
            continue
        pruned = (~mask).flatten().nonzero().squeeze(1)
        chosen = pruned[torch.randperm(len(pruned), generator=generator)[:budget].to(mask.device)]
        revived[name] = mask.flatten().index_fill(0, chosen, True).view_as(mask)
    return revived


def active_connections(masks: dict[str, Masks]) -> dict[str, int]:
    """How many connections each network has."""
    return {name: sum(int(mask.sum()) for mask in layers.values()) for name, layers in masks.items()}


# DYNAMIC SPARSE TRAINING: what a rewiring does to one layer


class Layer(NamedTuple):
    """What a rule of rewiring is given of one layer, each tensor of shape (n_out, n_in)."""

    weight: Tensor
    gradient: Tensor | None  # of the network's own loss; None unless the rule says `uses_loss`
    mask: Tensor  # growth: what the drop has left
    generator: torch.Generator  # on the CPU
    done: float  # fraction of all rewirings, this one included; 1 at the last


def magnitude_worth(layer: Layer) -> Tensor:
    """|w| (Han et al. 2015)."""
    return layer.weight.abs()


def set_worth(layer: Layer) -> Tensor:
    """|w|, ranked among the positive and among the negative weights apart, the same fraction of both dropped (Mocanu et
    al. 2018; Nowak et al. drop the same number)."""
    weight, mask = layer.weight, layer.mask
    rank = torch.zeros_like(weight)  # within the weights of one sign, as a fraction of their number
    for same_sign in (mask & (weight >= 0), mask & (weight < 0)):
        order = weight[same_sign].abs().argsort(stable=True).argsort()
        rank[same_sign] = (order + 1) / max(1, len(order))
    return rank


def mest_worth(layer: Layer) -> Tensor:
    """|w| + |g| (Yuan et al. 2021, with lambda = 1 as in the code of Nowak et al. 2023)."""
    return layer.weight.abs() + MEST_LAMBDA * layer.gradient.abs()


def snip_worth(layer: Layer) -> Tensor:
    """|w g| (Lee et al. 2019)."""
    return (layer.weight * layer.gradient).abs()


def sensitivity(layer: Layer) -> Tensor:
    """|g| / |w| (Nowak et al. 2023; 0 / 0 counts as 0)."""
    return (layer.gradient / layer.weight).abs().nan_to_num(nan=0.0)


def reciprocal_sensitivity(layer: Layer) -> Tensor:
    """|w| / |g| (Nowak et al. 2023; 0 / 0 counts as 0)."""
    return (layer.weight / layer.gradient).abs().nan_to_num(nan=0.0)


def noise(layer: Layer) -> Tensor:
    """Uniform noise."""
    return torch.rand(layer.mask.shape, generator=layer.generator).to(layer.mask.device)


def sample(odds: Tensor, layer: Layer) -> Tensor:
    """Scores for a draw without replacement by these odds (Efraimidis and Spirakis 2006); zeros last, at random."""
    return (odds.double() + 1e-99) / -noise(layer).double().log()


def soft_worth(layer: Layer) -> Tensor:
    """Kept at random by odds of |w|^T, T growing from 1 to 3 (CHTs, Zhang et al. 2025)."""
    return sample(layer.weight.abs().double() ** (1 + 2 * layer.done), layer)


# what an active connection with weight w and gradient g is worth, the lowest being dropped (Nowak et al. 2023)
DROPS = {
    "magnitude": Rule(magnitude_worth),
    "set": Rule(set_worth),
    "mest": Rule(mest_worth, uses_loss=True),
    "snip": Rule(snip_worth, uses_loss=True),
    "sensitivity": Rule(sensitivity, uses_loss=True),
    "reciprocal_sensitivity": Rule(reciprocal_sensitivity, uses_loss=True),
    "random": Rule(noise),
    "soft": Rule(soft_worth),
}


def set_growth(layer: Layer) -> Tensor:
    """Prune, then rewire during training: drop connections, grow as many at random (SET as in Graesser et al. 2022)."""
    return noise(layer)


def rigl_growth(layer: Layer) -> Tensor:
    """The same, but grow where the dense gradient is largest (RigL, Evci et al. 2020)."""
    return layer.gradient.abs()


def cht_growth(layer: Layer) -> Tensor:
    """The same, but grow where Cannistraci-Hebb scores of the mask are highest (CHT, Zhang et al. 2024)."""
    return ch_places(layer.mask, layer.generator)


def chts_growth(layer: Layer) -> Tensor:
    """The same, but drop and grow at random, by odds of worth and of that score (CHTs, Zhang et al. 2025)."""
    return sample(ch_scores(layer.mask), layer)


# where connections grow, the highest first
GROWTHS = {
    "set": Rule(set_growth),
    "rigl": Rule(rigl_growth, uses_loss=True),
    "cht": Rule(cht_growth, by_topology=True),
    "chts": Rule(chts_growth, drop="soft", by_topology=True),
}


def usual_drop(methods: set[str]) -> str | None:
    """The criterion by which these methods drop unless told otherwise; None if they have different ones."""
    usual = {GROWTHS[method].drop for method in methods & GROWTHS.keys()} or {"magnitude"}
    return usual.pop() if len(usual) == 1 else None


def drop(layer: Layer, count: int, criterion: str) -> Tensor:
    """The mask without its `count` active connections of lowest DROPS[criterion]; ties go to the lower index."""
    return layer.mask & ~highest(-DROPS[criterion].scores(layer), count, layer.mask)


def grow(layer: Layer, candidates: Tensor, count: int, method: str) -> Tensor:
    """The mask and the `count` candidates of highest GROWTHS[method]; ties go to the lower index."""
    return layer.mask | highest(GROWTHS[method].scores(layer), count, candidates)


def remove_chains(masks: Masks, stopped: list[str]) -> None:
    """Drop, in place, the connections of hidden neurons that have no active output, or no active input, until there are
    none (Zhang et al. 2024); not those of the layers that have `stopped`."""
    pairs = [(a, b) for a, b in zip(masks, list(masks)[1:]) if masks[a].shape[0] == masks[b].shape[1]]
    for a, b in reversed(pairs):
        masks[a] &= masks[b].any(0).unsqueeze(1) | (a in stopped)
    for a, b in pairs:
        masks[b] &= masks[a].any(1) | (b in stopped)


def rewire(
    layers: dict[str, Layer],
    counts: dict[str, int],
    stopped: list[str],
    fraction: float,
    method: str,
    criterion: str,
    regrow: bool,
) -> None:
    """Drop what a layer has above its count, and a fraction of that count; grow up to it, the masks in place. They grow
    among all that is not kept, what was just dropped included (Evci et al. 2020), or, without `regrow`, among what was
    inactive before."""
    kept = {}
    for name, layer in layers.items():
        count = 0 if name in stopped else int(fraction * counts[name])
        count = count if regrow else min(count, int((~layer.mask).sum()))
        kept[name] = drop(layer, int(layer.mask.sum()) - counts[name] + count, criterion)
    if GROWTHS[method].by_topology:
        remove_chains(kept, stopped)
    for name, layer in layers.items():
        count, candidates = counts[name] - int(kept[name].sum()), ~kept[name] if regrow else ~layer.mask
        after = grow(layer._replace(mask=kept[name]), candidates, count, method)
        back, elsewhere = int((layer.mask & after & ~kept[name]).sum()), int((~layer.mask).sum())
        if GROWTHS[method].by_topology and back > EARLY_STOP * count and elsewhere >= count:
            stopped.append(name)  # a fuller layer has no choice, so that says nothing [ours]
        layer.mask.copy_(after)


def rewiring_steps(after: int, until: float, every: int) -> range:
    """The environment steps of rewirings: multiples of `every` after one step and before another."""
    return range((after // every + 1) * every, math.ceil(until), every)


def reads_gradient(method: str, criterion: str) -> bool:
    """Whether a rewiring by these rules of growth and dropping needs the loss."""
    return GROWTHS[method].uses_loss or DROPS[criterion].uses_loss


def rewire_network(
    network: nn.Module,
    target: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    masks: Masks,
    width: int,
    stopped: list[str],
    loss: Tensor | None,
    keep: int,
    fraction: float,
    done: float,
    rules: tuple[str, str, bool, str],
    generator: torch.Generator,
) -> None:
    """Rewire a network between its active neurons, its masks in place, by `rules`: of growth, of dropping, whether what
    is dropped may grow again, and a distribution. If fewer connections are to be left, `keep`, a layer has as many of
    them as pruning by magnitude and that distribution would leave there. `loss` is the network's own, for rules that
    read its dense gradient; layers that are not to be rewired any more are, or come, into `stopped`. What is dropped
    ends at zero, also in Adam's moments and the target; what is new starts there."""
    method, criterion, regrow, distribution = rules
    weights, left = linear_weights(network), masks
    if keep < sum(int(mask.sum()) for mask in masks.values()):
        left = static_prune(weights, keep, "magnitude", distribution, generator, width=width, masks=masks)
    counts = {name: int(mask.sum()) for name, mask in left.items()}
    if sum(counts.values()) != keep:
        raise ValueError(f"distribution {distribution} leaves {sum(counts.values())} connections in place of {keep}")
    gradients = dict.fromkeys(weights)
    if reads_gradient(method, criterion):
        dense = torch.autograd.grad(loss, list(weights.values()))
        gradients = active_part(dict(zip(weights, dense, strict=True)), width)
    weights = active_part(weights, width)
    layers = {
        name: Layer(weights[name].detach(), gradients[name], mask, generator, done)
        for name, mask in active_part(masks, width).items()
    }
    # layer by layer, but all at once where chains across layers count
    for group in [layers] if GROWTHS[method].by_topology else [{name: layer} for name, layer in layers.items()]:
        rewire(group, counts, stopped, fraction, method, criterion, regrow)
    zero_pruned(network, masks, optimizer)
    if target is not None:
        zero_pruned(target, masks)


def rewiring_flops(active: int, size: int, method: str, criterion: str) -> int:
    """Floating-point operations per sample of a rewiring, for the gradient of the network's own layers alone: 2 per
    active connection forward and 2 backward to the inputs; for the weights' gradient 2 per weight, active or not, if
    growth reads it (Evci et al. 2020), 2 per active one if dropping alone does, and nothing at all if neither does."""
    if GROWTHS[method].uses_loss:
        return 4 * active + 2 * size
    return 6 * active if reads_gradient(method, criterion) else 0


# METHODS: all arms, with their help

UNPRUNED = {
    "tiny": "a dense network so narrow that it has at most K weights",
    "dense": "no pruning",
}
CONTROLS = {"static": "prune to K connections, revive none"}  # against which compare.py holds the other arms
METHODS = REVIVALS | CONTROLS | GROWTHS | UNPRUNED


def choices(rules: dict) -> str:
    """The help of a flag that takes one of these names: each name with the first sentence of its rule."""

    def sentence(rule) -> str:
        text = rule if isinstance(rule, str) else (getattr(rule, "scores", rule).__doc__ or "no description")
        return re.split(r"(?<! al)\.( |$)", " ".join(text.split()))[0]

    return "; ".join(f"{name}: {sentence(rule)}" for name, rule in rules.items())


# MASKED TRAINING


@torch.no_grad()
def zero_pruned(network: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Zero, in place, a network's weights outside the masks and, with its optimizer, what it keeps of them, such as
    Adam's moments: one left over from dense training would push the weight away from zero."""
    for name, weight in linear_weights(network).items():
        state = optimizer.state.get(weight, {}) if optimizer else {}
        for tensor in (weight, *state.values()):
            if torch.is_tensor(tensor) and tensor.shape == weight.shape:
                tensor.mul_(masks[name])


def mask_gradients(network: nn.Module, masks: Masks) -> None:
    """Hook each weight so that its gradient is zero outside the mask, in place, as soon as `backward()` returns. Adam's
    moments and steps there are then exactly zero, and what `zero_pruned` zeroed stays zero. The hooks read the masks
    given last: change these in place to change what stays zero. A network that is all active needs no hook."""
    if all(mask.all() for mask in masks.values()):
        return
    for name, weight in linear_weights(network).items():
        if not hasattr(weight, "mask"):
            weight.register_post_accumulate_grad_hook(zero_gradient)
        weight.mask = masks[name]


def zero_gradient(weight: Tensor) -> None:
    weight.grad.mul_(weight.mask)


@torch.no_grad()
def scale_to_active_inputs(network: nn.Module, masks: Masks) -> None:
    """Multiply, in place, each unit's weights by sqrt(n_in / its active inputs), the scale that an initialization by
    its own fan-in would have given them (Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery
    Tickets Win). A unit without active inputs is left as it is."""
    for name, weight in linear_weights(network).items():
        active = masks[name].sum(1, keepdim=True)
        weight.mul_((weight.shape[1] / active.where(active > 0, weight.shape[1])).sqrt())


def fix_masks(
    networks: dict[str, nn.Module],
    targets: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    masks: dict[str, Masks],
) -> None:
    """From here on each network and its target train within its mask: what is pruned is zeroed once, Adam's moments
    included, and then the gradient there is zero as soon as `backward()` returns."""
    for name, network in networks.items():
        zero_pruned(network, masks[name], optimizers[name])
        mask_gradients(network, masks[name])
    for name, target in targets.items():
        zero_pruned(target, masks[name])
