"""Models from a Hugging Face repository, through its own client library and cache."""

from __future__ import annotations

from pathlib import Path

from pie_core.errors import FetchError

# The checkpoint, its configuration, tokenizer and chat template; not other formats of the same weights.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "*.tiktoken")
IGNORED = ("*/*", "consolidated*")


def download_snapshot(repo: str, revision: str | None) -> Path:
    """The folder with the files of `repo`, downloaded if they are not cached."""
    # Imported on use: it costs a third of a second, and most starts never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    version = f"{repo} (revision {revision})" if revision else repo
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=[*PATTERNS], ignore_patterns=[*IGNORED]
        )
    except HFValidationError as error:
        raise FetchError(f"{repo} is no repository name; write it like `Qwen/Qwen3-0.6B`: {error}") from error
    except LocalEntryNotFoundError as error:
        raise FetchError(
            f"cannot download {version}: the model hub cannot be reached and the files are not cached; "
            "connect, or import a local copy with `pie model import PATH`"
        ) from error
    except HfHubHTTPError as error:
        raise FetchError(
            f"cannot download {version}: {_first_line(error)}; is the name right, and are you allowed?"
        ) from error
    except OSError as error:
        raise FetchError(f"cannot download {version}: {_first_line(error)}") from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
