"""Models on this machine: which paths are accepted, and the errors for other paths."""

from __future__ import annotations

from pathlib import Path

from steepest.errors import ModelError


def looks_like_a_path(text: str) -> bool:
    """True if the text can only be a local path, never a hub id."""
    return text.startswith(("/", ".", "~")) or text.endswith(".gguf") or text.count("/") > 1


def local_model(path: Path | str) -> Path:
    """Check a model folder or .gguf file and return its path. For a folder without config.json that holds exactly one
    .gguf file it returns that file.

    Raises ModelError for anything else.
    """
    local = Path(path).expanduser()
    if not local.exists():
        raise ModelError(f"{path}: there is no such folder or file (looked for {local.absolute()}).")
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelError(f"{local}: a model is a Hugging Face folder, a .gguf file or a hub id, not this file.")
        return local
    if (local / "config.json").is_file():
        return local
    if (local / "adapter_config.json").is_file():
        raise ModelError(
            f"{local}: a LoRA adapter without its base model. Merge it first (steepest export {local} --to FOLDER) and "
            "use that folder."
        )
    files = sorted(local.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    held = f"it holds {len(files)} .gguf files: name one of them" if files else "it has no config.json"
    if (local / "metrics.jsonl").is_file():
        held = "it is the folder of a run without a checkpoint"
    raise ModelError(f"{local}: not a model folder: {held}.")
