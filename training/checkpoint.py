"""Checkpoints that are there completely or not at all.

    checkpoints/step-00001200/model.safetensors   weights
                              optimizer.pt        Adam's moments, read back with weights_only=True
                              state.json          cursor and identity of the run; written last, so it is the commit

A folder without state.json does not exist for a reader, so a kill at any moment leaves the previous checkpoint in
charge, on a disk as in an object store, where a folder cannot be renamed. We keep our own checkpoints instead of
Ray's because Ray 2.60 finds its latest through a snapshot file that it rewrites in place. The price is one copy of
the bytes in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load, save

from pipelines.dataset import Folder
from training.model import VideoBERT
from training.plan import Cursor

COMMIT = "state.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The checkpoints of one run."""

    folder: Folder
    keep: int = 2

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        names = self.folder.names("checkpoints", suffix=f"/{COMMIT}")
        return sorted(int(name.split("/")[-2].removeprefix("step-")) for name in names)

    def save(
        self,
        model: VideoBERT,
        optimizer: torch.optim.Optimizer,
        *,
        cursor: Cursor,
        identity: Mapping[str, object],
    ) -> None:
        """Write a checkpoint, then drop all but the last `keep`."""
        prefix = _prefix(cursor.step)
        self.folder.write(f"{prefix}/model.safetensors", save(model.state_dict()))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        self.folder.write(f"{prefix}/optimizer.pt", buffer.getvalue())
        state = {"cursor": asdict(cursor), "identity": dict(identity)}
        self.folder.write(f"{prefix}/{COMMIT}", json.dumps(state, sort_keys=True, indent=1).encode())
        for step in self.steps()[: -self.keep]:
            self._delete(step)

    def restore(
        self,
        step: int,
        model: VideoBERT,
        optimizer: torch.optim.Optimizer | None,
        *,
        identity: Mapping[str, object],
    ) -> Cursor:
        """Load the checkpoint of a step into model and optimizer; returns where the run goes on.

        Raises ValueError if it was written by a run of another identity.
        """
        prefix = _prefix(step)
        state = json.loads(self.folder.read(f"{prefix}/{COMMIT}"))
        check_identity(found=state["identity"], expected=identity)
        model.load_state_dict(load(self.folder.read(f"{prefix}/model.safetensors")))
        if optimizer is not None:
            moments = io.BytesIO(self.folder.read(f"{prefix}/optimizer.pt"))
            optimizer.load_state_dict(torch.load(moments, weights_only=True))
        return Cursor(**state["cursor"])

    def _delete(self, step: int) -> None:
        """The commit goes first: a deletion that is cut short leaves no half checkpoint."""
        self.folder.fs.delete_file(self.folder.path(f"{_prefix(step)}/{COMMIT}"))
        self.folder.fs.delete_dir(self.folder.path(_prefix(step)))


def check_identity(*, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Raises ValueError that names each difference with both values."""
    missing = "(absent)"
    differences = [
        f"{name}: {found.get(name, missing)} in the checkpoint, {expected.get(name, missing)} now"
        for name in sorted({*found, *expected})
        if found.get(name, missing) != expected.get(name, missing)
    ]
    if differences:
        raise ValueError(
            f"the checkpoint belongs to another run ({'; '.join(differences)}); "
            "give the same settings, or another --name to start anew."
        )


def _prefix(step: int) -> str:
    return f"checkpoints/step-{step:08d}"
