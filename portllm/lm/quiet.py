"""Silence the libraries' own notes and progress bars: portllm's own contain what a user needs."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silence transformers', datasets' and the harness's notes; their errors stay."""
    from transformers.utils import logging as transformers_logging

    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # deprecations between transformers and peft, which portllm cannot fix
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")
