"""A mixture of experts as a configuration describes it: its settings and its rows of the weight table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.weight_table import WeightTable, hf_source

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


def _num_experts(keys: ConfigKeys) -> int:
    """Published under one name, saved by transformers under another."""
    saved = keys.integer("num_local_experts", 0)
    return keys.integer("num_experts", saved) if saved else keys.integer("num_experts")


def add_experts(table: WeightTable, settings: ExpertSettings, hidden: int, ours: str, hf: str) -> None:
    """The tensors of one layer; `ours` and `hf` are what the names of both sides begin with.

    The gate and up matrices of an expert are stacked one behind the other, so that both are one matrix in memory.
    """
    count, size = settings.num_experts, settings.intermediate_size
    experts = [f"{hf}.experts.{expert}" for expert in range(count)]
    table.take(f"{ours}.router", hf_source(f"{hf}.gate.weight", count, hidden, keep_float32=True))
    if isinstance(settings.routing, GroupRouting):
        name = f"{hf}.gate.e_score_correction_bias"
        table.take(f"{ours}.correction", hf_source(name, count, keep_float32=True))
    table.stack(
        f"{ours}.experts.gate_up",
        [
            hf_source(f"{expert}.{half}_proj.weight", size, hidden)
            for expert in experts
            for half in ("gate", "up")
        ],
    )
    table.stack(
        f"{ours}.experts.down", [hf_source(f"{expert}.down_proj.weight", hidden, size) for expert in experts]
    )
    if settings.shared_size:
        add_gated_mlp(table, settings.shared_size, hidden, f"{ours}.shared", f"{hf}.shared_experts")


def add_stacked_experts(
    table: WeightTable, settings: ExpertSettings, hidden: int, ours: str, hf: str, transposed: bool = False
) -> None:
    """The routed experts of one layer, stacked in the file (`transposed`: turned too, on the hub), or one by one."""
    count, size = settings.num_experts, settings.intermediate_size
    experts = [f"{hf}.experts.{expert}" for expert in range(count)]
    table.take(f"{ours}.router", hf_source(f"{hf}.gate.weight", count, hidden, keep_float32=True))
    halves = [
        hf_source(f"{each}.{half}_proj.weight", size, hidden) for each in experts for half in ("gate", "up")
    ]
    gate_up = hf_source(f"{hf}.experts.gate_up_proj", count, 2 * size, hidden)
    singles = [hf_source(f"{each}.down_proj.weight", hidden, size) for each in experts]
    down = hf_source(f"{hf}.experts.down_proj", count, hidden, size)
    for name, stacked, single in (("gate_up", gate_up, halves), ("down", down, singles)):
        ways = [[replace(stacked, hf_transposed=True)]] if transposed else []
        table.either(f"{ours}.experts.{name}", *ways, [stacked], single)


def add_gated_mlp(table: WeightTable, size: int, hidden: int, ours: str, hf: str) -> None:
    halves = [hf_source(f"{hf}.{half}_proj.weight", size, hidden) for half in ("gate", "up")]
    table.fuse(f"{ours}.gate_up.weight", halves)
    table.take(f"{ours}.down.weight", hf_source(f"{hf}.down_proj.weight", hidden, size))
