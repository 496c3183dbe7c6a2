"""Locates the files of a model: a folder, or a name on the Hugging Face hub, downloaded to the hub's cache."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from gptjax.config.errors import DataError
from gptjax.core import files

# Weights, configs and tokenizers; no code and no pickles.
ALLOW_PATTERNS = ["*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.jinja"]
POINTER = b"version https://git-lfs.github.com/spec/"


def find(name: str) -> Path:
    """Returns the folder of a model: `name` itself, or a snapshot of the model with that name on the hub.

    Raises:
      DataError: there is neither, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise DataError(f"there is no folder {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=ALLOW_PATTERNS))
    except GatedRepoError as error:
        raise DataError(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"there is no folder {name}, and the Hugging Face hub has no model of that name") from error
    except HFValidationError as error:
        raise DataError(f"there is no folder {name}, and it is no name of the hub's such as gpt2") from error
    except LocalEntryNotFoundError as error:
        why = str(error).strip().splitlines()[0].removeprefix("Got: ")[:200]
        raise DataError(
            f"there is no folder {name}, and the Hugging Face hub cannot be reached to look for a model of that name "
            f"({why}); give a folder, or run this where there is a network"
        ) from error
    except Exception as error:  # of the hub or its HTTP client
        if isinstance(error, OSError) and error.errno:  # of this machine, such as a full disk
            raise
        line = " ".join(str(error).split())[:200]
        raise DataError(f"fetching {name} from the Hugging Face hub failed: {type(error).__name__}: {line}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model's folder; its numbers may be NaN or infinite.

    Raises:
      DataError: the file is missing, damaged, or a Git LFS pointer.
    """
    if not path.exists():
        raise DataError(f"{path.parent} is no model's folder: it has no {path.name}")
    value = files.parse_json(read_bytes(path), f"{path} is damaged and cannot be read: it", finite=False)
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: it holds no object")
    return value


def read_bytes(path: Path) -> bytes:
    """Reads a file of a model's folder.

    Raises:
      DataError: the file cannot be read, or is a Git LFS pointer.
    """
    refuse_pointer(path)
    return files.read_bytes(path)


def refuse_pointer(path: Path) -> None:
    """Raises DataError for a Git LFS pointer, which `git clone` leaves instead of a large file."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DataError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the folder it was cloned to"
            )
