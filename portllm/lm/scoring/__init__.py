"""The LM Evaluation Harness over one loaded base and many patches; nothing scored twice."""
