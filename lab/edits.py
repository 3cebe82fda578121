"""Finds edits of a script that a resumed run would lose, that the record would miss, or that the kernels cannot do."""

import ast
import functools
import inspect
import re
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import sparse_utils
from lab.environment import GENERATORS, content_of
from lab.flags import PROJECT
from lab.replay import ReplayBuffer
from sparse_utils import Net

OPTIMIZERS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
OUR_OWN = ("linear_weights", "plan")  # functions of sparse_utils.py that may go through layers
WHOLE = (nn.Module, torch.optim.Optimizer, gym.Env)  # saved as one
COLLECTIONS = (list, tuple, set, frozenset, deque, dict)
ONE_BY_ONE = {"parameters", "named_parameters", "modules", "named_modules", "children", "named_children", "'params'"}
# functions that iterate over their arguments, from the one with this index on
BY_PLACE = {"list": 0, "tuple": 0, "iter": 0, "enumerate": 0, "reversed": 0, "zip": 0, "map": 1, "filter": 1}


def variables_of(frame: FrameType) -> dict:
    """The variables of a script and of its train, which runs in this frame, by name."""
    return {n: value for n, value in {**frame.f_globals, **frame.f_locals}.items() if not n.startswith("__")}


def walk(
    todo: list[tuple[str, object]], seen: set[int], files: tuple[Path, ...], closed: Callable = lambda value: False
) -> Iterator[tuple[str, object]]:
    """The values in `todo` and all that is inside them, by name: each once, and none that is in `seen`. Collections,
    modules, optimizers, partials, and the objects of `content_of` are looked into, unless they are `closed`."""
    for name, value in todo:  # which grows on the way
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield name, value
        if closed(value):
            continue
        parts, named = (), [*content_of(value, files).items()]
        if isinstance(value, nn.Module):
            named = [*vars(value).items(), *value.named_children(), *value.named_parameters(recurse=False)]
        elif isinstance(value, torch.optim.Optimizer):
            parts = value.param_groups
        elif isinstance(value, functools.partial):
            parts = value.args, value.keywords
        elif isinstance(value, COLLECTIONS):
            parts = value.values() if isinstance(value, dict) else value
        todo += [(f"{name}.{key}", part) for key, part in named if key != "_modules"]
        todo += [(name, part) for part in parts]


def check_parts(
    state: dict, rb: ReplayBuffer, variables: dict, files: tuple[Path, ...], restored: Collection
) -> dict[str, str]:
    """The class and the options of each optimizer and scheduler in `state`, by name. Raises ValueError if a part of
    `state` could not be put back, if no optimizer in it trains a parameter of a row's network that needs a gradient, if
    a row was not planned, or if a checkpoint, which holds `state`, the buffer `rb` and the generators `restored`, would
    lack a parameter that an optimizer trains, or an object with a state that a variable of the script or of train, or a
    row, is or holds. Objects inside an environment are left out."""

    def tensors(value: object) -> set[int]:
        """The identities of the tensors in a module, a tensor, or lists and dictionaries of these."""
        if isinstance(value, nn.Module):
            value = [*value.parameters(), *value.buffers()]
        if isinstance(value, (list, tuple, dict)):
            return set().union(*map(tensors, value.values() if isinstance(value, dict) else value))
        return {id(value)} if isinstance(value, Tensor) else set()

    def lost(value: object) -> bool:
        if isinstance(value, nn.Module):  # it may be a layer of one that is a part
            return not tensors(value) <= held
        trained = isinstance(value, Tensor) and value.requires_grad and value.is_leaf and id(value) not in held
        return trained or isinstance(value, GENERATORS) or hasattr(type(value), "load_state_dict")

    held, params = tensors(state), []
    for name, part in state.items():
        if isinstance(part, torch.optim.Optimizer):
            params += [("", param) for group in part.param_groups for param in group["params"]]
        elif not hasattr(part, "load_state_dict") and not isinstance(part, (*GENERATORS, Tensor, np.ndarray, dict)):
            raise ValueError(f"state[{name!r}], a {type(part).__name__}, cannot be put back; let a dictionary hold it")
        elif isinstance(part, dict) and any(isinstance(x, OPTIMIZERS) for _, x in walk([("", part)], set(), ())):
            raise ValueError(f"state[{name!r}] holds an optimizer or scheduler; give it a name of its own in `state`")
    kept = [*walk([("", part) for part in (state, *restored)], set(), files, lambda part: isinstance(part, WHOLE))]
    # modules in `state` are looked into below, since they hold more than tensors
    seen = {id(rb), *(id(part) for _, part in kept if not isinstance(part, nn.Module))}
    rows = [(f"nets.{row}.{name}", part) for row, net in state["nets"].items() for name, part in vars(net).items()]
    todo = [*variables.items(), *rows, *params]
    found = walk(todo, seen, files, lambda value: isinstance(value, gym.Env) or lost(value))
    if names := [name for name, value in found if lost(value)]:
        what = ", ".join(filter(None, names)) or "a parameter that an optimizer trains"
        raise ValueError(f"`state` lacks {what}, so a resumed run could lose it; add it before Run(...)")
    if idle := [*untrained(state, files)]:
        raise ValueError(f"no optimizer in `state` trains {idle[0]}; give it to one or freeze it")
    if late := [row for row, net in state["nets"].items() if net.weights and not net.size]:
        raise ValueError(f"{late[0]} came into `nets` after plan(...); put it where `nets` is made")
    return {name: described(part) for name, part in state.items() if isinstance(part, OPTIMIZERS)}


def untrained(state: dict, files: tuple[Path, ...]) -> dict[str, nn.Parameter]:
    """The parameters of rows' networks that need a gradient and that no optimizer in `state` trains."""
    kept = [part for _, part in walk([("", state)], set(), files, lambda part: isinstance(part, WHOLE))]
    optimizers = [part for part in kept if isinstance(part, torch.optim.Optimizer)]
    trained = {id(param) for part in optimizers for group in part.param_groups for param in group["params"]}
    trained |= {id(part) for part in kept if isinstance(part, nn.Parameter)}  # of an optimizer of the reader
    named = ((f"{n} of {row}", p) for row, net in state["nets"].items() for n, p in net.network.named_parameters())
    return {name: param for name, param in named if param.requires_grad and id(param) not in trained}


def described(part: torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler) -> str:
    """The class of a part and its options that act on the result, group by group for an optimizer. Where a scheduler
    changes the learning rate, only `initial_lr` is given; how far a scheduler has come is left out."""
    options, groups = [], getattr(part, "param_groups", None) or [part.state_dict()]
    for group in groups:
        idle = {"params", "foreach", "fused", "capturable", "differentiable"}
        idle |= {"last_epoch", "_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial"}
        idle |= {"lr"} if "initial_lr" in group else set()
        options.append(", ".join(f"{name}={value}" for name, value in group.items() if name not in idle))
    return f"{type(part).__name__}({'; '.join(options)})"


def is_another(part: object, network: nn.Module) -> bool:
    """Whether something is a module of the class and the shapes of a network, with parameters of its own."""
    if type(part) is not type(network):
        return False
    own, its = [*part.parameters()], [*network.parameters()]
    return [p.shape for p in own] == [p.shape for p in its] and {*map(id, own)} != {*map(id, its)}


def held_apart(
    nets: dict[str, Net], optimizers: list[torch.optim.Optimizer], variables: dict, files: tuple[Path, ...] = ()
) -> dict[str, str]:
    """By name, the networks whose layers the kernels cannot replace, each with the reason, of which there are three. An
    optimizer other than that of its row trains its layers. One of the `variables` of train, a row, or an attribute in
    the network that is no submodule, is or holds a layer or a parameter, and would go on with the old one. Or it is or
    holds one of the same class and shapes that no row has as network or target and that, as an average, could not
    follow."""
    groups, found = {id(group) for optimizer in optimizers for group in optimizer.param_groups}, {}
    rows = [network for net in nets.values() for network in net.networks]
    for name, net in nets.items():
        modules = {id(module): module for network in net.networks for module in network.modules()}
        layers = [module for module in modules.values() if isinstance(module, nn.Linear)]  # what the kernels replace
        inner = {id(part) for layer in layers for part in (layer, *layer.parameters())}
        whole = modules.keys() - inner  # these stay, and look their layers up anew
        others = [group for other in optimizers if other is not net.optimizer for group in other.param_groups]
        if any(id(param) in inner for group in others for param in group["params"]):
            found[name] = "an optimizer other than the one in its row trains its parameters"
        own = [("", part) for key in whole for n, part in vars(modules[key]).items() if n != "_modules"]
        of_rows = [("nets", part) for net in nets.values() for part in vars(net).values()]
        for where, part in walk([*own, *variables.items(), *of_rows], groups | whole, files):
            variable = where.partition(".")[0]
            what = f"`{variable}` in train" if variable else "an attribute in it that is no submodule"
            if id(part) in inner:
                found[name] = f"{what} holds layers or parameters of it"
                break
            if is_another(part, net.network) and part not in rows:
                found[name] = f"{what} is or holds a network of its class and shapes that no row has"
                break
    return found


def are_parameters(node: ast.expr) -> bool:
    """Whether an expression is `<network>.parameters()`, or a list or tuple of it."""
    return bool(re.fullmatch(r"(list\(|tuple\(|\[\*)?[\w.]+\.parameters\(\)[)\]]?", ast.unparse(node)))


def one_by_one(source: Path, before: range, networks: set[str], classes: set[str]) -> str | None:
    """The first place where a source loops over parameters or layers, which the kernels would replace, takes them by
    name, or goes through or indexes a network: one of the names `networks` or, in one of the `classes`, `self`. None if
    there is none. A variable or an argument of the source's functions that is given parameters counts as a network.
    Allowed inside `in_torch`, a constructor or `forward`, and in the lines of train `before` Run(...), but for
    functions inside train, which run later."""
    tree = ast.parse(source.read_bytes())
    parts = [*ast.walk(tree)]
    kept = [part.targets for part in parts if isinstance(part, ast.Assign) and are_parameters(part.value)]
    networks = networks | {target.id for targets in kept for target in targets if isinstance(target, ast.Name)}
    calls = [part for part in parts if isinstance(part, ast.Call) and any(map(are_parameters, part.args))]
    handed = {getattr(call.func, "id", None) for call in calls}
    nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    nodes = [(node, networks | ({"self"} if node.name in classes else set()), before) for node in nodes]
    passed = {"__init__", "forward", *(OUR_OWN if source.name == "sparse_utils.py" else ())}
    for node, known, allowed in nodes:  # which grows on the way
        if isinstance(node, ast.FunctionDef) and node.name in handed:
            known = known | {arg.arg for arg in node.args.args}
        inside = isinstance(node, ast.With) and any("in_torch" in ast.unparse(item) for item in node.items)
        if inside or getattr(node, "name", None) in passed:
            continue
        later = isinstance(node, (ast.FunctionDef, ast.Lambda)) and node.lineno in before[1:]  # not train itself
        nodes += [(child, known, () if later else allowed) for child in ast.iter_child_nodes(node)]
        is_map = isinstance(node, ast.Call) and getattr(node.func, "id", None) == "map"
        looped = node if is_map else getattr(node, "iter", None)
        for part in ast.walk(looped) if looped else [node]:
            name = getattr(part.func, "attr", "") if isinstance(part, ast.Call) else ""
            if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant):
                name = repr(part.slice.value)
            walks = name in ONE_BY_ONE and (looped or name not in ("parameters", "'params'"))
            places = [part.value] if isinstance(part, (ast.Subscript, ast.Starred)) else []
            called = getattr(part.func, "id", None) if isinstance(part, ast.Call) else None
            places += part.args[BY_PLACE[called] :] if called in BY_PLACE else []
            places += [looped] if part is looped else []
            taken = [place.id for place in places if getattr(place, "id", None) in known]
            if (walks or taken) and part.lineno not in allowed:
                where = f"in line {part.lineno}, outside of `with kernels.in_torch(nets):`"
                return f"{source.name} goes through {', '.join(taken) or name} {where}"
    return None


def kept_in_torch(
    nets: dict[str, Net], optimizers: list[torch.optim.Optimizer], script: Path, frame: FrameType, files: tuple
) -> dict[str, str]:
    """By name, the networks that the kernels cannot compute because of what train, which runs in this frame, or the
    reader's `files` do with them: as `held_apart` finds them, or all of them where `one_by_one` finds a place."""
    before = {script.resolve(): range(frame.f_code.co_firstlineno, frame.f_lineno)}
    networks = {id(network): network for net in nets.values() for network in net.networks}
    classes = {kind.__name__ for network in networks.values() for kind in type(network).__mro__}
    named = {name for name, value in variables_of(frame).items() if id(value) in networks}
    walks = [one_by_one(path, before.get(path, ()), named, classes) for path in files]
    walks += [one_by_one(PROJECT / "sparse_utils.py", (), set(), set())]
    if walked := next(filter(None, walks), None):
        return dict.fromkeys(nets, walked)
    return held_apart(nets, optimizers, used_later(script, frame), files)


def used_later(script: Path, frame: FrameType) -> dict:
    """The variables of train, which runs in this frame, that later lines read and no later `for` sets, and all that
    functions inside train read."""
    later = [n for n in ast.walk(ast.parse(script.read_bytes())) if getattr(n, "lineno", 0) > frame.f_lineno]
    loops = [part for node in later if isinstance(node, ast.For) for part in ast.walk(node.target)]
    changed = [node.target for node in later if isinstance(node, ast.AugAssign)]  # as in `weight *= 0.9`
    names = [node for node in later if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    read = {getattr(node, "id", None) for node in names + changed} - {getattr(node, "id", None) for node in loops}
    read |= {*frame.f_code.co_cellvars}
    return {name: value for name, value in frame.f_locals.items() if name in read}


def replaced(script: Path, names: dict, files: Collection[Path]) -> list[str]:
    """The classes and functions among the `names` of a script in whose place a notebook or another script has put its
    own, which is in none of the `files` that are recorded."""
    own = {getattr(node, "name", None) for node in ast.parse(script.read_bytes()).body}
    kinds = {n: v.__module__ for n, v in names.items() if inspect.isclass(v) or inspect.isfunction(v)}
    found = {n: m for n, m in kinds.items() if m != names["__name__"] and (n in own or m == "__main__")}
    of = {n: getattr(sys.modules.get(m), "__file__", None) or "" for n, m in found.items()}
    return sorted(n for n, file in of.items() if Path(file).resolve() not in files)


def without_masks(state: dict) -> list[str]:
    """The modules in `state` with some weight of two or more dimensions that no row of state["nets"] prunes."""
    rows = [network for net in state["nets"].values() for network in net.networks]
    pruned = {id(weight) for network in rows for weight in sparse_utils.linear_weights(network).values()}
    params = {name: part.parameters() for name, part in state.items() if isinstance(part, nn.Module)}
    return [name for name, own in params.items() if any(p.dim() > 1 and id(p) not in pruned for p in own)]
