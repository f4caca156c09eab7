"""One function that turns what a user writes as a model into a folder or a GGUF file on this machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from steepest.errors import ModelError

Hub = Literal["huggingface", "modelscope"]
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
"""Fetched from a hub: weights as safetensors, configs, tokenizers, remote code (which runs only when trusted)."""


def resolve_model(path_or_id: Path | str, *, hub: Hub = "huggingface") -> Path:
    """A local folder or .gguf file as it is; else a hub id, downloaded or found in the hub's cache.

    A folder without config.json that holds exactly one .gguf file stands for that file. Raises ModelError with what
    was tried and what to do.
    """
    text = str(path_or_id)
    local = Path(text).expanduser()
    if local.exists():
        return _check_local(local)
    is_path = isinstance(path_or_id, Path) or text.startswith(("/", ".", "~")) or text.endswith(".gguf")
    if is_path or text.count("/") > 1:
        raise ModelError(f"{text}: there is no such folder or file (looked for {local.absolute()}).")
    return _from_modelscope(text) if hub == "modelscope" else _from_huggingface(text)


def _check_local(local: Path) -> Path:
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelError(f"{local}: a model is a Hugging Face folder, a .gguf file or a hub id, not this file.")
        return local
    if (local / "config.json").is_file():
        return local
    files = sorted(local.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    held = f"it holds {len(files)} .gguf files: name one of them" if files else "it has no config.json"
    raise ModelError(f"{local}: not a model folder: {held}.")


def _from_huggingface(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return _check_local(Path(snapshot_download(name, allow_patterns=PATTERNS)))
    except errors.HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder here nor a hub id (owner/name).") from error
    except errors.GatedRepoError as error:
        raise ModelError(f"{name}: access is restricted. Accept its terms there, then run: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: the Hugging Face hub has no such model (or it is private: hf auth login), and there is no such "
            "folder here."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(_unreachable(name, "Hugging Face", "HF_ENDPOINT=<mirror>")) from error
    except OSError as error:  # every error of the connection is one
        raise ModelError(f"{_unreachable(name, 'Hugging Face', 'HF_ENDPOINT=<mirror>')} ({error})") from error


def _from_modelscope(name: str) -> Path:
    download = _modelscope_download()
    if download is None:
        raise ModelError(f"{name}: fetching from ModelScope needs its package: pip install 'steepest[modelscope]'")
    try:
        return _check_local(Path(download(name, allow_patterns=PATTERNS)))
    except ModelError:
        raise
    except Exception as error:  # the package raises types of its own, of requests and of the standard library
        raise ModelError(f"{_unreachable(name, 'ModelScope', 'the other hub')} ({error})") from error


def _modelscope_download() -> Any:
    # the full client and the slim one, which the extra installs, offer the same function under two names
    for module in ("modelscope", "modelscope_hub.compat"):
        try:
            return importlib.import_module(module).snapshot_download
        except ImportError:
            continue
    return None


def _unreachable(name: str, hub: str, mirror: str) -> str:
    return (
        f"{name}: not in the local cache, and {hub} cannot be reached. There is no such folder here either. Download "
        f"the model where there is a network and give its folder, or use a mirror ({mirror})."
    )
