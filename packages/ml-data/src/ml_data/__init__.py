"""Raw text to the token files that Megatron trains on."""
