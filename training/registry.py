"""The model registry: a trained folder in, a version with an alias out, and back again by URI."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from training.predictor import DEFAULT_TOP_K
from training.tracking import CANDIDATE, CHAMPION, MODEL_NAME, client
from training.trained import TrainedModel

REQUIREMENTS = ("torch", "numpy", "pandas", "safetensors", "tokenizers", "mlflow")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "text"), ColSpec(Array(DataType.long), "visual_tokens")]),
    outputs=Schema(
        [
            ColSpec(Array(Array(DataType.string)), "words"),
            ColSpec(Array(Array(DataType.double)), "log_probabilities"),
            ColSpec(DataType.double, "alignment"),
        ]
    ),
    params=ParamSchema([ParamSpec("top_k", DataType.long, DEFAULT_TOP_K)]),
)


def register(
    folder: Path, *, uri: str, run_id: str, name: str = MODEL_NAME, tags: Mapping[str, str] | None = None
) -> str:
    """Log a trained folder to a run, register it and point the alias `candidate` at it; returns the version.

    Args:
        folder: model.safetensors, config.json and vocab.txt, see `training.trained`.
        uri: of the tracking server.
    """
    package = Path(__file__).parent
    with _tracking_at(uri), mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example was not provided")  # the signature is explicit
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(package / "predictor.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],
            signature=SIGNATURE,
            pip_requirements=[f"{module}=={version(module).partition('+')[0]}" for module in REQUIREMENTS],
            registered_model_name=name,
        )
    number = str(info.registered_model_version)
    api = client(uri)
    for key, value in (tags or {}).items():
        api.set_model_version_tag(name, number, key, value)
    api.set_registered_model_alias(name, CANDIDATE, number)
    return number


def promote(*, name: str, version: str, alias: str = CHAMPION, uri: str) -> str:
    """Point an alias at a version; returns the version that had it before, or an empty text.

    Raises ValueError if there is no such version.
    """
    api = client(uri)
    try:
        api.get_model_version(name, version)
    except MlflowException as error:
        found = [str(v.version) for v in api.search_model_versions(f"name = '{name}'")]
        known = f"it has {', '.join(sorted(found, key=int))}" if found else "there is no model of that name"
        raise ValueError(f"{name} has no version {version} at {uri}; {known}.") from error
    aliases = api.get_registered_model(name).aliases
    api.set_registered_model_alias(name, alias, version)
    return str(aliases.get(alias, ""))


def local_folder(model: str, *, uri: str) -> Path:
    """The files of a model: a local folder as it is, or downloaded from `models:/NAME/VERSION`, `models:/NAME@ALIAS`.

    Raises FileNotFoundError where there is no such model.
    """
    if not re.match(r"[a-z]+:/", model):
        return _weights_folder(Path(model).expanduser())
    try:
        with _tracking_at(uri):
            downloaded = mlflow.artifacts.download_artifacts(artifact_uri=model)
    except (MlflowException, OSError) as error:
        raise FileNotFoundError(
            f"no model {model} at {uri}; `videobert pretrain` registers one as models:/{MODEL_NAME}@{CANDIDATE}."
        ) from error
    return _weights_folder(Path(downloaded))


def _weights_folder(folder: Path) -> Path:
    """A folder, or the one within it that holds the weights: MLflow keeps the name that an artifact came with."""
    if (folder / "MLmodel").is_file():
        return next((path.parent for path in (folder / "artifacts").glob("*/model.safetensors")), folder)
    return folder


def load(model: str, *, uri: str) -> TrainedModel:
    """A model by URI or folder. Raises FileNotFoundError where there is none."""
    return TrainedModel.load(local_folder(model, uri=uri))


def load_served(model: str, *, uri: str) -> mlflow.pyfunc.PyFuncModel:
    """A registered model as any other program gets it from MLflow; see `training.predictor` for its columns."""
    with _tracking_at(uri):
        return mlflow.pyfunc.load_model(model)


@contextmanager
def _tracking_at(uri: str) -> Iterator[None]:
    """MLflow's global address, for the calls that know no other way; as it was afterwards."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # sets the variable, or with None takes it away again
