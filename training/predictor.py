"""The model as MLflow serves it: a pyfunc from this code, safetensors weights and a vocabulary. No pickle anywhere.

MLflow runs this file to find the model (models from code), with the `training` package that was logged next to it, so
it loads in a process that has never heard of this project.

Input, one row a query: `text` (a sentence with [MASK]s) and `visual_tokens` (whole numbers, may be empty). Output:
`words` and `log_probabilities`, for each [MASK] the best `top_k`, and `alignment`, the probability that text and
visual tokens belong together (NaN where one of them is missing).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from training.trained import Query, TrainedModel

DEFAULT_TOP_K = 5


class Predictor(mlflow.pyfunc.PythonModel):
    """Fills masks."""

    def load_context(self, context: Any) -> None:
        self.trained = TrainedModel.load(Path(context.artifacts["model"]))

    def predict(
        self,
        context: Any,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Raises ValueError for visual tokens outside the vocabulary and for sequences that are too long."""
        top_k = int((params or {}).get("top_k", DEFAULT_TOP_K))
        queries = [
            Query(str(text), np.asarray(visual, np.int64))
            for text, visual in zip(model_input["text"], model_input["visual_tokens"], strict=True)
        ]
        rows = []
        for answer in self.trained.ask(queries):
            best = np.argsort(-answer.log_probabilities, axis=1, kind="stable")[:, :top_k]
            rows.append(
                {
                    "words": [[self.trained.vocabulary.tokens[i] for i in row] for row in best],
                    "log_probabilities": np.take_along_axis(answer.log_probabilities, best, axis=1).tolist(),
                    "alignment": answer.alignment,
                }
            )
        return pd.DataFrame(rows, columns=["words", "log_probabilities", "alignment"])


mlflow.models.set_model(Predictor())
