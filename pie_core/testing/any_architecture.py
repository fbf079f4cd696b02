"""The contract suite of architectures. Whoever writes one subclasses it in a test module, and pytest does the rest:

    class TestMine(ArchitectureContract):
        declaration = DECLARATION
        configs = {"plain": {"model_type": "mine", "hidden_size": 64, ...}}

        def make_driver(self, path: Path) -> Driver:
            return load_some_torch_driver_in_float32(path)

        def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
            return transformers_logits(path, tokens)

Random weights are written in the names of the architecture's own table, so the reference finds wrong names too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32, ProbeKind
from pie_core.errors import LoadError
from pie_core.testing.batches import (
    Context,
    Mask,
    Probe,
    Request,
    Sample,
    Stepper,
    Token,
    probe_values,
)

PROMPT = 24
GENERATED = 12
WEIGHTS = "model.safetensors"


class ArchitectureContract:
    """Subclasses say what to build, how to run it, and what it should give."""

    declaration: ClassVar[ArchitectureDeclaration]
    configs: ClassVar[Mapping[str, Mapping[str, Any]]]  # a name -> config.json, tiny
    tolerance: ClassVar[float] = 1e-4  # of logits, as a fraction of their standard deviation
    # Keys that change the computation and that this architecture does not implement.
    refused: ClassVar[Mapping[str, object]] = {"brand_new_switch": True, "quantization_config": {"bits": 4}}

    def make_driver(self, path: Path) -> Driver:
        """A driver in float32 over the checkpoint at `path`."""
        raise NotImplementedError(f"{type(self).__name__}.make_driver: a driver in float32 over {path}")

    def reference_logits(self, path: Path, tokens: Sequence[int]) -> Float32:
        """[tokens, vocab] of an independent implementation over the same checkpoint."""
        raise NotImplementedError(f"{type(self).__name__}.reference_logits: those of another implementation")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "checkpoint" in metafunc.fixturenames:
            metafunc.parametrize("checkpoint", sorted(self.configs), indirect=True)

    @pytest.fixture
    def checkpoint(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        write_checkpoint(tmp_path, self.declaration, self.configs[request.param])
        return tmp_path

    @pytest.fixture
    def some_checkpoint(self, tmp_path: Path) -> Path:
        write_checkpoint(tmp_path, self.declaration, self.configs[min(self.configs)])
        return tmp_path

    @pytest.fixture
    def stepper(self, checkpoint: Path) -> Iterator[Stepper]:
        driver = self.make_driver(checkpoint)
        yield Stepper(driver)
        driver.close()

    def prompt(self, stepper: Stepper) -> list[int]:
        vocab_size = stepper.driver.capabilities.vocab_size
        return [int(token) for token in np.random.default_rng(5).integers(0, vocab_size, PROMPT)]

    def close(self, seen: Float32, expected: Float32) -> bool:
        return bool(np.abs(seen - expected).max() <= self.tolerance * expected.std())

    def test_logits_of_a_whole_prompt_equal_the_reference(self, checkpoint: Path, stepper: Stepper) -> None:
        prompt = self.prompt(stepper)
        seen = logits(stepper, [prompt])
        assert self.close(seen, self.reference_logits(checkpoint, prompt))

    def test_logits_in_pieces_and_one_by_one_equal_the_reference(
        self, checkpoint: Path, stepper: Stepper
    ) -> None:
        prompt = self.prompt(stepper)
        seen = logits(stepper, [prompt[:9], prompt[9:20], *([token] for token in prompt[20:])])
        assert self.close(seen, self.reference_logits(checkpoint, prompt))

    def test_greedy_tokens_equal_the_reference(self, checkpoint: Path, stepper: Stepper) -> None:
        tokens = self.prompt(stepper)
        context, fed = stepper.context(), tokens
        for _ in range(GENERATED):
            result = stepper.run([Request(context, fed, samples=[Sample()])])
            fed = [int(result.tokens[0])]
            tokens = [*tokens, *fed]
        expected = self.reference_logits(checkpoint, tokens[:-1]).argmax(axis=1)
        assert tokens[PROMPT:] == expected[PROMPT - 1 :].tolist()

    def test_every_split_of_a_prompt_equals_the_whole(self, checkpoint: Path, stepper: Stepper) -> None:
        prompt = self.prompt(stepper)
        expected = self.reference_logits(checkpoint, prompt)
        for split in range(1, len(prompt)):
            assert self.close(logits(stepper, [prompt[:split], prompt[split:]]), expected), split

    def test_strangers_in_the_batch_and_forks_do_not_matter(self, checkpoint: Path, stepper: Stepper) -> None:
        prompt = self.prompt(stepper)
        expected = self.reference_logits(checkpoint, prompt)
        context, strangers = stepper.context(), [stepper.context() for _ in range(2)]
        stepper.run([Request(strangers[0], prompt[5:]), Request(context, prompt[:13])])
        child = stepper.fork(context)
        together = [
            Request(strangers[1], prompt[2:11]),
            asking(child, prompt[13:]),
            Request(strangers[0], prompt[:1]),
            asking(context, prompt[13:15]),
        ]
        rows = rows_of(stepper, together)
        assert self.close(rows[: PROMPT - 13], expected[13:])
        assert self.close(rows[PROMPT - 13 :], expected[13:15])
        assert self.close(rows_of(stepper, [asking(context, prompt[15:])]), expected[15:])

    def test_a_context_that_went_back_goes_on_as_if_it_had_not(
        self, checkpoint: Path, stepper: Stepper
    ) -> None:
        prompt = self.prompt(stepper)
        context = stepper.context()
        stepper.run([Request(context, prompt[:13])])
        kept = [*context.slots]
        stepper.run([Request(context, prompt[3:9], state_rows=[])])
        context.length, context.slots = 13, kept
        seen = rows_of(stepper, [asking(context, prompt[13:])])
        assert self.close(seen, self.reference_logits(checkpoint, prompt)[13:])

    def test_a_context_goes_on_in_another_driver(self, checkpoint: Path, stepper: Stepper) -> None:
        prompt, other = self.prompt(stepper), Stepper(self.make_driver(checkpoint))
        context, moved = stepper.context(), other.context()
        stepper.run([Request(context, prompt[:13])])
        other.run([Request(other.context(), prompt[4:])])  # so that pages and slots have other numbers
        transplant(stepper, context, other, moved)
        seen = rows_of(other, [asking(moved, prompt[13:])])
        other.driver.close()
        assert self.close(seen, self.reference_logits(checkpoint, prompt)[13:])

    def test_what_masks_hide_does_not_matter(self, stepper: Stepper) -> None:
        if any(space.group.kind == "state" for space in stepper.book.spaces):
            pytest.skip("what recurrent state has taken in cannot be hidden")
        prompt = self.prompt(stepper)
        stranger = [*prompt[:5], (prompt[5] + 1) % stepper.driver.capabilities.vocab_size, *prompt[6:]]
        masks = [Mask(row, [(0, 5), (6, row + 1)]) for row in range(6, PROMPT)]
        seen = [
            rows_of(stepper, [asking(stepper.context(), tokens, masks=masks)])[6:]
            for tokens in (prompt, stranger)
        ]
        plain = rows_of(stepper, [asking(stepper.context(), prompt)])[6:]
        assert self.close(*seen)
        assert not self.close(seen[0], plain)

    def test_keys_that_would_change_the_computation_are_refused_by_name(self, some_checkpoint: Path) -> None:
        for key, value in self.refused.items():
            before = (some_checkpoint / "config.json").read_text()
            edit_config(some_checkpoint, partial(_set, key, value))
            with pytest.raises(LoadError, match=key):
                self.make_driver(some_checkpoint)
            (some_checkpoint / "config.json").write_text(before)

    def test_keys_that_do_not_matter_are_ignored(self, some_checkpoint: Path) -> None:
        extra = {
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "_name_or_path": "here",
            "eos_token_id": [1, 2],
        }
        edit_config(some_checkpoint, lambda config: config.update(extra))
        self.make_driver(some_checkpoint).close()

    def test_an_absent_key_is_refused_by_name(self, some_checkpoint: Path) -> None:
        edit_config(some_checkpoint, lambda config: config.pop("hidden_size"))
        with pytest.raises(LoadError, match="hidden_size"):
            self.make_driver(some_checkpoint)

    def test_a_missing_tensor_is_refused_by_name(self, some_checkpoint: Path) -> None:
        name = edit_weights(some_checkpoint, lambda weights, name: weights.pop(name))
        with pytest.raises(LoadError, match=rf"missing.*{name}"):
            self.make_driver(some_checkpoint)

    def test_a_tensor_left_over_is_refused_by_name(self, some_checkpoint: Path) -> None:
        stranger = {"model.stranger.weight": np.zeros(3, np.float32)}
        edit_weights(some_checkpoint, lambda weights, _: weights.update(stranger))
        with pytest.raises(LoadError, match=r"left over.*model\.stranger\.weight"):
            self.make_driver(some_checkpoint)

    def test_a_misshaped_tensor_is_refused_by_name(self, some_checkpoint: Path) -> None:
        name = edit_weights(
            some_checkpoint, lambda weights, name: weights.update({name: weights[name][..., :-1].copy()})
        )
        with pytest.raises(LoadError, match=rf"misshaped.*{name}"):
            self.make_driver(some_checkpoint)


def logits(stepper: Stepper, chunks: Sequence[Sequence[int]]) -> Float32:
    """[tokens, vocab] of one context that is fed the chunks, one in each step."""
    context = stepper.context()
    rows: list[Float32] = []
    for chunk in chunks:
        probes = [Probe(ProbeKind.LOGITS, row) for row in range(len(chunk))]
        result = stepper.run([Request(context, chunk, probes=probes)])
        assert not result.failed, result.failed
        rows.extend(probe_values(result, probe) for probe in range(len(chunk)))
    return np.stack(rows)


def asking(context: Context, tokens: Sequence[Token], masks: Sequence[Mask] = ()) -> Request:
    """A request for the logits of every row."""
    probes = [Probe(ProbeKind.LOGITS, row) for row in range(len(tokens))]
    return Request(context, tokens, probes=probes, masks=masks)


def rows_of(stepper: Stepper, requests: Sequence[Request]) -> Float32:
    """One step: what all its probes gave."""
    result = stepper.run(requests)
    assert not result.failed, result.failed
    return np.stack([probe_values(result, probe) for probe in range(sum(len(r.probes) for r in requests))])


def transplant(source: Stepper, context: Context, target: Stepper, moved: Context) -> None:
    """Exports everything that a context keeps and imports it for one of another driver."""
    target.make_room(moved, context.length)
    moved.length = context.length
    for group in range(len(source.book.spaces)):
        if source.book.is_state(group):
            moved.slots[group] = target.book.hold(moved, group, target.book.take(group))
            pages, targets = [context.slots[group]], [moved.slots[group]]
        else:
            pages, targets = [*context.pages[group].values()], [*moved.pages[group].values()]
        target.driver.import_pages(group, targets, source.driver.export_pages(group, pages))


def write_checkpoint(
    folder: Path, declaration: ArchitectureDeclaration, config: Mapping[str, Any], seed: int = 0
) -> None:
    """A Hugging Face directory of random weights, in the names and shapes of the architecture's weight table.

    The weights are wide enough for mistakes to show: norms are not 1, biases not 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    table = weight_table(declaration, config)
    random = np.random.default_rng(seed)
    weights = {source.hf: _random(random, source.hf, source.stored_shape("hf")) for source in table.sources()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def weight_table(declaration: ArchitectureDeclaration, config: Mapping[str, Any]) -> Any:
    architecture = declaration.load()
    return architecture.weights(architecture.config(config, "config.json"))


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Float32:
    values = random.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return values * np.float32(0.2)
    if name.endswith("A_log"):
        return values - np.float32(2)  # slow decay, or recurrences would forget what tests ask for
    if len(shape) == 1:
        return np.float32(1) + values * np.float32(0.2)
    return values if "embed" in name else values / np.float32(np.sqrt(shape[-1]))


def _set(key: str, value: object, config: dict[str, Any]) -> None:
    config[key] = value


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the language model's configuration, which may lie inside a larger one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config.get("text_config") or config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Any], str], object]) -> str:
    """Applies `change` to the tensors and the name of one of them, which is returned."""
    path = folder / WEIGHTS
    weights = load_file(path)
    name = sorted(weights)[len(weights) // 2]
    change(weights, name)
    save_file(weights, path, metadata={"format": "pt"})
    return name
