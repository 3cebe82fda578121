"""What pruning and revival did to a network, as counts, a table, warnings and pictures of masks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import sparse_utils
from sparse_utils import Masks

MASK_COLOURS = (
    ((24, 26, 32), "pruned"),
    ((176, 182, 192), "kept by static pruning"),
    ((255, 140, 0), "revived"),
    ((16, 32, 96), "outside the active width"),
)


def topology_report(static: Masks, masks: Masks, budget: int, reserve: int, width: int) -> dict:
    """Counts for `topology.json`, per layer. `blind_inputs` (inputs with no active connection out) and `dead_units`
    (outputs with none in) are pairs: after static pruning, after revival. They, `floor` and `deficit` are those of the
    `part`, the layer between active neurons. Raises ValueError if a rule did not place what it was given."""
    layers = {}
    static_part, part = sparse_utils.active_part(static, width), sparse_utils.active_part(masks, width)
    for name, mask in masks.items():
        kept, floor = int(static[name].sum()), sparse_utils.topology_floor(tuple(part[name].shape))
        layers[name] = {
            "shape": list(mask.shape),
            "part": list(part[name].shape),
            "size": mask.numel(),
            "static": kept,
            "floor": floor,
            "deficit": max(0, floor - kept),
            "revived": int((mask & ~static[name]).sum()),
            "active": int(mask.sum()),
            "blind_inputs": [int((~m.any(0)).sum()) for m in (static_part[name], part[name])],
            "dead_units": [int((~m.any(1)).sum()) for m in (static_part[name], part[name])],
        }
    active, revived = (sum(layer[key] for layer in layers.values()) for key in ("active", "revived"))
    if (active, revived) != (budget, reserve):
        raise ValueError(f"{active} connections, {revived} of them revived, in place of {budget} and {reserve}")
    return {"budget": budget, "reserve": reserve, "active_width": width, "layers": layers}


def topology_table(report: dict) -> str:
    """The report of every network as one markdown table, its columns aligned for the console."""
    columns = ["size", "static", "floor", "deficit", "revived", "active"]
    rows = [["layer", "shape", *columns, "density", "blind inputs", "dead units"]]
    for network, topology in report.items():
        for name, layer in topology["layers"].items():
            density = f"{layer['active'] / layer['size']:.4f}"
            pairs = ["{} -> {}".format(*layer[key]) for key in ("blind_inputs", "dead_units")]
            shapes = [layer["part"], layer["shape"]]
            shape = " of ".join(dict.fromkeys("{}x{}".format(*shape) for shape in shapes))
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


def mask_image(static: Tensor, mask: Tensor, part: Sequence[int]) -> np.ndarray:
    """A layer's mask after static pruning (left) and after revival (right) as uint8 of shape (height, width, 3), about
    256 pixels square each or larger. Outputs down, inputs across, in MASK_COLOURS; `part`: the active part's shape."""
    colours = torch.tensor([colour for colour, _ in MASK_COLOURS], dtype=torch.uint8)
    cell = [max(1, 256 // n) for n in mask.shape]
    before, after = static.cpu().long(), 2 * mask.cpu().long() - static.cpu().long()
    for kinds in (before, after):
        kinds[part[0] :], kinds[:, part[1] :] = 3, 3
    panels = [colours[kind].repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1) for kind in (before, after)]
    gap = torch.full((panels[0].shape[0], 8, 3), 255, dtype=torch.uint8)
    return torch.cat([panels[0], gap, panels[1]], 1).numpy()
