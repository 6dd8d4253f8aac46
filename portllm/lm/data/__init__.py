"""Tasks and text: where rows come from, what is asked of a model, and how both become tokens."""
