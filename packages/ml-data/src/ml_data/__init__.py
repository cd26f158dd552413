"""Texts, instructions and preferences to the token files that Megatron trains on."""
