"""`python -m portllm` is the `portllm` command."""

from portllm.cli import main

main()
