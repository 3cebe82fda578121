"""Other papers' methods for sparse agents, called from the lines of the scripts that are marked BASELINES.

Methods that rewire (SET, RigL, CHT, CHTs), `tar_ch`, `tiny`, random and learned diagonals (DynaDiag), a falling density
(CHTss, SCULPT), sparsity-aware initialization, cyclic learning rates, and the flags of all of these. The flags of
n-step targets (RLx2) and of recent transitions (after MAST) are here too; lab/replay.py implements both.
"""

import bisect
import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import sparse_utils
from lab import kernels
from lab.flags import fail, fraction, one_of, positive, require, within_training
from sparse_utils import Masks, Net, Rule, active_part, highest, linear_weights

EARLY_STOP = 0.9  # fraction of the grown connections that were just dropped, above which a layer has settled (CHT)


# RULES: Cannistraci-Hebb scores, what is dropped, what grows


def ch_scores(mask: Tensor) -> Tensor:
    """CH2-L3n of each unconnected pair of an output and an input, 0 elsewhere: float64, of shape (n_out, n_in). The
    neurons on paths of three connections between the two are their local community. The score sums over these neurons
    (1 + connections to the community) / (1 + connections to all but community and pair) (Zhang et al. 2025, after
    Muscoloni et al. 2022)."""

    def by_community(m: Tensor) -> Tensor:  # the sum over those neurons of the community that are rows of m
        common = m @ m.T  # [i, j]: connections of row j inside the community of i and any other neighbour of j
        leaving = (m.sum(1) - common - 1).clamp(min=0)
        return (common + (common > 0)) / (1 + leaving) @ m

    m = mask.double()
    return (by_community(m) + by_community(m.T).T) * ~mask


def ch_places(weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Cannistraci-Hebb scores; a little noise makes ties random."""
    return ch_scores(mask) + 1e-9 * torch.rand(mask.shape, generator=generator).to(mask.device)


def tar_ch_budgets(masks: Masks, reserve: int) -> list[int]:
    """As tar, but at the places of a layer with the highest Cannistraci-Hebb scores, not at random (in no paper)."""
    return sparse_utils.tar_budgets(masks, reserve)


sparse_utils.REVIVALS["tar_ch"], sparse_utils.PLACES["tar_ch"] = tar_ch_budgets, ch_places
sparse_utils.UNPRUNED["tiny"] = "Train a dense network so narrow that it has at most K weights"


def diagonals(weight: Tensor) -> Tensor:
    """The index of each connection's diagonal, one of max(n_out, n_in) that wrap around the edges."""
    rows, columns = (torch.arange(n, device=weight.device) for n in weight.shape)
    return (columns - rows.unsqueeze(1)) % max(weight.shape)


def diagonal_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """Whole diagonals in random order (the structure of DynaDiag, Tyagi et al. 2025). m active outputs and n active
    inputs have max(m, n) diagonals, each with one connection for every neuron of the smaller side; the last diagonal
    may be kept in part. So if nothing was pruned before, the neurons of the smaller side, and in a square layer all
    neurons, have the same number of connections, up to one."""
    scores = {}
    for name, mask in masks.items():
        part = mask[: int(mask.any(1).sum()), : int(mask.any(0).sum())]
        scores[name] = torch.zeros(mask.shape, dtype=torch.float64)
        order = torch.randperm(max(part.shape), generator=generator) / max(part.shape)
        scores[name][: part.shape[0], : part.shape[1]] = order[diagonals(part).cpu()]
    return {name: s.to(weights[name].device) for name, s in scores.items()}


def dynadiag_scores(weights: dict[str, Tensor], masks: Masks, loss: None, generator: torch.Generator):
    """Whole diagonals, by gates that are learned until --prune-at (DynaDiag, Tyagi et al. 2025). The last one may be
    kept in part. Equal gates, as before learning, rank by number, the lowest first."""
    alphas = {name: getattr(w, "alpha", w.new_zeros(max(w.shape))) for name, w in weights.items()}
    ranks = {name: alpha.argsort(descending=True, stable=True).argsort() for name, alpha in alphas.items()}
    return {name: -ranks[name][diagonals(w)].double() for name, w in weights.items()}


sparse_utils.CRITERIA |= {"diagonal": Rule(diagonal_scores), "dynadiag": Rule(dynadiag_scores)}


class Layer(NamedTuple):
    """The argument of a rule of rewiring: one layer, each tensor of shape (n_out, n_in)."""

    weight: Tensor
    gradient: Tensor | None  # of the network's own loss; None unless growth or drop says `uses_loss`
    mask: Tensor  # growth: what the drop has left
    generator: torch.Generator  # on the CPU
    done: float  # fraction of all rewirings, this one included; 1 at the last


def magnitude_worth(layer: Layer) -> Tensor:
    """|w| (Han et al. 2015)."""
    return layer.weight.abs()


def set_worth(layer: Layer) -> Tensor:
    """|w|, positive and negative weights ranked apart, the same fraction of each dropped (Mocanu et al. 2018; Nowak et
    al. drop the same number)."""
    weight, mask = layer.weight, layer.mask
    rank = torch.zeros_like(weight)  # within the weights of one sign, as a fraction of their number
    for same_sign in (mask & (weight >= 0), mask & (weight < 0)):
        order = weight[same_sign].abs().argsort(stable=True).argsort()
        rank[same_sign] = (order + 1) / max(1, len(order))
    return rank


def mest_worth(layer: Layer) -> Tensor:
    """|w| + |g| (Yuan et al. 2021, with lambda = 1 as in the code of Nowak et al. 2023)."""
    return layer.weight.abs() + layer.gradient.abs()


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
    """Scores whose n highest are n draws without replacement by `odds`, 0 last (Efraimidis and Spirakis 2006)."""
    return (odds.double() + 1e-99) / -noise(layer).double().log()


def soft_worth(layer: Layer) -> Tensor:
    """Kept at random with odds in proportion to |w|^T, T growing from 1 to 3 (CHTs, Zhang et al. 2025; MLP code)."""
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
    """As set, but grow where the dense gradient is largest (RigL, Evci et al. 2020)."""
    return layer.gradient.abs()


def cht_growth(layer: Layer) -> Tensor:
    """As set, but grow where Cannistraci-Hebb scores are highest (CHT, Zhang et al. 2024; here CH2-L3n)."""
    return ch_places(layer.weight, layer.mask, layer.generator)


def chts_growth(layer: Layer) -> Tensor:
    """As cht, but drop by soft, and grow at random with odds in proportion to the scores (CHTs, Zhang et al. 2025)."""
    return sample(ch_scores(layer.mask), layer)


# where connections grow, the highest first
GROWTHS = {
    "set": Rule(set_growth),
    "rigl": Rule(rigl_growth, uses_loss=True),
    "cht": Rule(cht_growth, by_topology=True),
    "chts": Rule(chts_growth, drop="soft", by_topology=True),
}

METHODS = sparse_utils.REVIVALS | sparse_utils.CONTROLS | GROWTHS | sparse_utils.UNPRUNED


# FLAGS

Method = one_of(METHODS, "How to prune and revive. All but dense and tiny train K connections, (1 - sparsity) of all.")
Criterion = one_of(sparse_utils.CRITERIA, "The score by which static pruning ranks connections.")
Distribution = one_of(sparse_utils.DISTRIBUTIONS, "How static pruning spreads its budget over the layers.")
DropCriterion = one_of(
    DROPS | {None: "Soft with chts, else magnitude"},
    "For methods that rewire: a connection's score, of its weight w and gradient g; the lowest are dropped.",
)


@dataclass
class Flags:
    rewire_every: int = 1000  # For methods that rewire: environment steps between rewirings (Graesser et al. 2022).
    # For methods that rewire: the fraction of a layer's connections that a rewiring replaces, at step 0. It falls along
    # a cosine to 0 at --rewire-stop (Graesser et al. 2022). cht and chts also replace connections of neurons without
    # inputs or outputs.
    rewire_fraction: float = 0.5
    rewire_stop: float = 0.8  # For methods that rewire: the fraction of training after which masks stay as they are.
    drop_criterion: DropCriterion = None
    # For methods that rewire: connections that were just dropped may grow again at once (Evci et al. 2020).
    regrow: bool = True
    # The weights of active connections after pruning. dense: unchanged. sparse: multiplied by sqrt(inputs / active
    # inputs) of their neuron (Evci et al. 2022).
    init: Literal["dense", "sparse"] = "dense"
    # The fraction of the weights that are active after the first pruning. It falls to 1 - sparsity at the rewirings, or
    # at --final-prune-at for methods that do not rewire (CHTss, Zhang et al. 2025; SCULPT, Gadhikar et al. 2024).
    # Default: it is 1 - sparsity from the start.
    density_start: float | None = None
    # Prune a second time at this environment step, by magnitude, and revive only then (SCULPT). Needs --density-start.
    final_prune_at: int | None = None
    # The number of cycles in which all learning rates rise and fall. Adam starts anew in each (SCULPT).
    lr_cycles: int | None = None
    # The number of rewards that a critic's target adds up before it bootstraps (RLx2, Tan et al. 2023). SAC's target
    # has the entropy of the last action alone.
    n_step: int = 1
    n_step_from: int = 0  # Use one-step targets before this environment step (RLx2).
    recent_fraction: float = 0.0  # The fraction of each batch that is drawn from the newest transitions (after MAST).
    recent_size: int = 20_000  # The number of newest transitions from which --recent-fraction draws.


def usual_drop(methods: set[str]) -> str | None:
    """The drop criterion that these methods have by default; None if they have different ones or none."""
    usual = {GROWTHS[method].drop for method in methods & GROWTHS.keys()}
    return usual.pop() if len(usual) == 1 else None


def unused(args: object) -> set[str]:
    """The flags of this file that make no difference to a run."""
    found, methods = set(), {args.method, args.critic_method}
    if not methods & GROWTHS.keys():
        found |= {"rewire_every", "rewire_fraction", "rewire_stop", "drop_criterion", "regrow"}
    if not methods - sparse_utils.UNPRUNED.keys():
        found |= {"init", "density_start", "final_prune_at"}
    if args.n_step == 1:
        found |= {"n_step_from"}
    if not args.recent_fraction:
        found |= {"recent_size"}
    return found


def check(args: object) -> None:
    """End the program with one sentence if a value of these flags cannot work."""
    rules = positive(args, "rewire_every", "n_step", "recent_size") | fraction(args, "recent_fraction")
    for name in ("rewire_fraction", "rewire_stop"):
        rules[name] = (0 <= getattr(args, name) <= 1, "in [0, 1]")
    steps, start, final = args.total_timesteps - args.learning_starts, args.density_start, args.final_prune_at
    within = args.lr_cycles is None or 1 <= args.lr_cycles <= steps
    rules["lr_cycles"] = (within, f"from 1 to the {steps} steps after --learning-starts")
    rules["density_start"] = (start is None or 0 < start < 1, "above 0 and below 1")
    first = max(args.prune_at, args.learning_starts)
    within = final is None or first < final < args.total_timesteps
    rules["final_prune_at"] = (within, f"after --prune-at and --learning-starts, so {first}, and before the end")
    require(args, rules | within_training(args, "n_step_from"))
    methods = {args.method, args.critic_method} - sparse_utils.UNPRUNED.keys()
    stay, rewired = sorted(methods - GROWTHS.keys()), sorted(methods & GROWTHS.keys())
    if start is None and final is not None:
        fail("--final-prune-at is the end of a --density-start; set both or neither")
    if start is not None and stay and rewired:
        fail("--density-start needs actor and critics that both rewire or whose masks both stay")
    if start is not None and stay and final is None:
        fail(f"--density-start needs --final-prune-at where masks stay, as with --method {stay[0]}")
    if start is not None and rewired and final is not None:
        fail("--final-prune-at is for masks that stay; where they are rewired the density falls at the rewirings")
    if start is not None and rewired and not args.save_buffer:
        fail("--density-start needs the buffer in checkpoints, or rewirings are missed; leave --no-save-buffer out")
    if rewired and args.drop_criterion is None:
        drops = " and ".join(f"{method} by {GROWTHS[method].drop}" for method in (args.method, args.critic_method))
        fail(f"actor and critics would drop by different criteria, {drops}; choose one --drop-criterion")
    if not args.regrow and (chains := [method for method in rewired if GROWTHS[method].by_topology]):
        fail(f"--method {chains[0]} stops in a layer where dropped connections grow again; leave --no-regrow out")
    if rewired and not rewiring_steps(args):
        until = args.rewire_stop * args.total_timesteps
        never = f"every {args.rewire_every} steps after step {first} and before {until:g}, which is never"
        mend = "lower --rewire-every or --learning-starts, raise --rewire-stop or train longer"
        fail(f"--method {rewired[0]} rewires {never}; {mend}")
    if rewired and args.rewire_fraction == 0 and start is None:
        fail(f"--method {rewired[0]} with --rewire-fraction 0 rewires nothing; raise it, or use static")
    if args.init == "sparse" and args.prune_at > args.learning_starts:
        fail("--init sparse does not rescale trained weights; set --prune-at to at most --learning-starts")
    learned = methods and args.criterion == "dynadiag"
    if learned and args.prune_at <= args.learning_starts:
        fail(f"--criterion dynadiag prunes by what it has learned; set --prune-at above {args.learning_starts}")
    if learned and args.distribution == "global":
        fail("--criterion dynadiag learns gates for the budgets of layers; choose --distribution er or uniform")
    for name in ("active_width", "density_start", "lr_cycles", "load"):
        if learned and getattr(args, name, None) is not None:
            mend = f"leave --{name.replace('_', '-')} out"
            fail(f"--criterion dynadiag learns gates of whole layers from scratch, at one budget and rate; {mend}")
    if args.recent_fraction and not round(args.recent_fraction * args.batch_size):
        fail(f"--recent-fraction {args.recent_fraction} of --batch-size {args.batch_size} is no transition; raise one")
    if args.recent_fraction and args.recent_size >= min(args.buffer_size, args.total_timesteps):
        fail(f"--recent-size {args.recent_size} is all that the buffer ever holds; choose a smaller one")


def check_longer(args: object) -> None:
    """End the program with one sentence if a run with these flags cannot be made longer when it is resumed."""
    if args.lr_cycles is not None:
        fail("--lr-cycles splits --total-timesteps into cycles; start a new run to train longer")
    if rewired := {args.method, args.critic_method} & GROWTHS.keys():
        fail(f"--method {min(rewired)} rewires by a schedule over --total-timesteps; start a new run to train longer")


# TINY


def hidden_size(network: type[nn.Module], env: object, asked: int, method: str, sparsity: float) -> int:
    """Neurons in each hidden layer: `asked`, or with `tiny` the largest number with which the dense network has no more
    weights than `network(env, asked)` keeps at this sparsity. Raises ValueError if one neuron has more already."""
    if method != "tiny":
        return asked
    if not isinstance(asked, int):
        what = f"--method tiny counts the neurons of layers that are alike, and --hidden-size is {asked}"
        raise ValueError(f"{what}; give one number")

    def weights(neurons: int) -> int:
        return sum(weight.numel() for weight in linear_weights(network(env, neurons)).values())

    with torch.random.fork_rng(devices=[]):  # networks built to be counted must not shift the run's random numbers
        budget = round((1 - sparsity) * weights(asked))
        neurons = bisect.bisect_right(range(1, asked + 1), budget, key=weights)
    if neurons < 1:
        least = f"one hidden neuron has {weights(1)} weights, more than the budget of {budget}"
        raise ValueError(f"--method tiny: a {network.__name__} of {least}; choose a lower --sparsity")
    return neurons


# REWIRING


def remove_chains(masks: Masks, stopped: list[str]) -> None:
    """Drop, in place, the connections of hidden neurons without active outputs or without active inputs, until no such
    neuron is connected (Zhang et al. 2024), but none in layers that have `stopped`."""
    pairs = [*zip(masks, list(masks)[1:])]
    for a, b in reversed(pairs):
        masks[a] &= masks[b].any(0).unsqueeze(1) | (a in stopped)
    for a, b in pairs:
        masks[b] &= masks[a].any(1) | (b in stopped)


class Rules(NamedTuple):
    """How a network is rewired."""

    growth: Rule
    drop: Rule
    regrow: bool  # whether what was just dropped may grow again (Evci et al. 2020)
    distribution: str  # by which a falling density is spread over the layers
    generator: torch.Generator  # on the CPU


def rewire_layers(
    layers: dict[str, Layer], counts: dict[str, int], stopped: list[str], fraction: float, rules: Rules
) -> None:
    """Change the masks of these layers in place: drop the connections that a layer has above its count, and a fraction
    of that count; then grow up to the count, among all connections that are not kept, or without `regrow` among those
    that were inactive before. Of equal ones the lower index is dropped, or grows, first. With cht and chts
    `remove_chains` drops more in between, and a layer that has settled joins `stopped`. A layer that is to be full
    drops nothing: it would regrow all of it, but meanwhile `remove_chains` could drop connections in other layers."""
    kept = {}
    for name, layer in layers.items():
        stays = name in stopped or counts[name] == layer.mask.numel()
        count = 0 if stays else int(fraction * counts[name])
        count = count if rules.regrow else min(count, int((~layer.mask).sum()))
        surplus = int(layer.mask.sum()) - counts[name] + count
        kept[name] = layer.mask & ~highest(-rules.drop.scores(layer), surplus, layer.mask)
    if rules.growth.by_topology:
        remove_chains(kept, stopped)
    for name, layer in layers.items():
        count, candidates = counts[name] - int(kept[name].sum()), ~kept[name] if rules.regrow else ~layer.mask
        scores = rules.growth.scores(layer._replace(mask=kept[name]))
        after = kept[name] | highest(scores, count, candidates)
        back, elsewhere = int((layer.mask & after & ~kept[name]).sum()), int((~layer.mask).sum())
        if rules.growth.by_topology and back > EARLY_STOP * count and elsewhere >= count:
            stopped.append(name)  # a layer with less room elsewhere has to grow dropped ones again [ours]
        layer.mask.copy_(after)


def rewire(net: Net, rules: Rules, loss: Tensor | None, stopped: list[str], fraction: float, done: float) -> None:
    """Rewire a network between its active neurons, its masks in place. If net.budget is less than its connections, a
    layer keeps as many as pruning by magnitude with the rules' distribution would leave there. `loss` is the network's
    own, for rules that read its dense gradient. Weights outside the new masks become zero, also in Adam's moments and
    the target; a connection that was inactive before starts at zero. Raises ValueError if a rule lacks its loss."""
    left = sparse_utils.static_prune(net, net.budget, "magnitude", rules.distribution, rules.generator)
    counts = {name: int(mask.sum()) for name, mask in left.items()}
    weights, masks = active_part(net.weights, net.width), active_part(net.masks, net.width)
    gradients = dict.fromkeys(weights)
    if rules.growth.uses_loss or rules.drop.uses_loss:
        if loss is None:
            raise ValueError("a rule of rewiring needs a loss of each network, and own_losses of the script lacks one")
        dense = torch.autograd.grad(loss, list(net.weights.values()))
        gradients = active_part(dict(zip(net.weights, dense, strict=True)), net.width)
    layers = {n: Layer(weights[n].detach(), gradients[n], mask, rules.generator, done) for n, mask in masks.items()}
    rewire_layers(layers, counts, stopped, fraction, rules)
    sparse_utils.zero_pruned(net)
    net.active = sum(counts.values())


def rewiring_flops(net: Net, rules: Rules) -> int:
    """Floating-point operations per sample of a rewiring, for the gradient of the network's own layers alone: 2 per
    active connection forward and 2 backward to the inputs; for the weights' gradient 2 per weight, active or not, if
    growth reads it (Evci et al. 2020), 2 per active one if dropping alone does, and nothing at all if neither does."""
    if rules.growth.uses_loss:
        return 4 * net.active + 2 * net.size
    return 6 * net.active if rules.drop.uses_loss else 0


def rewiring_steps(args: object) -> range:
    """The environment steps at which networks are rewired."""
    after = max(args.learning_starts, args.prune_at)
    until = math.ceil(round(args.rewire_stop * args.total_timesteps, 6))  # rounded, since 0.55 is a little more than it
    return range((after // args.rewire_every + 1) * args.rewire_every, until, args.rewire_every)


# DYNADIAG


class Diagonals:
    """DynaDiag in one network until pruning. A weight is V * a, where a = clamp(k softmax(alpha / T), 0, 1) is
    the gate of its diagonal, and k is the number of diagonals that the budget of its layer allows, at least 1,
    not rounded. All alphas start equal, and T falls from 5 towards 0.05. Layers that the budget leaves whole have no
    gates (in the source, only the last). All weights are trained, in torch, so K does not hold yet and no masks are
    logged.

    The network holds the products V * a, so it is run and saved like any other, and its target averages them. It holds
    V and dL/dV only while its optimizer steps. alpha has its own Adam, with the learning rate of the network."""

    def __init__(self, net: Net, distribution: str):
        counts = sparse_utils.DISTRIBUTIONS[distribution](net.weights, net.budget - net.reserve)
        gated = [(weight, count) for weight, count in zip(net.weights.values(), counts) if count < weight.numel()]
        self.weights = [weight for weight, _ in gated]
        self.places = [diagonals(weight) for weight in self.weights]
        self.paid = [max(1, count / min(weight.shape)) for weight, count in gated]
        self.values = [w.detach().clone().requires_grad_() for w in self.weights]
        self.alphas = [w.new_full([max(w.shape)], 1 / max(w.shape)).requires_grad_() for w in self.weights]
        rate = next(group["lr"] for group in net.optimizer.param_groups if self.weights[0] in {*group["params"]})
        self.optimizer = kernels.Adam(self.alphas, lr=rate)
        self.hooks = [net.optimizer.register_step_pre_hook(self.before_step)]
        self.hooks += [net.optimizer.register_step_post_hook(self.after_step)]
        self.multiply(stage=0)
        for name, weight in linear_weights(net.target).items() if net.target else ():
            weight.data.copy_(net.weights[name])

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("values", "alphas", "stage", "optimizer")}

    def load_state_dict(self, state: dict) -> None:
        for own, saved in zip(self.values + self.alphas, state["values"] + state["alphas"], strict=True):
            own.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.multiply(state["stage"])

    def multiply(self, stage: int) -> None:
        """Let the network hold the products at this stage, 0 to 100, of the half cosine by which T falls."""
        self.stage, self.products = stage, []
        temperature = 0.05 + 4.95 * (1 + math.cos(math.pi * stage / 100)) / 2
        for value, place, k, alpha in zip(self.values, self.places, self.paid, self.alphas):
            gates = (k * (alpha / temperature).softmax(0)).clamp(max=1)
            self.products.append(value * gates.expand(len(place), -1).gather(1, place))
        self.hold(self.products)

    def hold(self, tensors: list[Tensor]) -> None:
        """Make these tensors the weights of the network."""
        for weight, tensor in zip(self.weights, tensors):
            weight.data = tensor.detach()

    def before_step(self, *_: object) -> None:
        slopes = [weight.grad for weight in self.weights]
        gradients = torch.autograd.grad(self.products, self.values + self.alphas, slopes)
        for param, gradient in zip(self.weights + self.alphas, gradients):
            param.grad = gradient
        self.hold(self.values)

    def after_step(self, *_: object) -> None:
        self.optimizer.step()
        self.multiply(self.stage)

    def end(self) -> None:
        """Stop learning, and attach alpha to the weights, where `dynadiag_scores` reads it."""
        for hook in self.hooks:
            hook.remove()
        for weight, alpha in zip(self.weights, self.alphas):
            weight.alpha = alpha.detach()


# THE SCHEDULE OF A RUN


def decayed(start: int, end: int, done: float) -> int:
    """Connections when a fraction of the rewirings is done: from `start` to `end` by a sigmoid over [-6, 6], stretched
    so that both are met (CHTss, Zhang et al. 2025)."""
    return round(start + (end - start) * (1 + math.tanh(6 * done - 3) / math.tanh(3)) / 2)


def first_budget(net: Net, density: float | None) -> tuple[int, int]:
    """K and R of the first pruning: the network's own or, if it is pruned and --density-start is given, that share of
    its weights and 0. Raises ValueError unless that is above K and below what its active neurons can hold."""
    if density is None or net.budget == net.size:
        return net.budget, net.reserve
    start, most = round(density * net.size), sum(w.numel() for w in active_part(net.weights, net.width).values())
    if not net.budget < start < most:
        bounds = f"above the {net.budget} of the end and below the {most} that its active neurons can have"
        raise ValueError(f"--density-start {density} is {start} connections of a network; choose one {bounds}")
    return start, 0


@torch.no_grad()
def scale_to_active_inputs(network: nn.Module, masks: Masks) -> None:
    """Multiply, in place, the weights of each neuron by sqrt(n_in / its active inputs), the scale that an
    initialization by its own fan-in would have given them (Evci et al. 2022, Gradient Flow in Sparse Neural Networks
    and How Lottery Tickets Win)."""
    for name, weight in linear_weights(network).items():
        weight.mul_((weight.shape[1] / masks[name].sum(1, keepdim=True).clamp(min=1)).sqrt())


def lr_factor(step: int, start: int, end: int, cycles: int) -> float:
    """The learning rate's factor at this step (SCULPT). `cycles` equal cycles fill the steps from `start` to before
    `end`. In each, the factor rises linearly from 0.2 to 1 over the first fifth, then falls linearly to 0."""
    done = (step - start) * cycles % (end - start) / (end - start)  # the fraction of this cycle
    return 0.2 + 4 * done if done < 0.2 else (1 - done) / 0.8


class Schedule:
    """When networks are pruned and rewired, and what else the flags of this file do at a step. With tar, uniform,
    static and dense and the default flags, that is one pruning at --prune-at and nothing else."""

    # what a checkpoint does not hold, since the constructor makes it anew
    MADE_ANEW = ("args", "nets", "final", "first", "rewirings", "dynamic", "rules")

    def __init__(self, args: object, nets: dict[str, Net], generator: torch.Generator):
        self.args, self.nets = args, nets
        self.final = {name: (net.budget, net.reserve) for name, net in nets.items()}
        self.first = {name: first_budget(net, args.density_start) for name, net in nets.items()}
        if args.density_start is not None and self.first == self.final:
            raise ValueError("--density-start needs a network that is pruned; raise --sparsity")
        self.prunings = {args.prune_at, args.final_prune_at} - {None}
        self.rewirings = rewiring_steps(args)
        self.dynamic = {name: net for name, net in nets.items() if net.method in GROWTHS}
        if self.dynamic and args.drop_criterion is None:
            raise ValueError(f"--method and --critic-method rewire no network, so the row {min(self.dynamic)} cannot")
        self.rules = {
            name: Rules(GROWTHS[net.method], DROPS[args.drop_criterion], args.regrow, args.distribution, generator)
            for name, net in self.dynamic.items()
        }
        self.stopped = {name: [] for name in self.dynamic}  # layers that cht and chts rewire no more
        self.revived = {}  # of networks that are rewired: the masks before, from which the log measures the distance
        self.diagonals = {}  # what dynadiag learns until pruning
        for name, net in nets.items():
            net.budget, net.reserve = self.first[name]
            if name in self.rules and self.rules[name].growth.by_topology:
                sparse_utils.chain_shapes(net.weights, f"method {net.method}")
            if args.criterion == "synflow" and net.method not in sparse_utils.UNPRUNED:
                sparse_utils.chain_shapes(net.weights, "--criterion synflow")
            by_gradient = sparse_utils.CRITERIA[args.criterion].uses_loss or args.criterion == "dynadiag"
            by_gradient &= net.budget - net.reserve < net.size
            rewired = name in self.rules and rewiring_flops(net, self.rules[name]) > 0
            if (by_gradient or rewired) and not all(weight.requires_grad for weight in net.weights.values()):
                what = f"--criterion {args.criterion}" if by_gradient else f"method {net.method}"
                raise ValueError(f"{what} needs a gradient of every weight, and some of {name} are frozen")
            if args.criterion == "dynadiag" and net.budget < net.size:
                self.diagonals[name] = Diagonals(net, args.distribution)

    def state_dict(self) -> dict:
        held = {name: part for name, part in vars(self).items() if name not in self.MADE_ANEW}
        others = (torch.Generator, torch.optim.Optimizer)  # as modules and functions, parts of something else
        return {name: part for name, part in held.items() if not callable(part) and not isinstance(part, others)}

    def load_state_dict(self, state: dict) -> None:
        saved = state["diagonals"]
        vars(self).update(state | {"diagonals": self.diagonals})
        for name, learned in [*self.diagonals.items()]:
            if name in saved:
                learned.load_state_dict(saved[name])
            else:
                self.diagonals.pop(name).end()

    @contextlib.contextmanager
    def pruning(self, global_step: int) -> Iterator[str]:
        """Set K and R of every network for the pruning at this step, and give its criterion: magnitude at
        --final-prune-at and after DynaDiag's, else --criterion. DynaDiag ends, and its networks get their values
        without gates. At the end of the block keep the masks, from which the log of rewirings measures, and at
        --prune-at, with --init sparse, rescale the weights that are left. At the last step, end the program with one
        sentence."""
        if global_step == self.args.total_timesteps:
            fail("train prunes at the last step, which only evaluates (with --evaluate too); prune before it", code=1)
        for learned in self.diagonals.values():
            learned.hold(learned.values)
            learned.end()
        self.diagonals.clear()
        if global_step == self.args.final_prune_at:
            for name, net in self.nets.items():
                net.budget, net.reserve = self.final[name]
        # DynaDiag's gates, by which it prunes, end with its pruning
        ended = self.args.criterion == "dynadiag" and global_step != self.args.prune_at
        yield "magnitude" if ended or global_step == self.args.final_prune_at else self.args.criterion
        self.revived = {name: copy.deepcopy(net.masks) for name, net in self.dynamic.items()}
        if self.args.init == "sparse" and global_step == self.args.prune_at:
            for net in self.nets.values():
                for network in net.networks:
                    scale_to_active_inputs(network, net.masks)

    def step(self, global_step: int, own_losses: Callable, run: object) -> int:
        """Set the learning rates and DynaDiag's temperature of this step, and rewire if it is time.
        `own_losses(batch_size)` gives the loss of each network. Returns the floating-point operations of rewiring."""
        if self.args.lr_cycles is not None and global_step >= self.args.learning_starts:
            self.cycle_learning_rates(global_step, run)
        for learned in self.diagonals.values():
            start = self.args.learning_starts  # in stages, since each of them costs as much as an update
            stage = max(0, 100 * (global_step - start) // (self.args.prune_at - start))
            if stage != learned.stage:
                learned.multiply(stage)
        if not self.dynamic or global_step not in self.rewirings or global_step <= run.learn_from:
            return 0
        until = self.args.rewire_stop * self.args.total_timesteps
        fraction = self.args.rewire_fraction / 2 * (1 + math.cos(math.pi * global_step / until))
        done = (self.rewirings.index(global_step) + 1) / len(self.rewirings)
        before = {name: copy.deepcopy(net.masks) for name, net in self.dynamic.items()}
        flops = sum(rewiring_flops(net, self.rules[name]) for name, net in self.dynamic.items())
        with kernels.in_torch(self.dynamic):
            losses = own_losses(self.args.batch_size) if flops else {}  # 0 unless a rule reads a loss
            for name, net in self.dynamic.items():
                net.budget = decayed(self.first[name][0], self.final[name][0], done)
                rewire(net, self.rules[name], losses.get(name), self.stopped[name], fraction, done)
        last = global_step == self.rewirings[-1]
        run.log_rewiring(global_step, self.dynamic, before, self.revived, last)
        return self.args.batch_size * flops

    def cycle_learning_rates(self, global_step: int, run: object) -> None:
        """Set the learning rates of this step; where a cycle begins, Adam starts anew and the weights go on."""
        start, end, cycles = self.args.learning_starts, self.args.total_timesteps, self.args.lr_cycles
        begins = (global_step - start) * cycles % (end - start) < cycles
        names = {net.optimizer: "actor" if name == "actor" else "critic" for name, net in self.nets.items()}
        for optimizer in run.training:
            if begins:
                optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = lr_factor(global_step, start, end, cycles) * group.setdefault("initial_lr", group["lr"])
            if global_step % 100 == 0 and optimizer in names:
                run.log(global_step, {f"charts/{names[optimizer]}_lr": optimizer.param_groups[0]["lr"]})
