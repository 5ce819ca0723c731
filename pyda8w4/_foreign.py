"""What people give for a checkpoint that is none: other files, other folders, and names of models."""

from __future__ import annotations

import errno
import re
from pathlib import Path

_SAVED_BY_TORCH = "torch.load reads those of torch.save, and pyda8w4.torch.quantize_ takes the model"
_KINDS = {
    b"GGUF": "a GGUF file, which pyda8w4.checkpoints.open reads",
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` fetches the file that it stands for",
    b"PK\3\4": f"a zip archive: {_SAVED_BY_TORCH}",
    b"\x80": f"a pickle: {_SAVED_BY_TORCH}",
    b"\x93NUMPY": "an array of numpy: pyda8w4.quantize takes what numpy.load gives",
    b"lmgg": "a file of ggml from before GGUF: llama.cpp has converters",
    b"tjgg": "a file of ggml from before GGUF: llama.cpp has converters",
    b"{": "a JSON file: the folder of a model is opened, not its config.json",
    b"<": "a web page: a download that has failed",
}
_OF_TORCH = {".bin", ".pt", ".pth"}
_OF_FILES = {*_OF_TORCH, ".gguf", ".safetensors", ".onnx"}


def kind_of_file(start: bytes) -> str:
    """What else than a safetensors file begins so, for the end of a message; nothing where that is not known."""
    if not start:
        return "; it is empty"
    if start[8:9] == b"{":  # the header of a safetensors file, whose length comes before it
        return ""
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x1a"):  # the fields of a ModelProto that come first
        return "; it seems to be an ONNX model, whose float weights pyda8w4.quantize takes as arrays"
    return next((f"; it is {kind}" for prefix, kind in _KINDS.items() if start.startswith(prefix)), "")


def missing(path: Path) -> FileNotFoundError:
    """For a checkpoint that is not there."""
    name = str(path)
    hint = ""
    if re.match(r"https?:", name):
        hint = " (what is on the web must be downloaded first)"
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and path.suffix not in _OF_FILES and not path.parent.exists():
        hint = f" (a model of huggingface.co is downloaded first: hf download {name} --local-dir {path.name})"
    return FileNotFoundError(errno.ENOENT, f"No such file or directory{hint}", name)


def missing_config(folder: Path) -> FileNotFoundError:
    """For a folder without config.json."""
    if files := sorted(folder.glob("*.gguf")):
        hint = f"a GGUF file is opened itself: {files[0]}"
    elif snapshots := sorted(folder.glob("snapshots/*")):
        hint = f"in a cache of Hugging Face the model is the folder {snapshots[0]}"
    else:
        hint = f"the folder has {names_in(folder)}"
    return FileNotFoundError(errno.ENOENT, f"No such file or directory ({hint})", str(folder / "config.json"))


def instead_of_safetensors(folder: Path) -> str:
    """What a folder has in their place, for the end of a message."""
    of_torch = any(path.suffix in _OF_TORCH for path in folder.iterdir())
    hint = "; save_pretrained of transformers writes a model that it has loaded" if of_torch else ""
    return f"{names_in(folder)}{hint}"


def names_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
