"""Pre-training of large language models, from one CPU process to a cluster."""
