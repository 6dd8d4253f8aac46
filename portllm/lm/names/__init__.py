"""Where a model's parameters are on disk, asked of transformers itself."""
