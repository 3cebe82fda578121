"""What pruning, revival and rewiring did to a network, as counts, a table, warnings and pictures of masks."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import sparse_utils
from sparse_utils import Net

MASK_COLOURS = (
    ((24, 26, 32), "pruned"),
    ((176, 182, 192), "kept by static pruning"),
    ((255, 140, 0), "revived"),
    ((16, 32, 96), "outside the active width"),
)


def topology_report(nets: dict[str, Net]) -> dict:
    """Counts for `topology.json`, per network and layer. `blind_inputs` (inputs with no active connection out) and
    `dead_units` (outputs with none in) are pairs: after static pruning, after revival. They, `floor` and `deficit` are
    counted in the `part` of the layer that is between active neurons. Raises ValueError if a network has not exactly K
    connections, R of them revived, or has masks of other layers before revival than after it."""
    report, advice = {}, "set the row's budget, reserve, static and masks to the pruning and revival that were done"
    for network, net in nets.items():
        if net.static.keys() != net.masks.keys():
            raise ValueError(f"{network} has masks of other layers before revival than after it; {advice}")
        layers, static_part = {}, sparse_utils.active_part(net.static, net.width)
        for name, part in sparse_utils.active_part(net.masks, net.width).items():
            kept, floor = int(net.static[name].sum()), sparse_utils.topology_floor(part.shape)
            layers[name] = {
                "shape": list(net.masks[name].shape),
                "part": list(part.shape),
                "size": net.masks[name].numel(),
                "static": kept,
                "floor": floor,
                "deficit": max(0, floor - kept),
                "revived": int((part & ~static_part[name]).sum()),
                "active": int(part.sum()),
                "blind_inputs": [int((~m.any(0)).sum()) for m in (static_part[name], part)],
                "dead_units": [int((~m.any(1)).sum()) for m in (static_part[name], part)],
            }
        found = tuple(sum(layer[key] for layer in layers.values()) for key in ("active", "revived"))
        if found != (row := (net.budget, net.reserve)):
            raise ValueError(f"{network} has (active, revived) {found} in place of {row}; {advice}")
        report[network] = {"budget": net.budget, "reserve": net.reserve, "active_width": net.width, "layers": layers}
    return report


def topology_table(report: dict) -> str:
    """The report of every network as one markdown table, its columns aligned for the console."""
    columns = ["size", "static", "floor", "deficit", "revived", "active"]
    rows = [["layer", "shape", *columns, "density", "blind inputs", "dead units"]]
    for network, topology in report.items():
        for name, layer in topology["layers"].items():
            density = f"{layer['active'] / layer['size']:.4f}"
            pairs = ["{} -> {}".format(*layer[key]) for key in ("blind_inputs", "dead_units")]
            shape = " of ".join(dict.fromkeys("{}x{}".format(*layer[key]) for key in ("part", "shape")))
            rows.append([f"{network}.{name}", shape, *(str(layer[c]) for c in columns), density, *pairs])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in rows)


def topology_warnings(network: str, net: Net, observation_size: int, action_size: int) -> list[str]:
    """Sentences on what static pruning cuts, and what revival makes of it: layers left without a connection,
    observation or action inputs left unread. A network's inputs are the observation and, for a critic, the action. If
    the first layer reads something else, as in an edited network, there are no sentences on inputs."""
    warnings = [
        f"{network}.{name} keeps no connection after static pruning and has {int(mask.sum())} after revival."
        for name, mask in net.masks.items()
        if not net.static[name].any()
    ]
    first = next(iter(net.masks))
    read = torch.stack([net.static[first].any(0), net.masks[first].any(0)])
    if read.shape[1] not in (observation_size, observation_size + action_size):
        return warnings
    for kind, part in zip(("observation", "action"), read.tensor_split([observation_size], 1)):
        before, after = ((~inputs).nonzero().flatten().tolist() for inputs in part)
        if before:
            cut = f"{len(before)} of {part.shape[1]} {kind} dimensions after static pruning: {before}"
            left = f"{len(after)}{': ' + str(after) if after else ''}"
            warnings.append(f"{network} is blind to {cut}; after revival to {left}.")
    return warnings


def mask_image(net: Net, layer: str, rewired: bool = False) -> np.ndarray:
    """A picture of the mask of a layer, outputs down and inputs across, as uint8 of shape (height, width, 3). The left
    panel is the mask after static pruning, the right one the mask after revival or, if `rewired`, after the last
    rewiring; without either there is one panel. Each panel is over 128 pixels high and wide. The legend grows with the
    picture, since TensorBoard scales pictures to one width: there it is as large as the other text."""
    static, mask = net.static[layer].cpu().long(), net.masks[layer].cpu()
    kinds = {"after static pruning": static}  # indices of MASK_COLOURS
    if net.reserve or rewired:
        kinds["after the last rewiring" if rewired else "after revival"] = mask * (2 - static)
    part = sparse_utils.active_part(net.masks, net.width)[layer].shape
    for kind in kinds.values():
        kind[part[0] :], kind[:, part[1] :] = 3, 3
    entries = [("white", title) for title in kinds]
    entries += [MASK_COLOURS[i] for i in torch.cat([*kinds.values()]).unique()]
    height, width = (n * max(1, 256 // n) for n in mask.shape)
    right = width + 8  # from one panel to the next
    total = len(kinds) * right - 8
    size = total // (14 * len(kinds))
    row = size * 3 // 2
    image = Image.new("RGB", (total, height + row * math.ceil(len(entries) / len(kinds))), "white")
    for i, kind in enumerate(kinds.values()):
        panel = np.array([colour for colour, _ in MASK_COLOURS], np.uint8)[kind]
        image.paste(Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST), (i * right, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for i, (colour, text) in enumerate(entries):
        x, y = i % len(kinds) * right, height + i // len(kinds) * row + row // 2
        draw.rectangle((x, y - size // 3, x + size * 2 // 3, y + size // 3), colour)
        draw.text((x + size, y), text.replace("revived", "grown") if rewired else text, "black", font, "lm")
    return np.asarray(image)


def log_pruning(writer: SummaryWriter, global_step: int, nets: dict[str, Net], *sizes: int) -> dict:
    """Log what pruning and revival did to each network: a table and warnings on the console and in TensorBoard, and in
    TensorBoard alone a picture and the density of each layer. `sizes` are those of an observation and of an action.
    Returns the report. A network without an nn.Linear is in none of them."""
    nets = {name: net for name, net in nets.items() if net.size}
    report = topology_report(nets)
    table = topology_table(report)
    tqdm.write(f"Topology at step {global_step}:\n{table}")
    writer.add_text("topology/revival", table, global_step)
    if found := [warning for name, net in nets.items() for warning in topology_warnings(name, net, *sizes)]:
        tqdm.write("\n".join(f"warning: {sentence}" for sentence in found))
        writer.add_text("topology/warnings", "\n\n".join(found), global_step)
    for name, net in nets.items():
        for layer in net.masks:
            writer.add_image(f"topology/{name}.{layer}", mask_image(net, layer), global_step, dataformats="HWC")
        log_density(writer, global_step, name, net)
    return report


def log_density(writer: SummaryWriter, global_step: int, name: str, net: Net) -> None:
    for layer, mask in net.masks.items():
        writer.add_scalar(f"sparsity/density_{name}.{layer}", float(mask.sum()) / mask.numel(), global_step)
    writer.add_scalar(f"sparsity/{name}", 1 - net.active / net.size, global_step)


def log_rewiring(
    writer: SummaryWriter, global_step: int, report: dict, nets: dict[str, Net], before: dict, revived: dict, last: bool
) -> None:
    """Log a rewiring of `nets`, whose masks were `before`. Its counts are added to `report`, of the last pruning, in
    place. TensorBoard gets the fraction of the active connections that are new, and the fraction of the connections
    after revival, `revived`, that are no longer active. The `last` rewiring draws the masks too."""
    for name, net in nets.items():
        for layer in net.masks if last else ():
            writer.add_image(f"topology/{name}.{layer}", mask_image(net, layer, True), global_step, dataformats="HWC")
        layers = report[name]["layers"]
        for layer, part in sparse_utils.active_part(net.masks, net.width).items():
            layers[layer]["last_rewiring"] = {
                "step": global_step,
                "replaced": int((net.masks[layer] & ~before[name][layer]).sum()),
                "active": int(part.sum()),
                "blind_inputs": int((~part.any(0)).sum()),
                "dead_units": int((~part.any(1)).sum()),
            }
        replaced = sum(layer["last_rewiring"]["replaced"] for layer in layers.values())
        lost = sum(int((revived[name][layer].to(mask.device) & ~mask).sum()) for layer, mask in net.masks.items())
        if net.active < sum(int(mask.sum()) for mask in before[name].values()):
            log_density(writer, global_step, name, net)
        writer.add_scalar(f"sparsity/{name}_rewired", replaced / net.active, global_step)
        writer.add_scalar(f"sparsity/{name}_distance", lost / report[name]["budget"], global_step)
