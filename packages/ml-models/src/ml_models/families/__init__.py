"""Model families, one file each: `config.json` both ways, and where the weights go."""
