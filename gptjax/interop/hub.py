"""Where a model's files are: a folder, or a name on the Hugging Face hub, fetched into the hub's own cache."""

import json
from pathlib import Path
from typing import Any

from gptjax.config import DataError

# Weights, configs and tokenizers; no code, and no pickle.
WANTED = ["*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.jinja"]


def find(name: str) -> Path:
    """The folder of a model: `name` itself, or a snapshot of what the hub has under that name.

    Raises:
      DataError: neither, or the hub cannot be reached.
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
        return Path(snapshot_download(name, allow_patterns=WANTED))
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
    except Exception as error:  # the hub's, and its HTTP client's own
        if isinstance(error, OSError) and error.errno:  # this machine's, such as a full disk
            raise
        line = " ".join(str(error).split())[:200]
        raise DataError(f"fetching {name} from the Hugging Face hub failed: {type(error).__name__}: {line}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      DataError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} is no model's folder: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it holds no object")
    return found
