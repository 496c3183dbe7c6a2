"""Downloads a file over http(s) once and caches it."""

import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from gptjax.config.errors import DataError
from gptjax.core import console, runtime


def download(url: str, sha256: str = "") -> Path:
    """Returns the cached copy of the file at `url`, downloading it first if there is none.

    Args:
      url: http or https URL.
      sha256: expected SHA-256 in hex, or "" for no check.

    Raises:
      DataError: the file cannot be downloaded, is truncated, or has another checksum. Nothing is cached then.
    """
    name = Path(urllib.parse.urlsplit(url).path).name or "download"
    path = runtime.cache_dir() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                _fetch(url, file)
            _check(Path(partial), sha256, url)
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    else:
        _check(path, sha256, f"{path} (kept from {url}; delete it to fetch it again)")
    return path


def _fetch(url: str, file) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with console.bar(f"fetching {url}", size or None) as advance:
                shutil.copyfileobj(response, _CountingWriter(file, advance), 1 << 16)
            if size and file.tell() != size:
                raise DataError(f"{url} is truncated: {file.tell()} of {size} bytes; try again")
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        raise DataError(f"cannot fetch {url}: {getattr(error, 'reason', error)}") from error


class _CountingWriter:
    def __init__(self, file, advance) -> None:
        self.file, self.advance = file, advance

    def write(self, chunk: bytes) -> int:
        self.advance(len(chunk))
        return self.file.write(chunk)


def _check(path: Path, sha256: str, description: str) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 and digest != sha256.lower():
        raise DataError(f"{description} has SHA-256 {digest}, not {sha256} (data.sha256)")
