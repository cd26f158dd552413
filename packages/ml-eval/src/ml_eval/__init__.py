"""Generation, chat and evaluation of large language models."""
