"""Programs become artifacts, artifacts are installed by name and version, and whatever is damaged is named."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pie_core.errors import NotFound, ProgramError
from pie_core.manifest import version_key
from pie_core.program_artifact import is_safe_path, pack, pack_folder, unpack
from pie_core.program_store import DamagedProgram, InstalledProgram, ProgramStore, content_hash, split_label
from pie_core.programs import ComponentProgram, PythonProgram, find_installable, find_program, shipped_version

MANIFEST = '[package]\nname = "{}"\nversion = "{}"\n'
WASM = b"\0asm and then some"

MakeFolder = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> ProgramStore:
    return ProgramStore(tmp_path / "store")


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    def make(name: str = "mine", version: str = "0.1.0", source: str = "x = 1\n", more: str = "") -> Path:
        folder = tmp_path / f"{name}-{version}"
        folder.mkdir(exist_ok=True)
        (folder / "Pie.toml").write_text(MANIFEST.format(name, version) + more)
        (folder / "main.py").write_text(source)
        return folder

    return make


def zipped(**files: bytes) -> bytes:
    return pack({name.replace("_toml", ".toml").replace("_py", ".py"): data for name, data in files.items()})


GOOD = MANIFEST.format("mine", "0.1.0").encode()


def test_the_same_folder_gives_the_same_bytes(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    (folder / "more").mkdir()
    (folder / "more/part.py").write_text("y = 2\n")
    (folder / "tests").mkdir()
    (folder / "tests/test_it.py").write_text("left out")
    _, first = pack_folder(folder)
    (folder / "main.py").touch()
    _, second = pack_folder(folder)
    assert first == second
    artifact = unpack(first, "it")
    assert artifact.manifest.label == "mine@0.1.0"
    assert artifact.sources == (("main.py", "x = 1\n"), ("more/part.py", "y = 2\n"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PK nonsense", "not an artifact"),
        (b"", "not an artifact"),
        (zipped(main_py=b""), "expected Pie.toml"),
        (zipped(Pie_toml=b"x = 1"), "it: Pie.toml:1: x: unknown key"),
        (zipped(Pie_toml=GOOD), "names the entry main.py, which is not in it"),
        (zipped(Pie_toml=GOOD, main_py=b"\xff"), "main.py is not UTF-8"),
        (pack({"Pie.toml": GOOD, "main.py": b"", "../out.py": b""}), "'../out.py' is no path inside"),
        (pack({"Pie.toml": GOOD, "main.py": b"", "/out.py": b""}), "no path inside"),
        (zipped(Pie_toml=GOOD, main_py=b"")[:-30], "not an artifact"),
        (zipped(Pie_toml=GOOD, main_py=b"abcdef").replace(b"abcdef", b"abcdeg"), "Bad CRC"),
    ],
)
def test_an_artifact_that_is_none_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ProgramError, match=r"^it: ") as caught:
        unpack(content, "it")
    assert problem in str(caught.value)


def test_a_compressed_archive_and_one_with_doubles_are_refused() -> None:
    for compression, names, problem in (
        (zipfile.ZIP_DEFLATED, ["main.py"], "compressed"),
        (zipfile.ZIP_STORED, ["main.py", "main.py"], "twice"),
    ):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            archive.writestr("Pie.toml", GOOD)
            for number, name in enumerate(names):
                archive.writestr(zipfile.ZipInfo(name) if number else name, b"x" * 100)
                archive.NameToInfo.clear()  # so that zipfile does not warn about what this test is about
        with pytest.raises(ProgramError, match=problem):
            unpack(buffer.getvalue(), "it")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_a_damaged_artifact_never_raises_otherwise(place: int, damage: bytes) -> None:
    content = bytearray(zipped(Pie_toml=GOOD, main_py=b"x = 1\n"))
    content[place % len(content) : place % len(content) + len(damage)] = damage
    with contextlib.suppress(ProgramError):
        assert unpack(bytes(content), "it").manifest.version


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/a", "a//b", "a\\b", "./a", "a/", "a\nb", "a\0"])
def test_paths_that_lead_elsewhere_are_not_safe(name: str) -> None:
    assert not is_safe_path(name)
    assert is_safe_path("a/b.py")


def test_a_folder_without_what_it_needs_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    (folder / "Pie.toml").unlink()
    with pytest.raises(ProgramError, match=r"has no Pie\.toml"):
        pack_folder(folder)
    rust = make_folder("rusty", more='entry = "rusty.wasm"\n')
    (rust / "Cargo.toml").write_text("")
    with pytest.raises(ProgramError, match="cargo build"):
        pack_folder(rust)
    (rust / "rusty.wasm").write_bytes(b"text")
    with pytest.raises(ProgramError, match="expected a WebAssembly component"):
        pack_folder(rust)
    with pytest.raises(ProgramError, match="no path inside"):
        pack_folder(make_folder("outside", more='entry = "../main.py"\n'))
    with pytest.raises(ProgramError, match="expected a folder"):
        pack_folder(tmp_path / "none")


def test_what_is_installed_is_found_by_version_and_the_newest_by_name(
    store: ProgramStore, make_folder: MakeFolder
) -> None:
    for version in ("0.9.0", "0.10.0", "0.2.0"):
        store.add(make_folder(version=version, source=f"v = {version!r}\n"))
    newest = store.find("mine")
    assert newest is not None
    assert newest.version == "0.10.0"
    older = store.find("mine", "0.2.0")
    assert older is not None
    program = store.open(older)
    assert isinstance(program, PythonProgram)
    assert program.files == (("main.py", "v = '0.2.0'\n"),)
    assert program.manifest == older.manifest
    assert [entry.version for entry in store.installed()] == ["0.2.0", "0.9.0", "0.10.0"]
    assert store.find("mine", "0.3.0") is store.find("other") is store.find("../mine") is None


def test_a_component_is_kept_as_the_file_that_runs(store: ProgramStore, make_folder: MakeFolder) -> None:
    uploaded = store.add_content(WASM, MANIFEST.format("up", "1.0.0"))
    assert uploaded.content_hash == content_hash(WASM)
    assert uploaded.manifest_hash == content_hash(MANIFEST.format("up", "1.0.0").encode())
    program = store.open(uploaded)
    assert isinstance(program, ComponentProgram)
    assert program.path.read_bytes() == WASM
    folder = make_folder("packed", more='entry = "it.wasm"\n')
    (folder / "it.wasm").write_bytes(WASM)
    packed = store.add(folder)
    assert isinstance(store.open(packed), ComponentProgram)
    assert packed.path == uploaded.path  # one content, one object
    store.remove("up")
    assert packed.path.is_file()
    store.remove("packed", "0.1.0")
    assert not packed.path.exists()


def test_the_same_again_changes_nothing_and_other_content_needs_to_be_asked_for(
    store: ProgramStore, make_folder: MakeFolder
) -> None:
    first = store.add(make_folder())
    assert store.add(make_folder()) == first
    other = make_folder(source="x = 2\n")
    with pytest.raises(ProgramError, match=r"mine@0\.1\.0 is installed with other content"):
        store.add(other)
    replaced = store.add(other, overwrite=True)
    assert replaced.content_hash != first.content_hash
    assert not first.path.exists()
    program = store.open(first)  # found before it was replaced
    assert isinstance(program, PythonProgram)
    assert program.files == (("main.py", "x = 2\n"),)


def test_an_upload_with_another_hash_leaves_nothing(store: ProgramStore) -> None:
    with pytest.raises(ProgramError, match="blake3 hash"):
        store.add_content(WASM, MANIFEST.format("up", "1.0.0"), expected_hash="0" * 64)
    store.add_content(WASM, MANIFEST.format("up", "1.0.0"), expected_hash=content_hash(WASM))
    for content, manifest, problem in (
        (WASM, None, "expected a manifest beside"),
        (b"text", MANIFEST.format("b", "1.0.0"), "expected a WebAssembly component"),
        (zipped(Pie_toml=GOOD, main_py=b""), MANIFEST.format("b", "1.0.0"), "not the one in it"),
    ):
        with pytest.raises(ProgramError, match=problem):
            store.add_content(content, manifest)
    assert [entry.label for entry in store.installed()] == ["up@1.0.0"]


def test_uninstalling_what_is_not_there_names_what_is(store: ProgramStore, make_folder: MakeFolder) -> None:
    store.add(make_folder())
    for name, version, problem in (
        ("mine", "0.2.0", r"mine@0\.2\.0 is not installed; installed are the versions 0\.1\.0"),
        ("mien", None, "did you mean `mine`"),
        ("../../x", None, "unknown installed program"),
    ):
        with pytest.raises(NotFound, match=problem):
            store.remove(name, version)
    assert store.remove("mine") == ["0.1.0"]
    assert store.entries() == []


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"manifest": 1, "content": "", "object": "", "size": 0}']
)
def test_a_damaged_record_is_named_takes_no_other_down_and_is_mended(
    store: ProgramStore, make_folder: MakeFolder, tmp_path: Path, damage: str
) -> None:
    store.add(make_folder())
    store.add(make_folder("other"))
    record = tmp_path / "store/records/mine/0.1.0.json"
    record.write_text(damage)
    entries = store.entries()
    assert [type(entry) is DamagedProgram for entry in entries] == [True, False]
    with pytest.raises(ProgramError, match=r"mine@0\.1\.0 is damaged.*pie uninstall mine@0\.1\.0"):
        store.find("mine")
    store.add(make_folder())
    assert store.find("mine") is not None


def test_damaged_missing_and_exchanged_contents_are_named(
    store: ProgramStore, make_folder: MakeFolder, tmp_path: Path
) -> None:
    program = store.add(make_folder())
    program.path.write_bytes(b"something else")
    with pytest.raises(ProgramError, match="is not what was installed"):
        store.open(program)
    program.path.unlink()
    with pytest.raises(ProgramError, match="is missing"):
        store.open(program)
    record = tmp_path / "store/records/mine/0.1.0.json"
    moved = record.with_name("0.2.0.json")
    moved.write_text(record.read_text())
    with pytest.raises(ProgramError, match=r"is about mine@0\.1\.0"):
        store.find("mine", "0.2.0")
    outside = json.loads(record.read_text()) | {"object": "../../../etc/passwd"}
    record.write_text(json.dumps(outside))
    with pytest.raises(ProgramError, match="is damaged"):
        store.find("mine", "0.1.0")


def test_many_at_once_lose_nothing(tmp_path: Path, make_folder: MakeFolder) -> None:
    contents = [pack_folder(make_folder(version=f"0.{n}.0", source=f"n = {n}\n"))[1] for n in range(6)]
    errors: list[BaseException] = []

    def work(content: bytes) -> None:
        try:
            for _ in range(3):
                ProgramStore(tmp_path / "store").add_content(content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store = ProgramStore(tmp_path / "store")
    assert len(store.installed()) == 6
    assert all(isinstance(store.open(entry), PythonProgram) for entry in store.installed())
    assert len(list((tmp_path / "store/objects").iterdir())) == 6


def test_names_lead_to_installed_then_shipped_programs_and_paths_to_files(
    store: ProgramStore, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(make_folder(source="installed = 1\n"))
    store.add(make_folder("chat", "9.0.0"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/main.py").write_text("beside = 1\n")
    files = [find_program(name, store) for name in ("mine", "./mine", "mine@0.1.0", "chat", "chat@9.0.0")]
    versions = [program.manifest.version if program.manifest else None for program in files]
    assert versions == ["0.1.0", None, "0.1.0", "9.0.0", "9.0.0"]
    shipped = find_program(f"chat@{shipped_version('chat')}", store)
    assert shipped.manifest is not None
    assert shipped.manifest.version == shipped_version("chat") != "9.0.0"
    assert find_installable("mine", store) == files[0]
    artifact = tmp_path / "mine.inferlet"
    artifact.write_bytes(pack_folder(make_folder(source="installed = 1\n"))[1])
    assert find_program(str(artifact), store) == files[0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mien", "did you mean 'mine'"),
        ("mine@0.2.0", r"installed are the versions 0\.1\.0"),
        ("mine@1", r"expected MAJOR\.MINOR\.PATCH"),
        ("./nowhere", "no such file or folder"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_there_is(
    store: ProgramStore, make_folder: MakeFolder, name: str, problem: str
) -> None:
    store.add(make_folder())
    with pytest.raises(ProgramError, match=problem):
        find_program(name, store)


def test_who_may_not_read_files_finds_names_only(
    store: ProgramStore, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder()
    for name in (folder.name, str(folder), "./mine-0.1.0", "chta"):
        with pytest.raises(NotFound, match="unknown program"):
            find_installable(name, store)
    with pytest.raises(
        NotFound, match=rf"no version 7\.0\.0 of the program chat; there are {shipped_version('chat')}"
    ):
        find_installable("chat@7.0.0", store)
    store.add(folder)
    with pytest.raises(NotFound, match=r"no version 7\.0\.0 of the program mine; there are 0\.1\.0"):
        find_installable("mine@7.0.0", store)


def test_labels_are_split_at_their_version() -> None:
    assert split_label("a") == ("a", None)
    assert split_label("a@1.2.3") == ("a", "1.2.3")
    for label in ("a@", "a@1", "a@1.2.3.4", "a@01.2.3"):
        with pytest.raises(ProgramError, match=r"MAJOR\.MINOR\.PATCH"):
            split_label(label)


class StoreMachine(RuleBasedStateMachine):
    """The store against a dictionary of what should be in it."""

    labels = st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["0.1.0", "0.2.0", "0.10.0"]))

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = ProgramStore(Path(self.folder.name) / "store")
        self.expected: dict[tuple[str, str], str] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(label=labels, source=st.sampled_from(["x = 1\n", "x = 2\n"]), overwrite=st.booleans())
    def add(self, label: tuple[str, str], source: str, overwrite: bool) -> None:
        content = zipped(Pie_toml=MANIFEST.format(*label).encode(), main_py=source.encode())
        if self.expected.get(label, source) != source and not overwrite:
            with pytest.raises(ProgramError, match="other content"):
                self.store.add_content(content)
        else:
            self.store.add_content(content, overwrite=overwrite)
            self.expected[label] = source

    @rule(label=labels, everything=st.booleans())
    def remove(self, label: tuple[str, str], everything: bool) -> None:
        name, version = label
        gone = [each for each in self.expected if each == label or (everything and each[0] == name)]
        if not gone or (not everything and label not in self.expected):
            with pytest.raises(NotFound):
                self.store.remove(name, None if everything else version)
        else:
            removed = self.store.remove(name, None if everything else version)
            assert sorted(removed) == sorted(version for _, version in gone)
            for each in gone:
                del self.expected[each]

    @invariant()
    def holds_what_it_should(self) -> None:
        found = {(entry.name, entry.version): self.source(entry) for entry in self.store.installed()}
        assert found == self.expected
        for name in ("a", "b"):
            versions = sorted((version for each, version in self.expected if each == name), key=version_key)
            newest = self.store.find(name)
            assert (newest.version if newest else None) == (versions[-1] if versions else None)

    def source(self, entry: InstalledProgram) -> str:
        program = self.store.open(entry)
        assert isinstance(program, PythonProgram)
        return program.files[0][1]


StoreMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestStoreMachine = StoreMachine.TestCase
