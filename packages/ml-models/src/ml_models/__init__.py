"""Model families and the GPT model on megatron-core, with the flags that describe them."""
