"""From records to samples with labels: what `ml-data instruct` and `preference` are made of."""
