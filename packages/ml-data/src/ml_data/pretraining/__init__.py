"""From records to documents of tokens: what `ml-data pretrain` is made of."""
