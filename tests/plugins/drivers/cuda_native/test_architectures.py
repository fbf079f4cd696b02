"""What the CUDA driver has kernels for gives the logits of the portable driver; the rest is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pie_core.errors import LoadError
from pie_core.testing.any_architecture import logits, write_checkpoint
from pie_core.testing.batches import Stepper
from pie_plugins.drivers.cuda_native import weights
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.torch_kernels import TorchKernels
from tests.plugins.drivers.cuda_native.machine import cuda_native
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS, YARN, portable, tiny, tiny_moe
from tests.plugins.models.test_csm import tiny_csm
from tests.plugins.models.test_qwen3_vl import beside_tower

PROMPT = np.random.default_rng(3).integers(0, 320, 24).tolist()


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("qwen3", tiny("qwen3")),
        ("qwen3", tiny("qwen3", rope_scaling=YARN)),
        ("qwen3_moe", tiny_moe(num_hidden_layers=3, mlp_only_layers=[1])),
    ],
    ids=["dense", "yarn", "experts"],
)
def test_logits_equal_those_of_the_portable_driver(
    architecture: str, config: Mapping[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, ARCHITECTURES[architecture], config)
    seen = []
    for driver in (cuda_native(tmp_path), portable(tmp_path)):
        seen.append(logits(Stepper(driver), [PROMPT[:20], *([token] for token in PROMPT[20:])]))
        driver.close()
    assert np.abs(seen[0] - seen[1]).max() <= 1e-4 * seen[1].std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_compute_in_half_precision(dtype: str, tmp_path: Path) -> None:
    """Every expert is chosen, so that rounding changes no choice. On a GPU each dtype has a kernel of its own."""
    write_checkpoint(tmp_path, ARCHITECTURES["qwen3_moe"], tiny_moe(num_experts=4, num_experts_per_tok=4))
    seen = []
    for driver in (cuda_native(tmp_path, dtype=dtype), portable(tmp_path)):
        seen.append(logits(Stepper(driver), [PROMPT[:20], *([token] for token in PROMPT[20:])]))
        driver.close()
    assert np.abs(seen[0] - seen[1]).max() <= 0.1 * seen[1].std()


class NoLook(TorchDispatchMode):
    """Raises where a value comes to the host, or a shape depends on values: neither can be recorded."""

    # The last is how `tolist` and `numpy` begin.
    LOOKS = frozenset({"item", "is_nonzero", "nonzero", "masked_select", "unique2", "equal", "resolve_conj"})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        assert name not in self.LOOKS, f"{name} waits for the device"
        if name in ("index", "index_put"):
            assert all(places is None or places.dtype != torch.bool for places in args[1]), (
                f"{name} by a mask"
            )
        return func(*args, **(kwargs or {}))


def no_look() -> TorchDispatchMode:
    return NoLook()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", tiny("llama")),
        ("qwen3", tiny("qwen3", rope_scaling=YARN)),
        ("qwen3_moe", tiny_moe(mlp_only_layers=[1])),
    ],
)
def test_layers_never_look_at_the_device(
    architecture: str, config: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention aside: in plain torch it does, and only then."""
    write_checkpoint(tmp_path, ARCHITECTURES[architecture], config)
    driver = cuda_native(tmp_path, kernels="torch", cuda_graphs=False)
    hidden, attend, seen = ModelRunner.hidden, TorchKernels.attend, []

    def watched(*arguments: Any) -> Any:
        with no_look():
            seen.append(hidden(*arguments))
        return seen[-1]

    def unwatched(*arguments: Any) -> Any:
        with _disable_current_modes():
            return attend(*arguments)

    monkeypatch.setattr(ModelRunner, "hidden", watched)
    monkeypatch.setattr(TorchKernels, "attend", unwatched)
    logits(Stepper(driver), [PROMPT[:20], [3]])
    assert len(seen) == 2


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    ("architecture", "config", "refusal"),
    [
        ("csm", tiny_csm(), "has tokens of 4 columns"),
        ("qwen3_vl", beside_tower(tiny("qwen3_vl")), "has positions of 3 columns"),
    ],
)
def test_rows_of_several_columns_are_refused_before_weights_are_read(
    architecture: str, config: dict[str, Any], refusal: str, graphs: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=rf"{refusal}.*use the driver portable"):
        cuda_native(tmp_path, cuda_graphs=graphs, random_weights=True)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm5"])
def test_latent_rows_are_refused_by_name_before_weights_are_read(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, ARCHITECTURES[architecture], CONFIGS[architecture])
    monkeypatch.delattr(weights, "load_weights")
    with pytest.raises(LoadError, match=r"group 'latent'.*use the driver portable"):
        cuda_native(tmp_path)
