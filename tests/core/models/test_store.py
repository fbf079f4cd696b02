"""Models are imported into the store under a name, and configured models are found there or elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from pie_core.config import Config, DriverConfig, ModelConfig
from pie_core.contracts.driver import DriverDeclaration, Progress
from pie_core.errors import FetchError, LoadError
from pie_core.models import resolve_model, with_paths
from pie_core.models.hub import download_snapshot
from pie_core.models.store import import_model, stored_model, stored_models


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "Tiny-Llama"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "README.md"):
        (source / name).write_text(name)
    return source


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.Q4.gguf"
    file.write_bytes(b"GGUF....")
    return file


def ignore(_: Progress) -> None:
    """Nobody watches."""


def test_an_empty_store_lists_nothing() -> None:
    assert stored_models() == []


def test_a_folder_is_copied_without_what_is_not_needed(folder: Path, home: Path) -> None:
    seen: list[Progress] = []
    model = import_model(folder, None, False, seen.append)
    assert (model.name, model.linked, model.path) == ("Tiny-Llama", False, home / "models/Tiny-Llama")
    assert sorted(file.name for file in model.path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert seen[-1].done == seen[-1].total == model.size_bytes
    assert stored_models() == [model]
    assert stored_model("Tiny-Llama") == model.path


def test_a_gguf_file_is_copied_under_a_chosen_name(gguf: Path) -> None:
    model = import_model(gguf, "tiny", False, ignore)
    assert model.path.read_bytes() == b"GGUF...."
    assert resolve_model(ModelConfig(name="tiny"), ignore) == model.path


def test_a_link_takes_no_space_and_leads_to_the_source(folder: Path, gguf: Path) -> None:
    linked_folder, linked_file = (
        import_model(folder, "a", True, ignore),
        import_model(gguf, "b", True, ignore),
    )
    assert (linked_folder.path, linked_folder.linked) == (folder, True)
    assert (linked_file.path, linked_file.linked) == (gguf, True)
    gguf.unlink()
    assert [model.name for model in stored_models()] == ["a"]


def test_what_is_no_model_is_refused_and_leaves_nothing(tmp_path: Path, home: Path, gguf: Path) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("hello")
    for source, name, problem in [
        (tmp_path / "none", None, "does not exist; expected a Hugging Face folder or a GGUF file"),
        (text, None, "is no GGUF file: it begins with b'hell'"),
        (tmp_path, None, "is no Hugging Face model: expected `config.json` and `*.safetensors`"),
        (gguf, "../up", "cannot name a model"),
        (gguf, "default", "is kept for the default model"),
    ]:
        with pytest.raises(LoadError) as caught:
            import_model(source, name, False, ignore)
        assert problem in str(caught.value)
    assert not home.exists()


def test_a_taken_name_is_refused(gguf: Path) -> None:
    import_model(gguf, "tiny", False, ignore)
    with pytest.raises(LoadError, match="a model `tiny` is in the store already"):
        import_model(gguf, "tiny", True, ignore)


def test_an_unknown_model_names_the_nearest(gguf: Path) -> None:
    import_model(gguf, "tiny-llama", False, ignore)
    with pytest.raises(
        LoadError, match=r"unknown model `tiny_lama`; did you mean `tiny-llama`\? Known: default, tiny"
    ):
        resolve_model(ModelConfig(name="tiny_lama"), ignore)


def test_a_path_must_exist(gguf: Path) -> None:
    assert resolve_model(ModelConfig(name="a", path=gguf), ignore) == gguf
    with pytest.raises(LoadError, match=r"model a: .*none does not exist; correct its `path`"):
        resolve_model(ModelConfig(name="a", path=gguf.parent / "none"), ignore)


def test_a_repository_that_is_not_one_is_refused() -> None:
    with pytest.raises(FetchError, match="is no repository name; write it like"):
        download_snapshot("a/b/c", None)


def test_only_models_whose_driver_reads_a_checkpoint_are_looked_for(gguf: Path) -> None:
    def load(_: object) -> object:
        raise AssertionError("nothing is loaded here")

    drivers = {
        name: DriverDeclaration(name, "", options=object, load=load, needs_checkpoint=needs)  # type: ignore[arg-type]
        for name, needs in (("reads", True), ("scripted", False))
    }
    missing = ModelConfig(name="missing", driver=DriverConfig(type="scripted"))
    present = ModelConfig(name="tiny", driver=DriverConfig(type="reads"))
    import_model(gguf, "tiny", True, ignore)
    config = with_paths(Config(models=(missing, present)), drivers, ignore)
    assert [model.path for model in config.models] == [None, gguf]
