"""The code of a registered version: prompts in, generated text out.

MLflow copies this file into each version (models-from-code, so nothing is pickled). It therefore imports
mlflow, torch and transformers, and not portllm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.models import set_model  # noqa: TID253 - MLflow runs this file; portllm never imports it
from mlflow.pyfunc import PythonModel  # noqa: TID253


class Generator(PythonModel):  # type: ignore[misc]
    """A causal language model that continues each prompt greedily."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint that was registered, or the adapter over its base, and the tokenizer.

        The loader sets `max_new_tokens`: `load_model(uri, model_config={"max_new_tokens": 64})`. A version that is an
        adapter needs its release, too, a directory or a hub id: `model_config={"base": "models/releases/v1"}`.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = context.artifacts["checkpoint"]
        adapter = (Path(folder) / "adapter_config.json").is_file()
        base = context.model_config.get("base") if adapter else folder
        if not base:
            raise ValueError("this version is an adapter; load it with model_config={'base': its release}")
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        if adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, folder).eval()

    def predict(self, context: Any, model_input: list[str]) -> list[str]:
        """Return the text that continues each prompt, chosen greedily."""
        import torch

        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        batch = self.tokenizer(list(model_input), return_tensors="pt", padding=True, return_token_type_ids=False)
        limit = int(context.model_config["max_new_tokens"])
        with torch.inference_mode():
            ids = self.model.generate(
                **batch, max_new_tokens=limit, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        start = batch["input_ids"].shape[1]
        return [str(text) for text in self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)]


set_model(Generator())
