"""A checkpoint's architecture is the one that reads its kind in its form; else an error lists what can be read."""

from __future__ import annotations

import pytest

from pie_core.errors import LoadError
from pie_plugins.models.layers.loading import find_architecture
from tests.plugins.models.reference import ARCHITECTURES


def test_folders_and_gguf_files_have_names_of_their_own() -> None:
    assert find_architecture("qwen3", ARCHITECTURES, "here").name == "qwen3"
    assert find_architecture("qwen3moe", ARCHITECTURES, "here", "gguf").name == "qwen3_moe"


@pytest.mark.parametrize(("form", "called"), [("hf", "Hugging Face folder"), ("gguf", "GGUF file")])
def test_a_kind_that_nothing_reads_is_told_with_what_can_be_read(form: str, called: str) -> None:
    with pytest.raises(
        LoadError, match=rf"^here: no .* reads 'bert' from a {called}; .* are .*llama, .*qwen3"
    ):
        find_architecture("bert", ARCHITECTURES, "here", form)  # type: ignore[arg-type]  # one of the two
    with pytest.raises(LoadError, match=r"are none$"):
        find_architecture("bert", {}, "here")
