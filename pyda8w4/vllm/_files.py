"""Checkpoints of one file, which vLLM serves as a folder: GGUF files, and those that ``pyda8w4 convert`` wrote."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

import pyda8w4.checkpoints
from pyda8w4._filesystem import cache_folder
from pyda8w4.torch._checkpoint import recipe_of
from pyda8w4.vllm._config import NAME


def folder_of(file: Path) -> Path:
    """A folder with the config of a file's model, and its tokenizer if the file has one.

    It lies in the cache of the user, and is made once for each version of the file.
    """
    status = file.stat()
    version = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    cache = cache_folder() / "models"
    folder = cache / f"{file.stem}-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        new = Path(temporary) / "model"
        _write(new, file.resolve())
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _write(folder: Path, file: Path) -> None:
    checkpoint = pyda8w4.checkpoints.open(file)
    recipe = recipe_of(checkpoint)
    recipe.config.architectures = [recipe.model.__name__]
    recipe.config.save_pretrained(folder)
    if recipe.generation is not None:
        recipe.generation.save_pretrained(folder)
    if "tokenizer.ggml.model" in checkpoint.metadata:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    config = folder / "config.json"
    values = {**json.loads(config.read_text()), "quantization_config": {"quant_method": NAME, "checkpoint": str(file)}}
    config.write_text(json.dumps(values, indent=2) + "\n")


def register() -> None:
    """Let ``--quantization pyda8w4`` take a file as the model. Again does nothing else."""
    if getattr(EngineArgs.create_engine_config, "_takes_files", False):
        return
    create = EngineArgs.create_engine_config

    @wraps(create)
    def create_engine_config(self: EngineArgs, *args: Any, **more: Any) -> Any:
        file = Path(str(self.model))
        if self.quantization == NAME and file.is_file():
            if self.served_model_name is None:
                self.served_model_name = [str(self.model)]
            self.model = str(folder_of(file))
        return create(self, *args, **more)

    create_engine_config._takes_files = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
