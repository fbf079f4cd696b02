"""A mixture of experts as a configuration describes it: its settings and its rows of the weight table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.weight_table import Source, WeightTable, hf_source

SIZE_MULTIPLE = 8  # grouped products read rows of 16 bytes


@dataclass(frozen=True, slots=True)
class SoftmaxRouting:
    """The best experts by their probability over all; `normalize`: their weights add up to one."""

    normalize: bool


@dataclass(frozen=True, slots=True)
class GroupRouting:
    """The best experts by sigmoid plus a learned correction, of the groups whose two best add up to most.

    The correction chooses only: weights are of the sigmoids alone.
    """

    normalize: bool
    scale: float
    num_groups: int
    kept_groups: int


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    layers: frozenset[int]  # those that have experts; the others have one gated MLP
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    routing: SoftmaxRouting | GroupRouting
    shared_size: int = 0  # of the expert that all tokens go through; 0 = none
    is_stacked: bool = False  # on the hub: all experts in one tensor, which is transposed

    def check(self, keys: ConfigKeys) -> None:
        """Refuses numbers that do not fit each other."""
        groups, kept = 1, 1
        if isinstance(self.routing, GroupRouting):
            groups, kept = self.routing.num_groups, self.routing.kept_groups
        size, rest = divmod(self.num_experts, max(groups, 1))
        if groups < 1 or rest or not 1 <= kept <= groups or (groups > 1 and size < 2):
            raise keys.error(
                f"{self.num_experts} experts in n_group={groups} with topk_group={kept}: expected groups of equal"
                " size, at least two experts each"
            )
        if not 1 <= self.experts_per_token <= size * kept:
            raise keys.error(
                f"num_experts_per_tok is {self.experts_per_token}, expected 1 … {size * kept} of {self.num_experts}"
            )
        if self.intermediate_size < 1 or self.intermediate_size % SIZE_MULTIPLE:
            raise keys.error(
                f"moe_intermediate_size is {self.intermediate_size}, expected a multiple of {SIZE_MULTIPLE}"
            )


def read_softmax_experts(keys: ConfigKeys, num_layers: int, *, is_stacked: bool = False) -> ExpertSettings:
    """As Qwen3's configurations say it."""
    step, plain = keys.integer("decoder_sparse_step"), keys.integers("mlp_only_layers")
    layers = (layer for layer in range(num_layers) if layer not in plain and (layer + 1) % max(step, 1) == 0)
    experts = ExpertSettings(
        layers=frozenset(layers),
        num_experts=_num_experts(keys),
        experts_per_token=keys.integer("num_experts_per_tok"),
        intermediate_size=keys.integer("moe_intermediate_size"),
        routing=SoftmaxRouting(normalize=keys.flag("norm_topk_prob")),
        is_stacked=is_stacked,
    )
    experts.check(keys)
    return experts


def read_softmax_experts_beside_one(keys: ConfigKeys, num_layers: int) -> ExpertSettings:
    """As the configurations of Qwen's hybrids say it: every layer has experts, and one that all tokens go through."""
    keys.only("norm_topk_prob", True)
    keys.ignore("intermediate_size")  # of dense layers, which there are none of
    experts = ExpertSettings(
        layers=frozenset(range(num_layers)),
        num_experts=keys.integer("num_experts"),
        experts_per_token=keys.integer("num_experts_per_tok"),
        intermediate_size=keys.integer("moe_intermediate_size"),
        routing=SoftmaxRouting(normalize=True),
        shared_size=keys.integer("shared_expert_intermediate_size"),
    )
    experts.check(keys)
    return experts


def read_group_experts(
    keys: ConfigKeys, layers: Iterable[int], size: int, shared_size: int, groups: tuple[int, int]
) -> ExpertSettings:
    """As DeepSeek's configurations say it. `groups`: how many there are, and how many of them are kept."""
    experts = ExpertSettings(
        layers=frozenset(layers),
        num_experts=keys.integer("n_routed_experts"),
        experts_per_token=keys.integer("num_experts_per_tok"),
        intermediate_size=size,
        routing=GroupRouting(
            keys.flag("norm_topk_prob"), keys.number("routed_scaling_factor"), groups[0], groups[1]
        ),
        shared_size=shared_size,
    )
    experts.check(keys)
    return experts


def _num_experts(keys: ConfigKeys) -> int:
    """Published under one name, saved by transformers under another."""
    saved = keys.integer("num_local_experts", 0)
    return keys.integer("num_experts", saved) if saved else keys.integer("num_experts")


def add_experts(
    table: WeightTable,
    settings: ExpertSettings,
    hidden: int,
    ours: str,
    hf: str,
    first: Sequence[str] = ("gate_proj", "up_proj"),
    last: str = "down_proj",
    gguf: str = "",
) -> None:
    """The tensors of one layer; `ours`, `hf` and, where GGUF files are read, `gguf` are what names begin with.

    The `first` matrices of an expert are stacked one behind the other, so that they are one matrix in memory.
    """
    add_router(table, settings, hidden, ours, hf, gguf)
    add_routed(table, settings, hidden, ours, hf, first, last, gguf)
    if settings.shared_size:
        add_gated_mlp(table, settings.shared_size, hidden, f"{ours}.shared", f"{hf}.shared_experts")


def add_router(
    table: WeightTable, settings: ExpertSettings, hidden: int, ours: str, hf: str, gguf: str = ""
) -> None:
    count = settings.num_experts
    stored = f"{gguf}.ffn_gate_inp.weight" if gguf else f"{hf}.gate.weight"
    table.take(f"{ours}.router", Source(f"{hf}.gate.weight", stored, (count, hidden), keep_float32=True))
    if isinstance(settings.routing, GroupRouting):
        name = f"{hf}.gate.e_score_correction_bias"
        table.take(f"{ours}.correction", hf_source(name, count, keep_float32=True))


def add_routed(
    table: WeightTable,
    settings: ExpertSettings,
    hidden: int,
    ours: str,
    hf: str,
    first: Sequence[str],
    last: str = "down_proj",
    gguf: str = "",
) -> None:
    size, experts = settings.intermediate_size, [f"{hf}.experts.{e}" for e in range(settings.num_experts)]
    inner = [hf_source(f"{expert}.{name}.weight", size, hidden) for expert in experts for name in first]
    outer = [hf_source(f"{expert}.{last}.weight", hidden, size) for expert in experts]
    table.stack(f"{ours}.experts.gate_up", inner)
    _or_gguf(table, gguf, "gate", "up", shape=(settings.num_experts, size, hidden))
    table.stack(f"{ours}.experts.down", outer)
    _or_gguf(table, gguf, "down", shape=(settings.num_experts, hidden, size))


def _or_gguf(table: WeightTable, gguf: str, *names: str, shape: tuple[int, int, int]) -> None:
    """GGUF files keep one tensor of all experts for each of these."""
    if gguf:
        table.or_stacked([hf_source(f"{gguf}.ffn_{name}_exps.weight", *shape) for name in names])


def add_stacked_experts(
    table: WeightTable,
    settings: ExpertSettings,
    hidden: int,
    ours: str,
    hf: str,
    transposed: bool = False,
    gguf: str = "",
) -> None:
    """The routed experts of one layer, stacked in the file (`transposed`: turned too, on the hub), or one by one."""
    count, size = settings.num_experts, settings.intermediate_size
    experts = [f"{hf}.experts.{expert}" for expert in range(count)]
    add_router(table, settings, hidden, ours, hf, gguf)
    halves = [
        hf_source(f"{each}.{half}_proj.weight", size, hidden) for each in experts for half in ("gate", "up")
    ]
    gate_up = hf_source(f"{hf}.experts.gate_up_proj", count, 2 * size, hidden)
    singles = [hf_source(f"{each}.down_proj.weight", hidden, size) for each in experts]
    down = hf_source(f"{hf}.experts.down_proj", count, hidden, size)
    turned = [[replace(each, hf_transposed=True)] if transposed else [each] for each in (gate_up, down)]
    table.either(f"{ours}.experts.gate_up", turned[0], [gate_up], halves)
    _or_gguf(table, gguf, "gate", "up", shape=(count, size, hidden))
    table.either(f"{ours}.experts.down", turned[1], [down], singles)
    _or_gguf(table, gguf, "down", shape=(count, hidden, size))


def add_feed_forward_beside_one(
    table: WeightTable, settings: ExpertSettings, hidden: int, ours: str, hf: str
) -> None:
    """Routed experts, and a shared one that is gated for each token."""
    add_stacked_experts(table, settings, hidden, ours, hf)
    add_gated_mlp(table, settings.shared_size, hidden, f"{ours}.shared", f"{hf}.shared_expert")
    table.take(f"{ours}.shared.gate.weight", hf_source(f"{hf}.shared_expert_gate.weight", 1, hidden))


def add_scaled_experts(table: WeightTable, count: int, size: int, hidden: int, ours: str, hf: str) -> None:
    """Stacked experts, whose router scales its input and what each expert gives."""
    scales = {"router": (count, hidden), "router_scale": (hidden,), "expert_scale": (count,)}
    names = {"router": "proj.weight", "router_scale": "scale", "expert_scale": "per_expert_scale"}
    for name, shape in scales.items():
        table.take(f"{ours}.{name}", hf_source(f"{hf}.router.{names[name]}", *shape, keep_float32=True))
    table.take(f"{ours}.experts.gate_up", hf_source(f"{hf}.experts.gate_up_proj", count, 2 * size, hidden))
    table.take(f"{ours}.experts.down", hf_source(f"{hf}.experts.down_proj", count, hidden, size))


def add_gated_mlp(table: WeightTable, size: int, hidden: int, ours: str, hf: str) -> None:
    halves = [hf_source(f"{hf}.{half}_proj.weight", size, hidden) for half in ("gate", "up")]
    table.fuse(f"{ours}.gate_up.weight", halves)
    table.take(f"{ours}.down.weight", hf_source(f"{hf}.down_proj.weight", hidden, size))
