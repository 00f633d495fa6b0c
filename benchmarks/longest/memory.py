"""How many bytes a training step holds, by counting: a sum of components at each moment that can be
the highest.

`benchmarks.longest.measuring` compares the highest with what torch's allocator was asked for.
S tokens, D numbers of a hidden state, F of the feed-forward part, V of the vocabulary.
"""

from __future__ import annotations

from benchmarks.costs.cross_entropy_engine import Head, extra_bytes
from benchmarks.longest.setting import MAPS, OURS, PATCH, PATCHES, Setting
from benchmarks.training_step.kept import (
    FP32,
    LayerParts,
    adapter_parameters,
    layer_parts,
    parameters,
)

LOGIT_BYTES = 64 * 2**20  # of a chunk of logits in C++
Moment = dict[str, float]  # bytes by component

# bytes of a token beside its pixels: ids, mask and labels of 8 bytes each, positions of three axes
# twice, types, and what the body makes of them
TOKEN = 8 * 3 + 2 * 3 * 8 + 8


def moments(setting: Setting) -> dict[str, Moment]:
    """Bytes by component, at each moment that can be the highest.

    Args:
        setting: the step.

    Returns:
        By name: the loss's backward pass, that of the last layer and of the first, and the end.
    """
    held, trained = states(setting), trainable(setting)
    base = {**held, "inputs": inputs(setting), **ours(setting)}
    kept = layers_inputs(setting) if setting.checkpointed else all_layers(setting)
    head_gradient = _head_gradient(setting)
    ends = 3 * _state(setting)  # the last state, normalised, times the norm's weight
    layers = setting.shape.layers
    behind = trained["layer"] * setting.numbers.gradient * (layers - 1)
    found = {"loss": _sum(base, kept, loss(setting), {"final norm": ends}, vision(setting))}
    if setting.checkpointed:
        one = {"layer inputs": _state(setting), **_mask(setting)}
        here = _sum(recomputed(setting), backward(setting))
    else:
        one, here = _scaled(kept, 1 / layers), backward(setting)
    here = _sum(base, here, vision(setting), {"gradients": head_gradient})
    found["last layer"] = _sum(here, kept, _map_gradients(setting, layers))
    found["first layer"] = _sum(here, one, _map_gradients(setting, 1), {"gradients": behind})
    rest = {"gradients": trained["all"] * setting.numbers.gradient}
    found["end"] = _sum(base, rest, {"temporaries": 3 * _state(setting)}, vision(setting))
    return found


def peak(setting: Setting) -> tuple[str, Moment]:
    """The highest of `moments`: its name and its components.

    Args:
        setting: the step.
    """
    return max(moments(setting).items(), key=lambda item: sum(item[1].values()))


def peak_bytes(setting: Setting) -> float:
    """Bytes of the highest of `moments`.

    Args:
        setting: the step.
    """
    return sum(peak(setting)[1].values())


def trainable(setting: Setting) -> dict[str, int]:
    """Parameters that have a gradient, of a layer and in all.

    Args:
        setting: the step.
    """
    counted = parameters(setting.shape)
    if setting.lora is not None:
        adapters = adapter_parameters(setting.shape, setting.lora)
        return {"layer": adapters // setting.shape.layers, "all": adapters}
    tower = counted.vision if setting.vision else 0
    return {"layer": counted.layer, "all": counted.decoder + tower}


def states(setting: Setting) -> Moment:
    """Weights, with the copies that autocast makes, and what the optimizer keeps.

    Args:
        setting: the step.
    """
    counted, numbers = parameters(setting.shape), setting.numbers
    weights = (counted.decoder + counted.vision) * numbers.weight
    weights += counted.layer * counted.layers * numbers.copies
    trained = trainable(setting)["all"]
    if setting.lora is not None:
        return {"weights": weights + trained * FP32, "optimizer": trained * 2 * FP32}
    return {"weights": weights, "optimizer": trained * numbers.optimizer}


def inputs(setting: Setting) -> float:
    """Pixels, which come in fp32 and are cast, and a few numbers for each token.

    Args:
        setting: the step.
    """
    cast = 0 if setting.numbers.weight == FP32 else setting.numbers.weight
    pixels = setting.visual * PATCHES * PATCH * (FP32 + cast)
    rotary = 2 * setting.length * setting.head_dim * setting.numbers.stream  # cosines and sines
    return pixels + setting.length * TOKEN + rotary


def ours(setting: Setting) -> Moment:
    """What our batch and our ops hold beside the output head: booleans of regions, targets over
    columns, and bits of key sets.

    Args:
        setting: the step.
    """
    if setting.method not in (OURS, MAPS):
        return {}
    rows, tokens, visual = setting.rows, setting.tokens, setting.visual
    batch = rows.phrases * tokens + rows.map * visual * 4 + 8 * visual
    if setting.method == MAPS:
        return {"our tensors": batch}
    bits = (rows.phrases + rows.map) * tokens / 8
    columns = rows.map * visual * (FP32 + 1)  # the target in fp32, which columns are a row's own
    return {"our tensors": batch + bits + columns}


def all_layers(setting: Setting) -> Moment:
    """What autograd keeps of all layers.

    Args:
        setting: the step.
    """
    return _scaled(_layer(setting), setting.shape.layers)


def layers_inputs(setting: Setting) -> Moment:
    """What checkpointing keeps: the layers' inputs, on the device or on the host; the mask; and the
    probabilities that are handed out.

    Args:
        setting: the step.
    """
    kept = 1 if setting.offload else setting.shape.layers
    return {"layer inputs": kept * _state(setting), **_mask(setting)}


def recomputed(setting: Setting) -> Moment:
    """What the layer keeps that is recomputed, without its input.

    Args:
        setting: the step.
    """
    layer = _layer(setting)
    return {**layer, "norms": layer["norms"] - _state(setting)}


def backward(setting: Setting) -> Moment:
    """What the backward pass of a layer adds to what the layer keeps, less what it has freed: at
    its feed-forward part or at its attention, whichever is higher.

    Args:
        setting: the step.
    """
    linear, state, length = setting.numbers.linear, _state(setting), setting.length
    mlp = (2 * setting.shape.ffn * linear) * length + state
    if setting.tiled:  # gradients of the tiles' input, of their output, and one tile
        mlp = 2 * state + 6 * setting.shape.ffn * linear * _tile(setting)
    inner = setting.shape.heads * setting.head_dim
    gradients = (2 * inner + 2 * setting.shape.kv * setting.head_dim) * linear
    attention = (gradients + FP32 * inner) * length + 2 * state  # sums of dq are in fp32
    if setting.keeps_maps:  # gradients of probabilities and of scores; added to those handed out
        own = linear if setting.method == MAPS else 0
        attention += (2 * FP32 - own) * _scores(setting)
    freed = _layer(setting)["feed-forward"] + 2 * state
    return {"temporaries": max(mlp, attention - freed)}


def loss(setting: Setting) -> Moment:
    """The output head and the loss in their backward pass; maps' gradients of the whole [S, S].

    Args:
        setting: the step.
    """
    vocabulary = setting.shape.vocabulary
    if setting.method == OURS:
        return {"output head": fused_head(setting)}
    # log-softmax, the gradient of what is picked from it, and that of the logits
    logits = {"logits": 3 * FP32 * setting.tokens * vocabulary}
    if setting.method != MAPS:
        return logits
    maps = _map_gradients(setting, setting.shape.layers)
    both = _sum(logits, maps)
    # the maps' gradients are made first: the rows' in one more [S, S]
    first = {"logits": FP32 * setting.tokens * vocabulary}
    first = _sum(first, maps, _map_gradients(setting, 1))
    return max(both, first, key=lambda found: sum(found.values()))


def fused_head(setting: Setting) -> float:
    """Bytes of our linear cross entropy beyond its arguments, with the weight's gradient.

    Args:
        setting: the step.
    """
    rows = setting.rows.counted
    size, trained = setting.numbers.linear, setting.lora is None
    shape = setting.shape
    if setting.triton:
        return extra_bytes(Head(rows, shape.hidden, shape.vocabulary, size, trained))
    logits = min(rows * shape.vocabulary * size, LOGIT_BYTES)
    return 2 * logits + (shape.vocabulary * shape.hidden * size if trained else 0)


def vision(setting: Setting) -> Moment:
    """What a vision tower that trains keeps; a frozen one keeps nothing.

    Args:
        setting: the step.
    """
    if not setting.vision:
        return {}
    shape, numbers = setting.shape, setting.numbers
    width, patches = shape.vision_width, setting.visual * PATCHES
    if setting.checkpointed:
        return {"vision tower": shape.vision_depth * patches * width * numbers.stream}
    norms = 2 * width * (FP32 + numbers.stream) + 2 * FP32
    linear = (2 * width + 6 * width + 4 * (8 * width // 3)) * numbers.linear
    return {"vision tower": shape.vision_depth * patches * (norms + linear)}


def _layer(setting: Setting) -> Moment:
    """What autograd keeps of one layer."""
    parts = layer_parts(setting.shape, setting.numbers, plain=not setting.side)
    if setting.lora is not None:
        parts = _beside_adapters(setting, parts)
    length = setting.length
    found = {
        "norms": parts.norms * length,
        "inputs of linear layers": parts.inputs * length,
        "attention": parts.attention * length,
        "K/V": parts.keys_values * length,
        "feed-forward": 0 if setting.tiled else parts.feed_forward * length,
    }
    if setting.keeps_maps:  # in fp32, and once more in the dtype of the values
        copy = setting.numbers.linear if setting.numbers.linear < FP32 else 0
        found["attention maps"] = _scores(setting) * (FP32 + copy)
    return found


def _beside_adapters(setting: Setting, parts: LayerParts) -> LayerParts:
    """A layer whose weights are frozen, with adapters in fp32: PEFT casts the input of each."""
    shape, numbers = setting.shape, setting.numbers
    inner, own = shape.heads * setting.head_dim, 7 * setting.lora * FP32
    norms = 2 * shape.hidden * FP32 + 2 * FP32
    if numbers.weight == FP32:
        return parts._replace(norms=norms, inputs=parts.inputs + own)
    casts = 3 * FP32 + (numbers.linear if setting.tiled else 2 * FP32)
    return LayerParts(
        norms=norms,
        inputs=casts * shape.hidden + own,
        attention=parts.attention + inner * FP32,
        keys_values=parts.keys_values,
        feed_forward=3 * shape.ffn * numbers.linear + shape.ffn * FP32,
    )


def _state(setting: Setting) -> float:
    """Bytes of the hidden states."""
    return setting.length * setting.shape.hidden * setting.numbers.stream


def _scores(setting: Setting) -> float:
    """How many scores a layer has."""
    return setting.shape.heads * float(setting.tokens) ** 2


def _mask(setting: Setting) -> Moment:
    """Eager attention's mask, which checkpointing keeps for the layers."""
    size = setting.numbers.weight * float(setting.tokens) ** 2
    return {"mask": size} if setting.keeps_maps else {}


def _map_gradients(setting: Setting, layers: int) -> Moment:
    """Gradients of whole maps that are handed out: all are made before any is used."""
    if setting.method != MAPS:
        return {}
    return {"map gradients": layers * _scores(setting) * setting.numbers.linear}


def _head_gradient(setting: Setting) -> float:
    shape = setting.shape
    if setting.lora is not None:
        return 0
    return shape.vocabulary * shape.hidden * setting.numbers.gradient


def _tile(setting: Setting) -> int:
    """Tokens of a tile: as DeepSpeed's ALST, as many as a state has numbers."""
    return min(setting.shape.hidden, setting.length)


def _sum(*parts: Moment) -> Moment:
    total: Moment = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return total


def _scaled(part: Moment, factor: float) -> Moment:
    return {name: size * factor for name, size in part.items()}
