"""The tensors of a folder's *.safetensors files: one file, or many with an index. Nothing is unpickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.weights.errors import CheckpointError
from engine.weights.json_files import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """Opens each file once and keeps it mapped; raises CheckpointError in one line that names the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        index = folder / _INDEX
        self.file_of = _from_index(index) if index.is_file() else self._from_single()

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, in the file's own dtype, possibly backed by the mapped file."""
        file = self.file_of[name]
        try:
            return self._open(file).get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: tensor '{name}': {error}") from error

    def _from_single(self) -> dict[str, str]:
        if not (self.folder / _SINGLE).is_file():
            raise CheckpointError(f"{self.folder}: neither {_SINGLE} nor {_INDEX} is there")
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"{path}: named by {_INDEX}, but not there") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: {error}") from error
        return self._files[file]


def _from_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, which must lie in the same folder."""
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: lacks the object weight_map")
    for name, file in files.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise CheckpointError(f"{path}: weight_map places '{name}' in {str(file)[:80]!r}")
    return files
