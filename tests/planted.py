"""Llama models whose detector, writer, sink and step down are put in by hand, and ones without.

The detector is a head that attends evenly and subtracts what it reads: a token that sees itself
alone loses its code, so that the constant direction grows when the state is normalised. Two reads
of that direction multiply in the writer's gated neuron. Repeated tokens cancel each other, too.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import VOCABULARY, tokenizer

from firsttok.models.libraries import quiet_libraries

HEAD = 16
CODE = 10.0
"""Norm of a token's code, beside 1 along the constant direction."""
PEAK = 300.0
NOISE = 0.02


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is put where."""

    layers: int
    heads: int
    detector: int
    """Layer whose attention tells a token that sees itself alone."""
    writer: int
    neuron: int
    dimension: int
    sink: tuple[int, int]
    """Layer and head."""
    down: int
    """Layer that takes the anomaly down."""


def draw_plan(seed: int) -> Plan:
    """Draw where everything is: detector <= writer < sink <= step down."""
    draw = random.Random(seed)
    layers, heads = draw.randint(4, 7), draw.randint(3, 5)
    detector = draw.randint(0, layers - 3)
    writer = draw.randint(detector, layers - 3)
    sink = draw.randint(writer + 1, layers - 2)
    return Plan(
        layers=layers,
        heads=heads,
        detector=detector,
        writer=writer,
        neuron=draw.randrange(4 * HEAD),
        dimension=draw.randrange(heads * HEAD),
        sink=(sink, draw.randrange(heads)),
        down=draw.randint(sink + 1, layers - 1),
    )


def build_planted(plan: Plan, folder: Path, *, seed: int, without: str = "") -> None:
    """Write a model; ``without`` leaves out its ``detector`` or its ``writer``."""
    width = plan.heads * HEAD
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * HEAD,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    with quiet_libraries():
        model: Any = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return NOISE * torch.randn(*shape, generator=generator)

    order = torch.randperm(width, generator=generator).tolist()
    order.remove(plan.dimension)
    constant, code = order[0], order[1 : HEAD + 1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(noise(*parameter.shape))
            elif "norm" in name:
                parameter.fill_(1.0)
        codes = torch.randn(VOCABULARY, HEAD, generator=generator)
        embedding = model.model.embed_tokens.weight
        embedding[:, code] = CODE * codes / codes.norm(dim=1, keepdim=True)
        embedding[:, constant] = 1.0
        model.lm_head.weight.mul_(5)
        blocks = model.model.layers
        _plant_detector(blocks[plan.detector].self_attn, code, width, without != "detector")
        _plant_neuron(
            blocks[plan.writer].mlp,
            plan.neuron,
            read=constant,
            write=plan.dimension,
            gain=0.0 if without == "writer" else PEAK,
        )
        _plant_sink(blocks[plan.sink[0]].self_attn, plan.sink[1], constant, plan.dimension)
        _plant_neuron(
            blocks[plan.down].mlp,
            (plan.neuron + 1) % (4 * HEAD),
            read=plan.dimension,
            write=plan.dimension,
            gain=-0.9 * PEAK,
        )
    with quiet_libraries():
        model.save_pretrained(folder)
    tokenizer(begin=False).save_pretrained(folder)


def _plant_detector(attention: Any, code: list[int], width: int, works: bool) -> None:
    rows = slice(0, HEAD)
    attention.q_proj.weight[rows] = 0.0
    attention.k_proj.weight[rows] = 0.0
    attention.v_proj.weight[rows] = 0.0
    attention.o_proj.weight[:, rows] = 0.0
    if works:
        # RMSNorm has scaled the code by this.
        scale = (width / (CODE**2 + 1.0)) ** 0.5
        for place, dimension in enumerate(code):
            attention.v_proj.weight[place, dimension] = 1.0
            attention.o_proj.weight[dimension, place] = -1.0 / scale


def _plant_neuron(mlp: Any, neuron: int, *, read: int, write: int, gain: float) -> None:
    width = mlp.gate_proj.weight.shape[1]
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
        weight[neuron] = 0.0
        weight[neuron, read] = 1.0
    mlp.down_proj.weight[:, neuron] = 0.0
    mlp.down_proj.weight[write, neuron] = gain / width


def _plant_sink(attention: Any, head: int, constant: int, dimension: int) -> None:
    # The slowest pair of the rotary embedding hardly turns.
    slow = head * HEAD + HEAD // 2 - 1
    rows = slice(head * HEAD, (head + 1) * HEAD)
    attention.q_proj.weight[rows] = 0.0
    attention.k_proj.weight[rows] = 0.0
    attention.q_proj.weight[slow, constant] = 20.0
    attention.k_proj.weight[slow, dimension] = 1.0
